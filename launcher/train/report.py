"""What a run leaves for people: report.md with its loss curve, and the card of the model it made.

Both are written from the plan and the run's events, so nothing is in them that is not in those: no
environment variables, no host names, no tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from launcher import __version__
from launcher.plan import Plan
from launcher.plan.describe import describe_plan
from launcher.plan.source import PACKAGE_SCHEME, ModelSource, locate_model
from launcher.progress import Summary, describe_change, describe_memory, format_loss, format_perplexity, make_summary, printable
from launcher.recipe import Lora, QLora
from launcher.run import Event, RunFolder, read_events
from launcher.units import format_bytes, format_count, format_duration
from launcher.versions import read_versions

SMOOTHING_STEPS = 20
"""The loss curve's smooth line averages over about a twentieth of the run, and never over more steps than this."""


def write_report(folder: RunFolder, plan: Plan) -> None:
    """report.md and loss.png: what was trained on what, how it went, and what came of it."""
    events = list(read_events(folder))
    has_picture = draw_loss(events, folder.loss_picture)
    summary = make_summary(events)
    sections = [
        f"# {plan.recipe.name}",
        _table(("", ""), [(label, _cell(text)) for label, text in describe_plan(plan) if label]),
        "## Results\n\n" + make_results_table(summary),
        "![loss over optimizer steps](loss.png)" if has_picture else "",
        _samples_section(summary),
        _data_section(events),
        _cost_section(events, summary, plan),
        _choices_section(plan),
        _versions_section(plan),
    ]
    folder.report.write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")


def make_results_table(summary: Summary) -> str:
    """Held-out loss and perplexity before and after; without a held-out set the first and last training loss."""
    if summary.before and summary.after:
        losses, perplexities = [[event[key] for event in (summary.before, summary.after)] for key in ("loss", "perplexity")]
        rows = [
            ("loss", *map(format_loss, losses), describe_change(*losses)),
            ("perplexity", *map(format_perplexity, perplexities), describe_change(*perplexities)),
        ]
        return _table((f"held-out set ({summary.after['tokens']:,} tokens with loss)", "before", "after", "change"), rows)
    if summary.first_step and summary.last_step:
        losses = [summary.first_step["loss"], summary.last_step["loss"]]
        return _table(
            ("training (no held-out set)", "first step", "last step", "change"),
            [("loss", *map(format_loss, losses), describe_change(*losses))],
        )
    return "No step was taken."


def _samples_section(summary: Summary) -> str:
    if not summary.samples:
        return ""
    rows = [tuple(_cell(text) for text in row) for row in summary.samples]
    return "## Sampled answers\n\nGreedy decoding, the same prompts before and after.\n\n" + _table(("prompt", "before", "after"), rows)


def _data_section(events: Iterable[Event]) -> str:
    splits = [event for event in events if event.get("event") == "data"]
    rows = [
        (
            event["split"],
            f"{event['examples']:,}",
            f"{event['tokens']:,}",
            f"{event['target_tokens']:,}",
            f"{event['samples']:,}",
            f"{event['fill']:.1%}",
            str(event.get("dropped", 0)),
            str(event.get("truncated", 0)),
        )
        for event in splits
    ]
    names = ("split", "examples", "tokens", "with loss", "sequences", "filled", "dropped", "truncated")
    hashes = [(event["split"], f"`{name}`", f"`{digest}`") for event in splits for name, digest in event.get("source_hashes", {}).items()]
    return "## Data\n\n" + _table(names, rows) + ("\n\n" + _table(("split", "source", "content hash"), hashes) if hashes else "")


def _cost_section(events: list[Event], summary: Summary, plan: Plan) -> str:
    end: Event = next((event for event in events if event.get("event") == "end"), {})
    steps = summary.last_step["step"] if summary.last_step else 0
    per = "GPU" if plan.layout.accelerator == "cuda" else "worker"
    rows = [("optimizer steps", f"{steps:,}")]
    if summary.train_s:
        rows.append(
            (
                "training",
                f"{format_duration(summary.train_s)} ({summary.train_s / max(1, steps):.2f} s a step, evaluations during it included)",
            )
        )
    if end.get("wall_s"):
        rows.append(("all of it, loading to saving", format_duration(end["wall_s"])))
    if summary.tokens_per_s:
        rows.append(("tokens/s (median step)", f"{format_count(round(summary.tokens_per_s))} on {plan.layout.world_size} ranks"))
    if summary.last_step:
        rows.append(("tokens seen", f"{summary.last_step['tokens_seen']:,}"))
    rows.append(
        (
            f"memory a {per}, planned",
            f"{format_bytes(plan.memory.device('total').p50)}, at most {format_bytes(plan.memory.device('total').p95)}",
        )
    )
    for event in events:
        if event.get("event") == "memory":
            compared = describe_memory(event["figures"]).removeprefix("memory: ")
            rows.append((f"memory after step {event['step']}, measured and planned", compared))
    if summary.memory_bytes:
        what = "allocated by torch" if plan.layout.accelerator == "cuda" else "the whole process: libraries and data too"
        rows.append((f"memory a {per}, peak seen", f"{format_bytes(summary.memory_bytes)} ({what})"))
    return "## Cost\n\n" + _table(("", ""), rows)


def _choices_section(plan: Plan) -> str:
    return "## Chosen for you\n\n" + "\n".join(f"- {note}" for note in plan.notes) if plan.notes else ""


def _versions_section(plan: Plan) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in read_versions().items())
    return f"## Made with\n\n{versions}\n\nplan {plan.digest}, seed {plan.recipe.seed}; the recipe is in recipe.yaml, its resolution in plan.json, every event in metrics.jsonl."


def draw_loss(events: Iterable[Event], path: Path) -> bool:
    """The loss curve as a PNG: each step, their smooth line, and the held-out evaluations. False without steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = [event for event in events if event.get("event") == "step"]
    evals = [event for event in events if event.get("event") == "eval"]
    if not steps:
        return False
    at, losses = [step["step"] for step in steps], [step["loss"] for step in steps]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(at, losses, color="#9db8d9", linewidth=1, marker="." if len(steps) < 50 else "", label="training, each step")
    if len(steps) > 4:
        axes.plot(
            at, smooth(losses, min(SMOOTHING_STEPS, max(2, len(steps) // 20))), color="#1f5fa8", linewidth=2, label="training, smoothed"
        )
    if evals:
        axes.plot(
            [e["step"] for e in evals],
            [e["loss"] for e in evals],
            color="#d1495b",
            marker="o",
            linewidth=1.2,
            linestyle="--",
            label="held-out",
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats a token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
    return True


def smooth(values: list[float], window: int) -> list[float]:
    """Exponential moving average over about `window` values, unbiased from the first on."""
    keep, total, weight, smoothed = 1 - 1 / window, 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed


def write_model_card(folder: RunFolder, plan: Plan) -> None:
    """model/README.md: a card with the front matter that the hub reads."""
    events = list(read_events(folder))
    adapter = isinstance(plan.recipe.method, Lora | QLora)
    base = plan.recipe.model.name_or_path
    kind = {"full": "a full fine-tune", "freeze": "a partial fine-tune", "lora": "a LoRA adapter", "qlora": "a QLoRA adapter"}[
        plan.recipe.method.kind
    ]
    front = [
        "---",
        f"base_model: {_quoted(base)}",
        f"library_name: {'peft' if adapter else 'transformers'}",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in ("lepton-launch", plan.recipe.method.kind, *(("peft",) if adapter else ()))),
        "---",
    ]
    versions = ", ".join(f"{name} {version}" for name, version in read_versions().items() if name != "lepton-launch")
    sections = [
        "\n".join(front),
        f"# {plan.recipe.name}",
        f"This is {kind} of `{base}`{f' at revision `{plan.recipe.model.revision}`' if plan.recipe.model.revision else ''},"
        f" made with lepton-launch {__version__}. It has {plan.trainable_params:,} trained parameters.",
        "## Results\n\n" + make_results_table(make_summary(events)),
        "## Use\n\n" + make_usage(plan, adapter=adapter),
        _data_section(events),
        "## Recipe\n\n```yaml\n" + _dump_recipe(plan) + "```",
        f"## Versions\n\n{versions}\n\nplan {plan.digest}",
    ]
    (folder.model / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def make_usage(plan: Plan, *, adapter: bool) -> str:
    """Python that loads what this run made, as it was trained, with transformers and PEFT alone."""
    dtype = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}[plan.layout.dtype]
    made = plan.shape.auto_class
    lines = ["import torch", f"from transformers import {made}, AutoTokenizer"]
    folder = 'folder = "."  # where this file is'
    tokenizer = "tokenizer = AutoTokenizer.from_pretrained(folder)"
    if not adapter:
        lines += ["", folder, tokenizer, f"model = {made}.from_pretrained(folder, dtype={dtype})"]
        return _ask(lines, plan)
    source = locate_model(plan.recipe.model.name_or_path, plan.base_dir)
    options = [f"dtype={dtype}"]
    if plan.recipe.model.name_or_path.startswith(PACKAGE_SCHEME):
        lines.insert(0, "import importlib.util")
    if source.kind == "gguf":
        lines[-1] = "from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig"
        options += [f"gguf_file={Path(source.path).name!r}", "quantization_config=GgufConfig(dequantize=True)"]
    elif isinstance(plan.recipe.method, QLora):
        lines[-1] = f"from transformers import {made}, AutoTokenizer, BitsAndBytesConfig"
        options.append(f"quantization_config={_quantization_code(plan.recipe.method, dtype)}")
    if plan.recipe.model.revision:
        options.append(f"revision={plan.recipe.model.revision!r}")
    lines += ["from peft import PeftModel", "", folder, tokenizer]
    lines.append(f"base = {made}.from_pretrained({_place_code(plan, source)}, {', '.join(options)})")
    lines.append("model = PeftModel.from_pretrained(base, folder)")
    note = ""
    if source.kind == "gguf" and isinstance(plan.recipe.method, QLora):
        note = "\n\nThe adapter was trained on the base quantised by bitsandbytes; `lepton-launch generate` uses that very base, and `lepton-launch export --merge` writes the two as one plain model."
    return _ask(lines, plan) + note


def _place_code(plan: Plan, source: ModelSource) -> str:
    """Where the base is, as Python that also holds on another machine where it can."""
    name = plan.recipe.model.name_or_path
    if not name.startswith(PACKAGE_SCHEME):
        return repr(source.path if source.kind == "hub" else str(source.folder))
    package, _, inner = name.removeprefix(PACKAGE_SCHEME).partition("/")
    parent = Path(inner).parent
    # Found, not imported: what the package itself imports may be missing.
    root = f"importlib.util.find_spec({package!r}).submodule_search_locations[0]"
    return root if parent == Path(".") else f"{root} + {'/' + str(parent)!r}"


def _quantization_code(method: QLora, dtype: str) -> str:
    if method.bits == 8:
        return "BitsAndBytesConfig(load_in_8bit=True)"
    return (
        f"BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type={method.quant_type!r}, "
        f"bnb_4bit_use_double_quant={method.double_quant}, bnb_4bit_compute_dtype={dtype})"
    )


def _ask(lines: list[str], plan: Plan) -> str:
    if plan.shape.has_chat_template or plan.recipe.data.chat_template:
        asked = [
            'messages = [{"role": "user", "content": "Hello!"}]',
            'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
        ]
    else:
        asked = ['inputs = tokenizer("Once upon a time", return_tensors="pt")']
    written = "output[0]" if plan.shape.is_pair else 'output[0, inputs["input_ids"].shape[1] :]'
    answer = [
        "output = model.generate(**inputs.to(model.device), max_new_tokens=100)",
        f"print(tokenizer.decode({written}, skip_special_tokens=True))",
    ]
    return "\n".join(["```python", *lines, "", *asked, *answer, "```"])


def _dump_recipe(plan: Plan) -> str:
    """The recipe as YAML, without what was left at its default."""
    from io import StringIO

    from ruamel.yaml import YAML

    text = StringIO()
    YAML(typ="safe", pure=True).dump(plan.recipe.model_dump(mode="json", exclude_defaults=True), text)
    return text.getvalue()


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text that cannot break out of a Markdown table's cell."""
    escaped = printable(text).strip().replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return "<br>".join(escaped.splitlines())


def _quoted(text: str) -> str:
    """A YAML string in double quotes."""
    import json

    return json.dumps(text, ensure_ascii=False)
