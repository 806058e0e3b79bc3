"""What cannot be computed by several processes together is refused before training."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.train


@pytest.mark.parametrize(
    ("processes", "settings", "options", "reason"),
    [
        (3, {}, {}, "it does not divide the heads, 2 and of keys 2"),
        (2, {"engine": "padded"}, {}, "rows are padded"),
        (2, {}, {"keeps_batches": "pairs are sorted"}, "pairs are sorted"),
    ],
    ids=["heads", "padded", "batches"],
)
def test_refused(tmp_path, processes, settings, options, reason):
    from support.small import Small

    from alignctl.errors import RequestError

    trainer = Small(tmp_path).trainer("dpo", **options, **settings)
    with pytest.raises(RequestError, match=f"sp_size={processes}` cannot be: {reason}"):
        trainer.compute_rows_together(processes)
