"""Modules of our own: an assignment shows, any name is a part's, and what is fixed stays."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import ahead
from hypothesis import given, strategies as st

from datarax import Pipeline
from datarax._modules import Bundle, FixedBundle
from datarax.operators import OperatorModule
from datarax.sources import MemorySource, MemorySourceConfig


@pytest.mark.internal
@given(st.lists(st.text(), unique=True, max_size=5), st.sampled_from([Bundle, FixedBundle]))
def test_any_name_finds_its_part_in_the_order_given(names, kind):
    parts = {name: nnx.Param(jnp.float32(i)) for i, name in enumerate(["names", "get", *names])}
    bundle = kind(parts)
    assert [name for name, _ in bundle.items()] == list(parts)
    assert all(bundle.get(name) is part for name, part in parts.items())
    assert len(nnx.to_flat_state(nnx.state(bundle))) == len(parts)


@pytest.mark.internal
def test_a_part_can_be_replaced_by_one_of_another_kind():
    bundle = Bundle({"x": nnx.Param(jnp.float32(1))})
    bundle.put("x", "static")
    assert bundle.get("x") == "static"
    assert not nnx.to_flat_state(nnx.state(bundle))


@pytest.mark.internal
def test_no_part_of_a_fixed_bundle_is_replaced():
    bundle = FixedBundle({"x": 1})
    for replace in (
        lambda: setattr(bundle, "x", 2),
        lambda: delattr(bundle, "x"),
        lambda: bundle.put("x", 2),
    ):
        with pytest.raises(AttributeError) as caught:
            replace()
        assert str(caught.value) == "`x` cannot be replaced: build what it is a part of again."
        assert bundle.get("x") == 1


@pytest.mark.internal
def test_the_data_of_a_source_cannot_be_swapped_unseen_but_may_change():
    """Its modules are not looked at, its Variables are."""
    source = MemorySource(MemorySourceConfig(), {"x": np.arange(64, dtype=np.float32)})
    pipeline = Pipeline(source=source, batch_size=4)
    column = source.data.get("x")
    for owner, name in ((source.data, "x"), (column, "data")):
        with pytest.raises(AttributeError, match=f"`{name}` cannot be replaced"):
            setattr(owner, name, getattr(owner, name))
    with ahead(8):
        batches = iter(pipeline)
        for _ in range(5):
            next(batches)
        column.data[...] = column.data[...] + 100
        np.testing.assert_array_equal(next(batches)["x"], np.arange(20, 24) + 100)


class Add(OperatorModule):
    def __init__(self):
        super().__init__()
        self.by = 1

    def apply(self, element, key):
        return element.update_data({"x": element.data["x"] + self.by})


def set_by(pipeline):
    pipeline.nodes["add"].by = 100


def shrink(pipeline):
    pipeline.batch_size = 2


@pytest.mark.parametrize("change, then", [(set_by, [100, 101, 102, 103]), (shrink, [1, 2])])
@pytest.mark.parametrize("how", [lambda change: change, nnx.jit], ids=["outside", "in nnx.jit"])
def test_an_attribute_of_a_module_of_ours_is_seen_however_it_is_assigned(change, then, how):
    """ITER-010: though nobody compares them batch by batch."""
    pipeline = numbers(nodes={"add": Add()}, edges={"add": []}, sink="add")
    change = how(change)
    change(pipeline)  # so that NNX writes what it remembers when it is called again
    pipeline.nodes["add"].by, pipeline.batch_size = 1, 4
    with ahead(8):
        batches = iter(pipeline)
        while not pipeline._runtime._ahead.ready:
            next(batches)
        offset = pipeline.cursor.offset
        change(pipeline)
        assert (next(batches)["x"] - offset).tolist() == then


@pytest.mark.internal
def test_an_attribute_of_another_pipeline_discards_nothing():
    pipeline, other = numbers(stages=[Add()]), numbers(stages=[Add()])
    with ahead(8):
        batches = iter(pipeline)
        while not pipeline._runtime._ahead.ready:
            next(batches)
        before = len(pipeline._runtime._ahead.ready)
        other.nodes[next(iter(other.nodes))].by = 2
        other.batch_size = 2
        next(batches)
        assert len(pipeline._runtime._ahead.ready) == before - 1


def numbers(**stages):
    source = MemorySource(MemorySourceConfig(), {"x": np.arange(128, dtype=np.int32)})
    return Pipeline(source=source, batch_size=4, **stages)
