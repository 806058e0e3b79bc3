"""The table of row formats: how each is told apart and turned into what the trainers take. Torch-free, pure.

Whatever the source, a row becomes one of four kinds, either as text or as messages (`[{"role", "content"}, ...]`):

- demonstrations: {prompt, completion}, {messages}, or {text};
- preferences: {prompt, chosen, rejected};
- feedback: {prompt, completion, label}, where the label says whether the completion is wanted;
- prompts: {prompt}.

Beside them a row keeps {tools} where its source has some, and the columns that a method declares, {margin} for example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from alignctl.data import converters as to
from alignctl.data.files import Row
from alignctl.data.labels import LABELS, label_column
from alignctl.data.messages import (
    NOT_TEXT,
    NOTHING,
    BadRow,
    Messages,
    is_messages,
    is_transcript,
    is_written_out,
    write_transcript,
)
from alignctl.data.tools import TOOLS, tools_of
from alignctl.data.trees import is_tree
from alignctl.data.votes import SIDES, WINNER, votes_of
from alignctl.methods.registry import methods

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
    uses: tuple[str, ...]
    """All columns that it looks at; after a point, keys of the objects in a column that are no messages."""
    matches: Callable[[Row], bool]
    """Whether a row looks like it."""
    convert: Callable[[Row], dict[str, Any] | list[dict[str, Any]]]
    """A row as trainers take it, or the rows that it gives. Raises BadRow, and KeyError for a column that is not
    there."""
    as_text: Callable[[Messages], str] | None
    """Writes messages as plain text for a tokenizer without chat template; ends with what leads to the next answer.
    None where there is no customary way."""
    taken_as: Callable[[Row], bool] | None = None
    """Whether a row can be read so where the format is named, if that is more than what looks like it."""
    votes: Callable[[Row], list[int]] | None = None
    """What several people say of a row, where they do; raises BadRow."""

    def fits(self, row: Row, is_named: bool = False) -> bool:
        """Whether a row has this format. No answer is a demonstration of which a row says whether it is wanted."""
        matches = is_named and self.taken_as or self.matches
        return matches(row) and not (self.kind == "demonstrations" and label_column(row))

    def rows(self, row: Row) -> list[dict[str, Any]]:
        """What a row gives.

        Raises:
            BadRow: It cannot be used, or carries what would be lost.
            KeyError: A column is not there.
        """
        for name in _LOST:
            if row.get(name) not in NOTHING:
                raise BadRow(f"`{name}` is not supported: {_LOST[name]}")
        for name in to.BEFORE:
            if name not in self.uses and row.get(name) not in NOTHING:
                if self.kind == "prompts" and name in TOOLS:
                    raise BadRow(f"`{name}`: completions are drawn to prompts without tools")
                raise BadRow(f"`{name}` goes before a prompt of messages, and the format `{self.name}` has none")
        if self.kind == "demonstrations" and (name := label_column(row)):
            raise BadRow(f"`{name}` says whether the answer is wanted: it may be one that nobody should imitate")
        made = self.convert(row)
        made = made if isinstance(made, list) else [made]
        return [one | {"tools": tools_of(row)} for one in made] if any(name in row for name in TOOLS) else made


_FOR_MESSAGES = ("messages", "conversations", "prompt", "chosen", "rejected")
_LOST = {
    "chat_template_kwargs": "set what the template takes in the template itself",
    **dict.fromkeys(NOT_TEXT, "models of text learn nothing from what is not text"),
}
"""Columns that say something of a prompt which nothing here would use, and why their rows are refused."""


def accepted_kinds(kind: str, use: str | None = None) -> list[str]:
    """The kinds of rows that do where one is needed: itself, then those it can be made of.

    Args:
        use: What `data.use` says.
    """
    return ["preferences"] if use and kind == "demonstrations" else [kind, *_CONVERTIBLE.get(kind, ())]


def detect_format(rows: Iterable[Row], kind: str, name: str = "auto", use: str | None = None) -> Format:
    """Finds the format that the first of some rows has that has any, or checks that one has the format named.

    A format of a kind that can be turned into the one needed is found too, where there is none of that itself.

    Args:
        use: What `data.use` says: the format is then of demonstrations made of preferences.

    Raises:
        ValueError: No format of such a kind fits a row; says which columns there are and what would fit.
    """
    rows = list(rows)
    kinds = accepted_kinds(kind, use)
    candidates = [f for k in kinds for f in FORMATS.values() if f.kind == k and name in ("auto", f.name)]
    if not candidates:
        raise ValueError(f"format `{name}` holds {FORMATS[name].kind}, but {kind} are needed: {KINDS[kind]}")
    for candidate_kind in kinds:
        for row in rows:
            for candidate in candidates:
                if candidate.kind == candidate_kind and candidate.fits(row, name != "auto") and not _written_out(row):
                    if name == "auto" and any(map(to.has_weights, rows)):
                        candidate = weighed(candidate)
                    return imitating_chosen(candidate) if use and kind == "demonstrations" else candidate
    row = rows[0]
    if column := _written_out(row):
        raise ValueError(
            f"messages are written as text in the column `{column}`: parse it into a list of messages, in a .jsonl or "
            ".parquet file"
        )
    found = ", ".join(f"`{column}`" for column in row)
    names = ", ".join(f.name for f in candidates)
    described = "; ".join(f"{f.name} ({f.columns})" for f in candidates)
    wanted = described if len(candidates) <= _DESCRIBED else f"{names}; docs/data.md has the columns of each"
    others = [k for k in KINDS if k not in kinds and any(f.kind == k and f.fits(row) for f in FORMATS.values())]
    instead = f" They would do as {_described(others[0])}, for the method {_methods_for(others[0])}." if others else ""
    if kind == "demonstrations" and others[:1] == ["preferences"]:
        instead += " To imitate the chosen completions: `data.use=chosen`."
    needed = _described("preferences" if use else kind)
    raise ValueError(
        f"the rows have the columns {found}, which are no {needed}.{instead}{_odd_label(row, kinds)}"
        f"{_guess(row, 'preferences' if use else kind)} Formats: {wanted}"
    )


_DESCRIBED = 3  # formats, of which more would not be read
_NEEDED = {
    "demonstrations": ("prompt", "completion"),
    "preferences": ("prompt", "chosen", "rejected"),
    "feedback": ("prompt", "completion", "label"),
    "prompts": ("prompt",),
}
_OTHER_NAMES = {
    "prompt": "question query problem instruction user_input input context",
    "completion": "answer response output solution reply target assistant",
    "chosen": "chosen_response chosen_answer answer_chosen better preferred good accepted winner win positive",
    "rejected": "rejected_response rejected_answer answer_rejected worse dispreferred bad loser lose negative",
    "label": "feedback vote is_good accepted correct",
}


def _guess(row: Row, kind: str) -> str:
    """What `data.columns` may be, by the names of columns; nothing where some are not known."""
    texts = {name.lower(): name for name, value in row.items() if value is not None}
    found = {
        needed: next((texts[name] for name in (needed, *_OTHER_NAMES[needed].split()) if name in texts), None)
        for needed in _NEEDED[kind]
    }
    mapped = ", ".join(f"{needed}: {name}" for needed, name in found.items() if needed != name)
    return f" Perhaps `data.columns={{{mapped}}}`." if mapped and None not in found.values() else ""


def weighed(row_format: Format) -> Format:
    """The format of the same rows where some of their messages are not trained on."""
    return FORMATS["weighed_messages"] if row_format.name in ("messages", "sharegpt") else row_format


def imitating_chosen(row_format: Format) -> Format:
    """A format of preferences as one of demonstrations: the chosen completions."""
    return replace(row_format, kind="demonstrations", convert=to.chosen_of(row_format.convert))


def _odd_label(row: Row, kinds: list[str]) -> str:
    """What is wrong with a label, where one is looked for."""
    if "demonstrations" in kinds and (name := label_column(row)):
        return (
            f" `{name}` is `{row[name]}`, which says whether an answer is wanted: of demonstrations all are. "
            "Where it means something else, call it otherwise or take it out."
        )
    odd = next((name for name in LABELS if row.get(name) is not None and not label_column(row)), None)
    if odd is None or "feedback" not in kinds:
        return ""
    return f" `{odd}` is `{row[odd]}`, which says neither that an answer is wanted nor that it is not."


def _described(kind: str) -> str:
    return f"{kind} ({KINDS[kind]})"


def _methods_for(kind: str) -> str:
    """The methods that take rows of a kind, as text."""
    *most, last = [f"`{method.name}`" for method in methods().values() if kind in accepted_kinds(method.data_kind)]
    return f"{', '.join(most)} or {last}" if most else last


def _written_out(row: Row) -> str | None:
    """The first column for messages that holds them as text, as tables of text do."""
    return next((name for name in _FOR_MESSAGES if is_written_out(row.get(name))), None)


def _has(*columns: str) -> Callable[[Row], bool]:
    return lambda row: all(row.get(column) is not None for column in columns)


def _has_messages(row: Row) -> bool:
    return is_messages(row.get("messages"))


def _instruction_text(messages: Messages) -> str:
    return "\n\n".join(message["content"] for message in messages) + "\n\n"


_INSTRUCTION = ("instruction", "input", *to.BEFORE)


def _table() -> tuple[Format, ...]:
    """The first that matches is taken, so the particular stand before the general."""
    preferences = (
        Format(
            name="hh_rlhf",
            kind="preferences",
            columns="chosen, rejected: transcripts `Human: ... Assistant: ...`",
            uses=("chosen", "rejected"),
            matches=lambda row: is_transcript(row.get("chosen")) and is_transcript(row.get("rejected")),
            convert=to.transcripts,
            as_text=write_transcript,
        ),
        Format(
            name="instruction_pair",
            kind="preferences",
            columns="instruction, chosen_response, rejected_response, or instruction, chosen, rejected",
            uses=(*_INSTRUCTION, "chosen_response", "rejected_response", "chosen", "rejected"),
            matches=lambda row: (
                _has("instruction", "chosen_response", "rejected_response")(row)
                or (_has("instruction", "chosen", "rejected")(row) and not isinstance(row["chosen"], (list, Mapping)))
            ),
            convert=to.instruction_pair,
            as_text=_instruction_text,
        ),
        Format(
            name="sharegpt_pair",
            kind="preferences",
            columns="conversations: turns with from and value; chosen, rejected: a turn, or text",
            uses=("conversations", "chosen", "rejected", *to.BEFORE),
            matches=lambda row: to.has_turns(row) and _has("chosen", "rejected")(row),
            convert=to.sharegpt_pair,
            as_text=None,
        ),
        Format(
            name="preference",
            kind="preferences",
            columns="prompt, chosen, rejected: text or messages",
            uses=("prompt", "chosen", "rejected", *to.BEFORE),
            matches=_has("prompt", "chosen", "rejected"),
            convert=to.preference,
            as_text=None,
        ),
        Format(
            name="conversation_pair",
            kind="preferences",
            columns="chosen, rejected: whole conversations as messages",
            uses=("chosen", "rejected", *to.BEFORE),
            matches=lambda row: is_messages(row.get("chosen")) and is_messages(row.get("rejected")),
            convert=to.conversations,
            as_text=None,
        ),
        Format(
            name="text_pair",
            kind="preferences",
            columns="chosen, rejected: texts that begin with their prompt, and no other text",
            uses=("chosen", "rejected"),
            matches=to.is_text_pair,
            taken_as=_has("chosen", "rejected"),
            convert=to.text_pair,
            as_text=None,
        ),
        Format(
            name="scored",
            kind="preferences",
            columns="prompt; completions, responses or answers: a list; scores or ranks: a list, or one with each",
            uses=("prompt", *_INSTRUCTION, *to.LISTS, "scores", "ranks", *to.IN_LISTS),
            matches=to.is_scored,
            convert=to.scored,
            as_text=None,
        ),
        Format(
            name="tree",
            kind="preferences",
            columns="prompt: a message with ranked replies, as Open-Assistant has them, or a row for each message",
            uses=("prompt",),
            matches=is_tree,
            convert=to.tree,
            as_text=None,
        ),
        Format(
            name="voted",
            kind="preferences",
            columns="prompt or instruction; response_a, response_b; votes: a list, or annotator1, ..., or winner",
            uses=("prompt", *_INSTRUCTION, *(name for both in SIDES for name in both), "votes", WINNER),
            matches=to.is_voted,
            convert=to.voted,
            as_text=None,
            votes=votes_of,
        ),
        Format(
            name="arena",
            kind="preferences",
            columns="conversation_a, conversation_b: messages; winner: model_a, model_b or tie",
            uses=(*to.ARENA, WINNER, *to.BEFORE),
            matches=lambda row: all(is_messages(row.get(name)) for name in to.ARENA) and _has(WINNER)(row),
            convert=to.arena,
            as_text=None,
            votes=votes_of,
        ),
    )
    demonstrations = (
        Format(
            name="weighed_messages",
            kind="demonstrations",
            columns="messages or conversations, of which some turns have the weight 0",
            uses=("messages", "conversations", *to.BEFORE),
            matches=to.has_weights,
            taken_as=to.has_conversation,
            convert=to.weighed,
            as_text=None,
        ),
        Format(
            name="messages",
            kind="demonstrations",
            columns="messages",
            uses=("messages", *to.BEFORE),
            matches=_has_messages,
            convert=to.chat,
            as_text=None,
        ),
        Format(
            name="sharegpt",
            kind="demonstrations",
            columns="conversations: turns with from and value, or messages",
            uses=("conversations", *to.BEFORE),
            matches=lambda row: to.has_turns(row) and not _has("chosen", "rejected")(row),
            convert=to.sharegpt,
            as_text=None,
        ),
        Format(
            name="exchanges",
            kind="demonstrations",
            columns="conversation: a list of objects with input and output",
            uses=("conversation", "conversation.input", "conversation.output", *to.BEFORE),
            matches=to.is_exchanges,
            convert=to.exchanges,
            as_text=None,
        ),
        Format(
            name="prompt_completion",
            kind="demonstrations",
            columns="prompt, completion: text or messages",
            uses=("prompt", "completion", *to.BEFORE),
            matches=_has("prompt", "completion"),
            convert=to.completion,
            as_text=None,
        ),
        Format(
            name="instruction",
            kind="demonstrations",
            columns="instruction, output, and input where there is one",
            uses=(*_INSTRUCTION, "output"),
            matches=_has("instruction", "output"),
            convert=to.instructed,
            as_text=_instruction_text,
        ),
        Format(
            name="best_of_tree",
            kind="demonstrations",
            columns="prompt: a message with replies, as Open-Assistant has them, or a row for each message",
            uses=("prompt",),
            matches=is_tree,
            convert=to.best_of_tree,
            as_text=None,
        ),
        Format(
            name="text",
            kind="demonstrations",
            columns="text",
            uses=("text",),
            matches=lambda row: isinstance(row.get("text"), str),
            convert=to.text,
            as_text=None,
        ),
    )
    prompts = (
        Format(
            name="prompt",
            kind="prompts",
            columns="prompt: text or messages, and no completion",
            uses=("prompt", "system", "history"),
            matches=lambda row: (
                _has("prompt")(row)
                and not isinstance(row["prompt"], Mapping)
                and not {"chosen", "completion", "completions"} & row.keys()
            ),
            convert=to.prompt,
            as_text=None,
        ),
    )
    by_name = {one.name: one for one in demonstrations}
    steps = Format(
        name="steps",
        kind="feedback",
        columns="prompt, completions: the steps of a solution; labels: whether each is right",
        uses=("prompt", "completions", "labels", *to.BEFORE),
        matches=to.is_steps,
        convert=to.steps,
        as_text=None,
    )
    labelled = ("messages", "sharegpt", "instruction", "prompt_completion")
    feedback = tuple(_judged(by_name[name], f"{name}_feedback") for name in labelled)
    return (*preferences, *feedback, steps, *demonstrations, *prompts)


def _judged(row_format: Format, name: str) -> Format:
    """A format of demonstrations with a label."""
    return replace(
        row_format,
        name="feedback" if name == "prompt_completion_feedback" else name,
        kind="feedback",
        columns=f"{row_format.columns}; label: true or false",
        uses=(*row_format.uses, *LABELS),
        matches=lambda row: row_format.matches(row) and label_column(row) is not None,
        convert=to.judged(row_format.convert),
    )


FORMATS: dict[str, Format] = {row_format.name: row_format for row_format in _table()}
