"""What GRPO and RLOO make of rewards, and their losses, against numbers from elsewhere, in float64.

The numbers of cases were computed in plain Python from the formulae of the papers, and compared with TRL 1.16.0's
GRPOTrainer and RLOOTrainer and verl 0.9.1's core_algos, as they ran: none differs by more than 1e-12.
"""

import math

import pytest

torch = pytest.importorskip("torch")

from alignctl.rollout.kl import kl_estimates  # noqa: E402
from alignctl.trainers.on_policy.group import objective  # noqa: E402
from alignctl.trainers.on_policy.group.advantages import (  # noqa: E402
    gdpo_advantages,
    grpo_advantages,
    rloo_advantages,
    with_kl,
    without_signal,
)

pytestmark = pytest.mark.train

NAN = math.nan
REWARDS = [[1.0, 0.2, -0.4, 0.9], [0.1, 0.1, 0.7, -1.3], [2.0, 0.0, 0.0, 0.0]]
TWO = [[0.0, 2.483], [0.0, 1.159], [0.0, 2.149], [1.0, -4.163], [1.0, 0.716], [0.0, -0.796], [1.0, -0.756],
       [1.0, -8.643]]  # fmt: skip
LOGPS = [[-2.067, -1.255, -0.333, -1.598, -0.396], [-0.314, -1.514, -1.199], [-0.002], [-1.233, 0.089, -1.618, -0.066]]
OLD = [[-1.778, -1.332, -1.003, -1.348, -0.434], [-0.591, -1.519, -1.242], [-0.574], [-0.863, -0.048, -1.11, -0.419]]
REF = [[-2.162, -1.101, -0.921, -1.706, -0.623], [-0.792, -1.654, -1.37], [-0.657], [-0.298, 0.36, -1.255, 0.03]]
ADVANTAGES = [1.1, -0.6, 0.9, -1.4]


def alone(total):
    """Of one process."""
    return total


def t(rows):
    return torch.tensor(rows, dtype=torch.float64)


def close(found, expected, **tolerance):
    torch.testing.assert_close(found, t(expected), **{"rtol": 1e-9, "atol": 1e-9} | tolerance)


def flat(rows):
    return t([one for row in rows for one in row])


COMPLETION = torch.tensor([number for number, row in enumerate(LOGPS) for _ in row])
EACH = t(ADVANTAGES)[COMPLETION]
ALL = torch.ones(len(COMPLETION), dtype=torch.bool)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("group", [[0.8775837333840317, -0.3434023304546211, -1.2591418783336108, 0.7249604754042003],
                   [0.23567448589099482, 0.23567448589099482, 0.9426979435639792, -1.4140469153459687],
                   [1.4998500149985001, -0.49995000499950004, -0.49995000499950004, -0.49995000499950004]]),
        ("batch", [[0.7056268624340849, -0.27611485921333756, -1.0124211504489045, 0.5829091472281572],
                   [0.2454354304118557, 0.2454354304118557, 0.9817417216474227, -1.4726125824711338],
                   [1.8407657280889174, -0.6135885760296391, -0.6135885760296391, -0.6135885760296391]]),
        ("none", [[0.575, -0.225, -0.825, 0.475], [0.2, 0.2, 0.8, -1.2], [1.5, -0.5, -0.5, -0.5]]),
    ],
)  # fmt: skip
def test_advantages_of_grpo(scale, expected):
    close(grpo_advantages(t(REWARDS), scale, alone), expected)


def test_a_group_of_equal_rewards_is_worth_nothing_and_is_counted():
    rewards = t([[0.5, 0.5, 0.5, 0.5], [1.0, 1.0, 1.0, 0.0]])
    close(
        grpo_advantages(rewards, "group", alone),
        [[0.0] * 4, [0.4999000199960008, 0.4999000199960008, 0.4999000199960008, -1.4997000599880024]],
    )
    assert without_signal(rewards).tolist() == [True, False]
    assert without_signal(t([[NAN, NAN], [NAN, 3.0], [1.0, 2.0]])).tolist() == [True, True, False]


def test_several_rewards_are_added_up_before_they_are_scaled_or_after():
    rewards, weights = t(TWO), [1.0, 0.1]
    close(
        grpo_advantages((rewards * t(weights)).sum(1).view(2, 4), "group", alone),
        [[-0.20849425585401868, -0.8595470736623233, -0.37273265551260915, 1.4407739850289516],
         [0.9797269824565665, -1.039449855396899, 0.7215417578804457, -0.6618188849401139]],
    )  # fmt: skip
    close(
        gdpo_advantages(rewards.T.reshape(2, 2, 4), weights, alone),
        [[-0.49653880563095143, -0.5455561928407333, -0.5089042190207302, 1.5509992174924148],
         [0.6568537034498801, -1.6776272010080304, 0.6170421703919122, 0.403731327166238]],
    )  # fmt: skip


def test_a_source_that_says_nothing_adds_nothing():
    rewards = t([[[0.0, 1.0, 0.0, NAN]], [[NAN, 1.0, 3.0, NAN]]])
    found = gdpo_advantages(rewards, [1.0, 1.0], alone)
    assert found[0, 3] == 0
    assert found.isfinite().all()
    alone_scored = (0 - 1 / 3) / (math.sqrt(1 / 3) + 1e-4)  # of the first source in its group
    of_second = [-1 / (math.sqrt(2) + 1e-4), 1 / (math.sqrt(2) + 1e-4)]
    sums = [alone_scored, (1 - 1 / 3) / (math.sqrt(1 / 3) + 1e-4) + of_second[0], alone_scored + of_second[1]]
    mean = sum(sums) / 3
    std = math.sqrt(sum((one - mean) ** 2 for one in sums) / 2)
    close(found[0, :3], [(one - mean) / (std + 1e-4) for one in sums])


def test_advantages_of_rloo():
    expected = [[0.7666666666666667, -0.3, -1.1, 0.6333333333333333],
                [0.2666666666666667, 0.2666666666666667, 1.0666666666666667, -1.6],
                [2.0, -0.6666666666666666, -0.6666666666666666, -0.6666666666666666]]  # fmt: skip
    close(rloo_advantages(t(REWARDS), False, alone), expected)
    whole = t(expected)
    close(rloo_advantages(t(REWARDS), True, alone), ((whole - whole.mean()) / (whole.std() + 1e-4)).tolist())


def test_what_nothing_scored_is_in_no_baseline():
    rewards = t([[1.0, NAN, 0.0, 2.0], [NAN, NAN, NAN, 3.0]])
    close(rloo_advantages(rewards, False, alone), [[0.0, 0.0, -1.5, 1.5], [0.0] * 4])
    close(grpo_advantages(rewards, "none", alone), [[0.0, 0.0, -1.0, 1.0], [0.0] * 4])
    close(grpo_advantages(rewards, "group", alone), [[0.0, 0.0, -1 / 1.0001, 1 / 1.0001], [0.0] * 4])
    of_batch = 1 / (t([1.0, 0.0, 2.0, 3.0]).std().item() + 1e-4)
    close(grpo_advantages(rewards, "batch", alone), [[0.0, 0.0, -of_batch, of_batch], [0.0] * 4])


def test_a_penalty_in_the_reward_is_taken_off_before_the_baseline():
    old = [[-1.762, -1.679, -0.843], [-0.526, -2.492], [-0.185], [-0.721, -1.931, -2.161]]
    ref = [[-1.603, -1.645, -0.979], [0.034, -2.229], [-0.108], [-0.452, -1.645, -1.894]]
    kl = torch.stack([kl_estimates(t(one), t(other), "k1").sum() for one, other in zip(old, ref, strict=True)])
    close(kl, [-0.057, -0.823, -0.077, -0.822])
    rewards = with_kl(t([[0.5, 1.5, -0.25, 1.0]]), kl[None], 0.05, None)
    close(rewards, [[0.50285, 1.54115, -0.24615, 1.0411]])
    close(rloo_advantages(rewards, False, alone), [[-0.27585, 1.10855, -1.2745166666666667, 0.44181666666666664]])
    close(with_kl(t([[0.5, 1.5, -0.25, 1.0]]), kl[None], 0.0, (0.0, 1.0)), [[0.5, 1.0, 0.0, 1.0]])


def loss_and_gradient(losses):
    """Of log-probabilities that losses, `[tokens]` each, are made of."""
    logps = flat(LOGPS).requires_grad_()
    loss = losses(logps)
    return loss, torch.autograd.grad(loss, logps)[0]


GRADIENT = [-0.06337795584176432, -0.09138817569475852, 0.0, -0.06589852779834965, -0.08789264278202673,
            0.060884601740075026, 0.04638519327043389, 0.048181748993105185, 0.0, 0.0, 0.12350456984065826, 0.0,
            0.15328181544669556]  # fmt: skip


@pytest.mark.parametrize(("epsilon_high", "expected"), [(0.2, 0.11137293486637649), (0.28, 0.09906524255868418)])
def test_clipped_losses_over_the_tokens_of_a_batch(epsilon_high, expected):
    def over_tokens(logps):
        return objective.clipped_losses((logps - flat(OLD)).exp(), EACH, 0.2, epsilon_high).losses.mean()

    loss, gradient = loss_and_gradient(over_tokens)
    close(loss, expected)
    close(gradient, GRADIENT)


@pytest.mark.parametrize(
    ("corrected", "expected", "expected_gradient"),
    [
        (False, 0.0010903654450118427,
         [-0.04101441716608327, -0.05973529597514991, 0.0008891259026039636, -0.04262929826178814,
          -0.05672405937289765, 0.06722491122847463, 0.050686098591640694, 0.05272082283095856, 0.004805579374129518,
          -0.0038680336443475197, 0.09956927531957337, -0.001094089648103025, 0.12428957739045521]),
        (True, 0.0022882606357738644,
         [-0.041053358978120305, -0.059734967161121956, 0.002298183089067865, -0.042665822099783854,
          -0.05665863382859053, 0.06806019030293031, 0.050719631886037765, 0.05279193934259548, 0.01160533666501371,
          -0.0016145914978648163, 0.09957048692491226, -0.0005460407278741146, 0.12419987557601608]),
    ],
)  # fmt: skip
def test_a_mean_of_means_with_a_penalty(corrected, expected, expected_gradient):
    def of_completions(logps):
        ratio = (logps - flat(OLD)).exp()
        kl = kl_estimates(logps, flat(REF), "k3") * (ratio if corrected else 1.0)
        losses = objective.clipped_losses(ratio, EACH, 0.2, 0.2).losses + 0.04 * kl
        own = objective.sum_of_completion(torch.ones_like(losses), COMPLETION)
        return (losses / own).sum() / len(LOGPS)

    loss, gradient = loss_and_gradient(of_completions)
    close(loss, expected)
    close(gradient, expected_gradient)


def test_every_token_moves_the_model_in_cispo():
    loss, gradient = loss_and_gradient(
        lambda logps: objective.cispo_losses((logps - flat(OLD)).exp(), logps, EACH, 1.2).mean()
    )
    close(loss, 0.08029658285142481)
    close(
        gradient,
        [-0.06337795584176432, -0.09138817569475852, -0.10153846153846155, -0.06589852779834965,
         -0.08789264278202673, 0.05538461538461538, 0.04638519327043389, 0.048181748993105185, -0.08307692307692308,
         0.07438677406863818, 0.12350456984065826, 0.064798221574381, 0.12923076923076923],
    )  # fmt: skip


def test_rloo_clips_whole_completions():
    old = flat([[-1.762, -1.679, -0.843], [-0.526, -2.492], [-0.185], [-0.721, -1.931, -2.161]])
    logps = flat([[-1.618, -1.691, -0.981], [-0.343, -2.298], [-0.288], [-0.781, -2.052, -2.229]]).requires_grad_()
    completion, firsts = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3]), [0, 3, 5, 6]
    ratio = objective.sum_of_completion(logps - old, completion).exp()
    losses = objective.clipped_losses(ratio, t([1.2, -0.7, 0.3, -0.8])[completion], 0.2, 0.2).losses
    close(losses[firsts], [-1.1928215568647222, 1.020533016559858, -0.27063809204445494, 0.64])
    loss = losses[firsts].mean()
    close(loss, 0.04926834191267025)
    (gradient,) = torch.autograd.grad(loss, logps)
    close(
        gradient,
        [-0.29820538921618056] * 3 + [0.2551332541399645] * 2 + [-0.06765952301111373] + [0.0] * 3,
    )


def test_a_bound_on_both_sides():
    ratio, advantages = t([9.0, 9.0, 0.1]), t([-1.0, 1.0, -1.0])
    close(objective.clipped_losses(ratio, advantages, 0.2, 0.2).losses, [9.0, -1.2, 0.8])
    found = objective.clipped_losses(ratio, advantages, 0.2, 0.2, delta=4.0)
    close(found.losses, [4.0, -1.2, 0.8])
    assert found.low.tolist() == [False, False, True]
    assert found.high.tolist() == [False, True, False]


def test_a_sigmoid_in_place_of_the_clipping():
    """On policy its slope is that of the ratio itself, whatever the temperature."""
    ratio = torch.ones(2, dtype=torch.float64, requires_grad=True)
    losses = objective.sapo_losses(ratio, t([2.0, -3.0]), 1.0, 1.05)
    close(losses, [-4.0, 3.0 * 2 / 1.05])
    close(torch.autograd.grad(losses.sum(), ratio)[0], [-2.0, 3.0])
    far = objective.sapo_losses(t([3.0, 3.0]), t([1.0, -1.0]), 1.0, 1.05)
    close(far, [-4 / (1 + math.exp(-2)), 4 / 1.05 / (1 + math.exp(-2.1))])


@pytest.mark.parametrize("share", [0.0, 0.25, 0.8, 1.0])
def test_quantiles_are_of_what_is_a_number(share):
    values = torch.tensor([3.0, NAN, 0.5, 2.0, 2.0, NAN, 7.5, 1.0], dtype=torch.float64)
    assert float(objective.quantile(values, share)) == pytest.approx(float(torch.nanquantile(values, share)))
    assert objective.quantile(values[1:2], share).isnan()


def test_weights_of_vespo_and_masks_are_trl_s():
    from trl import GRPOTrainer

    logps, old = flat(LOGPS), flat(OLD)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in LOGPS], batch_first=True).double()
    padded = {
        name: torch.nn.utils.rnn.pad_sequence([t(row) for row in rows], batch_first=True)
        for name, rows in {"logps": LOGPS, "old": OLD}.items()
    }
    sampler = t([0.5, 2.0, 1.0, 0.0, 1.5, 1.1, 0.9, 1.0, 0.7, 1.0, 1.2, 1.0, 0.8])
    placed = torch.zeros_like(mask).masked_scatter(mask.bool(), sampler) + (1 - mask)  # what is not there counts 1
    advantages = t(ADVANTAGES)[:, None]
    for given, there in ((None, None), (sampler, placed)):
        theirs = GRPOTrainer.get_gamma_weights(advantages, padded["logps"] - padded["old"], mask, there)
        ours = objective.vespo_weights(logps - old, EACH, ALL, COMPLETION, (2.0, 3.0), (3.0, 2.0), given)
        close(ours, theirs[:, 0][COMPLETION].tolist())
    for threshold in (-0.5, 0.0, 0.1):
        theirs = GRPOTrainer.get_off_policy_mask(advantages, padded["logps"], padded["old"], mask, threshold)
        ours = objective.near_policy(logps, old, EACH, ALL, COMPLETION, threshold)
        assert ours.tolist() == theirs[:, 0][COMPLETION].bool().tolist()
    assert not objective.near_policy(logps, old, -EACH.abs(), ALL, COMPLETION, -9.0).any()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_truncate", [3.0, 0.5, 1.0, 1.0]),
        ("token_mask", [0.0, 0.0, 1.0, 1.0]),
        ("sequence_truncate", [2.0, 2.0, 1.0, 1.0]),
        ("sequence_mask", [2.0, 2.0, 1.0, 1.0]),
    ],
)
def test_what_another_program_drew_is_weighted(mode, expected):
    logps, drawn = t([8.0, 0.25, 5.0, 7.0]).log(), t([1.0, 1.0, 5.0, NAN]).log()
    completion = torch.tensor([4, 4, 6, 6])
    ratios = objective.sampler_ratios(logps, drawn, torch.ones(4), completion, mode, 0.5, 3.0)
    close(ratios, expected)
    if mode == "sequence_mask":
        close(objective.sampler_ratios(logps, drawn, torch.ones(4), completion, mode, None, 1.5), [0.0, 0.0, 1.0, 1.0])


def test_the_weight_of_the_entropy_follows_it():
    given = {"target": 1.0, "delta": 0.1, "least": 0.0, "most": 0.5}
    assert objective.adapted_entropy_coef(0.2, 0.9, **given) == pytest.approx(0.3)
    assert objective.adapted_entropy_coef(0.2, 1.1, **given) == pytest.approx(0.1)
    assert objective.adapted_entropy_coef(0.5, 0.9, **given) == 0.5
    assert objective.adapted_entropy_coef(0.05, 1.1, **given) == 0.0
