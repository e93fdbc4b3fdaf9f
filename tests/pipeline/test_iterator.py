"""`for` is one epoch; whatever is computed ahead, only what was handed out counts."""

import gc
import itertools
import math
import threading
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
    Affine,
    Count,
    Endless,
    Numbers,
    ahead,
    assert_same,
    by_for,
    by_scan,
    by_step,
    columns,
    double,
    ids,
    jitter,
    pipeline,
    record_words,
    rows,
    state_of,
    whole,
)
from hypothesis import given, settings, strategies as st

from datarax import Pipeline
from datarax.errors import StageError
from datarax.pipeline import _compute_ahead, _read_ahead, _read_batches, _runtime
from datarax.pipeline._program import Program
from datarax.sources import (
    IterableSource,
    IterableSourceConfig,
    MemorySource,
    MemorySourceConfig,
    RandomAccessSource,
    RandomAccessSourceConfig,
    StreamingDiskSource,
    StreamingDiskSourceConfig,
)

# What a loop hands out.


@pytest.mark.spec("ITER-001", "ITER-002", "ITER-003", "ITER-005", "SHUF-001")
@pytest.mark.parametrize("length, batch_size", [(1, 1), (1, 3), (7, 3), (8, 4), (33, 5)])
def test_an_epoch_visits_every_record_once(length, batch_size):
    for last_batch in ("keep", "drop", "pad"):
        if batch_size > length and last_batch == "drop":
            continue
        stream = pipeline(length=length, batch_size=batch_size, seed=3, last_batch=last_batch)
        for _ in range(2):
            batches = list(stream)
            whole, rest = divmod(length, batch_size)
            sizes = [len(batch["id"]) for batch in batches]
            tail = {"keep": [rest], "drop": [], "pad": [batch_size]}[last_batch] if rest else []
            assert sizes == [batch_size] * whole + tail
            seen = ids(batches)
            assert len(seen) == len(set(seen)) == length - (last_batch == "drop") * rest
        assert stream.cursor == (2, 0)


@pytest.mark.spec("ITER-006", "ITER-007", "SHUF-007")
def test_the_next_loop_is_the_next_epoch():
    stream = pipeline(length=33, batch_size=4, seed=0)
    for _ in stream:
        break
    rest, second = ids(stream), ids(stream)
    assert len(rest) == 29 and sorted(second) == list(range(33))
    stream.reset()
    first = ids(stream)
    assert first[4:] == rest
    assert first != second


@pytest.mark.spec("ITER-004", "ITER-009")
def test_an_iterator_that_has_ended_has_ended_for_good():
    stream = pipeline(length=4, batch_size=2)
    loop = iter(stream)
    assert iter(loop) is loop
    assert len(list(loop)) == 2
    for _ in range(3):
        with pytest.raises(StopIteration):
            next(loop)
    stream.seek(epoch=0)
    assert list(loop) == []
    assert stream.cursor == (0, 0)


@pytest.mark.spec("ITER-009")
@pytest.mark.parametrize("leave", ["step", "scan", "seek", "loop", "set_state"])
def test_an_iterator_ends_when_its_epoch_is_left(leave):
    stream = pipeline(length=4, batch_size=2)
    loop = iter(stream)
    next(loop)
    state = stream.get_state() | {"cursor": {"epoch": 5, "offset": 0}}
    match leave:
        case "step":
            stream.step()
        case "scan":
            by_scan(stream, 1)
        case "seek":
            stream.seek(epoch=1)
        case "loop":
            list(stream)
        case "set_state":
            stream.set_state(state)
    with pytest.raises(StopIteration):
        next(loop)
    stream.reset()
    with pytest.raises(StopIteration):
        next(loop)


@pytest.mark.spec("ITER-009")
def test_an_iterator_that_was_not_asked_does_not_notice_that_its_epoch_was_left_and_entered_again():
    stream = pipeline(length=4, batch_size=2)
    loop = iter(stream)
    stream.seek(epoch=1)
    stream.seek(epoch=0, offset=2)
    assert ids(loop) == [2, 3]


@pytest.mark.spec("ITER-008", "ITER-009")
def test_two_iterators_share_the_place():
    stream = pipeline(length=10, batch_size=2)
    first, second = iter(stream), iter(stream)
    order = [first, second, second, first, second]
    with ahead(3):
        assert ids(next(loop) for loop in order) == list(range(10))
    assert list(first) == list(second) == []


@pytest.mark.spec("ITER-010", "STEP-015")
@pytest.mark.parametrize("stages", ["none", "fixed", "random", "with state"])
@pytest.mark.parametrize("mode", [by_for, by_step], ids=["for", "step"])
def test_batches_computed_together_are_those_computed_one_by_one(mode, stages):
    def stream():
        made = {
            "none": [],
            "fixed": [Affine(2, 1)],
            "random": [Affine(2, 1), jitter()],
            "with state": [Count(), jitter()],
        }
        return pipeline(made[stages], length=19, batch_size=2, seed=3, last_batch="pad")

    with ahead(1):
        expected = mode(stream(), 21)
    together = stream()
    with ahead(4):
        assert_same(mode(together, 21), expected)
    assert together.cursor == (2, 2)


@pytest.mark.spec("ITER-010", "DAG-007")
def test_a_step_sees_what_was_changed_after_the_last():
    affine = Affine(1, 0)
    stream = pipeline([affine], length=12, batch_size=2)
    with ahead(4):
        first = stream.step()
        affine.a[...] = jnp.float32(10)
        second = stream.step()
        stream.nodes["Affine"] = Affine(0, 7)
        third = stream.step()
    assert [batch["x"].tolist() for batch in (first, second, third)] == [[1, 2], [30, 40], [7, 7]]
    assert stream.cursor == (0, 6)


@pytest.mark.spec("ITER-009", "STEP-011")
def test_an_iterator_belongs_to_the_epoch_in_which_its_first_batch_can_start():
    stream = pipeline(length=10, batch_size=4, last_batch="drop")
    stream.seek(epoch=0, offset=9)
    assert ids(stream) == list(range(8))
    assert stream.cursor == (2, 0)


@pytest.mark.spec("SRC-014", "ITER-012")
def test_a_loop_over_an_endless_source_does_not_end():
    stream = pipeline(source=Endless(), batch_size=3)
    with ahead(3):
        batches = list(itertools.islice(stream, 8))
    assert ids(batches) == list(range(24))
    assert stream.cursor == (0, 24)
    with pytest.raises(TypeError) as error:
        len(stream)
    assert str(error.value) == "How many batches an epoch of this source has is not known."


@pytest.mark.spec("ITER-001", "STEP-015")
def test_there_is_no_loop_inside_a_trace():
    with pytest.raises(TypeError) as error:
        nnx.jit(lambda stream: [batch["id"] for batch in stream])(pipeline())
    assert str(error.value) == (
        "Inside a traced function the end of an epoch is not known. "
        "Use `step()` there, or `scan(step_fn, length)`."
    )


# Look-ahead is not seen.


def drive(stream, script):
    """What a script of actions hands out, and the state after each."""
    loop, seen = iter(stream), []
    for action in script:
        match action:
            case "next":
                batch = next(loop, None)
            case "step":
                batch = stream.step()
            case "scan":
                batch = by_scan(stream, 1)[0]
            case "loop":
                loop, batch = iter(stream), None
            case "restore":
                stream.set_state(stream.get_state())
                batch = None
            case ("seek", place):
                stream.seek(epoch=place // 33, offset=place % 33)
                batch = None
        seen.append((jax.tree.map(np.asarray, batch), state_of(stream)))
    return seen


SCRIPTS = st.lists(
    st.one_of(
        st.just("next"),
        st.just("next"),
        st.sampled_from(["next", "step", "scan", "loop", "restore"]),
        st.tuples(st.just("seek"), st.integers(0, 99)),
    ),
    max_size=40,
)


@pytest.mark.spec("ITER-010", "STATE-003", "STATE-005", "DAG-007")
@pytest.mark.parametrize("last_batch", ["keep", "drop", "pad"])
@settings(max_examples=15)
@given(script=SCRIPTS)
def test_looking_ahead_is_not_seen(last_batch, script):
    def stream():
        stages = [Count(), record_words]
        return pipeline(stages, length=33, batch_size=2, seed=1, last_batch=last_batch)

    expected = drive(stream(), script)
    with ahead(3):
        got = drive(stream(), script)
    assert_same(got, expected)


def words_beside(batch, *, keys):
    """Another function, so that nobody has compiled a program with it for one thread."""
    return record_words(batch, keys=keys)


def drawing(words, last_batch="keep", source=None):
    nodes = {"words": words, "affine": Affine(1, 0)}
    return Pipeline.from_dag(
        source=source or MemorySource(MemorySourceConfig(shuffle=True), columns(33)),
        nodes=nodes,
        edges={"words": [], "affine": ["words"]},
        sink="affine",
        batch_size=2,
        last_batch=last_batch,
        rngs=nnx.Rngs(1),
    )


@pytest.mark.spec("ITER-010", "STATE-003", "STATE-005")
@pytest.mark.parametrize("sides, count", [(2, 4), (2, 5), (4, 3)])
@settings(max_examples=10)
@given(last_batch=st.sampled_from(["keep", "drop", "pad"]), script=SCRIPTS)
def test_programs_that_run_side_by_side_are_not_seen(sides, count, last_batch, script):
    expected = drive(drawing(record_words, last_batch), script)
    with ahead(count, sides):
        got = drive(drawing(words_beside, last_batch), script)
    assert_same(got, expected)


@pytest.mark.spec("DAG-007", "ITER-010")
def test_batches_that_hang_on_one_another_are_computed_one_after_the_other():
    stream = pipeline([words_beside, Count()], length=34, batch_size=2, seed=1)
    with ahead(4, 2):
        counts = [batch["count"].tolist() for batch in stream]
    assert counts == [[i, i] for i in range(1, 18)]


class CountWhole(nnx.Module):
    """Counts the batches of two rows, and no others."""

    def __init__(self):
        self.seen = nnx.Variable(jnp.int32(0))

    def __call__(self, batch):
        if len(batch["id"]) == 2:
            self.seen[...] += 1
        return {**batch, "seen": jnp.zeros_like(batch["id"]) + self.seen[...]}


@pytest.mark.spec("DAG-007", "ITER-010")
@pytest.mark.parametrize("count, sides", [(8, 1), (4, 2), (3, 3)])
@pytest.mark.parametrize("on_host", [False, True])
def test_a_stage_may_count_in_whole_batches_alone(on_host, count, sides):
    source = None
    if on_host:
        data = columns(33)
        records = [{name: x[i] for name, x in data.items()} for i in range(33)]
        source = RandomAccessSource(RandomAccessSourceConfig(), records)
    stream = pipeline([CountWhole()], source=source, length=33, batch_size=2)
    with ahead(count, sides):
        seen = [batch["seen"].tolist()[-1] for _ in range(2) for batch in stream]
        stream.seek(epoch=2, offset=24)
        seen += [batch["seen"].tolist()[-1] for batch in stream]
    assert seen == [*range(1, 17), 16, *range(17, 33), 32, 33, 34, 35, 36, 36]


@pytest.mark.spec("STEP-012")
def test_what_fails_ahead_fails_when_its_turn_has_come(monkeypatch):
    stream = pipeline([words_beside], length=40, batch_size=2, seed=1)
    expected = ids(pipeline([record_words], length=40, batch_size=2, seed=1))
    call = _compute_ahead.call

    def fail(*_):
        raise MemoryError("no room for another")

    with ahead(4, 2):
        got = ids(by_step(stream, 3))  # and two more are ready
        monkeypatch.setattr(_compute_ahead, "call", fail)
        got += ids(by_step(stream, 2))
        for _ in range(2):
            with pytest.raises(MemoryError, match="no room for another"):
                stream.step()
        monkeypatch.setattr(_compute_ahead, "call", call)
        got += ids(by_step(stream, 15))
    assert got == expected


@pytest.mark.spec("ITER-001", "STEP-003")
@pytest.mark.parametrize("first", ["step", "next"])
def test_what_an_interrupt_has_left_behind_is_cut_anew(first, monkeypatch):
    stream, hand_over = pipeline(length=33, batch_size=2), _runtime.Runtime.hand_over
    stream.seek(epoch=0, offset=32)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_runtime.Runtime, "hand_over", interrupt)
    with pytest.raises(KeyboardInterrupt):
        stream.step() if first == "step" else next(iter(stream))
    monkeypatch.setattr(_runtime.Runtime, "hand_over", hand_over)
    if first == "step":
        assert ids(stream) == [32]
    else:
        assert ids(by_step(stream, 1)) == [32, 0]


@pytest.mark.internal
@pytest.mark.parametrize("on_host", [False, True])
def test_while_batches_are_handed_over_others_are_computed_side_by_side(on_host, monkeypatch):
    turns, beside = [], _compute_ahead.beside

    def counting(side):
        turns.append(side)
        return beside(side)

    def words(batch, *, keys):  # of which no other test knows what it does
        return record_words(batch, keys=keys)

    monkeypatch.setattr(_compute_ahead, "beside", counting)
    monkeypatch.setattr(_read_ahead, "CHUNK_SECONDS", math.inf)  # else slow reads come one by one
    source = None
    if on_host:
        data = columns(33)
        records = [{name: x[i] for name, x in data.items()} for i in range(33)]
        source = RandomAccessSource(RandomAccessSourceConfig(shuffle=True), records)
    expected = [batch["x"].tolist() for batch in drawing(record_words)]
    stream = drawing(words, source=source)
    with ahead(8 if on_host else 4, 2):
        loop, got = iter(stream), []
        for turns_then in ([], [1, 2], [1, 2], [1, 2, 1], [1, 2, 1], [1, 2, 1, 2]):
            got.append(next(loop)["x"].tolist())  # the first shows that none hangs on the others
            assert on_host or turns == turns_then
        stream.nodes["affine"].a[...] *= 2
        got += [batch["x"].tolist() for batch in loop]
    assert got == expected[:6] + [[2 * x for x in batch] for batch in expected[6:]]
    assert {1, 2} <= set(turns)


STEPS_AND_LOOPS = [
    *["step"] * 12,
    *["loop", *["next"] * 6],  # it ends where its epoch does, whatever was read for `step`
    *["loop", *["next"] * 12],
    *["step"] * 8,  # they run on, whatever was read for `for`
    *("loop", "next", "next", "scan", "next", "step", ("seek", 40), "loop"),
    *("next", "next", "restore", "next", "step"),
]


@pytest.mark.spec("SRC-030", "ITER-001", "ITER-010", "STATE-003")
@pytest.mark.parametrize(
    "staged, last_batch", [(False, "keep"), (False, "pad"), (True, "keep"), (True, "drop")]
)
@pytest.mark.parametrize("storage", ["records", "stream"])
def test_reading_ahead_is_not_seen(storage, staged, last_batch, monkeypatch):
    monkeypatch.setattr(_read_batches, "BLOCK", 10)
    data = columns(33)
    records = [{name: x[i] for name, x in data.items()} for i in range(33)]

    def run(source, **options):
        stages = [Count(), record_words] if staged else []
        how = {"batch_size": 2, "seed": 1, "last_batch": last_batch}
        return drive(pipeline(stages, source=source, **how, **options), STEPS_AND_LOOPS)

    if storage == "records":
        expected = run(None, length=33)
        with ahead(8):
            got = run(RandomAccessSource(RandomAccessSourceConfig(shuffle=True), records))
    else:
        expected = run(IterableSource(IterableSourceConfig(), lambda: iter(records)))
        with ahead(8):
            got = run(IterableSource(IterableSourceConfig(), lambda: iter(records)))
    assert_same(got, expected)


@pytest.mark.spec("STEP-015", "ITER-010")
@pytest.mark.parametrize("take", [by_step, by_for])
def test_a_setting_of_jax_that_changes_counts_from_the_next_batch_on(take):
    places = []

    def widen(batch):
        places.append(type(batch["id"]))
        return batch | {"wide": batch["id"].astype(int)}

    def kinds(count):
        return [batch["wide"].dtype.name for batch in take(stream, count)]

    stream = pipeline([widen], length=60, batch_size=2)
    with ahead(8):
        assert kinds(3) == ["int32"] * 3
        with jax.enable_x64(True):
            assert kinds(3) == ["int64"] * 3
            assert stream.element_spec["wide"].dtype == np.int64
        assert kinds(3) == ["int32"] * 3
        assert stream.element_spec["wide"].dtype == np.int32
        places.clear()
        with jax.disable_jit():
            assert ids(take(stream, 1)) == [18, 19]
        assert len(places) > 0  # so a debugger stops in the stage
        assert ids(take(stream, 1)) == [20, 21]


@pytest.mark.spec("ITER-010")
def test_a_setting_that_changes_what_is_drawn_shows_in_the_next_batch():
    def draw(batch, *, keys):
        return batch | {"u": jax.vmap(lambda key: jax.random.uniform(key, (3,)))(keys)}

    streams = [pipeline([draw], length=60, batch_size=2, seed=0) for _ in range(2)]
    with ahead(8):
        by_for(streams[0], 5)
        streams[1].seek(epoch=0, offset=10)
        with jax.threefry_partitionable(False):
            first, second = (by_for(stream, 1)[0]["u"] for stream in streams)
    np.testing.assert_array_equal(first, second)


@pytest.mark.spec("ITER-010", "STEP-012")
def test_a_nan_fails_the_batch_that_holds_it():
    def spoil(batch):
        return batch | {"y": jnp.where(batch["id"] == 62, jnp.nan, 1.0)}

    stream, found = pipeline([spoil], length=100, batch_size=5), []
    with ahead(8), jax.debug_nans(True):
        for _ in range(2):
            with pytest.raises(StageError, match="Stage 'spoil' failed: FloatingPointError"):
                for batch in stream:
                    found.append(int(batch["id"][0]))
            assert stream.cursor == (0, 60)
    assert found == [*range(0, 60, 5)]
    assert ids(by_for(stream, 1)) == [60, 61, 62, 63, 64]
    stream.reset()
    with ahead(20):
        by_for(stream, 8)
        with jax.debug_nans(True), pytest.raises(StageError, match="FloatingPointError"):
            by_for(stream, 8)  # some of which had been computed before
    assert stream.cursor == (0, 60)


@pytest.mark.spec("ITER-010")
def test_what_a_stage_prints_is_of_batches_that_were_handed_out(capfd):
    def show(batch):
        jax.debug.print("{}", batch["id"][0])
        return batch

    with ahead(8):
        by_for(pipeline([show], length=60, batch_size=5), 6)
    jax.effects_barrier()
    assert capfd.readouterr().out.split() == ["0", "5", "10", "15", "20", "25"]


@pytest.mark.internal
def test_what_was_computed_ahead_for_one_device_is_not_handed_out_on_another(monkeypatch):
    calls = []
    original = _compute_ahead.batch_program

    def counting(*how):
        calls.append(how)
        return original(*how)

    monkeypatch.setattr(_compute_ahead, "batch_program", counting)
    stream = pipeline(length=60, batch_size=2)
    with ahead(8):
        assert ids(by_step(stream, 3)) == [0, 1, 2, 3, 4, 5]
        calls.clear()
        with jax.default_device(jax.devices("cpu")[0]):
            assert ids(by_step(stream, 1)) == [6, 7]
    assert len(calls) > 0


@pytest.mark.internal
@pytest.mark.parametrize("stages", [(), (Count,)], ids=["bare", "staged"])
@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("take", [by_for, by_step, lambda stream, count: stream.scan(whole, count)])
def test_a_guard_on_transfers_has_nothing_against_those_of_a_pipeline(
    take, on_disk, stages, tmp_path
):
    source = None
    if on_disk:
        for name, column in columns(10).items():
            np.save(tmp_path / f"{name}.npy", column)
        source = StreamingDiskSource(StreamingDiskSourceConfig(path=tmp_path, shuffle=True))

    def made():
        return pipeline([make() for make in stages], source=source, seed=3, batch_size=2)

    expected, stream = take(made(), 6), made()
    jax.config.update("jax_transfer_guard", "disallow")  # for all threads
    try:
        with ahead(4):
            found = take(stream, 6)
    finally:
        jax.config.update("jax_transfer_guard", None)
    assert_same(found, expected)


@pytest.mark.internal
@pytest.mark.parametrize("stages", [(), (Count,)], ids=["bare", "staged"])
def test_nor_against_what_a_pipeline_transfers_besides(stages):
    made = [make() for make in stages]
    stream = pipeline(made, seed=3, batch_size=2)
    batch, rngs, key = stream.step(), nnx.Rngs(4), jax.random.key(0)
    with jax.transfer_guard("disallow"):
        pipeline(made, shuffle=True, rngs=rngs, batch_size=2)
        stream.replay(3)
        stream(batch) if not stages else None  # which would transfer its own numbers
        stream.source.get_batch_at(3, 2, key)


@pytest.mark.internal
def test_a_cursor_of_numpys_is_not_looked_at_before_every_batch():
    stream = pipeline(length=12, batch_size=2)
    stream.step()
    stream._cursor_state.set_raw_value(np.array(stream._cursor_state.get_raw_value()))
    assert ids(by_step(stream, 1)) == [2, 3]
    with ahead(3):
        assert ids(by_step(stream, 2)) == [4, 5, 6, 7]
        assert len(stream._runtime._computed.ready) > 0


@pytest.mark.internal
@pytest.mark.parametrize("stages, calls_for_four", [([], 4), ([Count()], 3)])
def test_looking_ahead_computes_several_batches_in_one_call(monkeypatch, stages, calls_for_four):
    calls = []
    original = _compute_ahead.batch_program

    def counting(structure, cut, count, *how):
        calls.append(count)
        return original(structure, cut, count, *how)

    monkeypatch.setattr(_compute_ahead, "batch_program", counting)
    stream = pipeline(stages, length=33, batch_size=2)
    with ahead(4):
        assert ids(stream) == list(range(33))
    # Of 17 batches one comes first, and one at the end is short. Of the three that are left after
    # twelve none is computed alone: the one before is computed again, unless a stage would notice.
    assert calls.count(4) == calls_for_four


@pytest.mark.internal
@pytest.mark.parametrize("count", [2, 8, 64])
def test_who_changes_a_stage_at_every_batch_does_not_pay_for_looking_ahead(monkeypatch, count):
    computed, call = [], Program.__call__

    def counting(program, *args):
        if "batch_program" in program._inner.__qualname__:  # not that of the order
            computed.append(program._batches)
        return call(program, *args)

    monkeypatch.setattr(Program, "__call__", counting)
    monkeypatch.setattr(_compute_ahead, "PATIENCE", 2)
    monkeypatch.setattr(_compute_ahead, "AHEAD", count)
    monkeypatch.setattr(_compute_ahead, "AHEAD_COMPILE", 1e9)
    stage = Count()
    for _, batch in zip(range(200), pipeline([stage], length=800, batch_size=2), strict=False):
        assert len(batch["id"]) == 2
        stage.seen[...] = 0
    assert sum(computed) < 1.5 * 200


@pytest.mark.internal
@pytest.mark.parametrize("devices, beside", [(1, True), (2, False)])
# Of the last, four of eight are lost with every change, and one is computed to see what it is.
@pytest.mark.parametrize("sides, every, most", [(2, 1, 1.3), (8, 2, 1.3), (2, 8, 1.51)])
def test_nor_does_who_has_batches_computed_side_by_side(
    monkeypatch, sides, every, most, devices, beside
):
    computed, call = [], _compute_ahead.call

    def counting(pipeline, binding, cut, count, asked, side, args):
        computed.append((count, side))
        return call(pipeline, binding, cut, count, asked, side, args)

    monkeypatch.setattr(_compute_ahead, "call", counting)
    monkeypatch.setattr(jax, "local_device_count", lambda: devices)
    with ahead(8, sides):
        stream = pipeline([words_beside, Affine(1, 0)], length=800, batch_size=2, seed=1)
        for i, _ in zip(range(200), stream, strict=False):
            if i % every == 0:
                stream.nodes["Affine"].a[...] = i
    assert sum(count for count, _ in computed) < most * 200
    assert any(side is not None for _, side in computed) == beside


@pytest.mark.internal
def test_batches_that_call_the_host_are_not_computed_ahead():
    reads = []

    def read(batch):
        def log(numbers):
            reads.append(np.asarray(numbers).tolist())
            return np.asarray(numbers)

        result = jax.ShapeDtypeStruct(batch["id"].shape, batch["id"].dtype)
        return {**batch, "id": jax.pure_callback(log, result, batch["id"])}

    stream = pipeline([read], length=12, batch_size=2)
    with ahead(3):
        for i, batch in enumerate(stream):
            batch["id"].block_until_ready()
            assert len(reads) == i + 1


# Threads.


def in_threads(work, count=4):
    """What `count` threads get that all start at once."""
    barrier, results, errors = threading.Barrier(count), [], []

    def run():
        try:
            barrier.wait()
            results.append(list(work()))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    return [batch for result in results for batch in result]


@pytest.mark.spec("ITER-013", "ITER-008")
@pytest.mark.parametrize("batches_ahead", [1, 3])
@pytest.mark.parametrize("last_batch", ["keep", "pad"])
def test_threads_with_an_iterator_each_receive_every_batch_once(last_batch, batches_ahead):
    stream = pipeline([Count(), jitter()], length=129, batch_size=2, seed=0, last_batch=last_batch)
    expected = rows(pipeline([jitter()], length=129, batch_size=129, seed=0))
    loops = [iter(stream) for _ in range(4)]
    with ahead(batches_ahead):
        batches = in_threads(lambda: loops.pop())
    assert len(batches) == 65
    by_number = sorted(batches, key=lambda batch: int(batch["count"][0]))
    assert [int(batch["count"][0]) for batch in by_number] == list(range(1, 66))
    got = rows(by_number)
    assert_same({k: got[k] for k in ("id", "x")}, expected)
    assert stream.cursor == (1, 0)


@pytest.mark.spec("ITER-013")
def test_threads_that_share_one_iterator_receive_every_batch_once():
    stream = pipeline(length=129, batch_size=2, seed=0)
    loop = iter(stream)
    with ahead(3):
        batches = in_threads(lambda: loop)
    assert sorted(ids(batches)) == list(range(129))


@pytest.mark.spec("ITER-013")
def test_threads_that_step_receive_every_batch_once():
    stream = pipeline(length=64, batch_size=2)
    batches = in_threads(lambda: by_step(stream, 16))
    assert sorted(ids(batches)) == sorted([*range(64), *range(64)])
    assert stream.cursor == (2, 0)


@pytest.mark.spec("ITER-013")
def test_threads_in_all_modes_receive_every_batch_once():
    stream = pipeline(length=60, batch_size=2)
    loops = [iter(stream), iter(stream)]
    modes = [
        lambda: itertools.islice(loops.pop(), 6),
        lambda: itertools.islice(loops.pop(), 6),
        lambda: by_step(stream, 9),
        lambda: by_scan(stream, 9),
    ]
    with ahead(3):
        batches = in_threads(lambda: modes.pop()())
    assert sorted(ids(batches)) == list(range(60))


@pytest.mark.internal
def test_threads_that_come_first_at_once_meet_one_lock(monkeypatch):
    created = _runtime.Runtime.__init__

    def slowly(self):
        time.sleep(0.05)
        created(self)

    stream = pipeline(length=64, batch_size=2)
    monkeypatch.setattr(_runtime.Runtime, "__init__", slowly)
    batches = in_threads(lambda: by_step(stream, 8))
    assert sorted(ids(batches)) == list(range(64))


def wait_for_the_end_of(reads):
    give_up = time.monotonic() + 30
    while any(read() for read in reads):  # a thread may still be at its last read
        assert time.monotonic() < give_up
        gc.collect()


@pytest.mark.internal
def test_who_changes_the_cut_keeps_nothing_of_what_read_for_the_old_one():
    stream = pipeline(source=RandomAccessSource(RandomAccessSourceConfig(), columns(64)["x"]))
    reads = []
    for size in (2, 4, 8):
        stream.batch_size = size
        stream.step()
        reads.append(weakref.ref(stream._runtime.reads.ahead))
    wait_for_the_end_of(reads[:2])
    assert reads[2]() is not None


@pytest.mark.internal
def test_who_takes_a_source_in_memory_instead_keeps_nothing_of_what_read_the_old_one():
    stream = pipeline(source=RandomAccessSource(RandomAccessSourceConfig(), columns(64)["x"]))
    stream.step()
    read = weakref.ref(stream._runtime.reads.ahead)
    stream.source = MemorySource(MemorySourceConfig(), columns(64))
    assert list(stream.step())
    wait_for_the_end_of([read])


@pytest.mark.spec("ITER-013")
def test_a_stage_that_is_refused_is_seen_by_no_other_thread():
    stream, reached = pipeline([double], length=8), threading.Event()

    def replace():
        reached.set()
        with pytest.raises(ValueError, match="Stage 'double' failed"):
            stream.nodes["double"] = lambda batch: None

    with stream._runtime.lock:  # as a thread has it that makes a batch
        thread = threading.Thread(target=replace)
        thread.start()
        reached.wait()
        thread.join(0.1)
        assert stream.nodes["double"] is double
    thread.join()


def in_fours(batch):
    return {"id": batch["id"].reshape(-1, 4).repeat(4, axis=0)}


@pytest.mark.spec("ITER-002")
def test_a_loop_warns_when_it_begins_of_a_last_batch_that_will_fail():
    pipeline = Pipeline(source=Numbers(18), stages=[in_fours], batch_size=8)
    with pytest.warns(
        UserWarning,
        match=r"(?s)last batch of this loop will have 2 rows, not 8, and will fail: Stage "
        r"'in_fours' failed.*any number of rows, or build the pipeline with last_batch=\"drop\"",
    ):
        batches = iter(pipeline)
    assert len(next(batches)["id"]) == len(next(batches)["id"]) == 8
    with pytest.raises(StageError, match="in_fours"):
        next(batches)
    assert pipeline.cursor == (0, 16)


@pytest.mark.spec("ITER-002")
def test_a_loop_warns_of_nothing_else():
    def taken(length, last_batch="keep", stages=(in_fours,), start=0):
        pipeline = Pipeline(
            source=Numbers(length), stages=stages, batch_size=8, last_batch=last_batch
        )
        pipeline.seek(epoch=0, offset=start)
        return iter(pipeline)

    taken(16), taken(18, "drop"), taken(18, "pad"), taken(18, stages=[])  # with errors for warnings
    taken(18, start=10), taken(20), taken(2 + 16, start=2)
    with pytest.warns(UserWarning):
        batches = taken(18)
    iter(batches._pipeline)  # once is enough
