"""Chapters 10 and 30: batches and loops."""

import random

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

case(
    "ITER-001",
    "one-epoch",
    "a loop yields every record of an epoch once, in stored order",
    program(12, 4),
    [loop()],
)
case(
    "ITER-001",
    "one-record",
    "a loop over a single record yields one batch of one row",
    program(1, 1),
    [loop()],
)
case(
    "ITER-001",
    "one-batch",
    "a loop yields one batch if batch_size is the number of records",
    program(4, 4),
    [loop()],
)
case(
    "ITER-002",
    "short",
    "under keep, the last batch of a loop is shorter and holds the records left",
    program(10, 4),
    [loop()],
)
case(
    "ITER-002",
    "wide",
    "under keep, a loop yields one short batch if batch_size exceeds the epoch",
    program(3, 5),
    [loop(), loop()],
)
case(
    "ITER-002",
    "one-left",
    "under keep, the last batch of a loop holds the one record left",
    program(5, 2),
    [loop()],
)
case(
    "ITER-003",
    "whole",
    "under drop, a loop yields whole batches only",
    program(10, 4, "drop"),
    [loop(), loop()],
)
case(
    "ITER-003",
    "divides",
    "under drop, a loop yields every record if batch_size divides the epoch",
    program(8, 4, "drop"),
    [loop()],
)
case(
    "ITER-004",
    "stop-for-ever",
    "an exhausted iterator raises StopIteration at every further next",
    program(4, 2),
    [do("iter"), do("next", n=5)],
)
case(
    "ITER-004",
    "drop",
    "under drop, an exhausted iterator yields no further batch",
    program(5, 2, "drop"),
    [do("iter"), do("next", n=5)],
)
case(
    "ITER-004",
    "next-loop",
    "an exhausted iterator stays exhausted after another loop has begun",
    program(4, 2),
    [do("iter"), do("next", n=3), do("iter", to="other"), do("next", on="other"), do("next", n=2)],
)
case(
    "ITER-004",
    "loop",
    "a loop over an iterator yields the rest of its epoch, a second loop nothing",
    program(7, 2),
    [do("iter"), do("next"), loop(on="it"), loop(on="it"), loop(take=1)],
)
case(
    "ITER-004",
    "restored",
    "an exhausted iterator stays exhausted after an earlier state is restored",
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
case(
    "ITER-005",
    "filled",
    "under pad, a loop fills its last batch with zero rows and masks them",
    program(10, 4, "pad"),
    [loop()],
)
case(
    "ITER-005",
    "wide",
    "under pad, a loop yields one padded batch if batch_size exceeds the epoch",
    program(2, 5, "pad"),
    [loop(), loop()],
)
case(
    "ITER-006",
    "again",
    "three loops, one after the other, yield an epoch each",
    program(4, 2),
    [loop(), loop(), loop()],
)
case(
    "ITER-006",
    "keep",
    "under keep, the loop after one with a short last batch yields the next epoch",
    program(5, 2),
    [loop(), loop()],
)
case(
    "ITER-006",
    "pad",
    "under pad, the loop after one with a padded last batch yields the next epoch",
    program(3, 2, "pad"),
    [loop(), loop()],
)
case(
    "ITER-007",
    "rest",
    "a loop after a break yields the rest of the epoch",
    program(8, 2),
    [loop(take=1), loop()],
)
case(
    "ITER-007",
    "break",
    "after a break, a loop yields the rest of the epoch, the one after it a new epoch",
    program(10, 3),
    [loop(take=2), loop(), loop(take=1)],
)
case(
    "ITER-007",
    "step",
    "a loop after step yields the rest of the epoch",
    program(10, 3),
    [step(2), loop()],
)
case(
    "ITER-007",
    "run-on",
    "a loop yields the rest of the epoch into which a batch of step has run on",
    program(5, 3),
    [step(2), loop(), loop(take=1)],
)
case(
    "ITER-007",
    "drop",
    "under drop, a loop after a break yields the whole batches left of the epoch",
    program(10, 3, "drop"),
    [loop(take=2), loop(), loop(take=1)],
)
case(
    "ITER-007",
    "pad",
    "under pad, a loop after a break yields the rest of the epoch, padded",
    program(10, 3, "pad"),
    [loop(take=2), loop(), loop(take=1)],
)
case(
    "ITER-007",
    "shuffled",
    "after a break, a loop yields the rest of a shuffled epoch in that epoch's order",
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
    "two iterators over one stream share its batches, each handed out once",
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
    "an iterator stops when another one has taken the last batch of its epoch",
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
    "an iterator stops when step has moved the stream into the next epoch",
    program(5, 2),
    [do("iter"), do("next"), step(2), do("next", n=2)],
)
case(
    "ITER-009",
    "at-call",
    "an iterator belongs to the epoch of the iter() call, not of the first next()",
    program(4, 2),
    [do("iter"), step(2), do("next"), loop()],
)
case(
    "ITER-009",
    "next-epoch",
    "an iterator of an ended epoch stops while others are within the next one",
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
    "an iterator first asked after its epoch has ended raises StopIteration",
    program(4, 2),
    [do("iter"), loop(), do("next"), loop()],
)
case(
    "ITER-010",
    "between",
    "step within a loop returns the next batch, and the loop goes on after it",
    program(10, 2),
    [do("iter"), do("next"), step(), do("next", n=2), step(), do("next", n=2)],
)
case(
    "ITER-010",
    "scan",
    "scan within a loop returns the next batch, and the loop goes on after it",
    program(12, 2),
    [do("iter"), do("next"), scan(1), do("next", n=2), scan(1), do("next", n=2)],
)
case(
    "ITER-011",
    "drop",
    "under drop, for and step give the same batches",
    program(10, 4, "drop"),
    [loop(), build(to="b"), step(2, on="b")],
)
case(
    "ITER-011",
    "pad",
    "under pad, for and step give the same batches",
    program(10, 4, "pad"),
    [loop(), build(to="b"), step(3, on="b")],
)
case(
    "ITER-011",
    "divides",
    "under keep, for and step give the same batches if batch_size divides the epoch",
    program(8, 4),
    [loop(), build(to="b"), step(2, on="b")],
)

# Chapter 10

FOUR = np.array([3, 1, 4, 1])
case(
    "SRC-001",
    "fields",
    "without a graph, a batch has a field for each column and no other",
    program(6, 2),
    [loop()],
)
case(
    "SRC-001",
    "one-field",
    "a program with one column gives batches with one field",
    program(4, 2, columns={"id": np.arange(4, dtype=np.int32)}),
    [loop()],
)
case(
    "SRC-001",
    "mask",
    "under keep, a column named mask is a field like any other",
    program(0, 2, columns=id_and_x(4) | {"mask": np.array([True, False, False, True])}),
    [loop()],
)
case(
    "SRC-002",
    "rows",
    "each row of a batch holds the fields of one record",
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
    "each row of a shuffled batch holds the fields of one record",
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
        f"under {policy}, a shuffled loop yields each record once, as a whole row",
        shuffled,
        [loop(expect={"all": [permutation(7, sizes=sizes), rows_of(shuffled)]}) for _ in range(2)],
    )
    case(
        "SRC-002 SRC-003" if policy == "keep" else "SRC-002 STEP-006",
        f"any-order-step-{policy}",
        f"under {policy}, the rows of shuffled steps are whole records",
        shuffled,
        [step(6, expect=rows_of(shuffled))],
    )
    case(
        "SRC-002 SCAN-001",
        f"any-order-scan-{policy}",
        f"under {policy}, the rows of a shuffled scan are whole records",
        shuffled,
        [scan(6, expect=rows_of(shuffled))],
    )
    case(
        "SRC-002",
        f"any-order-resumed-{policy}",
        f"under {policy}, a shuffled stream resumes with rows that are whole records",
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
    "bool, int8, uint8, int16, float16 and float32 columns keep their type",
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
    "uint16 and uint32 columns keep their type",
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
    "columns with rows of shape (2, 3) and (1,) keep these shapes",
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
    "a column with rows of shape (0,) keeps this shape",
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
    "an int64 column arrives as int64 or int32, with the same values",
    wide("int", [1, -2, 3]),
    [loop(expect={"any": narrowed("int", [1, -2, 3])})],
)
case(
    "SRC-004",
    "float64",
    "a float64 column arrives as float64 or float32, with the same values",
    wide("float", [0.5, -2.25]),
    [loop(expect={"any": narrowed("float", [0.5, -2.25])})],
)
for kind in ("int", "uint", "float"):
    case(
        "SRC-003",
        f"modes-{kind}",
        f"a column of {kind}64 has one type and the same values in for, step and scan",
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
    "the limits of int32 in an int64 column arrive exactly",
    wide("int", [LIMIT - 1, -LIMIT]),
    [loop(expect={"any": narrowed("int", [LIMIT - 1, -LIMIT])})],
)
for slug, values in {"above": [1, LIMIT], "below": [1, -LIMIT - 1], "far": [2**40 + 7, 5]}.items():
    refused = error("field-type", field="wide")
    case(
        "SRC-005",
        slug,
        f"{max(values, key=abs)} in an int64 column arrives exactly, or the program is refused",
        wide("int", values),
        [
            build(expect={"any": [{"check": "no_error"}, refused]}),
            loop(expect={"any": [narrowed("int", values)[0], error("not-built")]}),
        ],
    )
case(
    "SRC-006",
    "range",
    "the largest float32 and 0.1 in a float64 column arrive exactly or as float32",
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
    "1e300 in a float64 column arrives exactly, or the program is refused",
    wide("float", [1e300, 1.0]),
    [
        build(expect={"any": [{"check": "no_error"}, error("field-type", field="wide")]}),
        loop(expect={"any": [narrowed("float", [1e300, 1.0])[0], error("not-built")]}),
    ],
)
case(
    "SRC-007",
    "columns",
    "a loop leaves the program's columns unchanged",
    program(5, 2),
    [loop(), do("columns")],
)
case(
    "SRC-005",
    "uint32-range",
    "the limits of uint32 in a uint64 column arrive exactly",
    wide("uint", [2**32 - 1, 0]),
    [loop(expect={"any": narrowed("uint", [2**32 - 1, 0])})],
)
for slug, values in {"unsigned": [2**32 + 5, 1], "unsigned-far": [2**63 + 1, 1]}.items():
    case(
        "SRC-005",
        slug,
        f"{max(values)} in a uint64 column arrives exactly, or the program is refused",
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
    "2**40 in the second batch arrives exactly, or the program is refused",
    program(0, 2, columns=LATE),
    [
        build(expect={"any": [{"check": "no_error"}, error("field-type", field="wide")]}),
        loop(expect={"any": [{"value": HALVES}, error("not-built")]}),
    ],
)
case(
    "SRC-005",
    "step",
    "step returns 2**40 + 7 exactly, or the program is refused",
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
    "scan returns 2**40 exactly, or the program is refused",
    program(0, 4, columns=LATE),
    [
        build(expect={"any": [{"check": "no_error"}, error("field-type", field="wide")]}),
        scan(2, expect={"any": [{"value": TWICE}, error("not-built")]}),
    ],
)
case(
    "SRC-006",
    "not-finite",
    "infinities and NaN in a float32 column arrive unchanged",
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
    "subnormal float16 and float32 numbers arrive unchanged",
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
    "minus zero in a float32 column keeps its sign",
    program(
        0,
        4,
        columns={
            "id": np.arange(4, dtype=np.int32),
            # A column with an infinity is stored as bytes, which distinguish 0.0 from -0.0.
            "x": np.array([-0.0, 0, np.inf, 1], np.float32),
        },
    ),
    [loop()],
)
case(
    "SRC-007",
    "pad",
    "under pad, step leaves the program's columns unchanged",
    program(5, 3, "pad"),
    [step(3), do("columns")],
)
case(
    "SRC-007",
    "shuffled",
    "shuffling leaves the program's columns unchanged",
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
    "columns declared in reverse order give the same batches",
    program(6, 4, columns=dict(reversed(id_and_x(6).items()))),
    [loop()],
)
case(
    "SRC-009",
    "kept",
    "a batch of a loop keeps its values while later batches are handed out",
    program(6, 2),
    [loop(hold="all"), loop(), do("recall", hold="all")],
)
case(
    "SRC-009",
    "step",
    "a batch of step keeps its values while later batches are handed out",
    program(6, 4),
    [step(2, hold="two"), step(4), do("recall", hold="two")],
)
case(
    "SRC-009",
    "pad",
    "a padded batch of a loop keeps its values while later batches are handed out",
    program(5, 2, "pad"),
    [loop(hold="all"), loop(), do("recall", hold="all")],
)
case(
    "SRC-009",
    "scan",
    "the arrays of a scan keep their values after the next scan",
    program(12, 2),
    [scan(2, hold="two"), scan(2), do("recall", hold="two")],
)
case(
    "SRC-040",
    "next-epoch",
    "values written into batches do not appear in the next epoch or the columns",
    program(6, 2),
    [loop(hold="all"), do("scribble", hold="all"), loop(), do("columns")],
)
case(
    "SRC-040",
    "next-batch",
    "values written into a batch do not appear in the batches after it",
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
    "values written into a graph's batches do not appear in the next epoch or columns",
    chain(6, 2, "keep", "affine(2,1)"),
    [loop(hold="all"), do("scribble", hold="all"), loop(), do("columns")],
)
case(
    "SRC-040",
    "mask",
    "under pad, values written into fields and mask do not appear in the next epoch",
    program(6, 2, "pad"),
    [loop(hold="all"), do("scribble", hold="all"), loop(), do("columns")],
)
case(
    "SRC-040",
    "scan",
    "values written into a scan's arrays do not appear in the next scan or columns",
    program(8, 2),
    [scan(2, hold="two"), do("scribble", hold="two"), scan(4), do("columns")],
)
# The first draws of NumPy's and of Python's global generator after a seed of 0.
SEEDED_DRAWS = [np.random.RandomState(0).random_sample(), random.Random(0).random()]
case(
    "SRC-010",
    "numpy",
    "a loop does not draw from the global generators of NumPy and Python",
    program(10, 4),
    [loop(), do("global_random")],
)
case(
    "SRC-010",
    "shuffled",
    "shuffling neither draws from the global generators nor depends on them",
    program(10, 4, seed=3),
    [
        loop(note="a", expect={"check": "permutation", "length": 10}),
        do("global_random", expect={"value": SEEDED_DRAWS}),
        build(to="b"),
        loop(on="b", expect=same_rows("a")),
    ],
)
case(
    "SRC-011",
    "turns",
    "two equal streams that are consumed in turns give equal batches",
    program(6, 2),
    [build(to="b"), step(2), step(1, on="b"), step(1), step(2, on="b")],
)
case(
    "SRC-011",
    "data",
    "two streams whose columns differ only in their values each give their own",
    program(6, 2),
    [
        build(to="b", columns={name: encode(c[::-1]) for name, c in id_and_x(6).items()}),
        loop(),
        loop(on="b"),
        loop(),
    ],
)

# Chapter 40; SHUF-002 belongs to profile iter.
case(
    "SHUF-002",
    "stored",
    "without a seed, every epoch has the stored order",
    program(5, 2),
    [loop(), loop()],
)
