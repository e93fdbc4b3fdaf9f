"""Faulty comparators, which the stored cases and altered copies of them must notice."""

from __future__ import annotations

import ast
import base64
import inspect
import json
import types
from typing import Any

import numpy as np

from .. import compare
from ..arrays import encode
from ._kill import cases_by_weight
from .automatic import Swap, changes, copy_with, sites
from .data import answers_of, leaves, open_ended, with_flip


def probes() -> list[tuple[Any, Any, Any, bool]]:
    """Expectation, answer, notes and verdict, from the stored cases and altered copies of them."""
    found = []
    for case in cases_by_weight()[0]:
        for expect, answer, notes in answers_of(case):
            found.append((expect, answer, notes, True))
            paths = [path for path in leaves(expect) if path and not open_ended(path, expect)]
            for path in paths[:: max(1, len(paths) // 4)]:
                found.append((with_flip(expect, path), answer, notes, False))
    return found + BY_HAND


def ids(*values: int, **fields: Any) -> dict[str, Any]:
    return {"id": {"dtype": "int32", "shape": [len(values)], "data": list(values)}, **fields}


def scanned(*batches: list[int]) -> dict[str, Any]:
    """The answer of a scan."""
    shape = [len(batches), len(batches[0])]
    return {"id": {"dtype": "int32", "shape": shape, "data": [i for b in batches for i in b]}}


def masked(*values: bool) -> dict[str, Any]:
    return {"mask": {"dtype": "bool", "shape": [len(values)], "data": list(values)}}


def floats(*bits: int) -> dict[str, Any]:
    """An array of float32 numbers with these bit patterns."""
    return encode(np.array(bits, np.uint32).view(np.float32))


TABLE = {
    "id": {"dtype": "int32", "shape": [2], "data": [0, 1]},
    "x": {"dtype": "int64", "shape": [2], "data": [3, 5]},
}


def row(id: int, x: int, kind: str = "int64", **fields: Any) -> dict[str, Any]:
    return ids(id, x={"dtype": kind, "shape": [1], "data": [x]}, **fields)


def both(first: int, second: int, *mask: bool) -> dict[str, Any]:
    """A batch of record 1 and then record 0, or padding where the mask is False."""
    x = {"dtype": "int64", "shape": [2], "data": [first, second]}
    return ids(1, 0, x=x, **masked(*mask))


PAIRS = {"dtype": "int32", "shape": [2, 2], "data": [0, 1, 2, 3]}
MASK_OF_SCAN = {"dtype": "bool", "shape": [1, 2], "data": [True, True]}
ZERO, MINUS_ZERO, ONE, NAN, OTHER_NAN = 0, 1 << 31, 0x3F800000, 0x7FC00000, 0xFFC00001
STATE = base64.b64encode(json.dumps({"a": 1, "b": {"c": 2}}).encode()).decode()
MIXED = {"value": [ids(0, 4), ids(1, 2, 5, 3)]}
RAISED = {"error": {"code": "cycle", "details": {"nodes": ["a", "b"]}, "type": "E", "message": ""}}
BY_HAND: list[tuple[Any, Any, Any, bool]] = [
    ({"check": "no_error"}, RAISED, {}, False),
    ({"error": "*"}, RAISED, {}, True),
    ({"error": "*"}, {"value": None}, {}, False),
    ({"error": "stage"}, RAISED, {}, False),
    ({"error": "cycle", "details": {"nodes": ["b"]}}, RAISED, {}, False),
    ({"any": [{"error": "stage"}, {"error": "cycle"}]}, RAISED, {}, True),
    ({"any": [{"error": "stage"}, {"error": "state"}]}, RAISED, {}, False),
    ({"all": [{"error": "stage"}, {"error": "cycle"}]}, RAISED, {}, False),
    ({"all": [{"error": "cycle"}, {"error": "stage"}]}, RAISED, {}, False),
    ({"check": "permutation", "length": 3}, {"value": [ids(0, 1), ids(1)]}, {}, False),
    ({"check": "permutation", "length": 3}, {"value": [ids(0, 1), ids(3)]}, {}, False),
    ({"check": "permutation", "length": 3}, {"value": [ids(0, 1), ids(-1)]}, {}, False),
    ({"check": "permutation", "length": 3}, {"value": [ids(0, 1), ids(2), "stop"]}, {}, True),
    ({"check": "permutation", "length": 2}, {"value": [ids(0, 1), ids(1)]}, {}, False),
    ({"check": "permutation", "length": 2}, {"value": [ids(0, 1), ids(2)]}, {}, False),
    (
        {"check": "permutation", "length": 2},
        {"value": [ids(1, 0, 0, **masked(True, True, False))]},
        {},
        True,
    ),
    *[
        ({"check": "same_rows", "like": "a"}, {"value": value}, {"a": value}, agree)
        for value, agree in (
            ([{"x": PAIRS, **masked(True, True)}], True),
            ({"x": {**PAIRS, "shape": [1, 2, 2]}, "mask": MASK_OF_SCAN}, True),
            ([ids(0, 1, mask=ids(1, 0)["id"])], False),  # as indices they select both rows
            ([ids(0, mask={"dtype": "bool", "shape": [], "data": [True]})], False),
        )
    ],
    (
        {"check": "permutation", "length": 2, "sizes": [1, 1]},
        {"value": [ids(1, 0), "stop"]},
        {},
        False,
    ),
    ({"check": "permutation", "length": 2, "sizes": [2]}, {"value": [ids(1, 0), "stop"]}, {}, True),
    ({"check": "same_rows", "like": "a"}, {"value": [ids(0, 1)]}, {"a": [ids(0), ids(1)]}, True),
    (
        {"check": "same_rows", "like": "a"},
        {"value": [ids(0, 1), "stop"]},
        {"a": [ids(0), ids(1), "stop"]},
        True,
    ),
    ({"check": "same_rows", "like": "a"}, {"value": [ids(0, 2)]}, {"a": [ids(0), ids(1)]}, False),
    ({"check": "same_rows", "like": "a"}, {"value": [ids(0)]}, {"a": [ids(0), ids(1)]}, False),
    ({"check": "same_rows", "like": "a"}, {"value": []}, {"a": []}, True),
    (
        {"check": "same_rows", "like": "a"},
        {"value": [{"id": {"dtype": "int64", "shape": [1], "data": [0]}}]},
        {"a": [ids(0)]},
        False,
    ),
    ({"check": "permutation", "length": 6}, {"value": scanned([3, 1, 2], [0, 4, 5])}, {}, True),
    ({"check": "permutation", "length": 6}, {"value": scanned([3, 1, 2], [0, 4, 4])}, {}, False),
    (
        {"check": "permutation", "length": 3},
        {
            "value": {
                **scanned([2, 1], [0, 0]),
                "mask": {**masked(True, True, True, False)["mask"], "shape": [2, 2]},
            }
        },
        {},
        True,
    ),
    (
        {"check": "same_rows", "like": "a"},
        {"value": scanned([0, 1], [2, 3], [4, 5])},
        {"a": [ids(0, 1, 2), ids(3, 4, 5)]},
        True,
    ),
    ({"check": "same_rows", "like": "a"}, {"value": [ids(1, 0)]}, {"a": scanned([0, 1])}, False),
    (  # rows of two numbers
        {"check": "same_rows", "like": "a"},
        {"value": {"x": {"dtype": "int32", "shape": [2, 1, 2], "data": [0, 1, 2, 3]}}},
        {"a": [{"x": {"dtype": "int32", "shape": [2, 2], "data": [0, 1, 2, 3]}}]},
        True,
    ),
    ({"check": "same_order", "like": "a"}, {"value": [ids(0, 2)]}, {"a": [ids(0), ids(1)]}, False),
    *[
        ({"check": "rows_of", "columns": TABLE}, {"value": value}, {}, agree)
        for value, agree in (
            ([row(1, 5), row(0, 3), "stop"], True),
            ([row(1, 3)], False),
            ([row(2, 5)], False),
            ([], False),
            ([ids(0)], False),
            ([row(1, 5, y=row(0, 0)["x"])], False),
            ([row(1, 5, kind="int32")], True),
            ([row(1, 5, kind="int16")], False),
            ([row(1, 5, kind="float32")], False),
            ([{**row(1, 5), "x": {"dtype": "int64", "shape": [1, 1], "data": [5]}}], False),
            ([both(5, 0, True, False)], True),
            ([both(5, 7, True, False)], False),
            ([both(5, 3, True, True)], True),
            ({**scanned([1], [0]), "x": {"dtype": "int64", "shape": [2, 1], "data": [5, 3]}}, True),
            (
                {**scanned([1], [0]), "x": {"dtype": "int64", "shape": [2, 1], "data": [3, 5]}},
                False,
            ),
        )
    ],
    ({"check": "other_order", "like": "a"}, {"value": [ids(0, 1)]}, {"a": [ids(0), ids(1)]}, False),
    ({"check": "new_order", "like": "*"}, {"value": [ids(1, 0)]}, {"a": [ids(0), ids(1)]}, True),
    (
        {"check": "new_order", "like": "*"},
        {"value": [ids(0, 1)]},
        {"a": [ids(1, 0)], "b": [ids(0), ids(1)]},
        False,
    ),
    ({"value": [{"a": 1}], "without": ["b"]}, {"value": [{"a": 1, "b": 2}]}, {}, True),
    ({"value": [{"a": 1}], "without": ["b"]}, {"value": [{"a": 2, "b": 2}]}, {}, False),
    ({"value": [{"a": 1}], "without": ["b"]}, {"value": [{"a": 1, "c": 2}]}, {}, False),
    ({"check": "state_at_most", "most": 3}, {"value": {"base64": "AAAA"}}, {}, True),
    ({"check": "state_at_most", "most": 2}, {"value": {"base64": "AAAA"}}, {}, False),
    ({"check": "at_most", "most": 3}, {"value": 3}, {}, True),
    ({"check": "at_most", "most": 3}, {"value": 4}, {}, False),
    ({"check": "at_least", "least": {"a": 1, "b": 2}}, {"value": {"a": 1, "b": 2}}, {}, True),
    ({"check": "at_least", "least": {"a": 1, "b": 2}}, {"value": {"a": 1, "b": 1}}, {}, False),
    ({"check": "at_least", "least": {"a": 1, "b": 2}}, {"value": {"a": 0, "b": 2}}, {}, False),
    ({"check": "state_form", "form": "*"}, {"value": {"base64": "AAAA"}}, {}, False),
    *[
        ({"check": "state_form", "form": form}, {"value": {"base64": STATE}}, {}, agree)
        for form, agree in (
            ({"a": 1, "b": {"c": 2}}, True),
            ({"a": "*", "b": "*"}, True),
            ({"a": 2, "b": "*"}, False),
            ({"a": 1, "b": {"c": 3}}, False),
            ({"a": 1}, False),
            ({"a": {}, "b": "*"}, False),
        )
    ],
    ({"check": "mentions", "words": ["a", "b"]}, {"value": "ab"}, {}, True),
    ({"check": "mentions", "words": ["a", "b"]}, {"value": "a"}, {}, False),
    ({"check": "same", "like": "a"}, {"value": "x"}, {"a": "x"}, True),
    ({"check": "same", "like": "a"}, {"value": "x"}, {"a": "y"}, False),
    ({"error": "cycle", "says": {"nodes": ["a", "b"]}}, RAISED, {}, True),
    ({"error": "cycle", "says": {"nodes": ["c"]}}, RAISED, {}, False),
    ({"error": "cycle", "says": {"names": [""]}}, RAISED, {}, True),
    ({"error": "cycle", "says": {"names": ["a"]}}, RAISED, {}, False),
    ({"check": "shares", "begins": [0, 4], "quotas": [2, 1]}, MIXED, {}, True),
    ({"check": "shares", "begins": [0, 4], "quotas": [1, 2]}, MIXED, {}, False),
    ({"check": "shares", "begins": [0, 5], "quotas": [2, 1]}, MIXED, {}, False),
    ({"check": "shares", "begins": [0, 4], "quotas": [2, 1]}, {"value": [ids(0, 1)]}, {}, False),
    ({"check": "shares", "begins": [0, 4], "quotas": [2, 1]}, {"value": []}, {}, False),
    ({"check": "in_turn", "lengths": [4, 2]}, MIXED, {}, True),
    ({"check": "in_turn", "lengths": [4, 1]}, MIXED, {}, False),
    ({"check": "in_turn", "lengths": [4, 2]}, {"value": [ids(0, 1, 2)]}, {}, False),
    ({"check": "in_turn", "lengths": [2, 1]}, {"value": [ids(0, 2, 1, 2, 0)]}, {}, True),
    ({"check": "in_turn", "lengths": [2, 1]}, {"value": [ids(0, 2, 0, 2, 1)]}, {}, False),
    ({"check": "few_blocks", "size": 2, "window": 1}, {"value": [ids(0, 2, 4, 5)]}, {}, True),
    ({"check": "few_blocks", "size": 2, "window": 2}, {"value": [ids(0, 2, 4, 6)]}, {}, False),
    ({"check": "few_blocks", "size": 2, "window": 1}, {"value": []}, {}, False),
    *[
        (
            {"check": "strangers", "steps": steps, "within": within, "low": low, "high": high},
            {"value": [ids(*order)]},
            {},
            agree,
        )
        for steps, within, low, high, order, agree in (
            (3, 2, 0.3, 0.4, (0, 1, 5, 9), True),
            (3, 2, 0.4, 0.5, (0, 1, 5, 9), False),
            (3, 2, 0.1, 0.3, (0, 1, 5, 9), False),
            (3, 1, 0.0, 0.1, (0, 1, 5, 9), True),
            (4, 2, 0.2, 0.4, (0, 1, 5, 9), False),
            (2, 2, 0.4, 0.6, (0, 1, 5, 6), True),
            (2, 2, 0.5, 0.6, (0, 1, 5, 6), True),
            (2, 2, 0.4, 0.5, (0, 1, 5, 6), True),
        )
    ],
    ({"value": [0, 1]}, {"value": [0, 1, 2]}, {}, False),
    ({"value": {"a": 0}}, {"value": {"a": 0, "b": 1}}, {}, False),
    ({"value": 1}, {"value": True}, {}, False),
    ({"value": floats(ONE, NAN)}, {"value": floats(ONE, OTHER_NAN)}, {}, True),
    ({"value": floats(NAN)}, {"value": floats(ONE)}, {}, False),
    ({"value": floats(ZERO)}, {"value": floats(MINUS_ZERO)}, {}, False),
]


def mutated() -> dict[str, types.ModuleType]:
    """Every automatic mutant of the comparator, but for changes within the text of a message."""
    tree = ast.parse(inspect.getsource(compare))
    spoken = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in ast.walk(node)
    }
    found: dict[str, types.ModuleType] = {}
    for place, node in list(sites(tree)):
        if id(node) in spoken:
            continue
        for what, new in changes(node):
            source = ast.unparse(
                ast.fix_missing_locations(Swap(node, new).visit(copy_with(tree, node)))
            )
            module = types.ModuleType("datarax_conformance.compare_mutant")
            module.__package__ = "datarax_conformance"
            exec(compile(source, "mutant.py", "exec"), vars(module))
            found[f"{place}: {what} at line {getattr(node, 'lineno', 0)}"] = module
    return found


def wrong(module: types.ModuleType, expect: Any, answer: Any, notes: Any, agree: bool) -> bool:
    try:
        return (module.deviation(expect, answer, notes) is None) != agree
    except Exception:
        return agree  # an exception counts as a deviation


def check() -> tuple[int, int, list[str]]:
    """The number of faulty comparators, the number noticed, and a text for each of the others."""
    known = sorted(probes(), key=lambda probe: len(str(probe[0])))
    # If the comparator itself fails a probe, its mutants cannot be told from it.
    faults = [f"the comparator fails a probe: {p[0]}" for p in known if wrong(compare, *p)]
    if faults:
        return len(faults), 0, faults
    mutants = mutated()
    for name, module in mutants.items():
        if not any(wrong(module, *probe) for probe in known):
            faults.append(f"{name} goes unnoticed")
    return len(mutants), len(mutants) - len(faults), faults
