"""Tests the rule that judges memory, branch by branch, and, on a small scale, that memory stays
flat.
"""

import math

import pytest
from benchmarks import memory
from benchmarks.memory import MIB, Verdict, classify_rss_comparison

SIZE = 100 * MIB


def judge(ours: float, peer: float | None, **limits: float) -> Verdict:
    """The verdict for peaks in MiB over 100 MiB of data."""
    peak = None if peer is None else peer * MIB
    return classify_rss_comparison(ours * MIB, peak, size=SIZE, **limits)


@pytest.mark.internal("the rule for memory")
@pytest.mark.parametrize("peer", [None, 0.0, 1.0, 150.0, 1000.0])
def test_more_than_the_cap_fails_whatever_the_peer_does(peer):
    assert judge(111, peer) == Verdict(
        "fail", "hard cap: 111.0 MiB for 100.0 MiB of data is more than 1.1 times the data"
    )


@pytest.mark.internal("the rule for memory")
def test_the_cap_itself_is_allowed():
    assert judge(110, 110).outcome == "pass"


@pytest.mark.internal("the rule for memory")
def test_a_wider_cap_must_be_asked_for():
    assert judge(150, 150).outcome == "fail"
    assert judge(150, 150, cap=1.6).outcome == "pass"


@pytest.mark.internal("the rule for memory")
def test_without_a_peer_there_is_no_comparison():
    assert judge(105, None) == Verdict(
        "skip",
        "no peer: 105.0 MiB for 100.0 MiB of data is below the cap, and the peer was not measured",
    )


@pytest.mark.internal("the rule for memory")
@pytest.mark.parametrize("peer", [0.0, 1.9])
def test_a_peer_that_takes_nothing_is_skipped_and_no_allocator_is_blamed(peer):
    outcome, reason = judge(105, peer)
    assert outcome == "skip"
    assert reason.startswith(f"null floor: the peer took {peer:.1f} MiB, so it is zero-copy or was")
    assert "allocator" not in reason and "noise" not in reason


@pytest.mark.internal("the rule for memory")
def test_the_null_floor_itself_counts_as_a_measurement():
    assert judge(2, 2).outcome == "pass"
    assert judge(105, 2).outcome == "fail"


@pytest.mark.internal("the rule for memory")
def test_less_than_the_peer_passes():
    assert judge(101, 216) == Verdict(
        "pass", "101.0 MiB for 100.0 MiB of data, the peer took 216.0 MiB"
    )


@pytest.mark.internal("the rule for memory")
def test_nothing_beside_a_peer_that_takes_something_passes():
    assert judge(0, 100).outcome == "pass"


@pytest.mark.internal("the rule for memory")
def test_a_little_more_than_the_peer_passes():
    assert judge(105, 100).outcome == "pass"


@pytest.mark.internal("the rule for memory")
def test_more_than_the_margin_over_the_peer_fails():
    assert judge(106, 100) == Verdict(
        "fail",
        "106.0 MiB for 100.0 MiB of data, the peer took 100.0 MiB: more than 1.05 times as much",
    )


@pytest.mark.internal("the rule for memory")
@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_what_is_no_number_of_bytes_is_refused(wrong):
    with pytest.raises(ValueError, match="`ours` must be a number of bytes"):
        judge(wrong, 100)
    with pytest.raises(ValueError, match="`peer` must be a number of bytes"):
        judge(100, wrong)


@pytest.mark.internal("the rule for memory")
def test_no_data_cannot_be_judged():
    with pytest.raises(ValueError, match="`size` must be positive"):
        classify_rss_comparison(1, 1, size=0)


on_linux = pytest.mark.skipif(not memory.is_measurable(), reason="memory is measured on Linux")


@on_linux
@pytest.mark.internal("a process of its own: what others do there would count")
@pytest.mark.parametrize("task, count", [("batches", 10_000), ("pipelines", 50)])
def test_what_has_been_used_leaves_nothing_behind(task, count):
    assert memory.in_own_process(task, count=count)["grown"] < 4 * MIB


@on_linux
@pytest.mark.internal("the budget of memory, on a small scale")
def test_numpy_data_are_not_copied():
    took = memory.in_own_process("epoch", mode="for", shuffle=True, mebibytes=256)
    judged = classify_rss_comparison(took["peak"], None, size=took["size"], cap=1.2)
    assert judged.outcome == "skip", judged.reason
