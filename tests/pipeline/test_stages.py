"""What a stage is called with, and what it draws from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from datarax_conformance import model
from flax import nnx
from helpers import (
    MODES,
    Affine,
    Count,
    assert_same,
    batch_words,
    by_step,
    columns,
    double,
    graph,
    increment,
    pipeline,
    record_words,
    rows,
)

from datarax import errors
from datarax.operators import ElementOperator, ElementOperatorConfig, OperatorModule
from datarax.sources import MemorySource, MemorySourceConfig

# Names.


def named(name, stage=double):
    def function(batch):
        return stage(batch)

    function.__name__ = name
    return function


class _Private(nnx.Module):
    def __call__(self, batch):
        return batch


@pytest.mark.spec("KEYS-014")
def test_stages_of_a_chain_are_named_by_what_they_are():
    def fn(element, key):
        return element

    operator = ElementOperator(ElementOperatorConfig(), fn=fn)

    class Flip(OperatorModule):
        def apply(self, element, key):
            return element

    stages = [double, lambda b: b, Affine(1, 0), operator, Flip(), double, Count(), double,
              lambda b: b, named("_hidden"), _Private(), named("__")]  # fmt: skip
    assert list(pipeline(stages).nodes) == [
        "double", "lambda", "Affine", "fn", "Flip", "double_1", "Count", "double_2",
        "lambda_1", "hidden", "Private", "stage",
    ]  # fmt: skip


@pytest.mark.spec("KEYS-014", "DAG-001")
def test_no_stage_of_a_chain_is_lost_to_a_name():
    stages = [named("a", double), named("a_1", increment), named("a", double)]
    stream = pipeline(stages, length=4)
    assert len(stream.stages) == len(set(stream.nodes)) == 3
    assert stream.step()["x"].tolist() == [6, 10, 14, 18]
    stream = pipeline([named("source", increment), named("double")], length=4)
    assert len(stream.nodes) == 2
    assert stream.step()["x"].tolist() == [4, 6, 8, 10]
    assert stream.node_specs.keys() == {"source", *stream.nodes}


# Keys.


def key_words(base, name, *path):
    """The two words of a key as the model counts it."""
    key = model.node_key(base, name)
    for number in path:
        key = model.fold_in(key, number)
    return [int(word) for word in key]


@pytest.mark.spec("KEYS-004")
@pytest.mark.parametrize("name", ["größe", "a.b/c:d [e]"])
def test_the_key_of_a_node_counts_the_bytes_of_its_name(name):
    stream = graph({name: batch_words}, {name: []}, name, seed=1)
    assert stream.step()["key"][0].tolist() == key_words((0, 1), name, 0, 0)


@pytest.mark.spec("KEYS-006", "KEYS-007", "KEYS-008", "DAG-016")
@pytest.mark.parametrize("mode", MODES)
def test_keys_are_those_of_the_model(mode):
    stream = pipeline([record_words, batch_words], length=7, batch_size=7, seed=9)
    stream.seek(epoch=5, offset=0)
    for batch in MODES[mode](stream, 2):
        epoch = 5 + (batch["id"].tolist() != MODES["step"](_at(5), 1)[0]["id"].tolist())
        for record, words in zip(batch["id"].tolist(), batch["keys"].tolist(), strict=True):
            assert words == key_words((0, 9), "record_words", epoch, record)
        assert batch["key"][0].tolist() == key_words((0, 9), "batch_words", epoch, 0)


def _at(epoch):
    stream = pipeline(length=7, batch_size=7, seed=9)
    stream.seek(epoch=epoch)
    return stream


class Counted(nnx.Module):
    """Draws a number for each row, and counts the batches."""

    def __init__(self):
        self.count = nnx.Variable(jnp.int32(0))

    def __call__(self, batch, *, keys):
        self.count[...] += 1
        drawn = jax.vmap(jax.random.bits)(keys)
        return {**batch, "drawn": drawn, "count": jnp.full(len(drawn), self.count[...])}


@pytest.mark.spec("KEYS-006", "DAG-007")
@pytest.mark.parametrize("as_method", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_stage_may_draw_and_count(mode, as_method):
    stage = Counted()
    stages = [stage.__call__ if as_method else stage]
    batches = MODES[mode](pipeline(stages, length=12, batch_size=4, seed=9), 3)
    assert [batch["count"].tolist() for batch in batches] == [[1] * 4, [2] * 4, [3] * 4]
    assert len({x for batch in batches for x in batch["drawn"].tolist()}) == 12
    assert stage.count[...] == 3


class Scales(nnx.Pytree):
    """Has methods that are functions, and such that NNX or JAX has wrapped."""

    def __init__(self):
        self.scale = nnx.Param(jnp.float32(2))

    def plain(self, batch):
        return {**batch, "x": batch["x"] * self.scale[...]}

    compiled = nnx.jit(plain)
    saving = nnx.remat(plain)

    @functools.partial(nnx.jit, static_argnames=())
    def drawing(self, batch, *, key):
        return {**batch, "x": batch["x"] * self.scale[...] + 0 * jax.random.uniform(key)}


@pytest.mark.spec("DAG-015", "STEP-017")
@pytest.mark.parametrize("name", ["plain", "compiled", "saving", "drawing"])
@pytest.mark.parametrize("mode", MODES)
def test_a_method_of_an_nnx_object_is_a_stage(mode, name):
    stage = Scales()
    stream = pipeline([getattr(stage, name)], length=4, seed=0)
    assert list(stream.nodes) == [name]
    plain = pipeline(length=4, seed=0).step()["x"]
    for scale in (2, 3):
        stage.scale[...] = jnp.float32(scale)
        [batch] = MODES[mode](stream, 1)
        stream.reset()
        assert batch["x"].tolist() == (scale * plain).tolist()
    count = nnx.grad(lambda s: s.step()["x"].sum(), argnums=nnx.DiffState(0, nnx.Param))(stream)
    assert [x.tolist() for x in jax.tree.leaves(count)] == [10]


class Toggles(nnx.Module):
    """Draws, and changes itself meanwhile."""

    def __init__(self):
        self.dropout = nnx.Dropout(0.5)
        self.factor, self.parts = 1, nnx.List([])

    def __call__(self, batch, *, key):
        self.dropout.eval()
        self.factor = 3
        self.parts.append(1)
        kept = self.dropout(batch["x"], rngs=key) * self.factor
        self.parts.pop()
        self.factor = 1
        self.dropout.train()
        return {**batch, "x": kept}


class Maps(nnx.Module):
    """Draws, under a transformation of itself."""

    def __init__(self):
        self.factor = 3

    def __call__(self, batch, *, keys):
        def one(module, x, key):
            return x * module.factor + 0 * jax.random.uniform(key)

        return {**batch, "x": nnx.vmap(one, in_axes=(None, 0, 0))(self, batch["x"], keys)}


@pytest.mark.spec("KEYS-006")
@pytest.mark.parametrize("stage", [Toggles, Maps])
@pytest.mark.parametrize("mode", MODES)
def test_a_module_that_draws_may_use_itself_as_any_other_does(mode, stage):
    [batch] = MODES[mode](pipeline([stage()], length=12, batch_size=4, seed=9), 1)
    plain = pipeline(length=12, batch_size=4, seed=9).step()
    assert batch["x"].tolist() == [3 * x for x in plain["x"].tolist()]


@pytest.mark.spec("KEYS-006")
def test_a_module_that_draws_and_assigns_is_told_what_to_do():
    class Assigns(nnx.Module):
        def __init__(self):
            self.calls = 0

        def __call__(self, batch, *, key):
            self.calls += 1
            return batch

    with pytest.raises(errors.StageError, match=r"keep what changes in an nnx\.Variable"):
        pipeline([Assigns()], seed=9)


@pytest.mark.spec("ERR-025")
@pytest.mark.parametrize("kind", [nnx.Module, nnx.Pytree])
@pytest.mark.parametrize("as_method", [False, True])
def test_a_stage_that_assigns_an_attribute_is_named(kind, as_method):
    class Assigns(kind):
        def __init__(self):
            self.calls = 0

        def __call__(self, batch):
            self.calls += 1
            return batch

    stage = Assigns().__call__ if as_method else Assigns()
    with pytest.raises(errors.StageError, match="must not add, remove or assign attributes"):
        pipeline([stage])


@pytest.mark.spec("KEYS-007")
def test_the_key_of_a_batch_counts_its_first_row():
    stream = pipeline([batch_words], length=10, batch_size=4, seed=9)
    keys = [batch["key"][0].tolist() for batch in by_step(stream, 4)]
    places = [(0, 0), (0, 4), (0, 8), (1, 2)]
    assert keys == [key_words((0, 9), "batch_words", *place) for place in places]
    stream.reset()
    assert [batch["key"][0].tolist() for batch in stream] == keys[:3]
    drop = pipeline([batch_words], length=10, batch_size=4, seed=9, last_batch="drop")
    assert by_step(drop, 3)[2]["key"][0].tolist() == key_words((0, 9), "batch_words", 1, 0)


@pytest.mark.spec("KEYS-009")
def test_nodes_have_keys_of_their_own_that_others_do_not_change():
    def chain(*names):
        edges = {name: [before] for before, name in zip(["source", *names], names, strict=False)}
        stages = {"noise": record_words, "more": keep_keys("more"), "plain": double}
        return graph({name: stages[name] for name in names}, edges, names[-1], seed=2)

    def keep_keys(field):
        def stage(batch, *, keys):
            return {**batch, field: jax.random.key_data(keys)}

        return stage

    alone = chain("noise").step()
    both = chain("plain", "noise", "more", ).step()  # fmt: skip
    swapped = chain("more", "noise").step()
    assert_same(both["keys"], alone["keys"])
    assert_same(swapped["keys"], alone["keys"])
    assert_same(swapped["more"], both["more"])
    assert not (both["keys"] == both["more"]).any()


@pytest.mark.spec("KEYS-010", "KEYS-012")
def test_the_nearest_rngs_give_the_key():
    def fn(element, key):
        return element.update_data({"keys": jax.random.key_data(key)})

    def words(stream_name=None, own=None, rngs=None):
        config = ElementOperatorConfig(stochastic=True, stream_name=stream_name)
        operator = ElementOperator(config, fn=fn, rngs=own)
        return pipeline([operator], rngs=rngs, length=4).step()["keys"][0].tolist()

    def expected(seed):
        return key_words((0, seed), "fn", 0, 0)

    assert words(rngs=nnx.Rngs(1)) == expected(1)
    assert words(rngs=nnx.Rngs(1), own=nnx.Rngs(2)) == expected(2)
    assert words(own=nnx.Rngs(2)) == expected(2)
    assert words("noise", rngs=nnx.Rngs(1, noise=3)) == expected(3)
    assert words("noise", rngs=nnx.Rngs(1, other=3)) == expected(1)
    assert words("noise", rngs=nnx.Rngs(1, noise=3), own=nnx.Rngs(2)) == expected(2)
    assert words("noise", rngs=nnx.Rngs(1, noise=3), own=nnx.Rngs(2, noise=4)) == expected(4)
    assert words(rngs=nnx.Rngs(noise=3, default=1)) == expected(1)
    rbg = jax.random.wrap_key_data(np.arange(1, 5, dtype=np.uint32), impl="rbg")
    assert words(rngs=nnx.Rngs(rbg)) == key_words((1, 2), "fn", 0, 0)


@pytest.mark.spec("KEYS-010")
def test_the_nearest_rngs_give_the_order():
    def order(own=None, rngs=None):
        source = MemorySource(MemorySourceConfig(shuffle=True), columns(10), rngs=own)
        return rows(by_step(pipeline(source=source, rngs=rngs), 2))["id"].tolist()

    def expected(seed):
        return model.order(model.epoch_key(model.base_key(seed), 0), 10, range(8)).tolist()

    assert order(rngs=nnx.Rngs(1)) == expected(1)
    assert order(own=nnx.Rngs(2), rngs=nnx.Rngs(1)) == expected(2)
    assert order(own=nnx.Rngs(2)) == expected(2)
    assert order(rngs=nnx.Rngs(1, shuffle=3)) == expected(3)
    assert order(own=nnx.Rngs(2, shuffle=4), rngs=nnx.Rngs(1, shuffle=3)) == expected(4)


@pytest.mark.spec("KEYS-013", "KEYS-011")
@pytest.mark.parametrize("mode", MODES)
def test_the_rngs_of_a_stage_advance_once_for_each_batch(mode):
    class Draws(nnx.Module):
        def __init__(self):
            self.rngs = nnx.Rngs(7)

        def __call__(self, batch):
            return {**batch, "key": jnp.broadcast_to(jax.random.key_data(self.rngs()), (4, 2))}

    stage = Draws()
    stream = pipeline([stage], length=8)
    keys = [batch["key"][0].tolist() for batch in MODES[mode](stream, 4)]
    own = nnx.Rngs(7)
    assert keys == [jax.random.key_data(own()).tolist() for _ in range(4)]
    assert stage.rngs.default.count[...] == 4


@pytest.mark.spec("DAG-016", "KEYS-006", "KEYS-007")
def test_keys_go_to_those_who_declare_them():
    got = {}

    def optional(batch, key=None):
        got["optional"] = key.shape
        return batch

    def positional(batch, keys):
        got["positional"] = keys.shape
        return batch

    def options(batch, **options):
        got["options"] = options
        return batch

    def others(batch, *, rng=None, length=3):
        got["others"] = (rng, length)
        return batch

    class Module(nnx.Module):
        def __call__(self, batch, *, keys):
            got["module"] = keys.shape
            return batch

    pipeline([optional, positional, options, others, Module()], seed=0)
    assert got == {
        "optional": (),
        "positional": (4,),
        "options": {},
        "others": (None, 3),
        "module": (4,),
    }
