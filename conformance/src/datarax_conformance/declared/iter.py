"""Chapters 10 and 30: batches and loops."""

import numpy as np

from ..arrays import encode
from ._declare import (
    Table,
    build,
    chain,
    do,
    error,
    id_and_x,
    loop,
    permutation,
    program,
    rows_of,
    same_rows,
    scan,
    step,
)

table = Table()
case = table.case

case("ITER-001", "one-epoch", "a loop is an epoch", program(12, 4), [loop()])
case("ITER-001", "one-record", "an epoch of one record", program(1, 1), [loop()])
case("ITER-001", "one-batch", "an epoch of one batch", program(4, 4), [loop()])
case("ITER-002", "short", "the last batch is shorter", program(10, 4), [loop()])
case(
    "ITER-002", "wide", "a batch wider than the epoch is the epoch", program(3, 5), [loop(), loop()]
)
case("ITER-002", "one-left", "one record is left", program(5, 2), [loop()])
case("ITER-003", "whole", "whole batches only", program(10, 4, "drop"), [loop(), loop()])
case("ITER-003", "divides", "all of them where nothing is left", program(8, 4, "drop"), [loop()])
case(
    "ITER-004",
    "stop-for-ever",
    "after the end comes nothing",
    program(4, 2),
    [do("iter"), do("next", n=5)],
)
case("ITER-004", "drop", "nor under drop", program(5, 2, "drop"), [do("iter"), do("next", n=5)])
case(
    "ITER-004",
    "next-loop",
    "not even when a new loop has begun",
    program(4, 2),
    [do("iter"), do("next", n=3), do("iter", to="other"), do("next", on="other"), do("next", n=2)],
)
case(
    "ITER-004",
    "loop",
    "a loop over an iterator is its rest, a second one nothing",
    program(7, 2),
    [do("iter"), do("next"), loop(on="it"), loop(on="it"), loop(take=1)],
)
case(
    "ITER-004",
    "restored",
    "not even when the stream has been moved back",
    program(4, 2),
    [
        do("save", to="s"),
        do("iter"),
        do("next", n=3),
        do("restore", origin="s"),
        do("next", n=2),
        loop(),
    ],
)
case("ITER-005", "filled", "the last batch is filled", program(10, 4, "pad"), [loop()])
case("ITER-005", "wide", "one filled batch", program(2, 5, "pad"), [loop(), loop()])
case("ITER-006", "again", "three loops are three epochs", program(4, 2), [loop(), loop(), loop()])
case("ITER-006", "keep", "after a short batch too", program(5, 2), [loop(), loop()])
case("ITER-006", "pad", "after a filled batch too", program(3, 2, "pad"), [loop(), loop()])
case("ITER-007", "rest", "after a break the rest comes", program(8, 2), [loop(take=1), loop()])
case(
    "ITER-007",
    "break",
    "and then the next epoch",
    program(10, 3),
    [loop(take=2), loop(), loop(take=1)],
)
case("ITER-007", "step", "a loop goes on where step stopped", program(10, 3), [step(2), loop()])
case(
    "ITER-007",
    "run-on",
    "step ran on into the next epoch",
    program(5, 3),
    [step(2), loop(), loop(take=1)],
)
case(
    "ITER-007",
    "drop",
    "the rest under drop",
    program(10, 3, "drop"),
    [loop(take=2), loop(), loop(take=1)],
)
case(
    "ITER-007",
    "pad",
    "the rest under pad",
    program(10, 3, "pad"),
    [loop(take=2), loop(), loop(take=1)],
)
case(
    "ITER-007",
    "shuffled",
    "the rest of a shuffled epoch is that of the epoch, and then comes the next",
    program(20, 5, seed=9),
    [
        do("iter"),
        do("next", note="head"),
        do("next", n=3, note="rest"),
        loop(note="next", expect=permutation(20)),
        build(to="s"),
        loop(on="s", take=1, expect=same_rows("head")),
        loop(on="s", expect=same_rows("rest")),
        loop(on="s", expect=same_rows("next")),
    ],
)
case(
    "ITER-008",
    "turns",
    "two iterators take turns",
    program(8, 2),
    [
        do("iter", to="a"),
        do("iter", to="b"),
        do("next", on="a"),
        do("next", on="b"),
        do("next", on="b"),
        do("next", on="a"),
        do("next", on="a"),
        do("next", on="b"),
    ],
)
case(
    "ITER-009",
    "left",
    "an iterator ends with its epoch, whoever took the last batch",
    program(4, 2),
    [
        do("iter", to="a"),
        do("next", on="a"),
        do("iter", to="b"),
        do("next", on="b"),
        do("next", on="a", n=2),
        do("iter", to="c"),
        do("next", on="c", n=3),
        do("next", on="b"),
    ],
)
case(
    "ITER-009",
    "step",
    "step may leave the epoch too",
    program(5, 2),
    [do("iter"), do("next"), step(2), do("next", n=2)],
)
case(
    "ITER-009",
    "at-call",
    "the epoch is that of the call of iter",
    program(4, 2),
    [do("iter"), step(2), do("next"), loop()],
)
case(
    "ITER-009",
    "next-epoch",
    "also while others are in the middle of the next epoch",
    program(6, 2),
    [
        do("iter", to="a"),
        do("next", on="a"),
        do("iter", to="b"),
        do("next", on="b", n=2),
        do("iter", to="c"),
        do("next", on="c"),
        do("next", on="b", n=2),
        do("next", on="a", n=2),
        loop(),
    ],
)
case(
    "ITER-009",
    "asked-late",
    "an iterator that is first asked after its epoch",
    program(4, 2),
    [do("iter"), loop(), do("next"), loop()],
)
case(
    "ITER-010",
    "between",
    "a step between two batches of a loop",
    program(10, 2),
    [do("iter"), do("next"), step(), do("next", n=2), step(), do("next", n=2)],
)
case(
    "ITER-010",
    "scan",
    "so does a scan",
    program(12, 2),
    [do("iter"), do("next"), scan(1), do("next", n=2), scan(1), do("next", n=2)],
)
case(
    "ITER-011",
    "drop",
    "under drop",
    program(10, 4, "drop"),
    [loop(), build(to="b"), step(2, on="b")],
)
case(
    "ITER-011", "pad", "under pad", program(10, 4, "pad"), [loop(), build(to="b"), step(3, on="b")]
)
case(
    "ITER-011",
    "divides",
    "under keep, where the batches come out even",
    program(8, 4),
    [loop(), build(to="b"), step(2, on="b")],
)

# Chapter 10

FOUR = np.array([3, 1, 4, 1])
case("SRC-001", "fields", "the fields of a batch are the columns", program(6, 2), [loop()])
case(
    "SRC-001",
    "one-field",
    "a single field",
    program(4, 2, columns={"id": np.arange(4, dtype=np.int32)}),
    [loop()],
)
case(
    "SRC-001",
    "mask",
    "a column called mask is one like any other, where nothing is filled",
    program(0, 2, columns=id_and_x(4) | {"mask": np.array([True, False, False, True])}),
    [loop()],
)
case(
    "SRC-002",
    "rows",
    "the fields of a row are those of one record",
    program(
        4,
        3,
        columns={
            "id": np.arange(4, dtype=np.int32),
            "x": FOUR.astype(np.float32),
            "y": (FOUR * 10).astype(np.int32),
        },
    ),
    [loop()],
)
case(
    "SRC-002",
    "shuffled",
    "also when shuffled",
    program(
        7,
        3,
        seed=1,
        columns={"id": np.arange(7, dtype=np.int32), "x": np.arange(7, dtype=np.float32) * 2},
    ),
    [loop()],
    ["shuffle.exact"],
)
MANY = {
    "id": np.arange(7, dtype=np.int32),
    "x": np.arange(7, dtype=np.float32) * 2 + 1,
    "flag": np.array([True, True, False, True, False, False, True]),
    "image": np.arange(42, dtype=np.int16).reshape(7, 2, 3) + 1,
}
for policy, cites, sizes in (
    ("keep", "SRC-002 SRC-003", [3, 3, 1]),
    ("pad", "SRC-002 ITER-005", [3, 3, 3]),
):
    shuffled = program(7, 3, policy, seed=1, columns=MANY)
    case(
        cites,
        f"any-order-{policy}",
        f"whatever the order of an epoch is, under {policy}",
        shuffled,
        [loop(expect={"all": [permutation(7, sizes=sizes), rows_of(shuffled)]}) for _ in range(2)],
    )
    case(
        "SRC-002 SRC-003" if policy == "keep" else "SRC-002 STEP-006",
        f"any-order-step-{policy}",
        f"so it is for step, under {policy}",
        shuffled,
        [step(6, expect=rows_of(shuffled))],
    )
    case(
        "SRC-002 SCAN-001",
        f"any-order-scan-{policy}",
        f"and for scan, under {policy}",
        shuffled,
        [scan(6, expect=rows_of(shuffled))],
    )
    case(
        "SRC-002",
        f"any-order-resumed-{policy}",
        f"and from a state on, under {policy}",
        shuffled,
        [
            loop(take=1),
            do("save", to="s"),
            loop(note="rest"),
            build(to="b"),
            do("restore", origin="s", on="b"),
            loop(on="b", expect=same_rows("rest")),
            loop(on="b", expect={"all": [permutation(7), rows_of(shuffled)]}),
        ],
    )
case(
    "SRC-003",
    "types",
    "types stay",
    program(
        4,
        2,
        columns={"id": np.arange(4, dtype=np.int32)}
        | {
            f"f_{kind}": FOUR.astype(kind)
            for kind in ("bool", "int8", "uint8", "int16", "float16", "float32")
        },
    ),
    [loop()],
)
case(
    "SRC-003",
    "unsigned",
    "the wider unsigned types stay",
    program(
        4,
        2,
        columns={"id": np.arange(4, dtype=np.int32)}
        | {f"f_{kind}": FOUR.astype(kind) for kind in ("uint16", "uint32")},
    ),
    [loop()],
)
case(
    "SRC-003",
    "shapes",
    "the shape of a row stays",
    program(
        3,
        2,
        columns={
            "id": np.arange(3, dtype=np.int32),
            "image": np.arange(18, dtype=np.float32).reshape(3, 2, 3),
            "one": np.arange(3, dtype=np.float32).reshape(3, 1),
        },
    ),
    [loop()],
)
case(
    "SRC-003",
    "zero-width",
    "a row may be empty",
    program(
        3, 2, columns={"id": np.arange(3, dtype=np.int32), "none": np.zeros((3, 0), np.float32)}
    ),
    [loop()],
)


def narrowed(kind: str, values: list[float]) -> list[dict[str, object]]:
    """The two answers that SRC-004 leaves open for one batch of a 64-bit column."""
    shape = [len(values)]
    ids = {"dtype": "int32", "shape": shape, "data": list(range(len(values)))}
    return [
        {"value": [{"id": ids, "wide": {"dtype": f"{kind}{bits}", "shape": shape, "data": values}}]}
        for bits in (64, 32)
    ]


def wide(kind: str, values: list[float]) -> dict[str, object]:
    ids = np.arange(len(values), dtype=np.int32)
    return program(0, len(values), columns={"id": ids, "wide": np.array(values, f"{kind}64")})


case(
    "SRC-004",
    "int64",
    "int64 may become int32",
    wide("int", [1, -2, 3]),
    [loop(expect={"any": narrowed("int", [1, -2, 3])})],
)
case(
    "SRC-004",
    "float64",
    "float64 may become float32",
    wide("float", [0.5, -2.25]),
    [loop(expect={"any": narrowed("float", [0.5, -2.25])})],
)
for kind in ("int", "uint", "float"):
    case(
        "SRC-003",
        f"modes-{kind}",
        f"{kind}64 has one type in all modes",
        wide(kind, [1, 2, 3, 0]),
        [
            loop(note="a", expect={"any": narrowed(kind, [1, 2, 3, 0])}),
            step(expect=same_rows("a")),
            scan(1, expect=same_rows("a")),
        ],
    )
LIMIT = 2**31
case(
    "SRC-005",
    "int32-range",
    "the limits of int32 arrive",
    wide("int", [LIMIT - 1, -LIMIT]),
    [loop(expect={"any": narrowed("int", [LIMIT - 1, -LIMIT])})],
)
for slug, values in {"above": [1, LIMIT], "below": [1, -LIMIT - 1], "far": [2**40 + 7, 5]}.items():
    refused = error("field-type", field="wide")
    case(
        "SRC-005",
        slug,
        "a number beyond int32 arrives, or the program is refused",
        wide("int", values),
        [
            build(expect={"any": [{"check": "no_error"}, refused]}),
            loop(expect={"any": [narrowed("int", values)[0], error("not-built")]}),
        ],
    )
case(
    "SRC-006",
    "range",
    "the largest float32 arrives",
    wide("float", [3.4028234663852886e38, 0.1]),
    [
        loop(
            expect={
                "any": [
                    narrowed("float", [3.4028234663852886e38, 0.1])[0],
                    narrowed("float", [3.4028234663852886e38, 0.10000000149011612])[1],
                ]
            }
        )
    ],
)
case(
    "SRC-006",
    "beyond",
    "a float beyond float32 arrives, or the program is refused",
    wide("float", [1e300, 1.0]),
    [
        build(expect={"any": [{"check": "no_error"}, error("field-type", field="wide")]}),
        loop(expect={"any": [narrowed("float", [1e300, 1.0])[0], error("not-built")]}),
    ],
)
case("SRC-007", "columns", "the columns are as they were", program(5, 2), [loop(), do("columns")])
case(
    "SRC-005",
    "uint32-range",
    "the limits of uint32 arrive",
    wide("uint", [2**32 - 1, 0]),
    [loop(expect={"any": narrowed("uint", [2**32 - 1, 0])})],
)
for slug, values in {"unsigned": [2**32 + 5, 1], "unsigned-far": [2**63 + 1, 1]}.items():
    case(
        "SRC-005",
        slug,
        "a number beyond uint32 arrives, or the program is refused",
        wide("uint", values),
        [
            build(expect={"any": [{"check": "no_error"}, error("field-type", field="wide")]}),
            loop(expect={"any": [narrowed("uint", values)[0], error("not-built")]}),
        ],
    )
LATE = {"id": np.arange(4, dtype=np.int32), "wide": np.array([1, 2, 3, 2**40])}
HALVES = [
    {name: encode(column[rows]) for name, column in LATE.items()}
    for rows in (slice(0, 2), slice(2, 4))
]
case(
    "SRC-005",
    "second-batch",
    "also where it is not in the first batch",
    program(0, 2, columns=LATE),
    [
        build(expect={"any": [{"check": "no_error"}, error("field-type", field="wide")]}),
        loop(expect={"any": [{"value": HALVES}, error("not-built")]}),
    ],
)
case(
    "SRC-005",
    "step",
    "nor does step cut it",
    wide("int", [2**40 + 7, 5]),
    [
        build(expect={"any": [{"check": "no_error"}, error("field-type", field="wide")]}),
        step(expect={"any": [narrowed("int", [2**40 + 7, 5])[0], error("not-built")]}),
    ],
)
TWICE = {name: encode(np.stack([column] * 2)) for name, column in LATE.items()}
case(
    "SRC-005 SCAN-001",
    "scan",
    "nor does a scan",
    program(0, 4, columns=LATE),
    [
        build(expect={"any": [{"check": "no_error"}, error("field-type", field="wide")]}),
        scan(2, expect={"any": [{"value": TWICE}, error("not-built")]}),
    ],
)
case(
    "SRC-006",
    "not-finite",
    "infinities and NaN stay what they are",
    program(
        0,
        4,
        columns={
            "id": np.arange(4, dtype=np.int32),
            "x": np.array([np.inf, np.nan, -np.inf, 1], np.float32),
        },
    ),
    [loop()],
)
case(
    "SRC-006",
    "small",
    "the smallest numbers arrive",
    program(
        0,
        2,
        columns={
            "id": np.arange(4, dtype=np.int32),
            "x": np.array([1e-45, -1e-40, 1.17e-38, 1], np.float32),
            "h": np.array([6e-8, 1, 2, 3], np.float16),
        },
    ),
    [loop()],
)
case(
    "SRC-006",
    "minus-zero",
    "minus zero keeps its sign",
    program(
        0,
        4,
        columns={
            "id": np.arange(4, dtype=np.int32),
            # Beside an infinity the column is stored as bytes, which tell the two zeros apart.
            "x": np.array([-0.0, 0, np.inf, 1], np.float32),
        },
    ),
    [loop()],
)
case(
    "SRC-007",
    "pad",
    "filling is not written into them",
    program(5, 3, "pad"),
    [step(3), do("columns")],
)
case(
    "SRC-007",
    "shuffled",
    "nor are they shuffled themselves",
    program(9, 3, seed=1),
    [
        loop(expect=permutation(9)),
        loop(expect=permutation(9)),
        do("columns", expect={"value": program(9, 3)["columns"]}),
    ],
)
case(
    "SRC-008",
    "declared",
    "columns declared the other way round",
    program(6, 4, columns=dict(reversed(id_and_x(6).items()))),
    [loop()],
)
case(
    "SRC-009",
    "kept",
    "a batch stays as it was while others come",
    program(6, 2),
    [loop(hold="all"), loop(), do("recall", hold="all")],
)
case(
    "SRC-009",
    "step",
    "so does a batch of step",
    program(6, 4),
    [step(2, hold="two"), step(4), do("recall", hold="two")],
)
case(
    "SRC-009",
    "pad",
    "so does a filled one",
    program(5, 2, "pad"),
    [loop(hold="all"), loop(), do("recall", hold="all")],
)
case(
    "SRC-009",
    "scan",
    "so does what a scan gave",
    program(12, 2),
    [scan(2, hold="two"), scan(2), do("recall", hold="two")],
)
case(
    "SRC-040",
    "next-epoch",
    "what is written into batches does not come back",
    program(6, 2),
    [loop(hold="all"), do("scribble", hold="all"), loop(), do("columns")],
)
case(
    "SRC-040",
    "next-batch",
    "nor in the next batch",
    program(6, 2),
    [
        do("iter"),
        do("next", hold="first"),
        do("scribble", hold="first"),
        do("next", n=3),
        loop(take=1),
    ],
)
case(
    "SRC-040",
    "graph",
    "nor through a graph",
    chain(6, 2, "keep", "affine(2,1)"),
    [loop(hold="all"), do("scribble", hold="all"), loop(), do("columns")],
)
case(
    "SRC-040",
    "mask",
    "nor in the mask",
    program(6, 2, "pad"),
    [loop(hold="all"), do("scribble", hold="all"), loop(), do("columns")],
)
case(
    "SRC-040",
    "scan",
    "nor what is written into a scan's arrays",
    program(8, 2),
    [scan(2, hold="two"), do("scribble", hold="two"), scan(4), do("columns")],
)
case(
    "SRC-010",
    "numpy",
    "NumPy's global generator is left alone",
    program(10, 4),
    [loop(), do("global_random")],
)
case(
    "SRC-010",
    "shuffled",
    "also when shuffled",
    program(10, 4, seed=3),
    [
        loop(note="a", expect={"check": "permutation", "length": 10}),
        do("global_random"),
        build(to="b"),
        loop(on="b", expect=same_rows("a")),
    ],
)
case(
    "SRC-011",
    "turns",
    "two streams do not meet",
    program(6, 2),
    [build(to="b"), step(2), step(1, on="b"), step(1), step(2, on="b")],
)
case(
    "SRC-011",
    "data",
    "nor do their data, alike as they are",
    program(6, 2),
    [
        build(to="b", columns={name: encode(c[::-1]) for name, c in id_and_x(6).items()}),
        loop(),
        loop(on="b"),
        loop(),
    ],
)

# SHUF-002 is a requirement of loops.
case(
    "SHUF-002",
    "stored",
    "without a seed every epoch has the stored order",
    program(5, 2),
    [loop(), loop()],
)
