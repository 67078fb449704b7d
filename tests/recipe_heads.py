"""What the head of each shipped recipe says it needs: written by its dry run (make recipe-heads), compared by tests/test_recipes.py."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from launcher.cluster import Cluster
from launcher.errors import RecipeError
from launcher.gallery import find_gallery
from launcher.plan import Plan, make_plan
from launcher.plan.devices import find_device, make_cluster
from launcher.recipe_file import load_recipe
from launcher.units import GIB

SETUPS = (
    ("t4", 1, 1), ("rtx-4090", 1, 1), ("l40s", 1, 1), ("a100-80gb", 1, 1), ("h200", 1, 1), ("rtx-4090", 1, 4), ("a100-40gb", 1, 8),
    ("a100-80gb", 1, 8), ("h200", 1, 8), ("b200", 1, 8), ("h100-80gb", 2, 8), ("h100-80gb", 4, 8), ("h100-80gb", 8, 8), ("b200", 8, 8),
)  # fmt: skip
"""Devices, nodes and devices a node that heads speak of, the cheaper ones first."""
SHOWN = 3
CPU = Cluster(workers_per_node=2, cpus_per_node=8, device_name="CPU", device_memory=32 * GIB, host_memory=64 * GIB)
CPU_PARAMS = 2e9
"""Models up to this size are spoken of on a CPU too."""


def make_needs(path: Path) -> list[str]:
    """The lines of a recipe's head that say what it needs."""
    fitting: list[str] = []
    for gpu, nodes, each in SETUPS:
        if len(fitting) == SHOWN:
            break
        plan = plan_on(path, make_cluster(find_device(gpu), nodes=nodes, gpus_per_node=each))
        if plan is not None and plan.memory.verdict != "DOES NOT FIT":
            machines = f"{nodes} machines of {each} × {gpu}" if nodes > 1 else f"{each} × {gpu}"
            fitting.append(f"{whole(plan.memory.device('total').p95)} of {plan.memory.budget / GIB:.0f} GiB a GPU on {machines}")
    cpu = plan_on(path, CPU)
    if cpu is not None and cpu.num_params < CPU_PARAMS and cpu.memory.verdict != "DOES NOT FIT":
        fitting.append(f"{whole(cpu.memory.device('total').p95)} GiB a CPU worker")
    if not fitting:
        return [f"#   needs  {line}" if not number else f"#          {line}" for number, line in enumerate(_describe_largest(path))]
    told = [f"{line}{',' if index < len(fitting) - 1 else ''}" for index, line in enumerate(fitting)]
    return [f"#   needs  by its dry run, at most {told[0]}", *(f"#          {line}" for line in told[1:])]


def _describe_largest(path: Path) -> tuple[str, str]:
    """For what fits nowhere: the phase that decides on the largest machines, and what the run would need but for it."""
    gpu, nodes, each = SETUPS[-1]
    plan = plan_on(path, make_cluster(find_device(gpu), nodes=nodes, gpus_per_node=each))
    assert plan is not None
    memory = plan.memory
    others = max(phase.figure("total").p95 for phase in memory.phases if phase is not memory.decisive)
    return (
        f"by its dry run, {whole(memory.device('total').p95)} GiB a GPU in the phase {memory.decisive_phase}, more than any GPU of the catalogue has;",
        f"{whole(others)} GiB a GPU in all other phases, on {nodes} machines of {each} × {gpu}",
    )


def whole(size: int) -> str:
    return str(math.ceil(size / GIB))


def plan_on(path: Path, cluster: Cluster) -> Plan | None:
    """None where the batch does not divide by the devices, or they cannot compute in what the recipe wants."""
    try:
        return make_plan(load_recipe(path), cluster, base_dir=str(path.parent), run_dir="/runs/x")
    except RecipeError:
        return None


def with_needs(path: Path) -> str:
    """The recipe's text with the lines of its head that are made here made anew."""
    lines = path.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("#   needs  "))
    end = next(number for number in range(start + 1, len(lines)) if not lines[number].startswith("#          "))
    return "\n".join([*lines[:start], *make_needs(path), *lines[end:]]) + "\n"


def main() -> None:
    gallery = find_gallery()
    assert gallery is not None
    for path in sorted(gallery.glob("*.yaml")):
        text = with_needs(path)
        changed = text != path.read_text(encoding="utf-8")
        path.write_text(text, encoding="utf-8")
        print(f"{'written' if changed else 'as it was':<10}{path.name}", file=sys.stderr)


if __name__ == "__main__":
    main()
