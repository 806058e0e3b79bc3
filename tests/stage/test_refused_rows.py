"""Rows that a stage refuses before it loads a model: too many bad ones, and forms that its settings are not about."""

import json
from dataclasses import replace

import pytest

from alignctl.config.compose import compose, read_request
from alignctl.config.stages import stage_config
from alignctl.data.reading import read_split
from alignctl.data.settings import DataSettings
from alignctl.errors import RequestError
from alignctl.stage.rows import check_form, check_skipped

pytestmark = pytest.mark.train  # the datasets library takes seconds to import

PLAIN = [{"prompt": f"p{i}", "completion": "a"} for i in range(150)]
CHAT = [{"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]}]


def stage(data, **trainer):
    config, problems = compose(read_request(["recipe=sft_quickstart"]))
    assert problems == []
    return replace(stage_config(config, "sft"), data=data, trainer=trainer)


def read(file, rows, **settings):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSettings(path=str(file), eval_rows=0, **settings)
    return data, read_split(data, "demonstrations", seed=0)[0]


@pytest.mark.parametrize(
    ("rows", "bad", "most", "taken"),
    [(10, 1, 0.01, True), (10, 2, 0.01, False), (10, 2, 0.2, True), (148, 1, 0, True), (148, 2, 0.01, False)],
)
def test_rows_that_cannot_be_used_up_to_a_share(tmp_path, rows, bad, most, taken):
    data, read_rows = read(tmp_path / "rows.jsonl", PLAIN[:rows] + [{"prompt": "p"}] * bad, max_skipped=most)
    if taken:
        check_skipped(read_rows, stage(data))
        return
    with pytest.raises(RequestError, match=rf"{bad} of {rows + bad} rows cannot be used .row {rows + 1}: ") as refused:
        check_skipped(read_rows, stage(data))
    assert "`data.max_skipped=0." in refused.value.problems[0].hint


def test_held_out_rows_have_the_form_of_the_others(tmp_path):
    (data, plain), (_, chat) = (read(tmp_path / f"{len(rows)}.jsonl", rows) for rows in (PLAIN, CHAT))
    check_form(plain, plain, stage(data))
    check_form(plain, None, stage(data))
    with pytest.raises(RequestError, match=r"another form \(messages\) than the training rows \(completion, prompt\)"):
        check_form(plain, chat, stage(data))
    asked = [{"role": "user", "content": "p"}]
    _, messages = read(tmp_path / "messages.jsonl", [{"prompt": asked, "completion": "a"}])
    with pytest.raises(RequestError, match=r"another form \(completion as messages, prompt as messages\)"):
        check_form(plain, messages, stage(data))


def test_a_loss_on_completions_needs_completions(tmp_path):
    (data, plain), (_, chat) = (read(tmp_path / f"{len(rows)}.jsonl", rows) for rows in (PLAIN, CHAT))
    check_form(plain, None, stage(data, completion_only_loss=True))
    check_form(chat, None, stage(data, completion_only_loss=None))
    with pytest.raises(RequestError, match="`sft.completion_only_loss=true` would have no effect"):
        check_form(chat, None, stage(data, completion_only_loss=True))
