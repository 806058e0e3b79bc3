"""Rows at an address: a server on this machine, and fsspec's file system in memory."""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest

from alignctl.data.fetching import fetch
from alignctl.data.reading import read_split
from alignctl.data.settings import DataSettings
from alignctl.errors import AlignctlError, RequestError

pytestmark = pytest.mark.train  # the datasets library takes seconds to import

ROWS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(5)]


@pytest.fixture
def served(tmp_path):
    """A folder, its address, and the requests for files in it."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            asked.append((self.command, self.path))

        def send_header(self, name, value):
            too_much = name == "Content-Length" and self.path == "/cut.jsonl"
            super().send_header(name, "10000" if too_much else value)

    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(path):
    return read_split(DataSettings(path=path, eval_rows=0), "demonstrations", seed=0)[0]


def test_rows_from_a_server_are_fetched_once_and_again_where_they_changed(served):
    folder, address, asked = served
    (folder / "rows.jsonl").write_text(lines(ROWS))
    url = f"{address}/rows.jsonl?download=true"
    assert list(read(url).dataset) == ROWS
    assert list(read(url).dataset) == ROWS
    assert [command for command, _ in asked].count("GET") == 1
    (folder / "rows.jsonl").write_text(lines(ROWS[:2]))
    rows = read(url)
    assert list(rows.dataset) == ROWS[:2]
    assert rows.ledger.source == url
    assert rows.places.of(2)[1] == 2


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [("none.jsonl", RequestError, "404"), ("cut.jsonl", AlignctlError, "ended [0-9,]+ bytes early")],
)
def test_what_a_server_does_not_give(served, name, kind, expected):
    folder, address, _ = served
    (folder / "cut.jsonl").write_text(lines(ROWS))
    with pytest.raises(kind, match=expected):
        read(f"{address}/{name}")


@pytest.mark.parametrize("names_versions", [True, False])
def test_whoever_fetches_says_that_it_goes_on(served, monkeypatch, names_versions):
    """Twice where nothing else tells one content from another."""
    folder, address, _ = served
    (folder / "rows.jsonl").write_text(text := lines(ROWS * 2000))
    if not names_versions:
        monkeypatch.setattr(SimpleHTTPRequestHandler, "do_HEAD", lambda self: self.send_error(405))
    told = []
    fetch(f"{address}/rows.jsonl", told.append)
    assert sum(told) == len(text) * (1 if names_versions else 2)
    assert len(told) > 1


def test_nobody_there():
    with pytest.raises(AlignctlError, match="cannot be fetched: .*refused"):
        read("http://127.0.0.1:9/rows.jsonl")


def test_any_file_system_that_fsspec_knows():
    memory = fsspec.filesystem("memory")
    for name, rows in (("a", ROWS[:3]), ("b", ROWS[3:])):
        memory.pipe_file(f"/rows/{name}.jsonl", lines(rows).encode())
    assert list(read("memory://rows/a.jsonl").dataset) == ROWS[:3]
    assert list(read("memory://rows/*.jsonl").dataset) == ROWS
    with pytest.raises(RequestError, match="no such file"):
        fetch("memory://rows/c.jsonl")
