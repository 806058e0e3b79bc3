"""TRL's SFTTrainer on alignctl's engine, refused where the end of an answer is not among what it trains on."""

from __future__ import annotations

from collections.abc import Collection
from copy import copy
from dataclasses import dataclass
from itertools import islice
from typing import Any

import trl
from datasets import Dataset
from torch import Tensor, nn
from trl.trainer.sft_config import SFTConfig as TRLSFTConfig

from alignctl.data.rendering import check_end_is_trained
from alignctl.data.token_columns import LabelledIds, TokenColumns
from alignctl.errors import RequestError
from alignctl.models.generation import end_tokens
from alignctl.trainers.base.held_out import Part
from alignctl.trainers.base.managed import Managed
from alignctl.trainers.base.on_engine import EngineConfig, OnEngine
from alignctl.trainers.base.tally import ROWS
from alignctl.trainers.base.tokenising import TokenisesRows

_ROWS = 100


@dataclass
class SFTConfig(EngineConfig, TRLSFTConfig):
    """Settings of SFT."""

    def __post_init__(self) -> None:
        if self.router_aux_loss_coef is not None:
            self.router_aux_loss_coef = float(self.router_aux_loss_coef)  # TRL puts it into the config, which is strict
        super().__post_init__()


class SFTTrainer(Managed, OnEngine, TokenisesRows, trl.SFTTrainer):
    """Supervised fine-tuning."""

    means = {"entropy": "tokens", "mean_token_accuracy": "tokens"}

    @classmethod
    def token_columns(cls, args: SFTConfig, names: Collection[str], packing: bool, *more: Any) -> TokenColumns:
        """Packing cuts the end of rows, or nothing where it goes on with them in the next one."""
        only = args.completion_only_loss
        if only is None:
            only = {"prompt", "completion"} <= set(names)
        longest = None if packing and args.packing_strategy != "bfd" else args.max_length
        mode = "keep_start" if packing else args.truncation_mode
        return LabelledIds(longest, mode, only, packing, marked=args.assistant_only_loss)

    def by_trl(self, rows: Dataset, processing_class: Any, args: SFTConfig, packing: bool, *more: Any) -> Dataset:
        args = copy(args)
        args.shuffle_dataset = False
        return super().by_trl(rows, processing_class, args, False, *more)

    def prepared(self, rows: Dataset, processing_class: Any, args: SFTConfig, packing: bool, *more: Any) -> Dataset:
        """Packed and shuffled, by TRL; rows that are not packed are cut already. Where all are lost there is nothing to
        pack."""
        if not len(rows):
            return rows
        args = args if packing else copy(args)
        if not packing:
            args.max_length = None
        return trl.SFTTrainer._prepare_dataset(self, rows, processing_class, args, packing, *more)

    def __init__(self, *, train_dataset: Dataset, **kwargs: Any):
        try:
            super().__init__(train_dataset=train_dataset, **kwargs)
        except ValueError as error:
            if "{% generation %}" not in str(error):
                raise
            raise RequestError(
                "`assistant_only_loss` needs a chat template that marks what the assistant says",
                "write `{% generation %}` and `{% endgeneration %}` around it in `model.chat_template=FILE`, or set "
                "`completion_only_loss` on rows of prompt and completion",
            ) from error
        if "text" in train_dataset.column_names:
            return  # documents: there is nobody who answers
        packing, longest = self.args.packing, self.args.max_length
        rows = [row["labels"] for row in islice(self.train_dataset, _ROWS)]
        whole = [labels for labels in rows if packing or longest is None or len(labels) < longest]
        ends = end_tokens(self.accelerator.unwrap_model(self.model), self.processing_class)
        check_end_is_trained(ends, self.processing_class, whole, anywhere=packing)

    def counts(self, batch: dict[str, Any]) -> dict[str, int]:
        return super().counts(batch) | {"tokens": int((batch["labels"][:, 1:] != -100).sum())}

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.aux_loss_enabled and self.shares is not None:  # TRL divides by it what balances experts, and only that
            self.current_gradient_accumulation_steps = 1 / self.shares[ROWS]
        return super().compute_loss(model, inputs, *args, **kwargs)

    def shared(self, loss: Tensor, name: str) -> Tensor:
        """TRL divides by the tokens of the step, so a pass has its share."""
        return loss

    def held_out_parts(self, model: nn.Module, loss: Tensor, inputs: dict[str, Any]) -> list[Part]:
        """A mean over the tokens that are trained on."""
        return [(loss, (inputs["labels"][:, 1:] != -100).sum())]
