"""Sources whose records are read on the host when they are needed."""

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
        shuffle: False for stored order, True for a random order of every epoch in O(1) memory,
            "permutation" for that of `jax.random.permutation`, in O(n) memory, "blocks" for one
            that reads neighbouring records together.
        block_size: for "blocks", the records of a block; blocks come in random order.
        window: for "blocks", the number of consecutive blocks whose records are shuffled together.
        on_error: "raise" a `ReadError` for a record that cannot be read, or "mask" it: zeros, and
            False in the mask.
        max_errors: how many records of an epoch may be masked, at least 1 with "mask". A pipeline
            counts those met in its own loops and scans, from 0 again after a resume; inside a `jit`
            of yours none are counted.
    """

    shuffle: Shuffle = False
    block_size: int = 1024
    window: int = 16
    on_error: OnError = "raise"
    max_errors: int = 0

    def __post_init__(self):
        # A source keeps it, and pipelines share programs if what their parts keep can be hashed.
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
        """`shuffle`, with its sizes where it has some."""
        return Blocks(self.block_size, self.window) if self.shuffle == "blocks" else self.shuffle


class HostSource(EagerSourceBase):
    """A source over a `Reader`.

    In `for`, `scan` and `step` threads of the pipeline read ahead; inside `jit` of your own the
    rows come by a callback.

    Args:
        reader: what reads the rows.
        config: the order, and what to do with unreadable records.
        rngs: a seed of its own for the shuffle; without it the pipeline's is used.
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
        super().__init__(shuffle=config.sized_shuffle, rngs=rngs)
        self.reader = reader
        self.config = config
        self.masks, self.max_errors = config.on_error == "mask", config.max_errors
        if len(reader) == 0:
            raise EmptySourceError(reader.label)
        try:
            reader.element_spec  # noqa: B018  (a field that JAX cannot hold is named here)
        except DataraxError:
            raise
        except Exception as error:
            way_out = "A record that can be read shows what all of them are, and none was found."
            how = {"way_out": way_out, "retry": False}
            raise read_error(reader.label, reader.place(0), 0, error, **how) from error

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def element_spec(self) -> Spec:
        return self.reader.element_spec

    def gather(self, records: Records) -> Batch:
        return call_host(self.reader, records)
