"""How a ratio becomes a verdict, and a file of figures a page."""

import numpy as np
import pytest
from benchmarks import pages, report
from benchmarks.harness import Estimate, median, verdict


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
