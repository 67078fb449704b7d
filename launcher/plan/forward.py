"""What all forward passes on the tape share: what their layers are handed, and the geometry that masks and rotations follow from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from launcher.plan.attention import Heads, eager, flash, sdpa
from launcher.plan.inventory import Config, head_dim
from launcher.plan.operators import join, part, rotate
from launcher.plan.tape import Tape, Tensor
from launcher.plan.workload import Workload

Block = dict[str, Any]


@dataclass(slots=True)
class Pass:
    """One forward pass: the tape, and what all layers are handed."""

    tape: Tape
    work: Workload
    config: Config
    tables: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    masks: dict[str, Tensor | None] = field(default_factory=dict)
    weights: Tensor | None = None
    """Eager attention's, which a layer's code holds on to until it returns."""

    def for_layer(self, layer: int) -> Pass:
        """With the layer's own mask and tables alone: what a checkpoint of it keeps."""
        kind = layer_type(self.config, layer)
        tables = {name: pair for name, pair in self.tables.items() if name in ("", kind)}
        return Pass(self.tape, self.work, self.config, tables, {kind: self.masks[kind]})

    @property
    def rows(self) -> int:
        return 1 if self.is_flat else self.work.micro_batch_size

    @property
    def columns(self) -> int:
        return self.work.tokens if self.is_flat else self.work.seq_len

    @property
    def is_flat(self) -> bool:
        return self.work.attention == "flash_attention_2"


def layer_type(config: Config, layer: int) -> str:
    """full_attention, sliding_attention or chunked_attention (configuration_*.py where config.json does not list them)."""
    listed = config.get("layer_types")
    if listed:
        return str(listed[layer])
    if config["model_type"] == "llama4_text":
        return "chunked_attention" if uses_rope(config, layer) else "full_attention"
    return "sliding_attention" if _slides(config, layer) else "full_attention"


def uses_rope(config: Config, layer: int) -> bool:
    """SmolLM3 and Llama 4 turn queries and keys in most layers."""
    listed = config.get("no_rope_layers")
    return bool(listed[layer]) if listed else (layer + 1) % int(config.get("no_rope_layer_interval") or 4) != 0


def _slides(config: Config, layer: int) -> bool:
    kind = config["model_type"]
    if kind in ("gemma2", "gpt_oss"):
        return layer % 2 == 0
    if kind == "gemma3_text":
        return (layer + 1) % int(config.get("sliding_window_pattern", 6)) != 0
    if kind in ("mistral", "mixtral", "phi3", "starcoder2", "ministral"):
        return sliding_window(config) is not None
    if kind == "qwen3_moe":
        return bool(config.get("use_sliding_window"))
    if kind in ("qwen2", "qwen3"):
        return bool(config.get("use_sliding_window")) and layer >= config.get("max_window_layers", 28)
    if kind == "qwen2_moe":
        return bool(config.get("use_sliding_window")) and layer % 2 == 0 and layer < config.get("max_window_layers", 28)
    return False


def sliding_window(config: Config) -> int | None:
    """How far a sliding layer looks back; None: everywhere."""
    width = config.get("sliding_window", 4096 if config["model_type"] in ("mistral", "ministral") else None)
    return int(width) if width else None


def rotary_width(config: Config) -> int:
    """How much of a head's width is turned."""
    default = {"phi": 0.5, "gpt_neox": 0.25, "stablelm": 0.25}.get(config["model_type"], 1.0)
    told = config.get("partial_rotary_factor", config.get("rotary_pct"))
    return int(head_dim(config) * float(default if told is None else told))


def rotate_part(tape: Tape, x: Tensor, cos: Tensor, sin: Tensor, width: int, turning: int) -> Tensor:
    """Part of a head's width is turned, the rest joined to it (also where there is no rest)."""
    turned_count = x.count // width * turning
    turned, passed = part(tape, x, turned_count), part(tape, x, x.count - turned_count)
    return join(tape, rotate(tape, turned, cos, sin), passed)


def attend(run: Pass, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, at: Heads, *, p: float | None = None) -> Tensor:
    """The attention kernel of the run. `p`: its dropout, where config.json has another name for it."""
    work, kind = run.work, run.config["model_type"]
    if p is None:
        p = float(run.config.get("attention_dropout") or 0.0)
    if work.attention == "eager":
        softcap = run.config.get("attn_logit_softcapping") is not None and kind == "gemma2"
        mixed, run.weights = eager(run.tape, query, key, value, mask, at, p=p, softcap=softcap, wide=kind not in NARROW_SOFTMAX)
        return mixed
    if work.attention == "flash_attention_2":
        return flash(run.tape, query, key, value, at, workspace=work.kernel_workspace)
    return sdpa(run.tape, query, key, value, mask, at, device=work.device, workspace=work.kernel_workspace, p=p)


NARROW_SOFTMAX = frozenset({"bert", "roberta", "gpt2", "llama4_text", "gpt_oss"})
"""Their eager attention takes the softmax in the model's dtype."""
