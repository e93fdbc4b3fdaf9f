"""One batch, as a pure function of a pipeline's values: what `step`, `for` and `scan` all drive.

Programs are compiled once for pipelines of equal structure, and kept with that.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from operator import sub
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError

from .._draws import written_out
from .._keys import SOURCE, batch_key, node_key, record_keys
from .._mesh import split
from .._order import word
from .._rows import Cut, advance, settle, touched, zero_outside
from .._types import Batch, Cursor, Scalar
from .._variables import iter_graph
from .._xla import NO_TRACE, ONE_THREAD, apart, checking_values, on_cpu, trace, transferring
from ..errors import CapturedError, MaskNameError, RandomAccessError, StageError
from ..sources._base import EagerSourceBase, Fetched, fetch, length_of, order_of
from ..sources._iterable import StreamSource
from ._binding import (
    Changes,
    Structure,
    Values,
    VariableTypeError,
    changes,
    has_tracer,
    is_same,
    kept,
    merge,
)
from ._captured import captured
from ._graph import Keyring, Wanted, check_source_batch, key_wanted, scope, scoped

if TYPE_CHECKING:
    from ._pipeline import Pipeline

CUTS = 8
"""How many ways to cut batches a structure keeps programs for."""

FETCHED_BYTES = 2**18
"""How many bytes of rows a scan fetches together, if they are of several batches: what stays in the
cache of a CPU."""

FETCHED_BYTES_ELSEWHERE = 2**24
"""The same on an accelerator, where every turn of a loop costs microseconds."""

ONE_THREAD_BYTES = 2**20
"""A CPU computes a batch on one thread if all arrays that it makes for it weigh no more: to share
out their kernels would take longer than to run them."""

CACHED_BYTES, MISS_BYTES = 2**24, 2**10
"""A row that is picked from an array of more than so many bytes, which no cache may hold, weighs so
many more: what could have been written while it was waited for."""

SCANS = 16
"""How many scans a structure keeps, by function and length."""


class Position(nnx.Variable):
    """The cursor of a pipeline: an array of its epoch and its offset."""

    def hold_as(self, kind: Any) -> None:
        """Casts what was stored elsewhere and has come back in another integer type."""
        raw = self.get_raw_value()
        if raw.dtype != kind and jnp.issubdtype(raw.dtype, jnp.integer):
            self.set_raw_value(raw.astype(kind))

    def claim(self) -> None:
        """Raises, before anything is computed, in a trace that the pipeline is no argument of."""
        try:
            self.set_raw_value(self.get_raw_value())
        except TraceContextError as error:
            raise CapturedError.pipeline() from error


def fetched_from(
    pipeline: "Pipeline",
    order: Any,
    cursor: Cursor,
    cut: Cut,
    count: int = 1,
    whole: bool = False,
) -> Fetched:
    """The rows of the next `count` batches, in the named scope of the source."""
    source = pipeline.source
    with jax.named_scope(scope(SOURCE)):
        return fetch(source, order, cursor, cut, count, pipeline.last_batch, whole)


def draw(
    pipeline: "Pipeline", fetched: Fetched, cursor: Cursor, cut: Cut
) -> tuple[dict[str, Batch], Cursor]:
    """What every node gives for the rows from the settled `cursor` on, and the cursor after them.

    Of the pipeline, only Variables of its stages change.
    """
    batch, rows = fetched
    check_source_batch(batch, cut.size)
    # What has passed a branch or a loop has its fields sorted: so that no stage can tell, all have.
    batch = jax.tree.map(lambda x: x, batch)
    if (sharding := pipeline.sharding) is not None:
        batch, rows = split((batch, rows), sharding)
    mask = rows.mask
    if mask is not None:
        if pipeline.mask_name in batch or not isinstance(pipeline.mask_name, str):
            raise MaskNameError(pipeline.mask_name, list(batch))
        batch = zero_outside(batch, mask) | {pipeline.mask_name: mask}

    keys = keyring(pipeline, rows.epoch, rows.record, cursor, cursor.offset)
    outputs = pipeline._transform(batch, keys, mask)
    if sharding is not None:
        outputs[pipeline._sink] = split(outputs[pipeline._sink], sharding)
    length = length_of(pipeline.source)
    return outputs, advance(cursor, cut.size, length, pipeline.last_batch)


def keyring(
    pipeline: "Pipeline", epoch: Any, record: Any, start: Cursor, offset: Scalar | None = None
) -> Keyring:
    """The keys of the nodes for a batch that starts there, and for rows of these records."""

    def keys(name: str, stage: Any, wanted: Wanted) -> jax.Array:
        node = node_key(pipeline._need_words(name, stage), name)
        if wanted == "key":
            return batch_key(node, *start)
        if offset is None:
            return record_keys(node, epoch, record)
        return apart(offset, record_keys, node, epoch, record)

    return Keyring(keys, offset)


def drawn(
    structure: Structure,
    values: Values,
    fetched: Fetched,
    cursor: Cursor,
    cut: Cut,
    alone: bool = False,
) -> tuple[Batch, Cursor, Changes]:
    """`draw` as a function of a pipeline's values: the batch, the cursor after it, new values.

    `alone` compiles it by itself, as is done anyway where stages draw random numbers.
    """

    def run(values: Values, fetched: Fetched, cursor: Cursor) -> tuple[Batch, Cursor, Changes]:
        roots = merge(structure, values)
        outputs, moved = draw(roots[0], fetched, cursor, cut)
        return outputs[roots[0]._sink], moved, changes(structure, roots, values)

    stages = merge(structure, values)[0].nodes.values()
    if alone or any(map(key_wanted, stages)):
        return apart(cursor.offset, run, values, fetched, cursor)
    return run(values, fetched, cursor)


def outputs_of(structure: Structure, values: Values, cut: Cut) -> tuple[dict[str, Any], list[Any]]:
    """The specs of what every node gives for a batch of that cut, from an abstract run, and the
    constants of that program."""

    def outputs(values: Values) -> dict[str, Batch]:
        (copy,) = merge(structure, values)
        start = start_of(copy, cut)
        order = order_at(copy, start.epoch, cut.epochs)
        if isinstance(copy.source, StreamSource):
            fetched = copy.source.blank(cut)
        else:
            fetched = _fetched_undrawn(copy, order, start, cut)
        found, _ = draw(copy, fetched, start, cut)
        try:
            changes(structure, (copy,), values)  # raises for what may not change
        except TypeError as error:
            node = copy._sink  # of a subclass, unless the stages of the pipeline have the Variable
            if isinstance(error, VariableTypeError) and error.path[1] == "_nodes":
                node = copy._nodes.name_of(error.path[2])
            raise StageError(node, {}, f"TypeError: {error}") from error
        return found

    traced = jax.jit(outputs).trace(values)
    return traced.out_info, list(_constants(traced.jaxpr))  # the specs sorted by name


def _fetched_undrawn(copy: "Pipeline", order: Any, start: Cursor, cut: Cut) -> Fetched:
    """`fetched_from`, or an error if the source draws from its own streams: they would not move."""
    streams = [x for _, x in iter_graph(copy.source) if isinstance(x, nnx.RngState)]
    before = [x.get_raw_value() for x in streams]
    cause = None
    try:
        fetched = fetched_from(copy, order, start, cut)
        if all(x.get_raw_value() is y for x, y in zip(streams, before, strict=True)):
            return fetched
    except TraceContextError as error:  # in a trace of ours
        cause = error
    raise StageError(
        SOURCE,
        {},
        "a source must give the same rows whenever it is asked for the same, but this one changes "
        "an nnx.Variable or draws from an nnx.Rngs; draw in a stage that takes `keys`, and count "
        "there.",
    ) from cause


@kept(CUTS)
def refusal(structure: Structure, cut: Cut, kinds: tuple[Any, tuple[Any, ...]]) -> str | None:
    """What a stage says that does not take a batch of that cut. `kinds` are those of the values:
    their tree, and what `jax.typeof` tells of its leaves."""
    tree, leaves = kinds
    specs = [jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type) for x in leaves]
    try:
        outputs_of(structure, jax.tree.unflatten(tree, specs), cut)
    except StageError as error:
        return str(error)
    return None


def updated(values: Values, new: Changes) -> Values:
    """The values after these changes."""
    values = values.copy()
    for i, value in new.items():
        values[i] = value
    return values


def order_at(pipeline: "Pipeline", epoch: Scalar, epochs: int) -> Any:
    """What fixes the order of `epochs` epochs from `epoch` on."""
    base = pipeline._words_of(pipeline.source)
    return order_of(
        pipeline.source, None if base is None else node_key(base, SOURCE), epoch, epochs
    )


class Program:
    """A compiled function, and what its first call has shown of it.

    `seconds` that the first call took (tracing, compiling), by the clock or by the processors'
    time, whichever is less, since others may have held it up; `bytes` of what it returned; and
    `host_nodes`: the nodes that call back to the host while it runs, None for a function of the
    user's that does. `batches` is how many of these the function is written out for, one after the
    other. On a CPU its kernels are `shared` out among threads where that is worth it, unless it is
    to run on `one_thread`. It is `traced` before it is compiled, when `check` may refuse the
    constants that it has, and `called` once a first call went well. One for a batch `keeps_state`
    if that changes more than the cursor; None: it was not called.
    """

    seconds = math.inf
    bytes = 0
    host_nodes: frozenset[str | None] = frozenset()
    shared = False
    keeps_state: bool | None = None

    def __init__(
        self,
        function: Callable[..., Any],
        batches: int = 1,
        one_thread: bool = False,
        check: Callable[[list[Any]], None] = lambda constants: None,
    ):
        self._batches, self._one_thread, self._check = batches, one_thread, check
        self.traced = False
        self._inner: Any = jax.jit(function)  # for a call inside a trace
        self._outer = self._inner  # and outside
        self.called = False

    def __call__(self, values: Any, *args: Any) -> Any:
        with transferring(), checking_values():  # a cursor is transferred, say
            if self.called:
                result = self._compiled(values, *args)
            else:
                start = time.perf_counter(), time.process_time()
                self._first_look(self._inner.trace(values, *args))
                result = self._compiled(values, *args)
                end = time.perf_counter(), time.process_time()
                self.seconds = min(map(sub, end, start))
                self.called = True
        # Only a call to the host fails at run time; whoever makes none is not waited for.
        if self.host_nodes and not has_tracer([result]):
            jax.block_until_ready(result)
        return result

    @property
    def _compiled(self) -> Any:
        return self._outer if trace() == NO_TRACE else self._inner

    def _first_look(self, traced: Any) -> None:
        self.traced = True
        jaxpr, out = traced.jaxpr, traced.out_info
        self._check(list(_constants(jaxpr)))
        arrays = jax.tree.leaves(out)
        self.host_nodes = frozenset(_callers(jaxpr, None))
        self.bytes = sum(x.size * x.dtype.itemsize for x in arrays)
        if not arrays and not self.host_nodes:  # records in stored order, say
            self._inner = self._outer = lambda *_: out
            return
        if not on_cpu():
            return
        self.shared = not self._one_thread and _weight(jaxpr) > self._batches * ONE_THREAD_BYTES
        options = None if self.shared else ONE_THREAD
        self._outer = jax.jit(written_out(self._inner), compiler_options=options)


def _callers(jaxpr: Any, outer: str | None) -> Iterator[str | None]:
    """The nodes whose operations call the host, those of inner programs included."""
    for equation in jaxpr.eqns:
        node = scoped(str(equation.source_info.name_stack)) or outer
        # Under the name of `jax.debug.print` stands no callback, but its effect.
        if "callback" in equation.primitive.name or "debug" in equation.primitive.name:
            yield node
        for inner in _inner(equation):
            yield from _callers(inner, node)


def _weight(jaxpr: Any) -> int:
    """Bytes of all arrays that are made, those of one turn of each loop, and what stands for rows
    that no cache holds."""
    total = 0
    for equation in jaxpr.eqns:
        if inner := _inner(equation):
            total += sum(map(_weight, inner))
        else:
            total += sum(_bytes(x.aval) for x in equation.outvars)
        if equation.primitive.name == "gather" and _bytes(equation.invars[0].aval) > CACHED_BYTES:
            row = max(math.prod(equation.params["slice_sizes"]), 1)
            total += equation.outvars[0].aval.size // row * MISS_BYTES
    return total


def _bytes(aval: Any) -> int:
    return aval.size * aval.dtype.itemsize if hasattr(aval, "dtype") else 0


def _constants(jaxpr: Any) -> Iterator[Any]:
    """What a program holds, those in it included; scalars are written into its operations."""
    yield from getattr(jaxpr, "consts", ())
    for equation in jaxpr.eqns:
        yield from (x.val for x in equation.invars if hasattr(x, "val"))
        for inner in _inner(equation):
            yield from _constants(inner)


def _inner(equation: Any) -> list[Any]:
    """The programs that an operation runs: branches, the body of a loop."""
    leaves = jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns"))
    return [x for x in leaves if hasattr(x, "eqns")]


@kept(CUTS)
def batch_program(
    structure: Structure,
    cut: Cut,
    count: int,
    position: int | None,
    one_thread: bool,
) -> Program:
    """`count` batches one after the other, each with the values that have changed by then.

    Several are whole: all rows of each are in the epoch of the first. The cursor is not among the
    values, unless `position` says which of them it is: on the host it is known without asking the
    device. `fed` are the batches with their cursors, where the host has read them.
    """

    def one(
        values: Values, order: Any, fetched: Fetched | None, cursor: Cursor
    ) -> tuple[Batch, Cursor, Changes]:
        (pipeline,) = merge(structure, values)
        if fetched is None:
            fetched = fetched_from(pipeline, order, cursor, cut, whole=count > 1)
        # Two stages that read what the source gives would else gather it twice.
        alone = count > 1 and pipeline._sink != SOURCE
        return drawn(structure, values, fetched, cursor, cut, alone)

    def run(values: Values, order: Any, fed: Any = None) -> list[tuple[Batch, Changes]]:
        cursor = start_of(merge(structure, values)[0], cut)
        results, after = [], {}
        for fetched, start in fed or [(None, None)] * count:
            now = updated(values, after), order, fetched, start or cursor
            # A branch that hangs on the cursor of the batch before: a chain stays in one thread.
            batch, cursor, new = apart(cursor.offset, one, *now) if count > 1 else one(*now)
            after = after | new
            moved = {} if position is None else {position: jnp.stack(cursor)}
            results.append((batch, after | moved))
        return results

    return Program(run, count, one_thread)


@kept(SCANS)
def scan_program(structure: Structure, step_fn: Callable[..., Any], *how: Any) -> Program:
    """A scan as `_Scan` describes it, compiled."""

    def check(constants: Sequence[Any]) -> None:
        if names := captured(step_fn, constants):
            raise CapturedError(names)

    check([])  # before a trace that may fail for what it reaches
    return Program(_Scan(structure, step_fn, *how).run, check=check)


@dataclasses.dataclass(frozen=True, eq=False)
class _Scan:
    """`length` batches, each handed to `step_fn`, as one compiled loop.

    Rows are gathered for up to `fetch` batches at a time, in a loop around that. What it returns of
    the values is what has changed, but for the cursor where that is `known`.
    """

    structure: Structure
    step_fn: Callable[..., Any]
    length: int
    cut: Cut
    carried: bool
    fetch: int | None
    unroll: int
    known: int | None

    def run(self, values: Values, carry: Any, fed: Any = None) -> tuple[Changes, Any, Any]:
        """`fed`: batches that the host has read, with the cursors before and after each."""
        if fed is None:
            now, carry, outs = self._gathering(values, carry)
        else:
            (now, carry), outs = self._over(values, carry, fed, self.length)
        pairs = enumerate(zip(now, values, strict=True))
        after = {i: x for i, (x, old) in pairs if i != self.known and not is_same(x, old)}
        return after, carry, outs

    def _gathering(self, values: Values, carry: Any) -> tuple[Values, Any, Any]:
        """The loop that gathers rows, and hands them to the loop over their batches."""
        cut, structure = self.cut, self.structure
        pipeline, *modules = merge(structure, values)
        count = fetched_at_once(pipeline, modules, self.length, cut, self.fetch)
        epochs = touched(cut, count, length_of(pipeline.source), pipeline.last_batch)
        first = start_of(pipeline, cut).epoch
        # Computed in the first turn of the loop, so that it is compiled in one place.
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
        (now, _, _, carry), outs = jax.lax.scan(batches, state, length=self.length // count)
        return now, carry, jax.tree.map(lambda x: x.reshape(self.length, *x.shape[2:]), outs)

    def _over(
        self, now: Values, carry: Any, fed: Any, count: int
    ) -> tuple[tuple[Values, Any], Any]:
        if count > 1:
            return jax.lax.scan(self._one, (now, carry), fed, length=count, unroll=self.unroll)
        state, out = self._one((now, carry), jax.tree.map(lambda x: x[0], fed))
        return state, jax.tree.map(lambda x: jnp.asarray(x)[None], out)  # a number of Python, too

    def _one(self, state: tuple[Values, Any], fed: Any) -> tuple[tuple[Values, Any], Any]:
        (now, carry), (fetched, start, end) = state, fed
        start = start or start_of(merge(self.structure, now)[0], self.cut)
        batch, moved, new = drawn(self.structure, now, fetched, start, self.cut)
        now = updated(now, new)
        roots = merge(self.structure, now)
        pipeline, *modules = roots
        # Before the call, since the pipeline itself may be among the modules.
        place = jnp.stack(end or moved)
        pipeline._cursor_state.set_raw_value(place)
        carry, out = self._called(carry, *modules, batch)
        if end is not None and pipeline._cursor_state.get_raw_value() is not place:
            raise RandomAccessError(
                "The function of a scan moves the cursor of its own pipeline, whose source is "
                "a stream and gives its records in order. Use a source with a length."
            )
        return (updated(now, changes(self.structure, roots, now)), carry), out

    def _called(self, carry: Any, *args: Any) -> tuple[Any, Any]:
        if not self.carried:
            return carry, self.step_fn(*args)
        pair = self.step_fn(carry, *args)
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise TypeError(
                "With `init_carry`, the function of a scan must return the next carry and an "
                f"output as `(carry, out)`; it returned {pair!r}."
            )
        return pair


def fetched_at_once(
    pipeline: "Pipeline", modules: Sequence[Any], length: int, cut: Cut, most: int | None
) -> int:
    """For how many batches a scan fetches the rows together: a divisor of `length`.

    One kernel for the rows of several small batches is faster than one for each, and the order is
    best computed for many rows.
    """
    source = pipeline.source
    if not isinstance(source, EagerSourceBase) or length < 1:
        return 1
    # What `step_fn` may move or seed anew has to be looked at before every batch.
    parts = pipeline.source, pipeline._base, pipeline._cursor_state
    held = {id(x) for _, x in iter_graph(parts) if isinstance(x, nnx.Variable)}
    if any(id(x) in held for _, x in iter_graph(modules)):
        return 1
    if most is None and pipeline.sharding is not None:
        most = 1  # else every device would gather the rows of all
    if most is None:
        record = jax.tree.leaves(source.element_spec)
        row_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in record)
        most = FETCHED_BYTES if on_cpu() else FETCHED_BYTES_ELSEWHERE
        most //= max(row_bytes * cut.size, 1)
        most = most if most > 3 else 1  # to gather two or three together gains nothing
    return next(count for count in range(min(max(most, 1), length), 0, -1) if length % count == 0)


def start_of(pipeline: "Pipeline", cut: Cut) -> Cursor:
    """The cursor from which the next batch really starts."""
    length = length_of(pipeline.source)
    # Cast, since specs may be asked for before `Position.hold_as` has seen it.
    cursor = Cursor(*jnp.asarray(pipeline._cursor_state[...]).astype(word(length or 1)))
    return settle(cursor, cut.size, length, pipeline.last_batch)
