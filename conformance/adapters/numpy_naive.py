"""Adapter of the naive NumPy engine."""

from naive import Naive, Refused


class Adapter:
    name = "numpy-naive"
    version = "1"
    spec = "0.1"
    capabilities = frozenset(
        ["step", "iter", "shuffle.valid", "shuffle.exact", "resume", "dag", "errors", "scan"]
    )

    def build(self, program, ops):
        return Naive(
            program.columns,
            program.batch_size,
            program.last_batch,
            program.seed,
            program.nodes,
            program.edges,
            program.sink,
            ops,
        )

    def classify(self, exc):
        return (exc.code, exc.details) if isinstance(exc, Refused) else ("unclassified", {})
