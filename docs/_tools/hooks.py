"""Adds the pages of the site that are not in `docs/`: the spec, the scripts and the rest."""

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
        page = f"spec/{chapter.name}"
        files.append(File.generated(config, page, abs_src_path=str(chapter)))
    for script in sorted((ROOT / "docs" / "examples").rglob("*.py")):
        page = script.relative_to(ROOT / "docs").with_suffix(".md").as_posix()
        files.append(File.generated(config, page, content=page_of(script, ROOT)))
    for page, written_in in {
        "changelog.md": ROOT / "CHANGELOG.md",
        "conformance.md": ROOT / "conformance" / "README.md",
    }.items():
        files.append(File.generated(config, page, abs_src_path=str(written_in)))
