"""The pages of the site that show the figures. No figure on them is typed by hand."""

from pathlib import Path

from benchmarks import comparison_page, report

FOLDER = Path(__file__).parents[2] / "docs" / "benchmarks"


def pages(folder: Path) -> dict[str, str]:
    """The text of every page, from the files of figures in that folder."""
    runs = {name: report.read(folder / f"{name}.json") for name in ("cpu", "gpu")}
    engines = comparison_page.read(folder / "engines.json")
    return {"index.md": report.page(**runs), "comparison.md": comparison_page.page(engines)}


def write(folder: Path) -> None:
    """Writes the pages and their plots."""
    from benchmarks import plots

    for name, text in pages(folder).items():
        (folder / name).write_text(text)
    for name in ("cpu", "gpu"):
        if run := report.read(folder / f"{name}.json"):
            plots.write(run, folder)
