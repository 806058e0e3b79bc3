"""Short runs of a method from where users start: a pretrained model, and held-out rows measured before and after."""

from __future__ import annotations

from pathlib import Path

from support.methods import METHODS

STEPS = 4
RECIPE = """
defaults: [/base, {{/data: local}}, {{/method@cell: {method}}}, {{override /model: local}}, _self_]
stages: [cell]
data: {{path: "{rows}", limit: 23}}
eval: {{prompts: 2, max_new_tokens: 4}}
model: {{path: "{model}"}}
"""

CASES = {name + label: (name, same.settings) for name, row in METHODS.items() for label, same in row.same.items()}


def job(folder: Path, shared_data: Path, case: tuple, division: tuple) -> dict:
    """What run_many takes of a case, with its adapter and engine, and a division of the batch among processes."""
    name, peft, engine = case
    method, more = CASES[name]
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
        "warmup_steps": 0, "bf16": "false", "per_device_train_batch_size": per_device,
        "max_length": 256, "gradient_accumulation_steps": accumulation, **more,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value is not None}
    processes = [] if how == "none" else ["launcher.processes=2"]
    arguments = [
        f"recipe={recipe}", f"peft={peft}", f"distributed={how}", *processes,
        *(f"cell.{key}={value}" for key, value in given.items()),
    ]  # fmt: skip
    return {"run_dir": str(folder / "-".join(map(str, (*case, *division))).replace(" ", "_")), "arguments": arguments}
