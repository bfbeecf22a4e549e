"""A machine for the pickles of torch.save that can make tensors, and do nothing else.

A pickle is a program for a small stack machine that may call any function there is. The machine here knows
dictionaries, lists, numbers and texts, and of all functions those alone that make a tensor of a storage; a program that
calls any other is refused. Nothing is ever looked up or imported.
"""

import io
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ..errors import BadFile, Unsupported

MOST_STEPS: Final = 20_000_000

STORAGES: Final = {
    "DoubleStorage": "f64",
    "FloatStorage": "f32",
    "HalfStorage": "f16",
    "BFloat16Storage": "bf16",
    "Float8_e4m3fnStorage": "f8_e4m3",
    "Float8_e5m2Storage": "f8_e5m2",
    "LongStorage": "i64",
    "IntStorage": "i32",
    "ShortStorage": "i16",
    "CharStorage": "i8",
    "ByteStorage": "u8",
    "BoolStorage": "bool",
}


@dataclass(frozen=True)
class Named:
    """A function or class that the program names. It is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Storage:
    """Bytes in the archive: elements of one type."""

    key: str
    type: str
    elements: int


@dataclass(frozen=True)
class Laid:
    """A tensor as it lies in a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass
class Opaque:
    """An object of a class that matters to nobody here: what it was made of."""

    of: Named
    state: dict[Any, Any] = field(default_factory=dict)


_MARK: Final = object()

# What may be called. torch.nn.Parameter and whatever else wraps a tensor comes down to these.
_TENSOR_V2: Final = Named("torch._utils", "_rebuild_tensor_v2")
_TENSOR: Final = Named("torch._utils", "_rebuild_tensor")
_PARAMETER: Final = Named("torch._utils", "_rebuild_parameter")
_PARAMETER_WITH_STATE: Final = Named("torch._utils", "_rebuild_parameter_with_state")
_DICT: Final = Named("collections", "OrderedDict")

# Classes whose objects tell nothing about weights, but stand beside them; what they would do is not done.
_OPAQUE: Final = {
    Named("torch.nn.modules.container", "ParameterDict"),
    Named("torch", "Size"),
    Named("torch", "device"),
    Named("collections", "defaultdict"),
    Named("collections", "Counter"),
    Named("numpy.core.multiarray", "scalar"),
    Named("numpy._core.multiarray", "scalar"),
    Named("numpy", "dtype"),
    Named("_codecs", "encode"),
    Named("__builtin__", "set"),
    Named("builtins", "set"),
}


class Machine:
    """Runs the program of a pickle on values that it makes itself.

    What it does not know it refuses: the opcodes of extensions and of buffers outside, and each call of a function
    that is not one of those above.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        """What the program leaves behind.

        Raises:
            BadFile: It is no program, or an endless one.
            Unsupported: It calls what is not known.
        """
        try:
            for step, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(program))):
                if step > MOST_STEPS:
                    raise BadFile(f"{self._path}: its pickle has more than {MOST_STEPS:,} steps; it is no model")
                if opcode.name == "STOP":
                    return self._pop()
                act = _ACTS.get(opcode.name)
                if act is None:
                    raise Unsupported(f"{self._path}: its pickle uses {opcode.name}, which no file of weights needs")
                act(self, argument)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, struct.error) as error:
            raise BadFile(
                f"{self._path}: its pickle is damaged ({error}); the file is no model that torch saved"
            ) from error
        except RecursionError as error:
            raise BadFile(f"{self._path}: its pickle has containers in containers without end") from error
        raise BadFile(f"{self._path}: its pickle does not end; the download was probably cut")

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value is due")
        return value

    def _pop_to_mark(self) -> list[Any]:
        values: list[Any] = []
        while (value := self._stack.pop()) is not _MARK:
            values.append(value)
        values.reverse()
        return values

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._push(Named(module, name))

    def _stack_global(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("names something without a text")
        self._push(Named(module, name))

    def _call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        if function == _DICT:
            return dict(arguments[0]) if arguments else {}
        if function in (_TENSOR_V2, _TENSOR):
            return _laid(*arguments[:4])
        if function in (_PARAMETER, _PARAMETER_WITH_STATE):
            return arguments[0]
        if function in _OPAQUE:
            return Opaque(function)
        raise Unsupported(
            f"{self._path}: calls {function}, which makes no tensor and could run a program; it was not run. "
            "Do not load this file with anything else unless you trust who made it"
        )

    def _reduce(self, _: Any) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(arguments, tuple):
            raise ValueError("calls with something that is no tuple")
        self._push(self._call(function, arguments))

    def _newobj_ex(self, _: Any) -> None:
        self._pop()
        self._reduce(None)

    def _inst(self, argument: str) -> None:
        self._global(argument)
        function, arguments = self._pop(), tuple(self._pop_to_mark())
        self._push(self._call(function, arguments))

    def _obj(self, _: Any) -> None:
        function, *arguments = self._pop_to_mark()
        self._push(self._call(function, tuple(arguments)))

    def _build(self, _: Any) -> None:
        state = self._pop()
        made = self._stack[-1]
        if isinstance(made, Opaque) and isinstance(state, dict):
            made.state = state.get("_parameters") or state

    def _persistent(self, _: Any) -> None:
        identity = self._pop()
        if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
            raise ValueError("asks for something that is no storage")
        _, kind, key, _, elements = identity
        if not isinstance(kind, Named) or not isinstance(key, str) or not isinstance(elements, int):
            raise ValueError("asks for a storage of another form")
        if kind.name not in STORAGES or kind.module not in ("torch", "torch.storage"):
            raise Unsupported(f"{self._path}: has elements of type {kind}, which is not read here")
        self._push(Storage(key, STORAGES[kind.name], elements))

    def _memoize(self, index: Any) -> None:
        self._memo[int(index)] = self._stack[-1]

    def _append(self, values: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            if isinstance(self._stack[-1], (Opaque, set)):
                return
            raise ValueError("appends to what is no list")
        self._stack[-1].extend(values)

    def _set_items(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Opaque):
            target = target.state
        if not isinstance(target, dict):
            raise ValueError("sets items of what is no dictionary")
        target.update(zip(values[::2], values[1::2], strict=True))

    def _pop_any(self, _: Any) -> None:
        self._stack.pop()

    def _set_item(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])


def _laid(storage: Any, offset: Any, shape: Any, strides: Any) -> Laid:
    whole = (isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (offset, *shape, *strides))
    if not isinstance(storage, Storage) or len(shape) != len(strides) or not all(whole):
        raise ValueError("makes a tensor of what is no storage, shape and strides")
    return Laid(storage, offset, tuple(shape), tuple(strides))


Act = Callable[[Machine, Any], None]


def _constant(value: Any) -> Act:
    return lambda machine, _: machine._push(value)


def _tuple(size: int) -> Act:
    def act(machine: Machine, _: Any) -> None:
        machine._push(tuple(reversed([machine._pop() for _ in range(size)])))

    return act


_LITERALS: Final = [
    "INT",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG",
    "LONG1",
    "LONG4",
    "FLOAT",
    "BINFLOAT",
    "STRING",
    "BINSTRING",
    "SHORT_BINSTRING",
    "UNICODE",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
    "BYTEARRAY8",
]

_ACTS: Final[dict[str, Act]] = {
    **dict.fromkeys(_LITERALS, Machine._push),
    **{name: lambda machine, _: None for name in ("PROTO", "FRAME")},
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "MARK": _constant(_MARK),
    "EMPTY_TUPLE": _constant(()),
    "EMPTY_DICT": lambda machine, _: machine._push({}),
    "EMPTY_LIST": lambda machine, _: machine._push([]),
    "EMPTY_SET": lambda machine, _: machine._push(Opaque(Named("builtins", "set"))),
    "TUPLE": lambda machine, _: machine._push(tuple(machine._pop_to_mark())),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "LIST": lambda machine, _: machine._push(machine._pop_to_mark()),
    "DICT": lambda machine, _: machine._push(dict(zip(*[iter(machine._pop_to_mark())] * 2, strict=True))),
    "FROZENSET": lambda machine, _: machine._push(tuple(machine._pop_to_mark())),
    "APPEND": lambda machine, _: machine._append([machine._pop()]),
    "APPENDS": lambda machine, _: machine._append(machine._pop_to_mark()),
    "ADDITEMS": lambda machine, _: machine._append(machine._pop_to_mark()),
    "SETITEM": Machine._set_item,
    "SETITEMS": lambda machine, _: machine._set_items(machine._pop_to_mark()),
    "GLOBAL": Machine._global,
    "STACK_GLOBAL": Machine._stack_global,
    "REDUCE": Machine._reduce,
    "NEWOBJ": Machine._reduce,
    "NEWOBJ_EX": Machine._newobj_ex,
    "INST": Machine._inst,
    "OBJ": Machine._obj,
    "BUILD": Machine._build,
    "BINPERSID": Machine._persistent,
    "PUT": Machine._memoize,
    "BINPUT": Machine._memoize,
    "LONG_BINPUT": Machine._memoize,
    "MEMOIZE": lambda machine, _: machine._memoize(len(machine._memo)),
    "GET": lambda machine, index: machine._push(machine._memo[int(index)]),
    "BINGET": lambda machine, index: machine._push(machine._memo[int(index)]),
    "LONG_BINGET": lambda machine, index: machine._push(machine._memo[int(index)]),
    "DUP": lambda machine, _: machine._push(machine._stack[-1]),
    "POP": Machine._pop_any,
    "POP_MARK": lambda machine, _: (machine._pop_to_mark(), None)[1],
}
