"""GRPO and RLOO are TRL's: with the same completions put in, loss and gradient of a first and of a second optimizer
step made with a rollout, between which the weights were moved, are those of TRL's trainers, however it divides a step.

Where a loss is a mean over what a micro-batch has, TRL's numbers depend on how it shuffles and divides a step: `bnpo`,
and what comes of entropies. Ours are those of the whole step.

Weights are float64, so that rounding hides little; log-probabilities are float32 in both. In float32 both come as near
to the numbers of float64 as to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from support.daily import of_today
from support.processes import run_script
from support.put_in import Step, steps_of_ours, steps_of_trl, whole_windows
from support.rewards import REWARDS, letters, said_of_some, vowels

pytestmark = pytest.mark.train

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
KINDS = {kind: ("grpo", {"loss_type": kind, "beta": 0.04}) for kind in LOSS_TYPES} | {"rloo": ("rloo", {"beta": 0.05})}
WHOLE, HALVES, QUARTERS = (16, 1), (8, 2), (4, 4)
"""Completions of a micro-batch, and micro-batches of a step."""
OF_MICRO_BATCHES = ("bnpo",)
WITHIN = 1e-5
"""Of the largest entry."""
FARTHER = {"vespo": 5, "rloo": 5}
"""So many times that, because the weights in a loss are exponentials of sums over a completion."""
REWARD_FUNCTIONS = {"letters": letters, "vowels": vowels, "said_of_some": said_of_some}
TWO = {"functions": ("letters", "vowels"), "reward_weights": (0.3, 2.0)}
VLLM = {"sampled": True, "vllm_importance_sampling_clip_min": 0.5, "vllm_importance_sampling_clip_max": 2.0}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "scaled by the rollout": ("dapo", {"scale_rewards": "batch"}),
    "not scaled": ("dapo", {"scale_rewards": "none"}),
    "clipped higher": ("dapo", {"epsilon_high": 0.6}),
    "two-sided": ("dapo", {"delta": 1.4}),
    "of completions": ("grpo", {"importance_sampling_level": "sequence", "epsilon": 0.01, "epsilon_high": 0.02}),
    "of completions, summed": ("luspo", {"importance_sampling_level": "sequence"}),
    "of completions, by tokens": ("dapo", {"importance_sampling_level": "sequence", "epsilon": 0.01}),
    "without a reference": ("dapo", {"beta": 0.0}),
    "the paper's KL": ("dapo", {"use_bias_correction_kl": False}),
    "off policy": ("dapo", {"off_policy_mask_threshold": 0.05}),
    "cut off": ("dapo", {"mask_truncated_completions": True}),
    "cut off, by completions": ("grpo", {"mask_truncated_completions": True}),
    "temperature": ("dapo", {"temperature": 1.2}),
    "two rewards": ("dapo", TWO),
    "two rewards, each scaled": ("dapo", TWO | {"multi_objective_aggregation": "normalize_then_sum"}),
    "some unscored": ("dapo", {"functions": ("said_of_some",)}),
    "some unscored by one": ("dapo", {"functions": ("said_of_some", "vowels")}),
    "vllm": ("dapo", {"sampled": True}),
    "vllm, tokens kept within": ("dapo", VLLM | {"vllm_importance_sampling_mode": "token_truncate"}),
    "vllm, tokens masked": ("dapo", VLLM | {"vllm_importance_sampling_mode": "token_mask"}),
    "vllm, completions kept within": ("dapo", VLLM | {"vllm_importance_sampling_mode": "sequence_truncate"}),
    "vllm, off policy": ("dapo", VLLM | {"off_policy_mask_threshold": 0.05}),
    "vllm, vespo": ("vespo", VLLM | {"vllm_importance_sampling_mode": "token_truncate"}),
    "cispo, bounded": ("cispo", {"epsilon_high": 1.5}),
    "sapo, other temperatures": ("sapo", {"sapo_temperature_pos": 0.5, "sapo_temperature_neg": 2.0}),
    "vespo, other weights": ("vespo", {"vespo_k_pos": 1.0, "vespo_lambda_neg": 1.0}),
    "rloo, normalised": ("rloo", {"normalize_advantages": True}),
    "rloo, clipped": ("rloo", {"reward_clip_range": (0.5, 1.5)}),
    "rloo, some unscored": ("rloo", {"functions": ("said_of_some",)}),
    "rloo, cut off": ("rloo", {"mask_truncated_completions": True}),
    "rloo, without a reference": ("rloo", {"beta": 0.0}),
}
ON_TWO = """
import sys
from pathlib import Path

import torch

sys.path.insert(0, sys.argv[1])
from support.put_in import steps_of_ours, steps_of_trl
from support.rewards import REWARDS, letters

reference, folder = Path(sys.argv[2]), Path.cwd()
torch.set_num_threads(1)
found = {}
for kind, (method, settings) in KINDS.items():
    theirs = steps_of_trl(method, reference, folder, 4, 2, [letters], **settings)
    ours = steps_of_ours(method, reference, folder, 8, [f"{REWARDS}:letters"], **settings)
    found[kind] = [[(step.loss, step.gradient) for step in steps] for steps in (ours, theirs)]
if torch.distributed.get_rank() == 0:
    torch.save(found, folder / "steps.pt")
torch.distributed.barrier()
"""


@pytest.fixture(scope="module")
def reference(shared_data):
    return shared_data / "models" / "stories260K"


@pytest.fixture(scope="module")
def trl(reference, tmp_path_factory):
    """Steps of TRL's trainers, once for all tests that compare with them."""
    folder = tmp_path_factory.mktemp("trl")

    @cache
    def steps(method: str, batch: tuple[int, int], functions: Sequence[str] = ("letters",), **settings: Any):
        return steps_of_trl(
            method, reference, folder, *batch, [REWARD_FUNCTIONS[name] for name in functions], **settings
        )

    return steps


@pytest.fixture
def ours(reference, tmp_path):
    def steps(method: str, functions: Sequence[str] = ("letters",), **settings: Any) -> list[Step]:
        return steps_of_ours(method, reference, tmp_path, 16, [f"{REWARDS}:{name}" for name in functions], **settings)

    return steps


def differ(steps: list[Step], others: list[Step]) -> float:
    """The largest difference of a loss, over it or over 1 where it is less, or of an entry of a gradient, over the
    largest entry."""
    assert len(steps) == len(others) > 0
    return max(
        max(
            abs(one.loss - other.loss) / max(1.0, abs(other.loss)),
            float((one.gradient - other.gradient).abs().max() / other.gradient.abs().max()),
        )
        for one, other in zip(steps, others, strict=True)
    )


def limit(kind: str) -> float:
    return FARTHER.get(kind, 1) * WITHIN


@pytest.mark.parametrize("kind", KINDS)
def test_each_loss(trl, ours, kind):
    method, settings = KINDS[kind]
    theirs = trl(method, WHOLE if kind in OF_MICRO_BATCHES else HALVES, **settings)
    assert differ(ours(method, **settings), theirs) < limit(kind)
    assert differ(theirs[1:], theirs[:1]) > 0.01  # the second is of other weights


@pytest.mark.spread(2)
@pytest.mark.night
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in OF_MICRO_BATCHES])
def test_however_a_step_is_divided(trl, ours, kind):
    method, settings = KINDS[kind]
    assert differ(ours(method, **settings, pass_tokens=200), trl(method, QUARTERS, **settings)) < limit(kind)


@pytest.mark.spread(3)
@pytest.mark.night
@pytest.mark.parametrize("kind", KINDS)
def test_in_float32(trl, ours, kind):
    method, settings = KINDS[kind]
    theirs = trl(method, WHOLE, dtype=torch.float32, **settings)
    assert differ(ours(method, dtype=torch.float32, **settings), theirs) < 2 * limit(kind)


@pytest.mark.night
@pytest.mark.parametrize("name", of_today(list(SETTINGS), 3))
def test_each_setting(trl, ours, name):
    kind, changed = SETTINGS[name]
    method, usual = KINDS[kind]
    theirs = trl(method, HALVES, **usual | changed)
    assert differ(ours(method, **usual | changed), theirs) < limit(kind)
    assert differ(theirs, trl(method, HALVES, **usual)) > 0.01


@pytest.mark.night
def test_entropy_of_the_whole_step(trl, ours):
    method, usual = KINDS["dapo"]
    bonus = usual | {"entropy_coef": 0.1}
    assert differ(ours(method, **bonus), trl(method, WHOLE, **bonus)) < WITHIN
    assert differ(trl(method, WHOLE, **bonus), trl(method, WHOLE, **usual)) > 0.01


@pytest.mark.night
def test_the_weight_of_entropy_follows_it(trl, ours):
    """From one rollout to the next; the first has none."""
    method, usual = KINDS["dapo"]
    adapted = {"use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef_delta": 0.05, "num_iterations": 1}
    follows = usual | adapted | {"entropy_coef": 0.1}
    theirs = trl(method, WHOLE, **follows)
    assert differ(ours(method, rollouts=2, **follows), theirs) < WITHIN
    assert differ(theirs[1:], trl(method, WHOLE, **usual | {"num_iterations": 1})[1:]) > 0.01


@pytest.mark.night
def test_tokens_of_high_entropy(trl, ours):
    """Those that had it when they were drawn; TRL looks anew in each step."""
    method, usual = KINDS["dapo"]
    settings = usual | {"top_entropy_quantile": 0.2}
    theirs = trl(method, WHOLE, **settings)
    assert differ(ours(method, **settings)[:1], theirs[:1]) < WITHIN
    assert differ(theirs[:1], trl(method, WHOLE, **usual)[:1]) > 0.01


@pytest.mark.spread(2)
@pytest.mark.night
@pytest.mark.parametrize("kind", ["grpo", "dapo", "cispo", "rloo"])
def test_a_rollout_of_several_steps(trl, ours, monkeypatch, kind):
    """`dapo` and its like divide by the tokens of an average step, and not by those of each."""
    method, usual = KINDS[kind]
    one = ours(method, **usual, num_mini_batches=2, num_iterations=1)
    whole_windows(monkeypatch)
    order = tuple(prompt for step in one for prompt in step.prompts)
    other = trl(method, (4, 2), prompts=order, steps_per_generation=4, num_iterations=1, **usual)
    assert differ(one, other) < limit(kind)


@pytest.mark.night
def test_two_processes(tmp_path, root, reference, trl):
    run_script(f"KINDS = {KINDS!r}\n{ON_TWO}", tmp_path, root / "tests", reference, processes=2)
    for kind, both in torch.load(tmp_path / "steps.pt").items():
        one, other = ([Step(*step) for step in steps] for steps in both)
        if kind in OF_MICRO_BATCHES:
            other = trl(KINDS[kind][0], WHOLE, **KINDS[kind][1])
        assert differ(one, other) < limit(kind), kind
