"""The two kinds of source, `EagerSourceBase` and `HasGetBatchAt`, and `fetch`, which reads both."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Bool, Integer, UInt

from .._keys import SOURCE, BaseKey, base_words, node_key, typed, words
from .._modules import Watched
from .._order import ORDERS, Blocks, Order, Shuffle, SpanWords, StoredOrder, keys_of, word
from .._rows import (
    Cut,
    LastBatch,
    Rows,
    locate,
    rows_at,
    rows_from,
    running_on,
    starts,
    take,
    touched,
    where_rows,
)
from .._settings import on_cpu, transferring
from .._types import (
    AnyArray,
    Batch,
    Cursor,
    KeyLike,
    Records,
    Scalar,
    Signed,
    Spec,
    Turns,
    Words,
    integer,
    is_traced,
)
from .._variables import flatten
from .._xla import as_one_program
from ..errors import BatchSizeError, RngsError, SeekError, SourceError
from ._callback import call_host_readable

T = TypeVar("T")


class SourceData(nnx.Variable):
    """The Variable type of a source's arrays.

    A pipeline passes them to compiled programs as arguments and leaves them out of checkpoints.
    """


@runtime_checkable
class HasGetBatchAt(Protocol):
    """A source with random access: any `nnx.Module` with this traceable method (spec SRC-013).

    `start` is the offset in an epoch and `key` fixes the order of that epoch. Row `i` of the result
    must be the row at offset `start + i`. A batch may reach past the end of the epoch; the pipeline
    discards those rows. (`jax.lax.dynamic_slice` clamps a start that is too large, which shifts the
    rows before the end too.) Without `__len__` the source has a single epoch that never ends.
    """

    def get_batch_at(self, start: Scalar, batch_size: int, key: Any) -> Batch: ...


class EagerSourceBase(Watched, metaclass=Signed):
    """A source of known length that can fetch any records: write `__len__` and `gather`.

    The pipeline computes the order, the epochs and the keys (spec SRC-012).

    Args:
        shuffle: False: stored order. True: a new random order for every epoch, in O(1) memory.
            "permutation": the order of `jax.random.permutation`, in O(n) memory. "blocks", or a
            `Blocks` with sizes: a random order that reads neighbouring records together.
        rngs: the seed of the shuffle, from the stream "shuffle" or else "default". Without it the
            source uses the pipeline's seed.
    """

    shuffle: Shuffle | Blocks = False
    base: BaseKey | None = None
    reader: Any = None
    """The `Reader` of a source on the host; None where the rows are on the device."""
    masks: bool = False
    """Whether an unreadable row is masked instead of raising an error."""
    max_errors: int = 0
    """The most rows that an epoch may mask."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HELD:
            taken = not isinstance(value, _HELD[name])
        elif name == "reader":
            taken = not (value is None or hasattr(value, "rows_and_holes"))
        else:
            own = vars(EagerSourceBase).get(name)
            kept = getattr(type(self), name, None) is own  # a subclass may have made it its own
            taken = kept and (isinstance(own, property) or (callable(own) and not callable(value)))
        if taken:
            raise TypeError(
                f"`{name}` means something to every source and cannot hold a "
                f"{type(value).__name__}: give what you keep there another name."
            )
        super().__setattr__(name, value)

    def __init__(self, *, shuffle: Shuffle | Blocks = False, rngs: nnx.Rngs | None = None):
        # 1 is in ORDERS, since it equals True.
        known = isinstance(shuffle, bool | str) and shuffle in ORDERS
        if not known and not isinstance(shuffle, Blocks):
            raise ValueError(f"`shuffle` must be one of {list(ORDERS)}, got {shuffle!r}.")
        self.shuffle = Blocks() if shuffle == "blocks" else shuffle
        self.base = None if rngs is None else BaseKey(base_words(rngs, "shuffle"))

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def gather(self, records: Records) -> Batch:
        """The rows `records`, in that order. Must be traceable.

        `records` has the shape `(b,)` and values in `[0, len(self))`. Returns a dict of arrays with
        `b` rows on axis 0.
        """

    def gather_range(self, start: Scalar, size: int) -> Batch:
        """The rows `start` to `start + size - 1`, all of which exist.

        Override it if the source reads a range faster than `gather` does.
        """
        return self.gather(start + jnp.arange(size, dtype=start.dtype))

    def order(self, order_key: Words | None, epochs: Turns) -> Order:
        """The `Order` of these epochs. Override it to define your own shuffle (spec SHUF-001).

        It may give records outside `[0, len(self))` if `gather` accepts them. `order_key` is None
        where there is no seed.
        """
        make = self.shuffle if isinstance(self.shuffle, Blocks) else ORDERS[self.shuffle]
        return as_one_program(_make_order, order_key, epochs, make=make, length=len(self))

    @property
    def records(self) -> int:
        """How many records `gather` accepts; for a mixture it differs from the rows of an epoch."""
        return len(self)

    @property
    def order_name(self) -> str:
        """The name of the order in a saved state; starts with the class if it overrides `order`."""
        if isinstance(self.shuffle, Blocks):
            name = f"blocks-{self.shuffle.size}x{self.shuffle.window}"
        else:
            names: dict[Shuffle, str] = {False: "stored", True: "swap-or-not-24"}
            name = names.get(self.shuffle, str(self.shuffle))
        own = type(self).order is not EagerSourceBase.order
        return f"{type(self).__qualname__} {name}" if own else name

    @property
    def element_spec(self) -> Spec:
        """Shape and type of one record."""
        one = jax.ShapeDtypeStruct((1,), word(len(self)))
        graphdef, flat = flatten(self)  # so that NumPy arrays are traced too, as in a pipeline

        def gathered(leaves: list[Any], records: Records) -> Batch:
            return nnx.graph.unflatten(graphdef, leaves).gather(records)

        batch = jax.eval_shape(gathered, list(flat.leaves), one)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)

    def get_batch_at(
        self,
        start: int | np.integer | Integer[Array, ""],
        batch_size: int,
        key: KeyLike | None = None,
    ) -> Batch:
        """Rows `start` to `start + batch_size - 1` of the endless stream whose order `key` fixes.

        Traceable in `start` and `key`. Called outside of a trace, it compiles the order once for
        each `batch_size`. Consecutive chunks under one key give each record once per epoch (spec
        SRC-016). Without `key` it uses the source's own seed; stored order needs none.

        Raises:
            BatchSizeError: `batch_size` is not an integer in `[1, 2**31)`.
            SeekError: `start` is not an integer within the first 2**32 epochs.
            RngsError: a shuffled source has neither a `key` nor `rngs` of its own.
            ReadError: a row cannot be read, even if the source masks such rows in a pipeline.
        """
        length = len(self)
        check_countable(self)
        if not 1 <= (size := integer(batch_size, 0)) < 2**31:
            raise BatchSizeError(batch_size)
        if isinstance(start, Tracer) and jnp.issubdtype(start.dtype, jnp.integer):
            # In the wider of the two types: high bits of `start` belong to the epoch.
            kind = np.promote_types(word(length), f"u{start.dtype.itemsize}")
            start = start.astype(kind)
            cursor = start // kind.type(length), start % kind.type(length)
        elif 0 <= (first := integer(start, -1)) < length << 32:
            cursor = divmod(first, length)
        else:
            raise SeekError(
                f"`start` must be an integer of at least 0, within 2**32 epochs, got {start!r}."
            )
        cut = running_on(size, length, "keep")
        with transferring():
            cursor = Cursor(*(jnp.asarray(x, word(length)) for x in cursor))
            if key is not None:
                order_key = words(key)
            elif self.base is not None:
                order_key = node_key(self.base.get_raw_value(), SOURCE)
            elif self.shuffle:
                raise RngsError("A shuffled source needs `key`, or `rngs` of its own; got neither.")
            else:
                order_key = None
            order = order_of(self, order_key, cursor.epoch, cut.epochs)
            return fetch(self, order, cursor, cut, masks=False).batch


_HELD: dict[str, tuple[type, ...]] = {
    "shuffle": (bool, str, Blocks),
    "base": (BaseKey, type(None)),
    "masks": (bool, np.bool_),
    "max_errors": (int, np.integer),
}
"""The types of the attributes that a pipeline reads from every source."""

Source: TypeAlias = EagerSourceBase | HasGetBatchAt


def length_of(source: Source) -> int | None:
    """The number of records in an epoch; None if the source has no end."""
    return len(source) if hasattr(type(source), "__len__") else None  # pyright: ignore


def check_countable(source: Source) -> None:
    """Raises for a source of 2**32 or more records where JAX has 64-bit types turned off."""
    counts = length_of(source), source.records if isinstance(source, EagerSourceBase) else None
    most = max(count or 0 for count in counts)
    if most >= 2**32 and not jax.config.read("jax_enable_x64"):
        raise SourceError(
            f"A source of {most} records is counted in 64 bits, which JAX has turned off. "
            'Turn them on: jax.config.update("jax_enable_x64", True).'
        )


def _make_order(
    order_key: Words | None, epochs: Turns, make: Callable[[Any, int], Order], length: int
) -> Order:
    # Only stored order has no key: the callers refuse a shuffle without a seed.
    return make(None if order_key is None else keys_of(order_key, epochs), length)


def order_of(
    source: Source, order_key: Words | None, epoch: UInt[AnyArray, ""], epochs: int
) -> Order | SpanWords | None:
    """The order of `epochs` epochs from `epoch` on: an `Order`, or the keys of `get_batch_at`.

    It depends on the epoch alone, so a loop over one epoch computes it once.
    """
    each = epoch + np.arange(epochs, dtype=epoch.dtype)
    if isinstance(source, EagerSourceBase):
        order = source.order(order_key, each)
        if not isinstance(order, Order):
            raise TypeError(
                f"`order` of {type(source).__name__} must return a datarax.sources.Order, got "
                f"{type(order).__name__}."
            )
        return order
    return None if order_key is None else keys_of(order_key, each)


class SourceBatch(NamedTuple):
    """A batch as its source gives it, before any stage, and which rows those are."""

    batch: Batch
    rows: Rows


def fetch(
    source: Source,
    order: Order | SpanWords | None,
    start: Cursor,
    cut: Cut,
    count: int = 1,
    last_batch: LastBatch = "keep",
    whole: bool = False,
    masks: bool = True,
) -> SourceBatch:
    """The rows of `count` batches from the settled cursor `start` on.

    `order` covers all epochs that the batches can touch. With `whole` the caller guarantees that
    all rows exist and are in the first of them. Without `masks` an unreadable row is an error, even
    if the source masks.
    """
    length, rows = length_of(source), cut.size * count
    if not isinstance(source, EagerSourceBase):
        each = starts(start, cut.size, count, length, last_batch)
        parts = [
            _fetch_by_key(source, order, jax.tree.map(lambda x, i=i: x[i], each), cut)
            for i in range(count)
        ]
        return parts[0] if count == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *parts)

    assert isinstance(order, Order)

    def in_a_row() -> Rows:
        return as_one_program(rows_from, order, start, count=rows, masked=cut.padded)

    def across() -> Rows:
        how = {"cut": cut, "count": count, "length": length, "last_batch": last_batch}
        return as_one_program(_rows_across, order, start, **how)

    def as_stored() -> SourceBatch:
        return SourceBatch(source.gather_range(start.offset, rows), in_a_row())

    masks &= source.masks
    # A branch is a trace, in which a reader runs only as a callback.
    stored = isinstance(order, StoredOrder) and source.reader is None and not masks
    if touched(cut, count, length, last_batch) == 1 and (whole or not cut.padded):
        return as_stored() if stored else _gathered(source, in_a_row(), masks)
    # An accelerator waits for the host at a branch, so there `across` handles every case.
    if rows > len(source) or not on_cpu():
        return _gathered(source, across(), masks)
    number = start.offset.dtype.type
    inside = number(rows) <= number(len(source)) - start.offset
    if stored:
        return _branch(inside, as_stored, lambda: _gathered(source, across(), masks))
    return _gathered(source, _branch(inside, in_a_row, across), masks)


def _branch(condition: Bool[Array, ""], yes: Callable[[], T], no: Callable[[], T]) -> T:
    """`jax.lax.cond` in a trace, a Python branch outside: there JAX would compile both branches
    again at every call."""
    if is_traced(condition):
        return jax.lax.cond(condition, yes, no)
    return yes() if condition else no()


def _rows_across(
    order: Order, start: Cursor, cut: Cut, count: int, length: int | None, last_batch: LastBatch
) -> Rows:
    """The rows of `count` batches, which may cross epochs."""
    return rows_at(order, starts(start, cut.size, count, length, last_batch), cut)


def _gathered(source: EagerSourceBase, rows: Rows, masks: bool) -> SourceBatch:
    if not masks:
        return SourceBatch(source.gather(rows.record), rows)
    if source.reader is None:  # rows on the device are always readable
        batch, readable = source.gather(rows.record), jnp.ones(rows.record.shape, bool)
    else:
        batch, readable = call_host_readable(source.reader, rows.record)
    mask = readable if rows.mask is None else rows.mask & readable
    return SourceBatch(batch, rows._replace(mask=mask))


def _fetch_by_key(
    source: HasGetBatchAt, order: Order | SpanWords | None, cursor: Cursor, cut: Cut
) -> SourceBatch:
    assert not isinstance(order, Order)
    keys = None if order is None else typed(order)
    size, epochs, _ = cut
    turn, offset, mask = locate(cursor, cut, length_of(source))
    # A batch that crosses epochs: read each later epoch from its start, then select by `turn`.
    begins = [cursor.offset] + [jnp.zeros_like(cursor.offset)] * (0 if turn is None else epochs - 1)
    try:
        parts = [
            source.get_batch_at(start, size, None if keys is None else keys[i])
            for i, start in enumerate(begins)
        ]
    except Exception as error:
        if keys is not None or not _works_with_a_key(source, begins[0], size):
            raise
        raise RngsError(
            f"{type(error).__name__}: {error}\nWithout a seed `get_batch_at` is called with the "
            "key None. If it draws from its key, give the pipeline rngs=nnx.Rngs(seed)."
        ) from error
    epoch = jnp.broadcast_to(cursor.epoch, (size,)) if turn is None else cursor.epoch + turn
    rows = Rows(epoch, offset, offset, mask)
    for part in parts:
        if not _has_rows(part, size):
            return SourceBatch(part, rows)  # the shape check of the pipeline reports it
    batch, *others = jax.tree.map(
        lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, parts
    )
    for later, other in enumerate(others, 1):
        here = turn == later
        batch = where_rows(here, take(other, jnp.where(here, offset, 0)), batch)
    return SourceBatch(batch, rows)


def _works_with_a_key(source: HasGetBatchAt, start: Scalar, size: int) -> bool:
    try:
        jax.eval_shape(lambda: source.get_batch_at(start, size, jax.random.key(0)))
    except Exception:
        return False
    return True


def _has_rows(batch: Any, size: int) -> bool:
    return all(
        isinstance(x, jax.Array | np.ndarray) and x.shape[:1] == (size,)
        for x in jax.tree.leaves(batch)
    )
