"""All pairs of a prompt are one entry of a reward model's batch, in an order that depends on the seed alone."""

from types import SimpleNamespace

import pytest
from datasets import Dataset

from alignctl.trainers.base.columns import ROW_NUMBER
from alignctl.trainers.base.entries import PROMPT_NUMBER, Entries, KeepsPromptsTogether, prompt_numbers

pytestmark = pytest.mark.train

PAIRS_OF_ROW = [1, 3, 1, 2, 6, 1, 3]


def pairs() -> Dataset:
    """Pairs of rows that give several; the two of the fourth have prompts of their own."""
    rows = []
    for number, count in enumerate(PAIRS_OF_ROW, start=1):
        for turn in range(count):
            asked = f"What is {number + 10 * turn if number == 4 else number} more than 0?"
            rows.append(
                {
                    "prompt": [{"role": "user", "content": asked}],
                    "chosen": [{"role": "assistant", "content": f"It is {number + turn}."}],
                    "rejected": [{"role": "assistant", "content": "I do not know." + turn * " Not at all."}],
                    ROW_NUMBER: number,
                }
            )
    return Dataset.from_list(rows)


def batches(trainer) -> list[list[int]]:
    return [batch[ROW_NUMBER].tolist() for batch in trainer.get_train_dataloader()]


@pytest.mark.parametrize("settings", [{}, {"train_sampling_strategy": "group_by_length"}])
def test_pairs_of_a_prompt_come_in_one_batch(small, settings):
    settings = {"per_device_train_batch_size": 2} | settings
    trainer = small.trainer("reward", rows=pairs(), **settings)
    assert "batches: 2 prompts each, with all their pairs (17 pairs of 8 prompts)" in trainer.notices
    assert trainer.num_entries == 8
    made = batches(trainer)
    assert len(made) == 4
    assert sorted(number for batch in made for number in batch) == trainer.train_dataset[ROW_NUMBER][:]
    for number, count in enumerate(PAIRS_OF_ROW, start=1):
        if number != 4:
            assert [batch.count(number) for batch in made if number in batch] == [count]
    assert made == batches(small.trainer("reward", rows=pairs(), **settings))
    assert made != batches(small.trainer("reward", rows=pairs(), seed=7, **settings))


def test_pairs_of_prompts_of_their_own_are_batched_as_ever(small):
    rows = pairs().select([0, 4, 7, 13])
    trainer = small.trainer("reward", rows=rows, per_device_train_batch_size=2)
    assert PROMPT_NUMBER not in trainer.train_dataset.column_names
    assert trainer.num_entries == 4
    assert sorted(map(len, batches(trainer))) == [2, 2]


def test_a_step_of_such_entries_may_be_divided(small):
    def losses(tokens: int, batch: int, steps: int) -> list[float]:
        trainer = small.trainer(
            "reward", rows=pairs(), pass_tokens=tokens, per_device_train_batch_size=batch, save_strategy="no",
            gradient_accumulation_steps=steps, num_train_epochs=1, learning_rate=1e-3, logging_steps=1,
        )  # fmt: skip
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    whole = losses(100_000, 4, 1)
    assert len(whole) == 2
    assert losses(90, 2, 2) == pytest.approx(whole, rel=1e-5)


def test_what_a_process_has_of_the_last_entries():
    """Of eight entries in batches of three for two processes, two are left, and both are the first one's."""
    rows = pairs().add_column(PROMPT_NUMBER, [1, 2, 2, 2, 3, 4, 5, *[6] * 6, 7, *[8] * 3])
    entries = Entries(rows, prompt_numbers(rows))
    assert [len(entry) for entry in entries.__getitems__(range(8))] == [1, 3, 1, 1, 1, 6, 1, 3]
    for process, own in ((0, 4), (1, 0)):
        accelerator = SimpleNamespace(
            num_processes=2, process_index=process, gradient_state=SimpleNamespace(end_of_dataloader=True)
        )
        trainer = KeepsPromptsTogether.__new__(KeepsPromptsTogether)
        trainer.train_dataset, trainer.accelerator = rows, accelerator
        trainer.args = SimpleNamespace(train_batch_size=3, dataloader_drop_last=False)
        batch = {"alignctl: rows of each entry": [1, 3, 1]}
        assert trainer.own_of_last([batch]) == own
        assert not batch
