"""Mixtures: exact shares, no replacement, and the same stream from host and device sources."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Numbers
from hypothesis import given, settings, strategies as st

from datarax import Pipeline
from datarax.errors import EmptySourceError, ReadError, SourceError, SpecsError
from datarax.sources import (
    HostSource,
    HostSourceConfig,
    MemorySource,
    MemorySourceConfig,
    MixDataSourcesConfig,
    MixDataSourcesNode,
    RandomAccessSource,
    RandomAccessSourceConfig,
    Reader,
)
from datarax.sources._mixture import multiply_divide


def child(number: int, n: int, shuffle=False, *, host=False, rngs=None):
    """Records that hold the number of their source and their own."""
    data = {"source": np.full(n, number, np.int32), "id": np.arange(n, dtype=np.int32)}
    if not host:
        return MemorySource(MemorySourceConfig(shuffle=shuffle), data, rngs=rngs)
    rows = [{k: x[i] for k, x in data.items()} for i in range(n)]
    return RandomAccessSource(RandomAccessSourceConfig(shuffle=shuffle), rows, rngs=rngs)


def mix(lengths, weights=None, *, stop="first", shuffle=False, host=(), seed=5):
    sources = [child(i, n, shuffle, host=i in host) for i, n in enumerate(lengths)]
    config = MixDataSourcesConfig(num_sources=len(lengths), weights=weights, stop=stop)
    return MixDataSourcesNode(config, sources)


def stream(source, rows: int, seed: int = 5):
    """The pairs (source, id) of the first rows of `step`."""
    pipeline = Pipeline(source=source, batch_size=rows, rngs=nnx.Rngs(seed))
    batch = pipeline.step()
    return np.asarray(batch["source"]), np.asarray(batch["id"])


@pytest.mark.spec("SRC-021")
@pytest.mark.parametrize(
    "weights, quotas",
    [
        (None, (1, 1, 1)),
        ((1, 1, 2), (1, 1, 2)),
        ((0.5, 0.3, 0.2), (5, 3, 2)),
        ((0.1, 0.2, 0.7), (1, 2, 7)),
        ((1, 1, 254), (1, 1, 254)),
        ((0.7, 0.2, 0.1), (7, 2, 1)),
    ],
)
def test_shares_are_the_shortest_period_that_is_as_near_to_the_weights_as_any(weights, quotas):
    assert MixDataSourcesConfig(num_sources=3, weights=weights).quotas == quotas


@pytest.mark.spec("SRC-021")
@given(st.lists(st.floats(0.02, 1), min_size=1, max_size=8))
def test_a_period_has_at_most_256_rows_and_is_near_to_the_weights(weights):
    quotas = MixDataSourcesConfig(num_sources=len(weights), weights=tuple(weights)).quotas
    assert min(quotas) > 0 and sum(quotas) <= 256
    shares = np.array(weights) / sum(weights)
    assert np.abs(np.array(quotas) / sum(quotas) - shares).max() <= 1 / 256


@pytest.mark.spec("SRC-021")
def test_every_period_has_the_exact_shares_in_its_own_order():
    source = mix((50, 30, 20), (5, 3, 2))
    which, _ = stream(source, 1000)
    periods = which.reshape(-1, 10)
    for period in periods:
        assert np.bincount(period, minlength=3).tolist() == [5, 3, 2]
    # Ten epochs of ten periods: a pattern for each epoch, rotated for each period.
    assert len({tuple(x) for x in periods.tolist()}) > 40


@pytest.mark.spec("SRC-022")
@settings(max_examples=8)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.lists(st.integers(1, 4), min_size=4, max_size=4),
    st.booleans(),
)
def test_a_source_is_read_to_its_end_before_it_begins_again(lengths, weights, shuffle):
    # Across epochs of the mixture too, and with sources of any length.
    source = mix(lengths, tuple(weights[: len(lengths)]), stop="all", shuffle=shuffle)
    which, ids = stream(source, 60)
    for i, n in enumerate(lengths):
        mine = ids[which == i]
        passes = [mine[start : start + n] for start in range(0, len(mine), n)]
        for one in passes:
            assert len(set(one.tolist())) == len(one)
        for one in passes[:-1]:
            assert sorted(one) == list(range(n))
        if not shuffle:
            assert mine.tolist() == [row % n for row in range(len(mine))]


@pytest.mark.spec("SRC-022")
def test_a_source_with_its_own_seed_has_the_order_that_it_has_alone():
    alone = Pipeline(source=child(0, 9, True, rngs=nnx.Rngs(3)), batch_size=27)
    config = MixDataSourcesConfig(num_sources=2, weights=(2, 1), stop="all")
    mixed = MixDataSourcesNode(config, [child(0, 9, True, rngs=nnx.Rngs(3)), child(1, 4)])
    which, ids = stream(mixed, 45)
    np.testing.assert_array_equal(ids[which == 0][:27], alone.step()["id"])


@pytest.mark.spec("SRC-023")
def test_another_key_mixes_differently():
    orders = {tuple(stream(mix((20, 20)), 20, seed)[0].tolist()) for seed in range(20)}
    assert len(orders) == 20


@pytest.mark.spec("SRC-024")
@pytest.mark.parametrize(
    "lengths, weights, stop, rows",
    [
        ((10, 10), (1, 1), "first", 20),
        ((10, 7), (1, 1), "first", 14),
        ((10, 7), (1, 1), "all", 20),
        ((9, 100), (2, 3), "first", 20),  # source 0 has 4 whole periods
        ((9, 100), (2, 3), "all", 170),
    ],
)
def test_stop_says_how_long_an_epoch_is(lengths, weights, stop, rows):
    source = mix(lengths, weights, stop=stop)
    assert len(source) == rows
    which, ids = stream(source, rows)
    seen = [set(ids[which == i].tolist()) for i in range(2)]
    if stop == "all":
        assert seen == [set(range(n)) for n in lengths]
    else:
        assert all(len(ids[which == i]) == len(seen[i]) for i in range(2))


@pytest.mark.spec("SRC-025")
@pytest.mark.parametrize("host", [(0, 1, 2), (1,), (0, 2)], ids=str)
def test_host_and_device_sources_mix_alike(host):
    on_device = mix((20, 12, 8), (5, 3, 2), shuffle=True)
    mixed = mix((20, 12, 8), (5, 3, 2), shuffle=True, host=host)
    for a, b in zip(stream(on_device, 55), stream(mixed, 55), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.spec("SRC-025")
def test_modes_agree_over_a_mixture():
    def pipeline():
        source = mix((20, 12, 8), (5, 3, 2), shuffle=True, host=(0, 1, 2))
        return Pipeline(source=source, batch_size=6, rngs=nnx.Rngs(1), last_batch="pad")

    a, b, c = pipeline(), pipeline(), pipeline()
    steps = [a.step() for _ in range(14)]
    loops = list(itertools.chain(b, b))
    scanned = c.scan(lambda batch: batch, 14)
    for i, (one, other) in enumerate(zip(steps, loops, strict=True)):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
            np.testing.assert_array_equal(one[name], scanned[name][i])


@pytest.mark.spec("SRC-023", "STEP-015")
def test_a_mixture_runs_eagerly():
    a, b = (Pipeline(source=mix([5, 7]), batch_size=4, rngs=nnx.Rngs(1)) for _ in range(2))
    with jax.disable_jit():
        eager = [a.step()["id"].tolist() for _ in range(2)]
    assert eager == [b.step()["id"].tolist() for _ in range(2)]


@pytest.mark.spec("SRC-023")
def test_random_access_is_traceable():
    source = mix((20, 12), (5, 3), shuffle=True)
    key = jax.random.key(0)
    at = jax.jit(lambda start: source.get_batch_at(start, 4, key))
    whole = source.get_batch_at(0, 40, key)
    for start in (0, 3, 31, 36):
        for name, x in at(jnp.int32(start)).items():
            np.testing.assert_array_equal(x, whole[name][start : start + 4])


@pytest.mark.spec("SRC-026")
def test_specs_that_disagree_are_both_shown():
    a = MemorySource(MemorySourceConfig(), {"x": np.zeros((4, 3), np.float32)})
    b = MemorySource(MemorySourceConfig(), {"x": np.zeros((4, 2), np.float32)})
    with pytest.raises(SpecsError) as caught:
        MixDataSourcesNode(MixDataSourcesConfig(num_sources=2), [a, b])
    assert "x float32[3]" in str(caught.value) and "x float32[2]" in str(caught.value)


@pytest.mark.spec("SRC-026")
@pytest.mark.parametrize(
    "config, words",
    [
        ({"num_sources": 2, "weights": (1.0,)}, "one number for each"),
        ({"num_sources": 2, "weights": (1.0, 0.0)}, "positive numbers"),
        ({"num_sources": 2, "weights": (1.0, 10**400)}, "positive numbers"),
        ({"num_sources": 2, "weights": (1.0, float("nan"))}, "positive numbers"),
        ({"num_sources": 1, "stop": "last"}, '"first" or "all"'),
        ({"num_sources": 2.0}, "one number for each"),
        ({"num_sources": 2, "weights": ("a", "b")}, "positive numbers"),
    ],
)
def test_a_config_that_means_nothing_is_refused(unchecked, config, words):
    with pytest.raises(ValueError, match=words):
        MixDataSourcesConfig(**config)


@pytest.mark.spec("SRC-026")
def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(ValueError, match="smallest of the weights"):
        _ = MixDataSourcesConfig(num_sources=2, weights=(1.0, 1e-4)).quotas
    with pytest.raises(ValueError, match="`num_sources` is 3"):
        MixDataSourcesNode(MixDataSourcesConfig(num_sources=3), [child(0, 3)])
    with pytest.raises(EmptySourceError, match="holds none"):
        mix((2, 50), (3, 1))
    with pytest.raises(ValueError, match="Take shuffle=True"):
        mix((4, 4), shuffle="permutation")
    with pytest.raises(TypeError, match="Source 0 of a mixture is a mixture itself"):
        MixDataSourcesNode(MixDataSourcesConfig(num_sources=1), [mix((4, 4))])

    class Backwards(Numbers):
        def order(self, order_key, epochs):
            raise NotImplementedError

    with pytest.raises(ValueError, match="has a method `order` of its own"):
        MixDataSourcesNode(MixDataSourcesConfig(num_sources=1), [Backwards(4)])
    marked = child(0, 3)
    marked.masks = True
    with pytest.raises(ValueError, match=r"Source 0, a MemorySource, .* has no `reader`"):
        MixDataSourcesNode(MixDataSourcesConfig(num_sources=1), [marked])
    for other in child(0, 3), child(0, 3, host=True):
        with pytest.raises(
            ValueError, match=r"mask the records .* source 1 does and source 0 does"
        ):
            MixDataSourcesNode(MixDataSourcesConfig(num_sources=2), [other, masking([])])


class Placed(nnx.Module):
    def __len__(self):
        return 4

    def get_batch_at(self, start, batch_size, key=None):
        raise NotImplementedError


@pytest.mark.spec("SRC-026")
def test_a_source_without_gather_cannot_be_mixed(unchecked):
    with pytest.raises(TypeError, match=r"must have a length and `gather`.* got Placed\."):
        MixDataSourcesNode(MixDataSourcesConfig(num_sources=1), [Placed()])


class Broken(list):
    """Records of which some cannot be read."""

    bad = (3,)

    def __getitem__(self, i):
        if i in self.bad:
            raise OSError("a scratch")
        return super().__getitem__(i)


@pytest.mark.spec("SRC-031", "SRC-032", "SRC-025")
@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("stages", [[], [lambda batch: batch]], ids=["bare", "staged"])
def test_a_broken_record_of_a_mixture_is_named(host, stages, caplog):
    data = Broken({"source": np.int32(1), "id": np.int32(i)} for i in range(12))
    sources = [child(0, 12, host=host), RandomAccessSource(RandomAccessSourceConfig(), data)]
    mixture = MixDataSourcesNode(MixDataSourcesConfig(num_sources=2), sources)
    where = r" \(record \d+ of source 1\)" if host else ""
    pipeline = Pipeline(source=mixture, stages=stages, batch_size=2, rngs=nnx.Rngs(0))
    for read in (lambda: [*pipeline], lambda: pipeline.scan(ids_of, length=9)):
        with pytest.raises(
            ReadError, match=rf"record \d+ of Broken{where}: OSError: a scratch"
        ) as caught:
            read()
        assert isinstance(caught.value.__cause__, OSError)
        assert str(caught.value).count("The cursor has not moved") == 1
        assert pipeline.cursor == (0, 6)
    with pytest.raises(ReadError, match="a scratch"):
        pipeline.replay(15)
    data.bad = ()
    assert len(np.concatenate([ids_of(batch) for batch in pipeline])) == len(mixture) - 6


def masking(bad, max_errors=1):
    """Twelve records, of which these cannot be read."""
    data = Broken({"source": np.int32(1), "id": np.int32(i)} for i in range(12))
    data.bad = bad
    config = RandomAccessSourceConfig(on_error="mask", max_errors=max_errors)
    return RandomAccessSource(config, data)


@pytest.mark.spec("SRC-033", "SRC-025")
@pytest.mark.parametrize("mode", ["for", "step", "scan", "jit"])
@pytest.mark.parametrize("stages", [[], [lambda batch: batch]], ids=["bare", "staged"])
def test_a_mixture_of_sources_that_mask_masks(mode, stages):
    sources = [masking([3]), masking([5, 7], max_errors=2)]
    mixture = MixDataSourcesNode(MixDataSourcesConfig(num_sources=2), sources)
    pipeline = Pipeline(source=mixture, stages=stages, batch_size=4, rngs=nnx.Rngs(0))
    if mode == "for":
        batches = list(pipeline)
    elif mode == "scan":
        batches = [pipeline.scan(lambda batch: batch, length=6)]
    else:
        step = pipeline.step if mode == "step" else nnx.jit(Pipeline.step)
        batches = [step(*[pipeline] * (mode == "jit")) for _ in range(6)]
    ids, mask = (np.concatenate([x[name].ravel() for x in batches]) for name in ("id", "mask"))
    assert sorted(ids[mask]) == sorted([*({*range(12)} - {3}), *({*range(12)} - {5, 7})])
    assert ids[~mask].tolist() == [0, 0, 0]


@pytest.mark.spec("SRC-033", "SRC-025")
def test_a_mixture_may_mask_as_many_rows_as_its_sources_together():
    sources = [masking([3, 4]), masking([5])]
    mixture = MixDataSourcesNode(MixDataSourcesConfig(num_sources=2), sources)
    pipeline = Pipeline(source=mixture, batch_size=1, rngs=nnx.Rngs(0))
    with pytest.raises(ReadError, match=r"before it 2 of epoch 0 .* max_errors=2 allows"):
        list(pipeline)
    assert pipeline.stats().masked == 2


@dataclasses.dataclass(frozen=True)
class Huge(Reader):
    """Computes its records when they are read."""

    number: int
    length: int

    def __len__(self):
        return self.length

    @property
    def stored_spec(self):
        return {"source": jax.ShapeDtypeStruct((), np.uint32)}

    def read(self, records):
        assert (records < self.length).all()
        return {"source": np.full(len(records), self.number, np.uint32)}


@pytest.mark.spec("SRC-021", "ERR-023")
def test_sources_that_are_together_too_many_for_32_bits_need_64():
    readers = Huge(0, 3 * 10**9), Huge(1, 2 * 10**9)
    config = MixDataSourcesConfig(num_sources=2, weights=(9, 1))
    sources = [HostSource(reader, HostSourceConfig()) for reader in readers]
    mixture = MixDataSourcesNode(config, sources)
    assert len(mixture) < 2**32 < mixture.records

    def build():
        return Pipeline(source=mixture, batch_size=1000, rngs=nnx.Rngs(5))

    with jax.enable_x64(True):
        assert np.bincount(build().step()["source"]).tolist() == [900, 100]
    for use in (build, lambda: mixture.get_batch_at(0, 4, jax.random.key(0))):
        with pytest.raises(SourceError, match="A source of 5000000000 records is counted in 64"):
            use()


def ids_of(batch):
    return batch["id"]


@pytest.mark.internal
@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 2**32 - 1), min_size=16, max_size=16),
    st.integers(1, 2**32 - 1),
    st.integers(0, 2**40),
)
def test_multiply_divide_is_exact(xs, divisor, factor):
    factor %= divisor * 7
    quotients, rests = multiply_divide(jnp.array(xs, jnp.uint32), factor, divisor)
    for x, quotient, rest in zip(xs, quotients.tolist(), rests.tolist(), strict=True):
        expected = divmod(x * factor, divisor)
        assert (quotient, rest) == (expected[0] % 2**32, expected[1])


@pytest.mark.spec("SRC-026")
@pytest.mark.parametrize(
    "sources, text",
    [
        ({"a": 1, "b": 2}, "`sources` is a list of sources, got dict."),
        (
            [{"x": np.zeros(3)}] * 2,
            "Source 0 of a mixture must be a source, got dict. Of arrays make one: "
            "MemorySource(MemorySourceConfig(), data).",
        ),
    ],
)
def test_what_is_no_source_is_told_so(unchecked, sources, text):
    with pytest.raises(TypeError) as error:
        MixDataSourcesNode(MixDataSourcesConfig(num_sources=2), sources)
    assert str(error.value) == text
