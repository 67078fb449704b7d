"""What benchmarks/recovery.py compares with: plain Ray Train around HF Trainer and PEFT, its report callback, nothing of ours.

Run as a Ray job on the cluster: python ray_train_hf.py STORAGE STEPS SAVE_EVERY NODES. Each step of rank 0 leaves a line
{step, time, pid} in STORAGE/ray-train.jsonl.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

STORAGE, STEPS, SAVE_EVERY, NODES = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])


def train(config: dict[str, Any]) -> None:
    import ray.train
    import ray.train.huggingface.transformers as ray_hf
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

    torch.set_num_threads(1)
    storage = Path(config["storage"])
    tokenizer = AutoTokenizer.from_pretrained(storage / "tiny/model")
    model = AutoModelForCausalLM.from_pretrained(storage / "tiny/model", dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = []
    for line in (storage / "tiny/train.jsonl").read_text().splitlines():
        text = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
        ids = tokenizer(text, truncation=True, max_length=64, padding="max_length", return_tensors="pt")
        rows.append({"input_ids": ids["input_ids"][0], "attention_mask": ids["attention_mask"][0], "labels": ids["input_ids"][0].clone()})

    class Note(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if ray.train.get_context().get_world_rank() == 0:
                with (storage / "ray-train.jsonl").open("a") as file:
                    file.write(json.dumps({"step": state.global_step, "time": time.time(), "pid": os.getpid()}) + "\n")

    arguments = TrainingArguments(
        output_dir="/mnt/tmp/hf", max_steps=config["steps"], per_device_train_batch_size=2, learning_rate=3e-3, save_strategy="steps",
        save_steps=config["save_every"], logging_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, save_total_limit=2,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.add_callback(Note())
    trainer.add_callback(ray_hf.RayTrainReportCallback())
    trainer = ray_hf.prepare_trainer(trainer)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        trainer.train()
        return
    with checkpoint.as_directory() as folder:
        trainer.train(resume_from_checkpoint=os.path.join(folder, ray_hf.RayTrainReportCallback.CHECKPOINT_NAME))


def main() -> None:
    import ray.train
    from ray.train.torch import TorchTrainer

    result = TorchTrainer(
        train,
        train_loop_config={"storage": str(STORAGE), "steps": STEPS, "save_every": SAVE_EVERY},
        scaling_config=ray.train.ScalingConfig(num_workers=NODES, resources_per_worker={"CPU": 1}, placement_strategy="STRICT_SPREAD"),
        run_config=ray.train.RunConfig(
            name=f"ray-train-{int(time.time())}",
            storage_path=str(STORAGE / "ray-train"),
            failure_config=ray.train.FailureConfig(max_failures=5),
        ),
    ).fit()
    print("result", result.metrics)


if __name__ == "__main__":
    main()
