"""A small pipeline engine in NumPy, written from the prose of the spec to be read, not to be fast.

It shares no code with the oracle in the spec's Python blocks, so that a stored value on which both
agree has two producers.
"""

from __future__ import annotations

import functools
import json
import zlib

import numpy as np

WORD = 0xFFFFFFFF


class Refused(Exception):
    def __init__(self, code, message, **details):
        super().__init__(message)
        self.code, self.details = code, details


# Keys (KEYS-001 … KEYS-007)


def rotate(word, by):
    return ((word << by) | (word >> (32 - by))) & WORD


def threefry(key, counter):
    schedule = [key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA]
    left, right = (counter[0] + key[0]) & WORD, (counter[1] + key[1]) & WORD
    for block in range(5):
        for by in ((13, 15, 26, 6), (17, 29, 16, 24))[block % 2]:
            left = (left + right) & WORD
            right = rotate(right, by) ^ left
        left = (left + schedule[(block + 1) % 3]) & WORD
        right = (right + schedule[(block + 2) % 3] + block + 1) & WORD
    return left, right


def fold_in(key, number):
    return threefry(key, (number >> 32, number & WORD))


def node_key(seed, name):
    return fold_in((0, seed), zlib.crc32(name.encode("utf-8")))


# Order (SHUF-012, SHUF-013)


def mix(word):
    word = (word ^ (word >> 16)) * 0x85EBCA6B & WORD
    word = (word ^ (word >> 13)) * 0xC2B2AE35 & WORD
    return word ^ (word >> 16)


def shuffled(seed, epoch, count):
    """The records of an epoch, in order."""
    epoch_key = fold_in(node_key(seed, "source"), epoch)
    place = np.arange(count, dtype=np.int64)
    for number in range(24):
        first, second = fold_in(epoch_key, number)
        partner = (first % count - place) % count
        larger = np.maximum(place, partner)
        place = np.where(mix(larger.astype(np.uint64) ^ second) >> 31 == 1, partner, place)
    return place


@functools.lru_cache
def rounds(seed, epoch):
    epoch_key = fold_in(node_key(seed, "source"), epoch)
    return [fold_in(epoch_key, number) for number in range(24)]


def record_at(seed, epoch, count, place):
    """The record at one place, in numbers of any size, also for 2**32 records (SHUF-014)."""
    for first, second in rounds(seed, epoch):
        if count < 2**32:
            partner, chosen = (
                (first - place) % count,
                lambda larger, salt=second: mix(larger ^ salt) >> 31,
            )
        else:
            partner = ((first << 32 | second) - place) % count
            chosen = lambda larger, salt=second << 32 | first: mix_wide(larger ^ salt) >> 63  # noqa: E731
        place = partner if chosen(max(place, partner)) else place
    return place


def mix_wide(word):
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return word ^ (word >> 31)


# Graph (chapter 50, and ERR-003 … ERR-017)


def in_order(nodes, edges, sink):
    """The names of the nodes, every one after its predecessors."""
    if not nodes:
        raise Refused("no-nodes", "a graph needs nodes")
    for name in nodes:
        if name in ("", "source") or name[0] == "_":
            raise Refused("node-name", f"no node is called {name!r}", name=name)
        if name not in edges:
            raise Refused("missing-edges", f"{name} has no entry in the edges", node=name)
    for name, before in edges.items():
        if name not in nodes:
            raise Refused("edges-without-node", f"{name} is not a node", name=name)
        if isinstance(before, str):
            raise Refused("predecessors-type", f"the predecessors of {name} are no list", node=name)
        for other in before:
            if other == name:
                raise Refused("self-loop", f"{name} reads itself", node=name)
            if other != "source" and other not in nodes:
                raise Refused("unknown-predecessor", f"{name} reads {other}", node=name, name=other)
    if sink not in nodes:
        raise Refused("unknown-sink", f"{sink} is not a node", name=sink)
    done = []
    waiting = list(nodes)
    while waiting:
        ready = [n for n in waiting if all(p == "source" or p in done for p in edges[n])]
        if not ready:
            cycle = find_cycle(waiting, edges)
            raise Refused("cycle", " -> ".join(cycle), nodes=cycle)
        done += ready
        waiting = [n for n in waiting if n not in ready]
    used, todo = set(), [sink]
    while todo:
        name = todo.pop()
        if name not in used and name != "source":
            used.add(name)
            todo += edges[name]
    for name in nodes:
        if name not in used:
            raise Refused("unused-node", f"{name} does not lead to {sink}", node=name)
    return done


def find_cycle(waiting, edges):
    # Every waiting node waits for another one, so walking back must come to a node a second time.
    path = [waiting[0]]
    while True:
        back = next(p for p in edges[path[0]] if p in waiting)
        if back in path:
            return [back, *path[: path.index(back) + 1]]
        path.insert(0, back)


class Naive:
    """A stream of batches: it remembers the place (epoch, offset) and the state of the stages."""

    def __init__(self, columns, batch_size, last_batch, seed, nodes, edges, sink, ops):
        self.columns = dict(columns)
        self.size, self.policy, self.seed, self.ops = batch_size, last_batch, seed, ops
        self.nodes, self.edges, self.sink = dict(nodes), dict(edges), sink
        self.check()
        self.order = in_order(nodes, edges, sink) if self.has_graph else []
        self.stages = {name: ops(text) for name, text in self.nodes.items()}
        self.memory = {name: dict(stage.state) for name, stage in self.stages.items()}
        self.epoch, self.offset = 0, 0
        self.records = (None, None)
        self.try_out()

    @property
    def has_graph(self):
        return bool(self.nodes or self.edges or self.sink is not None)

    def check(self):
        for name, column in self.columns.items():
            if column.dtype.kind not in "biufc" or column.ndim == 0:
                raise Refused("field-type", f"{name} is no column of numbers", field=name)
        lengths = {len(column) for column in self.columns.values()}
        if not lengths or 0 in lengths:
            raise Refused("empty-source", "there are no records")
        if len(lengths) > 1:
            raise Refused("unequal-lengths", f"columns of {sorted(lengths)} rows")
        self.count = lengths.pop()
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise Refused("batch-size", f"{self.size!r} is no batch size")
        if self.policy not in ("keep", "drop", "pad"):
            raise Refused("last-batch", f"{self.policy!r} is no policy")
        if self.policy == "drop" and self.count < self.size:
            raise Refused("last-batch", "no batch is ever whole")
        if self.policy == "pad" and "mask" in self.columns:
            raise Refused("mask-name", "`mask` is the field of the mask")

    def try_out(self):
        """Runs a batch through the graph and keeps no state. Stages that do not fit raise here."""
        memory = self.memory
        batch = self.through([(0, 0)] * self.size, [])
        self.memory = memory
        return batch

    # The stream

    def record(self, epoch, offset):
        if self.seed is None:
            return offset
        if self.count > 2**24:
            return record_at(self.seed, epoch, self.count, offset)
        if self.records[0] != epoch:
            self.records = (epoch, shuffled(self.seed, epoch, self.count).tolist())
        return self.records[1][offset]

    def settle(self):
        if self.offset == self.count or (
            self.policy == "drop" and self.offset + self.size > self.count
        ):
            self.epoch, self.offset = self.epoch + 1, 0

    def take(self, short):
        """The next batch; a `short` one may end with the epoch."""
        self.settle()
        epoch, offset = self.epoch, self.offset
        places, padding = [], 0
        while len(places) + padding < self.size:
            if offset < self.count:
                places.append((epoch, offset))
                offset += 1
            elif self.policy == "pad":
                padding += 1
            elif short:
                break
            else:
                epoch, offset = epoch + 1, 0
        batch = self.through(places, [None] * padding)
        self.epoch, self.offset = epoch, offset
        self.settle()
        return batch

    def through(self, places, padding):
        records = [self.record(epoch, offset) for epoch, offset in places]
        source = {}
        for name, column in self.columns.items():
            source[name] = np.zeros((len(places) + len(padding), *column.shape[1:]), column.dtype)
            source[name][: len(places)] = column[np.array(records, np.int64)]
        mask = np.arange(len(places) + len(padding)) < len(places)
        if self.policy == "pad":
            source["mask"] = mask
        if not self.has_graph:
            return source
        results, memory = {"source": source}, {}
        for name in self.order:
            stage, inputs = self.stages[name], [results[p] for p in self.edges[name] or ["source"]]
            keys = [self.keys(name, places, records)] if stage.keys else []
            try:
                results[name], memory[name] = stage.run(
                    stage.params, self.memory[name], *map(dict, inputs), *keys
                )
                self.check_batch(results[name])
            except Exception as exc:
                raise Refused("stage", f"{name}: {exc!r}", node=name) from exc
        batch = dict(results[self.sink])
        if self.policy == "pad" and batch.setdefault("mask", mask).dtype != bool:
            raise Refused("stage", "the mask is spoilt", node=self.sink)
        self.memory = memory
        return batch

    def check_batch(self, batch):
        if not isinstance(batch, dict) or len({len(field) for field in batch.values()}) != 1:
            raise TypeError("a stage returns a dict of arrays with one number of rows")

    def keys(self, name, places, records):
        own = node_key(self.seed, name)
        pairs = [fold_in(fold_in(own, e), r) for (e, _), r in zip(places, records, strict=True)]
        return np.array(pairs, np.uint32)

    # The ways to consume it

    def step(self):
        return self.take(short=False)

    def __iter__(self):
        return self.rest_of(self.epoch)

    def rest_of(self, epoch):
        while self.epoch == epoch:
            yield self.take(short=True)

    def __len__(self):
        return self.count // self.size if self.policy == "drop" else -(-self.count // self.size)

    def scan(self, length):
        if length is None:
            left = self.count - self.offset
            if self.policy == "keep" and left % self.size:
                raise Refused("last-batch", f"{left} records are not a whole number of batches")
            length = left // self.size if self.policy == "drop" else -(-left // self.size)
        if length == 0:
            return {name: np.zeros((0, *f.shape), f.dtype) for name, f in self.try_out().items()}
        batches = [self.step() for _ in range(length)]
        return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}

    # State (chapter 60)

    def fingerprint(self):
        columns = {n: [str(c.dtype), list(c.shape[1:])] for n, c in sorted(self.columns.items())}
        edges = sorted([name, list(before) or ["source"]] for name, before in self.edges.items())
        graph = [sorted(self.nodes), edges, self.sink]
        return {"length": self.count, "columns": columns, "seed": self.seed, "graph": graph}

    def get_state(self):
        state = {"epoch": self.epoch, "offset": self.offset, "stages": self.memory}
        return json.dumps({**state, "fingerprint": self.fingerprint()}).encode()

    def set_state(self, state):
        try:
            state = json.loads(state)
        except ValueError as exc:
            raise Refused("state", f"these bytes are no state: {exc}", field="form") from exc
        ours = json.loads(json.dumps(self.fingerprint()))
        for field, theirs in state["fingerprint"].items():
            if theirs != ours[field]:
                raise Refused(
                    "state", f"{field} is {ours[field]}, the state has {theirs}", field=field
                )
        self.epoch, self.offset, self.memory = state["epoch"], state["offset"], state["stages"]
        self.settle()
