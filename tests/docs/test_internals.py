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


def test_every_method_that_is_named_exists():
    modules = [
        importlib.import_module(f"datarax.pipeline.{path.stem}")
        for path in (ROOT / "src/datarax/pipeline").glob("_*.py")
        if path.stem != "__init__"
    ]
    known = {name: x for module in modules for name, x in vars(module).items()}
    named = set(re.findall(r"`([A-Z]\w+)\.(\w+)`", PAGE))
    assert len(named) > 4
    assert sorted(x for x in named if not hasattr(known[x[0]], x[1])) == []
