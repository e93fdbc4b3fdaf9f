"""The stages and sources of profile jax, as the reference's users write them."""

import functools
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TypedDict

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Shaped

from datarax import Pipeline
from datarax.operators import ElementOperator, ElementOperatorConfig
from datarax.sources import (
    ArrowSource,
    ArrowSourceConfig,
    Blocks,
    EagerSourceBase,
    IterableSource,
    IterableSourceConfig,
    MemorySource,
    MemorySourceConfig,
    MixDataSourcesConfig,
    MixDataSourcesNode,
    RandomAccessSource,
    RandomAccessSourceConfig,
    StreamingDiskSource,
    StreamingDiskSourceConfig,
)


def sharding_of(mesh):
    """A sharding of the rows over `mesh` devices, or one of another kind, or no sharding."""
    if mesh == "word":
        return "data"
    kind = AxisType.Explicit if mesh == "explicit" else AxisType.Auto
    count = mesh if isinstance(mesh, int) else 2
    devices = jax.devices()[:count]
    grid = jax.make_mesh((count,), ("data",), axis_types=(kind,), devices=devices)
    return NamedSharding(grid, PartitionSpec(*[None] * (mesh == "columns"), "data"))


@functools.cache  # two cases ask for it, and its processes take seconds to start
def job(processes, *words):
    """What each process of a job prints; see `datarax_reference_job.py`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = str(Path(__file__).with_name("datarax_reference_job.py"))
    job = [
        subprocess.Popen([sys.executable, script, *map(str, words)], stdout=subprocess.PIPE)
        for words in ((port, i, processes, *words) for i in range(processes))
    ]
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in job]


class Stage(nnx.Module):
    """An operation of the vocabulary as an NNX module, which holds its parameters and state."""

    def __init__(self, op):
        self.run = op.run
        self.params = nnx.Dict({name: nnx.Param(jnp.float32(v)) for name, v in op.params.items()})
        self.memory = nnx.Dict({name: nnx.Variable(jnp.int32(v)) for name, v in op.state.items()})

    def __call__(self, *batches):
        params = {name: param[...] for name, param in self.params.items()}
        memory = {name: variable[...] for name, variable in self.memory.items()}
        batch, memory = self.run(params, memory, *batches)
        for name, value in memory.items():
            self.memory[name][...] = value
        return batch


class Keys(Stage):
    def __call__(self, *batches, keys):
        batch, _ = self.run({}, {}, *batches, jax.random.key_data(keys))
        return batch


class Equinox(eqx.Module):
    """An operation as an Equinox module. Its parameters are array fields."""

    a: jax.Array
    b: jax.Array
    run: object = eqx.field(static=True)

    def __call__(self, *batches):
        return self.run({"a": self.a, "b": self.b}, {}, *batches)[0]


class Draws(nnx.Module):
    """A stage with its own generator. It shows how often it has drawn."""

    def __init__(self):
        self.rngs = nnx.Rngs(7)

    def __call__(self, batch):
        self.rngs.default()
        drawn = self.rngs.default.count[...].astype(jnp.int32)
        return {**batch, "draws": jnp.full_like(batch["id"], drawn)}


def key(batch, *, key):
    words = jax.random.key_data(key)
    return {**batch, "key": jnp.broadcast_to(words, (batch["id"].shape[0], 2))}


def keys(*batches, keys):
    return {**batches[0], "keys": jax.random.key_data(keys)}


def both_keys(batch, *, key, keys):
    return batch


def fails(batch):
    raise ZeroDivisionError("broken")


def captures():
    held = nnx.Param(jnp.float32(3))
    return lambda batch: {**batch, "x": batch["x"] * held[...]}


class Inner(nnx.Module):
    """A stage that steps its own pipeline."""

    def __init__(self):
        source = MemorySource(MemorySourceConfig(), {"x": np.arange(4)})
        self.inner = Pipeline(source=source, batch_size=2)

    def __call__(self, batch):
        return {**batch, "other": self.inner.step()["x"]}


def fails_at(record):
    def check(ids):
        if int(record) in np.asarray(ids).tolist():
            raise ZeroDivisionError("broken")
        return np.asarray(ids)

    def stage(batch):
        ids = batch["id"]
        return {**batch, "id": jax.pure_callback(check, jax.ShapeDtypeStruct(ids.shape, ids.dtype),
                                                 ids)}  # fmt: skip

    return stage


def returns(what):
    results = {
        "none": lambda batch: None,
        "array": lambda batch: batch["x"],
        "ragged": lambda batch: {**batch, "x": batch["x"][:1]},
        "number": lambda batch: {**batch, "x": 1.0},
    }
    return results[what]


def mask(what):
    spoilt = {"int": lambda mask: mask.astype(jnp.int32), "short": lambda mask: mask[:1]}
    return lambda batch: {**batch, "mask": spoilt[what](batch["mask"])}


def axes(field, names):
    def stage(batch):
        return batch

    typed = TypedDict("typed", {field: Shaped[jax.Array, names]})
    stage.__annotations__ = {"batch": typed}
    return stage


def element(form, named, rngs, stream):
    """An operator: a function of one element and the key of its record."""

    def plain(element, key):
        x = element.data["x"]
        facts = {"rank": jnp.int32(x.ndim), "keyed": jnp.int32(key is not None)}
        return element.update_data({"x": x * 2, **facts})

    def keyed(element, key):
        return element.update_data({"keys": jax.random.key_data(key)})

    def update(element, key):
        after = element.update_data({"x": element.data["x"] * 2})
        fields = jnp.int32(len(element.data))
        return after.update_data({"was": element.data["x"], "fields": fields})

    fn = {"element": plain, "element-keys": keyed, "update": update}[form]
    if named:
        fn.__name__ = named
    config = ElementOperatorConfig(stochastic=form == "element-keys", stream_name=stream)
    return ElementOperator(config, fn=fn, rngs=rngs)


MADE = {
    "key": lambda: key,
    "draws": Draws,
    "fails": lambda: fails,
    "fails-at": fails_at,
    "returns": returns,
    "both-keys": lambda: both_keys,
    "captures": captures,
    "pipeline": Inner,
    "mask": mask,
    "axes": axes,
}


def form_of(text):
    """Name and arguments of a form such as `fails-at(5)`."""
    name, arguments = re.fullmatch(r"([\w-]+)(?:\(([^()]*)\))?", text).groups()
    return name, arguments.split(",") if arguments else []


def stage(ops, text, kind="nnx", named=None, rngs=None, stream=None):
    """A stage of that form: an NNX module, an Equinox module or a function."""
    name, arguments = form_of(text)
    if name in ("element", "element-keys", "update"):
        return element(name, named, rngs, stream)
    if name in MADE:
        return MADE[name](*arguments)
    op = ops(text)
    if kind == "equinox":
        return Equinox(*(jnp.float32(op.params[name]) for name in "ab"), op.run)
    if kind == "function":
        return renamed(keys if op.keys else lambda *batches: op(*batches), named)
    made = (Keys if op.keys else Stage)(op)
    if named:
        made = type(named, (type(made),), {})(op)
    return made


def renamed(function, name):
    if name is not None:
        function = type(function)(function.__code__, function.__globals__, name,
                                  function.__defaults__, function.__closure__)  # fmt: skip
        function.__kwdefaults__ = keys.__kwdefaults__
    return function


def entry(ops, text):
    """A stage of a chain: `kind:name=form`."""
    head, _, form = text.partition("=")
    kind, _, name = head.partition(":")
    return stage(ops, form, {"class": "nnx", "element": "nnx"}.get(kind, kind), name)


def rngs_of(streams, seed):
    """The user's generator. Its streams have seeds, or keys of another generator."""
    if streams is None:
        return None if seed is None else nnx.Rngs(seed)
    if not streams:
        return None
    given = {
        name: x
        if isinstance(x, int)
        else jax.random.wrap_key_data(np.array(x, np.uint32), impl="rbg")
        for name, x in streams.items()
    }
    return nnx.Rngs(**given)


def flat(batch, prefix=""):
    """Nested fields by their paths."""
    found = {}
    for name, x in batch.items():
        found |= flat(x, f"{prefix}{name}.") if isinstance(x, dict) else {prefix + name: x}
    return found


# Sources.


class Gather(EagerSourceBase):
    """A source with only a length and a gather."""

    def __init__(self, columns, **options):
        super().__init__(**options)
        self.columns = nnx.Dict({name: nnx.Variable(jnp.asarray(x)) for name, x in columns.items()})

    def __len__(self):
        return len(self.columns["id"][...])

    def gather(self, records):
        return {name: x[...][records] for name, x in self.columns.items()}


class Numbers(EagerSourceBase):
    """Columns that count from 0: a source without data."""

    def __init__(self, columns, **options):
        super().__init__(**options)
        self.length = len(next(iter(columns.values())))
        self.types = tuple((name, str(column.dtype)) for name, column in columns.items())

    def __len__(self):
        return self.length

    def gather(self, records):
        return {name: records.astype(dtype) for name, dtype in self.types}


class RandomAccess(nnx.Module):
    """A source with only `get_batch_at`. Its rows show the arguments; past the end they are -1."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def get_batch_at(self, start, batch_size, key):
        ids = start.astype(jnp.int32) + jnp.arange(batch_size, dtype=jnp.int32)
        if self.length is not None:
            ids = jnp.where(ids < self.length, ids, -1)
        words = jax.random.key_data(key)
        return {"id": ids, "key": jnp.broadcast_to(words, (batch_size, 2))}


class Endless(nnx.Module):
    length = None
    get_batch_at = RandomAccess.get_batch_at


class Records:
    """Rows that are read one by one, with a delay. Reading a record in `bad` fails."""

    def __init__(self, columns, bad, delay):
        self.columns, self.bad, self.delay = columns, set(bad), delay

    def __len__(self):
        return len(self.columns["id"])

    def __getitem__(self, record):
        time.sleep(self.delay)
        if record in self.bad:
            raise OSError(f"record {record} is broken")
        return {name: column[record] for name, column in self.columns.items()}


def written(columns, damage):
    """Writes the columns as `.npy` files in a new folder, damages them, and returns the path."""
    folder = Path(tempfile.mkdtemp(prefix="datarax"))
    for name, column in columns.items():
        np.save(folder / f"{name}.npy", column)
    path = folder / "id.npy"
    if damage == "missing":
        return folder / "none" / "id.npy"
    if damage == "text":
        path.write_text("hello")
    elif damage == "pickled":
        np.save(path, np.array([{"a": 1}] * len(columns["id"]), object), allow_pickle=True)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "grown":
        path.write_bytes(path.read_bytes() + b"more")
    return folder if damage in (None, "grown") else path


def data_in(columns, form):
    """The columns in one of the forms in which a user may give data in memory."""
    if form == "nested":
        rest = {name: x for name, x in columns.items() if name != "id"}
        return {"id": columns["id"], "inner": rest}
    if form == "records":
        return [{name: x[i] for name, x in columns.items()} for i in range(len(columns["id"]))]
    return columns["id"] if form == "array" else columns


def storage(columns, options, shuffle):
    if "unreadable" in options or "delay" in options:
        rows = Records(columns, options.get("unreadable", ()), options.get("delay", 0))
        rules = {name: options[name] for name in ("on_error", "max_errors") if name in options}
        source = RandomAccessSource(RandomAccessSourceConfig(shuffle=shuffle, **rules), rows)
        object.__setattr__(source.reader, "rows_of", rows)
        return source
    path = written(columns, options.get("damage"))
    return StreamingDiskSource(StreamingDiskSourceConfig(path=path, shuffle=shuffle))


def mixture(columns, options, rngs):
    ends = np.cumsum(options["lengths"])
    sources = []
    for i, end in enumerate(ends):
        part = {name: x[end - options["lengths"][i] : end] for name, x in columns.items()}
        if options.get("differ"):
            part = {"x": np.zeros((len(part["id"]), 3 + i), np.float32)}
        if i in options.get("hosts", ()):
            rows = Records(part, (), 0)
            sources.append(RandomAccessSource(RandomAccessSourceConfig(), rows))
        else:
            sources.append(MemorySource(MemorySourceConfig(), part))
    config = MixDataSourcesConfig(
        num_sources=len(sources), weights=options["weights"], stop=options["stop"]
    )
    return MixDataSourcesNode(config, sources, rngs=rngs)


def source_of(program, options, own):
    """The source that a program's `options` select, with its own generator if `own` gives one."""
    form, columns, rngs = options.get("form", "memory"), program.columns, rngs_of(own, None)
    shuffle = options.get("shuffle", True) if program.seed is not None else False
    if shuffle == "blocks":
        shuffle = Blocks(options["block_size"], options["window"])
    if form == "gather":
        return Gather(columns, shuffle=shuffle, rngs=rngs)
    if form == "random-access":
        return RandomAccess(len(columns["id"]))
    if form == "endless":
        return Endless()
    if form == "storage":
        return storage(columns, options, shuffle)
    if form == "iterable":
        rows = [{name: x[i] for name, x in columns.items()} for i in range(len(columns["id"]))]
        windows = {"shuffle": True, "window": options["window"]} if shuffle else {}
        return IterableSource(IterableSourceConfig(**windows), rows, rngs=rngs)
    if form == "mixture":
        return mixture(columns, options, rngs)
    if form == "package":
        sys.modules["pyarrow"] = None  # as if it were not installed
        try:
            return ArrowSource(ArrowSourceConfig(paths="none.arrow"))
        finally:
            del sys.modules["pyarrow"]
    if form == "none":
        return columns
    if not all(isinstance(column, np.ndarray) for column in columns.values()):
        return Numbers(columns, shuffle=shuffle, rngs=rngs)
    config = MemorySourceConfig(shuffle=shuffle, copy=options.get("copy", False))
    return MemorySource(config, data_in(columns, options.get("data", "dict")), rngs=rngs)
