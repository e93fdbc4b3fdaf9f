"""A state is the place in the stream and the variables of the stages: enough to go on elsewhere."""

import copy
import itertools
import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import datarax_conformance
import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from flax import nnx
from helpers import (
    MODES,
    Affine,
    Count,
    Endless,
    EqxScale,
    Normalise,
    ahead,
    assert_same,
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
)
from hypothesis import given, settings, strategies as st

from datarax import Pipeline
from datarax.errors import StateError
from datarax.pipeline._state import MEANS
from datarax.sources import (
    MemorySource,
    MemorySourceConfig,
    RandomAccessSource,
    RandomAccessSourceConfig,
    SourceData,
)

SCHEMA = Path(datarax_conformance.__file__).parent / "schemas" / "state.schema.json"


def augmented(batch_size=4, last_batch="keep", seed=3, length=10):
    """A stream with all that a state is about: order, keys, stage state, random streams."""
    stages = [Count(), jitter(), record_words, Normalise()]
    return pipeline(stages, length=length, batch_size=batch_size, seed=seed, last_batch=last_batch)


# Resuming.


@pytest.mark.spec("STATE-001", "STATE-002", "STATE-006", "STATE-015", "SCAN-003")
@pytest.mark.parametrize("last_batch", ["keep", "drop", "pad"])
def test_a_state_of_every_boundary_gives_the_rest_bit_for_bit(last_batch):
    stream = augmented(last_batch=last_batch)
    states, batches = [stream.get_state()], []
    for _ in range(8):
        batches.append(stream.step())
        states.append(stream.get_state())
    end = state_of(stream)
    used = stream
    for cut, state in enumerate(states):
        for resumed in (augmented(last_batch=last_batch), used):
            resumed.set_state(state)
            assert_same(by_step(resumed, 8 - cut), batches[cut:])
            assert_same(state_of(resumed), end)


@pytest.mark.spec("STATE-003", "STATE-002", "STATE-015", "ITER-007")
@pytest.mark.parametrize("mode", MODES)
def test_a_state_counts_the_batches_that_were_handed_out(mode):
    stream = augmented(length=12, batch_size=2)
    with ahead(3):
        states = [stream.get_state()]
        batches = []
        for _ in range(8):
            batches += MODES[mode](stream, 1)
            states.append(stream.get_state())
    for cut in (0, 1, 4, 6, 7):
        resumed = augmented(length=12, batch_size=2)
        resumed.set_state(states[cut])
        got = by_step(resumed, 8 - cut)
        assert rows(got)["id"].tolist() == rows(batches[cut:])["id"].tolist()
        assert_same(
            [(b["count"], b["keys"]) for b in got],
            [(b["count"], b["keys"]) for b in batches[cut:]],
        )


@pytest.mark.spec("STATE-003")
def test_a_state_in_the_body_of_a_loop_counts_that_batch_and_no_more():
    stream = augmented(length=12, batch_size=2)
    with ahead(3):
        for i, batch in enumerate(stream):
            state = stream.get_state()
            assert state["cursor"] == {"epoch": (i + 1) // 6, "offset": 2 * (i + 1) % 12}
            assert batch["count"].tolist() == [i + 1] * 2
            assert np.frombuffer(_data(state, "seen"), np.int32).tolist() == [i + 1]


def _data(state, name):
    import base64

    [data] = [v["data"] for path, v in state["variables"].items() if name in path]
    return base64.b64decode(data)


@pytest.mark.spec("STATE-007", "STATE-001", "STEP-009", "KEYS-008")
@pytest.mark.parametrize("batch_size", [1, 3, 7, 25])
def test_a_run_goes_on_at_the_same_record_with_another_batch_size(batch_size):
    def stream(batch_size):
        return pipeline([jitter(), record_words], length=10, batch_size=batch_size, seed=3)

    def records(stream, count):
        batches = by_step(stream, -(-count // stream.batch_size))
        return jax.tree.map(lambda x: x[:count], rows(batches))

    first = stream(4)
    for cut in range(6):
        resumed = stream(batch_size)
        resumed.set_state(first.get_state())
        whole = stream(1)
        whole.seek(epoch=4 * cut // 10, offset=4 * cut % 10)
        assert resumed.cursor == first.cursor == whole.cursor
        assert_same(records(resumed, 25), records(whole, 25))
        first.step()


@pytest.mark.spec("STATE-008", "STEP-011")
def test_a_run_goes_on_with_another_policy():
    stream = pipeline(length=10, seed=3)
    by_step(stream, 2)
    state = stream.get_state()
    rest = ids(stream)
    for last_batch, expected in (("pad", rest), ("keep", rest)):
        other = pipeline(length=10, seed=3, last_batch=last_batch)
        other.set_state(state)
        assert ids(other) == expected
    drop = pipeline(length=10, seed=3, last_batch="drop")
    drop.set_state(state)
    assert ids([drop.step()]) == ids([stream.step()])


@pytest.mark.spec("STATE-008", "STEP-018", "SRC-033")
@pytest.mark.parametrize("before, after", [*itertools.permutations(["keep", "drop", "pad"], 2)])
@pytest.mark.parametrize("name", ["mask", "is_there"])
def test_a_mask_is_no_part_of_what_a_state_fits(before, after, name):
    class Torn(list):
        def __getitem__(self, i):
            if i == 3:
                raise OSError("torn")
            return super().__getitem__(i)

    def masked(last_batch, mask_name):
        config = RandomAccessSourceConfig(on_error="mask", max_errors=1)
        source = RandomAccessSource(config, Torn({"id": np.int32(i)} for i in range(6)))
        return pipeline(source=source, batch_size=2, last_batch=last_batch, mask_name=mask_name)

    stream, other = masked(before, "mask"), masked(after, name)
    stream.step()
    other.set_state(stream.get_state())
    batch = other.step()
    assert batch["id"].tolist() == [2, 0] and batch[name].tolist() == [True, False]


@pytest.mark.spec("STATE-001", "STATE-002", "STATE-007", "STATE-017", "KEYS-008")
def test_a_new_process_goes_on_from_every_boundary(tmp_path):
    stream = augmented()
    states = []
    for _ in range(6):
        states.append(stream.get_state())
        stream.step()
    by_step(stream, 2)
    expected = [state_of(stream), stream.step()]
    (tmp_path / "states.json").write_text(json.dumps(states))
    code = f"""
        import json, pickle, sys
        from pathlib import Path
        import jax, numpy as np
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from test_state import augmented, by_step, state_of

        folder = Path({str(tmp_path)!r})
        ends = []
        for cut, state in enumerate(json.loads((folder / "states.json").read_text())):
            stream = augmented()
            stream.set_state(json.dumps(state))
            by_step(stream, 8 - cut)
            ends.append([state_of(stream), jax.tree.map(np.asarray, stream.step())])
        (folder / "ends").write_bytes(pickle.dumps(ends))
    """
    here = [str(Path(__file__).parent), *sys.path]
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(here)},
    )
    for end in pickle.loads((tmp_path / "ends").read_bytes()):
        assert_same(end, expected)


ACTIONS = st.lists(st.sampled_from(["step", "for", "scan", "save", "load", "other"]), max_size=12)


@pytest.mark.spec("STATE-001", "STATE-004", "STATE-005", "STATE-006", "STATE-015")
@settings(max_examples=20)
@given(ACTIONS)
def test_saving_and_loading_does_not_change_the_stream(actions):
    """However often it is saved, loaded and moved to another pipeline, the stream is one."""

    def stream():
        return pipeline([Count(), record_words], length=12, batch_size=2, seed=5)

    subject, straight = stream(), stream()
    saved = [(subject.get_state(), 0)]
    batches, place = by_step(straight, 14), 0
    with ahead(3):
        for action in actions:
            match action:
                case "save":
                    saved.append((json.dumps(subject.get_state()), place))
                case "load":
                    state, place = saved[-1]
                    subject.set_state(state)
                case "other":
                    state = subject.get_state()
                    subject = stream()
                    subject.set_state(state)
                case mode:
                    assert_same(MODES[mode](subject, 1), batches[place : place + 1])
                    place += 1


# What a state is.

SMALL = {
    "stored": lambda: {},
    "shuffled": lambda: {"seed": 0},
    "padded": lambda: {"seed": 2**32 - 1, "last_batch": "pad"},
    "permutation": lambda: {"shuffle": "permutation", "rngs": nnx.Rngs(3, shuffle=4)},
    "long": lambda: {"stages": [double] * 30, "seed": 1},
    "own rngs": lambda: {"stages": [jitter(rngs=nnx.Rngs(5))], "seed": 1},
}


@pytest.mark.spec("STATE-016", "STATE-020")
@pytest.mark.parametrize("length", [10, 100_000])
@pytest.mark.parametrize("options", SMALL)
def test_a_state_without_variables_is_small_and_has_the_form_of_the_spec(options, length):
    stream = pipeline(length=length, **SMALL[options]())
    stream.seek(epoch=2**32 - 2, offset=length - 5)
    state = stream.get_state()
    assert len(json.dumps(state)) < 1024
    assert json.loads(json.dumps(state)) == state
    jsonschema.validate(state, json.loads(SCHEMA.read_text()))
    assert state["cursor"] == {"epoch": 2**32 - 2, "offset": length - 5}
    assert state["fingerprint"]["length"] == length
    assert state["variables"] == {}


@pytest.mark.spec("STATE-016", "STATE-015", "STATE-020")
def test_a_state_with_variables_has_the_form_of_the_spec():
    stream = augmented()
    stream.step()
    state = stream.get_state()
    jsonschema.validate(state, json.loads(SCHEMA.read_text()))
    assert json.loads(json.dumps(state)) == state
    assert len(state["variables"]) == 7  # a counter, 4 of the norm, key and count of its stream
    assert not any("source" in path for path in state["variables"])


@pytest.mark.spec("STATE-016", "SRC-014")
def test_an_endless_source_has_a_state():
    stream = pipeline(source=Endless(), batch_size=3)
    by_step(stream, 2)
    state = stream.get_state()
    jsonschema.validate(state, json.loads(SCHEMA.read_text()))
    assert state["fingerprint"]["length"] is None
    resumed = pipeline(source=Endless(), batch_size=5)
    resumed.set_state(state)
    assert ids([resumed.step()]) == [6, 7, 8, 9, 10]


@pytest.mark.spec("STATE-017")
@pytest.mark.parametrize("form", [lambda s: s, json.dumps, lambda s: json.dumps(s).encode()])
def test_a_state_may_be_a_dict_its_text_or_bytes(form):
    stream = augmented()
    by_step(stream, 3)
    resumed = augmented()
    resumed.set_state(form(stream.get_state()))
    assert_same(resumed.step(), stream.step())


@pytest.mark.spec("STATE-004", "STATE-005")
def test_a_state_is_a_snapshot():
    stream = augmented()
    by_step(stream, 2)
    state = stream.get_state()
    kept = copy.deepcopy(state)
    expected = state_of(stream)
    stream.get_state()["variables"].clear()
    assert_same(state_of(stream), expected)
    by_step(stream, 3)
    assert state == kept

    resumed = augmented()
    resumed.set_state(state)
    by_step(resumed, 3)
    resumed.nodes["Count"].seen[...] = jnp.int32(99)
    assert state == kept


@pytest.mark.spec("STATE-015")
def test_variables_of_every_kind_come_back():
    class Zoo(nnx.Module):
        def __init__(self, fill):
            def some(dtype):
                return nnx.Variable(jnp.full((2, 3), fill, dtype))

            self.f16, self.bf16, self.i8, self.u32, self.b = map(
                some, ("float16", "bfloat16", "int8", "uint32", "bool")
            )
            self.c = nnx.Variable(jnp.complex64(fill + 1j))
            self.tree = nnx.Variable({"a": jnp.float32(fill), "b": (jnp.int32(fill),)})
            self.key = nnx.Variable(jax.random.key(fill))
            self.rbg = nnx.Variable(jax.random.key(fill, impl="rbg"))
            self.numpy = nnx.Param(np.full(3, fill, np.float32))
            self.empty = nnx.Variable(jnp.zeros((0, 2)))

        def __call__(self, batch):
            return batch

    one, two = pipeline([Zoo(1)]), pipeline([Zoo(0)])
    state = json.dumps(one.get_state())
    assert len(json.loads(state)["variables"]) == 12
    two.set_state(state)
    assert_same(state_of(two), state_of(one))
    assert jax.random.key_impl(two.nodes["Zoo"].rbg[...]) == jax.random.key_impl(
        one.nodes["Zoo"].rbg[...]
    )


@pytest.mark.spec("STATE-015", "DAG-015")
def test_a_variable_that_stages_share_comes_back_shared():
    def stream():
        count = Count()
        return pipeline([count, EqxScale(jnp.float32(2)), count])

    one, two = stream(), stream()
    by_step(one, 2)
    one.nodes["EqxScale"].arrays[0][...] = jnp.float32(7)
    two.set_state(one.get_state())
    assert two.nodes["Count"] is two.nodes["Count_1"]
    assert_same(by_scan(two, 2), by_step(one, 2))


# What is refused.


def a_state(**options):
    stream = pipeline([Count()], **({"seed": 3} | options))
    stream.step()
    return stream.get_state()


OTHER_COLUMNS = {
    "name": {"id": np.arange(10, dtype=np.int32), "y": np.ones(10, np.float32)},
    "shape": {**columns(10), "x": np.ones((10, 1), np.float32)},
    "type": {**columns(10), "x": np.ones(10, np.float16)},
    "field": {**columns(10), "y": np.ones(10)},
}


@pytest.mark.spec("STATE-009", "STATE-010", "STATE-011", "STATE-012", "STATE-013", "STATE-014",
                  "STATE-018")  # fmt: skip
@pytest.mark.parametrize(
    "field, other",
    [
        ("seed", lambda: a_state(seed=4)),
        ("seed", lambda: a_state(rngs=nnx.Rngs(3, shuffle=4))),
        ("order", lambda: a_state(shuffle=False, rngs=nnx.Rngs(3))),
        ("order", lambda: a_state(shuffle="permutation", rngs=nnx.Rngs(3))),
        ("length", lambda: a_state(length=11)),
        *(
            (
                "specs",
                lambda data=data: a_state(
                    source=MemorySource(MemorySourceConfig(shuffle=True), data)
                ),
            )
            for data in OTHER_COLUMNS.values()
        ),
    ],
)
def test_the_state_of_another_stream_is_refused(field, other):
    stream = pipeline([Count()], seed=3)
    before = state_of(stream)
    state = other()
    mine, theirs = (s["fingerprint"][field] for s in (stream.get_state(), state))
    here = "; here they are id int32[], x float32[]" if field == "specs" else ""
    with pytest.raises(StateError) as error:
        stream.set_state(state)
    assert error.value.field == field and error.value.code == "state"
    assert str(error.value) == (
        f"The state does not fit this pipeline: {field!r} is {mine!r} here, but {theirs!r} in the "
        f"state. It stands for {MEANS[field]}{here}."
    )
    assert_same(state_of(stream), before)
    assert stream.step()["count"].tolist() == [1] * 4


def graph(nodes, edges, sink):
    source = MemorySource(MemorySourceConfig(), columns(10))
    return Pipeline.from_dag(source=source, nodes=nodes, edges=edges, sink=sink, batch_size=4)


def first(batch, *others):
    return batch


@pytest.mark.spec("STATE-013", "STATE-014", "STATE-018")
@pytest.mark.parametrize(
    "other",
    [
        ({"a": [], "c": ["a"]}, "c"),
        ({"a": [], "b": ["a", "a"]}, "b"),
        ({"a": [], "b": ["a", "source"]}, "b"),
        ({"b": [], "a": ["b"]}, "a"),
        ({"a": [], "b": ["a"], "c": ["b"]}, "c"),
    ],
    ids=str,
)
def test_the_state_of_another_graph_is_refused(other):
    edges, sink = other
    stream = graph({"a": first, "b": first}, {"a": [], "b": ["a"]}, "b")
    other = graph(dict.fromkeys(edges, first), edges, sink)
    other.step()
    with pytest.raises(StateError, match=r"'graph' is '.*' here, but '.*' in the state") as error:
        stream.set_state(other.get_state())
    assert error.value.field == "graph"
    assert str(error.value).endswith("; here they are a (function) of source; b (function) of a.")
    assert stream.cursor == (0, 0)


@pytest.mark.spec("STATE-013", "DAG-005", "STATE-001")
def test_what_does_not_change_the_stream_is_no_other_stream():
    """Order of declaration, what a stage computes: a mended run can go on."""
    one = graph({"a": double, "b": double}, {"a": [], "b": ["a"]}, "b")
    two = graph({"b": increment, "a": lambda b: b}, {"b": ["a"], "a": ["source"]}, "b")
    one.step()
    two.set_state(one.get_state())
    assert two.cursor == (0, 4)


def _edit(change):
    def edit(state):
        state = copy.deepcopy(state)
        change(state)
        return state

    return edit


def _variable(state):
    [variable] = state["variables"].values()
    return variable


# A weak float32 of 0.5, as a state records it.
HALF = {"dtype": "float32", "data": "AAAAPw=="}

MALFORMED = {
    "not JSON": lambda s: json.dumps(s)[:-1],
    "not text": lambda s: b"\xff\xfe",
    "a list": lambda s: [s],
    "a number": lambda s: "7",
    "nothing": lambda s: None,
    "no version": _edit(lambda s: s.pop("version")),
    "version 2": _edit(lambda s: s.update(version=2)),
    "version 1.0": _edit(lambda s: s.update(version=1.0)),
    "version true": _edit(lambda s: s.update(version=True)),
    "no cursor": _edit(lambda s: s.pop("cursor")),
    "cursor list": _edit(lambda s: s.update(cursor=[0, 0])),
    "no offset": _edit(lambda s: s["cursor"].pop("offset")),
    "offset past the end": _edit(lambda s: s["cursor"].update(offset=10)),
    "offset below 0": _edit(lambda s: s["cursor"].update(offset=-1)),
    "offset a float": _edit(lambda s: s["cursor"].update(offset=1.0)),
    "offset true": _edit(lambda s: s["cursor"].update(offset=True)),
    "epoch too large": _edit(lambda s: s["cursor"].update(epoch=2**32)),
    "epoch a text": _edit(lambda s: s["cursor"].update(epoch="1")),
    "no fingerprint": _edit(lambda s: s.pop("fingerprint")),
    "fingerprint null": _edit(lambda s: s.update(fingerprint=None)),
    "no seed": _edit(lambda s: s["fingerprint"].pop("seed")),
    "no variables": _edit(lambda s: s.pop("variables")),
    "variables list": _edit(lambda s: s.update(variables=[])),
    "variable missing": _edit(lambda s: s["variables"].clear()),
    "variable too many": _edit(lambda s: s["variables"].update(more=_variable(s))),
    "variable null": _edit(lambda s: s.update(variables=dict.fromkeys(s["variables"]))),
    "other type": _edit(lambda s: _variable(s).update(dtype="float32")),
    "no such type": _edit(lambda s: _variable(s).update(dtype="banana")),
    "other shape": _edit(lambda s: _variable(s).update(shape=[1])),
    "no data": _edit(lambda s: _variable(s).pop("data")),
    "weak text": _edit(lambda s: _variable(s).update(weak_type=True, dtype="U1")),
    "weak float for an integer": _edit(lambda s: _variable(s).update(weak_type=True, **HALF)),
    "weak type a text": _edit(lambda s: _variable(s).update(weak_type="yes")),
    "data null": _edit(lambda s: _variable(s).update(data=None)),
    "data not base64": _edit(lambda s: _variable(s).update(data="***")),
    "data too short": _edit(lambda s: _variable(s).update(data="AAA=")),
    "data too long": _edit(lambda s: _variable(s).update(data="AAAAAAAAAAA=")),
}


@pytest.mark.spec("STATE-019", "STATE-014", "STATE-023", "ERR-022")
@pytest.mark.parametrize("form", [lambda s: s, lambda s: json.dumps(s)], ids=["dict", "text"])
@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_state_is_refused_before_anything_changes(
    unchecked, malformed_stream, fault, form
):
    stream = malformed_stream
    state = MALFORMED[fault](stream.get_state() | {"cursor": {"epoch": 5, "offset": 0}})
    before = state_of(stream)
    with pytest.raises(StateError, match=r"^The state does not fit this pipeline: '"):
        stream.set_state(state if isinstance(state, str | bytes) else form(state))
    assert_same(state_of(stream), before)


@pytest.mark.spec("STATE-014", "STATE-019")
def test_a_state_behind_the_last_batch_of_all_is_refused_before_anything_changes():
    stream = pipeline([Count()], length=16, last_batch="drop")
    by_step(stream, 2)
    state = stream.get_state() | {"cursor": {"epoch": 2**32 - 1, "offset": 15}}
    by_step(stream, 1)
    before = state_of(stream)
    with pytest.raises(StateError, match="'cursor' has no batch behind it: The stream ends before"):
        stream.set_state(state)
    assert_same(state_of(stream), before)


@pytest.fixture(scope="module")
def malformed_stream():
    stream = pipeline([Count()], seed=3)
    by_step(stream, 2)
    return stream


class Flag(nnx.Module):
    def __init__(self):
        self.on = nnx.Variable(jnp.array([True, False]))

    def __call__(self, batch):
        return batch


@pytest.mark.spec("STATE-019")
def test_a_byte_that_is_no_boolean_is_refused():
    stream = pipeline([Flag()])
    state = stream.get_state()
    _variable(state)["data"] = "AgA="
    with pytest.raises(StateError, match=r"Flag\.on' holds a byte that is no boolean"):
        stream.set_state(state)


@pytest.mark.spec("ERR-023")
def test_no_state_is_set_inside_a_traced_function():
    stream = pipeline()
    state = stream.get_state()
    with pytest.raises(TypeError, match="takes no state; set it outside"):
        nnx.jit(lambda p: p.set_state(state))(stream)
    assert stream.cursor == (0, 0)


@pytest.mark.spec("STATE-018", "STATE-019")
@pytest.mark.parametrize(
    "fault, field, text",
    [
        ("version 2", "version", "'version' must be 1, got 2."),
        ("offset past the end", "cursor.offset", "'cursor.offset' must be in [0, 10), got 10."),
        (
            "epoch too large",
            "cursor.epoch",
            f"'cursor.epoch' must be in [0, {2**32}), got {2**32}.",
        ),
        ("no cursor", "cursor", "'cursor' is missing or no object, got None."),
    ],
)
def test_a_malformed_state_is_refused_by_name(malformed_stream, fault, field, text):
    with pytest.raises(StateError) as error:
        malformed_stream.set_state(MALFORMED[fault](malformed_stream.get_state()))
    assert error.value.field == field
    assert str(error.value) == "The state does not fit this pipeline: " + text


# Copies.


@pytest.mark.spec("STATE-020")
def test_a_filter_tells_the_data_from_the_rest():
    stream = augmented()
    data, rest = nnx.state(stream, SourceData, ...)
    assert sum(x.size for x in jax.tree.leaves(data)) >= 20
    assert not any(x.size >= 10 for x in jax.tree.leaves(rest))


@pytest.mark.spec("STATE-021", "STATE-015")
@pytest.mark.parametrize("mode", MODES)
def test_the_nnx_way_resumes_as_a_state_does(mode):
    stream = augmented()
    with ahead(3):
        MODES[mode](stream, 3)
        saved = nnx.to_pure_dict(nnx.state(stream, nnx.Not(SourceData)))
        saved = jax.tree.map(np.asarray, jax.tree.map(_unwrap_key, saved))
        place = stream.cursor
        expected = by_step(stream, 4)

        fresh = augmented()
        MODES[mode](fresh, 2)
        state = nnx.state(fresh, nnx.Not(SourceData))
        nnx.replace_by_pure_dict(state, _wrap_keys(saved, nnx.to_pure_dict(state)))
        nnx.update(fresh, state)
        assert fresh.cursor == place
        got = by_step(fresh, 4)
    assert_same(got, expected)


@pytest.mark.spec("STATE-021")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_a_cursor_that_comes_back_in_another_integer_type_is_the_same_place(mode, kind):
    original, resumed = (pipeline(length=10, batch_size=2, seed=1) for _ in range(2))
    by_step(original, 2)
    state = nnx.to_pure_dict(nnx.state(original))
    state["_cursor_state"] = np.asarray(state["_cursor_state"]).astype(kind)
    own = nnx.state(resumed)
    nnx.replace_by_pure_dict(own, state)
    nnx.update(resumed, own)
    assert resumed.element_spec == original.element_spec
    assert_same(MODES[mode](resumed, 2), MODES[mode](original, 2))
    assert resumed.cursor == original.cursor


def _unwrap_key(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def _wrap_keys(saved, like):
    return jax.tree.map(
        lambda x, y: (
            jax.random.wrap_key_data(jnp.asarray(x))
            if jnp.issubdtype(y.dtype, jax.dtypes.prng_key)
            else jnp.asarray(x)
        ),
        saved,
        like,
    )


@pytest.mark.spec("STATE-022")
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)),
                                    nnx.clone], ids=["deepcopy", "pickle", "clone"])  # fmt: skip
@pytest.mark.parametrize("before", [None, *MODES])
def test_a_copy_goes_on_on_its_own(before, copier):
    def stream():
        stages = [Count(), jitter(), EqxScale(jnp.float32(2)), Affine(1, 0), double]
        return pipeline(stages, length=12, batch_size=2, seed=0)

    subject = stream()
    with ahead(3):
        if before is not None:
            MODES[before](subject, 3)
        expected = by_step(copy.deepcopy(subject), 3)
        twin = copier(subject)
        for mode in MODES.values():
            other = copier(subject)
            assert_same(mode(other, 3), expected)
        assert_same(by_step(subject, 3), expected)
        assert_same(by_step(twin, 3), expected)
        twin.nodes["Affine"].a[...] = jnp.float32(100)
        assert subject.nodes["Affine"].a[...] == 1
        assert str(twin) == str(subject)


@pytest.mark.spec("STATE-022")
def test_a_subclass_and_a_loop_over_it_can_be_copied():
    stream = pipeline([Count()], length=12, batch_size=2)
    with ahead(3):
        loop = iter(stream)
        next(loop)
        twin = copy.deepcopy(stream)
        assert ids(itertools.islice(loop, 2)) == [2, 3, 4, 5]
        assert ids(twin) == list(range(2, 12))


# Types and places.


class Scale(nnx.Module):
    def __init__(self, value):
        self.factor = nnx.Param(value)

    def __call__(self, batch):
        return {"x": batch["x"] * self.factor[...]}


@pytest.mark.spec("STATE-001", "STATE-015", "STATE-016")
@pytest.mark.parametrize(
    "value", [2.0, jnp.asarray(2.0), jnp.broadcast_to(jnp.asarray(2.0), (1, 3)), 3]
)
@pytest.mark.usefixtures("standard_promotion")
def test_what_is_resumed_is_as_weakly_typed_as_it_was(value):
    def make():
        data = {"x": np.arange(30).reshape(10, 3).astype(jnp.bfloat16)}
        source = MemorySource(MemorySourceConfig(), data)
        return Pipeline(source=source, stages=[Scale(value)], batch_size=2)

    original, resumed = make(), make()
    original.step()
    state = json.loads(json.dumps(original.get_state()))
    jsonschema.validate(state, json.loads(SCHEMA.read_text()))
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert_same(resumed.step(), original.step())


class Total(nnx.Module):
    """Begins as a plain number, and becomes what it is added to."""

    def __init__(self):
        self.total = nnx.Variable(0)

    def __call__(self, batch):
        self.total.set_value(self.total.get_value() + batch["x"].sum())
        return {"x": batch["x"] + self.total.get_value()}


@pytest.mark.spec("STATE-006", "STATE-015")
@pytest.mark.usefixtures("standard_promotion")
def test_a_state_from_before_a_number_took_its_type_is_taken_after_it_too():
    def make():
        source = MemorySource(MemorySourceConfig(), {"x": np.arange(8, dtype=np.float32)})
        return Pipeline(source=source, stages=[Total()], batch_size=2)

    pipeline = make()
    before = pipeline.get_state()
    first = pipeline.step()
    after = pipeline.get_state()
    second = pipeline.step()
    pipeline.set_state(before)
    assert pipeline.get_state() == before
    assert_same(pipeline.step(), first)
    for stream in (pipeline, make()):
        stream.set_state(after)
        assert_same(stream.step(), second)


@pytest.mark.spec("STATE-001", "STATE-015")
def test_a_variable_that_is_split_over_devices_stays_so():
    code = """
        import jax, jax.numpy as jnp, numpy as np
        from flax import nnx
        from jax.sharding import NamedSharding, PartitionSpec
        from datarax import Pipeline
        from datarax.sources import MemorySource, MemorySourceConfig

        mesh = jax.make_mesh((4,), ("data",))

        class Embed(nnx.Module):
            def __init__(self):
                split = NamedSharding(mesh, PartitionSpec(None, "data"))
                self.table = nnx.Param(jax.device_put(jnp.eye(4), split))
                self.rngs = nnx.Rngs(jax.device_put(jax.random.key(0), jax.devices()[1]))

            def __call__(self, batch):
                whole = jax.device_put(self.table[...], NamedSharding(mesh, PartitionSpec()))
                return {"x": batch["x"] @ whole}

        source = MemorySource(MemorySourceConfig(), {"x": np.ones((8, 4), np.float32)})
        pipeline = Pipeline(source=source, stages=[Embed()], batch_size=4)
        before = pipeline.step()
        variables = nnx.to_pure_dict(nnx.state(pipeline.nodes["Embed"]))
        pipeline.set_state(pipeline.get_state())
        after = nnx.to_pure_dict(nnx.state(pipeline.nodes["Embed"]))
        jax.tree.map(lambda x, y: x.sharding == y.sharding or 1 / 0, variables, after)
        assert pipeline.step()["x"].tolist() == before["x"].tolist()
        print(tuple(pipeline.nodes["Embed"].table[...].sharding.spec))
    """
    flags = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=flags
    )
    assert out.stdout == "(None, 'data')\n", out.stderr


@pytest.mark.spec("STATE-015")
def test_variables_whose_names_hold_dots_are_told_apart():
    class Parts(nnx.Module):
        def __init__(self):
            inner = nnx.Dict({"b": nnx.Variable(jnp.int32(0))})
            self.parts = nnx.Dict({"a.b": nnx.Variable(jnp.int32(0)), "a": inner})

        def __call__(self, batch):
            self.parts["a.b"][...] += 1
            self.parts["a"]["b"][...] += 100
            both = self.parts["a.b"][...] + self.parts["a"]["b"][...]
            return {**batch, "both": jnp.zeros_like(batch["id"]) + both}

    original, resumed = (pipeline([Parts()], length=8, batch_size=2) for _ in range(2))
    original.step()
    resumed.set_state(original.get_state())
    assert resumed.step()["both"].tolist() == original.step()["both"].tolist() == [202, 202]


@pytest.mark.spec("STATE-019")
def test_text_that_is_nested_without_end_is_no_state():
    stream = pipeline(length=8, batch_size=2)
    with pytest.raises(StateError, match="is not JSON"):
        stream.set_state("[" * 100_000)


@pytest.mark.internal
def test_there_is_no_state_inside_a_trace():
    stream = pipeline([Count()], length=8, batch_size=2)
    with pytest.raises(TypeError, match="Inside a traced function a pipeline has no state yet"):
        nnx.jit(lambda stream: stream.get_state() and None)(stream)
