"""The page about the code speaks of code that exists."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/guide/internals.md").read_text()

pytestmark = pytest.mark.internal


def test_every_module_that_is_named_exists():
    named = set(re.findall(r"`([\w/]+\.py)`", PAGE))
    assert len(named) > 15
    assert sorted(x for x in named if not (ROOT / "src/datarax" / x).exists()) == []


def test_every_function_of_the_diagram_exists():
    diagram = PAGE.split("```mermaid")[1].split("```")[0]
    modules = [
        importlib.import_module(f"datarax.pipeline.{path.stem}")
        for path in (ROOT / "src/datarax/pipeline").glob("_*.py")
        if path.stem != "__init__"
    ]
    known = {name: x for module in modules for name, x in vars(module).items()}
    named = set(re.findall(r"\b([A-Z]\w+)\.(\w+)", diagram))
    assert named and all(hasattr(known[owner], name) for owner, name in named)
    assert "batch_program" in diagram and "batch_program" in known
