"""Chapter 70: scan."""

import numpy as np

from ._declare import Table, chain, error, loop, program, scan, step

table = Table()
case = table.case


case("SCAN-001", "stacked", "batches on a new first axis", program(12, 4), [scan(3)])
case("SCAN-001", "one", "a scan of one", program(4, 2), [scan(1)])
case("SCAN-001", "graph", "through a graph", chain(8, 4, "keep", "affine(2,1)"), [scan(2)])
case("SCAN-001", "long", "forty batches", program(80, 2), [scan(40)])
case(
    "SCAN-001",
    "hundreds",
    "three hundred batches",
    program(0, 2, columns={"id": np.arange(600, dtype=np.int32)}),
    [scan(300)],
)
case("SCAN-002", "step", "step goes on after it", program(10, 2), [scan(2), step(2)])
case("SCAN-002", "loop", "so does a loop", program(10, 2), [scan(2), loop(), scan(5), loop()])
case("SCAN-003", "step", "a scan goes on after step", program(10, 2), [step(2), scan(2)])
case(
    "SCAN-003",
    "loop",
    "and after a loop that was broken off",
    program(10, 2),
    [loop(take=1), scan(3)],
)
case("SCAN-004", "epochs", "from epoch to epoch", program(4, 2), [scan(5)])
case("SCAN-004", "runs-on", "within a batch", program(5, 2), [scan(6), step()])
case("SCAN-004", "wide", "batches wider than an epoch", program(2, 5), [scan(3)])
case(
    "SCAN-004",
    "shuffled",
    "each epoch in its own order",
    program(6, 4, seed=8),
    [scan(5)],
    ["shuffle.exact"],
)
case("SCAN-005", "drop", "under drop", program(10, 4, "drop"), [scan(5), step()])
case("SCAN-005", "pad", "under pad", program(10, 4, "pad"), [scan(4), step()])
case(
    "SCAN-005",
    "put-back",
    "the mask is put back where a stage loses it",
    chain(5, 3, "pad", "pick(x)"),
    [scan(3)],
)
case(
    "SCAN-006",
    "count",
    "stage state through a scan and beyond",
    chain(6, 3, "keep", "count"),
    [step(), scan(3), step(), scan(2)],
)
case(
    "SCAN-007", "whole", "to the end of the epoch", program(8, 2), [scan(None), step(), scan(None)]
)
case("SCAN-007", "drop", "under drop", program(10, 4, "drop"), [scan(None), step(), scan(None)])
case("SCAN-007", "pad", "under pad", program(10, 4, "pad"), [step(), scan(None), scan(None)])
case(
    "SCAN-008",
    "remainder",
    "a remainder is refused and nothing moves",
    program(10, 4),
    [step(), scan(None, expect=error("last-batch")), step()],
)
case("SCAN-009", "nothing", "a scan of nothing", program(6, 2), [step(), scan(0), step()])
case(
    "SCAN-009",
    "graph",
    "also through a graph with state",
    chain(6, 2, "keep", "count"),
    [scan(0), step(2)],
)
case("SCAN-009", "pad", "with the mask", program(5, 2, "pad"), [scan(0), step()])
case("SCAN-010", "sum", "two scans are one", program(7, 2), [scan(2), scan(3)])
