"""An adapter to start from: replace the body of `Stream` by the calls of your engine.

Check it with `datarax-conformance run THIS_FILE:Adapter`.
"""

import numpy as np


class Stream:
    """One pipeline of your engine. Methods of profiles that you do not claim may be left out."""

    def __init__(self, program):
        # program.columns: dict of NumPy arrays, one row for each record
        # program.batch_size
        # program.last_batch: "keep", "drop" or "pad"
        # program.seed: None is the stored order
        if program.last_batch != "keep" or program.seed is not None:
            raise NotImplementedError("this engine neither drops, pads nor shuffles yet")
        self.columns, self.size = program.columns, program.batch_size
        self.count = len(next(iter(self.columns.values())))
        self.epoch = self.place = 0

    def __iter__(self):
        return self.rest_of(self.epoch)

    def rest_of(self, epoch):
        # the rest of an epoch, in batches: dicts of arrays; nothing once the stream has left it
        while self.epoch == epoch:
            rows = slice(self.place, self.place + self.size)
            self.place = rows.stop if rows.stop < self.count else 0
            self.epoch += self.place == 0
            yield {name: np.array(column[rows]) for name, column in self.columns.items()}


class Adapter:
    name = "my-engine"
    version = "0"
    spec = "0.1"  # the version of the spec that you mean to follow
    # Profiles that you claim, of: step, iter, shuffle.valid, shuffle.exact, resume, dag, errors,
    # scan, jax.
    capabilities = frozenset(["iter"])
    # What your engine lacks within these profiles, and why; such cases are UNSUPPORTED.
    # limits = {"last_batch pad": "no batches with a mask", "records *": "data are held in memory"}

    def build(self, program, ops):
        return Stream(program)

    def classify(self, exc):
        # the spec's code for an exception of your engine, and the names it gives:
        # ("cycle", {"nodes": [...]})
        return "unclassified", {}
