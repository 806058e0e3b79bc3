"""The generated world: the same every time, splits that share no prompt, a judge that agrees with the generator."""

import hashlib
import json
import random
import subprocess
import sys

import pytest

from alignctl.data import quickstart
from alignctl.data.quickstart import MANNERS, WANTED, build_world, demonstrations, judge, preferences, say


def digest(rows) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def test_rows_are_the_same_in_another_process():
    script = (
        "import hashlib, json; from alignctl.data.quickstart import *;"
        "print(hashlib.sha256(json.dumps([demonstrations('train'), preferences('test')]).encode()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={"PYTHONHASHSEED": "7"})
    assert other.stdout.strip() == digest([demonstrations("train"), preferences("test")])


def test_another_seed_is_another_world():
    assert digest(preferences("train", seed=1)) != digest(preferences("train", seed=2))


def test_splits_share_facts_but_no_prompt():
    world = build_world()
    assert len(world.train) > 3000
    assert len(world.test) > 250
    assert not world.train.keys() & world.test.keys()
    taught = {id(question) for question in world.train.values()}
    assert all(id(question) in taught for question in world.test.values())


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_cover_their_split(split):
    prompts = set(getattr(build_world(), split))
    for rows in (demonstrations(split), preferences(split)):
        assert {row["prompt"][0]["content"] for row in rows} == prompts


def test_demonstrations_mix_the_manners():
    texts = [row["completion"][0]["content"] for row in demonstrations("train")]
    prompts = [row["prompt"][0]["content"] for row in demonstrations("train")]
    verdicts = [judge(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    assert all(verdict.right for verdict in verdicts)
    assert 0.2 < sum(verdict.wanted_manner for verdict in verdicts) / len(verdicts) < 0.3


def test_chosen_always_beats_rejected():
    for row in preferences("train") + preferences("test"):
        prompt = row["prompt"][0]["content"]
        chosen, rejected = (judge(prompt, row[key][0]["content"]) for key in ("chosen", "rejected"))
        assert chosen.right
        assert chosen.wanted_manner
        assert rejected.score < chosen.score


@pytest.mark.parametrize("manner", MANNERS)
def test_the_judge_knows_every_manner_of_every_answer(manner):
    rng = random.Random(0)
    for prompt, question in build_world().test.items():
        for _ in range(3):
            verdict = judge(prompt, say(question.answer, manner, rng))
            assert verdict.right, (prompt, manner)
            assert verdict.wanted_manner == (manner == WANTED)


@pytest.mark.parametrize(
    ("completion", "right", "wanted"),
    [
        ("With pleasure! The answer is 5. Have a lovely day.", True, True),
        ("With pleasure! The answer is 6. Have a lovely day.", False, True),
        ("5", True, False),
        ("It is 5 or 6.", False, False),  # two answers are no answer
        ("With pleasure! The answer is 5. Have a", True, False),  # cut off
        ("With pleasure! The answer is 15. Have a lovely day.", False, True),
        ("", False, False),
    ],
)
def test_judge_by_hand(completion, right, wanted):
    verdict = judge("What is 2 plus 3?", completion)
    assert (verdict.right, verdict.wanted_manner) == (right, wanted)


def test_the_judge_refuses_prompts_of_other_worlds():
    with pytest.raises(KeyError):
        judge("What is love?", "Baby.")


def test_every_fact_has_one_answer_among_its_choices():
    for question in quickstart._questions(quickstart.WORLD_SEED):
        assert question.choices.count(question.answer) == 1
