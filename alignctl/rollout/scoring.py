"""The scores of a rollout: by all sources, normalised, weighted, and looked at.

The one room for whatever scores completions; it knows no trainer and no method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from alignctl.config.rewards import Entry, FunctionEntry, JudgeEntry, ServerEntry, read_entry
from alignctl.errors import AlignctlError, RequestError
from alignctl.rollout import ready
from alignctl.rollout.episodes import Episodes
from alignctl.rollout.judging import JudgeReward, ServerReward
from alignctl.rollout.rewards import (
    FunctionReward,
    Moments,
    RewardModel,
    RewardSource,
    Score,
    combine,
    load_function,
    score,
)
from alignctl.rollout.servers import Chat, Server
from alignctl.rollout.settings import RewardSettings
from alignctl.run.paths import REWARD_STATISTICS

_CONSTANT_STEPS = 5  # rollouts of equal scores until training is stopped


def build_sources(
    args: RewardSettings,
    tokenizer: PreTrainedTokenizerBase,
    columns: Sequence[str],
    reward_model: nn.Module | None,
    reward_tokenizer: PreTrainedTokenizerBase | None,
    conversations: bool,
    max_tokens: int,
) -> list[RewardSource]:
    """The reward model where there is one, then what `reward_funcs` names, in its order.

    Args:
        tokenizer: The policy's.
        columns: Of the rows, which functions may ask for.
        conversations: Whether prompts are lists of messages.
        max_tokens: Of a batch that the reward model is given.

    Raises:
        RequestError: The reward model cannot write conversations, there is no such function, or it asks for a column
            that the rows do not have.
    """
    sources: list[RewardSource] = []
    if reward_model is not None:
        source = RewardModel(reward_model, reward_tokenizer or tokenizer, tokenizer, max_tokens)
        if conversations and source.tokenizer.chat_template is None:
            raise RequestError(
                f"the rows are conversations, and the reward model {source.tokenizer.name_or_path} has no chat "
                "template to write them with",
                "put the one that it was trained with into its folder, as `chat_template.jinja`",
            )
        sources.append(source)
    for entry in map(read_entry, args.reward_funcs):
        source = _source(entry, args)
        if isinstance(source, FunctionReward | JudgeReward):
            source.check_columns(columns)
        sources.append(source)
    return sources


def _source(entry: Entry, args: RewardSettings) -> RewardSource:
    """What scores as an entry of `reward_funcs` says."""
    timeout_s, retries = args.reward_timeout, args.reward_retries
    if isinstance(entry, ServerEntry):
        return ServerReward(Server(entry.url, timeout_s, retries, entry.key_from), entry.label)
    if isinstance(entry, JudgeEntry):
        server = Server(entry.judge, timeout_s, retries, entry.key_from)
        chat = Chat(server, entry.model, entry.temperature, entry.max_tokens)
        return JudgeReward(chat, entry.question, entry.parallel, entry.label)
    how = {"processes": args.reward_workers, "timeout_s": timeout_s}
    if isinstance(entry, FunctionEntry):
        return load_function(entry.function, entry.label, **how)
    return load_function(
        f"{ready.__name__}:{fields(entry)[0].name}", entry.label, entry.columns, **how, **entry.settings
    )


class Scoring:
    """Scores rollouts. What processes have to know of each other's is handed over as numbers."""

    def __init__(
        self,
        args: RewardSettings,
        sources: list[RewardSource],
        statistics: dict[str, float] | None,
    ):
        """`statistics` are the reward model's own mean and deviation.

        Raises:
            RequestError: They are wanted and not there.
        """
        if args.normalize_rewards == "statistics" and statistics is None:
            raise RequestError(
                f"`normalize_rewards=statistics` needs a reward model with a file {REWARD_STATISTICS} beside its "
                "weights",
                "set `normalize_rewards=running`",
            )
        self._args, self._statistics = args, statistics
        self.sources = sources
        self.weights = args.reward_weights or [1.0] * len(sources)
        self._seen = {source.name: Moments() for source in sources}
        self._constant = 0

    @property
    def asks_servers(self) -> bool:
        """Whether some of the sources may be away."""
        return any(isinstance(source, ServerReward | JudgeReward) for source in self.sources)

    def check_columns(self, columns: Sequence[str]) -> None:
        """Whether rows have what the sources ask for.

        Raises:
            RequestError: They have not.
        """
        for source in self.sources:
            if isinstance(source, FunctionReward | JudgeReward):
                source.check_columns(columns)

    def ask(self, episodes: Episodes) -> dict[str, list[Score]]:
        """Scores by each source, by its name.

        Raises:
            NotANumber: A number is none. A process that fails here does not ask the others: whoever started them ends
                them.
            ServerAway: A server or a judge did not answer.
            AlignctlError: A source does not score.
        """
        return score(self.sources, episodes)

    def numbers(self, rewards: dict[str, list[Score]]) -> dict[str, float]:
        """What the processes have to tell each other of what the sources said."""
        if self._args.normalize_rewards != "running":
            return {}
        own = {
            name: Moments.of([value for one in scores for value in one.values()]) for name, scores in rewards.items()
        }
        return {f"{name} {key}": value for name, seen in own.items() for key, value in asdict(seen).items()}

    def combined(
        self, episodes: Episodes, rewards: dict[str, list[Score]], everyone: Mapping[str, Tensor]
    ) -> list[Score]:
        """What is made of the scores.

        Args:
            everyone: The numbers of all processes.
        """
        scores = combine(rewards, self.weights, self._moments(rewards, everyone), self._args.reward_clip)
        if (penalty := self._args.missing_eos_penalty) is not None:
            for one, ids, ended in zip(scores, episodes.completion_ids, episodes.ended, strict=True):
                if not ended:
                    one[len(ids) - 1] = one.get(len(ids) - 1, 0.0) - penalty
        return scores

    def cut_fracs(self) -> dict[str, float]:
        """Shares of the texts that a source could not see whole, by the name it is logged under."""
        with_text = [source for source in self.sources if isinstance(source, RewardModel) and not source.same_tokens]
        return {f"{source.name}_cut": source.cut_frac for source in with_text}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"seen": {name: asdict(seen) for name, seen in self._seen.items()}, "constant": self._constant}

    def take_over(self, state: dict[str, Any]) -> None:
        self._seen = {name: Moments(**seen) for name, seen in state["seen"].items()}
        self._constant = state["constant"]

    def _moments(
        self, rewards: dict[str, list[Score]], everyone: Mapping[str, Tensor]
    ) -> dict[str, tuple[float, float]]:
        kind = self._args.normalize_rewards
        if kind == "statistics":
            return {"reward_model": (self._statistics["mean"], self._statistics["std"])}
        if kind == "none":
            return {}
        for name in rewards:
            for numbers in zip(*(everyone[f"{name} {key.name}"].tolist() for key in fields(Moments)), strict=True):
                self._seen[name].add(Moments(*numbers))
        return {name: (seen.mean, seen.std) for name, seen in self._seen.items()}

    def check_not_constant(self, least: float, most: float, count: int) -> None:
        """Looks at the scores of a rollout, of all processes.

        Raises:
            AlignctlError: All completions have had the same for a while.
        """
        self._constant = self._constant + 1 if count > 1 and least == most else 0
        if self._constant >= _CONSTANT_STEPS:
            raise AlignctlError(
                f"all completions of the last {_CONSTANT_STEPS} rollouts had the same score, {least:.4g}: there is "
                "nothing to learn from"
            )
