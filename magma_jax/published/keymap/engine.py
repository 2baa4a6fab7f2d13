"""Renames tensors by a rule table, in both directions: a foreign checkpoint's keys <-> our parameter paths.

Foreign keys are dotted (``h.3.ln_1.weight``), our paths have slashes (``layers/ln_1/weight``). Patterns are literal
text with placeholders: ``{layer}`` is an integer, ``{rest...}`` is one or more names with their separators ("." in a
foreign key is "/" in our path). For example::

    Rule("h.{layer}.ln_1.weight", "layers/ln_1/weight", stack="layer")
    Rule("wte.weight", "wte/weight")
    Alias("transformer.{layer}.{rest...}", "h.{layer}.{rest...}")
    Ignored("h.{layer}.attn.sin")

Our path lacks ``layer``, so ``h.0.ln_1.weight``, ``h.1.ln_1.weight``, ... become one array with the layer as its
leading axis. Matching loads nothing: the results are ``Deferred``.

Reading and writing account for every key; one ``KeyMapError`` lists all mismatches.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from magma_jax.foreign import shown
from magma_jax.published.keymap import patterns as patterns
from magma_jax.published.keymap.report import KeyMapError, Report, describe
from magma_jax.published.keymap.rules import Alias, Ignored, Rule, Table, check_table, match_theirs, rules_for
from magma_jax.storage.deferred import Deferred, Tensor, alias_key, read_array
from magma_jax.storage.deferred import read_row as read_one_row

__all__ = ["Alias", "Ignored", "KeyMapError", "Rule", "Table", "check_table", "to_ours", "to_theirs"]


def to_ours(
    table: Table, foreign: Mapping[str, Tensor], target: Mapping[str, Tensor], *, allow_cast: bool = True
) -> dict[str, Deferred]:
    """Maps foreign tensors to our paths; the arrays of all paths of ``target``, unread.

    ``foreign``: key -> tensor with ``shape`` and ``dtype``, and ``read()`` unless it is an array. ``target``: path ->
    anything with ``shape`` and ``dtype`` (``jax.ShapeDtypeStruct``). Arrays get the target's dtype: ``allow_cast``
    permits casts between floating types and between integer types, but a value that the new type cannot hold raises
    KeyMapError when it is read. Nothing is read yet, except aliases that do not share their storage, which are
    compared. Raises KeyMapError.
    """
    report = Report()
    found: dict[str, dict[int | None, tuple[Rule, str]]] = defaultdict(dict)  # path -> row -> (rule, key)
    for key, tensor in foreign.items():
        name = key
        matches = _matches(table, key)
        if len(matches) == 1 and isinstance(matches[0][0], Alias):
            name = patterns.fill(matches[0][0].canonical, matches[0][1])
            if name not in foreign:  # libraries may keep either name of a tied tensor
                matches = _matches(table, name)
        match matches:
            case []:
                report.add("keys that no rule knows", f"{key}  {describe(tensor)}")
            case [(Alias(), _)]:
                _check_alias(key, name, foreign, report)
            case [(Ignored(), _)]:
                pass
            case [(Rule() as rule, values)]:
                path = patterns.fill(rule.ours, values, "/")
                row = None if rule.stack is None else int(values[rule.stack]) - rule.start
                if row in found[path]:
                    report.add("two keys for one parameter", f"{path}  {found[path][row][1]}  {key}")
                found[path][row] = rule, key
            case matches:
                entries = [entry.theirs for entry, _ in matches]
                report.add("keys that several entries match", f"{key}  {entries}")

    planned = {}
    for path, struct in target.items():
        rules = [rule for rule, _ in rules_for(table, path)]
        if path in found:
            planned[path] = _our_array(path, struct, found.pop(path), foreign, allow_cast, report)
        elif struct.shape[:1] == (0,) and any(rule.stack for rule in rules):
            # A stack without layers needs no tensors.
            planned[path] = _our_array(path, struct, {}, foreign, allow_cast, report)
        else:
            wanted = " or ".join(rule.theirs for rule in rules) or "(no rule leads here)"
            report.add("parameters without a tensor", f"{path}  {describe(struct)}  <- {wanted}")
    for path, rows in found.items():
        for _, key in rows.values():
            report.add("keys whose parameter the model lacks", f"{key}  {describe(foreign[key])}  -> {path}")
    report.raise_if_any()
    return planned


def to_theirs(table: Table, ours: Mapping[str, Tensor], *, dtype: np.dtype | type | None = None) -> dict[str, Deferred]:
    """Maps our parameters to foreign tensors, recomputed tensors and aliases included, unread.

    ``ours``: path -> array of any library, or tensor with ``shape``, ``dtype`` and ``read()``. Floating tensors are
    cast to ``dtype`` if it is given; a value that it cannot hold raises KeyMapError when it is read. int32 becomes
    int64, PyTorch's integer (JAX has no int64 by default). Both names of a tied tensor get the same ``Deferred``.
    Raises KeyMapError.
    """
    report = Report()
    planned: dict[str, Deferred] = {}

    def put(key: str, tensor: Deferred | None) -> None:
        if key in planned:
            report.add("keys that several entries write", key)
        if tensor is None:
            report.add("wrong shapes", f"{key}  its rule cannot transform the parameter")
        else:
            planned[key] = tensor

    for path, array in ours.items():
        match rules_for(table, path):
            case []:
                report.add("parameters that no rule knows", f"{path}  {describe(array)}")
            case [(Rule(stack=None) as rule, values)]:
                key = patterns.fill(rule.theirs, values)
                put(key, _their_tensor(key, rule, array, None, dtype))
            case [(Rule(stack=str(stack)) as rule, values)] if array.shape:
                for row in range(array.shape[0]):
                    key = patterns.fill(rule.theirs, values | {stack: str(rule.start + row)})
                    put(key, _their_tensor(key, rule, array, row, dtype))
            case [(rule, _)]:
                report.add("wrong shapes", f"{path}  {describe(array)}, but it should be a stack")
            case matches:
                rules = [rule.ours for rule, _ in matches]
                report.add("parameters that several rules match", f"{path}  {rules}")

    for entry in table:
        if isinstance(entry, Ignored) and entry.beside is not None:
            for values in _matching(planned, entry.beside):
                put(patterns.fill(entry.theirs, values), _recomputed(entry, values))
    for entry in table:
        if isinstance(entry, Alias):
            for values in _matching(planned, entry.canonical):
                put(patterns.fill(entry.theirs, values), planned[patterns.fill(entry.canonical, values)])
    report.raise_if_any()
    return planned


def _matches(table: Table, key: str) -> list[tuple[Rule | Alias | Ignored, dict[str, str]]]:
    return [(entry, values) for entry in table if (values := match_theirs(entry, key)) is not None]


def _matching(keys: Mapping[str, object], pattern: str) -> list[dict[str, str]]:
    return [values for key in keys if (values := patterns.match(pattern, key)) is not None]


def _check_alias(key: str, canonical: str, foreign: Mapping[str, Tensor], report: Report) -> None:
    if canonical not in foreign:  # and is itself an alias
        report.add("aliases of nothing", f"{key} = {canonical}")
        return
    tensor, original = foreign[key], foreign[canonical]
    if alias_key(tensor) == alias_key(original):
        return
    if (tensor.shape, tensor.dtype) != (original.shape, original.dtype) or not np.array_equal(
        _bits(read_array(tensor)), _bits(read_array(original))
    ):
        report.add("aliases that differ", f"{key}  {describe(tensor)}  = {canonical}  {describe(original)}")


def _bits(array: np.ndarray) -> np.ndarray:
    # Compared as bytes: NaN equals itself, and 0.0 differs from -0.0.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _our_array(
    path: str,
    struct: Tensor,
    rows: Mapping[int | None, tuple[Rule, str]],
    foreign: Mapping[str, Tensor],
    allow_cast: bool,
    report: Report,
) -> Deferred:
    shape, dtype = tuple(struct.shape), np.dtype(struct.dtype)
    stacked = None not in rows
    if not stacked and len(rows) > 1:
        report.add("two keys for one parameter", f"{path}  {[key for _, key in rows.values()]}")
    if stacked:
        length = shape[0] if shape else 0
        numbers = {row for row in rows if row is not None}
        gaps, surplus = sorted(set(range(length)) - numbers), sorted(numbers - set(range(length)))
        if gaps or surplus:
            rule = next(iter(rows.values()))[0]
            line = f"{path}  {rule.theirs}  {length} from {rule.start} on are needed"
            line += f", missing {shown([rule.start + row for row in gaps])}" if gaps else ""
            line += f", too many {shown([rule.start + row for row in surplus])}" if surplus else ""
            report.add("gaps in stacks", line)
    wanted = shape[1:] if stacked else shape
    for rule, key in rows.values():
        tensor = foreign[key]
        if _shape_after(rule.to_ours, tensor.shape) != wanted:
            report.add("wrong shapes", f"{key}  {describe(tensor)}  -> {path}  {list(wanted)}")
        if tensor.dtype != dtype and not (allow_cast and _kind(tensor.dtype) == _kind(dtype) != "other"):
            report.add("wrong dtypes", f"{key}  {describe(tensor)}  -> {path}  {dtype.name}")

    def read_row(row: int | None) -> np.ndarray:
        rule, key = rows[row]
        array = read_array(foreign[key])
        return _cast(rule.to_ours(array) if rule.to_ours else array, dtype, key)

    def read_stack() -> np.ndarray:
        stack = np.empty(shape, dtype)
        for row in rows:
            stack[row] = read_row(row)
        return stack

    if not stacked:
        return Deferred(shape, dtype, lambda: read_row(None), position=_position(foreign, rows))
    layers = tuple(
        Deferred(wanted, dtype, functools.partial(read_row, row), position=_position(foreign, {row: rows[row]}))
        for row in sorted(row for row in rows if row is not None)
    )
    return Deferred(shape, dtype, read_stack, layers, _position(foreign, rows))


def _position(foreign: Mapping[str, Tensor], rows: Mapping[int | None, tuple[Rule, str]]) -> tuple[str, int]:
    return min((getattr(foreign[key], "position", ("", 0)) for _, key in rows.values()), default=("", 0))


def _their_tensor(key: str, rule: Rule, array: Tensor, row: int | None, dtype: Any) -> Deferred | None:
    """Tensor to write; None if the rule cannot transform the parameter."""
    shape, stored = array.shape if row is None else array.shape[1:], np.dtype(array.dtype)
    if dtype is not None and _kind(stored) == "float":
        stored = np.dtype(dtype)
    elif stored == np.int32:
        stored = np.dtype(np.int64)

    def read() -> np.ndarray:
        tensor = read_array(array) if row is None else read_one_row(array, row)
        return _cast(rule.to_theirs(tensor) if rule.to_theirs else tensor, stored, key)

    changed = _shape_after(rule.to_theirs, shape)
    return None if changed is None else Deferred(changed, stored, read)


def _recomputed(entry: Ignored, values: Mapping[str, str]) -> Deferred:
    assert entry.recompute is not None  # required together with `beside`
    tensor = entry.recompute(**{name: int(v) if v.isdigit() else v for name, v in values.items()})
    if isinstance(tensor, Deferred):
        return tensor
    return Deferred(tuple(tensor.shape), np.dtype(tensor.dtype), lambda: np.asarray(tensor))


def _shape_after(transform: Callable | None, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Shape after the transform, None if it fails; inferred from a dummy array without memory."""
    if transform is None:
        return tuple(shape)
    try:
        return transform(np.broadcast_to(np.zeros(()), shape)).shape
    except ValueError:
        return None


def _kind(dtype: Any) -> str:
    # By name: bfloat16 and float8 are not NumPy floating types.
    name = np.dtype(dtype).name
    return "float" if "float" in name else "integer" if "int" in name else "other"


def _cast(array: np.ndarray, dtype: np.dtype, key: str) -> np.ndarray:
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if _kind(dtype) != "float":
        holds = np.array_equal(cast, array)
    elif ml_dtypes.finfo(dtype).max >= ml_dtypes.finfo(array.dtype).max:
        holds = True  # wider range: no overflow
    else:
        holds = np.array_equal(np.isfinite(cast), np.isfinite(array))
    if not holds:
        raise KeyMapError(f"{key}: {dtype.name} cannot hold a value of this {array.dtype.name} tensor")
    return cast
