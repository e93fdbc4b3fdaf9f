"""Chapter 20: step."""

import numpy as np

from ._declare import Table, build, id_and_x, program, same_rows, step

table = Table()
case = table.case

case(
    "STEP-001",
    "first-batches",
    "step returns consecutive batches of records, starting at record 0",
    program(12, 4),
    [step(2)],
)
case(
    "STEP-001",
    "one-row",
    "step with batch_size=1 returns one record after the other",
    program(3, 1),
    [step(3)],
)
case(
    "STEP-002",
    "next-epoch",
    "step continues with record 0 after the last record of an epoch",
    program(8, 4),
    [step(5)],
)
case(
    "STEP-002",
    "one-record",
    "step over a single record returns it in every batch",
    program(1, 1),
    [step(3)],
)
case(
    "STEP-002",
    "one-batch-epochs",
    "step returns an epoch each time if batch_size is the number of records",
    program(5, 5),
    [step(3)],
)
case(
    "STEP-003",
    "runs-on",
    "under keep, step fills the batch at the end of an epoch from the next epoch",
    program(10, 4),
    [step(6)],
)
case(
    "STEP-003",
    "almost-all",
    "under keep, step with batches of 4 over 5 records fills them across epochs",
    program(5, 4),
    [step(6)],
)
case(
    "STEP-003",
    "shuffled",
    "a batch across two shuffled epochs holds each part in its own epoch's order",
    program(10, 4, seed=5),
    [step(6)],
    ["shuffle.exact"],
)
case(
    "STEP-003",
    "any-order",
    "steps of 8 and of 20 records return the same rows over two shuffled epochs",
    program(20, 8, seed=9),
    [
        build(to="epochs", batch_size=20),
        step(2, on="epochs", note="epochs"),
        step(5, expect=same_rows("epochs")),
    ],
)
case(
    "STEP-004",
    "three-epochs",
    "under keep, a batch of 10 over 3 records holds more than three epochs",
    program(3, 10),
    [step(3)],
)
case(
    "STEP-004",
    "one-record",
    "under keep, a batch of 4 over a single record repeats that record",
    program(1, 4),
    [step(2)],
)
case(
    "STEP-004",
    "by-one",
    "under keep, batches one row longer than the epoch run on from epoch to epoch",
    program(4, 5),
    [step(5)],
)
case(
    "STEP-005",
    "skips",
    "under drop, step skips the records at the end that do not fill a batch",
    program(10, 4, "drop"),
    [step(5)],
)
case(
    "STEP-005",
    "divides",
    "under drop, step skips no record if batch_size divides the epoch",
    program(8, 4, "drop"),
    [step(4)],
)
case(
    "STEP-005",
    "one-batch",
    "under drop, step skips no record if batch_size is the number of records",
    program(4, 4, "drop"),
    [step(3)],
)
ZEROS = {"without": ["mask"]}  # the cases of STEP-007 check the mask
case(
    "STEP-006",
    "zeros",
    "under pad, step fills the last batch of an epoch with zero rows",
    program(10, 4, "pad"),
    [step(4, expect=ZEROS)],
)
case(
    "STEP-006",
    "kinds",
    "under pad, padding is zero in boolean, integer and float fields",
    program(
        3,
        4,
        "pad",
        columns={"id": np.arange(3, dtype=np.int32)}
        | {
            f"f_{kind}": np.array([1, 0, 1]).astype(kind)
            for kind in ("bool", "int8", "uint8", "int16", "uint32", "float16", "float32")
        },
    ),
    [step(2, expect=ZEROS)],
)
case(
    "STEP-006",
    "wide",
    "under pad, a batch wider than the epoch is padded, in a (2, 3)-shaped field too",
    program(
        3,
        5,
        "pad",
        columns=id_and_x(3) | {"image": np.arange(18, dtype=np.float32).reshape(3, 2, 3)},
    ),
    [step(2, expect=ZEROS)],
)
case(
    "STEP-007",
    "mask",
    "under pad, the mask is True for records and False for padding",
    program(5, 3, "pad"),
    [step(4)],
)
case(
    "STEP-007",
    "divides",
    "under pad, a batch without padding has a mask that is True throughout",
    program(6, 3, "pad"),
    [step(2)],
)
case(
    "STEP-008",
    "next-epoch",
    "under pad, the batch after a padded one starts the next epoch with record 0",
    program(7, 4, "pad"),
    [step(5)],
)
case(
    "STEP-008",
    "divides",
    "under pad, no empty batch follows an epoch that batch_size divides",
    program(8, 4, "pad"),
    [step(4)],
)
case(
    "STEP-009",
    "sizes",
    "batches of 3 and of 7 rows from step hold the same rows when joined",
    program(10, 3),
    [step(14, note="a"), build(to="b", batch_size=7), step(6, on="b", expect=same_rows("a"))],
)
case(
    "STEP-009",
    "wide",
    "batches of 3 and of 12 rows over 4 records hold the same rows when joined",
    program(4, 3),
    [step(8, note="a"), build(to="b", batch_size=12), step(2, on="b", expect=same_rows("a"))],
)
