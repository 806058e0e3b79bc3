"""What a worker imports: nothing that its stage does not use."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
from support.in_process import frozen
from support.models import TINY

from alignctl.config.stages import stage_config
from alignctl.worker import _may_quantize

SMALL = ("recipe=quickstart", "stages=[sft]", "data.limit=48", "data.eval_limit=8", "eval.prompts=0", *TINY)
RUN = """
import sys
from alignctl.worker import main
code = main(*sys.argv[1:])
print(code, [name for name in ("peft", "bitsandbytes", "torch._inductor.compile_fx") if sys.modules.get(name)])
"""


def stage(**given):
    return stage_config({"stages": ["sft"], "sft": {"method": "sft", "data": {"path": "x"}, **given}}, "sft")


@pytest.mark.parametrize(
    ("given", "config", "may"),
    [
        ({}, {}, False),
        ({"peft": {"type": "lora"}}, {}, False),
        ({"optim": "adamw_torch_8bit"}, {}, False),
        ({"peft": {"type": "qlora"}}, {}, True),
        ({"optim": "adamw_8bit"}, {}, True),
        ({"optim": "paged_adamw_32bit"}, {}, True),
        ({"optim": "lion_32bit"}, {}, True),
        ({}, {"quantization_config": {"quant_method": "bitsandbytes"}}, True),
    ],
)
def test_who_may_need_bitsandbytes(tmp_path, given, config, may):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert _may_quantize(stage(**given), {"policy": str(tmp_path), "reference": None}) is may


def test_what_a_checkpoint_on_the_hub_is_nobody_knows_yet():
    assert _may_quantize(stage(), {"policy": "owner/model"})
    assert not _may_quantize(stage(), {"policy": None})


@pytest.mark.train
@pytest.mark.skipif(
    tuple(map(int, version("torch").split(".")[:2])) < (2, 13), reason="older ones import their compiler by themselves"
)
def test_a_plain_stage_imports_no_compiler(tmp_path):
    frozen(tmp_path / "run", *SMALL, "sft.max_steps=1")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "run"), "sft"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 ['peft']", done.stderr
