"""Every fault has a class, a code and a text that says the rule, what came and the way out."""

import inspect
import pickle
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
    Affine,
    Endless,
    add,
    batch_words,
    by_for,
    columns,
    double,
    increment,
    jitter,
    pipeline,
    record_words,
    sharding_of,
    whole,
)
from jax.sharding import AxisType, PartitionSpec

from datarax import Pipeline, errors
from datarax.operators import ElementOperator, ElementOperatorConfig
from datarax.sources import (
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

TABLE = tomllib.loads((Path(__file__).parents[1] / "spec/tables/errors.toml").read_text())["error"]


def memory(data, **config):
    return MemorySource(MemorySourceConfig(**config), data)


def indexed(data, **config):
    return RandomAccessSource(RandomAccessSourceConfig(**config), data)


def stream():
    return IterableSource(IterableSourceConfig(), [{"id": i} for i in range(10)])


def noisy(element, key):
    return element.update_data({"x": element.data["x"] + jax.random.normal(key)})


def second_column(element, key):
    return element.update_data({"x": element.data["x"][:1]})


class Torn:
    """Records of which one cannot be read."""

    def __len__(self):
        return 10

    def __getitem__(self, i):
        if i == 2:
            raise OSError("torn")
        return {"id": i}


def graph(nodes, edges, sink):
    nodes = {name: double for name in nodes} if isinstance(nodes, str) else nodes
    return Pipeline.from_dag(
        source=memory(columns(10)), nodes=nodes, edges=edges, sink=sink, batch_size=4
    )


def padded(stage=whole, **options):
    return pipeline([stage], last_batch="pad", **options)


def reaching():
    """A function that reaches a model and, through another function, a second one."""
    model, other = Affine(1, 0), nnx.Param(jnp.zeros(()))

    def inner(x):
        return x + other[...]

    return lambda batch: inner(model(batch)["x"])


SHAPES = "id int32[4], x float32[4]"
A_HUNDRED = {f"f{i:02}": np.zeros(10) for i in range(100)}
FIRST_SHAPES = ", ".join(f"f{i:02} float32[4]" for i in range(32)) + ", and 68 more"
MASKED = "id int32[4], mask bool[4], x float32[4]"

# code -> cases of (what is done, the text, the attributes)
CASES = {
    "cycle": [
        (
            lambda: graph("abc", {"a": ["b"], "b": ["a"], "c": ["a", "b"]}, "c"),
            "`edges` must not run in a circle, but a -> b -> a does. Remove one of these edges.",
            {"nodes": ["a", "b", "a"]},
        ),
        (
            lambda: graph("abcd", {"d": ["c"], "a": ["c"], "b": ["a"], "c": ["b"]}, "d"),
            "`edges` must not run in a circle, but a -> b -> c -> a does. "
            "Remove one of these edges.",
            {"nodes": ["a", "b", "c", "a"]},
        ),
    ],
    "self-loop": [
        (
            lambda: graph("ab", {"a": [], "b": ["a", "b"]}, "b"),
            "A node must not be its own predecessor, but 'b' is. Remove 'b' from edges['b'].",
            {"node": "b"},
        )
    ],
    "unknown-predecessor": [
        (
            lambda: graph("ab", {"a": [], "b": ["z"]}, "b"),
            "Every predecessor must be a node or 'source', but edges['b'] names 'z'. "
            "Nodes are ['a', 'b'].",
            {"node": "b", "name": "z"},
        ),
        (
            lambda: graph("ab", {"a": [], "b": [["a"]]}, "b"),
            "Every predecessor must be a node or 'source', but edges['b'] names ['a']. "
            "Nodes are ['a', 'b'].",
            {"node": "b", "name": ["a"]},
        ),
    ],
    "unknown-sink": [
        (
            lambda: graph("ab", {"a": [], "b": []}, "z"),
            "`sink` must be one of the nodes ['a', 'b'], got 'z'.",
            {"name": "z"},
        ),
        (
            lambda: graph("a", {"a": []}, "source"),
            "`sink` must be one of the nodes ['a'], got 'source'.",
            {"name": "source"},
        ),
    ],
    "missing-edges": [
        (
            lambda: graph("ab", {"a": []}, "a"),
            "Every node needs an entry in `edges`, but 'b' has none. "
            "Add edges['b'] = [] if it reads the source.",
            {"node": "b"},
        )
    ],
    "edges-without-node": [
        (
            lambda: graph("a", {"a": [], "z": []}, "a"),
            "Every entry of `edges` must belong to a node, but 'z' is not among ['a']. "
            "Add the node or remove the entry.",
            {"name": "z"},
        ),
        (
            lambda: graph("a", {"a": [], "source": []}, "a"),
            "Every entry of `edges` must belong to a node, but 'source' is not among ['a']. "
            "Add the node or remove the entry.",
            {"name": "source"},
        ),
    ],
    "unused-node": [
        (
            lambda: graph("abc", {"a": [], "b": ["a"], "c": ["a"]}, "c"),
            "Every node must lead to the sink 'c', but 'b' does not. Connect it or remove it.",
            {"node": "b"},
        )
    ],
    "no-nodes": [
        (
            lambda: graph({}, {}, "a"),
            "`nodes` must hold at least one node, got none. "
            "For batches straight from the source use Pipeline(stages=[]).",
            {},
        )
    ],
    "predecessors-type": [
        (
            lambda: graph("ab", {"a": [], "b": "a"}, "b"),
            "The predecessors of a node must be a list of names, but edges['b'] is 'a'. "
            "Write edges['b'] = [...].",
            {"node": "b"},
        ),
        (
            lambda: graph("a", {"a": None}, "a"),
            "The predecessors of a node must be a list of names, but edges['a'] is None. "
            "Write edges['a'] = [...].",
            {"node": "a"},
        ),
    ],
    "node-name": [
        (
            lambda: graph({"source": double}, {"source": []}, "source"),
            "A node's name must be a string of valid Unicode that is not empty, is not 'source' "
            "and does not start with '_', got 'source'. Rename the node.",
            {"name": "source"},
        ),
        *(
            (
                lambda name=name: graph({name: double}, {name: []}, name),
                "A node's name must be a string of valid Unicode that is not empty, is not "
                f"'source' and does not start with '_', got {name!r}. Rename the node.",
                {"name": name},
            )
            for name in (3, "", "_a", "\ud800")
        ),
        (
            lambda: graph(
                {"plumless": double, "buckeroo": double},
                {"plumless": [], "buckeroo": ["plumless"]},
                "buckeroo",
            ),
            "The names of two nodes must differ in their CRC-32, from which random keys are "
            "counted, but those of 'buckeroo' and 'plumless' are equal. Rename the node.",
            {"name": "buckeroo"},
        ),
    ],
    "stages-and-nodes": [
        (
            lambda: pipeline([double], nodes={"a": double}, edges={"a": []}, sink="a"),
            "Give either `stages` (a chain) or all of `nodes`, `edges` and `sink` (a graph), "
            "got `stages`, `nodes`, `edges`, `sink`.",
            {},
        ),
        (
            lambda: pipeline(nodes={"a": double}, sink="a"),
            "Give either `stages` (a chain) or all of `nodes`, `edges` and `sink` (a graph), "
            "got `nodes`, `sink`.",
            {},
        ),
    ],
    "batch-size": [
        (
            lambda size=size: pipeline(batch_size=size),
            f"`batch_size` must be an integer in [1, 2**31), got {size!r}.",
            {},
        )
        for size in (0, -3, 2.5, "4", None, True, np.float32(2), 2**31, 2**40)
    ],
    "sharding": [
        (
            lambda: pipeline(sharding="data"),
            "`sharding` must be a NamedSharding, such as "
            "NamedSharding(mesh, PartitionSpec(\"data\")), got 'data'.",
            {},
        ),
        (
            lambda: pipeline(sharding=sharding_of(None, "data")),
            "`sharding` must split the rows of a batch, axis 0, and no other, got "
            f"{PartitionSpec(None, 'data')}.",
            {},
        ),
        (
            lambda: pipeline(sharding=sharding_of("data", kind=AxisType.Explicit)),
            "`sharding` needs a mesh whose axes are all Auto, got (Explicit,): make it with "
            "jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names)).",
            {},
        ),
        (
            lambda: pipeline(batch_size=4, sharding=sharding_of("data", data=3)),
            "`sharding` splits a batch into 3 equal parts, but a `batch_size` of 4, which counts "
            "the rows on all devices, is no multiple of that.",
            {},
        ),
    ],
    "last-batch": [
        (
            lambda: pipeline(last_batch="wrap"),
            '`last_batch` must be "keep", "drop" or "pad", got \'wrap\'.',
            {},
        ),
        (
            lambda: pipeline(last_batch=None),
            '`last_batch` must be "keep", "drop" or "pad", got None.',
            {},
        ),
        (
            lambda: pipeline(length=3, batch_size=4, last_batch="drop"),
            'Under last_batch="drop" an epoch of 3 records holds no batch of 4. '
            'Take a smaller `batch_size`, or "keep" or "pad".',
            {},
        ),
        (
            lambda: pipeline(source=Endless()).scan(whole),
            "How many batches an epoch of this source has is not known beforehand. Give `length` "
            "to scan(step_fn, length); it goes on into the next epoch.",
            {},
        ),
    ],
    "mask-name": [
        (
            lambda: pipeline(
                source=memory({"mask": np.zeros(3), "a": np.zeros(3)}), last_batch="pad"
            ),
            "The mask of a batch needs a field name of its own, but "
            "mask_name='mask' and the data has the fields ['a', 'mask']. "
            "Choose another `mask_name`.",
            {},
        ),
        (
            lambda: pipeline(last_batch="pad", mask_name="x"),
            "The mask of a batch needs a field name of its own, but "
            "mask_name='x' and the data has the fields ['id', 'x']. Choose another `mask_name`.",
            {},
        ),
        (
            lambda: pipeline(
                source=indexed([{"mask": 0.5}] * 3, on_error="mask", max_errors=1), batch_size=2
            ),
            "The mask of a batch needs a field name of its own, but "
            "mask_name='mask' and the data has the fields ['mask']. Choose another `mask_name`.",
            {},
        ),
        (
            lambda: pipeline(last_batch="pad", mask_name=None),
            "The mask of a batch needs a field name of its own, but "
            "mask_name=None and the data has the fields ['id', 'x']. Choose another `mask_name`.",
            {},
        ),
    ],
    "empty-source": [
        (
            lambda data=data: memory(data),
            "A source must hold at least one record, but `data` holds none.",
            {},
        )
        for data in ({}, {"x": np.zeros((0, 3))}, [], np.zeros((0, 2)), {"a": {}})
    ],
    "unequal-lengths": [
        (
            lambda: memory({"x": np.zeros(3), "y": {"z": np.zeros(4)}}),
            "All fields of `data` must have the same number of rows, but got {'x': 3, 'y.z': 4}.",
            {},
        )
    ],
    "field-type": [
        (
            lambda: memory({"x": np.zeros(2), "name": np.array(["a", "bc"])}),
            "Field 'name' has type <U2, which JAX cannot hold. "
            "Encode it as numbers, or leave it out.",
            {"field": "name"},
        ),
        (
            lambda: memory({"deep": {"o": np.array([None, {}])}}),
            "Field 'deep.o' has type object, for None in it, which JAX cannot hold. "
            "Encode it as numbers, or leave it out.",
            {"field": "deep.o"},
        ),
        (
            lambda: memory([{"name": "a"}, {"name": "b"}]),
            "Field 'name' has type <U1, which JAX cannot hold. "
            "Encode it as numbers, or leave it out.",
            {"field": "name"},
        ),
        (
            lambda: memory({"i": np.array([1, 2**31])}),
            "Field 'i' has type int64 and JAX would hold it as int32, but record 1 does not fit. "
            "Convert it yourself, or turn on jax_enable_x64.",
            {"field": "i"},
        ),
        (
            lambda: memory({"f": np.array([[0.0, 1.0], [1e300, 0.0]])}),
            "Field 'f' has type float64 and JAX would hold it as float32, but record 1 does not "
            "fit. Convert it yourself, or turn on jax_enable_x64.",
            {"field": "f"},
        ),
        (
            lambda: memory({"x": 3.5}),
            "Field 'x' must be an array with one row a record, got float.",
            {"field": "x"},
        ),
        (
            lambda: memory({"x": np.zeros(3), "y": None}),
            "Field 'y' must be an array with one row a record, got NoneType.",
            {"field": "y"},
        ),
        (
            lambda: memory({7: np.zeros(3)}),
            "Field '7' must have a string as its name, got 7.",
            {"field": "7"},
        ),
        (
            lambda: memory([{"x": 1}, {"x": 1, "y": 2}]),
            "Field '[1]' must be a dict with the fields of the first record, ['x'], "
            "got {'x': 1, 'y': 2}.",
            {"field": "[1]"},
        ),
        (
            lambda: memory([{"x": 1}, 3]),
            "Field '[1]' must be a dict with the fields of the first record, ['x'], got 3.",
            {"field": "[1]"},
        ),
        (
            lambda: memory([3, {"x": 1}]),
            "Field 'data' has type object, for a dict in it, which JAX cannot hold. "
            "Encode it as numbers, or leave it out.",
            {"field": "data"},
        ),
        (
            lambda: indexed([(1, 2)], fields=("x",)),
            "Field 'x' cannot name the parts of a record: it is a tuple of 2.",
            {"field": "x"},
        ),
        (
            lambda: indexed([1], fields=("x", "y")),
            "Field 'x,y' cannot name the parts of a record: it is a single value.",
            {"field": "x,y"},
        ),
    ],
    "rngs": [
        (
            lambda: pipeline(shuffle=True),
            "'source' draws random numbers and needs a seed: give the pipeline "
            "rngs=nnx.Rngs(seed), or the part `rngs` of its own.",
            {},
        ),
        (
            lambda: pipeline(shuffle="permutation", rngs=nnx.Rngs(params=0)),
            "'source' draws random numbers and needs a seed: give the pipeline "
            "rngs=nnx.Rngs(seed), or the part `rngs` of its own. "
            "It has the streams ['params'], and no 'default'.",
            {},
        ),
        (
            lambda: pipeline([jitter()]),
            "'jitter' draws random numbers and needs a seed: give the pipeline "
            "rngs=nnx.Rngs(seed), or the part `rngs` of its own.",
            {},
        ),
        (
            lambda: pipeline([double, batch_words]),
            "'batch_words' draws random numbers and needs a seed: give the pipeline "
            "rngs=nnx.Rngs(seed), or the part `rngs` of its own.",
            {},
        ),
        (
            lambda: memory(columns(3), shuffle=True).get_batch_at(0, 2),
            "A shuffled source needs `key`, or `rngs` of its own; got neither.",
            {},
        ),
    ],
    "source-type": [
        (
            lambda source=source: Pipeline(source=source, batch_size=4),  # pyright: ignore
            "`source` must be a source (an EagerSourceBase, or an nnx.Module with `get_batch_at`), "
            f"got {got}. For data in memory: MemorySource(MemorySourceConfig(), data).",
            {},
        )
        for source, got in (
            ({"x": np.zeros(3)}, "dict"),
            (np.zeros(3), "ndarray"),
            ([1, 2], "list"),
            (None, "NoneType"),
            (Endless, "the class Endless itself"),
        )
    ],
    "scan-length": [
        (
            lambda length=length: pipeline().scan(whole, length),
            f"`length` must be an integer of at least 0, got {length!r}. "
            "Leave it out to scan to the end of the epoch.",
            {},
        )
        for length in (-1, 2.0, "3", True)
    ],
    "captured": [
        (
            lambda: pipeline().scan(reaching(), 2),
            "`step_fn` must be given the NNX objects that it uses, but reaches ['model', 'other'] "
            "by itself: compiled, it would keep their current values for good. "
            "Pass them in `modules=`, and `step_fn` gets them as arguments. "
            "Read what is not an array before the call.",
            {"names": ["model", "other"]},
        ),
    ],
    "file": [
        (
            lambda: StreamingDiskSource(StreamingDiskSourceConfig(path="/nothing.npy")),
            "File '/nothing.npy' cannot be opened: No such file or directory.",
            {"file": "/nothing.npy"},
        )
    ],
    "read": [
        (
            lambda: Pipeline(source=indexed(Torn()), batch_size=4).step(),
            "Stage 'source': RandomAccessSource could not read record 2 of Torn: "
            "OSError: torn\nThe cursor has not moved, so a retry goes on with this batch. "
            'To go on without such records, give the source on_error="mask" and `max_errors`, '
            "the most of an epoch.",
            {"source": "RandomAccessSource", "file": "Torn", "record": 2, "stage": "source"},
        ),
        (
            lambda: indexed([{"x": 0.5}] * 3, fields=["y"], on_error="mask", max_errors=1),
            "Stage 'source': RandomAccessSource could not read record 0 of list: KeyError: "
            "\"'y' is not among the fields of the record, ['x']\"\n"
            "The first readable record shows the spec of all, and none was found.",
            {"source": "RandomAccessSource", "file": "list", "record": 0, "stage": "source"},
        ),
    ],
    "random-access": [
        (
            lambda: stream().get_batch_at(jnp.uint32(0), 2, None),
            "IterableSource is a stream and gives its records in order, so it cannot be read "
            "inside jit or another transformation. Take batches by `for`, `step` or `scan` "
            "outside of them, or use a source with a length.",
            {},
        ),
        (
            lambda: Pipeline(source=stream(), batch_size=4).replay(0),
            "replay needs a source with `gather`, and IterableSource has none.",
            {},
        ),
    ],
    "specs": [
        (
            lambda: MixDataSourcesNode(
                MixDataSourcesConfig(num_sources=2),
                [memory(np.zeros((4, 2), np.float32)), memory(np.zeros(4, np.int32))],
            ),
            "All sources of a mixture must have records of one spec, but where they differ source "
            "0 has\n  data float32[2]\nand source 1 has\n  data int32[]",
            {},
        ),
        (
            lambda: MixDataSourcesNode(
                MixDataSourcesConfig(num_sources=2),
                [memory({"x": np.ones(4), "y": np.ones(4)}), memory({"x": np.ones(4)})],
            ),
            "All sources of a mixture must have records of one spec, but where they differ source "
            "0 has\n  y float32[]\nand source 1 has\n  nothing of that name",
            {},
        ),
    ],
    "seek": [
        (
            lambda epoch=epoch: pipeline().seek(epoch=epoch),
            f"`epoch` must be an integer in [0, 4294967296), got {epoch!r}.",
            {},
        )
        for epoch in (-1, 2**32, 1.0, "0", None, True)
    ]
    + [
        (
            lambda offset=offset: pipeline().seek(epoch=0, offset=offset),
            f"`offset` must be an integer in [0, 10), got {offset!r}.",
            {},
        )
        for offset in (-1, 10, 0.5)
    ],
    "state": [
        (
            lambda: pipeline().set_state("{}"),
            "The state does not fit this pipeline: 'version' must be 1, got None.",
            {"field": "version"},
        )
    ],
    "stage": [
        (
            lambda: pipeline([ElementOperator(ElementOperatorConfig(), fn=noisy)]),
            "Stage 'noisy' failed: TypeError: unexpected PRNG key type <class 'NoneType'>\n"
            "Its key is None, since it was not built with stochastic=True.\n"
            f"It was called with\n  source: {SHAPES}",
            {"node": "noisy", "predecessors": {"source": SHAPES}},
        ),
        (
            lambda: pipeline([ElementOperator(ElementOperatorConfig(), fn=second_column)]),
            "Stage 'second_column' failed: IndexError: Too many indices: array is 0-dimensional, "
            "but 1 were indexed\n"
            "An operator works on one row at a time, without the axis of rows.\n"
            f"It was called with\n  source: {SHAPES}",
            {"node": "second_column", "predecessors": {"source": SHAPES}},
        ),
        (
            lambda: pipeline([lambda batch, *, rng: batch]),
            "Stage 'lambda' failed: TypeError: a stage is called with batches, and with `key` (one "
            "for the batch) or `keys` (one a row) if it declares one, but this one also needs the "
            f"keyword `rng`\nIt was called with\n  source: {SHAPES}",
            {"node": "lambda", "predecessors": {"source": SHAPES}},
        ),
        (
            lambda: pipeline([lambda batch: batch["y"]], source=memory(A_HUNDRED)),
            f"Stage 'lambda' failed: KeyError: 'y'\nIt was called with\n  source: {FIRST_SHAPES}",
            {"node": "lambda", "predecessors": {"source": FIRST_SHAPES}},
        ),
        (
            lambda: pipeline([double, lambda batch: {"y": batch["y"]}]),
            f"Stage 'lambda' failed: KeyError: 'y'\nIt was called with\n  double: {SHAPES}",
            {"node": "lambda", "predecessors": {"double": SHAPES}},
        ),
        (
            lambda: graph({"a": double, "b": lambda batch: batch}, {"a": [], "b": ["a", "a"]}, "b"),
            "Stage 'b' failed: TypeError: <lambda>.<locals>.<lambda>() takes 1 positional "
            f"argument but 2 were given\nIt was called with\n  a: {SHAPES}",
            {"node": "b", "predecessors": {"a": SHAPES}},
        ),
        (
            lambda: pipeline([3]),
            "Stage 'int' failed: TypeError: a stage must be callable, got int",
            {"node": "int", "predecessors": {}},
        ),
        (
            lambda: pipeline([[np.zeros(3)]]),
            "Stage 'list' failed: TypeError: a stage must be callable, got list",
            {"node": "list", "predecessors": {}},
        ),
        (
            lambda: pipeline([lambda batch: batch["x"]]),
            "Stage 'lambda' failed: TypeError: a stage must return a dict of arrays, got "
            f"an array\nIt was called with\n  source: {SHAPES}",
            {"node": "lambda", "predecessors": {"source": SHAPES}},
        ),
        (
            lambda: pipeline([lambda batch: None]),
            "Stage 'lambda' failed: TypeError: a stage must return a dict of arrays, got "
            f"NoneType\nIt was called with\n  source: {SHAPES}",
            {"node": "lambda", "predecessors": {"source": SHAPES}},
        ),
        (
            lambda: pipeline([lambda batch: {**batch, "x": batch["x"][1:]}]),
            "Stage 'lambda' failed: ValueError: all fields of a batch must have the same number "
            f"of rows, got {{'id': 4, 'x': 3}}\nIt was called with\n  source: {SHAPES}",
            {"node": "lambda", "predecessors": {"source": SHAPES}},
        ),
        (
            lambda: pipeline([lambda batch: {"a": {"mean": batch["x"].mean()}}]),
            "Stage 'lambda' failed: TypeError: every field of a batch must be an array with its "
            "rows on axis 0, got 'a.mean' as a scalar float32\n"
            f"It was called with\n  source: {SHAPES}",
            {"node": "lambda", "predecessors": {"source": SHAPES}},
        ),
        (
            lambda: pipeline([lambda batch: {**batch, "list": [batch["x"]]}]),
            "Stage 'lambda' failed: TypeError: every field of a batch must be an array with its "
            f"rows on axis 0, got 'list' as list\nIt was called with\n  source: {SHAPES}",
            {"node": "lambda", "predecessors": {"source": SHAPES}},
        ),
        (
            lambda: pipeline([lambda batch: {**batch, "none": None}]),
            "Stage 'lambda' failed: TypeError: every field of a batch must be an array with its "
            f"rows on axis 0, got 'none' as NoneType\nIt was called with\n  source: {SHAPES}",
            {"node": "lambda", "predecessors": {"source": SHAPES}},
        ),
        (
            lambda: pipeline([lambda batch: {}]),
            "Stage 'lambda' failed: ValueError: all fields of a batch must have the same number "
            f"of rows, got {{}}\nIt was called with\n  source: {SHAPES}",
            {"node": "lambda", "predecessors": {"source": SHAPES}},
        ),
        (
            lambda: pipeline([lambda batch, *, key, keys: batch], seed=0),
            "Stage 'lambda' failed: TypeError: a stage declares `key` (one for the batch) or "
            f"`keys` (one a row), not both\nIt was called with\n  source: {SHAPES}",
            {"node": "lambda", "predecessors": {"source": SHAPES}},
        ),
        (
            lambda: pipeline([ElementOperator(ElementOperatorConfig(), fn=lambda e, key: e.data)]),
            "Stage 'lambda' failed: TypeError: An operator must return an element, as from "
            "element.update_data({...}), got dict.\n"
            f"It was called with\n  source: {SHAPES}",
            {"node": "lambda", "predecessors": {"source": SHAPES}},
        ),
        (
            lambda: padded(lambda batch: {**batch, "mask": batch["x"]}),
            "Stage 'lambda' failed: the mask 'mask' must be one boolean for each of the 4 rows, "
            "got float32[4]. Leave that field alone, or keep all rows.\n"
            f"It was called with\n  source: {MASKED}",
            {"node": "lambda", "predecessors": {"source": MASKED}},
        ),
        (
            lambda: padded(lambda batch: {**batch, "mask": batch["mask"][:, None]}),
            "Stage 'lambda' failed: the mask 'mask' must be one boolean for each of the 4 rows, "
            "got bool[4,1]. Leave that field alone, or keep all rows.\n"
            f"It was called with\n  source: {MASKED}",
            {"node": "lambda", "predecessors": {"source": MASKED}},
        ),
        (
            lambda: padded(lambda batch: {**batch, "mask": {"a": batch["mask"]}}),
            "Stage 'lambda' failed: the mask 'mask' must be one boolean for each of the 4 rows, "
            "got .a bool[4]. Leave that field alone, or keep all rows.\n"
            f"It was called with\n  source: {MASKED}",
            {"node": "lambda", "predecessors": {"source": MASKED}},
        ),
    ],
}

REQUIREMENTS = {
    "stage": ["ERR-021", "ERR-025", "ERR-026", "ERR-027", "ERR-028"],
    "cycle": ["ERR-003", "ERR-004"],
    "node-name": ["ERR-035"],
    "last-batch": ["ERR-018", "ERR-019"],
    "captured": ["SCAN-018"],
    "scan-length": ["SCAN-017"],
    "seek": ["ERR-029"],
    "field-type": ["ERR-015", "SRC-005", "SRC-006"],
    "rngs": ["ERR-030"],
    "sharding": ["MESH-004"],
    "state": ["STATE-018"],
}


def cases():
    """Every case, cited for what the table and the list above say of its code."""
    for entry in TABLE:
        cited = {entry["requirement"], *REQUIREMENTS.get(entry["code"], [])}
        for i, case in enumerate(CASES[entry["code"]]):
            marks = pytest.mark.spec("ERR-002", "ERR-022", "ERR-023", *sorted(cited))
            yield pytest.param(entry, *case, marks=marks, id=f"{entry['code']}-{i}")


@pytest.mark.parametrize("entry, act, text, attributes", list(cases()))
def test_a_fault_has_its_class_its_text_and_its_attributes(unchecked, entry, act, text, attributes):
    with pytest.raises(ValueError) as error:
        act()
    assert type(error.value) is getattr(errors, entry["class"])
    assert error.value.code == entry["code"]
    # Leave out a trailing blank and the notes that JAX adds.
    assert str(error.value).split("\n-----")[0] == text
    assert {name: getattr(error.value, name) for name in attributes} == attributes
    assert set(entry["names"]) == set(attributes)
    # A pickle keeps it, as when a worker process raises it.
    again = pickle.loads(pickle.dumps(error.value))
    assert (type(again), str(again)) == (type(error.value), str(error.value))
    assert vars(again) == vars(error.value)


@pytest.mark.spec("ERR-022")
def test_the_classes_are_those_of_the_table():
    abstract = {"DataraxError", "GraphError", "SourceError"}
    classes = {
        name: cls
        for name, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, Exception) and name not in abstract
    }
    assert {cls.code: name for name, cls in classes.items()} == {
        entry["code"]: entry["class"] for entry in TABLE
    }
    assert all(issubclass(cls, errors.DataraxError) for cls in classes.values())
    assert issubclass(errors.DataraxError, ValueError)


@pytest.mark.spec("ERR-025")
def test_the_original_error_is_the_cause():
    class Odd(RuntimeError):
        pass

    def odd(batch):
        raise Odd("never")

    with pytest.raises(errors.StageError) as error:
        pipeline([odd])
    assert type(error.value.__cause__) is Odd
    with pytest.raises(errors.StageError) as error:
        pipeline([double]).nodes["double"] = odd
    assert type(error.value.__cause__) is Odd


@pytest.mark.spec("ERR-025", "ERR-022")
@pytest.mark.parametrize("change", ["static", "array", "new", "gone"])
def test_a_stage_that_changes_more_than_variables_is_refused_by_name(change):
    class Stage(nnx.Module):
        def __init__(self):
            self.static = 0
            self.array = jnp.int32(0)

        def __call__(self, batch):
            match change:
                case "static":
                    self.static += 1
                case "array":
                    self.array = self.array + 1
                case "new":
                    self.more = jnp.int32(0)
                case "gone":
                    del self.array
            return batch

    with pytest.raises(errors.StageError, match=r"nnx\.Variable") as error:
        pipeline([Stage()])
    assert error.value.node == "Stage"


@pytest.mark.spec("ERR-029")
def test_a_refused_seek_leaves_the_cursor():
    stream = pipeline()
    stream.step()
    for place in ({"epoch": 0, "offset": 10}, {"epoch": 2**32}, {"epoch": 1, "offset": -1}):
        with pytest.raises(errors.SeekError):
            stream.seek(**place)
    assert stream.cursor == (0, 4)


@pytest.mark.spec("ERR-012", "STEP-013", "ERR-001")
def test_integers_of_numpy_are_integers(unchecked):
    stream = pipeline(batch_size=np.int64(3))
    assert len(stream.step()["id"]) == 3
    stream.seek(epoch=np.uint32(2), offset=np.int8(7))
    assert stream.cursor == (2, 7)
    assert by_for(stream, 1)[0]["id"].tolist() == [7, 8, 9]


@pytest.mark.spec("ERR-012", "ERR-022")
def test_a_batch_size_that_is_changed_is_checked(unchecked):
    stream = pipeline()
    stream.batch_size = 0
    with pytest.raises(errors.BatchSizeError):
        stream.step()


@pytest.mark.internal
@pytest.mark.parametrize("count", [0, -1, 1.5, "2", None, True])
def test_threads_are_counted(unchecked, count):
    with pytest.raises(ValueError) as caught:
        pipeline(num_threads=count)
    assert str(caught.value) == f"`num_threads` must be an integer of at least 1, got {count!r}."


@pytest.mark.spec("ERR-001", "ERR-030")
def test_what_needs_no_randomness_needs_no_rngs():
    pipeline([double, increment, add], length=3, batch_size=8)
    pipeline([jitter(rngs=nnx.Rngs(0))])
    pipeline(source=MemorySource(MemorySourceConfig(shuffle=True), columns(3), rngs=nnx.Rngs(0)))
    with pytest.raises(errors.RngsError):
        pipeline([double]).nodes["double"] = record_words


@pytest.mark.spec("ERR-026", "SRC-001")
def test_a_stage_may_change_the_number_of_rows():
    stream = pipeline([lambda batch: jax.tree.map(lambda x: x[::2], batch)])
    assert stream.step()["id"].tolist() == [0, 2]
    assert stream.scan(whole, 2)["id"].shape == (2, 2)


@pytest.mark.spec("ERR-023")
@pytest.mark.parametrize(
    "stage",
    [
        lambda batch: {"x": np.sort(batch["x"])},
        lambda batch: {"x": batch["x"] * [2, 3][batch["id"][0] % 2]},
        lambda batch: batch if batch["x"][0] > 0 else {},
    ],
    ids=["calls NumPy", "looks up in a list", "asks for a value"],
)
def test_a_stage_in_python_is_told_to_be_written_in_jax(stage):
    with pytest.raises(
        errors.StageError, match=r"write it in jax\.numpy, or do this in the source"
    ):
        pipeline([stage])


@pytest.mark.spec("ERR-023")
@pytest.mark.parametrize(
    "stage, text",
    [
        (
            lambda batch, rng: batch,
            "declares: `key`, one for the batch, or `keys`",
        ),
        (
            lambda batch: {"x": batch["x"][batch["x"] > 1]},
            "A stage cannot drop rows, since it",
        ),
        (nnx.Linear, "a stage is an object, got the class Linear itself"),
    ],
    ids=["argument", "filter", "class"],
)
def test_what_is_often_meant_by_a_stage_is_answered(stage, text, unchecked):
    with pytest.raises(errors.StageError, match=text):
        pipeline([stage])
