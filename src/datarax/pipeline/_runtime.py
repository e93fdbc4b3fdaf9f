"""The hot path of `step` and `for`: notices what has changed, hands out the next batch.

The way of a batch: if the source is on the host, a `ReadAhead` reads its rows. A compiled program
computes it, together with those that follow (`ComputedAhead`). `Runtime.hand_over` returns it and
moves the cursor.
"""

import functools
import threading
import time
import warnings
import weakref
from collections.abc import Sequence
from itertools import compress
from operator import is_not
from typing import TYPE_CHECKING, Any

import numpy as np

from .._keys import SOURCE, BaseKey
from .._mesh import are_placed
from .._order import word
from .._rows import Cut, settle
from .._settings import context
from .._types import Batch, Cursor, is_traced
from ..errors import ReadError
from ..sources._base import length_of
from . import _compute_ahead
from ._binding import Binding, Values, has_tracer, is_container
from ._compute_ahead import ComputedAhead, Seen
from ._core import cursor, cutting, max_errors, refusal
from ._host_reads import HostReads
from ._meter import Meter
from ._orders import Orders, order_program
from ._read_ahead import ReadAhead

if TYPE_CHECKING:
    from ._pipeline import Pipeline

BINDINGS = 4
"""How many sets of `modules` a pipeline remembers."""


class Runtime:
    """What a pipeline caches between batches. All of it is derived: a copy starts without it.

    Every batch begins with `look`, which compares `_values` with the pipeline's present values; as
    long as they are the same, so is all else here. Whoever recomputes must assign `_values` and
    `_binding` last, so that the next look notices what an interrupt has left half done.
    """

    def __init__(self):
        self.lock = threading.RLock()
        self._bindings: dict[tuple[int, ...], tuple[list[weakref.ref], Binding]] = {}
        # As of the last look at the pipeline.
        self._binding: Binding | None = None
        self._context = context()
        self._values: Values = []
        self._traced = self._mutable = False
        self.start = Cursor(0, 0)
        self._orders: Orders | None = None
        self._computed = ComputedAhead()
        self.reads = HostReads()
        self.meter = Meter()

    def bind(self, pipeline: "Pipeline", modules: Sequence[Any] = ()) -> Binding:
        """The binding of the pipeline and `modules`, made anew if an attribute has changed."""
        roots = (pipeline, *modules)
        ids = tuple(map(id, roots))
        if ids in self._bindings:
            refs, binding = self._bindings[ids]
            same = all(ref() is x for ref, x in zip(refs, roots, strict=True))
            if same and binding.is_current():
                return binding
        binding = Binding(roots)
        try:
            refs = [weakref.ref(x, lambda _: self._bindings.pop(ids, None)) for x in roots]
        except TypeError:  # no weak reference to a tuple, say: do not cache it by its id
            return binding
        if ids in self._bindings:  # outdated; others may hold what was replaced, too
            self._bindings.clear()
        if len(self._bindings) >= BINDINGS:
            del self._bindings[next(iter(self._bindings))]
        self._bindings[ids] = refs, binding
        return binding

    def look(self, pipeline: "Pipeline") -> Binding:
        """Notices what the user has changed since the last batch. Call it before all else.

        After it `start` is the settled cursor: plain integers, unless the user is tracing.
        """
        binding = self._binding
        if (
            binding is not None
            and context() == self._context
            and binding.is_unchanged(self._values)
        ):
            return binding
        if binding is None or context() != self._context or not binding.is_current():
            pipeline._cursor_state.claim()
            pipeline._check_settings()
            pipeline._put_on_mesh()
            binding = self.bind(pipeline)
        found = cursor(pipeline)
        pipeline._cursor_state.hold_as(word(length_of(pipeline.source) or 1))
        values = binding.read()
        if pipeline.sharding is not None and not _are_placed(binding, values, pipeline.sharding):
            pipeline._put_on_mesh()  # values that were assigned since
            binding = self.bind(pipeline)
            values = binding.read()
        if binding is self._binding:
            changed = list(compress(values, map(is_not, values, self._values)))
            i = binding.cursor_index
            if len(changed) > (values[i] is not self._values[i]):
                self._orders = None  # among them may be the key of the order
        else:
            changed, self._orders = values, None
        self._binding = None  # until all below is computed
        self._computed.discard()
        self._traced = has_tracer(values if self._traced else changed)
        self._mutable = any(map(_is_mutable, values if self._mutable else changed))
        self.start = settle(found, *cutting(pipeline))
        self._values, self._context = values, context()
        self._binding = binding
        return binding

    def moved(self, pipeline: "Pipeline", start: Cursor | None) -> None:
        """Takes note that the cursor was moved to the settled `start`.

        `start` is None if it is not known: traced, or moved by the function of a scan.

        What is cached stays valid; other changes are for the next look to notice.
        """
        if self._binding is None or self._traced:
            self._binding = None  # what is known of a trace ends with it: look anew
        elif start is not None:
            self._computed.discard()
            self.start = start
            self._values[self._binding.cursor_index] = pipeline._cursor_state.get_raw_value()

    def foresee(self, pipeline: "Pipeline") -> None:
        """Warns, as a loop begins, of a stage that will refuse its shorter last batch."""
        binding, (size, length, last_batch) = self._binding, cutting(pipeline)
        if length is None or last_batch != "keep" or pipeline._sink == SOURCE:
            return
        whole, over = divmod(length - self.start.offset, size)
        cut = Cut(over, 1, False)
        if binding is None or not (whole and over) or binding.foreseen == cut:
            return
        binding.foreseen = cut
        reason = refusal(binding.structure, self._values, cut)
        if reason is not None:
            warnings.warn(
                f"The last batch of this loop will have {cut.size} rows, not {size}, and will "
                f"fail: {reason}\nLet the stage take any number of rows, or build the pipeline "
                'with last_batch="drop" or "pad".',
                stacklevel=4,
            )

    def read_ahead(self, pipeline: "Pipeline") -> ReadAhead | None:
        """What reads rows ahead, if the source is on the host. Call it after `look`."""
        binding = None if self._traced else self._binding
        orders = functools.partial(self._orders_of, pipeline)
        return self.reads.serving(pipeline, binding, self._values, orders)

    def take(
        self, pipeline: "Pipeline", cut: Cut, following: int = 0, loop: bool = False
    ) -> Batch | None:
        """The next batch; None at the end of a stream's pass. Call it after `look`.

        `following` batches of that cut are left in the epoch, and may be computed along with it.
        `loop` says that what follows is cut as `for` cuts it.
        """
        binding = self._binding
        assert binding is not None
        try:
            if self._computed.is_low():
                self._fill(pipeline, cut, following, loop)
            return self.hand_over(pipeline, binding) or None
        except BaseException as error:
            if not isinstance(error, Exception):  # interrupted: the next call may cut otherwise
                self._computed.clear()
            raise

    def is_ready(self) -> bool:
        """Whether the next batch is computed, as of the last look."""
        return len(self._computed.ready) > self._computed.low  # `is_low`, but for a call each batch

    def hand_over(self, pipeline: "Pipeline", binding: Binding) -> Batch:
        """Hands out the next batch, which is ready, and moves the cursor behind it."""
        batch, after, packed, end, read = self._computed.ready[0]
        values = self._values
        if read is not None and read.failures:
            try:
                self.meter.fail(read.failures, max_errors(pipeline))
            except ReadError:
                assert self.reads.ahead is not None
                self.reads.ahead.forget()  # asking again must read again
                self._computed.discard()
                raise
        if after and packed is not None:
            after = {**after, binding.cursor_index: packed}
        if after:
            binding.write(after, values)
        else:  # nearly always
            binding.move(packed)
        self._computed.ready.popleft()
        if read is not None:
            assert self.reads.ahead is not None
            self.reads.ahead.handed_over()
            if read.fetched is None or read.first not in (None, read.start):
                self.reads.pass_end = read.start
            for ended in range(self.start.epoch, end.epoch):
                self.meter.report(ended)
        self.start = end
        if after:
            for i, value in after.items():
                values[i] = value
        else:
            values[binding.cursor_index] = packed
        if self._traced:
            self._binding = None  # what is known of a trace ends with it: look anew
        return batch

    def _fill(self, pipeline: "Pipeline", cut: Cut, following: int, loop: bool) -> None:
        """Puts the next batch into `_computed`, and others with it if that pays."""
        assert self._binding is not None
        seen = Seen(self._binding, self._values, self.start, self._traced, self._mutable)
        ahead = self.read_ahead(pipeline)
        if ahead is None:
            order = functools.partial(self._order, pipeline)
            self._computed.fill(pipeline, seen, order, cut, following)
            return
        started = time.perf_counter()
        batches = ahead.take(self.start, cut, loop, _compute_ahead.AHEAD)
        if loop:
            self.meter.waited_since(started)
        self._computed.fill_from(pipeline, seen, batches, ahead.count)

    def _order(self, pipeline: "Pipeline", start: Cursor, cut: Cut, count: int) -> Any:
        """The order of the epochs in which `count` batches from `start` on lie."""
        if not self._traced:
            orders = self._orders_of(pipeline)
            return orders.along(self._values, start, cut.size * count, cut.epochs)
        assert self._binding is not None
        epoch = start.epoch
        if not is_traced(epoch):
            epoch = self._values[self._binding.cursor_index].dtype.type(epoch)
        return order_program(self._binding.structure, cut.epochs)(self._values, epoch)

    def _orders_of(self, pipeline: "Pipeline") -> Orders:
        if self._orders is None:
            assert self._binding is not None
            kind = self._values[self._binding.cursor_index].dtype
            self._orders = Orders(pipeline, self._binding.structure, kind)
        return self._orders


def _are_placed(binding: Binding, values: Values, sharding: Any) -> bool:
    """Whether all values but the keys, which stay on the host, lie on the mesh."""
    keys = {i for i, x in binding.variables.items() if isinstance(x, BaseKey)}
    return are_placed([x for i, x in enumerate(values) if i not in keys], sharding)


def _is_mutable(value: Any) -> bool:
    """Whether a value can change in place, which no look would notice."""
    if isinstance(value, tuple):
        return any(map(_is_mutable, value))
    if isinstance(value, np.ndarray):
        return value.flags.writeable
    return is_container(value)
