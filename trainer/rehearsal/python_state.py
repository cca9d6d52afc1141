"""The state that a task's Python code keeps: saves, compares and restores it.

`model_state` handles a model's parameters and buffers. A forward may also change state in Python: attributes of the
task, of the model's modules and of their classes, globals of the user's own files, and the generators of Python's
`random` and of numpy. The rehearsal restores all of it, so that it changes nothing, and names the values on which the
numbers depend.

It cannot see closures, caches of decorators, objects of other packages, or anything outside the process.
"""

from __future__ import annotations

import collections
import functools
import random
import sys
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..exact.checks.hashes import bytes_of

# Limits that keep the search cheap. Larger tensors and arrays (in elements), such as a task's dataset, are not copied.
# Longer lists and dictionaries, and values that are nested deeper, are not searched. There is a limit for all values
# together, too.
_LARGEST = 1 << 16
_LONGEST = 4096
_DEEPEST = 4
_MOST_VALUES = 50_000
_MOST_BYTES = 32 << 20
# What torch keeps in every module: parameters, buffers, children and hooks.
_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}
_ATOMS = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)


class _Budget:
    """How much may still be saved, and the generators seen so far, as functions that draw from them."""

    def __init__(self) -> None:
        self._values, self._bytes = _MOST_VALUES, _MOST_BYTES
        self.generators: list[Callable[[], Any]] = []

    def allows(self, size_bytes: int = 0) -> bool:
        self._values -= 1
        self._bytes -= size_bytes
        return self._values >= 0 and self._bytes >= 0


class _Saved:
    """A saved value. `same_as` compares it with one that was saved later; `back` restores and returns it."""

    def __init__(self, value: Any, content: Any, back: Callable[[], Any], generator: bool = False) -> None:
        self.value, self.content, self.back, self.generator = value, content, back, generator

    def same_as(self, other: _Saved) -> bool:
        return type(self.value) is type(other.value) and self.content == other.content


def _bits(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), bytes_of(tensor).tobytes()


def _save(value: Any, budget: _Budget, depth: int = 0) -> _Saved:
    if not budget.allows():
        return _Saved(value, id(value), lambda: value)
    if isinstance(value, (str, bytes)) and len(value) > _LONGEST:
        return _Saved(value, id(value), lambda: value)
    if isinstance(value, _ATOMS):
        return _Saved(value, repr(value), lambda: value)  # as text, because nan is not equal to itself
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):  # parameters are in `model_state`
        return _save_tensor(value, budget)
    for kind in _GENERATORS:
        if isinstance(value, kind.type):
            budget.generators.append(functools.partial(kind.advance, value))
            state = kind.read(value)
            back = functools.partial(_restored, value, kind.write, state)
            return _Saved(value, _plain(state), back, generator=True)
    if (
        isinstance(value, np.ndarray)
        and value.size <= _LARGEST
        and not value.dtype.hasobject
        and budget.allows(2 * value.nbytes)
    ):
        content = (str(value.dtype), value.shape, value.tobytes())
        return _Saved(value, content, functools.partial(_restored, value, _write_array, value.copy()))
    if depth < _DEEPEST:
        container = _save_container(value, budget, depth + 1)
        if container is not None:
            return container
    return _Saved(value, id(value), lambda: value)


def _restored(value: Any, write: Callable[[Any, Any], Any], state: Any) -> Any:
    write(value, state)
    return value


def _set_bits(generator: Any, state: Any) -> None:
    generator.state = state


def _plain(state: Any) -> Any:
    """A generator's state as values that can be compared."""
    if isinstance(state, dict):
        return tuple((name, _plain(value)) for name, value in state.items())
    if isinstance(state, Tensor):
        return _bits(state)
    return state.tobytes() if isinstance(state, np.ndarray) else state


@dataclass(frozen=True)
class _Generators:
    """A kind of random generator: how to read its state, set it, and draw one number."""

    type: type
    read: Callable[[Any], Any]
    write: Callable[[Any, Any], Any]
    advance: Callable[[Any], Any]


_GENERATORS = (
    _Generators(
        torch.Generator,
        lambda g: g.get_state(),
        lambda g, state: g.set_state(state),
        lambda g: torch.rand((), generator=g, device=g.device),
    ),
    _Generators(random.Random, lambda g: g.getstate(), lambda g, state: g.setstate(state), lambda g: g.random()),
    _Generators(
        np.random.Generator,
        lambda g: g.bit_generator.state,
        lambda g, state: _set_bits(g.bit_generator, state),
        lambda g: g.random(),
    ),
    _Generators(
        np.random.RandomState,
        lambda g: g.get_state(legacy=False),
        lambda g, state: g.set_state(state),
        lambda g: g.random_sample(),
    ),
)


def _save_tensor(value: Tensor, budget: _Budget) -> _Saved:
    small = value.layout == torch.strided and value.numel() <= _LARGEST and not value.is_meta
    if not small or not budget.allows(2 * value.numel() * value.element_size()):
        # No copy, but a change is seen: torch counts the writes to a tensor in `_version`.
        return _Saved(value, (id(value), value._version), lambda: value)
    return _Saved(value, _bits(value), functools.partial(_restored, value, _write_tensor, value.detach().clone()))


def _write_tensor(value: Tensor, content: Tensor) -> None:
    if value.shape == content.shape and _bits(value) != _bits(content):
        with torch.no_grad():
            value.copy_(content)


def _write_array(value: np.ndarray[Any, Any], content: np.ndarray[Any, Any]) -> None:
    if value.flags.writeable:
        value[...] = content


def _save_container(value: Any, budget: _Budget, depth: int) -> _Saved | None:
    """A list, tuple, set, dictionary or object of a user's class, saved with its content; None for other values."""
    if isinstance(value, (list, tuple, collections.deque)) and len(value) <= _LONGEST:
        items = [_save(item, budget, depth) for item in value]

        def sequence() -> Any:
            restored = [item.back() for item in items]
            if not isinstance(value, tuple):
                value.clear()
                value.extend(restored)
            return value

        return _Saved(value, tuple(item.content for item in items), sequence)
    if isinstance(value, set) and len(value) <= _LONGEST:
        members = set(value)

        def collection() -> Any:
            value.clear()
            value.update(members)
            return value

        return _Saved(value, frozenset(map(repr, members)), collection)
    if isinstance(value, dict):
        names: dict[Any, Any] = value
    elif not isinstance(value, (type, ModuleType, nn.Module)) and _own(type(value)) and hasattr(value, "__dict__"):
        names = vars(value)
    else:
        return None
    if len(names) > _LONGEST:
        return None
    entries = {name: _save(entry, budget, depth) for name, entry in names.items()}

    def mapping() -> Any:
        restored = {name: entry.back() for name, entry in entries.items()}
        names.clear()
        names.update(restored)
        return value

    return _Saved(value, tuple((repr(name), entry.content) for name, entry in entries.items()), mapping)


def _places_of_packages() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return tuple({str(Path(paths[name]).resolve()) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


_INSTALLED = _places_of_packages()
_TRAINER = str(Path(__file__).resolve().parents[1])


def _own(cls: type) -> bool:
    """Whether a class is the user's: neither from an installed package nor from the trainer."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if file is None:
        return cls.__module__ == "__main__"  # of a notebook
    path = str(Path(file).resolve())
    return not path.startswith((*_INSTALLED, _TRAINER)) and "site-packages" not in path


@dataclass(frozen=True)
class _Namespace:
    """Names and values that code can change.

    Attributes:
        label: the description of a value in messages; {} stands for its name.
        names: the names and their present values.
        put, remove: set and delete one name.
    """

    label: str
    names: Mapping[str, Any]
    put: Callable[[str, Any], None]
    remove: Callable[[str], None]


# Identifies a value: the number of its namespace, and its name there. The two global generators have no namespace.
Key = tuple[int, str]
PYTHONS: Key = (-1, "Python's random module")
NUMPYS: Key = (-1, "numpy's global generator")
State = dict[Key, _Saved]


class PythonState:
    """The state that a task's code can change in this process, besides the model's tensors.

    Args:
        task, model: of the run.
    """

    def __init__(self, task: Any, model: nn.Module) -> None:
        self._namespaces: list[_Namespace] = []
        self._generators: list[Callable[[], Any]] = []
        classes: dict[type, None] = {}
        self._add_object("the task's attribute {}", task, classes)
        for path, module in model.named_modules():
            where = f"the module {path} ({type(module).__name__})" if path else f"the model ({type(module).__name__})"
            self._add_object(f"the attribute {{}} of {where}", module, classes)
        for file in {sys.modules[cls.__module__]: None for cls in classes}:
            names = vars(file)
            label = f"the global {{}} of {Path(str(getattr(file, '__file__', 'this program'))).name}"
            self._namespaces.append(_Namespace(label, names, names.__setitem__, names.__delitem__))
            classes |= {v: None for v in names.values() if isinstance(v, type) and v.__module__ == file.__name__}
        for cls in classes:
            put, remove = functools.partial(setattr, cls), functools.partial(delattr, cls)
            self._namespaces.append(_Namespace(f"the class attribute {cls.__name__}.{{}}", vars(cls), put, remove))

    def _add_object(self, label: str, value: Any, classes: dict[type, None]) -> None:
        if hasattr(value, "__dict__"):
            names = vars(value)
            self._namespaces.append(_Namespace(label, names, names.__setitem__, names.__delitem__))
        classes |= {cls: None for cls in type(value).__mro__ if _own(cls)}

    def take(self) -> State:
        """Saves the state."""
        budget = _Budget()
        saved = {
            (number, name): _save(value, budget)
            for number, namespace in enumerate(self._namespaces)
            for name, value in list(namespace.names.items())
            if _is_state(name, value)
        }
        for key, generator in ((PYTHONS, random._inst), (NUMPYS, np.random.mtrand._rand)):
            others = _Budget()
            saved[key] = _save(generator, others)
            budget.generators += others.generators
        self._generators = budget.generators
        return saved

    def stir(self, times: int) -> None:
        """Draws from every generator that `take` found last, as other micro-batches would have done."""
        for draw in self._generators:
            for _ in range(times):
                draw()

    def put_back(self, saved: State, leave: Key | None = None) -> None:
        """Restores a state, except the value `leave`."""
        for number, namespace in enumerate(self._namespaces):
            for name, value in list(namespace.names.items()):
                if (number, name) not in saved and (number, name) != leave and _is_state(name, value):
                    namespace.remove(name)
        for key, value in saved.items():
            if key == leave:
                continue
            restored = value.back()
            if key not in (PYTHONS, NUMPYS):
                namespace = self._namespaces[key[0]]
                if key[1] not in namespace.names or namespace.names[key[1]] is not restored:
                    namespace.put(key[1], restored)

    def add(self, key: Key, amount: int) -> None:
        """Adds to a number, as if there had been more calls. A number that does not exist yet begins at 0."""
        namespace = self._namespaces[key[0]]
        namespace.put(key[1], namespace.names.get(key[1], 0) + amount)

    def name_of(self, key: Key) -> str:
        """The description of a value in messages."""
        return key[1] if key in (PYTHONS, NUMPYS) else self._namespaces[key[0]].label.format(key[1])


def changes(before: State, after: State) -> list[Key]:
    """The values that differ between two states, are new or are missing."""
    keys = [*before, *(key for key in after if key not in before)]
    return [k for k in keys if k not in before or k not in after or not before[k].same_as(after[k])]


def is_number(key: Key, *states: State) -> bool:
    """Whether a value is a number, such as a counter."""
    values = [state[key].value for state in states if key in state]
    return bool(values) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)


def is_generator(key: Key, *states: State) -> bool:
    """Whether a value is a generator of random numbers."""
    return any(key in state and state[key].generator for state in states)


def _is_state(name: str, value: Any) -> bool:
    """Whether a name in a namespace may hold state. Torch's own names, functions, classes and modules do not."""
    if name in _OF_TORCH or (name.startswith("__") and name.endswith("__")):
        return False
    code = (type, ModuleType, FunctionType, BuiltinFunctionType, staticmethod, classmethod, property, nn.Module)
    return not isinstance(value, code)
