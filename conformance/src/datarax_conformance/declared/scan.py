"""Chapter 70: scan."""

import numpy as np

from ._declare import Table, chain, error, loop, program, scan, step

table = Table()
case = table.case


case(
    "SCAN-001",
    "stacked",
    "scan returns its batches stacked on a new first axis",
    program(12, 4),
    [scan(3)],
)
case(
    "SCAN-001",
    "one",
    "scan(1) returns one batch with a first axis of length 1",
    program(4, 2),
    [scan(1)],
)
case(
    "SCAN-001",
    "graph",
    "scan returns the batches of a graph, stacked",
    chain(8, 4, "keep", "affine(2,1)"),
    [scan(2)],
)
case("SCAN-001", "long", "scan(40) returns the batches of 40 steps", program(80, 2), [scan(40)])
case(
    "SCAN-001",
    "hundreds",
    "scan(300) returns the batches of 300 steps",
    program(0, 2, columns={"id": np.arange(600, dtype=np.int32)}),
    [scan(300)],
)
case(
    "SCAN-002",
    "step",
    "step after a scan continues where the scan ended",
    program(10, 2),
    [scan(2), step(2)],
)
case(
    "SCAN-002",
    "loop",
    "a loop after a scan continues where the scan ended",
    program(10, 2),
    [scan(2), loop(), scan(5), loop()],
)
case(
    "SCAN-003",
    "step",
    "a scan after step starts with the next record",
    program(10, 2),
    [step(2), scan(2)],
)
case(
    "SCAN-003",
    "loop",
    "a scan after a loop that was left by break starts with the next record",
    program(10, 2),
    [loop(take=1), scan(3)],
)
case("SCAN-004", "epochs", "a scan goes on from each epoch into the next", program(4, 2), [scan(5)])
case(
    "SCAN-004",
    "runs-on",
    "under keep, a scan fills the batch at the end of an epoch from the next epoch",
    program(5, 2),
    [scan(6), step()],
)
case(
    "SCAN-004",
    "wide",
    "under keep, a scan of batches wider than the epoch runs through several epochs",
    program(2, 5),
    [scan(3)],
)
case(
    "SCAN-004",
    "shuffled",
    "a scan over several shuffled epochs has each in its own order",
    program(6, 4, seed=8),
    [scan(5)],
    ["shuffle.exact"],
)
case(
    "SCAN-005",
    "drop",
    "under drop, a scan skips the records that do not fill a batch",
    program(10, 4, "drop"),
    [scan(5), step()],
)
case(
    "SCAN-005",
    "pad",
    "under pad, a scan gives padded batches and their masks",
    program(10, 4, "pad"),
    [scan(4), step()],
)
case(
    "SCAN-005",
    "put-back",
    "under pad, a scan puts the mask back where a stage leaves it out",
    chain(5, 3, "pad", "pick(x)"),
    [scan(3)],
)
case(
    "SCAN-006",
    "count",
    "a scan carries the state of a stage from batch to batch and on to the next call",
    chain(6, 3, "keep", "count"),
    [step(), scan(3), step(), scan(2)],
)
case(
    "SCAN-007",
    "whole",
    "scan without a length gives the batches to the end of the epoch",
    program(8, 2),
    [scan(None), step(), scan(None)],
)
case(
    "SCAN-007",
    "drop",
    "under drop, scan without a length gives the whole batches left of the epoch",
    program(10, 4, "drop"),
    [scan(None), step(), scan(None)],
)
case(
    "SCAN-007",
    "pad",
    "under pad, scan without a length ends with the padded batch",
    program(10, 4, "pad"),
    [step(), scan(None), scan(None)],
)
case(
    "SCAN-008",
    "remainder",
    "under keep, a scan() that would end in a short batch is refused, moving nothing",
    program(10, 4),
    [step(), scan(None, expect=error("last-batch")), step()],
)
case(
    "SCAN-009",
    "nothing",
    "scan(0) gives the fields with a first axis of length 0 and moves nothing",
    program(6, 2),
    [step(), scan(0), step()],
)
case(
    "SCAN-009",
    "graph",
    "scan(0) over a graph does not change the state of a stage",
    chain(6, 2, "keep", "count"),
    [scan(0), step(2)],
)
case(
    "SCAN-009",
    "pad",
    "under pad, scan(0) gives the mask too",
    program(5, 2, "pad"),
    [scan(0), step()],
)
case(
    "SCAN-010",
    "sum",
    "scan(2) and then scan(3) give the batches of scan(5)",
    program(7, 2),
    [scan(2), scan(3)],
)
