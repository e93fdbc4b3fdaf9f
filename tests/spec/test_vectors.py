"""The golden vectors: the model makes them, JAX agrees with them, and nothing about them moves."""

import json
import shutil
from pathlib import Path

import datarax_conformance
import jax
import jsonschema
import numpy as np
import pytest
from datarax_conformance import model, vectors

pytestmark = pytest.mark.internal

SCHEMAS = Path(datarax_conformance.__file__).parent / "schemas"
FILES = sorted(vectors.manifest())


def test_the_model_reproduces_every_vector():
    assert vectors.check() == []


def test_the_sizes_that_go_wrong_first_are_there():
    boundaries = {2**k + d for k in range(1, 21) for d in (-1, 0, 1)}
    wanted = boundaries | {1, 2, 3, 5, 10, 33, 100, 1000, 10**9, 2**32 - 1, 2**40}
    assert {f"order/{length}.json" for length in wanted} <= set(FILES)


def test_every_file_follows_the_schema():
    schema = json.loads((SCHEMAS / "vectors.schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    for name in FILES:
        validator.validate(vectors.load(name))


def test_the_orders_are_frozen():
    # Saved states outlive a release: with other numbers they would resume at other records.
    assert [case["records"] for case in vectors.load("order/10.json")["cases"][:4]] == [
        [7, 8, 5, 6, 3, 9, 2, 4, 1, 0],
        [6, 9, 4, 7, 3, 5, 1, 8, 0, 2],
        [2, 9, 0, 6, 4, 5, 1, 7, 3, 8],
        [0, 9, 1, 2, 3, 8, 5, 4, 6, 7],
    ]


def test_a_stored_order_is_consistent_in_itself():
    for name in FILES:
        if not name.startswith("order/"):
            continue
        stored = vectors.load(name)
        for case in stored["cases"]:
            records = case["records"]
            if "offsets" in case:
                assert case["offsets"] == vectors.sample(stored["length"]), name
                assert len(set(records)) == len(case["offsets"]), name
                assert max(records) < stored["length"], name
            else:
                assert sorted(records) == list(range(stored["length"])), name


def test_jax_folds_in_the_same_words():
    for case in vectors.load("keys/fold_in.json")["cases"]:
        if case["number"] < 2**32:
            key = jax.random.wrap_key_data(np.array(case["key"], np.uint32), impl="threefry2x32")
            folded = jax.random.fold_in(key, np.uint32(case["number"]))
            assert jax.random.key_data(folded).tolist() == case["words"], case


def test_the_vectors_of_the_block_function_are_the_published_ones():
    known = [case["words"] for case in vectors.load("keys/threefry.json")["cases"][:3]]
    assert known == [
        [0x6B200159, 0x99BA4EFE],
        [0x1CB996FC, 0xBB002BE7],
        [0xC4923A9C, 0x483DF7A0],
    ]


@pytest.fixture
def copy_of_the_vectors(tmp_path, monkeypatch):
    folder = tmp_path / "vectors"
    shutil.copytree(vectors.HERE, folder)
    monkeypatch.setattr(vectors, "HERE", folder)
    monkeypatch.setattr(vectors, "MANIFEST", folder / "MANIFEST.json")
    monkeypatch.setattr(vectors, "LENGTHS", [5, 10])
    listed = {k: v for k, v in vectors.manifest().items() if k in dict(vectors.made())}
    for path in folder.glob("order/*.json"):
        if path.relative_to(folder).as_posix() not in listed:
            path.unlink()
    vectors.MANIFEST.write_text(json.dumps(listed))
    assert vectors.check() == []
    return folder


def test_a_changed_number_is_found(copy_of_the_vectors):
    path = copy_of_the_vectors / "order" / "5.json"
    path.write_text(path.read_text().replace("[4,", "[3,", 1))
    assert vectors.check() == [
        "order/5.json is not the file that the manifest lists",
        "order/5.json is not what the model makes",
    ]


def test_lost_and_stray_files_are_found(copy_of_the_vectors):
    path = copy_of_the_vectors / "order" / "5.json"
    path.rename(path.with_name("6.json"))
    assert vectors.check() == ["order/6.json is not in the manifest", "order/5.json is missing"]


def test_a_build_does_not_replace_a_frozen_file(copy_of_the_vectors, monkeypatch):
    monkeypatch.setattr(model, "ROUNDS", 23)
    with pytest.raises(SystemExit, match=r"order/5\.json is frozen"):
        vectors.build()
