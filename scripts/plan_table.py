"""Plans the full-size models on several topologies and writes the tables of docs/plans.md.

python scripts/plan_table.py                   # plans what docs/plans.json lacks: minutes each
python scripts/plan_table.py --again v5e:4x4   # plans the rows of this topology again
python scripts/plan_table.py --tables slices --again v5e:4x4 v6e:4x4   # of these tables alone
python scripts/plan_table.py --render          # only writes the tables
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "docs/plans.json", ROOT / "docs/plans.md"
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Case:
    """One plan: config overrides, rows to decode (for plans of decoding), JAX's compiler effort, config file."""

    topology: str
    values: tuple[str, ...] = ()
    rows: int | None = None
    effort: float = 0
    config: str = "magma_v2"
    slots: int | None = 2048

    @property
    def options(self) -> list[str]:
        """Options of ``python -m magma_jax.plan``."""
        slots = ["--slots", str(self.slots)] if self.slots else []
        generate = ["--what", "generate", *slots, "--batch", str(self.rows)] if self.rows else []
        return ["--topology", self.topology, *generate, *(["--set", *self.values] if self.values else [])]

    @property
    def key(self) -> str:
        """Key in docs/plans.json."""
        model = "" if self.config == Case.config else f"{self.config} "
        return model + " ".join(self.options) + (f" (effort {self.effort:g})" if self.effort else "")


TODAY = ("llama-3.1-8b", "qwen3-8b", "gemma-3-12b")
SHARDED, REPLICATED = "mesh.frozen=sharded", "mesh.frozen=replicated"
TABLES = {
    "train": [
        Case("v5e:4x4", ("mesh.fsdp=16", SHARDED)),
        Case("v5e:8x8", ("mesh.fsdp=64", SHARDED)),
        Case("v4:2x4x4", ("mesh.fsdp=32", REPLICATED)),
        Case("v5p:2x2x4", ("mesh.fsdp=16", REPLICATED)),
        Case("v6e:4x4", ("mesh.fsdp=16", REPLICATED)),
    ],
    "tried": [
        Case("v5p:2x2x4", ("mesh.fsdp=16", REPLICATED, "loss.remat=dots")),
        Case("v6e:4x4", ("mesh.fsdp=16", REPLICATED), effort=-1),
    ],
    "slices": [
        Case("v5e:4x4", ("mesh.slice=2", "mesh.fsdp=16", SHARDED), effort=-1),
        Case("v6e:4x4", ("mesh.slice=4", "mesh.fsdp=16", REPLICATED), effort=-1),
    ],
    "generate": [
        Case("v5e:1x1", ("model.lm.dtype=int8",), 8),
        Case("v5e:2x2", ("mesh.model=4",), 8),
        Case("v5p:1x1x1", (), 8),
        Case("v6e:1x1", (), 8),
        Case("v6e:2x2", ("mesh.model=4",), 64),
    ],
    "magvlt": [
        Case(topology, (f"mesh.fsdp={devices}", "loss.task_weights=(1.0,0.0,0.0)"), effort=-1, config=config)
        for config in ("magvlt_base", "magvlt_large")
        for topology, devices in (("v5e:4x4", 16), ("v5p:2x2x4", 16), ("v6e:4x4", 16), ("tpu7x:2x2x2", 16))
    ],
    "magvlt drawing": [
        Case(topology, ("model.dtype=bfloat16",), rows=64, effort=-1, config=config, slots=None)
        for config in ("magvlt_base", "magvlt_large")
        for topology in ("v5e:1x1", "v6e:1x1")
    ],
    "cm3leon": [
        Case(topology, (f"mesh.fsdp={devices}", f"accumulate={accumulate}"), effort=-1, config=config)
        for config, accumulate in (("cm3leon_350m", 4), ("cm3leon_760m", 4), ("cm3leon_7b", 8))
        for topology, devices in (("v5e:8x8", 64), ("v5p:4x4x4", 64), ("v6e:8x8", 64), ("tpu7x:2x2x4", 32))
    ],
    "today": [
        Case(topology, (f"mesh.fsdp={devices}",), effort=-1, config=f"magma_today:{name}")
        for name in TODAY
        for topology, devices in (("v5e:4x4", 16), ("v5p:2x2x2", 8), ("v6e:4x4", 16), ("tpu7x:2x2x1", 8))
    ],
    "today generate": [
        Case("v5e:1x1", (f"model.lm.dtype={dtype}",), rows=1, effort=-1, config=f"magma_today:{name}", slots=1024)
        for name in TODAY
        for dtype in ("int8", "bfloat16")
    ],
    "cm3leon drawing": [
        Case(topology, ("model.dtype=bfloat16", *mesh), rows=rows, effort=-1, config="cm3leon_7b", slots=None)
        for topology, mesh, rows in (
            ("v5e:2x2", ("mesh.model=4",), 8),
            ("v5p:1x1x1", (), 8),
            ("v6e:1x1", (), 2),
            ("v6e:2x2", ("mesh.model=4",), 16),
        )
    ],
}
# Steps of an image, and the rows that one takes with guidance: MAGVLT's step runs both passes itself.
STEPS = {"magvlt": (10, 1), "cm3leon": (1024, 2)}


def main() -> None:
    """Computes missing plans and writes the tables."""
    parser = argparse.ArgumentParser(description="Plans the full-size models and writes the tables of docs/plans.md.")
    parser.add_argument("--render", action="store_true", help="only write the tables")
    parser.add_argument("--again", nargs="*", default=[], metavar="TOPOLOGY", help="plan these again")
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=TABLES, help="plan rows of these alone")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for case in [case for name in arguments.tables for case in TABLES[name]]:
        if arguments.render or (case.key in results and case.topology not in arguments.again):
            continue
        print(case.key, file=sys.stderr, flush=True)
        command = [
            sys.executable,
            "-m",
            "magma_jax.plan",
            "--config",
            "configs/{}.py{}{}".format(*case.config.partition(":")),
            "--json",
            *case.options,
        ]
        effort = {"JAX_EXEC_TIME_OPTIMIZATION_EFFORT": str(case.effort)}
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | effort, stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode not in (0, 1):
            sys.exit(f"plan_table.py: {' '.join(command)} failed")
        results[case.key] = json.loads(done.stdout)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    page = PAGE.read_text()
    for name, cases in TABLES.items():
        rows = [(case, results[case.key]) for case in cases if case.key in results]
        if not rows:
            continue
        start, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        table = _renderer(name)(rows)
        page = page[: page.index(start) + len(start)] + table + page[page.index(end) :]
    PAGE.write_text(page)


def _renderer(name: str) -> Callable[[list[tuple[Case, dict[str, Any]]]], str]:
    if name.endswith("drawing"):
        return drawing_table
    if name.endswith("generate"):
        return generate_table
    if name == "slices":
        return slices_table
    return train_table if name in ("train", "tried") else family_table


def train_table(rows: list[tuple[Case, dict[str, Any]]]) -> str:
    """Training plans, one per row."""
    lines = [
        "| chips | frozen weights | remat | arguments | temporaries | total of HBM, GiB | frozen gathers in loops "
        "| received, GiB | compute / HBM / links, ms | bound by | MFU at most | compile, s (CPU s) |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, plan in rows:
        memory, roofline = plan["memory"], plan["roofline"]
        options = dict(value.split("=") for value in case.values)
        terms = {name: roofline[name] for name in ("compute", "hbm", "ici")}
        received = sum(traffic["received"] for traffic in plan["collectives"])
        chips = f"{case.topology} ({plan['devices']})" + (f", effort {case.effort:g}" if case.effort else "")
        total = f"{memory['total'] / GIB:.1f} of {plan['hbm_bytes'] / GIB:.0f}" + ("" if plan["fits"] else ", too much")
        limit = max(terms, key=terms.__getitem__)
        lines.append(
            f"| {chips} | {options['mesh.frozen']} | {options.get('loss.remat', 'full')} "
            f"| {memory['arguments'] / GIB:.2f} | {memory['temporaries'] / GIB:.2f} | {total} "
            f"| {plan['gathers_of_frozen_in_loops']} | {received / GIB:.1f} "
            f"| {' / '.join(f'{1e3 * seconds:.0f}' for seconds in terms.values())} | {limit} "
            f"| {plan['mfu']:.0%} | {plan['compile_seconds']:.0f} ({plan['compile_cpu_seconds']:.0f}) |"
        )
    return "\n".join(lines) + "\n"


def slices_table(rows: list[tuple[Case, dict[str, Any]]]) -> str:
    """Training plans on several slices, one per row."""
    lines = [
        "| chips | frozen weights | total of HBM, GiB | gradients, GiB | each slice receives from others, GiB "
        "| compute / HBM / links / between slices, ms | bound by | MFU at most | compile, s (CPU s) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case, plan in rows:
        roofline = plan["roofline"]
        terms = {name: roofline[name] for name in ("compute", "hbm", "ici", "dcn")}
        received = plan["from_slices"] * plan["devices"] / plan["slices"]
        options = dict(value.split("=") for value in case.values)
        lines.append(
            f"| {plan['slices']} x {case.topology} ({plan['devices']}) | {options['mesh.frozen']} "
            f"| {plan['memory']['total'] / GIB:.1f} of {plan['hbm_bytes'] / GIB:.0f} "
            f"| {plan['gradient_bytes'] / GIB:.2f} | {received / GIB:.2f} "
            f"| {' / '.join(f'{1e3 * seconds:.0f}' for seconds in terms.values())} "
            f"| {max(terms, key=terms.__getitem__)} | {plan['mfu']:.0%} "
            f"| {plan['compile_seconds']:.0f} ({plan['compile_cpu_seconds']:.0f}) |"
        )
    return "\n".join(lines) + "\n"


def family_table(rows: list[tuple[Case, dict[str, Any]]]) -> str:
    """Training plans of models that learn whole, one per row."""
    lines = [
        "| config | chips | parts of a batch | arguments | temporaries | total of HBM, GiB | gathers of the tokenizer "
        "| received, GiB | compute / HBM / links, s | bound by | MFU at most | compile, s (CPU s) |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, plan in rows:
        parts = dict(value.split("=") for value in case.values).get("accumulate", "as in the config")
        start = f"| {case.config} | {case.topology} ({plan['devices']} devices) | {parts} "
        memory, roofline = plan["memory"], plan["roofline"]
        if memory is None:
            lines.append(f"{start}| does not fit: {plan['refusal']} " + "| " * 8 + "|")
            continue
        terms = {name: roofline[name] for name in ("compute", "hbm", "ici")}
        received = sum(traffic["received"] for traffic in plan["collectives"])
        total = f"{memory['total'] / GIB:.1f} of {plan['hbm_bytes'] / GIB:.0f}" + ("" if plan["fits"] else ", too much")
        lines.append(
            f"{start}| {memory['arguments'] / GIB:.2f} | {memory['temporaries'] / GIB:.2f} | {total} "
            f"| {plan['gathers_of_frozen_in_loops']} | {received / GIB:.1f} "
            f"| {' / '.join(f'{seconds:.2f}' for seconds in terms.values())} | {max(terms, key=terms.__getitem__)} "
            f"| {plan['mfu']:.0%} | {plan['compile_seconds']:.0f} ({plan['compile_cpu_seconds']:.0f}) |"
        )
    return "\n".join(lines) + "\n"


def drawing_table(rows: list[tuple[Case, dict[str, Any]]]) -> str:
    """Plans of drawing with guidance, one per row."""
    lines = [
        "| config | chips | rows | total of HBM, GiB | compute / HBM / links, ms | images a second at most |",
        "|---|---|---|---|---|---|",
    ]
    for case, plan in rows:
        start = f"| {case.config} | {case.topology} ({plan['devices']}) | {plan['batch']} "
        if plan["memory"] is None:
            lines.append(f"{start}| does not fit: {plan['refusal']} | | |")
            continue
        steps, streams = STEPS[case.config.split("_")[0]]
        roofline = plan["roofline"]
        terms = " / ".join(f"{1e3 * roofline[name]:.2f}" for name in ("compute", "hbm", "ici"))
        lines.append(
            f"{start}| {plan['memory']['total'] / GIB:.1f} of {plan['hbm_bytes'] / GIB:.0f} | {terms} "
            f"| {plan['batch'] / streams / steps / roofline['seconds']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def generate_table(rows: list[tuple[Case, dict[str, Any]]]) -> str:
    """Decoding plans, one per row."""
    lines = [
        "| model | chips | matrices | rows | total of HBM, GiB | compute / HBM / links, ms | tokens a second at most |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, plan in rows:
        matrices = "int8" if "model.lm.dtype=int8" in case.values else "bf16"
        start = f"| {case.config.split(':')[-1]} | {case.topology} ({plan['devices']}) | {matrices} | {plan['batch']} "
        if plan["memory"] is None:
            lines.append(f"{start}| does not fit: {plan['refusal']} | | |")
            continue
        roofline = plan["roofline"]
        terms = " / ".join(f"{1e3 * roofline[name]:.2f}" for name in ("compute", "hbm", "ici"))
        lines.append(
            f"{start}| {plan['memory']['total'] / GIB:.1f} of "
            f"{plan['hbm_bytes'] / GIB:.0f} | {terms} | {plan['batch'] / roofline['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
