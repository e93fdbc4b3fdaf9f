"""Turns a script with `# %%` cells into a page that shows the output of each cell.

Run with the path of a script, this file executes the cells and prints their results as JSON.
`page_of` does so in another process, so that a page shows what a fresh interpreter shows a reader.
"""

import ast
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MARKER = re.compile(r"^# %%(?P<prose> \[markdown\])?\n", re.MULTILINE)


class Cell(NamedTuple):
    is_prose: bool
    line: int  # of its first line in the script
    text: str


class Result(NamedTuple):
    printed: str
    html: str  # how the cell's last expression shows itself in a notebook
    picture: str  # and as a Mermaid graph


def cells_of(script: Path) -> Iterator[Cell]:
    text = script.read_text()
    markers = list(MARKER.finditer(text))
    ends = [marker.start() for marker in markers[1:]] + [len(text)]
    for marker, end in zip(markers, ends, strict=True):
        line = text.count("\n", 0, marker.end()) + 1
        yield Cell(bool(marker["prose"]), line, text[marker.end() : end].strip("\n"))


def page_of(script: Path, root: Path) -> str:
    """The page of a script in `root`."""
    run = subprocess.run(
        [sys.executable, "-u", __file__, script], stdout=subprocess.PIPE, check=True, text=True
    )
    results = map(Result._make, json.loads(run.stdout))
    parts = []
    for cell in cells_of(script):
        if cell.is_prose:
            parts.append(re.sub(r"^# ?", "", cell.text, flags=re.MULTILINE))
            continue
        result = next(results)
        parts.append(f"```python\n{cell.text}\n```")
        if result.printed:
            parts.append(f"```{{ .text .printed }}\n{result.printed}\n```")
        if result.html:
            parts.append(f'<div class="shown">{result.html}</div>')
        if result.picture:
            parts.append(f"```mermaid\n{result.picture}\n```")
    name = script.relative_to(root).as_posix()
    parts.append(f"---\n\nThis page is the script `{name}`, run when the site was built.")
    return "\n\n".join(parts) + "\n"


def results_of(script: Path) -> Iterator[Result]:
    module = types.ModuleType("__main__")
    module.__file__ = str(script)
    sys.modules["__main__"] = module
    sys.argv = [str(script)]
    for cell in cells_of(script):
        if cell.is_prose:
            continue
        body = ast.increment_lineno(ast.parse(cell.text), cell.line - 1).body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        with captured_output() as printed:
            exec(compile(ast.Module(body, []), script, "exec"), module.__dict__)
            value = None
            if last is not None:
                value = eval(compile(ast.Expression(last.value), script, "eval"), module.__dict__)
        html = value._repr_html_() if hasattr(value, "_repr_html_") else ""
        picture = value.to_mermaid() if hasattr(value, "to_mermaid") else ""
        yield Result(printed[0].rstrip(), html, picture)


@contextlib.contextmanager
def captured_output() -> Iterator[list[str]]:
    """Captures standard output, also that of child processes."""
    printed: list[str] = []
    stdout = os.dup(1)
    with tempfile.TemporaryFile("w+") as file:
        os.dup2(file.fileno(), 1)
        try:
            yield printed
        finally:
            sys.stdout.flush()
            os.dup2(stdout, 1)
            os.close(stdout)
        file.seek(0)
        printed.append(file.read())


if __name__ == "__main__":
    json.dump(list(results_of(Path(sys.argv[1]).resolve())), sys.stdout)
