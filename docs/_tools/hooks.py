"""What the site is made of beside the files in `docs/`: the spec, the scripts and the changelog."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from requirement_blocks import RequirementExtension
from script_pages import page_of

ROOT = Path(__file__).parents[2]


def on_config(config: MkDocsConfig) -> None:
    config.markdown_extensions.append(RequirementExtension())


def on_files(files: Files, config: MkDocsConfig) -> None:
    for chapter in sorted((ROOT / "spec").glob("*.md")):
        files.append(
            File.generated(config, f"spec/{chapter.name}", abs_src_path=str(chapter)),
        )
    for script in sorted((ROOT / "docs" / "examples").rglob("*.py")):
        page = script.relative_to(ROOT / "docs").with_suffix(".md")
        files.append(File.generated(config, page.as_posix(), content=page_of(script, ROOT)))
    files.append(
        File.generated(config, "changelog.md", abs_src_path=str(ROOT / "CHANGELOG.md")),
    )
