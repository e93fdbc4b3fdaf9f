"""`scan` is `step`, many times, in one compiled loop."""

import dataclasses
import functools
import gc
import itertools
import os
import weakref
from pathlib import Path
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import (
    Affine,
    Alike,
    Count,
    Normalise,
    Traces,
    assert_same,
    batch_words,
    by_for,
    by_scan,
    by_step,
    ids,
    jitter,
    pipeline,
    record_words,
    state_of,
    unstack,
    whole,
)
from hypothesis import assume, given, settings, strategies as st

from datarax.errors import LastBatchError, RandomAccessError, ScanLengthError
from datarax.sources import (
    IterableSource,
    IterableSourceConfig,
    RandomAccessSource,
    RandomAccessSourceConfig,
)


def total(batch):
    return {"sum": batch["x"].sum(), "ids": batch["id"]}


# How it is compiled.


@pytest.mark.internal("SCAN-019 says that no value depends on it")
@pytest.mark.parametrize("fetch", [1, 4])
def test_the_loop_over_batches_is_the_one_that_is_unrolled(fetch, monkeypatch):
    loops, plain = [], jax.lax.scan

    def noted(body, *args, **options):
        loops.append((options["length"], options["unroll"]))
        return plain(body, *args, **options)

    monkeypatch.setattr(jax.lax, "scan", noted)
    pipeline(length=32).scan(lambda batch: batch["x"].sum(), 8, fetch=fetch, unroll=4)
    assert set(loops) == ({(8, 4)} if fetch == 1 else {(2, 1), (4, 4)})


@pytest.mark.spec("SCAN-003")
def test_a_function_that_is_no_program_is_told_so():
    with pytest.raises(jax.errors.ConcretizationTypeError) as error:
        pipeline().scan(lambda batch: float(batch["x"].mean()), 2)
    assert "The function of a scan is compiled: write it in jax.numpy." in error.value.__notes__


@pytest.mark.spec("SCAN-003")
@pytest.mark.parametrize("modules, carry", [(0, None), (1, None), (0, 1.0)])
def test_a_function_that_takes_other_arguments_is_told_which_it_gets(modules, carry):
    def three(model, optimizer, batch, extra):
        return None

    given = [Affine(2, 1) for _ in range(modules)]
    with pytest.raises(TypeError, match="missing") as error:
        pipeline().scan(three, 2, modules=given, init_carry=carry)
    called = "carry, *modules, batch" if carry else "*modules, batch"
    said = f"is called as `step_fn({called})`, here with {modules} of `modules`."
    assert [note.endswith(said) for note in error.value.__notes__].count(True) == 1


@pytest.mark.spec("SCAN-003")
def test_what_is_no_function_is_refused(unchecked):
    with pytest.raises(TypeError, match="`step_fn` must be a function, got NoneType"):
        pipeline().scan(None, 2)


@pytest.mark.spec("SCAN-004")
def test_a_carry_that_is_no_tree_of_arrays_is_told_what_to_carry():
    carry = {"model": eqx.nn.MLP(1, 1, 1, 1, key=jax.random.key(0))}
    with pytest.raises(
        TypeError,
        match=r"`init_carry\['model'\]\.activation` is a .* eqx\.partition\(module",
    ):
        pipeline().scan(lambda carry, batch: (carry, None), 2, init_carry=carry)


@pytest.mark.spec("SCAN-011")
@pytest.mark.parametrize("carried", [False, True])
def test_a_result_that_is_no_tree_of_arrays_is_named(carried):
    def some(*given):
        out = {"a": (1, [given[-1]["x"], "text"])}
        return (given[0], out) if carried else out

    text = r"must return arrays and numbers, but `out\['a'\]\[1\]\[1\]` is a str\."
    with pytest.raises(TypeError, match=text):
        pipeline().scan(some, 2, init_carry=0 if carried else None)


@pytest.mark.spec("SCAN-019", "SCAN-001", "SCAN-002")
@settings(max_examples=8)
@given(
    length=st.integers(1, 12),
    batch_size=st.sampled_from([1, 3, 4]),
    last_batch=st.sampled_from(["keep", "drop", "pad"]),
    seed=st.sampled_from([None, 5]),
    start=st.tuples(st.integers(0, 3), st.integers(0, 11)),
    how=st.sampled_from(
        [{"fetch": 1}, {"fetch": 2}, {"fetch": 5, "unroll": 2}, {"unroll": 3}, {"fetch": 99}]
    ),
    count=st.sampled_from([6, 7]),
)
def test_no_value_depends_on_how_many_batches_are_fetched_at_a_time(
    length, batch_size, last_batch, seed, start, how, count
):
    assume(last_batch != "drop" or batch_size <= length)

    def stream():
        stages = [Count(), record_words, batch_words] if seed else [Count()]
        made = pipeline(
            stages, length=length, batch_size=batch_size, last_batch=last_batch, seed=seed
        )
        made.seek(epoch=start[0], offset=start[1] % length)
        return made

    one_by_one, at_once = stream(), stream()
    expected = by_step(one_by_one, count)
    assert_same(unstack(at_once.scan(whole, count, **how)), expected)
    assert_same(state_of(at_once), state_of(one_by_one))


@pytest.mark.spec("SCAN-019", "SCAN-013")
def test_a_function_that_moves_the_cursor_is_followed():
    def every_other(stream, batch):
        stream.step()
        return whole(batch)

    moved, alone = pipeline(length=7, seed=3), pipeline(length=7, seed=3)
    outs = moved.scan(every_other, 6, modules=[moved], fetch=6)
    assert_same(unstack(outs), by_step(alone, 12)[::2])
    assert moved.cursor == alone.cursor


def on_host(length):
    rows = [{"id": np.int32(i)} for i in range(length)]
    return RandomAccessSource(RandomAccessSourceConfig(shuffle=True), rows)


@pytest.mark.spec("SRC-019", "SCAN-013")
def test_a_function_that_moves_the_cursor_is_followed_over_a_source_on_the_host():
    def every_other(stream, batch):
        stream.step()
        return batch["id"]

    def back(stream, batch):
        stream.seek(epoch=3, offset=2)
        return batch["id"]

    moved, alone = (pipeline(source=on_host(7), seed=3) for _ in range(2))
    outs = moved.scan(every_other, 3, modules=[moved])
    assert np.concatenate(outs).tolist() == ids(by_step(alone, 6)[::2])
    assert moved.cursor == alone.cursor
    moved.scan(back, 2, modules=[moved])
    assert moved.cursor == (3, 2)
    alone.seek(epoch=3, offset=2)
    assert_same(moved.step(), alone.step())


@pytest.mark.spec("SRC-029")
def test_a_function_cannot_move_the_cursor_of_a_stream():
    def back(stream, batch):
        stream.seek(epoch=0, offset=0)
        return batch["id"]

    source = IterableSource(IterableSourceConfig(), [{"id": i} for i in range(8)])
    stream = pipeline(source=source)
    with pytest.raises(RandomAccessError, match="moves the cursor of its own pipeline"):
        stream.scan(back, 3, modules=[stream])
    assert stream.cursor == (0, 0)
    outs = stream.scan(lambda stream, batch: batch["id"], 2, modules=[stream])
    assert outs.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert ids([stream.step()]) == [0, 1, 2, 3]


@pytest.mark.spec("SCAN-019", "ERR-023")
@pytest.mark.parametrize(
    "name, value",
    [*itertools.product(["unroll", "fetch"], [0, -1, 1.5, True, "2"]), ("unroll", None)],
)
def test_what_counts_no_batches_is_refused(unchecked, name, value):
    stream = pipeline()
    with pytest.raises(ScanLengthError) as caught:
        stream.scan(whole, 2, **{name: value})
    assert str(caught.value) == (
        f"`{name}` must be an integer of at least 1, got {value!r}. Leave it out for the default."
    )
    assert stream.cursor == (0, 0)


@pytest.mark.spec("SCAN-012")
@pytest.mark.parametrize("wrong", [None, 1, (1, 2, 3), [0, 1]])
def test_a_function_that_forgets_the_carry_or_the_output_is_told_of_both(wrong):
    stream = pipeline()
    with pytest.raises(TypeError) as caught:
        stream.scan(lambda carry, batch: wrong, 2, init_carry=0)
    assert str(caught.value) == (
        "With `init_carry`, the function of a scan must return the next carry and an output as "
        f"`(carry, out)`; it returned {wrong!r}."
    )
    assert stream.cursor == (0, 0)


@pytest.mark.spec("SCAN-012")
@pytest.mark.parametrize(
    "start, then, text",
    [
        (np.int32(0), lambda x, b: x + 0.5, "carry` was int32[] and became float32[]"),
        (0, lambda x, b: b["x"], "carry` was int32[] and became float32[2]"),
        (
            {"loss": jnp.zeros(()), "n": (0, None)},
            lambda x, b: {**x, "n": (b["id"], None)},
            "carry['n'][0]` was int32[] and became int32[2]",
        ),
        (jnp.zeros(2), lambda x, b: None, "carry` was float32[2] and became 0 in PyTreeDef(None)"),
    ],
)
@pytest.mark.usefixtures("standard_promotion")
def test_a_carry_that_changes_its_type_is_named(start, then, text):
    stream = pipeline(length=6, batch_size=2)
    with pytest.raises(TypeError) as caught:
        stream.scan(lambda carry, batch: (then(carry, batch), 0), 2, init_carry=start)
    assert str(caught.value) == (
        f"A scan must keep the type and shape of its carry, but `{text}; let `init_carry` begin as "
        "what it becomes."
    )
    assert stream.cursor == (0, 0)


@pytest.mark.spec("SCAN-011")
def test_a_function_that_looks_for_another_field_is_told_which_there_are():
    with pytest.raises(KeyError, match=r"^'y'") as caught:
        pipeline(batch_size=2).scan(lambda batch: batch["y"], 2)
    assert caught.value.__notes__[0] == "The batch has id int32[2], x float32[2]."


# What it returns.


@pytest.mark.spec("SCAN-011", "SCAN-001")
def test_a_scan_stacks_what_the_function_returns():
    stream = pipeline(length=6, batch_size=2)
    outs = stream.scan(total, 4)
    assert outs["sum"].tolist() == [3, 7, 11, 3]
    assert outs["ids"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert pipeline(length=6).scan(lambda batch: None, 2) is None


@pytest.mark.spec("SCAN-012")
@pytest.mark.parametrize("start", [0, 0.5, np.float32(1), jnp.float32(2)])
def test_a_carry_is_passed_on(start):
    def running(carry, batch):
        carry = carry + batch["x"].sum()
        return carry, carry

    last, outs = pipeline(length=6, batch_size=2).scan(running, 3, init_carry=start)
    expected = [float(start) + s for s in (3, 10, 21)]
    assert outs.tolist() == expected
    assert last == expected[-1]


@pytest.mark.spec("SCAN-012")
def test_a_carry_may_be_any_tree():
    def history(carry, batch):
        carry = {"last": batch["id"], "n": (carry["n"][0] + 1, None)}
        return carry, {}

    start = {"last": jnp.zeros(2, jnp.int32), "n": (jnp.int32(0), None)}
    last, outs = pipeline(length=6, batch_size=2).scan(history, 5, init_carry=start)
    assert_same(last, {"last": np.int32([2, 3]), "n": (np.int32(5), None)})
    assert outs == {}


@pytest.mark.spec("SCAN-012", "SCAN-013")
def test_a_carry_and_modules_come_in_that_order():
    def step_fn(carry, first, second, batch):
        first.a[...] += 1
        return carry + 1, (carry, first.a[...], second.a[...], batch["id"][0])

    first, second = Affine(10, 0), Affine(20, 0)
    stream = pipeline(length=6, batch_size=2)
    carry, outs = stream.scan(step_fn, 3, modules=[first, second], init_carry=jnp.int32(0))
    assert carry == 3
    assert [x.tolist() for x in outs] == [[0, 1, 2], [11, 12, 13], [20] * 3, [0, 2, 4]]
    assert first.a[...] == 13


@pytest.mark.spec("SCAN-009")
@pytest.mark.parametrize("made", ["in memory", "on the host", "a stream"])
@pytest.mark.parametrize("disabled", [False, True])
def test_a_scan_of_nothing_has_the_fields_of_a_batch(made, disabled):
    records = [{"id": np.int32(i), "x": np.float32(i)} for i in range(10)]
    source = {
        "in memory": None,
        "on the host": RandomAccessSource(RandomAccessSourceConfig(), records),
        "a stream": IterableSource(IterableSourceConfig(), records),
    }[made]
    stream = pipeline([Count()], length=10, seed=0, source=source)
    stream.step()
    before = state_of(stream)
    with jax.disable_jit(disabled):
        outs = stream.scan(whole, 0)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), outs) == {
        "count": ((0, 4), np.int32),
        "id": ((0, 4), np.int32),
        "x": ((0, 4), np.float32),
    }
    assert_same(state_of(stream), before)
    carry, outs = stream.scan(lambda c, b: (c + 1, b["id"]), 0, init_carry=7)
    assert carry == 7 and outs.shape == (0, 4)


# How long it is.


@pytest.mark.spec("SCAN-007")
@pytest.mark.parametrize(
    "last_batch, taken, rest",
    [("keep", 0, 3), ("keep", 1, 2), ("drop", 0, 3), ("pad", 2, 1)],
)
def test_without_a_length_it_is_the_rest_of_the_epoch(last_batch, taken, rest):
    stream = pipeline(length=12, last_batch=last_batch)
    by_step(stream, taken)
    assert stream.scan(total)["sum"].shape == (rest,)
    assert stream.cursor == (1, 0)


@pytest.mark.spec("SCAN-007", "SCAN-005")
@pytest.mark.parametrize("last_batch, batches, rows", [("drop", 2, 8), ("pad", 3, 10)])
def test_the_rest_of_an_epoch_follows_the_policy(last_batch, batches, rows):
    stream = pipeline(length=10, last_batch=last_batch)
    outs = stream.scan(whole)
    assert outs["id"].shape == (batches, 4)
    if last_batch == "pad":
        assert outs["mask"].sum() == rows
    assert stream.cursor == (1, 0)


@pytest.mark.spec("SCAN-008")
def test_under_keep_a_rest_is_refused():
    stream = pipeline(length=10)
    stream.step()
    with pytest.raises(LastBatchError) as error:
        stream.scan(whole)
    assert str(error.value) == (
        'Under last_batch="keep" the 6 records left in the epoch are no whole number of batches '
        "of 4, and all batches of a scan have one size. Give `length` (the scan then runs on into "
        'the next epoch), or build the pipeline with last_batch="drop" or "pad".'
    )
    assert stream.cursor == (0, 4)
    assert ids([stream.step()]) == [4, 5, 6, 7]


@pytest.mark.spec("SCAN-007", "SCAN-004")
def test_it_crosses_epochs_each_in_its_order():
    stream, expected = (pipeline(length=7, batch_size=3, seed=4) for _ in range(2))
    assert ids(by_scan(stream, 9)) == ids(by_step(expected, 9))
    assert stream.cursor == expected.cursor == (3, 6)
    for epoch in range(3):
        expected.seek(epoch=epoch)
        assert len(set(ids(expected))) == 7


# Modules.


class Net(nnx.Module):
    """A small model with all that models keep: parameters, statistics, random streams."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(1, 1, rngs=rngs)
        self.rest = Normalise()

    def __call__(self, batch):
        return self.linear(self.rest(batch)["x"][:, None])[:, 0]


def train(model, optimizer, batch):
    def loss(model):
        return jnp.mean((model(batch) - batch["x"]) ** 2)

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def fresh():
    model = Net(nnx.Rngs(0))
    return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


def assert_close(got, expected):
    for (path, x), y in zip(
        jax.tree_util.tree_flatten_with_path(got)[0], jax.tree.leaves(expected), strict=True
    ):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.spec("SCAN-013", "SCAN-011")
@jax.numpy_dtype_promotion("standard")  # optax wants it
def test_modules_end_as_in_a_python_loop():
    looped = fresh()
    stream = pipeline([jitter()], length=8, seed=0)
    compiled = nnx.jit(train)
    expected = [compiled(*looped, batch) for batch in by_step(stream, 5)]

    scanned = fresh()
    stream = pipeline([jitter()], length=8, seed=0)
    losses = [*stream.scan(train, 2, modules=scanned), *stream.scan(train, 3, modules=scanned)]
    assert_close(losses, expected)
    for got, wanted in zip(scanned, looped, strict=True):
        assert_close(nnx.to_pure_dict(nnx.state(got)), nnx.to_pure_dict(nnx.state(wanted)))
    assert scanned[0].rest.dropout.rngs.count[...] == 5


@pytest.mark.spec("SCAN-013")
def test_variables_that_modules_share_stay_shared():
    shared = Affine(1, 0)

    class Holder(nnx.Module):
        def __init__(self):
            self.inner = shared

    def step_fn(holder, other, batch):
        del batch
        holder.inner.a[...] += 1
        return other.a[...]

    holder = Holder()
    outs = pipeline().scan(step_fn, 3, modules=(holder, shared))
    assert outs.tolist() == [2, 3, 4]
    assert shared.a[...] == 4 and holder.inner is shared


@pytest.mark.spec("SCAN-013", "STEP-017")
def test_a_module_may_be_a_stage_as_well():
    stage = Affine(1, 0)
    stream = pipeline([stage], length=12, batch_size=2)

    def learn(stage, batch):
        stage.a[...] *= 2
        return batch["x"]

    assert stream.scan(learn, 3, modules=(stage,)).tolist() == [[1, 2], [6, 8], [20, 24]]
    assert stage.a[...] == 8
    assert stream.step()["x"].tolist() == [56, 64]


@pytest.mark.spec("SCAN-013", "STEP-012")
def test_what_changes_in_a_module_must_be_a_variable():
    class Meter(nnx.Module):
        def __init__(self):
            self.seen = jnp.int32(0)

    def step_fn(meter, batch):
        meter.seen = meter.seen + len(batch["id"])
        return meter.seen

    meter, stream = Meter(), pipeline()
    with pytest.raises(TypeError) as error:
        stream.scan(step_fn, 3, modules=(meter,))
    assert str(error.value).startswith(
        "what changes while a batch is made must be kept in an nnx.Variable, but the array "
        "`1.seen` was assigned"
    )
    assert meter.seen == 0 and stream.cursor == (0, 0)


@pytest.mark.spec("SCAN-013", "STEP-012")
def test_a_step_function_that_fails_moves_nothing():
    def broken(meter, batch):
        meter.a[...] += 1
        raise ValueError("no luck")

    meter = Affine(1, 0)
    stream = pipeline([Count()])
    stream.step()
    before = state_of(stream)
    with pytest.raises(ValueError, match="no luck"):
        stream.scan(broken, 3, modules=(meter,))
    assert_same(state_of(stream), before)
    assert meter.a[...] == 1
    assert stream.step()["count"].tolist() == [2] * 4


@pytest.mark.spec("SCAN-013", "STEP-012")
def test_a_step_function_that_fails_while_it_runs_moves_nothing():
    calls = []

    def read(number):
        calls.append(int(number))
        if len(calls) == 2:
            raise OSError("the disk is gone")
        return np.float32(number)

    def step_fn(meter, batch):
        meter.a[...] += 1
        result = jax.ShapeDtypeStruct((), np.float32)
        return jax.pure_callback(read, result, batch["id"][0])

    meter = Affine(1, 0)
    stream = pipeline([Count()], length=12)
    with pytest.raises(Exception, match="the disk is gone"):
        jax.block_until_ready(stream.scan(step_fn, 3, modules=(meter,)))
    assert stream.cursor == (0, 0) and meter.a[...] == 1
    assert stream.scan(step_fn, 3, modules=(meter,)).tolist() == [0, 4, 8]
    assert stream.cursor == (1, 0) and meter.a[...] == 4
    assert stream.nodes["Count"].seen[...] == 3


# Traces.


@pytest.mark.spec("SCAN-014")
def test_a_hundred_scans_trace_once():
    traces = Traces()

    def step_fn(batch):
        return batch["x"].sum()

    step_fn = traces(step_fn)
    stream = pipeline([Count()], length=12, batch_size=2, seed=0)
    other = pipeline([Count()], length=12, batch_size=2, seed=1)
    stream.scan(step_fn, 2)
    assert traces["step_fn"] >= 1
    once = traces["step_fn"]
    for i in range(99):
        stream.scan(step_fn, 2)
        if i % 9 == 0:
            stream.step(), by_for(stream, 1), stream.get_state(), other.scan(step_fn, 2)
            stream.seek(epoch=i)
            stream.nodes["Count"].seen[...] = jnp.int32(0)
        if i % 33 == 0:
            stream.scan(total, 2)
    assert traces["step_fn"] == once == 1


@pytest.mark.spec("SCAN-014")
def test_modules_and_a_carry_do_not_trace_anew():
    traces = Traces()

    def step_fn(carry, model, batch):
        model.a[...] += 1
        return carry + batch["x"].sum(), model.a[...]

    step_fn = traces(step_fn)
    stream, model = pipeline(length=12, batch_size=2), Affine(0, 0)
    carry = jnp.float32(0)
    for i in range(20):
        carry, _ = stream.scan(step_fn, 2, modules=(model,), init_carry=carry)
        model.b[...] = jnp.float32(i)
    assert model.a[...] == 40
    twin = Affine(0, 0)
    stream.scan(step_fn, 2, modules=(twin,), init_carry=carry)
    assert twin.a[...] == 2 and model.a[...] == 40
    once = traces["step_fn"]
    stream.scan(step_fn, 2, modules=(twin,), init_carry=carry)
    assert traces["step_fn"] == once <= 2  # a carry may be traced twice, until its type is fixed


class Trainer(eqx.Module):
    rate: float
    traces: ClassVar[list[float]] = []

    def step(self, carry, batch):
        self.traces.append(self.rate)
        return carry + self.rate, batch["id"]


@pytest.mark.spec("SCAN-014", "SCAN-015")
def test_methods_of_equal_trainers_are_one_function():
    stream = pipeline(length=12, batch_size=2)
    for rate, total in ((0.5, 1.0), (0.5, 1.0), (1, 2), (1.0, 2.0)):
        for _ in range(2):
            carry, _ = stream.scan(Trainer(rate).step, 2, init_carry=jnp.float32(0))
            assert carry == total
    assert [type(x) for x in Trainer.traces] == [float, int, float]


class Weighted(eqx.Module):
    weight: jax.Array
    traces: ClassVar[list[str]] = []

    def step(self, batch):
        self.traces.append("step")
        return batch["x"].sum() * self.weight

    @eqx.filter_jit
    def filter_jitted(self, batch):
        return self.step(batch)

    @jax.jit
    def jitted(self, batch):
        return self.step(batch)


def weigh(module, batch, *, scale=1):
    return module.step(batch) * scale


@pytest.mark.spec("SCAN-014", "SCAN-015")
@pytest.mark.parametrize(
    "access",
    [
        lambda module: module.step,
        lambda module: module.filter_jitted,
        lambda module: module.jitted,
        lambda module: functools.partial(weigh, module),
        lambda module: functools.partial(weigh, module, scale=np.float32(1)),
        lambda module: functools.partial(module.step),
        lambda module: eqx.Partial(weigh, module),
        lambda module: jax.tree_util.Partial(weigh, module),
    ],
)
def test_a_function_that_is_made_anew_of_the_same_parts_is_one_function(access):
    stream = pipeline(length=12, batch_size=2)
    Weighted.traces.clear()
    one, two = Weighted(jnp.float32(1)), Weighted(jnp.float32(2))
    stream.scan(access(one), 2)
    traced = len(Weighted.traces)
    for _ in range(2):
        stream.reset()
        first = stream.scan(access(one), 2)
    assert len(Weighted.traces) == traced > 0
    stream.reset()
    np.testing.assert_array_equal(stream.scan(access(two), 2), 2 * first)


@pytest.mark.spec("SCAN-015")
@pytest.mark.parametrize("kind", [functools.partial, eqx.Partial])
def test_partials_that_pass_the_same_otherwise_are_others(kind):
    def step_fn(*given, name=0.0):
        return jnp.asarray(name if len(given) == 1 else -given[1])

    stream = pipeline(length=4, batch_size=1)
    for partial, found in (
        (kind(step_fn, "name", 1.0), -1.0),
        (kind(step_fn, name=1.0), 1.0),
        (kind(step_fn, name=1), 1),
        (kind(step_fn, name=True), True),
        (kind(step_fn), 0.0),
    ):
        [out] = stream.scan(partial, 1)
        assert out == found and out.dtype == jnp.asarray(found).dtype


@pytest.mark.spec("SCAN-015")
@pytest.mark.parametrize("kind", [functools.partial, eqx.Partial])
def test_what_a_partial_holds_may_change_in_place(kind):
    stream, factors = pipeline(length=4, batch_size=2), np.ones(2, np.float32)

    def step_fn(factors, options, batch):
        return batch["x"].sum() * 0 + factors.sum() + options["more"]

    for more in (1, 2):
        factors[:] = more
        found = stream.scan(kind(step_fn, factors, {"more": more}), 1)
        assert found.tolist() == [3 * more]
    options = {"more": 0}
    for more in (1, 2):
        options["more"] = more
        assert stream.scan(kind(step_fn, factors, options), 1).tolist() == [4 + more]


@pytest.mark.spec("SCAN-015")
def test_functions_that_share_an_address_do_not_share_a_result():
    stream = pipeline(length=2, batch_size=1)
    for i in range(5):
        gc.collect()
        assert stream.scan(lambda batch, i=i: batch["id"] * 0 + i, 2).tolist() == [[i], [i]]


def resident():
    """Bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.spec("SCAN-015")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_fresh_functions_are_not_kept_without_bound():
    from datarax.pipeline import _scan

    def fresh(i):
        ballast = np.full(2**20, i, np.int32)  # four megabytes that only the function keeps

        def step_fn(batch):
            assert ballast[0] == i
            return batch["id"] + i

        return step_fn

    stream = pipeline(length=2, batch_size=1)
    alive, memory = weakref.WeakSet(), []
    for i in range(2 * _scan.SCANS):
        step_fn = fresh(i)
        alive.add(step_fn)
        assert stream.scan(step_fn, 1).tolist() == [[i + i % 2]]
        if i % _scan.SCANS == _scan.SCANS - 1:
            gc.collect()
            memory.append(resident())
            assert len(alive) <= _scan.SCANS + 1
    full, again = memory
    assert again - full < 2**20 * _scan.SCANS, f"{(again - full) / 2**20:.0f} MiB more"


# Callables.


@pytest.mark.spec("SCAN-011", "SCAN-015")
def test_any_callable_is_a_step_function():
    class Unhashable:
        __hash__ = None

        def __init__(self, n):
            self.n = n

        def __call__(self, batch):
            return batch["id"] + self.n

    class Weighted(eqx.Module):
        weight: jax.Array

        def __call__(self, batch):
            return batch["id"] + self.weight

    stream = pipeline(length=2, batch_size=2)
    for function, expected in [
        (Unhashable(1), [[1, 2]]),
        (Unhashable(2), [[2, 3]]),
        (Weighted(jnp.int32(3)), [[3, 4]]),
        (Weighted(jnp.int32(4)), [[4, 5]]),
        (functools.partial(lambda n, batch: batch["id"] + n, 5), [[5, 6]]),
        (functools.partial(lambda n, batch: batch["id"] + n, 6), [[6, 7]]),
        (Unhashable(7).__call__, [[7, 8]]),
        (jax.jit(lambda batch: batch["id"] + 8), [[8, 9]]),
    ]:
        assert stream.scan(function, 1).tolist() == expected


@pytest.mark.spec("SCAN-001", "SCAN-003")
def test_a_scan_inside_a_scan_of_the_user():
    @nnx.jit
    def twice(stream):
        first = stream.scan(total, 2)["ids"]
        return first, stream.scan(total, 2)["ids"]

    stream = pipeline(length=10, seed=0)
    expected = ids(by_step(pipeline(length=10, seed=0), 4))
    got = twice(stream)
    assert np.concatenate(got).ravel().tolist() == expected
    assert stream.cursor == (1, 6)


@pytest.mark.spec("SCAN-007", "SCAN-008")
def test_inside_a_trace_a_scan_needs_a_length():
    with pytest.raises(TypeError) as error:
        nnx.jit(lambda stream: stream.scan(total))(pipeline(length=8))
    assert str(error.value) == "Inside a traced function scan() needs `length`, a number."


@pytest.mark.internal
def test_the_data_of_a_source_are_not_copied_by_a_scan():
    stream = pipeline(length=12)
    before = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(nnx.state(stream.source))]
    stream.scan(whole, 3)
    stream.step()
    after = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(nnx.state(stream.source))]
    assert after == before


@pytest.mark.internal
def test_modules_come_in_a_list(unchecked):
    with pytest.raises(TypeError) as error:
        pipeline().scan(lambda model, batch: None, 2, modules=nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
    assert str(error.value) == "`modules` must be a list or tuple of NNX objects, got Linear."


@dataclasses.dataclass(frozen=True)
class Multiply:
    factor: float

    def __call__(self, batch):
        return batch["id"] * self.factor


@pytest.mark.spec("SCAN-015")
@pytest.mark.usefixtures("standard_promotion")
def test_functions_that_are_equal_and_not_of_the_same_types_are_two():
    stream = pipeline(length=8, batch_size=2)
    for factor, kind in ((2, "int32"), (2.0, "float32"), (2, "int32")):
        assert str(stream.scan(Multiply(factor), 1).dtype) == kind


class Noisy(nnx.Module):
    def __init__(self):
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        y = self.dropout(x)
        self.sow(nnx.Intermediate, "seen", y.sum())
        return y


@pytest.mark.spec("ERR-023")
@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_what_of_a_module_must_not_change_in_a_scan_is_named():
    def evaluate(model, batch):
        model.eval()
        return model.dropout(batch["x"])

    def use(model, batch):
        return model(batch["x"])

    stream, sown = pipeline(length=8, batch_size=2), Noisy()
    sown(jnp.ones(2))
    changes = "may be added, removed or assigned while a batch is made, but "
    with pytest.raises(TypeError, match=rf"{changes}`modules\[0\]\.seen` was.*nnx.capture"):
        stream.scan(use, 2, modules=(Noisy(),))
    with pytest.raises(TypeError, match=r"`modules\[1\]\.seen` was 1 in .* and became 2 in "):
        stream.scan(lambda _, model, batch: use(model, batch), 2, modules=(Noisy(), sown))
    with pytest.raises(TypeError, match=rf"{changes}`modules\[0\]\.dropout.deterministic` was"):
        stream.scan(evaluate, 2, modules=(Noisy(),))
    assert stream.cursor == (0, 0)


@pytest.mark.spec("SCAN-011", "SCAN-009", "SCAN-019")
@pytest.mark.parametrize("length", [0, 1, 2])
def test_a_number_of_python_is_an_output_however_many_batches_are_fetched(length):
    def counted(batch):
        return {"rows": batch["x"].shape[0], "half": 0.5, "yes": True}

    found = [pipeline().scan(counted, length, fetch=fetch) for fetch in (1, 2)]
    assert found[0]["rows"].tolist() == [4] * length
    for one in found:
        assert {name: (x.shape, x.dtype, x.weak_type) for name, x in one.items()} == {
            "rows": ((length,), np.int32, True),
            "half": ((length,), np.float32, True),
            "yes": ((length,), bool, False),
        }


@pytest.mark.spec("SCAN-015", "SCAN-014")
def test_equal_functions_that_compute_something_else_are_two():
    stream = pipeline()
    found = []
    for factor in (1, 10):
        stream.reset()
        scaled = Alike(lambda batch, factor=factor: batch["id"].sum() * factor)
        found.append(stream.scan(scaled, 2).tolist())
    assert found[1] == [10 * x for x in found[0]]
