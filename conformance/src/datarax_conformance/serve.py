"""The engine's end of the pipe: `python -m datarax_conformance.serve module:Class`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from .adapter import load_adapter
from .session import Session, frames, scrubbed, to_line


def serve(target: str, session: type[Session] = Session) -> None:
    """Answers actions from stdin for the adapter `target`. Output of the engine goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        answer = session(load_adapter(target)).execute
    except Exception as exc:
        cause = exc.__cause__ or exc
        fault = {"fault": scrubbed(": ".join([str(exc), *frames(cause, 1)]))}

        def answer(action: Mapping[str, Any]) -> dict[str, Any]:
            return fault

    for line in sys.stdin:
        answers.write(to_line(answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
