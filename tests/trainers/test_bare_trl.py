"""Each method's stage, on the engine, against the bare TRL trainer, padded: the same loss on one batch of real rows.

Policy and reference differ, so that nothing cancels: the policy is the reference with noise on its weights.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from datasets import Dataset
from support.files import read, write_rows
from support.in_process import run_stages
from support.methods import METHODS
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

from alignctl.methods.registry import methods, resolve

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
    return write_rows(tmp_path_factory.mktemp("rows") / "hh.jsonl", kept), split


def first_loss(tmp_path, name, policy, file, *more: str) -> float:
    """Of a method's stage."""
    row = METHODS[name]
    run = run_stages(
        tmp_path / "run", f"recipe={row.local}", f"model.path={policy}", f"data.path={file}", "data.eval_rows=0",
        "eval.prompts=0", f"{row.stage}.max_length={MAX_LENGTH}", f"{row.stage}.per_device_train_batch_size=16",
        f"{row.stage}.max_steps=1", f"{row.stage}.logging_steps=1", *more,
    )  # fmt: skip
    return read(run / row.stage / "metrics.jsonl")[0]["loss"]


def bare(tmp_path, name, policy, reference, rows, **settings) -> float:
    """The loss of TRL's trainer on all rows as one batch."""
    method, (trainer_class, config_class) = methods()[name], map(resolve, METHODS[name].trl)
    tokenizer = AutoTokenizer.from_pretrained(reference)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    set_seed(42)  # a reward model's head is random
    if method.trained == "reward_model":
        model = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1)
    else:
        model = AutoModelForCausalLM.from_pretrained(policy)
    roles = {"ref_model": AutoModelForCausalLM.from_pretrained(reference)} if "reference" in method.roles else {}
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


def rows_for(name, folder, file, split):
    """The file that a method's stage is given, and the same rows as TRL takes them."""
    method = methods()[name]
    if method.data_kind == "demonstrations":
        split = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in split]
        return write_rows(folder / "answers.jsonl", split), split
    if method.data_kind == "feedback":
        single = [
            {"prompt": row["prompt"], "completion": row[side], "label": label}
            for row in split
            for side, label in (("chosen", True), ("rejected", False))
        ]
        return file, list(Dataset.from_list(single).shuffle(seed=42))  # as the stage does, with the run's seed
    if method.declares("margin"):
        margins = [{"margin": 0.1 * number} for number in range(len(split))]
        marked = [row | margin for row, margin in zip(read(file), margins, strict=True)]
        split = [row | margin for row, margin in zip(split, margins, strict=True)]
        return write_rows(folder / "margin.jsonl", marked), split
    return file, split


def reference_of(name, reference) -> tuple[str, ...]:
    return (f"{METHODS[name].stage}.reference={reference}",) if "reference" in methods()[name].roles else ()


COMPARED = [(name, number) for name, row in METHODS.items() for number in range(len(row.compared))]


@pytest.mark.parametrize(("name", "number"), COMPARED)
def test_the_first_loss_is_that_of_trl(tmp_path, policy, reference, rows, name, number):
    case = METHODS[name].compared[number]
    file, split = rows_for(name, tmp_path, *rows)
    ours = first_loss(tmp_path, name, policy, file, *reference_of(name, reference), *case.ours)
    theirs = bare(tmp_path, name, policy, reference, split, **case.theirs)
    assert ours == pytest.approx(theirs, **case.within)
    if "reference" in methods()[name].roles:  # from which the policy differs
        assert abs(theirs - bare(tmp_path, name, reference, reference, split, **case.theirs)) > 1e-3


DPO_LOSSES = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


def test_all_losses_of_trl_are_here():
    from alignctl.config.trl_fields import config_fields

    assert set(config_fields("trl.trainer.dpo_config:DPOConfig")["loss_type"].choices) == set(DPO_LOSSES)


def test_several_weighted_losses_with_smoothing(tmp_path, policy, reference, rows):
    file, split = rows
    settings = {"loss_type": DPO_LOSSES, "loss_weights": [0.1 * (i + 1) for i in range(15)], "label_smoothing": 0.1}
    ours = first_loss(
        tmp_path, "dpo", policy, file, *reference_of("dpo", reference), "dpo.label_smoothing=0.1",
        f"dpo.loss_type=[{','.join(DPO_LOSSES)}]", f"dpo.loss_weights={settings['loss_weights']}".replace(" ", ""),
    )  # fmt: skip
    theirs = bare(tmp_path, "dpo", policy, reference, split, **settings)
    assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "expected", "more"),
    [
        ("dpo", math.log(2), ()),
        ("kto", 0.5, ()),
        ("ipo", (1 / (2 * 0.2)) ** 2, ("ipo.beta=0.2",)),
        ("ipo", (1 / (2 * 0.2)) ** 2, ("ipo.beta=0.2", "ipo.normalize=none")),
    ],
    ids=["dpo", "kto", "ipo", "ipo on sums"],
)
def test_loss_at_the_start(tmp_path, reference, rows, name, expected, more):
    """The policy is the reference, so every log-ratio is 0."""
    assert first_loss(tmp_path, name, reference, rows[0], *more) == pytest.approx(expected, abs=1e-5)
