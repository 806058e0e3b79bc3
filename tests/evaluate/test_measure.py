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
    assert estimate_kl(policy, reference) == [pytest.approx(0.5, abs=1e-9)]
    assert estimate_kl(policy, policy) == [0.0]


def test_kl_estimate_on_published_numbers():
    """NVIDIA-NeMo/RL@7ea279abfbeb tests/unit/algorithms/test_loss_functions.py, test_calculate_kl, Apache-2.0."""
    from alignctl.evaluate.measure import estimate_kl

    tokens = zip([-1.0, -1.0, -1.0], [0.0, -15.0, -30.0], [0.7183, 13, 28], strict=True)
    for policy, reference, k3 in tokens:
        assert estimate_kl([torch.tensor([policy])], [torch.tensor([reference])]) == [pytest.approx(k3, rel=1e-3)]


def test_kl_estimate_is_the_kl_on_average():
    from alignctl.evaluate.measure import estimate_kl

    torch.manual_seed(0)
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    exact = float((p * (p / q).log()).sum())
    tokens = torch.multinomial(p, 200_000, replacement=True)
    found = estimate_kl([p[tokens].log()], [q[tokens].log()])[0] / len(tokens)
    assert found == pytest.approx(exact, rel=0.02)  # the standard error of 200,000 draws is 0.5 %


def small_policy():
    from transformers import AutoConfig, AutoModelForCausalLM

    from alignctl.models.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["hello world"], 300)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "llama", vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()  # fmt: skip
    return model, tokenizer


def test_what_is_measured_is_counted_to_its_end():
    from alignctl.config.schema import EvalSettings
    from alignctl.data.tokenizing import Answer
    from alignctl.evaluate.evaluator import Evaluator
    from alignctl.evaluate.held_out import HeldOut, Pairs, Questions

    model, tokenizer = small_policy()
    prompts = [[5, 6, n] for n in range(7)]
    pairs = Pairs([Answer(ids, [9]) for ids in prompts], [Answer(ids, [8, 9]) for ids in prompts])
    held_out = HeldOut(pairs, None, Questions(["a"] * 7, prompts, ["a"] * 7))
    parts = []
    Evaluator(
        tokenizer, held_out, None, EvalSettings(max_new_tokens=2, batch_size=2), 1,
        begins=lambda part, total, unit: parts.append([part, total, 0]),
        count=lambda more: parts.__setitem__(-1, [*parts[-1][:2], parts[-1][2] + more]),
    ).measure(model, lambda: nullcontext(model))  # fmt: skip
    assert parts == [["preferences", 28, 28], ["answers", 7, 7], ["KL", 14, 14]]


def test_sampling_follows_the_policy_and_leaves_the_caller_alone():
    from alignctl.config.schema import EvalSettings
    from alignctl.evaluate.answers import draw_answers

    model, tokenizer = small_policy()
    prompts = [tokenizer("hello")["input_ids"], tokenizer("hello world hello")["input_ids"]] * 300
    settings = EvalSettings(max_new_tokens=1, batch_size=64)
    state = torch.get_rng_state()
    first = draw_answers(model, tokenizer, prompts, settings, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == draw_answers(model, tokenizer, prompts, settings, seed=1)
    assert first != draw_answers(model, tokenizer, prompts, settings, seed=2)
    # No top-k, no top-p: a model that hardly prefers any token uses most of its vocabulary.
    assert len({completion[0] for completion in first}) > 150


def test_end_tokens_are_kept_and_nothing_after():
    from alignctl.rollout.drawing import _until_end

    assert _until_end([5, 6, 2, 0, 0], [1, 2]) == [5, 6, 2]
    assert _until_end([5, 6], [1, 2]) == [5, 6]


def test_win_rate_counts_ties_half():
    from alignctl.evaluate.judges import JUDGES, win_rate

    prompt = "What is 2 plus 3?"
    best, right, wrong = "With pleasure! The answer is 5. Have a lovely day.", "5.", "6."
    rate = win_rate(JUDGES["quickstart"], [prompt] * 4, [best, right, wrong, best], [right, right, best, wrong])
    assert rate == pytest.approx((1 + 0.5 + 0 + 1) / 4)


def test_preference_accuracy_by_hand(monkeypatch):
    from alignctl.data.tokenizing import Answer
    from alignctl.evaluate import measure as module
    from alignctl.evaluate.held_out import Feedback, Pairs

    # Log-probabilities written out instead of computed: a "model" is a list of them, chosen before rejected.
    monkeypatch.setattr(module, "_logps", lambda model, answers, batch_size: model)
    both = lambda model, pairs, batch_size: list(zip(model[:4], model[4:], strict=True))  # noqa: E731
    monkeypatch.setattr(module, "_logps_of_pairs", both)
    answers = [Answer([1], [2])] * 4
    longer = [Answer([1], [2] * 4)] * 4
    policy = [-1.0, -5.0, -2.0, -9.0, -2.0, -4.0, -3.0, -8.0]
    reference = [-1.0, -9.0, -2.0, -9.0, -1.0, -4.0, -3.5, -7.0]

    found = module.preferences(policy, lambda: nullcontext(reference), Pairs(answers, longer), 8)
    assert found["preference_accuracy"] == [True, False, True, False]
    # per token the rejected ones are -1/2, -1, -3/4, -2
    assert not any(found["preference_accuracy_per_token"])
    # rewards: chosen 0, 4, 0, 0; rejected -1, 0, 0.5, -1
    assert found["reward_accuracy"] == [True, True, False, True]

    feedback = Feedback(answers * 2, [True] * 4 + [False] * 4)
    # of 16 pairings of those rewards, 9 are in order and 3 are ties: 0 > -1, -1 three times; 4 > all; 0 = 0 three times
    auc = module.label_auc(policy, lambda: nullcontext(reference), feedback, 8)
    assert auc == (3 * (2 + 0.5) + 4) / 16


@pytest.mark.parametrize(
    ("scores", "labels", "expected"),
    [
        ([1.0, 2.0, 3.0, 4.0], [False, False, True, True], 1.0),
        ([1.0, 2.0, 3.0, 4.0], [True, True, False, False], 0.0),
        ([1.0, 1.0, 1.0], [True, False, True], 0.5),
        ([0.1, 0.4, 0.35, 0.8], [False, False, True, True], 0.75),  # scikit-learn's documentation of roc_auc_score
        ([1.0, 2.0], [True, True], 0.5),
    ],
)
def test_area_under_curve(scores, labels, expected):
    from alignctl.evaluate.measure import area_under_curve

    assert area_under_curve(scores, labels) == expected


def test_pairs_are_tokenised_as_trl_does(shared_data):
    """On real rows: with a template, without one, and at every kind of cut."""
    import json

    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    from alignctl.data.formats import FORMATS
    from alignctl.data.tokenizing import tokenize_completions
    from alignctl.models.tokenizer import train_tokenizer

    lines = (shared_data / "preference" / "hh_harmless_base" / "test.jsonl").read_text().splitlines()[:60]
    talks = [FORMATS["hh_rlhf"].convert(json.loads(line)) for line in lines]
    plain = [
        {
            key: FORMATS["hh_rlhf"].as_text(part) if key == "prompt" else " " + part[-1]["content"]
            for key, part in row.items()
        }
        for row in talks
    ]
    ours = train_tokenizer((m["content"] for row in talks for part in row.values() for m in part), 600)
    stories = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K")
    for tokenizer, rows in ((ours, talks), (stories, plain)):
        bare = object.__new__(trl.DPOTrainer)
        bare._tokenizer = tokenizer
        args = trl.DPOConfig(output_dir="unused", max_length=None, bf16=False)
        theirs = trl.DPOTrainer._prepare_dataset(bare, Dataset.from_list(rows), tokenizer, args, "train")
        for row, expected in zip(rows, theirs, strict=True):
            prompt, (chosen, rejected) = tokenize_completions(
                tokenizer, row["prompt"], [row["chosen"], row["rejected"]]
            )
            assert [prompt, chosen, rejected] == [expected[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")]


@pytest.mark.parametrize(
    ("max_length", "mode", "expected"),
    [
        (None, "keep_start", ([1, 2, 3], [4, 5])),
        (4, "keep_start", ([1, 2, 3], [4])),
        (3, "keep_start", None),
        (4, "keep_end", ([2, 3], [4, 5])),
        (3, "keep_end", ([3], [4, 5])),
        (2, "keep_end", None),
    ],
)
def test_cut(max_length, mode, expected):
    from alignctl.data.tokenizing import cut

    assert cut([1, 2, 3], [4, 5], max_length, mode) == expected


def test_reward_statistics_by_hand():
    """A "reward model" whose score is the last token before the padding."""
    from types import SimpleNamespace

    from alignctl.data.tokenizing import Answer
    from alignctl.evaluate.held_out import Pairs
    from alignctl.evaluate.reward_model import margins, reward_statistics

    class LastToken(torch.nn.Module):
        device = torch.device("cpu")
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(pad_token_id=0))

        def forward(self, input_ids, attention_mask, use_cache):
            last = attention_mask.sum(1, keepdim=True) - 1
            return SimpleNamespace(logits=input_ids.gather(1, last).float())

    pairs = Pairs(
        chosen=[Answer([9], [9, 4]), Answer([9], [2]), Answer([9, 9], [9, 9, 6])],
        rejected=[Answer([9], [1]), Answer([9], [9, 9, 3]), Answer([9], [2])],
    )
    model = LastToken()
    assert margins(model, pairs, batch_size=2) == [3, -1, 4]
    statistics = reward_statistics(model, pairs, batch_size=4)
    assert (statistics.mean, statistics.answers) == (3.0, 6)
    assert statistics.std == pytest.approx(math.sqrt((1 + 1 + 9 + 4 + 0 + 1) / 6))  # of 4, 2, 6, 1, 3, 2
