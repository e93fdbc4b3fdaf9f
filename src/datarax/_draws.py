"""Makes `jax.random` faster in programs for a CPU, with the same bits.

On a CPU, JAX lowers each block of threefry to a loop of five iterations, so that XLA cannot fuse
its 20 rounds into every consumer and recompute them there. But one iteration is a dozen kernels,
and a few draws take longer than a batch of small images. This module inlines the rounds, which XLA
compiles to one kernel, and `in_own_branch` prevents the recomputation.
"""

import functools
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, jaxpr_as_fun
from jax.extend.random import threefry_prng_impl

from ._keys import rounds, typed
from ._types import is_traced
from ._xla import in_own_branch


def with_inlined_threefry(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` for use under `jax.jit`, with the rounds of threefry inlined in its program.

    If `function` was made by `jax.jit`, its cached trace is used.
    """

    def run(*args: Any) -> Any:
        leaves = jax.tree.leaves(args)
        if not any(map(is_traced, leaves)):  # `jax.disable_jit`, or `jax.debug_nans` locating a NaN
            return function(*args)
        program, out = jax.make_jaxpr(function, return_shape=True)(*args)
        results = jaxpr_as_fun(_Rewriter().program(program))(*leaves)
        return jax.tree.unflatten(jax.tree.structure(out), results)

    return run


class _Rewriter:
    """Replaces equations by the rules in `_RULES`, in a program and in the programs nested in it.

    Nested programs that JAX does not hold as `ClosedJaxpr` (`jax.checkpoint`, a kernel) stay
    unchanged.
    """

    def __init__(self):
        # A program that is called several times must stay one object, so that JAX lowers it once.
        # The key is the id of the old program; the value keeps that alive, so no id is reused.
        self._done: dict[int, tuple[Any, Any]] = {}

    def program(self, old: ClosedJaxpr) -> ClosedJaxpr:
        """The rewritten program; `old` itself if nothing in it is replaced."""
        if id(old) not in self._done:
            parts = [self._replacements(x) for x in old.jaxpr.eqns]
            equations = [x for new in parts for x in new]
            same = len(equations) == len(parts) and all(map(is_, equations, old.jaxpr.eqns))
            new = old if same else old.replace(jaxpr=old.jaxpr.replace(eqns=equations))
            self._done[id(old)] = old, new
        return self._done[id(old)][1]

    def _replacements(self, equation: JaxprEqn) -> Sequence[JaxprEqn]:
        rule = _RULES.get(equation.primitive.name)
        if rule is None or not _is_threefry(equation):
            inner = {name: self._parameter(x) for name, x in equation.params.items()}
            same = all(x is equation.params[name] for name, x in inner.items())
            return [equation if same else equation.replace(params=inner)]
        specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in _avals(equation.invars)]
        with equation.ctx.manager:  # the settings under which it was traced
            written = jax.make_jaxpr(functools.partial(rule, **equation.params))(*specs)
        # Equations have no place for constants. A rule can have some if
        # `jax_threefry_partitionable` is off.
        if written.consts:
            return [equation]
        names = dict(zip(written.jaxpr.invars, equation.invars, strict=True))
        names |= dict(zip(written.jaxpr.outvars, equation.outvars, strict=True))
        return [
            x.replace(
                invars=[y if isinstance(y, Literal) else names.get(y, y) for y in x.invars],
                outvars=[names.get(y, y) for y in x.outvars],
                source_info=equation.source_info,
            )
            for x in self.program(written).jaxpr.eqns  # replaces `threefry2x32` inside the others
        ]

    def _parameter(self, x: Any) -> Any:
        if isinstance(x, ClosedJaxpr):
            return self.program(x)
        if type(x) is tuple and x and all(isinstance(y, ClosedJaxpr) for y in x):  # branches
            new = tuple(map(self.program, x))
            return x if all(map(is_, x, new)) else new
        return x


def _avals(atoms: Sequence[Any]) -> list[Any]:
    return [x.aval for x in atoms]


def _is_threefry(equation: JaxprEqn) -> bool:
    """Whether `equation` computes at least one block of threefry, and all on every device."""
    avals = _avals((*equation.invars, *equation.outvars))
    dtype = avals[0].dtype
    keyed = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    whole = not any(any(x.sharding.spec) for x in avals)  # no explicit mesh axis
    return (not keyed or dtype == _threefry_keys()) and whole and all(x.size for x in avals)


@functools.cache  # not a constant, which would noticeably slow the import
def _threefry_keys() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32")).dtype


def _each(function: Callable[..., Any], keys: jax.Array, *args: Any) -> Any:
    """Maps `function`, which takes the words of one key, over all axes of `keys`."""
    for _ in range(keys.ndim):
        function = jax.vmap(function)
    return function(jax.random.key_data(keys), *args)


def _bits(keys: jax.Array, *, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    draw = functools.partial(threefry_prng_impl.random_bits, bit_width=bit_width, shape=shape)
    return _each(draw, keys)


def _split(keys: jax.Array, *, shape: tuple[int, ...]) -> jax.Array:
    return typed(_each(lambda key: threefry_prng_impl.split(key, shape), keys))


def _fold_in(keys: jax.Array, numbers: jax.Array) -> jax.Array:
    shape = jnp.broadcast_shapes(keys.shape, numbers.shape)
    keys, numbers = jnp.broadcast_to(keys, shape), jnp.broadcast_to(numbers, shape)
    return typed(_each(threefry_prng_impl.fold_in, keys, numbers))


def _block(*words: jax.Array) -> tuple[jax.Array, jax.Array]:
    # `in_own_branch` needs a number below the maximum of its dtype, which XLA must not know. The
    # number of set bits in a word is at most 32.
    bits_set = jax.lax.population_count(words[0].reshape(-1)[0])
    return in_own_branch(bits_set, rounds, *words)


_RULES: dict[str, Callable[..., Any]] = {
    "random_bits": _bits,
    "random_split": _split,
    "random_fold_in": _fold_in,
    "threefry2x32": _block,
}
"""The replacement for each primitive of JAX, by the name of the primitive."""
