"""What a live pipeline has seen and made ready: the batches of `step` and `for` come from here."""

import functools
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import compress
from operator import is_, is_not
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from .._host_memory import keep_memory, to_device
from .._keys import SOURCE, BaseKey
from .._mesh import are_placed, spans_processes
from .._order import word
from .._rows import Cut, batches_of, pack, pack_each, settle
from .._settings import checks_values, chosen_device, context, on_cpu, processors
from .._types import Batch, Cursor, is_traced
from .._variables import flatten
from .._xla import SIDE_BY_SIDE, beside
from ..errors import ReadError
from ..sources._base import EagerSourceBase, Fetched, length_of
from ..sources._iterable import StreamSource
from . import _ahead
from ._ahead import Ahead, at_once, fits, with_cursors
from ._binding import (
    Binding,
    Changes,
    Structure,
    Values,
    has_tracer,
    is_container,
)
from ._blame import blame, by_hand
from ._core import cursor, cutting, max_errors, refusal, updated
from ._feed import Feed
from ._meter import Meter
from ._orders import Orders, order_program
from ._program import Program, batch_program
from ._reading import Fed, Supply, on_host

if TYPE_CHECKING:
    from ._pipeline import Pipeline

NOTHING_READ: tuple[Binding | None, tuple[Any, ...], list[int]] = None, (), []
"""A binding (here none), and of it what `_what_is_read` tells."""

BINDINGS = 4
"""How many sets of `modules` a pipeline remembers."""


class _Reading(NamedTuple):
    """A feed, and all that it depends on: it serves as long as these are the same."""

    static: tuple[Any, ...]
    values: list[Any]
    feed: Feed


class Runtime:
    """What a live pipeline needs to hand out batches fast; nothing that a copy of it would miss.

    All of it is derived from the pipeline's attributes, and checked against them at every batch.
    `_values` are what is checked, and vouch for all else: they are assigned last, so that the next
    look notices what an interrupt has left half done.
    """

    def __init__(self):
        self.lock = threading.RLock()
        self._bindings: dict[tuple[int, ...], tuple[list[weakref.ref], Binding]] = {}
        # As of the last look at the pipeline: its values, and what follows from them.
        self._binding: Binding | None = None
        self._context = context()
        self._values: Values = []
        self._traced = self._mutable = False
        self.start = Cursor(0, 0)
        self._orders: Orders | None = None
        self._ahead = Ahead()
        self._turn = 0  # beside which others the last program runs
        self._reading: _Reading | None = None
        self._close_feed: Callable[[], Any] = lambda: None
        self._checked: Values | None = None  # what it was last compared with
        self._depends = NOTHING_READ
        self.meter = Meter()
        self.pass_end: Cursor | None = None
        """Where a stream was last found to end: the same place as the start of the next epoch."""

    def bind(self, pipeline: "Pipeline", modules: Sequence[Any] = ()) -> Binding:
        """The leaves of the pipeline and `modules`, bound anew if an attribute has changed."""
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
        except TypeError:  # a tuple, say: it cannot be told from a later one at the same address
            return binding
        if ids in self._bindings:  # so that none keeps alive what was replaced
            self._bindings.clear()
        if len(self._bindings) >= BINDINGS:
            del self._bindings[next(iter(self._bindings))]
        self._bindings[ids] = refs, binding
        return binding

    def look(self, pipeline: "Pipeline") -> Binding:
        """Notices whatever the user has changed since the last batch: `start` is right after it.

        `start` is the settled cursor: plain integers, unless the user is tracing it.
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
            pipeline._put_on_mesh()  # what was given another value since
            binding = self.bind(pipeline)
            values = binding.read()
        if binding is self._binding:
            changed = list(compress(values, map(is_not, values, self._values)))
            i = binding.cursor_index
            if len(changed) > (values[i] is not self._values[i]):
                self._orders = None  # a key has changed, maybe
        else:
            changed, self._orders = values, None
        self._binding = None  # nothing is vouched for until all of it is known
        self._ahead.discard()
        self._traced = has_tracer(values if self._traced else changed)
        self._mutable = any(map(_is_mutable, values if self._mutable else changed))
        self.start = settle(found, *cutting(pipeline))
        self._values, self._context = values, context()
        self._binding = binding
        return binding

    def moved(self, pipeline: "Pipeline", start: Cursor | None) -> None:
        """The cursor has been put at the settled `start`, if it is known where that is.

        What else is known stays known; what else has changed is for the next look to notice.
        """
        if self._binding is None or self._traced:
            self._binding = None  # what is known of a trace ends with it: look anew
        elif start is not None:
            self._ahead.discard()
            self.start = start
            self._values[self._binding.cursor_index] = pipeline._cursor_state.get_raw_value()

    @property
    def values(self) -> Values:
        """The pipeline's values as of the last look."""
        return self._values.copy()

    def foresee(self, pipeline: "Pipeline") -> None:
        """Warns of a stage that will refuse the shorter batch at the end of a loop that begins."""
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

    def feed(self, pipeline: "Pipeline") -> Feed | None:
        """What reads rows ahead, if the source is on the host. Call it after `look`."""
        # A look that has noticed anything has made a new list of values.
        if self._checked is self._values:
            return self._reading and self._reading.feed
        source, binding = pipeline.source, self._binding
        reader = source.stream if isinstance(source, StreamSource) else None
        reader = source.reader if isinstance(source, EagerSourceBase) else reader
        if reader is None:
            self._close_feed()
            self._reading, self._checked, self._depends = None, self._values, NOTHING_READ
            return None
        if binding is None or self._traced:
            return None
        if binding is not self._depends[0]:
            self._depends = binding, *_what_is_read(pipeline, binding)
        _, depends, indices = self._depends
        here, x64, device = on_cpu(), bool(jax.config.read("jax_enable_x64")), chosen_device()
        static, read = (*depends, here, x64, device), [self._values[i] for i in indices]
        known = self._reading
        if known is not None and known.static == static and all(map(is_, known.values, read)):
            self._checked = self._values
            return known.feed
        self._reading = None  # until another one stands: what follows may fail
        self._close_feed()
        orders = self._orders_of(pipeline, binding)
        # Others may be replaced while this feed lives, which should not keep them.
        kept = {*indices, binding.cursor_index}
        values = [x if i in kept else np.uint32(0) for i, x in enumerate(self._values)]

        def order(epoch: int) -> Any:
            with on_host():
                return orders.at(values, epoch, 1)

        size, length, last_batch = cutting(pipeline)
        assert isinstance(source, EagerSourceBase | StreamSource)
        window = source.window if isinstance(source, StreamSource) and source.shuffle else None
        masks = isinstance(source, EagerSourceBase) and source.masks
        supply = Supply(
            reader=reader,
            spec=source.element_spec,
            size=size,
            length=length,
            last_batch=last_batch,
            masks=masks,
            bare=pipeline._sink == SOURCE,
            on_cpu=here,
            x64=x64,
            device=device,
            sharding=pipeline.sharding,
            order=order,
            window=window,
        )
        feed, self.pass_end = Feed(supply, pipeline.num_threads), None
        self._close_feed = weakref.finalize(self, feed.close)  # once called, it lets go of it
        self._reading, self._checked = _Reading(static, read, feed), self._values
        return feed

    def take(
        self, pipeline: "Pipeline", cut: Cut, following: int = 0, loop: bool = False
    ) -> Batch | None:
        """The next batch. Call it after `look`. None is the end of a stream's pass.

        `following` batches of that cut are left in the epoch: they may be computed along with
        it. What is computed ahead counts only as long as no value of the pipeline has changed, so
        it can never be seen. `loop` says that they are cut as `for` cuts them.
        """
        binding = self._binding
        assert binding is not None
        try:
            if self._ahead.is_low():
                self._fill(pipeline, binding, cut, following, loop)
            return self.hand_over(pipeline, binding) or None
        except BaseException as error:
            if not isinstance(error, Exception):  # who comes next may cut otherwise
                self._ahead.clear()
            raise

    def is_ready(self) -> bool:
        """Whether the next batch is computed, as of the last look."""
        return len(self._ahead.ready) > self._ahead.low  # `is_low`, but for a call each batch

    def hand_over(self, pipeline: "Pipeline", binding: Binding) -> Batch:
        """The next batch, which is computed: the cursor moves behind it."""
        (batch, after), packed, end, fed = self._ahead.ready[0]
        values = self._values
        if fed is not None and fed.failures:
            try:
                self.meter.fail(fed.failures, max_errors(pipeline))
            except ReadError:
                assert self._reading is not None
                self._reading.feed.forget()  # so that a retry reads again
                self._ahead.discard()
                raise
        if after and packed is not None:
            after = {**after, binding.cursor_index: packed}
        if after:
            binding.write(after, values)
        else:  # as a rule
            binding.move(packed)
        self._ahead.ready.popleft()
        if fed is not None:
            assert self._reading is not None
            self._reading.feed.handed_over()
            if fed.fetched is None or fed.first not in (None, fed.start):
                self.pass_end = fed.start
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

    def _fill(
        self, pipeline: "Pipeline", binding: Binding, cut: Cut, following: int, loop: bool
    ) -> None:
        """Sees to it that the next batch is in `_ahead`."""
        self._ahead.before_filling()
        feed = self.feed(pipeline)
        if feed is None:
            self._compute(pipeline, binding, cut, following)
        else:
            self._compute_fed(pipeline, binding, feed, cut, loop)
        self._ahead.after_filling()

    def _compute(self, pipeline: "Pipeline", binding: Binding, cut: Cut, following: int) -> None:
        """Fills `_ahead` with the next batch, or with several if that has proved worth it."""
        keep_memory()
        ahead = self._ahead
        cursor_index = binding.cursor_index if is_traced(self.start.epoch) else None
        single = batch_program(binding.structure, cut, 1, cursor_index, False)
        ahead.patience -= 1
        sides, most = self._sides(single), 1
        if self._takes_several(pipeline, single):
            size, length, last_batch = cutting(pipeline)
            most = at_once(single, sides, length and batches_of(size, length, last_batch))
        several = max(1, most // sides)
        # While the last are handed over, a program that runs beside others computes the next.
        ahead.low = most - several
        while ahead.is_low():
            start, values, due = self.start, self._values, max(1, following + 1)
            if ahead.ready:
                _, packed, start, _ = ahead.ready[-1]
                values = updated(values, {binding.cursor_index: packed})
                due -= len(ahead.ready)
                if due < 1:
                    break
            count = several if fits(several, due, start, cut, single) else 1
            again = max(0, count - due)
            if again:
                first = Cursor(start.epoch, start.offset - again * cut.size)
                packed = pack(first, length_of(pipeline.source))
                values = updated(values, {binding.cursor_index: packed})
            else:
                first = start
            args = values, self._order(pipeline, binding, first, cut, count)
            side = self._next_side(sides) if most > 1 else None
            try:
                found = self._call(pipeline, binding, cut, count, cursor_index, side, args)[again:]
            except Exception:
                if not ahead.ready:
                    raise
                ahead.low = 0  # it fails again when its turn has come
                return
            single.keeps_state = any(after for _, after in found)
            if cursor_index is None:
                ahead.ready.extend(with_cursors(found, start, cut.size, *cutting(pipeline)[1:]))
            else:
                ahead.ready.extend((each, None, start, None) for each in found)
            if single.keeps_state:  # what comes next needs the values that this one leaves
                ahead.low = 0

    def _sides(self, single: Program) -> int:
        """How many programs like this one are best called together, to run side by side.

        For one at a time, its kernels are shared out among all processors. Better is a program for
        each of these, but no batch may then depend on the one before.
        """
        able = single.shared and SIDE_BY_SIDE and jax.local_device_count() == 1
        return processors() if able and single.keeps_state is False else 1

    def _next_side(self, sides: int) -> int | None:
        """The number of the next program among those that run side by side, if any do."""
        if sides == 1:
            return None
        self._turn = self._turn % sides + 1
        return self._turn

    def _call(
        self,
        pipeline: "Pipeline",
        binding: Binding,
        cut: Cut,
        count: int,
        cursor_index: int | None,
        side: int | None,
        args: tuple[Any, ...],
    ) -> list[tuple[Batch, Changes]]:
        """The results of the program for so many batches, or an error that names the stage."""
        alone = side is not None and count > 1
        program = batch_program(binding.structure, cut, count, cursor_index, alone)
        try:
            with nullcontext() if side is None else beside(side):
                return program(*args)
        except Exception as error:
            blame(pipeline, program, error, functools.partial(by_hand, binding, cut, *args))
            raise

    def _takes_several(self, pipeline: "Pipeline", single: Program) -> bool:
        """Whether batches may be computed before they are asked for."""
        return (
            self._ahead.patience < 0
            and not self._traced
            and not self._mutable
            and not single.host_nodes
            # An error about what a batch holds is for that batch.
            and not checks_values()
            # All must run the same programs, and how many batches those are for the clock decides.
            and not spans_processes(pipeline.sharding)
            and self.start.epoch < 2**32 - 1  # after the last batch of all comes an error
            # Until one has shown whether others can be computed beside it.
            and not (single.shared and single.keeps_state is None)
        )

    def _compute_fed(
        self, pipeline: "Pipeline", binding: Binding, feed: Feed, cut: Cut, loop: bool
    ) -> None:
        """Fills `_ahead` from rows that were read on the host."""
        started = time.perf_counter()
        ready = feed.take(self.start, cut, loop, _ahead.AHEAD)
        if loop:
            self.meter.waited_since(started)
        if pipeline._sink == SOURCE or ready[0].fetched is None:  # a program would only copy
            batches = to_device([_unstaged(fed.fetched, pipeline.mask_name) for fed in ready])
            self._append(pipeline, [(batch, {}) for batch in batches], ready)
            return
        cut = ready[0].cut
        single = batch_program(binding.structure, cut, 1, None, False)
        self._ahead.patience -= 1
        sides = self._sides(single)
        # As many as were read in one go or one, so that there are two programs to compile.
        full = len(ready) == feed.count <= at_once(single, sides)
        if not (full and self._takes_several(pipeline, single)):
            ready = ready[:1]
        kind = self._values[binding.cursor_index].dtype.type
        given = [(fed.fetched, Cursor(*map(kind, fed.first or fed.start))) for fed in ready]
        count, results = max(1, len(ready) // sides), []
        for i in range(0, len(ready), count):
            args = self._values, None, given[i : i + count]
            side = self._next_side(sides) if len(ready) > 1 else None
            results += self._call(pipeline, binding, cut, len(args[2]), None, side, args)
        single.keeps_state = any(after for _, after in results)
        self._append(pipeline, results, ready)

    def _append(
        self,
        pipeline: "Pipeline",
        results: Sequence[tuple[Batch, Changes]],
        ready: Sequence[Fed],
    ) -> None:
        """Puts batches in a row into `_ahead`, each with the cursor behind it."""
        after = pack_each([fed.after for fed in ready], length_of(pipeline.source))
        for result, packed, fed in zip(results, after, ready, strict=True):
            self._ahead.ready.append((result, packed, fed.after, fed))

    def _order(
        self, pipeline: "Pipeline", binding: Binding, start: Cursor, cut: Cut, count: int
    ) -> Any:
        """The order of the epochs that these batches are in, as far as it has to be known."""
        if not self._traced:
            orders = self._orders_of(pipeline, binding)
            return orders.along(self._values, start, cut.size * count, cut.epochs)
        epoch = start.epoch
        if not is_traced(epoch):
            epoch = self._values[binding.cursor_index].dtype.type(epoch)
        return order_program(binding.structure, cut.epochs)(self._values, epoch)

    def _orders_of(self, pipeline: "Pipeline", binding: Binding) -> Orders:
        if self._orders is None:
            kind = self._values[binding.cursor_index].dtype
            self._orders = Orders(pipeline, binding.structure, kind)
        return self._orders


def _what_is_read(pipeline: "Pipeline", binding: Binding) -> tuple[tuple[Any, ...], list[int]]:
    """What of a pipeline says which rows are read, and how: what is static, and the places of the
    values.

    A stage has no part in it: a stream would be read again from the start for each that changes.
    """
    graphdef, flat = flatten((pipeline.source, pipeline._base))
    how = pipeline._sink == SOURCE, pipeline.sharding, pipeline.num_threads
    own = set(map(id, flat.leaves))
    places = [i for i, x in binding.leaves() if id(x) in own]
    return (Structure(graphdef, {}), *cutting(pipeline), *how), places


def _are_placed(binding: Binding, values: Values, sharding: Any) -> bool:
    """Whether values lie on the mesh, but for keys, which are left to the host."""
    keys = {i for i, x in binding.variables.items() if isinstance(x, BaseKey)}
    return are_placed([x for i, x in enumerate(values) if i not in keys], sharding)


def _unstaged(fetched: Fetched | None, mask_name: str) -> Batch:
    """What is handed out where no stage stands between; nothing at the end of a pass."""
    if fetched is None:
        return {}
    batch, rows = fetched
    return batch if rows.mask is None else {**batch, mask_name: rows.mask}


def _is_mutable(value: Any) -> bool:
    """Whether a value can change and stay the same object, so that no look can notice."""
    if isinstance(value, tuple):
        return any(map(_is_mutable, value))
    if isinstance(value, np.ndarray):
        return value.flags.writeable
    return is_container(value)
