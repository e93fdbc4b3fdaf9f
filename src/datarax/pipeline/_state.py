"""The state of a pipeline as plain JSON types (spec STATE)."""

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping
from itertools import compress
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from .._keys import SOURCE, BaseKey
from .._mesh import differs, to_numpy
from .._rows import check_counted, settle
from .._types import Cursor, escaped, integer, is_traced, spec_text
from .._variables import iter_graph
from .._xla import weak_zeros
from ..errors import SeekError, ShardingError, StateError
from ..sources._base import EagerSourceBase, length_of
from ..sources._iterable import StreamSource
from ._core import CursorVariable, cutting
from ._iterator import move

if TYPE_CHECKING:
    from ._pipeline import Pipeline

VERSION = 1

MEANS = {
    "length": "the number of records",
    "specs": "the names, types and shapes of the fields of a record",
    "order": "how the records are shuffled",
    "graph": "the names and classes of the nodes, and their edges",
    "seed": "the seeds of the source and of the nodes",
}
"""What each part of a fingerprint stands for, for errors: some parts are digests."""


def get_state(pipeline: "Pipeline") -> dict[str, Any]:
    """See `Pipeline.get_state`."""
    epoch, offset = pipeline.cursor
    leaves = _leaves(pipeline)
    if any(map(is_traced, (epoch, *(leaf for _, leaf in leaves.values())))):
        raise TypeError("Inside a traced function a pipeline has no state yet; take it outside.")
    return {
        "version": VERSION,
        "cursor": {"epoch": epoch, "offset": offset},
        "fingerprint": fingerprint(pipeline),
        "variables": {name: _dump(leaf) for name, (_, leaf) in leaves.items()},
    }


def set_state(pipeline: "Pipeline", state: Mapping[str, Any] | str | bytes) -> None:
    """See `Pipeline.set_state`: everything is checked before anything is set."""
    if is_traced(pipeline._cursor_state.get_raw_value()):
        raise TypeError("Inside a traced function a pipeline takes no state; set it outside.")
    pipeline._cursor_state.claim()
    if isinstance(state, str | bytes):
        try:
            state = json.loads(state)
        except (ValueError, RecursionError) as error:
            raise StateError("state", f"is not JSON: {error}") from error
    if not isinstance(state, Mapping):
        raise StateError("version", f"must be {VERSION}, got {type(state).__name__!r}.")
    version = state.get("version")
    if type(version) is not int or version != VERSION:
        raise StateError("version", f"must be {VERSION}, got {version!r}.")
    for field, mine in fingerprint(pipeline).items():
        theirs = _object(state, "fingerprint").get(field)
        if theirs != mine:
            reason = f"is {mine!r} here, but {theirs!r} in the state. It stands for {MEANS[field]}"
            raise StateError(field, f"{reason}{_told(pipeline, field)}.")

    cursor, length = _object(state, "cursor"), length_of(pipeline.source)
    for field, end in (("epoch", 2**32), ("offset", length or 2**32)):
        value = cursor.get(field)
        if not 0 <= integer(value, -1) < end:
            raise StateError(f"cursor.{field}", f"must be in [0, {end}), got {value!r}.")

    try:
        target = Cursor(int(cursor["epoch"]), int(cursor["offset"]))
        check_counted(settle(target, *cutting(pipeline)), length)
    except SeekError as error:
        raise StateError("cursor", f"has no batch behind it: {error}") from error

    leaves, saved = _leaves(pipeline), _object(state, "variables")
    for name in sorted(leaves.keys() ^ saved.keys(), key=str):
        where = "the pipeline" if name in leaves else "the state"
        raise StateError(f"variables.{name}", f"is only in {where}.")
    loaded = {name: _load(name, saved[name], leaf) for name, (_, leaf) in leaves.items()}

    for variable in {id(v): v for v, _ in leaves.values()}.values():
        names = [name for name, (v, _) in leaves.items() if v is variable]
        structure = jax.tree.structure(variable.get_raw_value())
        variable.set_raw_value(jax.tree.unflatten(structure, [loaded[name] for name in names]))
    move(pipeline, *target)


def _told(pipeline: "Pipeline", field: str) -> str:
    """What a digest of this pipeline was computed from, for errors."""
    if field == "specs":
        return f"; here they are {spec_text(_record(pipeline))}"
    if field == "graph":
        nodes = [
            f"{name} ({type(pipeline.nodes[name]).__qualname__}) of {', '.join(reads)}"
            for name, reads in pipeline._graph.predecessors
        ]
        return f"; here they are {'; '.join(nodes) or 'none'}"
    return ""


def _record(pipeline: "Pipeline") -> dict[str, Any]:
    """The spec of one record, without the mask, which belongs to batches."""
    fields = dict(pipeline.node_specs[SOURCE])
    if _has_mask(pipeline):
        del fields[pipeline.mask_name]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), fields)


def _has_mask(pipeline: "Pipeline") -> bool:
    masks = isinstance(pipeline.source, EagerSourceBase) and pipeline.source.masks
    return masks or pipeline.last_batch == "pad"


def fingerprint(pipeline: "Pipeline") -> dict[str, Any]:
    """What must be equal for a state to stand for the same records and values.

    The batch size, `last_batch` and the mask are no part of it: they only cut the stream.
    """
    source = pipeline.source
    graph = sorted(
        (name, type(pipeline.nodes[name]).__qualname__, reads)
        for name, reads in pipeline._graph.predecessors
    )
    named = isinstance(source, EagerSourceBase | StreamSource)
    order = source.order_name if named else type(source).__qualname__
    seeds = {SOURCE: source, **pipeline.nodes}
    keys = {
        name: None if (words := pipeline._words_of(part)) is None else np.asarray(words).tolist()
        for name, part in seeds.items()
    }
    return {
        "length": length_of(source),
        "specs": _digest(jax.tree.map(lambda x: [str(x.dtype), *x.shape], _record(pipeline))),
        "order": order,
        "graph": _digest([graph, pipeline._sink]),
        # Last: it differs whenever the graph does, and the error names the first difference.
        "seed": _digest(keys),
    }


def check_same(pipeline: "Pipeline", sharding: NamedSharding) -> None:
    """Raises if the processes of a job have built different pipelines. All of them must call it."""
    own = {
        **fingerprint(pipeline),
        "batch_size": int(pipeline.batch_size),
        "last_batch": pipeline.last_batch,
        "mask_name": pipeline.mask_name if _has_mask(pipeline) else "",
        "sharding": str(sharding.spec),
    }
    words = [zlib.crc32(json.dumps(value).encode()) for value in own.values()]
    found = list(compress(own, differs(np.array(words, np.uint32), sharding)))
    if "graph" in found and "seed" in found:
        found.remove("seed")  # it differs whenever the graph does
    if found:
        here = (f"{name} {own[name]!r}{_told(pipeline, name)}" for name in found)
        raise ShardingError(
            "is over several processes, which must build the same pipeline over the same data, "
            f"but they differ in {', '.join(found)}; this one has {', '.join(here)}"
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _leaves(pipeline: "Pipeline") -> dict[str, tuple[nnx.Variable, Any]]:
    """The arrays of a state: all Variables except those of the source, keys and the cursor."""
    found = {}
    held = {id(x) for _, x in iter_graph(pipeline.source) if isinstance(x, nnx.Variable)}
    for path, x in iter_graph(pipeline):
        mine = isinstance(x, nnx.Variable) and not isinstance(x, BaseKey | CursorVariable)
        if mine and id(x) not in held:
            name = ".".join(escaped(str(x)) for x in path)
            leaves, _ = jax.tree_util.tree_flatten_with_path(x.get_raw_value())
            for inner, leaf in leaves:
                found[name + jax.tree_util.keystr(inner)] = x, leaf
    return found


def _dump(leaf: Any) -> dict[str, Any]:
    kind = _kind(leaf)
    array = to_numpy(jax.random.key_data(leaf) if "key" in kind else leaf)
    # A Python number has 64 bits until the first batch makes it a JAX array.
    array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
    little = array.astype(array.dtype.newbyteorder("<")) if array.dtype.isbuiltin else array
    return {**kind, "data": base64.b64encode(little.tobytes()).decode()}


def _kind(leaf: Any) -> dict[str, Any]:
    """The type of an array, as a state records it."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, leaf)
        return {"key": str(jax.random.key_impl(leaf)), **_kind_of(data)}
    return _kind_of(jax.typeof(leaf))


def _kind_of(x: Any) -> dict[str, Any]:
    # A weak type changes the type of results, so a state must record it.
    weakly = {"weak_type": True} if x.weak_type else {}
    return {"dtype": x.dtype.name, "shape": list(x.shape), **weakly}


def _load(name: str, saved: Any, leaf: Any) -> Any:
    """The saved array, if it is of the type and shape of the one it replaces."""
    mine = _kind(leaf)
    if not isinstance(saved, Mapping):
        raise StateError(f"variables.{name}", f"must be an array, got {saved!r}.")
    weakly = saved.get("weak_type", False)
    if not isinstance(weakly, bool):
        raise StateError(f"variables.{name}.weak_type", f"must be a boolean, got {weakly!r}.")
    for field in ("key", "dtype", "shape"):
        adopts = field == "dtype" and _may_adopt(mine, saved)
        if saved.get(field) != mine.get(field) and not adopts:
            raise StateError(
                f"variables.{name}",
                f"has {field} {mine.get(field)!r} here, but {saved.get(field)!r} in the state.",
            )
    try:
        data = base64.b64decode(saved["data"], validate=True)
        array = np.frombuffer(data, jnp.dtype(saved["dtype"])).reshape(mine["shape"])
        value = jnp.array(array)
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(f"variables.{name}", f"holds no data of its type: {error}") from error
    if array.dtype == bool and (array.view(np.uint8) > 1).any():
        raise StateError(f"variables.{name}", "holds a byte that is no boolean.")
    weak = weak_zeros(array.shape, value.dtype) if weakly else None
    if weak is not None:
        value = weak.at[...].set(value)
    if "key" in mine:
        value = jax.random.wrap_key_data(value, impl=mine["key"])
    stays = isinstance(leaf, jax.Array) and leaf.committed
    return jax.device_put(value, leaf.sharding) if stays else value


def _may_adopt(mine: Mapping[str, Any], saved: Mapping[str, Any]) -> bool:
    """Whether one of two arrays may have become of the type of the other: a weak type adopts
    another, unless that is of a lower kind, as an integer is below a float."""
    weakly = [bool(x.get("weak_type")) for x in (mine, saved)]
    try:
        kinds = [_kind_number(jnp.dtype(x["dtype"])) for x in (mine, saved)]
    except (KeyError, TypeError):
        return False
    if all(weakly):
        return min(kinds) >= 0
    below, above = kinds if weakly[0] else kinds[::-1]
    return any(weakly) and 0 <= below <= above


def _kind_number(dtype: Any) -> int:
    kinds = jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating
    return next((i for i, kind in enumerate(kinds) if jnp.issubdtype(dtype, kind)), -1)


def _object(state: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    value = state.get(field)
    if not isinstance(value, Mapping):
        raise StateError(field, f"is missing or no object, got {value!r}.")
    return value
