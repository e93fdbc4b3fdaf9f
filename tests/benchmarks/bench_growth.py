"""How the time of a batch grows with the data, the batch, the depth and the number of fields."""

import pytest
from benchmarks.harness import cold
from benchmarks.workloads import floor, ours, tabular

AXES = {
    "length": [10**3, 10**4, 10**5, 10**6, 10**7],
    "batch_size": [1, 8, 64, 512, 4096],
    "depth": [1, 3, 10, 30, 100],
    "fields": [1, 4, 16, 64],
}


@pytest.mark.benchmark(group="growth")
@pytest.mark.parametrize("axis, value", [(a, v) for a, values in AXES.items() for v in values])
@pytest.mark.parametrize("mode", ["for", "scan"])
def bench_growth(compare, axis: str, value: int, mode):
    work = tabular("growth", **{axis: value})
    us, _, _ = cold(lambda: ours(work, True, mode))
    hand, _, _ = cold(lambda: floor(work, True, mode))
    compare(us, hand, axis=axis, size=value, mode=mode, batches=work.batches)
