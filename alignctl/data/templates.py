"""Chat templates that come with alignctl, and what `model.chat_template` may be. Torch-free.

The files in chat_templates/ are written from public descriptions of the formats, and mark what the assistant says for
assistant-only loss. What rows lose in a template is looked at by rendering.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent / "chat_templates"


@dataclass(frozen=True)
class ChatTemplate:
    """A format that models are trained on."""

    name: str
    models: str
    """That speak it."""
    end: str | None
    """Token that ends an answer; None for the tokenizer's own."""
    writes: tuple[str, ...]
    """What of `system`, `tools` and `thoughts` it has a place for. Roles without one are refused."""
    note: str
    """What people may not expect."""
    source: str
    """Where the format is described."""

    @property
    def file(self) -> Path:
        return _FOLDER / f"{self.name}.jinja"


TEMPLATES: dict[str, ChatTemplate] = {
    template.name: template
    for template in (
        ChatTemplate(
            name="alpaca",
            models="Alpaca and others that learnt from instructions",
            end=None,
            writes=("system",),
            note="begins with the preamble of Alpaca where there is no system message",
            source="https://github.com/tatsu-lab/stanford_alpaca#data-release",
        ),
        ChatTemplate(
            name="chatml",
            models="Qwen 2, OpenHermes, Yi and many others",
            end="<|im_end|>",
            writes=("system",),
            note="writes any role as it is called",
            source="https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md",
        ),
        ChatTemplate(
            name="deepseek-r1",
            models="DeepSeek-R1 and its distilled models",
            end="<｜end▁of▁sentence｜>",
            writes=("system", "thoughts"),
            note="thoughts of the last answer are written, those of earlier turns are left out",
            source="https://huggingface.co/deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
        ),
        ChatTemplate(
            name="gemma",
            models="Gemma 1 to 3",
            end="<end_of_turn>",
            writes=("system",),
            note="what the system says begins the first turn of the user",
            source="https://ai.google.dev/gemma/docs/core/prompt-structure",
        ),
        ChatTemplate(
            name="llama3",
            models="Llama 3",
            end="<|eot_id|>",
            writes=("system",),
            note="white space around what is said is cut off; without the dates that Llama 3.1 writes",
            source="https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3/",
        ),
        ChatTemplate(
            name="mistral",
            models="Mistral 7B 0.3, Mixtral 8x22B, Mistral Large 2407 (tokenizer version 3)",
            end=None,
            writes=("system", "tools"),
            note="system and tools stand before what the user said last, so earlier turns do not see them",
            source="https://github.com/mistralai/cookbook/blob/main/concept-deep-dive/tokenization/chat_templates.md",
        ),
        ChatTemplate(
            name="phi4",
            models="Phi-4",
            end="<|im_end|>",
            writes=("system",),
            note="ChatML with `<|im_sep|>` in place of line breaks",
            source="https://huggingface.co/microsoft/phi-4#input-formats",
        ),
        ChatTemplate(
            name="qwen3",
            models="Qwen 3",
            end="<|im_end|>",
            writes=("system", "tools", "thoughts"),
            note="a last answer without thoughts gets empty ones, those of earlier turns are left out",
            source="https://huggingface.co/Qwen/Qwen3-8B#quickstart",
        ),
        ChatTemplate(
            name="vicuna",
            models="Vicuna 1.1 and later",
            end=None,
            writes=("system",),
            note="begins with the preamble of Vicuna where there is no system message",
            source="https://github.com/lm-sys/FastChat/blob/main/docs/vicuna_weights_version.md#prompt-template",
        ),
        ChatTemplate(
            name="zephyr",
            models="Zephyr, TinyLlama",
            end=None,
            writes=("system",),
            note="begins without the tokenizer's first token, as Zephyr's own",
            source="https://huggingface.co/HuggingFaceH4/zephyr-7b-beta",
        ),
    )
}


def is_text(given: str) -> bool:
    """Whether this is a template itself, and no name or file."""
    return "{{" in given or "{%" in given


def template_file(given: str) -> Path | None:
    """The file of a template that comes with alignctl, whatever else is called so, or of the user; None for a text."""
    if is_text(given):
        return None
    return TEMPLATES[given].file if given in TEMPLATES else Path(given).expanduser()


def read_template(given: str) -> str:
    """The Jinja text of a name, a file or a text."""
    file = template_file(given)
    return file.read_text(encoding="utf-8") if file else given
