"""What is read ahead, and the order of it."""

import collections
import dataclasses
import gc
import itertools
import os
import queue
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from helpers import MODES

from datarax import Pipeline
from datarax.errors import ReadError
from datarax.pipeline import _compute_ahead, _read_ahead, _scan
from datarax.pipeline._threads import Outcome
from datarax.sources import (
    HostSource,
    HostSourceConfig,
    IterableSource,
    IterableSourceConfig,
    MemorySource,
    MemorySourceConfig,
    RandomAccessSource,
    RandomAccessSourceConfig,
    Reader,
)

LEFT_EARLY = """
import sys, time
import numpy as np
from datarax import Pipeline
from datarax.sources import RandomAccessSource, RandomAccessSourceConfig

class Slow:
    def __len__(self):
        return 1000

    def __getitem__(self, record):
        time.sleep(0.05)
        print("ending" if ENDING else "reading", flush=True)
        return np.int32(record)

ENDING = False
source = RandomAccessSource(RandomAccessSourceConfig(), Slow())
stream = Pipeline(source=source, batch_size=1)
for batch in stream:
    break
ENDING = True
"""


@pytest.mark.internal
def test_a_program_ends_without_what_was_to_be_read_ahead():
    # A batch takes longer than any wait, but for the first.
    code = LEFT_EARLY.replace("batch_size=1", "batch_size=100")
    code = code.replace("time.sleep(0.05)", "time.sleep(0.05 * (record > 99))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stderr == ""
    assert out.stdout.startswith("reading")
    # Each of the two threads comes to the end of the record that it is at.
    assert out.stdout.count("ending") <= 2


@dataclasses.dataclass(frozen=True, eq=False)
class Sizes(Reader):
    """Notes how many records are read together."""

    asked: list[int]

    @property
    def stored_spec(self):
        return {"data": jax.ShapeDtypeStruct((), np.dtype(np.int32))}

    def __len__(self):
        return 400

    def read(self, records):
        self.asked.append(len(records))
        return {"data": records.astype(np.int32)}


@pytest.mark.internal
@pytest.mark.parametrize("seconds, together", [(1e9, 8), (0.0, 1)], ids=["fast", "slow"])
def test_several_batches_are_read_together_only_if_none_of_them_waits_for_long(
    seconds, together, monkeypatch
):
    monkeypatch.setattr(_read_ahead, "CHUNK_SECONDS", seconds)
    reader = Sizes([])
    stream = Pipeline(source=HostSource(reader, HostSourceConfig()), batch_size=5)
    assert np.ravel([batch["data"] for batch in stream]).tolist() == [*range(400)]
    assert max(reader.asked) == 5 * together


@pytest.mark.internal
@pytest.mark.parametrize("seconds", [1e9, 0.0], ids=["fast", "slow"])
def test_as_many_batches_are_read_ahead_whatever_is_read_together(seconds, monkeypatch):
    monkeypatch.setattr(_read_ahead, "CHUNK_SECONDS", seconds)
    reader = Sizes([])
    stream = Pipeline(source=HostSource(reader, HostSourceConfig()), batch_size=2)
    for _ in range(3):
        stream.step()
    until, ahead = time.monotonic() + 20, 6 * _read_ahead.CHUNK_BATCHES
    while sum(reader.asked) < 2 * ahead and time.monotonic() < until:
        time.sleep(0.01)
    assert sum(reader.asked) >= 2 * ahead


@pytest.mark.internal
def test_after_a_pause_batches_are_read_together_again(monkeypatch):
    monkeypatch.setattr(_read_ahead, "CHUNK_SECONDS", 0.1)

    def records():
        for i in range(1000):
            if i == 10:
                time.sleep(0.5)
            yield np.int32(i)

    stream = Pipeline(source=IterableSource(IterableSourceConfig(), records), batch_size=5)
    counts = []
    for _ in stream:
        ahead = stream._runtime.reads.ahead
        counts.append(ahead._queue[-1].count)  # of what was asked for last
    slow = [i for i, count in enumerate(counts) if i > 2 and count == 1]
    assert slow and _read_ahead.CHUNK_BATCHES in counts[slow[0] :]


def staged(batch):
    return {"data": batch["data"] * 2 // 2}


@pytest.mark.spec("SRC-027")
@pytest.mark.parametrize("stages", [[], [staged]], ids=["bare", "staged"])
@pytest.mark.parametrize("pause", [4, 8, 40, 100])
def test_a_batch_does_not_wait_for_what_a_stream_gives_after_it(pause, stages):
    go_on = threading.Event()

    def records():
        for i in range(160):
            if i == pause:
                go_on.wait(60)
            yield np.int32(i)

    source = IterableSource(IterableSourceConfig(), records)
    stream = Pipeline(source=source, stages=stages, batch_size=4)
    batches = iter(stream)
    found = [next(batches)["data"].tolist() for _ in range(pause // 4)]
    assert not go_on.is_set()
    go_on.set()
    found += [batch["data"].tolist() for batch in batches]
    assert found == np.arange(160).reshape(40, 4).tolist()


@pytest.mark.spec("SRC-027")
@pytest.mark.parametrize("mode", ["for", "step"])
def test_a_stream_may_wait_for_what_the_loop_makes_of_its_last_batch(mode):
    made = queue.SimpleQueue()

    def records():
        while True:
            yield from np.repeat(made.get(timeout=60), 4)

    source = IterableSource(IterableSourceConfig(), records)
    made.put(np.int32(0))
    stream = Pipeline(source=source, batch_size=4)
    batches = iter(stream) if mode == "for" else iter(stream.step, None)
    for i in range(50):
        assert next(batches)["data"].tolist() == [i] * 4
        made.put(np.int32(i + 1))


@pytest.mark.internal
def test_who_reads_on_after_the_end_of_a_program_gets_an_error():
    late = """
import atexit

def read_on():
    try:
        for batch in stream:
            pass
    except RuntimeError as error:
        print(error)

atexit.register(read_on)
"""
    code = late + LEFT_EARLY.replace("print(", "(lambda *_, **__: None)(")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert out.stdout == "The program is ending, and no rows are read any more.\n", out.stderr


@pytest.mark.internal
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
def test_a_forked_process_gets_an_error_and_does_not_wait_for_threads_that_it_has_not():
    fork = """
import os, signal, warnings

warnings.simplefilter("ignore")  # JAX warns of the fork
child = os.fork()
if not child:
    signal.alarm(30)
    try:
        for batch in stream:
            pass
    except RuntimeError as error:
        print(error, flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    code = LEFT_EARLY.replace("print(", "(lambda *_, **__: None)(") + fork
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert out.stdout == (
        "This process was forked from the one that reads the rows, and has none of its threads. "
        "Build the pipeline in the process that uses it, and start that one with the method "
        "'spawn', as JAX needs it.\n"
    ), out.stderr


@pytest.mark.internal
def test_a_thread_of_the_users_comes_to_the_end_of_its_scan():
    scan = (
        LEFT_EARLY[: LEFT_EARLY.index("for batch")]
        + """
import threading

def scan():
    print(stream.scan(lambda batch: batch["data"][0], 4))

threading.Thread(target=scan).start()
"""
    )
    code = scan.replace("batch_size=1)", "batch_size=1, num_threads=1)")
    code = code.replace('"ending" if ENDING else "reading"', '"reading"')
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert out.stderr == ""
    assert "[0 1 2 3]" in out.stdout.splitlines()


BLOCKED = """
import signal, sys, threading
import numpy as np
from datarax import Pipeline
from datarax.sources import IterableSource, IterableSourceConfig

def rows():
    yield {"x": np.int32(1)}
    yield {"x": np.int32(2)}
    print("blocked", flush=True)
    blocked.set()
    threading.Event().wait()

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
blocked = threading.Event()
source = IterableSource(IterableSourceConfig(), rows)
stream = Pipeline(source=source, batch_size=1)
for batch in stream:
    print(batch["x"], flush=True)
    if sys.argv[1] == "left":
        blocked.wait()
        break
"""


@pytest.mark.internal
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("how", ["left", "interrupted"])
def test_a_stream_that_blocks_keeps_no_program_from_ending(how):
    command = [sys.executable, "-c", BLOCKED, how]
    program = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert program.stdout is not None
    try:
        # JAX is ready only after the first batch: until then an interrupt may be lost in it.
        said = ""
        for line in program.stdout:  # in which the words of two threads may stand
            said += line
            if "blocked" in said and "[1]" in said:
                break
        else:
            raise AssertionError(program.communicate()[1])
        if how == "interrupted":
            time.sleep(0.5)
            program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=60)
    finally:
        program.kill()
        program.communicate()
    if how == "left":
        assert (program.returncode, errors) == (0, "")
    else:
        assert program.returncode != 0
        assert errors.rstrip().endswith("KeyboardInterrupt")
        assert errors.count("Traceback") == 1


@pytest.mark.spec("SRC-030")
def test_a_small_source_is_read_no_further_than_the_next_epoch():
    reads = collections.Counter()

    class Seen:
        def __len__(self):
            return 20

        def __getitem__(self, i):
            reads[i] += 1
            return {"id": np.int32(i)}

    pipeline = Pipeline(source=RandomAccessSource(RandomAccessSourceConfig(), Seen()), batch_size=5)
    for _ in range(2):
        assert [*pipeline][-1]["id"].tolist() == [15, 16, 17, 18, 19]
        time.sleep(0.5)
    # Two epochs and the next; and the first record, to see what it looks like.
    assert sum(reads.values()) == 3 * 20 + 1


@pytest.mark.internal
def test_the_threads_of_a_pipeline_that_is_gone_end():
    def running():
        return {x for x in threading.enumerate() if x.name.startswith("datarax-read")}

    before = running()
    pipeline = pipeline_over(Watched())
    next(iter(pipeline))
    mine = running() - before
    assert len(mine) == 2
    del pipeline
    gc.collect()
    for thread in mine:
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(params=["patient", "hurried"])
def patience(request, monkeypatch):
    """How long the consumer waits for a whole chunk of a stream: as ever, or not at all. Then it
    has all batches of a chunk before it learns that there are no more."""
    if request.param == "hurried":
        wait, tell = Outcome.wait_for_part, Outcome.tell
        monkeypatch.setattr(Outcome, "wait_for_part", lambda self, known, _: wait(self, known, 0.0))
        late = lambda *args, **kwargs: time.sleep(0.005) or tell(*args, **kwargs)  # noqa: E731
        monkeypatch.setattr(Outcome, "tell", late)


@pytest.mark.internal
@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("last_batch", ["keep", "drop", "pad"])
@pytest.mark.parametrize("streams", [False, True])
def test_what_was_read_for_a_loop_serves_a_step_within_it_and_the_other_way_round(
    streams, last_batch
):
    reads = collections.Counter()

    def record(i):
        reads[i] += 1
        return {"id": np.int32(i)}

    class Records:
        def __len__(self):
            return 1602

        def __getitem__(self, i):
            return record(i)

    source = (
        IterableSource(IterableSourceConfig(), lambda: map(record, range(1602)))
        if streams
        else RandomAccessSource(RandomAccessSourceConfig(), Records())
    )
    stream = Pipeline(source=source, batch_size=4, last_batch=last_batch)
    found = []
    for batch in stream:
        found += batch["id"].tolist() + stream.step()["id"].tolist()
        if len(found) == 800:  # no reader is in the next epoch yet
            break
    assert found == [*range(800)]
    assert {reads[i] for i in range(4, 800)} == {1}  # the first shows what records are


@pytest.mark.spec("ITER-002", "STEP-003", "SRC-027")
@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("loops", [0, 3])
def test_what_was_cut_for_a_loop_is_cut_anew_for_a_step_and_the_other_way_round(
    streams, steps, loops
):
    records = [{"id": np.int32(i)} for i in range(10)]
    source = (
        IterableSource(IterableSourceConfig(), records)
        if streams
        else RandomAccessSource(RandomAccessSourceConfig(), records)
    )
    stream = Pipeline(source=source, batch_size=4)
    short = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    for _ in range(loops):
        assert [x["id"].tolist() for x in stream] == short
    whole = [[*range(4 * i, 4 * i + 4)] for i in range(5)]
    found = [stream.step()["id"].tolist() for _ in range(steps)]
    assert found == [[i % 10 for i in ids] for ids in whole[:steps]]
    rest = [x["id"].tolist() for x in stream]
    assert rest == [short[steps:], short[steps:], [[2, 3, 4, 5], [6, 7, 8, 9]]][steps - 1]


INTERRUPTED = """
import _thread, faulthandler, signal, sys, threading
import numpy as np
from datarax import Pipeline
from datarax.sources import RandomAccessSource, RandomAccessSourceConfig

faulthandler.dump_traceback_later(100, exit=True)
mode, wanted = sys.argv[1], int(sys.argv[2])
source = RandomAccessSource(RandomAccessSourceConfig(), list(np.arange(64)))
stream = Pipeline(source=source, batch_size=1)
calm, armed, interrupts = threading.Event(), False, 0

def interrupt(*_):
    global armed
    if armed:
        armed = False
        raise KeyboardInterrupt

def disturb():
    while not calm.wait(0.003):
        _thread.interrupt_main()

def first(batch):
    return batch["data"]

def use():
    if mode == "for":
        return [int(batch["data"][0]) for batch in stream]
    return np.ravel(stream.scan(first, 64)).tolist()

assert use() == [*range(64)]
signal.signal(signal.SIGINT, interrupt)
disturber = threading.Thread(target=disturb)
disturber.start()
while interrupts < wanted:
    try:
        armed = True
        use()
        armed = False
    except KeyboardInterrupt:
        interrupts += 1
calm.set()
disturber.join()
stream.seek(epoch=5)
assert use() == [*range(64)]
print("all there")
"""


@pytest.mark.spec("SRC-032")
@pytest.mark.parametrize("mode", ["for", "scan"])
def test_interrupts_at_any_moment_lose_nothing(mode):
    command = [sys.executable, "-c", INTERRUPTED, mode, "100"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert out.stdout == "all there\n", out.stderr


@dataclasses.dataclass(frozen=True)
class Watched(Reader):
    """Rows that take a moment, and who read them."""

    seconds: dict = dataclasses.field(default_factory=dict, compare=False)
    first: list = dataclasses.field(default_factory=list, compare=False)
    threads: list = dataclasses.field(default_factory=list, compare=False)
    at_once: list = dataclasses.field(default_factory=list, compare=False)
    reading: list = dataclasses.field(default_factory=list, compare=False)
    fails: list = dataclasses.field(default_factory=list, compare=False)
    failed: list = dataclasses.field(default_factory=list, compare=False)

    only_copies = True

    def __len__(self):
        return 64

    @property
    def stored_spec(self):
        return {"id": jax.ShapeDtypeStruct((), np.dtype(np.uint32))}

    def read(self, records):
        me = threading.get_ident()
        self.first.append(int(records[0]))
        self.threads.append(me)
        self.reading.append(int(records[0]))
        self.at_once.append(len(self.reading))
        time.sleep(self.seconds.get(int(records[0]), 0.01))
        self.reading.remove(int(records[0]))
        if self.fails and me == MAIN:
            self.failed.append(int(records[0]))
            raise self.fails[0]
        return {"id": records.astype(np.uint32)}


MAIN = threading.get_ident()


def pipeline_over(reader, threads=2):
    source = HostSource(reader, HostSourceConfig(shuffle=False))
    return Pipeline(source=source, batch_size=1, num_threads=threads)


def ids(batches):
    return [int(batch["id"][0]) for batch in batches]


def by_scan(pipeline):
    return np.ravel(pipeline.scan(lambda batch: batch["id"])).tolist()


@pytest.mark.spec("SRC-030")
@pytest.mark.parametrize("mode", [ids, by_scan])
@pytest.mark.parametrize("processors", [1, 2, 3])
def test_who_waits_reads_where_threads_have_no_processor_left(processors, mode, monkeypatch):
    monkeypatch.setattr(_read_ahead, "processors", lambda: processors)
    monkeypatch.setattr(
        _read_ahead, "RESERVED", 0.1
    )  # a slow machine may be away for some milliseconds
    reader = Watched()
    pipeline = pipeline_over(reader)
    reader.threads.clear()
    shares = []
    while not shares or (max(shares) <= 1 / 4 and len(shares) < 5):  # a busy machine may take more
        reader.at_once.clear()
        assert [*mode(pipeline), *mode(pipeline), *mode(pipeline)] == [*range(64)] * 3
        assert max(reader.at_once) <= 2  # as many as the user allows
        shares.append(reader.at_once.count(2) / len(reader.at_once))
    assert max(shares) > 1 / 4  # of two in turns, it is every other
    assert (MAIN in reader.threads) == (processors < 3)


@pytest.mark.spec("SRC-030")
def test_what_does_more_than_to_copy_is_read_by_threads_alone(monkeypatch):
    monkeypatch.setattr(_read_ahead, "processors", lambda: 1)
    monkeypatch.setattr(_read_ahead, "RESERVED", 0.1)
    reader = type("Decoder", (Watched,), {"only_copies": False})()
    pipeline = pipeline_over(reader)
    reader.threads.clear()
    assert ids(pipeline) + ids(pipeline) == [*range(64)] * 2
    assert MAIN not in reader.threads
    assert max(reader.at_once) == 2


@pytest.mark.spec("SRC-030")
def test_a_single_thread_reads_alone(monkeypatch):
    monkeypatch.setattr(_read_ahead, "processors", lambda: 1)
    reader = Watched()
    pipeline = pipeline_over(reader, threads=1)
    reader.threads.clear()
    assert ids(pipeline) == [*range(64)]
    assert MAIN not in reader.threads
    assert max(reader.at_once) == 1


@pytest.mark.internal
def test_a_thread_that_made_way_reads_on_while_nobody_waits(monkeypatch):
    monkeypatch.setattr(_read_ahead, "processors", lambda: 1)
    monkeypatch.setattr(_read_ahead, "RESERVED", 0.1)
    monkeypatch.setattr(_read_ahead, "CHUNK_BATCHES", 1)
    reader = Watched()
    batches = iter(pipeline_over(reader))
    assert ids(itertools.islice(batches, 8)) == [*range(8)]
    assert MAIN in reader.threads
    before = len(reader.threads)
    for _ in range(3):
        time.sleep(0.3)
        ids(itertools.islice(batches, 4))
    assert 2 in reader.at_once[before:]
    assert MAIN not in reader.threads[before:]


@pytest.mark.spec("SRC-030")
def test_a_seek_spares_the_reads_that_nobody_has_begun(monkeypatch):
    monkeypatch.setattr(_read_ahead, "CHUNK_BATCHES", 1)
    reader = Watched()
    pipeline = pipeline_over(reader, threads=1)
    assert ids([next(iter(pipeline))]) == [0]
    pipeline.seek(epoch=0, offset=40)
    assert ids([next(iter(pipeline))]) == [40]
    assert reader.first.index(40) <= 2


@pytest.mark.spec("SRC-030")
@pytest.mark.parametrize("mode", [ids, by_scan])
def test_all_threads_read_in_every_mode(mode, monkeypatch):
    monkeypatch.setattr(
        _read_ahead, "processors", lambda: 99
    )  # so that who waits leaves it to them
    monkeypatch.setattr(_read_ahead, "CHUNK_SECONDS", 0.0)
    reader = Watched(seconds=dict.fromkeys(range(64), 0.1))
    assert mode(pipeline_over(reader, threads=12)) == list(range(64))
    assert 8 <= max(reader.at_once) <= 12


@pytest.mark.spec("SRC-032")
def test_a_scan_that_fails_spares_the_reads_that_nobody_has_begun():
    reader = Watched(seconds={8: 0.2, 16: 0.2, 24: 0.2})
    pipeline = pipeline_over(reader, threads=1)

    def step(batch):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as kept:
        pipeline.scan(step)
    begun = len(reader.first)
    time.sleep(0.5)
    assert len(reader.first) <= begun + 1
    assert ids(pipeline) == [*range(64)]
    del kept  # with its traceback, and all that is on the stack there


@pytest.mark.internal
def test_what_is_waited_for_is_not_left_to_a_thread_that_is_busy(monkeypatch):
    monkeypatch.setattr(_read_ahead, "processors", lambda: 1)
    monkeypatch.setattr(_read_ahead, "CHUNK_BATCHES", 1)
    reader = Watched(seconds={1: 0.1, 2: 2.0})
    pipeline = pipeline_over(reader)
    assert ids([next(iter(pipeline))]) == [0]
    time.sleep(0.05)  # both threads are at work on what the seek makes useless
    pipeline.seek(epoch=0, offset=40)
    assert ids([next(iter(pipeline))]) == [40]
    assert 2 in reader.reading


@pytest.mark.spec("SRC-032")
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no such row")])
def test_a_read_that_fails_where_it_is_waited_for_loses_nothing(error, monkeypatch):
    monkeypatch.setattr(_read_ahead, "processors", lambda: 1)
    monkeypatch.setattr(_read_ahead, "RESERVED", 0.1)
    monkeypatch.setattr(_read_ahead, "CHUNK_BATCHES", 1)
    reader = Watched(fails=[error])
    pipeline = pipeline_over(reader)
    found = []
    while len(found) < 2 * 64:
        try:
            for batch in pipeline:
                found += ids([batch])
        except ReadError:
            assert len(found) % 64 == reader.failed[0]  # it fails its own batch and no earlier one
            reader.fails.clear()
        except KeyboardInterrupt:
            reader.fails.clear()
    assert found == [*range(64)] * 2
    assert reader.failed


@pytest.mark.spec("SRC-032")
def test_what_an_interrupt_has_left_unread_is_read_when_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(_read_ahead, "processors", lambda: 1)
    monkeypatch.setattr(_read_ahead, "RESERVED", 0.1)
    monkeypatch.setattr(_read_ahead, "CHUNK_BATCHES", 1)
    reader = Watched(fails=[KeyboardInterrupt()])
    pipeline = pipeline_over(reader)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(3):
            ids(pipeline)
    reader.fails.clear()
    pipeline.seek(epoch=0, offset=reader.failed[0])
    assert ids(pipeline) == [*range(reader.failed[0], 64)]


@pytest.mark.internal("buffers that are used again are read into faster outside malloc's heap")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["host", "memory"])
def test_memory_is_kept_for_data_in_memory_alone(where, mode, monkeypatch):
    asked = []
    for module in (_compute_ahead, _scan):
        monkeypatch.setattr(module, "keep_memory", lambda: asked.append(mode))
    if where == "host":
        source = RandomAccessSource(RandomAccessSourceConfig(), list(np.arange(12)))
    else:
        source = MemorySource(MemorySourceConfig(), np.arange(12))
    stream = Pipeline(source=source, stages=[lambda batch: batch], batch_size=4)
    MODES[mode](stream, 3)
    assert bool(asked) == (where == "memory")
