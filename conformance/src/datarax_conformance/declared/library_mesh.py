"""Profile jax: batches that are split over the devices of a mesh, and jobs of several processes."""

from typing import Any

from ._declare import Table, build, chain, do, error, loop, program, step

table = Table()
case = table.case


def split(parts: int | str, *arguments: Any, **more: Any) -> dict[str, Any]:
    """A chain, or a program without stages, whose batches are split into so many parts."""
    make = chain if len(arguments) > 3 else program
    return make(*arguments, options={"mesh": parts}, **more)


def rows(how: str, **arguments: Any) -> dict[str, Any]:
    return do("ask", what="rows", how=how, **arguments)


case(
    "MESH-001",
    "modes",
    "records, order, keys and state of stages",
    split(4, 24, 8, "keep", "keys", "count", seed=3),
    [loop(), step(2), do("scan", length=2), do("cursor")],
    ["shuffle.exact"],
)
case(
    "MESH-001",
    "masks",
    "masks lie with their rows",
    split(2, 10, 4, "pad", "affine(2,1)"),
    [loop(), step(), do("scan", length=3)],
)
case(
    "MESH-002",
    "parts",
    "one part after the other",
    split(4, 16, 8),
    [rows("step"), rows("for"), rows("for")],
)
case(
    "MESH-002",
    "short",
    "six rows are not four parts",
    split(4, 14, 8),
    [rows("for"), rows("for"), rows("step")],
)
case(
    "MESH-003",
    "job",
    "two processes, a half each",
    split(4, 24, 8),
    [do("ask", what="reads", processes=2)],
)
for what in ("seed", "length"):
    case(
        "MESH-006",
        what,
        f"another {what} in each process",
        split(4, 24, 8),
        [do("ask", what="differ", of=what)],
    )
for name, parts, what in (
    ("odd", 3, "eight rows are not three parts"),
    ("columns", "columns", "the columns are not to be split"),
    ("explicit", "explicit", "axes that are explicit"),
    ("word", "word", "the name of an axis alone"),
):
    case("MESH-004", name, what, split(parts, 16, 8), [build(expect=error("sharding"))])
case(
    "MESH-005",
    "fewer",
    "on with fewer devices, and with none told",
    split(4, 20, 4, "keep", "count", seed=1),
    [
        step(2),
        do("save", to="s"),
        build(to="b", options={"mesh": 2}),
        do("restore", origin="s", on="b"),
        step(2, on="b"),
        build(to="c", options={"mask_name": "mask"}),
        do("restore", origin="s", on="c"),
        loop(on="c"),
    ],
    ["shuffle.exact"],
)
