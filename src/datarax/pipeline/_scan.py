"""`scan`: many batches in one compiled loop."""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from .._host_memory import keep_memory
from .._order import word
from .._rows import Cut, check_counted, pack, running_on, start_after
from .._types import Cursor, integer, is_traced
from ..errors import CapturedError, LastBatchError, ScanLengthError
from ..sources._base import Fetched, length_of
from ..sources._iterable import StreamSource
from ._binding import Binding, ById, Changes, has_tracer, types_of
from ._blame import blame, by_hand
from ._captured import blamed
from ._core import cutting, max_errors
from ._feed import Feed, stack_counts
from ._meter import Bar
from ._program import Loop, scan_program

if TYPE_CHECKING:
    from ._pipeline import Pipeline


def scan(
    pipeline: "Pipeline",
    step_fn: Callable[..., Any],
    length: int | None,
    modules: Sequence[Any],
    init_carry: Any,
    unroll: int,
    fetch: int | None,
) -> Any:
    """See `Pipeline.scan`."""
    for name, value in (("unroll", unroll), ("fetch", 1 if fetch is None else fetch)):
        if integer(value, 0) < 1:
            raise ScanLengthError(value, name)
    if not callable(step_fn):
        raise TypeError(f"`step_fn` must be a function, got {type(step_fn).__name__}.")
    runtime, asked, carried = pipeline._runtime, length, init_carry is not None
    with runtime.lock, contextlib.ExitStack() as settings:
        binding = runtime.look(pipeline)
        length = _rest_of_epoch(pipeline) if length is None else integer(length, -1)
        if length < 0:
            raise ScanLengthError(asked)
        if not length:  # of a loop without a turn JAX learns by tracing it alone
            settings.enter_context(jax.disable_jit(False))
            binding = runtime.look(pipeline)
        if not isinstance(modules, Sequence):
            got = type(modules).__name__  # all of a model would fill the screen
            raise TypeError(f"`modules` must be a list or tuple of NNX objects, got {got}.")
        feed = runtime.feed(pipeline)
        values = runtime.values
        if len(modules) > 0:
            binding = runtime.bind(pipeline, tuple(modules))
            values = binding.read()
        end = None if binding.is_cursor_shared else _end(pipeline, length)
        # What was read ahead cannot follow a cursor that `step_fn` moves; a stream has no choice.
        streams = isinstance(pipeline.source, StreamSource)
        reads = streams or (end is not None and length > 0)
        if feed is not None and (not reads or has_tracer([*values, init_carry])):
            feed = None
        try:
            if feed is not None:
                # Where a stream's pass ends shows when it is read: `end` becomes what was reached.
                after, carry, outs, end = _scan_fed(
                    pipeline, feed, binding, _Function(step_fn), length, init_carry, unroll
                )
            else:
                keep_memory()
                known = None if end is None else binding.cursor_index
                cut = running_on(*cutting(pipeline))
                loop = Loop(length, cut, carried, unroll, fetch, known)
                program = scan_program(binding.structure, _Function(step_fn), loop)
                try:
                    after, carry, outs = program(values, init_carry)
                except Exception as error:
                    again = functools.partial(
                        by_hand, runtime.bind(pipeline), cut, runtime.values, None
                    )
                    blame(pipeline, program, error, again)
                    raise
                if known is not None and end is not None:
                    after[known] = pack(end, length_of(pipeline.source))
        except Exception as error:
            if names := blamed(step_fn, error):
                raise CapturedError(names) from error
            if isinstance(error, TypeError):
                _check_carry(init_carry)
            raise
        binding.write(after, values)
        runtime.moved(pipeline, end)
    return (carry, outs) if carried else outs


def _scan_fed(
    pipeline: "Pipeline",
    feed: Feed,
    binding: Binding,
    step_fn: Callable[..., Any],
    length: int,
    carry: Any,
    unroll: int,
) -> tuple[Changes, Any, Any, Cursor]:
    """A scan in compiled chunks, while threads read the rows of the next; as if it were one.

    Nothing is written before the last chunk is through, so an error leaves all as it was.
    """
    runtime, carried = pipeline._runtime, carry is not None
    cut = running_on(*cutting(pipeline))
    if not length:
        assert isinstance(pipeline.source, StreamSource)
        program = scan_program(binding.structure, step_fn, Loop(0, cut, carried, unroll))
        _, carry, outs = program(binding.read(), carry, _no_batches(pipeline.source, cut))
        return {}, carry, outs, runtime.start
    meter, epoch = runtime.meter, runtime.start.epoch
    counts = stack_counts(length, feed.batch_bytes, pipeline.num_threads)
    values, changed, outs, after = binding.read(), {}, [], runtime.start
    bar = Bar(pipeline.progress, length, f"scan from epoch {epoch}")
    stacks = feed.stacks(runtime.start, cut, counts)
    meter.begin()
    try:
        for count in counts:
            started = time.perf_counter()
            stack = next(stacks)
            meter.waited_since(started)
            meter.fail(stack.failures, max_errors(pipeline))
            program = scan_program(binding.structure, step_fn, Loop(count, cut, carried, unroll))
            before = [values, carry]
            try:
                fed = stack.fetched, stack.starts, stack.ends
                new, carry, out = program(values, carry, fed)
                # One chunk is computed while the next is read, and no more than that are alive.
                jax.block_until_ready(before)
            except Exception as error:
                blame(pipeline, program, error, None)
                raise
            for i, value in new.items():
                values[i] = changed[i] = value
            outs.append(out)
            after = stack.after
            meter.lap(count)
            bar.update(count, meter)
        jax.block_until_ready((carry, outs))
    finally:
        stacks.close()  # and not when the last traceback is gone
        meter.end()
        bar.close()
    for ended in range(epoch, after.epoch):
        meter.report(ended)
    whole = _joined(outs) if len(outs) > 1 else outs[0]
    packed = pack(after, length_of(pipeline.source))
    return {**changed, binding.cursor_index: packed}, carry, whole, after


def _no_batches(stream: StreamSource, cut: Cut) -> tuple[Fetched, Cursor, Cursor]:
    """What a scan reads of a stream that is to give none: arrays without a row."""
    cursors = Cursor(*(np.zeros(0, word(1)) for _ in Cursor._fields))
    fetched = jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), stream.blank(cut))
    return fetched, cursors, cursors


@jax.jit  # one operation by one it takes 70 us for each chunk
def _joined(outs: list[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.concatenate(x), *outs)


def _rest_of_epoch(pipeline: "Pipeline") -> int:
    """How many batches are left in the cursor's epoch."""
    records = length_of(pipeline.source)
    if records is None:
        raise LastBatchError(
            "How many batches an epoch of this source has is not known beforehand. Give `length` "
            "to scan(step_fn, length); it goes on into the next epoch."
        )
    cursor = pipeline._runtime.start
    if is_traced(cursor.offset):
        raise TypeError("Inside a traced function scan() needs `length`, a number.")
    rest = records - cursor.offset
    whole, over = divmod(rest, pipeline.batch_size)
    if over and pipeline.last_batch == "keep":
        raise LastBatchError(
            f'Under last_batch="keep" the {rest} records left in the epoch are no whole number of '
            f"batches of {pipeline.batch_size}, and all batches of a scan have one size. Give "
            f"`length` (the scan then runs on into the next epoch), or build the pipeline with "
            f'last_batch="drop" or "pad".'
        )
    return whole + (over > 0 and pipeline.last_batch == "pad")


def _check_carry(carry: Any) -> None:
    """Raises for a carry that JAX cannot carry."""
    for path, x in jax.tree_util.tree_leaves_with_path(carry):
        try:
            jax.typeof(x)
        except TypeError as error:
            which, kind = f"init_carry{jax.tree_util.keystr(path)}", type(x).__name__
            raise TypeError(
                f"`init_carry` holds arrays and numbers, but `{which}` is a {kind}. Of an Equinox "
                "module carry the arrays, `arrays, rest = eqx.partition(module, eqx.is_array)`, "
                "and put it together in the function: `eqx.combine(arrays, rest)`."
            ) from error


class _Function:
    """A function of a scan as a key: known by itself, or by its value if that is all it holds."""

    def __init__(self, function: Callable[..., Any]):
        self.__wrapped__, self._types = function, types_of(function)
        try:
            self._hash = hash(function)
        except TypeError:
            self._types, self._hash = ById(function), id(function)

    def __call__(self, *args: Any) -> Any:
        return self.__wrapped__(*args)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Function) or self._types != other._types:
            return False
        return isinstance(self._types, ById) or self.__wrapped__ == other.__wrapped__


def _end(pipeline: "Pipeline", length: int) -> Cursor | None:
    """Where a scan ends that nothing else moves; None if the user is tracing where it starts.

    Raises before a scan that would pass the last place that a cursor can count.
    """
    start = pipeline._runtime.start
    if is_traced(start.epoch):
        return None
    size, records, last_batch = cutting(pipeline)
    end = start_after(start, size, length, records, last_batch)
    check_counted(end, records)
    return end
