"""`Watched` reports assignments, `Bundle` takes any name, and `Fixed` refuses replacements."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import ahead
from hypothesis import given, strategies as st

from datarax import Pipeline, _modules
from datarax._modules import Bundle, FixedBundle
from datarax.operators import OperatorModule
from datarax.pipeline import _binding
from datarax.pipeline._binding import Binding
from datarax.sources import MemorySource, MemorySourceConfig


@pytest.mark.internal
@given(st.lists(st.text(), unique=True, max_size=5), st.sampled_from([Bundle, FixedBundle]))
def test_any_name_finds_its_part_in_the_order_given(names, kind):
    parts = {name: nnx.Param(jnp.float32(i)) for i, name in enumerate(["names", "get", *names])}
    bundle = kind(parts)
    assert list(bundle.names) == list(parts)
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
    """No reader compares its modules; its Variables are compared."""
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
    """Adds an attribute and a Param: tests assign to either."""

    def __init__(self):
        super().__init__()
        self.by = 0
        self.bias = nnx.Param(jnp.int32(0))

    def apply(self, element, key):
        return element.update_data({"x": element.data["x"] + self.by + self.bias[...]})


class Model(nnx.Module):
    def __init__(self, stage):
        self.stage, self.weight = stage, nnx.Param(jnp.ones(()))

    def __call__(self):
        return self.weight[...]


def of_pipeline(pipeline):
    pipeline.batch_size = 2


def of_stage(pipeline):
    pipeline.nodes["add"].by = 100


def assigned(stage):
    stage.by = 100
    return jnp.zeros(())


def more(stage):
    stage.by = 100
    stage.more = nnx.Param(jnp.int32(0))


def anew(stage):
    stage.bias = nnx.Param(stage.bias[...] + 100)


def by_model(model):
    model.stage.by = 100
    return model()


CHANGES = {
    "pipeline": (of_pipeline, lambda pipeline, stage: pipeline),
    "stage in pipeline": (of_stage, lambda pipeline, stage: pipeline),
    "stage": (assigned, lambda pipeline, stage: stage),
    "another Variable": (more, lambda pipeline, stage: stage),
    "a Variable": (anew, lambda pipeline, stage: stage),
    "model": (by_model, lambda pipeline, stage: Model(stage)),
}


@pytest.mark.spec("ITER-010")
@pytest.mark.parametrize(
    "how", [lambda change: change, nnx.jit, nnx.remat], ids=["assigned", "jit", "remat"]
)
@pytest.mark.parametrize("what", CHANGES)
def test_an_attribute_of_a_module_of_ours_is_seen_however_it_is_assigned(what, how):
    """Although no reader compares attributes at every batch."""
    stage = Add()
    pipeline = numbers(nodes={"add": stage}, edges={"add": []}, sink="add")
    change, of = CHANGES[what]
    if how is nnx.remat:
        change = as_remat(change)
    change = how(change)
    target = of(pipeline, stage)
    for _ in range(2):  # the second call makes NNX write back what it cached
        change(target)
        stage.by, stage.bias, pipeline.batch_size = 0, nnx.Param(jnp.int32(0)), 4
        if what == "another Variable":
            del stage.more
    with ahead(8):
        batches = iter(pipeline)
        while not pipeline._runtime._computed.ready:
            next(batches)
        offset = pipeline.cursor.offset
        change(target)
        expected = [0, 1] if what == "pipeline" else [100, 101, 102, 103]
        assert (next(batches)["x"] - offset).tolist() == expected


def as_remat(change):
    """What `nnx.remat` takes: a function with a result."""

    def changed(target):
        change(target)
        return jnp.zeros(())

    return changed


@pytest.mark.internal("a name that is no public part of NNX: without it all are compared")
@pytest.mark.parametrize("says", [True, False])
def test_modules_of_ours_say_it_all_or_are_compared(monkeypatch, says):
    assert _modules.SEES_GRAPH_WRITES
    monkeypatch.setattr(_binding, "SEES_GRAPH_WRITES", says)
    pipeline = numbers(stages=[Add()])
    binding = Binding((pipeline,))
    values = binding.read()
    assert binding.is_unchanged(values)
    vars(pipeline.stages[0])["by"] = 7  # reports nothing
    assert binding.is_unchanged(values) == binding.is_current() == says


@pytest.mark.internal
def test_an_attribute_of_another_pipeline_discards_nothing():
    pipeline, other = numbers(stages=[Add()]), numbers(stages=[Add()])
    with ahead(8):
        batches = iter(pipeline)
        while not pipeline._runtime._computed.ready:
            next(batches)
        before = len(pipeline._runtime._computed.ready)
        other.nodes[next(iter(other.nodes))].by = 2
        other.batch_size = 2
        next(batches)
        assert len(pipeline._runtime._computed.ready) == before - 1


def numbers(**stages):
    source = MemorySource(MemorySourceConfig(), {"x": np.arange(128, dtype=np.int32)})
    return Pipeline(source=source, batch_size=4, **stages)
