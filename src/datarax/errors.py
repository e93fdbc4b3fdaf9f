"""The exceptions, one for each rule that a program can break. All are `ValueError`s.

`code` names the rule in the spec (chapter "Errors") and is the same in every engine. A message
states the rule, what came instead, and the way out (spec ERR-023).
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any


class DataraxError(ValueError):
    """Base class of all errors in this module."""

    code: str = "error"

    def __init_subclass__(cls, code: str | None = None):
        super().__init_subclass__()
        if code is not None:
            cls.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickle must not call `__init__`: its arguments are not those in `args`.
        return type(self).__new__, (type(self), *self.args), vars(self)


class GraphError(DataraxError, code="graph"):
    """The nodes and edges do not form a graph that can run."""


class CycleError(GraphError, code="cycle"):
    """The edges form a cycle. `nodes` lists it in order and repeats the first node at the end."""

    def __init__(self, nodes: Sequence[str]):
        self.nodes = list(nodes)
        super().__init__(
            f"`edges` must not run in a circle, but {' -> '.join(self.nodes)} does. "
            "Remove one of these edges."
        )


class SelfLoopError(GraphError, code="self-loop"):
    """A node names itself as its predecessor."""

    def __init__(self, node: str):
        self.node = node
        super().__init__(
            f"A node must not be its own predecessor, but {node!r} is. "
            f"Remove {node!r} from edges[{node!r}]."
        )


class UnknownPredecessorError(GraphError, code="unknown-predecessor"):
    """`node` has the predecessor `name`, which is neither a node nor "source"."""

    def __init__(self, node: str, name: object, known: Sequence[str]):
        self.node, self.name = node, name
        super().__init__(
            f"Every predecessor must be a node or 'source', but edges[{node!r}] names {name!r}. "
            f"Nodes are {list(known)}."
        )


class UnknownSinkError(GraphError, code="unknown-sink"):
    """The sink `name` is not a node."""

    def __init__(self, name: object, known: Sequence[str]):
        self.name = name
        super().__init__(f"`sink` must be one of the nodes {list(known)}, got {name!r}.")


class MissingEdgesError(GraphError, code="missing-edges"):
    """`node` has no entry in `edges`."""

    def __init__(self, node: str):
        self.node = node
        super().__init__(
            f"Every node needs an entry in `edges`, but {node!r} has none. "
            f"Add edges[{node!r}] = [] if it reads the source."
        )


class EdgesWithoutNodeError(GraphError, code="edges-without-node"):
    """`edges` has an entry for `name`, which is no node."""

    def __init__(self, name: object, known: Sequence[str]):
        self.name = name
        super().__init__(
            f"Every entry of `edges` must belong to a node, but {name!r} is not among "
            f"{list(known)}. Add the node or remove the entry."
        )


class UnusedNodeError(GraphError, code="unused-node"):
    """No path leads from `node` to the sink."""

    def __init__(self, node: str, sink: str):
        self.node = node
        super().__init__(
            f"Every node must lead to the sink {sink!r}, but {node!r} does not. "
            "Connect it or remove it."
        )


class NoNodesError(GraphError, code="no-nodes"):
    """The graph has no nodes."""

    def __init__(self):
        super().__init__(
            "`nodes` must hold at least one node, got none. "
            "For batches straight from the source use Pipeline(stages=[])."
        )


class PredecessorsTypeError(GraphError, code="predecessors-type"):
    """The predecessors of `node` are not a list of names; a string is none."""

    def __init__(self, node: str, value: object):
        self.node = node
        super().__init__(
            f"The predecessors of a node must be a list of names, but edges[{node!r}] is "
            f"{value!r}. Write edges[{node!r}] = [...]."
        )


class NodeNameError(GraphError, code="node-name"):
    """A node has an invalid `name`.

    It is empty, "source", not a string of valid Unicode or starts with `_`, or it has the CRC-32 of
    the name of another node, which would give both nodes the same keys.
    """

    def __init__(self, name: object, other: str | None = None):
        self.name = name
        rule = (
            "A node's name must be a string of valid Unicode that is not empty, is not 'source' "
            f"and does not start with '_', got {name!r}."
        )
        if other is not None:
            rule = (
                "The names of two nodes must differ in their CRC-32, from which random keys are "
                f"counted, but those of {name!r} and {other!r} are equal."
            )
        super().__init__(f"{rule} Rename the node.")


class StagesAndNodesError(GraphError, code="stages-and-nodes"):
    """`stages` was given together with a graph, or a graph without all of its three arguments."""

    def __init__(self, given: Sequence[str]):
        super().__init__(
            "Give either `stages` (a chain) or all of `nodes`, `edges` and `sink` (a graph), "
            f"got {', '.join(given)}."
        )


class StageError(DataraxError, code="stage"):
    """A stage failed, or returned something that is not a batch.

    `node` is the stage's name. `predecessors` maps the name of each predecessor to its spec as
    text. `__cause__` is the original error.
    """

    def __init__(self, node: str, predecessors: Mapping[str, str], reason: str):
        self.node, self.predecessors = node, dict(predecessors)
        came = "".join(f"\n  {name}: {spec}" for name, spec in predecessors.items())
        called = f"\nIt was called with{came}" if came else ""
        super().__init__(f"Stage {node!r} failed: {reason}{called}")


class BatchSizeError(DataraxError, code="batch-size"):
    """`batch_size` is not an integer in `[1, 2**31)`."""

    def __init__(self, value: object):
        super().__init__(f"`batch_size` must be an integer in [1, 2**31), got {value!r}.")


class ShardingError(DataraxError, code="sharding"):
    """`sharding` cannot be applied to the rows of a batch."""

    def __init__(self, what: str):
        super().__init__(f"`sharding` {what}.")


class LastBatchError(DataraxError, code="last-batch"):
    """`last_batch` is unknown, or does not fit the source or the scan.

    "drop" needs a source of at least one batch. A scan to the end of an epoch needs whole batches
    under "keep".
    """


class ScanLengthError(DataraxError, code="scan-length"):
    """The `length`, `unroll` or `fetch` of a scan is not a valid number of batches."""

    def __init__(self, value: object, name: str = "length"):
        least, without = (
            (0, "to scan to the end of the epoch") if name == "length" else (1, "for the default")
        )
        super().__init__(
            f"`{name}` must be an integer of at least {least}, got {value!r}. "
            f"Leave it out {without}."
        )


class CapturedError(DataraxError, code="captured"):
    """The function of a scan uses NNX objects that are not in its `modules`.

    `names` lists them. A compiled program would hold their current values for good. The error is
    also raised for a pipeline that a traced function closes over.
    """

    def __init__(self, names: Sequence[str], *, text: str | None = None, way_out: str = ""):
        self.names = list(names)
        super().__init__(
            text
            or f"`step_fn` must be given the NNX objects that it uses, but reaches {self.names} by "
            "itself: compiled, it would keep their current values for good. "
            "Pass them in `modules=`, and `step_fn` gets them as arguments. Read what is not an "
            f"array before the call.{way_out}"
        )


class MaskNameError(DataraxError, code="mask-name"):
    """The name of the mask is that of a field, or not a string.

    Batches have a mask under `last_batch="pad"`, and over sources that mask unreadable rows.
    """

    def __init__(self, name: object, fields: Sequence[str]):
        super().__init__(
            "The mask of a batch needs a field name of its own, but "
            f"mask_name={name!r} and the data has the fields {list(fields)}. "
            "Choose another `mask_name`."
        )


class RngsError(DataraxError, code="rngs"):
    """A shuffle or a stage needs random numbers, and neither it nor the pipeline has `rngs`."""


class SourceError(DataraxError, code="source"):
    """Base class of the errors of sources. A source of 2**32 or more records raises it itself where
    JAX has 64-bit types turned off."""


class SourceTypeError(SourceError, code="source-type"):
    """The object given as `source` is not a source."""

    def __init__(self, value: object):
        of_class = isinstance(value, type)
        got = f"the class {value.__name__} itself" if of_class else type(value).__name__
        super().__init__(
            "`source` must be a source (an EagerSourceBase, or an nnx.Module with `get_batch_at`), "
            f"got {got}. For data in memory: "
            "MemorySource(MemorySourceConfig(), data)."
        )


class EmptySourceError(SourceError, code="empty-source"):
    """The source has no records, or a pass over a stream has none."""

    def __init__(self, what: str = "`data`", *, text: str | None = None):
        super().__init__(text or f"A source must hold at least one record, but {what} holds none.")


class UnequalLengthsError(SourceError, code="unequal-lengths"):
    """The fields have different numbers of rows."""

    def __init__(self, lengths: Mapping[str, int]):
        shown = dict(itertools.islice(lengths.items(), 20))
        more = f" and {len(lengths) - len(shown)} more" if len(lengths) > len(shown) else ""
        super().__init__(
            f"All fields of `data` must have the same number of rows, but got {shown}{more}."
        )


class FieldTypeError(SourceError, code="field-type"):
    """JAX cannot hold the values of `field`, or not without changing them.

    Rounding a float is allowed.
    """

    def __init__(self, field: str, reason: str):
        self.field = field
        super().__init__(f"Field {field!r} {reason}")


class FileError(SourceError, code="file"):
    """`file` is missing, damaged, or of another format."""

    def __init__(self, file: str, reason: str):
        self.file = file
        super().__init__(f"File {file!r} {reason}")


class ReadError(SourceError, code="read"):
    """`source` could not read `record` of `file`; `__cause__` is the original error.

    `record` is None if every record of the batch could be read on its own afterwards; a retry may
    then succeed. `stage` is always "source".
    """

    def __init__(
        self,
        source: str,
        file: str,
        record: int | None,
        reason: str,
        *,
        way_out: str = 'To go on without such records, give the source on_error="mask" and '
        "`max_errors`, the most of an epoch.",
        retry: bool = True,
    ):
        self.source, self.file, self.record, self.stage = source, file, record, "source"
        which = "a batch" if record is None else f"record {record}"
        place = "" if file == source else f" of {file}"
        again = "The cursor has not moved, so a retry goes on with this batch. "
        super().__init__(
            f"Stage {self.stage!r}: {source} could not read {which}{place}: {reason}\n"
            f"{again if retry else ''}{way_out}".rstrip()
        )


class RandomAccessError(SourceError, code="random-access"):
    """A source without random access, such as a stream, was read inside `jit` or by `replay`."""


class SpecsError(SourceError, code="specs"):
    """The records of a mixture's sources differ in fields, shapes or types."""


class StateError(DataraxError, code="state"):
    """The state is malformed or of another pipeline; `field` is the first entry that differs."""

    def __init__(self, field: str, reason: str):
        self.field = field
        super().__init__(f"The state does not fit this pipeline: {field!r} {reason}")


class SeekError(DataraxError, code="seek"):
    """A cursor, record number or `start` is outside the stream."""
