"""Rewards that come over HTTP: from a server that scores, and from a language model that judges."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from string import Formatter
from typing import Any

from alignctl.data.messages import is_messages
from alignctl.errors import AlignctlError, RequestError
from alignctl.rollout.episodes import Episodes
from alignctl.rollout.rewards import Score, at_the_end
from alignctl.rollout.servers import Chat, Server

_GRADE = re.compile(r"score[^\w.+-]{0,6}([-+]?(?:\d+(?:\.\d+)?|\.\d+))", re.IGNORECASE)
_SHOWN = 200  # characters of an answer


@dataclass(frozen=True)
class ServerReward:
    """A server as a source of rewards: it is sent `prompts`, `completions` and `rows`, one of each for each completion,
    and answers with a list of as many numbers, or null where it has none."""

    server: Server
    name: str

    def __call__(self, episodes: Episodes) -> list[Score]:
        count = len(episodes.completions)
        rows = [{name: values[member] for name, values in episodes.columns.items()} for member in range(count)]
        who = f"the reward server {self.server.url}"
        found = self.server.post({"prompts": episodes.prompts, "completions": episodes.completions, "rows": rows})
        if not isinstance(found, list):
            raise AlignctlError(
                f"{who} gave no list of numbers: {_shown(found)}",
                "it answers with a JSON list, a number or null for each completion",
            )
        if len(found) != count:
            raise AlignctlError(f"{who} gave {len(found)} numbers for {count} completions")
        for one in found:
            if one is not None and (isinstance(one, bool) or not isinstance(one, int | float)):
                raise AlignctlError(
                    f"{who} gave what is no number: {_shown(one)}",
                    "it answers with a JSON list, a number or null for each completion",
                )
        return at_the_end(found, episodes)


@dataclass(frozen=True)
class JudgeReward:
    """A language model as a source of rewards: its grade of each completion."""

    chat: Chat
    question: str
    """With `{prompt}`, `{completion}` and names of columns."""
    parallel: int
    name: str

    def check_columns(self, columns: Sequence[str]) -> None:
        """Whether the rows have what the question asks for.

        Raises:
            RequestError: They have not, or it is none.
        """
        known = {"prompt", "completion", *columns}
        try:
            asked = [name for _, name, _, _ in Formatter().parse(self.question) if name is not None]
        except ValueError as error:
            raise RequestError(
                f"the `question` of `{self.name}` cannot be filled in: {error}", "write `{{` and `}}` for braces"
            ) from error
        if missing := [name for name in asked if name not in known]:
            raise RequestError(
                f"the `question` of `{self.name}` has `{{{missing[0]}}}`, which is no column of the rows",
                f"there is {', '.join(f'`{{{name}}}`' for name in sorted(known))}; write `{{{{` and `}}}}` for braces",
            )

    def __call__(self, episodes: Episodes) -> list[Score]:
        questions = [self._fill(episodes, member) for member in range(len(episodes.completions))]
        with ThreadPoolExecutor(self.parallel) as pool:
            asked = {question: pool.submit(self._ask, question) for question in dict.fromkeys(questions)}
            try:
                answers = [asked[question].result() for question in questions]
            except AlignctlError:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        grades = [grade(answer) for answer in answers]
        if grades and all(one is None for one in grades):
            raise AlignctlError(
                f"`{self.name}` graded none of {len(grades)} completions; it said: {_shown(answers[0])}",
                "let the `question` ask for a line `Score: N`, and raise `max_tokens` if answers are cut off",
            )
        return at_the_end(grades, episodes)

    def _ask(self, question: str) -> str:
        return self.chat.ask([{"role": "user", "content": question}])

    def _fill(self, episodes: Episodes, member: int) -> str:
        columns = {name: values[member] for name, values in episodes.columns.items()}
        prompt, completion = as_text(episodes.prompts[member]), as_text(episodes.completions[member])
        return self.question.format_map({**columns, "prompt": prompt, "completion": completion})


def grade(answer: str) -> float | None:
    """The number after the last `Score:` of a judge's answer, or that which it says alone; None where it says none."""
    if found := _GRADE.findall(answer):
        return float(found[-1])
    try:
        alone = float(answer)
    except ValueError:
        return None
    return alone if math.isfinite(alone) else None


def as_text(said: Any) -> str:
    """A prompt or a completion as a judge reads it: of one message its text, else each after who says it."""
    if not is_messages(said):
        return str(said)
    messages: Sequence[Mapping[str, str]] = said
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{one['role']}: {one['content']}" for one in messages)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return " ".join(text.split())[:_SHOWN]
