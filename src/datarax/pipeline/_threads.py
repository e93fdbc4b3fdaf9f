"""Threads that read ahead: an interrupt cannot block them, and no program waits for them to end.

The consumer waits on a `SimpleQueue`, which is written in C. The locks of a `Future` or an executor
are taken by Python code, and a KeyboardInterrupt between two of its lines can leave them locked.
"""

import atexit
import os
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from ..sources._reader import ENDING, EndingError

T = TypeVar("T")

GRACE = 3.0
"""Seconds that the interpreter waits at exit for threads to finish their reads. A thread in foreign
code at that moment can crash the process; one that waits for rows that never come would block the
exit for ever."""


class Outcome(Generic[T]):
    """The result of a read by a thread: a value, or an error that `result` raises.

    A read that takes long can tell `parts` of its result before. Only one thread at a time may
    wait, for the result or for a part.
    """

    def __init__(self):
        self.known = False
        self.parts: list[Any] = []
        self._urgent = False  # whether somebody waits for the next part
        self._told: SimpleQueue[None] = SimpleQueue()

    def tell_part(self, part: Any) -> None:
        """Adds a part. Who waits for the whole result is not woken."""
        # First the part, then a look at `_urgent`; `wait_for_part` does both the other way round.
        # So one of the two threads sees what the other has done.
        self.parts.append(part)
        if self._urgent:
            self._told.put(None)

    def tell(self, value: T | None = None, error: BaseException | None = None) -> None:
        """Sets the value or the error, once."""
        self._value, self._error = value, error
        self.known = True
        self._told.put(None)

    def error(self) -> BaseException | None:
        """Waits for the outcome; None if it is a value."""
        while not self.known:
            self._told.get()
        return self._error

    def result(self) -> T:
        """Waits for the value, or raises the error."""
        error = self.error()
        if error is not None:
            raise error
        # Without an error there is a value, which the type checker cannot know: T may include None.
        return self._value  # pyright: ignore[reportReturnType]

    def wait_for_part(self, known: int, patience: float) -> None:
        """Waits for the outcome; from `patience` seconds on, only until there are more than `known`
        parts."""
        if not (self.known or self._urgent):
            try:
                self._told.get(timeout=patience)
            except Empty:
                self._urgent = True
        while not self.known and len(self.parts) <= known:
            self._told.get()


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
        """Raises if the threads are closed, or belong to the parent of a forked process."""
        if self._process != os.getpid():
            raise RuntimeError(
                "This process was forked from the one that reads the rows, and has none of its "
                "threads. Build the pipeline in the process that uses it, and start that one with "
                "the method 'spawn', as JAX needs it."
            )
        if self.closed:
            raise EndingError()

    def close(self) -> None:
        """Tells the threads to end after their current job; does not wait for them."""
        self.closed = True
        for _ in range(self._count):
            self._jobs.put(None)

    def _work(self) -> None:
        _RUNNING[threading.current_thread()] = self
        try:
            while (job := self._jobs.get()) is not None:
                job()
                del job  # do not keep what it holds while waiting
        finally:
            del _RUNNING[threading.current_thread()]


_RUNNING: dict[threading.Thread, Threads] = {}
"""The running threads. No lock guards it: a finalizer could run in the thread that holds the lock.
Adding, removing and copying are atomic under the GIL."""


@atexit.register
def _end() -> None:
    ENDING.set()
    running, until = list(_RUNNING.copy().items()), time.monotonic() + GRACE
    for _, threads in running:
        threads.close()
    for thread, _ in running:
        thread.join(max(0.0, until - time.monotonic()))
