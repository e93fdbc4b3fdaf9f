"""What a stage is, and how it is called: the one calling convention, and its errors."""

import collections
import contextlib
import functools
import inspect
import itertools
import re
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import equinox as eqx
import jax
from flax import nnx
from flax.errors import TraceContextError

from .._keys import SOURCE, BaseKey
from .._types import Batch, Scalar, is_traced, spec_text
from .._variables import MethodStage, PytreeStage, flatten, iter_graph, method_of, with_variables
from .._xla import in_own_branch
from ..errors import DataraxError, StageError
from ..operators import ElementOperator, OperatorModule
from ._captured import NNX, blamed, captured, own, reached
from ._graph import Graph
from ._hints import Hint, first_misfit, hints_of

Stage: TypeAlias = Callable[..., Batch]

Wanted: TypeAlias = Literal["key", "keys"]
"""Which keys a stage takes: one for the batch, or one for each of its rows."""


class Keyring(NamedTuple):
    """The random keys of one batch.

    `keys(name, stage, wanted)` gives those of a node. `offset` is that of the batch, the
    traced number that `in_own_branch` needs.
    """

    keys: Callable[[str, Stage, Wanted], jax.Array]
    offset: Scalar


def run_graph(
    graph: Graph, stages: Mapping[str, Stage], batch: Batch, keyring: Keyring
) -> dict[str, Batch]:
    """Runs the stages in order. Returns the output of every node, and the batch as "source"."""
    outputs, hints = {SOURCE: batch}, []
    for name, predecessors in graph.predecessors:
        inputs = [(p, outputs[p]) for p in predecessors]
        outputs[name] = call_stage(name, stages[name], inputs, keyring)
        function = called(stages[name])
        hints += hints_of(name, function, [x for _, x in inputs], outputs[name])
    misfit = first_misfit(hints)
    if misfit is not None:
        came = {p: spec_text(outputs[p]) for p in graph.reads(misfit.node)}
        raise StageError(misfit.node, came, misfit_text(misfit))
    return outputs


def chain_names(stages: Sequence[Stage]) -> list[str]:
    """Names for the stages of a chain: that of the function or class, or the first free `name_k`.

    A node's keys are derived from its name. Numbers would change when a stage is inserted.
    """
    names, taken, counts = [], {SOURCE}, collections.defaultdict(itertools.count)
    for stage in stages:
        named = stage.fn if isinstance(stage, ElementOperator) else stage
        _, name = method_of(named) or (None, own(named, "__name__", type(named).__name__))
        plain = name.strip("<>_") or "stage"
        numbered = (f"{plain}_{k}" if k else plain for k in counts[plain])
        names.append(next(x for x in numbered if x not in taken))
        taken.add(names[-1])
    return names


def key_wanted(stage: Stage) -> Wanted | None:
    """Which keys a stage takes: "key" or "keys", if it declares a parameter of that name.

    Raises a `TypeError` if it declares both, or another keyword without a default.
    """
    if isinstance(stage, OperatorModule):
        return "keys" if stage.stochastic else None
    try:
        declared = inspect.signature(called(stage)).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return None
    bound = stage.keywords if isinstance(stage, functools.partial) else {}
    wanted: list[Wanted] = [
        name
        for name in ("key", "keys")
        if name in declared
        and name not in bound
        and declared[name].kind in (_KEYWORD_ONLY, _EITHER)
    ]
    if len(wanted) > 1:
        raise TypeError(
            "a stage declares `key` (one for the batch) or `keys` (one a row), not both"
        )
    for name, parameter in declared.items():
        needed = parameter.kind is _KEYWORD_ONLY and parameter.default is parameter.empty
        if needed and name not in bound and name not in wanted:
            raise TypeError(
                f"a stage is called with batches, and with `key` (one for the batch) or `keys` "
                f"(one a row) if it declares one, but this one also needs the keyword `{name}`"
            )
    return wanted[0] if wanted else None


_KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY
_EITHER = inspect.Parameter.POSITIONAL_OR_KEYWORD


def call_stage(
    name: str, stage: Stage, inputs: Sequence[tuple[str, Batch]], keyring: Keyring
) -> Batch:
    """The output of one node. Stages are called here alone, and an error names its node here."""
    came = {p: spec_text(batch) for p, batch in inputs}

    def run(stage: Stage, batches: Sequence[Batch], keys: Mapping[str, jax.Array]) -> Batch:
        with unchanged_but_variables(stage):
            output = stage(*batches, **keys)
        check_batch(output)
        return output

    try:
        kind: Any = stage
        if isinstance(kind, type) and issubclass(kind, nnx.Pytree | eqx.Module):
            raise TypeError(f"a stage is an object, got the class {kind.__name__} itself")
        wanted = key_wanted(stage)
        keys = {wanted: keyring.keys(name, stage, wanted)} if wanted else {}
        # Each stage gets dicts of its own, so that no other sees what it writes into them.
        batches = [jax.tree.map(lambda x: x, batch) for _, batch in inputs]
        with jax.named_scope(scope(name)):
            if wanted and not keeps_variables(stage):
                # Else XLA fuses a random crop into its consumers, and computes it again in each.
                copy = copied(stage)
                output = in_own_branch(
                    keyring.offset, lambda *args: run(copy(), *args), batches, keys
                )
            else:
                output = run(stage, batches, keys)
        if not any(map(is_traced, jax.tree.leaves(output))):
            jax.block_until_ready(output)  # outside of a trace: raise errors of the device here
    except DataraxError:
        raise
    except Exception as error:
        raise StageError(
            name, came, f"{type(error).__name__}: {error}{advice(stage, error)}"
        ) from error
    return output


OUR_WORDS = "An operator must", "a stage must", "every field of a batch", "all fields of a batch"
"""How our own errors about the output of a stage begin: they need no further explanation."""


NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
"""What JAX raises where a traced function needs the value of an array."""


def advice(stage: Stage, error: Exception) -> str:
    """What to do about an error whose own text does not say it; empty if nothing is known."""
    found, text = [], str(error)
    if isinstance(stage, OperatorModule) and not text.startswith(OUR_WORDS):
        if re.search("ax[ei]s|dimension|indexed", text):
            found.append("An operator works on one row at a time, without the axis of rows.")
        if not stage.stochastic and "NoneType" in text:
            found.append("Its key is None, since it was not built with stochastic=True.")
        if isinstance(error, TypeError) and re.search("positional argument|Element' obj", text):
            found.append(
                "An operator's function is called as `fn(element, key)`, with `key` None unless it "
                "is stochastic, and has the fields of the record in `element.data`."
            )
        if isinstance(error, TraceContextError):
            found.append(
                "An operator is mapped over the rows of a batch, and no Variable can change in it: "
                "draw from `key`, or write a stage for the whole batch."
            )
    name = own(stage, "__qualname__") or f"{type(stage).__qualname__}.__call__"
    if isinstance(error, TypeError) and f"{name}() missing" in str(error):
        found.append(
            "A stage is called with a batch of each of its predecessors, and with the random keys "
            "that it declares: `key`, one for the batch, or `keys`, one for each row."
        )
    drops = isinstance(error, jax.errors.NonConcreteBooleanIndexError)
    if drops and not isinstance(stage, OperatorModule):
        found.append(
            "A stage cannot drop rows, since it is compiled and all shapes are fixed. Mask them, "
            "or leave their records out of the source."
        )
    elif isinstance(error, NEEDS_VALUES):
        found.append("A stage is compiled: write it in jax.numpy, or do this in the source.")
    function = _function_of(stage)
    if function is not None and (names := blamed(function, error)):
        found.append(_outside(names))
    return "".join(f"\n{sentence}" for sentence in found)


def keeps_variables(stage: Stage) -> bool:
    """Whether a stage has Variables that a call could change. Keys of its own do not count."""
    holder = getattr(stage, "__self__", stage)
    if not isinstance(holder, nnx.Pytree):
        return False
    variables = (x for _, x in iter_graph(holder) if isinstance(x, nnx.Variable))
    return not all(isinstance(x, BaseKey) for x in variables)


def copied(stage: Stage) -> Callable[[], Stage]:
    """A function that copies the stage in the trace that calls it: NNX lets no other trace change
    its Variables."""
    if not isinstance(stage, nnx.Pytree):
        return lambda: stage
    graphdef, flat = flatten(stage)
    return lambda: nnx.graph.unflatten(graphdef, flat)


def scope(name: str) -> str:
    """The named scope that marks the operations of a node."""
    return f"node:{urllib.parse.quote(name, safe='')}:"


def scoped(name_stack: str) -> str | None:
    """The node whose scope is in the name stack of an operation."""
    found = re.search("node:([^:]*):", name_stack)
    return urllib.parse.unquote(found[1]) if found else None


@contextlib.contextmanager
def unchanged_but_variables(stage: Any) -> Iterator[None]:
    """Raises if a stage changes more of itself than the values of its Variables."""
    if not isinstance(stage, nnx.Pytree):
        yield
        return
    graphdef, before = flatten(stage)
    yield
    now, after = flatten(stage)
    if now != graphdef:
        raise TypeError(
            "a stage must not add, remove or assign attributes of its own when it is called; "
            "create them in `__init__`, and keep what changes in an nnx.Variable"
        )
    for path, old, new in zip(before.paths, before.leaves, after.leaves, strict=True):
        if old is not new:
            raise TypeError(
                "a stage must keep what it changes in an nnx.Variable, but assigned the array "
                f"`{'.'.join(map(str, path))}`"
            )


def misfit_text(hint: Hint) -> str:
    """The error for a value that does not fit its annotation."""
    got = spec_text({"": hint.value}).strip()
    annotation = re.sub(r"[\w.]+\.Array\b", "Array", hint.annotation.__name__)
    return (
        f"{hint.where} is annotated {annotation}, got {got}; "
        "an axis name means the same size in every stage of a graph."
    )


def check_batch(output: Any, what: str = "a stage must return") -> int:
    """The number of rows of a batch: a dict of arrays, nested or not, all with that many.

    Raises for anything else.
    """
    if not isinstance(output, dict):
        got = "an array" if isinstance(output, jax.Array) else type(output).__name__
        raise TypeError(f"{what} a dict of arrays, got {got}")
    rows = dict(_rows_of(output, ""))
    if len(set(rows.values())) != 1:
        raise ValueError(f"all fields of a batch must have the same number of rows, got {rows}")
    return next(iter(rows.values()))


def check_source_batch(batch: Any, rows: int) -> None:
    """Raises if a source did not return a batch with the `rows` rows it was asked for."""
    try:
        if (found := check_batch(batch)) != rows:
            raise ValueError(f"a source must give the {rows} rows it is asked for, got {found}")
    except (TypeError, ValueError) as error:
        raise StageError(SOURCE, {}, f"{type(error).__name__}: {error}") from error


def _rows_of(fields: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, int]]:
    for name, x in fields.items():
        if isinstance(x, dict):
            yield from _rows_of(x, f"{prefix}{name}.")
        elif eqx.is_array(x) and x.ndim:
            yield f"{prefix}{name}", x.shape[0]
        else:
            got = f"a scalar {x.dtype}" if eqx.is_array(x) else f"{type(x).__name__}"
            raise TypeError(
                "every field of a batch must be an array with its rows on axis 0, got "
                f"{prefix + name!r} as {got}"
            )


def called(stage: Stage) -> Stage:
    """The callable whose signature and annotations are those of the stage."""
    if isinstance(stage, PytreeStage):
        return stage.module
    if isinstance(stage, MethodStage):
        return stage.method
    if hasattr(type(stage), "__getattr__") and own(stage, "__wrapped__") is None:
        return stage.__call__  # `inspect.signature(stage)` would call its `__getattr__`
    return stage


def as_stage(name: str, stage: Any) -> Any:
    """The stage as a pipeline keeps it: one that holds arrays becomes a module with Variables."""
    if not isinstance(stage, Callable):
        got = type(stage).__name__
        raise StageError(name, {}, f"TypeError: a stage must be callable, got {got}")
    if not method_of(stage):
        check_captured(name, stage)
    return with_variables(stage)


def check_captured(name: str, stage: Stage, constants: Sequence[Any] = ()) -> None:
    """Raises for a function that uses NNX objects from outside, or another callable that holds some
    without being one. `constants` are those of the traced program."""
    if (function := _function_of(stage)) is None:
        return
    parts = jax.tree.leaves(function, is_leaf=lambda x: isinstance(x, NNX))
    names = reached(function) if any(isinstance(x, NNX) for x in parts) else []
    if names := names or captured(function, constants):
        raise StageError(name, {}, _outside(names))


def _function_of(stage: Stage) -> Callable[..., Any] | None:
    """The function or other callable that the user gave; None for an NNX object."""
    function = stage.fn if isinstance(stage, ElementOperator) else stage
    function = function.static if isinstance(function, PytreeStage) else function
    return None if isinstance(function, nnx.Pytree) else function


def _outside(names: Sequence[str]) -> str:
    return (
        f"A stage must hold the NNX objects that it uses, but takes {list(names)} from outside; "
        "make them attributes of an nnx.Module, and that the stage."
    )
