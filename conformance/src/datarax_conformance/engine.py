"""Runs an engine in this process, or in another one that may hang, crash or answer nonsense."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TextIO

from .adapter import Adapter
from .arrays import canonical
from .session import Session, scrubbed, to_line


class Lost(Exception):
    """The engine gave no answer. `outcome` is the verdict in the report."""

    def __init__(self, outcome: str, message: str, trace: str = ""):
        super().__init__(message)
        self.outcome, self.trace = outcome, trace


class Engine(Protocol):
    def execute(self, action: Mapping[str, Any], timeout: float) -> dict[str, Any]: ...
    def check_silent(self) -> None: ...
    def restart(self) -> None: ...
    def close(self) -> None: ...


class Local:
    """An adapter in this process. It has no timeout: if the engine hangs, the run hangs.

    It cannot restart in another process, either. With `same_anywhere` the adapter is known to
    behave the same in any process, so that a new session here will do.
    """

    def __init__(self, adapter: Adapter, same_anywhere: bool = False):
        self.adapter, self.same_anywhere = adapter, same_anywhere
        self.session = Session(adapter)

    def restart(self) -> None:
        if not self.same_anywhere:
            raise Lost(
                "UNSUPPORTED",
                "needs another process: name the adapter, as `module:Class` or `file.py:Class`",
            )
        self.session = Session(self.adapter)

    def execute(self, action: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        del timeout
        try:
            answer = self.session.execute(action)
        except SystemExit as exc:  # it would end the run, with whatever code
            message = f"the engine exits with {exc.code!r} at {action['do']!r}"
            raise Lost("CRASH", message) from exc
        return received(to_line(answer))

    def check_silent(self) -> None:
        pass

    def close(self) -> None:
        pass


SHARED = "DATARAX_CONFORMANCE_SHARED"
"""The environment variable for a folder that the processes of one run share: a compilation cache,
say."""


LAST_WORDS = 5.0
"""Seconds that a process may take to exit after it has closed its output."""


DEEP = 64  # lists and objects within one another; an answer has no use for more

# Half of a pair of surrogates, or a whole pair. JSON can hold half a pair, UTF-8 cannot.
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def received(line: str) -> dict[str, Any]:
    """The answer in a line, for the runner to compare and to report."""
    try:
        line.encode()  # fails where a byte was no UTF-8
        answer = json.loads(line)
    except RecursionError:
        raise Lost("ADAPTER-ERROR", f"nested too deep: {line[:100]!r}") from None
    except ValueError:
        raise Lost("ADAPTER-ERROR", f"not a line of JSON in UTF-8: {line[:100]!r}") from None
    if depth(answer) > DEEP:
        raise Lost("ADAPTER-ERROR", f"nested too deep: {line[:100]!r}")
    if fault := no_answer(answer):
        raise Lost("ADAPTER-ERROR", f"{fault}: {line[:100]!r}")
    if SURROGATE.search(line):
        answer = json.loads(json.dumps(answer, ensure_ascii=False).encode(errors="replace"))
    return canonical(answer)


def depth(value: Any) -> int:
    """How many lists and objects stand within one another, at most. Does not recurse."""
    count, level = 0, [value]
    while level := [part for part in level if isinstance(part, dict | list)]:
        count += 1
        level = [x for part in level for x in (part.values() if isinstance(part, dict) else part)]
    return count


def no_answer(answer: Any) -> str | None:
    """Why a JSON value is not an answer, or None."""
    if not isinstance(answer, dict):
        return "not an answer"
    if "error" not in answer:
        said = "value" in answer or isinstance(answer.get("fault"), str)
        return None if said else "not an answer, as it has no `value`, `error` or `fault`"
    error = answer["error"]
    if not isinstance(error, dict):
        return "not an answer, as its `error` is no object"
    if missing := [x for x in ("code", "details", "type", "message") if x not in error]:
        return f"not an answer, as its `error` has no {', '.join(f'`{x}`' for x in missing)}"
    if not isinstance(error["details"], dict):
        return "not an answer, as the `details` of its `error` are no object"
    return None


def write(pipe: TextIO, lines: queue.Queue[str | None]) -> None:
    """Writes the lines up to None. If the process has ended, `read` notices it."""
    with contextlib.suppress(OSError), pipe:
        for line in iter(lines.get, None):
            pipe.write(line)
            pipe.flush()


def read(pipe: TextIO, lines: queue.Queue[str | None]) -> None:
    """Puts what is read into `lines`, and None at the end."""
    with pipe:
        for line in pipe:
            lines.put(line)
    lines.put(None)


class LastWords:
    """Passes the standard error of a process on as it comes, and keeps its last lines."""

    def __init__(self, pipe: Any):
        self.pipe, self.last = pipe, b""
        self.thread = threading.Thread(target=self.pass_on, daemon=True)
        self.thread.start()

    def pass_on(self) -> None:
        with self.pipe:
            while said := self.pipe.buffer.read1():
                self.last = (self.last + said)[-4000:]
                with contextlib.suppress(OSError):
                    os.write(2, said)

    def text(self) -> str:
        """The last lines of a process that has ended, or has closed its output."""
        self.thread.join(timeout=1)
        lines = self.last.decode(errors="replace").splitlines()
        return "\n".join(scrubbed(line) for line in lines[-5:])


def kill(process: subprocess.Popen[str]) -> None:
    """Kills a process and its group, also if the process itself has ended before."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, ProcessLookupError, PermissionError):
        process.kill()  # no groups on this platform, or nobody left in this one
    process.wait()


class Piped:
    """A process that reads one action per line and writes one answer per line."""

    def __init__(self, command: Sequence[str], shared: str | None = None):
        self.command = list(command)
        self.environment = {**os.environ} if shared is None else {**os.environ, SHARED: shared}
        self.process: subprocess.Popen[str] | None = None

    def restart(self) -> None:
        self.close()

    def _start(self) -> subprocess.Popen[str]:
        try:
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=self.environment,
                text=True,
                encoding="utf-8",
                errors="surrogateescape",  # so that the reader survives; `_ask` rejects it
                start_new_session=True,  # so that `close` can end its children, too
            )
        except OSError as exc:
            raise Lost("ADAPTER-ERROR", f"cannot start: {exc.strerror}") from exc
        self.actions, self.lines = queue.Queue[str | None](), queue.Queue[str | None]()
        # In threads, each with a pipe of its own, which it also closes: a read or a write blocks
        # for as long as anything holds the other end, and a `close` would wait for it.
        for target, pipe, lines in (
            (write, process.stdin, self.actions),
            (read, process.stdout, self.lines),
        ):
            threading.Thread(target=target, args=(pipe, lines), daemon=True).start()
        self.words = LastWords(process.stderr)
        return process

    def execute(self, action: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        try:
            return self._ask(action, timeout)
        except Lost:
            self.close()
            raise

    def check_silent(self) -> None:
        """Raises if the process has written a line that answers no action."""
        if self.process is None or self.lines.empty():
            return
        line = self.lines.get()
        if line is None:
            self.lines.put(None)  # it has ended, which the next action will find
            return
        self.close()
        raise Lost("ADAPTER-ERROR", f"a line that no action asked for: {line[:100]!r}")

    def _ask(self, action: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        self.check_silent()
        if self.process is None:
            self.process = self._start()
        process = self.process
        self.actions.put(json.dumps(action) + "\n")
        try:
            line = self.lines.get(timeout=timeout)
        except queue.Empty:
            if process.poll() is None:
                raise Lost("TIMEOUT", f"no answer to {action['do']!r} in time") from None
            line = None  # it has ended, but something that it started holds its output
        if line is None:
            try:
                how = f"ended with code {process.wait(timeout=LAST_WORDS)}"
            except subprocess.TimeoutExpired:
                how = "closed its standard output"
            raise Lost("CRASH", f"the process {how} at {action['do']!r}", self.words.text())
        return received(line)

    def close(self) -> None:
        """Ends the process and what it has started. Ctrl-C in the terminal does not reach them,
        since they have a session of their own."""
        if self.process is not None:
            kill(self.process)
            self.actions.put(None)
            self.process = None


def serve_command(target: str, python: str = sys.executable) -> list[str]:
    return [python, "-m", "datarax_conformance.serve", target]
