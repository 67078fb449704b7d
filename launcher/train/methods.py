"""What is trained: the recipe's method laid on a base model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from launcher.errors import ModelError
from launcher.plan import Plan
from launcher.plan.shape import is_trained
from launcher.recipe import Freeze, Lora, QLora
from launcher.train.head import put_loss_into_head
from launcher.train.model import TORCH_DTYPE, starting_sharded
from launcher.train.shard import find_decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def apply_method(model: PreTrainedModel, plan: Plan) -> torch.nn.Module:
    """The model with the method's parameters trainable, all others frozen, ready for DeepSpeed.

    Adapters start from the recipe's seed, so every rank makes the same ones.
    """
    method, layout = plan.recipe.method, plan.layout
    torch.manual_seed(plan.recipe.seed)
    if layout.loss != "plain":
        put_loss_into_head(model, layout.loss)
    trained: torch.nn.Module = model
    if isinstance(method, Freeze):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_trained(name, plan.shape.depth_of(name), method.last_layers, method.patterns))
    elif isinstance(method, Lora | QLora):
        with starting_sharded(plan):  # DoRA and PiSSA read each layer's whole weight
            trained = _add_adapters(model, method, "SEQ_2_SEQ_LM" if plan.shape.is_pair else "CAUSAL_LM")
    # fp32 masters are DeepSpeed's; what it trains is in the model's dtype.
    for parameter in trained.parameters():
        if parameter.requires_grad and parameter.dtype != TORCH_DTYPE[layout.dtype]:
            parameter.data = parameter.data.to(TORCH_DTYPE[layout.dtype])
    if not any(parameter.requires_grad for parameter in trained.parameters()):
        raise ModelError(
            f"method {method.kind} trains none of the model's parameters", f"names look like {next(iter(model.named_parameters()))[0]}"
        )
    if layout.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False}, offload=layout.checkpoints_on_host)
    if layout.leaf_modules:
        _gather_layers_whole(model)
    if layout.liger_kernel:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    return trained


def _add_adapters(model: PreTrainedModel, method: Lora | QLora, task: str) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = method.target_modules
    config = LoraConfig(
        task_type=task,
        r=method.r,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=targets if targets == "all-linear" else list(targets),
        use_rslora=method.rslora,
        use_dora=method.dora,
        init_lora_weights="pissa" if isinstance(method, Lora) and method.init == "pissa" else True,
    )
    try:
        adapted: torch.nn.Module = get_peft_model(model, config, autocast_adapter_dtype=False)
        return adapted
    except ValueError as error:
        linear = sorted({name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)})
        raise ModelError(
            f"method.target_modules: {str(error).splitlines()[0]}", f"this model's linear layers: {', '.join(linear)}"
        ) from None


def _gather_layers_whole(model: torch.nn.Module) -> None:
    """Make each decoder layer a ZeRO-3 leaf: gathered and released once, not linear by linear."""
    from deepspeed.utils import set_z3_leaf_modules

    layers = find_decoder_layers(model)
    set_z3_leaf_modules(model, list({type(layer) for layer in layers}))
    for layer in layers:
        if any(parameter.requires_grad for parameter in layer.parameters()):
            layer.register_forward_pre_hook(_let_gradient_in)


def _let_gradient_in(layer: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """DeepSpeed reduces a leaf's gradients in its full backward hook, which torch fires too early for a
    module none of whose inputs needs a gradient (deepspeed 0.19.8 stage3.py, leaf.register_full_backward_hook).
    """
    if args and torch.is_grad_enabled() and isinstance(args[0], torch.Tensor) and not args[0].requires_grad:
        return (args[0].detach().requires_grad_(True), *args[1:])
    return None
