"""Tests how a ratio becomes a verdict, and how a file of figures becomes a page."""

import numpy as np
import pytest
from benchmarks import comparison_page, pages, report
from benchmarks.harness import Estimate, median, verdict
from benchmarks.memory import MIB


@pytest.mark.internal("the statistics of the benchmarks")
def test_the_interval_of_a_median_has_ends_from_the_sample():
    # Of 11 draws fewer than 2 fall below the median 12 times in 2048, so the second ones will do.
    assert median(range(11)) == Estimate(5, 1, 9)
    assert median([3, 1, 2, 4]) == Estimate(2.5, 1, 4)  # too few to leave any out
    assert median([7]) == Estimate(7, 7, 7)


@pytest.mark.internal("the statistics of the benchmarks")
def test_the_interval_of_a_median_misses_it_one_time_in_twenty():
    samples = np.random.default_rng(0).lognormal(size=(4000, 15))
    missed = np.mean([not found.low <= 1 <= found.high for found in map(median, samples)])
    assert 0.02 < missed < 0.05


@pytest.mark.internal("the statistics of the benchmarks")
@pytest.mark.parametrize(
    "found, said",
    [
        (Estimate(1.0, 0.9, 1.2), "within"),
        (Estimate(1.1, 1.05, 1.3), "within"),
        (Estimate(1.2, 1.1, 1.3), "within noise"),
        (Estimate(1.2, 1.11, 1.3), "EXCEEDED"),
    ],
)
def test_a_budget_is_exceeded_only_beyond_the_noise(found, said):
    assert verdict(found, 1.1) == said


@pytest.mark.internal("the pages of the benchmarks")
@pytest.mark.parametrize("name", ["index.md", "comparison.md"])
def test_a_page_shows_what_is_in_the_files_of_figures(name):
    assert (pages.FOLDER / name).read_text() == pages.pages(pages.FOLDER)[name]


@pytest.mark.internal("the pages of the benchmarks")
def test_what_has_no_figures_is_said_not_to_be_measured(tmp_path):
    made = pages.pages(tmp_path)
    assert made["index.md"].count("**Not measured.**") == 2
    assert made["comparison.md"].count("**Not measured.**") == 1


@pytest.mark.internal("the pages of the benchmarks")
@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (0.01234, "0.0123"), (1.0, "1.00"), (12.345, "12.3"), (9876.5, "9876")],
)
def test_figures_have_three_digits(value, text):
    assert report.digits(value) == text


TIMED = {"gave": "the oracle's batches", "seconds": {"value": 1.0, "low": 0.5, "high": 1.5}}
TIMED |= {"first": [1.0, 3.0, 2.0], "compiling": [1.0] * 3, "task": "t", "shuffle": False}
TIMED |= {"ratio": {"value": 2.0, "low": 1.5, "high": 2.5}}


@pytest.fixture
def figures():
    """Figures of Datarax and of another engine, in both modes. Datarax exceeds the memory cap."""
    names = [("Datarax", "for"), ("datarax 0.1.17", "for")]
    names += [(f"{name}-scan", "scan") for name, _ in names]
    weighed = {"peak": 200 * MIB, "size": 100 * MIB}
    machine = {"cpu": "c", "cores": 2, "device": "d", "python": "3", "system": "s", "versions": {}}
    return {
        "machine_info": machine,
        "datetime": "2026-01-01",
        "times": [{"name": name, "mode": mode, **TIMED} for name, mode in names],
        "memory": [{"name": name, "mode": mode, **weighed} for name, mode in names],
    }


def rows_of(page, head):
    """The first cells of the tables that begin with this head."""
    tables = [part for part in page.split("\n\n") if part.startswith(f"| {head} |")]
    return [[line.split(" | ")[0].strip("| ") for line in t.splitlines()[2:]] for t in tables]


@pytest.mark.internal("the pages of the benchmarks")
def test_loops_and_scans_are_ranked_apart(figures):
    page = comparison_page.page(figures)
    assert rows_of(page, "loop") == [["Datarax", "datarax 0.1.17"]]
    assert rows_of(page, "scan") == [["Datarax-scan", "datarax 0.1.17-scan"]]


@pytest.mark.internal("the pages of the benchmarks")
def test_beginnings_are_compared_in_pairs(figures):
    figures["times"][1]["first"] = [1.5, 1.5, 3.0]
    shown = {
        title: (found, interval) for title, found, interval, *_ in comparison_page.lines(figures)
    }
    assert shown["`for`, first result no later, t, stored"] == ("1.50", "0.500 to 1.50")
    assert shown["`for`, compiling no later, t, stored"][0] == "1.00"
    how = "`for` 10 times as fast as that of datarax 0.1.17, t, stored"
    assert shown[how] == ("2.00", "1.50 to 2.50")


@pytest.mark.internal("the pages of the benchmarks")
def test_the_verdict_on_memory_is_said_to_be_ours(figures):
    told = comparison_page.memory(figures["memory"])
    assert "| datarax 0.1.17 | 200 MiB | 2.00 | Datarax fails: hard cap: " in told
    assert "| datarax 0.1.17-scan | 200 MiB | 2.00 | Datarax-scan fails: hard cap: " in told
