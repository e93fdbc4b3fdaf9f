"""One batch, as a pure function of a pipeline's values: what `step`, `for` and `scan` all drive.

Programs are compiled once for pipelines of equal structure, and kept with that.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError

from .._keys import batch_key, node_key, record_keys
from .._order import word
from .._rows import Cut, advance, settle, zero_outside
from .._types import Batch, Cursor, Scalar
from ..errors import CapturedError, MaskNameError
from ..sources._base import NAME, Fetched, fetch, length_of, order_of
from ._binding import Changes, Structure, Values, changes, has_tracer, kept, merge
from ._captured import captured
from ._graph import check_source_batch, scope, scoped

if TYPE_CHECKING:
    from ._pipeline import Pipeline

CUTS = 8
"""How many ways to cut batches a structure keeps programs for."""

SCANS = 16
"""How many scans a structure keeps, by function and length."""


class Position(nnx.Variable):
    """The cursor of a pipeline: an array of its epoch and its offset."""

    def claim(self) -> None:
        """Raises, before anything is computed, in a trace that the pipeline is no argument of."""
        try:
            self.set_raw_value(self.get_raw_value())
        except TraceContextError as error:
            raise CapturedError.pipeline() from error


def fetched_from(
    pipeline: "Pipeline", order: Any, cursor: Cursor, cut: Cut, count: int = 1
) -> list[Fetched]:
    """The rows of the next `count` batches, under the mark of the source."""
    with jax.named_scope(scope(NAME)):
        return fetch(pipeline.source, order, cursor, cut, count)


def draw(
    pipeline: "Pipeline", fetched: Fetched, cursor: Cursor, cut: Cut
) -> tuple[dict[str, Batch], Cursor]:
    """What every node gives for the rows from the settled `cursor` on, and the cursor after them.

    Of the pipeline, only Variables of its stages change.
    """
    batch, rows = fetched
    check_source_batch(batch, cut.size)
    mask = rows.mask
    if mask is not None:
        if pipeline.mask_name in batch or not isinstance(pipeline.mask_name, str):
            raise MaskNameError(pipeline.mask_name, list(batch))
        batch = zero_outside(batch, mask) | {pipeline.mask_name: mask}

    def keyring(name: str, stage: Any, wanted: str) -> jax.Array:
        node = node_key(pipeline._need_words(name, stage), name)
        if wanted == "key":
            return batch_key(node, cursor.epoch, cursor.offset)
        return record_keys(node, rows.epoch, rows.record)

    outputs = pipeline._transform(batch, keyring, mask)
    length = length_of(pipeline.source)
    return outputs, advance(cursor, cut.size, length, pipeline.last_batch)


def order_at(pipeline: "Pipeline", epoch: Scalar, epochs: int) -> Any:
    """What fixes the order of `epochs` epochs from `epoch` on."""
    base = pipeline._words_of(pipeline.source)
    return order_of(pipeline.source, None if base is None else node_key(base, NAME), epoch, epochs)


class Program:
    """A compiled function, and what its first call has shown of it.

    `seconds` that the first call took (tracing, compiling), `bytes` of what it returned, and
    `host_nodes`: the nodes that call back to the host while it runs, None for a function of the
    user's that does.
    """

    seconds = math.inf
    bytes = 0
    host_nodes: frozenset[str | None] = frozenset()

    def __init__(self, function: Callable[..., Any]):
        self._compiled = jax.jit(function)
        self._called = False

    def __call__(self, values: Values, *args: Any) -> Any:
        if self._called:
            result = self._compiled(values, *args)
        else:
            start = time.perf_counter()
            jaxpr = self._compiled.trace(values, *args).jaxpr.jaxpr
            self.host_nodes = frozenset(_callers(jaxpr, None))
            result = self._compiled(values, *args)
            self.seconds = time.perf_counter() - start
            self.bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(result))
            self._called = True
        # Only a call to the host fails at run time; whoever makes none is not waited for.
        if self.host_nodes and not has_tracer([result]):
            jax.block_until_ready(result)
        return result


def _callers(jaxpr: Any, outer: str | None) -> Iterator[str | None]:
    """The nodes whose operations call the host, those of inner programs included."""
    for equation in jaxpr.eqns:
        node = scoped(str(equation.source_info.name_stack)) or outer
        if "callback" in equation.primitive.name:
            yield node
        leaves = jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns"))
        for inner in (getattr(x, "jaxpr", x) for x in leaves):
            if hasattr(inner, "eqns"):
                yield from _callers(inner, node)


@kept(CUTS)
def order_program(structure: Structure, epochs: int) -> Program:
    """`order_at`, compiled."""

    def run(values: Values, epoch: Scalar) -> Any:
        return order_at(merge(structure, values)[0], epoch, epochs)

    return Program(run)


@kept(CUTS)
def batch_program(structure: Structure, cut: Cut, count: int, position: int | None) -> Program:
    """`count` batches one after the other, each with the values that have changed by then.

    The cursor is not among these, unless `position` says which of the values it is: on the host
    it is known without asking the device. `fed` are the batches with their cursors, where the
    host has read them.
    """

    def run(values: Values, order: Any, fed: Any = None) -> list[tuple[Batch, Changes]]:
        roots = merge(structure, values)
        cursor = start_of(roots[0], cut)
        ready = fed or [(x, None) for x in fetched_from(roots[0], order, cursor, cut, count)]
        results = []
        for fetched, start in ready:
            outputs, cursor = draw(roots[0], fetched, start or cursor, cut)
            moved = {} if position is None else {position: jnp.stack(cursor)}
            results.append((outputs[roots[0]._sink], changes(structure, roots, values) | moved))
        return results

    return Program(run)


@kept(SCANS)
def scan_program(
    structure: Structure,
    step_fn: Callable[..., Any],
    length: int,
    cut: Cut,
    carried: bool,
) -> Program:
    """`length` batches, each handed to `step_fn`, as one compiled loop.

    Given `fed`, batches that the host has read with the cursors before and after each, the loop
    is over these.
    """
    if names := captured(step_fn):
        raise CapturedError(names)

    def one(roots: Any, now: Values, fetched: Any, start: Cursor, end: Any, carry: Any) -> Any:
        pipeline, *modules = roots
        outputs, moved = draw(pipeline, fetched, start, cut)
        # Before the call, since the pipeline itself may be among the modules.
        pipeline._cursor_state.set_raw_value(jnp.stack(end or moved))
        if carried:
            carry, out = step_fn(carry, *modules, outputs[pipeline._sink])
        else:
            out = step_fn(*modules, outputs[pipeline._sink])
        after = changes(structure, roots, now)
        return [after.get(i, x) for i, x in enumerate(now)], carry, out

    def loop(values: Values, carry: Any) -> tuple[Values, Any, Any]:
        pipeline, *_ = merge(structure, values)
        first = start_of(pipeline, cut).epoch
        order = order_at(pipeline, first, cut.epochs)

        def body(state: Any, _: None) -> tuple[Any, Any]:
            now, order, ordered, carry = state
            roots = merge(structure, now)
            pipeline, start = roots[0], start_of(roots[0], cut)
            if jax.tree.leaves(order):
                order = jax.lax.cond(
                    start.epoch == ordered,
                    lambda _: order,
                    lambda epoch: order_at(pipeline, epoch, cut.epochs),
                    start.epoch,
                )
            [fetched] = fetched_from(pipeline, order, start, cut)
            now, carry, out = one(roots, now, fetched, start, None, carry)
            return (now, order, start.epoch, carry), out

        state = (values, order, first, carry)
        (now, _, _, carry), outs = jax.lax.scan(body, state, length=length)
        return now, carry, outs

    def loop_over(values: Values, carry: Any, fed: Any) -> tuple[Values, Any, Any]:
        def body(state: Any, fed: Any) -> tuple[Any, Any]:
            now, carry = state
            now, carry, out = one(merge(structure, now), now, fed[0], fed[1], fed[2], carry)
            return (now, carry), out

        (now, carry), outs = jax.lax.scan(body, (values, carry), fed, length=length)
        return now, carry, outs

    def run(values: Values, carry: Any, fed: Any = None) -> tuple[Changes, Any, Any]:
        now, carry, outs = loop(values, carry) if fed is None else loop_over(values, carry, fed)
        return {i: x for i, x in enumerate(now) if x is not values[i]}, carry, outs

    return Program(run)


def start_of(pipeline: "Pipeline", cut: Cut) -> Cursor:
    """The cursor from which the next batch really starts."""
    length = length_of(pipeline.source)
    # Cast, since a position that was stored elsewhere may come back in another integer type.
    cursor = Cursor(*jnp.asarray(pipeline._cursor_state[...]).astype(word(length or 1)))
    return settle(cursor, cut.size, length, pipeline.last_batch)
