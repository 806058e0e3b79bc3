"""Rows of several sources, held-out sets by name and lists of completions: two processes make of them what one does."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.files import metrics, read, write_rows
from support.many import run_many

pytestmark = [pytest.mark.train, pytest.mark.slow, pytest.mark.night]

CASES = ("sets", "mixture", "lists")
COMPARED = ("loss", "grad_norm", "learning_rate")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shared_data):
    """The stage of each case, in one process and in two, with the same 8 rows an optimizer step."""
    folder = tmp_path_factory.mktemp("rows")
    pairs = shared_data / "preference" / "llms_from_scratch_pref"
    some = read(pairs / "train.jsonl")[:60]
    odd = write_rows(folder / "odd.jsonl", some[1::2])
    lists = write_rows(folder / "lists.jsonl", [in_a_list(row, more=i % 3) for i, row in enumerate(some[:24])])
    first, second = (write_rows(folder / f"{i}.jsonl", read(pairs / "test.jsonl")[i::20]) for i in range(2))
    given = {
        "sets": ("dpo", f"data.path={odd}", f"data.eval={{first: {first}, second: {second}}}", "eval.prompts=0"),
        "mixture": (
            "dpo", "data.path=null", f"data.mix=[{{path: {odd}, weight: 2}}, {{path: {pairs}/train.jsonl, weight: 1}}]",
            "data.mix_by=tokens", "data.eval_rows=7", "eval.prompts=0",
        ),
        "lists": ("reward", f"data.path={lists}", "data.eval_rows=0.2"),
    }  # fmt: skip
    made = {}
    for processes in (1, 2):
        jobs = []
        for case, (method, *more) in given.items():
            stage = "rm" if method == "reward" else method
            fields = {
                "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-4, "warmup_steps": 0, "max_length": 256,
                "per_device_train_batch_size": 8 // processes, "eval_strategy": "steps", "eval_steps": 2,
            }  # fmt: skip
            arguments = [
                f"recipe={method}_local", f"model.path={shared_data / 'models' / 'stories260K'}", "rehearse=false",
                f"launcher.processes={processes}", f"distributed={'ddp' if processes > 1 else 'none'}",
                *more, *(f"{stage}.{key}={value}" for key, value in fields.items()),
            ]  # fmt: skip
            run_dir = folder / f"{case}_{processes}"
            jobs.append({"run_dir": str(run_dir), "arguments": arguments})
            made[case, processes] = run_dir / stage
        run_many(folder, jobs, processes)
    return made


def in_a_list(row: dict, more: int) -> dict:
    """Two to four completions of a prompt, with scores."""
    completions = [row["chosen"], row["rejected"], *("I do not know." + " Really." * i for i in range(more))]
    return {"prompt": row["instruction"], "completions": completions, "scores": list(range(len(completions), 0, -1))}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_held_out_numbers_are_those_of_one_process(runs, case):
    one, two = (numbers(runs[case, processes]) for processes in (1, 2))
    assert two == pytest.approx(one, rel=1e-5, abs=1e-5)
    assert {"step 1: loss", "step 2: loss", "step 3: loss", "step 2: eval_loss"} <= set(one)
    assert case != "sets" or {"after: first_loss", "after: second_loss"} <= set(one)
    ledgers = [read(runs[case, processes] / "data.json") for processes in (1, 2)]
    assert ledgers[0] == ledgers[1]


def numbers(stage: Path) -> dict[str, float]:
    """What was logged of steps, and all that was measured on held-out rows."""
    found = {}
    for row in metrics(stage):
        wanted = [key for key in row if key in COMPARED or key.startswith("eval_")]
        found |= {f"step {row['step']}: {key}": row[key] for key in wanted if not timed(key)}
    result = read(stage / "result.json")
    measured = {part: result.get(part) or {} for part in ("before", "after")}
    return found | {f"{part}: {key}": value for part, values in measured.items() for key, value in values.items()}


def timed(key: str) -> bool:
    return key.endswith(("runtime", "per_second"))
