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
