"""Compares an engine's answer with the expectation of a case: exactly, with dtype and shape.

An expectation is `{"value": …}`, where `"without"` names fields of the batches to ignore,
`{"error": code, "details": {…}, "says": {detail: [words]}}`, `{"check": name, …}`,
or `{"any": […]}` or `{"all": […]}` of expectations.
An action without an expectation expects no error.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .arrays import decode, encode

ANYTHING: Mapping[str, Any] = {"check": "no_error"}


def deviation(
    expect: Mapping[str, Any], answer: Mapping[str, Any], notes: Mapping[str, Any]
) -> str | None:
    """The deviation of `answer` from `expect`, in one line, or None.

    `notes` has earlier answers by name.
    """
    if "any" in expect:
        reasons = [deviation(choice, answer, notes) for choice in expect["any"]]
        return None if None in reasons else " or ".join(str(reason) for reason in reasons)
    if "all" in expect:
        return next(
            (reason for part in expect["all"] if (reason := deviation(part, answer, notes))), None
        )
    if "error" in expect:
        return _error_deviation(expect, answer)
    if "error" in answer:
        error = answer["error"]
        return f"raised {error['type'] or error['code']} ({error['code']}): {error['message']}"
    if "check" in expect:
        arguments = {name: value for name, value in expect.items() if name != "check"}
        if "like" in arguments:
            like = arguments["like"]
            arguments["like"] = [*notes.values()] if like == "*" else notes[like]
        check = CHECKS[expect["check"]]
        if check in BY_MASK and (reason := _mask_fault(answer["value"])):
            return reason
        return check(answer["value"], **arguments)
    return difference(expect["value"], without(answer["value"], expect.get("without", ())))


def without(batches: Any, fields: Sequence[str]) -> Any:
    """The batches without some of their fields."""
    if not fields:
        return batches
    return [x if x == "stop" else {k: v for k, v in x.items() if k not in fields} for x in batches]


# Codes of expected errors that are not in the spec. Only the runner gives `not-built`; `*` is any.
SAID = {"not-built": "that the program had been refused when it was built", "*": "an error"}


def _error_deviation(expect: Mapping[str, Any], answer: Mapping[str, Any]) -> str | None:
    code = expect["error"]
    wanted = f"expected {SAID.get(code, f'the error {code}')}"
    if "error" not in answer:
        return f"{wanted}, but nothing was raised"
    error = answer["error"]
    if code not in ("*", error["code"]):
        what = f"{error['type']}: {error['message']}"
        return f"{wanted}, got {error['code']} ({what})"
    details = expect.get("details", {})
    silent = (
        f"{name} does not say {word!r}, got {error['details'].get(name)!r}"
        for name, words in expect.get("says", {}).items()
        for word in words
        if word not in str(error["details"].get(name, ""))
    )
    return difference(details, {k: error["details"].get(k) for k in details}) or next(silent, None)


def difference(expected: Any, got: Any, path: str = "") -> str | None:
    """The first place where two JSON values differ."""
    if type(expected) is not type(got):
        return f"{path or 'value'}: expected {expected!r}, got {got!r}"
    if isinstance(expected, dict):
        if _are_floats(expected, got):
            return _float_difference(decode(expected), decode(got), path)
        if expected.keys() != got.keys():
            return f"{path or 'value'}: expected the names {sorted(expected)}, got {sorted(got)}"
        pairs = [(f"{path}.{name}".lstrip("."), expected[name], got[name]) for name in expected]
    elif isinstance(expected, list):
        if len(expected) != len(got):
            return f"{path or 'value'}: expected {len(expected)} items, got {len(got)}"
        pairs = [(f"{path}[{i}]", e, g) for i, (e, g) in enumerate(zip(expected, got, strict=True))]
    else:
        return None if expected == got else f"{path or 'value'}: expected {expected!r}, got {got!r}"
    return next((found for found in (difference(e, g, p) for p, e, g in pairs) if found), None)


def _are_floats(expected: Mapping[str, Any], got: Mapping[str, Any]) -> bool:
    """Whether both are arrays of floats of the same shape and dtype. These are compared as numbers,
    not as JSON: a NaN equals a NaN of any bit pattern, but 0.0 does not equal -0.0."""
    kinds = [(x.get("dtype"), x.get("shape")) for x in (expected, got)]
    return kinds[0] == kinds[1] and str(kinds[0][0]) in ("float16", "float32", "float64")


def _float_difference(expected: np.ndarray, got: np.ndarray, path: str) -> str | None:
    same = (expected == got) & (np.signbit(expected) == np.signbit(got))
    same |= np.isnan(expected) & np.isnan(got)
    if same.all():
        return None
    i = int(np.argmin(same))  # the first that differs
    was, is_now = expected.ravel()[i].item(), got.ravel()[i].item()
    return f"{path or 'value'}.data[{i}]: expected {was!r}, got {is_now!r}"


def batches_of(answer: Any) -> list[Mapping[str, Any]]:
    """The batches of an answer. The stacked batches of a scan count as one."""
    return [answer] if isinstance(answer, Mapping) else [b for b in answer if b != "stop"]


def rows(answer: Any, field: str, padding: bool = False) -> np.ndarray:
    """The rows of `field` of all batches, joined: those without padding, or only the padding."""
    axes = 2 if isinstance(answer, Mapping) else 1  # a scan stacks its batches along a first axis
    parts = []
    for batch in batches_of(answer):
        values = decode(batch[field])
        mask = decode(batch["mask"]) if "mask" in batch else np.ones(values.shape[:axes], bool)
        parts.append(values[~mask if padding else mask])
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _mask_fault(answer: Any) -> str | None:
    """Why the mask of a batch cannot say which rows are padding."""
    axes = 2 if isinstance(answer, Mapping) else 1
    for batch in batches_of(answer):
        if "mask" not in batch:
            continue
        mask = decode(batch["mask"])
        others = (decode(x).shape[:axes] for name, x in batch.items() if name != "mask")
        shape = next(others, mask.shape)
        if mask.dtype != bool or mask.shape != shape:
            return f"mask: expected bool{shape}, got {mask.dtype}{mask.shape}"
    return None


def _no_error(value: Any) -> None:
    del value


def _permutation(value: Any, length: int, sizes: Sequence[int] | None = None) -> str | None:
    if sizes is not None:
        got = [decode(batch["id"]).shape[0] for batch in batches_of(value)]
        if got != list(sizes):
            return f"expected batches of {list(sizes)} rows, got {got}"
    ids = rows(value, "id").astype(np.int64)
    outside = ids[~((ids >= 0) & (ids < length))]
    if outside.size:
        return f"record {outside[0]} is not one of the {length} records"
    counts = np.bincount(ids, minlength=length)
    missing, again = np.flatnonzero(counts == 0), np.flatnonzero(counts > 1)
    if missing.size or again.size:
        return (
            f"{missing.size} of {length} records never came (first: {missing[:3].tolist()}), "
            f"{again.size} came more than once (first: {again[:3].tolist()})"
        )
    return None


def _same_rows(value: Any, like: Any) -> str | None:
    batches = [*batches_of(value), *batches_of(like)]
    fields = sorted({name for batch in batches for name in batch} - {"mask"})
    for field in fields:
        expected, got = rows(like, field), rows(value, field)
        if expected.dtype != got.dtype or expected.shape != got.shape:
            return f"{field}: expected {expected.dtype}{expected.shape}, got {got.dtype}{got.shape}"
        pairs = enumerate(zip(expected.tolist(), got.tolist(), strict=True))
        if other := next(((row, was, now) for row, (was, now) in pairs if was != now), None):
            return "{}: row {} was {}, but is {}".format(field, *other)
    return None


def _rows_of(value: Any, columns: Mapping[str, Any]) -> str | None:
    """Each row equals the stored row with its id, and padding is zero."""
    stored = {name: decode(column) for name, column in columns.items()}
    places = {number: place for place, number in enumerate(stored["id"].tolist())}
    for batch in batches_of(value):
        if set(batch) - {"mask"} != set(stored):
            return f"expected the names {sorted(stored)}, got {sorted(set(batch) - {'mask'})}"
    records = [places.get(number) for number in rows(value, "id").tolist()]
    if not records or None in records:
        return f"expected rows of the columns, got the ids {rows(value, 'id').tolist()}"
    for name, column in stored.items():
        got, filling = rows(value, name), rows(value, name, padding=True)
        types = {column.dtype.name, column.dtype.name.replace("64", "32")}
        if got.dtype.name not in types or got.shape[1:] != column.shape[1:]:
            forms = [f"{x.dtype}{x.shape[1:]}" for x in (column, got)]
            return "{}: expected rows of {}, got {}".format(name, *forms)
        expected = encode(column.astype(got.dtype)[records])
        if reason := difference(expected, encode(got), f"{name} of the records {records}"):
            return reason
        if filling.any():
            return f"{name}: expected zeros for padding, got {filling.tolist()}"
    return None


def _same_order(value: Any, like: Any) -> str | None:
    return difference(rows(like, "id").tolist(), rows(value, "id").tolist())


def _other_order(value: Any, like: Any) -> str | None:
    expected, got = rows(like, "id"), rows(value, "id")
    return "the same records came in the same order" if np.array_equal(expected, got) else None


def _new_order(value: Any, like: Sequence[Any]) -> str | None:
    """The order of the records is none of those noted before."""
    got = rows(value, "id")
    known = (np.array_equal(rows(earlier, "id"), got) for earlier in like)
    return "the same records came in the same order as before" if any(known) else None


def _strangers(value: Any, steps: int, within: int, low: float, high: float) -> str | None:
    """Of the first `steps` steps from record to record, a share of `low` to `high` is shorter than
    `within`."""
    ids = rows(value, "id").astype(np.int64)[: steps + 1]
    share = float(np.mean(np.abs(np.diff(ids)) < within))
    if len(ids) == steps + 1 and low <= share <= high:
        return None
    return (
        f"{share:.1%} of {len(ids) - 1} steps lead less than {within} records away, "
        f"expected {low:.0%} to {high:.0%}"
    )


def _state_at_most(value: Any, most: int) -> str | None:
    got = len(base64.b64decode(value["base64"]))
    return None if got <= most else f"expected a state of at most {most} bytes, got {got}"


def _same(value: Any, like: Any) -> str | None:
    return difference(like, value)


def _mentions(value: Any, words: Sequence[str]) -> str | None:
    return next((f"{word!r} is not in {value!r}" for word in words if word not in value), None)


def _at_most(value: Any, most: float) -> str | None:
    return None if value <= most else f"expected at most {most}, got {value}"


def _at_least(value: Any, least: Mapping[str, float]) -> str | None:
    return next(
        (f"{name} is {value[name]}, expected {n} at least" for name, n in least.items()
         if not value[name] >= n),
        None,
    )  # fmt: skip


def _state_form(value: Any, form: Mapping[str, Any]) -> str | None:
    """The state is JSON with exactly these fields and values; "*" stands for any value."""
    try:
        state = json.loads(base64.b64decode(value["base64"]))
    except ValueError:
        return "the state is not JSON"
    return _form(form, state)


def _form(form: Any, got: Any) -> str | None:
    if not isinstance(form, dict):
        return None if form == "*" else difference(form, got)
    if not isinstance(got, dict) or got.keys() != form.keys():
        return f"expected the fields {sorted(form)}, got {got!r}"
    return next((found for name in form if (found := _form(form[name], got[name]))), None)


def _owners(ids: np.ndarray, begins: Sequence[int]) -> np.ndarray:
    """The index of each record's source. The records of the sources follow one another."""
    return np.searchsorted(begins, ids, side="right") - 1


def _shares(value: Any, begins: Sequence[int], quotas: Sequence[int]) -> str | None:
    """Every period of rows has the quota of each source."""
    owners = _owners(rows(value, "id"), begins)
    for start in range(0, len(owners), sum(quotas)):
        here = owners[start : start + sum(quotas)]
        got = [int((here == source).sum()) for source in range(len(quotas))]
        if got != list(quotas):
            return f"the period from row {start} on has {got} rows of the sources, not {quotas}"
    return None if len(owners) else "no rows came"


def _in_turn(value: Any, lengths: Sequence[int]) -> str | None:
    """The rows of each source come in stored order, and from the start again after the last."""
    ids = rows(value, "id").astype(np.int64)
    begins = [sum(lengths[:i]) for i in range(len(lengths))]
    owners = _owners(ids, begins)
    for source, (begin, length) in enumerate(zip(begins, lengths, strict=True)):
        got = ids[owners == source] - begin
        if not len(got) or not np.array_equal(got, np.arange(len(got)) % length):
            return f"the rows of source {source} came as {got.tolist()}"
    return None


def _few_blocks(value: Any, size: int, window: int) -> str | None:
    """The rows of a window of `window` blocks come from at most `window + 1` blocks."""
    ids = rows(value, "id")
    for start in range(0, len(ids), size * window):
        blocks = {int(i) // size for i in ids[start : start + size * window]}
        if len(blocks) > window + 1:
            return f"the window from row {start} on has rows of {len(blocks)} blocks"
    return None if len(ids) else "no rows came"


CHECKS: Mapping[str, Callable[..., str | None]] = {
    "no_error": _no_error,
    "permutation": _permutation,
    "same_rows": _same_rows,
    "rows_of": _rows_of,
    "same_order": _same_order,
    "other_order": _other_order,
    "new_order": _new_order,
    "strangers": _strangers,
    "state_at_most": _state_at_most,
    "same": _same,
    "mentions": _mentions,
    "at_most": _at_most,
    "at_least": _at_least,
    "state_form": _state_form,
    "shares": _shares,
    "in_turn": _in_turn,
    "few_blocks": _few_blocks,
}

BY_MASK = (_permutation, _same_rows, _rows_of, _same_order, _other_order, _new_order)
"""Checks that look at the rows where the mask is True."""
