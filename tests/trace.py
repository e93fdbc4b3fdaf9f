"""Ties the requirements of `spec/` to the tests: `make trace`.

Fails on a requirement that no test cites, on a test that cites none (unless it is marked
`internal`), and on a cited id that is not in the spec.
"""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


class Collected:
    """A pytest plugin that keeps which ids each collected test cites."""

    def __init__(self):
        self.cited: set[str] = set()
        self.citing_none: set[str] = set()
        self.tests = 0

    def pytest_collection_finish(self, session: pytest.Session):
        self.tests = len(session.items)
        for item in session.items:
            ids = [id for mark in item.iter_markers("spec") for id in mark.args]
            self.cited.update(ids)
            if not ids and not item.get_closest_marker("internal"):
                self.citing_none.add(item.nodeid.partition("[")[0])


def main() -> int:
    collected = Collected()
    quiet = ["--collect-only", "-qq", "--no-header", "-p", "no:terminalreporter"]
    status = pytest.main([*quiet, str(ROOT / "tests")], plugins=[collected])
    if status != pytest.ExitCode.OK:
        print(f"The tests could not be collected (pytest: {status!r}); run `make test`.")
        return 1

    requirements = json.loads((ROOT / "spec" / "requirements.lock.json").read_text())
    # A MAY forbids nothing, so no test can fail for it.
    binding = {id for id, entry in requirements.items() if entry["level"] != "MAY"}
    findings = {
        "Requirements that no test cites": sorted(binding - collected.cited),
        "Tests that cite no requirement": sorted(collected.citing_none),
        "Ids that tests cite and the spec does not have": sorted(collected.cited - {*requirements}),
    }
    for title, entries in findings.items():
        if entries:
            print(f"{title}:", *entries, sep="\n  ")
    print(
        f"{len(binding)} requirements, {len(binding & collected.cited)} of them cited by tests;"
        f" {collected.tests} tests, {len(collected.citing_none)} without a requirement."
    )
    return int(any(findings.values()))


if __name__ == "__main__":
    sys.exit(main())
