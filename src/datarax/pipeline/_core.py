"""One batch, as a pure function of a pipeline's values: what `step`, `for` and `scan` all drive.

Programs are compiled once for pipelines of equal structure and kept, bounded, by what they were
compiled from; they hold their keys, so a dead function's identity can never be mistaken.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from .._keys import batch_key, node_key, record_keys
from .._rows import advance, settle, zero_outside
from .._types import Batch, Cursor, Scalar
from ..errors import MaskNameError
from ..sources._base import NAME, fetch, length_of, order_of
from ._binding import Changes, Structure, Values, changes, has_tracer, merge

if TYPE_CHECKING:
    from ._pipeline import Pipeline

PROGRAMS = 128
"""How many compiled programs of a kind are kept, over all pipelines."""


class Position(nnx.Variable):
    """The cursor of a pipeline: an array of its epoch and its offset."""


def draw(pipeline: "Pipeline", order: Any, size: int, epochs: int) -> dict[str, Batch]:
    """What every node gives for the next `size` rows; moves the pipeline's cursor past them.

    `order` is that of the `epochs` epochs from the (settled) cursor's on.
    """
    length, policy = length_of(pipeline.source), pipeline.last_batch
    cursor = settle(Cursor(*pipeline.position[...]), size, length, policy)
    batch, rows = fetch(pipeline.source, order, cursor, size, epochs)
    mask = rows.mask if policy == "pad" else None
    if mask is not None:
        if pipeline.mask_name in batch or not isinstance(pipeline.mask_name, str):
            raise MaskNameError(pipeline.mask_name, list(batch))
        batch = zero_outside(batch, mask) | {pipeline.mask_name: mask}

    def keyring(name: str, stage: Any, wanted: str) -> jax.Array:
        node = node_key(pipeline.need_words(name, stage), name)
        if wanted == "key":
            return batch_key(node, cursor.epoch, cursor.offset)
        return record_keys(node, rows.epoch, rows.record)

    outputs = pipeline.transform(batch, keyring, mask)
    pipeline.position[...] = jnp.stack(advance(cursor, size, length, policy))
    return outputs


def order_at(pipeline: "Pipeline", epoch: Scalar, epochs: int) -> Any:
    """What fixes the order of `epochs` epochs from `epoch` on."""
    base = pipeline.words_of(pipeline.source)
    return order_of(pipeline.source, None if base is None else node_key(base, NAME), epoch, epochs)


class Program:
    """A compiled function, and what its first call has shown of it.

    `seconds` that the first call took (tracing, compiling), `bytes` of what it returned, and
    `calls_host`: whether it calls back to the host while it runs.
    """

    seconds = math.inf
    bytes = 0
    calls_host = False

    def __init__(self, function: Callable[..., Any]):
        self._compiled = jax.jit(function)
        self._called = False

    def __call__(self, values: Values, *args: Any) -> Any:
        if self._called:
            return self._compiled(values, *args)
        start = time.perf_counter()
        self.calls_host = _calls_host(self._compiled.trace(values, *args).jaxpr.jaxpr)
        result = self._compiled(values, *args)
        self.seconds = time.perf_counter() - start
        self.bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(result))
        self._called = True
        return result

    def wait(self, result: Any) -> None:
        """Waits for a result that could still turn out to be an error.

        Only a call to the host fails at run time, so without one nothing is waited for.
        """
        if self.calls_host and not has_tracer([result]):
            jax.block_until_ready(result)


def _calls_host(jaxpr: Any) -> bool:
    return any(
        "callback" in equation.primitive.name or any(map(_calls_host, _inner(equation)))
        for equation in jaxpr.eqns
    )


def _inner(equation: Any) -> list[Any]:
    leaves = jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns"))
    found = [getattr(x, "jaxpr", x) for x in leaves]
    return [x for x in found if hasattr(x, "eqns")]


@functools.lru_cache(maxsize=PROGRAMS)
def order_program(structure: Structure, epochs: int) -> Program:
    """`order_at`, compiled."""

    def run(values: Values, epoch: Scalar) -> Any:
        return order_at(merge(structure, values)[0], epoch, epochs)

    return Program(run)


@functools.lru_cache(maxsize=PROGRAMS)
def batch_program(structure: Structure, size: int, epochs: int, count: int) -> Program:
    """`count` batches one after the other, each with the values that have changed so far."""

    def run(values: Values, order: Any) -> list[tuple[Batch, Changes]]:
        roots = merge(structure, values)
        return [
            (
                draw(roots[0], order, size, epochs)[roots[0].sink],
                changes(structure, roots, values),
            )
            for _ in range(count)
        ]

    return Program(run)


@functools.lru_cache(maxsize=PROGRAMS)
def scan_program(
    structure: Structure,
    step_fn: Callable[..., Any],
    length: int,
    size: int,
    epochs: int,
    carried: bool,
) -> Program:
    """`length` batches, each handed to `step_fn`, as one compiled loop."""

    def run(values: Values, carry: Any) -> tuple[Changes, Any, Any]:
        pipeline, *_ = merge(structure, values)
        first = settled_epoch(pipeline, size)
        order = order_at(pipeline, first, epochs)

        def body(state: Any, _: None) -> tuple[Any, Any]:
            values, order, ordered, carry = state
            roots = merge(structure, values)
            pipeline, *modules = roots
            epoch = settled_epoch(pipeline, size)
            if jax.tree.leaves(order):
                order = jax.lax.cond(
                    epoch == ordered,
                    lambda epoch: order,
                    lambda epoch: order_at(pipeline, epoch, epochs),
                    epoch,
                )
            batch = draw(pipeline, order, size, epochs)[pipeline.sink]
            if carried:
                carry, out = step_fn(carry, *modules, batch)
            else:
                out = step_fn(*modules, batch)
            after = changes(structure, roots, values)
            values = [after.get(i, x) for i, x in enumerate(values)]
            return (values, order, epoch, carry), out

        state, outs = jax.lax.scan(body, (values, order, first, carry), length=length)
        after = {i: x for i, x in enumerate(state[0]) if x is not values[i]}
        return after, state[3], outs

    return Program(run)


def settled_epoch(pipeline: "Pipeline", size: int) -> Scalar:
    """The epoch that the next batch starts in."""
    cursor = Cursor(*pipeline.position[...])
    return settle(cursor, size, length_of(pipeline.source), pipeline.last_batch).epoch
