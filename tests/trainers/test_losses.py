"""Losses against numbers from elsewhere, in float64. Each case says whose numbers they are."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import tensor

from alignctl.trainers.preference.losses import ipo_losses, log_odds_ratio, odds_ratio_losses, simpo_losses

pytestmark = pytest.mark.train

F64 = torch.float64
# Policy and reference log-probabilities of three pairs in pytorch/torchtune, tests/torchtune/rlhf/loss/
# test_dpo_loss.py at bd2a0fc7 (BSD-3-Clause).
CHOSEN, REJECTED = tensor([-0.5, -10.0, -1.0], dtype=F64), tensor([-0.1, -30.0, -21.0], dtype=F64)
REF_CHOSEN, REF_REJECTED = tensor([-0.5, -10.1, -0.1], dtype=F64), tensor([-0.1, -20.1, -0.1], dtype=F64)


def close(value, expected, tolerance=1e-6):
    return torch.testing.assert_close(
        torch.as_tensor(value, dtype=F64), torch.as_tensor(expected, dtype=F64), rtol=tolerance, atol=tolerance
    )


def test_simpo_is_torchtune_s():
    # test_simpo_loss of the same file: beta 2.0, gamma 0.5; the log-probabilities count as length-averaged.
    close(simpo_losses(CHOSEN, REJECTED, beta=2.0, gamma=0.5), [1.5410084538329922, 7.004352026168645e-18, 7.0e-18])


def test_simpo_label_smoothing_mixes_both_directions():
    there = simpo_losses(CHOSEN, REJECTED, beta=2.0, gamma=0.0)
    back = simpo_losses(REJECTED, CHOSEN, beta=2.0, gamma=0.0)
    close(simpo_losses(CHOSEN, REJECTED, 2.0, 0.0, label_smoothing=0.25), 0.75 * there + 0.25 * back)


def test_orpo_is_the_closed_form():
    # Computed from the definition of the odds ratio, log(p / (1 - p)), in float64.
    chosen, rejected = tensor([-0.8, -1.5], dtype=F64), tensor([-1.2, -1.4], dtype=F64)
    odds = [math.log(math.exp(x) / (1 - math.exp(x))) for x in (-0.8, -1.5, -1.2, -1.4)]
    close(log_odds_ratio(chosen, rejected), [odds[0] - odds[2], odds[1] - odds[3]], 1e-12)
    close(odds_ratio_losses(chosen, rejected), [0.4241061322020203, 0.7606163238313162], 1e-12)


def test_orpo_is_tunix_s():
    # google/tunix at c7d8950f, tests/sft/dpo/orpo_trainer_test.py (Apache-2.0): lambda 0.1, the likelihood of prompt
    # and chosen completion, and the odds ratio of sums where ours is of means; np.random.seed(0), -rand(8, 4).sum(1).
    chosen = tensor([-2.411649429368285, -2.3989091244503333, -2.6677242371623757, -1.6518065572860208], dtype=F64)
    rejected = tensor([-2.5010071421849336, -3.019785444988875, -1.8462176516550874, -1.9752995632794388], dtype=F64)
    likelihood = 3.423783505600131
    preference = odds_ratio_losses(chosen, rejected).mean()
    close(preference, 0.7086720602949501)
    close(likelihood + 0.1 * preference, 3.494651, 1e-4)


def test_odds_of_certain_and_of_hopeless_completions_stay_finite():
    for dtype in (torch.float32, F64):
        chosen = tensor([0.0, -1e-9, -80.0], dtype=dtype, requires_grad=True)
        losses = odds_ratio_losses(chosen, tensor([-1.0, -1.0, -90.0], dtype=dtype))
        losses.sum().backward()
        assert losses.isfinite().all()
        assert chosen.grad.isfinite().all()


def test_ipo_is_zero_at_its_target():
    # inclusionAI/AReaL at 4aef98d8, tests/test_dpo.py (Apache-2.0): beta 0.1, so the log-ratios are to be 5 apart.
    close(ipo_losses(tensor([5.0], dtype=F64), tensor([0.0], dtype=F64), beta=0.1), [0.0])


@pytest.mark.parametrize("normalize", ["tokens", "none"])
def test_ipo_sums_or_means(small, normalize):
    """Two completions of 2 and 4 tokens: log-ratios 1 and -2, or 1 / 2 and -2 / 4 per token; the target is 2.5."""
    trainer = small.trainer("ipo", beta=0.2, normalize=normalize)
    trainer.precompute_ref_logps = True
    per_token = tensor([[-1.0, -1.0, 0.0, 0.0], [-1.0, -1.0, -1.0, -1.0]], dtype=F64)
    given = Given(torch.zeros(2, dtype=F64))
    given._outputs.log_probs = per_token
    ids = torch.ones(2, 5, dtype=torch.long)
    inputs = {
        "input_ids": ids,
        "attention_mask": ids,
        "completion_mask": tensor([[0, 1, 1, 0, 0], [0, 1, 1, 1, 1]]),
        "ref_chosen_logps": tensor([-3.0], dtype=F64),
        "ref_rejected_logps": tensor([-2.0], dtype=F64),
    }
    gap = 1 - (-2) if normalize == "none" else 1 / 2 - (-2 / 4)
    close(trainer.compute_loss(given, inputs), (gap - 2.5) ** 2, 1e-12)


def test_ipo_at_the_start():
    close(ipo_losses(torch.zeros(1, dtype=F64), torch.zeros(1, dtype=F64), beta=0.1), [25.0])  # (1 / (2 * 0.1)) ** 2


# --- TRL's own losses: its trainers are given log-probabilities instead of a model


class Given:
    """Stands where the model stands and returns log-probabilities, one token a completion."""

    def __init__(self, logps: torch.Tensor):
        per_token = logps.unsqueeze(1)
        self._outputs = SimpleNamespace(
            log_probs=per_token, entropy=per_token, mean_logits=per_token, is_top1=per_token > 0, aux_loss=None
        )

    def __call__(self, **kwargs):
        return self._outputs


def batch(rows: int) -> dict[str, torch.Tensor]:
    """Rows of one prompt token and one completion token."""
    ones = torch.ones(rows, 2, dtype=torch.long)
    return {"input_ids": ones, "attention_mask": ones, "completion_mask": tensor([[0, 1]] * rows)}


def pair_loss(trainer, chosen, rejected, ref_chosen, ref_rejected) -> torch.Tensor:
    trainer.precompute_ref_logps = True
    inputs = batch(2 * len(chosen)) | {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
    return trainer.compute_loss(Given(torch.cat([chosen, rejected])), inputs)


PUBLISHED = [
    # torchtune, test_dpo_loss: -log sigmoid of 0, 1, 2
    ({"beta": 0.1}, [0.6931471805599453, 0.31326168751822286, 0.1269280110429725]),
    # torchtune, test_rso_loss, where it calls beta gamma
    ({"beta": 0.1, "loss_type": ["hinge"]}, [1.0, 0.0, 0.0]),
]


@pytest.mark.parametrize(("settings", "expected"), PUBLISHED, ids=["sigmoid", "hinge"])
def test_dpo_is_torchtune_s(small, settings, expected):
    trainer = small.trainer("dpo", **settings)
    for i, value in enumerate(expected):
        one = slice(i, i + 1)
        close(pair_loss(trainer, CHOSEN[one], REJECTED[one], REF_CHOSEN[one], REF_REJECTED[one]), value, 1e-5)


def test_dpo_is_tunix_s(small):
    # google/tunix at c7d8950f, tests/sft/dpo/dpo_trainer_test.py (Apache-2.0), beta 0.1
    chosen = tensor([26.919203688210423, 8.44505659750724, 9.528483641343339, 8.301251508797572], dtype=F64)
    rejected = tensor([3.7394638587049105, -8.88550020970327, 3.3698180833222766, 17.676239647789163], dtype=F64)
    ref_chosen = tensor([-15.300726980381059, 8.715204807644222, -11.120328488196453, -7.115157437904282], dtype=F64)
    ref_rejected = tensor([-11.67601095553167, -6.456438397497614, -3.140370697725762, -17.857212468463118], dtype=F64)
    close(pair_loss(small.trainer("dpo", beta=0.1), chosen, rejected, ref_chosen, ref_rejected), 0.753059, 1e-5)


def test_dpo_plus_likelihood_is_nemo_s(small):
    # NVIDIA-NeMo/RL at 7ea279ab, tests/unit/algorithms/test_loss_functions.py (Apache-2.0): uniform over 16 tokens,
    # 2 completion tokens there and 1 here; beta 0 leaves log 2, and half the sum of 2 log 16 is added.
    uniform = -torch.full((1,), math.log(16), dtype=F64)
    trainer = small.trainer("dpo", beta=0.1, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5])
    trainer.beta = 0.0
    one = pair_loss(trainer, uniform, uniform, torch.zeros(1, dtype=F64), torch.zeros(1, dtype=F64))
    close(one, math.log(2) + 0.5 * math.log(16), 1e-12)
    close(one + 0.5 * math.log(16), 3.4657359027997265, 1e-5)


@pytest.mark.parametrize(
    ("kl", "losses"),
    [
        (0.0, [0.47502081252106, 0.5124973964842103, 0.47502081252106, 0.6224593312018546]),
        (0.5, [0.48750260351578967, 0.52497918747894, 0.4625701546562504, 0.6106392339492219]),
    ],
)
def test_kto_is_its_paper_s(small, kl, losses):
    # arXiv:2402.01306, Eq. 7, computed in float64 by an independent formula; beta 0.1, both weights 1.
    trainer = small.trainer("kto", beta=0.1, desirable_weight=1.0, undesirable_weight=1.0)
    trainer.precompute_ref_logps = True
    logps, ref_logps = [-10.0, -12.5, -9.0, -20.0], [-11.0, -12.0, -8.0, -25.0]
    trainer._compute_kl_logps = lambda model, inputs: torch.full((4,), kl, dtype=F64)
    inputs = batch(4) | {
        "label": [True, True, False, False],
        "ref_logps": tensor(ref_logps, dtype=F64),
        "ref_KL_logps": torch.zeros(4, dtype=F64),
    }
    inputs["label"] = torch.tensor(inputs["label"])
    loss = trainer.compute_loss(Given(tensor(logps, dtype=F64)), inputs)
    close(loss, sum(losses) / 4)


def test_sft_is_the_mean_of_scored_tokens(small):
    # NVIDIA-NeMo/RL, test_nll_loss: a wrong token with logit 999 where all others are 0 costs 999.
    logits = torch.zeros(1, 3, 8, dtype=F64)
    logits[..., 5] = 999.0
    close(torch.nn.functional.cross_entropy(logits[0, :2], tensor([1, 2])), 999.0)
    trainer = small.trainer("sft")
    outputs = small.model(input_ids=tensor([[1, 2, 3, 4]]), labels=tensor([[-100, -100, 3, 4]]))
    inputs = {
        "input_ids": tensor([[1, 2, 3, 4]]),
        "attention_mask": torch.ones(1, 4, dtype=torch.long),
        "labels": tensor([[-100, -100, 3, 4]]),
    }
    close(trainer.compute_loss(trainer.model, inputs), outputs.loss.double(), 1e-6)


def test_reward_model_loss_is_bradley_terry(small):
    trainer = small.trainer("reward", center_rewards_coefficient=0.01)
    scores = tensor([[2.0], [0.5], [1.0], [0.5]])
    inputs = batch(4) | {"margin": tensor([0.25, 0.0])}
    del inputs["completion_mask"]
    loss = trainer.compute_loss(lambda **kwargs: SimpleNamespace(logits=scores), inputs)
    expected = -torch.nn.functional.logsigmoid(tensor([2.0 - 1.0 - 0.25, 0.0])).mean() + 0.01 * (9.0 + 1.0) / 2
    close(loss, expected.double())
