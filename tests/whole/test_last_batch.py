"""Rows that do not fill the last batches, in training and held out: all that is logged is the same on any number of
processes, some of which have no row of the last step."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cells import CASES, job
from support.daily import of_today
from support.files import metrics
from support.many import run_many
from support.methods import METHODS

pytestmark = [pytest.mark.train, pytest.mark.slow, pytest.mark.night, pytest.mark.spread(2, by_file=True)]

GLOBAL_BATCH = 8
# Rows: trained on, held out; and numbers of processes, each with an equal part of a batch. Pairs of KTO are two rows.
LANES = {
    "few": (19, 5, (1, 4), of_today(["sft", "kto", "dpo and sft", "reward"], 3)),
    "many": (203, 13, (1, 2, 4, 8), of_today([case for case in CASES if METHODS[CASES[case][0]].local], 9)),
}
SPEED = ("epoch", "runtime", "per_second", "per_s/", "step_time")


def jobs(folder: Path, shared_data: Path, lane: str) -> dict[int, list[dict]]:
    rows, held, counts, cases = LANES[lane]
    made: dict[int, list[dict]] = {count: [] for count in counts}
    for case in cases:
        for count in counts:
            size = GLOBAL_BATCH // count
            one = job(folder, shared_data, (case, "none", "auto"), (size, 1, "ddp" if count > 1 else "none"))
            given = {
                "max_steps": -1, "eval_strategy": "epoch", "save_strategy": "no", "learning_rate": 1e-4,
            }  # fmt: skip
            one["arguments"] += [
                f"data.limit={rows + held}", f"data.eval_rows={held}", "eval.prompts=0", "eval.batch_size=2",
                "rehearse=false", *(f"cell.{key}={value}" for key, value in given.items()),
                *([f"launcher.processes={count}"] if count > 1 else []),
            ]  # fmt: skip
            made[count].append(one | {"case": case})
    return made


@pytest.fixture(scope="module")
def logs(tmp_path_factory, shared_data):
    """Gives, for the cases with few rows or with many, what was logged on each number of processes."""
    made: dict[str, dict] = {}

    def of(lane: str) -> dict[str, dict[int, list[dict]]]:
        if lane not in made:
            folder = tmp_path_factory.mktemp(lane)
            by_count = jobs(folder, shared_data, lane)
            for count, some in by_count.items():
                run_many(folder, some, count)
            made[lane] = {
                case: {count: metrics(Path(some[index]["run_dir"], "cell")) for count, some in by_count.items()}
                for index, case in enumerate(LANES[lane][-1])
            }
        return made[lane]

    return of


PARAMS = [(lane, case) for lane, (*_, cases) in LANES.items() for case in cases]


@pytest.mark.parametrize(("lane", "case"), PARAMS)
def test_all_that_is_logged_is_the_same(logs, lane, case):
    alone, *others = logs(lane)[case].values()
    assert all({"num_tokens", "eval_num_tokens"} & row.keys() for row in alone)
    assert sum("loss" in row for row in alone) > 2
    for found in others:
        assert len(found) == len(alone)
        for row, expected in zip(found, alone, strict=True):
            assert row.keys() == expected.keys()
            for name, value in expected.items():
                if any(part in name for part in SPEED):
                    continue
                if name in ("loss", "eval_loss"):
                    assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
                elif "num_" in name or name == "step":
                    assert row[name] == value, name
                else:  # rewards are differences of sums of float32, which later steps multiply
                    assert row[name] == pytest.approx(value, rel=1e-4, abs=2e-4), name


def test_a_rollout_is_the_same_however_it_is_divided(tmp_path, shared_data):
    """11 prompts in rollouts of 8, of the last of which the second of two processes has none. What is drawn at
    temperature 1 is, too, to the token; rewards of three digits are divided by a running deviation."""
    jobs = {}
    for processes, size in ((1, 8), (2, 4)):
        one = job(tmp_path, shared_data, ("ppo", "none", "auto"), (size, 1, "none" if processes == 1 else "ddp"))
        one["arguments"] += [
            "data.limit=11", "data.eval_rows=0", "eval.prompts=0", "rehearse=false", "cell.max_steps=-1",
            "cell.save_strategy=no", "cell.num_mini_batches=2", "cell.normalize_rewards=running",
            "cell.max_prompt_length=480", "cell.dataloader_drop_last=false", "cell.learning_rate=1e-5",
        ]  # fmt: skip
        run_many(tmp_path, [one], processes)
        jobs[processes] = metrics(Path(one["run_dir"], "cell"))
    for found, expected in zip(jobs[2], jobs[1], strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if not any(part in name for part in SPEED):
                assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    first, last = jobs[2]
    assert first["num_tokens"] == pytest.approx(8 * first["completion_length"])
    assert last["num_tokens"] - first["num_tokens"] == pytest.approx(3 * last["completion_length"])
