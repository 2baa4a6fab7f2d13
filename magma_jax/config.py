"""Configs: converts an ``ml_collections.ConfigDict`` or JSON to frozen dataclasses; unknown keys raise.

Unions of dataclasses are discriminated by their ``kind`` field.
"""

import ast
import dataclasses
import importlib.util
import inspect
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import ml_collections

from magma_jax.foreign import shown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

# Fields by name, as in a config file; ``ConfigDict`` is not a ``Mapping``.
Settings: TypeAlias = Mapping | ml_collections.ConfigDict

FLOATS = ("float32", "bfloat16", "float16", "float64")
# Language model dtypes that mean quantized matrices, see ``nn.quantized``.
QUANTIZED = ("int8", "int4")


class ConfigError(ValueError):
    """A config that names an unknown key or holds a value of the wrong type."""


def from_dict(cls: type[T], values: Settings, where: str = "config", types: Mapping[str, Any] | None = None) -> T:
    """Builds the dataclass ``cls`` from nested mappings; absent keys keep their defaults.

    Args:
        cls: a frozen dataclass.
        values: field values by name.
        where: name of the config in error messages.
        types: types by field name, overriding the annotations of ``cls``.

    Raises:
        ConfigError: an unknown key, a missing required key or a wrong type; the message names its full path.
    """
    if not isinstance(values, Settings):
        raise ConfigError(f"{where}: expected a mapping with fields of {cls.__name__}, got {shown(values)}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(map(str, set(values) - set(fields)))
    if unknown:
        names = ", ".join(f"{where}.{key}" for key in unknown[:20])
        raise ConfigError(f"unknown key {names}; {cls.__name__} has: {', '.join(fields)}")
    hints = typing.get_type_hints(cls) | dict(types or {})
    arguments = {key: _convert(hints[key], values[key], f"{where}.{key}") for key in values}
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def from_union(classes: Sequence[type], values: Settings, where: str = "config") -> Any:
    """Builds the dataclass whose ``kind`` equals ``values["kind"]``, see ``from_dict``.

    Raises:
        ConfigError: an unknown kind, or as ``from_dict``.
    """
    kinds = {next(f.default for f in dataclasses.fields(c) if f.name == "kind"): c for c in classes}
    if values.get("kind") not in list(kinds):
        raise ConfigError(f"{where}.kind: {shown(values.get('kind'))} is not one of {', '.join(map(str, kinds))}")
    return from_dict(kinds[values["kind"]], values, where)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dict of plain JSON values; the inverse of ``from_dict``."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def settings(config: Any) -> list[str]:
    """All settings of a config as ``KEY=VALUE`` strings for ``apply_overrides``."""

    def lines(value: Any, name: str) -> Iterator[str]:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from lines(inner, f"{name}.{key}" if name else key)
        else:
            yield f"{name}={value if isinstance(value, str) else repr(value)}"

    return list(lines(to_dict(config), ""))


def check_sizes(config: Any, *names: str) -> None:
    """Raises ValueError unless the named fields are integers in [1, 2**31), or tuples of them."""
    for name in names:
        value = getattr(config, name)
        for size in value if isinstance(value, tuple) else (value,):
            if not 1 <= size < 2**31:
                raise ValueError(f"{name} must be at least 1 and below 2**31, got {shown(value)}")


def check_dtype(name: str, dtype: str, others: Sequence[str] = ()) -> None:
    """Raises ValueError unless ``dtype`` is one of ``FLOATS`` or ``others``."""
    if dtype not in (*FLOATS, *others):
        raise ValueError(f"{name} {shown(dtype)} is none of {', '.join((*FLOATS, *others))}")


def load_config_file(path: str | Path) -> ml_collections.ConfigDict:
    """Executes a config file and returns the result of its ``get_config()``.

    ``FILE.py:NAME`` gives ``get_config("NAME")``: one file may describe several runs. Without a NAME the function's
    default applies, if it has one.

    Raises:
        ConfigError: no such file, no ``get_config``, or a NAME that the file does not know.
    """
    file, name = _split_name(path)
    if not file.is_file():
        raise ConfigError(f"{path}: no such config file; see configs/ for those that ship")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: not a Python file; a config is a .py file with a function get_config()")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path}: has no function get_config()")
    parameters = list(inspect.signature(module.get_config).parameters.values())
    takes_name = bool(parameters)
    if takes_name and name is None and parameters[0].default is not parameters[0].empty:
        return module.get_config()
    if takes_name and name is None:
        raise ConfigError(f"{path}: describes several runs; choose one: {path}:NAME, {module.get_config.__doc__}")
    if name is not None and not takes_name:
        raise ConfigError(f"{path}: {file.name} describes one run; leave out :{name}")
    try:
        return module.get_config(name) if takes_name else module.get_config()
    except KeyError as error:
        raise ConfigError(f"{path}: unknown run {error}; {module.get_config.__doc__}") from None


def config_name(path: str | Path) -> str:
    """Run name of a config: ``magma_v1`` for configs/magma_v1.py, ``file-NAME`` for file.py:NAME."""
    file, name = _split_name(path)
    return file.stem if name is None else f"{file.stem}-{name}"


def _split_name(path: str | Path) -> tuple[Path, str | None]:
    head, colon, name = str(path).rpartition(".py:")
    return (Path(head + ".py"), name) if colon else (Path(path), None)


def apply_overrides(config: ml_collections.ConfigDict, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """Returns the config with ``KEY=VALUE`` overrides; keys are dotted, values are Python literals or text.

    Raises:
        ConfigError: no ``=``, or a parent key that is not a mapping.
    """
    config = ml_collections.ConfigDict(config.to_dict())
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {override}: expected KEY=VALUE")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        *parents, name = key.split(".")
        node = config
        for parent in parents:
            if parent not in node:
                node[parent] = ml_collections.ConfigDict()
            node = node[parent]
            if not isinstance(node, ml_collections.ConfigDict):
                raise ConfigError(f"--set {override}: {parent} is not a mapping")
        # A string setting stays a string: "{}" may be a prompt.
        if isinstance(node.get(name), str) and (isinstance(value, int | float | set) or value == {}):
            value = text
        with node.ignore_type():  # from_dict checks types and names the key
            node[name] = value
    return config


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is typing.Literal:
        if value not in args:
            raise ConfigError(f"{where}: {shown(value)} is not one of {', '.join(map(repr, args))}")
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: expected a list, got {shown(value)}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise ConfigError(f"{where}: expected {len(kinds)} values, got {len(value)}")
        return tuple(
            _convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is dict or hint is dict:
        if not isinstance(value, Settings):
            raise ConfigError(f"{where}: expected a mapping, got {shown(value)}")
        return {k: _convert(args[1], v, f"{where}.{k}") if args else v for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{where}: {shown(value)} is too large for a float") from None
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where}: expected {hint.__name__}, got {shown(value)}")
    return value


def _convert_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    classes = [option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)]
    if isinstance(value, tuple(classes)):
        return value
    if classes and isinstance(value, Settings):
        if len(classes) == 1:
            return from_dict(classes[0], value, where)
        return from_union(classes, value, where)
    errors = []
    for option in options:
        if option is type(None) or option in classes:
            continue
        try:
            return _convert(option, value, where)
        except ConfigError as error:
            errors.append(str(error))
    raise ConfigError(errors[0] if errors else f"{where}: {shown(value)} does not fit")
