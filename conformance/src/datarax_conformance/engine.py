"""Runs an engine in this process, or in another one that may hang, crash or answer nonsense."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from .adapter import Adapter
from .arrays import canonical
from .session import Session


class Lost(Exception):
    """The engine gave no answer. `outcome` is the verdict in the report."""

    def __init__(self, outcome: str, message: str):
        super().__init__(message)
        self.outcome = outcome


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
        return self.session.execute(action)

    def check_silent(self) -> None:
        pass

    def close(self) -> None:
        pass


SHARED = "DATARAX_CONFORMANCE_SHARED"
"""The environment variable for a folder that the processes of one run share: a compilation cache,
say."""


LAST_WORDS = 5.0
"""Seconds that a process may take to exit after it has closed its output."""


def is_answer(answer: Any) -> bool:
    if not isinstance(answer, dict):
        return False
    if "error" in answer:
        error = answer["error"]
        said = isinstance(error, dict) and error.keys() >= {"code", "details", "type", "message"}
        return said and isinstance(error["details"], dict)
    return "value" in answer or isinstance(answer.get("fault"), str)


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
                env=self.environment,
                text=True,
                encoding="utf-8",
                errors="surrogateescape",  # so that the reader survives; `_ask` rejects it
                start_new_session=True,  # so that `close` can end its children, too
            )
        except OSError as exc:
            raise Lost("ADAPTER-ERROR", f"cannot start: {exc.strerror}") from exc
        self.lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=self._read, args=(process, self.lines), daemon=True)
        reader.start()
        return process

    @staticmethod
    def _write(process: subprocess.Popen[str], line: str) -> None:
        assert process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # `_read` notices that it ended
            process.stdin.write(line)
            process.stdin.flush()

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
        assert process.stdout is not None
        with contextlib.suppress(ValueError):  # `close` closed the pipe
            for line in process.stdout:
                lines.put(line)
        lines.put(None)

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
        assert self.process.stdin is not None
        # In a thread, since the write blocks once the pipe is full and the process does not read.
        line_out = json.dumps(action) + "\n"
        threading.Thread(target=self._write, args=(self.process, line_out), daemon=True).start()
        try:
            line = self.lines.get(timeout=timeout)
        except queue.Empty:
            if self.process.poll() is None:
                raise Lost("TIMEOUT", f"no answer to {action['do']!r} in time") from None
            line = None  # the process has ended, but a child of it holds its output open
        if line is None:
            try:
                how = f"ended with code {self.process.wait(timeout=LAST_WORDS)}"
            except subprocess.TimeoutExpired:
                how = "closed its standard output"
            raise Lost("CRASH", f"the process {how} at {action['do']!r}")
        try:
            line.encode()  # fails where a byte was no UTF-8
            answer = canonical(json.loads(line))
        except (ValueError, RecursionError):
            raise Lost("ADAPTER-ERROR", f"not a line of JSON in UTF-8: {line[:100]!r}") from None
        if not is_answer(answer):
            raise Lost("ADAPTER-ERROR", f"not an answer: {line[:100]!r}")
        return answer

    def close(self) -> None:
        if self.process is None:
            return
        process, self.process = self.process, None
        _kill(process)
        process.wait()
        # In a thread, since it waits for the reader, which a process that has left the session of
        # this one may keep waiting.
        closing = threading.Thread(target=_close_pipes, args=(process,), daemon=True)
        closing.start()
        closing.join(LAST_WORDS)


def _kill(process: subprocess.Popen[str]) -> None:
    """Kills a process that leads a session, and its children."""
    if not hasattr(os, "killpg"):  # Windows
        process.kill()
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)


def _close_pipes(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            pipe.close()  # type: ignore[union-attr]


def serve_command(target: str, python: str = sys.executable) -> list[str]:
    return [python, "-m", "datarax_conformance.serve", target]
