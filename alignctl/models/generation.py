"""What a checkpoint says about generating: which tokens end an answer, and what of it transformers would save again."""

from __future__ import annotations

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

_MODES = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache")
"""Settings that say whether others have an effect."""


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: chat models name one, tokenizers another."""
    config = getattr(model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    ends = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    return sorted(end for end in ends if end is not None)


def mend_generation_config(model: PreTrainedModel) -> str | None:
    """Takes out of a model's settings for generating what transformers (5.23) reads and then refuses to save, such as a
    temperature without sampling, which has no effect. A sentence for people where there was any."""
    own = getattr(model, "generation_config", None)
    if own is None or _saves(own):
        return None
    kept, left_out = GenerationConfig(), []
    settings = own.to_diff_dict()
    for key in sorted(settings, key=lambda key: key not in _MODES):
        before = getattr(kept, key, None)
        setattr(kept, key, settings[key])
        if not _saves(kept):
            setattr(kept, key, before)
            left_out.append(f"`{key}={settings[key]}`")
    model.generation_config = kept
    return f"of generation_config.json {', '.join(left_out)} is left out, which contradicts the rest or has no effect"


def _saves(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True
