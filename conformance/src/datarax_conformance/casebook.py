"""Builds the stored cases from the declared ones, and checks that they still agree."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .case import HOME, Case, stored_cases
from .compare import without
from .declared import declared_cases
from .engine import Local
from .model_adapter import Adapter
from .requirements import requirements
from .runner import play

MANIFEST = HOME / "MANIFEST.json"

# Actions whose answer by the model is stored if the declaration has no expectation.
TELLING = (
    "step",
    "next",
    "for",
    "scan",
    "recall",
    "columns",
    "global_random",
    "len",
    "threads",
    "jit_step",
    "grad",
    "cursor",
    "ask",
)


class Recorder(Local):
    """A local engine that records its answers."""

    def __init__(self, adapter: Any):
        super().__init__(adapter, same_anywhere=True)
        self.answers: list[dict[str, Any]] = []

    def execute(self, action: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        answer = super().execute(action, timeout)
        if action["do"] != "begin":
            self.answers.append(answer)
        return answer


def with_values(case: Case) -> Case:
    """The case, with the model's answer as the expectation wherever none was declared."""
    recorder = Recorder(Adapter())
    verdict = play(dataclasses.replace(case, script=[*map(_asked, case.script)]), recorder, 600)
    if verdict.outcome != "PASS":
        raise ValueError(f"The model does not pass {case.id}: {verdict.reason}")
    answers = iter(recorder.answers)
    any_order = case.program["seed"] is not None and "shuffle.exact" not in case.profiles
    script = []
    for action in case.script:
        answer = {} if action["do"] == "restart" else next(answers)
        told = action["do"] in TELLING and answer.get("value") is not None
        expect = action.get("expect", {})
        if expect.keys() <= {"without"} and told and not any_order:
            value = without(answer["value"], expect.get("without", ()))
            action = {**action, "expect": {**expect, "value": value}}
        script.append(action)
    return dataclasses.replace(case, script=script)


def _asked(action: Mapping[str, Any]) -> Mapping[str, Any]:
    """The action, without `expect` if the model fills that in."""
    declared = action.get("expect", {}).keys() - {"without"}
    return action if declared else {k: v for k, v in action.items() if k != "expect"}


def to_text(case: Case) -> str:
    """JSON with one line for each column and each action."""

    def lines(parts: Sequence[str]) -> str:
        return "".join(f"\n  {part}," for part in parts)[:-1] + "\n "

    def line(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    data = case.to_json()
    columns = lines(
        [f"{line(name)}: {line(column)}" for name, column in data["program"]["columns"].items()]
    )
    program = {name: value for name, value in data["program"].items() if name != "columns"}
    data["program"], data["script"] = "PROGRAM", "SCRIPT"
    text = ",\n ".join(f"{line(name)}: {line(value)}" for name, value in data.items())
    text = text.replace('"PROGRAM"', f'{{"columns": {{{columns}}}, {line(program)[1:]}')
    script = lines([line(action) for action in case.script])
    return "{\n " + text.replace('"SCRIPT"', f"[{script}]") + "\n}\n"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def rebuilt() -> dict[pathlib.Path, str]:
    """The files of the case book as a build writes them. A case keeps the revisions it cites."""
    cited = {case.id: case.cites for case in stored_cases()}
    files, manifest = {}, {}
    for case in declared_cases():
        old = dict(cite.split("@") for cite in cited.get(case.id, ()))
        cites = [f"{name}@{old.get(name, requirements()[name].rev)}" for name in case.requirements]
        text = to_text(with_values(dataclasses.replace(case, cites=cites)))
        if case.path in files:
            raise ValueError(f"Two cases are called {case.id}.")
        files[case.path] = text
        manifest[case.id] = digest(text)
    return files | {MANIFEST: json.dumps(dict(sorted(manifest.items())), indent=1) + "\n"}


def build() -> int:
    """Stores the declared cases, deletes all others, and returns the number of cases."""
    files = rebuilt()
    for path in HOME.glob("*/*.json"):
        if path not in files:
            path.unlink()
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return len(files) - 1


def stale_cites() -> Iterator[str]:
    """Cases that cite another revision of a requirement than the current one, or no requirement."""
    for case in stored_cases():
        for cite in case.cites:
            name = cite.partition("@")[0]
            if name not in requirements():
                yield f"{case.id} cites {cite}, which is no requirement"
            elif cite != requirements()[name].cite:
                now = requirements()[name].cite
                yield f"{case.id} cites {cite}, but the sentence is now {now}: read it again"


def reread(names: Sequence[str]) -> int:
    """Updates the citations of the requirements `names`, after somebody has reread their cases."""
    count = 0
    for case in stored_cases():
        cites = [
            requirements()[n].cite if n in names else c
            for n, c in zip(case.requirements, case.cites, strict=True)
        ]
        if cites != list(case.cites):
            case.path.write_text(to_text(dataclasses.replace(case, cites=cites)), encoding="utf-8")
            count += 1
    build()
    return count


def manifest_faults() -> Iterator[str]:
    """The cases that the manifest has and the files lack, or the reverse, or that were changed."""
    manifest = json.loads(MANIFEST.read_text(encoding="utf-8"))
    found = {path.stem: digest(path.read_text(encoding="utf-8")) for path in HOME.glob("*/*.json")}
    for name in sorted(manifest.keys() | found.keys()):
        if name not in found:
            yield f"{name} is in the manifest, but not stored"
        elif name not in manifest:
            yield f"{name} is stored, but not in the manifest"
        elif found[name] != manifest[name]:
            yield f"{name} is not what the manifest says"


def faults() -> list[str]:
    """Everything wrong with the case book, one line each."""
    found = [*manifest_faults(), *stale_cites()]
    for path, text in rebuilt().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            found.append(
                f"{path.name} is not what a build makes: run `datarax-conformance cases build`"
            )
    return found
