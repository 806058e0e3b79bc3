"""Whole runs through the command: a shortened quickstart, stopping, killing, continuing, sweeping, adapters."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from support.files import metrics, weights
from support.models import TINY
from support.processes import HANG_S, beat, finish, start, wait_for_step, wait_until, wait_until_gone, workers

pytestmark = [pytest.mark.train, pytest.mark.spread(2)]

# A model and a data set so small that a stage is mostly imports.
SMALL = (
    "recipe=quickstart", "data.limit=192", "data.eval_limit=24", "eval.prompts=8", "eval.max_new_tokens=24",
    *TINY, "log_every=1",
)  # fmt: skip
SFT = (*SMALL, "stages=[sft]", "sft.num_train_epochs=4", "sft.logging_steps=1", "sft.save_steps=5")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The SFT stage of `SFT`, run to its end without interruption."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = start(folder, *SFT, "run_dir=run")
    finish(run)
    return folder / "run" / "sft"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A shortened quickstart: SFT then DPO."""
    folder = tmp_path_factory.mktemp("pipeline")
    run = start(folder, *SMALL, "sft.max_steps=20", "dpo.max_steps=4", "dpo.logging_steps=2")
    out, err = run.communicate(timeout=HANG_S)
    assert run.returncode == 0, err
    (folder / "out").write_text(out)
    (folder / "err").write_text(err)
    return folder


def test_what_other_launchers_left_in_the_environment_changes_nothing(undisturbed, tmp_path, monkeypatch):
    others = {"ACCELERATE_MIXED_PRECISION": "bf16", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    for key, value in (others | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9", "SLURM_PROCID": "1"}).items():
        monkeypatch.setenv(key, value)
    finish(start(tmp_path, *SFT, "run_dir=run"))
    assert weights(tmp_path / "run" / "sft" / "model") == weights(undisturbed / "model")


def test_a_process_that_does_not_even_start_ends_with_one_request(tmp_path):
    run = start(tmp_path, *SFT, "run_dir=run")
    stage = tmp_path / "run" / "sft"
    wait_until(lambda: beat(stage).get("doing", "training") != "training", "it does not start", run)
    os.kill(beat(stage)["pid"], signal.SIGSTOP)
    run.send_signal(signal.SIGTERM)
    assert "before it had anything to save" in finish(run, 130)
    wait_until_gone(tmp_path)


def test_shortened_quickstart_ends_with_its_table(pipeline):
    out, err = (pipeline / "out").read_text(), (pipeline / "err").read_text()
    for title in ("right answers", "wanted manner", "preference accuracy", "KL to reference", "win rate"):
        assert title in out
    assert "before" in out
    assert "after" in out
    assert "sft: step 20/20" in err
    assert "dpo: step 4/4" in err
    assert "accuracies" in err


def test_run_directory_is_complete(pipeline):
    (run,) = (pipeline / "runs" / "quickstart").iterdir()
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "plan.json", "provenance.json", "status.json"}
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "done"
    assert {name: stage["state"] for name, stage in status["stages"].items()} == {"sft": "done", "dpo": "done"}
    for stage, steps in (("sft", 20), ("dpo", 4)):
        assert json.loads((run / stage / "result.json").read_text())["steps"] == steps
        assert (run / stage / "logs" / "attempt_1" / "rank_0.log").is_file()
        assert (run / stage / "model" / "model.safetensors").stat().st_mode & 0o444 == 0o444
    samples = [json.loads(line) for line in (run / "dpo" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 8
    assert all(isinstance(row["before"], str) and isinstance(row["after"], str) for row in samples)
    result = json.loads((run / "dpo" / "result.json").read_text())
    assert set(result["before"]) >= {"right", "wanted_manner", "preference_accuracy", "kl"}
    assert result["after"]["kl"] >= 0
    assert 0 <= result["win_rate"] <= 1


def test_the_model_loads_and_the_stages_differ(pipeline):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (run,) = (pipeline / "runs" / "quickstart").iterdir()
    model = AutoModelForCausalLM.from_pretrained(run / "dpo" / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "dpo" / "model")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<|user|>Hi<|end|><|assistant|>"
    assert model.config.vocab_size == len(tokenizer)
    assert weights(run / "dpo" / "model") != weights(run / "sft" / "model")


def test_the_same_command_again_has_nothing_to_do(pipeline, alignctl):
    arguments = (*SMALL, "sft.max_steps=20", "dpo.max_steps=4", "dpo.logging_steps=2")
    again = alignctl("train", *arguments, "--json", folder=pipeline)
    assert again.code == 0
    assert "already finished" in again.err
    summary = json.loads(again.out)
    assert summary["stages"]["dpo"]["steps"] == 4
    assert summary["stages"]["dpo"]["rows"]["train"]["skipped"] == 0
    assert len(list((pipeline / "runs" / "quickstart").iterdir())) == 1


def test_a_run_directory_of_other_settings_is_refused(pipeline, alignctl):
    (run,) = (pipeline / "runs" / "quickstart").iterdir()
    other = alignctl(
        "train", *SMALL, "sft.max_steps=20", "dpo.max_steps=4", "dpo.logging_steps=2", "dpo.beta=0.9", f"run_dir={run}"
    )
    assert other.code == 2
    assert "`dpo.beta`: 0.5 -> 0.9" in other.err


def test_learning_happens_on_the_loss_that_is_logged(undisturbed):
    losses = [row["loss"] for row in metrics(undisturbed) if "loss" in row]
    assert len(losses) == 24
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_continued_equals_undisturbed(tmp_path, undisturbed, number):
    stage = tmp_path / "run" / "sft"
    run = start(tmp_path, *SFT, "run_dir=run")
    wait_for_step(stage, 7, run)
    run.send_signal(number)
    err = finish(run, 75)
    assert "stopped: stage `sft`" in err
    assert "run the same command again to continue" in err
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "stopped"

    err = finish(start(tmp_path, *SFT, "run_dir=run"))
    assert "continues after step" in err
    assert weights(stage / "model") == weights(undisturbed / "model")
    facts = ("step", "loss", "learning_rate", "grad_norm", "eval_loss")
    assert [[row.get(fact) for fact in facts] for row in metrics(stage)] == [
        [row.get(fact) for fact in facts] for row in metrics(undisturbed)
    ]


def test_a_killed_worker_loses_nothing_that_was_saved(tmp_path, undisturbed):
    stage = tmp_path / "run" / "sft"
    run = start(tmp_path, *SFT, "run_dir=run")
    wait_for_step(stage, 12, run)
    os.kill(workers(tmp_path)[0], signal.SIGKILL)
    err = finish(run, 1)
    assert "was killed by signal 9" in err
    err = finish(start(tmp_path, *SFT, "run_dir=run"))
    assert int(re.search(r"continues after step (\d+)", err).group(1)) in (10, 15, 20)
    assert weights(stage / "model") == weights(undisturbed / "model")


def test_ppo_killed_between_checkpoints_ends_as_if_it_had_not_been(tmp_path):
    """The worker is killed after step 5, the last checkpoint is that of step 4."""
    arguments = (
        "recipe=rlhf_quickstart", *SMALL[1:3], *SMALL[5:], "stages=[ppo]", "ppo.from=null", "ppo.reward_model=null",
        "ppo.normalize_rewards=running", "ppo.reward_funcs=[rewards.py:reward]", "ppo.target_kl=1.0",
        "ppo.per_device_train_batch_size=8", "ppo.response_length=8", "ppo.max_steps=8", "ppo.save_steps=2",
        "eval.prompts=0", "run_dir=run",
    )  # fmt: skip
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    once = "import os, signal\nfrom pathlib import Path\nmark, calls = Path('once'), []\n" + (
        "def reward(prompts, completions):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 6 and mark.exists():\n"
        "        mark.unlink()\n"
        "        os.kill(os.getppid(), signal.SIGKILL)\n"
        "    return [len(completion[0]['content']) / 10 for completion in completions]\n"
    )
    for name in ("whole", "killed"):
        (tmp_path / name / "rewards.py").write_text(once)
    (tmp_path / "killed" / "once").touch()
    whole, killed = (start(tmp_path / name, *arguments) for name in ("whole", "killed"))
    finish(whole)
    err = finish(killed, 1)
    assert "was killed by signal 9" in err
    err = finish(start(tmp_path / "killed", *arguments))
    assert "continues after step 4" in err
    stages = [tmp_path / name / "run" / "ppo" for name in ("whole", "killed")]
    assert weights(stages[0] / "model") == weights(stages[1] / "model")
    rows = [
        [{key: row[key] for key in row if "tokens_per_s" not in key and key != "step_time"} for row in metrics(stage)]
        for stage in stages
    ]
    assert [row["step"] for row in rows[0]] == list(range(1, 9))
    assert rows[0] == rows[1]
    assert len({(stage / "samples_while_training.jsonl").read_text() for stage in stages}) == 1


def test_a_killed_command_takes_its_worker_with_it(tmp_path):
    stage = tmp_path / "run" / "sft"
    run = start(tmp_path, *SFT, "run_dir=run")
    wait_for_step(stage, 2, run)
    run.kill()
    run.wait(HANG_S)
    wait_until_gone(tmp_path)


def test_interrupted_before_training(tmp_path):
    run = start(tmp_path, *SFT, "run_dir=run")
    wait_until((tmp_path / "run" / "sft" / "progress.json").exists, "the stage does not begin", run)
    run.send_signal(signal.SIGINT)
    err = finish(run, 130)
    assert "interrupted: stage `sft`" in err


def test_a_stage_that_was_trained_but_not_saved_takes_no_step_more(tmp_path, alignctl, undisturbed):
    arguments = ("train", *SFT, "sft.max_steps=9", "run_dir=run")
    assert alignctl(*arguments).code == 0
    stage = tmp_path / "run" / "sft"
    first = weights(stage / "model")
    (stage / "result.json").unlink()
    again = alignctl(*arguments)
    assert again.code == 0, again.err
    assert weights(stage / "model") == first
    assert json.loads((stage / "result.json").read_text())["steps"] == 9


def test_what_nobody_foresaw_keeps_its_traceback_and_names_the_log(tmp_path, alignctl, monkeypatch):
    bug = "import sys\nif 'alignctl.worker' in sys.orig_argv:\n    from alignctl.methods import registry\n"
    (tmp_path / "sitecustomize.py").write_text(f"{bug}    registry.resolve = lambda name: 1 / 0\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    failed = alignctl("train", "recipe=quickstart", *TINY, "stages=[sft]", "run_dir=run")
    assert failed.code == 1
    assert "Traceback" in failed.err
    assert "ZeroDivisionError" in failed.err
    assert "attempt_1" in failed.err


def test_a_reward_function_that_raises_is_named_with_the_row(tmp_path, alignctl):
    (tmp_path / "rewards.py").write_text("def unforeseen(prompts, completions):\n    return [1 / 0]\n")
    failed = alignctl(
        "train", "recipe=rlhf_quickstart", *TINY, "stages=[ppo]", "ppo.from=null", "ppo.reward_model=null",
        "ppo.normalize_rewards=none", "ppo.reward_funcs=[rewards.py:unforeseen]", "ppo.max_steps=1", "data.limit=16",
        "ppo.per_device_train_batch_size=8", "ppo.response_length=4", "data.eval_limit=8", "eval.prompts=0",
        "run_dir=run",
    )  # fmt: skip
    assert failed.code == 1
    said = " ".join(failed.err.split())
    assert "the reward function `unforeseen` raised ZeroDivisionError: division by zero" in said
    assert re.search(r"rewards.py, line 2\), for a completion of row \d+, \"\w", said), said
    assert "Traceback" not in said
    log = next((tmp_path / "run" / "ppo" / "logs" / "attempt_1").glob("*.log")).read_text()
    assert "in unforeseen" in log


def test_without_held_out_rows_it_says_so(tmp_path, alignctl, shared_data):
    rows = [{"prompt": "Once", "chosen": " upon a time", "rejected": " never"}] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = (
        "train", "recipe=dpo_local", f"model.path={shared_data / 'models/stories260K'}", "data.path=rows.jsonl",
        "dpo.max_steps=1", "run_dir=run",
    )  # fmt: skip
    planned = alignctl(*arguments, "--dry-run")
    assert "up to 256 of its rows" in planned.out
    assert "state         new" in planned.out
    done = alignctl(*arguments)
    assert done.code == 0, done.err
    assert "no held-out rows, so nothing was measured" in done.out
    assert "state         done" in alignctl(*arguments, "--dry-run").out
    assert not (tmp_path / "run" / "dpo" / "checkpoints" / "README.md").exists()


def test_a_mistake_only_the_worker_can_see_is_a_clear_message(tmp_path, alignctl, shared_data):
    done = alignctl(
        "train", "recipe=dpo_local", f"model.path={shared_data / 'models/stories260K'}",
        f"data.path={shared_data / 'preference/hh_harmless_base/test.jsonl'}", "dpo.max_length=4096",
    )  # fmt: skip
    assert done.code == 2
    assert "`dpo.max_length=4096` is longer than the model can see: 512 tokens" in done.err
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_sweep_runs_every_point_and_compares(tmp_path, alignctl):
    """The stage in which the points do not differ runs once."""
    words = (*SMALL, "eval.prompts=0", "sft.max_steps=4", "dpo.max_steps=2", "dpo.logging_steps=1")
    done = alignctl("train", *words, "dpo.beta=0.05,0.1", "-m")
    assert done.code == 0, done.err
    assert (done.err.count("sft: starts"), done.err.count("dpo: starts")) == (1, 2)
    assert "sweep" in done.out
    assert "dpo.beta=0.05" in done.out
    assert "dpo.beta=0.1" in done.out
    points = sorted((tmp_path / "runs" / "quickstart").iterdir())
    assert len(points) == 2
    plans = [json.loads((point / "plan.json").read_text()) for point in points]
    assert sorted(plan["stages"][1]["config"]["trainer"]["beta"] for plan in plans) == [0.05, 0.1]
    one, other = points
    assert weights(one / "sft" / "model") == weights(other / "sft" / "model")
    assert metrics(one / "dpo") != metrics(other / "dpo")
    shutil.copytree(tmp_path / "runs", tmp_path / "moved", symlinks=True)
    moved = [tmp_path / "moved" / point.relative_to(tmp_path / "runs") / "sft" / "result.json" for point in points]
    assert all(file.exists() for file in moved), "links are within the folder of runs"


@pytest.mark.slow
def test_real_pairs_on_a_real_checkpoint(tmp_path, alignctl, shared_data):
    from transformers import AutoModelForCausalLM

    pairs = shared_data / "preference" / "hh_harmless_base"
    done = alignctl(
        "train", "recipe=dpo_local", f"model.path={shared_data / 'models/stories260K'}",
        f"data.path={pairs / 'train.jsonl'}", f"data.eval_path={pairs / 'test.jsonl'}", "data.limit=128",
        "data.eval_limit=200", "eval.prompts=4", "eval.max_new_tokens=16", "dpo.learning_rate=2e-3", "dpo.beta=0.05",
        "data.max_lost=0.5", "dpo.max_length=128", "dpo.num_train_epochs=4", "run_dir=run", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    stage = json.loads(done.out)["stages"]["dpo"]
    assert stage["rows"]["train"]["read"] == 128
    assert stage["rows"]["train"]["skipped_rows"] == [65]
    assert stage["rows"]["eval"]["read"] == 200
    assert 0 < stage["before"]["preference_accuracy"] < 1
    assert stage["after"]["preference_accuracy"] != stage["before"]["preference_accuracy"]
    assert stage["after"]["reward_accuracy"] > 0.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "dpo" / "model")
    assert sum(p.numel() for p in model.parameters()) == 260_032


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_though_it_is_not_the_last(tmp_path, alignctl):
    """The worst loss counts as the best here, so the best checkpoint is the first, which rotation must spare."""
    done = alignctl(
        "train", *SFT, "run_dir=run", "sft.eval_strategy=steps", "sft.eval_steps=5", "sft.load_best_model_at_end=true",
        "sft.metric_for_best_model=eval_loss", "sft.greater_is_better=true",
    )  # fmt: skip
    assert done.code == 0, done.err
    stage = tmp_path / "run" / "sft"
    left = sorted(path.name for path in (stage / "checkpoints").glob("checkpoint-*"))
    assert left == ["checkpoint-20", "checkpoint-24", "checkpoint-5"]
    assert weights(stage / "model") == weights(stage / "checkpoints" / "checkpoint-5")
    state = json.loads((stage / "checkpoints" / "checkpoint-24" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(stage / "checkpoints" / "checkpoint-5")


def test_a_stage_tells_what_it_does_with_the_rows(tmp_path, alignctl):
    done = alignctl(
        "train", "recipe=sft_kto_quickstart", *SMALL[1:], "stages=[kto]", "kto.from=null", "kto.max_steps=2",
        "kto.undesirable_weight=3", "run_dir=run",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "kto: 192 pairs are taken apart into 384 labelled completions" in done.err
    assert "kto: 192 wanted and 192 unwanted completions" in done.err
    assert "wanted ones weigh 0.33 times as much" in done.err


def test_too_many_lost_rows_end_the_run_before_it_trains(tmp_path, alignctl, shared_data):
    pairs = shared_data / "preference" / "hh_harmless_base" / "train.jsonl"
    done = alignctl(
        "train", "recipe=dpo_local", f"model.path={shared_data / 'models' / 'stories260K'}", f"data.path={pairs}",
        "data.limit=100", "dpo.truncation_mode=keep_start", "dpo.max_length=256", "run_dir=run",
    )  # fmt: skip
    assert done.code == 2
    assert re.search(r"error: stage `dpo`: \d+ of \d+ training rows \(\d+ %\) are lost", done.err), done.err
    assert re.search(r"50 % of the rows have up to \d+, .*hint: .*`dpo.max_length=\d+`", done.err, re.DOTALL)
    assert not (tmp_path / "run" / "dpo" / "checkpoints" / "checkpoint-1").exists()


def test_a_run_is_watched_cancelled_and_resumed_by_its_folder(alignctl, tmp_path):
    """From another terminal, so to speak; `resume` needs no recipe."""
    long = (*SFT, "sft.num_train_epochs=80")
    alone = start(tmp_path, *long, "run_dir=alone")
    run = start(tmp_path, *long, "run_dir=run")
    wait_for_step(tmp_path / "run" / "sft", 4, run)
    now = json.loads(alignctl("status", "run", "--json").out)
    assert now["state"] == "running"
    assert now["stages"]["sft"]["step"] >= 4
    assert re.search(r"^sft +running +\d+/\d+ +\d", alignctl("status", "run").out, re.MULTILINE)
    assert alignctl("cancel", "run").code == 0
    finish(run, 75)
    assert re.search(r"^sft +stopped .*step \d+ is saved$", alignctl("status", "run").out, re.MULTILINE)
    assert alignctl("cancel", "run").code == 3
    done = alignctl("resume", "run")
    assert done.code == 0, done.err
    assert "sft: continues after step" in done.err
    assert "train_runtime" in alignctl("logs", "run").out
    finish(alone)
    watched, undisturbed = (tmp_path / name / "sft" for name in ("run", "alone"))
    assert weights(watched / "model") == weights(undisturbed / "model")
    assert [row["step"] for row in metrics(watched)] == [row["step"] for row in metrics(undisturbed)]
    (tmp_path / "runs").mkdir()
    (tmp_path / "run").rename(tmp_path / "runs" / "one")
    assert re.search(r"^runs/one +done +sft ", alignctl("status", "--all").out, re.MULTILINE)
    nothing = alignctl("status", "elsewhere")
    assert nothing.code == 2
    assert "is not a run directory" in nothing.err
