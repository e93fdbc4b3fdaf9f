"""Every example of the spec is run against the model that the same pages hold."""

from pathlib import Path

import pytest
from datarax_conformance import spec
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = Path(__file__).parents[2]
# Blocks that are titled "model" are not in plain `python` fences, so Sybil leaves them alone.
SYBIL = Sybil(parsers=[PythonCodeBlockParser()])


@pytest.mark.internal
@pytest.mark.parametrize("chapter", spec.chapters(ROOT), ids=lambda path: path.stem)
def test_the_examples_of_a_chapter_hold(chapter):
    document = SYBIL.parse(chapter)
    document.namespace.update(vars(spec.run_model(spec.read(ROOT).model)))
    for example in document.examples():
        example.evaluate()
