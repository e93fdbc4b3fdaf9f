"""Every Python block that a reader can copy is run, from the top of its page to the bottom."""

from pathlib import Path

import jax
import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "conformance" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
SYBIL = Sybil(parsers=[PythonCodeBlockParser()])


@pytest.mark.internal
@jax.numpy_dtype_promotion("standard")  # as a reader has it; optax needs it
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs(page):
    for example in SYBIL.parse(page).examples():
        example.evaluate()
