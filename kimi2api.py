#!/usr/bin/env python3
"""kimi2api: Kimi's web chat as an OpenAI-compatible API on localhost.

    python kimi2api.py                 # listens on http://127.0.0.1:8088/v1
    python kimi2api.py --demo          # the same with a built-in stand-in for the web chat: needs no internet
    python kimi2api.py --check         # goes through the web chat step by step and says what is wrong

    curl http://127.0.0.1:8088/v1/chat/completions -H 'Content-Type: application/json' \\
         -d '{"messages": [{"role": "user", "content": "Hello!"}]}'

The way of a chat through this file, and of the reader:

    HTTP -> App -> ChatRequest -> converse() -> Provider.stream() -> deltas -> relay() -> pace() -> Answer -> HTTP
                                  (Sessions)                         a thread    keep-alive, pauses   JSON or SSE

    1 Settings    every setting, in one table      6 Answers        deltas to OpenAI's JSON or a stream of events
    2 Errors      what goes wrong, in OpenAI form  7 App            routes, keys, browsers, limits
    3 Requests    checks the caller's JSON         8 Demo upstream  a small stand-in for the web chat
    4 Sessions    remembers turns of a `user`      9 Server         waitress, signals, the command line
    5 Providers   talk to an upstream

A section knows those above it and never one below.
"""
from __future__ import annotations

import argparse
import gc
import hmac
import io
import ipaddress
import itertools
import json
import logging
import os
import queue
import random
import re
import signal
import socket
import sys
import threading
import time
import unicodedata
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import ExitStack, suppress
from dataclasses import Field, dataclass, field, fields, replace
from email.utils import parsedate_to_datetime
from functools import partial
from html import unescape
from http.client import HTTPResponse as ClientResponse
from http.cookiejar import DefaultCookiePolicy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import ceil, inf
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar
from urllib.parse import parse_qsl, urlencode, urljoin, urlsplit, urlunsplit

import bottle
import cloudscraper
import requests
import waitress
from cloudscraper.cloudflare import Cloudflare
from requests.adapters import HTTPAdapter
from requests.cookies import extract_cookies_to_jar, get_cookie_header
from urllib3 import Timeout
from urllib3.exceptions import DecodeError, NewConnectionError
from urllib3.exceptions import HTTPError as UpstreamHTTPError
from urllib3.exceptions import TimeoutError as UpstreamTimeout
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.server import BaseWSGIServer
from waitress.task import ErrorTask, WSGITask

__version__ = "1.0.0"

log = logging.getLogger("kimi2api")
T = TypeVar("T")

# ======================================================================================================================
# 1 Settings
#
# One table is the only source: the environment, `.env`, command-line flags, `--help` and the README's table all come
# from the fields of `Settings`. A value is checked when it is read, so the rest of the program can trust it.
# ======================================================================================================================


def number(low: float, high: float, kind: Callable[[str], float] = float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        if not low <= kind(text) <= high:  # NaN is refused too
            raise ValueError
        return kind(text)
    parse.__doc__ = f"a {'whole ' if kind is int else ''}number from {low:g} to {high:g}"
    return parse


def words(pattern: str, meaning: str) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        found = tuple(word.strip() for word in text.split(",") if word.strip())
        if not all(re.fullmatch(pattern, word) for word in found):
            raise ValueError
        return found
    parse.__doc__ = f"{meaning}; several are separated by commas"
    return parse


def pairs(text: str) -> dict[str, str]:
    """`id=upstream name`, separated by commas"""
    table = dict(re.split(r"\s*=\s*", entry, maxsplit=1) for entry in words(r"[^=]+=.+", "")(text))
    if not table:
        raise ValueError
    return table


def http_url(text: str) -> str:
    """an http:// or https:// address"""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError
    return text


def level(text: str) -> str:
    """DEBUG, INFO, WARNING or ERROR"""
    if text.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ValueError
    return text.upper()


class SettingError(Exception):
    """A setting that does not parse, or settings that do not go together: the start is refused."""


def setting(default: str, meaning: str, parse: Callable[[str], Any] = str) -> Any:
    return field(default_factory=lambda: parse(default),
                 metadata={"default": default, "meaning": meaning, "parse": parse})


@dataclass(frozen=True)
class Settings:
    """All settings, parsed. The name of a setting is the name of its field in capitals."""

    api_master_key: tuple[str, ...] = setting(
        "", "key that clients send as `Authorization: Bearer …`; several are separated by commas. "
        "Empty: no key is asked, and only this machine may call",
        words(r"[!-~]+", "printable ASCII without spaces"))
    api_host: str = setting("127.0.0.1", "address to listen on; one that is not loopback needs a key")
    api_port: int = setting("8088", "port to listen on; 0 takes a free one", number(0, 65535, int))
    max_concurrent_chats: int = setting("64", "chats running at once; one more is answered 429", number(1, 4096, int))
    session_cache_ttl: float = setting("3600", "seconds a session lives after its last turn", number(1, 1e9))
    max_session_size: int = setting("1000", "sessions kept; the least recently used goes first", number(1, 10**9, int))
    request_timeout: float = setting("60", "seconds one upstream attempt may take", number(0.1, 86400))
    max_retries: int = setting("3", "further attempts after a failure that is safe to retry", number(0, 100, int))
    context_max_length: int = setting("1000", "characters the web chat takes in one message", number(1, 10**9, int))
    default_model: str = setting("kimi", "model of a request that names none")
    models: dict[str, str] = setting(
        "kimi=moonshotai/Kimi-K2-Instruct-0905,kimi-k2-instruct-0905=moonshotai/Kimi-K2-Instruct-0905,"
        "kimi-k2-instruct=moonshotai/Kimi-K2-Instruct",
        "`id=upstream name`, separated by commas; an entry `*=…` accepts any model id", pairs)
    stream_interval_ms: float = setting(
        "20", "pause between pieces when an answer that arrived whole is replayed as a stream; 0: no pauses",
        number(0, 1000))
    stream_max_seconds: float = setting("2", "a replay never takes longer than this: pieces grow instead",
                                        number(0, 3600))
    sse_keepalive: float = setting("10", "seconds of silence before a keep-alive comment", number(0.05, 3600))
    shutdown_grace: float = setting("30", "seconds that running chats get after SIGTERM or Ctrl-C", number(0, 86400))
    max_body_bytes: int = setting("4194304", "largest request body", number(1, 2**30, int))
    moonshot_api_key: str = setting("", "key of Moonshot's own API; its models are then `moonshot/…`")
    moonshot_base_url: str = setting("https://api.moonshot.ai/v1", "the Chinese site's is `https://api.moonshot.cn/v1`",
                                     http_url)
    deepseek_api_key: str = setting("", "key of DeepSeek's API; its models are then `deepseek/…`")
    deepseek_base_url: str = setting("https://api.deepseek.com/v1", "where it is", http_url)
    qianfan_api_key: str = setting("", "key of Baidu's Qianfan; its models are then `qianfan/…`")
    qianfan_base_url: str = setting("https://qianfan.baidubce.com/v2", "where it is", http_url)
    providers: tuple[str, ...] = setting(
        "", "names of more APIs of OpenAI's kind, separated by commas; for a `local`, set `LOCAL_BASE_URL` and, if it "
        "asks for one, `LOCAL_API_KEY`",
        words("[a-z][a-z0-9_]*", "lower-case letters, digits and _"))
    fallback_models: tuple[str, ...] = setting(
        "", "models to ask, in this order, when the one asked for cannot answer, separated by commas",
        words(r"\S+", "a model's id"))
    cors_origins: tuple[str, ...] = setting(
        "", "origins that may call from a browser, separated by commas. "
        "Empty: any when a key is set, else only those of this machine",
        words(r"\*|[\w.+-]+://[^/\s]+", "an origin such as https://app.example"))
    upstream_url: str = setting("https://kimi-ai.chat/wp-admin/admin-ajax.php", "the web chat's endpoint", http_url)
    chat_page_url: str = setting("https://kimi-ai.chat/chat/", "the page that carries the nonce", http_url)
    log_level: str = setting("INFO", "DEBUG, INFO, WARNING or ERROR", level)
    apis: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # no setting: base URL and key of each API in use

    @classmethod
    def load(cls, *sources: Mapping[str, str | None]) -> Settings:
        """Settings from mappings of names in capitals to text, the first that has a name wins.

        An empty text counts as not set, because that is what `${NAME:-}` of a compose file leaves.
        Raises SettingError with one line that names the setting, the value and what is accepted.
        """
        def given(name: str) -> str:
            return next((value.strip() for source in sources if (value := source.get(name))), "")

        values = {}
        for f in cls.table():
            name, parse = f.name.upper(), f.metadata["parse"]
            if given(name):
                try:
                    values[f.name] = parse(given(name))
                except ValueError:
                    shown = "the value" if name.endswith("_KEY") else repr(given(name))
                    raise SettingError(f"{name}: {shown} is not {parse.__doc__}") from None
        settings = cls(**values)
        apis = {}
        for name in ("moonshot", "deepseek", "qianfan", *settings.providers):
            base_url = getattr(settings, f"{name}_base_url", None) or given(f"{name}_base_url".upper())
            key = given(f"{name}_api_key".upper())
            if key or name in settings.providers:
                try:
                    apis[name] = http_url(base_url), key
                except ValueError:
                    raise SettingError(f"{name.upper()}_BASE_URL: {base_url!r} is not {http_url.__doc__}") from None
        settings = replace(settings, apis=apis)
        settings._check()
        return settings

    @classmethod
    def table(cls) -> list[Field[Any]]:
        return [f for f in fields(cls) if f.metadata]

    def _check(self) -> None:
        """Raises SettingError for settings that do not go together."""
        for start in self.models:
            seen = [start]
            while (following := self.models.get(seen[-1], seen[-1])) != seen[-1]:
                if following in seen:
                    raise SettingError(f"MODELS: {' = '.join([*seen, following])} goes in a circle")
                seen.append(following)
        for name, models in (("DEFAULT_MODEL", (self.default_model,)), ("FALLBACK_MODELS", self.fallback_models)):
            for model in models:
                if not {model, "*"} & set(self.models) and model.partition("/")[0] not in self.apis:
                    raise SettingError(f"{name}: {model!r} is neither one of MODELS ({', '.join(self.models)}) nor of "
                                       f"an API that has its key ({', '.join(self.apis) or 'none has'})")
        if not self.api_master_key and not is_loopback(self.api_host):
            raise SettingError(f"API_HOST: {self.api_host!r} can be reached from other machines, so API_MASTER_KEY "
                               "must be set; without a key only a loopback host such as 127.0.0.1 is accepted")


def is_loopback(host: str | None) -> bool:
    """Whether a host name or address means this machine only."""
    host = (host or "").strip("[]").rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):  # RFC 6761 keeps the whole domain on this machine
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_env_file(path: str, required: bool) -> dict[str, str]:
    """`NAME=value` lines of a .env file; `export`, quotes, blank lines and # comments are understood."""
    entry = re.compile(r"""\s*(?:export\s+)?(\w+)\s*=\s*(?:"([^"]*)"|'([^']*)'|(.*?))\s*(?:(?<=\s)#.*)?$""")
    try:
        with open(path, encoding="utf-8-sig") as lines:
            return {found[1]: found[2] or found[3] or found[4] or "" for found in map(entry.match, lines) if found}
    except (OSError, UnicodeDecodeError) as error:
        if not required and isinstance(error, FileNotFoundError):
            return {}
        raise SettingError(f"{path}: cannot be read: {error}") from None


# ======================================================================================================================
# 2 Errors
#
# Everything that goes wrong on purpose is an APIError; `body()` is the only place that knows OpenAI's shape for it.
# ======================================================================================================================


class APIError(Exception):
    """An error for the caller, in the terms of OpenAI's API.

    retryable: the same call may succeed a moment later and cannot do harm twice; retry_after: seconds that upstream
    asked us to wait, if it did. Both are for the program's own retries and are not sent.
    """

    def __init__(self, status: int, message: str, type: str = "invalid_request_error", code: str | None = None,
                 param: str | None = None, headers: Mapping[str, str] | None = None,
                 retryable: bool = False, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.code, self.param = status, message, type, code, param
        self.headers = dict(headers or {})
        self.retryable, self.retry_after = retryable, retry_after

    @property
    def may_fall_back(self) -> bool:
        """Whether another upstream may do better: it failed, or the prompt is too long for it."""
        return self.status >= 500 or self.status == 429 or self.code == "context_length_exceeded"

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> APIError:
    return APIError(400, message, param=param, code=code)


def upstream_error(status: int, code: str, message: str, retryable: bool = False) -> APIError:
    return APIError(status, message, "upstream_error", code, retryable=retryable)


def dump_json(value: Any) -> bytes:
    """JSON as UTF-8. U+0085, U+2028 and U+2029 stay escaped: some clients split a stream of events there."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(
        {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}).encode()


# ======================================================================================================================
# 3 Requests
#
# Every check of the caller's JSON. A message stays the dict that the client sent; what a provider cannot do with it
# (images, say) is that provider's to refuse. Field names and meanings: OpenAI's chat completions reference.
# ======================================================================================================================

Message = dict[str, Any]
Turn = tuple[Message, ...]  # a user's message and what followed it, up to the next user's message

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


@dataclass(frozen=True)
class ChatRequest:
    """A checked request for a chat completion. `body` is the whole of it, unknown fields included."""

    body: dict[str, Any]
    messages: tuple[Message, ...]
    model: str | None
    user: str | None
    stream: bool
    include_usage: bool

    @classmethod
    def parse(cls, raw: bytes) -> ChatRequest:
        """Raises APIError 400 with `param` naming the field."""
        body = parse_json(raw)
        messages = typed(body, "messages", list)
        if not messages:
            raise bad_request("'messages' must be a list with at least one message.", "messages")
        for index, message in enumerate(messages):
            check_message(message, f"messages[{index}]")
        options = typed(body, "stream_options", dict) or {}
        return cls(body, tuple(messages), typed(body, "model", str) or None, typed(body, "user", str) or None,
                   bool(typed(body, "stream", bool)),
                   bool(typed(options, "include_usage", bool, "stream_options.include_usage")))

    @property
    def system(self) -> list[Message]:
        return [message for message in self.messages if is_system(message)]

    @property
    def turns(self) -> list[Turn]:
        """The messages but the system's, grouped so that each turn begins with a user's message."""
        turns: list[Turn] = []
        for message in self.messages:
            if is_system(message):
                continue
            if message["role"] == "user" or not turns:
                turns.append(())
            turns[-1] += (message,)
        return turns

    @property
    def brings_history(self) -> bool:
        return any(message["role"] == "assistant" for message in self.messages)


def parse_json(raw: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        source = raw.decode("utf-8-sig")
        body = json.loads(source, parse_constant=refuse)
        if "\\u" in source:  # an escape can smuggle in half a surrogate pair, which no later step could encode
            dump_json(body)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"The body is not valid JSON in UTF-8: {type(error).__name__}: {error}"[:300]) from None
    if not isinstance(body, dict):
        raise bad_request("The body must be a JSON object.")
    return body


JSON_TYPES = {list: "a list", dict: "an object", str: "a string", bool: "true or false"}


def typed(body: dict[str, Any], name: str, kind: type, param: str | None = None) -> Any:
    """The field's value, None if it is missing or null. Raises APIError 400 when it is of another type."""
    value = body.get(name)
    if value is not None and type(value) is not kind:
        raise bad_request(f"'{param or name}' must be {JSON_TYPES[kind]}.", param or name)
    return value


def check_message(message: Any, param: str) -> None:
    if not isinstance(message, dict):
        raise bad_request(f"'{param}' must be an object with 'role' and 'content'.", param)
    role = typed(message, "role", str, f"{param}.role")
    if role not in ROLES:
        raise bad_request(f"'{param}.role' must be one of {', '.join(ROLES)}.", f"{param}.role")
    content = message.get("content")
    if content is None and role != "assistant":  # an assistant's message may consist of tool calls alone
        raise bad_request(f"'{param}.content' is missing.", f"{param}.content")
    if content is not None and not isinstance(content, (str, list)):
        raise bad_request(f"'{param}.content' must be a string or a list of parts.", f"{param}.content")
    for index, part in enumerate(content if isinstance(content, list) else ()):
        where = f"{param}.content[{index}]"
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise bad_request(f"'{where}' must be an object with a 'type'.", where)
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise bad_request(f"'{where}.text' must be a string.", f"{where}.text")


def is_system(message: Message) -> bool:
    return message["role"] in ("system", "developer")


def text_of(message: Message) -> str:
    """The text of a message, whether its content is a string, a list of parts, or null."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


# ======================================================================================================================
# 4 Sessions
#
# A dict, an expiry, a lock. A session belongs to a key (`owner`) and a `user`; it remembers turns, never system
# messages, which every request brings anew.
# ======================================================================================================================


@dataclass(frozen=True)
class Session:
    id: str
    created: float
    used: float
    turns: tuple[Turn, ...] = ()


class Sessions:
    """Turns by owner and user. Times are seconds since the epoch; `ttl` seconds after its last use one is forgotten."""

    def __init__(self, ttl: float, limit: int, clock: Callable[[], float] = time.time) -> None:
        self.ttl, self.limit, self._clock = ttl, limit, clock
        # Least recently used first. Use also renews the expiry, so the first is always the first to expire.
        self._sessions: OrderedDict[tuple[str, str], Session] = OrderedDict()
        self._lock = threading.Lock()  # guards _sessions; held for dict work only

    def open(self, owner: str, user: str | None) -> Session:
        """The user's session, or a new one, which is kept only when a turn is recorded."""
        with self._lock:
            session = self._find(owner, user or "")
            if user and session:
                return self._keep(owner, user, session)
        now = self._clock()
        name = "".join(random.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=9))
        return Session(f"session_{int(now * 1000)}_{name}", now, now)  # the form that the web chat's own page uses

    def record(self, owner: str, user: str, opened: Session, turns: Iterable[Turn], anew: bool) -> None:
        """Add turns, all as one, to the user's session; anew: in place of what was remembered."""
        with self._lock:
            session = self._find(owner, user) or replace(opened, turns=())
            self._keep(owner, user, replace(session, turns=(() if anew else session.turns) + tuple(turns)))
            while len(self._sessions) > self.limit:
                self._sessions.popitem(last=False)

    def get(self, owner: str, user: str) -> Session | None:
        with self._lock:
            return self._find(owner, user)

    def forget(self, owner: str, user: str) -> bool:
        with self._lock:
            return self._find(owner, user) is not None and bool(self._sessions.pop((owner, user)))

    def __len__(self) -> int:
        with self._lock:
            self._find("", "")
            return len(self._sessions)

    def _find(self, owner: str, user: str) -> Session | None:
        """The live session; drops all that have expired. The caller holds the lock."""
        oldest = self._clock() - self.ttl
        while self._sessions and next(iter(self._sessions.values())).used <= oldest:
            self._sessions.popitem(last=False)
        return self._sessions.get((owner, user))

    def _keep(self, owner: str, user: str, session: Session) -> Session:
        """Store the session as the one used last. The caller holds the lock."""
        session = self._sessions[owner, user] = replace(session, used=self._clock())
        self._sessions.move_to_end((owner, user))
        return session


# ======================================================================================================================
# 5 Providers
#
# A provider turns a Chat into a stream of Deltas; every fault of its upstream leaves here as an APIError. Nothing
# outside this section knows requests, cloudscraper or what an upstream looks like.
# ======================================================================================================================


class Cancel:
    """How an upstream call learns that its client has gone: by a call to what it has named, from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the two below: an action is called while it is valid, or never
        self.cancelled = False
        self._action: Callable[[], None] | None = None

    def set_action(self, action: Callable[[], None] | None) -> None:
        """Name what ends the call, at once if it is cancelled already; None: there is nothing left to end."""
        with self._lock:
            self._action = action
            if action and self.cancelled:
                action()

    def __call__(self) -> None:
        with self._lock:
            self.cancelled = True
            if self._action:
                self._action()


@dataclass(frozen=True)
class Chat:
    """What a provider is asked: a request, the turns remembered before it, the model by the upstream's own name."""

    request: ChatRequest
    model: str
    history: tuple[Turn, ...] = ()
    session_id: str = ""
    cancel: Cancel = field(default_factory=Cancel)


@dataclass(frozen=True)
class Delta:
    """A step of an answer: OpenAI's chat.completion.chunk, less the fields that are the same in all of them.

    whole: its text arrived at once and may be paced; model: the id of the one that answers; headers: for the response.
    """

    chunk: dict[str, Any]
    whole: bool = False
    model: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, fields: dict[str, Any], finish_reason: str | None = None, whole: bool = False) -> Delta:
        choice = {"index": 0, "delta": fields, "logprobs": None, "finish_reason": finish_reason}
        return cls({"choices": [choice]}, whole)

    @property
    def text(self) -> str:
        """What it adds to the text of the first choice."""
        return "".join(choice["delta"].get("content") or "" for choice in self.chunk["choices"] if not choice["index"])

    @property
    def ends(self) -> bool:
        """Whether it finishes a choice, or comes after (the usage)."""
        return not self.chunk["choices"] or any(choice.get("finish_reason") for choice in self.chunk["choices"])


LONGEST_WAIT = 5.0  # seconds that a Retry-After may ask for if we are to wait ourselves
FIRST_BACK_OFF, LAST_BACK_OFF = 0.25, 4.0  # seconds before the first retry, doubled each time, and at most


class Provider:
    """An upstream. `trouble` is when it began to fail (seconds since the epoch) and why; None while it is well."""

    def __init__(self, name: str, settings: Settings, clock: Callable[[], float] = time.time) -> None:
        self.name, self._settings, self._clock = name, settings, clock
        self.trouble: tuple[float, str] | None = None

    def stream(self, chat: Chat) -> Iterator[Delta]:
        """The answer. Raises APIError, also in the middle when the upstream breaks off."""
        raise NotImplementedError

    def models(self) -> list[dict[str, Any]]:
        """The upstream's own models, as OpenAI's model objects; those that MODELS names need not be among them."""
        return []

    def check(self) -> Iterator[tuple[str, APIError | None]]:
        """Go through the upstream step by step: (what was tried, the error that ended it)."""
        raise NotImplementedError

    def _check_answer(self, model: str) -> Iterator[tuple[str, APIError | None]]:
        began = time.monotonic()
        question = ChatRequest.parse(b'{"messages": [{"role": "user", "content": "Reply with the one word: OK"}]}')
        try:
            for _ in self.stream(Chat(question, model, (), Sessions(1, 1).open("", None).id)):
                pass
            yield f"one question answered in {time.monotonic() - began:.1f} s", None
        except APIError as error:
            yield "one question answered", error

    def _retrying(self, attempt: Callable[[], T], in_vain: Callable[[], bool]) -> T:
        """What attempt() returns, tried again up to MAX_RETRIES times while its error allows it, unless in vain."""
        for retries in itertools.count():
            try:
                result = attempt()
                self.trouble = None
                return result
            except APIError as error:
                if not error.retryable or retries >= self._settings.max_retries or in_vain():
                    if retries:
                        error.headers["x-should-retry"] = "false"  # obeyed by OpenAI's SDKs
                    if error.status >= 500 or error.status == 429:
                        self.trouble = self.trouble or (self._clock(), f"{error.code or error.type}: {error.message}")
                    raise
                wait = error.retry_after or min(FIRST_BACK_OFF * 2 ** retries, LAST_BACK_OFF) * random.uniform(0.5, 1)
                log.warning("%s: %s; retry %d of %d in %.1f s", self.name, error, retries + 1,
                            self._settings.max_retries, wait)
                time.sleep(wait)
        raise AssertionError("unreachable")


def rate_limited(message: str, type: str, code: str | None, headers: Mapping[str, str], now: float) -> APIError:
    """A 429 that passes Retry-After on, and is retried here only when the wait is known and short."""
    wait = parse_retry_after(headers.get("Retry-After"), now)
    return APIError(429, message, type, code, headers={} if wait is None else {"Retry-After": str(ceil(wait))},
                    retryable=wait is not None and wait <= LONGEST_WAIT, retry_after=wait or 0.0)


def parse_retry_after(value: str | None, now: float) -> float | None:
    """Seconds to wait by a Retry-After header (RFC 9110: seconds or a date), None if there is none to go by."""
    try:
        if value and value.strip().isdigit():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - now) if value else None
    except (TypeError, ValueError, OverflowError):
        return None


def root_cause(error: BaseException) -> str:
    """The innermost reason, without the URLs and object names that the layers above wrap around it."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return getattr(error, "strerror", None) or re.sub(r"<[^>]*>", "", str(error)).strip(" :.") or type(error).__name__


def plain_words(said: Any) -> str:
    """What upstream said (a string, an object or nothing) as one line without HTML, 300 characters at most."""
    if isinstance(said, dict):
        said = said.get("message") or said.get("error") or said.get("code") or said
    if said is not None and not isinstance(said, str):
        said = json.dumps(said, ensure_ascii=False)
    words = " ".join(unescape(re.sub(r"<[^>]*>", " ", said or "")).split())
    return words[:300].encode("utf-8", "replace").decode() or "(it gave no reason)"


# Han, kana, Hangul and full-width forms: what a tokenizer spends about a token on, and what is written without spaces.
WIDE = "\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff"


def estimate_tokens(text: str) -> int:
    """Tokens by a rule of thumb: 0.6 a Chinese character (DeepSeek's documentation), else 0.25 (OpenAI's)."""
    narrow = len(re.sub(f"[{WIDE}]", "", text))
    return ceil((len(text) - narrow) * 0.6 + narrow * 0.25)


def estimate_usage(prompt: str, completion: str) -> dict[str, int]:
    tokens = estimate_tokens(prompt), estimate_tokens(completion)
    return {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}


# Kimi's web chat

MAX_UPSTREAM_BYTES = 4 << 20  # of a page or an answer; the web chat's are a few KiB


class DeadlineReader(io.RawIOBase):
    """Reads a socket until its time-out, counted from now on, is used up by all reads together.

    A socket's own time-out starts anew with every byte, so an upstream that drips could hold a thread for hours.
    """

    def __init__(self, source: Any, sock: Any) -> None:
        self._source, self._sock = source, sock
        self._deadline = time.monotonic() + (sock.gettimeout() or inf)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Any:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left if left < inf else None)
        return self._source.readinto(buffer)

    def close(self) -> None:
        self._source.close()
        super().close()


class DeadlineResponse(ClientResponse):
    """What http.client makes of a socket, read by a deadline: head and body together."""

    def __init__(self, sock: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(DeadlineReader(self.fp.detach(), sock))


class Scraper(cloudscraper.CloudScraper):  # type: ignore[misc]
    """cloudscraper for many threads: little bookkeeping per request, bounded bodies, no redirects, whole tracebacks.

    Sending a request through requests.Session costs several times what the wire costs, in merging settings, cookies,
    proxies and .netrc. Here each is done once, or only when there is something to do, and urllib3's pool is asked
    directly; cookies, ciphers and the solving of challenges stay cloudscraper's.
    """

    USER_AGENT = ("Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) "
                  "Chrome/142.0.0.0 Safari/537.36")  # cloudscraper's own list ends with Chrome 76

    def __init__(self, connections: int) -> None:
        # delay: seconds before a challenge is answered; without it, the page could name any
        super().__init__(browser={"browser": "chrome", "platform": "windows", "mobile": False}, delay=4)
        self.headers["User-Agent"] = self.USER_AGENT
        self._jar_lock = threading.Lock()  # guards cookies, whose iteration breaks when another thread adds one
        self._pools: dict[str, tuple[Any, bool]] = {}
        adapter = self.get_adapter("https://")
        adapter.init_poolmanager(10, connections)
        self.mount("http://", adapter)

    def simpleException(self, exception: type[Exception], msg: str) -> NoReturn:
        """cloudscraper's also sets sys.tracebacklimit to 0, which empties every later traceback of the process."""
        self._solveDepthCnt = 0
        raise exception(msg)

    def perform_request(self, method: str, url: str, *, data: bytes | dict[str, str] | None = None, headers: Any = None,
                        timeout: float | None = None, **_: Any) -> requests.Response:
        """Called by cloudscraper for every request. timeout: seconds that all of it may take.

        Raises urllib3's HTTPError; DecodeError also for a body above MAX_UPSTREAM_BYTES.
        """
        request = requests.PreparedRequest()
        request.method, request.url = method, url
        request.headers = requests.structures.CaseInsensitiveDict({**self.headers, **(headers or {})})
        with self._jar_lock:
            cookies = get_cookie_header(self.cookies, request) if self.cookies else None
        if cookies:
            request.headers["Cookie"] = cookies
        pool, names_host = self._pool(url)
        target = url if names_host else urlunsplit(("", "", *urlsplit(url)[2:4], "")) or "/"
        raw = pool.urlopen(method, target, urlencode(data) if isinstance(data, dict) else data,
                           dict(request.headers), retries=False, redirect=False, preload_content=False,
                           assert_same_host=False, timeout=Timeout(total=timeout))
        response = requests.Response()
        response.status_code, response.headers = raw.status, requests.structures.CaseInsensitiveDict(raw.headers)
        response.url, response.request, response.encoding = url, request, "utf-8"
        if "Set-Cookie" in response.headers:
            with self._jar_lock:
                extract_cookies_to_jar(self.cookies, request, raw)
        body = raw.read(MAX_UPSTREAM_BYTES + 1, decode_content=True)
        if len(body) > MAX_UPSTREAM_BYTES:
            raw.close()  # what is not read to its end must not go back to the pool
            raise DecodeError(f"more than {MAX_UPSTREAM_BYTES} bytes")
        raw.release_conn()
        response._content = body  # what response.content and response.text go by
        return response

    def _pool(self, url: str) -> tuple[Any, bool]:
        """The connection pool for a URL's host, and whether its requests name the whole URL, as plain proxies want it.

        Proxies and certificates are those that HTTPS_PROXY, NO_PROXY, REQUESTS_CA_BUNDLE and friends name.
        """
        origin = urljoin(url, "/")
        if origin not in self._pools:
            request, adapter = requests.Request("GET", origin).prepare(), self.get_adapter(origin)
            found = self.merge_environment_settings(origin, {}, True, None, None)
            proxies = {} if is_loopback(urlsplit(url).hostname) else found["proxies"]  # a proxy's loopback is not ours
            pool = adapter.get_connection_with_tls_context(request, found["verify"], proxies, found["cert"])
            pool.ConnectionCls = type("Connection", (pool.ConnectionCls,), {"response_class": DeadlineResponse})
            self._pools[origin] = pool, adapter.request_url(request, proxies) != "/"
        return self._pools[origin]


@dataclass(frozen=True, eq=False)
class Nonce:
    """The token without which the web chat answers nothing. Each fetch makes a new object, equal text or not."""

    value: str
    fetched: float


class StaleNonce(Exception):
    """Upstream said something that a new nonce may mend. `error` is for the caller if it does not."""

    def __init__(self, error: APIError) -> None:
        super().__init__(error.message)
        self.error = error


class KimiProvider(Provider):
    """Kimi's web chat, a WordPress page behind Cloudflare: the page is fetched for its nonce, each chat is a form."""

    NONCE = re.compile(r"""kimi_ajax\b(?:(?!</script>).)*?["']?\bnonce["']?\s*:\s*["']([\w-]+)["']""", re.S)
    NONCE_MAX_AGE = 11 * 3600  # seconds; WordPress accepts one for 12 to 24 hours
    CHALLENGE = re.compile(rb"challenge-(?:form|platform)|cf[-_]chl|jschl|<title>(?:Just a moment|Attention Required)")

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.time) -> None:
        super().__init__("kimi", settings, clock)
        self._scraper = Scraper(connections=2 * settings.max_concurrent_chats)
        self._lock = threading.Lock()  # guards the two below; never held while upstream is asked
        self._nonce: Nonce | None = None
        self._renewal: Future[Nonce] | None = None  # a fetch under way, which everybody who needs a nonce waits for

    def stream(self, chat: Chat) -> Iterator[Delta]:
        prompt = self._prompt(chat)
        answer = self._retrying(lambda: self._ask(prompt, chat),
                                in_vain=lambda: chat.cancel.cancelled and not chat.request.user)
        yield Delta.of({"role": "assistant", "content": "", "refusal": None})
        yield Delta.of({"content": answer}, whole=True)
        yield Delta.of({}, "stop")
        yield Delta({"choices": [], "usage": estimate_usage(prompt, answer)})

    def check(self) -> Iterator[tuple[str, APIError | None]]:
        names = (f"{self._settings.chat_page_url} reached", "not blocked by Cloudflare", "nonce found")
        try:
            self._renew(None, time.monotonic() + self._settings.request_timeout)
        except APIError as error:
            failed = {"upstream_blocked": 1, "upstream_changed": 2}.get(error.code or "", 0)
            yield from ((name, None) for name in names[:failed])
            yield names[failed], error
        else:
            yield from ((name, None) for name in names)
            yield from self._check_answer("moonshotai/Kimi-K2-Instruct-0905")

    # The prompt

    SPEAKERS = {"user": "用户", "assistant": "模型"}  # as the site's public clients write history

    def _prompt(self, chat: Chat) -> str:
        """System messages, as many of the latest turns as fit, and the newest turn, as the one string the chat takes.

        Raises APIError 400 for parts that are not text, and when the newest turn alone does not fit.
        """
        for index, message in enumerate(chat.request.messages):
            for at, part in enumerate(message["content"] if isinstance(message.get("content"), list) else ()):
                if part["type"] not in ("text", "refusal"):
                    raise bad_request(f"The web chat takes text only, not a part of type {part['type'][:40]!r}.",
                                      f"messages[{index}].content[{at}].type", "unsupported_value")
        *older, newest = [[self._line(message) for message in turn]
                          for turn in (*chat.history, *chat.request.turns)] or [[]]
        system = [text_of(message) for message in chat.request.system]
        limit = self._settings.context_max_length
        if system:
            system.append("")
        elif not older and len(newest) == 1:
            newest = [text_of(chat.request.turns[-1][0])]  # a question that stands alone needs no name before it
        room = limit - len("\n".join(system + newest))
        if room < 0:
            raise bad_request(
                f"The newest message and the system messages have {limit - room} characters; the web chat takes "
                f"{limit} (CONTEXT_MAX_LENGTH). Shorten them.", "messages", "context_length_exceeded")
        kept: list[str] = []
        for turn in reversed(older):
            room -= len("\n".join(turn)) + 1
            if room < 0:
                break
            kept = turn + kept
        prompt = "\n".join(system + kept + newest)
        if not prompt.strip():
            raise bad_request("'messages' contain no text.", "messages")
        return prompt

    def _line(self, message: Message) -> str:
        return f"{self.SPEAKERS.get(message['role'], message['role'])}: {text_of(message)}"

    # Asking

    def _ask(self, prompt: str, chat: Chat) -> str:
        """One attempt; a nonce that is rejected is renewed, once."""
        try:
            return self._post(prompt, chat)
        except StaleNonce as stale:
            log.info("%s; trying once more with a new nonce", stale)
        try:
            return self._post(prompt, chat)
        except StaleNonce as stale:
            stale.error.headers["x-should-retry"] = "false"
            raise stale.error from None

    def _post(self, prompt: str, chat: Chat) -> str:
        """Post the form. Raises StaleNonce when a new nonce may help; the next post then fetches one."""
        deadline = time.monotonic() + self._settings.request_timeout
        nonce = self._current_nonce(deadline)
        page = urlsplit(self._settings.chat_page_url)
        form = urlencode({"action": "kimi_send_message", "nonce": nonce.value, "message": prompt, "model": chat.model,
                          "session_id": chat.session_id}).encode()
        try:
            return self._answer(self._send(
                self._scraper.perform_request, "POST", self._settings.upstream_url, deadline, form, {
                    "Content-Type": "application/x-www-form-urlencoded; charset=UTF-8",
                    "Accept": "application/json, */*", "X-Requested-With": "XMLHttpRequest",
                    "Origin": f"{page.scheme}://{page.netloc}", "Referer": self._settings.chat_page_url}))
        except StaleNonce:
            with self._lock:
                if self._nonce is nonce:  # else somebody has renewed it meanwhile
                    self._nonce = None
            raise

    def _answer(self, response: requests.Response) -> str:
        """The text in upstream's JSON."""
        body = response.content.strip()
        if body in (b"-1", b"0"):  # WordPress's own words for a stale nonce and an unknown action
            raise StaleNonce(upstream_error(502, "upstream_refused", f"The web chat refused: {body.decode()}."))
        try:
            data = json.loads(body)
        except (ValueError, RecursionError):
            data = None
        if isinstance(data, dict) and data.get("success") is False:
            words = plain_words(data.get("data"))
            raise StaleNonce(upstream_error(502, "upstream_refused", f"The web chat refused: {words}"))
        if response.status_code != 200:
            raise upstream_error(502, "upstream_invalid_response", f"The web chat sent HTTP {response.status_code}.")
        try:
            answer = data["data"]["message"] if data["success"] else None
        except (KeyError, TypeError):
            answer = None
        if not isinstance(answer, str) or not answer.strip():
            what = ("an empty answer" if isinstance(answer, str) else "something that is not JSON" if data is None
                    else "JSON of an unknown shape")
            raise upstream_error(502, "upstream_invalid_response", f"The web chat sent {what}.", retryable=True)
        return answer.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # halves of pairs become U+FFFD

    def _send(self, send: Callable[..., requests.Response], method: str, url: str, deadline: float,
              data: bytes | None, headers: dict[str, str]) -> requests.Response:
        """Send one request; what any answer of this site can mean, page or chat, is sorted out here."""
        try:
            response = send(method, url, data=data, headers=headers, timeout=max(0.01, deadline - time.monotonic()))
            solvable = Cloudflare(self._scraper).is_Challenge_Request(response)
        except DecodeError as error:
            raise upstream_error(502, "upstream_invalid_response", f"The answer cannot be read: {error}.",
                                 retryable=True) from None
        except UpstreamHTTPError as error:
            if isinstance(error, UpstreamTimeout) and not isinstance(error, NewConnectionError):
                raise upstream_error(504, "upstream_timeout", f"{urlsplit(url).hostname} did not answer within "
                                     f"{self._settings.request_timeout:g} s.") from None
            raise upstream_error(502, "upstream_unavailable", f"{urlsplit(url).hostname} cannot be reached: "
                                 f"{root_cause(error)}.", retryable=True) from None
        except cloudscraper.exceptions.CloudflareException as error:
            raise self._blocked(str(error)) from None
        status, html = response.status_code, response.content.lstrip()[:1] == b"<"
        if solvable:
            raise StaleNonce(self._blocked("a challenge that came again after it was solved"))
        if response.headers.get("cf-mitigated") == "challenge":
            raise self._blocked("a managed challenge")
        if html and (status == 403 or (status in (429, 503) and self.CHALLENGE.search(response.content))):
            raise self._blocked(f"HTTP {status} with a web page")
        if status == 429:
            raise rate_limited("The web chat says: too many requests. Wait a while.", "rate_limit_error",
                               "upstream_rate_limited", response.headers, self._clock())
        if status >= 500:
            raise upstream_error(502, "upstream_unavailable", f"The web chat's site is down (HTTP {status}).", True)
        return response

    def _blocked(self, reason: str) -> APIError:
        return upstream_error(503, "upstream_blocked", (
            f"Cloudflare blocks this program: {reason}. Open {self._settings.chat_page_url} in a browser on this "
            "network, wait some minutes, or use another network (HTTPS_PROXY)."))

    # The nonce

    def _current_nonce(self, deadline: float) -> Nonce:
        with self._lock:
            nonce = self._nonce
        if nonce and self._clock() - nonce.fetched < self.NONCE_MAX_AGE:
            return nonce
        return self._renew(nonce, deadline)

    def _renew(self, old: Nonce | None, deadline: float) -> Nonce:
        """A new nonce. However many threads ask, one fetches the page; all get its nonce, or its error."""
        with self._lock:
            if self._nonce is not old and self._nonce:
                return self._nonce
            mine = self._renewal is None
            renewal = self._renewal = self._renewal or Future()
        if not mine:
            try:
                return renewal.result(max(0.0, deadline - time.monotonic()))
            except FutureTimeout:
                raise upstream_error(504, "upstream_timeout", "The chat page did not answer in time.") from None
        try:
            nonce = self._fetch_nonce(deadline)
        except BaseException as error:
            with self._lock:
                self._renewal = None
            renewal.set_exception(error)
            raise
        with self._lock:
            self._nonce, self._renewal = nonce, None
        renewal.set_result(nonce)
        return nonce

    def _fetch_nonce(self, deadline: float) -> Nonce:
        """Fetch the chat page, solving an old-style challenge on the way if there is one, and find its nonce."""
        home = self._settings.chat_page_url
        address = f"{home}{'&' if '?' in home else '?'}_={int(self._clock() * 1000)}"  # no cache has seen it yet
        for _ in range(5):
            try:
                page = self._send(self._scraper.request, "GET", address, deadline, None, {"Cache-Control": "no-cache"})
            except StaleNonce as stale:
                raise stale.error from None
            if not page.is_redirect:
                break
            address = urljoin(address, page.headers["Location"])
            if urlsplit(address).hostname != urlsplit(home).hostname:
                raise upstream_error(502, "upstream_changed", "The chat page has moved to "
                                     f"{urlsplit(address).hostname}; CHAT_PAGE_URL and UPSTREAM_URL say where it is.")
        found = self.NONCE.search(page.content.decode("utf-8", "replace"))
        if page.status_code != 200 or not found:
            raise upstream_error(502, "upstream_changed", f"{home} (HTTP {page.status_code}) carries no nonce: the "
                                 "site has changed. Look for a newer version of this program.")
        log.info("nonce renewed")
        return Nonce(found[1], self._clock())


# APIs that speak OpenAI's protocol


class OpenAIProvider(Provider):
    """Moonshot's own API, DeepSeek, Qianfan, a local server: anything with OpenAI's chat completions under a base URL.

    Requests and chunks pass through as they are; only the model's name, the messages (the session's turns are put in
    front) and the streaming are ours. When the client leaves, the connection is closed at once: answers cost money.
    """

    MODELS_AGE, MODELS_RETRY, MODELS_WAIT = 600.0, 60.0, 0.5  # seconds: keep the list, ask again after a failure, wait

    def __init__(self, name: str, base_url: str, key: str, settings: Settings,
                 clock: Callable[[], float] = time.time) -> None:
        super().__init__(name, settings, clock)
        self._base_url, self._key = base_url.rstrip("/"), key
        self._chat = threading.local()  # .cancel: of the chat that this thread sends
        self._session = requests.Session()
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))  # a jar is not for many threads
        self._session.auth = self._sign  # as a function, so that .netrc cannot put another in its place
        adapter = CancellableAdapter(self._chat, pool_maxsize=2 * settings.max_concurrent_chats)
        self._session.mount("https://", adapter)
        self._session.mount("http://", adapter)
        if is_loopback(urlsplit(base_url).hostname):
            self._session.trust_env = False  # a proxy's loopback is not ours
        self._lock = threading.Lock()  # guards the two below
        self._models: list[dict[str, Any]] = []
        self._models_due, self._models_here = 0.0, threading.Event()

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def stream(self, chat: Chat) -> Iterator[Delta]:
        request = chat.request
        messages = [*request.system, *itertools.chain(*chat.history), *itertools.chain(*request.turns)]
        body = {**request.body, "model": chat.model, "stream": True,
                "messages": messages if chat.history else list(request.messages),
                "stream_options": {**(request.body.get("stream_options") or {}), "include_usage": True}}
        self._chat.cancel = chat.cancel
        response = None
        try:
            response = self._retrying(lambda: self._send("POST", "/chat/completions", json=body),
                                      in_vain=lambda: chat.cancel.cancelled)
            yield from self._deltas(response, messages)
        except UpstreamHTTPError as error:  # of urllib3, whose reading of the body requests does not wrap here
            raise self._unreachable(error) from None
        finally:
            self._chat.cancel = None
            chat.cancel.set_action(None)  # from here on the connection may belong to somebody else's chat
            if response is not None:
                response.close()

    def _deltas(self, response: requests.Response, messages: list[Message]) -> Iterator[Delta]:
        headers = {name: value for name, value in response.headers.items() if "ratelimit" in name.lower()}
        text, finished, usage = "", False, False
        for data in server_sent_data(response):
            if data == "[DONE]":
                finished = True
                break
            try:
                chunk = json.loads(data)
                if isinstance(chunk, dict) and chunk.get("error"):
                    raise self._their_error(500, chunk, {})
                choices = [{"index": 0, **choice, "delta": choice.get("delta") or {}} for choice in chunk["choices"]]
                delta = Delta({**chunk, "choices": choices}, headers=headers)
                text += delta.text
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise upstream_error(502, "upstream_invalid_response", f"{self.name} sent a bad chunk.") from None
            finished, usage = finished or (delta.ends and bool(choices)), usage or bool(chunk.get("usage"))
            yield delta
        if not finished:
            raise upstream_error(502, "upstream_unavailable", f"{self.name} broke off in the middle of its answer.")
        if not usage:
            yield Delta({"choices": [], "usage": estimate_usage("\n".join(map(text_of, messages)), text)})

    def _send(self, method: str, path: str, **kwargs: Any) -> requests.Response:
        """An answer with status 200, its body still to be read; REQUEST_TIMEOUT is for silence, not for all of it."""
        try:
            response = self._session.request(method, self._base_url + path, stream=True, allow_redirects=False,
                                             timeout=self._settings.request_timeout, **kwargs)
            if response.status_code == 200:
                return response
            with response:
                said = b"".join(itertools.islice(response.iter_content(8192), 8))
        except requests.RequestException as error:
            raise self._unreachable(error) from None
        try:
            body = json.loads(said)
        except (ValueError, RecursionError):
            body = said.decode("utf-8", "replace")
        raise self._their_error(response.status_code, body, response.headers)

    def _their_error(self, status: int, body: Any, headers: Mapping[str, str]) -> APIError:
        """Their error as ours: status, type, code and rate-limit headers stay, except where it is about our own key."""
        error = body.get("error", body) if isinstance(body, dict) else body
        fields = error if isinstance(error, dict) else {}
        type, code, param = (fields.get(name) if isinstance(fields.get(name), str) else None
                             for name in ("type", "code", "param"))
        words = plain_words(error)
        message = f"{self.name}: {words.replace(self._key, '…') if self._key else words}"
        if status in (401, 403):
            return upstream_error(502, "upstream_auth", f"{self.name} does not accept the key that this server has for "
                                  f"it (HTTP {status}); see {self.name.upper()}_API_KEY.")
        if status == 429:
            limited = rate_limited(message, type or "rate_limit_error", code or "upstream_rate_limited", headers,
                                   self._clock())
            limited.headers.update((name, value) for name, value in headers.items() if "ratelimit" in name.lower())
            return limited
        if status >= 500 or status < 400:
            return APIError(status if status >= 500 else 502, message, type or "upstream_error",
                            code or "upstream_unavailable", param, retryable=status >= 500)
        return APIError(status, message, type or "invalid_request_error", code, param)

    def _unreachable(self, error: Exception) -> APIError:
        cause = root_cause(error)
        if isinstance(error, (requests.Timeout, UpstreamTimeout)):
            return upstream_error(504, "upstream_timeout", f"{self.name} was silent for "
                                  f"{self._settings.request_timeout:g} s.")
        return upstream_error(502, "upstream_unavailable", f"{self.name} cannot be reached: {cause}.", retryable=True)

    def models(self) -> list[dict[str, Any]]:
        """Fetched on a thread of its own when the list is old; waits for it no longer than MODELS_WAIT seconds."""
        with self._lock:
            if self._clock() >= self._models_due:
                self._models_due = self._clock() + self.MODELS_RETRY
                self._models_here.clear()
                threading.Thread(target=self._fetch_models, name=f"{self.name} models", daemon=True).start()
        self._models_here.wait(self.MODELS_WAIT)
        return self._models

    def _fetch_models(self) -> None:
        try:
            with self._send("GET", "/models") as response:
                self._models = [model for model in response.json()["data"] if isinstance(model.get("id"), str)]
            self._models_due = self._clock() + self.MODELS_AGE
        except (APIError, requests.RequestException, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s: its models cannot be listed: %s", self.name, error)
        finally:
            self._models_here.set()

    def check(self) -> Iterator[tuple[str, APIError | None]]:
        try:
            self._send("GET", "/models").close()
            yield f"{self._base_url} reached, key accepted", None
        except APIError as error:
            yield f"{self._base_url} reached, key accepted", error
            return
        named = (*self._settings.fallback_models, *self._settings.models.values(), *(
            f"{self.name}/{model['id']}" for model in self.models()))
        model = next((model for model in named if model.startswith(f"{self.name}/")), f"{self.name}/default")
        yield from self._check_answer(model.partition("/")[2])


class CancellableAdapter(HTTPAdapter):
    """Lets a chat's Cancel shut the socket down that it waits on, from the moment the request is sent."""

    def __init__(self, chat: threading.local, **kwargs: Any) -> None:
        self._chat = chat
        super().__init__(**kwargs)

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool, chat = super().get_connection_with_tls_context(*args, **kwargs), self._chat
        plain = pool.ConnectionCls
        if not hasattr(plain, "is_cancellable"):
            def getresponse(connection: Any) -> Any:
                if cancel := getattr(chat, "cancel", None):
                    cancel.set_action(partial(shut_down, connection.sock))
                return plain.getresponse(connection)
            pool.ConnectionCls = type("Connection", (plain,), {"getresponse": getresponse, "is_cancellable": True})
        return pool


def shut_down(sock: Any) -> None:
    with suppress(OSError):  # it is closed already
        sock.shutdown(socket.SHUT_RDWR)


def server_sent_data(response: requests.Response) -> Iterator[str]:
    """The data of each server-sent event as it arrives; comments and other fields are passed over (HTML standard)."""
    rest, data = b"", []
    while chunk := response.raw.read1(65536, decode_content=True):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" ").decode("utf-8", "replace"))
            elif not line and data:
                yield "\n".join(data)
                data = []


# All of them


CREATED = 1757030400  # of a model whose upstream tells no time: 2025-09-05, when Kimi-K2-Instruct-0905 came out


class Upstreams:
    """Every configured provider, and which of them a model's id means."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.web = KimiProvider(settings)
        self.apis = {name: OpenAIProvider(name, *api, settings) for name, api in settings.apis.items()}

    @property
    def all(self) -> list[Provider]:
        return [self.web, *self.apis.values()]

    def resolve(self, model: str) -> tuple[Provider, str]:
        """The provider and its own name for a model. Raises APIError 404 for an id that nobody has."""
        table = self._settings.models
        name = table.get(model) or (model if self._api_of(model) else table.get("*"))
        if name is None:
            raise APIError(404, f"The model {model[:100]!r} does not exist; /v1/models lists those that do.",
                           code="model_not_found", param="model")
        while table.get(name, name) != name:
            name = table[name]
        api = self._api_of(name)
        return (api, name.partition("/")[2]) if api else (self.web, name)

    def _api_of(self, model: str) -> OpenAIProvider | None:
        prefix, _, name = model.partition("/")
        return self.apis.get(prefix) if name else None

    def models(self) -> list[dict[str, Any]]:
        """MODELS, then what each API lists, as OpenAI's model objects."""
        listed = [self.model(name) for name in self._settings.models if name != "*"]
        return listed + [self.model(f"{api.name}/{model['id']}", model)
                         for api in self.apis.values() for model in api.models()]

    def model(self, name: str, theirs: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
        """OpenAI's model object. Raises APIError 404 for an id that nobody has."""
        provider, _ = self.resolve(name)
        created, owner = theirs.get("created"), theirs.get("owned_by")
        return {"id": name, "object": "model", "created": created if isinstance(created, int) else CREATED,
                "owned_by": owner if isinstance(owner, str) else provider.name}

    def answer(self, model: str, chat: Chat) -> Iterator[Delta]:
        """The answer of the model asked for or, if it cannot answer, of the first of FALLBACK_MODELS that can."""
        failed: list[tuple[str, APIError]] = []
        for name in dict.fromkeys((model, *self._settings.fallback_models)):
            provider, upstream_model = self.resolve(name)
            deltas = provider.stream(replace(chat, model=upstream_model))
            try:
                first = next(deltas)
            except APIError as error:
                failed.append((name, error))
                if not error.may_fall_back or chat.cancel.cancelled:
                    break
                log.warning("%s cannot answer: %s: %s", name, error.code, error)
                continue
            if failed:
                log.warning("%s answers instead of %s", name, model)
            headers = {**first.headers, "X-Kimi2api-Provider": provider.name}
            for delta in itertools.chain([first], deltas):
                yield replace(delta, model=name, headers=headers)
            return
        first_error = failed[0][1]
        first_error.message += "".join(f" Fallback {name}: {error.message}" for name, error in failed[1:])
        raise first_error


# ======================================================================================================================
# 6 Answers
#
# Deltas in, OpenAI's JSON or server-sent events out. relay() moves an upstream call to a thread of its own, pace()
# replays what arrived whole, an Answer writes. A None among the deltas stands for silence.
# ======================================================================================================================


class Slots:
    """At most `limit` of something at once; one more is an APIError 429."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._lock = threading.Lock()  # guards used

    def take(self) -> None:
        with self._lock:
            if self.used >= self.limit:
                raise APIError(429, f"{self.limit} chats are running already (MAX_CONCURRENT_CHATS). Try again soon.",
                               "rate_limit_error", "server_busy", headers={"Retry-After": "1"})
            self.used += 1

    def free(self) -> None:
        with self._lock:
            self.used -= 1


class Calls(Slots):
    """Slots whose holders run on threads of their own."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self._threads = ThreadPoolExecutor(limit, "upstream")

    def start(self, work: Callable[[], None]) -> None:
        self.take()
        self._threads.submit(work).add_done_callback(lambda _: self.free())


def converse(deltas_of: Callable[[Chat], Iterator[Delta]], chat: Chat, sessions: Sessions,
             owner: str) -> Iterator[Delta]:
    """An answer with the user's session before it. The turn is recorded before the last delta is handed on, so a
    client that has seen the end finds it remembered."""
    request = chat.request
    session = sessions.open(owner, request.user)
    history = () if request.brings_history else session.turns
    text: list[str] = []
    last: list[Delta] = []
    for delta in deltas_of(replace(chat, history=history, session_id=session.id)):
        text.append(delta.text)
        if delta.ends or last:
            last.append(delta)
        else:
            yield delta
    if request.user and request.turns:
        *older, newest = request.turns
        answered = (*newest, {"role": "assistant", "content": "".join(text)})
        sessions.record(owner, request.user, session, (*older, answered), anew=request.brings_history)
    yield from last


LOOK_EVERY = 0.5  # seconds between looks at whether a silent chat's client is still there


def relay(deltas: Iterator[Delta], calls: Calls, silence: float, look: Callable[[], None],
          cancel: Callable[[], None]) -> Iterator[Delta | None]:
    """Run the deltas on a thread of their own and hand them on, with a None after every `silence` seconds without one.

    look() is called about twice a second; it raises when the chat has lost its client. Then, and at every other end,
    cancel() tells the upstream call; one that goes on all the same, so that its turn is recorded, holds one of `calls`
    until it ends. Raises what the deltas raise.
    """
    box: queue.SimpleQueue[Delta | BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            for delta in deltas:
                box.put(delta)
            box.put(None)
        except BaseException as error:  # handed to the chat's own thread, which answers for it
            box.put(error)

    calls.start(work)
    quiet_until = time.monotonic() + silence
    try:
        while True:
            try:
                item = box.get(timeout=max(0.0, min(LOOK_EVERY, quiet_until - time.monotonic())))
            except queue.Empty:
                look()
                if time.monotonic() >= quiet_until:
                    quiet_until += silence
                    yield None
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
            quiet_until = time.monotonic() + silence
    finally:
        cancel()


PIECE = re.compile(rf"\s*(?:[{WIDE}]{{1,2}}|[^\s{WIDE}]+|$)")


def pieces(text: str, most: int) -> Iterator[str]:
    """Word-like pieces (of Chinese: one or two characters), joined until there are no more than `most`.

    None ends inside a combining sequence, an emoji that is joined from several, or a flag.
    """
    start, size = 0, len(text) / most
    for match in PIECE.finditer(text):
        end = match.end()
        if end - start >= size and end > start and not is_joined(text, end):
            yield text[start:end]
            start = end
    if start < len(text):
        yield text[start:]


def is_joined(text: str, at: int) -> bool:
    """Whether a reader would see the characters on both sides of the index as one."""
    before, after = text[at - 1:at], text[at:at + 1]
    return bool(after) and (unicodedata.category(after).startswith("M") or "\u200d" in (before, after)
                            or "\U0001f1e6" <= after <= "\U0001f1ff" or "\U0001f3fb" <= after <= "\U0001f3ff")


def pace(deltas: Iterator[Delta | None], interval: float, longest: float,
         look: Callable[[], None]) -> Iterator[Delta | None]:
    """Replay each delta that arrived whole in pieces, one every `interval` seconds, in `longest` seconds at most."""
    most = max(1, int(longest / interval)) if interval else 1
    for delta in deltas:
        if delta is None or not delta.whole:
            yield delta
            continue
        began, held = time.monotonic(), ""
        for count, piece in enumerate(pieces(delta.text, most)):
            held += piece
            wait = began + count * interval - time.monotonic()
            if wait < -interval:  # the machine is too busy for this pace: pieces grow
                continue
            time.sleep(max(0.0, wait))
            look()
            yield replace(Delta.of({"content": held}), model=delta.model)
            held = ""
        if held:
            yield replace(Delta.of({"content": held}), model=delta.model)


class Answer:
    """One chat completion on its way out: an id and a time of creation, the same in every chunk.

    Field by field after CreateChatCompletionResponse and CreateChatCompletionStreamResponse of OpenAI's OpenAPI schema.
    `headers` are known once the first delta is there.
    """

    def __init__(self, include_usage: bool = False) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
        self._include_usage = include_usage
        self.headers: Mapping[str, str] = {}

    def completion(self, deltas: Iterable[Delta | None]) -> dict[str, Any]:
        """The fold of all deltas into one object."""
        answer: dict[str, Any] = {}
        for delta in filter(None, deltas):
            self.headers = self.headers or delta.headers
            merge(answer, {**delta.chunk, "model": delta.model})
        for choice in answer.get("choices", ()):
            message = {"role": "assistant", "content": None, "refusal": None, **choice.pop("delta")}
            for call in message.get("tool_calls") or ():
                call.pop("index", None)  # which has done its work, and is not part of a whole message
            choice.update(message=message, logprobs=choice.get("logprobs"),
                          finish_reason=choice.get("finish_reason") or "stop")
        return {**answer, **self._head, "object": "chat.completion"}

    def events(self, deltas: Iterable[Delta | None]) -> Iterator[bytes]:
        """Server-sent events. Raises what the deltas raise only before the first one; later it becomes an event."""
        begun = False
        try:
            for delta in deltas:
                if delta is None:
                    begun = True
                    yield b": keep-alive\n\n"
                    continue
                self.headers = self.headers or delta.headers
                chunk = {**delta.chunk, **self._head, "object": "chat.completion.chunk", "model": delta.model}
                usage = chunk.pop("usage", None)
                if self._include_usage:
                    chunk["usage"] = usage
                elif not chunk["choices"] and usage:
                    continue
                begun = True
                yield b"data: " + dump_json(chunk) + b"\n\n"
        except Exception as error:
            if not begun:
                raise
            yield b"data: " + dump_json(as_api_error(error).body()) + b"\n\n"
            return  # without [DONE]: half an answer must not look whole
        yield b"data: [DONE]\n\n"


def merge(whole: dict[str, Any], part: dict[str, Any], join: bool = False) -> None:
    """Add a chunk to what came before. Lists grow, by `index` where their entries have one; within a delta texts are
    joined, but for those that name something; else the later value stands."""
    for name, value in part.items():
        before = whole.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            merge(before, value, join or name == "delta")
        elif isinstance(value, list) and isinstance(before or [], list):
            known = whole[name] = before or []
            for entry in value:
                index = entry.get("index") if isinstance(entry, dict) else None
                same = next((old for old in known if index is not None and old.get("index") == index), None)
                if same is None:
                    known.append(same := {} if isinstance(entry, dict) else entry)
                if isinstance(entry, dict):
                    merge(same, entry, join)
        elif join and isinstance(before, str) and isinstance(value, str) and name not in ("role", "id", "type", "name"):
            whole[name] = before + value
        elif value is not None or name not in whole:
            whole[name] = {} if isinstance(value, dict) else value
            if isinstance(value, dict):
                merge(whole[name], value, join or name == "delta")


def as_api_error(error: Exception) -> APIError:
    """The error itself, or, for one that nobody meant to happen, a 500 after its traceback is logged."""
    if isinstance(error, APIError):
        return error
    log.error("unexpected error", exc_info=error)
    return APIError(500, "The server met an unexpected error; see its log.", "server_error", "internal_error")


# ======================================================================================================================
# 7 App
#
# The routes and who may call them. `create_app(settings)` builds a Bottle application with state of its own, so a
# test can have as many as it likes.
# ======================================================================================================================

class EventStream:
    """A WSGI body: a first event that has been made already, the rest, and what to do when it is over or given up."""

    def __init__(self, first: bytes, rest: Iterator[bytes], done: ExitStack) -> None:
        self._events, self._done = itertools.chain([first], rest), done

    def __iter__(self) -> Iterator[bytes]:
        return self._events

    def close(self) -> None:
        self._done.close()


class App:
    """The program's state while it runs, and its routes."""

    def __init__(self, settings: Settings, stopping: threading.Event) -> None:
        self.settings, self.stopping = settings, stopping
        self.upstreams = Upstreams(settings)
        self.sessions = Sessions(settings.session_cache_ttl, settings.max_session_size)
        self.chats = Slots(settings.max_concurrent_chats)
        # Upstream calls, those included whose client has left: they may be as many again, and no more.
        self.calls = Calls(2 * settings.max_concurrent_chats)
        self.started = time.time()

    # Routes

    def chat(self) -> dict[str, Any] | EventStream:
        request = ChatRequest.parse(self._read_body())
        model = request.model or self.settings.default_model
        self.upstreams.resolve(model)  # an unknown model is refused before it takes a slot
        gone = bottle.request.environ.get("waitress.client_disconnected", bool)
        answer, chat = Answer(request.include_usage), Chat(request, model)

        def look() -> None:
            if gone():
                raise APIError(499, "The client has gone.", code="client_closed_request")
            if self.stopping.is_set():
                raise APIError(503, "The server is stopping.", "server_error", "server_stopping")

        with ExitStack() as done:
            self.chats.take()
            done.callback(self.chats.free)
            conversation = converse(partial(self.upstreams.answer, model), chat, self.sessions, owner())
            deltas = relay(conversation, self.calls, self.settings.sse_keepalive, look, chat.cancel)
            if not request.stream:
                completion = answer.completion(deltas)
                set_headers(answer.headers)
                return completion
            paced = pace(deltas, self.settings.stream_interval_ms / 1000, self.settings.stream_max_seconds, look)
            events = answer.events(paced)
            first = next(events)  # what goes wrong before the first event is a real status
            set_headers({"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache",
                         "X-Accel-Buffering": "no", **answer.headers})  # "no": nginx would hold a stream back
            done.callback(log_end, bottle.request.environ)
            return EventStream(first, events, done.pop_all())
        raise AssertionError("unreachable")

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": self.upstreams.models()}

    def model(self, name: str) -> dict[str, Any]:
        return self.upstreams.model(name)

    def session(self, user: str) -> dict[str, Any]:
        session = self.sessions.get(owner(), user)
        if session is None:
            raise no_session()
        return {"object": "session", "user": user, "created": int(session.created), "last_used": int(session.used),
                "expires_at": int(session.used + self.sessions.ttl), "turns": session.turns}

    def forget(self, user: str) -> dict[str, Any]:
        if not self.sessions.forget(owner(), user):
            raise no_session()
        return {"object": "session.deleted", "user": user, "deleted": True}

    def health(self) -> dict[str, Any]:
        troubles = {upstream.name: upstream.trouble for upstream in self.upstreams.all}
        return {"status": "degraded" if any(troubles.values()) else "ok", "version": __version__,
                "uptime_seconds": int(time.time() - self.started),
                "chats": {"running": self.chats.used, "limit": self.chats.limit},
                "sessions": {"kept": len(self.sessions), "limit": self.sessions.limit},
                "upstreams": {name: {"failing_since": int(trouble[0]), "reason": trouble[1]} if trouble else {}
                              for name, trouble in troubles.items()}}

    # Before and after every route

    def admit(self) -> None:
        """Let a request in, or raise what to answer instead."""
        environ = bottle.request.environ  # also for headers: Bottle's own accessors fail on some bytes above 127
        environ["kimi2api.began"] = time.monotonic()
        given = environ.get("HTTP_X_REQUEST_ID", "")
        environ["kimi2api.id"] = given if re.fullmatch(r"[\w.:-]{1,128}", given, re.A) else f"req_{uuid.uuid4().hex}"
        host, origin = environ.get("HTTP_HOST"), environ.get("HTTP_ORIGIN")
        # Without a key the only wall is "this machine". A page whose name resolves to 127.0.0.1 (DNS rebinding) gets
        # past the address, but not past its own name in Host; any other page gives itself away by its Origin.
        if not self.settings.api_master_key and host and not is_loopback(host_of(f"//{host}")):
            raise as_response(APIError(403, f"{host[:100]!r} is not a name of this machine. Without API_MASTER_KEY the "
                                       "server answers to localhost only.", code="host_not_allowed"))
        if origin and not self._is_welcome(origin, host):
            raise as_response(APIError(403, f"Web pages of {origin[:100]!r} may not call this server; CORS_ORIGINS "
                                       "lists those that may.", code="origin_not_allowed"))
        environ["kimi2api.origin"] = origin
        if environ["REQUEST_METHOD"] == "OPTIONS":
            raise bottle.HTTPResponse(status=204, headers={
                "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS", "Access-Control-Max-Age": "600",
                "Access-Control-Allow-Headers": environ.get("HTTP_ACCESS_CONTROL_REQUEST_HEADERS", "*"),
                "Access-Control-Allow-Private-Network": "true"})
        environ["kimi2api.owner"] = "" if environ["PATH_INFO"] == "/health" else self._owner_of_key()

    def finish(self) -> None:
        """Headers that every response carries, and a line in the log."""
        environ, response = bottle.request.environ, bottle.response
        response.set_header("X-Request-Id", environ["kimi2api.id"])
        if origin := environ.get("kimi2api.origin"):
            response.set_header("Access-Control-Allow-Origin", origin)
            response.set_header("Access-Control-Expose-Headers",
                                "X-Request-Id, X-Kimi2api-Provider, Retry-After, x-should-retry")
            response.add_header("Vary", "Origin")
        route = environ.get("bottle.route")
        log.log(logging.INFO if response.status_code >= 400 else logging.DEBUG, "%s %s %s %d %.0f ms",
                environ["kimi2api.id"], environ["REQUEST_METHOD"], route.rule if route else "(no route)",
                response.status_code, (time.monotonic() - environ["kimi2api.began"]) * 1000)

    def _owner_of_key(self) -> str:
        """The key that the request carries, "" when none is asked."""
        if not self.settings.api_master_key:
            return ""
        scheme, _, token = bottle.request.environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        given = token.strip().encode("latin-1", "replace")
        matches = [key for key in self.settings.api_master_key if hmac.compare_digest(key.encode(), given)]
        if scheme.lower() != "bearer" or not matches:
            what = "Incorrect API key." if token else "No API key: send it as 'Authorization: Bearer …'."
            raise as_response(APIError(401, what, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}))
        return matches[0]

    def _is_welcome(self, origin: str, host: str | None) -> bool:
        allowed = self.settings.cors_origins
        if host and urlsplit_safely(origin).netloc == host:  # the server's own pages
            return True
        if allowed:
            return origin in allowed or "*" in allowed
        return bool(self.settings.api_master_key) or is_loopback(host_of(origin))

    def _read_body(self) -> bytes:
        limit = self.settings.max_body_bytes
        if bottle.request.content_length > limit:
            raise APIError(413, f"The body is larger than {limit} bytes (MAX_BODY_BYTES).", code="request_too_large")
        body: bytes = bottle.request.environ["wsgi.input"].read(max(0, bottle.request.content_length))
        return body


def owner() -> str:
    """Whom the sessions of the current request belong to."""
    key: str = bottle.request.environ["kimi2api.owner"]
    return key


def set_headers(headers: Mapping[str, str]) -> None:
    for name, value in headers.items():
        bottle.response.set_header(name, value)


def no_session() -> APIError:
    return APIError(404, "Nothing is remembered of this user (any more).", code="session_not_found")


def urlsplit_safely(address: str) -> Any:
    try:
        return urlsplit(address)
    except ValueError:  # such as half an IPv6 address
        return urlsplit("")


def host_of(address: str) -> str | None:
    host: str | None = urlsplit_safely(address).hostname
    return host


def as_response(error: APIError) -> bottle.HTTPResponse:
    return bottle.HTTPResponse(dump_json(error.body()), error.status,
                               headers={**error.headers, "Content-Type": "application/json"})


def json_plugin(route: Callable[..., Any]) -> Callable[..., Any]:
    """Bottle plugin: what a route returns becomes JSON, and so does every error."""
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            result = route(*args, **kwargs)
        except Exception as error:
            return as_response(as_api_error(error))
        if isinstance(result, dict):
            bottle.response.content_type = "application/json"
            return dump_json(result)
        return result
    return call


def bottles_error(error: bottle.HTTPError) -> bytes:
    """Bottle's own errors: no such path, wrong method, or a crash outside a route."""
    codes = {404: "not_found", 405: "method_not_allowed"}
    path = f"{bottle.request.method} {bottle.request.path[:100]}"
    message = {404: f"There is no {path!r} here. Clients want the base URL to end in /v1.",
               405: f"{path!r}: no such method."}.get(error.status_code, "An unexpected error; see the log.")
    bottle.response.content_type = "application/json"
    return dump_json(APIError(error.status_code, message, code=codes.get(error.status_code, "internal_error"),
                              type="invalid_request_error" if error.status_code < 500 else "server_error").body())


def log_end(environ: dict[str, Any]) -> None:
    log.debug("%s stream over after %.0f ms", environ["kimi2api.id"],
             (time.monotonic() - environ["kimi2api.began"]) * 1000)


def create_app(settings: Settings, stopping: threading.Event | None = None) -> bottle.Bottle:
    """The WSGI application. Chats end with an error once `stopping` is set."""
    app, wsgi = App(settings, stopping or threading.Event()), bottle.Bottle()
    wsgi.install(json_plugin)
    wsgi.default_error_handler = bottles_error
    wsgi.add_hook("before_request", app.admit)
    wsgi.add_hook("after_request", app.finish)
    wsgi.route("/v1/chat/completions", "POST", app.chat)
    wsgi.route("/v1/models", "GET", app.models)
    wsgi.route("/v1/models/<name:path>", "GET", app.model)
    wsgi.route("/v1/sessions/<user:path>", "GET", app.session)
    wsgi.route("/v1/sessions/<user:path>", "DELETE", app.forget)
    wsgi.route("/health", "GET", app.health)
    return wsgi


# ======================================================================================================================
# 8 Demo upstream
#
# A small stand-in for the web chat: the page with its nonce, the form, the JSON. It speaks the same HTTP as the site,
# so `--demo` goes the whole real way without internet.
# ======================================================================================================================


class DemoUpstream(BaseHTTPRequestHandler):
    """Answers every question by saying that it is no model, and what reached it."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet
    nonce = uuid.uuid4().hex[:10]

    @classmethod
    def start(cls) -> str:
        """Serve on a free loopback port from a thread of its own; the address, without a path."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), cls)
        threading.Thread(target=server.serve_forever, name="demo", daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    def do_GET(self) -> None:
        config = json.dumps({"ajax_url": "/wp-admin/admin-ajax.php", "nonce": self.nonce})
        self.reply(200, "text/html", f"<html><script>var kimi_ajax = {config};</script></html>".encode())

    def do_POST(self) -> None:
        form = dict(parse_qsl(self.rfile.read(int(self.headers["Content-Length"])).decode()))
        if form.get("nonce") != self.nonce:
            self.reply(403, "text/html", b"-1")
        else:
            self.reply(200, "application/json", dump_json({"success": True, "data": {"message": self.say(**form)}}))

    def say(self, message: str, model: str, **_: str) -> str:
        *before, newest = re.split(r"^(?:用户|模型): ", message, flags=re.M)
        earlier = [" ".join(part.split())[:60] for part in before if part.strip()]
        heard = "".join(f"\n- {part}" for part in earlier) or " none."
        return (f"This is kimi2api's demo, not Kimi (演示模式): no model was asked. You said: “{newest.strip()}”\n"
                f"Earlier messages that reached {model} with it:{heard}")

    def reply(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("demo upstream: " + format, *args)


# ======================================================================================================================
# 9 Server
#
# waitress with settings that suit chats, a stop that lets them finish, and the command line.
# ======================================================================================================================

SPARE_THREADS = 8  # beyond MAX_CONCURRENT_CHATS, so that everything else is always answered
IDLE_CONNECTIONS = 4096
EXTRA_BODY_BYTES = 16 << 20  # read, to disk, above MAX_BODY_BYTES: a client still sending would miss our 413


class JSONErrorTask(ErrorTask):  # type: ignore[misc]
    """waitress's own answers (a request that is not HTTP, headers too long, …) in OpenAI's shape."""

    def execute(self) -> None:
        error = self.request.error
        code = "request_too_large" if error.code == 413 else None
        body = dump_json(APIError(error.code, f"{error.reason}: {error.body}", code=code).body())
        self.status = f"{error.code} {error.reason}"
        self.response_headers += [("Content-Type", "application/json"), ("X-Request-Id", f"req_{uuid.uuid4().hex}")]
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class Task(WSGITask):  # type: ignore[misc]
    def build_response_header(self) -> bytes:
        if self.channel.server.draining:
            self.set_close_on_finish()  # a client that goes on asking over one connection must not hold up the stop
        head: bytes = super().build_response_header()
        return head


class Channel(HTTPChannel):  # type: ignore[misc]
    task_class = Task
    error_task_class = JSONErrorTask

    @property
    def busy(self) -> bool:
        """Whether a request is being answered or its answer is not sent yet."""
        return bool(self.requests or self.total_outbufs_len)


class Server:
    """waitress, bound to its port; `run` serves until the first SIGTERM or SIGINT, then lets running chats finish.

    waitress itself has no graceful stop: its loop ends at once and drops what is not sent (its issue 198), so the
    loop is turned here. Raises OSError when it cannot listen.
    """

    def __init__(self, settings: Settings, app: bottle.Bottle, stopping: threading.Event) -> None:
        self._grace, self._stopping, self._signalled = settings.shutdown_grace, stopping, False
        self._map: dict[int, Any] = {}  # waitress's own: listening sockets, connections, the pipe that wakes the loop
        host = f"[{settings.api_host}]" if ":" in settings.api_host else settings.api_host
        waitress.create_server(
            app, map=self._map, listen=f"{host}:{settings.api_port}", ident="kimi2api",
            threads=settings.max_concurrent_chats + SPARE_THREADS,
            connection_limit=connection_limit(settings.max_concurrent_chats),
            channel_request_lookahead=1,  # else a client that leaves is noticed only when something is sent
            asyncore_use_poll=True,  # select() ends at 1,024 descriptors
            max_request_body_size=settings.max_body_bytes + EXTRA_BODY_BYTES,
            recv_bytes=65536, clear_untrusted_proxy_headers=False)
        self._listeners = [entry for entry in self._map.values() if isinstance(entry, BaseWSGIServer)]
        for listener in self._listeners:
            listener.channel_class, listener.draining = Channel, False
        self.port = int(self._listeners[0].effective_port)

    def handle_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def run(self) -> None:
        while not self._signalled:
            self._turn()
        for listener in self._listeners:
            listener.draining = True
            wasyncore.dispatcher.close(listener)  # its own close() would also close the pipe that wakes the loop
        running = sum(channel.busy for channel in self._channels())
        log.info("stopping; %d requests have %g s to finish, a second signal ends at once", running, self._grace)
        self._drain(self._grace)
        self._stopping.set()  # what still runs ends with an error, which wants a moment to be sent
        self._drain(2.0)

    def _turn(self) -> None:
        wasyncore.loop(timeout=0.5, use_poll=True, map=self._map, count=1)

    def _channels(self) -> list[Channel]:
        return [entry for entry in self._map.values() if isinstance(entry, Channel)]

    def _drain(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while channels := self._channels():
            if time.monotonic() >= deadline:
                return
            for channel in channels:
                channel.will_close |= not channel.busy
            self._turn()

    def _on_signal(self, number: int, _: Any) -> None:
        if self._signalled:
            os._exit(128 + number)
        self._signalled = True
        self._listeners[0].pull_trigger()


def connection_limit(chats: int) -> int:
    """Connections to keep open at once: as many as the system has descriptors for, upstream's and spare ones aside."""
    wanted = IDLE_CONNECTIONS + chats
    reserve = 2 * chats + 64
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard - reserve)
    if soft != resource.RLIM_INFINITY and soft < wanted + reserve:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted + reserve, hard))
    return max(wanted, 16)


def parse_command_line(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str | None]]:
    """The options that are no settings, and the settings given as flags."""
    cli = argparse.ArgumentParser("kimi2api", description="Kimi's web chat as an OpenAI-compatible API on localhost.",
                                  epilog="Every setting may also stand in the environment or in .env, under its flag's "
                                  "name in capitals with underscores (API_PORT). Flags go first, then the environment.",
                                  allow_abbrev=False)
    cli.add_argument("--demo", action="store_true", help="use a built-in stand-in for the web chat; needs no internet")
    cli.add_argument("--check", action="store_true", help="try the upstream step by step, say what is wrong, and exit")
    cli.add_argument("--version", action="version", version=f"kimi2api {__version__}")
    cli.add_argument("--env-file", metavar="PATH", help="read this file instead of .env")
    table = cli.add_argument_group("settings")
    for f in Settings.table():
        default = f.metadata["default"] or "(empty)"
        table.add_argument(f"--{f.name.replace('_', '-')}", metavar="…", dest=f.name.upper(),
                           help=f"{f.metadata['meaning']}. Default: {default}".replace("%", "%%"))
    options = cli.parse_args(argv)
    return options, {f.name.upper(): getattr(options, f.name.upper()) for f in Settings.table()}


def greeting(settings: Settings, port: int, demo: bool) -> str:
    host = settings.api_host if is_loopback(settings.api_host) else "127.0.0.1"
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    key = "${API_MASTER_KEY%%,*}" if len(settings.api_master_key) > 1 else "$API_MASTER_KEY"
    header = f' -H "Authorization: Bearer {key}"' if settings.api_master_key else ""
    return "\n".join([
        f"kimi2api {__version__} listens on {settings.api_host} port {port}; base URL for clients: {address}/v1",
        f"  key:      {'API_MASTER_KEY' if settings.api_master_key else 'none asked; only this machine may call'}",
        f"  upstream: {'the built-in demo' if demo else settings.upstream_url}",
        "  try it:   curl " + f"{address}/v1/chat/completions{header} -H 'Content-Type: application/json'"
        " -d '{\"messages\": [{\"role\": \"user\", \"content\": \"Hello!\"}]}'",
        "  stop it:  Ctrl-C"])


def check(settings: Settings) -> int:
    """Print every step of the way through each upstream with a tick or a cross; 0 if all went well, else 1."""
    failed = 0
    for upstream in Upstreams(settings).all:
        print(f"{upstream.name}:")
        for step, error in upstream.check():
            print(f"  ✗ {step}\n    {error} [{error.code}]" if error else f"  ✓ {step}", flush=True)
            failed |= error is not None
    return int(failed)


def main(argv: list[str] | None = None) -> int:
    """Run the program. The exit status: 0 after a stop, 1 when a check failed, 2 when the start was refused."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a console that has no ✓ must not stop us
    options, flags = parse_command_line(sys.argv[1:] if argv is None else argv)
    try:
        env_file = read_env_file(options.env_file or ".env", required=bool(options.env_file))
        settings = Settings.load(flags, os.environ, env_file)
        if options.demo:
            origin = DemoUpstream.start()
            settings = replace(settings, upstream_url=f"{origin}/ajax", chat_page_url=f"{origin}/chat/")
        logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(message)s")
        logging.getLogger("waitress").setLevel(logging.ERROR)  # its news are clients that left and full queues
        if options.check:
            return check(settings)
        stopping = threading.Event()
        server = Server(settings, create_app(settings, stopping), stopping)
    except SettingError as error:
        print(f"kimi2api: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:  # of waitress: the port is in use, the host has no address
        print(f"kimi2api: cannot listen on {settings.api_host} port {settings.api_port}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    server.handle_signals()
    print(greeting(settings, server.port, options.demo), flush=True)
    gc.freeze()
    gc.set_threshold(50_000)  # of objects made; the default, 700, collects several times a chat (10 % of the time)
    server.run()
    logging.shutdown()
    os._exit(0)  # a usual exit would wait for upstream calls that nobody waits for any more


if __name__ == "__main__":
    sys.exit(main())
