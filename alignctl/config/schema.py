"""Settings of a run that are alignctl's own, as dataclasses: names, types and meaning. Torch-free.

The fields of a stage are those of its trainer's config class (see trl_fields.py) plus the sections named here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from alignctl.data.settings import DataSettings

Settings = TypeVar("Settings")

MISSING = "???"
"""What OmegaConf writes for a value that the user has to give."""


@dataclass
class ModelSettings:
    """Section `model`: where the first stage's model comes from and how models are loaded."""

    path: str | None = None
    """A folder with a checkpoint, or a Hub id `owner/name`. None only with `scratch`."""
    revision: str | None = None
    """Commit, tag or branch on the Hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights in memory; auto takes that of the checkpoint, or float32 where all weights are trained."""
    attn_implementation: str | None = None
    """Attention kernel of transformers: sdpa, eager, flash_attention_2 and so on; None lets transformers choose."""
    trust_remote_code: bool = False
    """Whether code that comes with the checkpoint may run."""
    tokenizer: str | None = None
    """Folder or Hub id of another tokenizer than the model's."""
    chat_template: str | None = None
    """Chat template, where the tokenizer has none or another is wanted: one that comes with alignctl (`alignctl
    templates`), a file with Jinja, or the Jinja text."""
    eos_token: str | None = None
    """Token of the vocabulary that ends an answer, where it is not the tokenizer's own: `<|im_end|>` for example."""
    add_tokens: list[str] | None = None
    """Tokens to add where the tokenizer does not have them: `[<tool>]`. Their embeddings start at the mean of all
    others and are trained, also beside an adapter."""
    resize_embeddings: bool = False
    """Whether a model with fewer embeddings than the tokenizer has tokens gets the others, at the mean of those it has;
    otherwise it is refused. `add_tokens` does not need it."""
    merge_into: str | None = None
    """Folder or Hub id of the checkpoint that a quantized `path` was made from: what the adapter is merged into."""
    merge: bool = True
    """Whether a trained adapter is merged: `model/` is then a whole model. With false `adapter/` alone is kept, and no
    later stage starts from it."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights in `model/`. auto takes that of the checkpoint that the first stage started from; but where a
    later stage takes the model, that which it was trained in."""
    scratch: dict[str, Any] | None = None
    """Start from random weights instead of `path`: {vocab_size, config: {model_type, ...}}."""


@dataclass
class EvalSettings:
    """Section `eval`: what is measured on held-out rows, before and after a stage."""

    prompts: int = 64
    """Held-out prompts to answer by sampling, for KL to the reference, the judge, and the scores of PPO, GRPO and RLOO;
    0 for none."""
    max_new_tokens: int | None = None
    """Longest sampled answer, in tokens. None: what the stage draws while it trains (`response_length`), or 128 where
    it draws none."""
    temperature: float = 1.0
    """Sampling temperature, > 0. KL to the reference is of the policy itself only at 1."""
    batch_size: int = 32
    """Sequences per forward pass and device."""
    judge: str | None = None
    """Name of a judge that says which answers are right and in the wanted manner: `quickstart`, for prompts of the
    quickstart world."""


@dataclass
class TrackerSettings:
    """Section `tracker`: where the trainer reports besides metrics.jsonl."""

    report_to: str | list[str] = "none"
    """A tracker or several, `[tensorboard, wandb]`: tensorboard, wandb, mlflow, trackio, or another reporting
    integration of transformers; none, or an empty list, for none."""
    project: str | None = None
    """What the run belongs to: the project of wandb and trackio, the experiment of mlflow. None: what WANDB_PROJECT or
    MLFLOW_EXPERIMENT_NAME says, else the recipe's name."""
    name: str | None = None
    """What the run is called there; the name of each stage is put behind it. None: the name of the run's folder."""
    tags: list[str] = field(default_factory=list)
    """To find the run by; of mlflow, which has keys and values, keys with the value `true`."""

    @property
    def names(self) -> list[str]:
        """The trackers that are reported to."""
        given = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        return [name for name in given if name != "none"]


@dataclass
class DistributedSettings:
    """Section `distributed`: how several processes train one model."""

    type: Literal["none", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"] = "none"
    """none: one process; ddp: each holds the model; zero1 to zero3: DeepSpeed divides optimizer state, gradients and
    weights; fsdp2: PyTorch divides all of them."""
    config: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed's own settings, over those that `type` makes."""
    parallelism_config: dict[str, Any] = field(default_factory=dict)
    """`{sp_size: N}`: N processes side by side compute the rows of all of them together, each a part of every row and
    some of the heads of its attention. For rows that are too long for one. `{tp_size: N}`, with fsdp2: N processes side
    by side divide the matrices of every layer, and compute the rows of all of them together. For layers that are too
    large for one."""

    @property
    def sp_size(self) -> int:
        """Processes that compute a row together, under accelerate's name."""
        return self.parallelism_config.get("sp_size", 1)

    @property
    def tp_size(self) -> int:
        """Processes that divide the matrices of layers, under accelerate's name."""
        return self.parallelism_config.get("tp_size", 1)


@dataclass
class LauncherSettings:
    """Section `launcher`: where processes run. From `gpu_type` on, fields are SLURM's."""

    type: Literal["local", "slurm"] = "local"
    """local: here, or on machines that the command is given on; slurm: in jobs."""
    nodes: int = 1
    """Machines."""
    gpus_per_node: int | None = None
    """Processes on each machine, one for each GPU. None: one process, on the first GPU if there is one."""
    processes: int | None = None
    """Instead of GPUs: processes on the CPUs of this machine."""
    rdzv_endpoint: str | None = None
    """HOST:PORT of the first machine, where they meet; only with several."""
    node_rank: int = 0
    """Which of the machines this is; the one with 0 writes the run directory, which all of them see."""
    stall_timeout: int = 1800
    """Seconds in which no process gets on, after which a run counts as stuck and is ended; before training 600 at
    least."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Other settings of this section for single stages: `launcher.stages.sft.nodes=1`."""
    gpu_type: str | None = None
    """Kind of GPU, where a site tells them apart: `h100`."""
    partition: str | list[str] | None = None
    """As sbatch takes it, or several, of which the job gets the first that has room. None: the cluster's own."""
    account: str | None = None
    """As sbatch takes it. None: the user's own."""
    qos: str | list[str] | None = None
    """As sbatch takes it, one or several. None: the user's own."""
    constraint: str | list[str] | None = None
    """Features the machines must have, as sbatch takes them: `h100`, or `[h100, ib]` for both."""
    nodelist: str | list[str] | None = None
    """Machines that have to be among those of the job, as sbatch takes them: `[node1, node7]`, or `node[1-4]` in
    quotes."""
    time: str | int | None = None
    """Limit of a job, as sbatch takes it: MINUTES, HH:MM:SS, D-HH:MM:SS, in a file with quotes. None: the
    partition's own."""
    mem: str | int | None = None
    """Memory on each machine, as sbatch takes it: `200G`; `0` is all of it. None: the partition's own."""
    cpus_per_process: int | None = None
    """CPU cores for each process. None: what SLURM gives."""
    job_name: str | None = None
    """Begins the name of every job; None takes the recipe's."""
    signal_seconds: int = 120
    """Seconds before the limit at which a job saves and goes back into the queue: longer than a step and a save."""
    max_requeues: int = 50
    """How often a job may go back into the queue; with 0 one that is preempted or out of time is over."""
    setup: str | list[str] = field(default_factory=list)
    """Shell commands that prepare the environment of a job: `module load cuda`."""
    container: list[str] = field(default_factory=list)
    """Words before the command that each machine runs: `[apptainer, exec, --nv, image.sif]`."""
    python: str | None = None
    """The interpreter on the machines of a job; None: the one that runs this command."""
    srun: list[str] = field(default_factory=list)
    """More options of srun, such as pyxis' `--container-image=...`."""
    extra: list[str] = field(default_factory=list)
    """More options of sbatch, each one word: `[--exclusive, --exclude=node7]`."""

    @property
    def processes_per_node(self) -> int:
        return self.gpus_per_node or self.processes or 1

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.nodes * self.processes_per_node


@dataclass
class RunSettings:
    """Top level of a recipe. Every other key is a stage."""

    stages: list[str] = field(default_factory=list)
    """Stages to run, in order."""
    run_dir: str | None = None
    """Folder of the run; None makes one under runs/<recipe>/."""
    seed: int = 42
    """Seeds weights, data order, dropout and sampling of every stage."""
    log_every: int = 25
    """Print a progress line every so many optimizer steps where standard error is not a terminal."""
    rehearse: bool = True
    """Begin each stage of 20 optimizer steps or more with two steps on its longest rows, in a folder of their own: what
    would fail after hours (memory, saving, measuring) fails in the first minutes. Changes nothing about the result."""
    global_batch_size: int | None = None
    """What an optimizer step takes on all processes together, in every stage that does not say so itself."""
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    peft: dict[str, Any] = field(default_factory=dict)
    eval: EvalSettings = field(default_factory=EvalSettings)
    tracker: TrackerSettings = field(default_factory=TrackerSettings)
    distributed: DistributedSettings = field(default_factory=DistributedSettings)
    launcher: LauncherSettings = field(default_factory=LauncherSettings)


PATHS = {"model": ("path", "tokenizer", "chat_template", "merge_into"), "data": ("path", "eval_path")}
"""Settings that may name a file or a folder."""

FUNCTION_KEYS = ("reward_funcs",)
"""Keys of a stage that may name functions of the user's, one or a list: `module:function` or `file.py:function`, or
what else rewards.py knows."""

SECTIONS = {"model": ModelSettings, "data": DataSettings, "eval": EvalSettings}
"""Sections a stage may have of its own; what it does not say is taken from the section at the top."""

ZERO_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}
"""Values of `distributed.type` that are DeepSpeed's, and the stage of ZeRO of each."""

_LORA = "peft.tuners.lora.config:LoraConfig"
PEFT_CLASSES = {"none": None, "lora": _LORA, "qlora": _LORA}
"""Values of `peft.type` and the peft class whose fields the section takes."""

_OF_BITSANDBYTES = ("8bit", "paged", "bnb", "ademamix", "lion")


def wants_bitsandbytes(stage: str, peft: Mapping[str, Any], optimizer: Any) -> list[str]:
    """The settings of a stage that need the package, `key=value`."""
    wants = [f"peft.type={peft['type']}"] if peft.get("type") in QUANTIZED else []
    named = isinstance(optimizer, str) and any(part in optimizer for part in _OF_BITSANDBYTES)
    if named and "torch" not in optimizer:  # torchao's
        wants.append(f"{stage}.optim={optimizer}")
    return wants


NOT_ON_SLURM = {
    "rdzv_endpoint": "a job's machines find each other",
    "node_rank": "SLURM says which machine is which",
}
"""Fields of `launcher` that a user sets for several machines without SLURM."""

ONLY_ON_SLURM = (
    "gpu_type", "partition", "account", "qos", "constraint", "nodelist", "time", "mem", "cpus_per_process", "job_name",
    "signal_seconds", "max_requeues", "setup", "container", "python", "srun", "extra",
)  # fmt: skip
"""Fields of `launcher` that only SLURM knows."""

QUANTIZED = ("qlora",)
"""Values of `peft.type` that hold the weights beside the adapter in 4 bits."""

ROLE_KEYS = ("reference", "reward_model")
"""Keys of a stage, named as the roles of models that it does not train: a stage before it, a folder or a Hub id."""

RESERVED_NAMES = (
    "config", "plan", "provenance", "status", "logs", "deepspeed", "trackers", "tensorboard", "wandb", "mlruns",
    "trackio",
)  # fmt: skip
"""Names a stage may not have: files of the run directory beside the folders of the stages."""

STAGE_KEYS = ("method", "from", *ROLE_KEYS, *SECTIONS, "peft")
"""Keys of a stage that are not the trainer's."""


def annotations(settings: type) -> dict[str, str]:
    """Keys of a section, as recipes have them, and the annotations of its settings class."""
    return {_key(item): item.type for item in dataclasses.fields(settings)}


def default_of(key: str) -> Any:
    """The default of a setting outside the stages, by its dotted key; None of what has none."""
    section, _, name = key.rpartition(".")
    settings = SECTIONS.get(section) if section else RunSettings
    return settings and {_key(item): getattr(settings(), item.name) for item in dataclasses.fields(settings)}.get(name)


def settings_of(cls: type[Settings], section: Mapping[str, Any]) -> Settings:
    """A section of a checked config as its settings class."""
    names = {_key(item): item.name for item in dataclasses.fields(cls)}
    return cls(**{names[key]: value for key, value in section.items()})


def _key(item: dataclasses.Field) -> str:
    """What recipes call a setting; a key that is a word of Python's cannot be the name of a field."""
    return item.metadata.get("key", item.name)
