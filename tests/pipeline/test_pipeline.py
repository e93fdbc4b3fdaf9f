"""A pipeline is a source, a graph of stages and a cursor, driven in three ways."""

import copy
import dataclasses
import functools
import random
import re
import zlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
    MODES,
    Affine,
    Alike,
    Count,
    EqxScale,
    Normalise,
    Numbers,
    ahead,
    assert_same,
    batch_words,
    by_for,
    by_scan,
    by_step,
    columns,
    double,
    ids,
    increment,
    jitter,
    pipeline,
    record_words,
    rows,
    state_of,
    whole,
)

from datarax import Pipeline
from datarax.errors import (
    BatchSizeError,
    CapturedError,
    RngsError,
    SeekError,
    SourceError,
    StageError,
)
from datarax.operators import ElementOperator, ElementOperatorConfig
from datarax.sources import (
    EagerSourceBase,
    MemorySource,
    MemorySourceConfig,
    RandomAccessSource,
    RandomAccessSourceConfig,
)

# The cursor.


@pytest.mark.spec("STEP-010", "STEP-013", "STEP-014")
@pytest.mark.parametrize("mode", MODES)
def test_the_cursor_is_the_place_of_the_next_record(mode):
    stream = pipeline(length=6, batch_size=2)
    assert stream.cursor == (0, 0)
    MODES[mode](stream, 2)
    assert (stream.cursor.epoch, stream.cursor.offset) == (0, 4)
    MODES[mode](stream, 1)
    assert stream.cursor == (1, 0)
    assert all(type(x) is int for x in stream.cursor)
    stream.seek(epoch=7, offset=4)
    assert ids(MODES[mode](stream, 1)) == [4, 5]
    assert stream.cursor == (8, 0)
    stream.seek(epoch=3)
    assert stream.cursor == (3, 0)
    stream.reset()
    assert stream.cursor == (0, 0)


@pytest.mark.spec("STEP-011", "STEP-013")
@pytest.mark.parametrize("mode", MODES)
def test_under_drop_the_cursor_does_not_rest_where_no_batch_starts(mode):
    stream = pipeline(length=10, last_batch="drop")
    MODES[mode](stream, 2)
    assert stream.cursor == (1, 0)
    stream.seek(epoch=1, offset=6)
    assert stream.cursor == (1, 6)
    assert ids(MODES[mode](stream, 1)) == [6, 7, 8, 9]
    stream.seek(epoch=1, offset=7)
    assert ids(MODES[mode](stream, 1)) == [0, 1, 2, 3]
    assert stream.cursor == (2, 4)


@pytest.mark.spec("STEP-013")
def test_a_seek_leaves_the_state_of_the_stages_alone():
    stream = pipeline([Count()])
    by_step(stream, 3)
    stream.seek(epoch=9)
    stream.reset()
    assert stream.step()["count"].tolist() == [4] * 4


@pytest.mark.spec("STEP-013", "STEP-017")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seek_first", [False, True])
def test_a_seek_hides_no_change_of_a_stage(mode, seek_first):
    stage = Affine(2, 0)
    stream = pipeline([stage], last_batch="drop")

    def change():
        stage.a[...] = jnp.float32(5)

    with ahead(4):
        MODES[mode](stream, 2)
        for act in (stream.reset, change) if seek_first else (change, stream.reset):
            act()
        (batch,) = MODES[mode](stream, 1)
    assert ids([batch]) == [0, 1, 2, 3]
    assert batch["x"].tolist() == (5 * columns(10)["x"][:4]).tolist()


@pytest.mark.spec("STEP-010", "STEP-013", "SHUF-013")
@pytest.mark.parametrize("length", [2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1])
@pytest.mark.parametrize("last_batch", ["keep", "drop", "pad"])
def test_the_largest_sources_end_as_the_smallest_do(length, last_batch):
    stream = pipeline(source=Numbers(length), batch_size=8, last_batch=last_batch)
    stream.seek(epoch=1, offset=length - 3)
    last, first = [length - 3, length - 2, length - 1], [0, 1, 2, 3, 4, 5, 6, 7]
    expected = {
        "keep": [[*last, *first[:5]], (2, 5)],
        "drop": [first, (2, 8)],
        "pad": [last, (2, 0)],
    }
    assert [ids([stream.step()]), tuple(stream.cursor)] == expected[last_batch]
    stream.seek(epoch=1, offset=length - 9)
    batches = by_scan(stream, 2)
    assert ids(batches[:1]) == list(range(length - 9, length - 1))
    assert rows(batches)["id"].dtype == np.uint32


@pytest.mark.spec("ITER-012")
@pytest.mark.parametrize(
    "length, batch_size, last_batch, batches",
    [
        (10, 4, "keep", 3),
        (10, 4, "drop", 2),
        (10, 4, "pad", 3),
        (8, 4, "keep", 2),
        (8, 4, "drop", 2),
        (8, 4, "pad", 2),
        (3, 8, "keep", 1),
        (3, 8, "pad", 1),
    ],
)
def test_the_length_is_the_number_of_batches_of_an_epoch(length, batch_size, last_batch, batches):
    stream = pipeline(length=length, batch_size=batch_size, last_batch=last_batch)
    assert len(stream) == batches
    assert len(by_for(stream, batches)) == batches
    assert stream.cursor == (1, 0)
    stream.seek(epoch=0, offset=length - 1)
    assert len(stream) == batches


# A failed batch.


class Disk:
    """Fails when it is told to."""

    def __init__(self):
        self.broken = False
        self.reads = 0

    def __call__(self, numbers):
        self.reads += 1
        if self.broken:
            self.broken = self.broken != "once"
            raise OSError("the disk is gone")
        return np.asarray(numbers) + 100

    def stage(self, batch):
        result = jax.ShapeDtypeStruct(batch["id"].shape, batch["id"].dtype)
        return {**batch, "id": jax.pure_callback(self, result, batch["id"])}


@pytest.mark.spec("STEP-012", "ERR-025")
@pytest.mark.parametrize("broken", ["once", "for a while"])
@pytest.mark.parametrize("mode", MODES)
def test_a_batch_that_fails_moves_nothing(mode, broken):
    disk = Disk()
    stream = pipeline([Count(), disk.stage], length=12, batch_size=2, seed=3)
    healthy = ids(pipeline(length=12, batch_size=2, seed=3))
    assert ids(MODES[mode](stream, 2)) == [i + 100 for i in healthy[:4]]
    before = state_of(stream)

    disk.broken = broken
    with pytest.raises(StageError) as error:
        MODES[mode](stream, 1)
    assert error.value.node == "stage"
    assert error.value.predecessors == {"Count": "count int32[2], id int32[2], x float32[2]"}
    assert "the disk is gone" in str(error.value)
    assert "the disk is gone" in str(error.value.__cause__)  # of JAX's, of one type or another
    assert_same(state_of(stream), before)

    disk.broken = False
    batches = MODES[mode](stream, 2)
    assert ids(batches) == [i + 100 for i in healthy[4:8]]
    assert [b["count"].tolist() for b in batches] == [[3, 3], [4, 4]]


@pytest.mark.spec("STEP-012", "ERR-025")
@pytest.mark.parametrize("mode", MODES)
def test_a_stage_that_fails_on_a_new_shape_moves_nothing(mode):
    """Shapes are known at construction, but for what the user changes after it."""

    class Picky(nnx.Module):
        def __init__(self):
            self.rows = 2

        def __call__(self, batch):
            return {**batch, "x": batch["x"].reshape(self.rows, -1)[:, 0]}

    stage = Picky()
    stream = pipeline([Count(), stage], length=12, batch_size=2)
    MODES[mode](stream, 2)
    before = state_of(stream)
    stage.rows = 7
    with pytest.raises(StageError, match=r"^Stage 'Picky' failed: TypeError: cannot reshape"):
        MODES[mode](stream, 1)
    assert_same(state_of(stream), before)
    stage.rows = 2
    assert MODES[mode](stream, 1)[0]["count"].tolist() == [3, 3]


# Compiled or not, alone or in the user's program.


@pytest.mark.spec("STEP-015", "SCAN-001")
def test_a_batch_is_the_same_eagerly_compiled_and_in_a_program_of_the_user():
    def stream():
        stages = [Affine(2, 1), Count(), jitter(), record_words, batch_words]
        return pipeline(stages, length=5, batch_size=4, seed=5)

    @nnx.jit
    def by_user(stream):
        return [stream.step(), *by_scan(stream, 2), stream.step()]

    alone, eager, inside = stream(), stream(), stream()
    expected = by_step(alone, 4)
    with jax.disable_jit():
        assert_same([eager.step(), *by_scan(eager, 2), eager.step()], expected)
    assert_same(by_user(inside), expected)
    for other in (eager, inside):
        assert_same(state_of(other), state_of(alone))
        assert_same(other.step(), copy.deepcopy(alone).step())


@pytest.mark.spec("STEP-015", "SCAN-013")
def test_a_user_can_train_in_any_mode():
    def loss(model, batch):
        return jnp.mean((model(batch["x"][:, None])[:, 0] - 3 * batch["x"]) ** 2)

    def train(model, rate, batch):
        value, grads = nnx.value_and_grad(loss)(model, batch)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p, g: p - rate[...] * g, params, grads))
        rate[...] *= 0.5
        return value

    @nnx.jit
    def step_inside(model, rate, stream):
        return train(model, rate, stream.step())

    def fresh():
        model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
        return model, nnx.Variable(jnp.float32(0.01)), pipeline([jitter()], seed=1)

    model, rate, stream = fresh()
    expected = [train(model, rate, stream.step()) for _ in range(6)]
    by_loop = nnx.state(model)

    model, rate, stream = fresh()
    outside = [nnx.jit(train)(model, rate, stream.step()) for _ in range(6)]
    np.testing.assert_allclose(outside, expected, rtol=1e-5)

    model, rate, stream = fresh()
    inside = [step_inside(model, rate, stream) for _ in range(6)]
    np.testing.assert_allclose(inside, expected, rtol=1e-5)
    assert stream.cursor == (2, 4)

    model, rate, stream = fresh()
    scanned = stream.scan(train, 6, modules=(model, rate))
    np.testing.assert_allclose(scanned, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), nnx.state(model), by_loop
    )
    assert rate[...] == 0.01 * 0.5**6


@pytest.mark.spec("STEP-010", "STEP-015")
def test_inside_a_trace_the_cursor_is_traced():
    @nnx.jit
    def run(stream):
        stream.seek(epoch=3, offset=2)
        stream.step()
        return stream.cursor

    stream = pipeline()
    assert [int(x) for x in run(stream)] == [3, 6]
    assert stream.cursor == (3, 6)


@pytest.mark.spec("STEP-010", "STEP-015", "SCAN-001")
def test_inside_a_trace_the_cursor_moves_after_a_scan():
    def run(stream):
        scanned = stream.scan(whole, 2)["id"]
        stream.reset()
        first = stream.step()["id"]
        stream.scan(whole, 1)
        stream.seek(epoch=1)
        return scanned, first, stream.step()["id"]

    def stream():
        return pipeline([record_words], length=8, batch_size=4, shuffle=True, seed=3)

    assert_same(nnx.jit(run)(stream()), run(stream()))


@pytest.mark.spec("STEP-012", "STEP-015")
def test_a_pipeline_that_is_no_argument_of_a_trace_cannot_be_moved_in_it():
    stream = pipeline([Count()])
    state = stream.get_state()
    for consume in (
        stream.step,
        lambda: stream.scan(whole, 2),
        lambda: next(iter(stream)),
        stream.reset,
        lambda: stream.seek(epoch=1),
        lambda: stream.set_state(state),
    ):
        with pytest.raises(CapturedError) as error:
            jax.jit(consume)()
        assert error.value.names == ["pipeline"]
        assert str(error.value).split("\n")[0] == (
            "A pipeline can be consumed in a traced function only as its argument, but this one "
            "comes from outside: its cursor could not move. Pass it to the function under "
            "`nnx.jit` or `nnx.grad`, or take the batch before the call."
        )
    assert stream.cursor == (0, 0)
    assert ids([stream.step()]) == [0, 1, 2, 3]


# Gradients.


def square_of_sum(batch):
    return jnp.sum(batch["x"]) ** 2


def square_by_step(stream):
    return sum(square_of_sum(stream.step()) for _ in range(3))


def square_by_scan(stream):
    return jnp.sum(stream.scan(square_of_sum, 3))


@pytest.mark.spec("STEP-016", "SCAN-016")
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("loss", [square_by_step, square_by_scan])
def test_gradients_reach_the_parameters_of_the_stages(loss, jit):
    def stream(shift=None):
        stages = [Affine(0.5, 0.1), EqxScale(jnp.float32(0.3)), double]
        made = pipeline(stages, length=5, batch_size=2, seed=2)
        if shift is not None:
            state = nnx.state(made, nnx.Param)
            leaves, structure = jax.tree.flatten(state)
            leaves = [x + dx for x, dx in zip(leaves, shift, strict=True)]
            nnx.update(made, jax.tree.unflatten(structure, leaves))
        return made

    gradient = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.Param))
    subject = stream()
    got = jax.tree.leaves((nnx.jit(gradient) if jit else gradient)(subject))
    assert subject.cursor == (1, 1)
    assert len(got) == 3

    width = 2**-6
    for i, g in enumerate(got):
        up, down = (np.float32(sign * width) * np.eye(3, dtype=np.float32)[i] for sign in (1, -1))
        difference = (loss(stream(up)) - loss(stream(down))) / (2 * width)
        np.testing.assert_allclose(g, difference, rtol=1e-3)


@pytest.mark.spec("STEP-016")
def test_gradients_reach_the_stages_in_plain_jax():
    stream = pipeline([Affine(2, 0)], length=4)
    graph, params, rest = nnx.split(stream, nnx.Param, ...)

    def loss(params):
        return jnp.sum(nnx.merge(graph, params, rest, copy=True).step()["x"])

    grads = jax.grad(loss)(params)
    assert sorted(x.tolist() for x in jax.tree.leaves(grads)) == [4, 10]


# State of stages.


@pytest.mark.spec("DAG-007", "KEYS-013", "SCAN-006", "STEP-015")
@pytest.mark.parametrize("last_batch", ["keep", "drop", "pad"])
def test_running_statistics_and_dropout_end_the_same_in_all_modes(last_batch):
    streams = {
        mode: pipeline([Normalise()], length=8, seed=1, last_batch=last_batch) for mode in MODES
    }
    batches = {mode: MODES[mode](stream, 5) for mode, stream in streams.items()}
    states = {mode: state_of(stream) for mode, stream in streams.items()}
    for mode in ("for", "scan"):
        for got, expected in zip(batches[mode], batches["step"], strict=True):
            np.testing.assert_allclose(got["x"], expected["x"], rtol=1e-5, atol=1e-6)
            assert ((got["x"] == 0) == (expected["x"] == 0)).all()  # the same rows are dropped
        assert states[mode].keys() == states["step"].keys()
        for name, value in states["step"].items():
            np.testing.assert_allclose(states[mode][name], value, rtol=1e-5, err_msg=name)
    counts = [value for name, value in states["scan"].items() if name.endswith("count")]
    assert 5 in counts


@pytest.mark.spec("DAG-019", "DAG-007", "KEYS-011", "KEYS-013")
def test_building_a_pipeline_moves_nothing():
    rngs = nnx.Rngs(0, augment=1)
    count, normalise = Count(), Normalise()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(normalise, nnx.BatchStat)))
    stream = pipeline([count, normalise, jitter()], shuffle=True, rngs=rngs)
    repr(stream), stream.element_spec, stream.to_mermaid()
    assert count.seen[...] == 0
    assert_same(nnx.to_pure_dict(nnx.state(normalise, nnx.BatchStat)), before)
    assert normalise.dropout.rngs.count[...] == 0
    assert not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(nnx.state(stream)))
    by_step(stream, 2)
    assert rngs.default.count[...] == rngs.augment.count[...] == 0
    assert normalise.dropout.rngs.count[...] == 2


# Nodes.


@pytest.mark.spec("DAG-012", "DAG-013", "DAG-014")
def test_nodes_are_the_stages_by_name():
    first, second = Affine(2, 0), Affine(1, 1)
    stream = pipeline([first, second, double])
    assert list(stream.nodes) == ["Affine", "Affine_1", "double"]
    assert stream.nodes["Affine"] is first and stream.nodes["Affine_1"] is second
    assert stream.stages == (first, second, double)
    assert len(stream.nodes) == 3 and "Affine_1" in stream.nodes and "Count" not in stream.nodes
    assert dict(stream.nodes) == {"Affine": first, "Affine_1": second, "double": double}
    assert pipeline().stages == () and dict(pipeline().nodes) == {}


@pytest.mark.spec("DAG-013")
def test_a_node_is_replaced_by_name():
    stream = pipeline([double, increment], length=4)
    assert stream.step()["x"].tolist() == [3, 5, 7, 9]
    stream.nodes["double"] = Affine(10, 0)
    assert stream.step()["x"].tolist() == [11, 21, 31, 41]
    assert list(stream.nodes) == ["double", "increment"]
    with pytest.raises(KeyError, match="triple"):
        stream.nodes["triple"] = double
    with pytest.raises(KeyError, match="triple"):
        stream.nodes["triple"]


@pytest.mark.spec("DAG-013", "ERR-025")
def test_a_node_that_does_not_fit_is_refused_and_the_old_one_kept():
    stream = pipeline([double], length=4)
    with pytest.raises(StageError, match=r"^Stage 'double' failed: KeyError: 'y'"):
        stream.nodes["double"] = lambda batch: {"x": batch["y"]}
    for wrong in [jnp.ones(3)], {"a": jnp.ones(3)}, jnp.ones(3), None:
        with pytest.raises(StageError, match="a stage must be callable, got"):
            stream.nodes["double"] = wrong
    assert stream.nodes["double"] is double
    assert stream.step()["x"].tolist() == [2, 4, 6, 8]


@pytest.mark.spec("DAG-013")
def test_a_node_is_not_removed():
    stream = pipeline([double])
    with pytest.raises(TypeError) as error:
        del stream.nodes["double"]
    assert str(error.value) == "A node can be replaced but not removed: 'double'."


@pytest.mark.spec("DAG-014")
@pytest.mark.parametrize("mode", MODES)
def test_a_chain_gives_the_stream_of_the_same_graph(mode):
    chain = pipeline([jitter(), double, batch_words], length=8, seed=1)
    graph = Pipeline.from_dag(
        source=MemorySource(MemorySourceConfig(shuffle=True), columns(8)),
        nodes={"jitter": jitter(), "double": double, "batch_words": batch_words},
        edges={"jitter": [], "double": ["jitter"], "batch_words": ["double"]},
        sink="batch_words",
        batch_size=4,
        rngs=nnx.Rngs(1),
    )
    assert list(chain.nodes) == list(graph.nodes)
    assert_same(MODES[mode](graph, 3), MODES[mode](chain, 3))


class Callable:
    def __call__(self, batch):
        return increment(batch)


class Doubler(nnx.Module):
    def __call__(self, batch):
        return double(batch)


class EqxDoubler(eqx.Module):
    def __call__(self, batch):
        return double(batch)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Scaler:
    factor: jax.Array

    def __call__(self, batch):
        return {**batch, "x": batch["x"] * self.factor}


STAGES = {
    "function": double,
    "lambda": lambda batch: double(batch),
    "partial": functools.partial(lambda factor, batch: double(batch), 2),
    "object": Callable(),
    "method": Callable().__call__,
    "jax.jit": jax.jit(double),
    "nnx.jit": nnx.jit(double),
    "eqx.filter_jit": eqx.filter_jit(double),
    "nnx.Module": Doubler(),
    "eqx.Module": EqxDoubler(),
    "dataclass with an array": Scaler(jnp.float32(2)),
    "partial of JAX's": jax.tree_util.Partial(Scaler.__call__, Scaler(jnp.float32(2))),
    "nnx.Linear inside": Affine(2, 0),
    "operator": ElementOperator(
        ElementOperatorConfig(), fn=lambda e, key: e.update_data({"x": e.data["x"] * 2})
    ),
}


@pytest.mark.spec("DAG-015")
@pytest.mark.parametrize("stage", STAGES)
def test_any_callable_is_a_stage(stage):
    stream = pipeline([STAGES[stage]], length=4)
    expected = [2, 3, 4, 5] if stage in ("object", "method") else [2, 4, 6, 8]
    for mode in MODES.values():
        assert mode(stream, 1)[0]["x"].tolist() == expected


@pytest.mark.spec("DAG-015")
def test_stages_of_all_kinds_mix():
    stages = [double, Callable(), Affine(2, 0), EqxScale(jnp.float32(2)), jax.jit(increment)]
    stream = pipeline(stages, length=4)
    for mode in MODES.values():
        assert mode(stream, 1)[0]["x"].tolist() == [13, 21, 29, 37]


@pytest.mark.spec("DAG-015")
def test_one_module_may_stand_at_two_nodes():
    count = Count()
    stream = pipeline([count, count])
    assert list(stream.nodes) == ["Count", "Count_1"]
    for i, mode in enumerate(MODES.values()):
        assert mode(stream, 1)[0]["count"].tolist() == [2 * i + 2] * 4
    assert count.seen[...] == 6


# Fields.


@pytest.mark.spec("SRC-001", "SRC-002", "SRC-003", "STEP-006", "SCAN-001")
@pytest.mark.parametrize("last_batch", ["keep", "drop", "pad"])
def test_batches_may_be_nested(last_batch):
    data = {
        "id": np.arange(5, dtype=np.int32),
        "image": {
            "left": np.arange(30, dtype=np.uint8).reshape(5, 3, 2),
            "more": {"right": np.arange(5, dtype=np.float16), "flag": np.arange(5) % 2 == 0},
        },
    }
    source = MemorySource(MemorySourceConfig(shuffle=True), data)

    def stage(batch):
        return {**batch, "image": {**batch["image"], "sum": batch["image"]["left"].sum((1, 2))}}

    def stream():
        return pipeline([stage], source=source, batch_size=3, seed=0, last_batch=last_batch)

    batches = by_step(stream(), 4)
    got = rows(batches)
    records = got["id"]
    assert_same(
        {**got["image"], "sum": None},
        jax.tree.map(lambda x: x[records], {**data["image"], "sum": None}),
    )
    expected = data["image"]["left"].sum((1, 2))[records]
    np.testing.assert_array_equal(got["image"]["sum"], expected)
    assert_same(by_scan(stream(), 4), batches)
    if last_batch == "pad":
        assert batches[1]["mask"].tolist() == [True, True, False]
        padding = jax.tree.map(lambda x: np.asarray(x[2]), batches[1])
        assert not any(x.any() for x in jax.tree.leaves(padding))


@pytest.mark.spec("SRC-009")
@pytest.mark.parametrize("mode", MODES)
def test_a_batch_keeps_its_values(mode):
    stream = pipeline(length=8, seed=0)
    first = MODES[mode](stream, 2)
    kept = jax.tree.map(lambda x: np.array(x, copy=True), first)
    for other in MODES.values():
        other(stream, 3)
    assert_same(first, kept)


@pytest.mark.spec("SRC-010")
def test_global_randomness_is_left_alone(unchecked):
    np_state, py_state = np.random.get_state(), random.getstate()
    for mode in MODES.values():
        mode(pipeline([jitter()], length=8, seed=0), 3)
    assert random.getstate() == py_state
    assert all(np.array_equal(a, b) for a, b in zip(np_state, np.random.get_state(), strict=True))
    expected = ids(pipeline(seed=0))
    np.random.seed(1)
    random.seed(1)
    assert ids(pipeline(seed=0)) == expected


@pytest.mark.spec("SRC-011", "SRC-008")
def test_equal_programs_give_equal_streams_in_turns():
    data = columns(10)
    swapped = MemorySource(MemorySourceConfig(shuffle=True), dict(reversed(data.items())))
    first, second = pipeline([jitter()], seed=0), pipeline([jitter()], source=swapped, seed=0)
    for _ in range(4):
        assert_same(first.step(), second.step())
    assert_same(by_scan(first, 2), by_step(second, 2))
    assert_same(list(second), list(first))


# The mask.


@pytest.mark.spec("STEP-018", "STEP-007", "ITER-005")
def test_the_mask_can_have_another_name():
    data = {"mask": np.arange(1, 6)}
    source = MemorySource(MemorySourceConfig(), data)
    stream = pipeline(source=source, batch_size=3, last_batch="pad", mask_name="there")
    for mode in MODES.values():
        stream.reset()
        batches = mode(stream, 2)
        assert [b["mask"].tolist() for b in batches] == [[1, 2, 3], [4, 5, 0]]
        assert [b["there"].tolist() for b in batches] == [[True] * 3, [True, True, False]]
        assert all(set(b) == {"mask", "there"} for b in batches)


@pytest.mark.spec("STEP-018", "SRC-003")
def test_the_name_of_the_mask_is_free_without_padding():
    source = MemorySource(MemorySourceConfig(), {"mask": np.arange(5)})
    assert set(pipeline(source=source).step()) == {"mask"}


@pytest.mark.spec("DAG-009", "DAG-001")
@pytest.mark.parametrize("mode", MODES)
def test_a_mask_that_a_stage_drops_is_put_back(mode):
    seen = []

    def drop(batch):
        seen.append(sorted(batch))
        return {"x": batch["x"] + 1}

    stream = pipeline([drop], length=3, batch_size=2, last_batch="pad")
    batches = MODES[mode](stream, 2)
    assert seen[0] == ["id", "mask", "x"]
    assert [b["mask"].tolist() for b in batches] == [[True, True], [True, False]]
    assert [b["x"].tolist() for b in batches] == [[2, 3], [4, 1]]
    assert stream.element_spec["mask"] == jax.ShapeDtypeStruct((2,), bool)


@pytest.mark.spec("DAG-009")
def test_a_stage_may_narrow_the_mask():
    def only_even(batch):
        return {**batch, "mask": batch["mask"] & (batch["id"] % 2 == 0)}

    stream = pipeline([only_even], length=3, batch_size=2, last_batch="pad")
    assert [b["mask"].tolist() for b in stream] == [[True, False], [True, False]]


@pytest.mark.spec("STEP-007", "STEP-006")
def test_a_loss_weighted_by_the_mask_is_exact_over_an_epoch():
    stream = pipeline(length=10, batch_size=4, last_batch="pad", seed=1)
    total = stream.scan(lambda batch: jnp.where(batch["mask"], batch["x"], 0).sum())
    weight = sum(batch["mask"].sum() for batch in stream)
    assert float(total.sum()) / int(weight) == np.mean(columns(10)["x"])


# Subclasses.


class Branching(Pipeline):
    """Makes what it likes of a batch from the source."""

    def __init__(self, *, factor, **options):
        super().__init__(**options)
        self.factor = nnx.Param(jnp.float32(factor))

    def __call__(self, batch):
        plus, count = super().__call__(batch), self.nodes["Count"](batch)
        return {
            "id": batch["id"],
            "x": batch["x"] * self.factor[...],
            "y": plus["x"],
            "count": plus["count"] + count["count"],
        }


@pytest.mark.spec("DAG-017")
@pytest.mark.parametrize("last_batch", ["keep", "drop", "pad"])
def test_a_subclass_may_override_the_call(last_batch):
    def stream():
        cls = functools.partial(Branching, factor=10)
        return pipeline([increment, Count()], length=8, cls=cls, last_batch=last_batch)

    for mode in MODES.values():
        subject = stream()
        batches = mode(subject, 3)
        assert [b["x"].tolist() for b in batches][1:] == [[50, 60, 70, 80], [10, 20, 30, 40]]
        assert [b["y"].tolist() for b in batches][1:] == [[6, 7, 8, 9], [2, 3, 4, 5]]
        assert [b["count"].tolist() for b in batches] == [[3] * 4, [7] * 4, [11] * 4]
        assert ("mask" in batches[0]) == (last_batch == "pad")
        assert subject.nodes["Count"].seen[...] == 6
        assert subject.cursor == (1, 4)
        subject.factor[...] = jnp.float32(2)
        assert mode(subject, 1)[0]["x"].tolist() == [10, 12, 14, 16]


@pytest.mark.spec("DAG-017", "STEP-016")
def test_gradients_reach_the_parameters_of_a_subclass():
    stream = pipeline([Count()], length=4, cls=functools.partial(Branching, factor=10))
    grads = nnx.grad(lambda s: s.step()["x"].sum(), argnums=nnx.DiffState(0, nnx.Param))(stream)
    assert [x.tolist() for x in jax.tree.leaves(grads)] == [10]


@pytest.mark.spec("DAG-017", "ERR-025", "ERR-002")
def test_an_override_that_does_not_fit_is_refused_when_it_is_built():
    class Wrong(Pipeline):
        def __call__(self, batch):
            return {"x": batch["z"]}

    with pytest.raises(StageError, match=r"^Stage '__call__' failed: KeyError: 'z'"):
        pipeline(cls=Wrong)


@pytest.mark.spec("DAG-017", "KEYS-006")
def test_the_stages_of_an_override_get_their_keys():
    class Twice(Pipeline):
        def __call__(self, batch):
            return super().__call__(super().__call__(batch))

    plain, twice = (
        pipeline([record_words], shuffle=False, rngs=nnx.Rngs(1), cls=cls)
        for cls in (Pipeline, Twice)
    )
    for mode in MODES.values():
        assert_same(mode(twice, 2), mode(plain, 2))


@pytest.mark.spec("DAG-001", "DAG-016")
def test_a_pipeline_can_be_called_by_hand():
    stream = pipeline([double, record_words], seed=1)
    batch = stream({"id": jnp.array([5, 7]), "x": jnp.array([1.0, 2.0])})
    assert batch["x"].tolist() == [2, 4]
    node = jax.random.fold_in(jax.random.key(1), np.uint32(zlib.crc32(b"record_words")))
    keys = [jax.random.fold_in(jax.random.fold_in(node, 0), record) for record in range(2)]
    assert batch["keys"].tolist() == [jax.random.key_data(key).tolist() for key in keys]
    assert stream.cursor == (0, 0)


# Shapes.


@pytest.mark.spec("DAG-018", "STEP-007")
def test_specs_are_known_at_construction():
    stream = pipeline([Count(), lambda b: {"y": jnp.outer(b["x"], b["x"])}], last_batch="pad")
    spec = jax.ShapeDtypeStruct
    source = {"id": spec((4,), "int32"), "mask": spec((4,), bool), "x": spec((4,), "float32")}
    sink = {"mask": spec((4,), bool), "y": spec((4, 4), "float32")}
    assert stream.node_specs == {
        "source": source,
        "Count": {**source, "count": spec((4,), "int32")},
        "lambda": sink,
    }
    assert list(stream.node_specs) == ["source", "Count", "lambda"]
    assert stream.element_spec == sink
    batch = stream.step()
    assert jax.tree.map(lambda x: spec(x.shape, x.dtype), batch) == stream.element_spec


@pytest.mark.spec("DAG-018")
def test_specs_follow_what_is_changed():
    class Widen(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(1, 2, rngs=nnx.Rngs(0))

        def __call__(self, batch):
            return {"y": self.linear(batch["x"][:, None])}

    stream = pipeline([Widen()])
    assert stream.element_spec["y"].shape == (4, 2)
    stream.nodes["Widen"].linear = nnx.Linear(1, 5, rngs=nnx.Rngs(0))
    assert stream.element_spec["y"].shape == (4, 5) == stream.step()["y"].shape
    stream.batch_size = 3
    assert stream.element_spec["y"].shape == (3, 5) == stream.step()["y"].shape
    assert re.search(r"Widen .* float32\[3,5\]", str(stream))


@pytest.mark.spec("DAG-018", "DAG-001")
def test_without_stages_the_batch_is_that_of_the_source():
    stream = pipeline(length=4)
    assert_same(stream.step(), jax.tree.map(jnp.asarray, columns(4)))
    assert list(stream.node_specs) == ["source"]


class Assigning(Pipeline):
    def __call__(self, batch):
        self.seen = batch["x"].shape
        return batch


@pytest.mark.spec("ERR-025", "ERR-022")
def test_a_subclass_that_assigns_an_attribute_is_named():
    source = MemorySource(MemorySourceConfig(), columns(10))
    with pytest.raises(StageError, match="no attribute of a module may be added") as error:
        Assigning(source=source, batch_size=4)
    assert error.value.node == "__call__"


class Referring(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.float32(2), ref=True)

    def __call__(self, batch):
        return {**batch, "x": batch["x"] * self.w[...]}


@pytest.mark.spec("STEP-017", "ERR-023")
def test_a_variable_that_holds_a_reference_is_refused():
    with pytest.raises(TypeError, match=r"\.w` holds a reference\. Make it without ref=True"):
        pipeline([Referring()])


@pytest.mark.spec("ERR-023")
@pytest.mark.parametrize(
    "batch, text",
    [
        ({}, "all fields of a batch must have the same number of rows"),
        ({"x": jnp.float32(1)}, "must be an array with its rows on axis 0"),
        (jnp.ones(3), "^a pipeline is called with a dict of arrays, got an array$"),
    ],
)
def test_what_is_no_batch_is_refused_by_hand(unchecked, batch, text):
    with pytest.raises((TypeError, ValueError), match=text):
        pipeline([increment])(batch)


@pytest.mark.spec("ERR-030", "ERR-023")
def test_forked_rngs_are_refused(unchecked):
    source = MemorySource(MemorySourceConfig(shuffle=True), columns(10))
    with pytest.raises(RngsError, match="must hold one key a stream"):
        Pipeline(source=source, batch_size=4, rngs=nnx.Rngs(0).split(2))


@pytest.mark.spec("STEP-013", "ERR-012")
@pytest.mark.parametrize("storage", ["memory", "host"])
def test_sizes_may_be_integers_of_numpy_later_too(unchecked, storage):
    records = [{"id": np.int32(i)} for i in range(10)]
    source = RandomAccessSource(RandomAccessSourceConfig(), records) if storage == "host" else None
    stream = pipeline(source=source, batch_size=np.int64(4))
    stream.step()
    stream.batch_size, stream.num_threads = np.int64(3), np.uint8(1)
    assert [batch["id"].tolist() for batch in stream] == [[4, 5, 6], [7, 8, 9]]
    assert stream.scan(lambda batch: batch["id"], 2).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert type(stream.batch_size) is int
    stream.batch_size = np.int64(0)
    with pytest.raises(BatchSizeError):
        stream.step()


@pytest.mark.spec("STEP-013")
@pytest.mark.parametrize("size, last", [(4, 2), (5, 1), (64, 0)])
def test_the_last_epoch_of_all_is_that_of_a_source_in_memory(size, last):
    records = [{"id": np.int32(i)} for i in range(10)]
    for source in (RandomAccessSource(RandomAccessSourceConfig(), records), None):
        stream = pipeline(source=source, batch_size=size)
        stream.seek(epoch=2**32 - 1)
        for i in range(last):
            assert stream.step()["id"].tolist() == [*range(i * size, (i + 1) * size)]
        for _ in range(2):
            with pytest.raises(SeekError, match="no cursor counts further"):
                stream.step()


@pytest.mark.spec("STEP-013")
def test_reading_ahead_of_the_last_epochs_fails_no_batch():
    records = [{"id": np.int32(i)} for i in range(7)]
    source = RandomAccessSource(RandomAccessSourceConfig(), records)
    stream = pipeline(source=source, batch_size=4, last_batch="drop")
    stream.seek(epoch=2**32 - 7)
    for _ in range(6):
        assert stream.step()["id"].tolist() == [0, 1, 2, 3]


@pytest.mark.spec("SRC-010")
def test_a_stage_that_draws_from_a_global_generator_is_told_that_it_does_so_once():
    def noise(batch):
        return {"x": batch["x"] + np.random.normal(size=batch["x"].shape).astype(np.float32)}

    with pytest.warns(UserWarning, match=r"One of the stages \['noise'\] draws from `np.random`"):
        pipeline([noise])


@pytest.mark.spec("ERR-022", "ERR-023")
def test_a_source_counted_in_64_bits_says_so_when_these_are_off_again():
    class Huge(EagerSourceBase):
        def __len__(self):
            return 2**33

        def gather(self, records):
            return {"id": records}

    with jax.enable_x64(True):
        stream = Pipeline(source=Huge(), batch_size=4)
        stream.step()
    for act in (stream.step, lambda: next(iter(stream)), lambda: stream.scan(lambda b: b, 1)):
        with pytest.raises(SourceError, match="counted in 64 bits, which JAX has turned off"):
            act()
    with jax.enable_x64(True):
        assert stream.step()["id"].tolist() == [4, 5, 6, 7]


@dataclasses.dataclass(frozen=True)
class Named:
    """Equal by its name, whatever it computes."""

    name: str
    function: object = dataclasses.field(compare=False)

    def __call__(self, batch):
        return self.function(batch)


@pytest.mark.spec("SRC-011", "DAG-015")
@pytest.mark.parametrize("stage", [functools.partial(Named, "one"), Alike], ids=["named", "alike"])
def test_equal_stages_that_compute_something_else_share_nothing(stage):
    for function in (double, increment):
        assert_same(pipeline([stage(function)]).step(), pipeline([function]).step())


@pytest.mark.spec("SRC-040", "SRC-007")
@pytest.mark.parametrize("mode", MODES)
def test_nobody_can_write_into_a_batch(mode):
    data = columns(8)
    source = MemorySource(MemorySourceConfig(), data)
    stream = Pipeline(source=source, batch_size=4)
    for batch in MODES[mode](stream, 2):
        with pytest.raises(ValueError, match="read-only"):
            np.asarray(batch["x"])[...] = 1
        with pytest.raises(TypeError, match="immutable"):
            batch["x"][...] = 1
    assert_same(data, columns(8))
    assert ids(stream) == list(range(8))


class Nested(nnx.Module):
    def __init__(self, inner):
        self.inner = inner

    def __call__(self, batch):
        return batch | {"noise": self.inner.step()["x"]}


class WithOther(Pipeline):
    def __init__(self, other):
        super().__init__(source=other.source, batch_size=3)
        self.other = other


@pytest.mark.spec("ERR-036")
def test_a_pipeline_is_no_part_of_another():
    inner = pipeline(length=9, batch_size=3)
    for build, name in (
        (lambda: pipeline([Nested(inner)], length=9, batch_size=3), "Nested"),
        (lambda: WithOther(inner), "other"),
    ):
        with pytest.raises(StageError, match=f"'{name}' failed: a pipeline cannot be a part of an"):
            build()


@pytest.mark.spec("SCAN-001", "STATE-001")
@pytest.mark.skipif(not hasattr(nnx, "set_graph_mode"), reason="this version of Flax has no modes")
def test_it_works_in_whatever_mode_nnx_is_set_to():
    before, expected = (pipeline([Count()], length=12, batch_size=2, seed=0) for _ in range(2))
    before.step()
    with nnx.set_graph_mode(False):
        stream = pipeline([Count()], length=12, batch_size=2, seed=0)
        stream.set_state(before.get_state())
        found = [stream.step(), before.step(), *by_scan(stream, 2)]
    batches = [expected.step() for _ in range(4)]
    for x, i in zip(found, (1, 1, 2, 3), strict=True):
        assert_same(x, batches[i])


@pytest.mark.spec("SCAN-015")
def test_stages_that_differ_in_the_sign_of_a_zero_are_two():
    class Over(nnx.Module):
        def __init__(self, zero):
            self.zero = zero

        def __call__(self, batch):
            return batch | {"y": jnp.ones_like(batch["x"]) / self.zero}

    for zero in (np.float32(0.0), np.float32(-0.0)):
        assert pipeline([Over(zero)], length=4).step()["y"][0] == np.copysign(np.inf, zero)
