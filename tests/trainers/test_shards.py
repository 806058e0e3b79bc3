"""What a ZeRO checkpoint may hold: what DeepSpeed saves, and nothing that would run when it is unpickled."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict

import pytest
import torch

from alignctl.trainers.base.shards import find_foreign

pytestmark = pytest.mark.train


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self._file = file

    def __reduce__(self):
        return os.mkdir, (str(self._file),)


def saved(folder, content, name="zero_pp_rank_0_mp_rank_00_optim_states.pt"):
    folder = folder / "global_step4"
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / name)
    (folder.parent / "latest").write_text("global_step4")


def test_what_deepspeed_saves_is_taken(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    scaler = DynamicLossScaler(1.0, 2, 1.0, 1, False)
    state = {
        "loss_scaler": LossScaler(1.0), "before": scaler, "zero_stage": ZeroStageEnum.weights, "overflow": False,
        "param_slice_mappings": [OrderedDict(weight=fragment_address(3, 0))],
        "base_optimizer_state": {"exp_avg": torch.ones(3), "step": torch.tensor(2.0)},
        "param_shapes": [OrderedDict(weight=torch.Size([3]))],
    }  # fmt: skip
    saved(tmp_path, {"optimizer_state_dict": state, "ds_config": {"train_batch_size": 4}, "ds_version": "0.19.8"})
    assert find_foreign(tmp_path, 0, 1) is None


def test_what_would_run_is_found_and_does_not_run(tmp_path):
    """Whichever of several processes looks at it, and whatever way it was written."""
    saved(tmp_path, {"step": 4}, "mp_rank_00_model_states.pt")
    saved(tmp_path, {"loss_scaler": Runs(tmp_path / "ran")})
    assert find_foreign(tmp_path, 0, 2) is None
    found = find_foreign(tmp_path, 1, 2)
    assert found.startswith("global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt: it would load ")
    assert found.endswith(".mkdir")
    old = tmp_path / "global_step4" / "mp_rank_00_model_states.pt"
    old.write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    assert find_foreign(tmp_path, 0, 2).startswith("global_step4/mp_rank_00_model_states.pt: ")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("latest", ["../evil", "evil", "/evil", "global_step4/../../evil", "global_step5", ""])
def test_deepspeed_is_led_to_no_other_folder(tmp_path, latest):
    """Though what lies in the one that it should read is its own."""
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    saved(checkpoint, {"step": 4})
    assert find_foreign(checkpoint, 0, 1) is None
    (tmp_path / "evil").mkdir()
    (checkpoint / "global_step5").symlink_to(tmp_path / "evil")
    (checkpoint / "latest").write_text(latest)
    assert find_foreign(checkpoint, 0, 1) == "latest: it names no folder of the checkpoint"


def test_a_checkpoint_of_the_model_alone_is_taken(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find_foreign(tmp_path, 0, 1) is None
