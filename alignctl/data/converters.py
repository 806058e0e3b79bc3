"""How a row of each format becomes what trainers take: pure functions of a row. Torch-free; formats.py is their table.

Each raises BadRow where a row cannot be used, and KeyError where a column is not there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from itertools import combinations
from os.path import commonprefix
from typing import Any

from alignctl.data.cleaning import WEIGHTS, cleaned, from_turns, weight_of
from alignctl.data.files import Row
from alignctl.data.labels import is_no_vote, label
from alignctl.data.messages import (
    BadRow,
    Messages,
    Tie,
    as_answer,
    is_messages,
    is_transcript,
    is_turns,
    read_transcript,
    says_something,
    text_of,
)
from alignctl.data.tools import TOOLS
from alignctl.data.trees import best_path, ranked_pairs
from alignctl.data.votes import preferred, sides_of, vote_columns, votes_of

BEFORE = ("system", "history", *TOOLS)
"""Columns of what goes before a prompt of messages: an instruction for all, earlier turns, what may be called."""


def led(row: Row, messages: Messages) -> Messages:
    """Messages after what goes before them: the row's system message and its history.

    Raises:
        BadRow: A history that is neither pairs nor messages, or another system message than there is.
    """
    history = row.get("history") or []
    if not is_messages(history):
        pairs = history if isinstance(history, list) else [history]
        if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
            raise BadRow("`history` must be a list of pairs, question and answer")
        turns = [zip(("user", "assistant"), pair, strict=True) for pair in pairs]
        history = [{"role": role, "content": text_of(said, "`history`")} for turn in turns for role, said in turn]
    system = row.get("system")
    before = cleaned(history) if history else []
    if system in (None, ""):
        return before + messages
    first = {"role": "system", "content": text_of(system, "`system`")}
    if messages[:1] and messages[0]["role"] == "system":
        if messages[0] != first or before:
            raise BadRow("`system` is not the system message that the messages begin with")
        return messages
    return [first, *before, *messages]


def _has_before(row: Row) -> bool:
    """Whether a row has a column of what goes before its prompt: then all rows are messages."""
    return any(name in row for name in BEFORE)


def _asked(row: Row) -> Any:
    """The prompt of a row: text, or messages where something goes before it."""
    prompt = row["prompt"]
    if is_messages(prompt):
        return led(row, cleaned(prompt))
    text = text_of(prompt, "`prompt`")
    return led(row, [{"role": "user", "content": text}]) if _has_before(row) else text


def instruction(row: Row) -> Messages:
    """The instruction of a row with its input, after what goes before."""
    asked, given = (
        "" if row.get(name) is None else text_of(row[name], f"`{name}`").rstrip() for name in ("instruction", "input")
    )
    if not asked:
        raise BadRow("the instruction is empty")
    parts = [asked.lstrip(), given.lstrip("\r\n")]  # an input may begin with an indentation
    return led(row, [{"role": "user", "content": "\n\n".join(part for part in parts if part)}])


# --- preferences


def pair(prompt: Any, chosen: Any, rejected: Any) -> dict[str, Any]:
    """A preference row, refused where nothing can be learnt from it."""
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        if not says_something(completion):
            raise BadRow(f"the {name} completion is empty")
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def transcripts(row: Row) -> dict[str, Any]:
    chosen, rejected = read_transcript(row["chosen"]), read_transcript(row["rejected"])
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[-1]["role"] != "assistant":
            raise BadRow(f"the {name} transcript does not end with the assistant")
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("the transcripts do not share a prompt")
    return pair(chosen[:-1], chosen[-1:], rejected[-1:])


def preference(row: Row) -> dict[str, Any]:
    """A prompt with two completions: text, messages, or conversations that have it in them, or go on from it."""
    chosen, rejected = row["chosen"], row["rejected"]
    if not is_messages(chosen) and not is_messages(rejected):
        prompt = _asked(row)
        said = [text_of(row[name], f"`{name}`") for name in ("chosen", "rejected")]
        return pair(prompt, *(map(as_answer, said) if is_messages(prompt) else said))
    if not (is_messages(chosen) and is_messages(rejected)):
        raise BadRow("prompt, chosen and rejected must all be text, or all be messages")
    asked, chosen, rejected = _asked(row), cleaned(chosen), cleaned(rejected)
    asked = asked if is_messages(asked) else [{"role": "user", "content": asked}]
    if len(chosen) == 1 and len(rejected) == 1:
        return pair(asked, chosen, rejected)
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("the conversations do not share a prompt")
    return pair(_before_answer(asked, chosen), chosen[-1:], rejected[-1:])


def _before_answer(asked: Messages, said: Messages) -> Messages:
    """All before the last message of a conversation that has the prompt in it, or goes on from it."""
    if _holds(said[:-1], asked):
        return said[:-1]
    if said[0]["role"] != "assistant":
        raise BadRow("a conversation does not begin with `prompt`, nor does it go on from it")
    return asked + said[:-1]


def _holds(messages: Messages, part: Messages) -> bool:
    """Whether some messages are among others, one behind another; white space around them does not count."""
    all_said, said = ([(m["role"], m["content"].strip()) for m in some] for some in (messages, part))
    return any(all_said[start : start + len(said)] == said for start in range(len(all_said) - len(said) + 1))


def conversations(row: Row) -> dict[str, Any]:
    chosen, rejected = cleaned(row["chosen"]), cleaned(row["rejected"])
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("the conversations do not share a prompt")
    if len(chosen) == 1:
        raise BadRow("the conversations have no prompt")
    return pair(led(row, chosen[:-1]), chosen[-1:], rejected[-1:])


def is_text_pair(row: Row) -> bool:
    """Whether a row is two texts, and no other text that may be the prompt."""
    texts = {name for name, value in row.items() if isinstance(value, str) and value and not _IS_NO_PROMPT(name)}
    return texts == {"chosen", "rejected"} and not any(is_transcript(row[name]) for name in texts)


def text_pair(row: Row) -> dict[str, Any]:
    """Two texts with their prompt: all that both begin with, TRL's implicit prompt, but for a word that is cut."""
    chosen, rejected = (text_of(row[name], f"`{name}`") for name in ("chosen", "rejected"))
    shared = commonprefix([chosen, rejected])
    prompt = shared[: _LAST_WORD.search(shared).start()]
    if not prompt.strip():
        raise BadRow("chosen and rejected do not begin with the same words: there is no prompt")
    return pair(prompt, chosen[len(prompt) :], rejected[len(prompt) :])


def sharegpt_pair(row: Row) -> dict[str, Any]:
    prompt = led(row, from_turns(row["conversations"]))
    return pair(prompt, *(_answer(row[name]) for name in ("chosen", "rejected")))


def _answer(value: Any) -> Messages:
    """A completion that is text, a turn, or a list of one."""
    turns = value if isinstance(value, list) else [value]
    if turns and isinstance(turns[0], Mapping):
        messages = from_turns(turns)
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            raise BadRow("a completion must be one message of the assistant")
        return messages
    return as_answer(value)


def instruction_pair(row: Row) -> dict[str, Any]:
    chosen = row.get("chosen_response", row.get("chosen"))
    rejected = row.get("rejected_response", row.get("rejected"))
    return pair(instruction(row), as_answer(chosen), as_answer(rejected))


_IS_NO_PROMPT = re.compile(
    r"(\w+_)?(id|uuid|index|source|dataset|split|lang|language|date|model|category)", re.I
).fullmatch
_LAST_WORD = re.compile(r" ?\S*\Z")  # with the space before it, with which completions begin
_SCORES = ("score", "overall_score", "rating")
_SAYS = ("text", "response", "content", "completion", "answer")
LISTS = ("completions", "responses", "answers")
"""Columns of several completions of one prompt."""
IN_LISTS = tuple(f"{column}.{key}" for column in LISTS for key in (*_SAYS, *_SCORES, "rank"))
"""What is looked at in them."""


def is_scored(row: Row) -> bool:
    """Whether a row has completions of one prompt with a score or a rank each."""
    completions = _several(row)
    if not isinstance(completions, list) or not completions or not (row.get("prompt") or row.get("instruction")):
        return False
    return any(row.get(name) for name in ("scores", "ranks")) or (
        isinstance(completions[0], Mapping) and any(name in completions[0] for name in (*_SCORES, "rank"))
    )


def scored(row: Row) -> list[dict[str, Any]]:
    """All pairs of the completions of a prompt of which one is better (arXiv:2203.02155, 3.5), those that are furthest
    apart first."""
    prompt = _asked(row) if "prompt" in row else instruction(row)
    completions = _several(row)
    worths = _worths(row, completions)
    if len(worths) != len(completions):
        raise BadRow(f"{len(completions)} completions have {len(worths)} scores")
    given = [(one, worth) for one, worth in zip(completions, worths, strict=True) if worth is not None]
    said = [_first(one, _SAYS) if isinstance(one, Mapping) else one for one, _ in given]
    worths = [worth for _, worth in given]
    if any(map(is_messages, said)) and not is_messages(prompt):
        prompt = [{"role": "user", "content": prompt}]
    answers = [_answer(one) if is_messages(prompt) else text_of(one, "a completion") for one in said]
    ordered = sorted((i for i, one in enumerate(answers) if says_something(one)), key=lambda i: -worths[i])
    pairs = sorted(
        ((i, j) for i, j in combinations(ordered, 2) if worths[i] > worths[j] and answers[i] != answers[j]),
        key=lambda both: worths[both[1]] - worths[both[0]],
    )
    if not pairs:
        equal = len({worths[i] for i in ordered}) == 1 < len(ordered)
        raise (Tie if equal else BadRow)("no completion is better than another")
    return [pair(prompt, answers[i], answers[j]) for i, j in pairs]


def tree(row: Row) -> list[dict[str, Any]]:
    """All pairs of replies to each prompt of a tree of which one is ranked better."""
    return [pair(*one) for one in ranked_pairs(row)]


def voted(row: Row) -> dict[str, Any]:
    """Two completions of which more people prefer one."""
    first, second = sides_of(row)
    choice = preferred(votes_of(row))
    if not choice:
        raise Tie("as many people prefer one completion as the other, or neither")
    prompt = _asked(row) if "prompt" in row else instruction(row)
    said = [row[name] for name in ((first, second) if choice == 1 else (second, first))]
    texts = [as_answer(one) if is_messages(prompt) else text_of(one, "a completion") for one in said]
    return pair(prompt, *texts)


ARENA = ("conversation_a", "conversation_b")
"""Columns of two whole conversations of which one wins."""


def arena(row: Row) -> dict[str, Any]:
    """Two conversations with two models, of which people prefer one."""
    choice = preferred(votes_of(row))
    if not choice:
        raise Tie("neither conversation is better than the other")
    chosen, rejected = (row[name] for name in (ARENA if choice == 1 else ARENA[::-1]))
    return conversations({**row, "chosen": chosen, "rejected": rejected})


def is_voted(row: Row) -> bool:
    """Whether a row has two completions of one prompt, and votes on them."""
    asked = row.get("prompt") or row.get("instruction")
    return bool(asked) and sides_of(row) is not None and vote_columns(row) != []


def _several(row: Row) -> Any:
    return next((row[name] for name in LISTS if row.get(name)), None)


def _worths(row: Row, completions: list[Any]) -> list[float | None]:
    """What completions are worth, more for better: their scores, or their ranks, of which 1, or 0, is the best. None
    where that is not said."""
    given, sign = row.get("scores"), 1
    if not given and row.get("ranks"):
        given, sign = row["ranks"], -1
    if not given:
        if not all(isinstance(one, Mapping) for one in completions):
            raise BadRow("some completions have no score")
        names = ("rank", *_SCORES)  # the first that most completions have
        name = max(names, key=lambda name: sum(not _is_missing(one.get(name)) for one in completions))
        sign = -1 if name == "rank" else 1
        given = [one.get(name) for one in completions]
    try:
        worths = [None if _is_missing(value) else sign * float(value) for value in given]
    except (TypeError, ValueError, OverflowError) as error:
        raise BadRow(f"a score is not a number: {error}") from error
    if any(worth is not None and not math.isfinite(worth) for worth in worths):
        raise BadRow("a score is not a finite number")
    return worths


def _is_missing(score: Any) -> bool:
    """Whether a score is what tables and people write for none."""
    return str(score).strip().lower() in ("", "none", "null", "n/a", "na", "nan")


def _first(values: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), None)


# --- demonstrations


def answered(messages: Messages) -> dict[str, Any]:
    """Messages that end with an answer."""
    if not messages or messages[-1]["role"] != "assistant" or not says_something(messages[-1:]):
        raise BadRow("the conversation does not end with an answer")
    return {"messages": messages}


def chat(row: Row) -> dict[str, Any]:
    return answered(led(row, cleaned(row["messages"])))


def sharegpt(row: Row) -> dict[str, Any]:
    return answered(led(row, from_turns(row["conversations"])))


def weighed(row: Row) -> list[dict[str, Any]]:
    """Each turn of the assistant that has not the weight 0, with all before it as its prompt."""
    given = _conversation(row)
    if not is_turns(given):
        raise BadRow("expected a list of messages with role and content")
    weights = [weight_of(message) if isinstance(message, Mapping) else 1 for message in given]
    bare = [
        {key: value for key, value in message.items() if key not in WEIGHTS}
        if isinstance(message, Mapping) else message
        for message in given
    ]  # fmt: skip
    messages = from_turns(bare)
    before = led(row, messages)[: -len(messages)]
    answers = [
        (before + messages[:i], messages[i : i + 1])
        for i, message in enumerate(messages)
        if message["role"] == "assistant" and weights[i] and says_something([message])
    ]
    if not answers or not answers[0][0]:
        raise BadRow("no turn of the assistant after a prompt is to be trained on")
    return [{"prompt": prompt, "completion": completion} for prompt, completion in answers]


def has_weights(row: Row) -> bool:
    """Whether a message of a row is not to be trained on."""
    messages = _conversation(row)
    if not is_turns(messages):
        return False
    return any(isinstance(m, Mapping) and 0 in [m.get(key) for key in WEIGHTS] for m in messages)


def has_conversation(row: Row) -> bool:
    """Whether a row has turns to choose from."""
    return is_turns(_conversation(row))


def _conversation(row: Row) -> Any:
    return row["messages"] if row.get("messages") is not None else row.get("conversations")


def is_exchanges(row: Row) -> bool:
    """Whether a row is a conversation of questions, each with its answer."""
    given = row.get("conversation")
    return isinstance(given, list) and bool(given) and all(map(_is_exchange, given))


def _is_exchange(value: Any) -> bool:
    return isinstance(value, Mapping) and {"input", "output"} <= value.keys()


def exchanges(row: Row) -> dict[str, Any]:
    if not is_exchanges(row):
        raise BadRow("expected a list of objects with input and output")
    turns = [
        (role, one[key]) for one in row["conversation"] for role, key in (("user", "input"), ("assistant", "output"))
    ]
    return answered(led(row, [{"role": role, "content": text_of(said, "a turn")} for role, said in turns]))


def completion(row: Row) -> dict[str, Any]:
    prompt, said = _asked(row), row["completion"]
    if is_messages(said):
        said = cleaned(said)
        prompt = prompt if is_messages(prompt) else [{"role": "user", "content": prompt}]
        if len(said) > 1:
            prompt, said = _before_answer(prompt, said), said[-1:]
    else:
        said = as_answer(said) if is_messages(prompt) else text_of(said, "`completion`")
    if not says_something(said):
        raise BadRow("the completion is empty")
    return {"prompt": prompt, "completion": said}


def instructed(row: Row) -> dict[str, Any]:
    said = as_answer(row["output"])
    if not says_something(said):
        raise BadRow("the completion is empty")
    return {"prompt": instruction(row), "completion": said}


def best_of_tree(row: Row) -> dict[str, Any]:
    return answered(best_path(row))


def text(row: Row) -> dict[str, Any]:
    said = text_of(row["text"], "`text`")
    if not said.strip():
        raise BadRow("the text is empty")
    return {"text": said}


def chosen_of(convert: Callable[[Row], Any]) -> Callable[[Row], dict[str, Any]]:
    """The chosen side of preferences, as an answer to imitate."""

    def imitate(row: Row) -> dict[str, Any]:
        made = convert(row)
        one = made[0] if isinstance(made, list) else made
        return {"prompt": one["prompt"], "completion": one["chosen"]}

    return imitate


# --- feedback and prompts


def judged(convert: Callable[[Row], dict[str, Any]]) -> Callable[[Row], dict[str, Any]]:
    """A demonstration with what is said of it; of a conversation, of its last message."""

    def with_label(row: Row) -> dict[str, Any]:
        made = convert(row)
        if "messages" in made:
            messages = made["messages"]
            if len(messages) < 2:
                raise BadRow("the conversation has no prompt")
            made = {"prompt": messages[:-1], "completion": messages[-1:]}
        return made | {"label": label(row)}

    return with_label


def is_steps(row: Row) -> bool:
    """Whether a row is a solution in steps, with a label for each: TRL's stepwise supervision."""
    return bool(row.get("prompt")) and all(isinstance(row.get(name), list) for name in ("completions", "labels"))


def steps(row: Row) -> dict[str, Any]:
    """A solution in steps as one completion, a line each. It is wanted if every step is right, which is how
    arXiv:2305.20050 (2.6) scores solutions; neutral steps do not count."""
    said, labels = ([value for value in row[name] if value is not None] for name in ("completions", "labels"))
    if not said or len(said) != len(labels):
        raise BadRow(f"{len(said)} steps have {len(labels)} labels")
    prompt = _asked(row)
    solution = "\n".join(text_of(one, "a step") for one in said)
    if not solution.strip():
        raise BadRow("the completion is empty")
    right = [label({"label": value}) for value in labels if not is_no_vote(value)]
    if not right:
        raise Tie("no step is said to be right or wrong")
    completion = as_answer(solution) if is_messages(prompt) else "\n" * (not prompt[-1:].isspace()) + solution
    return {"prompt": prompt, "completion": completion, "label": all(right)}


def unpair(row: Row) -> list[dict[str, Any]]:
    """The two completions of a preference row as feedback: the chosen one wanted, the rejected one not."""
    return [
        {"prompt": row["prompt"], "completion": row[name], "label": wanted}
        for name, wanted in (("chosen", True), ("rejected", False))
    ]


def prompt(row: Row) -> dict[str, Any]:
    asked = _asked(row)
    if isinstance(asked, str) and not asked.strip():
        raise BadRow("the prompt is empty")
    return {"prompt": asked}


def has_turns(row: Row) -> bool:
    return is_turns(row.get("conversations"))
