"""A report and its formats: JSON, JUnit, an HTML matrix, a badge and text."""

from __future__ import annotations

import hashlib
import html
import json
import pathlib
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from .adapter import PROFILES
from .case import stored_cases
from .requirements import requirements
from .runner import BAD, OUTCOMES, Run, Verdict
from .version import SPEC, VERSION

FORMAT = 1
LONG = 48  # a report cuts longer lists
NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
KINDS = {"PASS": "passed", "BLOCKED": "not judged", "UNSUPPORTED": "not judged"}
KINDS_SHOWN = ("failed", "passed", "not judged")
NOT_JUDGED = {"BLOCKED", "UNSUPPORTED"}
NO_CASE = "no case: each needs another profile too, which is not claimed"

Report = Mapping[str, Any]


def make_report(run: Run, verdicts: Sequence[Verdict], target: str) -> Report:
    """The report, without N/A verdicts: a new case of an unclaimed profile changes no report."""
    asked = {v.case.profiles[0] for v in verdicts} & set(run.identity["capabilities"])
    verdicts = sorted(
        (v for v in verdicts if v.outcome != "N/A"), key=lambda verdict: verdict.case.id
    )
    lines = "".join(f"{verdict.case.id} {verdict.outcome}\n" for verdict in verdicts)
    engine = {name: run.identity[name] for name in ("name", "version", "spec", "capabilities")}
    if run.identity.get("limits"):
        engine["limits"] = run.identity["limits"]
    profiles = {
        profile: count_outcomes(v for v in verdicts if v.case.profiles[0] == profile)
        for profile in PROFILES
    }
    return {
        "format": FORMAT,
        "suite": VERSION,
        "spec": SPEC,
        "engine": engine,
        "summary": count_outcomes(verdicts),
        "profiles": {p: counts for p, counts in profiles.items() if counts or p in asked},
        **({"partial": True} if is_partial(run) else {}),
        "digest": hashlib.sha256(lines.encode()).hexdigest(),
        "verdicts": [make_entry(verdict, target) for verdict in verdicts],
    }


def is_partial(run: Run) -> bool:
    """Whether the run has left out cases of the profiles that the engine claims."""
    claimed, ran = set(run.identity["capabilities"]), {case.id for case in run.cases}
    return any(case.id not in ran and claimed >= {*case.profiles} for case in stored_cases())


def count_outcomes(verdicts: Any) -> dict[str, int]:
    counts = Counter(verdict.outcome for verdict in verdicts)
    return {outcome: counts[outcome] for outcome in OUTCOMES if counts[outcome]}


def make_entry(verdict: Verdict, target: str) -> dict[str, Any]:
    case = verdict.case
    entry: dict[str, Any] = {"case": case.id, "cites": list(case.cites), "outcome": verdict.outcome}
    if verdict.outcome != "PASS":  # also one without words: a `fault` may be an empty text
        entry["reason"] = verdict.reason
    if verdict.trace:
        entry["trace"] = verdict.trace
    if verdict.outcome in (*BAD, "XFAIL"):
        requirement = requirements()[case.requirement]
        chosen = shlex.quote(case.file or case.id)
        shortest = case if verdict.action is None else case.until(verdict.action)
        entry |= {
            "title": case.title,
            "sentence": requirement.text,
            "link": requirement.place,
            "at": verdict.action,
            "expected": brief(verdict.expected),
            "got": brief(verdict.got),
            "minimal": shortest.to_json(),
            "replay": f"datarax-conformance run {target} --case {chosen}",
        }
    return entry


def brief(value: Any) -> Any:
    """`value` with long lists and texts cut short."""
    if isinstance(value, Mapping):
        return {name: brief(part) for name, part in value.items()}
    if isinstance(value, list) and len(value) > LONG:
        return [*map(brief, value[:LONG]), f"… {len(value) - LONG} more"]
    if isinstance(value, list):
        return [brief(part) for part in value]
    return value[:400] + "…" if isinstance(value, str) and len(value) > 400 else value


def failed(report: Report) -> bool:
    """Whether a case failed, or the run shows nothing of what is claimed."""
    return any(report["summary"].get(outcome) for outcome in BAD) or bool(nothing_shown(report))


def nothing_shown(report: Report) -> list[str]:
    """Sentences: no case was judged, or none of a claimed profile passed, though all were run."""
    said = []
    if not report["verdicts"]:
        said.append("no case was judged: those chosen are of profiles that are not claimed")
    elif not report["summary"].keys() - NOT_JUDGED:
        said.append("no case was judged")
    claimed = {*report["engine"]["capabilities"]}
    reported = {entry["case"] for entry in report["verdicts"]}
    missed = {
        case.profiles[0]
        for case in stored_cases()
        if claimed >= {*case.profiles} and case.id not in reported
    }
    # A failure has said so already.
    unproven = [p for p, counts in report["profiles"].items() if not {"PASS", *BAD} & {*counts}]
    return said + [
        f"none of the cases of {p} passed, which is claimed"
        for p in unproven
        if p in claimed - missed
    ]


def to_paragraph(entry: Mapping[str, Any]) -> str:
    """A failure in full: the case, the requirement, the deviation and how to replay it."""
    return (
        f"{entry['outcome']} {entry['case']} ({entry['title']})\n"
        f"  {', '.join(entry['cites'])}: {entry['sentence']}\n"
        f"  {entry['link']}\n"
        f"  {entry['reason']}\n"
        + "".join(f"    {line}\n" for line in entry.get("trace", "").splitlines())
        + f"  case:     {json.dumps(entry['minimal'], ensure_ascii=False)}\n"
        f"  expected: {json.dumps(entry['expected'], ensure_ascii=False)}\n"
        f"  got:      {json.dumps(entry['got'], ensure_ascii=False)}\n"
        f"  replay:   {entry['replay']}\n"
    )


def not_judged(entries: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[str]]:
    """The BLOCKED and UNSUPPORTED cases, by outcome and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        if entry["outcome"] in NOT_JUDGED:
            found.setdefault((entry["outcome"], entry["reason"]), []).append(entry["case"])
    return found


def to_text(report: Report) -> str:
    """The text for a terminal: the failures, the cases not judged and why, then the counts."""
    parts = [to_paragraph(entry) for entry in report["verdicts"] if "replay" in entry]
    engine = report["engine"]
    parts.append(
        f"{engine['name']} {engine['version']}, suite {report['suite']}, spec {report['spec']}"
    )
    parts += [
        f"{outcome}, {reason}: {', '.join(cases)}"
        for (outcome, reason), cases in not_judged(report["verdicts"]).items()
    ]
    width = max(map(len, report["profiles"]), default=0)
    for profile, counts in report["profiles"].items():
        parts.append(
            f"  {profile:{width}}  "
            + (", ".join(f"{n} {outcome}" for outcome, n in counts.items()) or NO_CASE)
        )
    if report.get("partial"):
        parts.append("a part of the cases only")
    parts += nothing_shown(report)
    parts.append(f"digest {report['digest'][:16]}")
    return "\n".join(parts)


def to_junit(report: Report) -> str:
    root = ElementTree.Element("testsuite", name=f"datarax-conformance {report['engine']['name']}")
    root.set("tests", str(len(report["verdicts"])))
    for entry in report["verdicts"]:
        case = ElementTree.SubElement(
            root, "testcase", classname=entry["cites"][0], name=entry["case"]
        )
        outcome, reason = entry["outcome"], entry.get("reason", "")
        if outcome in ("FAIL", "XPASS"):
            ElementTree.SubElement(case, "failure", message=reason).text = json.dumps(
                entry["minimal"]
            )
        elif outcome in BAD:
            error = ElementTree.SubElement(case, "error", message=reason, type=outcome)
            error.text = entry.get("trace")
        elif outcome != "PASS":
            ElementTree.SubElement(case, "skipped", message=f"{outcome}: {reason}")
    ElementTree.indent(root)
    return NOT_IN_XML.sub("\ufffd", ElementTree.tostring(root, encoding="unicode")) + "\n"


def to_badge(report: Report) -> str:
    """An SVG badge: how many of the claimed profiles passed all their cases."""
    claimed = [p for p in report["profiles"] if p in report["engine"]["capabilities"]]
    good = [p for p in claimed if set(report["profiles"][p]) == {"PASS"}]
    label, text = "datarax spec " + report["spec"], f"{len(good)}/{len(claimed)} profiles"
    colour = "#2e7d32" if claimed and good == claimed else "#b26a00"
    if report.get("partial"):
        text, colour = "partial run", "#757575"
    left, right = 7 * len(label) + 10, 7 * len(text) + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img">'
        f"<title>{label}: {text}</title>"
        f'<rect width="{left}" height="20" fill="#444"/>'
        f'<rect x="{left}" width="{right}" height="20" fill="{colour}"/>'
        '<g fill="#fff" font-family="Verdana,sans-serif" font-size="11">'
        f'<text x="5" y="14">{label}</text><text x="{left + 5}" y="14">{text}</text></g></svg>\n'
    )


def worst(outcomes: Sequence[str]) -> str:
    """The worst of several outcomes, for a cell of the matrix."""
    order = (
        "CRASH",
        "ADAPTER-ERROR",
        "TIMEOUT",
        "FAIL",
        "XPASS",
        "XFAIL",
        "BLOCKED",
        "UNSUPPORTED",
        "PASS",
        "N/A",
    )
    return min(outcomes, key=order.index)


def to_html(reports: Sequence[Report], link: str = "../../spec/") -> str:
    """The matrix: a table of profiles by engines, then one of requirements by engines.

    A cell shows its worst outcome and how many cases passed. A cell of a requirement opens to show
    each failure with its replay command.
    """
    out = ['<div class="conformance">', *_head("profile", reports)]
    for profile in (p for p in PROFILES if any(p in r["profiles"] for r in reports)):
        out.append(f"<tr><th>{profile}</th>")
        out += [_total(report["profiles"].get(profile, {})) for report in reports]
        out.append("</tr>")
    out += ["</tbody></table>\n", *_head("requirement", reports)]
    cells: list[dict[str, list[Mapping[str, Any]]]] = []
    for report in reports:
        rows: dict[str, list[Mapping[str, Any]]] = {}
        for entry in report["verdicts"]:
            rows.setdefault(entry["cites"][0].partition("@")[0], []).append(entry)
        cells.append(rows)
    for name, requirement in requirements().items():
        if not any(name in rows for rows in cells):
            continue
        place = link + requirement.place.replace(".md", "/")
        title = html.escape(requirement.text, quote=True)
        out.append(f'<tr id="{name}"><th><a href="{place}" title="{title}">{name}</a></th>')
        out += [_cell(rows.get(name, [])) for rows in cells]
        out.append("</tr>")
    out.append("</tbody></table></div>\n")
    return "\n".join(out)


def _head(corner: str, reports: Sequence[Report]) -> list[str]:
    engines = [
        f"<th>{html.escape(r['engine']['name'])}<br>{html.escape(r['engine']['version'])}"
        f"{'<br>partial run' if r.get('partial') else ''}</th>"
        for r in reports
    ]
    return ["<table>", f"<thead><tr><th>{corner}</th>", *engines, "</tr></thead>\n<tbody>"]


def _class(outcome: str) -> str:
    return outcome.lower().replace("/", "").replace("-", "")


def _total(counts: Mapping[str, int]) -> str:
    """The worst outcome of many cases, and how many passed."""
    if not counts:
        return "<td></td>"
    outcome = worst(list(counts))
    passed = f"{counts.get('PASS', 0)}/{sum(counts.values())}"
    return f'<td class="{_class(outcome)}">{outcome} {passed}</td>'


def _cell(entries: Sequence[Mapping[str, Any]]) -> str:
    """The worst outcome and how many cases passed. The cell opens to show how the others ended."""
    if not entries:
        return "<td></td>"
    outcome = worst([entry["outcome"] for entry in entries])
    if outcome == "PASS":
        return f'<td class="{_class(outcome)}">{outcome}</td>'
    ends = Counter(KINDS.get(entry["outcome"], "failed") for entry in entries)
    counts = ", ".join(f"{ends[kind]} {kind}" for kind in KINDS_SHOWN if ends[kind])
    items = f"<li>{counts}</li>"
    items += "".join(
        f"<li><b>{html.escape(entry['case'])}</b>: {html.escape(entry['reason'])}"
        f"<br><code>{html.escape(entry['replay'])}</code></li>"
        for entry in entries
        if "replay" in entry
    )
    items += "".join(
        f"<li>{kind}, {html.escape(reason)}: {html.escape(', '.join(cases))}</li>"
        for (kind, reason), cases in not_judged(entries).items()
    )
    summary = f"<summary>{html.escape(outcome)} {ends['passed']}/{len(entries)}</summary>"
    return f'<td class="{_class(outcome)}"><details>{summary}<ul>{items}</ul></details></td>'


def to_json(report: Report) -> str:
    return json.dumps(report, indent=1, ensure_ascii=False) + "\n"


def write_report(report: Report, folder: pathlib.Path) -> None:
    """`report.json`, `junit.xml`, `badge.svg`, and each failure as a case under `faults/`."""
    faults = folder / "faults"
    faults.mkdir(parents=True, exist_ok=True)
    for old in faults.glob("*.json"):
        old.unlink()
    for entry in report["verdicts"]:
        if "minimal" in entry:
            text = json.dumps(entry["minimal"], indent=1, ensure_ascii=False) + "\n"
            (faults / f"{entry['case']}.json").write_text(text, encoding="utf-8")
    if not any(faults.iterdir()):
        faults.rmdir()
    for name, text in (
        ("report.json", to_json(report)),
        ("junit.xml", to_junit(report)),
        ("badge.svg", to_badge(report)),
    ):
        (folder / name).write_text(text, encoding="utf-8")
