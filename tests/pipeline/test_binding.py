"""What is changed from outside between two batches shows in the next, in every mode."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
    MODES,
    Affine,
    Count,
    EqxScale,
    Scale,
    ahead,
    by_for,
    by_scan,
    by_step,
    columns,
    double,
    ids,
    pipeline,
    whole,
)

from datarax import Pipeline
from datarax.pipeline._binding import Binding
from datarax.sources import (
    MemorySource,
    MemorySourceConfig,
    RandomAccessSource,
    RandomAccessSourceConfig,
    SourceData,
)


def _item(stage, value):
    stage.numpy[0] = value


CHANGES = {
    "a variable": lambda stage, v: stage.param.set_value(jnp.float32(v)),
    "a variable's element": lambda stage, v: stage.param.__setitem__(..., jnp.float32(v)),
    "a NumPy variable": lambda stage, v: stage.numpy_param.__setitem__(..., np.float32(v)),
    "a tree variable": lambda stage, v: stage.tree.set_value({"a": jnp.float32(v)}),
    "an entry of a tree variable": lambda stage, v: stage.tree.__setitem__("a", jnp.float32(v)),
    "an array": lambda stage, v: setattr(stage, "array", jnp.float32(v)),
    "a NumPy array": lambda stage, v: setattr(stage, "numpy", np.full(1, v, np.float32)),
    "a NumPy array's element": _item,
    "a static attribute": lambda stage, v: setattr(stage, "static", float(v)),
    "a part's variable": lambda stage, v: stage.inner.a.set_value(jnp.float32(v)),
    "a part": lambda stage, v: setattr(stage, "inner", Affine(v, 0)),
    "a listed part": lambda stage, v: stage.parts.__setitem__(0, Affine(v, 0)),
    "a variable for another": lambda stage, v: setattr(stage, "param", nnx.Param(jnp.float32(v))),
}


@pytest.mark.spec("STEP-017")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_parameter_shows_in_the_next_batch(mode, change):
    stage = Scale()
    stream = pipeline([stage], length=12, batch_size=1)
    factors = [1, 1, 2, 2, 2, 3, 1, 1, 1, 3, 2, 2]
    with ahead(3):
        for i, factor in enumerate(factors):
            CHANGES[change](stage, factor)
            [batch] = MODES[mode](stream, 1)
            assert batch["x"].tolist() == [factor * (i + 1)], f"batch {i}"


@pytest.mark.spec("STEP-017", "ITER-010")
@pytest.mark.parametrize("change", CHANGES)
def test_a_parameter_changed_within_one_loop_shows_in_its_next_batch(change):
    stage = Scale()
    stream = pipeline([stage], length=12, batch_size=1)
    factor = 1
    with ahead(3):
        for i, batch in enumerate(stream):
            assert batch["x"].tolist() == [factor * (i + 1)], f"batch {i}"
            factor = [1, 1, 3, 3, 2][i % 5]
            CHANGES[change](stage, factor)
    assert i == 11


class Tally(nnx.Module):
    """Counts its batches in a dictionary, in its place."""

    def __init__(self):
        self.tally = nnx.Variable({"batches": jnp.int32(0), "names": [jnp.int32(7)]})

    def __call__(self, batch):
        self.tally["batches"] += 1
        return batch | {"n": jnp.full(len(batch["x"]), self.tally["batches"])}


@pytest.mark.spec("SCAN-001", "ITER-011", "SCAN-013")
@pytest.mark.parametrize("mode", MODES)
def test_what_a_stage_writes_into_a_container_is_kept(mode):
    stream = pipeline([Tally()], length=12, batch_size=2)
    with ahead(3):
        assert [int(x["n"][0]) for x in MODES[mode](stream, 6)] == [*range(1, 7)]
    assert stream.stages[0].tally["batches"] == 6
    again = pipeline([Tally()], length=12, batch_size=2)
    again.set_state(stream.get_state())
    assert again.step()["n"].tolist() == [7, 7]


@pytest.mark.spec("SCAN-013", "SRC-019")
@pytest.mark.parametrize("length", [1, 3, 9])
def test_what_a_scan_writes_into_a_container_is_kept(length):
    def count(tally, batch):
        return tally(batch)["n"][0]

    for source in (
        MemorySource(MemorySourceConfig(), columns(20)),
        RandomAccessSource(RandomAccessSourceConfig(), [{"x": np.float32(i)} for i in range(20)]),
    ):
        tally = Tally()
        outs = Pipeline(source=source, batch_size=2).scan(count, length, modules=[tally])
        assert outs.tolist() == [*range(1, length + 1)]
        assert tally.tally["batches"] == length


@pytest.mark.spec("STEP-017", "DAG-013")
@pytest.mark.parametrize("mode", MODES)
def test_a_replaced_node_shows_in_the_next_batch(mode):
    stream = pipeline([EqxScale(jnp.float32(1)), double], length=12, batch_size=1)
    with ahead(3):
        MODES[mode](stream, 4)
        stream.nodes["EqxScale"] = EqxScale(jnp.float32(10))
        assert [b["x"].tolist() for b in MODES[mode](stream, 2)] == [[100], [120]]
        stream.nodes["double"] = whole
        assert [b["x"].tolist() for b in MODES[mode](stream, 2)] == [[70], [80]]
    assert [type(x).__name__ for x in stream.stages] == ["PytreeStage", "function"]


@pytest.mark.spec("STEP-017")
@pytest.mark.parametrize("mode", MODES)
def test_the_arrays_of_an_equinox_stage_can_be_changed(mode):
    stream = pipeline([EqxScale(jnp.float32(1))], length=12, batch_size=1)
    with ahead(3):
        MODES[mode](stream, 2)
        [weight] = jax.tree.leaves(nnx.state(stream.nodes["EqxScale"], nnx.Param))
        assert weight.tolist() == 1
        state = jax.tree.map(lambda x: x * 5, nnx.state(stream.nodes["EqxScale"], nnx.Param))
        nnx.update(stream.nodes["EqxScale"], state)
        assert [b["x"].tolist() for b in MODES[mode](stream, 2)] == [[15], [20]]
    assert stream.nodes["EqxScale"].module.weight.tolist() == 5


@pytest.mark.spec("STEP-017", "DAG-007")
@pytest.mark.parametrize("mode", MODES)
def test_the_state_of_a_stage_is_that_of_the_batches_handed_out(mode):
    count = Count()
    stream = pipeline([count], length=12, batch_size=1)
    with ahead(3):
        for i in range(5):
            assert MODES[mode](stream, 1)[0]["count"].tolist() == [i + 1]
            assert count.seen[...] == i + 1
        count.seen[...] = jnp.array(100)
        assert [b["count"].tolist() for b in MODES[mode](stream, 2)] == [[101], [102]]


@pytest.mark.spec("STEP-017")
@pytest.mark.parametrize("mode", MODES)
def test_train_and_eval_reach_the_stages(mode):
    class Drop(nnx.Module):
        def __init__(self):
            self.dropout = nnx.Dropout(1.0, rngs=nnx.Rngs(0))

        def __call__(self, batch):
            return {**batch, "x": self.dropout(batch["x"])}

    stream = pipeline([Drop()], length=12, batch_size=1)
    with ahead(3):
        assert [b["x"].tolist() for b in MODES[mode](stream, 2)] == [[0], [0]]
        stream.eval()
        assert [b["x"].tolist() for b in MODES[mode](stream, 2)] == [[3], [4]]
        stream.train()
        assert [b["x"].tolist() for b in MODES[mode](stream, 2)] == [[0], [0]]


@pytest.mark.spec("STEP-017", "ITER-010")
def test_other_data_show_in_the_next_batch():
    stream = pipeline(length=12, batch_size=1)
    with ahead(3):
        loop = iter(stream)
        next(loop), next(loop)
        nnx.update(stream, jax.tree.map(lambda x: x + 50, nnx.state(stream, SourceData)))
        assert next(loop)["id"].tolist() == [52]
        stream.seek(epoch=0, offset=7)
        assert next(loop)["id"].tolist() == [57]
        stream.batch_size = 3
        assert next(loop)["id"].tolist() == [58, 59, 60]


@pytest.mark.internal("attributes are compared as one row of objects")
def test_an_attribute_more_less_or_replaced_is_noticed_wherever_it_stands():
    stage = Affine(1, 0)
    stream = pipeline([stage], length=6)
    for node in (stream, stage, stream.source):
        binding = Binding((stream,))
        assert binding.is_current()
        node.note = "new"
        assert not binding.is_current()
        binding = Binding((stream,))
        node.note = "".join(["n", "ew"])  # equal, and another object
        assert not binding.is_current()
        binding = Binding((stream,))
        del node.note
        assert not binding.is_current()


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Weights:
    w: jax.Array


@pytest.mark.spec("STEP-017")
@pytest.mark.parametrize("ways", [by_step, by_for, by_scan])
def test_what_is_assigned_in_another_kind_of_tree_shows(ways):
    class Stage(nnx.Module):
        def __init__(self):
            self.weights = nnx.data(Weights(jnp.int32(1)))

        def __call__(self, batch):
            return {**batch, "id": batch["id"] * self.weights.w}

    stage = Stage()
    stream = pipeline([stage], length=12, batch_size=2)
    with ahead(2):
        assert ids(ways(stream, 3)) == [0, 1, 2, 3, 4, 5]
        stage.weights.w = jnp.int32(10)
        assert ids(ways(stream, 2)) == [60, 70, 80, 90]


@pytest.mark.internal("attributes are compared as one row of objects")
def test_one_more_at_the_very_end_is_noticed():
    class Parts(nnx.Module):
        def __init__(self):
            self.parts = nnx.data([Affine(1, 0)])

        def __call__(self, batch):
            return self.parts[-1](batch)

    stage = Parts()
    stream = pipeline([stage], length=6)
    binding = Binding((stream,))
    assert binding.is_current()
    stage.parts.append(Affine(2, 0))
    assert not binding.is_current()
