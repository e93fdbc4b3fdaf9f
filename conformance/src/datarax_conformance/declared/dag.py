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


case(
    "DAG-001",
    "sink",
    "a program with one node hands out that node's batch",
    chain(8, 4, "keep", "affine(2,1)"),
    [loop()],
)
case(
    "DAG-001",
    "middle",
    "a graph of three nodes hands out the batch of its sink",
    graph(
        {"a": "affine(2,1)", "b": "affine(3,0)", "c": "sub"},
        {"a": [], "b": ["a"], "c": ["b", "a"]},
        "c",
    ),
    [loop()],
)
case(
    "DAG-001",
    "more",
    "a field that the sink adds is in the batch",
    chain(6, 3, "keep", "count"),
    [loop()],
)
case(
    "DAG-001",
    "fewer",
    "fields that the sink leaves out are not in the batch",
    chain(6, 3, "keep", "pick(x)"),
    [loop()],
)
case(
    "DAG-002",
    "roots",
    "two nodes with empty lists of predecessors both get the source's batch",
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
    "`source` among the predecessors of a node stands for the source's batch",
    graph({"a": "affine(10,0)", "b": "sub"}, {"a": ["source"], "b": ["a", "source"]}, "b"),
    [loop()],
)
case(
    "DAG-003",
    "twice",
    "a node whose predecessors are `source` twice gets the source's batch twice",
    graph({"a": "add"}, {"a": ["source", "source"]}, "a"),
    [loop()],
)
case(
    "DAG-004",
    "order",
    "predecessors are passed in the declared order, not sorted by name",
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
    "predecessors are passed in the order of the edges, not in that of `nodes`",
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
    "a predecessor that is declared twice is passed twice",
    graph({"a": "affine(2,0)", "c": "add"}, {"a": [], "c": ["a", "a"]}, "c"),
    [loop()],
)
NODES = {"a": "affine(2,0)", "b": "affine(1,1)", "c": "sub", "d": "add"}
EDGES = {"a": [], "b": ["a"], "c": ["a", "b"], "d": ["c", "c"]}
case(
    "DAG-005",
    "turned",
    "declaring nodes and edges in reverse order does not change the batches",
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
    "a node that three others read runs once for each batch",
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
    "a node that the sink and another node read runs once for each batch",
    graph(
        {"n": "count", "a": "affine(2,0)", "c": "add"}, {"n": [], "a": ["n"], "c": ["n", "a"]}, "c"
    ),
    [step(2)],
)
case(
    "DAG-010",
    "affine",
    "affine(-2,3) replaces x by -2 * x + 3",
    chain(4, 2, "keep", "affine(-2,3)"),
    [loop()],
)
case(
    "DAG-010",
    "add",
    "add sums the fields x of one, two and three batches",
    graph(
        {"a": "add", "b": "add", "c": "add"}, {"a": [], "b": ["a", "a"], "c": ["b", "a", "b"]}, "c"
    ),
    [loop()],
)
case(
    "DAG-010",
    "sub",
    "sub subtracts the second batch's x from the first batch's x",
    graph(
        {"a": "affine(4,0)", "b": "affine(1,1)", "c": "sub"},
        {"a": [], "b": [], "c": ["a", "b"]},
        "c",
    ),
    [loop()],
)
case(
    "DAG-010",
    "pick",
    "pick(x) gives a batch with the field x alone",
    chain(4, 2, "keep", "pick(x)"),
    [loop()],
)
case(
    "DAG-010",
    "count",
    "count adds a field with the number of batches that the node has had",
    chain(4, 2, "keep", "count"),
    [loop()],
)
case(
    "DAG-007",
    "batches",
    "the state of a stage carries over between batches, loops and a step",
    chain(6, 3, "keep", "count"),
    [loop(), loop(), step()],
)
case(
    "DAG-007",
    "short",
    "a short last batch counts as one batch in the state of a stage",
    chain(5, 2, "keep", "count"),
    [loop(), loop()],
)
case(
    "DAG-007",
    "two",
    "two stages that count batches do not share their state",
    chain(8, 2, "keep", "count", "count"),
    [loop(), step()],
)
case(
    "DAG-007",
    "built",
    "building another stream does not change the state of a stage",
    chain(6, 3, "keep", "count"),
    [step(), build(to="b"), step(), step(on="b")],
)
case(
    "DAG-008",
    "diamond",
    "both nodes that read the top of a diamond get the same batch",
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
    "a node changes neither the source's batch for another node nor the columns",
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
    "under pad, the batches of a graph carry the mask",
    chain(5, 3, "pad", "affine(2,1)"),
    [loop(), step()],
)
case(
    "DAG-009",
    "put-back",
    "under pad, the mask is put back where a stage leaves it out",
    chain(5, 3, "pad", "pick(x)"),
    [loop(), step()],
)
case(
    "DAG-011",
    "sizes",
    "row-by-row stages give the same rows with batch sizes 2 and 5",
    chain(7, 2, "keep", "affine(3,-1)", "affine(2,2)"),
    [loop(note="a"), build(to="b", batch_size=5), loop(on="b", expect=same_rows("a"))],
)
