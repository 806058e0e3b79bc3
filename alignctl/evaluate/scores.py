"""Scores of drawn answers, by whatever scores completions while a policy learns from its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignctl.errors import AlignctlError, NotANumber, RequestError
from alignctl.evaluate.held_out import Questions
from alignctl.evaluate.sharing import shared_out
from alignctl.models.generation import end_tokens
from alignctl.rollout.drawing import as_drawn
from alignctl.rollout.episodes import episodes_of
from alignctl.rollout.rewards import totals
from alignctl.rollout.scoring import Scoring


def why_not_scored(scoring: Scoring, questions: Questions) -> str | None:
    """Why answers to some prompts cannot be scored: their rows lack a column that a source asks for."""
    try:
        scoring.check_columns(list(questions.columns))
    except RequestError as error:
        return error.problems[0].message
    return None


def scores_of_answers(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Questions,
    answers: Sequence[list[int]],
    scoring: Scoring,
) -> dict[str, list[float | None]]:
    """What each source says of each answer, by its name: as it says it, neither normalised nor clipped. None where it
    says nothing.

    Args:
        answers: Token ids, one for each question.

    Raises:
        ServerAway: A server or a judge did not answer.
        AlignctlError: A source does not score.
    """
    ends = end_tokens(policy, tokenizer)

    def ask(own: list[int]) -> list[dict[str, float | None]]:
        given, prompts = [questions.given[i] for i in own], [questions.prompts[i] for i in own]
        columns = {name: [values[i] for i in own] for name, values in questions.columns.items()}
        drawn = as_drawn([answers[i] for i in own], ends)
        episodes = episodes_of(given, prompts, drawn, tokenizer, columns, 1)
        if questions.numbers:
            episodes = replace(episodes, row_numbers=[questions.numbers[i] for i in own])
        try:
            found = scoring.ask(episodes)
        except NotANumber as error:  # says nothing about the model
            raise AlignctlError(error.problems[0].message, error.problems[0].hint) from error
        of_each = {
            name: [total if one else None for one, total in zip(scores, totals(scores), strict=True)]
            for name, scores in found.items()
        }
        return [{name: values[i] for name, values in of_each.items()} for i in range(len(own))]

    found = shared_out(policy, list(range(len(answers))), lambda i: len(questions.prompts[i]) + len(answers[i]), ask)
    return {name: [one[name] for one in found] for name in found[0]}
