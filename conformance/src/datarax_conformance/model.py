"""The model: the law of the spec as one NumPy program.

Made from the chapters in `spec/` by `python -m datarax_conformance.spec build`; change it there.
"""

import base64
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Program:
    """What a pipeline is built from, as plain data."""

    columns: Mapping[str, np.ndarray]
    batch_size: int
    last_batch: str = "keep"
    seed: int | None = None  # None: the stored order
    nodes: Mapping[str, str] = field(default_factory=dict)  # name -> operation
    edges: Mapping[str, Sequence[str]] = field(default_factory=dict)  # name -> predecessors
    sink: str | None = None


class Refused(ValueError):
    """A program, a state or a call that the spec refuses, with the code of the error."""

    def __init__(self, code: str, **details: Any):
        super().__init__(f"{code}: {details}")
        self.code = code
        self.details = details


def gather(columns: Mapping[str, np.ndarray], records: np.ndarray) -> Batch:
    """The rows of the given records, as fresh arrays."""
    return {name: column[records] for name, column in columns.items()}


class Cursor(NamedTuple):
    """The place of the next record."""

    epoch: int
    offset: int


class Stream:
    """The stream of a program: the whole law in one object."""

    def __init__(self, program: Program):
        self.length = check(program)
        self.program = program
        self.plan = make_plan(program)
        self.base = None if program.seed is None else base_key(program.seed)
        self.states = {name: 0 for name in self.plan.order}
        self.cursor = Cursor(0, 0)
        self.next_batch(stay=False)  # a stage that does not fit fails here, and nothing moves

    def next_batch(self, stay: bool) -> tuple[Batch, dict[str, int], Cursor]:
        """The batch at the cursor, and what the stages and the cursor are after it.

        With `stay` the batch ends where its epoch ends.
        """
        program, start, length = self.program, self.cursor, self.length
        count = program.batch_size
        if stay or program.last_batch == "pad":
            count = min(count, length - start.offset)
        positions = start.offset + np.arange(count)
        epochs, offsets = start.epoch + positions // length, positions % length
        records = order_of(self.base, epochs, offsets, length)

        batch = gather(program.columns, records)
        if program.last_batch == "pad":
            batch = pad(batch, program.batch_size)
            missing = (0, program.batch_size - count)
            epochs, records = np.pad(epochs, missing), np.pad(records, missing)
        keys = StageKeys(self.base, epochs, records)
        batch, states = run(self.plan, batch, self.states, keys)

        passed, offset = divmod(start.offset + count, length)
        after = settle(Cursor(start.epoch + passed, offset), length, program)
        return batch, states, after

    def take(self, stay: bool) -> Batch:
        """Hand out the next batch: only now does anything move."""
        batch, self.states, self.cursor = self.next_batch(stay)
        return batch

    def step(self) -> Batch:
        return self.take(stay=False)

    def __iter__(self) -> Iterator[Batch]:
        return EpochIterator(self)

    def scan(self, length: int | None = None) -> Batch:
        return scan(self, length)

    def seek(self, *, epoch: int, offset: int) -> None:
        if not (0 <= epoch < 2**32 and 0 <= offset < self.length):
            raise Refused("seek", epoch=epoch, offset=offset, length=self.length)
        self.cursor = settle(Cursor(epoch, offset), self.length, self.program)

    def reset(self) -> None:
        self.seek(epoch=0, offset=0)

    def get_state(self) -> bytes:
        return save(self)

    def set_state(self, state: bytes) -> None:
        try:
            self.cursor, self.states = load(self, state)
        except Refused:
            raise
        except Exception as error:
            raise Refused("state", field="form") from error


def settle(cursor: Cursor, length: int, program: Program) -> Cursor:
    """Move on from a place where no batch can start."""
    if program.last_batch == "drop" and cursor.offset + program.batch_size > length:
        return Cursor(cursor.epoch + 1, 0)
    return cursor


MASK = "mask"


def pad(batch: Batch, batch_size: int) -> Batch:
    """Zero rows up to `batch_size`, and the mask that is False there."""
    rows = len(next(iter(batch.values())))
    mask = np.arange(batch_size) < rows
    padded = {
        name: np.concatenate([leaf, np.zeros((batch_size - rows, *leaf.shape[1:]), leaf.dtype)])
        for name, leaf in batch.items()
    }
    return padded | {MASK: mask}


class EpochIterator:
    """Hands out the rest of the epoch that the stream is in when the iterator is made."""

    def __init__(self, stream: Stream):
        self.stream = stream
        self.epoch: int | None = stream.cursor.epoch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.stream.cursor.epoch != self.epoch:
            self.epoch = None  # over for good, even if the stream is moved back
            raise StopIteration
        return self.stream.take(stay=True)


WORD = 0xFFFFFFFF
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA

Key = tuple[Any, Any]  # two 32-bit words, as ints or as uint64 arrays of one shape


def threefry2x32(key: Key, count: tuple[Any, Any]) -> Key:
    """Twenty rounds. The words are kept in 64 bits, so that no sum overflows."""
    k0, k1 = (np.asarray(word, np.uint64) for word in key)
    x0, x1 = (np.asarray(word, np.uint64) for word in count)
    schedule = (k0, k1, k0 ^ k1 ^ np.uint64(PARITY))
    x0, x1 = (x0 + k0) & WORD, (x1 + k1) & WORD
    for group in range(5):
        for turn in ROTATIONS[group % 2]:
            x0 = (x0 + x1) & WORD
            x1 = ((x1 << turn) | (x1 >> (32 - turn))) & WORD
            x1 = x0 ^ x1
        x0 = (x0 + schedule[(group + 1) % 3]) & WORD
        x1 = (x1 + schedule[(group + 2) % 3] + group + 1) & WORD
    return x0, x1


def base_key(seed: int) -> Key:
    return 0, seed


def fold_in(key: Key, number: Any) -> Key:
    number = np.asarray(number, np.uint64)
    return threefry2x32(key, (number >> 32, number & WORD))


def node_number(name: str) -> int:
    return zlib.crc32(name.encode())


def node_key(base: Key, name: str) -> Key:
    return fold_in(base, node_number(name))


def epoch_key(base: Key, epoch: int) -> Key:
    """The key of the order of one epoch."""
    return fold_in(node_key(base, "source"), epoch)


@dataclass(frozen=True)
class StageKeys:
    """The keys that the stages get for one batch."""

    base: Key | None
    epochs: np.ndarray
    records: np.ndarray

    def of(self, name: str) -> np.ndarray:
        """One key for each row, as an array of rows by two words."""
        if self.base is None:
            raise Refused("rngs", node=name)
        in_epoch = fold_in(node_key(self.base, name), self.epochs)
        return np.stack(fold_in(in_epoch, self.records), axis=1).astype(np.uint32)


ROUNDS = 24
FMIX32 = (16, 0x85EBCA6B, 13, 0xC2B2AE35, 16)
SPLITMIX64 = (30, 0xBF58476D1CE4E5B9, 27, 0x94D049BB133111EB, 31)


def mix(h: np.ndarray, constants: tuple[int, int, int, int, int], bits: int) -> np.ndarray:
    """Shift, multiply, shift, multiply, shift, in words of that many bits."""
    first, by, second, again, third = constants
    word = np.uint64(2**bits - 1)
    h = ((h ^ (h >> first)) * np.uint64(by)) & word
    h = ((h ^ (h >> second)) * np.uint64(again)) & word
    return h ^ (h >> third)


def swap_or_not(key: Key, length: int, places: Any, rounds: Iterable[int]) -> np.ndarray:
    """Where the given places of `range(length)` go in the given rounds."""
    x = np.atleast_1d(np.asarray(places, np.uint64))
    n = np.uint64(length)
    for r in rounds:
        a, b = (int(word) for word in fold_in(key, r))
        if length < 2**32:
            pivot, salt, bits, constants = a, b, 32, FMIX32
        else:
            pivot, salt, bits, constants = a << 32 | b, b << 32 | a, 64, SPLITMIX64
        partner = (np.uint64(pivot % length) + (n - x)) % n
        chosen = np.maximum(x, partner)
        swap = mix(chosen ^ np.uint64(salt), constants, bits) >> (bits - 1)
        x = np.where(swap == 1, partner, x)
    return x.astype(np.int64)


def order(key: Key, length: int, offsets: Any) -> np.ndarray:
    """The records at the given offsets of the epoch with this key."""
    return swap_or_not(key, length, offsets, range(ROUNDS))


def place_of(key: Key, length: int, records: Any) -> np.ndarray:
    """The inverse of `order`: the offsets at which the records stand."""
    return swap_or_not(key, length, records, reversed(range(ROUNDS)))


def order_of(base: Key | None, epochs: np.ndarray, offsets: np.ndarray, length: int) -> np.ndarray:
    """The records at places that may lie in several epochs."""
    if base is None:
        return offsets
    records = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        records[here] = order(epoch_key(base, epoch), length, offsets[here])
    return records


def block_order(key: Key, length: int, size: int, window: int, offsets: Any) -> np.ndarray:
    """The records at the given offsets of the epoch with this key, shuffled by blocks."""
    size = min(size, length)
    count, rest = -(-length // size), length % size
    order_of_blocks, windows = fold_in(key, 2**32), fold_in(key, 2**33)
    short = int(place_of(order_of_blocks, count, count - 1)[0])
    records = []
    for offset in map(int, offsets):
        number = offset // (size * window)
        start = number * size * window
        span = min(size * window, length - start)
        place = start + int(order(fold_in(windows, number), span, offset - start)[0])
        behind = rest > 0 and place >= short * size + rest
        block, inside = divmod(place - rest if behind else place, size)
        block = int(order(order_of_blocks, count, block + behind)[0])
        records.append(block * size + inside)
    return np.array(records, np.int64)


class Plan(NamedTuple):
    """A graph, checked and ready to run."""

    order: tuple[str, ...]
    operations: Mapping[str, "Operation"]
    edges: Mapping[str, Sequence[str]]
    sink: str


def make_plan(program: Program) -> Plan:
    if not program.nodes:
        return Plan((), {}, {}, "source")
    edges = {name: list(program.edges[name]) or ["source"] for name in program.nodes}
    operations = {name: operation(text) for name, text in program.nodes.items()}
    return Plan(execution_order(edges), operations, edges, str(program.sink))


def run(
    plan: Plan, source: Batch, states: Mapping[str, int], keys: StageKeys
) -> tuple[Batch, dict[str, int]]:
    """The batch of the sink, and the states of the stages after it."""
    made, states = {"source": source}, dict(states)
    for name in plan.order:
        apply, wants = plan.operations[name]
        inputs = [made[predecessor] for predecessor in plan.edges[name]]
        try:
            if wants == "state":
                made[name], states[name] = apply(*inputs, states[name])
            elif wants == "keys":
                made[name] = apply(*inputs, keys.of(name))
            else:
                made[name] = apply(*inputs)
        except Refused:
            raise
        except Exception as error:
            raise Refused("stage", node=name, predecessors=plan.edges[name]) from error
    batch = dict(made[plan.sink])
    if MASK in source and plan.sink != "source":
        batch.setdefault(MASK, source[MASK])
    return batch, states


class Operation(NamedTuple):
    """A function of the predecessors' batches, and what it wants besides: "", "state" or "keys"."""

    apply: Callable[..., Any]
    wants: str = ""


def affine(a: str, b: str) -> Operation:
    return Operation(lambda batch: {**batch, "x": batch["x"] * int(a) + int(b)})


def add() -> Operation:
    def apply(first: Batch, *rest: Batch) -> Batch:
        total = first["x"]
        for other in rest:
            total = total + other["x"]
        return {**first, "x": total}

    return Operation(apply)


def sub() -> Operation:
    return Operation(lambda first, second: {**first, "x": first["x"] - second["x"]})


def pick(name: str) -> Operation:
    return Operation(lambda batch: {name: batch[name]})


def count() -> Operation:
    def apply(batch: Batch, seen: int) -> tuple[Batch, int]:
        return {**batch, "count": batch["id"] * 0 + (seen + 1)}, seen + 1

    return Operation(apply, "state")


def keys() -> Operation:
    return Operation(lambda batch, keys: {**batch, "keys": keys}, "keys")


OPERATIONS = {"affine": affine, "add": add, "sub": sub, "pick": pick, "count": count, "keys": keys}


def operation(text: str) -> Operation:
    """The operation that a text such as "affine(2,1)" or "add" stands for."""
    name, _, arguments = text.rstrip(")").partition("(")
    return OPERATIONS[name](*(arguments.split(",") if arguments else ()))


def execution_order(edges: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The names so that each stands after its predecessors, ties as declared."""
    done = {"source": None}
    while len(done) <= len(edges):
        waiting = [name for name in edges if name not in done]
        ready = [name for name in waiting if all(before in done for before in edges[name])]
        if not ready:
            raise Refused("cycle", nodes=find_cycle(edges, waiting))
        done[ready[0]] = None
    return tuple(done)[1:]


def find_cycle(edges: Mapping[str, Sequence[str]], waiting: Sequence[str]) -> list[str]:
    """Walk from predecessor to predecessor until a name comes back."""
    path = [waiting[0]]
    while path[-1] not in path[:-1]:
        path.append(next(before for before in edges[path[-1]] if before in waiting))
    return path[path.index(path[-1]) :][::-1]


VERSION = 1


def digest(value: Any) -> str:
    """A short name for a value of any size, the same for equal values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(stream: Stream) -> dict[str, Any]:
    program = stream.program
    columns = program.columns
    return {
        "length": stream.length,
        "specs": digest({name: [str(c.dtype), *c.shape[1:]] for name, c in columns.items()}),
        "order": "stored" if stream.base is None else f"swap-or-not-{ROUNDS}",
        "seed": digest(stream.base),
        "graph": digest([stream.plan.edges, stream.plan.sink]),
    }


def save(stream: Stream) -> bytes:
    variables = {
        f"{name}/count": {"dtype": "int64", "shape": [], "data": encode(stream.states[name])}
        for name in stream.plan.order
        if stream.plan.operations[name].wants == "state"
    }
    state = {
        "version": VERSION,
        "cursor": stream.cursor._asdict(),
        "fingerprint": fingerprint(stream),
        "variables": variables,
    }
    return json.dumps(state).encode()


def load(stream: Stream, text: bytes) -> tuple[Cursor, dict[str, int]]:
    """The cursor and the stages' states of a state, all checked before any is used."""
    state, own = json.loads(text), json.loads(save(stream))
    if state["version"] != VERSION:
        raise Refused("state", field="version", state=state["version"], pipeline=VERSION)
    for name, here in own["fingerprint"].items():
        there = state["fingerprint"][name]
        if there != here:
            raise Refused("state", field=name, state=there, pipeline=here)
    cursor = Cursor(**state["cursor"])
    if not (0 <= cursor.epoch < 2**32 and 0 <= cursor.offset < stream.length):
        raise Refused("state", field="cursor", state=cursor, pipeline=stream.length)
    if state["variables"].keys() != own["variables"].keys():
        there, here = sorted(state["variables"]), sorted(own["variables"])
        raise Refused("state", field="variables", state=there, pipeline=here)
    states = dict(stream.states)
    for path, variable in state["variables"].items():
        states[path.rsplit("/", 1)[0]] = decode(variable["data"])
    return settle(cursor, stream.length, stream.program), states


def encode(number: int) -> str:
    return base64.b64encode(np.asarray(number, "<i8").tobytes()).decode()


def decode(data: str) -> int:
    return int(np.frombuffer(base64.b64decode(data), "<i8")[0])


def scan(stream: Stream, length: int | None = None) -> Batch:
    program = stream.program
    if length is None:
        left = stream.length - stream.cursor.offset
        if program.last_batch == "keep" and left % program.batch_size:
            raise Refused("last-batch", left=left, batch_size=program.batch_size)
        length = left // program.batch_size
        if program.last_batch == "pad":
            length = -(-left // program.batch_size)
    if length == 0:
        batch, _, _ = stream.next_batch(stay=False)
        return {name: leaf[np.newaxis][:0] for name, leaf in batch.items()}
    batches = [stream.step() for _ in range(length)]
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def check(program: Program) -> int:
    """The number of records of a program that has no fault, else the first fault found."""
    columns = program.columns
    for name, column in columns.items():
        if column.dtype.kind not in "biufc" or column.ndim == 0:
            raise Refused("field-type", field=name, type=str(column.dtype))
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise Refused("unequal-lengths", lengths=lengths)
    length = max(lengths.values(), default=0)
    if length == 0:
        raise Refused("empty-source")

    size = program.batch_size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise Refused("batch-size", batch_size=size)
    if program.last_batch not in ("keep", "drop", "pad"):
        raise Refused("last-batch", last_batch=program.last_batch)
    if program.last_batch == "drop" and length < size:
        raise Refused("last-batch", last_batch="drop", length=length, batch_size=size)
    if program.last_batch == "pad" and MASK in columns:
        raise Refused("mask-name", field=MASK)

    if program.nodes or program.edges or program.sink is not None:
        check_graph(program.nodes, program.edges, program.sink)
    return length


def check_graph(
    nodes: Mapping[str, str], edges: Mapping[str, Sequence[str]], sink: str | None
) -> None:
    if not nodes:
        raise Refused("no-nodes")
    numbers = {node_number("source"): "source"}
    for name in nodes:
        if name in ("", "source") or name.startswith("_"):
            raise Refused("node-name", name=name)
        if numbers.setdefault(node_number(name), name) != name:
            raise Refused("node-name", name=name)
        if name not in edges:
            raise Refused("missing-edges", node=name)
    for name, predecessors in edges.items():
        if name not in nodes:
            raise Refused("edges-without-node", name=name)
        if isinstance(predecessors, str):
            raise Refused("predecessors-type", node=name)
        for before in predecessors:
            if before == name:
                raise Refused("self-loop", node=name)
            if before not in nodes and before != "source":
                raise Refused("unknown-predecessor", node=name, name=before)
    if sink not in nodes:
        raise Refused("unknown-sink", name=sink)
    execution_order(edges)  # finds a cycle
    used, reached = {sink}, [sink]
    while reached:
        for before in edges[str(reached.pop())]:
            if before != "source" and before not in used:
                used.add(before)
                reached.append(before)
    for name in nodes:
        if name not in used:
            raise Refused("unused-node", node=name)
