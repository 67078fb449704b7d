"""A model under ZeRO-3 that is sharded after it was loaded, layer by layer, and quantised before: no rank ever holds all of it.

transformers quantises only while it loads, and cannot do so under zero.Init: each rank would hold the whole quantised model before
DeepSpeed shards it, 206 GiB of Llama-3.1-405B. Here the weights stay in their mapped files until their layer's turn comes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from launcher.errors import ModelError
from launcher.plan import Plan

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel


def shard_by_layer(model: PreTrainedModel, plan: Plan, quantization: BitsAndBytesConfig | None, device: str) -> PreTrainedModel:
    """The model in `quantization`'s 4 or 8 bits (None: as it is), a rank's part of each parameter on the device. It comes on the CPU, in 16
    or 32 bits.

    Every rank must call it: DeepSpeed spreads rank 0's weights.
    """
    import deepspeed

    wanted = set() if quantization is None else find_quantised(model)
    for layer in [*find_decoder_layers(model), model]:
        for parent in layer.modules():
            for child_name, child in list(parent.named_children()):
                if quantization is not None and child in wanted:
                    setattr(parent, child_name, quantise_linear(child, quantization, device))
        deepspeed.zero.Init(module=layer, config_dict_or_path=dict(plan.deepspeed))  # moves what is left to the device, and shards
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    if quantization is None:
        return model
    # What transformers would have set: peft asks for the first, an export reads the second.
    if quantization.load_in_4bit:
        model.is_loaded_in_4bit = True
    else:
        model.is_loaded_in_8bit = True
    model.config.quantization_config = quantization
    return model


def find_quantised(model: PreTrainedModel) -> set[nn.Linear]:
    """The linear layers that transformers would quantise: all but heads."""
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    spared = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    return {module for name, module in model.named_modules() if type(module) is nn.Linear and should_convert_module(name, spared)}


def round_as_quantised(linear: nn.Linear, quantization: BitsAndBytesConfig, device: str) -> None:
    """Put in place of a layer's weight what its quantised form stands for, in the same dtype and where it was."""
    import bitsandbytes.functional as bnb

    weight, layer = linear.weight, quantise_linear(linear, quantization, device)
    if quantization.load_in_4bit:
        dense = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    else:
        dense = bnb.int8_vectorwise_dequant(layer.weight.data, layer.state.SCB)
    linear.weight = nn.Parameter(dense.to(weight.device, weight.dtype), requires_grad=False)


def find_decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The transformer layers: those of the longest ModuleList, and of an encoder-decoder's other stack."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of layers", "set parallel.leaf_modules to false")
    longest = max(lists, key=len)
    return [layer for layers in lists if type(layers[0]) is type(longest[0]) for layer in layers]


def quantise_linear(linear: nn.Linear, quantization: Any, device: str) -> Any:
    """The layer in 4 or 8 bits on the device (bitsandbytes 0.50.2 quantises when a weight is moved)."""
    if not quantization.load_in_4bit:
        from launcher.train.int8 import quantise_to_int8

        return quantise_to_int8(linear, quantization.llm_int8_threshold, device)
    import bitsandbytes as bnb

    from launcher.train.int4 import SharedParams4bit

    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, quantization.bnb_4bit_compute_dtype,
            compress_statistics=quantization.bnb_4bit_use_double_quant, quant_type=quantization.bnb_4bit_quant_type,
            quant_storage=quantization.bnb_4bit_quant_storage,
        )  # fmt: skip
    layer.weight = SharedParams4bit(
        linear.weight.data, requires_grad=False, compress_statistics=quantization.bnb_4bit_use_double_quant,
        quant_type=quantization.bnb_4bit_quant_type, quant_storage=quantization.bnb_4bit_quant_storage, module=layer,
    ).to(device)  # fmt: skip
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.data.to(device), requires_grad=False)
    return layer
