"""Chapters 35 and 40: any valid order (shuffle.valid), and the library's own (shuffle.exact)."""

import numpy as np

from ._declare import (
    Table,
    build,
    chain,
    do,
    id_and_x,
    loop,
    new_order,
    other_order,
    permutation,
    program,
    same_rows,
    scan,
    step,
)

table = Table()
case = table.case

case(
    "SHUF-001",
    "ten",
    "a shuffled epoch in one batch holds each of 10 records exactly once",
    program(10, 10, seed=0),
    [loop(expect=permutation(10))],
)
case(
    "SHUF-001",
    "cut",
    "a shuffled epoch cut into batches of 4 holds each of 12 records exactly once",
    program(12, 4, seed=1),
    [loop(expect=permutation(12, sizes=[4, 4, 4]))],
)
for policy, sizes in {"keep": [7, 7, 3], "pad": [7, 7, 7]}.items():
    case(
        "SHUF-001",
        policy,
        f"under {policy}, each of two shuffled epochs holds each of 17 records exactly once",
        program(17, 7, policy, seed=2),
        [loop(expect=permutation(17, sizes=sizes)) for _ in range(2)],
    )
case(
    "SHUF-001",
    "small",
    "shuffled epochs of 6, 11 to 14, 21 and 30 records hold each record once",
    program(1, 40, seed=3),
    [
        action
        for n in (6, 11, 12, 13, 14, 21, 30)
        for action in (
            build(to=f"n{n}", columns={"id": {"dtype": "int32", "range": n}}),
            loop(on=f"n{n}", expect=permutation(n)),
        )
    ],
)


def around(power: int) -> list[dict[str, object]]:
    """One epoch each of 2**power - 1, 2**power and 2**power + 1 records, in one batch."""
    script = []
    for count in (2**power - 1, 2**power, 2**power + 1):
        column = {"dtype": "int32", "range": count}
        script += [
            build(to=f"n{count}", columns={"id": column}, batch_size=count),
            loop(on=f"n{count}", expect=permutation(count)),
        ]
    return script


for power in range(1, 21):
    case(
        "SHUF-001",
        f"around-2-{power:02}",
        f"2^{power} - 1, 2^{power} and 2^{power} + 1 shuffled records come exactly once each",
        program(1, 1, seed=0),
        around(power),
    )

SEEDED = program(40, 8, seed=7)
case(
    "SHUF-003",
    "again",
    "streams built from equal programs have the same orders in two epochs",
    SEEDED,
    [
        loop(note="a", expect=permutation(40)),
        loop(note="b", expect=permutation(40)),
        build(to="again"),
        loop(on="again", expect=same_rows("a")),
        loop(on="again", expect=same_rows("b")),
    ],
)
case(
    "SHUF-003",
    "process",
    "a stream built from an equal program in another process has the same order",
    SEEDED,
    [loop(note="a", expect=permutation(40)), do("restart"), build(), loop(expect=same_rows("a"))],
)
case(
    "SHUF-004",
    "sizes",
    "batch sizes 1, 7, 8, 13, 40 and 64 give the same orders of two epochs",
    SEEDED,
    [
        loop(note="a", expect=permutation(40)),
        loop(note="b", expect=permutation(40)),
        *[
            action
            for size in (1, 7, 13, 40, 64)
            for action in (
                build(to=f"b{size}", batch_size=size),
                loop(on=f"b{size}", expect=same_rows("a")),
                loop(on=f"b{size}", expect=same_rows("b")),
            )
        ],
    ],
)
case(
    "SHUF-004",
    "drop",
    "under drop, batch sizes 8 and 20 give the same order of an epoch",
    program(40, 8, "drop", seed=7),
    [
        loop(note="a", expect=permutation(40)),
        build(to="b", batch_size=20),
        loop(on="b", expect=same_rows("a")),
    ],
)
case(
    "SHUF-005",
    "pad",
    "two epochs under pad have the same orders as under keep",
    program(20, 8, seed=7),
    [
        loop(note="a", expect=permutation(20)),
        loop(note="b", expect=permutation(20)),
        build(to="pad", last_batch="pad"),
        loop(on="pad", expect=same_rows("a")),
        loop(on="pad", expect=same_rows("b")),
    ],
)
case(
    "SHUF-005",
    "drop",
    "the first epoch under drop is a prefix of the first epoch under keep",
    program(20, 8, seed=7),
    [
        loop(take=2, note="a"),
        build(to="drop", last_batch="drop"),
        loop(on="drop", expect=same_rows("a")),
    ],
)
case(
    "SHUF-005",
    "drop-later",
    "two epochs under drop are each a prefix of the same epoch under keep",
    program(20, 8, seed=7),
    [
        loop(take=2, note="a"),
        loop(),
        loop(take=2, note="b"),
        build(to="drop", last_batch="drop"),
        loop(on="drop", expect=same_rows("a")),
        loop(on="drop", expect=same_rows("b")),
    ],
)
case(
    "SHUF-006",
    "step",
    "for and step give the same order of a shuffled epoch",
    program(20, 5, seed=9),
    [
        loop(note="a", expect=permutation(20)),
        loop(note="b", expect=permutation(20)),
        build(to="s"),
        step(4, on="s", expect=same_rows("a")),
        loop(on="s", expect=same_rows("b")),
    ],
)
case(
    "SHUF-006",
    "broken-off",
    "a shuffled epoch read by for, step and for again has the order that step gives",
    program(20, 5, seed=9),
    [
        step(note="head"),
        step(2, note="middle"),
        step(note="tail"),
        loop(note="b", expect=permutation(20)),
        build(to="s"),
        loop(on="s", take=1, expect=same_rows("head")),
        step(2, on="s", expect=same_rows("middle")),
        loop(on="s", expect=same_rows("tail")),
        loop(on="s", expect=same_rows("b")),
    ],
)
case(
    "SHUF-006",
    "pad",
    "under pad, for and step give the same orders of two shuffled epochs",
    program(20, 8, "pad", seed=9),
    [
        loop(note="a", expect=permutation(20)),
        loop(note="b", expect=permutation(20)),
        build(to="s"),
        step(3, on="s", expect=same_rows("a")),
        step(3, on="s", expect=same_rows("b")),
    ],
)
case(
    "SHUF-006",
    "scan",
    "step and scan give the same orders of two shuffled epochs",
    program(20, 5, seed=9),
    [
        step(4, note="a", expect=permutation(20)),
        step(4, note="b", expect=permutation(20)),
        build(to="s"),
        scan(4, on="s", expect=same_rows("a")),
        scan(4, on="s", expect=same_rows("b")),
    ],
)
case(
    "SHUF-006",
    "wide",
    "a batch of three shuffled epochs has the orders of all three",
    program(20, 20, seed=9),
    [
        step(3, note="three"),
        build(to="wide", batch_size=60),
        step(on="wide", expect=same_rows("three")),
    ],
)
case(
    "SHUF-007",
    "epochs",
    "four epochs of one seed have four different orders, with 33 records",
    program(33, 33, seed=0),
    [
        loop(
            note=f"e{e}",
            expect={"all": [permutation(33), *[other_order(f"e{p}") for p in range(e)]]},
        )
        for e in range(4)
    ],
)
case(
    "SHUF-007",
    "large",
    "two epochs of one seed have different orders, with 1000 records",
    program(0, 1000, seed=1, columns={"id": {"dtype": "int32", "range": 1000}}),
    [
        loop(note="a", expect=permutation(1000)),
        loop(expect={"all": [permutation(1000), other_order("a")]}),
    ],
)
case(
    "SHUF-007",
    "twenty",
    "twenty epochs of one seed have twenty different orders, with 33 records",
    program(33, 33, seed=2),
    [loop(note=f"e{e}", expect={"all": [permutation(33), new_order()]}) for e in range(20)],
)
case(
    "SHUF-007",
    "hundreds",
    "the order of a seed's first epoch does not come again in the next 257 epochs",
    program(33, 33, seed=2),
    [
        loop(note="first", expect=permutation(33)),
        *[loop(expect={"all": [permutation(33), other_order("first")]}) for _ in range(257)],
    ],
)
SEEDS = (0, 1, 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1)
case(
    "SHUF-008",
    "seeds",
    "seven seeds from 0 to 2**32 - 1 give seven different orders of the first epoch",
    program(33, 33, seed=0),
    [
        action
        for i, seed in enumerate(SEEDS)
        for action in (
            build(to=f"s{seed}", seed=seed),
            loop(
                on=f"s{seed}",
                note=f"s{seed}",
                expect={
                    "all": [permutation(33), *[other_order(f"s{other}") for other in SEEDS[:i]]]
                },
            ),
        )
    ],
)
case(
    "SHUF-009",
    "next",
    "epoch 1 of seed 0 and epoch 0 of seed 1 have different orders",
    program(33, 33, seed=0),
    [
        loop(note="00", expect=permutation(33)),
        loop(note="01", expect=permutation(33)),
        build(to="one", seed=1),
        loop(on="one", expect={"all": [permutation(33), other_order("01")]}),
    ],
)
case(
    "SHUF-009",
    "table",
    "no order in four epochs of one seed is an order of another, for four seeds",
    program(40, 40, seed=0),
    [
        action
        for s in range(4)
        for action in (
            build(to=f"s{s}", seed=s),
            *[
                loop(
                    on=f"s{s}",
                    note=f"{s}{e}",
                    expect={
                        "all": [
                            permutation(40),
                            *[other_order(f"{t}{f}") for t in range(s) for f in range(4)],
                        ]
                    },
                )
                for e in range(4)
            ],
        )
    ],
)
case(
    "SHUF-009",
    "hundred",
    "104 epochs of each of two seeds have 208 different orders",
    program(33, 33, seed=0),
    [
        action
        for s in range(2)
        for action in (
            build(to=f"s{s}", seed=s),
            *[loop(on=f"s{s}", note=f"{s}-{e}", expect=new_order()) for e in range(104)],
        )
    ],
)
for count in (20_000, 100_000, 2**20, 10**9):
    case(
        "SHUF-010",
        f"n{count}",
        f"neighbouring offsets of {count} records hold unrelated records",
        program(0, 10_001, seed=4, columns={"id": {"dtype": "int32", "range": count}}),
        [
            loop(
                take=1,
                expect={
                    "check": "strangers",
                    "steps": 10_000,
                    "within": count // 100,
                    "low": 0.01,
                    "high": 0.03,
                },
            )
        ],
    )
case(
    "SHUF-011",
    "values",
    "names, types, values, order and number of columns leave the order unchanged",
    program(20, 5, seed=3, columns={"id": np.arange(20, dtype=np.int32)}),
    [
        loop(note="a", expect=permutation(20)),
        loop(note="b", expect=permutation(20)),
        *(
            action
            for to, columns in (
                ("more", id_and_x(20)),
                ("values", {"id": np.arange(20, dtype=np.int32), "x": np.zeros(20, np.float32)}),
                ("order", dict(reversed(id_and_x(20).items()))),
                ("names", {"id": np.arange(20, dtype=np.int32), "a": np.ones(20, np.float32)}),
                ("types", {"id": np.arange(20, dtype=np.int16), "x": np.ones((20, 2), np.uint8)}),
            )
            for action in (
                build(to=to, columns=program(20, 5, columns=columns)["columns"]),
                loop(on=to, expect={"check": "same_order", "like": "a"}),
                loop(on=to, expect={"check": "same_order", "like": "b"}),
            )
        ),
    ],
)
GRAPH = chain(20, 5, "keep", "affine(2,1)")
case(
    "SHUF-011",
    "graph",
    "a graph leaves the order of an epoch unchanged",
    program(20, 5, seed=3),
    [
        loop(note="a", expect=permutation(20)),
        build(to="graph", nodes=GRAPH["nodes"], edges=GRAPH["edges"], sink=GRAPH["sink"]),
        loop(on="graph", expect={"check": "same_order", "like": "a"}),
    ],
    ["dag"],
)

# The order of the library, bit for bit: the cases store the expected values.


def exact(
    cites: str, slug: str, title: str, count: int, batch_size: int, seed: int, script: list
) -> None:
    columns = {"id": np.arange(count, dtype=np.int32)}
    case(
        cites,
        slug,
        title,
        program(count, batch_size, seed=seed, columns=columns),
        script,
        ["shuffle.exact"],
    )


exact(
    "KEYS-001",
    "first",
    "seed 0 gives the first epoch of 5 records the order of the spec",
    5,
    5,
    0,
    [loop()],
)
exact(
    "KEYS-002",
    "seeds",
    "seeds 1, 42, 2**31 - 1, 2**31 and 2**32 - 1 give the orders of the spec",
    8,
    8,
    1,
    [
        action
        for seed in (1, 42, 2**31 - 1, 2**31, 2**32 - 1)
        for action in (build(to=f"s{seed}", seed=seed), loop(on=f"s{seed}"))
    ],
)
exact(
    "KEYS-003",
    "epochs",
    "the key of each of three epochs has the number of the epoch folded in",
    8,
    8,
    42,
    [loop(), loop(), loop()],
)
exact(
    "KEYS-004",
    "source",
    "the order of an epoch comes from the key of the node `source`",
    16,
    16,
    7,
    [loop()],
)
exact(
    "KEYS-005",
    "epochs",
    "six epochs of one seed have the orders of their epoch keys",
    7,
    7,
    12345,
    [loop() for _ in range(6)],
)
exact(
    "SHUF-012",
    "rounds",
    "a round takes its first word modulo the number of records, with 1000 records",
    1000,
    100,
    3,
    [loop(take=2)],
)
exact(
    "SHUF-012",
    "two",
    "eight shuffled epochs of two records have the orders of their round keys",
    2,
    2,
    0,
    [loop() for _ in range(8)],
)
for count in (10, 1, 2, 3, 33, 100, 255, 256, 257):
    exact(
        "SHUF-013",
        f"n{count}",
        f"two epochs of a source of length {count} have the order of swap-or-not",
        count,
        count,
        42,
        [loop(), loop()],
    )
for count in (65_536, 65_537, 1_000_000, 2_000_000_000, 2**32 - 1):
    dtype = "int32" if count < 2**31 else "uint32"
    case(
        "SHUF-013",
        f"head-n{count}",
        f"the first 64 offsets of {count} records have the order of swap-or-not",
        program(0, 64, seed=42, columns={"id": {"dtype": dtype, "range": count}}),
        [loop(take=1)],
        ["shuffle.exact"],
    )
