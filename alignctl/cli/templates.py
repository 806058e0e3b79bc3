"""Lists the chat templates that come with alignctl, and shows one. Torch-free."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from alignctl.cli.terminal import two_columns
from alignctl.config.suggest import did_you_mean
from alignctl.data.templates import TEMPLATES, ChatTemplate, read_template
from alignctl.errors import RequestError

_OWN = "the tokenizer's end token"


def describe_templates(name: str | None) -> list[dict[str, Any]] | dict[str, Any]:
    """The table of templates for `--json`, or one of them with its text."""
    if name is None:
        return [asdict(template) for template in TEMPLATES.values()]
    return asdict(_named(name)) | {"text": read_template(name)}


def render_templates(name: str | None) -> str:
    """The table of templates for people, or the text of one, to be kept as a file."""
    if name is not None:
        return read_template(_named(name).name)
    width = max(map(len, TEMPLATES))
    blocks = []
    for template in TEMPLATES.values():
        facts = [
            f"of {template.models}",
            f"writes {', '.join(template.writes)}; an answer ends with {template.end or _OWN}",
            template.note,
            template.source,
        ]
        first, *others = facts
        lines = [two_columns(template.name, first, width), *(two_columns("", fact, width) for fact in others)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n\n" + _USE


_USE = """\
Use one with `model.chat_template=NAME`, and `model.eos_token` where an answer ends with another token than the
tokenizer's own. `alignctl templates NAME > FILE` writes one to change: `model.chat_template=FILE`.
"""


def _named(name: str) -> ChatTemplate:
    """A template that comes with alignctl.

    Raises:
        RequestError: There is none of that name.
    """
    if name not in TEMPLATES:
        raise RequestError(f"there is no chat template `{name}`", did_you_mean(name, TEMPLATES))
    return TEMPLATES[name]
