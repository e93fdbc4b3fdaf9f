"""Profile jax: the sources of the library, and the orders that only it has."""

from typing import Any

from ._declare import (
    Script,
    Table,
    build,
    chain,
    do,
    error,
    loop,
    other_order,
    permutation,
    program,
    same_rows,
    scan,
    step,
)

table = Table()
case = table.case
EXACT = ["shuffle.exact"]


def over(form: str, count: int, size: int, policy: str = "keep", **more: Any) -> dict[str, Any]:
    """A program over a source of that form; `source` has further options of the source."""
    source = {"form": form, **more.pop("source", {})}
    options = {"source": source, **more.pop("options", {})}
    return program(count, size, policy, options=options, **more)


def ask(what: str, **arguments: Any) -> dict[str, Any]:
    return do("ask", what=what, **arguments)


def at_least(**least: float) -> dict[str, Any]:
    return {"check": "at_least", "least": least}


MODES: Script = [loop(), step(2), build(to="c"), scan(3, on="c"), loop(on="c")]

# Sources that users write, and data in memory.
case(
    "SRC-012",
    "all",
    "a source with only a length and `gather` works in for, step and scan",
    over("gather", 10, 4),
    [*MODES],
)
case(
    "SRC-012",
    "shuffled",
    "a source with only a length and `gather` is shuffled by the pipeline",
    over("gather", 10, 4, "pad", seed=5),
    [*MODES],
    EXACT,
)
case(
    "SRC-013",
    "called",
    "`get_batch_at` is called with the offset within the epoch and the epoch's key",
    over("random-access", 10, 4, seed=5),
    [loop(), step(3), do("seek", epoch=7, offset=8), step()],
    EXACT,
)
case(
    "SRC-013",
    "scan",
    "a scan across epochs calls `get_batch_at` with the offset and key of each epoch",
    over("random-access", 6, 4, seed=1),
    [scan(5), do("cursor")],
    EXACT,
)
case(
    "SRC-014",
    "on",
    "a source without a length is read as one endless epoch in step, for and scan",
    over("endless", 3, 4, seed=5),
    [step(2), loop(take=3), do("cursor"), scan(2)],
    EXACT,
)
case(
    "SRC-014",
    "length",
    "len over a source without a length is an error",
    over("endless", 3, 4, seed=5),
    [do("len", expect=error("*")), step()],
    EXACT,
)
READ = over("memory", 10, 4, seed=5)
case(
    "SRC-015",
    "places",
    "`get_batch_at` returns the rows at any position of the stream of a key",
    READ,
    [ask("read", start=start, n=n, seed=9) for start, n in ((0, 4), (27, 4))],
    EXACT,
)
case(
    "SRC-015",
    "stored",
    "`get_batch_at` of an unshuffled source returns the stored order despite the key",
    over("memory", 10, 4, source={"shuffle": False}),
    [ask("read", start=8, n=5, seed=9)],
)
case(
    "SRC-016",
    "chunks",
    "consecutive chunks of `get_batch_at` under one key make up an epoch",
    READ,
    [
        ask("read", start=20, n=5, seed=3),
        ask("read", start=25, n=5, seed=3),
    ],
    EXACT,
)
for form, data in (
    ("dict", "a dict of arrays"),
    ("nested", "a nested dict"),
    ("records", "a list of dicts"),
    ("array", "a bare array, as the field `data`"),
):
    case(
        "SRC-017",
        form,
        f"MemorySource takes {data}",
        over("memory", 5, 2, source={"data": form}),
        [loop()],
    )
case(
    "SRC-018",
    "copied",
    "with copy=True, a write to the user's arrays does not show in later batches",
    over("memory", 6, 2, source={"copy": True}),
    [step(), do("overwrite"), step(3)],
)

# Sources in storage.
case(
    "SRC-019",
    "modes",
    "files give the batches of the same records in memory, in for, step and scan",
    over("storage", 10, 4),
    [*MODES],
)
case(
    "SRC-019",
    "shuffled",
    "files give the batches of the same records in memory, shuffled and padded",
    over("storage", 10, 4, "pad", seed=3),
    [*MODES, do("jit_step", n=2, on="c")],
    EXACT,
)
for how in ("deepcopy", "pickle"):
    case(
        "SRC-020",
        how,
        f"a {how} of a pipeline over files continues where the original stands",
        over("storage", 10, 4, seed=3),
        [step(2), do("copy", how=how, to="b"), step(2), step(2, on="b"), loop(on="b")],
        EXACT,
    )
case(
    "SRC-030",
    "cursor",
    "records that were read ahead do not show in the cursor, or after a seek",
    over("storage", 20, 2, source={"delay": 0.002}),
    [do("iter"), do("next", n=3), do("cursor"), do("seek", epoch=0, offset=15), do("next", n=2)],
)
case(
    "SRC-030",
    "state",
    "records that were read ahead do not show in a saved state",
    over("storage", 20, 2, seed=2),
    [
        do("iter"),
        do("next", n=3),
        do("save", to="s"),
        do("next", n=2, note="rest"),
        build(to="b"),
        do("restore", origin="s", on="b"),
        step(2, on="b"),
    ],
    EXACT,
)
BROKEN = over("storage", 12, 3, source={"unreadable": [7]})
UNREADABLE = {
    **error("read", record=7, stage="source"),
    "says": {"source": [""], "file": [""], "text": ["7"]},
}
case(
    "SRC-031",
    "record",
    "a loop hands out the batches before an unreadable record, then names the record",
    BROKEN,
    [do("iter"), do("next", n=2), do("next", expect=UNREADABLE), do("cursor")],
)
case(
    "SRC-031",
    "step",
    "step names the record that cannot be read and does not move the cursor",
    BROKEN,
    [step(2), step(expect=UNREADABLE), do("cursor")],
)
for damage, file in (("missing", "a missing file"), ("text", "a .npy file that holds text")):
    case(
        "SRC-031",
        damage,
        f"{file} is refused, naming the file",
        over("storage", 6, 2, source={"damage": damage}),
        [build(expect={**error("file"), "says": {"file": ["id.npy"]}})],
    )
case(
    "SRC-032",
    "again",
    "step after a failed read reads again, and succeeds once the record is readable",
    BROKEN,
    [
        step(2),
        step(expect=UNREADABLE),
        step(expect=UNREADABLE),
        do("cursor"),
        ask("mend"),
        step(),
        loop(),
    ],
)
case(
    "SRC-032",
    "scan",
    "a scan that fails to read a record moves nothing and can be repeated",
    BROKEN,
    [step(), scan(3, expect=UNREADABLE), do("cursor"), ask("mend"), scan(3)],
)
case(
    "STEP-012",
    "stages",
    "a batch that cannot be read leaves the cursor and the state of stages unchanged",
    chain(12, 3, "keep", "count", options={"source": {"form": "storage", "unreadable": [4]}}),
    [step(), step(expect=error("read", record=4)), do("cursor"), ask("mend"), step(2)],
)
case(
    "STEP-012",
    "stage",
    "a stage that fails leaves the cursor and the state of stages unchanged",
    chain(12, 3, "keep", "count", "fails-at(7)"),
    [step(2), step(expect=error("stage", node="n1")), do("cursor"), do("seek", epoch=1, offset=0),
     step()],
)  # fmt: skip
MASKING = {"unreadable": [2, 7], "on_error": "mask"}
case(
    "SRC-033",
    "zero",
    'with on_error="mask", unreadable records are zero and False in the mask',
    over("storage", 10, 4, source={**MASKING, "max_errors": 2}),
    [loop(), loop()],
)
case(
    "SRC-033",
    "most",
    'with on_error="mask", more than max_errors unreadable records are an error',
    over("storage", 10, 4, "pad", source={**MASKING, "max_errors": 1}),
    [step(), step(expect=error("read", record=7)), do("cursor")],
)
SEEN = chain(10, 4, "keep", "affine(2,1)", "keys", seed=4, options={"source": {"form": "gather"}})
case(
    "SRC-034",
    "nodes",
    "replay gives every node's values for one record in one epoch",
    SEEN,
    [step(2), ask("replay", record=7, epoch=3), do("cursor"), step()],
    EXACT,
)
case(
    "SRC-034",
    "state",
    "replay does not change the state of a stage",
    chain(10, 4, "keep", "count", options={"source": {"form": "gather"}}),
    [step(), ask("replay", record=2, epoch=0), step()],
)
case(
    "SRC-035",
    "objects",
    "a file of pickled objects is refused",
    over("storage", 4, 2, source={"damage": "pickled"}),
    [build(expect={"any": [error("field-type"), error("file")]})],
)
case(
    "SRC-036",
    "cut",
    "a truncated file is refused",
    over("storage", 40, 4, source={"damage": "cut"}),
    [build(expect=error("file"))],
)
case(
    "SRC-036",
    "grown",
    "a file with bytes appended gives its rows",
    over("storage", 40, 4, source={"damage": "grown"}),
    [build(), loop()],
)
case(
    "SRC-037",
    "extra",
    "the error of a missing package names the extra that installs it",
    over("package", 4, 2, source={"extra": "arrow"}),
    [build(expect={**error("missing-package"), "says": {"text": ["pip install", "[arrow]"]}})],
)
case(
    "SRC-038",
    "waited",
    "stats() counts seconds of waiting for a slow source and of computing",
    over("storage", 12, 2, source={"delay": 0.02}),
    [loop(), ask("stats", expect=at_least(waited=0.02, computed=1e-9))],
)

# Mixtures.
MIX = {"lengths": [9, 6], "weights": [2, 1], "stop": "first"}
MIXED = over("mixture", 15, 3, seed=4, source=MIX)
SHARES = {"check": "shares", "begins": [0, 9], "quotas": [2, 1]}
case(
    "SRC-021",
    "period",
    "every period of a mixture has the exact share of each source",
    MIXED,
    [loop(expect=SHARES)],
)
case(
    "SRC-021",
    "nearest",
    "a mixture with weights 0.7 and 0.3 has 7 and 3 rows in each period",
    over("mixture", 40, 8, seed=4, source={**MIX, "lengths": [30, 10], "weights": [0.7, 0.3]}),
    [loop(expect={"check": "shares", "begins": [0, 30], "quotas": [7, 3]})],
)
UNSHUFFLED = {**MIX, "lengths": [4, 7], "weights": [1, 1]}
case(
    "SRC-022",
    "turns",
    "a mixture reads each source in its own order to its end, across epochs",
    over("mixture", 11, 4, seed=4, source=UNSHUFFLED),
    [step(9, expect={"check": "in_turn", "lengths": [4, 7]})],
)
case(
    "SRC-023",
    "key",
    "a mixture's order is fixed by seed and epoch, and differs with either",
    over("mixture", 30, 6, seed=4, source={**MIX, "lengths": [20, 10]}),
    [
        loop(expect=SHARES | {"begins": [0, 20]}, note="a"),
        build(to="b"),
        loop(on="b", expect=same_rows("a")),
        build(to="c", seed=5),
        loop(on="c", expect=other_order("a")),
        loop(expect=other_order("a")),
    ],
)
case(
    "SRC-023",
    "traced",
    "a mixture gives the same batches in the user's nnx.jit",
    MIXED,
    [step(3, note="a"), build(to="b"), do("jit_step", n=3, on="b", expect=same_rows("a"))],
)
for stop, batches in (("first", 4), ("all", 6)):
    case(
        "SRC-024",
        stop,
        f'with stop="{stop}", an epoch of the mixture has {batches} batches',
        over("mixture", 15, 3, seed=4, source={**MIX, "stop": stop}),
        [
            do("len", expect={"value": batches}),
            loop(expect=SHARES, note="a"),
        ],
    )
case(
    "SRC-025",
    "same",
    "a mixture gives the same rows from sources on host, device or one of each",
    MIXED,
    [
        loop(expect=SHARES, note="a"),
        *[
            action
            for name, hosts in (("b", [0, 1]), ("c", [1]))
            for action in (
                build(to=name, options={"source": {"form": "mixture", **MIX, "hosts": hosts}}),
                loop(on=name, expect=same_rows("a")),
            )
        ],
    ],
)
case(
    "SRC-026",
    "specs",
    "a mixture of sources whose records differ in shape is refused",
    over("mixture", 15, 3, seed=4, source={**MIX, "differ": True}),
    [build(expect={**error("specs"), "says": {"text": ["[3]", "[4]"]}})],
)
case(
    "SRC-026",
    "none",
    "a mixture without a period, or with no period in an epoch, is refused",
    over("mixture", 15, 3, seed=4, source={**MIX, "weights": [1000, 1]}),
    [
        build(expect=error("*")),
        build(options={"source": {"form": "mixture", **MIX, "weights": [20, 1]}},
              expect=error("empty-source")),
    ],
)  # fmt: skip

# Streams.
PASSES = over("iterable", 10, 4)
case(
    "SRC-027",
    "for",
    "a stream without a length is read as one epoch per pass",
    PASSES,
    [loop(), do("cursor"), loop(), step(4)],
)
for policy in ("drop", "pad"):
    case(
        "SRC-027",
        policy,
        f"under {policy}, a stream without a length is read as one epoch per pass",
        over("iterable", 10, 4, policy),
        [loop(), loop(), scan(3)],
    )
case(
    "SRC-027",
    "length",
    "over a stream without a length, len and scan without a length are refused",
    PASSES,
    [do("len", expect=error("*")), scan(None, expect=error("last-batch")), scan(2)],
)
case(
    "SRC-028",
    "skips",
    "a state over a stream resumes at its record, with another batch_size",
    PASSES,
    [
        step(4),
        do("save", to="s"),
        step(2),
        build(to="b", batch_size=3),
        do("restore", origin="s", on="b"),
        step(on="b"),
        loop(on="b"),
    ],
)
WINDOWS = over("iterable", 10, 3, seed=4, source={"window": 4})
case(
    "SRC-039",
    "for",
    "a stream shuffled in windows has each window in the order of the spec",
    WINDOWS,
    [loop(), loop(), step(3)],
    EXACT,
)
for policy in ("drop", "pad"):
    case(
        "SRC-039",
        policy,
        f"under {policy}, a stream shuffled in windows has each window in the order of the spec",
        over("iterable", 10, 3, policy, seed=4, source={"window": 4}),
        [loop(), scan(4)],
        EXACT,
    )
case(
    "SRC-039",
    "keys",
    "over a stream shuffled in windows, keys are those of the records",
    chain(10, 3, "keep", "keys", seed=4, options={"source": {"form": "iterable", "window": 4}}),
    [loop(), loop()],
    EXACT,
)
case(
    "SRC-039",
    "skips",
    "a stream shuffled in windows resumes, and seeks to a place, within a window",
    WINDOWS,
    [
        step(2),
        do("save", to="s"),
        build(to="b", batch_size=4),
        do("restore", origin="s", on="b"),
        step(on="b"),
        loop(on="b"),
        do("seek", epoch=2, offset=7),
        step(2),
    ],
    EXACT,
)
case(
    "SRC-029",
    "jit",
    "step over a stream in the user's nnx.jit is refused, moving nothing",
    PASSES,
    [step(), do("jit_step", n=1, expect=error("random-access")), step()],
)
case(
    "SRC-029",
    "nothing",
    "under drop, a pass of a stream without a whole batch is refused",
    over("iterable", 3, 4, "drop"),
    [build(), loop(expect=error("empty-source"))],
)

# Orders.
case(
    "SHUF-014",
    "far",
    "orders of 2**40 records use 64-bit words",
    program(4, 2),
    [
        ask("order", length=2**40, seed=seed, epoch=1, offsets=[0, 1, 2**39], how="eager")
        for seed in (42, 7)
    ],
    EXACT,
)
case(
    "SHUF-014",
    "edge",
    "orders of 2**32 records use 64-bit words, those of 2**32 - 1 do not",
    program(4, 2),
    [
        ask("order", length=length, seed=9, epoch=0, offsets=[0, 1, 2**31], how="eager")
        for length in (2**32 - 1, 2**32)
    ],
    EXACT,
)
case(
    "SHUF-015",
    "back",
    "the inverse of an order gives the offset of each record",
    program(4, 2),
    [
        ask("places", length=n, seed=3, epoch=epoch, records=records, how="eager")
        for n, epoch, records in (
            (10, 0, list(range(10))),
            (1000, 3, [0, 1, 500, 999]),
            (65537, 1, [65536, 65535]),
        )
    ],
    EXACT,
)
for count in (1, 33, 100):
    case(
        "SHUF-016",
        f"n{count}",
        f"shuffle='permutation' is jax.random.permutation, for a source of length {count}",
        over("memory", count, 32, seed=3, source={"shuffle": "permutation"}),
        [loop(), loop()],
        EXACT,
    )
case(
    "SHUF-017",
    "traced",
    "an order gives the same records eagerly, under jit and under vmap",
    program(4, 2),
    [
        ask("order", length=101, seed=3, epoch=2, offsets=[0, 50, 100], how=how)
        for how in ("eager", "jit", "vmap")
    ],
    EXACT,
)


def blocks(count: int, size: int, window: int) -> dict[str, Any]:
    sizes = {"shuffle": "blocks", "block_size": size, "window": window}
    return over("gather", count, 64, seed=6, source=sizes)


for count, size, window in ((1, 1, 1), (10, 3, 2), (40, 7, 4), (32, 8, 2), (33, 8, 100)):
    name = f"{count}-{size}-{window}"
    case(
        "SHUF-018",
        name,
        f"blocks of {size}, windows of {window}: an epoch of length {count} has each record once",
        blocks(count, size, window),
        [loop(expect=permutation(count))],
    )
case(
    "SHUF-019",
    "records",
    "33 records in blocks of 7, the last one short, have the order of the spec",
    blocks(33, 7, 2),
    [loop(), loop()],
    EXACT,
)
case(
    "SHUF-019",
    "even",
    "32 records in blocks of 4, all of one size, have the order of the spec",
    blocks(32, 4, 2),
    [loop()],
    EXACT,
)
case(
    "SHUF-020",
    "few",
    "the rows of a window of 3 blocks come from at most 4 blocks",
    blocks(64, 4, 3),
    [loop(expect={"check": "few_blocks", "size": 4, "window": 3})],
)
case(
    "KEYS-015",
    "offset",
    "over a source with only `get_batch_at`, keys take the offset, not the record",
    over("random-access", 6, 4, seed=5, nodes={"n0": "keys"}, edges={"n0": []}, sink="n0"),
    [loop(), step(2)],
    EXACT,
)
