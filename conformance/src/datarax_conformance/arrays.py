"""Arrays as JSON: readable while small, base64 when large, a rule when regular."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

READABLE = 1024  # elements


def encode(array: Any) -> dict[str, Any]:
    array = np.asarray(array)
    dtype = str(array.dtype)
    if array.dtype.kind in "OUS":
        return {"dtype": "object", "shape": list(array.shape), "data": array.tolist()}
    if array.size <= READABLE:
        return {"dtype": dtype, "shape": list(array.shape), "data": array.ravel().tolist()}
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return {
        "dtype": dtype,
        "shape": list(array.shape),
        "base64": base64.b64encode(little.tobytes()).decode(),
    }


def decode(data: Mapping[str, Any]) -> np.ndarray:
    """The array of `{"dtype", "shape", "data" | "base64"}`; `{"dtype", "range": n}` is 0 to n-1."""
    if "range" in data:
        return np.arange(data["range"], dtype=data["dtype"])
    dtype = np.dtype(data["dtype"])
    if "base64" in data:
        flat = np.frombuffer(base64.b64decode(data["base64"]), dtype=dtype.newbyteorder("<"))
        return flat.astype(dtype).reshape(data["shape"])
    return np.array(data["data"], dtype=dtype).reshape(data["shape"])
