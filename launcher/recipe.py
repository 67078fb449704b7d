"""Recipe: what is wanted, one to one with the YAML a person writes.

Every section is frozen and refuses unknown keys. `load_recipe` reads a file with its overrides and raises
one RecipeError that carries every fault. A value "auto" is decided by the plan, which says why.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from launcher.errors import Fault, RecipeError
from launcher.schema import Document, Spec, check_document, find_tagged, load_document
from launcher.units import make_bytes

Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]


class Model(Spec):
    """The model that is fine-tuned."""

    name_or_path: str
    """A local folder, a hub id, or pkg://PACKAGE/FILE.gguf for a file inside an installed package."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What weights and activations are computed in; auto is bf16 where devices have it, else fp16 on a GPU, fp32 on a CPU."""
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """The attention kernel; auto takes flash attention where it is installed, else SDPA."""
    liger_kernel: Literal["auto"] | bool = "auto"
    """Liger's fused Triton kernels; auto uses them on a GPU where liger-kernel is installed."""
    loss: Auto | Literal["plain", "chunked", "liger"] = "plain"
    """How cross-entropy is computed: plain makes all logits at once; chunked a few rows of them at a time; liger is Liger's fused kernel,
    on a GPU. All give the same loss; auto is the fastest that fits."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for a model whose code you have read."""


class Full(Spec):
    """Train every weight."""

    kind: Literal["full"] = "full"


class Freeze(Spec):
    """Train some of the weights, keep the rest."""

    kind: Literal["freeze"]
    last_layers: NonNegativeInt = 0
    """Train the last k transformer layers."""
    patterns: tuple[str, ...] = ()
    """Also train the parameters whose name matches one of these globs, such as "*norm*" or "lm_head*"."""


class Lora(Spec):
    """Train low-rank adapters beside the linear layers (Hu et al. 2021)."""

    kind: Literal["lora"]
    r: PositiveInt = 16
    """Rank of the adapters."""
    alpha: PositiveFloat = 32.0
    """Scale: an adapter's output is multiplied by alpha / r (alpha / sqrt(r) with rslora)."""
    dropout: Fraction = 0.0
    """Dropout on the adapters' input."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Which linear layers get an adapter, by the end of their name; all-linear leaves the head out."""
    rslora: bool = False
    """Rank-stabilised scale alpha / sqrt(r) (Kalajdzievski 2023)."""
    dora: bool = False
    """Learn magnitude and direction apart (Liu et al. 2024); slower."""
    init: Literal["default", "pissa"] = "default"
    """How adapters start: default is zero output, pissa the principal singular vectors (Meng et al. 2024)."""
    quantization: Auto | None = None
    """auto lets the plan make this a qlora (8 or 4 bits, same adapters) where the base would not fit as it is."""


class QLora(Spec):
    """LoRA on a base that is quantised by bitsandbytes (Dettmers et al. 2023)."""

    kind: Literal["qlora"]
    bits: Literal[4, 8] = 4
    """4 (NF4 or FP4) or 8 (LLM.int8())."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit code."""
    double_quant: bool = True
    """Quantise the 4-bit scales too: saves 0.37 bits a weight."""
    r: PositiveInt = 16
    """Rank of the adapters."""
    alpha: PositiveFloat = 32.0
    """Scale: an adapter's output is multiplied by alpha / r (alpha / sqrt(r) with rslora)."""
    dropout: Fraction = 0.0
    """Dropout on the adapters' input."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Which linear layers get an adapter, by the end of their name; all-linear leaves the head out."""
    rslora: bool = False
    """Rank-stabilised scale alpha / sqrt(r) (Kalajdzievski 2023)."""
    dora: bool = False
    """Learn magnitude and direction apart (Liu et al. 2024); slower."""


Method = Annotated[Full | Freeze | Lora | QLora, Field(discriminator="kind")]


class Source(Spec):
    """One place that rows come from."""

    path: str
    """A file or glob (jsonl, json, csv, tsv, parquet, arrow), relative to the recipe; or hub://OWNER/NAME."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"
    """What a row holds; auto looks at the fields of the first row."""
    columns: dict[str, str] = {}
    """Which column stands for which field of the format, such as {prompt: question, completion: answer}."""
    split: str = "train"
    """The split of a hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    weight: PositiveFloat = 1.0
    """How often this source is seen in an epoch: 2 is twice, 0.5 every other row."""
    limit: PositiveInt | None = None
    """Use the first n rows only."""


class Data(Spec):
    """What it is trained on."""

    train: tuple[Source, ...] = Field(min_length=1)
    """The sources of the training set; one path or one source may be written without the list."""
    eval: tuple[Source, ...] = ()
    """The sources of the held-out set."""
    eval_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Hold out this share of the training set instead of naming a held-out set."""
    seq_len: PositiveInt = 1024
    """Length in tokens that examples are packed to, and the longest an example may be."""
    packing: bool | Auto = "auto"
    """Put several examples into one sequence; none attends to another. auto does so where the model's code keeps them apart."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Which tokens carry loss: those of the answers, or all."""
    too_long: Literal["error", "drop", "truncate"] = "error"
    """What happens to an example longer than seq_len."""
    system_prompt: str | None = None
    """Put before conversations that have no system message of their own."""
    chat_template: str | None = None
    """A Jinja chat template (the text, or a path) in place of the tokenizer's."""

    @field_validator("train", "eval", mode="before", json_schema_input_type=str | Source | tuple[str | Source, ...])
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        many = value if isinstance(value, list | tuple) else [value]
        return tuple({"path": item} if isinstance(item, str) else item for item in many)


class Batch(Spec):
    """How many samples an optimizer step sees. A sample is a pack, or an example where packing is off."""

    global_batch_size: PositiveInt = 16
    """Samples a step, over all ranks and micro-steps; kept when the number of nodes changes."""
    micro_batch_size: PositiveInt | Auto = "auto"
    """Samples one rank takes through the model at a time."""


OptimName = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "sgd", "lion", "lion_8bit", "adafactor"]


class Optim(Spec):
    """The optimizer."""

    name: OptimName = "adamw"
    """adamw and sgd are torch's, adafactor is torch's, lion and the 8-bit and paged ones are bitsandbytes'."""
    lr: PositiveFloat = 1e-4
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay, decoupled but for sgd; norms, biases and other one-dimensional weights are left out."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of the first and second moment (adamw, lion)."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator (adamw)."""
    momentum: Fraction = 0.0
    """Momentum of sgd."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip the global gradient norm to this; 0 does not clip."""


class Schedule(Spec):
    """How long training goes and how the learning rate moves."""

    kind: Literal["constant", "linear", "cosine"] = "cosine"
    """The shape after the warm-up."""
    epochs: PositiveFloat = 1.0
    """Passes over the training set."""
    max_steps: PositiveInt | None = None
    """Stop after so many optimizer steps, whatever epochs says."""
    warmup_steps: NonNegativeInt | None = None
    """Steps of linear warm-up; in place of warmup_ratio."""
    warmup_ratio: Fraction = 0.03
    """Share of all steps that warm up."""
    min_lr_ratio: Fraction = 0.0
    """The lowest learning rate, as a share of the peak."""


class Parallel(Spec):
    """How the model is spread over the devices (DeepSpeed ZeRO, Rajbhandari et al. 2019)."""

    zero_stage: Literal[0, 1, 2, 3, "auto"] = 2
    """0 replicates; 1 shards optimizer states; 2 also gradients; 3 also weights; auto is the fastest that fits."""
    offload: Auto | None = None
    """auto lets the plan choose offload_optimizer and offload_param; without it they are as written."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory (stages 1 to 3)."""
    offload_param: bool = False
    """Keep weights in host memory too (stage 3)."""
    nvme_path: str | None = None
    """A folder on each machine's own NVMe disk: what is offloaded is kept there and not in host memory (stage 3)."""
    reduce_bucket_size: PositiveInt | Auto | None = None
    """Elements of gradients that are reduced together; unless told, DeepSpeed's 500 million, or all there are. auto takes fewer where it must."""
    leaf_modules: Auto | bool = "auto"
    """Stage 3: gather a whole decoder layer at a time; several times faster with adapters."""


class Memory(Spec):
    """What is given up to fit."""

    gradient_checkpointing: bool | Literal["auto", "offload"] = True
    """Recompute activations in the backward pass (non-reentrant) instead of keeping them; offload also moves what is kept to host memory;
    auto does as little of it as it can."""
    budget: str | None = None
    """What a device may use, such as 24GiB: the plan fits it and the run is held to it. Without one, the device's memory."""

    @field_validator("budget", mode="before")
    @classmethod
    def _with_unit(cls, value: Any) -> Any:
        if value is not None:
            try:
                size = make_bytes(str(value))
            except ValueError:
                raise ValueError("should be a size with its unit, such as 24GiB or 80GB") from None
            if size < 1:
                raise ValueError("should be a size above 0, such as 24GiB or 80GB")
        return value

    @property
    def budget_bytes(self) -> int | None:
        return None if self.budget is None else make_bytes(self.budget)


class Save(Spec):
    """When checkpoints are saved, where, and how many are kept. The last step is always saved, and a run that is stopped saves first."""

    every_steps: PositiveInt | None = None
    """Save every so many optimizer steps."""
    every_minutes: PositiveFloat | None = 10.0
    """Save when so many minutes have passed since the last save; null turns the clock off."""
    keep: PositiveInt = 2
    """How many checkpoints stay, the newest ones; older ones are deleted once a newer one is whole."""
    keep_best: bool = False
    """Also save whenever an evaluation is the best so far, and keep that checkpoint however old it gets."""
    storage: str | None = None
    """A folder that all machines see, or a URL (s3://, gs://), for the checkpoints of all runs; unless told, they lie in the run's folder."""

    @field_validator("storage")
    @classmethod
    def _check_url(cls, value: str | None) -> str | None:
        if value is None or "://" not in value:
            return value
        scheme, _, place = value.partition("://")
        bucket = place.partition("?")[0].partition("/")[0]
        if "@" in bucket and not bucket.startswith("anonymous@"):
            raise ValueError("a URL with a name or a key in it would be written beside the run; set AWS_ACCESS_KEY_ID and its like instead")
        if scheme != "file" and not bucket:
            raise ValueError(f"{value} names no bucket; write {scheme}://BUCKET/FOLDER")
        return value


class EarlyStopping(Spec):
    """Stop when the held-out loss no longer falls."""

    patience: PositiveInt = 3
    """Evaluations without improvement before the run ends."""
    min_delta: NonNegativeFloat = 0.0
    """What counts as an improvement of the loss."""


class Evaluate(Spec):
    """What is measured on the held-out set, and when. It is always measured before and after."""

    every_steps: PositiveInt | None = None
    """Also evaluate every so many optimizer steps."""
    micro_batch_size: PositiveInt | Auto = "auto"
    """Samples a rank evaluates at a time; auto is the training micro-batch."""
    samples: tuple[str, ...] = ()
    """Prompts that are answered before and after, and shown."""
    max_new_tokens: PositiveInt = 48
    """The longest sampled answer."""
    early_stopping: EarlyStopping | None = None
    """Stop when the held-out loss no longer falls."""
    keep_best: Auto | bool = "auto"
    """End with the weights of the best evaluation; auto does so with early stopping."""


class Track(Spec):
    """Where metrics go besides metrics.jsonl (accelerate's trackers)."""

    to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Trackers; wandb and mlflow must be installed and logged in."""
    project: str = "lepton-launch"
    """The project or experiment that a tracker files the run under."""
    every_steps: PositiveInt = 1
    """Report metrics every so many optimizer steps."""


class Recipe(Spec):
    """A fine-tuning run, as a person wants it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Name of the run and of its folder."""
    model: Model
    method: Method = Full()
    data: Data
    batch: Batch = Batch()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    parallel: Parallel = Parallel()
    memory: Memory = Memory()
    evaluate: Evaluate = Evaluate()
    save: Save = Save()
    track: Track = Track()
    output_dir: str = "runs"
    """Where run folders are made."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seeds the adapters, dropout and the order of the data."""


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """The recipe of a YAML file with `section.key=value` overrides. Raises RecipeError with every fault."""
    document = load_document(path, overrides, tagged=find_tagged(Recipe))
    recipe, faults = check_document(Recipe, document)
    faults += [
        Fault(document.locate(tuple(key.split("."))), key, problem, remedy)
        for key, problem, remedy in _find_conflicts(_valid_sections(document))
    ]
    if faults or recipe is None:
        raise RecipeError(sorted(faults, key=lambda fault: _line_number(fault.where)))
    return recipe


def _line_number(where: str) -> tuple[str, int]:
    path, _, line = where.rpartition(":")
    return (path, int(line)) if line.isdigit() else (where, 0)


def _valid_sections(document: Document) -> dict[str, Any]:
    """The sections of a recipe that are right in themselves, so that conflicts show beside other faults."""
    from pydantic import TypeAdapter, ValidationError

    sections: dict[str, Any] = {}
    for name, info in Recipe.model_fields.items():
        if not info.is_required() and name not in document.data:
            sections[name] = info.default
            continue
        try:
            annotation: Any = Annotated[info.annotation, info] if info.discriminator else info.annotation
            adapter: TypeAdapter[Any] = TypeAdapter(annotation)
            sections[name] = adapter.validate_python(document.data.get(name), strict=False)
        except ValidationError:
            continue
    return sections


Conflict = tuple[str, str, str]
"""Key, what is wrong, what to do."""


def find_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """What does not go together in a whole recipe, such as one that a plan has changed."""
    return _find_conflicts(dict(recipe))


def _find_conflicts(sections: dict[str, Any]) -> Iterator[Conflict]:
    """What no section can see by itself. Each check takes the sections it names."""
    for check in _CHECKS:
        needs = list(inspect.signature(check).parameters)
        if all(name in sections for name in needs):
            yield from check(**{name: sections[name] for name in needs})


def _check_method(method: Any) -> Iterator[Conflict]:
    if isinstance(method, Freeze) and not method.last_layers and not method.patterns:
        yield "method", "freeze trains nothing", "set method.last_layers or method.patterns"
    if isinstance(method, QLora) and method.bits == 8 and method.quant_type != "nf4":
        yield "method.quant_type", "is a 4-bit code, and method.bits is 8", "drop method.quant_type or set method.bits to 4"
    if isinstance(method, Lora) and method.quantization and method.init == "pissa":
        yield (
            "method.quantization",
            "pissa takes the adapters from the weights as they are, which a quantised base has not",
            "drop one of the two",
        )
    if isinstance(method, Lora) and method.dora and method.init == "pissa":
        yield "method.init", "pissa changes the base, and method.dora measures it: no plain adapter says the two", "drop one of the two"


def _check_parallel(parallel: Parallel) -> Iterator[Conflict]:
    stage = parallel.zero_stage
    if parallel.offload == "auto" and (parallel.offload_optimizer or parallel.offload_param):
        key = "offload_optimizer" if parallel.offload_optimizer else "offload_param"
        yield f"parallel.{key}", "is chosen by the plan where parallel.offload is auto", "drop one of the two"
    if stage == "auto":
        return
    if parallel.offload_param and stage != 3:
        yield "parallel.offload_param", f"needs ZeRO stage 3, and parallel.zero_stage is {stage}", "set parallel.zero_stage to 3"
    if parallel.offload_optimizer and stage == 0:
        yield "parallel.offload_optimizer", "needs ZeRO stage 1, 2 or 3, and parallel.zero_stage is 0", "set parallel.zero_stage to 2"
    if parallel.nvme_path and stage != 3:
        yield "parallel.nvme_path", f"needs ZeRO stage 3, and parallel.zero_stage is {stage}", "set parallel.zero_stage to 3, or drop it"
    elif parallel.nvme_path and parallel.offload != "auto" and not (parallel.offload_optimizer or parallel.offload_param):
        yield (
            "parallel.nvme_path",
            "nothing is offloaded that could be kept there",
            "set parallel.offload_optimizer or parallel.offload_param",
        )
    if parallel.leaf_modules is True and stage != 3:
        yield "parallel.leaf_modules", f"needs ZeRO stage 3, and parallel.zero_stage is {stage}", "drop it, or set parallel.zero_stage to 3"


def _check_offloaded_weights(parallel: Parallel, method: Any) -> Iterator[Conflict]:
    if parallel.offload_param and isinstance(method, QLora) and method.bits == 8:
        yield (
            "parallel.offload_param",
            "LLM.int8() weights cannot live in host memory between uses (their scales are bound to the device)",
            "set method.bits to 4, or parallel.offload_param to false",
        )


def _check_offloaded_states(parallel: Parallel, optim: Optim) -> Iterator[Conflict]:
    if parallel.offload_optimizer and optim.name not in ("adamw", "sgd", "adafactor"):
        yield (
            "optim.name",
            f"{optim.name} is bitsandbytes', made for states in GPU memory, and parallel.offload_optimizer moves them to the host",
            "use adamw, or drop the offload: 8-bit states are already four times smaller",
        )


def _check_schedule(schedule: Schedule) -> Iterator[Conflict]:
    if schedule.max_steps and schedule.warmup_steps and schedule.warmup_steps >= schedule.max_steps:
        yield "schedule.warmup_steps", f"{schedule.warmup_steps} warm-up steps, and the run has {schedule.max_steps}", "make it smaller"


def _check_held_out(evaluate: Evaluate, data: Data) -> Iterator[Conflict]:
    if data.eval and data.eval_fraction:
        yield "data.eval_fraction", "a held-out set is named by data.eval already", "drop one of the two"
    held_out = bool(data.eval or data.eval_fraction)
    if not held_out and (evaluate.early_stopping or evaluate.keep_best is True or evaluate.every_steps):
        key = "early_stopping" if evaluate.early_stopping else "keep_best" if evaluate.keep_best is True else "every_steps"
        yield f"evaluate.{key}", "needs a held-out set", "set data.eval or data.eval_fraction"


def _check_evaluate(evaluate: Evaluate) -> Iterator[Conflict]:
    if evaluate.every_steps is None and (evaluate.early_stopping or evaluate.keep_best is True):
        key = "early_stopping" if evaluate.early_stopping else "keep_best"
        yield f"evaluate.{key}", "needs evaluations during the run", "set evaluate.every_steps"


def _check_save(save: Save, evaluate: Evaluate) -> Iterator[Conflict]:
    if save.keep_best and evaluate.every_steps is None:
        yield "save.keep_best", "needs evaluations during the run", "set evaluate.every_steps"


def _check_batch(batch: Batch) -> Iterator[Conflict]:
    micro = batch.micro_batch_size
    if micro != "auto" and batch.global_batch_size % micro:
        yield (
            "batch.micro_batch_size",
            f"{micro} does not divide batch.global_batch_size {batch.global_batch_size}",
            "global_batch_size = micro_batch_size × gradient_accumulation_steps × ranks",
        )


_CHECKS: tuple[Callable[..., Iterator[Conflict]], ...] = (
    _check_method,
    _check_parallel,
    _check_offloaded_weights,
    _check_offloaded_states,
    _check_schedule,
    _check_held_out,
    _check_evaluate,
    _check_save,
    _check_batch,
)


def make_json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["properties"]["extends"] = {"type": "string", "description": "Another recipe that this one is laid over."}
    for name in ("train", "eval"):  # pydantic drops it where a key may be written in several ways
        schema["$defs"]["Data"]["properties"][name]["description"] = Data.model_fields[name].description
    # What a recipe leaves out, the one it extends may hold.
    method = schema["properties"]["method"]
    del method["discriminator"]
    method["anyOf"] = method.pop("oneOf")
    whole: dict[str, Any] = {"required": schema.pop("required"), "properties": {"method": {"required": ["kind"]}}}
    for name, section in (("model", "Model"), ("data", "Data")):
        whole["properties"][name] = {"required": schema["$defs"][section].pop("required")}
    for kind in ("Freeze", "Lora", "QLora"):
        schema["$defs"][kind].pop("required")
    schema |= {"if": {"not": {"required": ["extends"]}}, "then": whole}
    return schema
