"""`Pipeline`: a source, a graph of stages, and a cursor; the only thing that remembers."""

import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .._bundle import Bundle, FixedBundle
from .._keys import all_words, batch_key, node_key, record_keys
from .._order import word
from .._rows import Cut, LastBatch, Rows, batches_of_loop, pack, running_on
from .._types import Batch, Cursor, Mask, Spec, Words, integer, spec_text
from .._xla import settings
from ..errors import (
    BatchSizeError,
    EmptySourceError,
    LastBatchError,
    RandomAccessError,
    RngsError,
    SeekError,
    SourceError,
    SourceTypeError,
    StageError,
    StagesAndNodesError,
)
from ..operators import OperatorModule
from ..sources._base import (
    NAME,
    EagerSourceBase,
    Fetched,
    RandomAccess,
    Source,
    length_of,
)
from ..sources._host import raised_in
from ..sources._iterable import StreamSource
from . import _scan, _show, _state
from ._binding import Binding, changes, merge
from ._core import Position, draw, fetched_from, order_at, start_of
from ._graph import Graph, Keyring, Stage, as_stage, call_stage, chain_names
from ._iterator import BatchIterator, Runtime, cursor, move, step
from ._meter import Stats

_MAKING = threading.Lock()
"""Two threads that meet a pipeline first must find one and the same runtime."""


class _Hidden:
    """Where an object keeps what NNX must not see: not in its graph, a copy or a pickle."""

    __slots__ = ("_keyring", "_made_runtime", "_specs")

    _keyring: Keyring
    _made_runtime: Runtime
    _specs: tuple[Any, dict[str, Spec]]


class _CheckedOnceBuilt(type(nnx.Module)):
    """Checks a pipeline after the last line of its `__init__`, that of a subclass included."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        pipeline = super().__call__(*args, **kwargs)
        pipeline._check()
        return pipeline


class Pipeline(_Hidden, nnx.Module, metaclass=_CheckedOnceBuilt):
    """An endless stream of batches from a source through a chain or a graph of stages.

    `step()`, `for` and `scan()` give the same batches. `stages` is a chain; see `from_dag` for a
    graph; a subclass may override `__call__(batch)` instead.

    `rngs` seeds everything random that has no `rngs` of its own; only its keys are read, no
    counter moves. `last_batch` says what becomes of the rows left at the end of an epoch: "keep"
    (`for` gives a shorter batch, `step` and `scan` run on into the next epoch), "drop" (they are
    skipped) or "pad" (zero rows, and a boolean field `mask_name` that is False there).

    A stage is any callable `stage(*batches) -> batch`. One that declares `keys` gets a key for
    each row, one that declares `key` gets one for the batch (spec KEYS).

    `num_threads` threads read ahead what a source has on the host. `progress=True` shows a bar for
    every loop, and for every scan over such a source (extra "progress").

    Raises a `datarax.errors.DataraxError`, which is a `ValueError`, for what cannot run: shapes
    are checked here, abstractly, without running a stage.
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
            named = dict(nodes)
            self._graph = Graph.from_edges(list(named), edges, sink)

        for name, stage in named.items():
            if isinstance(stage, Pipeline):
                raise StageError(name, {}, "a pipeline is no stage; take its stages in its place.")
        if isinstance(source, type) or not isinstance(source, EagerSourceBase | RandomAccess):
            raise SourceTypeError(source)
        self.source = source
        self._nodes = Bundle({name: as_stage(name, named[name]) for name in self._graph.names})
        self.batch_size = integer(batch_size, 0) or batch_size
        self.last_batch: LastBatch = last_batch
        self.mask_name = mask_name
        self.num_threads = integer(num_threads, 0) or num_threads
        self.progress = progress
        self._base = None if rngs is None else FixedBundle(all_words(rngs))
        self._cursor_state = Position(pack(Cursor(0, 0), length_of(source)))

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
        num_threads: int = 2,
        progress: bool = False,
    ) -> "Pipeline":
        """A pipeline from named nodes. `edges[node]` lists what it is called with, in order.

        `[]` reads the source, as does the name "source" among others. `sink` gives the batch.
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
            num_threads=num_threads,
            progress=progress,
        )

    # Three ways to be driven.

    def step(self) -> Batch:
        """The next batch, always of `batch_size` rows; after an epoch comes the next.

        Also inside `nnx.jit`, `nnx.grad` and the like, when the pipeline is their argument (under
        plain `jax.jit` it would be copied in, and its cursor not come back).
        """
        return step(self)

    def __iter__(self) -> Iterator[Batch]:
        """The batches that are left of the cursor's epoch; all iterators share the cursor."""
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
        """`length` times `step_fn(*modules, self.step())` as one compiled loop; stacked results.

        With `init_carry`: `step_fn(carry, *modules, batch) -> (carry, out)`, and the result is
        `(carry, stacked outs)`. `modules` are NNX objects that `step_fn` may change (a model, an
        optimizer). `length=None` is to the end of the epoch. Compiled once for each `step_fn`
        and `length`: pass the same function, not a fresh lambda.

        `unroll` is that of `jax.lax.scan`. Rows of a source in memory are fetched for several small
        batches at a time, for at most `fetch`; None chooses. No value depends on either.
        """
        return _scan.scan(self, step_fn, length, modules, init_carry, unroll, fetch)

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        length = length_of(self.source)
        if length is None:
            raise TypeError("A source without end has no number of batches.")
        return batches_of_loop(self.batch_size, length, self.last_batch)

    def __call__(self, batch: Batch) -> Batch:
        """The batch through the stages: what a subclass may override.

        Called by hand, the rows of `batch` count as records 0, 1, ... of epoch 0.
        """
        keyring = getattr(self, "_keyring", None) or self._keyring_by_hand(batch)
        return self._graph.run(self.nodes, batch, keyring)[self._graph.sink]

    # Where it stands.

    @property
    def cursor(self) -> Cursor:
        """Epoch and offset of the next row."""
        return cursor(self)

    def seek(self, *, epoch: int, offset: int = 0) -> None:
        """Moves the cursor. `offset` counts records, in `[0, len(source))`."""
        with self._runtime.lock:
            move(self, epoch, offset)

    def reset(self) -> None:
        """Moves the cursor to the start of epoch 0."""
        self.seek(epoch=0)

    def stats(self) -> Stats:
        """How long `for` and `scan` have waited for rows and how long they have computed.

        A named tuple: `batches`, the seconds `waited` and `computed`, the rows of this epoch that
        are `masked`; and `limit`, "reading" or "computing", whichever took longer. A scan over a
        source in memory is a single call, which returns before it is computed: it is not counted.
        """
        with self._runtime.lock:
            return self._runtime.meter.stats()

    def replay(self, record: int, epoch: int = 0) -> dict[str, Batch]:
        """What every node gives for one record as it is in that epoch, run stage by stage.

        Nothing is compiled, so a debugger stops anywhere, and nothing moves. A stage that takes
        the key of a batch gets another one here, since that depends on the rows before.
        """
        source = self.source
        if not isinstance(source, EagerSourceBase):
            raise RandomAccessError(
                f"replay needs a source with `gather`, and {type(source).__name__} has none."
            )
        for name, value, end in (("record", record, source.records), ("epoch", epoch, 2**32)):
            if not 0 <= integer(value, -1) < end:
                raise SeekError(f"`{name}` must be an integer in [0, {end}), got {value!r}.")
        binding = Binding((self,))
        (copy,) = merge(binding.structure, binding.read())
        kind = word(source.records)
        where, when = np.array([record], kind), np.array([epoch], kind)
        if source.reader is not None:
            batch = jax.tree.map(jnp.asarray, source.reader.rows(where, source.element_spec))
        else:
            try:
                batch = copy.source.gather(jnp.asarray(where))
            except Exception as error:
                if (read := raised_in(error)) is not None:
                    raise read from read.__cause__
                raise
        mask = self.last_batch == "pad" or source.masks
        there, then = jnp.asarray(where), jnp.asarray(when)
        rows = Rows(then, there, there, jnp.ones(1, bool) if mask else None)
        at = Cursor(rows.epoch[0], jnp.zeros((), kind))
        return draw(copy, Fetched(batch, rows), at, Cut(1, 1, False))[0]

    def get_state(self) -> dict[str, Any]:
        """The cursor and the Variables of the stages, with a fingerprint, as plain JSON types."""
        with self._runtime.lock:
            return _state.get_state(self)

    def set_state(self, state: Mapping[str, Any] | str | bytes) -> None:
        """Goes on where `state` was taken. A `StateError` names what does not fit, and nothing
        has changed then."""
        with self._runtime.lock:
            _state.set_state(self, state)

    # What it is made of.

    @property
    def stages(self) -> list[Any]:
        """The stages in the order in which they run."""
        return list(self.nodes.values())

    @property
    def nodes(self) -> "NodeView":
        """The stages by name; assigning to a name replaces that node."""
        return NodeView(self)

    @property
    def element_spec(self) -> Spec:
        """Shapes and types of a batch as handed over."""
        return self.node_specs[self._sink]

    @property
    def node_specs(self) -> dict[str, Spec]:
        """Shapes and types of what every node gives, and of the batches of "source"."""
        with self._runtime.lock:
            binding = self._runtime.bind(self)
            values = binding.read()
            seen = binding.structure, settings(), jax.tree.map(jax.typeof, values)
            if not hasattr(self, "_specs") or self._specs[0] != seen:
                object.__setattr__(self, "_specs", (seen, self._trace(binding, values)))
            return dict(self._specs[1])

    def to_mermaid(self) -> str:
        """The graph as a Mermaid flowchart with shapes on its edges."""
        return _show.mermaid(self)

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

    # For the other rooms of the house.

    @property
    def _runtime(self) -> Runtime:
        """What drives this object; a copy or a traced pipeline has its own."""
        if not hasattr(self, "_made_runtime"):
            with _MAKING:
                if not hasattr(self, "_made_runtime"):
                    object.__setattr__(self, "_made_runtime", Runtime())
        return self._made_runtime

    def _words_of(self, part: Any) -> Words | None:
        """The base key of a source or stage: its own if it has one, else the pipeline's."""
        own = part.base if isinstance(part, EagerSourceBase | OperatorModule) else None
        if own is not None:
            return own.get_raw_value()
        if self._base is None:
            return None
        wanted = "shuffle" if part is self.source else getattr(part, "stream_name", None)
        for stream in (wanted, "default"):
            if stream in self._base.names:
                return self._base.get(stream).get_raw_value()
        return None

    def _transform(self, batch: Batch, keyring: Keyring, mask: Mask | None) -> dict[str, Batch]:
        """What every node gives for a batch from the source, and "source" itself.

        The output of the sink keeps the mask, also where a stage dropped the field.
        """
        if type(self).__call__ is Pipeline.__call__:
            outputs = self._graph.run(self.nodes, batch, keyring)
        else:
            object.__setattr__(self, "_keyring", keyring)
            try:
                out = call_stage(OVERRIDE, self.__call__, [(NAME, batch)], keyring)
            finally:
                object.__delattr__(self, "_keyring")
            outputs = {NAME: batch, OVERRIDE: out}
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
        _ = self.node_specs

    def _check_settings(self) -> None:
        """Raises for settings that do not fit one another."""
        length, size, policy = length_of(self.source), self.batch_size, self.last_batch
        if not 1 <= integer(size, 0) < 2**31:
            raise BatchSizeError(size)
        if integer(self.num_threads, 0) < 1:
            raise ValueError(
                f"`num_threads` must be an integer of at least 1, got {self.num_threads!r}."
            )
        if policy not in ("keep", "drop", "pad"):
            raise LastBatchError(f'`last_batch` must be "keep", "drop" or "pad", got {policy!r}.')
        if length == 0:
            raise EmptySourceError("`source`")
        if length is not None and length >= 2**32 and not jax.config.read("jax_enable_x64"):
            raise SourceError(
                f"A source of {length} records is counted in 64 bits, which JAX has turned off. "
                'Turn them on: jax.config.update("jax_enable_x64", True).'
            )
        if length is not None and policy == "drop" and size > length:
            raise LastBatchError(
                f'Under last_batch="drop" an epoch of {length} records holds no batch of {size}. '
                'Take a smaller `batch_size`, or "keep" or "pad".'
            )
        if isinstance(self.source, EagerSourceBase) and self.source.shuffle:
            self._need_words(NAME, self.source)

    def _trace(self, binding: Binding, values: list[Any]) -> dict[str, Spec]:
        """The specs of all outputs, from an abstract run on a copy: no state moves."""

        def outputs(values: list[Any]) -> dict[str, Batch]:
            (copy,) = merge(binding.structure, values)
            cut = running_on(copy.batch_size, length_of(copy.source), copy.last_batch)
            start = start_of(copy, cut)
            order = order_at(copy, start.epoch, cut.epochs)
            if isinstance(copy.source, StreamSource):
                fetched = copy.source.blank(cut)
            else:
                fetched = fetched_from(copy, order, start, cut, 1, cut.epochs)
            found, _ = draw(copy, fetched, start, cut)
            changes(binding.structure, (copy,), values)  # raises for what may not change
            return found

        specs = jax.eval_shape(outputs, values)  # which sorts its names
        return {name: specs[name] for name in (NAME, *self._graph.names, OVERRIDE) if name in specs}

    def _need_words(self, name: str, part: Any) -> Words:
        found = self._words_of(part)
        if found is None:
            raise RngsError(
                f"{name!r} draws random numbers and needs a seed: give the pipeline "
                "rngs=nnx.Rngs(seed), or the part `rngs` of its own."
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
        rows = jax.tree.leaves(batch)[0].shape[0]
        zero = jnp.uint32(0)

        def keyring(name: str, stage: Any, wanted: str) -> jax.Array:
            node = node_key(self._need_words(name, stage), name)
            if wanted == "key":
                return batch_key(node, zero, zero)
            return record_keys(
                node, jnp.zeros(rows, jnp.uint32), jnp.arange(rows, dtype=jnp.uint32)
            )

        return keyring


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
            pipeline._nodes.put(name, as_stage(name, stage))
            try:
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


OVERRIDE = "__call__"
"""The name under which a subclass's own `__call__` is the one node of the graph."""
