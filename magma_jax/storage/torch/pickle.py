"""Reads the pickle of a PyTorch checkpoint without executing it.

A pickle is a program for a small stack machine, and Python's unpickler imports and calls whatever the program names.
This interpreter supports about forty instructions, imports nothing, calls nothing that the file names, and turns a
tensor into an inert record of its location.

Why not ``pickle.Unpickler`` with a strict ``find_class``? Its BUILD sets attributes on the returned objects, and its
memo and byte-array instructions allocate as much memory as the file claims to need.
"""

import io
import math
import pickletools
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from magma_jax.storage.torch.storage import DTYPES, MAX_AXES, STORAGES, LazyTensor, Storage

_STORAGE_DTYPES = {"torch.storage.UntypedStorage": np.dtype(np.uint8)}
for _name, _dtype in STORAGES.items():
    _STORAGE_DTYPES[f"torch.{_name}"] = _STORAGE_DTYPES[f"torch.cuda.{_name}"] = DTYPES[_dtype]
_TENSOR_CLASSES = {"torch.Tensor", "torch.nn.parameter.Parameter"}
_FUNCTIONS = {
    "collections.OrderedDict",
    "builtins.set",
    "__builtin__.set",
    "_codecs.encode",
    "torch.Size",
    "torch.device",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._tensor._rebuild_from_type_v2",
}
# TorchScript's encoding of lists and typed containers.
_SCRIPT_LISTS = {f"torch.jit._pickle.build_{kind}list" for kind in ("int", "double", "bool", "tensor")}
_SCRIPT_FUNCTIONS = {*_SCRIPT_LISTS, "torch.jit._pickle.restore_type_tag"}
# Namespace of TorchScript's compiled classes; their code is elsewhere in the archive.
_SCRIPT_CLASSES = "__torch__."

# Limit on values copied by calls. The largest checkpoints have a few thousand shapes of a few numbers, but a hostile
# file can copy a list of a million values a million times.
_MAX_COPIED = 5_000_000
_SCALARS = (str, int, float, bool, bytes, type(None))


class BadPickle(ValueError):
    """Error in a checkpoint's pickle, in one line without the file's name."""


@dataclass(frozen=True)
class Global:
    """Name of a PyTorch class or function in the file; only the name."""

    name: str


class Attributes(dict):
    """Attributes of a TorchScript object by name, without its class: no methods, nothing to run."""


def unpickle(stream: io.BytesIO, storages: dict[str, Storage], max_nbytes: int = 0, *, script: bool = False) -> object:
    """Reads one pickle from ``stream``, up to and including its last instruction.

    Every referenced storage is added to ``storages``, not yet located. No tensor may be larger than ``max_nbytes``.
    With ``script``, objects of a TorchScript archive are read too, as ``Attributes``. Raises BadPickle for anything
    that a checkpoint of tensors and plain values does not need.
    """
    machine = _Machine(storages, max_nbytes, script)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # invalid backslash escapes in names
            for opcode, argument, _ in pickletools.genops(stream):
                machine.step(opcode.name, argument)
    except BadPickle:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise BadPickle(f"its pickle is damaged or cut short ({error}); fetch the file again") from error
    return machine.result


class _Machine:
    def __init__(self, storages: dict[str, Storage], max_nbytes: int, script: bool):
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[Any, Any] = {}
        self.script = script
        self.storages, self.max_nbytes, self.result = storages, max_nbytes, None
        self.copied = 0

    def step(self, op: str, arg: Any) -> None:
        stack = self.stack
        match op:
            case "PROTO" | "FRAME":
                pass
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "BINFLOAT":
                stack.append(arg)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINSTRING" | "SHORT_BINSTRING":
                stack.append(arg)
            case "BINBYTES" | "SHORT_BINBYTES":
                stack.append(arg)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(op == "NEWTRUE")
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_SET":
                stack.append(set())
            case "BINPUT" | "LONG_BINPUT":
                self.memo[arg] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[arg])
            case "MARK":
                self.marks.append(stack)
                self.stack = []
            case "POP":
                stack.pop()
            case "TUPLE":
                items = self.pop_mark()
                self.stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(reversed([stack.pop() for _ in range(int(op[5:]))])))
            case "APPEND":
                self.fill([stack.pop()], list)
            case "APPENDS":
                self.fill(self.pop_mark(), list)
            case "ADDITEMS":
                self.fill(self.pop_mark(), set)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self.fill([key, value], dict)
            case "SETITEMS":
                self.fill(self.pop_mark(), dict)
            case "GLOBAL":
                stack.append(self.named(".".join(arg.split(" ", 1))))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(self.named(".".join([module, name])))
            case "BINPERSID":
                stack.append(self.storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self.rebuild(function, arguments))
            case "NEWOBJ" if self.script:
                arguments, cls = stack.pop(), stack.pop()
                if not isinstance(cls, Global) or not cls.name.startswith(_SCRIPT_CLASSES) or arguments != ():
                    raise BadPickle("its pickle makes an object that TorchScript does not write")
                stack.append(Attributes())
            case "BUILD":
                self.build(stack.pop())
            case "STOP":
                self.result = stack.pop()
                if stack or self.marks:
                    raise BadPickle("its pickle ends with values left over")
            case _:
                raise BadPickle(f"its pickle uses the instruction {op}, which no file of tensors needs")

    def pop_mark(self) -> list:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def fill(self, items: list, kind: type) -> None:
        container = self.stack[-1]
        if type(container) is not kind:
            raise BadPickle(f"its pickle fills a {type(container).__name__} as if it were a {kind.__name__}")
        # Nested tuples as keys could take forever to hash; checkpoints use strings and numbers.
        keys = items[::2] if kind is dict else items if kind is set else []
        for key in keys:
            if not isinstance(key, _SCALARS):
                raise BadPickle(f"its pickle uses a {type(key).__name__} as a key")
        if kind is dict:
            container.update(zip(keys, items[1::2], strict=True))
        elif kind is set:
            container.update(items)
        else:
            container.extend(items)

    def named(self, name: str) -> Global:
        if self.script and (name in _SCRIPT_FUNCTIONS or name.startswith(_SCRIPT_CLASSES)):
            return Global(name)
        return _allowed(name)

    def build(self, state: object) -> None:
        target = self.stack[-1]
        if type(target) is Attributes:
            if type(state) is not dict or not all(isinstance(name, str) for name in state):
                raise BadPickle(
                    "an object in it has a state that is not a dict of attributes, such as quantized weights"
                )
            target.update(state)
        # Otherwise BUILD only sets the `_metadata` of a state dict, on which the weights do not depend.
        elif type(target) is not dict:
            raise BadPickle("its pickle sets the attributes of an object that is not a state dict")

    def storage(self, pid: object) -> Storage:
        match pid:
            case ("storage", Global(name), str(key), str(), int(numel), *view) if name in _STORAGE_DTYPES:
                pass
            case _:
                raise BadPickle("its pickle refers to something outside itself that is not a tensor storage")
        if any(part is not None for part in view):
            raise BadPickle("it holds views of storages, as PyTorch 0.3 wrote them; save it again")
        dtype = _STORAGE_DTYPES[name]
        known = self.storages.setdefault(key, Storage(key, dtype, _count(numel)))
        if (known.dtype, known.numel) != (dtype, numel):
            raise BadPickle(f"storage {key[:100]!r} is described in two ways that contradict each other")
        return known

    def rebuild(self, function: object, args: object) -> object:
        if not isinstance(function, Global) or type(args) is not tuple:
            raise BadPickle("its pickle calls something that is not a function")
        self.copied += sum(len(item) for item in args if isinstance(item, str | list | tuple))
        if self.copied > _MAX_COPIED:
            raise BadPickle("its pickle copies the same values without end; do not trust this file")
        match function.name, args:
            case "collections.OrderedDict", ():
                return {}
            case "builtins.set" | "__builtin__.set", (list(items),):
                self.stack.append(set())
                self.fill(items, set)
                return self.stack.pop()
            case "torch.Size", (tuple(shape) | list(shape),):
                return tuple(map(_count, shape))
            case "torch.device", (str(kind),):
                return kind
            case "torch.device", (str(kind), int(index)):
                return f"{kind}:{index}"
            case "_codecs.encode", (str(text), "latin1"):  # bytes in protocol 2
                return text.encode("latin1")
            case (
                "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2",
                (Storage() as storage, offset, shape, strides, *rest),
            ):
                return self.tensor(storage, storage.dtype, offset, shape, strides, *rest[2:])
            case (
                "torch._utils._rebuild_tensor_v3",
                (Storage() as storage, offset, shape, strides, _, _, Global(dtype), *rest),
            ):
                dtype = DTYPES[dtype.removeprefix("torch.")]
                return self.tensor(storage, dtype, offset, shape, strides, *rest)
            case "torch._utils._rebuild_parameter", (LazyTensor() as tensor, _, _):
                return tensor
            case "torch._utils._rebuild_parameter_with_state", (LazyTensor() as tensor, _, _, _):
                return tensor
            case (
                "torch._tensor._rebuild_from_type_v2",
                (Global(inner), Global(cls), tuple(inner_args), _),
            ) if cls in _TENSOR_CLASSES and inner.startswith("torch._utils._rebuild_"):
                return self.rebuild(Global(inner), inner_args)
            case name, (list(items),) if name in _SCRIPT_LISTS:
                return items
            case "torch.jit._pickle.restore_type_tag", (list() | dict() as container, str()):
                return container
        raise BadPickle(f"its pickle calls {function.name} with arguments that PyTorch does not write")

    def tensor(self, storage, dtype, offset, shape, strides, flags=None) -> LazyTensor:
        if flags and any(flags.values()):
            raise BadPickle("a tensor waits for its conjugation or negation; resolve_conj() before saving")
        shape, strides, offset = tuple(map(_count, shape)), tuple(map(_count, strides)), _count(offset)
        if len(shape) != len(strides) or len(shape) > MAX_AXES:
            raise BadPickle(f"a tensor has shape {shape} but strides {strides}")
        numel, end = storage.nbytes // dtype.itemsize, offset
        if math.prod(shape):
            end += 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if end > numel:
            raise BadPickle(f"a tensor of shape {shape} reaches element {end} of a storage that has {numel}")
        if math.prod(shape) * dtype.itemsize > self.max_nbytes:
            raise BadPickle(f"a tensor expanded to {shape} exceeds the file; call contiguous() before saving")
        return LazyTensor(storage, dtype, offset, shape, strides)


def _allowed(name: str) -> Global:
    known = name in _STORAGE_DTYPES or name in _TENSOR_CLASSES or name in _FUNCTIONS
    if not known and name.removeprefix("torch.") not in DTYPES:
        raise BadPickle(
            f"its pickle asks for {name[:100]!r}, which is not needed to describe tensors (nothing was run); "
            "if you trust its source, load it with PyTorch and save only its state_dict()"
        )
    return Global(name)


def _count(value: object) -> int:
    # Below 2**63 like PyTorch's own sizes; bool is rejected.
    if type(value) is not int or not 0 <= value < 2**63:
        raise BadPickle("a tensor's size, stride or offset is not a count")
    return value
