"""Asks servers over HTTP, again where they do not answer: a reward by URL, and chat endpoints as OpenAI has them.

Of the chat endpoint every answer is kept by what was asked. Torch-free.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from alignctl.cache import private_dir
from alignctl.config.rewards import wait_s
from alignctl.errors import AlignctlError, RequestError
from alignctl.run.files import read_json, write_json

_SHOWN = 200  # characters of what a server says
_PIECE = 2**16  # bytes of an answer
_BUSY = (408, 425, 429)  # with those from 500 on: the same question may be answered later


class ServerAway(AlignctlError):
    """A server did not answer, however often it was asked."""


@dataclass(frozen=True)
class Server:
    """Where something is asked, and how patiently."""

    url: str
    timeout_s: float
    """Of each try."""
    retries: int
    key_from: str | None = None
    """Variable of the environment with a key, which is sent as a bearer token."""

    def post(self, body: Mapping[str, Any]) -> Any:
        """Sends JSON, and gives back the JSON that is answered.

        Raises:
            ServerAway: It cannot be reached or is busy, `retries` times after the first.
            RequestError: There is no key to send.
            AlignctlError: It refuses what it is asked, has moved, or answers something else than JSON.
        """
        said = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(wait_s(attempt))
            try:
                answer = self._answer(body)
            except urllib.error.HTTPError as error:
                said = f"{error.code} {error.reason}"
                if error.code < 500 and error.code not in _BUSY:
                    raise AlignctlError(f"{self.url} refused what it was asked: {said}{_shown(error)}") from error
            except (OSError, http.client.HTTPException) as error:
                said = str(getattr(error, "reason", error)) or type(error).__name__
            else:
                try:
                    return json.loads(answer)
                except ValueError as error:
                    raise AlignctlError(f"{self.url} answered what is no JSON: {error}") from error
        tries = f"{self.retries + 1} times" if self.retries else "once"
        raise ServerAway(
            f"{self.url} did not answer, asked {tries}: {said}",
            "see to it that it answers, and give the same command again: it goes on from what there is",
        )

    def _answer(self, body: Mapping[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "alignctl"}
        if self.key_from:
            headers["Authorization"] = f"Bearer {_key(self.key_from)}"
        data = json.dumps(body, default=str).encode()  # a date, for instance, as its text
        request = urllib.request.Request(self.url, data, headers, method="POST")
        until = time.monotonic() + self.timeout_s  # the limit of urllib is of each piece
        with _opener().open(request, timeout=self.timeout_s) as answer:
            parts = []
            while part := answer.read1(_PIECE):
                parts.append(part)
                if time.monotonic() > until:
                    raise TimeoutError(f"its answer took longer than {self.timeout_s:g} s")
            if answer.length:
                raise http.client.IncompleteRead(b"".join(parts), answer.length)
            return b"".join(parts)


class _StaysHere(urllib.request.HTTPRedirectHandler):
    """Goes to no other address: the key would be sent there, too, and what is asked would not."""

    def redirect_request(self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str):
        raise AlignctlError(f"{req.full_url} has moved to {newurl}", "name that URL")


@cache
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_StaysHere)


def _key(variable: str) -> str:
    """A key from the environment, of which nothing is ever shown.

    Raises:
        RequestError: There is none, or it cannot stand in a header.
    """
    key = os.environ.get(variable, "").strip()
    if not key:
        raise RequestError(f"the environment has no key in the variable `{variable}`", f"export {variable}=...")
    if not (key.isascii() and key.isprintable()):
        raise RequestError(f"the key in the variable `{variable}` has characters that no key has", "copy it anew")
    return key


def _shown(error: urllib.error.HTTPError) -> str:
    """The beginning of what a server says of an error."""
    try:
        text = " ".join(error.read().decode(errors="replace").split())
    except OSError:
        text = ""
    return f", {text[:_SHOWN]}" if text else ""


class Chat:
    """A language model behind a chat endpoint. What it was asked once it is not asked again: its answers are kept under
    the cache folder, for the owner alone."""

    def __init__(self, server: Server, model: str, temperature: float, max_tokens: int, folder: Path | None = None):
        """`server` is the endpoint without `/chat/completions`; `folder` is where answers are kept."""
        self._server = Server(
            f"{server.url.rstrip('/')}/chat/completions", server.timeout_s, server.retries, server.key_from
        )
        self._settings = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        self._folder = folder or private_dir("chat")

    def ask(self, messages: list[dict[str, str]]) -> str:
        """The answer to messages.

        Raises:
            ServerAway: There is none to be had.
            AlignctlError: It is none of a chat endpoint.
        """
        body = self._settings | {"messages": messages}
        key = json.dumps([self._server.url, body], sort_keys=True, ensure_ascii=False)
        name = hashlib.sha256(key.encode()).hexdigest()
        file = self._folder / name[:2] / f"{name}.json"
        kept = read_json(file)
        if isinstance(kept, dict) and isinstance(kept.get("answer"), str):
            return kept["answer"]
        found = self._server.post(body)
        try:
            answer = found["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            answer = None
        else:
            answer = "" if answer is None else answer  # all of its tokens went into thoughts
        if not isinstance(answer, str):
            raise AlignctlError(f"{self._server.url} answered what is no chat completion: {json.dumps(found)[:_SHOWN]}")
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(file, {"asked": body, "answer": answer})
        return answer
