"""What a finished run is good for: its model answers, and its adapter merges into what it was trained on."""

from __future__ import annotations

import dataclasses
import io
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import plan_tiny

from launcher.errors import BudgetError, DataError, ModelError
from launcher.plan import Plan, load_plan
from launcher.progress import printable
from launcher.run import RunFolder, write_status
from launcher.train.generate import Chat, answer, check_finished, load_trained, make_streamer
from launcher.train.merge import merge, merge_run

PROMPT = torch.tensor([[1, 40, 50, 60, 70, 80, 90, 2]])
LORA = {"kind": "lora", "r": 4}
QLORA = {"kind": "qlora", "r": 4}
INT8 = {"kind": "qlora", "r": 4, "bits": 8}


def finish_run(tiny: Path, path: Path, method: dict[str, Any], **sections: Any) -> RunFolder:
    """The folder of a run whose training did something: adapters with random weights in place of trained ones."""
    from launcher.train.methods import apply_method
    from launcher.train.model import load_base, load_tokenizer

    plan = plan_tiny(tiny, path, method=method, **sections)
    model: Any = apply_method(load_base(plan, "cpu"), plan)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or not method["kind"].endswith("lora"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    folder = RunFolder(path)
    plan.save(folder.plan)
    model.save_pretrained(folder.model)
    load_tokenizer(plan).save_pretrained(folder.model)
    write_status(folder, "finished")
    return folder


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    made = tmp_path_factory.mktemp("runs")
    methods = {"lora": LORA, "qlora": QLORA, "int8": INT8, "full": {"kind": "full"}, "rslora": LORA | {"rslora": True, "dora": True}}
    return {name: finish_run(tiny, made / name, method) for name, method in methods.items()}


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=PROMPT, use_cache=False).logits.float()
    return logits


def as_trained(folder: RunFolder, plan: Plan) -> torch.Tensor:
    """Logits of the adapter on the base as the run held it: quantised where it was quantised."""
    from peft import PeftModel

    from launcher.train.model import load_base

    return logits_of(PeftModel.from_pretrained(load_base(plan, "cpu"), str(folder.model)))


@pytest.mark.parametrize("name", ["lora", "qlora", "rslora"])
def test_the_loaded_and_the_merged_model_are_the_trained_one(name: str, runs: dict[str, RunFolder], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = runs[name]
    wanted = as_trained(folder, load_plan(folder.plan))
    assert torch.allclose(logits_of(load_trained(folder)[0]), wanted, atol=1e-5)
    merged = merge_run(folder, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert torch.allclose(logits_of(plain), wanted, atol=1e-5)
    assert plain.config.use_cache and plain.dtype == torch.float32
    assert not hasattr(plain.config, "quantization_config") and not hasattr(plain, "peft_config")
    assert {oct(path.stat().st_mode & 0o777) for path in merged.iterdir()} == {"0o644"}, "others may read it"


def test_a_bf16_run_merges_in_fp32_without_loss_and_in_bf16_closely(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = finish_run(tiny, tmp_path / "run", QLORA, model={"dtype": "bf16"})
    wanted = as_trained(folder, load_plan(folder.plan))
    scale = float(wanted.abs().max())
    for dtype in ("fp32", "bf16"):
        plain = AutoModelForCausalLM.from_pretrained(merge_run(folder, tmp_path / dtype, dtype))
        assert torch.allclose(logits_of(plain), wanted, atol=0.03 * scale), dtype


def test_merging_qlora_into_the_original_base_would_be_another_model(runs: dict[str, RunFolder], tiny: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = runs["qlora"]
    original = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny / "model"), str(folder.model))
    assert (logits_of(original) - as_trained(folder, load_plan(folder.plan))).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["qlora", "int8"])
def test_a_base_is_merged_as_transformers_quantises_it(name: str, runs: dict[str, RunFolder]) -> None:
    """Weights are turned one at a time, and equal those of a base that was quantised and unpacked whole."""
    from launcher.train.model import load_base, make_quantization
    from launcher.train.shard import find_quantised, round_as_quantised

    plan = load_plan(runs[name].plan)
    whole = load_base(plan, "cpu").dequantize().state_dict()
    base = load_base(plan, "cpu", dense=True)
    for linear in find_quantised(base):
        round_as_quantised(linear, make_quantization(plan.recipe.method, torch.float32), "cpu")
    assert all(torch.equal(weight, whole[weight_name]) for weight_name, weight in base.state_dict().items())


def test_a_merge_larger_than_the_machines_memory_is_refused(
    runs: dict[str, RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.train import merge as merging

    monkeypatch.setattr(merging, "find_host_memory", lambda: 1000)
    with pytest.raises(BudgetError, match="in memory .* and this machine has 1000 B"):
        merge_run(runs["lora"], tmp_path / "merged")


def test_an_8_bit_run_merges_into_what_its_weights_were(runs: dict[str, RunFolder]) -> None:
    folder = runs["int8"]
    plan = load_plan(folder.plan)
    merged, wanted = logits_of(merge(plan, folder, torch.float32)), as_trained(folder, plan)
    assert torch.allclose(merged, wanted, atol=0.05 * float(wanted.abs().max()))


def test_the_merged_folder_has_the_tokenizer_and_the_dtype_asked_for(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoConfig, AutoTokenizer

    merged = merge_run(runs["qlora"], tmp_path / "deep" / "merged", "bf16")
    assert AutoTokenizer.from_pretrained(merged).chat_template
    assert AutoConfig.from_pretrained(merged).dtype == torch.bfloat16
    with safe_open(merged / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118  no iterator
    assert [path.name for path in merged.parent.iterdir()] == ["merged"]


def test_a_folder_that_holds_something_is_not_written_over(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="not an empty folder"):
        merge_run(runs["lora"], tmp_path / "merged")
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["mine.txt"]


def test_a_merge_that_fails_leaves_nothing(runs: dict[str, RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    def fail(self: Any, folder: Path, **options: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        merge_run(runs["lora"], tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_full_is_told_before_the_merge(runs: dict[str, RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=1000))
    with pytest.raises(BudgetError, match="1000 B left"):
        merge_run(runs["lora"], tmp_path / "merged")


def test_a_whole_model_has_nothing_to_merge_and_loads_as_it_is(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(DataError, match="nothing to merge"):
        merge_run(runs["full"], tmp_path / "merged")
    assert torch.equal(logits_of(load_trained(runs["full"])[0]), logits_of(AutoModelForCausalLM.from_pretrained(runs["full"].model)))


@pytest.mark.parametrize(
    ("state", "told"), [("running", "still running"), ("failed", "failed"), ("stopped", "stopped"), (None, "no readable status")]
)
def test_a_run_that_did_not_finish_has_no_model(state: Any, told: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.model.mkdir()
    if state:
        write_status(folder, state)
    with pytest.raises(DataError, match=told):
        check_finished(folder)


def test_an_adapter_that_lost_a_weight_is_refused(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(runs["lora"].path, tmp_path / "copy")
    weights = tmp_path / "copy" / "model" / "adapter_model.safetensors"
    tensors = load_file(weights)
    lost = sorted(tensors)[0]
    del tensors[lost]
    save_file(tensors, weights)
    with pytest.raises(ModelError, match=lost):
        load_trained(RunFolder(tmp_path / "copy"))


def test_a_run_made_on_gpus_answers_on_a_cpu(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    shutil.copytree(runs["lora"].path, tmp_path / "copy")
    folder = RunFolder(tmp_path / "copy")
    plan = load_plan(folder.plan)
    layout = dataclasses.replace(plan.layout, attn_implementation="flash_attention_2", zero_stage=3, zero_init=True, accelerator="cuda")
    dataclasses.replace(plan, layout=layout).save(folder.plan)
    assert torch.allclose(logits_of(load_trained(folder)[0]), as_trained(folder, plan), atol=1e-5)


def test_greedy_answers_repeat_and_stream_what_they_return(runs: dict[str, RunFolder], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_trained(runs["lora"])
    messages = [{"role": "user", "content": "lamp sea"}]
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    first = answer(model, tokenizer, messages, max_new_tokens=8, streamer=make_streamer(tokenizer))
    assert first == answer(model, tokenizer, messages, max_new_tokens=8) and first
    assert sys.stdout.getvalue().strip() == printable(first).strip()  # type: ignore[attr-defined]


def test_without_a_template_the_prompt_is_continued(runs: dict[str, RunFolder]) -> None:
    model, tokenizer = load_trained(runs["lora"])
    tokenizer.chat_template = None
    said = answer(model, tokenizer, [{"role": "user", "content": "lamp sea"}], max_new_tokens=4)
    ids = tokenizer("lamp sea", return_tensors="pt")
    assert (
        said
        == tokenizer.decode(
            model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :], skip_special_tokens=True
        ).strip()
    )


def test_warm_answers_differ(runs: dict[str, RunFolder]) -> None:
    model, tokenizer = load_trained(runs["lora"])
    torch.manual_seed(0)
    answers = {answer(model, tokenizer, [{"role": "user", "content": "lamp"}], max_new_tokens=8, temperature=2.0) for _ in range(4)}
    assert len(answers) > 1


def test_a_conversation_longer_than_the_context_is_told(runs: dict[str, RunFolder]) -> None:
    model, tokenizer = load_trained(runs["lora"])
    with pytest.raises(DataError, match="256 positions"):
        answer(model, tokenizer, [{"role": "user", "content": "lamp " * 200}], max_new_tokens=100)


def test_a_chat_keeps_what_was_said_until_it_is_reset(tiny: Path, tmp_path: Path) -> None:
    sections = {"data": {"system_prompt": "Be brief."}}
    chat = Chat(finish_run(tiny, tmp_path / "run", LORA, **sections), max_new_tokens=4, temperature=0.0)
    opening = [{"role": "system", "content": "Be brief."}]
    said = chat.ask("lamp", stream=False)
    assert chat.messages == [*opening, {"role": "user", "content": "lamp"}, {"role": "assistant", "content": said}]
    chat.reset()
    assert chat.messages == opening
