"""Mutants of the model that are generated, each by one small change of the syntax tree."""

from __future__ import annotations

import ast
import copy
import json
import pathlib
from collections.abc import Iterator, Mapping

from ._mutant import Mutant, model_source

COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
BINARY = {
    ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.BitXor: ast.BitOr, ast.BitOr: ast.BitXor, ast.BitAnd: ast.BitOr,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Every way to change one node, with a name."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARE:
        for i, op in enumerate(node.ops):
            new = copy.deepcopy(node)
            new.ops[i] = COMPARE[type(op)]()
            yield f"{type(op).__name__} -> {type(new.ops[i]).__name__}", new
    elif isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        new = copy.deepcopy(node)
        new.op = BINARY[type(node.op)]()
        yield f"{type(node.op).__name__} -> {type(new.op).__name__}", new
    elif isinstance(node, ast.BoolOp):
        new = copy.deepcopy(node)
        new.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield f"{type(node.op).__name__} -> {type(new.op).__name__}", new
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield f"{node.value} -> {not node.value}", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield f"{node.value} -> {node.value + 1}", ast.Constant(node.value + 1)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not removed", node.operand
    elif isinstance(node, (ast.If, ast.IfExp)):
        new = copy.deepcopy(node)
        new.test = ast.UnaryOp(ast.Not(), node.test)
        yield "condition negated", new
    elif isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
        yield "statement removed", ast.Pass()
    elif isinstance(node, ast.Return) and not nothing(node.value):
        yield "returns None", ast.Return(ast.Constant(None))


def nothing(value: ast.AST | None) -> bool:
    return value is None or (isinstance(value, ast.Constant) and value.value is None)


class Swap(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else super().visit(node)


def sites(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """The nodes that may be changed, each with the function it stands in."""

    def walk(node: ast.AST, place: str) -> Iterator[tuple[str, ast.AST]]:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            place = f"{place}.{node.name}" if place else node.name
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                # `strict=` only asserts; changing it changes no result.
                strict = isinstance(child, ast.keyword) and child.arg == "strict"
                if isinstance(child, ast.AST) and not strict:
                    yield place, child
                    yield from walk(child, place)

    yield from walk(tree, "")


def automatic() -> list[Mutant]:
    """All generated mutants. The name of one stays the same as long as its function does."""
    found: dict[str, str] = {}
    tree = ast.parse(model_source())
    for place, node in list(sites(tree)):
        for what, new in changes(node):
            name = f"{place or 'module'}: {what}"
            number = sum(other.partition(" #")[0] == name for other in found)
            # `Swap` puts the new node in; swapping back leaves the tree as it was.
            mutated = Swap(node, new).visit(copy_with(tree, node))
            found[name if not number else f"{name} #{number + 1}"] = ast.unparse(
                ast.fix_missing_locations(mutated)
            )
    return [Mutant(name, (), (), text=text) for name, text in found.items()]


def copy_with(tree: ast.Module, kept: ast.AST) -> ast.Module:
    """A deep copy of `tree` in which `kept` is still itself."""
    return copy.deepcopy(tree, {id(kept): kept})


def survivors_explained() -> Mapping[str, str]:
    """Why each surviving mutant is no gap: it is equivalent, or does what the spec leaves open."""
    path = pathlib.Path(__file__).parent / "survivors.json"
    return json.loads(path.read_text(encoding="utf-8"))
