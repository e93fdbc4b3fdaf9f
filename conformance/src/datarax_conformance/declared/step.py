"""Chapter 20: step, and what every batch owes its source."""

import numpy as np

from ._declare import Table, build, id_and_x, program, same_rows, step

table = Table()
case = table.case

case(
    "STEP-001",
    "first-batches",
    "batches follow one another from record 0 on",
    program(12, 4),
    [step(2)],
)
case("STEP-001", "one-row", "batches of one row", program(3, 1), [step(3)])
case("STEP-002", "next-epoch", "after the last record comes the first", program(8, 4), [step(5)])
case("STEP-002", "one-record", "one record, again and again", program(1, 1), [step(3)])
case("STEP-002", "one-batch-epochs", "a batch that is an epoch", program(5, 5), [step(3)])
case(
    "STEP-003",
    "runs-on",
    "the batch at the end of an epoch is filled from the next",
    program(10, 4),
    [step(6)],
)
case("STEP-003", "almost-all", "all but one record in a batch", program(5, 4), [step(6)])
case(
    "STEP-003",
    "shuffled",
    "both parts of a filled batch are in the order of their epoch",
    program(10, 4, seed=5),
    [step(6)],
    ["shuffle.exact"],
)
case(
    "STEP-003",
    "any-order",
    "whatever the order of an epoch is",
    program(20, 8, seed=9),
    [
        build(to="epochs", batch_size=20),
        step(2, on="epochs", note="epochs"),
        step(5, expect=same_rows("epochs")),
    ],
)
case("STEP-004", "three-epochs", "a batch of more than three epochs", program(3, 10), [step(3)])
case("STEP-004", "one-record", "one record fills a batch", program(1, 4), [step(2)])
case("STEP-004", "by-one", "one row more than an epoch", program(4, 5), [step(5)])
case("STEP-005", "skips", "the rest of an epoch is skipped", program(10, 4, "drop"), [step(5)])
case("STEP-005", "divides", "nothing to skip", program(8, 4, "drop"), [step(4)])
case("STEP-005", "one-batch", "a batch that is the epoch", program(4, 4, "drop"), [step(3)])
ZEROS = {"without": ["mask"]}  # the mask is a matter of STEP-007
case(
    "STEP-006",
    "zeros",
    "zero rows fill the last batch",
    program(10, 4, "pad"),
    [step(4, expect=ZEROS)],
)
case(
    "STEP-006",
    "kinds",
    "a zero of every type",
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
    "a batch wider than an epoch, with rows of two axes",
    program(
        3,
        5,
        "pad",
        columns=id_and_x(3) | {"image": np.arange(18, dtype=np.float32).reshape(3, 2, 3)},
    ),
    [step(2, expect=ZEROS)],
)
case("STEP-007", "mask", "the mask is False on the filling alone", program(5, 3, "pad"), [step(4)])
case("STEP-007", "divides", "a mask also where nothing is filled", program(6, 3, "pad"), [step(2)])
case("STEP-008", "next-epoch", "after the filling comes record 0", program(7, 4, "pad"), [step(5)])
case("STEP-008", "divides", "no empty batch after a full last one", program(8, 4, "pad"), [step(4)])
case(
    "STEP-009",
    "sizes",
    "batches of 3 and of 7 are cut from one stream",
    program(10, 3),
    [step(14, note="a"), build(to="b", batch_size=7), step(6, on="b", expect=same_rows("a"))],
)
case(
    "STEP-009",
    "wide",
    "also where a batch spans epochs",
    program(4, 3),
    [step(8, note="a"), build(to="b", batch_size=12), step(2, on="b", expect=same_rows("a"))],
)
