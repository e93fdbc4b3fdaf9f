"""Makes the pages of a run from its JSON: a Markdown table for every question, and SVG plots.

A page reads its figures from a file beside it. If there is no file, nothing was measured, and the
page says so.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Estimate, verdict

from datarax._types import spec_text

MADE = "<!-- Made by `make bench` from the files of figures beside it: do not edit. -->\n"
NOT_MEASURED = "not measured"
MICRO = 1e6
WORDS = {"gave", "hands out", "ours", "rows of a batch", "stages", "verdict", "version"}
"""Columns that hold no figures."""


class Row:
    """One benchmark of a run."""

    def __init__(self, benchmark: dict[str, Any]):
        self.group: str = benchmark["group"]
        self.info: dict[str, Any] = benchmark["extra_info"]
        self.found = Estimate(**self.info["found"])
        self.budget: float | None = self.info["budget"]
        self.unit: str = self.info["unit"]

    @property
    def title(self) -> str:
        if self.group == "modes":
            return f"`{self.info['mode']}`, {self.info['workload']}, {self.order}"
        return self.info["title"]

    @property
    def order(self) -> str:
        return "shuffled" if self.info["shuffle"] else "stored"

    @property
    def verdict(self) -> str:
        return "" if self.budget is None else verdict(self.found, self.budget)

    def batch(self, side: str) -> Estimate:
        """Microseconds per batch of one side."""
        times, batches = self.info[side], self.info["batches"]
        return Estimate(*(times[end] * MICRO / batches for end in Estimate._fields))


class Run:
    """The figures of one run, and its machine."""

    def __init__(self, path: Path):
        self.file: dict[str, Any] = json.loads(path.read_text())
        self.machine: dict[str, Any] = self.file["machine_info"]
        self.rows = [Row(benchmark) for benchmark in self.file["benchmarks"]]

    def of(self, group: str, **wanted: Any) -> list[Row]:
        return [
            row for row in self.rows if row.group == group and wanted.items() <= row.info.items()
        ]


def read(path: Path) -> Run | None:
    return Run(path) if path.exists() else None


# Figures and tables in Markdown.


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def spread(found: Estimate) -> str:
    if found.low == found.high:
        return "exact"
    return f"{digits(found.low)} to {digits(found.high)}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---" if name in WORDS else "---:" for name in head[1:]]
    ruled = [head, ["---", *rule], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in ruled) + "\n"


def machine(run: dict[str, Any]) -> str:
    about = run["machine_info"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{about['cpu']}, {about['cores']} cores; device {about['device']}; "
        f"Python {about['python']} on {about['system']}; {versions}; {run['datetime'][:10]}.\n\n"
    )


def lines(run: Run) -> Iterator[tuple[str, str, str, str, str]]:
    """The rows of the budget, as they are shown."""
    for row in run.rows:
        if row.budget is not None:
            found = f"{digits(row.found.value)} {row.unit}"
            yield row.title, found, spread(row.found), f"{row.budget:g}", row.verdict


def budget(run: Run) -> str:
    return table(("what", "found", "95 % interval", "budget", "verdict"), lines(run))


def batches(run: Run) -> str:
    """Microseconds per batch in every mode, and how much faster `scan` is than `for`."""
    rows = []
    for looped in run.of("modes", mode="for"):
        same = {name: looped.info[name] for name in ("workload", "shuffle")}
        others = [row for mode in ("step", "scan") for row in run.of("modes", mode=mode, **same)]
        if len(others) < 2:
            continue
        stepped, scanned = others
        times = [
            looped.batch("ours"),
            stepped.batch("ours"),
            looped.batch("floor"),
            scanned.batch("ours"),
            scanned.batch("floor"),
        ]
        gain = looped.batch("ours").value / scanned.batch("ours").value
        cells = [digits(x) for x in (*(time.value for time in times), gain)]
        rows.append((f"{looped.info['workload']}, {looped.order}", *cells))
    head = ("`for`", "`step`", "loop by hand", "`scan`", "scan by hand", "`for` over `scan`")
    return table(("µs a batch", *head), rows)


def cold(run: Run) -> str:
    def cells(row: Row) -> Iterable[str]:
        for side in ("ours", "floor"):
            for what in ("first", "compiling"):
                yield digits(row.info["cold"][side][what])

    head = ("seconds", "pipeline", "of it compiling", "by hand", "of it compiling")
    return table(head, ((row.title, *cells(row)) for row in run.of("modes")))


def slopes(run: Run) -> str:
    """The exponent of the growth of a batch's time: the slope of a line through the logarithms."""
    exponents = []
    for axis, mode in sorted({(r.info["axis"], r.info["mode"]) for r in run.of("growth")}):
        rows = run.of("growth", axis=axis, mode=mode)
        sizes = [math.log(row.info["size"]) for row in rows]
        both = (
            f"{_slope(sizes, [math.log(row.batch(side).value) for row in rows]):.2f}"
            for side in ("ours", "floor")
        )
        span = f"{rows[0].info['size']:,} to {rows[-1].info['size']:,}"
        exponents.append((f"{AXES[axis]}, `{mode}`", span, *both))
    return table(("exponent of a batch's time in", "range", "pipeline", "by hand"), exponents)


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    pairs = list(zip(x, y, strict=True))
    return sum((a - middle_x) * (b - middle_y) for a, b in pairs) / sum(
        (a - middle_x) ** 2 for a in x
    )


AXES = {
    "length": "records in the source",
    "batch_size": "records in a batch",
    "depth": "stages",
    "fields": "fields",
}


def page(cpu: Run | None, gpu: Run | None) -> str:
    """The page of the library's own figures."""
    text = MADE + "# Benchmarks\n\n" + INTRODUCTION
    for title, run, how in (("On the CPU", cpu, "make bench"), ("On a GPU", gpu, "make bench-gpu")):
        text += f"## {title}\n\n"
        if run is None:
            text += f"**{NOT_MEASURED.capitalize()}.** `{how}` measures it where there is one.\n\n"
            continue
        text += machine(run.file)
        for heading, what, made in SECTIONS:
            if any(run.of(group) for group in what):
                name = heading.format(device=run.machine["platform"])
                text += f"### {name}\n\n{made(run)}"
    return f"{text}## Workloads\n\n{workloads()}".rstrip() + "\n"


INTRODUCTION = """\
Every ratio is the time of a pipeline over that of the same work written by hand in JAX. Both are
timed in turn in one process: a figure is the median of such pairs, beside its 95 % confidence
interval. A budget counts as exceeded if the whole interval lies above it. The
[workloads](#workloads) are listed at the end, [Interpretation](interpretation.md) says what the
figures mean, and [Comparison](comparison.md) has other engines.

"""


def workloads() -> str:
    """What each workload reads and does, from the workload itself."""
    from benchmarks.workloads import WORKLOADS, pipeline

    def stages(names: list[str], learns: bool) -> str:
        shown = ", ".join(names) if len(names) < 5 else f"{names[0]}, {len(names)} times"
        return (shown or "none") + ("; trains a small network" if learns else "")

    rows = []
    for work in WORKLOADS:
        made = pipeline(work, shuffle=False)
        batch = spec_text(made.node_specs["source"])
        rows.append((work.name, f"{work.length:,}", batch, stages(list(made.nodes), work.learns)))
    return table(("workload", "records", "rows of a batch", "stages"), rows)


def plotted(name: str, alternative: str) -> Callable[[Run], str]:
    return lambda run: f"![{alternative}]({run.machine['platform']}-{name}.svg)\n\n"


def growth(run: Run) -> str:
    plot = plotted("growth", "Time of a batch against the size of the data, the batch, the graph")
    return plot(run) + slopes(run)


def modes(run: Run) -> str:
    plot = plotted("modes", "Ratio to the hand-written side, for every workload, mode and order")
    return plot(run) + batches(run)


SECTIONS: tuple[tuple[str, tuple[str, ...], Callable[[Run], str]], ...] = (
    ("The budget ({device})", ("budget", "modes"), budget),
    ("The time of a batch ({device})", ("modes",), modes),
    ("The first result, from nothing ({device})", ("modes",), cold),
    ("Growth ({device})", ("growth",), growth),
)


# In the terminal.

COLOURS = {"within": None, "met": None, "within noise": "yellow"}


def show(title: str, found: Iterable[tuple[str, str, str, str, str]]) -> int:
    """Prints the figures with what was asked for. Returns how many rows fail."""
    from rich.console import Console
    from rich.table import Table

    printed, failed = Table(title=title), 0
    for name in ("what", "found", "95 % interval", "asked", "verdict"):
        printed.add_column(name, justify="left" if name in ("what", "verdict") else "right")
    for *cells, said in found:
        bad = said not in COLOURS
        failed += bad
        colour = "bold red" if bad else COLOURS[said]
        printed.add_row(*(cell.replace("`", "") for cell in cells), said, style=colour)
    console = Console()
    console.print(printed)
    console.print(f"{printed.row_count} rows, {failed} of them not as asked.")
    return failed
