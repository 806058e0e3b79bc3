"""PPO's formulas against published numbers and closed forms, in float64.

Sources, with their licences: pytorch/torchtune@bd2a0fc7c314 tests/torchtune/rlhf (BSD-3-Clause);
NVIDIA/NeMo-Aligner@af2b3bd96ad7 nemo_aligner/utils/tests/ppo_utils_test.py, NVIDIA-NeMo/RL@7ea279abfbeb
tests/unit/algorithms, OpenRLHF@3c3be6234e0c tests/test_loss_aggregation.py, google-deepmind/rlax@4c5d25b26098
rlax/_src/multistep_test.py and google/tunix@c7d8950f12a9 tests/rl/ppo/ppo_helpers_test.py (Apache-2.0).
"""

import math

import pytest

torch = pytest.importorskip("torch")

from alignctl.rollout.kl import kl_estimates  # noqa: E402
from alignctl.trainers.on_policy.log import RolloutLog  # noqa: E402
from alignctl.trainers.on_policy.ppo import objective  # noqa: E402

pytestmark = pytest.mark.train


def t(rows):
    return torch.tensor(rows, dtype=torch.float64)


def close(found, expected, **tolerance):
    torch.testing.assert_close(found, t(expected), **{"rtol": 1e-6, "atol": 1e-6} | tolerance)


@pytest.mark.parametrize(
    ("values", "mask", "dim", "mean"),
    [
        ([1, 2, 3, 4, 5], [1, 1, 1, 0, 0], None, 2.0),  # torchtune
        ([[1, 2, 3, 4, 5], [2, 3, 4, 5, 6]], [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]], 1, [2.0, 5.0]),  # torchtune
        ([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]], [[1, 1, 0, 0, 1], [1, 1, 1, 1, 1]], None, 6.0),  # tunix
        ([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]], [[1, 1, 0, 0, 1], [1, 1, 1, 1, 1]], 1, [8 / 3, 8.0]),  # tunix
        # OpenRLHF: a mean over the tokens of all completions, not of the completions' means
        ([[1, 2, 0], [3, 4, 5], [7, 0, 0]], [[1, 1, 0], [1, 1, 1], [1, 0, 0]], None, 22 / 6),
        ([[1, 2]], [[0, 0]], None, 0.0),
    ],
)
def test_means_under_a_mask(values, mask, dim, mean):
    close(objective.masked_mean(t(values), torch.tensor(mask), dim), mean)


def test_whitened_values_have_mean_0_and_variance_1():
    values, mask = torch.randn(4, 9, dtype=torch.float64) * 3 + 2, torch.rand(4, 9) < 0.7
    white = objective.whiten(values, mask, values[mask].mean(), values[mask].var())
    close(objective.masked_mean(white, mask), 0.0)
    close(white[mask].var(), 1.0)
    assert not white[~mask].any()


@pytest.mark.parametrize(
    ("estimator", "expected"), [("k1", [-1, 14, 29]), ("k2", [0.5, 98, 420.5]), ("k3", [0.7183, 13, 28])]
)
def test_kl_estimators_of_nemo(estimator, expected):
    close(kl_estimates(t([-1, -1, -1]), t([0, -15, -30]), estimator), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("estimator", "bias"), [("k1", 0.0), ("k2", -0.0021), ("k3", 0.0)])
def test_kl_estimators_on_average(estimator, bias):
    policy, reference = t([0.7, 0.2, 0.1]), t([0.4, 0.4, 0.2])
    exact = (policy * (policy / reference).log()).sum()
    average = (policy * kl_estimates(policy.log(), reference.log(), estimator)).sum()
    close(average - exact, bias, atol=1e-4)


def test_advantages_of_torchtune():
    rewards, values = t([[0, 0, 0, 1]]), t([[0, 0, 0, 1, 0]])
    discounts = t([[0.9, 0.9, 0.9, 0]])
    advantages, returns = objective.advantages_and_returns(rewards, values, discounts, 0.95)
    close(returns, [[0.6579225, 0.7695, 0.9, 1.0]])
    close(advantages, [[0.6579225, 0.7695, 0.9, 0.0]])


def test_advantages_of_nemo_aligner():
    advantages, returns = objective.advantages_and_returns(
        t([[0, 0, 1, 0]]), t([[0, 1, 2, 3, 0]]), t([[0.5] * 4]), lam=0.0
    )
    close(advantages, [[0.5, 0, 0.5, -3]])
    close(returns, [[0.5, 1, 2.5, 0]])


@pytest.mark.parametrize(
    ("lam", "expected"),
    [
        (1.0, [[-1.45118, -4.4557, 2.5396, 0.5249, -0.49], [3, 2, 1, 0, -4.9]]),
        (0.4, [[0.56731, -6.042, 2.3431, 0.815, -0.49], [1.725, 1.46, 1, 0, -4.9]]),
    ],
)
def test_advantages_of_rlax_where_an_episode_is_cut_short(lam, expected):
    """The last state has a value; a discount of 0 ends an episode within a row."""
    rewards = t([[0, 0, 1, 0, -0.5], [0, 0, 0, 0, 1]])
    values = t([[1, 4, -3, -2, -1, -1], [-3, -2, -1, 0, 5, -1]])
    discounts = t([[0.99] * 5, [0.9, 0.9, 0.9, 0, 0.9]])
    close(objective.advantages_and_returns(rewards, values, discounts, lam)[0], expected, atol=1.5e-3)


def test_with_lambda_1_the_return_is_the_discounted_sum():
    rewards, values = torch.randn(2, 6, dtype=torch.float64), torch.randn(2, 7, dtype=torch.float64)
    discounts = torch.full((2, 6), 0.9, dtype=torch.float64)
    _, returns = objective.advantages_and_returns(rewards, values, discounts, 1.0)
    expected = [
        [sum(0.9 ** (k - i) * row[k] for k in range(i, 6)) + 0.9 ** (6 - i) * last for i in range(6)]
        for row, last in zip(rewards.tolist(), values[:, 6].tolist(), strict=True)
    ]
    close(returns, expected)


def test_policy_losses_of_nemo():
    found = objective.policy_losses(t([-1.69315, -1.0, -0.59453]), t([-1, -1, -1]), t([1, -1, 2]), 0.2)
    close(found.losses, [-0.5, 1.0, -2.4], rtol=1e-4, atol=1e-4)
    assert found.clipped.tolist() == [False, False, True]


def test_policy_losses_of_torchtune():
    found = objective.policy_losses(t([1.5, 1.8, 2.2]), t([0.5, 0.8, 1.2]), t([1, 1, 1]), 0.2)
    close(found.losses, [-1.2] * 3)


def test_dual_clip_limits_what_a_bad_token_counts():
    logps, old, advantages = t([3.0, 0.1, 3.0]), t([0.0, 0.0, 0.0]), t([-2.0, -2.0, 2.0])
    found = objective.policy_losses(logps, old, advantages, 0.2, dual_clip=3.0)
    close(found.losses, [6.0, 2 * math.exp(0.1), -2.4])
    assert found.clipped.tolist() == [True, False, True]


def test_a_clipped_token_has_no_gradient():
    logps = t([0.5, -0.5, 0.05]).requires_grad_()
    objective.policy_losses(logps, t([0, 0, 0]), t([1, -1, 1]), 0.2).losses.sum().backward()
    close(logps.grad, [0.0, 0.0, -math.exp(0.05)])


def test_value_losses_by_hand():
    values, old, returns = t([2.0, 1.1, 0.0]), t([1.0, 1.0, 1.0]), t([3.0, 1.0, 2.0])
    found = objective.value_losses(values, old, returns, 0.2)
    close(found.losses, [1.8**2 / 2, 0.1**2 / 2, 2.0])
    assert found.clipped.tolist() == [True, False, False]
    close(objective.value_losses(values, old, returns, None).losses, [0.5, 0.005, 2.0])


def test_explained_variance_is_of_all_processes():
    """Two have two values each: together they vary, by themselves they do not."""
    log, returns = RolloutLog(), [t([1, 1]), t([3, 3])]
    for values, expected in (([1, 1, 3, 3], 1.0), ([2, 2, 2, 2], 0.0), ([1, 1, 2, 2], 0.75)):
        numbers = []
        for of_one, truth in zip(t(values).split(2), returns, strict=True):
            log.add_explained("explained", of_one, truth)
            numbers.append(log.numbers())
        log.take({name: torch.tensor([one[name] for one in numbers]) for name in numbers[0]})
        assert log.means() == {"explained": pytest.approx(expected)}


def test_the_kl_coefficient_follows_its_target():
    assert objective.adapted_kl_coef(0.1, kl=12.0, target=6.0, horizon=1000, episodes=100) == pytest.approx(0.102)
    assert objective.adapted_kl_coef(0.1, kl=6.3, target=6.0, horizon=1000, episodes=100) == pytest.approx(0.1005)
    assert objective.adapted_kl_coef(0.1, kl=0.0, target=6.0, horizon=1000, episodes=100) == pytest.approx(0.098)
