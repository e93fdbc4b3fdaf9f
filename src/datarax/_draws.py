"""Random bits that are drawn with `jax.random`, compiled for a CPU: the same bits, sooner.

There JAX turns each block of threefry into a loop of five turns, lest XLA compute its 20 rounds
again for everything that hangs on them. But a turn is a dozen kernels, and those of a few draws
take longer than a batch of small images. Written out, the rounds are one kernel, which `apart`
keeps from being computed again.
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
from ._xla import apart


def written_out(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that JAX can trace, with the rounds of threefry written out in its program.

    A function that `jax.jit` made is not traced again.
    """

    def run(*args: Any) -> Any:
        leaves = jax.tree.leaves(args)
        if not any(map(is_traced, leaves)):  # under `jax.disable_jit`, or to find where a NaN is
            return function(*args)
        program, out = jax.make_jaxpr(function, return_shape=True)(*args)
        results = jaxpr_as_fun(_Rewriter().program(program))(*leaves)
        return jax.tree.unflatten(jax.tree.structure(out), results)

    return run


class _Rewriter:
    """Puts other equations in the place of some, in a program and in those that it calls.

    Where JAX holds a program in another form (`jax.checkpoint`, a kernel) it stays as it is.
    """

    def __init__(self):
        # What is called several times stays one, which JAX lowers once. Keyed by identity, and
        # kept along, so that no other can have the same.
        self._done: dict[int, tuple[Any, Any]] = {}

    def program(self, old: ClosedJaxpr) -> ClosedJaxpr:
        """The same one if there is nothing to replace."""
        if id(old) not in self._done:
            parts = [self._in_place_of(x) for x in old.jaxpr.eqns]
            equations = [x for new in parts for x in new]
            same = len(equations) == len(parts) and all(map(is_, equations, old.jaxpr.eqns))
            new = old if same else old.replace(jaxpr=old.jaxpr.replace(eqns=equations))
            self._done[id(old)] = old, new
        return self._done[id(old)][1]

    def _in_place_of(self, equation: JaxprEqn) -> Sequence[JaxprEqn]:
        rule = _RULES.get(equation.primitive.name)
        if rule is None or not _is_threefry(equation):
            inner = {name: self._parameter(x) for name, x in equation.params.items()}
            same = all(x is equation.params[name] for name, x in inner.items())
            return [equation if same else equation.replace(params=inner)]
        specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in _avals(equation.invars)]
        with equation.ctx.manager:  # the settings that stood where it was traced
            written = jax.make_jaxpr(functools.partial(rule, **equation.params))(*specs)
        if written.consts:  # There is no place for them. JAX's older way of counting has some.
            return [equation]
        names = dict(zip(written.jaxpr.invars, equation.invars, strict=True))
        names |= dict(zip(written.jaxpr.outvars, equation.outvars, strict=True))
        return [
            x.replace(
                invars=[y if isinstance(y, Literal) else names.get(y, y) for y in x.invars],
                outvars=[names.get(y, y) for y in x.outvars],
                source_info=equation.source_info,
            )
            for x in self.program(written).jaxpr.eqns  # bits are drawn in blocks: another rule
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
    """Whether it computes blocks of threefry, any at all, and all of them on every device."""
    avals = _avals((*equation.invars, *equation.outvars))
    dtype = avals[0].dtype
    keyed = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    whole = not any(any(x.sharding.spec) for x in avals)  # else an explicit mesh axis splits them
    return (not keyed or dtype == _threefry_keys()) and whole and all(x.size for x in avals)


@functools.cache  # and not at import, of which it would be a part that can be felt
def _threefry_keys() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32")).dtype


def _each(function: Callable[..., Any], keys: jax.Array, *args: Any) -> Any:
    """A function of a key's words, for each of the keys."""
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
    # `apart` wants a number that is not the largest of its type, which XLA must not find out: how
    # many bits of a word are set, 32 at most.
    bits_set = jax.lax.population_count(words[0].reshape(-1)[0])
    return apart(bits_set, rounds, *words)


_RULES: dict[str, Callable[..., Any]] = {
    "random_bits": _bits,
    "random_split": _split,
    "random_fold_in": _fold_in,
    "threefry2x32": _block,
}
"""By the names of JAX's operations."""
