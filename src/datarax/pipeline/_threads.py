"""Threads that read ahead: an interrupt cannot wedge them, and no program waits for them to end.

Who waits for rows waits for a `SimpleQueue`, which is C from end to end. What Python code locks,
as a `Future` or an executor does, an interrupt between two of its lines can leave locked for good.
"""

import atexit
import os
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

from ..sources._reader import ENDING, EndingError

T = TypeVar("T")

GRACE = 3.0
"""Seconds that a program which ends gives its threads to come to the end of what they read. What
is in the middle of foreign code when the interpreter goes may take the process down with it; who
waits for rows that never come would else keep it for ever."""


class Outcome(Generic[T]):
    """What a thread will have found: a value, or an error that `result` raises."""

    def __init__(self):
        self.known = False
        self._told: SimpleQueue[None] = SimpleQueue()

    def tell(self, value: T | None = None, error: BaseException | None = None) -> None:
        """Says what it is, once."""
        self._value, self._error = value, error
        self.known = True
        self._told.put(None)

    def error(self) -> BaseException | None:
        """Waits until it is known. One thread at a time may wait."""
        if not self.known:
            self._told.get()
        return self._error

    def result(self) -> T:
        """Waits for the value, or raises the error. One thread at a time may wait."""
        error = self.error()
        if error is not None:
            raise error
        # Without an error there is a value, which the types cannot say: T may itself have None.
        return self._value  # pyright: ignore[reportReturnType]


class Threads:
    """`count` threads that begin jobs in the order in which they were submitted."""

    def __init__(self, count: int, name: str):
        self.closed = False
        self._process = os.getpid()
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._count = count
        try:
            for i in range(count):
                thread = threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True)
                thread.start()
        except BaseException:  # an interrupt, or too many threads
            self.close()
            raise

    def submit(self, job: Callable[[], None]) -> None:
        """Calls `job()` in one of the threads; it must not raise."""
        self.check_open()
        self._jobs.put(job)

    def check_open(self) -> None:
        """Raises if nobody does anything any more."""
        if self._process != os.getpid():
            raise RuntimeError(
                "This process was forked from the one that reads the rows, and has none of its "
                "threads. Build the pipeline in the process that uses it, and start that one with "
                "the method 'spawn', as JAX needs it."
            )
        if self.closed:
            raise EndingError()

    def close(self) -> None:
        """Lets the threads end after what they are at. Does not wait for them."""
        self.closed = True
        for _ in range(self._count):
            self._jobs.put(None)

    def _work(self) -> None:
        _RUNNING[threading.current_thread()] = self
        try:
            while (job := self._jobs.get()) is not None:
                job()
                del job  # with all that it holds
        finally:
            del _RUNNING[threading.current_thread()]


_RUNNING: dict[threading.Thread, Threads] = {}
"""Without a lock, which a finalizer that closes some could meet held by its own thread: to add one,
to take one out and to copy all are one step each of the interpreter."""


@atexit.register
def _end() -> None:
    ENDING.set()
    running, until = list(_RUNNING.copy().items()), time.monotonic() + GRACE
    for _, threads in running:
        threads.close()
    for thread, _ in running:
        thread.join(max(0.0, until - time.monotonic()))
