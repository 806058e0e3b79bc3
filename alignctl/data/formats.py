"""The table of row formats: how each is told apart and turned into what the trainers take. Torch-free, pure.

Whatever the source, a row becomes one of four kinds, either as text or as messages (`[{"role", "content"}, ...]`):

- demonstrations: {prompt, completion}, {messages}, or {text};
- preferences: {prompt, chosen, rejected};
- feedback: {prompt, completion, label}, where the label says whether the completion is wanted;
- prompts: {prompt}.

Beside them a row keeps the columns that a method declares, {margin} for example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from alignctl.data.messages import (
    BadRow,
    Messages,
    as_answer,
    cleaned,
    content_of,
    is_messages,
    is_transcript,
    is_written_out,
    read_transcript,
    write_transcript,
)
from alignctl.methods.registry import methods

Row = Mapping[str, Any]

KINDS = {
    "demonstrations": "answers to imitate",
    "preferences": "two completions of each prompt, one of them chosen",
    "feedback": "single completions, each labelled as wanted or not",
    "prompts": "prompts to answer",
}
"""What rows can be, for people."""

_CONVERTIBLE = {"feedback": ("preferences",), "prompts": ("preferences", "feedback", "demonstrations")}
"""Kinds whose rows can be made of rows of other kinds."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One row format."""

    name: str
    kind: str
    """`demonstrations`, `preferences`, `feedback` or `prompts`."""
    columns: str
    """The columns it needs, for people."""
    matches: Callable[[Row], bool]
    convert: Callable[[Row], dict[str, Any]]
    """Raises BadRow."""
    as_text: Callable[[Messages], str] | None
    """Writes messages as plain text for a tokenizer without chat template; ends with what leads to the next answer.
    None where there is no customary way."""


def accepted_kinds(kind: str) -> list[str]:
    """The kinds of rows that do where one is needed: itself, then those it can be made of."""
    return [kind, *_CONVERTIBLE.get(kind, ())]


def detect_format(rows: Iterable[Row], kind: str, name: str = "auto") -> Format:
    """Finds the format that the first of some rows has that has any, or checks that one has the format named.

    A format of a kind that can be turned into the one needed is found too, where there is none of that itself.

    Raises:
        ValueError: No format of such a kind fits a row; says which columns there are and what would fit.
    """
    rows = list(rows)
    kinds = accepted_kinds(kind)
    candidates = [f for k in kinds for f in FORMATS.values() if f.kind == k and name in ("auto", f.name)]
    if not candidates:
        raise ValueError(f"format `{name}` holds {FORMATS[name].kind}, but {kind} are needed: {KINDS[kind]}")
    for candidate_kind in kinds:
        for row in rows:
            for candidate in candidates:
                if candidate.kind == candidate_kind and candidate.matches(row) and not _is_written_out(row):
                    return candidate
    row = rows[0]
    if _is_written_out(row):
        raise ValueError("messages are written as text in this file; save the rows as .jsonl or .parquet")
    found = ", ".join(f"`{column}`" for column in row)
    wanted = "; ".join(f"{f.name} ({f.columns})" for f in candidates)
    others = [k for k in KINDS if k not in kinds and any(f.kind == k and f.matches(row) for f in FORMATS.values())]
    instead = f" They would do as {_described(others[0])}, for the method {_methods_for(others[0])}." if others else ""
    raise ValueError(f"the rows have the columns {found}, which are no {_described(kind)}.{instead} Formats: {wanted}")


def _described(kind: str) -> str:
    return f"{kind} ({KINDS[kind]})"


def _methods_for(kind: str) -> str:
    """The methods that take rows of a kind, as text."""
    *most, last = [f"`{method.name}`" for method in methods().values() if kind in accepted_kinds(method.data_kind)]
    return f"{', '.join(most)} or {last}" if most else last


def _is_written_out(row: Row) -> bool:
    """Whether a column holds messages as text, as tables of text do."""
    return any(map(is_written_out, row.values()))


# --- preferences


def _has(*columns: str) -> Callable[[Row], bool]:
    return lambda row: all(row.get(column) is not None for column in columns)


def _pair(prompt: Any, chosen: Any, rejected: Any) -> dict[str, Any]:
    """A preference row, refused where nothing can be learnt from it."""
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        if not content_of(completion).strip():
            raise BadRow(f"the {name} completion is empty")
    if content_of(chosen) == content_of(rejected):
        raise BadRow("chosen and rejected are the same")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _convert_hh(row: Row) -> dict[str, Any]:
    chosen, rejected = read_transcript(row["chosen"]), read_transcript(row["rejected"])
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[-1]["role"] != "assistant":
            raise BadRow(f"the {name} transcript does not end with the assistant")
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("the transcripts do not share a prompt")
    return _pair(chosen[:-1], chosen[-1:], rejected[-1:])


def _convert_preference(row: Row) -> dict[str, Any]:
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    if is_messages(chosen) and is_messages(rejected):
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if len(chosen) > 1 or len(rejected) > 1:  # whole conversations: the prompt is in them too
            return _convert_conversations(row)
        return _pair(cleaned(prompt), cleaned(chosen), cleaned(rejected))
    if not all(isinstance(part, str) for part in (prompt, chosen, rejected)):
        raise BadRow("prompt, chosen and rejected must all be text, or all be messages")
    return _pair(prompt, chosen, rejected)


def _convert_conversations(row: Row) -> dict[str, Any]:
    chosen, rejected = cleaned(row["chosen"]), cleaned(row["rejected"])
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("the conversations do not share a prompt")
    return _pair(chosen[:-1], chosen[-1:], rejected[-1:])


def _convert_instruction_pair(row: Row) -> dict[str, Any]:
    chosen = row.get("chosen_response", row.get("chosen"))
    rejected = row.get("rejected_response", row.get("rejected"))
    return _pair(_instruction(row), as_answer(chosen), as_answer(rejected))


def _instruction(row: Row) -> Messages:
    parts = [str(row.get(column) or "").strip() for column in ("instruction", "input")]
    if not parts[0]:
        raise BadRow("the instruction is empty")
    return [{"role": "user", "content": "\n\n".join(part for part in parts if part)}]


def _instruction_text(messages: Messages) -> str:
    return "\n\n".join(message["content"] for message in messages) + "\n\n"


# --- feedback

_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def _label(row: Row) -> bool:
    label = _LABELS.get(str(row["label"]).strip().lower())
    if label is None:
        raise BadRow(f"`label` must be true or false, got `{row['label']}`")
    return label


def _convert_feedback(row: Row) -> dict[str, Any]:
    return _convert_completion(row) | {"label": _label(row)}


def _convert_messages_feedback(row: Row) -> dict[str, Any]:
    messages = _answered(cleaned(row["messages"]))["messages"]
    if len(messages) < 2:
        raise BadRow("the conversation has no prompt")
    return {"prompt": messages[:-1], "completion": messages[-1:], "label": _label(row)}


def unpair(row: Row) -> list[dict[str, Any]]:
    """The two completions of a preference row as feedback: the chosen one wanted, the rejected one not."""
    return [
        {"prompt": row["prompt"], "completion": row[completion], "label": label}
        for completion, label in (("chosen", True), ("rejected", False))
    ]


# --- demonstrations

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


def _is_judged(row: Row) -> bool:
    """Whether a row says if its answer is wanted: it may be one nobody should imitate."""
    return str(row.get("label")).strip().lower() in _LABELS


def _answered(messages: Messages) -> dict[str, Any]:
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise BadRow("the conversation does not end with an answer")
    return {"messages": messages}


def _convert_sharegpt(row: Row) -> dict[str, Any]:
    messages = []
    for turn in row["conversations"]:
        role = _SHAREGPT_ROLES.get(turn.get("from"))
        if role is None:
            raise BadRow(f"unknown speaker `{turn.get('from')}`")
        messages.append({"role": role, "content": str(turn.get("value") or "")})
    return _answered(messages)


def _convert_completion(row: Row) -> dict[str, Any]:
    prompt, completion = row["prompt"], row["completion"]
    if is_messages(completion) and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if is_messages(completion):
        prompt, completion = cleaned(prompt), cleaned(completion)
    elif not (isinstance(prompt, str) and isinstance(completion, str)):
        raise BadRow("prompt and completion must both be text, or both be messages")
    if not content_of(completion).strip():
        raise BadRow("the completion is empty")
    return {"prompt": prompt, "completion": completion}


def _convert_prompt(row: Row) -> dict[str, Any]:
    prompt = row["prompt"]
    if is_messages(prompt):
        return {"prompt": cleaned(prompt)}
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadRow("the prompt is empty, or neither text nor messages")
    return {"prompt": prompt}


def _convert_instruction(row: Row) -> dict[str, Any]:
    return _convert_completion({"prompt": _instruction(row), "completion": as_answer(row["output"])})


def _convert_text(row: Row) -> dict[str, Any]:
    if not str(row["text"]).strip():
        raise BadRow("the text is empty")
    return {"text": str(row["text"])}


FORMATS: dict[str, Format] = {
    row_format.name: row_format
    for row_format in (
        # The first that matches is taken, so the particular stand before the general.
        Format(
            name="hh_rlhf",
            kind="preferences",
            columns="chosen, rejected: transcripts `Human: ... Assistant: ...`",
            matches=lambda row: is_transcript(row.get("chosen")) and is_transcript(row.get("rejected")),
            convert=_convert_hh,
            as_text=write_transcript,
        ),
        Format(
            name="instruction_pair",
            kind="preferences",
            columns="instruction, chosen_response, rejected_response, or instruction, chosen, rejected",
            matches=lambda row: (
                _has("instruction", "chosen_response", "rejected_response")(row)
                or (_has("instruction", "chosen", "rejected")(row) and isinstance(row["chosen"], str))
            ),
            convert=_convert_instruction_pair,
            as_text=_instruction_text,
        ),
        Format(
            name="preference",
            kind="preferences",
            columns="prompt, chosen, rejected: text or messages",
            matches=_has("prompt", "chosen", "rejected"),
            convert=_convert_preference,
            as_text=None,
        ),
        Format(
            name="conversation_pair",
            kind="preferences",
            columns="chosen, rejected: whole conversations as messages",
            matches=lambda row: is_messages(row.get("chosen")) and is_messages(row.get("rejected")),
            convert=_convert_conversations,
            as_text=None,
        ),
        Format(
            name="feedback",
            kind="feedback",
            columns="prompt, completion: text or messages; label: true or false",
            matches=lambda row: _has("prompt", "completion")(row) and _is_judged(row),
            convert=_convert_feedback,
            as_text=None,
        ),
        Format(
            name="messages_feedback",
            kind="feedback",
            columns="messages; label: true or false",
            matches=lambda row: is_messages(row.get("messages")) and _is_judged(row),
            convert=_convert_messages_feedback,
            as_text=None,
        ),
        Format(
            name="messages",
            kind="demonstrations",
            columns="messages",
            matches=lambda row: is_messages(row.get("messages")) and not _is_judged(row),
            convert=lambda row: _answered(cleaned(row["messages"])),
            as_text=None,
        ),
        Format(
            name="sharegpt",
            kind="demonstrations",
            columns="conversations: turns with from and value",
            matches=lambda row: (
                isinstance(row.get("conversations"), list)
                and bool(row["conversations"])
                and "from" in row["conversations"][0]
            ),
            convert=_convert_sharegpt,
            as_text=None,
        ),
        Format(
            name="prompt_completion",
            kind="demonstrations",
            columns="prompt, completion: text or messages",
            matches=lambda row: _has("prompt", "completion")(row) and not _is_judged(row),
            convert=_convert_completion,
            as_text=None,
        ),
        Format(
            name="instruction",
            kind="demonstrations",
            columns="instruction, output, and input where there is one",
            matches=_has("instruction", "output"),
            convert=_convert_instruction,
            as_text=_instruction_text,
        ),
        Format(
            name="prompt",
            kind="prompts",
            columns="prompt: text or messages, and no completion",
            matches=lambda row: _has("prompt")(row) and not {"chosen", "completion"} & row.keys(),
            convert=_convert_prompt,
            as_text=None,
        ),
        Format(
            name="text",
            kind="demonstrations",
            columns="text",
            matches=lambda row: isinstance(row.get("text"), str),
            convert=_convert_text,
            as_text=None,
        ),
    )
}
