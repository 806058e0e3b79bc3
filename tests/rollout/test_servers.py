"""Asking over HTTP, of a server on this machine: patience, refusals, and answers that are kept."""

from __future__ import annotations

import socket
import stat
import threading
import time
from contextlib import suppress

import pytest
from support.reward_server import Moved, serve_json

from alignctl.errors import AlignctlError, RequestError
from alignctl.rollout.servers import Chat, Server, ServerAway


def test_a_busy_server_is_asked_again():
    answers = [503, 429, [1.0]]
    with serve_json(lambda path, body: answers.pop(0)) as (url, asked):
        assert Server(url, 5, retries=2).post({"a": 1}) == [1.0]
    assert [one["body"] for one in asked] == [{"a": 1}] * 3


def test_one_that_is_away_or_slow_is_given_up(free_port):
    with pytest.raises(ServerAway, match=r"did not answer, asked once: .*[Rr]efused") as raised:
        Server(f"http://127.0.0.1:{free_port()}", 5, retries=0).post({})
    assert "give the same command again" in raised.value.problems[0].hint  # who measures with it says no more
    with (
        serve_json(lambda path, body: 503) as (url, asked),
        pytest.raises(ServerAway, match="asked 2 times: 503 Service Unavailable"),
    ):
        Server(url, 5, retries=1).post({})
    assert len(asked) == 2


def test_one_that_takes_too_long_is_given_up():
    done = threading.Event()
    with serve_json(lambda path, body: done.wait(30)) as (url, _):
        with pytest.raises(ServerAway, match="timed out"):
            Server(url, 0.2, retries=0).post({})
        done.set()


def test_one_that_answers_bit_by_bit_is_given_up(monkeypatch):
    """The limit is of the whole answer, not of each piece."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=drip, args=(server, b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")).start()
        with pytest.raises(ServerAway, match="its answer took longer than 0.5 s"):
            Server(f"http://127.0.0.1:{server.getsockname()[1]}", 0.5, retries=0).post({})


def test_half_an_answer_is_none():
    with socket.create_server(("127.0.0.1", 0)) as server:
        said = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n[1]"
        threading.Thread(target=drip, args=(server, said, 0)).start()
        with pytest.raises(ServerAway, match="did not answer, asked once: IncompleteRead"):
            Server(f"http://127.0.0.1:{server.getsockname()[1]}", 5, retries=0).post({})


def drip(server, head, pieces=100):
    """Answers one question with a head, and pieces of a byte each, until nobody reads them."""
    client, _ = server.accept()
    with client, suppress(OSError):
        client.recv(65536)
        client.sendall(head)
        for _ in range(pieces):
            time.sleep(0.1)
            client.sendall(b" ")
        # Closed with something unread of the question, a connection is reset, and the answer may be lost with it.
        client.shutdown(socket.SHUT_WR)
        while client.recv(65536):
            pass


def test_what_asking_again_does_not_mend_is_said_at_once():
    with serve_json(lambda path, body: 404 if path == "/none" else b"<html>") as (url, asked):
        with pytest.raises(AlignctlError, match="refused what it was asked: 404 Not Found"):
            Server(f"{url}/none", 5, retries=3).post({})
        with pytest.raises(AlignctlError, match="answered what is no JSON"):
            Server(url, 5, retries=3).post({})
    assert len(asked) == 2


def chat_answer(path, body):
    assert path == "/v1/chat/completions"
    return {"choices": [{"message": {"role": "assistant", "content": body["messages"][0]["content"].upper()}}]}


def test_a_chat_is_asked_the_same_once(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MY_KEY", "abc")
    with serve_json(chat_answer) as (url, asked):
        server = Server(f"{url}/v1", 5, retries=0, key_from="MY_KEY")
        chat, other = Chat(server, "one", 0.0, 8), Chat(server, "two", 0.0, 8)
        for model in (chat, chat, other):
            assert model.ask([{"role": "user", "content": "hello"}]) == "HELLO"
    assert [one["body"]["model"] for one in asked] == ["one", "two"]
    assert asked[0]["headers"]["Authorization"] == "Bearer abc"
    assert chat.ask([{"role": "user", "content": "hello"}]) == "HELLO"  # the server is gone
    assert stat.S_IMODE((tmp_path / "cache" / "chat").stat().st_mode) == 0o700
    kept = "".join(file.read_text() for file in (tmp_path / "cache").rglob("*.json"))
    assert "abc" not in kept


@pytest.mark.parametrize("key", [None, " \n", "top\nsecret", "top\u2011secret"])
def test_a_key_that_cannot_be_sent_is_not_shown(key, monkeypatch, free_port):
    monkeypatch.setenv("MY_KEY", key) if key else monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(RequestError, match="variable `MY_KEY`") as caught:
        Server(f"http://127.0.0.1:{free_port()}", 5, retries=0, key_from="MY_KEY").post({})
    assert "secret" not in str(caught.value)


def test_a_key_goes_to_no_other_address(monkeypatch):
    monkeypatch.setenv("MY_KEY", "abc\n")
    with (
        serve_json(lambda path, body: [1.0]) as (other, asked_there),
        serve_json(lambda path, body: Moved(other)) as (url, asked),
        pytest.raises(AlignctlError, match=f"{url} has moved to {other}"),
    ):
        Server(url, 5, retries=0, key_from="MY_KEY").post({})
    assert asked[0]["headers"]["Authorization"] == "Bearer abc"
    assert not asked_there


def test_a_chat_may_say_nothing(tmp_path):
    with serve_json(lambda path, body: {"choices": [{"message": {"content": None}}]}) as (url, _):
        assert Chat(Server(url, 5, 0), "one", 0.0, 8, folder=tmp_path).ask([]) == ""


def test_an_answer_that_is_none_of_a_chat_is_refused(tmp_path):
    with (
        serve_json(lambda path, body: {"error": "no such model"}) as (url, _),
        pytest.raises(AlignctlError, match="no chat completion: .*no such model"),
    ):
        Chat(Server(url, 5, 0), "one", 0.0, 8, folder=tmp_path).ask([])
    assert not list(tmp_path.rglob("*.json"))
