"""Adapter of the `datarax` of PyPI, versions 0.1.3 to 0.1.17."""

import importlib.metadata
import inspect
import pickle
import re

import jax.numpy as jnp
from flax import nnx

from datarax.pipeline import Pipeline
from datarax.sources import MemorySource, MemorySourceConfig


class Stage(nnx.Module):
    def __init__(self, op):
        self.op = op
        self.params = nnx.Dict(
            {name: nnx.Param(jnp.float32(value)) for name, value in op.params.items()}
        )
        self.state = nnx.Dict(
            {name: nnx.Variable(jnp.int32(value)) for name, value in op.state.items()}
        )

    def __call__(self, *batches):
        params = {name: param[...] for name, param in self.params.items()}
        state = {name: variable[...] for name, variable in self.state.items()}
        batch, state = self.op.run(params, state, *batches)
        for name, value in state.items():
            self.state[name][...] = value
        return batch


class Stream:
    def __init__(self, program, ops):
        options = {"batch_size": program.batch_size, "rngs": nnx.Rngs(program.seed or 0)}
        if (
            program.last_batch == "drop"
            and "drop_last" in inspect.signature(Pipeline.__init__).parameters
        ):
            options["drop_last"] = True
        elif program.last_batch != "keep":
            raise NotImplementedError(f"last_batch={program.last_batch!r}")
        config = MemorySourceConfig(shuffle=program.seed is not None)
        source = MemorySource(config, data=dict(program.columns), rngs=nnx.Rngs(program.seed or 0))
        if program.nodes or program.edges or program.sink:
            self.ops, self.nodes = (
                ops,
                {name: Stage(ops(form)) for name, form in program.nodes.items()},
            )
            self.pipeline = Pipeline.from_dag(
                source=source, nodes=self.nodes, edges=program.edges, sink=program.sink, **options
            )
        else:
            self.pipeline = Pipeline(source=source, stages=[], **options)

    def step(self):
        return self.pipeline.step()

    def __iter__(self):
        return iter(self.pipeline)

    def __len__(self):
        return len(self.pipeline)

    def change(self, node, op):
        for name, value in self.ops(op).params.items():
            self.nodes[node].params[name][...] = jnp.float32(value)

    def scan(self, length):
        return self.pipeline.scan(dict, length=length)

    def get_state(self):
        return pickle.dumps(self.pipeline.get_state())

    def set_state(self, state):
        self.pipeline.set_state(pickle.loads(state))


MESSAGES = {
    r"batch_size must be at least 1": "batch-size",
    r"the source has no records": "empty-source",
    r"must have the same length": "unequal-lengths",
    r"drop_last.* serves no batch": "last-batch",
    r"state is structurally incompatible": "state",
    r"DAG contains a cycle; could not resolve nodes: (?P<nodes>.*)": "cycle",
    r"sink '(?P<name>.*?)' is not in nodes": "unknown-sink",
    r"edges key '(?P<name>.*?)' is unknown": "edges-without-node",
    r"edges\['(?P<node>.*?)'\] references unknown predecessor\s+"
    r"'(?P<name>.*?)'": "unknown-predecessor",
}


class Adapter:
    name = "datarax-pypi"
    version = importlib.metadata.version("datarax")
    spec = "0.1"
    capabilities = frozenset(
        ["step", "iter", "scan", "shuffle.valid", "dag", "errors", "jax"]
        + (["resume"] if hasattr(Pipeline, "get_state") else [])
    )

    def build(self, program, ops):
        return Stream(program, ops)

    def classify(self, exc):
        for pattern, code in MESSAGES.items():
            if match := re.search(pattern, str(exc)):
                details = match.groupdict()
                if "nodes" in details:
                    details["nodes"] = re.findall(r"'(.*?)'", details["nodes"])
                return code, details
        return "unclassified", {}
