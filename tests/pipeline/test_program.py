"""A compiled function: what is compiled of it, for which threads, and what it says of itself."""

import itertools
import math
import os
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import jitter, pipeline

from datarax._rows import Cut
from datarax.pipeline import _program
from datarax.pipeline._orders import order_program
from datarax.pipeline._program import Program, batch_program


@pytest.mark.internal
@pytest.mark.parametrize("result, compiled", [({"kept": None}, 0), ({"kept": 1.0}, 1)])
def test_what_gives_no_array_is_not_compiled(result, compiled):
    program, compiling = Program(lambda values: result), []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiling.append(name)
    )
    found = program([]), program([])
    count = compiling.count("/jax/core/compile/backend_compile_duration")
    assert (found, count) == ((result, result), compiled)


@pytest.mark.spec("SRC-011")
@pytest.mark.parametrize("result", [{"kept": None}, {"kept": 1.0}])
def test_a_program_is_called_anew_after_an_interrupt_at_any_moment_of_its_first_call(
    result, monkeypatch
):
    look = Program._first_look

    def looked(self, traced):
        look(self, traced)
        raise KeyboardInterrupt

    def compiled(self):
        raise KeyboardInterrupt

    for name, interrupted in (("_first_look", looked), ("_compiled", property(compiled))):
        program = Program(lambda values: result)
        first = program._jitted
        with monkeypatch.context() as patch:
            patch.setattr(Program, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                program([])
        # JAX may take the old one for a function that is being traced.
        assert program._jitted is not first and not program.called
        assert program([]) == result
        assert program([]) == result


@pytest.mark.spec("SRC-011")
def test_threads_may_make_the_first_call_of_a_program_together():
    program = Program(lambda values: {"kept": None})
    plain, ready = program._jitted.trace, threading.Barrier(2)

    class Slow:
        def trace(self, *args):
            traced = plain(*args)
            ready.wait(20)
            return traced

    program._jitted = Slow()
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(program, [[], []]))
    assert found == [{"kept": None}, {"kept": None}]


ROWS, MANY = (
    np.arange(math.prod(x), dtype=np.float32).reshape(x) for x in ((4096, 512), (2**21, 4))
)


def gathered(batch):
    return jax.numpy.take(ROWS, batch, axis=0, mode="clip") + 1.0


def picked(batch):
    return jax.numpy.take(MANY, batch, axis=0, mode="clip") + 1.0


def picked_of_few(batch):
    return jax.numpy.take(MANY[: 2**17], batch, axis=0, mode="clip") + 1.0


def rounds(batch):
    return jax.lax.fori_loop(0, 40, lambda i, x: x * x + i, gathered(batch))


@pytest.mark.internal("how a CPU shares out a program is no part of what it gives")
@pytest.mark.parametrize(
    "function, size, batches, shared",
    [
        (gathered, 128, 1, False),  # a small part of much data
        (rounds, 64, 1, False),  # at each turn of the loop
        (gathered, 1024, 1, True),
        (gathered, 1024, 16, False),
        (picked, 100, 1, False),
        (picked_of_few, 2000, 1, False),
        (picked, 2000, 1, True),  # few bytes, and each row out of another place in memory
    ],
)
def test_the_threads_of_a_cpu_share_large_batches_alone(function, size, batches, shared):
    program = Program(lambda places: function(places), batches)
    places = jax.numpy.arange(size)
    assert (program(places) == function(places)).all()
    kernels = program._compiled.lower(places).compile().as_text()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    assert ("outer_dimension_partitions" in kernels) == (shared and cores > 1)


@pytest.mark.internal("a row without items weighs nothing")
def test_rows_without_items_can_be_gathered_from_a_large_array():
    def nothing(place):
        return jax.lax.dynamic_slice(jax.numpy.asarray(MANY), (place, 0), (1, 0))

    assert Program(jax.vmap(nothing))(jax.numpy.arange(3)).shape == (3, 1, 0)


@pytest.mark.internal("a CPU runs what does not hang together in several threads")
def test_each_of_the_batches_of_a_call_hangs_on_the_one_before():
    stream = pipeline([jitter()], length=60, batch_size=4, seed=3)
    runtime = stream._runtime
    binding = runtime.look(stream)
    structure, values = binding.structure, binding.read()
    order = order_program(structure, 1)(values, np.uint32(0))
    program = batch_program(structure, Cut(4, 1, False), 3, None, False)
    jaxpr = program._inner.trace(values, order).jaxpr.jaxpr
    needs = {}
    for equation in jaxpr.eqns:
        before = [x for x in equation.invars if isinstance(x, jax.extend.core.Var)]
        needs |= dict.fromkeys(equation.outvars, (equation, before))

    def hangs_on(variable, equation):
        made_by, before = needs.get(variable, (None, []))
        return made_by is equation or any(hangs_on(x, equation) for x in before)

    branches = [x for x in jaxpr.eqns if x.primitive.name == "cond"]
    assert len(branches) == 3
    for one, following in itertools.pairwise(branches):
        assert hangs_on(following.invars[0], one)  # what says which branch is taken


@pytest.mark.internal("JAX takes no options for a program inside another")
def test_a_program_can_be_called_outside_and_inside_a_trace():
    program = Program(lambda x: x * 2)
    assert program(3.0) == 6
    assert jax.jit(lambda x: program(x) + 1)(3.0) == 7
    assert jax.grad(lambda x: program(x))(3.0) == 2
    assert jax.vmap(program)(jax.numpy.arange(2.0)).tolist() == [0, 2]
    assert program(3.0) == 6


@pytest.mark.internal("what holds a compiler up says nothing of how long the next one takes")
@pytest.mark.parametrize("of_processors", [0.5, 4.0])  # held up, or busy on several
def test_waiting_is_no_part_of_the_time_that_compiling_takes(of_processors, monkeypatch):
    wall, own = iter([10.0, 12.0]), iter([3.0, 3.0 + of_processors])
    clocks = types.SimpleNamespace(perf_counter=lambda: next(wall), process_time=lambda: next(own))
    monkeypatch.setattr(_program, "time", clocks)
    program = Program(lambda values: values + 1)
    program(jnp.arange(3))
    assert program.seconds == min(2.0, of_processors)
