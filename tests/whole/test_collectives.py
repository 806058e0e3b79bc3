"""How often the processes of a run ask each other for something in an optimizer step, beside their gradients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.cells import CASES, job
from support.daily import of_today

from alignctl.methods.registry import methods

pytestmark = pytest.mark.train

PROCESSES, MOST = 64, 3
OURS = ("everywhere.py:from_all", "base.py:add_up")
FAKE_RANKS = Path(__file__).parents[1] / "support" / "fake_ranks.py"
# Of each: the case, the accumulation, the adapter, and more settings.
DAY = [
    ("sft", 4, "none", ()),
    ("kto", 1, "lora", ()),
    ("dpo and sft", 1, "none", ()),
    ("reward", 1, "none", ()),
    ("ppo", 1, "none", ("cell.normalize_rewards=running", "cell.num_ppo_epochs=2", "cell.num_mini_batches=2")),
]
ALL = [(case, steps, peft, ()) for case in CASES for steps in (1, 4) for peft in ("none", "lora")]
DRAWN = [case for case, (name, _) in CASES.items() if methods()[name].data_kind == "prompts"]
NIGHT = of_today([one for one in ALL if one not in DAY and not (one[0] in DRAWN and one[1] > 1)], 4)
NIGHT.append(("dpo", 4, "none", ("cell.loss_type=[aot]",)))  # which keeps batches together


@pytest.fixture(scope="module")
def counted(tmp_path_factory, shared_data):
    """Gives the collectives of the third and the fourth step of each run of a lane."""
    made: dict[str, list] = {}

    def of(lane: str) -> list[list[dict[str, int]]]:
        if lane not in made:
            folder = tmp_path_factory.mktemp(lane)
            jobs = []
            for number, (case, steps, peft, more) in enumerate(DAY if lane == "day" else NIGHT):
                one = job(folder, shared_data, (case, peft, "auto"), (2, steps, "ddp"))
                one["run_dir"] += f"-{number}"
                one["arguments"] += [
                    f"launcher.processes={PROCESSES}", "data.limit=200", "data.eval_rows=0", "eval.prompts=0",
                    "rehearse=false", "cell.max_steps=6", "cell.save_strategy=no", *more,
                ]  # fmt: skip
                jobs.append(one)
            file = folder / "jobs.json"
            file.write_text(json.dumps(jobs))
            done = subprocess.run(
                [sys.executable, FAKE_RANKS, file, str(PROCESSES)], cwd=folder, capture_output=True, text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-4000:]
            made[lane] = [json.loads(line)["steps"] for line in Path(f"{file}.counts").read_text().splitlines()]
        return made[lane]

    return of


def lanes() -> list:
    ids = ["-".join(map(str, (case, steps, peft, *more))) for case, steps, peft, more in (*DAY, *NIGHT)]
    return [
        pytest.param(*place, id=name, marks=[pytest.mark.night] if place[0] == "night" else [])
        for place, name in zip(
            [*(("day", number) for number in range(len(DAY))), *(("night", number) for number in range(len(NIGHT)))],
            ids,
            strict=True,
        )
    ]


@pytest.mark.parametrize(("lane", "number"), lanes())
def test_few_a_step(counted, lane, number):
    steps = counted(lane)[number]
    assert len(steps) == 2
    for step in steps:
        assert 1 <= sum(step.values()) <= MOST, step
        assert all(name.endswith(OURS) for name in step), "nothing is asked beside it, as DDP does for unused weights"
