"""Adapter of jax-dataloader, its JAX back end."""

import importlib.metadata

import jax
import jax_dataloader as jdl


class Stream:
    def __init__(self, program):
        if program.last_batch == "pad":
            raise NotImplementedError("batches with a mask")
        self.names = list(program.columns)
        self.loader = jdl.DataLoader(
            jdl.ArrayDataset(*program.columns.values()),
            "jax",
            batch_size=program.batch_size,
            shuffle=program.seed is not None,
            drop_last=program.last_batch == "drop",
            generator=jax.random.PRNGKey(program.seed or 0),
        )

    def __iter__(self):
        for batch in self.loader:
            yield dict(zip(self.names, batch, strict=True))

    def __len__(self):
        return len(self.loader)


class Adapter:
    name = "jax-dataloader"
    version = importlib.metadata.version("jax-dataloader")
    spec = "0.1"
    capabilities = frozenset(["iter", "shuffle.valid"])

    def build(self, program, ops):
        return Stream(program)

    def classify(self, exc):
        return "unclassified", {}
