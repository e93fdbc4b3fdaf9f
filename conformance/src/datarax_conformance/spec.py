"""The tool of the spec: `python -m datarax_conformance.spec build|check`.

The chapters in `spec/` and the tables in `spec/tables/` are written by hand. From them come, byte
for byte the same at every build: `model.py` (the blocks of Python titled "model", in the order of
the chapters), `spec.json` (requirements and tables, for the suite), the schema of the state, the
lock of the requirements, and the tables inside the chapters. `build` writes them; `check` writes
nothing and fails on any fault in the spec and on any file that a build would change.
"""

import argparse
import dataclasses
import graphlib
import hashlib
import json
import re
import sys
import tomllib
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LEVELS = ("MUST", "MAY")
OPENING = re.compile(
    r"::: req (?P<id>[A-Z]+-\d{3}) \| (?P<level>[A-Z]+)"
    r" \| profile: (?P<profile>[a-z.]+) \| needs: (?P<needs>-|[A-Z]+-\d{3}(?:, [A-Z]+-\d{3})*)"
)
HEADING = re.compile(r"#{2,4} (?P<title>.+) \{#(?P<id>[A-Z]+-\d{3})\}")
ID = re.compile(r"\b[A-Z]{2,8}-\d{3}\b")
NORMATIVE = re.compile(r"\b(MUST|SHALL|SHOULD|MAY|REQUIRED|RECOMMENDED|OPTIONAL)\b")
TABLE = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end -->", re.DOTALL)
CODE = re.compile(r"the code `([a-z-]+)`")

MODEL_HEADER = '''"""The model: the law of the spec as one NumPy program.

Made from the chapters in `spec/` by `python -m datarax_conformance.spec build`; change it there.
"""

'''


@dataclasses.dataclass(frozen=True)
class Requirement:
    id: str
    title: str
    level: str
    profile: str
    needs: tuple[str, ...]
    text: str
    chapter: str

    @property
    def digest(self) -> str:
        """The hash of level and sentence. The revision, which citations name, changes with it."""
        return hashlib.sha256(f"{self.level} {self.text}".encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Spec:
    """The content of the hand-written files, and their faults."""

    requirements: Mapping[str, Requirement]
    model: str
    tables: Mapping[str, Any]
    faults: tuple[str, ...]


def find_root() -> Path:
    """The checkout with the spec: the one of this file, else the one of the working directory."""
    for start in (Path(__file__).resolve(), Path.cwd() / "spec"):
        for folder in start.parents:
            if (folder / "spec" / "README.md").exists():
                return folder
    raise SystemExit("No folder `spec/` with a README.md here or above: run this in a checkout.")


def chapters(root: Path) -> list[Path]:
    return [root / "spec" / "README.md", *sorted((root / "spec").glob("[0-9]*.md"))]


def read(root: Path) -> Spec:
    faults: list[str] = []
    found: list[Requirement] = []
    blocks: list[str] = []
    mentioned: dict[str, str] = {}
    for path in chapters(root):
        text = path.read_text()
        blocks += model_blocks(text)
        requirements, prose = split(text, path.name, faults)
        found += requirements
        for line, words in prose:
            for word in NORMATIVE.findall(words):
                faults.append(f"{path.name}:{line}: {word} stands outside a requirement")
            mentioned |= {id: f"{path.name}:{line}" for id in ID.findall(words)}
    tables = {path.stem: tomllib.loads(path.read_text()) for path in tables_of(root)}
    requirements = {requirement.id: requirement for requirement in found}
    spec = Spec(requirements, MODEL_HEADER + "\n\n".join(blocks), tables, ())
    faults += [f"{id} is given to {count} sentences" for id, count in repeats(found)]
    faults += relation_faults(spec, mentioned)
    faults += table_faults(spec)
    return dataclasses.replace(spec, faults=tuple(faults))


def tables_of(root: Path) -> list[Path]:
    return sorted((root / "spec" / "tables").glob("*.toml"))


def model_blocks(text: str) -> list[str]:
    return re.findall(r'^```python title="model"\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)


def split(
    text: str, chapter: str, faults: list[str]
) -> tuple[list[Requirement], list[tuple[int, str]]]:
    """The requirements of a chapter, and its prose by line without code."""
    requirements, prose = [], []
    heading: re.Match[str] | None = None
    lines = enumerate(text.splitlines(), start=1)
    for number, line in lines:
        place = f"{chapter}:{number}"
        if line.startswith("```"):
            for _, inside in lines:
                if inside == "```":
                    break
        elif line.startswith(":::"):
            opening = OPENING.fullmatch(line)
            body = until_closed(lines)
            if opening is None or body is None:
                form = "::: req ID | LEVEL | profile: P | needs: ID, ..."
                faults.append(f"{place}: a block starts with `{form}` and ends with `:::`")
                continue
            if heading is None or heading["id"] != opening["id"]:
                faults.append(f"{place}: the heading above {opening['id']} has another anchor")
            needs = () if opening["needs"] == "-" else tuple(opening["needs"].split(", "))
            title = heading["title"] if heading else ""
            fields = opening["id"], title, opening["level"], opening["profile"]
            requirements.append(Requirement(*fields, needs, body, chapter))
            heading = None
        elif line.strip():
            heading = HEADING.fullmatch(line)
            prose.append((number, re.sub(r"`[^`]*`", "", line)))
    return requirements, prose


def until_closed(lines: Iterator[tuple[int, str]]) -> str | None:
    body: list[str] = []
    for _, line in lines:
        if line == ":::":
            return " ".join(" ".join(body).split())
        body.append(line)
    return None


def repeats(found: list[Requirement]) -> list[tuple[str, int]]:
    ids = [requirement.id for requirement in found]
    return [(id, ids.count(id)) for id in dict.fromkeys(ids) if ids.count(id) > 1]


def relation_faults(spec: Spec, mentioned: Mapping[str, str]) -> Iterator[str]:
    """The faults of levels, profiles, needs and cross-references."""
    known = spec.requirements
    for id, place in mentioned.items():
        if id not in known:
            yield f"{place}: there is no {id}"
    for requirement in known.values():
        if requirement.level not in LEVELS:
            yield f"{requirement.id}: the level is one of {LEVELS}, got {requirement.level}"
        if requirement.level not in requirement.text:
            yield f"{requirement.id}: the sentence has no {requirement.level}"
        if requirement.profile not in spec.tables["profiles"]["profiles"]:
            yield f"{requirement.id}: there is no profile {requirement.profile}"
        for need in requirement.needs:
            if need not in known:
                yield f"{requirement.id}: needs {need}, which does not exist"
    homes: dict[str, str] = {}
    for requirement in known.values():
        home = homes.setdefault(requirement.id[:-4], requirement.chapter)
        if home != requirement.chapter:
            yield f"{requirement.id}: {requirement.id[:-4]} belongs to {home}"
    graph = {id: [n for n in r.needs if n in known] for id, r in known.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        yield f"needs go in a circle: {' -> '.join(error.args[1])}"


def run_model(text: str) -> types.ModuleType:
    module = types.ModuleType("datarax_model")
    sys.modules[module.__name__] = module  # where dataclasses look their module up
    exec(compile(text, "the model in spec/", "exec"), vars(module))
    return module


def table_faults(spec: Spec) -> Iterator[str]:
    """The faults of the tables, compared with each other, the requirements and the model."""
    namespace = vars(run_model(spec.model))
    for constant in spec.tables["constants"]["constant"]:
        value = namespace.get(constant["name"])
        if json.dumps(value, default=repr) != json.dumps(constant["value"]):
            name = constant["name"]
            yield f"constants.toml: {name} is {constant['value']}, in the model {value}"
    vocabulary = {op["form"].partition("(")[0] for op in spec.tables["ops"]["op"]}
    if vocabulary != set(namespace["OPERATIONS"]):
        yield f"ops.toml: {vocabulary}, in the model {set(namespace['OPERATIONS'])}"

    codes = [error["code"] for error in spec.tables["errors"]["error"]]
    used = {code for r in spec.requirements.values() for code in CODE.findall(r.text)}
    raised = set(re.findall(r'Refused\(\s*"([a-z-]+)"', spec.model))
    yield from (f"errors.toml: no requirement uses the code {code}" for code in set(codes) - used)
    yield from (f"errors.toml: the code {code} is missing" for code in (used | raised) - set(codes))
    yield from (f"errors.toml: {code} twice" for code in set(codes) if codes.count(code) > 1)
    for table, rows in (("constants", "constant"), ("errors", "error")):
        for row in spec.tables[table][rows]:
            if row["requirement"] not in spec.requirements:
                yield f"{table}.toml: there is no {row['requirement']}"


def render(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def rendered_tables(tables: Mapping[str, Any]) -> dict[str, str]:
    def code(words: list[str]) -> str:
        return ", ".join(f"`{word}`" for word in words)

    return {
        "profiles": render(
            ["profile", "what it covers"],
            [[f"`{name}`", covers] for name, covers in tables["profiles"]["profiles"].items()],
        ),
        "ops": render(
            ["operation", "predecessors", "result"],
            [[f"`{o['form']}`", o["predecessors"], o["result"]] for o in tables["ops"]["op"]],
        ),
        "errors": render(
            ["code", "fault", "names", "class in `datarax.errors`"],
            [
                [f"`{e['code']}`", e["fault"], code(e["names"]), f"`{e['class']}`"]
                for e in tables["errors"]["error"]
            ],
        ),
        "state": render(
            ["field", "meaning"],
            [[f"`{f['path']}`", f["meaning"]] for f in tables["state"]["field"]],
        ),
    }


def state_schema(tables: Mapping[str, Any]) -> dict[str, Any]:
    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "State of a pipeline",
        "type": "object",
    }
    for row in tables["state"]["field"]:
        *folders, leaf = row["path"].split(".")
        node = schema
        for name in [*folders, leaf]:
            node.setdefault("type", "object")
            node.setdefault("additionalProperties", False)
            node = node.setdefault("properties", {}).setdefault(name, {})
        node |= {**row["type"], "description": row["meaning"]}
    require_all(schema)
    return schema


def require_all(schema: dict[str, Any]) -> None:
    if "properties" in schema and "required" not in schema:
        schema["required"] = list(schema["properties"])
        for inner in schema["properties"].values():
            require_all(inner)


def lock(spec: Spec, before: Mapping[str, Any]) -> dict[str, Any]:
    """The requirements with their revisions. A sentence that changed since `before` gets the next.

    An id that is gone stays in the lock as retired, so that no requirement gets it again.
    """
    entries: dict[str, Any] = {}
    for id, requirement in spec.requirements.items():
        old = before.get(id, {"rev": 1, "hash": requirement.digest})
        entries[id] = {
            "level": requirement.level,
            "profile": requirement.profile,
            "needs": list(requirement.needs),
            "rev": old["rev"] + (old["hash"] != requirement.digest),
            "hash": requirement.digest,
            "place": f"{requirement.chapter}#{id}",
        }
    for id in before.keys() - entries.keys():
        entries[id] = {"retired": True, "rev": before[id]["rev"], "hash": before[id]["hash"]}
    return dict(sorted(entries.items()))


def retired_faults(spec: Spec, before: Mapping[str, Any]) -> Iterator[str]:
    for id, entry in before.items():
        if entry.get("retired") and id in spec.requirements:
            yield f"{id} was retired and is not to be used again"


def outputs(root: Path, spec: Spec) -> dict[Path, str]:
    """Every file that a build writes, with its text."""
    lock_path = root / "spec" / "requirements.lock.json"
    before = json.loads(lock_path.read_text()) if lock_path.exists() else {}
    locked = lock(spec, before)
    requirements = {
        id: {"title": r.title, **locked[id], "text": r.text} for id, r in spec.requirements.items()
    }
    package = root / "conformance" / "src" / "datarax_conformance"
    tables = rendered_tables(spec.tables)
    files = {
        lock_path: as_json(locked),
        package / "model.py": spec.model,
        package / "spec.json": as_json(
            {
                "requirements": requirements,
                "profiles": spec.tables["profiles"]["profiles"],
                "constants": spec.tables["constants"]["constant"],
                "errors": spec.tables["errors"]["error"],
                "ops": spec.tables["ops"]["op"],
            }
        ),
        package / "schemas" / "state.schema.json": as_json(state_schema(spec.tables)),
    }
    for path in chapters(root):
        files[path] = TABLE.sub(
            lambda m: f"<!-- table: {m[1]} -->\n\n{tables[m[1]]}\n\n<!-- end -->", path.read_text()
        )
    return files


def as_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def build(root: Path) -> None:
    for path, text in outputs(root, read(root)).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def check(root: Path) -> list[str]:
    """Every fault of the spec and of the files made from it, one line each."""
    spec = read(root)
    lock_path = root / "spec" / "requirements.lock.json"
    before = json.loads(lock_path.read_text()) if lock_path.exists() else {}
    faults = [*spec.faults, *retired_faults(spec, before)]
    for path, text in outputs(root, spec).items():
        if not path.exists() or path.read_text() != text:
            faults.append(f"{path.relative_to(root)} is stale: run `... spec build` and commit it")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(prog="datarax_conformance.spec", description=__doc__)
    parser.add_argument("command", choices=["build", "check"])
    command = parser.parse_args().command
    root = find_root()
    if command == "build":
        build(root)
    faults = check(root)
    print(*faults, sep="\n", end="\n" if faults else "")
    count = len(read(root).requirements)
    print(f"spec: {count} requirements, {len(faults)} faults")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
