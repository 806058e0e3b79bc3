"""The KL estimate, sampling and win rate, against numbers worked out by hand or in closed form."""

import math
from contextlib import nullcontext

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.train


def test_kl_estimate_by_hand():
    from alignctl.evaluate.measure import estimate_kl

    # r = reference / policy: token 1 has r = 2, token 2 has r = 1/2; r - 1 - log r = 0.306853, 0.193147
    policy = [torch.log(torch.tensor([0.25, 0.5], dtype=torch.float64))]
    reference = [torch.log(torch.tensor([0.5, 0.25], dtype=torch.float64))]
    assert estimate_kl(policy, reference) == pytest.approx(0.5, abs=1e-9)
    assert estimate_kl(policy, policy) == 0.0


def test_kl_estimate_on_published_numbers():
    """NVIDIA-NeMo/RL@7ea279abfbeb tests/unit/algorithms/test_loss_functions.py, test_calculate_kl, Apache-2.0."""
    from alignctl.evaluate.measure import estimate_kl

    tokens = zip([-1.0, -1.0, -1.0], [0.0, -15.0, -30.0], [0.7183, 13, 28], strict=True)
    for policy, reference, k3 in tokens:
        assert estimate_kl([torch.tensor([policy])], [torch.tensor([reference])]) == pytest.approx(k3, rel=1e-3)


def test_kl_estimate_is_the_kl_on_average():
    from alignctl.evaluate.measure import estimate_kl

    torch.manual_seed(0)
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    exact = float((p * (p / q).log()).sum())
    tokens = torch.multinomial(p, 200_000, replacement=True)
    found = estimate_kl([p[tokens].log()], [q[tokens].log()]) / len(tokens)
    assert found == pytest.approx(exact, rel=0.02)  # the standard error of 200,000 draws is 0.5 %


def test_sampling_follows_the_policy_and_leaves_the_caller_alone():
    from transformers import AutoConfig, AutoModelForCausalLM

    from alignctl.config.schema import EvalSettings
    from alignctl.evaluate.sampling import sample_completions
    from alignctl.models.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["hello world"], 300)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "llama", vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()  # fmt: skip
    prompts = [tokenizer("hello")["input_ids"], tokenizer("hello world hello")["input_ids"]] * 300
    settings = EvalSettings(max_new_tokens=1, batch_size=64)
    state = torch.get_rng_state()
    first = sample_completions(model, tokenizer, prompts, settings, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == sample_completions(model, tokenizer, prompts, settings, seed=1)
    assert first != sample_completions(model, tokenizer, prompts, settings, seed=2)
    # No top-k, no top-p: a model that hardly prefers any token uses most of its vocabulary.
    assert len({completion[0] for completion in first}) > 150


def test_end_tokens_are_kept_and_nothing_after():
    from alignctl.evaluate.sampling import _until_end

    assert _until_end([5, 6, 2, 0, 0], [1, 2]) == [5, 6, 2]
    assert _until_end([5, 6], [1, 2]) == [5, 6]


def test_win_rate_counts_ties_half():
    from alignctl.evaluate.judges import JUDGES, win_rate

    prompt = "What is 2 plus 3?"
    best, right, wrong = "With pleasure! The answer is 5. Have a lovely day.", "5.", "6."
    rate = win_rate(JUDGES["quickstart"], [prompt] * 4, [best, right, wrong, best], [right, right, best, wrong])
    assert rate == pytest.approx((1 + 0.5 + 0 + 1) / 4)


def test_preference_accuracy_by_hand():
    from alignctl.config.schema import EvalSettings
    from alignctl.evaluate import measure as module
    from alignctl.evaluate.measure import Pairs

    class Sums(Pairs):
        """Log-probabilities written out instead of computed."""

        def logps(self, model, batch_size):
            return model

    pairs = Sums([], [], [])
    policy, reference = (
        ([-1.0, -5.0, -2.0, -9.0], [-2.0, -4.0, -3.0, -8.0]),
        ([-1.0, -9.0, -2.0, -9.0], [-1.0, -4.0, -3.5, -7.0]),
    )

    metrics = module._preferences(policy, lambda: nullcontext(reference), pairs, EvalSettings())
    assert metrics["preference_accuracy"] == 2 / 4
    # rewards: chosen 0, 4, 0, 0; rejected -1, 0, 0.5, -1
    assert metrics["reward_accuracy"] == 3 / 4
    assert not math.isnan(metrics["reward_accuracy"])
