"""`alignctl templates`."""

from __future__ import annotations

import json

from alignctl.data.templates import TEMPLATES


def test_lists_all(alignctl):
    done = alignctl("templates")
    assert done.code == 0
    for name, template in TEMPLATES.items():
        assert f"\n{name} " in "\n" + done.out
        assert template.source in done.out
    assert max(map(len, done.out.splitlines())) <= 120
    assert [row["name"] for row in json.loads(alignctl("templates", "--json").out)] == list(TEMPLATES)


def test_prints_one_as_a_file_has_it(alignctl):
    text = TEMPLATES["deepseek-r1"].file.read_text()
    assert alignctl("templates", "deepseek-r1").out == text
    assert json.loads(alignctl("templates", "deepseek-r1", "--json").out)["text"] == text


def test_a_name_that_is_not_there_is_answered_with_the_nearest(alignctl):
    done = alignctl("templates", "chatlm")
    assert (done.code, done.out) == (2, "")
    assert "hint: did you mean `chatml`?" in done.err
