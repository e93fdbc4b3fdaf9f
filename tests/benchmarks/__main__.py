"""`python -m benchmarks cpu|gpu|engines|pages`: measures, writes the pages, prints the verdicts.

Exits with 1 where a budget or a target is missed by more than the measured noise, or a benchmark
has failed.
"""

import argparse
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("what", choices=["cpu", "gpu", "engines", "pages"])
    parser.add_argument("--seconds", type=float, default=1.0, help="about how long to time a row")
    parser.add_argument("--only", default="", metavar="EXPRESSION", help="as -k of pytest")
    parser.add_argument("--rounds", type=int, default=15, help="epochs of each engine")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="write to build/benchmarks, and take the CPU where there is no GPU",
    )
    asked = parser.parse_args()
    if asked.what != "gpu":
        os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported

    from benchmarks import pages

    folder = HERE.parents[1] / "build" / "benchmarks" if asked.dry_run else pages.FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    failed = {"cpu": library, "gpu": library, "engines": engines}.get(asked.what)
    status = failed(asked, folder) if failed else 0
    pages.write(folder)
    return status


def library(asked: argparse.Namespace, folder: Path) -> int:
    """Compares the library with the same work by hand."""
    import jax
    import pytest
    from benchmarks import report

    if asked.what == "gpu" and jax.default_backend() != "gpu" and not asked.dry_run:
        sys.exit(
            "JAX finds no GPU here. Install a build of it that does, jax[cuda12] say, "
            "or see that all of this works with --dry-run."
        )
    figures = folder / f"{asked.what}.json"
    # Growth comes last: it compiles programs that the workloads must compile from scratch.
    files = [str(HERE / f"bench_{name}.py") for name in ("budget", "modes", "growth")]
    settings = ["-c", str(HERE / "bench.ini"), *files, "-q", "-k", asked.only]
    failed = pytest.main([*settings, f"--seconds={asked.seconds}", f"--benchmark-json={figures}"])
    if not figures.stat().st_size:
        sys.exit("Nothing was measured.")
    run = report.Run(figures)
    return int(
        bool(report.show(f"Budget, on {run.machine['device']}", report.lines(run)) or failed)
    )


def engines(asked: argparse.Namespace, folder: Path) -> int:
    """Compares the library with other engines."""
    from benchmarks import comparison, comparison_page, report

    figures = comparison.measure(asked.rounds, batches=1536)
    (folder / "engines.json").write_text(json.dumps(figures, indent=1) + "\n")
    return int(bool(report.show("Targets, beside other engines", comparison_page.lines(figures))))


if __name__ == "__main__":
    sys.exit(main())
