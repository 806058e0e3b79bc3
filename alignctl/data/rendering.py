"""How rows are written for a model, looked at before anything is trained: one table of checks. Torch-free.

stage/rows.py asks about all rows of a stage, as its tokenizer and chat template write them; trainers, which know the
model, ask whether it would learn to stop. Tokens without a row of embeddings are looked for where a model is loaded
(models/vocabulary.py).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError

from alignctl.data.messages import Messages, content_of, is_messages
from alignctl.data.tokenizing import common_prefix, ended, text_ids
from alignctl.errors import RequestError

_CLOSELY = 100  # rows that are tokenised to be looked at
_LAST = 4  # tokens: templates write a line break after the end token
_SHOWN = 60  # characters of a text in a message
_ANSWERS = ("completion", "chosen", "rejected")
# Of the templates that are best known; none is a word that people write.
_MARKS = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|(?:system|user|assistant)\|>|<｜User｜>|\[/?INST\]"
    r"|### (?:Instruction|Response):"
)
_WRITTEN_MARKS = re.compile(r"<[|｜][^<>|｜\s]+[|｜]>|<(?:start|end)_of_turn>")
_ROLES = ("user", "assistant", "system", "developer", "tool")  # that templates know, or refuse
_OTHER_CALL = {"name": "-", "arguments": {}}
_GENERATION = re.compile(r"\{%-?\s*generation\b")


class Said(NamedTuple):
    """What is said of rows."""

    left_out: dict[int, str]
    """Rows that cannot be trained on, by position, and why."""
    notices: list[str]


@dataclass(frozen=True)
class Reader:
    """What rows are written with."""

    tokenizer: Any
    assistant_only: bool = False
    """Whether the marks of the template say what is trained on."""

    @cached_property
    def special(self) -> re.Pattern[str] | None:
        """Finds the tokenizer's special tokens in a text, and others that were added for marks of the template."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        marks = set(_WRITTEN_MARKS.findall(str(self.tokenizer.chat_template or "")))
        tokens = {str(token) for token in added if token.special or str(token) in marks}
        tokens |= set(self.tokenizer.all_special_tokens)
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None

    @cached_property
    def marks_answers(self) -> bool:
        return _GENERATION.search(str(self.tokenizer.chat_template or "")) is not None


@dataclass
class Conversation:
    """A prompt and one answer to it, or a text alone: all messages, or all text."""

    reader: Reader
    prompt: Messages | str
    answer: Messages | str
    tools: list[Any]
    """What may be called, as far as the template writes it."""

    @property
    def messages(self) -> Messages:
        """All that is said; none where it is text."""
        return [*self.prompt, *self.answer] if is_messages(self.prompt or self.answer) else []

    @cached_property
    def text(self) -> str:
        """As it is trained on.

        Raises:
            TemplateError, ValueError, TypeError: The template does not take it.
        """
        if self.messages:
            return self._templated(self.messages)
        return self.prompt + ended(self.answer, self.reader.tokenizer.eos_token) if self.answer else str(self.prompt)

    @cached_property
    def asked(self) -> str:
        """The prompt as a policy is asked it."""
        return self._templated(self.prompt, add_generation_prompt=True) if self.messages else str(self.prompt)

    @cached_property
    def begins_as_asked(self) -> bool:
        """Whether the prompt is written as it is asked; not where the template does not take it alone."""
        try:
            return self.text.startswith(self.asked)
        except (TemplateError, ValueError, TypeError):
            return False

    @cached_property
    def ids(self) -> list[int]:
        return self.ids_of(self.text)

    def ids_of(self, text: str) -> list[int]:
        return text_ids(self.reader.tokenizer, text, special=not self.messages)

    def without_tools(self) -> str:
        return self._templated(self.messages, tools=None)

    def with_other_calls(self, place: int) -> str:
        """As it would be written if the message there called other tools."""
        messages = list(self.messages)
        calls = [call | {"function": _OTHER_CALL} for call in messages[place]["tool_calls"]]
        messages[place] = messages[place] | {"tool_calls": calls}
        return self._templated(messages)

    def without_system(self) -> str:
        return self._templated([message for message in self.messages if message["role"] != "system"])

    def assistant_mask(self) -> list[int]:
        """1 for each token that the template marks as the assistant's."""
        return self.reader.tokenizer.apply_chat_template(
            self.messages, tools=self.tools or None, return_dict=True, return_assistant_tokens_mask=True
        )["assistant_masks"]

    def _templated(self, messages: Messages, **more: Any) -> str:
        options = {"tools": self.tools or None} | more
        return self.reader.tokenizer.apply_chat_template(messages, tokenize=False, **options)


@dataclass
class Row:
    """A row of a trainer's columns, see formats.py."""

    reader: Reader
    columns: Mapping[str, Any]

    @cached_property
    def conversations(self) -> list[Conversation]:
        columns = self.columns
        if "messages" in columns:
            pairs = [(columns["messages"][:-1], columns["messages"][-1:])]
        elif "text" in columns:
            pairs = [("", columns["text"])]
        else:
            answers = [columns[column] for column in _ANSWERS if column in columns]
            prompt = columns.get("prompt") or ""
            pairs = [(prompt, answer) for answer in answers or [[] if is_messages(prompt) else ""]]
        tools = columns.get("tools") or []
        return [Conversation(self.reader, prompt, answer, tools) for prompt, answer in pairs]


@dataclass(frozen=True)
class Check:
    """Something that may be wrong with how a row is written."""

    name: str
    look: Callable[[Row], str | None]
    """What is seen, in words; None where nothing is."""
    effect: Literal["leaves out", "refuses", "tells"]
    """What follows: the row is left out, the run is refused, or people are told once."""
    advice: str = ""
    """What to do; a row that is left out is named with the reason alone."""
    rows: int | None = None
    """At so many of the first rows is looked, which is dear; None for all."""


def check_rows(
    reader: Reader, rows: Iterable[Mapping[str, Any]], numbers: Sequence[int] | None = None, source: str = "the rows"
) -> Said:
    """Looks at rows as they are written.

    Args:
        numbers: Of the rows in their source; else they are counted from 1.
        source: For people.

    Raises:
        RequestError: A check that refuses the run saw something.
    """
    left_out: dict[int, str] = {}
    told: dict[str, tuple[int, str]] = {}
    count: Counter[str] = Counter()
    for position, columns in enumerate(rows):
        number, row = numbers[position] if numbers else position + 1, Row(reader, columns)
        for check in CHECKS:
            if (check.rows is not None and position >= check.rows) or (seen := check.look(row)) is None:
                continue
            if check.effect == "refuses":
                raise RequestError(f"{source}, row {number}: {seen}", check.advice)
            if check.effect == "leaves out":
                left_out[position] = seen
                break
            told.setdefault(check.name, (number, seen))
            count[check.name] += 1
    notices = [_notice(check, *told[check.name], count[check.name]) for check in CHECKS if check.name in told]
    return Said(left_out, notices)


def _notice(check: Check, number: int, seen: str, count: int) -> str:
    of = f" of the first {check.rows}" if check.rows else ""
    more = f" and {count - 1:,} more{of}" if count > 1 else ""
    return f"row {number:,}{more}: {seen}; {check.advice}"


def check_has_end(tokenizer: Any) -> None:
    """Whether a tokenizer has a token that ends an answer.

    Raises:
        RequestError: It has not.
    """
    if tokenizer.eos_token is None:
        special = ", ".join(f"`{token}`" for token in tokenizer.all_special_tokens)
        raise RequestError(
            "the tokenizer has no end token, so that no answer could end",
            f"name one of its tokens with `model.eos_token=...`; its special tokens are {special or 'none'}",
        )


def check_end_is_trained(
    ends: Iterable[int], tokenizer: Any, answers: Sequence[list[int]], anywhere: bool = False
) -> None:
    """A model that is never trained to end an answer talks on until it is cut off.

    Args:
        ends: Every token that ends an answer.
        answers: The tokens that are trained on, of some rows that are not cut; others may be -100.
        anywhere: Whether an end token may stand anywhere in a row, which is several rows packed, and not at its end.

    Raises:
        RequestError: No answer ends with an end token.
    """
    ends = set(ends)
    trained = [tokens for tokens in ([token for token in answer if token >= 0] for answer in answers) if tokens]
    last = 0 if anywhere else -_LAST
    if not trained or any(not ends.isdisjoint(tokens[last:]) for tokens in trained):
        return
    names = " or ".join(f"`{token}`" for token in tokenizer.convert_ids_to_tokens(sorted(ends)))
    raise RequestError(
        f"the model would never learn to stop: no answer ends with {names or 'an end token'}; the first one that is "
        f"trained on ends with {tokenizer.decode(trained[0][-8:])!r}",
        "name the token that ends an answer with `model.eos_token=...`, or give a chat template that writes it with "
        "`model.chat_template=FILE`",
    )


# --- what is looked for


def _each(look: Callable[[Conversation], str | None]) -> Callable[[Row], str | None]:
    return lambda row: next((seen for one in row.conversations if (seen := look(one)) is not None), None)


def _not_taken(one: Conversation) -> str | None:
    try:
        one.text  # noqa: B018
    except (TemplateError, ValueError, TypeError) as error:
        reason = str(error)
    else:
        return None
    if any(message["role"] == "system" for message in one.messages):
        try:
            one.without_system()
        except (TemplateError, ValueError, TypeError):
            return reason
        return f"{reason} (without its system message the template takes it)"
    return reason


def _prompt_not_taken(row: Row) -> str | None:
    if not row.columns.get("prompt"):
        return None  # nothing is written but the whole
    try:
        row.conversations[0].asked  # noqa: B018
    except (TemplateError, ValueError, TypeError) as error:
        return f"of the prompt alone: {error}"
    return None


def _not_an_answer(one: Conversation) -> str | None:
    if is_messages(one.answer) and one.answer[-1]["role"] != "assistant":
        return f"the last message is of the role `{one.answer[-1]['role']}`, and not the assistant's"
    return None


def _alike(row: Row) -> str | None:
    texts = [one.text for one in row.conversations]
    return "chosen and rejected are the same as they are written" if len(texts) == 2 and texts[0] == texts[1] else None


def _nothing_marked(one: Conversation) -> str | None:
    if one.messages and one.reader.assistant_only and one.reader.marks_answers and not any(one.assistant_mask()):
        return "the chat template marks nothing of it as the assistant's, so nothing would be trained on"
    return None


def _left_out(one: Conversation) -> str | None:
    for message in one.messages:
        said = str(message.get("content") or "").rpartition("</think>")[2].strip()
        # What a tool gives back templates may write as JSON.
        if said not in one.text and json.dumps(said, ensure_ascii=False)[1:-1] not in one.text:
            return f"the chat template leaves out what the {message['role']} says: {said[:_SHOWN]!r}"
    return None


def _thoughts(message: Mapping[str, Any]) -> str:
    """What a message thinks before it says something."""
    if isinstance(reasoning := message.get("reasoning_content"), str):
        return reasoning.strip()
    before, end, _ = str(message.get("content") or "").partition("</think>")
    return before.rpartition("<think>")[2].strip() if end else ""


def _thoughts_left_out(one: Conversation) -> str | None:
    if is_messages(one.answer) and any(_thoughts(message) not in one.text for message in one.answer):
        return "the chat template leaves out the thoughts (reasoning) of the answer, which are to be learnt"
    return None


def _earlier_thoughts_left_out(one: Conversation) -> str | None:
    if is_messages(one.prompt) and any(_thoughts(message) not in one.text for message in one.prompt):
        return "the chat template leaves out the thoughts (reasoning) of earlier turns"
    return None


def _tools_left_out(one: Conversation) -> str | None:
    names = [tool["function"]["name"] for tool in one.tools]
    missing = names[:1] if one.tools and one.text == one.without_tools() else [n for n in names if n not in one.text]
    return f"the chat template leaves out tools: `{missing[0]}`" if missing else None


def _calls_left_out(one: Conversation) -> str | None:
    """A call is written where its name and its arguments stand more often in the text than with another call in its
    place: the list of tools has the name, too."""
    for place, message in enumerate(one.messages):
        if not (calls := message.get("tool_calls")):
            continue
        try:
            otherwise = one.with_other_calls(place)
        except (TemplateError, ValueError, TypeError):
            otherwise = ""  # not taken; then what is written has to be there at all
        for function in (call["function"] for call in calls):
            for part in [function["name"], *_leaves(function["arguments"])]:
                if not any(one.text.count(form) > otherwise.count(form) for form in _written(part)):
                    return f"the chat template leaves out a call of the tool `{function['name']}`: {part!r:.{_SHOWN}}"
    return None


def _leaves(value: Any) -> Iterator[Any]:
    """The keys of objects, and what is neither an object nor a list, or an empty text."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(key)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif not isinstance(value, str) or value.strip():
        yield value


def _written(value: Any) -> set[str]:
    """The ways in which templates write a value: as it is, as JSON, or as JSON in a text of JSON."""
    if not isinstance(value, str):
        return {json.dumps(value), str(value)}
    said = value.strip()
    as_json = {json.dumps(said, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True)}
    return {said} | as_json | {json.dumps(one, ensure_ascii=False)[1:-1] for one in as_json}


def _name_left_out(one: Conversation) -> str | None:
    for message in one.messages:
        name = message.get("name")
        if name and message["role"] != "tool" and name not in one.text:  # a tool's stands with its call
            return f"the chat template leaves out who speaks: `{name}`"
    return None


def _begins_twice(one: Conversation) -> str | None:
    first = one.reader.tokenizer.bos_token_id
    if first is not None and one.ids[:2] == [first, first]:
        return f"it begins with the token `{one.reader.tokenizer.bos_token}` twice"
    return None


def _said(one: Conversation) -> Iterator[tuple[str, str]]:
    """Who says what; of a text without the tokens it may begin and end with."""
    if one.messages:
        yield from ((f"the {message['role']}", str(message.get("content") or "")) for message in one.messages)
        return
    tokenizer = one.reader.tokenizer
    text = one.prompt + content_of(one.answer)
    yield "the text", text.removeprefix(tokenizer.bos_token or "").removesuffix(tokenizer.eos_token or "")


def _special_token(one: Conversation) -> str | None:
    for who, said in _said(one):
        found = one.reader.special and one.reader.special.search(said)
        if found and (one.messages or not _MARKS.search(said)):
            return f"{who} has `{found[0]}`, a special token that is read as the token and not as what is written"
    return None


def _templated_text(one: Conversation) -> str | None:
    found = None if one.messages else _MARKS.search(one.prompt + content_of(one.answer))
    return f"the text has `{found[0]}`: it looks as if a chat template had written it already" if found else None


def _unknown_role(one: Conversation) -> str | None:
    role = next((message["role"] for message in one.messages if message["role"] not in _ROLES), None)
    return role and f"a message has the role `{role}`, and the chat template writes it"


def _asked_otherwise(one: Conversation) -> str | None:
    if one.messages and one.prompt and one.answer and not one.begins_as_asked:
        return (
            "the chat template writes a prompt otherwise when no answer follows it: answers are learnt after another "
            "text than the one they are asked with"
        )
    return None


def _merged(one: Conversation) -> str | None:
    if not one.prompt or not one.answer or not one.begins_as_asked:
        return None
    asked = one.ids_of(one.asked)
    if common_prefix(asked, one.ids) == len(asked):
        return None
    return f"the prompt's end {one.asked[-8:]!r} merges with the answer into other tokens, and is learnt as part of it"


def _prompt_is_answered(one: Conversation) -> str | None:
    if is_messages(one.prompt) and one.prompt[-1]["role"] == "assistant":
        return "the prompt ends with what the assistant says, and another answer begins behind it"
    return None


def _unknown(one: Conversation) -> str | None:
    tokenizer = one.reader.tokenizer
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in one.ids:
        return f"the tokenizer cannot write all characters: some become `{tokenizer.unk_token}`"
    return None


def _taken_apart(one: Conversation) -> str | None:
    if not one.messages:
        return None
    marks = dict.fromkeys(_WRITTEN_MARKS.findall(str(one.reader.tokenizer.chat_template)))
    known = one.reader.tokenizer.get_vocab()
    if unknown := [mark for mark in marks if mark in one.text and mark not in known]:
        names = ",".join(unknown)
        return f"the tokenizer has no token for `{names}` of the chat template and takes it apart"
    return None


_OTHER_TEMPLATE = "give another template with `model.chat_template=...` (`alignctl templates` has some)"
_TOOL_TEMPLATE = (
    "give a template that writes them, `model.chat_template=qwen3` for example; or `mistral`, where calls have an `id` "
    "of nine characters"
)

CHECKS: tuple[Check, ...] = (
    Check("the template refuses the row", _each(_not_taken), "leaves out"),
    Check("the template refuses the prompt alone", _prompt_not_taken, "leaves out"),
    Check("the last message is not the assistant's", _each(_not_an_answer), "leaves out"),
    Check("chosen and rejected are written alike", _alike, "leaves out"),
    Check("no token is marked as the assistant's", _each(_nothing_marked), "leaves out"),
    Check("names of speakers are left out", _each(_name_left_out), "leaves out"),
    Check("what somebody says is left out", _each(_left_out), "refuses", _OTHER_TEMPLATE),
    Check(
        "thoughts of the answer are left out",
        _each(_thoughts_left_out),
        "refuses",
        "give a template that writes them, `model.chat_template=qwen3` or `deepseek-r1` for example, or take the "
        "thoughts out of the rows",
    ),
    Check(
        "tools are left out",
        _each(_tools_left_out),
        "refuses",
        _TOOL_TEMPLATE,
    ),
    Check("calls of tools are left out", _each(_calls_left_out), "refuses", _TOOL_TEMPLATE),
    Check(
        "the first token stands twice",
        _each(_begins_twice),
        "refuses",
        "take it out of the rows or of the template: the tokenizer puts it there, too",
        _CLOSELY,
    ),
    Check(
        "thoughts of earlier turns are left out",
        _each(_earlier_thoughts_left_out),
        "tells",
        "so they are when the model is asked; where earlier answers are trained on, they are learnt without thoughts",
    ),
    Check(
        "a special token in what people wrote",
        _each(_special_token),
        "tells",
        "take it out of the rows if that is not meant",
    ),
    Check(
        "a text that is templated already",
        _each(_templated_text),
        "tells",
        "rows of messages are written with the tokenizer's own chat template, and answers alone can be trained on",
    ),
    Check(
        "somebody unknown speaks",
        _each(_unknown_role),
        "tells",
        "models know user, assistant, system and tool: call them so, if that is who speaks",
    ),
    Check("a prompt is written otherwise", _each(_asked_otherwise), "tells", _OTHER_TEMPLATE, _CLOSELY),
    Check(
        "the prompt's end merges with the answer",
        _each(_merged),
        "tells",
        "end prompts without a space, and begin answers with it",
        _CLOSELY,
    ),
    Check("a prompt ends with an answer", _each(_prompt_is_answered), "tells", "mend the rows if that is not meant"),
    Check(
        "unknown characters", _each(_unknown), "tells", "take a tokenizer that can write them, or other rows", _CLOSELY
    ),
    Check(
        "marks are taken apart",
        _each(_taken_apart),
        "tells",
        "add it with `model.add_tokens=[...]`, or take the template of the model's own format",
        1,
    ),
)
"""In the order in which they look at a row; the first that leaves it out is the last."""
