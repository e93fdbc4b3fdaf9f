"""The library's sources, built on the model. `options["source"]` of a program selects one."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .model import (
    Batch,
    Key,
    Refused,
    block_order,
    fold_in,
    gather,
    order,
    threefry2x32,
)

FAR = 2**62  # the length of an endless epoch
PERIOD = 256


class Rows:
    """A source whose records can be gathered. `order_key` is None for the stored order."""

    random_access = True
    empty = ""  # the error code of a pass without a batch, if it is an error

    def __init__(self, program: Any, options: Mapping[str, Any]):
        self.program, self.options = program, options
        self.columns = arranged(program.columns, options.get("data", "dict"))
        if options.get("copy"):
            self.columns = {name: np.array(column) for name, column in self.columns.items()}
        self.bad = set(options.get("unreadable", ()))
        self.length: int | None = options.get("length") or len(next(iter(self.columns.values())))

    def epoch_order(self, order_key: Key, epoch: int) -> Callable[[Any], np.ndarray]:
        """The function from offsets to records in one epoch."""
        key, length = fold_in(order_key, epoch), int(self.length or 0)
        how = self.options.get("shuffle", True)
        if how == "permutation":
            return lambda offsets: permutation(key, length)[offsets]
        if how == "blocks":
            size, window = self.options["block_size"], self.options["window"]
            return lambda offsets: block_order(key, length, size, window, offsets)
        return lambda offsets: order(key, length, offsets)

    def records(self, order_key: Key | None, epochs: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        if order_key is None:
            return offsets
        found = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = self.epoch_order(order_key, int(epoch))(offsets[here])
        return found

    def read(self, records: np.ndarray, epochs: np.ndarray, order_key: Key | None) -> Batch:
        """The rows of these records, in that order."""
        for record in records.tolist():
            if record in self.bad and not self.masks:
                raise self.unreadable(record)
        return gather(self.columns, records)

    @property
    def masks(self) -> bool:
        return self.options.get("on_error") == "mask"

    def unreadable(self, record: int) -> Refused:
        label = type(self).__name__
        return Refused("read", record=record, stage="source", source=label, file="memory")

    def readable(self, records: np.ndarray) -> np.ndarray:
        return np.array([record not in self.bad for record in records.tolist()], bool)

    def get_batch_at(self, start: int, n: int, key: Key) -> Batch:
        """The public method: rows `start`, `start + 1`, ... of the stream under this order key."""
        positions = start + np.arange(n)
        length = int(self.length or 0)
        order_key = None if self.options.get("shuffle") is False else key
        records = self.records(order_key, positions // length, positions % length)
        return self.read(records, positions // length, key)


class RandomAccess(Rows):
    """A source with only `get_batch_at`. Its rows show the arguments of the call."""

    def records(self, order_key: Key | None, epochs: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        return offsets

    def read(self, records: np.ndarray, epochs: np.ndarray, order_key: Key | None) -> Batch:
        assert order_key is not None
        key = np.stack(fold_in(order_key, epochs), axis=1).astype(np.uint32)
        return {"id": records.astype(np.int32), "key": key}


class Endless(RandomAccess):
    """`RandomAccess` without a length."""

    def __init__(self, program: Any, options: Mapping[str, Any]):
        super().__init__(program, options)
        self.length = None


class Storage(Rows):
    """Records in files, which may be damaged."""

    def __init__(self, program: Any, options: Mapping[str, Any]):
        damage = options.get("damage")
        if damage == "pickled":
            raise Refused("field-type", field="id")
        if damage in ("missing", "text", "cut", "flipped"):
            raise Refused("file", file="id.npy")
        super().__init__(program, options)


class Iterable(Rows):
    """A stream of unknown length, read from front to back."""

    random_access = False

    def __init__(self, program: Any, options: Mapping[str, Any]):
        if not len(next(iter(program.columns.values()))):
            raise Refused("empty-source")
        super().__init__(program, options)
        short = program.last_batch == "drop" and int(self.length or 0) < program.batch_size
        self.empty = "empty-source" if short else ""

    def epoch_order(self, order_key: Key, epoch: int) -> Callable[[Any], np.ndarray]:
        """Shuffles each window separately."""
        windows = fold_in(fold_in(order_key, epoch), 2**33)
        window, length = self.options["window"], int(self.length or 0)

        def place(offset: int) -> int:
            number = offset // window
            start = number * window
            span = min(window, length - start)
            own = fold_in(windows, number)
            return start + int(order(own, span, offset - start)[0])

        return lambda offsets: np.array([*map(place, offsets.tolist())], np.int64)

    def get_batch_at(self, start: int, n: int, key: Key) -> Batch:
        raise Refused("random-access")


class Mixture(Rows):
    """Several sources, which follow one another in the columns. A period has a quota of rows of
    each."""

    def __init__(self, program: Any, options: Mapping[str, Any]):
        super().__init__(program, options)
        self.lengths: Sequence[int] = options["lengths"]
        if options.get("differ"):
            raise Refused("specs", text="float32[3] float32[4]")
        self.quotas = quotas(options["weights"])
        each = [(n, q) for n, q in zip(self.lengths, self.quotas, strict=True)]
        self.periods = (
            max(-(-n // q) for n, q in each)
            if options["stop"] == "all"
            else min(n // q for n, q in each)
        )
        if self.periods == 0:
            raise Refused("empty-source")
        self.length = sum(self.quotas) * self.periods
        self.known: dict[Any, np.ndarray] = {}  # the orders of epochs, cached

    def epoch_order(self, order_key: Key, epoch: int) -> Callable[[Any], np.ndarray]:
        if (order_key, epoch) not in self.known:
            self.known[order_key, epoch] = np.array(self.places(order_key, epoch), np.int64)
        return lambda offsets: self.known[order_key, epoch][offsets]

    def places(self, order_key: Key, epoch: int) -> list[int]:
        """The records of an epoch, period by period."""
        period, places = sum(self.quotas), []
        seen = [epoch * self.periods * quota for quota in self.quotas]
        owner = np.repeat(np.arange(len(self.quotas)), self.quotas)
        begins = np.cumsum([0, *self.lengths])
        for number in range(self.periods):
            key = fold_in(fold_in(order_key, epoch), number + 2**40)
            for source in owner[order(key, period, np.arange(period))].tolist():
                places.append(int(begins[source]) + seen[source] % self.lengths[source])
                seen[source] += 1
        return places


def quotas(weights: Sequence[float]) -> list[int]:
    """The rows of each source in a period: nearest to the weights, in the shortest such period."""
    shares = np.asarray(weights) / math.fsum(weights)
    found = [
        (round(float(np.abs(np.array(q) / n - shares).max()), 9), n, q)
        for n in range(1, PERIOD + 1)
        if min(q := split(shares, n))
    ]
    if not found:
        raise Refused("weights")
    return min(found)[2]


def split(shares: np.ndarray, rows: int) -> list[int]:
    """Splits `rows` by shares, rounded down. Rows left over go to the largest remainders."""
    exact = shares * rows
    counts = np.floor(exact + 1e-9).astype(int)
    for i in np.argsort(counts - exact, kind="stable")[: rows - counts.sum()]:
        counts[i] += 1
    return counts.tolist()


def permutation(key: Key, length: int) -> np.ndarray:
    """`jax.random.permutation`: sorts the records by random words, in as many rounds as JAX."""
    records = np.arange(length)
    for _ in range(math.ceil(3 * math.log(length) / math.log(2**32 - 1))):
        ones = np.arange(2)
        words = np.stack(threefry2x32(key, (ones * 0, ones)), axis=1)
        key, sub = (words[0, 0], words[0, 1]), (words[1, 0], words[1, 1])
        high, low = threefry2x32(sub, (records * 0, np.arange(length)))
        records = records[np.argsort(high ^ low, kind="stable")]
    return records


def arranged(columns: Mapping[str, Any], form: str) -> Mapping[str, Any]:
    """The fields of data in memory that is given in this form. Nested fields have their path as
    name."""
    if form == "nested":
        return {name if name == "id" else f"inner.{name}": x for name, x in columns.items()}
    return {"data": columns["id"]} if form == "array" else columns


def package(program: Any, options: Mapping[str, Any]) -> Rows:
    """A source that needs a package that is not installed."""
    raise Refused("missing-package", text=f"pip install 'library[{options['extra']}]'")


def no_source(program: Any, options: Mapping[str, Any]) -> Rows:
    raise Refused("source-type")


SOURCES: Mapping[str, Callable[[Any, Mapping[str, Any]], Rows]] = {
    "memory": Rows,
    "gather": Rows,
    "random-access": RandomAccess,
    "endless": Endless,
    "storage": Storage,
    "iterable": Iterable,
    "mixture": Mixture,
    "package": package,
    "none": no_source,
}


def source_of(program: Any, options: Mapping[str, Any]) -> Rows:
    return SOURCES[options.get("form", "memory")](program, options)
