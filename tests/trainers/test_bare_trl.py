"""Each method's stage, on the engine, against the bare TRL trainer, padded: the same loss on one batch of real rows.

Policy and reference differ, so that nothing cancels: the policy is the reference with noise on its weights.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
import trl
from datasets import Dataset
from support.in_process import read, run_stages
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

pytestmark = pytest.mark.train

ROWS, MAX_LENGTH = 8, 256


@pytest.fixture(scope="module")
def reference(shared_data):
    return shared_data / "models" / "stories260K"


@pytest.fixture(scope="module")
def policy(reference, tmp_path_factory):
    """The reference with noise."""
    folder = tmp_path_factory.mktemp("policy")
    model = AutoModelForCausalLM.from_pretrained(reference)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(reference).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(shared_data, reference, tmp_path_factory):
    """Short rows of hh-rlhf: the file, and the same rows as TRL takes them, split here by hand."""
    tokenizer = AutoTokenizer.from_pretrained(reference)
    lines = (shared_data / "preference/hh_harmless_base/train.jsonl").read_text().splitlines()
    kept, split = [], []
    for row in map(json.loads, lines):
        prompt, mark, chosen = row["chosen"].rpartition("\n\nAssistant:")
        same, _, rejected = row["rejected"].rpartition("\n\nAssistant:")
        fits = max(len(tokenizer(row[side])["input_ids"]) for side in ("chosen", "rejected")) < MAX_LENGTH - 1
        if prompt == same and fits and chosen.strip() and rejected.strip():
            kept.append(row)
            split.append({"prompt": prompt + mark, "chosen": f" {chosen.strip()}", "rejected": f" {rejected.strip()}"})
        if len(kept) == ROWS:
            break
    file = tmp_path_factory.mktemp("rows") / "hh.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return file, split


def first_loss(tmp_path, name, recipe, policy, file, *more: str) -> float:
    run = run_stages(
        tmp_path / "run", f"recipe={recipe}", f"model.path={policy}", f"data.path={file}", "data.eval_rows=0",
        "eval.prompts=0", f"{name}.max_length={MAX_LENGTH}", f"{name}.per_device_train_batch_size=16",
        f"{name}.max_steps=1", f"{name}.logging_steps=1", *more,
    )  # fmt: skip
    return read(run / name / "metrics.jsonl")[0]["loss"]


def bare(trainer_class, config_class, tmp_path, model, reference, rows, **settings):
    """The loss of a bare trainer on all rows as one batch."""
    tokenizer = AutoTokenizer.from_pretrained(reference)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    roles = {}
    if trainer_class in (trl.DPOTrainer, trl.KTOTrainer):
        roles["ref_model"] = AutoModelForCausalLM.from_pretrained(reference)
    args = config_class(
        output_dir=str(tmp_path / "bare"), max_length=MAX_LENGTH, per_device_train_batch_size=16, bf16=False,
        use_cpu=True, report_to="none", **settings,
    )  # fmt: skip
    trainer = trainer_class(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **roles
    )
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, batch))


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


DPO_LOSSES = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


def test_all_losses_of_trl_are_here():
    from alignctl.config.trl_fields import config_fields

    assert set(config_fields("trl.trainer.dpo_config:DPOConfig")["loss_type"].choices) == set(DPO_LOSSES)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "aot"])
def test_dpo(tmp_path, policy, reference, rows, loss):
    file, split = rows
    ours = first_loss(
        tmp_path, "dpo", "dpo_local", policy, file, f"dpo.reference={reference}", f"dpo.loss_type=[{loss}]"
    )
    theirs = bare(trl.DPOTrainer, trl.DPOConfig, tmp_path, loaded(policy), reference, split, loss_type=[loss])
    assert ours == pytest.approx(theirs, rel=5e-6)  # sums of float32 in another order
    assert abs(theirs - math.log(2)) > 1e-3  # the reference is not the policy


def test_several_weighted_losses_with_smoothing(tmp_path, policy, reference, rows):
    file, split = rows
    settings = {"loss_type": DPO_LOSSES, "loss_weights": [0.1 * (i + 1) for i in range(15)], "label_smoothing": 0.1}
    ours = first_loss(
        tmp_path, "dpo", "dpo_local", policy, file, f"dpo.reference={reference}", "dpo.label_smoothing=0.1",
        f"dpo.loss_type=[{','.join(DPO_LOSSES)}]", f"dpo.loss_weights={settings['loss_weights']}".replace(" ", ""),
    )  # fmt: skip
    theirs = bare(trl.DPOTrainer, trl.DPOConfig, tmp_path, loaded(policy), reference, split, **settings)
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_ipo_normalised_is_trl_s(tmp_path, policy, reference, rows):
    file, split = rows
    ours = first_loss(tmp_path, "ipo", "ipo_local", policy, file, f"ipo.reference={reference}", "ipo.beta=0.1")
    theirs = bare(
        trl.DPOTrainer, trl.DPOConfig, tmp_path, loaded(policy), reference, split, loss_type=["ipo"], beta=0.1
    )
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_kto(tmp_path, policy, reference, rows):
    file, split = rows
    ours = first_loss(tmp_path, "kto", "kto_local", policy, file, f"kto.reference={reference}")
    single = [
        {"prompt": row["prompt"], "completion": row[side], "label": label}
        for row in split
        for side, label in (("chosen", True), ("rejected", False))
    ]
    shuffled = list(Dataset.from_list(single).shuffle(seed=42))  # as the stage does, with the run's seed
    theirs = bare(trl.KTOTrainer, trl.KTOConfig, tmp_path, loaded(policy), reference, shuffled)
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_reward(tmp_path, policy, reference, rows):
    file, split = rows
    with_margin = [row | {"margin": 0.1 * i} for i, row in enumerate(split)]
    marked = tmp_path / "margin.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    marked.write_text("".join(json.dumps(row | {"margin": 0.1 * i}) + "\n" for i, row in enumerate(lines)))
    ours = first_loss(
        tmp_path, "rm", "reward_local", policy, marked, "rm.center_rewards_coefficient=0.01", "rm.learning_rate=1e-9"
    )
    set_seed(42)
    model = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1)
    theirs = bare(
        trl.RewardTrainer, trl.RewardConfig, tmp_path, model, reference, with_margin, center_rewards_coefficient=0.01
    )
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_sft(tmp_path, policy, reference, rows):
    file, split = rows
    demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in split]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in demonstrations))
    ours = first_loss(tmp_path, "sft", "sft_local", policy, answers)
    theirs = bare(trl.SFTTrainer, trl.SFTConfig, tmp_path, loaded(policy), reference, demonstrations)
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_simpo_is_trl_s_experimental_one(tmp_path, policy, reference, rows):
    file, split = rows
    ours = first_loss(
        tmp_path, "simpo", "simpo_local", policy, file, "simpo.beta=2.0", "simpo.gamma_beta_ratio=0.8",
        "simpo.sft_weight=0.5", "simpo.label_smoothing=0.1",
    )  # fmt: skip
    theirs = bare(
        CPOTrainer, CPOConfig, tmp_path, loaded(policy), reference, split,
        loss_type="simpo", beta=2.0, simpo_gamma=1.6, cpo_alpha=0.5, label_smoothing=0.1,
    )  # fmt: skip
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_orpo_is_trl_s_experimental_one(tmp_path, policy, reference, rows):
    file, split = rows
    ours = first_loss(tmp_path, "orpo", "orpo_local", policy, file, "orpo.beta=0.25")
    theirs = bare(ORPOTrainer, ORPOConfig, tmp_path, loaded(policy), reference, split, beta=0.25)
    assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize(
    ("recipe", "name", "expected", "more"),
    [
        ("dpo_local", "dpo", math.log(2), ()),
        ("kto_local", "kto", 0.5, ()),
        ("ipo_local", "ipo", (1 / (2 * 0.2)) ** 2, ("ipo.beta=0.2",)),
        ("ipo_local", "ipo", (1 / (2 * 0.2)) ** 2, ("ipo.beta=0.2", "ipo.normalize=none")),
    ],
    ids=["dpo", "kto", "ipo", "ipo on sums"],
)
def test_loss_at_the_start(tmp_path, reference, rows, recipe, name, expected, more):
    """The policy is the reference, so every log-ratio is 0."""
    assert first_loss(tmp_path, name, recipe, reference, rows[0], *more) == pytest.approx(expected, abs=1e-5)
