"""Helpers that declare the programs and scripts of cases.

The model fills in the expected values that a declaration leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..arrays import encode
from ..case import Case
from ..requirements import needed_by, requirements

# The profile that each action needs, besides the profile of the requirement.
NEEDED = {
    "step": "step",
    "for": "iter",
    "iter": "iter",
    "next": "iter",
    "threads": "iter",
    "scan": "scan",
    "save": "resume",
}

Script = Sequence[Mapping[str, Any]]


def program(
    count: int,
    batch_size: int,
    last_batch: str = "keep",
    *,
    seed: int | None = None,
    nodes: Mapping[str, str] | None = None,
    edges: Mapping[str, Any] | None = None,
    sink: str | None = None,
    columns: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A program of `count` records with the columns `id` and `x`, or with the given `columns`."""
    if columns is None:
        columns = id_and_x(count)
    return {
        "columns": {
            name: column if isinstance(column, dict) else encode(column)
            for name, column in columns.items()
        },
        "batch_size": batch_size,
        "last_batch": last_batch,
        "seed": seed,
        "nodes": dict(nodes or {}),
        "edges": dict(edges or {}),
        "sink": sink,
        **({"options": dict(options)} if options else {}),
    }


def id_and_x(count: int) -> dict[str, np.ndarray]:
    ids = np.arange(count, dtype=np.int32)
    return {"id": ids, "x": ((ids * 7 + 3) % 23 * 0.25 + 1).astype(np.float32)}


def chain(
    count: int, batch_size: int, last_batch: str = "keep", *ops: str, **more: Any
) -> dict[str, Any]:
    """A program whose nodes n0, n1, … form a chain."""
    names = [f"n{i}" for i in range(len(ops))]
    edges = {name: names[i - 1 : i] if i else [] for i, name in enumerate(names)}
    return program(
        count,
        batch_size,
        last_batch,
        nodes=dict(zip(names, ops, strict=True)),
        edges=edges,
        sink=names[-1],
        **more,
    )


def do(action: str, **arguments: Any) -> dict[str, Any]:
    return {"do": action, **arguments}


def build(**arguments: Any) -> dict[str, Any]:
    return do("build", **arguments)


def step(n: int = 1, **arguments: Any) -> dict[str, Any]:
    return do("step", n=n, **arguments)


def loop(**arguments: Any) -> dict[str, Any]:
    return do("for", **arguments)


def scan(length: int | None, **arguments: Any) -> dict[str, Any]:
    return do("scan", length=length, **arguments)


def permutation(length: int, **sizes: Any) -> dict[str, Any]:
    return {"check": "permutation", "length": length, **sizes}


def same_rows(note: str) -> dict[str, Any]:
    return {"check": "same_rows", "like": note}


def rows_of(program: Mapping[str, Any]) -> dict[str, Any]:
    """A check that each row is one whole record of the program."""
    return {"check": "rows_of", "columns": program["columns"]}


def new_order() -> dict[str, Any]:
    return {"check": "new_order", "like": "*"}


def other_order(note: str) -> dict[str, Any]:
    return {"check": "other_order", "like": note}


def error(code: str, **details: Any) -> dict[str, Any]:
    return {"error": code, "details": details}


def profiles_of(
    names: Sequence[str], program: Mapping[str, Any], script: Script, extra: Sequence[str]
) -> list[str]:
    known = requirements()
    own = [known[name].profile for name in names]
    used = [NEEDED[action["do"]] for action in script if action["do"] in NEEDED]
    used += ["dag"] if program["nodes"] else []
    used += ["shuffle.valid"] if program["seed"] is not None else []
    return list(dict.fromkeys([*own, *sorted(used), *extra]))


def relied_on(names: Sequence[str], program: Mapping[str, Any], script: Script) -> list[str]:
    """The requirements that a script relies on, besides `names`, which it checks."""
    used: list[str] = []
    looped: set[str] = set()
    left: set[str] = set()  # streams left within an epoch, by `break` or after `next`
    streams, read_by = {"main": program}, {}
    acts = {action["do"] for action in script}
    policies = {program["last_batch"], *(action.get("last_batch") for action in script)}
    for action in script:
        if action["do"] == "build":
            streams[action.get("to", "main")] = {**program, **action}
            left.discard(action.get("to", "main"))
        if action["do"] == "restore":
            left.discard(action.get("on", "main"))
        if action["do"] == "iter":
            read_by[action.get("to", "it")] = action.get("on", "main")
        if action["do"] == "next":
            left.add(read_by[action.get("on", "it")])
        if action["do"] == "for":
            stream = action.get("on", "main")
            used += ["ITER-006"] if stream in looped else []
            used += ["ITER-007"] if stream in left else []
            if "take" in action:
                left.add(stream)
            else:
                left.discard(stream)
                looped.add(stream)
                used += ["ITER-002"] if ends_short(streams.get(stream, program)) else []
    for policy, loops, steps in (("drop", "ITER-003", "STEP-005"), ("pad", "ITER-005", "STEP-006")):
        if policy in policies:
            used += [loops] if acts & {"for", "next"} else []
            used += [steps] if acts & {"step", "scan"} else []
    if acts != {"build"}:
        used += ["DAG-001"] if program["nodes"] else []
        edges = [x["edges"] for x in (program, *script) if x.get("edges")]
        named = any("source" in names for one in edges for names in one.values())
        used += ["DAG-003"] if named else []
    used += ["DAG-007"] if "count" in program["nodes"].values() else []
    used += ["SHUF-001"] if program["seed"] is not None else []
    used += ["STATE-001"] if "save" in acts else []
    taken = dict.fromkeys(name for name in used if not {name, *needed_by([name])} & set(names))
    return [name for name in taken if name not in needed_by(names)]


def ends_short(program: Mapping[str, Any]) -> bool:
    """Whether a loop over the program ends with a shorter batch."""
    size, columns = program["batch_size"], program["columns"].values()
    if program["last_batch"] != "keep" or type(size) is not int or size < 1:
        return False
    rows = (column.get("range") or (column["shape"] or [0])[0] for column in columns)
    return max(rows, default=0) % size > 0


class Table:
    """The cases of one chapter, in the order in which they are declared."""

    def __init__(self) -> None:
        self.cases: list[Case] = []

    def case(
        self,
        cites: str,
        slug: str,
        title: str,
        program: Mapping[str, Any],
        script: Script,
        profiles: Sequence[str] = (),
    ) -> None:
        names = cites.split()
        known = requirements()
        first = all(case.requirement != names[0] for case in self.cases)
        own = script[0]["do"] == "build" and "to" not in script[0]
        whole = [*([] if own else [build()]), *script]
        self.cases.append(
            Case(
                id=f"{names[0]}-{slug}",
                title=title,
                cites=[known[name].cite for name in names],
                needs=relied_on(names, program, whole),
                profiles=profiles_of(names, program, whole, profiles),
                basic=first,
                program=program,
                script=whole,
            )
        )
