"""How reading ends with the program."""

import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

ENDING = threading.Event()
"""Set when the program ends. What reads record by record then stops between two: a thread that is
in foreign code when the interpreter goes may take the process down with it."""


class EndingError(RuntimeError):
    """Nobody wants the rows that are being read."""

    def __init__(self):
        super().__init__("The program is ending, and no rows are read any more.")


def while_running(records: Iterable[T]) -> Iterator[T]:
    """Each of the records, until the program ends."""
    for record in records:
        if ENDING.is_set():
            raise EndingError()
        yield record
