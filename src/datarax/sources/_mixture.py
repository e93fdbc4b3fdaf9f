"""Several sources mixed by weight, as one source."""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, UInt, UInt32

from .._keys import SOURCE, node_key, split_word, threefry2x32
from .._order import (
    Blocks,
    BlockShuffle,
    Order,
    Shuffle,
    SpanWords,
    SwapOrNot,
    keys_of,
    swap_or_not_each,
    word,
)
from .._rows import where_rows
from .._types import (
    AnyArray,
    Batch,
    Offsets,
    Records,
    Spec,
    Turns,
    Words,
    escaped,
    expect,
    flat_fields,
    integer,
    spec_text,
)
from .._xla import as_one_program
from ..errors import EmptySourceError, SpecsError
from ._base import EagerSourceBase
from ._buffers import empty_rows
from ._callback import call_host
from ._reader import Reader
from ._storage import Segments

PERIOD = 256
"""The most rows of a period, in which each source has exactly its share. It bounds the table of
`MixOrder.before` and the time of `quotas`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixDataSourcesConfig:
    """The shares of a mixture.

    Args:
        num_sources: the number of sources.
        weights: positive numbers, one per source; None gives equal shares. A share is a whole
            number of rows in a period of at most 256 rows; the mixture takes the period that comes
            nearest to the weights (spec SRC-021).
        stop: when an epoch ends (spec SRC-024). "first": before any source would start over, so the
            source that is smallest for its weight sets the length. "all": once every source has
            been read in full, so small sources repeat. All epochs have the same length, and each
            source goes on where it stopped in the last one.
    """

    num_sources: int
    weights: Sequence[float | int] | None = None
    stop: Literal["first", "all"] = "first"

    def __post_init__(self):
        number = integer(self.num_sources, 0)
        given = [1.0] * number if self.weights is None else self.weights
        weights = tuple(np.atleast_1d(np.asarray(given)).tolist())
        object.__setattr__(self, "weights", weights)
        if number < 1 or len(weights) != number:
            raise ValueError(
                f"`weights` has one number for each of `num_sources`, at least 1 of them; "
                f"got {self.num_sources!r} sources and {len(weights)} weights."
            )
        if not all(isinstance(w, int | float) and 0 < w <= sys.float_info.max for w in weights):
            raise ValueError(
                f"`weights` are positive numbers, got {weights}. Leave out the others."
            )
        if self.stop not in ("first", "all"):
            raise ValueError(f'`stop` is "first" or "all", got {self.stop!r}.')

    @property
    def quotas(self) -> tuple[int, ...]:
        """The number of rows of each source in a period."""
        assert self.weights is not None
        shares = np.asarray(self.weights) / max(self.weights)  # so that the sum cannot overflow
        shares /= shares.sum()
        found = [
            (_error(shares, q), q) for n in range(1, PERIOD + 1) if min(q := _split(shares, n))
        ]
        if not found:
            raise ValueError(
                f"A period of at most {PERIOD} rows has no row for the smallest of the weights "
                f"{self.weights}. Mix fewer sources, or raise that weight."
            )
        best = min(error for error, _ in found)
        # The shortest of the best periods. The tolerance is for weights such as 0.1, not exact.
        return next(q for error, q in found if error <= best + 1e-9)


class MixDataSourcesNode(EagerSourceBase):
    """Rows of several sources in fixed shares, without replacement.

    Each source has exactly its share of every period, at random places. A source gives all its
    records, in its own order, before it repeats one, also across epochs of the mixture (spec
    SRC-022). Sources may be on the host or the device.

    Args:
        config: the shares, and where an epoch ends.
        sources: sources with a length, whose records have the same fields, shapes and types. A
            source must not be a mixture, shuffle by "permutation" or override `order`. Either all
            mask unreadable records or none does; the limits of those that mask add up.
        rngs: the seed of the arrangement. Without it the mixture uses the pipeline's seed.

    Raises:
        SpecsError: the records of two sources differ.
        EmptySourceError: with "first", a source is smaller than its share of one period.
    """

    def __init__(
        self,
        config: MixDataSourcesConfig,
        sources: Sequence[EagerSourceBase],
        *,
        rngs: nnx.Rngs | None = None,
    ):
        expect("config", config, MixDataSourcesConfig)
        super().__init__(shuffle=True, rngs=rngs)
        if not isinstance(sources, Sequence):
            raise TypeError(f"`sources` is a list of sources, got {type(sources).__name__}.")
        if len(sources) != config.num_sources:
            raise ValueError(
                f"`num_sources` is {config.num_sources}, but {len(sources)} sources are given."
            )
        _check(sources)
        self.config = config
        self.sources = nnx.List(sources)
        self.layout = _layout(config, sources)
        readers = [source.reader for source in sources]
        if all(reader is not None for reader in readers):
            # pyright cannot see that no reader is None here.
            self.reader = MixReader(tuple(readers), self.layout)  # pyright: ignore[reportArgumentType]
            self.masks = sources[0].masks
            self.max_errors = sum(source.max_errors for source in sources)

    def __len__(self) -> int:
        return self.layout.length

    @property
    def element_spec(self) -> Spec:
        return self.sources[0].element_spec

    @property
    def records(self) -> int:
        return sum(self.layout.lengths)

    @property
    def order_name(self) -> str:
        # The pipeline's seed does not show the order of a source that has its own seed.
        children = ",".join(
            f"{quota}*{source.order_name}/{len(source)}{_seed(source)}"
            for quota, source in zip(self.layout.quotas, self.sources, strict=True)
        )
        return f"mix({children};{self.layout.periods})"

    def order(self, order_key: Words | None, epochs: Turns) -> Order:
        own = [None if x.base is None else x.base.get_raw_value() for x in self.sources]
        return as_one_program(_mix_order, order_key, own, epochs, layout=self.layout)

    def gather(self, records: Records) -> Batch:
        if self.reader is not None:
            return call_host(self.reader, records)
        batch = None
        for source, (begin, end) in zip(self.sources, self.layout.ranges, strict=True):
            kind = records.dtype.type
            mine = (records >= kind(begin)) & (records < kind(end))
            local = jnp.where(mine, records - kind(begin), kind(0)).astype(word(len(source)))
            if source.reader is not None:
                rows = call_host(source.reader, local, mine)
            else:
                rows = source.gather(local)
            batch = rows if batch is None else where_rows(mine, rows, batch)
        assert batch is not None
        return batch


@dataclasses.dataclass(frozen=True)
class MixLayout:
    """The counts of a mixture: the rows of each source in a period, and the periods of an epoch."""

    quotas: tuple[int, ...]
    periods: int
    lengths: tuple[int, ...]
    shuffles: tuple[Shuffle | Blocks, ...]

    @property
    def period(self) -> int:
        return sum(self.quotas)

    @property
    def length(self) -> int:
        return self.period * self.periods

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The range of the mixture's record numbers that belongs to each source."""
        ends = np.cumsum(self.lengths, dtype=object).tolist()
        return list(zip([0, *ends], ends, strict=False))


class MixOrder(Order):
    """The order of a mixture: which record of which source stands at an offset (spec SRC-023).

    An epoch has one random arrangement of the sources in a period, `pattern`; each period rotates
    it by a random amount. So `before`, a table for one period, gives the number of rows that a
    source has had at any place.
    """

    keys: SpanWords
    source_keys: UInt32[Array, "sources 2"]
    pattern: UInt32[Array, "span period"]
    before: UInt32[Array, "span period sources"]
    begun: tuple[tuple[UInt[AnyArray, " span"], UInt[AnyArray, " span"]], ...]
    layout: MixLayout = eqx.field(static=True)
    length: int = eqx.field(static=True)

    def __init__(self, keys: SpanWords, source_keys: Array, epochs: Turns, layout: MixLayout):
        self.keys, self.source_keys = keys, source_keys
        self.layout, self.length = layout, layout.length
        zero = jnp.zeros_like(keys[:, 0])
        # `__call__` uses the numbers of periods as counters, and none is 2**64 - 1.
        places = SwapOrNot(threefry2x32(keys, ~zero, ~zero), layout.period)
        slots = jnp.arange(layout.period, dtype=jnp.uint32)
        place = jnp.stack([places(slots, jnp.full_like(slots, i)) for i in range(keys.shape[0])])
        owner = np.repeat(np.arange(len(layout.quotas), dtype=np.uint32), layout.quotas)
        self.pattern = jnp.asarray(owner)[place]
        sources = jnp.arange(len(layout.quotas), dtype=jnp.uint32)
        here = (self.pattern[:, :, None] == sources[None, None]).astype(jnp.uint32)
        self.before = jnp.cumsum(here, axis=1, dtype=jnp.uint32) - here
        self.begun = tuple(
            multiply_divide(epochs.astype(word(n)), quota * layout.periods, n)
            for quota, n in zip(layout.quotas, layout.lengths, strict=True)
        )

    def __call__(self, offsets: Offsets, turn: Turns | None = None) -> Records:
        layout, turn = self.layout, jnp.zeros_like(offsets) if turn is None else turn
        kind = offsets.dtype.type
        period, slot = offsets // kind(layout.period), offsets % kind(layout.period)
        # A period is the pattern rotated to start at the slot `shift`.
        shift = threefry2x32(self.keys[turn], *split_word(period))[:, 0] % np.uint32(layout.period)
        slot = (slot.astype(jnp.uint32) + shift) % np.uint32(layout.period)
        source, wrapped = self.pattern[turn, slot], slot < shift
        # Where the rotation wraps, this underflows; adding the quota below corrects it.
        rank = self.before[turn, slot] - self.before[turn, shift]
        records = jnp.zeros_like(offsets, dtype=word(max(layout.length, sum(layout.lengths))))
        for i, (quota, (begin, _)) in enumerate(zip(layout.quotas, layout.ranges, strict=True)):
            mine = source == np.uint32(i)
            inside = rank[:, i] + jnp.where(wrapped, np.uint32(quota), np.uint32(0))
            inside = jnp.where(mine, inside, np.uint32(0)).astype(offsets.dtype)
            record = self._record(i, period * kind(quota) + inside, turn).astype(records.dtype)
            records = jnp.where(mine, record + records.dtype.type(begin), records)
        return jax.lax.optimization_barrier(records)

    def _record(self, i: int, row: Offsets, turn: Turns) -> Records:
        """The record at row `row` of this epoch's share of source `i`."""
        length, shuffle = self.layout.lengths[i], self.layout.shuffles[i]
        kind = np.promote_types(row.dtype, word(length))
        n, row = kind.type(length), row.astype(kind)
        passes, start = (x[turn].astype(kind) for x in self.begun[i])
        inside, left = row % n, n - start
        wraps = inside >= left
        offset = jnp.where(wraps, inside - left, start + inside)
        passes = passes + row // n + wraps.astype(kind)
        offset = offset.astype(word(length))
        if shuffle is False:
            return offset
        keys = keys_of(self.source_keys[i], passes)
        if isinstance(shuffle, Blocks):
            each = jnp.arange(offset.shape[0], dtype=jnp.uint32)
            return BlockShuffle(keys, length, shuffle.size, shuffle.window)(offset, each)
        return swap_or_not_each(keys, jnp.full_like(offset, length), offset)


def _mix_order(
    order_key: Words, own: Sequence[Words | None], epochs: Turns, layout: MixLayout
) -> MixOrder:
    """The order under `order_key`; `own` are the sources' own seeds, or None."""
    order_key = jnp.asarray(order_key)
    # The counters (1, i) differ from those of epochs, which are (0, epoch).
    numbers = jnp.arange(len(own), dtype=jnp.uint32)
    mine = threefry2x32(order_key[None], jnp.ones_like(numbers), numbers)
    keys = [mine[i] if base is None else node_key(base, SOURCE) for i, base in enumerate(own)]
    return MixOrder(keys_of(order_key, epochs), jnp.stack(keys), epochs, layout)


@dataclasses.dataclass(frozen=True)
class MixReader(Reader):
    """Reads from several readers, whose records are numbered one after another."""

    readers: tuple[Reader, ...]
    layout: MixLayout

    label = "MixDataSourcesNode"

    @functools.cached_property
    def _segments(self) -> Segments:
        return Segments(self.layout.lengths)

    def __len__(self) -> int:
        return len(self._segments)

    @property
    def stored_spec(self) -> Spec:
        # Readers may store a field in different types; `read` returns the type that JAX holds.
        return self.readers[0].element_spec

    def read(self, records: np.ndarray) -> Batch:
        spec = self.stored_spec
        batch = jax.tree.map(lambda x: empty_rows(len(records), x.shape, x.dtype), spec)
        for i, rows, inside in self._segments.divide(records):
            read = self.readers[i].checked(inside.astype(records.dtype), spec)
            jax.tree.map(lambda to, x, rows=rows: to.__setitem__(rows, x), batch, read)
        return batch

    def place(self, record: int) -> str:
        i = self._segments.segment_of(record)
        inside = record - self.layout.ranges[i][0]
        return f"{self.readers[i].place(inside)} (record {inside} of source {i})"


def multiply_divide(x: Turns, factor: int, divisor: int) -> tuple[Turns, Turns]:
    """`divmod(x * factor, divisor)` for a product that overflows the type of `x`.

    The quotient is modulo the type's range, the remainder exact. Long division, one bit of `x` at a
    time.
    """
    kind = x.dtype.type
    bits = 8 * x.dtype.itemsize
    high, low = (kind(n) for n in divmod(factor, divisor))
    n = kind(divisor)

    def plus(total: tuple[Array, Array], quotient: Array, rest: Array) -> tuple[Array, Array]:
        carry = total[1] >= n - rest
        return (
            total[0] + quotient + carry.astype(x.dtype),
            jnp.where(carry, total[1] - (n - rest), total[1] + rest),
        )

    def one(i: Array | int, total: tuple[Array, Array]) -> tuple[Array, Array]:
        # Under `jax.disable_jit`, `i` is a Python integer.
        bit = (x >> jnp.asarray(bits - 1 - i, x.dtype)) & kind(1)
        return plus(plus(total, *total), bit * high, bit * low)

    return jax.lax.fori_loop(0, bits, one, (jnp.zeros_like(x), jnp.zeros_like(x)))


def _check(sources: Sequence[EagerSourceBase]) -> None:
    """Raises for sources that cannot be mixed (spec SRC-026)."""
    for i, source in enumerate(sources):
        if isinstance(source, type) or not hasattr(source, "get_batch_at"):
            raise TypeError(
                f"Source {i} of a mixture must be a source, got {type(source).__name__}. Of arrays "
                "make one: MemorySource(MemorySourceConfig(), data)."
            )
        if isinstance(source, MixDataSourcesNode):
            raise TypeError(
                f"Source {i} of a mixture is a mixture itself. Give its parts instead of it."
            )
        if not isinstance(source, EagerSourceBase):
            raise TypeError(
                f"Source {i} of a mixture must have a length and `gather`, as an EagerSourceBase "
                f"has, got {type(source).__name__}."
            )
        if source.shuffle == "permutation":
            raise ValueError(
                f"Source {i} is ordered by shuffle='permutation', whose order is one table an "
                "epoch; a mixture goes through several at once. Take shuffle=True."
            )
        if type(source).order is not EagerSourceBase.order:
            raise ValueError(
                f"Source {i}, a {type(source).__name__}, has a method `order` of its own, "
                "which a mixture does not call. Take a source without one."
            )
        if source.masks != sources[0].masks:
            does = {True: "does", False: "does not"}
            raise ValueError(
                "Of the sources of a mixture all must mask the records that they cannot read "
                f"or none, but source {i} {does[source.masks]} and source 0 "
                f"{does[sources[0].masks]}. Give all of them the same `on_error`; what is in "
                "memory can be read by a RandomAccessSource."
            )
        if source.masks and source.reader is None:
            raise ValueError(
                f"Source {i}, a {type(source).__name__}, masks records and has no `reader`. A "
                "mixture masks only what it reads on the host."
            )
        if source.element_spec != sources[0].element_spec:
            first, other = (flat_fields(x.element_spec, escaped) for x in (sources[0], source))
            unlike = [k for k in {**first, **other} if first.get(k) != other.get(k)]
            had, has = (
                spec_text({k: spec[k] for k in unlike if k in spec}) or "nothing of that name"
                for spec in (first, other)
            )
            raise SpecsError(
                "All sources of a mixture must have records of one spec, but where they differ "
                f"source 0 has\n  {had}\nand source {i} has\n  {has}"
            )


def _layout(config: MixDataSourcesConfig, sources: Sequence[EagerSourceBase]) -> MixLayout:
    lengths = tuple(len(source) for source in sources)
    quotas = config.quotas
    if config.stop == "first":
        periods = min(n // q for n, q in zip(lengths, quotas, strict=True))
    else:
        periods = max(-(-n // q) for n, q in zip(lengths, quotas, strict=True))
    if periods == 0:
        raise EmptySourceError(
            f"an epoch that stops with the first of sources of {lengths} records, with shares "
            f"of {quotas} in {sum(quotas)} rows,"
        )
    return MixLayout(quotas, periods, lengths, tuple(source.shuffle for source in sources))


def _seed(source: EagerSourceBase) -> str:
    """The own seed of a source as text, or an empty string."""
    return "" if source.base is None else f"@{np.asarray(source.base.get_raw_value()).tolist()}"


def _split(shares: np.ndarray, rows: int) -> tuple[int, ...]:
    """Divides `rows` by the largest remainder method."""
    exact = shares * rows
    counts = np.floor(exact + 1e-9).astype(int)
    rests = np.argsort(counts - exact, kind="stable")
    counts[rests[: rows - counts.sum()]] += 1
    return tuple(counts.tolist())


def _error(shares: np.ndarray, quotas: tuple[int, ...]) -> float:
    return float(np.abs(np.array(quotas) / sum(quotas) - shares).max())
