"""Profile jax: stages and their keys, states, scans with a function, and what errors say."""

from typing import Any

import numpy as np

from ._declare import Table, build, chain, do, error, loop, program, same_rows, scan, step
from .library_sources import EXACT, ask, over

table = Table()
case = table.case

SAME = {"check": "same", "like": "a"}


def entries(*chain_: str, count: int = 8, size: int = 4, seed: int | None = None, **more: Any):
    """A program of a chain: "kind:name=operation" for each stage."""
    return program(count, size, seed=seed, options={"chain": list(chain_), **more})


def wrong(cites: str, slug: str, title: str, bad: dict, code: str, **says: list[str]) -> None:
    case(cites, slug, title, bad, [build(expect={**error(code), "says": says})])


case(
    "STEP-018",
    "renamed",
    "mask_name renames the mask, and the data may have a field named mask",
    program(
        5,
        3,
        "pad",
        columns={"id": np.arange(5, dtype=np.int32), "mask": np.arange(5, dtype=np.float32)},
        options={"mask_name": "valid"},
    ),
    [loop(), build(to="c"), scan(2, on="c")],
)

# Keys.
case(
    "KEYS-007",
    "first",
    "the key of a batch is made from the epoch and offset of its first row",
    chain(10, 4, "keep", "key", seed=11),
    [loop(), step(2)],
    EXACT,
)
RNGS = {"default": 1, "shuffle": 3, "noise": 5}
NEAREST = chain(4, 4, "keep", "element-keys", seed=1, options={"rngs": {"default": 1}})
case(
    "KEYS-010",
    "operator",
    "an operator takes its key from its own rngs, else from the pipeline's",
    NEAREST,
    [
        action
        for i, (rngs, own, stream) in enumerate(
            (
                ({"default": 1, "noise": 3}, None, "noise"),
                ({"default": 1, "other": 3}, None, "noise"),
                ({"default": 1, "noise": 3}, {"default": 2}, "noise"),
            )
        )
        for action in (
            build(
                to=f"s{i}",
                options={
                    "rngs": rngs,
                    **({"rngs_of": {"n0": own}} if own else {}),
                    **({"streams": {"n0": stream}} if stream else {}),
                },
            ),
            step(on=f"s{i}"),
        )
    ],
    EXACT,
)
case(
    "KEYS-010",
    "source",
    "a source takes its key from its own rngs, else from the pipeline's",
    program(10, 4, seed=1, options={"rngs": RNGS}),
    [
        step(2),
        build(to="b", options={"rngs": RNGS, "rngs_of": {"source": {"default": 2}}}),
        step(2, on="b"),
        build(to="c", options={"rngs": RNGS, "rngs_of": {"source": {"default": 2, "shuffle": 4}}}),
        step(2, on="c"),
    ],
    EXACT,
)
case(
    "KEYS-011",
    "read",
    "deriving keys does not move the counters of the pipeline's rngs",
    chain(8, 4, "keep", "keys", seed=1, options={"rngs": RNGS}),
    [step(2), ask("counters"), loop(), ask("counters")],
    EXACT,
)
case(
    "KEYS-012",
    "words",
    "a key of another generator counts by its first two words",
    program(10, 4, seed=1, options={"rngs": {"default": [1, 2, 3, 4]}}),
    [loop()],
    EXACT,
)
DRAWS = chain(10, 4, "keep", "draws")
case(
    "KEYS-013",
    "modes",
    "the rngs of a stage advance once for each batch, in every mode",
    DRAWS,
    [step(2), loop(), scan(2), do("jit_step", n=2), step()],
)
case(
    "KEYS-014",
    "names",
    "stages of a chain are named by function or class, repeats with a number",
    entries(
        "function:double=affine(2,0)",
        "class:Noise=affine(1,1)",
        "element:flip=element",
        "function:flip=affine(1,0)",
        "function:flip_1=affine(1,0)",
        "element:flip=element",
        "function:<lambda>=affine(1,2)",
        "function:__=affine(1,0)",
        "function:source=affine(1,0)",
    ),
    [ask("names"), step()],
)
case(
    "KEYS-014",
    "keys",
    "the second stage named jitter in a chain gets the keys of `jitter_1`",
    entries("function:jitter=keys", "function:jitter=keys", seed=3),
    [step()],
    EXACT,
)

# Graphs.
DIAMOND = {"d": "sub", "c": "affine(3,0)", "b": "affine(2,0)", "a": "affine(1,1)", "e": "add"}
READS = {"d": ["b", "a"], "c": ["a"], "b": [], "a": [], "e": ["d", "c"]}
case(
    "DAG-012",
    "ties",
    "stages are listed in topological order, ties in the order of declaration",
    program(4, 2, nodes=DIAMOND, edges=READS, sink="e"),
    [ask("names"), step()],
)
case(
    "DAG-014",
    "stream",
    "a chain gives the same stream as the graph with the same names",
    entries("function:double=affine(2,0)", "function:jitter=keys", seed=3),
    [
        loop(note="a"),
        build(
            to="b",
            options={"named": "functions"},
            nodes={"double": "affine(2,0)", "jitter": "keys"},
            edges={"double": [], "jitter": ["double"]},
            sink="jitter",
        ),
        loop(on="b", expect=same_rows("a")),
    ],
    EXACT,
)
case(
    "DAG-014",
    "program",
    "a chain compiles to the same program as the graph with the same names",
    entries("function:double=affine(2,0)", "function:more=affine(1,1)"),
    [
        ask("program", note="a", expect={"check": "no_error"}),
        build(
            to="b",
            options={"named": "functions"},
            nodes={"double": "affine(2,0)", "more": "affine(1,1)"},
            edges={"double": [], "more": ["double"]},
            sink="more",
        ),
        ask("program", on="b", expect=SAME),
        step(on="b"),
    ],
)
KINDS = {"n0": "equinox", "n1": "function", "n2": "nnx"}
case(
    "DAG-015",
    "mixed",
    "an Equinox module, a function and an NNX module work in one graph",
    chain(8, 4, "keep", "affine(2,1)", "affine(3,0)", "affine(1,5)", options={"kinds": KINDS}),
    [loop(), scan(2), step()],
)
case(
    "DAG-015",
    "alone",
    "an Equinox module, a function and an NNX module each work as the only stage",
    chain(4, 2, "keep", "affine(2,1)"),
    [
        action
        for kind in ("equinox", "function", "nnx")
        for action in (build(to=kind, options={"kinds": {"n0": kind}}), loop(on=kind))
    ],
)
case(
    "DAG-016",
    "arguments",
    "stages get predecessors as positional arguments, keys by keyword",
    program(
        6,
        3,
        seed=2,
        nodes={"k": "keys", "b": "key", "s": "sub", "a": "affine(2,0)"},
        edges={"a": [], "k": ["source"], "s": ["a", "k"], "b": ["s"]},
        sink="b",
    ),
    [loop()],
    EXACT,
)
case(
    "DAG-017",
    "modes",
    "an overridden `__call__` gets each batch in step, for and scan",
    chain(12, 4, "keep", "affine(2,1)", options={"override": True}),
    [step(2), loop(), scan(3)],
)
case(
    "DAG-017",
    "pad",
    "under pad, an overridden `__call__` gets each batch in step, for and scan",
    chain(10, 4, "pad", "affine(2,1)", options={"override": True}),
    [step(2), loop(), scan(3)],
)
case(
    "DAG-018",
    "specs",
    "element_spec and node_specs give shapes and types before any batch is made",
    program(
        6,
        3,
        "pad",
        nodes={"a": "affine(2,0)", "n": "count", "p": "pick(x)"},
        edges={"a": [], "n": ["a"], "p": ["n"]},
        sink="p",
    ),
    [ask("specs"), step()],
)
case(
    "DAG-019",
    "count",
    "building, asking for specs and replacing a stage leave state of stages unchanged",
    chain(8, 4, "keep", "count", "draws", "affine(2,0)"),
    [
        step(),
        ask("specs"),
        do("replace", node="n2", op="affine(3,0)"),
        step(),
        do("save", to="s"),
        step(),
    ],
)
AXES = {
    "id": np.arange(4, dtype=np.int32),
    "x": np.ones((4, 3), np.float32),
    "y": np.ones((4, 5), np.float32),
}
case(
    "DAG-020",
    "two",
    "stages that bind one axis name to two sizes are refused, two names are accepted",
    chain(4, 2, "keep", "axes(x,b n)", "axes(y,b n)", columns=AXES),
    [
        build(expect=error("stage", node="n1")),
        build(to="b", nodes={"n0": "axes(x,b n)", "n1": "axes(y,b m)"}),
        step(on="b"),
    ],
)
case(
    "DAG-021",
    "rows",
    "an operator without randomness gets each row on its own, with None as key",
    chain(6, 3, "keep", "element"),
    [loop()],
)
case(
    "DAG-021",
    "keys",
    "a stochastic operator gets the key of the record of each row",
    chain(6, 3, "keep", "element-keys", seed=4),
    [loop(), step(2)],
    EXACT,
)
case(
    "DAG-022",
    "value",
    "update_data returns another element and leaves the first unchanged",
    chain(6, 3, "keep", "update"),
    [step()],
)
SHOWN = program(
    6,
    3,
    nodes={"first": "affine(2,0)", "second": "affine(1,1)", "both": "sub"},
    edges={"first": [], "second": ["source"], "both": ["first", "second"]},
    sink="both",
)
for how, title, words in (
    (
        "print",
        "print(pipeline) shows the nodes, their predecessors and their specs",
        ["first", "second", "both", "first, second", "float32[3]"],
    ),
    (
        "html",
        "the HTML form of a pipeline shows the nodes, their predecessors and their specs",
        ["first", "second", "both", "first, second", "float32[3]"],
    ),
    (
        "mermaid",
        "to_mermaid() shows the nodes of a pipeline and their specs",
        ["first", "second", "both", "float32[3]"],
    ),
):
    case(
        "DAG-023",
        how,
        title,
        SHOWN,
        [ask("show", how=how, expect={"check": "mentions", "words": words})],
    )

# States.
FORM = {
    "check": "state_form",
    "form": {
        "version": "*",
        "cursor": {"epoch": 0, "offset": 48},
        "fingerprint": {
            "graph": "*",
            "length": 4000,
            "order": "swap-or-not-24",
            "seed": "*",
            "specs": "*",
        },
        "variables": {},
    },
}
LARGE = {"id": {"dtype": "int32", "range": 4000}}
case(
    "STATE-016",
    "form",
    "a state is JSON in the form of the table, of fewer than 1024 bytes",
    program(4000, 16, seed=2**32 - 1, columns=LARGE),
    [step(3), do("save", to="s", expect={"all": [FORM, {"check": "state_at_most", "most": 1023}]})],
    ["resume"],
)
COUNTED = chain(10, 4, "keep", "count", seed=3)
for form in ("dict", "text", "bytes"):
    case(
        "STATE-017",
        form,
        f"set_state takes a state as {form}",
        COUNTED,
        [
            step(2),
            do("save", to="s"),
            step(),
            build(to="b"),
            do("restore", origin="s", on="b", form=form),
            step(2, on="b"),
        ],
        EXACT,
    )
case(
    "STATE-018",
    "length",
    "the error of a refused state names the field and both values",
    program(10, 4),
    [
        step(),
        do("save", to="s"),
        build(to="b", columns=program(12, 4)["columns"]),
        do(
            "restore",
            origin="s",
            on="b",
            expect={**error("state", field="length"), "says": {"text": ["length", "10", "12"]}},
        ),
    ],
    ["resume"],
)
MALFORMED = (
    ("epoch", ["cursor", "epoch"], -1),
    ("far", ["cursor", "epoch"], 2**32),
    ("half", ["cursor", "offset"], 1.5),
    ("offset", ["cursor", "offset"], 10),
    ("negative", ["cursor", "offset"], -1),
    ("cursor", ["cursor"], None),
    ("text", ["cursor", "offset"], "3"),
    ("version", ["version"], 2),
    ("variables", ["variables"], None),
    ("empty", ["variables"], {}),
    ("fingerprint", ["fingerprint", "specs"], None),
)
for slug, path, value in MALFORMED:
    case(
        "STATE-019",
        slug,
        f"a state is refused if {'.'.join(path)} is {'missing' if value is None else repr(value)}",
        chain(10, 4, "keep", "count"),
        [
            step(),
            do("save", to="s"),
            step(),
            do("restore", origin="s", edit=[path, value], expect=error("state")),
            do("cursor"),
            step(),
        ],
    )
case(
    "STATE-020",
    "size",
    "a state over 4000 records has fewer than 1024 bytes",
    program(4000, 16, columns=LARGE),
    [step(), do("save", to="s", expect={"check": "state_at_most", "most": 1023})],
    ["resume"],
)
case(
    "STATE-020",
    "checkpoint",
    "a checkpoint of nnx.to_pure_dict over 4000 records has at most 4000 bytes",
    program(4000, 16, columns=LARGE),
    [
        step(),
        do("save", to="s", way="nnx", expect={"check": "state_at_most", "most": 4000}),
    ],
    ["resume"],
)
case(
    "STATE-021",
    "resumes",
    "nnx.replace_by_pure_dict resumes the cursor and the state of stages",
    COUNTED,
    [
        step(4),
        do("save", to="s", way="nnx"),
        step(),
        build(to="b"),
        do("restore", origin="s", on="b", way="nnx"),
        do("cursor", on="b"),
        step(2, on="b"),
    ],
    EXACT,
)
for how, modes in (("deepcopy", [step(), loop()]), ("pickle", [loop(), scan(2)])):
    case(
        "STATE-022",
        how,
        f"a {how} of a pipeline, made before or after it ran, continues on its own",
        chain(12, 4, "keep", "count", seed=3),
        [
            do("copy", how=how, to="before"),
            *modes,
            do("copy", how=how, to="after"),
            do("cursor", on="before"),
            step(2, on="before"),
            step(2, on="after"),
            step(),
        ],
        EXACT,
    )


# Scans.
def fold(length: Any = 3, fn: str = "total", **arguments: Any) -> dict[str, Any]:
    return ask("fold", fn=fn, length=length, **arguments)


CHAIN = chain(12, 4, "keep", "affine(2,1)")
for slug, length in (("negative", -1), ("half", 2.5), ("text", "3"), ("bool", True)):
    case(
        "SCAN-017",
        slug,
        f"scan with length={length!r} is refused and moves nothing",
        CHAIN,
        [step(), do("scan", length=length, expect=error("scan-length")), do("cursor"), step()],
    )
case(
    "SCAN-011",
    "stacked",
    "a scan returns the stacked results of its function",
    CHAIN,
    [fold(), fold(2), step()],
)
case(
    "SCAN-018",
    "named",
    "a scan function that reaches a module not given to it is refused, naming it",
    CHAIN,
    [
        fold(fn="captures", expect={**error("captured"), "says": {"names": ["held"]}}),
        step(),
    ],
)
case(
    "SCAN-019",
    "values",
    "the results of a scan do not depend on unroll and fetch",
    CHAIN,
    [fold(6, fetch=4), fold(6, fetch=1, unroll=2), fold(6), step()],
)
for name in ("unroll", "fetch"):
    case(
        "SCAN-019",
        name,
        f"a scan with {name}=0 or {name}=1.5 is refused",
        CHAIN,
        [fold(expect=error("scan-length")) | {name: count} for count in (0, 1.5)] + [step()],
    )
case(
    "SCAN-012",
    "carry",
    "a scan passes its carry on and returns the last one with the outputs",
    CHAIN,
    [fold(carry=10.0), fold(2, carry=0.0), step()],
)
case(
    "SCAN-012",
    "modules",
    "a scan passes both a carry and a module to its function",
    CHAIN,
    [fold(carry=1.0, modules=["triple"]), step()],
)
case(
    "SCAN-013",
    "state",
    "a module given to two scans counts a call for each of their batches",
    CHAIN,
    [fold(modules=["triple"]), fold(2, modules=["triple"]), step()],
)
case(
    "SCAN-014",
    "once",
    "a repeated scan of the same function and length traces nothing",
    CHAIN,
    [fold(), step(2), fold(), loop(), fold(2), fold(), fold(2)],
)
case(
    "SCAN-015",
    "fresh",
    "24 new scan functions give their own results, and at most 16 stay in memory",
    CHAIN,
    [
        ask("fresh", n=24),
        ask("kept", expect={"check": "at_most", "most": 16}),
    ],
)
LINEAR = chain(8, 4, "keep", "affine(2,1)", "affine(3,-1)")
case(
    "SCAN-016",
    "nnx",
    "gradients of scans reach the parameters of NNX stages",
    LINEAR,
    [step(), do("grad", node="n0", length=3), do("grad", node="n1", length=1), do("cursor")],
)
case(
    "SCAN-016",
    "equinox",
    "gradients of a scan and of a step reach the parameters of an Equinox stage",
    chain(8, 4, "keep", "affine(2,1)", options={"kinds": {"n0": "equinox"}}),
    [do("grad", node="n0", length=2), do("grad", node="n0")],
)

# Errors.
for slug, code, class_, bad, details in (
    (
        "cycle",
        "cycle",
        "CycleError",
        program(4, 2, nodes={"a": "add", "b": "add"}, edges={"a": ["b"], "b": ["a"]}, sink="b"),
        {},
    ),
    (
        "sink",
        "unknown-sink",
        "UnknownSinkError",
        program(4, 2, nodes={"a": "add"}, edges={"a": []}, sink="z"),
        {"name": "z"},
    ),
    (
        "predecessor",
        "unknown-predecessor",
        "UnknownPredecessorError",
        program(4, 2, nodes={"a": "add"}, edges={"a": ["q"]}, sink="a"),
        {"node": "a", "name": "q"},
    ),
    ("size", "batch-size", "BatchSizeError", program(4, 0), {}),
):
    case(
        "ERR-022",
        slug,
        f"the error {code} is a ValueError of class {class_}",
        bad,
        [build(expect=error(code, **{"class": class_, "is_value_error": True, **details}))],
    )
wrong(
    "ERR-023",
    "size",
    "the error of batch_size=-7 says what came and what is allowed",
    program(4, -7),
    "batch-size",
    text=["-7", "1"],
)
wrong(
    "ERR-023",
    "sink",
    "the error of an unknown sink names it and the nodes there are",
    program(4, 2, nodes={"alpha": "add"}, edges={"alpha": []}, sink="omega"),
    "unknown-sink",
    text=["omega", "alpha", "sink"],
)
wrong(
    "ERR-023",
    "drop",
    "the error of drop with too few records gives both numbers and mentions keep",
    program(4, 9, "drop"),
    "last-batch",
    text=["9", "4", "keep"],
)
wrong(
    "ERR-024",
    "both",
    "`stages` given together with `nodes`, `edges` and `sink` are refused",
    program(
        4,
        2,
        nodes={"a": "add"},
        edges={"a": []},
        sink="a",
        options={"chain": ["function:double=affine(2,0)"], "graph_too": True},
    ),
    "stages-and-nodes",
)
case(
    "ERR-025",
    "built",
    "a stage that fails at construction is named, with its predecessors and cause",
    program(4, 2, nodes={"a": "add", "b": "fails"}, edges={"a": [], "b": ["a"]}, sink="b"),
    [
        build(
            expect={
                **error("stage", node="b", cause="ZeroDivisionError"),
                "says": {"predecessors": ["a"], "text": ["b", "a"]},
            }
        )
    ],
)
case(
    "ERR-025",
    "run",
    "a stage that fails at run time is named, with its predecessors",
    chain(8, 4, "keep", "affine(1,0)", "fails-at(5)"),
    [step(), step(expect={**error("stage", node="n1"), "says": {"predecessors": ["n0"]}})],
)
for what, returned in (
    ("none", "None"),
    ("array", "an array"),
    ("ragged", "fields with different numbers of rows"),
    ("number", "a number as a field"),
):
    wrong(
        "ERR-026",
        what,
        f"a stage that returns {returned} is refused",
        chain(4, 2, "keep", f"returns({what})"),
        "stage",
        node=["n0"],
    )
wrong(
    "ERR-027",
    "both",
    "a stage that declares both `key` and `keys` is refused",
    chain(4, 2, "keep", "both-keys", seed=1),
    "stage",
)
wrong(
    "ERR-032",
    "held",
    "a function stage that reaches an NNX object other than its arguments is refused",
    chain(4, 2, "keep", "captures"),
    "stage",
)
wrong(
    "ERR-036",
    "held",
    "a stage that holds a pipeline is refused",
    chain(4, 2, "keep", "pipeline"),
    "stage",
)
for what, how in (("int", "of integers"), ("short", "of one row for a batch of two")):
    wrong(
        "ERR-028",
        what,
        f"a sink that returns a mask {how} is refused",
        chain(5, 2, "pad", f"mask({what})"),
        "stage",
        node=["n0"],
    )
wrong(
    "ERR-033",
    "data",
    "a dict of arrays in place of a source is refused",
    over("none", 4, 2),
    "source-type",
)
wrong(
    "ERR-030",
    "keys",
    "a stage that declares `keys` is refused without rngs",
    chain(4, 2, "keep", "keys"),
    "rngs",
)
wrong(
    "ERR-030",
    "shuffle",
    "a shuffled source is refused without rngs",
    program(4, 2, seed=1, options={"rngs": {}}),
    "rngs",
)
