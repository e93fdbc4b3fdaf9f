"""Makes the engines' environments and their results.

`python conformance/engines.py make|results|page|check|requirements [NAME ...]`: `results` writes
conformance/results/NAME and the matrix of them all, `page` the matrix alone, from the reports that
are committed; `check` writes nothing and fails where a report
that is made again differs from the one committed. Without names, `check` takes the engines that
install quickly, and passes over one that cannot be installed. `requirements` prints what the
engines are installed from, for an environment that has several.
"""

import argparse
import functools
import glob
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor

HOME = pathlib.Path(__file__).resolve().parent
ENGINES = tomllib.loads((HOME / "adapters" / "engines.toml").read_text())


def interpreter(version: str) -> str:
    """A Python of this version: the running one, one on the path, or one of pyenv's."""
    if "{}.{}".format(*sys.version_info) == version:
        return sys.executable
    wanted = f"import sys; sys.exit('{{}}.{{}}'.format(*sys.version_info) != '{version}')"
    pyenv = glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}*/bin/python"))
    for found in filter(None, [shutil.which(f"python{version}"), *pyenv]):
        if subprocess.run([found, "-c", wanted], capture_output=True).returncode == 0:
            return found
    raise SystemExit(f"There is no Python {version} here.")


def python_of(name: str) -> str:
    return (
        str(HOME / ".engines" / name / "bin" / "python")
        if "requirements" in ENGINES[name]
        else sys.executable
    )


def make(name: str) -> None:
    """Makes the environment of an engine, unless it was made from the same requirements."""
    engine = ENGINES[name]
    if "requirements" not in engine:
        return
    folder = HOME / ".engines" / name
    stamp, mark = (
        folder / ".made-of",
        hashlib.sha256(repr(sorted(engine.items())).encode()).hexdigest(),
    )
    if stamp.exists() and stamp.read_text() == mark:
        return
    subprocess.run([interpreter(engine["python"]), "-m", "venv", str(folder)], check=True)
    subprocess.run(
        [python_of(name), "-m", "pip", "install", "--quiet", *engine["requirements"]], check=True
    )
    stamp.write_text(mark)


def run(name: str, out: pathlib.Path) -> None:
    """Runs all cases on an engine and writes its report. Exits if the engine cannot be started."""
    make(name)
    # An engine with its own environment must not find this project's packages.
    inherited = [] if "requirements" in ENGINES[name] else [os.environ.get("PYTHONPATH", "")]
    paths = os.pathsep.join(filter(None, [str(HOME / "src"), *inherited]))
    command = [sys.executable, "-m", "datarax_conformance", "run", ENGINES[name]["adapter"]]
    command += ["--jobs", "2", "--timeout", "600", "--out", str(out)]
    if "requirements" in ENGINES[name]:  # relative, as in the checkout of a reader of the report
        command += ["--python", str(pathlib.Path(python_of(name)).relative_to(HOME))]
    quiet = {**os.environ, "PYTHONPATH": paths, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        command, cwd=HOME, env=quiet, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode == 2:
        raise SystemExit(f"{name}: {done.stderr.strip().splitlines()[-1]}")


def results(names: list[str]) -> int:
    for name in names:
        run(name, HOME / "results" / name)
        print(name, flush=True)
    return write_page()


PAGE = """\
# Results

What the suite found in each engine: a row for each profile, then one for each requirement, in each
cell the worst outcome of its cases and how many of them passed. A cell of a requirement opens: each
failure has its reason and the line that replays it, in the folder `conformance/`, once `make
engines` has made the environments of the engines. Made by `make results`; not edited by hand.

| cell | means |
|---|---|
| *empty* | not asked: the adapter does not claim the profile of these cases |
| PASS | all of them passed |
| FAIL | an answer was wrong |
| CRASH, TIMEOUT | no answer came |
| ADAPTER-ERROR | the adapter broke its contract |
| BLOCKED | not judged: the *basic case* of the requirement named, which is needed, has failed |
| UNSUPPORTED | not judged: the adapter says what the engine lacks that the cases use |

`model` is no engine, but the Python of the spec itself, from which the expected values come.
`numpy-naive` is a small engine in NumPy, written from the prose of the spec without that code, so
that the values have two producers. `datarax-reference` is the library of this project,
`datarax-pypi` are releases of the package `datarax` on PyPI.

"""


def page() -> str:
    """The matrix of all committed reports as a page of the docs."""
    reports = sorted(map(str, (HOME / "results").glob("*/report.json")))
    command = [sys.executable, "-m", "datarax_conformance", "matrix", *reports]
    paths = os.pathsep.join(filter(None, [str(HOME / "src"), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": paths}
    table = subprocess.run(
        command, env=environment, text=True, encoding="utf-8", check=True, stdout=subprocess.PIPE
    )
    return PAGE + table.stdout


def write_page() -> int:
    (HOME.parent / "docs" / "conformance" / "results.md").write_text(page(), encoding="utf-8")
    return 0


def check(names: list[str]) -> int:
    found = []
    # Two at a time: one waits for its engine to start while the other computes.
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        made_again = functools.partial(compared, pathlib.Path(folder))
        for name, verdict in zip(names, pool.map(made_again, names), strict=True):
            print(f"{name}: {verdict}", flush=True)
            found.append(verdict)
    return int(DIFFERENT in found)


DIFFERENT = "differs from conformance/results"


def compared(folder: pathlib.Path, name: str) -> str:
    """Makes an engine's report again. Returns whether it equals the one committed, in words."""
    try:
        make(name)
    except (SystemExit, subprocess.CalledProcessError) as error:
        return f"not checked, since it cannot be installed here: {error}"
    run(name, folder / name)
    old, new = (place / name / "report.json" for place in (HOME / "results", folder))
    same = old.exists() and new.exists() and without_traces(old) == without_traces(new)
    return "as committed" if same else DIFFERENT


def without_traces(path: pathlib.Path) -> str:
    """The report without the lines of code that failed, which differ between releases of Python."""
    report = json.loads(path.read_text(encoding="utf-8"))
    for entry in report["verdicts"]:
        entry.pop("trace", None)
    return json.dumps(report)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["make", "results", "page", "check", "requirements"])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ENGINES))
    args = parser.parse_args()
    if unknown := set(args.names) - set(ENGINES):
        raise SystemExit(f"There is no engine {sorted(unknown)}; there are {', '.join(ENGINES)}.")
    if args.what == "make":
        for name in args.names or ENGINES:
            make(name)
        return 0
    if args.what == "requirements":
        for name in args.names or ENGINES:
            print(*ENGINES[name].get("requirements", []), sep="\n")
        return 0
    if args.what == "page":
        return write_page()
    if args.what == "results":
        return results(args.names or list(ENGINES))
    quick = [
        name
        for name, engine in ENGINES.items()
        if "requirements" not in engine or engine.get("quick")
    ]
    return check(args.names or quick)


if __name__ == "__main__":
    sys.exit(main())
