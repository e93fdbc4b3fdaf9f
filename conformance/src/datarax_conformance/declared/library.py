"""Profile jax, cases that need no options in a program.

The cursor, parameters, compilation, gradients, keys, threads.
"""

from ._declare import Table, build, chain, do, error, loop, program, same_rows, scan, step

table = Table()
case = table.case

CURSOR = do("cursor")


def seek(epoch: int, offset: int, **arguments: object) -> dict:
    return do("seek", epoch=epoch, offset=offset, **arguments)


case(
    "STEP-010",
    "pair",
    "the cursor is the epoch and offset of the next record",
    program(10, 4),
    [CURSOR, step(), CURSOR, step(2), CURSOR, loop(), CURSOR],
)
case(
    "STEP-010",
    "normal",
    "after the last record of an epoch, the cursor is the start of the next epoch",
    program(4, 2),
    [step(2), CURSOR, loop(), CURSOR],
)
case(
    "STEP-011",
    "batch",
    "under drop, the cursor after the last whole batch is the next epoch's start",
    program(10, 4, "drop"),
    [step(2), CURSOR, loop(), CURSOR],
)
case(
    "STEP-011",
    "seek",
    "under drop, seek past the last whole batch continues with the next epoch",
    program(10, 4, "drop"),
    [seek(3, 7), step(), CURSOR, seek(3, 6), step(), CURSOR, seek(3, 8), loop()],
)
case(
    "STEP-011",
    "state",
    "under drop, a state past the last whole batch continues with the next epoch",
    program(10, 4),
    [
        step(2),
        do("save", to="s"),
        build(to="b", last_batch="drop"),
        do("restore", origin="s", on="b"),
        step(on="b"),
        do("cursor", on="b"),
    ],
)
case(
    "STEP-013",
    "there",
    "step and a loop after seek start at the given epoch and offset",
    program(10, 4),
    [seek(2, 5), step(), CURSOR, seek(0, 9), loop()],
)
case(
    "STEP-013",
    "far",
    "step after seek to epoch 2**32 - 1, and then to epoch 7, has that epoch's order",
    program(9, 3, seed=1),
    [seek(2**32 - 1, 3), step(), seek(7, 0), step()],
    ["shuffle.exact"],
)
case(
    "STEP-014",
    "start",
    "reset takes the cursor back to the start of epoch 0",
    program(10, 4),
    [step(3), do("reset"), CURSOR, loop()],
)
case(
    "STEP-015",
    "jit",
    "step in the user's nnx.jit gives eager values, cursor and state of stages",
    chain(10, 4, "keep", "affine(2,1)", "count"),
    [do("jit_step", n=3), CURSOR, step()],
)
case(
    "STEP-015",
    "epochs",
    "steps in the user's nnx.jit run through several shuffled epochs",
    program(6, 4, seed=3),
    [do("jit_step", n=5), CURSOR, step()],
    ["shuffle.exact"],
)
case(
    "STEP-015",
    "pad",
    "under pad, step in the user's nnx.jit gives eager values",
    program(5, 3, "pad"),
    [do("jit_step", n=3), loop()],
)
case(
    "STEP-016",
    "affine",
    "the gradient of a step reaches the parameters of its one stage",
    chain(8, 4, "keep", "affine(2,1)"),
    [do("grad", node="n0")],
)
case(
    "STEP-016",
    "chain",
    "the gradient of a step reaches the parameters of both stages of a chain",
    chain(8, 4, "keep", "affine(2,1)", "affine(3,-1)"),
    [step(), do("grad", node="n0"), do("grad", node="n1"), step()],
)
AFFINE = chain(12, 2, "keep", "affine(2,1)")
case(
    "STEP-017",
    "step",
    "a changed parameter of a stage shows in the next step",
    AFFINE,
    [step(), do("change", node="n0", op="affine(5,0)"), step()],
)
case(
    "STEP-017",
    "for",
    "a parameter of a stage changed within a loop shows in its next batch",
    AFFINE,
    [
        do("iter"),
        do("next"),
        do("change", node="n0", op="affine(5,0)"),
        do("next"),
        do("change", node="n0", op="affine(1,1)"),
        do("next"),
    ],
)
case(
    "STEP-017",
    "scan",
    "a changed parameter of a stage shows in the next scan",
    AFFINE,
    [scan(1), do("change", node="n0", op="affine(5,0)"), scan(1)],
)
for policy, count, size in (
    ("keep", 10, 4),
    ("drop", 10, 4),
    ("pad", 10, 4),
    ("keep", 3, 5),
    ("keep", 8, 4),
):
    case(
        "ITER-012",
        f"{policy}-{count}-{size}",
        f"under {policy}, len is the number of batches of {size} in an epoch of {count} records",
        program(count, size, policy),
        [do("len"), step(), do("len")],
    )
case(
    "ITER-013",
    "four",
    "four threads that share an iterator get each batch exactly once",
    program(400, 2),
    [do("threads", n=4)],
)
case(
    "ITER-013",
    "short",
    "three threads that share an iterator get each batch once, the short one too",
    program(101, 2),
    [do("threads", n=3), loop(take=1)],
)
KEYS = chain(6, 3, "keep", "keys", seed=11)
EXACT = ["shuffle.exact"]
case(
    "KEYS-006",
    "keys",
    "a stage that declares `keys` gets the key of each record in two epochs",
    KEYS,
    [loop(), loop()],
    EXACT,
)
case(
    "KEYS-008",
    "modes",
    "a record has the same key in for, step and scan",
    KEYS,
    [loop(), build(to="s"), step(2, on="s"), build(to="c"), do("scan", length=2, on="c")],
    EXACT,
)
case(
    "KEYS-008",
    "sizes",
    "a record has the same key with batch sizes 3 and 4",
    KEYS,
    [loop(note="a"), build(to="b", batch_size=4), loop(on="b", expect=same_rows("a"))],
    EXACT,
)
case(
    "KEYS-009",
    "names",
    "a node with another name gets other keys",
    KEYS,
    [loop(), build(to="b", nodes={"m": "keys"}, edges={"m": []}, sink="m"), loop(on="b")],
    EXACT,
)
case(
    "KEYS-009",
    "more",
    "another node in the graph leaves the keys of a node unchanged",
    KEYS,
    [
        loop(note="a"),
        build(to="b", nodes={"n": "add", "n0": "keys"}, edges={"n": [], "n0": ["n"]}, sink="n0"),
        loop(on="b", expect=same_rows("a")),
    ],
    EXACT,
)
case(
    "DAG-013",
    "replaced",
    "assigning to `pipeline.nodes` replaces a stage from the next batch on",
    chain(12, 2, "keep", "affine(2,1)", "affine(1,1)"),
    [
        step(),
        do("replace", node="n0", op="add"),
        step(),
        do("replace", node="n1", op="affine(0,7)"),
        loop(take=1),
    ],
)
for slug, epoch, offset in (
    ("offset", 0, 10),
    ("negative", 0, -1),
    ("epoch", 2**32, 0),
    ("before", -1, 0),
):
    case(
        "ERR-029",
        slug,
        f"seek to epoch {epoch} and offset {offset} is refused and moves nothing",
        program(10, 4),
        [step(), seek(epoch, offset, expect=error("seek")), CURSOR, step()],
    )
