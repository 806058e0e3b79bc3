"""Reward functions that are named: hand-made texts with what they are worth."""

from __future__ import annotations

import pytest

from alignctl.rollout.ready import boxed_math, exact_match, format, last_number, length_penalty, numeric, repetition


def said(text):
    return [{"role": "assistant", "content": text}]


def test_exact_match_of_texts_and_messages():
    assert exact_match([" yes\n", "Yes", "yes"], ["yes", "yes", None]) == [1.0, 0.0, None]
    assert exact_match([said("2 + 2 is\n#### 4"), said("4")], ["so #### 4", 4], after="####") == [1.0, 1.0]


@pytest.mark.parametrize(
    ("text", "number"),
    [("5-3", 3), ("it is -3.", -3), ("1,234.50.", 1234.5), ("2e3", 2000), ("none", None), ("3, 4", 4), (".5", 0.5),
     ("12,345,678", 12345678), ("-1,000", -1000), ("(5)-3", 3)],
)  # fmt: skip
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == number


def test_numbers_are_compared_as_numbers():
    found = numeric(["it is 72.0", said("72 or 73"), "nothing", "72.0001", "1"], ["#### 72", 72, 72, 72, "?"])
    assert found == [1.0, 0.0, 0.0, 0.0, None]
    assert numeric(["72.0001"], [72], tolerance=1e-4) == [1.0]
    assert numeric(["110", "111", "-0", "1e999"], [100, 100, 0, "1e999"], tolerance=0.1) == [1.0, 0.0, 1.0, 1.0]


def test_formulae_are_compared_by_what_they_are_worth():
    pytest.importorskip("math_verify", reason="comes with the extra `maths`")
    boxed = [r"so \boxed{\frac{1}{2}}", r"\boxed{0.5}", "1", r"\boxed{4} or \boxed{3}", r"\boxed{x^2+2x+1}"]
    assert boxed_math(boxed, ["1/2", r"\frac12", "1", "4", "(x+1)^2"]) == [1.0, 1.0, 0.0, 0.0, 1.0]
    assert boxed_math([r"\boxed{2", said(r"\boxed{2}")], ["2", "2"]) == [0.0, 1.0]
    assert boxed_math([r"\boxed{None}"], [None]) == [None]


def test_a_form_is_that_of_the_whole_completion():
    pattern = r"<think>.*</think>\s*\d+"
    assert format(["<think>a\nb</think> 4", "see <think></think> 4", said("4")], pattern) == [1.0, 0.0, 0.0]


def test_the_length_penalty_is_dapo_s():
    """As TRL's get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)."""
    lengths = [50, 80, 90, 100, 120]
    assert length_penalty([[0] * n for n in lengths], longest=100, buffer=20) == [0.0, 0.0, -0.5, -1.0, -1.0]


def test_the_length_penalty_is_trl_s():
    """get_soft_overlong_punishment(10, 4) says the same; GRPO's `soft_overlong_tokens` takes it, too."""
    lengths = (5, 6, 7, 9, 10, 12)
    assert length_penalty([[0] * n for n in lengths], longest=10, buffer=4) == [0.0, 0.0, -0.25, -0.75, -1.0, -1.0]


def test_repeated_groups_of_words_count_against_a_completion():
    assert repetition(["a b a B a b", "a b c d", "a"], size=2) == pytest.approx([2 / 5 - 1, 0.0, 0.0])
