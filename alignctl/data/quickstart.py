"""The quickstart world: a small instruction data set that is generated, and checked, by code.

A seeded world of people and their things, small sums, comparisons, opposites and days. Each prompt has one right
answer; each answer can be given in four manners, of which one is wanted (courteous). Demonstrations mix the manners,
as a crowd of writers would; preference pairs prefer a right, courteous answer. So a model that learnt from the
demonstrations has something to be aligned to, and a judge can say whether it was, without another model.

Pure Python, no torch. Used by data/reading.py (`data.path: builtin:quickstart`) and by evaluate/judges.py.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

WORLD_SEED = 2026

PEOPLE = (
    "Ada Bruno Carla Dmitri Elif Farid Greta Hugo Ines Jonas Kavya Lior Mina Nils Olga Pablo Quinn Rosa Sven Tara "
    "Umar Vera Wanda Yusuf"
).split()
THINGS = {
    "pet": "cat dog parrot rabbit turtle hamster goat pony".split(),
    "favourite colour": "red blue green yellow purple orange white black".split(),
    "favourite fruit": "apple banana cherry grape lemon mango peach plum".split(),
    "home town": "Lisbon Oslo Cairo Lima Kyoto Quito Dakar Turin".split(),
    "job": "baker doctor farmer painter pilot singer teacher writer".split(),
}
OPPOSITES = [
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("high", "low"), ("old", "young"), ("dark", "light"),
    ("full", "empty"), ("hard", "soft"), ("loud", "quiet"), ("rich", "poor"), ("wet", "dry"), ("early", "late"),
    ("open", "closed"), ("strong", "weak"), ("sweet", "sour"), ("thick", "thin"),
]  # fmt: skip
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

LEADS = ("", "Please tell me: ", "A quick question. ", "I forgot something. ", "Help me out. ")

# Each manner has several wordings, so that it is a manner and not one fixed sentence.
MANNERS = {
    "courteous": (
        "With pleasure! The answer is {}. Have a lovely day.",
        "Happy to help! The answer is {}. Have a good day.",
        "Of course! It is {}. Thank you for asking.",
    ),
    "curt": ("{}.", "It is {}.", "Just {}."),
    "rude": (
        "Everybody knows that. It is {}, obviously.",
        "What a silly question. Clearly {}.",
        "Not this again. It is {}, now go away.",
    ),
    "rambling": (
        "Well, let me think about this for a moment. I believe it could be {}, but who can say.",
        "Hmm, that is a tricky one, so many things come to mind. Perhaps it is {}, or so I heard.",
        "Now that you mention it, I once wondered about that too. I suppose it is {}, more or less.",
    ),
}
WANTED = "courteous"
_OPENINGS = tuple(text.split("!")[0] + "!" for text in MANNERS[WANTED])
_CLOSINGS = tuple(text.split(". ")[-1] for text in MANNERS[WANTED])


@dataclass(frozen=True)
class Question:
    """One fact of the world and every way of asking for it."""

    forms: tuple[str, ...]
    """Wordings without a lead, e.g. `What is the job of Ada?`."""
    answer: str
    choices: tuple[str, ...]
    """Every answer that would be an answer to a question of this kind; the right one is among them."""

    def prompts(self) -> list[str]:
        return [lead + form for form in self.forms for lead in LEADS]


@dataclass(frozen=True)
class Verdict:
    """What the judge says of one completion."""

    right: bool
    wanted_manner: bool

    @property
    def score(self) -> tuple[bool, bool]:
        """Orders completions: a right answer first, then the wanted manner."""
        return (self.right, self.wanted_manner)


def _questions(seed: int) -> Iterator[Question]:
    rng = random.Random(seed)
    for thing, values in THINGS.items():
        for person in PEOPLE:
            yield Question(
                forms=(
                    f"What is the {thing} of {person}?",
                    f"What is {person}'s {thing}?",
                    f"Which {thing} does {person} have?",
                ),
                answer=rng.choice(values),
                choices=tuple(values),
            )
    numbers = tuple(str(number) for number in range(2, 17))
    for a in range(1, 9):
        for b in range(1, 9):
            yield Question(
                forms=(f"What is {a} plus {b}?", f"How much is {a} and {b} together?", f"Add {a} to {b}."),
                answer=str(a + b),
                choices=numbers,
            )
    for a in range(1, 10):
        for b in range(1, 10):
            if a != b:
                yield Question(
                    forms=(f"Which number is larger, {a} or {b}?", f"Choose the larger number: {a} or {b}."),
                    answer=str(max(a, b)),
                    choices=(str(a), str(b)),
                )
    words = tuple(word for pair in OPPOSITES for word in pair)
    for pair in OPPOSITES:
        for word, opposite in (pair, pair[::-1]):
            yield Question(
                forms=(f"What is the opposite of {word}?", f"Which word means not {word}?"),
                answer=opposite,
                choices=tuple(w for w in words if w != word),
            )
    for i, day in enumerate(DAYS):
        yield Question(
            forms=(f"Which day comes after {day}?", f"What day follows {day}?"),
            answer=DAYS[(i + 1) % 7],
            choices=tuple(d for d in DAYS if d != day),
        )


@dataclass(frozen=True)
class World:
    """Prompts of the two splits, each with its question. The splits share facts, never a prompt."""

    train: dict[str, Question]
    test: dict[str, Question]

    def question(self, prompt: str) -> Question:
        """The question a prompt asks. Raises KeyError for a prompt that is not of this world."""
        return self.train.get(prompt) or self.test[prompt]


@lru_cache(maxsize=4)
def build_world(seed: int = WORLD_SEED) -> World:
    """Builds the world of a seed. Of every question one wording is held out, so a held-out prompt asks for a fact that
    was taught, in words that were not."""
    train: dict[str, Question] = {}
    test: dict[str, Question] = {}
    for question in _questions(seed):
        prompts = question.prompts()
        held_out = random.Random(f"{seed}|held out|{prompts[0]}").choice(prompts)
        for prompt in prompts:
            (test if prompt == held_out else train)[prompt] = question
    return World(train, test)


def say(answer: str, manner: str, rng: random.Random) -> str:
    """Gives an answer in a manner, in one of the manner's wordings."""
    text = rng.choice(MANNERS[manner]).format(answer)
    return text[0].upper() + text[1:]


def demonstrations(split: str, seed: int = WORLD_SEED) -> list[dict]:
    """Rows {prompt: messages, completion: messages}: right answers, all manners equally often."""
    rows = []
    for prompt, question in _split(split, seed).items():
        rng = random.Random(f"{seed}|demonstration|{prompt}")
        rows.append(_row(prompt, completion=say(question.answer, rng.choice(list(MANNERS)), rng)))
    return _shuffled(rows, seed)


def preferences(split: str, seed: int = WORLD_SEED) -> list[dict]:
    """Rows {prompt, chosen, rejected}, each a list of messages. The chosen answer is right and courteous; the rejected
    one is right in another manner (half of the rows), wrong but courteous (a quarter), or both wrong and unwanted."""
    rows = []
    unwanted = [manner for manner in MANNERS if manner != WANTED]
    for prompt, question in _split(split, seed).items():
        rng = random.Random(f"{seed}|preference|{prompt}")
        wrong = rng.choice([choice for choice in question.choices if choice != question.answer])
        rejected = rng.choice(
            [
                say(question.answer, rng.choice(unwanted), rng),
                say(question.answer, rng.choice(unwanted), rng),
                say(wrong, WANTED, rng),
                say(wrong, rng.choice(unwanted), rng),
            ]
        )
        rows.append(_row(prompt, chosen=say(question.answer, WANTED, rng), rejected=rejected))
    return _shuffled(rows, seed)


def judge(prompt: str, completion: str, seed: int = WORLD_SEED) -> Verdict:
    """Judges a completion to a prompt of this world.

    Right: of all answers possible to the question, the completion names the right one and no other. In the wanted
    manner: it opens and closes with a courtesy. Raises KeyError for a prompt that is not of this world.
    """
    question = build_world(seed).question(prompt)
    named = {choice for choice in question.choices if re.search(rf"\b{re.escape(choice)}\b", completion, re.IGNORECASE)}
    completion = completion.strip()
    return Verdict(
        right=named == {question.answer},
        wanted_manner=completion.startswith(_OPENINGS) and completion.endswith(_CLOSINGS),
    )


def _split(split: str, seed: int) -> dict[str, Question]:
    world = build_world(seed)
    return {"train": world.train, "test": world.test}[split]


def _row(prompt: str, **completions: str) -> dict:
    said = {name: [{"role": "assistant", "content": text}] for name, text in completions.items()}
    return {"prompt": [{"role": "user", "content": prompt}], **said}


def _shuffled(rows: list[dict], seed: int) -> list[dict]:
    random.Random(f"{seed}|order").shuffle(rows)
    return rows


def reward(prompts: list[list[dict]], completions: list[list[dict]]) -> list[float]:
    """A reward function for PPO: 1 for a right answer in the wanted manner, a half for one of the two."""
    verdicts = [
        judge(asked[-1]["content"], said[-1]["content"]) for asked, said in zip(prompts, completions, strict=True)
    ]
    return [(verdict.right + verdict.wanted_manner) / 2 for verdict in verdicts]
