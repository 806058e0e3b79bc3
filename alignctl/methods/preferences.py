"""What the methods that learn from preference pairs have in common. Torch-free, pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from alignctl.errors import Problem
from alignctl.methods.registry import POSITIVE, RUN_OWNED_FIELDS, Bound

OWNED_FIELDS = RUN_OWNED_FIELDS | {"padding_free": "TRL 1.16 ignores it"}
"""Fields of `trl.DPOConfig` that no stage may set."""

_LOSS = "this method has one loss of its own; for others use the method `dpo`"
_REFERENCE = "this method has no reference"
LOSS_FIELDS = dict.fromkeys(
    ("loss_type", "loss_weights", "f_divergence_type", "f_alpha_divergence_coef", "discopop_tau", "use_weighting",
     "ld_alpha", "label_smoothing"),
    _LOSS,
)  # fmt: skip
"""Fields that choose among DPO's losses, for methods with a loss of their own."""
REFERENCE_FIELDS = dict.fromkeys(
    ("precompute_ref_log_probs", "precompute_ref_batch_size", "sync_ref_model", "ref_model_mixup_alpha",
     "ref_model_sync_steps"),
    _REFERENCE,
)  # fmt: skip
"""Fields about a reference, for methods that have none."""

BETA = {"beta": POSITIVE}
REFERENCE = {"ref_model_sync_steps": Bound(least=1), "ref_model_mixup_alpha": Bound(above=0, most=1)}
"""Of a reference that follows the policy."""
SMOOTHING = {"label_smoothing": Bound(least=0, below=0.5)}
"""A share of wrong labels of a half or more would turn every preference round."""

# The losses for which an f-divergence is defined (arXiv:2309.16240): those of a difference of rewards.
_SMOOTHED = {"aot", "aot_unpaired", "exo_pair", "robust"}
_DIFFERENCE_LOSSES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}


def mixed_losses(stage: Mapping[str, Any]) -> str | None:
    """Why a loss of `trl.DPOTrainer` looks at all pairs of a batch; None where it does not."""
    losses = [stage["loss_type"]] if isinstance(stage["loss_type"], str) else stage["loss_type"] or []
    sorting = sorted({"aot", "aot_unpaired"} & set(losses))
    return f"the loss {sorting[0]} sorts the pairs of a batch" if sorting else None


def check_reference(name: str, stage: Mapping[str, Any]) -> Iterator[Problem]:
    """A reference that follows the policy cannot be computed beforehand, nor be the adapter switched off."""
    if not stage.get("sync_ref_model"):
        return
    off = f"set `{name}.sync_ref_model=false`"
    if stage.get("precompute_ref_log_probs"):
        yield Problem(f"`{name}.sync_ref_model` and `{name}.precompute_ref_log_probs` exclude each other", off)
    if stage["peft"].get("type", "none") != "none":
        yield Problem(f"`{name}.sync_ref_model` needs a reference of its own, and with an adapter there is none", off)


def check_losses(name: str, stage: Mapping[str, Any]) -> Iterator[Problem]:
    """Losses of `trl.DPOTrainer` and the settings they need or exclude."""
    losses = stage.get("loss_type", ["sigmoid"])
    losses = losses if isinstance(losses, list) else [losses]
    smoothing = stage.get("label_smoothing", 0.0)
    if smoothing and not _SMOOTHED & set(losses):
        yield Problem(
            f"`{name}.label_smoothing` would have no effect on the loss {', '.join(losses)}: TRL smooths only "
            f"{', '.join(sorted(_SMOOTHED))}",
            f"for DPO that expects wrong labels: `{name}.loss_type=robust`",
        )
    if "exo_pair" in losses and not smoothing:
        yield Problem(
            f"the loss `exo_pair` needs `{name}.label_smoothing` greater than 0",
            f"its paper uses 1e-3: `{name}.label_smoothing=0.001`",
        )
    if stage.get("use_weighting") and {"aot", "aot_unpaired"} & set(losses):
        yield Problem(f"`{name}.use_weighting` and the loss `aot` exclude each other: it sorts what would be weighted")
    if stage.get("use_weighting") and "sft" in losses:
        yield Problem(
            f"`{name}.use_weighting` and the loss `sft` exclude each other: its weights are of pairs, and that "
            "loss is a mean over the tokens of all",
            f"take `sft` out of `{name}.loss_type` and `{name}.loss_weights`, or set `{name}.use_weighting=false`",
        )
    divergence = stage.get("f_divergence_type", "reverse_kl")
    if divergence != "reverse_kl" and (others := sorted(set(losses) - _DIFFERENCE_LOSSES)):
        yield Problem(
            f"`{name}.f_divergence_type={divergence}` is not defined for the loss {', '.join(others)}",
            f"set `{name}.f_divergence_type=reverse_kl`",
        )
    yield from check_reference(name, stage)
