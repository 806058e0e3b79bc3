"""Short runs of a method from where users start: a pretrained model, and held-out rows measured before and after."""

from __future__ import annotations

from pathlib import Path

from support.rewards import REWARDS

STEPS = 4
RECIPE = """
defaults: [/base, {{/data: local}}, {{/method@cell: {method}}}, {{override /model: local}}, _self_]
stages: [cell]
data: {{path: "{rows}", limit: 40}}
eval: {{prompts: 2, max_new_tokens: 4}}
model: {{path: "{model}"}}
"""

# What a loss is the same over: all rows of an optimizer step, however they are divided; the rows of a micro-batch, of
# which it takes a mean over tokens; the rows that all processes hold at once, as KTO's KL estimate and PPO's rollout.
ROWS, MICRO_BATCH, PROCESSES = "rows", "micro_batch", "processes"
CASES = {
    "sft": ("sft", ROWS, {}),
    "reward": ("reward", ROWS, {}),
    "dpo": ("dpo", ROWS, {}),
    "dpo and sft": ("dpo", MICRO_BATCH, {"loss_type": "[sigmoid,sft]", "loss_weights": "[1.0,0.5]"}),
    "ipo": ("ipo", ROWS, {}),
    "kto": ("kto", PROCESSES, {}),
    "kto, no estimate": ("kto", ROWS, {"loss_type": "apo_zero_unpaired"}),
    "orpo": ("orpo", MICRO_BATCH, {}),
    "simpo": ("simpo", ROWS, {}),
    "simpo and sft": ("simpo", MICRO_BATCH, {"sft_weight": 1.0}),
    "ppo": (
        "ppo",
        PROCESSES,
        {"reward_funcs": f"[{REWARDS}:length]", "response_length": 8, "max_prompt_length": 256, "update_tokens": 256},
    ),
}


def job(folder: Path, shared_data: Path, case: tuple, division: tuple) -> dict:
    """What run_many takes of a case, with its adapter and engine, and a division of the batch among processes."""
    name, peft, engine = case
    method, _, more = CASES[name]
    per_device, accumulation, how = division
    source = "sft/llms_from_scratch" if method == "sft" else "preference/llms_from_scratch_pref"
    recipe = folder / f"{method}.yaml"
    recipe.write_text(
        RECIPE.format(
            method=method, rows=shared_data / source / "train.jsonl", model=shared_data / "models" / "stories260K"
        )
    )
    given = {
        "engine": engine, "max_steps": STEPS, "logging_steps": 1, "save_steps": 2, "learning_rate": 1e-3,
        "warmup_steps": 0, "bf16": "false", "per_device_train_batch_size": per_device, **more,
    }  # fmt: skip
    if method != "ppo":
        given |= {"max_length": 256, "gradient_accumulation_steps": accumulation}
    processes = [] if how == "none" else ["launcher.processes=2"]
    arguments = [
        f"recipe={recipe}", f"peft={peft}", f"distributed={how}", *processes,
        *(f"cell.{key}={value}" for key, value in given.items()),
    ]  # fmt: skip
    return {"run_dir": str(folder / "-".join(map(str, (*case, *division))).replace(" ", "_")), "arguments": arguments}
