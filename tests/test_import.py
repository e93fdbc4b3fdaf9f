"""What can be imported from where, and what it costs."""

import importlib
import json
import pydoc
import subprocess
import sys

import pytest

MEASURE = """
import json, sys
import jax, flax.nnx
before = set(sys.modules)
import datarax
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps(sorted(new - sys.stdlib_module_names)))
"""


@pytest.mark.internal
@pytest.mark.parametrize(
    "module, names",
    [
        ("datarax", ["Pipeline", "__version__", "errors", "operators", "pipeline", "sources"]),
        ("datarax.pipeline", ["Pipeline"]),
        ("datarax.sources", ["EagerSourceBase", "MemorySource", "MemorySourceConfig"]),
        ("datarax.sources.memory_source", ["MemorySource", "MemorySourceConfig"]),
        ("datarax.operators", ["ElementOperator", "ElementOperatorConfig", "OperatorModule"]),
        ("datarax.operators", ["Element"]),
        ("datarax.errors", ["DataraxError", "CycleError", "StageError"]),
    ],
)
def test_names_can_be_imported_from_where_they_are_promised(module, names):
    for name in names:
        assert hasattr(importlib.import_module(module), name)


@pytest.mark.internal
def test_help_lists_what_a_module_is_for():
    from datarax import errors, testing

    assert "\nDATA" not in pydoc.plain(pydoc.render_doc(errors))
    assert testing.__all__ == ["LawError", "check_pipeline", "check_source", "check_stage"]


@pytest.mark.internal
def test_a_name_is_one_object_wherever_it_is_imported_from():
    import datarax
    from datarax import pipeline, sources
    from datarax.sources import memory_source

    assert datarax.Pipeline is pipeline.Pipeline
    assert sources.MemorySource is memory_source.MemorySource


@pytest.mark.internal("what it costs in seconds is measured by `make bench`")
def test_beyond_jax_and_flax_an_import_loads_equinox_and_jaxtyping_alone():
    run = [sys.executable, "-c", MEASURE]
    output = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    assert json.loads(output) == ["datarax", "equinox", "jaxtyping", "wadler_lindig"]
