"""Rewards over HTTP: what is sent, and what is made of the answers."""

from __future__ import annotations

import pytest
from support.reward_server import serve_json

from alignctl.errors import AlignctlError, RequestError
from alignctl.rollout.episodes import Episodes, Segment
from alignctl.rollout.judging import JudgeReward, ServerReward, grade
from alignctl.rollout.rewards import load_function, score
from alignctl.rollout.scoring import build_sources
from alignctl.rollout.servers import Chat, Server
from alignctl.rollout.settings import RewardSettings

pytestmark = pytest.mark.train


def two(**given):
    """Two completions, of 2 and 3 tokens."""
    defaults = {"prompts": ["2 + 3?", "1 + 1?"], "completions": ["5", "3"], "columns": {"answer": [5, 2]}}
    segments = [[Segment([1, 2])], [Segment([1, 2, 3])]]
    return Episodes([[7], [8]], segments, [True, True], **defaults | given)


def test_a_server_is_sent_texts_and_rows_and_may_say_nothing():
    with serve_json(lambda path, body: [1, None]) as (url, asked):
        assert ServerReward(Server(url, 5, 0), "s")(two()) == [{1: 1.0}, {}]
    assert asked[0]["body"] == {
        "prompts": ["2 + 3?", "1 + 1?"], "completions": ["5", "3"], "rows": [{"answer": 5}, {"answer": 2}],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([1.0], "gave 1 numbers for 2 completions"),
        ([1.0, "good"], 'gave what is no number: good'),
        ([True, 1.0], "gave what is no number: true"),
        ({"scores": [1, 2]}, r'gave no list of numbers: {"scores": \[1, 2\]}'),
    ],
)  # fmt: skip
def test_other_answers_of_a_server_are_refused_with_what_was_seen(answer, said):
    with serve_json(lambda path, body: answer) as (url, _), pytest.raises(AlignctlError, match=said):
        ServerReward(Server(url, 5, 0), "s")(two())


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("fine.\nScore: 7", 7),
        ("Score: 3? No.\n**Score:** 8.5", 8.5),
        ("4", 4),
        ("great", None),
        ("nan", None),
        ("Score: -3", -3),
        ("Score: +2", 2),
        ("score .5", 0.5),
        ("Score = 7/10", 7),
    ],
)
def test_a_grade_is_the_last_that_is_said(answer, number):
    assert grade(answer) == number


def test_a_judge_is_asked_about_each_completion(tmp_path):
    def answer(path, body):
        question = body["messages"][0]["content"]
        return {"choices": [{"message": {"content": "Score: 1" if "said 5, right 5" in question else "hm"}}]}

    with serve_json(answer) as (url, _):
        chat = Chat(Server(url, 5, 0), "m", 0.0, 8, folder=tmp_path)
        judge = JudgeReward(chat, "{prompt} said {completion}, right {answer}", 2, "judge")
        judge.check_columns(["answer"])
        assert judge(two()) == [{1: 1.0}, {}]
        with pytest.raises(AlignctlError, match="`judge` graded none of 2 completions; it said: hm"):
            judge(two(completions=["4", "3"]))
    with pytest.raises(RequestError, match="has `{answer}`, which is no column"):
        judge.check_columns(["solution"])


def test_a_judge_is_asked_the_same_once(tmp_path):
    with serve_json(lambda path, body: {"choices": [{"message": {"content": "Score: 4"}}]}) as (url, asked):
        judge = JudgeReward(Chat(Server(url, 5, 0), "m", 0.0, 8, folder=tmp_path), "{completion}", 4, "judge")
        alike = two(prompts=["2 + 3?"] * 2, completions=["5"] * 2)
        assert judge(alike) == [{1: 4.0}, {2: 4.0}]
    assert len(asked) == 1


def test_what_an_entry_says_is_what_scores():
    entries = ["exact_match", {"numeric": "result", "name": "close"}, {"length_penalty": 3, "buffer": 2},
               {"judge": "http://a/v1", "model": "m"}, "https://b/quality"]  # fmt: skip
    settings = RewardSettings(reward_funcs=entries, reward_workers=2)
    sources = build_sources(settings, None, ["answer", "result"], None, None, conversations=False, max_tokens=8)
    assert [source.name for source in sources] == ["exact_match", "close", "length_penalty", "judge", "quality"]
    episodes = two(columns={"answer": ["5", "2"], "result": [4, 3]})
    assert score(sources[:3], episodes) == {
        "exact_match": [{1: 1.0}, {2: 0.0}], "close": [{1: 0.0}, {2: 1.0}], "length_penalty": [{1: -0.5}, {2: -1.0}],
    }  # fmt: skip
    with pytest.raises(RequestError, match="`exact_match` asks for `answer`"):
        build_sources(settings, None, ["result"], None, None, conversations=False, max_tokens=8)


def test_a_function_that_fails_is_told_with_the_row(tmp_path):
    (tmp_path / "rewards.py").write_text(
        "def f(completions):\n    return [1 / (int(one) - 3) for one in completions]\n"
    )
    function = load_function(f"{tmp_path / 'rewards.py'}:f")
    with pytest.raises(AlignctlError, match=r"`f` raised ZeroDivision.*, for a completion of row 41, \"1 \+ 1\?\""):
        function(two(row_numbers=[17, 41]))
