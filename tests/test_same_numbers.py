"""However a global batch is divided among processes, passes and shards, training is the same.

From where users start: a pretrained model, and held-out rows that are measured before and after.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from support.many import differ, outcome, run_many
from support.rewards import REWARDS

from alignctl.methods.registry import methods

pytestmark = [pytest.mark.train, pytest.mark.slow]

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
# Per device, accumulation, and how the processes work together: 8 rows an optimizer step, always.
ALONE = (8, 1, "none")
DIVIDED = [
    (4, 1, "ddp"),
    (2, 2, "ddp"),
    (4, 1, "zero1"),
    (4, 1, "zero2"),
    (2, 2, "zero2"),
    (4, 1, "zero3"),
    (2, 2, "zero3"),
    (4, 2, "none"),
]


def reference_of(case: str, division: tuple) -> tuple:
    """The division that another one is compared with."""
    method, same_over, _ = CASES[case]
    per_device, accumulation, _ = division
    if same_over == ROWS:
        return ALONE
    if same_over == MICRO_BATCH:
        return per_device, 8 // per_device, "none"
    return per_device, accumulation, "ddp"


def pairs() -> list[tuple[tuple, tuple]]:
    """Cases, each with its adapter and engine, and divisions of the batch to look at."""
    found = []
    for case, peft in ((case, peft) for case in CASES for peft in ("none", "lora")):
        for number, division in enumerate(DIVIDED):
            accumulates = division[1] > 1 and CASES[case][0] == "ppo"  # whose mini-batches are divided by tokens
            if division == reference_of(case, division) or accumulates or (division[2] == "none" and case == "kto"):
                continue
            found.append(((case, peft, "padded" if number in (0, 5) and case == "dpo" else "auto"), division))
    return found


# Whose gradients once were not averaged, always; of the others some, others each day; all with ALIGNCTL_ALL=1.
ALWAYS = [(("sft", "none", "auto"), DIVIDED[0]), (("kto, no estimate", "lora", "auto"), DIVIDED[0])]
ALL = pairs()
CHOSEN = ALL if os.environ.get("ALIGNCTL_ALL") else list(dict.fromkeys(ALWAYS + ALL[int(time.strftime("%j")) % 7 :: 7]))
CONTINUED = ("sft", "lora", "auto"), (4, 1, "ddp")


def job(folder: Path, shared_data: Path, case: tuple, division: tuple) -> dict:
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


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, shared_data):
    folder = tmp_path_factory.mktemp("same")
    wanted = dict.fromkeys([*CHOSEN, CONTINUED, *((case, reference_of(case[0], how)) for case, how in CHOSEN)])
    jobs = {(case, how): job(folder, shared_data, case, how) for case, how in wanted}
    again = {"run_dir": jobs[CONTINUED]["run_dir"] + "-again", "arguments": jobs[CONTINUED]["arguments"]}
    jobs["continued"] = again | {"continues": jobs[CONTINUED]["run_dir"]}
    run_many(folder, [one for key, one in jobs.items() if key != "continued" and key[1][2] == "none"], 1)
    run_many(folder, [one for key, one in jobs.items() if key == "continued" or key[1][2] != "none"], 2)
    return {key: outcome(one["run_dir"]) for key, one in jobs.items()}


def test_every_method_is_here():
    assert {method for method, _, _ in CASES.values()} == set(methods())


@pytest.mark.parametrize(("case", "how"), CHOSEN, ids=lambda part: "-".join(map(str, part)))
def test_losses_and_weights_are_the_same(outcomes, case, how):
    losses, weights = outcomes[case, how]
    expected_losses, expected = outcomes[case, reference_of(case[0], how)]
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected_losses, rel=2e-5, abs=1e-6)
    assert differ(weights, expected) < 1e-4


def test_a_run_that_is_continued_is_the_same(outcomes):
    losses, weights = outcomes["continued"]
    expected_losses, expected = outcomes[CONTINUED]
    assert losses == expected_losses
    assert (weights == expected).all()
