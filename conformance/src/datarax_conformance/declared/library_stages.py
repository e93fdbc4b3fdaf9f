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
    "the mask has another name, the data may have its own",
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
    "counted from the first row of the batch",
    chain(10, 4, "keep", "key", seed=11),
    [loop(), step(2)],
    EXACT,
)
RNGS = {"default": 1, "shuffle": 3, "noise": 5}
NEAREST = chain(4, 4, "keep", "element-keys", seed=1, options={"rngs": {"default": 1}})
case(
    "KEYS-010",
    "operator",
    "an operator's own, or the pipeline's, by the name of the stream",
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
    "a source's own, or the pipeline's, from the stream `shuffle`",
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
    "no counter has moved",
    chain(8, 4, "keep", "keys", seed=1, options={"rngs": RNGS}),
    [step(2), ask("counters"), loop(), ask("counters")],
    EXACT,
)
case(
    "KEYS-012",
    "words",
    "the first two words of another generator's key",
    program(10, 4, seed=1, options={"rngs": {"default": [1, 2, 3, 4]}}),
    [loop()],
    EXACT,
)
DRAWS = chain(10, 4, "keep", "draws")
case(
    "KEYS-013",
    "modes",
    "once for each batch, in all modes",
    DRAWS,
    [step(2), loop(), scan(2), do("jit_step", n=2), step()],
)
case(
    "KEYS-014",
    "names",
    "functions, classes, operators, and those that are taken",
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
    "keys are counted from these names",
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
    "topological, ties as declared",
    program(4, 2, nodes=DIAMOND, edges=READS, sink="e"),
    [ask("names"), step()],
)
case(
    "DAG-014",
    "stream",
    "the same stream",
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
    "and the same compiled program",
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
    "an Equinox module, a function and an NNX module in one graph",
    chain(8, 4, "keep", "affine(2,1)", "affine(3,0)", "affine(1,5)", options={"kinds": KINDS}),
    [loop(), scan(2), step()],
)
case(
    "DAG-015",
    "alone",
    "each alone",
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
    "predecessors by place, keys by name",
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
    "in every mode",
    chain(12, 4, "keep", "affine(2,1)", options={"override": True}),
    [step(2), loop(), scan(3)],
)
case(
    "DAG-017",
    "pad",
    "under pad",
    chain(10, 4, "pad", "affine(2,1)", options={"override": True}),
    [step(2), loop(), scan(3)],
)
case(
    "DAG-018",
    "specs",
    "what each node hands out, before anything is consumed",
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
    "stages begin at nothing, also after a replacement",
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
    "two stages that disagree on an axis",
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
    "each row on its own, without a key",
    chain(6, 3, "keep", "element"),
    [loop()],
)
case(
    "DAG-021",
    "keys",
    "with the key of the record",
    chain(6, 3, "keep", "element-keys", seed=4),
    [loop(), step(2)],
    EXACT,
)
case(
    "DAG-022",
    "value",
    "another element; the first is as it was",
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
for how, words in (
    ("print", ["first", "second", "both", "first, second", "float32[3]"]),
    ("html", ["first", "second", "both", "first, second", "float32[3]"]),
    ("mermaid", ["first", "second", "both", "float32[3]"]),
):
    case(
        "DAG-023",
        how,
        f"as {how}",
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
    "JSON in the form of the table, and short",
    program(4000, 16, seed=2**32 - 1, columns=LARGE),
    [step(3), do("save", to="s", expect={"all": [FORM, {"check": "state_at_most", "most": 1023}]})],
    ["resume"],
)
COUNTED = chain(10, 4, "keep", "count", seed=3)
for form in ("dict", "text", "bytes"):
    case(
        "STATE-017",
        form,
        f"as {form}",
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
    "which field, and both values",
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
        f"{'.'.join(path)} is {value!r}",
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
    "a state of many records is as short as one of few",
    program(4000, 16, columns=LARGE),
    [step(), do("save", to="s", expect={"check": "state_at_most", "most": 1023})],
    ["resume"],
)
case(
    "STATE-020",
    "checkpoint",
    "a checkpoint of the NNX way too",
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
    "the place and the stages",
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
        f"a {how}, before and after any mode ran",
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
        f"a length of {length!r}",
        CHAIN,
        [step(), do("scan", length=length, expect=error("scan-length")), do("cursor"), step()],
    )
case("SCAN-011", "stacked", "its results, stacked", CHAIN, [fold(), fold(2), step()])
case(
    "SCAN-018",
    "named",
    "a module that it was not given",
    CHAIN,
    [
        fold(fn="captures", expect={**error("captured"), "says": {"names": ["held"]}}),
        step(),
    ],
)
case(
    "SCAN-019",
    "values",
    "the same results, however many batches at a time",
    CHAIN,
    [fold(6, fetch=4), fold(6, fetch=1, unroll=2), fold(6), step()],
)
for name in ("unroll", "fetch"):
    case(
        "SCAN-019",
        name,
        f"no batch, and half of one, for {name}",
        CHAIN,
        [fold(expect=error("scan-length")) | {name: count} for count in (0, 1.5)] + [step()],
    )
case("SCAN-012", "carry", "the sum so far", CHAIN, [fold(carry=10.0), fold(2, carry=0.0), step()])
case(
    "SCAN-012",
    "modules",
    "a carry and a module",
    CHAIN,
    [fold(carry=1.0, modules=["triple"]), step()],
)
case(
    "SCAN-013",
    "state",
    "a module has counted every call",
    CHAIN,
    [fold(modules=["triple"]), fold(2, modules=["triple"]), step()],
)
case(
    "SCAN-014",
    "once",
    "the second scan traces nothing",
    CHAIN,
    [fold(), step(2), fold(), loop(), fold(2), fold(), fold(2)],
)
case(
    "SCAN-015",
    "fresh",
    "each gives its own results",
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
    "as through a step",
    LINEAR,
    [step(), do("grad", node="n0", length=3), do("grad", node="n1", length=1), do("cursor")],
)
case(
    "SCAN-016",
    "equinox",
    "also of an Equinox module",
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
        f"{class_}, a ValueError",
        bad,
        [build(expect=error(code, **{"class": class_, "is_value_error": True, **details}))],
    )
wrong("ERR-023", "size", "what came, and what may", program(4, -7), "batch-size", text=["-7", "1"])
wrong(
    "ERR-023",
    "sink",
    "what came, and what there is",
    program(4, 2, nodes={"alpha": "add"}, edges={"alpha": []}, sink="omega"),
    "unknown-sink",
    text=["omega", "alpha", "sink"],
)
wrong(
    "ERR-023",
    "drop",
    "what came, and what would do",
    program(4, 9, "drop"),
    "last-batch",
    text=["9", "4", "keep"],
)
wrong(
    "ERR-024",
    "both",
    "a chain and a graph",
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
    "at construction: node, predecessors, cause",
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
    "at run time",
    chain(8, 4, "keep", "affine(1,0)", "fails-at(5)"),
    [step(), step(expect={**error("stage", node="n1"), "says": {"predecessors": ["n0"]}})],
)
for what in ("none", "array", "ragged", "number"):
    wrong(
        "ERR-026",
        what,
        f"a stage that returns {what}",
        chain(4, 2, "keep", f"returns({what})"),
        "stage",
        node=["n0"],
    )
wrong("ERR-027", "both", "both at once", chain(4, 2, "keep", "both-keys", seed=1), "stage")
wrong("ERR-032", "held", "a module that is held", chain(4, 2, "keep", "captures"), "stage")
wrong("ERR-036", "held", "held by a stage", chain(4, 2, "keep", "pipeline"), "stage")
for what in ("int", "short"):
    wrong(
        "ERR-028",
        what,
        f"a mask that is {what}",
        chain(5, 2, "pad", f"mask({what})"),
        "stage",
        node=["n0"],
    )
wrong("ERR-033", "data", "the bare arrays", over("none", 4, 2), "source-type")
wrong("ERR-030", "keys", "keys without rngs", chain(4, 2, "keep", "keys"), "rngs")
wrong(
    "ERR-030",
    "shuffle",
    "a shuffled source without rngs",
    program(4, 2, seed=1, options={"rngs": {}}),
    "rngs",
)
