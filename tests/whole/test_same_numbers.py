"""However a global batch is divided among processes, passes and shards, training is the same.

From where users start: a pretrained model, and held-out rows that are measured before and after.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cells import CASES, STEPS, job
from support.daily import of_today
from support.many import differ, outcome, run_many

from alignctl.methods.registry import methods

pytestmark = [pytest.mark.train, pytest.mark.slow]

# Per device, accumulation, and how the processes work together: 8 rows an optimizer step, always.
ALONE = (8, 1, "none")
DIVIDED = [
    (4, 1, "ddp"),
    (2, 2, "ddp"),
    (4, 1, "zero1"),
    (4, 1, "zero2"),
    (2, 2, "zero2"),
    (4, 1, "zero3"),
    (2, 2, "zero3"),
    (4, 2, "none"),
]


def pairs() -> list[tuple[tuple, tuple]]:
    """Cases, each with its adapter and engine, and divisions of the batch to look at."""
    found = []
    for case, peft in ((case, peft) for case in CASES for peft in ("none", "lora")):
        for number, division in enumerate(DIVIDED):
            drawn = methods()[CASES[case][0]].data_kind == "prompts"  # mini-batches of which are divided by tokens
            if division[1] > 1 and drawn:
                continue
            found.append(((case, peft, "padded" if number in (0, 5) and case == "dpo" else "auto"), division))
    return found


# Whose gradients once were not averaged, or whose completions were drawn without the adapter, always; of a third of
# the cases one more, another one each day; the rest at night, a part of it each.
ALWAYS = [
    (("sft", "none", "auto"), DIVIDED[0]),
    (("kto, no estimate", "lora", "auto"), DIVIDED[0]),
    (("ppo", "lora", "auto"), (4, 1, "zero3")),
]
ALL = pairs()
OF_EACH = [[pair for pair in ALL if pair[0][0] == case] for case in CASES]
DAY = list(dict.fromkeys(ALWAYS + of_today([one[int(time.strftime("%j")) % len(one)] for one in OF_EACH], 3)))
NIGHT = of_today([pair for pair in ALL if pair not in DAY], 7)
LANES = {"day": DAY, "night": NIGHT}
CONTINUED = ("sft", "lora", "auto"), (4, 1, "ddp")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, shared_data):
    """Gives what came of all pairs of a lane, of what they are compared with, and of the continued run."""
    made: dict[str, dict] = {}

    def of(lane: str) -> dict:
        if lane not in made:
            made[lane] = train(tmp_path_factory.mktemp(lane), shared_data, LANES[lane])
        return made[lane]

    return of


def train(folder: Path, shared_data: Path, pairs: list[tuple[tuple, tuple]]) -> dict:
    wanted = dict.fromkeys([*pairs, CONTINUED, *((case, ALONE) for case, _ in pairs)])
    jobs = {(case, how): job(folder, shared_data, case, how) for case, how in wanted}
    again = {"run_dir": jobs[CONTINUED]["run_dir"] + "-again", "arguments": jobs[CONTINUED]["arguments"]}
    jobs["continued"] = again | {"continues": jobs[CONTINUED]["run_dir"]}
    run_many(folder, [one for key, one in jobs.items() if key != "continued" and key[1][2] == "none"], 1)
    run_many(folder, [one for key, one in jobs.items() if key == "continued" or key[1][2] != "none"], 2)
    return {key: outcome(one["run_dir"]) for key, one in jobs.items()}


def test_every_method_is_here():
    assert {method for method, _ in CASES.values()} == set(methods())


def lanes() -> Iterator:
    for lane, pairs in LANES.items():
        for case, how in pairs:
            marks = [pytest.mark.night] if lane == "night" else []
            yield pytest.param(lane, case, how, marks=marks, id="-".join(map(str, (*case, *how))))


@pytest.mark.parametrize(("lane", "case", "how"), lanes())
def test_losses_and_weights_are_the_same(outcomes, lane, case, how):
    found = outcomes(lane)
    losses, weights = found[case, how]
    expected_losses, expected = found[case, ALONE]
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected_losses, rel=2e-5, abs=1e-6)
    assert differ(weights, expected) < 1e-4


def test_a_run_that_is_continued_is_the_same(outcomes):
    losses, weights = outcomes("day")["continued"]
    expected_losses, expected = outcomes("day")[CONTINUED]
    assert losses == expected_losses
    assert (weights == expected).all()
