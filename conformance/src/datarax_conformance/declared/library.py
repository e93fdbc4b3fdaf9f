"""Profile jax, as far as a program can say it.

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
    "epoch and offset of the next record",
    program(10, 4),
    [CURSOR, step(), CURSOR, step(2), CURSOR, loop(), CURSOR],
)
case(
    "STEP-010",
    "normal",
    "the end of an epoch is the start of the next",
    program(4, 2),
    [step(2), CURSOR, loop(), CURSOR],
)
case(
    "STEP-011", "batch", "after a batch", program(10, 4, "drop"), [step(2), CURSOR, loop(), CURSOR]
)
case(
    "STEP-011",
    "seek",
    "after seek",
    program(10, 4, "drop"),
    [seek(3, 7), step(), CURSOR, seek(3, 6), step(), CURSOR, seek(3, 8), loop()],
)
case(
    "STEP-011",
    "state",
    "after set_state",
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
    "the batch at that place",
    program(10, 4),
    [seek(2, 5), step(), CURSOR, seek(0, 9), loop()],
)
case(
    "STEP-013",
    "far",
    "the last epoch and the last record",
    program(9, 3, seed=1),
    [seek(2**32 - 1, 3), step(), seek(7, 0), step()],
    ["shuffle.exact"],
)
case(
    "STEP-014", "start", "back to the start", program(10, 4), [step(3), do("reset"), CURSOR, loop()]
)
case(
    "STEP-015",
    "jit",
    "a step inside the user's jit",
    chain(10, 4, "keep", "affine(2,1)", "count"),
    [do("jit_step", n=3), CURSOR, step()],
)
case(
    "STEP-015",
    "epochs",
    "several, from one shuffled epoch into the next",
    program(6, 4, seed=3),
    [do("jit_step", n=5), CURSOR, step()],
    ["shuffle.exact"],
)
case("STEP-015", "pad", "under pad", program(5, 3, "pad"), [do("jit_step", n=3), loop()])
case(
    "STEP-016",
    "affine",
    "the gradient of one stage",
    chain(8, 4, "keep", "affine(2,1)"),
    [do("grad", node="n0")],
)
case(
    "STEP-016",
    "chain",
    "through the stages after it",
    chain(8, 4, "keep", "affine(2,1)", "affine(3,-1)"),
    [step(), do("grad", node="n0"), do("grad", node="n1"), step()],
)
AFFINE = chain(12, 2, "keep", "affine(2,1)")
case(
    "STEP-017",
    "step",
    "a change shows in the next step",
    AFFINE,
    [step(), do("change", node="n0", op="affine(5,0)"), step()],
)
case(
    "STEP-017",
    "for",
    "within a loop",
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
    "and in the next scan",
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
        f"{count} records by {size} under {policy}",
        program(count, size, policy),
        [do("len"), step(), do("len")],
    )
case("ITER-013", "four", "four threads at one iterator", program(400, 2), [do("threads", n=4)])
case(
    "ITER-013",
    "short",
    "down to the short batch",
    program(101, 2),
    [do("threads", n=3), loop(take=1)],
)
KEYS = chain(6, 3, "keep", "keys", seed=11)
EXACT = ["shuffle.exact"]
case("KEYS-006", "keys", "a key for each record", KEYS, [loop(), loop()], EXACT)
case(
    "KEYS-008",
    "modes",
    "the same keys in all modes",
    KEYS,
    [loop(), build(to="s"), step(2, on="s"), build(to="c"), do("scan", length=2, on="c")],
    EXACT,
)
case(
    "KEYS-008",
    "sizes",
    "and for all batch sizes",
    KEYS,
    [loop(note="a"), build(to="b", batch_size=4), loop(on="b", expect=same_rows("a"))],
    EXACT,
)
case(
    "KEYS-009",
    "names",
    "another name, other keys",
    KEYS,
    [loop(), build(to="b", nodes={"m": "keys"}, edges={"m": []}, sink="m"), loop(on="b")],
    EXACT,
)
case(
    "KEYS-009",
    "more",
    "a further node leaves them alone",
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
    "another operation from the next batch on",
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
        f"seek({epoch}, {offset})",
        program(10, 4),
        [step(), seek(epoch, offset, expect=error("seek")), CURSOR, step()],
    )
