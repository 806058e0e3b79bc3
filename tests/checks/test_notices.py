"""What people are told of a config with nothing wrong in it."""

import pytest
from support.any_input import answer

from alignctl.checks.notices import find_notices
from alignctl.config.compose import compose, read_request

SIMPO = "recipe=sft_simpo_llama3"
EIGHT = ("distributed=zero2", "launcher.gpus_per_node=8")


def notices(*arguments: str) -> list[str]:
    config, problems = compose(read_request(arguments))
    assert problems == []
    return find_notices(config, config["stages"])


@pytest.mark.parametrize(
    ("arguments", "end"),
    [
        ([SIMPO], None),
        ([SIMPO, *EIGHT], "scale `simpo.learning_rate`, or set `simpo.global_batch_size=128`"),
        ([SIMPO, *EIGHT, "simpo.global_batch_size=128"], None),
        ([SIMPO, *EIGHT, "simpo.learning_rate=1e-6"], None),
        (
            [SIMPO, *EIGHT, "simpo.per_device_train_batch_size=32"],
            "or set `simpo.global_batch_size=128` and `simpo.per_device_train_batch_size=16`",
        ),
        (["recipe=dpo_llama3_70b", "launcher.nodes=8"], "this run takes 64: scale `dpo.learning_rate`"),
    ],
    ids=["published", "8 processes", "kept", "another rate", "large parts", "more processes than rows"],
)
def test_a_learning_rate_of_other_batches(arguments, end):
    found = notices(*arguments)
    assert len(found) == (0 if end is None else 1)
    if end:
        assert "was published for batches of" in found[0]
        assert found[0].endswith(end)


def test_a_dry_run_has_it(tmp_path):
    found = answer(["train", "recipe=orpo_quickstart", "orpo.batch_for=16", "--dry-run"], tmp_path)
    assert "global batch  32 rows per optimizer step" in found.out
    assert found.out.count("published for batches of 16 rows, and this run takes 32") == 1
    shown = answer(["show", "recipe=orpo_quickstart", "orpo.global_batch_size=64"], tmp_path)
    assert shown.out.endswith("# global batch of orpo: 64 rows per optimizer step\n")
