"""`python -m benchmarks cpu|gpu`: measures, writes the pages, prints the budget.

Exits with 1 where a budget is exceeded by more than the measured noise, or a benchmark failed.
"""

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("what", choices=["cpu", "gpu", "pages"])
    parser.add_argument("--seconds", type=float, default=1.0, help="about how long to time a row")
    parser.add_argument("--only", default="", metavar="EXPRESSION", help="as -k of pytest")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="write to build/benchmarks, and take the CPU where there is no GPU",
    )
    asked = parser.parse_args()
    if asked.what != "gpu":
        os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported

    from benchmarks import report

    folder = HERE.parents[1] / "build" / "benchmarks" if asked.dry_run else report.PAGES
    folder.mkdir(parents=True, exist_ok=True)
    if asked.what == "pages":
        report.write(folder)
        return 0
    return measure(asked.what, asked, folder)


def measure(device: str, asked: argparse.Namespace, folder: Path) -> int:
    import jax
    import pytest
    from benchmarks import report

    if device == "gpu" and jax.default_backend() != "gpu" and not asked.dry_run:
        print(
            "JAX finds no GPU here: install a build of it that does, jax[cuda12] say, "
            "or see that all of this runs with --dry-run.",
            file=sys.stderr,
        )
        return 2
    figures = folder / f"{device}.json"
    arguments = ["-c", str(HERE / "bench.ini"), str(HERE), "-k", asked.only, "-q"]
    failed = pytest.main([*arguments, f"--benchmark-json={figures}", f"--seconds={asked.seconds}"])
    if not figures.exists() or not figures.stat().st_size:
        return int(failed) or 1
    report.write(folder)
    exceeded = report.show(report.Run(figures))
    return int(bool(failed or exceeded))


if __name__ == "__main__":
    sys.exit(main())
