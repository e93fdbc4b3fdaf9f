"""Chapter 80: which programs are refused, and what the errors name."""

from typing import Any

import numpy as np

from ._declare import Table, build, chain, error, id_and_x, loop, program

table = Table()
case = table.case


def graph(nodes: str, edges: dict[str, Any], sink: str | None) -> dict:
    """A graph whose nodes all have the same operation."""
    return program(4, 2, nodes=dict.fromkeys(nodes.split(), "add"), edges=edges, sink=sink)


def refused(cites: str, slug: str, title: str, wrong: dict, code: str, **details: Any) -> None:
    case(cites, slug, title, wrong, [build(expect=error(code, **details))])


def cycles(cites: str, slug: str, title: str, wrong: dict, *cycle: str) -> None:
    """A case that accepts the error with any node of the cycle named first."""
    turns = [[*cycle[i:], *cycle[: i + 1]] for i in range(len(cycle))]
    case(
        cites,
        slug,
        title,
        wrong,
        [build(expect={"any": [error("cycle", nodes=turn) for turn in turns]})],
    )


FINE = graph("a b", {"a": [], "b": ["a"]}, "b")
case(
    "ERR-001",
    "accepted",
    "a program without a graph and without a fault is accepted",
    program(4, 2),
    [build()],
)
case("ERR-001", "graph", "a graph without a fault is accepted", FINE, [build()])
case(
    "ERR-001",
    "long",
    "a chain of 1001 nodes is accepted and runs",
    chain(4, 2, "keep", *["add"] * 1001),
    [build(), loop(take=1)],
)
case(
    "ERR-001",
    "wide",
    "a node with twenty predecessors is accepted",
    program(
        4,
        2,
        nodes={f"n{i}": "affine(1,1)" for i in range(20)} | {"sum": "add"},
        edges={f"n{i}": [] for i in range(20)} | {"sum": [f"n{i}" for i in range(20)]},
        sink="sum",
    ),
    [build()],
)
refused(
    "ERR-002",
    "graph",
    "a cycle is refused when the stream is built, whatever the code",
    graph("a b", {"a": ["b"], "b": ["a"]}, "b"),
    "*",
)
refused(
    "ERR-002",
    "source",
    "batch_size=0 is refused when the stream is built, whatever the code",
    program(4, 0),
    "*",
)
refused(
    "ERR-003",
    "two",
    "a cycle of two nodes is refused",
    graph("a b", {"a": ["b"], "b": ["a"]}, "b"),
    "cycle",
)
refused(
    "ERR-003",
    "entry",
    "a cycle of two nodes that a third node feeds is refused",
    graph("p a b", {"p": [], "a": ["p", "b"], "b": ["a"]}, "b"),
    "cycle",
)
MANY = [f"n{i}" for i in range(1001)]
refused(
    "ERR-003",
    "long",
    "a cycle of 1001 nodes is refused",
    graph(" ".join(MANY), {name: [MANY[i - 1]] for i, name in enumerate(MANY)}, "n0"),
    "cycle",
)
cycles(
    "ERR-004",
    "after",
    "the error of a cycle leaves out a node that reads from the cycle",
    graph("a b c", {"a": ["b"], "b": ["a"], "c": ["b"]}, "c"),
    "a",
    "b",
)
cycles(
    "ERR-004",
    "declared-first",
    "the error of a cycle leaves out a reader of the cycle that is declared first",
    graph("c a b", {"c": ["b"], "a": ["b"], "b": ["a"]}, "c"),
    "a",
    "b",
)
cycles(
    "ERR-004",
    "two",
    "the error of a cycle names both nodes of a cycle of two",
    graph("a b", {"a": ["b"], "b": ["a"]}, "b"),
    "a",
    "b",
)
cycles(
    "ERR-004",
    "three",
    "the error of a cycle names its three nodes in the order of the data flow",
    graph("a b c", {"a": ["c"], "b": ["a"], "c": ["b"]}, "c"),
    "a",
    "b",
    "c",
)
cycles(
    "ERR-004",
    "before",
    "the error of a cycle leaves out the nodes that feed or read the cycle",
    graph("p a b c", {"p": [], "a": ["p", "b"], "b": ["a"], "c": ["b", "p"]}, "c"),
    "a",
    "b",
)
cycles(
    "ERR-004",
    "long",
    "the error of a cycle names the four of six nodes that form the cycle",
    graph(
        "p a b c d q",
        {"p": [], "a": ["p", "d"], "b": ["a"], "c": ["b", "p"], "d": ["c"], "q": ["d"]},
        "q",
    ),
    "a",
    "b",
    "c",
    "d",
)
refused(
    "ERR-005",
    "own",
    "a node whose only predecessor is itself is refused",
    graph("a", {"a": ["a"]}, "a"),
    "self-loop",
    node="a",
)
refused(
    "ERR-005",
    "among",
    "a node with itself among its predecessors is refused",
    graph("a b", {"a": [], "b": ["a", "b"]}, "b"),
    "self-loop",
    node="b",
)
refused(
    "ERR-006",
    "unknown",
    "an unknown predecessor is refused, naming it and the node",
    graph("a b", {"a": [], "b": ["a", "c"]}, "b"),
    "unknown-predecessor",
    node="b",
    name="c",
)
refused(
    "ERR-007",
    "unknown",
    "an unknown sink is refused, naming it",
    graph("a", {"a": []}, "z"),
    "unknown-sink",
    name="z",
)
refused(
    "ERR-008",
    "none",
    "a node without an entry in the edges is refused",
    graph("a b", {"b": []}, "b"),
    "missing-edges",
    node="a",
)
refused(
    "ERR-008",
    "read",
    "a node without an entry in the edges that another node reads is refused",
    graph("a b", {"b": ["a"]}, "b"),
    "missing-edges",
    node="a",
)
refused(
    "ERR-009",
    "ghost",
    "an entry in the edges for an unknown node is refused",
    graph("a", {"a": [], "ghost": ["a"]}, "a"),
    "edges-without-node",
    name="ghost",
)
refused(
    "ERR-010",
    "aside",
    "a node that reads the source and does not lead to the sink is refused",
    graph("a b", {"a": [], "b": []}, "a"),
    "unused-node",
    node="b",
)
refused(
    "ERR-010",
    "after",
    "a node that reads the sink and does not lead to it is refused",
    graph("a b", {"a": [], "b": ["a"]}, "a"),
    "unused-node",
    node="b",
)
refused("ERR-011", "empty", "a graph without nodes is refused", program(4, 2, sink="a"), "no-nodes")
for slug, size in {"zero": 0, "negative": -3, "float": 2.5, "bool": True, "text": "4"}.items():
    refused("ERR-012", slug, f"batch_size={size!r} is refused", program(4, size), "batch-size")
refused("ERR-013", "rows", "columns without rows are refused", program(0, 2), "empty-source")
refused(
    "ERR-013",
    "columns",
    "a program without columns is refused",
    program(0, 2, columns={}),
    "empty-source",
)
refused(
    "ERR-014",
    "lengths",
    "columns of 4 and of 3 rows are refused",
    program(0, 2, columns=id_and_x(4) | {"x": np.zeros(3, np.float32)}),
    "unequal-lengths",
)
refused(
    "ERR-015",
    "strings",
    "a column of strings is refused",
    program(0, 2, columns=id_and_x(2) | {"name": np.array(["a", "b"])}),
    "field-type",
    field="name",
)
refused(
    "ERR-015",
    "objects",
    "a column of mixed objects is refused",
    program(0, 2, columns=id_and_x(2) | {"any": np.array([None, "b"], object)}),
    "field-type",
    field="any",
)
refused(
    "ERR-015",
    "dates",
    "a column of dates is refused",
    program(0, 2, columns=id_and_x(2) | {"day": np.array([0, 1], "datetime64[D]")}),
    "field-type",
    field="day",
)
refused(
    "ERR-015",
    "no-rows",
    "a column that is a single number is refused",
    program(0, 2, columns=id_and_x(2) | {"one": np.float32(1)}),
    "field-type",
    field="one",
)
refused(
    "ERR-016",
    "string",
    "a string in place of a list of predecessors is refused",
    graph("a b", {"a": [], "b": "a"}, "b"),
    "predecessors-type",
    node="b",
)
refused(
    "ERR-016",
    "letters",
    "a string of predecessors is refused even if each of its letters is a node",
    graph("a b ab", {"a": [], "b": [], "ab": "ab"}, "ab"),
    "predecessors-type",
    node="ab",
)
refused(
    "ERR-017",
    "source",
    "a node named `source` is refused",
    graph("source", {"source": []}, "source"),
    "node-name",
    name="source",
)
for slug, name in {"empty": "", "underscore": "_a"}.items():
    case(
        "ERR-034",
        slug,
        f"a node named {name!r} is accepted, or refused with the code node-name",
        program(4, 2, nodes={name: "add"}, edges={name: []}, sink=name),
        [build(expect={"any": [{"check": "no_error"}, error("node-name", name=name)]})],
    )
case(
    "ERR-035",
    "equal-crc",
    "two nodes whose names have the same CRC-32 are refused",
    graph("plumless buckeroo", {"plumless": [], "buckeroo": ["plumless"]}, "buckeroo"),
    [build(expect=error("node-name"))],
)
for slug, policy in {"unknown": "wrap", "case": "Keep", "empty": ""}.items():
    refused(
        "ERR-018", slug, f"last_batch={policy!r} is refused", program(4, 2, policy), "last-batch"
    )
refused(
    "ERR-019",
    "wide",
    "under drop, a batch_size above the number of records is refused",
    program(3, 4, "drop"),
    "last-batch",
)
refused(
    "ERR-020",
    "mask",
    "under pad, a column named mask is refused",
    program(0, 2, "pad", columns=id_and_x(4) | {"mask": np.ones(4, bool)}),
    "mask-name",
)
case(
    "ERR-020",
    "keep",
    "under keep, a column named mask is accepted",
    program(0, 2, columns=id_and_x(4) | {"mask": np.ones(4, bool)}),
    [build()],
)
refused(
    "ERR-021",
    "missing",
    "a stage that picks a field that is not there is refused",
    chain(4, 2, "keep", "pick(nothing)"),
    "stage",
    node="n0",
)
refused(
    "ERR-021",
    "later",
    "the second of three stages is refused if it picks a field that is not there",
    chain(4, 2, "keep", "affine(2,1)", "pick(nothing)", "affine(1,0)"),
    "stage",
    node="n1",
)
refused(
    "ERR-021",
    "affine",
    "affine is refused over columns without a field x",
    program(
        0,
        2,
        columns={"id": np.arange(4, dtype=np.int32)},
        nodes={"a": "affine(2,1)"},
        edges={"a": []},
        sink="a",
    ),
    "stage",
    node="a",
)


def random_graph(number: int) -> dict:
    """A random graph of at most four nodes, which is faulty more often than not."""
    draw = np.random.default_rng(number)
    names = ["a", "b", "c", "d"][: draw.integers(1, 5)]
    pool = [*names, "z"]
    edges = {
        name: [str(p) for p in draw.choice(pool, draw.integers(0, 3))]
        for name in names
        if draw.random() < 0.95
    }
    return graph(" ".join(names), edges, str(draw.choice(names)))


CODES = (
    "cycle",
    "self-loop",
    "unknown-predecessor",
    "unknown-sink",
    "missing-edges",
    "unused-node",
    "stage",
)
case(
    "ERR-031",
    "graphs",
    "forty random graphs are each accepted or refused with a code of the spec",
    FINE,
    [
        build(
            to=f"g{i}",
            **{k: random_graph(i)[k] for k in ("nodes", "edges", "sink")},
            expect={"any": [{"check": "no_error"}, *[error(code) for code in CODES]]},
        )
        for i in range(40)
    ],
)
NAMES = [f"n{i}" for i in range(60)]
DIAMONDS = {name: NAMES[i - 1 : i] * 2 if i else [] for i, name in enumerate(NAMES)}
case(
    "ERR-031",
    "diamonds",
    "a graph of 60 nodes with 2**59 paths from the source is accepted in bounded time",
    graph(" ".join(NAMES), DIAMONDS, "n59"),
    [build()],
)
refused(
    "ERR-031",
    "diamonds-cycle",
    "a cycle through 60 nodes with double edges is refused in bounded time",
    graph(" ".join(NAMES), DIAMONDS | {"n0": ["n59"]}, "n59"),
    "cycle",
)
