"""Tiny parts that are real: a Llama of 3 layers with a tokenizer trained on the spot, conversations, recipes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from launcher.cluster import Cluster
from launcher.plan import Plan, make_plan
from launcher.recipe import Recipe

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = [
    "lamp",
    "sea",
    "cat",
    "boat",
    "storm",
    "fog",
    "keeper",
    "bell",
    "green",
    "red",
    "north",
    "tower",
    "stair",
    "glass",
    "oil",
    "rope",
    "gull",
    "wind",
    "tide",
    "stone",
]


def write_conversations(path: Path, count: int, seed: int = 0) -> Path:
    """Questions whose answer is the question's words in reverse: a thing a small model can start to learn."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            words = rng.choices(WORDS, k=rng.randint(2, 6))
            turns = [{"role": "user", "content": " ".join(words)}, {"role": "assistant", "content": " ".join(reversed(words))}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def write_pairs(path: Path, count: int, seed: int = 0) -> Path:
    """Sources whose target is the source's words in reverse."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            words = rng.choices(WORDS, k=rng.randint(2, 6))
            file.write(json.dumps({"prompt": " ".join(words), "completion": " ".join(reversed(words))}) + "\n")
    return path


def write_pair_model(folder: Path, **changes: Any) -> Path:
    """A random T5 (64 wide, 3 layers a stack), and the same tokenizer without a template, which ends each text."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = build_tokenizer(None)
    end = str(tokenizer.eos_token)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_heads": 4, "vocab_size": 512, "pad_token_id": tokenizer.pad_token_id,
             "eos_token_id": tokenizer.eos_token_id, "decoder_start_token_id": tokenizer.pad_token_id, "dropout_rate": 0.0}  # fmt: skip
    model = T5ForConditionalGeneration(T5Config(**(shape | changes)))
    if changes.get("tie_word_embeddings") is False:  # as the files of T5 1.1 have it
        model.lm_head.weight = torch.nn.Parameter(0.05 * torch.randn(512, 64))
        model.all_tied_weights_keys.pop("lm_head.weight")
    model.save_pretrained(folder)
    if changes.get("tie_word_embeddings") is False:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}), encoding="utf-8")
    return folder


def build_tokenizer(template: str | None) -> Any:
    """A byte-level BPE of 512 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([" ".join(WORDS)] * 50, trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template)


def write_model(folder: Path, **changes: Any) -> Path:
    """A random Llama (96 wide, 3 layers) and a byte-level BPE tokenizer of 512 tokens with a ChatML template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    build_tokenizer(CHATML).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
             "vocab_size": 512, "max_position_embeddings": 256, "tie_word_embeddings": False, "initializer_range": 0.08}  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**(shape | changes))).save_pretrained(folder)
    return folder


def make_recipe(folder: Path, **sections: Any) -> Recipe:
    """A recipe on the tiny model and data in `folder`, with sections changed."""
    base: dict[str, Any] = {
        "name": "tiny",
        "model": {"name_or_path": str(folder / "model")},
        "method": {"kind": "full"},
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), "seq_len": 64},
        "batch": {"global_batch_size": 8, "micro_batch_size": 2},
        "optim": {"lr": 3e-3, "weight_decay": 0.1, "max_grad_norm": 0.5},
        "schedule": {"max_steps": 5, "epochs": 3.0, "warmup_steps": 2},
        "track": {"to": []},
    }
    for name, section in sections.items():
        same = isinstance(section, dict) and isinstance(base.get(name), dict) and "kind" not in section
        base[name] = {**base[name], **section} if same else section
    return Recipe.model_validate_json(json.dumps(base))


def plan_tiny(folder: Path, run_dir: Path, *, ranks: int = 2, **sections: Any) -> Plan:
    cluster = Cluster(workers_per_node=ranks, cpus_per_node=ranks, device_memory=8 << 30, host_memory=16 << 30)
    run_dir.mkdir(parents=True, exist_ok=True)
    plan = make_plan(make_recipe(folder, **sections), cluster, base_dir=str(folder), run_dir=str(run_dir))
    if plan.layout.zero_stage == 3:
        # DeepSpeed never shards a parameter under the threshold: on a tiny model that would be all of them.
        plan.deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return plan
