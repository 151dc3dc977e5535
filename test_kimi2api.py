"""Tests of kimi2api, in the order of the module's parts.

    pytest                      # all but the benchmark and the soak
    pytest -k stale_nonce       # one behaviour
    pytest -m bench -s          # a table of ratios to cloudscraper called directly

The upstreams are stand-ins that speak HTTP over real sockets, faults included. Nothing of the program is mocked. Routes
are called through WebTest. Tests of sockets and signals run the program as a process.
"""

from __future__ import annotations

import ast
import asyncio
import gc
import gzip
import http.client
import io
import itertools
import json
import logging
import os
import random
import re
import select
import selectors
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import statistics
import struct
import subprocess
import sys
import threading
import time
import unicodedata
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from email.utils import formatdate
from functools import cache, partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote

import pytest
import webtest

import kimi2api

json_and_stream = pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
HERE = Path(__file__).resolve().parent
PATIENCE = 20.0  # seconds to wait for an expected event


# ----------------------------------------------------------------------------------------------------------------------
# Stand-ins for the upstreams
#
# A stand-in answers each request with an Act: a function that receives the handler of the connection and writes the
# response. `script` holds the acts of the next posts. While it is empty, `always` answers.
# ----------------------------------------------------------------------------------------------------------------------

Act = Callable[[Any], Any]


class StandInHandler(BaseHTTPRequestHandler):
    """One connection to a stand-in."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body leave in one packet
    disable_nagle_algorithm = True  # otherwise a small packet waits for the acknowledgement of the previous one
    server: Any

    def do_GET(self) -> None:
        self.server.act_for_get(self)(self)

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.act_for_post(self)(self)

    def head(self, status: int, headers: dict[str, str]) -> None:
        """Send the status line and headers. Underscores in names become dashes; the last header of a name counts."""
        self.send_response_only(status)
        for name, value in {name.replace("_", "-"): value for name, value in headers.items()}.items():
            self.send_header(name, value)
        self.end_headers()

    def reply(self, status: int, body: bytes, kind: str, **headers: str) -> None:
        self.head(status, {"Content_Type": kind, "Content_Length": str(len(body)), **headers})
        self.wfile.write(body)
        self.wfile.flush()

    def raw(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


class StandIn:
    """A server on a free port of loopback, with a thread for each connection."""

    handler = StandInHandler

    def __init__(self) -> None:
        self.lock = threading.Lock()  # guards the script and the recorded requests
        self.script: deque[Act] = deque()
        self.gate = threading.Event()  # acts wait here until the test sets it or ends
        self.tls: ssl.SSLContext | None = None
        self._stopped = False
        self._connections: dict[threading.Thread, socket.socket] = {}
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port = self._socket.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def act_for_get(self, handler: Any) -> Act:
        raise NotImplementedError

    def act_for_post(self, handler: Any) -> Act:
        raise NotImplementedError

    def stop(self) -> None:
        """End every connection and thread, at once."""
        self._stopped = True
        self.gate.set()
        socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE).close()  # wakes the acceptor
        self._acceptor.join(PATIENCE)
        self._socket.close()
        connections = dict(self._connections)
        for connection in connections.values():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in connections:
            thread.join(PATIENCE)

    def _accept(self) -> None:
        while True:
            connection, address = self._socket.accept()
            if self._stopped:
                connection.close()
                return
            if self.tls:  # the first read does the handshake, on the handler's thread
                connection = self.tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
            thread = threading.Thread(target=self._handle, args=(connection, address), daemon=True)
            self._connections[thread] = connection
            thread.start()

    def _handle(self, connection: socket.socket, store_address: Any) -> None:
        with suppress(OSError, ValueError):  # the program hung up, or stop() closed the connection
            self.handler(connection, store_address, self)  # type: ignore[arg-type]
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()
        self._connections.pop(threading.current_thread(), None)


def sends(status: int, body: bytes | str = b"", kind: str = "text/html; charset=UTF-8", **headers: str) -> Act:
    data = body.encode() if isinstance(body, str) else body
    return lambda handler: handler.reply(status, data, kind, **headers)


def sends_raw(data: bytes) -> Act:
    return lambda handler: handler.raw(data)


def resets(handler: Any) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def at_the_gate(act: Act) -> Act:
    """Return an act that waits for the gate, then acts."""

    def waits(handler: Any) -> None:
        handler.server.gate.wait(PATIENCE)
        act(handler)

    return waits


def hangs(handler: Any) -> None:
    """Send nothing until the gate opens, then close the connection."""
    handler.server.gate.wait(PATIENCE)
    handler.close_connection = True


def drips(head: bytes) -> Act:
    """Return an act that sends a byte every 50 ms until the client disconnects."""

    def act(handler: Any) -> None:
        handler.wfile.write(head)
        while not handler.server.gate.wait(0.05):
            handler.wfile.write(b"x")
            handler.wfile.flush()

    return act


def endless(handler: Any) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
    while not handler.server.gate.is_set():
        handler.wfile.write(b" " * 65536)


# The web chat


class WebChatHandler(StandInHandler):
    form: dict[str, str]


class WebChat(StandIn):
    """A stand-in for the web chat. `page_script` holds the acts of the next pages; then the page contains the nonce."""

    handler = WebChatHandler

    def __init__(self) -> None:
        self.nonce, self.answer = "a1b2c3d4e5", "Hello from upstream."
        self.pages: list[dict[str, str]] = []  # the headers of each request for the page
        self.posts: list[dict[str, str]] = []  # the form of each post
        self.heads: list[dict[str, str]] = []  # the headers of each post
        self.page_script: deque[Act] = deque()
        self.always: Act = web_chat_answers
        super().__init__()

    @property
    def settings(self) -> dict[str, str]:
        origin = f"http://127.0.0.1:{self.port}"
        return {"UPSTREAM_URL": f"{origin}/wp-admin/admin-ajax.php", "CHAT_PAGE_URL": f"{origin}/chat/"}

    def act_for_get(self, handler: WebChatHandler) -> Act:
        with self.lock:
            self.pages.append(dict(handler.headers))
            return self.page_script.popleft() if self.page_script else serves_page

    def act_for_post(self, handler: WebChatHandler) -> Act:
        handler.form = dict(parse_qsl(handler.body.decode(), keep_blank_values=True))
        with self.lock:
            self.posts.append(handler.form)
            self.heads.append(dict(handler.headers))
            return self.script.popleft() if self.script else self.always


def serves_page(handler: WebChatHandler) -> None:
    serves_page_with(
        f'var kimi_ajax = {{"i18n":{{"nonce_label":"x"}}, "nonce" : "{handler.server.nonce}",'
        '"ajax_url":"https:\\/\\/kimi-ai.chat\\/wp-admin\\/admin-ajax.php"};'
    )(handler)


def serves_page_with(script: str) -> Act:
    """Return an act that sends the chat page with this script."""
    html = f'<html><script id="kimi-js-extra">\n{script}</script></html>'
    return sends(200, html, Set_Cookie="visit=42; Path=/")


def web_chat_answers(handler: WebChatHandler) -> None:
    if handler.form.get("nonce") != handler.server.nonce:
        handler.reply(403, b"-1", "text/html")
    else:
        web_chat_says(handler.server.answer)(handler)


def web_chat_says(text: str) -> Act:
    """Return an act that sends an answer in the web chat's JSON."""
    return sends(200, json.dumps({"success": True, "data": {"message": text}}), "application/json; charset=UTF-8")


def web_chat_answers_at_the_gate(handler: WebChatHandler) -> None:
    handler.server.gate.wait(PATIENCE * 2)
    web_chat_says(handler.server.answer)(handler)


JUST_A_MOMENT = '<!DOCTYPE html><html><title>Just a moment...</title><script src="/cdn-cgi/challenge-platform/h/b/">'
IUAM = (
    '<html><title>Just a moment...</title><img src="/cdn-cgi/images/trace/jsch/js/transparent.gif">'
    '<form id="challenge-form" action="/?__cf_chl_f_tk=abc" method="POST"></form></html>'
)
FIREWALL = '<html><title>Access denied</title><span class="cf-error-code">1020</span></html>'
DOWN = "<html><title>kimi-ai.chat | 521: Web server is down</title><a href='/cdn-cgi/l/x'>Cloudflare</a></html>"
CLOUDFLARE = {"Server": "cloudflare"}
PROBLEM = json.dumps({
    "type": "https://developers.cloudflare.com/support/troubleshooting/http-status-codes/cloudflare-1xxx-errors/error-1020/",
    "title": "Error 1020: Access denied", "status": 403, "error_code": 1020, "cloudflare_error": True,
})


@pytest.fixture
def kimi() -> Iterator[WebChat]:
    server = WebChat()
    yield server
    server.stop()


# An OpenAI-style API


class ApiHandler(StandInHandler):
    def begin_stream(self, **headers: str) -> None:
        self.head(200, {"Content_Type": "text/event-stream", "Transfer_Encoding": "chunked", **headers})
        self.wfile.flush()

    def send(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def event(self, chunk: Any) -> None:
        data = chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode()
        self.send(b"data: " + data + b"\n\n")

    def end(self) -> None:
        self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()


class Api(StandIn):
    """A stand-in for an OpenAI-style API."""

    handler = ApiHandler

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str], Any]] = []  # path, headers and body of each post
        self.listed: list[dict[str, str]] = []  # the headers of each request for the list of models
        self.hung_up = threading.Event()
        self.words_sent = 0  # by api_streams_words
        self.always: Act = api_answers("Hi ", "from the ", "API.")
        model = {"id": "k2", "object": "model", "created": 7, "owned_by": "them"}
        self.list_act: Act = api_sends(200, {"object": "list", "data": [model]})
        super().__init__()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def act_for_get(self, handler: ApiHandler) -> Act:
        with self.lock:
            self.listed.append(dict(handler.headers))
            return self.list_act

    def act_for_post(self, handler: ApiHandler) -> Act:
        with self.lock:
            self.asked.append((handler.path, dict(handler.headers), json.loads(handler.body)))
            return self.script.popleft() if self.script else self.always


def api_sends(status: int, body: Any, **headers: str) -> Act:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return sends(status, data, "application/json", **headers)


def api_chunk(delta: Any = None, finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
    return {
        "id": "theirs",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "k2-2026",
        "system_fingerprint": "fp",
        "choices": [{"index": 0, "delta": delta or {}, "finish_reason": finish_reason}],
        **more,
    }


USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8, "cached_tokens": 1}


def api_answers(*texts: str, deltas: Any = None, finish: str = "stop", **headers: str) -> Act:
    """Return an act that streams an answer: a comment, the role, the deltas, the finish reason, the usage."""

    def act(handler: ApiHandler) -> None:
        handler.begin_stream(**headers)
        handler.send(b": a comment\n\n")
        handler.event(api_chunk({"role": "assistant", "content": ""}))
        for delta in deltas or [{"content": text} for text in texts]:
            handler.event(api_chunk(delta))
        handler.event(api_chunk({}, finish))
        handler.event({**api_chunk(), "choices": [], "usage": USAGE})
        handler.event(b"[DONE]")
        handler.end()

    return act


def api_streams(*chunks: Any) -> Act:
    """Return an act that streams only these chunks, each an object or bytes."""

    def act(handler: ApiHandler) -> None:
        api_streams_without_end(*chunks)(handler)
        handler.end()

    return act


HALF = api_chunk({"content": "half"})
REST = api_chunk({"content": " and half"}, "stop")


def as_events(*chunks: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)


def api_streams_half_then(*chunks: Any, ends: bool = True) -> Act:
    """Return an act that streams half an answer, waits for the gate, streams these chunks and may end the body."""

    def act(handler: ApiHandler) -> None:
        handler.begin_stream()
        handler.event(api_chunk({"content": "half"}))
        handler.server.gate.wait(PATIENCE)
        for chunk in chunks:
            handler.event(chunk)
        if ends:
            handler.end()
        handler.close_connection = True

    return act


def api_streams_words(handler: ApiHandler) -> None:
    """Stream a chunk every 20 ms until the client disconnects or the gate opens."""
    try:
        handler.begin_stream()
        while not handler.server.gate.wait(0.02):
            handler.event(api_chunk({"content": "word "}))
            handler.server.words_sent += 1
    except OSError:
        handler.server.hung_up.set()
    else:
        handler.event(api_chunk({}, "stop"))
        handler.end()


def api_fails(status: int, message: str, **fields: str) -> Act:
    """Return an act that sends an error in OpenAI's shape."""
    return api_sends(status, {"error": {"message": message, **fields}})


def api_refuses(complaint: str, when: Callable[[Any], bool], status: int = 400, **fields: Any) -> Act:
    """Return an act that refuses requests with this message when `when(body)` is true, and answers all others."""

    def act(handler: ApiHandler) -> None:
        if when(json.loads(handler.body)):
            api_fails(status, complaint, **fields)(handler)
        else:
            api_answers("ok")(handler)

    return act


def api_forbids(name: str) -> Act:
    """Return an act that refuses a parameter with the error of Mistral's schema."""
    detail = [{"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted", "input": 1}]
    refusal = api_sends(422, {"object": "error", "message": {"detail": detail}, "type": "invalid_request_error"})

    def act(handler: ApiHandler) -> None:
        (refusal if name in json.loads(handler.body) else api_answers("ok"))(handler)

    return act


def api_streams_without_end(*chunks: Any) -> Act:
    """Return an act that streams these chunks and does not end the body."""

    def act(handler: ApiHandler) -> None:
        handler.begin_stream()
        for chunk in chunks:
            handler.event(chunk)

    return act


def api_streams_unframed(data: bytes) -> Act:
    """Return an act that streams without chunked framing, so that the end of the connection ends the body."""

    def act(handler: ApiHandler) -> None:
        handler.head(200, {"Content_Type": "text/event-stream"})
        handler.raw(data)

    return act


def api_streams_then_hangs(*chunks: Any) -> Act:
    def act(handler: ApiHandler) -> None:
        api_streams_without_end(*chunks)(handler)
        hangs(handler)

    return act


def api_streams_then_breaks_off(*chunks: Any) -> Act:
    def act(handler: ApiHandler) -> None:
        api_streams_without_end(*chunks)(handler)
        handler.close_connection = True

    return act


@pytest.fixture
def api() -> Iterator[Api]:
    server = Api()
    yield server
    server.stop()


@pytest.fixture
def api_settings(api: Api) -> dict[str, str]:
    """Settings that add the stand-in API as the provider `local`, beside the web chat."""
    return {"PROVIDERS": "local", "LOCAL_BASE_URL": api.url, "LOCAL_API_KEY": "sk-theirs"}


# ----------------------------------------------------------------------------------------------------------------------
# The program, in process and as a process
# ----------------------------------------------------------------------------------------------------------------------


def self_signed(folder: Path) -> tuple[Path, Path]:
    """Create a certificate for localhost and api.example. Return the files of the certificate and its key."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    request = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    files = ["-addext", "subjectAltName=DNS:localhost,DNS:api.example", "-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(["openssl", *request.split(), *files], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the openssl command")
    return certificate, key


@pytest.fixture(scope="session", autouse=True)
def clean_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hide settings, keys, proxies, certificates and .env files of this machine from the program."""
    settings = {field.name.upper() for field in kimi2api.Settings.table()}
    suffixes = ("_BASE_URL", "_API_KEY", "_PROXY", "_CA_BUNDLE")
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.upper() in settings or name.upper().endswith(suffixes):
                patch.delenv(name)
        with suppress(pytest.skip.Exception):  # loading the system's hundred certificates for every client is slow
            certificate, _ = self_signed(tmp_path_factory.mktemp("certificate"))
            patch.setenv("SSL_CERT_FILE", str(certificate))
        patch.chdir(tmp_path_factory.mktemp("empty"))
        yield
        if fork_server.cache_info().currsize:
            server, requests, _ = fork_server()
            requests.close()
            assert server.wait(PATIENCE) == 0, "no program outlives the tests"


class Client(webtest.TestApp):
    """WebTest's client, which returns error responses instead of raising them."""

    def do_request(self, req: Any, status: Any = None, expect_errors: Any = None) -> Any:
        return super().do_request(req, status, expect_errors=True)


MakeApp = Callable[..., Client]


@pytest.fixture
def make_app(kimi: WebChat, monkeypatch: pytest.MonkeyPatch) -> MakeApp:
    """make_app(SETTING="text", …): create the WSGI application in front of the stand-in web chat, with short pauses."""
    monkeypatch.setattr(kimi2api, "FIRST_BACK_OFF", 0.01)
    monkeypatch.setattr(kimi2api, "FIRST_PAUSE", 0.2)
    monkeypatch.setattr(kimi2api, "FINISHED_SILENCE", 0.3)

    def build(**settings: str) -> Client:
        defaults = {**kimi.settings, "STREAM_INTERVAL_MS": "0", "MAX_RETRIES": "1"}
        return Client(kimi2api.create_app(kimi2api.Settings.load(settings, defaults)))

    return build


@pytest.fixture
def app(make_app: MakeApp) -> Client:
    return make_app()


@pytest.fixture
def api_app(make_app: MakeApp, api_settings: dict[str, str]) -> Client:
    return make_app(**api_settings)


class Clock:
    """The system's clocks, as the program reads them. Setting `now` lets time pass; `error` is that of the clock
    of the day alone."""

    now = 1e9
    error = 0.0  # seconds that the clock of the day is ahead


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    began, monotonic = clock.now, time.monotonic
    monkeypatch.setattr(time, "time", lambda: clock.now + clock.error)
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + clock.now - began)
    return clock


def chat(app: Client, content: Any = "Hello", headers: dict[str, str] | None = None, **body: Any) -> Any:
    body.setdefault("messages", [{"role": "user", "content": content}])
    return app.post_json("/v1/chat/completions", body, headers=headers)


def answer_text(response: Any) -> str:
    assert response.status_int == 200, response.text
    return response.json["choices"][0]["message"]["content"]


def sse_events(response: Any) -> list[Any]:
    """Return the events of a stream: parsed JSON, or the text '[DONE]'."""
    body = response if isinstance(response, bytes) else response.body
    data = [line[6:] for line in body.decode().split("\n") if line.startswith("data: ")]
    return [text if text == "[DONE]" else json.loads(text) for text in data]


def streamed_text(chunks: list[Any]) -> str:
    """Return the text of the first choice of each chunk."""
    texts = [chunk["choices"][0]["delta"].get("content") for chunk in chunks if chunk != "[DONE]" and chunk["choices"]]
    return "".join(text or "" for text in texts)


def assert_error(
    response: Any, status: int, code: str | None, type: str | None = None, param: str | None = None
) -> None:
    """Assert that a response is an error in OpenAI's shape, with these fields where they are given."""
    assert response.status_int == status, (response.status_int, response.text)
    assert response.content_type == "application/json"
    error = response.json["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert error["code"] == code, error
    assert type is None or error["type"] == type
    assert param is None or error["param"] == param, error


def tool(name: str, description: str = "", **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


WEATHER = tool(
    "get_weather", "Weather of\n a city", city={"type": "string"}, unit={"type": "string", "enum": ["C", "F"]}
)
CLOCK = tool("clock")


JSON_OBJECT = {"type": "json_object"}


def json_schema(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": schema, **more}}


def tool_calls(response: Any) -> list[tuple[str, Any]]:
    """Return the names and arguments of an answer's tool calls."""
    assert response.status_int == 200, response.text
    choice = response.json["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    calls = choice["message"]["tool_calls"]
    for call in calls:
        assert set(call) == {"id", "type", "function"} and call["type"] == "function" and call["id"].startswith("call_")
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def tokens_today(app: Client) -> tuple[int, int]:
    """Return the tokens of prompts and of answers, by /v1/usage."""
    used = app.get("/v1/usage").json["today"]
    return used["prompt_tokens"], used["completion_tokens"]


def wait_for(condition: Callable[[], Any], what: str = "") -> Any:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.005)
    raise AssertionError(f"never happened: {what or condition}")


def wait_until_still() -> None:
    """Wait until no other thread of this process has moved in ten checks, 10 ms apart."""

    def positions() -> dict[int, tuple[Any, int]]:
        return {
            ident: (frame.f_code, frame.f_lasti)
            for ident, frame in sys._current_frames().items()
            if ident != threading.get_ident()
        }

    before = positions()
    still = 0

    def moved_no_more() -> bool:
        nonlocal before, still
        time.sleep(0.01)
        now = positions()
        still = still + 1 if now == before else 0
        before = now
        return still >= 10

    wait_for(moved_no_more, "every thread is idle")


# New interpreters reuse one compiled module, whatever the environment says
COMPILED_ONCE = {
    "PYTHONPATH": str(HERE),
    "PYTHONPYCACHEPREFIX": str(HERE / ".pytest_cache" / "pycache"),
    "PYTHONDONTWRITEBYTECODE": "",
}

# Reads requests of ForkedProcess from its stdin and forks two processes for each: one runs the code, one waits for it
FORK_SERVER = """
import json, os, socket, sys, kimi2api
from contextlib import suppress
def reap(options):
    with suppress(ChildProcessError):
        while os.waitpid(-1, options)[0]:
            pass
requests = socket.socket(fileno=0)
while True:
    data, descriptors, *_ = socket.recv_fds(requests, 65536, 3)
    if not data:  # the tests have ended
        reap(0)
        sys.exit()
    while not data.endswith(b"\\n"):
        data += requests.recv(65536)
    reap(os.WNOHANG)
    if os.fork() == 0:
        break
    for descriptor in descriptors:
        os.close(descriptor)
requests.detach()
output, errors, status = descriptors
process = os.fork()
if process:
    os.closerange(0, 3)
    os.close(output)
    os.close(errors)
    os.write(status, b"%d\\n" % process)
    os.write(status, b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
    os._exit(0)
os.close(status)
for descriptor, standard in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (errors, 2)):
    os.dup2(descriptor, standard)
    os.close(descriptor)
sys.stdout, sys.stderr = open(1, "w"), open(2, "w", 1)
code, directory, environment = json.loads(data)
os.chdir(directory)
os.environ.clear()
os.environ.update(environment)
exec(code)
"""


@cache
def fork_server() -> tuple[subprocess.Popen[bytes], socket.socket, threading.Lock]:
    """Return a process that has imported the module, a socket to it, and the lock for requests on the socket."""
    ours, theirs = socket.socketpair()
    with theirs:
        code, env = [sys.executable, "-c", FORK_SERVER], {**os.environ, **COMPILED_ONCE}
        server = subprocess.Popen(code, env=env, stdin=theirs, stdout=subprocess.DEVNULL, start_new_session=True)
    return server, ours, threading.Lock()


class ForkedProcess:
    """A process that runs `code` with kimi2api imported. It starts in 20 ms, a new interpreter in 300.

    It has what the tests need of subprocess.Popen.
    """

    def __init__(self, code: str, env: dict[str, str]) -> None:
        output, errors, status = os.pipe(), os.pipe(), os.pipe()
        self.returncode: int | None = None
        self.stdout, self.stderr = os.fdopen(output[0], encoding="utf-8"), os.fdopen(errors[0], encoding="utf-8")
        self._status = os.fdopen(status[0], "rb", 0)
        _, requests, lock = fork_server()
        data = json.dumps([code, os.getcwd(), env]).encode() + b"\n"
        with lock:
            sent = socket.send_fds(requests, [data], [output[1], errors[1], status[1]])
            requests.sendall(data[sent:])
        for _, end in (output, errors, status):
            os.close(end)
        self.pid = int(self._status.readline())

    def poll(self, timeout: float = 0) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = int(self._status.readline())
            self._status.close()
        return self.returncode

    def wait(self, timeout: float) -> int:
        code = self.poll(timeout)
        assert code is not None, f"the process has not ended in {timeout} s"
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Program:
    """The program as a process of its own."""

    def __init__(self, *flags: str, before: str = "", is_new: bool = False, **settings: str) -> None:
        """before: Python that runs before the program does. is_new: start a new interpreter, as users do."""
        arguments = ["--api-port", "0", *flags]
        env = {**os.environ, **settings}
        if is_new:
            self.process: Any = subprocess.Popen(
                [sys.executable, "-m", "kimi2api", *arguments], env={**env, **COMPILED_ONCE},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
            )  # fmt: skip
        else:
            self.process = ForkedProcess(f"{before}\nsys.exit(kimi2api.main({arguments}))", env)
        self.log: list[str] = []
        self._reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True)
        self._reader.start()
        self.greeting = ""
        for line in self.process.stdout:
            self.greeting += line
            if "stop it" in line:
                break
        found = re.search(r"http://([^/]*):(\d+)/v1", self.greeting)
        assert found, (self.greeting, self.log)
        self.host, self.port = found[1].strip("[]"), int(found[2])
        self.base_url = f"http://{found[1]}:{self.port}/v1"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)

    def open(self, data: bytes = b"") -> socket.socket:
        """Return a socket to the program, after sending these bytes."""
        link = socket.create_connection((self.host, self.port), timeout=PATIENCE)
        link.sendall(data)
        return link

    def open_chat(self, content: str = "Hello", **body: Any) -> socket.socket:
        """Return a socket to the program, after sending a chat request."""
        data = json.dumps({"messages": [{"role": "user", "content": content}], **body}).encode()
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(data)
        )
        return self.open(head + data)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
        connection = self.connect()
        connection.request(method, path, json.dumps(body) if isinstance(body, dict) else body, headers)
        response = connection.getresponse()
        result = response.status, response.read()
        connection.close()
        return result

    def chat(self, content: str = "Hello", **body: Any) -> tuple[int, bytes]:
        return self.ask("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **body})

    def health(self) -> Any:
        status, body = self.ask("GET", "/health")
        assert status == 200
        return json.loads(body)

    def running(self) -> int:
        return self.health()["chats"]["running"]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = PATIENCE) -> int:
        code = self.process.wait(timeout)
        self._reader.join(PATIENCE)
        return code

    def close(self) -> None:
        self.process.kill()
        self.wait()
        self.process.stdout.close()
        self.process.stderr.close()

    def memory(self, peak: bool = False) -> float:
        """Resident memory in MB, now or the most that it ever was."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"%s:\s+(\d+)" % ("VmHWM" if peak else "VmRSS"), status)[1]) / 1024


StartProgram = Callable[..., Program]
CHECKS_OFTEN = "kimi2api.CLIENT_CHECK_INTERVAL = 0.05"  # for Program's `before`


@pytest.fixture
def start_program(kimi: WebChat) -> Iterator[StartProgram]:
    """start_program("--flag", SETTING="text", …): start the program as a process in front of the stand-in web chat."""
    with ExitStack() as programs:

        def start(*flags: str, **settings: str) -> Program:
            program = Program(*flags, **{**kimi.settings, "MAX_RETRIES": "1", **settings})
            return programs.enter_context(closing(program))

        yield start


@pytest.fixture(scope="module")
def demo_program() -> Iterator[Program]:
    """One program with its built-in upstream, for tests that do not change its state."""
    with closing(Program("--demo")) as program:
        yield program


def run_code(code: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run Python to its end in a process that has imported kimi2api."""
    process = ForkedProcess(code, {**os.environ, **settings})
    with closing(process.stdout), closing(process.stderr), ThreadPoolExecutor(2) as pool:
        try:
            texts = [pool.submit(file.read) for file in (process.stdout, process.stderr)]
            output, errors = (text.result(PATIENCE * 2) for text in texts)
            return subprocess.CompletedProcess(code, process.wait(PATIENCE), output, errors)
        finally:
            process.kill()


def run_program(*flags: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the program to its end."""
    return run_code(f"sys.exit(kimi2api.main({list(flags)}))", **settings)


def allow_descriptors(count: int) -> None:
    """Raise the limit of open files of this process, or skip the test where the system allows fewer."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        pytest.skip(f"needs {count} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))


def read_until(link: socket.socket, end: bytes, count: int = 1) -> bytes:
    """Receive from a socket until `end` has arrived `count` times."""
    body = b""
    while body.count(end) < count:
        part = link.recv(65536)
        assert part, body
        body += part
    return body


def read_all(link: socket.socket) -> bytes:
    parts = []
    while part := link.recv(65536):
        parts.append(part)
    return b"".join(parts)


def read_response(link: socket.socket, method: str = "GET") -> tuple[http.client.HTTPResponse, bytes]:
    response = http.client.HTTPResponse(link, method=method)
    response.begin()
    return response, response.read()


########################################################################################################################
# The module as a whole
########################################################################################################################


@pytest.fixture(scope="module")
def syntax_tree() -> ast.Module:
    return ast.parse(Path(kimi2api.__file__).read_text())


def module_parts(module: Path) -> dict[int, str]:
    """Return the titles of the parts by the lines of their banners. The appendices come last."""
    lines = module.read_text().splitlines()
    banners = [number for number, line in enumerate(lines) if line == "#" * 120]
    return {number + 1: lines[number + 1].removeprefix("# Part ").removeprefix("# ") for number in banners[::2]}


def test_no_part_uses_a_later_part_and_the_docstring_lists_all(syntax_tree: ast.Module) -> None:
    parts = module_parts(Path(kimi2api.__file__))
    listed = re.findall(r"^ {4}(?:(\d) )?([A-Z].+?)  +\S", kimi2api.__doc__ or "", re.M)
    assert [f"{number}: {title}" if number else title for number, title in listed] == list(parts.values())
    lines = sorted(parts)

    def part_of(line: int) -> int:
        return sum(begin <= line for begin in lines)

    defined = {}
    for node in syntax_tree.body:
        targets = [node] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else getattr(node, "targets", [])
        for target in [*targets, getattr(node, "target", None)]:
            name = getattr(target, "name", None) or getattr(target, "id", None)
            if name:
                defined[name] = part_of(node.lineno)
    appendices = len(parts)
    used = [node for node in ast.walk(syntax_tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    assert len(used) > 1000, "the test has found uses"
    for node in used:
        part, later = part_of(node.lineno), defined.get(node.id, 0)
        may_use = later == appendices and part >= appendices - 2
        assert later <= part or may_use, f"{node.id} of part {later} is used in line {node.lineno}"


@pytest.mark.parametrize(
    ("part", "names"),
    [
        (5, {"requests", "cloudscraper", "urllib3", "HTTPAdapter", "HTTPError", "Timeout"}),
        (8, {"waitress", "wasyncore", "HTTPChannel", "HTTPRequestParser", "WSGITask", "ErrorTask", "BaseWSGIServer"}),
        (4, {"sqlite3", "redis"}),
        (7, {"bottle"}),
    ],
)
def test_only_one_part_uses_each_library(syntax_tree: ast.Module, part: int, names: set[str]) -> None:
    lines = sorted(module_parts(Path(kimi2api.__file__)))
    for node in ast.walk(syntax_tree):
        if isinstance(node, ast.Name) and node.id in names:
            found = sum(begin <= node.lineno for begin in lines)
            assert found == part or (node.id == "bottle" and found == 8), f"{node.id} in line {node.lineno}"


########################################################################################################################
# Part 1: Settings
########################################################################################################################


# ----------------------------------------------------------------------------------------------------------------------
# Setting types, settings
# ----------------------------------------------------------------------------------------------------------------------


def test_settings_come_from_flags_then_environment_then_env_file_then_defaults(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text(
        "# mine\nexport API_PORT=3\nMAX_RETRIES = \"7\" # seven\nSESSION_CACHE_TTL='5'\n"
        "API_MASTER_KEY=sk#1\nDEFAULT_MODEL= # nothing\n\nnot a setting\n",
        encoding="utf-8-sig",
    )
    values = kimi2api.read_env_file(str(env_file), required=True)
    settings = kimi2api.Settings.load(
        {"API_PORT": "1"}, {"API_PORT": "2", "MAX_SESSION_SIZE": "9", "LOG_LEVEL": ""}, values
    )
    assert (settings.api_port, settings.max_session_size, settings.max_retries) == (1, 9, 7)
    assert (settings.session_cache_ttl, settings.api_master_key) == (5.0, (kimi2api.ClientKey("sk#1"),))
    assert (settings.log_level, settings.request_timeout, settings.default_model) == ("INFO", 60.0, "kimi")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("API_PORT", "eighty", id="port in words"),
        pytest.param("API_PORT", "65536", id="port too high"),
        pytest.param("MAX_CONCURRENT_CHATS", "0", id="no chats at all"),
        pytest.param("REQUEST_TIMEOUT", "nan", id="timeout that is no number"),
        pytest.param("REQUEST_TIMEOUT", "0", id="no timeout"),
        pytest.param("MODELS", "kimi", id="model without a name"),
        pytest.param("MODELS", "=x", id="model without an id"),
        pytest.param("UPSTREAM_URL", "kimi-ai.chat", id="URL without a scheme"),
        pytest.param("UPSTREAM_URL", "http://[", id="half a URL"),
        pytest.param("LOG_LEVEL", "loud", id="log level"),
        pytest.param("CORS_ORIGINS", "https://mine.example/", id="origin with a path"),
        pytest.param("DEFAULT_MODEL", "gpt-5", id="default model that is none"),
        pytest.param("STREAM_INTERVAL_MS", "-1", id="negative interval"),
        pytest.param("API_MASTER_KEY", "schlüssel", id="key beyond ASCII"),
    ],
)
def test_an_invalid_setting_is_refused_in_one_line_with_name_and_value(name: str, value: str) -> None:
    with pytest.raises(kimi2api.SettingError) as refused:
        kimi2api.Settings.load({name: value})
    message = str(refused.value)
    assert message.startswith(f"{name}: ") and "\n" not in message
    assert (value in message) == (name != "API_MASTER_KEY"), "a key is never shown"


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        pytest.param({"PROVIDERS": "local"}, "LOCAL_BASE_URL", id="provider without a URL"),
        pytest.param({"PROVIDERS": "Böse"}, "PROVIDERS", id="bad name of a provider"),
        pytest.param({"FALLBACK_MODELS": "moonshot/kimi-k3"}, "FALLBACK_MODELS", id="fallback without a key"),
        pytest.param({"MODELS": "kimi=moonshot/kimi-k3"}, "MODELS", id="model without a key"),
        pytest.param(
            {"MOONSHOT_API_KEY": "k", "MOONSHOT_BASE_URL": "x"}, "MOONSHOT_BASE_URL", id="bad URL of a preset"
        ),
    ],
)
def test_invalid_settings_of_apis_are_refused(settings: dict[str, str], name: str) -> None:
    with pytest.raises(kimi2api.SettingError, match=f"^{name}: "):
        kimi2api.Settings.load(settings)


def test_a_preset_is_on_when_its_key_is_set(make_app: MakeApp, api: Api) -> None:
    keys = {"MOONSHOT_API_KEY": "sk-m", "QIANFAN_API_KEY": "sk-q", "FALLBACK_MODELS": "moonshot/kimi-k3"}
    assert set(make_app(**keys).get("/health").json["upstreams"]) == {"kimi", "moonshot", "qianfan"}
    settings = kimi2api.Settings.load(keys)
    assert settings.moonshot_base_url == "https://api.moonshot.ai/v1"
    assert settings.qianfan_base_url == "https://qianfan.baidubce.com/v2"
    app = make_app(**keys, MOONSHOT_BASE_URL=f"{api.url}/moonshot", QIANFAN_BASE_URL=f"{api.url}/qianfan")
    for model in ("moonshot/kimi-k3", "qianfan/kimi-k2-instruct"):
        assert answer_text(chat(app, model=model))
    assert [(path, headers["Authorization"]) for path, headers, _ in api.asked] == [
        ("/v1/moonshot/chat/completions", "Bearer sk-m"),
        ("/v1/qianfan/chat/completions", "Bearer sk-q"),
    ]


def test_a_blank_setting_does_not_hide_a_later_source() -> None:
    settings = kimi2api.Settings.load({"API_MASTER_KEY": "  "}, {"API_MASTER_KEY": ""}, {"API_MASTER_KEY": "sk-1"})
    assert settings.api_master_key == (kimi2api.ClientKey("sk-1"),)


@pytest.mark.parametrize("origins", [
    "https://*.example.com", "https://*.example.com:8443", "null", "*", "chrome-extension://abcdef", "http://[::1]:3000",
    "tauri://localhost, app://-",
])  # fmt: skip
def test_cors_origins_accepts_origins_as_browsers_send_them(origins: str) -> None:
    assert ", ".join(kimi2api.Settings.load({"CORS_ORIGINS": origins}).cors_origins) == origins


@pytest.mark.parametrize("origin", [
    "chrome-extension://*", "https://Mine.example", "https://mine.example:443", "http://mine.example:80",
    "https://a.*.example", "https://*", "NULL", "mine.example",
])  # fmt: skip
def test_cors_origins_refuses_what_no_browser_sends(origin: str) -> None:
    with pytest.raises(kimi2api.SettingError, match=r"^CORS_ORIGINS: .* list of origins as browsers send them"):
        kimi2api.Settings.load({"CORS_ORIGINS": f"https://mine.example, {origin}"})


@pytest.mark.parametrize("value", ["0", "4097", "2,ann=0", "2,carl=1", "ann=1,ann=2", "x", "2,3"])
def test_invalid_numbers_of_concurrent_chats_are_refused(value: str) -> None:
    with pytest.raises(kimi2api.SettingError, match=r"^MAX_CONCURRENT_CHATS: "):
        kimi2api.Settings.load({"API_MASTER_KEY": "ann:sk-1", "MAX_CONCURRENT_CHATS": value})
    slots = kimi2api.Settings.load({"API_MASTER_KEY": "ann:sk-1", "MAX_CONCURRENT_CHATS": "ann=1"})
    assert slots.max_concurrent_chats == {"": 64, "ann": 1}


def test_the_readmes_tables_list_every_setting() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.*?) \| (.*) \|$", (HERE / "README.md").read_text(encoding="utf-8"), re.M)
    expected = []
    for field in kimi2api.Settings.table():
        default = f"`{field.metadata['default']}`" if field.metadata["default"] else "(empty)"
        expected.append((field.name.upper(), default, field.metadata["meaning"]))
    models = [name for name, *_ in expected].index("MODELS")
    expected[models] = ("MODELS", "(below)", expected[models][2])
    assert rows == expected


def test_env_example_lists_every_setting_with_its_default() -> None:
    assert re.findall(r"^#([A-Z_]+)=(.*)$", (HERE / ".env.example").read_text(encoding="utf-8"), re.M) == [
        (field.name.upper(), field.metadata["default"]) for field in kimi2api.Settings.table()
    ]


########################################################################################################################
# Part 2: Protocol
########################################################################################################################


# ----------------------------------------------------------------------------------------------------------------------
# Errors and JSON
# ----------------------------------------------------------------------------------------------------------------------


def test_unknown_paths_methods_and_models_return_openais_errors(app: Client) -> None:
    assert_error(app.get("/nowhere"), 404, "not_found")
    assert "ends in /v1" in app.get("/nowhere").text
    elsewhere = app.post_json("/v1/images/generations", {})
    assert_error(elsewhere, 404, "not_found")
    assert "chat completions" in elsewhere.text
    response = app.put("/v1/models")
    assert_error(response, 405, "method_not_allowed")
    assert "GET" in response.headers["Allow"]
    assert_error(app.get("/v1/models/gpt-5"), 404, "model_not_found")
    assert_error(chat(app, model="gpt-5"), 404, "model_not_found", "invalid_request_error", "model")


class BrokenInput(io.BytesIO):
    """A request body whose read raises an unexpected error."""

    def read(self, size: int | None = -1) -> bytes:
        raise ZeroDivisionError("of the test")


def test_a_crash_returns_500_and_logs_its_traceback(
    app: Client, caplog: pytest.LogCaptureFixture
) -> None:
    request = webtest.TestRequest.blank("/v1/chat/completions", method="POST", headers={"Content-Length": "9"})
    request.environ["wsgi.input"] = BrokenInput()
    response = app.do_request(request)
    assert_error(response, 500, "internal_error", "server_error")
    assert "Traceback" in caplog.text and "ZeroDivisionError" in caplog.text
    assert answer_text(chat(app)), "the next request succeeds"


def test_the_web_chats_gzip_surrogates_and_line_separators_are_decoded(app: Client, kimi: WebChat) -> None:
    text = "\ud83d\ude00 \ud83d end \u2028 \x85"
    body = gzip.compress(json.dumps({"success": True, "data": {"message": text}}).encode())
    kimi.always = sends(200, body, "application/json", Content_Encoding="gzip")
    assert answer_text(chat(app)) == "\U0001f600 \ufffd end \u2028 \x85"
    response = chat(app, stream=True)
    assert streamed_text(sse_events(response)) == "\U0001f600 \ufffd end \u2028 \x85"
    assert "\u2028" not in response.text and "\x85" not in response.text, "some clients split lines there"


def test_surrogates_of_an_api_are_joined_across_chunks_or_replaced(api_app: Client, api: Api) -> None:
    api.always = api_answers("a\ud83d", "\ude00b \U0001f600 \ude00 c\ud83d", "d")
    assert answer_text(chat(api_app, model="local/k2", user="ada")) == "a\U0001f600b \U0001f600 \ufffd cd"
    assert (
        streamed_text(sse_events(chat(api_app, model="local/k2", stream=True)))
        == "a\U0001f600b \U0001f600 \ufffd cd"
    )
    assert api_app.get("/v1/sessions/ada").status_int == 200


def test_few_high_surrogates_are_kept() -> None:
    waiting: list[str] = []
    kimi2api.parse_upstream_object(json.dumps({"x": ["\ud83d"] * 5000}).encode(), high_surrogates=waiting)
    assert len(waiting) == 100
    assert kimi2api.parse_upstream_object(b'{"x": "\\ude00"}', high_surrogates=waiting) == {"x": "\U0001f600"}


# ----------------------------------------------------------------------------------------------------------------------
# Schemas, chat requests
# ----------------------------------------------------------------------------------------------------------------------


def request_json(more: str) -> bytes:
    """Return the JSON of a request with one message and these fields."""
    return b'{"messages": [{"role": "user", "content": "x"}], ' + more.encode() + b"}"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        pytest.param(b"", None, id="empty"),
        pytest.param(b"{", None, id="half an object"),
        pytest.param(b"[]", None, id="list"),
        pytest.param(b'"x"', None, id="string"),
        pytest.param(b"\xff\xfe{}", None, id="no UTF-8"),
        pytest.param(b"[" * 10_000, None, id="nested too deep"),
        pytest.param(b'{"messages": NaN}', None, id="NaN"),
        pytest.param(request_json('"temperature": 1e999'), None, id="infinity"),
        pytest.param(b'{"messages": [{"role": "user", "content": "\\ud800"}]}', None, id="lone surrogate"),
        pytest.param(
            b'{"messages": ' + b"9" * 5000 + b"}",
            None if hasattr(sys, "set_int_max_str_digits") else "messages",
            id="number of 5,000 digits",
        ),
        pytest.param(b"{}", "messages", id="no messages"),
        pytest.param(b'{"messages": []}', "messages", id="empty messages"),
        pytest.param(b'{"messages": "hi"}', "messages", id="messages as text"),
        pytest.param(b'{"messages": [1]}', "messages[0]", id="message as number"),
        pytest.param(b'{"messages": [{"content": "x"}]}', "messages[0].role", id="no role"),
        pytest.param(
            b'{"messages": [{"role": "user", "content": "x"}, {"role": "boss", "content": "x"}]}',
            "messages[1].role",
            id="unknown role",
        ),
        pytest.param(b'{"messages": [{"role": "user"}]}', "messages[0].content", id="no content"),
        pytest.param(b'{"messages": [{"role": "user", "content": 5}]}', "messages[0].content", id="content as number"),
        pytest.param(
            b'{"messages": [{"role": "user", "content": ["x"]}]}', "messages[0].content[0]", id="part as text"
        ),
        pytest.param(
            b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
            "messages[0].content[0].text",
            id="part without text",
        ),
        pytest.param(b'{"messages": [{"role": "user", "content": ""}]}', "messages", id="only empty content"),
        pytest.param(request_json('"stream": "yes"'), "stream", id="stream as text"),
        pytest.param(request_json('"model": 5'), "model", id="model as number"),
        pytest.param(request_json('"user": ["a"]'), "user", id="user as list"),
        pytest.param(
            request_json('"stream_options": {"include_usage": 1}'),
            "stream_options.include_usage",
            id="include_usage as number",
        ),
    ],
)
def test_an_invalid_request_returns_400_and_names_the_field(
    app: Client, kimi: WebChat, body: bytes, param: str | None
) -> None:
    response = app.post("/v1/chat/completions", body, content_type="application/json")
    assert_error(response, 400, None, "invalid_request_error")
    assert response.json["error"]["param"] == param
    assert not kimi.posts


def function(**fields: Any) -> list[Any]:
    return [{"type": "function", "function": fields}]


def assistant_calls(**call: Any) -> list[Any]:
    return [{"role": "assistant", "tool_calls": [call]}]


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        pytest.param({"stop": 5}, "stop", id="stop as number"),
        pytest.param({"stop": [1]}, "stop[0]", id="stops as numbers"),
        pytest.param({"stop": ["x"] * 1001}, "stop", id="1001 stops"),
        pytest.param({"max_tokens": True}, "max_tokens", id="max_tokens as true"),
        pytest.param({"max_completion_tokens": "9"}, "max_completion_tokens", id="max_completion_tokens as text"),
        pytest.param({"temperature": "hot"}, "temperature", id="temperature as text"),
        pytest.param({"user": "x" * 513}, "user", id="user of 513 characters"),
        pytest.param({"tools": {}}, "tools", id="tools as object"),
        pytest.param({"tools": [1]}, "tools[0]", id="tool as number"),
        pytest.param({"tools": [{"type": "function"}]}, "tools[0].function", id="tool without function"),
        pytest.param({"tools": [CLOCK, *function(name=1)]}, "tools[1].function.name", id="tool's name as number"),
        pytest.param(
            {"tools": function(name="f", parameters=[])}, "tools[0].function.parameters", id="parameters as list"
        ),
        pytest.param({"tool_choice": "maybe"}, "tool_choice", id="unknown tool_choice"),
        pytest.param({"tool_choice": "required"}, "tool_choice", id="tool_choice without tools"),
        pytest.param(
            {"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
            id="tool_choice of no tool",
        ),
        pytest.param(
            {"tools": [CLOCK], "tool_choice": {"function": []}}, "tool_choice.function", id="tool_choice as list"
        ),
        pytest.param({"response_format": {"type": "xml"}}, "response_format.type", id="unknown response_format"),
        pytest.param(
            {"response_format": {"type": "json_schema"}}, "response_format.json_schema", id="no schema"
        ),
        pytest.param({"logit_bias": []}, "logit_bias", id="logit_bias as list"),
        pytest.param({"messages": assistant_calls()}, "messages[0].tool_calls[0].function", id="call without function"),
        pytest.param(
            {"messages": assistant_calls(function={"name": "f"})},
            "messages[0].tool_calls[0].function.arguments",
            id="call without arguments",
        ),
        pytest.param(
            {"messages": assistant_calls(id=[1], function={"name": "f", "arguments": ""})},
            "messages[0].tool_calls[0].id",
            id="call's id as list",
        ),
        pytest.param(
            {"messages": [{"role": "tool", "content": "x", "tool_call_id": 5}]},
            "messages[0].tool_call_id",
            id="tool_call_id as number",
        ),
    ],
)
def test_a_parameter_of_the_wrong_type_returns_400_and_names_the_field(
    app: Client, kimi: WebChat, request_: Any, param: str
) -> None:
    assert_error(chat(app, **request_), 400, None, "invalid_request_error", param)
    assert not kimi.posts


def test_text_parts_are_joined_and_an_image_returns_400(app: Client, kimi: WebChat) -> None:
    assert answer_text(chat(app, [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]))
    assert kimi.posts[-1]["message"] == "one\ntwo"
    for kind in ("image_url", "input_audio", "file"):
        response = chat(app, [{"type": "text", "text": "see"}, {"type": kind, kind: {}}])
        assert_error(response, 400, "unsupported_value", param="messages[0].content[1].type")


def test_unknown_fields_and_a_byte_order_mark_are_ignored(app: Client) -> None:
    body = {
        "messages": [{"role": "user", "content": "x", "name": "ada"}],
        "temperature": 0.3,
        "seed": 1,
        "zzz": None,
        "stream": None,
        "user": None,
        "model": None,
        "stream_options": None,
    }
    response = app.post("/v1/chat/completions", b"\xef\xbb\xbf" + json.dumps(body).encode(), content_type="text/plain")
    assert answer_text(response)


def test_a_body_of_too_many_values_returns_400(app: Client) -> None:
    table = ',"{[1],\\' * 100_000
    for values, status in (([[]] * 200_000, 400), ([1] * 300_000, 200), ("x" * 1_000_000, 200), (table, 200)):
        response = chat(app, x=values)
        assert response.status_int == status and (status == 200 or "too many values" in response.text)


def test_the_published_schema_accepts_what_the_program_accepts(app: Client) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = app.get("/openapi.json").json["components"]["schemas"]["Request"]
    valid = jsonschema.Draft202012Validator(schema).is_valid
    odd = [None, True, 0, 1, 2.0, 0.5, -1, "", "x", "auto", [], [1], ["x"], ["x"] * 5, {}, {"type": "text"}, {"x": 1}]
    odd += [{"type": "function"}, {"type": "json_schema"}, {"function": {"name": "clock"}}, {"include_usage": 1}]
    odd += [[value] for value in odd if isinstance(value, dict)]
    message = {"role": "user", "content": "x"}
    bodies = [{"messages": [message], "tools": [CLOCK], name: value} for name in schema["properties"] for value in odd]
    for name in schema["properties"]["messages"]["items"]["properties"]:
        bodies += [{"messages": [{**message, name: value}]} for value in odd]
        bodies += [{"messages": [{**message, "role": "assistant", name: value}]} for value in odd]
    refused = 0
    for body in bodies:
        response = app.post_json("/v1/chat/completions", body)
        by_program = response.status_int == 400 and response.json["error"]["code"] is None
        beyond = response.json["error"]["param"] if by_program else ""  # no schema can compare two fields
        if beyond != "tool_choice" and "no text" not in response.text:
            assert valid(body) != by_program, (body, response.text)
        refused += by_program
    assert 100 < refused < len(bodies) - 100


# ----------------------------------------------------------------------------------------------------------------------
# Deltas and their fold, tokens and pieces
# ----------------------------------------------------------------------------------------------------------------------


def test_tool_calls_are_folded_by_index(api_app: Client, api: Api) -> None:
    def call(index: int, arguments: str, function: Any = (), **more: Any) -> dict[str, Any]:
        function = {"arguments": arguments, **dict(function)}
        return {"tool_calls": [{"index": index, "function": function, **more}]}

    def first(index: int, arguments: str) -> dict[str, Any]:
        return call(index, arguments, {"name": f"f{index}"}, id=f"call_{index}", type="function")

    deltas = [first(0, ""), call(0, '{"a":'), call(0, "1}"), first(1, "{}")]
    api.always = api_answers(deltas=deltas, finish="tool_calls")
    choice = chat(api_app, model="local/k2").json["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"] == [
        {"id": "call_0", "type": "function", "function": {"name": "f0", "arguments": '{"a":1}'}},
        {"id": "call_1", "type": "function", "function": {"name": "f1", "arguments": "{}"}},
    ]


def test_each_choice_is_folded_by_itself(api_app: Client, api: Api) -> None:
    def says_of(index: int, text: str) -> dict[str, Any]:
        return {"choices": [{"index": index, "delta": {"content": text}, "finish_reason": None}]}

    ends = {"choices": [{"index": index, "delta": {}, "finish_reason": "stop"} for index in (0, 1)]}
    api.always = api_streams(says_of(0, "a"), says_of(1, "x"), says_of(0, "b"), says_of(1, "y"), ends)
    body = chat(api_app, model="local/k2", n=2).json
    assert [choice["message"]["content"] for choice in body["choices"]] == ["ab", "xy"]
    assert body["usage"]["total_tokens"] > 0, "upstream sent no usage, so it is estimated"


def test_the_token_estimate_distinguishes_chinese_from_english() -> None:
    assert kimi2api.estimate_tokens("") == 0
    assert kimi2api.estimate_tokens("a") == 1
    assert kimi2api.estimate_tokens("word " * 80) == 100
    assert kimi2api.estimate_tokens("月之暗面" * 25) == 60
    assert kimi2api.estimate_tokens("한국어ひらがな") >= 4


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("The quick brown fox.\n\n  jumps   over\tthe lazy dog. ", id="English"),
        pytest.param("月之暗面科技有限公司，成立于2023年。Kimi是智能助手！", id="Chinese"),
        pytest.param(
            "e\u0301e\u0301 か\u3099字\ufe00\ufe00字 👨\u200d👩\u200d👧字👍🏽字🇨🇳🇨🇳", id="combining marks and emoji"
        ),
        pytest.param("x" * 500, id="one long word"),
        pytest.param(" ", id="space"),
        pytest.param("\n", id="line end"),
        pytest.param("a", id="one letter"),
        pytest.param("字" * 300, id="one long word of Chinese"),
    ],
)
def test_pieces_resemble_words_and_never_split_a_grapheme(text: str) -> None:
    for most in (1, 3, 100):
        parts = list(kimi2api.pieces(text, most))
        assert "".join(parts) == text and len(parts) <= most and all(parts)
        for part in parts[1:]:
            assert not unicodedata.category(part[0]).startswith("M") and part[0] not in "\u200d🏽"
        assert not any(part.endswith("\u200d") for part in parts[:-1])
    if text.startswith("The quick"):
        assert parts[:3] == ["The", " quick", " brown"]
    if text.startswith("月之"):
        assert max(map(len, parts)) <= 6 and len(parts) > 10


@pytest.mark.parametrize(
    ("text", "max_tokens", "kept"),
    [
        pytest.param("ae\u0301\u0301\u0301b", 1, "a", id="combining marks"),
        pytest.param("月" * 10, 3, "月" * 5, id="Chinese"),
        pytest.param("🇨🇳" * 5, 1, "🇨🇳" * 2, id="flags"),
        pytest.param("👩🏽\u200d🚀" * 3, 2, "👩🏽\u200d🚀" * 2, id="emoji of several"),
    ],
)
def test_max_tokens_never_splits_a_grapheme(
    app: Client, kimi: WebChat, text: str, max_tokens: int, kept: str
) -> None:
    kimi.answer = text
    response = chat(app, max_tokens=max_tokens)
    assert answer_text(response) == kept and response.json["choices"][0]["finish_reason"] == "length"


# ----------------------------------------------------------------------------------------------------------------------
# Chat completion format
# ----------------------------------------------------------------------------------------------------------------------


def test_a_chat_completion_has_every_required_field(app: Client, kimi: WebChat) -> None:
    kimi.answer = "你好，世界！"
    response = chat(app, model="kimi-k2-instruct")
    body = response.json
    assert {"id", "object", "created", "model", "choices", "usage"} <= set(body)
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    assert body["model"] == "kimi-k2-instruct"
    assert abs(body["created"] - time.time()) < PATIENCE
    message = {"role": "assistant", "content": "你好，世界！", "refusal": None}
    assert body["choices"] == [{"index": 0, "finish_reason": "stop", "logprobs": None, "message": message}]
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"] > 0
    assert "你好" in response.text, "UTF-8, not \\u escapes"


@pytest.mark.parametrize("include_usage", [False, True], ids=["without usage", "with usage"])
def test_chat_chunks_have_openais_shape(app: Client, kimi: WebChat, include_usage: bool) -> None:
    response = chat(app, stream=True, stream_options={"include_usage": include_usage})
    assert response.content_type == "text/event-stream" and response.headers["Cache-Control"] == "no-cache"
    *chunks, done = sse_events(response)
    assert done == "[DONE]" and streamed_text(chunks) == kimi.answer
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    last = chunks[-2] if include_usage else chunks[-1]
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    earlier = chunks[: chunks.index(last)]
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in earlier)
    if include_usage:
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 0
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
    else:
        assert not any("usage" in chunk for chunk in chunks)


def test_a_legacy_completion_sends_its_prompt_as_a_users_message(app: Client, kimi: WebChat) -> None:
    for prompt in ("Once upon", ["Once upon"]):
        response = app.post_json("/v1/completions", {"prompt": prompt, "max_tokens": 50, "temperature": 0.1})
        body = response.json
        assert body["object"] == "text_completion" and body["id"].startswith("cmpl-") and body["model"] == "kimi"
        choice = {"text": kimi.answer, "index": 0, "logprobs": None, "finish_reason": "stop"}
        assert body["choices"] == [choice] and body["usage"]["total_tokens"] > 0
        assert kimi.posts[-1]["message"] == "Once upon"


def test_a_legacy_completion_can_stream(app: Client, kimi: WebChat) -> None:
    asked = {"prompt": "x", "stream": True, "stream_options": {"include_usage": True}}
    *chunks, done = sse_events(app.post_json("/v1/completions", asked))
    assert done == "[DONE]" and chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 0
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert "".join(choice["text"] for choice in choices) == kimi.answer
    assert choices[-1]["finish_reason"] == "stop" and all("delta" not in choice for choice in choices)
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


def test_a_legacy_completion_passes_chat_parameters_to_an_api(api_app: Client, api: Api) -> None:
    asked = {"model": "local/k2", "prompt": "x", "seed": 7, "echo": False, "best_of": 1, "suffix": None}
    assert api_app.post_json("/v1/completions", asked).json["choices"][0]["text"] == "Hi from the API."
    path, _, sent = api.asked[0]
    assert path == "/v1/chat/completions" and sent["seed"] == 7
    assert sent["messages"] == [{"role": "user", "content": "x"}] and not sent.keys() & {"prompt", "echo", "best_of"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param("prompt", ["a", "b"], id="several prompts"),
        pytest.param("prompt", [1, 2], id="tokens"),
        pytest.param("prompt", None, id="null"),
        pytest.param("echo", True, id="echo"),
        pytest.param("suffix", "end", id="suffix"),
        pytest.param("best_of", 2, id="best of two"),
        pytest.param("logprobs", 3, id="log probabilities"),
    ],
)
def test_an_unsupported_legacy_completion_returns_400(app: Client, kimi: WebChat, field: str, value: Any) -> None:
    response = app.post_json("/v1/completions", {"prompt": "x", field: value})
    assert_error(response, 400, None, "invalid_request_error")
    assert not kimi.posts
    assert response.json["error"]["param"].startswith(field) and "[False]" not in response.text
    if value == ["a", "b"]:
        assert response.json["error"]["message"] == "'prompt' must be a string or a list of at most 1 items."


def embed(app: Client, **body: Any) -> Any:
    return app.post_json("/v1/embeddings", {"input": "x", **body})


EMBEDDINGS = {
    "object": "list",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.5, -1.25e-05]}],
    "model": "theirs",
    "usage": {"prompt_tokens": 1, "total_tokens": 1},
}


def test_an_api_answers_embeddings(make_app: MakeApp, api_settings: dict[str, str], api: Api) -> None:
    api.always = api_sends(200, EMBEDDINGS, **{"x-ratelimit-remaining-requests": "4"})
    app = make_app(**api_settings, MODELS="kimi=x,small=local/e1")
    response = embed(app, model="small", input=["x", "y"], dimensions=2, extra={})
    assert response.json == {**EMBEDDINGS, "model": "small"}
    assert response.headers["X-Kimi2api-Provider"] == "local"
    assert response.headers["x-ratelimit-remaining-requests"] == "4"
    path, headers, sent = api.asked[0]
    assert path == "/v1/embeddings" and headers["Authorization"] == "Bearer sk-theirs"
    assert sent == {"model": "e1", "input": ["x", "y"], "dimensions": 2, "extra": {}}


@pytest.mark.parametrize(
    ("act", "status", "code"),
    [
        pytest.param(api_sends(400, {"error": {"message": "too many", "code": "c"}}), 400, "c", id="refused"),
        pytest.param(api_sends(429, {"error": {"message": "slow"}}), 429, "upstream_rate_limited", id="rate limit"),
        pytest.param(api_sends(401, {}), 502, "upstream_auth", id="our key"),
        pytest.param(api_sends(200, {"error": {"message": "x"}}), 502, "upstream_unavailable", id="error with 200"),
        pytest.param(api_sends(200, {"data": None}), 502, "upstream_invalid_response", id="no list"),
        pytest.param(api_sends(200, b"[[1, 2"), 502, "upstream_invalid_response", id="cut off"),
        pytest.param(resets, 502, "upstream_unavailable", id="reset"),
    ],
)
def test_embeddings_report_errors_as_chats_do(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, act: Act, status: int, code: str
) -> None:
    api.always = act
    response = embed(make_app(**api_settings, FALLBACK_MODELS="kimi"), model="local/e1")
    assert response.status_int == status and response.json["error"]["code"] == code


@pytest.mark.parametrize(
    ("body", "param"),
    [
        pytest.param({"input": None}, "input", id="null"),
        pytest.param({"input": ""}, "input", id="empty text"),
        pytest.param({"input": []}, "input", id="empty list"),
        pytest.param({"encoding_format": "hex"}, "encoding_format", id="unknown form"),
        pytest.param({"dimensions": 0}, "dimensions", id="no dimensions"),
        pytest.param({"model": "kimi"}, "model", id="the web chat"),
        pytest.param({}, "model", id="the default, which is the web chat"),
    ],
)
def test_invalid_embeddings_requests_return_400(app: Client, kimi: WebChat, body: Any, param: str) -> None:
    response = embed(app, **body)
    assert response.status_int == 400 and response.json["error"]["param"] == param and not kimi.posts


def test_embeddings_are_abandoned_when_the_client_disconnects(
    start_program: StartProgram, api_settings: dict[str, str], api: Api
) -> None:
    def waits(handler: ApiHandler) -> None:
        if not handler.rfile.read(1):
            api.hung_up.set()

    api.always = waits
    program = start_program(before=CHECKS_OFTEN, **api_settings)
    body = b'{"model": "local/e1", "input": "x"}'
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    link = program.open(head + body)
    wait_for(lambda: api.asked)
    assert program.running() == 1
    link.close()
    assert api.hung_up.wait(PATIENCE)
    wait_for(lambda: program.running() == 0)


########################################################################################################################
# Part 3: Responses API
########################################################################################################################


# ----------------------------------------------------------------------------------------------------------------------
# Responses items, requests and format
# ----------------------------------------------------------------------------------------------------------------------


def respond(app: Client, input: Any = "Hello", headers: dict[str, str] | None = None, **body: Any) -> Any:
    return app.post_json("/v1/responses", {"input": input, **body}, headers=headers)


def output_text(response: Any) -> str:
    assert response.status_int == 200, response.text
    messages = [item for item in response.json["output"] if item["type"] == "message"]
    return "".join(part["text"] for message in messages for part in message["content"])


def response_events(response: Any) -> list[Any]:
    """Return the events of a stream. Assert their names, numbers and order, and their types if openai is installed."""
    body = (response if isinstance(response, bytes) else response.body).decode()
    parsed = []
    for number, text in enumerate(re.findall(r"(?:event: .*\ndata: .*)(?=\n\n)", body)):
        name, data = re.fullmatch(r"event: (.*)\ndata: (.*)", text).groups()
        event = json.loads(data)
        assert event["type"] == name and event["sequence_number"] == number
        parsed.append(event)
    with suppress(ImportError):
        from openai.types.responses import ResponseStreamEvent
        from pydantic import TypeAdapter

        shape = TypeAdapter(ResponseStreamEvent)
        for event in parsed:
            assert shape.validate_python(event).type == event["type"]
    assert "[DONE]" not in body
    assert_items_are_sequential(parsed)
    return parsed


def assert_items_are_sequential(events: list[Any]) -> None:
    """Assert that each item is complete before the next is added, and that the output lists all items."""
    done: list[Any] = []
    current: Any = None  # the item between its first event and its last
    text: str | None = ""  # the text of its deltas so far; None once it is complete
    for event in events:
        kind = event["type"].removeprefix("response.")
        if "output_index" not in event:
            continue
        assert event["output_index"] == len(done), kind
        if kind == "output_item.added":
            assert current is None
            current, text = event["item"], ""
            continue
        assert event.get("item_id", current["id"]) == current["id"]
        if kind == "output_item.done":
            has_no_text = current["type"] in ("compaction", "tool_search_call")
            assert (text == "" if has_no_text else text is None) and event["item"]["id"] == current["id"]
            done.append(event["item"])
            current = None
        elif kind.endswith(".delta"):
            text += event["delta"]
        elif not kind.startswith(("content_part", "reasoning_summary_part", "output_text.annotation")):
            assert text in [event.get(name) for name in ("text", "refusal", "arguments", "input")], kind
            text = None
    if events and events[-1]["type"] in ("response.completed", "response.incomplete"):
        assert current is None and events[-1]["response"]["output"] == done


def event_kinds(events: list[Any]) -> list[str]:
    """Return the types of events without `response.`, each run of equal types once."""
    return [kind for kind, _ in itertools.groupby(event["type"].removeprefix("response.") for event in events)]


def test_a_response_has_every_required_field(app: Client, kimi: WebChat) -> None:
    body = respond(app, model="kimi-k2-instruct", instructions="Be short.", metadata={"a": "b"}, temperature=0.5).json
    assert body["object"] == "response" and body["id"].startswith("resp_") and body["status"] == "completed"
    assert body["model"] == "kimi-k2-instruct" and abs(body["created_at"] - time.time()) < PATIENCE
    assert body["instructions"] == "Be short." and body["metadata"] == {"a": "b"} and body["temperature"] == 0.5
    assert body["completed_at"] >= body["created_at"] and body["presence_penalty"] == body["frequency_penalty"] == 0
    (message,) = body["output"]
    assert message["type"] == "message" and message["role"] == "assistant" and message["status"] == "completed"
    assert message["content"] == [{"type": "output_text", "text": kimi.answer, "annotations": [], "logprobs": []}]
    usage = body["usage"]
    assert usage["input_tokens"] + usage["output_tokens"] == usage["total_tokens"] > 0
    assert kimi.posts[0]["message"] == "Be short.\n\n用户: Hello"
    types = pytest.importorskip("openai.types.responses")
    assert types.Response.model_validate(body).output_text == kimi.answer


def test_events_of_a_text_come_in_openais_order(app: Client, kimi: WebChat) -> None:
    events = response_events(respond(app, stream=True))
    assert event_kinds(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert "".join(event["delta"] for event in events if event["type"].endswith(".delta")) == kimi.answer
    begun = events[0]["response"]
    assert begun["status"] == "in_progress" and begun["output"] == [] and begun["completed_at"] is None
    final = events[-1]["response"]
    assert final["output"] == [events[-2]["item"]] and final["usage"]["total_tokens"] > 0
    assert {event["item_id"] for event in events if "item_id" in event} == {final["output"][0]["id"]}


THOUGHT_AND_CALLS = api_answers(
    deltas=[
        {"role": "assistant", "reasoning_content": "Let me "},
        {"reasoning_content": "see."},
        {"content": "I look."},
        {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "clock", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]},
        {"tool_calls": [{"index": 1, "id": "c2", "function": {"name": "box__open", "arguments": '{"a":'}}]},
        {"tool_calls": [{"index": 1, "function": {"arguments": "1}"}}]},
        {"tool_calls": [{"index": 2, "id": "c3", "function": {"name": "patch", "arguments": '{"input": "x\\ny"}'}}]},
    ],
    finish="tool_calls",
)
TOOLS = [
    {"type": "function", "name": "clock", "parameters": {"type": "object", "properties": {}}, "strict": False},
    {"type": "namespace", "name": "box", "description": "", "tools": [{"type": "function", "name": "open"}]},
    {"type": "custom", "name": "patch", "format": {"type": "grammar", "syntax": "lark", "definition": "start: X"}},
    {"type": "web_search", "external_web_access": False},
]
REASONING = {"include": ["reasoning.encrypted_content"]}


@json_and_stream
def test_reasoning_text_and_calls_become_items_and_go_back(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, stream: bool
) -> None:
    api.always = THOUGHT_AND_CALLS
    response = respond(make_app(**api_settings), model="local/k2", tools=TOOLS, stream=stream, store=False, **REASONING)
    assert response.headers["X-Kimi2api-Ignored"] == "web_search"
    if stream:
        events = response_events(response)
        call = ["output_item.added", "{}.delta", "{}.done", "output_item.done"]
        text = [*call[:1], "content_part.added", *call[1:3], "content_part.done", *call[3:]]
        assert event_kinds(events) == [
            "created",
            "in_progress",
            *(kind.format("reasoning_text") for kind in text),
            *(kind.format("output_text") for kind in text),
            *(kind.format("function_call_arguments") for kind in call * 2),
            *(kind.format("custom_tool_call_input") for kind in call),
            "completed",
        ]
        final = events[-1]["response"]
        names = [event["name"] for event in events if event["type"] == "response.function_call_arguments.done"]
        assert names == ["clock", "open"]
    else:
        final = response.json
    reasoning, message, clock, box, patch = final["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Let me see."}] and reasoning["summary"] == []
    assert message["content"][0]["text"] == "I look."
    assert (clock["type"], clock["call_id"]) == ("function_call", "c1")
    assert (clock["name"], clock["arguments"]) == ("clock", "{}")
    assert (box["name"], box["namespace"], box["arguments"]) == ("open", "box", '{"a":1}')
    assert (patch["type"], patch["call_id"], patch["input"]) == ("custom_tool_call", "c3", "x\ny")
    assert final["usage"]["input_tokens"] == 5 and final["usage"]["input_tokens_details"]["cached_tokens"] == 1
    functions = {entry["function"]["name"]: entry["function"] for entry in api.asked[0][2]["tools"]}
    assert functions.keys() == {"clock", "box__open", "patch"}
    assert functions["patch"]["parameters"]["required"] == ["input"] and "start: X" in functions["patch"]["description"]
    # A stateless client sends the items back
    results = [
        {"type": "function_call_output", "call_id": "c1", "output": "12:00"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "open"}]},
        {"type": "custom_tool_call_output", "call_id": "c3", "output": "done"},
    ]
    carried = {**reasoning, "content": None}
    assert carried["encrypted_content"]
    items = [{"role": "user", "content": "x"}, carried, message, clock, box, patch, *results]
    api.always = api_answers("Fine.")
    assert output_text(respond(make_app(**api_settings), items, model="local/k2", tools=TOOLS, store=False)) == "Fine."
    question, answered, *told_results = api.asked[-1][2]["messages"]
    assert question == {"role": "user", "content": "x"}
    assert answered["content"] == "I look." and answered["reasoning_content"] == "Let me see."
    assert [(call["id"], call["function"]) for call in answered["tool_calls"]] == [
        ("c1", {"name": "clock", "arguments": "{}"}),
        ("c2", {"name": "box__open", "arguments": '{"a":1}'}),
        ("c3", {"name": "patch", "arguments": '{"input":"x\\ny"}'}),
    ]
    assert told_results == [
        {"role": "tool", "tool_call_id": "c1", "content": "12:00"},
        {"role": "tool", "tool_call_id": "c2", "content": "open"},
        {"role": "tool", "tool_call_id": "c3", "content": "done"},
    ]


def test_response_parameters_reach_an_api_under_their_chat_names(
    api_app: Client, api: Api
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    response = respond(
        api_app,
        [
            {"type": "message", "role": "developer", "content": "d"},
            {"role": "user", "content": [
                {"type": "input_text", "text": "a"},
                {"type": "input_image", "image_url": "data:image/png;base64,xx", "detail": "low"},
                {"type": "input_file", "file_data": "data:x", "filename": "f.pdf"},
            ]},
        ],
        model="local/k2",
        tools=TOOLS[:1],
        tool_choice={"type": "function", "name": "clock"},
        parallel_tool_calls=False,
        text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
        max_output_tokens=50,
        reasoning={"effort": "low", "summary": "auto"},
        temperature=0.5,
        top_p=0.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        user="ada",
        metadata={"a": "b"},
        truncation="auto",
        include=[],
    )
    assert output_text(response) == "Hi from the API."
    sent = api.asked[0][2]
    assert sent.pop("messages") == [
        {"role": "system", "content": "d"},
        {"role": "user", "content": [
            {"type": "text", "text": "a"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,xx", "detail": "low"}},
            {"type": "file", "file": {"file_data": "data:x", "filename": "f.pdf"}},
        ]},
    ]
    assert sent.pop("tools")[0]["function"]["name"] == "clock" and sent.pop("stream_options")
    assert sent == {
        "model": "k2",
        "stream": True,
        "tool_choice": {"type": "function", "function": {"name": "clock"}},
        "parallel_tool_calls": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}},
        "max_tokens": 50,
        "reasoning_effort": "low",
        "temperature": 0.5,
        "top_p": 0.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "user": "ada",
        "metadata": {"a": "b"},
    }


USER = {"role": "user", "content": "x"}
IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,xx"}


def user_parts(*content: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        pytest.param({"input": None}, "input", id="no input"),
        pytest.param({"input": []}, "input", id="no items"),
        pytest.param({"input": [{"type": "item_reference", "id": "x"}]}, "input", id="reference"),
        pytest.param({"input": [{"type": "web_search_call"}]}, "input", id="unknown item alone"),
        pytest.param({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", id="role"),
        pytest.param({"input": [{"role": "user"}]}, "input[0].content", id="no content"),
        pytest.param(user_parts({"type": "input_text"}), "input[0].content[0].text", id="part without text"),
        pytest.param(
            user_parts({"type": "input_image", "file_id": "f"}), "input[0].content[0].image_url", id="image by id"
        ),
        pytest.param(user_parts({"type": "input_file", "filename": "f"}), "input", id="file for the web chat"),
        pytest.param(
            {"input": [USER, {"role": "user", "content": [{"type": "input_text", "text": "x"}, IMAGE]}]},
            "input",
            id="image for the web chat",
        ),
        pytest.param(
            {"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments", id="half a call"
        ),
        pytest.param(
            {"input": [USER, {"type": "function_call_output", "call_id": "c", "output": [IMAGE]}]},
            "input",
            id="image from a tool for the web chat",
        ),
        pytest.param({"tools": [{"type": "function"}]}, "tools[0].name", id="tool without a name"),
        pytest.param(
            {"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function"}]}]},
            "tools[0].tools[0].name",
            id="nested tool without a name",
        ),
        pytest.param({"tools": [{"name": "f"}]}, "tools[0].type", id="tool without a type"),
        pytest.param({"tool_choice": {"type": "web_search"}}, "tool_choice.type", id="choice of what only OpenAI has"),
        pytest.param({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", id="unknown choice"),
        pytest.param({"tool_choice": "required"}, "tool_choice", id="choice without tools"),
        pytest.param(
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function"}]}},
            "tool_choice.tools[0].name",
            id="allowed tool without a name",
        ),
        pytest.param({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", id="no schema"),
        pytest.param({"max_output_tokens": 0}, "max_output_tokens", id="no tokens"),
        pytest.param({"user": "x" * 513}, "user", id="long user"),
        pytest.param({"metadata": {str(number): "" for number in range(17)}}, "metadata", id="17 pairs of metadata"),
        pytest.param({"metadata": {"k" * 65: ""}}, "metadata", id="long key of metadata"),
        pytest.param({"metadata": {"k": "v" * 513}}, "metadata.k", id="long value of metadata"),
        pytest.param({"metadata": {"k": 1}}, "metadata.k", id="metadata that is no text"),
        pytest.param({"background": True}, "background", id="background"),
        pytest.param({"conversation": "conv_1"}, "conversation", id="conversation"),
        pytest.param({"prompt": {"id": "p"}}, "prompt", id="prompt"),
        pytest.param({"previous_response_id": "resp_x"}, "previous_response_id", id="unknown response"),
        pytest.param({"instructions": "i", "input": "x" * 2000}, "input", id="too long"),
        pytest.param({"input": " "}, "input", id="no text"),
    ],
)
def test_an_invalid_response_request_returns_400_in_its_own_terms(
    app: Client, kimi: WebChat, body: Any, param: str
) -> None:
    response = app.post_json("/v1/responses", {"input": "x", **body})
    assert response.status_int == 400 and response.json["error"]["param"] == param, response.text
    assert "messages[" not in response.text and "'messages'" not in response.text and not kimi.posts


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("messages.[3].content", "input"),
        ("tools[1].function.name", "tools"),
        ("response_format.json_schema.name", "text.format"),
        ("tool_choice.function.name", "tool_choice"),
        ("max_completion_tokens", "max_output_tokens"),
        ("service_tier", "service_tier"),
    ],
)
def test_an_apis_error_names_the_field_of_the_response_request(
    api_app: Client, api: Api, theirs: str, ours: str
) -> None:
    api.always = api_sends(400, {"error": {"message": f"Bad '{theirs}'.", "param": theirs}})
    response = respond(api_app, model="local/k2", tools=TOOLS)
    assert_error(response, 400, None, param=ours)
    assert f"Bad '{ours}'." in response.text


@pytest.mark.parametrize(
    ("types", "header"),
    [
        pytest.param(["web_search", "mcp", "web_search"], "mcp, web_search", id="known"),
        pytest.param(["a\r\nX-Evil: 1", "ü", ""], "", id="not for a header"),
        pytest.param(["x" * 70_000, *(f"t{n}" for n in range(10_000))], "t0, .{996}", id="too much for a header"),
    ],
)
def test_hosted_tools_are_ignored_and_named_in_a_header(
    app: Client, kimi: WebChat, types: list[str], header: str
) -> None:
    response = respond(app, tools=[{"type": type} for type in types])
    assert output_text(response) == kimi.answer and "X-Evil" not in response.headers
    assert re.fullmatch(header, response.headers.get("X-Kimi2api-Ignored", "")) and "" not in response.headers.values()


def test_tool_results_follow_their_calls(api_app: Client, api: Api) -> None:
    def call(id: str) -> dict[str, Any]:
        return {"type": "function_call", "call_id": id, "name": "f", "arguments": "{}"}

    def result(id: str) -> dict[str, Any]:
        return {"type": "function_call_output", "call_id": id, "output": id}

    rule = {"role": "developer", "content": "rule"}
    items = [USER, call("a"), call("b"), rule, result("b"), USER, result("a"), call("a"), result("a"), result("other")]
    assert output_text(respond(api_app, items, model="local/k2"))
    order = [message.get("tool_call_id") or message["role"] for message in api.asked[0][2]["messages"]]
    assert order == ["other", "user", "assistant", "b", "a", "system", "user", "assistant", "a"]


def test_tool_results_follow_the_previous_response_with_their_calls(
    api_app: Client, api: Api
) -> None:
    api.script.append(THOUGHT_AND_CALLS)
    called = respond(api_app, model="local/k2", tools=TOOLS).json["id"]
    items = [USER, *({"type": "function_call_output", "call_id": id, "output": id} for id in ("c1", "c2", "c3"))]
    assert output_text(respond(api_app, items, model="local/k2", tools=TOOLS, previous_response_id=called))
    order = [message.get("tool_call_id") or message["role"] for message in api.asked[1][2]["messages"]]
    assert order == ["user", "assistant", "c1", "c2", "c3", "user"]


@pytest.mark.parametrize("kind", ["reasoning", "texts"])
def test_reading_many_items_of_one_answer_takes_linear_time(kind: str) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    item = {
        "reasoning": {"type": "reasoning", "summary": [{"text": "x" * 500}]},
        "texts": {"role": "assistant", "content": "x" * 500},
    }[kind]

    def seconds(count: int) -> float:
        items = [call, *[item] * count]
        started = time.thread_time()  # CPU time does not depend on other processes
        (message,) = kimi2api.ItemReader().read(items)
        assert len(message["content"] or message["reasoning_content"]) >= count * 500
        return time.thread_time() - started

    assert min(seconds(40_000) for _ in range(3)) < 30 * min(seconds(5_000) for _ in range(3)), "eightfold is linear"


def test_input_without_a_message_returns_400(api_app: Client, api: Api) -> None:
    items = [{"type": "reasoning", "summary": [{"text": "x"}]}, {"role": "assistant", "content": ""}]
    assert_error(respond(api_app, items, model="local/k2"), 400, None, param="input")
    assert not api.asked


def test_an_api_receives_an_image_from_a_tool(api_app: Client, api: Api) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "view_image", "arguments": "{}"}
    output = [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": "data:x", "detail": "high"}]
    items = [USER, call, {"type": "function_call_output", "call_id": "c", "output": output}]
    assert output_text(respond(api_app, items, model="local/k2"))
    content = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:x", "detail": "high"}}]
    assert api.asked[0][2]["messages"][2] == {"role": "tool", "tool_call_id": "c", "content": content}


def test_a_response_continues_another_and_may_fork(app: Client, kimi: WebChat) -> None:
    items = [{"role": "developer", "content": "Rule."}, {"role": "user", "content": "One"}]
    first = respond(app, items, instructions="Once.").json["id"]
    second = respond(app, "Two", previous_response_id=first).json
    assert second["previous_response_id"] == first
    assert kimi.posts[-1]["message"] == f"Rule.\n\n用户: One\n模型: {kimi.answer}\n用户: Two"
    respond(app, "Three", previous_response_id=second["id"])
    assert "用户: Two" in kimi.posts[-1]["message"] and "Once." not in kimi.posts[-1]["message"]
    respond(app, "Fork", previous_response_id=first)
    assert "用户: Two" not in kimi.posts[-1]["message"] and "用户: One" in kimi.posts[-1]["message"]


def test_a_conversation_too_long_to_store_is_never_truncated_silently(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kimi2api, "MAX_RESPONSE_BYTES", 5_000_000)
    app = make_app(**api_settings)
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    api.always = api_answers(deltas=[{"tool_calls": [call]}], finish="tool_calls")
    made = respond(app, model="local/k2").json
    results = 0
    while True:  # one turn, to which each step adds a result
        item = {"type": "function_call_output", "call_id": "call_1", "output": f"{results}" * 1_000_000}
        made = respond(app, [item], model="local/k2", previous_response_id=made["id"])
        if made.status_int != 200:
            break
        results += 1
        made = made.json
        roles = [message["role"] for message in api.asked[-1][2]["messages"]]
        assert roles == ["user", *["assistant", "tool"] * results]
    assert results == 5, "the API received everything that is stored"
    assert_error(made, 400, "previous_response_not_found", param="previous_response_id")
    assert "Send the whole conversation" in made.json["error"]["message"]


@json_and_stream
def test_a_response_too_large_to_store_evicts_no_session(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(kimi2api, "MAX_OWNER_BYTES", 1 << 20)
    monkeypatch.setattr(kimi2api, "MAX_RESPONSE_BYTES", 1 << 18)
    app = make_app(**api_settings)
    assert answer_text(chat(app, user="ada"))
    api.always = api_answers("x" * (2 << 20))
    assert respond(app, model="local/k2", stream=stream).status_int == 200
    assert [entry["user"] for entry in app.get("/v1/sessions").json["data"]] == ["ada"]


def test_an_answer_of_too_many_items_ends_with_an_error(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kimi2api, "MAX_ITEMS", 3, raising=False)
    api.always = api_answers(deltas=[{"reasoning_content": "a"}, {"content": "b"}] * 4)
    response = respond(make_app(**api_settings), model="local/k2", stream=True)
    assert response.text.count("event: response.output_item.added") == 3
    assert "event: response.failed" in response.text and "event: response.completed" not in response.text


def test_an_item_may_be_referenced_once(api_app: Client, api: Api) -> None:
    reference = {"type": "item_reference", "id": respond(api_app, model="local/k2").json["output"][0]["id"]}
    assert output_text(respond(api_app, [reference, USER], model="local/k2"))
    assert_error(respond(api_app, [reference, USER, reference], model="local/k2"), 400, None, param="input")
    assert len(api.asked) == 2


@json_and_stream
def test_input_may_reference_items_of_stored_responses(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, stream: bool
) -> None:
    app = make_app(**api_settings, API_MASTER_KEY="sk-1,sk-2")
    mine, other = {"Authorization": "Bearer sk-1"}, {"Authorization": "Bearer sk-2"}
    api.always = THOUGHT_AND_CALLS
    response = respond(app, headers=mine, model="local/k2", tools=TOOLS, stream=stream)
    made = response_events(response)[-1]["response"] if stream else response.json
    references = [{"type": "item_reference", "id": item["id"]} for item in made["output"][:3]]
    assert len({entry["id"] for entry in references}) == 3
    items = [USER, *references, {"type": "function_call_output", "call_id": "c1", "output": "12:00"}]
    api.always = api_answers("Fine.")
    assert output_text(respond(app, items, headers=mine, model="local/k2")) == "Fine."
    _, answered, result = api.asked[-1][2]["messages"]
    assert answered["content"] == "I look." and answered["reasoning_content"] == "Let me see."
    assert [call["id"] for call in answered["tool_calls"]] == ["c1"] and result["content"] == "12:00"
    assert_error(respond(app, items, headers=other, model="local/k2"), 400, None, param="input")


def test_only_its_key_reads_and_deletes_a_stored_response(make_app: MakeApp) -> None:
    app = make_app(API_MASTER_KEY="sk-1,sk-2")
    mine, other = {"Authorization": "Bearer sk-1"}, {"Authorization": "Bearer sk-2"}
    made = respond(app, headers=mine).json
    path = f"/v1/responses/{made['id']}"
    assert app.get(path, headers=mine).json == made
    for response in (app.get(path, headers=other), app.delete(path, headers=other)):
        assert_error(response, 404, "response_not_found")
    refused = respond(app, headers=other, previous_response_id=made["id"])
    assert_error(refused, 400, "previous_response_not_found", param="previous_response_id")
    assert app.delete(path, headers=mine).json == {"id": made["id"], "object": "response", "deleted": True}
    assert_error(app.get(path, headers=mine), 404, "response_not_found")
    assert_error(respond(app, headers=mine, previous_response_id=made["id"]), 400, "previous_response_not_found")


def test_a_streamed_response_is_stored_before_its_last_event(app: Client) -> None:
    final = response_events(respond(app, stream=True))[-1]["response"]
    assert app.get(f"/v1/responses/{final['id']}").json == final


def test_store_false_stores_nothing_and_user_opens_no_session(app: Client, kimi: WebChat) -> None:
    made = respond(app, store=False, user="ada").json
    assert made["store"] is False and made["user"] == "ada"
    assert_error(app.get(f"/v1/responses/{made['id']}"), 404, "response_not_found")
    assert_error(app.get("/v1/sessions/ada"), 404, "session_not_found")
    assert app.get("/health").json["sessions"]["kept"] == 0
    respond(app, user="ada")
    assert kimi.posts[-1]["message"] == "Hello" and app.get("/health").json["sessions"]["kept"] == 1


def test_stored_responses_are_evicted_and_expire_as_sessions_do(make_app: MakeApp, clock: Clock) -> None:
    app = make_app(MAX_SESSION_SIZE="2", SESSION_CACHE_TTL="60")
    ids = [respond(app).json["id"] for _ in range(3)]
    assert [app.get(f"/v1/responses/{id}").status_int for id in ids] == [404, 200, 200]
    clock.now += 61
    assert [app.get(f"/v1/responses/{id}").status_int for id in ids] == [404, 404, 404]


@json_and_stream
def test_a_truncated_response_is_incomplete(app: Client, kimi: WebChat, stream: bool) -> None:
    kimi.answer = "word " * 50
    response = respond(app, stream=stream, max_output_tokens=5)
    final = response_events(response)[-1]["response"] if stream else response.json
    assert final["status"] == "incomplete" and final["incomplete_details"] == {"reason": "max_output_tokens"}
    assert final["output"][0]["status"] == "incomplete"


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        pytest.param([{"error": {"message": "out of order"}}], "out of order", id="error event"),
        pytest.param([], "ended the stream", id="cut off"),
    ],
)
def test_a_response_cut_off_by_upstream_ends_with_failed(
    api_app: Client, api: Api, caplog: pytest.LogCaptureFixture, chunks: list[Any], words: str
) -> None:
    caplog.set_level(logging.INFO)
    api.always = api_streams(api_chunk({"content": "half"}), *chunks)
    events = response_events(respond(api_app, model="local/k2", stream=True))
    final = events[-1]
    assert final["type"] == "response.failed" and events[4]["delta"] == "half"
    assert final["response"]["status"] == "failed" and final["response"]["error"]["code"] == "server_error"
    assert words in final["response"]["error"]["message"] and " local/k2 broke off: " in caplog.text
    assert_error(api_app.get(f"/v1/responses/{final['response']['id']}"), 404, "response_not_found")


def test_a_response_that_fails_after_keepalives_still_has_created(start_program: StartProgram, kimi: WebChat) -> None:
    kimi.always = at_the_gate(sends(403, JUST_A_MOMENT))
    program = start_program(SSE_KEEPALIVE="0.05")
    connection = program.connect()
    connection.request("POST", "/v1/responses", '{"input": "x", "stream": true}')
    response = connection.getresponse()
    assert response.status == 200 and response.readline() == b": keep-alive\n"
    kimi.gate.set()
    events = response_events(response.read())
    assert event_kinds(events) == ["created", "in_progress", "failed"]


def test_errors_before_the_first_event_return_their_status(app: Client, kimi: WebChat) -> None:
    kimi.always = sends(403, JUST_A_MOMENT)
    for stream in (False, True):
        assert_error(respond(app, stream=stream), 503, "upstream_blocked")
    assert_error(respond(app, model="gpt-5"), 404, "model_not_found", param="model")


def call_piece(index: int, arguments: str | None = None, name: str | None = None) -> dict[str, Any]:
    """Return a delta with a piece of a tool call. The first piece has the name."""
    first = {"id": f"c{index}", "type": "function"} if name else {}
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    return {"tool_calls": [{"index": index, **first, "function": function}]}


@pytest.mark.parametrize(
    ("deltas", "output"),
    [
        pytest.param(
            [
                call_piece(0, '{"a"', "clock"),
                call_piece(1, '{"b"', "clock"),
                call_piece(0, ":1}"),
                call_piece(1, ":2}"),
            ],
            ['{"a":1}', '{"b":2}'],
            id="by turns",
        ),
        pytest.param(
            [
                call_piece(0, None, "clock"),
                {"content": "\n"},
                call_piece(0, '{"a"'),
                {"reasoning_content": "r"},
                call_piece(0, ":1}"),
            ],
            ['{"a":1}', "\n", "r"],
            id="with white space and reasoning between",
        ),
        pytest.param(
            [call_piece(0, "{}", "clock"), {"content": "a"}, {"content": "b"}, call_piece(1, None, "clock")],
            ["{}", "ab", "{}"],
            id="with text after a complete call",
        ),
        pytest.param(
            [call_piece(0, None, "clock"), call_piece(1, "", "clock"), call_piece(2, None, "patch")],
            ["{}", "{}", ""],
            id="without arguments",
        ),
        pytest.param(
            [
                call_piece(0, '{"input": "x', "patch"),
                call_piece(1, '["x"]', "patch"),
                call_piece(2, '{"input": "\\ud83d!"}', "patch"),
            ],
            ['{"input": "x', '["x"]', "\ufffd!"],
            id="custom, with broken JSON",
        ),
        pytest.param(
            [{}, {"content": "", "tool_calls": []}, {"content": "x", "reasoning_content": None}, {"refusal": "no"}],
            ["x", "no"],
            id="empty deltas",
        ),
        pytest.param([{"content": "a"}, {"reasoning_content": "b"}] * 2, ["a", "b"] * 2, id="reasoning after text"),
        pytest.param([call_piece(index, "{", "clock") for index in range(99)], ["{"] * 99, id="many broken calls"),
    ],
)
def test_an_item_closes_when_nothing_more_can_come_for_it(
    api_app: Client, api: Api, deltas: Any, output: Any
) -> None:
    api.always = api_answers(deltas=deltas)
    streamed = response_events(respond(api_app, model="local/k2", stream=True, tools=TOOLS))[-1]["response"]["output"]
    assert list(map(item_text, streamed)) == output and {item["status"] for item in streamed} == {"completed"}
    at_once = respond(api_app, model="local/k2", tools=TOOLS).json["output"]
    calls, same_calls = (
        [item_text(item) for item in items if "call_id" in item] for items in (streamed, at_once)
    )
    assert calls == same_calls


def item_text(item: Any) -> str:
    if "call_id" in item:
        return str(item["arguments"] if item["type"] == "function_call" else item["input"])
    (part,) = item["content"]
    return str(part["refusal"] if part["type"] == "refusal" else part["text"])


def test_the_items_of_one_answer_become_one_message(api_app: Client, api: Api) -> None:
    api.script.append(
        api_answers(deltas=[{"content": "a"}, {"reasoning_content": "b"}, call_piece(0, "{}", "clock")] * 2)
    )
    made = respond(api_app, model="local/k2", tools=TOOLS, stream=True)
    final = response_events(made)[-1]["response"]
    assert len(final["output"]) == 5, "the second piece of the call adds nothing"
    items = [USER, *final["output"], {"type": "function_call_output", "call_id": "c0", "output": "12:00"}]
    assert output_text(respond(api_app, items, model="local/k2", tools=TOOLS))
    _, answered, result = api.asked[-1][2]["messages"]
    assert answered["content"] == "a\na" and answered["reasoning_content"] == "bb" and result["role"] == "tool"
    assert [call["id"] for call in answered["tool_calls"]] == ["c0"]


def test_a_truncated_call_keeps_its_partial_arguments(api_app: Client, api: Api) -> None:
    api.always = api_answers(
        deltas=[call_piece(0, None, "clock"), call_piece(1, '{"input": "x', "patch")], finish="length"
    )
    final = response_events(respond(api_app, model="local/k2", stream=True, tools=TOOLS))[-1]["response"]
    assert final["status"] == "incomplete" and final["completed_at"] is None
    assert [item["status"] for item in final["output"]] == ["incomplete"] * 2
    assert list(map(item_text, final["output"])) == ["", '{"input": "x']


@json_and_stream
@pytest.mark.parametrize("usage", [[], "x", {"prompt_tokens": "5"}, {"prompt_tokens": 1, "prompt_tokens_details": []}])
def test_malformed_usage_breaks_no_response(
    api_app: Client, api: Api, stream: bool, usage: Any
) -> None:
    last = {**api_chunk(), "choices": [], "usage": usage}
    api.always = api_streams(api_chunk({"content": "x"}, "stop"), last, b"[DONE]")
    response = respond(api_app, model="local/k2", stream=stream)
    final = response_events(response)[-1]["response"] if stream else response.json
    assert final["status"] == "completed" and final["usage"]["input_tokens"] < 3


def test_reasoning_of_another_server_is_ignored(api_app: Client, api: Api) -> None:
    items = [
        {"role": "user", "content": "x"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAAB"},
        {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "{}"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "y"}]},
        {"role": "user", "content": "z"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "nothing followed"}]},
    ]
    assert output_text(respond(api_app, items, model="local/k2"))
    assert api.asked[0][2]["messages"] == [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y"},
        {"role": "user", "content": "z"},
    ]


EXEC = {"type": "custom", "name": "exec", "description": "Runs JavaScript."}
WAIT = {"type": "function", "name": "wait", "parameters": {"type": "object", "properties": {}}}
CODEX_TOOLS = {
    "type": "additional_tools",
    "role": "developer",
    "tools": [{"type": "namespace", "name": "functions", "tools": [EXEC, WAIT]}],
}
SEARCH = {
    "type": "tool_search",
    "execution": "client",
    "description": "Finds tools.",
    "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
}
FOUND = {
    "type": "tool_search_output",
    "call_id": "c0",
    "execution": "client",
    "tools": [{"type": "namespace", "name": "mcp__mail", "tools": [{"type": "function", "name": "send"}]}],
}


def tool_names_sent(api: Api) -> list[str]:
    """Return the names of the functions in the last request to the API."""
    return [tool["function"]["name"] for tool in api.asked[-1][2].get("tools", ())]


@json_and_stream
def test_tools_inside_the_input_are_offered_and_remembered(
    api_app: Client, api: Api, stream: bool
) -> None:
    api.always = api_answers(deltas=[call_piece(0, '{"code": "1 + 1"}', "functions__exec")], finish="tool_calls")
    asked = {"model": "local/k2", "parallel_tool_calls": False, "reasoning": {"context": "all_turns"}}
    response = respond(api_app, [CODEX_TOOLS, USER], stream=stream, **asked)
    final = response_events(response)[-1]["response"] if stream else response.json
    [call] = final["output"]
    assert (call["type"], call["name"], call["namespace"], call["input"]) == (
        "custom_tool_call", "exec", "functions", "1 + 1")
    assert tool_names_sent(api) == ["functions__exec", "functions__wait"]
    assert api.asked[-1][2]["parallel_tool_calls"] is False
    api.always = api_answers("2")
    result = {"type": "custom_tool_call_output", "call_id": call["call_id"], "output": "2"}
    assert output_text(respond(api_app, [result], model="local/k2", previous_response_id=final["id"])) == "2"
    assert tool_names_sent(api) == ["functions__exec", "functions__wait"], "the conversation keeps its tools"


def test_a_tool_in_the_input_with_a_known_name_is_ignored(api_app: Client, api: Api) -> None:
    other = {"type": "tool_search_output", "call_id": "c", "tools": [{"type": "custom", "name": "wait"}, EXEC]}
    search = {"type": "tool_search_call", "call_id": "c", "arguments": {}}
    assert output_text(respond(api_app, [USER, search, other], model="local/k2", tools=[SEARCH, WAIT]))
    assert tool_names_sent(api) == ["tool_search", "wait", "exec"]


@pytest.mark.parametrize(
    ("arguments", "input"),
    [
        ('{"input": "x = 1"}', "x = 1"),
        ('{"script": "x = 1"}', "x = 1"),
        ('{"patch": "```diff\\n-a\\n```"}', "-a\n"),
        ("x = 1", "x = 1"),
        ('{"a": "x", "b": "y"}', '{"a": "x", "b": "y"}'),
        ('{"input": {"a": 1}}', '{"input": {"a": 1}}'),
    ],
)
def test_the_input_of_a_custom_tool_is_unwrapped(
    api_app: Client, api: Api, arguments: str, input: str
) -> None:
    api.always = api_answers(deltas=[call_piece(0, arguments, "exec")], finish="tool_calls")
    [call] = respond(api_app, model="local/k2", tools=[EXEC]).json["output"]
    assert call["input"] == input


@json_and_stream
def test_the_client_runs_a_tool_search(api_app: Client, api: Api, stream: bool) -> None:
    api.always = api_answers(deltas=[call_piece(0, '{"query": "mail"}', "tool_search")], finish="tool_calls")
    response = respond(api_app, model="local/k2", tools=[SEARCH, WAIT], stream=stream)
    final = response_events(response)[-1]["response"] if stream else response.json
    [search] = final["output"]
    assert (search["type"], search["execution"], search["call_id"]) == ("tool_search_call", "client", "c0")
    assert search["arguments"] == {"query": "mail"} and tool_names_sent(api) == ["tool_search", "wait"]
    api.always = api_answers(deltas=[call_piece(0, "{}", "mcp__mail__send")], finish="tool_calls")
    [call] = respond(api_app, [USER, search, FOUND], model="local/k2", tools=[SEARCH, WAIT], store=False).json["output"]
    assert (call["name"], call["namespace"]) == ("send", "mcp__mail")
    assert tool_names_sent(api) == ["tool_search", "wait", "mcp__mail__send"]
    sent = api.asked[-1][2]["messages"]
    assert sent[1]["tool_calls"][0]["function"] == {"name": "tool_search", "arguments": '{"query":"mail"}'}
    assert sent[2]["role"] == "tool" and sent[2]["content"] == "Found: mcp__mail__send"


@pytest.mark.parametrize(
    "item",
    [
        {"type": "web_search_call", "id": "ws", "status": "completed", "action": {"type": "search", "query": "x"}},
        {"type": "mcp_call", "id": "m", "name": "f", "arguments": "{}", "server_label": "s", "output": "y"},
        {"type": "image_generation_call", "id": "i", "result": "AAAA", "status": "completed"},
        {"type": "computer_call_output", "call_id": "c", "output": {"type": "computer_screenshot"}},
        {"type": "compaction", "encrypted_content": "gAAAA"},
        {"type": "compaction", "encrypted_content": None},
        {"type": "compaction", "encrypted_content": "[]"},
        {"type": "compaction", "encrypted_content": '{"summary": 5}'},
        {"type": "configuration_update", "reasoning": {"effort": "high"}},
        {"type": "of_the_future", "content": [{"x": 1}], "output": 5},
    ],
)
def test_items_of_other_servers_are_ignored_and_named_in_a_header(
    api_app: Client, api: Api, item: Any
) -> None:
    for model in ("local/k2", "kimi"):
        response = respond(api_app, [USER, item, {"role": "assistant", "content": "y"}, USER], model=model)
        assert output_text(response) and response.headers["X-Kimi2api-Ignored"] == item["type"]
    assert [message["role"] for message in api.asked[0][2]["messages"]] == ["user", "assistant", "user"]


def test_parts_of_other_types_are_ignored_and_named_in_a_header(api_app: Client, api: Api) -> None:
    empty = {"type": "input_text", "text": ""}
    parts = [empty, {"type": "input_text", "text": "x"}, {"type": "input_audio", "input_audio": {}}]
    response = respond(api_app, [{"role": "user", "content": parts}], model="local/k2")
    assert response.headers["X-Kimi2api-Ignored"] == "input_audio"
    assert api.asked[0][2]["messages"] == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("call", "result", "name"),
    [
        (
            {"type": "local_shell_call", "id": "l", "call_id": "c", "action": {"type": "exec", "command": ["ls"]}},
            {"type": "local_shell_call_output", "id": "l", "output": "a.txt"},
            "local_shell",
        ),
        (
            {"type": "shell_call", "call_id": "c", "action": {"commands": ["ls"]}},
            {"type": "shell_call_output", "call_id": "c", "output": [{"stdout": "a.txt", "stderr": ""}]},
            "shell",
        ),
        (
            {"type": "apply_patch_call", "call_id": "c", "operation": {"type": "delete_file", "path": "a.txt"}},
            {"type": "apply_patch_call_output", "call_id": "c", "status": "completed", "output": "a.txt is gone"},
            "apply_patch",
        ),
        (
            {"type": "function_call", "call_id": "c", "name": "ls", "arguments": "{}"},
            {"type": "function_call_output", "call_id": None, "output": "a.txt"},
            "ls",
        ),
        (
            {"type": "custom_tool_call", "id": "c", "name": "ls", "input": "-l"},
            {"type": "custom_tool_call_output", "output": "a.txt", "tools": 5},
            "ls",
        ),
        (
            {"type": "function_call", "id": "c", "name": "ls", "arguments": "{}"},
            {"type": "function_call_output", "output": "a.txt"},
            "ls",
        ),
        (
            {"type": "shell_call", "call_id": "c", "action": {}, "name": 5},
            {"type": "shell_call_output", "output": [{"type": "input_text", "a.txt": 1}]},
            "shell",
        ),
    ],
)
def test_shell_and_patch_items_become_calls_and_results(
    api_app: Client, api: Api, call: Any, result: Any, name: str
) -> None:
    assert output_text(respond(api_app, [USER, call, result, USER], model="local/k2"))
    _, called, done, _ = api.asked[0][2]["messages"]
    assert called["tool_calls"][0]["id"] == done["tool_call_id"] == "c" and "a.txt" in done["content"]
    assert called["tool_calls"][0]["function"]["name"] == name
    json.loads(called["tool_calls"][0]["function"]["arguments"])


@json_and_stream
def test_a_compaction_is_one_item_and_is_read_back(api_app: Client, api: Api, stream: bool) -> None:
    api.always = api_answers(deltas=[{"reasoning_content": "Hm."}, {"content": "They want "}, {"content": "tea."}])
    items = [USER, {"role": "assistant", "content": "Tea?"}, {"type": "compaction_trigger"}]
    response = respond(api_app, items, model="local/k2", stream=stream, tools=TOOLS, context_management=[{"type": "x"}])
    final = response_events(response)[-1]["response"] if stream else response.json
    [item] = final["output"]
    assert item["type"] == "compaction" and item["encrypted_content"] and final["usage"]["total_tokens"] == 8
    sent = api.asked[-1][2]
    assert "tools" not in sent and sent["messages"][-1]["role"] == "user" and len(sent["messages"]) == 3
    api.always = api_answers("ok")
    for request in ({"input": [item, USER]}, {"input": [USER], "previous_response_id": final["id"]}):
        assert output_text(respond(api_app, model="local/k2", **request)) == "ok"
        summary, question = api.asked[-1][2]["messages"]
        assert summary["content"].endswith("They want tea.") and question["content"] == USER["content"]
    # A model that writes no summary
    api.always = api_answers(deltas=[{"reasoning_content": "Hm."}])
    assert_error(respond(api_app, items, model="local/k2"), 502, "upstream_invalid_response")


def test_a_conversation_is_compacted_on_request(api_app: Client, api: Api) -> None:
    api.always = api_answers("They want tea.")
    asked = {"model": "local/k2", "input": [USER, {"role": "assistant", "content": "Tea?"}]}
    compacted = api_app.post_json("/v1/responses/compact", asked).json
    assert compacted["object"] == "response.compaction" and compacted["usage"]["total_tokens"] == 8
    message, item = compacted["output"]
    assert message["content"][0]["text"] == USER["content"] and item["type"] == "compaction"
    api.always = api_answers("ok")
    assert output_text(respond(api_app, [*compacted["output"], USER], model="local/k2")) == "ok"
    assert api.asked[-1][2]["messages"][1]["content"].endswith("They want tea.")


def test_a_compaction_keeps_all_user_messages_and_one_summary(
    api_app: Client, api: Api
) -> None:
    first = respond(api_app, "One", model="local/k2").json
    body = {"model": "local/k2", "input": "Two", "previous_response_id": first["id"]}
    once = api_app.post_json("/v1/responses/compact", body).json["output"]
    twice = api_app.post_json("/v1/responses/compact", {"model": "local/k2", "input": [*once, USER]}).json["output"]
    texts = [item["content"][0]["text"] for item in twice[:-1]]
    assert texts == ["One", "Two", USER["content"]] and twice[-1]["type"] == "compaction"


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"type": "shell_call", "action": {}, "id": [1]}, "input[0].id"),
        ({"type": "shell_call_output", "output": "x", "call_id": [1]}, "input[0].call_id"),
        ({"type": "function_call", "name": "f", "arguments": "{}", "call_id": "", "id": [1]}, "input[0].id"),
        ({"type": "additional_tools", "tools": [{**SEARCH, "description": 5}]}, "input[0].tools[0].description"),
    ],
)
def test_an_invalid_field_of_a_call_is_named(
    api_app: Client, item: Any, param: str
) -> None:
    assert respond(api_app, [item, USER], model="local/k2").json["error"]["param"] == param


def test_many_items_are_read_in_linear_time() -> None:
    began = time.process_time()
    items = [{"type": f"other{number}"} for number in range(50_000)]
    request = kimi2api.ResponsesRequest.parse(json.dumps({"input": [*items, USER]}).encode())
    request.to_chat_request([], [], lambda id: {})
    assert time.process_time() - began < 2, "usually 0.4 s, in which all other chats wait"


def test_a_websocket_request_returns_426(demo_program: Program) -> None:
    status, body = demo_program.ask("GET", "/v1/responses", Upgrade="websocket", Connection="Upgrade")
    assert status == 426 and json.loads(body)["error"]["code"] == "upgrade_required"


@json_and_stream
def test_reasoning_is_a_summary_if_the_request_asks_for_one(
    api_app: Client, api: Api, stream: bool
) -> None:
    api.always = api_answers(deltas=[{"reasoning_content": "Let "}, {"reasoning_content": "me."}, {"content": "Yes."}])
    wanted = {"reasoning": {"summary": "auto"}, "include": ["reasoning.encrypted_content"]}
    response = respond(api_app, model="local/k2", stream=stream, **wanted)
    final = response_events(response)[-1]["response"] if stream else response.json
    reasoning, message = final["output"]
    assert reasoning["summary"] == [{"type": "summary_text", "text": "Let me."}] and "content" not in reasoning
    if stream:
        assert event_kinds(response_events(response))[2:8] == [
            "output_item.added",
            "reasoning_summary_part.added",
            "reasoning_summary_text.delta",
            "reasoning_summary_text.done",
            "reasoning_summary_part.done",
            "output_item.done",
        ]
    api.always = api_answers("ok")
    assert output_text(respond(api_app, [USER, reasoning, message, USER], model="local/k2", store=False)) == "ok"
    assert api.asked[-1][2]["messages"][1]["reasoning_content"] == "Let me."


@json_and_stream
def test_annotations_become_annotations_of_the_response(
    api_app: Client, api: Api, stream: bool
) -> None:
    citation = {"start_index": 0, "end_index": 3, "url": "https://a.example/", "title": "A"}
    annotations = [{"type": "url_citation", "url_citation": citation}, {"type": "odd"}, 5, {"None": {}}]
    deltas = [{"content": "Yes", "annotations": 5}, {"content": ".", "annotations": annotations}]
    api.always = api_answers(deltas=deltas)
    response = respond(api_app, model="local/k2", stream=stream)
    if stream:
        events = response_events(response)
        assert [event["annotation_index"] for event in events if event["type"].endswith("annotation.added")] == [0]
    final = events[-1]["response"] if stream else response.json
    assert final["output"][0]["content"][0]["annotations"] == [{"type": "url_citation", **citation}]


@pytest.mark.parametrize(
    ("effort", "complaint", "accepted", "sent"),
    [
        ("xhigh", "Unsupported value: 'xhigh'. Supported values are: 'low', 'medium', and 'high'.", "high", "high"),
        ("none", "reasoning_effort must be one of low, high, max", "low", "low"),
        ("medium", "invalid reasoning_effort", "high", "high"),
        ("minimal", "invalid reasoning_effort", None, None),
    ],
)
def test_a_refused_effort_becomes_the_nearest_accepted_effort(
    api_app: Client, api: Api, effort: str, complaint: str, accepted: str | None, sent: str | None
) -> None:
    api.always = api_refuses(
        complaint, lambda body: body.get("reasoning_effort") not in (accepted, None), param="reasoning_effort")
    for _ in range(2):
        assert output_text(respond(api_app, model="local/k2", reasoning={"effort": effort})) == "ok"
        assert api.asked[-1][2].get("reasoning_effort") == sent
    assert len(api.asked) <= 4


def test_an_api_receives_the_verbosity_of_a_response(api_app: Client, api: Api) -> None:
    response = respond(api_app, model="local/k2", text={"verbosity": "low"}, top_logprobs=3).json
    assert api.asked[0][2]["verbosity"] == "low"
    assert response["text"] == {"format": {"type": "text"}, "verbosity": "low"}
    assert response["top_logprobs"] == 0, "the server never sends any"


def test_many_references_load_their_response_once(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(**api_settings)
    api.always = api_answers(deltas=[call_piece(index, "{}", "clock") for index in range(20)], finish="tool_calls")
    items = respond(app, model="local/k2", tools=TOOLS).json["output"]
    reads: list[Any] = []
    load = kimi2api.MemoryStore.load
    monkeypatch.setattr(kimi2api.MemoryStore, "load", lambda *args: reads.append(args[1]) or load(*args))
    references = [{"type": "item_reference", "id": item["id"]} for item in items]
    results = [{"type": "function_call_output", "call_id": item["call_id"], "output": "x"} for item in items]
    assert respond(app, [USER, *references, *results], model="local/k2", tools=TOOLS, store=False).status_int == 200
    assert len([key for key in reads if key[1] == "response"]) == 1


########################################################################################################################
# Part 4: Storage
########################################################################################################################


# ----------------------------------------------------------------------------------------------------------------------
# Stores, shared stores, SQLite store, Redis store, sessions
# ----------------------------------------------------------------------------------------------------------------------


def test_without_user_no_turn_is_remembered(app: Client, kimi: WebChat) -> None:
    chat(app, "first")
    chat(app, "second")
    assert [post["message"] for post in kimi.posts] == ["first", "second"]
    assert kimi.posts[0]["session_id"] != kimi.posts[1]["session_id"]


def test_with_user_the_remembered_turns_are_prepended(app: Client, kimi: WebChat) -> None:
    chat(app, "first", user="ada")
    chat(app, "second", user="ada")
    assert kimi.posts[1]["message"] == "用户: first\n模型: Hello from upstream.\n用户: second"
    assert kimi.posts[0]["session_id"] == kimi.posts[1]["session_id"]
    session = app.get("/v1/sessions/ada").json
    assert [[message["content"] for message in turn] for turn in session["turns"]] == [
        ["first", "Hello from upstream."],
        ["second", "Hello from upstream."],
    ]


def test_resent_history_replaces_the_remembered_turns(app: Client, kimi: WebChat) -> None:
    chat(app, "forgotten", user="ada")
    mine = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "u1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "u2"},
    ]
    chat(app, messages=mine, user="ada")
    assert kimi.posts[-1]["message"] == "Be kind.\n\n用户: u1\n模型: a1\n用户: u2"
    chat(app, "u3", user="ada")
    assert kimi.posts[-1]["message"] == "用户: u1\n模型: a1\n用户: u2\n模型: Hello from upstream.\n用户: u3"


def test_concurrent_turns_of_one_user_are_all_recorded(app: Client, kimi: WebChat) -> None:
    kimi.always = web_chat_answers_at_the_gate
    with ThreadPoolExecutor(8) as pool:
        chats = [pool.submit(chat, app, f"question {number}", user="ada") for number in range(8)]
        wait_for(lambda: len(kimi.posts) == 8)
        kimi.gate.set()
        assert all(answer_text(done.result()) for done in chats)
    turns = app.get("/v1/sessions/ada").json["turns"]
    assert sorted(turn[0]["content"] for turn in turns) == [f"question {number}" for number in range(8)]
    assert all([message["role"] for message in turn] == ["user", "assistant"] for turn in turns)


def test_a_session_belongs_to_its_key_and_can_be_deleted(make_app: MakeApp) -> None:
    app = make_app(API_MASTER_KEY="sk-one,sk-two")
    one, two = {"Authorization": "Bearer sk-one"}, {"Authorization": "Bearer sk-two"}
    user = "ada/bü\nro"
    chat(app, user=user, headers=one)
    path = "/v1/sessions/ada/b%C3%BC%0Aro"
    assert app.get(path, headers=one).json["user"] == user
    assert_error(app.get(path, headers=two), 404, "session_not_found")
    assert_error(app.delete(path, headers=two), 404, "session_not_found")
    assert app.delete(path, headers=one).json == {"object": "session.deleted", "user": user, "deleted": True}
    assert_error(app.delete(path, headers=one), 404, "session_not_found")


def test_sessions_expire_and_the_least_recently_used_is_evicted(
    clock: Clock, make_app: MakeApp
) -> None:
    app = make_app(SESSION_CACHE_TTL="60", MAX_SESSION_SIZE="2")

    def turns(user: str) -> int:
        response = app.get(f"/v1/sessions/{user}")
        if response.status_int != 200:
            assert_error(response, 404, "session_not_found")
        return len(response.json.get("turns", ()))

    assert answer_text(chat(app, user="ada"))
    clock.now += 50
    assert answer_text(chat(app, user="ada"))
    clock.now += 50
    assert turns("ada") == 2, "the expiry slides at each turn"
    clock.now += 11
    assert turns("ada") == 0 and app.get("/health").json["sessions"]["kept"] == 0
    for user in ("ada", "bob", "ada", "eve"):
        assert answer_text(chat(app, user=user))
    assert [bool(turns(user)) for user in ("ada", "bob", "eve")] == [True, False, True]


def test_resent_history_keeps_turns_recorded_meanwhile(app: Client, kimi: WebChat) -> None:
    chat(app, "forgotten", user="ada")
    kimi.always = web_chat_answers_at_the_gate
    mine = [{"role": role, "content": text} for role, text in (("user", "u1"), ("assistant", "a1"), ("user", "u2"))]
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(chat, app, messages=mine, user="ada")
        wait_for(lambda: len(kimi.posts) == 2)
        kimi.always = web_chat_answers
        chat(app, "quick", user="ada")
        kimi.gate.set()
        assert answer_text(slow.result())
    turns = app.get("/v1/sessions/ada").json["turns"]
    assert sorted(turn[0]["content"] for turn in turns) == ["quick", "u1", "u2"]


def test_a_tool_result_joins_the_turn_of_its_call(api_app: Client, api: Api) -> None:
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    api.always = api_answers(deltas=[{"tool_calls": [call]}], finish="tool_calls")
    chat(api_app, "what time?", model="local/k2", user="ada")
    api.always = api_answers("ok")
    chat(api_app, "something else", model="local/k2", user="ada")
    result = {"role": "tool", "tool_call_id": "call_1", "content": "noon"}
    chat(api_app, messages=[result], model="local/k2", user="ada")
    roles = ["user", "assistant", "user", "assistant", "tool"]
    assert [message["role"] for message in api.asked[-1][2]["messages"]] == roles
    assert api.asked[-1][2]["messages"][2]["content"] == "what time?"
    assert [len(turn) for turn in api_app.get("/v1/sessions/ada").json["turns"]] == [2, 4]


def test_an_answer_ends_its_own_turn_after_a_call_whose_id_is_empty(app: Client) -> None:
    call = {"id": "", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    question = {"role": "user", "content": "what time?"}
    chat(app, messages=[question, {"role": "assistant", "tool_calls": [call]}, question], user="ada")
    turns = app.get("/v1/sessions/ada").json["turns"]
    assert [[message["role"] for message in turn] for turn in turns] == [["user", "assistant"]] * 2


def test_a_session_stores_only_what_later_requests_need(api_app: Client, api: Api) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}, "junk": [1]}
    delta = {"reasoning_content": "Hm.", "content": None, "tool_calls": [{"index": 0, **call}]}
    api.always = api_answers(deltas=[delta])
    question = {"role": "user", "content": [{"type": "text", "text": "What time?"}, {"type": "x", "x": [[]] * 9}]}
    chat(api_app, messages=[{**question, "name": "ada", "junk": {"a": [1]}}], model="local/k2", user="ada")
    [turn] = api_app.get("/v1/sessions/ada").json["turns"]
    del call["junk"]
    assert turn == [
        {"role": "user", "content": "What time?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Hm."},
    ]


def test_a_session_keeps_its_latest_turns_within_a_size(
    make_app: MakeApp, kimi: WebChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kimi2api, "MAX_SESSION_BYTES", 3_000)
    app = make_app(CONTEXT_MAX_LENGTH="99999")

    def remembered() -> list[str]:
        return [turn[0]["content"][0] for turn in app.get("/v1/sessions/ada").json["turns"]]

    for number in range(5):
        chat(app, f"{number}" + "x" * 1_000, user="ada")
    assert remembered() == ["3", "4"], "the oldest turns are dropped first"
    chat(app, "z" * 9_000, user="ada")
    assert remembered() == ["3", "4"], "a turn that is too large is not stored, the others stay"
    mine = [{"role": role, "content": letter * 900} for role, letter in (("user", "a"), ("assistant", "b")) * 3]
    chat(app, messages=[*mine, {"role": "user", "content": "c"}], user="ada")
    assert remembered() == ["a", "c"], "resent history has the same limit"


# The contract of all three stores


class RedisServer:
    """A real redis-server on a free port. It keeps its data over stop() and start()."""

    def __init__(self, directory: Path) -> None:
        program = shutil.which("redis-server")
        if not program:
            pytest.skip("there is no redis-server")
        pytest.importorskip("redis", reason="the package redis is not installed")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._command = [program, "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(directory)]
        self._command += ["--save", "", "--appendonly", "yes"]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def answers() -> bool:
            with suppress(Exception):  # redis's errors; redis is not imported here
                return bool(self.client.ping())
            return False

        wait_for(answers, "redis-server answers")

    @property
    def client(self) -> Any:
        import redis

        return redis.Redis(port=self.port, socket_timeout=PATIENCE)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        self.process.wait(PATIENCE)


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def redis_server(shared_redis: RedisServer) -> RedisServer:
    """A redis-server without data, in its default configuration."""
    shared_redis.client.flushall()
    return shared_redis


def empty_store_address(kind: str, request: pytest.FixtureRequest) -> str:
    """Return the SESSION_STORE address of an empty store of this kind."""
    if kind == "sqlite":
        return f"sqlite:{request.getfixturevalue('tmp_path')}/sessions.db"
    return request.getfixturevalue("redis_server").url if kind == "redis" else "memory"


@pytest.fixture(params=["memory", "sqlite", "redis"])
def store_address(request: pytest.FixtureRequest) -> str:
    return empty_store_address(request.param, request)


@pytest.fixture(params=["sqlite", "redis"])
def lasting_store(request: pytest.FixtureRequest) -> str:
    return empty_store_address(request.param, request)


def open_store(store_address: str, ttl: float = 3600, limit: int = 1000) -> kimi2api.Store:
    settings = kimi2api.Settings.load({"SESSION_STORE": store_address})
    return kimi2api.open_store(replace(settings, session_cache_ttl=ttl, max_session_size=limit))


def make_turn(text: Any) -> kimi2api.Turn:
    return {"role": "user", "content": str(text)}, {"role": "assistant", "content": f"answer to {text}"}


def add_turn(store: kimi2api.Store, user: str, text: Any, owner: str = "owner") -> None:
    sessions = kimi2api.Sessions(store)
    sessions.record(owner, user, sessions.open(owner, user), [make_turn(text)], replace_turns=False)


def session_questions(store: kimi2api.Store, user: str, owner: str = "owner") -> list[str]:
    session = kimi2api.Sessions(store).get(owner, user)
    return [turn[0]["content"] for turn in session.turns] if session else []


def session_users(store: kimi2api.Store, owner: str = "owner") -> list[str]:
    return list(store.list_documents(owner, "session"))


def make_document(data: bytes = b"", turns: int = 0) -> kimi2api.Document:
    now = time.time()
    return kimi2api.Document(now, now, turns, data)


def counter_key(period: str, owner: str = "owner", lifetime: float = 1e6) -> kimi2api.CounterKey:
    return kimi2api.CounterKey(owner, period, lifetime)


def test_a_store_returns_its_documents(store_address: str) -> None:
    store = open_store(store_address)
    document = kimi2api.Document(1.25, time.time(), 3, b"a\0b\n\xff" + "女".encode())
    key = ("owner", "response", "resp_1")
    assert store.load(key) is None and store.put(key, document)
    loaded = store.load(key)
    assert loaded and loaded.version and replace(loaded, version=0) == document
    for other in (("owner", "session", "resp_1"), ("other", "response", "resp_1"), ("owner", "response", "resp_2")):
        assert store.load(other) is None and not store.delete(other)
    [(name, listed)] = store.list_documents("owner", "response").items()
    assert (name, listed.created, listed.used, listed.turns) == ("resp_1", 1.25, document.used, 3)
    assert store_address == "memory" or not listed.data, "a list loads no data"
    assert store.list_documents("owner", "session") == {}, "a response is no session"
    store.put(("owner", "reasoning", "x"), document)
    assert store.count() == 1, "reasoning is not counted"
    assert store.delete(key) and not store.delete(key) and store.load(key) is None and store.count() == 0


def test_a_document_is_replaced_only_at_the_expected_version(store_address: str) -> None:
    store = open_store(store_address)
    key = ("owner", "session", "ada")
    assert store.put(key, make_document(b"1"), 0) and not store.put(key, make_document(b"2"), 0)
    first = store.load(key)
    assert first and store.put(key, make_document(b"2"), first.version)
    assert not store.put(key, make_document(b"3"), first.version)
    assert store.delete(key) and not store.put(key, make_document(b"3"), first.version)
    assert store.put(key, make_document(b"4"), 0) and not store.put(key, make_document(b"5"), first.version)
    last = store.load(key)
    assert last and last.data == b"4" and store.put(key, make_document(b"6")), (
        "without an expected version it always succeeds"
    )


def test_a_session_deleted_meanwhile_starts_over(store_address: str) -> None:
    store = open_store(store_address)
    sessions = kimi2api.Sessions(store)
    add_turn(store, "ada", 1)
    opened = sessions.open("owner", "ada")
    assert store.delete(("owner", "session", "ada"))
    sessions.record("owner", "ada", opened, [make_turn(2)], replace_turns=False)
    assert session_questions(store, "ada") == ["2"]


def test_each_user_name_has_its_own_session(store_address: str) -> None:
    names = ["ada", "ADA", "a:b", "a", "a:b:c", "*", "a\0b", "a\nb", "ü", "u\u0308", "'; DROP TABLE sessions", "🧑"]
    names.append("x" * 512)
    store = open_store(store_address)
    for name in names:
        add_turn(store, name, name)
    add_turn(store, "ada", "other's", owner="other")
    assert all(session_questions(store, name) == [name] for name in names)
    assert session_users(store) == names and session_users(store, "other") == ["ada"]
    assert {document.turns for document in store.list_documents("owner", "session").values()} == {1}


def test_turns_are_appended_and_replaced(store_address: str) -> None:
    store = open_store(store_address)
    for text in ("1", "1", "2"):
        add_turn(store, "ada", text)
    assert session_questions(store, "ada") == ["1", "1", "2"]
    sessions = kimi2api.Sessions(store)
    sessions.record("owner", "ada", sessions.open("owner", "ada"), [make_turn("new")], replace_turns=True)
    assert session_questions(store, "ada") == ["new"]
    add_turn(store, "ada", "a\0b\n\u2028 女 🧑‍🚀")
    assert session_questions(store, "ada") == ["new", "a\0b\n\u2028 女 🧑‍🚀"]


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_a_session_expires_after_its_last_turn(
    kind: str, request: pytest.FixtureRequest, clock: Clock
) -> None:
    store = open_store(empty_store_address(kind, request), ttl=60)
    add_turn(store, "ada", 1)
    clock.now += 50
    add_turn(store, "ada", 2)
    add_turn(store, "bob", 1)
    clock.now += 59
    assert session_questions(store, "ada") == ["1", "2"] and store.count() == 2
    clock.now += 2
    assert session_questions(store, "ada") == [] and session_users(store) == [] and store.count() == 0


def test_an_expired_session_starts_over(store_address: str) -> None:
    store = open_store(store_address, ttl=0.3)
    sessions = kimi2api.Sessions(store)
    add_turn(store, "ada", 1)
    opened = sessions.open("owner", "ada")
    wait_for(lambda: sessions.get("owner", "ada") is None, "the session expires")
    assert session_users(store) == [] and not store.delete(("owner", "session", "ada"))
    wait_for(lambda: store.count() == 0)
    sessions.record("owner", "ada", opened, [make_turn(2)], replace_turns=False)
    lasting = open_store(store_address, ttl=60) if store_address != "memory" else store
    assert session_questions(lasting, "ada") == ["2"] and lasting.count() == 1


def test_a_full_store_evicts_the_least_recently_used_session(store_address: str) -> None:
    store = open_store(store_address, limit=3)
    for user in ("ada", "bob", "eve", "ada", "kim", "lin"):
        add_turn(store, user, user)
    assert session_users(store) == ["ada", "kim", "lin"] and store.count() == 3
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: add_turn(store, f"user {number}", "x"), range(40)))
    assert store.count() == 3 and len(session_users(store)) == 3


def test_one_key_or_kind_evicts_nothing_of_another(store_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kimi2api, "MAX_REASONING_TEXTS", 5)
    store = open_store(store_address, limit=3)
    mine = {("ann", kind, "mine"): make_document(b"x", number) for number, kind in enumerate(KINDS)}
    for key, document in mine.items():
        assert store.put(key, document)
    for kind in KINDS:
        for number in range(9):
            assert store.put(("bob", kind, str(number)), make_document(b"y"))
    for key, document in mine.items():
        loaded = store.load(key)
        assert loaded and replace(loaded, version=0) == document
    kept = [list(store.list_documents("bob", kind)) for kind in KINDS]
    assert kept == [["6", "7", "8"], ["6", "7", "8"], ["4", "5", "6", "7", "8"]] and store.count() == 8


KINDS = ("session", "response", "reasoning")


def test_memory_evicts_the_kind_with_most_bytes_of_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kimi2api, "MAX_OWNER_BYTES", 100_000)
    store = open_store("memory")
    for number in range(8):
        store.put(("ann", "session", str(number)), make_document(b"x" * 1_000))
    for number in range(20):
        store.put(("bob", "response", str(number)), make_document(b"y" * 30_000))
        store.put(("ann", "response", str(number)), make_document(b"y" * 30_000))
    assert len(session_users(store, "ann")) == 8, "a chain of responses evicts no session"
    assert list(store.list_documents("ann", "response")) == ["18", "19"]
    assert list(store.list_documents("bob", "response")) == ["17", "18", "19"]


def test_a_clock_set_back_makes_no_new_session_the_oldest(store_address: str, clock: Clock) -> None:
    store = open_store(store_address, limit=3)
    for user in "abc":
        clock.now += 1
        add_turn(store, user, user)
    clock.now -= 1800
    for user in "defd":
        clock.now += 1
        add_turn(store, user, user)
        assert user in session_questions(store, user)
    assert session_users(store) == ["e", "f", "d"] and store.count() == 3


def test_a_clock_far_ahead_keeps_no_session_longer(tmp_path: Path, clock: Clock) -> None:
    store = open_store(f"sqlite:{tmp_path}/sessions.db", ttl=60)
    year = 365 * 86400
    clock.now += year
    add_turn(store, "ada", "x")
    clock.now -= year
    add_turn(store, "eve", "x")
    assert store.count() == 2
    clock.now += 61
    assert store.count() == 0


def test_turns_of_many_threads_are_all_recorded(store_address: str) -> None:
    store = open_store(store_address)
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda number: add_turn(store, "ada", number), range(128)))
    assert sorted(session_questions(store, "ada"), key=int) == [str(number) for number in range(128)]


def test_a_failed_update_changes_nothing(store_address: str) -> None:
    store = open_store(store_address)
    add_turn(store, "ada", 1)

    def fails(_: Any) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.update(("owner", "session", "ada"), make_document(), fails)
    add_turn(store, "ada", 2)
    assert session_questions(store, "ada") == ["1", "2"]


def test_concurrent_additions_to_counters_are_all_counted(lasting_store: str) -> None:
    store = open_store(lasting_store)

    def add(number: int) -> int:
        return store.add_counters(counter_key("day 1"), {"requests": 1, "tokens kimi": number})["requests"]

    with ThreadPoolExecutor(16) as pool:
        assert sorted(pool.map(add, range(100))) == list(range(1, 101))
    known = store.read_counters([counter_key("day 2"), counter_key("day 1"), counter_key("day 1", "other")])
    assert known == [{}, {"requests": 100, "tokens kimi": 4950}, {}]
    brief = counter_key("minute", lifetime=0.05)
    assert store.add_counters(brief, {"requests": 2}) == {"requests": 2}
    time.sleep(0.06)
    store.add_counters(counter_key("next minute"), {"requests": 1})
    assert store.read_counters([brief]) == [{}], "the counters have expired"


def test_reasoning_is_stored_by_name_and_owner_unless_too_long(
    store_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kimi2api, "MAX_REASONING_BYTES", 5_000)
    sessions = kimi2api.Sessions(open_store(store_address))
    fits = {"reasoning": "x" * (5_000 - len('{"reasoning":""}'))}
    for name, fields in (("a", {"x": "Hm\0 嗯"}), ("b", fits), ("c", {"reasoning": fits["reasoning"] + "x"})):
        sessions.store_reasoning("owner", name, fields)
    found = [sessions.find_reasoning(owner, name) for owner, name in [("owner", "a"), ("owner", "b"), ("owner", "c")]]
    assert found == [{"x": "Hm\0 嗯"}, fits, {}] and sessions.find_reasoning("other", "a") == {}


ADD_TURNS = """
store = kimi2api.open_store(kimi2api.Settings.load({"SESSION_STORE": %r}))
sessions = kimi2api.Sessions(store)
for number in range(12):
    turn = {"role": "user", "content": f"%d {number}"}, {"role": "assistant", "content": "answer"}
    sessions.record("owner", "ada", sessions.open("owner", "ada"), [turn], replace_turns=False)
    store.add_counters(kimi2api.CounterKey("owner", "day", 1e6), {"requests": 1})
"""


def test_processes_that_share_a_store_lose_no_turn(lasting_store: str) -> None:
    workers = [ForkedProcess(ADD_TURNS % (lasting_store, number), dict(os.environ)) for number in range(3)]
    assert [worker.wait(PATIENCE * 2) for worker in workers] == [0, 0, 0]
    store = open_store(lasting_store)
    asked = session_questions(store, "ada")
    assert sorted(asked) == sorted(f"{worker} {number}" for worker in range(3) for number in range(12))
    for worker in range(3):
        of_worker = [int(text.split()[1]) for text in asked if text.startswith(f"{worker} ")]
        assert of_worker == sorted(of_worker), "the turns of one process are in order"
    assert store.read_counters([counter_key("day")]) == [{"requests": 36}]


def test_another_program_continues_sessions_and_responses(lasting_store: str, make_app: MakeApp, kimi: WebChat) -> None:
    one, two = make_app(SESSION_STORE=lasting_store), make_app(SESSION_STORE=lasting_store)
    chat(one, "first", user="ada")
    chat(two, "second", user="ada")
    assert kimi.posts[1]["message"] == "用户: first\n模型: Hello from upstream.\n用户: second"
    assert kimi.posts[0]["session_id"] == kimi.posts[1]["session_id"]
    first = one.post_json("/v1/responses", {"input": "A"}).json["id"]
    for text in ("B", "C"):  # two continuations of one response
        answer = two.post_json("/v1/responses", {"input": text, "previous_response_id": first}).json
        assert kimi.posts[-1]["message"] == f"用户: A\n模型: Hello from upstream.\n用户: {text}"
        assert one.get(f"/v1/responses/{answer['id']}").json == answer
    health = one.get("/health").json
    assert health["store"] == {"kind": lasting_store.partition(":")[0], "ok": True} and health["sessions"]["kept"] == 4


def test_every_answered_turn_survives_kill_9(lasting_store: str, start_program: StartProgram) -> None:
    program = start_program(SESSION_STORE=lasting_store, STREAM_INTERVAL_MS="0")
    seen: list[str] = []

    def ask(worker: int) -> None:
        with suppress(OSError, http.client.HTTPException):
            for number in range(1000):
                text = f"{worker} {number}"
                _, body = program.chat(text, user=f"user {worker % 3}", stream=True)
                if not body.rstrip().endswith(b"data: [DONE]"):
                    return
                seen.append(text)

    workers = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for worker in workers:
        worker.start()
    wait_for(lambda: len(seen) > 60, "turns are recorded")
    program.signal(signal.SIGKILL)
    for worker in workers:
        worker.join(PATIENCE)
    again = start_program(SESSION_STORE=lasting_store)
    remembered = []
    for number in range(3):
        for turn in json.loads(again.ask("GET", f"/v1/sessions/user%20{number}")[1])["turns"]:
            assert [message["role"] for message in turn] == ["user", "assistant"]
            remembered.append(turn[0]["content"])
    assert set(seen) <= set(remembered) and len(remembered) == len(set(remembered))
    assert len(remembered) <= len(seen) + 6, "each client may have one more recorded turn"


def test_a_store_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    address = f"sqlite:{tmp_path}/sessions.db"
    add_turn(open_store(address), "ada", "1")
    with closing(sqlite3.connect(tmp_path / "sessions.db")) as db:
        db.execute("PRAGMA user_version = 3")
    refused = run_program(SESSION_STORE=address)
    assert refused.returncode == 2 and re.fullmatch(
        r"kimi2api: SESSION_STORE: .*written by a newer version of kimi2api \(format 3\).*\n", refused.stderr)


FORMAT_1 = """
CREATE TABLE sessions (
    number INTEGER PRIMARY KEY, owner TEXT, kind TEXT, name TEXT, id TEXT, UNIQUE (owner, kind, name));
CREATE TABLE turns (
    number INTEGER PRIMARY KEY, turn BLOB, session INTEGER NOT NULL REFERENCES sessions ON DELETE CASCADE);
CREATE TABLE reasoning (number INTEGER PRIMARY KEY, owner TEXT, place TEXT);
CREATE TABLE counters (
    owner TEXT NOT NULL, period TEXT NOT NULL, name TEXT NOT NULL, value INTEGER NOT NULL,
    expires REAL NOT NULL, PRIMARY KEY (owner, period, name)) WITHOUT ROWID;
CREATE INDEX counters_by_expiry ON counters (expires);
CREATE TABLE probe (content BLOB);
CREATE TABLE totals (sessions INTEGER NOT NULL, reasoning INTEGER NOT NULL);
CREATE TRIGGER session_added AFTER INSERT ON sessions BEGIN UPDATE totals SET sessions = sessions + 1; END;
INSERT INTO totals VALUES (0, 0);
INSERT INTO sessions VALUES (1, 'owner', 'user', 'ada', 'session_1');
INSERT INTO turns VALUES (1, '[]', 1);
INSERT INTO counters VALUES ('owner', 'day', 'requests', 7, 9e9);
PRAGMA application_id = 1798463856;
PRAGMA user_version = 1;
"""


def test_a_file_of_format_1_keeps_its_counters_and_loses_its_sessions(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "sessions.db")) as db:
        db.executescript(FORMAT_1)
    store = open_store(f"sqlite:{tmp_path}/sessions.db")
    assert store.read_counters([counter_key("day")]) == [{"requests": 7}] and session_users(store) == []
    add_turn(store, "ada", 1)
    assert session_questions(store, "ada") == ["1"]
    with closing(sqlite3.connect(tmp_path / "sessions.db")) as db:
        tables = {name for name, in db.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'trigger')")}
    assert tables == {"documents", "counters", "sqlite_sequence"}


def test_an_unusable_store_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database\n" * 100)
    with closing(sqlite3.connect(tmp_path / "other.db")) as db:
        db.execute("CREATE TABLE bookmarks (url)")
    for address, why in [
        (f"sqlite:{tmp_path}/none/x.db", "No such file or directory"),
        (f"sqlite:{tmp_path}/unlocked/x.db", "No such file or directory"),
        ("sqlite:a\0b", "is not memory, sqlite:PATH"),
        (f"sqlite:{tmp_path}", "unable to open database file"),
        (f"sqlite:{tmp_path}/text", "file is not a database"),
        (f"sqlite:{tmp_path}/other.db", "database of another program"),
        ("sqlite:", "is not memory, sqlite:PATH"),
        ("postgres://localhost", "is not memory, sqlite:PATH"),
        ("redis://:secret@:6379", "the value is not memory, sqlite:PATH"),
    ]:
        with pytest.raises(kimi2api.SettingError, match=f"^SESSION_STORE: .*{why}.*$") as refused:
            open_store(address)
        assert "secret" not in str(refused.value)
    with closing(sqlite3.connect(tmp_path / "other.db")) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",), (
            "the database of another program is unchanged"
        )
    without = "sys.modules['redis'] = None; sys.exit(kimi2api.main([]))"
    program = run_code(without, SESSION_STORE="redis://localhost")
    assert program.returncode == 2 and "pip install redis" in program.stderr
    assert program.stderr.count("\n") == 1


def test_the_memory_store_imports_neither_sqlite_nor_redis() -> None:
    script = (
        "import sys, kimi2api; kimi2api.create_app(kimi2api.Settings.load({}));"
        "sys.exit('sqlite3' in sys.modules or 'redis' in sys.modules)"
    )
    env = {**os.environ, **COMPILED_ONCE}
    assert subprocess.run([sys.executable, "-c", script], env=env, timeout=PATIENCE).returncode == 0


def test_the_database_file_is_private_and_its_size_is_bounded(tmp_path: Path, clock: Clock) -> None:
    old = os.umask(0)
    try:
        store = open_store(f"sqlite:{tmp_path}/sessions.db", ttl=60)
        add_turn(store, "ada", 1)
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}

    def fill() -> int:
        for _ in range(50):
            clock.now += 1
            add_turn(store, f"{clock.now}", "x" * 100_000)
        return sum(path.stat().st_size for path in tmp_path.iterdir())

    sizes = [fill() for _ in range(5)]
    assert store.count() == 60 and max(sizes[3:]) <= 1.2 * sizes[2]
    clock.now += 100
    with closing(sqlite3.connect(tmp_path / "sessions.db")) as db:
        for number in range(5):
            add_turn(store, f"{number}", "x")
            if number == 0:
                assert db.execute("SELECT count(*) > 40 FROM documents").fetchone() == (1,), (
                    "one write deletes only some"
                )
        while db.execute("SELECT count(*) > 5 FROM documents").fetchone() == (1,):
            add_turn(store, "0", "x")
    assert store.count() == 5
    with closing(sqlite3.connect(tmp_path / "sessions.db")) as db:
        pages = db.execute("PRAGMA page_count").fetchone()[0]
    assert pages * 4096 < sizes[-1] / 2, "the file has shrunk"


def test_a_database_file_behind_a_link_is_private(tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to("sessions.db")
    add_turn(open_store(f"sqlite:{tmp_path}/link.db"), "ada", 1)
    made = [path for path in tmp_path.iterdir() if not path.is_symlink()]
    assert made and {path.stat().st_mode & 0o777 for path in made} == {0o600}


def test_redis_expires_documents_and_a_turn_costs_few_commands(redis_server: RedisServer) -> None:
    store = open_store(redis_server.url, ttl=60)
    client = redis_server.client
    store.check()
    for text in "abc":
        add_turn(store, "ada", text)
    store.add_counters(counter_key("day", lifetime=60), {"requests": 1})
    store.put(("owner", "reasoning", "name"), make_document(b"text"))
    keys = {key.decode(): client.type(key).decode() for key in client.scan_iter()}
    assert sorted(keys.values()) == ["hash"] * 3 + ["set", "string"] + ["zset"] * 2
    for key in keys.keys() - {"kimi2api:check", "kimi2api:indexes"}:
        assert 0 < client.ttl(key) <= 60, key
        client.pexpire(key, 5000)
    client.config_resetstat()
    add_turn(store, "ada", "d")
    asked = {name: stats["calls"] for name, stats in client.info("commandstats").items()}
    del asked["cmdstat_config|resetstat"]
    assert asked["cmdstat_eval"] == 1 and sum(asked.values()) <= 11, asked
    renewed = [key for key in keys if client.pttl(key) > 5000]
    assert len(renewed) == 2, "only the session and the index"
    client.flushall()
    add_turn(store, "ada", "e")
    assert session_questions(store, "ada") == ["e"] and store.count() == 1


def test_a_clock_that_jumps_changes_no_usage_and_few_sessions(
    store_address: str, make_app: MakeApp, clock: Clock, kimi: WebChat
) -> None:
    clock.now = time.time()  # Redis has a clock of its own
    settings = {"SESSION_STORE": store_address, "TOKENS_PER_DAY": "1000", "SESSION_CACHE_TTL": "600"}
    app = make_app(**settings)
    for user in ("ada", "bob", "cid", "dan", "eve"):
        assert answer_text(chat(app, user=user))
    used = tokens_today(app)
    for error in (-400 * 86400, 400 * 86400):
        clock.error = error
        assert answer_text(chat(app)) and answer_text(chat(app, user=f"at {error}"))
        clock.error = 0.0
        kept = {entry["user"] for entry in app.get("/v1/sessions").json["data"]}
        assert len(kept & {"ada", "bob", "cid", "dan", "eve"}) >= 2, "few sessions are lost"
        assert tokens_today(app) == used


# Failures and recovery


@pytest.fixture
def short_store_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"STORE_TIMEOUT": 0.4, "REDIS_TIMEOUT": 0.3, "MAX_STORE_PAUSE": 0.1}.items():
        monkeypatch.setattr(kimi2api, name, seconds)


def assert_store_failure(app: Client, is_readable: bool = False) -> None:
    """Assert that 32 concurrent requests that need the store return 503 within 5 seconds, and others are answered."""
    began = time.monotonic()
    with ThreadPoolExecutor(32) as pool:
        asked = list(pool.map(lambda number: chat(app, "Hi", user=f"user {number}", stream=number % 2 == 0), range(32)))
    for answer in asked:
        if answer.status_int == 200:  # a stream that had begun
            assert b'"session_store_unavailable"' in answer.body and b"[DONE]" not in answer.body
        else:
            assert_error(answer, 503, "session_store_unavailable", "server_error")
    assert time.monotonic() - began < 5
    assert answer_text(chat(app, "Hi")) == "Hello from upstream."
    health = app.get("/health").json
    assert health["status"] == "degraded" and health["store"]["ok"] is False and health["sessions"]["kept"] is None
    if not is_readable:
        assert_error(app.get("/v1/sessions/ada"), 503, "session_store_unavailable")


def break_store(folder: Path) -> None:
    """Replace the file of the SQLite store in this folder by a directory."""
    for path in folder.iterdir():
        path.unlink()
    (folder / "sessions.db").mkdir()


def store_recovered(app: Client) -> Callable[[], bool]:
    return lambda: bool(app.get("/health").json["store"]["ok"] and chat(app, "Hi", user="eve").status_int == 200)


@pytest.fixture
def three_programs(start_program: StartProgram, redis_server: RedisServer) -> list[Program]:
    """Three processes on one Redis, as behind a load balancer without sticky sessions."""
    settings = {
        "SESSION_STORE": redis_server.url,
        "API_MASTER_KEY": "sk-1,ann:sk-2",
        "REQUESTS_PER_MINUTE": "ann=10",
        "STREAM_INTERVAL_MS": "0",
    }
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(lambda _: start_program(**settings), range(3)))


def test_three_processes_share_sessions_responses_usage_and_limits(
    three_programs: list[Program], kimi: WebChat
) -> None:
    key = bearer("sk-1")
    turn = itertools.cycle(three_programs)

    def post(path: str, headers: dict[str, str] = key, **body: Any) -> tuple[int, Any]:
        status, answered = next(turn).ask("POST", path, body, **headers)
        return status, json.loads(answered)

    for text in ("One", "Two", "Three", "Four"):
        assert post("/v1/chat/completions", user="ada", messages=[{"role": "user", "content": text}])[0] == 200
    assert all(f"用户: {text}" in kimi.posts[-1]["message"] for text in ("One", "Two", "Three", "Four"))
    first = post("/v1/responses", input="Uno")[1]["id"]
    second = post("/v1/responses", input="Dos", previous_response_id=first)[1]["id"]
    assert post("/v1/responses", input="Tres", previous_response_id=second)[0] == 200
    assert "用户: Uno" in kimi.posts[-1]["message"] and "用户: Dos" in kimi.posts[-1]["message"]
    assert [program.ask("DELETE", f"/v1/responses/{first}", **key)[0] for program in three_programs] == [200, 404, 404]
    used = [json.loads(program.ask("GET", "/v1/usage", **key)[1])["today"] for program in three_programs]
    assert used[0]["requests"] == 7 and used[0] == used[1] == used[2]
    minute = 0
    while minute != int(time.time() // 60):  # all requests within one minute
        minute = int(time.time() // 60)
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(post, "/v1/completions", bearer("sk-2"), prompt="x") for _ in range(15)]
        statuses = [done.result()[0] for done in asked]
    assert sorted(statuses) == [200] * 10 + [429] * 5


def test_killing_one_of_three_processes_loses_no_answered_turn(three_programs: list[Program]) -> None:
    answered: dict[str, list[str]] = {f"user {number}": [] for number in range(6)}
    stopping = threading.Event()

    def converse(user: str) -> None:
        for number in itertools.count():
            if stopping.is_set():
                return
            program = random.choice(three_programs)
            with suppress(OSError, http.client.HTTPException):  # the killed process
                text = f"question {number}"
                message = {"role": "user", "content": text}
                body = {"user": user, "messages": [message], "stream": bool(number % 2)}
                status, data = program.ask("POST", "/v1/chat/completions", body, **bearer("sk-1"))
                if status == 200 and (not number % 2 or b"data: [DONE]" in data):
                    answered[user].append(text)

    with ThreadPoolExecutor(6) as pool:
        conversations = [pool.submit(converse, user) for user in answered]
        wait_for(lambda: min(map(len, answered.values())) >= 5)
        three_programs[0].process.kill()
        before = {user: len(texts) for user, texts in answered.items()}
        wait_for(lambda: all(len(answered[user]) >= count + 5 for user, count in before.items()))
        stopping.set()
    for conversation in conversations:
        conversation.result()  # raises the conversation's error
    for user, texts in answered.items():
        status, data = three_programs[1].ask("GET", f"/v1/sessions/{quote(user)}", **bearer("sk-1"))
        assert status == 200
        kept = [turn[0]["content"] for turn in json.loads(data)["turns"]]
        assert [text for text in kept if text in texts] == texts


@pytest.mark.parametrize(
    ("fail", "mend", "is_readable"),
    [
        pytest.param(
            lambda server: server.process.send_signal(signal.SIGSTOP),
            lambda server: server.process.send_signal(signal.SIGCONT),
            False,
            id="hangs",
        ),
        pytest.param(
            lambda server: server.client.config_set("maxmemory", 1),
            lambda server: server.client.config_set("maxmemory", 0),
            True,
            id="is full",
        ),
        pytest.param(
            lambda server: server.client.replicaof("127.0.0.1", "1"),
            lambda server: server.client.replicaof("NO", "ONE"),
            True,
            id="is a replica",
        ),
    ],
)
def test_redis_may_fail_and_recover(
    redis_server: RedisServer,
    make_app: MakeApp,
    short_store_timeouts: None,
    fail: Callable[[RedisServer], Any],
    mend: Callable[[RedisServer], Any],
    is_readable: bool,
) -> None:
    app = make_app(SESSION_STORE=redis_server.url)
    chat(app, "first", user="ada")
    fail(redis_server)
    try:
        assert_store_failure(app, is_readable)
    finally:
        mend(redis_server)
    wait_for(store_recovered(app), "the store recovers")
    assert len(app.get("/v1/sessions/ada").json["turns"]) == 1


def test_redis_may_stop_and_start_again(tmp_path: Path, make_app: MakeApp, short_store_timeouts: None) -> None:
    server = RedisServer(tmp_path)
    try:
        app = make_app(SESSION_STORE=server.url)
        chat(app, "first", user="ada")
        server.stop()
        assert_store_failure(app)
        late = make_app(SESSION_STORE=server.url)
        server.start()
        for each in (app, late):
            wait_for(store_recovered(each), "redis-server is back")
            assert len(each.get("/v1/sessions/ada").json["turns"]) == 1
        server.client.config_set("requirepass", "secret")
        assert_store_failure(make_app(SESSION_STORE=server.url.replace("redis://", "redis://:wrong@")))
        assert store_recovered(make_app(SESSION_STORE=server.url.replace("redis://", "redis://:secret@")))()
    finally:
        server.stop()


@contextmanager
def relay_to(server: RedisServer, change: Callable[[bytes], bytes]) -> Iterator[str]:
    """Relay between a program and Redis, changing the answers. Yield its address."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection(("127.0.0.1", server.port)) as redis:
                while asked := self.request.recv(65536):
                    redis.sendall(asked)
                    self.request.sendall(change(redis.recv(65536)))

    class Relay(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 128

    with Relay(("127.0.0.1", 0), Handler) as relay:
        threading.Thread(target=relay.serve_forever, daemon=True).start()
        try:
            yield f"redis://127.0.0.1:{relay.server_address[1]}/0"
        finally:
            relay.shutdown()


@pytest.mark.parametrize("reply", [b":abc\r\n", b"+OK\r\n"])
def test_malformed_answers_of_redis_are_store_failures(
    make_app: MakeApp, redis_server: RedisServer, reply: bytes, short_store_timeouts: None
) -> None:
    makes_sense = True
    with relay_to(redis_server, lambda answer: answer if makes_sense else reply) as address:
        app = make_app(SESSION_STORE=address)
        for path in ("/v1/sessions", "/v1/sessions/ada", "/v1/responses/resp_1"):
            wait_for(store_recovered(app))
            makes_sense = False
            assert_error(app.get(path), 503, "session_store_unavailable")
            assert app.get("/health").json["store"]["ok"] is False
            assert answer_text(chat(app)) == "Hello from upstream."
            makes_sense = True


def test_a_slow_redis_serves_many_requests_concurrently(redis_server: RedisServer) -> None:
    def late(answer: bytes) -> bytes:
        time.sleep(0.03)
        return answer

    with relay_to(redis_server, late) as address, ThreadPoolExecutor(128) as pool:
        store = open_store(address)
        assert list(pool.map(lambda number: store.load(("owner", "session", str(number))), range(128))) == [None] * 128
        list(pool.map(lambda number: add_turn(store, "ada", number), range(2)))
        assert sorted(session_questions(store, "ada")) == ["0", "1"], (
            "two concurrent turns of one user are both recorded"
        )


@pytest.mark.parametrize("head", ["x", "5", "[]", None])
def test_a_malformed_document_is_a_failure_and_can_be_deleted(
    make_app: MakeApp, redis_server: RedisServer, head: str | None
) -> None:
    app, client = make_app(SESSION_STORE=redis_server.url), redis_server.client
    chat(app, user="ada")
    [key] = client.keys("kimi2api:documents:*:session:*")
    if head:
        client.hset(key, "head", head)
    else:
        client.hdel(key, "data")
    assert_error(chat(app, user="ada"), 503, "session_store_unavailable")
    wait_for(lambda: app.delete("/v1/sessions/ada").status_int in (200, 404), "the session is deleted")
    assert app.get("/health").json["store"]["ok"] is True


def test_a_locked_database_fails_and_recovers(tmp_path: Path, make_app: MakeApp, short_store_timeouts: None) -> None:
    file = tmp_path / "sessions.db"
    app = make_app(SESSION_STORE=f"sqlite:{file}")
    chat(app, "first", user="ada")
    with closing(sqlite3.connect(file, isolation_level=None)) as db:
        db.execute("BEGIN EXCLUSIVE")
        assert_store_failure(app, is_readable=True)
        late = make_app(SESSION_STORE=f"sqlite:{file}")
        db.execute("ROLLBACK")
    for each in (app, late):
        wait_for(store_recovered(each), "the lock is released")
        assert len(each.get("/v1/sessions/ada").json["turns"]) == 1


def test_a_damaged_database_may_be_deleted(tmp_path: Path, make_app: MakeApp, short_store_timeouts: None) -> None:
    file = tmp_path / "kept" / "sessions.db"
    file.parent.mkdir()
    app = make_app(SESSION_STORE=f"sqlite:{file}")
    chat(app, "first", user="ada")
    with closing(sqlite3.connect(file)) as db:
        # Otherwise everything is read from the write-ahead log, in spite of the damage
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    file.write_bytes(b"x" * file.stat().st_size)
    assert_store_failure(app)
    for path in file.parent.iterdir():
        path.unlink()
    wait_for(store_recovered(app), "a new file is created")


def test_a_deleted_directory_of_the_database_may_return(
    tmp_path: Path, make_app: MakeApp, short_store_timeouts: None
) -> None:
    file = tmp_path / "kept" / "sessions.db"
    file.parent.mkdir()
    app = make_app(SESSION_STORE=f"sqlite:{file}")
    chat(app, "first", user="ada")
    shutil.rmtree(file.parent)
    assert_store_failure(app)
    file.parent.mkdir()
    wait_for(store_recovered(app), "the directory is back")
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_briefly_locked_database_loses_no_turn(tmp_path: Path, make_app: MakeApp) -> None:
    file = tmp_path / "sessions.db"
    app = make_app(SESSION_STORE=f"sqlite:{file}", REQUESTS_PER_MINUTE="9")
    with closing(sqlite3.connect(file, isolation_level=None, check_same_thread=False)) as db:
        db.execute("BEGIN IMMEDIATE")
        end = threading.Timer(0.3, db.execute, ["ROLLBACK"])
        end.start()
        assert answer_text(chat(app, user="ada"))
        end.join()
    assert app.get("/v1/sessions/ada").status_int == 200


def test_after_a_failure_calls_fail_fast_for_five_times_as_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kimi2api, "STORE_TIMEOUT", 0.1)
    store = open_store(f"sqlite:{tmp_path}/sessions.db")

    def seconds_of_a_failure() -> float:
        began = time.monotonic()
        with pytest.raises(kimi2api.APIError) as failed:
            store.put(("owner", "session", "ada"), make_document())
        assert (failed.value.status, failed.value.code) == (503, "session_store_unavailable")
        return time.monotonic() - began

    with closing(sqlite3.connect(tmp_path / "sessions.db", isolation_level=None)) as db:
        db.execute("BEGIN EXCLUSIVE")
        assert seconds_of_a_failure() >= 0.1
        failed = time.monotonic()
        assert seconds_of_a_failure() < 0.08
        db.execute("ROLLBACK")

    def is_written() -> bool:
        with suppress(kimi2api.APIError):
            return store.put(("owner", "session", "ada"), make_document())
        return False

    wait_for(is_written, "the store recovers by itself")
    assert 0.45 < time.monotonic() - failed < 5


def test_a_store_busy_with_our_own_threads_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kimi2api, "STORE_TIMEOUT", 0.2)
    store = open_store(f"sqlite:{tmp_path}/sessions.db")
    add_turn(store, "ada", 1)
    assert isinstance(store, kimi2api.SQLiteStore)
    with store._lock, pytest.raises(kimi2api.APIError):
        add_turn(store, "ada", 2)
    add_turn(store, "ada", 3)
    assert session_questions(store, "ada") == ["1", "3"], "the store is not paused"


def test_a_database_that_cannot_be_written_is_reopened(tmp_path: Path) -> None:
    store = open_store(f"sqlite:{tmp_path}/sessions.db")
    add_turn(store, "ada", 1)
    assert isinstance(store, kimi2api.SQLiteStore)
    store._db.execute("PRAGMA query_only = ON")  # root may write a file of any mode
    with pytest.raises(kimi2api.APIError) as failed:
        add_turn(store, "ada", 2)
    assert (failed.value.status, failed.value.code) == (503, "session_store_unavailable")

    def is_written() -> bool:
        with suppress(kimi2api.APIError):
            add_turn(store, "ada", 3)
            return True
        return False

    wait_for(is_written, "the store recovers")
    assert session_questions(store, "ada") == ["1", "3"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory whose disk has 4 MB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk_allows_deletions(
    small_disk: Path, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kimi2api, "MAX_STORE_PAUSE", 0.0)
    app = make_app(SESSION_STORE=f"sqlite:{small_disk}/sessions.db", CONTEXT_MAX_LENGTH="99999")
    for number in range(5):
        assert answer_text(chat(app, "x" * 60_000, user=f"user {number}"))
    with suppress(OSError), (small_disk / "other").open("wb", 0) as other:
        while True:
            other.write(b"x" * 4096)
    assert [chat(app, "x" * 60_000, user="late").status_int for _ in range(9)][-1] == 503
    assert [app.delete(f"/v1/sessions/user%20{number}").status_int for number in range(4)] == [200] * 4
    assert app.get("/health").json["store"]["ok"] is False
    (small_disk / "other").unlink()
    wait_for(store_recovered(app), "there is free space")
    assert [app.get(f"/v1/sessions/user%20{number}").status_int for number in range(5)] == [404] * 4 + [200]


def test_a_damaged_page_is_logged_once(
    tmp_path: Path, make_app: MakeApp, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kimi2api, "MAX_STORE_PAUSE", 0.0)
    file = tmp_path / "sessions.db"
    app = make_app(SESSION_STORE=f"sqlite:{file}", CONTEXT_MAX_LENGTH="999999")
    for number in range(4):
        assert answer_text(chat(app, "x" * 60_000, user=f"user {number}"))
    with closing(sqlite3.connect(file)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        [root] = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'documents'").fetchone()
    with file.open("r+b") as pages:
        pages.seek((root - 1) * 4096)
        pages.write(b"\xff" * 4096)
    for _ in range(3):
        assert_error(app.get("/v1/sessions/user%200"), 503, "session_store_unavailable")
        app.get("/health")
    logged = [record.getMessage() for record in caplog.records if "session store" in record.getMessage()]
    assert len(logged) <= 2 and "malformed" in logged[0], "the failure, and at most one recovery"


@pytest.mark.parametrize(("column", "value"), [
    ("data", "'text'"), ("created", "'x'"), ("used", "'x'"), ("turns", "'many'"), ("data", "x'ff'"),
    ("data", "CAST('{\"id\": \"a\"}' || char(10) || '[5' AS BLOB)"),
])  # fmt: skip
def test_rows_of_wrong_types_are_a_store_failure(
    tmp_path: Path, make_app: MakeApp, column: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kimi2api, "MAX_STORE_PAUSE", 0.0)
    file = tmp_path / "sessions.db"
    app = make_app(SESSION_STORE=f"sqlite:{file}", TOKENS_PER_DAY="99")
    assert answer_text(chat(app, user="ada"))
    with closing(sqlite3.connect(file, isolation_level=None)) as db:
        db.execute(f"UPDATE documents SET {column} = {value}")
    for asked in (chat(app, user="ada"), app.get("/v1/sessions/ada")):
        assert_error(asked, 503, "session_store_unavailable")
    assert app.get("/v1/sessions").status_int in (200, 503)
    with closing(sqlite3.connect(file, isolation_level=None)) as db:
        db.execute("UPDATE counters SET value = 'many'")
    assert answer_text(chat(app)), "limits use the counts of this process"
    assert app.get("/v1/usage").status_int == 200
    wait_for(lambda: app.delete("/v1/sessions/ada").status_int == 200, "the store recovers")


def test_a_redis_user_without_scripts_is_refused_at_the_start(make_app: MakeApp, redis_server: RedisServer) -> None:
    redis_server.client.acl_setuser(
        "plain", enabled=True, passwords=["+s3cret"], keys=["*"], categories=["+@all", "-@scripting"])
    with pytest.raises(kimi2api.SettingError, match=r"^SESSION_STORE: the user .* may not run scripts") as refused:
        make_app(SESSION_STORE=redis_server.url.replace("redis://", "redis://plain:s3cret@"))
    assert "s3cret" not in str(refused.value)
    redis_server.client.acl_deluser("plain")


def test_a_full_disk_is_an_error_and_the_store_recovers(tmp_path: Path, start_program: StartProgram) -> None:
    resource = pytest.importorskip("resource")
    program = start_program(SESSION_STORE=f"sqlite:{tmp_path}/sessions.db")
    assert program.chat("first", user="ada")[0] == 200
    unlimited = resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, (4096, unlimited[1]))
    status, body = program.chat("lost", user="ada")
    assert status == 503 and b'"session_store_unavailable"' in body
    assert program.chat("Hello")[0] == 200
    health = program.health()
    assert health["status"] == "degraded" and health["store"] == {"kind": "sqlite", "ok": False}
    resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, unlimited)
    wait_for(lambda: program.health()["store"]["ok"], "there is free space")
    assert program.chat("second", user="ada")[0] == 200
    turns = json.loads(program.ask("GET", "/v1/sessions/ada")[1])["turns"]
    assert [turn[0]["content"] for turn in turns] == ["first", "second"]


# ----------------------------------------------------------------------------------------------------------------------
# Limits and usage, metrics
# ----------------------------------------------------------------------------------------------------------------------


NAMED_KEYS = {"API_MASTER_KEY": "ann:sk-1, bob:sk-2, sk-3"}


def test_the_log_shows_names_of_keys_and_never_keys(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    app = make_app(**NAMED_KEYS)
    for key, name in (("sk-1", "ann"), ("sk-2", "bob"), ("sk-3", None)):
        assert app.get("/v1/usage", headers=bearer(key)).json["key"] == name
    assert_error(app.get("/v1/usage", headers=bearer("ann:sk-1")), 401, "invalid_api_key")
    assert " ann GET /v1/usage 200" in caplog.text and "sk-1" not in caplog.text


@pytest.mark.parametrize("keys", ["ann:", "ann:,bob:sk-2"])
def test_a_name_without_a_key_is_refused(keys: str) -> None:
    with pytest.raises(kimi2api.SettingError, match=r"^API_MASTER_KEY: the value is not "):
        kimi2api.Settings.load({"API_MASTER_KEY": keys})


def test_two_names_for_one_key_are_refused() -> None:
    with pytest.raises(kimi2api.SettingError, match=r"^API_MASTER_KEY: the same key is listed under two names$"):
        kimi2api.Settings.load({"API_MASTER_KEY": "ann:sk-1,bob:sk-1"})
    assert kimi2api.Settings.load({"API_MASTER_KEY": "sk-1,sk-1"})


@pytest.mark.parametrize("value", ["x", "-1", "20,ann", "1.5", "carl=3", "20,30", "ann=1,ann=2", "=5"])
def test_an_invalid_limit_is_refused(value: str) -> None:
    with pytest.raises(kimi2api.SettingError, match="REQUESTS_PER_MINUTE"):
        kimi2api.Settings.load({**NAMED_KEYS, "REQUESTS_PER_MINUTE": value})


def test_each_key_has_its_requests_per_minute(make_app: MakeApp, clock: Clock, kimi: WebChat) -> None:
    app = make_app(**NAMED_KEYS, REQUESTS_PER_MINUTE="2,ann=3,bob=0")
    clock.now = 60 * 10**7 + 15
    remaining = []
    for _ in range(3):
        response = chat(app, headers=bearer("sk-1"))
        assert answer_text(response) and response.headers["x-ratelimit-limit-requests"] == "3"
        assert response.headers["x-ratelimit-reset-requests"] == "45s"
        remaining.append(response.headers["x-ratelimit-remaining-requests"])
    assert remaining == ["2", "1", "0"]
    refused = chat(app, headers=bearer("sk-1"), stream=True)
    assert_error(refused, 429, "rate_limit_exceeded", "rate_limit_error")
    assert refused.headers["Retry-After"] == "45"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0" and len(kimi.posts) == 3
    assert "x-ratelimit-limit-requests" not in chat(app, headers=bearer("sk-2")).headers
    statuses = [
        respond(app, headers=bearer("sk-3")).status_int,
        embeddings_status(app, "sk-3"),
        embeddings_status(app, "sk-3"),
    ]
    assert statuses == [200, 400, 429]
    clock.now += 45
    assert answer_text(chat(app, headers=bearer("sk-1"))) and answer_text(chat(app, headers=bearer("sk-3")))


def embeddings_status(app: Client, key: str) -> int:
    return app.post_json("/v1/embeddings", {"input": "x"}, headers=bearer(key)).status_int


def test_a_failed_chat_has_rate_limit_headers(make_app: MakeApp, kimi: WebChat) -> None:
    kimi.always = sends(403, JUST_A_MOMENT)
    response = chat(make_app(REQUESTS_PER_MINUTE="5"))
    assert_error(response, 503, "upstream_blocked")
    assert response.headers["x-ratelimit-remaining-requests"] == "4"


def test_a_chat_over_its_quota_is_not_counted_as_a_request(make_app: MakeApp, clock: Clock) -> None:
    app = make_app(TOKENS_PER_DAY="1", REQUESTS_PER_MINUTE="5")
    clock.now = 86400 * 10**4 + 20
    assert answer_text(chat(app))
    for _ in range(2):
        refused = chat(app)
        assert_error(refused, 429, "insufficient_quota", "insufficient_quota")
        for what, values in (("tokens", ["1", "0", "23h59m40s"]), ("requests", ["5", "4", "40s"])):
            names = [f"x-ratelimit-{part}-{what}" for part in ("limit", "remaining", "reset")]
            assert [refused.headers.get(name) for name in names] == values


def test_the_chat_that_exceeds_tokens_per_day_is_answered(
    make_app: MakeApp, clock: Clock, kimi: WebChat
) -> None:
    app = make_app(TOKENS_PER_DAY="30")
    clock.now = 86400 * 10**4 + 86400 - 3723
    kimi.answer = "word " * 20
    response = chat(app)
    assert answer_text(response) and response.headers["x-ratelimit-limit-tokens"] == "30"
    assert response.headers["x-ratelimit-remaining-tokens"] == "30"
    assert response.headers["x-ratelimit-reset-tokens"] == "1h2m3s"
    assert answer_text(chat(app)), "27 tokens are used, so there are 3 left"
    refused = chat(app)
    assert_error(refused, 429, "insufficient_quota", "insufficient_quota")
    assert refused.headers["Retry-After"] == "3723" and refused.headers["x-should-retry"] == "false"
    clock.now += 3723
    assert answer_text(chat(app))


def test_limits_hold_during_an_outage_and_counts_are_added_later(
    tmp_path: Path, make_app: MakeApp, clock: Clock, kimi: WebChat
) -> None:
    kimi.answer = "word " * 20
    server = RedisServer(tmp_path)
    try:
        settings = {**NAMED_KEYS, "SESSION_STORE": server.url}
        app = make_app(**settings, TOKENS_PER_DAY="ann=20", REQUESTS_PER_MINUTE="bob=2")
        for key in ("sk-1", "sk-2", "sk-3"):
            assert answer_text(chat(app, headers=bearer(key)))
        server.stop()
        assert_error(chat(app, headers=bearer("sk-1")), 429, "insufficient_quota")
        assert [chat(app, headers=bearer("sk-2")).status_int for _ in range(2)] == [200, 429]
        assert answer_text(chat(app, headers=bearer("sk-3")))
        server.start()
        wait_for(lambda: app.get("/health").json["store"]["ok"], "it is back")
        assert answer_text(chat(app, headers=bearer("sk-3")))
        used = app.get("/v1/usage", headers=bearer("sk-3")).json["today"]
        assert used["requests"] == 3 and used == make_app(**settings).get(
            "/v1/usage", headers=bearer("sk-3")).json["today"]
        other = make_app(**settings, REQUESTS_PER_MINUTE="bob=3")
        assert [chat(other, headers=bearer("sk-2")).status_int for _ in range(2)] == [429, 429], (
            "three requests were counted"
        )
        assert_error(chat(app, headers=bearer("sk-1")), 429, "insufficient_quota")
    finally:
        server.stop()


def test_a_read_only_store_refills_no_limit_when_it_stops(
    tmp_path: Path, make_app: MakeApp, clock: Clock, kimi: WebChat
) -> None:
    kimi.answer = "word " * 20
    server = RedisServer(tmp_path)
    try:
        app = make_app(SESSION_STORE=server.url, TOKENS_PER_DAY="40")
        assert answer_text(chat(app))
        server.client.config_set("maxmemory", 1)
        assert answer_text(chat(app)), "the store has not counted this chat"
        used = tokens_today(app)
        assert sum(used) > 40
        assert_error(chat(app), 429, "insufficient_quota")
        server.stop()
        assert_error(chat(app), 429, "insufficient_quota")
        assert tokens_today(app) == used
    finally:
        server.stop()


@json_and_stream
def test_a_client_that_disconnects_before_the_first_chunk_used_its_prompt(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, stream: bool
) -> None:
    api.always = hangs
    app = make_app(**api_settings, TOKENS_PER_DAY="6", SSE_KEEPALIVE="0.05")
    question = {"model": "local/k2", "stream": stream, "messages": [{"role": "user", "content": "four words of text"}]}
    leaves = {"waitress.client_disconnected": lambda: bool(api.asked)}
    for _ in range(2):
        api.asked.clear()
        app.post_json("/v1/chat/completions", question, extra_environ=leaves)
    assert tokens_today(app) == (10, 0)
    assert_error(chat(app, model="local/k2"), 429, "insufficient_quota")
    assert len(api.asked) == 1


@pytest.mark.parametrize("kind", ["chat", "embeddings"])
def test_concurrent_requests_do_not_exceed_a_quota(
    store_address: str, make_app: MakeApp, api_settings: dict[str, str], api: Api, kind: str
) -> None:
    app = make_app(**api_settings, SESSION_STORE=store_address, TOKENS_PER_DAY="14")
    api.always = at_the_gate(api_sends(200, EMBEDDINGS) if kind == "embeddings" else api_answers("Hi"))

    def ask(_: int) -> int:
        if kind == "embeddings":
            return int(embed(app, model="local/e", input="four words of text").status_int)
        return int(chat(app, "four words of text", model="local/k2").status_int)

    with ThreadPoolExecutor(60) as pool:
        asked = [pool.submit(ask, number) for number in range(60)]
        wait_for(lambda: sum(done.done() for done in asked) >= 57, "refused requests do not reach upstream")
        api.gate.set()
        statuses = sorted(done.result() for done in asked)
    assert statuses == [200] * 3 + [429] * 57 and len(api.asked) == 3


def test_failed_and_refused_requests_use_no_quota(
    store_address: str,
    make_app: MakeApp,
    api_settings: dict[str, str],
    api: Api,
    kimi: WebChat,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kimi2api, "FIRST_PAUSE", 0.0)
    settings = {
        **api_settings,
        "SESSION_STORE": store_address,
        "REQUEST_TIMEOUT": "0.3",
        "MAX_RETRIES": "0",
        "MODELS": "kimi=x",
    }
    app = make_app(**settings, TOKENS_PER_DAY="12")
    four_words = "four words of text"
    asked = list(itertools.product((sends(500), sends(403, JUST_A_MOMENT), resets, sends(200, "?")),
                                   ("kimi", "local/k2"), (False, True)))  # fmt: skip
    for act, model, stream in [(hangs, "kimi", True), (hangs, "local/k2", False), *asked]:
        kimi.always = api.always = act
        assert chat(app, four_words, model=model, stream=stream, user="ada").status_int >= 400
    assert chat(app, four_words, model="missing").status_int == 404
    assert chat(app, four_words, tools=5).status_int == 400
    assert chat(app, four_words * 900).status_int == 400
    assert respond(app, four_words, previous_response_id="resp_0").status_int == 400
    assert embed(app, model="kimi").status_int == 400 and embed(app, model="local/k2").status_int >= 500
    assert tokens_today(app) == (0, 0)
    kimi.always, api.always = web_chat_answers, api_streams(api_chunk({"content": "x"}, "stop"), b"[DONE]")
    store = open_store(store_address) if store_address != "memory" else None
    for expected in (200, 200, 429):
        assert chat(app, four_words, model="local/k2").status_int == expected
    if store:
        [counters] = store.read_counters([kimi2api.day_key(kimi2api.ClientKey(), time.time())])
        assert counters["reserved"] == counters["released"] > 0


def test_a_chat_that_fails_after_midnight_returns_its_quota_to_its_day(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, clock: Clock
) -> None:
    clock.now = 86400 * 10**4 - 5
    app = make_app(**api_settings, TOKENS_PER_DAY="14")
    question = partial(chat, app, "four words of text", model="local/k2")
    api.always = at_the_gate(api_sends(400, {}))
    with ThreadPoolExecutor(20) as pool:
        failing = [pool.submit(question) for _ in range(3)]
        wait_for(lambda: len(api.asked) == 3)
        clock.now += 10
        api.gate.set()
        assert [done.result().status_int for done in failing] == [400] * 3
        api.gate.clear()
        asked = [pool.submit(question) for _ in range(20)]
        wait_for(lambda: sum(done.done() for done in asked) == 17)
        api.gate.set()
    assert len(api.asked) == 6


def test_a_quota_holds_through_an_outage_of_its_store(
    tmp_path: Path, make_app: MakeApp, api_settings: dict[str, str], api: Api
) -> None:
    app = make_app(**api_settings, SESSION_STORE=f"sqlite:{tmp_path}/sessions.db", TOKENS_PER_DAY="14")
    api.always = at_the_gate(api_streams(api_chunk({"content": "x"}, "stop"), b"[DONE]"))
    with ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(chat, app, "four words of text", model="local/k2") for _ in range(20)]
        wait_for(lambda: len(api.asked) == 3 and sum(done.done() for done in asked) == 17)
        break_store(tmp_path)
        assert_error(chat(app, model="local/k2"), 429, "insufficient_quota")
        (tmp_path / "sessions.db").rmdir()
        api.gate.set()
        assert sorted(done.result().status_int for done in asked) == [200] * 3 + [429] * 17
    wait_for(lambda: app.get("/health").json["store"]["ok"])
    assert_error(chat(app, model="local/k2"), 429, "insufficient_quota")
    assert tokens_today(app)[0] == 15


def test_one_keys_made_up_models_do_not_hide_anothers_models(make_app: MakeApp, api_settings: dict[str, str]) -> None:
    app = make_app(**api_settings, **NAMED_KEYS)
    for number in range(200):
        assert answer_text(chat(app, model=f"local/made-up-{number}", headers=bearer("sk-1")))
    assert answer_text(chat(app, model="local/k2", headers=bearer("sk-2")))
    models = app.get("/v1/usage", headers=bearer("sk-2")).json["days"][-1]["models"]
    assert set(models) == {"local/k2"}
    assert len(app.get("/v1/usage", headers=bearer("sk-1")).json["days"][-1]["models"]) < 200


@pytest.mark.parametrize("user", [".", "..", "a/b", "x" * 512])
def test_any_user_can_be_listed_and_deleted(store_address: str, make_app: MakeApp, user: str) -> None:
    app = make_app(SESSION_STORE=store_address)
    assert answer_text(chat(app, user=user))
    assert [entry["user"] for entry in app.get("/v1/sessions").json["data"]] == [user]
    path = "/v1/sessions/" + quote(user, safe="").replace(".", "%2E")
    assert app.get(path).json["user"] == user and app.delete(path).status_int == 200
    assert_error(chat(app, user=user + "x" * 512), 400, None, param="user")


class FlakyStore(kimi2api.SQLiteStore):
    """A store that is up, is down, or fails every third call. Some calls are slow."""

    is_down = False
    is_flaky = False

    def __init__(self, folder: Path) -> None:
        super().__init__(f"{folder}/sessions.db", 60, 10)
        self._calls = itertools.count()

    def add_counters(self, key: kimi2api.CounterKey, amounts: kimi2api.Amounts) -> kimi2api.Amounts:
        number = next(self._calls)
        if number % 5 == 0:
            time.sleep(0.001)
        if self.is_down or (self.is_flaky and number % 3 == 0):
            raise kimi2api.store_unavailable()
        return super().add_counters(key, amounts)


def test_totals_are_exact_while_a_store_fails_and_recovers(tmp_path: Path) -> None:
    store = FlakyStore(tmp_path)
    store.is_flaky = True
    counters = kimi2api.Counters(store)
    key = counter_key("minute 1")
    finished = itertools.count(1)
    added = 0

    def add(number: int) -> bool:
        nonlocal added
        store.is_down = number % 100 < 30
        before = added
        total = counters.add(key, {"requests": 1})["requests"]
        added = max(added, next(finished))
        return total > before

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(add, range(2000))), "every total includes all earlier additions"
    store.is_down = False
    wait_for(lambda: counters.add(counter_key("minute 2", "other"), {"requests": 1}) and not counters._pending)
    assert store.read_counters([key]) == [{"requests": 2000}] and counters.read([key]) == [{"requests": 2000}]


def test_usage_of_an_idle_key_is_stored_and_old_periods_are_dropped(tmp_path: Path, clock: Clock) -> None:
    store = FlakyStore(tmp_path)
    store.is_down = True
    counters = kimi2api.Counters(store)
    old = counter_key("day 1", "ann", 5)
    assert counters.add(old, {"tokens": 7})["tokens"] == 7 and counters.add(old, {"tokens": 1})["tokens"] == 8
    assert counters.read([old]) == [{"tokens": 8}]
    store.is_down = False
    counters.add(counter_key("day 1", "bob", 5), {"tokens": 1})
    assert store.read_counters([old]) == [{"tokens": 8}]
    clock.now += 6
    counters.add(counter_key("day 2", "bob"), {"tokens": 1})
    assert len(counters._known) == 1 and not counters._pending


@pytest.mark.parametrize("limit", ["REQUESTS_PER_MINUTE", "TOKENS_PER_DAY"])
def test_a_failing_store_refills_no_limit(make_app: MakeApp, clock: Clock, tmp_path: Path, limit: str) -> None:
    settings = {"SESSION_STORE": f"sqlite:{tmp_path}/sessions.db", limit: "1"}
    app, other = make_app(**settings), make_app(**settings)
    assert answer_text(chat(other))
    assert chat(app).status_int == 429, "this process learns of the other's chat only by this"
    break_store(tmp_path)
    assert app.get("/health").json["store"]["ok"] is False
    assert chat(app).status_int == 429


def test_usage_counts_every_kind_of_answer_for_its_key(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, kimi: WebChat
) -> None:
    app = make_app(**api_settings, **NAMED_KEYS, FALLBACK_MODELS="kimi", TOKENS_PER_DAY="1000000,ann=7000000")
    ann = bearer("sk-1")
    assert answer_text(chat(app, model="local/k2", headers=ann))
    assert sse_events(chat(app, model="local/k2", headers=ann, stream=True))[-1] == "[DONE]"
    assert output_text(respond(app, model="local/k2", headers=ann))
    assert app.post_json("/v1/completions", {"model": "local/k2", "prompt": "x"}, headers=ann).status_int == 200
    api.always = api_sends(200, EMBEDDINGS)
    assert app.post_json("/v1/embeddings", {"model": "local/k2", "input": "x"}, headers=ann).status_int == 200
    api.always = api_sends(500, {})
    assert answer_text(chat(app, model="local/k2", headers=ann)) == kimi.answer
    kimi.always = sends(403, JUST_A_MOMENT)
    assert chat(app, headers=ann).status_int == 503
    usage = app.get("/v1/usage", headers=ann).json
    assert usage["object"] == "usage" and usage["key"] == "ann"
    assert usage["limits"] == {"requests_per_minute": 0, "tokens_per_day": 7000000}
    models = usage["days"][-1]["models"]
    assert models["local/k2"] == {
        "requests": 5, "prompt_tokens": 4 * 5 + 1, "completion_tokens": 4 * 3, "total_tokens": 4 * 8 + 1,
    }  # fmt: skip
    assert models["kimi"]["requests"] == 1 and models["kimi"]["total_tokens"] > 0
    assert len(usage["days"]) == 31 and usage["days"][-1]["date"] == usage["today"]["date"]
    assert usage["today"]["requests"] == 6
    assert usage["today"]["total_tokens"] == sum(model["total_tokens"] for model in models.values())
    assert app.get("/v1/usage", headers=bearer("sk-2")).json["today"]["requests"] == 0


def test_missing_usage_of_embeddings_is_estimated(
    make_app: MakeApp, api_settings: dict[str, str], api: Api
) -> None:
    app = make_app(**api_settings, REQUESTS_PER_MINUTE="4")
    api.always = api_sends(200, {"object": "list", "data": []})
    for given in ("word " * 8, ["word", "word"], [7, 8, 9], [[1, 2], [3]]):
        assert embed(app, model="missing").status_int == 404, "an unknown model is not counted"
        assert embed(app, model="local/e", input=given).status_int == 200
    today = app.get("/v1/usage").json["today"]
    assert today["requests"] == 4 and today["prompt_tokens"] == 10 + 2 + 3 + 3


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
def test_usage_counts_an_answer_whose_client_disconnected(
    start_program: StartProgram, api_settings: dict[str, str], api: Api, stream: bool
) -> None:
    api.always = api_streams_words
    program = start_program(before=CHECKS_OFTEN, **api_settings)
    link = program.open_chat("four words of prompt", model="local/k2", stream=stream)
    if stream:
        read_until(link, b"word", 5)
    wait_for(lambda: api.words_sent >= 10)
    link.close()
    assert api.hung_up.wait(PATIENCE)

    def today() -> Any:
        return json.loads(program.ask("GET", "/v1/usage")[1])["today"]

    wait_for(lambda: today()["requests"])
    used = today()
    assert used["requests"] == 1 and used["prompt_tokens"] == 5 and used["completion_tokens"] >= 4
    wait_for(lambda: program.running() == 0)


def metrics(app: Any, headers: dict[str, str] | None = None) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return all samples by name and labels, read by Prometheus's own parser."""
    parser = pytest.importorskip("prometheus_client.parser")
    response = app.get("/metrics", headers=headers)
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = parser.text_string_to_metric_families(response.text)
    samples = [sample for family in families for sample in family.samples]
    assert len({(sample.name, frozenset(sample.labels.items())) for sample in samples}) == len(samples)
    return {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}


def test_metrics_agree_with_the_requests(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, kimi: WebChat
) -> None:
    app = make_app(**api_settings, MAX_RETRIES="1")
    for _ in range(3):
        assert answer_text(chat(app))
    assert sse_events(chat(app, model="local/k2", stream=True))[-1] == "[DONE]"
    assert output_text(respond(app, model="local/k2"))
    assert chat(app, model="gpt-5").status_int == 404 and chat(app, messages=[]).status_int == 400
    kimi.always = sends(500)
    assert chat(app).status_int == 502
    samples = metrics(app)

    def value(name: str, **labels: str) -> float:
        return samples.get((f"kimi2api_{name}", frozenset(labels.items())), 0)

    kimi_labels, api_labels = {"provider": "kimi", "model": "kimi"}, {"provider": "local", "model": "local/k2"}
    assert value("chats_total", **kimi_labels, status="200") == 3
    assert value("chats_total", **kimi_labels, status="502") == 1
    assert value("chats_total", **api_labels, status="200") == 2
    assert value("chats_total", provider="none", model="other", status="404") == 1
    assert value("chats_total", provider="none", model="other", status="400") == 1
    assert sum(count for (name, _), count in samples.items() if name == "kimi2api_chats_total") == 8
    assert value("tokens_total", **api_labels, type="input") == 10
    assert value("tokens_total", **api_labels, type="output") == 6
    assert value("upstream_errors_total", provider="kimi", code="upstream_unavailable") == 1
    assert value("upstream_retries_total", provider="kimi") == 1
    assert value("upstream_healthy", provider="kimi") == 0 and value("upstream_healthy", provider="local") == 1
    assert value("chats_running") == 0 and value("chats_limit") == 64 and value("sessions") == 1
    for name in ("chat_duration_seconds", "time_to_first_chunk_seconds"):
        assert value(f"{name}_count", **kimi_labels) == value(f"{name}_bucket", **kimi_labels, le="+Inf") == 3
        assert 0 < value(f"{name}_sum", **kimi_labels) < PATIENCE
    buckets = {dict(labels)["le"] for (name, labels) in samples if name.endswith("first_chunk_seconds_bucket")}
    assert {"0.01", "0.02", "81.92", "+Inf"} <= buckets and len(buckets) == 15
    assert value("build_info", version=kimi2api.__version__) == 1


@pytest.mark.parametrize("count", [10**400, 10**4300 - 1, "9", -5, True, None], ids=range(6))
def test_malformed_usage_breaks_no_counter(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, count: Any
) -> None:
    usage = {"prompt_tokens": count, "completion_tokens": count}
    api.always = api_streams(api_chunk({"content": "one"}), api_chunk({}, "stop", usage=usage), b"[DONE]")
    app = make_app(**api_settings, TOKENS_PER_DAY="100")
    for _ in range(2):
        assert chat(app, model="local/k2").status_int == 200
    today = app.get("/v1/usage").json["today"]
    assert metrics(app) and today["requests"] == 2 and 0 < today["total_tokens"] < 100


@pytest.mark.parametrize("usage, counted", [
    ({"prompt_tokens": 50, "completion_tokens": None}, (50, 3)),
    ({"prompt_tokens": 50}, (50, 3)),
    ({"prompt_tokens": None, "completion_tokens": 30}, (5, 30)),
    ({"prompt_tokens": "50", "completion_tokens": -30}, (5, 3)),
])  # fmt: skip
def test_missing_parts_of_usage_are_estimated(
    api_app: Client, api: Api, usage: Any, counted: tuple[int, int]
) -> None:
    in_each = [api_chunk({"content": "word "}, usage=usage), api_chunk({"content": "another"}, usage=usage)]
    api.always = api_streams(*in_each, api_chunk({}, "stop", usage=usage), b"[DONE]")
    assert answer_text(chat(api_app, "four words of text", model="local/k2"))
    assert tokens_today(api_app) == counted


@json_and_stream
def test_usage_inside_a_choice_is_counted(
    api_app: Client, api: Api, stream: bool
) -> None:
    end = api_chunk({}, "stop")
    end["choices"][0]["usage"] = {"prompt_tokens": 19, "completion_tokens": 13, "total_tokens": 32}
    api.always = api_streams(api_chunk({"content": "word"}), end, b"[DONE]")
    assert chat(api_app, model="local/k2", stream=stream).status_int == 200
    assert tokens_today(api_app) == (19, 13)


WRITTEN = "w" * 400
CALL = {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": WRITTEN}}


@pytest.mark.parametrize("delta", [
    {"content": WRITTEN}, {"reasoning_content": WRITTEN}, {"tool_calls": [CALL]},
], ids=["text", "reasoning", "call"])  # fmt: skip
def test_the_estimate_covers_text_reasoning_and_calls(
    api_app: Client, api: Api, delta: dict[str, Any]
) -> None:
    choices = [{"index": index, "delta": delta, "finish_reason": "stop"} for index in range(3)]
    api.always = api_streams({**api_chunk(), "choices": choices}, b"[DONE]")
    assert chat(api_app, model="local/k2", n=3).status_int == 200
    assert 300 <= tokens_today(api_app)[1] <= 301


def test_the_estimate_covers_remembered_turns(api_app: Client, api: Api) -> None:
    api.always = api_streams(api_chunk({"content": WRITTEN}, "stop"), b"[DONE]")
    for _ in range(2):
        assert answer_text(chat(api_app, "four words of text", model="local/k2", user="ada"))
    assert tokens_today(api_app)[0] == 5 + (5 + 100 + 5)
    id = respond(api_app, model="local/k2").json["id"]
    assert output_text(respond(api_app, model="local/k2", previous_response_id=id))
    assert tokens_today(api_app)[0] > 115 + 100


def test_a_configured_model_is_a_label_before_its_first_answer(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, kimi: WebChat
) -> None:
    app = make_app(**api_settings, FALLBACK_MODELS="local/k2", MAX_RETRIES="0")
    kimi.always, api.always = sends(403, JUST_A_MOMENT), api_sends(500, {})
    assert chat(app).status_int == 503
    labels = {"provider": "local", "model": "local/k2", "status": "503"}
    assert metrics(app)["kimi2api_chats_total", frozenset(labels.items())] == 1


def break_store_before_the_answer(kimi: WebChat, folder: Path) -> None:
    answer = kimi.always

    def loses_it_and_answers(handler: WebChatHandler) -> None:
        if (folder / "sessions.db").is_file():
            break_store(folder)
        answer(handler)

    kimi.always = loses_it_and_answers


def test_a_chat_whose_session_fails_is_counted_as_503(
    make_app: MakeApp, kimi: WebChat, tmp_path: Path
) -> None:
    app = make_app(SESSION_STORE=f"sqlite:{tmp_path}/sessions.db")
    break_store_before_the_answer(kimi, tmp_path)
    assert_error(chat(app, user="ada"), 503, "session_store_unavailable")  # its turn cannot be recorded
    assert_error(chat(app, user="ada"), 503, "session_store_unavailable")  # its session cannot be read
    samples = metrics(app)
    for labels in ({"provider": "kimi", "model": "kimi"}, {"provider": "none", "model": "other"}):
        assert samples["kimi2api_chats_total", frozenset({**labels, "status": "503"}.items())] == 1
    assert len([name for name, _ in samples if name == "kimi2api_chats_total"]) == 2


@json_and_stream
def test_a_response_that_cannot_be_stored_is_counted_as_503(
    make_app: MakeApp, kimi: WebChat, tmp_path: Path, stream: bool
) -> None:
    app = make_app(SESSION_STORE=f"sqlite:{tmp_path}/sessions.db")
    break_store_before_the_answer(kimi, tmp_path)
    refused = respond(app, stream=stream)
    assert b"response.completed" not in refused.body and (stream or refused.status_int == 503)
    counted = {key: value for key, value in metrics(app).items() if key[0] == "kimi2api_chats_total"}
    labels = {"provider": "kimi", "model": "kimi", "status": "503"}
    assert counted == {("kimi2api_chats_total", frozenset(labels.items())): 1}
    assert app.get("/v1/usage").json["today"]["requests"] == 0


@pytest.mark.parametrize("models", ["kimi=x,*=kimi", "kimi=local/k2,*=kimi"], ids=["web chat", "api"])
def test_made_up_models_add_no_metric(make_app: MakeApp, api_settings: dict[str, str], models: str) -> None:
    app = make_app(**api_settings, MODELS=models)
    assert answer_text(chat(app, model="made-up-0"))
    before = len(metrics(app))
    for number in range(1, 30):
        assert answer_text(chat(app, model=f"made-up-{number}"))
    assert len(metrics(app)) == before
    assert set(app.get("/v1/usage").json["days"][-1]["models"]) == {"other"}


def test_a_long_model_name_is_no_label(api_app: Client) -> None:
    assert answer_text(chat(api_app, model="local/" + "x" * 100_000)) and answer_text(chat(api_app, model="local/k2"))
    assert set(api_app.get("/v1/usage").json["days"][-1]["models"]) == {"other", "local/k2"}
    assert len(api_app.get("/metrics").text) < 20_000


def test_a_scrape_shows_each_duration_in_all_series_of_its_histogram() -> None:
    found = kimi2api.Metrics()
    stopped = threading.Event()

    def observes() -> None:
        while not stopped.is_set():
            found.observe("kimi2api_chat_duration_seconds", {}, 0.001)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:
            for _ in range(2):
                pool.submit(observes)
            pages = [found.render({}) for _ in range(100)]
            stopped.set()
    finally:
        sys.setswitchinterval(interval)
    for page in pages:
        assert len(set(re.findall(r"^kimi2api_chat_duration_seconds_(?:bucket|count)\S* (\d+)$", page, re.M))) <= 1


def test_metrics_require_a_key_if_keys_are_set(make_app: MakeApp) -> None:
    app = make_app(**NAMED_KEYS)
    assert_error(app.get("/metrics"), 401, "invalid_api_key")
    assert metrics(app, bearer("sk-1"))


def test_sessions_are_listed_for_their_own_key(make_app: MakeApp, clock: Clock) -> None:
    app = make_app(**NAMED_KEYS)
    for user in ("ada", "ada", "bob"):
        chat(app, user=user, headers=bearer("sk-1"))
    respond(app, headers=bearer("sk-1"))
    listed = app.get("/v1/sessions", headers=bearer("sk-1")).json
    assert listed["object"] == "list"
    assert [(entry["user"], entry["turns"], entry["last_used"]) for entry in listed["data"]] == [
        ("ada", 2, int(clock.now)),
        ("bob", 1, int(clock.now)),
    ]
    assert app.get("/v1/sessions", headers=bearer("sk-2")).json["data"] == []


########################################################################################################################
# Part 5: HTTP client
########################################################################################################################


# ----------------------------------------------------------------------------------------------------------------------
# Connections, transport, scraper, cached fetches
# ----------------------------------------------------------------------------------------------------------------------


def test_an_unreachable_web_chat_is_unavailable(make_app: MakeApp) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        for url in (f"http://127.0.0.1:{unused.getsockname()[1]}/chat/", "http://no.such.host.invalid/chat/"):
            response = chat(make_app(CHAT_PAGE_URL=url))
            assert_error(response, 502, "upstream_unavailable")
            assert "object at" not in response.text and response.headers["x-should-retry"] == "false"


def test_a_connection_to_an_api_is_reused(api_app: Client, api: Api) -> None:
    ports = set()

    def act(handler: ApiHandler) -> None:
        ports.add(handler.client_address)
        api_answers("x")(handler)

    api.always = act
    for _ in range(16):
        assert answer_text(chat(api_app, model="local/k2")) == "x"
    assert len(ports) <= 8, "a chat may start while the previous connection is still drained"


def web_chat_echoes(before: bytes = b"", after: bytes = b"") -> Act:
    """Return an act that answers with the question, with these bytes before and after the response."""

    def act(handler: WebChatHandler) -> None:
        body = json.dumps({"success": True, "data": {"message": handler.form["message"]}}).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        handler.wfile.write(before + head + body + after)
        handler.wfile.flush()

    return act


EARLY_HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n"


@pytest.mark.parametrize(
    "interim",
    [
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n", id="100"),
        pytest.param(b"HTTP/1.1 102 Processing\r\n\r\n" * 3, id="102 three times"),
        pytest.param(EARLY_HINTS, id="103"),
        pytest.param(b"HTTP/1.1 199 What\r\n\r\n" + EARLY_HINTS, id="an unknown one, then 103"),
    ],
)
def test_interim_responses_are_skipped(app: Client, kimi: WebChat, interim: bytes) -> None:
    kimi.always = web_chat_echoes(before=interim)
    for question in ("one", "two", "three"):
        assert answer_text(chat(app, question)) == question


def test_early_hints_of_an_api_mix_up_no_answers(api_app: Client, api: Api) -> None:
    def act(handler: ApiHandler) -> None:
        handler.wfile.write(EARLY_HINTS)
        api_answers(json.loads(handler.body)["messages"][-1]["content"])(handler)

    api.always = act
    for question in ("one", "two", "three"):
        assert answer_text(chat(api_app, question, model="local/k2")) == question


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", id="101"),
        pytest.param(EARLY_HINTS * 100, id="interim answers without end"),
    ],
)
def test_endless_interim_responses_are_an_error(app: Client, kimi: WebChat, head: bytes) -> None:
    kimi.always = sends_raw(head)
    assert_error(chat(app), 502, "upstream_unavailable")
    kimi.always = web_chat_answers
    assert answer_text(chat(app))


def test_bytes_after_a_response_are_no_answer(app: Client, kimi: WebChat) -> None:
    stray = json.dumps({"success": True, "data": {"message": "stray"}}).encode()
    answered = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(stray) + stray
    kimi.always = web_chat_echoes(after=answered)
    for question in ("one", "two", "three"):
        assert answer_text(chat(app, question)) == question


def test_bytes_after_a_response_in_one_tls_record_are_no_answer(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = self_signed(tmp_path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    api.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    api.tls.load_cert_chain(certificate, key)

    def whole(text: str, size: int = 0) -> bytes:
        body = as_events(api_chunk({"content": text}), api_chunk({}, "stop"))
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX: %s\r\nContent-Length: %d\r\n\r\n"
        padding = b"" if not size else b"x" * (size - len(head % (b"", len(body))) - len(body))
        return head % (padding, len(body)) + body

    def act(handler: ApiHandler) -> None:
        question = json.loads(handler.body)["messages"][-1]["content"]
        handler.wfile.write(whole(question, 8192) + whole("stray"))
        handler.wfile.flush()

    api.always = act
    app = make_app(**{**api_settings, "LOCAL_BASE_URL": f"https://localhost:{api.port}/v1"})
    for question in ("one", "two", "three"):
        assert answer_text(chat(app, question, model="local/k2")) == question


def test_a_late_stray_response_mixes_up_no_answers(
    make_app: MakeApp, api_settings: dict[str, str], api: Api
) -> None:
    def act(handler: ApiHandler) -> None:
        question = json.loads(handler.body)["messages"][-1]["content"]
        if question == "two":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray")
            handler.wfile.flush()
            time.sleep(0.2)  # until the stray response has been read, so that another chat could get its connection
        api_answers(question)(handler)

    api.always = act
    app = make_app(**api_settings, MAX_RETRIES="0")
    assert answer_text(chat(app, "one", model="local/k2")) == "one"
    assert_error(chat(app, "two", model="local/k2"), 502, "upstream_unavailable")
    for question in ("three", "four"):
        assert answer_text(chat(app, question, model="local/k2")) == question


def test_an_unusable_answer_closes_the_web_chats_connection(make_app: MakeApp, kimi: WebChat) -> None:
    links = []

    def noting(act: Act) -> Act:
        def acts(handler: WebChatHandler) -> None:
            links.append(handler.client_address)
            act(handler)

        return acts

    app = make_app(MAX_RETRIES="0")
    kimi.script.extend(map(noting, [web_chat_answers, web_chat_answers, sends(200, "?"), web_chat_answers]))
    assert [chat(app).status_int for _ in range(4)] == [200, 200, 502, 200]
    assert links[0] == links[1] == links[2] != links[3]


@contextmanager
def full_backlog() -> Iterator[int]:
    """Yield a port whose backlog is full, so that connecting hangs."""
    with ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = sockets.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def test_connecting_has_a_timeout_of_its_own(
    make_app: MakeApp, api_settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kimi2api, "CONNECT_TIMEOUT", 0.3)
    with full_backlog() as port:
        response = chat(make_app(**{**api_settings, "LOCAL_BASE_URL": f"http://127.0.0.1:{port}/v1"}), model="local/k2")
        assert_error(response, 504, "upstream_timeout")
        assert "within 60 s" not in response.text


@pytest.mark.parametrize("proxied", [False, True], ids=["straight", "through a proxy"])
def test_a_slow_tls_handshake_succeeds(
    make_app: MakeApp,
    api_settings: dict[str, str],
    api: Api,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    proxied: bool,
) -> None:
    certificate, key = self_signed(tmp_path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    monkeypatch.setattr(kimi2api, "CLIENT_CHECK_INTERVAL", 0.1)
    if proxied:  # no proxy is used for loopback
        monkeypatch.setattr(kimi2api, "is_loopback", lambda host: False)
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{api.port}")

    def serve_tls(handler: ApiHandler) -> None:
        time.sleep(0.3)  # longer than a slice of a wait
        with tls.wrap_socket(handler.connection, server_side=True) as link:
            request = link.recv(65536)
            while not request.endswith(b"}"):
                request += link.recv(65536)
            body = as_events(api_chunk({"content": "Hi"}), api_chunk({}, "stop"))
            head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(body)
            link.sendall(head + body)

    class Handler(StandInHandler):
        def handle(self) -> None:
            if proxied:
                assert self.rfile.readline().startswith(b"CONNECT localhost:")
                while self.rfile.readline().strip():
                    pass
                self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                self.wfile.flush()
            serve_tls(self)

    api.handler = Handler
    app = make_app(**{**api_settings, "LOCAL_BASE_URL": f"https://localhost:{api.port}/v1", "API_MASTER_KEY": "sk"})
    assert answer_text(chat(app, model="local/k2", headers={"Authorization": "Bearer sk"})) == "Hi"


def test_an_endless_tls_handshake_times_out(
    make_app: MakeApp, api_settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kimi2api, "CONNECT_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}/v1"
        assert_error(
            chat(make_app(**{**api_settings, "LOCAL_BASE_URL": url}), model="local/k2"), 504, "upstream_timeout"
        )


def test_a_request_that_upstream_does_not_read_times_out(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # takes connections and never reads
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/v1"
        app = make_app(**{**api_settings, "LOCAL_BASE_URL": url}, REQUEST_TIMEOUT="0.3", MAX_BODY_BYTES="99999999")
        began = time.monotonic()
        response = chat(app, "x" * 20_000_000, model="local/k2")
        assert_error(response, 504, "upstream_timeout")
        assert response.headers["x-should-retry"] == "false"
        assert time.monotonic() - began < PATIENCE


def test_under_stress_every_client_receives_its_own_answer(
    start_program: StartProgram, api_settings: dict[str, str], api: Api, kimi: WebChat
) -> None:
    """Interim answers, resets, cut bodies, stray bytes and clients that leave, over one pool of connections."""
    chance = random.Random(7)
    junk = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray"

    def act(handler: ApiHandler) -> None:
        question = json.loads(handler.body)["messages"][-1]["content"]
        kind = chance.randrange(7)
        if kind == 0:
            return resets(handler)
        if kind == 1:
            handler.wfile.write(EARLY_HINTS)
        handler.begin_stream()
        handler.event(api_chunk({"role": "assistant", "content": ""}))
        for part in question.split():
            handler.event(api_chunk({"content": part + " "}))
            handler.server.gate.wait(0.01)
            if kind == 2:
                handler.close_connection = True
                return None
        handler.event(api_chunk({}, "stop"))
        handler.event(b"[DONE]")
        if kind == 3:  # the body is not ended
            handler.server.gate.wait(0.05)
            return None
        handler.end()
        if kind == 4:
            handler.wfile.write(junk)
            handler.wfile.flush()
        return None

    api.always = act
    program = start_program(**api_settings, MAX_RETRIES="2")
    whole = 0

    def ask(number: int) -> bool:
        question = f"question {number} of many"
        if number % 5 == 0:
            link = program.open_chat(question, model="local/k2", stream=True)
            read_until(link, b"\r\n\r\n")
            link.close()
            return False
        status, body = program.chat(question, model="local/k2", stream=bool(number % 2))
        text = body.decode()
        if number % 2 and status == 200:
            text = streamed_text([event for event in sse_events(body) if "error" not in event])
        assert "stray" not in text
        assert not re.findall(rf"question (?!{number} )\d+", text), text
        return status == 200 and question in text

    with ThreadPoolExecutor(12) as pool:
        whole = sum(pool.map(ask, range(160)))
    assert whole > 40
    wait_for(lambda: program.running() == 0)


def test_keepalives_are_sent_while_the_request_goes_upstream(
    start_program: StartProgram, api_settings: dict[str, str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # takes connections and never reads
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/v1"
        program = start_program(
            **{**api_settings, "LOCAL_BASE_URL": url}, SSE_KEEPALIVE="0.1", MAX_BODY_BYTES="99999999"
        )
        with program.open_chat("x" * 20_000_000, model="local/k2", stream=True) as link:
            assert read_until(link, b": keep-alive\n\n", 3)
        wait_for(lambda: program.running() == 0, "the client has disconnected")


def test_a_complete_answer_is_remembered_if_the_client_disconnects(
    start_program: StartProgram, api_settings: dict[str, str], api: Api
) -> None:
    def act(handler: ApiHandler) -> None:
        handler.begin_stream()
        handler.event(api_chunk({"content": "All of it."}))
        handler.event(api_chunk({}, "stop"))
        handler.server.gate.wait(PATIENCE)  # usage and [DONE] are still to come

    api.always = act
    program = start_program(**api_settings)
    with program.open_chat(model="local/k2", stream=True, user="ann") as link:
        read_until(link, b"All of it.")
    wait_for(lambda: program.running() == 0)
    assert b"All of it." in program.ask("GET", "/v1/sessions/ann")[1]


def test_no_retry_is_made_for_a_disconnected_client(
    start_program: StartProgram, api_settings: dict[str, str], api: Api
) -> None:
    api.always = api_sends(429, {"error": {"message": "slow down"}}, retry_after_ms="300")
    program = start_program(before=CHECKS_OFTEN, **api_settings)
    link = program.open_chat(model="local/k2")
    wait_for(lambda: api.asked)
    link.close()
    wait_for(lambda: program.running() == 0)
    time.sleep(0.4)  # longer than the pause before a retry
    assert len(api.asked) == 1


def test_no_question_is_sent_for_a_disconnected_client(start_program: StartProgram, kimi: WebChat) -> None:
    kimi.page_script.append(at_the_gate(serves_page))
    program = start_program(before=CHECKS_OFTEN)
    with program.open_chat("given up"):
        wait_for(lambda: kimi.pages)
    wait_for(lambda: program.running() == 0)
    kimi.gate.set()
    assert program.chat("wanted")[0] == 200
    time.sleep(0.2)
    assert [form["message"] for form in kimi.posts] == ["wanted"]


def test_proxies_of_the_environment_are_honoured(kimi: WebChat, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = WebChat()  # it answers requests for absolute URLs as the site would
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
    elsewhere = {"UPSTREAM_URL": "http://kimi.example/ajax", "CHAT_PAGE_URL": "http://kimi.example/"}
    try:
        assert answer_text(chat(Client(kimi2api.create_app(kimi2api.Settings.load(elsewhere)))))
        assert len(proxy.posts) == 1
        assert answer_text(chat(Client(kimi2api.create_app(kimi2api.Settings.load(kimi.settings)))))
        assert len(proxy.posts) == 1, "no proxy is used for loopback"
    finally:
        proxy.stop()


class ProxyHandler(StandInHandler):
    def do_CONNECT(self) -> None:
        self.server.heads.append(dict(self.headers))
        near = self.connection
        self.raw(b"HTTP/1.1 200 Connection established\r\n\r\n")
        tunnel(near, self.server.target)


def tunnel(near: Any, port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as far:
        other = {near: far, far: near}
        while True:
            is_decrypted = isinstance(near, ssl.SSLSocket) and near.pending()
            for link in [near] if is_decrypted else select.select([near, far], [], [])[0]:
                data = link.recv(65536)
                if not data:
                    return
                other[link].sendall(data)


class SocksHandler(StandInHandler):
    """SOCKS 5 with a user and a password (RFC 1928, 1929) for hosts by name."""

    def handle(self) -> None:
        link = self.connection
        link.recv(2 + link.recv(2, socket.MSG_PEEK)[1], socket.MSG_WAITALL)
        link.sendall(b"\x05\x02")
        user = self.text(link.recv(2, socket.MSG_WAITALL)[1:])
        self.server.heads.append({"user": user, "password": self.text(link.recv(1))})
        link.sendall(b"\x01\x00")
        assert link.recv(4, socket.MSG_WAITALL) == b"\x05\x01\x00\x03"
        self.server.heads[-1]["host"] = self.text(link.recv(1))
        link.recv(2, socket.MSG_WAITALL)
        link.sendall(b"\x05\x00\x00\x01" + bytes(6))
        tunnel(link, self.server.target)

    def text(self, length: bytes) -> str:
        return self.connection.recv(length[0], socket.MSG_WAITALL).decode()


class Proxy(StandIn):
    """A proxy whose tunnels all end at one port."""

    def __init__(self, target: int, handler: type[StandInHandler] = ProxyHandler) -> None:
        self.target = target
        self.handler = handler
        self.heads: list[dict[str, str]] = []  # of each tunnel
        super().__init__()


@pytest.mark.parametrize("scheme", ["http", "https", "socks5h"])
def test_chats_of_an_https_api_go_through_a_proxy(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, scheme: str
) -> None:
    if scheme == "socks5h":
        pytest.importorskip("socks", reason="the package PySocks is not installed")
    caplog.set_level(logging.DEBUG)
    certificate, key = self_signed(tmp_path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    api.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    api.tls.load_cert_chain(certificate, key)
    proxy = Proxy(api.port, SocksHandler if scheme == "socks5h" else ProxyHandler)
    proxy.tls = api.tls if scheme == "https" else None
    name = "ALL_PROXY" if scheme == "socks5h" else "HTTPS_PROXY"
    monkeypatch.setenv(name, f"{scheme}://me:s3cret@localhost:{proxy.port}")
    app = make_app(**{**api_settings, "LOCAL_BASE_URL": "https://api.example/v1"}, MAX_RETRIES="0")
    try:
        for _ in range(3):
            assert answer_text(chat(app, model="local/k2")) == "Hi from the API."
            assert streamed_text(sse_events(chat(app, model="local/k2", stream=True))) == "Hi from the API."
        assert scheme == "https" or len(proxy.heads) < 6, "tunnels are reused"
        if scheme == "socks5h":
            assert proxy.heads[0] == {"user": "me", "password": "s3cret", "host": "api.example"}
        else:
            assert {head["Proxy-Authorization"] for head in proxy.heads} == {"Basic bWU6czNjcmV0"}
        api.always = api_streams_words
        for stream in (False, True):
            api.words_sent = 0
            api.hung_up.clear()
            question = {"model": "local/k2", "stream": stream, "messages": [{"role": "user", "content": "x"}]}
            leaves = {"waitress.client_disconnected": lambda: api.words_sent > 3}
            app.post_json("/v1/chat/completions", question, extra_environ=leaves)
            assert api.hung_up.wait(PATIENCE)
        api.always = api_answers("fine")
        assert answer_text(chat(app, model="local/k2")) == "fine"
    finally:
        proxy.stop()
    for path in ("/health", "/v1/models"):
        assert "s3cret" not in app.get(path).text
    assert_error(chat(app, model="local/k2"), 502, "upstream_unavailable")
    assert "s3cret" not in caplog.text


def assert_proxy_is_named(text: str) -> None:
    """Assert that a text says how to use a proxy, and shows no credentials and no traceback."""
    assert all(word in text for word in ("ALL_PROXY", "socks5h://", "pip install")), text
    assert not re.search("s3c|ret@|Traceback", text)


@pytest.mark.parametrize("proxy", ["socks://me:s3cret@localhost:9", "ftp://me:s3c@ret@localhost"])
def test_an_unusable_proxy_is_named(
    make_app: MakeApp,
    api_settings: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    proxy: str,
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    app = make_app(**{**api_settings, "LOCAL_BASE_URL": "https://api.example/v1", "CHAT_PAGE_URL": "https://api.example/"})
    for model in ("kimi", "local/k2"):
        refused = chat(app, model=model)
        assert_error(refused, 502, "upstream_unavailable")
        assert_proxy_is_named(refused.text + app.get("/health").text + caplog.text)


def test_a_socks_proxy_without_its_package_is_reported() -> None:
    without = "import sys; sys.modules['socks'] = None; import kimi2api; sys.exit(kimi2api.main(['--check']))"
    proxy = {"ALL_PROXY": "socks5h://me:s3cret@localhost:9", "CHAT_PAGE_URL": "https://api.example/"}
    done = subprocess.run(
        [sys.executable, "-c", without], env={**os.environ, **COMPILED_ONCE, **proxy},
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 1
    assert_proxy_is_named(done.stdout + done.stderr)


def test_credentials_in_addresses_are_sent_and_never_shown(
    make_app: MakeApp, kimi: WebChat, api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    sites = {name: value.replace("://", "://me:s3%2Fcret@") for name, value in kimi.settings.items()}
    settings = {**sites, "PROVIDERS": "local", "LOCAL_BASE_URL": api.url.replace("://", "://me:s3%2Fcret@")}
    app = make_app(**settings, MAX_RETRIES="0")
    assert answer_text(chat(app)) and answer_text(chat(app, model="local/k2"))
    for headers in (kimi.pages[0], kimi.heads[0], api.asked[0][1]):
        assert headers["Authorization"] == "Basic " + b64encode(b"me:s3/cret").decode()
        assert "s3" not in str(headers).replace(headers["Authorization"], "")
    shown = [app.get(path).text for path in ("/health", "/v1/models", "/metrics", "/openapi.json")]
    for act in (resets, sends(403, JUST_A_MOMENT), sends(500), sends(302, Location="/")):
        kimi.always = api.always = act
        shown += [chat(app, model=model).text for model in ("kimi", "local/k2")]
        shown.append(app.get("/health").text)
    done = run_program("--check", **settings, LOG_LEVEL="DEBUG")
    assert not re.search("s3|me:", "".join([*shown, caplog.text, done.stdout, done.stderr]))


def test_idle_connections_are_replaced_and_all_have_tcp_keepalive(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, clock: Clock
) -> None:
    links = []

    def act(handler: ApiHandler) -> None:
        links.append(handler.client_address)
        if len(links) == 2 and links[0] == links[1]:
            handler.server.gate.wait(PATIENCE)  # like a connection that a NAT has dropped
        api_answers("x")(handler)

    api.always = act
    app = make_app(**api_settings, REQUEST_TIMEOUT="1")
    assert answer_text(chat(app, model="local/k2"))
    transports = [thing for thing in gc.get_objects() if type(thing) is kimi2api.Transport]
    [pool] = [each._pools[api.url.replace("/v1", "/")] for each in transports if str(api.port) in str(each._pools)]
    wait_for(lambda: pool.pool.queue[-1])
    assert pool.pool.queue[-1].sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    clock.now += kimi2api.MAX_IDLE + 1
    assert answer_text(chat(app, model="local/k2")) and links[0] != links[1]
    assert answer_text(chat(app, model="local/k2")) and links[1] == links[2]


def test_https_certificates_are_verified(
    kimi: WebChat, tmp_path: Path, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = self_signed(tmp_path)
    kimi.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    kimi.tls.load_cert_chain(certificate, key)
    urls = {name: value.replace("http://127.0.0.1", "https://localhost") for name, value in kimi.settings.items()}
    assert_error(chat(make_app(**urls)), 502, "upstream_unavailable")  # the certificate is self-signed
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    assert answer_text(chat(make_app(**urls)))


def test_a_client_that_disconnects_closes_the_apis_connection(
    start_program: StartProgram, api_settings: dict[str, str], api: Api
) -> None:
    begun = False

    def act(handler: ApiHandler) -> None:
        if begun:
            handler.begin_stream()
            handler.event(api_chunk({"content": "one"}))
        handler.connection.settimeout(PATIENCE)
        if handler.connection.recv(1) == b"":
            api.hung_up.set()
        handler.close_connection = True

    program = start_program(before=CHECKS_OFTEN, **api_settings)
    for begun, stream in itertools.product((False, True), (False, True)):
        api.always = act
        api.asked.clear()
        api.hung_up.clear()
        with program.open_chat(model="local/k2", stream=stream) as link:
            wait_for(lambda: api.asked)
            if begun and stream:
                read_until(link, b"one")
        assert api.hung_up.wait(PATIENCE)
        wait_for(lambda: program.running() == 0)
        assert len(api.asked) == 1, "an abandoned call is not retried"
        api.always = api_answers("fine")
        assert b"fine" in program.chat(model="local/k2")[1]


def test_concurrent_first_requests_to_two_spellings_of_a_host_succeed(make_app: MakeApp, kimi: WebChat) -> None:
    page = kimi.settings["CHAT_PAGE_URL"].replace("127.0.0.1", "LOCALHOST")
    upstream = kimi.settings["UPSTREAM_URL"].replace("127.0.0.1", "localhost")
    for _ in range(3):
        app = make_app(CHAT_PAGE_URL=page, UPSTREAM_URL=upstream)
        with ThreadPoolExecutor(16) as pool:
            assert all(answer_text(done) for done in pool.map(lambda _, app=app: chat(app), range(16)))


########################################################################################################################
# Part 6: Upstreams
########################################################################################################################


# ----------------------------------------------------------------------------------------------------------------------
# Circuit breaker, providers
# ----------------------------------------------------------------------------------------------------------------------


def test_a_successful_retry_hides_the_failure(app: Client, kimi: WebChat) -> None:
    kimi.script.append(resets)
    assert answer_text(chat(app)) == "Hello from upstream." and len(kimi.posts) == 2


@pytest.mark.parametrize(
    ("header", "passed_on"),
    [
        pytest.param(lambda: "77", "77", id="seconds"),
        pytest.param(lambda: formatdate(time.time() + 77.5, usegmt=True), "7[678]", id="date"),
        pytest.param(lambda: "-3", "none", id="negative"),
    ],
)
def test_the_client_receives_retry_after(app: Client, kimi: WebChat, header: Callable[[], str], passed_on: str) -> None:
    kimi.script.append(sends(429, "", Retry_After=header()))
    response = chat(app)
    assert_error(response, 429, "upstream_rate_limited", "rate_limit_error")
    assert re.fullmatch(passed_on, response.headers.get("Retry-After", "none"))


def test_an_open_circuit_allows_one_probe_at_a_time(make_app: MakeApp, kimi: WebChat) -> None:
    app = make_app(MAX_RETRIES="0")
    kimi.always = sends(500)
    for _ in range(5):
        assert_error(chat(app), 502, "upstream_unavailable")
    response = chat(app)
    assert_error(response, 502, "upstream_unavailable")
    assert "after 5 failures" in response.json["error"]["message"]
    assert int(response.headers["Retry-After"]) >= 1
    assert len(kimi.posts) == 5, "it failed fast, without a call"
    health = app.get("/health").json
    assert health["status"] == "degraded" and health["upstreams"]["kimi"]["failing_since"] <= time.time()
    wait_for(lambda: chat(app) and len(kimi.posts) == 6, "a probe after the pause")
    began = time.monotonic()
    wait_for(lambda: chat(app) and len(kimi.posts) == 7, "the next probe")
    assert time.monotonic() - began > 0.25, "the pause has grown from 0.2 s to 0.4 s"
    kimi.always = web_chat_answers_at_the_gate
    with ThreadPoolExecutor(1) as pool:

        def trial_begins() -> Any:
            future = pool.submit(chat, app)
            wait_for(lambda: future.done() or len(kimi.posts) == 8)
            return None if future.done() else future

        trial = wait_for(trial_begins, "a third probe, which waits at the gate")
        for _ in range(5):
            assert_error(chat(app), 502, "upstream_unavailable")
        assert len(kimi.posts) == 8, "there is only one probe"
        kimi.gate.set()
        assert answer_text(trial.result())
    assert answer_text(chat(app)) and app.get("/health").json["status"] == "ok"


def test_hanging_calls_do_not_all_become_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(kimi2api.time, "monotonic", lambda: now)
    breaker = kimi2api.CircuitBreaker("kimi")
    for _ in range(5):
        breaker.allow()
        breaker.record_end(kimi2api.upstream_error(504, "upstream_timeout", "hangs"))
    probes = 0
    for _ in range(600):
        now += 0.1
        with suppress(kimi2api.APIError):
            breaker.allow()
            probes += 1
    assert 3 <= probes <= 6, "in the minute until the first probe times out"


def test_a_long_probe_does_not_block_the_next_one(
    start_program: StartProgram, api_settings: dict[str, str], api: Api
) -> None:
    program = start_program("--max-retries", "0", before="kimi2api.FIRST_PAUSE = 0.05", **api_settings)
    api.always = api_sends(500, {"error": {"message": "down"}})
    for _ in range(5):
        assert program.chat(model="local/k2")[0] == 500
    api.always = api_streams_words
    probe = wait_for(lambda: open_stream(program), "the circuit is half-open")
    api.always = api_answers("fine")
    wait_for(lambda: b"fine" in program.chat(model="local/k2")[1], "the next probe")
    probe.close()


def open_stream(program: Program) -> socket.socket | None:
    link = program.open_chat(model="local/k2", stream=True)
    if link.recv(65536).startswith(b"HTTP/1.1 200"):
        return link
    link.close()
    return None


def test_refusals_and_rate_limits_do_not_open_the_circuit(make_app: MakeApp, kimi: WebChat) -> None:
    app = make_app(MAX_RETRIES="0")
    wants_json = {"response_format": {"type": "json_object"}}
    for act, request, code in (
        (sends(429), {}, "upstream_rate_limited"),
        (sends(403, "-1"), {}, "upstream_refused"),
        (web_chat_says("no JSON"), wants_json, "invalid_json_answer"),
    ):
        kimi.always = act
        for _ in range(7):
            posts = len(kimi.posts)
            assert chat(app, **request).json["error"]["code"] == code and len(kimi.posts) > posts


def test_our_own_bug_does_not_open_the_circuit_or_show_the_prompt(
    app: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lookup(*_: Any, **__: Any) -> Any:
        return {}["my prompt"]

    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", lookup)  # a call of upstream starts with it
        for _ in range(7):
            response = chat(app, "my prompt")
            assert_error(response, 500, "internal_error", "server_error")
            assert "my prompt" not in response.text
    assert app.get("/health").json["status"] == "ok"
    assert answer_text(chat(app))


# ----------------------------------------------------------------------------------------------------------------------
# Web chat: prompts
# ----------------------------------------------------------------------------------------------------------------------


def test_system_messages_are_sent_and_not_remembered(app: Client, kimi: WebChat) -> None:
    messages = [
        {"role": "system", "content": "S."},
        {"role": "user", "content": "u"},
        {"role": "developer", "content": "D."},
    ]
    chat(app, messages=messages, user="ada")
    assert kimi.posts[-1]["message"] == "S.\nD.\n\n用户: u"
    chat(app, "v", user="ada")
    assert "S." not in kimi.posts[-1]["message"]


def test_the_prompt_drops_the_oldest_turns_and_the_session_keeps_them(make_app: MakeApp, kimi: WebChat) -> None:
    app = make_app(CONTEXT_MAX_LENGTH="100")
    kimi.answer = "ok"
    for number in range(6):
        question = {"role": "user", "content": f"question {number} " + "x" * 15}
        chat(app, messages=[{"role": "system", "content": "Rule."}, question], user="ada")
    prompt = kimi.posts[-1]["message"]
    assert len(prompt) <= 100 and prompt.startswith("Rule.\n\n用户: question 4") and "question 5" in prompt
    assert len(app.get("/v1/sessions/ada").json["turns"]) == 6


def test_a_newest_message_that_cannot_fit_returns_400(make_app: MakeApp, kimi: WebChat) -> None:
    app = make_app(CONTEXT_MAX_LENGTH="50")
    assert answer_text(chat(app, "x" * 50))
    assert_error(chat(app, "x" * 51), 400, "context_length_exceeded", param="messages")
    both = [{"role": "system", "content": "s" * 30}, {"role": "user", "content": "u" * 30}]
    assert_error(chat(app, messages=both), 400, "context_length_exceeded")
    assert len(kimi.posts) == 1


def test_context_length_exceeded_uses_words_that_clients_match(make_app: MakeApp) -> None:
    app = make_app(CONTEXT_MAX_LENGTH="500")
    both = [{"role": "system", "content": "s" * 100}, {"role": "user", "content": "u" * 600}]
    message = chat(app, messages=both).json["error"]["message"]
    assert message.startswith("This model's maximum context length is 500 characters (CONTEXT_MAX_LENGTH). ")
    assert "Your messages have 704: system 100, newest message 604. Please reduce the length" in message
    assert "FALLBACK_MODELS" in message
    response = chat(app, "u" * 300, tools=[tool("f", "d" * 400)], tool_choice="required", response_format=JSON_OBJECT)
    assert_error(response, 400, "context_length_exceeded")
    assert re.search(r": tools \d+, response format \d+, newest message \d+\.", response.json["error"]["message"])


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_only_allowed_tools_are_offered(app: Client, kimi: WebChat, mode: str) -> None:
    kimi.answer = '<tool_call>{"name": "clock"}</tool_call>'
    allowed = {"mode": mode, "tools": [{"type": "function", "function": {"name": "clock"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    assert tool_calls(chat(app, tools=[WEATHER, CLOCK], tool_choice=choice)) == [("clock", {})]
    prompt = kimi.posts[-1]["message"]
    assert "- clock" in prompt and "get_weather" not in prompt
    assert ("You must call" in prompt) == (mode == "required")
    choice["allowed_tools"] = {"mode": mode, "tools": [{}]}
    response = chat(app, tools=[CLOCK], tool_choice=choice)
    assert_error(response, 400, None, param="tool_choice.allowed_tools.tools[0].function")


def test_an_api_receives_allowed_tools_that_are_no_functions(api_app: Client, api: Api) -> None:
    allowed = {"mode": "required", "tools": [{"type": "mcp", "server_label": "x"}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    tools = [CLOCK, {"type": "mcp", "server_label": "x"}]
    assert answer_text(chat(api_app, model="local/k2", tools=tools, tool_choice=choice))
    assert api.asked[0][2]["tool_choice"] == choice


MANY_TOOLS = [tool(f"tool_{number}", "What it does. " * (50 if number == 1 else 10)) for number in range(28)]


@json_and_stream
def test_tools_that_do_not_fit_are_dropped_and_counted_in_a_header(
    app: Client, kimi: WebChat, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    response = chat(app, "What time is it?", tools=MANY_TOOLS, tool_choice="auto", stream=stream)
    assert response.status_int == 200
    prompt = kimi.posts[-1]["message"]
    offered = re.findall(r"^- (tool_\d+)", prompt, re.M)
    assert offered[:2] == ["tool_0", "tool_2"], "tools keep their order, and one that is too long is skipped"
    assert response.headers["X-Kimi2api-Tools-Dropped"] == str(28 - len(offered))
    assert f"{28 - len(offered)} of 28 tools" in caplog.text
    assert len(prompt) <= 1000 and prompt.endswith("用户: What time is it?")
    assert "X-Kimi2api-Tools-Dropped" not in chat(app, tools=[CLOCK]).headers


def test_tools_leave_room_for_the_previous_turn(app: Client, kimi: WebChat) -> None:
    answer_text(chat(app, "My name is Ada.", user="ada"))
    answer_text(chat(app, "What is my name?", user="ada", tools=MANY_TOOLS))
    prompt = kimi.posts[-1]["message"]
    assert "My name is Ada." in prompt and "- tool_0" in prompt and len(prompt) <= 1000


def test_a_long_turn_and_a_long_tool_do_not_displace_the_rest(app: Client, kimi: WebChat) -> None:
    answer_text(chat(app, "First: " + "a" * 400, user="ada"))
    answer_text(chat(app, "My name is Ada.", user="ada"))
    chat(app, "What is my name?", user="ada", tools=[tool("long", "x " * 200), CLOCK])
    prompt = kimi.posts[-1]["message"]
    assert "My name is Ada." in prompt and "First" in prompt and "- clock" in prompt and "- long" not in prompt
    chat(app, "What is my name?", user="ada", tools=[*MANY_TOOLS, CLOCK])
    prompt = kimi.posts[-1]["message"]
    assert "My name is Ada." in prompt and "First" not in prompt and "- tool_0" in prompt


def test_required_tools_that_do_not_fit_return_400(app: Client) -> None:
    assert_error(chat(app, tools=MANY_TOOLS, tool_choice="required"), 400, "context_length_exceeded")


def test_a_question_that_leaves_no_room_for_tools_is_sent_without(app: Client, kimi: WebChat) -> None:
    response = chat(app, "x" * 980, tools=MANY_TOOLS)
    assert response.headers["X-Kimi2api-Tools-Dropped"] == "28" and kimi.posts[-1]["message"] == "用户: " + "x" * 980


@pytest.mark.parametrize("limit", range(200, 240, 5))
def test_no_prompt_is_longer_than_the_limit(make_app: MakeApp, kimi: WebChat, limit: int) -> None:
    assert chat(make_app(CONTEXT_MAX_LENGTH=str(limit)), "x" * 20, tools=[CLOCK, WEATHER]).status_int == 200
    assert len(kimi.posts[-1]["message"]) <= limit


def agent_messages(*results: str) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "The question."}]
    for number, result in enumerate(results):
        call = {"id": f"c{number}", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
        messages.append({"role": "assistant", "content": f"Step {number}.", "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": f"c{number}", "content": result})
    return messages


def test_older_tool_rounds_are_dropped_before_the_question_and_the_last(app: Client, kimi: WebChat) -> None:
    history = [{"role": "user", "content": "Before."}, {"role": "assistant", "content": "Yes."}]
    messages = [*history, *agent_messages(*(f"result {number} " + "x" * 200 for number in range(6)))]
    assert chat(app, messages=messages, tools=[CLOCK]).status_int == 200
    prompt = kimi.posts[-1]["message"]
    assert len(prompt) <= 1000 and "用户: The question." in prompt and "- clock" in prompt
    assert re.findall(r"result (\d)", prompt) == ["4", "5"] and "Before." not in prompt


def test_a_long_tool_result_of_the_last_round_is_clipped(app: Client, kimi: WebChat) -> None:
    long = "begin " + "x" * 5000 + " end"
    assert chat(app, messages=agent_messages("older", long), tools=MANY_TOOLS).status_int == 200
    prompt = kimi.posts[-1]["message"]
    assert len(prompt) <= 1000 and "用户: The question." in prompt and "[… clipped …]" in prompt
    assert "begin x" in prompt and prompt.endswith("x end") and "- tool_0" in prompt
    two = agent_messages("short one", "y" * 900)
    two.append({"role": "tool", "tool_call_id": "c1", "content": "kept"})
    assert chat(app, messages=two).status_int == 200
    assert kimi.posts[-1]["message"].endswith("y\n工具 clock: kept"), "the longest result is clipped first"


@pytest.mark.parametrize(
    ("request_", "content", "finish_reason"),
    [
        pytest.param({"stop": "STOP"}, "one two ", "stop", id="stop"),
        pytest.param({"stop": ["zzz", "two", "STOP"]}, "one ", "stop", id="first of three stops"),
        pytest.param({"stop": []}, None, "stop", id="no stops"),
        pytest.param({"stop": ""}, None, "stop", id="empty stop"),
        pytest.param({"stop": "one"}, "", "stop", id="stop at the beginning"),
        pytest.param({"max_tokens": 2}, "one two ", "length", id="max_tokens"),
        pytest.param({"max_completion_tokens": 1}, "one ", "length", id="max_completion_tokens"),
        pytest.param({"max_tokens": 999}, None, "stop", id="max_tokens beyond the end"),
        pytest.param({"stop": "three", "max_tokens": 1}, "one ", "length", id="stop and max_tokens"),
    ],
)
def test_stop_and_max_tokens_truncate_the_answer(
    app: Client, kimi: WebChat, request_: Any, content: str | None, finish_reason: str
) -> None:
    kimi.answer = "one two STOP three"
    response = chat(app, **request_)
    assert answer_text(response) == (kimi.answer if content is None else content)
    assert response.json["choices"][0]["finish_reason"] == finish_reason
    assert response.json["usage"]["completion_tokens"] <= request_.get("max_tokens", 999)
    chunks = sse_events(chat(app, stream=True, **request_))
    assert streamed_text(chunks) == (kimi.answer if content is None else content)
    assert chunks[-2]["choices"][0]["finish_reason"] == finish_reason


def test_the_prompt_describes_tools_briefly(app: Client, kimi: WebChat) -> None:
    nested = tool(
        "plan",
        days={"type": "array", "items": {"type": "object", "properties": {"n": {"type": "integer"}}}},
        x={"type": ["string", "null"]},
    )
    referring = tool("ref", a={"$ref": "#/$defs/A"})
    nil = {"type": "object", "required": None, "properties": {"b": {"type": "string", "enum": None}}}
    chat(app, tools=[WEATHER, CLOCK, nested, referring, tool("nil", a=nil)])
    message = kimi.posts[0]["message"]
    assert '- get_weather{city: string, unit?: "C"|"F"}: Weather of a city\n- clock{}\n' in message
    assert "- nil{a: {b?: string}}" in message
    assert "- plan{days: [{n?: integer}], x?: string|null}" in message and message.endswith("用户: Hello")
    assert '- ref{"type":"object","properties":{"a":{"$ref":"#/$defs/A"}}' in message and len(message) < 520


def test_tool_choice_and_parallel_tool_calls_are_obeyed(app: Client, kimi: WebChat) -> None:
    both = '<tool_call>{"name": "clock"}</tool_call><tool_call>{"name": "get_weather"}</tool_call>'
    kimi.answer = both
    assert answer_text(chat(app, tools=[WEATHER, CLOCK], tool_choice="none")) == both
    assert "clock" not in kimi.posts[-1]["message"]
    assert [name for name, _ in tool_calls(chat(app, tools=[WEATHER, CLOCK], parallel_tool_calls=False))] == ["clock"]
    assert "one tool" in kimi.posts[-1]["message"]
    kimi.script.append(web_chat_says("I would rather not."))
    assert len(tool_calls(chat(app, tools=[WEATHER, CLOCK], tool_choice="required"))) == 2
    assert "must contain a tool call" in kimi.posts[-1]["message"]
    kimi.answer = '<tool_call>{"name": "clock"}</tool_call>'
    assert tool_calls(
        chat(app, tools=[WEATHER, CLOCK], tool_choice={"type": "function", "function": {"name": "clock"}})
    )
    assert "get_weather" not in kimi.posts[-1]["message"]


def test_the_prompt_and_the_session_contain_tool_results(app: Client, kimi: WebChat) -> None:
    kimi.answer = call_text = '<tool_call>{"name": "get_weather", "arguments": {"city": "x"}}</tool_call>'
    call = chat(app, "How is it?", tools=[WEATHER], user="ada").json["choices"][0]["message"]["tool_calls"][0]
    kimi.answer = "Sunny."
    result = {"role": "tool", "tool_call_id": call["id"], "content": [{"type": "text", "text": "18 degrees"}]}
    assert answer_text(chat(app, messages=[result], tools=[WEATHER], user="ada")) == "Sunny."
    expected = f"用户: How is it?\n模型: {call_text}\n工具 get_weather: 18 degrees"
    assert kimi.posts[-1]["message"].endswith(expected)
    resent = [
        {"role": "user", "content": "How is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        result,
    ]
    assert answer_text(chat(app, messages=resent, tools=[WEATHER])) == "Sunny."
    assert kimi.posts[-1]["message"].endswith(expected)
    [turn] = app.get("/v1/sessions/ada").json["turns"]
    assert [message["role"] for message in turn] == ["user", "assistant", "tool", "assistant"], (
        "a result stays in the turn of its call"
    )


IN_PARIS = ("get_weather", {"city": "Paris"})
NATIVE = (
    "<|tool_calls_section_begin|>"
    '<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "Paris"}<|tool_call_end|>'
    "<|tool_call_begin|>functions.clock:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
    "<|tool_calls_section_end|>"
)


# ----------------------------------------------------------------------------------------------------------------------
# Web chat: reading answers
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        pytest.param(
            '<tool_call>{"name": "clock"}\n{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>',
            None,
            [("clock", {}), IN_PARIS],
            id="two calls in one pair of marks",
        ),
        pytest.param(
            '<tool_call>[{"name": "clock"}, {"name": "get_weather", "arguments": {"city": "Paris"}}]</tool_call>',
            None,
            [("clock", {}), IN_PARIS],
            id="a list of calls",
        ),
        pytest.param(
            "<|tool_call_section_begin|><|tool_call_begin|>functions.clock:0<|tool_call_end|>"
            "<|tool_call_begin|>clock<|tool_call_argument_begin|><|tool_call_end|><|tool_call_section_end|><|im_end|>",
            None,
            [("clock", {}), ("clock", {})],
            id="K2's marks, singular, without arguments",
        ),
        pytest.param(
            '<tool_call>{"name": "get_weather", "arguments": {"city": "北京"}}</tool_call>',
            None,
            [("get_weather", {"city": "北京"})],
            id="Chinese argument",
        ),
        pytest.param(
            'Let me look.\n<tool_call>\n{"name": "clock"}\n</tool_call>',
            "Let me look.",
            [("clock", {})],
            id="text in front",
        ),
        pytest.param(
            '<tool_call>{"name": "clock", "arguments": {}}</tool_call> and '
            '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>',
            "and",
            [("clock", {}), IN_PARIS],
            id="two calls, one with its arguments as text",
        ),
        pytest.param(
            '<tool_call>{"name": "get_weather", "arguments": {"city": "a </tool_call> b"}}</tool_call>',
            None,
            [("get_weather", {"city": "a </tool_call> b"})],
            id="end tag in an argument",
        ),
        pytest.param(NATIVE, None, [IN_PARIS, ("clock", {})], id="Kimi's own tokens"),
        pytest.param('{"name": "clock", "arguments": {}}', None, [("clock", {})], id="bare JSON"),
        pytest.param(
            '<tool_call>\n```json\n{"name": "get_weather", "parameters": {"city": "Paris"}}\n```\n</tool_call>',
            None,
            [IN_PARIS],
            id="fence in the tag, parameters for arguments",
        ),
        pytest.param(
            '```json\n<tool_call>{"name": "clock"}</tool_call>\n```', None, [("clock", {})], id="tag in a fence"
        ),
        pytest.param(
            '<tool_call>{"name":"get_weather","arguments":{"city":"\\ud800"}}</tool_call>',
            None,
            [("get_weather", {"city": "\ufffd"})],
            id="lone surrogate",
        ),
        pytest.param(
            '```json\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n```', None, [IN_PARIS], id="fence alone"
        ),
    ],
)
def test_tool_calls_are_parsed_in_every_form_that_kimi_writes(
    app: Client, kimi: WebChat, text: str, content: str | None, calls: Any
) -> None:
    kimi.answer = text
    response = chat(app, tools=[WEATHER, CLOCK])
    assert tool_calls(response) == calls and response.json["choices"][0]["message"]["content"] == content
    *chunks, done = sse_events(chat(app, tools=[WEATHER, CLOCK], stream=True))
    assert done == "[DONE]" and streamed_text(chunks) == (content or "")
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    deltas = [delta for chunk in chunks for delta in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert [delta["index"] for delta in deltas] == list(range(len(calls)))
    for delta, (name, arguments) in zip(deltas, calls, strict=True):
        assert delta["type"] == "function" and delta["id"] and delta["function"]["name"] == name
        assert json.loads(delta["function"]["arguments"]) == arguments


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("Nothing to call.", id="prose"),
        pytest.param('{"name": "other", "arguments": {}}', id="JSON of another name"),
        pytest.param('{"name": "clock"}', id="JSON without arguments"),
        pytest.param('Like {"name": "clock", "arguments": {}} say.', id="JSON in prose"),
        pytest.param("[1]", id="list"),
        pytest.param("```\nx\n```", id="fence of something else"),
        pytest.param('For example:\n```json\n{"name": "clock", "arguments": {}}\n```', id="example in a fence"),
    ],
)
def test_an_answer_without_a_call_stays_text(app: Client, kimi: WebChat, text: str) -> None:
    kimi.answer = text
    response = chat(app, tools=[CLOCK])
    assert answer_text(response) == text and "tool_calls" not in response.json["choices"][0]["message"]
    assert len(kimi.posts) == 1


def test_a_call_of_an_unknown_tool_is_retried_once_then_returned(app: Client, kimi: WebChat) -> None:
    kimi.answer = '<tool_call>{"name": "hammer", "arguments": {"nails": 2}}</tool_call>'
    assert tool_calls(chat(app, tools=[CLOCK])) == [("hammer", {"nails": 2})], (
        "agents report the unknown tool to the model"
    )
    assert len(kimi.posts) == 2 and "there is no tool 'hammer'" in kimi.posts[1]["message"]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('<tool_call>{"name": "clock", "arguments": {</tool_call>', id="half an object"),
        pytest.param("<tool_call>clock</tool_call>", id="no JSON"),
        pytest.param('<tool_call>{"name": "clock", "arguments": [1]}</tool_call>', id="arguments as list"),
        pytest.param("<tool_call>", id="tag alone"),
        pytest.param('<tool_call>{"name": ["clock"]}', id="name as list"),
        pytest.param('{"name": "clock", "arguments": 5}', id="arguments as number"),
        pytest.param("<tool_call>" + "[" * 100_000, id="nested 100,000 deep"),
    ],
)
def test_a_malformed_call_is_retried_once_then_returned_as_text(
    app: Client, kimi: WebChat, text: str
) -> None:
    kimi.script.extend(
        [web_chat_says(text), web_chat_says('<tool_call>{"name": "clock", "arguments": {}}</tool_call>')]
    )
    assert tool_calls(chat(app, tools=[CLOCK])) == [("clock", {})]
    first, second = (post["message"] for post in kimi.posts)
    assert "could not be used" in second and second.startswith(first.split("\n\n")[0])
    kimi.posts.clear()
    kimi.always = web_chat_says(text)
    response = chat(app, tools=[CLOCK])
    assert (
        answer_text(response) == text
        and response.json["choices"][0]["finish_reason"] == "stop"
        and len(kimi.posts) == 2
    )


@pytest.mark.parametrize("required", [True, 5, "a", None], ids=["true", "number", "text", "null"])
def test_schemas_of_older_drafts_are_accepted(app: Client, required: Any) -> None:
    parameters = {"properties": {"a": {"type": "string"}}, "required": required}
    assert answer_text(chat(app, tools=function(name="f", parameters=parameters)))


@pytest.mark.parametrize("depth", [100, 330, 400])
def test_deeply_nested_schemas_are_answered_or_refused(make_app: MakeApp, depth: int) -> None:
    deep: Any = {"type": "string"}
    for _ in range(depth):
        deep = {"type": "object", "properties": {"a": deep}}
    response = chat(make_app(CONTEXT_MAX_LENGTH="999999"), tools=function(name="f", parameters=deep))
    assert response.status_int in ((200,) if depth == 100 else (200, 400)), response.text


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize("format_", [JSON_OBJECT, json_schema(SCHEMA, name="r")], ids=["object", "schema"])
@pytest.mark.parametrize(
    "text",
    [
        pytest.param('{"a": 1}', id="bare"),
        pytest.param('<think>{} or {"a":0}?</think> {"a": 1}', id="thoughts in front"),
        pytest.param('```\nnothing\n```\n```json\n{"a": 1}\n```', id="second of two fences"),
        pytest.param('See [1] and {x}: {"a": 1}', id="brackets in front"),
        pytest.param('```json\n{"a": 1}\n```', id="fence"),
        pytest.param('Sure! Here it is:\n\n{"a": 1}\n\nAnything else?', id="prose around"),
        pytest.param('```\n{"a": 1}```', id="fence that ends on the line"),
        pytest.param('So {not json} but {"a": 1}.', id="braces in front"),
        pytest.param('By [1], [2nd]: {"a": 1} (see {x}).\n[^1]: "a"', id="footnotes around"),
    ],
)
def test_a_json_answer_is_reduced_to_its_document(app: Client, kimi: WebChat, format_: Any, text: str) -> None:
    kimi.answer = text
    assert answer_text(chat(app, response_format=format_)) == '{"a": 1}'
    assert streamed_text(sse_events(chat(app, response_format=format_, stream=True))) == '{"a": 1}'
    prompt = kimi.posts[0]["message"]
    assert "JSON" in prompt and '{"type":"object"' in prompt


def test_a_json_document_may_contain_a_fence(app: Client, kimi: WebChat) -> None:
    document = '{"code": "```py\\n{}\\n```"}'
    for text in (document, f"Sure:\n```json\n{document}\n```"):
        kimi.answer = text
        assert answer_text(chat(app, response_format=JSON_OBJECT)) == document


@pytest.mark.parametrize(
    ("root", "text", "document"),
    [
        pytest.param({"type": "array"}, "Here: [1, 2]", "[1, 2]", id="array in prose"),
        pytest.param({}, '"a"', '"a"', id="anything"),
        pytest.param({"anyOf": [{"type": "array"}]}, "[1]", "[1]", id="any of"),
        pytest.param({"type": ["array"]}, "[1]", "[1]", id="list of types"),
        pytest.param({"type": "string"}, '"a"', '"a"', id="string"),
    ],
)
def test_the_root_of_a_schema_may_be_any_type(
    app: Client, kimi: WebChat, root: Any, text: str, document: str
) -> None:
    kimi.answer = text
    assert answer_text(chat(app, response_format=json_schema(root))) == document


def test_an_answer_that_is_not_json_is_retried_once(app: Client, kimi: WebChat) -> None:
    kimi.script.extend([web_chat_says('{"a": '), web_chat_says('{"a": 2}')])
    assert answer_text(chat(app, response_format=JSON_OBJECT)) == '{"a": 2}'
    assert "could not be used" in kimi.posts[-1]["message"]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("no", id="prose"),
        pytest.param('{"a": NaN}', id="NaN"),
        pytest.param("[1]", id="list"),
        pytest.param('{"items":[{"a":1},{"a":2},]}', id="stray comma"),
        pytest.param('{"r":{"x":1},"b":"', id="cut off"),
        pytest.param("{'a': {\"b\":1}}", id="single quotes"),
        pytest.param('[{"a":1},{"a":2}]', id="list of objects"),
        pytest.param("{" * 5000, id="5,000 braces"),
        pytest.param('{"a":' * 100_000, id="nested 100,000 deep"),
        pytest.param('{"a": 1, // one\n "b": {"c": 2}}', id="comment inside"),
        pytest.param('{a: {"c": 2}}', id="bare keys"),
        pytest.param("{“a”: {\"c\": 2}}", id="typographic quotes"),
        pytest.param("{“a}”: {\"c\": 2}}", id="typographic quotes around a brace"),
        pytest.param('[1, {"a": 1}', id="number first, open outer bracket"),
        pytest.param('{"x": "}", y: {"a": 1}}', id="brace in a string of a broken document"),
        pytest.param('"b": 2}, {"a": 1}', id="start cut off"),
        pytest.param('Example: {"a": 1}\nAnswer: {"a": 2, "b": [3', id="example whole, answer cut off"),
        pytest.param('{"a": 1}\n{"a": 2, "b": 3', id="second one cut off"),
        pytest.param('{"a": 1}\n{\'b\': 2}', id="second one in single quotes"),
        pytest.param("[1st] " * 101 + '{"a": 1}', id="too many brackets"),
    ],
)
def test_an_answer_that_is_never_json_returns_502(app: Client, kimi: WebChat, text: str) -> None:
    kimi.answer = text
    response = chat(app, response_format=JSON_OBJECT)
    assert_error(response, 502, "invalid_json_answer", "upstream_error")
    assert response.headers["x-should-retry"] == "false" and len(kimi.posts) == 2


# ----------------------------------------------------------------------------------------------------------------------
# Web chat: provider
# ----------------------------------------------------------------------------------------------------------------------


def test_the_form_equals_the_form_of_the_chat_page(app: Client, kimi: WebChat) -> None:
    chat(app, "你好 & = + \0 \U0001f600", model="kimi-k2-instruct")
    form, head = kimi.posts[0], kimi.heads[0]
    assert set(form) == {"action", "nonce", "message", "model", "session_id"}
    assert form["action"] == "kimi_send_message" and form["nonce"] == kimi.nonce
    assert form["message"] == "你好 & = + \0 \U0001f600" and form["model"] == "moonshotai/Kimi-K2-Instruct"
    page_url = kimi.settings["CHAT_PAGE_URL"]
    assert head["X-Requested-With"] == "XMLHttpRequest" and head["Referer"] == page_url
    assert page_url.startswith(head["Origin"]) and head["Cookie"] == "visit=42"
    assert head["Content-Type"].startswith("application/x-www-form-urlencoded")
    assert head["User-Agent"] == kimi.pages[0]["User-Agent"] and "Chrome/" in head["User-Agent"]


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        pytest.param("n", {"n": 2}, id="n"),
        pytest.param("n", {"n": 0}, id="n of 0"),
        pytest.param("max_tokens", {"max_tokens": 0}, id="no tokens"),
        pytest.param("logprobs", {"logprobs": True}, id="logprobs"),
        pytest.param("modalities", {"modalities": ["text", "audio"]}, id="modalities"),
        pytest.param("tools[0].type", {"tools": [{"type": "custom", "custom": {}}]}, id="custom tool"),
        pytest.param("tool_choice.type", {"tool_choice": {"type": "custom", "custom": {}}}, id="custom choice"),
    ],
)
def test_parameters_that_change_the_answers_shape_return_400(
    app: Client, kimi: WebChat, field: str, request_: Any
) -> None:
    assert_error(chat(app, **request_), 400, "unsupported_value", "invalid_request_error", field)
    assert not kimi.posts


def test_unsupported_parameters_are_ignored(app: Client, kimi: WebChat) -> None:
    ignored = {
        "temperature": 0,
        "top_p": 0.5,
        "seed": 7,
        "logit_bias": {"1": 2},
        "presence_penalty": 1,
        "frequency_penalty": 1.5,
        "n": 1,
        "logprobs": False,
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "reasoning_effort": "low",
        "safety_identifier": "ada",
        "prompt_cache_key": "x",
        "modalities": ["text"],
        "tools": [],
        "response_format": {"type": "text"},
    }
    assert answer_text(chat(app, **ignored)) and answer_text(chat(app, **ignored))
    assert [post["message"] for post in kimi.posts] == ["Hello", "Hello"]


@pytest.mark.parametrize(
    "script",
    [
        pytest.param('var kimi_ajax = {"ajax_url":"x","nonce":"abc123"};', id="double quotes"),
        pytest.param("window.kimi_ajax={'nonce':'abc123' , 'z':{}}", id="single quotes"),
        pytest.param(
            'var kimi_ajax\n=\n{ "z": {"a": "}"}, "_nonce": "no", "nonce"\n:\n"abc123" }', id="lines and other nonces"
        ),
    ],
)
def test_the_nonce_is_found_in_every_spelling(app: Client, kimi: WebChat, script: str) -> None:
    kimi.nonce = "abc123"
    kimi.page_script.append(serves_page_with(f'var other = {{"nonce":"wrong"}}</script><script id="x">{script}'))
    assert answer_text(chat(app))
    assert kimi.posts[0]["nonce"] == "abc123" and len(kimi.pages) == len(kimi.posts) == 1


def test_a_stale_nonce_is_renewed_once_for_ten_waiting_chats(app: Client, kimi: WebChat) -> None:
    assert answer_text(chat(app))
    kimi.nonce = "ffffffffff"
    with ThreadPoolExecutor(10) as pool:
        assert all(answer_text(done.result()) for done in [pool.submit(chat, app) for _ in range(10)])
    assert len(kimi.pages) == 2


def test_a_failed_fetch_of_the_page_fails_all_waiting_chats(make_app: MakeApp, kimi: WebChat) -> None:
    app = make_app(MAX_RETRIES="0")
    kimi.page_script.append(at_the_gate(sends(500)))
    with ThreadPoolExecutor(5) as pool:
        chats = [pool.submit(chat, app) for _ in range(5)]
        wait_for(lambda: app.get("/health").json["chats"]["running"] == 5 and kimi.pages)
        wait_until_still()  # one chat fetches, four wait
        kimi.gate.set()
        for done in chats:
            assert_error(done.result(), 502, "upstream_unavailable")
    assert len(kimi.pages) == 1


def test_a_fetch_whose_thread_cannot_start_is_tried_by_the_next_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    cached = kimi2api.Cached("nonce", lambda: "1234", 100)

    def refuses(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuses)
        with pytest.raises(RuntimeError):
            cached.latest()
    assert cached.latest().result(PATIENCE) == "1234"


def test_a_clock_set_back_does_not_prolong_a_failure(clock: Clock, app: Client, kimi: WebChat) -> None:
    kimi.page_script.append(sends(200, "no nonce"))
    assert_error(chat(app), 502, "upstream_changed")
    clock.error = -3600
    assert answer_text(chat(app))


def test_a_clock_that_jumps_deletes_nothing_in_memory(clock: Clock, make_app: MakeApp) -> None:
    app = make_app(TOKENS_PER_DAY="1000", REQUESTS_PER_MINUTE="9")
    assert answer_text(chat(app, user="ada"))
    clock.error = 40 * 86400
    assert answer_text(chat(app))
    clock.error = 0
    assert answer_text(chat(app))
    assert app.get("/v1/usage").json["today"]["requests"] == 2 and app.get("/v1/sessions/ada").json["turns"]


def test_the_nonce_is_renewed_before_it_is_twelve_hours_old(clock: Clock, kimi: WebChat, app: Client) -> None:
    fetched = clock.now
    for hours, pages in ((0, 1), (10, 1), (11.9, 2)):
        clock.now = fetched + hours * 3600
        assert answer_text(chat(app))
        assert len(kimi.pages) == pages


@pytest.mark.parametrize(
    "rejected",
    [
        pytest.param(sends(403, "-1"), id="403 and -1"),
        pytest.param(sends(400, "0"), id="400 and 0"),
        pytest.param(sends(200, "-1"), id="200 and -1"),
        pytest.param(sends(200, '{"success":false,"data":"bad nonce"}', "application/json"), id="no success"),
        pytest.param(
            sends(403, '{"success":false,"data":{"message":"bad nonce"}}', "application/json"), id="403 and no success"
        ),
    ],
)
def test_a_rejected_nonce_is_renewed_and_the_chat_retried_once(app: Client, kimi: WebChat, rejected: Act) -> None:
    kimi.script.append(rejected)
    assert answer_text(chat(app)) == "Hello from upstream."
    assert (len(kimi.pages), len(kimi.posts)) == (2, 2)


def test_a_nonce_in_an_upstream_error_is_hidden(app: Client, kimi: WebChat) -> None:
    kimi.always = sends(200, f'{{"success": false, "data": "bad nonce {kimi.nonce}"}}')
    assert kimi.nonce not in chat(app).text


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param('"Message <b>too</b> long &amp; rude"', "Message too long & rude", id="HTML"),
        pytest.param('{"message": "no"}', "no", id="message"),
        pytest.param('{"x": [1]}', '{"x": [1]}', id="other object"),
        pytest.param("null", "no reason", id="null"),
        pytest.param('"' + "x" * 9999 + '"', "x" * 300, id="long text"),
    ],
)
def test_the_client_receives_the_web_chats_refusal(app: Client, kimi: WebChat, data: str, words: str) -> None:
    kimi.always = sends(200, f'{{"success": false, "data": {data}}}', "application/json")
    response = chat(app)
    assert_error(response, 502, "upstream_refused", "upstream_error")
    assert words in response.json["error"]["message"] and len(response.json["error"]["message"]) < 400
    assert response.headers["x-should-retry"] == "false" and len(kimi.posts) == 2


UNAVAILABLE = (502, "upstream_unavailable")
INVALID = (502, "upstream_invalid_response")
TIMED_OUT = (504, "upstream_timeout")
BLOCKED = (503, "upstream_blocked")
REFUSED = (502, "upstream_refused")
LIMITED = (429, "upstream_rate_limited")
CHANGED = (502, "upstream_changed")

# name, upstream's act, status and code for the client, posts with MAX_RETRIES=1
FAULTS: list[tuple[str, Act, tuple[int, str], int]] = [
    *((f"{status}", sends(status, DOWN, **CLOUDFLARE), UNAVAILABLE, 2) for status in (500, 502, 503, *range(520, 528))),
    ("reset", resets, UNAVAILABLE, 2),
    ("reset in the head", sends_raw(b"HTTP/1.1 200 OK\r\nContent-"), INVALID, 2),
    ("not HTTP", sends_raw(b"SSH-2.0-OpenSSH_9.6\r\n"), UNAVAILABLE, 2),
    ("body cut off", sends_raw(b'HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{"succ'), UNAVAILABLE, 2),
    ("chunks cut off", sends_raw(b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{"su'), UNAVAILABLE, 2),
    ("silence", hangs, TIMED_OUT, 1),
    ("slow drip of the head", drips(b"HTTP/1.1 200 OK\r\nX-A: "), TIMED_OUT, 1),
    ("slow drip of the body", drips(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n"), TIMED_OUT, 1),
    ("endless body", endless, INVALID, 2),
    ("20 MB", sends(200, b" " * 20_000_000), INVALID, 2),
    ("gzip that is not gzip", sends(200, "plain", Content_Encoding="gzip"), INVALID, 2),
    ("too short a length", sends(200, '{"success": true, "data": {"message": "x"}}', Content_Length="20"), INVALID, 2),
    ("HTML with 200", sends(200, "<html>Fatal error</html>"), INVALID, 2),
    ("truncated JSON", sends(200, '{"success": true, "data'), INVALID, 2),
    ("nested 100,000 deep", sends(200, b"[" * 100_000), INVALID, 2),
    ("wrong shape", sends(200, '{"success": true, "data": ["x"]}'), INVALID, 2),
    ("no message", sends(200, '{"success": true, "data": {"message": null}}'), INVALID, 2),
    ("a number", sends(200, "17"), INVALID, 2),
    ("empty answer", web_chat_says(" "), INVALID, 2),
    ("empty body", sends(200), INVALID, 2),
    ("404", sends(404, "gone"), INVALID, 1),
    ("redirect elsewhere", sends(302, Location="http://127.0.0.2:1/steal"), INVALID, 1),
    ("managed challenge", sends(403, JUST_A_MOMENT, cf_mitigated="challenge"), BLOCKED, 1),
    ("challenge without its header", sends(403, JUST_A_MOMENT, **CLOUDFLARE), BLOCKED, 1),
    ("challenge as 503", sends(503, JUST_A_MOMENT, **CLOUDFLARE), BLOCKED, 1),
    ("1020", sends(403, FIREWALL, **CLOUDFLARE), BLOCKED, 1),
    ("IUAM page", sends(503, IUAM, **CLOUDFLARE), BLOCKED, 1),
    ("1020 as text", sends(403, "error code: 1020", "text/plain; charset=UTF-8"), BLOCKED, 1),
    ("1020 as problem details", sends(403, PROBLEM, "application/problem+json"), BLOCKED, 1),
    ("a page with a stale nonce", sends(403, "-1"), REFUSED, 2),
    ("success: false", sends(200, '{"success": false}'), REFUSED, 2),
    ("429", sends(429, "slow down"), LIMITED, 1),
    ("429 for long", sends(429, "slow down", Retry_After="77"), LIMITED, 1),
    ("429 for ever", sends(429, "slow down", Retry_After="9" * 400), LIMITED, 1),
    ("429 for short", sends(429, "slow down", Retry_After="0"), LIMITED, 2),
    ("429 with nonsense", sends(429, "slow down", Retry_After="soon"), LIMITED, 1),
]


@pytest.mark.parametrize(("fault", "error", "posts"), [pytest.param(*row[1:], id=row[0]) for row in FAULTS])
def test_a_fault_of_the_web_chat_has_its_status_and_code(
    make_app: MakeApp, kimi: WebChat, fault: Act, error: tuple[int, str], posts: int
) -> None:
    status, code = error
    app = make_app(REQUEST_TIMEOUT="0.3" if error == TIMED_OUT else "20")
    assert answer_text(chat(app, "before"))
    kimi.always = fault
    began = time.monotonic()
    for body in ({"user": "ada"}, {"stream": True}):
        kimi.posts.clear()
        response = chat(app, **body)
        assert time.monotonic() - began < PATIENCE
        assert_error(response, status, code, "rate_limit_error" if status == 429 else "upstream_error")
        assert len(kimi.posts) == posts
        assert response.headers.get("x-should-retry") == ("false" if posts > 1 or status == 504 else None)
        assert "<" not in response.json["error"]["message"], "the client receives no HTML"
    assert_error(app.get("/v1/sessions/ada"), 404, "session_not_found")
    health = app.get("/health").json
    assert health["status"] == "degraded" and code in health["upstreams"]["kimi"]["reason"]
    assert health["chats"]["running"] == 0
    kimi.gate.set()
    kimi.always = web_chat_answers
    assert answer_text(chat(app, "after")) == "Hello from upstream."
    assert app.get("/health").json["status"] == "ok"
    assert not hasattr(sys, "tracebacklimit"), "cloudscraper sets tracebacklimit, which blanks every later traceback"


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        pytest.param(sends(200, "<html>a new design</html>"), CHANGED, id="no nonce"),
        pytest.param(sends(404, "gone"), CHANGED, id="404"),
        pytest.param(sends(302, Location="http://127.0.0.2:1/"), CHANGED, id="redirect elsewhere"),
        pytest.param(lambda handler: sends(302, Location=f"http://127.0.0.1:{handler.server.port + 1}/")(handler),
                     CHANGED, id="redirect to another port"),
        pytest.param(sends(302, Location="http://[::1"), CHANGED, id="redirect to half an address"),
        pytest.param(sends(302, Location="ftp://127.0.0.1/x"), CHANGED, id="redirect to FTP"),
        pytest.param(sends(302, Location="http://127.0.0.1:99999/"), CHANGED, id="redirect to port 99999"),
        pytest.param(sends(302, Location="http://127.0.0.1:abc/"), CHANGED, id="redirect to port abc"),
        pytest.param(sends(403, JUST_A_MOMENT, **CLOUDFLARE), BLOCKED, id="challenge"),
        pytest.param(sends(503, IUAM, **CLOUDFLARE), BLOCKED, id="IUAM page"),
        pytest.param(sends(403, FIREWALL, **CLOUDFLARE), BLOCKED, id="1020"),
        pytest.param(sends(429), LIMITED, id="429"),
        pytest.param(hangs, TIMED_OUT, id="silence"),
    ],
)
def test_a_fault_of_the_chat_page_has_its_status_and_code(
    make_app: MakeApp, kimi: WebChat, fault: Act, error: tuple[int, str]
) -> None:
    app = make_app(REQUEST_TIMEOUT="0.3" if error == TIMED_OUT else "20")
    kimi.page_script.append(fault)
    assert_error(chat(app), *error)
    assert not kimi.posts and len(kimi.pages) == 1
    kimi.gate.set()
    assert answer_text(chat(app))


def test_a_redirect_of_the_page_is_followed(app: Client, kimi: WebChat) -> None:
    kimi.page_script.append(sends(301, Location="/chat/moved"))
    assert answer_text(chat(app)) and len(kimi.pages) == 2


def test_a_redirect_loop_of_the_page_is_an_error(app: Client, kimi: WebChat) -> None:
    kimi.page_script.extend([sends(301, Location="/chat/again")] * 9)
    assert_error(chat(app), 502, "upstream_changed")


def test_large_cookies_are_dropped_before_a_server_refuses_them(app: Client, kimi: WebChat) -> None:
    for number in range(8):
        body = '{"success": true, "data": {"message": "x"}}'
        kimi.script.append(sends(200, body, Set_Cookie=f"c{number}={'x' * 3000}"))
        assert answer_text(chat(app))
    assert answer_text(chat(app))
    cookies = [head.get("Cookie", "") for head in kimi.heads]
    assert max(map(len, cookies)) < 10_000 and "c1=" in cookies[2], "cookies beyond what a browser sends are dropped"


def test_the_log_contains_no_secret_and_no_prompt(
    make_app: MakeApp, kimi: WebChat, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    app = make_app(API_MASTER_KEY="sk-secret")
    kimi.script.extend([sends(200, '{"success": false, "data": "its words"}'), sends(500)])
    assert answer_text(chat(app, "my prompt", user="somebody", headers={"Authorization": "Bearer sk-secret"}))
    chat(app, "my prompt", headers={"Authorization": "Bearer sk-wrong"})
    for secret in ("sk-secret", "sk-wrong", "my prompt", kimi.nonce, "somebody", "its words"):
        assert secret not in caplog.text, secret
    assert "retry 1 of 1" in caplog.text and "401" in caplog.text


# ----------------------------------------------------------------------------------------------------------------------
# APIs: adapting requests
# ----------------------------------------------------------------------------------------------------------------------


def api_thinks(*steps: Any, knows: str = "moonshot") -> Act:
    """Return an act that is as strict as the official APIs with a thinking model.

    The answer to a question calls the tools of the first step, the answer to their results those of the next step, and
    so on. The last answer is "Done.". `knows` selects the API whose rules apply.
    """

    def refusal(body: Any) -> str:
        thinking = body.get("thinking", {}).get("type") != "disabled"
        choice = body.get("tool_choice")
        for index, message in enumerate(body["messages"]):
            reasoning = message.get("reasoning_content")
            has_gap = message["role"] == "assistant" and (not reasoning if knows == "k2.6" else reasoning is None)
            if thinking and has_gap and (message.get("tool_calls") or knows == "deepseek"):
                if knows == "deepseek":
                    return "The reasoning_content in the thinking mode must be passed back to the API."
                what = "thinking is enabled but reasoning_content is missing in assistant tool call message at index"
                return f"{what} {index}"
        for name, only in (("temperature", 1), ("top_p", 0.95), ("presence_penalty", 0), ("frequency_penalty", 0)):
            if body.get(name, only) != only:
                return f"invalid {name}: only {only} is allowed for this model"
        if thinking and (isinstance(choice, dict) or (choice == "required" and knows != "k3")):
            kind = "specified" if isinstance(choice, dict) else "required"
            return f"tool_choice '{kind}' is incompatible with thinking enabled"
        return ""

    def act(handler: ApiHandler) -> None:
        body = json.loads(handler.body)
        message = refusal(body)
        if message:
            return api_sends(400, {"error": {"message": message, "type": "invalid_request_error"}})(handler)
        done = sum(message["role"] == "assistant" for message in body["messages"])
        if done >= len(steps) or not body.get("tools"):
            return api_answers("Done.")(handler)
        calls = [
            {"index": at, "id": f"call_{done}_{at}", "type": "function", "function": {"name": name, "arguments": text}}
            for at, (name, text) in enumerate(steps[done])
        ]
        thoughts = [{"reasoning_content": text} for text in ("I think", f" of step {done}.")]
        return api_answers(deltas=[*thoughts, {"tool_calls": calls}], finish="tool_calls")(handler)

    return act


STEPS = ([("get_weather", '{"city": "Paris"}')], [("clock", "{}"), ("get_weather", '{"city": "Rome"}')])


def reasoning_sent(api: Api) -> list[str]:
    """Return the reasoning of the assistant's messages in the last request."""
    messages = api.asked[-1][2]["messages"]
    return [message["reasoning_content"] for message in messages if message["role"] == "assistant"]


def agent_loop(app: Client, stream: bool = False, **body: Any) -> list[Any]:
    """Run an agent as a client that keeps only the fields of OpenAI's protocol. Return its messages."""
    messages: list[Any] = [{"role": "user", "content": "Find out."}]
    for _ in range(9):
        response = chat(app, messages=messages, model="local/k3", tools=[WEATHER, CLOCK], stream=stream, **body)
        if stream:
            calls = [call for event in sse_events(response)[:-1] for choice in event["choices"]
                     for call in choice["delta"].get("tool_calls", ())]
            message = {"role": "assistant", "content": streamed_text(sse_events(response)), "tool_calls": calls}
        else:
            assert response.status_int == 200, response.text
            message = response.json["choices"][0]["message"]
        message = {name: message[name] for name in ("role", "content", "tool_calls") if message.get(name)}
        messages.append(message)
        if not message.get("tool_calls"):
            return messages
        for call in message["tool_calls"]:
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": "fine"})
    raise AssertionError("it never ends")


@json_and_stream
@pytest.mark.parametrize("knows", ["moonshot", "k3"])
def test_reasoning_returns_to_the_api_that_sent_it(
    api_app: Client, api: Api, knows: str, stream: bool
) -> None:
    api.always = api_thinks(*STEPS, knows=knows)
    messages = agent_loop(api_app, stream)
    assert messages[-1]["content"] == "Done." and len(api.asked) == 3, "no request was refused"
    sent = api.asked[-1][2]["messages"]
    reasoning = [message.get("reasoning_content") for message in sent if message["role"] == "assistant"]
    assert reasoning == ["I think of step 0.", "I think of step 1."]
    assert not any("reasoning_content" in message for message in messages)


@pytest.mark.parametrize(("knows", "filling"), [("moonshot", ""), ("deepseek", ""), ("k2.6", " ")])
def test_lost_reasoning_is_replaced_by_a_filling(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, knows: str, filling: str
) -> None:
    api.always = api_thinks(*STEPS, knows=knows)
    messages = agent_loop(make_app(**api_settings))[:-1]
    api.asked.clear()
    app = make_app(**api_settings)  # as after a restart
    again = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, *messages]
    for _ in range(2):
        assert answer_text(chat(app, messages=again, model="local/k3", tools=[WEATHER, CLOCK])) == "Done."
    refused = 2 if filling else 1
    assert len(api.asked) == 2 + refused, "only the first request was refused"
    sent = [message for message in api.asked[-1][2]["messages"] if message["role"] == "assistant"]
    assert {message["reasoning_content"] for message in sent} == {filling}
    assert answer_text(chat(app, messages=again, model="local/other")) == "Done."
    other = json.dumps(api.asked[2 + refused][2])
    assert "reasoning_content" not in other, "a model that never required reasoning receives none"


def test_reasoning_is_restored_only_in_its_own_message(
    make_app: MakeApp, api_settings: dict[str, str], api: Api
) -> None:
    api.always = api_thinks(*STEPS)
    app = make_app(**api_settings, API_MASTER_KEY="sk-one,sk-two")
    one, two = ({"Authorization": f"Bearer {key}"} for key in ("sk-one", "sk-two"))
    question = {"role": "user", "content": "x"}
    answered = chat(app, messages=[question], model="local/k3", tools=[WEATHER], headers=one).json
    call = answered["choices"][0]["message"]["tool_calls"][0]
    calls = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "fine"}

    def reasoning_sent(*messages: Any, headers: Any) -> list[Any]:
        api.always = api_answers("ok")
        assert answer_text(chat(app, messages=[question, *messages], model="local/k3", headers=headers)) == "ok"
        sent = api.asked[-1][2]["messages"]
        return [message.get("reasoning_content") for message in sent if message.get("tool_calls")]

    assert reasoning_sent(calls, result, headers=one) == ["I think of step 0."]
    assert reasoning_sent(calls, result, headers=two) == [None], "the reasoning of another key is never used"
    assert reasoning_sent({**calls, "reasoning_content": "mine"}, result, headers=one) == ["mine"]
    assert reasoning_sent({**calls, "reasoning_content": ""}, result, headers=one) == [""]
    again = reasoning_sent(calls, result, question, calls, result, headers=one)
    assert again == ["I think of step 0.", None], "the second answer is another one, in spite of equal ids and question"


def test_a_session_keeps_the_reasoning_of_its_tool_calls(api_app: Client, api: Api) -> None:
    api.always = api_thinks(*STEPS)
    call = chat(api_app, model="local/k3", tools=[WEATHER], user="ada").json["choices"][0]["message"]["tool_calls"][0]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "fine"}
    chat(api_app, messages=[result], model="local/k3", tools=[WEATHER], user="ada")
    assert api.asked[-1][2]["messages"][1]["reasoning_content"] == "I think of step 0."
    [turn] = api_app.get("/v1/sessions/ada").json["turns"]
    assert [message["role"] for message in turn][:3] == ["user", "assistant", "tool"]


def test_reasoning_stays_in_its_conversation_though_call_ids_repeat(api_app: Client, api: Api) -> None:
    api.always = api_thinks(*STEPS)
    calls = {}
    for question in ("mine", "yours"):
        answered = chat(api_app, question, model="local/k3", tools=[WEATHER]).json["choices"][0]["message"]
        calls[question] = answered["tool_calls"]
    api.always = api_answers("ok")
    for question, expected in (("mine", "I think of step 0."), ("another", None)):
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": None, "tool_calls": calls["mine"]},
            {"role": "tool", "tool_call_id": calls["mine"][0]["id"], "content": "fine"},
        ]
        chat(api_app, messages=messages, model="local/k3")
        assert api.asked[-1][2]["messages"][1].get("reasoning_content") == expected


def test_a_refused_value_does_not_affect_another_value(api_app: Client, api: Api) -> None:
    api.always = api_thinks()
    assert chat(api_app, model="local/k3", temperature=1.5).headers["X-Kimi2api-Ignored"] == "temperature"
    assert "X-Kimi2api-Ignored" not in chat(api_app, model="local/k3", temperature=1).headers
    assert api.asked[-1][2]["temperature"] == 1


@json_and_stream
def test_a_refused_parameter_is_dropped(
    api_app: Client, api: Api, stream: bool
) -> None:
    api.always = api_thinks()
    body = {"temperature": 0.7, "top_p": 0.5, "max_tokens": 9, "presence_penalty": 1}
    for asked in (4, 5):
        response = chat(api_app, model="local/k3", stream=stream, **body)
        assert response.status_int == 200
        assert response.headers["X-Kimi2api-Ignored"] == "temperature, top_p, presence_penalty"
        assert len(api.asked) == asked, "a refused form is not sent again"
    assert "temperature" not in api.asked[-1][2] and api.asked[-1][2]["max_tokens"] == 9
    response = chat(api_app, model="local/k3", stream=stream)
    assert "X-Kimi2api-Ignored" not in response.headers
    chat(api_app, model="local/other", temperature=0.7)
    assert api.asked[-2][2]["temperature"] == 0.7, "another model still receives it"


def test_a_refused_parameter_is_sent_again_after_an_hour(
    make_app: MakeApp, api: Api, api_settings: dict[str, str], clock: Clock
) -> None:
    api.always = api_thinks()
    app = make_app(**api_settings)
    chat(app, model="local/k3", temperature=0.7)
    clock.now += 3599
    chat(app, model="local/k3", temperature=0.7)
    assert len(api.asked) == 3
    clock.now += 2
    chat(app, model="local/k3", temperature=0.7)
    assert len(api.asked) == 5


@pytest.mark.parametrize(
    ("message", "body"),
    [
        pytest.param("invalid messages", {"temperature": 0.5}, id="names no parameter"),
        pytest.param("invalid temperature", {}, id="names one that was not sent"),
        pytest.param("logprobs are not to be had", {"logprobs": True}, id="one that was really asked for"),
        pytest.param("invalid max_tokens", {"max_tokens": 5}, id="one that counts"),
        pytest.param("reasoning_content is missing", {}, id="no gap to fill"),
    ],
)
def test_the_client_receives_any_other_refusal(
    api_app: Client, api: Api, message: str, body: dict[str, Any]
) -> None:
    api.always = api_sends(400, {"error": {"message": message}})
    assert chat(api_app, model="local/k3", **body).status_int == 400
    assert len(api.asked) == 1


def test_a_persistent_refusal_is_returned_and_not_remembered(api_app: Client, api: Api) -> None:
    api.always = api_sends(400, {"error": {"message": "temperature, top_p and what else is wrong"}})
    for asked in (3, 6):
        assert chat(api_app, model="local/k3", temperature=0.5, top_p=0.5).status_int == 400
        assert len(api.asked) == asked
    assert "temperature" in api.asked[3][2]


NAMED = {"type": "function", "function": {"name": "clock"}}


@pytest.mark.parametrize(
    ("knows", "choice", "sent"),
    [
        pytest.param("k3", NAMED, ("required", ["clock"], None), id="named, as required and alone"),
        pytest.param("moonshot", NAMED, (NAMED, ["get_weather", "clock"], "disabled"), id="named, without thinking"),
        pytest.param("moonshot", "required", ("required", ["get_weather", "clock"], "disabled"), id="required"),
        pytest.param("k3", "required", ("required", ["get_weather", "clock"], None), id="required, which it takes"),
    ],
)
def test_a_refused_forced_tool_is_forced_by_other_means(
    api_app: Client, api: Api, knows: str, choice: Any, sent: Any
) -> None:
    api.always = api_thinks(*STEPS, knows=knows)
    for _ in range(2):
        assert chat(api_app, model="local/k3", tools=[WEATHER, CLOCK], tool_choice=choice).status_int == 200
        body = api.asked[-1][2]
        names = [tool["function"]["name"] for tool in body["tools"]]
        assert (body["tool_choice"], names, body.get("thinking", {}).get("type")) == sent
    count = len(api.asked)
    assert count <= 4
    chat(api_app, model="local/k3", tools=[WEATHER, CLOCK], tool_choice="auto")
    assert "thinking" not in api.asked[-1][2] and len(api.asked) == count + 1


def test_a_forced_tool_that_stays_refused_returns_the_first_error(
    make_app: MakeApp, api_settings: dict[str, str], api: Api
) -> None:
    def act(handler: ApiHandler) -> None:
        body = json.loads(handler.body)
        choice = f"tool_choice {body['tool_choice']!r:.12} is bad"
        what = "thinking cannot be disabled" if "thinking" in body else choice
        api_sends(400, {"error": {"message": what}})(handler)

    api.always = act
    response = chat(make_app(**api_settings), model="local/k3", tools=[WEATHER, CLOCK], tool_choice=NAMED)
    assert response.status_int == 400 and "tool_choice {" in response.json["error"]["message"]
    assert len(api.asked) == 3
    mine = {"tool_choice": "required", "thinking": {"type": "enabled"}}
    assert chat(make_app(**api_settings), model="local/k3", tools=[WEATHER], **mine).status_int == 400
    assert len(api.asked) == 4, "the client's own `thinking` is kept"


def message_roles(body: Any) -> list[str]:
    return [message["role"] for message in body["messages"]]


def has_reasoning(body: Any) -> bool:
    return any("reasoning_content" in message for message in body["messages"])


def is_beyond_moonshot(schema: Any) -> bool:
    """Return whether Moonshot's validator refuses a schema: siblings of $ref, type beside anyOf, null among options."""
    if isinstance(schema, list):
        return any(map(is_beyond_moonshot, schema))
    if not isinstance(schema, dict):
        return False
    options = schema.get("anyOf") or []
    is_bad = ("$ref" in schema and len(schema) > 1) or (options and "type" in schema) or {"type": "null"} in options
    return is_bad or any(map(is_beyond_moonshot, schema.values()))


MOONSHOTS_WORDS = "tools.function.parameters is not a valid moonshot flavored json schema, details: <At path 'x': …>"
WANTED_SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
SYSTEM_LATER = [
    {"role": "system", "content": "A"},
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": "y"},
    {"role": "developer", "content": [{"type": "text", "text": "B"}]},
    {"role": "user", "content": "z"},
]
THOUGHT = [
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": "y", "reasoning_content": "because"},
    {"role": "user", "content": "z"},
]
OBJECT_OF_ANY = {
    "type": "object",
    "anyOf": [{"properties": {"a": {"$ref": "#/$defs/A", "description": "d"}}, "required": ["a"]}, {"type": "null"}],
    "$defs": {"A": {"type": "string", "anyOf": [{"enum": ["x"]}, {"type": "null"}]}},
}


@pytest.mark.parametrize(
    ("act", "body", "is_kept"),
    [
        pytest.param(api_forbids("stream_options"), {}, lambda sent: sent["stream"], id="stream_options"),
        pytest.param(api_forbids("frequency_penalty"), {"frequency_penalty": 0}, bool, id="a penalty of 0"),
        pytest.param(api_forbids("metadata"), {"metadata": {"a": "b"}}, bool, id="metadata"),
        pytest.param(api_forbids("user"), {"user": "ada"}, bool, id="user"),
        pytest.param(
            api_refuses(
                "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' "
                "instead.",
                lambda body: "max_tokens" in body,
            ),
            {"max_tokens": 9},
            lambda sent: sent["max_completion_tokens"] == 9,
            id="max_tokens",
        ),
        pytest.param(
            api_forbids("max_completion_tokens"),
            {"max_completion_tokens": 9},
            lambda sent: sent["max_tokens"] == 9,
            id="max_completion_tokens",
        ),
        pytest.param(
            api_refuses(
                "cannot specify both 'thinking' and 'reasoning_effort'",
                lambda body: "thinking" in body and "reasoning_effort" in body,
            ),
            {"thinking": {"type": "enabled"}, "reasoning_effort": "high"},
            lambda sent: sent["thinking"],
            id="two that exclude each other",
        ),
        pytest.param(
            api_refuses("The 'metadata' parameter is only allowed when 'store' is enabled.", lambda b: "metadata" in b),
            {"metadata": {"a": "b"}},
            bool,
            id="one that wants another",
        ),
        pytest.param(
            api_refuses(
                "This response_format type is unavailable now",
                lambda body: body.get("response_format", {}).get("type") == "json_schema",
            ),
            {"response_format": json_schema(WANTED_SCHEMA)},
            lambda sent: sent["response_format"] == JSON_OBJECT and '"city"' in sent["messages"][0]["content"],
            id="json_schema",
        ),
        pytest.param(
            api_refuses("'response_format.type' must be 'text'", lambda body: "response_format" in body),
            {"response_format": json_schema(WANTED_SCHEMA)},
            lambda sent: '"city"' in sent["messages"][0]["content"],
            id="JSON of any kind",
        ),
        pytest.param(
            api_refuses(
                "Prompt must contain the word 'json' in some form to use response_format",
                lambda body: "response_format" in body and "JSON" not in json.dumps(body["messages"]),
            ),
            {"response_format": JSON_OBJECT},
            lambda sent: sent["response_format"] == JSON_OBJECT,
            id="the word JSON",
        ),
        pytest.param(
            api_refuses(MOONSHOTS_WORDS, lambda body: is_beyond_moonshot(body.get("tools"))),
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": OBJECT_OF_ANY}}]},
            lambda sent: (
                sent["tools"][0]["function"]["parameters"]
                == {
                    "type": "object",
                    "properties": {"a": {"$ref": "#/$defs/A"}},
                    "$defs": {"A": {"anyOf": [{"type": "string", "enum": ["x"]}]}},
                }
            ),
            id="Moonshot's schemas",
        ),
        pytest.param(
            api_refuses("System message must be at the beginning.", lambda body: "system" in message_roles(body)[1:]),
            {"messages": SYSTEM_LATER},
            lambda sent: sent["messages"][0]["content"] == [{"type": "text", "text": text} for text in "AB"],
            id="a system message later",
        ),
        pytest.param(
            api_refuses("property 'reasoning_content' is unsupported", has_reasoning),
            {"messages": THOUGHT},
            lambda sent: len(sent["messages"]) == 3,
            id="reasoning",
        ),
        pytest.param(
            api_refuses(
                "Your organization must be verified to stream this model.",
                lambda body: body.get("stream"),
                param="stream",
                code="unsupported_value",
            ),
            {},
            bool,
            id="streaming",
        ),
    ],
)
def test_a_refused_request_is_sent_in_another_form(
    api_app: Client, api: Api, act: Act, body: dict[str, Any], is_kept: Callable[[Any], bool]
) -> None:
    api.always = act
    for stream in (False, True, False):
        response = chat(api_app, model="local/k2", stream=stream, **body)
        assert response.status_int == 200, response.text
    sent = api.asked[-1][2]
    assert is_kept(sent)
    assert len(api.asked) <= 5, "a refused form is not sent again"
    assert chat(api_app, model="local/other").status_int == 200
    changes = {name for name in body if name not in sent and name != "max_completion_tokens" and name != "max_tokens"}
    assert set(response.headers.get("X-Kimi2api-Ignored", "").split(", ")) - {""} == changes


def test_a_value_refused_for_one_client_is_kept_for_another(api_app: Client, api: Api) -> None:
    api.always = api_refuses(
        "cannot specify both temperature and top_p", lambda body: "temperature" in body and "top_p" in body)
    assert chat(api_app, model="local/k2", temperature=0.5, top_p=0.5).headers["X-Kimi2api-Ignored"] == "temperature"
    for value in (0.5, 0.7):
        assert chat(api_app, model="local/k2", temperature=value).status_int == 200
        assert api.asked[-1][2]["temperature"] == value
    assert len(api.asked) == 4


def test_only_a_change_that_succeeded_is_remembered(api_app: Client, api: Api) -> None:
    api.always = api_refuses("temperature or top_p is wrong", lambda body: "top_p" in body)
    for asked in (3, 4):
        assert chat(api_app, model="local/k2", temperature=0.5, top_p=0.5).headers["X-Kimi2api-Ignored"] == "top_p"
        assert len(api.asked) == asked and api.asked[-1][2]["temperature"] == 0.5


def test_ids_in_refusals_do_not_make_them_look_different(api_app: Client, api: Api) -> None:
    numbers = itertools.count(20251129001)

    def act(handler: ApiHandler) -> None:
        refusal = f"temperature or top_p is wrong (request id: {next(numbers)})"
        (api_fails(400, refusal) if b'"top_p"' in handler.body else api_answers("ok"))(handler)

    api.always = act
    response = chat(api_app, model="local/k2", temperature=0.5, top_p=0.5)
    assert response.headers["X-Kimi2api-Ignored"] == "top_p" and api.asked[-1][2]["temperature"] == 0.5


def test_one_clients_refusal_never_degrades_anothers_request(
    api_app: Client, api: Api
) -> None:
    api.always = api_refuses(
        "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", lambda body: "max_tokens" in body)
    assert chat(api_app, model="local/k2", max_tokens=9).status_int == 200
    assert chat(api_app, model="local/k2", max_completion_tokens=9).status_int == 200
    assert len(api.asked) == 3 and api.asked[-1][2]["max_completion_tokens"] == 9
    api.always = api_refuses(
        "logprobs cannot be used with stream", lambda body: body.get("logprobs") and body.get("stream"))
    for body, count in (({"logprobs": True}, 5), ({"logprobs": True}, 6), ({}, 7)):
        assert chat(api_app, model="local/k3", **body).status_int == 200 and len(api.asked) == count
    assert api.asked[-1][2]["stream"], "only the combination was refused"
    api.always = api_refuses("use the word json", lambda body: "JSON" not in json.dumps(body["messages"]))
    assert chat(api_app, model="local/k4", response_format=JSON_OBJECT).status_int == 200
    assert chat(api_app, model="local/k4").status_int == 400 and "response_format" not in api.asked[-1][2]


def test_a_parameter_with_changing_values_is_refused_once(api_app: Client, api: Api) -> None:
    api.always = api_forbids("metadata")
    for number in range(4):
        response = chat(api_app, model="local/k2", metadata={"id": f"{number} {'x' * 200}"})
        assert response.headers["X-Kimi2api-Ignored"] == "metadata"
    assert len(api.asked) == 5


def test_large_values_are_remembered_by_their_hash(api_app: Client, api: Api) -> None:
    api.always = api_forbids("verbosity")
    for value in ("x" * 101, "x" * 102, "x" * 101):
        assert chat(api_app, model="local/k2", verbosity=value).status_int == 200
    assert len(api.asked) == 5


@pytest.mark.parametrize("name", ["(", "(a+)+b", "a|b", "[", "\\"])
def test_parameter_names_are_not_regular_expressions(api_app: Client, api: Api, name: str) -> None:
    api.always = api_fails(400, f"unrecognized argument: {'a' * 40}")
    began = time.monotonic()
    assert chat(api_app, model="local/k2", **{name: 1}).status_int == 400
    assert time.monotonic() - began < 2 and len(api.asked) == 1


@pytest.mark.parametrize(
    "parameters",
    [
        {"anyOf": [True, 5, "x", None]},
        {"anyOf": {"a": 1}},
        {"properties": [1, 2]},
        {"anyOf": [{"properties": "abc"}]},
        {"properties": {"x": {"type": "string", "anyOf": [True]}}},
    ],
)
def test_the_api_refuses_an_invalid_schema(
    api_app: Client, api: Api, parameters: Any
) -> None:
    api.always = api_refuses(MOONSHOTS_WORDS, lambda body: body["tools"][0]["function"]["name"] == "f")
    f, g = ([{"type": "function", "function": {"name": name, "parameters": parameters}}] for name in "fg")
    assert_error(chat(api_app, model="local/k2", tools=f), 400, None)
    assert chat(api_app, model="local/k2", tools=g).status_int == 200


@pytest.mark.parametrize("tool", [{"function": 5}, {"function": {"name": 5}}, {"function": {}}, {"function": None}])
def test_an_api_receives_a_tool_of_another_type(api_app: Client, api: Api, tool: Any) -> None:
    tool = {"type": "builtin", **tool}
    assert chat(api_app, model="local/k2", tools=[tool]).status_int == 200
    assert api.asked[-1][2]["tools"] == [tool]


@pytest.mark.parametrize(
    "words", ["system error", "reasoning unsupported", "reasoning_content is missing", "the word json", "bad stream"])
def test_refused_embeddings_are_not_adapted(
    api_app: Client, api: Api, words: str
) -> None:
    api.always = api_fails(400, words)
    assert_error(embed(api_app, model="local/e1"), 400, None)


def test_shortening_many_long_names_is_fast(api_app: Client, api: Api) -> None:
    tools = [tool(f"{'x' * 60}{number:06d}") for number in range(15_000)]
    began = time.thread_time()
    assert chat(api_app, model="local/k2", tools=tools).status_int == 200
    assert time.thread_time() - began < 3, "usually 0.5 s of CPU"


def test_an_answer_without_a_dropped_choice_is_complete(
    make_app: MakeApp, api_settings: dict[str, str], api: Api
) -> None:
    def act(handler: ApiHandler) -> None:
        is_refused = "n" in json.loads(handler.body)
        (api_fails(400, "n > 1", param="n") if is_refused else api_streams(api_chunk({"content": "x"}, "stop")))(
            handler
        )

    api.always = act
    assert answer_text(chat(make_app(**api_settings, MAX_RETRIES="0"), model="local/k2", n=2)) == "x"


WHOLE_CALL = {"id": "c1", "type": "function", "function": {"name": "a", "arguments": '{"x":1}'}}


def test_requests_are_normalized_for_every_api(api_app: Client, api: Api) -> None:
    messages = [
        {"role": "system", "content": "A"},
        {"role": "developer", "content": "B"},
        {"role": "system", "tools": [WEATHER]},
        {"role": "user", "content": "x", "name": None},
        {"role": "assistant", "content": None, "refusal": None, "audio": None, "tool_calls": [WHOLE_CALL]},
        {"role": "tool", "content": "r", "tool_call_id": "c1"},
        {"role": "developer", "content": "C"},
    ]
    response = chat(api_app, messages=messages, model="local/k2", tools=[], tool_choice="auto", stop=list("abcd"))
    assert response.status_int == 200
    sent = api.asked[-1][2]
    assert sent["messages"] == [
        {"role": "system", "content": "A\n\nB"},
        {"role": "system", "tools": [WEATHER]},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [WHOLE_CALL]},
        {"role": "tool", "content": "r", "tool_call_id": "c1"},
        {"role": "system", "content": "C"},
    ]
    assert not {"tools", "tool_choice"} & sent.keys() and sent["stop"] == list("abcd")


@json_and_stream
def test_long_function_names_are_shortened_and_restored(
    api_app: Client, api: Api, stream: bool
) -> None:
    names = [f"mcp__{'enterprise_' * 6}{end}" for end in ("read", "write")]
    tools = [tool(name) for name in names]
    api.always = api_calls_every_tool
    response = chat(api_app, model="local/k2", tools=tools, stream=stream, user="ada")
    if stream:
        deltas = [chunk["choices"][0]["delta"] for chunk in sse_events(response)[:-1]]
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    else:
        calls = response.json["choices"][0]["message"]["tool_calls"]
    assert [call["function"]["name"] for call in calls] == names
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "fine"} for call in calls]
    chat(api_app, messages=results, model="local/k2", tools=tools, tool_choice={"type": "function", "function": {
        "name": names[1]}}, user="ada")
    sent = api.asked[-1][2]
    short = [tool["function"]["name"] for tool in sent["tools"]]
    assert len(set(short)) == 2 and max(map(len, short)) <= 64
    assert [call["function"]["name"] for call in sent["messages"][1]["tool_calls"]] == short
    assert sent["tool_choice"]["function"]["name"] == short[1]


def api_calls_every_tool(handler: ApiHandler) -> None:
    """Answer with a call of every tool."""
    names = [tool["function"]["name"] for tool in json.loads(handler.body)["tools"]]
    calls = [{"index": i, "id": f"c{i}", "function": {"name": n, "arguments": "{}"}} for i, n in enumerate(names)]
    api_answers(deltas=[{"tool_calls": [call]} for call in calls], finish="tool_calls")(handler)


# ----------------------------------------------------------------------------------------------------------------------
# APIs: errors, reading answers, provider
# ----------------------------------------------------------------------------------------------------------------------


def test_the_models_prefix_selects_an_api_that_receives_the_request(
    api_app: Client, api: Api, kimi: WebChat
) -> None:
    content = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "x"}}]
    request = {
        "messages": [{"role": "user", "content": content}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "temperature": 0.5,
        "thinking": {"type": "enabled"},
    }
    response = chat(api_app, model="local/org/k2", **request)
    assert answer_text(response) == "Hi from the API."
    assert response.headers["X-Kimi2api-Provider"] == "local" and response.json["model"] == "local/org/k2"
    assert response.json["usage"] == USAGE and response.json["system_fingerprint"] == "fp"
    assert response.json["choices"][0]["finish_reason"] == "stop" and response.json["choices"][0]["logprobs"] is None
    path, headers, body = api.asked[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer sk-theirs"
    assert body == {**request, "model": "org/k2", "stream": True, "stream_options": {"include_usage": True}}
    assert not kimi.posts


def test_chunks_of_an_api_pass_through_unchanged(make_app: MakeApp, api_settings: dict[str, str], api: Api) -> None:
    deltas = [{"reasoning_content": "Hm", "content": None}, {"content": "你", "unknown": {"a": [1]}}, {"content": "好"}]
    api.always = api_answers(deltas=deltas, x_ratelimit_remaining_requests="9")
    response = chat(make_app(**api_settings), model="local/k2", stream=True)
    *chunks, done = sse_events(response)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [{"role": "assistant", "content": ""}, *deltas, {}]
    assert all(chunk["system_fingerprint"] == "fp" and "usage" not in chunk for chunk in chunks)
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    assert response.headers["x-ratelimit-remaining-requests"] == "9"
    chunks = sse_events(
        chat(make_app(**api_settings), model="local/k2", stream=True, stream_options={"include_usage": True})
    )
    assert chunks[-2]["usage"] == USAGE and chunks[-2]["choices"] == []
    folded = chat(make_app(**api_settings), model="local/k2").json["choices"][0]["message"]
    assert folded == {
        "role": "assistant",
        "content": "你好",
        "refusal": None,
        "reasoning_content": "Hm",
        "unknown": {"a": [1]},
    }


def test_a_stream_cut_off_by_an_api_ends_with_an_error_event(
    start_program: StartProgram, api_settings: dict[str, str], api: Api
) -> None:
    busy = {"error": {"message": "overloaded", "type": "engine_error", "code": "busy"}}
    program = start_program(**api_settings, FALLBACK_MODELS="kimi")
    for act, code in (
        (api_streams_half_then(ends=False), "upstream_unavailable"),
        (api_streams_half_then(), "upstream_unavailable"),
        (api_streams_half_then(busy), "busy"),
        (api_streams_half_then(b'{"choices": [7]}'), "upstream_invalid_response"),
    ):
        api.always = act
        api.gate.clear()
        with program.open_chat(model="local/k2", stream=True, user="ada") as link:
            body = read_until(link, b"half")
            api.gate.set()
            body += read_all(link)
        error = sse_events(body)[-1]["error"]
        assert error["code"] == code and "base 16" not in error["message"] and b"[DONE]" not in body
        assert program.ask("GET", "/v1/sessions/ada")[0] == 404, "half an answer is not remembered"


def test_the_key_of_an_api_is_never_shown(make_app: MakeApp, api_settings: dict[str, str], api: Api) -> None:
    for field in ("message", "type", "code", "param"):
        api.always = api_sends(400, {"error": {"message": "m", field: "y" * 295 + " sk-theirs"}})
        assert "sk-th" not in chat(make_app(**api_settings), model="local/k2").text


def test_a_prompt_in_an_apis_error_code_is_not_logged(
    api_app: Client, api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for field in ("code", "type"):
        api.always = api_sends(500, {"error": {"message": "m", field: "you said: my secret"}})
        assert chat(api_app, "my secret", model="local/k2").json["error"][field] == "you said: my secret"
    assert "secret" not in caplog.text and "secret" not in api_app.get("/health").text


@pytest.mark.parametrize(
    ("act", "error", "asked"),
    [
        pytest.param(
            api_fails(400, "bad", type="invalid_request_error", code="x", param="n"),
            (400, "x", "invalid_request_error"),
            1,
            id="400",
        ),
        pytest.param(
            api_fails(400, "Invalid request: Your request exceeded model token limit: 8192"),
            (400, "context_length_exceeded", "invalid_request_error"),
            1,
            id="too long",
        ),
        pytest.param(
            api_fails(404, "no model", type="resource_not_found_error"),
            (404, None, "resource_not_found_error"),
            1,
            id="404",
        ),
        pytest.param(api_sends(418, b"<html>teapot</html>"), (418, None, "invalid_request_error"), 1, id="418"),
        pytest.param(api_fails(401, "bad key sk-theirs"), (502, "upstream_auth", "upstream_error"), 1, id="401"),
        pytest.param(api_sends(402, b"no"), (402, None, "invalid_request_error"), 1, id="402"),
        pytest.param(api_sends(403, b"no"), (403, None, "invalid_request_error"), 1, id="403"),
        pytest.param(
            api_fails(500, "with sk-theirs", type="server_error", code="oops"),
            (500, "oops", "server_error"),
            2,
            id="500",
        ),
        pytest.param(
            api_sends(503, b"<html><b>down</b></html>"), (503, "upstream_unavailable", "upstream_error"), 2, id="503"
        ),
        pytest.param(
            api_sends(302, b"", Location="http://127.0.0.2:1/"),
            (502, "upstream_unavailable", "upstream_error"),
            1,
            id="redirect",
        ),
        pytest.param(hangs, (504, "upstream_timeout", "upstream_error"), 1, id="silence"),
        pytest.param(resets, (502, "upstream_unavailable", "upstream_error"), 2, id="reset"),
    ],
)
def test_errors_of_an_api_are_returned(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, act: Act, error: tuple[int, str | None, str], asked: int
) -> None:
    api.always = act
    app = make_app(**api_settings, REQUEST_TIMEOUT="0.3" if act is hangs else "20")
    for stream in (False, True):
        api.asked.clear()
        response = chat(app, model="local/k2", stream=stream)
        assert_error(response, *error)
        assert len(api.asked) == asked
        assert "sk-theirs" not in response.text and "<" not in response.json["error"]["message"]


@json_and_stream
def test_a_rate_limit_of_an_api_is_returned_with_its_headers(
    api_app: Client, api: Api, stream: bool
) -> None:
    body = {"error": {"message": "slow", "type": "rate_limit_reached_error"}}
    api.always = api_sends(429, body, Retry_After="60", X_RateLimit_Limit="3")
    response = chat(api_app, model="local/k2", stream=stream)
    assert_error(response, 429, "upstream_rate_limited", "rate_limit_reached_error")
    assert response.headers["Retry-After"] == "60" and response.headers["X-RateLimit-Limit"] == "3"
    assert len(api.asked) == 1


def test_an_unreachable_api_is_unavailable(make_app: MakeApp) -> None:
    response = chat(make_app(PROVIDERS="local", LOCAL_BASE_URL="http://127.0.0.1:9/v1"), model="local/k2")
    assert_error(response, 502, "upstream_unavailable")
    assert response.headers["x-should-retry"] == "false"


@json_and_stream
def test_a_failed_attempt_leaves_nothing_in_the_answer(api_app: Client, api: Api, stream: bool) -> None:
    first = {**api_chunk(), "choices": [], "usage": {"prompt_tokens": 9876543}, "citations": ["x"]}
    api.script.append(api_streams(first, {"error": {"message": "Overloaded", "code": 503}}))
    api.always = api_streams(api_chunk({"content": "whole"}, "stop"), b"[DONE]")
    options = {"include_usage": True} if stream else None
    response = chat(api_app, model="local/k2", stream=stream, stream_options=options)
    assert len(api.asked) == 2 and "whole" in response.text
    assert "9876543" not in response.text and "citations" not in response.text


@pytest.mark.parametrize(
    "dripped",
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nX-Slow: ", id="head"),
        pytest.param(b"HTTP/1.1 500 Oh\r\nContent-Type: text/plain\r\n\r\n", id="error body"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n: ", id="before the first event"),
        pytest.param(EARLY_HINTS + b"HTTP/1.1 103 X\r\nLink: ", id="interim answer"),
    ],
)
def test_everything_before_the_first_event_has_a_deadline(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, dripped: bytes
) -> None:
    api.always = drips(dripped)
    app = make_app(**api_settings, REQUEST_TIMEOUT="0.3")
    assert_error(chat(app, model="local/k2"), 504, "upstream_timeout")


def test_the_list_of_models_and_trailers_have_a_deadline(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    api.list_act = drips(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
    app = make_app(**api_settings, REQUEST_TIMEOUT="0.3")
    assert app.get("/v1/models").status_int == 200
    wait_for(lambda: "cannot be listed" in caplog.text)
    chunks = [b"%x\r\n%b\r\n" % (len(part), part) for part in (as_events(HALF, REST), b"data: [DONE]\n\n")]
    stream = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    api.always = drips(stream + b"".join(chunks) + b"0\r\nX-Trailer: ")
    assert answer_text(chat(app, model="local/k2")) == "half and half"


def test_a_header_with_a_control_character_is_dropped(api_app: Client, api: Api) -> None:
    api.always = api_answers("Hi", x_ratelimit_limit_requests="5\x00", x_ratelimit_remaining_requests="4")
    response = chat(api_app, model="local/k2")
    assert answer_text(response) == "Hi" and response.headers["x-ratelimit-remaining-requests"] == "4"
    assert "x-ratelimit-limit-requests" not in response.headers


def test_oversized_headers_of_an_api_are_dropped(
    api_app: Client, api: Api
) -> None:
    api.always = api_answers("Hi", **{f"x_ratelimit_{number}": "x" * 60_000 for number in range(20)})
    response = chat(api_app, model="local/k2")
    assert answer_text(response) == "Hi" and len(str(response.headers)) < 2000


@json_and_stream
@pytest.mark.parametrize(
    "act",
    [
        pytest.param(api_streams(HALF, REST), id="no DONE"),
        pytest.param(api_streams_then_breaks_off(HALF, REST), id="cut after the finish reason"),
        pytest.param(api_streams_then_hangs(HALF, REST), id="silence after the finish reason"),
        pytest.param(api_streams({"id": "x"}, HALF, {"choices": None}, REST, b"[DONE]"), id="chunks without choices"),
        pytest.param(api_streams_unframed(as_events(HALF, REST)), id="end of the connection"),
        pytest.param(api_streams_unframed(as_events(HALF, REST).rstrip()), id="last event without its newline"),
        pytest.param(api_streams_unframed(b"\xef\xbb\xbf" + as_events(HALF, REST)), id="byte order mark"),
        pytest.param(api_streams_unframed(as_events(HALF, REST).replace(b"\n", b"\r\n")), id="lines that end in CRLF"),
    ],
)
def test_an_answer_with_its_finish_reason_is_complete(
    api_app: Client, api: Api, act: Act, stream: bool
) -> None:
    api.always = act
    response = chat(api_app, model="local/k2", stream=stream)
    if stream:
        assert streamed_text(sse_events(response)) == "half and half" and sse_events(response)[-1] == "[DONE]"
    else:
        assert answer_text(response) == "half and half"


def test_nothing_is_sent_after_done(start_program: StartProgram, api_settings: dict[str, str], api: Api) -> None:
    def act(handler: ApiHandler) -> None:
        api_streams_without_end(HALF, REST, b"[DONE]")(handler)
        handler.server.gate.wait(1)

    api.always = act
    with start_program(**api_settings, SSE_KEEPALIVE="0.05").open_chat(model="local/k2", stream=True) as link:
        assert read_all(link).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"), "no keep-alive comment either"


@json_and_stream
def test_a_client_that_disconnects_early_leaves_no_upstream_connection(
    start_program: StartProgram, api_settings: dict[str, str], api: Api, stream: bool
) -> None:
    received: list[bytes] = []

    def act(handler: ApiHandler) -> None:
        api_streams_without_end(HALF, REST)(handler)
        handler.server.gate.wait(0.3)
        handler.connection.settimeout(PATIENCE)
        try:
            handler.event(b"[DONE]")
            received.append(handler.connection.recv(1))
        except ConnectionError:  # a connection that was closed before [DONE] is reset by it
            received.append(b"")
        handler.close_connection = True

    api.always = act
    program = start_program(before="kimi2api.CLIENT_CHECK_INTERVAL = 5", **api_settings)
    with program.open_chat(model="local/k2", stream=stream) as link:
        wait_for(lambda: api.asked)
        if stream:
            read_until(link, b"half")
    wait_for(lambda: received == [b""])


def test_a_bounded_number_of_adaptations_is_kept(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kimi2api, "MAX_ADAPTATIONS", 2)

    def act(handler: ApiHandler) -> None:
        refused = b'"temperature"' in handler.body
        (api_sends(400, {"error": {"message": "invalid temperature"}}) if refused else api_answers("Hi"))(handler)

    api.always = act
    app = make_app(**api_settings)
    for name in "abcd":
        assert answer_text(chat(app, model=f"local/{name}")) == "Hi"
        assert answer_text(chat(app, model=f"local/{name}", temperature=0)) == "Hi"
    assert len(api.asked) == 12, "one refusal for each model"
    for name in "dca":
        chat(app, model=f"local/{name}", temperature=0)
    assert len(api.asked) == 16, "of these three models, only the last has been evicted"


def test_an_api_that_sends_after_done_does_not_delay_the_end(
    start_program: StartProgram, api_settings: dict[str, str], api: Api
) -> None:
    ended = threading.Event()

    def act(handler: ApiHandler) -> None:
        api_streams_without_end(HALF, REST, b"[DONE]")(handler)
        with suppress(OSError):
            while not handler.server.gate.wait(0.02):
                handler.send(b": ping\n\n")
        ended.set()

    api.always = act
    program = start_program(**api_settings)
    status, body = program.chat(model="local/k2", stream=True)
    assert status == 200 and sse_events(body)[-1] == "[DONE]" and not ended.is_set()
    assert ended.wait(PATIENCE), "the connection is drained only briefly"


def test_a_connection_is_reused_if_the_end_of_its_body_comes_late(
    start_program: StartProgram, api_settings: dict[str, str], api: Api
) -> None:
    connections, ended = set(), []

    def act(handler: ApiHandler) -> None:
        connections.add(handler.client_address)
        api_streams_without_end(HALF, REST, b"[DONE]")(handler)
        handler.server.gate.wait(0.01)
        handler.end()
        ended.append(1)

    api.always = act
    program = start_program(**api_settings)
    for count in range(1, 13):
        assert program.chat(model="local/k2", stream=True)[0] == 200
        wait_for(lambda count=count: len(ended) == count)
    assert len(connections) <= 4


@json_and_stream
def test_truncated_answers_open_the_circuit(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, stream: bool
) -> None:
    api.always = api_streams_then_breaks_off(HALF)
    app = make_app(**api_settings, MAX_RETRIES="0")
    for _ in range(8):
        chat(app, model="local/k2", stream=stream)
    assert len(api.asked) == 5
    assert app.get("/health").json["status"] == "degraded"
    api.always = api_answers("Hi")
    wait_for(lambda: chat(app, model="local/k2").status_int == 200)
    assert app.get("/health").json["status"] == "ok"


def test_chunks_without_choices_keep_the_deadline(make_app: MakeApp, api_settings: dict[str, str], api: Api) -> None:
    def empty_then_drips(handler: ApiHandler) -> None:
        handler.begin_stream()
        handler.event({"choices": []})
        while not handler.server.gate.wait(0.05):
            handler.send(b": wait\n\n")

    api.always = empty_then_drips
    assert_error(chat(make_app(**api_settings, REQUEST_TIMEOUT="0.3"), model="local/k2"), 504, "upstream_timeout")


def test_chunks_without_choices_use_no_memory(
    start_program: StartProgram, api_settings: dict[str, str], api: Api
) -> None:
    def empties(handler: ApiHandler) -> None:
        handler.begin_stream()
        for _ in range(100):
            handler.send(b'data: {"choices": []}\n\n' * 1000)
        handler.event(REST)
        handler.end()

    api.always = empties
    program = start_program(**api_settings)
    before = program.memory(peak=True)
    for stream in (True, False):
        assert program.chat(model="local/k2", stream=stream)[0] == 200
    assert program.memory(peak=True) - before < 15


def test_a_deeply_nested_answer_is_an_invalid_response(api_app: Client, api: Api) -> None:
    for depth in (200, 310, 600, 950):
        deep: Any = 1
        for _ in range(depth):
            deep = {"a": deep}
        api.always = api_answers(deltas=[{"content": "x", "deep": deep}])
        response = chat(api_app, model="local/k2", user="ada")
        assert response.status_int == (200 if depth == 200 else 502), response.text


NO_ARGUMENTS = {"id": "c", "function": {"name": "clock"}}


@pytest.mark.parametrize("call", [{"id": "c"}, NO_ARGUMENTS], ids=["bare", "no arguments"])
def test_an_incomplete_tool_call_breaks_no_session(
    api_app: Client, api: Api, call: dict[str, Any]
) -> None:
    api.always = api_answers(deltas=[{"tool_calls": [{"index": 0, **call}]}], finish="tool_calls")
    assert chat(api_app, model="local/k2", user="ada").status_int == 200
    assert answer_text(chat(api_app, user="ada")) == "Hello from upstream."


@json_and_stream
@pytest.mark.parametrize(
    "choices",
    [
        pytest.param("x", id="choices as text"),
        pytest.param([1], id="a choice as number"),
        pytest.param([{"index": "x", "delta": {}}], id="index as word"),
        pytest.param([{"index": 0, "delta": "x"}], id="delta as text"),
        pytest.param([{"index": 0, "delta": {"content": 5}}], id="content as number"),
        pytest.param([{"index": 0, "delta": {"tool_calls": "x"}}], id="tool calls as text"),
        pytest.param([{"index": 0, "delta": {"tool_calls": [1, 2]}}], id="tool calls as numbers"),
        pytest.param([{"index": 0, "delta": {"tool_calls": {"a": 1}}}], id="tool calls as object"),
        pytest.param([{"index": 0, "delta": {"tool_calls": [{"function": "f"}]}}], id="function as text"),
        pytest.param(
            [{"index": 0, "delta": {"tool_calls": [{"index": 10**4300 - 1, "id": "a"}, {"id": "b"}]}}],
            id="a call's index that nobody can write",
        ),
    ],
)
def test_a_malformed_chunk_is_an_invalid_response(
    api_app: Client, api: Api, choices: Any, stream: bool
) -> None:
    api.always = api_streams({"choices": choices}, REST, b"[DONE]")
    response = chat(api_app, model="local/k2", user="ada", stream=stream)
    assert_error(response, 502, "upstream_invalid_response")


def test_a_field_may_change_its_type_between_chunks(api_app: Client, api: Api) -> None:
    odd = [{"x": "a"}, {"x": 1}, {"x": {"y": "b"}}, {"x": [1]}, {"x": [{"index": 0, "z": "c"}]}, {"x": "d"}]
    api.always = api_answers(deltas=[{"content": "Hi", **delta} for delta in odd])
    assert answer_text(chat(api_app, model="local/k2")) == "Hi" * len(odd)


def test_pieces_of_tool_calls_without_an_index_belong_to_the_last_call(
    api_app: Client, api: Api
) -> None:
    pieces = [
        {"id": "call_a", "type": "function", "function": {"name": "clock", "arguments": ""}},
        {"function": {"arguments": '{"zone":'}},
        {"function": {"arguments": '"UTC"}'}},
        {"id": "call_b", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}},
    ]
    api.always = api_answers(deltas=[{"tool_calls": [piece]} for piece in pieces], finish="tool_calls")
    response = chat(api_app, model="local/k2", user="ada")
    assert tool_calls(response) == [("clock", {"zone": "UTC"}), ("get_weather", {})]
    result = {"role": "tool", "tool_call_id": "call_a", "content": "noon"}
    api.always = api_answers("It is noon.")
    assert answer_text(chat(api_app, messages=[result], model="local/k2", user="ada")) == "It is noon."


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param({"id": ""}, id="empty"),
        pytest.param({"id": "k\ud800"}, id="half a surrogate pair"),
        pytest.param({"id": 5}, id="number"),
        pytest.param({"id": None}, id="null"),
        pytest.param({"name": "k1"}, id="no id"),
        pytest.param("k1", id="a string"),
        pytest.param(None, id="nothing"),
    ],
)
def test_an_invalid_model_in_a_list_hides_no_other(api_app: Client, api: Api, bad: Any) -> None:
    api.list_act = api_sends(200, {"data": [bad, {"id": "k2"}]})
    wait_for(lambda: "local/k2" in [model["id"] for model in api_app.get("/v1/models").json["data"]])


def test_a_short_key_is_hidden_except_inside_words(make_app: MakeApp, api_settings: dict[str, str], api: Api) -> None:
    error = {"message": "The maximum context is 8k; your key is x.", "code": "context_length_exceeded"}
    for key, shown in (("x", "The maximum context is 8k; your key is …."), ("maximum-", "The maximum context is 8k")):
        api.always = api_sends(400, {"error": error})
        response = chat(make_app(**{**api_settings, "LOCAL_API_KEY": key}), model="local/k2")
        assert_error(response, 400, "context_length_exceeded")
        assert shown in response.text
    api.always = api_sends(400, {"error": {"message": "key_sk-theirs_is wrong"}})
    assert "key_…_is wrong" in chat(make_app(**{**api_settings, "LOCAL_API_KEY": "sk-theirs"}), model="local/k2").text


def call_delta(index: Any = 0, id: Any = None, name: Any = None, arguments: Any = None, **more: Any) -> dict[str, Any]:
    """Return a delta with a piece of a tool call, without fields that are None."""
    function = {"name": name, "arguments": arguments}
    function = {key: value for key, value in function.items() if value is not None}
    call = {"index": index, "id": id, "function": function or None, **more}
    return {"tool_calls": [{key: value for key, value in call.items() if value is not None}]}


def stream_message(chunks: list[Any]) -> dict[str, Any]:
    """Build the message as a client that joins all texts of deltas, including ids and names."""
    message: dict[str, Any] = {"tool_calls": {}, "finish": []}
    for chunk in chunks:
        for choice in chunk["choices"] if chunk != "[DONE]" else ():
            for name, value in choice["delta"].items():
                if isinstance(value, str):
                    message[name] = message.get(name, "") + value
            for call in choice["delta"].get("tool_calls") or ():
                known = message["tool_calls"].setdefault(call["index"], {"id": "", "name": "", "arguments": ""})
                known["id"] += call.get("id") or ""
                for name, value in call["function"].items():
                    known[name] += value
            message["finish"] += [choice["finish_reason"]] if choice["finish_reason"] else []
    return {**message, "tool_calls": list(message["tool_calls"].values())}


def json_message(completion: Any) -> dict[str, Any]:
    [choice] = completion["choices"]
    message = {**choice["message"], "finish": [choice["finish_reason"]]}
    calls = message.get("tool_calls") or []
    return {**message, "tool_calls": [{"id": call["id"], **call["function"]} for call in calls]}


CALLED = {"c1": ("a", '{"x":1}'), "c2": ("b", '{"y":2}')}


THINKING = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": "Yes."}]


@pytest.mark.parametrize("form", ["json", "stream", "session"])
@pytest.mark.parametrize(
    ("deltas", "expected"),
    [
        pytest.param(
            [call_delta(0, "c1", "a", ""), call_delta(0, "", "", '{"x":1}')], ["c1"], id="id and name repeated empty"
        ),
        pytest.param(
            [call_delta(0, "c1", "a", '{"x"'), call_delta(0, "c1", "a", ":1}")], ["c1"], id="id and name repeated"
        ),
        pytest.param(
            [call_delta(0, "c1", "", ""), call_delta(0, None, "a", '{"x":1}')], ["c1"], id="name comes second"
        ),
        pytest.param(
            [call_delta(0, "c1", "a", '{"x":1}'), call_delta(0, "c2", "b", '{"y":2}')],
            ["c1", "c2"],
            id="all have index 0",
        ),
        pytest.param(
            [call_delta(None, "c1", "a", '{"x"'), call_delta(None, "c1", None, ":1}")],
            ["c1"],
            id="the same id, no index",
        ),
        pytest.param(
            [
                call_delta(None, "c1", "a", '{"x"'),
                call_delta(None, "c2", "b", ""),
                call_delta(None, "c1", None, ":1}"),
                call_delta(None, "c2", None, '{"y":2}'),
            ],
            ["c1", "c2"],
            id="by turns, no index",
        ),
        pytest.param(
            [
                call_delta(0, "c1", "a", '{"x"'),
                call_delta(1, "c2", "b", ""),
                call_delta(0, None, None, ":1}"),
                call_delta(1, None, None, '{"y":2}'),
            ],
            ["c1", "c2"],
            id="by turns",
        ),
        pytest.param(
            [call_delta("0", "c1", "a", ""), call_delta("0", None, None, '{"x":1}')], ["c1"], id="index as text"
        ),
        pytest.param([call_delta(0, "c1", "a", {"x": 1})], ["c1"], id="arguments as an object"),
        pytest.param(
            [call_delta(0, "c1", "a", None), {"tool_calls": [{"index": 0, "function": {"arguments": '{"x":1}'}}]}],
            ["c1"],
            id="no arguments at first",
        ),
        pytest.param(
            [call_delta(None, "", "a", '{"x":1}'), call_delta(None, "", "b", '{"y":2}')],
            [None, None],
            id="no ids, no indexes",
        ),
        pytest.param(
            [call_delta(0, "", "a", '{"x":1}'), call_delta(0, "", "b", '{"y":2}')], [None, None], id="no ids, index 0"
        ),
        pytest.param(
            [
                {
                    "tool_calls": [
                        {"function": {"name": "a", "arguments": '{"x":1}'}},
                        {"function": {"name": "b", "arguments": '{"y":2}'}},
                    ]
                }
            ],
            [None, None],
            id="in one chunk",
        ),
    ],
)
def test_tool_calls_are_complete_in_every_form_that_apis_send(
    api_app: Client, api: Api, form: str, deltas: list[Any], expected: list[str | None]
) -> None:
    api.always = api_answers(deltas=deltas)
    if form == "stream":
        message = stream_message(sse_events(chat(api_app, model="local/k2", stream=True)))
    else:
        message = json_message(chat(api_app, model="local/k2", user="ada").json)
    calls = message["tool_calls"]
    assert [(call["name"], call["arguments"]) for call in calls] == list(CALLED.values())[:len(expected)]
    assert message["finish"] == ["tool_calls"], "even if the API sends stop"
    ids = [call["id"] for call in calls]
    assert all(ids) and len(set(ids)) == len(ids)
    assert [known and id for id, known in zip(ids, expected, strict=True)] == expected
    if form == "session":
        api.always = api_answers("ok")
        results = [{"role": "tool", "tool_call_id": id, "content": "r"} for id in ids]
        assert answer_text(chat(api_app, messages=results, model="local/k2", user="ada")) == "ok"
        sent = api.asked[-1][2]["messages"][1]["tool_calls"]
        assert [(call["id"], call["function"]["name"]) for call in sent] == [(c["id"], c["name"]) for c in calls]


def test_extra_fields_of_a_call_are_kept_and_sent_back(api_app: Client, api: Api) -> None:
    signature = {"google": {"thought_signature": "AY89"}}

    def sent_back(**more: Any) -> Any:
        result = {"role": "tool", "tool_call_id": "c1", "content": "r"}
        chat(api_app, messages=[*more.pop("messages", []), result], model="local/k2", **more)
        return api.asked[-1][2]["messages"][1]["tool_calls"][0].get("extra_content")

    api.always = api_answers(deltas=[call_delta(0, "c1", "a", "{}", extra_content=signature)])
    message = chat(api_app, "x", model="local/k2", user="ada").json["choices"][0]["message"]
    assert message["tool_calls"][0]["extra_content"] == signature
    assert sent_back(user="ada") == signature
    del message["tool_calls"][0]["extra_content"]  # a client that drops unknown fields
    assert sent_back(messages=[{"role": "user", "content": "x"}, message]) == signature


@json_and_stream
@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        pytest.param(
            [api_chunk({"content": "x"}), api_chunk({"role": "", "content": "y"}), api_chunk({"role": ""}, "stop")],
            {"content": "xy"}, id="empty roles"),
        pytest.param(
            [api_chunk({"content": "x"}), api_chunk({"content": "y"}),
             {"choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "xy"}}]}],
            {"content": "xy"}, id="the whole message at the end"),
        pytest.param(
            [api_chunk(call_delta(0, "c1", "a", '{"x":1}')),
             {"choices": [{"index": 0, "finish_reason": "tool_calls", "message": {"tool_calls": [WHOLE_CALL]}}]}],
            {"tool_calls": [{"id": "c1", "name": "a", "arguments": '{"x":1}'}]}, id="the whole call at the end"),
        pytest.param(
            [api_chunk({"content": THINKING}, "stop")], {"content": "Yes.", "reasoning_content": "Hm."},
            id="parts of content"),
        pytest.param([api_chunk({"content": "x"}), api_chunk({}, "")], {"content": "x"}, id="an empty finish reason"),
        pytest.param([api_chunk({"content": "x"})], {"content": "x"}, id="no finish reason"),
        pytest.param(
            [{"choices": [], "prompt_filter_results": []}, api_chunk({"content": "x"}, "stop")], {"content": "x"},
            id="no choices at first"),
    ],
)
def test_answers_are_complete_in_every_form_that_apis_send(
    api_app: Client, api: Api, chunks: list[Any], expected: dict[str, Any], stream: bool
) -> None:
    api.always = api_streams(*chunks, b"[DONE]")
    response = chat(api_app, model="local/k2", stream=stream)
    message = stream_message(sse_events(response)) if stream else json_message(response.json)
    assert {name: message.get(name) for name in expected} == expected
    assert message["finish"] == ["tool_calls" if "tool_calls" in expected else "stop"]
    if stream:
        assert all(chunk == "[DONE]" or chunk["choices"] for chunk in sse_events(response)), (
            "the request did not include usage"
        )


def test_a_repeated_role_is_sent_once(api_app: Client, api: Api) -> None:
    deltas = [{"role": "assistant", "content": "x"}, {"role": "assistant", "content": "y"}]
    api.always = api_answers(deltas=deltas)
    *chunks, _ = sse_events(chat(api_app, model="local/k2", stream=True))
    roles = [choice["delta"].get("role") for chunk in chunks for choice in chunk["choices"]]
    assert list(filter(None, roles)) == ["assistant"], "openai-python would read assistantassistant"


def test_parts_that_are_neither_text_nor_thinking_are_kept(api_app: Client, api: Api) -> None:
    reference = {"type": "reference", "reference_ids": [1]}
    api.always = api_answers(deltas=[{"content": [{"type": "text", "text": "x"}, reference]}, {"content": "y"}])
    message = chat(api_app, model="local/k2").json["choices"][0]["message"]
    assert message["content"] == "xy" and message["content_parts"] == [reference]


def test_fields_that_do_not_grow_keep_their_last_value(api_app: Client, api: Api) -> None:
    details = [{"type": "reasoning.text", "format": "f1", "index": 0, **more}
               for more in ({"text": "Let"}, {"text": " me"}, {"signature": "Et8B"})]
    deltas = [{"channel": "final", "reasoning_details": [detail]} for detail in details]
    chunks = [api_chunk(delta, citations=["u"]) for delta in deltas]
    api.always = api_streams(*chunks, api_chunk({"content": "x"}, "stop"), b"[DONE]")
    answer = chat(api_app, model="local/k2").json
    message = answer["choices"][0]["message"]
    assert answer["citations"] == ["u"] and message["channel"] == "final"
    joined = {"type": "reasoning.text", "format": "f1", "index": 0, "text": "Let me", "signature": "Et8B"}
    assert message["reasoning_details"] == [joined]


@json_and_stream
def test_a_complete_json_answer_may_replace_a_stream(
    api_app: Client, api: Api, stream: bool
) -> None:
    message = {"role": "assistant", "content": "ok", "tool_calls": [WHOLE_CALL]}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    api.always = api_sends(200, {"id": "x", "choices": [choice], "usage": USAGE})
    response = chat(api_app, model="local/k2", stream=stream)
    whole = stream_message(sse_events(response)) if stream else json_message(response.json)
    assert (whole["content"], whole["finish"]) == ("ok", ["tool_calls"])
    assert whole["tool_calls"] == [{"id": "c1", "name": "a", "arguments": '{"x":1}'}]


@pytest.mark.parametrize(
    "chunk",
    [
        {"index": 0.0, "delta": {"content": "x"}, "finish_reason": None},
        {"index": "0", "delta": {"content": "x"}, "finish_reason": None},
    ],
)
def test_an_index_may_be_a_float_or_a_string(api_app: Client, api: Api, chunk: Any) -> None:
    api.always = api_streams({"choices": [chunk]}, api_chunk({"content": "y"}, "stop"), b"[DONE]")
    assert answer_text(chat(api_app, model="local/k2")) == "xy"
    assert [
        event["choices"][0]["index"] for event in sse_events(chat(api_app, model="local/k2", stream=True))[:-1]
    ] == [0, 0]


@json_and_stream
def test_the_client_receives_a_custom_call_with_reasoning(
    api_app: Client, api: Api, stream: bool
) -> None:
    call = {"id": "c1", "type": "custom", "custom": {"name": "x", "input": "hi"}}
    api.always = api_answers(deltas=[{"reasoning_content": "why"}, {"tool_calls": [{"index": 0, **call}]}])
    response = chat(api_app, model="local/k2", stream=stream, user="ada")
    if stream:
        assert sse_events(response)[-1] == "[DONE]"
    else:
        assert response.json["choices"][0]["message"]["tool_calls"] == [call]
    assert api_app.get("/v1/sessions/ada", expect_errors=True).status_int == 404, (
        "APIs would refuse it in later requests"
    )
    assert respond(api_app, model="local/k2", stream=stream).status_int == 200


@json_and_stream
def test_lone_surrogates_in_arguments_are_harmless(
    api_app: Client, api: Api, stream: bool
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x":"\\ud83d"}'}}
    api.always = api_answers(deltas=[{"reasoning_content": "why"}, {"tool_calls": [{"index": 0, **call}]}])
    response = chat(api_app, model="local/k2", stream=stream)
    if stream:
        assert sse_events(response)[-1] == "[DONE]"
    else:
        assert response.json["choices"][0]["message"]["tool_calls"] == [call]
    api.always = api_answers("ok")
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "r"},
    ]
    assert answer_text(chat(api_app, messages=messages, model="local/k2")) == "ok"
    assert api.asked[-1][2]["messages"][1]["reasoning_content"] == "why"


def test_a_json_answer_may_follow_empty_lines(make_app: MakeApp, api_settings: dict[str, str], api: Api) -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}

    def act(handler: ApiHandler) -> None:
        handler.head(200, {"Content_Type": "application/json", "Transfer_Encoding": "chunked"})
        for data in (b"\n\n", b"\n", json.dumps({"choices": [choice]}).encode()):
            handler.send(data)
            time.sleep(0.02)
        handler.end()

    api.always = act
    assert answer_text(chat(make_app(**api_settings, MAX_RETRIES="0"), model="local/k2")) == "ok"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(
            as_events({"choices": [{"index": 0, "delta": {"tool_calls": [
                {"index": 0, "function": {"arguments": "x" * 40}}] * 40_000}}]}) * 2,
            id="pieces of a call without a name",
        ),
        pytest.param(
            as_events({"choices": [{"index": 0, "delta": {"content": [
                {"type": "text", "text": "x" * 40}] * 50_000}}]}) * 2,
            id="parts of a text",
        ),
        pytest.param(as_events(*({f"k{number}": 1} for number in range(20_000))), id="chunks without choices"),
    ],
)
def test_folding_many_pieces_takes_linear_time(api_app: Client, api: Api, body: bytes) -> None:
    def act(handler: ApiHandler) -> None:
        handler.begin_stream()
        handler.send(body)
        handler.event(api_chunk({"content": "."}, "stop"))
        handler.end()

    api.always = act
    began = time.monotonic()
    assert answer_text(chat(api_app, model="local/k2")).endswith(".")
    assert time.monotonic() - began < 6


def test_reasoning_of_many_choices_is_stored_once_each(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = []
    monkeypatch.setattr(kimi2api.Sessions, "store_reasoning", lambda *of: stored.append(of))
    chunks = []
    for index in range(9):
        delta = {"reasoning_content": "r", **call_delta(0, f"c{index}", "f", "{}")}
        chunks.append({"choices": [{"index": index, "delta": delta, "finish_reason": None}]})
    chunks += [{"choices": [{"index": index, "delta": {}, "finish_reason": "tool_calls"}]} for index in range(9)]
    api.always = api_streams(*chunks, b"[DONE]")
    assert chat(make_app(**api_settings), model="local/k2", n=9).status_int == 200
    assert len(stored) == 9


def test_an_embedding_of_nan_is_an_invalid_response(api_app: Client, api: Api) -> None:
    encoded = b64encode(struct.pack("<f", float("nan"))).decode()
    api.always = api_sends(200, {"data": [{"index": 0, "embedding": encoded}]})
    assert_error(embed(api_app, model="local/e1"), 502, "upstream_invalid_response")
    assert embed(api_app, model="local/e1", encoding_format="base64").json["data"][0]["embedding"] == encoded


def test_details_with_and_without_an_index_are_all_kept(api_app: Client, api: Api) -> None:
    details = [{"text": "a", "index": 0}, {"data": "x"}, {"text": "b", "index": 0}, {"text": "c", "index": -1}]
    api.always = api_answers(deltas=[{"reasoning_details": [entry]} for entry in details])
    message = chat(api_app, model="local/k2").json["choices"][0]["message"]
    assert message["reasoning_details"] == [{"text": "ab", "index": 0}, {"data": "x"}, {"text": "c", "index": -1}]


def test_usage_with_lists_is_an_answer(api_app: Client, api: Api) -> None:
    usage = {**USAGE, "audio": {"data": [1]}, "logprobs": {"content": [{"x": 1}]}}
    api.always = api_streams(api_chunk({"content": "x"}, "stop"), {"choices": [], "usage": usage}, b"[DONE]")
    assert chat(api_app, model="local/k2").json["usage"] == usage


@json_and_stream
@pytest.mark.parametrize("nothing", [None, [], {}, 0, False, ""])
def test_empty_tool_calls_end_no_call(
    api_app: Client, api: Api, nothing: Any, stream: bool
) -> None:
    deltas = [
        {"reasoning_content": "r"},
        call_delta(0, "c1", "a", "{"),
        {"tool_calls": nothing},
        call_delta(0, None, None, "}"),
    ]
    extra = {"tool_calls": [{"index": 0, "extra_content": {"google": 1}}]}
    api.always = api_answers(deltas=[*deltas, extra], finish="tool_calls")
    response = chat(api_app, model="local/k2", stream=stream)
    whole = stream_message(sse_events(response)) if stream else json_message(response.json)
    assert whole["tool_calls"] == [{"id": "c1", "name": "a", "arguments": "{}"}]


@pytest.mark.parametrize("place", ["choice", "chunk", "both"])
def test_usage_is_sent_once(api_app: Client, api: Api, place: str) -> None:
    finish = api_chunk({}, "stop")
    if place != "chunk":
        finish["choices"][0]["usage"] = USAGE
    last = [] if place == "choice" else [{**api_chunk(), "choices": [], "usage": USAGE}]
    api.always = api_streams(api_chunk({"content": "x"}), finish, *last, b"[DONE]")
    chunks = sse_events(chat(api_app, model="local/k2", stream=True, stream_options={"include_usage": True}))[:-1]
    assert [chunk["usage"] for chunk in chunks if chunk.get("usage")] == [USAGE]
    assert chunks[-1]["choices"] == [] and not any("usage" in chunk["choices"][0] for chunk in chunks[:-1])


def test_a_total_above_the_sum_is_counted(api_app: Client, api: Api) -> None:
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 40}
    api.always = api_streams(api_chunk({"content": "x"}, "stop"), {"choices": [], "usage": usage}, b"[DONE]")
    assert chat(api_app, model="local/k2").json["usage"] == usage
    assert tokens_today(api_app) == (10, 30)


@pytest.mark.parametrize("field", ["reasoning", "reasoning_details"])
def test_reasoning_under_any_name_returns_under_its_name(
    api_app: Client, api: Api, field: str
) -> None:
    value: Any = "why" if field == "reasoning" else [{"type": "reasoning.text", "text": "why", "index": 0}]
    api.always = api_answers(deltas=[{field: value}, call_delta(0, "c1", "a", "{}")])
    tools = [{"type": "function", "name": "a"}]
    include = ["reasoning.encrypted_content"]
    response = respond(api_app, "x", model="local/k2", tools=tools, include=include).json
    reasoning, call = response["output"]
    assert (reasoning["type"], reasoning["content"][0]["text"], call["type"]) == ("reasoning", "why", "function_call")
    result = {"type": "function_call_output", "call_id": "c1", "output": "r"}
    items = [{"role": "user", "content": "x"}, {**reasoning, "content": None}, call, result]
    api.always = api_answers("ok")
    for request in ({"input": items, "store": False}, {"input": [result], "previous_response_id": response["id"]}):
        assert respond(api_app, model="local/k2", tools=tools, **request).status_int == 200
        assert api.asked[-1][2]["messages"][1][field] == value
    # A client that drops the reasoning
    api.always = api_answers(deltas=[{field: value}, call_delta(0, "c2", "a", "{}")])
    message = chat(api_app, "y", model="local/k2", tools=[tool("a")]).json["choices"][0]["message"]
    assert message.pop(field) == value
    result = {"role": "tool", "tool_call_id": "c2", "content": "r"}
    chat(api_app, messages=[{"role": "user", "content": "y"}, message, result], model="local/k2", tools=[tool("a")])
    assert api.asked[-1][2]["messages"][1][field] == value


DETAILS = [{"type": "reasoning.text", "format": "f", "index": 0, "text": "I see it", "signature": "Et8B"}]


@pytest.mark.parametrize(
    ("sent", "goes_back"),
    [
        pytest.param({"reasoning_content": "I see it"}, True, id="under another name"),
        pytest.param({"reasoning": " it"}, True, id="only the last piece"),
        pytest.param({"reasoning_details": [{**DETAILS[0], "format": "fff"}]}, True, id="details joined wrongly"),
        pytest.param({"reasoning": None}, True, id="null"),
        pytest.param({"reasoning": ""}, False, id="empty"),
        pytest.param({"reasoning": "I see it!"}, False, id="another text"),
    ],
)
def test_reasoning_that_clients_altered_is_restored(
    api_app: Client, api: Api, sent: Any, goes_back: bool
) -> None:
    reasoning = [{"reasoning": text, "reasoning_details": [{**DETAILS[0], "text": text}]} for text in ("I see", " it")]
    api.always = api_answers(deltas=[*reasoning, call_delta(0, "c1", "a", "{}")])
    question = {"role": "user", "content": "x"}
    message = chat(api_app, messages=[question], model="local/k2", tools=[tool("a")]).json["choices"][0]["message"]
    message = {name: value for name, value in message.items() if not name.startswith("reasoning")}
    result = {"role": "tool", "tool_call_id": "c1", "content": "r"}
    chat(api_app, messages=[question, {**message, **sent}, result], model="local/k2", tools=[tool("a")])
    arrived = api.asked[-1][2]["messages"][1]
    arrived = {name: value for name, value in arrived.items() if name.startswith("reasoning")}
    assert arrived == ({"reasoning": "I see it", "reasoning_details": DETAILS} if goes_back else sent)


@pytest.mark.parametrize(
    ("event", "status", "code"),
    [
        ({"error": {"message": "m", "code": "rate_limit_exceeded"}}, 429, "rate_limit_exceeded"),
        ({"error": {"message": "m", "type": "insufficient_quota"}}, 429, "upstream_rate_limited"),
        ({"error": {"message": "m", "code": 402}}, 402, "402"),
        ({"error": {"message": "m", "status_code": 400, "type": "invalid_request_error"}}, 400, None),
        ({"error": {"message": "m", "code": "context_length_exceeded"}}, 400, "context_length_exceeded"),
        ({"error": {"message": "m", "status": "INVALID_ARGUMENT"}}, 400, None),
        ({"error": "m"}, 502, "upstream_unavailable"),
        ({"object": "error", "message": "m", "code": 503}, 503, "503"),
        ({"base_resp": {"status_code": 2013, "status_msg": "m"}}, 400, None),
        ({"base_resp": {"status_code": 1000, "status_msg": "m"}}, 502, "upstream_unavailable"),
        ({"code": "Throttling.RateQuota", "message": "m", "request_id": "r"}, 429, "Throttling.RateQuota"),
    ],
)
def test_an_error_inside_a_stream_is_an_error_with_its_status(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, event: Any, status: int, code: str | None
) -> None:
    app = make_app(**api_settings, MAX_RETRIES="0")
    api.always = api_streams(event)
    assert_error(chat(app, model="local/k2"), status, code)
    assert_error(chat(app, model="local/k2", stream=True), status, code)
    api.always = api_sends(200, event)
    assert_error(chat(app, model="local/k2"), status, code)
    api.always = api_streams(api_chunk({"content": "half"}), event)
    assert_error(chat(app, model="local/k2"), status, code)
    *_, last = sse_events(chat(app, model="local/k2", stream=True))
    assert last["error"]["code"] == code, "no [DONE] follows"
    api.always = api_answers("ok")
    if status < 500:
        assert answer_text(chat(app, model="local/k2")) == "ok", "the circuit breaker has not opened"


def test_an_error_after_the_finish_reason_may_carry_the_usage(api_app: Client, api: Api) -> None:
    late = {"error": {"message": "m", "code": 502}, "usage": USAGE}
    api.always = api_streams(api_chunk({"content": "x"}, "stop"), late)
    answer = chat(api_app, model="local/k2").json
    assert answer["choices"][0]["message"]["content"] == "x" and answer["usage"] == USAGE


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        ("stop", "completed"),
        ("length", "incomplete"),
        ("model_context_window_exceeded", "incomplete"),
        ("sensitive", "incomplete"),
        ("insufficient_system_resource", "failed"),
        ("network_error", "failed"),
    ],
)
@json_and_stream
def test_a_partial_answer_is_never_a_completed_response(
    api_app: Client, api: Api, reason: str, status: str, stream: bool
) -> None:
    api.always = api_answers("half", finish=reason)
    response = respond(api_app, model="local/k2", stream=stream)
    final = response_events(response)[-1]["response"] if stream else response.json
    assert final["status"] == status and bool(final["error"]) == (status == "failed")


def test_reasoning_alone_is_not_remembered(api_app: Client, api: Api) -> None:
    api.always = api_answers(deltas=[{"reasoning_content": "long"}], finish="length")
    chat(api_app, "x", model="local/k2", user="ada")
    previous = respond(api_app, "x", model="local/k2").json["id"]
    api.always = api_answers("ok")
    chat(api_app, "y", model="local/k2", user="ada")
    assert [message["content"] for message in api.asked[-1][2]["messages"]] == ["y"]
    respond(api_app, "y", model="local/k2", previous_response_id=previous)
    assert [message["content"] for message in api.asked[-1][2]["messages"]] == ["x", "y"]


OVERFLOWS = [
    "request (4267 tokens) exceeds the available context size (4096 tokens), try increasing it",
    "Range of input length should be [1, 129024]",
    "The input (300000 tokens) is longer than the model's context length (262144 tokens).",
    "prompt is too long: 210000 tokens > 200000 maximum",
    "prompt too long; exceeded max context length by 7 tokens",
    "total length of all messages is too long",
    "Your request exceeded model token limit: 262144 (requested: 265537)",
    "This model's maximum prompt length is 131072 but the request contains 140000 tokens.",
    "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).",
]


@pytest.mark.parametrize("words", OVERFLOWS)
def test_every_wording_of_an_overflow_has_openais_code(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, words: str
) -> None:
    app = make_app(**api_settings, FALLBACK_MODELS="kimi")
    api.always = api_fails(400, words)
    assert chat(app, model="local/k2").headers["X-Kimi2api-Provider"] == "kimi"
    app = make_app(**api_settings)
    response = chat(app, model="local/k2")
    assert_error(response, 400, "context_length_exceeded")
    assert "context_length_exceeded" in response.json["error"]["message"], "LangChain looks for it there"
    api.always = api_streams(api_chunk({"content": "half"}), {"error": {"message": words, "code": 500}})
    failed = sse_events(respond(app, model="local/k2", stream=True))[-1]
    assert failed["response"]["error"]["code"] == "context_length_exceeded", "Codex would ask five times more"


def test_an_invalid_max_tokens_is_no_overflow(api_app: Client, api: Api) -> None:
    api.always = api_fails(400, "max_tokens is too large: 999999. This model supports at most 16384 completion tokens")
    assert_error(chat(api_app, model="local/k2", max_tokens=999999), 400, None)
    assert len(api.asked) == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"error": {"message": "Provider returned error", "metadata": {"raw": '{"m":"the reason"}'}}}, "the reason"),
        ({"error": {"message": "Failed to call a function", "failed_generation": "<f>the reason"}}, "the reason"),
        ({"error": {"error": {"message": "the reason", "code": "x"}}}, "local: the reason"),
        ({"base_resp": {"status_code": 2013, "status_msg": "the reason"}}, "the reason"),
        ({"detail": "the reason"}, "the reason"),
        ({"detail": [{"loc": ["body", "x"], "msg": "the reason"}]}, "the reason"),
        ({"code": "InvalidParameter", "message": "the reason"}, "the reason"),
        ([{"error": {"code": 400, "message": "the reason", "status": "INVALID_ARGUMENT"}}], "the reason"),
    ],
)
def test_the_reason_of_an_error_is_found_in_every_shape(
    api_app: Client, api: Api, body: Any, words: str
) -> None:
    api.always = api_sends(400, body)
    assert words in chat(api_app, model="local/k2").json["error"]["message"]


@pytest.mark.parametrize("status", [402, 403])
def test_a_refused_account_falls_back_to_another_model(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, status: int
) -> None:
    api.always = api_fails(status, "Insufficient Balance", type="unknown_error")
    response = chat(make_app(**api_settings), model="local/k2")
    assert_error(response, status, None, "unknown_error")
    assert "Insufficient" in response.json["error"]["message"]
    assert (
        chat(make_app(**api_settings, FALLBACK_MODELS="kimi"), model="local/k2").headers["X-Kimi2api-Provider"]
        == "kimi"
    )


def test_a_wrong_key_of_an_api_is_an_upstream_auth_error(api_app: Client, api: Api) -> None:
    api.always = api_fails(400, "Incorrect API key provided: xai-…")
    response = chat(api_app, model="local/k2")
    assert_error(response, 502, "upstream_auth")
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(("headers", "seconds"), [({"retry_after_ms": "1500"}, "2"), ({"Retry_After": "7.5"}, "8")])
def test_retry_after_is_rounded_up_to_whole_seconds(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, headers: dict[str, str], seconds: str
) -> None:
    api.always = api_sends(429, {"error": {"message": "slow"}}, **headers)
    assert chat(make_app(**api_settings, MAX_RETRIES="0"), model="local/k2").headers["Retry-After"] == seconds


def test_an_exhausted_quota_is_not_retried(api_app: Client, api: Api) -> None:
    api.always = api_sends(429, {"error": {"message": "m", "type": "exceeded_current_quota_error"}}, Retry_After="1")
    response = chat(api_app, model="local/k2")
    assert_error(response, 429, "upstream_rate_limited")
    assert response.headers["x-should-retry"] == "false"
    assert len(api.asked) == 1


def test_each_model_has_its_own_circuit_breaker(
    make_app: MakeApp, api_settings: dict[str, str], api: Api
) -> None:
    def act(handler: ApiHandler) -> None:
        body = json.loads(handler.body)
        asked = body["messages"][0]["content"]
        (api_fails(500, f"cannot read {asked}") if body["model"] == "bad" else api_answers("ok"))(handler)

    api.always = act
    app = make_app(**api_settings, MAX_RETRIES="0")
    for _ in range(5):
        assert "my secret" in chat(app, "my secret", model="local/bad").json["error"]["message"]
    response = chat(app, "another's", model="local/bad")
    assert_error(response, 500, "upstream_unavailable")
    assert "Retry-After" in response.headers
    assert "secret" not in response.text and len(api.asked) == 5
    assert answer_text(chat(app, model="local/good")) == "ok"


def test_an_apis_own_code_is_no_label_of_metrics(make_app: MakeApp, api_settings: dict[str, str], api: Api) -> None:
    api.always = api_sends(502, {"error": {"message": "down", "code": "upstream_4711"}})
    app = make_app(**api_settings, MAX_RETRIES="0")
    assert_error(chat(app, model="local/k2"), 502, "upstream_4711")
    assert 'kimi2api_upstream_errors_total{provider="local",code="http_502"} 1' in app.get("/metrics").text


def test_an_old_failure_does_not_degrade_health(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kimi2api, "FAILING_MAX_AGE", 0.2)
    app = make_app(**api_settings, MAX_RETRIES="0")
    api.always = api_fails(500, "no such model")
    chat(app, model="local/made-up")
    assert app.get("/health").json["upstreams"]["local"]["reason"] == "upstream_unavailable (500)"
    wait_for(lambda: app.get("/health").json["status"] == "ok")
    assert 'kimi2api_upstream_healthy{provider="local"} 1' in app.get("/metrics").text


@pytest.mark.parametrize("sends_base64", [False, True])
@pytest.mark.parametrize("wanted", [None, "float", "base64"])
def test_embeddings_have_the_requested_encoding(
    api_app: Client, api: Api, wanted: str | None, sends_base64: bool
) -> None:
    numbers = [0.5, -0.25]
    encoded = b64encode(struct.pack("<2f", *numbers)).decode()
    api.always = api_sends(200, {"data": [{"index": 0, "embedding": encoded if sends_base64 else numbers}]})
    body = {"encoding_format": wanted} if wanted else {}
    [entry] = embed(api_app, model="local/e1", **body).json["data"]
    assert entry["embedding"] == (encoded if wanted == "base64" else numbers)


def test_a_refusal_of_embeddings_changes_nothing_of_a_chat(api_app: Client, api: Api) -> None:
    refusal = api_fails(400, "system: invalid schema, missing reasoning_content")

    def act(handler: ApiHandler) -> None:
        body = json.loads(handler.body)
        is_adapted = message_roles(body)[0] == "system" if "messages" in body else False
        (api_answers("ok") if is_adapted else refusal)(handler)

    api.always = act
    assert answer_text(chat(api_app, messages=SYSTEM_LATER[1:], model="local/k2")) == "ok"
    asked = len(api.asked)
    assert embed(api_app, model="local/k2").status_int == 400 and len(api.asked) == asked + 1


def test_embeddings_are_encoded_here_if_an_api_refuses_base64(api_app: Client, api: Api) -> None:
    def act(handler: ApiHandler) -> None:
        refusal = api_fails(400, "encoding_format only supports float", param="encoding_format")
        is_refused = json.loads(handler.body).get("encoding_format") == "base64"
        (refusal if is_refused else api_sends(200, {"data": [{"index": 0, "embedding": [0.5] * 8}]}))(handler)

    api.always = act
    for asked in (2, 3):
        response = embed(api_app, model="local/e1", encoding_format="base64")
        assert len(b64decode(response.json["data"][0]["embedding"])) == 32
        assert "X-Kimi2api-Ignored" not in response.headers and len(api.asked) == asked


# ----------------------------------------------------------------------------------------------------------------------
# Models and fallback
# ----------------------------------------------------------------------------------------------------------------------


def test_models_are_listed_and_their_creation_is_stable(make_app: MakeApp) -> None:
    app = make_app()
    listed = app.get("/v1/models").json
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["kimi", "kimi-k2-instruct-0905", "kimi-k2-instruct"]
    for model in listed["data"]:
        assert set(model) == {"id", "object", "created", "owned_by"} and model["object"] == "model"
        assert app.get(f"/v1/models/{model['id']}").json == model
    assert make_app().get("/v1/models").json == listed


def test_a_star_accepts_any_model_and_the_answer_has_its_name(make_app: MakeApp, kimi: WebChat) -> None:
    app = make_app(MODELS="kimi=a/b,*=c/d", DEFAULT_MODEL="whatever")
    assert chat(app, model="gpt-4o").json["model"] == "gpt-4o"
    assert chat(app).json["model"] == "whatever"
    assert [post["model"] for post in kimi.posts] == ["c/d", "c/d"]
    assert [model["id"] for model in app.get("/v1/models").json["data"]] == ["kimi"]


def test_models_resolve_by_table_then_provider_then_web_chat(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, kimi: WebChat
) -> None:
    app = make_app(**api_settings, MODELS="kimi=moonshotai/K2,gpt-4o=local/k2,mini=gpt-4o,far=mini,*=kimi")
    for model, provider, own_name in (
        ("gpt-4o", "local", "k2"),
        ("mini", "local", "k2"),
        ("far", "kimi", "gpt-4o"),  # one step through the table, no more
        ("kimi", "kimi", "moonshotai/K2"),
        ("anything", "kimi", "moonshotai/K2"),
        ("local/z", "local", "z"),
        ("other/z", "kimi", "moonshotai/K2"),
    ):
        response = chat(app, model=model)
        assert response.headers["X-Kimi2api-Provider"] == provider and response.json["model"] == model
        assert (api.asked[-1][2]["model"] if provider == "local" else kimi.posts[-1]["model"]) == own_name


def test_a_slow_list_of_models_does_not_delay_the_others(
    make_app: MakeApp, api_settings: dict[str, str], api: Api
) -> None:
    app = make_app(**api_settings)

    def listed_of_api() -> list[Any]:
        return [model for model in app.get("/v1/models").json["data"] if model["id"].startswith("local/")]

    listed = wait_for(listed_of_api)
    assert listed == [{"id": "local/k2", "object": "model", "created": 7, "owned_by": "them"}]
    app.get("/v1/models")
    assert len(api.listed) == 1, "the list is kept"
    assert app.get("/v1/models/local/k2").json == listed[0]
    assert_error(app.get("/v1/models/local/other"), 404, "model_not_found")
    api.list_act = hangs
    began = time.monotonic()
    aliases = ",".join(f"m{number}=local/k2" for number in range(30))
    assert len(make_app(**api_settings, MODELS=f"kimi=a/b,{aliases}").get("/v1/models").json["data"]) == 31
    assert time.monotonic() - began < PATIENCE / 2, "one wait covers all lists"


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(sends(500), id="500"),
        pytest.param(sends(403, JUST_A_MOMENT), id="challenge"),
        pytest.param(sends(429), id="429"),
        pytest.param(sends(200, "?"), id="no JSON"),
        pytest.param(resets, id="reset"),
        pytest.param(hangs, id="silence"),
        pytest.param(None, id="prompt too long"),
    ],
)
@json_and_stream
def test_a_failing_web_chat_falls_back_to_the_next_model(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, kimi: WebChat, fault: Any, stream: bool
) -> None:
    timeout = "0.3" if fault is hangs else "20"
    app = make_app(
        **api_settings, FALLBACK_MODELS="local/k2", REQUEST_TIMEOUT=timeout, MAX_RETRIES="0", CONTEXT_MAX_LENGTH="20"
    )
    kimi.always = fault or web_chat_answers
    response = chat(app, "Hello" if fault else "x" * 30, stream=stream)
    assert response.status_int == 200 and response.headers["X-Kimi2api-Provider"] == "local"
    if stream:
        assert {chunk["model"] for chunk in sse_events(response)[:-1]} == {"local/k2"}
        assert streamed_text(sse_events(response)) == "Hi from the API."
    else:
        assert answer_text(response) == "Hi from the API." and response.json["model"] == "local/k2"
    kimi.gate.set()
    kimi.always = web_chat_answers
    response = chat(app)
    assert response.json["model"] == "kimi" and response.headers["X-Kimi2api-Provider"] == "kimi"


def test_an_api_that_fails_before_the_first_delta_falls_back(
    make_app: MakeApp, api_settings: dict[str, str], api: Api
) -> None:
    api.gate.set()
    app = make_app(**api_settings, FALLBACK_MODELS="kimi")
    api.always = api_streams_half_then(ends=False)
    assert chat(app, model="local/k2").json["model"] == "kimi", "a JSON answer is sent only when complete"
    only_role = api_chunk({"role": "assistant"})
    for act in (api_sends(200, {"choices": []}), api_streams(b"[DONE]"), api_streams(only_role)):
        api.always = act
        assert streamed_text(sse_events(chat(app, model="local/k2", stream=True))) == "Hello from upstream."
        assert chat(app, model="local/k2").headers["X-Kimi2api-Provider"] == "kimi"


def test_an_invalid_request_never_falls_back(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, kimi: WebChat
) -> None:
    app = make_app(**api_settings, FALLBACK_MODELS="local/k2,kimi", MAX_RETRIES="0")
    assert_error(chat(app, [{"type": "image_url", "image_url": {}}]), 400, "unsupported_value")
    assert not api.asked
    kimi.always, api.always = sends(500), api_sends(401, b"no")
    response = chat(app)
    assert_error(response, 502, "upstream_unavailable")
    assert "local/k2" in response.json["error"]["message"]
    assert len(kimi.posts) == len(api.asked) == 1


def test_each_waiting_chat_receives_its_own_error(
    make_app: MakeApp, api_settings: dict[str, str], api: Api, kimi: WebChat
) -> None:
    app = make_app(**api_settings, FALLBACK_MODELS="local/k2", MAX_RETRIES="0")
    kimi.page_script.append(at_the_gate(sends(200, "no nonce")))
    api.always = api_sends(402, {"error": {"message": "pay"}})
    with ThreadPoolExecutor(5) as pool:
        chats = [pool.submit(chat, app) for _ in range(5)]
        wait_for(lambda: app.get("/health").json["chats"]["running"] == 5 and kimi.pages)
        wait_until_still()  # one chat fetches, four wait
        kimi.gate.set()
        assert [done.result().text.count("pay") for done in chats] == [1] * 5
    assert len(kimi.pages) == 1


########################################################################################################################
# Part 7: Application
########################################################################################################################


# ----------------------------------------------------------------------------------------------------------------------
# Clients, chats
# ----------------------------------------------------------------------------------------------------------------------


def test_sessions_span_the_web_chat_and_an_api(api_app: Client, api: Api, kimi: WebChat) -> None:
    chat(api_app, "first", user="ada", model="local/k2", stream=True)
    chat(api_app, "second", user="ada")
    assert kimi.posts[-1]["message"] == "用户: first\n模型: Hi from the API.\n用户: second"
    third = [{"role": "system", "content": "S"}, {"role": "user", "content": "third"}]
    chat(api_app, messages=third, user="ada", model="local/k2")
    contents = [message["content"] for message in api.asked[-1][2]["messages"]]
    assert contents == ["S", "first", "Hi from the API.", "second", kimi.answer, "third"]


def test_a_failed_request_records_nothing(make_app: MakeApp, kimi: WebChat) -> None:
    app = make_app(MAX_RETRIES="0")
    kimi.script.append(sends(500))
    assert_error(chat(app, user="ada"), 502, "upstream_unavailable")
    assert_error(app.get("/v1/sessions/ada"), 404, "session_not_found")


def test_chunks_of_an_api_are_forwarded_immediately(
    start_program: StartProgram, api_settings: dict[str, str], api: Api
) -> None:
    step = threading.Semaphore(0)

    def act(handler: ApiHandler) -> None:
        handler.begin_stream()
        for number in range(5):
            step.acquire(timeout=PATIENCE)
            handler.event(api_chunk({"content": f"<{number}>"}))
        handler.event(api_chunk({}, "stop"))
        handler.end()

    api.always = act
    with start_program(**api_settings).open_chat(model="local/k2", stream=True) as link:
        received = b""
        for number in range(5):
            assert f"<{number}>".encode() not in received
            step.release()
            received += read_until(link, f"<{number}>".encode())
        assert b"[DONE]" in received + read_all(link)


def test_a_first_chunk_without_choices_delays_nothing(
    start_program: StartProgram, api_settings: dict[str, str], api: Api
) -> None:
    def act(handler: ApiHandler) -> None:
        handler.begin_stream()
        handler.event({"choices": [], "prompt_filter_results": [1]})
        handler.event(api_chunk({"content": "now"}))
        handler.server.gate.wait(PATIENCE)
        handler.event(api_chunk({}, "stop"))
        handler.end()

    api.always = act
    with start_program(**api_settings).open_chat(model="local/k2", stream=True) as link:
        body = read_until(link, b"now")
        api.gate.set()
        assert b"[DONE]" in read_all(link) and b"prompt_filter_results" in body


def test_the_replay_sends_pieces_within_its_time(start_program: StartProgram, kimi: WebChat) -> None:
    kimi.answer = "word " * 400
    program = start_program(STREAM_INTERVAL_MS="20", STREAM_MAX_SECONDS="0.5")
    connection = program.connect()
    connection.request(
        "POST", "/v1/chat/completions", json.dumps({"stream": True, "messages": [{"role": "user", "content": "x"}]})
    )
    response = connection.getresponse()
    arrivals, body = [], b""
    while part := response.read1(65536):
        arrivals.append(time.monotonic())
        body += part
    chunks = sse_events(body)
    assert streamed_text(chunks) == kimi.answer and chunks[-1] == "[DONE]"
    assert len(arrivals) >= 10, "pieces arrive one by one"
    assert 0.3 < arrivals[-1] - arrivals[0] < PATIENCE / 2
    assert len(chunks) <= 25 + 3, "pieces grow so that the replay keeps to STREAM_MAX_SECONDS"


def test_without_an_interval_the_answer_is_one_piece(start_program: StartProgram, kimi: WebChat) -> None:
    kimi.answer = "word " * 400
    program = start_program(STREAM_INTERVAL_MS="0")
    _, body = program.chat(stream=True)
    assert streamed_text(sse_events(body)) == kimi.answer and len(sse_events(body)) == 4


def test_silence_is_filled_with_keep_alive_comments(start_program: StartProgram, kimi: WebChat) -> None:
    kimi.always = web_chat_answers_at_the_gate
    program = start_program(SSE_KEEPALIVE="0.1")
    with program.open_chat(stream=True) as link:
        head = link.recv(65536)
        assert b" 200 OK" in head and b"text/event-stream" in head
        body = head + read_until(link, b": keep-alive\n\n", 3)
        kimi.gate.set()
        body += read_all(link)
    assert b"data: [DONE]" in body and b"Hello" in body


def test_an_error_after_the_first_byte_is_an_event_without_done(start_program: StartProgram, kimi: WebChat) -> None:
    kimi.always = at_the_gate(sends(500))
    program = start_program(SSE_KEEPALIVE="0.1", MAX_RETRIES="0")
    with program.open_chat(stream=True) as link:
        body = link.recv(65536)
        assert b" 200 OK" in body
        kimi.gate.set()
        body += read_all(link)
    assert sse_events(body)[-1]["error"]["code"] == "upstream_unavailable"
    assert b"[DONE]" not in body and body.endswith(b"0\r\n\r\n")


@json_and_stream
def test_the_turn_of_a_disconnected_client_is_recorded(
    start_program: StartProgram, kimi: WebChat, stream: bool
) -> None:
    kimi.always = web_chat_answers_at_the_gate
    program = start_program(MAX_CONCURRENT_CHATS="1")
    with program.open_chat("leaving", stream=stream, user="ada"):
        wait_for(lambda: kimi.posts)
        assert program.running() == 1
        status, body = program.chat("too many")
        assert status == 429 and json.loads(body)["error"]["code"] == "server_busy"
    assert program.running() == 1, "its call continues and holds the slot"
    kimi.gate.set()
    wait_for(lambda: program.ask("GET", "/v1/sessions/ada")[0] == 200, "the turn is recorded")
    assert b"leaving" in program.ask("GET", "/v1/sessions/ada")[1]
    wait_for(lambda: program.running() == 0, "the slot is free again")
    kimi.always = web_chat_answers
    assert program.chat()[0] == 200


def test_a_client_that_disconnects_during_the_replay_frees_its_slot(start_program: StartProgram, kimi: WebChat) -> None:
    kimi.answer = "word " * 4000
    program = start_program(MAX_CONCURRENT_CHATS="1", STREAM_INTERVAL_MS="100", STREAM_MAX_SECONDS="600")
    with program.open_chat(stream=True) as link:
        assert link.recv(100)
        assert program.running() == 1
    wait_for(lambda: program.running() == 0)
    assert not [line for line in program.log if "Traceback" in line]


def test_a_response_abandoned_during_the_replay_is_stored(start_program: StartProgram, kimi: WebChat) -> None:
    kimi.answer = "word " * 4000
    program = start_program(STREAM_INTERVAL_MS="100", STREAM_MAX_SECONDS="600")
    body = b'{"input": "Hello", "stream": true}'
    head = b"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    with program.open(head + body) as link:
        found = re.search(rb"resp_\w+", read_until(link, b"output_text.delta"))
        assert found
    wait_for(lambda: program.running() == 0 and program.health()["sessions"]["kept"])
    kept = json.loads(program.ask("GET", f"/v1/responses/{found[0].decode()}")[1])
    assert kept["status"] == "completed" and kept["output"][0]["content"][0]["text"] == kimi.answer
    counted = [line for line in program.ask("GET", "/metrics")[1].decode().splitlines() if "chats_total{" in line]
    assert counted == ['kimi2api_chats_total{provider="kimi",model="kimi",status="499"} 1']


def test_an_abandoned_chat_holds_its_slot_until_its_call_ends(start_program: StartProgram, kimi: WebChat) -> None:
    kimi.always = web_chat_answers_at_the_gate
    program = start_program(before=CHECKS_OFTEN, MAX_CONCURRENT_CHATS="2")
    with program.open_chat(user="ada"), program.open_chat(user="bob"):
        wait_for(lambda: len(kimi.posts) == 2)
    time.sleep(0.3)  # until both disconnects have been noticed
    assert program.chat()[0] == 429 and len(kimi.posts) == 2
    refused = 'kimi2api_chats_total{provider="none",model="other",status="429"} 1'
    assert refused in program.ask("GET", "/metrics")[1].decode().splitlines()
    kimi.gate.set()
    wait_for(lambda: program.chat()[0] == 200)


def test_an_abandoned_chat_is_ended(start_program: StartProgram, kimi: WebChat) -> None:
    kimi.always = web_chat_answers_at_the_gate
    program = start_program(before=CHECKS_OFTEN, MAX_CONCURRENT_CHATS="1")
    for count in range(1, 4):
        with program.open_chat():
            wait_for(lambda count=count: len(kimi.posts) == count)
        wait_for(lambda: program.running() == 0)
    kimi.always = web_chat_answers
    wait_for(lambda: program.chat()[0] == 200)


def test_the_events_of_one_read_are_one_write(api_app: Client, api: Api) -> None:
    def act(handler: ApiHandler) -> None:
        handler.begin_stream()
        chunks = [b"data: %s\n\n" % json.dumps(api_chunk({"content": f"<{number}>"})).encode() for number in range(50)]
        handler.wfile.write(b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks))
        handler.wfile.flush()
        handler.server.gate.wait(0.2)
        handler.event(api_chunk({}, "stop"))
        handler.end()

    api.always = act
    writes: list[bytes] = []
    body = json.dumps({"model": "local/k2", "stream": True, "messages": [{"role": "user", "content": "x"}]}).encode()
    environ = webtest.TestRequest.blank("/v1/chat/completions", method="POST", body=body).environ
    rest = api_app.app(environ, lambda *_: writes.append)
    assert [write.count(b"data: ") for write in writes][:1] == [50] and len(writes) <= 3
    assert not b"".join(rest) and writes[-1].endswith(b"[DONE]\n\n")


def test_a_client_may_pause_longer_than_the_upstream_timeout(
    start_program: StartProgram, api_settings: dict[str, str], api: Api
) -> None:
    text = "word " * 2_000  # less than SEND_SIZE: it is sent before the next wait

    def act(handler: ApiHandler) -> None:
        handler.begin_stream()
        for _ in range(600):
            handler.event(api_chunk({"content": text}))
        handler.event(api_chunk({}, "stop"))
        handler.event({**api_chunk(), "choices": [], "usage": USAGE})
        handler.event(b"[DONE]")
        handler.end()

    api.always = act
    program = start_program(**api_settings, REQUEST_TIMEOUT="0.2")
    with program.open_chat(model="local/k2", stream=True, stream_options={"include_usage": True}) as link:
        wait_for(lambda: api.asked)
        time.sleep(0.4)
        body = read_all(link)
    assert body.count(text.encode()) == 600 and b"[DONE]" in body and b'"completion_tokens":3' in body


def test_an_endless_answer_that_is_not_read_uses_no_memory(
    start_program: StartProgram, api_settings: dict[str, str], api: Api
) -> None:
    sent = 0

    def act(handler: ApiHandler) -> None:
        nonlocal sent
        handler.begin_stream()
        while not handler.server.gate.is_set():
            handler.event(api_chunk({"content": "word " * 20_000}))
            sent += 1

    api.always = act
    program = start_program(**api_settings)
    before = program.memory()
    with program.open_chat(model="local/k2", stream=True):
        wait_for(lambda: sent > 10)
        wait_for(lambda: sent == (time.sleep(0.2), sent)[1], "the upstream is no longer read")
        assert program.memory() - before < 60
    wait_for(lambda: program.running() == 0)
    assert program.chat()[0] == 200


def test_a_client_that_stops_reading_frees_its_slot(start_program: StartProgram, kimi: WebChat) -> None:
    kimi.answer = "word " * 600_000  # 3 MB: more than the system buffers for a client that does not read
    program = start_program(
        MAX_CONCURRENT_CHATS="1", STREAM_INTERVAL_MS="0", before="kimi2api.CONNECTION_TIMEOUT = 0.3"
    )
    before = program.memory()
    links = []
    for stream in (True, False):
        links.append(program.open_chat(stream=stream))
        wait_for(lambda: len(kimi.posts) == len(links))
        wait_for(lambda: program.running() == 0)
    assert program.memory() - before < 120
    assert b"word" in program.chat()[1]

@pytest.mark.parametrize(
    "act",
    [
        pytest.param(sends(200, json.dumps({"success": True, "data": {"message": "Hi"}})), id="answered"),
        pytest.param(sends(418, "{}"), id="refused"),
        pytest.param(sends(500, "{}"), id="down"),
        pytest.param(sends(200, "<html>"), id="no JSON"),
        pytest.param(sends(403, b"-1"), id="stale nonce"),
        pytest.param(sends(403, JUST_A_MOMENT, cf_mitigated="challenge"), id="blocked"),
        pytest.param(resets, id="reset"),
        pytest.param(sends_raw(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{"), id="cut off"),
        pytest.param(hangs, id="timed out"),
    ],
)
def test_no_request_stays_in_memory(
    make_app: MakeApp, kimi: WebChat, api: Api, api_settings: dict[str, str], act: Act
) -> None:
    app = make_app(**api_settings, REQUEST_TIMEOUT="0.1", MAX_RETRIES="1", FALLBACK_MODELS="kimi")
    kimi.always = api.always = act
    kimi.page_script.extend([serves_page, act])
    chat(app)
    gc.collect(0)
    gc.freeze()  # exempts existing objects from each search
    gc.disable()  # requests must be freed without the collector
    try:
        for model, stream in itertools.product(("kimi", "local/k2"), (False, True)):
            chat(app, model=model, stream=stream, tools=[WEATHER], tool_choice="required")
        wait_for(lambda: not requests_in_memory(), "every request is freed")
    finally:
        gc.enable()
        gc.unfreeze()


def requests_in_memory() -> list[Any]:
    return [thing for thing in gc.get_objects() if type(thing) is kimi2api.ChatRequest]


# ----------------------------------------------------------------------------------------------------------------------
# Access, application, routes
# ----------------------------------------------------------------------------------------------------------------------


def test_everything_but_health_requires_a_key(make_app: MakeApp, kimi: WebChat) -> None:
    app = make_app(API_MASTER_KEY="sk-one, sk-two")
    wrong = ("Bearer wrong", "Bearer", "Basic sk-one", "sk-one", "Bearer sk-one,sk-two", "Bearer schl\xfcssel")
    for header in (None, *wrong):
        headers = {"Authorization": header} if header else {}
        response = chat(app, headers=headers)
        assert_error(response, 401, "invalid_api_key", "invalid_request_error")
        assert response.headers["WWW-Authenticate"] == "Bearer"
        for path in ("/v1/models", "/v1/models/kimi", "/v1/sessions/ada", "/nowhere"):
            assert_error(app.get(path, headers=headers), 401, "invalid_api_key")
    assert not kimi.posts
    assert app.get("/health").json["status"] == "ok"
    for header in ("Bearer sk-one", "bearer sk-two", "Bearer  sk-two "):
        assert answer_text(chat(app, headers={"Authorization": header}))


@pytest.mark.parametrize(
    ("host", "admitted"),
    [
        pytest.param("localhost:8088", True, id="localhost and port"),
        pytest.param("127.0.0.1", True, id="loopback"),
        pytest.param("[::1]:8088", True, id="IPv6 loopback and port"),
        pytest.param("127.1.2.3:80", True, id="other address of loopback"),
        pytest.param("app.localhost", True, id="subdomain of localhost"),
        pytest.param("LOCALHOST.", True, id="capitals and final dot"),
        pytest.param("evil.com", False, id="other name"),
        pytest.param("localhost.evil.com", False, id="name that begins with localhost"),
        pytest.param("127.0.0.1.evil.com", False, id="name that begins with loopback"),
        pytest.param("192.168.1.5:8088", False, id="private address"),
        pytest.param("0.0.0.0:8088", False, id="any address"),
        pytest.param("[", False, id="half an address"),
        pytest.param("localhost, evil.com", False, id="two names"),
    ],
)
def test_without_a_key_a_foreign_host_is_refused(make_app: MakeApp, host: str, admitted: bool) -> None:
    keyless, keyed = make_app(), make_app(API_MASTER_KEY="sk-1")
    for method in ("GET", "OPTIONS"):
        response = keyless.request("/v1/models", method=method, headers={"Host": host})
        if admitted:
            assert response.status_int < 400
        else:
            assert_error(response, 403, "host_not_allowed")
    assert keyed.get("/v1/models", headers={"Host": host, "Authorization": "Bearer sk-1"}).status_int == 200


@pytest.mark.parametrize(
    ("origin", "admitted"),
    [
        pytest.param("http://localhost:3000", True, id="localhost"),
        pytest.param("http://127.0.0.1:5173", True, id="loopback"),
        pytest.param("https://[::1]", True, id="IPv6 loopback"),
        pytest.param("https://evil.com", False, id="other name"),
        pytest.param("null", False, id="null"),
        pytest.param("http://localhost.evil.com", False, id="name that begins with localhost"),
        pytest.param("http://evil.com:8088", False, id="other name on our port"),
        pytest.param("http://[", False, id="half an address"),
        pytest.param("file://", False, id="file"),
    ],
)
def test_without_a_key_a_foreign_origin_is_refused(
    make_app: MakeApp, kimi: WebChat, origin: str, admitted: bool
) -> None:
    app = make_app()
    headers = {"Origin": origin}
    for response in (chat(app, headers=headers), app.options("/v1/chat/completions", headers=headers)):
        if admitted:
            assert response.status_int < 400
        else:
            assert_error(response, 403, "origin_not_allowed")
        assert response.headers.get("Access-Control-Allow-Origin") == (origin if admitted else None)
    assert len(kimi.posts) == admitted


def test_with_a_key_any_origin_is_allowed_unless_origins_are_listed(make_app: MakeApp) -> None:
    key = {"Authorization": "Bearer sk-1"}
    anyone = make_app(API_MASTER_KEY="sk-1")
    listed = make_app(API_MASTER_KEY="sk-1", CORS_ORIGINS="https://mine.example, https://b")
    response = chat(anyone, headers={**key, "Origin": "https://evil.com"})
    assert answer_text(response) and response.headers["Access-Control-Allow-Origin"] == "https://evil.com"
    assert response.headers["Vary"] == "Origin" and response.headers["Access-Control-Expose-Headers"] == "*"
    assert answer_text(chat(listed, headers={**key, "Origin": "https://mine.example"}))
    assert_error(chat(listed, headers={**key, "Origin": "https://evil.com"}), 403, "origin_not_allowed")
    assert answer_text(chat(listed, headers={**key, "Origin": "http://localhost:80"})), "the server's own page"


@pytest.mark.parametrize(
    ("origin", "admitted"),
    [
        ("https://app.example.com", True), ("https://a.b.example.com", True), ("null", True),
        ("https://app.other.com:8443", True), ("chrome-extension://abc", True),
        ("https://example.com", False), ("http://app.example.com", False), ("https://app.example.com:8443", False),
        ("https://badexample.com", False), ("https://app.example.com.evil.com", False),
        ("chrome-extension://abcd", False),
    ],
)  # fmt: skip
def test_listed_origins_match_exactly_or_by_domain(make_app: MakeApp, origin: str, admitted: bool) -> None:
    app = make_app(CORS_ORIGINS="https://*.example.com, https://*.other.com:8443, null, chrome-extension://abc")
    response = app.get("/v1/models", headers={"Origin": origin})
    if admitted:
        assert response.status_int == 200
    else:
        assert_error(response, 403, "origin_not_allowed")
    assert response.headers.get("Access-Control-Allow-Origin") == (origin if admitted else None)


@pytest.mark.parametrize(
    ("headers", "admitted"),
    [
        ({"X-Forwarded-For": "203.0.113.9"}, False), ({"X-Forwarded-For": "127.0.0.1, 203.0.113.9"}, False),
        ({"X-Real-IP": "2001:db8::1"}, False), ({"Forwarded": "proto=https;For=203.0.113.9"}, False),
        ({"Forwarded": 'for="[2001:db8::1]:4711", for=127.0.0.1'}, False), ({"Forwarded": "for=unknown"}, False),
        ({"X-Forwarded-For": "127.0.0.1", "X-Real-IP": "::1"}, True), ({"Forwarded": 'for="[::1]"'}, True),
        ({"X-Forwarded-For": ""}, True), ({"Forwarded": 'for="127.0.0.1:4711"'}, True),
        ({"X-Forwarded-For": "127.0.0.1:4711, [::1]:80, ::ffff:127.0.0.1, [::ffff:127.0.0.1]:9"}, True),
        ({"X-Forwarded-For": "203.0.113.9:4711"}, False), ({"X-Forwarded-For": "::ffff:203.0.113.9"}, False),
        ({"X-Forwarded-For": "[2001:db8::1]:4711"}, False), ({"X-Forwarded-For": "2001:db8::127"}, False),
    ],
)  # fmt: skip
def test_without_a_key_requests_forwarded_for_others_are_refused(
    make_app: MakeApp, headers: dict[str, str], admitted: bool
) -> None:
    response = make_app().get("/v1/models", headers=headers)
    if admitted:
        assert response.status_int == 200
    else:
        assert_error(response, 403, "host_not_allowed")
    assert admitted or "proxy" in response.json["error"]["message"]
    assert make_app(API_MASTER_KEY="sk").get("/v1/models", headers={**headers, **bearer("sk")}).status_int == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "said_in_it"),
    [
        ("POST", "/v1//chat/completions", 404, "'/v1/chat/completions'"),
        ("POST", "/chat/completions", 404, "'/v1/chat/completions'"), ("GET", "/v1/health", 404, "'/health'"),
        ("POST", "/v1/chat/completions/", 404, "'/v1/chat/completions'"),
        ("GET", "/v1/v1/models", 404, "'/v1/models'"),
        ("GET", "/v1/v1/models/kimi", 404, "'/v1/models/kimi'"), ("GET", "/v1//responses/x", 404, "'/v1/responses/x'"),
        ("POST", "/v1/v1/images", 404, "nothing else of OpenAI's API"),
        ("POST", "/v1/responses/input_tokens", 404, "nothing else of OpenAI's API"),
        ("POST", "/v1/audio/speech", 404, "nothing else of OpenAI's API"),
        ("PUT", "/v1/chat/completions", 405, "PUT"), ("GET", "/v1/responses", 405, "GET"), ("POST", "/health", 405, ""),
    ],
)  # fmt: skip
def test_a_nearly_right_path_returns_404_with_advice(
    make_app: MakeApp, method: str, path: str, status: int, said_in_it: str
) -> None:
    response = make_app().request(path, method=method, body=b"{}")
    assert_error(response, status, "not_found" if status == 404 else "method_not_allowed")
    assert said_in_it in response.json["error"]["message"]


def test_a_named_key_has_its_share_of_the_slots(make_app: MakeApp, kimi: WebChat) -> None:
    app = make_app(API_MASTER_KEY="ann:sk-1,bob:sk-2", MAX_CONCURRENT_CHATS="3,ann=1")
    kimi.always = web_chat_answers_at_the_gate
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(chat, app, headers=bearer("sk-1"))]
        wait_for(lambda: len(kimi.posts) == 1)
        assert_error(chat(app, headers=bearer("sk-1")), 429, "server_busy")
        running += [pool.submit(chat, app, headers=bearer("sk-2")) for _ in range(2)]
        wait_for(lambda: len(kimi.posts) == 3)
        assert_error(chat(app, headers=bearer("sk-2")), 429, "server_busy")
        assert app.get("/health").json["chats"] == {"running": 3, "limit": 3}
        kimi.gate.set()
        assert all(answer_text(done.result()) for done in running)
    assert app.get("/health").json["chats"]["running"] == 0 and answer_text(chat(app, headers=bearer("sk-1")))


def test_a_preflight_needs_no_key_and_allows_the_requested_headers(make_app: MakeApp) -> None:
    app = make_app(API_MASTER_KEY="sk-1")
    asked = "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,x-stainless-retry-count"
    preflight = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": asked,
        "Access-Control-Request-Private-Network": "true",
    }
    for path in ("/v1/chat/completions", "/v1/models", "/nowhere"):
        response = app.options(path, headers=preflight)
        assert response.status_int == 204
        assert response.headers["Access-Control-Allow-Headers"] == asked
        assert response.headers["Access-Control-Allow-Private-Network"] == "true"
        assert {"POST", "GET", "DELETE"} <= set(response.headers["Access-Control-Allow-Methods"].split(", "))


def test_every_response_has_a_request_id_and_a_valid_one_is_kept(app: Client) -> None:
    assert app.get("/v1/models", headers={"X-Request-Id": "trace-1.2_3"}).headers["X-Request-Id"] == "trace-1.2_3"
    for response in (
        app.get("/health"),
        app.get("/nowhere"),
        app.put("/health"),
        chat(app, stream=True),
        chat(app, model="x"),
        app.get("/health", headers={"X-Request-Id": "x" * 200}),
        app.get("/health", headers={"X-Request-Id": "a b"}),
    ):
        assert re.fullmatch(r"req_[0-9a-f]{32}", response.headers["X-Request-Id"])


def test_a_body_above_the_limit_returns_413(make_app: MakeApp) -> None:
    app = make_app(MAX_BODY_BYTES="300000", CONTEXT_MAX_LENGTH="999999")
    assert answer_text(chat(app, "x" * 200_000))
    assert_error(chat(app, "x" * 300_000), 413, "request_too_large", "invalid_request_error")


def test_a_chat_without_a_free_slot_returns_429(start_program: StartProgram, kimi: WebChat) -> None:
    kimi.always = web_chat_answers_at_the_gate
    program = start_program(MAX_CONCURRENT_CHATS="3")
    links = [program.open_chat(stream=bool(number % 2)) for number in range(3)]
    wait_for(lambda: len(kimi.posts) == 3)
    for _ in range(20):
        connection = program.connect()
        connection.request("POST", "/v1/chat/completions", '{"messages": [{"role": "user", "content": "x"}]}')
        response = connection.getresponse()
        assert response.status == 429 and response.headers["Retry-After"]
        assert json.loads(response.read())["error"]["code"] == "server_busy"
    assert program.health()["chats"] == {"running": 3, "limit": 3}
    assert program.ask("GET", "/v1/models")[0] == 200
    kimi.gate.set()
    assert all(b"Hello" in read_response(link)[1] for link in links)
    wait_for(lambda: program.chat()[0] == 200)


def test_200_chats_run_concurrently(start_program: StartProgram, kimi: WebChat) -> None:
    kimi.always = web_chat_answers_at_the_gate
    program = start_program(MAX_CONCURRENT_CHATS="256")
    links = [program.open_chat(f"chat {number}", stream=True) for number in range(200)]
    wait_for(lambda: len(kimi.posts) == 200, "all 200 reach upstream at the same time")
    kimi.gate.set()
    assert all(b"data: [DONE]" in read_all(link) for link in links)
    assert {post["message"] for post in kimi.posts} == {f"chat {number}" for number in range(200)}
    wait_for(lambda: program.running() == 0)


########################################################################################################################
# Part 8: Server
########################################################################################################################


# ----------------------------------------------------------------------------------------------------------------------
# Client connections, server, command line
# ----------------------------------------------------------------------------------------------------------------------


def test_too_few_open_files_refuse_the_start(kimi: WebChat) -> None:
    pytest.importorskip("resource")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"
    done = run_code(f"{limit}\nsys.exit(kimi2api.main(['--demo', '--api-port', '0']))")
    assert_refused(done, "MAX_CONCURRENT_CHATS=64")
    assert "--api-port" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        pytest.param(["--api-port", "x"], "API_PORT", id="bad port"),
        pytest.param(["--api-host", "0.0.0.0"], "API_MASTER_KEY", id="open host without a key"),
        pytest.param(["--api-host", "no.such.host", "--api-master-key", "sk-1"], "no.such.host", id="unknown host"),
        pytest.param(["--env-file", "/no/such"], "/no/such", id="missing env file"),
    ],
)
def test_a_refused_start_prints_one_line_and_exits_2(flags: list[str], word: str) -> None:
    assert_refused(run_program(*flags), word)


def test_select_bounds_the_connections_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert kimi2api.connection_limit(64) == 500
    with pytest.raises(ValueError, match="MAX_CONCURRENT_CHATS=500"):
        kimi2api.connection_limit(500)


def assert_refused(done: subprocess.CompletedProcess[str], word: str) -> None:
    assert done.returncode == 2, done
    assert word in done.stderr and len(done.stderr.splitlines()) == 1 and not done.stdout, done.stderr


def test_a_port_in_use_is_refused_in_one_line(kimi: WebChat) -> None:
    assert_refused(run_program("--api-port", str(kimi.port)), "in use; --api-port chooses another port")


def test_an_env_file_in_another_encoding_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"API_PORT=\xff")
    assert_refused(run_program("--env-file", str(tmp_path / "latin")), "latin")


@pytest.mark.parametrize("value", ['"sk-1', "'sk-1", '"sk-1"x', '"'])
def test_an_env_file_whose_quotes_do_not_match_is_refused_in_one_line(tmp_path: Path, value: str) -> None:
    (tmp_path / "quotes").write_text(f"API_PORT=0\nAPI_MASTER_KEY={value}\n")
    with pytest.raises(kimi2api.SettingError, match="line 2: the quotes of API_MASTER_KEY") as refused:
        kimi2api.read_env_file(str(tmp_path / "quotes"), required=True)
    assert "sk-1" not in str(refused.value) and "\n" not in str(refused.value)


def test_check_does_not_listen_and_requires_no_key(kimi: WebChat) -> None:
    done = run_program("--check", "--api-host", "0.0.0.0", **kimi.settings)
    assert done.returncode == 0 and done.stdout.count("✓") == 2


def test_an_unknown_flag_is_refused() -> None:
    assert run_program("--no-such-flag").returncode == 2


def test_help_lists_every_setting_and_version_is_the_modules() -> None:
    done = run_program("--help")
    assert done.returncode == 0
    for field in kimi2api.Settings.table():
        assert f"--{field.name.replace('_', '-')}" in done.stdout
    first = ["demo", "check", "env-file", "version", "api-master-key"]
    assert re.findall(r"(?m)^  --([\w-]+)", done.stdout)[:5] == first
    assert run_program("--version").stdout.strip() == f"kimi2api {kimi2api.__version__}"


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("127.0.0.2", "127.0.0.2")],
)
def test_the_greeting_shows_an_address_that_answers(start_program: StartProgram, host: str, address: str) -> None:
    program = start_program(
        API_HOST=host,
        API_MASTER_KEY="sk-one,sk-two" if host == "0.0.0.0" else "",
        PROVIDERS="local",
        LOCAL_BASE_URL="http://me:s3cret@127.0.0.1:9/v1",
    )
    assert program.host == address and program.health()["status"] == "ok"
    assert ("no key is asked" in program.greeting) == (host != "0.0.0.0") and "local" in program.greeting
    assert not re.search("sk-one|s3cret", program.greeting) and program.greeting.count("\n") == 3


def test_addresses_that_this_machine_lacks_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_ipv6(host: str, port: int, **how: Any) -> list[Any]:
        local = [(socket.AF_INET6, ("2001:db8::1", port, 0, 0)), (socket.AF_INET, ("127.0.0.1", port))]
        return [(family, socket.SOCK_STREAM, 0, "", address) for family, address in local]

    monkeypatch.setattr(socket, "getaddrinfo", without_ipv6)
    [listening] = kimi2api.listening_sockets("localhost", 0)
    with listening:
        listening.listen()
        assert listening.getsockname()[0] == "127.0.0.1"
        with pytest.raises(OSError, match="in use"):
            kimi2api.listening_sockets("localhost", listening.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.2",) * 2, ("::1", "[::1]"), ("::", "[::1]"), ("0.0.0.0", "127.0.0.1"), ("192.0.2.2",) * 2],
)
def test_the_greeting_and_the_health_check_use_the_servers_address(host: str, address: str) -> None:
    settings = kimi2api.Settings.load({"API_HOST": host, "API_MASTER_KEY": "sk-1"})
    assert f"http://{address}:8088/v1 is the base URL" in kimi2api.greeting(settings, 8088)
    check = re.search(r"HEALTHCHECK.*?\n +\"(.*)\"\]", (HERE / "Dockerfile").read_text())[1]
    asked = f"""import http.client
class Connection:
    def __init__(self, host, port, timeout): print(host, port)
    def request(self, *what): raise SystemExit(0)
http.client.HTTPConnection = Connection
{check}"""
    done = subprocess.run(
        [sys.executable, "-c", asked], env={**os.environ, "API_HOST": host}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [host, "8088"], "a connection to 0.0.0.0 or :: reaches this machine"


def test_too_few_threads_refuse_the_start() -> None:
    few = """
import threading
start, left = threading.Thread.start, [%d]
def start_one_of_few(thread):
    left[0] -= 1
    if left[0] < 0:
        raise RuntimeError("can't start new thread")
    start(thread)
threading.Thread.start = start_one_of_few
sys.exit(kimi2api.main(["--demo", "--api-port", "0"]))
"""
    for count in (0, 20):
        assert_refused(run_code(few % count), "thread")


def test_an_unreadable_env_file_is_an_error_only_if_named(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    code = (
        "import os, kimi2api\nos.chmod('.', 0)\nos.getuid() or os.setuid(65534)\n"
        "print(kimi2api.read_env_file('.env', required=False))\nkimi2api.read_env_file('.env', required=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "here", env={**os.environ, **COMPILED_ONCE},
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    (tmp_path / "here").chmod(0o700)
    assert done.stdout == "{}\n" and "SettingError: .env: cannot be read" in done.stderr, done


def test_a_deleted_working_directory_is_an_error_only_if_needed(tmp_path: Path, kimi: WebChat) -> None:
    (tmp_path / "here").mkdir()
    line = 'rmdir ../here; "$0" -m kimi2api --check; "$0" -m kimi2api --api-port 0 --session-store sqlite:sessions.db'
    done = subprocess.run(
        ["sh", "-c", line, sys.executable], cwd=tmp_path / "here", env={**os.environ, **COMPILED_ONCE, **kimi.settings},
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.stdout.count("✓") == 2 and done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("kimi2api: SESSION_STORE: sessions.db cannot be used: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("page", "post", "printed"),
    [
        pytest.param(
            serves_page,
            web_chat_answers,
            r"kimi .*:\n  ✓ .*\n  ✓ question answered \(\d+\.\d s\)\nAll upstreams answer[^✗]*",
            id="both steps succeed",
        ),
        pytest.param(sends(500), web_chat_answers, "kimi .*:\n  ✗ [^✓]*", id="the page fails"),
        pytest.param(
            sends(403, JUST_A_MOMENT, cf_mitigated="challenge"),
            web_chat_answers,
            "kimi .*:\n  ✗ connection[^✓]*upstream_blocked[^✓]*",
            id="the page is a challenge",
        ),
        pytest.param(
            sends(200, "<html>nothing</html>"),
            web_chat_answers,
            "kimi .*:\n  ✗ [^✓]*carries no nonce[^✓]*",
            id="the page has no nonce",
        ),
        pytest.param(serves_page, sends(500), "kimi .*:\n  ✓ [^✓]*✗ question[^✓]*", id="the question fails"),
    ],
)
def test_check_tests_the_web_chat_step_by_step(kimi: WebChat, page: Act, post: Act, printed: str) -> None:
    kimi.page_script.append(page)
    kimi.always = post
    done = run_program("--check", **kimi.settings, MAX_RETRIES="0", LOG_LEVEL="ERROR")
    assert re.fullmatch(printed, done.stdout), done.stdout
    assert done.returncode == ("✗" in done.stdout)


@pytest.mark.parametrize("where", [pytest.param(">/dev/full", id="full"), pytest.param("| true", id="closed pipe")])
def test_a_check_with_closed_output_prints_no_traceback(kimi: WebChat, where: str) -> None:
    line = f"set -o pipefail; {shlex.quote(sys.executable)} {shlex.quote(str(HERE / 'kimi2api.py'))} --check {where}"
    env = {**os.environ, **kimi.settings}
    done = subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_check_tests_every_provider(kimi: WebChat, api: Api, api_settings: dict[str, str]) -> None:
    done = run_program("--check", **kimi.settings, **api_settings)
    assert done.returncode == 0 and done.stdout.count("✓") == 4 and "local (each step" in done.stdout
    assert api.asked[0][2]["model"] == "k2"
    api.list_act = api_sends(401, b"no")
    done = run_program("--check", **kimi.settings, **api_settings)
    assert done.returncode == 1 and "upstream_auth" in done.stdout and "sk-theirs" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        pytest.param(b"nonsense\r\n\r\n", 400, id="no HTTP"),
        pytest.param(b"GET / HTTP/1.1\r\nbad header\r\n\r\n", 400, id="header without a colon"),
        pytest.param(b"GET / HTTP/1.1\r\nX: " + b"y" * 300_000 + b"\r\n\r\n", 431, id="header of 300 kB"),
        pytest.param(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n",
            413,
            id="100 GB",
        ),
        pytest.param(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n", 400, id="negative length"),
        pytest.param(b"GET http://[/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, id="half an address"),
        pytest.param(b"GET /health HTTP/1.1\r\n\r\n", 400, id="no host"),
        pytest.param(b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400, id="two hosts"),
        pytest.param(b"GET /v1/sessions/ada%ff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, id="path that is no UTF-8"),
        pytest.param(
            b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", 501, id="unknown encoding"
        ),
    ],
)
def test_malformed_http_returns_openais_errors(demo_program: Program, request_bytes: bytes, status: int) -> None:
    with demo_program.open(request_bytes) as link:
        response, body = read_response(link)
    assert response.status == status and set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert response.headers["X-Request-Id"] and response.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    "version, length", [("1.1", "Content-Length: 5\r\n"), ("1.0", "Content-Length: 5\r\n"), ("1.0", "")]
)
def test_a_body_with_two_lengths_smuggles_no_request(demo_program: Program, version: str, length: str) -> None:
    head = f"POST /v1/models HTTP/{version}\r\nHost: x.localhost\r\n{length}Transfer-Encoding: chunked\r\n"
    head += "Connection: keep-alive\r\n\r\n0\r\n\r\n"
    with demo_program.open(head.encode() + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as link:
        answered = read_all(link)
    assert answered.count(b"HTTP/1.") == 1 and b"Connection: close" in answered


def test_large_bodies_of_one_key_do_not_block_another(start_program: StartProgram) -> None:
    program = start_program(API_MASTER_KEY="sk-1,sk-2", MAX_CONCURRENT_CHATS="4")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-1\r\nContent-Length: 4000000\r\n\r\n"
    with ExitStack() as links:
        for _ in range(8):
            links.enter_context(program.open(head + b"x" * 3_900_000))
        assert program.ask("POST", "/v1/completions", {"prompt": "x"}, **bearer("sk-2"))[0] == 200


def test_without_a_temporary_directory_large_bodies_return_500(
    start_program: StartProgram, kimi: WebChat
) -> None:
    kimi.answer = "word " * 300_000
    program = start_program(before="import tempfile; tempfile._candidate_tempdir_list = lambda: ['/no/such']")
    for content, status in (("Hello", 200), ("x" * 600_000, 500), ("Hello", 200)):
        link = program.open_chat(content)
        response, body = read_response(link, "POST")
        assert response.status == status
        if status == 500:
            error = json.loads(body)["error"]
            assert error["type"] == "server_error" and "The body cannot be kept" in error["message"]
        link.close()
    assert not [line for line in program.log if "Traceback" in line]


def test_a_client_that_sends_too_much_receives_413(start_program: StartProgram) -> None:
    program = start_program(MAX_BODY_BYTES="1000")
    for size in (1001, 100_000, 8_000_000):
        status, body = program.ask("POST", "/v1/chat/completions", b"x" * size)
        assert status == 413 and json.loads(body)["error"]["code"] == "request_too_large"


def test_chunked_requests_are_read(demo_program: Program) -> None:
    connection = demo_program.connect()
    connection.request(
        "POST",
        "/v1/chat/completions",
        iter([b'{"messages": [{"role":', b' "user", "content": "x"}]}']),
        encode_chunked=True,
        headers={"Transfer-Encoding": "chunked"},
    )
    assert connection.getresponse().status == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_lets_running_chats_finish(start_program: StartProgram, kimi: WebChat, number: int) -> None:
    kimi.always = web_chat_answers_at_the_gate
    kimi.answer = "word " * 200_000  # more than the system buffers for a client that does not read yet
    program = start_program(STREAM_INTERVAL_MS="0")
    links = [program.open_chat(stream=stream) for stream in (False, True, True)]
    wait_for(lambda: len(kimi.posts) == 3)
    idle = program.open()
    assert program.running() == 3  # on a connection that is accepted after the idle one
    program.signal(number)
    assert idle.recv(1) == b"", "an idle connection is closed"
    with pytest.raises(OSError):
        program.open().recv(1)
        raise ConnectionRefusedError  # accepted by the system just before the socket was closed, then dropped
    kimi.gate.set()
    bodies = [read_all(link) for link in links]
    assert bodies[0].count(b"word ") == 200_000 and b"Connection: close" in bodies[0]
    assert all(body.count(b"word ") == 200_000 and b"data: [DONE]" in body for body in bodies[1:])
    assert program.wait() == 0


def test_a_busy_connection_does_not_delay_a_stop(start_program: StartProgram) -> None:
    program = start_program()
    connection = program.connect()
    stop_asking = threading.Event()

    def ask_on_and_on() -> None:
        try:
            while not stop_asking.is_set():
                connection.request("GET", "/health")
                connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            pass

    connection.auto_open = 0
    connection.connect()
    asking = threading.Thread(target=ask_on_and_on)
    asking.start()
    try:
        program.signal(signal.SIGTERM)
        assert program.wait(PATIENCE) == 0
    finally:
        stop_asking.set()
        asking.join()


def test_fifty_streams_end_with_done_at_a_stop(
    start_program: StartProgram, api_settings: dict[str, str], api: Api
) -> None:
    api.always = api_streams_words
    program, links = stop_during_fifty_streams(start_program(**api_settings, SHUTDOWN_GRACE="60"))
    api.gate.set()
    assert all(b"data: [DONE]" in read_all(link) for link in links)
    assert program.wait() == 0


def test_fifty_streams_end_with_an_error_when_grace_is_over(
    start_program: StartProgram, api_settings: dict[str, str], api: Api
) -> None:
    api.always = api_streams_words
    program, links = stop_during_fifty_streams(start_program(before=CHECKS_OFTEN, **api_settings, SHUTDOWN_GRACE="0.3"))
    bodies = [read_all(link) for link in links]
    assert all(b"server_stopping" in body and b"[DONE]" not in body for body in bodies)
    assert program.wait() == 0


def stop_during_fifty_streams(program: Program) -> tuple[Program, list[socket.socket]]:
    """Open fifty streams, then signal the program to stop. Return it and the open streams."""
    links = [program.open_chat(model="local/k2", stream=True) for _ in range(50)]
    assert all(link.recv(1) for link in links)
    program.signal(signal.SIGTERM)
    wait_for(lambda: any("stopping" in line for line in program.log))
    return program, links


def test_after_the_grace_chats_end_with_server_stopping(start_program: StartProgram, kimi: WebChat) -> None:
    kimi.always = web_chat_answers_at_the_gate
    program = start_program(before=CHECKS_OFTEN, SHUTDOWN_GRACE="0.2", SSE_KEEPALIVE="0.1")
    stream, plain = program.open_chat(stream=True), program.open_chat()
    wait_for(lambda: len(kimi.posts) == 2)
    assert stream.recv(65536)
    program.signal(signal.SIGTERM)
    body = read_all(stream)
    assert sse_events(body)[-1]["error"]["code"] == "server_stopping" and b"[DONE]" not in body
    assert b" 503 " in read_all(plain)
    assert program.wait() == 0


def test_a_second_signal_exits_immediately(start_program: StartProgram, kimi: WebChat) -> None:
    kimi.always = web_chat_answers_at_the_gate
    program = start_program(SHUTDOWN_GRACE="600")
    with program.open_chat():
        wait_for(lambda: kimi.posts)
        program.signal(signal.SIGTERM)
        wait_for(lambda: any("stopping" in line for line in program.log))
        program.signal(signal.SIGTERM)
        assert program.wait() == 128 + signal.SIGTERM


def test_an_out_of_band_byte_uses_no_cpu(start_program: StartProgram) -> None:
    program = start_program()
    stat = Path(f"/proc/{program.process.pid}/stat")
    if not stat.exists():
        pytest.skip("needs Linux")

    def seconds_of_cpu() -> float:
        return sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")

    with socket.create_connection((program.host, program.port), timeout=PATIENCE) as link:
        link.send(b"!", socket.MSG_OOB)
        program.health()
        before = seconds_of_cpu()
        time.sleep(0.2)
        assert seconds_of_cpu() - before < 0.1
        program.health()


class CountingDispatcher(kimi2api.wasyncore.dispatcher):
    """An entry of SocketMap that counts calls of readable() and keeps what it reads."""

    def __init__(self, link: socket.socket, sockets: kimi2api.SocketMap) -> None:
        self.asked, self.got, self.requests, self.waits = 0, b"", [], True
        super().__init__(link, sockets)

    def readable(self) -> bool:
        self.asked += 1
        return self.waits

    def writable(self) -> bool:
        return False

    def handle_read(self) -> None:
        self.got += self.recv(100)

    def handle_close(self) -> None:
        self.close()


def test_the_loop_checks_only_connections_with_events() -> None:
    sockets = kimi2api.SocketMap()
    pairs = [socket.socketpair() for _ in range(20)]
    entries = [CountingDispatcher(inner, sockets) for _, inner in pairs]
    entries[4].requests = ["one that a thread answers"]
    for round_ in range(5):
        pairs[3][0].send(b"x")
        sockets.poll_once(0.1)
        assert entries[3].got == b"x" * (round_ + 1)
    assert entries[3].asked == entries[4].asked == 5
    assert {entry.asked for entry in entries} == {1, 5}
    entries[4].waits = False
    pairs[4][0].send(b"y")
    sockets.poll_once(0)
    assert not entries[4].got, "an entry that waits for nothing is not read"
    entries[4].waits = True
    sockets.poll_once(0.1)
    assert entries[4].got == b"y", "its readable() is called at every turn"
    pairs[5][0].close()
    sockets.poll_once(0.1)
    assert len(sockets) == 19
    # The next connection gets the descriptor of a closed one
    descriptor = entries[3]._fileno
    entries[3].close()
    inner, outer = socket.socketpair()
    assert inner.fileno() == descriptor
    newer = CountingDispatcher(inner, sockets)
    outer.send(b"z")
    sockets.poll_once(0.1)
    assert (newer._fileno, newer.got) == (descriptor, b"z")
    for entry in list(sockets.values()):
        entry.close()


def test_a_body_without_a_valid_key_is_discarded(start_program: StartProgram) -> None:
    program = start_program(API_MASTER_KEY="sk-1", MAX_BODY_BYTES=str(32 << 20))
    before = program.memory()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer wrong\r\nContent-Length: %d\r\n\r\n"
    links = [program.open(head % (20 << 20) + b"x" * (10 << 20)) for _ in range(8)]
    assert program.memory() - before < 30
    for link in links:
        link.sendall(b"x" * (10 << 20))
        response, body = read_response(link)
        assert response.status == 401 and b"invalid_api_key" in body
        link.close()
    smuggled = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    link = program.open(head.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n") % len(smuggled))
    response, _ = read_response(link)
    assert response.status == 401 and response.getheader("Connection") == "close", (
        "the server does not wait for the body"
    )
    with suppress(OSError):
        link.sendall(smuggled)
        assert link.recv(100) == b"", "the body is no request"
    link.close()


def test_a_connection_without_a_complete_request_times_out(start_program: StartProgram) -> None:
    program = start_program(before="kimi2api.CONNECTION_TIMEOUT = 0.4; kimi2api.MIN_BODY_RATE = 300")
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
    silent = [program.open(start) for start in (b"", b"GET", head, head + b"\r\n{")]
    dripping = [program.open(start) for start in (b"GET", head, head + b"\r\n{")]
    waiting = [*silent, *dripping]
    body = b'{"messages": [{"role": "user", "content": "x"}]}'.ljust(1000)
    parts = [body[start : start + 100] for start in range(0, 1000, 100)]
    slow = program.open(head + b"\r\n")
    end = time.monotonic() + PATIENCE
    while waiting or parts:
        assert time.monotonic() < end, f"not closed: {waiting}"
        if parts:
            slow.send(parts.pop(0))
        for link in dripping:
            with suppress(OSError):  # closed
                link.send(b"x")
        time.sleep(0.15)  # the loop checks once a second
        for link in select.select(waiting, [], [], 0)[0]:
            with suppress(ConnectionResetError):
                assert link.recv(100) == b"", "closed without an answer"
            waiting.remove(link)
    assert read_response(slow)[0].status == 200, "slow, but faster than MIN_BODY_RATE"
    for link in (slow, *silent, *dripping):
        link.close()


# An application that replaces ours: /write writes without end, /ended shows the errors that ended it
WRITER = """
ended = []
def application(environ, start_response):
    write = start_response("200 OK", [("Content-Type", "text/plain")])
    if environ["PATH_INFO"] == "/write":
        try:
            while True:
                write(b"x" * 1000)
        except BaseException as error:
            ended.append(type(error).__name__)
            kimi2api.log.error("ended: %s", ended)
            raise
    return [repr(ended).encode()]
kimi2api.create_app = lambda *_: application
"""


def write_errors(program: Program) -> bytes:
    return program.ask("GET", "/ended")[1]


@pytest.mark.parametrize("way", ["RST", "FIN", "reads nothing"])
def test_a_thread_that_writes_ends_with_its_client(start_program: StartProgram, way: str) -> None:
    program = start_program(before=WRITER + f"kimi2api.CONNECTION_TIMEOUT = {0.5 if way == 'reads nothing' else 60}")
    before = program.memory()
    with program.open(b"GET /write HTTP/1.1\r\nHost: localhost\r\n\r\n") as link:
        link.recv(100)
        time.sleep(0.2)
        assert write_errors(program) == b"[]"
        if way == "RST":
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if way != "reads nothing":
            link.close()
        wait_for(lambda: write_errors(program) == b"['ClientDisconnected']")
    assert program.memory() - before < 5, "the thread waits for its client"


def test_a_thread_that_writes_ends_when_the_server_stops(start_program: StartProgram) -> None:
    program = start_program(before=WRITER, SHUTDOWN_GRACE="0.1")
    with program.open(b"GET /write HTTP/1.1\r\nHost: localhost\r\n\r\n") as link:
        link.recv(100)
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
        assert "ended: ['ClientDisconnected']" in "".join(program.log)


def test_a_client_that_reads_slowly_is_not_closed(start_program: StartProgram) -> None:
    program = start_program(before=WRITER + "kimi2api.CONNECTION_TIMEOUT = 1.5")
    with program.open(b"GET /write HTTP/1.1\r\nHost: localhost\r\n\r\n") as link:
        for _ in range(50):  # 2.5 s, within which the loop checks twice
            assert read_exactly(link, 15_000)
            time.sleep(0.05)
        assert write_errors(program) == b"[]"
    wait_for(lambda: write_errors(program) == b"['ClientDisconnected']")


def read_exactly(link: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = link.recv(count - len(data))
        assert part
        data += part
    return data


def test_pipelined_requests_with_unread_answers_hold_no_thread(start_program: StartProgram) -> None:
    program = start_program(MAX_CONCURRENT_CHATS="1")
    page = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"  # the longest answer without a key
    with ExitStack() as links:
        for _ in range(20):
            links.enter_context(program.open(page * (60_000 // len(page))))
        for _ in range(20):
            began = time.monotonic()
            program.health()
            assert time.monotonic() - began < PATIENCE / 4
    with program.open(page * 20) as link:
        assert read_all(link).count(b"HTTP/1.1 200 OK") == kimi2api.MAX_PIPELINED


def test_idle_connections_are_closed_for_new_ones(start_program: StartProgram) -> None:
    pytest.importorskip("resource")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))"
    program = start_program(before=limit, MAX_CONCURRENT_CHATS="4")
    body_head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
        b"Content-Length: 3000000\r\n\r\n"
    )
    for head, body in (
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b""),
        (body_head, b"{"),
        (body_head, b"{" * 600_000),  # stored in a file
        (b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 8, b""),  # with unread answers
    ):
        with ExitStack() as links:
            for _ in range(70):
                link = links.enter_context(program.open(head))
                assert select.select([link], [], [], PATIENCE)[0], "the head has been read"
                link.sendall(body)
            assert program.health()["status"] == "ok"
            assert program.chat()[0] == 200


def test_half_sent_requests_are_closed_for_new_ones(start_program: StartProgram) -> None:
    pytest.importorskip("resource")
    allow_descriptors(2000)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))"
    program = start_program(before=limit, MAX_CONCURRENT_CHATS="4")
    with ExitStack() as links:
        for _ in range(600):
            links.enter_context(program.open(b"GET /health HTTP/1.1\r\nHost: "))
        assert program.health()["status"] == "ok"
        assert program.chat()[0] == 200


def test_a_client_reset_during_an_error_logs_no_traceback(start_program: StartProgram) -> None:
    program = start_program()
    for _ in range(50):
        link = program.open(b"GET /\x00 bad\r\n\r\n" * 20)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        link.close()
    program.health()
    program.signal(signal.SIGTERM)
    assert program.wait() == 0
    assert "Traceback" not in "".join(program.log)


@pytest.mark.parametrize("where", [">&-", "--api-master-key sk-1 >&-", ">/dev/full", "2>&-", "2>/dev/full", "| true"])
def test_the_program_runs_with_closed_or_full_output(kimi: WebChat, where: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = f"{shlex.quote(sys.executable)} -m kimi2api --api-port {port} {where}"
    env = {**os.environ, **COMPILED_ONCE, **kimi.settings}
    process = subprocess.Popen(["sh", "-c", line], env=env, stderr=subprocess.PIPE, start_new_session=True)

    def answers() -> bool:
        with suppress(OSError), closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
            body = '{"messages": [{"role": "user", "content": "x"}]}'
            connection.request("POST", "/v1/chat/completions", body, {"Authorization": "Bearer sk-1"})
            return connection.getresponse().status == 200
        return False

    wait_for(answers)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE)
    assert b"Traceback" not in errors and b"Error" not in errors, errors


def test_a_hangup_is_a_stop(start_program: StartProgram) -> None:
    program = start_program()
    program.signal(signal.SIGHUP)
    assert program.wait() == 0


def test_sigterm_stops_process_1_during_its_start(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-pf", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a process namespace")
    process = subprocess.Popen(
        ["unshare", "-pf", "--kill-child", sys.executable, str(HERE / "kimi2api.py"), "--api-port", "0"],
        stdout=subprocess.PIPE,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    child = int(wait_for(lambda: children.read_text().split())[0])

    def handles_sigterm() -> bool:
        caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{child}/status").read_text(), re.M)
        return bool(caught and int(caught[1], 16) & 1 << (signal.SIGTERM - 1))

    wait_for(handles_sigterm)
    os.kill(child, signal.SIGTERM)
    assert process.wait(PATIENCE) == 128 + signal.SIGTERM
    assert process.stdout and process.stdout.read() == b"", "nothing had been printed yet"
    process.stdout.close()


def test_upstreams_cannot_forge_log_lines(start_program: StartProgram, api_settings: dict[str, str], api: Api) -> None:
    forged = "x\n2026-01-01 00:00:00,000 ERROR forged\x1b[31m"
    api.always = api_sends(500, {"error": {"message": forged, "code": forged, "type": forged}})
    models = "*=local/k2,kimi=moonshotai/Kimi-K2-Instruct"
    program = start_program(**api_settings, FALLBACK_MODELS="kimi", MODELS=models, LOG_LEVEL="DEBUG")
    assert program.chat(model=forged)[0] == 200
    assert "forged\x1b" not in json.dumps(program.health()) and "\\n" not in json.dumps(program.health())
    program.signal(signal.SIGTERM)
    program.wait()
    lines = "".join(program.log)
    assert "forged" in lines and "\x1b" not in lines
    assert all(re.match(r"20\d\d-[\d-]+ [\d:,]+ (DEBUG|INFO|WARNING|ERROR) ", line) for line in program.log)
    assert not re.search(r"^2026-01-01", lines, re.M) and "Starting new HTTP" not in lines


########################################################################################################################
# Appendices
########################################################################################################################


# ----------------------------------------------------------------------------------------------------------------------
# Demo upstream
# ----------------------------------------------------------------------------------------------------------------------


def test_the_demo_repeats_the_remembered_turns() -> None:
    program = Program("--demo", is_new=True, HTTP_PROXY="http://127.0.0.1:9", http_proxy="http://127.0.0.1:9")
    with closing(program):
        for question in ("My name is Ada.", "What is my name?"):
            status, body = program.chat(question, user="ada")
        text = json.loads(body)["choices"][0]["message"]["content"]
        assert status == 200 and "demo" in text and "What is my name?" in text and "My name is Ada." in text
        program.signal(signal.SIGINT)
        assert program.wait() == 0
        assert "Ada" not in "".join(program.log), "no prompt text in the log"


@pytest.mark.parametrize(
    ("format_", "document"),
    [
        (JSON_OBJECT, "{}"),
        (json_schema({"type": "object", "required": ["a"]}), "{}"),
        (json_schema({"type": "array"}), "[]"),
        (json_schema({"anyOf": [{"type": "object"}]}), "{}"),
    ],
    ids=["object", "schema of an object", "schema of an array", "schema of anything"],
)
def test_the_demo_answers_json_requests_with_an_empty_document(
    demo_program: Program, format_: Any, document: str
) -> None:
    status, body = demo_program.chat(response_format=format_)
    assert status == 200 and json.loads(body)["choices"][0]["message"]["content"] == document


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_the_demo_calls_the_first_tool_then_repeats_the_result(demo_program: Program, choice: str) -> None:
    request: dict[str, Any] = {"tools": [WEATHER, CLOCK], "tool_choice": choice}
    messages: list[Any] = [{"role": "user", "content": "Weather?"}]
    status, body = demo_program.chat(messages=messages, **request)
    (call,) = json.loads(body)["choices"][0]["message"]["tool_calls"]
    assert status == 200 and call["function"] == {"name": "get_weather", "arguments": "{}"}
    messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    messages.append({"role": "tool", "tool_call_id": call["id"], "content": "21 degrees"})
    answer = json.loads(demo_program.chat(messages=messages, **request)[1])["choices"][0]["message"]
    assert "21 degrees" in answer["content"] and "Weather?" in answer["content"] and not answer.get("tool_calls")


# ----------------------------------------------------------------------------------------------------------------------
# Description, page
# ----------------------------------------------------------------------------------------------------------------------


def test_every_route_is_described_and_every_description_is_a_route(app: Client) -> None:
    described = {
        (method.upper(), re.sub(r"\{\w+\}", "{}", path))
        for path, methods in app.get("/openapi.json").json["paths"].items()
        for method in methods
    }
    routes = {(route.method, re.sub(r"<[^>]+>", "{}", route.rule)) for route in app.app.routes if route.rule[0] == "/"}
    assert described == routes


def test_answers_conform_to_the_openapi_description(make_app: MakeApp, kimi: WebChat) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    app = make_app(API_MASTER_KEY="sk-1", MAX_RETRIES="0")
    document = app.get("/openapi.json").json
    pytest.importorskip("openapi_spec_validator").validate(document)
    key = {"Authorization": "Bearer sk-1"}

    def valid(body: Any, name: str) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        jsonschema.Draft202012Validator(schema).validate(body)

    def described(path: str, method: str, response: Any) -> None:
        responses = document["paths"][path][method]["responses"]
        content = responses["200" if response.status_int == 200 else "default"]["content"]
        assert response.content_type in content
        if response.content_type == "application/json":
            valid(response.json, content["application/json"]["schema"]["$ref"].rpartition("/")[2])

    chats = [
        {"user": "ada"},
        {"model": "gpt-5"},
        {"messages": []},
        {"stream": True},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"tools": [CLOCK]},
        {"n": 2},
    ]
    for request in chats:
        kimi.answer = '<tool_call>{"name": "clock"}</tool_call>' if "tools" in request else "Hello."
        response = chat(app, headers=key, **request)
        described("/v1/chat/completions", "post", response)
    described("/v1/chat/completions", "post", chat(app))
    for path, template, method in (
        ("/v1/models", "", "get"),
        ("/v1/models/kimi", "/v1/models/{id}", "get"),
        ("/v1/models/x", "/v1/models/{id}", "get"),
        ("/v1/sessions/ada", "/v1/sessions/{user}", "get"),
        ("/v1/sessions/ada", "/v1/sessions/{user}", "delete"),
        ("/v1/sessions/ada", "/v1/sessions/{user}", "get"),
        ("/health", "", "get"),
        ("/openapi.json", "", "get"),
        ("/docs", "", "get"),
        ("/", "", "get"),
    ):
        described(template or path, method, app.request(path, method=method.upper(), headers=key))
    kimi.always = sends(500)
    described("/v1/chat/completions", "post", chat(app, headers=key))
    described("/health", "get", app.get("/health"))


def test_the_page_needs_no_key_and_loads_nothing_from_elsewhere(make_app: MakeApp) -> None:
    app = make_app(API_MASTER_KEY="sk-1")
    for path in ("/", "/docs"):
        response = app.get(path)
        assert response.content_type == "text/html"
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert len(response.body) <= 30_000 and "  // " not in response.text
        assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", response.text) and "innerHTML" not in response.text
    assert app.get("/health").json["key_required"] and app.get("/openapi.json").json["openapi"] == "3.1.0"


@pytest.mark.parametrize("user", [".", ".."])
def test_users_named_as_dots_are_addressed_in_the_query(app: Client, user: str) -> None:
    chat(app, user=user)
    assert app.get(f"/v1/sessions/?user={user}").json["user"] == user
    assert app.request(f"/v1/sessions/?user={user}", method="DELETE").json["deleted"]
    for query in (f"?user={user}", "", "?user=%ff"):
        assert_error(app.get(f"/v1/sessions/{query}"), 404, "session_not_found")


########################################################################################################################
# The whole program
########################################################################################################################


# ----------------------------------------------------------------------------------------------------------------------
# Real clients
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def openai_client(start_program: StartProgram) -> Any:
    openai = pytest.importorskip("openai")
    program = start_program(
        API_MASTER_KEY="sk-test",
        REQUEST_TIMEOUT="0.4",
        MAX_CONCURRENT_CHATS="2",
        CONTEXT_MAX_LENGTH="50",
        MAX_BODY_BYTES="5000",
    )
    return openai.OpenAI(base_url=program.base_url, api_key="sk-test", max_retries=0)


HELLO = [{"role": "user", "content": "Hello"}]


def test_openai_python_chats_streams_and_lists_models(openai_client: Any, kimi: WebChat) -> None:
    kimi.answer = "你好，世界！ Hello, world!"
    completion = openai_client.chat.completions.create(model="kimi", messages=HELLO, user="ada")
    assert completion.choices[0].message.content == kimi.answer and completion.usage.total_tokens > 0
    with_usage = {"stream": True, "stream_options": {"include_usage": True}}
    stream = list(openai_client.chat.completions.create(model="kimi", messages=HELLO, **with_usage))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == kimi.answer
    assert stream[-1].usage.total_tokens > 0
    assert next(model.id for model in openai_client.models.list()) == "kimi"
    assert openai_client.models.retrieve("kimi").id == "kimi"


def test_openai_python_completes_and_embeds(
    start_program: StartProgram, kimi: WebChat, api_settings: dict[str, str], api: Api
) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=start_program(**api_settings).base_url, api_key="none", max_retries=0)
    assert client.completions.create(model="kimi", prompt="x").choices[0].text == kimi.answer
    stream = client.completions.create(model="kimi", prompt="x", stream=True)
    assert "".join(part.choices[0].text for part in stream) == kimi.answer
    api.always = api_sends(200, EMBEDDINGS)
    embeddings = client.embeddings.create(model="local/e1", input=["x"])
    assert embeddings.data[0].embedding == pytest.approx([0.5, -1.25e-05]) and embeddings.model == "local/e1"
    assert api.asked[-1][2]["encoding_format"] == "base64"


def test_openai_python_raises_its_own_exception_for_each_error(openai_client: Any, kimi: WebChat) -> None:
    import openai

    def fails(expected: type[Exception], code: str | None, **request: Any) -> Any:
        with pytest.raises(expected) as raised:
            openai_client.chat.completions.create(**{"model": "kimi", "messages": HELLO, **request})
        assert raised.value.code == code, raised.value
        return raised.value

    fails(openai.BadRequestError, None, messages=[])
    fails(openai.BadRequestError, "context_length_exceeded", messages=[{"role": "user", "content": "x" * 99}])
    fails(openai.NotFoundError, "model_not_found", model="gpt-5")
    too_large = [{"role": "user", "content": "x" * 9999}]
    assert fails(openai.APIStatusError, "request_too_large", messages=too_large).status_code == 413
    for fault, status, code in (
        (sends(500), 502, "upstream_unavailable"),
        (sends(200, "?"), 502, "upstream_invalid_response"),
        (sends(403, JUST_A_MOMENT), 503, "upstream_blocked"),
        (sends(403, "-1"), 502, "upstream_refused"),
        (hangs, 504, "upstream_timeout"),
    ):
        kimi.always = fault
        for stream in (False, True):
            error = fails(openai.InternalServerError, code, stream=stream)
            assert error.status_code == status and error.request_id
        kimi.always = web_chat_answers
        # Otherwise the circuit would open
        openai_client.chat.completions.create(model="kimi", messages=HELLO)
    kimi.always = sends(429, "", Retry_After="60")
    assert fails(openai.RateLimitError, "upstream_rate_limited").response.headers["Retry-After"] == "60"
    with pytest.raises(openai.AuthenticationError):
        openai_client.with_options(api_key="sk-wrong").models.list()


def test_openai_python_obeys_x_should_retry(openai_client: Any, kimi: WebChat) -> None:
    import openai

    patient = openai_client.with_options(max_retries=1)
    kimi.always = sends(500)
    with pytest.raises(openai.InternalServerError):
        patient.chat.completions.create(model="kimi", messages=HELLO)
    assert len(kimi.posts) == 2, "only the program retried"
    kimi.posts.clear()
    kimi.always = web_chat_answers
    kimi.script.append(sends(429))
    assert patient.chat.completions.create(model="kimi", messages=HELLO)
    assert len(kimi.posts) == 2


def test_openai_python_raises_an_error_inside_a_stream(kimi: WebChat, start_program: StartProgram) -> None:
    openai = pytest.importorskip("openai")
    program = start_program(SSE_KEEPALIVE="0.1", MAX_RETRIES="0", REQUEST_TIMEOUT="0.3")
    kimi.always = web_chat_answers_at_the_gate
    client = openai.OpenAI(base_url=program.base_url, api_key="none", max_retries=0)
    with pytest.raises(openai.APIError) as raised:
        list(client.chat.completions.create(model="kimi", messages=HELLO, stream=True))
    assert raised.value.code == "upstream_timeout"


def web_chat_plays_travel_agent(handler: WebChatHandler) -> None:
    """Play a model that calls two tools, one after the other, and then answers."""
    message = handler.form["message"]
    if "工具 book" in message:
        web_chat_says("Booked Paris: 21 degrees, order 7.")(handler)
    elif "工具 get_weather" in message:
        web_chat_says('Nice.\n<tool_call>{"name": "book", "arguments": {"city": "Paris"}}</tool_call>')(handler)
    else:
        web_chat_says('<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>')(handler)


def test_openai_python_calls_tools_and_parses_into_a_model(start_program: StartProgram, kimi: WebChat) -> None:
    openai, pydantic = pytest.importorskip("openai"), pytest.importorskip("pydantic")
    client = openai.OpenAI(base_url=start_program().base_url, api_key="none", max_retries=0)
    City = pydantic.create_model("City", name=(str, ...), people=(int, ...))
    kimi.answer = 'Of course:\n```json\n{"name": "Paris", "people": 2100000}\n```'
    parsed = client.chat.completions.parse(model="kimi", messages=HELLO, response_format=City).choices[0].message.parsed
    assert parsed == City(name="Paris", people=2100000)
    kimi.always = web_chat_plays_travel_agent
    with client.chat.completions.stream(model="kimi", messages=HELLO, tools=[WEATHER]) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.done" in kinds
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Paris"}


chats_and_responses = pytest.mark.parametrize("responses", [False, True], ids=["chats", "responses"])


def test_openai_python_sends_a_streamed_message_back_unchanged(
    start_program: StartProgram, api_settings: dict[str, str], api: Api
) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=start_program(**api_settings).base_url, api_key="none", max_retries=0)
    reasoning = [
        {"role": "assistant", "reasoning_details": [{**DETAILS[0], "text": text}]} for text in ("I see", " it")
    ]
    api.always = api_answers(deltas=[*reasoning, call_delta(0, "c1", "a", "{}")])
    asks: Any = {"model": "local/k2", "messages": [*HELLO], "tools": [tool("a")]}
    with client.chat.completions.stream(**asks) as stream:
        message = stream.get_final_completion().choices[0].message
    asks["messages"] += [message, {"role": "tool", "tool_call_id": "c1", "content": "r"}]
    assert client.chat.completions.create(**asks).choices
    sent = api.asked[-1][2]["messages"][1]
    assert sent.keys() == {"role", "content", "tool_calls", "reasoning_details"}
    assert sent["role"] == "assistant" and sent["reasoning_details"] == DETAILS


def test_langchain_runs_an_agent_loop_of_several_steps(start_program: StartProgram, kimi: WebChat) -> None:
    pytest.importorskip("langchain_openai")
    kimi.always = web_chat_plays_travel_agent
    program = start_program()
    for responses, streaming in itertools.product((False, True), (False, True)):
        assert_langchain_books(program, responses, streaming)


def assert_langchain_books(program: Program, responses: bool, streaming: bool) -> None:
    import langchain_openai
    from langchain_core.messages import HumanMessage, ToolMessage

    model = langchain_openai.ChatOpenAI(
        base_url=program.base_url,
        api_key="none",
        model="kimi",
        max_retries=0,
        streaming=streaming,
        stream_usage=True,
        temperature=0,
        use_responses_api=responses,
    ).bind_tools([WEATHER, tool("book", "Book", city={"type": "string"})])
    results = {"get_weather": "21 degrees", "book": "order 7"}
    messages: list[Any] = [HumanMessage("Find out how Paris is and book it.")]
    used = []
    for _ in range(5):
        messages.append(model.invoke(messages))
        if not messages[-1].tool_calls:
            break
        for call in messages[-1].tool_calls:
            used.append((call["name"], call["args"]))
            messages.append(ToolMessage(results[call["name"]], tool_call_id=call["id"]))
    assert used == [("get_weather", {"city": "Paris"}), ("book", {"city": "Paris"})]
    assert messages[-1].text == "Booked Paris: 21 degrees, order 7."
    assert messages[-1].usage_metadata["total_tokens"] > 0


TRAVEL = ([("get_weather", '{"city": "Paris"}')], [("book", '{"city": "Paris"}')])


def assert_thinking_was_served(api: Api) -> None:
    """Assert that the API refused only the first request, for its temperature, and then received all reasoning."""
    bodies = [body for _, _, body in api.asked]
    assert len(bodies) == 4 and "temperature" in bodies[0] and "temperature" not in bodies[1]
    calls = [message for message in bodies[-1]["messages"] if message["role"] == "assistant"]
    assert [message["reasoning_content"] for message in calls] == ["I think of step 0.", "I think of step 1."]


@chats_and_responses
def test_langchains_agent_works_with_a_thinking_model(
    start_program: StartProgram, api_settings: dict[str, str], api: Api, responses: bool
) -> None:
    agents, langchain = pytest.importorskip("langchain.agents"), pytest.importorskip("langchain_openai")
    used = []

    def get_weather(city: str) -> str:
        """The weather of a city."""
        used.append(city)
        return "21 degrees"

    def book(city: str) -> str:
        """Book a city."""
        used.append(city)
        return "order 7"

    api.always = api_thinks(*TRAVEL)
    model = langchain.ChatOpenAI(
        base_url=start_program(**api_settings).base_url,
        api_key="none",
        model="local/k3",
        temperature=0.7,
        max_retries=0,
        use_responses_api=responses,
    )
    agent = agents.create_agent(model, [get_weather, book])
    answer = agent.invoke({"messages": [{"role": "user", "content": "Find out how Paris is and book it."}]})
    assert answer["messages"][-1].text == "Done." and used == ["Paris", "Paris"]
    assert_thinking_was_served(api)


@chats_and_responses
def test_the_agents_sdk_streams_from_a_thinking_model(
    start_program: StartProgram, api_settings: dict[str, str], api: Api, responses: bool
) -> None:
    agents, openai = pytest.importorskip("agents"), pytest.importorskip("openai")
    agents.set_tracing_disabled(True)
    agents.set_default_openai_api("responses" if responses else "chat_completions")
    used = []

    @agents.function_tool  # type: ignore[misc]
    def get_weather(city: str) -> str:
        used.append(city)
        return "21 degrees"

    @agents.function_tool  # type: ignore[misc]
    def book(city: str) -> str:
        used.append(city)
        return "order 7"

    async def ask() -> Any:
        client = openai.AsyncOpenAI(base_url=program.base_url, api_key="none", max_retries=0)
        agents.set_default_openai_client(client)
        agent = agents.Agent(
            name="travel",
            tools=[get_weather, book],
            model="thinker",  # the SDK reads the part before a slash as its own prefix
            model_settings=agents.ModelSettings(temperature=0.7),
        )
        result = agents.Runner.run_streamed(agent, "Find out how Paris is and book it.")
        async for _ in result.stream_events():
            pass
        return result.final_output

    api.always = api_thinks(*TRAVEL)
    program = start_program(**api_settings, MODELS="kimi=kimi,thinker=local/k3")
    assert asyncio.run(ask()) == "Done." and used == ["Paris", "Paris"]
    assert_thinking_was_served(api)


@pytest.fixture
def restarting_program(
    start_program: StartProgram, api_settings: dict[str, str], tmp_path: Path
) -> tuple[str, Callable[[], None]]:
    """The base URL of a program with a SQLite store, and a function that kills and restarts it at the same address."""
    settings = {
        **api_settings,
        "MODELS": "kimi=kimi,thinker=local/k3",
        "SESSION_STORE": f"sqlite:{tmp_path}/sessions.db",
    }
    programs = [start_program(**settings)]

    def restart() -> None:
        programs[-1].process.kill()
        programs[-1].wait()
        programs.append(start_program("--api-port", str(programs[0].port), **settings))

    return programs[0].base_url, restart


def test_langchains_agent_continues_after_a_restart(
    restarting_program: tuple[str, Callable[[], None]], api: Api
) -> None:
    agents, langchain = pytest.importorskip("langchain.agents"), pytest.importorskip("langchain_openai")
    base_url, restart = restarting_program

    def get_weather(city: str) -> str:
        """The weather of a city."""
        restart()
        return "21 degrees"

    def book(city: str) -> str:
        """Book a city."""
        restart()
        return "order 7"

    api.always = api_thinks(*TRAVEL)
    model = langchain.ChatOpenAI(base_url=base_url, api_key="none", model="thinker", temperature=0.7, max_retries=0)
    agent = agents.create_agent(model, [get_weather, book])
    answer = agent.invoke({"messages": [{"role": "user", "content": "Find out how Paris is and book it."}]})
    assert answer["messages"][-1].text == "Done."
    assert reasoning_sent(api) == ["I think of step 0.", "I think of step 1."]


def test_the_agents_sdk_continues_after_a_restart(
    restarting_program: tuple[str, Callable[[], None]], api: Api
) -> None:
    agents, openai = pytest.importorskip("agents"), pytest.importorskip("openai")
    agents.set_tracing_disabled(True)
    agents.set_default_openai_api("chat_completions")
    base_url, restart = restarting_program

    @agents.function_tool  # type: ignore[misc]
    def get_weather(city: str) -> str:
        restart()
        return "21 degrees"

    @agents.function_tool  # type: ignore[misc]
    def book(city: str) -> str:
        restart()
        return "order 7"

    async def ask() -> Any:
        agents.set_default_openai_client(openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=1))
        agent = agents.Agent(name="travel", tools=[get_weather, book], model="thinker")
        return (await agents.Runner.run(agent, "Find out how Paris is and book it.")).final_output

    api.always = api_thinks(*TRAVEL)
    assert asyncio.run(ask()) == "Done."
    assert reasoning_sent(api) == ["I think of step 0.", "I think of step 1."]


FORGETFUL = "kimi2api.MAX_REASONING_BYTES = 0"  # the program keeps no reasoning, so all it has comes from the client


def strict_client(program: Program) -> Any:
    """Return a client of the openai package that validates all responses against its types."""
    openai = pytest.importorskip("openai")
    return openai.OpenAI(
        base_url=program.base_url, api_key="none", max_retries=0, _strict_response_validation=True)


@pytest.mark.parametrize("model", ["kimi", "local/k2"])
def test_openai_python_creates_continues_and_deletes_responses(
    start_program: StartProgram, kimi: WebChat, api_settings: dict[str, str], api: Api, model: str
) -> None:
    api.always = api_answers(kimi.answer[:5], kimi.answer[5:])
    client = strict_client(start_program(**api_settings))
    import openai

    first = client.responses.create(model=model, instructions="Be short.", input="One", metadata={"a": "b"})
    assert first.output_text == kimi.answer and first.status == "completed" and first.usage.total_tokens > 0
    assert first.instructions == "Be short." and first.metadata == {"a": "b"}
    *others, last = client.responses.create(model=model, input="Two", previous_response_id=first.id, stream=True)
    assert last.type == "response.completed" and last.response.output_text == kimi.answer
    assert [event.sequence_number for event in (*others, last)] == [*range(len(others) + 1)]
    sent = kimi.posts[-1]["message"] if model == "kimi" else json.dumps(api.asked[-1][2]["messages"])
    assert "One" in sent and "Two" in sent and kimi.answer in sent and "Be short." not in sent
    kept = client.responses.retrieve(last.response.id)
    assert kept.output_text == kimi.answer and kept.previous_response_id == first.id
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as raised:
        client.responses.create(model=model, input="Three", previous_response_id=first.id)
    assert raised.value.param == "previous_response_id" and raised.value.code == "previous_response_not_found"


@pytest.mark.parametrize("model", ["kimi", "local/k2"])
def test_openai_python_streams_and_parses_a_response_into_a_model(
    start_program: StartProgram, kimi: WebChat, api_settings: dict[str, str], api: Api, model: str
) -> None:
    pydantic = pytest.importorskip("pydantic")
    City = pydantic.create_model("City", name=(str, ...), people=(int, ...))
    paris = '{"name": "Paris", "people": 2100000}'
    kimi.answer = f"Of course:\n```json\n{paris}\n```"
    api.always = api_answers(paris[:9], paris[9:])
    client = strict_client(start_program(**api_settings))
    asks = {"model": model, "input": "Which city?", "text_format": City}
    assert client.responses.parse(**asks).output_parsed == City(name="Paris", people=2100000)
    with client.responses.stream(**asks) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert final.output_parsed == City(**json.loads(text)) == City(name="Paris", people=2100000)


@json_and_stream
def test_openai_python_carries_reasoning_in_stateless_responses(
    start_program: StartProgram, api_settings: dict[str, str], api: Api, stream: bool
) -> None:
    api.always = api_thinks(*TRAVEL)
    client = strict_client(start_program(**api_settings, before=FORGETFUL))
    items: list[Any] = [{"role": "user", "content": "Find out how Paris is and book it."}]
    tools = [{"type": "function", **entry["function"]} for entry in (WEATHER, tool("book", city={"type": "string"}))]
    used = []
    while not used or items[-1]["type"] == "function_call_output":
        asks = {"model": "local/k3", "input": items, "tools": tools, "store": False, **REASONING}
        if stream:
            with client.responses.stream(**asks) as events:
                response = events.get_final_response()
        else:
            response = client.responses.create(**asks)
        items += [item.to_dict() for item in response.output]
        for call in response.output:
            if call.type == "function_call":
                used.append((call.name, json.loads(call.arguments)))
                items.append({"type": "function_call_output", "call_id": call.call_id, "output": "fine"})
    assert used == [("get_weather", {"city": "Paris"}), ("book", {"city": "Paris"})]
    assert response.output_text == "Done." and len(api.asked) == 3
    assert reasoning_sent(api) == ["I think of step 0.", "I think of step 1."]


def test_openai_python_raises_errors_of_responses(start_program: StartProgram, kimi: WebChat) -> None:
    client = strict_client(start_program())
    import openai

    def fails(expected: type[Exception], param: str | None, **request: Any) -> Any:
        for stream in (False, True):
            with pytest.raises(expected) as raised:
                client.responses.create(**{"model": "kimi", "input": "x", "stream": stream, **request})
            assert raised.value.param == param
        return raised.value

    image = {"role": "user", "content": [{"type": "input_image", "image_url": "data:x", "detail": "low"}]}
    fails(openai.BadRequestError, "input", input=[{"role": "user", "content": "x"}, image])
    fails(openai.BadRequestError, "background", background=True)
    fails(openai.NotFoundError, "model", model="gpt-5")
    kimi.always = sends(403, JUST_A_MOMENT)
    assert fails(openai.InternalServerError, None).code == "upstream_blocked"


def test_openai_python_receives_the_reason_of_a_failed_response(
    start_program: StartProgram, kimi: WebChat, api_settings: dict[str, str], api: Api
) -> None:
    kimi.always = web_chat_answers_at_the_gate
    api.always = api_streams(api_chunk({"content": "half"}), {"error": {"message": "out of order"}})
    client = strict_client(start_program(**api_settings, SSE_KEEPALIVE="0.1", MAX_RETRIES="0", REQUEST_TIMEOUT="0.3"))
    for model, words in (("kimi", "0.3 s"), ("local/k2", "out of order")):
        *_, last = client.responses.create(model=model, input="x", stream=True)
        assert last.type == "response.failed" and last.response.status == "failed"
        assert words in last.response.error.message
    with client.responses.stream(model="local/k2", input="x") as stream:
        assert "".join(event.delta for event in stream if event.type == "response.output_text.delta") == "half"
        with pytest.raises(RuntimeError):
            stream.get_final_response()


def test_openai_python_retries_through_a_kill_and_restart(start_program: StartProgram, kimi: WebChat) -> None:
    openai = pytest.importorskip("openai")
    kimi.script.append(web_chat_answers_at_the_gate)
    program = start_program()
    client = openai.OpenAI(base_url=program.base_url, api_key="none", max_retries=8)
    with ThreadPoolExecutor(1) as pool:
        answered = pool.submit(client.chat.completions.create, model="kimi", messages=HELLO)
        wait_for(lambda: kimi.posts)
        program.close()
        start_program("--api-port", str(program.port))
        assert answered.result(PATIENCE * 2).choices[0].message.content == kimi.answer


def node_package(name: str) -> Path:
    """Return the folder of a package that .ci/run has installed. Skip the test if there is none."""
    folder = HERE / ".ci" / "node_modules" / name
    if not folder.exists():
        pytest.skip(f"needs npm's {name}, which .ci/run installs")
    return folder


def run_node(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["node", str(HERE / ".ci" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)


HOSTILE_MARKDOWN = """# Heading <script>alert(1)</script>

1. One with `code`, *italic*, 2 * 3 * 4
   ```html
   <img src=x onerror=alert(2)>
   ```
   ```C#
   ```
   ```constructor
   ```
2. **Two**
   - nested <b>text</b>

* [a link](javascript:alert(3)) and <a href="javascript:alert(4)" onclick="alert(5)">another</a>
<iframe src="javascript:alert(6)"></iframe><svg onload=alert(7)>

| Way | <b>Time</b> |
|-----|:-----------:|
| `a` | **1** s     |
"""


def api_plays_page_steps(handler: ApiHandler) -> None:
    """Play the part that the newest message names; echo any other message."""
    newest = handler.server.asked[-1][2]["messages"][-1]["content"]
    if newest == "words without end":
        return api_streams_words(handler)
    if newest == "markdown":
        pieces = [HOSTILE_MARKDOWN[at : at + 7] for at in range(0, len(HOSTILE_MARKDOWN), 7)]
        deep = "".join(" " * depth + "- x\n" for depth in range(99))
        nested = [deep, *(mark * 10_000 for mark in ("> ", "**`", "**"))]
        return api_answers(*pieces, "\n\n".join(nested), "x" * 500_000)(handler)
    asked_before = [body for _, _, body in handler.server.asked[:-1] if body["messages"][-1]["content"] == newest]
    if newest == "break" and not asked_before:
        return api_streams(api_chunk({"content": "Half"}))(handler)
    if newest == "refuse":
        return api_sends(402, {"error": {"message": "No money.", "code": "no_money"}})(handler)
    return api_answers(deltas=[{"reasoning_content": "I think."}, {"content": f"You said: {newest}"}])(handler)


HOSTILE_USERS = [
    "../x/y?z#&%2F\"'", ".", "..", "😀" * 512, "<img src=x onerror=alert(1)>", "\u202eada \u0645\u0631\u062d"]


class Browser:
    """Chromium on the page of one program, which all page tests share. .ci/page.mjs takes its steps."""

    def __init__(self, steps: list[str]) -> None:
        """steps: those of all selected tests, which one run of the browser takes."""
        self.kimi, self.api = WebChat(), Api()
        self.api.always = api_plays_page_steps
        self.program = Program(
            API_MASTER_KEY="ann:sk-1", TOKENS_PER_DAY="1000000", REQUESTS_PER_MINUTE="600", PROVIDERS="local",
            LOCAL_BASE_URL=self.api.url, **self.kimi.settings)
        for user in HOSTILE_USERS:
            body = {"messages": HELLO, "user": user}
            assert self.program.ask("POST", "/v1/chat/completions", body, **bearer("sk-1"))[0] == 200
        self._errors, self._seen = self._take(*steps)

    def take(self, *steps: str) -> dict[str, Any]:
        """Return what the page showed in these steps."""
        errors, seen = self._errors, self._seen
        if errors:  # perhaps in the steps of another test
            errors, seen = self._take(*steps)
        assert not errors, errors
        return seen

    def _take(self, *steps: str) -> tuple[list[str], dict[str, Any]]:
        done = run_node("page.mjs", f"http://127.0.0.1:{self.program.port}", "sk-1", *steps)
        if done.returncode:
            return [done.stderr], {}
        seen = json.loads(done.stdout)
        errors = seen["problems"] + [f"requests {url}" for url in seen["elsewhere"]]
        errors += ["the page scrolls sideways"] * any(seen["wide"])
        errors += ["the page moves while it loads"] * any(seen["shifts"])
        return errors, seen

    def messages(self, newest: str) -> list[str]:
        """Return the messages of the last request to the API whose newest message is this."""
        asked = [[message["content"] for message in body["messages"]] for _, _, body in self.api.asked]
        return [texts for texts in asked if texts[-1] == newest][-1]

    def close(self) -> None:
        self.program.close()
        self.kimi.stop()
        self.api.stop()


@pytest.fixture(scope="module")
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    if not Path("/usr/bin/chromium").exists():
        pytest.skip("needs Debian's chromium, which .ci/run installs")
    node_package("playwright-core")
    marks = [item.get_closest_marker("page") for item in request.session.items]
    with closing(Browser([step for mark in marks if mark for step in mark.args])) as browser:
        yield browser


@pytest.fixture
def seen(request: pytest.FixtureRequest, browser: Browser) -> dict[str, Any]:
    """What the page showed in the steps that the test's mark names."""
    return browser.take(*request.node.get_closest_marker("page").args)


@pytest.mark.page("keyIsAsked")
def test_the_page_requests_the_key_and_reports_a_wrong_one(seen: dict[str, Any]) -> None:
    asks = "This server asks for an API key: type it at the top."
    assert seen["key"] == [
        ["API key needed", asks, "", "false"],
        [401, "API key needed", asks, "The API key is wrong.", "true"],
        [asks],
        2,
        ["Ask anything", "Name the session and the server remembers it.", "", "false"],
    ]
    assert seen["focused"] == "API key" and seen["noScript"] == "This page needs JavaScript."
    assert seen["connect"] and seen["dark"]


@pytest.mark.page("conversation")
def test_the_page_holds_a_conversation_of_three_turns(seen: dict[str, Any], browser: Browser) -> None:
    questions = ["one", "two\nlines", "three"]
    assert seen["turns"] == [text for question in questions for text in (question, f"You said: {question}")]
    assert browser.messages("three") == seen["turns"][:5]
    assert seen["thought"] == ["Thinking", "I think."] and seen["begun"] == 0
    assert seen["copied"] == "You said: three"


@pytest.mark.page("stop")
def test_the_page_stops_an_answer_and_keeps_what_has_arrived(seen: dict[str, Any], browser: Browser) -> None:
    assert seen["stopped"] == ["Stopped", "Send", 4] and browser.api.hung_up.wait(PATIENCE)
    first, partial, last = browser.messages("after the stop")
    assert first == "words without end" and partial.startswith("word word") and last == "after the stop"


@pytest.mark.page("markdown")
def test_the_page_renders_markdown_and_no_html(seen: dict[str, Any]) -> None:
    assert seen["markdown"].pop(":is(script, img, a, svg, iframe, b)") == 0 and seen["seconds"] < 20
    assert seen["markdown"].pop("strong") > 1
    assert seen["markdown"] == {"h3": 1, "ul": 11, "ol": 1, "li": 103, "pre": 3, "em": 1, "td": 4}
    assert seen["cells"] == ["Way", "<b>Time</b>", "a", "1 s"]
    assert seen["code"].strip() == seen["copiedCode"].strip() == "<img src=x onerror=alert(2)>"
    assert seen["inline"][0] == "code"
    assert seen["items"][1:3] == ["Two\nnested <b>text</b>", "nested <b>text</b>"]
    assert seen["items"][3].startswith("[a link](javascript:alert(3)) and <a href=")


@pytest.mark.page("failures")
def test_the_page_shows_errors_with_advice_and_retries(seen: dict[str, Any]) -> None:
    advice = "Try again or pick another model. Run kimi2api --check to see why."
    broken = "local ended the stream before the answer was complete. (upstream_unavailable)"
    refused = ["", "local: No money. (no_money)", advice]
    focus = "Message"
    assert seen["failures"] == {
        "break": [["Half", broken, advice], ["break", "You said: break"], focus],
        "refuse": [refused, ["refuse", *refused], focus],
        "vanish": [["Half", "The answer broke off.", advice], ["vanish", "You said: vanish"], focus],
        "away": [["", "The server cannot be reached.", "Is kimi2api running?"], ["away", "You said: away"], focus],
    }


@pytest.mark.page("sessions")
def test_the_page_reads_continues_and_deletes_sessions_by_keyboard(seen: dict[str, Any], browser: Browser) -> None:
    assert len(seen["names"]) == len(HOSTILE_USERS)
    assert seen["read"] == ["Hello", browser.kimi.answer] and seen["continued"] == ["..", 4]
    assert browser.messages("and more") == ["Hello", browser.kimi.answer, "and more"], "the server adds its turns"
    assert seen["forgot"] == ["Forget", *["Really forget?"] * 3, "SUMMARY", 0]
    assert len(seen["left"]) == 3 and not set(seen["left"]) & set(HOSTILE_USERS[:3])


@pytest.mark.page("staysAsItIs")
def test_a_refresh_of_the_page_keeps_the_selection(seen: dict[str, Any]) -> None:
    assert seen["meters"] == [64, 1_000_000] and seen["bars"] == 1
    assert seen["selected"] == "Requests" and seen["askedWhileHidden"] == 0 and seen["described"] == 1


@pytest.mark.page("lateAnswers")
def test_late_answers_do_not_overwrite_the_page(seen: dict[str, Any]) -> None:
    assert seen["late"] == ["kimi", "Name the session and the server remembers it."]
    assert seen["away"] == ["The server cannot be reached."] * 2


@pytest.mark.page("languages")
def test_the_page_has_two_languages(seen: dict[str, Any]) -> None:
    assert seen["languages"] == [
        ["en", "Send", "Message", "Overview\nSessions\nConnect\nAPI", "Stop"],
        ["zh-CN", "发送", "输入消息", "概览\n会话\n接入\nAPI", "Stop"],
        "发送",
        "发送",
        "Send",
    ]


@pytest.mark.page("extremes")
def test_the_page_fits_every_window_with_extreme_data(seen: dict[str, Any]) -> None:
    assert seen["told"] == [
        ["上游服务异常：1 / 2", 1, 0, 101, 1, ""],
        ["运行正常", 0, 0, 0, 1, "无"],
        ["1 of 2 upstreams failing", 1, 0, 101, 1, ""],
        ["Running", 0, 0, 0, 1, "None"],
    ]


def run_client(client_name: str, program: Program, model: str) -> Any:
    node_package({"ai-responses": "@ai-sdk/openai"}.get(client_name, client_name.removesuffix("-responses")))
    done = run_node("clients.mjs", client_name, program.base_url, "sk-1", model)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("client_name", ["openai", "openai-responses", "ai", "ai-responses"])
def test_nodes_clients_work_with_a_thinking_model(
    start_program: StartProgram, api_settings: dict[str, str], api: Api, client_name: str
) -> None:
    api.always = api_thinks(*TRAVEL)
    result = run_client(client_name, start_program(**api_settings, API_MASTER_KEY="sk-1"), "local/k3")
    assert result == {"calls": ["get_weather", "book"], "text": "Done.", "status": 401}
    assert_thinking_was_served(api)


PROOF = {"cmd": "echo made by $((40 + 2)) > proof"}
A_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        pytest.param(
            [],
            [[("apply_patch", {"input": "*** Begin Patch\n*** Add File: proof\n+made by 42\n*** End Patch"})]],
            id="as the README says",
        ),
        pytest.param(
            ["--model", "gpt-5.6-sol"],
            [[("functions__exec", {"input": f"text(await tools.exec_command({json.dumps(PROOF)}))"})]],
            id="a model whose tools stand in the input",
        ),
        pytest.param(
            ["--model", "moonshot/kimi-k3"],
            [
                [("exec_command", PROOF)],
                [("multi_agent_v1__wait_agent", {"targets": ["nobody"]}), ("view_image", {"path": "pixel.png"})],
            ],
            id="a model that Codex does not know",
        ),
    ],
)
def test_codex_runs_the_tools_of_a_thinking_model(
    start_program: StartProgram, api: Api, tmp_path: Path, flags: list[str], steps: Any
) -> None:
    codex = HERE / ".ci" / "node_modules" / ".bin" / "codex"
    if not codex.exists():
        pytest.skip("needs npm's @openai/codex, which .ci/run installs")
    api.always = api_thinks(*([(name, json.dumps(arguments)) for name, arguments in step] for step in steps))
    models = "kimi=kimi,*=moonshot/kimi-k3"
    moonshot = {"MOONSHOT_API_KEY": "sk-theirs", "MOONSHOT_BASE_URL": api.url, "MODELS": models}
    program = start_program(before=FORGETFUL, API_MASTER_KEY="sk-codex", **moonshot)
    home = tmp_path / ".codex"
    home.mkdir()
    config = re.search(r"```toml\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.S)[1]
    (home / "config.toml").write_text(config.replace(":8088/", f":{program.port}/"))
    (tmp_path / "pixel.png").write_bytes(b64decode(A_PIXEL))
    done = subprocess.run(
        [codex, "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", *flags, "Prove it."],
        env={**os.environ, "HOME": str(tmp_path), "CODEX_HOME": str(home), "KIMI2API_KEY": "sk-codex"},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=PATIENCE * 3,
    )
    assert done.returncode == 0 and done.stdout.strip() == "Done.", done.stderr
    assert (tmp_path / "proof").read_text() == "made by 42\n"
    assert len(api.asked) == len(steps) + 1
    assert reasoning_sent(api) == [f"I think of step {number}." for number in range(len(steps))]
    messages = api.asked[-1][2]["messages"]
    calls = [call["function"] for message in messages for call in message.get("tool_calls", ())]
    called = [(call["name"], json.loads(call["arguments"])) for call in calls]
    assert called == [call for step in steps for call in step]


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: no request causes a 500, a hang or a broken connection
# ----------------------------------------------------------------------------------------------------------------------


def test_json_of_any_shape_is_answered_or_refused(app: Client, kimi: WebChat) -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    document = app.get("/openapi.json").json
    scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
    anything = st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
        max_leaves=6,
    )
    names = sorted(document["components"]["schemas"]["Request"]["properties"])
    roles = ["system", "developer", "user", "assistant", "tool", "function", "boss"]
    message = st.fixed_dictionaries(
        {"role": st.sampled_from(roles), "content": st.text(max_size=9) | anything},
        optional={"tool_calls": anything, "tool_call_id": anything, "name": anything},
    )
    function = st.fixed_dictionaries(
        {
            "type": st.just("function"),
            "function": st.fixed_dictionaries(
                {"name": st.text(max_size=5)}, optional={"description": anything, "parameters": anything}
            ),
        }
    )
    request = st.fixed_dictionaries(
        {"messages": st.lists(message, max_size=3) | anything},
        optional={
            **{name: anything for name in names if name != "messages"},
            "stream": st.booleans(),
            "tools": st.lists(function | anything, max_size=2),
            "response_format": st.sampled_from([{"type": "json_object"}]) | anything,
            "zzz": anything,
        },
    )
    tried = 0

    @hypothesis.settings(
        max_examples=100, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(request | anything)
    def holds(body: Any) -> None:
        nonlocal tried
        tried += 1
        response = app.post("/v1/chat/completions", json.dumps(body).encode(), content_type="application/json")
        assert response.status_int in (200, 400, 404, 502), response.text
        if response.status_int != 200:
            assert_error(response, response.status_int, response.json["error"]["code"])
            assert response.status_int != 502 or response.json["error"]["code"] == "invalid_json_answer", response.text

    holds()
    assert tried >= 100


def test_paths_and_headers_of_any_bytes_are_answered(demo_program: Program) -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(
        max_examples=200, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(
        st.sampled_from([b"GET", b"POST", b"DELETE", b"OPTIONS", b"HEAD", b"BREW"]),
        st.binary(max_size=30),
        st.binary(max_size=30),
        st.sampled_from([b"Host", b"Origin", b"Authorization", b"X-Request-Id", b"Content-Type", b"Accept"]),
        st.booleans(),
    )
    def holds(method: bytes, path: bytes, value: bytes, name: bytes, escaped: bool) -> None:
        path = b"".join(b"%%%02x" % byte for byte in path) if escaped else re.sub(rb"[\x00-\x20]", b"", path)
        value = re.sub(rb"[\x00-\x1f\x7f]", b"", value)
        header = name + b": " + value
        with demo_program.open(
            method + b" /v1/" + path + b" HTTP/1.1\r\n" + header + b"\r\nConnection: close\r\n\r\n"
        ) as link:
            response, body = read_response(link, method.decode())
        assert response.status in (200, 204, 400, 401, 403, 404, 405), (response.status, body)
        assert response.headers["X-Request-Id"]
        if response.status >= 400 and method != b"HEAD":
            assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}

    holds()
    assert demo_program.chat()[0] == 200 and not [line for line in demo_program.log if "Traceback" in line]


def test_a_thousand_idle_connections_delay_nobody(start_program: StartProgram) -> None:
    allow_descriptors(4096)
    program = start_program()
    half_a_body = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
    with ExitStack() as links:
        for sent in [half_a_body, b"POST /v1", b"\r\n"] * 100 + [b""] * 700:
            links.enter_context(program.open(sent))
        began = time.monotonic()
        program.health()
        assert time.monotonic() - began < PATIENCE / 4
        assert program.chat()[0] == 200
    assert program.chat()[0] == 200


def test_a_truncated_body_is_dropped_and_pipelined_requests_answered(
    start_program: StartProgram, kimi: WebChat
) -> None:
    program = start_program()
    half_a_body = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{}"
    with program.open(half_a_body) as link:
        link.shutdown(socket.SHUT_WR)
        assert link.recv(1) == b""
    with program.open(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5) as link:
        assert read_until(link, b"HTTP/1.1 200 OK", 5)
    assert not kimi.posts


def repeat_to(text: str, size: int) -> str:
    return text * (size // len(text))


MB = 1 << 20
LONG = 150_000  # characters; quadratic time would be many times STALL
HOSTILE_ANSWERS = {
    "fence, spaces": "```" + " " * LONG + "x",
    "fences": repeat_to("``` ", LONG),
    "tool call marks": repeat_to("<tool_call>", LONG),
    "K2's marks": repeat_to("<|tool_call_begin|>a", LONG),
    "K2's mark, a long name": "<|tool_call_begin|>" + "a" * LONG,
    "K2's mark, digits": "<|tool_call_begin|>a:" + "1" * LONG,
    "braces and letters": repeat_to("{x", LONG),
    "lists and numbers": repeat_to("[1,", LONG),
    "lists, empty": repeat_to("[],", LONG),
    "open strings": repeat_to('{"', LONG),
    "escapes": '{"' + repeat_to("\\\\\"", LONG) + "x",
    "angle brackets": repeat_to("<", LONG),
    "braces that are none": repeat_to("{x}", LONG),
    "ordinals": repeat_to("[1st]", LONG),
    "joined emoji": repeat_to("\U0001f468\u200d", LONG),
    "combining marks": "a" + repeat_to("\u0301", LONG),
    "spaces": repeat_to(" ", LONG) + "x",
}


def hostile_web_chat_cases() -> Iterator[Any]:
    for name, text in HOSTILE_ANSWERS.items():
        yield pytest.param("post", web_chat_says(text), id=f"answer: {name}")
    refusals = {"<": "<" * LONG, "&": "&" * LONG, "objects": repeat_to('{"a":', LONG)}
    for name, text in refusals.items():
        refusal = json.dumps({"success": False, "data": text})
        yield pytest.param("post", sends(200, refusal, "application/json"), id=f"refusal of {name}")
    for text in ("kimi_ajax ", "</script>", "kimi_ajax nonce: ", "kimi_ajax 'nonce' "):
        yield pytest.param("page", sends(200, repeat_to(text, LONG)), id=f"page of {text}")
    for text in ("<form ", "cf-", " "):
        yield pytest.param(
            "page", sends(503, "<html>" + repeat_to(text, LONG), **CLOUDFLARE), id=f"503 page of {text!r}"
        )
    yield pytest.param("post", sends(403, "{" + repeat_to(" cloudflar", LONG)), id="403 of half a problem")
    yield pytest.param("post", sends_raw(b"HTTP/1.1 200 " + b"<" * 60_000 + b"\r\n\r\n"), id="status line of <")
    yield pytest.param("post", sends_raw(b"<" * LONG), id="no HTTP")
    cookies = b"".join(b"Set-Cookie: a%d=%b; expires=%b\r\n" % (n, b"x" * 3000, b"1" * 3000) for n in range(20))
    yield pytest.param("page", sends_raw(b"HTTP/1.1 200 OK\r\n" + cookies + b"Content-Length: 0\r\n\r\n"), id="cookies")


def hostile_request_cases() -> Iterator[Any]:
    def offering(parameters: Any) -> dict[str, Any]:
        return {"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}]}

    names = [str(number) for number in range(50_000)]
    yield pytest.param(offering({"properties": {name: {} for name in names}, "required": names}), id="required")
    yield pytest.param(offering({"enum": names}), id="enum")
    yield pytest.param({"tools": [tool(name) for name in names[:10_000]]}, id="tools")
    yield pytest.param({"messages": [{"role": "user", "content": "x"}] * 20_000}, id="messages")
    yield pytest.param({"messages": [{"role": "tool", "content": "x"}] * 20_000, "user": "ada"}, id="tool results")
    parts = [{"type": "text", "text": "x"}] * 30_000
    yield pytest.param({"messages": [{"role": "user", "content": parts}]}, id="parts")
    yield pytest.param({"stop": ["\u0301" * 1000] * 4, "max_tokens": 1}, id="stop")


@pytest.fixture(scope="module")
def shared_program() -> Iterator[tuple[Program, WebChat]]:
    """One program for all hostile texts, and its web chat."""
    kimi = WebChat()
    settings = {**kimi.settings, "MAX_RETRIES": "0", "CONTEXT_MAX_LENGTH": "99999999", "STREAM_MAX_SECONDS": "0.1"}
    before = "kimi2api.FAILURES_TO_OPEN = 10**9"
    with closing(Program(**settings, before=before, LOG_LEVEL="ERROR")) as program:
        yield program, kimi
    kimi.stop()


def chat_with_health_checks(program: Program, **body: Any) -> tuple[int, float]:
    """Return the status of a chat, and the longest time in seconds that /health took meanwhile."""
    longest = 0.0
    asked_at = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(program.chat, **body)
        while not asked.done():
            began = time.monotonic()
            program.health()
            longest = max(longest, time.monotonic() - began)
            time.sleep(0.01)
    assert time.monotonic() - asked_at < STALL * 2
    return asked.result()[0], longest


STALL = 3.0  # seconds that another request may take meanwhile, on a busy machine


@pytest.mark.parametrize(("where", "act"), list(hostile_web_chat_cases()))
def test_no_answer_of_the_web_chat_delays_other_requests(
    shared_program: tuple[Program, WebChat], where: str, act: Act
) -> None:
    program, kimi = shared_program
    kimi.always = act if where == "post" else web_chat_answers
    kimi.script.clear()
    if where == "page":
        kimi.nonce += "0"  # so that the page is fetched
        kimi.page_script.extend([act] * 3)
    forms: list[dict[str, Any]] = [{"tools": [tool("f")]}]
    if where == "post":
        forms += [{"response_format": JSON_OBJECT}, {"stream": True, "max_tokens": 100_000, "stop": ["\0"]}]
    for form in forms:
        status, longest = chat_with_health_checks(program, **form)
        assert status in (200, 502, 503, 504) and longest < STALL
    kimi.page_script.clear()


@pytest.mark.parametrize("request_", list(hostile_request_cases()))
def test_no_request_delays_other_requests(shared_program: tuple[Program, WebChat], request_: dict[str, Any]) -> None:
    program, kimi = shared_program
    kimi.always = web_chat_answers
    status, longest = chat_with_health_checks(program, **request_)
    assert status in (200, 400) and longest < STALL


def test_no_stream_or_list_of_an_api_delays_other_requests(
    start_program: StartProgram, api_settings: dict[str, str], api: Api
) -> None:
    program = start_program(**api_settings, MAX_RETRIES="0")

    def pieces_of_a_line(handler: ApiHandler) -> None:
        handler.begin_stream()
        handler.wfile.write((b"40\r\n" + b"x" * 64 + b"\r\n") * 40_000)
        handler.end()

    def lines_without_end(handler: ApiHandler) -> None:
        handler.begin_stream()
        for _ in range(1500):
            handler.send(b"data:\n" * 1000)
        handler.end()

    def small_chunks(handler: ApiHandler) -> None:
        handler.begin_stream()
        piece = {"index": 0, "id": "c", "function": {"name": "f", "arguments": "x" * 20}}
        event = b"data: " + json.dumps(api_chunk({"content": "x" * 20, "tool_calls": [piece]})).encode() + b"\n\n"
        handler.send(event * 10_000)
        handler.event(api_chunk({}, "stop"))
        handler.end()

    for act in (pieces_of_a_line, lines_without_end, small_chunks):
        api.always = act
        status, longest = chat_with_health_checks(program, model="local/k2", user="ada")
        assert status in (200, 502) and longest < STALL
    api.list_act = api_sends(200, {"data": [{"id": f"model-{number}"} for number in range(20_000)]})
    began = time.monotonic()
    wait_for(lambda: len(json.loads(program.ask("GET", "/v1/models")[1])["data"]) > 20_000)
    assert time.monotonic() - began < STALL * 2
    assert program.memory() < 400


def test_no_answer_takes_many_times_its_size_in_memory(
    start_program: StartProgram, api_settings: dict[str, str], api: Api, kimi: WebChat
) -> None:
    brackets = repeat_to("[],", 4 * MB - 100)
    kimi.always = sends(200, '{"success": true, "data": [' + brackets + "0]}", "application/json")
    api.list_act = api_sends(200, ('{"data": [' + brackets + "0]}").encode())

    def one_chunk(handler: ApiHandler) -> None:
        api_streams(('{"choices": [' + brackets.replace("[]", "{}") + "{}]}").encode())(handler)

    def lists(handler: ApiHandler) -> None:
        chunk = {**api_chunk({"content": "x"}), "x": [[]] * 200_000}
        api_streams(*[json.dumps(chunk).encode()] * 60)(handler)

    def choices(handler: ApiHandler) -> None:
        handler.begin_stream()
        for number in range(0, 600_000, 2000):
            chunks = range(number, number + 2000)
            handler.send(b"".join(b'data:{"choices":[{"index":%d,"delta":{}}]}\n\n' % index for index in chunks))

    program = start_program(**api_settings, MAX_RETRIES="0")
    with ThreadPoolExecutor(8) as pool:
        assert {status for status, _ in pool.map(lambda _: program.chat(), range(8))} == {502}
    program.ask("GET", "/v1/models")
    for act in (one_chunk, lists, choices):
        api.always = act
        assert program.chat(model="local/k2")[0] == 502
    assert program.memory(peak=True) < 400


########################################################################################################################
# Soak and benchmark
########################################################################################################################


# ----------------------------------------------------------------------------------------------------------------------
# Soak: pytest -m soak -s (SOAK_SECONDS, ten minutes by default)
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_soak(start_program: StartProgram, kimi: WebChat) -> None:
    seconds = float(os.environ.get("SOAK_SECONDS", "600"))
    program = start_program(
        MAX_CONCURRENT_CHATS="16",
        MAX_SESSION_SIZE="50",
        STREAM_INTERVAL_MS="1",
        REQUEST_TIMEOUT="1",
        SSE_KEEPALIVE="0.2",
        MAX_RETRIES="1",
        LOG_LEVEL="ERROR",
    )
    kimi.posts, kimi.heads, kimi.pages = (deque(maxlen=9) for _ in range(3))  # type: ignore[assignment]
    faults = [row[1] for row in FAULTS if row[0] not in ("20 MB", "endless body", "silence") and "drip" not in row[0]]
    counts: dict[str, int] = {}
    lock, end = threading.Lock(), time.monotonic() + seconds

    def count(name: str) -> None:
        with lock:
            counts[name] = counts.get(name, 0) + 1

    routes = [("GET", "/health"), ("GET", "/v1/sessions/u1"), ("DELETE", "/v1/sessions/u2"), ("GET", "/x")]
    routes.append(("POST", "/v1/chat/completions"))

    def leaves(choose: random.Random, body: dict[str, Any]) -> None:
        link = program.open_chat("Hello " * choose.randrange(1, 50), **body)
        time.sleep(choose.random() * 0.05)
        link.close()
        count("left")

    def asks_for_something_else(choose: random.Random) -> None:
        method, path = choose.choice(routes)
        assert program.ask(method, path, b"{" if method == "POST" else None)[0] < 500
        count("other")

    def chats(choose: random.Random, body: dict[str, Any]) -> None:
        status, data = program.chat("Hello " * choose.randrange(1, 50), **body)
        if status != 200:
            assert json.loads(data)["error"]["message"]
            count(f"status {status}")
            return
        last = sse_events(data)[-1] if body["stream"] else json.loads(data)
        if last == "[DONE]" or "choices" in last:
            count("answered")
        else:
            count("failed" if "error" in last else "lost")

    def traffic(seed: int) -> None:
        choose = random.Random(seed)
        while time.monotonic() < end:
            body: dict[str, Any] = {"stream": choose.random() < 0.5}
            if choose.random() < 0.5:
                body["user"] = f"u{choose.randrange(200)}"
            kind = choose.random()
            if kind < 0.15 and len(kimi.script) < 3:  # more would be a queue of faults after a pause
                kimi.script.append(choose.choice(faults))
                count("faults")
            if kind < 0.1:
                leaves(choose, body)
            elif kind < 0.2:
                asks_for_something_else(choose)
            else:
                chats(choose, body)

    def look() -> dict[str, float]:
        wait_for(lambda: program.running() == 0)
        process = Path(f"/proc/{program.process.pid}")
        return {
            "memory": program.memory(),
            "threads": len(list((process / "task").iterdir())),
            "descriptors": len(list((process / "fd").iterdir())),
            "sessions": program.health()["sessions"]["kept"],
        }

    with ThreadPoolExecutor(12) as pool:
        work = [pool.submit(traffic, seed) for seed in range(12)]
        time.sleep(seconds / 5)
        middle = {"memory": program.memory()}
        for done in work:
            done.result()
    last = look()
    print(f"\n{counts}\nmemory after a fifth of the time {middle['memory']:.0f} MB, at the end {last}")
    assert counts.get("lost", 0) == 0 and counts["answered"] > 100
    assert last["memory"] - middle["memory"] < 30
    assert last["threads"] <= 16 + 8 + 2 * 16 + 1 and last["descriptors"] < 100 and last["sessions"] <= 50
    assert not [line for line in program.log if "Traceback" in line]


# ----------------------------------------------------------------------------------------------------------------------
# Benchmark: pytest -m bench -s
#
# Every figure is a ratio or a time, with its limit, measured in one run. The upstreams and the loads run as processes
# of their own (`python test_kimi2api.py ROLE …`), so that they never wait for the program's interpreter.
# ----------------------------------------------------------------------------------------------------------------------

Row = tuple[str, str, str]  # name, figure, limit


class FastUpstream:
    """A web chat for timing, without threads and faults, so that it is never the bottleneck."""

    def __init__(self, delay: str, chars: str) -> None:
        self.delay = float(delay)
        text = " ".join(f"word{number}" for number in range(int(chars)))[: int(chars)]
        self.page = self.http(b'<script>var kimi_ajax = {"nonce":"0123456789"};</script>')
        self.answer = self.http(json.dumps({"success": True, "data": {"message": text}}).encode())

    @staticmethod
    def http(body: bytes) -> bytes:
        return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body

    async def respond(self, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(self.delay)
        writer.write(self.answer)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                if length := re.search(rb"content-length: *(\d+)", head, re.I):
                    await reader.readexactly(int(length[1]))
                    await self.respond(writer)
                else:
                    writer.write(self.page)
                await writer.drain()
        writer.close()

    @classmethod
    async def main(cls, *arguments: str) -> None:
        server = await asyncio.start_server(cls(*arguments).serve, "127.0.0.1", 0, backlog=4096)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()


API_CHUNK = api_chunk({"content": "word "})
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


class FastApi(FastUpstream):
    """An OpenAI-style API that sends a complete stream in one write, each event a chunk of HTTP."""

    def __init__(self, chunks: str) -> None:
        self.page = self.http(b'{"object":"list","data":[]}')
        texts = [json.dumps(API_CHUNK)] * int(chunks) + [json.dumps(api_chunk({}, "stop")), "[DONE]"]
        events = [f"data: {text}\n\n".encode() for text in texts]
        body = b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events)
        self.answer = STREAM_HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"

    async def respond(self, writer: asyncio.StreamWriter) -> None:
        writer.write(self.answer)


class TimedApi(FastUpstream):
    """An OpenAI-style API whose chunks contain the time of sending, with a pause after each chunk."""

    def __init__(self, chunks: str, pause: str) -> None:
        self.page = self.http(b'{"object":"list","data":[]}')
        self.chunks, self.pause = int(chunks), float(pause)

    async def respond(self, writer: asyncio.StreamWriter) -> None:
        def send(data: str) -> None:
            event = f"data: {data}\n\n".encode()
            writer.write(b"%x\r\n%s\r\n" % (len(event), event))

        writer.write(STREAM_HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(self.chunks):
            send(json.dumps(api_chunk({"content": f"@{time.monotonic():.6f}@"})))
            await asyncio.sleep(self.pause)
        send(json.dumps(api_chunk({}, "stop")))
        send("[DONE]")
        writer.write(b"0\r\n\r\n")


def chat_request(**body: Any) -> bytes:
    data = json.dumps({**body, "messages": [{"role": "user", "content": "hello"}]}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data)
    return head + data


def straight(port: str, at_once: str, total: str) -> dict[str, float]:
    """Call the web chat with cloudscraper directly, from threads."""
    import cloudscraper
    from requests.adapters import HTTPAdapter

    scraper = cloudscraper.create_scraper()
    scraper.mount("http://", HTTPAdapter(pool_maxsize=int(at_once)))
    form = {"action": "kimi_send_message", "nonce": "x", "message": "hello", "model": "m", "session_id": "s"}

    def ask(_: int) -> float:
        began = time.perf_counter()
        scraper.post(f"http://127.0.0.1:{port}/ajax", data=form, timeout=60).json()
        return time.perf_counter() - began

    with ThreadPoolExecutor(int(at_once)) as pool:
        began = time.perf_counter()
        times = list(pool.map(ask, range(int(total))))
        wall = time.perf_counter() - began
    return {"rate": len(times) / wall, "median": statistics.median(times)}


async def load(port: str, at_once: str, total: str, stream: str, model: str) -> dict[str, float]:
    """Send chats to the program, `at_once` concurrently, reusing connections that the program keeps open."""
    request = chat_request(model=model, stream=stream == "stream")
    left = int(total)
    times: list[float] = []
    bad = 0

    async def worker() -> None:
        nonlocal left, bad
        link = None
        while left > 0:
            left -= 1
            began = time.perf_counter()
            reader, writer = link or await asyncio.open_connection("127.0.0.1", int(port))
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: *(\d+)", head, re.I)
            data = await (reader.readexactly(int(length[1])) if length else reader.read())
            link = (reader, writer) if length else None
            times.append(time.perf_counter() - began)
            if b" 200 " not in head or (b"event-stream" in head and b"[DONE]" not in data):
                bad += 1

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(int(at_once))))
    wall = time.perf_counter() - began
    return {"rate": len(times) / wall, "median": statistics.median(times), "wall": wall, "bad": bad}


def read_streams(port: str, at_once: str, model: str) -> dict[str, float]:
    """Read `at_once` streams concurrently at the least cost: count bytes, search for [DONE]."""
    selector = selectors.DefaultSelector()
    request = chat_request(model=model, stream=True)
    links = [socket.create_connection(("127.0.0.1", int(port))) for _ in range(int(at_once))]
    ends = dict.fromkeys(links, b"")  # the last bytes of each, for a [DONE] that arrives in two parts
    received = done = 0
    began = time.perf_counter()
    for link in links:
        link.sendall(request)
        selector.register(link, selectors.EVENT_READ)
    while selector.get_map():
        for key, _ in selector.select():
            part = key.fileobj.recv(1 << 18)
            received += len(part)
            end = ends[key.fileobj] = (ends[key.fileobj] + part)[-32:]
            if b"[DONE]" in end or not part:
                done += b"[DONE]" in end
                selector.unregister(key.fileobj)
    return {"wall": time.perf_counter() - began, "bytes": received, "bad": int(at_once) - done}


def delays(port: str, at_once: str, model: str) -> dict[str, float]:
    """Read the streams of TimedApi with requests. Return the seconds to the first chunk and the delay of each chunk."""
    import requests

    def read(_: int) -> tuple[float, list[float]]:
        body = {"model": model, "stream": True, "messages": [{"role": "user", "content": "x"}]}
        times: list[float] = []
        first, rest = 0.0, b""
        began = time.monotonic()
        with requests.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, stream=True) as response:
            while part := response.raw.read1(65536):
                now = time.monotonic()
                first = first or now - began
                rest += part
                while found := re.search(rb"@([\d.]+)@", rest):
                    times.append(now - float(found[1]))
                    rest = rest[found.end() :]
        return first, times

    with ThreadPoolExecutor(int(at_once)) as pool:
        results = list(pool.map(read, range(int(at_once))))
    every = [delay for _, times in results for delay in times]
    first = statistics.median(first for first, _ in results)
    return {"first": first, "chunks": len(every), "delay": statistics.median(every)}


UPSTREAM_ROLES = {"web_chat": FastUpstream, "api": FastApi, "timed_api": TimedApi}
LOAD_ROLES = {"straight": straight, "load": load, "read_streams": read_streams, "delays": delays}


def play_role(name: str, *arguments: str) -> None:
    """Run a role of this file as a program: an upstream serves, a load prints its figures."""
    if name in UPSTREAM_ROLES:
        asyncio.run(UPSTREAM_ROLES[name].main(*arguments))
        return
    figures: Any = LOAD_ROLES[name](*arguments)
    print(json.dumps(asyncio.run(figures) if asyncio.iscoroutine(figures) else figures))


def measure(name: str, *arguments: Any) -> dict[str, float]:
    """Run a load as a process. Return its figures."""
    done = subprocess.run([sys.executable, __file__, name, *map(str, arguments)], capture_output=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    assert not figures.get("bad"), (name, arguments, figures)
    return figures


@contextmanager
def fast_upstream(name: str, *arguments: Any) -> Iterator[int]:
    """Run an upstream as a process. Yield its port."""
    flags = [sys.executable, __file__, name, *map(str, arguments)]
    with subprocess.Popen(flags, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


@contextmanager
def benched(port: int, **settings: str) -> Iterator[Program]:
    """Run the program in front of this upstream, which is both its web chat and its API `local/…`."""
    address = f"http://127.0.0.1:{port}"
    settings = {"PROVIDERS": "local", "LOCAL_BASE_URL": f"{address}/v1", **settings}
    urls = {"UPSTREAM_URL": f"{address}/ajax", "CHAT_PAGE_URL": f"{address}/chat/"}
    with closing(Program(is_new=True, **urls, **settings)) as program:
        yield program


def bench_rate_and_latency() -> Iterator[Row]:
    with fast_upstream("web_chat", 0, 40) as port, benched(port) as program:
        measure("load", program.port, 64, 500, "json", "kimi")  # warms up
        for name, at_once, total, figure, limit in (
            ("chats per second, 64 at a time", 64, 2000, "rate", "at least 0.7"),
            ("median latency, one at a time", 1, 400, "median", "at most 1.8"),
        ):
            ratios = []
            for _ in range(5):
                ours = measure("load", program.port, at_once, total, "json", "kimi")
                ratios.append(ours[figure] / measure("straight", port, at_once, total)[figure])
            yield f"{name}, to cloudscraper straight", f"{statistics.median(ratios):.2f}", limit


def bench_idle_connections() -> Iterator[Row]:
    allow_descriptors(8192)
    rate = latency = 0.0
    with fast_upstream("web_chat", 0, 40) as port:
        for count in (0, 300, 1000):
            with benched(port) as program, ExitStack() as idle:
                for _ in range(count):
                    link = idle.enter_context(program.open(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"))
                    read_response(link)
                measure("load", program.port, 64, 500, "json", "kimi")  # warms up
                now = measure("load", program.port, 64, 2000, "json", "kimi")["rate"]
                rate = rate or now
                yield f"chats per second beside {count:,} idle connections", f"{now:.0f}", f"{now / rate:.2f} of 0 idle"
                now = measure("load", program.port, 1, 400, "json", "kimi")["median"]
                latency = latency or now
                ratio = f"{now / latency:.2f} of 0 idle"
                yield f"median latency beside {count:,} idle connections", f"{now * 1000:.2f} ms", ratio


def bench_streams_of_the_web_chat() -> Iterator[Row]:
    settings = {"MAX_CONCURRENT_CHATS": "256", "STREAM_INTERVAL_MS": "0"}
    with fast_upstream("web_chat", 2, 2000) as port, benched(port, **settings) as program:
        walls = [measure("load", program.port, 200, 200, "stream", "kimi")["wall"] for _ in range(3)]
        yield "200 streams at once, upstream takes 2 s", f"{statistics.median(walls):.2f} s", "at most 2.5 s"
    for interval, limit in (("20", "at most 2.1 s"), ("0", "at most 0.02 s")):
        with fast_upstream("web_chat", 0, 2000) as port, benched(port, STREAM_INTERVAL_MS=interval) as program:
            measure("load", program.port, 1, 1, "stream", "kimi")
            took = measure("load", program.port, 1, 5, "stream", "kimi")["median"]
            yield f"2,000 characters replayed, STREAM_INTERVAL_MS={interval}", f"{took:.3f} s", limit


def bench_start_and_memory() -> Iterator[Row]:
    with fast_upstream("web_chat", 5, 2000) as port:
        began = time.perf_counter()
        with benched(port, MAX_CONCURRENT_CHATS="64") as program:
            program.health()
            yield "start to first /health", f"{time.perf_counter() - began:.2f} s", "at most 0.5 s"
            yield "memory, idle", f"{program.memory():.0f} MB", "at most 45 MB"
        with benched(port, MAX_CONCURRENT_CHATS="512") as program, ExitStack() as links:
            for _ in range(500):
                links.enter_context(program.open_chat(stream=True))
            wait_for(lambda: program.running() == 500)
            time.sleep(2)  # until all of them have reached upstream
            yield "memory, 500 chats held open", f"{program.memory():.0f} MB", "at most 150 MB"


def bench_delay_of_api_chunks() -> Iterator[Row]:
    with fast_upstream("timed_api", 100, 0.02) as port, benched(port, MAX_CONCURRENT_CHATS="128") as program:
        for at_once, limit in ((1, "well under 1 ms"), (100, "no limit")):
            measure("delays", program.port, at_once, "local/x")  # warms up
            through = measure("delays", program.port, at_once, "local/x")
            direct = measure("delays", port, at_once, "local/x")
            assert through["chunks"] == direct["chunks"] == at_once * 100
            name = f"{at_once} API streams at once"
            yield f"{name}: added delay per chunk", f"{(through['delay'] - direct['delay']) * 1000:.2f} ms", limit
            yield f"{name}: first chunk, to requests straight", f"{through['first'] / direct['first']:.2f}", "no limit"
        yield "memory after 100 API streams at once", f"{program.memory():.0f} MB", "no limit"


def json_of_a_chunk() -> float:
    """Return the unit for the cost of a chunk: the seconds to read and write its JSON."""
    text = json.dumps(API_CHUNK)
    times = []
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(1000):
            json.dumps(json.loads(text))
        times.append((time.perf_counter() - began) / 1000)
    return statistics.median(times)


def bench_cost_of_api_chunks() -> Iterator[Row]:
    unit = json_of_a_chunk()
    yield "unit: JSON of a chunk read and written", f"{unit * 1e6:.1f} us", ""
    with fast_upstream("api", 400) as port, benched(port, MAX_CONCURRENT_CHATS="256") as program:
        measure("read_streams", program.port, 200, "local/x")  # warms up
        walls = [measure("read_streams", program.port, 200, "local/x")["wall"] for _ in range(3)]
        direct = [measure("read_streams", port, 200, "local/x")["wall"] for _ in range(3)]
        wall = statistics.median(walls)
        cost = (wall - statistics.median(direct)) / (200 * 400)
        yield "200 API streams of 400 chunks: chunks per second", f"{200 * 400 / wall:.0f}", "no limit"
        yield "200 API streams of 400 chunks: cost of a chunk", f"{cost / unit:.1f} units", "no limit"
    with fast_upstream("api", 40) as port, benched(port) as program:
        measure("load", program.port, 64, 300, "json", "local/x")  # warms up
        rate = statistics.median(measure("load", program.port, 64, 1000, "json", "local/x")["rate"] for _ in range(3))
        yield "JSON answers of 40 API chunks per second, 64 at a time", f"{rate:.0f}", "no limit"
        yield "JSON answers of 40 API chunks: cost of a chunk", f"{1 / rate / 40 / unit:.1f} units", "no limit"


@pytest.mark.bench
def test_benchmark() -> None:
    rows = [
        *bench_rate_and_latency(),
        *bench_idle_connections(),
        *bench_streams_of_the_web_chat(),
        *bench_start_and_memory(),
        *bench_delay_of_api_chunks(),
        *bench_cost_of_api_chunks(),
    ]
    width = max(len(name) for name, _, _ in rows)
    print()
    for name, figure, limit in rows:
        print(f"{name:<{width}}  {figure:>10}  {limit}")


if __name__ == "__main__":
    play_role(*sys.argv[1:])
