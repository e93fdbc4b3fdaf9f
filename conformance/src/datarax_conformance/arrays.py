"""Arrays as JSON: a readable list if small, base64 if large, a range if the values count up."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

READABLE = 1024  # elements
FAR = 2**24  # a range of more rows is not held in memory


class Range:
    """The column 0, 1, 2, ... without the memory: it can be indexed, but is no array."""

    ndim = 1

    def __init__(self, length: int, dtype: str):
        self.length, self.dtype, self.shape = length, np.dtype(dtype), (length,)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, records: Any) -> Any:
        if isinstance(records, slice):
            return np.arange(*records.indices(self.length), dtype=self.dtype)
        return np.asarray(records).astype(self.dtype)

    def __array__(self, *arguments: Any, **options: Any) -> np.ndarray:
        raise TypeError(f"a range of {self.length} records is not to be held in memory: index it")


# Matches the message of an exception that comes of using a `Range` as an array.
HELD = re.compile(r"not to be held in memory|'Range'|\barrays\.Range\b")


def is_held(exc: BaseException | None) -> bool:
    """Whether the engine failed because it wanted a `Range` in memory. Looks at the causes, too."""
    return exc is not None and (
        HELD.search(str(exc)) is not None or is_held(exc.__cause__ or exc.__context__)
    )


def encode(array: Any) -> dict[str, Any]:
    array = np.asarray(array)
    dtype = str(array.dtype)
    if array.dtype.kind in "OUS":
        kind = "U" if array.dtype.kind == "U" else "object"
        return {"dtype": kind, "shape": list(array.shape), "data": array.tolist()}
    if array.dtype.kind == "M":  # JSON has no dates: as the int64 that NumPy stores
        data = array.astype(np.int64).ravel().tolist()
        return {"dtype": dtype, "shape": list(array.shape), "data": data}
    if array.size <= READABLE and np.isfinite(array).all():  # JSON has no inf and NaN
        return {"dtype": dtype, "shape": list(array.shape), "data": array.ravel().tolist()}
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return {
        "dtype": dtype,
        "shape": list(array.shape),
        "base64": base64.b64encode(little.tobytes()).decode(),
    }


def canonical(answer: Any) -> Any:
    """An engine's answer, with each array written as `encode` writes it."""
    if isinstance(answer, list):
        return [canonical(part) for part in answer]
    if not isinstance(answer, dict):
        return answer
    if answer.keys() >= {"dtype", "shape"}:
        try:
            return encode(decode(answer)) if fits(answer) else answer
        except (KeyError, TypeError, ValueError, OverflowError):
            return answer  # NumPy does not know the dtype, say
    return {name: canonical(part) for name, part in answer.items()}


FITTING = {"b": "b", "i": "biu", "u": "biu"}
"""For kinds of dtypes, the kinds of numbers in JSON that fit; other dtypes take any numbers."""


def fits(data: Mapping[str, Any]) -> bool:
    """Whether the numbers fit their dtype: 1.5, for example, is not an integer."""
    kind = np.dtype(data["dtype"]).kind
    given = np.array(data.get("data", ()))
    return kind not in FITTING or not given.size or given.dtype.kind in FITTING[kind]


def unreadable(answer: Any, path: str = "") -> str | None:
    """The first array in an answer that cannot be read: where it stands, and why."""
    if isinstance(answer, list):
        parts = [(f"{path}[{i}]", part) for i, part in enumerate(answer)]
    elif not isinstance(answer, dict):
        return None
    elif answer.keys() >= {"dtype", "shape"}:
        try:
            decode(answer)
        except KeyError:
            return f"{path or 'value'}: an array has `data` or `base64`"
        except (TypeError, ValueError, OverflowError) as exc:
            return f"{path or 'value'}: {exc}"
        return None
    else:
        parts = [(f"{path}.{name}".lstrip("."), part) for name, part in answer.items()]
    return next((found for at, part in parts if (found := unreadable(part, at))), None)


def decode(data: Mapping[str, Any]) -> Any:
    """The array of `{"dtype", "shape", "data" | "base64"}`. `{"dtype", "range": n}` is 0 to n-1, as
    a `Range` if n is more than `FAR`."""
    if data.get("range", 0) > FAR:
        return Range(data["range"], data["dtype"])
    if "range" in data:
        return np.arange(data["range"], dtype=data["dtype"])
    dtype = np.dtype(data["dtype"])
    if "base64" in data:
        raw = base64.b64decode(data["base64"], validate=True)
        flat = np.frombuffer(raw, dtype=dtype.newbyteorder("<"))
        return flat.astype(dtype).reshape(data["shape"])
    return np.array(data["data"], dtype=dtype).reshape(data["shape"])
