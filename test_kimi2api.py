"""Tests of kimi2api, in the order of the module's sections.

    pytest                      # all but the benchmark
    pytest -k stale_nonce       # one behaviour
    pytest -m bench -s          # a table of ratios against cloudscraper called straight

The upstream is a stand-in that speaks HTTP over real sockets, faults included; nothing of the program is mocked.
Routes are called through WebTest; where behaviour is about sockets or signals, the program runs as a process.
"""
from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import logging
import os
import random
import re
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest
import webtest

import kimi2api

HERE = Path(__file__).parent
PATIENCE = 20.0  # seconds after which something that must happen counts as not happening

# ======================================================================================================================
# The stand-in upstream
# ======================================================================================================================

Fault = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    server: StandIn

    def do_GET(self) -> None:
        self.server.pages.append(dict(self.headers))
        self.server.page_script.popleft()(self) if self.server.page_script else page(self)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.form = dict(parse_qsl(body, keep_blank_values=True))
        with self.server.lock:
            self.server.posts.append(self.form)
            self.server.heads.append(dict(self.headers))
            fault = self.server.script.popleft() if self.server.script else self.server.always
        fault(self)

    def reply(self, status: int, body: bytes, kind: str = "text/html; charset=UTF-8", **headers: str) -> None:
        self.send_response_only(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)),
                   **{name.replace("_", "-"): value for name, value in headers.items()}}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def raw(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


class StandIn(ThreadingHTTPServer):
    """Plays the web chat. `script` holds what the next posts get, `page_script` the next pages; then all is well."""

    request_queue_size = 1024
    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.lock = threading.Lock()
        self.nonce, self.answer = "a1b2c3d4e5", "Hello from upstream."
        self.pages: list[dict[str, str]] = []
        self.posts: list[dict[str, str]] = []
        self.heads: list[dict[str, str]] = []
        self.script: deque[Fault] = deque()
        self.page_script: deque[Fault] = deque()
        self.always: Fault = answer
        self.gate = threading.Event()  # what waits at the gate goes on when the test opens it, or ends
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def settings(self) -> dict[str, str]:
        origin = f"http://127.0.0.1:{self.server_address[1]}"
        return {"UPSTREAM_URL": f"{origin}/wp-admin/admin-ajax.php", "CHAT_PAGE_URL": f"{origin}/chat/"}

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the program hung up, which some tests want

    def stop(self) -> None:
        self.gate.set()
        self.shutdown()
        self.server_close()


def page(handler: Handler) -> None:
    body = (f'<html><script id="kimi-js-extra">\nvar kimi_ajax = {{"i18n":{{"nonce_label":"x"}}, '
            f'"nonce" : "{handler.server.nonce}","ajax_url":"https:\\/\\/kimi-ai.chat\\/wp-admin\\/admin-ajax.php"}};'
            "</script></html>")
    handler.reply(200, body.encode(), Set_Cookie="visit=42; Path=/")


def answer(handler: Handler) -> None:
    if handler.form.get("nonce") != handler.server.nonce:
        handler.reply(403, b"-1")
    else:
        says(handler.server.answer)(handler)


def says(text: str, **headers: str) -> Fault:
    body = json.dumps({"success": True, "data": {"message": text}}).encode()
    return lambda handler: handler.reply(200, body, "application/json; charset=UTF-8", **headers)


def sends(status: int, body: bytes | str = b"", kind: str = "text/html", **headers: str) -> Fault:
    data = body.encode() if isinstance(body, str) else body
    return lambda handler: handler.reply(status, data, kind, **headers)


def at_the_gate(handler: Handler) -> None:
    handler.server.gate.wait(PATIENCE * 2)
    says(handler.server.answer)(handler)


def resets(handler: Handler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def raw(data: bytes) -> Fault:
    return lambda handler: handler.raw(data)


def drips(head: bytes, drop: bytes = b"x") -> Fault:
    """A byte every 50 ms, for as long as anybody reads."""
    def fault(handler: Handler) -> None:
        handler.wfile.write(head)
        while not handler.server.gate.wait(0.05):
            handler.wfile.write(drop)
            handler.wfile.flush()
    return fault


def endless(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
    while not handler.server.gate.is_set():
        handler.wfile.write(b" " * 65536)


JUST_A_MOMENT = '<!DOCTYPE html><html><title>Just a moment...</title><script src="/cdn-cgi/challenge-platform/h/b/">'
IUAM = ('<html><title>Just a moment...</title><img src="/cdn-cgi/images/trace/jsch/js/transparent.gif">'
        '<form id="challenge-form" action="/?__cf_chl_f_tk=abc" method="POST"></form></html>')
FIREWALL = '<html><title>Access denied</title><span class="cf-error-code">1020</span></html>'
DOWN = "<html><title>kimi-ai.chat | 521: Web server is down</title><a href='/cdn-cgi/l/x'>Cloudflare</a></html>"
CLOUDFLARE = {"Server": "cloudflare"}


@pytest.fixture
def kimi() -> Iterator[StandIn]:
    server = StandIn()
    yield server
    server.stop()


# ======================================================================================================================
# The program, in process and as a process
# ======================================================================================================================


class Client(webtest.TestApp):
    """WebTest's client, which hands an error to the test like any answer instead of raising it."""

    def do_request(self, req: Any, status: Any = None, expect_errors: Any = None) -> Any:
        return super().do_request(req, status, expect_errors=True)


@pytest.fixture
def make(kimi: StandIn, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Client]:
    """make(SETTING="text", …): the program's WSGI application in front of the stand-in, with short pauses."""
    monkeypatch.setattr(kimi2api, "FIRST_BACK_OFF", 0.01)
    monkeypatch.setattr(kimi2api, "FIRST_PAUSE", 0.3)

    def build(**settings: str) -> Client:
        loaded = kimi2api.Settings.load(settings, {**kimi.settings, "STREAM_INTERVAL_MS": "0", "MAX_RETRIES": "1"})
        return Client(kimi2api.create_app(loaded))
    return build


@pytest.fixture
def app(make: Callable[..., Client]) -> Client:
    return make()


def chat(app: Client, content: Any = "Hello", headers: dict[str, str] | None = None, **body: Any) -> Any:
    body.setdefault("messages", [{"role": "user", "content": content}])
    return app.post_json("/v1/chat/completions", body, headers=headers)


def said(response: Any) -> str:
    assert response.status_int == 200, response.text
    return response.json["choices"][0]["message"]["content"]


def events(response: Any) -> list[Any]:
    """The events of a stream: parsed JSON, or the text '[DONE]'."""
    body = response if isinstance(response, bytes) else response.body
    data = [line[6:] for line in body.decode().split("\n") if line.startswith("data: ")]
    return [text if text == "[DONE]" else json.loads(text) for text in data]


def streamed(chunks: list[Any]) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks
                   if chunk != "[DONE]" and chunk["choices"])


def is_error(response: Any, status: int, code: str | None, type: str | None = None, param: str | None = None) -> bool:
    assert response.status_int == status, (response.status_int, response.text)
    assert response.content_type == "application/json"
    error = response.json["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert error["code"] == code, error
    assert type is None or error["type"] == type
    assert param is None or error["param"] == param, error
    return True


def wait_for(condition: Callable[[], Any], what: str = "") -> Any:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.01)
    raise AssertionError(f"never happened: {what or condition}")


class Program:
    """`python kimi2api.py` as a process of its own."""

    def __init__(self, *flags: str, **settings: str) -> None:
        environ = {name: value for name, value in os.environ.items() if name.lower() not in
                   ("http_proxy", "https_proxy", "all_proxy") and name not in kimi2api.Settings.__dataclass_fields__}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "kimi2api.py"), "--api-port", "0", *flags], env={**environ, **settings},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", cwd="/")
        assert self.process.stdout and self.process.stderr
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

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
        connection = self.connect()
        connection.request(method, path, json.dumps(body) if isinstance(body, dict) else body, headers)
        response = connection.getresponse()
        result = response.status, response.read()
        connection.close()
        return result

    def chat(self, content: str = "Hello", **body: Any) -> tuple[int, bytes]:
        return self.ask("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **body})

    def open_chat(self, content: str = "Hello", **body: Any) -> socket.socket:
        """A socket on which a chat has been asked and nothing read."""
        data = json.dumps({"messages": [{"role": "user", "content": content}], **body}).encode()
        link = socket.create_connection((self.host, self.port), timeout=PATIENCE)
        link.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     b"Content-Length: %d\r\n\r\n" % len(data) + data)
        return link

    def health(self) -> Any:
        status, body = self.ask("GET", "/health")
        assert status == 200
        return json.loads(body)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = PATIENCE) -> int:
        code = self.process.wait(timeout)
        self._reader.join(PATIENCE)
        return code

    def memory(self) -> float:
        """Resident memory in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


@pytest.fixture
def run(kimi: StandIn) -> Iterator[Callable[..., Program]]:
    """run("--flag", SETTING="text", …): the program as a process in front of the stand-in."""
    programs: list[Program] = []

    def start(*flags: str, **settings: str) -> Program:
        programs.append(Program(*flags, **{**kimi.settings, "MAX_RETRIES": "1", **settings}))
        return programs[-1]
    yield start
    for program in programs:
        program.process.kill()
        program.wait()


def read_all(link: socket.socket) -> bytes:
    parts = []
    while part := link.recv(65536):
        parts.append(part)
    return b"".join(parts)


def command(*flags: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """The program run to its end."""
    environ = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return subprocess.run([sys.executable, str(HERE / "kimi2api.py"), *flags], env={**environ, **settings}, cwd="/",
                          capture_output=True, text=True, encoding="utf-8", timeout=PATIENCE * 2)


# ======================================================================================================================
# 1 Settings, and the command line
# ======================================================================================================================


def test_settings_come_from_flags_then_environment_then_env_file_then_defaults(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text('# mine\nexport API_PORT=3\nMAX_RETRIES = "7" # seven\nSESSION_CACHE_TTL=\'5\'\n'
                        "API_MASTER_KEY=sk#1\nDEFAULT_MODEL= # nothing\n\nnot a setting\n", encoding="utf-8-sig")
    values = kimi2api.read_env_file(str(env_file), required=True)
    settings = kimi2api.Settings.load({"API_PORT": "1"}, {"API_PORT": "2", "MAX_SESSION_SIZE": "9", "LOG_LEVEL": ""}, values)
    assert (settings.api_port, settings.max_session_size, settings.max_retries) == (1, 9, 7)
    assert (settings.session_cache_ttl, settings.api_master_key) == (5.0, ("sk#1",))
    assert (settings.log_level, settings.request_timeout, settings.default_model) == ("INFO", 60.0, "kimi")


@pytest.mark.parametrize(("name", "value"), [
    ("API_PORT", "eighty"), ("API_PORT", "65536"), ("MAX_CONCURRENT_CHATS", "0"), ("REQUEST_TIMEOUT", "nan"),
    ("REQUEST_TIMEOUT", "0"), ("MODELS", "kimi"), ("MODELS", "=x"), ("UPSTREAM_URL", "kimi-ai.chat"),
    ("UPSTREAM_URL", "http://["), ("LOG_LEVEL", "loud"), ("CORS_ORIGINS", "https://mine.example/"), ("DEFAULT_MODEL", "gpt-5"), ("API_HOST", "0.0.0.0"),
    ("STREAM_INTERVAL_MS", "-1"), ("API_MASTER_KEY", "schlüssel")])
def test_a_bad_setting_is_one_line_with_name_and_value_and_exit_2(name: str, value: str) -> None:
    with pytest.raises(kimi2api.SettingError) as refused:
        kimi2api.Settings.load({name: value})
    message = str(refused.value)
    assert message.startswith(f"{name}: ") and "\n" not in message
    assert (value in message) == (name != "API_MASTER_KEY"), "a key is never shown"


def test_a_start_that_is_refused_says_why_in_one_line_and_exits_2(run: Callable[..., Program], tmp_path: Path) -> None:
    taken = run().port
    (tmp_path / "latin").write_bytes(b"API_PORT=\xff")
    for flags, word in ((["--api-port", "x"], "API_PORT"), (["--api-host", "0.0.0.0"], "API_MASTER_KEY"),
                        (["--api-port", str(taken)], "in use"), (["--env-file", "/no/such"], "/no/such"),
                        (["--env-file", str(tmp_path / "latin")], "latin"), (["--api-host", "no.such.host"], "no.such.host")):
        if "--api-host" in flags:
            flags += ["--api-master-key", "sk-1"] if word != "API_MASTER_KEY" else []
        done = command(*flags)
        assert done.returncode == 2, (flags, done)
        assert word in done.stderr and len(done.stderr.splitlines()) == 1 and not done.stdout, (flags, done.stderr)
    assert command("--no-such-flag").returncode == 2


def test_help_names_every_setting_and_version_is_the_modules() -> None:
    done = command("--help")
    assert done.returncode == 0
    for field in kimi2api.Settings.table():
        assert f"--{field.name.replace('_', '-')}" in done.stdout
    assert command("--version").stdout.strip() == f"kimi2api {kimi2api.__version__}"


def test_the_readmes_table_is_the_settings() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.*?) \| (.*) \|$", (HERE / "README.md").read_text(encoding="utf-8"), re.M)
    expected = [(field.name.upper(), f"`{field.metadata['default']}`" if field.metadata["default"] else "(empty)",
                 field.metadata["meaning"]) for field in kimi2api.Settings.table()]
    assert rows == expected


def test_env_example_has_every_setting_with_its_default() -> None:
    assert re.findall(r"^#([A-Z_]+)=(.*)$", (HERE / ".env.example").read_text(encoding="utf-8"), re.M) == [
        (field.name.upper(), field.metadata["default"]) for field in kimi2api.Settings.table()]


def test_the_greeting_has_a_curl_line_that_works_as_printed(run: Callable[..., Program]) -> None:
    for key in ("", "sk-one,sk-two"):
        program = run(API_MASTER_KEY=key)
        line = re.search(r"try it: +(curl .*)", program.greeting)[1]
        done = subprocess.run(["sh", "-c", line], env={**os.environ, "API_MASTER_KEY": key}, capture_output=True, timeout=PATIENCE)
        assert json.loads(done.stdout)["choices"][0]["message"]["content"] == "Hello from upstream."
        assert ("none asked" in program.greeting) == (not key)
        assert "sk-one" not in program.greeting


def test_demo_goes_the_real_way_and_shows_that_earlier_turns_arrived() -> None:
    program = Program("--demo", HTTP_PROXY="http://127.0.0.1:9", http_proxy="http://127.0.0.1:9")
    try:
        for question in ("My name is Ada.", "What is my name?"):
            status, body = program.chat(question, user="ada")
        text = json.loads(body)["choices"][0]["message"]["content"]
        assert status == 200 and "demo" in text and "What is my name?" in text and "My name is Ada." in text
        program.signal(signal.SIGINT)
        assert program.wait() == 0
        assert "Ada" not in "".join(program.log), "no prompt text in the log"
    finally:
        program.process.kill()


def test_check_goes_through_the_upstream_step_by_step(kimi: StandIn) -> None:
    def check(*pages: Fault) -> tuple[int, str]:
        kimi.page_script.extend(pages)
        done = command("--check", **kimi.settings, MAX_RETRIES="0", LOG_LEVEL="ERROR")
        return done.returncode, re.sub(r"\n    .*", "", done.stdout)

    code, printed = check()
    assert code == 0 and printed.count("✓") == 4 and "✗" not in printed
    assert re.search(r"one question answered in \d+\.\d s", printed)
    assert check(sends(500))[1].startswith("kimi:\n  ✗")
    code, printed = check(sends(403, JUST_A_MOMENT, cf_mitigated="challenge"))
    assert code == 1 and printed.count("✓") == 1 and "✗ not blocked" in printed
    code, printed = check(sends(200, "<html>nothing</html>"))
    assert code == 1 and printed.count("✓") == 2 and "✗ nonce found" in printed
    kimi.always = sends(500)
    code, printed = check()
    assert code == 1 and printed.count("✓") == 3 and "✗ one question" in printed


# ======================================================================================================================
# 2 and 3 Errors, requests
# ======================================================================================================================


@pytest.mark.parametrize(("body", "param"), [
    (b"", None), (b"{", None), (b"[]", None), (b'"x"', None), (b"\xff\xfe{}", None), (b"[" * 10_000, None),
    (b'{"messages": NaN}', None), (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', None), (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', None),
    (b'{"messages": ' + b"9" * 5000 + b"}", None if hasattr(sys, "set_int_max_str_digits") else "messages"),
    (b"{}", "messages"), (b'{"messages": []}', "messages"), (b'{"messages": "hi"}', "messages"),
    (b'{"messages": [1]}', "messages[0]"), (b'{"messages": [{"content": "x"}]}', "messages[0].role"),
    (b'{"messages": [{"role": "user", "content": "x"}, {"role": "boss", "content": "x"}]}', "messages[1].role"),
    (b'{"messages": [{"role": "user"}]}', "messages[0].content"),
    (b'{"messages": [{"role": "user", "content": 5}]}', "messages[0].content"),
    (b'{"messages": [{"role": "user", "content": ["x"]}]}', "messages[0].content[0]"),
    (b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "messages[0].content[0].text"),
    (b'{"messages": [{"role": "user", "content": ""}]}', "messages"),
    (b'{"messages": [{"role": "user", "content": "x"}], "stream": "yes"}', "stream"),
    (b'{"messages": [{"role": "user", "content": "x"}], "model": 5}', "model"),
    (b'{"messages": [{"role": "user", "content": "x"}], "user": ["a"]}', "user"),
    (b'{"messages": [{"role": "user", "content": "x"}], "stream_options": {"include_usage": 1}}',
     "stream_options.include_usage")])
def test_a_bad_request_is_a_400_that_names_the_field(app: Client, kimi: StandIn, body: bytes, param: str | None) -> None:
    response = app.post("/v1/chat/completions", body, content_type="application/json")
    assert is_error(response, 400, None, "invalid_request_error")
    assert response.json["error"]["param"] == param
    assert not kimi.posts


def test_a_list_of_text_parts_works_and_an_image_is_a_clear_400(app: Client, kimi: StandIn) -> None:
    assert said(chat(app, [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]))
    assert kimi.posts[-1]["message"] == "one\ntwo"
    for kind in ("image_url", "input_audio", "file"):
        response = chat(app, [{"type": "text", "text": "see"}, {"type": kind, kind: {}}])
        assert is_error(response, 400, "unsupported_value", param="messages[0].content[1].type")


def test_unknown_fields_and_a_byte_order_mark_do_no_harm(app: Client) -> None:
    body = {"messages": [{"role": "user", "content": "x", "name": "ada"}], "temperature": 0.3, "seed": 1, "zzz": None,
            "stream": None, "user": None, "model": None, "stream_options": None}
    response = app.post("/v1/chat/completions", b"\xef\xbb\xbf" + json.dumps(body).encode(), content_type="text/plain")
    assert said(response)


def test_a_body_above_the_limit_is_413_and_one_above_bottles_own_limit_is_fine(make: Callable[..., Client]) -> None:
    app = make(MAX_BODY_BYTES="300000", CONTEXT_MAX_LENGTH="999999")
    assert said(chat(app, "x" * 200_000))
    assert is_error(chat(app, "x" * 300_000), 413, "request_too_large", "invalid_request_error")


def test_unknown_paths_methods_and_models_are_errors_in_openais_shape(app: Client) -> None:
    assert is_error(app.get("/nowhere"), 404, "not_found")
    response = app.put("/v1/models")
    assert is_error(response, 405, "method_not_allowed") and "GET" in response.headers["Allow"]
    assert is_error(app.get("/v1/models/gpt-5"), 404, "model_not_found")
    assert is_error(chat(app, model="gpt-5"), 404, "model_not_found", "invalid_request_error", "model")


def test_a_crash_is_a_500_in_openais_shape_with_its_traceback_in_the_log(
        app: Client, kimi: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    broken = Client(kimi2api.create_app(kimi2api.Settings.load(kimi.settings)))
    broken.app.routes[0].callback.__self__.sessions = None
    assert is_error(chat(broken), 500, "internal_error", "server_error")
    assert "Traceback" in caplog.text and "AttributeError" in caplog.text


# ======================================================================================================================
# 4 Sessions
# ======================================================================================================================


def test_without_user_every_request_stands_alone(app: Client, kimi: StandIn) -> None:
    chat(app, "first")
    chat(app, "second")
    assert [post["message"] for post in kimi.posts] == ["first", "second"]
    assert kimi.posts[0]["session_id"] != kimi.posts[1]["session_id"]


def test_with_user_the_remembered_turns_go_in_front(app: Client, kimi: StandIn) -> None:
    chat(app, "first", user="ada")
    chat(app, "second", user="ada")
    assert kimi.posts[1]["message"] == "用户: first\n模型: Hello from upstream.\n用户: second"
    assert kimi.posts[0]["session_id"] == kimi.posts[1]["session_id"]
    assert re.fullmatch(r"session_\d{13}_[a-z0-9]{9}", kimi.posts[0]["session_id"])
    session = app.get("/v1/sessions/ada").json
    assert [[message["content"] for message in turn] for turn in session["turns"]] == [
        ["first", "Hello from upstream."], ["second", "Hello from upstream."]]


def test_a_client_that_resends_its_history_replaces_what_was_remembered(app: Client, kimi: StandIn) -> None:
    chat(app, "forgotten", user="ada")
    mine = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "u1"},
            {"role": "assistant", "content": "a1"}, {"role": "user", "content": "u2"}]
    chat(app, messages=mine, user="ada")
    assert kimi.posts[-1]["message"] == "Be kind.\n\n用户: u1\n模型: a1\n用户: u2"
    chat(app, "u3", user="ada")
    assert kimi.posts[-1]["message"] == ("用户: u1\n模型: a1\n用户: u2\n模型: Hello from upstream.\n用户: u3")


def test_system_and_developer_messages_count_and_are_not_remembered(app: Client, kimi: StandIn) -> None:
    chat(app, messages=[{"role": "system", "content": "S."}, {"role": "user", "content": "u"},
                        {"role": "developer", "content": "D."}], user="ada")
    assert kimi.posts[-1]["message"] == "S.\nD.\n\n用户: u"
    chat(app, "v", user="ada")
    assert "S." not in kimi.posts[-1]["message"]


def test_the_oldest_turns_are_dropped_from_the_prompt_but_not_forgotten(make: Callable[..., Client], kimi: StandIn) -> None:
    app = make(CONTEXT_MAX_LENGTH="100")
    kimi.answer = "ok"
    for number in range(6):
        chat(app, messages=[{"role": "system", "content": "Rule."}, {"role": "user", "content": f"question {number} " + "x" * 15}],
             user="ada")
    prompt = kimi.posts[-1]["message"]
    assert len(prompt) <= 100 and prompt.startswith("Rule.\n\n用户: question 4") and "question 5" in prompt
    assert len(app.get("/v1/sessions/ada").json["turns"]) == 6


def test_a_newest_message_that_cannot_fit_is_400_context_length_exceeded(make: Callable[..., Client], kimi: StandIn) -> None:
    app = make(CONTEXT_MAX_LENGTH="50")
    assert said(chat(app, "x" * 50))
    assert is_error(chat(app, "x" * 51), 400, "context_length_exceeded", param="messages")
    both = [{"role": "system", "content": "s" * 30}, {"role": "user", "content": "u" * 30}]
    assert is_error(chat(app, messages=both), 400, "context_length_exceeded")
    assert len(kimi.posts) == 1


def test_a_failed_request_records_nothing(make: Callable[..., Client], kimi: StandIn) -> None:
    app = make(MAX_RETRIES="0")
    kimi.script.append(sends(500))
    assert is_error(chat(app, user="ada"), 502, "upstream_unavailable")
    assert is_error(app.get("/v1/sessions/ada"), 404, "session_not_found")


def test_two_turns_of_one_user_in_flight_at_once_both_land_whole(app: Client, kimi: StandIn) -> None:
    kimi.always = at_the_gate
    with ThreadPoolExecutor(8) as pool:
        chats = [pool.submit(chat, app, f"question {number}", user="ada") for number in range(8)]
        wait_for(lambda: len(kimi.posts) == 8)
        kimi.gate.set()
        assert all(said(done.result()) for done in chats)
    turns = app.get("/v1/sessions/ada").json["turns"]
    assert sorted(turn[0]["content"] for turn in turns) == [f"question {number}" for number in range(8)]
    assert all([message["role"] for message in turn] == ["user", "assistant"] for turn in turns)


def test_sessions_belong_to_a_key_and_can_be_forgotten(make: Callable[..., Client]) -> None:
    app = make(API_MASTER_KEY="sk-one,sk-two")
    one, two = {"Authorization": "Bearer sk-one"}, {"Authorization": "Bearer sk-two"}
    user = "ada/bü\nro"
    chat(app, user=user, headers=one)
    path = "/v1/sessions/ada/b%C3%BC%0Aro"
    assert app.get(path, headers=one).json["user"] == user
    assert is_error(app.get(path, headers=two), 404, "session_not_found")
    assert is_error(app.delete(path, headers=two), 404, "session_not_found")
    assert app.delete(path, headers=one).json == {"object": "session.deleted", "user": user, "deleted": True}
    assert is_error(app.delete(path, headers=one), 404, "session_not_found")


def test_a_session_expires_after_its_last_turn_and_the_least_recently_used_goes_first() -> None:
    now = [1000.0]
    sessions = kimi2api.Sessions(ttl=60, limit=2, clock=lambda: now[0])

    def turn(user: str) -> None:
        sessions.record("key", user, sessions.open("key", user), [({"role": "user", "content": "x"},)], replace_turns=False)

    turn("ada")
    now[0] += 50
    turn("ada")
    now[0] += 50
    assert sessions.get("key", "ada"), "the expiry slides at each turn"
    assert len(sessions.get("key", "ada").turns) == 2
    now[0] += 11
    assert sessions.get("key", "ada") is None and len(sessions) == 0
    for user in ("ada", "bob", "ada", "eve"):
        turn(user)
    assert [bool(sessions.get("key", user)) for user in ("ada", "bob", "eve")] == [True, False, True]


# ======================================================================================================================
# 5 The web chat: what is sent, nonces, faults
# ======================================================================================================================


def test_the_form_is_the_one_that_the_chat_page_sends(app: Client, kimi: StandIn) -> None:
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


@pytest.mark.parametrize("script", [
    'var kimi_ajax = {"ajax_url":"x","nonce":"abc123"};', "window.kimi_ajax={'nonce':'abc123' , 'z':{}}",
    'var kimi_ajax\n=\n{ "z": {"a": "}"}, "_nonce": "no", "nonce"\n:\n"abc123" }'])
def test_the_nonce_is_found_however_the_page_writes_it(script: str) -> None:
    html = f'<script>var other = {{"nonce":"wrong"}}</script><script id="x">{script}</script>'
    assert kimi2api.find_nonce(html) == "abc123"


def test_a_nonce_is_fetched_once_and_kept(app: Client, kimi: StandIn) -> None:
    for _ in range(3):
        assert said(chat(app))
    assert len(kimi.pages) == 1


def test_a_stale_nonce_is_renewed_once_for_ten_waiting_chats(app: Client, kimi: StandIn) -> None:
    assert said(chat(app))
    kimi.nonce = "ffffffffff"
    with ThreadPoolExecutor(10) as pool:
        assert all(said(done.result()) for done in [pool.submit(chat, app) for _ in range(10)])
    assert len(kimi.pages) == 2


def test_a_failed_fetch_of_the_page_is_shared_by_all_who_wait(make: Callable[..., Client], kimi: StandIn) -> None:
    app = make(MAX_RETRIES="0")
    started = threading.Event()

    def slow_failure(handler: Handler) -> None:
        started.set()
        handler.server.gate.wait(PATIENCE)
        handler.reply(500, b"")

    kimi.page_script.append(slow_failure)
    with ThreadPoolExecutor(5) as pool:
        chats = [pool.submit(chat, app) for _ in range(5)]
        wait_for(lambda: started.is_set() and app.get("/health").json["chats"]["running"] == 5)
        kimi.gate.set()
        assert all(is_error(done.result(), 502, "upstream_unavailable") for done in chats)
    assert len(kimi.pages) == 1


def test_a_nonce_is_renewed_before_it_is_twelve_hours_old(kimi: StandIn) -> None:
    now = [1e9]
    provider = kimi2api.KimiProvider(kimi2api.Settings.load(kimi.settings), clock=lambda: now[0])
    request = kimi2api.ChatRequest.parse(b'{"messages": [{"role": "user", "content": "x"}]}')
    for hours, pages in ((0, 1), (10, 1), (11.9, 2)):
        now[0] = 1e9 + hours * 3600
        assert list(provider.stream(kimi2api.Chat(request, "m")))
        assert len(kimi.pages) == pages


@pytest.mark.parametrize("rejected", [
    sends(403, "-1"), sends(400, "0"), sends(200, "-1"),
    sends(200, '{"success":false,"data":"bad nonce"}', "application/json"),
    sends(403, '{"success":false,"data":{"message":"bad nonce"}}', "application/json")])
def test_a_rejected_nonce_is_renewed_and_the_chat_tried_once_more(app: Client, kimi: StandIn, rejected: Fault) -> None:
    kimi.script.append(rejected)
    assert said(chat(app)) == "Hello from upstream."
    assert (len(kimi.pages), len(kimi.posts)) == (2, 2)


@pytest.mark.parametrize(("data", "words"), [
    ('"Message <b>too</b> long &amp; rude"', "Message too long & rude"), ('{"message": "no"}', "no"),
    ('{"x": [1]}', '{"x": [1]}'), ("null", "no reason"), ('"' + "x" * 9999 + '"', "x" * 300)])
def test_a_refusal_is_passed_on_in_upstreams_words(app: Client, kimi: StandIn, data: str, words: str) -> None:
    kimi.always = sends(200, f'{{"success": false, "data": {data}}}', "application/json")
    response = chat(app)
    assert is_error(response, 502, "upstream_refused", "upstream_error")
    assert words in response.json["error"]["message"] and len(response.json["error"]["message"]) < 400
    assert response.headers["x-should-retry"] == "false" and len(kimi.posts) == 2


def status_faults() -> Iterator[tuple[str, Fault, int, str, int]]:
    for status in (500, 502, 503, *range(520, 528)):
        yield f"{status}", sends(status, DOWN, **CLOUDFLARE), 502, "upstream_unavailable", 2


# name, fault, status and code for the client, posts that upstream sees with MAX_RETRIES=1
FAULTS: list[tuple[str, Fault, int, str, int]] = [
    *status_faults(),
    ("reset", resets, 502, "upstream_unavailable", 2),
    ("reset in the head", raw(b"HTTP/1.1 200 OK\r\nContent-"), 502, "upstream_invalid_response", 2),
    ("not HTTP", raw(b"SSH-2.0-OpenSSH_9.6\r\n"), 502, "upstream_unavailable", 2),
    ("body cut off", raw(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{\"succ"), 502, "upstream_unavailable", 2),
    ("chunks cut off", raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{\"su"), 502, "upstream_unavailable", 2),
    ("silence", lambda handler: handler.server.gate.wait(PATIENCE), 504, "upstream_timeout", 1),
    ("slow drip of the head", drips(b"HTTP/1.1 200 OK\r\nX-A: "), 504, "upstream_timeout", 1),
    ("slow drip of the body", drips(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n"), 504, "upstream_timeout", 1),
    ("endless body", endless, 502, "upstream_invalid_response", 2),
    ("20 MB", sends(200, b" " * 20_000_000), 502, "upstream_invalid_response", 2),
    ("gzip that is not gzip", sends(200, "plain", Content_Encoding="gzip"), 502, "upstream_invalid_response", 2),
    ("too short a length", sends(200, b'{"success": true, "data": {"message": "x"}}', Content_Length="20"),
     502, "upstream_invalid_response", 2),
    ("HTML with 200", sends(200, "<html>Fatal error</html>"), 502, "upstream_invalid_response", 2),
    ("truncated JSON", sends(200, '{"success": true, "data'), 502, "upstream_invalid_response", 2),
    ("nested 100,000 deep", sends(200, b"[" * 100_000), 502, "upstream_invalid_response", 2),
    ("wrong shape", sends(200, '{"success": true, "data": ["x"]}'), 502, "upstream_invalid_response", 2),
    ("no message", sends(200, '{"success": true, "data": {"message": null}}'), 502, "upstream_invalid_response", 2),
    ("a number", sends(200, "17"), 502, "upstream_invalid_response", 2),
    ("empty answer", says(" "), 502, "upstream_invalid_response", 2),
    ("empty body", sends(200), 502, "upstream_invalid_response", 2),
    ("404", sends(404, "gone"), 502, "upstream_invalid_response", 1),
    ("redirect elsewhere", sends(302, Location="http://127.0.0.2:1/steal"), 502, "upstream_invalid_response", 1),
    ("managed challenge", sends(403, JUST_A_MOMENT, cf_mitigated="challenge"), 503, "upstream_blocked", 1),
    ("challenge without its header", sends(403, JUST_A_MOMENT, **CLOUDFLARE), 503, "upstream_blocked", 1),
    ("challenge as 503", sends(503, JUST_A_MOMENT, **CLOUDFLARE), 503, "upstream_blocked", 1),
    ("1020", sends(403, FIREWALL, **CLOUDFLARE), 503, "upstream_blocked", 1),
    ("IUAM page", sends(503, IUAM, **CLOUDFLARE), 503, "upstream_blocked", 2),
    ("a page with a stale nonce", sends(403, "-1"), 502, "upstream_refused", 2),
    ("success: false", sends(200, '{"success": false}'), 502, "upstream_refused", 2),
    ("429", sends(429, "slow down"), 429, "upstream_rate_limited", 1),
    ("429 for long", sends(429, "slow down", Retry_After="77"), 429, "upstream_rate_limited", 1),
    ("429 for ever", sends(429, "slow down", Retry_After="9" * 400), 429, "upstream_rate_limited", 1),
    ("429 for short", sends(429, "slow down", Retry_After="0"), 429, "upstream_rate_limited", 2),
    ("429 with nonsense", sends(429, "slow down", Retry_After="soon"), 429, "upstream_rate_limited", 1),
]


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
@pytest.mark.parametrize(("fault", "status", "code", "posts"), [row[1:] for row in FAULTS], ids=[row[0] for row in FAULTS])
def test_a_fault_of_upstream_is_an_honest_error(make: Callable[..., Client], kimi: StandIn, fault: Fault,
                                                status: int, code: str, posts: int, stream: bool) -> None:
    app = make(REQUEST_TIMEOUT="0.6")
    assert said(chat(app, "before"))
    kimi.posts.clear()
    kimi.always = fault
    began = time.monotonic()
    for session in ({"user": "ada"}, {}):
        kimi.posts.clear()
        response = chat(app, **session, stream=stream)
        assert time.monotonic() - began < PATIENCE
        assert is_error(response, status, code, "rate_limit_error" if status == 429 else "upstream_error")
        assert len(kimi.posts) == posts
        assert response.headers.get("x-should-retry") == ("false" if posts > 1 or status == 504 else None)
        assert "<" not in response.json["error"]["message"], "no HTML is passed on"
    assert is_error(app.get("/v1/sessions/ada"), 404, "session_not_found")
    health = app.get("/health").json
    assert health["status"] == "degraded" and code in health["upstreams"]["kimi"]["reason"]
    assert health["chats"]["running"] == 0
    kimi.gate.set()
    kimi.always = answer
    assert said(chat(app, "after")) == "Hello from upstream."
    assert app.get("/health").json["status"] == "ok"
    assert not hasattr(sys, "tracebacklimit"), "cloudscraper sets it and blanks every later traceback"


@pytest.mark.parametrize(("fault", "status", "code"), [
    (sends(200, "<html>a new design</html>"), 502, "upstream_changed"), (sends(404, "gone"), 502, "upstream_changed"),
    *((sends(302, Location=address), 502, "upstream_changed") for address in (
        "http://127.0.0.2:1/", "http://[::1", "ftp://127.0.0.1/x", "http://127.0.0.1:99999/", "http://127.0.0.1:abc/")),
    (sends(403, JUST_A_MOMENT, **CLOUDFLARE), 503, "upstream_blocked"), (sends(503, IUAM, **CLOUDFLARE), 503, "upstream_blocked"),
    (sends(403, FIREWALL, **CLOUDFLARE), 503, "upstream_blocked"), (sends(429), 429, "upstream_rate_limited"),
    (lambda handler: handler.server.gate.wait(PATIENCE), 504, "upstream_timeout")])
def test_a_fault_of_the_chat_page_is_an_honest_error(make: Callable[..., Client], kimi: StandIn, fault: Fault,
                                                     status: int, code: str) -> None:
    app = make(REQUEST_TIMEOUT="0.6")
    kimi.page_script.append(fault)
    assert is_error(chat(app), status, code)
    assert not kimi.posts and len(kimi.pages) == 1
    kimi.gate.set()
    assert said(chat(app))


def test_a_redirect_of_the_page_is_followed_on_its_own_host_only(app: Client, kimi: StandIn) -> None:
    kimi.page_script.append(sends(301, Location="/chat/moved"))
    assert said(chat(app)) and len(kimi.pages) == 2


def test_a_page_in_a_circle_of_redirects_is_an_error(app: Client, kimi: StandIn) -> None:
    kimi.page_script.extend([sends(301, Location="/chat/again")] * 9)
    assert is_error(chat(app), 502, "upstream_changed")


def test_upstream_that_refuses_connections_or_has_no_name_is_unavailable(make: Callable[..., Client]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        for url in (f"http://127.0.0.1:{unused.getsockname()[1]}/chat/", "http://no.such.host.invalid/chat/"):
            response = chat(make(CHAT_PAGE_URL=url))
            assert is_error(response, 502, "upstream_unavailable")
            assert "object at" not in response.text and response.headers["x-should-retry"] == "false"


def test_a_retry_that_succeeds_is_all_the_client_sees(app: Client, kimi: StandIn) -> None:
    kimi.script.append(resets)
    assert said(chat(app)) == "Hello from upstream." and len(kimi.posts) == 2


@pytest.mark.parametrize(("header", "passed_on"), [
    (lambda: "77", "77"), (lambda: formatdate(time.time() + 77.5, usegmt=True), "7[678]"), (lambda: "-3", None)])
def test_retry_after_is_passed_on(app: Client, kimi: StandIn, header: Callable[[], str], passed_on: str | None) -> None:
    kimi.script.append(sends(429, "", Retry_After=header()))
    response = chat(app)
    assert is_error(response, 429, "upstream_rate_limited", "rate_limit_error")
    given = response.headers.get("Retry-After")
    assert (given is None) if passed_on is None else re.fullmatch(passed_on, given)


def test_compressed_answers_and_half_surrogates_and_line_separators_arrive_whole(app: Client, kimi: StandIn) -> None:
    text = "\ud83d\ude00 \ud83d end \u2028 \x85"
    body = gzip.compress(json.dumps({"success": True, "data": {"message": text}}).encode())
    kimi.always = sends(200, body, "application/json", Content_Encoding="gzip")
    assert said(chat(app)) == "\U0001f600 \ufffd end \u2028 \x85"
    response = chat(app, stream=True)
    assert streamed(events(response)) == "\U0001f600 \ufffd end \u2028 \x85"
    assert "\u2028" not in response.text and "\x85" not in response.text, "some clients split lines there"


def test_proxies_of_the_environment_are_honoured(kimi: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = StandIn()  # asked for an absolute URL, it answers as the site would
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_address[1]}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    try:
        settings = kimi2api.Settings.load({"UPSTREAM_URL": "http://kimi.example/ajax", "CHAT_PAGE_URL": "http://kimi.example/"})
        assert said(chat(Client(kimi2api.create_app(settings))))
        assert len(proxy.posts) == 1
        settings = kimi2api.Settings.load(kimi.settings)
        assert said(chat(Client(kimi2api.create_app(settings))))
        assert len(proxy.posts) == 1, "loopback is never asked of a proxy"
    finally:
        proxy.stop()


def test_https_upstreams_are_verified(kimi: StandIn, tmp_path: Path, make: Callable[..., Client],
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = tmp_path / "both.pem"
    made = subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
                           "-addext", "subjectAltName=DNS:localhost", "-keyout", str(certificate), "-out", str(tmp_path / "crt")],
                          capture_output=True)
    if made.returncode:
        pytest.skip("needs the openssl command")
    certificate.write_text(certificate.read_text() + (tmp_path / "crt").read_text())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    kimi.socket = context.wrap_socket(kimi.socket, server_side=True)
    urls = {name: value.replace("http://127.0.0.1", "https://localhost") for name, value in kimi.settings.items()}
    assert is_error(chat(make(**urls)), 502, "upstream_unavailable"), "a certificate that nobody vouches for"
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "crt"))
    assert said(chat(make(**urls)))


def test_nothing_secret_and_no_prompt_is_logged(make: Callable[..., Client], kimi: StandIn,
                                                caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    app = make(API_MASTER_KEY="sk-secret")
    kimi.script.extend([sends(200, '{"success": false, "data": "its words"}'), sends(500)])
    assert said(chat(app, "my prompt", user="ada", headers={"Authorization": "Bearer sk-secret"}))
    chat(app, "my prompt", headers={"Authorization": "Bearer sk-wrong"})
    for secret in ("sk-secret", "sk-wrong", "my prompt", kimi.nonce, "ada", "its words"):
        assert secret not in caplog.text, secret
    assert "retry 1 of 1" in caplog.text and "401" in caplog.text


def test_an_upstream_that_is_down_for_long_is_asked_by_one_trial_call_at_a_time(make: Callable[..., Client], kimi: StandIn) -> None:
    app = make(MAX_RETRIES="0")
    kimi.always = sends(500)
    for _ in range(5):
        assert is_error(chat(app), 502, "upstream_unavailable")
    posts = len(kimi.posts)
    response = chat(app)
    assert is_error(response, 502, "upstream_unavailable") and "after 5 failures" in response.json["error"]["message"]
    assert int(response.headers["Retry-After"]) >= 1 and len(kimi.posts) == posts == 5, "it failed at once, without a call"
    health = app.get("/health").json
    assert health["status"] == "degraded" and health["upstreams"]["kimi"]["failing_since"] <= time.time()
    wait_for(lambda: chat(app) and len(kimi.posts) > posts, "a trial call after the pause")
    began = time.monotonic()
    wait_for(lambda: chat(app) and len(kimi.posts) > posts + 1, "another one")
    assert time.monotonic() - began > 0.5, "the pause has grown from 0.3 s to 0.6 s"
    kimi.always, posts = at_the_gate, len(kimi.posts)
    with ThreadPoolExecutor(1) as pool:
        trial = wait_for(lambda: (future := pool.submit(chat, app)) and (
            wait_for(lambda: future.done() or len(kimi.posts) > posts) and not future.done()) and future)
        for _ in range(5):
            assert is_error(chat(app), 502, "upstream_unavailable")
        assert len(kimi.posts) == posts + 1, "only one call tries"
        kimi.gate.set()
        assert said(trial.result())
    assert said(chat(app)) and app.get("/health").json["status"] == "ok"


def test_refusals_and_rate_limits_are_no_reason_to_stop_asking(make: Callable[..., Client], kimi: StandIn) -> None:
    app = make(MAX_RETRIES="0")
    for fault, code in ((sends(429), "upstream_rate_limited"), (sends(403, "-1"), "upstream_refused")):
        kimi.always = fault
        for _ in range(7):
            posts = len(kimi.posts)
            assert chat(app).json["error"]["code"] == code and len(kimi.posts) > posts


# ======================================================================================================================
# 5 APIs that speak OpenAI's protocol, and falling back to them
# ======================================================================================================================


class ApiHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandInApi

    def do_GET(self) -> None:
        self.server.listed.append(dict(self.headers))
        self.server.list_script(self)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((self.path, dict(self.headers), body))
            act = self.server.script.popleft() if self.server.script else self.server.always
        act(self)

    def json(self, status: int, body: Any, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def begin(self, **headers: str) -> None:
        self.send_response(200)
        for name, value in {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def send(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def event(self, chunk: Any) -> None:
        self.send(b"data: " + (chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode()) + b"\n\n")

    def end(self) -> None:
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: Any) -> None:
        pass


class StandInApi(ThreadingHTTPServer):
    """Plays an API of OpenAI's kind, which drips, cuts, limits and refuses when it is told to."""

    request_queue_size = 1024
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ApiHandler)
        self.lock, self.gate = threading.Lock(), threading.Event()
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.listed: list[dict[str, str]] = []
        self.hung_up = threading.Event()
        self.script: deque[Callable[[ApiHandler], None]] = deque()
        self.always: Callable[[ApiHandler], None] = api_answers("Hi ", "from the ", "API.")
        self.list_script: Callable[[ApiHandler], None] = lambda handler: handler.json(
            200, {"object": "list", "data": [{"id": "k2", "object": "model", "created": 7, "owned_by": "them"}]})
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass

    def stop(self) -> None:
        self.gate.set()
        self.shutdown()
        self.server_close()


def api_chunk(delta: Any = None, finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
    return {"id": "theirs", "object": "chat.completion.chunk", "created": 1, "model": "k2-2026", "system_fingerprint": "fp",
            "choices": [{"index": 0, "delta": delta or {}, "finish_reason": finish_reason}], **more}


USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8, "cached_tokens": 1}


def api_answers(*texts: str, deltas: Any = None, finish: str = "stop", **headers: str) -> Callable[[ApiHandler], None]:
    def act(handler: ApiHandler) -> None:
        handler.begin(**headers)
        handler.send(b": a comment\n\n")
        handler.event(api_chunk({"role": "assistant", "content": ""}))
        for delta in deltas or [{"content": text} for text in texts]:
            handler.event(api_chunk(delta))
        handler.event(api_chunk({}, finish))
        handler.event({**api_chunk(), "choices": [], "usage": USAGE})
        handler.event(b"[DONE]")
        handler.end()
    return act


def api_fails(status: int, body: Any, **headers: str) -> Callable[[ApiHandler], None]:
    return lambda handler: handler.json(status, body, **headers)


@pytest.fixture
def api() -> Iterator[StandInApi]:
    server = StandInApi()
    yield server
    server.stop()


@pytest.fixture
def both(api: StandInApi) -> dict[str, str]:
    """Settings that put the stand-in API behind `local/…` beside the web chat."""
    return {"PROVIDERS": "local", "LOCAL_BASE_URL": api.url, "LOCAL_API_KEY": "sk-theirs"}


def test_an_api_is_addressed_by_its_name_and_gets_the_request_as_it_is(make: Callable[..., Client], both: dict[str, str],
                                                                       api: StandInApi, kimi: StandIn) -> None:
    app = make(**both)
    request = {"messages": [{"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "x"}}]}],
               "tools": [{"type": "function", "function": {"name": "f"}}], "temperature": 0.5, "thinking": {"type": "enabled"}}
    response = chat(app, model="local/org/k2", **request)
    assert said(response) == "Hi from the API."
    assert response.headers["X-Kimi2api-Provider"] == "local" and response.json["model"] == "local/org/k2"
    assert response.json["usage"] == USAGE and response.json["system_fingerprint"] == "fp"
    assert response.json["choices"][0]["finish_reason"] == "stop" and response.json["choices"][0]["logprobs"] is None
    path, headers, body = api.asked[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer sk-theirs"
    assert body == {**request, "model": "org/k2", "stream": True, "stream_options": {"include_usage": True}}
    assert not kimi.posts


def test_chunks_of_an_api_pass_through_untouched(make: Callable[..., Client], both: dict[str, str], api: StandInApi) -> None:
    deltas = [{"reasoning_content": "Hm", "content": None}, {"content": "你", "unknown": {"a": [1]}}, {"content": "好"}]
    api.always = api_answers(deltas=deltas, x_ratelimit_remaining_requests="9")
    response = chat(make(**both), model="local/k2", stream=True)
    *chunks, done = events(response)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [{"role": "assistant", "content": ""}, *deltas, {}]
    assert all(chunk["system_fingerprint"] == "fp" and "usage" not in chunk for chunk in chunks)
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    assert response.headers["x-ratelimit-remaining-requests"] == "9"
    chunks = events(chat(make(**both), model="local/k2", stream=True, stream_options={"include_usage": True}))
    assert chunks[-2]["usage"] == USAGE and chunks[-2]["choices"] == []
    folded = chat(make(**both), model="local/k2").json["choices"][0]["message"]
    assert folded == {"role": "assistant", "content": "你好", "refusal": None, "reasoning_content": "Hm", "unknown": {"a": [1]}}


def test_tool_calls_of_an_api_are_folded_by_index(make: Callable[..., Client], both: dict[str, str], api: StandInApi) -> None:
    def call(index: int, arguments: str, **more: Any) -> dict[str, Any]:
        return {"tool_calls": [{"index": index, **more, "function": {"arguments": arguments, **({"name": f"f{index}"} if more else {})}}]}

    api.always = api_answers(deltas=[call(0, "", id="call_0", type="function"), call(0, '{"a":'), call(0, "1}"),
                                     call(1, "{}", id="call_1", type="function")], finish="tool_calls")
    choice = chat(make(**both), model="local/k2").json["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"] == [
        {"id": "call_0", "type": "function", "function": {"name": "f0", "arguments": '{"a":1}'}},
        {"id": "call_1", "type": "function", "function": {"name": "f1", "arguments": "{}"}}]


def test_several_choices_of_an_api_are_folded_each(make: Callable[..., Client], both: dict[str, str], api: StandInApi) -> None:
    def act(handler: ApiHandler) -> None:
        handler.begin()
        for index, text in ((0, "a"), (1, "x"), (0, "b"), (1, "y")):
            handler.event({"choices": [{"index": index, "delta": {"content": text}, "finish_reason": None}]})
        handler.event({"choices": [{"index": index, "delta": {}, "finish_reason": "stop"} for index in (0, 1)]})
        handler.end()

    api.always = act
    body = chat(make(**both), model="local/k2", n=2).json
    assert [choice["message"]["content"] for choice in body["choices"]] == ["ab", "xy"]
    assert body["usage"]["total_tokens"] > 0, "estimated, since upstream told none"


def test_chunks_of_an_api_arrive_one_by_one(run: Callable[..., Program], both: dict[str, str], api: StandInApi) -> None:
    step = threading.Semaphore(0)

    def act(handler: ApiHandler) -> None:
        handler.begin()
        for number in range(5):
            step.acquire(timeout=PATIENCE)
            handler.event(api_chunk({"content": f"<{number}>"}))
        handler.event(api_chunk({}, "stop"))
        handler.end()

    api.always = act
    with run(**both).open_chat(model="local/k2", stream=True) as link:
        received = b""
        for number in range(5):
            assert f"<{number}>".encode() not in received
            step.release()
            while f"<{number}>".encode() not in received:
                received += link.recv(65536)
        assert b"[DONE]" in received + read_all(link)


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
@pytest.mark.parametrize("begun", [False, True], ids=["before its head", "in its stream"])
def test_when_the_client_leaves_the_apis_connection_is_closed_at_once(run: Callable[..., Program], both: dict[str, str],
                                                                      api: StandInApi, stream: bool, begun: bool) -> None:
    def act(handler: ApiHandler) -> None:
        if begun:
            handler.begin()
            handler.event(api_chunk({"content": "one"}))
        handler.connection.settimeout(PATIENCE)
        if handler.connection.recv(1) == b"":
            api.hung_up.set()

    api.always = act
    program = run(**both)
    with program.open_chat(model="local/k2", stream=stream):
        wait_for(lambda: api.asked)
        if begun and stream:
            wait_for(lambda: program.health()["chats"]["running"] == 1)
    assert api.hung_up.wait(PATIENCE)
    wait_for(lambda: program.health()["chats"]["running"] == 0)
    assert len(api.asked) == 1, "a call that nobody waits for is not retried"
    api.always = api_answers("fine")
    assert b"fine" in program.chat(model="local/k2")[1]


def test_sessions_work_the_same_for_an_api(make: Callable[..., Client], both: dict[str, str], api: StandInApi, kimi: StandIn) -> None:
    app = make(**both)
    chat(app, "first", user="ada", model="local/k2", stream=True)
    chat(app, "second", user="ada")
    assert kimi.posts[-1]["message"] == "用户: first\n模型: Hi from the API.\n用户: second"
    chat(app, messages=[{"role": "system", "content": "S"}, {"role": "user", "content": "third"}], user="ada", model="local/k2")
    assert [message["content"] for message in api.asked[-1][2]["messages"]] == [
        "S", "first", "Hi from the API.", "second", kimi.answer, "third"]


def cut_short(handler: ApiHandler) -> None:
    handler.begin()
    handler.event(api_chunk({"content": "half"}))
    handler.wfile.flush()
    handler.server.gate.wait(PATIENCE)
    handler.close_connection = True


def ends_early(handler: ApiHandler) -> None:
    cut_short(handler)
    handler.end()


def fails_midway(handler: ApiHandler) -> None:
    cut_short(handler)
    handler.event({"error": {"message": "overloaded", "type": "engine_error", "code": "busy"}})
    handler.end()


def sends_rubbish(handler: ApiHandler) -> None:
    cut_short(handler)
    handler.event(b'{"choices": [7]}')
    handler.end()


@pytest.mark.parametrize(("act", "code"), [
    (cut_short, "upstream_unavailable"), (ends_early, "upstream_unavailable"), (fails_midway, "busy"),
    (sends_rubbish, "upstream_invalid_response")])
def test_a_stream_that_an_api_breaks_off_is_an_error_event(run: Callable[..., Program], both: dict[str, str],
                                                           api: StandInApi, act: Any, code: str) -> None:
    api.always = act
    program = run(**both, FALLBACK_MODELS="kimi")
    with program.open_chat(model="local/k2", stream=True, user="ada") as link:
        body = b""
        while b"half" not in body:
            body += link.recv(65536)
        api.gate.set()
        body += read_all(link)
    assert events(body)[-1]["error"]["code"] == code and b"[DONE]" not in body
    assert program.ask("GET", "/v1/sessions/ada")[0] == 404, "half an answer is not remembered"


def steady(handler: ApiHandler) -> None:
    """A chunk every 20 ms, for as long as anybody reads."""
    handler.begin()
    try:
        while not handler.server.gate.wait(0.02):
            handler.event(api_chunk({"content": "word "}))
            handler.wfile.flush()
    except OSError:
        handler.server.hung_up.set()
    else:
        handler.event(api_chunk({}, "stop"))
        handler.end()


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
def test_a_client_that_leaves_a_steady_answer_is_noticed(run: Callable[..., Program], both: dict[str, str], api: StandInApi, stream: bool) -> None:
    api.always = steady
    program = run(**both)
    with program.open_chat(model="local/k2", stream=stream):
        wait_for(lambda: api.asked)
    assert api.hung_up.wait(PATIENCE)
    wait_for(lambda: program.health()["chats"]["running"] == 0)


def test_fifty_streams_end_with_done_at_a_stop_and_with_an_error_when_grace_is_over(run: Callable[..., Program], both: dict[str, str],
                                                                                    api: StandInApi) -> None:
    api.always = steady
    for grace in ("60", "0.3"):
        api.gate.clear()
        program = run(**both, SHUTDOWN_GRACE=grace)
        links = [program.open_chat(model="local/k2", stream=True) for _ in range(50)]
        assert all(link.recv(1) for link in links)
        program.signal(signal.SIGTERM)
        wait_for(lambda program=program: any("stopping" in line for line in program.log))
        if grace == "60":
            api.gate.set()
        bodies = [read_all(link) for link in links]
        if grace == "60":
            assert all(b"data: [DONE]" in body for body in bodies)
        else:
            assert all(b"server_stopping" in body and b"[DONE]" not in body for body in bodies)
        assert program.wait() == 0


def test_a_first_chunk_without_choices_holds_nothing_back(run: Callable[..., Program], both: dict[str, str], api: StandInApi) -> None:
    def act(handler: ApiHandler) -> None:
        handler.begin()
        handler.event({"choices": [], "prompt_filter_results": [1]})
        handler.event(api_chunk({"content": "now"}))
        handler.wfile.flush()
        handler.server.gate.wait(PATIENCE)
        handler.event(api_chunk({}, "stop"))
        handler.end()

    api.always = act
    with run(**both).open_chat(model="local/k2", stream=True) as link:
        body = b""
        while b"now" not in body:
            body += link.recv(65536)
        api.gate.set()
        assert b"[DONE]" in read_all(link) and b"prompt_filter_results" in body


def test_half_surrogates_of_an_api_are_replaced(make: Callable[..., Client], both: dict[str, str], api: StandInApi) -> None:
    api.always = api_answers("a\ud83d", "\ude00b \U0001f600")
    app = make(**both)
    assert said(chat(app, model="local/k2", user="ada")) == "a\ufffd\ufffdb \U0001f600"
    assert streamed(events(chat(app, model="local/k2", stream=True))) == "a\ufffd\ufffdb \U0001f600"
    assert app.get("/v1/sessions/ada").status_int == 200


def test_a_connection_to_an_api_is_used_again(make: Callable[..., Client], both: dict[str, str], api: StandInApi) -> None:
    ports = set()
    answers = api_answers("x")
    api.always = lambda handler: (ports.add(handler.client_address), answers(handler))  # type: ignore[assignment]
    app = make(**both)
    for _ in range(4):
        assert said(chat(app, model="local/k2")) == "x"
    assert len(ports) == 1


def test_an_api_that_breaks_off_before_anything_is_sent_is_replaced(make: Callable[..., Client], both: dict[str, str],
                                                                    api: StandInApi) -> None:
    api.gate.set()
    app = make(**both, FALLBACK_MODELS="kimi")
    api.always = cut_short
    assert chat(app, model="local/k2").json["model"] == "kimi", "nothing of a JSON answer is sent before its end"
    for act in (api_fails(200, {"choices": []}), lambda handler: (handler.begin(), handler.event(b"[DONE]"), handler.end()),
                lambda handler: (handler.begin(), handler.event(api_chunk({"role": "assistant"})), handler.end())):
        api.always = act
        assert streamed(events(chat(app, model="local/k2", stream=True))) == "Hello from upstream."
        assert chat(app, model="local/k2").headers["X-Kimi2api-Provider"] == "kimi"


def test_an_error_that_several_wait_for_is_told_to_each_alone(make: Callable[..., Client], both: dict[str, str], api: StandInApi,
                                                              kimi: StandIn) -> None:
    app = make(**both, FALLBACK_MODELS="local/k2", MAX_RETRIES="0")
    kimi.page_script.append(lambda handler: (handler.server.gate.wait(PATIENCE), handler.reply(200, b"no nonce")))
    api.always = api_fails(402, {"error": {"message": "pay"}})
    with ThreadPoolExecutor(5) as pool:
        chats = [pool.submit(chat, app) for _ in range(5)]
        wait_for(lambda: app.get("/health").json["chats"]["running"] == 5)
        kimi.gate.set()
        assert [done.result().text.count("pay") for done in chats] == [1] * 5


def test_our_key_for_an_api_is_never_told(make: Callable[..., Client], both: dict[str, str], api: StandInApi) -> None:
    for field in ("message", "type", "code", "param"):
        api.always = api_fails(400, {"error": {"message": "m", field: "y" * 295 + " sk-theirs"}})
        assert "sk-th" not in chat(make(**both), model="local/k2").text


@pytest.mark.parametrize(("act", "status", "type", "code", "asked"), [
    (api_fails(400, {"error": {"message": "bad", "type": "invalid_request_error", "code": "x", "param": "n"}}), 400, "invalid_request_error", "x", 1),
    (api_fails(404, {"error": {"message": "no model", "type": "resource_not_found_error"}}), 404, "resource_not_found_error", None, 1),
    (api_fails(418, b"<html>teapot</html>"), 418, "invalid_request_error", None, 1),
    (api_fails(401, {"error": {"message": "bad key sk-theirs"}}), 502, "upstream_error", "upstream_auth", 1),
    (api_fails(403, b"no"), 502, "upstream_error", "upstream_auth", 1),
    (api_fails(429, {"error": {"message": "slow", "type": "rate_limit_reached_error"}}, Retry_After="60", X_RateLimit_Limit="3"),
     429, "rate_limit_reached_error", "upstream_rate_limited", 1),
    (api_fails(500, {"error": {"message": "with sk-theirs", "type": "server_error", "code": "oops"}}), 500, "server_error", "oops", 2),
    (api_fails(503, b"<html><b>down</b></html>"), 503, "upstream_error", "upstream_unavailable", 2),
    (api_fails(302, b"", Location="http://127.0.0.2:1/"), 502, "upstream_error", "upstream_unavailable", 1),
    (lambda handler: handler.server.gate.wait(PATIENCE), 504, "upstream_error", "upstream_timeout", 1),
    (resets, 502, "upstream_error", "upstream_unavailable", 2)])
@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
def test_errors_of_an_api_pass_through(make: Callable[..., Client], both: dict[str, str], api: StandInApi, act: Any, status: int,
                                       type: str, code: str | None, asked: int, stream: bool) -> None:
    api.always = act
    response = chat(make(**both, REQUEST_TIMEOUT="0.5"), model="local/k2", stream=stream)
    assert is_error(response, status, code, type)
    assert len(api.asked) == asked and "sk-theirs" not in response.text and "<" not in response.json["error"]["message"]
    if status == 429:
        assert response.headers["Retry-After"] == "60" and response.headers["X-RateLimit-Limit"] == "3"


def test_an_api_that_cannot_be_reached_is_unavailable(make: Callable[..., Client]) -> None:
    response = chat(make(PROVIDERS="local", LOCAL_BASE_URL="http://127.0.0.1:9/v1"), model="local/k2")
    assert is_error(response, 502, "upstream_unavailable") and response.headers["x-should-retry"] == "false"


def test_models_of_an_api_are_listed_lazily_and_never_hold_the_list_up(make: Callable[..., Client], both: dict[str, str],
                                                                       api: StandInApi) -> None:
    app = make(**both)
    listed = wait_for(lambda: [model for model in app.get("/v1/models").json["data"] if model["id"].startswith("local/")])
    assert listed == [{"id": "local/k2", "object": "model", "created": 7, "owned_by": "them"}]
    app.get("/v1/models")
    assert len(api.listed) == 1, "the list is kept"
    assert app.get("/v1/models/local/k2").json == listed[0]
    assert is_error(app.get("/v1/models/local/other"), 404, "model_not_found")
    api.list_script = lambda handler: api.gate.wait(PATIENCE)
    began = time.monotonic()
    aliases = ",".join(f"m{number}=local/k2" for number in range(30))
    assert len(make(**both, MODELS=f"kimi=a/b,{aliases}").get("/v1/models").json["data"]) == 31
    assert time.monotonic() - began < PATIENCE / 2, "one wait for all, not one for each"


@pytest.mark.parametrize("fault", [
    sends(500), sends(403, JUST_A_MOMENT), sends(429), sends(200, "?"), resets,
    lambda handler: handler.server.gate.wait(PATIENCE), None])
@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
def test_when_the_web_chat_cannot_answer_the_next_model_does(make: Callable[..., Client], both: dict[str, str], api: StandInApi,
                                                             kimi: StandIn, fault: Any, stream: bool) -> None:
    app = make(**both, FALLBACK_MODELS="local/k2", REQUEST_TIMEOUT="0.4", MAX_RETRIES="0", CONTEXT_MAX_LENGTH="20")
    kimi.always = fault or answer
    response = chat(app, "Hello" if fault else "x" * 30, stream=stream)
    assert response.status_int == 200 and response.headers["X-Kimi2api-Provider"] == "local"
    if stream:
        assert {chunk["model"] for chunk in events(response)[:-1]} == {"local/k2"}
        assert streamed(events(response)) == "Hi from the API."
    else:
        assert said(response) == "Hi from the API." and response.json["model"] == "local/k2"
    kimi.gate.set()
    kimi.always = answer
    response = chat(app)
    assert response.json["model"] == "kimi" and response.headers["X-Kimi2api-Provider"] == "kimi"


def test_a_bad_request_never_falls_back_and_when_all_fail_the_error_says_so(make: Callable[..., Client], both: dict[str, str],
                                                                            api: StandInApi, kimi: StandIn) -> None:
    app = make(**both, FALLBACK_MODELS="local/k2,kimi", MAX_RETRIES="0")
    assert is_error(chat(app, [{"type": "image_url", "image_url": {}}]), 400, "unsupported_value")
    assert not api.asked
    kimi.always, api.always = sends(500), api_fails(401, b"no")
    response = chat(app)
    assert is_error(response, 502, "upstream_unavailable") and "local/k2" in response.json["error"]["message"]
    assert len(kimi.posts) == len(api.asked) == 1


def test_models_are_resolved_by_the_table_then_by_provider_then_as_the_web_chats_own(make: Callable[..., Client], both: dict[str, str],
                                                                                     api: StandInApi, kimi: StandIn) -> None:
    app = make(**both, MODELS="kimi=moonshotai/K2,gpt-4o=local/k2,mini=gpt-4o,*=kimi")
    for model, provider, own_name in (("gpt-4o", "local", "k2"), ("mini", "local", "k2"), ("kimi", "kimi", "moonshotai/K2"),
                                      ("anything", "kimi", "moonshotai/K2"), ("local/z", "local", "z"), ("other/z", "kimi", "moonshotai/K2")):
        response = chat(app, model=model)
        assert response.headers["X-Kimi2api-Provider"] == provider and response.json["model"] == model
        assert (api.asked[-1][2]["model"] if provider == "local" else kimi.posts[-1]["model"]) == own_name


@pytest.mark.parametrize(("settings", "name"), [
    ({"MODELS": "kimi=a,a=b,b=kimi"}, "MODELS"), ({"PROVIDERS": "local"}, "LOCAL_BASE_URL"), ({"PROVIDERS": "Böse"}, "PROVIDERS"),
    ({"FALLBACK_MODELS": "moonshot/kimi-k2.6"}, "FALLBACK_MODELS"), ({"MOONSHOT_API_KEY": "k", "MOONSHOT_BASE_URL": "x"}, "MOONSHOT_BASE_URL")])
def test_settings_of_apis_that_make_no_sense_are_refused(settings: dict[str, str], name: str) -> None:
    with pytest.raises(kimi2api.SettingError, match=f"^{name}: "):
        kimi2api.Settings.load(settings)


def test_a_preset_is_on_when_its_key_is_set() -> None:
    settings = kimi2api.Settings.load({"MOONSHOT_API_KEY": "sk-m", "QIANFAN_API_KEY": "sk-q", "FALLBACK_MODELS": "moonshot/kimi-k2.6"})
    assert settings.apis == {"moonshot": kimi2api.API("https://api.moonshot.ai/v1", "sk-m"),
                             "qianfan": kimi2api.API("https://qianfan.baidubce.com/v2", "sk-q")}


def test_check_covers_every_provider(kimi: StandIn, api: StandInApi, both: dict[str, str]) -> None:
    done = command("--check", **kimi.settings, **both)
    assert done.returncode == 0 and done.stdout.count("✓") == 6 and "local:" in done.stdout
    assert api.asked[0][2]["model"] == "k2"
    api.list_script = api_fails(401, b"no")
    done = command("--check", **kimi.settings, **both)
    assert done.returncode == 1 and "upstream_auth" in done.stdout and "sk-theirs" not in done.stdout + done.stderr


# ======================================================================================================================
# 6 Answers
# ======================================================================================================================


def test_a_completion_has_every_field_that_openais_schema_requires(app: Client, kimi: StandIn) -> None:
    kimi.answer = "你好，世界！"
    response = chat(app, model="kimi-k2-instruct")
    body = response.json
    assert {"id", "object", "created", "model", "choices", "usage"} <= set(body)
    assert body["object"] == "chat.completion" and body["model"] == "kimi-k2-instruct" and body["id"].startswith("chatcmpl-")
    assert abs(body["created"] - time.time()) < PATIENCE
    assert body["choices"] == [{"index": 0, "finish_reason": "stop", "logprobs": None, "message": {
        "role": "assistant", "content": "你好，世界！", "refusal": None}}]
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"] > 0
    assert "你好" in response.text, "UTF-8, not \\u escapes"


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream_has_the_shape_of_openais(app: Client, kimi: StandIn, include_usage: bool) -> None:
    response = chat(app, stream=True, stream_options={"include_usage": include_usage})
    assert response.content_type == "text/event-stream" and response.headers["Cache-Control"] == "no-cache"
    *chunks, done = events(response)
    assert done == "[DONE]" and streamed(chunks) == kimi.answer
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    last = chunks[-2] if include_usage else chunks[-1]
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks if chunk["choices"] and chunk is not last)
    if include_usage:
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 0
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
    else:
        assert not any("usage" in chunk for chunk in chunks)


def test_the_estimate_of_tokens_knows_chinese_from_english() -> None:
    assert kimi2api.estimate_tokens("") == 0
    assert kimi2api.estimate_tokens("a") == 1
    assert kimi2api.estimate_tokens("word " * 80) == 100
    assert kimi2api.estimate_tokens("月之暗面" * 25) == 60
    assert kimi2api.estimate_tokens("한국어ひらがな") >= 4


@pytest.mark.parametrize("text", [
    "The quick brown fox.\n\n  jumps   over\tthe lazy dog. ", "月之暗面科技有限公司，成立于2023年。Kimi是智能助手！",
    "e\u0301e\u0301 か\u3099字\ufe00\ufe00字 👨\u200d👩\u200d👧字👍🏽字🇨🇳🇨🇳", "x" * 500, " ", "\n", "a", "字" * 300])
@pytest.mark.parametrize("most", [1, 3, 100])
def test_pieces_are_word_like_and_never_cut_what_is_read_as_one(text: str, most: int) -> None:
    parts = list(kimi2api.pieces(text, most))
    assert "".join(parts) == text and len(parts) <= most and all(parts)
    for part in parts[1:]:
        assert not unicodedata.category(part[0]).startswith("M") and part[0] not in "\u200d🏽"
    assert not any(part.endswith("\u200d") for part in parts[:-1])
    if most == 100 and text.startswith("The quick"):
        assert parts[:3] == ["The", " quick", " brown"]
    if most == 100 and text.startswith("月之"):
        assert max(map(len, parts)) <= 6 and len(parts) > 10


def test_a_stream_arrives_piece_by_piece_in_its_time(run: Callable[..., Program], kimi: StandIn) -> None:
    kimi.answer = "word " * 400
    program = run(STREAM_INTERVAL_MS="20", STREAM_MAX_SECONDS="0.5")
    connection = program.connect()
    connection.request("POST", "/v1/chat/completions", json.dumps(
        {"stream": True, "messages": [{"role": "user", "content": "x"}]}))
    response = connection.getresponse()
    arrivals, body = [], b""
    while part := response.read1(65536):
        arrivals.append(time.monotonic())
        body += part
    chunks = events(body)
    assert streamed(chunks) == kimi.answer and chunks[-1] == "[DONE]"
    assert len(arrivals) >= 10, "one by one, not all at once"
    assert 0.3 < arrivals[-1] - arrivals[0] < PATIENCE / 2
    assert len(chunks) <= 25 + 3, "pieces grow so that the replay keeps to STREAM_MAX_SECONDS"


def test_a_pace_that_the_machine_cannot_keep_makes_larger_pieces() -> None:
    whole = kimi2api.Delta.of({"content": "word " * 100}, is_complete=True)
    whole.chunk |= {"usage": {}, "model": "kimi"}
    parts = []
    for delta in kimi2api.pace(iter([whole]), 0.002, 0.2, kimi2api.Cancel()):
        parts.append(delta.text)
        time.sleep(0.02)  # a client that takes its time
    assert "".join(parts) == "word " * 100 and len(parts) < 60 and parts[0] == "", "the role goes first"


def test_with_no_interval_an_answer_goes_out_at_once(run: Callable[..., Program], kimi: StandIn) -> None:
    kimi.answer = "word " * 400
    program = run(STREAM_INTERVAL_MS="0")
    _, body = program.chat(stream=True)
    assert streamed(events(body)) == kimi.answer and len(events(body)) == 4


def test_silence_is_filled_with_keep_alive_comments(run: Callable[..., Program], kimi: StandIn) -> None:
    kimi.always = at_the_gate
    program = run(SSE_KEEPALIVE="0.1")
    with program.open_chat(stream=True) as link:
        head = link.recv(65536)
        assert b" 200 OK" in head and b"text/event-stream" in head
        body = head
        while body.count(b": keep-alive\n\n") < 3:
            body += link.recv(65536)
        kimi.gate.set()
        body += read_all(link)
    assert b"data: [DONE]" in body and b"Hello" in body


def test_an_error_after_the_first_byte_is_an_event_and_the_stream_ends_without_done(run: Callable[..., Program], kimi: StandIn) -> None:
    def late_failure(handler: Handler) -> None:
        handler.server.gate.wait(PATIENCE)
        handler.reply(500, b"")

    kimi.always = late_failure
    program = run(SSE_KEEPALIVE="0.1", MAX_RETRIES="0")
    with program.open_chat(stream=True) as link:
        body = link.recv(65536)
        assert b" 200 OK" in body
        kimi.gate.set()
        body += read_all(link)
    assert events(body)[-1]["error"]["code"] == "upstream_unavailable"
    assert b"[DONE]" not in body and body.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
def test_a_client_that_leaves_in_silence_is_noticed_and_its_turn_is_recorded(run: Callable[..., Program], kimi: StandIn, stream: bool) -> None:
    kimi.always = at_the_gate
    program = run(MAX_CONCURRENT_CHATS="1")
    with program.open_chat("leaving", stream=stream, user="ada"):
        wait_for(lambda: kimi.posts)
        assert program.health()["chats"]["running"] == 1
        status, body = program.chat("too many")
        assert status == 429 and json.loads(body)["error"]["code"] == "server_busy"
    wait_for(lambda: program.health()["chats"]["running"] == 0, "the slot is free again")
    kimi.gate.set()
    wait_for(lambda: program.ask("GET", "/v1/sessions/ada")[0] == 200, "the turn is recorded")
    assert b"leaving" in program.ask("GET", "/v1/sessions/ada")[1]
    kimi.always = answer
    assert program.chat()[0] == 200


def test_a_client_that_leaves_during_the_replay_frees_its_slot(run: Callable[..., Program], kimi: StandIn) -> None:
    kimi.answer = "word " * 4000
    program = run(MAX_CONCURRENT_CHATS="1", STREAM_INTERVAL_MS="100", STREAM_MAX_SECONDS="600")
    with program.open_chat(stream=True) as link:
        assert link.recv(100)
        assert program.health()["chats"]["running"] == 1
    wait_for(lambda: program.health()["chats"]["running"] == 0)
    assert not [line for line in program.log if "Traceback" in line]


def test_chats_whose_clients_left_are_bounded_too(run: Callable[..., Program], kimi: StandIn) -> None:
    kimi.always = at_the_gate
    program = run(MAX_CONCURRENT_CHATS="2")
    for count in (1, 2, 3, 4):
        with program.open_chat():
            wait_for(lambda count=count: len(kimi.posts) == count)
        wait_for(lambda: program.health()["chats"]["running"] == 0)
    assert program.chat()[0] == 429 and len(kimi.posts) == 4
    kimi.gate.set()
    wait_for(lambda: program.chat()[0] == 200)


# ======================================================================================================================
# 5 Parameters, tools and JSON for the web chat, which has none of them
# ======================================================================================================================


def tool(name: str, description: str = "", **properties: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": description, "parameters": {
        "type": "object", "properties": properties, "required": list(properties)[:1]}}}


WEATHER = tool("get_weather", "Weather of\n a city", city={"type": "string"}, unit={"type": "string", "enum": ["C", "F"]})
CLOCK = tool("clock")


def called(response: Any) -> list[tuple[str, Any]]:
    """The calls of an answer; a stream's and a JSON answer's must agree in shape."""
    assert response.status_int == 200, response.text
    choice = response.json["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    for call in choice["message"]["tool_calls"]:
        assert set(call) == {"id", "type", "function"} and call["type"] == "function" and call["id"].startswith("call_")
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in choice["message"]["tool_calls"]]


@pytest.mark.parametrize(("request_", "content", "finish_reason"), [
    ({"stop": "STOP"}, "one two ", "stop"), ({"stop": ["zzz", "two", "STOP"]}, "one ", "stop"), ({"stop": []}, None, "stop"),
    ({"stop": ""}, None, "stop"), ({"max_tokens": 2}, "one two ", "length"), ({"max_completion_tokens": 1}, "one ", "length"),
    ({"max_tokens": 999}, None, "stop"), ({"stop": "one"}, "", "stop"), ({"stop": "three", "max_tokens": 1}, "one ", "length")])
def test_stop_and_max_tokens_cut_the_answer(app: Client, kimi: StandIn, request_: Any, content: str | None, finish_reason: str) -> None:
    kimi.answer = "one two STOP three"
    response = chat(app, **request_)
    assert said(response) == (kimi.answer if content is None else content)
    assert response.json["choices"][0]["finish_reason"] == finish_reason
    assert response.json["usage"]["completion_tokens"] <= request_.get("max_tokens", 999)
    chunks = events(chat(app, stream=True, **request_))
    assert streamed(chunks) == (kimi.answer if content is None else content)
    assert chunks[-2]["choices"][0]["finish_reason"] == finish_reason


def test_a_cut_never_splits_what_is_read_as_one() -> None:
    assert kimi2api.truncate("ae\u0301\u0301\u0301b", [], 1) == ("a", "length")
    assert kimi2api.truncate("月" * 10, [], 3) == ("月" * 5, "length")


@pytest.mark.parametrize(("field", "value"), [
    ("n", 2), ("logprobs", True), ("audio", {"voice": "x"}), ("modalities", ["text", "audio"]), ("tools[0].type", None),
    ("tool_choice.type", {"type": "allowed_tools", "allowed_tools": {}})])
def test_what_would_change_the_shape_of_the_answer_is_a_clear_400(app: Client, kimi: StandIn, field: str, value: Any) -> None:
    request = {"tools": [{"type": "custom", "custom": {}}]} if value is None else {field.partition(".")[0]: value}
    assert is_error(chat(app, **request), 400, "unsupported_value", "invalid_request_error", field)
    assert not kimi.posts


def test_what_cannot_be_honoured_is_ignored_and_safety_identifier_opens_no_session(app: Client, kimi: StandIn) -> None:
    ignored = {"temperature": 0, "top_p": 0.5, "seed": 7, "logit_bias": {"1": 2}, "presence_penalty": 1, "frequency_penalty": 1.5,
               "n": 1, "logprobs": False, "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "reasoning_effort": "low",
               "safety_identifier": "ada", "prompt_cache_key": "x", "modalities": ["text"], "tools": [], "response_format": {"type": "text"}}
    assert said(chat(app, **ignored)) and said(chat(app, **ignored))
    assert [post["message"] for post in kimi.posts] == ["Hello", "Hello"]


@pytest.mark.parametrize(("request_", "param"), [
    ({"stop": 5}, "stop"), ({"stop": ["a"] * 5}, "stop"), ({"stop": [1]}, "stop[0]"), ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"), ({"max_completion_tokens": "9"}, "max_completion_tokens"), ({"temperature": "hot"}, "temperature"),
    ({"tools": {}}, "tools"), ({"tools": [1]}, "tools[0]"), ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [CLOCK, {"type": "function", "function": {"name": 1}}]}, "tools[1].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
    ({"tool_choice": "maybe"}, "tool_choice"), ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice.function.name"),
    ({"tools": [CLOCK], "tool_choice": {"function": []}}, "tool_choice.function"), ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"), ({"n": 0}, "n"), ({"logit_bias": []}, "logit_bias"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]}, "messages[0].tool_calls[0].function.arguments"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": [1], "function": {"name": "f", "arguments": ""}}]}]}, "messages[0].tool_calls[0].id"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": 5}]}, "messages[0].tool_call_id")])
def test_wrong_types_of_parameters_name_the_field(app: Client, kimi: StandIn, request_: Any, param: str) -> None:
    assert is_error(chat(app, **request_), 400, None, "invalid_request_error", param) and not kimi.posts


@pytest.mark.parametrize(("text", "content", "calls"), [
    ('<tool_call>{"name": "get_weather", "arguments": {"city": "北京"}}</tool_call>', None, [("get_weather", {"city": "北京"})]),
    ('Let me look.\n<tool_call>\n{"name": "clock"}\n</tool_call>', "Let me look.", [("clock", {})]),
    ('<tool_call>{"name": "clock", "arguments": {}}</tool_call> and <tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"x\\"}"}'
     "</tool_call>", "and", [("clock", {}), ("get_weather", {"city": "x"})]),
    ('<tool_call>{"name": "get_weather", "arguments": {"city": "a </tool_call> b"}}</tool_call>', None, [("get_weather", {"city": "a </tool_call> b"})]),
    ('<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "x"}<|tool_call_end|>'
     "<|tool_call_begin|>functions.clock:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
     None, [("get_weather", {"city": "x"}), ("clock", {})]),
    ('{"name": "clock", "arguments": {}}', None, [("clock", {})]),
    ('<tool_call>\n```json\n{"name": "get_weather", "parameters": {"city": "x"}}\n```\n</tool_call>', None, [("get_weather", {"city": "x"})]),
    ('```json\n<tool_call>{"name": "clock"}</tool_call>\n```', None, [("clock", {})]),
    ('<tool_call>{"name":"get_weather","arguments":{"city":"\\ud800"}}</tool_call>', None, [("get_weather", {"city": "\ufffd"})]),
    ('```json\n{"name": "get_weather", "arguments": {"city": "x"}}\n```', None, [("get_weather", {"city": "x"})])])
def test_tool_calls_are_read_in_every_form_that_kimi_writes(app: Client, kimi: StandIn, text: str, content: str | None, calls: Any) -> None:
    kimi.answer = text
    response = chat(app, tools=[WEATHER, CLOCK])
    assert called(response) == calls and response.json["choices"][0]["message"]["content"] == content
    chunks = events(chat(app, tools=[WEATHER, CLOCK], stream=True))
    assert streamed([chunk for chunk in chunks if chunk == "[DONE]" or chunk["choices"][0]["delta"].get("content")]) == (content or "")
    deltas = [delta for chunk in chunks[:-1] for delta in chunk["choices"][0]["delta"].get("tool_calls", ())]
    for index, (name, arguments) in enumerate(calls):
        first, *rest = [delta for delta in deltas if delta["index"] == index]
        assert first["type"] == "function" and first["id"] and first["function"] == {"name": name, "arguments": ""}
        assert json.loads("".join(delta["function"]["arguments"] for delta in rest)) == arguments
    assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("text", [
    "Nothing to call.", '{"name": "other", "arguments": {}}', '{"name": "clock"}', 'Like {"name": "clock", "arguments": {}} say.', "[1]", "```\nx\n```",
    'For example:\n```json\n{"name": "clock", "arguments": {}}\n```'])
def test_an_answer_without_a_call_is_text_and_no_call_is_invented(app: Client, kimi: StandIn, text: str) -> None:
    kimi.answer = text
    response = chat(app, tools=[CLOCK])
    assert said(response) == text and "tool_calls" not in response.json["choices"][0]["message"] and len(kimi.posts) == 1


@pytest.mark.parametrize("text", [
    '<tool_call>{"name": "hammer", "arguments": {}}</tool_call>', '<tool_call>{"name": "clock", "arguments": {</tool_call>',
    "<tool_call>clock</tool_call>", '<tool_call>{"name": "clock", "arguments": [1]}</tool_call>', "<tool_call>", '<tool_call>{"name": ["clock"]}',
    '{"name": "clock", "arguments": 5}', "<tool_call>" + "[" * 100_000])
def test_a_call_that_cannot_be_made_is_asked_for_once_again_then_given_as_text(app: Client, kimi: StandIn, text: str) -> None:
    kimi.script.extend([says(text), says('<tool_call>{"name": "clock", "arguments": {}}</tool_call>')])
    assert called(chat(app, tools=[CLOCK])) == [("clock", {})]
    assert "could not be used" in kimi.posts[1]["message"] and kimi.posts[1]["message"].startswith(kimi.posts[0]["message"].split("\n\n")[0])
    kimi.posts.clear()
    kimi.always = says(text)
    response = chat(app, tools=[CLOCK])
    assert said(response) == text and response.json["choices"][0]["finish_reason"] == "stop" and len(kimi.posts) == 2


def test_the_prompt_tells_of_tools_in_few_words(app: Client, kimi: StandIn) -> None:
    nested = tool("plan", days={"type": "array", "items": {"type": "object", "properties": {"n": {"type": "integer"}}}}, x={"type": ["string", "null"]})
    referring = tool("ref", a={"$ref": "#/$defs/A"})
    chat(app, tools=[WEATHER, CLOCK, nested, referring])
    message = kimi.posts[0]["message"]
    assert '- get_weather{city: string, unit?: "C"|"F"}: Weather of a city\n- clock{}\n' in message
    assert "- plan{days: [{n?: integer}], x?: string|null}" in message and message.endswith("用户: Hello")
    assert '- ref{"type":"object","properties":{"a":{"$ref":"#/$defs/A"}}' in message and len(message) < 520


def test_tool_choice_and_parallel_tool_calls_are_obeyed(app: Client, kimi: StandIn) -> None:
    both = '<tool_call>{"name": "clock"}</tool_call><tool_call>{"name": "get_weather"}</tool_call>'
    kimi.answer = both
    assert said(chat(app, tools=[WEATHER, CLOCK], tool_choice="none")) == both and "clock" not in kimi.posts[-1]["message"]
    assert [name for name, _ in called(chat(app, tools=[WEATHER, CLOCK], parallel_tool_calls=False))] == ["clock"]
    assert "one tool" in kimi.posts[-1]["message"]
    kimi.script.append(says("I would rather not."))
    assert len(called(chat(app, tools=[WEATHER, CLOCK], tool_choice="required"))) == 2
    assert "must contain a tool call" in kimi.posts[-1]["message"]
    kimi.answer = '<tool_call>{"name": "clock"}</tool_call>'
    assert called(chat(app, tools=[WEATHER, CLOCK], tool_choice={"type": "function", "function": {"name": "clock"}}))
    assert "get_weather" not in kimi.posts[-1]["message"]


def test_tool_results_go_into_the_prompt_and_a_user_keeps_the_session(app: Client, kimi: StandIn) -> None:
    kimi.answer = '<tool_call>{"name": "get_weather", "arguments": {"city": "x"}}</tool_call>'
    call = chat(app, "How is it?", tools=[WEATHER], user="ada").json["choices"][0]["message"]["tool_calls"][0]
    kimi.answer = "Sunny."
    result = {"role": "tool", "tool_call_id": call["id"], "content": [{"type": "text", "text": "18 degrees"}]}
    assert said(chat(app, messages=[result], tools=[WEATHER], user="ada")) == "Sunny."
    expected = '用户: How is it?\n模型: <tool_call>{"name": "get_weather", "arguments": {"city": "x"}}</tool_call>\n工具 get_weather: 18 degrees'
    assert kimi.posts[-1]["message"].endswith(expected)
    resent = [{"role": "user", "content": "How is it?"}, {"role": "assistant", "content": None, "tool_calls": [call]}, result]
    assert said(chat(app, messages=resent, tools=[WEATHER])) == "Sunny."
    assert kimi.posts[-1]["message"].endswith(expected)
    [turn] = app.get("/v1/sessions/ada").json["turns"]
    assert [message["role"] for message in turn] == ["user", "assistant", "tool", "assistant"], "a result stays with its call"


SCHEMA = {"type": "json_schema", "json_schema": {"name": "r", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}}


@pytest.mark.parametrize("format_", [{"type": "json_object"}, SCHEMA], ids=["object", "schema"])
@pytest.mark.parametrize("text", [
    '{"a": 1}', '<think>{} or {"a":0}?</think> {"a": 1}', '```\nnothing\n```\n```json\n{"a": 1}\n```', 'See [1] and {x}: {"a": 1}',
    '```json\n{"a": 1}\n```', 'Sure! Here it is:\n\n{"a": 1}\n\nAnything else?', '```\n{"a": 1}```', 'So {not json} but {"a": 1}.'])
def test_a_json_answer_is_exactly_one_document(app: Client, kimi: StandIn, format_: Any, text: str) -> None:
    kimi.answer = text
    assert said(chat(app, response_format=format_)) == '{"a": 1}'
    assert streamed(events(chat(app, response_format=format_, stream=True))) == '{"a": 1}'
    assert ('{"type":"object"' in kimi.posts[0]["message"]) == (format_ is SCHEMA) and "JSON" in kimi.posts[0]["message"]


def test_an_answer_that_is_not_json_is_asked_for_once_again_then_502(app: Client, kimi: StandIn) -> None:
    kimi.script.extend([says('{"a": '), says('{"a": 2}')])
    assert said(chat(app, response_format={"type": "json_object"})) == '{"a": 2}'
    assert "could not be used" in kimi.posts[-1]["message"]
    for text in ("no", '{"a": NaN}', "[1]", '{"items":[{"a":1},{"a":2},]}', '{"r":{"x":1},"b":"', "{'a': {\"b\":1}}", '[{"a":1},{"a":2}]', "{" * 5000, '{"a":' * 100_000):
        kimi.answer = text
        response = chat(app, response_format={"type": "json_object"})
        assert is_error(response, 502, "invalid_json_answer", "upstream_error") and response.headers["x-should-retry"] == "false"
    array = {"type": "json_schema", "json_schema": {"schema": {"type": "array"}}}
    kimi.answer = "Here: [1, 2]"
    assert said(chat(app, response_format=array)) == "[1, 2]"
    kimi.answer = '{"code": "```py\\n{}\\n```"}'
    for text in (kimi.answer, f"Sure:\n```json\n{kimi.answer}\n```"):
        document, kimi.answer = kimi.answer, text
        assert said(chat(app, response_format={"type": "json_object"})) == document
    for root, text in (({}, '"a"'), ({"anyOf": [{"type": "array"}]}, "[1]"), ({"type": ["array"]}, "[1]"), ({"type": "string"}, '"a"')):
        kimi.answer = text
        assert said(chat(app, response_format={"type": "json_schema", "json_schema": {"schema": root}})) == text


def test_a_mistake_of_ours_is_no_failure_of_upstream_and_tells_nobody_of_the_prompt(
        make: Callable[..., Client], kimi: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    app = make()
    with monkeypatch.context() as patch:
        patch.setattr(kimi2api.KimiProvider, "_post", lambda self, prompt, chat: {}[prompt])
        for _ in range(7):
            assert is_error(chat(app, "my prompt"), 500, "internal_error", "server_error")
    assert app.get("/health").json["status"] == "ok"
    assert said(chat(app))


def test_a_nonce_in_upstreams_words_is_hidden(app: Client, kimi: StandIn) -> None:
    kimi.always = sends(200, f'{{"success": false, "data": "bad nonce {kimi.nonce}"}}')
    assert kimi.nonce not in chat(app).text


@pytest.mark.parametrize("required", [True, 5, "a", None])
def test_schemas_of_older_drafts_are_no_crash(app: Client, required: Any) -> None:
    parameters = {"properties": {"a": {"type": "string"}}, "required": required}
    assert said(chat(app, tools=[{"type": "function", "function": {"name": "f", "parameters": parameters}}]))


@pytest.mark.parametrize("depth", [100, 330, 400])
def test_schemas_that_are_nested_deep_are_no_crash(make: Callable[..., Client], depth: int) -> None:
    deep: Any = {"type": "string"}
    for _ in range(depth):
        deep = {"type": "object", "properties": {"a": deep}}
    response = chat(make(CONTEXT_MAX_LENGTH="999999"), tools=[{"type": "function", "function": {"name": "f", "parameters": deep}}])
    assert response.status_int == 200 if depth == 100 else response.status_int in (200, 400), response.text


# ======================================================================================================================
# 7 Documentation
# ======================================================================================================================


def test_every_route_is_described_and_every_description_is_a_route(app: Client) -> None:
    described = {(method.upper(), re.sub(r"\{\w+\}", "{}", path)) for path, methods in app.get("/openapi.json").json["paths"].items() for method in methods}
    routes = {(route.method, re.sub(r"<[^>]+>", "{}", route.rule)) for route in app.app.routes}
    assert described == routes


def test_real_answers_are_valid_by_the_description(make: Callable[..., Client], kimi: StandIn) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    app = make(API_MASTER_KEY="sk-1", MAX_RETRIES="0")
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

    chats = [{"user": "ada"}, {"model": "gpt-5"}, {"messages": []}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}},
             {"tools": [CLOCK]}, {"n": 2}]
    for request in chats:
        kimi.answer = '<tool_call>{"name": "clock"}</tool_call>' if "tools" in request else "Hello."
        response = chat(app, headers=key, **request)
        described("/v1/chat/completions", "post", response)
        if request.get("stream"):
            for chunk in events(response)[:-1]:
                valid(chunk, "Chunk")
    described("/v1/chat/completions", "post", chat(app))
    for path, template, method in (
            ("/v1/models", "", "get"), ("/v1/models/kimi", "/v1/models/{id}", "get"), ("/v1/models/x", "/v1/models/{id}", "get"),
            ("/v1/sessions/ada", "/v1/sessions/{user}", "get"), ("/v1/sessions/ada", "/v1/sessions/{user}", "delete"),
            ("/v1/sessions/ada", "/v1/sessions/{user}", "get"), ("/health", "", "get"), ("/openapi.json", "", "get"), ("/docs", "", "get"), ("/", "", "get")):
        described(template or path, method, app.request(path, method=method.upper(), headers=key))
    kimi.always = sends(500)
    described("/v1/chat/completions", "post", chat(app, headers=key))
    described("/health", "get", app.get("/health"))


def test_the_page_needs_no_key_and_nothing_from_elsewhere(make: Callable[..., Client]) -> None:
    app = make(API_MASTER_KEY="sk-1")
    for path in ("/", "/docs"):
        response = app.get(path)
        assert response.content_type == "text/html" and "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", response.text) and "innerHTML" not in response.text
    assert app.get("/health").json["key_required"] and app.get("/openapi.json").json["openapi"] == "3.1.0"


# ======================================================================================================================
# 8 App: keys, browsers, limits, other routes
# ======================================================================================================================


def test_models_are_listed_and_their_creation_is_stable(make: Callable[..., Client]) -> None:
    app = make()
    listed = app.get("/v1/models").json
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["kimi", "kimi-k2-instruct-0905", "kimi-k2-instruct"]
    for model in listed["data"]:
        assert set(model) == {"id", "object", "created", "owned_by"} and model["object"] == "model"
        assert app.get(f"/v1/models/{model['id']}").json == model
    assert make().get("/v1/models").json == listed


def test_a_star_accepts_any_model_and_the_answer_names_the_one_asked_for(make: Callable[..., Client], kimi: StandIn) -> None:
    app = make(MODELS="kimi=a/b,*=c/d", DEFAULT_MODEL="whatever")
    assert chat(app, model="gpt-4o").json["model"] == "gpt-4o"
    assert chat(app).json["model"] == "whatever"
    assert [post["model"] for post in kimi.posts] == ["c/d", "c/d"]
    assert [model["id"] for model in app.get("/v1/models").json["data"]] == ["kimi"]


def test_a_key_is_asked_for_everything_but_health(make: Callable[..., Client], kimi: StandIn) -> None:
    app = make(API_MASTER_KEY="sk-one, sk-two")
    for header in (None, "Bearer wrong", "Bearer", "Basic sk-one", "sk-one", "Bearer sk-one,sk-two", "Bearer schl\xfcssel"):
        headers = {"Authorization": header} if header else {}
        response = chat(app, headers=headers)
        assert is_error(response, 401, "invalid_api_key", "invalid_request_error")
        assert response.headers["WWW-Authenticate"] == "Bearer"
        for path in ("/v1/models", "/v1/models/kimi", "/v1/sessions/ada", "/nowhere"):
            assert is_error(app.get(path, headers=headers), 401, "invalid_api_key")
    assert not kimi.posts
    assert app.get("/health").json["status"] == "ok"
    for header in ("Bearer sk-one", "bearer sk-two", "Bearer  sk-two "):
        assert said(chat(app, headers={"Authorization": header}))


@pytest.mark.parametrize(("host", "admitted"), [
    ("localhost:8088", True), ("127.0.0.1", True), ("[::1]:8088", True), ("127.1.2.3:80", True), ("app.localhost", True),
    ("LOCALHOST.", True), ("evil.com", False), ("localhost.evil.com", False), ("127.0.0.1.evil.com", False),
    ("192.168.1.5:8088", False), ("0.0.0.0:8088", False), ("[", False), ("localhost, evil.com", False)])
def test_without_a_key_a_host_that_is_not_this_machine_is_refused(make: Callable[..., Client], host: str, admitted: bool) -> None:
    keyless, keyed = make(), make(API_MASTER_KEY="sk-1")
    for method in ("GET", "OPTIONS"):
        response = keyless.request("/v1/models", method=method, headers={"Host": host})
        assert (response.status_int < 400) == admitted or is_error(response, 403, "host_not_allowed")
    assert keyed.get("/v1/models", headers={"Host": host, "Authorization": "Bearer sk-1"}).status_int == 200


@pytest.mark.parametrize(("origin", "admitted"), [
    ("http://localhost:3000", True), ("http://127.0.0.1:5173", True), ("https://[::1]", True), ("https://evil.com", False),
    ("null", False), ("http://localhost.evil.com", False), ("http://evil.com:8088", False), ("http://[", False), ("file://", False)])
def test_without_a_key_a_foreign_page_is_refused_preflight_or_not(make: Callable[..., Client], kimi: StandIn,
                                                                  origin: str, admitted: bool) -> None:
    app = make()
    for response in (chat(app, headers={"Origin": origin}), app.options("/v1/chat/completions", headers={"Origin": origin})):
        assert (response.status_int < 400) == admitted or is_error(response, 403, "origin_not_allowed")
        assert response.headers.get("Access-Control-Allow-Origin") == (origin if admitted else None)
    assert len(kimi.posts) == admitted


def test_with_a_key_any_page_may_call_unless_origins_are_listed(make: Callable[..., Client]) -> None:
    key = {"Authorization": "Bearer sk-1"}
    anyone, listed = make(API_MASTER_KEY="sk-1"), make(API_MASTER_KEY="sk-1", CORS_ORIGINS="https://mine.example, https://b")
    response = chat(anyone, headers={**key, "Origin": "https://evil.com"})
    assert said(response) and response.headers["Access-Control-Allow-Origin"] == "https://evil.com"
    assert response.headers["Vary"] == "Origin" and "X-Request-Id" in response.headers["Access-Control-Expose-Headers"]
    assert said(chat(listed, headers={**key, "Origin": "https://mine.example"}))
    assert is_error(chat(listed, headers={**key, "Origin": "https://evil.com"}), 403, "origin_not_allowed")
    assert said(chat(listed, headers={**key, "Origin": "http://localhost:80"})), "a page of the server itself"


def test_a_preflight_needs_no_key_and_echoes_the_headers_asked_for(make: Callable[..., Client]) -> None:
    app = make(API_MASTER_KEY="sk-1")
    asked = "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,x-stainless-retry-count"
    for path in ("/v1/chat/completions", "/v1/models", "/nowhere"):
        response = app.options(path, headers={
            "Origin": "https://app.example", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": asked,
            "Access-Control-Request-Private-Network": "true"})
        assert response.status_int == 204
        assert response.headers["Access-Control-Allow-Headers"] == asked
        assert response.headers["Access-Control-Allow-Private-Network"] == "true"
        assert {"POST", "GET", "DELETE"} <= set(response.headers["Access-Control-Allow-Methods"].split(", "))


def test_every_response_has_a_request_id_and_a_sane_one_is_kept(app: Client) -> None:
    assert app.get("/v1/models", headers={"X-Request-Id": "trace-1.2_3"}).headers["X-Request-Id"] == "trace-1.2_3"
    for response in (app.get("/health"), app.get("/nowhere"), app.put("/health"), chat(app, stream=True), chat(app, model="x"),
                     app.get("/health", headers={"X-Request-Id": "x" * 200}), app.get("/health", headers={"X-Request-Id": "a b"})):
        assert re.fullmatch(r"req_[0-9a-f]{32}", response.headers["X-Request-Id"])


def test_a_chat_too_many_is_429_at_once_and_the_rest_is_still_answered(run: Callable[..., Program], kimi: StandIn) -> None:
    kimi.always = at_the_gate
    program = run(MAX_CONCURRENT_CHATS="3")
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
    for link in links:
        response = http.client.HTTPResponse(link)
        response.begin()
        assert b"Hello" in response.read()
    wait_for(lambda: program.chat()[0] == 200)


def test_200_chats_at_once(run: Callable[..., Program], kimi: StandIn) -> None:
    kimi.always = at_the_gate
    program = run(MAX_CONCURRENT_CHATS="256")
    links = [program.open_chat(f"chat {number}", stream=True) for number in range(200)]
    wait_for(lambda: len(kimi.posts) == 200, "all 200 reach upstream at the same time")
    kimi.gate.set()
    assert all(b"data: [DONE]" in read_all(link) for link in links)
    assert {post["message"] for post in kimi.posts} == {f"chat {number}" for number in range(200)}
    wait_for(lambda: program.health()["chats"]["running"] == 0)


# ======================================================================================================================
# Bad input: no request of any shape is a 500, a hang or a broken connection
# ======================================================================================================================


def test_json_of_any_shape_is_answered_or_refused_in_openais_shape(app: Client, kimi: StandIn) -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    document = pytest.importorskip("json") and app.get("/openapi.json").json
    scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
    anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=6)
    names = sorted(document["components"]["schemas"]["Request"]["properties"])
    message = st.fixed_dictionaries({"role": st.sampled_from([*kimi2api.ROLES, "boss"]), "content": st.text(max_size=9) | anything},
                                    optional={"tool_calls": anything, "tool_call_id": anything, "name": anything})
    function = st.fixed_dictionaries({"type": st.just("function"), "function": st.fixed_dictionaries(
        {"name": st.text(max_size=5)}, optional={"description": anything, "parameters": anything})})
    request = st.fixed_dictionaries({"messages": st.lists(message, max_size=3) | anything}, optional={
        **{name: anything for name in names if name != "messages"}, "stream": st.booleans(), "tools": st.lists(function | anything, max_size=2),
        "response_format": st.sampled_from([{"type": "json_object"}]) | anything, "zzz": anything})
    tried = 0

    @hypothesis.settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(request | anything)
    def holds(body: Any) -> None:
        nonlocal tried
        tried += 1
        response = app.post("/v1/chat/completions", json.dumps(body).encode(), content_type="application/json")
        assert response.status_int in (200, 400, 404, 502), response.text
        if response.status_int != 200:
            assert is_error(response, response.status_int, response.json["error"]["code"])
            assert response.status_int != 502 or response.json["error"]["code"] == "invalid_json_answer", response.text

    holds()
    assert tried >= 400


def test_paths_and_headers_of_any_bytes_are_answered_in_openais_shape(run: Callable[..., Program]) -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    program = run()

    @hypothesis.settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(st.sampled_from([b"GET", b"POST", b"DELETE", b"OPTIONS", b"HEAD", b"BREW"]), st.binary(max_size=30), st.binary(max_size=30),
                      st.sampled_from([b"Host", b"Origin", b"Authorization", b"X-Request-Id", b"Content-Type", b"Accept"]), st.booleans())
    def holds(method: bytes, path: bytes, value: bytes, name: bytes, escaped: bool) -> None:
        path = b"".join(b"%%%02x" % byte for byte in path) if escaped else re.sub(rb"[\x00-\x20]", b"", path)
        value = re.sub(rb"[\x00-\x1f\x7f]", b"", value)
        with socket.create_connection((program.host, program.port), timeout=PATIENCE) as link:
            link.sendall(method + b" /v1/" + path + b" HTTP/1.1\r\n" + name + b": " + value + b"\r\nConnection: close\r\n\r\n")
            response = http.client.HTTPResponse(link, method=method.decode())
            response.begin()
            body = response.read()
        assert response.status in (200, 204, 400, 401, 403, 404, 405), (response.status, body)
        assert response.headers["X-Request-Id"]
        if response.status >= 400 and method != b"HEAD":
            assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}

    holds()
    assert program.chat()[0] == 200 and not [line for line in program.log if "Traceback" in line]


def test_a_thousand_idle_connections_and_half_sent_bodies_hold_nobody_up(run: Callable[..., Program]) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip("needs 4096 descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    program = run()
    links = [socket.create_connection((program.host, program.port), timeout=PATIENCE) for _ in range(1000)]
    for number, link in enumerate(links[:300]):
        link.sendall((b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{", b"POST /v1", b"\r\n")[number % 3])
    began = time.monotonic()
    program.health()
    assert time.monotonic() - began < PATIENCE / 4
    assert program.chat()[0] == 200
    for link in links:
        link.close()
    assert program.chat()[0] == 200


def test_a_body_shorter_than_its_length_and_pipelined_requests(run: Callable[..., Program], kimi: StandIn) -> None:
    program = run()
    with socket.create_connection((program.host, program.port), timeout=PATIENCE) as link:
        link.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{}")
        link.shutdown(socket.SHUT_WR)
        assert link.recv(1) == b""
    with socket.create_connection((program.host, program.port), timeout=PATIENCE) as link:
        link.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5)
        body = b""
        while body.count(b"HTTP/1.1 200 OK") < 5:
            body += link.recv(65536)
    assert not kimi.posts


def test_a_client_that_stops_reading_frees_its_slot(run: Callable[..., Program], kimi: StandIn) -> None:
    kimi.answer = "word " * 600_000  # 3 MB: more than the system takes for a client that does not read
    program = run(MAX_CONCURRENT_CHATS="1", STREAM_INTERVAL_MS="0")
    before = program.memory()
    links = []
    for stream in (True, False, True, True):
        links.append(program.open_chat(stream=stream))
        wait_for(lambda: len(kimi.posts) == len(links))
        wait_for(lambda: program.health()["chats"]["running"] == 0)
    assert program.memory() - before < 120
    assert b"word" in program.chat()[1]


def test_a_hard_kill_and_restart_cost_a_retrying_client_only_time(run: Callable[..., Program], kimi: StandIn) -> None:
    openai = pytest.importorskip("openai")
    kimi.script.append(at_the_gate)
    program = run()
    client = openai.OpenAI(base_url=program.base_url, api_key="none", max_retries=8)
    with ThreadPoolExecutor(1) as pool:
        answered = pool.submit(client.chat.completions.create, model="kimi", messages=[{"role": "user", "content": "x"}])
        wait_for(lambda: kimi.posts)
        program.process.kill()
        program.wait()
        run("--api-port", str(program.port))
        assert answered.result(PATIENCE * 2).choices[0].message.content == kimi.answer


# ======================================================================================================================
# 10 Server: HTTP, signals
# ======================================================================================================================


@pytest.mark.parametrize(("request_bytes", "status"), [
    (b"nonsense\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nbad header\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nX: " + b"y" * 300_000 + b"\r\n\r\n", 431),
    (b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n", 413),
    (b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n", 400),
    (b"GET http://[/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 400), (b"GET /v1/sessions/ada%ff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    (b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", 501)])
def test_what_is_not_proper_http_is_refused_in_openais_shape(run: Callable[..., Program], request_bytes: bytes, status: int) -> None:
    program = run()
    with socket.create_connection((program.host, program.port), timeout=PATIENCE) as link:
        link.sendall(request_bytes)
        response = http.client.HTTPResponse(link)
        response.begin()
        body = json.loads(response.read())
    assert response.status == status and set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["X-Request-Id"] and response.headers["Content-Type"] == "application/json"


def test_a_client_that_sends_too_much_reads_the_413(run: Callable[..., Program]) -> None:
    program = run(MAX_BODY_BYTES="1000")
    for size in (1001, 100_000, 8_000_000):
        status, body = program.ask("POST", "/v1/chat/completions", b"x" * size)
        assert status == 413 and json.loads(body)["error"]["code"] == "request_too_large"


def test_chunked_requests_work(run: Callable[..., Program]) -> None:
    connection = run().connect()
    connection.request("POST", "/v1/chat/completions", iter([b'{"messages": [{"role":', b' "user", "content": "x"}]}']),
                       encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
    assert connection.getresponse().status == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_chats_finish_and_their_bytes_are_sent(run: Callable[..., Program], kimi: StandIn, number: int) -> None:
    kimi.always = at_the_gate
    kimi.answer = "word " * 200_000  # more than the system buffers for a client that does not read yet
    program = run(STREAM_INTERVAL_MS="0")
    links = [program.open_chat(stream=stream) for stream in (False, True, True)]
    wait_for(lambda: len(kimi.posts) == 3)
    idle = socket.create_connection((program.host, program.port), timeout=PATIENCE)
    program.signal(number)
    assert idle.recv(1) == b"", "an idle connection is closed"
    with pytest.raises(OSError):
        socket.create_connection((program.host, program.port), timeout=PATIENCE).recv(1)
        raise ConnectionRefusedError  # accepted by the system just before the socket was closed, then dropped
    kimi.gate.set()
    bodies = [read_all(link) for link in links]
    assert bodies[0].count(b"word ") == 200_000 and b"Connection: close" in bodies[0]
    assert all(body.count(b"word ") == 200_000 and b"data: [DONE]" in body for body in bodies[1:])
    assert program.wait() == 0


def test_a_busy_connection_cannot_hold_up_a_stop(run: Callable[..., Program]) -> None:
    program = run()
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


def test_when_grace_is_over_streams_get_an_error_event_and_the_exit_is_prompt(run: Callable[..., Program], kimi: StandIn) -> None:
    kimi.always = at_the_gate
    program = run(SHUTDOWN_GRACE="0.2", SSE_KEEPALIVE="0.1")
    stream, plain = program.open_chat(stream=True), program.open_chat()
    wait_for(lambda: len(kimi.posts) == 2)
    assert stream.recv(65536)
    program.signal(signal.SIGTERM)
    body = read_all(stream)
    assert events(body)[-1]["error"]["code"] == "server_stopping" and b"[DONE]" not in body
    assert b" 503 " in read_all(plain)
    assert program.wait() == 0


def test_a_second_signal_ends_at_once(run: Callable[..., Program], kimi: StandIn) -> None:
    kimi.always = at_the_gate
    program = run(SHUTDOWN_GRACE="600")
    with program.open_chat():
        wait_for(lambda: kimi.posts)
        program.signal(signal.SIGTERM)
        wait_for(lambda: any("stopping" in line for line in program.log))
        program.signal(signal.SIGTERM)
        assert program.wait() == 128 + signal.SIGTERM


# ======================================================================================================================
# Real clients
# ======================================================================================================================


@pytest.fixture
def client(run: Callable[..., Program]) -> Any:
    openai = pytest.importorskip("openai")
    program = run(API_MASTER_KEY="sk-test", REQUEST_TIMEOUT="1", MAX_CONCURRENT_CHATS="2", CONTEXT_MAX_LENGTH="50",
                  MAX_BODY_BYTES="5000")
    return openai.OpenAI(base_url=program.base_url, api_key="sk-test", max_retries=0)


HELLO = [{"role": "user", "content": "Hello"}]


def test_openai_python_chats_streams_and_lists_models(client: Any, kimi: StandIn) -> None:
    kimi.answer = "你好，世界！ Hello, world!"
    completion = client.chat.completions.create(model="kimi", messages=HELLO, user="ada")
    assert completion.choices[0].message.content == kimi.answer and completion.usage.total_tokens > 0
    stream = list(client.chat.completions.create(model="kimi", messages=HELLO, stream=True,
                                                 stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == kimi.answer
    assert stream[-1].usage.total_tokens > 0
    assert next(model.id for model in client.models.list()) == "kimi"
    assert client.models.retrieve("kimi").id == "kimi"


def test_openai_python_raises_its_own_exception_for_each_error(client: Any, kimi: StandIn) -> None:
    import openai

    def fails(expected: type[Exception], code: str | None, **request: Any) -> Any:
        with pytest.raises(expected) as raised:
            client.chat.completions.create(**{"model": "kimi", "messages": HELLO, **request})
        assert raised.value.code == code, raised.value
        return raised.value

    fails(openai.BadRequestError, None, messages=[])
    fails(openai.BadRequestError, "context_length_exceeded", messages=[{"role": "user", "content": "x" * 99}])
    fails(openai.NotFoundError, "model_not_found", model="gpt-5")
    assert fails(openai.APIStatusError, "request_too_large", messages=[{"role": "user", "content": "x" * 9999}]).status_code == 413
    for fault, status, code in ((sends(500), 502, "upstream_unavailable"), (sends(200, "?"), 502, "upstream_invalid_response"),
                                (sends(403, JUST_A_MOMENT), 503, "upstream_blocked"), (sends(403, "-1"), 502, "upstream_refused"),
                                (lambda handler: handler.server.gate.wait(PATIENCE), 504, "upstream_timeout")):
        kimi.always = fault
        for stream in (False, True):
            error = fails(openai.InternalServerError, code, stream=stream)
            assert error.status_code == status and error.request_id
        kimi.always = answer
        client.chat.completions.create(model="kimi", messages=HELLO)  # else the program would stop asking for a while
    kimi.always = sends(429, "", Retry_After="60")
    assert fails(openai.RateLimitError, "upstream_rate_limited").response.headers["Retry-After"] == "60"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-wrong").models.list()


def test_openai_python_obeys_x_should_retry_and_retries_the_rest(client: Any, kimi: StandIn) -> None:
    import openai
    patient = client.with_options(max_retries=1)
    kimi.always = sends(500)
    with pytest.raises(openai.InternalServerError):
        patient.chat.completions.create(model="kimi", messages=HELLO)
    assert len(kimi.posts) == 2, "the program's own retry only"
    kimi.posts.clear()
    kimi.always = answer
    kimi.script.append(sends(429))
    assert patient.chat.completions.create(model="kimi", messages=HELLO)
    assert len(kimi.posts) == 2


def test_openai_python_sees_an_error_in_the_middle_of_a_stream(kimi: StandIn, run: Callable[..., Program]) -> None:
    openai = pytest.importorskip("openai")
    program = run(SSE_KEEPALIVE="0.1", MAX_RETRIES="0", REQUEST_TIMEOUT="0.5")
    kimi.always = at_the_gate
    client = openai.OpenAI(base_url=program.base_url, api_key="none", max_retries=0)
    with pytest.raises(openai.APIError) as raised:
        list(client.chat.completions.create(model="kimi", messages=HELLO, stream=True))
    assert raised.value.code == "upstream_timeout"


def plays_travel_agent(handler: Handler) -> None:
    """A model that looks two things up, one after the other, and then answers."""
    message = handler.form["message"]
    if "工具 book" in message:
        says("Booked Paris: 21 degrees, order 7.")(handler)
    elif "工具 get_weather" in message:
        says('Nice.\n<tool_call>{"name": "book", "arguments": {"city": "Paris"}}</tool_call>')(handler)
    else:
        says('<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>')(handler)


def test_openai_python_calls_tools_and_parses_into_a_model(run: Callable[..., Program], kimi: StandIn) -> None:
    openai, pydantic = pytest.importorskip("openai"), pytest.importorskip("pydantic")
    client = openai.OpenAI(base_url=run().base_url, api_key="none", max_retries=0)
    City = pydantic.create_model("City", name=(str, ...), people=(int, ...))
    kimi.answer = 'Of course:\n```json\n{"name": "Paris", "people": 2100000}\n```'
    parsed = client.chat.completions.parse(model="kimi", messages=HELLO, response_format=City).choices[0].message.parsed
    assert parsed == City(name="Paris", people=2100000)
    kimi.always = plays_travel_agent
    with client.chat.completions.stream(model="kimi", messages=HELLO, tools=[WEATHER]) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.done" in kinds
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Paris"}


@pytest.mark.parametrize("streaming", [False, True])
def test_langchain_runs_an_agent_loop_of_several_steps(run: Callable[..., Program], kimi: StandIn, streaming: bool) -> None:
    langchain = pytest.importorskip("langchain_openai")
    from langchain_core.messages import HumanMessage, ToolMessage
    kimi.always = plays_travel_agent
    model = langchain.ChatOpenAI(base_url=run().base_url, api_key="none", model="kimi", max_retries=0, streaming=streaming,
                                 stream_usage=True, temperature=0).bind_tools([WEATHER, tool("book", "Book", city={"type": "string"})])
    messages: list[Any] = [HumanMessage("Find out how Paris is and book it.")]
    used = []
    for _ in range(5):
        messages.append(model.invoke(messages))
        if not messages[-1].tool_calls:
            break
        for call in messages[-1].tool_calls:
            used.append((call["name"], call["args"]))
            messages.append(ToolMessage({"get_weather": "21 degrees", "book": "order 7"}[call["name"]], tool_call_id=call["id"]))
    assert used == [("get_weather", {"city": "Paris"}), ("book", {"city": "Paris"})]
    assert messages[-1].content == "Booked Paris: 21 degrees, order 7." and messages[-1].usage_metadata["total_tokens"] > 0


def node(script: str, *arguments: str, needs: str) -> Any:
    """Run .ci/SCRIPT with the packages that .ci/run has installed beside it; what it printed as JSON."""
    if not (HERE / ".ci" / "node_modules" / needs).exists():
        pytest.skip(f"needs npm's {needs}, which .ci/run installs")
    done = subprocess.run(["node", str(HERE / ".ci" / script), *arguments], capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_page_works_in_a_browser_on_a_phone_in_the_dark(run: Callable[..., Program], kimi: StandIn) -> None:
    if not Path("/usr/bin/chromium").exists():
        pytest.skip("needs Debian's chromium, which .ci/run installs")
    program = run(API_MASTER_KEY="sk-1")
    result = node("page.mjs", f"http://127.0.0.1:{program.port}", "sk-1", needs="playwright-core")
    assert result == {"problems": [], "elsewhere": [], "wide": False, "asked": "Hello <b>browser</b>", "described": 1, "dark": True,
                      "connect": True}
    assert kimi.posts[-1]["message"] == "Hello <b>browser</b>"


@pytest.mark.parametrize("client_name", ["openai", "ai"])
def test_clients_of_node_chat_stream_and_call_tools(run: Callable[..., Program], kimi: StandIn, client_name: str) -> None:
    kimi.always = plays_travel_agent
    program = run(API_MASTER_KEY="sk-1")
    result = node("clients.mjs", client_name, program.base_url, "sk-1", needs=client_name)
    assert result == {"calls": ["get_weather", "book"], "text": "Booked Paris: 21 degrees, order 7.", "status": 401}


# ======================================================================================================================
# Soak: pytest -m soak -s (SOAK_SECONDS, ten minutes unless told)
# ======================================================================================================================


@pytest.mark.soak
def test_soak(run: Callable[..., Program], kimi: StandIn) -> None:
    seconds = float(os.environ.get("SOAK_SECONDS", "600"))
    program = run(MAX_CONCURRENT_CHATS="16", MAX_SESSION_SIZE="50", STREAM_INTERVAL_MS="1", REQUEST_TIMEOUT="1", SSE_KEEPALIVE="0.2",
                  MAX_RETRIES="1", LOG_LEVEL="ERROR")
    kimi.posts, kimi.heads, kimi.pages = (deque(maxlen=9) for _ in range(3))  # type: ignore[assignment]
    faults = [row[1] for row in FAULTS if row[0] not in ("20 MB", "endless body", "silence") and "drip" not in row[0]]
    counts: dict[str, int] = {}
    lock, end = threading.Lock(), time.monotonic() + seconds

    def count(name: str) -> None:
        with lock:
            counts[name] = counts.get(name, 0) + 1

    def traffic(seed: int) -> None:
        choose = random.Random(seed)
        while time.monotonic() < end:
            kind = choose.random()
            body = {"stream": choose.random() < 0.5, **({"user": f"u{choose.randrange(200)}"} if choose.random() < 0.5 else {})}
            if kind < 0.15 and len(kimi.script) < 3:  # no more, or a pause would leave a queue of faults behind it
                kimi.script.append(choose.choice(faults))
                count("faults")
            if kind < 0.1:  # a client that leaves
                link = program.open_chat("Hello " * choose.randrange(1, 50), **body)
                time.sleep(choose.random() * 0.05)
                link.close()
                count("left")
            elif kind < 0.2:  # bad requests and other routes
                method, path = choose.choice([("GET", "/health"), ("GET", "/v1/sessions/u1"), ("DELETE", "/v1/sessions/u2"), ("GET", "/x"), ("POST", "/v1/chat/completions")])
                assert program.ask(method, path, b"{" if method == "POST" else None)[0] < 500
                count("other")
            else:
                status, answer_ = program.chat("Hello " * choose.randrange(1, 50), **body)
                if status == 200:
                    last = events(answer_)[-1] if body["stream"] else json.loads(answer_)
                    count("answered" if last == "[DONE]" or "choices" in last else "told to have failed" if "error" in last else "lost")
                else:
                    assert json.loads(answer_)["error"]["message"]
                    count(f"status {status}")

    def look() -> dict[str, float]:
        wait_for(lambda: program.health()["chats"]["running"] == 0)
        process = Path(f"/proc/{program.process.pid}")
        return {"memory": program.memory(), "threads": len(list((process / "task").iterdir())),
                "descriptors": len(list((process / "fd").iterdir())), "sessions": program.health()["sessions"]["kept"]}

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


# ======================================================================================================================
# Benchmark: pytest -m bench -s
#
# Every figure is a ratio to cloudscraper called straight, or a time with the limit that it should keep, measured in
# one run. The upstream, the straight loop and the load each run as a process: `python test_kimi2api.py ROLE …`.
# ======================================================================================================================


class FastUpstream:
    """The web chat for timing: no threads and no faults, so that it is never the bottleneck."""

    def __init__(self, delay: float, chars: int) -> None:
        self.delay = delay
        text = " ".join(f"word{number}" for number in range(chars))[:chars]
        self.page = self.http(b'<script>var kimi_ajax = {"nonce":"0123456789"};</script>')
        self.answer = self.http(json.dumps({"success": True, "data": {"message": text}}).encode())

    @staticmethod
    def http(body: bytes) -> bytes:
        return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if length := re.search(rb"content-length: *(\d+)", head, re.I):
                    await reader.readexactly(int(length[1]))
                    await asyncio.sleep(self.delay)
                writer.write(self.answer if length else self.page)
        writer.close()

    @classmethod
    async def main(cls, delay: str, chars: str) -> None:
        server = await asyncio.start_server(cls(float(delay), int(chars)).serve, "127.0.0.1", 0, backlog=4096)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()


def straight(port: str, at_once: str, total: str) -> None:
    """The same upstream calls with cloudscraper alone, from threads, no server."""
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
        times = sorted(pool.map(ask, range(int(total))))
    print(json.dumps({"rate": len(times) / (time.perf_counter() - began), "median": statistics.median(times)}))


async def load(port: str, at_once: str, total: str, stream: str) -> None:
    """Ask the program for chats, so many at once, over connections that are kept where the program keeps them."""
    body = json.dumps({"stream": stream == "stream", "messages": [{"role": "user", "content": "hello"}]}).encode()
    message = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    left, times, bad = int(total), [], 0

    async def worker() -> None:
        nonlocal left, bad
        link = None
        while left > 0:
            left -= 1
            began = time.perf_counter()
            reader, writer = link or await asyncio.open_connection("127.0.0.1", int(port))
            writer.write(message)
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: *(\d+)", head, re.I)
            data = await (reader.readexactly(int(length[1])) if length else reader.read())
            link = (reader, writer) if length else None
            times.append(time.perf_counter() - began)
            bad += b" 200 " not in head or (b"event-stream" in head and b"[DONE]" not in data)

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(int(at_once))))
    wall = time.perf_counter() - began
    print(json.dumps({"rate": len(times) / wall, "median": statistics.median(times), "wall": wall, "bad": bad}))


async def stream_of_times(chunks: str, pause: str) -> None:
    """An API of OpenAI's kind whose chunks say when they were sent."""
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(re.search(rb"content-length: *(\d+)", head, re.I)[1]))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        for _ in range(int(chunks)):
            writer.write(b"data: " + json.dumps(api_chunk({"content": f"@{time.monotonic():.6f}@"})).encode() + b"\n\n")
            await asyncio.sleep(float(pause))
        writer.write(b"data: " + json.dumps(api_chunk({}, "stop")).encode() + b"\n\ndata: [DONE]\n\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def delays(port: str, at_once: str, model: str) -> None:
    """Read such a stream with requests, so many at once: seconds until its first chunk, and each chunk's on the way."""
    import requests

    def read(_: int) -> tuple[float, list[float]]:
        began, times = time.monotonic(), []
        body = {"model": model, "stream": True, "messages": [{"role": "user", "content": "x"}]}
        with requests.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, stream=True) as response:
            rest, first = b"", 0.0
            while part := response.raw.read1(65536):
                now = time.monotonic()
                first = first or now - began
                *sent, rest = (rest + part).split(b"@") if (rest + part).count(b"@") % 2 == 0 else (rest + part,)
                times += [now - float(text) for text in sent[1::2]]
        return first, times

    with ThreadPoolExecutor(int(at_once)) as pool:
        results = list(pool.map(read, range(int(at_once))))
    print(json.dumps({"first": statistics.median(first for first, _ in results), "chunks": sum(len(t) for _, t in results),
                      "delay": statistics.median(delay for _, times in results for delay in times)}))


def role(*arguments: Any) -> Any:
    """Run one of the above as a process; what it printed."""
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@contextmanager
def fast_upstream(*arguments: Any, name: str = "upstream") -> Iterator[int]:
    with subprocess.Popen([sys.executable, __file__, name, *map(str, arguments)], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


@contextmanager
def benched(port: int, **settings: str) -> Iterator[Program]:
    address = f"http://127.0.0.1:{port}"
    program = Program(UPSTREAM_URL=f"{address}/ajax", CHAT_PAGE_URL=f"{address}/chat/", **settings)
    try:
        yield program
    finally:
        program.process.kill()
        program.wait()


@pytest.mark.bench
def test_benchmark() -> None:
    rows: list[tuple[str, str, str]] = []
    with fast_upstream(0, 40) as port, benched(port) as program:
        role("load", program.port, 64, 500, "json")
        for at_once, total, figure in ((64, 2000, "rate"), (1, 400, "median")):
            ratios = [role("load", program.port, at_once, total, "json")[figure] / role("straight", port, at_once, total)[figure]
                      for _ in range(5)]
            name = "chats per second, 64 at a time" if figure == "rate" else "median latency, one at a time"
            rows.append((f"{name}, to cloudscraper straight", f"{statistics.median(ratios):.2f}",
                         "at least 0.7" if figure == "rate" else "at most 1.8"))
    with fast_upstream(2, 2000) as port, benched(port, MAX_CONCURRENT_CHATS="256", STREAM_INTERVAL_MS="0") as program:
        walls = [role("load", program.port, 200, 200, "stream") for _ in range(3)]
        assert not any(wall["bad"] for wall in walls)
        rows.append(("200 streams at once, upstream takes 2 s", f"{statistics.median(w['wall'] for w in walls):.2f} s", "at most 2.5 s"))
    for interval, limit in (("20", "2.1 s"), ("0", "0.02 s")):
        with fast_upstream(0, 2000) as port, benched(port, STREAM_INTERVAL_MS=interval) as program:
            role("load", program.port, 1, 1, "stream")
            took = role("load", program.port, 1, 5, "stream")["median"]
            rows.append((f"2,000 characters replayed, STREAM_INTERVAL_MS={interval}", f"{took:.3f} s", f"at most {limit}"))
    with fast_upstream(5, 2000) as port:
        began = time.perf_counter()
        with benched(port, MAX_CONCURRENT_CHATS="64") as program:
            program.health()
            rows.append(("start to first /health", f"{time.perf_counter() - began:.2f} s", "at most 0.5 s"))
            rows.append(("memory, idle", f"{program.memory():.0f} MB", "at most 45 MB"))
        with benched(port, MAX_CONCURRENT_CHATS="512") as program:
            links = [program.open_chat(stream=True) for _ in range(500)]
            wait_for(lambda: program.health()["chats"]["running"] == 500)
            time.sleep(2)
            rows.append(("memory, 500 chats held open", f"{program.memory():.0f} MB", "at most 150 MB"))
            for link in links:
                link.close()
    with fast_upstream(100, 0.02, name="times") as port, benched(
            port, PROVIDERS="local", LOCAL_BASE_URL=f"http://127.0.0.1:{port}/v1", MAX_CONCURRENT_CHATS="128") as program:
        for at_once in (1, 100):
            role("delays", program.port, at_once, "local/x")
            through, direct = role("delays", program.port, at_once, "local/x"), role("delays", port, at_once, "local/x")
            assert through["chunks"] == direct["chunks"] == at_once * 100
            rows.append((f"{at_once} API streams at once: added delay per chunk", f"{(through['delay'] - direct['delay']) * 1000:.2f} ms",
                         "well under 1 ms" if at_once == 1 else "no limit"))
            rows.append((f"{at_once} API streams at once: first chunk, to requests straight", f"{through['first'] / direct['first']:.2f}", "no limit"))
        rows.append(("memory after 100 API streams at once", f"{program.memory():.0f} MB", "no limit"))
    width = max(len(name) for name, _, _ in rows)
    print("\n" + "\n".join(f"{name:<{width}}  {value:>8}  {limit}" for name, value, limit in rows))


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    if name in ("straight", "delays"):
        {"straight": straight, "delays": delays}[name](*rest)
    else:
        asyncio.run({"upstream": FastUpstream.main, "load": load, "times": stream_of_times}[name](*rest))
