"""The model keeps its own law. It is what the library and every engine are compared with."""

import collections
import itertools
import json
import zlib
from pathlib import Path

import datarax_conformance
import jax
import jsonschema
import numpy as np
import pytest
from datarax_conformance import model
from datarax_conformance.model import Program, Refused, Stream
from hypothesis import given, settings, strategies as st

pytestmark = pytest.mark.internal

PACKAGE = Path(datarax_conformance.__file__).parent
CODES = {error["code"] for error in json.loads((PACKAGE / "spec.json").read_text())["errors"]}

SIZES = [*range(1, 301), *(2**k + d for k in range(9, 15) for d in (-1, 0, 1))]
SEEDS = st.integers(0, 2**32 - 1)


def columns(length):
    return {"id": np.arange(length), "x": np.arange(length, dtype="float32")}


@st.composite
def programs(draw, policies=("keep", "drop", "pad")):
    """Small programs with a graph that counts batches and shows keys."""
    length = draw(st.integers(1, 13))
    policy = draw(st.sampled_from(policies))
    size = draw(st.integers(1, length if policy == "drop" else length + 4))
    return Program(
        columns(length),
        size,
        policy,
        draw(SEEDS),
        {"scaled": "affine(3,1)", "n": "count", "k": "keys"},
        {"scaled": [], "n": ["scaled"], "k": ["n"]},
        "k",
    )


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], name)


def records_of(batch):
    return batch["id"][batch.get("mask", slice(None))].tolist()


def by_hand_32(seed, epoch, length, x):
    """The order again, in plain integers and JAX's keys, straight from the prose."""

    def words(key):
        return [int(word) for word in jax.random.key_data(key)]

    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), zlib.crc32(b"source"))
    key = jax.random.fold_in(key, np.uint32(epoch))
    for r in range(24):
        a, b = words(jax.random.fold_in(key, r))
        y = (a % length - x) % length
        h = max(x, y) ^ b
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        h = h ^ h >> 16
        if h >= 2**31:
            x = y
    return x


def by_hand_64(seed, epoch, length, x):
    mask = 2**64 - 1
    key = model.epoch_key(model.base_key(seed), epoch)
    for r in range(24):
        a, b = (int(word) for word in model.fold_in(key, r))
        y = ((a << 32 | b) % length - x) % length
        h = max(x, y) ^ (b << 32 | a)
        h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & mask
        h = (h ^ h >> 27) * 0x94D049BB133111EB & mask
        h = h ^ h >> 31
        if h >= 2**63:
            x = y
    return x


@pytest.mark.parametrize("number", [0, 1, 23, 2**31, 2**32 - 1])
@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1])
def test_fold_in_is_that_of_jax(seed, number):
    folded = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), np.uint32(number))
    assert [int(word) for word in model.fold_in(model.base_key(seed), number)] == (
        jax.random.key_data(folded).tolist()
    )


@pytest.mark.parametrize("length", [1, 2, 7, 33, 65537, 2**32 - 1])
def test_the_order_is_the_one_of_the_prose(length):
    offsets = sorted({0, length // 2, length - 1})
    records = model.order(model.epoch_key(model.base_key(5), 9), length, offsets)
    assert records.tolist() == [by_hand_32(5, 9, length, x) for x in offsets]


@pytest.mark.parametrize("length", [2**32, 2**40, 2**63 - 1])
def test_the_order_of_long_sources_is_the_one_of_the_prose(length):
    offsets = [0, 1, length // 3, length - 1]
    key = model.epoch_key(model.base_key(5), 9)
    records = model.order(key, length, offsets)
    assert records.tolist() == [by_hand_64(5, 9, length, x) for x in offsets]
    assert model.place_of(key, length, records).tolist() == offsets


def test_every_epoch_is_a_permutation():
    for length in SIZES:
        key = model.epoch_key(model.base_key(length), 1)
        records = model.order(key, length, range(length))
        assert sorted(records.tolist()) == list(range(length)), length
        assert model.place_of(key, length, records).tolist() == list(range(length)), length


def test_all_orders_of_four_records_are_as_likely():
    seen = collections.Counter(
        tuple(model.order(model.epoch_key(model.base_key(seed), 0), 4, range(4)).tolist())
        for seed in range(2400)
    )
    # 23 degrees of freedom: 60 is passed once in twenty thousand times.
    assert len(seen) == 24
    assert sum((count - 100) ** 2 / 100 for count in seen.values()) < 60


def test_orders_of_different_seeds_and_epochs_differ():
    orders = {
        model.order(model.epoch_key(model.base_key(seed), epoch), 33, range(33)).tobytes()
        for seed in range(50)
        for epoch in range(20)
    }
    assert len(orders) == 1000


@settings(max_examples=60)
@given(programs(), st.lists(st.sampled_from(["step", "next", "scan"]), max_size=8))
def test_mixed_modes_give_the_records_of_steps(program, modes):
    mixed, plain = Stream(program), Stream(program)
    seen = []
    for mode in modes:
        if mode == "scan":
            batches = mixed.scan(2)
            seen += [{name: leaf[i] for name, leaf in batches.items()} for i in range(2)]
        else:
            seen.append(mixed.step() if mode == "step" else next(iter(mixed)))
    records = [record for batch in seen for record in records_of(batch)]
    expected = []
    while len(expected) < len(records):
        expected += records_of(plain.step())
    assert records == expected[: len(records)]


@settings(max_examples=60)
@given(programs(policies=("drop", "pad")))
def test_the_three_modes_agree_batch_by_batch(program):
    stepped, scanned = Stream(program), Stream(program)
    looped = [*(looping := Stream(program)), *looping]
    stacked = scanned.scan(len(looped))
    for i, batch in enumerate(looped):
        equal(batch, stepped.step())
        equal(batch, {name: leaf[i] for name, leaf in stacked.items()})
    assert looping.get_state() == stepped.get_state() == scanned.get_state()


@settings(max_examples=60)
@given(programs())
def test_a_loop_over_an_epoch_has_each_record_once(program):
    stream = Stream(program)
    for epoch in range(2):
        assert stream.cursor == (epoch, 0)
        records = [record for batch in stream for record in records_of(batch)]
        whole = model.order(
            model.epoch_key(model.base_key(program.seed), epoch),
            stream.length,
            range(stream.length),
        ).tolist()
        if program.last_batch == "drop":
            whole = whole[: stream.length // program.batch_size * program.batch_size]
        assert records == whole


@settings(max_examples=60)
@given(programs(policies=("keep",)), st.integers(1, 17))
def test_rows_do_not_depend_on_the_cut(program, other_size):
    def rows(size):
        stream = Stream(
            Program(
                program.columns,
                size,
                seed=program.seed,
                nodes=program.nodes,
                edges=program.edges,
                sink=program.sink,
            )
        )
        batches = [stream.step() for _ in range(-(-40 // size))]
        return {
            name: np.concatenate([batch[name] for batch in batches])[:40]
            for name in ("id", "x", "keys")
        }

    equal(rows(program.batch_size), rows(other_size))


@settings(max_examples=60)
@given(programs(), st.integers(0, 6))
def test_a_stream_resumes_at_every_boundary(program, before):
    first, second = Stream(program), Stream(program)
    for _ in range(before):
        first.step()
    state = first.get_state()
    kept = bytes(state)
    second.step()
    second.set_state(state)
    for _ in range(3):
        equal(first.step(), second.step())
    assert state == kept
    assert first.cursor == second.cursor


def test_a_state_has_the_form_of_the_table():
    schema = json.loads((PACKAGE / "schemas" / "state.schema.json").read_text())
    program = Program(columns(5), 2, seed=7, nodes={"n": "count"}, edges={"n": []}, sink="n")
    state = json.loads(Stream(program).get_state())
    jsonschema.Draft202012Validator(schema).validate(state)
    assert set(state) == set(schema["required"])
    del state["cursor"]["epoch"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(state, schema)


@pytest.mark.parametrize(
    "field, change",
    [
        ("length", {"columns": columns(6)}),
        ("specs", {"columns": {"id": np.arange(5), "x": np.zeros((5, 2), "float32")}}),
        ("order", {"seed": None}),
        ("seed", {"seed": 8}),
        ("graph", {"nodes": {"m": "count"}, "edges": {"m": []}, "sink": "m"}),
    ],
)
def test_a_state_of_another_stream_is_refused(field, change):
    plain = dict(columns=columns(5), batch_size=2, seed=7)
    plain |= dict(nodes={"n": "count"}, edges={"n": []}, sink="n")
    stream = Stream(Program(**plain))
    other = Stream(Program(**plain | change))
    other.step()
    with pytest.raises(Refused) as refused:
        stream.set_state(other.get_state())
    assert (refused.value.code, refused.value.details["field"]) == ("state", field)
    assert stream.cursor == (0, 0)


@pytest.mark.parametrize("state", [b"", b"{", b"[]", b'{"version": 2}', b'{"version": 1}'])
def test_a_malformed_state_is_refused(state):
    stream = Stream(Program(columns(5), 2))
    with pytest.raises(Refused, match="state"):
        stream.set_state(state)
    assert stream.cursor == (0, 0)


def test_an_iterator_that_has_ended_stays_ended():
    stream = Stream(Program(columns(2), 2))
    iterator = iter(stream)
    assert len([*iterator]) == 1
    stream.reset()
    assert next(iterator, None) is None
    assert stream.cursor == (0, 0)


def test_drop_does_not_rest_where_no_batch_can_start():
    stream = Stream(Program(columns(10), 4, "drop"))
    stream.seek(epoch=3, offset=7)
    assert stream.cursor == (4, 0)
    assert len([*stream]) == 2


@pytest.mark.parametrize(
    "code, program",
    [
        ("field-type", dict(columns={"id": np.array(["a"])})),
        ("field-type", dict(columns={"id": np.array([{}], object)})),
        ("field-type", dict(columns={"id": np.array(3)})),
        ("unequal-lengths", dict(columns={"id": np.arange(2), "x": np.arange(3)})),
        ("empty-source", dict(columns={})),
        ("empty-source", dict(columns={"id": np.arange(0)})),
        ("batch-size", dict(batch_size=0)),
        ("batch-size", dict(batch_size=1.0)),
        ("batch-size", dict(batch_size=True)),
        ("last-batch", dict(last_batch="wrap")),
        ("last-batch", dict(last_batch="drop", batch_size=9)),
        ("mask-name", dict(last_batch="pad", columns={"mask": np.arange(4)})),
        ("no-nodes", dict(sink="a")),
        ("node-name", dict(nodes={"source": "add"}, edges={"source": []}, sink="source")),
        ("missing-edges", dict(nodes={"a": "add"}, sink="a")),
        ("edges-without-node", dict(nodes={"a": "add"}, edges={"a": [], "b": []}, sink="a")),
        ("predecessors-type", dict(nodes={"a": "add"}, edges={"a": "source"}, sink="a")),
        ("self-loop", dict(nodes={"a": "add"}, edges={"a": ["a"]}, sink="a")),
        ("unknown-predecessor", dict(nodes={"a": "add"}, edges={"a": ["b"]}, sink="a")),
        ("unknown-sink", dict(nodes={"a": "add"}, edges={"a": []}, sink="b")),
        ("unknown-sink", dict(nodes={"a": "add"}, edges={"a": []})),
        ("unused-node", dict(nodes={"a": "add", "b": "add"}, edges={"a": [], "b": []}, sink="a")),
        ("stage", dict(nodes={"a": "pick(y)"}, edges={"a": []}, sink="a")),
        ("stage", dict(nodes={"a": "sub"}, edges={"a": []}, sink="a")),
        ("rngs", dict(nodes={"a": "keys"}, edges={"a": []}, sink="a")),
    ],
)
def test_a_fault_is_refused_with_its_code(code, program):
    with pytest.raises(Refused) as refused:
        Stream(Program(**dict(columns=columns(4), batch_size=2) | program))
    assert refused.value.code == code


NAMES = st.sampled_from(["a", "b", "c", "d", "source", "nobody"])


@settings(max_examples=300)
@given(
    st.dictionaries(NAMES, st.just("add"), max_size=4),
    st.dictionaries(NAMES, st.lists(NAMES, max_size=3), max_size=5),
    NAMES,
)
def test_any_graph_runs_or_is_refused_with_a_code(nodes, edges, sink):
    try:
        stream = Stream(Program(columns(4), 2, nodes=nodes, edges=edges, sink=sink))
    except Refused as refused:
        assert refused.code in CODES
        if refused.code == "cycle":
            cycle = refused.details["nodes"]
            assert cycle[0] == cycle[-1] and len(set(cycle)) == len(cycle) - 1 >= 2
            assert all(before in edges[node] for before, node in itertools.pairwise(cycle))
    else:
        assert len(stream.step()["x"]) == 2


def test_a_long_chain_is_no_trouble():
    names = [f"n{i}" for i in range(1500)]
    edges = {name: [before] for before, name in zip(["source", *names], names, strict=False)}
    nodes = dict.fromkeys(reversed(names), "affine(1,1)")
    stream = Stream(Program(columns(3), 3, nodes=nodes, edges=edges, sink=names[-1]))
    assert stream.step()["x"].tolist() == [1500.0, 1501.0, 1502.0]


def test_only_batches_that_are_handed_out_are_counted():
    stream = Stream(Program(columns(4), 2, nodes={"n": "count"}, edges={"n": []}, sink="n"))
    stream.scan(0)
    stream.get_state()
    assert stream.step()["count"].tolist() == [1, 1]
    assert [batch["count"].tolist() for batch in stream] == [[2, 2]]
    assert stream.scan(2)["count"].tolist() == [[3, 3], [4, 4]]


def test_a_bystander_is_not_part_of_the_cycle():
    nodes = dict.fromkeys(["reader", "a", "b", "c", "feeder"], "add")
    edges = {"reader": ["b"], "feeder": [], "a": ["feeder", "c"], "b": ["a"], "c": ["b"]}
    with pytest.raises(Refused) as refused:
        Stream(Program(columns(4), 2, nodes=nodes, edges=edges, sink="reader"))
    cycle = refused.value.details["nodes"]
    turns = [["a", "b", "c", "a"], ["b", "c", "a", "b"], ["c", "a", "b", "c"]]
    assert cycle in turns
