"""Recipe: what is wanted, one to one with the YAML a person writes.

Every section is frozen and refuses unknown keys. A value "auto" is decided by the plan, which says why. launcher/recipe_file.py reads a recipe.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from launcher.schema import Spec
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
    target_len: PositiveInt | None = None
    """Encoder-decoders: the longest target in tokens, where seq_len is the longest source; unless told, as long as a source."""
    packing: bool | Auto = "auto"
    """Put several examples into one sequence; none attends to another. auto does so where the model's code keeps them apart."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Which tokens carry loss: those of the answers, or all."""
    too_long: Literal["error", "drop", "truncate"] = "error"
    """What happens to an example longer than seq_len (or a target longer than target_len)."""
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
