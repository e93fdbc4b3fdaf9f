"""Records counted on from one part of a storage to the next: its files, or pieces of these."""

from collections.abc import Iterator, Sequence

import numpy as np


class Parts:
    """Parts in a row, of so many records each."""

    def __init__(self, lengths: Sequence[int]):
        self._ends = np.cumsum(lengths, dtype=np.int64)

    def __len__(self) -> int:
        """The records of all parts."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def part_of(self, record: int) -> int:
        return int(np.searchsorted(self._ends, record, "right"))

    def divide(self, records: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """The parts that hold some of the records: of each the rows that ask for it, and the places
        of their records in it."""
        records = records.astype(np.int64)
        part_of = np.searchsorted(self._ends, records, "right")
        for part in np.unique(part_of).tolist():
            rows = np.flatnonzero(part_of == part)
            yield part, rows, records[rows] - (self._ends[part - 1] if part else 0)
