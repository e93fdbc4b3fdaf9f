"""Compares engines, through the adapters of the conformance suite, each in its own process.

All engines of one workload live at the same time and take turns, some epochs each, so that a drift
of the machine's speed affects all of them. A time counts only if the engine's batches in the timed
epochs are right: the oracle's rows, in the oracle's order or, if the engine shuffles in its own
order, as a permutation.
"""

import contextlib
import dataclasses
import datetime
import functools
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import engines
import numpy as np
from benchmarks.engine import CHUNK, Seen
from benchmarks.harness import median
from benchmarks.plugin import machine
from datarax_conformance import model
from datarax_conformance.engine import Lost, Piped
from datarax_conformance.ops import Ops

HERE = Path(__file__).parent
CONFORMANCE = HERE.parents[1] / "conformance"
SEED = 0
ENOUGH = 5.0
"""Once a contender has run three times, the most seconds that it is timed for in all."""

EPOCHS = 3
"""Epochs in a row that an engine runs in its turn. A single one would run on caches that the other
engines have filled."""

FIRSTS = 3
"""Processes in which the time to the first result is measured, for each engine in `JUDGED`. A
process has only one first result."""

BEGINNING = ("first", "compiling")
"""The figures of the start, in seconds: lists of one time or of several."""

PATIENCE = 600.0
"""Seconds for one answer of an engine."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """An engine in one of its modes. `environment` is its name in conformance/engines.py."""

    name: str
    environment: str
    mode: str


CONTENDERS = tuple(
    Contender(name + ("-scan" if mode == "scan" else ""), environment, mode)
    for name, environment, *modes in (
        ("Datarax", "datarax-reference", "for", "scan"),
        ("datarax 0.1.17", "datarax-0.1.17", "for", "scan"),
        ("datarax 0.1.4", "datarax-0.1.4", "for", "scan"),
        ("cyreal", "cyreal", "step", "scan"),
        ("Grain", "grain", "for"),
        ("PyTorch DataLoader", "torch", "for"),
        ("tf.data", "tfdata", "for"),
        ("naive NumPy engine", "numpy-naive", "for"),
        ("NumPy indexing", "", "for"),
    )
    for mode in modes
)

JUDGED = ("datarax-reference", "datarax-0.1.17")
"""The environments of Datarax, and of the engine that must not be faster to the first result."""


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Columns, cut into whole batches, and the stage they go through."""

    name: str
    columns: dict[str, np.ndarray]
    batch_size: int
    nodes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def batches(self) -> int:
        return len(self.columns["id"]) // self.batch_size

    @property
    def given(self) -> dict[str, Any]:
        edges = {name: [] for name in self.nodes}
        return {
            "batch_size": self.batch_size,
            "nodes": dict(self.nodes),
            "edges": edges,
            "sink": next(iter(self.nodes), None),
        }

    @functools.cache  # noqa: B019 - a task lives as long as the run
    def of_epoch(self, epoch: int, shuffle: bool) -> dict[str, Any]:
        """What the oracle gives in an epoch, as `Seen` describes it."""
        length = len(self.columns["id"])
        offsets = np.arange(length)
        base = model.base_key(SEED) if shuffle else None
        records = model.order_of(base, np.full(length, epoch), offsets, length)
        batch = {name: column[records] for name, column in self.columns.items()}
        for form in self.nodes.values():
            batch = Ops()(form)(batch)
        seen = Seen()
        for start in range(0, length, self.batch_size):
            rows = slice(start, start + self.batch_size)
            seen.add({name: column[rows] for name, column in batch.items()})
        return seen.told()


def whole(length: int, batch_size: int, x: np.ndarray) -> dict[str, np.ndarray]:
    """As many records as fill whole batches, since engines treat a partial batch differently."""
    kept = length // batch_size * batch_size
    return {"id": np.arange(kept, dtype=np.int32), "x": x[:kept]}


def tasks() -> list[Task]:
    tokens = np.random.default_rng(42).integers(0, 32_000, (10_000, 128), np.int32)
    rows = np.random.default_rng(42).standard_normal((10_000, 100), np.float32)
    return [
        Task("NLP-1 small", whole(10_000, 32, tokens), 32),
        Task("TAB-1 small", whole(10_000, 256, rows), 256, {"normalise": "affine(2,-1)"}),
        Task("TAB-1 small without its stage", whole(10_000, 256, rows), 256),
    ]


def images(batches: int) -> Task:
    pixels = np.random.default_rng(42).integers(0, 256, (64 * batches, 32, 32, 3), np.uint8)
    return Task("images", whole(64 * batches, 64, pixels), 64)


class Racer:
    """A contender, its process and its results so far. With a `fault` it is disqualified."""

    def __init__(self, contender: Contender):
        self.contender = contender
        self.pipe = Piped(command(contender.environment))
        self.fault = ""
        self.shown: dict[str, Any] = {}
        self.seconds: dict[int, float] = {}

    def ask(self, do: str, **given: Any) -> Any:
        if self.fault:
            return None
        try:
            answer = self.pipe.execute({"do": do, **given}, PATIENCE)
        except Lost as lost:
            self.fault = f"{lost.outcome}: {lost}"
            return None
        if error := answer.get("error"):
            self.fault = f"{error['type']}: {error['message']}"
        elif "fault" in answer:
            self.fault = answer["fault"]
        return answer.get("value")

    def enter(self, task: Task) -> None:
        """Sets `fault` if the adapter does not claim what the task needs."""
        claims = (self.ask("hello") or {}).get("capabilities", [])
        wanted = {"for": "iter"}.get(self.contender.mode, self.contender.mode)
        for capability in [wanted, *(["dag"] if task.nodes else [])]:
            if capability not in claims:
                self.fault = self.fault or f"its adapter has no {capability}"

    def check(self, told: Mapping[str, Any], task: Task, epoch: int, shuffle: bool) -> None:
        """Sets `fault` unless the batches were those of an epoch: of the first or of this one."""
        expected = [task.of_epoch(e, shuffle) for e in {0, epoch}]
        if told["in_order"] in [one["in_order"] for one in expected]:
            self.shown["gave"] = "the oracle's batches"
        elif shuffle and told["by_id"] == expected[0]["by_id"]:
            self.shown["gave"] = "a permutation"
        elif told["batches"] != expected[0]["batches"]:
            self.fault = f"gave {told['batches']} of {expected[0]['batches']} batches"
        else:
            self.fault = "rows repeated, missing or changed"

    def row(self, **about: Any) -> dict[str, Any]:
        fault = {"fault": self.fault} if self.fault else {}
        named = dataclasses.asdict(self.contender)
        return {**about, **named, **self.shown, **fault}


def command(environment: str) -> list[str]:
    """The command that starts an engine. An engine with its own environment must not find this
    project's packages."""
    engine = engines.ENGINES.get(environment, {"adapter": str(HERE / "numpy_floor.py:Adapter")})
    foreign = "requirements" in engine
    python = engines.python_of(environment) if foreign else sys.executable
    inherited = [] if foreign else [os.environ.get("PYTHONPATH", "")]
    paths = os.pathsep.join([str(HERE.parent), str(CONFORMANCE / "src"), *inherited])
    adapter = engine["adapter"]
    if adapter.startswith("adapters/"):
        adapter = str(CONFORMANCE / adapter)
    silent = ["sh", "-c", 'exec "$0" "$@" 2>/dev/null', "env", f"PYTHONPATH={paths}"]
    return [*silent, "JAX_PLATFORMS=cpu", python, "-m", "benchmarks.engine", adapter]


@contextlib.contextmanager
def race(task: Task) -> Iterator[list[Racer]]:
    """All contenders, each in a process that lives until the end."""
    racers = [Racer(contender) for contender in CONTENDERS]
    try:
        for racer in racers:
            racer.enter(task)
        yield racers
    finally:
        for racer in racers:
            racer.pipe.close()


def stored(task: Task, folder: Path) -> dict[str, Any]:
    """The task as an engine gets it. The columns are in a file."""
    path = folder / f"{task.name}-{len(task.columns['id'])}.npz"
    if not path.exists():
        np.savez(path, **task.columns)
    return {"data": str(path), **task.given}


def times(task: Task, shuffle: bool, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """The times of all contenders. In each round, they take turns to run some epochs in a row, of
    which the median counts."""
    given = {**stored(task, folder), "seed": SEED if shuffle else None}
    begun = beginnings(task, given)
    with race(task) as racers:
        for racer in racers:
            told = racer.ask("build", mode=racer.contender.mode, **given) or {}
            racer.shown |= {x: [y] if x in BEGINNING else y for x, y in told.items()}
        for turn in range(-1, rounds):
            for racer in racers:
                # Slow contenders run fewer rounds: their results are not close.
                if len(racer.seconds) >= 3 and sum(racer.seconds.values()) > ENOUGH:
                    continue
                if (told := racer.ask("epochs", count=EPOCHS)) is None:
                    continue
                for epoch, one in enumerate(told, 1 + (turn + 1) * EPOCHS):
                    racer.check(one, task, epoch, shuffle)
                if turn >= 0:  # the first turn warms up what the build has not
                    racer.seconds[turn] = statistics.median(one["seconds"] for one in told)
                    racer.shown["compiling again"] = sum(one["compiling"] for one in told)
        for racer in racers:
            if racer.seconds:
                racer.shown["seconds"] = median(list(racer.seconds.values()))._asdict()
                racer.shown["ratio"] = against_ours(racer, racers)
        about = {"task": task.name, "shuffle": shuffle, "batches": task.batches}
        rows = [racer.row(**about) for racer in racers]
    return [{**row, **begun.get(row["name"], {})} for row in rows]


def beginnings(task: Task, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The time that Datarax and the newest `datarax` of PyPI take to the first result, and the part
    of it spent compiling. They take turns, each time in a new process."""
    found: dict[str, list[dict[str, Any]]] = {}
    for contender in FIRSTS * [x for x in CONTENDERS if x.environment in JUDGED]:
        racer = Racer(contender)
        racer.enter(task)
        if told := racer.ask("build", mode=contender.mode, **given):
            found.setdefault(contender.name, []).append(told)
        racer.pipe.close()
    return {
        name: {what: [one[what] for one in told] for what in BEGINNING}
        for name, told in found.items()
    }


def against_ours(racer: Racer, racers: Sequence[Racer]) -> dict[str, float]:
    """The ratio of its time to that of Datarax, loop to loop or scan to scan, over the rounds that
    both ran."""
    scans = racer.contender.mode == "scan"
    ours = next(r for r in racers if (r.contender.mode == "scan") == scans)
    pairs = [racer.seconds[turn] / ours.seconds[turn] for turn in racer.seconds]
    return median(pairs)._asdict()


def weights(folder: Path, batches: int) -> list[dict[str, Any]]:
    """Peak memory of a shuffled epoch of images, each contender alone."""
    task, small = images(batches), images(CHUNK)
    given, tiny = ({**stored(one, folder), "seed": SEED} for one in (task, small))
    rows = []
    for contender in CONTENDERS:
        racer = Racer(contender)
        racer.enter(task)
        if told := racer.ask("weigh", mode=contender.mode, small=tiny, **given):
            racer.check(told, task, 0, True)
            racer.shown |= {"peak": told["peak"], "size": told["size"]}
        racer.pipe.close()
        rows.append(racer.row(task=task.name))
    return rows


def measure(rounds: int, batches: int) -> dict[str, Any]:
    """All figures, as the file has them."""
    for name in {contender.environment for contender in CONTENDERS} - {""}:
        engines.make(name)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        raced = [
            row
            for task in tasks()
            for shuffle in (False, True)
            for row in times(task, shuffle, folder, rounds)
        ]
        return {
            "machine_info": machine(),
            "datetime": datetime.datetime.now(datetime.UTC).isoformat(),
            "times": raced,
            "memory": weights(folder, batches),
        }
