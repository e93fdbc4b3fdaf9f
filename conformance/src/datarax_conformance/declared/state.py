"""Chapter 60: resume."""

import numpy as np

from ..arrays import encode
from ._declare import Table, build, chain, do, error, id_and_x, loop, program, same_rows, step

table = Table()
case = table.case

SAVE = do("save", to="s")
LATER = [build(to="b"), do("restore", origin="s", on="b")]


def restore(on: str = "b", **arguments: object) -> dict:
    return do("restore", origin="s", on=on, **arguments)


case(
    "STATE-001",
    "middle",
    "a fresh stream goes on in the middle of an epoch",
    program(8, 2),
    [loop(take=1), SAVE, *LATER, loop(on="b")],
)
case(
    "STATE-001",
    "epochs",
    "and into the next ones",
    program(10, 3),
    [loop(take=2), SAVE, *LATER, loop(on="b"), loop(on="b")],
)
case(
    "STATE-001",
    "shuffled",
    "also when shuffled",
    program(10, 3, seed=4),
    [
        loop(take=2),
        SAVE,
        loop(note="rest"),
        loop(note="next"),
        *LATER,
        loop(on="b", expect=same_rows("rest")),
        loop(on="b", expect=same_rows("next")),
    ],
)
case(
    "STATE-001",
    "process",
    "also in another process",
    program(10, 3, seed=4),
    [
        loop(take=2),
        SAVE,
        loop(note="rest"),
        do("restart"),
        build(),
        do("restore", origin="s"),
        loop(expect=same_rows("rest")),
    ],
)
case(
    "STATE-001",
    "columns",
    "whatever the order of the columns",
    program(8, 2),
    [
        loop(take=1),
        SAVE,
        build(to="b", columns=dict(reversed(program(8, 2)["columns"].items()))),
        restore(),
        loop(on="b"),
    ],
)
for number in range(7):
    case(
        "STATE-002",
        f"after-{number}",
        f"a state after {number} batches",
        program(6, 2),
        [*[loop(take=1) for _ in range(number)], SAVE, *LATER, loop(on="b"), loop(on="b")],
    )
case(
    "STATE-002",
    "pad",
    "a state after a filled batch",
    program(5, 2, "pad"),
    [step(3), SAVE, *LATER, step(4, on="b"), loop(on="b")],
)
case(
    "STATE-002",
    "end-of-loop",
    "a state at the end of a loop starts the next epoch",
    program(4, 2, seed=2),
    [loop(), SAVE, loop(note="next"), *LATER, loop(on="b", expect=same_rows("next"))],
)
case(
    "STATE-002",
    "run-on",
    "a state after a batch that ran on",
    program(5, 3),
    [step(2), SAVE, *LATER, loop(on="b"), loop(on="b")],
)
for count, shown in {9: [loop()] * 9, 300: [step(300)]}.items():
    case(
        "STATE-002",
        f"epoch-{count}",
        f"a state in epoch {count}",
        program(33, 33, seed=5),
        [*shown, SAVE, loop(note="next"), *LATER, loop(on="b", expect=same_rows("next"))],
    )
case(
    "STATE-003",
    "in-loop",
    "a state in the loop's body counts what was handed out",
    program(8, 2),
    [do("iter"), do("next"), SAVE, do("next"), *LATER, loop(on="b")],
)
case(
    "STATE-003",
    "each",
    "whatever the batch",
    program(6, 1),
    [do("iter"), do("next", n=3), SAVE, do("next"), do("next"), *LATER, loop(on="b", take=2)],
)
case(
    "STATE-003",
    "stages",
    "so does the state of a stage in it",
    chain(8, 2, "keep", "count"),
    [do("iter"), do("next"), SAVE, do("next"), *LATER, loop(on="b")],
)
case(
    "STATE-004",
    "snapshot",
    "a state stays while the stream moves",
    program(8, 2),
    [loop(take=1), SAVE, loop(take=2), *LATER, loop(on="b")],
)
case(
    "STATE-004",
    "stages",
    "so does the state of a stage in it",
    chain(8, 2, "keep", "count"),
    [loop(take=1), SAVE, loop(take=2), *LATER, loop(on="b")],
)
case(
    "STATE-005",
    "untouched",
    "saving moves nothing",
    program(8, 2),
    [do("iter"), do("next"), SAVE, do("save", to="t"), do("next"), SAVE, loop()],
)
case(
    "STATE-006",
    "back",
    "a stream goes back",
    program(10, 3),
    [
        loop(take=1),
        SAVE,
        loop(),
        do("restore", origin="s"),
        loop(),
        do("restore", origin="s"),
        loop(take=2),
    ],
)
case(
    "STATE-006",
    "back-shuffled",
    "also to an earlier epoch",
    program(6, 4, seed=1),
    [
        loop(take=1),
        SAVE,
        loop(note="rest"),
        loop(),
        loop(),
        do("restore", origin="s"),
        loop(expect=same_rows("rest")),
    ],
)
case(
    "STATE-006",
    "in-loop",
    "also while a loop is under way",
    program(12, 2),
    [
        do("iter"),
        do("next", n=2),
        SAVE,
        do("next", n=2),
        do("restore", origin="s"),
        do("next"),
        loop(),
    ],
)
case(
    "STATE-007",
    "wider",
    "another batch size goes on at the same record",
    program(12, 2),
    [
        loop(take=2),
        SAVE,
        build(to="b", batch_size=5),
        restore(),
        loop(on="b"),
        loop(on="b", take=1),
    ],
)
case(
    "STATE-007",
    "shuffled",
    "also when shuffled",
    program(12, 3, seed=6),
    [
        loop(take=1),
        SAVE,
        loop(note="rest"),
        build(to="b", batch_size=4),
        restore(),
        loop(on="b", expect=same_rows("rest")),
    ],
)
case(
    "STATE-007",
    "narrower-drop",
    "nor does it come back to what drop has skipped",
    program(10, 4, "drop"),
    [loop(), SAVE, build(to="b", batch_size=2), restore(), loop(on="b"), loop(on="b", take=1)],
)
case(
    "STATE-007",
    "drop",
    "under drop with the next epoch, where too few records are left",
    program(10, 2, "drop"),
    [loop(take=4), SAVE, build(to="b", batch_size=4), restore(), loop(on="b")],
)
case(
    "STATE-008",
    "keep-pad",
    "from keep to pad",
    program(10, 4),
    [loop(take=1), SAVE, build(to="b", last_batch="pad"), restore(), loop(on="b")],
)
case(
    "STATE-008",
    "pad-keep",
    "from pad to keep",
    program(10, 4, "pad"),
    [loop(take=1), SAVE, build(to="b", last_batch="keep"), restore(), loop(on="b")],
)
case(
    "STATE-008",
    "keep-drop",
    "from keep to drop, past the last whole batch",
    program(10, 4),
    [loop(take=2), SAVE, build(to="b", last_batch="drop"), restore(), loop(on="b", take=1)],
)
case(
    "STATE-008",
    "drop-loop",
    "where the next loop is the whole next epoch",
    program(10, 4),
    [loop(take=2), SAVE, build(to="b", last_batch="drop"), restore(), loop(on="b")],
)
case(
    "STATE-008",
    "drop-keep",
    "from drop to keep, at the start of an epoch",
    program(10, 4, "drop"),
    [loop(), SAVE, build(to="b", last_batch="keep"), restore(), loop(on="b")],
)


def refused(cites: str, slug: str, title: str, first: dict, **changes: object) -> None:
    """A state of `first` offered to a stream that differs in `changes`."""
    case(
        cites,
        slug,
        title,
        first,
        [loop(take=1), SAVE, build(to="b", **changes), restore(expect=error("state"))],
    )


refused("STATE-009", "seed", "another seed", program(8, 2, seed=1), seed=2)
refused(
    "STATE-009",
    "far-seed",
    "a seed that differs in the top bit alone",
    program(8, 2, seed=1),
    seed=1 + 2**31,
)
refused(
    "STATE-010", "unshuffled", "from shuffled to stored order", program(8, 2, seed=0), seed=None
)
case(
    "STATE-010",
    "shuffled",
    "from stored order to shuffled",
    program(8, 2),
    [loop(take=1), SAVE, build(to="b", seed=0), restore(expect=error("state"))],
    ["shuffle.valid"],
)
refused(
    "STATE-011",
    "length",
    "another number of records",
    program(8, 2),
    columns=program(9, 2)["columns"],
)
refused("STATE-011", "shorter", "fewer records", program(8, 2), columns=program(7, 2)["columns"])
COLUMNS = id_and_x(8)
for slug, title, columns in (
    ("name", "another name", {"id": COLUMNS["id"], "y": COLUMNS["x"]}),
    ("more", "one column more", COLUMNS | {"y": COLUMNS["x"]}),
    ("shape", "another shape of row", COLUMNS | {"x": COLUMNS["x"].reshape(8, 1)}),
    ("type", "another type", COLUMNS | {"x": COLUMNS["x"].astype(np.float16)}),
):
    refused(
        "STATE-012", slug, title, program(8, 2), columns=program(8, 2, columns=columns)["columns"]
    )


WIDE = program(8, 2, columns=COLUMNS | {"id": COLUMNS["id"].astype(np.int64)})
FIRST = [
    {"value": [{"id": encode(COLUMNS["id"][:2].astype(kind)), "x": encode(COLUMNS["x"][:2])}]}
    for kind in (np.int64, np.int32)
]
case(
    "STATE-012",
    "narrowed",
    "a wider type is another one, or the same where it is narrowed",
    program(8, 2),
    [
        loop(take=1),
        SAVE,
        loop(take=1, note="next"),
        build(to="b", columns=WIDE["columns"]),
        restore(expect={"any": [{"check": "no_error"}, error("state")]}),
        # After a refusal the stream stands at its start, where an engine may narrow or not.
        loop(on="b", take=1, expect={"any": [same_rows("next"), *FIRST]}),
    ],
)
CHAIN = chain(8, 2, "keep", "affine(2,1)", "affine(3,0)")
for slug, title, changes in (
    (
        "nodes",
        "another node name",
        {
            "nodes": {"n0": "affine(2,1)", "other": "affine(3,0)"},
            "edges": {"n0": [], "other": ["n0"]},
            "sink": "other",
        },
    ),
    (
        "edges",
        "another edge",
        {"nodes": {"n0": "affine(2,1)", "n1": "add"}, "edges": {"n0": [], "n1": ["n0", "n0"]}},
    ),
    ("none", "no graph", {"nodes": {}, "edges": {}, "sink": None}),
):
    refused("STATE-013", slug, title, CHAIN, **changes)
refused(
    "STATE-013",
    "swapped",
    "predecessors in another order",
    program(
        8,
        2,
        nodes={"a": "affine(2,1)", "b": "affine(3,0)", "c": "sub"},
        edges={"a": [], "b": [], "c": ["a", "b"]},
        sink="c",
    ),
    edges={"a": [], "b": [], "c": ["b", "a"]},
)
ROOT = {"nodes": {"a": "affine(2,1)"}, "sink": "a"}
for slug, first, then in (("source-edge", [], ["source"]), ("no-edge", ["source"], [])):
    case(
        "STATE-013",
        slug,
        "the source is read with an empty list and by its name alike",
        program(8, 2, edges={"a": first}, **ROOT),
        [loop(take=1), SAVE, build(to="b", edges={"a": then}), restore(), loop(on="b")],
    )
case(
    "STATE-013",
    "some",
    "from no graph to one",
    program(8, 2),
    [
        loop(take=1),
        SAVE,
        build(to="b", nodes={"a": "affine(2,1)"}, edges={"a": []}, sink="a"),
        restore(expect=error("state")),
    ],
    ["dag"],
)
case(
    "STATE-014",
    "goes-on",
    "a refusal leaves the stream where it was",
    program(8, 2, seed=1),
    [
        loop(take=3),
        SAVE,
        build(to="c", seed=2),
        loop(on="c", take=1),
        loop(on="c", note="rest"),
        build(to="b", seed=2),
        loop(on="b", take=1),
        restore(expect=error("state")),
        loop(on="b", expect=same_rows("rest")),
    ],
)
case(
    "STATE-014",
    "stages",
    "and its stages as they were",
    chain(8, 2, "keep", "count"),
    [
        loop(take=3),
        SAVE,
        build(to="b", columns=program(9, 2)["columns"]),
        loop(on="b", take=1),
        restore(expect=error("state")),
        loop(on="b", take=2),
    ],
)
for slug, title, first, changes in (
    (
        "graph",
        "also where another graph is refused",
        chain(8, 2, "keep", "affine(2,1)"),
        {"nodes": {"other": "affine(2,1)"}, "edges": {"other": []}, "sink": "other"},
    ),
    (
        "columns",
        "also where another type is",
        program(8, 2),
        {"columns": program(8, 2, columns={**COLUMNS, "x": COLUMNS["id"]})["columns"]},
    ),
):
    case(
        "STATE-014",
        slug,
        title,
        first,
        [
            loop(take=3),
            SAVE,
            build(to="b", **changes),
            loop(on="b", take=1),
            restore(expect=error("state")),
            loop(on="b"),
        ],
    )
COUNTED = chain(8, 2, "keep", "count")
for slug, title, whose, part in (
    ("half", "the first half of a state", program(8, 2), 0.5),
    ("empty", "a state of no bytes", program(8, 2), 0),
    ("stages", "nor does one that is cut move a stage", COUNTED, 0.9),
):
    case(
        "STATE-023",
        slug,
        title,
        whose,
        [
            loop(take=2),
            SAVE,
            loop(take=1),
            restore(on="main", part=part, expect=error("state")),
            loop(),
            loop(take=1),
        ],
    )
case(
    "STATE-015",
    "count",
    "the count of a stage goes on",
    chain(6, 2, "keep", "count"),
    [loop(), loop(take=1), SAVE, *LATER, loop(on="b")],
)
case(
    "STATE-015",
    "back",
    "also backwards",
    chain(6, 2, "keep", "count"),
    [loop(take=1), SAVE, loop(), do("restore", origin="s"), loop()],
)
case(
    "STATE-015",
    "names",
    "whatever characters the names have",
    program(
        6,
        2,
        nodes={"a/b": "count", "a": "affine(2,0)"},
        edges={"a/b": [], "a": ["a/b"]},
        sink="a",
    ),
    [loop(take=2), SAVE, *LATER, loop(on="b")],
)
NODES = {"a": "count", "q": "pick(id)", "z": "count"}
EDGES = {"a": [], "q": ["a"], "z": ["q"]}
case(
    "STATE-015 STATE-001",
    "declared",
    "and in whatever order they are declared",
    program(8, 2, nodes=NODES, edges=EDGES, sink="z"),
    [
        loop(take=1),
        SAVE,
        build(
            to="b",
            nodes={name: NODES[name] for name in "zaq"},
            edges={name: EDGES[name] for name in "zaq"},
        ),
        restore(),
        loop(on="b"),
    ],
)
