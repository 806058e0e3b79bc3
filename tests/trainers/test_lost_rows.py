"""Rows that a length leaves too little of never train, whichever way they get their token ids."""

import pytest
from datasets import Dataset
from support.rewards import REWARDS

from alignctl.trainers.base.columns import ROW_NUMBER

pytestmark = pytest.mark.train

LONG = "word " * 80
ASKED, TALKED = [{"role": "user", "content": "Hi"}], [{"role": "user", "content": LONG}]
LONGEST = 60


def said(text):
    return [{"role": "assistant", "content": text}]


PAIRS = [
    {"prompt": ASKED, "chosen": said("good"), "rejected": said("bad")},
    {"prompt": TALKED, "chosen": said("good"), "rejected": said("bad")},
    {"prompt": ASKED, "chosen": said("good"), "rejected": said(LONG)},
    {"prompt": ASKED, "chosen": said("fine"), "rejected": said("poor")},
]
ANSWERS = [
    {"prompt": row["prompt"], "completion": row["rejected"], "label": place % 2 == 0} for place, row in enumerate(PAIRS)
]
DEMONSTRATIONS = [{"prompt": row["prompt"], "completion": row["completion"]} for row in ANSWERS]
TALKS = [{"messages": row["prompt"] + row["completion"]} for row in ANSWERS]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("method", "rows", "settings", "lost", "cut"),
    [
        ("dpo", PAIRS, {"truncation_mode": "keep_start"}, [1], [2]),
        ("dpo", PAIRS, {"truncation_mode": "keep_end"}, [2], [1]),
        ("reward", PAIRS, {}, [1, 2], []),
        ("kto", ANSWERS, {"per_device_train_batch_size": 2}, [1], [2]),
        ("sft", DEMONSTRATIONS, {"truncation_mode": "keep_start"}, [1], [2]),
        ("sft", DEMONSTRATIONS, {"truncation_mode": "keep_end"}, [2], [1]),
        ("sft", TALKS, {"truncation_mode": "keep_end"}, [], [1, 2]),
    ],
)
def test_rows_that_are_left_and_what_is_known_of_the_others(small, method, rows, settings, lost, cut):
    """TRL makes the ids of rows with options for a template, one at a time."""
    found = []
    for more in ({}, {"chat_template_kwargs": {"unused": 1}}):
        given = Dataset.from_list([row | more | {ROW_NUMBER: number} for number, row in enumerate(rows, start=1)])
        trainer = small.trainer(method, rows=given, max_length=LONGEST, seed=0, **settings)
        lengths = trainer.lengths_of["train"]
        assert lengths.limit == LONGEST
        assert sorted(lengths.numbers[lengths.lost] - 1) == lost  # KTO shuffles them before
        assert sorted(lengths.numbers[lengths.cut] - 1) == cut
        assert len(trainer.train_dataset) == len(rows) - len(lost)
        names = [name for name in trainer.train_dataset.column_names if name.endswith("_ids") or name == "labels"]
        found.append({name: trainer.train_dataset[name] for name in sorted(names)})
        if method == "sft":
            assert max(map(len, trainer.train_dataset["input_ids"])) == LONGEST
    assert found[0] == found[1]


@pytest.mark.parametrize(("strategy", "lost", "cut"), [("bfd", 1, 1), ("bfd_split", 0, 0)])
def test_rows_that_are_packed(small, strategy, lost, cut):
    """One strategy cuts their end, another goes on with it in the next row."""
    trainer = small.trainer(
        "sft", rows=Dataset.from_list(DEMONSTRATIONS), max_length=LONGEST, packing=True, packing_strategy=strategy
    )
    lengths = trainer.lengths_of["train"]
    assert (lengths.lost.sum(), lengths.cut.sum()) == (lost, cut)
    assert strategy != "bfd" or all(
        any(label != -100 for label in labels) for labels in trainer.train_dataset["labels"]
    )


def test_held_out_rows_too(small):
    trainer = small.trainer(
        "dpo", rows=Dataset.from_list(PAIRS[:1]), held=Dataset.from_list(PAIRS), max_length=LONGEST,
        truncation_mode="keep_end",
    )  # fmt: skip
    assert trainer.lengths_of["eval"].lost.tolist() == [False, False, True, False]
    assert len(trainer.eval_dataset) == 3


def test_held_out_prompts_too(small):
    trainer = small.trainer(
        "grpo", rows=Dataset.from_list(PAIRS[:1]), held=Dataset.from_list(PAIRS), max_prompt_length=LONGEST,
        num_generations=4, per_device_train_batch_size=4, response_length=4, reward_funcs=[f"{REWARDS}:length"],
    )  # fmt: skip
    assert trainer.lengths_of["eval"].lost.tolist() == [False, True, False, False]


def test_prompts_that_are_longer(small):
    from alignctl.data.token_columns import PromptIds
    from alignctl.trainers.on_policy.setup import PROMPT_IDS, tokenize_prompts

    rows = Dataset.from_list(PAIRS)
    left, lengths = tokenize_prompts(rows, small.tokenizer, PromptIds(LONGEST))
    assert (lengths.lost.tolist(), lengths.why_lost) == ([False, True, False, False], "the prompt is longer")
    assert (len(left), len(left[0][PROMPT_IDS])) == (3, lengths.least[0])
    none, _ = tokenize_prompts(rows, small.tokenizer, PromptIds(1))
    assert len(none) == 0
