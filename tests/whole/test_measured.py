"""What is measured with a reference that was not held while training, and has to be loaded beside a divided policy."""

from __future__ import annotations

import pytest
from support.files import read
from support.processes import finish, start

pytestmark = [pytest.mark.train, pytest.mark.slow, pytest.mark.night]


def test_a_reference_that_was_not_held_is_loaded_to_measure(tmp_path, shared_data):
    found = {}
    for how, processes in (("none", 1), ("zero3", 2)):
        several = [] if processes == 1 else [f"launcher.processes={processes}"]
        run = start(
            tmp_path, "recipe=dpo_local", f"model.path={shared_data / 'models' / 'stories260K'}",
            f"data.path={shared_data / 'preference' / 'llms_from_scratch_pref' / 'train.jsonl'}", "data.limit=40",
            "dpo.precompute_ref_log_probs=true", "dpo.max_steps=2", "dpo.learning_rate=1e-3",
            f"dpo.per_device_train_batch_size={8 // processes}", "eval.prompts=2", "eval.max_new_tokens=8",
            "rehearse=false", f"run_dir={how}", f"distributed={how}", *several,
        )  # fmt: skip
        finish(run)
        found[how] = read(tmp_path / how / "dpo" / "result.json")["after"]
    assert found["none"]["kl"] != 0
    assert found["zero3"] == pytest.approx(found["none"], rel=1e-3, abs=1e-4)  # sums of float32 in another order
