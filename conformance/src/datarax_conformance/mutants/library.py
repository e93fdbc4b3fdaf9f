"""Engines of profile jax with one fault each: edits of the library that extends the model."""

from __future__ import annotations

from ._mutant import Mutant

# Parts of the source that several mutants edit.
PUBLIC = "        positions = start + np.arange(n)\n"
WINDOW = "        number = offset // (size * window)\n"
NARROW = "        if length < 2**32:\n"
BEGUN = "        seen = [epoch * self.periods * quota for quota in self.quotas]\n"
SHARED = "        with self.lock:\n            return next(self.inner)\n"
TAKEN = "        batch = super().take(stay)\n        self.counts = self.after\n"
TWIN = "        twin.states = copy.deepcopy(self.states)\n        return twin\n"
STORAGE = '    """Records in files, which may be damaged."""\n'
ELEMENTS = (
    "def stage_element_keys(node: Node, batch: Batch) -> Batch:\n"
    '    return {**batch, "keys": node.keys}\n'
)
RECORDS = "    def records(self, order_key, epochs, offsets):\n        return "


def mutant(name: str, breaks: str, old: str, new: str) -> Mutant:
    return Mutant(name, breaks.split(), [(old, new)])


MUTANTS = [
    # sources
    mutant(
        "a source is asked for sorted records",
        "SRC-012",
        "        records = self.source.records(key, epochs, offsets)\n\n        readable",
        "        records = np.sort(self.source.records(key, epochs, offsets))\n\n        readable",
    ),
    mutant(
        "random access gets the key of the first row",
        "SRC-013",
        "key = np.stack(fold_in(order_key, epochs), axis=1)",
        "key = np.stack(fold_in(order_key, epochs * 0 + epochs[0]), axis=1)",
    ),
    mutant(
        "an endless source ends",
        "SRC-014",
        "        super().__init__(program, options)\n        self.length = None\n",
        "        super().__init__(program, options)\n",
    ),
    mutant(
        "random access begins each epoch with the first one's order",
        "SRC-015",
        "self.records(order_key, positions // length,",
        "self.records(order_key, positions * 0,",
    ),
    mutant(
        "chunks of one key overlap",
        "SRC-016 SRC-015",
        PUBLIC,
        "        positions = start + np.arange(n) // 2 * 2\n",
    ),
    mutant("nested fields are laid flat", "SRC-017", 'else f"inner.{name}"', "else name"),
    mutant(
        "a bare array has another name",
        "SRC-017",
        '{"data": columns["id"]}',
        '{"array": columns["id"]}',
    ),
    mutant(
        "a private copy is none",
        "SRC-018",
        '        if options.get("copy"):\n',
        "        if False:\n",
    ),
    mutant(
        "files are read as they are stored",
        "SRC-019",
        STORAGE,
        STORAGE + "\n" + RECORDS + "offsets\n",
    ),
    mutant(
        "a copy of a pipeline over files begins anew",
        "SRC-020",
        "        twin.counts = dict(self.counts)\n",
        "        twin.counts = dict(self.counts)\n        twin.cursor = Cursor(0, 0)\n",
    ),
    mutant(
        "rows of a mixture are drawn",
        "SRC-021",
        "owner[order(key, period, np.arange(period))]",
        "owner[order(key, period, np.arange(period)) // 2]",
    ),
    mutant("periods of a mixture are too short", "SRC-021", "PERIOD = 256\n", "PERIOD = 3\n"),
    mutant(
        "each epoch of a mixture begins its sources anew",
        "SRC-022",
        BEGUN,
        "        seen = [0 for quota in self.quotas]\n",
    ),
    mutant(
        "a mixture has no key",
        "SRC-023",
        "        for number in range(self.periods):\n            key = fold_in(",
        "        for number in range(self.periods):\n            key = (0, 0) or fold_in(",
    ),
    mutant(
        "stop is the other way round",
        "SRC-024",
        'if options["stop"] == "all"',
        'if options["stop"] == "first"',
    ),
    mutant(
        "sources on the host begin late",
        "SRC-025",
        BEGUN,
        BEGUN.replace("quota for", 'quota + len(self.options.get("hosts", ())) for'),
    ),
    mutant(
        "anything is mixed", "SRC-026", '        if options.get("differ"):\n', "        if False:\n"
    ),
    mutant(
        "a mixture may have no period",
        "SRC-026",
        '        if self.periods == 0:\n            raise Refused("empty-source")\n',
        "",
    ),
    mutant(
        "the second pass begins elsewhere",
        "SRC-027",
        "    random_access = False\n",
        "    random_access = False\n\n" + RECORDS + "(offsets + epochs) % self.length\n",
    ),
    mutant(
        "a stream resumes at its beginning",
        "SRC-028",
        'Cursor(*saved["cursor"]), saved["counts"]',
        'Cursor(saved["cursor"][0], 0), saved["counts"]',
    ),
    mutant(
        "all windows of a stream have one order",
        "SRC-039",
        "            own = fold_in(windows, number)\n",
        "            own = fold_in(windows, 0)\n",
    ),
    mutant(
        "the epochs of a stream have the same windows",
        "SRC-039",
        "        windows = fold_in(fold_in(order_key, epoch), 2**33)\n",
        "        windows = fold_in(fold_in(order_key, 0), 2**33)\n",
    ),
    mutant(
        "a short window of a stream stays as it is",
        "SRC-039",
        "            span = min(window, length - start)\n",
        "            span = window\n"
        "            if length - start < window:\n                return offset\n",
    ),
    mutant(
        "a stream pretends to have random access",
        "SRC-029",
        '        if not self.source.random_access:\n            raise Refused("random-access")\n'
        "        return super().jit_steps(n)\n",
        "        return super().jit_steps(n)\n",
    ),
    mutant(
        "a pass without a batch is one",
        "SRC-029",
        "        if self.built and self.source.empty:\n"
        "            raise Refused(self.source.empty)\n",
        "",
    ),
    mutant(
        "what was read ahead counts as handed out",
        "SRC-030",
        SHARED,
        SHARED.replace("return", "batch =")
        + '            asked = getattr(self.inner.stream, "options", {}).get("source", {})\n'
        '            if asked.get("form") == "storage":\n'
        "                self.inner.stream.take(stay=True)\n"
        "            return batch\n",
    ),
    mutant(
        "the record after is named",
        "SRC-031",
        "raise self.unreadable(record)",
        "raise self.unreadable(record + 1)",
    ),
    mutant(
        "no file is named",
        "SRC-031",
        'raise Refused("file", file="id.npy")',
        'raise Refused("file", file="")',
    ),
    mutant(
        "a failed batch is passed over",
        "SRC-032",
        TAKEN,
        "        try:\n    "
        + TAKEN.replace("\n        self", "\n            self")
        + "        except Refused as error:\n"
        '            if error.code == "read":\n'
        "                size = self.program.batch_size\n"
        "                self.cursor = Cursor(self.cursor.epoch, self.cursor.offset + size)\n"
        "            raise\n",
    ),
    mutant(
        "masked records keep their values",
        "SRC-033",
        "    return np.where(readable.reshape(-1",
        "    return x\n    return np.where(readable.reshape(-1",
    ),
    mutant(
        "each batch may mask max_errors",
        "SRC-033",
        "int((~readable).sum()) + self.masked(start)",
        "int((~readable).sum())",
    ),
    mutant(
        "a replay is of epoch 0",
        "SRC-034",
        "np.array([record]), np.array([epoch])",
        "np.array([record]), np.array([epoch * 0])",
    ),
    mutant(
        "a replay counts as a batch",
        "SRC-034",
        '        self.counts = counts\n        return {f"{node}.{name}"',
        '        return {f"{node}.{name}"',
    ),
    mutant(
        "pickled objects are read",
        "SRC-035",
        '        if damage == "pickled":\n',
        "        if False:\n",
    ),
    mutant("a cut file is read", "SRC-036", '"text", "cut", "flipped"', '"text", "flipped"'),
    mutant("a missing package has no extra", "SRC-037", "[{options['extra']}]", ""),
    mutant("no waiting is counted", "SRC-038", '"waited": delay', '"waited": delay * 0'),
    # orders
    mutant(
        "64-bit lengths in 32-bit words",
        "SHUF-014",
        NARROW,
        "        if length < 2**62:\n",
    ),
    mutant(
        "2**32 records in 32-bit words",
        "SHUF-014",
        NARROW,
        "        if length <= 2**32:\n",
    ),
    mutant("the inverse runs forwards", "SHUF-015", "reversed(range(ROUNDS))", "range(ROUNDS)"),
    mutant("half of the random words are sorted by", "SHUF-016", "high ^ low, kind", "low, kind"),
    mutant(
        "a mapped order has one epoch",
        "SHUF-017",
        "        key = epoch_key(base_key(seed), epoch)\n",
        '        key = epoch_key(base_key(seed), epoch if how != "vmap" else 0)\n',
    ),
    mutant(
        "rows behind the short block are lost",
        "SHUF-018",
        "order(order_of_blocks, count, block + behind)",
        "order(order_of_blocks, count, block)",
    ),
    mutant(
        "windows are not shuffled",
        "SHUF-019",
        "        place = start + int(order(fold_in(windows, number), span, offset - start)[0])\n",
        "        place = offset\n",
    ),
    mutant(
        "an epoch is one window",
        "SHUF-020 SHUF-019",
        WINDOW,
        "        window = count\n" + WINDOW,
    ),
    # steps
    mutant(
        "a stage has counted the batch that failed",
        "STEP-012",
        "        finally:\n            self.counts = counts  #",
        "        except KeyError:\n            raise\n        else:\n"
        "            self.counts = counts  #",
    ),
    mutant("the mask keeps its name", "STEP-018", 'options.get("mask_name", MASK)', "MASK"),
    # keys
    mutant(
        "the key of a batch knows no offset",
        "KEYS-007",
        "start.epoch), start.offset))",
        "start.epoch), 0))",
    ),
    mutant(
        "the pipeline's rngs win",
        "KEYS-010",
        "for rngs in (part, whole):",
        "for rngs in (whole, part):",
    ),
    mutant(
        "the default stream wins",
        "KEYS-010",
        'for wanted in (stream, "default"):',
        'for wanted in ("default", stream):',
    ),
    mutant(
        "keys are drawn",
        "KEYS-011",
        '[0 for _ in self.options.get("rngs"',
        '[len(self.plan.order) for _ in self.options.get("rngs"',
    ),
    mutant("the last two words count", "KEYS-012", "(seed[0], seed[1])", "(seed[-2], seed[-1])"),
    mutant(
        "a stage's rngs advance for each row",
        "KEYS-013",
        '{**batch, "draws": batch["id"] * 0 + np.int32(node.count())}',
        '{**batch, "draws": batch["id"] * 0 + np.int32(node.count() * len(batch["id"]))}',
    ),
    mutant("a lambda keeps its brackets", "KEYS-014", '.strip("<>_") or', ".strip() or"),
    mutant(
        "repeated names count on without a line",
        "KEYS-014",
        'name = f"{plain}_{k}"',
        'name = f"{plain}{k}"',
    ),
    mutant(
        "over random access the position is in the keys",
        "KEYS-015",
        "fold_in(in_epoch, self.fetched.records)",
        "fold_in(in_epoch, self.fetched.records + self.fetched.epochs * (type("
        "self.stream.source) is RandomAccess))",
    ),
    # graphs
    mutant(
        "stages are listed as declared",
        "DAG-012",
        "return list(self.plan.order)\n\n    def ask_specs",
        "return list(self.program.nodes)\n\n    def ask_specs",
    ),
    mutant(
        "stages of a chain are numbered",
        "DAG-014 KEYS-014",
        "        names.append(name)\n",
        '        names.append(f"stage_{len(names)}")\n',
    ),
    mutant(
        "a chain is run backwards",
        "DAG-014",
        "sink=names[-1])",
        "sink=names[-1]) if len(names) > 9 else dataclasses.replace(program, "
        "nodes=dict(zip(names, list(nodes.values())[::-1])), edges=edges, sink=names[-1])",
    ),
    mutant(
        "Equinox modules are passed over",
        "DAG-015",
        "            apply = stage(self.program.nodes[name])\n",
        "            apply = stage(self.program.nodes[name])\n"
        '            if self.options.get("kinds", {}).get(name) == "equinox":\n'
        "                apply = lambda node, batch: batch\n",
    ),
    mutant(
        "predecessors come backwards",
        "DAG-016",
        "inputs = [made[before] for before in self.plan.edges[name]]",
        "inputs = [made[before] for before in self.plan.edges[name][::-1]]",
    ),
    mutant(
        "the override is passed over at the start of an epoch",
        "DAG-017",
        'if self.options.get("override"):',
        'if self.options.get("override") and fetched.start.offset:',
    ),
    mutant(
        "a spec is that of a row",
        "DAG-018",
        "[str(x.dtype), *x.shape] for name",
        "[str(x.dtype), *x.shape[1:]] for name",
    ),
    mutant(
        "looking at the graph counts as a batch",
        "DAG-019",
        "        self.next_batch(stay=False)  # a stage that does not fit fails here, and nothing "
        "moves\n\n    def get_state",
        "        self.next_batch(stay=False)\n        self.counts = self.after\n\n"
        "    def get_state",
    ),
    mutant(
        "axis names are bound stage by stage",
        "DAG-020",
        "            inputs = [made[before] for before in self.plan.edges[name]]\n",
        "            self.axes = {}\n"
        "            inputs = [made[before] for before in self.plan.edges[name]]\n",
    ),
    mutant(
        "an operator without randomness gets a key", "DAG-021", '"keyed": none', '"keyed": none + 1'
    ),
    mutant(
        "the keys of elements are those of places",
        "DAG-021",
        ELEMENTS,
        ELEMENTS.replace("node.keys", "node.keys[::-1]"),
    ),
    mutant("an element is updated in place", "DAG-022", '"was": batch["x"]', '"was": made["x"]'),
    mutant(
        "predecessors are not shown", "DAG-023", '", ".join(self.plan.edges.get(name, []))', '""'
    ),
    mutant("shapes are not shown", "DAG-023", "[{','.join(map(str, shape))}]", ""),
    # states
    mutant(
        "a state says more than its table",
        "STATE-016",
        '        "fingerprint": fingerprint(stream),\n',
        '        "fingerprint": {**fingerprint(stream), "size": stream.program.batch_size * 0},\n',
    ),
    mutant(
        "a state is taken as bytes only",
        "STATE-017",
        "        state = json.dumps(state) if isinstance(state, Mapping) else state\n",
        "        state = state.decode()\n",
    ),
    mutant(
        "the field that differs is not named",
        "STATE-018",
        'raise Refused("state", field=name, state=there, pipeline=here)',
        'raise Refused("state", field="fingerprint", state=there, pipeline=here)',
    ),
    mutant(
        "half a record is a place",
        "STATE-019",
        "        if not all(type(number) is int for number in cursor.values()):\n",
        "        if False:\n",
    ),
    mutant(
        "the stages of a malformed state are taken over",
        "STATE-019",
        '    cursor = Cursor(**state["cursor"])\n',
        "    stream.states = dict.fromkeys(stream.states, 7)\n"
        '    cursor = Cursor(**state["cursor"])\n',
    ),
    mutant(
        "the columns are in the state",
        "STATE-020 STATE-016",
        '        "variables": variables,\n',
        '        "variables": variables,\n'
        '        "data": [np.asarray(x).tolist() for x in stream.program.columns.values()],\n',
    ),
    mutant(
        "the NNX way forgets the stages",
        "STATE-021",
        'Cursor(*saved["cursor"]), saved["states"]',
        'Cursor(*saved["cursor"]), dict(self.states)',
    ),
    mutant(
        "a copy begins anew",
        "STATE-022",
        TWIN,
        TWIN.replace("        return", "        twin.cursor = Cursor(0, 0)\n        return"),
    ),
    mutant("a copy is the same object", "STATE-022", TWIN, "        return self\n"),
    # scans
    mutant(
        "half a batch is rounded",
        "SCAN-017",
        "(type(length) is not int or length < 0)",
        "not isinstance(length, (int, float))",
    ),
    mutant(
        "a scan returns running sums",
        "SCAN-011",
        "outs.append(total if carry is not None else here)",
        "outs.append(total + here)",
    ),
    mutant(
        "a scan may reach anything",
        "SCAN-018",
        '        if fn == "captures":\n',
        "        if False:\n",
    ),
    mutant(
        "the carry is not passed on",
        "SCAN-012",
        "            total = total + here\n",
        "            total = np.float32(carry or 0) + here\n",
    ),
    mutant("modules of a scan are copies", "SCAN-013", "        self.counted = counted\n", ""),
    mutant(
        "batches fetched together come in another order",
        "SCAN-019",
        "[self.step() for _ in range(length)]:",
        "[self.step() for _ in range(length)][:: -1 if fetch else 1]:",
    ),
    mutant(
        "half a batch may be fetched",
        "SCAN-019",
        "type(count) is not int or count < 1",
        "count < 1",
    ),
    mutant(
        "every scan is traced",
        "SCAN-014",
        "        self.traced |= {(fn, length, unroll, fetch)}\n",
        "",
    ),
    mutant(
        "new functions are taken for the first",
        "SCAN-015",
        "* k for k in range(n)]",
        "* 0 for k in range(n)]",
    ),
    mutant(
        "functions of scans are kept",
        "SCAN-015",
        '"""How many of those functions are still alive."""\n        return 0\n',
        '"""How many of those functions are still alive."""\n        return 24\n',
    ),
    mutant(
        "a scan has the gradient of its first batch",
        "SCAN-016",
        'twin.scan(length)["x"]',
        'twin.step()["x"]',
    ),
    # errors
    mutant(
        "errors are no ValueErrors", "ERR-022", '"is_value_error": True', '"is_value_error": False'
    ),
    mutant(
        "errors have one class",
        "ERR-022",
        'CLASSES.get(error.code, "DataraxError")',
        '"DataraxError"',
    ),
    mutant(
        "an error is its code",
        "ERR-023",
        '    text = f"{error.code} {details}: {cause}"\n',
        "    text = error.code\n",
    ),
    mutant(
        "a chain wins over a graph",
        "ERR-024",
        '            if options.get("graph_too"):\n',
        "            if False:\n",
    ),
    mutant("the cause is lost", "ERR-025", "cause=error", "cause=None"),
    mutant(
        "a stage may return anything",
        "ERR-026",
        'raise TypeError(f"a stage returns a dict of arrays, got {what}")',
        "return batch",
    ),
    mutant(
        "a stage may want anything and hold anything",
        "ERR-027 ERR-032",
        'raise TypeError("a stage that cannot be called so")',
        "return batch",
    ),
    mutant(
        "a pipeline may be anywhere",
        "ERR-036",
        'raise TypeError("a part with a place of its own")',
        "return batch",
    ),
    mutant(
        "a mask may be anything",
        "ERR-028",
        'sink[self.mask].dtype != bool or sink[self.mask].shape != sink["id"].shape',
        "False",
    ),
    mutant(
        "arrays are a source",
        "ERR-033",
        '    raise Refused("source-type")\n',
        "    return Rows(program, options)\n",
    ),
    mutant(
        "a seed that nobody chose",
        "ERR-030",
        "                    return base_words(rngs[wanted])\n"
        '        raise Refused("rngs", node=name)\n',
        "                    return base_words(rngs[wanted])\n        return 0, 0\n",
    ),
    # meshes
    mutant(
        "each device counts for itself",
        "MESH-001",
        "        count = size\n",
        "        count = size // self.parts\n",
    ),
    mutant(
        "the devices have the rows in turn",
        "MESH-002",
        "ids if rest else ids[i * each : (i + 1) * each]",
        "ids if rest else ids[i :: self.parts]",
    ),
    mutant(
        "a short batch is on the first device",
        "MESH-002",
        "[ids if rest else",
        "[ids * (i == 0) if rest else",
    ),
    mutant("every process reads all", "MESH-003", "np.flatnonzero(owner == i)", "records"),
    mutant("processes may differ", "MESH-006", 'return ["sharding", of]', "return [None, of]"),
    mutant(
        "an uneven split is taken",
        "MESH-004",
        "not isinstance(self.parts, int) or size % self.parts",
        "not isinstance(self.parts, int)",
    ),
    mutant(
        "any sharding is taken",
        "MESH-004",
        "        if not isinstance(self.parts, int) or size % self.parts:\n",
        "        self.parts = self.parts if isinstance(self.parts, int) else 2\n"
        "        if size % self.parts:\n",
    ),
    Mutant(
        "a state is of one mesh",
        ["MESH-005"],
        [
            (
                '"counts": self.counts}\n        return json.dumps(state)',
                '"counts": self.counts, "parts": self.parts}\n        return json.dumps(state)',
            ),
            (
                '        self.cursor, self.counts = Cursor(*saved["cursor"]), saved["counts"]\n',
                '        if saved["parts"] != self.parts:\n'
                '            raise Refused("state", field="mesh")\n'
                '        self.cursor, self.counts = Cursor(*saved["cursor"]), saved["counts"]\n',
            ),
        ],
    ),
]
