"""NNX objects that a function reaches without being given them.

Compiled code would hold their values as constants: what the user changes later would not be seen,
what the function changes would be lost, and gradients would be zero. So they are refused.

The function's code is read, line after line, for what it loads and where that goes. Only what is
used counts: of a trainer with a model, a function may use the learning rate. So what follows from
the code alone is found, and what depends on values is not: attributes whose names are computed,
elements of objects with a `__getitem__` of their own, what a library's function or a function of
another module does with an object, the results of functions, and what is stored in an object
before it is read.
"""

import builtins
import collections
import contextlib
import dis
import functools
import inspect
import itertools
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from flax import nnx

DEPTH = 8
"""How many functions deep a captured object is looked for."""


FIRST, MOST = 1_000, 10_000
"""How many elements of a container are looked at, and with those of the containers in it: more than
anyone has models, and a vocabulary of millions costs no time."""


def captured(function: Callable[..., Any]) -> list[str]:
    """The names under which `function` reaches NNX objects by itself."""
    search = _Search()
    search.call(_Value("", function), DEPTH)
    return sorted(search.names)


def own(x: Any, name: str, default: Any = None) -> Any:
    """`getattr`, but not from a `__getattr__` of the user's: that may make it up, or raise."""
    made_up = hasattr(type(x), "__getattr__") and inspect.getattr_static(x, name, None) is None
    return default if made_up else getattr(x, name, default)


class _Value(NamedTuple):
    """An object, and how the code comes to it; "" if under the name that it is given there."""

    path: str
    x: Any


_UNKNOWN = _Value("", object())
"""What code makes, or is given."""


class _Search:
    def __init__(self):
        self.names: set[str] = set()
        self.seen: dict[Any, Any] = {}  # its values keep alive what its keys are the `id`s of

    def call(
        self,
        value: _Value,
        depth: int,
        given: Sequence[_Value] = (),
        keywords: Mapping[str, _Value] = types.MappingProxyType({}),
    ) -> None:
        """Reads what is called, as far as it is written in Python; else it may use all it gets."""
        path, f = value.path, value.x
        for argument in (*given, *keywords.values()):
            if _is_function(argument.x):  # to be called, wherever that is
                self.use(argument, depth - 1)
        if inspect.isfunction(f):
            self.function(f, depth - 1, given, keywords)
        if inspect.ismethod(f):
            holder = _Value(path.rpartition(".")[0], f.__self__)
            self.call(_Value(path, f.__func__), depth, [holder, *given], keywords)
        elif isinstance(f, functools.partial):
            bound = [_Value("", x) for x in f.args]
            named = {name: _Value("", x) for name, x in f.keywords.items()}
            self.call(_Value(path, f.func), depth, [*bound, *given], {**named, **keywords})
        elif wrapped := own(f, "__wrapped__"):  # what wraps it may be a library's
            self.call(_Value(path, wrapped), depth, given, keywords)
        elif _is_called_by_python(f):
            self.call(_Value(path, type(f).__call__), depth, [value, *given], keywords)
        elif not inspect.isfunction(f):
            for argument in (*given, *keywords.values()):
                self.use(self.load(argument, "an argument"), depth)

    def use(self, value: _Value, depth: int) -> None:
        """An object that code may do anything with: its elements are reached, or it is called."""
        path, x = value
        if depth < 1:
            return
        if _is_function(x) or _is_called_by_python(x):
            self.call(value, depth)
        else:
            for element in _elements(x):
                self.use(self.load(_Value(path, element), path), depth)

    def load(self, value: _Value, name: str) -> _Value:
        """What code goes on with once it has loaded a value."""
        path, x = value.path or name, value.x
        if isinstance(x, nnx.Pytree | nnx.Variable):
            self.names.add(path)
            return _UNKNOWN
        return _Value(path, x)

    def function(
        self,
        function: types.FunctionType,
        depth: int,
        given: Sequence[_Value],
        keywords: Mapping[str, _Value],
    ) -> None:
        """Reads a function that is called with these arguments, each of which may be unknown."""
        code, defaults = function.__code__, function.__defaults__ or ()
        positional = code.co_varnames[: code.co_argcount]
        scope = dict(zip(reversed(positional), reversed(defaults), strict=False))
        scope |= {**(function.__kwdefaults__ or {}), **_closure(function)}
        scope = {name: _Value("", x) for name, x in scope.items()}
        scope |= {**dict(zip(positional, given, strict=False)), **keywords}
        key = code, *((name, *_identity(value.x)) for name, value in scope.items())
        if depth > 0 and key not in self.seen:
            self.seen[key] = scope
            self.code(code, function.__globals__, scope, depth)

    def code(
        self, code: types.CodeType, known: dict[str, Any], scope: dict[str, _Value], depth: int
    ) -> None:
        """Reads code with the globals `known` and, in `scope`, what its other names stand for.

        In the order of its lines: at the end of a branch nothing but names is known any more.
        """
        stack: list[_Value] = []
        cells = {*code.co_cellvars, *code.co_freevars}
        keywords: Sequence[str] = ()

        def pop(count: int) -> list[_Value]:
            missing = [_UNKNOWN] * (count - len(stack))
            kept = len(stack) + len(missing) - count
            popped = missing + stack[kept:]
            del stack[kept:]
            return popped

        def use(values: Iterable[_Value]) -> None:
            for value in values:
                self.use(value, depth)

        for step in dis.get_instructions(code):
            op, argument = step.opname, step.argval
            if step.is_jump_target:
                use(pop(len(stack)))
            if op in _SILENT:
                continue
            moves = re.findall("(LOAD|STORE)_(FAST|DEREF|CLOSURE)", op)
            if op == "LOAD_GLOBAL":
                x = _of_module(known.get(argument, vars(builtins).get(argument)), known)
                stack.append(self.load(_Value(argument, x), argument))
            elif moves:
                names = argument if isinstance(argument, tuple) else (argument,)
                for (move, kind), name in zip(moves, names, strict=False):
                    if move == "STORE":
                        [scope[name]] = pop(1)
                    elif kind != "DEREF" and name in cells:  # handed on to an inner function
                        stack.append(_UNKNOWN)
                    else:
                        stack.append(self.load(scope.get(name, _UNKNOWN), name))
            elif op in ("LOAD_CONST", "LOAD_SMALL_INT"):
                stack.append(_Value("", argument))
            elif op in ("LOAD_ATTR", "LOAD_METHOD"):
                [value] = pop(1)
                stack.append(self.attribute(value, argument, known, depth))
            elif op == "LOAD_SUPER_ATTR":
                _, _, holder = pop(3)
                stack.append(self.attribute(_super(scope, holder), argument, known, depth))
            elif op == "BINARY_SUBSCR" or (op == "BINARY_OP" and step.argrepr == "[]"):
                value, element = pop(2)
                stack.append(self.element(value, element, depth))
            elif op == "KW_NAMES":
                keywords = code.co_consts[step.arg or 0]
            elif op in ("CALL", "CALL_KW"):
                if op == "CALL_KW":
                    keywords = pop(1)[0].x
                called, *given = pop(argument + 1)
                count = len(given) - len(keywords)
                named = dict(zip(keywords, given[count:], strict=True))
                if called.x is super and not given:
                    stack.append(_super(scope, scope.get(code.co_varnames[0], _UNKNOWN)))
                elif called.x is getattr and len(given) > 1 and isinstance(given[1].x, str):
                    stack.append(self.attribute(given[0], given[1].x, known, depth))
                else:
                    if not any(called.x is x for x in _LOOKING):
                        self.call(called, depth, given[:count], named)
                    stack.append(_UNKNOWN)
                keywords = ()
            elif op in ("IS_OP", "CONTAINS_OP", "UNARY_NOT", "TO_BOOL"):
                pop(1 - _effect(step))
                stack.append(_UNKNOWN)
            elif op.startswith("POP_"):
                pop(-_effect(step))
            elif op.startswith(("BINARY_", "BUILD_", "COMPARE_")):
                use(pop(1 - _effect(step)))
                stack.append(_UNKNOWN)
            else:
                use(pop(len(stack)))
        for inner in code.co_consts:
            if isinstance(inner, types.CodeType):
                outer = {name: scope[name] for name in inner.co_freevars if name in scope}
                self.code(inner, known, outer, depth)

    def attribute(self, value: _Value, name: str, known: dict[str, Any], depth: int) -> _Value:
        """What `value.name` is. Of the user's code only a property's is read, and none is run."""
        path, x = value.path, value.x
        found = _static(x, name)
        if isinstance(found, property | functools.cached_property):
            getter = found.fget if isinstance(found, property) else found.func
            self.call(_Value(path, getter), depth, [value])
            return _UNKNOWN
        if isinstance(x, types.ModuleType):
            found = _of_module(found, known)
        path = f"{path}.{name}"
        return self.load(_Value(path, found), path)

    def element(self, value: _Value, key: _Value, depth: int) -> _Value:
        """What `value[key]` is; under a key that is not known, any of the elements."""
        x = _builtin(value.x)
        kinds: tuple[Any, ...] = (dict, list, tuple)
        for kind in kinds:
            if isinstance(x, kind) and isinstance(key.x, str | int):
                path = f"{value.path}[{key.x!r}]"
                try:  # not by a `__getitem__` of the user's
                    return self.load(_Value(path, kind.__getitem__(x, key.x)), path)
                except (LookupError, TypeError):
                    return _UNKNOWN
        self.use(value, depth)
        return _UNKNOWN


_SILENT = {"RESUME", "NOP", "PUSH_NULL", "PRECALL", "MAKE_CELL", "COPY_FREE_VARS", "EXTENDED_ARG",
           "CACHE", "NOT_TAKEN"}  # fmt: skip
"""Instructions that do nothing to the values that code works on."""

_LOOKING = (len, isinstance, issubclass, hasattr, callable, type, id, bool)
"""What is called with an object and reaches nothing in it."""


def _effect(step: dis.Instruction) -> int:
    return dis.stack_effect(step.opcode, step.arg, jump=False)


def _static(x: Any, name: str) -> Any:
    """What `x.name` is, without running code of the user's."""
    if type(x) is super:
        parent: Any = x
        x = parent.__self__
        classes = (x if isinstance(x, type) else type(x)).__mro__
        after = classes[classes.index(parent.__thisclass__) + 1 :]
        found = next((vars(c)[name] for c in after if name in vars(c)), _UNKNOWN.x)
    else:
        found = inspect.getattr_static(x, name, _UNKNOWN.x)
        if found is _UNKNOWN.x and isinstance(x, dict):  # by a `__getattr__`, as many have it
            return dict.get(x, name, found)
    if isinstance(found, staticmethod):
        return found.__func__
    if isinstance(found, classmethod):
        return types.MethodType(found.__func__, x if isinstance(x, type) else type(x))
    if isinstance(x, type | types.ModuleType) or name in _attributes(x):
        return found
    if isinstance(found, types.MemberDescriptorType | _NamedField):
        try:
            return found.__get__(x)
        except AttributeError:  # a slot that is empty
            return _UNKNOWN.x
    if callable(found) and hasattr(type(found), "__get__"):
        return types.MethodType(found, x)
    return found


_NamedField = type(_Value.x)
"""How a named tuple finds its fields."""


def _attributes(x: Any) -> dict[str, Any]:
    try:
        return object.__getattribute__(x, "__dict__")
    except AttributeError:
        return {}


def _super(scope: Mapping[str, _Value], holder: _Value) -> _Value:
    """`super()` in a method of `holder`."""
    try:
        return _Value(holder.path, super(scope["__class__"].x, holder.x))
    except (KeyError, TypeError):
        return _UNKNOWN


def _of_module(x: Any, known: dict[str, Any]) -> Any:
    """What a module has under a name, but no function of another: libraries would lead far."""
    function = x
    while not inspect.ismethod(function) and (wrapped := own(function, "__wrapped__")):
        function = wrapped
    foreign = inspect.isfunction(function) and function.__globals__ is not known
    return _UNKNOWN.x if foreign else x


def _is_function(x: Any) -> bool:
    kinds = types.FunctionType | types.MethodType | functools.partial
    return isinstance(x, kinds) or own(x, "__wrapped__") is not None


def _is_called_by_python(x: Any) -> bool:
    """Whether the class of an object says in Python what a call of it does."""
    if isinstance(x, type | nnx.Pytree) or not callable(x):
        return False
    return _is_function(type(x).__call__)


def _builtin(x: Any) -> Any:
    return x.data if isinstance(x, collections.UserDict | collections.UserList) else x


def _elements(x: Any) -> list[Any]:
    """What is in a container, and in those in it: the first of each, and no more than `MOST`."""
    found, looked, seen = [], [x], {id(x)}
    for container in map(_builtin, looked):
        if isinstance(container, dict | list | tuple | set | frozenset):
            elements = container.values() if isinstance(container, dict) else container
            for inner in itertools.islice(elements, FIRST):
                if id(inner) not in seen and len(looked) < MOST:
                    seen.add(id(inner))
                    looked.append(inner)
        elif container is not x:
            found.append(container)
    return found


def _identity(x: Any) -> tuple[int, ...]:
    return (id(x.__func__), id(x.__self__)) if inspect.ismethod(x) else (id(x),)


def _closure(function: types.FunctionType) -> dict[str, Any]:
    held = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not assigned yet
            held[name] = cell.cell_contents
    return held
