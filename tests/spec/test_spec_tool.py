"""The tool of the spec finds what it is there to find: each fault is made, on a copy, and named."""

import json
import shutil
from pathlib import Path

import pytest
from datarax_conformance import spec

pytestmark = pytest.mark.internal

ROOT = Path(__file__).parents[2]
PACKAGE = Path("conformance", "src", "datarax_conformance")


def test_the_spec_has_no_fault_and_what_is_made_from_it_is_committed():
    assert spec.check(ROOT) == []


@pytest.fixture
def checkout(tmp_path):
    shutil.copytree(ROOT / "spec", tmp_path / "spec")
    (tmp_path / PACKAGE / "schemas").mkdir(parents=True)
    for name in ("model.py", "spec.json", "schemas/state.schema.json"):
        shutil.copy(ROOT / PACKAGE / name, tmp_path / PACKAGE / name)
    assert spec.check(tmp_path) == []
    return tmp_path


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    "chapter, old, new, fault",
    [
        (
            "30-iter.md",
            "It is the length of a *whole* epoch",
            "It MUST be the length of a *whole* epoch",
            "MUST stands outside a requirement",
        ),
        (
            "30-iter.md",
            "::: req ITER-004 | MUST | profile: iter | needs: ITER-001",
            "::: req ITER-004 | MUST | needs: ITER-001",
            "a block starts with `::: req ID | LEVEL | profile: P | needs: ID, ...`",
        ),
        ("30-iter.md", "{#ITER-004}", "{#ITER-044}", "the heading above ITER-004 has another"),
        ("30-iter.md", "req ITER-004 |", "req ITER-003 |", "ITER-003 is given to 2 sentences"),
        ("30-iter.md", "needs: ITER-001", "needs: ITER-099", "needs ITER-099, which does not"),
        ("30-iter.md", "needs: STEP-001", "needs: ITER-002", "needs go in a circle: ITER-0"),
        ("30-iter.md", "| profile: iter |", "| profile: fun |", "there is no profile fun"),
        ("30-iter.md", "ITER-004 | MUST", "ITER-004 | SHALL", "the level is one of"),
        ("30-iter.md", "ITER-004 | MUST", "ITER-004 | MAY", "ITER-004: the sentence has no MAY"),
        ("10-source.md", "(ITER-012)", "(ITER-912)", "there is no ITER-912"),
        ("80-errors.md", "the code `cycle`", "the code `circle`", "the code circle is missing"),
        ("80-errors.md", "the code `cycle`", "a code", "no requirement uses the code cycle"),
        ("40-shuffle.md", "ROUNDS = 24", "ROUNDS = 23", "constants.toml: ROUNDS is 24"),
        ("50-dag.md", '"sub": sub, ', "", "ops.toml"),
        ("tables/errors.toml", 'requirement = "ERR-015"', 'requirement = "ERR-915"', "no ERR-915"),
    ],
)
def test_a_fault_is_named(checkout, chapter, old, new, fault):
    edit(checkout / "spec" / chapter, old, new)
    faults = [found for found in spec.check(checkout) if "is stale" not in found]
    assert any(fault in found for found in faults), faults


def test_a_requirement_keeps_to_one_chapter(checkout):
    block = (
        "### New {#ITER-098}\n\n::: req ITER-098 | MUST | profile: iter | needs: -\nIt MUST.\n:::"
    )
    with (checkout / "spec" / "40-shuffle.md").open("a") as chapter:
        chapter.write(f"\n{block}\n")
    assert "ITER-098: ITER belongs to 30-iter.md" in spec.check(checkout)


def test_normative_words_in_code_are_not_sentences(checkout):
    with (checkout / "spec" / "30-iter.md").open("a") as chapter:
        chapter.write(
            "\nThe word `MUST` in code.\n\n```text\nA block that MUST be left alone.\n```\n"
        )
    assert spec.check(checkout) == []


@pytest.mark.parametrize(
    "path",
    [
        PACKAGE / "model.py",
        PACKAGE / "spec.json",
        PACKAGE / "schemas" / "state.schema.json",
        Path("spec", "requirements.lock.json"),
        Path("spec", "80-errors.md"),
    ],
    ids=lambda path: path.name,
)
def test_an_edit_of_what_is_made_is_found_and_undone(checkout, path):
    old = {"model.py": "ROUNDS = 24", "80-errors.md": "nodes that wait for each other"}
    edit(checkout / path, old.get(path.name, '"type"' if "state" in path.name else '"MUST"'), '"X"')
    assert any(f"{path} is stale" in found for found in spec.check(checkout))
    spec.build(checkout)
    assert spec.check(checkout) == []
    assert (checkout / path).read_text() == (ROOT / path).read_text()


def test_an_edited_sentence_gets_a_new_revision(checkout):
    path = checkout / "spec" / "requirements.lock.json"
    before = json.loads(path.read_text())
    edit(checkout / "spec" / "30-iter.md", "every later next() on it", "every next() after it")
    spec.build(checkout)
    after = json.loads(path.read_text())
    assert after["ITER-004"]["rev"] == before["ITER-004"]["rev"] + 1
    assert after["ITER-004"]["hash"] != before["ITER-004"]["hash"]
    spec.build(checkout)
    assert json.loads(path.read_text()) == after
    assert {id: entry for id, entry in after.items() if id != "ITER-004"} == {
        id: entry for id, entry in before.items() if id != "ITER-004"
    }


def test_where_lines_break_is_no_change_of_a_sentence(checkout):
    edit(
        checkout / "spec" / "30-iter.md",
        "StopIteration, every later",
        "StopIteration,\nevery later",
    )
    assert spec.check(checkout) == []


def test_the_number_of_a_requirement_that_is_gone_is_not_used_again(checkout):
    chapter = checkout / "spec" / "20-step.md"
    text = chapter.read_text()
    start = text.index("### Name of the mask")
    chapter.write_text(text[:start])
    spec.build(checkout)
    locked = json.loads((checkout / "spec" / "requirements.lock.json").read_text())
    assert locked["STEP-018"]["retired"] is True
    chapter.write_text(text)
    assert "STEP-018 was retired and is not to be used again" in spec.check(checkout)


def test_all_neutral_requirements_have_a_way_to_the_roots():
    requirements = spec.read(ROOT).requirements
    roots = {id for id, requirement in requirements.items() if not requirement.needs}
    assert roots == {"STEP-001", "ERR-001"}
    neutral = {id: r for id, r in requirements.items() if r.profile != "jax"}
    for id, requirement in neutral.items():
        assert set(requirement.needs) <= set(neutral), f"{id} needs one of the profile jax"
