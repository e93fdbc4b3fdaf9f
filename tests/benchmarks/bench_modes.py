"""Every workload in every mode, stored and shuffled, compared with the same work by hand."""

import pytest
from benchmarks.harness import cold
from benchmarks.workloads import MODES, WORKLOADS, Mode, Workload, check, floor, ours

BUDGET = {"for": 0.6, "step": 2.0, "scan": 1.1}
SHUFFLED_SCAN = 1.3


def budget(work: Workload, mode: Mode, shuffle: bool) -> float | None:
    if work.learns and mode != "scan":
        return None  # a training step takes its time in any loop
    return SHUFFLED_SCAN if shuffle and mode == "scan" else BUDGET[mode]


@pytest.mark.benchmark(group="modes")
@pytest.mark.parametrize("shuffle", [False, True], ids=["stored", "shuffled"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("work", WORKLOADS, ids=str)
def bench_mode(compare, work: Workload, mode: Mode, shuffle: bool):
    us, our_first, our_cost = cold(lambda: ours(work, shuffle, mode))
    hand, its_first, its_cost = cold(lambda: floor(work, shuffle, mode))
    check(us, hand, (our_first, its_first))
    compare(
        us,
        hand,
        budget=budget(work, mode, shuffle),
        workload=work.name,
        mode=mode,
        shuffle=shuffle,
        batches=work.batches,
        cold={"ours": our_cost, "floor": its_cost},
    )
