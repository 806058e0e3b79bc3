"""What tests of every method need to know of each: a row for each, which a new method adds.

What the product's own table says (`alignctl.methods.registry`) is not said again here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from support.models import TINY
from support.rewards import REWARDS

# Differs among completions, however little the model can say.
LENGTH = f"ppo.reward_funcs=[{REWARDS}:length]"
# With large learning rates rounding soon draws another token.
_DRAWN = {
    "reward_funcs": f"[{REWARDS}:length]", "response_length": 8, "max_prompt_length": 256, "pass_tokens": 256,
    "max_length": None, "gradient_accumulation_steps": None, "learning_rate": 1e-5,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Settings of a stage and of TRL's trainer, under which both compute the same loss."""

    ours: tuple[str, ...] = ()
    theirs: Mapping[str, Any] = field(default_factory=dict)
    within: Mapping[str, float] = field(default_factory=lambda: {"abs": 1e-6})


@dataclass(frozen=True, kw_only=True)
class Same:
    """How a batch may be divided among passes and processes without another loss."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the stage; None takes one out."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """How tests train with a method."""

    stage: str
    """Its stage in the recipes."""
    recipe: str
    """On the quickstart world."""
    alone: tuple[str, ...] = ()
    """What lets the stage run without the ones before it."""
    stateful: tuple[str, ...] = ()
    """Settings under which it has more to keep in a checkpoint, or orders its rows in another way."""
    local: str | None
    """Recipe on a model and rows of one's own, whose first loss is compared with TRL's; None where there is none."""
    trl: tuple[str, str] | None
    """`"module:Class"` of TRL's trainer of the same loss, and of its settings."""
    compared: tuple[Compared, ...] = ()
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the trainer in tests of the engine against TRL's."""
    passes: int | None = None
    """Passes of packed rows through a model that one step takes, where it is compared with TRL's."""
    same: Mapping[str, Same] = field(default_factory=lambda: {"": Same()})
    """Its losses, by what follows the method's name."""
    memory: Mapping[str, Any] | None = None
    """Settings of the trainer in the test of memory; None where it is trained as another method is."""


METHODS = {
    "dpo": Row(
        stage="dpo",
        recipe="sft_dpo_quickstart",
        alone=("dpo.from=null",),
        stateful=("dpo.precompute_ref_log_probs=true",),
        local="dpo_local",
        trl=("trl:DPOTrainer", "trl:DPOConfig"),
        compared=tuple(  # sums of float32 in another order
            Compared(ours=(f"dpo.loss_type=[{loss}]",), theirs={"loss_type": [loss]}, within={"rel": 5e-6})
            for loss in ("sigmoid", "ipo", "aot")
        ),
        passes=2,
        same={
            "": Same(),
            " and sft": Same(settings={"loss_type": "[sigmoid,sft]", "loss_weights": "[1.0,0.5]"}),
        },
        memory={"loss_type": ["sigmoid", "sft"]},
    ),
    "grpo": Row(
        stage="grpo",
        recipe="grpo_quickstart",
        alone=(
            "grpo.from=null", "grpo.reward_model=null", f"grpo.reward_funcs=[{REWARDS}:length]",
            "grpo.response_length=8", "grpo.num_generations=4",
        ),
        stateful=("grpo.use_adaptive_entropy=true", "grpo.entropy_target=9.0"),
        local=None,
        trl=None,
        same={"": Same(settings=_DRAWN | {"num_generations": 2, "beta": 0.05})},
    ),
    "ipo": Row(
        stage="ipo",
        recipe="sft_ipo_quickstart",
        alone=("ipo.from=null",),
        stateful=("peft=dora",),
        local="ipo_local",
        trl=("trl:DPOTrainer", "trl:DPOConfig"),
        compared=(
            Compared(ours=("ipo.beta=0.1",), theirs={"loss_type": ["ipo"], "beta": 0.1}, within={"rel": 1e-6}),
        ),
    ),
    "kto": Row(
        stage="kto",
        recipe="sft_kto_quickstart",
        alone=("kto.from=null",),
        local="kto_local",
        trl=("trl:KTOTrainer", "trl:KTOConfig"),
        compared=(Compared(),),
        engine={"desirable_weight": 1.0, "undesirable_weight": 1.0},
        passes=4,
        same={"": Same(), ", no estimate": Same(settings={"loss_type": "apo_zero_unpaired"})},
    ),
    "orpo": Row(
        stage="orpo",
        recipe="orpo_quickstart",
        local="orpo_local",
        trl=("trl.experimental.orpo:ORPOTrainer", "trl.experimental.orpo:ORPOConfig"),
        compared=(Compared(ours=("orpo.beta=0.25",), theirs={"beta": 0.25}),),
        same={"": Same()},
        memory={},
    ),
    "ppo": Row(
        stage="ppo",
        recipe="rlhf_quickstart",
        alone=(
            "ppo.from=null", "ppo.reward_model=null", "ppo.normalize_rewards=running", LENGTH,
            "ppo.response_length=8",
        ),
        stateful=("ppo.target_kl=1.0", "ppo.kl_horizon=100"),
        local=None,
        trl=None,
        same={
            "": Same(settings=_DRAWN),
        },
    ),
    "reward": Row(
        stage="rm",
        recipe="sft_rm_quickstart",
        alone=("rm.from=null",),
        stateful=("rm.train_sampling_strategy=group_by_length",),
        local="reward_local",
        trl=("trl:RewardTrainer", "trl:RewardConfig"),
        compared=(
            Compared(
                ours=("rm.center_rewards_coefficient=0.01", "rm.learning_rate=1e-9"),
                theirs={"center_rewards_coefficient": 0.01},
            ),
        ),
        engine={"max_length": 220},
        passes=1,
    ),
    "rloo": Row(
        stage="rloo",
        recipe="rloo_quickstart",
        alone=(
            "rloo.from=null", "rloo.reward_model=null", f"rloo.reward_funcs=[{REWARDS}:length]",
            "rloo.response_length=8", "rloo.num_generations=4",
        ),
        stateful=("rloo.sync_ref_model=true", "rloo.ref_model_sync_steps=2"),
        local=None,
        trl=None,
        same={"": Same(settings=_DRAWN | {"num_generations": 2, "beta": 0.05})},
    ),
    "sft": Row(
        stage="sft",
        recipe="sft_quickstart",
        stateful=("sft.packing=true",),
        local="sft_local",
        trl=("trl:SFTTrainer", "trl:SFTConfig"),
        compared=(Compared(),),
        passes=1,
        memory={},
    ),
    "simpo": Row(
        stage="simpo",
        recipe="sft_simpo_quickstart",
        alone=("simpo.from=null",),
        stateful=("peft=lora", "simpo.gradient_accumulation_steps=2"),
        local="simpo_local",
        trl=("trl.experimental.cpo:CPOTrainer", "trl.experimental.cpo:CPOConfig"),
        compared=(
            Compared(
                ours=("simpo.beta=2.0", "simpo.gamma_beta_ratio=0.8", "simpo.sft_weight=0.5")
                + ("simpo.label_smoothing=0.1",),
                theirs={"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.6, "cpo_alpha": 0.5}
                | {"label_smoothing": 0.1},
            ),
        ),
        same={"": Same(), " and sft": Same(settings={"sft_weight": 1.0})},
    ),
}  # fmt: skip


def small_run(name: str, *more: str, rows: int = 40, **settings: object) -> tuple[str, ...]:
    """Arguments of a small run of a method's stage by itself; `settings` are those of the stage."""
    row = METHODS[name]
    given = {"logging_steps": 1, "per_device_train_batch_size": 8} | settings
    return (
        f"recipe={row.recipe}", f"stages=[{row.stage}]", f"data.limit={rows}", "data.eval_limit=8", "eval.prompts=0",
        *TINY, *row.alone, *(f"{row.stage}.{key}={value}" for key, value in given.items()), *more,
    )  # fmt: skip
