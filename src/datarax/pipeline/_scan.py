"""`scan`: many batches in one compiled loop."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .._host_memory import keep_memory
from .._mesh import check_beside
from .._order import word
from .._rows import Cut, check_counted, pack, running_on, start_after, touched
from .._settings import on_cpu
from .._types import Cursor, integer, is_traced, spec_text
from .._variables import iter_graph
from ..errors import CapturedError, LastBatchError, RandomAccessError, ScanLengthError
from ..sources._base import EagerSourceBase, SourceBatch, length_of
from ..sources._iterable import StreamSource
from ._binding import Binding, Changes, Values, changes, has_tracer, is_same, merge, type_change
from ._blame import blame, by_hand
from ._captured import blamed, captured
from ._core import cutting, fetched_from, max_errors, order_at, run_batch, start_of, updated
from ._meter import Bar
from ._program import Program
from ._read_ahead import ReadAhead, stack_counts
from ._stages import NEEDS_VALUES
from ._structure import FunctionKey, Structure, cached_per_structure

if TYPE_CHECKING:
    from ._pipeline import Pipeline


FETCHED_BYTES = 2**18
"""The most bytes of rows that a scan gathers at once for several batches: they stay in the cache of
a CPU until they are used."""

FETCHED_BYTES_ELSEWHERE = 2**24
"""The same on an accelerator, where every iteration of a loop costs microseconds."""

SCANS = 16
"""How many compiled scans are kept for each structure, by function and length."""


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
    function = FunctionKey(step_fn)
    with runtime.lock, contextlib.ExitStack() as settings:
        binding = runtime.look(pipeline)
        length = _rest_of_epoch(pipeline) if length is None else integer(length, -1)
        if length < 0:
            raise ScanLengthError(asked)
        if not length:  # JAX refuses a loop without iterations under `jax.disable_jit`
            settings.enter_context(jax.disable_jit(False))
        if not isinstance(modules, Sequence):
            got = type(modules).__name__  # all of a model would fill the screen
            raise TypeError(f"`modules` must be a list or tuple of NNX objects, got {got}.")
        read_ahead = runtime.read_ahead(pipeline)
        if len(modules) > 0:
            binding = runtime.bind(pipeline, tuple(modules))
        values = binding.read()
        end = None if binding.is_cursor_shared else _end(pipeline, length)
        # If `step_fn` may move the cursor, rows cannot be read ahead: callbacks of the program read
        # them. A stream can only be read ahead.
        streams = isinstance(pipeline.source, StreamSource)
        reads = streams or (end is not None and length > 0)
        if read_ahead is not None and (not reads or has_tracer([*values, init_carry])):
            read_ahead = None
        try:
            if read_ahead is not None:
                # Only reading shows where a stream's pass ends, so this computes `end` anew.
                after, carry, outs, end = _scan_in_chunks(
                    pipeline, read_ahead, binding, function, length, init_carry, unroll
                )
            else:
                keep_memory()
                cut = running_on(*cutting(pipeline))
                loop = Loop(length, cut, carried, unroll, fetch)
                program = scan_program(binding.structure, function, loop)
                try:
                    after, carry, outs = program(values, init_carry)
                except Exception as error:
                    again = functools.partial(by_hand, binding, cut, values, None)
                    blame(pipeline, program, error, again)
                    raise
                if end is not None:
                    after[binding.cursor_index] = pack(end, length_of(pipeline.source))
        except Exception as error:
            if names := blamed(step_fn, error):
                raise _refusal(step_fn, names) from error
            if isinstance(error, TypeError):
                _check_carry(init_carry)
            if isinstance(error, ValueError) and pipeline.sharding is not None:
                check_beside(_given(modules, init_carry), pipeline.sharding)
            raise
        binding.write(after, values)
        runtime.moved(pipeline, end)
    return (carry, outs) if carried else outs


def _scan_in_chunks(
    pipeline: "Pipeline",
    read_ahead: ReadAhead,
    binding: Binding,
    function: FunctionKey,
    length: int,
    carry: Any,
    unroll: int,
) -> tuple[Changes, Any, Any, Cursor]:
    """A scan as several compiled chunks, while threads read the rows of the next.

    Nothing is written before the last chunk has run, so an error leaves the pipeline as it was.
    """
    runtime, carried = pipeline._runtime, carry is not None
    cut = running_on(*cutting(pipeline))
    if not length:
        assert isinstance(pipeline.source, StreamSource)
        program = scan_program(binding.structure, function, Loop(0, cut, carried, unroll))
        _, carry, outs = program(binding.read(), carry, _no_batches(pipeline.source, cut))
        return {}, carry, outs, runtime.start
    meter, epoch = runtime.meter, runtime.start.epoch
    counts = stack_counts(length, read_ahead.batch_bytes, pipeline.num_threads)
    values, changed, outs, after = binding.read(), {}, [], runtime.start
    bar = Bar(pipeline.progress, length, f"scan from epoch {epoch}")
    stacks = read_ahead.stacks(runtime.start, cut, counts)
    meter.begin()
    try:
        for count in counts:
            started = time.perf_counter()
            stack = next(stacks)
            meter.waited_since(started)
            meter.fail(stack.failures, max_errors(pipeline))
            program = scan_program(binding.structure, function, Loop(count, cut, carried, unroll))
            before = [values, carry]
            try:
                read = stack.fetched, stack.starts, stack.ends
                new, carry, out = program(values, carry, read)
                # Wait for the chunk before, so that no more than two are computed or wait to be.
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
        stacks.close()  # now, not when the garbage collector finds the generator
        meter.end()
        bar.close()
    for ended in range(epoch, after.epoch):
        meter.report(ended)
    whole = _joined(outs) if len(outs) > 1 else outs[0]
    packed = pack(after, length_of(pipeline.source))
    return {**changed, binding.cursor_index: packed}, carry, whole, after


def _no_batches(stream: StreamSource, cut: Cut) -> tuple[SourceBatch, Cursor, Cursor]:
    """What a scan of no batches reads of a stream: arrays without rows."""
    cursors = Cursor(*(np.zeros(0, word(1)) for _ in Cursor._fields))
    fetched = jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), stream.blank(cut))
    return fetched, cursors, cursors


@jax.jit  # op by op it takes 70 us for each chunk
def _joined(outs: list[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.concatenate(x), *outs)


def _rest_of_epoch(pipeline: "Pipeline") -> int:
    """The number of batches left in the cursor's epoch."""
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
    for path, x in _others(carry):
        raise TypeError(
            f"`init_carry` holds arrays and numbers, but `init_carry{path}` is a "
            f"{type(x).__name__}. Of an Equinox module carry the arrays, "
            "`arrays, rest = eqx.partition(module, eqx.is_array)`, "
            "and put it together in the function: `eqx.combine(arrays, rest)`."
        )


def _others(tree: Any) -> Iterator[tuple[str, Any]]:
    """The leaves that are no arrays or numbers, with their paths."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        try:
            jax.typeof(x)
        except TypeError:
            yield jax.tree_util.keystr(path), x


def _given(modules: Sequence[Any], carry: Any) -> Iterator[tuple[str, Any]]:
    """The values that a scan is given, by name."""
    for path, x in iter_graph(tuple(modules)):
        if isinstance(x, nnx.Variable | jax.Array):
            value = x.get_raw_value() if isinstance(x, nnx.Variable) else x
            name = f"modules[{path[0]}]" + "".join(f".{key}" for key in path[1:])
            yield from ((name, leaf) for leaf in jax.tree.leaves(value))
    for path, leaf in jax.tree_util.tree_leaves_with_path(carry):
        yield f"init_carry{jax.tree_util.keystr(path)}", leaf


def _end(pipeline: "Pipeline", length: int) -> Cursor | None:
    """The cursor after a scan whose function does not move it; None if the start is traced.

    Raises if that is behind the last place that a cursor can count.
    """
    start = pipeline._runtime.start
    if is_traced(start.epoch):
        return None
    size, records, last_batch = cutting(pipeline)
    end = start_after(start, size, length, records, last_batch)
    check_counted(end, records)
    return end


class Loop(NamedTuple):
    """How a scan runs: over `length` batches of that `cut`, with or without a carry.

    If rows are gathered for several batches at once (at most `fetch`), an outer loop does that.
    """

    length: int
    cut: Cut
    carried: bool
    unroll: int
    fetch: int | None = None


@cached_per_structure(SCANS)
def scan_program(structure: Structure, function: FunctionKey, loop: Loop) -> Program:
    """The compiled scan."""
    step_fn = function.held

    def check(constants: Sequence[Any]) -> None:
        if names := captured(step_fn, constants):
            raise _refusal(step_fn, names)

    check([])  # first, since a trace with foreign NNX objects may fail with a worse error
    return Program(_Scan(structure, step_fn, loop).run, check=check)


def _refusal(step_fn: Callable[..., Any], names: Sequence[str]) -> CapturedError:
    way_out, owner = "", getattr(step_fn, "__self__", step_fn)
    if isinstance(owner, nnx.Pytree):
        method = f"{type(owner).__name__}.{getattr(step_fn, '__name__', '__call__')}"
        way_out = f" For a method of an object `x`: `scan({method}, modules=(x,))`."
    return CapturedError(names, way_out=way_out)


@dataclasses.dataclass(frozen=True, eq=False)
class _Scan:
    """The loop: makes batches and hands each to `step_fn`."""

    structure: Structure
    step_fn: Callable[..., Any]
    loop: Loop

    def run(self, values: Values, carry: Any, read: Any = None) -> tuple[Changes, Any, Any]:
        """Returns the values that have changed, the carry, and the stacked outputs.

        `read` are rows that the host has read, stacked, with the cursors before and after each
        batch.
        """
        if read is None:
            now, carry, outs = self._gathering(values, carry)
        else:
            (now, carry), outs = self._over(values, carry, read, self.loop.length)
        pairs = enumerate(zip(now, values, strict=True))
        after = {i: x for i, (x, old) in pairs if not is_same(x, old)}
        return after, carry, outs

    def _gathering(self, values: Values, carry: Any) -> tuple[Values, Any, Any]:
        """The outer loop: gathers rows of several batches, and runs the inner loop over them."""
        cut, structure = self.loop.cut, self.structure
        pipeline, *modules = merge(structure, values)
        count = fetched_at_once(pipeline, modules, self.loop.length, cut, self.loop.fetch)
        epochs = touched(cut, count, length_of(pipeline.source), pipeline.last_batch)
        first = start_of(pipeline, cut).epoch
        # The first iteration computes it: before the loop, its code would be compiled twice.
        specs = jax.eval_shape(lambda epoch: order_at(pipeline, epoch, epochs), first)
        order = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), specs)

        def batches(state: Any, _: None) -> tuple[Any, Any]:
            now, order, ordered, carry = state
            pipeline = merge(structure, now)[0]
            start = start_of(pipeline, cut)
            if jax.tree.leaves(order):
                order = jax.lax.cond(
                    start.epoch == ordered,
                    lambda _: order,
                    lambda epoch: order_at(pipeline, epoch, epochs),
                    start.epoch,
                )
            fetched = fetched_from(pipeline, order, start, cut, count)
            each = jax.tree.map(lambda x: x.reshape(count, cut.size, *x.shape[1:]), fetched)
            (now, carry), outs = self._over(now, carry, (each, None, None), count)
            return (now, order, start.epoch, carry), outs

        state = (values, order, first - first.dtype.type(1), carry)
        unroll = self.loop.unroll if count == 1 else 1  # else the inner loop is unrolled
        (now, _, _, carry), outs = jax.lax.scan(
            batches, state, length=self.loop.length // count, unroll=unroll
        )
        return now, carry, jax.tree.map(lambda x: x.reshape(self.loop.length, *x.shape[2:]), outs)

    def _over(
        self, now: Values, carry: Any, read: Any, count: int
    ) -> tuple[tuple[Values, Any], Any]:
        if count != 1:
            return jax.lax.scan(
                self._one, (now, carry), read, length=count, unroll=self.loop.unroll
            )
        state, out = self._one((now, carry), jax.tree.map(lambda x: x[0], read))
        return state, jax.tree.map(lambda x: jnp.asarray(x)[None], out)  # or a Python number

    def _one(self, state: tuple[Values, Any], read: Any) -> tuple[tuple[Values, Any], Any]:
        (now, carry), (fetched, start, end) = state, read
        start = start or start_of(merge(self.structure, now)[0], self.loop.cut)
        batch, moved, new = run_batch(self.structure, now, fetched, start, self.loop.cut)
        now = updated(now, new)
        roots = merge(self.structure, now)
        pipeline, *modules = roots
        # Before the call, since `modules` may hold the pipeline itself.
        packed = jnp.stack(end or moved)
        pipeline._cursor_state.set_raw_value(packed)
        carry, out = self._called(carry, *modules, batch)
        if end is not None and pipeline._cursor_state.get_raw_value() is not packed:
            raise RandomAccessError(
                "The function of a scan moves the cursor of its own pipeline, whose source is "
                "a stream and gives its records in order. Use a source with a length."
            )
        return (updated(now, changes(self.structure, roots, now)), carry), out

    def _called(self, carry: Any, *args: Any) -> tuple[Any, Any]:
        given = (carry, *args) if self.loop.carried else args
        try:
            pair = self.step_fn(*given)
        except NEEDS_VALUES as error:
            error.add_note("The function of a scan is compiled: write it in jax.numpy.")
            raise
        except KeyError as error:
            error.add_note(f"The batch has {spec_text(args[-1])}.")
            raise
        except TypeError as error:
            if "positional argument" in str(error):
                first = "carry, " if self.loop.carried else ""
                error.add_note(
                    f"The function of a scan is called as `step_fn({first}*modules, batch)`, here "
                    f"with {len(args) - 1} of `modules`."
                )
            raise
        if not self.loop.carried:
            _check_arrays(pair)
            return carry, pair
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise TypeError(
                "With `init_carry`, the function of a scan must return the next carry and an "
                f"output as `(carry, out)`; it returned {pair!r}."
            )
        if change := type_change(carry, pair[0]):
            within, was, is_now = change
            raise TypeError(
                f"A scan must keep the type and shape of its carry, but `carry{within}` was {was} "
                f"and became {is_now}; let `init_carry` begin as what it becomes."
            )
        _check_arrays(pair[1])
        return pair


def _check_arrays(out: Any) -> None:
    """Raises for a result of the function that no loop can stack."""
    for path, x in _others(out):
        raise TypeError(
            "The function of a scan must return arrays and numbers, but "
            f"`out{path}` is a {type(x).__name__}."
        )


def fetched_at_once(
    pipeline: "Pipeline", modules: Sequence[Any], length: int, cut: Cut, most: int | None
) -> int:
    """How many batches have their rows gathered at once: a divisor of `length`.

    One gather for several small batches is faster than one for each, and computing the order has a
    fixed cost.
    """
    source = pipeline.source
    if not isinstance(source, EagerSourceBase) or length < 1:
        return 1
    # If `step_fn` is given the cursor, a key or the source, any of them may change at every batch.
    parts = pipeline.source, pipeline._base, pipeline._cursor_state
    held = {id(x) for _, x in iter_graph(parts) if isinstance(x, nnx.Variable)}
    if any(id(x) in held for _, x in iter_graph(modules)):
        return 1
    if most is None and pipeline.sharding is not None:
        most = 1  # else every device would gather all rows
    if most is None:
        record = jax.tree.leaves(source.element_spec)
        row_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in record)
        most = FETCHED_BYTES if on_cpu() else FETCHED_BYTES_ELSEWHERE
        most //= max(row_bytes * cut.size, 1)
        most = most if most > 3 else 1  # gathering two or three at once gains nothing
    return next(count for count in range(min(max(most, 1), length), 0, -1) if length % count == 0)
