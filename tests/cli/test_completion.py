"""Completion as the shells ask for it, through the command."""

import os
import subprocess
import sys

import pytest


def offers(words: str, position: int, shell: str = "bash") -> list[str]:
    """What the command answers to a shell whose cursor is in word `position` of `words`."""
    environment = {"_ALIGNCTL_COMPLETE": f"{shell}_complete", "COMP_WORDS": words, "COMP_CWORD": str(position)}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "alignctl"], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.stderr == ""
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line]


@pytest.mark.parametrize(
    ("words", "position", "expected"),
    [
        ("alignctl tr", 1, ["train"]),
        ("alignctl train reci", 2, None),
        ("alignctl train recipe = q", 4, ["quickstart"]),  # bash takes `=` for a word
        ("alignctl train recipe =", 3, None),
        ("alignctl train recipe = dpo_llama3 dpo.be", 5, ["dpo.beta="]),
        ("alignctl train recipe = dpo_llama3 dpo.max_st", 5, ["dpo.max_steps="]),  # a field the recipe does not list
        ("alignctl train recipe = dpo_llama3 peft = lora_", 7, ["lora_attention", "lora_embeddings"]),
        ("alignctl train recipe = no_such_recipe dpo.be", 5, []),
    ],
)
def test_bash(words, position, expected):
    found = offers(words, position)
    if expected is None:
        assert any("quickstart" in offer for offer in found)
    else:
        assert found == expected


def test_script_of_each_shell(alignctl):
    for shell in ("bash", "zsh", "fish"):
        assert "_ALIGNCTL_COMPLETE" in alignctl("completion", shell).out
