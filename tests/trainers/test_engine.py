"""On the engine every method computes what bare TRL computes on padded rows: log-probabilities, loss, gradients and the
weights after 20 steps, on real rows of ragged lengths, cut ones and prompts of one token among them."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from support.methods import METHODS
from support.models import weights_of
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

from alignctl.engine.forward import takes_packed_rows
from alignctl.methods.registry import methods, resolve
from alignctl.trainers.base import heads

pytestmark = pytest.mark.train

LENGTH = 160
BARE = [name for name, row in METHODS.items() if row.passes is not None]
OWN = [name for name in METHODS if name not in BARE and methods()[name].data_kind != "prompts"]


@pytest.fixture(scope="module")
def real(shared_data):
    """Builds the trainer of a method over stories260K and rows of hh-rlhf."""
    folder = shared_data / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = (shared_data / "preference/hh_harmless_base/train.jsonl").read_text().splitlines()
    pairs = [{"prompt": "A", "chosen": " small dog ran", "rejected": " big cat"}]  # a prompt of one token
    for row in map(json.loads, lines):
        prompt, mark, chosen = row["chosen"].rpartition("\n\nAssistant:")
        same, _, rejected = row["rejected"].rpartition("\n\nAssistant:")
        if prompt == same and len(prompt) < 200 and chosen.strip() and rejected.strip():
            pairs.append({"prompt": prompt + mark, "chosen": chosen, "rejected": rejected})
        if len(pairs) == 32:
            break

    def rows(kind):
        if kind == "preferences":
            return Dataset.from_list(pairs)
        single = [{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs]
        if kind == "demonstrations":
            return Dataset.from_list(single)
        return Dataset.from_list([row | {"label": i % 2 == 0} for i, row in enumerate(single)])

    def build(tmp_path, name, bare=False, **settings):
        method = methods()[name]
        set_seed(1)  # a reward model's head is random
        if method.trained == "reward_model":
            model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder)
            with torch.no_grad():  # a policy that is not its reference, so that nothing cancels
                for parameter in model.parameters():
                    parameter += 0.02 * torch.randn(parameter.shape)
        peft_config, margins = settings.pop("peft_config", None), settings.pop("margins", False)
        alone = peft_config is not None or "reference" not in method.roles
        roles = {} if alone else {"ref_model": AutoModelForCausalLM.from_pretrained(folder)}
        trainer_class, config_class = map(resolve, METHODS[name].trl if bare else (method.trainer, method.config_class))
        defaults = {"per_device_train_batch_size": 8, "max_length": LENGTH, "logging_steps": 1, "save_strategy": "no"}
        defaults |= METHODS[name].engine
        args = config_class(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True,
            **defaults | {"bf16": False, "gradient_checkpointing": False} | settings,
        )  # fmt: skip
        data = rows(method.data_kind)
        if margins:
            data = data.add_column("margin", [0.1 * i for i in range(len(data))])
        if bare and method.data_kind == "feedback":
            data = data.shuffle(seed=42)  # as our trainer does
        if bare and settings.get("truncation_mode") == "keep_end":  # TRL trains on rows without a prompt, too
            columns = resolve(method.trainer).token_columns(args, data.column_names)
            data = data.filter(lambda row: columns.fits(tokenizer, row))
        return trainer_class(
            model=model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=peft_config, **roles
        )

    return build


def loss_and_gradient(trainer):
    """Of the first batch, with what was logged of it."""
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])
    logged = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return float(loss), gradient, logged


def check_same(ours, theirs):
    """Float32 sums of thousands of terms in another order: 1e-5, relative."""
    (loss, gradient, logged), (expected, expected_gradient, expected_logged) = map(loss_and_gradient, (ours, theirs))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()
    assert expected_gradient.norm() > 1e-3
    assert logged.keys() == expected_logged.keys()
    for name, value in logged.items():
        assert value == pytest.approx(expected_logged[name], rel=1e-5, abs=1e-5), name


CASES = {
    **{name: (name, {}) for name in BARE},
    "dpo cut at the start": ("dpo", {"truncation_mode": "keep_end"}),
    "dpo with adapters": ("dpo", {"peft_config": LoraConfig(target_modules="all-linear", init_lora_weights=False)}),
    "dpo with checkpoints of activations": ("dpo", {"gradient_checkpointing": True}),
    "dpo computed beforehand": ("dpo", {"precompute_ref_log_probs": True}),
    "dpo with two losses": ("dpo", {"loss_type": ["sigmoid", "ipo"], "use_weighting": True}),
    "reward with margins and adapters": (
        "reward",
        {
            "margins": True,
            "peft_config": LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", init_lora_weights=False),
        },
    ),
    "sft packed": ("sft", {"packing": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_of_bare_trl(tmp_path, monkeypatch, real, case):
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "cache"))
    name, settings = CASES[case]
    packed = []
    for function in ("pack_rows", "packed_already"):
        plain = getattr(heads, function)
        monkeypatch.setattr(heads, function, lambda *given, plain=plain: packed.append(given) or plain(*given))
    ours = real(tmp_path, name, **settings)
    assert "nothing padded (sdpa attention)" in ours.notices[0]
    packed.clear()
    check_same(ours, real(tmp_path, name, bare=True, **settings))
    assert len(packed) == METHODS[name].passes - ("beforehand" in case)


@pytest.mark.parametrize("name", OWN)
def test_loss_and_gradient_of_our_own_methods(tmp_path, real, name):
    check_same(real(tmp_path, name), real(tmp_path, name, engine="padded"))


@pytest.mark.parametrize("name", BARE)
def test_twenty_steps_of_bare_trl(tmp_path, real, name):
    settings = {
        "max_steps": 20, "learning_rate": 3e-4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        **{"max_length": 96} | METHODS[name].engine,
    }  # fmt: skip
    ours, theirs = real(tmp_path, name, **settings), real(tmp_path, name, bare=True, **settings)
    before = weights_of(ours.model)
    for trainer in (ours, theirs):
        trainer.train()
    found, expected = weights_of(ours.model), weights_of(theirs.model)
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert (found - before).norm() > 3e-3 * before.norm()


def test_in_bfloat16_it_is_as_exact_as_padding(tmp_path, real):
    """The noise of bfloat16 is its distance from float32. (On a CPU two padded orders of a batch differ by nothing.)"""

    def logps(engine, bf16):
        trainer = real(tmp_path, "dpo", engine=engine, bf16=bf16)
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(16)])
        return torch.cat(trainer.compute_ref_log_probs(trainer.ref_model, batch))

    exact = logps("padded", False)
    noise, ours = ((logps(engine, True) - exact).square().mean().sqrt() for engine in ("padded", "shared_prefix"))
    assert 0.01 < ours < 1.5 * noise


def test_rows_of_about_one_length_share_a_batch(tmp_path, real):
    """On request; by default batches are drawn without looking at lengths."""
    spread = []
    for settings in ({}, {"train_sampling_strategy": "group_by_length"}):
        trainer = real(tmp_path, "dpo", per_device_train_batch_size=4, **settings)
        lengths = [batch["attention_mask"].sum(1).float() for batch in trainer.get_train_dataloader()]
        assert sum(map(len, lengths)) == 64
        spread.append(sum(float(one.std()) for one in lengths))
    assert spread[1] < 0.7 * spread[0]
    trainer = real(tmp_path, "dpo", train_sampling_strategy="group_by_length", per_device_eval_batch_size=16)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] > 0


def test_a_classifier_that_scores_otherwise_keeps_its_padded_rows(tmp_path, real, monkeypatch):
    """The mean over a row, for instance, is not what the engine would compute."""
    from transformers import LlamaForSequenceClassification
    from transformers.modeling_outputs import SequenceClassifierOutputWithPast

    def of_the_mean(self, input_ids=None, attention_mask=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return SequenceClassifierOutputWithPast(logits=self.score(hidden.mean(1)))

    monkeypatch.setattr(LlamaForSequenceClassification, "forward", of_the_mean)
    trainer = real(tmp_path, "reward")
    assert trainer.notices[0] == "engine: padded rows, because models of type `llama` score rows in another way"
    assert not takes_packed_rows(trainer.model)
