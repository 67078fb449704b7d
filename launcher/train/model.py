"""From a plan to the model that is trained: its tokenizer, its weights, the method laid on them."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from launcher.data.formats import load_chat_template
from launcher.errors import ModelError
from launcher.plan import Plan
from launcher.plan.source import ModelSource, locate_model
from launcher.recipe import QLora
from launcher.run import cache_dir
from launcher.train.shard import shard_by_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TORCH_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_tokenizer(plan: Plan) -> PreTrainedTokenizerFast:
    """The model's tokenizer, with a padding token, and the recipe's chat template where it brings one."""
    from transformers import AutoTokenizer

    source = locate_model(plan.recipe.model.name_or_path, plan.base_dir)
    where: dict[str, Any] = {"gguf_file": Path(source.path).name} if source.kind == "gguf" else {"revision": plan.recipe.model.revision}
    folder = str(source.folder) if source.kind != "hub" else source.path
    if source.kind == "gguf" and (converted := _converted_folder(source)).is_dir():
        folder, where = str(converted), {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=plan.recipe.model.trust_remote_code, **where)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no tokenizer in {folder}: {_first_line(error)}", "put tokenizer.json and tokenizer_config.json beside the weights"
        ) from None
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of {folder} is a slow one, without offsets",
            "convert it to tokenizer.json (transformers: convert_slow_tokenizer)",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if (template := load_chat_template(plan.recipe.data, plan.base_dir)) is not None:
        tokenizer.chat_template = template
    return tokenizer


def find_start_id(plan: Plan, tokenizer: PreTrainedTokenizerFast) -> int | None:
    """What an encoder-decoder's decoder is given before its first token; None for any other model.

    Where config.json does not say, it is padding, as T5 and mT5 were trained (transformers, model_doc/t5).
    """
    if not plan.shape.is_pair:
        return None
    told = plan.shape.config.get("decoder_start_token_id")
    return int(tokenizer.pad_token_id if told is None else told)


def prepare_weights(plan: Plan) -> None:
    """Do what one process a node must do before the others load: turn a GGUF file into safetensors, once."""
    source = locate_model(plan.recipe.model.name_or_path, plan.base_dir)
    if source.kind == "gguf" and not _converted_folder(source).is_dir():
        _convert_gguf(source)


def _converted_folder(source: ModelSource) -> Path:
    digest = hashlib.sha256()
    with open(source.path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return cache_dir() / "models" / f"{Path(source.path).stem}-{digest.hexdigest()[:16]}"


def _convert_gguf(source: ModelSource) -> None:
    """Dequantise a GGUF file to bf16 safetensors in the cache: in one move, so that half of it is never seen.

    Loaded from there it is a model as any other: bitsandbytes can quantise it, ZeRO-3 can shard it.
    """
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = _converted_folder(source)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unfinished-"))
    try:
        name = Path(source.path).name
        AutoTokenizer.from_pretrained(source.folder, gguf_file=name).save_pretrained(unfinished)
        model = AutoModelForCausalLM.from_pretrained(
            source.folder, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        # On each node by the first of its ranks: save_pretrained writes on rank 0 alone once there is a group
        # (transformers 5.23, distributed/mixin.py).
        model.config.save_pretrained(unfinished)
        model.generation_config.save_pretrained(unfinished)
        save_model(model, str(unfinished / "model.safetensors"), metadata={"format": "pt"})
        if not folder.is_dir():
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def list_weight_files(plan: Plan) -> list[Path]:
    """The files that make the base model what it is: configuration and weights. A hub model must be in the local cache by now."""
    source = locate_model(plan.recipe.model.name_or_path, plan.base_dir)
    if source.kind == "gguf":
        return [Path(source.path)]
    folder = Path(source.path)
    if source.kind == "hub":
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(source.path, "config.json", revision=plan.recipe.model.revision)
        if not isinstance(config, str):
            raise ModelError(f"{source.path} is not in the local cache after loading", "check HF_HOME and the disk it lies on")
        folder = Path(config).parent
    return [folder / "config.json", *sorted(folder.glob("*.safetensors"))]


def list_loaded_files(plan: Plan) -> list[Path]:
    """The safetensors files that the base model is loaded from."""
    folder = Path(weights_path(plan))
    return sorted(folder.glob("*.safetensors")) if folder.is_dir() else list_weight_files(plan)[1:]


def weights_path(plan: Plan) -> str:
    """What from_pretrained is given: a folder or a hub id."""
    source = locate_model(plan.recipe.model.name_or_path, plan.base_dir)
    return str(_converted_folder(source)) if source.kind == "gguf" else source.path


def load_base(plan: Plan, device: str, *, dense: bool = False) -> PreTrainedModel:
    """The base model on a device, in the plan's dtype, quantised where the method says so, unless it is asked for `dense`.

    Raises ModelError where the folder's weights do not fill the model: a fresh random layer is never trained on unsaid.
    """
    import transformers

    recipe, layout = plan.recipe, plan.layout
    dtype = TORCH_DTYPE[layout.dtype]
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": layout.attn_implementation,
        "trust_remote_code": recipe.model.trust_remote_code,
        "revision": recipe.model.revision,
        "use_safetensors": True,
    }
    quantization = make_quantization(recipe.method, dtype) if isinstance(recipe.method, QLora) and not dense else None
    # To know whether a T5's head is its embedding, transformers 5.23 compares them, and two parameters that are sharded already look the same.
    compares = plan.shape.is_pair and not plan.shape.tied_embeddings
    sharded_later = layout.zero_init and (quantization is not None or compares)
    if quantization is not None and not sharded_later:
        options["quantization_config"] = quantization
    if sharded_later or not layout.zero_init:
        options["device_map"] = {"": "cpu" if sharded_later else device}
    try:
        with nullcontext() if sharded_later else starting_sharded(plan):
            made = getattr(transformers, plan.shape.auto_class)
            model, loading = made.from_pretrained(weights_path(plan), output_loading_info=True, **options)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{recipe.model.name_or_path} does not load: {_first_line(error)}", "check the folder, the revision and model.trust_remote_code"
        ) from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ModelError(
            f"{recipe.model.name_or_path} lacks {len(missing)} weights of its architecture, {missing[0]} among them",
            "the download is incomplete, or it is not a language model",
        )
    if sharded_later:
        model = shard_by_layer(model, plan, quantization, device)
    if quantization is not None:
        _keep_packing(model)
    return model


def _keep_packing(model: torch.nn.Module) -> None:
    """Have 4-bit layers leave their weights as they are.

    On a CPU with avx512_bf16, bitsandbytes 0.50.2 repacks them in place at the first evaluation, for inference
    alone: training goes on with garbage (nn/modules.py, Linear4bit.forward). tests/test_training.py shows it.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def make_quantization(method: QLora, dtype: torch.dtype) -> Any:
    """What transformers is told of the base's 4 or 8 bits."""
    from transformers import BitsAndBytesConfig

    if method.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    # Stored in the dtype of the other weights: ZeRO-3 shards and gathers them together (peft#1550).
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=method.quant_type,
        bnb_4bit_use_double_quant=method.double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


@contextmanager
def starting_sharded(plan: Plan) -> Iterator[None]:
    """Inside, transformers builds a ZeRO-3 model sharded from the first weight on, where the plan says so, and peft gathers a weight to read it."""
    if not plan.layout.zero_init:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

    keep = HfDeepSpeedConfig(dict(plan.deepspeed))  # transformers holds it by a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del keep


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
