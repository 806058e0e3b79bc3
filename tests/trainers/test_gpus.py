"""GPUs that were asked for have to be there: training beside them, on the CPU, would be a costly mistake."""

from __future__ import annotations

import pytest
import torch
from support.in_process import run_stages

from alignctl.errors import LaunchError

pytestmark = pytest.mark.train


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a GPU")
def test_a_job_that_sees_no_gpu_ends(tmp_path):
    with pytest.raises(LaunchError, match="`launcher.gpus_per_node=1`, and torch sees no GPU"):
        run_stages(tmp_path / "run", "recipe=quickstart", "stages=[sft]", "launcher=slurm")
