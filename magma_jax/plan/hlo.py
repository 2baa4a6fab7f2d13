"""Cost analysis of a compiled program from its HLO text: operations, memory traffic and collectives.

XLA's own ``cost_analysis`` counts a loop body once. Here every computation counts as often as it runs: the trip count
of a ``while`` is the constant in its condition. Of branches the one with most operations counts.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# What the host does with a transfer between slices, by the compiler's name.
BETWEEN_SLICES = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
# Opcodes without memory traffic.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all")

# Fused attention kernels of TPUs by the beginning of their names, and the products of S x S scores in each.
ATTENTION_KERNELS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}

_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<=]*)\](\{[^{}]*\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of a program; ``in_hbm`` is false for arrays in on-chip memory."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> float:
        """Size without padding."""
        digits = re.search(r"\d+", self.dtype)  # as in bf16, s4, f8e4m3fn; pred is a byte, tokens have no size
        bits = int(digits[0]) if digits else 8 * (self.dtype == "pred")
        return math.prod(self.dims) * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: ``name = shapes opcode(operands), attributes``."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    def called(self, role: str) -> str | None:
        """The computation named by an attribute such as ``body=``."""
        match = re.search(rf"\b{role}=%?([\w.\-]+)", self.attributes)
        return match and match[1]


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation.

    Attributes:
        kind: one of ``COLLECTIVES``.
        shapes: its results.
        group: number of participating devices.
        received: bytes that a device receives per execution.
        count: number of executions.
        loop: whether it is inside a loop.
        between_slices: whether it is one between slices, over the data center network.
    """

    kind: str
    shapes: tuple[Shape, ...]
    group: int
    received: float
    count: int
    loop: bool
    between_slices: bool = False


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of one execution of a program on one device.

    Attributes:
        flops: operations of matmuls, convolutions and fused attention kernels.
        hbm_bytes: bytes read from and written to HBM.
        collectives: all collectives.
        unknown_loops: number of loops with unknown trip count, which count once.
    """

    flops: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]
    unknown_loops: int


def program_costs(text: str, devices: int, slices: int = 1) -> Costs:
    """Costs of a compiled program, from the text of its only module, for ``devices`` devices in each of ``slices``.

    The module is that of one slice. A collective between slices is a transfer to the host, which exchanges the data
    with the hosts of the other slices, and one back.
    """
    computations, entry = parse(text)
    flops, traffic, unknown = 0.0, 0.0, 0
    collectives: dict[tuple[str, str, str], Collective] = {}

    @functools.cache
    def flops_of(name: str) -> float:
        return sum(
            _matmul_flops(instruction, computations[name])
            + sum(flops_of(inner) for inner in _fused(instruction, computations))
            for instruction in computations[name].values()
        )

    started = {
        _channel(instruction)
        for computation in computations.values()
        if _starts(computation)
        for instruction in computation.values()
        if _kind(instruction)
    } - {None}
    for name, times, place in _runs(computations, entry, flops_of):
        if times is None:
            unknown += 1
            continue
        computation = computations[name]
        for instruction in computation.values():
            flops += times * _matmul_flops(instruction, computation)
            flops += times * sum(map(flops_of, _fused(instruction, computations)))
            traffic += times * _traffic(instruction, computation, computations)
            for collective, inside in _collectives(instruction, computation, computations):
                # An asynchronous collective appears in every fusion that it overlaps, even in an inner loop, under the
                # same channel; it counts where it starts.
                channel = _channel(collective)
                if channel in started and not _starts(inside):
                    continue
                key = (place, collective.opcode, channel or collective.name)
                collectives[key] = _collective(collective, inside, devices, slices, times, place)
    return Costs(flops, traffic, tuple(collectives.values()), unknown)


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module by name, and the name of the entry computation."""
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    entry = ""
    for line in text.splitlines():
        # "}}" continues an instruction whose kernel metadata have several lines.
        if line.startswith("}") and not line.startswith("}}"):
            current = None
        elif current is None:
            header = _HEADER.match(line)
            if header:
                current = computations[header[2]] = {}
                entry = header[2] if header[1] else entry
        else:
            instruction = _parse_line(line)
            if instruction is not None:
                current[instruction.name] = instruction
    return computations, entry


def _parse_line(line: str) -> Instruction | None:
    name, equals, rest = re.sub(r"/\*.*?\*/", "", line).strip().partition(" = ")
    if not equals:
        return None
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    shapes = tuple(
        Shape(
            dtype,
            tuple(int(size.lstrip("<=")) for size in dims.split(",") if size),
            not re.search(r"S\([1-9]", layout or ""),
        )
        for dtype, dims, layout in _SHAPE.findall(kind)
    )
    arguments = rest[len(opcode) + 1 : close]
    return Instruction(
        name.removeprefix("ROOT ").removeprefix("%"),
        shapes,
        opcode,
        tuple(_NAME.findall(arguments)),
        arguments,
        rest[close + 1 :],
        name.startswith("ROOT "),
    )


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at ``start``."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    raise ValueError(f"unbalanced parentheses in {text!r:.80}")


def _runs(
    computations: dict[str, Computation], entry: str, flops_of: Callable[[str], float]
) -> Iterator[tuple[str, int | None, str]]:
    """Every executed computation, its number of executions (None if unknown), and its loop ("" for none).

    Of the branches of a conditional the one with most operations is executed.
    """

    def total(branch: str) -> float:
        return sum((times or 1) * flops_of(name) for name, times, _ in _runs(computations, branch, flops_of))

    waiting = [(entry, 1, "")]
    while waiting:
        name, times, place = waiting.pop()
        yield name, times, place
        for instruction in computations[name].values():
            if instruction.opcode == "while":
                trips = _trip_count(instruction, computations)
                if trips is None:
                    yield name, None, place
                body = instruction.called("body") or ""
                waiting.append((body, times * (1 if trips is None else trips), f"{place}{body}/"))
            elif instruction.opcode == "call":
                waiting.append((instruction.called("to_apply") or "", times, place))
            elif instruction.opcode == "conditional":
                names = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
                branches = _NAME.findall(names[1]) if names else []
                branches += [c for c in map(instruction.called, ("true_computation", "false_computation")) if c]
                if branches:
                    waiting.append((max(branches, key=total), times, place))


def _trip_count(loop: Instruction, computations: dict[str, Computation]) -> int | None:
    known = re.search(r'"?known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    condition = computations.get(loop.called("condition") or "", {})
    for instruction in condition.values():
        if instruction.opcode == "compare" and "direction=LT" in instruction.attributes:
            limit = condition.get(instruction.operands[1])
            if limit is not None and limit.opcode == "constant" and limit.arguments.isdigit():
                return int(limit.arguments)
        if instruction.opcode == "fusion":
            limits = [condition.get(operand) for operand in instruction.operands]
            numbers = [int(x.arguments) for x in limits if x and x.opcode == "constant" and x.arguments.isdigit()]
            if len(numbers) == 1:
                return numbers[0]
    return None


def _fused(instruction: Instruction, computations: dict[str, Computation]) -> list[str]:
    called = instruction.called("calls") if instruction.opcode != "while" else None
    return [called] if called in computations else []


def _kernel_flops(instruction: Instruction) -> float:
    """Operations of a fused attention kernel: of the blocks of scores that its causal mask leaves."""
    kernel = next((name for name in ATTENTION_KERNELS if instruction.name.startswith(name)), None)
    constraints = re.search(r"operand_layout_constraints=\{(.*?)\}, frontend", instruction.attributes + ", frontend")
    if kernel is None or constraints is None:
        return 0.0
    operands = [
        (dtype, [int(size) for size in dims.split(",") if size]) for dtype, dims, _ in _SHAPE.findall(constraints[1])
    ]
    blocks = next((dims[-1] for dtype, dims in operands if dtype == "s8"), 1)
    floats = [dims for dtype, dims in operands if "f" in dtype and len(dims) >= 3]  # queries and keys come first
    if len(floats) < 2:
        return 0.0
    *rows, queries, width = floats[0]
    scores = math.prod(rows) * queries * floats[1][-2] * (blocks + 1) / (2 * blocks)
    return 2.0 * ATTENTION_KERNELS[kernel] * scores * width


def _matmul_flops(instruction: Instruction, computation: Computation) -> float:
    if instruction.opcode == "custom-call":
        return _kernel_flops(instruction)
    if instruction.opcode == "dot":
        left = computation[instruction.operands[0]].shapes[0].dims
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        contracted = math.prod(left[int(axis)] for axis in axes[1].split(",") if axis) if axes else 1
        return 2.0 * math.prod(instruction.shapes[0].dims) * contracted
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if instruction.opcode != "convolution" or labels is None:
        return 0.0
    sides = [computation[operand].shapes[0].dims for operand in instruction.operands]
    left, kernel, out = (
        dict(zip(names, dims, strict=True))
        for names, dims in zip(labels.groups(), (*sides, instruction.shapes[0].dims), strict=True)
    )
    found = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    window = {key: values.split("x") for key, values in (f.split("=") for f in (found[1].split() if found else ()))}
    operations = 2.0 * out["b"] * out["f"] * kernel["i"]
    for axis in sorted(set(out) - {"b", "f"}):
        stride, left_dilation, right_dilation = (
            int(window[key][int(axis)]) if key in window else 1 for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(window["pad"][int(axis)].split("_")[0]) if "pad" in window else 0
        position = np.arange(out[axis])[:, None] * stride - low + np.arange(kernel[axis]) * right_dilation
        # Padding and the zeros of a dilated side do not count. The TPU compiler writes batched matmuls as convolutions
        # that consist almost entirely of them.
        inside = (position >= 0) & (position <= (left[axis] - 1) * left_dilation) & (position % left_dilation == 0)
        operations *= inside.sum()
    return float(operations)


def _traffic(instruction: Instruction, computation: Computation, computations: dict[str, Computation]) -> float:
    """Bytes that an instruction outside fusions reads from and writes to memory."""
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith("-done"):
        return 0.0
    operands = [computation[name].shapes for name in instruction.operands if name in computation]
    results = _results(instruction)
    if opcode.removesuffix("-start") in ("dynamic-slice", "slice", "gather"):
        return _hbm(results) + sum(shape.bytes for shape in results if operands[0][0].in_hbm)
    if opcode == "dynamic-update-slice":
        return 2 * _hbm(operands[1])
    fused = _fused(instruction, computations)
    if opcode == "fusion" and fused:
        return _fusion_traffic(instruction, operands, computations[fused[0]], computations)
    return sum(map(_hbm, operands)) + _hbm(results)


def _results(instruction: Instruction) -> tuple[Shape, ...]:
    """Results of an instruction, or of the asynchronous operation that it starts."""
    if instruction.opcode == "send":  # (operand, context, token)
        return ()
    if instruction.opcode == "copy-start":  # (destination, source, context)
        return instruction.shapes[:1]
    if instruction.opcode.endswith("-start"):  # (operands, results, contexts)
        count = len(instruction.operands)
        return instruction.shapes[count : 2 * count]
    return instruction.shapes


def _fusion_traffic(
    instruction: Instruction,
    operands: list[tuple[Shape, ...]],
    fused: Computation,
    computations: dict[str, Computation],
) -> float:
    """``_traffic`` of a fusion; an operand that is only sliced counts its slices, one updated in place its update.

    A collective that overlaps several fusions passes its buffers from one to the next in place. Its reads and writes
    count where it starts.
    """
    total = 0.0
    passed = _passed_on(instruction, fused)
    for index, shapes in enumerate(operands):
        parameter = _parameter(fused, index)
        if parameter is not None and _hbm(shapes):
            total += min(_hbm(shapes), _read(parameter, fused, computations))
    root = next((inner for inner in fused.values() if inner.is_root), None)
    if root is None:
        return total
    results = root.operands if root.opcode == "tuple" else (root.name,) * len(instruction.shapes)
    for index, (name, shape) in enumerate(zip(results, instruction.shapes, strict=False)):
        if index in passed:
            continue
        written = _source(name, fused)
        if written.opcode == "dynamic-update-slice" and written.operands[1] in fused:
            total += sum(part.bytes for part in fused[written.operands[1]].shapes) * shape.in_hbm
        else:
            total += _hbm((shape,))
    return total


def _passed_on(instruction: Instruction, fused: Computation) -> set[int]:
    """Results of a fusion that alias an operand's buffer, because a collective overlaps it."""
    if not any(map(_is_collective, fused.values())):
        return set()
    return {int(index or 0) for index in re.findall(r"\{(\d*)\}: \(\d+, \{\}\)", instruction.attributes)}


def _is_collective(instruction: Instruction) -> bool:
    return _kind(instruction) is not None or '"AsyncCollective' in instruction.attributes


def _parameter(fused: Computation, index: int) -> Instruction | None:
    found = (inner for inner in fused.values() if inner.opcode == "parameter" and int(inner.arguments) == index)
    return next(found, None)


def _source(name: str, fused: Computation) -> Instruction:
    """The instruction of a name, skipping bitcasts."""
    return _source(fused[name].operands[0], fused) if fused[name].opcode == "bitcast" else fused[name]


def _read(parameter: Instruction, fused: Computation, computations: dict[str, Computation]) -> float:
    """Bytes of a parameter that a fusion and its nested fusions read."""
    total = 0.0
    for user in fused.values():
        at = [i for i, name in enumerate(user.operands) if name in fused and _source(name, fused) is parameter]
        inner = _fused(user, computations)
        if not at or user.opcode in ("bitcast", "tuple") or (_is_collective(user) and not _starts(fused)):
            continue
        if _only_rewrites(user, computations):
            # Computed on demand: reads as many elements as its users read of its result, in this parameter's dtype.
            read = _read(user, fused, computations)
            total += read * parameter.shapes[0].bytes / user.shapes[0].bytes
            continue
        if user.opcode in ("dynamic-slice", "slice", "gather") and at == [0]:
            total += sum(shape.bytes for shape in user.shapes)
        elif user.opcode == "dynamic-update-slice" and at == [0]:
            pass  # written in place
        elif inner:
            parameters = (_parameter(computations[inner[0]], i) for i in at)
            total += sum(_read(one, computations[inner[0]], computations) for one in parameters if one is not None)
        else:
            return math.inf  # the whole parameter
    return total


def _only_rewrites(instruction: Instruction, computations: dict[str, Computation]) -> bool:
    """Whether an instruction or fusion only changes dtype or layout of its single operand."""
    if len(instruction.operands) != 1:
        return False
    if instruction.opcode in ("convert", "copy"):
        return True
    inner = _fused(instruction, computations)
    opcodes = {one.opcode for one in computations[inner[0]].values()} if inner else set()
    return {"parameter"} < opcodes <= {"parameter", "convert", "copy", "bitcast"}


def _hbm(shapes: tuple[Shape, ...]) -> float:
    return sum(shape.bytes for shape in shapes if shape.in_hbm)


def _kind(instruction: Instruction) -> str | None:
    name = instruction.opcode.removesuffix("-start")
    return name if name in COLLECTIVES else _kind_between_slices(instruction)


def _kind_between_slices(instruction: Instruction) -> str | None:
    """The collective that a transfer to the host is part of; None for anything else, the way back included."""
    named = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    return BETWEEN_SLICES[named[1]] if named and instruction.opcode == "send" else None


def _collectives(
    instruction: Instruction, computation: Computation, computations: dict[str, Computation]
) -> Iterator[tuple[Instruction, Computation]]:
    """The collectives in an instruction, itself included, each with its computation."""
    if _kind(instruction):
        yield instruction, computation
    for name in _fused(instruction, computations):
        for inner in computations[name].values():
            yield from _collectives(inner, computations[name], computations)


def _channel(instruction: Instruction) -> str | None:
    if instruction.opcode == "send":  # numbered apart from collectives
        return None
    match = re.search(r"channel_id=(\d+)", instruction.attributes)
    return match and match[1]


def _starts(computation: Computation) -> bool:
    return any('"AsyncCollectiveStart"' in instruction.attributes for instruction in computation.values())


def _collective(
    instruction: Instruction, computation: Computation, devices: int, slices: int, times: int, place: str
) -> Collective:
    kind = _kind(instruction) or ""
    sent = sum(shape.bytes for name in instruction.operands for shape in computation[name].shapes)
    between = _kind_between_slices(instruction) is not None
    group = slices if between else _group_size(instruction.attributes, devices)
    received = {
        "all-gather": sent * (group - 1),
        "all-reduce": 2 * sent * (group - 1) / group,
        "collective-permute": sent,
    }.get(kind, sent * (group - 1) / group)
    return Collective(
        kind=kind,
        shapes=_results(instruction),
        group=group,
        received=received,
        count=times,
        loop=place != "",
        between_slices=between,
    )


def _group_size(attributes: str, devices: int) -> int:
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes)
    if iota:
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    return len(listed[1].split(",")) if listed else devices
