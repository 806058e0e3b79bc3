"""What libraries refuse once they see it: a sentence and exit code 2, before the first step."""

from __future__ import annotations

import pytest
from support.in_process import run_stages
from support.methods import small_run

from alignctl.errors import AlignctlError, RequestError, refused

pytestmark = pytest.mark.train


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sft.accelerator_config={foo: 1}"], r"the settings of `sft` cannot be used: .*foo"),
        (["sft.optim=sgd", "sft.optim_args='momentum=fast'"], r"the optimizer `\S+` cannot be used: .*fast"),
        (
            [
                "sft.lr_scheduler_type=polynomial",
                "sft.lr_scheduler_kwargs={lr_end: 1, power: 0.5}",
                "sft.learning_rate=1e-3",
            ],
            r"the schedule `\S*` cannot be",
        ),
        (["peft=lora", "peft.use_dora=true", "peft.lora_bias=true"], r"DoRA"),
        (
            ["sft.dataloader_drop_last=true", "sft.per_device_train_batch_size=64", "data.eval_limit=64"],
            r"a batch is of 64 rows, and there are 16",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_settings_that_only_the_worker_can_try(tmp_path, arguments, said):
    with pytest.raises(RequestError, match=said):
        run_stages(tmp_path / "run", *small_run("sft", *arguments, rows=16))
    assert not (tmp_path / "run" / "sft" / "metrics.jsonl").exists()


def test_our_own_errors_and_lack_of_memory_are_not_a_librarys_refusal():
    for error in (RequestError("ours"), RuntimeError("out of memory"), OSError("no room")):
        with pytest.raises(type(error), match=str(error.args[0])), refused("it"):
            raise error


def test_processes_without_rows_are_refused(tmp_path, small, monkeypatch):
    trainer = small.trainer("sft", rows=small.rows("demonstrations", 3))
    monkeypatch.setattr(type(trainer.args), "world_size", property(lambda args: 4))
    with pytest.raises(RequestError, match="4 processes cannot share 3 rows") as caught:
        trainer.get_train_dataloader()
    assert "3 processes or fewer" in caught.value.problems[0].hint


def test_other_steps_than_planned_are_told_before_the_first(tmp_path):
    """Planned for two processes, of which one is there."""
    arguments = small_run("sft", "distributed=ddp", "launcher.processes=2", "rehearse=false", rows=32)
    with pytest.raises(AlignctlError, match=r"would take 32 optimizer steps, .* 16 rows .* together, 16\n"):
        run_stages(tmp_path / "run", *arguments)
    assert not (tmp_path / "run" / "sft" / "metrics.jsonl").read_text()
