"""Adapter of the reference, `datarax`."""

import importlib.metadata
import json

import jax
from flax import nnx

from datarax import Pipeline
from datarax.errors import DataraxError
from datarax.sources import MemorySource, MemorySourceConfig


class Stage(nnx.Module):
    def __init__(self, op):
        self.op = op
        self.params = nnx.Dict(
            {name: nnx.Param(jax.numpy.float32(v)) for name, v in op.params.items()}
        )
        self.memory = nnx.Dict(
            {name: nnx.Variable(jax.numpy.int32(v)) for name, v in op.state.items()}
        )

    def __call__(self, *batches):
        params = {name: param[...] for name, param in self.params.items()}
        memory = {name: variable[...] for name, variable in self.memory.items()}
        batch, memory = self.op.run(params, memory, *batches)
        for name, value in memory.items():
            self.memory[name][...] = value
        return batch


class Key(Stage):
    def __call__(self, *batches, keys):
        batch, _ = self.op.run({}, {}, *batches, jax.random.key_data(keys))
        return batch


def stage(op):
    return Key(op) if op.keys else Stage(op)


class Stream:
    def __init__(self, program, ops):
        self.ops = ops
        options = {"batch_size": program.batch_size, "last_batch": program.last_batch}
        if program.seed is not None:
            options["rngs"] = nnx.Rngs(program.seed)
        config = MemorySourceConfig(shuffle=program.seed is not None)
        source = MemorySource(config, program.columns)
        if program.nodes or program.edges or program.sink is not None:
            nodes = {name: stage(ops(form)) for name, form in program.nodes.items()}
            graph = {"nodes": nodes, "edges": program.edges, "sink": program.sink}
            self.pipeline = Pipeline.from_dag(source=source, **graph, **options)
        else:
            self.pipeline = Pipeline(source=source, stages=[], **options)

    def step(self):
        return self.pipeline.step()

    def __iter__(self):
        return iter(self.pipeline)

    def __len__(self):
        return len(self.pipeline)

    @property
    def cursor(self):
        return self.pipeline.cursor

    def seek(self, *, epoch, offset):
        self.pipeline.seek(epoch=epoch, offset=offset)

    def reset(self):
        self.pipeline.reset()

    def replace(self, node, op):
        self.pipeline.nodes[node] = stage(self.ops(op))

    def change(self, node, op):
        for name, value in self.ops(op).params.items():
            self.pipeline.nodes[node].params[name][...] = value

    def jit_steps(self, n):
        return nnx.jit(lambda pipeline: [pipeline.step() for _ in range(n)])(self.pipeline)

    def grad(self, node):
        before = self.pipeline.get_state()
        chosen = nnx.DiffState(0, nnx.All(nnx.Param, nnx.PathContains(node)))
        slopes = nnx.grad(lambda pipeline: pipeline.step()["x"].sum(), argnums=chosen)(
            self.pipeline
        )
        self.pipeline.set_state(before)
        return {path[-1]: leaf[...] for path, leaf in nnx.to_flat_state(slopes)}

    def scan(self, length):
        return self.pipeline.scan(dict, length)

    def get_state(self):
        return json.dumps(self.pipeline.get_state()).encode()

    def set_state(self, state):
        self.pipeline.set_state(state)


class Adapter:
    name = "datarax-reference"
    version = importlib.metadata.version("datarax-reference")
    spec = "0.1"
    capabilities = frozenset(
        ["step", "iter", "shuffle.valid", "shuffle.exact", "resume", "dag", "errors", "scan", "jax"]
    )

    def build(self, program, ops):
        return Stream(program, ops)

    def classify(self, exc):
        if isinstance(exc, DataraxError):
            return exc.code, {
                k: v for k, v in vars(exc).items() if isinstance(v, (str, int, list, tuple))
            }
        return "unclassified", {}
