"""Talk to what a run made: the model as it was trained and evaluated, on whatever this machine has."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from launcher.cluster import find_host_memory
from launcher.errors import DataError, ModelError
from launcher.plan import Plan, load_plan
from launcher.progress import printable
from launcher.recipe import Lora, QLora
from launcher.run import RunFolder
from launcher.train.encode import write_source
from launcher.train.model import TORCH_DTYPE, load_base, prepare_weights
from launcher.units import DTYPE_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = dict[str, str]


def load_trained(folder: RunFolder) -> tuple[Any, PreTrainedTokenizerFast]:
    """The trained model in eval mode, and its tokenizer. Raises DataError for a run that is not finished."""
    from transformers import AutoTokenizer

    check_finished(folder)
    plan, device = fit_to_machine(load_plan(folder.plan))
    if isinstance(plan.recipe.method, Lora | QLora):
        prepare_weights(plan)
        base = load_base(plan, device)
        if device == "cpu" and fits_dequantised(plan):
            base = base.dequantize()
        model = attach_adapter(base, folder)
    else:
        model = _load_whole(plan, folder, device)
    return model.eval(), AutoTokenizer.from_pretrained(folder.model, trust_remote_code=plan.recipe.model.trust_remote_code)


def check_finished(folder: RunFolder) -> None:
    """Raises DataError unless the run came to its end: a model of half a run is never used unsaid."""
    try:
        state = json.loads(folder.status.read_text(encoding="utf-8"))["state"]
    except (OSError, ValueError, KeyError):
        state = "unknown"
    if state != "finished":
        why = {"running": "is still running, or was killed", "failed": "failed", "stopped": "was stopped"}.get(
            state, "has no readable status.json"
        )
        raise DataError(f"the run {folder.path} {why}: there is no finished model in it", f"see {folder.status} and {folder.path / 'logs'}")
    if not folder.model.is_dir():
        raise DataError(f"the run {folder.path} is finished, and its folder model/ is gone", "copy it back, or run the recipe again")


def fit_to_machine(plan: Plan) -> tuple[Plan, str]:
    """The plan with what one process on this machine cannot do taken out, and the device to use."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    attention = plan.layout.attn_implementation
    if device == "cpu" and attention == "flash_attention_2":
        attention = "sdpa"
    return dataclasses.replace(plan, layout=dataclasses.replace(plan.layout, zero_init=False, attn_implementation=attention)), device


def fits_dequantised(plan: Plan) -> bool:
    """Whether 4-bit weights can be unpacked for good, in half of the host's memory. The same model, and
    on a CPU five times faster: it would unpack them for each token (SmolLM2-135M, bitsandbytes 0.50.2).
    8-bit ones are left: LLM.int8() rounds activations too, so unpacked it is another model."""
    method = plan.recipe.method
    size = plan.shape.num_params * DTYPE_BYTES[plan.layout.dtype]
    return isinstance(method, QLora) and method.bits == 4 and size < find_host_memory() / 2


def attach_adapter(base: Any, folder: RunFolder) -> Any:
    """The base with the run's adapter. Raises ModelError unless every weight of the adapter found its place."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    model = PeftModel.from_pretrained(base, str(folder.model), autocast_adapter_dtype=False)
    with safe_open(folder.model / "adapter_model.safetensors", framework="pt") as file:
        saved = set(file.keys())
    # PEFT itself takes a partial adapter in silence.
    placed = set(get_peft_model_state_dict(model))
    if saved != placed:
        stray = sorted(saved ^ placed)
        raise ModelError(f"the adapter in {folder.model} does not fit its base: {len(stray)} weights without a counterpart, {stray[0]} among them",
                         "the base is not the one it was trained on, or the file is damaged")  # fmt: skip
    return model


def _load_whole(plan: Plan, folder: RunFolder, device: str) -> Any:
    import transformers

    made: Any = getattr(transformers, plan.shape.auto_class)
    return made.from_pretrained(
        folder.model,
        dtype=TORCH_DTYPE[plan.layout.dtype],
        attn_implementation=plan.layout.attn_implementation,
        trust_remote_code=plan.recipe.model.trust_remote_code,
        device_map={"": device},
    )


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    streamer: Any = None,
    synced_gpus: bool = False,
) -> str:
    """The model's next turn. Greedy at temperature 0; `streamer` is given the text as it comes.

    With `synced_gpus` ranks that share a sharded model go on until all have finished. Without a chat template the last message is continued as plain text.
    An encoder-decoder without one reads the system's messages and the last one.
    Raises DataError where the conversation leaves no room in the model's context.
    """
    from transformers import GenerationConfig

    pair = bool(model.config.is_encoder_decoder)
    if tokenizer.chat_template:
        encoded: Any = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        encoded = tokenizer(write_source(messages) if pair else messages[-1]["content"], return_tensors="pt")
    ids_BS = encoded["input_ids"].to(model.device)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and ids_BS.shape[1] + max_new_tokens > positions:
        raise DataError(f"the conversation is {ids_BS.shape[1]} tokens, and with {max_new_tokens} new ones longer than the model's {positions} positions",
                        "start over with /reset, or lower --max-new-tokens")  # fmt: skip
    how: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {"do_sample": False}
    )
    if pair:
        start = model.generation_config.decoder_start_token_id
        how["decoder_start_token_id"] = tokenizer.pad_token_id if start is None else start
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, use_cache=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=_ends(model, tokenizer), **how
    )
    written_BS = model.generate(
        input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS), generation_config=config, streamer=streamer, synced_gpus=synced_gpus
    )
    text: str = tokenizer.decode(written_BS[0, 1 if pair else ids_BS.shape[1] :], skip_special_tokens=True)
    return text.strip()


def _ends(model: Any, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Every token that ends a turn: the tokenizer's, and those the model's own generation config names."""
    of_model = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])} - {None})


class Chat:
    """A conversation with a run's model: it keeps what was said until `reset`."""

    def __init__(self, folder: RunFolder, *, max_new_tokens: int, temperature: float) -> None:
        self.model, self.tokenizer = load_trained(folder)
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        system = load_plan(folder.plan).recipe.data.system_prompt
        self._opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._opening)

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = list(self._opening)

    def ask(self, text: str, *, stream: bool) -> str:
        """The answer, kept with its question; printed as it comes with `stream`. What is broken off is not kept."""
        turns = [*self.messages, {"role": "user", "content": text}]
        streamer = make_streamer(self.tokenizer) if stream else None
        said = answer(
            self.model, self.tokenizer, turns, max_new_tokens=self.max_new_tokens, temperature=self.temperature, streamer=streamer
        )
        self.messages = [*turns, {"role": "assistant", "content": said}]
        return said


def make_streamer(tokenizer: PreTrainedTokenizerFast) -> Any:
    """Prints an answer to stdout word by word."""
    from transformers import TextStreamer

    class PrintableStreamer(TextStreamer):  # type: ignore[misc, unused-ignore]  # transformers is not imported for types
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(printable(text), end="\n" if stream_end else "", flush=True)

    return PrintableStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def quiet_libraries() -> None:
    """No progress bars and no advice from libraries between a question and its answer. Before they are imported."""
    import logging
    import os
    import warnings

    # DeepSpeed, which PEFT imports, asks for this or tells on stdout that it guessed.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
