"""Runs TRL's trainers on alignctl's engine: prompts computed once, nothing padded, the LM head only where it counts."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed import new_subgroups
from torch.utils.data import Sampler
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl.trainer import dpo_trainer, kto_trainer

from alignctl.data.scanning import lengths
from alignctl.engine.forward import bare, takes_packed_rows
from alignctl.engine.tensor_parallel import group_of_weights
from alignctl.errors import RequestError
from alignctl.models.compiling import compile_layers
from alignctl.models.dropout import disable_dropout
from alignctl.models.packing import put_packed_attention_on
from alignctl.trainers.base.divided import divide_model
from alignctl.trainers.base.entries import Entries
from alignctl.trainers.base.heads import check_head_of_trl, put_head_on, put_score_on, why_not_scored_packed
from alignctl.trainers.base.mixed import mixed_dtype
from alignctl.trainers.base.passes import DividesSteps
from alignctl.trainers.base.replicas import SameGradients

_PASS_TOKENS = {True: 896, False: 16384}
"""Of a pass, on a CPU and elsewhere."""
_NOT_WANTED = ("create_model_from_path", "hash_module")
_MIXTURE = "the loss of a mixture of experts comes from padded rows"


@dataclass
class EngineConfig:
    """What every method's settings have beside those of TRL."""

    engine: Literal["auto", "shared_prefix", "padded"] = "auto"
    """How batches are computed. shared_prefix: what rows begin with in common once, and without padding; padded: as in
    TRL; auto: the first where the model can. The numbers are the same to rounding."""

    pass_tokens: int | Literal["auto"] = "auto"
    """Most tokens of a forward and backward pass, those that rows begin with in common once: how an optimizer step is
    divided, which changes no number. auto: on a GPU what the rehearsal finds to fit, else a number that suits the
    device."""
    activation_checkpointing: bool | Literal["auto"] | None = "auto"
    """Whether the backward pass computes activations again: less memory, a third more time. auto: on a GPU where the
    rehearsal finds that they do not fit, or finds nothing."""
    gradient_checkpointing: bool | None = None
    """Former name of `activation_checkpointing`."""
    compile: Literal["auto", "on", "off"] | bool = "auto"
    """Whether torch compiles what lies between the matrix products of each layer, for all layers at once. auto: on a
    GPU, where the model and what divides it allow; on: also on a CPU, and refused where it cannot be. The numbers are
    the same to rounding."""
    global_batch_size: int | None = None
    """What an optimizer step takes on all processes together: rows, pairs of preferences, or completions. Accumulation
    follows from it, and of PPO, GRPO and RLOO `per_device_train_batch_size`. None: it follows from these."""
    batch_for: int | None = None
    """The global batch that `learning_rate` was published for; a run with another one says so. It is of the rate that
    it stands beside, not of one that is set later."""
    early_stopping_patience: int | None = None
    """Ends training once `metric_for_best_model`, of the held-out rows, has not got better for so many evaluations in
    turn."""
    early_stopping_threshold: float = 0.0
    """By how much it has to get better to count."""

    def __post_init__(self) -> None:
        if self.early_stopping_patience and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        if self.activation_checkpointing is None:
            self.activation_checkpointing = "auto"
        if self.gradient_checkpointing is not None and self.activation_checkpointing == "auto":
            self.activation_checkpointing = self.gradient_checkpointing
        if isinstance(self.compile, bool):  # YAML's `on` and `off`
            self.compile = "on" if self.compile else "off"
        super().__post_init__()
        if self.activation_checkpointing == "auto":
            self.activation_checkpointing = self.gradient_checkpointing = self.device.type != "cpu"

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Steps of the warm-up; a share of all steps leaves at least one with the whole learning rate."""
        warm_up = super().get_warmup_steps(num_training_steps)
        return warm_up if self.warmup_steps >= 1 else min(warm_up, num_training_steps - 1)


def pass_tokens(args: EngineConfig) -> int:
    """Most tokens of a pass."""
    return args.pass_tokens if args.pass_tokens != "auto" else _PASS_TOKENS[args.device.type == "cpu"]


def compile_as_wanted(model: PreTrainedModel, args: EngineConfig) -> str | None:
    """Compiles a model's layers where its settings say so; says for people what became of it, None where nothing was
    to be done.

    Raises:
        RequestError: They cannot be, and `compile` asks for it.
    """
    if args.compile == "off" or args.torch_compile or (args.compile == "auto" and args.device.type == "cpu"):
        return None
    reason = "`distributed=fsdp2` divides the weights of a layer" if args.fsdp else None
    reason = reason or compile_layers(model, args.device, mixed_dtype(args))
    if reason and args.compile == "on":
        raise RequestError(f"`compile=on` cannot be: {reason}", "set the stage's `compile` to auto")
    return f"compile: no, because {reason}" if reason else "compile: the parts of each layer, once for all layers"


def said_of_passes(args: EngineConfig, longest: int) -> str:
    """A notice about how large passes are, where the longest row has so many tokens."""
    given = pass_tokens(args)
    more = f" (not {given:,}: the longest row has more)" if longest > given else ""
    return f"passes: at most {max(given, longest):,} tokens each{more}"


class OnEngine(DividesSteps):
    """A mixin for TRL's trainers. `notices` says for people how batches are computed."""

    blocks = 1
    """Of rows of a batch whose first rows begin alike, and so on: 2 where rejected rows lie below the chosen ones."""
    logs_tokens = True
    """Whether more is logged of tokens than comes of their log-probabilities: the entropy, and so on."""
    has_reference = False
    """Whether the loss looks at a reference's log-probabilities."""

    notices: list[str]
    row_columns: Mapping[str, bool]

    def __init__(self, *args: Any, keeps_batches: str | None = None, tp_size: int = 1, **kwargs: Any):
        """`keeps_batches` says why the rows of a batch have to stay together; None where they need not. `tp_size` is
        how many processes side by side divide the matrices of layers, and compute the rows of all of them together."""
        self.keeps_batches = keeps_batches
        with _all_models_given():
            super().__init__(*args, **kwargs)
        divide_model(self, tp_size)
        self.weights_group = group_of_weights(self.model)
        if self.weights_group is not None:
            self.add_callback(SameGradients(self.model))
            self.notices.append(
                f"layers: their matrices divided among {tp_size} processes, which compute the same rows"
            )
        if getattr(self, "aux_loss_enabled", False):
            self.keeps_batches = "the load of a mixture of experts is balanced over the tokens of a batch"
        if self.keeps_batches and self.weights_group is not None:
            raise RequestError(
                f"`distributed.parallelism_config.tp_size={tp_size}` cannot be: {self.keeps_batches}", "leave it out"
            )
        self._put_engine_on()
        self._longest = _longest(self.train_dataset, self.blocks, getattr(self.args, "max_length", None))
        self.notices.append(self._how_divided())

    def tried_outputs(self, model: nn.Module, ids: Tensor) -> list[Tensor]:
        """See LooksForUnused."""
        return [model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits]

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        self._put_engine_on()  # TRL calls this while it is being built
        return super()._precompute_ref_logps(*args, **kwargs)

    def _how_divided(self) -> str:
        if self.keeps_batches:
            return f"passes: a batch each, because {self.keeps_batches}"
        return said_of_passes(self.args, self._longest) + ", however a step's rows are batched"

    def _packed(self) -> bool:
        return takes_packed_rows(self.accelerator.unwrap_model(self.model))

    def _pass_tokens(self) -> int:
        return max(pass_tokens(self.args), self._longest)

    def models_on_engine(self) -> list[PreTrainedModel]:
        """The trained one, and the reference where it is another."""
        models = self.model, getattr(self, "ref_model", None)
        return [bare(self.accelerator.unwrap_model(model)) for model in models if model is not None]

    def compute_rows_together(self, processes: int) -> None:
        """Lets so many processes side by side compute the rows of all of them together, each a part of every row.

        Raises:
            RequestError: The model or the loss does not allow it.
        """
        reason = self.keeps_batches
        for model in self.models_on_engine():
            config = model.config.get_text_config()
            heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
            if not takes_packed_rows(model):
                reason = reason or "rows are padded"
            if any(number and number % processes for number in heads):
                reason = reason or f"it does not divide the heads, {heads[0]} and of keys {heads[1] or heads[0]}"
        if reason:
            raise RequestError(
                f"`distributed.parallelism_config.sp_size={processes}` cannot be: {reason}",
                "leave it out" if self.keeps_batches else "set one that divides both, or leave it out",
            )
        self.token_group, _ = new_subgroups(processes, timeout=timedelta(seconds=self.args.ddp_timeout))
        self.notices.append(f"rows: each divided among {processes} processes, which compute those of all of them")

    def _put_engine_on(self) -> None:
        trained = bare(self.accelerator.unwrap_model(self.model))
        for model in self.models_on_engine():
            self._put_under(model, trained=model is trained)

    def _put_under(self, model: PreTrainedModel, trained: bool) -> None:
        if getattr(model, "on_engine", False):
            return
        model.on_engine = True
        if getattr(self.args, "disable_dropout", False):
            disable_dropout(model)
        mixture = getattr(self, "aux_loss_enabled", False)
        has_head = model.get_output_embeddings() is not None
        reason: str | None = "that was asked for"
        if mixture:
            reason = _MIXTURE
        elif self.args.engine != "padded":
            reason = self._why_padded(model, has_head)
        if reason and self.args.engine == "shared_prefix":
            raise RequestError(f"`engine=shared_prefix` cannot be: {reason}", "set the stage's `engine` to auto")
        if trained:
            if mixture and has_head:
                check_head_of_trl(model)
            self.notices.append(f"engine: padded rows, because {reason}" if reason else _describe(model, self.blocks))
        if has_head and not mixture:  # which keeps TRL's head, because that knows its loss
            statistics = trained and self.logs_tokens
            put_head_on(model, self.accelerator.autocast, self.blocks, statistics, self.has_reference)
        elif not has_head and not reason:
            put_score_on(model, self.accelerator.autocast, self.blocks)
        compiled = compile_as_wanted(model, self.args)
        if trained and compiled:
            self.notices.append(compiled)

    def _why_padded(self, model: PreTrainedModel, has_head: bool) -> str | None:
        if getattr(self, "label_smoother", None) is not None:
            return "label smoothing needs the logits of all positions"
        if self.args.neftune_noise_alpha:
            return "the noise on embeddings depends on how rows are padded"
        scored_otherwise = None if has_head else why_not_scored_packed(model)
        return scored_otherwise or put_packed_attention_on(model, self.accelerator.device, mixed_dtype(self.args))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        strategy = self.args.train_sampling_strategy
        if strategy == "batch_rebalance" and "input_ids" not in self.train_dataset.column_names:
            raise RequestError(
                "`train_sampling_strategy=batch_rebalance` looks for the tokens of single texts, and these rows have "
                "several",
                "set it to group_by_length",
            )
        if strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return self._by_length(rows, size, epoch=lambda: int(self.state.epoch or 0))

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        return self._by_length(eval_dataset, self.args.eval_batch_size)

    def _by_length(self, rows: Dataset | Entries, batch_size: int, epoch: Callable[[], int] = lambda: 0) -> ByLength:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return ByLength(_lengths(rows, self.row_columns), batch_size, seed, epoch)


@contextmanager
def _all_models_given() -> Iterator[None]:
    """Keeps TRL (1.16) from loading a reference where none is given, as it does under FSDP for methods that need none,
    and from hashing all weights for a cache of its own."""
    modules = dpo_trainer, kto_trainer
    usual = [(module, name, getattr(module, name)) for module in modules for name in _NOT_WANTED]
    for module, name, _ in usual:
        setattr(module, name, lambda *args, **options: None)
    try:
        yield
    finally:
        for module, name, function in usual:
            setattr(module, name, function)


class ByLength(Sampler):
    """Batches of tokenised rows of about one length, in a random order that depends on seed and epoch alone.

    The epoch is asked for: where several processes continue a run, what accelerate (1.15) puts around a sampler does
    not tell it.

    transformers' own looks for a column `input_ids`, which rows of pairs have not, and draws from the global random
    state, so that a run that is continued would go on with other batches.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, epoch: Callable[[], int]):
        """`lengths` are the tokens of each row."""
        self._lengths = lengths
        self._batch_size, self._seed, self._epoch = batch_size, seed, epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch())
        return iter(get_length_grouped_indices(self._lengths, self._batch_size, generator=generator))

    def __len__(self) -> int:
        return len(self._lengths)


def _lengths(rows: Dataset | Entries, others: Collection[str] = ()) -> list[int]:
    """Tokens of each row, or of all rows of each entry; of one with several sequences those of all.

    Args:
        others: Columns that are no token ids, whatever they are called.
    """
    if isinstance(rows, Entries):
        return rows.summed(_lengths(rows.rows, others))
    columns = [column for column in rows.column_names if column.endswith("_ids") and column not in others]
    return lengths(rows.select_columns(columns)).tolist()


def _longest(rows: Dataset, blocks: int, cut: int | None) -> int:
    """Most tokens that a row takes, of which `cut` are seen of each sequence; what a pair begins with counts once."""
    whole, most = _lengths(rows), 0
    for index in sorted(range(len(whole)), key=lambda index: -whole[index]):
        if whole[index] <= most:
            break  # the rest takes no more
        parts = {name: ids for name, ids in rows[index].items() if name.endswith("_ids")}
        prompt = parts.pop("prompt_ids", [])
        if blocks == 1:
            taken = len([*prompt, *itertools.chain(*parts.values())][:cut])
        else:
            pair = [[*prompt, *ids][:cut] for ids in parts.values()]
            taken = sum(map(len, pair)) - len(os.path.commonprefix(pair))
        most = max(most, taken)
    return most


def _describe(model: PreTrainedModel, blocks: int) -> str:
    what = "prompts computed once, nothing padded" if blocks > 1 else "nothing padded"
    return f"engine: {what} ({model.packed_attention} attention)"
