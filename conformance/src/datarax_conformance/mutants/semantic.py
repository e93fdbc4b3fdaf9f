"""Engines with one fault each; at least one breaks each requirement.

Then variants without a fault: a case that fails one asks for more than the spec does.
"""

from __future__ import annotations

from . import library
from ._mutant import Mutant


def mutant(name: str, breaks: str, *edits: tuple[str, str], drops: str = "") -> Mutant:
    return Mutant(name, breaks.split(), edits, drops.split())


# Parts of the model that several mutants edit.
GATHER = "    return {name: column[records] for name, column in columns.items()}\n"
TAKE = "        batch, self.states, self.cursor = self.next_batch(stay)\n        return batch\n"
RECORDS = "        records = order_of(self.base, epochs, offsets, length)\n"
NEXT = """        if self.stream.cursor.epoch != self.epoch:
            self.epoch = None  # over for good, even if the stream is moved back
            raise StopIteration
        return self.stream.take(stay=True)
"""
STEP = "        return self.take(stay=False)\n"
PROGRAM = "        self.program = program\n"
START = "        program, start, length = self.program, self.cursor, self.length\n"
EPOCH_KEY = '    return fold_in(node_key(base, "source"), epoch)\n'
ORDER = "    return swap_or_not(key, length, offsets, range(ROUNDS))\n"
INPUTS = "        inputs = [made[predecessor] for predecessor in plan.edges[name]]\n"
REFUSED = '            raise Refused("state", field=name, state=there, pipeline=here)\n'
SPECS = "digest({name: [str(c.dtype), *c.shape[1:]] for name, c in columns.items()})"
LOAD = "            self.cursor, self.states = load(self, state)\n"
STEPS = "    batches = [stream.step() for _ in range(length)]\n"
STACK = "    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}\n"


def within(place: str, old: str, new: str, then: str = "") -> tuple[str, str]:
    """An edit that replaces `old` within a part of the model and adds `then` after the part."""
    return place, place.replace(old, new) + then


def gathered(what: str) -> tuple[str, str]:
    return within(GATHER, "column[records]", what)


def salted(salt: str) -> tuple[str, str]:
    """An edit after which the order also depends on `salt`."""
    base = f"None if self.base is None else (self.base[0], (self.base[1] + {salt}) % 2**32)"
    return within(RECORDS, "self.base", base)


def in_one_buffer(place: str) -> tuple[str, str]:
    """An edit that fills one buffer for all batches of the same names, shapes and types."""
    return within(
        place,
        "return",
        "fresh =",
        "    key = str({n: (f.shape, f.dtype) for n, f in fresh.items()})\n"
        "    batch = BUFFERS.setdefault(key, fresh)\n"
        "    for name in batch:\n"
        "        batch[name][...] = fresh[name]\n"
        "    return batch\n\n\n"
        "BUFFERS: dict = {}\n",
    )


def after_scan(what: str) -> tuple[str, str]:
    return STEPS, STEPS + f"    {what}\n"


def generated(body: str) -> tuple[str, str]:
    """An edit that makes iterators generators with this body."""
    lines = "".join(f"        {line}\n" for line in body.splitlines())
    return (
        "        return EpochIterator(self)\n",
        f"        return self.rest_of(self.cursor.epoch)\n\n    def rest_of(self, epoch):\n{lines}",
    )


# Iterators that make the next batch ahead of time; a step discards it.
AHEAD = (
    generated(
        "try:\n"
        "    while self.cursor.epoch == epoch:\n"
        "        batch, self.states, self.cursor = self.ahead or self.next_batch(stay=True)\n"
        "        self.ahead = self.next_batch(stay=True)\n"
        "        yield batch\n"
        "finally:\n"
        "    self.ahead = None"
    ),
    (PROGRAM, PROGRAM + "        self.ahead = None\n"),
    (STEP, "        self.ahead = None\n" + STEP),
)
ANY_ORDER = "shuffle.exact jax"  # not claimed by a mutant with another valid order

MUTANTS = [
    # 10 source
    mutant(
        "a field is lost",
        "SRC-001",
        within(GATHER, "columns.items()", "list(columns.items())[:1]"),
    ),
    mutant(
        "fields of different records",
        "SRC-002",
        gathered('np.asarray(column)[records if name == "id" else records[::-1]]'),
    ),
    mutant(
        "float32 becomes float64",
        "SRC-003",
        gathered(
            "np.asarray(column)[records].astype(np.float64 if column.dtype == np.float32 "
            "else column.dtype)"
        ),
    ),
    mutant(
        "fields of different records where they are not read in a row",
        "SRC-002",
        gathered(
            'np.asarray(column)[records if name == "id" or (np.diff(records) == 1).all() '
            "else records[::-1]]"
        ),
        drops=ANY_ORDER,
    ),
    mutant(
        "only a loop keeps the fields of a shuffled row together",
        "SRC-002",
        (
            STEP,
            "        batch = self.take(stay=False)\n"
            "        kept = ('id', MASK) if self.base else batch\n"
            "        return {n: f if n in kept else np.roll(f, 1, 0) for n, f in batch.items()}\n",
        ),
        drops=ANY_ORDER,
    ),
    mutant(
        "only a fresh stream keeps the fields of a shuffled row together",
        "SRC-002",
        (LOAD, LOAD + "            self.loaded = self.base is not None\n"),
        (
            "        batch = gather(program.columns, records)\n",
            "        batch = gather(program.columns, records)\n"
            "        if hasattr(self, 'loaded') and self.loaded:\n"
            "            batch |= gather({**program.columns, 'id': records}, records[::-1])\n"
            "            batch['id'] = gather(program.columns, records)['id']\n",
        ),
        drops=ANY_ORDER,
    ),
    mutant(
        "int16 becomes int32 in a shuffled stream",
        "SRC-003",
        gathered(
            "np.asarray(column)[records].astype(np.int32 if column.dtype.itemsize == 2 and "
            "(np.diff(records) != 1).any() else column.dtype)"
        ),
        drops=ANY_ORDER,
    ),
    mutant(
        "what stood there before fills a shuffled batch",
        "STEP-006 ITER-005",
        (
            "            batch = pad(batch, program.batch_size)\n",
            "            filled = {n: np.resize(f, (program.batch_size, *f.shape[1:])) "
            "for n, f in batch.items()}\n"
            "            batch = pad(batch, program.batch_size)\n"
            "            batch |= filled if self.base else {}\n",
        ),
        drops=ANY_ORDER,
    ),
    mutant(
        "rows are flattened",
        "SRC-003",
        gathered(
            "np.asarray(column)[records].reshape(len(records), *([-1] if column.ndim > 2 "
            "else column.shape[1:]))"
        ),
    ),
    mutant(
        "integers are cut to 32 bits",
        "SRC-005",
        gathered(
            "np.asarray(column)[records].astype(np.int32 if column.dtype == np.int64 else "
            "column.dtype)"
        ),
    ),
    mutant(
        "unsigned integers are cut to 32 bits",
        "SRC-005",
        gathered(
            "np.asarray(column)[records].astype(np.uint32 if column.dtype == np.uint64 else "
            "column.dtype)"
        ),
    ),
    mutant(
        "NaN becomes zero",
        "SRC-006",
        gathered(
            "np.asarray(column)[records] if column.dtype.kind != 'f' else "
            "np.nan_to_num(column[records])"
        ),
    ),
    mutant(
        "batches are views of the columns",
        "SRC-040",
        gathered(
            "np.asarray(column)[records] if (np.diff(records) != 1).any() else "
            "np.asarray(column)[records[0] : records[-1] + 1]"
        ),
    ),
    mutant(
        "floats overflow",
        "SRC-006",
        gathered(
            "np.asarray(column)[records] if column.dtype != np.float64 else "
            "np.clip(column[records], -1e39, 1e39).astype(np.float32)"
        ),
    ),
    mutant(
        "the user's columns are written to",
        "SRC-007",
        within(
            GATHER,
            "return",
            "batch =",
            "    for column in columns.values():\n        column[records] = 0\n    return batch\n",
        ),
    ),
    mutant(
        "the order of columns counts",
        "SRC-008",
        (
            GATHER,
            '    records = records if next(iter(columns)) == "id" else records[::-1]\n' + GATHER,
        ),
    ),
    mutant(
        "a batch is used again as a buffer",
        "SRC-009",
        in_one_buffer(GATHER),
    ),
    mutant(
        "NumPy's global generator is drawn from",
        "SRC-010",
        (GATHER, "    np.random.random()\n" + GATHER),
    ),
    mutant(
        "a shuffle draws from NumPy's global generator",
        "SRC-010",
        (RECORDS, RECORDS + "        self.base is None or np.random.random()\n"),
    ),
    mutant(
        "Python's global generator is drawn from",
        "SRC-010",
        (GATHER, '    __import__("random").random()\n' + GATHER),
    ),
    mutant(
        "streams share their place",
        "SRC-011",
        (
            "        self.cursor = Cursor(0, 0)\n",
            "        self.cursor = Stream.where = Cursor(0, 0)\n",
        ),
        (
            "start, length = self.program, self.cursor, self.length",
            "start, length = self.program, Stream.where, self.length",
        ),
        within(TAKE, "        return", "        Stream.where = self.cursor\n        return"),
    ),
    mutant(
        "a column called mask is lost",
        "SRC-001",
        within(GATHER, "columns.items()", "columns.items() if name != MASK"),
        drops="jax",
    ),
    mutant(
        "uint16 becomes int32",
        "SRC-003",
        gathered(
            "np.asarray(column)[records].astype(np.int32 if column.dtype == np.uint16 else "
            "column.dtype)"
        ),
    ),
    mutant(
        "integers are cut to 32 bits, and only the first batch is looked at",
        "SRC-005",
        gathered(
            "np.asarray(column)[records].astype(np.int32 if column.dtype == np.int64 else "
            "column.dtype)"
        ),
        (
            '    if program.last_batch == "pad" and MASK in columns:\n',
            "    for name, column in columns.items():\n"
            "        if column.dtype == np.int64 and ((column[:size] + 2**31) >> 32).any():\n"
            '            raise Refused("field-type", field=name)\n'
            '    if program.last_batch == "pad" and MASK in columns:\n',
        ),
    ),
    mutant(
        "step cuts integers to 32 bits",
        "SRC-005",
        (
            STEP,
            "        return {\n"
            "            name: field.astype(np.int32) if field.dtype == np.int64 else field\n"
            "            for name, field in self.take(stay=False).items()\n"
            "        }\n",
        ),
    ),
    mutant(
        "step narrows floats, a loop does not",
        "SRC-003",
        (
            STEP,
            "        return {\n"
            "            name: field.astype(np.float32) if field.dtype == np.float64 else field\n"
            "            for name, field in self.take(stay=False).items()\n"
            "        }\n",
        ),
    ),
    mutant(
        "scan cuts integers to 32 bits",
        "SRC-005 SCAN-001",
        within(
            STACK,
            "return",
            "stacked =",
            "    narrow = {n: np.int32 for n, x in stacked.items() if x.dtype == np.int64}\n"
            "    return {n: x.astype(narrow.get(n, x.dtype)) for n, x in stacked.items()}\n",
        ),
    ),
    mutant(
        "numbers smaller than normal ones become zero",
        "SRC-006",
        gathered(
            "np.asarray(column)[records] if column.dtype.kind != 'f' else "
            "column[records] * ~(np.abs(column[records]) < np.finfo(column.dtype).tiny)"
        ),
    ),
    mutant(
        "minus zero becomes zero",
        "SRC-006",
        gathered(
            "np.asarray(column)[records] if column.dtype.kind != 'f' else "
            "column[records] + column.dtype.type(0)"
        ),
    ),
    mutant(
        "the user's columns are shuffled",
        "SRC-007",
        (
            PROGRAM,
            '        self.program = __import__("copy").deepcopy(program)\n'
            "        for column in program.columns.values():\n"
            "            if program.seed is not None and isinstance(column, np.ndarray):\n"
            "                column[...] = column[::-1].copy()\n",
        ),
        drops="jax",
    ),
    mutant(
        "a filled batch is used again as a buffer",
        "SRC-009",
        (
            "    return padded | {MASK: mask}\n",
            "    key = str({n: (f.shape, f.dtype) for n, f in padded.items()})\n"
            "    batch = BUFFERS.setdefault(key, padded)\n"
            "    for name in batch:\n"
            "        batch[name][...] = padded[name]\n"
            "    return batch | {MASK: mask}\n\n\n"
            "BUFFERS: dict = {}\n",
        ),
        drops="scan jax",
    ),
    mutant(
        "a scan's arrays are used again as a buffer",
        "SRC-009",
        in_one_buffer(STACK),
    ),
    mutant(
        "columns of one form are taken for equal",
        "SRC-011",
        (
            PROGRAM,
            "        form = str({n: (c.dtype, c.shape) for n, c in program.columns.items()})\n"
            "        self.columns = program.columns\n"
            "        own = ALIVE.setdefault(form, self).columns\n"
            '        self.program = __import__("dataclasses").replace(program, columns=own)\n',
        ),
        (
            "class Stream:\n",
            'ALIVE = __import__("weakref").WeakValueDictionary()\n\n\nclass Stream:\n',
        ),
        drops="jax",
    ),
    mutant(
        "batches of a graph are views of the columns",
        "SRC-040",
        (
            "        batch = gather(program.columns, records)\n",
            "        batch = gather(program.columns, records)\n"
            "        if program.nodes and (np.diff(records) == 1).all():\n"
            "            rows = slice(records[0], records[-1] + 1)\n"
            "            batch = {name: c[rows] for name, c in program.columns.items()}\n",
        ),
    ),
    mutant(
        "full batches share a mask",
        "SRC-040",
        (
            "            batch = pad(batch, program.batch_size)\n",
            "            batch = pad(batch, program.batch_size)\n"
            "            if count == program.batch_size:\n"
            '                batch[MASK] = self.__dict__.setdefault("full", batch[MASK])\n',
        ),
    ),
    mutant(
        "a scan's arrays are views of the columns",
        "SRC-040",
        (STEPS, "    start = stream.cursor.offset\n" + STEPS),
        (
            STACK,
            "    size = program.batch_size\n"
            "    rows = slice(start, start + length * size)\n"
            '    plain = not program.nodes and program.last_batch == "keep"\n'
            "    if plain and stream.base is None and rows.stop <= stream.length:\n"
            "        columns = program.columns.items()\n"
            "        return {n: c[rows].reshape(length, size, *c.shape[1:]) for n, c in columns}\n"
            + STACK,
        ),
        drops="jax",
    ),
    # 20 step
    mutant(
        "one record late",
        "STEP-001",
        (
            "        positions = start.offset + np.arange(count)\n",
            "        positions = start.offset + 1 + np.arange(count)\n",
        ),
    ),
    mutant(
        "step stops at the epoch's end",
        "STEP-002",
        (
            TAKE,
            '        if not stay and self.cursor.epoch:\n            raise RuntimeError("over")\n'
            + TAKE,
        ),
    ),
    mutant(
        "step ends a batch with the epoch",
        "STEP-003",
        ('        if stay or program.last_batch == "pad":\n', "        if True:\n"),
    ),
    mutant(
        "a batch is topped up from its own epoch",
        "STEP-003",
        (
            "start.epoch + positions // length, positions % length",
            "start.epoch + positions * 0, positions % length",
        ),
    ),
    mutant(
        "no more than two epochs in a batch",
        "STEP-004",
        (
            "        count = program.batch_size\n",
            "        count = min(program.batch_size, 2 * length - start.offset)\n",
        ),
    ),
    mutant(
        "drop is ignored",
        "STEP-005 ITER-003 SCAN-005",
        (
            '    if program.last_batch == "drop" and cursor',
            '    if program.last_batch == "" and cursor',
        ),
    ),
    mutant(
        "padding repeats a row",
        "STEP-006 ITER-005",
        (
            "np.zeros((batch_size - rows, *leaf.shape[1:]), leaf.dtype)",
            "leaf[:1].repeat(batch_size - rows, axis=0)",
        ),
    ),
    mutant(
        "padding of booleans is True",
        "STEP-006",
        (
            "np.zeros((batch_size - rows, *leaf.shape[1:]), leaf.dtype)",
            "np.full((batch_size - rows, *leaf.shape[1:]), leaf.dtype.kind == 'b', leaf.dtype)",
        ),
    ),
    mutant(
        "the mask is always True",
        "STEP-007 ITER-005",
        ("    mask = np.arange(batch_size) < rows\n", "    mask = np.ones(batch_size, bool)\n"),
    ),
    mutant(
        "the mask is a number",
        "STEP-007",
        (
            "    mask = np.arange(batch_size) < rows\n",
            "    mask = (np.arange(batch_size) < rows).astype(np.int32)\n",
        ),
    ),
    mutant(
        "padding counts as records",
        "STEP-008",
        (
            "divmod(start.offset + count, length)",
            'divmod(start.offset + (program.batch_size if program.last_batch == "pad" else '
            "count), length)",
        ),
    ),
    mutant(
        "rows of a batch come backwards",
        "STEP-009 ITER-001",
        (RECORDS, RECORDS + "        records = records[::-1]\n"),
    ),
    mutant(
        "a batch is topped up in the order of its own epoch",
        "STEP-003",
        within(RECORDS, "epochs", "epochs * 0 + start.epoch"),
        drops=ANY_ORDER,
    ),
    # 30 iter
    mutant(
        "the last batch is lost",
        "ITER-001 ITER-002",
        (
            "        if self.stream.cursor.epoch != self.epoch:\n",
            "        at = self.stream.cursor\n"
            "        if at.epoch != self.epoch or at.offset + self.stream.program.batch_size "
            ">= self.stream.length:\n",
        ),
    ),
    mutant(
        "the last batch is topped up",
        "ITER-002",
        (
            "        return self.stream.take(stay=True)\n",
            "        return self.stream.take(stay=False)\n",
        ),
    ),
    mutant(
        "a short batch is filled with zeros",
        "ITER-002",
        (
            '        if program.last_batch == "pad":\n'
            "            batch = pad(batch, program.batch_size)\n",
            '        if program.last_batch == "pad" or stay:\n'
            "            batch = pad(batch, program.batch_size)\n"
            '            batch = batch if program.last_batch == "pad" else {n: batch[n] for '
            "n in program.columns}\n",
        ),
    ),
    mutant(
        "drop still yields the short batch",
        "ITER-003",
        (
            "        after = settle(Cursor(start.epoch + passed, offset), length, program)\n",
            "        after = Cursor(start.epoch + passed, offset)\n"
            "        after = after if stay else settle(after, length, program)\n",
        ),
    ),
    mutant(
        "after StopIteration it starts again",
        "ITER-004",
        (
            "            self.epoch = None  # over for good, even if the stream is moved back\n",
            "            self.epoch = self.stream.cursor.epoch\n",
        ),
    ),
    mutant(
        "loops are not padded",
        "ITER-005",
        (
            "            batch = pad(batch, program.batch_size)\n",
            "            batch = pad(batch, count if stay else program.batch_size)\n",
        ),
    ),
    mutant(
        "the second loop is empty",
        "ITER-006",
        (
            "        self.epoch: int | None = stream.cursor.epoch\n",
            "        self.epoch: int | None = 0\n",
        ),
    ),
    mutant(
        "a loop starts its epoch anew",
        "ITER-007",
        (
            "        return EpochIterator(self)\n",
            "        self.cursor = Cursor(self.cursor.epoch, 0)\n"
            "        return EpochIterator(self)\n",
        ),
    ),
    mutant(
        "two iterators repeat a batch",
        "ITER-008",
        (
            "        self.stream = stream\n        self.epoch",
            '        self.stream = __import__("copy").copy(stream)\n        self.epoch',
        ),
    ),
    mutant(
        "an iterator belongs to the epoch of its first batch",
        "ITER-009",
        (
            "        self.epoch: int | None = stream.cursor.epoch\n",
            "        self.epoch: int | None = -1\n",
        ),
        (
            NEXT,
            "        if self.epoch == -1:\n            self.epoch = self.stream.cursor.epoch\n"
            + NEXT,
        ),
    ),
    mutant(
        "an iterator runs into the next epoch",
        "ITER-009",
        within(
            NEXT,
            "if self.stream.cursor.epoch != self.epoch:",
            "if self.stream.cursor.offset == 0 and self.stream.cursor.epoch != self.epoch:",
        ),
    ),
    mutant(
        "look-ahead leaks",
        "ITER-010 STATE-003",
        (
            NEXT,
            '        batch = self.__dict__.pop("ahead", None)\n        if batch is None:\n'
            + "".join(f"    {line}\n" for line in NEXT.replace("return", "batch =").splitlines())
            + "        if self.stream.cursor.epoch == self.epoch:\n"
            "            self.ahead = self.stream.take(stay=True)\n"
            "        return batch\n",
        ),
    ),
    mutant(
        "for and step cut differently",
        "ITER-011",
        (
            RECORDS,
            RECORDS
            + "        records = records[::-1] if stay and len(records) == program.batch_size "
            "else records\n",
        ),
    ),
    mutant(
        "an iterator lives again where the stream is moved back",
        "ITER-004",
        ("            self.epoch = None  # over for good, even if the stream is moved back\n", ""),
    ),
    mutant(
        "an iterator ends where a batch of its own was the last",
        "ITER-009",
        generated(
            "while True:\n"
            "    yield self.take(stay=True)\n"
            "    if self.cursor.offset == 0:\n"
            "        return"
        ),
        drops="step scan jax",
    ),
    mutant(
        "an iterator belongs to the epoch in which it is first asked",
        "ITER-009",
        generated(
            "epoch = self.cursor.epoch\n"
            "while self.cursor.epoch == epoch:\n"
            "    yield self.take(stay=True)"
        ),
        drops="step scan jax",
    ),
    mutant(
        "a scan knows nothing of look-ahead",
        "ITER-010",
        *AHEAD,
        (LOAD, LOAD + "            self.ahead = None\n"),
        within(STEPS, "stream.step()", "stream.take(stay=False)"),
        drops="jax",
    ),
    # 35 keys
    mutant(
        "threefry rotates by other numbers",
        "KEYS-001",
        ("ROTATIONS = ((13, 15, 26, 6)", "ROTATIONS = ((13, 15, 26, 7)"),
    ),
    mutant(
        "the seed is cut to 31 bits",
        "KEYS-002 SHUF-008",
        ("    return 0, seed\n", "    return 0, seed % 2**31\n"),
    ),
    mutant(
        "the words of the seed are swapped",
        "KEYS-002",
        ("    return 0, seed\n", "    return seed, 0\n"),
    ),
    mutant(
        "fold_in swaps the words",
        "KEYS-003",
        ("(number >> 32, number & WORD)", "(number & WORD, number >> 32)"),
    ),
    mutant(
        "another hash of names",
        "KEYS-004",
        ("zlib.crc32(name.encode())", "zlib.adler32(name.encode())"),
    ),
    mutant(
        "the epoch is folded in before the name",
        "KEYS-005",
        (EPOCH_KEY, '    return node_key(fold_in(base, epoch), "source")\n'),
    ),
    # 40 shuffle
    mutant(
        "a permutation broken at 2^16 + 1",
        "SHUF-001",
        within(ORDER, "return", "records =", "    return np.where(records == 2**16, 0, records)\n"),
    ),
    *[
        mutant(
            f"a permutation broken beyond 2^{k}",
            "SHUF-001",
            within(
                ORDER,
                "return",
                "records =",
                f"    return np.where((records == 2**{k}) & (length <= 2**{k} + 1), 0, records)\n",
            ),
        )
        for k in (1, 4, 8, 12, 19, 20)
    ],
    mutant(
        "drawn with replacement",
        "SHUF-001",
        within(ORDER, "return", "records =", "    return records // 2 * 2\n"),
    ),
    mutant(
        "stored epochs turn round",
        "SHUF-002",
        (
            "        return offsets\n",
            "        return np.where(epochs % 2 == 1, length - 1 - offsets, offsets)\n",
        ),
    ),
    mutant(
        "every stream has its own order",
        "SHUF-003",
        (
            "        self.base = None if program.seed is None else base_key(program.seed)\n",
            '        Stream.built = getattr(Stream, "built", 0) + 1\n'
            "        self.base = None if program.seed is None else base_key(program.seed + "
            "Stream.built)\n",
        ),
    ),
    mutant("the order depends on the batch size", "SHUF-004", salted("program.batch_size")),
    mutant(
        "shuffled within batches only",
        "SHUF-004 SHUF-010",
        (
            RECORDS,
            "        records = offsets\n"
            "        if self.base is not None:\n"
            "            key = epoch_key(self.base, start.epoch)\n"
            "            records = offsets[order(key, len(offsets), "
            "np.arange(len(offsets)))] if len(offsets) else offsets\n",
        ),
    ),
    mutant("the order depends on the policy", "SHUF-005", salted("ord(program.last_batch[0])")),
    mutant("the order depends on the mode", "SHUF-006", salted("stay")),
    mutant(
        "the same order every epoch",
        "SHUF-007 KEYS-005",
        within(EPOCH_KEY, ", epoch)", ", 0)"),
    ),
    mutant(
        "orders come again after eight epochs",
        "SHUF-007",
        within(EPOCH_KEY, ", epoch)", ", epoch % 8)"),
    ),
    mutant(
        "a hundred epochs to a seed",
        "SHUF-009",
        (EPOCH_KEY, '    return node_key((0, base[1] * 100 + epoch), "source")\n'),
    ),
    mutant("the seed is ignored", "SHUF-008", ("    return 0, seed\n", "    return 0, 0\n")),
    mutant(
        "the epoch is added to the seed",
        "SHUF-009",
        (EPOCH_KEY, '    return node_key((0, base[1] + epoch), "source")\n'),
    ),
    mutant(
        "the order is a rotation",
        "SHUF-010",
        (
            ORDER,
            "    return ((np.asarray(offsets, np.int64) + int(key[0])) % "
            "length).astype(np.int64)\n",
        ),
    ),
    mutant("the order depends on the columns", "SHUF-011", salted("len(program.columns)")),
    mutant(
        "the order depends on the type of the first column",
        "SHUF-011",
        salted("next(iter(program.columns.values())).dtype.itemsize"),
        drops=ANY_ORDER,
    ),
    mutant(
        "the order depends on the name of the first column",
        "SHUF-011",
        salted("len(next(iter(program.columns)))"),
        drops=ANY_ORDER,
    ),
    mutant("the order depends on the graph", "SHUF-011", salted("len(program.nodes)")),
    mutant(
        "the words of a round are swapped",
        "SHUF-012",
        (
            "        a, b = (int(word) for word in fold_in(key, r))\n",
            "        b, a = (int(word) for word in fold_in(key, r))\n",
        ),
    ),
    mutant("one round too few", "SHUF-013", ("ROUNDS = 24\n", "ROUNDS = 23\n")),
    *[
        mutant(
            f"places are counted in {bits} bits",
            "SHUF-013",
            (
                "        partner = (np.uint64(pivot % length) + (n - x)) % n\n",
                "        partner = (np.uint64(pivot % length) + (n - x)) % n\n"
                f"        partner = partner % np.uint64(2**{bits})\n",
            ),
            drops="jax",
        )
        for bits in (20, 30, 31)
    ],
    mutant(
        "the smaller of the pair is mixed",
        "SHUF-013",
        ("        chosen = np.maximum(x, partner)\n", "        chosen = np.minimum(x, partner)\n"),
    ),
    mutant(
        "under drop later epochs depend on the batch size",
        "SHUF-005",
        within(
            RECORDS,
            "epochs",
            'epochs + (epochs > 0) * (program.last_batch == "drop") * program.batch_size',
        ),
        drops=ANY_ORDER,
    ),
    mutant(
        "step does not shuffle under pad",
        "SHUF-006",
        (
            RECORDS,
            RECORDS
            + '        records = records if stay or program.last_batch != "pad" else offsets\n',
        ),
        drops=ANY_ORDER,
    ),
    mutant(
        "scan has an order of its own",
        "SHUF-006",
        (
            STEPS,
            "    own = stream.base\n"
            "    stream.base = own and (own[0], (own[1] + 1) % 2**32)\n"
            + STEPS
            + "    stream.base = own\n",
        ),
        drops=ANY_ORDER,
    ),
    mutant(
        "scan does not shuffle",
        "SHUF-006",
        (
            STEPS,
            "    own, stream.base = stream.base, None\n" + STEPS + "    stream.base = own\n",
        ),
        drops=ANY_ORDER,
    ),
    mutant(
        "the rest of an epoch is shuffled anew",
        "ITER-007 SHUF-006",
        (PROGRAM, PROGRAM + "        self.anew = -1\n"),
        salted("(self.anew == start.epoch)"),
        (
            "        return EpochIterator(self)\n",
            "        self.anew = self.cursor.epoch if self.cursor.offset else self.anew\n"
            "        return EpochIterator(self)\n",
        ),
        drops=ANY_ORDER,
    ),
    mutant(
        "the third epoch of a batch has the order of the second",
        "SHUF-006",
        within(RECORDS, "epochs", "np.minimum(epochs, start.epoch + 1)"),
        drops=ANY_ORDER,
    ),
    mutant(
        "orders come again after 256 epochs",
        "SHUF-007",
        within(EPOCH_KEY, ", epoch)", ", epoch % 256)"),
        drops=ANY_ORDER,
    ),
    # 50 dag
    mutant(
        "the first node counts as sink",
        "DAG-001",
        (
            "    batch = dict(made[plan.sink])\n",
            "    batch = dict(made[(*plan.order, plan.sink)[0]])\n",
        ),
    ),
    mutant(
        "fields of the source come back",
        "DAG-001",
        ("    batch = dict(made[plan.sink])\n", "    batch = {**source, **made[plan.sink]}\n"),
    ),
    mutant(
        "a root reads the node declared before it",
        "DAG-002",
        (
            'list(program.edges[name]) or ["source"] for',
            'list(program.edges[name]) or [["source", '
            "*program.nodes][list(program.nodes).index(name)]] for",
        ),
    ),
    mutant(
        "the name source is passed over",
        "DAG-003",
        within(
            INPUTS,
            "in plan.edges[name]",
            'in [p for p in plan.edges[name] if p != "source"] or ["source"]',
        ),
    ),
    mutant(
        "predecessors are passed sorted",
        "DAG-004",
        within(INPUTS, "in plan.edges[name]", "in sorted(plan.edges[name])"),
    ),
    mutant(
        "a repeated predecessor is passed once",
        "DAG-004",
        within(INPUTS, "in plan.edges[name]", "in dict.fromkeys(plan.edges[name])"),
    ),
    mutant(
        "the last node declared is the sink",
        "DAG-005",
        (
            "    return Plan(execution_order(edges), operations, edges, str(program.sink))\n",
            "    return Plan(execution_order(edges), operations, edges, list(program.nodes)[-1])\n",
        ),
    ),
    mutant(
        "a node runs once for each reader",
        "DAG-006",
        (
            "                made[name], states[name] = apply(*inputs, states[name])\n",
            "                for _ in range(max(1, sum(list(e).count(name) for e in "
            "plan.edges.values()))):\n"
            "                    made[name], states[name] = apply(*inputs, states[name])\n",
        ),
    ),
    mutant("stage state is lost", "DAG-007 SCAN-006", within(TAKE, "self.states, ", "_, ")),
    mutant(
        "building runs the stages",
        "DAG-007",
        (
            "        self.next_batch(stay=False)  # a stage that does not fit fails here, "
            "and nothing moves\n",
            "        _, self.states, _ = self.next_batch(stay=False)\n",
        ),
    ),
    mutant(
        "a stage works in place",
        "DAG-008",
        (
            '{**batch, "x": batch["x"] * int(a) + int(b)}',
            'batch.update(x=batch["x"] * int(a) + int(b)) or batch',
        ),
    ),
    mutant(
        "the mask is lost in the graph",
        "DAG-009",
        ("        batch.setdefault(MASK, source[MASK])\n", "        pass\n"),
    ),
    mutant(
        "affine adds first",
        "DAG-010",
        ('batch["x"] * int(a) + int(b)', '(batch["x"] + int(b)) * int(a)'),
    ),
    mutant(
        "add takes two at most",
        "DAG-010",
        ("        for other in rest:\n", "        for other in rest[:1]:\n"),
    ),
    mutant(
        "sub is turned round",
        "DAG-010",
        ('"x": first["x"] - second["x"]', '"x": second["x"] - first["x"]'),
    ),
    mutant(
        "pick keeps everything",
        "DAG-010",
        (
            "    return Operation(lambda batch: {name: batch[name]})\n",
            "    return Operation(lambda batch: batch)\n",
        ),
    ),
    mutant(
        "count starts at nought",
        "DAG-010",
        ('"count": batch["id"] * 0 + (seen + 1)', '"count": batch["id"] * 0 + seen'),
    ),
    mutant(
        "a row knows the size of its batch",
        "DAG-011",
        ('batch["x"] * int(a) + int(b)', 'batch["x"] * int(a) + int(b) + len(batch["x"]) // 5'),
    ),
    mutant(
        "nodes that count share their state",
        "DAG-007",
        (
            "                made[name], states[name] = apply(*inputs, states[name])\n",
            "                made[name], states[name] = apply(*inputs, max(states.values()))\n",
        ),
    ),
    # 60 state
    mutant(
        "a state forgets the offset",
        "STATE-001",
        (
            '    cursor = Cursor(**state["cursor"])\n',
            '    cursor = Cursor(state["cursor"]["epoch"], 0)\n',
        ),
    ),
    mutant(
        "a state forgets the epoch",
        "STATE-002",
        (
            '    cursor = Cursor(**state["cursor"])\n',
            '    cursor = Cursor(0, state["cursor"]["offset"])\n',
        ),
    ),
    mutant(
        "a state counts epochs in a byte",
        "STATE-002",
        (
            '    cursor = Cursor(**state["cursor"])\n',
            '    cursor = Cursor(state["cursor"]["epoch"] % 256, state["cursor"]["offset"])\n',
        ),
    ),
    mutant(
        "a state is one batch ahead",
        "STATE-003 STATE-001",
        (
            '        "cursor": stream.cursor._asdict(),\n',
            '        "cursor": stream.next_batch(True)[2]._asdict(),\n',
        ),
    ),
    mutant(
        "a state is the living thing",
        "STATE-004",
        (
            "        return save(self)\n",
            "        stream = self\n\n"
            "        class Live:\n"
            "            def __bytes__(self):\n"
            "                return save(stream)\n\n"
            "        return Live()\n",
        ),
    ),
    mutant(
        "taking a state takes a batch",
        "STATE-005",
        (
            "        return save(self)\n",
            "        state = save(self)\n        self.step()\n        return state\n",
        ),
    ),
    mutant(
        "a stream goes only forward",
        "STATE-006",
        within(
            LOAD,
            "self.cursor, self.states",
            "cursor, self.states",
            "            self.cursor = max(self.cursor, cursor)\n",
        ),
    ),
    mutant(
        "the batch size is in the fingerprint",
        "STATE-007",
        (
            '        "length": stream.length,\n',
            '        "length": stream.length,\n        "batch_size": program.batch_size,\n',
        ),
    ),
    mutant(
        "the state counts batches",
        "STATE-007",
        (
            '        "cursor": stream.cursor._asdict(),\n',
            '        "cursor": {"epoch": stream.cursor.epoch, "offset": stream.cursor.offset '
            "// stream.program.batch_size},\n",
        ),
        (
            '    cursor = Cursor(**state["cursor"])\n',
            '    cursor = Cursor(state["cursor"]["epoch"], state["cursor"]["offset"] * '
            "stream.program.batch_size)\n",
        ),
    ),
    mutant(
        "a state stands before what drop skips",
        "STATE-007",
        (
            '        "cursor": stream.cursor._asdict(),\n',
            '        "cursor": before_skipped(stream.cursor, stream)._asdict(),\n',
        ),
        (
            "def save(stream: Stream)",
            "def before_skipped(cursor: Cursor, stream: Stream) -> Cursor:\n"
            "    skipped = stream.length % stream.program.batch_size\n"
            '    if cursor.offset or not (cursor.epoch and stream.program.last_batch == "drop"):\n'
            "        return cursor\n"
            "    back = Cursor(cursor.epoch - 1, stream.length - skipped)\n"
            "    return back if skipped else cursor\n\n\n"
            "def save(stream: Stream)",
        ),
        drops="jax",
    ),
    mutant(
        "the policy is in the fingerprint",
        "STATE-008",
        (
            '        "length": stream.length,\n',
            '        "length": stream.length,\n        "policy": program.last_batch,\n',
        ),
    ),
    mutant(
        "restored into drop past the last batch",
        "STATE-008",
        (
            "    return settle(cursor, stream.length, stream.program), states\n",
            "    return cursor, states\n",
        ),
    ),
    mutant(
        "the seed is not in the fingerprint",
        "STATE-009",
        ('        "seed": digest(stream.base),\n', '        "seed": "",\n'),
    ),
    mutant(
        "the fingerprint has 31 bits of the seed",
        "STATE-009",
        (
            '        "seed": digest(stream.base),\n',
            '        "seed": digest(stream.base and stream.base[1] % 2**31),\n',
        ),
    ),
    mutant(
        "the order is not in the fingerprint",
        "STATE-010",
        ('"stored" if stream.base is None else f"swap-or-not-{ROUNDS}"', '"any"'),
        (
            '        "seed": digest(stream.base),\n',
            '        "seed": digest(stream.base or (0, 0)),\n',
        ),
    ),
    mutant(
        "the length is not in the fingerprint",
        "STATE-011",
        ('        "length": stream.length,\n', '        "length": 0,\n'),
    ),
    mutant(
        "names of columns are not in the fingerprint",
        "STATE-012",
        (
            "digest({name: [str(c.dtype), *c.shape[1:]] for name, c in columns.items()})",
            "digest([[str(c.dtype), *c.shape[1:]] for c in columns.values()])",
        ),
    ),
    mutant(
        "types of columns are not in the fingerprint",
        "STATE-012",
        (
            "digest({name: [str(c.dtype), *c.shape[1:]] for name, c in columns.items()})",
            "digest({name: c.shape[1:] for name, c in columns.items()})",
        ),
    ),
    mutant(
        "a column of 64 bits is taken for one of 32, and not narrowed",
        "STATE-012",
        (
            "digest({name: [str(c.dtype), *c.shape[1:]] for name, c in columns.items()})",
            'digest({name: [str(c.dtype).replace("64", "32"), *c.shape[1:]] '
            "for name, c in columns.items()})",
        ),
    ),
    mutant(
        "shapes of columns are not in the fingerprint",
        "STATE-012",
        (
            "digest({name: [str(c.dtype), *c.shape[1:]] for name, c in columns.items()})",
            "digest({name: str(c.dtype) for name, c in columns.items()})",
        ),
    ),
    mutant(
        "other types fail without a code",
        "STATE-012",
        (
            REFUSED,
            '            if name == "specs":\n                raise TypeError(name)\n' + REFUSED,
        ),
        (
            "        except Refused:\n            raise\n        except Exception as error:\n"
            '            raise Refused("state"',
            "        except (Refused, TypeError):\n            raise\n"
            "        except Exception as error:\n"
            '            raise Refused("state"',
        ),
        drops="jax",
    ),
    mutant(
        "an empty list of predecessors is another edge than the source",
        "STATE-013",
        (
            "digest([stream.plan.edges, stream.plan.sink])",
            "digest([program.edges, stream.plan.sink])",
        ),
    ),
    mutant(
        "edges are not in the fingerprint",
        "STATE-013",
        (
            "digest([stream.plan.edges, stream.plan.sink])",
            "digest([sorted(stream.plan.edges), stream.plan.sink])",
        ),
    ),
    mutant(
        "the order of predecessors is not in the fingerprint",
        "STATE-013",
        (
            "digest([stream.plan.edges, stream.plan.sink])",
            "digest([{k: sorted(v) for k, v in stream.plan.edges.items()}, stream.plan.sink])",
        ),
    ),
    mutant(
        "the graph is not in the fingerprint",
        "STATE-013",
        ("digest([stream.plan.edges, stream.plan.sink])", '""'),
    ),
    mutant(
        "a refusal resets the stream",
        "STATE-014",
        (
            "        except Refused:\n"
            "            raise\n"
            "        except Exception as error:\n"
            '            raise Refused("state"',
            "        except Refused:\n"
            "            self.reset()\n"
            "            raise\n"
            "        except Exception as error:\n"
            '            raise Refused("state"',
        ),
    ),
    mutant(
        "a refusal resets the stages",
        "STATE-014",
        (
            "        except Refused:\n"
            "            raise\n"
            "        except Exception as error:\n"
            '            raise Refused("state"',
            "        except Refused:\n"
            "            self.states = dict.fromkeys(self.states, 0)\n"
            "            raise\n"
            "        except Exception as error:\n"
            '            raise Refused("state"',
        ),
    ),
    mutant(
        "a damaged state is an error without a code",
        "STATE-023",
        ('            raise Refused("state", field="form") from error\n', "            raise\n"),
    ),
    mutant(
        "a damaged state resets the stream",
        "STATE-023",
        (
            '            raise Refused("state", field="form") from error\n',
            "            self.reset()\n"
            '            raise Refused("state", field="form") from error\n',
        ),
    ),
    mutant(
        "a damaged state resets the stages",
        "STATE-023",
        (
            '            raise Refused("state", field="form") from error\n',
            "            self.states = dict.fromkeys(self.states, 0)\n"
            '            raise Refused("state", field="form") from error\n',
        ),
    ),
    mutant(
        "no bytes are the beginning",
        "STATE-023",
        (
            "    state, own = json.loads(text), json.loads(save(stream))\n",
            "    if not text:\n"
            "        return Cursor(0, 0), dict.fromkeys(stream.states, 0)\n"
            "    state, own = json.loads(text), json.loads(save(stream))\n",
        ),
    ),
    mutant(
        "the state of the last stage alone is restored",
        "STATE-015",
        (
            "    return settle(cursor, stream.length, stream.program), states\n",
            "    last = dict(list(states.items())[-1:])\n"
            "    return settle(cursor, stream.length, stream.program), stream.states | last\n",
        ),
    ),
    mutant(
        "the state of stages is not restored",
        "STATE-015",
        (
            "    return settle(cursor, stream.length, stream.program), states\n",
            "    return settle(cursor, stream.length, stream.program), dict(stream.states)\n",
        ),
    ),
    mutant(
        "the order of columns is in the fingerprint",
        "STATE-001",
        (SPECS, "digest([[name, str(c.dtype), *c.shape[1:]] for name, c in columns.items()])"),
    ),
    mutant(
        "the order of nodes is in the fingerprint",
        "STATE-001",
        (
            "digest([stream.plan.edges, stream.plan.sink])",
            "digest([list(stream.plan.edges.items()), stream.plan.sink])",
        ),
    ),
    mutant(
        "the states of stages have numbers for names",
        "STATE-015",
        (
            '        f"{name}/count": {"dtype"',
            '        f"{list(stream.program.nodes).index(name)}/count": {"dtype"',
        ),
        (
            'states[path.rsplit("/", 1)[0]]',
            'states[list(stream.program.nodes)[int(path.rsplit("/", 1)[0])]]',
        ),
        drops="jax",
    ),
    mutant(
        "look-ahead leaks into the state of stages",
        "STATE-003",
        generated(
            "try:\n"
            "    while self.cursor.epoch == epoch:\n"
            "        batch = self.take(stay=True)\n"
            "        if self.cursor.epoch == epoch:\n"
            "            self.ahead = self.next_batch(stay=True)[1]\n"
            "        yield batch\n"
            "        self.ahead = None\n"
            "finally:\n"
            "    self.ahead = None"
        ),
        *AHEAD[1:],
        ("encode(stream.states[name])", "encode((stream.ahead or stream.states)[name])"),
        drops="jax",
    ),
    mutant("look-ahead outlives a restored state", "STATE-006", *AHEAD, drops="jax"),
    mutant(
        "restored into drop, only the next batch skips what is left",
        "STATE-007 STATE-008",
        (
            "    return settle(cursor, stream.length, stream.program), states\n",
            "    return cursor, states\n",
        ),
        (START, START + "        start = settle(start, length, program)\n"),
    ),
    mutant(
        "under drop only the next batch skips what is left",
        "STATE-008",
        (
            "        after = settle(Cursor(start.epoch + passed, offset), length, program)\n",
            "        after = Cursor(start.epoch + passed, offset)\n",
        ),
        (START, START + "        start = settle(start, length, program)\n"),
        (
            "        self.epoch: int | None = stream.cursor.epoch\n",
            "        cursor = settle(stream.cursor, stream.length, stream.program)\n"
            "        self.epoch: int | None = cursor.epoch\n",
        ),
        (
            NEXT,
            "        stream = self.stream\n"
            "        cursor = settle(stream.cursor, stream.length, stream.program)\n"
            + NEXT.replace("self.stream.cursor.epoch", "cursor.epoch"),
        ),
        drops="jax",
    ),
    mutant(
        "a state of no graph fits any graph",
        "STATE-013",
        (
            "        if there != here:\n",
            '        if there != here and there != digest([{}, "source"]):\n',
        ),
    ),
    *[
        mutant(
            f"a refusal of other {what} moves the stream",
            "STATE-014",
            (
                REFUSED,
                f'            if name == "{field}":\n'
                '                stream.cursor = Cursor(**state["cursor"])\n' + REFUSED,
            ),
        )
        for what, field in (("columns", "specs"), ("graphs", "graph"))
    ],
    # 70 scan
    mutant(
        "scan does one too few",
        "SCAN-001",
        within(STEPS, "range(length)", "range(max(1, length - 1))"),
    ),
    mutant(
        "scan does one too many",
        "SCAN-001",
        within(STEPS, "range(length)", "range(length + 1)"),
    ),
    mutant(
        "scan leaves the stream behind",
        "SCAN-002",
        (STEPS, "    before = stream.cursor\n" + STEPS + "    stream.cursor = before\n"),
    ),
    mutant(
        "scan starts with the epoch",
        "SCAN-003",
        (STEPS, "    stream.cursor = Cursor(stream.cursor.epoch, 0)\n" + STEPS),
    ),
    mutant(
        "scan stays in its epoch",
        "SCAN-004",
        (
            STEPS,
            "    batches = []\n"
            "    here = stream.cursor.epoch\n"
            "    for _ in range(length):\n"
            "        batches.append(stream.step())\n"
            "        stream.cursor = Cursor(here, stream.cursor.offset)\n",
        ),
    ),
    mutant(
        "scan stops with the epoch",
        "SCAN-004",
        (
            STEPS,
            "    here = stream.cursor.epoch\n"
            "    batches = [stream.step()]\n"
            "    while len(batches) < length and stream.cursor.epoch == here:\n"
            "        batches.append(stream.step())\n",
        ),
    ),
    mutant(
        "scan loses the mask",
        "SCAN-005",
        within(STACK, "for name in batches[0]", "for name in batches[0] if name != MASK"),
    ),
    mutant(
        "scan does not carry stage state",
        "SCAN-006",
        (
            STEPS,
            "    states, batches = stream.states, []\n"
            "    for _ in range(length):\n"
            "        batches.append(stream.step())\n"
            "        stream.states = states\n",
        ),
    ),
    mutant(
        "scan leaves stage state behind",
        "SCAN-006",
        (STEPS, "    states = stream.states\n" + STEPS + "    stream.states = states\n"),
    ),
    mutant(
        "scan of no length is a whole epoch",
        "SCAN-007",
        ("        left = stream.length - stream.cursor.offset\n", "        left = stream.length\n"),
    ),
    mutant(
        "scan of no length drops the rest",
        "SCAN-008",
        (
            '        if program.last_batch == "keep" and left % program.batch_size:\n',
            "        if False:\n",
        ),
    ),
    mutant(
        "a refused scan moves on",
        "SCAN-008",
        (
            '            raise Refused("last-batch", left=left, batch_size=program.batch_size)\n',
            "            stream.step()\n"
            '            raise Refused("last-batch", left=left, '
            "batch_size=program.batch_size)\n",
        ),
    ),
    mutant(
        "a scan of nothing takes a batch",
        "SCAN-009",
        (
            "        batch, _, _ = stream.next_batch(stay=False)\n",
            "        batch = stream.step()\n",
        ),
    ),
    mutant(
        "a scan of nothing has no mask",
        "SCAN-009",
        (
            "        batch, _, _ = stream.next_batch(stay=False)\n",
            "        batch, _, _ = stream.next_batch(stay=False)\n        batch.pop(MASK, None)\n",
        ),
    ),
    mutant(
        "a scan of nothing is one batch long",
        "SCAN-009",
        ("leaf[np.newaxis][:0]", "leaf[np.newaxis]"),
    ),
    mutant(
        "a scan ends the epoch",
        "SCAN-010",
        after_scan("stream.cursor = Cursor(stream.cursor.epoch + 1, 0)"),
    ),
    mutant(
        "a scan repeats a batch after 64",
        "SCAN-001",
        (
            STEPS,
            "    batches = []\n"
            "    for i in range(length):\n"
            "        batches.append(batches[-1] if i == 64 else stream.step())\n",
        ),
    ),
    mutant(
        "scan loses the mask where a stage has lost the rest",
        "SCAN-005",
        within(
            STACK,
            "for name in batches[0]",
            'for name in batches[0] if name != MASK or "id" in batches[0]',
        ),
    ),
    # 80 errors
    mutant(
        "graphs of two nodes are refused",
        "ERR-001",
        (
            "    execution_order(edges)  # finds a cycle\n",
            "    execution_order(edges)\n"
            "    if len(nodes) == 2:\n"
            '        raise Refused("cycle", nodes=[])\n',
        ),
    ),
    mutant(
        "graphs of more than sixty nodes are refused",
        "ERR-001",
        (
            "    execution_order(edges)  # finds a cycle\n",
            "    execution_order(edges)\n"
            "    if len(nodes) > 60:\n"
            '        raise Refused("cycle", nodes=[])\n',
        ),
    ),
    mutant(
        "batches of half the records are refused",
        "ERR-001",
        (
            "    if program.last_batch not in",
            "    if size * 2 >= length:\n"
            '        raise Refused("batch-size")\n'
            "    if program.last_batch not in",
        ),
    ),
    mutant(
        "faults are found at the first batch",
        "ERR-002",
        (
            "    def __init__(self, program: Program):\n        self.length = check(program)\n",
            "    def __init__(self, program: Program):\n"
            "        try:\n"
            "            self.build(program)\n"
            "        except Refused as late:\n"
            "            self.late = late\n\n"
            "    def build(self, program):\n"
            "        self.length = check(program)\n",
        ),
    ),
    mutant(
        "a cycle has another code",
        "ERR-003",
        (
            '            raise Refused("cycle", nodes=find_cycle(edges, waiting))\n',
            '            raise Refused("stage", nodes=find_cycle(edges, waiting))\n',
        ),
    ),
    mutant(
        "the cycle error names bystanders",
        "ERR-004",
        ("nodes=find_cycle(edges, waiting)", "nodes=[*waiting, waiting[0]]"),
    ),
    mutant(
        "the cycle error begins with the first node that waits",
        "ERR-004",
        (
            "nodes=find_cycle(edges, waiting)",
            "nodes=[min(waiting, key=list(edges).index), *find_cycle(edges, waiting)]",
        ),
    ),
    mutant(
        "the cycle error runs backwards",
        "ERR-004",
        (
            "    return path[path.index(path[-1]) :][::-1]\n",
            "    return path[path.index(path[-1]) :]\n",
        ),
    ),
    mutant(
        "a self-loop is a cycle",
        "ERR-005",
        ("            if before == name:\n", "            if False:\n"),
    ),
    mutant(
        "the unknown predecessor names the wrong node",
        "ERR-006",
        (
            'raise Refused("unknown-predecessor", node=name, name=before)',
            'raise Refused("unknown-predecessor", node=before, name=name)',
        ),
    ),
    mutant(
        "an unknown sink is the last node",
        "ERR-007",
        (
            "    if sink not in nodes:\n",
            "    sink = sink if sink in nodes else list(nodes)[-1]\n    if sink not in nodes:\n",
        ),
    ),
    mutant(
        "a false cycle for a node without an entry",
        "ERR-008",
        (
            '            raise Refused("missing-edges", node=name)\n',
            '            raise Refused("cycle", nodes=[name])\n',
        ),
    ),
    mutant(
        "edges without a node are passed over",
        "ERR-009",
        (
            "        if name not in nodes:\n"
            '            raise Refused("edges-without-node", name=name)\n',
            "        if name not in nodes:\n            continue\n",
        ),
        (
            "    while len(done) <= len(edges):\n",
            "    edges = {n: e for n, e in edges.items() if set(e) <= {'source', *edges}}\n"
            "    while len(done) <= len(edges):\n",
        ),
    ),
    mutant(
        "a node may lead nowhere",
        "ERR-010",
        ("        if name not in used:\n", "        if False:\n"),
    ),
    mutant(
        "a graph may be empty",
        "ERR-011",
        ('    if not nodes:\n        raise Refused("no-nodes")\n', ""),
    ),
    mutant(
        "a batch size may be nought",
        "ERR-012",
        ("not isinstance(size, int) or size < 1", "not isinstance(size, int) or size < 0"),
    ),
    mutant("a batch size may be a bool", "ERR-012", ("isinstance(size, bool) or not", "not")),
    mutant(
        "a source may be empty",
        "ERR-013",
        ('        raise Refused("empty-source")\n', "        pass\n"),
    ),
    mutant(
        "columns may differ in length",
        "ERR-014",
        ("    if len(set(lengths.values())) > 1:\n", "    if False:\n"),
    ),
    mutant("columns may hold anything", "ERR-015", ('not in "biufc"', 'not in "biufcUO"')),
    mutant("columns may hold dates", "ERR-015", ('not in "biufc"', 'not in "biufcM"')),
    mutant(
        "predecessors may be a string",
        "ERR-016",
        ("        if isinstance(predecessors, str):\n", "        if False:\n"),
    ),
    mutant(
        "a node may be called source",
        "ERR-017",
        ('        if name in ("", "source") or name.startswith("_"):\n', "        if False:\n"),
    ),
    mutant(
        "a name of the engine is refused as something else",
        "ERR-034",
        (
            '        if name in ("", "source") or name.startswith("_"):\n',
            '        if name == "" or name.startswith("_"):\n'
            '            raise Refused("unknown-sink", name=name)\n'
            '        if name == "source":\n',
        ),
    ),
    mutant(
        "names may share a key",
        "ERR-035",
        (
            "        if numbers.setdefault(node_number(name), name) != name:\n",
            "        if False:\n",
        ),
    ),
    mutant(
        "any policy is keep",
        "ERR-018",
        ('    if program.last_batch not in ("keep", "drop", "pad"):\n', "    if False:\n"),
    ),
    mutant(
        "drop may drop everything",
        "ERR-019",
        ('    if program.last_batch == "drop" and length < size:\n', "    if False:\n"),
    ),
    mutant(
        "the mask replaces a column",
        "ERR-020",
        ('    if program.last_batch == "pad" and MASK in columns:\n', "    if False:\n"),
    ),
    mutant(
        "a column is called mask at any time",
        "ERR-020",
        ('    if program.last_batch == "pad" and MASK in columns:\n', "    if MASK in columns:\n"),
    ),
    mutant(
        "a stage is first tried with a batch",
        "ERR-021",
        (
            "        self.next_batch(stay=False)  # a stage that does not fit fails here, "
            "and nothing moves\n",
            "",
        ),
    ),
    mutant(
        "a long chain is built, but does not run",
        "ERR-001",
        (
            TAKE,
            "        if len(self.plan.order) > 500:\n            raise RecursionError\n" + TAKE,
        ),
    ),
    mutant(
        "a long cycle is too deep",
        "ERR-003",
        (
            "    while path[-1] not in path[:-1]:\n"
            "        path.append(next("
            "before for before in edges[path[-1]] if before in waiting))\n",
            "\n"
            "    def walk(path):\n"
            "        if path[-1] in path[:-1]:\n"
            "            return path\n"
            "        return walk([*path, next(p for p in edges[path[-1]] if p in waiting)])\n\n"
            "    path = walk(path)\n",
        ),
    ),
    mutant("columns may hold strings", "ERR-015", ('not in "biufc"', 'not in "biufcU"')),
    mutant(
        "only stages that pick are first tried with a batch",
        "ERR-021",
        (
            "        self.next_batch(stay=False)  # a stage that does not fit fails here, "
            "and nothing moves\n",
            '        if any(form.startswith("pick") for form in program.nodes.values()):\n'
            "            self.next_batch(stay=False)\n",
        ),
        drops="jax",
    ),
    # profile jax
    mutant(
        "the cursor rests at the end of an epoch",
        "STEP-010",
        (
            "        passed, offset = divmod(start.offset + count, length)\n",
            "        passed, offset = divmod(start.offset + count, length)\n"
            "        if passed and not offset:\n"
            "            passed, offset = passed - 1, length\n",
        ),
    ),
    mutant(
        "drop does not skip after seek",
        "STEP-011",
        (
            "        self.cursor = settle(Cursor(epoch, offset), self.length, self.program)\n",
            "        self.cursor = Cursor(epoch, offset)\n",
        ),
    ),
    mutant(
        "seek forgets the offset",
        "STEP-013",
        (
            "settle(Cursor(epoch, offset), self.length, self.program)\n",
            "settle(Cursor(epoch, 0), self.length, self.program)\n",
        ),
    ),
    mutant(
        "seek cuts the epoch to 31 bits",
        "STEP-013",
        (
            "settle(Cursor(epoch, offset), self.length, self.program)\n",
            "settle(Cursor(epoch % 2**31, offset), self.length, self.program)\n",
        ),
    ),
    mutant(
        "reset stays in its epoch",
        "STEP-014",
        (
            "        self.seek(epoch=0, offset=0)\n",
            "        self.seek(epoch=self.cursor.epoch, offset=0)\n",
        ),
    ),
    mutant(
        "a compiled step moves nothing",
        "STEP-015",
        (
            "        return [self.step() for _ in range(n)]\n",
            "        return [self.next_batch(stay=False)[0] for _ in range(n)]\n",
        ),
    ),
    mutant(
        "compiled steps keep the first one's order",
        "STEP-015",
        (
            "        return [self.step() for _ in range(n)]\n",
            "        here, batches = self.cursor.epoch, []\n"
            "        for _ in range(n):\n"
            "            self.cursor = Cursor(here, self.cursor.offset)\n"
            "            batches.append(self.step())\n"
            "        return batches\n",
        ),
    ),
    mutant(
        "gradients do not arrive",
        "STEP-016",
        ("        self.replace(node, form)\n        twin =", "        twin ="),
    ),
    mutant(
        "parameters are baked in",
        "STEP-017",
        ("        self.replace(node, form)\n\n    def grad", "        pass\n\n    def grad"),
    ),
    mutant(
        "len counts whole batches only",
        "ITER-012",
        ('return whole if self.program.last_batch == "drop" else', "return whole if True else"),
    ),
    mutant(
        "len counts what drop drops",
        "ITER-012",
        ('return whole if self.program.last_batch == "drop" else', "return whole if False else"),
    ),
    mutant(
        "threads meet in the iterator",
        "ITER-013",
        (
            "        with self.lock:\n            return next(self.inner)\n",
            "        import time\n\n"
            "        stream = self.inner.stream\n"
            "        if stream.cursor.epoch != self.inner.epoch:\n"
            "            raise StopIteration\n"
            "        batch, states, cursor = stream.next_batch(stay=True)\n"
            "        time.sleep(0)\n"
            "        stream.cursor = cursor\n"
            "        return batch\n",
        ),
    ),
    mutant(
        "keys know nothing of the epoch",
        "KEYS-006",
        (
            "        in_epoch = fold_in(node_key(self.base, name), self.epochs)\n",
            "        in_epoch = fold_in(node_key(self.base, name), 0)\n",
        ),
    ),
    mutant(
        "keys count rows of the batch",
        "KEYS-006 KEYS-008",
        (
            "        return np.stack(fold_in(in_epoch, self.records), axis=1)",
            "        return np.stack(fold_in(in_epoch, np.arange(len(self.records))), axis=1)",
        ),
    ),
    mutant(
        "all nodes have one key",
        "KEYS-009",
        (
            "        in_epoch = fold_in(node_key(self.base, name), self.epochs)\n",
            '        in_epoch = fold_in(node_key(self.base, ""), self.epochs)\n',
        ),
    ),
    mutant(
        "the number of nodes is in the keys",
        "KEYS-009",
        (
            "        keys = StageKeys(self.base, epochs, records)\n",
            "        keys = StageKeys(self.base and (len(self.plan.order) - 1, "
            "self.base[1]), epochs, records)\n",
        ),
    ),
    mutant(
        "a node cannot be replaced",
        "DAG-013",
        (
            "        self.plan = make_plan(self.program)\n\n    def change",
            "        pass\n\n    def change",
        ),
    ),
    mutant(
        "seek goes anywhere",
        "ERR-029",
        (
            "        if not (0 <= epoch < 2**32 and 0 <= offset < self.length):\n",
            "        if False:\n",
        ),
    ),
    mutant(
        "a refused seek moves",
        "ERR-029",
        (
            '            raise Refused("seek", epoch',
            '            self.cursor = Cursor(0, 0)\n            raise Refused("seek", epoch',
        ),
    ),
    mutant(
        "every way through a graph is walked",
        "ERR-031",
        (
            "    execution_order(edges)  # finds a cycle\n",
            "    def walk(name, path):\n"
            "        for before in edges.get(name, ()):\n"
            "            if before not in path:\n"
            "                walk(before, (*path, before))\n\n"
            "    walk(sink, (sink,))\n"
            "    execution_order(edges)  # finds a cycle\n",
        ),
    ),
    mutant(
        "some graphs crash",
        "ERR-031 ERR-006",
        ('            if before not in nodes and before != "source":\n', "            if False:\n"),
    ),
    *library.MUTANTS,
]

BENIGN = [
    mutant(
        "read-only arrays",
        "",
        within(
            GATHER,
            "return",
            "batch =",
            "    for field in batch.values():\n"
            "        field.setflags(write=False)\n"
            "    return batch\n",
        ),
    ),
    mutant("Fortran order", "", gathered("np.asfortranarray(np.asarray(column)[records])")),
    Mutant(
        "another permutation",
        (),
        [("ROUNDS = 24\n", "ROUNDS = 31\n")],
        drops=["shuffle.exact", "jax"],
    ),
    Mutant(
        "a large state",
        (),
        [
            (
                "    return json.dumps(state).encode()\n",
                '    return json.dumps({**state, "more": "x" * 100_000}).encode()\n',
            )
        ],
        drops=["jax"],
    ),
    Mutant(
        "another order among equals",
        (),
        [("        done[ready[0]] = None\n", "        done[ready[-1]] = None\n")],
        drops=["jax"],
    ),
    mutant(
        "other exception classes",
        "",
        ("class Refused(ValueError):\n", "class Refused(ArithmeticError):\n"),
    ),
    mutant(
        "generators as iterators",
        "",
        (
            "        return EpochIterator(self)\n",
            "        return (batch for batch in EpochIterator(self))\n",
        ),
    ),
    mutant(
        "a mapping that is no dict",
        "",
        within(TAKE, "return batch", 'return __import__("types").MappingProxyType(batch)'),
    ),
    mutant(
        "64-bit integers narrowed where they fit",
        "",
        gathered(
            "(lambda c: c.astype(np.int32) if c.dtype == np.int64 else "
            "c)(np.asarray(column)[records])"
        ),
        (
            "    lengths = {name: len(column) for name, column in columns.items()}\n",
            "    for name, column in columns.items():\n"
            "        if column.dtype == np.int64 and (np.abs(column.astype(object) * 2 + 1) "
            "> 2**32).any():\n"
            '            raise Refused("field-type", field=name)\n'
            "    lengths = {name: len(column) for name, column in columns.items()}\n",
        ),
    ),
    mutant("another version of the state", "", ("VERSION = 1\n", "VERSION = 7\n")),
]
