"""Which `ReadAhead` serves a pipeline: a new one when anything changes that it depends on."""

import weakref
from collections.abc import Callable
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from .._keys import SOURCE
from .._settings import chosen_device, on_cpu
from .._types import Cursor
from .._variables import flatten
from ..sources._base import EagerSourceBase
from ..sources._iterable import Stream, StreamSource
from ..sources._reader import Reader
from ._binding import Binding, Values
from ._core import cutting
from ._orders import Orders
from ._read_ahead import ReadAhead
from ._read_batches import ReadSettings, on_host
from ._structure import Structure

if TYPE_CHECKING:
    from ._pipeline import Pipeline


class _Depends(NamedTuple):
    """What of a pipeline, bound so, decides which rows are read and how: what is static, and the
    indices of the values."""

    binding: Binding | None
    static: tuple[Any, ...]
    indices: list[int]


NOTHING = _Depends(None, (), [])


class HostReads:
    """The `ReadAhead` of a pipeline whose source is read on the host."""

    def __init__(self):
        self.ahead: ReadAhead | None = None
        self.pass_end: Cursor | None = None
        """Where a stream was last found to end: the same place as the start of the next epoch."""
        self._static: tuple[Any, ...] = ()
        self._read: list[Any] = []
        self._checked: Values | None = None
        self._depends = NOTHING
        self._close: Callable[[], Any] = lambda: None

    def serving(
        self,
        pipeline: "Pipeline",
        binding: Binding | None,
        values: Values,
        orders: Callable[[], Orders],
    ) -> ReadAhead | None:
        """The one that serves the pipeline as of the last look; None for a source in memory.

        Without a `binding` the user is tracing, where no row can be read: None, too. `values` is a
        new list after every look that has noticed a change; in the same list only the values that
        batches change are others.
        """
        if self._checked is values:
            return self.ahead
        reader = _reader_of(pipeline.source)
        if reader is None:
            self._close()
            self.ahead, self._checked, self._depends = None, values, NOTHING
            return None
        if binding is None:
            return None
        if binding is not self._depends.binding:
            self._depends = _depends(pipeline, binding)
        device = chosen_device()
        x64 = bool(jax.config.read("jax_enable_x64"))
        static = *self._depends.static, on_cpu(), x64, device
        indices = self._depends.indices
        read = [values[i] for i in indices]
        if not (self.ahead and static == self._static and all(map(is_, read, self._read))):
            self.ahead = None  # what follows may fail
            self._close()
            # `order` must not keep the values of stages alive, which may be replaced meanwhile.
            kept = {*indices, binding.cursor_index}
            own = [x if i in kept else np.uint32(0) for i, x in enumerate(values)]
            order = _order_on_host(orders(), own)
            settings = _settings_of(pipeline, reader, order, x64=x64, device=device)
            ahead, self.pass_end = ReadAhead(settings, pipeline.num_threads), None
            self._close = weakref.finalize(self, ahead.close)
            self._static, self._read, self.ahead = static, read, ahead
        self._checked = values
        return self.ahead


def _reader_of(source: Any) -> Reader | Stream | None:
    """What reads the rows of a source on the host; None if they are in memory."""
    if isinstance(source, StreamSource):
        return source.stream
    return source.reader if isinstance(source, EagerSourceBase) else None


def _settings_of(
    pipeline: "Pipeline",
    reader: Reader | Stream,
    order: Callable[[int], Any],
    *,
    x64: bool,
    device: Any,
) -> ReadSettings:
    source = pipeline.source
    assert isinstance(source, EagerSourceBase | StreamSource)
    size, length, last_batch = cutting(pipeline)
    return ReadSettings(
        reader=reader,
        spec=source.element_spec,
        size=size,
        length=length,
        last_batch=last_batch,
        masks=isinstance(source, EagerSourceBase) and source.masks,
        bare=pipeline._sink == SOURCE,
        on_cpu=on_cpu(),
        x64=x64,
        device=device,
        sharding=pipeline.sharding,
        order=order,
        window=source.window if isinstance(source, StreamSource) and source.shuffle else None,
    )


def _order_on_host(orders: Orders, values: Values) -> Callable[[int], Any]:
    def order(epoch: int) -> Any:
        with on_host():
            return orders.at(values, epoch, 1)

    return order


def _depends(pipeline: "Pipeline", binding: Binding) -> _Depends:
    """Stages are no part of it: a stream would be read again from its start whenever one of their
    Variables changes."""
    graphdef, flat = flatten((pipeline.source, pipeline._base))
    own = set(map(id, flat.leaves))
    indices = [i for i, x in binding.leaves() if id(x) in own]
    how = pipeline._sink == SOURCE, pipeline.sharding, pipeline.num_threads
    return _Depends(binding, (Structure(graphdef, {}), *cutting(pipeline), *how), indices)
