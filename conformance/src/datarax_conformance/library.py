"""The oracle for cases of profile jax: the model, extended by what the library adds to the spec.

`Library` runs a program of the spec. `Extended` runs one with `options` (other sources, own keys)
or with stages of profile jax.
"""

import copy
import dataclasses
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .library_sources import FAR, source_of
from .model import (
    MASK,
    Batch,
    Cursor,
    Key,
    Plan,
    Program,
    Refused,
    Stream,
    base_key,
    check_graph,
    epoch_key,
    execution_order,
    fold_in,
    make_plan,
    node_key,
    operation,
    order,
    place_of,
    settle,
)


@dataclasses.dataclass(frozen=True)
class LibraryProgram(Program):
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def open_stream(program: LibraryProgram) -> "Library":
    """The stream of a program: `Extended` if it has options or stages that only profile jax has."""
    forms = [form.partition("(")[0] for form in program.nodes.values()]
    beyond = program.options or any(form in STAGES for form in forms)
    try:
        return Extended(program) if beyond else Library(program)
    except Refused as error:
        error.details["ways_out"] = ["1", "keep", "pad", *program.nodes]
        raise


class Library(Stream):
    traced: frozenset[Any] = frozenset()  # functions of `ask_fold`, with their arguments
    counted = 0  # calls of the module of `ask_fold`

    def __len__(self) -> int:
        size = self.program.batch_size
        whole = self.length // size
        return whole if self.program.last_batch == "drop" else -(-self.length // size)

    def __iter__(self) -> "SharedIterator":
        return SharedIterator(super().__iter__())

    def scan(self, length: int | None = None) -> Batch:
        if length is not None and (type(length) is not int or length < 0):
            raise Refused("scan-length")
        return super().scan(length)

    def set_state(self, state: Any) -> None:
        """Takes a state as a dict, as text or as bytes."""
        state = json.dumps(state) if isinstance(state, Mapping) else state
        try:
            cursor = json.loads(state).get("cursor", {})
        except ValueError:
            cursor = {}  # the model refuses the whole state below
        if not all(type(number) is int for number in cursor.values()):
            raise Refused("state", field="cursor")
        # The model takes text, too, although its signature says bytes.
        super().set_state(state)  # pyright: ignore[reportArgumentType]

    def jit_steps(self, n: int) -> list[Batch]:
        return [self.step() for _ in range(n)]

    def replace(self, node: str, form: str) -> None:
        """From the next batch on, `node` has another operation."""
        nodes = {**self.program.nodes, node: form}
        self.program = dataclasses.replace(self.program, nodes=nodes)
        self.plan = make_plan(self.program)

    def change(self, node: str, form: str) -> None:
        """From the next batch on, `node` has other parameters."""
        self.replace(node, form)

    def grad(self, node: str, length: int | None = None) -> Batch:
        """The derivative of the sum of x, over the next batch or a scan, by an affine node's a, b.

        Programs are linear in each parameter, so the difference over a step of 1 is the derivative.
        """
        form = self.program.nodes[node]
        a, b = (int(word) for word in form.removeprefix("affine(").rstrip(")").split(","))
        here = self._sum_with(node, form, length)
        slopes = {
            "a": self._sum_with(node, f"affine({a + 1},{b})", length) - here,
            "b": self._sum_with(node, f"affine({a},{b + 1})", length) - here,
        }
        self.replace(node, form)
        return slopes

    def _sum_with(self, node: str, form: str, length: int | None) -> Any:
        """The sum of x with this `form`, in the dtype of x. The stream does not advance."""
        self.replace(node, form)
        twin = self.copy("deepcopy")
        x = twin.step()["x"] if length is None else twin.scan(length)["x"]
        return x.sum(dtype=x.dtype)

    def copy(self, how: str) -> "Library":
        """An independent stream that goes on from the same place."""
        twin = copy.copy(self)
        twin.states = copy.deepcopy(self.states)
        return twin

    def save_nnx(self) -> bytes:
        return json.dumps({"cursor": self.cursor, "states": self.states}).encode()

    def load_nnx(self, state: bytes) -> None:
        saved = json.loads(state)
        self.cursor, self.states = Cursor(*saved["cursor"]), saved["states"]

    def ask(self, what: str, **arguments: Any) -> Any:
        return getattr(self, f"ask_{what}")(**arguments)

    def ask_names(self) -> list[str]:
        return list(self.plan.order)

    def ask_specs(self) -> dict[str, Any]:
        """The dtypes and shapes of each node's output and of the batch."""
        made = dict(self._outputs())
        made["batch"] = self.next_batch(stay=False)[0]
        return {node: spec_of(batch) for node, batch in made.items()}

    def _outputs(self) -> Mapping[str, Batch]:
        """The output of every node for the next batch."""
        made: dict[str, Batch] = {}
        for name in ("source", *self.plan.order):
            stream = copy.copy(self)
            stream.plan = self.plan._replace(sink=name)
            made[name] = stream.next_batch(stay=False)[0]
        return made

    def ask_show(self, how: str) -> str:
        """A line for each node: its name, its inputs and its output."""
        specs, lines = self.ask_specs(), []
        for name in ("source", *self.plan.order):
            reads = ", ".join(self.plan.edges.get(name, []))
            gives = ", ".join(
                f"{t}[{','.join(map(str, shape))}]" for t, *shape in specs[name].values()
            )
            lines.append(f"{how} {name} <- {reads}: {gives}")
        return "\n".join(lines)

    def ask_program(self) -> str:
        nodes = [(name, self.program.nodes[name]) for name in self.plan.order]
        return repr((nodes, self.plan.edges, self.plan.sink))

    def ask_order(
        self, length: int, seed: int, epoch: int, offsets: Sequence[int], how: str
    ) -> list[int]:
        """The records at these offsets. NumPy computes them the same way for every `how`."""
        key = epoch_key(base_key(seed), epoch)
        return order(key, length, offsets).tolist()

    def ask_places(
        self, length: int, seed: int, epoch: int, records: Sequence[int], how: str
    ) -> list[int]:
        return place_of(epoch_key(base_key(seed), epoch), length, records).tolist()

    def ask_fold(
        self,
        fn: str,
        length: int,
        carry: float | None = None,
        modules: Sequence[str] = (),
        unroll: int = 1,
        fetch: int | None = None,
    ) -> Batch:
        """The stacked results of a function on `length` batches."""
        for count in (unroll, 1 if fetch is None else fetch):
            if type(count) is not int or count < 1:
                raise Refused("scan-length")
        if fn == "captures":
            raise Refused("captured", names=["held"])
        new = (fn, length, unroll, fetch) not in self.traced
        self.traced |= {(fn, length, unroll, fetch)}
        counted, total, outs = self.counted, np.float32(carry or 0), []
        for batch in [self.step() for _ in range(length)]:
            here = batch["x"].sum(dtype=np.float32)
            if modules:
                counted += 1
                here = here * np.float32(3) + np.float32(counted)
            outs.append(total if carry is not None else here)
            total = total + here
        self.counted = counted
        found: Batch = {"out": np.array(outs, np.float32), "traced": np.array(new)}
        if modules:
            found["module"] = np.array(self.counted, np.int32)
        return found if carry is None else {**found, "carry": np.array(total, np.float32)}

    def ask_fresh(self, n: int) -> list[float]:
        """The next `n` batches, each through a new function."""
        return [float(self.step()["x"].sum(dtype=np.float32)) * k for k in range(n)]

    def ask_kept(self) -> int:
        """How many of those functions are still alive."""
        return 0

    def ask_counters(self) -> list[int]:
        """The number of draws from each stream of the pipeline's generator."""
        return [0]


def spec_of(batch: Batch) -> dict[str, Any]:
    return {name: [str(x.dtype), *x.shape] for name, x in sorted(batch.items())}


class SharedIterator:
    """An iterator that several threads may share."""

    lock = threading.RLock()

    def __init__(self, inner: Any):
        self.inner = inner

    def __iter__(self) -> "SharedIterator":
        return SharedIterator(iter(self.inner))

    def __next__(self) -> Batch:
        with self.lock:
            return next(self.inner)


class Node:
    """What a stage may use during a call: its keys and its count."""

    def __init__(self, stream: "Extended", name: str, fetched: "Fetched"):
        self.stream, self.name, self.fetched = stream, name, fetched

    @property
    def base(self) -> Key:
        return self.stream.base_of(self.name)

    @property
    def keys(self) -> np.ndarray:
        """A key for each row."""
        in_epoch = fold_in(node_key(self.base, self.name), self.fetched.epochs)
        return words_of(fold_in(in_epoch, self.fetched.records))

    @property
    def key(self) -> np.ndarray:
        """A key for the batch."""
        start = self.fetched.start
        return words_of(fold_in(fold_in(node_key(self.base, self.name), start.epoch), start.offset))

    def count(self) -> int:
        """Counts a batch, and returns how many this stage has had."""
        self.stream.counts[self.name] = self.stream.counts.get(self.name, 0) + 1
        return self.stream.counts[self.name]


def words_of(key: Key) -> np.ndarray:
    return np.stack([np.asarray(word) for word in key], axis=-1).astype(np.uint32)


@dataclasses.dataclass(frozen=True)
class Fetched:
    """The rows of a batch, its start, and the epoch and the record of each row."""

    batch: Batch
    start: Cursor
    epochs: np.ndarray
    records: np.ndarray


def stage_key(node: Node, batch: Batch) -> Batch:
    return {**batch, "key": np.broadcast_to(node.key, (len(batch["id"]), 2))}


def stage_keys(node: Node, batch: Batch) -> Batch:
    return {**batch, "keys": node.keys}


def stage_count(node: Node, batch: Batch) -> Batch:
    return {**batch, "count": batch["id"] * 0 + np.int32(node.count())}


def stage_draws(node: Node, batch: Batch) -> Batch:
    return {**batch, "draws": batch["id"] * 0 + np.int32(node.count())}


def stage_element(node: Node, batch: Batch) -> Batch:
    none = batch["id"] * 0
    return {**batch, "x": batch["x"] * 2, "rank": none, "keyed": none}


def stage_element_keys(node: Node, batch: Batch) -> Batch:
    return {**batch, "keys": node.keys}


def stage_update(node: Node, batch: Batch) -> Batch:
    made = {**batch, "x": batch["x"] * 2}
    fields = np.full(len(batch["id"]), len(batch), np.int32)
    return {**made, "was": batch["x"], "fields": fields}


def stage_fails(node: Node, batch: Batch) -> Batch:
    raise ZeroDivisionError("broken")


def stage_fails_at(node: Node, batch: Batch, record: str) -> Batch:
    if int(record) in batch["id"].tolist() and node.stream.built:
        raise ZeroDivisionError("broken")
    return batch


def stage_returns(node: Node, batch: Batch, what: str) -> Any:
    raise TypeError(f"a stage returns a dict of arrays, got {what}")


def stage_wrong(node: Node, batch: Batch) -> Batch:
    raise TypeError("a stage that cannot be called so")


def stage_pipeline(node: Node, batch: Batch) -> Batch:
    raise TypeError("a part with a place of its own")


def stage_mask(node: Node, batch: Batch, what: str) -> Batch:
    return {**batch, node.stream.mask: np.zeros(1, np.int8)}


def stage_axes(node: Node, batch: Batch, field: str, axes: str) -> Batch:
    for name, size in zip(axes.split(), batch[field].shape, strict=True):
        if node.stream.axes.setdefault(name, size) != size:
            raise TypeError(f"{name} is {size} and {node.stream.axes[name]}")
    return batch


COMMON: Mapping[str, Callable[..., Any]] = {"keys": stage_keys, "count": stage_count}
STAGES: Mapping[str, Callable[..., Any]] = {
    "key": stage_key,
    "draws": stage_draws,
    "element": stage_element,
    "element-keys": stage_element_keys,
    "update": stage_update,
    "fails": stage_fails,
    "fails-at": stage_fails_at,
    "returns": stage_returns,
    "both-keys": stage_wrong,
    "captures": stage_wrong,
    "pipeline": stage_pipeline,
    "mask": stage_mask,
    "axes": stage_axes,
}


def stage(form: str) -> Callable[..., Any]:
    """The function of a form. It takes the node and its predecessors' batches."""
    name, _, arguments = form.rstrip(")").partition("(")
    words = arguments.split(",") if arguments else []
    if name in (known := {**STAGES, **COMMON}):
        return lambda node, *batches: known[name](node, *batches, *words)
    apply = operation(form).apply
    return lambda node, *batches: apply(*batches)


def plain_name(entry: str) -> str:
    """The name of a stage in a chain: its name in Python without `<>_`, else "stage"."""
    return entry.partition("=")[0].partition(":")[2].strip("<>_") or "stage"


def chain_names(entries: Sequence[str]) -> list[str]:
    names: list[str] = []
    for entry in entries:
        name = plain = plain_name(entry)
        k = 0
        while name in (*names, "source"):
            k += 1
            name = f"{plain}_{k}"
        names.append(name)
    return names


class Extended(Library):
    """A stream of a program with options."""

    def __init__(self, program: LibraryProgram):
        self.options = options = dict(program.options)
        self.counts: dict[str, int] = {}
        self.axes: dict[str, int] = {}
        self.mask = options.get("mask_name", MASK)
        self.built = False
        if "chain" in options:
            if options.get("graph_too"):
                raise Refused("stages-and-nodes")
            program = chained(program, options["chain"])
        self.program = program
        self.check(program)
        self.source = source_of(program, options.get("source", {}))
        self.length = FAR if self.source.length is None else self.source.length
        short = program.last_batch == "drop" and self.length < program.batch_size
        if short and not self.source.empty:
            raise Refused("last-batch")
        edges = {name: list(program.edges[name]) or ["source"] for name in program.nodes}
        self.plan = Plan(execution_order(edges), {}, edges, str(program.sink or "source"))
        self.base = self.base_of("source") if self.shuffled else None
        self.states = {}
        self.cursor = Cursor(epoch=0, offset=0)
        self.next_batch(stay=False)
        self.built = True

    def check(self, program: LibraryProgram) -> None:
        """Raises what can be refused before the source is opened."""
        size = program.batch_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise Refused("batch-size", batch_size=size)
        if program.last_batch == "pad" and self.mask in program.columns:
            raise Refused("mask-name", field=self.mask)
        if program.nodes:
            check_graph(program.nodes, program.edges, program.sink)
        for name, form in program.nodes.items():
            if form in ("keys", "key", "element-keys"):
                self.base_of(name)
        self.parts = self.options.get("mesh", 1)
        if not isinstance(self.parts, int) or size % self.parts:
            raise Refused("sharding")

    @property
    def shuffled(self) -> bool:
        """Whether the order of the records depends on a key."""
        source = self.options.get("source", {})
        own = source.get("form") in ("random-access", "endless", "mixture")
        return own or (self.program.seed is not None and source.get("shuffle", True) is not False)

    def base_of(self, name: str) -> Key:
        """The words of the key from the part's own generator, else from the pipeline's: from the
        named stream, else from "default"."""
        part = self.options.get("rngs_of", {}).get(name)
        whole = self.options.get("rngs")
        if whole is None and self.program.seed is not None:
            whole = {"default": self.program.seed}
        stream = "shuffle" if name == "source" else self.options.get("streams", {}).get(name)
        for rngs in (part, whole):
            for wanted in (stream, "default"):
                if rngs is not None and wanted in rngs:
                    return base_words(rngs[wanted])
        raise Refused("rngs", node=name)

    def next_batch(self, stay: bool) -> tuple[Batch, dict[str, int], Cursor]:
        start, length, size = self.cursor, self.length, self.program.batch_size
        if self.built and self.source.empty:
            raise Refused(self.source.empty)
        count = size
        if stay or self.program.last_batch == "pad":
            count = min(size, length - start.offset)
        positions = start.offset + np.arange(count)
        epochs, offsets = start.epoch + positions // length, positions % length
        key = None if self.base is None else node_key(self.base, "source")
        records = self.source.records(key, epochs, offsets)

        readable = self.source.readable(records)
        within = int((~readable).sum()) + self.masked(start) <= self.source.options.get(
            "max_errors", 0
        )
        if self.built and not within and self.source.masks:
            raise self.source.unreadable(int(records[~readable][0]))
        if not self.built:
            self.source.bad, bad = set(), self.source.bad
            batch = self.source.read(records, epochs, key)
            self.source.bad = bad
        else:
            batch = self.source.read(records, epochs, key)
        if self.source.masks:
            batch = {name: zeroed(x, readable) for name, x in batch.items()} | {self.mask: readable}
        if self.program.last_batch == "pad":
            batch = {self.mask: np.ones(count, bool), **batch}
            batch = {name: lengthened(x, size) for name, x in batch.items()}
            epochs, records = lengthened(epochs, size), lengthened(records, size)

        counts = dict(self.counts)
        try:
            self.made = self.through(Fetched(batch, start, epochs, records))
            batch, self.after = self.made[self.plan.sink], self.counts
        finally:
            self.counts = counts  # only `take` keeps the new counts: a batch may fail or be unused
        passed, offset = divmod(start.offset + count, length)
        after = settle(Cursor(start.epoch + passed, offset), length, self.program)
        return batch, self.states, after

    def masked(self, start: Cursor) -> int:
        """How many records of this epoch have been masked before this batch."""
        offsets = np.arange(start.offset)
        key = None if self.base is None else node_key(self.base, "source")
        if not self.source.masks:
            return 0
        records = self.source.records(key, offsets * 0 + start.epoch, offsets)
        return int((~self.source.readable(records)).sum())

    def through(self, fetched: Fetched) -> dict[str, Batch]:
        """The output of every node."""
        made = {"source": fetched.batch}
        self.axes = {}
        for name in self.plan.order:
            inputs = [made[before] for before in self.plan.edges[name]]
            apply = stage(self.program.nodes[name])
            try:
                made[name] = apply(Node(self, name, fetched), *inputs)
            except Refused:
                raise
            except Exception as error:
                raise Refused(
                    "stage", node=name, predecessors=self.plan.edges[name], cause=error
                ) from error
        sink = made[self.plan.sink]
        if self.options.get("override"):
            sink = {**sink, "called": np.ones(len(sink["id"]), np.int32)}
        if self.mask in fetched.batch and self.plan.sink != "source":
            sink = {self.mask: fetched.batch[self.mask], **sink}
            if sink[self.mask].dtype != bool or sink[self.mask].shape != sink["id"].shape:
                raise Refused("stage", node=self.plan.sink, predecessors=[])
        made[self.plan.sink] = sink
        return made

    def take(self, stay: bool) -> Batch:
        batch = super().take(stay)
        self.counts = self.after
        return batch

    def scan(self, length: int | None = None) -> Batch:
        """If a batch fails, the cursor and the counts stay as before the scan."""
        before = self.cursor, dict(self.counts)
        if length is None and self.source.length is None:
            raise Refused("last-batch")
        try:
            return super().scan(length)
        except Refused:
            self.cursor, self.counts = before
            raise

    def __len__(self) -> int:
        if self.source.length is None or not self.source.random_access:
            raise TypeError("a source without a length has no number of batches")
        return super().__len__()

    def jit_steps(self, n: int) -> list[Batch]:
        if not self.source.random_access:
            raise Refused("random-access")
        return super().jit_steps(n)

    def replace(self, node: str, form: str) -> None:
        nodes = {**self.program.nodes, node: form}
        self.program = dataclasses.replace(self.program, nodes=nodes)
        self.next_batch(stay=False)  # a stage that does not fit fails here, and nothing moves

    def get_state(self) -> bytes:
        state = {"cursor": self.cursor, "counts": self.counts}
        return json.dumps(state).encode()

    def set_state(self, state: Any) -> None:
        saved = json.loads(state)
        self.cursor, self.counts = Cursor(*saved["cursor"]), saved["counts"]

    def copy(self, how: str) -> "Library":
        twin = copy.copy(self)
        twin.counts = dict(self.counts)
        return twin

    def _outputs(self) -> Mapping[str, Batch]:
        self.next_batch(stay=False)
        return self.made

    def ask_replay(self, record: int, epoch: int) -> Batch:
        """The output of every node for one record."""
        records, epochs = np.array([record]), np.array([epoch])
        counts = dict(self.counts)
        batch = self.source.read(records, epochs, None)
        made = self.through(Fetched(batch, Cursor(epoch, 0), epochs, records))
        self.counts = counts
        return {f"{node}.{name}": x for node, b in made.items() for name, x in b.items()}

    def ask_read(self, start: int, n: int, seed: int) -> Batch:
        """Random access through the source's public method."""
        return self.source.get_batch_at(start, n, (0, seed))

    def ask_rows(self, how: str) -> list[list[int]]:
        """The ids of the rows of the next batch, of `for` or `step`, on each device."""
        ids = self.take(stay=how == "for")["id"].tolist()
        each, rest = divmod(len(ids), self.parts)
        places = range(self.parts)
        return [ids if rest else ids[i * each : (i + 1) * each] for i in places]

    def ask_reads(self, processes: int) -> list[list[int]]:
        """The records of an epoch that each process of a job reads, without record 0, which is
        read for its shape."""
        size = self.program.batch_size
        records = np.arange(self.length)
        owner = records % size // (size // processes)
        return [[x for x in np.flatnonzero(owner == i).tolist() if x] for i in range(processes)]

    def ask_differ(self, of: str) -> list[str]:
        """The error of two processes whose pipelines differ: its code and what differs."""
        return ["sharding", of]

    def ask_mend(self) -> None:
        """Makes every record readable."""
        self.source.bad = set()

    def ask_stats(self) -> dict[str, float]:
        """Seconds spent waiting for rows, and computing."""
        delay = self.source.options.get("delay", 0.0)
        return {"waited": delay, "computed": 1e-6}

    def ask_counters(self) -> list[int]:
        return [0 for _ in self.options.get("rngs", {"default": 0})]


def lengthened(x: np.ndarray, rows: int) -> np.ndarray:
    """`x`, padded to `rows` rows with zeros or False."""
    return np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])


def zeroed(x: np.ndarray, readable: np.ndarray) -> np.ndarray:
    return np.where(readable.reshape(-1, *[1] * (x.ndim - 1)), x, np.zeros((), x.dtype))


def base_words(seed: Any) -> Key:
    """The key words of a seed, or the first two words of a key of another generator."""
    return (0, seed) if isinstance(seed, int) else (seed[0], seed[1])


def chained(program: LibraryProgram, entries: Sequence[str]) -> LibraryProgram:
    """The graph with the names and the topology of a chain."""
    names = chain_names(entries)
    nodes = {name: entry.partition("=")[2] for name, entry in zip(names, entries, strict=True)}
    edges = {name: names[i - 1 : i] if i else [] for i, name in enumerate(names)}
    return dataclasses.replace(program, nodes=nodes, edges=edges, sink=names[-1])


CLASSES = {
    "cycle": "CycleError",
    "unknown-sink": "UnknownSinkError",
    "unknown-predecessor": "UnknownPredecessorError",
    "batch-size": "BatchSizeError",
    "unequal-lengths": "UnequalLengthsError",
    "seek": "SeekError",
    "state": "StateError",
    "stage": "StageError",
}


def described(error: Refused) -> dict[str, Any]:
    """The details of the library's error, with its class, its cause and a text of them all."""
    details = dict(error.details)
    cause = details.pop("cause", None)
    text = f"{error.code} {details}: {cause}"
    name = CLASSES.get(error.code, "DataraxError")
    return {"class": name, "is_value_error": True, "cause": type(cause).__name__, "text": text,
            **details}  # fmt: skip


__all__ = ["Library", "LibraryProgram", "described", "open_stream"]
