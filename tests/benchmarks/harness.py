"""Measures a ratio of times, both sides in turn in one process, and its confidence interval.

The machine's speed drifts, so each ratio is of two runs next to each other in time. The result is
the median over such pairs, with its 95 % confidence interval.
"""

import gc
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

ROUNDS = (11, 101)
"""The fewest and the most pairs that are timed."""

COMPILING = "/jax/core/compile/"
"""The prefix of JAX's events for tracing, lowering and compiling."""


class Estimate(NamedTuple):
    """A median, and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def median(sample: Sequence[float]) -> Estimate:
    """The median of a sample. Its interval assumes nothing about the distribution.

    The true median lies outside the k-th smallest and k-th largest of n draws only where fewer
    than k of them fell on one side of it, and each side is as likely as the other.
    """
    ordered, n = sorted(sample), len(sample)
    ends, tail = 0, 0.0
    for k in range(n // 2):
        tail += math.comb(n, k) / 2**n
        if 2 * tail > 0.05:
            break
        ends = k
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    return Estimate(middle, ordered[ends], ordered[n - 1 - ends])


def verdict(found: Estimate, budget: float) -> str:
    """Whether a budget holds. It is exceeded only where the whole interval lies above it."""
    if found.value <= budget:
        return "within"
    return "within noise" if found.low <= budget else "EXCEEDED"


class Side(NamedTuple):
    """One side of a comparison: `call` is timed, `prepare` before it is not.

    If the work goes batch by batch, `taker()` returns a function that returns the next batch.
    """

    prepare: Callable[[], Any]
    call: Callable[[], Any]
    taker: Callable[[], Callable[[], Any]] | None = None

    def run(self) -> tuple[float, Any]:
        """Seconds until the result is there, and the result."""
        self.prepare()
        start = time.perf_counter()
        result = jax.block_until_ready(self.call())
        return time.perf_counter() - start, result


class Compiler:
    """Counts the seconds that JAX spends on tracing, lowering and compiling."""

    def __init__(self):
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, seconds: float, **_: Any) -> None:
        self.seconds += seconds * event.startswith(COMPILING)


COMPILER = Compiler()


def cold(make: Callable[[], Side]) -> tuple[Side, Any, dict[str, float]]:
    """A new side, the result of its first call, and the seconds that making and calling it took."""
    gc.collect()
    before, start = COMPILER.seconds, time.perf_counter()
    side = make()
    _, result = side.run()
    first = time.perf_counter() - start
    return side, result, {"first": first, "compiling": COMPILER.seconds - before}


def in_turn(benchmark: Any, ours: Side, floor: Side, seconds: float) -> dict[str, Estimate]:
    """Times both sides in turn, for about `seconds`; ours with the clock of pytest-benchmark.

    The side that goes first alternates, since the second of a pair finds a warmer cache. Both sides
    have run before with what is timed, so nothing compiles any more.
    """
    pair = min(ours.run()[0] + floor.run()[0] for _ in range(2))
    rounds = min(max(int(seconds / pair), ROUNDS[0]), ROUNDS[1])
    by_hand: list[float] = []
    floor_first = True

    def before() -> None:
        if floor_first:
            by_hand.append(floor.run()[0])
        ours.prepare()

    def after() -> None:
        nonlocal floor_first
        if not floor_first:
            by_hand.append(floor.run()[0])
        floor_first = not floor_first

    benchmark.pedantic(
        lambda: jax.block_until_ready(ours.call()), setup=before, teardown=after, rounds=rounds
    )
    measured = benchmark.stats.stats.data
    return {
        "ratio": median([a / b for a, b in zip(measured, by_hand, strict=True)]),
        "ours": median(measured),
        "floor": median(by_hand),
    }
