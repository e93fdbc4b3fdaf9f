"""Runs the actions of a case on an adapter, one at a time, in the engine's process.

Actions and answers are plain JSON, so a session is the same in this process and behind a pipe. The
answer is `{"value": …}`, `{"error": {"code", "details", "type", "message"}}` for an exception of
the engine, or `{"fault": text}` if the adapter itself broke its contract. An error may have a
`trace`: lines for the reader, that are never compared.
"""

from __future__ import annotations

import base64
import importlib
import json
import linecache
import pathlib
import random
import re
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from .adapter import Adapter, Program
from .arrays import encode, is_held
from .ops import Ops

NOT_SHOWN = (str(pathlib.Path(__file__).parent), str(pathlib.Path(importlib.__file__).parent))
NOT_SHOWN += ("<frozen",)
STOP = "stop"
IN_MEMORY = "in-memory"
"""The error code of an engine that holds its columns in memory, if they do not fit."""


class EngineError(Exception):
    """The engine did something wrong without raising an exception of its own."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class AdapterFault(Exception):
    """The adapter, not the engine, did something wrong."""


def scrubbed(text: str) -> str:
    """The text without paths and addresses, since reports are compared between machines."""
    text = re.sub(r"\b0x[0-9a-fA-F]+", "0x…", text)
    return re.sub(r"(?<![\w:])/(?:[\w.\-+]+/)+", "…/", text)[:600]


def frames(exc: BaseException, count: int = 3) -> list[str]:
    """The last frames of its traceback, but those of the suite and of `import`."""
    found = [
        (frame.f_code, line)
        for frame, line in traceback.walk_tb(exc.__traceback__)
        if not frame.f_code.co_filename.startswith(NOT_SHOWN)
    ]
    return [
        scrubbed(
            f"{code.co_filename}:{line} in {code.co_name}: "
            f"{linecache.getline(code.co_filename, line).strip()}"
        )
        for code, line in found[-count:]
    ]


def to_batch(batch: Any) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        raise EngineError(
            "not-a-batch", f"a batch is a mapping of arrays, got {type(batch).__name__}"
        )
    return {str(name): encode(batch[name]) for name in sorted(batch)}


FORMS: Mapping[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "text": bytes.decode,
    "dict": json.loads,
}


def edited(state: bytes, path: Sequence[Any], value: Any) -> bytes:
    data = json.loads(state)
    part = data
    for name in path[:-1]:
        part = part[name]
    if value is None:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return json.dumps(data).encode()


def answered(value: Any) -> Any:
    arrays = isinstance(value, Mapping) and any(hasattr(x, "shape") for x in value.values())
    return to_batch(value) if arrays else value


def to_line(answer: Mapping[str, Any]) -> str:
    """The answer as JSON, or the fault that it is none."""
    try:
        return json.dumps(answer)
    except (TypeError, ValueError, RecursionError) as exc:
        return json.dumps({"fault": scrubbed(f"an answer that JSON cannot hold: {exc}")})


class Session:
    def __init__(self, adapter: Adapter):
        self.adapter = adapter
        self.ops = Ops()

    def execute(self, action: Mapping[str, Any]) -> dict[str, Any]:
        arguments = {name: value for name, value in action.items() if name != "do"}
        method = getattr(self, f"do_{action['do']}", None)
        if method is None:
            return {"fault": f"no action is called {action['do']!r}"}
        try:
            return {"value": method(**arguments)}
        except AdapterFault as fault:
            return {"fault": str(fault)}
        except EngineError as exc:
            return {"error": {"code": exc.code, "details": {}, "type": "", "message": str(exc)}}
        except Exception as exc:
            return self._classified(exc)

    def _classified(self, exc: Exception) -> dict[str, Any]:
        try:
            answer = (IN_MEMORY, {}) if is_held(exc) else self.adapter.classify(exc)
        except Exception as fault:
            said = f"classify failed: {type(fault).__name__}: {fault}"
            return {"fault": scrubbed(": ".join([said, *frames(fault, 1)]))}
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], str)):
            return {"fault": scrubbed(f"classify returns (code, details), got {answer!r}")}
        code, details = answer
        try:
            details = json.loads(json.dumps(dict(details)))  # as they come through a pipe
        except (TypeError, ValueError):
            fault = f"classify returns details that JSON can hold, by name, got {details!r}"
            return {"fault": scrubbed(fault)}
        message = scrubbed(str(exc))
        return {
            "error": {
                "code": code,
                "details": details,
                "type": type(exc).__name__,
                "message": message,
                "trace": "\n".join(frames(exc)),
            }
        }

    # Actions. `on` names the stream or iterator; `to` and `hold` name what is kept for later.

    def do_hello(self) -> dict[str, Any]:
        adapter, claimed = self.adapter, self.adapter.capabilities
        return {
            "name": adapter.name,
            "version": adapter.version,
            "spec": adapter.spec,
            "capabilities": sorted(claimed) if isinstance(claimed, Set | list) else claimed,
            "limits": getattr(adapter, "limits", {}),
        }

    def do_begin(self, program: Mapping[str, Any]) -> None:
        self.program = dict(program)
        self.streams: dict[str, Any] = {}
        self.iterators: dict[str, Any] = {}
        self.states: dict[str, Any] = {}
        self.held: dict[str, Any] = {}
        self.columns: dict[str, Any] = {}
        self.patience = 0  # batches after which a loop counts as endless
        np.random.seed(0)
        random.seed(0)

    def do_build(self, to: str = "main", **changes: Any) -> None:
        program = Program.from_json({**self.program, **changes})
        self.columns[to] = program.columns
        rows = max((len(x) for x in program.columns.values() if np.ndim(x)), default=0)
        self.patience = max(self.patience, 10 + 3 * rows)
        self.streams[to] = self.adapter.build(program, self.ops)

    def do_step(self, on: str = "main", n: int = 1, hold: str = "") -> list[Any]:
        return self._batches((self.streams[on].step() for _ in range(n)), hold)

    def do_iter(self, on: str = "main", to: str = "it") -> None:
        self.iterators[to] = iter(self.streams[on])

    def do_next(self, on: str = "it", n: int = 1, hold: str = "") -> list[Any]:
        return self._batches((next(self.iterators[on], STOP) for _ in range(n)), hold)

    def do_for(self, on: str = "main", take: int | None = None, hold: str = "") -> list[Any]:
        """A loop over a stream, or over the rest of an iterator."""
        over = self.iterators[on] if on in self.iterators else self.streams[on]
        return self._batches(self._loop(over, take), hold)

    def _loop(self, stream: Any, take: int | None):
        for count, batch in enumerate(stream, 1):
            yield batch
            if count == take:
                return
            if count > self.patience:
                raise EngineError("endless", f"the iterator did not stop within {count} batches")

    def _batches(self, batches: Any, hold: str) -> list[Any]:
        # Encode each batch as it comes: the engine may overwrite it later.
        raw, seen = [], []
        for batch in batches:
            raw.append(batch)
            seen.append(STOP if isinstance(batch, str) else to_batch(batch))
        if hold:
            self.held[hold] = raw
        return seen

    def do_scan(self, length: int | None, on: str = "main", hold: str = "") -> dict[str, Any]:
        return self._batches([self.streams[on].scan(length)], hold)[0]

    def do_ask(self, what: str, on: str = "main", **arguments: Any) -> Any:
        """One of the questions of profile jax; an answer of arrays is encoded like a batch."""
        return answered(self.streams[on].ask(what, **arguments))

    def do_copy(self, how: str, to: str, on: str = "main") -> None:
        self.streams[to] = self.streams[on].copy(how)

    def do_overwrite(self, of: str = "main") -> None:
        """The user writes into the arrays that the stream was built from."""
        for column in self.columns[of].values():
            column[...] = 0

    def do_jit_step(self, on: str = "main", n: int = 1) -> list[Any]:
        return self._batches(self.streams[on].jit_steps(n), "")

    def do_grad(self, node: str, on: str = "main", **arguments: Any) -> dict[str, Any]:
        return to_batch(self.streams[on].grad(node, **arguments))

    def do_len(self, on: str = "main") -> int:
        return len(self.streams[on])

    def do_cursor(self, on: str = "main") -> list[int]:
        return [int(number) for number in self.streams[on].cursor]

    def do_seek(self, epoch: int, offset: int, on: str = "main") -> None:
        self.streams[on].seek(epoch=epoch, offset=offset)

    def do_reset(self, on: str = "main") -> None:
        self.streams[on].reset()

    def do_change(self, node: str, op: str, on: str = "main") -> None:
        self.streams[on].change(node, op)

    def do_replace(self, node: str, op: str, on: str = "main") -> None:
        self.streams[on].replace(node, op)

    def do_save(self, to: str, on: str = "main", way: str = "") -> dict[str, Any]:
        stream = self.streams[on]
        state = getattr(stream, f"save_{way}")() if way else stream.get_state()
        if not isinstance(state, bytes | bytearray | memoryview):
            raise AdapterFault(f"get_state returns bytes, got {type(state).__name__}")
        self.states[to] = state
        return {"base64": base64.b64encode(bytes(state)).decode()}

    def do_restore(
        self,
        origin: str,
        on: str = "main",
        base64_: str = "",
        way: str = "",
        form: str = "bytes",
        edit: Sequence[Any] = (),
    ) -> None:
        """`edit`: path and new value of one entry of a state that is JSON; None removes it."""
        state = self.states[origin] if origin in self.states else base64.b64decode(base64_)
        state = edited(bytes(state), *edit) if edit else bytes(state)
        stream = self.streams[on]
        if way:
            getattr(stream, f"load_{way}")(state)
        else:
            stream.set_state(FORMS[form](state))

    def do_threads(self, n: int, on: str = "main") -> list[Any]:
        """The batches of one iterator that `n` threads share until it stops, sorted by first id."""
        iterator, taken, failures = iter(self.streams[on]), [], []

        def take() -> None:
            try:
                while len(taken) < self.patience:
                    taken.append(next(iterator))
            except StopIteration:
                pass
            except Exception as exc:
                failures.append(exc)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            threads = [threading.Thread(target=take, daemon=True) for _ in range(n)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        if failures:
            raise failures[0]
        return self._batches(sorted(taken, key=lambda batch: int(np.asarray(batch["id"])[0])), "")

    def do_recall(self, hold: str) -> list[Any]:
        return self._batches(self.held[hold], "")

    def do_scribble(self, hold: str) -> None:
        """The user writes into the writable arrays of batches."""
        for batch in self.held[hold]:
            for array in batch.values():
                try:
                    # A mask is inverted: most of it is True already.
                    array[...] = ~array if np.asarray(array).dtype == bool else 1
                except (TypeError, ValueError):  # read-only
                    continue

    def do_columns(self, of: str = "main") -> dict[str, Any]:
        return to_batch(self.columns[of])

    def do_global_random(self) -> list[float]:
        """A draw from NumPy's and from Python's global generator, seeded when the case began."""
        return [float(np.random.random_sample()), random.random()]
