"""What an on-policy trainer does before it is one: models on the engine, lengths looked at, prompts tokenised."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignctl.data.lengths import RowLengths
from alignctl.data.token_columns import PromptIds
from alignctl.data.tokenizing import tokenize_prompt
from alignctl.errors import RequestError
from alignctl.models.loading import longest_seen
from alignctl.models.packing import put_packed_attention_on
from alignctl.trainers.base.heads import why_not_scored_packed
from alignctl.trainers.base.mixed import mixed_dtype
from alignctl.trainers.on_policy.config import OnPolicyConfig

PROMPT_IDS = "prompt_ids"


def put_engine_under(models: Sequence[PreTrainedModel], args: OnPolicyConfig) -> str:
    """Lets models take packed rows where they can; says for people what became of it.

    Raises:
        RequestError: They cannot, and `engine` asks for it.
    """
    reasons = []
    for one in models if args.engine != "padded" else ():
        scored_otherwise = why_not_scored_packed(one) if one.get_output_embeddings() is None else None
        if reason := scored_otherwise or put_packed_attention_on(one, args.device, mixed_dtype(args)):
            reasons.append(reason)
    if reasons and args.engine == "shared_prefix":
        raise RequestError(f"`engine=shared_prefix` cannot be: {reasons[0]}", "set `engine=auto`")
    padded = args.engine == "padded" or reasons
    why = f", because {reasons[0]}" if reasons else ""
    return f"engine: padded rows{why}" if padded else "engine: nothing padded"


def check_length(args: OnPolicyConfig, models: Mapping[str, nn.Module | None]) -> None:
    """Whether all models that are given the policy's tokens can see the longest text there may be.

    Raises:
        RequestError: One cannot.
    """
    wanted = args.max_prompt_length + args.response_length
    for name, model in models.items():
        limit = longest_seen(model) if model is not None else None
        if limit and wanted > limit:
            raise RequestError(
                f"`max_prompt_length` and `response_length` are {wanted} tokens together, more than the {name} can "
                f"see: {limit} tokens",
                "make one of them smaller",
            )


def check_rollout(args: OnPolicyConfig, rows: int) -> None:
    """Whether there are rows for one rollout, where a smaller last one is dropped.

    Raises:
        RequestError: There are not.
    """
    completions, wanted = rows * args.num_generations, args.train_batch_size * args.world_size
    if args.dataloader_drop_last and completions < wanted:
        raise RequestError(
            f"a rollout is of {wanted:,} completions, and the {rows:,} prompts give {completions:,}",
            "lower `per_device_train_batch_size`, or set `dataloader_drop_last=false`",
        )


def tokenize_prompts(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, columns: PromptIds
) -> tuple[Dataset, RowLengths]:
    """Rows with the token ids of their prompts, without those whose prompt is too long, and the lengths of all."""
    found = [tokenize_prompt(tokenizer, prompt) for prompt in rows["prompt"]]
    lengths = RowLengths.of(columns.max_length, [columns.needed((ids,)) for ids in found], columns.why_lost)
    kept = (~lengths.lost).nonzero()[0]
    names = [name for name in rows.column_names if name != PROMPT_IDS]
    return rows.select(kept).select_columns(names).add_column(PROMPT_IDS, [found[i] for i in kept]), lengths


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Prompts, as the rows have them and as token ids, as lists."""
    return {name: [row[name] for row in rows] for name in ("prompt", PROMPT_IDS)}


class EachSeveralTimes(Sampler):
    """Rows in a random order that depends on seed and epoch alone, each several times in a row: one for each completion
    that is drawn to it."""

    def __init__(self, rows: int, times: int, seed: int, epoch: Callable[[], int]):
        """`epoch` is asked for, see ByLength."""
        self._rows, self._times, self._seed, self._epoch = rows, times, seed, epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch())
        for row in torch.randperm(self._rows, generator=generator).tolist():
            yield from [row] * self._times

    def __len__(self) -> int:
        return self._rows * self._times
