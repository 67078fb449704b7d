"""The plan in words, for the terminal and for the report."""

from __future__ import annotations

from launcher.plan.plan import Plan
from launcher.plan.speed import find_target_len
from launcher.units import format_bytes, format_count


def describe_plan(plan: Plan) -> list[tuple[str, str]]:
    """The plan in words: a label and what it says, one pair a line."""
    recipe, layout, batch = plan.recipe, plan.layout, plan.batch
    ranks = (
        f"{layout.nodes} × {layout.workers_per_node} workers"
        if layout.nodes > 1
        else f"{layout.workers_per_node} worker{'s' if layout.workers_per_node > 1 else ''}"
    )
    device = plan.cluster.device_name or layout.accelerator.upper()
    steps = (
        f"{recipe.schedule.max_steps} steps"
        if recipe.schedule.max_steps
        else f"{recipe.schedule.epochs:g} epoch{'s' if recipe.schedule.epochs != 1 else ''}"
    )
    offload = [name for name, on in (("optimizer", layout.offload_optimizer), ("weights", layout.offload_param)) if on]
    lines = [
        ("model", f"{recipe.model.name_or_path} ({plan.shape.model_type}, {format_count(plan.shape.num_params)} parameters)"),
        (
            "method",
            f"{_describe_method(plan)}: {format_count(plan.trainable_params)} parameters trained ({plan.trainable_params / plan.num_params:.2%})",
        ),
        ("data", _describe_data(plan)),
        (
            "batch",
            f"{batch.global_batch_size} samples a step = micro-batch {batch.micro_batch_size} × accumulation {batch.gradient_accumulation_steps}"
            + f" × ranks {batch.data_parallel_size}; at most {format_count(batch.global_batch_size * (batch.seq_len + find_target_len(recipe, plan.shape)))} tokens",
        ),
        ("optimizer", f"{recipe.optim.name}, {recipe.schedule.kind} from {recipe.optim.lr:g}, {steps}"),
        (
            "devices",
            f"{ranks} on {device} ({layout.backend}, {layout.threads_per_worker} core{'s' if layout.threads_per_worker > 1 else ''} each)",
        ),
        (
            "compute",
            f"ZeRO-{layout.zero_stage}, {layout.dtype}, {layout.attn_implementation} attention"
            + (", Liger kernels" if layout.liger_kernel else "")
            + (f", {layout.loss} loss" if layout.loss != "plain" else "")
            + (", gradient checkpointing" if layout.gradient_checkpointing else "")
            + (" to host memory" if layout.checkpoints_on_host else "")
            + (f", {' and '.join(offload)} offloaded to {'NVMe' if layout.nvme_path else 'host memory'}" if offload else ""),
        ),
        ("memory", _describe_memory(plan)),
        ("run folder", plan.run_dir),
    ]
    return [*lines, *(("", note) for note in plan.notes)]


def _describe_method(plan: Plan) -> str:
    method = plan.recipe.method
    if method.kind in ("full", "freeze"):
        return {"full": "full fine-tuning", "freeze": "part of the weights"}[method.kind]
    facts = method.model_dump()
    variants = [name for name in ("rslora", "dora") if facts.get(name)] + (["pissa"] if facts.get("init") == "pissa" else [])
    targets = facts["target_modules"]
    adapter = f"r {facts['r']}, alpha {facts['alpha']:g}, {targets if isinstance(targets, str) else ', '.join(targets)}{''.join(f', {v}' for v in variants)}"
    if method.kind == "lora":
        return f"LoRA ({adapter})"
    base = (
        "8-bit base" if facts["bits"] == 8 else f"4-bit {facts['quant_type']} base{', double quantised' if facts['double_quant'] else ''}"
    )
    return f"QLoRA ({base}; {adapter})"


def _describe_data(plan: Plan) -> str:
    data = plan.recipe.data
    held_out = ", ".join(source.path for source in data.eval) or (f"{data.eval_fraction:.0%} of it" if data.eval_fraction else "nothing")
    packed = "packed to" if data.packing else "at most"
    if plan.shape.is_pair:
        pairs = f"sources of at most {data.seq_len} tokens, targets of at most {data.target_len or data.seq_len}"
        return f"{', '.join(source.path for source in data.train)}, held out {held_out}; {pairs}"
    loss = "answers" if data.loss_on == "assistant" else "all tokens"
    return f"{', '.join(source.path for source in data.train)}, held out {held_out}; {packed} {data.seq_len} tokens, loss on {loss}"


def _describe_memory(plan: Plan) -> str:
    memory = plan.memory
    need, per = memory.device("total"), "a GPU" if plan.layout.accelerator == "cuda" else "a worker"
    shown = [f"{part.name} {format_bytes(part.bytes)}" for part in sorted(memory.decisive.components, key=lambda part: -part.bytes)
             if part.bytes >= need.p50 / 100]  # fmt: skip
    return (f"{memory.verdict}: about {format_bytes(need.p50)}, at most {format_bytes(need.p95)} of {format_bytes(memory.budget)} {per}"
            f" ({memory.decisive_phase}) = {' + '.join(shown)}")  # fmt: skip
