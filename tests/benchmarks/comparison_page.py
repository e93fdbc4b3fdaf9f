"""Makes the page of the engines from their figures, and judges the targets."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import Estimate, median
from benchmarks.memory import MIB, classify_rss_comparison
from benchmarks.report import MADE, NOT_MEASURED, digits, machine, spread, table

NEWEST = "datarax 0.1.17"
"""The newest `datarax` of PyPI."""

OURS = ("Datarax", "Datarax-scan")
NO_ENGINE = ("naive NumPy engine", "NumPy indexing")
"""Contenders that show the host's floor. They are not released engines."""

MEMORY = """\
The last column judges Datarax, never the engine of its row: ours fails where it takes more than the
cap allows, or more than that engine by more than the margin. See
[Interpretation](interpretation.md#memory).

"""


class Target(NamedTuple):
    """What the comparison must show: `found` must be at least `wanted`."""

    title: str
    found: Estimate
    wanted: float

    @property
    def verdict(self) -> str:
        if self.found.value >= self.wanted:
            return "met"
        return "within noise" if self.found.high >= self.wanted else "MISSED"


def targets(figures: dict[str, Any]) -> Iterator[Target]:
    for row in figures["times"]:
        if row["name"] in (*OURS, *NO_ENGINE) or "ratio" not in row or "fault" in row:
            continue
        scan, ratio = row["mode"] == "scan", Estimate(**row["ratio"])
        where = f"{row['task']}, {order(row)}"
        newest = row["name"].removesuffix("-scan") == NEWEST
        kind = "`scan`" if scan else "`for`"
        title = f"{kind} as fast as that of {row['name'].removesuffix(' scan')}, {where}"
        if newest and (row["shuffle"] or not scan):
            wanted = 3.0 if scan else 10.0
            yield Target(title.replace("as fast", f"{wanted:g} times as fast"), ratio, wanted)
        else:
            yield Target(title, ratio, 1.0)
        if newest:
            [ours] = [r for r in alike(figures, row) if r["name"] == OURS[scan]]
            for what, name in (("first", "first result"), ("compiling", "compiling")):
                found = [x / y for x, y in zip(row[what], ours[what], strict=True)]
                yield Target(f"{kind}, {name} no later, {where}", median(found), 1)


def lines(figures: dict[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    """The targets, as they are shown."""
    for one in targets(figures):
        yield one.title, digits(one.found.value), spread(one.found), f"{one.wanted:g}", one.verdict


def alike(figures: dict[str, Any], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the same race."""
    key = ("task", "shuffle")
    return [other for other in figures["times"] if all(other[k] == row[k] for k in key)]


def order(row: dict[str, Any]) -> str:
    return "shuffled" if row["shuffle"] else "stored"


def page(figures: dict[str, Any] | None) -> str:
    text = MADE.replace("make bench", "make bench-engines") + "# Comparison\n\n" + INTRODUCTION
    if figures is None:
        return f"{text}**{NOT_MEASURED.capitalize()}.** `make bench-engines` does.\n\n{NOTES}"
    text += machine(figures)
    races = {(row["task"], row["shuffle"]): row for row in figures["times"]}
    for (task, _), first in races.items():
        text += f"## {task}, {order(first)}\n\n"
        # Not in one table: a scan is another kind of work, and is only ranked among scans.
        rows = alike(figures, first)
        text += race("loop", [row for row in rows if row["mode"] != "scan"])
        text += race("scan", [row for row in rows if row["mode"] == "scan"])
    text += "## Memory\n\n" + memory(figures["memory"])
    text += "## Targets\n\n" + table(
        ("what", "found", "95 % interval", "wanted", "verdict"),
        lines(figures),
    )
    return text + NOTES + places(figures["times"])


def race(kind: str, rows: list[dict[str, Any]]) -> str:
    counted = [row for row in rows if "seconds" in row and "fault" not in row]
    text = table(
        (kind, "gave", "ms an epoch", "95 % interval", "times ours", "first", "compiling"),
        (
            (
                row["name"],
                row["gave"],
                *milliseconds(row),
                digits(row["ratio"]["value"]),
                f"{digits(statistics.median(row['first']))} s",
                f"{digits(statistics.median(row['compiling']))} s"
                if any(row["compiling"])
                else "none",
            )
            for row in sorted(counted, key=lambda row: row["seconds"]["value"])
        ),
    )
    for row in rows:
        if "fault" in row:
            text += f"- {row['name']}: not counted, {row['fault']}\n"
        elif row.get("compiling again"):
            text += f"- {row['name']}: compiles again in every epoch\n"
    return text.rstrip() + "\n\n"


def milliseconds(row: dict[str, Any]) -> tuple[str, str]:
    found = Estimate(*(1e3 * row["seconds"][end] for end in Estimate._fields))
    return digits(found.value), spread(found)


def memory(rows: list[dict[str, Any]]) -> str:
    """Peak memory of every contender, and the verdict on Datarax compared with it."""
    ours = {scan: next(r for r in rows if r["name"] == OURS[scan]) for scan in (False, True)}

    def line(row: dict[str, Any]) -> tuple[str, ...]:
        if "fault" in row or "peak" not in row:
            return row["name"], NOT_MEASURED, "", row.get("fault", "")
        our = ours[row["mode"] == "scan"]
        judged = classify_rss_comparison(our["peak"], row["peak"], size=row["size"])
        verdict = {"pass": "passes", "fail": "fails", "skip": "is not compared"}[judged.outcome]
        said = "" if row is our else f"{our['name']} {verdict}: {judged.reason}"
        times = f"{digits(row['peak'] / row['size'])}"
        return row["name"], f"{row['peak'] / MIB:.0f} MiB", times, said

    head = ("engine", "peak over base", "times the data", "ours")
    return MEMORY + table(head, map(line, rows))


def places(rows: list[dict[str, Any]]) -> str:
    """What each engine hands out, and on which device."""
    gives = {row["name"]: row for row in rows if "gives" in row}
    return "\n" + table(
        ("engine", "version", "hands out"),
        ((name, row["version"], row["gives"]) for name, row in gives.items()),
    )


INTRODUCTION = """\
The engines of the conformance suite, driven through the same adapters. Each runs in a process of
its own, in turn with the others. A turn is a few epochs in a row, of which the median counts, since
in training, too, an engine finds its own data in the caches. A time counts only if the rows that
were handed out in those very epochs are right: the batches of the oracle (the model of the spec),
or, where an engine shuffles in an order of its own, every record once. *Times ours* is the
engine's time over ours, a `scan` against `Datarax-scan`, all else against `Datarax`. *first* is the
time to the first result, of which *compiling* is a part: taken once, but of Datarax and of the
newest `datarax` of PyPI in three processes in turn, of which the median counts.

"""

NOTES = """\
## Interpretation Notes

What is equal: the columns, the batch size, the number of batches, that every batch is waited for,
and that every row is checked. What is not:

- **Where the batches are.** Engines that hand out NumPy arrays or tensors of the host have not put
  them where a model could use them; those that hand out arrays of JAX have. On an accelerator the
  former would still have to be sent there. The table at the end says what each hands out.
- **What runs where.** Datarax, the `datarax` of PyPI and cyreal hold the data as arrays of JAX and
  gather, shuffle and transform on JAX's default device. Grain, PyTorch, tf.data and the two NumPy
  entries work on the CPU, whatever device JAX has. Grain and PyTorch run here without worker
  processes, which would help where reading or decoding takes the time, and cost where it does not.
- **How a record is read.** Grain reads one record at a time through Python and stacks them: made
  for records that are files, not for columns in memory. It runs with `ReadOptions(num_threads=0)`,
  so it reads none ahead.
- **Which DataLoader.** "PyTorch DataLoader" is the `StatefulDataLoader` of torchdata, the one that
  can be resumed, over a dataset that takes a whole batch of indices at once.
- **Beginning again.** Before every epoch the race calls `reset()` where an engine, or its adapter,
  has one, outside the time that is measured: a second loop over `datarax` 0.1.17 is empty without
  it. `datarax` 0.1.4 has none, so its second loop stays empty (ITER-006 in the
  [results](../conformance/results.md#ITER-006)), which is why it "gave 0 of" its batches.
- **`scan` is another kind of work.** It makes all batches of an epoch in one compiled program and
  hands them out stacked; in training, the step would be part of that program. It is compared with
  other scans only.
- **Shuffling.** Datarax computes an order that can be entered anywhere; tf.data fills a buffer as
  large as the data first, and the NumPy entry draws a permutation.
- **NumPy indexing is no engine**: no state to save, no cursor, no graph, no device. It shows what
  the host takes to copy the rows, and what an engine costs on top of that.

A ratio here says nothing about data that do not fit in memory, about files, about decoding, about
other machines, or about a training step so long that any of these engines keeps up with it. See
[Interpretation](interpretation.md).
"""


def read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None
