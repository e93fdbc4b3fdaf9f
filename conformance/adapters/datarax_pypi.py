"""Adapter of the `datarax` of PyPI, versions 0.1.3 to 0.1.17."""

import importlib.metadata
import inspect
import pickle
import re
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from datarax.pipeline import Pipeline
from datarax.sources import (
    MemorySource,
    MemorySourceConfig,
    MixDataSourcesConfig,
    MixDataSourcesNode,
)


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


class Overriding(Pipeline):
    """A user's pipeline that overrides `__call__`, which gets the batch of the source."""

    def __call__(self, batch):
        batch = super().__call__(batch)
        return {**batch, "called": jnp.ones_like(batch["id"])}


DROPS = "drop_last" in inspect.signature(Pipeline.__init__).parameters


def memory(columns, seed):
    config = MemorySourceConfig(shuffle=seed is not None)
    return MemorySource(config, data=dict(columns), rngs=nnx.Rngs(seed or 0))


def mixture(program, options):
    sources, begin = [], 0
    for length in options["lengths"]:
        part = {name: x[begin : begin + length] for name, x in program.columns.items()}
        sources.append(memory(part, None))
        begin += length
    config = MixDataSourcesConfig(num_sources=len(sources), weights=tuple(options["weights"]))
    return MixDataSourcesNode(config, sources, rngs=nnx.Rngs(program.seed))


class Stream:
    def __init__(self, program, ops):
        options = {"batch_size": program.batch_size, "rngs": nnx.Rngs(program.seed or 0)}
        if program.last_batch == "drop" and DROPS:
            options["drop_last"] = True
        elif program.last_batch != "keep":
            options["last_batch"] = program.last_batch  # an argument that it does not take
        asked = program.options.get("source", {"form": "memory"})
        mixed = asked["form"] == "mixture"
        source = mixture(program, asked) if mixed else memory(program.columns, program.seed)
        kind = Overriding if program.options.get("override") else Pipeline
        if program.nodes or program.edges or program.sink:
            self.ops = ops
            self.nodes = {name: Stage(ops(form)) for name, form in program.nodes.items()}
            self.pipeline = kind.from_dag(
                source=source, nodes=self.nodes, edges=program.edges, sink=program.sink, **options
            )
        else:
            self.pipeline = kind(source=source, stages=[], **options)

    def step(self):
        return self.pipeline.step()

    def __iter__(self):
        return iter(self.pipeline)

    def __len__(self):
        return len(self.pipeline)

    @property
    def cursor(self):
        state = self.pipeline.get_state()
        return state["_epoch"], state["_position"]

    def change(self, node, op):
        for name, value in self.ops(op).params.items():
            self.nodes[node].params[name][...] = jnp.float32(value)

    def jit_steps(self, n):
        return nnx.jit(lambda pipeline: [pipeline.step() for _ in range(n)])(self.pipeline)

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
    limits: ClassVar = {
        "last_batch [!kd]*": "`drop_last` is true or false: there is no other policy",
        "records *": "records and their order are held in memory",
        "last_batch ": "`drop_last` is true or false: there is no other policy",
        "replace": "the stages of a pipeline are fixed",
        "seek": "a pipeline goes to no place but the next epoch",
        "reset": "`reset` starts the next epoch, not the first",
        "grad": "a step inside `nnx.grad` cannot be taken back",
        "ask *": "it has no such question",
        "copy": "a pipeline is not meant to be copied",
        "overwrite": "its source takes no private copy",
        "restore edit": "its states are no JSON",
        "save nnx": "a state is what get_state gives",
        "op key": "stages get no keys",
        "op keys": "stages get no keys",
        "op element*": "operators have another form",
        "op update": "operators have another form",
        "op draws": "stages with a generator of their own are not compared",
        "op fails*": "stages that fail are not compared",
        "op returns": "stages that fail are not compared",
        "op captures": "functions are no stages",
        "op pipeline": "stages that hold a pipeline are not compared",
        "op mask": "there are no batches with a mask",
        "op axes": "annotations of stages are not read",
        "op both-keys": "stages get no keys",
        "source [!m]*": "only sources in memory are compared",
        "source memory": "only sources in memory are compared",
        "option [!o]*": "there is no such setting",
    }
    if not DROPS:
        limits["last_batch drop"] = "there is no policy for the last batch"
    if not hasattr(Pipeline, "__len__"):
        limits["len"] = "a pipeline has no length"
    if not hasattr(Pipeline, "get_state"):
        limits["cursor"] = "it has no place that can be asked"

    def build(self, program, ops):
        return Stream(program, ops)

    def classify(self, exc):
        if isinstance(exc, pickle.UnpicklingError | EOFError):  # from `set_state`, which unpickles
            return "state", {}
        for pattern, code in MESSAGES.items():
            if match := re.search(pattern, str(exc)):
                details = match.groupdict()
                if "nodes" in details:
                    details["nodes"] = re.findall(r"'(.*?)'", details["nodes"])
                return code, details
        return "unclassified", {}
