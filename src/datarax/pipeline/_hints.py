"""jaxtyping annotations of stages, checked where batches pass."""

import functools
import inspect
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import AbstractArray, PyTree, jaxtyped


class Hint(NamedTuple):
    """An annotation, and the value that it describes."""

    node: str
    where: str
    annotation: Any
    value: Any


def hints_of(node: str, stage: Any, inputs: Sequence[Any], output: Any) -> list[Hint]:
    """The annotations of a stage, with the values of one call of it."""
    plain = stage.func if isinstance(stage, functools.partial) else stage
    function = plain if inspect.isroutine(plain) else type(plain).__call__
    annotations = _type_hints(function)
    try:
        parameters = list(inspect.signature(stage).parameters.values())
    except Exception:  # written in C, or with a broken `__signature__`
        return []
    values = [
        (f"argument `{parameter.name}`", annotations.get(parameter.name), batch)
        for parameter, batch in zip(_spread(parameters, len(inputs)), inputs, strict=False)
    ]
    values.append(("the result", annotations.get("return"), output))
    return [
        Hint(node, *leaf) for where, hint, value in values for leaf in _leaves(where, hint, value)
    ]


def first_misfit(hints: Sequence[Hint]) -> Hint | None:
    """The first value that is not as annotated; an axis name means one size in all of `hints`."""
    with jaxtyped("context"):  # all `isinstance` directly in here share their axis names
        for hint in hints:
            try:
                fits = isinstance(hint.value, hint.annotation)
            except Exception:  # a size that refers to attributes of the stage, say
                continue
            if not fits:
                return hint
    return None


def _spread(parameters: list[inspect.Parameter], count: int) -> list[inspect.Parameter]:
    """The parameters that `count` positional arguments bind to; `*args` repeats."""
    for i, parameter in enumerate(parameters):
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            return parameters[:i] + [parameter] * (count - i)
    return parameters


def _leaves(where: str, hint: Any, value: Any) -> Iterator[tuple[str, Any, Any]]:
    """The array annotations inside the annotation of a batch, each with its array."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray | PyTree):
        yield where, hint, value
    elif isinstance(hint, type) and typing.is_typeddict(hint):
        for field, inner in _type_hints(hint).items():
            if field in value:
                yield from _leaves(f"{where}, field {field!r},", inner, value[field])
    elif _is_mapping(hint) and isinstance(value, Mapping):
        inner = typing.get_args(hint)[-1]
        for field, x in value.items():
            yield from _leaves(f"{where}, field {field!r},", inner, x)


def _type_hints(x: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(x)
    except Exception:  # evaluating the text of an annotation can raise anything
        return {}


def _is_mapping(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    return isinstance(origin, type) and issubclass(origin, Mapping)
