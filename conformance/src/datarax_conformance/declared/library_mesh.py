"""Profile jax: batches that are split over the devices of a mesh, and jobs of several processes."""

from typing import Any

from ._declare import Table, build, chain, do, error, loop, program, step

table = Table()
case = table.case


def split(parts: int | str, *arguments: Any, **more: Any) -> dict[str, Any]:
    """A chain, or a program without stages, whose batches are split into `parts` parts."""
    make = chain if len(arguments) > 3 else program
    return make(*arguments, options={"mesh": parts}, **more)


def rows(how: str, **arguments: Any) -> dict[str, Any]:
    return do("ask", what="rows", how=how, **arguments)


case(
    "MESH-001",
    "modes",
    "splitting over 4 devices leaves records, keys and state of stages unchanged",
    split(4, 24, 8, "keep", "keys", "count", seed=3),
    [loop(), step(2), do("scan", length=2), do("cursor")],
    ["shuffle.exact"],
)
case(
    "MESH-001",
    "masks",
    "under pad, splitting over 2 devices leaves batches and masks unchanged",
    split(2, 10, 4, "pad", "affine(2,1)"),
    [loop(), step(), do("scan", length=3)],
)
case(
    "MESH-002",
    "parts",
    "each of 4 devices holds a quarter of the rows, one quarter after the other",
    split(4, 16, 8),
    [rows("step"), rows("for"), rows("for")],
)
case(
    "MESH-002",
    "short",
    "a last batch of 6 rows, which 4 devices cannot share, lies whole on each",
    split(4, 14, 8),
    [rows("for"), rows("for"), rows("step")],
)
case(
    "MESH-003",
    "job",
    "each of two processes reads only the records of its own devices",
    split(4, 24, 8),
    [do("ask", what="reads", processes=2)],
)
for what in ("seed", "length"):
    case(
        "MESH-006",
        what,
        f"processes of a job whose pipelines differ in {what} are refused",
        split(4, 24, 8),
        [do("ask", what="differ", of=what)],
    )
for name, parts, what in (
    ("odd", 3, "a sharding that splits 8 rows into 3 parts is refused"),
    ("columns", "columns", "a sharding that splits axis 1 is refused"),
    ("explicit", "explicit", "a sharding over explicit axes is refused"),
    ("word", "word", "the name of a mesh axis in place of a sharding is refused"),
):
    case("MESH-004", name, what, split(parts, 16, 8), [build(expect=error("sharding"))])
case(
    "MESH-005",
    "fewer",
    "a state taken on 4 devices resumes on 2, and without a sharding",
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
