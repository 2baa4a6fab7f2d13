"""Report of a compiled program: memory, roofline and the limiting resource."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from magma_jax.plan.chips import GIB, Topology
from magma_jax.plan.compilation import Compiled
from magma_jax.plan.hlo import Collective, Costs, program_costs
from magma_jax.training.run.program import Program
from magma_jax.training.step.flops import StepFlops

TERMS = {
    "compute": "operations of the program / peak",
    "hbm": "bytes read and written / bandwidth of memory",
    "ici": "bytes received / bandwidth of all links",
    "dcn": "bytes received from other slices / bandwidth of the network",
}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind on one device in one step, within a slice or between slices."""

    kind: str
    count: int
    received: float
    in_loops: int
    between_slices: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """Analysis of a program on a topology; values are per device and step unless stated otherwise.

    Attributes:
        seconds: the longest term of the roofline, a lower bound of the step time.
        terms: seconds of compute, memory, links, and of the network if there are several slices, each taken alone.
        mfu: model FLOPs (frozen count) / (devices x peak x seconds); None for decoding.
        from_slices: bytes that a device receives from other slices.
        gradient_bytes: size of the gradients of everything that learns, in the dtype of the weights; 0 for decoding.
        gathers_of_frozen: number of all-gathers of frozen weights inside loops, counted per execution.
        decodes: what a decoding step yields for each row.
    """

    topology: Topology
    what: str
    mesh: dict[str, int]
    batch: int
    compiled: Compiled
    costs: Costs | None
    model_flops: StepFlops | None
    gathers_of_frozen: int
    gradient_bytes: int
    decodes: str

    @property
    def fits(self) -> bool:
        """Whether the program fits in a device's memory."""
        memory = self.compiled.memory
        return memory is not None and memory.total <= self.topology.chip.hbm_bytes

    @property
    def terms(self) -> dict[str, float]:
        if self.costs is None:
            return {}
        chip = self.topology.chip
        terms = {
            "compute": self.costs.flops / chip.peak_flops,
            "hbm": self.costs.hbm_bytes / chip.hbm_bandwidth,
            "ici": self._received(between_slices=False) / chip.ici_bandwidth,
        }
        if self.slices > 1 and chip.dcn_bandwidth:
            terms["dcn"] = self.from_slices / chip.dcn_bandwidth
        return terms

    @property
    def slices(self) -> int:
        return self.topology.slices

    @property
    def from_slices(self) -> float:
        return self._received(between_slices=True)

    def _received(self, *, between_slices: bool) -> float:
        found = self.costs.collectives if self.costs else ()
        return sum(one.received * one.count for one in found if one.between_slices == between_slices)

    @property
    def seconds(self) -> float:
        return max(self.terms.values(), default=0.0)

    @property
    def mfu(self) -> float | None:
        if self.model_flops is None or not self.seconds:
            return None
        return self.model_flops.total / (len(self.topology.devices) * self.topology.chip.peak_flops * self.seconds)

    @property
    def traffic(self) -> list[Traffic]:
        """Collectives by kind, those between slices last."""
        kinds: dict[tuple[bool, str], list[Collective]] = defaultdict(list)
        for collective in self.costs.collectives if self.costs else ():
            kinds[collective.between_slices, collective.kind].append(collective)
        return [
            Traffic(
                kind=kind,
                count=sum(c.count for c in found),
                received=sum(c.count * c.received for c in found),
                in_loops=sum(c.count for c in found if c.loop),
                between_slices=between,
            )
            for (between, kind), found in sorted(kinds.items())
        ]


def make_plan(program: Program, topology: Topology, compiled: Compiled, what: str, batch: int) -> Plan:
    """Computes the costs of a compiled program and relates them to the limits of the chip."""
    slices = topology.slices
    costs = program_costs(compiled.text, len(topology.devices) // slices, slices) if compiled.text else None
    config = program.config
    flops, gradient_bytes = None, 0
    if what == "train":
        gradient_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in program.state.trainable.values())
        shapes = {name: shape for name, (shape, _) in program.family.batch_shapes(program).items()}
        flops = program.family.flops(config.model, program.params, program.labels, shapes, config.loss)
    gathers = frozen_gathers(program, costs)
    return Plan(
        topology=topology,
        what=what,
        mesh=dict(program.mesh.shape),
        batch=batch,
        compiled=compiled,
        costs=costs,
        model_flops=flops,
        gathers_of_frozen=gathers,
        gradient_bytes=gradient_bytes,
        decodes=program.family.decodes,
    )


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values: bytes, seconds, operations."""
    chip, memory = plan.topology.chip, plan.compiled.memory
    return {
        "topology": plan.topology.name,
        "slices": plan.slices,
        "devices": len(plan.topology.devices),
        "what": plan.what,
        "mesh": plan.mesh,
        "batch": plan.batch,
        "fits": plan.fits,
        "refusal": plan.compiled.refusal,
        "hbm_bytes": chip.hbm_bytes,
        "memory": None if memory is None else dataclasses.asdict(memory) | {"total": memory.total},
        "collectives": [dataclasses.asdict(traffic) for traffic in plan.traffic],
        "gathers_of_frozen_in_loops": plan.gathers_of_frozen,
        "gradient_bytes": plan.gradient_bytes,
        "from_slices": plan.from_slices,
        "model_flops": None if plan.model_flops is None else dataclasses.asdict(plan.model_flops),
        "compiled_flops": plan.costs.flops * len(plan.topology.devices) if plan.costs else None,
        "unknown_loops": plan.costs.unknown_loops if plan.costs else None,
        "roofline": {"seconds": plan.seconds, **plan.terms},
        "mfu": plan.mfu,
        "compile_seconds": plan.compiled.seconds,
        "compile_cpu_seconds": plan.compiled.cpu_seconds,
    }


def to_text(plan: Plan) -> str:
    """The plan as text."""
    chip, memory = plan.topology.chip, plan.compiled.memory
    devices = len(plan.topology.devices)
    axes = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    slices = f"{plan.slices} x " if plan.slices > 1 else ""
    lines = [
        f"{plan.what} step, batch {plan.batch}, on {slices}{plan.topology.name}: {devices} devices, mesh {axes}",
        f"compiled in {plan.compiled.seconds:.0f} s ({plan.compiled.cpu_seconds:.0f} s of CPU)",
        "",
    ]
    if memory is None or plan.costs is None:
        return "\n".join([*lines, f"does not fit: {plan.compiled.refusal}"])
    lines.append("memory of each chip, GiB")
    for field in dataclasses.fields(memory):
        lines.append(f"  {field.name:<12}{getattr(memory, field.name) / GIB:8.2f}")
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines += [f"  {'total':<12}{memory.total / GIB:8.2f} of {chip.hbm_bytes / GIB:.0f}: {verdict}", ""]
    lines.append("collectives of each chip in one step")
    for traffic in plan.traffic:
        counts = f"{traffic.count:6}, {traffic.in_loops} of them in loops"
        between = " from other slices" if traffic.between_slices else ""
        lines.append(f"  {traffic.kind:<20}{counts}; {traffic.received / GIB:.3f} GiB received{between}")
    if not plan.traffic:
        lines.append("  none")
    lines += [f"  all-gathers of frozen weights in loops: {plan.gathers_of_frozen}", ""]
    if plan.slices > 1:
        received = plan.from_slices * devices / plan.slices
        lines.append(f"each slice receives {received / GIB:.3f} GiB from others in one step")
        if plan.gradient_bytes:
            size = plan.gradient_bytes / GIB
            lines.append(f"  gradients of what learns, in the dtype of the weights: {size:.3f} GiB")
        lines.append("")
    compiled_flops = plan.costs.flops * devices
    if plan.model_flops is not None:
        flops = plan.model_flops
        lines += [
            f"operations of the whole step, frozen count: {flops.total:.3e}",
            f"  4 N frozen {flops.frozen:.3e}, 6 M trained {flops.trained:.3e}, "
            f"attention {flops.attention:.3e}, encoder {flops.encoder:.3e}",
        ]
    lines += [f"operations that the program runs, remat included: {compiled_flops:.3e}", ""]
    lines.append("roofline: the longest of")
    for name, seconds in plan.terms.items():
        lines.append(f"  {name:<8}{1e3 * seconds:9.1f} ms  {TERMS[name]}")
    if plan.mfu is not None:
        formula = f"frozen count / ({devices} devices x {chip.peak_flops:.3g} x {plan.seconds:.4f} s)"
        lines.append(f"MFU at most {plan.mfu:.1%} = {formula}")
    elif plan.seconds:
        lines.append(f"at most {plan.batch / plan.seconds:.0f} {plan.decodes}/s over all rows")
    if plan.costs.unknown_loops:
        lines.append(f"{plan.costs.unknown_loops} loops of unknown length are counted once")
    return "\n".join(lines)


def frozen_gathers(program: Program, costs: Costs | None) -> int:
    """All-gathers in loops whose result has the shape of a frozen weight, and of nothing that learns."""

    def shapes(params: Mapping[str, Any]) -> set[tuple[int, ...]]:
        # A loop sees one layer of a stack; the compiler may transpose it and adds axes of size one.
        return {_shape(leaf.shape[1:] if "/layers/" in f"/{path}" else leaf.shape) for path, leaf in params.items()}

    frozen = shapes(program.frozen) - shapes(program.state.trainable)
    return sum(
        collective.count
        for collective in (costs.collectives if costs else ())
        if collective.kind == "all-gather" and collective.loop
        # Lengths and ids of a batch may have the shape of a bias.
        if frozen & {_shape(shape.dims) for shape in collective.shapes if shape.dtype not in ("s32", "u32", "pred")}
    )


def _shape(dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(size for size in dims if size > 1))
