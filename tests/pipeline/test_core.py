"""One law: the stream is that of the model, in whatever mode and order it is consumed."""

import dataclasses
import itertools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from datarax_conformance import model
from flax import nnx
from helpers import (
    MODES,
    Count,
    Traces,
    ahead,
    assert_same,
    by_for,
    by_scan,
    by_step,
    columns,
    ids,
    jitter,
    pipeline,
    pipeline_of,
    record_words,
    rows,
    whole,
)
from hypothesis import example, given, settings, strategies as st

from datarax import Pipeline
from datarax.errors import LastBatchError, StageError
from datarax.sources import EagerSourceBase, MemorySource, MemorySourceConfig

CHAIN = {
    "nodes": {"double": "affine(2,1)", "n": "count"},
    "edges": {"double": [], "n": ["double"]},
    "sink": "n",
}
BRANCHES = {
    "nodes": {
        "left": "affine(2,0)",
        "right": "affine(1,-1)",
        "both": "sub",
        "n": "count",
        "noise": "keys",
    },
    "edges": {
        "left": [],
        "right": ["source"],
        "both": ["left", "right"],
        "n": ["both"],
        "noise": ["n"],
    },
    "sink": "noise",
}


def program(length, batch_size, last_batch, seed, graph):
    return model.Program(columns(length), batch_size, last_batch, seed, **graph)


PROGRAMS = [
    program(1, 1, "keep", 0, {}),
    program(1, 3, "keep", 0, CHAIN),
    program(3, 8, "keep", 7, BRANCHES),
    program(3, 8, "pad", 7, CHAIN),
    program(5, 2, "drop", 7, BRANCHES),
    program(5, 2, "pad", None, {}),
    program(6, 3, "keep", 7, {}),
    program(6, 3, "drop", None, CHAIN),
    program(7, 7, "drop", 7, {}),
    program(10, 4, "keep", 2**32 - 1, BRANCHES),
    program(10, 4, "pad", 7, BRANCHES),
    program(33, 2, "drop", None, CHAIN),
    program(33, 2, "pad", 2**31, CHAIN),
]

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.integers(1, 4)),
        st.tuples(st.just("for"), st.integers(1, 20)),
        st.tuples(st.just("scan"), st.integers(0, 3)),
        st.tuples(st.just("rest"), st.just(0)),
        st.tuples(st.just("seek"), st.integers(0, 2**32 - 99), st.integers(0, 2**32 - 1)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    max_size=6,
)
EVERY_MODE = [("step", 2), ("for", 1), ("scan", 3), ("for", 20), ("scan", 2), ("for", 20)]


def act(stream, action, argument, *more):
    """What a stream hands out when it is consumed so; of the model or of the library."""
    match action:
        case "step":
            return [stream.step() for _ in range(argument)]
        case "for":
            return list(itertools.islice(stream, argument))
        case "scan" | "rest":
            length = argument if action == "scan" else None
            scan = stream.scan(length) if isinstance(stream, model.Stream) else None
            return [stream.scan(whole, length) if scan is None else scan]
        case "seek":
            stream.seek(epoch=argument, offset=more[0] % length_of(stream))
        case "reset":
            stream.reset()
    return []


def length_of(stream):
    return stream.length if isinstance(stream, model.Stream) else len(stream.source)


def settled(cursor, program):
    """Where the next batch starts; after a seek the cursor itself may still be as it was set."""
    return model.settle(model.Cursor(*cursor), len(program.columns["id"]), program)


def without_noise_in_padding(batch):
    """What a padded row has for a key is nobody's business."""
    if "keys" not in batch or "mask" not in batch:
        return batch
    return {**batch, "keys": np.where(batch["mask"][..., None], batch["keys"], 0)}


def assert_the_model_agrees(program, actions):
    stream, expected = pipeline_of(program), model.Stream(program)
    for action in actions:
        try:
            batches = act(expected, *action)
        except model.Refused as refused:
            assert refused.code == "last-batch"
            with pytest.raises(LastBatchError):
                act(stream, *action)
        else:
            got = act(stream, *action)
            assert_same(
                [without_noise_in_padding(jax.tree.map(np.asarray, b)) for b in got],
                [without_noise_in_padding(b) for b in batches],
            )
        assert settled(stream.cursor, program) == expected.cursor


@pytest.mark.spec(
    "STEP-001", "STEP-002", "STEP-003", "STEP-004", "STEP-005", "STEP-006", "STEP-007", "STEP-008",
    "STEP-010", "STEP-011", "STEP-013", "STEP-014", "ITER-001", "ITER-002", "ITER-003", "ITER-005",
    "ITER-006", "ITER-007", "ITER-010", "ITER-011", "SCAN-001", "SCAN-002", "SCAN-003", "SCAN-004",
    "SCAN-005", "SCAN-006", "SCAN-007", "SCAN-008", "SCAN-009", "SCAN-010", "SHUF-001", "SHUF-002",
    "SHUF-003", "SHUF-006", "SHUF-013", "DAG-001", "DAG-002", "DAG-003", "DAG-004", "DAG-007",
    "DAG-010", "KEYS-006",
)  # fmt: skip
@pytest.mark.parametrize(
    "program",
    PROGRAMS,
    ids=lambda p: f"{len(p.columns['id'])}-{p.batch_size}-{p.last_batch}-{p.seed}-{p.sink}",
)
@settings(max_examples=9)
@given(actions=ACTIONS, seed=st.integers(0, 2**32 - 1))
@example(actions=EVERY_MODE, seed=7)
@example(actions=[("scan", 2), ("rest", 0), ("seek", 2**32 - 99, 2**32 - 1), *EVERY_MODE], seed=0)
@example(actions=[("for", 20), ("step", 1), ("for", 3), ("for", 20), ("rest", 0)], seed=2**31)
def test_every_mode_gives_the_stream_of_the_model(program, actions, seed):
    if program.seed is not None:
        program = dataclasses.replace(program, seed=seed)
    if len(program.columns["id"]) > 20:  # each length of a scan is a program to compile
        actions = [action for action in actions if action[0] != "rest"]
    assert_the_model_agrees(program, actions)


@st.composite
def any_program(draw):
    length, batch_size = draw(st.integers(1, 40)), draw(st.integers(1, 60))
    policies = ["keep", "pad"] + ["drop"] * (batch_size <= length)
    seed = draw(st.one_of(st.none(), st.integers(0, 2**32 - 1)))
    graph = draw(st.sampled_from([{}, CHAIN] if seed is None else [{}, CHAIN, BRANCHES]))
    return program(length, batch_size, draw(st.sampled_from(policies)), seed, graph)


@pytest.mark.spec(
    "STEP-003", "STEP-004", "STEP-005", "STEP-006", "STEP-010", "STEP-015", "ITER-002", "ITER-011",
    "SCAN-001", "SCAN-005", "SHUF-001", "SHUF-006", "SHUF-013", "SHUF-017", "KEYS-006",
)  # fmt: skip
@settings(max_examples=8)
@given(any_program(), ACTIONS)
def test_every_length_and_batch_size_gives_the_stream_of_the_model(program, actions):
    actions = [action for action in actions if action != ("scan", 0)]  # JAX cannot, eagerly
    with jax.disable_jit():  # nothing to compile for each new shape
        assert_the_model_agrees(program, actions)


@pytest.mark.spec("STEP-009", "SHUF-004", "DAG-011", "KEYS-008")
@pytest.mark.parametrize("seed", [None, 7])
def test_the_stream_does_not_depend_on_the_batch_size(seed):
    def noise(batch, *, keys):
        return {**batch, "x": batch["x"] + jax.vmap(jax.random.normal)(keys)}

    def stages():
        return [] if seed is None else [noise, jitter(), record_words]

    expected = rows(by_for(pipeline(stages(), length=33, batch_size=33, seed=seed), 5))
    for batch_size in (4, 7):
        stream = pipeline(stages(), length=33, batch_size=batch_size, seed=seed)
        got = rows([*by_step(stream, 3), *by_scan(stream, 4), *by_for(stream, 12)])
        assert_same(got, jax.tree.map(lambda x, n=got["id"].shape[0]: x[:n], expected))


@pytest.mark.spec("SHUF-005")
def test_the_order_does_not_depend_on_the_policy():
    keep, drop, pad = (
        ids(pipeline(length=10, seed=3, last_batch=policy)) for policy in ("keep", "drop", "pad")
    )
    assert pad == keep
    assert drop == keep[:8]


@pytest.mark.spec("SHUF-011")
def test_the_order_does_not_depend_on_what_is_ordered():
    data = {"number": np.arange(10.0), "id": np.arange(10, dtype=np.int16)}
    other = MemorySource(MemorySourceConfig(shuffle=True), data)
    assert ids(pipeline([record_words], source=other, seed=3)) == ids(pipeline(seed=3))


@pytest.mark.internal(
    "there is no accelerator where the tests run, but a program for one runs anywhere"
)
@pytest.mark.parametrize(
    "mode, last_batch", [("for", "pad"), ("step", "keep"), ("scan", "drop"), ("scan", "keep")]
)
def test_what_is_traced_for_an_accelerator_gives_the_same_batches(monkeypatch, mode, last_batch):
    def batches():
        stages = [Count(), jitter()]
        stream = pipeline(stages, length=33, batch_size=4, seed=3, last_batch=last_batch)
        stream._runtime.bind(stream).structure.programs.clear()  # or they would be taken from there
        with ahead(3):
            return MODES[mode](stream, 20)

    expected = batches()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert_same(batches(), expected)


@pytest.mark.internal
def test_pipelines_that_share_programs_are_looked_at_once():
    traces = Traces()

    @traces
    def wide(batch):
        return batch | {"deep": {"wide": batch["id"].astype(int)}}

    def kind(stream):
        return stream.element_spec["deep"]["wide"].dtype

    first, second = (pipeline([wide], length=10, seed=seed) for seed in (3, 4))
    assert traces["wide"] == 1
    first.element_spec["deep"].clear()
    assert kind(first) == kind(second) == np.int32
    with jax.enable_x64(True):
        assert kind(pipeline([wide], length=10, seed=5)) == np.int64
    assert kind(pipeline([wide], length=10, seed=6)) == np.int32
    assert traces["wide"] == 2
    pipeline([wide], length=10, seed=3, batch_size=5)
    pipeline([wide], length=11, seed=3)
    assert traces["wide"] == 4


class Center(nnx.Module):
    """Takes off a moving mean that is weakly typed, as Python's numbers are."""

    def __init__(self):
        self.mean = nnx.Variable(jnp.asarray(0.0))

    def __call__(self, batch):
        self.mean[...] = 0.5 * self.mean[...] + 0.5 * batch["x"].mean()
        two = jnp.broadcast_to(jnp.asarray(2.0), batch["x"].shape)
        return {"x": batch["x"] - self.mean[...], "two": two}


class CenterByContainer(Center):
    def __init__(self):
        self.mean = nnx.Variable({"x": jnp.asarray(0)})

    def __call__(self, batch):
        mean = 0.5 * self.mean.get_value()["x"] + 0.5 * batch["x"].mean()
        self.mean.set_value({"x": mean})
        return {
            "x": batch["x"] - mean,
            "two": jnp.broadcast_to(jnp.asarray(2.0), batch["x"].shape),
        }


class CenterWithKeys(Center):
    def __call__(self, batch, *, keys):
        return super().__call__(batch)


@pytest.mark.spec("SCAN-001", "SCAN-006", "STEP-015", "ITER-010")
@pytest.mark.parametrize("stage", [Center, CenterWithKeys, CenterByContainer])
@pytest.mark.parametrize("kind", [jnp.bfloat16, np.uint8])
@pytest.mark.usefixtures("standard_promotion")
def test_weak_types_are_the_same_in_every_mode(stage, kind):
    def make():
        source = MemorySource(MemorySourceConfig(), {"x": np.arange(20).astype(kind)})
        return Pipeline(source=source, stages=[stage()], batch_size=2, rngs=nnx.Rngs(0))

    expected, spec = by_scan(make(), 10), make().element_spec
    for mode in by_step, by_for:
        with ahead(3):
            batches = mode(make(), 10)
        for batch, other in zip(batches, expected, strict=True):
            assert_same(batch, other)
            assert {name: x.dtype for name, x in batch.items()} == {
                name: x.dtype for name, x in spec.items()
            }
            assert batch["two"].weak_type


class Drifting(nnx.Module):
    """Has a Variable that is of another type, or shape, after the first batch."""

    def __init__(self, first, then):
        self.value, self.then = nnx.Variable(first), then

    def __call__(self, batch):
        self.value.set_value(self.then(self.value.get_value(), batch))
        return batch


@pytest.mark.spec("ERR-025", "SCAN-006")
@pytest.mark.parametrize(
    "first, then, text",
    [
        (jnp.bfloat16(0), lambda x, b: x + b["x"].mean(), r"bfloat16\[\] and became float32\[\]"),
        (0, lambda x, b: b["id"], r"int32\[\] and became int32\[4\]"),
        (jnp.zeros(2), lambda x, b: b["x"], r"float32\[2\] and became float32\[4\]"),
        ((jnp.zeros(2),), lambda x, b: (*x, *x), r"1 in PyTreeDef.* and became 2 in PyTree"),
    ],
)
@pytest.mark.usefixtures("standard_promotion")
def test_a_variable_that_changes_its_type_is_refused_with_its_stage(first, then, text):
    with pytest.raises(StageError, match=rf"'Drifting' failed: .*`Drifting.value` was {text}"):
        pipeline([Drifting(first, then)], length=8, batch_size=4)


@pytest.mark.spec("ERR-025")
@pytest.mark.parametrize("ways", [by_step, by_for, by_scan])
def test_a_stage_that_does_not_compile_is_named(ways):
    def never(x):
        raise NotImplementedError("no kernel for this device")

    odd = jax.extend.core.Primitive("odd")
    odd.def_abstract_eval(lambda x: x)
    odd.def_impl(never)

    def stage(batch):
        return {**batch, "x": odd.bind(batch["x"])}

    stream = pipeline([stage], length=8, batch_size=4)
    with pytest.raises(StageError, match=r"Stage 'stage' failed: .*no kernel for this device"):
        ways(stream, 1)
    assert stream.cursor == (0, 0)


class Drawing(nnx.Module):
    def __init__(self):
        self.rngs = nnx.Rngs(0)

    def get_batch_at(self, start, batch_size, key):
        return {"x": jax.random.normal(self.rngs(), (batch_size,))}


class CountingGather(EagerSourceBase):
    def __init__(self):
        super().__init__()
        self.asked = nnx.Variable(jnp.int32(0))

    def __len__(self):
        return 4

    def gather(self, records):
        self.asked[...] += 1
        return {"x": records}


@pytest.mark.spec("ERR-025")
@pytest.mark.parametrize("source", [Drawing, CountingGather])
def test_a_source_that_changes_itself_is_refused(source):
    with pytest.raises(StageError, match=r"'source' failed: .* changes an nnx.Variable or draws"):
        Pipeline(source=source(), batch_size=2, rngs=nnx.Rngs(0))


@nnx.jit
def linear(net, x):
    return net(x)


class Generating(nnx.Module):
    def __init__(self):
        self.net = nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    def get_batch_at(self, start, batch_size, key):
        return {"x": linear(self.net, jnp.ones((batch_size, 2)))}


@pytest.mark.spec("SRC-002")
def test_a_source_may_use_compiled_functions_of_modules():
    assert Pipeline(source=Generating(), batch_size=4).step()["x"].shape == (4, 2)


@pytest.mark.spec("STATE-001", "SCAN-006")
@pytest.mark.usefixtures("standard_promotion")
def test_a_number_of_pythons_becomes_what_it_is_added_to():
    def make():
        return pipeline([Drifting(0, lambda x, b: x + b["x"].mean())], length=8, batch_size=4)

    stream, resumed, scanned = make(), make(), make()
    stream.step()
    scanned.scan(whole, 1)
    resumed.set_state(stream.get_state())
    values = [x.nodes["Drifting"].value.get_value() for x in (stream, resumed, scanned)]
    assert [float(x) for x in values] == [2.5] * 3


@pytest.mark.spec("ERR-025")
def test_an_error_of_the_function_of_a_scan_is_no_stages():
    def fail(x):
        raise ValueError("boom")

    def step_fn(batch):
        spec = jax.ShapeDtypeStruct((), np.float32)
        return jax.pure_callback(fail, spec, batch["x"].sum())

    with pytest.raises(jax.errors.JaxRuntimeError, match="boom"):
        jax.block_until_ready(pipeline(length=8, batch_size=4).scan(step_fn, 2))
