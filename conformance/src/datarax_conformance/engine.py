"""Runs an engine in this process, or in another one that may hang, crash or answer nonsense."""

from __future__ import annotations

import contextlib
import json
import os
import queue
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

    def _ask(self, action: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        if self.process is None:
            self.process = self._start()
        assert self.process.stdin is not None
        # In a thread, since the write blocks once the pipe is full and the process does not read.
        line_out = json.dumps(action) + "\n"
        threading.Thread(target=self._write, args=(self.process, line_out), daemon=True).start()
        try:
            line = self.lines.get(timeout=timeout)
        except queue.Empty:
            raise Lost("TIMEOUT", f"no answer to {action['do']!r} within {timeout:g} s") from None
        if line is None:
            try:
                how = f"ended with code {self.process.wait(timeout=LAST_WORDS)}"
            except subprocess.TimeoutExpired:
                how = "closed its standard output"
            raise Lost("CRASH", f"the process {how} at {action['do']!r}")
        try:
            line.encode()  # fails where a byte was no UTF-8
            answer = json.loads(line)
        except ValueError:
            raise Lost("ADAPTER-ERROR", f"not a line of JSON in UTF-8: {line[:100]!r}") from None
        if not is_answer(answer):
            raise Lost("ADAPTER-ERROR", f"not an answer: {line[:100]!r}")
        return canonical(answer)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
            self.process = None


def serve_command(target: str, python: str = sys.executable) -> list[str]:
    return [python, "-m", "datarax_conformance.serve", target]
