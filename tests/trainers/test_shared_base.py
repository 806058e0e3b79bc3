"""PPO's `sharing=shared_base`: the numbers are those of models by themselves, and only one base is held."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.files import read
from support.in_process import run_stages
from support.models import TINY
from support.rewards import REWARDS
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

from alignctl.errors import AlignctlError
from alignctl.models.adapters import Adapters, load_score_adapter
from alignctl.rollout.episodes import Episodes, Segment
from alignctl.rollout.rewards import totals
from alignctl.trainers.on_policy.ppo.config import PPOConfig
from alignctl.trainers.on_policy.ppo.trainer import PPOTrainer

pytestmark = pytest.mark.train

LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}  # which is not without effect at first


@pytest.fixture
def base(small):
    folder = small.folder / "base"
    small.model.save_pretrained(folder)
    return folder


@pytest.fixture
def reward(small, base):
    """The folder of a reward adapter."""
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    folder = small.folder / "reward"
    get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **LORA)).save_pretrained(folder)
    return folder


def build(small, base, reward=None, model=None, **given):
    (small.folder / "out").mkdir(exist_ok=True)
    defaults = {
        "per_device_train_batch_size": 8, "max_prompt_length": 64, "response_length": 8, "max_steps": 2,
        "learning_rate": 1e-2, "temperature": 1.0, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        "report_to": "none", "sharing": "shared_base",
        "reward_funcs": [] if reward else [f"{REWARDS}:short"],
    }  # fmt: skip
    args = PPOConfig(output_dir=str(small.folder / "out"), use_cpu=True, **defaults | given)
    torch.manual_seed(2)
    return PPOTrainer(
        model=model or LlamaForCausalLM.from_pretrained(base), args=args, processing_class=small.tokenizer,
        train_dataset=small.rows("preferences", 16).select_columns(["prompt"]),
        reward_adapter=load_score_adapter(str(reward), str(base)) if reward else None,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
    )  # fmt: skip


def drawn(small):
    prompts = [[5, 6, 7, 8], [9, 10, 11]]
    completions = [[12, 13, 14], [15, 16, 17, 18, small.tokenizer.eos_token_id]]
    return Episodes(prompts, [[Segment(one)] for one in completions], [False, True], ["a", "b"], ["c", "d"])


def batch(trainer, small):
    return trainer._batch(drawn(small), [0, 1])


def of_each_token(model, episodes):
    """Log-probabilities by a causal language model, or its numbers by a sequence classifier, one by one."""
    found = []
    for prompt, completion in zip(episodes.prompt_ids, episodes.completion_ids, strict=True):
        ids, first = torch.tensor([prompt + completion]), len(prompt) - 1
        with torch.no_grad():
            if hasattr(model, "score") or hasattr(model.get_base_model(), "score"):
                hidden = model.base_model.model.model(ids).last_hidden_state[0]
                found.append(model.base_model.model.score(hidden).squeeze(-1)[first:])
            else:
                logps = model(ids).logits[0, :-1].log_softmax(-1)
                found.append(logps.gather(-1, ids[0, 1:, None]).squeeze(-1)[first:])
    return found


@pytest.mark.parametrize("engine", ["auto", "padded"])
def test_the_numbers_are_those_of_models_by_themselves(small, base, reward, engine):
    trainer, episodes = build(small, base, reward, engine=engine), drawn(small)
    trainer.model.eval()
    with torch.no_grad():
        outputs = trainer.outputs_of(episodes)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, pad_token_id=small.tokenizer.pad_token_id
    )
    classifier = PeftModel.from_pretrained(classifier, reward).eval()
    values = of_each_token(classifier, episodes)
    close = {"rtol": 0, "atol": 1e-5}  # of numbers around 1 in float32, computed in another order
    torch.testing.assert_close(outputs.values, torch.cat([one[:-1] for one in values]), **close)
    torch.testing.assert_close(outputs.last_values, torch.stack([one[-1] for one in values]), **close)
    rewards = trainer.scoring.sources[0](episodes)
    torch.testing.assert_close(torch.tensor(totals(rewards)), outputs.last_values, **close)
    reference = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(r=1))  # which is without effect
    torch.testing.assert_close(outputs.ref_logps, torch.cat(of_each_token(reference, episodes)), **close)
    assert (outputs.logps - outputs.ref_logps).abs().max() > 1e-2

    trainer.train()
    trainer.model.eval()
    with torch.no_grad():
        after = trainer.outputs_of(episodes)
    trainer.policy.save_pretrained(small.folder / "policy", selected_adapters=["default"])
    policy = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), small.folder / "policy").eval()
    torch.testing.assert_close(after.logps, torch.cat(of_each_token(policy, episodes)), **close)
    assert (after.logps - outputs.logps).abs().max() > 1e-2
    assert (after.values - outputs.values).abs().max() > 1e-2
    torch.testing.assert_close(after.ref_logps, outputs.ref_logps, rtol=0, atol=0)
    assert trainer.scoring.sources[0](episodes) == rewards


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_only_the_adapters_of_policy_and_value_model_learn(small, base, reward, kind):
    """While completions are drawn the policy's is in the weights of the base, and leaves no rounding behind."""
    trainer = build(small, base, reward, model=LlamaForCausalLM.from_pretrained(base, dtype=kind))
    before = {name: one.detach().clone() for name, one in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, one in trainer.model.named_parameters() if not torch.equal(one, before[name])}
    learns = {name for name in before if ".lora_" in name and ".reward_model." not in name}
    assert moved == learns | {"value_model.score.weight", "value_model.score.bias"}
    assert {name for name, one in trainer.model.named_parameters() if one.requires_grad} == moved
    assert math.isfinite(trainer.state.log_history[-2]["loss"])


def test_while_the_value_model_warms_up_the_policy_stays(small, base):
    trainer = build(small, base, value_warmup_steps=5, weight_decay=0.1)
    before = {name: one.detach().clone() for name, one in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, one in trainer.model.named_parameters() if not torch.equal(one, before[name])}
    assert moved == {name for name in before if "value_model" in name}


def test_without_a_reward_model_values_are_0_at_first(small, base):
    trainer = build(small, base)
    with torch.no_grad():
        outputs = trainer.model.eval()(batch(trainer, small), 1.0)
    assert not outputs.values.any()


def test_peft_s_layers_take_the_adapter_they_are_told(small, base, reward):
    """The private names of peft that models/adapters.py sets. What is trained stays, unlike with peft's own ways."""
    model = build(small, base, reward).policy
    adapters, ids = Adapters(model), torch.arange(5, 20)[None]
    trained = {name: one.requires_grad for name, one in model.named_parameters()}

    def logits():
        with torch.no_grad():
            return model(ids).logits

    as_policy = logits()
    with adapters.under(None):
        torch.testing.assert_close(logits(), LlamaForCausalLM.from_pretrained(base)(ids).logits.detach())
        with adapters.under("reward_model"):
            as_reward = logits()
        with adapters.under("value_model"):
            assert torch.equal(logits(), as_reward)  # it starts as the reward model
    with pytest.raises(KeyError), adapters.under("value_model"):
        raise KeyError
    assert torch.equal(logits(), as_policy)
    assert (as_reward - as_policy).abs().max() > 1e-3
    assert {name: one.requires_grad for name, one in model.named_parameters()} == trained
    model.set_adapter("reward_model")
    assert torch.equal(logits(), as_reward)


def test_recomputed_activations_are_of_the_same_adapter(small, base, reward):
    """In the backward pass the policy's adapter is active; value gradients must be of the value model's."""
    gradients = []
    for again in (False, True):
        trainer = build(small, base, reward)
        if again:
            trainer.model.activation_checkpointing_enable()
        trainer.model.train()
        outputs = trainer.model(batch(trainer, small), 1.0)
        (outputs.logps.sum() + outputs.values.square().sum()).backward()
        gradients.append({n: one.grad for n, one in trainer.model.named_parameters() if one.requires_grad})
    for name, plain in gradients[0].items():
        assert plain.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], plain, rtol=1e-4, atol=1e-6)


def held(trainer):
    """Bytes of the weights of all models of a trainer, each counted once."""
    models = [trainer.model, trainer.ref_model, *(source.model for source in trainer.scoring.sources)]
    weights = {one for model in models if model is not None for one in model.parameters()}
    return sum(one.numel() * one.element_size() for one in weights)


def test_what_each_layout_holds(small):
    """Of a model of a usual shape; with adapters on the policy in each layout, as for DPO."""
    config = small.config()
    config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size = 256, 768, 4, 8192
    config.num_attention_heads = config.num_key_value_heads = 8
    base = small.folder / "base"
    LlamaForCausalLM(config).save_pretrained(base)
    size = sum(one.numel() * 4 for one in LlamaForCausalLM(config).parameters())

    def classifier():
        return AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)

    lora = {"r": 8, "target_modules": "all-linear"}
    get_peft_model(classifier(), LoraConfig(task_type="SEQ_CLS", **lora)).save_pretrained(small.folder / "reward")
    found = {}
    for sharing in ("separate", "shared_value", "shared_base"):
        alone = sharing != "shared_base"
        args = PPOConfig(
            output_dir=str(small.folder / "out"),
            use_cpu=True,
            max_prompt_length=64,
            response_length=8,
            sharing=sharing,
            report_to="none",
        )
        found[sharing] = held(
            PPOTrainer(
                model=LlamaForCausalLM.from_pretrained(base), args=args, processing_class=small.tokenizer,
                train_dataset=small.rows("preferences", 4).select_columns(["prompt"]),
                value_model=classifier() if sharing == "separate" else None,
                reward_model=classifier() if alone else None,
                reward_adapter=None if alone else load_score_adapter(str(small.folder / "reward"), None),
                peft_config=LoraConfig(task_type="CAUSAL_LM", **lora),
            )
        ) / size  # fmt: skip
    head = config.vocab_size * config.hidden_size * 4 / size  # a classifier has no LM head
    assert found["separate"] == pytest.approx(3 - 2 * head, abs=0.25)
    assert found["shared_value"] == pytest.approx(2 - head, abs=0.15)
    assert 1 < found["shared_base"] <= 1.3


SMALL_RUN = (
    "recipe=rlhf_quickstart", "data.limit=64", "data.eval_limit=8", "eval.prompts=2", "eval.max_new_tokens=4",
    "sft.max_steps=2", "rm.max_steps=2", "ppo.max_steps=2", "ppo.per_device_train_batch_size=8",
    "ppo.response_length=8", *TINY, "sft.peft.type=none", "ppo.sharing=shared_base",
    "ppo.learning_rate=1e-2",
)  # fmt: skip


def test_a_stage_saves_the_policy_alone(tmp_path):
    run = run_stages(tmp_path / "run", *SMALL_RUN, "peft=lora", "ppo.gradient_checkpointing=true")
    model = LlamaForCausalLM.from_pretrained(run / "ppo" / "model")
    start, saved = (load_file(run / stage / "model" / "model.safetensors") for stage in ("sft", "ppo"))
    assert saved.keys() == start.keys()
    adapter = load_file(run / "ppo" / "adapter" / "adapter_model.safetensors")
    assert adapter
    assert not any("value_model" in name or "reward_model" in name or "score" in name for name in adapter)
    merged = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(run / "sft" / "model"), run / "ppo" / "adapter")
    for name, weight in merged.merge_and_unload().state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=1e-6)
    kept = load_file(next((run / "ppo" / "checkpoints").glob("*/trained.safetensors")))
    assert {name for name in kept if ".lora_" not in name} == {"value_model.score.weight", "value_model.score.bias"}
    assert not any("reward_model" in name for name in kept)
    first, second = read(run / "ppo" / "metrics.jsonl")
    assert first["kl/k3"] == pytest.approx(0.0, abs=1e-6)
    assert second["kl/k3"] > 1e-6
    assert (run / "rm" / "adapter" / "reward_statistics.json").is_file()


def test_over_four_bits(tmp_path):
    run = run_stages(
        tmp_path / "run", *SMALL_RUN, "peft=qlora", "peft.r=4", "rm.use_cpu=true", "ppo.use_cpu=true",
        "model.scratch.config.hidden_size=64",
    )  # fmt: skip
    first, second = read(run / "ppo" / "metrics.jsonl")
    assert all(math.isfinite(value) for value in second.values())
    assert first["kl/k3"] == pytest.approx(0.0, abs=1e-3)  # bfloat16
    start, saved = (load_file(run / stage / "model" / "model.safetensors") for stage in ("sft", "ppo"))
    assert {name: one.dtype for name, one in saved.items()} == {name: one.dtype for name, one in start.items()}


def test_adapters_that_are_no_reward_model_s(small, base, reward):
    with pytest.raises(AlignctlError, match="cannot load an adapter"):
        load_score_adapter(str(base), str(base))
    get_peft_model(small.model, LoraConfig(task_type="CAUSAL_LM", **LORA)).save_pretrained(small.folder / "policy")
    with pytest.raises(AlignctlError, match="has no head `score`"):
        load_score_adapter(str(small.folder / "policy"), str(base))
    config = small.config()
    config.hidden_size = 32
    with pytest.raises(AlignctlError, match="does not fit the base"):
        build(small, base, reward, model=LlamaForCausalLM(config))
