"""The tables of the spec and the library say the same."""

import inspect
import itertools
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from datarax_conformance import spec
from flax import nnx

from datarax import Pipeline, _keys, _order, errors
from datarax.sources import MemorySource, MemorySourceConfig

TABLES = spec.read(Path(__file__).parents[2]).tables
CONSTANTS = {row["name"]: row["value"] for row in TABLES["constants"]["constant"]}
ERRORS = {row["class"]: row for row in TABLES["errors"]["error"]}


def flat(steps):
    return [number for number in itertools.chain.from_iterable(steps) if number is not None]


@pytest.mark.internal
def test_the_constants_of_the_library_are_those_of_the_table():
    assert [list(turns) for turns in _keys.ROTATIONS] == CONSTANTS["ROTATIONS"]
    assert CONSTANTS["PARITY"] == _keys.PARITY
    assert CONSTANTS["ROUNDS"] == _order.ROUNDS
    assert flat(_order.FMIX32) == CONSTANTS["FMIX32"]
    assert flat(_order.SPLITMIX64) == CONSTANTS["SPLITMIX64"]
    assert inspect.signature(Pipeline.__init__).parameters["mask_name"].default == CONSTANTS["MASK"]


@pytest.mark.spec("ERR-022")
@pytest.mark.parametrize("name", ERRORS)
def test_the_class_of_a_code_is_the_one_of_the_table(name):
    error = getattr(errors, name)
    assert issubclass(error, ValueError)
    assert error.code == ERRORS[name]["code"]
    for attribute in ERRORS[name]["names"]:
        assert f"self.{attribute}" in inspect.getsource(error)


@pytest.mark.spec("ERR-022")
def test_no_error_that_is_raised_is_missing_in_the_table():
    classes = {x for x in vars(errors).values() if inspect.isclass(x)}
    leaves = {c for c in classes if not any(c in other.__bases__ for other in classes)}
    assert {c.__name__ for c in leaves if issubclass(c, ValueError)} == set(ERRORS)


@pytest.mark.spec("STATE-016")
def test_a_state_follows_the_schema_of_the_table():
    source = MemorySource(MemorySourceConfig(), {"id": np.arange(10)})
    plain = Pipeline(source=source, stages=[], batch_size=4, rngs=nnx.Rngs(0))
    with_variables = Pipeline(
        source=source, stages=[Noise(nnx.Rngs(0))], batch_size=4, rngs=nnx.Rngs(0)
    )
    schema = spec.state_schema(TABLES)
    for pipeline in (plain, with_variables):
        pipeline.step()
        jsonschema.validate(pipeline.get_state(), schema)
    assert with_variables.get_state()["variables"] and not plain.get_state()["variables"]


class Noise(nnx.Module):
    """A stage with state of its own, a key among it."""

    def __init__(self, rngs):
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, batch):
        return {"id": self.dropout(batch["id"].astype("float32"))}
