"""Chapter 50: graphs."""

from ._declare import Table, build, chain, do, loop, program, same_rows, step

table = Table()
case = table.case


def graph(
    nodes: dict[str, str],
    edges: dict[str, list[str]],
    sink: str,
    *,
    count: int = 8,
    batch_size: int = 4,
    last_batch: str = "keep",
) -> dict:
    return program(count, batch_size, last_batch, nodes=nodes, edges=edges, sink=sink)


case("DAG-001", "sink", "the batch is the sink's", chain(8, 4, "keep", "affine(2,1)"), [loop()])
case(
    "DAG-001",
    "middle",
    "not that of another node",
    graph(
        {"a": "affine(2,1)", "b": "affine(3,0)", "c": "sub"},
        {"a": [], "b": ["a"], "c": ["b", "a"]},
        "c",
    ),
    [loop()],
)
case("DAG-001", "more", "a field that the sink adds", chain(6, 3, "keep", "count"), [loop()])
case("DAG-001", "fewer", "fields that the sink drops", chain(6, 3, "keep", "pick(x)"), [loop()])
case(
    "DAG-002",
    "roots",
    "nodes without predecessors read the source",
    graph(
        {"a": "affine(2,0)", "b": "affine(1,5)", "c": "add"},
        {"a": [], "b": [], "c": ["a", "b"]},
        "c",
    ),
    [loop()],
)
case(
    "DAG-003",
    "named",
    "the source by its name",
    graph({"a": "affine(10,0)", "b": "sub"}, {"a": ["source"], "b": ["a", "source"]}, "b"),
    [loop()],
)
case(
    "DAG-003",
    "twice",
    "the source twice",
    graph({"a": "add"}, {"a": ["source", "source"]}, "a"),
    [loop()],
)
case(
    "DAG-004",
    "order",
    "predecessors come as declared, not sorted",
    graph(
        {"a": "affine(2,0)", "b": "affine(1,1)", "c": "sub"},
        {"a": [], "b": [], "c": ["b", "a"]},
        "c",
    ),
    [loop()],
)
case(
    "DAG-004",
    "declared-last",
    "nor in the order of the nodes",
    graph(
        {"c": "sub", "b": "affine(1,1)", "a": "affine(2,0)"},
        {"c": ["a", "b"], "b": [], "a": []},
        "c",
    ),
    [loop()],
)
case(
    "DAG-004",
    "repeated",
    "a predecessor twice",
    graph({"a": "affine(2,0)", "c": "add"}, {"a": [], "c": ["a", "a"]}, "c"),
    [loop()],
)
NODES = {"a": "affine(2,0)", "b": "affine(1,1)", "c": "sub", "d": "add"}
EDGES = {"a": [], "b": ["a"], "c": ["a", "b"], "d": ["c", "c"]}
case(
    "DAG-005",
    "turned",
    "nodes and edges declared the other way round",
    graph(NODES, EDGES, "d"),
    [
        loop(note="a"),
        build(to="b", nodes=dict(reversed(NODES.items())), edges=dict(reversed(EDGES.items()))),
        loop(on="b", expect=same_rows("a")),
    ],
)
case(
    "DAG-006",
    "shared",
    "a node read by three runs once",
    graph(
        {"n": "count", "a": "add", "b": "sub", "c": "add"},
        {"n": [], "a": ["n", "n"], "b": ["a", "n"], "c": ["b", "n"]},
        "c",
    ),
    [step(3)],
)
case(
    "DAG-006",
    "aside",
    "also where it is read last",
    graph(
        {"n": "count", "a": "affine(2,0)", "c": "add"}, {"n": [], "a": ["n"], "c": ["n", "a"]}, "c"
    ),
    [step(2)],
)
case("DAG-010", "affine", "affine", chain(4, 2, "keep", "affine(-2,3)"), [loop()])
case(
    "DAG-010",
    "add",
    "add, of one, two and three",
    graph(
        {"a": "add", "b": "add", "c": "add"}, {"a": [], "b": ["a", "a"], "c": ["b", "a", "b"]}, "c"
    ),
    [loop()],
)
case(
    "DAG-010",
    "sub",
    "sub",
    graph(
        {"a": "affine(4,0)", "b": "affine(1,1)", "c": "sub"},
        {"a": [], "b": [], "c": ["a", "b"]},
        "c",
    ),
    [loop()],
)
case("DAG-010", "pick", "pick", chain(4, 2, "keep", "pick(x)"), [loop()])
case("DAG-010", "count", "count", chain(4, 2, "keep", "count"), [loop()])
case(
    "DAG-007",
    "batches",
    "state carries over from batch to batch",
    chain(6, 3, "keep", "count"),
    [loop(), loop(), step()],
)
case(
    "DAG-007", "short", "a short batch counts once", chain(5, 2, "keep", "count"), [loop(), loop()]
)
case(
    "DAG-007",
    "two",
    "two stages that count, each for itself",
    chain(8, 2, "keep", "count", "count"),
    [loop(), step()],
)
case(
    "DAG-007",
    "built",
    "building another stream moves nothing",
    chain(6, 3, "keep", "count"),
    [step(), build(to="b"), step(), step(on="b")],
)
case(
    "DAG-008",
    "diamond",
    "both sides of a diamond get one batch",
    graph(
        {"top": "affine(2,1)", "left": "affine(3,0)", "right": "affine(1,0)", "sink": "sub"},
        {"top": [], "left": ["top"], "right": ["top"], "sink": ["left", "right"]},
        "sink",
    ),
    [loop()],
)
case(
    "DAG-008",
    "source",
    "nor does a node touch what the source gives others",
    graph(
        {"a": "affine(5,5)", "b": "affine(1,0)", "sink": "add"},
        {"a": [], "b": [], "sink": ["a", "b"]},
        "sink",
    ),
    [loop(), do("columns")],
)
case(
    "DAG-009",
    "there",
    "the mask goes through the graph",
    chain(5, 3, "pad", "affine(2,1)"),
    [loop(), step()],
)
case(
    "DAG-009",
    "put-back",
    "and is put back where a stage loses it",
    chain(5, 3, "pad", "pick(x)"),
    [loop(), step()],
)
case(
    "DAG-011",
    "sizes",
    "a row's value does not depend on the cut",
    chain(7, 2, "keep", "affine(3,-1)", "affine(2,2)"),
    [loop(note="a"), build(to="b", batch_size=5), loop(on="b", expect=same_rows("a"))],
)
