"""One batch as a pure function of a pipeline's values. `step`, `for` and `scan` all drive it."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.errors import TraceContextError

from .._keys import SOURCE, batch_key, node_key, record_keys
from .._mesh import check_mesh, split
from .._order import word
from .._rows import Cut, LastBatch, advance, settle, zero_outside
from .._settings import settings
from .._types import Batch, Cursor, Scalar, is_traced
from .._variables import iter_graph
from .._xla import in_own_branch
from ..errors import CapturedError, MaskNameError, SeekError, StageError
from ..sources._base import EagerSourceBase, SourceBatch, fetch, length_of, order_of
from ..sources._iterable import StreamSource
from ._binding import Changes, Values, VariableTypeError, changes, merge
from ._jaxpr import constants
from ._stages import Keyring, Wanted, check_source_batch, key_wanted, scope
from ._structure import Structure, cached_per_structure

if TYPE_CHECKING:
    from ._pipeline import Pipeline

CUTS = 8
"""How many programs for batches of different cuts are kept for each structure."""


class CursorVariable(nnx.Variable):
    """The cursor of a pipeline: an array of its epoch and its offset."""

    def hold_as(self, kind: Any) -> None:
        """Normalises a value that was assigned from outside: casts another integer type, and copies
        a writable NumPy array, whose changes in place nobody would notice."""
        raw = self.get_raw_value()
        if raw.dtype != kind and jnp.issubdtype(raw.dtype, jnp.integer):
            raw = raw.astype(kind)
        if isinstance(raw, np.ndarray) and raw.flags.writeable:
            raw = raw.copy()
            raw.flags.writeable = False
        if raw is not self.get_raw_value():
            self.set_raw_value(raw)

    def claim(self) -> None:
        """Raises, before any work is done, in a user's trace that closes over the pipeline."""
        try:
            self.set_raw_value(self.get_raw_value())
        except TraceContextError as error:
            text = (
                "A pipeline can be consumed in a traced function only as its argument, but this "
                "one comes from outside: its cursor could not move. Pass it to the function under "
                "`nnx.jit` or `nnx.grad`, or take the batch before the call."
            )
            raise CapturedError(["pipeline"], text=text) from error


def fetched_from(
    pipeline: "Pipeline",
    order: Any,
    cursor: Cursor,
    cut: Cut,
    count: int = 1,
    whole: bool = False,
) -> SourceBatch:
    """The rows of the next `count` batches, gathered in the named scope of the source. With `whole`
    all of them are in the epoch of the cursor."""
    check_mesh(pipeline.sharding)
    source = pipeline.source
    with jax.named_scope(scope(SOURCE)):
        return fetch(source, order, cursor, cut, count, pipeline.last_batch, whole)


def run_stages(
    pipeline: "Pipeline", fetched: SourceBatch, cursor: Cursor, cut: Cut
) -> tuple[dict[str, Batch], Cursor]:
    """The output of every node for the rows from the settled `cursor` on, and the cursor after.

    It changes no more of the pipeline than Variables of its stages.
    """
    check_mesh(pipeline.sharding)
    batch, rows = fetched
    check_source_batch(batch, cut.size)
    # `lax.cond` and `lax.scan` sort the fields of dicts. Sort them here, too, so that a stage sees
    # one order in every mode.
    batch = jax.tree.map(lambda x: x, batch)
    if (sharding := pipeline.sharding) is not None:
        batch, rows = split((batch, rows), sharding)
    mask = rows.mask
    if mask is not None:
        if pipeline.mask_name in batch or not isinstance(pipeline.mask_name, str):
            raise MaskNameError(pipeline.mask_name, list(batch))
        batch = zero_outside(batch, mask) | {pipeline.mask_name: mask}

    keys = keyring(pipeline, rows.epoch, rows.record, cursor)
    outputs = pipeline._transform(batch, keys, mask)
    if sharding is not None:
        outputs[pipeline._sink] = split(outputs[pipeline._sink], sharding)
    length = length_of(pipeline.source)
    return outputs, advance(cursor, cut.size, length, pipeline.last_batch)


def keyring(pipeline: "Pipeline", epoch: Any, record: Any, start: Cursor) -> Keyring:
    """The keys of the nodes for a batch that starts at `start` and has these rows."""

    def keys(name: str, stage: Any, wanted: Wanted) -> jax.Array:
        node = node_key(pipeline._need_words(name, stage), name)
        if wanted == "key":
            return batch_key(node, *start)
        return in_own_branch(start.offset, record_keys, node, epoch, record)

    return Keyring(keys, start.offset)


def run_batch(
    structure: Structure,
    values: Values,
    fetched: SourceBatch,
    cursor: Cursor,
    cut: Cut,
) -> tuple[Batch, Cursor, Changes]:
    """`run_stages` as a function of a pipeline's values: a batch, the cursor after it, new values.

    With random stages it is a branch of its own in the program, see `in_own_branch`.
    """

    def run(values: Values, fetched: SourceBatch, cursor: Cursor) -> tuple[Batch, Cursor, Changes]:
        roots = merge(structure, values)
        outputs, moved = run_stages(roots[0], fetched, cursor, cut)
        return outputs[roots[0]._sink], moved, changes(structure, roots, values)

    stages = merge(structure, values)[0].nodes.values()
    if any(map(key_wanted, stages)):
        return in_own_branch(cursor.offset, run, values, fetched, cursor)
    return run(values, fetched, cursor)


def outputs_of(structure: Structure, values: Values, cut: Cut) -> tuple[dict[str, Any], list[Any]]:
    """The spec of every node's output for a batch of that cut, and the constants of the program.

    From an abstract run, which is cached for all pipelines of equal structure.
    """
    leaves, tree = jax.tree.flatten(values)
    types = tuple(map(jax.typeof, leaves))
    if any(any(x.sharding.spec) for x in types):  # an explicit mesh: the shared run loses shardings
        return _run_abstractly(structure, values, cut)
    specs, found = _shared_outputs(structure, cut, (tree, types), settings())
    return jax.tree.map(lambda x: x, specs), found


@cached_per_structure(CUTS)
def _shared_outputs(
    structure: Structure, cut: Cut, kinds: tuple[Any, tuple[Any, ...]], settings: Any
) -> tuple[dict[str, Any], list[Any]]:
    """`kinds` are those of the values: their tree, and what `jax.typeof` tells of its leaves."""
    del settings  # those that are in force
    tree, types = kinds
    specs = [jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type) for x in types]
    return _run_abstractly(structure, jax.tree.unflatten(tree, specs), cut)


def _run_abstractly(
    structure: Structure, values: Values, cut: Cut
) -> tuple[dict[str, Any], list[Any]]:

    def outputs(values: Values) -> dict[str, Batch]:
        (copy,) = merge(structure, values)
        start = start_of(copy, cut)
        order = order_at(copy, start.epoch, cut.epochs)
        if isinstance(copy.source, StreamSource):
            fetched = copy.source.blank(cut)
        else:
            fetched = _fetched_purely(copy, order, start, cut)
        found, _ = run_stages(copy, fetched, start, cut)
        try:
            changes(structure, (copy,), values)  # raises for changes that are not allowed
        except TypeError as error:
            node = copy._sink  # a subclass's `__call__`, unless the Variable belongs to a stage
            if isinstance(error, VariableTypeError) and error.path[1] == "_nodes":
                node = copy._nodes.name_of(error.path[2])
            raise StageError(node, {}, f"TypeError: {error}") from error
        return found

    traced = jax.jit(outputs).trace(values)
    return traced.out_info, list(constants(traced.jaxpr))  # JAX sorts the nodes by name


def _fetched_purely(copy: "Pipeline", order: Any, start: Cursor, cut: Cut) -> SourceBatch:
    """`fetched_from`, or an error if the source draws from an `nnx.Rngs` of its own, which would
    not advance."""
    streams = [x for _, x in iter_graph(copy.source) if isinstance(x, nnx.RngState)]
    before = [x.get_raw_value() for x in streams]
    cause = None
    try:
        fetched = fetched_from(copy, order, start, cut)
        if all(x.get_raw_value() is y for x, y in zip(streams, before, strict=True)):
            return fetched
    except TraceContextError as error:  # it changes a Variable within our trace
        cause = error
    raise StageError(
        SOURCE,
        {},
        "a source must give the same rows whenever it is asked for the same, but this one changes "
        "an nnx.Variable or draws from an nnx.Rngs; draw in a stage that takes `keys`, and count "
        "there.",
    ) from cause


def refusal(structure: Structure, values: Values, cut: Cut) -> str | None:
    """The error of a stage that does not take a batch of that cut; None if all do."""
    try:
        outputs_of(structure, values, cut)
    except StageError as error:
        return str(error)
    return None


def updated(values: Values, new: Changes) -> Values:
    """A copy of the values with these changes."""
    values = values.copy()
    for i, value in new.items():
        values[i] = value
    return values


def order_at(pipeline: "Pipeline", epoch: Scalar, epochs: int) -> Any:
    """The order of `epochs` epochs from `epoch` on, as the source computes it."""
    base = pipeline._words_of(pipeline.source)
    return order_of(
        pipeline.source, None if base is None else node_key(base, SOURCE), epoch, epochs
    )


def start_of(pipeline: "Pipeline", cut: Cut) -> Cursor:
    """The settled cursor, inside a trace."""
    length = length_of(pipeline.source)
    # Specs may be asked for before `CursorVariable.hold_as` has cast the cursor.
    cursor = Cursor(*jnp.asarray(pipeline._cursor_state[...]).astype(word(length or 1)))
    return settle(cursor, cut.size, length, pipeline.last_batch)


def cursor(pipeline: "Pipeline") -> Cursor:
    """Epoch and offset: integers, unless the user is tracing. Waits for a running `scan`."""
    raw = pipeline._cursor_state.get_raw_value()
    if is_traced(raw):
        return Cursor(raw[0], raw[1])
    if isinstance(raw, jax.ShapeDtypeStruct):
        raise TypeError(
            "This pipeline is an abstract one, as `nnx.eval_shape` makes it, and has no cursor: "
            "restore a checkpoint into it."
        )
    found, length = Cursor(*map(int, np.asarray(raw))), length_of(pipeline.source)
    if found.epoch < 0 or not 0 <= found.offset < (length or 2**32):
        raise SeekError(
            f"The cursor must be inside the source's {length} records, but is {tuple(found)}. "
            "Move it with `seek` or `reset`."
        )
    return found


def cutting(pipeline: "Pipeline") -> tuple[int, int | None, LastBatch]:
    """How the stream is cut into batches: `batch_size`, the epoch's length, `last_batch`."""
    return pipeline.batch_size, length_of(pipeline.source), pipeline.last_batch


def max_errors(pipeline: "Pipeline") -> int:
    """How many unreadable rows of an epoch may be masked."""
    source = pipeline.source
    return source.max_errors if isinstance(source, EagerSourceBase) else 0
