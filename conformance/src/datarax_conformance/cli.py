"""The command `datarax-conformance`."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import pathlib
import shlex
import signal
import sys
from collections.abc import Sequence

from . import report
from .api import arguments_of, run_conformance
from .case import stored_cases
from .files import expected_failures, load_report
from .requirements import requirements

ENDS = """\
exit code:
  0    all that was judged holds
  1    a case is FAIL, CRASH, TIMEOUT, ADAPTER-ERROR or XPASS, no case of a claimed profile
       passes, or no case was judged
  2    no verdict: a wrong argument or file, or an adapter that no case can run on
  130  ended by Ctrl-C (143 by SIGTERM)

The last line is the digest of the names and outcomes of all cases: two runs with the same digest
gave the same verdicts."""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="datarax-conformance", description="Check a pipeline engine against the spec."
    )
    commands = top.add_subparsers(dest="command", required=True)

    run = commands.add_parser(
        "run",
        help="run the cases on an engine and give a verdict",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=ENDS,
    )
    run.add_argument(
        "adapter",
        help="`module:Class` or `file.py:Class`, run in a process of its own;"
        " with --exec: any name, for the report",
    )
    run.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="NAME",
        help="only this case, requirement, profile, or JSON file of a case; may be repeated",
    )
    run.add_argument(
        "--exec",
        metavar="COMMAND",
        help="the engine is this command, which speaks the protocol on its standard streams",
    )
    run.add_argument(
        "--python", default=sys.executable, help="the interpreter to run the adapter in"
    )
    run.add_argument(
        "--in-process", action="store_true", help="run the adapter in this process, for a debugger"
    )
    run.add_argument(
        "--expected-failures",
        type=pathlib.Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a JSON list of failures that you know; may be repeated",
    )
    run.add_argument(
        "--timeout", type=float, default=120.0, help="seconds for a case (default: 120)"
    )
    run.add_argument("--jobs", type=int, default=1, help="processes at a time (default: 1)")
    run.add_argument("--shuffle", type=int, metavar="SEED", help="run the cases in a random order")
    run.add_argument(
        "--out",
        type=pathlib.Path,
        metavar="FOLDER",
        help="write report.json, junit.xml, badge.svg, faults/",
    )
    run.set_defaults(do=do_run)

    listing = commands.add_parser("list", help="list the stored cases")
    listing.set_defaults(do=do_list)

    matrix = commands.add_parser("matrix", help="print several reports as one HTML table")
    matrix.add_argument(
        "reports", nargs="+", type=pathlib.Path, help="files report.json that `run --out` wrote"
    )
    matrix.set_defaults(do=do_matrix)

    template = commands.add_parser("new", help="write an adapter to start from")
    template.add_argument("file", type=pathlib.Path, help="a file that does not exist yet")
    template.set_defaults(do=do_new)

    cases = commands.add_parser(
        "cases", help="for work on the suite: build or check the stored cases"
    )
    cases.add_argument("what", choices=["build", "check", "reread"])
    cases.add_argument("ids", nargs="*")
    cases.set_defaults(do=do_cases)

    trace = commands.add_parser("trace", help="find requirements that no case or no mutant checks")
    trace.add_argument("--strict", action="store_true", help="fail on any gap")
    trace.set_defaults(do=do_trace)

    mutants = commands.add_parser(
        "mutants", help="break the model in every known way: does the suite notice?"
    )
    mutants.add_argument("--strict", action="store_true", help="fail if one goes unnoticed")
    mutants.add_argument("--only", default="", help="mutants whose name contains this")
    mutants.set_defaults(do=do_mutants)

    goals = commands.add_parser(
        "goals", help="check the goals of the suite, a line and a figure each"
    )
    goals.add_argument("numbers", nargs="*", type=int, help="only these goals")
    goals.set_defaults(do=do_goals)

    explore = commands.add_parser("explore", help="search for failing cases with Hypothesis")
    explore.add_argument("adapter", help="`module:Class` or `file.py:Class`")
    explore.add_argument("--examples", type=int, default=200)
    explore.set_defaults(do=do_explore)
    return top


def do_run(args: argparse.Namespace) -> int:
    known, today = stored_cases(), datetime.date.today()
    expected = [x for path in args.expected_failures for x in expected_failures(path, known, today)]
    adapter, command = args.adapter, shlex.split(args.exec or "")
    if args.exec is not None and not command:
        raise ValueError("--exec needs a command, got an empty one.")
    replay = arguments_of(adapter, args.python, command)
    if args.in_process:
        from .adapter import load_adapter

        adapter = load_adapter(adapter)
        replay += " --in-process"
    result = run_conformance(
        adapter,
        only=args.case,
        expected=expected,
        timeout=args.timeout,
        jobs=args.jobs,
        shuffle=args.shuffle,
        python=args.python,
        command=command,
        replay=replay,
    )
    if args.out:
        report.write_report(result, args.out)
    print(report.to_text(result))
    return int(report.failed(result))


def do_list(args: argparse.Namespace) -> int:
    for case in stored_cases():
        print(f"{case.id:32} {','.join(case.profiles):40} {case.title}")
    return 0


def do_matrix(args: argparse.Namespace) -> int:
    print(report.to_html([load_report(path) for path in args.reports]))
    return 0


def do_new(args: argparse.Namespace) -> int:
    text = (pathlib.Path(__file__).parent / "template_adapter.py").read_text(encoding="utf-8")
    with args.file.open("x", encoding="utf-8") as file:
        file.write(text)
    print(f"datarax-conformance run {args.file}:Adapter")
    return 0


def do_cases(args: argparse.Namespace) -> int:
    from . import casebook

    if args.what == "build":
        print(f"{casebook.build()} cases")
    elif args.what == "reread":
        unknown = [name for name in args.ids if name not in requirements()]
        if unknown or not args.ids:
            raise ValueError(f"`cases reread` takes ids of requirements, got {unknown or 'none'}.")
        print(f"{casebook.reread(args.ids)} cases read again")
    else:
        return show(casebook.faults(), f"{len(stored_cases())} cases")
    return 0


def show(faults: Sequence[str], what: str) -> int:
    print(*faults, f"{what}, {len(faults)} faults", sep="\n")
    return int(bool(faults))


def do_trace(args: argparse.Namespace) -> int:
    from .trace import gaps

    found = gaps()
    return (
        show(found, f"{len(requirements())} requirements")
        if args.strict
        else show(found, "gaps") * 0
    )


def do_mutants(args: argparse.Namespace) -> int:
    from .mutants import check

    return check(strict=args.strict, only=args.only)


def do_goals(args: argparse.Namespace) -> int:
    from .goals import main as goals

    return goals(args.numbers)


def do_explore(args: argparse.Namespace) -> int:
    from .explore import explore

    return explore(args.adapter, args.examples)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an engine's texts may hold anything
    with contextlib.suppress(ValueError):  # not the main thread
        # The engines are in sessions of their own: who ends the run must let it end them.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return args.do(args)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (ValueError, OSError) as exc:
        print(f"datarax-conformance: {exc}", file=sys.stderr)
        return 2
