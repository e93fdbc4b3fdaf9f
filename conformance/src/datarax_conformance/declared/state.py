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
    "a fresh stream with a restored state continues in the middle of the epoch",
    program(8, 2),
    [loop(take=1), SAVE, *LATER, loop(on="b")],
)
case(
    "STATE-001",
    "epochs",
    "a fresh stream with a restored state continues into the next epoch",
    program(10, 3),
    [loop(take=2), SAVE, *LATER, loop(on="b"), loop(on="b")],
)
case(
    "STATE-001",
    "shuffled",
    "a fresh shuffled stream with a restored state continues with the same records",
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
    "a state restored in another process continues with the same shuffled records",
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
    "a state is accepted by a stream whose columns are declared in reverse order",
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
        f"a state saved after {number} batch{'es' * (number != 1)} resumes with the next one",
        program(6, 2),
        [*[loop(take=1) for _ in range(number)], SAVE, *LATER, loop(on="b"), loop(on="b")],
    )
case(
    "STATE-002",
    "pad",
    "under pad, a state saved after a padded batch resumes with the next batch",
    program(5, 2, "pad"),
    [step(3), SAVE, *LATER, step(4, on="b"), loop(on="b")],
)
case(
    "STATE-002",
    "end-of-loop",
    "a state saved at the end of a loop resumes with the next epoch",
    program(4, 2, seed=2),
    [loop(), SAVE, loop(note="next"), *LATER, loop(on="b", expect=same_rows("next"))],
)
case(
    "STATE-002",
    "run-on",
    "a state saved after a batch that ran on into the next epoch resumes after it",
    program(5, 3),
    [step(2), SAVE, *LATER, loop(on="b"), loop(on="b")],
)
for count, shown in {9: [loop()] * 9, 300: [step(300)]}.items():
    case(
        "STATE-002",
        f"epoch-{count}",
        f"a state saved at the start of epoch {count} resumes with that epoch",
        program(33, 33, seed=5),
        [*shown, SAVE, loop(note="next"), *LATER, loop(on="b", expect=same_rows("next"))],
    )
case(
    "STATE-003",
    "in-loop",
    "a state saved within a loop counts exactly the batches handed out",
    program(8, 2),
    [do("iter"), do("next"), SAVE, do("next"), *LATER, loop(on="b")],
)
case(
    "STATE-003",
    "each",
    "a state saved in a loop after three batches of one row resumes with the fourth",
    program(6, 1),
    [do("iter"), do("next", n=3), SAVE, do("next"), do("next"), *LATER, loop(on="b", take=2)],
)
case(
    "STATE-003",
    "stages",
    "a stage's state saved within a loop counts exactly the batches handed out",
    chain(8, 2, "keep", "count"),
    [do("iter"), do("next"), SAVE, do("next"), *LATER, loop(on="b")],
)
case(
    "STATE-004",
    "snapshot",
    "a saved state does not change when the stream moves on",
    program(8, 2),
    [loop(take=1), SAVE, loop(take=2), *LATER, loop(on="b")],
)
case(
    "STATE-004",
    "stages",
    "a saved state of a stage does not change when the stream moves on",
    chain(8, 2, "keep", "count"),
    [loop(take=1), SAVE, loop(take=2), *LATER, loop(on="b")],
)
case(
    "STATE-005",
    "untouched",
    "saving states within a loop does not move the stream",
    program(8, 2),
    [do("iter"), do("next"), SAVE, do("save", to="t"), do("next"), SAVE, loop()],
)
case(
    "STATE-006",
    "back",
    "restoring a state on a consumed stream takes it back, twice",
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
    "restoring a state takes a shuffled stream back to an earlier epoch",
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
    "restoring a state within a loop makes the loop go on from that state",
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
    "a state resumes at the same record with batch_size 5 instead of 2",
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
    "a shuffled state resumes at the same record with batch_size 4 instead of 3",
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
    "under drop, a smaller batch_size does not go back to records that were skipped",
    program(10, 4, "drop"),
    [loop(), SAVE, build(to="b", batch_size=2), restore(), loop(on="b"), loop(on="b", take=1)],
)
case(
    "STATE-007",
    "drop",
    "under drop, a batch_size above the records left resumes with the next epoch",
    program(10, 2, "drop"),
    [loop(take=4), SAVE, build(to="b", batch_size=4), restore(), loop(on="b")],
)
case(
    "STATE-008",
    "keep-pad",
    "a state saved under keep resumes under pad",
    program(10, 4),
    [loop(take=1), SAVE, build(to="b", last_batch="pad"), restore(), loop(on="b")],
)
case(
    "STATE-008",
    "pad-keep",
    "a state saved under pad resumes under keep",
    program(10, 4, "pad"),
    [loop(take=1), SAVE, build(to="b", last_batch="keep"), restore(), loop(on="b")],
)
case(
    "STATE-008",
    "keep-drop",
    "a keep state past the last whole batch resumes under drop with the next epoch",
    program(10, 4),
    [loop(take=2), SAVE, build(to="b", last_batch="drop"), restore(), loop(on="b", take=1)],
)
case(
    "STATE-008",
    "drop-loop",
    "from a keep state past the last whole batch, a drop loop is the whole next epoch",
    program(10, 4),
    [loop(take=2), SAVE, build(to="b", last_batch="drop"), restore(), loop(on="b")],
)
case(
    "STATE-008",
    "drop-keep",
    "a drop state at the start of an epoch resumes under keep with that epoch",
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


refused(
    "STATE-009",
    "seed",
    "a state of a stream with another seed is refused",
    program(8, 2, seed=1),
    seed=2,
)
refused(
    "STATE-009",
    "far-seed",
    "a state of a stream with a seed that differs in the top bit alone is refused",
    program(8, 2, seed=1),
    seed=1 + 2**31,
)
refused(
    "STATE-010",
    "unshuffled",
    "a state of a shuffled stream is refused by an unshuffled one",
    program(8, 2, seed=0),
    seed=None,
)
case(
    "STATE-010",
    "shuffled",
    "a state of an unshuffled stream is refused by a shuffled one",
    program(8, 2),
    [loop(take=1), SAVE, build(to="b", seed=0), restore(expect=error("state"))],
    ["shuffle.valid"],
)
refused(
    "STATE-011",
    "length",
    "a state of a stream of 8 records is refused by one of 9",
    program(8, 2),
    columns=program(9, 2)["columns"],
)
refused(
    "STATE-011",
    "shorter",
    "a state of a stream of 8 records is refused by one of 7",
    program(8, 2),
    columns=program(7, 2)["columns"],
)
COLUMNS = id_and_x(8)
for slug, what, columns in (
    ("name", "another column name", {"id": COLUMNS["id"], "y": COLUMNS["x"]}),
    ("more", "one more column", COLUMNS | {"y": COLUMNS["x"]}),
    ("shape", "another row shape", COLUMNS | {"x": COLUMNS["x"].reshape(8, 1)}),
    ("type", "another column type", COLUMNS | {"x": COLUMNS["x"].astype(np.float16)}),
):
    refused(
        "STATE-012",
        slug,
        f"a state is refused by a stream with {what}",
        program(8, 2),
        columns=program(8, 2, columns=columns)["columns"],
    )


WIDE = program(8, 2, columns=COLUMNS | {"id": COLUMNS["id"].astype(np.int64)})
FIRST = [
    {"value": [{"id": encode(COLUMNS["id"][:2].astype(kind)), "x": encode(COLUMNS["x"][:2])}]}
    for kind in (np.int64, np.int32)
]
case(
    "STATE-012",
    "narrowed",
    "a stream with an int64 column refuses a state of int32, or narrows and resumes",
    program(8, 2),
    [
        loop(take=1),
        SAVE,
        loop(take=1, note="next"),
        build(to="b", columns=WIDE["columns"]),
        restore(expect={"any": [{"check": "no_error"}, error("state")]}),
        # After a refusal the stream is at its start. The engine may narrow the column or not.
        loop(on="b", take=1, expect={"any": [same_rows("next"), *FIRST]}),
    ],
)
CHAIN = chain(8, 2, "keep", "affine(2,1)", "affine(3,0)")
for slug, what, changes in (
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
        "another edge between its nodes",
        {"nodes": {"n0": "affine(2,1)", "n1": "add"}, "edges": {"n0": [], "n1": ["n0", "n0"]}},
    ),
    ("none", "no graph", {"nodes": {}, "edges": {}, "sink": None}),
):
    refused("STATE-013", slug, f"a state is refused by a stream with {what}", CHAIN, **changes)
refused(
    "STATE-013",
    "swapped",
    "a state is refused by a stream that swaps the predecessors of a node",
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
        f"a state with the predecessors {first} is accepted with the predecessors {then}",
        program(8, 2, edges={"a": first}, **ROOT),
        [loop(take=1), SAVE, build(to="b", edges={"a": then}), restore(), loop(on="b")],
    )
case(
    "STATE-013",
    "some",
    "a state of a stream without a graph is refused by one with a graph",
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
    "a stream that refuses a state of another seed goes on where it was",
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
    "a stream that refuses a state keeps the state of its stages",
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
        "a stream that refuses a state of another graph goes on where it was",
        chain(8, 2, "keep", "affine(2,1)"),
        {"nodes": {"other": "affine(2,1)"}, "edges": {"other": []}, "sink": "other"},
    ),
    (
        "columns",
        "a stream that refuses a state with another column type goes on where it was",
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
    (
        "half",
        "the first half of a state is refused, and the stream goes on where it was",
        program(8, 2),
        0.5,
    ),
    (
        "empty",
        "a state of no bytes is refused, and the stream goes on where it was",
        program(8, 2),
        0,
    ),
    ("stages", "a state cut to nine tenths is refused, and stages keep their state", COUNTED, 0.9),
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
    "a fresh stream with a restored state goes on with the count of a stage",
    chain(6, 2, "keep", "count"),
    [loop(), loop(take=1), SAVE, *LATER, loop(on="b")],
)
case(
    "STATE-015",
    "back",
    "restoring an earlier state takes the count of a stage back",
    chain(6, 2, "keep", "count"),
    [loop(take=1), SAVE, loop(), do("restore", origin="s"), loop()],
)
case(
    "STATE-015",
    "names",
    "the state of a node named `a/b` is saved and restored",
    program(
        6,
        2,
        nodes={"a/b": "count", "a": "affine(2,0)"},
        edges={"a/b": [], "a": ["a/b"]},
        sink="a",
    ),
    [loop(take=2), SAVE, *LATER, loop(on="b")],
)
for name, order in (("first", ["a", "z"]), ("second", ["z", "a"])):
    case(
        "STATE-015",
        f"two-{name}",
        f"of two stages that count, the {name} one resumes its count",
        program(
            8,
            2,
            nodes={"a": "count", "z": "count", "sum": "add"},
            edges={"a": [], "z": [], "sum": order},
            sink="sum",
        ),
        [loop(take=1), SAVE, *LATER, loop(on="b")],
    )
NODES = {"a": "count", "q": "pick(id)", "z": "count"}
EDGES = {"a": [], "q": ["a"], "z": ["q"]}
case(
    "STATE-015 STATE-001",
    "declared",
    "a state with stages is accepted if nodes are declared in another order",
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
