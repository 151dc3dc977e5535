#!/usr/bin/env python3
"""kimi2api: Kimi's web chat as an OpenAI-compatible API on localhost.

    python kimi2api.py                 # listens on http://127.0.0.1:8088/v1
    python kimi2api.py --demo          # the same with a built-in stand-in for the web chat: needs no internet
    python kimi2api.py --check         # goes through the web chat step by step and says what is wrong

    curl http://127.0.0.1:8088/v1/chat/completions -H 'Content-Type: application/json' \\
         -d '{"messages": [{"role": "user", "content": "Hello!"}]}'

The way of a chat through this file:

    Access.admit()        whether its client may call
    ChatRequest           checked by schemas; a ResponsesRequest is read as one
    Accounts.admit()      the limits of its key; the Meter counts what it takes, for usage and metrics
    answer_in_session()   what was said before goes in front: Sessions, in a Store
    Providers.answer()    by the model asked for, or else by one to fall back to
    Provider.stream()     Kimi's web chat or an API: a stream of Deltas
    ChatCompletion        deltas as JSON or events; of the Responses API: ResponseWriter
    relay()               from a thread of the upstream's own to the client

and of its reader:

     1 Kinds of settings   what they may be             23 Scraper             cloudscraper, many threads
     2 Settings            every one, in one table      24 Kimi's web chat     the nonce, the form, its answers
     3 Errors and JSON     in OpenAI's form; strict     25 Model notes         what models refuse
     4 Schemas             what a value must be like    26 API streams         the events of an answer
     5 Requests            what a caller may send       27 OpenAI-style APIs   Moonshot, DeepSeek, a local one
     6 Responses items     read as messages             28 Models and fallback who answers for a model
     7 Responses requests  read as chats                29 Metering            every answer is counted
     8 Stores              where sessions are kept      30 Delivery            sessions, threads, keep-alives
     9 Shared stores       failures, formats            31 Pace                a whole answer in pieces
    10 SQLite store        one file                     32 Formats             deltas to JSON or to events
    11 Redis client        deadlines, keys, scripts     33 Responses           deltas to items and events
    12 Redis store         many machines                34 Access              keys, hosts, browsers
    13 Sessions            what is remembered of users  35 Exchanges           what a request holds
    14 Limits and usage    of each key                  36 App                 what each route does
    15 Metrics             for Prometheus               37 Routes              paths, errors
    16 Deltas              folding, tokens, graphemes   38 Demo upstream       a small web chat of our own
    17 Connections         deadlines, strict reading    39 Client connections  waitress's, bounded
    18 Transport           pools, failures as errors    40 Server              its loop, and how it stops
    19 Circuit breaker     spares what is down          41 Command line        flags, --check, main()
    20 Upstreams           providers, retries           42 Description         OpenAPI
    21 Prompts             a request as plain text      43 Page                HTML
    22 Reading answers     calls and JSON in text

A section knows those above it and never one below, but for the last two, which the App serves.
"""
from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # as process 1 of a container, a signal without a handler is lost; the imports take a while
    signal.signal(signal.SIGTERM, lambda signum, _: os._exit(128 + signum))

import argparse
import gc
import hmac
import io
import ipaddress
import itertools
import json
import logging
import random
import re
import selectors
import socket
import ssl
import subprocess
import sys
import threading
import time
import unicodedata
from base64 import b64decode, b64encode
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import ExitStack, closing, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import Field, dataclass, field, fields, replace
from email.utils import parsedate_to_datetime
from functools import cached_property, lru_cache, partial
from hashlib import sha256
from html import unescape
from http.client import HTTPException, HTTPResponse, parse_headers
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import ceil, inf, isfinite
from operator import attrgetter, itemgetter
from queue import Empty, SimpleQueue
from traceback import clear_frames
from typing import Any, Generic, NoReturn, TypeGuard, TypeVar
from urllib.parse import parse_qsl, urlencode, urljoin, urlsplit, urlunsplit

import bottle
import cloudscraper
import requests
import waitress
from cloudscraper.cloudflare import Cloudflare
from cloudscraper.exceptions import CloudflareException, CloudflareLoopProtection, CloudflareSolveError
from requests.adapters import HTTPAdapter
from requests.cookies import extract_cookies_to_jar, get_cookie_header
from requests.utils import get_environ_proxies
from urllib3 import Timeout
from urllib3.exceptions import DecodeError, HTTPError
from waitress import wasyncore
from waitress.buffers import OverflowableBuffer
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.server import BaseWSGIServer
from waitress.task import ErrorTask, WSGITask

__version__ = "1.0.0"

log = logging.getLogger("kimi2api")
T = TypeVar("T")
JSONObject = dict[str, Any]
Headers = Mapping[str, str]
Message = JSONObject  # of a conversation, in OpenAI's format
Turn = tuple[Message, ...]  # a user's message and what followed it, up to the next user's message
Turns = tuple[Turn, ...]

# ======================================================================================================================
# 1 Kinds of settings
#
# What a setting may be: parsers, and what they accept in words. A value is checked when it is read, so the rest of the
# program can trust it.
# ======================================================================================================================


class SettingError(Exception):
    """A setting that does not parse, or a combination that is not allowed: the program does not start."""


@dataclass(frozen=True)
class Kind:
    """What a setting accepts, for messages, and its parser, which raises ValueError."""

    accepts: str
    parse: Callable[[str], Any]


def number(low: float, high: float, parse: Callable[[str], float] = float, name: str = "a number") -> Kind:
    def parse_within(text: str) -> float:
        value = parse(text)
        if not low <= value <= high:  # NaN is refused too
            raise ValueError
        return value

    return Kind(f"{name} from {low:g} to {high:g}", parse_within)


integer = partial(number, parse=int, name="a whole number")


def matching(pattern: str, accepts: str) -> Kind:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError
        return text

    return Kind(accepts, parse)


def split_commas(text: str) -> list[str]:
    entries = map(str.strip, text.split(","))
    return [entry for entry in entries if entry]


def comma_separated(pattern: str, accepts: str) -> Kind:
    def parse(text: str) -> tuple[str, ...]:
        entries = split_commas(text)
        if not all(re.fullmatch(pattern, entry) for entry in entries):
            raise ValueError
        return tuple(entries)

    return Kind(f"{accepts}; several are separated by commas", parse)


def parse_model_table(text: str) -> dict[str, str]:
    table = {}
    for entry in split_commas(text):
        model, _, upstream_name = map(str.strip, entry.partition("="))
        if not (model and upstream_name):
            raise ValueError
        table[model] = upstream_name
    if not table:
        raise ValueError
    return table


def last_name(table: Mapping[str, str], model: str) -> str:
    """The upstream name of an entry of MODELS, which may lead to it by way of others. Raises SettingError."""
    seen = [model]
    name = table[model]
    while name in table and name != seen[-1]:
        if name in seen:
            raise SettingError(f"MODELS: {' = '.join([*seen, name])} is a cycle")
        seen.append(name)
        name = table[name]
    return name


@dataclass(frozen=True)
class ClientKey:
    """A key that clients send. Its name appears in usage and in the log, it itself nowhere."""

    key: str = ""  # none is asked
    name: str | None = None

    @cached_property
    def owner(self) -> str:
        """What sessions and counters are kept under."""
        return sha256(self.key.encode()).hexdigest()[:32]


def parse_client_keys(text: str) -> tuple[ClientKey, ...]:
    keys: list[ClientKey] = []
    for entry in split_commas(text):
        found = re.fullmatch(r"(?:([\w.-]+):)?([!-~]+)", entry, re.A)
        if not found or entry.endswith(":"):  # a name whose key is missing must not become a key
            raise ValueError
        for known in keys:
            if known.key == found[2] and known.name != found[1]:  # only the first would have its limits
                raise SettingError("API_MASTER_KEY: the same key stands there under two names")
        keys.append(ClientKey(found[2], found[1]))
    return tuple(keys)


def parse_limits(text: str) -> dict[str, int]:
    """Limits by the names of keys; that of "" is for all others."""
    limits: dict[str, int] = {}
    for entry in split_commas(text):
        name, equals, limit = map(str.strip, entry.rpartition("="))
        if name in limits or (equals and not name) or not re.fullmatch(r"\d{1,15}", limit, re.A):
            raise ValueError
        limits[name] = int(limit)
    return {"": 0, **limits}


def parse_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError
    return text


def parse_store(text: str) -> str:
    kind, _, rest = text.partition(":")
    if kind in ("redis", "rediss"):
        parts = urlsplit(text)
        if not parts.hostname or parts.port == 0:
            raise ValueError
    elif text != "memory" and (kind != "sqlite" or not rest or "\0" in rest):
        raise ValueError
    return text


TEXT = Kind("any text", str)
HOST = Kind("a host's name or address", lambda text: text.strip("[]"))
URL = Kind("an http:// or https:// address", parse_url)
ASCII_KEY = matching("[!-~]*", "printable ASCII without spaces")
CLIENT_KEYS = Kind(
    "printable ASCII without spaces, with a name and : before it or not; several are separated by commas",
    parse_client_keys)
LIMITS = Kind("a whole number, and name=number for named keys, separated by commas", parse_limits)
MODEL_TABLE = Kind("`id=upstream name`, separated by commas", parse_model_table)
MODEL_IDS = comma_separated(r"\S+", "a model's id")
ORIGINS = comma_separated(r"\*|[\w.+-]+://[^/\s]+", "an origin such as https://app.example")
API_NAMES = comma_separated("(?!kimi$)[a-z][a-z0-9_]*", "lower-case letters, digits and _, and not kimi")
STORE = Kind("memory, sqlite:PATH, redis://HOST:PORT or rediss://HOST:PORT", parse_store)
LOG_LEVEL = matching("(?i:DEBUG|INFO|WARNING|ERROR)", "DEBUG, INFO, WARNING or ERROR")


# ======================================================================================================================
# 2 Settings
#
# One table is the only source: the environment, `.env`, command-line flags, `--help` and the README's table all come
# from the fields of `Settings`.
# ======================================================================================================================

WEB_CHAT = "kimi"  # as the name of a provider, beside those of the APIs


def setting(default: str, meaning: str, kind: Kind = TEXT) -> Any:
    return field(
        default_factory=lambda: kind.parse(default),
        metadata={"default": default, "meaning": meaning, "kind": kind},
    )


@dataclass(frozen=True)
class API:
    """An OpenAI-style API: where it is, and this server's key for it."""

    name: str
    base_url: str
    key: str


@dataclass(frozen=True)
class Settings:
    """All settings, parsed. The name of a setting is the name of its field in capitals."""

    api_master_key: tuple[ClientKey, ...] = setting(
        "", "key that clients send as `Authorization: Bearer …`; several are separated by commas, and may have names: "
        "`ann:sk-…,bob:sk-…`. Empty: no key is asked, and only this machine may call", CLIENT_KEYS)
    api_host: str = setting(
        "127.0.0.1", "address to listen on; one that is not loopback needs a key", HOST)
    api_port: int = setting(
        "8088", "port to listen on; 0 takes a free one", integer(0, 65535))
    max_concurrent_chats: int = setting(
        "64", "chats running at once; one more is answered 429", integer(1, 4096))
    session_cache_ttl: float = setting(
        "3600", "seconds a session lives after its last turn", number(1, 1e9))
    max_session_size: int = setting(
        "1000", "sessions kept; the least recently used goes first", integer(1, 10**9))
    requests_per_minute: dict[str, int] = setting(
        "0", "chats per key and minute, 0: no limit; `20,ann=60,bob=0` gives named keys their own", LIMITS)
    tokens_per_day: dict[str, int] = setting(
        "0", "tokens per key and day (UTC), 0: no limit; in the same form", LIMITS)
    session_store: str = setting(
        "memory", "where sessions, stored responses and usage are kept: `memory`, `sqlite:PATH`, or `redis://…`, "
        "`rediss://…` (extra `redis`)", STORE)
    request_timeout: float = setting(
        "60", "seconds one upstream attempt may take", number(0.1, 86400))
    max_retries: int = setting(
        "3", "further attempts after a failure that is safe to retry", integer(0, 100))
    context_max_length: int = setting(
        "1000", "characters the web chat takes in one message", integer(1, 10**9))
    default_model: str = setting("kimi", "model of a request that names none")
    models: dict[str, str] = setting(
        "kimi=moonshotai/Kimi-K2-Instruct-0905,kimi-k2-instruct-0905=moonshotai/Kimi-K2-Instruct-0905,"
        "kimi-k2-instruct=moonshotai/Kimi-K2-Instruct",
        "`id=upstream name`, separated by commas; an entry `*=…` accepts any model id", MODEL_TABLE)
    stream_interval_ms: float = setting(
        "20", "pause between pieces when an answer that arrived whole is replayed as a stream; 0: no pauses",
        number(0, 1000))
    stream_max_seconds: float = setting(
        "2", "a replay never takes longer than this: pieces grow instead", number(0, 3600))
    sse_keepalive: float = setting(
        "10", "seconds of silence before a keep-alive comment", number(0.05, 3600))
    shutdown_grace: float = setting(
        "30", "seconds that running chats get after SIGTERM or Ctrl-C", number(0, 86400))
    max_body_bytes: int = setting("4194304", "largest request body", integer(1, 2**30))
    moonshot_api_key: str = setting(
        "", "key of Moonshot's own API; its models are then `moonshot/…`", ASCII_KEY)
    moonshot_base_url: str = setting(
        "https://api.moonshot.ai/v1", "the Chinese site's is `https://api.moonshot.cn/v1`", URL)
    deepseek_api_key: str = setting(
        "", "key of DeepSeek's API; its models are then `deepseek/…`", ASCII_KEY)
    deepseek_base_url: str = setting("https://api.deepseek.com/v1", "base URL of DeepSeek's API", URL)
    qianfan_api_key: str = setting(
        "", "key of Baidu's Qianfan; its models are then `qianfan/…`", ASCII_KEY)
    qianfan_base_url: str = setting("https://qianfan.baidubce.com/v2", "base URL of Qianfan", URL)
    providers: tuple[str, ...] = setting(
        "", "names of more OpenAI-style APIs, separated by commas; for a `local`, set `LOCAL_BASE_URL` and, if it "
        "asks for one, `LOCAL_API_KEY`", API_NAMES)
    fallback_models: tuple[str, ...] = setting(
        "", "models to ask, in this order, when the one asked for cannot answer, separated by commas", MODEL_IDS)
    cors_origins: tuple[str, ...] = setting(
        "", "origins that may call from a browser, separated by commas. "
        "Empty: any when a key is set, else only those of this machine", ORIGINS)
    upstream_url: str = setting(
        "https://kimi-ai.chat/wp-admin/admin-ajax.php", "the web chat's endpoint", URL)
    chat_page_url: str = setting(
        "https://kimi-ai.chat/chat/", "the page that carries the nonce", URL)
    log_level: str = setting("INFO", "DEBUG, INFO, WARNING or ERROR", LOG_LEVEL)
    apis: Mapping[str, API] = field(default_factory=dict)  # no setting of its own: the APIs in use, by name

    @classmethod
    def load(cls, *sources: Mapping[str, str | None]) -> Settings:
        """Settings from mappings of names in capitals to text, the first that has a name wins.

        An empty text counts as not set, because that is what `${NAME:-}` of a compose file leaves.
        Raises SettingError with one line that names the setting, the value and what is accepted.
        """
        def lookup(name: str) -> str:
            for source in sources:
                text = source.get(name)
                if text:
                    return text.strip()
            return ""

        def parsed(name: str, kind: Kind, default: str = "") -> Any:
            text = lookup(name) or default
            try:
                return kind.parse(text)
            except ValueError:
                # An address may hold a password
                is_secret = name.endswith("_KEY") or "@" in text
                shown = "the value" if is_secret else repr(text)
                raise SettingError(f"{name}: {shown} is not {kind.accepts}") from None

        values = {}
        for f in cls.table():
            name = f.name.upper()
            values[f.name] = parsed(name, f.metadata["kind"], f.metadata["default"])
        table = values["models"]
        values["models"] = {model: last_name(table, model) for model in table}
        presets = [name.removesuffix("_base_url") for name in values if name.endswith("_base_url")]
        apis = {}
        for name in (*presets, *values["providers"]):
            key = parsed(f"{name}_api_key".upper(), ASCII_KEY)
            if key or name in values["providers"]:
                base_url = values.get(f"{name}_base_url") or parsed(f"{name}_base_url".upper(), URL)
                apis[name] = API(name, base_url, key)
        settings = cls(**values, apis=apis)
        settings._check_model("DEFAULT_MODEL", settings.default_model)
        for model in settings.fallback_models:
            settings._check_model("FALLBACK_MODELS", model)
        settings._check_names("REQUESTS_PER_MINUTE", settings.requests_per_minute)
        settings._check_names("TOKENS_PER_DAY", settings.tokens_per_day)
        return settings

    @classmethod
    def table(cls) -> list[Field[Any]]:
        return [f for f in fields(cls) if f.metadata]

    def resolve(self, model: str) -> tuple[str, str] | None:
        """Whom a model's id means: a provider's name, and that provider's own name for the model. None: nobody."""
        if model in self.models:
            return self._split(self.models[model])
        provider, own_name = self._split(model)
        if provider != WEB_CHAT:
            return provider, own_name
        if "*" in self.models:
            return self._split(self.models["*"])
        return None

    def _split(self, name: str) -> tuple[str, str]:
        prefix, _, own_name = name.partition("/")
        if prefix in self.apis and own_name:
            return prefix, own_name
        return WEB_CHAT, name

    def check_host(self) -> None:
        """Raises SettingError for an address that other machines can reach, when no key is asked."""
        if not self.api_master_key and not is_loopback(self.api_host):
            raise SettingError(
                f"API_HOST: {self.api_host!r} can be reached from other machines, so API_MASTER_KEY must be set; "
                "without a key only a loopback host such as 127.0.0.1 is accepted")

    def _check_model(self, name: str, model: str) -> None:
        if self.resolve(model) is None:
            raise SettingError(
                f"{name}: {model!r} is neither in MODELS ({', '.join(self.models)}) nor a model of a configured API "
                f"({', '.join(self.apis) or 'none'})")

    def _check_names(self, setting_name: str, limits: Mapping[str, int]) -> None:
        names = {client.name for client in self.api_master_key}
        for name in limits:
            if name and name not in names:
                raise SettingError(f"{setting_name}: {name!r} is not the name of a key in API_MASTER_KEY")


@lru_cache(maxsize=256)
def is_loopback(host: str | None) -> bool:
    """Whether a host name or address means this machine only."""
    host = (host or "").strip("[]").rstrip(".").lower()
    # RFC 6761 keeps the whole domain on this machine
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


ENV_LINE = re.compile(r"""
    \s* (?:export\s+)? (?P<name>\w+) \s*=\s*
    (?: "(?P<double>[^"]*)" | '(?P<single>[^']*)' | (?P<bare>.*?) )
    \s* (?:(?<=\s)\#.*)? $""", re.X)


def read_env_file(path: str, required: bool) -> dict[str, str]:
    """`NAME=value` lines of a .env file; `export`, quotes, blank lines and # comments are understood."""
    values = {}
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number_of_line, line in enumerate(lines, 1):
                entry = ENV_LINE.match(line)
                if entry:
                    if entry["bare"] and entry["bare"][0] in "\"'":
                        raise SettingError(f"{path}: line {number_of_line}: the quotes of {entry['name']} do not match")
                    values[entry["name"]] = entry["double"] or entry["single"] or entry["bare"] or ""
    except (OSError, UnicodeDecodeError) as error:
        if required or not isinstance(error, FileNotFoundError):
            raise SettingError(f"{path}: cannot be read: {error}") from None
    return values


# ======================================================================================================================
# 3 Errors and JSON
#
# Every expected failure is an APIError; `body()` is the only place that knows OpenAI's shape for it.
# JSON is read strictly, by one reader for the caller's and one for upstream's, and written as UTF-8.
# ======================================================================================================================


@dataclass(eq=False)
class APIError(Exception):
    """An error for the caller, in the terms of OpenAI's API.

    One error may be raised in several threads, so it is immutable by convention: `copy` makes a changed one. What is
    kept is a copy: the traceback of a raised one holds all that its functions knew, a request of megabytes too.
    """

    status: int
    message: str
    type: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    headers: Headers = field(default_factory=dict)
    retryable: bool = False  # the same call may succeed a moment later, and repeating it is safe
    retry_after: float = 0.0  # seconds that upstream asked us to wait, 0 if it did not
    quotes_upstream: bool = False  # the message quotes upstream, which may repeat the prompt

    def __str__(self) -> str:
        return self.message

    def copy(self, **changes: Any) -> APIError:
        """The same error, but for some of its fields."""
        return replace(self, **changes)

    def with_headers(self, headers: Headers) -> APIError:
        return self.copy(headers={**self.headers, **headers})

    @property
    def reason(self) -> str:
        """What may go into the log and /health: without the prompt."""
        code = self.code or self.type
        # Upstream's own may quote the prompt too
        if self.quotes_upstream and not re.fullmatch(r"[\w.-]{1,64}", code):
            code = "error"
        kind = f"{code} ({self.status})"
        return kind if self.quotes_upstream else f"{kind}: {self.message}"

    @property
    def may_fall_back(self) -> bool:
        """Whether another upstream may succeed: this one failed, or the prompt is too long for it."""
        return self.status >= 500 or self.status == 429 or self.code == "context_length_exceeded"

    def body(self) -> JSONObject:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


NO_SDK_RETRY = {"x-should-retry": "false"}  # obeyed by OpenAI's SDKs


def bad_request(message: str, param: str | None = None, code: str | None = None) -> APIError:
    return APIError(400, message, param=param, code=code)


def upstream_error(status: int, code: str, message: str, **more: Any) -> APIError:
    return APIError(status, message, "upstream_error", code, **more)


def invalid_response(upstream: str, what: str, retryable: bool = False) -> APIError:
    return upstream_error(502, "upstream_invalid_response", f"{upstream} sent {what}.", retryable=retryable)


def random_hex() -> str:
    """32 hex digits for ids that need not be secret; uuid4 makes a system call, which releases the GIL each time."""
    return f"{random.getrandbits(128):032x}"


def client_disconnected() -> APIError:
    """Nobody will read it; the status is nginx's for the log."""
    return APIError(499, "The client has disconnected.", code="client_closed_request")


def as_api_error(error: Exception) -> APIError:
    """The error itself if it is an APIError; any other is logged with its traceback and becomes a 500."""
    if isinstance(error, APIError):
        return error
    log.error("unexpected error", exc_info=error)
    return APIError(500, "Internal server error; see the server's log.", "server_error", "internal_error")


def finite(text: str) -> float:
    """Rejects NaN and Infinity, which Python reads although they are not JSON, and 1e999, which would become one."""
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{text[:20]} is not a number in JSON")
    return value


STRICT_JSON = json.JSONDecoder(parse_constant=finite, parse_float=finite)
COMPACT_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
LINE_SEPARATORS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}  # some clients split events there


MAX_DEPTH = 300  # of JSON, so that all that walks through it may be recursive
VALUE_BYTES = 60  # that a value of JSON takes in Python, at most about
MAX_PARSED_DOCUMENT = 24 << 20  # bytes that one of an upstream's may take


def parse_json(source: str) -> Any:
    """Raises ValueError for what is not JSON, or is nested too deep."""
    try:
        value = STRICT_JSON.decode(source)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if source.count("{") + source.count("[") > MAX_DEPTH:
        check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Raises ValueError for a value that is nested deeper than MAX_DEPTH."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for outer in level:
            if isinstance(outer, dict):
                inner.extend(outer.values())
            elif isinstance(outer, list):
                inner.extend(outer)
        if not inner:
            return
        level = inner
    raise ValueError("nested too deep")


def parsed_size(source: bytes) -> int:
    """Bytes that JSON takes when it is read, about: 4 MB of brackets take 90."""
    return len(source) + VALUE_BYTES * (source.count(b",") + source.count(b"[") + source.count(b"{"))


def parse_upstream_json(data: bytes, max_parsed: int = MAX_PARSED_DOCUMENT) -> Any:
    """What an upstream sent, with U+FFFD for what cannot be sent on as UTF-8. Raises ValueError."""
    if parsed_size(data) > max_parsed:
        raise ValueError("too many values")
    source = data.decode("utf-8-sig", "replace")
    value = parse_json(source)
    if "\\ud" in source.lower():  # escapes are the only way that surrogates get in
        value = parse_json(replace_lone_surrogates(COMPACT_JSON.encode(value)))
    return value


def dump_json(value: Any) -> bytes:
    text = COMPACT_JSON.encode(value)
    if not text.isascii():
        for separator, escape in LINE_SEPARATORS.items():
            text = text.replace(separator, escape)
    return text.encode()


def replace_lone_surrogates(text: str) -> str:
    """Text with U+FFFD for lone surrogates, which cannot be encoded as UTF-8."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ======================================================================================================================
# 4 Schemas
#
# JSON Schema, as far as requests and answers need it: short ways to write a schema, and what finds the place where a
# value breaks one.
# ======================================================================================================================

Schema = JSONObject
STRING: Schema = {"type": "string"}
NON_EMPTY: Schema = {"type": "string", "minLength": 1}
NUMBER: Schema = {"type": "number"}
INTEGER: Schema = {"type": "integer"}
BOOLEAN: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}
NULL: Schema = {"type": "null"}
COUNT: Schema = {"type": "integer", "minimum": 0}
POSITIVE: Schema = {"type": "integer", "minimum": 1}


def array(items: Schema, **bounds: int) -> Schema:
    return {"type": "array", "items": items, **bounds}


def any_of(*options: Schema) -> Schema:
    return {"anyOf": list(options)}


def choice_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def object_of(required: Schema, optional: Schema | None = None, **more: Any) -> Schema:
    properties = {**required, **(optional or {})}
    return {"type": "object", "properties": properties, "required": sorted(required), **more}


def record(required: Schema, optional: Schema | None = None, **more: Any) -> Schema:
    """An object in a request: a field that may be missing may be null as well, as OpenAI's server has it."""
    nullable = {name: any_of(schema, NULL) for name, schema in (optional or {}).items()}
    return object_of(required, nullable, **more)


def when(name: str, values: list[Any], then: Schema) -> Schema:
    """Keywords of an object schema: where the field has one of these values, `then` holds too. None: or is missing."""
    condition: Schema = {"properties": {name: {"enum": values}}}
    if None not in values:
        condition["required"] = [name]
    return {"if": condition, "then": then}


def record_by_type(records: Mapping[str, Schema], default: str | None = None) -> Schema:
    """An object in a request whose `type` decides what else is in it. default: the type of one that names none."""
    types = {"type": choice_of(*records)}
    rules = [when("type", [name], then) for name, then in records.items()]
    if default is None:
        return record(types, allOf=rules)
    rules.append(when("type", [None], records[default]))
    return record({}, types, allOf=rules)


TYPES: dict[str, tuple[Any, str]] = {
    "object": (dict, "an object"),
    "array": (list, "a list"),
    "string": (str, "a string"),
    "boolean": (bool, "true or false"),
    "integer": (int, "a whole number"),
    "number": ((int, float), "a number"),
    "null": (type(None), "null"),
}


@dataclass(frozen=True)
class Violation:
    """Where a value breaks its schema: a path such as messages[0].role, and the schema that holds there."""

    path: str
    schema: Schema

    @property
    def depth(self) -> int:
        return len(re.findall(r"\w+", self.path))


def find_violation(value: Any, schema: Schema, path: str = "") -> Violation | None:
    """The first violation of a JSON schema by a value, or None. Knows the keywords that the schemas here use.

    Of an anyOf, the deepest violation is reported: it belongs to the alternative that was most likely meant.
    """
    if "anyOf" in schema:
        deepest = Violation(path, schema)
        for option in schema["anyOf"]:
            violation = find_violation(value, option, path)
            if violation is None:
                return None
            if violation.depth > deepest.depth:
                deepest = violation
        return deepest
    if not is_within_bounds(value, schema):
        return Violation(path, schema)
    if isinstance(value, dict):
        return find_field_violation(value, schema, path)
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            violation = find_violation(item, schema["items"], f"{path}[{index}]")
            if violation:
                return violation
    return None


def find_field_violation(value: JSONObject, schema: Schema, path: str) -> Violation | None:
    prefix = f"{path}." if path else ""
    for name in schema.get("required", ()):
        if name not in value:
            return Violation(prefix + name, schema["properties"][name])
    for name, field_schema in schema.get("properties", {}).items():
        if name in value:
            violation = find_violation(value[name], field_schema, prefix + name)
            if violation:
                return violation
    for condition in (schema, *schema.get("allOf", ())):
        if "if" in condition and find_violation(value, condition["if"]) is None:
            violation = find_violation(value, condition["then"], path)
            if violation:
                return violation
    return None


def is_within_bounds(value: Any, schema: Schema) -> bool:
    """Whether a value is of the schema's type, one of its values and within its bounds, whatever is inside."""
    if "type" in schema and not is_of_type(value, schema["type"]):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    for keyword in ("minimum", "minLength", "minItems"):
        if keyword in schema and size_of(value) < schema[keyword]:
            return False
    return "maxItems" not in schema or len(value) <= schema["maxItems"]


def is_of_type(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"  # Python's is an int, too
    if name == "integer" and isinstance(value, float):
        return value.is_integer()  # 1.0 is an integer of JSON
    return isinstance(value, TYPES[name][0])


def size_of(value: Any) -> float:
    return len(value) if isinstance(value, (str, list)) else value


def describe(schema: Schema) -> str:
    """What a value must be, in words."""
    if "anyOf" in schema:
        return " or ".join(describe(option) for option in schema["anyOf"] if option is not NULL)
    if "enum" in schema:
        values = [value or json.dumps(value) for value in schema["enum"]]
        return f"one of {', '.join(values)}" if len(values) > 1 else str(values[0])
    words = TYPES[schema["type"]][1]
    if "minLength" in schema:
        words += " that is not empty"
    if "minItems" in schema and schema["minItems"] == schema.get("maxItems"):
        return f"{words} of {schema['minItems']}"
    for keyword in ("minimum", "minItems"):
        if keyword in schema:
            words += f" of at least {schema[keyword]}"
    if "maxItems" in schema:
        words += f" of at most {schema['maxItems']}"
    return words


# ======================================================================================================================
# 5 Requests
#
# The schemas of what a caller may send: they check a request and are what /openapi.json shows. What they cannot say,
# because it compares two fields, is code. A message stays the dict that the client sent; what an upstream cannot do
# with it (images, say) is that upstream's to refuse. Fields and meanings: OpenAI's chat completions reference.
# ======================================================================================================================

ROLES = ["system", "developer", "user", "assistant", "tool", "function"]

CONTENT_PART = record({"type": STRING}, **when("type", ["text"], record({"text": STRING})))
TOOL_CALL = record({"function": record({"name": STRING, "arguments": STRING})}, {"id": STRING})
MESSAGE = record(
    {"role": choice_of(*ROLES)},
    {
        "content": any_of(STRING, array(CONTENT_PART)),
        "tool_calls": array(TOOL_CALL),
        "tool_call_id": STRING,
    },
    # an assistant's message may consist of tool calls alone
    **when("role", [role for role in ROLES if role != "assistant"], record({"content": any_of(STRING, array(OBJECT))})),
)
FUNCTION = record({"name": NON_EMPTY}, {"description": STRING, "parameters": OBJECT})
TOOL = record({"type": STRING}, **when("type", ["function"], record({"function": FUNCTION})))
NAMED_TOOL = record(
    {}, {"type": STRING}, **when("type", ["function", None], record({"function": record({"name": STRING})})))
TOOL_CHOICE = any_of(choice_of("none", "auto", "required"), NAMED_TOOL)
ALLOWED_TOOLS = record({"allowed_tools": record({"mode": choice_of("auto", "required"), "tools": array(NAMED_TOOL)})})
RESPONSE_FORMAT = record(
    {"type": choice_of("text", "json_object", "json_schema")},
    {"json_schema": OBJECT},
    **when("type", ["json_schema"], record({"json_schema": record({"schema": OBJECT})})),
)
CHAT_REQUEST = record(
    {"messages": array(MESSAGE, minItems=1)},
    {
        "model": STRING,
        "user": STRING,
        "stream": BOOLEAN,
        "stream_options": record({}, {"include_usage": BOOLEAN}),
        "stop": any_of(STRING, array(STRING, maxItems=4)),
        "max_tokens": POSITIVE,
        "max_completion_tokens": POSITIVE,
        "n": POSITIVE,
        "tools": array(TOOL),
        "tool_choice": TOOL_CHOICE,
        "parallel_tool_calls": BOOLEAN,
        "response_format": RESPONSE_FORMAT,
        "temperature": NUMBER,
        "top_p": NUMBER,
        "presence_penalty": NUMBER,
        "frequency_penalty": NUMBER,
        "seed": INTEGER,
        "logprobs": BOOLEAN,
        "logit_bias": OBJECT,
        "modalities": array(STRING),
        "audio": OBJECT,
    },
)
SHARED_PARAMETERS = (
    "model", "user", "stream", "stream_options", "stop", "max_tokens", "n", "temperature", "top_p", "presence_penalty",
    "frequency_penalty", "seed", "logit_bias",
)
COMPLETION_REQUEST = record(  # of the API before chats, for the programs that still speak it
    {"prompt": any_of(STRING, array(STRING, minItems=1, maxItems=1))},
    {
        "echo": {"enum": [False]},
        "suffix": {"enum": [""]},
        "best_of": {"enum": [1]},
        "logprobs": {"enum": [False]},
        **{name: CHAT_REQUEST["properties"][name] for name in SHARED_PARAMETERS},
    },
)
EMBEDDINGS_REQUEST = record(
    {"input": any_of(NON_EMPTY, {"type": "array", "minItems": 1})},  # of texts or of tokens
    {
        "model": STRING,
        "user": STRING,
        "encoding_format": choice_of("float", "base64"),
        "dimensions": POSITIVE,
    },
)

@dataclass(frozen=True)
class ChatRequest:
    """A checked request for a chat completion."""

    body: JSONObject  # the whole of it, unknown fields included
    messages: list[Message]
    model: str | None
    user: str | None
    stream: bool
    include_usage: bool
    stop: list[str]
    max_tokens: int | None
    tools: list[JSONObject]  # the functions that may be called, by `tools` and `tool_choice`
    must_call: bool  # one of them has to be

    @classmethod
    def parse(cls, raw: bytes) -> ChatRequest:
        """Raises APIError 400 with `param` naming the field."""
        return cls.of(parse_body(raw, CHAT_REQUEST))

    @classmethod
    def parse_completion(cls, raw: bytes) -> ChatRequest:
        """A request of the API before chats: its prompt is the message of a user. Raises APIError 400."""
        body = parse_body(raw, COMPLETION_REQUEST)
        prompt = body["prompt"] if isinstance(body["prompt"], str) else body["prompt"][0]
        chat: JSONObject = {"messages": [{"role": "user", "content": prompt}]}
        for name in SHARED_PARAMETERS:
            if name in body:
                chat[name] = body[name]
        return cls.of(chat)

    @classmethod
    def of(cls, body: JSONObject) -> ChatRequest:
        stop = body.get("stop") or []
        if isinstance(stop, str):
            stop = [stop]
        return cls(
            body=body,
            messages=body["messages"],
            model=body.get("model") or None,
            user=body.get("user") or None,
            stream=bool(body.get("stream")),
            include_usage=bool((body.get("stream_options") or {}).get("include_usage")),
            stop=[text for text in stop if text],
            max_tokens=body.get("max_completion_tokens") or body.get("max_tokens"),
            tools=allowed_functions(body),
            must_call=must_call(body.get("tool_choice")),
        )

    @cached_property
    def system(self) -> list[Message]:
        return [message for message in self.messages if is_system(message)]

    @cached_property
    def turns(self) -> list[Turn]:
        """The messages but the system's, grouped so that each turn begins with a user's message."""
        turns: list[list[Message]] = []
        for message in self.messages:
            if is_system(message):
                continue
            if message["role"] == "user" or not turns:
                turns.append([])
            turns[-1].append(message)
        return [tuple(turn) for turn in turns]

    @property
    def has_history(self) -> bool:
        return any(message["role"] == "assistant" for message in self.messages)


def parse_body(raw: bytes, schema: Schema) -> JSONObject:
    """The caller's JSON. Raises APIError 400, also for lone surrogates, which no later step could encode."""
    try:
        source = raw.decode("utf-8-sig")
        body = parse_json(source)
        if "\\u" in source:
            dump_json(body)
    except ValueError as error:
        raise bad_request(f"The body is not valid JSON in UTF-8: {error}"[:300]) from None
    if not isinstance(body, dict):
        raise bad_request("The body must be a JSON object.")
    check(body, schema)
    return body


def check(value: Any, schema: Schema, path: str = "") -> None:
    """Raises APIError 400 for a value that breaks its schema."""
    violation = find_violation(value, schema, path)
    if violation:
        raise bad_request(f"'{violation.path}' must be {describe(violation.schema)}.", violation.path)


def allowed_functions(body: JSONObject) -> list[JSONObject]:
    """The functions that `tool_choice` lets the model call. Raises APIError 400 for a choice that 'tools' lacks."""
    functions = [tool["function"] for tool in body.get("tools") or () if tool["type"] == "function"]
    choice = body.get("tool_choice")
    if choice == "none":
        return []
    if choice == "required" and not body.get("tools"):
        raise bad_request("'tool_choice' is 'required', but there are no 'tools'.", "tool_choice")
    if names_function(choice):
        named = functions_among(functions, [choice])
        if not named:
            raise bad_request("'tool_choice' names a function that is not in 'tools'.", "tool_choice.function.name")
        return named
    if allows_tools(choice):
        check(choice, ALLOWED_TOOLS, "tool_choice")
        tools = list(filter(names_function, choice["allowed_tools"]["tools"]))
        allowed = functions_among(functions, tools)
        if must_call(choice) and tools and not allowed:
            raise bad_request("'tool_choice' allows no function that is in 'tools'.", "tool_choice.allowed_tools.tools")
        return allowed
    return functions


def functions_among(functions: list[JSONObject], tools: list[JSONObject]) -> list[JSONObject]:
    """Those functions that the tools name."""
    names = {tool["function"]["name"] for tool in tools}
    return [function for function in functions if function["name"] in names]


def names_function(choice: Any) -> TypeGuard[JSONObject]:
    return isinstance(choice, dict) and choice.get("type") in (None, "function")


def must_call(choice: Any) -> bool:
    if allows_tools(choice):
        return bool(choice["allowed_tools"]["mode"] == "required")
    return choice not in (None, "none", "auto")


def allows_tools(choice: Any) -> TypeGuard[JSONObject]:
    return isinstance(choice, dict) and choice.get("type") == "allowed_tools"


def append_turns(history: Iterable[Turn], turns: Iterable[Turn]) -> Turns:
    """History, then turns. One that begins with a tool's result goes on with the turn of its call, which becomes the
    newest, or else with the turn before."""
    whole = list(history)
    for turn in turns:
        if whole and turn[0]["role"] != "user":
            turn = whole.pop(place_of_call(whole, turn[0])) + turn
        whole.append(turn)
    return tuple(whole)


def place_of_call(turns: list[Turn], result: Message) -> int:
    """The index of the turn in which the tool was called, else of the last."""
    call_id = result.get("tool_call_id")
    for index in reversed(range(len(turns))):
        for message in turns[index]:
            if call_id and any(call.get("id") == call_id for call in message.get("tool_calls") or ()):
                return index
    return len(turns) - 1


def slimmed(message: Message) -> Message:
    """What is remembered of a message: a client may put megabytes into fields that nobody asks for."""
    slim: Message = {"role": message["role"], "content": text_of(message)}
    if message.get("tool_call_id"):
        slim["tool_call_id"] = message["tool_call_id"]
    if message.get("tool_calls"):
        slim["content"] = slim["content"] or None
        slim["tool_calls"] = [
            {
                "id": call.get("id"),
                "type": "function",
                "function": {"name": call["function"]["name"], "arguments": call["function"]["arguments"]},
            }
            for call in message["tool_calls"]
        ]
        # Moonshot and DeepSeek want it back
        if isinstance(message.get("reasoning_content"), str):
            slim["reasoning_content"] = message["reasoning_content"]
    return slim


def is_system(message: Message) -> bool:
    return message["role"] in ("system", "developer")


def text_of(message: Message) -> str:
    """The text of a message, whether its content is a string, a list of parts, or null."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


# ======================================================================================================================
# 6 Responses items
#
# What the Responses API's conversations consist of, read as messages of a chat. Fields and meanings: OpenAI's Responses
# reference.
# ======================================================================================================================

TEXT_PART = record({"text": STRING})
INPUT_PART = record_by_type({
    "input_text": TEXT_PART,
    "output_text": TEXT_PART,
    "refusal": record({"refusal": STRING}),
    "input_image": record({"image_url": STRING}, {"detail": STRING}),
    "input_file": record({}, {"file_data": STRING, "file_id": STRING, "filename": STRING}),
})
INPUT_CONTENT = any_of(STRING, array(INPUT_PART))
CALL_FIELDS = {"call_id": STRING, "name": NON_EMPTY}
CALL_OUTPUT = record({"call_id": STRING, "output": INPUT_CONTENT})
INPUT_ITEM = record_by_type(
    {
        "message": record({
            "role": choice_of("user", "assistant", "system", "developer"),
            "content": INPUT_CONTENT,
        }),
        "reasoning": record({}, {
            "summary": array(TEXT_PART),
            "content": array(TEXT_PART),
            "encrypted_content": STRING,
        }),
        "function_call": record({**CALL_FIELDS, "arguments": STRING}, {"namespace": STRING}),
        "function_call_output": CALL_OUTPUT,
        "custom_tool_call": record({**CALL_FIELDS, "input": STRING}, {"namespace": STRING}),
        "custom_tool_call_output": CALL_OUTPUT,
        "item_reference": record({"id": STRING}),
    },
    default="message",
)
ENCODED_REASONING = "kimi2api:"  # before the base64 of what an API has told; it is no secret from the client


@dataclass(frozen=True)
class ToolName:
    """A tool as the client knows it; the upstream knows all of them as functions."""

    name: str
    namespace: str | None = None
    is_custom: bool = False  # it takes a text

    @property
    def function(self) -> str:
        return f"{self.namespace}__{self.name}" if self.namespace else self.name


def function_of(item: JSONObject) -> str:
    """The function's name of a tool that an item or a choice names."""
    return ToolName(item.get("name") or "", item.get("namespace")).function


def read_items(items: list[JSONObject], go_on: bool = False) -> dict[str, Message]:
    """Items as messages, by the places in the input where they begin.

    What an assistant did in one step is one message: its reasoning, its text and its calls, up to their results. These
    come right behind it, as APIs want them, also where the input has something in between. go_on: those of calls that
    are not here come first, behind the response that the input goes on from.
    """
    found: list[tuple[int, str, Message]] = []  # by the index of the item that each belongs behind
    steps: dict[str, int] = {}  # the same of calls, by their ids
    answer: Message | None = None  # the assistant's message that items still add to
    step = 0  # and where it begins
    for index, item in enumerate(items):
        kind = item.get("type") or "message"
        place = f"input[{index}]"
        if kind == "message" and item["role"] != "assistant":
            # Not every API knows developers
            role = "user" if item["role"] == "user" else "system"
            content = as_content(read_parts(item["content"], f"{place}.content"))
            found.append((index, place, {"role": role, "content": content}))
            answer = None
        elif kind.endswith("_output"):
            content = as_content(read_parts(item["output"], f"{place}.output"))
            result = {"role": "tool", "tool_call_id": item["call_id"], "content": content}
            found.append((steps.get(item["call_id"], -1 if go_on else index), place, result))
            answer = None
        else:
            if answer is None or (kind in ("message", "reasoning") and has_text_alone(answer)):
                answer = {"role": "assistant", "content": []}
                step = index
                found.append((step, place, answer))
            add_to_answer(answer, item, kind, place)
            if "call_id" in item:
                steps[item["call_id"]] = step
    found.sort(key=itemgetter(0))
    messages: dict[str, Message] = {}
    for _, place, message in found:
        if message["role"] == "assistant":
            message["content"] = as_content(message["content"]) or None
            if message["content"] is None and "tool_calls" not in message:
                continue  # reasoning that nothing followed
            if "reasoning_content" in message:
                message["reasoning_content"] = "".join(message["reasoning_content"])
        messages[place] = message
    return messages


def has_text_alone(answer: Message) -> bool:
    """Whether an assistant's message is complete: what follows its text is calls, or another message."""
    return bool(answer["content"]) and "tool_calls" not in answer


def add_to_answer(answer: Message, item: JSONObject, kind: str, place: str) -> None:
    """Add an item to an assistant's message, whose content and reasoning are lists yet."""
    if kind == "message":
        answer["content"] += read_parts(item["content"], f"{place}.content")
    elif kind == "reasoning":
        text = read_reasoning(item)
        if text:
            answer.setdefault("reasoning_content", []).append(text)
    else:
        arguments = item["arguments"] if kind == "function_call" else dump_json({"input": item["input"]}).decode()
        function = {"name": function_of(item), "arguments": arguments}
        answer.setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})


def read_parts(content: Any, place: str) -> list[JSONObject]:
    """Content as parts that chats have; empty texts are left out. Raises APIError 400."""
    if isinstance(content, str):
        content = [{"type": "input_text", "text": content}]
    parts: list[JSONObject] = []
    for part in content:
        kind = part["type"]
        if kind == "refusal":
            parts.append({"type": "refusal", "refusal": part["refusal"]})
        elif kind == "input_image":
            image = {"url": part["image_url"]}
            if part.get("detail"):
                image["detail"] = part["detail"]
            parts.append({"type": "image_url", "image_url": image})
        elif kind == "input_file":
            file = {name: part[name] for name in ("file_data", "file_id", "filename") if part.get(name)}
            if not file.keys() & {"file_data", "file_id"}:
                raise bad_request(f"'{place}' has a file without file_data or file_id.", place)
            parts.append({"type": "file", "file": file})
        elif part["text"]:
            parts.append({"type": "text", "text": part["text"]})
    return parts


def as_content(parts: list[JSONObject]) -> Any:
    """A text, or the parts where there is more than text."""
    return joined_text(parts) if all(part["type"] == "text" for part in parts) else parts


def joined_text(parts: list[JSONObject]) -> str:
    return "\n".join(part["text"] for part in parts)


def read_reasoning(item: JSONObject) -> str:
    """The reasoning that an item carries, as an API has told it; else its summary."""
    encoded = item.get("encrypted_content") or ""
    if item.get("content"):
        return joined_text(item["content"])
    if encoded.startswith(ENCODED_REASONING):  # else it is another server's
        with suppress(ValueError):
            return b64decode(encoded[len(ENCODED_REASONING):], validate=True).decode()
    return joined_text(item.get("summary") or [])


# ======================================================================================================================
# 7 Responses requests
#
# Read as requests for a chat: items become messages, flat tools nested ones. What goes wrong with the chat is told in
# this API's own terms.
# ======================================================================================================================

FUNCTION_TOOL = when("type", ["function", "custom"], FUNCTION)
NAMESPACE = record({"name": NON_EMPTY, "tools": array(record({"type": STRING}, **FUNCTION_TOOL))})
RESPONSES_TOOL = record({"type": STRING}, allOf=[FUNCTION_TOOL, when("type", ["namespace"], NAMESPACE)])
CHOSEN_TOOL = record({"name": STRING}, {"namespace": STRING})
CHOSEN_TOOLS = record_by_type({
    "function": CHOSEN_TOOL,
    "custom": CHOSEN_TOOL,
    "allowed_tools": record({
        "mode": choice_of("auto", "required"),
        "tools": array(record({"type": STRING}, {"name": STRING, "namespace": STRING})),
    }),
})
TEXT_FORMAT = record_by_type({
    "text": record({}),
    "json_object": record({}),
    "json_schema": record({"schema": OBJECT}),
})
RESPONSES_REQUEST = record(
    {"input": any_of(STRING, array(INPUT_ITEM, minItems=1))},
    {
        "model": STRING,
        "instructions": STRING,
        "previous_response_id": STRING,
        "store": BOOLEAN,
        "stream": BOOLEAN,
        "tools": array(RESPONSES_TOOL),
        "tool_choice": any_of(choice_of("none", "auto", "required"), CHOSEN_TOOLS),
        "parallel_tool_calls": BOOLEAN,
        "text": record({}, {"format": TEXT_FORMAT}),
        "reasoning": record({}, {"effort": STRING}),
        "include": array(STRING),
        "max_output_tokens": POSITIVE,
        "temperature": NUMBER,
        "top_p": NUMBER,
        "user": STRING,
        "metadata": OBJECT,
        "service_tier": STRING,
        "safety_identifier": STRING,
        "prompt_cache_key": STRING,
        "truncation": choice_of("auto", "disabled"),
        "max_tool_calls": POSITIVE,
        "top_logprobs": COUNT,
    },
)
MAX_IGNORED = 20  # types of tools
UNSUPPORTED = ("background", "conversation", "prompt")
SAME_IN_CHATS = (
    "model", "stream", "temperature", "top_p", "user", "metadata", "service_tier", "safety_identifier",
    "prompt_cache_key",
)
PARAMS = {  # of a request for a chat, in the words of this API
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "tool_choice.function.name": "tool_choice.name",
    "tool_choice.allowed_tools.tools": "tool_choice.tools",
}


@dataclass(frozen=True)
class ResponsesRequest:
    """A checked request for a response."""

    body: JSONObject
    messages: dict[str, Message]  # of its instructions and input, by their places in it: input[0]
    functions: dict[str, JSONObject] = field(default_factory=dict)  # its tools, as chats have them, likewise
    tools: dict[str, ToolName] = field(default_factory=dict)  # the same, by the names of their functions
    ignored: list[str] = field(default_factory=list)  # types of tools that only OpenAI can run

    @classmethod
    def parse(cls, raw: bytes, find_item: Callable[[str], JSONObject | None]) -> ResponsesRequest:
        """find_item: an item of a stored response, by its id. Raises APIError 400 with `param` naming the field."""
        body = parse_body(raw, RESPONSES_REQUEST)
        for name in UNSUPPORTED:
            if body.get(name):
                raise bad_request(f"'{name}' is not supported.", name, "unsupported_value")
        items = body["input"]
        if isinstance(items, str):
            items = [{"role": "user", "content": items}]
        messages = read_items(without_references(items, find_item), bool(body.get("previous_response_id")))
        if not messages:
            raise bad_request("'input' has no message.", "input")
        if body.get("instructions"):
            messages = {"instructions": {"role": "system", "content": body["instructions"]}, **messages}
        request = cls(body, messages)
        request._read_tools(body.get("tools") or [], "tools", None)
        return request

    @property
    def is_stored(self) -> bool:
        return self.body.get("store") is not False

    @property
    def wants_encoded_reasoning(self) -> bool:
        return "reasoning.encrypted_content" in (self.body.get("include") or ())

    @property
    def system_items(self) -> list[Message]:
        """System messages of the input, which later responses go on from; the instructions are for this one alone."""
        return [
            message for place, message in self.messages.items()
            if is_system(message) and place != "instructions"
        ]

    def chat(self, system: Iterable[Message] = ()) -> ChatRequest:
        """The request for a chat, after system messages of the responses before it. It opens no session of its `user`.

        Raises APIError 400, in the terms of chats; see `in_own_terms`.
        """
        body = self.body
        text = body.get("text") or {}
        reasoning = body.get("reasoning") or {}
        choice = body.get("tool_choice")
        fields = {
            "messages": [*system, *self.messages.values()],
            "max_tokens": body.get("max_output_tokens"),
            "reasoning_effort": reasoning.get("effort") or None,
            "response_format": as_response_format(text.get("format")),
        }
        for name in SAME_IN_CHATS:
            fields[name] = body.get(name)
        if self.functions:
            fields["tools"] = list(self.functions.values())
            fields["parallel_tool_calls"] = body.get("parallel_tool_calls")
        if self.functions or choice not in ("auto", "none"):
            fields["tool_choice"] = as_tool_choice(choice)
        chat = {name: value for name, value in fields.items() if value is not None}
        return replace(ChatRequest.of(chat), user=None)

    def in_own_terms(self, error: APIError, earlier: int) -> APIError:
        """An error of the chat, told of the field that this request has for it. earlier: messages that the chat has
        before those of this request."""
        if error.param is None:
            return error
        param = self._own_param(error, earlier)
        return error.copy(param=param, message=error.message.replace(f"'{error.param}'", f"'{param}'"))

    def _own_param(self, error: APIError, earlier: int) -> str:
        name = error.param or ""
        found = re.fullmatch(r"(messages|tools)(?:\.?\[(\d{1,9})\])?(.*)", name, re.S)
        if not found:
            for of_chats, own in PARAMS.items():
                if name == of_chats or name.startswith(f"{of_chats}."):
                    return own + name[len(of_chats):]
            return name
        index = int(found[2] or -1)
        if found[1] == "tools":
            place = dict(enumerate(self.functions)).get(index)
            return place + found[3].removeprefix(".function") if place else "tools"
        place = dict(enumerate(self.messages)).get(index - earlier)
        counts_others = error.quotes_upstream and self.body.get("previous_response_id")
        if place is None or counts_others:
            return "input"
        if place != "instructions" and found[3].startswith(".content"):
            content = ".output" if self.messages[place]["role"] == "tool" else ".content"
            place += content + found[3].removeprefix(".content")
        return place

    def _read_tools(self, tools: list[JSONObject], path: str, namespace: str | None) -> None:
        for index, tool in enumerate(tools):
            place = f"{path}[{index}]"
            kind = tool["type"]
            if kind == "namespace" and namespace is None:
                self._read_tools(tool["tools"], f"{place}.tools", tool["name"])
            elif kind in ("function", "custom"):
                name = ToolName(tool["name"], namespace, kind == "custom")
                if self.tools.setdefault(name.function, name) != name:
                    raise bad_request(f"'{place}.name': another tool is {name.function!r} too.", f"{place}.name")
                self.functions[place] = {"type": "function", "function": as_function(tool, name)}
            elif kind not in self.ignored:
                can_be_told = re.fullmatch(r"[\w.-]{1,64}", kind, re.A)  # in a header
                if not can_be_told or len(self.ignored) == MAX_IGNORED:
                    raise bad_request(f"'{place}.type' is not a type of tools that is known.", f"{place}.type")
                self.ignored.append(kind)


def without_references(
    items: list[JSONObject], find_item: Callable[[str], JSONObject | None],
) -> list[JSONObject]:
    """The items, with stored ones in the place of references to them. Raises APIError 400."""
    resolved = []
    known: set[str] = set()
    for index, item in enumerate(items):
        if item.get("type") == "item_reference":
            id = item["id"]
            if id in known:  # many times a large item would make a small request any size
                raise bad_request(f"Duplicate item found with id {id[:100]!r}.", f"input[{index}].id")
            known.add(id)
            found = find_item(id)
            if found is None:
                raise bad_request(f"Item with id {id[:100]!r} not found.", f"input[{index}].type")
            item = found
        resolved.append(item)
    return resolved


def as_tool_choice(choice: Any) -> Any:
    if not isinstance(choice, dict):
        return choice
    if choice["type"] != "allowed_tools":
        return {"type": "function", "function": {"name": function_of(choice)}}
    tools = []
    for tool in choice["tools"]:
        if tool["type"] in ("function", "custom"):
            tools.append(as_tool_choice(tool))
    return {"type": "allowed_tools", "allowed_tools": {"mode": choice["mode"], "tools": tools}}


def as_response_format(form: JSONObject | None) -> JSONObject | None:
    if form is None or form["type"] == "text":
        return None
    if form["type"] == "json_object":
        return form
    schema = {name: value for name, value in form.items() if name != "type"}
    return {"type": "json_schema", "json_schema": {"name": "answer", **schema}}


def as_function(tool: JSONObject, name: ToolName) -> JSONObject:
    """The function by which the upstream knows a tool."""
    function: JSONObject = {"name": name.function}
    description = tool.get("description") or ""
    if name.is_custom:
        function["parameters"] = object_of({"input": STRING})
        grammar = tool.get("format")
        if isinstance(grammar, dict) and grammar.get("definition"):
            description += f"\nThe input follows this grammar ({grammar.get('syntax')}): {grammar['definition']}"
    else:
        function["parameters"] = tool.get("parameters") or {"type": "object", "properties": {}}
        if tool.get("strict"):
            function["strict"] = True
    if description:
        function["description"] = description.removeprefix("\n")
    return function


# ======================================================================================================================
# 8 Stores
#
# Where sessions, stored responses, reasoning and counters are kept. A store knows how to keep them, `Sessions` what is
# in them. They belong to an owner, which is a hash of a key.
# ======================================================================================================================

MAX_TURNS = 1000  # of one session; more than any prompt holds
MAX_SESSION_BYTES = 1 << 20  # of one session's turns, as JSON
MAX_RESPONSE_BYTES = 16 << 20  # of a stored response; a larger one would push out everybody's sessions
MAX_STORE_BYTES = 64 << 20  # of all sessions, where they are kept in memory
MAX_REASONING_BYTES = 16 << 20  # of all reasoning behind tool calls, likewise
MESSAGE_BYTES = 500  # that a message takes beside its text


def size_of_turn(turn: Turn) -> int:
    return len(dump_json(turn)) + MESSAGE_BYTES * len(turn)


@dataclass(frozen=True)
class Session:
    """What is remembered of a user, or of a stored response and what led to it."""

    id: str
    created: float  # seconds since the epoch, as is `used`
    used: float
    turns: Turns = ()
    system: Turn = ()  # of a stored response: system messages among its input and that of those before it
    response: JSONObject | None = None

    @cached_property
    def size(self) -> int:
        """Bytes, about."""
        size = sum(map(size_of_turn, self.turns)) + size_of_turn(self.system) + MESSAGE_BYTES
        return size + len(dump_json(self.response)) if self.response else size


Key = tuple[str, str, str]  # of a session: its owner, "user" or "response", and that one's name or id


@dataclass(frozen=True)
class SessionSummary:
    """What a list of sessions says of one; an owner's turns together may be a gigabyte."""

    created: float  # seconds since the epoch, as is `used`
    used: float
    turns: int


class Store:
    """What all stores do, for many threads. Each may raise APIError 503 when the store cannot be reached.

    Sessions are forgotten `ttl` seconds after their last use; at most `limit` are kept, and the least recently used
    goes first. Counters are numbers by owner, period and name.
    """

    kind = ""  # for /health

    def __init__(self, ttl: float, limit: int) -> None:
        self.ttl = ttl
        self.limit = limit
        self.is_failing = False  # a call has failed, and none that writes has succeeded since; to be busy is no failure

    def check(self) -> None:
        """Raises APIError when the store cannot be reached."""

    def get(self, key: Key) -> Session | None:
        raise NotImplementedError

    def update(self, key: Key, change: Callable[[Session | None], Session]) -> None:
        """Put what change() makes of the session in its place; all of it, or nothing. Two updates of one session come
        after one another, whoever makes them; change() may be called more than once."""
        raise NotImplementedError

    def forget(self, key: Key) -> bool:
        """Whether there was anything to forget."""
        raise NotImplementedError

    def users(self, owner: str) -> dict[str, SessionSummary]:
        """The sessions of an owner's users, by their names; the least recently used is the first."""
        raise NotImplementedError

    def count(self) -> int:
        """Sessions kept."""
        raise NotImplementedError

    def keep_reasoning(self, owner: str, places: Iterable[str], text: str) -> None:
        """Keep a text under each of these names, for `ttl` seconds."""
        raise NotImplementedError

    def find_reasoning(self, owner: str, place: str) -> str | None:
        raise NotImplementedError

    def add(self, owner: str, period: str, amounts: Mapping[str, int], max_age: float) -> dict[str, int]:
        """Add to the counters of a period, all at once, and return what these are then. They are forgotten when nothing
        was added for so many seconds."""
        raise NotImplementedError

    def read(self, owner: str, periods: Iterable[str]) -> list[dict[str, int]]:
        """The counters of each of these periods."""
        raise NotImplementedError


class MemoryStore(Store):
    """Dicts with an expiry, and a lock. Ends with the process."""

    kind = "memory"

    def __init__(self, ttl: float, limit: int) -> None:
        super().__init__(ttl, limit)
        # Least recently used first, which is also the first to expire
        self._sessions: dict[Key, Session] = {}
        self._size = 0  # bytes of all sessions, about
        # When it was kept, and the text
        self._reasoning: dict[tuple[str, str], tuple[float, str]] = {}
        self._reasoning_size = 0
        # When they expire, and the counters
        self._counters: dict[tuple[str, str], tuple[float, dict[str, int]]] = {}
        self._lock = threading.Lock()  # guards all five; held for little work only

    def get(self, key: Key) -> Session | None:
        with self._lock:
            self._drop_expired()
            return self._sessions.get(key)

    def update(self, key: Key, change: Callable[[Session | None], Session]) -> None:
        with self._lock:
            self._drop_expired()
            session = change(self._sessions.get(key))
            self._forget(key)
            self._sessions[key] = session
            self._size += session.size
            while len(self._sessions) > self.limit or self._size > MAX_STORE_BYTES:
                self._forget(next(iter(self._sessions)))

    def forget(self, key: Key) -> bool:
        with self._lock:
            self._drop_expired()
            return self._forget(key)

    def users(self, owner: str) -> dict[str, SessionSummary]:
        with self._lock:
            self._drop_expired()
            sessions = {}
            for (whose, kind, name), session in self._sessions.items():
                if (whose, kind) == (owner, "user"):
                    sessions[name] = SessionSummary(session.created, session.used, len(session.turns))
            return sessions

    def count(self) -> int:
        with self._lock:
            self._drop_expired()
            return len(self._sessions)

    def keep_reasoning(self, owner: str, places: Iterable[str], text: str) -> None:
        now = time.time()
        with self._lock:
            for place in places:
                self._drop_reasoning((owner, place))
                self._reasoning[owner, place] = now, text
                self._reasoning_size += len(text) + MESSAGE_BYTES
            while self._reasoning:
                oldest = next(iter(self._reasoning))
                is_expired = self._reasoning[oldest][0] <= now - self.ttl
                if not is_expired and self._reasoning_size <= MAX_REASONING_BYTES:
                    return
                self._drop_reasoning(oldest)

    def find_reasoning(self, owner: str, place: str) -> str | None:
        with self._lock:
            kept, text = self._reasoning.get((owner, place), (0.0, None))
            return text if kept > time.time() - self.ttl else None

    def add(self, owner: str, period: str, amounts: Mapping[str, int], max_age: float) -> dict[str, int]:
        with self._lock:
            counters = self._renewed_counters(owner, period, max_age)
            for name, amount in amounts.items():
                counters[name] = counters.get(name, 0) + amount
            return {name: counters[name] for name in amounts}

    def read(self, owner: str, periods: Iterable[str]) -> list[dict[str, int]]:
        found = []
        with self._lock:
            for period in periods:
                expires, counters = self._counters.get((owner, period), (0.0, {}))
                found.append(dict(counters) if expires > time.time() else {})
        return found

    def set_counters(self, owner: str, period: str, counters: Mapping[str, int], max_age: float) -> None:
        """Take over what another store has told of these counters, unless they are further: they only grow."""
        with self._lock:
            known = self._renewed_counters(owner, period, max_age)
            for name, value in counters.items():
                known[name] = max(value, known.get(name, 0))

    # The caller of these holds the lock

    def _forget(self, key: Key) -> bool:
        session = self._sessions.pop(key, None)
        if session:
            self._size -= session.size
        return session is not None

    def _renewed_counters(self, owner: str, period: str, max_age: float) -> dict[str, int]:
        """The counters of a period, which expire after so many seconds from now."""
        now = time.time()
        expires, counters = self._counters.get((owner, period), (0.0, {}))
        if expires <= now:  # it is a new period, so others may have expired
            self._counters = {key: entry for key, entry in self._counters.items() if entry[0] > now}
            counters = {}
        self._counters[owner, period] = now + max_age, counters
        return counters

    def _drop_reasoning(self, key: tuple[str, str]) -> None:
        _, text = self._reasoning.pop(key, (0.0, None))
        if text is not None:
            self._reasoning_size -= len(text) + MESSAGE_BYTES

    def _drop_expired(self) -> None:
        while self._sessions:
            oldest = next(iter(self._sessions))
            if self._sessions[oldest].used > time.time() - self.ttl:
                return
            self._forget(oldest)


# ======================================================================================================================
# 9 Shared stores
#
# What stores outside of this process have in common: others share them, they fail and come back, and they may hold
# what another version of the program wrote.
# ======================================================================================================================

# A chat that finds the store busy waits for its two limits and for its session: together less than 5 s
STORE_PATIENCE = 3.6  # seconds that a call waits for its turn
CHECK_PATIENCE = 1.0  # the same for /health, and for all calls of a store that is stuck
OPTIONAL_PATIENCE = 0.5  # and for what chats can do without: reasoning and counters
MAX_STORE_PAUSE = 2.0  # seconds without a call after a failure, at most


class StoreError(Exception):
    """A store that cannot be used, in words for the log; at the start they are those of a SettingError."""


class SharedStore(Store):
    """A store outside of this process. Every failure of it is the same APIError, and soon."""

    failures: tuple[type[Exception], ...] = (StoreError,)
    patience = STORE_PATIENCE

    def __init__(self, ttl: float, limit: int) -> None:
        super().__init__(ttl, limit)
        # None of these needs a lock: a call too many or a line too many in the log does no harm
        self._paused_until = 0.0  # in seconds of time.monotonic()
        self._failed_patience = 0.0  # of the call that failed
        self._is_stuck = False  # it fails, also for a call that has waited as long as any may

    def _check_pause(self, patience: float) -> None:
        if time.monotonic() < self._paused_until and patience <= self._failed_patience:
            raise store_unavailable()

    @contextmanager
    def _calling(self, is_write: bool, patience: float) -> Iterator[None]:
        """Around a call of the store. After a failure there is none for as long as that took, but of a more patient
        kind: while each takes a second, a request that could use the store twenty times must not take twenty."""
        self._check_pause(patience)
        began = time.monotonic()
        try:
            yield
        except self.failures as error:
            now = time.monotonic()
            self._paused_until = now + min(now - began, MAX_STORE_PAUSE)
            self._failed_patience = patience
            if patience >= self.patience:
                self._is_stuck = True
            if not self.is_failing:
                log.warning("the session store (%s) fails: %s: %s", self.kind, type(error).__name__, error)
            self.is_failing = True
            raise store_unavailable() from None
        if self.is_failing and is_write:  # a full disk can still be read
            self.is_failing = self._is_stuck = False
            log.warning("the session store (%s) is well again", self.kind)


def store_unavailable() -> APIError:
    return APIError(
        503, "The store of sessions cannot be used at the moment; the server's log says why. Requests without user, "
        "previous_response_id and store need none.", "server_error", "session_store_unavailable")


def newer_format(version: int) -> StoreError:
    return StoreError(f"it was written by a newer version of kimi2api (format {version}); run that, or choose another")


def not_ours(error: Exception) -> StoreError:
    return StoreError(f"it holds what this program did not write: {error}")


def load_json(source: bytes) -> Any:
    """What dump_json() wrote."""
    try:
        return json.loads(source)
    except ValueError as error:
        raise not_ours(error) from None


def changed_turns(before: Turns, after: Turns) -> tuple[int, Turns]:
    """How many of the oldest turns are gone, and which ones are new at the end."""
    if after and after[0] in before:
        gone = before.index(after[0])
        kept = len(before) - gone
        if before[gone:] == after[:kept]:
            return gone, after[kept:]
    return len(before), after


# ======================================================================================================================
# 10 SQLite store
#
# One file, which the processes of one machine may share.
# ======================================================================================================================

PROBE_BYTES = 1 << 16  # that must fit before a full disk counts as well again
LOCK_CHECK_INTERVAL = 0.02  # seconds
MAX_FREE_PAGES = 1000  # in the file, 4 MiB; more are given back to the system
SQLITE_APPLICATION = 0x6B326170  # PRAGMA application_id of our files
SQLITE_STEPS = (  # from each version of the format to the next; PRAGMA user_version is how many have been made
    (
        """CREATE TABLE sessions (
            number INTEGER PRIMARY KEY, owner TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL,
            id TEXT NOT NULL, created REAL NOT NULL, used REAL NOT NULL, system BLOB NOT NULL, response BLOB,
            UNIQUE (owner, kind, name))""",
        "CREATE INDEX sessions_by_use ON sessions (used)",
        """CREATE TABLE turns (
            number INTEGER PRIMARY KEY, turn BLOB NOT NULL,
            session INTEGER NOT NULL REFERENCES sessions ON DELETE CASCADE)""",
        "CREATE INDEX turns_of_session ON turns (session)",
        """CREATE TABLE reasoning (
            number INTEGER PRIMARY KEY, owner TEXT NOT NULL, place TEXT NOT NULL, kept REAL NOT NULL,
            size INTEGER NOT NULL, text TEXT NOT NULL, UNIQUE (owner, place))""",
        "CREATE INDEX reasoning_by_age ON reasoning (kept)",
        """CREATE TABLE counters (
            owner TEXT NOT NULL, period TEXT NOT NULL, name TEXT NOT NULL, value INTEGER NOT NULL,
            expires REAL NOT NULL, PRIMARY KEY (owner, period, name)) WITHOUT ROWID""",
        "CREATE INDEX counters_by_expiry ON counters (expires)",
        "CREATE TABLE probe (content BLOB)",
        # Counting rows would take longer the more there are
        "CREATE TABLE totals (sessions INTEGER NOT NULL, reasoning INTEGER NOT NULL)",
        "INSERT INTO totals VALUES (0, 0)",
        "CREATE TRIGGER session_added AFTER INSERT ON sessions BEGIN UPDATE totals SET sessions = sessions + 1; END",
        "CREATE TRIGGER session_gone AFTER DELETE ON sessions BEGIN UPDATE totals SET sessions = sessions - 1; END",
        """CREATE TRIGGER reasoning_added AFTER INSERT ON reasoning BEGIN
            UPDATE totals SET reasoning = reasoning + NEW.size; END""",
        """CREATE TRIGGER reasoning_gone AFTER DELETE ON reasoning BEGIN
            UPDATE totals SET reasoning = reasoning - OLD.size; END""",
    ),
)
SQLITE_PRAGMAS = (
    "PRAGMA auto_vacuum = INCREMENTAL",  # counts while the file is empty
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = NORMAL",  # what is committed survives the end of the process; a power cut may take the latest
    "PRAGMA journal_size_limit = 4194304",
    "PRAGMA foreign_keys = ON",
)


class SQLiteStore(SharedStore):
    """A file of sqlite3. One connection serves all threads: a call takes a fraction of a millisecond."""

    kind = "sqlite"

    def __init__(self, path: str, ttl: float, limit: int) -> None:
        """Raises StoreError for a file that cannot be opened or is not ours. One that is locked may be free later."""
        super().__init__(ttl, limit)
        try:
            import sqlite3
        except ImportError:
            raise StoreError("this Python has no sqlite3") from None
        self.failures = (StoreError, sqlite3.Error, OSError, OverflowError)
        self._path = os.path.abspath(os.path.expanduser(path))
        # Guards the connection and its file; held while sqlite3 waits for others
        self._lock = threading.Lock()
        self._db: Any = None
        self._file: tuple[int, int] | None = None  # device and inode that the connection is to
        try:
            self._connect(self.patience)
        except self.failures as error:
            # An OSError's words have the path in them
            if isinstance(error, OSError) or "locked" not in str(error):
                reason = error.strerror if isinstance(error, OSError) else error
                raise StoreError(f"{self._path} cannot be used: {reason}") from None
            log.warning("the session store (sqlite) is locked by another program: %s", self._path)

    def check(self) -> None:
        with self._transaction(patience=CHECK_PATIENCE) as db:
            if self.is_failing:
                db.execute("INSERT INTO probe VALUES (zeroblob(?))", (PROBE_BYTES,))
            else:
                return
        with self._transaction(patience=CHECK_PATIENCE) as db:
            db.execute("DELETE FROM probe")

    def get(self, key: Key) -> Session | None:
        with self._transaction("BEGIN") as db:
            _, session = self._read_session(db, key)
        return session

    def update(self, key: Key, change: Callable[[Session | None], Session]) -> None:
        with self._transaction() as db:
            number, before = self._read_session(db, key)
            session = change(before)
            response = dump_json(session.response) if session.response else None
            fields = (session.id, session.created, session.used, dump_json(session.system), response)
            gone, new = changed_turns(before.turns if before else (), session.turns)
            if before is None:
                # It has expired
                db.execute("DELETE FROM sessions WHERE number = ?", (number,))
                number = db.execute(
                    "INSERT INTO sessions (owner, kind, name, id, created, used, system, response) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*key, *fields)).lastrowid
            else:
                db.execute(
                    "UPDATE sessions SET id = ?, created = ?, used = ?, system = ?, response = ? WHERE number = ?",
                    (*fields, number))
            if gone:
                db.execute(
                    "DELETE FROM turns WHERE number IN "
                    "(SELECT number FROM turns WHERE session = ? ORDER BY number LIMIT ?)", (number, gone))
            rows = [(number, dump_json(turn)) for turn in new]
            db.executemany("INSERT INTO turns (session, turn) VALUES (?, ?)", rows)
            # After the clock was set back, what is new would be the first to go
            db.execute("UPDATE sessions SET used = ? WHERE used > ?", (session.used - 0.001, session.used))
            self._sweep_sessions(db)

    def forget(self, key: Key) -> bool:
        with self._transaction() as db:
            where = "FROM sessions WHERE owner = ? AND kind = ? AND name = ?"
            row = db.execute(f"SELECT used {where}", key).fetchone()
            db.execute(f"DELETE {where}", key)
        return row is not None and row[0] > time.time() - self.ttl

    def users(self, owner: str) -> dict[str, SessionSummary]:
        with self._transaction("BEGIN") as db:
            rows = db.execute(
                "SELECT name, created, used, (SELECT count(*) FROM turns WHERE session = sessions.number) "
                "FROM sessions WHERE owner = ? AND kind = 'user' AND used > ? ORDER BY used",
                (owner, time.time() - self.ttl))
            return {name: SessionSummary(created, used, turns) for name, created, used, turns in rows}

    def count(self) -> int:
        with self._transaction("BEGIN", CHECK_PATIENCE) as db:
            [count] = db.execute(
                "SELECT sessions - (SELECT count(*) FROM sessions WHERE used <= ?) FROM totals",
                (time.time() - self.ttl,)).fetchone()
        return int(count)

    def keep_reasoning(self, owner: str, places: Iterable[str], text: str) -> None:
        now = time.time()
        with self._transaction(patience=OPTIONAL_PATIENCE) as db:
            for place in places:
                db.execute("DELETE FROM reasoning WHERE owner = ? AND place = ?", (owner, place))
                db.execute(
                    "INSERT INTO reasoning (owner, place, kept, size, text) VALUES (?, ?, ?, ?, ?)",
                    (owner, place, now, len(text) + MESSAGE_BYTES, text))
            db.execute("DELETE FROM reasoning WHERE kept <= ?", (now - self.ttl,))
            while db.execute("SELECT reasoning > ? FROM totals", (MAX_REASONING_BYTES,)).fetchone() == (1,):
                db.execute("DELETE FROM reasoning WHERE number = "
                           "(SELECT number FROM reasoning ORDER BY kept, number LIMIT 1)")

    def find_reasoning(self, owner: str, place: str) -> str | None:
        with self._transaction("BEGIN", OPTIONAL_PATIENCE) as db:
            row = db.execute(
                "SELECT text FROM reasoning WHERE owner = ? AND place = ? AND kept > ?",
                (owner, place, time.time() - self.ttl)).fetchone()
        return row[0] if row else None

    def add(self, owner: str, period: str, amounts: Mapping[str, int], max_age: float) -> dict[str, int]:
        now = time.time()
        with self._transaction(patience=OPTIONAL_PATIENCE) as db:
            db.execute("DELETE FROM counters WHERE expires <= ?", (now,))
            db.executemany(
                "INSERT INTO counters VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (owner, period, name) DO UPDATE SET value = value + excluded.value",
                [(owner, period, name, amount, now + max_age) for name, amount in amounts.items()])
            db.execute(
                "UPDATE counters SET expires = ? WHERE owner = ? AND period = ?", (now + max_age, owner, period))
            counters = self._read_counters(db, owner, period)
        return {name: counters[name] for name in amounts}

    def read(self, owner: str, periods: Iterable[str]) -> list[dict[str, int]]:
        with self._transaction("BEGIN", OPTIONAL_PATIENCE) as db:
            return [self._read_counters(db, owner, period) for period in periods]

    # The caller of these is in a transaction

    def _read_session(self, db: Any, key: Key) -> tuple[int | None, Session | None]:
        """The number of the session's row, and the session unless it has expired."""
        row = db.execute(
            "SELECT number, id, created, used, system, response FROM sessions "
            "WHERE owner = ? AND kind = ? AND name = ?", key).fetchone()
        if row is None:
            return None, None
        number, id, created, used, system, response = row
        if used <= time.time() - self.ttl:
            return number, None
        rows = db.execute("SELECT turn FROM turns WHERE session = ? ORDER BY number", (number,))
        turns = tuple(tuple(load_json(turn)) for turn, in rows)
        return number, Session(
            id, created, used, turns, tuple(load_json(system)), load_json(response) if response else None)

    def _sweep_sessions(self, db: Any) -> None:
        """Delete what has expired, not all at once, and what is too many."""
        db.execute(
            "DELETE FROM sessions WHERE number IN (SELECT number FROM sessions WHERE used <= ? ORDER BY used LIMIT 10)",
            (time.time() - self.ttl,))
        [kept] = db.execute("SELECT sessions FROM totals").fetchone()
        if kept > self.limit:
            db.execute(
                "DELETE FROM sessions WHERE number IN (SELECT number FROM sessions ORDER BY used, number LIMIT ?)",
                (kept - self.limit,))
        [free] = db.execute("PRAGMA freelist_count").fetchone()
        for _ in range(min(free - MAX_FREE_PAGES, 500)):
            # Python makes but one step of it, which is one page
            db.execute("PRAGMA incremental_vacuum(1)")

    def _read_counters(self, db: Any, owner: str, period: str) -> dict[str, int]:
        return dict(db.execute(
            "SELECT name, value FROM counters WHERE owner = ? AND period = ? AND expires > ?",
            (owner, period, time.time())))

    @contextmanager
    def _transaction(self, begin: str = "BEGIN IMMEDIATE", patience: float = 0.0) -> Iterator[Any]:
        """The connection, in a transaction of which all is done or nothing."""
        patience = patience or self.patience
        if self._is_stuck:  # else all threads wait for what stays locked, and /health for one of them
            patience = min(patience, CHECK_PATIENCE)
        deadline = time.monotonic() + patience
        with self._calling(begin != "BEGIN", patience):
            if not self._lock.acquire(timeout=patience):
                raise store_unavailable()  # which says nothing of the store: there are many calls
            try:
                self._check_pause(patience)  # it may have failed meanwhile
                try:
                    self._connect(max(0.0, deadline - time.monotonic()))
                    self._begin(begin, deadline)
                    yield self._db
                    self._db.execute("COMMIT")
                except BaseException as error:
                    self._undo(error)
                    raise
            finally:
                self._lock.release()

    def _undo(self, error: BaseException) -> None:
        if isinstance(error, self.failures):
            self._close()  # the next call opens the file anew, whatever has become of it
        elif self._db and self._db.in_transaction:
            self._db.execute("ROLLBACK")

    # The caller of these holds the lock

    def _connect(self, patience: float) -> None:
        """Have a connection to the file that the path leads to now: one that was deleted can still be written."""
        if self._db:
            with suppress(OSError):
                now = os.stat(self._path)
                if (now.st_dev, now.st_ino) == self._file:
                    return
            self._close()
        import sqlite3
        with suppress(FileExistsError):
            # O_EXCL does not follow a link, and sqlite3 would make its target 0644
            file = os.path.realpath(self._path)
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        self._db = sqlite3.connect(self._path, timeout=patience, isolation_level=None, check_same_thread=False)
        try:
            self._prepare(self._db)
        except BaseException:
            self._close()
            raise
        opened = os.stat(self._path)
        self._file = opened.st_dev, opened.st_ino

    def _begin(self, begin: str, deadline: float) -> None:
        """By itself sqlite3 looks but ten times a second whether another process has ended its transaction, and one of
        four busy processes waits for more than a second."""
        wait = LOCK_CHECK_INTERVAL if begin != "BEGIN" else max(0.0, deadline - time.monotonic())
        self._db.execute(f"PRAGMA busy_timeout = {int(wait * 1000)}")
        while True:
            try:
                self._db.execute(begin)
                return
            except self.failures as error:
                if "locked" not in str(error) or time.monotonic() >= deadline:
                    raise

    def _close(self) -> None:
        if self._db:
            with suppress(*self.failures):
                self._db.close()
        self._db = None

    def _prepare(self, db: Any) -> None:
        """See that the file is ours, and bring it to the format of this version."""
        [application] = db.execute("PRAGMA application_id").fetchone()
        [tables] = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables and application != SQLITE_APPLICATION:
            raise StoreError("it is the database of another program")
        [version] = db.execute("PRAGMA user_version").fetchone()
        if version > len(SQLITE_STEPS):
            raise newer_format(version)
        for pragma in SQLITE_PRAGMAS:
            db.execute(pragma).fetchall()
        db.execute("BEGIN IMMEDIATE")
        # Another process may have been first
        [version] = db.execute("PRAGMA user_version").fetchone()
        for step in SQLITE_STEPS[version:]:
            for statement in step:
                db.execute(statement)
        if version < len(SQLITE_STEPS):
            db.execute(f"PRAGMA application_id = {SQLITE_APPLICATION}")
            db.execute(f"PRAGMA user_version = {len(SQLITE_STEPS)}")
        db.execute("COMMIT")


# ======================================================================================================================
# 11 Redis client
#
# The package's connections within a deadline, the names of keys, and the scripts that run in Redis.
# ======================================================================================================================

REDIS_CONNECTIONS = 256  # at most: each thread that asks has one, and of a Redis that is far away all wait at once
REDIS_TIMEOUT = 1.0  # seconds that each step may take: to connect, to be answered, to have a connection
REDIS_FORMAT = "kimi2api:format"
REDIS_SESSIONS = "kimi2api:sessions"  # all of them, by their last use
REDIS_REASONING = "kimi2api:reasoning"  # the names of all texts, by their age
REDIS_SIZES = "kimi2api:reasoning-sizes"  # of each text, and `total`
REDIS_STEPS: tuple[Callable[[Any], None], ...] = (  # as SQLITE_STEPS; each may be made twice
    lambda redis: None,  # an empty database
)
MARK_AS_NEWEST = """
-- What is further ahead than a session lives, a clock that was wrong has left: it would be kept until that time
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. ARGV[3], '+inf')) do
    redis.call('ZADD', KEYS[1], ARGV[2], member)
end
-- Also when the clock was set back or is behind another machine's: what is new would be the first to go
local newest = redis.call('ZRANGE', KEYS[1], -1, -1, 'WITHSCORES')[2] or 0
redis.call('ZADD', KEYS[1], math.max(ARGV[2], newest + 0.001), ARGV[1])
"""
KEEP_REASONING = """
local index, sizes = KEYS[1], KEYS[2]
local now, ttl, limit, text, size = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4], ARGV[5]
local function drop(name)
    redis.call('DEL', index .. ':' .. name)
    redis.call('ZREM', index, name)
    local known = redis.call('HGET', sizes, name)
    if known then
        redis.call('HINCRBY', sizes, 'total', '-' .. known)
        redis.call('HDEL', sizes, name)
    end
end
for place = 6, #ARGV do
    drop(ARGV[place])
    redis.call('SET', index .. ':' .. ARGV[place], text, 'PX', ttl)
    redis.call('ZADD', index, now, ARGV[place])
    redis.call('HSET', sizes, ARGV[place], size)
    redis.call('HINCRBY', sizes, 'total', size)
end
for _, name in ipairs(redis.call('ZRANGEBYSCORE', index, '-inf', now - ttl / 1000, 'LIMIT', 0, 100)) do
    drop(name)
end
while tonumber(redis.call('HGET', sizes, 'total')) > limit do
    local oldest = redis.call('ZRANGE', index, 0, 0)[1]
    if not oldest then  -- Redis has dropped the index for want of memory
        return redis.call('DEL', sizes)
    end
    drop(oldest)
end
redis.call('PEXPIRE', index, ttl)
redis.call('PEXPIRE', sizes, ttl)
"""


class Resolver:
    """Finds the address of a host within a deadline; the system may take half a minute."""

    def __init__(self) -> None:
        self._look_up = threading.Thread()  # the latest; all who wait, wait for the same one

    def wait_for(self, host: str) -> None:
        """Raises TimeoutError."""
        look_up = self._look_up
        if not look_up.is_alive():
            look_up = threading.Thread(target=find_address, args=(host,), name="resolver", daemon=True)
            look_up.start()
            self._look_up = look_up
        look_up.join(REDIS_TIMEOUT)
        if look_up.is_alive():
            raise TimeoutError("its host's address cannot be found")


def find_address(host: str) -> None:
    with suppress(OSError, UnicodeError):  # which the connection will meet again
        socket.getaddrinfo(host, None)


def connect_redis(url: str) -> Any:
    """A client of the package redis, for many threads. Raises StoreError without it, or for an address of no use."""
    try:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ImportError:
        raise StoreError("the package redis is missing: pip install 'kimi2api[redis]'") from None
    resolver = Resolver()
    try:
        pool = redis.BlockingConnectionPool.from_url(
            url,
            max_connections=REDIS_CONNECTIONS,
            timeout=REDIS_TIMEOUT,
            socket_connect_timeout=REDIS_TIMEOUT,
            socket_timeout=REDIS_TIMEOUT,
            socket_keepalive=True,
            protocol=2,
            retry=Retry(NoBackoff(), 0),  # a turn whose answer was lost may have landed
        )
        connection_class: Any = pool.connection_class

        class Connection(connection_class):  # type: ignore[misc]
            def _connect(self) -> Any:
                resolver.wait_for(self.host)
                return super()._connect()

        pool.connection_class = Connection
        pool.make_connection()  # which reads the options in the address
    except (ValueError, TypeError, AttributeError, redis.RedisError) as error:
        raise StoreError(f"the address of Redis cannot be used: {error}") from None
    return redis.Redis(connection_pool=pool)


def hashed(text: str) -> str:
    """A name for a key of Redis, which says nothing of the text and cannot be another's."""
    return sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class RedisKeys:
    """Where a session is in Redis."""

    member: str  # of the sorted sets

    @classmethod
    def of(cls, key: Key) -> RedisKeys:
        owner, kind, name = key
        return cls(f"{hashed(owner)}:{kind}:{hashed(name)}")

    @property
    def session(self) -> str:
        """A hash: all but the turns, and their number."""
        return f"kimi2api:session:{self.member}"

    @property
    def turns(self) -> str:
        """A list."""
        return f"kimi2api:turns:{self.member}"

    @property
    def siblings(self) -> str:
        """The sorted set of the owner's users or responses, by their last use."""
        owner, kind, _ = self.member.split(":")
        return f"kimi2api:{kind}s:{owner}"


# ======================================================================================================================
# 12 Redis store
#
# Sessions in Redis, for processes on any number of machines: a list of turns and a hash for the rest of each session,
# sorted sets for what is oldest. What a request does is one transaction.
# ======================================================================================================================


class RedisStore(SharedStore):
    """A Redis, or what speaks its protocol; tested with Redis 7."""

    kind = "redis"

    def __init__(self, url: str, ttl: float, limit: int) -> None:
        """Raises StoreError when the package is missing, or a newer version wrote there. A Redis that does not answer
        may do so later."""
        super().__init__(ttl, limit)
        self._redis = connect_redis(url)
        import redis
        # After OSError: what the package or we raise for an answer or a key that makes no sense
        self.failures = (
            StoreError, redis.RedisError, OSError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
        self._conflict = redis.WatchError
        self._keep_reasoning = self._redis.register_script(KEEP_REASONING)
        self._lifetime = max(1, int(ttl * 1000))  # ms
        self._is_format_known = False
        # Held while a session is changed, each for its part of all sessions: threads that compete for one session by
        # WATCH alone spend their time on transactions that fail. It is other processes that WATCH is for
        self._locks = [threading.Lock() for _ in range(1024)]
        try:
            self._check_format()
        except StoreError:
            raise
        except self.failures as error:
            self.is_failing = True
            log.warning("the session store (redis) fails: %s: %s", type(error).__name__, error)

    def check(self) -> None:
        with self._client(is_write=True) as redis:
            # Refused when memory is full, or by a replica
            redis.set(REDIS_FORMAT, len(REDIS_STEPS), nx=True)

    def get(self, key: Key) -> Session | None:
        keys = RedisKeys.of(key)
        with self._client() as redis, redis.pipeline() as pipe:
            pipe.hgetall(keys.session)
            pipe.lrange(keys.turns, 0, -1)
            return self._read_session(*pipe.execute())

    def update(self, key: Key, change: Callable[[Session | None], Session]) -> None:
        keys = RedisKeys.of(key)
        # When it must be read and changed
        deadline = time.monotonic() + self.patience - REDIS_TIMEOUT
        self._check_pause(self.patience)
        lock = self._locks[hash(key) % len(self._locks)]
        if not lock.acquire(timeout=self.patience / 2):
            raise store_unavailable()
        try:
            with self._client(is_write=True) as redis:
                kept = None
                while kept is None:
                    with redis.pipeline() as pipe:
                        pipe.watch(keys.session)
                        before = self._read_session(pipe.hgetall(keys.session), pipe.lrange(keys.turns, 0, -1))
                        # It is slow, or others are always faster
                        if time.monotonic() > deadline:
                            raise store_unavailable()
                        kept = self._write_session(pipe, keys, key[2], before, change(before))
        finally:
            lock.release()
        if kept > self.limit:
            self._evict(kept)

    def _write_session(
        self, pipe: Any, keys: RedisKeys, name: str, before: Session | None, session: Session,
    ) -> int | None:
        """How many sessions there are then; None when another was faster."""
        fields = {
            "name": name, "id": session.id, "created": repr(session.created), "used": repr(session.used),
            "turns": len(session.turns), "system": dump_json(session.system),
        }
        if session.response:
            fields["response"] = dump_json(session.response)
        gone, new = changed_turns(before.turns if before else (), session.turns)
        expired = time.time() - self.ttl
        pipe.multi()
        if before is None:
            pipe.delete(keys.session, keys.turns)
        elif gone:
            pipe.ltrim(keys.turns, gone, -1)
        pipe.hset(keys.session, mapping=fields)
        if new:
            pipe.rpush(keys.turns, *map(dump_json, new))
        pipe.eval(
            MARK_AS_NEWEST, 1, REDIS_SESSIONS, keys.member, repr(session.used), repr(session.used + self.ttl))
        pipe.zadd(keys.siblings, {keys.member: session.used})
        for by_use in (REDIS_SESSIONS, keys.siblings):
            pipe.zremrangebyscore(by_use, "-inf", expired)
        for key in (keys.session, keys.turns, REDIS_SESSIONS, keys.siblings):
            pipe.pexpire(key, self._lifetime)
        pipe.zcard(REDIS_SESSIONS)
        try:
            return int(pipe.execute()[-1])
        except self._conflict:
            time.sleep(random.uniform(0, 0.005))
            return None

    def _evict(self, kept: int) -> None:
        """Drop the least recently used of too many sessions, but not one that is being used."""
        with suppress(*self.failures):  # the turn has landed, and the next one tries again
            while kept > self.limit:
                count = min(kept - self.limit, 50)
                with self._redis.pipeline() as pipe:
                    oldest = self._redis.zrange(REDIS_SESSIONS, 0, count - 1, withscores=True)
                    victims = [RedisKeys(member.decode()) for member, _ in oldest]
                    pipe.watch(*(victim.session for victim in victims))
                    still_oldest = pipe.zrange(REDIS_SESSIONS, 0, count - 1, withscores=True)
                    if still_oldest != oldest or pipe.zcard(REDIS_SESSIONS) - self.limit < count:
                        return  # another process does the same, and will go on
                    pipe.multi()
                    for victim in victims:
                        self._delete(pipe, victim)
                    pipe.zcard(REDIS_SESSIONS)
                    kept = pipe.execute()[-1]

    def forget(self, key: Key) -> bool:
        keys = RedisKeys.of(key)
        with self._client(is_write=True) as redis, redis.pipeline() as pipe:
            pipe.zscore(REDIS_SESSIONS, keys.member)
            self._delete(pipe, keys)
            used, was_deleted, *_ = pipe.execute()
        return bool(was_deleted) and used is not None and used > time.time() - self.ttl

    def users(self, owner: str) -> dict[str, SessionSummary]:
        siblings = RedisKeys.of((owner, "user", "")).siblings
        with self._client() as redis, redis.pipeline() as pipe:
            for member in redis.zrangebyscore(siblings, f"({time.time() - self.ttl}", "+inf"):
                pipe.hmget(RedisKeys(member.decode()).session, "name", "created", "used", "turns")
            sessions = {}
            for name, created, used, turns in pipe.execute():
                if name is not None:
                    sessions[name.decode()] = SessionSummary(float(created), float(used), int(turns))
            return sessions

    def count(self) -> int:
        with self._client() as redis:
            return int(redis.zcount(REDIS_SESSIONS, f"({time.time() - self.ttl}", "+inf"))

    def keep_reasoning(self, owner: str, places: Iterable[str], text: str) -> None:
        names = [f"{hashed(owner)}:{hashed(place)}" for place in places]
        size = len(text.encode()) + MESSAGE_BYTES
        with self._client(is_write=True) as redis:
            self._keep_reasoning(
                [REDIS_REASONING, REDIS_SIZES],
                [repr(time.time()), self._lifetime, MAX_REASONING_BYTES, text, size, *names], client=redis)

    def find_reasoning(self, owner: str, place: str) -> str | None:
        with self._client() as redis:
            text = redis.get(f"{REDIS_REASONING}:{hashed(owner)}:{hashed(place)}")
            return text.decode() if text is not None else None

    def add(self, owner: str, period: str, amounts: Mapping[str, int], max_age: float) -> dict[str, int]:
        key = self._counters(owner, period)
        with self._client(is_write=True) as redis, redis.pipeline() as pipe:
            for name, amount in amounts.items():
                pipe.hincrby(key, name, amount)
            pipe.pexpire(key, max(1, int(max_age * 1000)))
            *values, _ = pipe.execute()
        return dict(zip(amounts, values, strict=True))

    def read(self, owner: str, periods: Iterable[str]) -> list[dict[str, int]]:
        with self._client() as redis, redis.pipeline(transaction=False) as pipe:
            for period in periods:
                pipe.hgetall(self._counters(owner, period))
            return [{name.decode(): int(value) for name, value in counters.items()} for counters in pipe.execute()]

    def _counters(self, owner: str, period: str) -> str:
        return f"kimi2api:counters:{hashed(owner)}:{hashed(period)}"

    def _read_session(self, fields: dict[bytes, bytes], turns: list[bytes]) -> Session | None:
        if not fields:
            return None
        try:
            response = fields.get(b"response")
            session = Session(
                fields[b"id"].decode(), float(fields[b"created"]), float(fields[b"used"]),
                tuple(tuple(load_json(turn)) for turn in turns), tuple(load_json(fields[b"system"])),
                load_json(response) if response else None)
            # Redis may have dropped the list for want of memory
            is_whole = len(turns) == int(fields[b"turns"])
        except (KeyError, ValueError) as error:
            raise not_ours(error) from None
        return session if is_whole and session.used > time.time() - self.ttl else None

    def _delete(self, pipe: Any, keys: RedisKeys) -> None:
        pipe.delete(keys.session)
        pipe.delete(keys.turns)
        pipe.zrem(REDIS_SESSIONS, keys.member)
        pipe.zrem(keys.siblings, keys.member)

    @contextmanager
    def _client(self, is_write: bool = False) -> Iterator[Any]:
        with self._calling(is_write, self.patience):
            try:
                if not self._is_format_known:
                    self._check_format()
                yield self._redis
            except self.failures:
                self._is_format_known = False  # it may be another when it is back
                raise

    def _check_format(self) -> None:
        """See that no newer version wrote there, and bring it to the format of this version."""
        try:
            version = int(self._redis.get(REDIS_FORMAT) or 0)
        except ValueError as error:
            raise not_ours(error) from None
        if version > len(REDIS_STEPS):
            raise newer_format(version)
        for step in REDIS_STEPS[version:]:
            step(self._redis)
        if version < len(REDIS_STEPS):
            self._redis.set(REDIS_FORMAT, len(REDIS_STEPS))
        self._is_format_known = True


def open_store(settings: Settings) -> Store:
    """The store of SESSION_STORE. Raises SettingError when it cannot be used at all."""
    ttl = settings.session_cache_ttl
    limit = settings.max_session_size
    kind, _, path = settings.session_store.partition(":")
    try:
        if kind == "sqlite":
            return SQLiteStore(path, ttl, limit)
        if kind in ("redis", "rediss"):
            return RedisStore(settings.session_store, ttl, limit)
    except StoreError as error:
        raise SettingError(f"SESSION_STORE: {error}") from None
    return MemoryStore(ttl, limit)


# ======================================================================================================================
# 13 Sessions
#
# What is remembered of users and responses, in whichever store: turns, never system messages, which every request
# carries itself.
# ======================================================================================================================


def latest_turns(turns: Turns) -> Turns:
    """As many of the latest turns as a session may keep."""
    kept: list[Turn] = []
    size = 0
    for turn in reversed(turns[-MAX_TURNS:]):
        size_of_this = size_of_turn(turn)
        if size_of_this > MAX_SESSION_BYTES:
            continue
        if size + size_of_this > MAX_SESSION_BYTES:
            break
        size += size_of_this
        kept.append(turn)
    return tuple(reversed(kept))


def new_session_id(now: float) -> str:
    """An id in the form that the web chat's own page uses."""
    name = "".join(random.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=9))
    return f"session_{int(now * 1000)}_{name}"


def slim_turns(turns: Iterable[Turn]) -> Turns:
    return tuple(tuple(map(slimmed, turn)) for turn in turns)


def turns_since(opened: Turns, turns: Turns) -> Turns:
    """Those turns that were recorded after a session was opened with the others."""
    known = Counter(map(dump_json, opened))
    since = []
    for turn in turns:
        source = dump_json(turn)
        if known[source]:
            known[source] -= 1
        else:
            since.append(turn)
    return tuple(since)


class Sessions:
    """The sessions and stored responses of all owners, and the reasoning behind their tool calls: Moonshot and DeepSeek
    want it back, and clients of OpenAI's protocol drop it."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def get(self, owner: str, user: str) -> Session | None:
        return self.store.get((owner, "user", user))

    def open(self, owner: str, user: str | None) -> Session:
        """The user's session, or a new one, which is kept only when a turn is recorded."""
        session = self.get(owner, user) if user else None
        now = time.time()
        return session or Session(new_session_id(now), now, now)

    def record(self, owner: str, user: str, opened: Session, turns: Iterable[Turn], replace_turns: bool) -> None:
        """Add turns, all or none, to the user's session; replace_turns: in place of what was remembered."""
        slim = slim_turns(turns)

        def change(session: Session | None) -> Session:
            session = session or replace(opened, turns=())
            if replace_turns:  # but for those that others have recorded meanwhile
                now = (*slim, *turns_since(opened.turns, session.turns))
            else:
                now = append_turns(session.turns, slim)
            return replace(session, used=time.time(), turns=latest_turns(now))

        self.store.update((owner, "user", user), change)

    def forget(self, owner: str, user: str) -> bool:
        """Whether there was anything to forget."""
        return self.store.forget((owner, "user", user))

    def response(self, owner: str, id: str) -> Session | None:
        """A stored response and what led to it."""
        return self.store.get((owner, "response", id))

    def record_response(
        self, owner: str, opened: Session, response: JSONObject, system: Iterable[Message], turns: Iterable[Turn],
    ) -> None:
        """Keep a response, and the conversation up to its end for those that go on from it."""
        now = time.time()
        kept = latest_turns(slim_turns(turns))
        # Each a turn: bounded like these
        rules = latest_turns(slim_turns((message,) for message in system))
        session = Session(opened.id, now, now, kept, tuple(itertools.chain.from_iterable(rules)), response)
        if session.size > MAX_RESPONSE_BYTES:
            log.warning("a response of %d bytes is not kept", session.size)
            return
        self.store.update((owner, "response", response["id"]), lambda _: session)

    def forget_response(self, owner: str, id: str) -> bool:
        return self.store.forget((owner, "response", id))

    def keep_reasoning(self, owner: str, places: Iterable[str], text: str) -> None:
        with suppress(APIError):  # without it, the upstream is given empty reasoning
            self.store.keep_reasoning(owner, places, text)

    def find_reasoning(self, owner: str, place: str) -> str | None:
        with suppress(APIError):
            return self.store.find_reasoning(owner, place)
        return None


# ======================================================================================================================
# 14 Limits and usage
#
# What each key has used and how much it may, counted in the store: so a restart or a second process refills nothing.
# While the store cannot be reached, this process counts by itself.
# ======================================================================================================================

MINUTE = 60
DAY = 86400
USAGE_DAYS = 31
USAGE_MAX_AGE = (USAGE_DAYS + 1) * DAY
STORE_RETRY = 5.0  # seconds that a store that failed is not asked to count


def limit_of(limits: Mapping[str, int], client: ClientKey) -> int:
    """The limit for a key, by its name or else the one for all; 0: none."""
    return limits.get(client.name or "", limits.get("", 0))


def date_of(now: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(now))


def duration(seconds: float) -> str:
    """As OpenAI writes it in headers: 12s, 1m3s, 5h0m1s."""
    minutes, rest = divmod(ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{rest}s"
    if minutes or hours:
        text = f"{minutes}m{text}"
    return f"{hours}h{text}" if hours else text


def limit_headers(what: str, limit: int, used: int, reset: float) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{what}": str(limit),
        f"x-ratelimit-remaining-{what}": str(max(0, limit - used)),
        f"x-ratelimit-reset-{what}": duration(reset),
    }


class Accounts:
    """The counters of every key."""

    def __init__(self, store: Store, requests_per_minute: Mapping[str, int], tokens_per_day: Mapping[str, int]) -> None:
        self.requests_per_minute = requests_per_minute
        self.tokens_per_day = tokens_per_day
        self._store = store
        # What the store last told, and what has been counted since: limits go by it while the store cannot be reached
        self._own = MemoryStore(0.0, 0)
        self._lock = threading.Lock()  # guards the next
        # Usage that the store does not know yet
        self._unsaved: dict[tuple[str, str], Counter[str]] = {}
        self._retry_at = 0.0  # when the store is asked again, by the monotonic clock

    def admit(self, client: ClientKey) -> dict[str, str]:
        """Count a chat that begins; the headers for its response. Raises APIError 429 for one that is over a limit."""
        headers: dict[str, str] = {}
        tokens_limit = limit_of(self.tokens_per_day, client)
        requests_limit = limit_of(self.requests_per_minute, client)
        if not tokens_limit and not requests_limit:
            return headers
        now = time.time()
        minute_reset = MINUTE - now % MINUTE
        day_reset = DAY - now % DAY
        tokens = requests = 0
        if tokens_limit:
            day = f"day {date_of(now)}"
            [counters] = self._read(client, [day])
            tokens = summed(counters)["total_tokens"]
            headers.update(limit_headers("tokens", tokens_limit, tokens, day_reset))
        has_quota = not tokens_limit or tokens < tokens_limit
        if requests_limit:
            period = f"minute {int(now // MINUTE)}"
            counters = self._add(client, period, {"requests": int(has_quota)}, 2 * MINUTE)
            requests = counters["requests"]
            headers.update(limit_headers("requests", requests_limit, requests, minute_reset))
        if not has_quota:
            raise APIError(
                429, f"You have used {tokens} of {tokens_limit} tokens of today (TOKENS_PER_DAY).",
                "insufficient_quota", "insufficient_quota",
                headers={**headers, **NO_SDK_RETRY, "Retry-After": str(ceil(day_reset))})
        if requests > requests_limit:
            raise APIError(
                429, f"More than {requests_limit} chats in this minute (REQUESTS_PER_MINUTE).", "rate_limit_error",
                "rate_limit_exceeded", headers={**headers, "Retry-After": str(ceil(minute_reset))})
        return headers

    def record(
        self, client: ClientKey, model: str, prompt_tokens: int, completion_tokens: int, is_answered: bool,
    ) -> None:
        """Count what an answer took. model: one of a bounded number of ids; is_answered: it did not break off."""
        amounts = {"requests": int(is_answered), "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        named = {f"{name} {model}": amount for name, amount in amounts.items()}
        self._add(client, f"day {date_of(time.time())}", named, USAGE_MAX_AGE)

    def usage(self, client: ClientKey) -> JSONObject:
        """What the key has used in the last 31 days, the oldest first, and its limits."""
        now = time.time()
        dates = [date_of(now - ago * DAY) for ago in reversed(range(USAGE_DAYS))]
        counters_of_days = self._read(client, [f"day {date}" for date in dates])
        days = []
        for date, counters in zip(dates, counters_of_days, strict=True):
            days.append({"date": date, **summed(counters)})
        today = {name: value for name, value in days[-1].items() if name != "models"}
        return {
            "object": "usage",
            "key": client.name,
            "limits": {
                "requests_per_minute": limit_of(self.requests_per_minute, client),
                "tokens_per_day": limit_of(self.tokens_per_day, client),
            },
            "today": today,
            "days": days,
        }

    def _read(self, client: ClientKey, periods: list[str]) -> list[Mapping[str, int]]:
        known = self._ask_store(partial(self._store.read, client.owner, periods))
        if known is None:
            return [*self._own.read(client.owner, periods)]
        found: list[Mapping[str, int]] = []
        for period, counters in zip(periods, known, strict=True):
            found.append(self._learn(client, period, counters, USAGE_MAX_AGE))
        return found

    def _add(self, client: ClientKey, period: str, amounts: Mapping[str, int], max_age: float) -> Mapping[str, int]:
        counters = self._ask_store(partial(self._store.add, client.owner, period, amounts, max_age))
        if counters is not None:
            known = self._learn(client, period, counters, max_age)
            if self._unsaved:
                self._ask_store(self._save)
            return known
        with self._lock:
            if max_age > DAY:
                self._unsaved.setdefault((client.owner, period), Counter()).update(amounts)
        return self._own.add(client.owner, period, amounts, max_age)

    def _learn(
        self, client: ClientKey, period: str, counters: Mapping[str, int], max_age: float,
    ) -> Mapping[str, int]:
        """What the store tells, and with it what it does not know yet; both are kept for when it fails."""
        if isinstance(self._store, MemoryStore):  # which never does
            return counters
        known = Counter(counters)
        with self._lock:
            known.update(self._unsaved.get((client.owner, period), {}))
        if known:
            self._own.set_counters(client.owner, period, known, max_age)
        return known

    def _ask_store(self, ask: Callable[[], T]) -> T | None:
        """What the store answers; None while it cannot be reached."""
        if time.monotonic() < self._retry_at:
            return None
        try:
            return ask()
        except APIError as error:
            if self._store.is_failing:
                log.warning("limits and usage are counted by this process alone for now: %s", error.reason)
                self._retry_at = time.monotonic() + STORE_RETRY
            return None

    def _save(self) -> None:
        """Tell the store what was used while it could not be reached."""
        while self._unsaved:
            with self._lock:
                if not self._unsaved:
                    return
                (owner, period), amounts = self._unsaved.popitem()
            try:
                self._store.add(owner, period, amounts, USAGE_MAX_AGE)
            except APIError:
                with self._lock:
                    self._unsaved.setdefault((owner, period), Counter()).update(amounts)
                raise


def summed(counters: Mapping[str, int]) -> JSONObject:
    """Counters of a day, such as `prompt_tokens kimi`, by model and in all."""
    models: dict[str, dict[str, int]] = {}
    total = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    for name, amount in counters.items():
        what, _, model = name.partition(" ")
        of_model = models.setdefault(model, dict.fromkeys(total, 0))
        for sums in (total, of_model):
            sums[what] += amount
            if what != "requests":
                sums["total_tokens"] += amount
    return {**total, "models": models}


# ======================================================================================================================
# 15 Metrics
#
# Counters and histograms of this process, in Prometheus's text format 0.0.4; names, units and buckets after
# OpenTelemetry's conventions for generative AI.
# ======================================================================================================================

BUCKETS = [0.01 * 2 ** power for power in range(14)]  # seconds, up to 81.92
METRICS = {
    "kimi2api_chats_total": ("counter", "Chats asked for, by the status of their answer."),
    "kimi2api_chat_duration_seconds": ("histogram", "From the request to the end of the answer."),
    "kimi2api_time_to_first_chunk_seconds": ("histogram", "From the request to the first of the answer."),
    "kimi2api_tokens_total": ("counter", "Tokens, as the upstream counts them or else by estimate."),
    "kimi2api_upstream_errors_total": ("counter", "Calls of an upstream that ended with an error."),
    "kimi2api_upstream_retries_total": ("counter", "Further attempts after a failure."),
    "kimi2api_upstream_healthy": ("gauge", "0 while an upstream fails."),
    "kimi2api_chats_running": ("gauge", "Chats running now."),
    "kimi2api_chats_limit": ("gauge", "Chats that may run at once."),
    "kimi2api_sessions": ("gauge", "Sessions and stored responses kept."),
    "kimi2api_build_info": ("gauge", "The version."),
    "process_start_time_seconds": ("gauge", "Start of the process, in seconds since the epoch."),
}
Labels = tuple[tuple[str, str], ...]
Series = tuple[str, Labels]  # the metric's name, and its labels


class Metrics:
    """Everything that is counted while the process runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards both
        self._counters: dict[Series, float] = {}
        # Of each the counts by bucket, the last of them for all above, and the sum
        self._histograms: dict[Series, list[float]] = {}

    def count(self, metric: str, labels: Mapping[str, str]) -> None:
        self.record({(metric, tuple(labels.items())): 1}, {})

    def record(self, amounts: Mapping[Series, float], durations: Mapping[Series, float]) -> None:
        """Add to counters, and to histograms (seconds). All at once, because at 64 chats at a time a lock costs more
        than what it guards."""
        with self._lock:
            for series, amount in amounts.items():
                self._counters[series] = self._counters.get(series, 0) + amount
            for series, seconds in durations.items():
                histogram = self._histograms.setdefault(series, [0.0] * (len(BUCKETS) + 2))
                histogram[bisect_left(BUCKETS, seconds)] += 1
                histogram[-1] += seconds

    def render(self, gauges: Iterable[tuple[str, Mapping[str, str], float]]) -> str:
        """All of them, and these gauges: name, labels and value."""
        with self._lock:
            counters = list(self._counters.items())
            histograms = [(key, list(histogram)) for key, histogram in self._histograms.items()]
        samples: dict[str, list[str]] = {name: [] for name in METRICS}
        for name, labels, value in gauges:
            samples[name].append(sample(name, tuple(labels.items()), value))
        for (name, label_set), value in counters:
            samples[name].append(sample(name, label_set, value))
        for (name, label_set), histogram in histograms:
            samples[name].extend(histogram_samples(name, label_set, histogram))
        lines = []
        for name, (kind, about) in METRICS.items():
            lines.append(f"# HELP {name} {about}")
            lines.append(f"# TYPE {name} {kind}")
            lines += samples[name]
        return "\n".join(lines) + "\n"


def histogram_samples(name: str, labels: Labels, histogram: list[float]) -> Iterator[str]:
    *counts, seconds = histogram
    total = 0.0
    for bound, count in zip([*BUCKETS, "+Inf"], counts, strict=True):
        total += count
        yield sample(f"{name}_bucket", (*labels, ("le", str(bound))), total)
    yield sample(f"{name}_sum", labels, seconds)
    yield sample(f"{name}_count", labels, total)


def sample(name: str, labels: Labels, value: float) -> str:
    escaped = []
    for label, text in labels:
        text = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        escaped.append(f'{label}="{text}"')
    shown = f"{{{','.join(escaped)}}}" if escaped else ""
    return f"{name}{shown} {value:.17g}"


# ======================================================================================================================
# 16 Deltas
#
# Every upstream's answer is a stream of deltas. Here they are folded into a complete answer, tokens are estimated, and
# texts are cut between graphemes.
# ======================================================================================================================


@dataclass(slots=True)
class Delta:
    """A step of an answer: OpenAI's chat.completion.chunk, less the fields that are the same in all of them."""

    chunk: JSONObject
    is_complete: bool = False  # it is a whole answer, which arrived at once and may be paced
    headers: Headers = field(default_factory=dict)  # for the response, in the first delta of an answer

    @classmethod
    def of(cls, fields: JSONObject, finish_reason: str | None = None, is_complete: bool = False) -> Delta:
        choice = {"index": 0, "delta": fields, "logprobs": None, "finish_reason": finish_reason}
        return cls({"choices": [choice]}, is_complete)

    @property
    def text(self) -> str:
        """What it adds to the text of the first choice."""
        for choice in self.chunk["choices"]:
            if choice["index"] == 0:
                return choice["delta"].get("content") or ""
        return ""

    @property
    def is_final(self) -> bool:
        """Whether it finishes a choice or carries the usage alone, so that it may be the last."""
        choices = self.chunk["choices"]
        if not choices:
            return bool(self.chunk.get("usage"))
        return any(choice["finish_reason"] for choice in choices)

    @property
    def has_content(self) -> bool:
        """Whether it has anything but the role."""
        if self.is_final:
            return True
        for choice in self.chunk["choices"]:
            for name, value in choice["delta"].items():
                if value and name != "role":
                    return True
        return False


class Pieces(list[str]):
    """A text that grows, joined once, at the end."""


class Entries(dict[int, Any]):
    """A list whose entries are identified by their `index`."""


NAMES = ("role", "id", "type", "name")  # texts of a delta that name something, so that a later one replaces them


def merge(whole: Any, part: Any, name: str = "", in_delta: bool = False) -> Any:
    """`whole` with a later part of it added; read the sum with `unfold`.

    Objects are merged field by field and lists by their entries' `index`; within a delta texts are joined. Whatever
    else there is, the later value stands, but for null. Linear in the parts, however many there are.
    """
    if part is None:
        return whole
    if isinstance(part, dict):
        if not isinstance(whole, dict) or isinstance(whole, Entries):
            whole = {}
        for field_name, value in part.items():
            whole[field_name] = merge(whole.get(field_name), value, field_name, in_delta or name == "delta")
        return whole
    if isinstance(part, list):
        return merge_list(whole, part, in_delta)
    if isinstance(part, str) and in_delta and name not in NAMES:
        if not isinstance(whole, Pieces):
            whole = Pieces()
        whole.append(part)
        return whole
    return part


def merge_list(whole: Any, part: list[Any], in_delta: bool) -> Any:
    for entry in part:
        if isinstance(entry, dict) and isinstance(entry.get("index"), int):
            if not isinstance(whole, Entries):
                whole = Entries()
            index = entry["index"]
            whole[index] = merge(whole.get(index), entry, in_delta=in_delta)
        else:
            if type(whole) is not list:
                whole = []
            whole.append(entry)
    return [] if whole is None else whole


def unfold(whole: Any) -> Any:
    """What `merge` has gathered, as plain JSON values."""
    if isinstance(whole, Pieces):
        return "".join(whole)
    if isinstance(whole, Entries):
        return [unfold(whole[index]) for index in sorted(whole)]
    if isinstance(whole, dict):
        return {name: unfold(value) for name, value in whole.items()}
    return whole


def folded(deltas: Iterable[Delta]) -> Delta:
    """All deltas of an answer as one."""
    whole: Any = None
    headers: Headers = {}
    for delta in deltas:
        whole = merge(whole, delta.chunk)
        headers = headers or delta.headers
    return Delta(unfold(whole), headers=headers)


def message_of(choice: JSONObject) -> Message:
    """The message that the merged deltas of a choice make."""
    message = {"role": "assistant", "content": None, "refusal": None, **choice["delta"]}
    for call in message.get("tool_calls") or ():
        call["function"] = {"arguments": "", **(call.get("function") or {})}
        call.pop("index", None)  # only merging needs it
    return message


# Han, kana, Hangul and full-width forms: what a tokenizer spends about a token on, and what is written without spaces
WIDE = "\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff"
NARROW_TEXT = re.compile(f"[^{WIDE}]+")
MAX_COUNT = 10**9  # tokens of one answer; sums of more would become numbers that nobody can write
WIDE_TOKENS = 0.6  # a Chinese character, by DeepSeek's documentation
NARROW_TOKENS = 0.25  # any other, by OpenAI's


def estimate_tokens(text: str) -> int:
    """Tokens by a rule of thumb."""
    wide = 0 if text.isascii() else len(NARROW_TEXT.sub("", text))
    return ceil(wide * WIDE_TOKENS + (len(text) - wide) * NARROW_TOKENS)


def count_of(usage: Any, *names: str) -> int:
    """A number of an upstream's usage, 0 where there is none that could be true."""
    for name in names:
        usage = usage.get(name) if isinstance(usage, dict) else None
    return usage if type(usage) is int and 0 < usage <= MAX_COUNT else 0


def estimate_input(given: Any) -> int:
    """Tokens of what embeddings are asked of: texts, or numbers that are tokens."""
    if isinstance(given, list):
        return sum(map(estimate_input, given))
    return estimate_tokens(given) if isinstance(given, str) else 1


def estimate_usage(prompt: str, completion: str) -> dict[str, int]:
    usage = {"prompt_tokens": estimate_tokens(prompt), "completion_tokens": estimate_tokens(completion)}
    return {**usage, "total_tokens": sum(usage.values())}


def continues_grapheme(text: str, at: int) -> bool:
    """Whether a reader would see the characters on both sides of the index as one."""
    before, after = text[at - 1:at], text[at:at + 1]
    if not after:
        return False
    if "\u200d" in (before, after):  # the joiner of emoji
        return True
    if unicodedata.category(after).startswith("M"):
        return True
    is_flag = "\U0001f1e6" <= after <= "\U0001f1ff"
    is_skin_tone = "\U0001f3fb" <= after <= "\U0001f3ff"
    return is_flag or is_skin_tone


def truncate(text: str, stops: list[str], max_tokens: int | None) -> tuple[str, str]:
    """The text up to the first stop sequence and up to so many tokens, by estimate, and the finish reason."""
    ends = [text.find(stop) for stop in stops if stop in text]
    text = text[:min(ends, default=len(text))]
    if max_tokens is None or estimate_tokens(text) <= max_tokens:
        return text, "stop"
    end = 0
    tokens = 0.0
    for character in text:
        tokens += NARROW_TOKENS if NARROW_TEXT.match(character) else WIDE_TOKENS
        if tokens > max_tokens:
            break
        end += 1
    while end and continues_grapheme(text, end):
        end -= 1
    return text[:end], "length"


# ======================================================================================================================
# 17 Connections
#
# http.client's connections to upstreams, read more strictly and within a deadline, and given up from another thread
# when a chat's client has gone.
# ======================================================================================================================

MAX_INTERIM_RESPONSES = 16
MAX_CHUNK_LINE = 4096
CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,15}")
TIMEOUT_PRECISION = 0.1  # seconds


class Cancel:
    """Ends the upstream call of a chat whose client has gone. Called from another thread than the call's own.

    It reaches the one connection that the call is using at that moment, and none that has been given back.
    """

    def __init__(self) -> None:
        # Guards _sock: it is shut down while it is this chat's, or not at all
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._called = threading.Event()

    def __call__(self) -> None:
        with self._lock:
            self._called.set()
            if self._sock:
                shut_down(self._sock)

    def is_set(self) -> bool:
        return self._called.is_set()

    def wait(self, seconds: float) -> bool:
        """Sleep, but no longer than until the client has gone; whether it has."""
        return self._called.wait(seconds)

    def attach(self, sock: socket.socket) -> None:
        with self._lock:
            self._sock = sock
            if self._called.is_set():
                shut_down(sock)

    def detach(self, sock: socket.socket) -> None:
        with self._lock:
            if self._sock is sock:
                self._sock = None


def shut_down(sock: socket.socket) -> None:
    with suppress(OSError):  # it is closed already
        sock.shutdown(socket.SHUT_RDWR)


class Call:
    """One request under way: how long it may still take, and whose it is."""

    def __init__(self, timeout: float, cancel: Cancel, deadline: float | None = None) -> None:
        self.timeout = timeout  # seconds: REQUEST_TIMEOUT
        self.cancel = cancel
        self.reader: ResponseReader | None = None  # of the answer, once it begins
        # Infinite: the time-out is for each read alone
        self.deadline = deadline or time.monotonic() + timeout
        # The answer, as far as is known; after one that is not, its connection is not used again
        self.is_usable = True

    def limit_reads(self) -> None:
        """From now on the time-out is for each read alone."""
        self.deadline = inf

    def limit(self, seconds: float) -> None:
        """From now on so many seconds are left for all of it."""
        self.deadline = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds that the next read may take. Raises TimeoutError when there are none left."""
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("timed out")
        return min(seconds, self.timeout)


def set_timeout(sock: socket.socket, seconds: float) -> None:
    """Set a socket's time-out unless it is nearly that: setting is a system call and releases the GIL."""
    if abs(seconds - (sock.gettimeout() or inf)) > TIMEOUT_PRECISION:
        sock.settimeout(seconds)


CURRENT_CALL: ContextVar[Call] = ContextVar("current_call")  # for the classes that http.client makes by itself


class DeadlineReader(io.RawIOBase):
    """Reads a socket within what is left of a call's time.

    A socket's own time-out starts anew with every byte, so an upstream that drips could hold a thread for hours.
    """

    def __init__(self, source: Any, sock: socket.socket, call: Call) -> None:
        self._source = source
        self._sock = sock
        self._call = call
        # It gives nothing, so that what has come already can be told from what has not
        self.is_paused = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Any:
        if self.is_paused:
            return 0
        set_timeout(self._sock, self._call.remaining())
        return self._source.readinto(buffer)

    def close(self) -> None:
        self._source.close()
        super().close()


class ResponseReader(io.BufferedReader):
    """What http.client reads an answer from. It closes it at the answer's end, before the connection is used again."""

    def __init__(self, raw: DeadlineReader, sock: socket.socket, call: Call) -> None:
        super().__init__(raw)
        self.is_cut_off = False  # a line was wanted, and the connection has ended
        self._reader = raw
        self._sock = sock
        self._call = call

    def readline(self, size: int | None = -1) -> bytes:
        line = super().readline(size)
        if not line:
            self.is_cut_off = True
        return line

    def waiting(self) -> bytes:
        """What has come and is not read yet."""
        self._reader.is_paused = True
        try:
            return self.peek(1)
        finally:
            self._reader.is_paused = False

    def close(self) -> None:
        if not self.closed:
            self._call.cancel.detach(self._sock)
            decrypted = self._sock.pending() if isinstance(self._sock, ssl.SSLSocket) else 0
            # More than the answer, or an answer that may have been to another request, so that ours is still to come:
            # nobody else may find it there
            if self.waiting() or decrypted or not self._call.is_usable:
                shut_down(self._sock)
        super().close()


class UpstreamResponse(HTTPResponse):
    """http.client's response, read by a deadline, head and body together, past interim responses, and more strictly."""

    def __init__(self, sock: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        call = CURRENT_CALL.get()
        self.fp = call.reader = ResponseReader(DeadlineReader(self.fp.detach(), sock, call), sock, call)
        call.cancel.attach(sock)

    def begin(self) -> None:
        super().begin()
        reader = CURRENT_CALL.get().reader
        if reader and reader.is_cut_off:
            raise HTTPException("its answer is cut off in the head")

    def _read_next_chunk_size(self) -> int:
        """http.client's takes what int() does, such as -5. What it makes of a ValueError is an incomplete read."""
        line = self.fp.readline(MAX_CHUNK_LINE)
        size = line.partition(b";")[0].strip()
        if not (line.endswith(b"\n") and CHUNK_SIZE.fullmatch(size)):
            raise ValueError("no size of a chunk")
        return int(size, 16)

    def _read_status(self) -> tuple[str, int, str]:
        """http.client itself passes over 100 only, and would take a 103 for the whole answer (RFC 9110, 15.2)."""
        for _ in range(MAX_INTERIM_RESPONSES):
            version, status, reason = super()._read_status()  # type: ignore[misc]
            if status == 101:
                raise HTTPException("unexpected 101 Switching Protocols")
            if status >= 200:
                return version, status, reason
            parse_headers(self.fp)
        raise HTTPException("too many interim responses")


class UpstreamConnection:
    """Put before urllib3's class of a connection. Sending has the deadline that reading has, and nothing is sent for a
    client that has left while the connection was made."""

    response_class = UpstreamResponse
    sock: Any
    _unsent: list[bytes] | None = None  # of the request that is being written

    def request(self, *args: Any, **kwargs: Any) -> None:
        """Head and body go out as one; http.client alone sends each by itself, and sets its time-out."""
        unsent: list[bytes] = []
        self._unsent = unsent
        try:
            super().request(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._unsent = None
        self.send(b"".join(unsent))

    def send(self, data: bytes) -> None:
        if self._unsent is not None:
            self._unsent.append(data)
            return
        call = CURRENT_CALL.get()
        if self.sock is None:
            self.connect()  # type: ignore[attr-defined]
        if call.cancel.is_set():
            raise client_disconnected()
        set_timeout(self.sock, call.remaining())
        super().send(data)  # type: ignore[misc]


# ======================================================================================================================
# 18 Transport
#
# Requests to an upstream over pooled connections, for many threads, and the one mapping of what can fail to APIErrors.
# ======================================================================================================================

MAX_UPSTREAM_BYTES = 4 << 20  # of a page, an answer that comes whole, or one event of a stream
LAST_CHUNK = b"0\r\n\r\n"
DRAIN_SECONDS = 1.0  # for what may follow the end of a stream, before its connection can be used again
DRAIN_BYTES = 65536
MAX_POOLS = 20  # hosts and ports; a page that redirects may name any number
MAX_RETRY_AFTER = 5.0  # seconds that a Retry-After may ask for if we are to wait ourselves


class Response:
    """An upstream's answer, of which the head has come. Raises APIError."""

    def __init__(self, transport: Transport, raw: Any, call: Call) -> None:
        self.status: int = raw.status
        self.headers: Headers = raw.headers  # urllib3's, whose names are case-insensitive
        self.raw = raw
        self.call = call
        self._transport = transport

    def read(self, limit: int = MAX_UPSTREAM_BYTES) -> bytes:
        """All of the body, at most so many bytes, within the call's time."""
        try:
            body: bytes = self.raw.read(limit + 1, decode_content=True)
        except HTTPError as error:
            raise self._transport.failure(error, self.call) from None
        finally:
            self.close()
        if len(body) > limit:
            raise invalid_response(self._transport.name, f"more than {limit} bytes", retryable=True)
        return body

    def stream(self) -> Iterator[bytes]:
        """The body as it comes."""
        try:
            while True:
                data = self.raw.read1(65536, decode_content=True)
                if not data:
                    return
                yield data
        except HTTPError as error:
            raise self._transport.failure(error, self.call) from None

    def finish(self, cleanup: ExitStack) -> None:
        """The stream's own end has come. What follows it is read now if it is here, else when the client has all."""
        reader = self.call.reader
        if reader and not reader.closed and reader.waiting().endswith(LAST_CHUNK):
            self._drain(0.01)
        else:
            cleanup.callback(self._drain, DRAIN_SECONDS)

    def _drain(self, seconds: float) -> None:
        """Read the little that may follow a stream's end, so that the connection can be used again, else close it."""
        self.call.limit(seconds)
        size = 0
        with suppress(APIError), closing(self):
            for data in self.stream():
                size += len(data)
                if size > DRAIN_BYTES:
                    return

    def close(self) -> None:
        """Close the connection, unless the body has been read to its end: then it is in the pool already."""
        self.raw.close()


class Transport:
    """Requests to an upstream over pooled connections, for many threads. One way of failing: APIError.

    Sending through requests.Session costs several times what the wire costs, in merging settings, cookies, proxies
    and .netrc. Here that is done once for a host, and urllib3's pool is asked directly. Redirects are not followed.
    """

    def __init__(self, name: str, connections: int, adapter: HTTPAdapter | None = None) -> None:
        self.name = name
        self._adapter = adapter or HTTPAdapter()
        self._adapter.init_poolmanager(10, connections)
        self._pools: dict[str, tuple[Any, bool]] = {}
        # Guards the making of pools: urllib3 has one for all spellings of a host
        self._lock = threading.Lock()

    def request(self, method: str, url: str, headers: Headers, body: bytes | None, call: Call) -> Response:
        parts = urlsplit(url)
        CURRENT_CALL.set(call)
        try:
            pool, absolute_form = self._pool(url)
            target = url if absolute_form else urlunsplit(("", "", parts.path or "/", parts.query, ""))
            raw = pool.urlopen(
                method, target, body, dict(headers), retries=False, redirect=False, preload_content=False,
                assert_same_host=False, timeout=Timeout(total=max(0.01, call.remaining())))
        except TimeoutError:
            raise self.timed_out(call.timeout) from None
        except (HTTPError, requests.RequestException) as error:  # the latter of a proxy's URL that makes no sense
            raise self.failure(error, call) from None
        return Response(self, raw, call)

    def _pool(self, url: str) -> tuple[Any, bool]:
        """The connection pool for a URL's host, and whether its requests carry the whole URL, as plain proxies want it.

        Proxies and certificates are those that HTTPS_PROXY, NO_PROXY, REQUESTS_CA_BUNDLE and friends name.
        """
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}/"
        with self._lock:
            if origin not in self._pools:
                if len(self._pools) >= MAX_POOLS:
                    self._pools.clear()
                self._pools[origin] = self._make_pool(origin)
            return self._pools[origin]

    def close_idle(self, url: str) -> None:
        """Close the connections to a URL's host that no request is using."""
        pool, _ = self._pool(url)
        with suppress(Empty):
            while True:
                connection = pool.pool.get(block=False)
                if connection:
                    connection.close()

    def _make_pool(self, origin: str) -> tuple[Any, bool]:
        request = requests.Request("GET", origin).prepare()
        proxies = {}
        if not is_loopback(urlsplit(origin).hostname):  # a proxy's loopback is not ours
            proxies = get_environ_proxies(origin)
        verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
        pool: Any = self._adapter.get_connection_with_tls_context(request, verify, proxies)
        if not issubclass(pool.ConnectionCls, UpstreamConnection):
            pool.ConnectionCls = type("Connection", (UpstreamConnection, pool.ConnectionCls), {})
        return pool, self._adapter.request_url(request, proxies) != "/"

    # Failures

    def failure(self, error: Exception, call: Call) -> APIError:
        # urllib3's functions hold the error that holds them, and so the request
        clear_frames(error.__traceback__)
        if isinstance(innermost(error), TimeoutError):
            return self.timed_out(call.timeout)
        if isinstance(error, DecodeError):
            return invalid_response(self.name, "an answer that cannot be decoded", retryable=True)
        return upstream_error(
            502, "upstream_unavailable", f"{self.name} cannot be reached: {root_cause(error)}.", retryable=True)

    def timed_out(self, seconds: float) -> APIError:
        message = f"{self.name} did not answer within {seconds:g} s."
        # No other attempt: the prompt was taken
        return upstream_error(504, "upstream_timeout", message, headers=NO_SDK_RETRY)


MARKUP = re.compile(r"<[^<>]*>")
CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


def innermost(error: BaseException) -> BaseException:
    """The error that the layers above have wrapped."""
    cause = error.__cause__ or error.__context__
    return innermost(cause) if cause else error


def root_cause(error: BaseException) -> str:
    """The innermost reason, without the URLs and object names that the layers above wrap around it."""
    error = innermost(error)
    reason = getattr(error, "strerror", None) or MARKUP.sub("", str(error)[:1000]).strip(" :.")
    return CONTROL_CHARACTERS.sub(" ", reason)[:300] or type(error).__name__


def plain_line(answer: Any, secret: str = "") -> str:
    """What upstream said (a string, an object or nothing) as one line of at most 300 characters, without HTML."""
    if isinstance(answer, dict):
        answer = answer.get("message") or answer.get("error") or answer.get("code") or answer
    if answer is None:
        answer = ""
    elif not isinstance(answer, str):
        answer = json.dumps(answer, ensure_ascii=False)
    text = unescape(MARKUP.sub(" ", answer[:10_000]))
    line = " ".join(CONTROL_CHARACTERS.sub(" ", text).split())
    if secret:
        line = line.replace(secret, "…")
    return replace_lone_surrogates(line[:300]) or "(no reason given)"


def rate_limited(message: str, type: str, code: str, headers: Headers) -> APIError:
    """A 429 that passes Retry-After on, and is retried here only when the wait is known and short."""
    wait = parse_retry_after(headers.get("Retry-After"))
    if wait is None:
        return APIError(429, message, type, code)
    passed_on = {"Retry-After": str(ceil(wait))}
    is_short = wait <= MAX_RETRY_AFTER
    return APIError(429, message, type, code, headers=passed_on, retryable=is_short, retry_after=wait)


def parse_retry_after(value: str | None) -> float | None:
    """Seconds to wait by a Retry-After header (RFC 9110: seconds or a date), None if there is none to go by."""
    if not value:
        return None
    try:
        if value.strip().isdecimal():
            return min(float(value[:20]), 1e9)
        return max(0.0, parsedate_to_datetime(value[:100]).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


# ======================================================================================================================
# 19 Circuit breaker
#
# An upstream that keeps failing is not asked for a while; its callers learn so at once.
# ======================================================================================================================

FAILURES_TO_OPEN = 5  # in a row
FIRST_PAUSE, MAX_PAUSE = 1.0, 60.0  # seconds that the circuit stays open, doubled each time, and at most


class CircuitBreaker:
    """Spares an upstream that keeps failing.

    Closed: calls go through. Open, after FAILURES_TO_OPEN failures in a row: they are refused with the last error, for
    a pause that doubles each time. Half-open, when the pause is over: one call at a time may probe.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()  # guards all below; never held while upstream is asked
        self._failures = 0
        # The last one while the circuit is open or half-open
        self._error: APIError | None = None
        self._open_until = 0.0  # by the monotonic clock
        self._probing = False
        self.failing: tuple[float, str] | None = None  # since when (seconds since the epoch) and why

    def allow(self) -> bool:
        """Let a call through; whether it is a probe. Raises the last error, with Retry-After, for a call refused."""
        with self._lock:
            if self._error is None:
                return False
            pause = self._open_until - time.monotonic()
            if pause <= 0 and not self._probing:
                self._probing = True
                return True
            raise self._error.copy(
                message=f"{self._error.message} Not asked again for now, after {self._failures} failures.",
                headers={"Retry-After": str(max(1, ceil(pause)))})

    def succeeded(self, probe: bool = False) -> None:
        with self._lock:
            self._end_probe(probe)
            self._close()
            self.failing = None

    def failed(self, error: APIError, probe: bool = False) -> None:
        # It is well, and says what is wrong with the request
        if error.status < 500 and error.status != 429:
            self.succeeded(probe)
            return
        with self._lock:
            self._end_probe(probe)
            self.failing = self.failing or (time.time(), error.reason)
            # It answers, be it with a no
            if error.status == 429 or error.code == "upstream_refused":
                self._close()
            elif probe or self._error is None:  # else the call began before the circuit opened
                self._count(error)

    def ignored(self, probe: bool = False) -> None:
        """The call ended in a way that tells nothing of upstream."""
        with self._lock:
            self._end_probe(probe)

    # The caller of these holds the lock

    def _end_probe(self, probe: bool) -> None:
        if probe:
            self._probing = False

    def _close(self) -> None:
        self._failures = 0
        self._error = None

    def _count(self, error: APIError) -> None:
        self._failures += 1
        if self._failures >= FAILURES_TO_OPEN:
            pause = min(FIRST_PAUSE * 2 ** min(self._failures - FAILURES_TO_OPEN, 9), MAX_PAUSE)
            self._error = error.copy()
            self._open_until = time.monotonic() + pause
            log.warning("%s failed %d times in a row; not asked for %g s", self._name, self._failures, pause)


# ======================================================================================================================
# 20 Upstreams
#
# What providers have in common. A provider turns a Chat into a stream of Deltas; what many chats want is fetched once.
# ======================================================================================================================

FIRST_BACK_OFF, MAX_BACK_OFF = 0.25, 4.0  # seconds before the first retry, doubled each time, and at most


class Tally:
    """What an answer has taken so far, for usage and metrics."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.provider = ""  # that was asked last
        self.model = ""  # by the id that clients know
        self.first_chunk: float | None = None  # seconds after the beginning
        self.usage: Any = None
        self.messages: list[Message] = []  # of the prompt
        self._written: list[str] = []  # by the model

    def count(self, provider: str, model: str, deltas: Iterator[Delta]) -> Iterator[Delta]:
        """The deltas of this provider's answer, counted; the last tells the usage, by estimate if no other does."""
        self.provider = provider
        self.model = model
        self.first_chunk = None
        self.usage = None
        self._written = []
        for delta in deltas:
            if self.first_chunk is None:
                self.first_chunk = time.monotonic() - self.began
            self.usage = delta.chunk.get("usage") or self.usage
            self._note(delta)
            yield delta
        if not self.usage:
            self.usage = self._estimate()
            yield Delta({"choices": [], "usage": self.usage})

    def _note(self, delta: Delta) -> None:
        """Keep what the model wrote, in every choice: its reasoning and its calls too."""
        for choice in delta.chunk["choices"]:
            for name, value in choice["delta"].items():
                if name == "tool_calls":
                    for call in value or ():
                        function = call.get("function") or {}
                        self._written.append(function.get("name") or "")
                        self._written.append(function.get("arguments") or "")
                elif type(value) is str and name != "role":
                    self._written.append(value)

    def tokens(self) -> tuple[int, int]:
        """Of the prompt and of the answer, each as the upstream counts it, else by estimate."""
        prompt = count_of(self.usage, "prompt_tokens")
        completion = count_of(self.usage, "completion_tokens")
        if prompt and completion:
            return prompt, completion
        estimate = self._estimate()
        return prompt or estimate["prompt_tokens"], completion or estimate["completion_tokens"]

    def _estimate(self) -> dict[str, int]:
        return estimate_usage("\n".join(map(text_of, self.messages)), "".join(self._written))


@dataclass(frozen=True)
class Chat:
    """What a provider is asked."""

    request: ChatRequest
    model: str  # by the upstream's own name
    history: Turns = ()  # remembered before it
    session_id: str = ""
    owner: str = ""  # whose it is
    store: Sessions = field(default_factory=lambda: Sessions(MemoryStore(0.0, 0)))  # keeps nothing
    tally: Tally = field(default_factory=Tally)
    cancel: Cancel = field(default_factory=Cancel)
    cleanup: ExitStack = field(default_factory=ExitStack)  # what is left to do once the client has the whole answer


class SharedFetch(Generic[T]):
    """Something that all chats share: fetched once for all who ask meanwhile, on a thread of its own, and kept."""

    def __init__(self, name: str, fetch: Callable[[], T], max_age: float, retry_after: float = 0.0) -> None:
        self._name = name
        self._fetch = fetch
        self._max_age = max_age  # seconds that it is kept
        self._retry_after = retry_after  # seconds before it is fetched again after a failure
        self.known: T | None = None  # what was fetched last, however old it is
        self._lock = threading.Lock()  # guards all below; never held while upstream is asked
        self._latest: Future[T] = Future()
        # When it is to be fetched again, seconds since the epoch; infinite during a fetch
        self._due = 0.0

    def latest(self) -> Future[T]:
        """The latest fetch, under way or done; a new one if that is too old."""
        with self._lock:
            if time.time() >= self._due:
                fetch: Future[T] = Future()
                threading.Thread(target=self._run, args=(fetch,), name=self._name, daemon=True).start()
                self._latest = fetch
                self._due = inf
            return self._latest

    def reject(self, fetch: Future[T]) -> None:
        """What this fetch brought is of no use any more: whoever asks next starts another, unless somebody has."""
        with self._lock:
            if self._latest is fetch:
                self._due = 0.0

    def _run(self, fetch: Future[T]) -> None:
        keep = self._retry_after
        try:
            self.known = self._fetch()
            settle = partial(fetch.set_result, self.known)
            keep = self._max_age
        except Exception as error:  # for those who wait
            settle = partial(fetch.set_exception, as_api_error(error).copy())
        # First, so that a caller who has seen a failure and asks again starts a new fetch
        with self._lock:
            self._due = time.time() + keep
        settle()


UPSTREAM_CODES = frozenset({
    "upstream_auth", "upstream_blocked", "upstream_changed", "upstream_invalid_response", "upstream_rate_limited",
    "upstream_refused", "upstream_timeout", "upstream_unavailable", "invalid_json_answer", "context_length_exceeded",
})


class Provider:
    """An upstream: subclasses know its protocol.

    One more OpenAI-style API is two settings, NAME_API_KEY and NAME_BASE_URL. Anything else is a subclass with
    `stream` and `check`, an entry in Providers, and in Settings.resolve the ids of its models.
    """

    def __init__(self, name: str, settings: Settings, metrics: Metrics) -> None:
        self.name = name
        self.breaker = CircuitBreaker(name)
        self._settings = settings
        self._metrics = metrics

    def stream(self, chat: Chat) -> Iterator[Delta]:
        """The answer. Raises APIError, also in the middle when the upstream breaks off."""
        raise NotImplementedError

    def embed(self, body: JSONObject, cancel: Cancel) -> tuple[JSONObject, Headers]:
        """The answer to a request for embeddings, and headers for it. Raises APIError."""
        raise bad_request("The web chat has no embeddings; the models of APIs do.", "model", "unsupported_value")

    def models(self, wait: float) -> Mapping[str, JSONObject]:
        """What the upstream lists, by its own names, as far as is known after so many seconds."""
        return {}

    def check(self) -> Iterator[tuple[str, APIError | None]]:
        """Go through the upstream step by step: (what was tried, the error that ended it)."""
        raise NotImplementedError

    def _check_answer(self, model: str) -> Iterator[tuple[str, APIError | None]]:
        """Ask for one answer, of a model that the settings name, or else of this one."""
        for configured in (*self._settings.fallback_models, *self._settings.models):
            provider, own_name = self._settings.resolve(configured) or ("", "")
            if provider == self.name:
                model = own_name
                break
        began = time.monotonic()
        question = ChatRequest.parse(b'{"messages": [{"role": "user", "content": "Reply with the one word: OK"}]}')
        chat = Chat(question, model, session_id=new_session_id(time.time()))
        try:
            with chat.cleanup:
                deque(self.stream(chat), maxlen=0)
        except APIError as error:
            yield "one question answered", error
        else:
            yield f"one question answered in {time.monotonic() - began:.1f} s", None

    @contextmanager
    def _watched(self, cancel: Cancel) -> Iterator[Callable[[], None]]:
        """Around a whole call: the circuit breaker may refuse it, and learns how it ends. What it yields is called when
        the answer has begun, which is enough of a probe: the rest may take long."""
        probe = self.breaker.allow()

        def has_begun() -> None:
            nonlocal probe
            if probe:
                self.breaker.succeeded(probe)
                probe = False

        try:
            yield has_begun
        except APIError as error:
            # A bug of ours in a fetch that chats share
            if cancel.is_set() or error.code == "internal_error":
                self.breaker.ignored(probe)
            else:
                self.breaker.failed(error, probe)
                # Theirs could be any
                code = error.code if error.code in UPSTREAM_CODES else f"http_{error.status}"
                self._metrics.count("kimi2api_upstream_errors_total", {"provider": self.name, "code": str(code)})
            raise
        except BaseException:  # our own bugs do not count against upstream, nor does a client that leaves
            self.breaker.ignored(probe)
            raise
        self.breaker.succeeded(probe)

    def _retry(self, attempt: Callable[[], T], cancel: Cancel) -> T:
        """What attempt() returns, tried again up to MAX_RETRIES times while its error allows it."""
        retries = 0
        while True:
            if cancel.is_set():
                raise client_disconnected()
            try:
                return attempt()
            except APIError as error:
                if not error.retryable or retries >= self._settings.max_retries:
                    raise error.with_headers(NO_SDK_RETRY) if retries else error from None
                back_off = min(FIRST_BACK_OFF * 2 ** retries, MAX_BACK_OFF) * random.uniform(0.5, 1)
                pause = error.retry_after or back_off
                retries += 1
                self._metrics.count("kimi2api_upstream_retries_total", {"provider": self.name})
                log.warning("%s: %s; retry %d of %d in %.1f s", self.name, error.reason, retries,
                            self._settings.max_retries, pause)
                cancel.wait(pause)


# ======================================================================================================================
# 21 Prompts
#
# A request as plain text, for an upstream that knows nothing else: history, tools and JSON are asked for in words, and
# read back from the answer. Pure functions of a request, linear in what they read.
# ======================================================================================================================

SPEAKERS = {"user": "用户", "assistant": "模型", "tool": "工具"}  # as the site's public clients write history
SHORTEST_RESULT = 60  # characters of a tool's result that stay when it is clipped
CLIPPED = " [… clipped …] "


@dataclass
class Prompt:
    """The parts of a prompt, in the order in which the model reads them."""

    limit: int  # characters
    system: list[str]
    how_to_call: str
    rules: list[str]  # for the form of the answer
    question: list[str]
    last_round: list[str]  # of calls and their results
    tools: list[str] = field(default_factory=list)
    older: list[str] = field(default_factory=list)
    rounds: list[str] = field(default_factory=list)  # before the last
    tools_dropped: int = 0  # for which there was no room

    @property
    def offer(self) -> list[str]:
        """The tools, and how to call one."""
        return [self.how_to_call, *self.tools] if self.tools else []

    @property
    def head(self) -> list[str]:
        return self.system + self.offer + self.rules

    @property
    def text(self) -> str:
        lines = self.head
        if lines:
            lines.append("")
        return "\n".join(lines + self.older + self.question + self.rounds + self.last_round)

    @property
    def room(self) -> int:
        """Characters that are left of the limit; negative when it is too long."""
        return self.limit - len(self.text)


def write_prompt(request: ChatRequest, history: Turns, limit: int, remark: str = "") -> Prompt:
    """System messages and instructions, what fits of tools and of what was said before, and the newest message.

    What gives way to the limit (characters), in this order: older turns beyond a third of it; older rounds of tools in
    the newest turn; tools that need not be called; all older turns; the middle of long results in the last round.
    remark: of an earlier answer that could not be used. Raises APIError 400 for what is too long even so, or has no
    text at all.
    """
    turns = append_turns(history, request.turns)
    functions = called_functions(turns)
    newest = turns[-1] if turns else ()
    question, *rounds = rounds_of(newest)
    last_round = rounds.pop() if rounds else ()
    older = [write_messages(turn, functions) for turn in turns[:-1]]
    tools = list(map(describe_tool, request.tools))
    prompt = Prompt(
        limit,
        system=non_empty(map(text_of, request.system)),
        how_to_call=how_to_call(request),
        rules=non_empty([form_instruction(request), remark]),
        question=non_empty([write_messages(question, functions)]),
        last_round=non_empty([write_messages(last_round, functions)]),
    )
    if len(newest) == 1 and not (older or tools or prompt.head):
        prompt.question = [text_of(newest[0])]  # it stands alone, and needs no name before it
        prompt.last_round = []
    wanted = 0
    if request.must_call:
        prompt.tools = tools
    elif tools:
        wanted = min(joined_length([prompt.how_to_call, *tools]), limit // 3)
    if prompt.room < wanted:
        clipped = clip_results(last_round, wanted - prompt.room)
        prompt.last_round = non_empty([write_messages(clipped, functions)])
    if prompt.room < 0:
        raise too_long(prompt)
    if not request.must_call:
        for_older = min(joined_length(older), limit // 3)  # else 28 tools would leave no room for what was said
        blank_line = 0 if prompt.head else 1
        prompt.tools = first_that_fit(tools, prompt.room - for_older - len(prompt.how_to_call) - 1 - blank_line)
    prompt.rounds = latest_that_fit([write_messages(messages, functions) for messages in rounds], prompt.room)
    if len(prompt.rounds) == len(rounds):
        prompt.older = latest_that_fit(older, prompt.room)
    if not prompt.text.strip():
        raise bad_request("'messages' contain no text.", "messages")
    prompt.tools_dropped = len(tools) - len(prompt.tools)
    return prompt


def too_long(prompt: Prompt) -> APIError:
    """In words that clients know the error by."""
    sizes = {
        "system": joined_length(prompt.system),
        "tools": joined_length(prompt.offer),
        "response format": joined_length(prompt.rules),
        "newest message": joined_length(prompt.question + prompt.last_round),
    }
    parts = ", ".join(f"{name} {size}" for name, size in sizes.items() if size)
    return bad_request(
        f"This model's maximum context length is {prompt.limit} characters (CONTEXT_MAX_LENGTH). Your messages have "
        f"{sum(sizes.values())}: {parts}. Please reduce the length of the messages, or set FALLBACK_MODELS to an "
        "official API.", "messages", "context_length_exceeded")


def non_empty(texts: Iterable[str]) -> list[str]:
    return list(filter(None, texts))


def joined_length(lines: list[str]) -> int:
    return len("\n".join(lines))


def first_that_fit(texts: Iterable[str], room: int) -> list[str]:
    """Those, in order, for which there is room, a line's end included; one that is too long gives way to the next."""
    kept = []
    for text in texts:
        if len(text) < room:
            kept.append(text)
            room -= len(text) + 1
    return kept


def latest_that_fit(texts: list[str], room: int) -> list[str]:
    """As many from the end as there is room for, up to the first that is too long."""
    first = len(texts)
    while first > 0 and len(texts[first - 1]) < room:
        first -= 1
        room -= len(texts[first]) + 1
    return texts[first:]


def rounds_of(turn: Turn) -> list[Turn]:
    """The user's message and what follows it, then each round: calls of tools and their results."""
    rounds: list[list[Message]] = [[]]
    for message in turn:
        if message.get("tool_calls"):
            rounds.append([])
        rounds[-1].append(message)
    return [tuple(messages) for messages in rounds]


def clip_results(messages: Turn, excess: int) -> Turn:
    """Messages with the middle of their tool results left out, of the longest first, until so many characters are."""
    clipped = list(messages)
    texts = {}
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            texts[index] = text_of(message)
    for index in sorted(texts, key=lambda index: len(texts[index]), reverse=True):
        text = texts[index]
        half = max(SHORTEST_RESULT, len(text) - excess - len(CLIPPED)) // 2
        short = text[:half] + CLIPPED + text[-half:]
        if excess > 0 and len(short) < len(text):
            clipped[index] = {**messages[index], "content": short}
            excess -= len(text) - len(short)
    return tuple(clipped)


def called_functions(turns: Iterable[Turn]) -> dict[str, str]:
    """The names of the functions that were called, by the ids of the calls."""
    names = {}
    for turn in turns:
        for message in turn:
            for call in message.get("tool_calls") or ():
                if call.get("id"):
                    names[call["id"]] = call["function"]["name"]
    return names


def write_messages(messages: Iterable[Message], functions: Mapping[str, str]) -> str:
    return "\n".join(write_message(message, functions) for message in messages)


def write_message(message: Message, functions: Mapping[str, str]) -> str:
    role: str = message["role"]
    speaker = SPEAKERS.get(role, role)
    if role == "tool" and message.get("tool_call_id") in functions:
        speaker += f" {functions[message['tool_call_id']]}"
    calls = ""
    for call in message.get("tool_calls") or ():
        function = call["function"]
        calls += f'<tool_call>{{"name": "{function["name"]}", "arguments": {function["arguments"]}}}</tool_call>'
    return f"{speaker}: {text_of(message)}{calls}"


def how_to_call(request: ChatRequest) -> str:
    how = "You must call" if request.must_call else "You may call"
    what = "one tool" if request.body.get("parallel_tool_calls") is False else "tools"
    return (
        f'{how} {what} by answering <tool_call>{{"name": …, "arguments": {{…}}}}</tool_call>, '
        "arguments being JSON. You get the results and go on. Tools:")


def form_instruction(request: ChatRequest) -> str:
    answer = request.body.get("response_format") or {}
    if answer.get("type") not in ("json_object", "json_schema"):
        return ""
    schema = (answer.get("json_schema") or {}).get("schema")
    form = f", valid by this schema: {dump_json(schema).decode()}" if schema else ": an object."
    return f"Answer with one JSON document and nothing else{form}"


def describe_tool(tool: JSONObject) -> str:
    """In few words, for their room is small."""
    schema = tool.get("parameters") or {}
    source = dump_json(schema).decode()
    form = source if '"$ref"' in source else signature(schema)
    purpose = " ".join((tool.get("description") or "").split())
    return f"- {tool['name']}{form}: {purpose}" if purpose else f"- {tool['name']}{form}"


def signature(schema: Any) -> str:
    """A JSON schema in the short form of a type: {city: string, days?: integer, unit?: "C"|"F"}."""
    if not isinstance(schema, dict) or not schema.keys() & {"type", "enum", "properties"}:
        return dump_json(schema).decode()
    kind = schema.get("type")
    if isinstance(schema.get("enum"), list):
        return "|".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
    if isinstance(schema.get("properties"), dict):
        required = schema.get("required")
        if not isinstance(required, list):
            required = []
        names = set(map(str, required))
        fields = []
        for name, field_schema in schema["properties"].items():
            optional = "" if name in names else "?"
            fields.append(f"{name}{optional}: {signature(field_schema)}")
        return "{" + ", ".join(fields) + "}"
    if kind == "array" and schema.get("items"):
        return f"[{signature(schema['items'])}]"
    if isinstance(kind, list):
        return "|".join(map(str, kind))
    return str(kind)


# ======================================================================================================================
# 22 Reading answers
#
# What a model wrote in plain text, read back: calls of tools, a JSON document. Linear in the text, which may be
# anybody's.
# ======================================================================================================================

ToolCall = tuple[str, str]  # the function's name, and its arguments as JSON


class UnusableAnswer(Exception):
    """An answer that is not what the request asked for; the message says to the model what was wrong."""


class NoDocument(UnusableAnswer):
    """There is no JSON document in the answer, or a broken one."""


def parse_answer(text: str, request: ChatRequest, any_tool: bool = False) -> tuple[str, list[ToolCall]]:
    """The content and the tool calls of a model's answer. Raises UnusableAnswer.

    any_tool: pass calls of tools that were not offered on; agents answer that there is no such tool.
    """
    if request.tools:
        content, calls = parse_tool_calls(text, request, any_tool)
        if calls and request.body.get("parallel_tool_calls") is False:
            calls = calls[:1]
        if calls:
            return content, calls
        if request.must_call:
            raise UnusableAnswer("it must contain a tool call.")
    answer = request.body.get("response_format") or {}
    if answer.get("type") == "json_object":
        return parse_document(text, dict), []
    if answer.get("type") == "json_schema":
        kind = answer["json_schema"]["schema"].get("type")
        if kind == "array":
            return parse_document(text, list), []
        return parse_document(text, dict if kind == "object" else object), []
    return text, []


# The form that instructions() asks for, and the one that Kimi K2 was trained on
CALL = re.compile(r"""<tool_call>\s*(?:```\w*\s*)?
    |<\|tool_call_begin\|>\s*(?:functions\.)?(?P<name>[\w.-]{1,128}?)(?::\d{1,9})?\s*<\|tool_call_argument_begin\|>\s*
    """, re.X)
CALL_END = re.compile(r"\s*(?:```\s*)?(?:</tool_call>|<\|tool_call_end\|>)?")
CALL_LEFTOVERS = re.compile(r"<\|tool_calls_section_(?:begin|end)\|>|```\w*\s*```")


def parse_tool_calls(text: str, request: ChatRequest, any_tool: bool) -> tuple[str, list[ToolCall]]:
    """The text around the calls, and the calls. Raises UnusableAnswer for a call that cannot be made."""
    offered = {tool["name"] for tool in request.tools}
    calls = []
    around = []
    at = 0
    while True:
        begin = CALL.search(text, at)
        if not begin:
            break
        around.append(text[at:begin.start()])
        value, at = decode_json(text, begin.end())
        if begin["name"]:
            value = {"name": begin["name"], "arguments": value}
        calls.append(parse_call(value, offered, any_tool))
        end = CALL_END.match(text, at)
        at = end.end() if end else at
    if calls:
        around.append(text[at:])
        return CALL_LEFTOVERS.sub("", "".join(around)).strip(), calls
    try:
        value = parse_json(strip_code_fence(text))
    except ValueError:
        return text, []
    if isinstance(value, dict) and value.get("name") in offered and "arguments" in value:
        # Nothing but a call, without its marks
        return "", [parse_call(value, offered, any_tool)]
    return text, []


def parse_call(value: Any, offered: set[str], any_tool: bool) -> ToolCall:
    if not isinstance(value, dict):
        value = {}
    name = value.get("name")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # JSON in a string, as OpenAI's API has it
        try:
            arguments = parse_json(arguments.strip() or "{}")
        except ValueError as error:
            raise UnusableAnswer(f"its arguments are not valid JSON: {error}") from None
    if not isinstance(name, str) or not name or (name not in offered and not any_tool):
        raise UnusableAnswer(f"there is no tool {str(name)[:100]!r}; there are {', '.join(sorted(offered))}.")
    if not isinstance(arguments, dict):
        raise UnusableAnswer(f"the arguments of {name} must be a JSON object.")
    return name, replace_lone_surrogates(json.dumps(arguments, ensure_ascii=False))


def strip_code_fence(text: str) -> str:
    """What stands between the ``` of a text that is one fenced block and nothing else, or the text itself."""
    text = text.strip()
    if len(text) < 6 or not (text.startswith("```") and text.endswith("```")):
        return text
    return re.sub(r"\A[\w-]{0,40}", "", text[3:-3])


BRACKET = re.compile(r'\\.|["{}\[\]]', re.S)
CLOSING = {"{": "}", "[": "]"}
BEGINS_JSON = re.compile(r'{\s*["}]|\[\s*["{\[\]\d\-tfn]')  # else it is a bracket of prose: {x}, [see]
LOOKS_LIKE_JSON = re.compile(r"""[{\[]\s*["'{\[]""")
MAX_BROKEN = 100  # brackets such as [1st]; each costs Python a look through all the text before it


def parse_document(text: str, kind: type) -> str:
    """The one JSON document of this type in an answer: all of it, or the longest between prose and fences.

    A part of a document must not pass for the whole: what stands in a bracket that cannot be read does not count.
    Raises NoDocument.
    """
    with suppress(ValueError):
        if isinstance(parse_json(text), kind):
            return text.strip()
    longest = ""
    broken = 0
    unread: list[str] = []  # what closes the brackets around this place, the innermost last
    in_string = False
    at = 0
    while True:
        token = BRACKET.search(text, at)
        if not token:
            break
        at = token.end()
        start = at - 1
        mark = text[start]
        if in_string:
            in_string = token[0] != '"'
        elif mark == '"':
            in_string = bool(unread)  # quotation marks in prose open nothing
        elif mark in CLOSING and not unread and BEGINS_JSON.match(text, start):
            try:
                value, at = decode_json(text, start)
            except UnusableAnswer as error:
                broken += 1
                if LOOKS_LIKE_JSON.match(text, start) or broken > MAX_BROKEN:
                    raise NoDocument(str(error)) from None
                unread.append(CLOSING[mark])
            else:
                if isinstance(value, kind) and at - start >= len(longest):
                    longest = text[start:at]
        elif mark in CLOSING:
            unread.append(CLOSING[mark])
        elif mark in "}]" and (not unread or unread.pop() != mark):
            raise NoDocument("its brackets do not match.")
    if not longest:
        raise NoDocument("there is no JSON document of the right kind in it.")
    return longest


def decode_json(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins there, and where it ends. Raises UnusableAnswer."""
    try:
        value, end = STRICT_JSON.raw_decode(text, start)
        check_depth(value)
        return value, end
    except (ValueError, RecursionError) as error:
        raise UnusableAnswer(f"not valid JSON: {error}") from None


# ======================================================================================================================
# 23 Scraper
#
# cloudscraper over our transport: cookies, ciphers and old challenges are its own, connections and deadlines ours.
# ======================================================================================================================

CHALLENGE_DELAY = 4.0  # seconds before a challenge is answered; without it, the page could name any
MAX_CHALLENGE_BYTES = 24 << 10  # of a page that may be a challenge
MAX_CHALLENGE_WORD = 8 << 10
SOLVING_SECONDS = 5.0
SOLVE = """
import json, sys
from cloudscraper import CloudScraper
from cloudscraper.cloudflare import Cloudflare
print(json.dumps(Cloudflare(CloudScraper()).IUAM_Challenge_Response(*json.load(sys.stdin))))
"""
MAX_COOKIES = 20
MAX_COOKIE_BYTES = 8 << 10  # of all that one answer sets, and of all that are kept


class Challenge(Cloudflare):  # type: ignore[misc]
    """cloudscraper's challenges, solved in a process of their own.

    On a page that is made for it, its expressions hold the interpreter for hours, and its solver never ends.
    """

    def IUAM_Challenge_Response(self, body: str, url: str, interpreter: str) -> JSONObject:
        given = json.dumps([body, url, interpreter]).encode()
        try:
            solver = subprocess.run(  # noqa: S603  # a program of our own; the page is its input
                [sys.executable, "-c", SOLVE], input=given, capture_output=True, timeout=SOLVING_SECONDS, check=True)
            answer: JSONObject = json.loads(solver.stdout)
        except (OSError, ValueError, subprocess.SubprocessError):
            self.cloudscraper.simpleException(CloudflareSolveError, "a challenge that could not be solved")
        return answer


class Scraper(cloudscraper.CloudScraper):  # type: ignore[misc]
    """cloudscraper over our transport, for many threads; cookies, ciphers and solving challenges stay cloudscraper's.

    Raises APIError, and cloudscraper's CloudflareException for a challenge that it cannot solve.
    """

    # cloudscraper's own list ends with Chrome 76
    USER_AGENT = (
        "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) "
        "Chrome/142.0.0.0 Safari/537.36")

    def __init__(self, name: str, connections: int, timeout: float) -> None:
        super().__init__(
            browser={"browser": "chrome", "platform": "windows", "mobile": False}, delay=CHALLENGE_DELAY,
            doubleDown=False)  # it would look at a second page without is_challenge
        self.headers["User-Agent"] = self.USER_AGENT
        self.transport = Transport(name, connections, self.get_adapter("https://"))
        self._timeout = timeout
        self._jar_lock = threading.Lock()  # guards cookies: cookie jars are not thread-safe

    def simpleException(self, exception: type[Exception], msg: str) -> NoReturn:
        """cloudscraper's also sets sys.tracebacklimit to 0, which empties every later traceback of the process."""
        self._solveDepthCnt = 0
        raise exception(msg)

    def request(self, method: str, url: str, **kwargs: Any) -> requests.Response:
        """cloudscraper's own, but for what its expressions may see; see is_challenge. What a challenge asks for stays
        on the host of the first request."""
        if kwargs.setdefault("host", urlsplit(url).hostname) != urlsplit(url).hostname:
            self.simpleException(CloudflareSolveError, "a challenge that leads to another host")
        response = self.perform_request(method, url, **kwargs)
        if not self.is_challenge(response):
            self._solveDepthCnt = 0
            return response
        if self._solveDepthCnt >= self.solveDepth:
            self.simpleException(CloudflareLoopProtection, "a challenge that comes again after it is solved")
        self._solveDepthCnt += 1
        try:
            solved: requests.Response = Challenge(self).Challenge_Response(response, **kwargs)
        except ValueError as error:  # of an address that is none
            self.simpleException(CloudflareSolveError, f"a challenge that leads nowhere ({error})")
        return solved

    def perform_request(
        self, method: str, url: str, *, data: bytes | dict[str, str] | None = None, headers: Any = None,
        timeout: float, cancel: Cancel | None = None, **_: Any,
    ) -> requests.Response:
        """Called by cloudscraper for every request. timeout: seconds that are left for all of it."""
        request = requests.PreparedRequest()
        request.method = method
        request.url = url
        sent = {**self.headers, **(headers or {})}
        request.headers = sent  # type: ignore[assignment]  # a plain dict will do here
        with self._jar_lock:
            cookies = get_cookie_header(self.cookies, request) if self.cookies else None
        if cookies:
            sent["Cookie"] = cookies
        body = urlencode(data).encode() if isinstance(data, dict) else data
        call = Call(self._timeout, cancel or Cancel(), deadline=time.monotonic() + timeout)
        answer = self.transport.request(method, url, sent, body, call)
        if "Set-Cookie" in answer.headers:
            self._keep_cookies(request, answer)
        response = requests.Response()
        response.status_code = answer.status
        response.headers = answer.headers  # type: ignore[assignment]  # urllib3's are case-insensitive too
        response.url = url
        response.request = request
        response.encoding = "utf-8"
        response._content = answer.read()  # what response.content and response.text go by
        return response

    def is_challenge(self, response: requests.Response) -> bool:
        """Whether cloudscraper could solve it. Raises CloudflareException for one that it knows and cannot solve.

        Its expressions are quadratic in the page, and a regular expression holds every thread up; so they see nothing
        that no challenge is like.
        """
        page = response.content
        if response.status_code == 200 or len(page) > MAX_CHALLENGE_BYTES:
            return False
        if page.count(b"<form") > 4 or page.count(b"challenge-form") > 4:
            return False
        if max(map(len, page.split()), default=0) > MAX_CHALLENGE_WORD:
            return False
        return bool(Cloudflare(self).is_Challenge_Request(response))

    def _keep_cookies(self, request: requests.PreparedRequest, answer: Response) -> None:
        """Keep the cookies of an answer; the oldest go when there are more than a browser would send."""
        if sum(map(len, answer.raw.headers.getlist("Set-Cookie"))) > MAX_COOKIE_BYTES:
            return
        # Cookie jars read it too, in quadratic time; no site sends it any more
        if "Set-Cookie2" in answer.headers:
            return
        with self._jar_lock:
            extract_cookies_to_jar(self.cookies, request, answer.raw)
            size = 0
            for count, cookie in enumerate(reversed(list(self.cookies)), start=1):
                size += len(cookie.name) + len(cookie.value or "")
                if count > MAX_COOKIES or size > MAX_COOKIE_BYTES:
                    self.cookies.clear(cookie.domain, cookie.path, cookie.name)


# ======================================================================================================================
# 24 Kimi's web chat
#
# A WordPress page behind Cloudflare: the page is fetched for its nonce, each chat is a form, the answer is one JSON
# object. What the site's answers mean is known here and nowhere else.
# ======================================================================================================================

NONCE_MAX_AGE = 11 * 3600  # seconds; WordPress accepts one for 12 to 24 hours
CHALLENGE = re.compile(rb"challenge-(?:form|platform)|cf[-_]chl|jschl|<title>(?:Just a moment|Attention Required)")
CHALLENGE_SECONDS = 10.0  # that solving one may take beyond REQUEST_TIMEOUT, as cloudscraper waits before it answers
MAX_REDIRECTS = 4


class StaleNonce(Exception):
    """Upstream answered something that a new nonce may mend. `error` is for the caller if it does not."""

    def __init__(self, error: APIError) -> None:
        super().__init__(error.message)
        self.error = error


# As the chat page has it: var kimi_ajax = {"ajax_url": "…", "nonce": "…"}; where it is sent, see KimiProvider._post
NONCE = re.compile(r"""["']?\bnonce["']?\s{0,99}:\s{0,99}["']([\w-]{1,99})["']""")


def find_nonce(html: str) -> str | None:
    """The first nonce after a mention of kimi_ajax in the same script."""
    for script in html.split("</script>"):
        _, _, config = script.partition("kimi_ajax")
        found = NONCE.search(config)
        if found:
            return found[1]
    return None


class KimiProvider(Provider):
    """Kimi's web chat."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        super().__init__(WEB_CHAT, settings, metrics)
        self._nonce = SharedFetch("nonce", self._fetch_nonce, NONCE_MAX_AGE)

    @cached_property
    def _scraper(self) -> Scraper:
        """Made when it is first needed; its certificates would slow the start and take 1 MB."""
        return Scraper("The web chat", 2 * self._settings.max_concurrent_chats, self._settings.request_timeout)

    def stream(self, chat: Chat) -> Iterator[Delta]:
        request = chat.request
        reject_unsupported(request)
        prompt, content, calls = self._answer(chat)
        content, finish_reason = truncate(content, request.stop, request.max_tokens)
        message: Message = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            finish_reason = "tool_calls"
            message["content"] = content or None
            message["tool_calls"] = [
                {
                    "index": index,
                    "id": f"call_{random_hex()[:24]}",
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
                for index, (name, arguments) in enumerate(calls)
            ]
        delta = Delta.of(message, finish_reason, is_complete=True)
        written = content + "".join(name + arguments for name, arguments in calls)
        delta.chunk["usage"] = estimate_usage(prompt.text, written)
        if prompt.tools_dropped:
            delta.headers = {"X-Kimi2api-Tools-Dropped": str(prompt.tools_dropped)}
            log.info("%d of %d tools did not fit into the prompt", prompt.tools_dropped, len(request.tools))
        yield delta

    def _answer(self, chat: Chat) -> tuple[Prompt, str, list[ToolCall]]:
        """The prompt, the content and the tool calls of its answer; one that cannot be used is asked for once again."""
        request = chat.request
        limit = self._settings.context_max_length
        prompt = write_prompt(request, chat.history, limit)
        text = self._ask(prompt.text, chat)
        try:
            return prompt, *parse_answer(text, request)
        except UnusableAnswer as fault:
            log.info("the answer cannot be used; asking once more")
            remark = f"Your last answer could not be used: {fault}"
        # Where there is no room for the reason, the question is asked again as it was
        with suppress(APIError):
            prompt = write_prompt(request, chat.history, limit, remark)
        text = self._ask(prompt.text, chat)
        try:
            return prompt, *parse_answer(text, request, any_tool=True)
        except NoDocument as fault:
            raise upstream_error(
                502, "invalid_json_answer", f"The web chat gave no JSON: {fault}", headers=NO_SDK_RETRY) from None
        except UnusableAnswer:
            return prompt, text, []

    def check(self) -> Iterator[tuple[str, APIError | None]]:
        steps = [f"{self._settings.chat_page_url} reached", "not blocked by Cloudflare", "nonce found"]
        failed: APIError | None = None
        try:
            self._wait_for(self._nonce.latest())
        except APIError as error:
            failed = error
            reached = {"upstream_blocked": 1, "upstream_changed": 2}.get(error.code or "", 0)
            steps = steps[:reached + 1]
        for step in steps[:-1]:
            yield step, None
        yield steps[-1], failed
        if not failed:
            yield from self._check_answer("moonshotai/Kimi-K2-Instruct-0905")

    # Asking

    def _ask(self, prompt: str, chat: Chat) -> str:
        """The text of the answer. A chat with a `user` goes on when its client has left, for its turn is remembered."""
        cancel = Cancel() if chat.request.user else chat.cancel
        with self._watched(cancel):
            return self._retry(lambda: self._attempt(prompt, chat, cancel), cancel)

    def _attempt(self, prompt: str, chat: Chat, cancel: Cancel) -> str:
        """One attempt; a nonce that is rejected is renewed, once."""
        try:
            return self._post(prompt, chat, cancel)
        except StaleNonce as stale:
            log.info("refused (%s); trying once more with a new nonce", stale.error.code)
        try:
            return self._post(prompt, chat, cancel)
        except StaleNonce as stale:
            raise stale.error.with_headers(NO_SDK_RETRY) from None

    def _post(self, prompt: str, chat: Chat, cancel: Cancel) -> str:
        """Post the form. Raises StaleNonce when a new nonce may help; the next post then fetches one."""
        deadline = time.monotonic() + self._settings.request_timeout
        fetch = self._nonce.latest()
        nonce = self._wait_for(fetch)
        page = urlsplit(self._settings.chat_page_url)
        form = {
            "action": "kimi_send_message",
            "nonce": nonce,
            "message": prompt,
            "model": chat.model,
            "session_id": chat.session_id,
        }
        headers = {
            "Content-Type": "application/x-www-form-urlencoded; charset=UTF-8",
            "Accept": "application/json, */*",
            "X-Requested-With": "XMLHttpRequest",
            "Origin": f"{page.scheme}://{page.netloc}",
            "Referer": self._settings.chat_page_url,
        }
        send = partial(
            self._scraper.perform_request, "POST", self._settings.upstream_url, data=form, headers=headers,
            cancel=cancel)
        try:
            return read_text(self._send(send, deadline), nonce)
        except StaleNonce:
            self._nonce.reject(fetch)
            raise
        except APIError:  # it may have been the answer to another's question, so that ours is still to come
            self._scraper.transport.close_idle(self._settings.upstream_url)
            raise

    def _send(self, send: Callable[..., requests.Response], deadline: float) -> requests.Response:
        """Send one request; what any answer of this site can mean, page or chat, is sorted out here."""
        try:
            response = send(timeout=max(0.01, deadline - time.monotonic()))
            solvable = self._scraper.is_challenge(response)
        except CloudflareException as error:
            raise self._blocked(str(error)) from None
        status = response.status_code
        is_html = response.content.lstrip()[:1] == b"<"
        if solvable:
            raise StaleNonce(self._blocked("a challenge that came again after it was solved"))
        if response.headers.get("cf-mitigated") == "challenge":
            raise self._blocked("a managed challenge")
        if is_html and (status == 403 or (status in (429, 503) and CHALLENGE.search(response.content))):
            raise self._blocked(f"HTTP {status} with a web page")
        if status == 429:
            raise rate_limited("The web chat says: too many requests. Wait a while.", "rate_limit_error",
                               "upstream_rate_limited", response.headers)
        if status >= 500:
            raise upstream_error(
                502, "upstream_unavailable", f"The web chat's site is down (HTTP {status}).", retryable=True)
        return response

    def _blocked(self, reason: str) -> APIError:
        return upstream_error(503, "upstream_blocked", (
            f"Cloudflare blocks this program: {reason}. Open {self._settings.chat_page_url} in a browser on this "
            "network, wait some minutes, or use another network (HTTPS_PROXY)."))

    # The nonce

    def _wait_for(self, fetch: Future[str]) -> str:
        try:
            error = fetch.exception(self._settings.request_timeout + CHALLENGE_SECONDS)
        except FutureTimeout:
            raise self._scraper.transport.timed_out(self._settings.request_timeout) from None
        if isinstance(error, APIError):
            raise error.copy()
        return fetch.result()

    def _fetch_nonce(self) -> str:
        """Fetch the chat page, solving an old-style challenge on the way if there is one, and find its nonce."""
        home = self._settings.chat_page_url
        page = self._fetch_page(time.monotonic() + self._settings.request_timeout)
        nonce = find_nonce(page.content.decode("utf-8", "replace"))
        if page.status_code != 200 or not nonce:
            raise upstream_error(
                502, "upstream_changed", f"{home} (HTTP {page.status_code}) carries no nonce: the site has changed. "
                "Look for a newer version of this program.")
        log.info("nonce renewed")
        return nonce

    def _fetch_page(self, deadline: float) -> requests.Response:
        """The chat page, after redirects on its own host."""
        home = self._settings.chat_page_url
        # No cache has seen it yet
        url = f"{home}{'&' if '?' in home else '?'}_={int(time.time() * 1000)}"
        for _ in range(MAX_REDIRECTS + 1):
            send = partial(self._scraper.request, "GET", url, headers={"Cache-Control": "no-cache"})
            try:
                page = self._send(send, deadline)
            except StaleNonce as stale:
                raise stale.error from None
            if not page.is_redirect:
                break
            url = self._redirected(url, page.headers["Location"])
        return page

    def _redirected(self, url: str, location: str) -> str:
        """Where a redirect leads. Raises APIError for another host."""
        here = urlsplit(self._settings.chat_page_url)
        with suppress(ValueError):
            target = parse_url(urljoin(url, location))
            there = urlsplit(target)
            if there.hostname == here.hostname and there.scheme in ("https", here.scheme):
                return target
        raise upstream_error(
            502, "upstream_changed",
            "The chat page has moved to another host; CHAT_PAGE_URL and UPSTREAM_URL say where it is.")


WEB_CHAT_REQUEST = record({}, {  # what a request may ask for here; the rest would change the shape of the answer
    "n": {"enum": [1]},
    "logprobs": {"enum": [False]},
    "audio": {"enum": [{}]},
    "modalities": {"enum": [[], ["text"]]},
    "tool_choice": any_of(STRING, record({}, {"type": choice_of("function", "allowed_tools")})),
    "tools": array(record({"type": choice_of("function")})),
    "messages": array(record({}, {"content": any_of(STRING, array(record({"type": choice_of("text", "refusal")})))})),
})


def reject_unsupported(request: ChatRequest) -> None:
    """Raises APIError 400 for what the web chat cannot do."""
    violation = find_violation(request.body, WEB_CHAT_REQUEST)
    if violation:
        raise bad_request(
            f"'{violation.path}' is not supported by the web chat, which takes text and answers with one text.",
            violation.path, "unsupported_value")


def read_text(response: requests.Response, nonce: str) -> str:
    """The text in the web chat's JSON. Raises APIError, and StaleNonce for a refusal that a new nonce may mend."""
    body = response.content.strip()
    if body in (b"-1", b"0"):  # WordPress's own words for a stale nonce and an unknown action
        raise StaleNonce(upstream_error(502, "upstream_refused", f"The web chat refused: {body.decode()}."))
    try:
        answer = parse_upstream_json(body)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        answer = {}
    data = answer.get("data")
    if answer.get("success") is False:
        raise StaleNonce(upstream_error(
            502, "upstream_refused", f"The web chat refused: {plain_line(data, nonce)}", quotes_upstream=True))
    if response.status_code != 200:
        raise invalid_response("The web chat", f"HTTP {response.status_code}")
    text = data.get("message") if answer.get("success") and isinstance(data, dict) else None
    if isinstance(text, str) and text.strip():
        return text
    what = "something that is not JSON"
    if answer:
        what = "an empty answer" if isinstance(text, str) else "JSON of an unknown shape"
    raise invalid_response("The web chat", what, retryable=True)


# ======================================================================================================================
# 25 Model notes
#
# Models of one API differ in what they take, and clients know little of it. What a refusal teaches about a model is
# kept for its next requests, so that no table of models is needed.
# ======================================================================================================================

# Parameters that are left out when a model refuses them: many clients send them unasked, and thinking models fix them
OPTIONAL_PARAMETERS = (
    "temperature", "top_p", "n", "presence_penalty", "frequency_penalty", "reasoning_effort", "parallel_tool_calls",
    "logprobs", "stream_options",
)
NOTES_MAX_AGE = 3600.0  # seconds
MAX_NOTES = 1000  # models
MAX_REFUSED = 50  # settings of one

# How a forced tool is asked for: as the client does; as the only one of the tools; without thinking
AS_ASKED, ONLY_TOOL, NO_THINKING = range(3)


@dataclass(frozen=True)
class ModelNotes:
    """What an API's refusals (400) have taught about one of its models. The facts are in `after`."""

    refused: Mapping[str, float] = field(default_factory=dict)  # settings of parameters, left out until when
    wants_reasoning: bool = False  # every assistant message must have reasoning_content, if only an empty one
    forcing: int = AS_ASKED
    forcing_until: float = 0.0  # seconds since the epoch, as are the times in `refused`

    def adapt(self, body: JSONObject, now: float) -> JSONObject:
        """A request as the model takes it."""
        adapted = {}
        for name, value in body.items():
            if name not in OPTIONAL_PARAMETERS or self.refused.get(setting_of(name, value), 0.0) <= now:
                adapted[name] = value
        if self.wants_reasoning:
            adapted["messages"] = without_reasoning_gaps(body["messages"])
        choice = body.get("tool_choice")
        forcing = self.forcing if now < self.forcing_until else AS_ASKED
        if forcing == ONLY_TOOL and names_function(choice):
            adapted["tool_choice"] = "required"
            adapted["tools"] = [tool for tool in body["tools"] if is_tool(tool, choice["function"]["name"])]
        elif forcing == NO_THINKING and forces_tool(choice) and "thinking" not in body:
            adapted["thinking"] = {"type": "disabled"}
        return adapted

    def after(self, refusal: APIError, sent: JSONObject, now: float) -> ModelNotes | None:
        """The notes once this request has been refused, None when there is nothing else to try.

        Moonshot: "invalid temperature: only 1 is allowed for this model"; "thinking is enabled but reasoning_content is
        missing …"; "tool_choice 'specified' is incompatible with thinking enabled". DeepSeek: "The reasoning_content in
        the thinking mode must be passed back to the API."
        """
        named = set(re.findall(r"[a-z_]+", f"{refusal.param} {refusal.message}".lower()))
        until = now + NOTES_MAX_AGE
        refused = {}
        for name in OPTIONAL_PARAMETERS:
            really_wanted = name == "logprobs" and sent.get(name)
            if name in named and name in sent and not really_wanted:
                refused[setting_of(name, sent[name])] = until
        if refused:
            known = list(self.refused.items())[-MAX_REFUSED:]
            return replace(self, refused={**dict(known), **refused})
        if "reasoning_content" in named and without_reasoning_gaps(sent["messages"]) != sent["messages"]:
            return replace(self, wants_reasoning=True)
        choice = sent.get("tool_choice")
        if "tool_choice" in named and forces_tool(choice) and "thinking" not in sent:
            forcing = ONLY_TOOL if names_function(choice) else NO_THINKING
            return replace(self, forcing=forcing, forcing_until=until)
        return None


def setting_of(parameter: str, value: Any) -> str:
    """A parameter and its value: what is refused of one caller's value says nothing of another's."""
    return f"{parameter}={value!r}"[:100]


def forces_tool(choice: Any) -> bool:
    return choice == "required" or names_function(choice)


def is_tool(tool: JSONObject, name: str) -> bool:
    return tool["type"] == "function" and bool(tool["function"]["name"] == name)


def without_reasoning_gaps(messages: list[Message]) -> list[Message]:
    """Messages in which each of the assistant's has reasoning_content, empty where there is none."""
    filled = []
    for message in messages:
        if message["role"] == "assistant" and message.get("reasoning_content") is None:
            message = {**message, "reasoning_content": ""}
        filled.append(message)
    return filled


# ======================================================================================================================
# 26 API streams
#
# The events of an API's answer, read, checked and made whole where an API leaves something out; its errors as ours.
# ======================================================================================================================

MAX_STREAM_BYTES = 64 << 20  # of all events of an answer
MAX_PARSED_STREAM = 300 << 20  # of the same, as Python's objects
MAX_CHOICES = 128  # OpenAI's limit for n
MAX_CALLS = 10_000  # of one choice
FINISHED_SILENCE = 2.0  # seconds to wait for usage and [DONE] once an answer is whole

TEXT_FIELDS = {"role", "content", "reasoning_content", "refusal"}
CHUNK_CHOICE = object_of({
    "index": COUNT,
    "finish_reason": any_of(STRING, NULL),
    "delta": record({}, {
        **dict.fromkeys(sorted(TEXT_FIELDS), STRING),
        "tool_calls": array(record({}, {
            "index": COUNT,
            "id": STRING,
            "type": STRING,
            "function": record({}, {"name": STRING, "arguments": STRING}),
        })),
    }),
})


TOO_LONG = re.compile("(?i)maximum context length|exceeded model token limit|context_length_exceeded|context window")


def api_error(api: API, status: int, answer: Any, headers: Headers) -> APIError:
    """An API's error as ours, in its name and never with our key for it.

    Status, type, code and rate-limit headers stay, except where it is about that key.
    """
    if status in (401, 403):
        return upstream_error(
            502, "upstream_auth", f"{api.name} does not accept the key that this server has for it "
            f"(HTTP {status}); see {api.name.upper()}_API_KEY.")
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    fields = error if isinstance(error, dict) else {}

    def told(name: str) -> str | None:
        return plain_line(fields[name], api.key) if fields.get(name) else None

    message = f"{api.name}: {plain_line(error, api.key)}"
    type, code, param = told("type"), told("code"), told("param")
    if status == 400 and TOO_LONG.search(message):  # by this code clients, and FALLBACK_MODELS, know what to do
        code = "context_length_exceeded"
    if status == 429:
        ours = rate_limited(message, type or "rate_limit_error", code or "upstream_rate_limited", headers)
    elif 400 <= status < 500:
        ours = APIError(status, message, type or "invalid_request_error", code, param)
    else:
        is_failure = 500 <= status < 600
        wait = parse_retry_after(headers.get("Retry-After"))
        ours = APIError(
            status if is_failure else 502,
            message,
            type or "upstream_error",
            code or "upstream_unavailable",
            param,
            retryable=is_failure,
            headers={} if wait is None else {"Retry-After": str(ceil(wait))},
        )
    return ours.copy(quotes_upstream=True).with_headers(rate_limits(headers))


def digests_of_questions(messages: Iterable[Message]) -> Iterator[str]:
    """For each message, a digest of all that the user had said by then, which tells one conversation from another:
    ids of calls such as functions.f:0 occur in every one of them."""
    said = sha256()
    for message in messages:
        if message["role"] == "user":
            said.update(text_of(message).encode() + b"\0")
        yield said.hexdigest()


@dataclass
class ChoiceState:
    """What has come of one of an answer's choices."""

    last_call: int = -1  # the index of its last tool call
    call_ids: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)


class APIAnswer:
    """The stream of an API's answer, read. Once every choice has its finish reason, the answer is complete: what fails
    after that is no failure."""

    def __init__(
        self, api: API, response: Response, chat: Chat, headers: Headers, messages: list[Message],
    ) -> None:
        self.is_done = False  # [DONE] has come
        self._api = api
        self._response = response
        self._chat = chat
        self._headers = headers
        self._messages = messages  # that it answers
        self._wanted = chat.request.body.get("n") or 1
        self._seen: dict[int, ChoiceState] = {}
        self._finished: set[int] = set()
        self._is_complete = False
        self._parsed = 0  # bytes that all chunks take, about

    def deltas(self) -> Iterator[Delta]:
        headers = self._headers
        call = self._response.call
        try:
            for data in server_sent_data(self._response.stream(), self._api.name):
                if data == b"[DONE]":
                    self.is_done = call.is_usable = True
                    break
                had_begun = bool(self._seen)
                chunk = self._parse_chunk(data)
                # Now it may take as long as it likes, if it is not silent
                if self._seen and not had_begun:
                    call.limit_reads()
                if not self._is_complete and len(self._finished) >= max(len(self._seen), self._wanted):
                    self._is_complete = True
                    call.limit(FINISHED_SILENCE)
                yield Delta(chunk, headers=headers)
                headers = {}
        except APIError:
            if not self._is_complete:
                raise
        if not (self.is_done or self._is_complete):
            message = f"{self._api.name} ended the stream before the answer was complete."
            raise upstream_error(502, "upstream_unavailable", message)
        if not self._seen:
            raise invalid_response(self._api.name, "an empty answer")

    def _parse_chunk(self, data: bytes) -> JSONObject:
        """A chunk whose choices all have an index, a delta and a finish reason or null."""
        self._parsed += parsed_size(data)
        if self._parsed > MAX_PARSED_STREAM:
            raise invalid_response(self._api.name, "an answer of too many values")
        try:
            chunk = parse_upstream_json(data)
        except ValueError:
            raise invalid_response(self._api.name, "something that is not JSON") from None
        if not isinstance(chunk, dict):
            raise invalid_response(self._api.name, "a malformed chunk")
        if chunk.get("error"):
            raise api_error(self._api, 500, chunk, {})
        choices = chunk.get("choices")
        if choices is None:
            choices = chunk["choices"] = []
        if not isinstance(choices, list):
            raise invalid_response(self._api.name, "a malformed chunk")
        for choice in choices:
            self._check_choice(choice)
            if choice.get("usage"):  # Moonshot's place for it
                chunk["usage"] = chunk.get("usage") or choice["usage"]
        return chunk

    def _check_choice(self, choice: Any) -> None:
        if not isinstance(choice, dict):
            raise invalid_response(self._api.name, "a malformed chunk")
        choice.setdefault("index", 0)
        choice.setdefault("finish_reason", None)
        delta = choice["delta"] = choice.get("delta") or choice.pop("message", None) or {}
        if not is_text_only(choice) and find_violation(choice, CHUNK_CHOICE):
            raise invalid_response(self._api.name, "a malformed chunk")
        index = choice["index"] = int(choice["index"])
        if index >= max(self._wanted, MAX_CHOICES):
            raise invalid_response(self._api.name, "a malformed chunk")
        if index not in self._seen:
            self._seen[index] = ChoiceState()
        state = self._seen[index]
        if delta.get("tool_calls"):
            number_calls(delta["tool_calls"], state)
            if any(call["index"] >= MAX_CALLS for call in delta["tool_calls"]):
                raise invalid_response(self._api.name, "a malformed chunk")
        if delta.get("reasoning_content"):
            state.reasoning.append(delta["reasoning_content"])
        if choice["finish_reason"]:
            self._finished.add(index)
            self._keep_reasoning(state)  # before the client can ask with the results of its calls

    def _keep_reasoning(self, state: ChoiceState) -> None:
        text = "".join(state.reasoning)
        if text and state.call_ids:
            asked = list(digests_of_questions(self._messages))[-1]
            places = [f"{self._api.name} {asked} {call_id}" for call_id in state.call_ids]
            self._chat.store.keep_reasoning(self._chat.owner, places, text)


def number_calls(calls: list[JSONObject], state: ChoiceState) -> None:
    """Give pieces of tool calls their index, which some APIs leave out: without an id they go on with the last."""
    for call in calls:
        if not isinstance(call.get("index"), int):
            is_new = state.last_call < 0 or call.get("id")
            call["index"] = state.last_call + 1 if is_new else state.last_call
        state.last_call = call["index"]
        if call.get("id"):
            state.call_ids.append(call["id"])


def is_text_only(choice: JSONObject) -> bool:
    """A fast path: nearly every chunk is only text, and needs no check by the schema."""
    delta = choice["delta"]
    if type(choice["index"]) is not int or type(delta) is not dict or not delta.keys() <= TEXT_FIELDS:
        return False
    if choice["finish_reason"] is not None:
        return False
    return all(value is None or type(value) is str for value in delta.values())


def rate_limits(headers: Headers) -> dict[str, str]:
    """The rate-limit headers that may be passed on; clients refuse an answer whose head is too long."""
    limits = {}
    for name, value in headers.items():
        if "ratelimit" in name.lower() and re.fullmatch(r"[\w-]{1,100}: [ -~]{0,100}", f"{name}: {value}", re.A):
            limits[name] = value
    return limits


def server_sent_data(chunks: Iterable[bytes], upstream: str) -> Iterator[bytes]:
    """The data of each server-sent event as it arrives; comments and other fields are passed over. Lines end in LF."""
    line = bytearray()  # whose end has not come
    total = 0
    data: list[bytes] = []
    data_size = 0
    is_first = True
    # The end of the stream ends the last event too
    for chunk in itertools.chain(chunks, [b"\n\n"]):
        line += chunk
        total += len(chunk)
        if b"\n" in chunk:
            *lines, rest = bytes(line).split(b"\n")
            line = bytearray(rest)
            if is_first:
                lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
                is_first = False
            for text in lines:
                text = text.rstrip(b"\r")
                if text.startswith(b"data:"):
                    data.append(text[5:].removeprefix(b" "))
                    data_size += len(text)
                elif not text and data:
                    yield b"\n".join(data)
                    data = []
                    data_size = 0
        if len(line) + data_size > MAX_UPSTREAM_BYTES:
            raise invalid_response(upstream, f"an event of more than {MAX_UPSTREAM_BYTES} bytes")
        if total > MAX_STREAM_BYTES:
            raise invalid_response(upstream, f"an answer of more than {MAX_STREAM_BYTES} bytes")


# ======================================================================================================================
# 27 OpenAI-style APIs
#
# Moonshot's own API, DeepSeek, Qianfan, a local server: anything with OpenAI's chat completions under a base URL.
# Requests and chunks pass through as they are; only the model's name, the messages (a session's turns are put in front)
# and the streaming are ours.
# ======================================================================================================================

MODELS_MAX_AGE = 600.0  # seconds that a list of models is kept
MODELS_RETRY = 60.0  # seconds before a list is asked for again after a failure
MAX_EMBEDDINGS_BYTES = 32 << 20  # of one answer: 2,048 texts, the most that OpenAI takes, in 1,024 numbers each
MAX_PARSED_EMBEDDINGS = 192 << 20  # of the same, as Python's objects


class OpenAIProvider(Provider):
    """One such API. When a client leaves, its connection is closed at once, because these answers cost money."""

    def __init__(self, api: API, settings: Settings, metrics: Metrics) -> None:
        super().__init__(api.name, settings, metrics)
        self._api = api
        self._base_url = api.base_url.rstrip("/")
        self._transport = Transport(api.name, connections=2 * settings.max_concurrent_chats)
        self._headers = {"User-Agent": f"kimi2api/{__version__}", "Accept-Encoding": "identity"}
        if api.key:
            self._headers["Authorization"] = f"Bearer {api.key}"
        self._lock = threading.Lock()  # guards changes of _notes
        self._notes: dict[str, ModelNotes] = {}
        self._models = SharedFetch(f"{api.name} models", self._fetch_models, MODELS_MAX_AGE, MODELS_RETRY)

    def stream(self, chat: Chat) -> Iterator[Delta]:
        request = chat.request
        messages = request.messages
        if chat.history:
            turns = append_turns(chat.history, request.turns)
            messages = [*request.system, *itertools.chain.from_iterable(turns)]
        body = {
            **request.body,
            "model": chat.model,
            "messages": self._with_reasoning(messages, chat),
            "stream": True,
            "stream_options": {**(request.body.get("stream_options") or {}), "include_usage": True},
        }
        with self._watched(chat.cancel) as has_begun:
            response, sent = self._ask(body, chat)
            headers = rate_limits(response.headers)
            ignored = [name for name in request.body if name not in sent]
            if ignored:
                headers["X-Kimi2api-Ignored"] = ", ".join(ignored)
            answer = APIAnswer(self._api, response, chat, headers, sent["messages"])
            try:
                deltas = answer.deltas()
                for delta in deltas:
                    has_begun()
                    yield delta
                    yield from deltas  # all others
            finally:
                if answer.is_done:
                    response.finish(chat.cleanup)
                else:
                    response.close()

    def _ask(self, body: JSONObject, chat: Chat) -> tuple[Response, JSONObject]:
        """The response to a request, and the request as it was sent: what the model refuses of it is mended, and asked
        again. What has helped is remembered; what has not is forgotten, and the first refusal of a forced tool told."""
        notes = self._notes.get(chat.model, ModelNotes())
        forced: APIError | None = None
        while True:
            sent = notes.adapt(body, time.time())
            attempt = partial(self._open_stream, sent, chat.cancel)
            try:
                response = self._retry(attempt, chat.cancel)
            except APIError as error:
                better = notes.after(error, sent, time.time()) if error.status == 400 else None
                if better is None:
                    raise forced or error from None
                if better.forcing != notes.forcing:
                    forced = forced or error.copy()
                log.info("%s/%s: %s; asking again in another way", self.name, chat.model, error.reason)
                notes = better
            else:
                self._note(chat.model, notes)
                return response, sent

    def _note(self, model: str, notes: ModelNotes) -> None:
        if notes == self._notes.get(model, ModelNotes()):
            return
        with self._lock:
            self._notes[model] = notes
            if len(self._notes) > MAX_NOTES:
                del self._notes[next(iter(self._notes))]

    def _with_reasoning(self, messages: list[Message], chat: Chat) -> list[Message]:
        """Messages with the reasoning that this API gave with their tool calls, where the client has left it out."""
        store = chat.store
        ids = Counter(call.get("id") for message in messages for call in message.get("tool_calls") or ())
        if not ids:
            return messages
        restored = []
        for message, asked in zip(messages, digests_of_questions(messages), strict=True):
            if message.get("reasoning_content") is None:
                for call in message.get("tool_calls") or ():
                    call_id = call.get("id")
                    # One that occurs twice could be another answer's
                    if not call_id or ids[call_id] > 1:
                        continue
                    text = store.find_reasoning(chat.owner, f"{self.name} {asked} {call_id}")
                    if text:
                        message = {**message, "reasoning_content": text}
                        break
            restored.append(message)
        return restored

    def embed(self, body: JSONObject, cancel: Cancel) -> tuple[JSONObject, Headers]:
        def attempt() -> tuple[JSONObject, Headers]:
            response = self._send("POST", "/embeddings", body, cancel)
            answer = self._read_json(response, MAX_EMBEDDINGS_BYTES, MAX_PARSED_EMBEDDINGS)
            if not isinstance(answer.get("data"), list):
                raise invalid_response(self._api.name, "no embeddings")
            return answer, rate_limits(response.headers)

        with self._watched(cancel):
            return self._retry(attempt, cancel)

    def _open_stream(self, body: JSONObject, cancel: Cancel) -> Response:
        response = self._send("POST", "/chat/completions", body, cancel)
        if "json" in response.headers.get("Content-Type", ""):
            self._read_json(response)  # for an error in it
            raise invalid_response(self._api.name, "a complete answer instead of a stream")
        return response

    def _read_json(
        self, response: Response, limit: int = MAX_UPSTREAM_BYTES, max_parsed: int = MAX_PARSED_DOCUMENT,
    ) -> JSONObject:
        """The object in a response that is no stream. Raises APIError, also for an error with status 200."""
        try:
            answer = parse_upstream_json(response.read(limit), max_parsed)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise invalid_response(self._api.name, "no JSON object")
        if answer.get("error"):
            raise api_error(self._api, response.status, answer, response.headers)
        return answer

    def _send(self, method: str, path: str, body: JSONObject | None, cancel: Cancel) -> Response:
        """A response with status 200, whose body is still to be read. The time-out is for all before the first event of
        a stream, and for all of another body."""
        headers = {**self._headers, "Content-Type": "application/json"} if body else self._headers
        call = Call(self._settings.request_timeout, cancel)
        call.is_usable = path != "/chat/completions"  # a stream is once its end has come
        data = dump_json(body) if body else None
        response = self._transport.request(method, self._base_url + path, headers, data, call)
        if response.status == 200:
            return response
        text = response.read()
        try:
            answer = parse_upstream_json(text)
        except ValueError:
            answer = text.decode("utf-8", "replace")
        raise api_error(self._api, response.status, answer, response.headers)

    # Models

    def models(self, wait: float) -> Mapping[str, JSONObject]:
        """What the API lists, by id, as far as is known after so many seconds; fetched again when it is old."""
        with suppress(FutureTimeout, APIError):
            return self._models.latest().result(wait)
        return self._models.known or {}

    def _fetch_models(self) -> dict[str, JSONObject]:
        try:
            return self._list_models()
        except APIError as error:
            log.warning("%s: its models cannot be listed: %s", self.name, error.reason)
            raise

    def _list_models(self) -> dict[str, JSONObject]:
        listed = self._read_json(self._send("GET", "/models", None, Cancel())).get("data")
        if not isinstance(listed, list):
            raise invalid_response(self._api.name, "no list of models")
        models = {}
        for model in listed:
            if isinstance(model, dict) and isinstance(model.get("id"), str) and model["id"]:
                models[model["id"]] = model
        return models

    def check(self) -> Iterator[tuple[str, APIError | None]]:
        step = f"{self._base_url} reached, key accepted"
        try:
            listed = self._list_models()
        except APIError as error:
            yield step, error
            return
        yield step, None
        yield from self._check_answer(next(iter(listed), "default"))


# ======================================================================================================================
# 28 Models and fallback
#
# Which provider answers for a model's id, and who answers when it cannot.
# ======================================================================================================================

CREATED = 1757030400  # of a model whose upstream reports none: 2025-09-05, when Kimi-K2-Instruct-0905 came out
MAX_HELD_BACK = 50  # deltas without content
LISTING_WAIT = 0.5  # seconds that /v1/models waits for lists that are not here yet


def model_not_found(name: str) -> APIError:
    return APIError(
        404, f"The model {name[:100]!r} does not exist; /v1/models lists those that do.", code="model_not_found",
        param="model")


class Providers:
    """Every configured provider, and which of them a model's id means."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self.by_name: dict[str, Provider] = {WEB_CHAT: KimiProvider(settings, metrics)}
        for name, api in settings.apis.items():
            self.by_name[name] = OpenAIProvider(api, settings, metrics)

    def resolve(self, model: str) -> tuple[Provider, str]:
        """The provider and its own name for a model. Raises APIError 404 for an id that nobody has."""
        resolved = self._settings.resolve(model)
        if resolved is None:
            raise model_not_found(model)
        name, own_name = resolved
        return self.by_name[name], own_name

    def models(self) -> list[JSONObject]:
        """MODELS, then what each API lists, as OpenAI's model objects."""
        for provider in self.by_name.values():
            provider.models(wait=0)  # all are asked before the first is waited for
        deadline = time.monotonic() + LISTING_WAIT
        names = list(self._settings.models)
        for provider in self.by_name.values():
            for model in provider.models(wait=max(0.0, deadline - time.monotonic())):
                names.append(f"{provider.name}/{model}")
        return [self.model(name, wait=0) for name in names if name != "*"]

    def model(self, name: str, wait: float = LISTING_WAIT) -> JSONObject:
        """OpenAI's model object. Raises APIError 404 for an id that nobody has, as far as is known."""
        provider, own_name = self.resolve(name)
        model = {"id": name, "object": "model", "created": CREATED, "owned_by": provider.name}
        listed = provider.models(wait)
        if listed and own_name not in listed and name not in self._settings.models:
            raise model_not_found(name)
        upstream_model = listed.get(own_name, {})
        for field_name, kind in (("created", int), ("owned_by", str)):
            if isinstance(upstream_model.get(field_name), kind):
                model[field_name] = upstream_model[field_name]
        return model

    def answer(self, model: str, chat: Chat) -> Iterator[Delta]:
        """The answer of the model asked for or, if it cannot answer, of the first of FALLBACK_MODELS that can.

        What the client must not see before it could still be another model's is held back: of a stream the role, of
        an answer in one piece everything.
        """
        failed: list[tuple[str, APIError]] = []
        chat.tally.messages = [*itertools.chain.from_iterable(chat.history), *chat.request.messages]
        for name in dict.fromkeys((model, *self._settings.fallback_models)):
            provider, upstream_model = self.resolve(name)
            deltas = chat.tally.count(provider.name, name, provider.stream(replace(chat, model=upstream_model)))
            begun: list[Delta] = []
            try:
                if chat.request.stream:
                    for delta in deltas:
                        begun.append(delta)
                        if delta.has_content or len(begun) > MAX_HELD_BACK:
                            break
                else:
                    begun.append(folded(deltas))
            except APIError as error:
                failed.append((name, error.copy()))
                if not error.may_fall_back or chat.cancel.is_set():
                    break
                log.warning("%s cannot answer: %s", name, error.reason)
                continue
            if failed:
                log.warning("%s answers instead of %s", name, model)
            begun[0].headers = {**begun[0].headers, "X-Kimi2api-Provider": provider.name}
            for delta in itertools.chain(begun, deltas):
                delta.chunk["model"] = name
                yield delta
            return
        (_, first), *others = failed
        messages = [first.message, *(f"Fallback {name}: {error.message}" for name, error in others)]
        raise first.copy(message=" ".join(messages))

    def embed(self, model: str, body: JSONObject, cancel: Cancel, tally: Tally) -> tuple[JSONObject, Headers]:
        """Embeddings by the model asked for, and by no other: those of two models cannot be compared."""
        provider, upstream_model = self.resolve(model)
        tally.provider = provider.name
        tally.model = model
        answer, headers = provider.embed({**body, "model": upstream_model}, cancel)
        tally.first_chunk = time.monotonic() - tally.began
        tally.usage = answer.get("usage")
        if not count_of(tally.usage, "prompt_tokens"):
            tally.usage = {"prompt_tokens": estimate_input(body["input"])}
        return {**answer, "model": model}, {**headers, "X-Kimi2api-Provider": provider.name}


# ======================================================================================================================
# 29 Metering
#
# Every answer is counted here, for its key and for metrics, when it ends: streams, lost clients, fallbacks alike.
# ======================================================================================================================

MAX_MODEL_LABELS = 100
MAX_LABEL = 128  # characters of one


class Meter:
    """Counts answers."""

    def __init__(self, metrics: Metrics, accounts: Accounts, settings: Settings) -> None:
        self._metrics = metrics
        self._accounts = accounts
        self._models = {*settings.models, settings.default_model, *settings.fallback_models} - {"*"}
        self._api_models: set[str] = set()  # of APIs, that have answered

    @contextmanager
    def counted(self, caller: ClientKey, tally: Tally, cancel: Cancel) -> Iterator[None]:
        """Around an answer: it is counted when it ends, however it ends."""
        status = 500
        try:
            yield
            status = 499 if cancel.is_set() else 200
        except APIError as error:
            status = 499 if cancel.is_set() else error.status
            raise
        finally:
            self.count(caller, tally, status)

    def count(self, caller: ClientKey, tally: Tally, status: int) -> None:
        model = self._label(tally)
        labels = ("provider", tally.provider or "none"), ("model", model)
        amounts: dict[Series, float] = {("kimi2api_chats_total", (*labels, ("status", str(status)))): 1}
        durations: dict[Series, float] = {}
        if tally.first_chunk is not None:  # else nothing came, so nothing was used
            prompt_tokens, completion_tokens = tally.tokens()
            amounts["kimi2api_tokens_total", (*labels, ("type", "input"))] = prompt_tokens
            amounts["kimi2api_tokens_total", (*labels, ("type", "output"))] = completion_tokens
            durations["kimi2api_chat_duration_seconds", labels] = time.monotonic() - tally.began
            durations["kimi2api_time_to_first_chunk_seconds", labels] = tally.first_chunk
            self._accounts.record(caller, model, prompt_tokens, completion_tokens, status in (200, 499))
        self._metrics.record(amounts, durations)

    def _label(self, tally: Tally) -> str:
        """The model's id where it is one of a bounded number: an entry `*` of MODELS accepts any."""
        if tally.model in self._models:
            return tally.model
        is_apis = tally.provider != WEB_CHAT and tally.model.startswith(f"{tally.provider}/")
        answers = tally.first_chunk is not None and len(tally.model) <= MAX_LABEL
        if is_apis and answers and len(self._api_models) < MAX_MODEL_LABELS:
            self._api_models.add(tally.model)
        return tally.model if tally.model in self._api_models else "other"


# ======================================================================================================================
# 30 Delivery
#
# How an answer gets from its upstream to its client: in the user's session, on a thread of its own, with keep-alives
# during silence.
# ======================================================================================================================


class Slots:
    """At most `limit` of something at once; one more is an APIError 429, unless it is alone."""

    def __init__(self, limit: int, what: str = "chats are running already (MAX_CONCURRENT_CHATS)") -> None:
        self.limit = limit
        self.used = 0
        self._what = what
        self._lock = threading.Lock()  # guards used

    def acquire(self, count: int = 1) -> None:
        with self._lock:
            if self.used and self.used + count > self.limit:
                raise APIError(
                    429, f"Too many {self._what}. Try again soon.", "rate_limit_error", "server_busy",
                    headers={"Retry-After": "1"})
            self.used += count

    def release(self, count: int = 1) -> None:
        with self._lock:
            self.used -= count


class Calls(Slots):
    """Slots whose holders run on threads of their own, which are kept. ThreadPoolExecutor's locks cost a tenth of the
    chats at 64 at once."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self._threads = 0  # as many as slots were ever in use at once, so that none has to wait
        self._waiting: SimpleQueue[Callable[[], None]] = SimpleQueue()

    def start(self, work: Callable[[], None]) -> None:
        """Raises APIError 429."""
        self.acquire()
        try:
            with self._lock:
                if self.used > self._threads:
                    threading.Thread(target=self._run, name="upstream", daemon=True).start()
                    self._threads += 1
        except RuntimeError:  # the system has no thread for us
            self.release()
            raise
        self._waiting.put(work)

    def _run(self) -> None:
        while True:
            work = self._waiting.get()
            try:
                work()
            except Exception as error:
                as_api_error(error)  # which logs it
            finally:
                del work  # else its request would stay until this thread has another
                self.release()


def answer_in_session(ask: Callable[[Chat], Iterator[Delta]], chat: Chat) -> Iterator[Delta]:
    """An answer with the user's session before it. The turn is recorded before the last delta is handed on, so a
    client that has seen the end finds it remembered."""
    request = chat.request
    session = chat.store.open(chat.owner, request.user)
    history = () if request.has_history else session.turns
    deltas = ask(replace(chat, history=history, session_id=session.id))
    if not request.user:
        yield from deltas
        return
    whole: Any = None
    held: list[Delta] = []
    for delta in deltas:
        whole = merge(whole, delta.chunk)
        if delta.is_final:
            held.append(delta)
            continue
        yield from held
        held = []
        yield delta
    message = answer_to_remember(unfold(whole))
    violation = find_violation(message, MESSAGE)
    if violation:  # every later request would be refused for it
        log.warning("an answer is not remembered: '%s' must be %s", violation.path, describe(violation.schema))
    elif request.turns:
        *older, newest = request.turns
        turns = [*older, (*newest, message)]
        chat.store.record(chat.owner, request.user, session, turns, replace_turns=request.has_history)
    yield from held


def answer_to_remember(completion: JSONObject) -> Message:
    """The assistant's message that goes into a session."""
    for choice in completion["choices"]:
        if choice["index"] == 0:
            message = message_of(choice)
            if not message.get("tool_calls"):
                # APIs refuse null without tool calls
                message["content"] = message["content"] or ""
            return message
    return {"role": "assistant", "content": ""}


def record_response(
    sessions: Sessions, owner: str, previous: Session, asked: ResponsesRequest, request: ChatRequest,
    response: JSONObject,
) -> None:
    """Keep a response, with all that a next one goes on from."""
    answer = read_items(response["output"]).values()
    turns = append_turns(previous.turns, request.turns)
    if turns:
        *older, newest = turns
        turns = (*older, (*newest, *answer))
    sessions.record_response(owner, previous, response, [*previous.system, *asked.system_items], turns)


class Mailbox:
    """Bytes on their way from one thread to another, which takes all that wait at once. Holds the writer back while
    the reader is slow."""

    LIMIT = 1 << 18  # bytes that may wait

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards all below
        self._waiting = bytearray()
        self._is_abandoned = False
        self._error: APIError | None = None
        self.is_finished = False

    def put(self, data: bytes) -> None:
        with self._changed:
            while len(self._waiting) >= self.LIMIT and not self._is_abandoned:
                self._changed.wait()
            if not self._is_abandoned:
                self._waiting += data
                self._changed.notify()

    def finish(self, error: APIError | None = None) -> None:
        """There is no more, or an error instead."""
        with self._changed:
            self._error = error and error.copy()
            self.is_finished = True
            self._changed.notify()

    def take(self, timeout: float) -> bytes:
        """All that waits; nothing after so many seconds, or at the end. Raises the error, after what came before it."""
        with self._changed:
            if not self._waiting and not self.is_finished:
                self._changed.wait(timeout)
            data = bytes(self._waiting)
            self._waiting.clear()
            self._changed.notify()
            if not data and self._error:
                raise self._error.copy()
            return data

    def abandon(self) -> None:
        """There is no reader any more: put() does nothing."""
        with self._changed:
            self._is_abandoned = True
            self._changed.notify()


CLIENT_CHECK_INTERVAL = 0.5  # seconds


def relay(
    parts: Iterator[bytes], cancel: Cancel, cleanup: ExitStack, calls: Calls, keepalive_interval: float,
    check_client: Callable[[], None],
) -> Generator[bytes, None, None]:
    """Make the parts on a thread of their own and hand them on, joined where several wait; b"" after an interval of
    silence (seconds).

    check_client() is called about twice a second; it raises when the client has gone. Then, and at every other end but
    its own, the call is cancelled; one that goes on all the same, so that its turn is recorded, holds one of `calls`
    until it ends. cleanup: closed on that thread when the client has everything. Raises APIError 429 at once when there
    is no room for one more call, and what the parts raise.
    """
    mailbox = Mailbox()
    try:
        calls.start(partial(fill, mailbox, parts, cleanup))
    except BaseException:
        cleanup.close()
        raise
    return hand_on(mailbox, cancel, keepalive_interval, check_client)


def hand_on(
    mailbox: Mailbox, cancel: Cancel, keepalive_interval: float, check_client: Callable[[], None],
) -> Generator[bytes, None, None]:
    """The reading half of `relay`, which knows nothing of the request: a client that reads slowly must not keep it."""
    last_sign = time.monotonic()
    try:
        while True:
            check_client()
            data = mailbox.take(min(CLIENT_CHECK_INTERVAL, keepalive_interval))
            if data:
                yield data
                last_sign = time.monotonic()
            elif mailbox.is_finished:
                return
            elif time.monotonic() - last_sign >= keepalive_interval:
                yield b""
                last_sign = time.monotonic()
    finally:
        mailbox.abandon()
        if not mailbox.is_finished:  # else the connection may still be read to its end, for the next to use
            cancel()


def fill(mailbox: Mailbox, parts: Iterator[bytes], cleanup: ExitStack) -> None:
    """Put the parts into the mailbox, or the error that ended them."""
    with cleanup:
        try:
            for part in parts:
                mailbox.put(part)
            mailbox.finish()
        except Exception as error:  # raised again in the reading thread
            mailbox.finish(as_api_error(error))


# ======================================================================================================================
# 31 Pace
#
# An answer that arrived whole, replayed as a stream, in pieces that a reader could have been shown.
# ======================================================================================================================

PIECE = re.compile(rf"\s*(?:[{WIDE}]{{1,2}}|[^\s{WIDE}]+|$)")


def pieces(text: str, max_pieces: int) -> Iterator[str]:
    """Word-like pieces (of Chinese: one or two characters), joined until there are no more than so many.

    None ends inside a combining sequence, an emoji that is joined from several, or a flag.
    """
    start = 0
    size = len(text) / max_pieces
    for match in PIECE.finditer(text):
        end = match.end()
        if end > start and end - start >= size and not continues_grapheme(text, end):
            yield text[start:end]
            start = end
    if start < len(text):
        yield text[start:]


def pace(deltas: Iterator[Delta], interval: float, max_seconds: float, cancel: Cancel) -> Iterator[Delta]:
    """Replay an answer that arrived whole as OpenAI streams one: one piece every `interval` seconds, `max_seconds` in
    all. Without pauses when the client has gone: the answer may still be recorded, and whole."""
    max_pieces = max(1, int(max_seconds / interval)) if interval else 1
    for delta in deltas:
        if not delta.is_complete:
            yield delta
            continue
        began = time.monotonic()
        # Pieces whose time has passed: the machine is too busy for this pace, so they go out as one
        late = ""
        count = 0
        for step in steps_of(delta, max_pieces):
            ahead = began + count * interval - time.monotonic()
            text = step.text
            if text:
                count += 1
                if ahead < -interval:
                    late += text
                    continue
                cancel.wait(max(0.0, ahead))
                step = Delta.of({"content": late + text})
                late = ""
            elif late:
                yield Delta.of({"content": late})
                late = ""
            yield step


def steps_of(delta: Delta, max_pieces: int) -> Iterator[Delta]:
    """A whole answer as the deltas that OpenAI sends: the role, the text in pieces, each tool call's name, then its
    arguments, the finish reason, the usage."""
    choice = delta.chunk["choices"][0]
    message = dict(choice["delta"])
    calls = message.pop("tool_calls", ())
    content = message["content"]
    message["content"] = None if content is None else ""
    first = Delta.of(message)
    first.chunk["model"] = delta.chunk["model"]
    first.headers = delta.headers
    yield first
    for piece in pieces(content or "", max_pieces):
        yield Delta.of({"content": piece})
    for call in calls:
        function = call["function"]
        named = {**call, "function": {**function, "arguments": ""}}
        arguments = {"index": call["index"], "function": {"arguments": function["arguments"]}}
        yield Delta.of({"tool_calls": [named]})
        yield Delta.of({"tool_calls": [arguments]})
    yield Delta.of({}, choice["finish_reason"])
    yield Delta({"choices": [], "usage": delta.chunk["usage"]})


# ======================================================================================================================
# 32 Formats
#
# Deltas in, the bytes of OpenAI's JSON or server-sent events out.
# ======================================================================================================================

KEEPALIVE = b": keep-alive\n\n"


class ChatCompletion:
    """One chat completion on its way out: an id and a time of creation, the same in every chunk.

    Field by field after CreateChatCompletionResponse and CreateChatCompletionStreamResponse of OpenAI's OpenAPI schema.
    """

    id_prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, include_usage: bool = False) -> None:
        self.headers: Headers = {}  # for the response, known once the first delta is there
        self._head: JSONObject = {"id": f"{self.id_prefix}-{random_hex()}", "created": int(time.time())}
        self._include_usage = include_usage

    def json(self, deltas: Iterable[Delta]) -> Iterator[bytes]:
        """The fold of all deltas into one object, in one piece."""
        whole = folded(deltas)
        self._note(whole)
        completion = whole.chunk
        for choice in completion["choices"]:
            choice["message"] = message_of(choice)
            choice["logprobs"] = choice.get("logprobs")
            choice["finish_reason"] = choice.get("finish_reason") or "stop"
            del choice["delta"]
        yield dump_json(self._with_head(completion, self.kind))

    def events(self, deltas: Iterable[Delta]) -> Iterator[bytes]:
        """Server-sent events, [DONE] at the end."""
        for delta in deltas:
            self._note(delta)
            chunk = self._with_head(delta.chunk, self.chunk_kind)
            usage = chunk.pop("usage", None)
            if self._include_usage:
                chunk["usage"] = usage
            elif usage and not chunk["choices"]:
                continue
            yield b"data: " + dump_json(chunk) + b"\n\n"
        yield b"data: [DONE]\n\n"

    def failure(self, error: APIError, sent: int) -> bytes:
        """The event that ends a stream. Without [DONE] after it: half an answer must not look whole."""
        return b"data: " + dump_json(error.body()) + b"\n\n"

    def _note(self, delta: Delta) -> None:
        if delta.headers:
            self.headers = delta.headers
        if "model" in delta.chunk:
            self._head["model"] = delta.chunk["model"]

    def _with_head(self, fields: JSONObject, kind: str) -> JSONObject:
        """The fields with ours, listed first for readers; ours override upstream's."""
        head = {**self._head, "object": kind}
        return {**head, **fields, **head}


class TextCompletion(ChatCompletion):
    """One completion of the API before chats. Field by field after OpenAI's CreateCompletionResponse."""

    id_prefix = "cmpl"
    kind = "text_completion"
    chunk_kind = "text_completion"

    def _with_head(self, fields: JSONObject, kind: str) -> JSONObject:
        choices = []
        for choice in fields["choices"]:
            message = choice.get("message") or choice["delta"]
            choices.append({
                "text": message.get("content") or "",
                "index": choice["index"],
                "logprobs": None,
                "finish_reason": choice["finish_reason"],
            })
        return super()._with_head({**fields, "choices": choices}, kind)


def event_stream(data: Iterator[bytes], failure: Callable[[APIError, int], bytes]) -> Iterator[bytes]:
    """What is relayed, as a stream: keep-alive comments where there was silence.

    Raises what the relay raises only before the first bytes; later it becomes an event. failure: makes that event, told
    how many were sent before it.
    """
    begun = False
    sent = 0
    try:
        for part in data:
            begun = True
            sent += part.count(b"\n\n")
            yield part or KEEPALIVE
    except Exception as error:
        if not begun:
            raise
        yield failure(as_api_error(error), sent)


# ======================================================================================================================
# 33 Responses
#
# Deltas in, a Response or its events out, in the order in which OpenAI sends them.
# ======================================================================================================================

MAX_ITEMS = 1000  # of one response; each takes a hundred times the bytes that begin another


@dataclass(frozen=True)
class ItemKind:
    """What the items of one kind have in common, and their events."""

    prefix: str  # of their ids
    fields: JSONObject  # of an item that begins
    events: str  # what the names of the events begin with that carry its text
    field: str  # where the text stands when it is complete
    part: JSONObject | None = None  # of its content, which has the text, without it yet


MESSAGE_FIELDS = {"type": "message", "status": "in_progress", "role": "assistant", "content": []}
TEXT_KINDS = {  # by the field of a delta
    "reasoning_content": ItemKind(
        "rs", {"type": "reasoning", "summary": [], "content": []}, "reasoning_text", "text",
        {"type": "reasoning_text", "text": ""}),
    "content": ItemKind(
        "msg", MESSAGE_FIELDS, "output_text", "text",
        {"type": "output_text", "text": "", "annotations": [], "logprobs": []}),
    "refusal": ItemKind("msg", MESSAGE_FIELDS, "refusal", "refusal", {"type": "refusal", "refusal": ""}),
}
FUNCTION_CALL = ItemKind(
    "fc", {"type": "function_call", "status": "in_progress", "arguments": ""}, "function_call_arguments", "arguments")
CUSTOM_CALL = ItemKind("ctc", {"type": "custom_tool_call", "input": ""}, "custom_tool_call_input", "input")


class OutputItem:
    """An item of a response under way: its events, without their numbers."""

    def __init__(self, kind: ItemKind, response_id: str, index: int, fields: JSONObject) -> None:
        self.item = {"id": f"{kind.prefix}_{response_id.removeprefix('resp_')}_{index}", **kind.fields, **fields}
        self._kind = kind
        self._index = index
        self._pieces: list[str] = []

    def begin(self) -> Iterator[JSONObject]:
        yield {"type": "response.output_item.added", "output_index": self._index, "item": self.item}
        if self._kind.part:
            yield self._event("content_part.added", part=self._kind.part)

    def add(self, text: str) -> Iterator[JSONObject]:
        self._pieces.append(text)
        if self._kind is not CUSTOM_CALL:  # of which the text is known when its JSON is complete
            yield self._text_event("delta", delta=text)

    def end(self, status: str) -> Iterator[JSONObject]:
        text = "".join(self._pieces)
        ended = dict(self.item)
        if "status" in ended:
            ended["status"] = status
        if "encrypted_content" in ended:
            ended["encrypted_content"] = ENCODED_REASONING + b64encode(text.encode()).decode()
        if self._kind is CUSTOM_CALL:
            text = custom_input(text)
            yield self._text_event("delta", delta=text)
        # Some APIs leave the arguments out where there are none
        if self._kind is FUNCTION_CALL and not text:
            text = "{}"
            yield self._text_event("delta", delta=text)
        written = {self._kind.field: text}
        yield self._text_event("done", **written)
        if self._kind.part:
            part = {**self._kind.part, **written}
            yield self._event("content_part.done", part=part)
            ended["content"] = [part]
        else:
            ended.update(written)
        self.item = ended
        yield {"type": "response.output_item.done", "output_index": self._index, "item": self.item}

    def _text_event(self, step: str, **fields: Any) -> JSONObject:
        if self._kind.part and "logprobs" in self._kind.part:
            fields["logprobs"] = []
        return self._event(f"{self._kind.events}.{step}", **fields)

    def _event(self, name: str, **fields: Any) -> JSONObject:
        if self._kind.part:
            fields["content_index"] = 0
        return {"type": f"response.{name}", "item_id": self.item["id"], "output_index": self._index, **fields}


def custom_input(arguments: str) -> str:
    """The text for a custom tool, of the arguments for the function that stands for it."""
    with suppress(ValueError):
        value = parse_json(arguments)
        if isinstance(value, dict) and isinstance(value.get("input"), str):
            return str(value["input"])
    return arguments


INCOMPLETE_REASONS = {"length": "max_output_tokens", "content_filter": "content_filter"}  # by finish reason


class ResponseWriter:
    """One response on its way out. record: called with it when it is complete, before the client can see that it is."""

    def __init__(self, request: ResponsesRequest, record: Callable[[JSONObject], None] | None = None) -> None:
        self.headers: Headers = {}
        self._request = request
        self._record = record
        self._id = f"resp_{random_hex()}"
        self._created = int(time.time())
        self._model = request.body.get("model") or ""
        self._begun = False
        self._items: list[OutputItem] = []  # all but the last are complete
        self._open: str | int | None = None  # what is under way: a text, by its field in deltas, or a call by its index
        self._calls: set[int] = set()  # their indexes
        self._finish_reason = ""
        self._usage: Any = None

    def json(self, deltas: Iterable[Delta]) -> Iterator[bytes]:
        last = deque(self._events(deltas), maxlen=1)
        yield dump_json(last[0]["response"])

    def events(self, deltas: Iterable[Delta]) -> Iterator[bytes]:
        for number, event in enumerate(self._events(deltas)):
            yield write_event(event, number)

    def failure(self, error: APIError, sent: int) -> bytes:
        """The events that end a stream of which so many have been sent."""
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        response = self._response("failed", error={"code": code, "message": error.message})
        events = [] if sent else list(self._begin())
        events.append({"type": "response.failed", "response": response})
        written = b""
        for number, event in enumerate(events, start=sent):
            written += write_event(event, number)
        return written

    def _events(self, deltas: Iterable[Delta]) -> Iterator[JSONObject]:
        for delta in deltas:
            if delta.headers:
                self.headers = self._with_ignored(delta.headers)
            self._model = delta.chunk.get("model") or self._model
            if not self._begun:
                self._begun = True
                yield from self._begin()
            self._usage = delta.chunk.get("usage") or self._usage
            for choice in delta.chunk["choices"]:
                if choice["index"] == 0:
                    yield from self._add(choice["delta"])
                    self._finish_reason = choice.get("finish_reason") or self._finish_reason
        reason = INCOMPLETE_REASONS.get(self._finish_reason)
        status = "incomplete" if reason else "completed"
        yield from self._end_item(status)
        response = self._response(
            status, incomplete_details={"reason": reason} if reason else None, usage=self._usage_fields())
        if self._record:
            self._record(response)
        yield {"type": f"response.{status}", "response": response}

    def _begin(self) -> Iterator[JSONObject]:
        response = self._response("in_progress")
        yield {"type": "response.created", "response": response}
        yield {"type": "response.in_progress", "response": response}

    def _add(self, delta: JSONObject) -> Iterator[JSONObject]:
        for name, kind in TEXT_KINDS.items():
            if delta.get(name):
                yield from self._add_text(name, kind, delta[name])
        for call in delta.get("tool_calls") or ():
            yield from self._add_call(call)

    def _add_text(self, name: str, kind: ItemKind, text: str) -> Iterator[JSONObject]:
        if self._open != name:
            fields: JSONObject = {}
            if name == "reasoning_content" and self._request.wants_encoded_reasoning:
                fields["encrypted_content"] = None
            yield from self._begin_item(name, kind, fields)
        yield from self._items[-1].add(text)

    def _add_call(self, call: JSONObject) -> Iterator[JSONObject]:
        index = call["index"]
        function = call.get("function") or {}
        if self._open != index:
            if index in self._calls:
                raise upstream_error(502, "upstream_invalid_response", "The pieces of tool calls came in no order.")
            self._calls.add(index)
            name = function.get("name") or ""
            tool = self._request.tools.get(name) or ToolName(name)
            fields = {"call_id": call.get("id") or f"call_{random_hex()[:24]}", "name": tool.name}
            if tool.namespace:
                fields["namespace"] = tool.namespace
            yield from self._begin_item(index, CUSTOM_CALL if tool.is_custom else FUNCTION_CALL, fields)
        if function.get("arguments"):
            yield from self._items[-1].add(function["arguments"])

    def _begin_item(self, what: str | int, kind: ItemKind, fields: JSONObject) -> Iterator[JSONObject]:
        yield from self._end_item("completed")
        if len(self._items) == MAX_ITEMS:
            raise upstream_error(502, "upstream_invalid_response", f"An answer of more than {MAX_ITEMS} items came.")
        item = OutputItem(kind, self._id, len(self._items), fields)
        self._open = what
        self._items.append(item)
        yield from item.begin()

    def _end_item(self, status: str) -> Iterator[JSONObject]:
        if self._open is not None:
            self._open = None
            yield from self._items[-1].end(status)

    def _usage_fields(self) -> JSONObject:
        usage = self._usage
        cached = count_of(usage, "prompt_tokens_details", "cached_tokens") or count_of(usage, "cached_tokens")
        reasoning = count_of(usage, "completion_tokens_details", "reasoning_tokens")
        return {
            "input_tokens": count_of(usage, "prompt_tokens"),
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": count_of(usage, "completion_tokens"),
            "output_tokens_details": {"reasoning_tokens": reasoning},
            "total_tokens": count_of(usage, "total_tokens"),
        }

    def _with_ignored(self, headers: Headers) -> Headers:
        ignored = list(self._request.ignored)
        if "X-Kimi2api-Ignored" in headers:
            ignored.append(headers["X-Kimi2api-Ignored"])
        return {**headers, "X-Kimi2api-Ignored": ", ".join(ignored)} if ignored else headers

    def _response(self, status: str, **fields: Any) -> JSONObject:
        """The Response object, with the settings of the request as they hold."""
        body = self._request.body
        response = {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": self._model,
            "output": [item.item for item in self._items],
            "usage": None,
            **fields,
        }
        for name, default in ECHOED.items():
            value = body.get(name)
            response[name] = default if value is None else value
        response["tools"] = list(map(echoed_tool, response["tools"]))
        response["text"] = {"format": {"type": "text"}, **response["text"]}
        response["reasoning"] = {"effort": None, "summary": None, **response["reasoning"]}
        return response


ECHOED: JSONObject = {
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "reasoning": {},
    "safety_identifier": None,
    "service_tier": "default",
    "store": True,
    "temperature": 1.0,
    "text": {},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
}


def echoed_tool(tool: JSONObject) -> JSONObject:
    """A tool as clients' types want it, with fields that the request may leave out."""
    return {"parameters": None, "strict": None, **tool} if tool["type"] == "function" else tool


def response_of(item_id: str) -> str:
    """The id of the response that an item belongs to."""
    return f"resp_{item_id.partition('_')[2].rpartition('_')[0]}"


def write_event(event: JSONObject, number: int) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (event["type"].encode(), dump_json({**event, "sequence_number": number}))


# ======================================================================================================================
# 34 Access
#
# Who may call: keys, and browsers, which may be sent here by anybody's page.
# ======================================================================================================================

OPEN_PATHS = ("/health", "/", "/docs", "/openapi.json")  # need no key: nothing in them belongs to a caller


class Access:
    """Lets requests in."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def admit(self) -> None:
        """Let a request in, or raise what to answer instead."""
        # Also for headers: Bottle's own accessors fail on some bytes above 127
        environ = bottle.request.environ
        environ["kimi2api.began"] = time.monotonic()
        environ["kimi2api.id"] = request_id(environ.get("HTTP_X_REQUEST_ID", ""))
        try:
            self._check_caller(environ)
            if environ["REQUEST_METHOD"] == "OPTIONS":
                raise preflight(environ)
            is_open = environ["PATH_INFO"] in OPEN_PATHS
            environ["kimi2api.client"] = ClientKey() if is_open else self._client_of(environ)
        except APIError as error:
            raise as_response(error) from None

    def _check_caller(self, environ: dict[str, Any]) -> None:
        host = environ.get("HTTP_HOST")
        origin = environ.get("HTTP_ORIGIN")
        # Without a key the only protection is being local. A page whose name resolves to 127.0.0.1 (DNS rebinding) gets
        # past the address, but not past its own name in Host; any other page gives itself away by its Origin.
        if not self._settings.api_master_key and host and not is_loopback(host_of(f"//{host}")):
            raise APIError(
                403, f"{host[:100]!r} is not a name of this machine. Without API_MASTER_KEY only requests to localhost "
                "are accepted.", code="host_not_allowed")
        if origin and not self._origin_allowed(origin, host):
            raise APIError(
                403, f"Web pages of {origin[:100]!r} may not call this server; CORS_ORIGINS lists those that may.",
                code="origin_not_allowed")
        environ["kimi2api.origin"] = origin
        try:
            environ["bottle.raw_path"].encode("latin-1").decode()
        except UnicodeError:  # Bottle would drop the bytes that are none and go on to another's path
            raise bad_request("The path is not UTF-8.") from None

    def _origin_allowed(self, origin: str, host: str | None) -> bool:
        allowed = self._settings.cors_origins
        if host and origin.partition("://")[2] == host:  # the server's own pages
            return True
        if allowed:
            return origin in allowed or "*" in allowed
        return bool(self._settings.api_master_key) or is_loopback(host_of(origin))

    def _client_of(self, environ: dict[str, Any]) -> ClientKey:
        """The key that the request carries, an empty one when none is asked."""
        authorization = environ.get("HTTP_AUTHORIZATION", "")
        found = matching_key(self._settings.api_master_key, authorization)
        if found is not None:
            return found
        message = "Incorrect API key." if authorization else "No API key: send it as 'Authorization: Bearer …'."
        raise APIError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def matching_key(keys: Iterable[ClientKey], authorization: str) -> ClientKey | None:
    """The key that an Authorization header carries, an empty one when none is asked, None when it is not ours."""
    if not keys:
        return ClientKey()
    scheme, _, token = authorization.partition(" ")
    given = token.strip().encode("latin-1", "replace")
    # All: no timing leak
    matches = [client for client in keys if hmac.compare_digest(client.key.encode(), given)]
    return matches[0] if matches and scheme.lower() == "bearer" else None


def request_id(given: str) -> str:
    return given if re.fullmatch(r"[\w.:-]{1,128}", given, re.A) else f"req_{random_hex()}"


def current_client() -> ClientKey:
    """The key that the current request was sent with."""
    found: ClientKey = bottle.request.environ["kimi2api.client"]
    return found


def current_owner() -> str:
    """What the sessions of the current request's key are kept under."""
    return current_client().owner


def host_of(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:  # such as half an IPv6 address
        return None


def preflight(environ: dict[str, Any]) -> bottle.HTTPResponse:
    """The answer to a browser that asks whether a page may send a request; it carries no key yet."""
    return bottle.HTTPResponse(status=204, headers={
        "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
        "Access-Control-Allow-Headers": environ.get("HTTP_ACCESS_CONTROL_REQUEST_HEADERS", "*"),
        "Access-Control-Allow-Private-Network": "true",
        "Access-Control-Max-Age": "600",
    })


def as_response(error: APIError) -> bottle.HTTPResponse:
    headers = {**error.headers, "Content-Type": "application/json"}
    return bottle.HTTPResponse(dump_json(error.body()), error.status, headers=headers)


# ======================================================================================================================
# 35 Exchanges
#
# What one request holds of the server while it is answered, and the shapes of small answers.
# ======================================================================================================================

MAX_PARSED_BYTES = 512 << 20  # of all requests under way, as Python's objects
EXPOSED_HEADERS = ", ".join([
    "X-Request-Id", "X-Kimi2api-Provider", "X-Kimi2api-Ignored", "X-Kimi2api-Tools-Dropped", "Retry-After",
    "x-should-retry",
    *(f"x-ratelimit-{what}-{unit}" for what in ("limit", "remaining", "reset") for unit in ("requests", "tokens")),
])
EVENT_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold a stream back
}


class EventStream:
    """A WSGI body: events of which the first has been made already, and what to do when it is over or given up."""

    def __init__(self, events: Iterator[bytes], done: ExitStack) -> None:
        self._events = events
        self.close = done.close

    def __iter__(self) -> Iterator[bytes]:
        return self._events


@dataclass
class Exchange:
    """A request with a body, and what is to be given back: `call` when its upstream call has ended, which may be after
    its client has left; `done` when it is answered, which may be with the end of a stream."""

    body: bytes
    call: ExitStack
    done: ExitStack


def set_headers(headers: Headers) -> None:
    for name, value in headers.items():
        bottle.response.set_header(name, value)


def session_object(user: str, session: Session | SessionSummary) -> JSONObject:
    return {
        "object": "session",
        "user": user,
        "created": int(session.created),
        "last_used": int(session.used),
        "turns": session.turns,
    }


def session_not_found() -> APIError:
    return APIError(404, "There is no session for this user, or it has expired.", code="session_not_found")


def response_not_found(id: str) -> APIError:
    return APIError(404, f"Response with id {id[:100]!r} not found.", code="response_not_found")


# ======================================================================================================================
# 36 App
#
# The program's state while it runs, and what it does for each route.
# ======================================================================================================================


class App:
    """The program's state while it runs, and its routes."""

    def __init__(self, settings: Settings, stopping: threading.Event) -> None:
        self.settings = settings
        self.stopping = stopping
        self.metrics = Metrics()
        self.providers = Providers(settings, self.metrics)
        self.store = open_store(settings)
        self.sessions = Sessions(self.store)
        self.accounts = Accounts(self.store, settings.requests_per_minute, settings.tokens_per_day)
        self.meter = Meter(self.metrics, self.accounts, settings)
        self.chats = Slots(settings.max_concurrent_chats)
        self.memory = Slots(MAX_PARSED_BYTES, "large requests at once")
        # Upstream calls, those included whose client has left: they may be as many again, and no more
        self.calls = Calls(2 * settings.max_concurrent_chats)
        self.started = time.time()

    # Routes

    def chat(self) -> bytes | EventStream:
        return self._complete(ChatRequest.parse, ChatCompletion)

    def completion(self) -> bytes | EventStream:
        return self._complete(ChatRequest.parse_completion, TextCompletion)

    def _complete(
        self, parse: Callable[[bytes], ChatRequest], writer: Callable[[bool], ChatCompletion],
    ) -> bytes | EventStream:
        with self._exchange() as exchange:
            request = parse(exchange.body)
            return self._answer(exchange, request, writer(request.include_usage))

    def response(self) -> bytes | EventStream:
        with self._exchange() as exchange:
            asked = ResponsesRequest.parse(exchange.body, self._stored_item)
            previous = self._previous_response(asked.body.get("previous_response_id"))
            earlier = len(previous.system)
            try:
                request = asked.chat(previous.system)
                record = partial(record_response, self.sessions, current_owner(), previous, asked, request)
                writer = ResponseWriter(asked, record if asked.is_stored else None)
                return self._answer(exchange, request, writer, previous)
            except APIError as error:
                raise asked.in_own_terms(error, earlier) from None

    def _previous_response(self, id: str | None) -> Session:
        """What a response goes on from: a new session where it names none."""
        if not id:
            return self.sessions.open(current_owner(), None)
        found = self.sessions.response(current_owner(), id)
        if found is None:
            raise bad_request(
                f"Previous response with id {id[:100]!r} not found.", "previous_response_id",
                "previous_response_not_found")
        return found

    def _answer(
        self, exchange: Exchange, request: ChatRequest, writer: ChatCompletion | ResponseWriter,
        previous: Session | None = None,
    ) -> bytes | EventStream:
        """Have a chat answered. previous: what it goes on from, instead of its user's session."""
        model = request.model or self.settings.default_model
        self.providers.resolve(model)  # an unknown model is refused before it takes a slot
        self._admit(exchange)
        chat = Chat(
            request,
            model,
            owner=current_owner(),
            store=self.sessions,
            cleanup=exchange.call.pop_all(),
        )
        ask = partial(self.providers.answer, model)
        if previous is None:
            deltas = answer_in_session(ask, chat)
        else:
            deltas = ask(replace(chat, history=previous.turns, session_id=previous.id))
        if request.stream:
            return self._stream(exchange, chat, writer, deltas)
        parts = self._counted(current_client(), chat, writer.json(deltas))
        answer = b"".join(self._relay(exchange, parts, chat.cancel, chat.cleanup))
        set_headers({"Content-Type": "application/json", **writer.headers})
        return answer

    def _stream(
        self, exchange: Exchange, chat: Chat, writer: ChatCompletion | ResponseWriter, deltas: Iterator[Delta],
    ) -> EventStream:
        interval = self.settings.stream_interval_ms / 1000
        paced = pace(deltas, interval, self.settings.stream_max_seconds, chat.cancel)
        parts = self._counted(current_client(), chat, writer.events(paced))
        events = event_stream(self._relay(exchange, parts, chat.cancel, chat.cleanup), writer.failure)
        first = next(events)  # what goes wrong before the first event is a real status
        set_headers({**EVENT_STREAM_HEADERS, **writer.headers})
        return EventStream(itertools.chain([first], events), exchange.done.pop_all())

    def _counted(self, caller: ClientKey, chat: Chat, parts: Iterator[bytes]) -> Iterator[bytes]:
        """The answer, counted when it ends, however it ends: it may also fail to be written, or to be kept."""
        with self.meter.counted(caller, chat.tally, chat.cancel):
            yield from parts

    def embeddings(self) -> bytes:
        with self._exchange() as exchange:
            body = parse_body(exchange.body, EMBEDDINGS_REQUEST)
            model = body.get("model") or self.settings.default_model
            self.providers.resolve(model)  # as for a chat
            cancel = Cancel()
            caller = current_client()
            self._admit(exchange)
            tally = Tally()
            headers: Headers = {}

            def ask() -> Iterator[bytes]:
                nonlocal headers
                with self.meter.counted(caller, tally, cancel):
                    answer, headers = self.providers.embed(model, body, cancel, tally)
                yield dump_json(answer)

            answer = b"".join(self._relay(exchange, ask(), cancel, exchange.call.pop_all()))
            set_headers({"Content-Type": "application/json", **headers})
        return answer

    @contextmanager
    def _exchange(self) -> Iterator[Exchange]:
        """The current request, with memory for its body once it is parsed. Raises APIError 413 or 429."""
        limit = self.settings.max_body_bytes
        length = bottle.request.content_length
        if length > limit:
            raise APIError(413, f"The body is larger than {limit} bytes (MAX_BODY_BYTES).", code="request_too_large")
        body: bytes = bottle.request.environ["wsgi.input"].read(max(0, length))
        size = parsed_size(body)
        self.memory.acquire(size)
        with ExitStack() as call, ExitStack() as done:
            call.callback(self.memory.release, size)
            yield Exchange(body, call, done)

    def _admit(self, exchange: Exchange) -> None:
        """Give a chat a slot until it is answered, and count it against its key's limits. Raises APIError 429."""
        self.chats.acquire()
        exchange.done.callback(self.chats.release)
        bottle.request.environ["kimi2api.limits"] = self.accounts.admit(current_client())

    def _relay(
        self, exchange: Exchange, parts: Iterator[bytes], cancel: Cancel, cleanup: ExitStack,
    ) -> Generator[bytes, None, None]:
        data = relay(parts, cancel, cleanup, self.calls, self.settings.sse_keepalive, self._client_check())
        bottle.request.environ["kimi2api.has_call"] = True
        return exchange.done.enter_context(closing(data))

    def _client_check(self) -> Callable[[], None]:
        """A function that raises when the current request's client has gone, or the server stops."""
        has_gone = bottle.request.environ.get("waitress.client_disconnected", bool)

        def check() -> None:
            if has_gone():
                raise client_disconnected()
            if self.stopping.is_set():
                raise APIError(503, "The server is stopping.", "server_error", "server_stopping")

        return check

    def models(self) -> JSONObject:
        return {"object": "list", "data": self.providers.models()}

    def model(self, id: str) -> JSONObject:
        return self.providers.model(id)

    def session(self, user: str) -> JSONObject:
        session = self.sessions.get(current_owner(), user)
        if session is None:
            raise session_not_found()
        expires_at = int(session.used + self.store.ttl)
        return {**session_object(user, session), "expires_at": expires_at}

    def stored_response(self, id: str) -> JSONObject:
        session = self.sessions.response(current_owner(), id)
        if session is None or session.response is None:
            raise response_not_found(id)
        return session.response

    def _stored_item(self, id: str) -> JSONObject | None:
        session = self.sessions.response(current_owner(), response_of(id))
        items = session.response["output"] if session and session.response else []
        return next((item for item in items if item["id"] == id), None)

    def forget_response(self, id: str) -> JSONObject:
        if not self.sessions.forget_response(current_owner(), id):
            raise response_not_found(id)
        return {"id": id, "object": "response", "deleted": True}

    def forget(self, user: str) -> JSONObject:
        if not self.sessions.forget(current_owner(), user):
            raise session_not_found()
        return {"object": "session.deleted", "user": user, "deleted": True}

    def users(self) -> JSONObject:
        """The caller's sessions, without what was said in them."""
        sessions = self.store.users(current_owner())
        return {"object": "list", "data": [session_object(user, session) for user, session in sessions.items()]}

    def usage(self) -> JSONObject:
        return self.accounts.usage(current_client())

    def metrics_page(self) -> str:
        set_headers({"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
        gauges: list[tuple[str, Headers, float]] = [
            ("kimi2api_chats_running", {}, self.chats.used),
            ("kimi2api_chats_limit", {}, self.chats.limit),
            ("kimi2api_build_info", {"version": __version__}, 1),
            ("process_start_time_seconds", {}, self.started),
        ]
        for name, provider in self.providers.by_name.items():
            gauges.append(("kimi2api_upstream_healthy", {"provider": name}, not provider.breaker.failing))
        with suppress(APIError):  # a store that cannot be reached is told by /health
            gauges.append(("kimi2api_sessions", {}, self.store.count()))
        return self.metrics.render(gauges)

    def health(self) -> JSONObject:
        upstreams: dict[str, JSONObject] = {}
        status = "ok"
        for provider in self.providers.by_name.values():
            upstreams[provider.name] = {}
            failing = provider.breaker.failing
            if failing:
                status = "degraded"
                since, reason = failing
                upstreams[provider.name] = {"failing_since": int(since), "reason": reason}
        kept: int | None = None
        with suppress(APIError):
            self.store.check()
            kept = self.store.count()
        if kept is None:
            status = "degraded"
        return {
            "status": status,
            "version": __version__,
            "key_required": bool(self.settings.api_master_key),
            "uptime_seconds": int(time.time() - self.started),
            "chats": {"running": self.chats.used, "limit": self.chats.limit},
            "sessions": {"kept": kept, "limit": self.store.limit},
            "store": {"kind": self.store.kind, "ok": kept is not None},
            "upstreams": upstreams,
        }

    def openapi(self) -> JSONObject:
        return openapi(bool(self.settings.api_master_key))

    def page(self) -> str:
        set_headers(page_headers())
        return PAGE

    # After every route

    def finish(self) -> None:
        """Headers that every response carries, and a line in the log."""
        environ = bottle.request.environ
        response = bottle.response
        response.set_header("X-Request-Id", environ["kimi2api.id"])
        origin = environ.get("kimi2api.origin")
        if origin:
            response.set_header("Access-Control-Allow-Origin", origin)
            response.set_header("Access-Control-Expose-Headers", EXPOSED_HEADERS)
            response.add_header("Vary", "Origin")
        set_headers(environ.get("kimi2api.limits", {}))
        caller = environ.get("kimi2api.client", ClientKey())
        name = f"{caller.name} " if caller.name else ""
        status = response.status_code
        route = environ.get("bottle.route")
        rule = route.rule if route else "(no route)"
        if route and route.method == "POST" and "kimi2api.has_call" not in environ:
            # Refused before an upstream could be asked
            self.meter.count(caller, Tally(), status)
        level = logging.INFO if status >= 400 else logging.DEBUG
        milliseconds = (time.monotonic() - environ["kimi2api.began"]) * 1000
        log.log(
            level, "%s %s%s %s %d %.0f ms", environ["kimi2api.id"], name, environ["REQUEST_METHOD"], rule, status,
            milliseconds)


# ======================================================================================================================
# 37 Routes
#
# Which path is whose. `create_app(settings)` builds a Bottle application with state of its own, so a test can have as
# many as it likes.
# ======================================================================================================================


def json_plugin(route: Callable[..., Any]) -> Callable[..., Any]:
    """Bottle plugin: what a route returns becomes JSON, and so does every error."""
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            result = route(*args, **kwargs)
            if isinstance(result, dict):
                result = dump_json(result)
                bottle.response.content_type = "application/json"
            return result
        except Exception as error:
            return as_response(as_api_error(error))

    return call


def routing_error(error: bottle.HTTPError) -> bytes:
    """Bottle's own errors: no such path, wrong method, or a crash outside a route."""
    path = f"{bottle.request.method} {bottle.request.path[:100]}"
    if error.status_code == 404:
        advice = "The base URL for clients ends in /v1."
        if bottle.request.path.startswith("/v1/"):
            advice = ("This server has chat completions, Responses, completions, embeddings, models and sessions, and "
                      "nothing else of OpenAI's API.")
        ours = APIError(404, f"Unknown path: {path!r}. {advice}", code="not_found")
    elif error.status_code == 405:
        ours = APIError(405, f"Method not allowed: {path!r}.", code="method_not_allowed")
    else:
        message = "Internal server error; see the server's log."
        ours = APIError(error.status_code, message, "server_error", "internal_error")
    bottle.response.content_type = "application/json"
    return dump_json(ours.body())


@dataclass(frozen=True)
class Route:
    """A route, and what /openapi.json says of it: its body and its answer by the names of their schemas."""

    method: str
    rule: str  # in Bottle's form
    handler: Callable[..., Any]
    summary: str
    answer: str
    request: str = ""
    event: str = ""  # of its stream, where it has one: what its data is


ROUTES = [
    Route("POST", "/v1/chat/completions", App.chat, "chat", "Completion", "Request", "a Chunk as JSON, or [DONE]"),
    Route("POST", "/v1/responses", App.response, "a response", "Response", "ResponsesRequest",
          "an event of the Responses API as JSON"),
    Route("GET", "/v1/responses/<id>", App.stored_response, "a stored response", "Response"),
    Route("DELETE", "/v1/responses/<id>", App.forget_response, "forget a stored response", "DeletedResponse"),
    Route("POST", "/v1/completions", App.completion, "complete a text", "TextCompletion", "CompletionRequest",
          "a TextCompletion as JSON, or [DONE]"),
    Route("POST", "/v1/embeddings", App.embeddings, "embeddings", "Embeddings", "EmbeddingsRequest"),
    Route("GET", "/v1/models", App.models, "the models", "Models"),
    Route("GET", r"/v1/models/<id:re:[\s\S]+>", App.model, "one model", "Model"),
    Route("GET", "/v1/sessions", App.users, "the sessions of the key", "Sessions"),
    Route("GET", r"/v1/sessions/<user:re:[\s\S]+>", App.session, "the turns remembered of a user", "Session"),
    Route("DELETE", r"/v1/sessions/<user:re:[\s\S]+>", App.forget, "forget a user's turns", "Deleted"),
    Route("GET", "/v1/usage", App.usage, "what the key has used, and its limits", "Usage"),
    Route("GET", "/metrics", App.metrics_page, "counters for Prometheus", "text/plain"),
    Route("GET", "/health", App.health, "how the server is", "Health"),
    Route("GET", "/openapi.json", App.openapi, "this description", "OpenAPI"),
    Route("GET", "/docs", App.page, "a page to read and to try", "text/html"),
    Route("GET", "/", App.page, "the same page", "text/html"),
]


def create_app(settings: Settings, stopping: threading.Event | None = None) -> bottle.Bottle:
    """The WSGI application. Chats end with an error once `stopping` is set. Raises SettingError for a store that cannot
    be used."""
    app = App(settings, stopping or threading.Event())
    wsgi = bottle.Bottle()
    wsgi.install(json_plugin)
    wsgi.default_error_handler = routing_error
    wsgi.add_hook("before_request", Access(settings).admit)
    wsgi.add_hook("after_request", app.finish)
    for route in ROUTES:
        wsgi.route(route.rule, route.method, partial(route.handler, app))
    return wsgi


# ======================================================================================================================
# 38 Demo upstream
#
# A small stand-in for the web chat: the page with its nonce, the form, the JSON. It speaks the same HTTP as the site,
# so `--demo` runs the real code path without internet.
# ======================================================================================================================


class DemoUpstream(BaseHTTPRequestHandler):
    """Answers every question by saying that it is no model, and what reached it."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet
    nonce = random_hex()[:10]

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
        body = self.rfile.read(int(self.headers["Content-Length"]))
        form = dict(parse_qsl(body.decode()))
        if form.get("nonce") != self.nonce:
            self.reply(403, "text/html", b"-1")
            return
        answer = answer_of_demo(form["message"], form["model"])
        self.reply(200, "application/json", dump_json({"success": True, "data": {"message": answer}}))

    def reply(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("demo upstream: " + format, *args)


MAX_DEMO_DOCUMENT = 100_000  # characters; arrays in arrays would multiply their minItems


def smallest_document(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """A value by a JSON schema, as far as the demo reads one. definitions: what it may refer to, by `$ref`."""
    if not isinstance(schema, dict):
        return {}
    reference = str(schema.get("$ref"))
    if reference in definitions:  # which can be used once on the way down: it may refer to itself
        others = {name: definition for name, definition in definitions.items() if name != reference}
        return smallest_document(definitions[reference], others)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for keyword in ("anyOf", "oneOf", "allOf"):
        options = schema.get(keyword)
        if options:
            return None if NULL in options else smallest_document(options[0], definitions)
    kind = schema.get("type", "object")
    if isinstance(kind, list):
        kind = kind[0]
    if kind == "object":
        properties = schema.get("properties", {})
        return {name: smallest_document(properties.get(name), definitions) for name in schema.get("required", ())}
    if kind == "array":
        items = [smallest_document(schema.get("items"), definitions)] * smallest(schema, "minItems")
        return items if len(json.dumps(items[:1])) * len(items) <= MAX_DEMO_DOCUMENT else []
    if kind == "string":
        return "x" * smallest(schema, "minLength")
    if kind in ("integer", "number"):
        return smallest(schema, "minimum")
    return False if kind == "boolean" else None


def smallest(schema: Schema, keyword: str) -> int:
    bound: float = schema.get(keyword, 0)
    return min(max(0, ceil(bound)), 1000)


def definitions_of(schema: Schema) -> dict[str, Any]:
    """What the schema defines, by the references to it."""
    definitions = {}
    for keyword in ("$defs", "definitions"):
        for name, definition in schema.get(keyword, {}).items():
            definitions[f"#/{keyword}/{name}"] = definition
    return definitions


def smallest_arguments(form: str, at: int = 0) -> tuple[Any, int]:
    """A value of the type that `signature` has written there, and where it ends."""
    if form.startswith("{", at) and not form.startswith(("{}", '{"'), at):
        value: Any = {}
        at += 1
        while form[at] != "}":
            colon = form.index(": ", at)
            name = form[at:colon].removeprefix(", ")
            inner, at = smallest_arguments(form, colon + 2)
            if not name.endswith("?"):
                value[name] = inner
        at += 1
    elif form.startswith("[", at):
        _, at = smallest_arguments(form, at + 1)
        value = []
        at += 1
    else:
        word = re.compile("array|boolean|integer|number|object|string").match(form, at)
        if word:
            value = smallest_document({"type": word[0]}, {})
            at = word.end()
        else:
            value, at = STRICT_JSON.raw_decode(form, at)
            if isinstance(value, dict):  # a schema as it is
                value = smallest_document(value, definitions_of(value))
    if form.startswith("|", at):
        _, at = smallest_arguments(form, at + 1)
    return value, at


# What a schema or a form that is none can raise
UNREADABLE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
SPEAKER = re.compile("^(?:用户|模型|工具)(?: .+?)?: ", re.M)
OFFERED_TOOLS = re.compile(r"^You (may|must) call .*Tools:((?:\n- .*)+)", re.M)
OFFERED_TOOL = re.compile(r"^- ([\w.-]+)(.*)", re.M)
WANTS_JSON = re.compile("^Answer with one JSON document and nothing else(?:, valid by this schema: (.*))?", re.M)


def answer_of_demo(prompt: str, model: str) -> str:
    """A call of the first tool, then its result; JSON where it is asked for; else what has reached the model. Where a
    call is demanded even then, it is of the last tool: an agent's tools end with the one that ends its loop."""
    parts = SPEAKER.split(prompt)
    marks = SPEAKER.findall(prompt)
    newest = parts[-1].strip()
    has_result = bool(marks) and marks[-1].startswith("工具")
    offered = OFFERED_TOOLS.search(prompt)
    tools = OFFERED_TOOL.findall(offered[2]) if offered else []
    if offered and tools and (offered[1] == "must" or not has_result):
        name, form = tools[-1 if has_result else 0]
        arguments: Any = {}
        with suppress(*UNREADABLE):  # a form that the demo does not know
            arguments, _ = smallest_arguments(form)
        return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"
    wants_json = WANTS_JSON.search(prompt)
    if wants_json:
        document: Any = {}
        with suppress(*UNREADABLE):  # the words may be the user's own, and the schema anything
            schema = parse_json(wants_json[1] or "{}")
            document = smallest_document(schema, definitions_of(schema))
        return json.dumps(document)
    about = "The tool said" if has_result else "You said"
    earlier = ""
    for part in parts[:-1]:
        if part.strip():
            earlier += f"\n- {' '.join(part.split())[:60]}"
    return (
        f"This is kimi2api's demo, not Kimi (演示模式): no model was asked. {about}: “{newest}”\n"
        f"Earlier messages that reached {model} with it:{earlier or ' none.'}")


# ======================================================================================================================
# 39 Client connections
#
# waitress's connections and requests, with errors in OpenAI's shape and bounds on clients that have no key.
# ======================================================================================================================

SPARE_THREADS = 8  # beyond MAX_CONCURRENT_CHATS, so that everything else is always answered
MAX_CONNECTIONS = 1000  # beyond MAX_CONCURRENT_CHATS
CONNECTION_TIMEOUT = 30.0  # seconds without a request, without its head, or without taking any of its answer
MIN_BODY_RATE = 1000  # bytes a second
MAX_PIPELINED = 8  # requests that one connection may have waiting; without a key, all answers fit MAX_UNSENT_BYTES
MAX_UNSENT_BYTES = 1 << 18  # of an answer; a thread that has more to write waits for its client
SEND_BUFFER = 1 << 16  # bytes; behind the 4 MB of a system, a client that reads 20 KB a second would look stalled
EXTRA_BODY_BYTES = 16 << 20  # received above MAX_BODY_BYTES: a client still sending would miss our 413


class JSONErrorTask(ErrorTask):  # type: ignore[misc]
    """waitress's own errors (a request that is not HTTP, headers too long, …) in OpenAI's shape."""

    def execute(self) -> None:
        error = self.request.error
        code = "request_too_large" if error.code == 413 else None
        body = dump_json(APIError(error.code, f"{error.reason}: {error.body}", code=code).body())
        self.status = f"{error.code} {error.reason}"
        self.response_headers += [
            ("Content-Type", "application/json"),
            ("X-Request-Id", request_id(self.request.headers.get("X_REQUEST_ID", ""))),
        ]
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class Task(WSGITask):  # type: ignore[misc]
    """One request, answered by the application."""

    def build_response_header(self) -> bytes:
        if self.channel.server.draining:
            # A client that keeps sending requests over one connection must not delay the stop
            self.set_close_on_finish()
        head: bytes = super().build_response_header()
        return head

    def finish(self) -> None:
        """End the answer, then call the functions that the application has put into its environ."""
        super().finish()
        for function in self.environ.get("kimi2api.after", ()):
            function()


class Discarded(OverflowableBuffer):  # type: ignore[misc]
    """A body that nobody will read. It is received all the same, so that its client reads our answer."""

    def append(self, data: bytes) -> None:
        pass


class Parser(HTTPRequestParser):  # type: ignore[misc]
    """Reads one request from a connection."""

    path = ""  # waitress reads it even of a request that it could not parse
    body_rcv: Any
    expect_continue: bool

    def __init__(self, adj: Any) -> None:
        super().__init__(adj)
        self._began = time.monotonic()  # with the request's first byte

    def is_overdue(self) -> bool:
        allowed: float = CONNECTION_TIMEOUT + self.body_bytes_received / MIN_BODY_RATE
        return time.monotonic() - self._began > allowed

    def parse_header(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # urlsplit's, of a request target such as http://[/
            raise ParsingError(f"Bad request target: {error}") from None
        # waitress joins the values of equal names by commas
        if self.version == "1.1" and ("HOST" not in self.headers or "," in self.headers["HOST"]):
            raise ParsingError("HTTP/1.1 requires one Host header")
        if "TRANSFER_ENCODING" in self.headers or (self.chunked and "CONTENT_LENGTH" in self.headers):
            # A proxy in front may see another end of the body; what follows is no request (RFC 9112, 6.1)
            self.headers["CONNECTION"] = "close"
        if self.body_rcv is None or self._is_body_wanted():
            return
        if self.expect_continue:  # the body has not been sent yet
            self.expect_continue = False
            self.headers["CONNECTION"] = "close"  # what comes is the body, and must not be taken for a request
            self.body_rcv = None
        else:
            self.body_rcv.buf = Discarded(0)

    def _is_body_wanted(self) -> bool:
        """Return False for a request that will be refused because of its head."""
        if self.content_length > self.adj.max_wanted_body:
            return False
        return matching_key(self.adj.api_keys, self.headers.get("AUTHORIZATION", "")) is not None


class Channel(HTTPChannel):  # type: ignore[misc]
    """A client's connection."""

    parser_class = Parser
    task_class = Task
    error_task_class = JSONErrorTask

    def received(self, data: bytes) -> bool:
        received: bool = super().received(data)
        with self.requests_lock:
            # 64 KB hold 2,400 requests: a thread that writes their answers would wait for a client that reads none
            if len(self.requests) > MAX_PIPELINED:
                for request in self.requests[MAX_PIPELINED:]:
                    request.close()
                del self.requests[MAX_PIPELINED:]
                # The client sends the others again over a new connection
                self.requests[-1].headers["CONNECTION"] = "close"
        return received

    @property
    def is_busy(self) -> bool:
        """Whether a request is being answered or its answer is not sent yet."""
        return bool(self.requests or self.total_outbufs_len)

    def is_overdue(self) -> bool:
        """Return whether the client takes too long to send a request or to read an answer."""
        if self.requests and not self.total_outbufs_len:
            return False
        if self.request and self.request.is_overdue():
            return True
        idle_for: float = time.time() - self.last_activity
        return idle_for > CONNECTION_TIMEOUT

    def handle_write(self) -> None:
        # waitress does not wait for a thread that is sending: its loop would spin until the thread is done (which needs
        # the interpreter's lock for that), and a thread's 100 Continue may be sent twice
        with self.outbuf_lock:
            super().handle_write()

    def send(self, data: bytes, do_close: bool = True) -> int:
        if self.socket is None:  # the loop has closed it while a request's thread was about to send
            return 0
        # Only the loop, which is the main thread's, closes connections and changes the map of sockets
        sent: int = super().send(data, do_close and threading.current_thread() is threading.main_thread())
        return sent


# ======================================================================================================================
# 40 Server
#
# waitress with settings for chats, a loop that idle connections do not slow down, and a stop that lets chats finish.
# ======================================================================================================================


class SocketMap(dict[int, Any]):
    """waitress's map of its sockets by descriptor, with a loop.

    wasyncore.loop asks every socket at every turn what it waits for: beside 300 idle connections that made a lone chat
    a third dearer. Here a selector keeps the answers. A socket is asked again only after an event, and at every turn
    while a thread answers its request: nothing else changes what it waits for.
    """

    def __init__(self) -> None:
        super().__init__()
        self._selector = selectors.DefaultSelector()
        self._dirty: set[int] = set()  # descriptors to ask at the next turn

    def __setitem__(self, fd: int, entry: Any) -> None:
        super().__setitem__(fd, entry)
        self._dirty.add(fd)

    def __delitem__(self, fd: int) -> None:
        super().__delitem__(fd)
        self._wait_for(fd, 0)

    def poll_once(self, timeout: float) -> None:
        """Wait for events, no longer than so many seconds, and handle them."""
        for fd in list(self._dirty):
            self._update_interest(fd)
        for key, events in self._selector.select(timeout):
            self._dirty.add(key.fd)
            entry = self.get(key.fd)
            if entry and events & selectors.EVENT_READ:
                wasyncore.read(entry)
            elif entry:
                wasyncore.write(entry)

    def _update_interest(self, fd: int) -> None:
        entry = self.get(fd)
        if entry is None:  # closed
            self._dirty.discard(fd)
            return
        # Read before the rest: a thread takes its request off last, then wakes the loop
        is_in_thread = bool(getattr(entry, "requests", None))
        events = 0
        if entry.readable():
            events = selectors.EVENT_READ
        elif entry.writable():  # what waitress has to write, it writes before it reads more
            events = selectors.EVENT_WRITE
        self._wait_for(fd, events)
        if events and not is_in_thread:
            self._dirty.discard(fd)

    def _wait_for(self, fd: int, events: int) -> None:
        key = self._selector.get_map().get(fd)
        if key and key.events != events:
            self._selector.unregister(fd)
            key = None
        if events and not key:
            self._selector.register(fd, events)


class Server:
    """waitress, bound to its port; `run` serves until the first SIGTERM or SIGINT, then lets running chats finish.

    waitress has no graceful stop: its loop ends immediately and drops what is not sent (its issue 198), so the loop is
    run here. Raises OSError when it cannot listen, ValueError when the system allows too few connections.
    """

    def __init__(self, settings: Settings, app: bottle.Bottle, stopping: threading.Event) -> None:
        self._grace = settings.shutdown_grace
        self._stopping = stopping
        self._signalled = False
        self._next_check = 0.0  # for overdue connections
        self._sockets = SocketMap()
        self._connection_limit = connection_limit(settings.max_concurrent_chats)
        host = f"[{settings.api_host}]" if ":" in settings.api_host else settings.api_host
        waitress.create_server(
            app,
            map=self._sockets,
            listen=f"{host}:{settings.api_port}",
            ident="kimi2api",
            threads=settings.max_concurrent_chats + SPARE_THREADS,
            connection_limit=self._connection_limit,
            channel_request_lookahead=1,  # else a client that leaves is noticed only when something is sent
            max_request_body_size=settings.max_body_bytes + EXTRA_BODY_BYTES,
            recv_bytes=65536,
            outbuf_high_watermark=MAX_UNSENT_BYTES,
            clear_untrusted_proxy_headers=False,
        )
        self._listeners = [entry for entry in self._sockets.values() if isinstance(entry, BaseWSGIServer)]
        for listener in self._listeners:
            listener.channel_class = Channel
            listener.draining = False
            listener.adj.api_keys = settings.api_master_key
            listener.adj.max_wanted_body = settings.max_body_bytes
            listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # its connections inherit it
        self.port = int(self._listeners[0].effective_port)

    def handle_signals(self) -> None:
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which is nohup's
            signal.signal(signal.SIGHUP, self._on_signal)

    def run(self) -> None:
        while not self._signalled:
            self._poll_once()
        for listener in self._listeners:
            listener.draining = True
            # Its own close() would also close the pipe that wakes the loop
            wasyncore.dispatcher.close(listener)
        running = sum(channel.is_busy for channel in self._channels())
        log.info("stopping; running: %d, with %g s to finish; a second signal ends at once", running, self._grace)
        self._drain(self._grace)
        self._stopping.set()  # running chats end with an error, which takes a moment to be sent
        self._drain(2.0)
        for channel in self._channels():
            channel.handle_close()  # wakes a thread that waits for its client
        self._listeners[0].task_dispatcher.shutdown(timeout=1)  # all listeners have the same

    def _poll_once(self) -> None:
        self._sockets.poll_once(timeout=0.5)
        if len(self._sockets) >= self._connection_limit:
            # Clients that ask nothing, or do not read their answer, must not keep others out
            idle = [channel for channel in self._channels() if not channel.requests]
            if idle:
                min(idle, key=attrgetter("last_activity")).handle_close()
        if time.monotonic() >= self._next_check:
            self._next_check = time.monotonic() + 1
            for channel in self._channels():
                if channel.is_overdue():
                    channel.handle_close()

    def _channels(self) -> list[Channel]:
        return [entry for entry in self._sockets.values() if isinstance(entry, Channel)]

    def _drain(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._channels() and time.monotonic() < deadline:
            for channel in self._channels():
                if not channel.is_busy:
                    channel.handle_close()
            self._poll_once()

    def _on_signal(self, number: int, _: Any) -> None:
        if self._signalled:
            os._exit(128 + number)
        self._signalled = True
        self._listeners[0].pull_trigger()


def connection_limit(chats: int) -> int:
    """Return how many connections to keep open, and raise the system's limit of open files to four times as many.

    A connection takes up to two (waitress keeps a large body in a file), and its chat as many for the upstream. Raises
    ValueError when there are too few for the chats.
    """
    limit = MAX_CONNECTIONS + chats
    try:
        import resource
    except ImportError:  # Windows, whose select() takes 512 sockets
        limit = 500
    else:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        unlimited = resource.RLIM_INFINITY
        wanted = 4 * limit if hard == unlimited else min(4 * limit, hard)
        if soft != unlimited and soft < wanted:
            with suppress(OSError, ValueError):  # some systems allow less than they say
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                soft = wanted
        if soft != unlimited:
            limit = min(limit, soft // 4)
    if limit < chats + SPARE_THREADS:
        raise ValueError(
            f"the system allows {limit} connections (a quarter of ulimit -n), too few for MAX_CONCURRENT_CHATS={chats}")
    return limit


# ======================================================================================================================
# 41 Command line
#
# Flags, the greeting, --check, logging, and main().
# ======================================================================================================================


def parse_command_line(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags. Those of settings have the names of their settings, and are None where not given."""
    cli = argparse.ArgumentParser(
        "kimi2api", description="Kimi's web chat as an OpenAI-compatible API on localhost.", allow_abbrev=False,
        epilog="Every setting may also stand in the environment or in .env, under its flag's name in capitals with "
        "underscores (API_PORT). Flags go first, then the environment.")
    cli.add_argument("--demo", action="store_true", help="use a built-in stand-in for the web chat; needs no internet")
    cli.add_argument("--check", action="store_true", help="try the upstream step by step, say what is wrong, and exit")
    cli.add_argument("--version", action="version", version=f"kimi2api {__version__}")
    cli.add_argument("--env-file", metavar="PATH", help="read this file instead of .env")
    settings = cli.add_argument_group("settings")
    for f in Settings.table():
        text = f"{f.metadata['meaning']}. Default: {f.metadata['default'] or '(empty)'}"
        flag = f"--{f.name.replace('_', '-')}"
        settings.add_argument(flag, metavar="…", dest=f.name.upper(), help=text.replace("%", "%%"))
    return cli.parse_args(argv)


def greeting(settings: Settings, port: int, demo: bool) -> str:
    host = settings.api_host if is_loopback(settings.api_host) else "127.0.0.1"
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    keys = settings.api_master_key
    header = ""
    if keys:
        key = "${API_MASTER_KEY%%,*}" if len(keys) > 1 else "$API_MASTER_KEY"
        # A terminal belongs to whoever set the key; a log file must not have the key
        if sys.stdout and sys.stdout.isatty():
            key = keys[0].key
        elif keys[0].name:
            key = "YOUR_KEY"
        header = f' -H "Authorization: Bearer {key}"'
    return "\n".join([
        f"kimi2api {__version__} listens on {settings.api_host} port {port}; base URL for clients: {address}/v1",
        f"  key:      {'API_MASTER_KEY' if keys else 'none asked; only this machine may call'}",
        f"  upstream: {'the built-in demo' if demo else settings.upstream_url}",
        f"  try it:   curl {address}/v1/chat/completions{header} -H 'Content-Type: application/json'"
        " -d '{\"messages\": [{\"role\": \"user\", \"content\": \"Hello!\"}]}'",
        "  stop it:  Ctrl-C",
    ])


ADVICE = {  # what to do about an error of a check whose message does not say
    "upstream_unavailable": "Check the internet connection, HTTPS_PROXY and the address; if it is down, try later.",
    "upstream_timeout": "Try later, or raise REQUEST_TIMEOUT.",
    "upstream_rate_limited": "Wait some minutes before the next try.",
    "upstream_invalid_response": "Try later; if it stays so, look for a newer version of this program.",
    "upstream_refused": "Try later, and the same question in a browser; if that works, look for a newer version.",
}


def run_check(settings: Settings) -> int:
    """Test each upstream step by step and print each step with a tick or a cross. Return 0 if all succeeded, else 1."""
    failed = 0
    for provider in Providers(settings, Metrics()).by_name.values():
        print(f"{provider.name}:")
        for step, error in provider.check():
            print(f"  {'✗' if error else '✓'} {step}", flush=True)
            if error:
                failed = 1
                advice = ADVICE.get(error.code or "", "")
                print(f"    {error} [{error.code}]\n    {advice}".rstrip(), flush=True)
    return failed


class LogFormatter(logging.Formatter):
    """Replaces control characters, so that foreign text cannot forge lines of the log."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return CONTROL_CHARACTERS.sub(" ", super().formatMessage(record))[:2000]


def start_logging(level: str) -> None:
    """Log our messages from this level on, and errors of other libraries."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.ERROR, handlers=[handler])
    logging.raiseExceptions = False  # no traceback when stderr cannot be written
    log.setLevel(level)


def refuse_start(reason: str) -> int:
    print(f"kimi2api: {reason}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """Run the program. Return its exit status: 0 after a stop, 1 if a check failed, 2 if the start was refused."""
    for stream in (sys.stdout, sys.stderr):
        if stream:  # None if it was closed at the start
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a console that has no ✓ must not stop us
    options = parse_command_line(argv)
    try:
        env_file = read_env_file(options.env_file or ".env", required=bool(options.env_file))
        settings = Settings.load(vars(options), os.environ, env_file)
        start_logging(settings.log_level.upper())
        if options.demo:
            origin = DemoUpstream.start()
            settings = replace(settings, upstream_url=f"{origin}/ajax", chat_page_url=f"{origin}/chat/")
        if not options.check:
            return serve(settings, options.demo)
        try:
            return run_check(settings)
        except OSError:  # stdout is closed
            os._exit(1)  # a normal exit would print a traceback for the unwritten rest
    except SettingError as error:
        return refuse_start(str(error))
    except KeyboardInterrupt:
        return 130


def serve(settings: Settings, demo: bool) -> int:
    """Serve until a signal ends the process. Return 2 if the server cannot listen; raises SettingError."""
    settings.check_host()
    stopping = threading.Event()
    app = create_app(settings, stopping)
    try:
        server = Server(settings, app, stopping)
    except (OSError, ValueError) as error:  # the port is in use, or the host has no address
        return refuse_start(f"cannot listen on {settings.api_host} port {settings.api_port}: {error}")
    server.handle_signals()
    with suppress(OSError):  # stdout may be closed
        print(greeting(settings, server.port, demo), flush=True)
    gc.freeze()
    gc.set_threshold(50_000)  # new objects; the default of 700 collects several times a chat (10 % of the time)
    server.run()
    logging.shutdown()
    os._exit(0)  # a normal exit would wait for abandoned upstream calls


# ======================================================================================================================
# 42 Description
#
# The OpenAPI description of the routes.
# ======================================================================================================================


def constant(value: str) -> Schema:
    return {"type": "string", "const": value}


def named_object(name: str, required: Schema, optional: Schema | None = None) -> Schema:
    """What OpenAI's objects are like: the field `object` says which it is."""
    return object_of({"object": constant(name), **required}, optional)


FINISH_REASON = choice_of("stop", "length", "tool_calls", "content_filter", "function_call")
OR_NULL_STRING = any_of(STRING, NULL)
USAGE = object_of({"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT})
ANSWERED_CALL = object_of({
    "id": STRING,
    "type": constant("function"),
    "function": object_of({"name": STRING, "arguments": STRING}),
})
ANSWERED_MESSAGE = object_of(
    {"role": constant("assistant"), "content": OR_NULL_STRING, "refusal": OR_NULL_STRING},
    {"tool_calls": array(ANSWERED_CALL)},
)
COMPLETION_CHOICE = object_of({
    "index": COUNT,
    "finish_reason": FINISH_REASON,
    "logprobs": any_of(OBJECT, NULL),
    "message": ANSWERED_MESSAGE,
})
ERROR = object_of({"message": STRING, "type": STRING, "param": OR_NULL_STRING, "code": OR_NULL_STRING})
FAILING = object_of({}, {"failing_since": INTEGER, "reason": STRING})
COUNTED = dict.fromkeys(("requests", "prompt_tokens", "completion_tokens", "total_tokens"), COUNT)
COMPLETION_HEAD = {"id": STRING, "created": INTEGER, "model": STRING}
SESSION_HEAD = {"user": STRING, "created": INTEGER, "last_used": INTEGER}
SCHEMAS: dict[str, Schema] = {
    "Request": CHAT_REQUEST,
    "Message": MESSAGE,
    "Completion": named_object("chat.completion", {
        **COMPLETION_HEAD,
        "choices": array(COMPLETION_CHOICE),
        "usage": USAGE,
    }),
    "Chunk": named_object(
        "chat.completion.chunk",
        {
            **COMPLETION_HEAD,
            "choices": array(object_of({
                "index": COUNT, "delta": OBJECT, "finish_reason": any_of(FINISH_REASON, NULL),
            })),
        },
        {"usage": any_of(USAGE, NULL)},
    ),
    "CompletionRequest": COMPLETION_REQUEST,
    "TextCompletion": named_object("text_completion", {
        **COMPLETION_HEAD,
        "choices": array(object_of({
            "text": STRING, "index": COUNT, "logprobs": NULL, "finish_reason": any_of(FINISH_REASON, NULL),
        })),
        "usage": USAGE,
    }),
    "ResponsesRequest": RESPONSES_REQUEST,
    "Response": named_object("response", {
        "id": STRING,
        "created_at": INTEGER,
        "status": choice_of("completed", "incomplete"),
        "incomplete_details": any_of(object_of({"reason": choice_of("max_output_tokens", "content_filter")}), NULL),
        "error": NULL,
        "model": STRING,
        "output": array(object_of({"type": STRING, "id": STRING})),
        "usage": object_of({
            "input_tokens": COUNT,
            "input_tokens_details": object_of({"cached_tokens": COUNT}),
            "output_tokens": COUNT,
            "output_tokens_details": object_of({"reasoning_tokens": COUNT}),
            "total_tokens": COUNT,
        }),
    }),
    "DeletedResponse": named_object("response", {"id": STRING, "deleted": BOOLEAN}),
    "EmbeddingsRequest": EMBEDDINGS_REQUEST,
    "Embeddings": named_object("list", {"data": array(OBJECT), "model": STRING, "usage": OBJECT}),
    "Model": named_object("model", {"id": STRING, "created": INTEGER, "owned_by": STRING}),
    "Models": named_object("list", {"data": array({"$ref": "#/components/schemas/Model"})}),
    "Session": named_object("session", {
        **SESSION_HEAD,
        "expires_at": INTEGER,
        "turns": array(array({"$ref": "#/components/schemas/Message"})),
    }),
    "Sessions": named_object("list", {"data": array(named_object("session", {**SESSION_HEAD, "turns": COUNT}))}),
    "Usage": named_object("usage", {
        "key": OR_NULL_STRING,
        "limits": object_of({"requests_per_minute": COUNT, "tokens_per_day": COUNT}),
        "today": object_of({"date": STRING, **COUNTED}),
        "days": array(object_of({
            "date": STRING, **COUNTED, "models": {"type": "object", "additionalProperties": object_of(COUNTED)},
        })),
    }),
    "Deleted": named_object("session.deleted", {"user": STRING, "deleted": BOOLEAN}),
    "Health": object_of({
        "status": choice_of("ok", "degraded"),
        "version": STRING,
        "uptime_seconds": COUNT,
        "key_required": BOOLEAN,
        "chats": object_of({"running": COUNT, "limit": COUNT}),
        "sessions": object_of({"kept": any_of(COUNT, NULL), "limit": COUNT}),
        "store": object_of({"kind": choice_of("memory", "sqlite", "redis"), "ok": BOOLEAN}),
        "upstreams": {"type": "object", "additionalProperties": FAILING},
    }),
    "OpenAPI": OBJECT,
    "Error": object_of({"error": ERROR}),
}


def content_of(schema: str) -> JSONObject:
    """Of a body: in JSON, by the name of its schema, or a text of this type."""
    if "/" in schema:
        return {schema: {"schema": STRING}}
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


def operation(route: Route) -> JSONObject:
    """A route's description."""
    answer = content_of(route.answer)
    if route.event:
        event = object_of({"data": {**STRING, "description": route.event}}, description="each event of the stream")
        answer["text/event-stream"] = {"schema": event}
    described: JSONObject = {
        "summary": route.summary,
        "responses": {
            "200": {"description": route.summary, "content": answer},
            "default": {"description": "an error", "content": content_of("Error")},
        },
    }
    parameter = re.search(r"<(\w+)", route.rule)
    if parameter:
        described["parameters"] = [{"name": parameter[1], "in": "path", "required": True, "schema": STRING}]
    if route.request:
        described["requestBody"] = {"required": True, "content": content_of(route.request)}
    if route.rule in OPEN_PATHS:
        described["security"] = []
    return described


def openapi(key_required: bool) -> JSONObject:
    """The OpenAPI 3.1 description of the server."""
    paths: dict[str, JSONObject] = {}
    for route in ROUTES:
        path = re.sub(r"<(\w+).*?>", r"{\1}", route.rule)
        paths.setdefault(path, {})[route.method.lower()] = operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "kimi2api", "version": __version__, "license": {"name": "Apache-2.0"}},
        "security": [{"key": []}] if key_required else [],
        "components": {"schemas": SCHEMAS, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "paths": paths,
    }


# ======================================================================================================================
# 43 Page
#
# The page at / and /docs, which needs nothing from the internet.
# ======================================================================================================================

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>kimi2api</title><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>:root { color-scheme: light dark } * { box-sizing: border-box } h1 { margin: 0 } h2 { margin: 2rem 0 .6rem }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: auto; padding: 1rem; overflow-wrap: anywhere }
.ok, svg { color: light-dark(#176f30, #57c773) } .degraded, .error { color: light-dark(#b3261e, #ff8f85) }
input, select, textarea, button, dialog { font: inherit; padding: .4rem .7rem; border: 1px solid #888;
border-radius: 6px } ::placeholder { color: inherit; opacity: .7 }
label:not([hidden]) { display: block; margin: .6rem 0 } input, select, textarea { width: 100%; resize: vertical }
#chat, pre, .scroll { max-height: 60vh; overflow: auto } .user, pre { background: #8882 }
#chat > div, pre { margin: .6rem 0; padding: .4rem .7rem; border-radius: 6px } #chat { white-space: pre-wrap }
details, tr { border-top: 1px solid #8886 } details, td, th { padding: .4rem 0 } summary { cursor: pointer }
details button { display: block; margin-left: auto } details button, td button { padding: 0 .6rem; white-space: nowrap }
.assistant > :last-child:empty::before { content: '…' } [aria-disabled=true] { opacity: .5 }
.soft, th { font-size: .8em }
table, meter, svg { width: 100% } table { border-collapse: collapse } th { text-align: start; word-break: keep-all }
td { font-size: .95em } td:first-child { width: 50% } td + td, th + th { padding-left: .8rem; overflow-wrap: normal }
.scroll td:first-child { min-width: 4rem } #server bdi { overflow-wrap: anywhere }
bdi { display: block; overflow: hidden }
svg { height: 7rem; border-bottom: 1px solid; fill: currentcolor; stroke: currentcolor }
path { vector-effect: non-scaling-stroke } path + path { fill-opacity: .2 }</style>
<main><h1>kimi2api</h1><div id="status" role="status"><noscript>This page needs JavaScript.</noscript></div>
<label id="lock" hidden>API key <input id="key" type="password" autocomplete="off"></label>
<h2>Server</h2><table><tbody id="server"></table><h2>Usage</h2><section id="usage"><p role="status"></p><div hidden>
<table><tbody id="today"></table><p id="legend" class="soft"></p>
<svg id="chart" aria-hidden="true" viewBox="0 0 310 100" preserveAspectRatio="none"><path /><path /></svg>
<details><summary>Days (UTC)</summary><div class="scroll" tabindex="0"><table><thead><tr><th>Day<th>Requests
<th>Prompt tokens<th>Completion tokens<tbody id="daily"></table></div></details>
<div class="scroll"><table><thead><tr><th>Model, today<th>Requests<th>Prompt tokens<th>Completion tokens
<tbody id="models"></table></div></div></section>
<h2>Sessions</h2><section id="sessions" tabindex="-1"><p role="status"></p><div class="scroll" hidden><table>
<thead><tr><th>User<th>Last used<th>Turns<th><tbody id="users"></table></div></section>
<dialog id="sure" aria-labelledby="sure"><p>Forget this session?</p><bdi></bdi><p class="error" role="alert"></p>
<button>Keep</button> <button>Forget</button></dialog><h2>Try it</h2>
<label>Model <select id="model"></select></label><label>Question <textarea id="question" rows="3">
</textarea></label><button id="send">Send</button> <button id="stop" aria-disabled="true">Stop</button>
<div id="chat" role="log" tabindex="0"></div>
<h2>Connect</h2><section id="connect"></section>
<h2>API</h2><a href="openapi.json">/openapi.json</a><table><tbody id="api"></table></main>
<script type="module">
const [status, lock, key, server, usage, today, legend, chart, daily, models, sessions, users, sure, model, question,
  send, stop, chat, connect, api] = document.querySelectorAll('[id]');
const language = navigator.languages[0]?.startsWith('zh') ? 'zh-CN' : 'en', words = language === 'en' ? {} : {
  ok: '正常', degraded: '异常', 'API key': 'API 密钥', Server: '服务器', 'Sessions kept: #': '保留的会话：#',
  'Up: # h # min': '已运行 # 小时 # 分', 'Chats running: #': '进行中的对话：#', 'Store: #': '存储：#',
  'no answer': '无响应', 'failing since #: ': '自 # 起异常：', Usage: '用量', 'Requests today: #': '今日请求：#',
  'Tokens today: #': '今日 token：#', ' of #': '，上限 #', ', most in a day: #': '，单日最多：#',
  'Days (UTC)': '每日明细（UTC）', 'Limit of requests per minute: #': '每分钟请求上限：#',
  'Tokens per day since #, at most #: ■ prompt □ completion': '自 # 起每日 token，单日最多 #：■ 输入 □ 输出',
  Day: '日期', 'Model, today': '今日模型', Requests: '请求', 'Prompt tokens': '输入 token',
  'Completion tokens': '输出 token', None: '无', Sessions: '会话', User: '用户', 'Last used': '最近使用', Turns: '轮次',
  'The last used # of #': '最近使用的 #，共 #', 'Forget this session?': '忘记这个会话？', Keep: '保留', Forget: '忘记',
  'Try it': '试一试', Model: '模型', Question: '问题', 'Ctrl+Enter or ⌘+Enter sends': '按 Ctrl+Enter 或 ⌘+Enter 发送',
  'You: #': '我：#', Send: '发送', Stop: '停止', Conversation: '对话', Connect: '接入', Copy: '复制', Copied: '已复制',
  Stopped: '已停止', 'This needs the right API key.': '需要正确的 API 密钥。',
  'The server cannot be reached.': '无法连接服务器。', 'The answer is empty.': '回答为空。',
  'The answer broke off.': '回答中断了。'};
const turns = [], examples = {}, near = {block: 'nearest'};
let running = null, locked = null;  // what aborts the running chat; whether a key is asked for, null while unknown
let forgotten = 0;  // sessions, so that a list asked for before is not shown after
let refused = '', timer = 0;  // the key that was wrong, which is not tried again; until the next look at the server
const format = value => typeof value === 'number' ? value.toLocaleString(language) : value;
const say = (text, ...values) => (words[text] ?? text).replace(/#/g, () => format(values.shift()));
const secret = () => key.value.replace(/[^!-~]/g, '');  // no key has anything else in it
const clip = text => text.length > 48 ? [...text.slice(0, 96)].slice(0, 48).join('') + '…' : text;
const time = seconds => new Date(seconds * 1000).toLocaleString(language, {dateStyle: 'short', timeStyle: 'short'});
const make = (tag, parent, textContent, className = '') =>  // the only way texts get in, so that they are never HTML
  parent.appendChild(Object.assign(document.createElement(tag), {textContent, className}));
function update(element, properties) {  // but for those that are so already: a text made anew loses its selection
  for (const name in properties) if (element[name] !== properties[name]) element[name] = properties[name];
}
function fill(body, rows) {  // rows: [key, ...cells]; one that stays is not made anew, so that it keeps the focus
  if (!rows.length) rows = [['', say('None')]];
  for (const row of [...body.rows]) if (!rows.some(([key]) => key === row.key)) row.remove();
  rows.forEach(([key, ...cells], index) => {
    if (body.rows[index]?.key !== key) body.insertRow(index).key = key;
    cells.forEach((cell, column) => {  // a text, a number, or properties of an element
      const {tag = 'bdi', ...properties} = cell.tag ? cell : {textContent: format(cell)};
      const place = body.rows[index].cells[column] ?? body.rows[index].insertCell();
      update(place.firstChild ?? make(tag, place), properties);
    });
  });
  while (body.rows.length > rows.length) body.lastChild.remove();
}
function bar(name, value, limit, most) {  // of a limit, in yellow when little is left of it, or of the most in a day
  const text = say(name, value) + (limit ? say(' of #', limit) : say(', most in a day: #', most));
  const max = limit || most || 1, high = limit ? limit * .8 : max;
  return [name, text, {tag: 'meter', ariaLabel: text, max, high, value}];
}
function fold(title) {  // a <details> with a text to copy; returns the element of the text
  const details = make('details', connect);
  make('code', make('summary', details), title);
  const button = make('button', details, say('Copy')), pre = make('pre', details);
  button.onclick = () => {
    getSelection().selectAllChildren(pre);
    if (document.execCommand('copy')) button.textContent = say('Copied');  // plain http has no navigator.clipboard
  };
  pre.tabIndex = 0;  // so that the keyboard can scroll it
  return pre;
}
function fail({message, code}) { throw Object.assign(Error(message + (code ? ` (${code})` : '')), {code}); }
async function call(path, options) {  // the answer's JSON, or the body of what was sent with a method
  const headers = {'Content-Type': 'application/json'};
  if (secret() && path.startsWith('v1/')) headers.Authorization = 'Bearer ' + secret();
  const gone = () => fail({message: say('The server cannot be reached.')});
  const answer = await fetch(path, {headers, signal: AbortSignal.timeout(6000), ...options}).catch(gone);
  if (!answer.ok) fail((await answer.json().catch(() => ({}))).error ?? {message: `HTTP status ${answer.status}`});
  return options?.method ? answer.body : answer.json().catch(gone);
}
async function watch() {
  if (!document.hidden) await refresh().catch(({message}) => {
    update(status, {textContent: message, className: 'degraded'});
    fill(server, [['', message]]);  // rather than what was
    [locked, refused] = [null, ''];
  });
  clearTimeout(timer);  // of another watch that has ended meanwhile
  timer = setTimeout(watch, 5000);
}
async function refresh() {
  const now = await call('health');
  update(status, {textContent: say(now.status), className: now.status});
  fillServer(now);
  const isNew = locked !== now.key_required;
  if (isNew) { lock.hidden = !(locked = now.key_required); fillApi(); }
  await Promise.all([show(usage, 'v1/usage', fillUsage), show(sessions, 'v1/sessions', fillSessions),
    (isNew || !model.value) && fillModels()]);
}
async function see(path) {  // what the key may see, or an error; nothing when that has changed meanwhile
  const tried = secret(), before = forgotten, isHopeless = ['', refused].includes(tried);
  const answer = locked && isHopeless ? {code: 'invalid_api_key'} : await call(path).catch(error => error);
  if (tried !== secret() || before !== forgotten) return;
  if (answer.code === 'invalid_api_key') [refused, answer.message] = [tried, say('This needs the right API key.')];
  return answer;
}
async function show(section, path, fillIn) {  // an answer, or one line why there is none
  const [problem, body] = section.children, answer = await see(path);
  if (!answer) return;
  update(problem, {textContent: answer.message ?? ''});
  body.hidden = 'message' in answer;
  if (!body.hidden) fillIn(answer);
}
function fillServer({chats: {running, limit}, sessions: {kept}, uptime_seconds: up, upstreams, store}) {
  const age = say('Up: # h # min', Math.floor(up / 3600), Math.floor(up / 60) % 60);
  const stored = [say('Store: #', store.kind), store.ok ? {} : {reason: say('no answer')}];
  const rows = [...Object.entries(upstreams), stored].map(([name, {failing_since: since, reason}]) => [name, name, {
    tag: 'bdi', className: reason ? 'error' : 'ok',
    textContent: (since ? say('failing since #: ', time(since)) : '') + (reason ?? say('ok'))}]);
  fill(server, [[0, say('Sessions kept: #', kept ?? '?'), age],
    bar('Chats running: #', running, limit), ...rows]);
}
function fillUsage({limits: {requests_per_minute: perMinute, tokens_per_day: perDay}, days}) {
  const last = days.at(-1), most = Math.max(...days.map(day => day.total_tokens));
  const rows = [bar('Requests today: #', last.requests, 0, Math.max(...days.map(day => day.requests))),
    bar('Tokens today: #', last.total_tokens, perDay, most)];
  fill(today, perMinute ? [...rows, ['', say('Limit of requests per minute: #', perMinute)]] : rows);
  update(legend,
    {textContent: say('Tokens per day since #, at most #: ■ prompt □ completion', days[0].date, most)});
  drawDays(days, most);
  const count = (name, {requests, prompt_tokens, completion_tokens}) =>
    [name, clip(name), requests, prompt_tokens, completion_tokens];
  fill(daily, days.toReversed().map(day => count(day.date.slice(5), day)));
  const byTokens = ([, a], [, b]) => b.total_tokens - a.total_tokens;
  fill(models, Object.entries(last.models).sort(byTokens).map(entry => count(...entry)));
}
function drawDays(days, most) {
  const shapes = ['', ''];
  days.forEach(({prompt_tokens, completion_tokens}, day) => {
    let y = 99.5;
    [prompt_tokens, completion_tokens].forEach((tokens, kind) => {
      const height = tokens && Math.max(2, 97 * tokens / most);  // a little is seen beside a huge day, too
      if (height) shapes[kind] += `M${day * 10 + 1},${y}h8v-${height}h-8z`;
      y -= height;
    });
  });
  shapes.forEach((shape, kind) => chart.children[kind].setAttribute('d', shape));
}
function fillSessions({data}) {  // the last used, which stand last, in an order that a chat does not change
  const shown = data.slice(-100).sort((a, b) => b.created - a.created || (a.user < b.user ? -1 : 1));
  const rows = shown.map(({user, last_used, turns}) => [user, clip(user), time(last_used), turns,
    {tag: 'button', textContent: say('Forget'), ariaLabel: `${say('Forget')} ${clip(user)}`,
      onclick: ({target}) => forget(user, target.closest('tr'))}]);
  if (data.length > 100) rows.push(['', say('The last used # of #', 100, data.length)]);
  fill(users, rows);
}
function forget(user, row) {
  const [, name, problem, keep, certain] = sure.children;
  [name.textContent, problem.textContent] = [clip(user), ''];
  keep.onclick = () => sure.close(); sure.row = row;
  certain.onclick = async () => {
    try {
      await call('v1/sessions/' + encodeURIComponent(user), {method: 'DELETE'});
    } catch ({message}) { return sure.row === row && update(problem, {textContent: message}); }
    const next = row.nextSibling ?? row.previousSibling;
    forgotten++;
    row.remove(); watch();
    if (!sure.open || sure.row !== row) return;  // closed meanwhile, and perhaps open for another
    sure.close();
    (next?.querySelector('button') ?? sessions).focus();
  };
  sure.showModal();
}
async function fillModels() {
  const answer = await see('v1/models'), chosen = model.value;
  if (!answer) return;
  const {data = [{id: '', message: answer.message}]} = answer;
  model.replaceChildren(...data.map(({id, message = id}) => new Option(message, id, false, id === chosen)));
  fillConnect();
}
function fillConnect() {
  const base = new URL('v1', location).href, bearer = locked ? 'YOUR_KEY' : 'none', id = model.value || 'kimi';
  const name = JSON.stringify(id), quoted = name.replaceAll("'", "'\\\\''");
  const hello = '[{"role": "user", "content": "Hello!"}]', texts = {
    curl: `curl ${base}/chat/completions -H 'Authorization: Bearer ${bearer}' -H 'Content-Type: application/json' -d '
{"model": ${quoted}, "messages": ${hello}}'`, 'openai-python': `from openai import OpenAI
client = OpenAI(base_url="${base}", api_key="${bearer}")
print(client.chat.completions.create(model=${name}, messages=${hello}).choices[0].message.content)`,
    'openai-node': `import OpenAI from "openai";
const client = new OpenAI({baseURL: "${base}", apiKey: "${bearer}"});
const stream = await client.chat.completions.create({model: ${name}, stream: true, messages: ${hello}});
for await (const chunk of stream) process.stdout.write(chunk.choices[0]?.delta?.content ?? "");`,
    LangChain: `from langchain_openai import ChatOpenAI
print(ChatOpenAI(base_url="${base}", api_key="${bearer}", model=${name}).invoke("Hello!").content)`,
    'chat UIs': `Key ${bearer}, model ${id}, and as base URL in
Open WebUI (Settings, Connections, OpenAI API): ${base}
Cherry Studio (Settings, Model Provider) and NextChat (Settings, Custom Endpoint): ${base.slice(0, -3)}`};
  for (const title in texts) (examples[title] ??= fold(title)).textContent = texts[title];
}
async function fillApi() {
  const {paths, message} = await call('openapi.json').catch(error => error);
  fill(api, paths ? Object.entries(paths).flatMap(([path, item]) => Object.entries(item).map(([method, {summary}]) =>
    [method + path, `${method.toUpperCase()} ${path}`, summary])) : [['', message]]);
}
async function ask() {
  const asked = {role: 'user', content: question.value.trim()};
  if (running || !asked.content) return;
  const body = JSON.stringify({model: model.value || undefined, stream: true, messages: [...turns, asked]});
  make('div', chat, say('You: #', asked.content), 'user').scrollIntoView(near);
  const box = make('div', chat, '', 'assistant'), thought = make('div', box, '', 'soft'), text = make('div', box);
  [running, send.ariaDisabled, stop.ariaDisabled, question.value] = [new AbortController(), true, false, ''];
  try {
    const stream = await call('v1/chat/completions', {method: 'POST', body, signal: running.signal});
    const reader = stream.pipeThrough(new TextDecoderStream()).getReader(); let complete = false;
    for (let read, rest = ''; !(read = await reader.read().catch(() => ({done: true}))).done;) {
      const lines = (rest + read.value).split('\\n'), far = chat.scrollHeight - chat.scrollTop - chat.clientHeight;
      rest = lines.pop();  // the beginning of a line
      for (const data of lines.filter(line => line.startsWith('data:')).map(line => line.slice(5).trim())) {
        if (complete ||= data === '[DONE]') break;
        const {error, choices} = JSON.parse(data), delta = choices?.[0]?.delta ?? {}; if (error) fail(error);
        thought.append(delta.reasoning_content ?? '');  // not made anew: a screen reader would say it all again
        text.append(delta.content ?? '');
      }
      if (far < 60) chat.scrollTop = chat.scrollHeight;  // follow, unless the reader has scrolled up
    }
    if (!complete) throw Error(say('The answer broke off.'));
    if (!text.textContent) throw Error(say('The answer is empty.'));
  } catch ({message}) {
    make('div', chat, running.signal.aborted ? say('Stopped') : message, 'error').scrollIntoView(near);
  }
  const content = text.textContent;
  if (content) turns.push(asked, {role: 'assistant', content}); else { box.remove(); question.value ||= asked.content; }
  [running, send.ariaDisabled, stop.ariaDisabled] = [null, false, true];
}
send.onclick = ask; stop.onclick = () => running?.abort(); model.onchange = fillConnect;
question.onkeydown = event => { if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) ask(); };
key.onchange = () => { watch(); sessionStorage.kimi2apiKey = key.value; };
document.documentElement.lang = language;
question.placeholder = say('Ctrl+Enter or ⌘+Enter sends');
chat.ariaLabel = say('Conversation');
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let text; (text = texts.nextNode());) update(text, {data: words[text.data.trim()] ?? text.data});
document.onvisibilitychange = watch; watch();
key.value = sessionStorage.kimi2apiKey ?? '';  // at last: a browser that keeps nothing may throw here</script>"""


def page_headers() -> dict[str, str]:
    """A content security policy: only the page's own script and style, and requests to this server."""
    hashes = {}
    for tag in ("style", "script"):
        text = re.search(rf"<{tag}[^>]*>(.*?)</{tag}>", PAGE, re.S)
        hashes[tag] = b64encode(sha256(text[1].encode()).digest()).decode() if text else ""
    policy = (f"default-src 'none'; style-src 'sha256-{hashes['style']}'; script-src 'sha256-{hashes['script']}'; "
              "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    return {"Content-Type": "text/html; charset=utf-8", "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": policy}


if __name__ == "__main__":
    sys.exit(main())
