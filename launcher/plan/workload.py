"""What one rank computes in a micro-step, as a value: the model, the method laid on it, the batch and the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from launcher.plan.inventory import Block, Weight
from launcher.plan.layout import Attention
from launcher.plan.linears import DEQUANTISING_ROWS, Linear
from launcher.plan.shape import ModelShape, adapter_rank, is_head, is_trained
from launcher.plan.tape import Parameter

Loss = Literal["plain", "chunked", "liger"]
Checkpointing = Literal["off", "on", "offload"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodFacts:
    """The method as far as memory goes. `bits` is of the base's linear layers, `r` the adapters' rank (0: none)."""

    trains: Literal["all", "some", "adapters"]
    bits: Literal[4, 8, 16] = 16
    double_quant: bool = True
    r: int = 0
    target_modules: str | tuple[str, ...] = "all-linear"
    dropout: float = 0.0
    dora: bool = False
    pissa: bool = False
    last_layers: int = 0
    patterns: tuple[str, ...] = ()

    def trains_base(self, name: str, num_layers: int) -> bool:
        return self.trains == "all" or (self.trains == "some" and is_trained(name, num_layers, self.last_layers, self.patterns))


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Rows of `seq_len` tokens, `micro_batch_size` of them; `loss_columns` of a row's positions carry loss.

    `packed`: a row holds several examples, or is padded, so that kernels other than flash attention are given a mask.
    `target_len`: tokens that an encoder-decoder's decoder reads of a row, where `seq_len` are its encoder's; 0 for any other model.
    `kernel_workspace` counts what CUDA's attention kernels take for themselves, which no trace sees.
    """

    shape: ModelShape
    method: MethodFacts
    width: int
    device: Literal["cpu", "cuda"]
    attention: Attention
    loss: Loss
    checkpointing: Checkpointing
    micro_batch_size: int
    seq_len: int
    loss_columns: int
    packed: bool
    target_len: int = 0
    kernel_workspace: bool = True
    fused: bool = False
    """Liger's kernels for norms, rotary embeddings and gated MLPs."""
    sums_in_place: bool = True
    """Whether the GPU adds a product in 16 bits to a sum where it stands, as Liger's loss has it (compute capability 8 and above)."""
    reentrant: bool = False
    """Reentrant checkpointing, which other frameworks use."""

    @property
    def tokens(self) -> int:
        return self.micro_batch_size * self.seq_len

    @property
    def is_dequantised(self) -> bool:
        """Whether a forward pass makes the dense weight of a 4-bit layer, as many rows have it."""
        return self.method.bits == 4 and self.tokens > DEQUANTISING_ROWS

    @property
    def loss_rows(self) -> int:
        """Rows of logits."""
        return (1 if self.attention == "flash_attention_2" else self.micro_batch_size) * self.loss_columns


def build_block(work: Workload, block: Block, layer: int) -> dict[str, Any]:
    """A layer's weights by name within it: Linear for matrices (with bias and adapter), Parameter for all else."""
    shape, method = work.shape, work.method
    built: dict[str, Any] = {}
    biases = {w.name: w for w in block.weights if w.name.endswith(".bias")}
    matrices = {w.name.removesuffix(".weight") for w in block.weights if w.matrix}
    for weight in block.weights:
        name = weight.name.removesuffix(".weight")
        depth = shape.depth_of(block.prefix)
        trained = method.trains_base(block.prefix.format(layer) + weight.name, depth)
        rank = adapter_rank(shape.model_type, block.prefix, weight, method.r, method.target_modules) if method.r else 0
        if weight.matrix:
            bias = biases.get(f"{name}.bias")
            n_in, n_out = weight.fan
            built[name] = Linear(
                n_in, n_out, work.width, trained=trained, bias=bias is not None,
                bias_trained=bias is not None and method.trains_base(block.prefix.format(layer) + bias.name, depth),
                bits=method.bits if is_quantised(block.prefix, weight) else 16, double_quant=method.double_quant, r=rank, dropout=method.dropout,
                dora=method.dora, transposed=weight.matrix == "conv1d",
            )  # fmt: skip
        elif weight.name.endswith(".bias") and weight.name.removesuffix(".bias") in matrices:
            continue
        else:
            built[name] = Parameter(weight.count, work.width, trained)
            if rank:
                built[name + ".adapter"], built[name + ".fan"] = rank, weight.shape[-2:]
    return built


def is_quantised(prefix: str, weight: Weight) -> bool:
    """Whether bitsandbytes quantises a weight, where the method asks it to: nn.Linear and Conv1D but for the head, and T5's wo, which
    transformers keeps (_keep_in_fp32_modules)."""
    return weight.matrix != "" and not is_head(prefix, weight) and not weight.name.endswith("DenseReluDense.wo.weight")
