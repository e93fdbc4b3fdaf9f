"""What a live pipeline knows of itself holds whenever a program is interrupted."""

import linecache
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import ahead, ids

from datarax import Pipeline
from datarax.pipeline import _iterator, _read_ahead, _runtime, _scan
from datarax.sources import (
    MemorySource,
    MemorySourceConfig,
    RandomAccessSource,
    RandomAccessSourceConfig,
)

SIZE, LENGTH = 4, 62  # with a shorter batch at the end of an epoch


class Counted(nnx.Module):
    """Counts its batches, and gives with each record the count and a parameter."""

    def __init__(self):
        self.n, self.w = nnx.Variable(jnp.int32(0)), nnx.Param(jnp.int32(0))

    def __call__(self, batch):
        self.n[...] += 1
        one = jnp.ones_like(batch["id"])
        return {**batch, "n": self.n[...] * one, "w": self.w[...] * one}


def in_memory():
    return MemorySource(MemorySourceConfig(), {"id": np.arange(LENGTH, dtype=np.int32)})


def on_host():
    records = [{"id": np.int32(i)} for i in range(LENGTH)]
    return RandomAccessSource(RandomAccessSourceConfig(), records)


def traced(modules, at_line, call):
    """`call()`, and before each line that it runs of the modules `at_line(code, number)`."""
    files = {module.__file__ for module in modules}

    def trace(frame, event, arg):
        if event == "line":
            at_line(frame.f_code, frame.f_lineno)
        return trace

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: trace if frame.f_code.co_filename in files else None)
    try:
        call()
    finally:
        sys.settrace(before)


def lines(modules, call):
    """Every line that `call()` runs of the modules, where a signal can come.

    That is not before a `with`: Python takes none between the two halves of entering it, nor before
    it is left, though it tells a tracer there.
    """
    found = {}
    traced(modules, lambda *line: found.setdefault(line), call)
    return [
        (code, n)
        for code, n in found
        if not linecache.getline(code.co_filename, n).lstrip().startswith("with ")
    ]


def interrupted(modules, line, call):
    """Whether an interrupt came before that line: a thread may be faster than it was."""

    def at_line(*here):
        if here == line:
            sys.settrace(None)
            raise KeyboardInterrupt

    try:
        traced(modules, at_line, call)
    except KeyboardInterrupt:
        return True
    return False


def id_of(batch):
    return batch["id"]


def by_scan(stream, stage):
    return lambda: stream.scan(id_of, 3)


def by_seek(stream, stage):
    return lambda: stream.seek(epoch=0, offset=9 * SIZE)


def by_step(stream, stage):
    return stream.step


def by_step_with_another_value(stream, stage):
    stage.w[...] += 1
    return stream.step


def by_for(stream, stage):
    return lambda: [*zip(range(2), stream, strict=False)]


def by_the_end_of_an_epoch(stream, stage):
    return lambda: [*stream]


def by_next_after_a_step(stream, stage):
    """At the end of an epoch they cut otherwise."""
    stream.seek(epoch=0, offset=LENGTH - 2)
    stream.step()
    stream.seek(epoch=0, offset=LENGTH - 2)
    return lambda: next(iter(stream))


WAYS = [
    by_scan,
    by_seek,
    by_step,
    by_step_with_another_value,
    by_for,
    by_the_end_of_an_epoch,
    by_next_after_a_step,
]


@pytest.mark.spec("STEP-003", "STEP-017")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "source, modules", [(in_memory, (_iterator, _runtime, _scan)), (on_host, (_read_ahead,))]
)
def test_after_an_interrupt_before_any_line_a_stream_goes_on_from_its_cursor(source, modules, way):
    def begun():
        stage = Counted()
        stream = Pipeline(source=source, stages=[stage], batch_size=SIZE)
        start = 11 * SIZE if way is by_the_end_of_an_epoch else 3 * SIZE
        stream.seek(epoch=0, offset=start)
        stage.n[...] = jnp.int32(start // SIZE)
        for _ in range(2):  # and others are ready
            stream.step()
        return stream, stage, way(stream, stage)

    source = source()
    with ahead(4):
        begun()[-1]()  # so that nothing is compiled any more
        for line in lines(modules, begun()[-1]):
            stream, stage, call = begun()
            if not interrupted(modules, line, call):
                continue
            epoch, offset = stream.cursor
            batch = stream.step()
            assert ids([batch]) == [(offset + i) % LENGTH for i in range(SIZE)], line
            assert batch["w"].tolist() == [int(stage.w[...])] * SIZE, line
            assert stream.cursor == divmod(epoch * LENGTH + offset + SIZE, LENGTH), line
            if way not in (by_seek, by_next_after_a_step) and offset % SIZE == 0 == epoch:
                assert batch["n"].tolist() == [1 + offset // SIZE] * SIZE, line
