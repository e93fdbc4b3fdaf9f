"""The laws that every source keeps, run over the table of `cases.py`."""

import copy
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datarax import Pipeline, operators, sources
from datarax.sources import MemorySource, MemorySourceConfig

from . import cases
from .cases import ALL, HOST, N, seeded

# The order is not the source's business, so one with many is enough.
ORDERED = {"disk": [False, True, "permutation"]}


@pytest.fixture(scope="module", params=ALL, ids=str)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def make(case, tmp_path_factory):
    """`make(shuffle=...)` opens the source of one line of the table."""
    return case.prepare(tmp_path_factory.mktemp(case.name))


def stored(source) -> dict[str, np.ndarray]:
    return jax.tree.map(np.asarray, source.get_batch_at(0, N))


def same_in_memory(source, **config) -> MemorySource:
    return MemorySource(MemorySourceConfig(**config), stored(source))


def flat(batches) -> dict[str, np.ndarray]:
    """The rows of an epoch that are not masked."""
    batches = [jax.tree.map(np.asarray, batch) for batch in batches]
    return {k: np.concatenate([b[k][b["mask"]] for b in batches]) for k in ("id", "x")}


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.spec("SRC-019")
def test_stored_order_is_the_order_of_the_storage(make):
    rows = stored(make())
    expected = cases.columns()
    assert sorted(rows["id"]) == list(range(N))
    assert_equal(rows["x"], expected["x"][rows["id"]])
    assert {k: (x.dtype, x.shape[1:]) for k, x in rows.items()} == {
        k: (x.dtype, x.shape[1:]) for k, x in expected.items()
    }


@pytest.mark.spec("SRC-019")
def test_an_epoch_is_that_of_the_same_records_in_memory(make, case):
    for shuffle in ORDERED.get(case.name, [True]):
        source = make(shuffle=shuffle)
        memory = same_in_memory(make(), shuffle=shuffle)
        here, there = (
            Pipeline(source=s, batch_size=5, rngs=seeded(), last_batch="pad")
            for s in (source, memory)
        )
        for _ in range(2):
            assert_equal(flat(here), flat(there))


@pytest.mark.spec("SRC-019")
@pytest.mark.parametrize("last_batch", ["keep", "drop", "pad"])
def test_step_for_and_scan_agree(make, last_batch):
    def pipeline():
        return Pipeline(
            source=make(shuffle=True), batch_size=7, rngs=seeded(), last_batch=last_batch
        )

    length = 8  # crosses two ends of an epoch
    by_step, by_scan = pipeline(), pipeline()
    steps = [by_step.step() for _ in range(length)]
    scanned = by_scan.scan(lambda batch: batch, length)
    assert_equal(jax.tree.map(lambda *x: np.stack(x), *steps), scanned)
    assert by_step.cursor == by_scan.cursor
    if last_batch != "keep":
        by_for = pipeline()
        loops = [batch for _ in range(2) for batch in by_for]
        assert_equal(steps[: len(loops)], loops)


@pytest.mark.spec("SRC-019")
def test_a_state_resumes_at_the_same_record(make):
    one, other = (
        Pipeline(source=make(shuffle=True), batch_size=4, rngs=seeded()) for _ in range(2)
    )
    for _ in range(3):
        one.step()
    other.set_state(one.get_state())
    for _ in range(5):
        assert_equal(one.step(), other.step())


@pytest.mark.spec("SRC-020")
@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_open_their_files_again(make, again):
    pipeline = Pipeline(source=make(shuffle=True), batch_size=4, rngs=seeded())
    pipeline.step()
    other = again(pipeline)
    assert other.cursor == pipeline.cursor
    assert_equal(pipeline.step(), other.step())


@pytest.mark.internal("outside of any program an order is one all the same")
def test_random_access_compiles_nothing_anew(make, caplog):
    key = jax.random.key(1)

    def read():
        source = make(shuffle=True)
        return [source.get_batch_at(start, 5, key) for start in (0, 7, 20, N - 5, 3 * N - 1)]

    first = read()
    with jax.log_compiles():
        again = read()
    assert_equal(first, again)
    assert not [r for r in caplog.records if "ompil" in r.getMessage()]


@pytest.mark.spec("SRC-015")
def test_random_access_in_the_users_own_jit(make):
    source = make(shuffle=True)
    key = jax.random.key(3)

    @jax.jit
    def two(start, key):
        return jax.lax.map(lambda i: source.get_batch_at(i, 3, key), start + jnp.array([0, 3]))

    found = two(jnp.int32(4), key)
    expected = source.get_batch_at(4, 6, key)
    assert_equal(jax.tree.map(lambda x: x.reshape(6, *x.shape[2:]), found), expected)


@pytest.mark.spec("SRC-016")
def test_chunks_of_one_key_cover_every_record(make):
    source = make(shuffle=True)
    key = jax.random.key(1)
    chunks = [source.get_batch_at(i, 5, key)["id"] for i in range(0, N, 5)]
    assert sorted(np.concatenate(chunks)[:N]) == list(range(N))


@pytest.mark.spec("SRC-020")
@pytest.mark.parametrize("case", HOST, ids=str)
def test_readers_are_equal_where_they_read_the_same_files(case, tmp_path):
    make = case.prepare(tmp_path)
    one, other = make().reader, make().reader
    assert hash(one) == hash(one) and one == one
    if case.name not in ("objects", "torch_dataset", "grain_source", "hf"):
        assert one == other and hash(one) == hash(other)


def arguments(kind):
    return list(inspect.signature(kind).parameters.values())


CONFIGURED = {
    name: kind
    for module in (sources, operators)
    for name, kind in vars(module).items()
    if inspect.isclass(kind) and "config" in [x.name for x in arguments(kind)[:1]]
}


@pytest.mark.internal
def test_help_shows_the_parameters_of_sources_and_operators():
    assert len(CONFIGURED) == 12 and CONFIGURED.keys() >= {"MemorySource", "ElementOperator"}


@pytest.mark.internal
@pytest.mark.parametrize("name", CONFIGURED)
def test_who_forgets_the_config_is_told_so(unchecked, name):
    others = [x for x in arguments(CONFIGURED[name])[1:] if x.default is x.empty]
    named = {x.name: None for x in others if x.kind is x.KEYWORD_ONLY}
    given = [None] * (len(others) - len(named))
    with pytest.raises(TypeError) as caught:
        CONFIGURED[name]({"x": np.zeros(4)}, *given, **named)
    expected = f"{name.removesuffix('Node')}Config"
    assert str(caught.value) == f"`config` must be of type {expected}, got dict."


@pytest.mark.internal
@pytest.mark.parametrize("name", ["TFDSEagerSource", "TFDSStreamingSource"])
def test_several_splits_are_no_source(unchecked, name, tmp_path):
    config = getattr(sources, f"{name}Config")(path=tmp_path, split=None)
    with pytest.raises(TypeError, match="`split` must be of type str, got NoneType"):
        getattr(sources, name)(config)
