"""Sources that read their records on the host, batch by batch."""

import dataclasses
from typing import Literal, TypeAlias

from flax import nnx

from .._order import ORDERS, Blocks, Shuffle
from .._types import Batch, Records, Spec, expect, integer
from ..errors import DataraxError, EmptySourceError
from ._base import EagerSourceBase
from ._callback import call_host
from ._conform import read_error
from ._reader import Reader

OnError: TypeAlias = Literal["raise", "mask"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostSourceConfig:
    """The options that all sources on the host share.

    Args:
        shuffle: False: stored order. True: a new random order for every epoch, in O(1) memory.
            "permutation": the order of `jax.random.permutation`, in O(n) memory. "blocks": a random
            order that reads neighbouring records together.
        block_size: the number of records in a block of "blocks". Blocks come in random order.
        window: the number of consecutive blocks of "blocks" whose records are shuffled together.
        on_error: what an unreadable record does: "raise" a `ReadError`, or "mask" the row, which is
            then zeros, and False in the mask (spec SRC-033).
        max_errors: the most records that an epoch may mask; at least 1 with "mask". A pipeline
            counts them in its own loops and scans, and from 0 after a resume. It counts none inside
            a `jit` of yours.
    """

    shuffle: Shuffle = False
    block_size: int = 1024
    window: int = 16
    on_error: OnError = "raise"
    max_errors: int = 0

    def __post_init__(self):
        # A source keeps its config. Pipelines share programs only if all static attributes hash.
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(value))
        if not isinstance(self.shuffle, bool | str) or self.shuffle not in ORDERS:
            raise ValueError(
                f'`shuffle` is False, True, "permutation" or "blocks", got {self.shuffle!r}.'
            )
        if self.on_error not in ("raise", "mask"):
            raise ValueError(f'`on_error` is "raise" or "mask", got {self.on_error!r}.')
        most = integer(self.max_errors, -1)
        if most < 0 or (most > 0) != (self.on_error == "mask"):
            raise ValueError(
                '`max_errors` is the number of records an epoch may mask under on_error="mask", at '
                f"least 1 there and 0 otherwise; got {self.max_errors!r} with {self.on_error!r}."
            )
        blocks = Blocks(self.block_size, self.window)
        if self.shuffle in (True, "permutation") and blocks != Blocks():
            raise ValueError(
                '`block_size` and `window` are those of shuffle="blocks", got shuffle='
                f"{self.shuffle!r}."
            )

    @property
    def sized_shuffle(self) -> Shuffle | Blocks:
        """`shuffle`, with "blocks" as a `Blocks` with its sizes."""
        return Blocks(self.block_size, self.window) if self.shuffle == "blocks" else self.shuffle


class HostSource(EagerSourceBase):
    """A source over a `Reader`.

    In `for`, `scan` and `step` the pipeline's threads read ahead (spec SRC-030). Inside a `jit` of
    yours a callback reads each batch when the program reaches it.

    Args:
        reader: reads the rows.
        config: the order, and what an unreadable record does.
        rngs: the seed of the shuffle. Without it the source uses the pipeline's seed.

    Raises:
        EmptySourceError: the reader has no records.
        FieldTypeError: a field that JAX cannot hold.
        ReadError: none of the records that were tried for `stored_spec` can be read.
    """

    def __init__(self, reader: Reader, config: HostSourceConfig, *, rngs: nnx.Rngs | None = None):
        expect("reader", reader, Reader)
        expect("config", config, HostSourceConfig)
        try:
            hash(reader)
        except TypeError as error:
            raise TypeError(
                "A reader must be hashable, since it is a static part of compiled programs, but "
                f"{type(reader).__name__} is not ({error}). Make it a frozen dataclass of paths "
                "and numbers."
            ) from error
        for name in ("rows", "rows_and_holes", "checked", "place"):
            if not callable(getattr(reader, name)):
                raise TypeError(
                    f"`{name}` is a method of every Reader, and {type(reader).__name__} has a "
                    "field of that name: call it something else."
                )
        super().__init__(shuffle=config.sized_shuffle, rngs=rngs)
        self.reader = reader
        self.config = config
        self.masks, self.max_errors = config.on_error == "mask", config.max_errors
        if len(reader) == 0:
            raise EmptySourceError(reader.label)
        try:
            reader.element_spec  # noqa: B018  (raises for a field that JAX cannot hold)
        except DataraxError:
            raise
        except Exception as error:
            way_out = "The first readable record shows the spec of all, and none was found."
            how = {"way_out": way_out, "retry": False}
            raise read_error(reader.label, reader.place(0), 0, error, **how) from error

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def element_spec(self) -> Spec:
        return self.reader.element_spec

    def gather(self, records: Records) -> Batch:
        return call_host(self.reader, records)
