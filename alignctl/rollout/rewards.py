"""Scores of completions: from a reward model, from functions, or from several of them. Servers and judges are in
judging.py."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedTokenizerBase

from alignctl.data.messages import is_messages
from alignctl.data.tokenizing import tokenize_completions
from alignctl.engine.rewards import sequence_scores
from alignctl.errors import AlignctlError, NotANumber, RequestError
from alignctl.models.loading import longest_seen
from alignctl.rollout.episodes import Episodes
from alignctl.rollout.functions import FunctionFailed, ProcessFunction

RewardFunction = Callable[..., Sequence[float | None]]
Score = dict[int, float]
"""Of a completion: numbers for what ends with some of its tokens, by the place of the token. A number for the whole
stands at the last one; a completion without a score has no number."""
_GIVEN = ("prompts", "completions", "completion_ids")
_SHOWN = 60  # characters of a prompt
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class RewardSource(Protocol):
    """Scores completions."""

    name: str
    """What its scores are logged as."""

    def __call__(self, episodes: Episodes) -> list[Score]: ...


@dataclass
class RewardModel:
    """A sequence classifier as a source of rewards.

    Of a text that is longer than it can see it is given the end: the start of the prompt is left out.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    """The model's own: where it differs from the policy's, it is given the text, tokenised anew."""
    policy_tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    name: str = "reward_model"
    cut_frac: float = 0.0
    """Of the texts given last, those that were cut."""

    @cached_property
    def same_tokens(self) -> bool:
        """Whether it is given the policy's tokens as they are."""
        one, other = self.tokenizer, self.policy_tokenizer
        return one.get_vocab() == other.get_vocab() and one.chat_template == other.chat_template

    def __call__(self, episodes: Episodes) -> list[Score]:
        if self.same_tokens:
            prompts, completions = episodes.prompt_ids, self._as_trained_on(episodes)
        else:
            prompts, completions = self._tokenize(episodes)
        prompts, completions = self._cut(prompts, completions)
        longest = max(len(prompt) + len(ids) for prompt, ids in zip(prompts, completions, strict=True))
        scores = sequence_scores(self.model, prompts, completions, max(1, self.max_tokens // longest))
        return at_the_end(scores, episodes)

    def _cut(self, prompts: list[list[int]], completions: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        limit = longest_seen(self.model) or math.inf
        over = [max(len(p) + len(c) - limit, 0) for p, c in zip(prompts, completions, strict=True)]
        self.cut_frac = sum(map(bool, over)) / len(over)
        return (
            [prompt[cut:] for prompt, cut in zip(prompts, over, strict=True)],
            [ids[max(cut - len(p), 0) :] for p, ids, cut in zip(prompts, completions, over, strict=True)],
        )

    def _as_trained_on(self, episodes: Episodes) -> list[list[int]]:
        """Completions with what a chat template writes after the token that ends them, a line break for instance."""
        after_end = _after_end(self.tokenizer) if is_messages(episodes.prompts[0]) else []
        return [
            [*ids, *after_end] if ended else ids
            for ids, ended in zip(episodes.completion_ids, episodes.ended, strict=True)
        ]

    def _tokenize(self, episodes: Episodes) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts and completions as the model was trained on them; one that was cut off gets no end."""
        prompts, completions = [], []
        for given, drawn, ended in zip(episodes.prompts, episodes.completions, episodes.ended, strict=True):
            prompt, (completion,) = tokenize_completions(self.tokenizer, given, [drawn])
            end = self.tokenizer.eos_token_id
            if not ended and end in completion:
                completion = completion[: len(completion) - 1 - completion[::-1].index(end)]
            prompts.append(prompt)
            completions.append(completion)
        return prompts, completions


@dataclass(frozen=True)
class FunctionReward:
    """A function as a source of rewards."""

    function: RewardFunction
    name: str
    columns: Mapping[str, str] = field(default_factory=dict)
    """Of the rows, by the arguments that they are, where those have another name."""

    def check_columns(self, columns: Sequence[str]) -> None:
        """Whether the rows have what the function asks for.

        Raises:
            RequestError: They have not.
        """
        parameters = inspect.signature(self.function).parameters.values()
        needed = [self.columns.get(p.name, p.name) for p in parameters if p.kind in _BY_NAME and p.default is p.empty]
        missing = [f"`{name}`" for name in needed if name not in {*columns, *_GIVEN}]
        if missing:
            found = ", ".join(f"`{name}`" for name in columns)
            raise RequestError(
                f"the reward function `{self.name}` asks for {', '.join(missing)}, which the rows do not have",
                f"beside `prompts` and `completions` there {f'are their columns {found}' if found else 'is nothing'}",
            )

    def __call__(self, episodes: Episodes) -> list[Score]:
        try:
            if isinstance(self.function, ProcessFunction):
                rewards = self.function(episodes.groups, **self._given(episodes))
            else:
                rewards = self.function(**self._given(episodes))
        except FunctionFailed as error:
            where = "" if error.member is None else f", for a completion of {named_row(episodes, error.member)}"
            raise AlignctlError(
                f"the reward function `{self.name}` {error.message}{where}", "what it printed is in the stage's logs"
            ) from error
        if len(rewards) != (count := len(episodes.completions)):
            raise AlignctlError(f"the reward function {self.name} gave {len(rewards)} numbers for {count} completions")
        return at_the_end(rewards, episodes)

    def _given(self, episodes: Episodes) -> dict[str, Any]:
        """What the function asks for: by name, or all columns; token ids by name alone, since few read them."""
        given = {**episodes.columns, "prompts": episodes.prompts, "completions": episodes.completions}
        parameters = inspect.signature(self.function).parameters
        if "completion_ids" in parameters:
            given["completion_ids"] = episodes.completion_ids
        given |= {argument: episodes.columns[column] for argument, column in self.columns.items()}
        if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
            given = {name: value for name, value in given.items() if name in parameters}
        return given


def load_function(
    target: str, name: str | None = None, columns: Mapping[str, str] | None = None, **how: Any
) -> FunctionReward:
    """The function that `module:name` or `file.py:name` says, in processes of its own.

    Args:
        name: What its scores are logged as, where that is not its own.
        how: Its processes, its time and its settings, as ProcessFunction takes them.

    Raises:
        RequestError: There is none.
    """
    return FunctionReward(ProcessFunction(target, **how), name or target.rpartition(":")[2], columns or {})


def named_row(episodes: Episodes, member: int) -> str:
    """The row of a completion, for people: its place among the rows, and how its prompt begins."""
    prompt = episodes.prompts[member]
    text = " ".join((prompt[-1]["content"] if is_messages(prompt) else prompt).split())
    number = f"row {episodes.row_numbers[member]:,}" if episodes.row_numbers else f"prompt {member + 1}"
    return f'{number}, "{text[:_SHOWN]}{"..." if len(text) > _SHOWN else ""}"'


def at_the_end(values: Iterable[float | None], episodes: Episodes) -> list[Score]:
    """A number for each completion as a whole, or none."""
    return [
        {} if value is None else {len(ids) - 1: float(value)}
        for value, ids in zip(values, episodes.completion_ids, strict=True)
    ]


def totals(scores: Sequence[Score]) -> list[float]:
    """What each completion is worth in all; 0 without a score."""
    return [sum(score.values()) for score in scores]


def of_scored(scores: Sequence[Score]) -> list[float]:
    """What each completion that has a score is worth in all."""
    return [sum(score.values()) for score in scores if score]


def score(sources: Sequence[RewardSource], episodes: Episodes) -> dict[str, list[Score]]:
    """Scores by each source, by its name. Functions, servers and judges work while reward models compute.

    Raises:
        NotANumber: One of them is not.
        AlignctlError: A source does not score.
    """
    elsewhere = [source for source in sources if not isinstance(source, RewardModel)]
    with ThreadPoolExecutor(max(len(elsewhere), 1)) as pool:
        asked = {source.name: pool.submit(source, episodes) for source in elsewhere}
        here = {source.name: source(episodes) for source in sources if isinstance(source, RewardModel)}
        found = here | {name: one.result() for name, one in asked.items()}
    rewards = {source.name: found[source.name] for source in sources}
    for name, scores in rewards.items():
        wrong = next((number for number, total in enumerate(totals(scores)) if not math.isfinite(total)), None)
        if wrong is not None:
            where = named_row(episodes, wrong)
            raise NotANumber(
                f"{name} gave a reward that is not a number for a completion of {where}; training cannot go on with it"
            )
    return rewards


@dataclass
class Moments:
    """Mean and deviation of all values seen, kept up to date batch by batch (Chan et al. 1983, Eq. 2.1)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = field(default=0.0)
    """Sum of the squared distances from the mean."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Moments:
        """Those of some values."""
        count = len(values)
        mean = sum(values) / count if count else 0.0
        return cls(float(count), mean, sum((value - mean) ** 2 for value in values))

    def add(self, others: Moments) -> None:
        """Takes in those of other values."""
        if not others.count:
            return
        total, distance = self.count + others.count, others.mean - self.mean
        self.squares += others.squares + distance**2 * self.count * others.count / total
        self.mean += distance * others.count / total
        self.count = total

    @property
    def std(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else 0.0


def combine(
    rewards: Mapping[str, Sequence[Score]],
    weights: Sequence[float],
    moments: Mapping[str, tuple[float, float]],
    clip: float | None,
) -> list[Score]:
    """One score for each completion: at each of its tokens the weighted sum of what the sources say, each number
    normalised and clipped.

    Args:
        moments: Mean and deviation of the sources that are to be normalised.
    """
    combined: list[Score] = [{} for _ in next(iter(rewards.values()))]
    for weight, (name, scores) in zip(weights, rewards.items(), strict=True):
        mean, std = moments.get(name, (0.0, 1.0))
        for whole, score in zip(combined, scores, strict=True):
            for token, value in score.items():
                scaled = (value - mean) / max(std, 1e-6)
                clipped = scaled if clip is None else min(max(scaled, -clip), clip)
                whole[token] = whole.get(token, 0.0) + weight * clipped
    return combined


def _after_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that the chat template writes after the end token of an answer."""
    prompt, answer = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    _, (completion,) = tokenize_completions(tokenizer, prompt, [answer])
    end = tokenizer.eos_token_id
    return completion[completion.index(end) + 1 :] if end in completion else []
