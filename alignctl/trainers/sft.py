"""TRL's SFTTrainer with our LM head, refused where the end of an answer is not among what it trains on."""

from __future__ import annotations

from itertools import islice
from typing import Any

import trl

from alignctl.models.template import check_end_is_trained
from alignctl.trainers.head import ChunkedHead

_ROWS = 100


class SFTTrainer(ChunkedHead, trl.SFTTrainer):
    """Supervised fine-tuning."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        labels = [row["labels"] for row in islice(self.train_dataset, _ROWS)]
        check_end_is_trained(self.accelerator.unwrap_model(self.model), self.processing_class, labels)
