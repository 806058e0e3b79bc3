"""Scans of Arrow columns say what a walk over the rows would."""

import hashlib
import json

import pytest
from datasets import Dataset

from alignctl.data.scanning import characters, contents, lengths, plain_prompts, prompt_keys

pytestmark = pytest.mark.train  # the datasets library takes seconds to import


def message(text):
    return {"role": "user", "content": text}


@pytest.mark.parametrize("chosen", [[0, 1, 2], [2, 0]])
def test_characters(chosen):
    rows = Dataset.from_list([
        {"prompt": [message("häh"), message("")], "chosen": "ab", "label": True, "more": None},
        {"prompt": [], "chosen": "", "label": False, "more": {"why": "so"}},
        {"prompt": [message("x" * 50)], "chosen": None, "label": None, "more": {"why": None}},
    ])  # fmt: skip
    assert characters(rows.select(chosen)).tolist() == [[3 + 2 * 4 + 2, 2, 50 + 4][i] for i in chosen]


def test_prompts_are_known_as_ever():
    """Which rows are held out of a file must not change from one version to the next."""
    for row, prompt in (
        ({"prompt": "ä", "chosen": "a"}, "ä"),
        ({"prompt": [message("a")], "completion": "b"}, [message("a")]),
        ({"text": "a"}, "a"),
        ({"messages": [message("a"), message("b")]}, [message("a")]),
    ):
        [key] = prompt_keys(Dataset.from_list([row]), seed=3)
        assert key.hex() == hashlib.sha256(f"3|{json.dumps(prompt)}".encode()).hexdigest()


def test_prompts_that_look_alike():
    texts = [[{"prompt": text}] for text in ("Is it so?", "is  it SO ?", "is it so!")]
    [[one], [alike], [other]] = (list(plain_prompts(Dataset.from_list(rows))) for rows in texts)
    assert one == alike != other
    [asked] = plain_prompts(Dataset.from_list([{"messages": [message("Is it\nso?"), message("No")]}]))
    assert asked == one


def test_lists_of_numbers():
    """The same ones give the same content, whatever rows and files they are parts of."""
    rows = Dataset.from_dict({"ids": [[1, 2], [], [3], [4, 5, 6]], "other_ids": [[], [1], [], [2, 3]]})
    assert lengths(rows).tolist() == [2, 1, 1, 5]
    some = Dataset.from_dict({"ids": [[3], [1, 2]]})
    assert [*contents(rows.select([2, 0]), "ids")] == [*contents(some, "ids")]
    moved = Dataset.from_dict({"ids": [[3, 1], [2]]})
    assert [*contents(moved, "ids")] != [*contents(some, "ids")]
