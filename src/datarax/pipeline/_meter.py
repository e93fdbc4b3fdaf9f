"""Times of loops and scans, records that could not be read, and the progress bar."""

import logging
import time
from collections.abc import Sequence
from itertools import islice
from typing import Literal, NamedTuple

from .._extras import require
from ..errors import ReadError

LOG = logging.getLogger("datarax")

LISTED = 20
"""The most masked records of an epoch that are named in the log."""


class Stats(NamedTuple):
    """What `for` and `scan` have cost since the pipeline was built, in seconds of the wall clock.

    `waited` is how long the consumer waited for rows that were not read yet, `computed` the rest of
    the time spent in loops and scans, compiling included. `masked` counts the records that could
    not be read, each once an epoch.
    """

    batches: int
    waited: float
    computed: float
    masked: int

    @property
    def limit(self) -> Literal["reading", "computing"]:
        """What took longer, and so limits the speed."""
        return "reading" if self.waited > self.computed else "computing"


class Meter:
    """Counts for `Pipeline.stats()`, and keeps the budget of `max_errors`."""

    def __init__(self):
        self.batches, self.waited, self.elapsed, self.masked = 0, 0.0, 0.0, 0
        self._since: float | None = None
        self._failures: dict[int, dict[int | None, ReadError]] = {}

    def begin(self) -> None:
        """Starts the clock of a loop or a scan."""
        self._since = time.perf_counter()

    def waited_since(self, start: float) -> None:
        """The consumer has waited for rows since `start`."""
        self.waited += time.perf_counter() - start

    def lap(self, batches: int) -> None:
        """So many batches have been handed over."""
        now = time.perf_counter()
        if self._since is not None:
            self.elapsed += now - self._since
        self._since = now
        self.batches += batches

    def end(self) -> None:
        """Stops the clock."""
        self.lap(0)
        self._since = None

    def fail(self, failures: Sequence[tuple[int, ReadError]], most: int) -> None:
        """Counts masked rows; raises if an epoch has more than `most`."""
        for epoch, error in failures:
            known = self._failures.setdefault(epoch, {})
            if error.record not in known and len(known) >= most:
                raise ReadError(
                    error.source,
                    error.file,
                    error.record,
                    f"{error.__cause__!r}; before it {len(known)} of epoch {epoch} could not be "
                    f"read either, which is all that max_errors={most} allows",
                    way_out="Raise `max_errors` to go on without more of them.",
                ) from error
            self.masked += error.record not in known
            known[error.record] = error

    def report(self, epoch: int) -> None:
        """Logs, at the end of an epoch, the records that were masked in it."""
        known = self._failures.pop(epoch, {})
        if known:
            reasons = [
                f"\n  {x.source}, record {x.record} of {x.file}: {x.__cause__!r}"
                for x in islice(known.values(), LISTED)
            ]
            if len(known) > LISTED:
                reasons.append(f"\n  and {len(known) - LISTED} more")
            LOG.warning(
                "Masked in epoch %d: %d of the records%s", epoch, len(known), "".join(reasons)
            )

    def stats(self) -> Stats:
        computed = max(self.elapsed - self.waited, 0.0)
        return Stats(self.batches, self.waited, computed, self.masked)


class Bar:
    """A progress bar by rich; nothing if not `shown`."""

    def __init__(self, shown: bool, total: int | None, title: str):
        self.shown = shown
        if not shown:
            return
        progress = require("rich.progress", "progress")
        of_all = "" if total is None else f" of {total}"
        self._bar = progress.Progress(
            *progress.Progress.get_default_columns(),
            progress.TextColumn(f"{{task.completed}}{of_all} {{task.fields[note]}}"),
        )
        self._task = self._bar.add_task(title, total=total, note="")
        self._bar.start()

    def update(self, batches: int, meter: Meter) -> None:
        if self.shown:
            stats = meter.stats()
            whole = stats.waited + stats.computed
            note = f"waiting {stats.waited / whole:.0%}" if whole else ""
            self._bar.update(self._task, advance=batches, note=note)

    def close(self) -> None:
        if self.shown:
            self._bar.stop()
            self.shown = False
