"""TRL's DPOTrainer with our LM head, and its precomputed reference log-probabilities kept on disk."""

from __future__ import annotations

import trl

from alignctl.trainers.head import ChunkedHead
from alignctl.trainers.reference_logps import CachedReferenceLogps


class DPOTrainer(CachedReferenceLogps, ChunkedHead, trl.DPOTrainer):
    """Direct preference optimization, arXiv:2305.18290."""
