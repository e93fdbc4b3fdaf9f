"""`Pipeline`: a source, a graph of stages, and a cursor. No other object keeps a position."""

import pickle
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from .._keys import SOURCE, all_words, stream_of
from .._mesh import check_sharding, place_held, spans_processes
from .._modules import Bundle, FixedBundle, Watched
from .._order import word
from .._rows import Cut, LastBatch, Rows, batches_of_loop, check_within, pack, running_on
from .._settings import settings, transferring
from .._types import Batch, Cursor, Mask, Signed, Spec, Words, integer, spec_text
from .._variables import iter_graph
from ..errors import (
    BatchSizeError,
    EmptySourceError,
    LastBatchError,
    RandomAccessError,
    RngsError,
    SourceTypeError,
    StageError,
    StagesAndNodesError,
)
from ..operators import OperatorModule
from ..sources._base import (
    EagerSourceBase,
    HasGetBatchAt,
    Source,
    SourceBatch,
    check_countable,
    length_of,
)
from ..sources._column import spread
from ..sources._iterable import StreamSource
from . import _scan, _show, _state
from ._binding import Binding, merge
from ._core import CursorVariable, cursor, keyring, outputs_of, run_stages
from ._graph import Graph
from ._iterator import BatchIterator, move, step
from ._meter import Stats
from ._runtime import Runtime
from ._stages import (
    Keyring,
    Stage,
    as_stage,
    call_stage,
    chain_names,
    check_batch,
    check_captured,
    run_graph,
)

_MAKING = threading.Lock()
"""Guards the making of a pipeline's runtime, which two threads must not both make."""

OVERRIDE = "__call__"
"""The name under which a subclass's own `__call__` is the one node of the graph."""


class _Hidden:
    """Slots for what must not be part of the NNX graph, of a copy or of a pickle."""

    __slots__ = ("_keyring", "_made_runtime", "_specs")

    _keyring: Keyring
    _made_runtime: Runtime
    _specs: tuple[Any, dict[str, Spec]]


class _CheckedOnceBuilt(Signed):
    """Checks a pipeline after its whole `__init__` has run, also that of a subclass."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        pipeline = super().__call__(*args, **kwargs)
        with transferring():
            pipeline._check()
        return pipeline


class Pipeline(_Hidden, Watched, metaclass=_CheckedOnceBuilt):
    """An endless stream of batches: records of a source, passed through a chain or graph of stages.

    `step()`, `for` and `scan()` give the same batches. Give a chain as `stages`, or a graph as
    `nodes`, `edges` and `sink` (see `from_dag`), or override `__call__(batch)` in a subclass.

    Args:
        source: where the records come from, for example a `MemorySource`.
        stages: callables `stage(batch) -> batch`, run one after the other. A batch is a dict of
            arrays (nested dicts allowed) with the rows on axis 0. A stage is a function, an
            `nnx.Module` or an `eqx.Module`; one with a keyword `keys` gets a key for each row, one
            with a keyword `key` gets one for the batch (spec KEYS).
        nodes: the stages of a graph by name.
        edges: for each node, the names of the nodes it reads, in the order of its arguments.
        sink: the node whose output is the batch.
        batch_size: rows of a batch, in `[1, 2**31)`.
        rngs: seeds the shuffle and every stage that draws random numbers, but for parts that have
            `rngs` of their own. Only its keys are read; no counter advances.
        last_batch: what happens to the rows left over at the end of an epoch. "keep": `for` ends
            with a shorter batch, `step` and `scan` fill it from the next epoch. "drop": they are
            skipped. "pad": the batch is filled up with zero rows, which a mask marks.
        mask_name: the field of the mask, boolean, of shape `(batch_size,)`, False for a zero row.
        sharding: how the rows of each batch lie on the devices of a mesh, for example
            `NamedSharding(mesh, PartitionSpec("data"))`; the batches are the same as without. In a
            job of several processes, all of which build the same pipeline, each then reads the rows
            of its own devices only. Data in memory are copied to every device, unless they lie on
            all of them already, and the pipeline keeps a source of its own (spec MESH).
        num_threads: threads that read ahead, where the rows of the source are on the host.
        progress: shows a progress bar for every loop, and for every scan over a source on the
            host (extra "progress").

    Raises:
        DataraxError: a `ValueError` that names the rule that is broken. Shapes are checked here,
            abstractly, without running a stage.

    Example:
        ```python
        source = MemorySource(MemorySourceConfig(shuffle=True), {"x": np.arange(10)})
        pipeline = Pipeline(source=source, batch_size=4, rngs=nnx.Rngs(0))
        for batch in pipeline:  # one epoch
            print(batch["x"])
        ```
    """

    __slots__ = ()

    def __init__(
        self,
        *,
        source: Source,
        stages: Sequence[Stage] | None = None,
        nodes: Mapping[str, Stage] | None = None,
        edges: Mapping[str, Sequence[str]] | None = None,
        sink: str | None = None,
        batch_size: int,
        rngs: nnx.Rngs | None = None,
        last_batch: LastBatch = "keep",
        mask_name: str = "mask",
        sharding: NamedSharding | None = None,
        num_threads: int = 2,
        progress: bool = False,
    ):
        graph = {"nodes": nodes, "edges": edges, "sink": sink}
        given = [f"`{name}`" for name, x in graph.items() if x is not None]
        if given and (stages is not None or len(given) < 3):
            raise StagesAndNodesError((["`stages`"] if stages is not None else []) + given)
        if nodes is None or edges is None or sink is None:
            if not isinstance(stages, Sequence | None):
                raise TypeError(f"`stages` must be a list of stages, got {type(stages).__name__}.")
            stages = list(stages or ())
            named = dict(zip(chain_names(stages), stages, strict=True))
            self._graph = Graph.chain(list(named))
        else:
            if not isinstance(nodes, Mapping):
                raise TypeError(f"`nodes` is a dict of stages by name, got {type(nodes).__name__}.")
            named = dict(nodes)
            self._graph = Graph.from_edges(list(named), edges, sink)

        for name, stage in named.items():
            if isinstance(stage, Pipeline):
                raise StageError(name, {}, "a pipeline is no stage; take its stages in its place.")
        if isinstance(source, type) or not isinstance(source, EagerSourceBase | HasGetBatchAt):
            raise SourceTypeError(source)
        self.source = source
        self._nodes = Bundle({name: as_stage(name, named[name]) for name in self._graph.names})
        self.batch_size = batch_size
        self.last_batch: LastBatch = last_batch
        self.mask_name = mask_name
        self.sharding = sharding
        self.num_threads = num_threads
        self.progress = progress
        self._base = None if rngs is None else FixedBundle(all_words(rngs))
        self._cursor_state = CursorVariable(pack(Cursor(0, 0), length_of(source)))

    @classmethod
    def from_dag(
        cls,
        *,
        source: Source,
        nodes: Mapping[str, Stage],
        edges: Mapping[str, Sequence[str]],
        sink: str,
        batch_size: int,
        rngs: nnx.Rngs | None = None,
        last_batch: LastBatch = "keep",
        mask_name: str = "mask",
        sharding: NamedSharding | None = None,
        num_threads: int = 2,
        progress: bool = False,
    ) -> "Pipeline":
        """A pipeline whose stages form a graph.

        `edges[node]` names what the node is called with, in order: other nodes, or "source". `[]`
        is short for `["source"]`. The batch is the output of the node `sink`, to which every node
        must lead. Stages run in topological order, ties in the order of `nodes`. For the other
        arguments see `Pipeline`.

        Raises a `GraphError` for edges that form no such graph.

        Example:
            ```python
            Pipeline.from_dag(
                source=source,
                nodes={"augment": augment, "pair": lambda x, y: {"x": x["x"], "y": y["x"]}},
                edges={"augment": [], "pair": ["source", "augment"]},
                sink="pair",
                batch_size=32,
            )
            ```
        """
        return cls(
            source=source,
            nodes=nodes,
            edges=edges,
            sink=sink,
            batch_size=batch_size,
            rngs=rngs,
            last_batch=last_batch,
            mask_name=mask_name,
            sharding=sharding,
            num_threads=num_threads,
            progress=progress,
        )

    # Three ways to be driven.

    def step(self) -> Batch:
        """The next batch, always of `batch_size` rows; after one epoch comes the next.

        Works inside `nnx.jit`, `nnx.grad` and the like if the pipeline is an argument of the
        function. Not inside plain `jax.jit`, where the cursor would not move.
        """
        return step(self)

    def __iter__(self) -> Iterator[Batch]:
        """The remaining batches of the current epoch.

        All iterators of a pipeline share its cursor: each batch goes to one of them.
        """
        return BatchIterator(self)

    def scan(
        self,
        step_fn: Callable[..., Any],
        length: int | None = None,
        *,
        modules: Sequence[Any] = (),
        init_carry: Any = None,
        unroll: int = 1,
        fetch: int | None = None,
    ) -> Any:
        """Runs `step_fn(*modules, self.step())` `length` times as one compiled loop.

        Returns the results of `step_fn`, stacked along a new axis 0. With `init_carry` the
        function is `step_fn(carry, *modules, batch) -> (carry, out)`, and the result is
        `(carry, stacked outs)`. The cursor and the modules end as after as many single steps.

        Compiles once for each `step_fn` and `length`, so pass the same function every time, not a
        new lambda.

        Args:
            step_fn: a function that JAX can trace. NNX objects must reach it through `modules`.
            length: the number of batches; None scans to the end of the epoch.
            modules: NNX objects that `step_fn` uses or changes (a model, an optimizer).
            init_carry: the initial carry, a pytree of arrays.
            unroll: as in `jax.lax.scan`. Changes the speed only.
            fetch: the most batches whose rows are gathered at once, for a source in memory with
                small batches; None chooses. Changes the speed only.

        Raises:
            LastBatchError: without `length`, where the rest of the epoch is no whole number of
                batches and `last_batch` is "keep".
            CapturedError: `step_fn` uses an NNX object that is not in `modules`.

        Example:
            ```python
            def train_step(model, optimizer, batch):
                loss, gradients = nnx.value_and_grad(loss_of)(model, batch)
                optimizer.update(model, gradients)
                return loss

            losses = pipeline.scan(train_step, modules=(model, optimizer))  # an epoch
            ```
        """
        return _scan.scan(self, step_fn, length, modules, init_carry, unroll, fetch)

    def __len__(self) -> int:
        """Batches in a whole epoch of `for`; a `TypeError` for a source without a length."""
        length = length_of(self.source)
        if length is None:
            raise TypeError("How many batches an epoch of this source has is not known.")
        return batches_of_loop(self.batch_size, length, self.last_batch)

    def __call__(self, batch: Batch) -> Batch:
        """Passes a batch through the stages; a subclass may override it.

        Called by hand, the rows of `batch` count as records 0, 1, ... of epoch 0.
        """
        keyring = getattr(self, "_keyring", None)
        if keyring is None:
            with transferring():
                keyring = self._keyring_by_hand(batch)
        return run_graph(self._graph, self.nodes, batch, keyring)[self._graph.sink]

    # Where it stands.

    @property
    def cursor(self) -> Cursor:
        """Epoch and offset of the next row, as integers: a `Cursor`."""
        return cursor(self)

    def seek(self, *, epoch: int, offset: int = 0) -> None:
        """Moves the cursor to record `offset` of epoch `epoch`; takes no time but for streams.

        `epoch` is in `[0, 2**32)`, `offset` in `[0, len(source))`, else a `SeekError`.
        """
        with self._runtime.lock:
            move(self, epoch, offset)

    def reset(self) -> None:
        """Moves the cursor to the start of epoch 0."""
        self.seek(epoch=0)

    def stats(self) -> Stats:
        """How long `for` and `scan` have waited for rows, and how long they have computed.

        A named tuple, counted since the pipeline was made: the number of `batches`; the seconds
        `waited` for rows and `computed`, which is all other time, that of the loop's body too; the
        rows `masked` as unreadable; and `limit`, "reading" or "computing", whichever took longer.
        Scans over a source in memory are not counted: such a call returns before its work is done.
        """
        return self._runtime.meter.stats()  # at once, in the midst of a read, too

    def replay(self, record: int, epoch: int = 0) -> dict[str, Batch]:
        """The output of every node for one record in one epoch, for debugging.

        Returns batches of one row by node, that of the source as "source". Stages run one by one
        and are not compiled, so `print` and breakpoints work in them; the pipeline does not change.
        A stage that takes the key of a batch gets another one here than in the batch.

        Raises a `RandomAccessError` for a stream or another source without `gather`, a `SeekError`
        for a record or an epoch out of range.
        """
        source = self.source
        if not isinstance(source, EagerSourceBase):
            raise RandomAccessError(
                f"replay needs a source with `gather`, and {type(source).__name__} has none."
            )
        check_within("record", record, source.records)
        check_within("epoch", epoch, 2**32)
        with transferring():
            return self._replayed(source, record, epoch)

    def _replayed(self, source: EagerSourceBase, record: int, epoch: int) -> dict[str, Batch]:
        binding = Binding((self,))
        (copy,) = merge(binding.structure, binding.read())
        kind = word(source.records)
        where, when = (jnp.asarray(np.array([x], kind)) for x in (record, epoch))
        batch = copy.source.gather(where)
        mask = self.last_batch == "pad" or source.masks
        rows = Rows(when, where, where, jnp.ones(1, bool) if mask else None)
        at = Cursor(rows.epoch[0], jnp.zeros((), kind))
        return run_stages(copy, SourceBatch(batch, rows), at, Cut(1, 1, False))[0]

    def get_state(self) -> dict[str, Any]:
        """What the pipeline remembers, as a dict that `json.dumps` takes.

        The cursor, the Variables of the stages, and a fingerprint of the seed, the order, the graph
        and the shape of the data. Under 1 KB if the stages have no Variables.
        """
        with self._runtime.lock:
            return _state.get_state(self)

    def set_state(self, state: Mapping[str, Any] | str | bytes) -> None:
        """Continues where `state` was taken: what `get_state` returned, or its JSON text.

        The batch size and `last_batch` may differ. A `StateError` names what does not fit; then
        nothing has changed.
        """
        with self._runtime.lock:
            _state.set_state(self, state)

    # What it is made of.

    @property
    def stages(self) -> tuple[Any, ...]:
        """The stages in the order in which they run; `nodes` replaces one."""
        return tuple(self.nodes.values())

    @property
    def nodes(self) -> "NodeView":
        """The stages by name. `pipeline.nodes[name] = stage` replaces one, if its shapes fit."""
        return NodeView(self)

    @property
    def element_spec(self) -> Spec:
        """Shapes and types of a batch: a dict of `jax.ShapeDtypeStruct`, axis 0 the rows."""
        return self.node_specs[self._sink]

    @property
    def node_specs(self) -> dict[str, Spec]:
        """Shapes and types of the output of every node, and of the source as "source"."""
        with self._runtime.lock:
            binding = self._runtime.bind(self)
            values = binding.read()
            seen = binding.structure, settings(), jax.tree.map(jax.typeof, values)
            if not hasattr(self, "_specs") or self._specs[0] != seen:
                object.__setattr__(self, "_specs", (seen, self._trace(binding, values)))
            return {name: jax.tree.map(lambda x: x, spec) for name, spec in self._specs[1].items()}

    def to_mermaid(self) -> str:
        """The graph as the text of a Mermaid flowchart, with shapes on its edges."""
        return _show.mermaid(self)

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle holds: no `sharding`, which names devices of this process."""
        return super().__getstate__() | {"sharding": None}

    def __copy__(self) -> "Pipeline":
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __bool__(self) -> bool:
        return True  # also without a length

    def __repr__(self) -> str:
        # No trace and no lock: a debugger may ask at any time, in `__init__` too.
        nodes = ", ".join(self._graph.names) if hasattr(self, "_nodes") else "unfinished"
        return f"<{type(self).__name__}: {nodes}>"

    def __str__(self) -> str:
        return _show.table(self)

    def _repr_html_(self) -> str:
        return _show.html(self)

    # For other modules of the library.

    @property
    def _runtime(self) -> Runtime:
        """The caches of this very object; a copy or a traced pipeline has its own."""
        if not hasattr(self, "_made_runtime"):
            with _MAKING:
                if not hasattr(self, "_made_runtime"):
                    object.__setattr__(self, "_made_runtime", Runtime())
        return self._made_runtime

    def _words_of(self, part: Any) -> Words | None:
        """The base key of a source or stage: its own if it has one, else the pipeline's."""
        own = (
            part.base if isinstance(part, EagerSourceBase | StreamSource | OperatorModule) else None
        )
        if own is not None:
            return own.get_raw_value()
        if self._base is None:
            return None
        wanted = "shuffle" if part is self.source else getattr(part, "stream_name", None)
        stream = stream_of(self._base.names, wanted)
        return None if stream is None else self._base.get(stream).get_raw_value()

    def _transform(self, batch: Batch, keyring: Keyring, mask: Mask | None) -> dict[str, Batch]:
        """The output of every node for a batch of the source, which is "source" itself.

        The mask is put back into the output of the sink if a stage dropped it.
        """
        if type(self).__call__ is Pipeline.__call__:
            outputs = run_graph(self._graph, self.nodes, batch, keyring)
        else:
            object.__setattr__(self, "_keyring", keyring)
            try:
                out = call_stage(OVERRIDE, self.__call__, [(SOURCE, batch)], keyring)
            finally:
                object.__delattr__(self, "_keyring")
            outputs = {SOURCE: batch, OVERRIDE: out}
        if mask is not None:
            outputs[self._sink] = self._masked(outputs, mask)
        return outputs

    @property
    def _sink(self) -> str:
        """The node whose output is the batch."""
        return self._graph.sink if type(self).__call__ is Pipeline.__call__ else OVERRIDE

    def _check(self) -> None:
        """Raises for a pipeline that cannot run, from its parts and, abstractly, its shapes."""
        self._check_settings()
        self._put_on_mesh()
        _ = self.node_specs
        if self.sharding is not None and spans_processes(self.sharding):
            _state.check_same(self, self.sharding)

    def _put_on_mesh(self) -> None:
        """Places all that it holds on the mesh, if it has one; data by a source of its own."""
        if self.sharding is None:
            return
        source = spread(self.source, self.sharding)
        if source is not self.source:
            self.source = source
        place_held(self, self.sharding)

    def _check_settings(self) -> None:
        """Raises for settings that do not fit one another. NumPy's integers become Python's."""
        for name in ("batch_size", "num_threads"):
            given = getattr(self, name)
            if type(given) is not int and (number := integer(given, 0)):
                setattr(self, name, number)
        length, size, last_batch = length_of(self.source), self.batch_size, self.last_batch
        if not 1 <= integer(size, 0) < 2**31:
            raise BatchSizeError(size)
        if integer(self.num_threads, 0) < 1:
            raise ValueError(
                f"`num_threads` must be an integer of at least 1, got {self.num_threads!r}."
            )
        if self.sharding is not None:
            check_sharding(self.sharding, size)
        if last_batch not in ("keep", "drop", "pad"):
            raise LastBatchError(
                f'`last_batch` must be "keep", "drop" or "pad", got {last_batch!r}.'
            )
        if length == 0:
            raise EmptySourceError("`source`")
        check_countable(self.source)
        if length is not None and last_batch == "drop" and size > length:
            raise LastBatchError(
                f'Under last_batch="drop" an epoch of {length} records holds no batch of {size}. '
                'Take a smaller `batch_size`, or "keep" or "pad".'
            )
        if isinstance(self.source, EagerSourceBase | StreamSource) and self.source.shuffle:
            self._need_words(SOURCE, self.source)
        for path, x in iter_graph(self):
            if isinstance(x, Pipeline) and x is not self:
                name = self._nodes.name_of(str(path[1])) if path[0] == "_nodes" else str(path[0])
                raise StageError(
                    name,
                    {},
                    "a pipeline cannot be a part of another: its place would not be saved. Take "
                    "its batches in the loop, or in the function of a scan that is given it in "
                    "`modules`.",
                )
            # A `jax.Ref` changes in place, which `look` would not notice.
            if isinstance(x, nnx.Variable) and isinstance(x.get_raw_value(), jax.Ref):
                raise TypeError(
                    "A pipeline holds its Variables' values as arrays, but "
                    f"`{'.'.join(map(str, path))}` holds a reference. Make it without ref=True."
                )

    def _trace(self, binding: Binding, values: list[Any]) -> dict[str, Spec]:
        """The specs of all outputs, from an abstract run on a copy: no state moves."""
        cut = running_on(self.batch_size, length_of(self.source), self.last_batch)
        if isinstance(self.source, StreamSource):
            _ = self.source.element_spec  # runs the user's code, which must not be traced
        numpy_state = pickle.dumps(np.random.get_state())
        specs, constants = outputs_of(binding.structure, values, cut)
        # Only the first time: later, reading threads may draw from `np.random`, too.
        if not hasattr(self, "_specs") and pickle.dumps(np.random.get_state()) != numpy_state:
            warnings.warn(
                f"One of the stages {list(self.nodes)} draws from `np.random`, which is done once, "
                "when it is compiled: all batches then get the same numbers. Declare `keys`, and "
                "draw from these with jax.random.",
                stacklevel=2,
            )
        for name, stage in self.nodes.items():
            check_captured(name, stage, constants)
        return {
            name: specs[name] for name in (SOURCE, *self._graph.names, OVERRIDE) if name in specs
        }

    def _need_words(self, name: str, part: Any) -> Words:
        found = self._words_of(part)
        if found is None:
            had = self._base and f" It has the streams {list(self._base.names)}, and no 'default'."
            raise RngsError(
                f"{name!r} draws random numbers and needs a seed: give the pipeline "
                f"rngs=nnx.Rngs(seed), or the part `rngs` of its own.{had or ''}"
            )
        return found

    def _masked(self, outputs: Mapping[str, Batch], mask: Mask) -> Batch:
        batch = outputs[self._sink]
        field = batch.get(self.mask_name, mask)
        rows = jax.tree.leaves(batch)[0].shape[0]
        if isinstance(field, dict) or field.dtype != bool or field.shape != (rows,):
            raise StageError(
                self._sink,
                {p: spec_text(outputs[p]) for p in self._graph.reads(self._sink)},
                f"the mask {self.mask_name!r} must be one boolean for each of the {rows} rows, got "
                f"{spec_text({'': field}).strip()}. Leave that field alone, or keep all rows.",
            )
        return {**batch, self.mask_name: field}

    def _keyring_by_hand(self, batch: Batch) -> Keyring:
        rows = check_batch(batch, "a pipeline is called with")
        record = jnp.arange(rows, dtype=jnp.uint32)
        start = Cursor(jnp.uint32(0), jnp.uint32(0))
        return keyring(self, jnp.zeros_like(record), record, start)


class NodeView(MutableMapping[str, Any]):
    """The nodes of a pipeline in execution order. Assigning replaces a node; none is added."""

    def __init__(self, pipeline: Pipeline):
        self._pipeline = pipeline

    def __getitem__(self, name: str) -> Any:
        if name not in self._pipeline._graph.names:
            raise KeyError(name)
        return self._pipeline._nodes.get(name)

    def __setitem__(self, name: str, stage: Any) -> None:
        """Raises for a stage that does not fit, and keeps the old one then."""
        pipeline, before = self._pipeline, self[name]
        with pipeline._runtime.lock:  # so that no other thread meets a stage that is refused
            try:
                pipeline._nodes.put(name, as_stage(name, stage))
                pipeline._check()
            except BaseException:
                pipeline._nodes.put(name, before)
                raise

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"A node can be replaced but not removed: {name!r}.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._pipeline._graph.names)

    def __len__(self) -> int:
        return len(self._pipeline._graph.names)

    def __repr__(self) -> str:
        return repr(dict(self))
