"""Adapter of the reference, `datarax`."""

import copy
import gc
import importlib.metadata
import json
import os
import pickle
import weakref

import datarax_reference_parts as parts
import jax
import jax.numpy as jnp
import numpy as np
from datarax_reference_parts import flat, stage
from flax import nnx

from datarax import Pipeline
from datarax._keys import node_key
from datarax._order import SwapOrNot, keys_of, word
from datarax.errors import DataraxError
from datarax.sources import SourceData

if "DATARAX_CONFORMANCE_SHARED" in os.environ:
    # The processes of a run share JAX's compilation cache, which is empty at first.
    jax.config.update("jax_compilation_cache_dir", os.environ["DATARAX_CONFORMANCE_SHARED"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_num_cpu_devices", 4)


class Overriding(Pipeline):
    def __call__(self, batch):
        batch = super().__call__(batch)
        return {**batch, "called": jnp.ones_like(batch["id"])}


def total(*arguments):
    """The function of a scan: the sum of x or, with a module, 3 times that plus its calls."""
    *carry, batch = arguments
    module = carry.pop() if carry and isinstance(carry[-1], nnx.Module) else None
    here = batch["x"].sum()
    if module is not None:
        module.calls[...] += 1
        here = here * module.factor[...] + module.calls[...]
    return (carry[0] + here, carry[0]) if carry else here


class Triple(nnx.Module):
    def __init__(self):
        self.factor, self.calls = nnx.Param(jnp.float32(3)), nnx.Variable(jnp.float32(0))


class Stream:
    def __init__(self, program, ops):
        self.ops, self.program, options = ops, program, dict(program.options)
        self.named = options.get("named") == "functions"
        self.kinds, self.own, self.streams = (
            options.get(name, {}) for name in ("kinds", "rngs_of", "streams")
        )
        self.rngs = parts.rngs_of(options.get("rngs"), program.seed)
        settings = {"batch_size": program.batch_size, "last_batch": program.last_batch}
        if self.rngs is not None:
            settings["rngs"] = self.rngs
        if "mask_name" in options:
            settings["mask_name"] = options["mask_name"]
        if "mesh" in options:
            settings["sharding"] = parts.sharding_of(options["mesh"])
        self.source = parts.source_of(program, options.get("source", {}), self.own.get("source"))
        graph = {}
        if program.nodes or program.edges or program.sink is not None:
            nodes = {name: self.stage(name, form) for name, form in program.nodes.items()}
            graph = {"nodes": nodes, "edges": program.edges, "sink": program.sink}
        if "chain" in options or not graph:
            graph["stages"] = [parts.entry(ops, text) for text in options.get("chain", ())]
        kind = Overriding if options.get("override") else Pipeline
        self.pipeline = kind(source=self.source, **graph, **settings)
        self.modules, self.folds, self.fresh = {}, {}, []

    def stage(self, name, form):
        own = parts.rngs_of(self.own.get(name), None)
        kind = "function" if self.named else self.kinds.get(name, "nnx")
        return stage(self.ops, form, kind, name if self.named else None, own,
                     self.streams.get(name))  # fmt: skip

    def step(self):
        return flat(self.pipeline.step())

    def __iter__(self):
        return map(flat, self.pipeline) if self.program.options else iter(self.pipeline)

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
        self.pipeline.nodes[node] = self.stage(node, op)

    def change(self, node, op):
        for name, value in self.ops(op).params.items():
            self.pipeline.nodes[node].params[name][...] = value

    def jit_steps(self, n):
        return nnx.jit(lambda pipeline: [pipeline.step() for _ in range(n)])(self.pipeline)

    def grad(self, node, length=None):
        def loss(pipeline):
            return (pipeline.step() if length is None else pipeline.scan(dict, length))["x"].sum()

        before = self.pipeline.get_state()
        state = nnx.state(self.pipeline)
        chosen = nnx.DiffState(0, nnx.All(is_float, nnx.PathContains(node)))
        slopes = nnx.grad(loss, argnums=chosen)(self.pipeline)
        nnx.update(self.pipeline, state)
        self.pipeline.set_state(before)
        # The leaves of an Equinox module have numbers, in the order of its fields.
        names = {0: "a", 1: "b"}
        return {names.get(path[-1], path[-1]): value(x) for path, x in nnx.to_flat_state(slopes)}

    def scan(self, length):
        return flat(self.pipeline.scan(dict, length))

    def get_state(self):
        return json.dumps(self.pipeline.get_state()).encode()

    def set_state(self, state):
        self.pipeline.set_state(state)

    def save_nnx(self):
        return pickle.dumps(
            jax.tree.map(
                np.asarray, nnx.to_pure_dict(nnx.state(self.pipeline, nnx.Not(SourceData)))
            )
        )

    def load_nnx(self, state):
        own = nnx.state(self.pipeline, nnx.Not(SourceData))
        nnx.replace_by_pure_dict(own, pickle.loads(state))
        nnx.update(self.pipeline, own)

    def copy(self, how):
        twin = copy.copy(self)
        twin.pipeline = (
            copy.deepcopy(self.pipeline)
            if how == "deepcopy"
            else pickle.loads(pickle.dumps(self.pipeline))
        )
        return twin

    def ask(self, what, **arguments):
        return getattr(self, f"ask_{what}")(**arguments)

    def ask_names(self):
        names = list(self.pipeline.nodes)
        assert [self.pipeline.nodes[name] for name in names] == list(self.pipeline.stages)
        return names

    def ask_specs(self):
        specs = {**self.pipeline.node_specs, "batch": self.pipeline.element_spec}
        return {
            node: {name: [str(x.dtype), *x.shape] for name, x in sorted(flat(spec).items())}
            for node, spec in specs.items()
        }

    def ask_show(self, how):
        forms = {"mermaid": self.pipeline.to_mermaid, "html": self.pipeline._repr_html_}
        return forms[how]() if how in forms else str(self.pipeline)

    def ask_program(self):
        graph, state = nnx.split(self.pipeline)
        return str(jax.make_jaxpr(lambda state: nnx.merge(graph, state).step())(state))

    def ask_order(self, length, seed, epoch, offsets, how):
        def records(epoch, offsets):
            key = node_key(jnp.array([0, seed], jnp.uint32), "source")
            return SwapOrNot(keys_of(key, epoch[None]), length)(offsets)

        with jax.enable_x64(length >= 2**32):
            places = jnp.asarray(offsets, word(length))
            if how == "vmap":
                each = jnp.full(len(offsets), epoch, places.dtype)
                return jax.vmap(records)(each, places[:, None])[:, 0].tolist()
            function = jax.jit(records) if how == "jit" else records
            return function(jnp.asarray(epoch, places.dtype), places).tolist()

    def ask_places(self, length, seed, epoch, records, how):
        key = node_key(jnp.array([0, seed], jnp.uint32), "source")
        order = SwapOrNot(keys_of(key, jnp.array([epoch], jnp.uint32)), length)
        return order.inverse(jnp.asarray(records, word(length))).tolist()

    def ask_read(self, start, n, seed):
        return self.source.get_batch_at(start, n, jax.random.key(seed, impl="threefry2x32"))

    def ask_replay(self, record, epoch):
        nodes = self.pipeline.replay(record, epoch)
        return {f"{node}.{name}": x for node, batch in nodes.items() for name, x in batch.items()}

    def ask_fold(self, fn, length, carry=None, modules=(), unroll=1, fetch=None):
        if fn == "captures":
            held = Triple()
            return self.pipeline.scan(lambda batch: batch["x"].sum() * held.factor[...], length)
        if fn not in self.folds:

            def counted(*arguments):
                counted.traces += 1
                return total(*arguments)

            counted.traces = 0
            self.folds[fn] = counted
        function = self.folds[fn]
        before = function.traces
        given = [self.modules.setdefault(name, Triple()) for name in modules]
        how = {} if carry is None else {"init_carry": jnp.float32(carry)}
        how |= {"unroll": unroll, "fetch": fetch}
        result = self.pipeline.scan(function, length, modules=given, **how)
        found = {"traced": np.array(function.traces > before)}
        if given:
            found["module"] = np.int32(given[0].calls[...])
        if carry is None:
            return {**found, "out": result}
        return {**found, "carry": result[0], "out": result[1]}

    def ask_fresh(self, n):
        def new(k):
            def function(batch):
                return batch["x"].sum() * k

            self.fresh.append(weakref.ref(function))
            return function

        return [float(self.pipeline.scan(new(k), 1)[0]) for k in range(n)]

    def ask_kept(self):
        gc.collect()
        return sum(reference() is not None for reference in self.fresh)

    def ask_counters(self):
        return [int(stream.count[...]) for _, stream in self.rngs.items()]

    def ask_rows(self, how):
        batch = next(iter(self.pipeline)) if how == "for" else self.pipeline.step()
        shards = sorted(batch["id"].addressable_shards, key=lambda shard: shard.device.id)
        return [shard.data.tolist() for shard in shards]

    def ask_reads(self, processes):
        told = parts.job(processes, len(self.source), self.pipeline.batch_size)
        return [process["read"] for process in told]

    def ask_differ(self, of):
        first, second = parts.job(2, len(self.source), self.pipeline.batch_size)
        assert first["differ"] == second["differ"]
        return first["differ"][of]

    def ask_mend(self):
        self.source.reader.rows_of.bad.clear()

    def ask_stats(self):
        stats = self.pipeline.stats()
        return {"waited": stats.waited, "computed": stats.computed}


def is_float(path, leaf):
    """Whether a leaf has a gradient: a float Variable of an NNX module, or a float array."""
    array = leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf
    return hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jnp.floating)


def value(leaf):
    return leaf[...] if isinstance(leaf, nnx.Variable) else leaf


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
        said = {"text": str(exc), "cause": type(exc.__cause__).__name__}
        if isinstance(exc, ImportError):
            return "missing-package", said
        if not isinstance(exc, DataraxError):
            return "unclassified", said
        known = {k: v for k, v in vars(exc).items() if isinstance(v, (str, int, list, tuple, dict))}
        of = {"class": type(exc).__name__, "is_value_error": isinstance(exc, ValueError)}
        return exc.code, {**said, **of, **known}
