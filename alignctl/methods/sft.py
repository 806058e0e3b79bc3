"""Supervised fine-tuning on demonstrations, with TRL's SFTTrainer."""

from __future__ import annotations

from alignctl.methods.registry import RUN_OWNED_FIELDS, Method

METHOD = Method(
    name="sft",
    summary="supervised fine-tuning: imitate demonstrations",
    paper="https://arxiv.org/abs/2203.02155",
    data_kind="demonstrations",
    roles=("policy",),
    config_class="trl.trainer.sft_config:SFTConfig",
    trainer="trl:SFTTrainer",
    owned_fields=RUN_OWNED_FIELDS
    | {
        "chat_template_path": "use `model.chat_template`",
        "eos_token": "it comes from the tokenizer",
        "dataset_text_field": "the text is found by alignctl, see `data.format`",
    },
    key_metrics=("mean_token_accuracy",),
)
