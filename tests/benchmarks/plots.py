"""The plots of the benchmark pages, as SVG that is the same for the same figures."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

if TYPE_CHECKING:
    from benchmarks.report import Run

STYLE = {
    "svg.hashsalt": "datarax",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
STORED, SHUFFLED, BY_HAND = "#00796b", "#e64a19", "#78909c"


def write(run: "Run", folder: Path) -> None:
    with plt.rc_context(STYLE):
        for name, draw in {"modes": modes, "growth": growth}.items():
            if run.of(name):
                figure = draw(run)
                figure.savefig(
                    folder / f"{run.machine['platform']}-{name}.svg",
                    metadata={"Date": None, "Creator": None},
                )
                plt.close(figure)


def modes(run: "Run") -> Any:
    """A panel for each mode, with a row for each workload: ratio, interval and budget."""
    names = list(dict.fromkeys(row.info["workload"] for row in run.of("modes")))
    figure, panels = plt.subplots(1, 3, figsize=(10, 0.35 * len(names) + 1.4), sharey=True)
    for panel, mode in zip(panels, ("for", "step", "scan"), strict=True):
        for shuffle, colour, shift in ((False, STORED, -0.15), (True, SHUFFLED, 0.15)):
            rows = run.of("modes", mode=mode, shuffle=shuffle)
            places = [names.index(row.info["workload"]) + shift for row in rows]
            for place, row in zip(places, rows, strict=True):
                if row.budget is not None:
                    panel.plot([row.budget] * 2, [place - 0.13, place + 0.13], color="black", lw=2)
            panel.errorbar(
                [row.found.value for row in rows],
                places,
                xerr=[
                    [row.found.value - row.found.low for row in rows],
                    [row.found.high - row.found.value for row in rows],
                ],
                fmt="o",
                ms=4,
                color=colour,
                label="shuffled" if shuffle else "stored order",
            )
        panel.axvline(1, color=BY_HAND, lw=1, ls="--")
        panel.set(xscale="log", title=f"{mode}", xlabel="times the hand-written side")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_locator(NullLocator())
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    panels[0].plot([], [], color="black", lw=2, label="budget")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def growth(run: "Run") -> Any:
    """The time of a batch along each axis, on logarithmic scales: the slope is the exponent."""
    from benchmarks.report import AXES

    figure, panels = plt.subplots(1, len(AXES), figsize=(10, 3), sharey=True)
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        for mode, colour in (("for", STORED), ("scan", SHUFFLED)):
            rows = run.of("growth", axis=axis, mode=mode)
            sizes = [row.info["size"] for row in rows]
            for side, style, name in (("ours", "-", ""), ("floor", ":", " by hand")):
                found = [row.batch(side).value for row in rows]
                panel.plot(sizes, found, style, marker=".", color=colour, label=mode + name)
        panel.set(xscale="log", yscale="log", xlabel=label)
    panels[0].set_ylabel("µs a batch, shuffled")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
