"""Where rows stand: file and line of each, whatever was skipped or held out before it."""

import json

import pytest

from alignctl.data.places import Place, Placing, read_places

pytestmark = pytest.mark.train  # the datasets library takes seconds to import

PAIRS = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad"} for i in range(8)]


@pytest.mark.parametrize("eval_rows", [0, 2])
def test_rows_that_were_skipped_and_those_after_them(tmp_path, eval_rows):
    from alignctl.data.reading import describe_skipped, read_split
    from alignctl.data.settings import DataSettings

    file = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in [*PAIRS[:3], PAIRS[3] | {"rejected": ""}, *PAIRS[4:]]]
    file.write_text("\n\n".join(lines))
    for _ in range(2):  # the second time as it was kept
        train, held_out = read_split(DataSettings(path=str(file), eval_rows=eval_rows), "preferences", seed=0)
        assert train.places.of(4) == Place(str(file), 7)
        assert train.places.told(8) == {"row": 8, "file": str(file), "line": 15}
        assert "(row 4 (line 7): the rejected completion is empty)" in describe_skipped(train)
        ledger = train.ledger
        assert ledger.kept + ledger.held_out + len(ledger.skipped) == ledger.read == 8
        if held_out is not None:
            assert held_out.places.of(held_out.numbers[0]).line == 2 * held_out.numbers[0] - 1
            assert (held_out.ledger.read, held_out.ledger.kept, held_out.ledger.skipped) == (1, 1, {})


def test_places_in_several_files_and_in_none(tmp_path):
    placing = Placing()
    for place in (Place("a.jsonl", 1), Place("b.parquet", None), Place("a.jsonl", 2), None):
        placing.add(place)
    placing.write(tmp_path / "places.npy")
    places = read_places(tmp_path / "places.npy", placing.files)
    assert [places.of(number) for number in (1, 2, 3, 4)] == [("a.jsonl", 1), ("b.parquet", None), ("a.jsonl", 2), None]
    assert [places.shown(number) for number in (2, 3, 4)] == ["2 (b.parquet)", "3 (a.jsonl, line 2)", "4"]
    assert places.told(4) == {"row": 4}
