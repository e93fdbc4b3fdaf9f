"""Adapter of cyreal: an array source and a batch transform, stepped by a compiled `next`."""

import importlib.metadata

import jax
from cyreal.loader import DataLoader
from cyreal.sources import ArraySource
from cyreal.transforms import BatchTransform


class Stream:
    def __init__(self, program):
        self.pad = program.last_batch == "pad"
        ordering = "sequential" if program.seed is None else "shuffle"
        batches = BatchTransform(
            batch_size=program.batch_size,
            drop_last=program.last_batch == "drop",
            pad_last_batch=self.pad,
        )
        self.loader = DataLoader([ArraySource(dict(program.columns), ordering=ordering), batches])
        self.next = jax.jit(self.loader.next)
        self.epoch = jax.jit(
            self.batches, static_argnums=1
        )  # here, so that it compiles once for each length
        self.state = self.loader.init_state(jax.random.key(program.seed or 0))

    def step(self):
        batch, self.state, mask = self.next(self.state)
        return {**batch, "mask": mask} if self.pad else batch

    def batches(self, state, length):
        def body(state, _):
            batch, state, mask = self.loader.next(state)
            return state, {**batch, "mask": mask} if self.pad else batch

        return jax.lax.scan(body, state, length=length)

    def scan(self, length):
        if length is None:
            length = self.loader.steps_per_epoch

        self.state, batches = self.epoch(self.state, length)
        return batches

    def __len__(self):
        return self.loader.steps_per_epoch


class Adapter:
    name = "cyreal"
    version = importlib.metadata.version("cyreal")
    spec = "0.1"
    capabilities = frozenset(["step", "scan"])

    def build(self, program, ops):
        return Stream(program)

    def classify(self, exc):
        return "unclassified", {}
