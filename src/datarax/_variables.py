"""Wraps callables that hold arrays in NNX modules that hold them as Variables."""

import functools
import inspect
from typing import Any

import equinox as eqx
import jax
import numpy as np
from flax import nnx

from ._modules import Watched

# A part can be held in two places, so these need NNX's graph mode even if the user has turned it
# off. An NNX without the option always has it on.
_AS_GRAPH = {"graph": True} if "graph" in inspect.signature(nnx.iter_graph).parameters else {}
iter_graph: Any = functools.partial(nnx.iter_graph, **_AS_GRAPH)
flatten: Any = functools.partial(nnx.graph.flatten, **_AS_GRAPH)


def with_variables(function: Any) -> Any:
    """`function` as an NNX module whose Variables are its arrays, so they are trained and saved.

    Returns `function` itself if it holds no arrays, is an NNX object, or is not callable.
    """
    if isinstance(function, nnx.Pytree) or not callable(function):
        return function
    if method := method_of(function):
        return MethodStage(*method)
    arrays = map(_is_array, jax.tree.leaves(function))
    return PytreeStage(function) if isinstance(function, eqx.Module) or any(arrays) else function


class PytreeStage(Watched):
    """An Equinox module, or another pytree, as a stage.

    Its arrays become Variables, those of inexact dtypes `nnx.Param`s. Every call reads their
    current values. `module` is the wrapped module with these values; an Equinox module is in
    inference mode after `pipeline.eval()`.
    """

    deterministic: bool = False

    def __init__(self, module: Any):
        self.deterministic = False  # NNX's `eval()` and `train()` set it
        arrays, self.static = eqx.partition(module, _is_array)
        self.arrays = nnx.List(
            [
                nnx.Param(x) if eqx.is_inexact_array_like(x) else nnx.Variable(x)
                for x in jax.tree.leaves(arrays)
            ]
        )
        leaves = jax.tree.leaves(arrays, is_leaf=lambda x: x is None)
        self.places = tuple(i for i, x in enumerate(leaves) if x is not None)
        self.__name__ = type(module).__name__

    @property
    def module(self) -> Any:
        leaves, treedef = jax.tree.flatten(self.static, is_leaf=lambda x: x is None)
        for place, variable in zip(self.places, self.arrays, strict=True):
            leaves[place] = variable[...]
        module = jax.tree.unflatten(treedef, leaves)
        return eqx.nn.inference_mode(module) if self.deterministic else module

    def __call__(self, *args: Any, **keys: Any) -> Any:
        return self.module(*args, **keys)


class MethodStage(Watched):
    """A method of an NNX object as a stage; the pipeline holds the object's Variables."""

    def __init__(self, module: nnx.Pytree, name: str):
        self.module = module
        self.__name__ = name

    @property
    def method(self) -> Any:
        return getattr(self.module, self.__name__)

    def __call__(self, *args: Any, **keys: Any) -> Any:
        return self.method(*args, **keys)


def method_of(stage: Any) -> tuple[nnx.Pytree, str] | None:
    """The NNX object that a stage is a bound method of, and the method's name; None for others."""
    if inspect.ismethod(stage):
        holder, function = stage.__self__, stage.__func__
    elif isinstance(stage, functools.partial) and len(stage.args) == 1 and not stage.keywords:
        [holder], function = stage.args, stage.func  # how `nnx.jit` binds a method
    else:
        return None
    if isinstance(holder, nnx.Pytree):
        for kind in type(holder).__mro__:
            for name, x in vars(kind).items():
                if x is function:
                    return holder, name
    return None


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray)
