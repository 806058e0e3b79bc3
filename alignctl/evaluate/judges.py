"""The table of judges: who can say whether an answer is right and in the wanted manner. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from alignctl.data import quickstart

Judge = Callable[[str, str], quickstart.Verdict]
"""Takes the text of a prompt's last user message, and a completion."""

JUDGES: dict[str | None, Judge] = {"quickstart": quickstart.judge}


def win_rate(judge: Judge, prompts: Sequence[str], candidate: Sequence[str], baseline: Sequence[str]) -> float:
    """Share of prompts on which the candidate's answer scores higher than the baseline's; a tie counts half."""
    points = 0.0
    for prompt, ours, theirs in zip(prompts, candidate, baseline, strict=True):
        our_score, their_score = judge(prompt, ours).score, judge(prompt, theirs).score
        points += 1.0 if our_score > their_score else 0.5 if our_score == their_score else 0.0
    return points / len(prompts)
