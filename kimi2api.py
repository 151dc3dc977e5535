#!/usr/bin/env python3
"""kimi2api: one OpenAI-compatible server for Kimi's web chat, official APIs and servers of your own.

    python kimi2api.py                 # listens on http://127.0.0.1:8088/v1
    python kimi2api.py --demo          # uses a built-in stand-in for the web chat; needs no internet
    python kimi2api.py --check         # tests each upstream step by step, and reports what fails

    curl http://127.0.0.1:8088/v1/chat/completions -H 'Content-Type: application/json' \\
         -d '{"messages": [{"role": "user", "content": "Hello!"}]}'

How a chat flows: Application checks the caller and the request (Protocol), prepends the session (Storage) and asks a
provider (Upstreams), which yields deltas. A format (Protocol, Responses API) writes the deltas as JSON or events. One
chat runs on one thread. `App._complete` lists the stages in order.

Contents. Each part uses only the parts above it. Application and Server also use the appendices.

    1 Settings        setting types; Settings, from flags, environment and .env
    2 Protocol        errors and JSON; schemas; chat requests; deltas and their fold; tokens; chat completion format
    3 Responses API   items, requests and format
    4 Storage         stores: memory, SQLite, Redis; sessions; limits and usage; metrics
    5 HTTP client     connections and deadlines; transport; scraper; cached fetches
    6 Upstreams       circuit breaker; providers; Kimi's web chat; OpenAI-style APIs; models and fallback
    7 Application     access; clients; chats; the App; routes
    8 Server          client connections; the server and its graceful stop; command line
    Appendices        demo upstream; OpenAPI description; page
"""
from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # PID 1 of a container ignores signals without a handler, and the imports below are slow
    signal.signal(signal.SIGTERM, lambda signum, _: os._exit(128 + signum))

import argparse
import errno
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
import shutil
import socket
import ssl
import struct
import sys
import threading
import time
from base64 import b64decode, b64encode
from codecs import BOM_UTF8
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import Field, astuple, dataclass, field, fields, replace
from email.utils import parsedate_to_datetime
from functools import cache, cached_property, lru_cache, partial
from hashlib import sha256
from html import unescape
from http.client import HTTPException, HTTPResponse, IncompleteRead, parse_headers
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import ceil, inf, isfinite
from operator import attrgetter, itemgetter
from traceback import clear_frames
from typing import Any, Generic, NamedTuple, NoReturn, TypeGuard, TypeVar
from urllib.parse import parse_qsl, unquote, urlencode, urljoin, urlsplit, urlunsplit

import bottle
import cloudscraper
import requests
import waitress
from requests.adapters import HTTPAdapter
from requests.cookies import extract_cookies_to_jar, get_cookie_header
from requests.utils import select_proxy
from urllib3 import Timeout
from urllib3.exceptions import DecodeError, HTTPError
from waitress import wasyncore
from waitress.buffers import OverflowableBuffer
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.server import BaseWSGIServer
from waitress.task import ErrorTask, WSGITask
from waitress.utilities import InternalServerError

__version__ = "1.0.0"

log = logging.getLogger("kimi2api")
T = TypeVar("T")
JSONObject = dict[str, Any]
Headers = Mapping[str, str]
Message = JSONObject  # of a conversation, in OpenAI's format
Turn = tuple[Message, ...]  # a user's message and all messages before the next user's message
Turns = tuple[Turn, ...]


########################################################################################################################
# Part 1: Settings
#
# One table defines all settings: for the environment, `.env`, flags, `--help` and the README. Settings are checked when
# they are loaded, so the rest of the program can trust them.
########################################################################################################################


# ----------------------------------------------------------------------------------------------------------------------
# Setting types
#
# Parsers of setting values, each with a description for error messages.
# ----------------------------------------------------------------------------------------------------------------------


class SettingError(Exception):
    """An invalid setting, or settings that contradict each other. The program does not start."""


@dataclass(frozen=True)
class SettingType:
    """A parser of setting values, with a description of what it accepts."""

    accepts: str
    parse: Callable[[str], Any]  # raises ValueError


def number(
    low: float,
    high: float,
    parse: Callable[[str], float] = float,
    name: str = "a number",
) -> SettingType:
    def parse_within(text: str) -> float:
        value = parse(text)
        if not low <= value <= high:  # also refuses NaN
            raise ValueError
        return value

    return SettingType(f"{name} from {low:g} to {high:g}", parse_within)


integer = partial(number, parse=int, name="a whole number")


def matching(pattern: str, accepts: str) -> SettingType:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError
        return text

    return SettingType(accepts, parse)


def split_commas(text: str) -> list[str]:
    return list(filter(None, map(str.strip, text.split(","))))


def match_entries(pattern: str, text: str) -> Iterator[re.Match[str]]:
    """Yield a match for each entry of a comma-separated list. Raises ValueError."""
    for entry in split_commas(text):
        found = re.fullmatch(pattern, entry, re.A)
        if not found:
            raise ValueError
        yield found


def comma_separated(pattern: str, accepts: str) -> SettingType:
    def parse(text: str) -> tuple[str, ...]:
        return tuple(found[0] for found in match_entries(pattern, text))

    return SettingType(f"a comma-separated list of {accepts}", parse)


def parse_model_table(text: str) -> dict[str, str]:
    table = {}
    for found in match_entries(r"([^=]*[^=\s])\s*=\s*(\S.*)", text):
        table[found[1]] = found[2]
    return {model: table.get(name, name) for model, name in table.items()}  # resolves aliases


@dataclass(frozen=True)
class ClientKey:
    """A client's API key. Usage and logs show the name, never the key."""

    key: str = ""  # empty: the server asks for no key
    name: str | None = None

    @cached_property
    def owner(self) -> str:
        """Return the hash of the key, under which sessions and counters are stored."""
        return sha256(self.key.encode()).hexdigest()[:32]


def parse_client_keys(text: str) -> tuple[ClientKey, ...]:
    # The pattern refuses a colon at the end: a name without a key must not become a key
    entries = match_entries(r"(?:([\w.-]+):)?([!-~]*[!-9;-~])", text)
    clients = dict.fromkeys(ClientKey(found[2], found[1]) for found in entries)
    if len({client.key for client in clients}) < len(clients):  # only the first name would have its limits
        raise SettingError("API_MASTER_KEY: the same key is listed under two names")
    return tuple(clients)


def parse_limits(text: str, low: int = 0, high: int = 10**15, default: int = 0) -> dict[str, int]:
    """Return limits by key name. The limit without a name has the name ""."""
    limits: dict[str, int] = {}
    for found in match_entries(r"(?:(\S.*?)\s*=\s*)?(\d+)", text):
        name = found[1] or ""
        limit = int(found[2])
        if name in limits or not low <= limit <= high:
            raise ValueError
        limits[name] = limit
    return {"": default, **limits}


def parse_url(text: str, schemes: tuple[str, str] = ("http", "https")) -> str:
    parts = urlsplit(text)
    if parts.scheme not in schemes or not parts.hostname or parts.port == 0:
        raise ValueError
    return text


def without_credentials(url: str) -> str:
    """Return a URL without its user and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def parse_store(text: str) -> str:
    if text == "memory" or re.fullmatch(r"sqlite:[^\0]+", text):
        return text
    return parse_url(text, ("redis", "rediss"))


TEXT = SettingType("any text", str)
URL = SettingType("an http:// or https:// address", parse_url)
ASCII_KEY = matching("[!-~]*", "printable ASCII without spaces")
LIMITS = SettingType(
    "a whole number, and name=number for named keys, separated by commas",
    parse_limits)


# ----------------------------------------------------------------------------------------------------------------------
# Settings
#
# The table of settings, the addresses of this machine, and .env files.
# ----------------------------------------------------------------------------------------------------------------------

WEB_CHAT = "kimi"  # name of the web chat's provider
PRESETS = "moonshot", "deepseek", "qianfan"  # APIs that need no entry in PROVIDERS


def setting(default: str, meaning: str, setting_type: SettingType = TEXT) -> Any:
    return field(metadata={"default": default, "meaning": meaning, "type": setting_type})


@dataclass(frozen=True)
class API:
    """An OpenAI-style API: its name, its address and this server's key for it."""

    name: str
    base_url: str
    key: str


@dataclass(frozen=True)
class Settings:
    """All settings, parsed. The name of a setting is the name of its field in capitals."""

    # Who may call

    api_master_key: tuple[ClientKey, ...] = setting(
        "",
        "keys that clients send as `Authorization: Bearer …`, separated by commas, with names or without: "
        "`ann:sk-…,sk-…`. Empty: no key is asked, and only this machine may call",
        SettingType(
            "a comma-separated list of keys in printable ASCII without spaces, or of name:key",
            parse_client_keys))
    api_host: str = setting(
        "127.0.0.1",
        "address to listen on; one that is not loopback needs a key",
        SettingType("a host name or an address", lambda text: text.strip("[]")))
    api_port: int = setting(
        "8088",
        "port to listen on; 0 takes a free one",
        integer(0, 65535))
    cors_origins: tuple[str, ...] = setting(
        "",
        "origins of web pages that may call, separated by commas. Empty: any when a key is set, else those of this "
        "machine",
        comma_separated(
            r"\*|null|[a-z][a-z0-9.+-]*://(?:\*\.)?(?:[a-z0-9._-]+|\[[0-9a-f:]+\])(?!:443$|:80$)(?::\d{1,5})?",
            "origins as browsers send them, such as https://app.example, https://*.example.com, or null"))

    # Models and upstreams

    models: dict[str, str] = setting(
        "kimi=moonshotai/Kimi-K2-Instruct-0905,kimi-k2-instruct-0905=moonshotai/Kimi-K2-Instruct-0905,"
        "kimi-k2-instruct=moonshotai/Kimi-K2-Instruct",
        "`id=upstream name`, separated by commas; an entry `*=…` accepts any model id",
        SettingType("`id=upstream name`, separated by commas", parse_model_table))
    default_model: str = setting("kimi", "model of a request that names none")
    fallback_models: tuple[str, ...] = setting(
        "",
        "models to ask, in this order, when the model asked for cannot answer, separated by commas",
        comma_separated(r"\S+", "model ids"))
    moonshot_api_key: str = setting(
        "",
        "key of Moonshot's own API; its models are then `moonshot/…`",
        ASCII_KEY)
    moonshot_base_url: str = setting(
        "https://api.moonshot.ai/v1",
        "the Chinese site's is `https://api.moonshot.cn/v1`",
        URL)
    deepseek_api_key: str = setting(
        "",
        "key of DeepSeek's API; its models are then `deepseek/…`",
        ASCII_KEY)
    deepseek_base_url: str = setting("https://api.deepseek.com/v1", "base URL of DeepSeek's API", URL)
    qianfan_api_key: str = setting(
        "",
        "key of Baidu's Qianfan; its models are then `qianfan/…`",
        ASCII_KEY)
    qianfan_base_url: str = setting("https://qianfan.baidubce.com/v2", "base URL of Qianfan", URL)
    providers: tuple[str, ...] = setting(
        "",
        "more OpenAI-style APIs, by names of your choice, separated by commas; for `local`, set `LOCAL_BASE_URL` and, "
        "if it asks for one, `LOCAL_API_KEY`",
        comma_separated("(?!kimi$)[a-z][a-z0-9_]*", "names in lower-case letters, digits and _, without kimi"))

    # Sessions

    session_store: str = setting(
        "memory",
        "where sessions, stored responses and usage are kept: `memory`, `sqlite:PATH`, or `redis://…`, "
        "`rediss://…` (extra `redis`)",
        SettingType("memory, sqlite:PATH, redis://HOST:PORT or rediss://HOST:PORT", parse_store))
    session_cache_ttl: float = setting(
        "3600",
        "seconds a session lives after its last turn",
        number(1, 1e9))
    max_session_size: int = setting(
        "1000",
        "sessions kept for each key, and as many stored responses; the least recently used goes first",
        integer(1, 10**9))

    # Limits

    max_concurrent_chats: dict[str, int] = setting(
        "64",
        "chats running at once; one more is answered 429. `64,ann=4` also bounds a named key",
        SettingType(
            "a whole number from 1 to 4096, and name=number for named keys, separated by commas",
            partial(parse_limits, low=1, high=4096, default=64)))
    requests_per_minute: dict[str, int] = setting(
        "0",
        "chats per key and minute, 0: no limit; `20,ann=60,bob=0` gives named keys their own",
        LIMITS)
    tokens_per_day: dict[str, int] = setting(
        "0",
        "tokens per key and day (UTC), 0: no limit; in the same form",
        LIMITS)
    max_body_bytes: int = setting("4194304", "largest request body", integer(1, 2**30))

    # Fine tuning

    request_timeout: float = setting(
        "60",
        "seconds one upstream attempt may take",
        number(0.1, 86400))
    max_retries: int = setting(
        "3",
        "further attempts after a failure that is safe to retry",
        integer(0, 100))
    stream_interval_ms: float = setting(
        "20",
        "pause between pieces when an answer that arrived whole is replayed as a stream; 0: no pauses",
        number(0, 1000))
    stream_max_seconds: float = setting(
        "2",
        "a replay never takes longer than this: pieces grow instead",
        number(0, 3600))
    sse_keepalive: float = setting(
        "10",
        "seconds of silence before a keep-alive comment",
        number(0.05, 3600))
    shutdown_grace: float = setting(
        "30",
        "seconds that running chats get after SIGTERM or Ctrl-C",
        number(0, 86400))
    log_level: str = setting(
        "INFO",
        "DEBUG, INFO, WARNING or ERROR",
        matching("(?i:DEBUG|INFO|WARNING|ERROR)", "DEBUG, INFO, WARNING or ERROR"))
    context_max_length: int = setting(
        "1000",
        "characters the web chat takes in one message",
        integer(1, 10**9))
    upstream_url: str = setting(
        "https://kimi-ai.chat/wp-admin/admin-ajax.php",
        "the web chat's endpoint",
        URL)
    chat_page_url: str = setting(
        "https://kimi-ai.chat/chat/",
        "the page that carries the nonce",
        URL)

    # Derived from other settings

    apis: Mapping[str, API] = field(default_factory=dict)  # by name

    @classmethod
    def load(cls, *sources: Mapping[str, str | None]) -> Settings:
        """Load settings from mappings of names in capitals to text. The first mapping with a value wins.

        A blank value counts as not set, because `${NAME:-}` in a compose file sets an empty value.
        Raises SettingError with one line that names the setting, the value and what is accepted.
        """
        def parsed(name: str, setting_type: SettingType, default: str = "") -> Any:
            text = default
            for source in reversed(sources):
                text = (source.get(name) or "").strip() or text
            try:
                return setting_type.parse(text)
            except ValueError:
                shown = repr(text) if text else "an empty value"
                if name.endswith("_KEY") or "@" in text:  # an address may contain a password
                    shown = "the value"
                raise SettingError(f"{name}: {shown} is not {setting_type.accepts}") from None

        values = {}
        for f in cls.table():
            values[f.name] = parsed(f.name.upper(), f.metadata["type"], f.metadata["default"])
        apis = {}
        for name in (*PRESETS, *values["providers"]):
            key = parsed(f"{name}_api_key".upper(), ASCII_KEY)
            if key or name in values["providers"]:
                base_url = values.get(f"{name}_base_url") or parsed(f"{name}_base_url".upper(), URL)
                apis[name] = API(name, base_url, key)
        for model in values["models"].values():
            name = model.partition("/")[0]
            if name in PRESETS and name not in apis:  # otherwise the chat would go to the web chat
                raise SettingError(f"MODELS: {model!r} needs {name.upper()}_API_KEY")
        settings = cls(**values, apis=apis)
        settings._check_models("DEFAULT_MODEL", [settings.default_model])
        settings._check_models("FALLBACK_MODELS", settings.fallback_models)
        names = {"", *(client.name for client in settings.api_master_key)}
        for setting_name in ("max_concurrent_chats", "requests_per_minute", "tokens_per_day"):
            for name in values[setting_name].keys() - names:
                raise SettingError(f"{setting_name.upper()}: {name!r} is not the name of a key in API_MASTER_KEY")
        return settings

    @classmethod
    def table(cls) -> list[Field[Any]]:
        return [f for f in fields(cls) if f.metadata]

    def resolve(self, model: str) -> tuple[str, str] | None:
        """Return (provider, upstream model) for a model id, or None if no provider serves it."""
        name = self.models.get(model)
        prefix, _, own_name = (name or model).partition("/")
        if prefix in self.apis and own_name:
            return prefix, own_name
        if name:
            return WEB_CHAT, name
        return None if model == "*" else self.resolve("*")

    def _check_models(self, setting_name: str, models: Iterable[str]) -> None:
        for model in models:
            if self.resolve(model) is None:
                raise SettingError(
                    f"{setting_name}: {model!r} is neither in MODELS ({', '.join(self.models)}) nor a model of a "
                    f"configured API ({', '.join(self.apis) or 'none'})")


def is_loopback(host: str | None) -> bool:
    """Return whether a host name or address means this machine only."""
    host = (host or "").strip("[]").rstrip(".").lower()
    # RFC 6761: all names in the domain localhost mean this machine
    if re.fullmatch(r"(.*\.)?localhost", host):
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("::ffff:")).is_loopback  # also of IPv4 in an IPv6 socket
    except ValueError:
        return False


# One of the last three groups has the value
ENV_LINE = re.compile(r"""
    \s* (?:export\s+)? (?P<name>\w+) \s*=\s*
    (?: "([^"]*)" | '([^']*)' | (?P<bare>.*?) )
    \s* (?:(?<=\s)\#.*)? $""", re.X)


def read_env_file(path: str, required: bool) -> dict[str, str]:
    """Read the `NAME=value` lines of a .env file, which may have `export`, quotes, blank lines and # comments."""
    values = {}
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for line_number, line in enumerate(lines, 1):
                entry = ENV_LINE.match(line)
                if entry:
                    if entry["bare"] and entry["bare"][0] in "\"'":
                        raise SettingError(f"{path}: line {line_number}: the quotes of {entry['name']} do not match")
                    values[entry["name"]] = entry[entry.lastindex or 0]
    except (OSError, UnicodeDecodeError) as error:
        is_reachable = os.access(os.curdir, os.X_OK)
        if required or (is_reachable and not isinstance(error, FileNotFoundError)):
            raise SettingError(f"{path}: cannot be read: {error}") from None
    return values


########################################################################################################################
# Part 2: Protocol
#
# Chat completions, as clients, this program and upstreams exchange them. Pure functions and records: no I/O, no
# threads, no log, and no clock except for ids and times of creation.
########################################################################################################################


# ----------------------------------------------------------------------------------------------------------------------
# Errors and JSON
#
# Every expected failure is an APIError, and only `body()` gives it OpenAI's shape. JSON is parsed strictly and written
# as UTF-8. Upstreams' JSON is repaired before it is parsed.
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class APIError(Exception):
    """An error for the caller, in the terms of OpenAI's API.

    An error is immutable by convention, because several threads may raise one error: `copy` returns a changed copy.
    Store only copies: the traceback of a raised error keeps local variables alive, even requests of megabytes.
    """

    status: int
    message: str
    type: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    headers: Headers = field(default_factory=dict)
    retryable: bool = False  # repeating the call is safe, and may succeed a moment later
    retry_after: float = 0.0  # seconds that the upstream requires before a retry, or 0
    quotes_upstream: bool = False  # the message quotes the upstream, which may quote the prompt

    def __str__(self) -> str:
        return self.message

    def copy(self, **changes: Any) -> APIError:
        """Return a copy with some fields changed, and without the traceback."""
        return replace(self, **changes)

    def with_headers(self, headers: Headers) -> APIError:
        return self.copy(headers={**self.headers, **headers})

    @property
    def reason(self) -> str:
        """Describe the error for the log and /health, without the prompt."""
        code = self.code or self.type
        if not self.quotes_upstream:
            return f"{code} ({self.status}): {self.message}"
        if not re.fullmatch(r"[\w.-]{1,64}", code):  # the code may quote the prompt too
            code = "error"
        return f"{code} ({self.status})"

    @property
    def may_fall_back(self) -> bool:
        """Return whether another upstream may succeed: this upstream failed or refused, or its context is too short."""
        if self.code == "context_length_exceeded":
            return True
        return self.status >= 500 or self.status in (402, 403, 429)

    def body(self) -> JSONObject:
        return {"error": {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }}


NO_SDK_RETRY = {"x-should-retry": "false"}  # obeyed by OpenAI's SDKs


def bad_request(message: str, param: str | None = None, code: str | None = None) -> APIError:
    return APIError(400, message, param=param, code=code)


def upstream_error(status: int, code: str, message: str, **more: Any) -> APIError:
    return APIError(status, message, "upstream_error", code, **more)


def invalid_response(upstream: str, what: str, retryable: bool = False) -> APIError:
    return upstream_error(502, "upstream_invalid_response", f"{upstream} sent {what}.", retryable=retryable)


def random_hex() -> str:
    """Return 32 hex digits for ids that need not be secret. uuid4() makes a system call, which releases the GIL."""
    return f"{random.getrandbits(128):032x}"


def parse_finite(text: str) -> float:
    """Parse a number. Raises ValueError for NaN and Infinity, which Python accepts in JSON, and for 1e999."""
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{text[:20]} is not a number in JSON")
    return value


STRICT_JSON = json.JSONDecoder(parse_constant=parse_finite, parse_float=parse_finite)
COMPACT_JSON = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":"))
JSON_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.S)  # or an unterminated string
SURROGATE_ESCAPE = re.compile(r"\\u[dD]")  # lone surrogates enter only as escapes
LINE_SEPARATORS = {  # some clients split events at these characters
    "\x85": "\\u0085",
    "\u2028": "\\u2028",
    "\u2029": "\\u2029",
}
# Escapes in JSON. `kept`: a backslash, or a surrogate pair. `high`: a high surrogate at the end of a string. `low`: a
# low surrogate at the beginning of a string. Without a name: any other surrogate
SURROGATES = re.compile(r"""
    (?P<kept> \\\\ | \\u(?i:d[89ab][0-9a-f]{2}) \\u(?i:d[c-f][0-9a-f]{2}) )
    | (?P<high> \\u(?i:d[89ab][0-9a-f]{2}) (?=") )
    | (?P<low> (?<=") \\u(?i:d[c-f][0-9a-f]{2}) )
    | \\u(?i:d[89a-f][0-9a-f]{2})
    """, re.X)

MAX_DEPTH = 300  # levels of JSON, so that recursive functions can process the value
# Values in one JSON document: 4 MB of brackets would become 90 MB of objects. OpenAI embeds up to 300,000 tokens
MAX_VALUES = 350_000
MAX_HIGH_SURROGATES = 100  # of one stream, which wait for their low surrogates


def parse_json(source: str, max_values: int = MAX_VALUES) -> Any:
    """Parse strict JSON. Raises ValueError, also for more than `max_values` values or MAX_DEPTH levels."""
    brackets = sum(map(source.count, "{["))
    if brackets + source.count(",") > max_values:  # some may be inside strings
        outside = JSON_STRING.sub("", source)
        if sum(map(outside.count, "{[,")) > max_values:
            raise ValueError("too many values")
    try:
        value = STRICT_JSON.decode(source)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if brackets > MAX_DEPTH:
        check_depth(value)
    return value


def check_depth(value: Any, max_depth: int = MAX_DEPTH) -> None:
    """Raise ValueError for a value that is nested deeper than `max_depth` levels."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        if max_depth == 0:
            raise ValueError("nested too deep")
        for inner in value:
            check_depth(inner, max_depth - 1)


def parse_upstream_object(
    data: bytes, max_values: int = MAX_VALUES, high_surrogates: list[str] | None = None,
) -> JSONObject | None:
    """Parse an upstream's JSON object, or a list of one. Return None for anything else.

    U+FFFD replaces lone surrogates, which cannot be encoded as UTF-8.
    high_surrogates: those whose low surrogates may be in a later document of the stream.
    """
    source = data.removeprefix(BOM_UTF8).decode("utf-8", "replace")
    if SURROGATE_ESCAPE.search(source):
        source = SURROGATES.sub(partial(replace_surrogate, high_surrogates), source)
    try:
        value = parse_json(source, max_values)
        if isinstance(value, list):
            [value] = value  # Gemini's errors
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def replace_surrogate(high_surrogates: list[str] | None, found: re.Match[str]) -> str:
    """Return the replacement for a match of SURROGATES. A high surrogate at the end of a string moves to the next
    string that begins with a low surrogate."""
    if found["high"] and high_surrogates is not None:
        high_surrogates.append(found["high"])
        del high_surrogates[:-MAX_HIGH_SURROGATES]
        return ""
    if found["low"] and high_surrogates:
        return high_surrogates.pop() + found["low"]
    return found["kept"] or r"\ufffd"


def dump_json(value: Any) -> bytes:
    text = COMPACT_JSON.encode(value)
    if not text.isascii():
        for separator, escape in LINE_SEPARATORS.items():
            text = text.replace(separator, escape)
    return text.encode()


def without(fields: JSONObject, *names: str) -> JSONObject:
    """Return an object without these fields."""
    return {name: value for name, value in fields.items() if name not in names}


def only(fields: JSONObject, names: Iterable[str]) -> JSONObject:
    """Return an object with the fields of these names that it has."""
    return {name: fields[name] for name in names if name in fields}


def replace_lone_surrogates(text: str) -> str:
    """Replace lone surrogates, which cannot be encoded as UTF-8, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


MARKUP = re.compile(r"<[!/]?[a-zA-Z][\w-]*(?:\s[^<>]*)?/?>")
CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


def plain_line(answer: Any, secret: str = "") -> str:
    """Convert an upstream's message (a string, an object or None) to one line of at most 300 characters, without HTML
    and without `secret`."""
    if isinstance(answer, dict):
        answer = answer.get("message") or answer.get("error") or answer.get("code") or answer
    if not isinstance(answer, str):
        answer = json.dumps(answer, ensure_ascii=False) if answer else ""
    text = unescape(MARKUP.sub(" ", answer[:10_000]))
    line = " ".join(CONTROL_CHARACTERS.sub(" ", text).split())
    if secret:
        pattern = re.escape(secret)
        if len(secret) < 8:  # a placeholder such as LOCAL_API_KEY=x is part of many words
            pattern = rf"(?<!\w){pattern}(?!\w)"
        line = re.sub(pattern, "…", line)
    return replace_lone_surrogates(line[:300]) or "(no reason given)"


# ----------------------------------------------------------------------------------------------------------------------
# Schemas
#
# The part of JSON Schema that requests and answers need: functions that build schemas, and a search for violations.
# ----------------------------------------------------------------------------------------------------------------------

Schema = JSONObject
STRING = {"type": "string"}
NON_EMPTY = {"type": "string", "minLength": 1}
NUMBER = {"type": "number"}
INTEGER = {"type": "integer"}
BOOLEAN = {"type": "boolean"}
OBJECT = {"type": "object"}
NULL = {"type": "null"}
COUNT = {"type": "integer", "minimum": 0}
POSITIVE = {"type": "integer", "minimum": 1}


def array(items: Schema, **bounds: int) -> Schema:
    return {"type": "array", "items": items, **bounds}


def any_of(*options: Schema) -> Schema:
    return {"anyOf": list(options)}


def choice_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def object_of(fields: Schema) -> Schema:
    return {"type": "object", "properties": fields, "required": sorted(fields)}


def request_object(required: Schema, optional: Schema | None = None, **more: Any) -> Schema:
    """Return the schema of a request object. Optional fields also accept null, as on OpenAI's server."""
    nullable = {name: any_of(schema, NULL) for name, schema in (optional or {}).items()}
    return {**object_of(required), "properties": {**required, **nullable}, **more}


def if_field(name: str, values: list[Any], then: Schema) -> Schema:
    """Return if/then keywords: if field `name` is one of `values`, the object must also match `then`.

    None among the values also matches an absent field.
    """
    condition: Schema = {"properties": {name: {"enum": values}}}
    if None not in values:
        condition["required"] = [name]
    return {"if": condition, "then": then}


def request_object_by_type(
    records: Mapping[str, Schema], default: str | None = None, allow_others: bool = False,
) -> Schema:
    """Return the schema of a request object whose `type` decides its fields.

    default: the type of an object without one; allow_others: objects of other types may have any fields.
    """
    types = {"type": STRING if allow_others else choice_of(*records)}
    rules = []
    for name, then in records.items():
        rules.append(if_field("type", [name, None] if name == default else [name], then))
    if default:
        return request_object({}, types, allOf=rules)
    return request_object(types, allOf=rules)


BOUNDS = {  # keywords, and their descriptions
    "minimum": "of at least {}",
    "minItems": "of at least {} items",
    "minLength": "that is not empty",
    "maxItems": "of at most {} items",
    "maxLength": "of at most {} characters",
    "maxProperties": "of at most {} fields",
    "propertyNames": "with names of at most {0[maxLength]} characters",
}
TYPES: dict[str, tuple[Any, str]] = {
    "object": (dict, "an object"),
    "array": (list, "a list"),
    "string": (str, "a string"),
    "boolean": (bool, "true or false"),
    "integer": (int, "a whole number"),
    "number": ((int, float), "a number"),
    "null": (type(None), "null"),
}


class Violation(NamedTuple):
    """The path of a value that breaks its schema, such as messages[0].role, and the schema."""

    path: str
    schema: Schema


def find_violation(value: Any, schema: Schema, path: str = "") -> Violation | None:
    """Return the first violation of a JSON schema by a value, or None."""
    return next(violations(value, schema, path), None)


def violations(value: Any, schema: Schema, path: str) -> Iterator[Violation]:
    """Yield the violations of a JSON schema. Supports only the keywords that the schemas here use.

    For anyOf, yield the violation with the longest path, which most likely belongs to the intended option.
    """
    if "anyOf" in schema:
        deepest = Violation(path, schema)
        for option in schema["anyOf"]:
            violation = find_violation(value, option, path)
            if violation is None:
                return
            if len(violation.path) > len(deepest.path):
                deepest = violation
        yield deepest
    elif not is_within_bounds(value, schema):
        yield Violation(path, schema)
    elif isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            yield from violations(item, schema["items"], f"{path}[{index}]")
    elif isinstance(value, dict):
        prefix = f"{path}." if path else ""
        known = schema.get("properties", {})
        for name in schema.get("required", ()):
            if name not in value:
                yield Violation(prefix + name, known[name])
        for name, inner in value.items():
            field_schema = known.get(name) or schema.get("additionalProperties")
            if field_schema:
                yield from violations(inner, field_schema, prefix + name)
        for rule in schema.get("allOf", ()):
            [(name, condition)] = rule["if"]["properties"].items()
            if value.get(name) in condition["enum"]:  # no recursion: 100,000 items have 2,000,000 rules
                yield from violations(value, rule["then"], path)


def is_within_bounds(value: Any, schema: Schema) -> bool:
    """Return whether a value matches the schema's type, enum and bounds. Values inside the value are not checked."""
    if "type" in schema and not is_of_type(value, schema["type"]):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    for keyword, bound in schema.items():
        if keyword.startswith("min") and value_size(value) < bound:
            return False
        if keyword.startswith("max") and value_size(value) > bound:
            return False
    if "propertyNames" in schema:
        return max(map(len, value), default=0) <= schema["propertyNames"]["maxLength"]
    return True


def is_of_type(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"  # bool is a subclass of int
    if name == "integer" and isinstance(value, float):
        return value.is_integer()  # 1.0 is an integer in JSON Schema
    return isinstance(value, TYPES[name][0])


def value_size(value: Any) -> float:
    return value if isinstance(value, (int, float)) else len(value)


def describe(schema: Schema) -> str:
    """Describe in words what a value must be."""
    if "anyOf" in schema:
        return " or ".join(describe(option) for option in schema["anyOf"] if option is not NULL)
    if "enum" in schema:
        return " or ".join(str(value or json.dumps(value)) for value in schema["enum"])
    words = TYPES[schema["type"]][1]
    for keyword, bound in BOUNDS.items():
        if keyword in schema:
            words += f" {bound.format(schema[keyword])}"
    return words


# ----------------------------------------------------------------------------------------------------------------------
# Chat requests
#
# Schemas check requests and appear in /openapi.json. Code checks rules that compare two fields. A message stays the
# dict that the client sent, and each upstream refuses what it does not support. OpenAI's reference of chat completions
# explains the fields.
# ----------------------------------------------------------------------------------------------------------------------

TEXT_PART = request_object({"text": STRING})
CONTENT_PART = request_object_by_type({"text": TEXT_PART}, allow_others=True)
CALLED_FUNCTION = request_object({"name": STRING, "arguments": STRING})
TOOL_CALL = request_object({"function": CALLED_FUNCTION}, {"id": STRING})
MESSAGE = request_object(
    {"role": choice_of("system", "developer", "user", "assistant", "tool", "function")},
    {
        "content": any_of(STRING, array(CONTENT_PART)),
        "tool_calls": array(TOOL_CALL),
        "tool_call_id": STRING,
    },
    # Instead of content, an assistant's message may have tool calls, and a system message may have tools (Kimi)
    allOf=[if_field(
        "role",
        ["developer", "user", "tool", "function"],
        request_object({"content": any_of(STRING, array(OBJECT))}),
    )],
)
FUNCTION = request_object({"name": NON_EMPTY}, {"description": STRING, "parameters": OBJECT})
TOOL = request_object_by_type({"function": request_object({"function": FUNCTION})}, allow_others=True)
NAMED_FUNCTION = request_object({"function": request_object({"name": STRING})})
NAMED_TOOL = request_object_by_type({"function": NAMED_FUNCTION}, default="function", allow_others=True)
ALLOWED_TOOLS = request_object({"mode": choice_of("auto", "required"), "tools": array(NAMED_TOOL)})
TOOL_CHOICE = request_object_by_type(
    {
        "function": NAMED_FUNCTION,
        "allowed_tools": request_object({"allowed_tools": ALLOWED_TOOLS}),
    },
    default="function",
    allow_others=True,
)
JSON_SCHEMA = request_object({"schema": OBJECT})
RESPONSE_FORMAT = request_object_by_type({
    "text": OBJECT,
    "json_object": OBJECT,
    "json_schema": request_object({"json_schema": JSON_SCHEMA}),
})
USER = {"type": "string", "maxLength": 512}  # the name of a session
COMMON_PARAMETERS = {  # of chats, legacy completions and responses
    "model": STRING,
    "user": USER,
    "stream": BOOLEAN,
    "temperature": NUMBER,
    "top_p": NUMBER,
    "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER,
}
SHARED_PARAMETERS = {  # of chats and legacy completions
    **COMMON_PARAMETERS,
    "stream_options": request_object({}, {"include_usage": BOOLEAN}),
    "stop": any_of(STRING, array(STRING, maxItems=1000)),  # a search each
    "max_tokens": INTEGER,
    "n": INTEGER,
    "seed": INTEGER,
    "logit_bias": OBJECT,
}
CHAT_REQUEST = request_object(
    {"messages": array(MESSAGE, minItems=1)},
    {
        **SHARED_PARAMETERS,
        "max_completion_tokens": INTEGER,
        "tools": array(TOOL),
        "tool_choice": any_of(choice_of("none", "auto", "required"), TOOL_CHOICE),
        "parallel_tool_calls": BOOLEAN,
        "response_format": RESPONSE_FORMAT,
        "logprobs": BOOLEAN,
        "modalities": array(STRING),
        "audio": OBJECT,
    },
)
COMPLETION_REQUEST = request_object(  # of the legacy completions API
    {"prompt": any_of(STRING, array(STRING, maxItems=1))},
    {
        **SHARED_PARAMETERS,
        "echo": {"enum": [False]},
        "suffix": {"enum": [""]},
        "best_of": {"enum": [1]},
        "logprobs": {"enum": [False]},
    },
)
EMBEDDINGS_REQUEST = request_object(
    {"input": any_of(NON_EMPTY, {"type": "array", "minItems": 1})},  # texts or tokens
    {
        "model": STRING,
        "user": USER,
        "encoding_format": choice_of("float", "base64"),
        "dimensions": POSITIVE,
    },
)


@dataclass(frozen=True)
class ChatRequest:
    """A checked request for a chat completion."""

    body: JSONObject  # includes unknown fields
    messages: list[Message]
    user: str | None
    stream: bool
    include_usage: bool
    stop: list[str]
    max_tokens: int | None
    tools: list[JSONObject]  # functions that `tools` and `tool_choice` let the model call
    must_call: bool  # the model must call one of the tools

    @classmethod
    def parse(cls, raw: bytes) -> ChatRequest:
        """Parse the body of a request. Raises APIError 400 with `param` naming the field."""
        return cls.of(parse_body(raw, CHAT_REQUEST))

    @classmethod
    def parse_completion(cls, raw: bytes) -> ChatRequest:
        """Parse a request for a legacy completion. The prompt becomes a user's message. Raises APIError 400."""
        body = parse_body(raw, COMPLETION_REQUEST)
        prompt = "".join(body["prompt"])  # a string, or a list of at most one string
        chat = only(body, SHARED_PARAMETERS)
        return cls.of({**chat, "messages": [{"role": "user", "content": prompt}]})

    @classmethod
    def of(cls, body: JSONObject) -> ChatRequest:
        stop = body.get("stop") or []
        if isinstance(stop, str):
            stop = [stop]
        return cls(
            body=body,
            messages=body["messages"],
            user=body.get("user"),
            stream=bool(body.get("stream")),
            include_usage=bool((body.get("stream_options") or {}).get("include_usage")),
            stop=list(filter(None, stop)),
            max_tokens=body.get("max_completion_tokens") or body.get("max_tokens"),
            tools=allowed_functions(body),
            must_call=must_call(body.get("tool_choice")),
        )

    @cached_property
    def turns(self) -> list[Turn]:
        """Group the messages, except system messages, into turns, which begin with users' messages."""
        turns: list[list[Message]] = []
        for message in itertools.filterfalse(is_system, self.messages):
            if message["role"] == "user" or not turns:
                turns.append([])
            turns[-1].append(message)
        return list(map(tuple, turns))

    @property
    def has_history(self) -> bool:
        return any(message["role"] == "assistant" for message in self.messages)


def parse_body(raw: bytes, schema: Schema) -> JSONObject:
    """Parse the body of a request. Raises APIError 400, also for lone surrogates, which UTF-8 cannot encode."""
    try:
        source = raw.removeprefix(BOM_UTF8).decode()
        body = parse_json(source)
        if SURROGATE_ESCAPE.search(source):
            dump_json(body)
    except ValueError as error:
        raise bad_request(f"The body is not valid JSON in UTF-8: {error}"[:300]) from None
    if not isinstance(body, dict):
        raise bad_request("The body must be a JSON object.")
    violation = find_violation(body, schema)
    if violation:
        raise bad_request(f"'{violation.path}' must be {describe(violation.schema)}.", violation.path)
    return body


def allowed_functions(body: JSONObject) -> list[JSONObject]:
    """Return the functions that `tool_choice` lets the model call. Raises APIError 400 if `tool_choice` requires a tool
    that is not in `tools`."""
    tools = body.get("tools")
    functions = [tool["function"] for tool in tools or () if tool["type"] == "function"]
    choice = body.get("tool_choice")
    if choice == "none":
        return []
    if isinstance(choice, dict):
        chosen = [choice]
        if choice.get("type") == "allowed_tools":
            chosen = choice["allowed_tools"]["tools"]
        names = {tool["function"]["name"] for tool in chosen if names_function(tool)}
        if not names:  # tools of other types
            return []
        tools = functions = [function for function in functions if function["name"] in names]
    if must_call(choice) and not tools:
        raise bad_request("'tool_choice' requires a tool that is not in 'tools'.", "tool_choice")
    return functions


def names_function(choice: Any) -> TypeGuard[JSONObject]:
    return isinstance(choice, dict) and choice.get("type") in (None, "function")


def must_call(choice: Any) -> bool:
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        choice = choice["allowed_tools"]["mode"]
    return choice not in (None, "none", "auto")


def append_turns(history: Iterable[Turn], turns: Iterable[Turn]) -> Turns:
    """Append turns to the history. A turn that does not begin with a user's message continues the turn of its tool
    call, or else the newest turn. The continued turn becomes the newest."""
    joined: list[Turn] = []
    callers: dict[Any, int] = {}  # indexes of turns by call id
    for turn in itertools.chain(history, turns):
        if joined and turn[0]["role"] != "user":
            index = callers.get(turn[0].get("tool_call_id") or "", -1)
            turn = joined[index] + turn
            joined[index] = ()
        for message in turn:
            for call in message.get("tool_calls") or ():
                callers[call.get("id") or None] = len(joined)
        joined.append(turn)
    return tuple(filter(None, joined))


def is_system(message: Message) -> bool:
    return message["role"] in ("system", "developer")


def message_text(message: Message) -> str:
    """Return the text of a message whose content is a string, a list of parts, or null."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


# ----------------------------------------------------------------------------------------------------------------------
# Deltas and their fold
#
# Every upstream's answer is a stream of deltas. A complete answer is the fold of the stream.
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Delta:
    """A piece of an answer: OpenAI's chat.completion.chunk without the fields that all chunks share."""

    chunk: JSONObject
    is_complete: bool = False  # a complete answer, which is replayed at a pace
    headers: Headers = field(default_factory=dict)  # of the response; only in the first delta

    @classmethod
    def of(cls, fields: JSONObject, finish_reason: str | None = None, is_complete: bool = False) -> Delta:
        choice = {"index": 0, "delta": fields, "logprobs": None, "finish_reason": finish_reason}
        return cls({"choices": [choice]}, is_complete)

    @property
    def is_final(self) -> bool:
        """Return whether the delta finishes a choice or has only the usage, and so may be the last."""
        choices = self.chunk["choices"]
        return not choices or any(choice["finish_reason"] for choice in choices)

    @property
    def has_content(self) -> bool:
        """Return whether the delta has anything except the role."""
        for choice in self.chunk["choices"]:
            if any(without(choice["delta"], "role").values()):
                return True
        return self.is_final


class IndexedList(dict[int, Any]):
    """A list whose entries have an `index`. Entries without one get indexes from NO_INDEX on."""


NO_INDEX = 1 << 32


# Fields that grow, by the name of the field that contains them: strings are joined, lists are extended. Every other
# field keeps its last value that is not empty
GROWING = {
    "": {"choices"},
    "delta": {
        "content",
        "content_parts",
        "reasoning_content",
        "reasoning",
        "reasoning_details",
        "refusal",
        "tool_calls",
        "annotations",
    },
    "function": {"arguments"},
    "function_call": {"arguments"},
    "custom": {"input"},
    "audio": {"data", "transcript"},
    "reasoning_details": {"text", "summary", "data"},
    "logprobs": {"content", "refusal"},
}


NO_VALUES: tuple[Any, ...] = (None, "", [])  # these do not replace an earlier value


def merge(whole: JSONObject, part: JSONObject, path: str = "") -> None:
    """Merge a part of an object into the parts before it. `plain_value` converts the result to JSON values.

    path: the name of the field that contains the object.
    """
    growing = GROWING.get(path, ())
    for name, value in part.items():
        if value in NO_VALUES:
            whole.setdefault(name, value)
        elif name in growing:
            whole[name] = extend_field(whole.get(name), value, name)
        elif type(value) is dict:
            known = whole.get(name)
            if type(known) is not dict:
                known = whole[name] = {}
            merge(known, value, name)
        else:
            whole[name] = value


def extend_field(known: Any, value: Any, name: str) -> Any:
    """Return a growing field with a value added. All additions together take linear time."""
    if isinstance(value, str):
        if not isinstance(known, io.StringIO):
            known = io.StringIO()  # a list of short strings would take many times the memory
        known.write(value)
        return known
    if not isinstance(value, list):
        return value
    if not isinstance(known, IndexedList):
        known = IndexedList()
    for entry in value:
        index = entry.get("index") if isinstance(entry, dict) else None
        if isinstance(index, int) and 0 <= index < NO_INDEX:
            merge(known.setdefault(index, {}), entry, name)
        else:
            known[NO_INDEX + len(known)] = entry
    return known


def plain_value(whole: Any) -> Any:
    """Convert the result of `merge` to plain JSON values."""
    if isinstance(whole, io.StringIO):
        return whole.getvalue()
    if isinstance(whole, IndexedList):
        return [plain_value(whole[index]) for index in sorted(whole)]
    if isinstance(whole, dict):
        return {name: plain_value(value) for name, value in whole.items()}
    return whole


class Fold:
    """The chunks of an answer, merged: for the JSON body, the session, the stored reasoning and estimates."""

    def __init__(self) -> None:
        self._whole: JSONObject = {"choices": IndexedList(), "usage": None}

    def add(self, chunk: JSONObject) -> None:
        merge(self._whole, chunk)

    @property
    def choices(self) -> IndexedList:
        return self._whole["choices"]

    @property
    def usage(self) -> Any:
        return self._whole["usage"]

    def replace_usage(self, usage: JSONObject) -> None:
        self._whole["usage"] = usage

    def completion(self) -> JSONObject:
        """Return all chunks merged into one chunk."""
        return plain_value(self._whole)

    def message(self) -> Message:
        """Return the message of the first choice."""
        return choice_message(self.choices.get(0, {"delta": {}}))

    def texts(self) -> Iterator[str]:
        """Yield the text that the model wrote in all choices, including its reasoning and its tool calls."""
        for choice in self.choices.values():
            delta = plain_value(choice["delta"])
            for name in ("content", "refusal"):
                yield delta.get(name) or ""
            yield reasoning_text(delta)
            for call in delta.get("tool_calls") or ():
                yield from (call.get("function") or call["custom"]).values()


# Fields of reasoning at DeepSeek and Moonshot; at vLLM, Ollama and Groq; at OpenRouter, besides `reasoning`
REASONING_FIELDS = ("reasoning_content", "reasoning", "reasoning_details")


def reasoning_fields(message: JSONObject) -> JSONObject:
    """Return the fields of a message or a delta that contain reasoning."""
    fields = {}
    for name in REASONING_FIELDS:
        if message.get(name) and isinstance(message[name], (str, list)):
            fields[name] = message[name]
    return fields


def reasoning_text(message: JSONObject) -> str:
    """Return the reasoning in a message or a delta. If several fields contain it, return the first."""
    for value in reasoning_fields(message).values():
        if isinstance(value, list):
            value = "".join(
                str(entry.get("text") or entry.get("summary") or "") for entry in value if isinstance(entry, dict))
        if value:
            return value
    return ""


def choice_message(choice: JSONObject) -> Message:
    """Convert the merged delta of a choice to a message."""
    message = {"role": "assistant", "content": None, "refusal": None, **plain_value(choice["delta"])}
    for call in message.get("tool_calls") or ():
        call.pop("index", None)  # only merging needs it
    return message


# ----------------------------------------------------------------------------------------------------------------------
# Tokens and pieces
#
# Estimates of token counts, and functions that split texts between graphemes.
# ----------------------------------------------------------------------------------------------------------------------

# Han, kana, Hangul and full-width forms
WIDE = "\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff"
NARROW_TEXT = re.compile(f"[^{WIDE}]+")
# Combining marks of Latin, Indic, Thai and kana, variation selectors, skin tones and tags
MARK = (
    "\u0300-\u036f\u0900-\u0903\u093a-\u094f\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff"
    "\u3099\u309a\ufe00-\ufe0f\U0001f3fb-\U0001f3ff\U000e0020-\U000e01ef"
)
# A flag of two letters, or a character with its marks and the characters joined to it, as in 👩‍🚀
GRAPHEME = re.compile(f"[\U0001f1e6-\U0001f1ff]{{2}}|.[{MARK}]*(?:\u200d.[{MARK}]*)*", re.S)
MAX_COUNT = 10**9  # tokens of one answer; sums of larger counts may not fit into the integers of stores
WIDE_TOKENS = 0.6  # per Chinese character, by DeepSeek's documentation
NARROW_TOKENS = 0.25  # per other character, by OpenAI's documentation


def estimate_tokens(text: str) -> int:
    """Estimate the number of tokens in a text."""
    return ceil(token_weight(text))


def token_weight(text: str) -> float:
    wide = 0 if text.isascii() else len(NARROW_TEXT.sub("", text))
    return wide * WIDE_TOKENS + (len(text) - wide) * NARROW_TOKENS


def usage_count(usage: Any, *path: str) -> int:
    """Return the count at a path in an upstream's usage, or 0 if the count is missing or impossible."""
    for name in path:
        usage = usage.get(name) if isinstance(usage, dict) else None
    return usage if type(usage) is int and 0 < usage <= MAX_COUNT else 0


def estimate_input(given: Any) -> int:
    """Estimate the tokens of the input for embeddings: texts, or numbers that are tokens."""
    if isinstance(given, list):
        return sum(map(estimate_input, given))
    return estimate_tokens(given) if isinstance(given, str) else 1


def truncate(text: str, stops: list[str], max_tokens: int | None) -> tuple[str, str]:
    """Cut a text at the first stop sequence and after `max_tokens` (estimated). Return the text and the finish
    reason."""
    ends = [text.find(stop) for stop in stops if stop in text]
    text = text[:min(ends, default=len(text))]
    if max_tokens is not None and estimate_tokens(text) > max_tokens:
        tokens = 0.0
        for grapheme in GRAPHEME.finditer(text):
            tokens += token_weight(grapheme[0])
            if tokens > max_tokens:
                return text[:grapheme.start()], "length"
    return text, "stop"


CODE_BLOCK = re.compile(r"\s*```[\w-]*(?![\w-])\n?(.*)```\s*", re.S)


def strip_code_fence(text: str) -> str:
    """Return the contents of a text that is one fenced block. Return any other text unchanged."""
    block = CODE_BLOCK.fullmatch(text)
    return block[1] if block else text


PIECE = re.compile(rf"\s*(?:(?:[{WIDE}][{MARK}]*){{1,2}}|[^\s{WIDE}]+|$)")


def pieces(text: str, max_pieces: int) -> Iterator[str]:
    """Split a text into at most `max_pieces` pieces: words, or one or two Chinese characters.

    No piece ends between a character and its marks, inside a joined emoji, or inside a flag.
    """
    start = 0
    size = len(text) / max_pieces
    for match in PIECE.finditer(text):
        end = match.end()
        if end > start and end - start >= size:
            yield text[start:end]
            start = end
    if start < len(text):
        yield text[start:]


def split_answer(delta: Delta, max_pieces: int) -> Iterator[Delta]:
    """Split a complete answer into deltas as OpenAI sends them: role, pieces of text, tool calls, finish reason."""
    choice = delta.chunk["choices"][0]
    message = choice["delta"]
    calls = message.pop("tool_calls", ())
    content = message["content"]
    if content is not None:
        message["content"] = ""
    finish_reason = choice["finish_reason"]
    choice["finish_reason"] = None
    yield delta
    for piece in pieces(content or "", max_pieces):
        yield Delta.of({"content": piece})
    if calls:
        yield Delta.of({"tool_calls": calls})
    yield Delta.of({}, finish_reason)


# ----------------------------------------------------------------------------------------------------------------------
# Chat completion format
#
# Deltas become OpenAI's JSON or server-sent events.
# ----------------------------------------------------------------------------------------------------------------------


class ChatCompletion:
    """A writer of one chat completion: all its chunks have the same id and time of creation.

    The fields follow CreateChatCompletionResponse and CreateChatCompletionStreamResponse in OpenAI's OpenAPI schema.
    """

    id_prefix = "chatcmpl"

    def __init__(self, include_usage: bool) -> None:
        self.headers: Headers = {}  # of the response; known from the first delta on
        self._head: JSONObject = {
            "id": f"{self.id_prefix}-{random_hex()}",
            "created": int(time.time()),
            "object": "chat.completion.chunk",
        }
        self._include_usage = include_usage

    def json(self, deltas: Iterable[Delta]) -> bytes:
        """Return the answer, which is one delta, as JSON."""
        [whole] = deltas
        self.headers = whole.headers
        completion = whole.chunk
        self._head["object"] = "chat.completion"
        for choice in completion["choices"]:
            choice["message"] = choice_message(choice)
            choice.setdefault("logprobs", None)
            del choice["delta"]
        return dump_json(self._with_head(completion))

    def events(self, deltas: Iterable[Delta]) -> Iterator[bytes]:
        """Yield server-sent events, and [DONE] at the end."""
        for delta in deltas:
            if delta.headers:
                self.headers = delta.headers
            if "model" in delta.chunk:
                self._head["model"] = delta.chunk["model"]
            chunk = self._with_head(delta.chunk)
            if self._include_usage:
                chunk.setdefault("usage", None)
            elif not chunk["choices"]:  # only the usage
                continue
            yield b"data: " + dump_json(chunk) + b"\n\n"
        yield b"data: [DONE]\n\n"

    def failure(self, error: APIError, sent: int) -> bytes:
        """Return the event that ends a stream. No [DONE] follows: a partial answer must not look complete."""
        return b"data: " + dump_json(error.body()) + b"\n\n"

    def _with_head(self, fields: JSONObject) -> JSONObject:
        """Add our fields: first for readers, and last to override the upstream's."""
        return {**self._head, **fields, **self._head}


class TextCompletion(ChatCompletion):
    """A writer of one legacy completion. The fields follow OpenAI's CreateCompletionResponse."""

    id_prefix = "cmpl"

    def _with_head(self, fields: JSONObject) -> JSONObject:
        choices = []
        for choice in fields["choices"]:
            message = choice.get("message") or choice["delta"]
            choices.append({
                "text": message.get("content") or "",
                "index": choice["index"],
                "logprobs": None,
                "finish_reason": choice["finish_reason"],
            })
        return {**super()._with_head(fields), "object": "text_completion", "choices": choices}


########################################################################################################################
# Part 3: Responses API
#
# Another format for chats: a request becomes a ChatRequest, and the deltas of the answer become a Response or its
# events. OpenAI's Responses reference explains the fields.
########################################################################################################################


# ----------------------------------------------------------------------------------------------------------------------
# Responses items
#
# The items of a conversation become the messages of a chat.
# ----------------------------------------------------------------------------------------------------------------------

INPUT_CONTENT = any_of(STRING, array(request_object_by_type(
    {
        "input_text": TEXT_PART,
        "output_text": TEXT_PART,
        "text": TEXT_PART,
        "refusal": request_object({"refusal": STRING}),
        "input_image": request_object({"image_url": NON_EMPTY}, {"detail": STRING}),
        "input_file": OBJECT,  # checked by the upstream
    },
    allow_others=True,
)))
FUNCTIONS = {
    "function": FUNCTION,
    "custom": FUNCTION,
    "tool_search": request_object({}, {"description": STRING, "parameters": OBJECT}),
}
NAMESPACE = request_object({
    "name": NON_EMPTY,
    "tools": array(request_object_by_type(FUNCTIONS, allow_others=True)),
})
RESPONSES_TOOLS = array(request_object_by_type({**FUNCTIONS, "namespace": NAMESPACE}, allow_others=True))
CALL_FIELDS = {"call_id": STRING, "id": STRING, "namespace": STRING}
CALL_OUTPUT = request_object({"output": INPUT_CONTENT}, CALL_FIELDS)
# Calls of tools that clients run, and the field that contains the arguments
CALLS = {
    "function_call": "arguments",
    "custom_tool_call": "input",
    "local_shell_call": "action",
    "shell_call": "action",
    "apply_patch_call": "operation",
    "tool_search_call": "arguments",
}
INPUT_ITEM = request_object_by_type(
    {
        "message": request_object({
            "role": choice_of("user", "assistant", "system", "developer"),
            "content": INPUT_CONTENT,
        }),
        "reasoning": request_object({}, {
            "summary": array(TEXT_PART),
            "content": array(TEXT_PART),
            "encrypted_content": STRING,
        }),
        **{kind: request_object({field: OBJECT}, CALL_FIELDS) for kind, field in CALLS.items()},
        **{f"{kind}_output": request_object({}, CALL_FIELDS) for kind in CALLS},
        "function_call": request_object({"name": NON_EMPTY, "arguments": STRING}, CALL_FIELDS),
        "function_call_output": CALL_OUTPUT,
        "custom_tool_call": request_object({"name": NON_EMPTY, "input": STRING}, CALL_FIELDS),
        "custom_tool_call_output": CALL_OUTPUT,
        "additional_tools": request_object({"tools": RESPONSES_TOOLS}),
        "tool_search_output": request_object({"tools": RESPONSES_TOOLS}, CALL_FIELDS),
        "compaction": request_object({}, {"encrypted_content": STRING}),
        "item_reference": request_object({"id": STRING}),
    },
    default="message",
    allow_others=True,
)
SUMMARY_PREFIX = "This conversation was compacted. Its summary:\n\n"


@dataclass(frozen=True)
class ToolName:
    """A tool's name for the client, and `function`, its name for upstreams, which get all tools as functions."""

    name: str
    namespace: str | None = None
    kind: str = "function"

    @property
    def function(self) -> str:
        return f"{self.namespace}__{self.name}" if self.namespace else self.name


def flat_tools(tools: Iterable[JSONObject], namespace: str | None = None) -> Iterator[tuple[ToolName, JSONObject]]:
    """Yield each tool with its name. Replace namespaces by their tools."""
    for tool in tools:
        kind = tool["type"]
        if kind == "namespace" and namespace is None:
            yield from flat_tools(tool["tools"], tool["name"])
        else:
            yield ToolName(str(tool.get("name") or kind), namespace, kind), tool


def function_name(item: JSONObject) -> str:
    """Return the function name of the tool in an item or a choice."""
    return ToolName(item["name"], item.get("namespace")).function


class ItemReader:
    """A converter of a conversation's items to messages. Skips items that only other servers support, so that a
    conversation with another server can continue here."""

    def __init__(self) -> None:
        self.ignored: set[str] = set()  # types of items, parts and tools
        self.tools: list[JSONObject] = []  # among the items
        self.compacts = False  # the answer is a summary of the conversation
        self._last_call_id = ""

    def read(self, items: Iterable[JSONObject]) -> list[Message]:
        """Convert items to messages."""
        messages: list[Message] = []
        converted = filter(None, map(self._as_message, items))
        for role, group in itertools.groupby(converted, itemgetter("role")):
            if role == "assistant":
                messages += join_answer(group)
            else:
                messages += group
        return move_results(messages)

    def ignore(self, kind: str) -> None:
        if kind.isascii() and kind.isidentifier():  # other names may break the header
            self.ignored.add(kind)

    def _as_message(self, item: JSONObject) -> Message | None:
        """Convert an item to a message, or return None. The fields of an assistant's message are lists, which
        `join_answer` joins."""
        kind = item.get("type") or "message"
        if kind == "message":
            parts = self._read_parts(item["content"])
            role = item["role"]
            return {"role": role, "content": parts if role == "assistant" else as_content(parts)}
        if kind == "reasoning":
            return {"role": "assistant", **read_reasoning(item)}
        if kind in CALLS:
            return {"role": "assistant", "tool_calls": [self._read_call(item, kind)]}
        if kind.removesuffix("_output") in (*CALLS, "tool_search"):
            return self._read_result(item, kind)
        if kind == "compaction":
            summary = decode_fields(item).get("summary")
            if isinstance(summary, str):
                return {"role": "user", "content": SUMMARY_PREFIX + summary}
        if kind == "compaction_trigger":
            self.compacts = True
        elif kind == "additional_tools":
            self.tools += item["tools"]
        else:
            self.ignore(kind)
        return None

    def _read_call(self, item: JSONObject, kind: str) -> JSONObject:
        self._last_call_id = item.get("call_id") or item.get("id") or f"call_{random_hex()[:24]}"
        name = kind.removesuffix("_call")
        arguments = item[CALLS[kind]]
        if kind in ("function_call", "custom_tool_call"):
            name = function_name(item)
        if kind == "custom_tool_call":
            arguments = {"input": arguments}
        if kind != "function_call":
            arguments = dump_json(arguments).decode()
        return {
            "id": self._last_call_id,
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }

    def _read_result(self, item: JSONObject, kind: str) -> Message:
        content = item.get("output")
        if kind == "tool_search_output":
            self.tools += item["tools"]
            content = "Found: " + ", ".join(name.function for name, _ in flat_tools(item["tools"]))
        elif kind in ("function_call_output", "custom_tool_call_output"):
            content = as_content(self._read_parts(content))
        elif not isinstance(content, str):
            content = dump_json(content).decode()
        return {
            "role": "tool",
            "tool_call_id": item.get("call_id") or self._last_call_id,
            "content": content,
        }

    def _read_parts(self, content: Any) -> list[JSONObject]:
        """Convert content to parts that chats have, without empty texts."""
        if isinstance(content, str):
            content = [{"type": "input_text", "text": content}]
        parts = []
        for given in content:
            part = as_part(given)
            if part is None:
                self.ignore(given["type"])
            elif part.get("text") != "":
                parts.append(part)
        return parts


def encode_fields(fields: JSONObject) -> str:
    """Return the `encrypted_content` of an item with these fields. The client may read it."""
    return dump_json(fields).decode()


def decode_fields(item: JSONObject) -> JSONObject:
    """Return the fields that `encode_fields` wrote into an item, or no fields if another server wrote the item."""
    return parse_upstream_object((item.get("encrypted_content") or "").encode()) or {}


def join_answer(messages: Iterable[Message]) -> Iterator[Message]:
    """Join consecutive assistant messages. Yield no message for reasoning without text or calls."""
    answer: Message = {}
    for message in messages:
        merge(answer, message, "delta")
    answer = plain_value(answer)
    answer["content"] = as_content(answer.get("content") or []) or None
    if answer["content"] or answer.get("tool_calls"):
        yield answer


def move_results(messages: Iterable[Message]) -> list[Message]:
    """Move the results of tools directly behind the message that made their calls, as APIs require. Other results come
    first: their calls are in the previous response."""
    groups: list[list[Message]] = [[]]  # each a message and its results; the first has results of other calls
    callers: dict[str, int] = {}  # indexes of groups by call id
    for message in messages:
        if message["role"] == "tool":
            groups[callers.get(message["tool_call_id"], 0)].append(message)
            continue
        for call in message.get("tool_calls", ()):
            callers[call["id"]] = len(groups)
        groups.append([message])
    return list(itertools.chain.from_iterable(groups))


def as_part(part: JSONObject) -> JSONObject | None:
    """Convert a part of content to a chat's, or return None if chats have no such part."""
    kind = part["type"]
    if kind in ("input_text", "output_text", "text"):
        return {"type": "text", "text": part["text"]}
    if kind == "refusal":
        return part
    fields = {name: value for name, value in part.items() if value and name != "type"}
    if kind == "input_image":
        fields["url"] = fields.pop("image_url")
        return {"type": "image_url", "image_url": fields}
    if kind == "input_file":
        return {"type": "file", "file": fields}
    return None


def as_content(parts: list[JSONObject]) -> Any:
    """Return the parts as one string, or unchanged if some are not text."""
    if all(part["type"] == "text" for part in parts):
        return message_text({"content": parts})
    return parts


def read_reasoning(item: JSONObject) -> JSONObject:
    """Return the reasoning in an item: the fields that an API sent, else its text, else its summary."""
    fields = reasoning_fields(decode_fields(item))
    if fields:
        return fields
    text = "\n".join(map(itemgetter("text"), item.get("content") or item.get("summary") or ()))
    return {"reasoning_content": text} if text else {}


# ----------------------------------------------------------------------------------------------------------------------
# Responses requests
#
# A request becomes a chat request: items become messages, and flat tools become nested tools. Errors of the chat
# request are translated back.
# ----------------------------------------------------------------------------------------------------------------------

CHOSEN_TOOL = request_object({"name": STRING}, {"namespace": STRING})
CHOSEN_FUNCTIONS = {"function": CHOSEN_TOOL, "custom": CHOSEN_TOOL}
CHOSEN_TOOLS = request_object_by_type({
    **CHOSEN_FUNCTIONS,
    "allowed_tools": request_object({
        "mode": choice_of("auto", "required"),
        "tools": array(request_object_by_type(CHOSEN_FUNCTIONS, allow_others=True)),
    }),
})
TEXT_FORMAT = request_object_by_type({
    "text": OBJECT,
    "json_object": OBJECT,
    "json_schema": JSON_SCHEMA,
})
METADATA = {  # as OpenAI bounds it
    "type": "object",
    "maxProperties": 16,
    "propertyNames": {"maxLength": 64},
    "additionalProperties": {"type": "string", "maxLength": 512},
}
SAME_IN_CHATS = {
    **COMMON_PARAMETERS,
    "metadata": METADATA,
    "service_tier": STRING,
    "safety_identifier": STRING,
    "prompt_cache_key": STRING,
}
RESPONSES_REQUEST = request_object(
    {},
    {
        **SAME_IN_CHATS,
        "input": any_of(STRING, array(INPUT_ITEM)),
        "instructions": STRING,
        "previous_response_id": STRING,
        "store": BOOLEAN,
        "tools": RESPONSES_TOOLS,
        "tool_choice": any_of(choice_of("none", "auto", "required"), CHOSEN_TOOLS),
        "parallel_tool_calls": BOOLEAN,
        "text": request_object({}, {"format": TEXT_FORMAT, "verbosity": STRING}),
        "reasoning": request_object({}, {"effort": STRING, "summary": STRING}),
        "include": array(STRING),
        "max_output_tokens": POSITIVE,
        "truncation": choice_of("auto", "disabled"),
        "max_tool_calls": POSITIVE,
        "top_logprobs": COUNT,
    },
)
PARAMS = {  # from prefixes of paths in a chat request to fields of this API
    "messages": "input",
    "tools": "tools",
    "tool_choice": "tool_choice",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}


COMPACTION_PROMPT = (
    "Summarize this conversation so that a model that knows only your summary can continue the work. State what the "
    "user asked for, each decision and its reason, every change that was made, what was found, and what is still open. "
    "Keep names, paths, commands and figures exactly as they are. Write only the summary.")


class ResponsesRequest:
    """A checked request for a response."""

    def __init__(self, body: JSONObject) -> None:
        self.body = body
        self.repeats_messages = False  # the response repeats the users' messages before the summary
        self.reader = ItemReader()
        self.messages: list[Message] = []  # of the input
        self.tools: dict[str, ToolName] = {}  # by function name

    @classmethod
    def parse(cls, raw: bytes) -> ResponsesRequest:
        """Parse the body of a request. Raises APIError 400 with `param` naming the field."""
        body = parse_body(raw, RESPONSES_REQUEST)
        for name in ("background", "conversation", "prompt"):
            if body.get(name):
                raise bad_request(f"'{name}' is not supported.", name, "unsupported_value")
        return cls(body)

    def to_chat_request(
        self,
        system: Iterable[Message],
        tools: Iterable[JSONObject],
        find_items: Callable[[str], Mapping[str, JSONObject]],
    ) -> ChatRequest:
        """Convert to a chat request.

        system, tools: of previous responses; find_items: returns the items of a stored response by their ids.
        Raises APIError 400 with a field of the chat request, for `translate_error`.
        """
        body = self.body
        items = body.get("input") or []
        if isinstance(items, str):
            items = [{"role": "user", "content": items}]
        self.messages = self.reader.read(resolve_references(items, find_items))
        messages = [*system]
        if body.get("instructions"):
            messages.append({"role": "system", "content": body["instructions"]})
        messages += self.messages
        text = body.get("text") or {}
        fields = {
            "messages": messages,
            "max_tokens": body.get("max_output_tokens"),
            "reasoning_effort": (body.get("reasoning") or {}).get("effort"),
            "response_format": as_response_format(text.get("format")),
            "verbosity": text.get("verbosity"),
            "tools": self._read_tools([*(body.get("tools") or ()), *tools, *self.reader.tools]),
            "tool_choice": as_tool_choice(body.get("tool_choice")),
            "parallel_tool_calls": body.get("parallel_tool_calls"),
        }
        for name in SAME_IN_CHATS:
            fields[name] = body.get(name)
        if self.reader.compacts:
            fields = without(
                fields, "response_format", "verbosity", "tools", "tool_choice", "parallel_tool_calls")
            messages.append({"role": "user", "content": COMPACTION_PROMPT})
        elif not self.messages:
            raise bad_request("'input' has no message.", "input")
        request = ChatRequest.of({name: value for name, value in fields.items() if value is not None})
        return replace(request, user=None)  # opens no session

    def _read_tools(self, tools: Iterable[JSONObject]) -> list[JSONObject]:
        """Return the tools in the form of chat requests. Ignore a tool whose name an earlier tool has: an error for a
        tool among the items would end the conversation for good."""
        functions = []
        for name, tool in flat_tools(tools):
            is_search = name.kind == "tool_search" and tool.get("execution") == "client"
            if name.kind not in ("function", "custom") and not is_search:
                self.reader.ignore(name.kind)
            elif name.function not in self.tools:
                self.tools[name.function] = name
                functions.append({"type": "function", "function": as_function(tool, name)})
        return functions


def translate_error(error: APIError) -> APIError:
    """Replace the field of the chat request in an error by the field of the Responses API."""
    param = error.param or ""
    for path, name in PARAMS.items():
        if param.startswith(path):
            return error.copy(param=name, message=error.message.replace(f"'{param}'", f"'{name}'"))
    return error


def resolve_references(
    items: list[JSONObject], find_items: Callable[[str], Mapping[str, JSONObject]],
) -> Iterator[JSONObject]:
    """Replace item references by stored items. Raises APIError 400."""
    cached_items = lru_cache(maxsize=8)(find_items)  # reading a large response takes 0.1 s
    known: set[str] = set()  # ids; a small request must not repeat a large item many times
    for item in items:
        if item.get("type") == "item_reference":
            id = item["id"]
            item = cached_items(response_id(id)).get(id, {})
            if id in known or not item:
                raise bad_request(f"Item with id {id[:100]!r} not found, or referenced twice.", "input")
            known.add(id)
        yield item


def as_tool_choice(choice: Any) -> Any:
    if not isinstance(choice, dict):
        return choice
    if choice["type"] != "allowed_tools":
        return {"type": "function", "function": {"name": function_name(choice)}}
    tools = [as_tool_choice(tool) for tool in choice["tools"] if tool["type"] in ("function", "custom")]
    return {"type": "allowed_tools", "allowed_tools": {"mode": choice["mode"], "tools": tools}}


def as_response_format(form: JSONObject | None) -> JSONObject | None:
    if not form or form["type"] == "text":
        return None
    if form["type"] == "json_object":
        return form
    return {"type": "json_schema", "json_schema": {"name": "answer", **without(form, "type")}}


def as_function(tool: JSONObject, name: ToolName) -> JSONObject:
    """Convert a tool to the function that the upstream gets."""
    description = tool.get("description") or ""
    parameters = tool.get("parameters") or {"type": "object", "properties": {}}
    if name.kind == "custom":
        parameters = object_of({"input": STRING})
        grammar = tool.get("format")
        if isinstance(grammar, dict) and grammar.get("definition"):
            description += f"\nThe input follows this grammar ({grammar.get('syntax')}): {grammar['definition']}"
    function = {"name": name.function, "parameters": parameters}
    if tool.get("strict"):
        function["strict"] = True
    if description:
        function["description"] = description.strip()
    return function


# ----------------------------------------------------------------------------------------------------------------------
# Responses format
#
# Deltas become a Response or its events. Each item ends before the next begins, as at OpenAI, even if an upstream
# interleaves items: LangChain takes each change of `output_index` for a new item.
# ----------------------------------------------------------------------------------------------------------------------

# Items of one response: an item takes a hundred times the memory of the bytes that begin it
MAX_ITEMS = 1000


def custom_input(arguments: str) -> str:
    """Return the input of a custom tool from the arguments of its function. Models also name the input `code` or
    `patch`, and put it into a fenced block."""
    fields = parse_upstream_object(arguments.encode()) or {}
    texts = [value for value in fields.values() if isinstance(value, str)]
    if isinstance(fields.get("input"), str):
        texts = [fields["input"]]
    return strip_code_fence(texts[0] if len(texts) == 1 else arguments)


@dataclass(frozen=True)
class ItemKind:
    """The fields and events that all items of a kind share."""

    prefix: str  # of ids
    fields: JSONObject  # of a new item
    events: str  # prefix of the text's event names; empty: no events
    field: str  # name of the field that contains the text
    part: JSONObject | None = None  # the part that contains `field`, with an empty text; None: the item contains it
    list_field: str = "content"  # name of the field that contains the part
    part_events: str = "content_part"  # prefix of the part's event names
    finish: Callable[[str], Any] = str  # converts the upstream's text to the value of the field
    is_streamed: bool = True  # the text is sent as it arrives


MESSAGE_FIELDS = {"type": "message", "role": "assistant", "content": []}
REASONING_KIND = ItemKind(
    "rs",
    {"type": "reasoning", "summary": [], "content": []},
    "reasoning_text",
    "text",
    {"type": "reasoning_text", "text": ""})
SUMMARY_KIND = ItemKind(  # for clients that request a summary: they show nothing else
    "rs",
    {"type": "reasoning", "summary": []},
    "reasoning_summary_text",
    "text",
    {"type": "summary_text", "text": ""},
    "summary",
    "reasoning_summary_part")
COMPACTION_KIND = ItemKind(
    "cmp",
    {"type": "compaction", "encrypted_content": ""},
    "",
    "encrypted_content",
    finish=lambda text: encode_fields({"summary": text}),
    is_streamed=False)
TEXT_KINDS = {  # by the field of a delta
    "content": ItemKind(
        "msg",
        MESSAGE_FIELDS,
        "output_text",
        "text",
        {"type": "output_text", "text": "", "annotations": [], "logprobs": []}),
    "refusal": ItemKind(
        "msg",
        MESSAGE_FIELDS,
        "refusal",
        "refusal",
        {"type": "refusal", "refusal": ""}),
}
CALL_KINDS = {
    "function": ItemKind(
        "fc",
        {"type": "function_call", "arguments": ""},
        "function_call_arguments",
        "arguments",
        finish=lambda arguments: arguments or "{}"),  # some APIs leave empty arguments out
    "custom": ItemKind(
        "ctc",
        {"type": "custom_tool_call", "input": ""},
        "custom_tool_call_input",
        "input",
        finish=custom_input,
        is_streamed=False),
    "tool_search": ItemKind(
        "tsc",
        {"type": "tool_search_call", "execution": "client", "arguments": {}},
        "",
        "arguments",
        finish=lambda arguments: parse_upstream_object(arguments.encode()) or {},
        is_streamed=False),
}


class OutputItem:
    """An item of an unfinished response."""

    def __init__(self, kind: ItemKind, id: str, index: int, fields: JSONObject) -> None:
        self.kind = kind
        self.reasoning: JSONObject = {}  # merged fields of deltas
        self.item = {"id": id, "status": "in_progress", **kind.fields, **fields}
        self.events: list[JSONObject] = []  # not yet sent, without sequence numbers
        self.is_done = False
        self._index = index
        self._pieces: list[str] = []
        self._annotations: list[JSONObject] = []
        self._emit("output_item.added", item=self.item)
        if kind.part:
            self._emit_text(f"{kind.part_events}.added", part=kind.part)

    def add(self, text: str) -> None:
        self._pieces.append(text)
        if text and self.kind.is_streamed and not self.is_done:
            self._emit_text(f"{self.kind.events}.delta", delta=text)

    def may_end(self) -> bool:
        """Return whether the item may end when another begins: text may, arguments only if they are a JSON object."""
        if self.kind.part:
            return True
        return parse_upstream_object("".join(self._pieces).encode()) is not None

    def annotate(self, annotation: JSONObject) -> None:
        self._annotations.append(annotation)
        self._emit_text(
            "output_text.annotation.added", annotation=annotation, annotation_index=len(self._annotations) - 1)

    def end(self, status: str) -> None:
        kind = self.kind
        self.is_done = True
        text = "".join(self._pieces)
        value = kind.finish(text) if status == "completed" or not kind.events else text
        written: JSONObject = {kind.field: value}
        if kind.events:
            if value and not (kind.is_streamed and text):
                self._emit_text(f"{kind.events}.delta", delta=value)
            self._emit_text(f"{kind.events}.done", **written)
        if kind.part:
            part = {**kind.part, **written}
            if self._annotations:
                part["annotations"] = self._annotations
            self._emit_text(f"{kind.part_events}.done", part=part)
            written = {kind.list_field: [part]}
        if kind.prefix == "rs" and "encrypted_content" in self.item:
            written["encrypted_content"] = encode_fields(plain_value(self.reasoning))
        self.item = {**self.item, **written, "status": status}
        self._emit("output_item.done", item=self.item)

    def _emit_text(self, event: str, **fields: Any) -> None:
        if self.kind.part:
            fields[f"{self.kind.list_field}_index"] = 0
        if event in ("output_text.delta", "output_text.done"):
            fields["logprobs"] = []
        if event == "function_call_arguments.done":
            fields["name"] = self.item["name"]
        self._emit(event, item_id=self.item["id"], **fields)

    def _emit(self, event: str, **fields: Any) -> None:
        self.events.append({"type": f"response.{event}", "output_index": self._index, **fields})


# Words in finish reasons of incomplete answers, by reason, and of failed answers
UNFINISHED = re.compile(
    "(?P<max_output_tokens>length|max_tokens|context_window)|"
    "(?P<content_filter>filter|sensitive|safety|blocklist|prohibited|recitation)|"
    "(?P<failed>error|resource|abort|overload|timeout|cancel|fail)",
    re.I)
ECHOED: JSONObject = {  # parameters of the request that the Response repeats, with their defaults
    "frequency_penalty": 0.0,
    "metadata": {},
    "parallel_tool_calls": True,
    "presence_penalty": 0.0,
    "reasoning": {"effort": None, "summary": None},
    "service_tier": "default",
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
    "truncation": "disabled",
    **dict.fromkeys((
        "instructions", "max_output_tokens", "max_tool_calls", "previous_response_id", "prompt_cache_key",
        "safety_identifier", "user")),
}


class ResponseWriter:
    """A writer of one response.

    save: called with the complete response before the response or its last event is sent.
    """

    def __init__(self, request: ResponsesRequest) -> None:
        self.headers: Headers = {}
        self.save: Callable[[JSONObject], None] | None = None
        self.history: Turns = ()  # of previous responses
        self._request = request
        self._id = random_hex()
        self._created = int(time.time())
        self._model = request.body.get("model") or ""
        self._items: list[OutputItem] = []
        self._sent = 0  # number of items whose events are all sent
        self._calls: dict[int, OutputItem] = {}  # by index in deltas
        self._reasoning_kind = REASONING_KIND
        if (request.body.get("reasoning") or {}).get("summary"):
            self._reasoning_kind = SUMMARY_KIND

    def json(self, deltas: Iterable[Delta]) -> bytes:
        *_, last = self._events(deltas)
        response = last["response"]
        if self._request.repeats_messages:
            response["object"] = "response.compaction"
            response["output"][:0] = self._user_messages()
        return dump_json(response)

    def events(self, deltas: Iterable[Delta]) -> Iterator[bytes]:
        return map(write_event, self._events(deltas), itertools.count())

    def failure(self, error: APIError, sent: int) -> bytes:
        """Return the events that end a stream after `sent` events."""
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        if error.code in ("context_length_exceeded", "insufficient_quota"):  # Codex does not retry these
            code = error.code
        elif 400 <= error.status < 429:
            code = "invalid_prompt"
        response = self._response("failed", error={"code": code, "message": error.message})
        events = [] if sent else self._begin()
        events.append({"type": "response.failed", "response": response})
        return b"".join(map(write_event, events, itertools.count(sent)))

    def _events(self, deltas: Iterable[Delta]) -> Iterator[JSONObject]:
        finish_reason = ""
        usage: Any = None
        for number, delta in enumerate(deltas):
            chunk = delta.chunk
            self._model = chunk.get("model") or self._model
            usage = chunk.get("usage") or usage
            if number == 0:
                self.headers = self._with_ignored(delta.headers)
                yield from self._begin()
            for choice in chunk["choices"]:
                if choice["index"] == 0:
                    self._add(choice["delta"])
                    finish_reason = choice.get("finish_reason") or finish_reason
            yield from self._item_events()
        fields: JSONObject = {}
        status = "completed"
        unfinished = UNFINISHED.search(finish_reason)
        if unfinished and unfinished["failed"]:
            status = "failed"
            fields["error"] = {"code": "server_error", "message": f"The upstream stopped: {finish_reason}."}
        elif unfinished:
            status = "incomplete"
            fields["incomplete_details"] = {"reason": unfinished.lastgroup}
        for item in self._items:
            if not item.is_done:
                item.end("incomplete" if fields else "completed")
        yield from self._item_events()
        if self._request.reader.compacts and not self._items:
            raise invalid_response("The upstream", "no summary")
        response = self._response(status, usage=response_usage(usage), **fields)
        if self.save:
            self.save(response)
        yield {"type": f"response.{status}", "response": response}

    def _begin(self) -> list[JSONObject]:
        response = self._response("in_progress")
        return [
            {"type": f"response.{name}", "response": response}
            for name in ("created", "in_progress")
        ]

    def _item_events(self) -> Iterator[JSONObject]:
        """Yield the events of items in order: events of an item wait until all items before it are done."""
        for item in self._items[self._sent:]:
            yield from item.events
            item.events = []
            if not item.is_done:
                break
            self._sent += 1

    def _add(self, delta: JSONObject) -> None:
        if self._request.reader.compacts:
            if delta.get("content"):
                self._item(COMPACTION_KIND).add(delta["content"])
            return
        reasoning = reasoning_text(delta)
        if reasoning:
            self._item(self._reasoning_kind).add(reasoning)
        if self._items:
            merge(self._items[-1].reasoning, reasoning_fields(delta), "delta")
        for name, kind in TEXT_KINDS.items():
            if delta.get(name):
                self._item(kind).add(delta[name])
        annotations = delta.get("annotations")
        for annotation in annotations if isinstance(annotations, list) else ():
            type = annotation.get("type") if isinstance(annotation, dict) else None
            if isinstance(type, str) and isinstance(annotation.get(type), dict):
                self._item(TEXT_KINDS["content"]).annotate({"type": type, **annotation[type]})
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            if call["index"] not in self._calls:
                self._calls[call["index"]] = self._begin_call(call["id"], function.get("name") or "")
            self._calls[call["index"]].add(function.get("arguments") or "")

    def _begin_call(self, id: str, name: str) -> OutputItem:
        tool = self._request.tools.get(name) or ToolName(name)
        fields = {"call_id": id}
        if tool.kind != "tool_search":
            fields["name"] = tool.name
        if tool.namespace:
            fields["namespace"] = tool.namespace
        return self._begin_item(CALL_KINDS[tool.kind], fields)

    def _item(self, kind: ItemKind) -> OutputItem:
        """Return the current item if it is of this kind, else a new item."""
        if self._items and self._items[-1].kind is kind:
            return self._items[-1]
        return self._begin_item(kind, {})

    def _begin_item(self, kind: ItemKind, fields: JSONObject) -> OutputItem:
        """Begin an item. End the previous item, unless its arguments are incomplete."""
        index = len(self._items)
        if index == MAX_ITEMS:
            raise invalid_response("The upstream", f"more than {MAX_ITEMS} items")
        if index and self._items[-1].may_end():
            self._items[-1].end("completed")
        if kind.prefix == "rs" and "reasoning.encrypted_content" in (self._request.body.get("include") or ()):
            fields["encrypted_content"] = None
        item = OutputItem(kind, f"{kind.prefix}_{self._id}_{index}", index, fields)
        self._items.append(item)
        return item

    def _user_messages(self) -> Iterator[JSONObject]:
        """Yield the users' messages of the conversation as items, without earlier summaries."""
        for message in itertools.chain(*self.history, self._request.messages):
            text = message_text(message)
            if message["role"] == "user" and text and not text.startswith(SUMMARY_PREFIX):
                yield {
                    "id": f"msg_{random_hex()}",
                    "type": "message",
                    "role": "user",
                    "status": "completed",
                    "content": [{"type": "input_text", "text": text}],
                }

    def _with_ignored(self, headers: Headers) -> Headers:
        names = sorted(self._request.reader.ignored)
        if names:
            names.append(headers.get("X-Kimi2api-Ignored", ""))
            headers = {**headers, "X-Kimi2api-Ignored": ", ".join(filter(None, names))[:1000]}
        return headers

    def _response(self, status: str, **fields: Any) -> JSONObject:
        """Return the Response object with the effective parameters of the request."""
        response = {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": self._model,
            "output": [item.item for item in self._items],
            "usage": None,
            "top_logprobs": 0,  # none are sent
            **fields,
        }
        for name, default in ECHOED.items():
            value = self._request.body.get(name)
            if isinstance(default, dict):
                value = {**default, **(value or {})}
            response[name] = default if value is None else value
        response["tools"] = list(map(echoed_tool, response["tools"]))
        return response


def response_usage(usage: Any) -> JSONObject:
    """Convert an upstream's usage to the fields of this API."""
    count = partial(usage_count, usage)
    cached = count("prompt_tokens_details", "cached_tokens") or count("cached_tokens")
    reasoning = count("completion_tokens_details", "reasoning_tokens")
    return {
        "input_tokens": count("prompt_tokens"),
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": count("completion_tokens"),
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": count("total_tokens"),
    }


def echoed_tool(tool: JSONObject) -> JSONObject:
    """Add the fields of a tool that clients require and requests may omit."""
    if tool["type"] != "function":
        return tool
    return {"description": None, "parameters": None, "strict": None, **tool}


def response_id(item_id: str) -> str:
    """Return the id of the response that an item belongs to."""
    return f"resp_{item_id.partition('_')[2].rpartition('_')[0]}"


def write_event(event: JSONObject, number: int) -> bytes:
    data = dump_json({**event, "sequence_number": number})
    return b"event: %s\ndata: %s\n\n" % (event["type"].encode(), data)


########################################################################################################################
# Part 4: Storage
#
# Documents and counters in one of three stores, and their content: sessions, stored responses, reasoning and usage.
# Also the metrics of this process.
########################################################################################################################


# ----------------------------------------------------------------------------------------------------------------------
# Stores
#
# A store keeps documents and counters. Each document has an owner (the hash of an API key), a kind and a name.
# `Sessions` defines the content of documents.
# ----------------------------------------------------------------------------------------------------------------------

SESSION, RESPONSE, REASONING = "session", "response", "reasoning"  # kinds of documents
MAX_REASONING_TEXTS = 4000  # per owner
MAX_OWNER_BYTES = 64 << 20  # of all documents of an owner, in the memory store
DOCUMENT_BYTES = 500  # of memory for each document, besides its data
# Seconds that a call may wait, and that an update may retry. A chat waits at most three times, for two limits and its
# session: less than 5 s in total
STORE_TIMEOUT = 1.5

DocumentKey = tuple[str, str, str]  # owner, kind, name
Amounts = Mapping[str, int]


@dataclass(frozen=True)
class CounterKey:
    """The key of an owner's counters of a period."""

    owner: str
    period: str
    lifetime: float  # seconds, at least, that a store keeps the counters
    created: float = field(default_factory=time.monotonic, compare=False)


@dataclass(frozen=True)
class Document:
    """Bytes in a store, with the fields that lists show."""

    created: float = 0.0  # seconds since the epoch, as is `used`
    used: float = 0.0
    turns: int = 0
    data: bytes = b""
    version: int = 0  # changes with each put; 0: not stored


NO_DOCUMENT = Document()
ANY_VERSION = -1


class Store:
    """Documents and counters. Thread-safe. Every method raises APIError 503 while the store is unavailable. Methods of
    counters raise it also if the store has no counters.

    A document expires `ttl` seconds after its last use. The number of an owner's documents of a kind is limited: a new
    document evicts the least recently used. Counters are numbers by owner, period and name.
    """

    kind = ""  # for /health

    def __init__(self, ttl: float, limit: int) -> None:
        self.ttl = ttl
        self.limit = limit  # sessions per owner, and stored responses per owner
        # Held while a thread retries an update: concurrent retries would make each other fail
        self._retrying = threading.Lock()

    def max_documents(self, kind: str) -> int:
        return MAX_REASONING_TEXTS if kind == REASONING else self.limit

    def expiry_cutoff(self) -> float:
        """Return the time of the last use of a document that expires now."""
        return time.time() - self.ttl

    def check(self) -> None:
        """Raise APIError unless the store can be written."""

    def load(self, key: DocumentKey) -> Document | None:
        raise NotImplementedError

    def put(self, key: DocumentKey, document: Document, expected: int = ANY_VERSION) -> bool:
        """Store a document, or return False if the stored version is not the expected one."""
        raise NotImplementedError

    def delete(self, key: DocumentKey) -> bool:
        """Delete a document. Return whether it existed."""
        raise NotImplementedError

    def list_documents(self, owner: str, kind: str) -> dict[str, Document]:
        """Return an owner's documents by name, the least recently used first, perhaps without their data."""
        raise NotImplementedError

    def count(self) -> int:
        """Count the sessions and stored responses of all owners."""
        raise NotImplementedError

    def add_counters(self, key: CounterKey, amounts: Amounts) -> Amounts:
        """Add amounts to the counters of a period. Return all counters of the period."""
        raise store_unavailable()

    def read_counters(self, keys: Iterable[CounterKey]) -> list[Amounts]:
        """Return the counters of each period."""
        raise store_unavailable()

    def update(
        self,
        key: DocumentKey,
        document: Document,
        change: Callable[[Document], Document],
    ) -> None:
        """Replace a document by change(document). document: as loaded, or NO_DOCUMENT.

        If another update came first, retry with the document that is now stored. Raises APIError 503 if other updates
        come first for STORE_TIMEOUT.
        """
        deadline = time.monotonic() + STORE_TIMEOUT
        if self.put(key, change(document), document.version):
            return
        with self._retrying:
            while time.monotonic() < deadline:
                document = self.load(key) or NO_DOCUMENT
                if self.put(key, change(document), document.version):
                    return
                time.sleep(random.uniform(0, 0.005))
        raise store_unavailable()


def store_unavailable() -> APIError:
    return APIError(
        503,
        "The session store is unavailable; see the server's log. Requests without 'user' and "
        "'previous_response_id', and with 'store': false, still work.",
        "server_error",
        "session_store_unavailable")


@contextmanager
def held(lock: threading.Lock, deadline: float) -> Iterator[None]:
    """Hold a lock. Raises APIError 503 after the deadline, by time.monotonic(): other threads keep the store busy,
    which is no failure of the store."""
    if not lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
        raise store_unavailable()
    try:
        yield
    finally:
        lock.release()


class MemoryStore(Store):
    """Dicts with expiry, which end with the process.

    This store has no counters: `Counters` counts in this process instead.
    """

    kind = "memory"

    def __init__(self, ttl: float, limit: int) -> None:
        super().__init__(ttl, limit)
        # By owner and kind, then by name, least recently used first
        self._documents: defaultdict[tuple[str, str], dict[str, Document]] = defaultdict(dict)
        self._sizes: defaultdict[str, Counter[str]] = defaultdict(Counter)  # bytes by owner, then by kind
        # A version is the time of its put in ns, by time.monotonic(): the system clock may be set back
        self._newest_version = 0
        self._lock = threading.Lock()  # guards all three; held briefly

    def load(self, key: DocumentKey) -> Document | None:
        with self._lock:
            self._drop_expired()
            return self._documents[key[:2]].get(key[2])

    def put(self, key: DocumentKey, document: Document, expected: int = ANY_VERSION) -> bool:
        owner, kind, name = key
        with self._lock:
            self._drop_expired()
            documents = self._documents[owner, kind]
            found = documents.get(name, NO_DOCUMENT)
            if expected not in (ANY_VERSION, found.version):
                return False
            self._drop(key)
            self._newest_version = max(int(time.monotonic() * 1e9), self._newest_version + 1)
            documents[name] = replace(document, version=self._newest_version)
            sizes = self._sizes[owner]
            sizes[kind] += len(document.data) + DOCUMENT_BYTES
            while len(documents) > self.max_documents(kind):
                self._drop_oldest(owner, kind)
            while sizes.total() > MAX_OWNER_BYTES:
                self._drop_oldest(owner, max(sizes, key=sizes.__getitem__))
        return True

    def delete(self, key: DocumentKey) -> bool:
        with self._lock:
            self._drop_expired()
            return self._drop(key)

    def list_documents(self, owner: str, kind: str) -> dict[str, Document]:
        with self._lock:
            self._drop_expired()
            return self._documents[owner, kind].copy()

    def count(self) -> int:
        with self._lock:
            self._drop_expired()
            return sum(len(documents) for (_, kind), documents in self._documents.items() if kind != REASONING)

    # Callers of the methods below hold the lock

    def _drop(self, key: DocumentKey) -> bool:
        owner, kind, name = key
        document = self._documents[owner, kind].pop(name, None)
        if document:
            self._sizes[owner][kind] -= len(document.data) + DOCUMENT_BYTES
        return document is not None

    def _drop_oldest(self, owner: str, kind: str) -> None:
        self._drop((owner, kind, next(iter(self._documents[owner, kind]))))

    def _drop_expired(self) -> None:
        cutoff = (time.monotonic() - self.ttl) * 1e9
        for (owner, kind), documents in self._documents.items():
            while documents and next(iter(documents.values())).version <= cutoff:
                self._drop_oldest(owner, kind)


# ----------------------------------------------------------------------------------------------------------------------
# Shared stores
#
# Common code of stores outside this process, which fail and recover.
# ----------------------------------------------------------------------------------------------------------------------

MAX_STORE_PAUSE = 5.0  # seconds without a call after a failure, at most


class SharedStore(Store):
    """A store outside this process. Every failure becomes one APIError."""

    failures: tuple[type[Exception], ...]
    # No lock guards these fields: an extra call or an extra line in the log is harmless
    _is_failing = False  # a failure has been logged, and no write has succeeded since
    _latest_failure: tuple[str, float] = "", 0.0  # text and hour
    _paused_until = 0.0  # by time.monotonic()

    def _check_pause(self) -> None:
        if time.monotonic() < self._paused_until:
            raise store_unavailable()

    @contextmanager
    def _calling(self, is_write: bool = False) -> Iterator[None]:
        """Raise APIError 503 for a call that fails. Then all calls fail immediately for five times as long as the
        failed call took: otherwise a request with several calls would wait for each call."""
        self._check_pause()
        began = time.monotonic()
        try:
            yield
        except self.failures as error:
            now = time.monotonic()
            self._paused_until = now + min(5 * (now - began), MAX_STORE_PAUSE)
            failure = f"{type(error).__name__}: {error}", now // 3600
            # A damaged page fails with every read, between other calls that succeed
            if not self._is_failing and failure != self._latest_failure:
                self._is_failing = True
                log.warning("session store (%s) failed: %s", self.kind, failure[0])
            self._latest_failure = failure
            raise store_unavailable() from None
        if self._is_failing and is_write:  # a full disk can still be read
            self._is_failing = False
            log.warning("session store (%s) recovered", self.kind)


# ----------------------------------------------------------------------------------------------------------------------
# SQLite store
#
# A file that processes of one machine may share.
# ----------------------------------------------------------------------------------------------------------------------

RESERVE_BYTES = 1 << 20  # of disk space in a separate file, which deletions release while the disk is full
MAX_FREE_PAGES = 1000  # 4 MiB; more free pages of the file are returned to the file system
SQLITE_APPLICATION = 0x6B326170  # PRAGMA application_id of our files
SQLITE_FORMAT = 2  # PRAGMA user_version of our files; format 1 had other tables
SQLITE_PRAGMAS = """
-- Takes effect only in an empty file
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA journal_mode = WAL;
-- Commits survive the end of the process; a power failure may lose the latest
PRAGMA synchronous = NORMAL;
PRAGMA journal_size_limit = 4194304;
"""
# Changes nothing if another process has run it
SQLITE_TABLES = f"""
BEGIN IMMEDIATE;
-- Tables of format 1, except its counters
DROP TABLE IF EXISTS turns;
DROP TABLE IF EXISTS sessions;
DROP TABLE IF EXISTS reasoning;
DROP TABLE IF EXISTS probe;
DROP TABLE IF EXISTS totals;
-- Each put gives a document a new number: its version and its place in the order of use, independent of the clock
CREATE TABLE IF NOT EXISTS documents (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    owner TEXT NOT NULL,
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    created REAL NOT NULL,
    used REAL NOT NULL,
    turns INTEGER NOT NULL,
    data BLOB NOT NULL,
    UNIQUE (owner, kind, name));
CREATE INDEX IF NOT EXISTS documents_by_number ON documents (owner, kind, number);
CREATE INDEX IF NOT EXISTS documents_by_use ON documents (used, kind);
CREATE TABLE IF NOT EXISTS counters (
    owner TEXT NOT NULL,
    period TEXT NOT NULL,
    name TEXT NOT NULL,
    value INTEGER NOT NULL,
    expires REAL NOT NULL,
    PRIMARY KEY (owner, period, name)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS counters_by_expiry ON counters (expires);
PRAGMA application_id = {SQLITE_APPLICATION};
PRAGMA user_version = {SQLITE_FORMAT};
COMMIT;
"""


def parse_row(row: Sequence[Any]) -> Document:
    """Return the document of a row. Raises ValueError for values of wrong types."""
    document = Document(*row)
    if list(map(type, astuple(document))) != [float, float, int, bytes, int]:
        raise ValueError("a document has fields of wrong types")
    return document


def parse_counter_rows(rows: Iterable[tuple[str, Any]]) -> Amounts:
    return {name: int(value) for name, value in rows}


class SQLiteStore(SharedStore):
    """An SQLite file. One connection serves all threads: a call takes a fraction of a millisecond."""

    kind = "sqlite"

    def __init__(self, path: str, ttl: float, limit: int) -> None:
        """Open the file. Raises SettingError if it cannot be opened or is not ours, but not for a locked file."""
        super().__init__(ttl, limit)
        try:
            import sqlite3
        except ImportError:
            raise SettingError("SESSION_STORE: this Python has no sqlite3; use memory or redis://…") from None
        self.failures = (sqlite3.Error, OSError, OverflowError, ValueError)
        # Guards the connection and its file; held also while sqlite3 waits for other processes
        self._lock = threading.Lock()
        # Only one call of each owner may wait for the connection: a call with 16 MiB takes 0.1 s, and many such calls
        # would shut out other owners
        self._owner_locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._db: Any = None
        self._file: Any = None  # os.stat() of the connected file
        try:
            # sqlite3 would create the target of a link with mode 0644. realpath() fails in a deleted working directory
            self._path = os.path.realpath(os.path.expanduser(path))
            self._reserve = f"{self._path}-reserve"
            self._connect()
        except self.failures as error:
            self._close()
            # The message of an OSError contains the path, which may contain "locked"
            if isinstance(error, OSError) or "locked" not in str(error):
                raise SettingError(f"SESSION_STORE: {path} cannot be used: {error}") from None
            log.warning("session store (sqlite) is locked by another program: %s", path)

    def check(self) -> None:
        with self._using(is_write=True) as execute:
            # A full disk refuses these writes
            self._fill_reserve()
            execute(f"PRAGMA user_version = {SQLITE_FORMAT}")

    def load(self, key: DocumentKey) -> Document | None:
        with self._using(key[0]) as execute:
            row = execute(
                "SELECT created, used, turns, data, number FROM documents "
                "WHERE owner = ? AND kind = ? AND name = ? AND used > ?",
                (*key, self.expiry_cutoff())).fetchone()
            return parse_row(row) if row else None

    def put(self, key: DocumentKey, document: Document, expected: int = ANY_VERSION) -> bool:
        owner, kind, _ = key
        now = time.time()
        cutoff = self.expiry_cutoff()
        with self._using(owner, is_write=True) as execute:
            self._fill_reserve()
            [version] = execute(
                "SELECT ifnull(max(number), 0) FROM documents "
                "WHERE owner = ? AND kind = ? AND name = ? AND used > ?",
                (*key, cutoff)).fetchone()
            if expected not in (ANY_VERSION, version):
                return False
            execute(
                "REPLACE INTO documents (owner, kind, name, created, used, turns, data) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (*key, document.created, document.used, document.turns, document.data))
            # Documents that were stored while the clock was ahead would expire late. Change only two: the clock may
            # also be behind for a moment
            execute(
                "UPDATE documents SET used = ? WHERE number IN "
                "(SELECT number FROM documents WHERE used > ? LIMIT 2)",
                (now, now))
            # Delete only two: deleting 16 MiB takes 0.1 s, during which no other process can write
            execute(
                "DELETE FROM documents WHERE number IN "
                "(SELECT number FROM documents WHERE used <= ? LIMIT 2)",
                (cutoff,))
            execute(
                "DELETE FROM documents WHERE number IN "
                "(SELECT number FROM documents WHERE owner = ? AND kind = ? ORDER BY number LIMIT max(0, min(2, "
                "(SELECT count(*) FROM documents WHERE owner = ? AND kind = ?) - ?)))",
                (owner, kind, owner, kind, self.max_documents(kind)))
            [free] = execute("PRAGMA freelist_count").fetchone()
            for _ in range(min(free - MAX_FREE_PAGES, 500)):
                # One execute() makes one step, which frees one page
                execute("PRAGMA incremental_vacuum(1)")
        return True

    def delete(self, key: DocumentKey) -> bool:
        with suppress(OSError):
            if shutil.disk_usage(self._reserve).free < RESERVE_BYTES:
                os.truncate(self._reserve, 0)
        with self._using(key[0], is_write=True) as execute:
            deleted = execute(
                "DELETE FROM documents WHERE owner = ? AND kind = ? AND name = ? AND used > ?",
                (*key, self.expiry_cutoff()))
            return bool(deleted.rowcount)

    def list_documents(self, owner: str, kind: str) -> dict[str, Document]:
        with self._using(owner) as execute:
            rows = execute(
                "SELECT name, created, used, turns FROM documents "
                "WHERE owner = ? AND kind = ? AND used > ? ORDER BY number",
                (owner, kind, self.expiry_cutoff()))
            return {name: parse_row(row) for name, *row in rows}

    def count(self) -> int:
        with self._using() as execute:
            [count] = execute(
                "SELECT count(*) FROM documents WHERE used > ? AND kind != ?",
                (self.expiry_cutoff(), REASONING)).fetchone()
        return count

    def add_counters(self, key: CounterKey, amounts: Amounts) -> Amounts:
        now = time.time()
        with self._using(key.owner, is_write=True) as execute:
            # Delete only ten: the clock may be ahead for a moment
            execute(
                "DELETE FROM counters WHERE (owner, period, name) IN "
                "(SELECT owner, period, name FROM counters WHERE expires <= ? LIMIT 10)",
                (now,))
            for name, amount in amounts.items():
                execute(
                    "INSERT INTO counters VALUES (?, ?, ?, ?, ?) "
                    "ON CONFLICT (owner, period, name) DO UPDATE SET value = value + excluded.value",
                    (key.owner, key.period, name, amount, now + key.lifetime))
            return parse_counter_rows(execute(
                "SELECT name, value FROM counters WHERE owner = ? AND period = ?", (key.owner, key.period)))

    def read_counters(self, keys: Iterable[CounterKey]) -> list[Amounts]:
        found: list[Amounts] = []
        for key in keys:
            with self._using(key.owner) as execute:
                found.append(parse_counter_rows(execute(
                    "SELECT name, value FROM counters WHERE owner = ? AND period = ?", (key.owner, key.period))))
        return found

    @contextmanager
    def _using(self, owner: str = "", is_write: bool = False) -> Iterator[Callable[..., Any]]:
        """Yield a function that executes a statement. The statements of a write are one transaction. A failure closes
        the connection, which rolls back, and the next call reconnects."""
        deadline = time.monotonic() + STORE_TIMEOUT

        def execute(statement: str, values: tuple[Any, ...] = ()) -> Any:
            """Execute a statement, waiting for locks of other processes until the deadline. sqlite3's own busy handler
            retries only every 100 ms: with four busy processes, one of them would wait for more than a second."""
            while True:
                try:
                    return self._db.execute(statement, values)
                except self.failures as error:
                    if "locked" not in str(error) or time.monotonic() >= deadline:
                        raise

        with self._calling(is_write), held(self._owner_locks[owner], deadline), held(self._lock, deadline):
            try:
                self._check_pause()  # another call may have failed meanwhile
                self._connect()
                if is_write:
                    execute("BEGIN IMMEDIATE")
                yield execute
                if is_write:
                    execute("COMMIT")
            except BaseException:
                self._close()
                raise

    # Callers of the methods below hold the lock

    def _fill_reserve(self) -> None:
        """Reserve disk space for deletions, unless reserved. Raises OSError if the disk is full."""
        with suppress(FileNotFoundError):
            if os.path.getsize(self._reserve) >= RESERVE_BYTES:
                return
        with open(self._reserve, "wb", opener=partial(os.open, mode=0o600)) as file:
            file.write(bytes(RESERVE_BYTES))

    def _connect(self) -> None:
        """Connect to the file at the path, unless connected. A connection to a deleted file would accept writes."""
        if self._db:
            with suppress(OSError):
                if os.path.samestat(os.stat(self._path), self._file):
                    return
            self._close()
        import sqlite3
        with suppress(FileExistsError):
            os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        self._db = sqlite3.connect(
            self._path,
            timeout=STORE_TIMEOUT,
            isolation_level=None,
            check_same_thread=False,
        )
        self._prepare(self._db)
        self._file = os.stat(self._path)

    def _close(self) -> None:
        if self._db:
            with suppress(*self.failures):
                self._db.close()
        self._db = None

    def _prepare(self, db: Any) -> None:
        """Set up the connection, and upgrade the file to our format. Raises ValueError if the file is not ours."""
        application, version, tables = db.execute(
            "SELECT application_id, user_version, (SELECT count(*) FROM sqlite_master) "
            "FROM pragma_application_id, pragma_user_version").fetchone()
        if tables and application != SQLITE_APPLICATION:
            raise ValueError("it is the database of another program")
        if version > SQLITE_FORMAT:
            raise ValueError(
                f"it was written by a newer version of kimi2api (format {version}); use that version or another file")
        db.executescript(SQLITE_PRAGMAS)
        if version < SQLITE_FORMAT:
            db.executescript(SQLITE_TABLES)
        db.execute("PRAGMA busy_timeout = 20")  # ms; `_using` retries until its deadline


# ----------------------------------------------------------------------------------------------------------------------
# Redis store
#
# Documents in Redis, for processes on any number of machines. A document is a hash that expires by itself.
# ----------------------------------------------------------------------------------------------------------------------

REDIS_CONNECTIONS = 256  # at most; a thread that waits for a reply holds one
REDIS_TIMEOUT = 1.0  # seconds for each step: to get a connection from the pool, to connect, to receive a reply
REDIS_INDEXES = "kimi2api:indexes"  # set of the names of all indexes
PUT_DOCUMENT = """
local index, name, expected, ttl, limit = KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local document = index .. ':' .. name
if expected ~= '-1' and expected ~= (redis.call('HGET', document, 'version') or '0') then
    return 0
end
-- Microseconds of Redis's clock, which all processes share; later than the newest version if the clock was set back
local time = redis.call('TIME')
local newest = redis.call('ZREVRANGE', index, 0, 0, 'WITHSCORES')[2] or 0
local version = string.format('%.0f', math.max(time[1] * 1000000 + time[2], newest + 1))
redis.call('HSET', document, 'version', version, unpack(ARGV, 5))
redis.call('PEXPIRE', document, ttl)
redis.call('ZADD', index, version, name)
redis.call('PEXPIRE', index, ttl)
redis.call('SADD', KEYS[2], index)
local surplus = redis.call('ZCARD', index) - limit
if surplus > 0 then
    local oldest = redis.call('ZPOPMIN', index, surplus)
    for position = 1, #oldest, 2 do
        redis.call('DEL', index .. ':' .. oldest[position])
    end
end
return 1
"""


def short_hash(text: str) -> str:
    """Return the hash of a text for a Redis key."""
    return sha256(text.encode()).hexdigest()[:32]


def index_name(owner: str, kind: str) -> str:
    """Return the name of an index: a sorted set of the names of an owner's documents of a kind, by version.

    The key of a document is the name of its index, a colon, and the name of the document.
    """
    return f"kimi2api:documents:{owner}:{kind}"


def counters_name(key: CounterKey) -> str:
    return f"kimi2api:counters:{short_hash(key.owner)}:{short_hash(key.period)}"


def parse_counters(counters: Mapping[bytes, bytes]) -> Amounts:
    return {name.decode(): int(value) for name, value in counters.items()}


class RedisStore(SharedStore):
    """A Redis server, or another server that implements its protocol; tested with Redis 7.

    A version with another format of data must use other names of keys, so that versions can run side by side.
    """

    kind = "redis"

    def __init__(self, url: str, ttl: float, limit: int) -> None:
        """Connect, or retry later if Redis does not answer. Raises SettingError if the package is missing or the
        address is invalid."""
        super().__init__(ttl, limit)
        try:
            import redis
        except ImportError:
            raise SettingError("SESSION_STORE: the package redis is missing: pip install redis") from None
        self.failures = (
            redis.RedisError, OSError,
            # For malformed addresses, replies and documents
            AttributeError, LookupError, TypeError, ValueError,
        )
        try:
            # A pool's connections do not retry by default, rightly: a write whose reply was lost may have succeeded
            pool = redis.BlockingConnectionPool.from_url(
                url,
                max_connections=REDIS_CONNECTIONS,
                timeout=REDIS_TIMEOUT,
                socket_connect_timeout=REDIS_TIMEOUT,
                socket_timeout=REDIS_TIMEOUT,
                socket_keepalive=True,
                protocol=2,
            )
            pool.make_connection()  # parses the options in the address
        except self.failures as error:
            raise SettingError(f"SESSION_STORE: the address of Redis cannot be used: {error}") from None
        self._redis = redis.Redis(connection_pool=pool)
        with suppress(APIError), self._calling():  # a failure has been logged
            try:
                self._redis.eval("return 1", 0)
            except redis.exceptions.NoPermissionError as error:
                raise SettingError(f"SESSION_STORE: the user of Redis may not run scripts: {error}") from None

    def check(self) -> None:
        with self._calling(is_write=True):
            # Redis refuses this write if its memory is full, or if it is a replica
            self._redis.set("kimi2api:check", "")

    def load(self, key: DocumentKey) -> Document | None:
        owner, kind, name = key
        with self._calling():
            document = f"{index_name(owner, kind)}:{name}"
            head, data, version = self._redis.hmget(document, "head", "data", "version")
            if version is None:
                return None
            created, used, turns = json.loads(head)
            return Document(created, used, turns, data, int(version))

    def put(self, key: DocumentKey, document: Document, expected: int = ANY_VERSION) -> bool:
        owner, kind, name = key
        head = dump_json([document.created, document.used, document.turns])
        with self._calling(is_write=True):
            reply = self._redis.eval(
                PUT_DOCUMENT, 2, index_name(owner, kind), REDIS_INDEXES,
                name, expected, int(self.ttl * 1000), self.max_documents(kind),
                "head", head, "data", document.data)
            return bool(int(reply))  # int() raises for a reply that is not a number

    def delete(self, key: DocumentKey) -> bool:
        owner, kind, name = key
        index = index_name(owner, kind)
        with self._calling(is_write=True), self._redis.pipeline() as pipe:
            pipe.delete(f"{index}:{name}")
            pipe.zrem(index, name)
            deleted, _ = pipe.execute()
        return bool(deleted)

    def list_documents(self, owner: str, kind: str) -> dict[str, Document]:
        index = index_name(owner, kind)
        documents = {}
        with self._calling(), self._redis.pipeline(transaction=False) as pipe:
            names = self._redis.zrange(index, 0, -1)
            for name in names:
                pipe.hget(f"{index}:{name.decode()}", "head")
            for name, head in zip(names, pipe.execute(), strict=True):
                if head:  # otherwise expired
                    documents[name.decode()] = Document(*json.loads(head))
        return documents

    def count(self) -> int:
        with self._calling(), self._redis.pipeline(transaction=False) as pipe:
            for index in self._redis.smembers(REDIS_INDEXES):
                if not index.endswith(REASONING.encode()):
                    pipe.zcount(index, self.expiry_cutoff() * 1_000_000, "+inf")
            return sum(pipe.execute())

    def add_counters(self, key: CounterKey, amounts: Amounts) -> Amounts:
        counters = counters_name(key)
        with self._calling(is_write=True), self._redis.pipeline() as pipe:
            for name, amount in amounts.items():
                pipe.hincrby(counters, name, amount)
            pipe.pexpire(counters, int(1000 * key.lifetime))
            pipe.hgetall(counters)
            *_, found = pipe.execute()
            return parse_counters(found)

    def read_counters(self, keys: Iterable[CounterKey]) -> list[Amounts]:
        with self._calling(), self._redis.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.hgetall(counters_name(key))
            return list(map(parse_counters, pipe.execute()))


def open_store(settings: Settings) -> Store:
    """Open the store that SESSION_STORE names. Raises SettingError if it can never be used."""
    ttl = settings.session_cache_ttl
    limit = settings.max_session_size
    kind, _, path = settings.session_store.partition(":")
    if kind == "memory":
        return MemoryStore(ttl, limit)
    if kind == "sqlite":
        return SQLiteStore(path, ttl, limit)
    return RedisStore(settings.session_store, ttl, limit)


# ----------------------------------------------------------------------------------------------------------------------
# Sessions
#
# The content of documents. A session is JSON lines: a head, then one line for each turn. Turns have no system messages,
# because each request has its own.
# ----------------------------------------------------------------------------------------------------------------------

MAX_SESSION_BYTES = 1 << 20  # of one session's turns; the oldest turns are dropped
MAX_RESPONSE_BYTES = 16 << 20  # of a stored response with its conversation; a larger response is not stored
MAX_REASONING_BYTES = 1 << 20  # of one message's reasoning; larger reasoning is not stored


@dataclass(frozen=True)
class Session:
    """A user's conversation, or a stored response and the conversation up to its end."""

    # The head of the document
    id: str
    # Of a stored response: the system messages and tools of its input, and of the inputs before it
    system: Sequence[Message] = ()
    tools: Sequence[JSONObject] = ()
    response: JSONObject = field(default_factory=dict)  # empty for a user's conversation

    turns: Turns = ()
    document: Document = NO_DOCUMENT  # in which the session is stored


def parse_turns(lines: Iterable[bytes]) -> Turns:
    return tuple(tuple(json.loads(line)) for line in lines)


def dump_turns(turns: Iterable[Turn]) -> list[bytes]:
    return [dump_json(list(map(stored_message, turn))) for turn in turns]


def new_document(head: bytes, lines: Sequence[bytes] = (), created: float = 0.0) -> Document:
    """Return a document whose last use is now. created: seconds since the epoch, 0 for now."""
    now = time.time()
    return Document(created or now, now, len(lines), b"\n".join((head, *lines)))


def stored_message(message: Message) -> Message:
    """Return the fields of a message to store. Clients may put megabytes into other fields, which are never read."""
    stored: Message = {"role": message["role"], "content": message_text(message)}
    if message.get("tool_call_id"):
        stored["tool_call_id"] = message["tool_call_id"]
    if message.get("tool_calls"):
        stored["content"] = stored["content"] or None
        stored["tool_calls"] = []
        for call in message["tool_calls"]:
            kept = only(call, ("id", "extra_content"))
            kept["type"] = "function"
            kept["function"] = only(call["function"], ("name", "arguments"))
            stored["tool_calls"].append(kept)
        # APIs require the reasoning in later requests
        stored.update(reasoning_fields(message))
    return stored


def latest_lines(lines: list[bytes]) -> list[bytes]:
    """Return the latest lines that fit into a session, without lines that are too long by themselves."""
    kept = []
    remaining = MAX_SESSION_BYTES
    for line in reversed(lines):
        if len(line) > MAX_SESSION_BYTES:
            log.warning("a turn of %d bytes is too large for its session and not stored", len(line))
            continue
        remaining -= len(line)
        if remaining < 0:
            break
        kept.append(line)
    return kept[::-1]


class Sessions:
    """The sessions and stored responses of all owners, and the reasoning of their tool calls. Moonshot and DeepSeek
    require this reasoning in later requests, and clients of OpenAI's protocol drop it."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def get(self, owner: str, name: str, kind: str = SESSION) -> Session | None:
        """Return the session of a user, or the stored response with this id, or None."""
        document = self.store.load((owner, kind, name))
        if document is None:
            return None
        try:
            head, *lines = document.data.split(b"\n")
            return Session(**json.loads(head), turns=parse_turns(lines), document=document)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            log.warning("a stored %s cannot be read: %s; delete it", kind, type(error).__name__)
            raise store_unavailable() from None

    def open(self, owner: str, user: str | None) -> Session:
        """Return the user's session, or a new session, which `record` stores."""
        session = self.get(owner, user) if user else None
        return session or Session(random_hex())

    def record(
        self,
        owner: str,
        user: str,
        opened: Session,
        turns: Sequence[Turn],
        replace_turns: bool,
    ) -> None:
        """Add all turns or none to the user's session. replace_turns: replace the turns of the opened session."""
        added = dump_turns(turns)

        def change(document: Document) -> Document:
            head, *lines = document.data.split(b"\n")
            if replace_turns:  # but keep turns that were recorded in the meantime
                recorded = Counter(lines) - Counter(opened.document.data.split(b"\n"))
                lines = added + list(recorded.elements())
            elif turns[0][0]["role"] != "user":  # a tool's result, which continues a turn
                lines = dump_turns(append_turns(parse_turns(lines), turns))
            else:
                lines += added
            return new_document(head or dump_json({"id": opened.id}), latest_lines(lines), document.created)

        self.store.update((owner, SESSION, user), opened.document, change)

    def record_response(self, owner: str, session: Session) -> None:
        """Store a response with its conversation, which later responses may continue, unless they are too large."""
        head = {
            "id": session.id,
            "system": list(map(stored_message, session.system)),
            "tools": session.tools,
            "response": session.response,
        }
        document = new_document(dump_json(head), dump_turns(session.turns))
        size = len(document.data)
        if size > MAX_RESPONSE_BYTES:
            log.warning("a response is too large and not stored: %d bytes with its conversation", size)
        else:
            self.store.put((owner, RESPONSE, session.response["id"]), document)

    def store_reasoning(self, owner: str, name: str, fields: JSONObject) -> None:
        """Store reasoning, unless it is too large."""
        document = new_document(dump_json(fields))
        if len(document.data) <= MAX_REASONING_BYTES:
            with suppress(APIError):  # without it, the upstream gets empty reasoning
                self.store.put((owner, REASONING, name), document)

    def find_reasoning(self, owner: str, name: str) -> JSONObject:
        """Return stored reasoning, or {} if it has expired, is damaged, or the store is unavailable."""
        with suppress(APIError, ValueError):
            document = self.store.load((owner, REASONING, name))
            if document:
                return json.loads(document.data)
        return {}


# ----------------------------------------------------------------------------------------------------------------------
# Limits and usage
#
# The store counts the usage of each key, so a restart or a second process refills no limit. While the store is
# unavailable, this process counts by itself.
# ----------------------------------------------------------------------------------------------------------------------

MINUTE = 60
DAY = 86400
USAGE_DAYS = 31


def key_limit(limits: Mapping[str, int], client: ClientKey) -> int:
    """Return the limit of a key by its name, else the limit of all other keys. 0 means no limit."""
    return limits.get(client.name or "", limits[""])


def day_key(client: ClientKey, now: float) -> CounterKey:
    """Return the key of the counters of a UTC day."""
    return CounterKey(client.owner, time.strftime("day %Y-%m-%d", time.gmtime(now)), (USAGE_DAYS + 1) * DAY)


def duration(seconds: float) -> str:
    """Format seconds as OpenAI's headers do: 12s, 1m3s, 5h0m1s."""
    minutes, rest = divmod(ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s".removeprefix("0h").removeprefix("0m")


def limit_headers(what: str, limit: int, used: int, reset: float) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{what}": str(limit),
        f"x-ratelimit-remaining-{what}": str(max(0, limit - used)),
        f"x-ratelimit-reset-{what}": duration(reset),
    }


def quota_exceeded(used: int, limit: int, reset: float) -> APIError:
    return APIError(
        429,
        f"You have used {used} of today's {limit} tokens (TOKENS_PER_DAY).",
        "insufficient_quota",
        "insufficient_quota",
        headers={**NO_SDK_RETRY, "Retry-After": str(ceil(reset))})


NO_AMOUNTS: Counter[str] = Counter()


def without_expired(periods: dict[CounterKey, T]) -> dict[CounterKey, T]:
    now = time.monotonic()
    return {key: counters for key, counters in periods.items() if key.created + key.lifetime > now}


class Counters:
    """Counters in a store that may fail or have none. Amounts that the store lacks are pending. Totals are known totals
    plus pending amounts. The next successful addition sends the pending amounts of all owners."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[CounterKey, Counter[str]] = {}  # totals that the store has returned
        # Amounts that the store lacks; each Counter is replaced, never changed
        self._pending: dict[CounterKey, Counter[str]] = {}
        self._lock = threading.Lock()  # guards both
        self._sending = threading.Lock()  # held by the thread that sends pending amounts

    def add(self, key: CounterKey, amounts: Amounts) -> Counter[str]:
        """Add amounts to the counters of a period, and return the totals of the period."""
        with self._lock:
            pending = self._pending.get(key, NO_AMOUNTS)
        try:
            known = self._store.add_counters(key, amounts)
        except APIError:
            return self._total(key, pending=amounts)
        self._total(key, known)
        with suppress(APIError), held(self._sending, 0.0):  # unless another thread is sending
            for other, sent in self._pending.copy().items():
                # Until they are removed below, the amounts count twice, so that they are never missing
                self._total(other, self._store.add_counters(other, sent))
                with self._lock:
                    rest = self._pending.pop(other, NO_AMOUNTS) - sent
                    if rest:
                        self._pending[other] = rest
        # Without additions of other threads after this one: with them, a limit would refuse one chat too many
        return Counter(known) + pending

    def read(self, keys: Sequence[CounterKey]) -> list[Counter[str]]:
        """Return the totals of each period."""
        try:
            found = self._store.read_counters(keys)
        except APIError:
            return list(map(self._total, keys))
        return list(map(self._total, keys, found))

    def _total(
        self,
        key: CounterKey,
        known: Amounts = NO_AMOUNTS,
        pending: Amounts = NO_AMOUNTS,
    ) -> Counter[str]:
        """Return the totals of a period, after noting counters from the store or amounts that the store lacks."""
        with self._lock:
            if key not in self._known:
                self._known = without_expired(self._known)
                self._pending = without_expired(self._pending)
            total = self._known.setdefault(key, Counter())
            total |= known  # the larger of two values: replies may arrive in any order
            if pending:
                self._pending[key] = self._pending.get(key, NO_AMOUNTS) + Counter(pending)
            return total + self._pending.get(key, NO_AMOUNTS)


class UsageLimits:
    """The usage and limits of every key."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._settings = settings
        self._counters = Counters(store)

    def admit(self, client: ClientKey) -> dict[str, str]:
        """Count a new chat, and return headers for its response. Raises APIError 429 if the chat exceeds a limit."""
        headers: dict[str, str] = {}
        refusal: APIError | None = None
        now = time.time()
        limit = key_limit(self._settings.tokens_per_day, client)
        if limit:
            reset = DAY - now % DAY
            [counters] = self._counters.read([day_key(client, now)])
            used = sum_by_model(counters)[0]["total_tokens"]
            headers.update(limit_headers("tokens", limit, used, reset))
            if used >= limit:
                refusal = quota_exceeded(used, limit, reset)
        limit = key_limit(self._settings.requests_per_minute, client)
        if limit:
            reset = MINUTE - now % MINUTE
            minute = CounterKey(client.owner, f"minute {int(now // MINUTE)}", 2 * MINUTE)
            used = self._counters.add(minute, {"requests": int(refusal is None)})["requests"]
            headers.update(limit_headers("requests", limit, used, reset))
            if used > limit:
                refusal = refusal or APIError(
                    429,
                    f"More than {limit} chats in this minute (REQUESTS_PER_MINUTE).",
                    "rate_limit_error",
                    "rate_limit_exceeded",
                    headers={"Retry-After": str(ceil(reset))})
        if refusal:
            raise refusal.with_headers(headers)
        return headers

    def reserve(self, client: ClientKey, tokens: int) -> tuple[CounterKey, int] | None:
        """Reserve the estimated tokens of a prompt until `record` counts the used tokens. Return None for a key without
        a quota. Raises APIError 429 if used tokens and other reserved tokens exhaust the quota."""
        limit = key_limit(self._settings.tokens_per_day, client)
        if not limit:
            return None
        now = time.time()
        day = day_key(client, now)
        counters = self._counters.add(day, {"reserved": tokens})
        reserved = counters["reserved"] - counters["released"] - tokens  # by other chats
        used = sum_by_model(counters)[0]["total_tokens"] + reserved
        if used >= limit:
            self._counters.add(day, {"released": tokens})
            raise quota_exceeded(used, limit, DAY - now % DAY)
        return day, tokens

    def record(
        self,
        client: ClientKey,
        model: str,
        prompt_tokens: int,
        completion_tokens: int,
        reserved: tuple[CounterKey, int] | None,
        is_answered: bool,
    ) -> None:
        """Count the tokens of an answer. model: of a bounded set of ids; reserved: as returned by `reserve`;
        is_answered: the answer did not fail."""
        day, released = reserved or (day_key(client, time.time()), 0)
        amounts = Counter({
            f"requests {model}": int(is_answered),
            f"prompt_tokens {model}": prompt_tokens,
            f"completion_tokens {model}": completion_tokens,
            "released": released,
        })
        self._counters.add(day, +amounts)  # without zeros: a refused chat has no model

    def usage(self, client: ClientKey) -> JSONObject:
        """Return the usage of a key in the last 31 days, the oldest first, and its limits."""
        now = time.time()
        keys = [day_key(client, now - ago * DAY) for ago in reversed(range(USAGE_DAYS))]
        days = []
        for key, counters in zip(keys, self._counters.read(keys), strict=True):
            total, models = sum_by_model(counters)
            days.append({"date": key.period.removeprefix("day "), **total, "models": models})
        return {
            "object": "usage",
            "key": client.name,
            "limits": {
                "requests_per_minute": key_limit(self._settings.requests_per_minute, client),
                "tokens_per_day": key_limit(self._settings.tokens_per_day, client),
            },
            "today": without(days[-1], "models"),
            "days": days,
        }


def sum_by_model(counters: Amounts) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Sum the counters of a day, such as `prompt_tokens kimi`. Return the sums of all models, and the sums by model."""
    models: dict[str, dict[str, int]] = {}
    total = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    for name, amount in counters.items():
        what, _, model = name.partition(" ")
        if what not in total:  # reserved or released
            continue
        of_model = models.setdefault(model, dict.fromkeys(total, 0))
        for sums in (total, of_model):
            sums[what] += amount
            if what != "requests":
                sums["total_tokens"] += amount
    return total, models


# ----------------------------------------------------------------------------------------------------------------------
# Metrics
#
# Counters and histograms of this process, in Prometheus's text format 0.0.4; names, units and buckets after
# OpenTelemetry's conventions for generative AI.
# ----------------------------------------------------------------------------------------------------------------------

# Upper bounds in seconds, by their labels: 0.01 doubled up to 81.92, and infinity
BUCKETS = {**{str(0.01 * 2 ** power): 0.01 * 2 ** power for power in range(14)}, "+Inf": inf}
METRICS = {
    "kimi2api_chats_total": ("counter", "Chats, by the HTTP status of the response."),
    "kimi2api_chat_duration_seconds": ("histogram", "Time from the request to the end of the answer."),
    "kimi2api_time_to_first_chunk_seconds": ("histogram", "Time from the request to the first chunk of the answer."),
    "kimi2api_tokens_total": ("counter", "Tokens, as the upstream reports them, else by estimate."),
    "kimi2api_upstream_errors_total": ("counter", "Calls to an upstream that ended with an error."),
    "kimi2api_upstream_retries_total": ("counter", "Retries after a failure."),
    "kimi2api_upstream_healthy": ("gauge", "0 while an upstream fails, else 1."),
    "kimi2api_chats_running": ("gauge", "Chats running now."),
    "kimi2api_chats_limit": ("gauge", "Chats that may run concurrently."),
    "kimi2api_sessions": ("gauge", "Sessions and stored responses in the store."),
    "kimi2api_build_info": ("gauge", "The version."),
    "process_start_time_seconds": ("gauge", "Start of the process, in seconds since the epoch."),
}
Labels = tuple[tuple[str, str], ...]
Values = Mapping[str, Mapping[Labels, float]]  # by the metric's name, then by labels

MAX_MODEL_LABELS = 100
MAX_LABEL = 128  # characters


class Metrics:
    """Counters and histograms of this process."""

    def __init__(self, models: Iterable[str] = ()) -> None:
        """models: ids that are always labels."""
        self._models = set(models)
        # By owner, the ids of APIs' models that have answered: made-up ids of one owner must not displace another's
        self._models_by_owner: defaultdict[str, set[str]] = defaultdict(set)
        self._lock = threading.Lock()  # guards _counters
        # Also the series of histograms
        self._counters: defaultdict[str, defaultdict[Labels, float]] = defaultdict(partial(defaultdict, float))

    def count(self, metric: str, labels: Mapping[str, str], amount: float = 1) -> None:
        with self._lock:
            self._counters[metric][tuple(labels.items())] += amount

    def observe(self, metric: str, labels: Mapping[str, str], seconds: float) -> None:
        """Add a duration to a histogram, all series at once: a scrape must not see a bucket of more than all."""
        key = tuple(labels.items())
        with self._lock:
            buckets = self._counters[f"{metric}_bucket"]
            for text, bound in BUCKETS.items():
                buckets[(*key, ("le", text))] += seconds <= bound
            self._counters[f"{metric}_sum"][key] += seconds
            self._counters[f"{metric}_count"][key] += 1

    def model_label(self, owner: str, provider: str, model: str, has_answered: bool) -> str:
        """Return the model's id, or "other" to bound the labels of each owner: `*` in MODELS accepts any id."""
        models = self._models_by_owner[owner]
        has_room = len(models) < MAX_MODEL_LABELS and len(model) <= MAX_LABEL
        if has_room and has_answered and model.startswith(f"{provider}/"):
            models.add(model)
        return model if model in self._models or model in models else "other"

    def render(self, gauges: Values) -> str:
        """Return all metrics, with the values of the gauges."""
        lines = []
        with self._lock:
            values = {**self._counters, **gauges}
            for name, (kind, about) in METRICS.items():
                lines.append(f"# HELP {name} {about}")
                lines.append(f"# TYPE {name} {kind}")
                for series in (name, f"{name}_bucket", f"{name}_sum", f"{name}_count"):
                    for labels, value in values.get(series, {}).items():
                        lines.append(sample(series, labels, value))
        return "\n".join(lines) + "\n"


def sample(name: str, labels: Labels, value: float) -> str:
    pairs = [f"{label}={COMPACT_JSON.encode(text)}" for label, text in labels]  # JSON's escapes are Prometheus's
    if pairs:
        name += f"{{{','.join(pairs)}}}"
    return f"{name} {value:.17g}"


########################################################################################################################
# Part 5: HTTP client
#
# Requests to upstreams over pooled connections, within a deadline. Nothing outside this part uses requests, urllib3 or
# cloudscraper.
########################################################################################################################


# ----------------------------------------------------------------------------------------------------------------------
# Connections
#
# http.client's connections, read within a deadline. Before each slice of a wait, the waiter attends to its client.
# ----------------------------------------------------------------------------------------------------------------------

CONNECT_TIMEOUT = 10.0  # seconds for the connection, and as many for the TLS handshake
MAX_IDLE = 60.0  # seconds between two requests on a connection
MAX_INTERIM_RESPONSES = 16
# The size line of a chunk, behind the data of the previous chunk
NEXT_CHUNK = re.compile(rb"\r\n([0-9A-Fa-f]{1,15})\r\n")
TIMEOUT_PRECISION = 0.1  # seconds
READ_SIZE = 65536


class Abandoned(APIError):
    """The end of a chat for a reason outside its upstream: the client has disconnected, or the server is stopping."""


class Waiter:
    """The side that waits for an upstream: here without a client, as in --check; the subclass `Client` is a client."""

    interval = 60.0  # seconds, at most, between two calls of attend() during a wait
    must_finish = False  # the upstream call continues when the client has disconnected

    def clock(self) -> float:
        """Return the time in seconds, by the clock of deadlines."""
        return time.monotonic()

    def attend(self) -> None:
        """Serve the client before each slice of a wait. Raises Abandoned to end the call."""

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def defer(self, function: Callable[[], None]) -> None:
        """Call a function once the client has the complete response; without a client, immediately."""
        function()


class Deadline:
    """The deadline of one upstream call, and its waiter."""

    def __init__(self, timeout: float, waiter: Waiter) -> None:
        self.timeout = timeout  # seconds: REQUEST_TIMEOUT
        self.waiter = waiter
        self.is_per_read = False  # the timeout applies to each read, not to the complete call
        self.may_reuse_connection = True  # False while an answer may be left unread
        self.limit(timeout)

    def limit(self, seconds: float) -> None:
        """Set the deadline to `seconds` from now."""
        self._end = self.waiter.clock() + seconds

    @property
    def waited(self) -> float:
        """Return the seconds that the call has waited, at most its time-out."""
        return self.timeout - max(0.0, self._end - self.waiter.clock())

    def remaining(self) -> float:
        """Return the seconds until the deadline. Raises TimeoutError after it."""
        seconds = self._end - self.waiter.clock()
        if seconds <= 0:
            raise TimeoutError("timed out")
        return seconds

    def next_wait(self) -> float:
        """Let the waiter attend to its client. Return the seconds that the next slice of a wait may take."""
        self.waiter.attend()
        return min(self.remaining(), self.waiter.interval)


def set_timeout(sock: socket.socket, seconds: float) -> None:
    """Set a socket's time-out, unless it is nearly the same: setting is a system call and releases the GIL."""
    if abs(seconds - (sock.gettimeout() or inf)) > TIMEOUT_PRECISION:
        sock.settimeout(seconds)


# For StrictHTTPResponse, which http.client creates, and UpstreamConnection, which urllib3 creates
CURRENT_DEADLINE: ContextVar[Deadline] = ContextVar("current_deadline")


class SocketReader(io.RawIOBase):
    """A reader of a socket, in slices and within a deadline.

    A socket's own time-out restarts with every read, so an upstream that sends byte by byte could hold a thread for
    hours. file: http.client's socket.SocketIO, which refuses to read after a time-out, but keeps the socket open until
    close().
    """

    def __init__(self, sock: socket.socket, file: Any, deadline: Deadline) -> None:
        self.sock = sock
        self._file = file
        self.deadline = deadline
        self.is_paused = False  # reads return nothing, so that peek() returns only buffered bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.is_paused:
            return 0
        deadline = self.deadline
        if deadline.is_per_read:
            deadline.limit(deadline.timeout)
        while True:
            set_timeout(self.sock, deadline.next_wait())
            with suppress(TimeoutError):  # one slice has passed
                return self.sock.recv_into(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()


class ResponseReader(io.BufferedReader):
    """The file of a response, which http.client closes at the end of the response, before the connection is reused."""

    raw: Any  # SocketReader

    def received(self) -> bytes:
        """Return the bytes that have been received but not read."""
        self.raw.is_paused = True
        try:
            return self.peek(1)
        finally:
            self.raw.is_paused = False

    def close(self) -> None:
        if not self.closed:
            sock = self.raw.sock
            # urllib3's TLS inside a proxy's TLS cannot report whether bytes are buffered
            is_opaque = not isinstance(sock, socket.socket)
            decrypted = sock.pending() if isinstance(sock, ssl.SSLSocket) else 0
            # Unread bytes, or an answer that may belong to another request: the next request must not read them
            if is_opaque or self.received() or decrypted or not self.raw.deadline.may_reuse_connection:
                with suppress(OSError):  # already closed
                    getattr(sock, "socket", sock).shutdown(socket.SHUT_RDWR)  # TLS inside TLS has no shutdown()
        super().close()


class StrictHTTPResponse(HTTPResponse):
    """http.client's response, read within a deadline and without interim responses.

    Overrides _read_status and _read1_chunked, and reads chunk_left: private names of http.client in Python 3.10 to
    3.14.
    """

    fp: Any

    def __init__(self, sock: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        reader = SocketReader(sock, self.fp.detach(), CURRENT_DEADLINE.get())
        self.fp = ResponseReader(reader, READ_SIZE)

    def _read_status(self) -> tuple[str, int, str]:
        """Skip interim responses (RFC 9110, 15.2). http.client skips only 100, and would return 103 as the response."""
        for _ in range(MAX_INTERIM_RESPONSES):
            version, status, reason = super()._read_status()  # type: ignore[misc]
            if status >= 200:
                return version, status, reason
            parse_headers(self.fp)
        raise HTTPException("too many interim responses")

    def _read1_chunked(self, size: int) -> bytes:
        """Read a chunk and the complete chunks that are buffered behind it: APIs send each event as a chunk. Leave the
        empty last chunk, because the caller may find the answer complete before the end of the body."""
        parts = [super()._read1_chunked(size)]  # type: ignore[misc]
        if self.chunk_left == 0:
            buffered = self.fp.received()
            begin = 0
            while True:
                line = NEXT_CHUNK.match(buffered, begin)
                length = int(line[1], 16) if line else 0
                if not line or not length or line.end() + length > len(buffered):
                    break
                begin = line.end() + length
                parts.append(buffered[line.end():begin])
            self.fp.read(begin)
        return b"".join(parts)


class UpstreamConnection:
    """A mixin for urllib3's connection classes. Sending has the deadline of reading. Nothing is sent for a client that
    disconnected during connecting."""

    response_class = StrictHTTPResponse
    sock: Any
    timeout: float  # seconds for the connection, and as many for the TLS handshake
    _last_request = 0.0  # by time.monotonic()

    @property
    def is_connected(self) -> bool:
        """Return whether the next request may use the connection. NAT and standby end idle connections silently."""
        is_fresh = time.monotonic() - self._last_request < MAX_IDLE
        return is_fresh and super().is_connected  # type: ignore[misc]

    def _tunnel(self) -> None:
        super()._tunnel()  # type: ignore[misc]
        self.sock.settimeout(self.timeout)  # the proxy's response was read in slices

    def send(self, data: bytes) -> None:
        deadline = CURRENT_DEADLINE.get()
        self._last_request = time.monotonic()
        if self.sock is None:
            self.connect()  # type: ignore[attr-defined]
        unsent = memoryview(data)
        while unsent:
            seconds = deadline.next_wait()
            # TLS inside TLS loses data when a time-out interrupts it
            if not isinstance(self.sock, socket.socket):
                seconds = deadline.remaining()
            set_timeout(self.sock, seconds)
            with suppress(TimeoutError):  # one slice has passed
                unsent = unsent[self.sock.send(unsent):]


# ----------------------------------------------------------------------------------------------------------------------
# Transport
#
# Pools of connections for many threads, and the one mapping of failures to APIErrors.
# ----------------------------------------------------------------------------------------------------------------------

MAX_UPSTREAM_BYTES = 4 << 20  # of a page, an answer that is not streamed, or one event of a stream
DRAIN_SECONDS = 0.2  # to read the rest behind the end of a stream, so that its connection can be reused
MAX_RETRY_AFTER = 5.0  # seconds; a longer Retry-After is left to the client


class UpstreamResponse:
    """A response of an upstream, whose head has been read. Reading raises APIError."""

    body = b""  # after read()

    def __init__(self, transport: Transport, raw: Any, deadline: Deadline) -> None:
        self.status: int = raw.status
        self.headers: Headers = raw.headers  # urllib3's, whose names are case-insensitive
        self.raw = raw
        self.deadline = deadline
        self._transport = transport

    def read(self, limit: int = MAX_UPSTREAM_BYTES) -> bytes:
        """Read the complete body, of at most `limit` bytes, within the deadline."""
        try:
            with self._transport.translate_errors(self.deadline):
                self.body = self.raw.read(limit + 1, decode_content=True)
        finally:
            self.close()
        if len(self.body) > limit:
            raise invalid_response(self._transport.name, f"more than {limit} bytes", retryable=True)
        return self.body

    def stream(self) -> Iterator[bytes]:
        """Yield the body as it arrives."""
        with self._transport.translate_errors(self.deadline):
            while True:
                data = self.raw.read1(READ_SIZE, decode_content=True)
                if not data:
                    return
                yield data

    def drain(self) -> None:
        """Read the rest behind the end of a stream, so that the connection can be reused. Close it if this fails."""
        self.deadline.waiter = Waiter()  # the client's response has ended, so no keep-alive comment may follow
        self.deadline.is_per_read = False
        self.deadline.limit(DRAIN_SECONDS)
        with suppress(APIError):
            next(self.stream(), None)
        self.close()

    def close(self) -> None:
        """Close the connection, unless it is back in the pool because the body has been read to its end."""
        self.raw.close()


class Transport:
    """A sender of requests to an upstream over pooled connections. Thread-safe. Every failure is an APIError.

    requests.Session merges settings, cookies, proxies and .netrc for each request, which takes several times as long
    as the transfer. Transport merges settings once per host, and uses urllib3's pool. Redirects are not followed.
    """

    def __init__(
        self,
        name: str,
        connections: int,
        adapter: HTTPAdapter | None = None,
    ) -> None:
        self.name = name
        self._adapter = adapter or HTTPAdapter()
        self._adapter.init_poolmanager(10, connections)
        self._pools: dict[str, Any] = {}  # by the URL of a host
        # Guards _pools, the creation of pools, and the cookies of Scraper
        self._lock = threading.Lock()

    def request(
        self,
        method: str,
        url: str,
        headers: Headers,
        body: bytes | None,
        deadline: Deadline,
    ) -> UpstreamResponse:
        parts = urlsplit(url)
        if parts.username or parts.password:
            url = without_credentials(url)
            credentials = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
            headers = {**headers, "Authorization": f"Basic {b64encode(credentials.encode()).decode()}"}
        previous = CURRENT_DEADLINE.set(deadline)
        try:
            with self.translate_errors(deadline):
                pool = self._pool(url)
                target = urlunsplit(("", "", parts.path or "/", parts.query, ""))
                if pool.proxy and parts.scheme == "http":  # absolute-form (RFC 9112, 3.2.2)
                    target = url
                raw = pool.urlopen(
                    method,
                    target,
                    body,
                    dict(headers),
                    retries=False,
                    redirect=False,
                    preload_content=False,
                    assert_same_host=False,
                    timeout=Timeout(connect=min(CONNECT_TIMEOUT, deadline.remaining())),
                )
        finally:
            CURRENT_DEADLINE.reset(previous)
        return UpstreamResponse(self, raw, deadline)

    def _pool(self, url: str) -> Any:
        """Return the connection pool for a URL's host. The environment names proxies and certificates: HTTPS_PROXY,
        NO_PROXY, REQUESTS_CA_BUNDLE, …"""
        origin = f"{url_origin(url)}/"
        with self._lock:
            if origin not in self._pools:
                environment = requests.Session().merge_environment_settings(origin, {}, None, None, None)
                # A proxy's loopback is another machine
                proxies = {} if is_loopback(urlsplit(origin).hostname) else environment["proxies"]
                request = requests.Request("GET", origin).prepare()
                try:
                    pool: Any = self._adapter.get_connection_with_tls_context(request, environment["verify"], proxies)
                except (ValueError, HTTPError) as error:  # requests' errors are ValueErrors
                    proxy = select_proxy(origin, proxies)
                    names = [name for name, value in os.environ.items() if value == proxy] or ["the proxy"]
                    raise upstream_error(
                        502, "upstream_unavailable", f"{self.name} cannot be reached: {names[0]} cannot be used "
                        f"({root_reason(error)}). A SOCKS proxy is written socks5h://HOST:PORT, and needs: "
                        "pip install PySocks") from None
                pool.conn_kw["socket_options"] = [
                    *pool.ConnectionCls.default_socket_options, (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
                ]
                # urllib3 has one pool for all spellings of a host; the pool may have our class already
                pool.ConnectionCls = type("Connection", (UpstreamConnection, type(pool).ConnectionCls), {})
                self._pools[origin] = pool
            return self._pools[origin]

    def forget_connections(self) -> None:
        """Let no later request use the present connections. urllib3 closes them when the last request of their pool
        ends."""
        with self._lock:
            self._adapter.close()
            self._pools.clear()

    @contextmanager
    def translate_errors(self, deadline: Deadline) -> Iterator[None]:
        """Raise APIError for any failure to connect, send or read."""
        try:
            yield
        # RequestException is for the invalid URL of a proxy or a redirect
        except (TimeoutError, HTTPError, requests.RequestException) as error:
            # Frames of urllib3's functions, and of contextlib's, refer to the error: without these two lines, the cycle
            # keeps the request in memory
            clear_frames(error.__traceback__)
            error.__traceback__ = None
            cause = root_cause(error)
            if isinstance(cause, TimeoutError):
                message = f"{self.name} did not answer within {round(deadline.waited, 1):g} s."
                # No retry: the upstream may have accepted the prompt
                raise upstream_error(504, "upstream_timeout", message, headers=NO_SDK_RETRY) from None
            if isinstance(error, DecodeError):
                raise invalid_response(self.name, "an answer that cannot be decoded", retryable=True) from None
            what = f"cannot be reached: {root_reason(cause)}"
            if isinstance(cause, IncompleteRead):
                what = "closed the connection before the end of its answer"
            raise upstream_error(502, "upstream_unavailable", f"{self.name} {what}.", retryable=True) from None


def url_origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def root_cause(error: BaseException) -> BaseException:
    """Return the innermost of errors that wrap one another."""
    cause = error.__cause__ or error.__context__
    if cause is None or isinstance(error, IncompleteRead):  # its cause is how http.client parses numbers
        return error
    return root_cause(cause)


def root_reason(error: BaseException) -> str:
    """Return the innermost error's message, without the URLs and object names in the errors that wrap it."""
    error = root_cause(error)
    reason = plain_line(getattr(error, "strerror", None) or str(error).strip(" :.") or type(error).__name__)
    return re.sub(r"//\S*@", "//…@", reason)


def rate_limited(message: str, type: str, code: str, headers: Headers) -> APIError:
    """Return an APIError 429 with the upstream's Retry-After, retryable only if the wait is known and short."""
    wait = parse_retry_after(headers)
    error = APIError(429, message, type, code)
    if wait is None:
        return error
    return error.copy(
        headers={"Retry-After": str(ceil(wait))}, retryable=wait <= MAX_RETRY_AFTER, retry_after=wait)


def parse_retry_after(headers: Headers) -> float | None:
    """Return the seconds to wait by `retry-after-ms` or Retry-After (RFC 9110: seconds or a date), or None."""
    for name, unit in (("retry-after-ms", 0.001), ("Retry-After", 1.0)):
        text = headers.get(name, "").strip()[:100]
        if re.fullmatch(r"\d{1,9}(\.\d+)?", text):
            return float(text) * unit
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


# ----------------------------------------------------------------------------------------------------------------------
# Scraper
#
# Requests like a browser's, for the web chat's site. TLS ciphers, headers and the cookie jar are cloudscraper's. No
# challenge is solved: Cloudflare no longer serves challenges that cloudscraper can solve.
# ----------------------------------------------------------------------------------------------------------------------

MAX_COOKIE_BYTES = 8 << 10  # of all cookies; servers refuse longer headers


class Scraper(Transport):
    """A transport that sends requests as a browser does, with cookies. Thread-safe."""

    # cloudscraper's own list ends with Chrome 76
    USER_AGENT = (
        "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) "
        "Chrome/142.0.0.0 Safari/537.36")

    def __init__(self, name: str, connections: int) -> None:
        browser = cloudscraper.CloudScraper(browser={"browser": "chrome", "platform": "windows", "mobile": False})
        super().__init__(name, connections, browser.get_adapter("https://"))
        self._headers = {**browser.headers, "User-Agent": self.USER_AGENT}
        self._cookies = browser.cookies  # cookie jars are not thread-safe

    def request(
        self,
        method: str,
        url: str,
        headers: Headers,
        body: bytes | None,
        deadline: Deadline,
    ) -> UpstreamResponse:
        """Send a request, and read the response to its end."""
        request = requests.PreparedRequest()
        request.url = url  # a cookie jar reads the URL and the headers
        sent = {**self._headers, **headers}
        request.headers = sent  # type: ignore[assignment]  # a plain dict is enough here
        with self._lock:
            cookies = get_cookie_header(self._cookies, request)
        if cookies:
            sent["Cookie"] = cookies
        response = super().request(method, url, sent, body, deadline)
        if "Set-Cookie" in response.headers:
            with self._lock:
                extract_cookies_to_jar(self._cookies, request, response.raw)
                if sum(len(f"{cookie.name}={cookie.value}") for cookie in self._cookies) > MAX_COOKIE_BYTES:
                    self._cookies.clear()
        response.read()
        return response


# ----------------------------------------------------------------------------------------------------------------------
# Cached fetches
#
# Values from upstreams that all chats share, such as the nonce.
# ----------------------------------------------------------------------------------------------------------------------


class Cached(Generic[T]):
    """A value that all chats share. A separate thread fetches it once for all waiting chats."""

    def __init__(
        self,
        name: str,
        fetch: Callable[[], T],
        max_age: float,
    ) -> None:
        self._fetch = fetch
        self._max_age = max_age  # seconds from the start of a fetch to the next
        self._thread = ThreadPoolExecutor(1, name)
        self._lock = threading.Lock()  # guards the fields below
        self._latest: Future[T] | None = None
        self._began = 0.0  # when the latest fetch began, by time.monotonic()

    def latest(self) -> Future[T]:
        """Return the latest fetch, running or done. Start a fetch if there is none, or if it failed or is too old."""
        with self._lock:
            fetch = self._latest
            is_old = time.monotonic() - self._began >= self._max_age
            if fetch is None or (fetch.done() and (is_old or fetch.exception())):
                self._began = time.monotonic()
                fetch = self._latest = self._thread.submit(self._fetch)
            return fetch

    def wait(self, waiter: Waiter) -> Future[T]:
        """Wait for the latest fetch, which has its own deadline, and return it. Raises the fetch's error."""
        fetch = self.latest()
        while not fetch.done():
            waiter.attend()
            with suppress(FutureTimeout):
                fetch.exception(waiter.interval)
        error = fetch.exception()
        if isinstance(error, APIError):
            raise error.copy()
        return fetch

    def invalidate(self, fetch: Future[T]) -> None:
        """Discard this fetch if it is the latest: the next caller starts another."""
        with self._lock:
            if self._latest is fetch:
                self._latest = None


########################################################################################################################
# Part 6: Upstreams
#
# A provider turns a request into a stream of deltas: Kimi's web chat, which takes and returns plain text, or an
# OpenAI-style API.
########################################################################################################################


# ----------------------------------------------------------------------------------------------------------------------
# Circuit breaker
#
# An upstream that keeps failing is not called for a while: callers immediately get an error.
# ----------------------------------------------------------------------------------------------------------------------

FAILURES_TO_OPEN = 5  # in a row
# Seconds that the circuit stays open, doubled each time, and at most
FIRST_PAUSE, MAX_PAUSE = 1.0, 60.0
FAILING_MAX_AGE = 600.0  # seconds after the last failure; clients may never use the failing model again


class CircuitBreaker:
    """The circuit breaker of one model of an upstream.

    Closed: calls go through. Open, after FAILURES_TO_OPEN failures in a row: calls are refused. Half-open, after a
    pause: one call is a probe. Until a probe succeeds, another call is a probe after each further pause, which is twice
    as long as the pause before.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()  # guards all below; never held during a call
        self._failures = 0
        # For calls that are refused while the circuit is open or half-open
        self._error: APIError | None = None
        self._pause = FIRST_PAUSE  # seconds
        self._open_until = 0.0  # by time.monotonic()
        # Since when (seconds since the epoch) and why calls fail
        self._failing: tuple[float, str] | None = None
        self._last_failure = 0.0  # by time.monotonic()

    @property
    def failing(self) -> tuple[float, str] | None:
        """Return since when (seconds since the epoch) and why calls fail, or None if they do not."""
        is_recent = time.monotonic() - self._last_failure < FAILING_MAX_AGE
        return self._failing if is_recent else None

    def allow(self) -> None:
        """Let a call through, or raise APIError with Retry-After."""
        with self._lock:
            if self._error is None:
                return
            now = time.monotonic()
            wait = self._open_until - now
            if wait > 0:
                raise self._error.copy(headers={"Retry-After": str(ceil(wait))})
            # Until the next pause has passed, this call alone is a probe, even if it hangs
            self._pause = min(2 * self._pause, MAX_PAUSE)
            self._open_until = now + self._pause

    def record_end(self, error: APIError | None) -> None:
        """Count the end of a call. error: None for a success."""
        with self._lock:
            if error is None or (error.status < 500 and error.status != 429):
                self._failing = None
            else:
                self._failing = self.failing or (time.time(), error.reason)
                self._last_failure = time.monotonic()
            # An upstream that refuses a request works
            if error is None or error.status < 500 or error.code in ("upstream_refused", "upstream_auth"):
                self._failures = 0
                self._error = None
                self._pause = FIRST_PAUSE
            # Calls that began before the circuit opened do not count
            elif self._error is None:
                self._failures += 1
                if self._failures >= FAILURES_TO_OPEN:
                    # Without the upstream's message, which may quote another caller's prompt
                    code = "upstream_unavailable" if error.quotes_upstream else error.code or error.type
                    message = f"after {self._failures} failures in a row it is not called for now: HTTP {error.status}."
                    self._error = upstream_error(error.status, code, f"{self._name}: {message}")
                    self._open_until = time.monotonic() + self._pause
                    log.warning("%s failed %d times in a row; not called for now", self._name, self._failures)


# ----------------------------------------------------------------------------------------------------------------------
# Providers
#
# The statistics of an answer, and the base class of providers, with retries and circuit breakers.
# ----------------------------------------------------------------------------------------------------------------------

MAX_BREAKERS = 1000  # of one provider, because a client may make up any number of models
# Seconds before the first retry, doubled each time, and at most
FIRST_BACK_OFF, MAX_BACK_OFF = 0.25, 4.0


def newest_entries(entries: dict[Any, T], count: int) -> dict[Any, T]:
    """Return the last `count` entries."""
    return dict(list(entries.items())[-count:])


class AnswerStats:
    """The statistics of one answer, for usage and metrics."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        # Of the key's quota, until the answer is counted
        self.reserved: tuple[CounterKey, int] | None = None
        self.messages: list[Message] = []  # of the prompt
        self.start("", "")

    def start(self, provider: str, model: str) -> None:
        """Begin the statistics of the answer of a provider, the first or a fallback."""
        self.provider = provider
        self.model = model  # the id for clients
        self.first_chunk: float | None = None  # seconds after `began`
        self.fold = Fold()  # the provider adds each chunk before yielding it

    def watch(self, deltas: Iterator[Delta]) -> Iterator[Delta]:
        """Yield the deltas of the provider's answer, then its usage."""
        for delta in deltas:
            if self.first_chunk is None:
                self.first_chunk = time.monotonic() - self.began
            yield delta
        usage = self.usage()
        self.fold.replace_usage(usage)
        yield Delta({"choices": [], "usage": usage})

    def usage(self) -> JSONObject:
        """Return the usage as the upstream reports it. Missing or impossible numbers are estimated."""
        reported = self.fold.usage or {}
        prompt = usage_count(reported, "prompt_tokens") or estimate_tokens("\n".join(map(message_text, self.messages)))
        completion = usage_count(reported, "completion_tokens") or estimate_tokens("".join(self.fold.texts()))
        # xAI counts reasoning only in the total
        total = max(prompt + completion, usage_count(reported, "total_tokens"))
        return {
            **reported,
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": total,
        }

    def tokens(self) -> tuple[int, int]:
        """Return the number of tokens in the prompt, and of all other tokens."""
        usage = self.usage()
        prompt: int = usage["prompt_tokens"]
        return prompt, usage["total_tokens"] - prompt


@dataclass(frozen=True)
class ProviderRequest:
    """A chat request for a provider, with its session and its client."""

    request: ChatRequest
    model: str  # its name at the upstream
    history: Turns = ()  # of the session
    session_id: str = ""
    owner: str = ""  # of the session: the hash of a key
    # The default stores nothing
    sessions: Sessions = field(default_factory=lambda: Sessions(MemoryStore(0.0, 0)))
    stats: AnswerStats = field(default_factory=AnswerStats)
    waiter: Waiter = field(default_factory=Waiter)


Embeddings = tuple[JSONObject, Headers]  # an answer, and headers for the response


class Provider:
    """An upstream. Subclasses implement its protocol.

    An OpenAI-style API needs no code: list its name in PROVIDERS, and set NAME_API_KEY and NAME_BASE_URL. Any other
    upstream needs a subclass with `stream` and `reach`, an entry in Providers, and its model ids in Settings.resolve.
    """

    def __init__(self, name: str, settings: Settings, metrics: Metrics) -> None:
        self.name = name
        self._breakers: dict[str, CircuitBreaker] = {}  # by model
        self._lock = threading.Lock()  # guards _breakers
        self._settings = settings
        self._metrics = metrics

    def stream(self, chat: ProviderRequest) -> Iterator[Delta]:
        """Yield the answer. Raises APIError, also after the first deltas."""
        raise NotImplementedError

    def embed(self, body: JSONObject, waiter: Waiter) -> Embeddings:
        """Return the answer to a request for embeddings. Raises APIError."""
        raise bad_request(
            "The web chat does not support embeddings; use a model of a configured API.",
            "model", "unsupported_value")

    def models(self, wait: float) -> Mapping[str, JSONObject]:
        """Return the models that the upstream lists, by id, waiting at most `wait` seconds for a newer list."""
        return {}

    def reach(self) -> tuple[str, str]:
        """Connect to the upstream without a chat. Return what succeeded, and a model to ask. Raises APIError."""
        raise NotImplementedError

    def check(self) -> Iterator[tuple[str, APIError | None]]:
        """Test the upstream step by step. Yield each step, and its error or None."""
        step = "connection"
        try:
            reached, model = self.reach()
            yield reached, None
            step = "question"
            # Prefer a model that the settings name
            for configured in (*self._settings.fallback_models, *self._settings.models):
                provider, upstream_model = self._settings.resolve(configured) or ("", "")
                if provider == self.name:
                    model = upstream_model
                    break
            question = ChatRequest.parse(b'{"messages": [{"role": "user", "content": "Reply with the one word: OK"}]}')
            deque(self.stream(ProviderRequest(question, model, session_id=random_hex())), maxlen=0)
            yield "question answered", None
        except APIError as error:
            yield step, error

    @property
    def failing(self) -> tuple[float, str] | None:
        """Return since when (seconds since the epoch) and why a model fails, or None if no model fails."""
        with self._lock:
            return min(
                filter(None, (breaker.failing for breaker in self._breakers.values())),
                default=None,
            )

    @contextmanager
    def _through_breaker(self, model: str) -> Iterator[None]:
        """Let the circuit breaker of the model refuse the call in this context, or count its end. Raises APIError."""
        with self._lock:
            breaker = self._breakers.pop(model, None) or CircuitBreaker(self.name)
            self._breakers = newest_entries({**self._breakers, model: breaker}, MAX_BREAKERS)
        breaker.allow()
        try:
            yield
        except APIError as error:
            if not isinstance(error, Abandoned):
                breaker.record_end(error)
                # The number of an API's own codes is unbounded
                code = f"http_{error.status}" if error.quotes_upstream else str(error.code)
                self._metrics.count("kimi2api_upstream_errors_total", {"provider": self.name, "code": code})
            raise
        breaker.record_end(None)

    def _retry(self, attempt: Callable[[], T], waiter: Waiter) -> T:
        """Call attempt(), retrying up to MAX_RETRIES times on retryable errors."""
        retries = 0
        while True:
            waiter.attend()
            try:
                return attempt()
            except APIError as error:
                if not error.retryable or retries >= self._settings.max_retries:
                    raise error.with_headers(NO_SDK_RETRY) if retries else error from None
                back_off = min(FIRST_BACK_OFF * 2 ** retries, MAX_BACK_OFF) * random.uniform(0.5, 1)
                pause = error.retry_after or back_off
                retries += 1
                self._metrics.count("kimi2api_upstream_retries_total", {"provider": self.name})
                log.warning(
                    "%s: %s; retry %d of %d in %.1f s",
                    self.name, error.reason, retries, self._settings.max_retries, pause)
                waiter.sleep(pause)


# ----------------------------------------------------------------------------------------------------------------------
# Web chat: prompts
#
# Requests as plain text: history, tools and the format of the answer in words. All functions are pure, and take time
# linear in the request.
# ----------------------------------------------------------------------------------------------------------------------

# The names that the site's public clients use
SPEAKERS = {"user": "用户", "assistant": "模型", "tool": "工具"}
TOOLS_FOLLOW = "You get the results and go on. Tools:"
JSON_ONLY = "Answer with one JSON document and nothing else"
# Characters of a clipped tool result, including its speaker and CLIPPED
MIN_RESULT = 80
CLIPPED = " [… clipped …] "


class Prompt:
    """A chat request as one text for the web chat.

    A text longer than the limit loses, in this order, until it fits:

    - tools longer than a third of the limit, the last first, unless the model must call a tool
    - the past beyond a third of the limit, the oldest first
    - the middle of results in the last round of tool calls, down to a third of the limit each
    - more of all three, regardless of the thirds, but MIN_RESULT characters of each result stay
    """

    def __init__(
        self, request: ChatRequest, history: Turns, limit: int, retry_note: str = "",
    ) -> None:
        """limit: characters; retry_note: why the model's last answer was unusable.

        Raises APIError 400 if the shortest text is too long, or if the messages have no text.
        """
        turns = append_turns(history, request.turns)
        write = partial(write_message, functions=called_functions(turns))
        *older, newest = turns or [()]
        question, *rounds = split_rounds(newest)
        last_round = rounds.pop() if rounds else []
        self.limit = limit
        self.system = join_lines(map(message_text, filter(is_system, request.messages)))
        self.call_instruction = call_instruction(request)
        self.tools = list(map(describe_tool, request.tools))
        # About the format of the answer
        self.rules = join_lines([form_instruction(request.body), retry_note])
        # Older turns, then older rounds of tool calls, which follow the question in the text
        self.past = ["\n".join(map(write, messages)) for messages in (*older, *rounds)]
        self.rounds = len(rounds)  # of tool calls, in `past`
        self.question = "\n".join(map(write, question))
        self.last_round = list(map(write, last_round))
        if len(newest) == 1 and self.text == self.question:
            self.question = message_text(newest[0])  # a lone message needs no speaker
        for share in (limit // 3, 0):
            if not request.must_call:
                self.tools = drop_first(self.tools[::-1], self.excess, share)[::-1]
            beyond_share = len(join_lines(self.past)) - share
            self.past = drop_first(self.past, min(self.excess, beyond_share))
            clip_results(self.last_round, self.excess, max(share, MIN_RESULT))
        if self.excess > 0:
            raise self.too_long()
        if not self.text.strip():
            raise bad_request("'messages' contain no text.", "messages")

    @property
    def tool_section(self) -> list[str]:
        return [self.call_instruction, *self.tools] if self.tools else []

    @property
    def text(self) -> str:
        turns = max(0, len(self.past) - self.rounds)
        head = join_lines([self.system, *self.tool_section, self.rules])
        body = join_lines([*self.past[:turns], self.question, *self.past[turns:], *self.last_round])
        return "\n\n".join(filter(None, [head, body]))

    @property
    def excess(self) -> int:
        """Return the number of characters beyond the limit."""
        return len(self.text) - self.limit

    def too_long(self) -> APIError:
        """Return the error with OpenAI's wording, for which clients search."""
        texts = {
            "system": self.system,
            "tools": join_lines(self.tool_section),
            "response format": self.rules,
            "newest message": join_lines([self.question, *self.last_round]),
        }
        size = sum(map(len, texts.values()))
        parts = ", ".join(f"{name} {len(text)}" for name, text in texts.items() if text)
        return bad_request(
            f"This model's maximum context length is {self.limit} characters (CONTEXT_MAX_LENGTH). Your messages have "
            f"{size}: {parts}. Please reduce the length of the messages, or set FALLBACK_MODELS to an "
            "official API (context_length_exceeded).", "messages", "context_length_exceeded")


def join_lines(lines: Iterable[str]) -> str:
    return "\n".join(filter(None, lines))


def drop_first(texts: list[str], excess: int, longer_than: int = 0) -> list[str]:
    """Drop the first texts longer than `longer_than` until `excess` characters are dropped. Return the other texts."""
    kept = []
    for text in texts:
        if excess > 0 and len(text) > longer_than:
            excess -= len(text) + 1
        else:
            kept.append(text)
    return kept


def clip_results(lines: list[str], excess: int, shortest: int) -> None:
    """Cut `excess` characters out of the middle of tool results, but leave `shortest` of each."""
    for index, line in enumerate(lines):
        half = (max(shortest, len(line) - excess) - len(CLIPPED)) // 2
        clipped = line[:half] + CLIPPED + line[-half:]
        if excess > 0 and len(clipped) < len(line) and line.startswith(SPEAKERS["tool"]):
            lines[index] = clipped
            excess -= len(line) - len(clipped)


def split_rounds(turn: Turn) -> list[list[Message]]:
    """Split a turn: the messages before the first tool call, then each round of tool calls with their results."""
    rounds: list[list[Message]] = [[]]
    for message in turn:
        if message.get("tool_calls"):
            rounds.append([])
        rounds[-1].append(message)
    return rounds


def called_functions(turns: Iterable[Turn]) -> dict[str, str]:
    """Return the names of called functions by call id."""
    names = {}
    for turn in turns:
        for message in turn:
            for call in message.get("tool_calls") or ():
                names[call.get("id") or ""] = call["function"]["name"]
    return names


def write_message(message: Message, functions: Mapping[str, str]) -> str:
    role: str = message["role"]
    speaker = SPEAKERS.get(role, role)
    if message.get("tool_call_id") in functions:
        speaker += f" {functions[message['tool_call_id']]}"
    calls = ""
    for call in message.get("tool_calls") or ():
        function = call["function"]
        calls += f'<tool_call>{{"name": "{function["name"]}", "arguments": {function["arguments"]}}}</tool_call>'
    return f"{speaker}: {message_text(message)}{calls}"


def call_instruction(request: ChatRequest) -> str:
    how = "You must call" if request.must_call else "You may call"
    what = "one tool" if request.body.get("parallel_tool_calls") is False else "tools"
    return (
        f'{how} {what} by answering <tool_call>{{"name": …, "arguments": {{…}}}}</tool_call>, '
        f"arguments being JSON. {TOOLS_FOLLOW}")


def answer_schema(body: JSONObject) -> Schema | None:
    """Return the schema of the requested JSON document, or None for text."""
    answer = body.get("response_format") or {}
    if answer.get("type") == "json_schema":
        return answer["json_schema"]["schema"]
    return {"type": "object"} if answer.get("type") == "json_object" else None


def form_instruction(body: JSONObject) -> str:
    schema = answer_schema(body)
    return "" if schema is None else f"{JSON_ONLY}, valid by this schema: {dump_json(schema).decode()}"


def describe_tool(tool: JSONObject) -> str:
    """Describe a tool briefly."""
    schema = tool.get("parameters") or {}
    form = dump_json(schema).decode()
    if '"$ref"' not in form:
        with suppress(AttributeError, TypeError):  # of an invalid schema
            form = signature(schema)
    purpose = " ".join((tool.get("description") or "").split())
    return f"- {tool['name']}{form}: {purpose}".removesuffix(": ")


def signature(schema: Any) -> str:
    """Write a JSON schema in the short form of a type: {city: string, days?: integer, unit?: "C"|"F"}."""
    if not isinstance(schema, dict) or not schema.keys() & {"type", "enum", "properties"}:
        return dump_json(schema).decode()
    kind = schema.get("type")
    if schema.get("enum"):
        return "|".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
    if "properties" in schema:
        required = set(schema.get("required") or ())
        fields = []
        for name, field_schema in schema["properties"].items():
            optional = "" if name in required else "?"
            fields.append(f"{name}{optional}: {signature(field_schema)}")
        return "{" + ", ".join(fields) + "}"
    if kind == "array" and schema.get("items"):
        return f"[{signature(schema['items'])}]"
    if isinstance(kind, list):
        return "|".join(map(str, kind))
    return str(kind)


# ----------------------------------------------------------------------------------------------------------------------
# Web chat: reading answers
#
# Tool calls and JSON documents in the plain text of a model. The text may be hostile, so reading takes linear time.
# ----------------------------------------------------------------------------------------------------------------------

ToolCall = tuple[str, str]  # the function's name, and its arguments as JSON


class UnusableAnswer(Exception):
    """An answer without the requested tool call or JSON. The message tells the model what was wrong."""


def parse_answer(
    text: str, request: ChatRequest, allow_unknown_tools: bool = False,
) -> tuple[str, list[ToolCall]]:
    """Return the content and the tool calls of a model's answer. Raises UnusableAnswer.

    allow_unknown_tools: also return calls of tools that were not offered; agents reply that there is no such tool.
    """
    if request.tools:
        content, calls = parse_tool_calls(text, request, allow_unknown_tools)
        if calls:
            if request.body.get("parallel_tool_calls") is False:
                del calls[1:]
            return content, calls
        if request.must_call:
            raise UnusableAnswer("it must contain a tool call.")
    schema = answer_schema(request.body)
    if schema is None:
        return text, []
    kind = {"object": dict, "array": list}.get(str(schema.get("type")), object)
    return parse_document(text, kind), []


# The form that call_instruction() requests, and the form in Kimi K2's training
CALL = re.compile(r"""<tool_call>\s*(?:```\w*\s*)?
    |<\|tool_call_begin\|>\s*(?:functions\.)?(?P<name>[\w.-]{1,128}?)(?::\d{1,9})?\s*
    (?:<\|tool_call_argument_begin\|>\s*|(?=<\|tool_call_end\|>))
    """, re.X)
NO_ARGUMENTS = re.compile(r"\s*(?:<\|tool_call_end\|>|\Z)")
NEXT_CALL = re.compile(r"\s*,?\s*(?={)")  # inside the same <tool_call>
CALL_END = re.compile(r"\s*(?:```\s*)?(?:</tool_call>|<\|tool_call_end\|>)?")
CALL_LEFTOVERS = re.compile(r"<\|tool_calls?_section_(?:begin|end)\|>|```\w*\s*```")


def parse_tool_calls(
    text: str, request: ChatRequest, allow_unknown_tools: bool,
) -> tuple[str, list[ToolCall]]:
    """Return the text around the calls, and the calls. Raises UnusableAnswer for an invalid call."""
    offered = {tool["name"] for tool in request.tools}
    calls = []
    around = []
    at = 0
    while True:
        begin = CALL.search(text, at)
        if not begin:
            break
        around.append(text[at:begin.start()])
        at = begin.end()
        value: Any = {}
        if not (begin["name"] and NO_ARGUMENTS.match(text, at)):
            value, at = decode_json(text, at)
        if begin["name"]:
            values = [{"name": begin["name"], "arguments": value}]
        else:
            values = value if isinstance(value, list) else [value]
            while following := NEXT_CALL.match(text, at):
                value, at = decode_json(text, following.end())
                values.append(value)
        for value in values:
            calls.append(parse_call(value, offered, allow_unknown_tools))
        end = CALL_END.match(text, at)
        at = end.end() if end else at
    if calls:
        around.append(text[at:])
        return CALL_LEFTOVERS.sub("", "".join(around)).strip(), calls
    with suppress(ValueError):
        value = parse_json(strip_code_fence(text))
        if isinstance(value, dict) and str(value.get("name")) in offered and "arguments" in value:
            # The answer is one call without <tool_call>
            return "", [parse_call(value, offered, allow_unknown_tools)]
    return text, []


def parse_call(value: Any, offered: set[str], allow_unknown_tools: bool) -> ToolCall:
    if not isinstance(value, dict):
        value = {}
    name = value.get("name")
    arguments = value.get("arguments") or value.get("parameters") or {}
    if isinstance(arguments, str):  # JSON in a string, as in OpenAI's API
        try:
            arguments = parse_json(arguments)
        except ValueError as error:
            raise UnusableAnswer(f"its arguments are not valid JSON: {error}") from None
    if not isinstance(name, str) or not name or (name not in offered and not allow_unknown_tools):
        raise UnusableAnswer(f"there is no tool {str(name)[:100]!r}; there are {', '.join(sorted(offered))}.")
    if not isinstance(arguments, dict):
        raise UnusableAnswer(f"the arguments of {name} must be a JSON object.")
    return name, replace_lone_surrogates(json.dumps(arguments, ensure_ascii=False))


BRACKET = re.compile(r"[{}\[\]]")
# Brackets such as {x} or [1st], which are not JSON and contain no JSON
PROSE = re.compile(r"""{(?!\s*["'])[^{}\[\]]*}|\[(?!\s*["'])[^{}\[\]]*\]""")
# Brackets to try. A failed attempt takes time linear in the text before the bracket: its message has a line number
MAX_BRACKETS = 100


def parse_document(text: str, kind: type) -> str:
    """Return the JSON document of a type in an answer: the complete text, or the longest one between prose and fences.

    Raises UnusableAnswer, also for a bracket that belongs neither to a document nor to prose: a part of a broken
    document must not pass for a document.
    """
    with suppress(ValueError):
        if isinstance(parse_json(text), kind):
            return text.strip()
    longest = ""
    at = 0
    for _ in range(MAX_BRACKETS):
        bracket = BRACKET.search(text, at)
        if not bracket:
            break
        start = bracket.start()
        try:
            value, at = decode_json(text, start)
        except UnusableAnswer:
            prose = PROSE.match(text, start)
            if not prose:
                raise
            at = prose.end()
        else:
            if isinstance(value, kind) and at - start >= len(longest):
                longest = text[start:at]
    else:
        raise UnusableAnswer("there are too many brackets in it.")
    if not longest:
        raise UnusableAnswer("there is no JSON document of the right kind in it.")
    return longest


def decode_json(text: str, start: int) -> tuple[Any, int]:
    """Return the JSON value that begins at an index, and the index behind the value. Raises UnusableAnswer."""
    try:
        value, end = STRICT_JSON.raw_decode(text, start)
        check_depth(value)
        return value, end
    except (ValueError, RecursionError) as error:
        raise UnusableAnswer(f"not valid JSON: {error}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Web chat: provider
#
# A WordPress site behind Cloudflare. The chat page carries a nonce; each chat posts a form, and its answer is one JSON
# object.
# ----------------------------------------------------------------------------------------------------------------------

NONCE_MAX_AGE = 11 * 3600  # seconds; WordPress accepts a nonce for 12 to 24 hours
MAX_REDIRECTS = 4
CHALLENGE = re.compile(rb"challenge-(?:form|platform)|cf[-_]chl|jschl|<title>(?:Just a moment|Attention Required)")
# Cloudflare's own errors, as a web page, as text, and as problem details (RFC 9457)
CLOUDFLARE_ERROR = re.compile(rb"\s*(?:<|error code: 1\d\d\d|{[^{}]*cloudflare)", re.I)


class StaleNonce(APIError):
    """A refusal by the web chat that may be due to an expired nonce."""


# In the chat page: var kimi_ajax = {"ajax_url": "…", "nonce": "…"}; KimiProvider._post sends it
NONCE = re.compile(r"""["']?\bnonce["']?\s{0,99}:\s{0,99}["']([\w-]{1,99})["']""")


def find_nonce(html: str) -> str | None:
    """Return the first nonce after `kimi_ajax` in the same script, or None."""
    for script in html.split("</script>"):
        found = NONCE.search(script.partition("kimi_ajax")[2])
        if found:
            return found[1]
    return None


class KimiProvider(Provider):
    """Kimi's web chat."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        super().__init__(WEB_CHAT, settings, metrics)
        self._nonce = Cached("nonce", self._fetch_nonce, NONCE_MAX_AGE)
        self._page_url = without_credentials(settings.chat_page_url)  # for messages and headers

    @cached_property
    def _scraper(self) -> Scraper:
        """Create the scraper at its first use: its certificates slow the start and take 1 MB."""
        return Scraper("The web chat", 2 * self._settings.max_concurrent_chats[""])

    def stream(self, chat: ProviderRequest) -> Iterator[Delta]:
        request = chat.request
        reject_unsupported(request)
        chat.waiter.must_finish = bool(request.user)  # the session stores the turn
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
        dropped = len(request.tools) - len(prompt.tools)
        if dropped:
            delta.headers = {"X-Kimi2api-Tools-Dropped": str(dropped)}
            log.info("%d of %d tools did not fit into the prompt", dropped, len(request.tools))
        chat.stats.fold.add({**delta.chunk, "usage": {"prompt_tokens": estimate_tokens(prompt.text)}})
        yield delta

    def _answer(self, chat: ProviderRequest) -> tuple[Prompt, str, list[ToolCall]]:
        """Return the prompt, and the content and tool calls of the answer. Retry once if the answer is unusable."""
        request = chat.request
        limit = self._settings.context_max_length
        prompt = Prompt(request, chat.history, limit)
        text = self._ask(prompt.text, chat)
        try:
            return prompt, *parse_answer(text, request)
        except UnusableAnswer as fault:
            log.info("the answer is unusable; retrying once")
            retry_note = f"Your last answer could not be used: {fault}"
        # If the prompt has no room for the reason, the first prompt is sent again
        with suppress(APIError):
            prompt = Prompt(request, chat.history, limit, retry_note)
        text = self._ask(prompt.text, chat)
        try:
            return prompt, *parse_answer(text, request, allow_unknown_tools=True)
        except UnusableAnswer as fault:
            if not form_instruction(request.body):
                return prompt, text, []
            raise upstream_error(
                502, "invalid_json_answer", f"The web chat sent no JSON: {fault}",
                headers=NO_SDK_RETRY) from None

    def reach(self) -> tuple[str, str]:
        self._nonce.wait(Waiter())
        return f"{self._page_url} reached, nonce found", "moonshotai/Kimi-K2-Instruct-0905"

    # Questions

    def _ask(self, prompt: str, chat: ProviderRequest) -> str:
        """Return the text of the answer. Each attempt may renew the nonce once."""
        def attempt() -> str:
            try:
                return self._post(prompt, chat)
            except StaleNonce:
                log.info("the web chat refused; retrying with a new nonce")
            return self._post(prompt, chat)

        with self._through_breaker(chat.model):
            return self._retry(attempt, chat.waiter)

    def _post(self, prompt: str, chat: ProviderRequest) -> str:
        """Post the form. Raises StaleNonce when a new nonce may help; the next post then fetches one."""
        deadline = Deadline(self._settings.request_timeout, chat.waiter)
        fetch = self._nonce.wait(chat.waiter)
        nonce = fetch.result()
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
            "Origin": url_origin(self._page_url),
            "Referer": self._page_url,
        }
        try:
            page = self._scraper.request(
                "POST", self._settings.upstream_url, headers, urlencode(form).encode(), deadline)
            self._check_page(page)
            return parse_web_chat_answer(page, nonce)
        except StaleNonce:
            self._nonce.invalidate(fetch)
            raise
        # A connection may have a late answer: the next request must not read it
        except APIError:
            self._scraper.forget_connections()
            raise

    def _check_page(self, page: UpstreamResponse) -> None:
        """Raise APIError for a block, a rate limit or an outage, which any request may meet."""
        status = page.status
        is_managed = page.headers.get("cf-mitigated") == "challenge"
        is_block = status == 403 and CLOUDFLARE_ERROR.match(page.body)
        is_challenge = status in (429, 503) and CHALLENGE.search(page.body)
        if is_managed or is_block or is_challenge:
            raise upstream_error(503, "upstream_blocked", (
                f"Cloudflare blocks this program (HTTP {status}). Open {self._page_url} in a browser on "
                "this network, wait some minutes, or use another network (HTTPS_PROXY)."))
        if status == 429:
            raise rate_limited(
                "The web chat received too many requests. Wait a while.",
                "rate_limit_error", "upstream_rate_limited", page.headers)
        if status >= 500:
            raise upstream_error(
                502, "upstream_unavailable", f"The web chat's site is down (HTTP {status}).",
                retryable=True)

    # The nonce

    def _fetch_nonce(self) -> str:
        """Fetch the chat page, following redirects within its scheme, host and port, and find its nonce."""
        home = self._settings.chat_page_url
        deadline = Deadline(self._settings.request_timeout, Waiter())
        # No cache has this URL
        url = f"{home}{'&' if '?' in home else '?'}_={int(time.time() * 1000)}"
        with suppress(ValueError):  # for an invalid Location
            for _ in range(MAX_REDIRECTS + 1):
                page = self._scraper.request("GET", url, {"Cache-Control": "no-cache"}, None, deadline)
                self._check_page(page)
                url = urljoin(url, page.headers.get("Location", ""))
                if not 300 <= page.status < 400 or url_origin(url) != url_origin(home):
                    break
        nonce = find_nonce(page.body.decode("utf-8", "replace"))
        if page.status != 200 or not nonce:
            raise upstream_error(
                502, "upstream_changed",
                f"{home} (HTTP {page.status}) carries no nonce: the site has changed, or has moved "
                "(CHAT_PAGE_URL and UPSTREAM_URL name its address). Look for a newer version of this program.")
        log.info("nonce renewed")
        return nonce


WEB_CHAT_PART = request_object({"type": choice_of("text", "refusal")})
# The values that the web chat supports of parameters that change the shape of the answer
WEB_CHAT_REQUEST = request_object({}, {
    "n": {"enum": [1]},
    "max_tokens": POSITIVE,
    "max_completion_tokens": POSITIVE,
    "logprobs": {"enum": [False]},
    "modalities": {"enum": [[], ["text"]]},
    "tool_choice": any_of(STRING, request_object({}, {"type": choice_of("function", "allowed_tools")})),
    "tools": array(request_object({"type": choice_of("function")})),
    "messages": array(request_object({}, {"content": any_of(STRING, array(WEB_CHAT_PART))})),
})


def reject_unsupported(request: ChatRequest) -> None:
    """Raise APIError 400 for parameters that the web chat does not support."""
    violation = find_violation(request.body, WEB_CHAT_REQUEST)
    if violation:
        path, schema = violation
        raise bad_request(
            f"'{path}' must be {describe(schema)}: the web chat takes text and answers with one text.",
            path, "unsupported_value")


def parse_web_chat_answer(page: UpstreamResponse, nonce: str) -> str:
    """Return the text in the web chat's JSON. Raises APIError, and StaleNonce for a refusal."""
    body = page.body.strip()
    answer = parse_upstream_object(body) or {}
    if body in (b"-1", b"0"):  # WordPress's answers to an expired nonce and to an unknown action
        answer = {"success": False, "data": body.decode()}
    data = answer.get("data")
    if answer.get("success") is False:
        raise StaleNonce(
            502,
            f"The web chat refused: {plain_line(data, nonce)}",
            "upstream_error",
            "upstream_refused",
            headers=NO_SDK_RETRY,  # clients get only the second refusal, after a new nonce
            quotes_upstream=True,
        )
    if page.status != 200:
        raise invalid_response("The web chat", f"HTTP {page.status}")
    text = data.get("message") if answer.get("success") and isinstance(data, dict) else None
    if isinstance(text, str):
        stripped = text.rstrip()
        if stripped.endswith("<|im_end|>"):
            text = stripped.removesuffix("<|im_end|>").rstrip()
        if text.strip():
            return text
    what = "something that is not JSON"
    if answer:
        what = "an empty answer" if isinstance(text, str) else "JSON of an unknown shape"
    raise invalid_response("The web chat", what, retryable=True)


# ----------------------------------------------------------------------------------------------------------------------
# APIs: errors
#
# Errors of APIs: in a response with an error status, in an answer with status 200, or in a stream.
# ----------------------------------------------------------------------------------------------------------------------

TOO_LONG = re.compile(
    "(?i)context[ _-](?:length|window|size)|exceed(?:s|ed)? model token limit|range of input length should be|"
    "(?:prompt|input) (?:is )?too long|length of all messages is too long|maximum (?:prompt|model|input) length|"
    "input token count .*exceeds|too many input tokens")
WRONG_KEY = re.compile("(?i)(?:incorrect|invalid|wrong) api.?key|api.?key (?:is )?(?:not valid|invalid|incorrect)")
MINIMAX_STATUSES = {
    "1002": 429, "1004": 401, "1008": 402, "1026": 400, "1027": 400, "1039": 429, "2013": 400, "2049": 401,
}
# By patterns of the letters in an error's code, type and status
ERROR_STATUSES = (
    ("ratelimit|toomany|throttl|quota|resourceexhausted", 429),
    ("balance|billing|payment", 402),
    ("apikey|authentication|unauthorized", 401),
    ("permission|forbidden|accessdenied", 403),
    ("notfound", 404),
    ("overload|unavailable", 503),
    ("timeout", 504),
    ("contextlength|invalid|badrequest|validation|toolong|filter|unsupported|inspection", 400),
)


REASONS = ("message", "detail", "msg", "error_msg", "error")  # fields of errors, the best first


def find_error(answer: JSONObject) -> Any:
    """Return the error in an answer with status 200, or None."""
    base = answer.get("base_resp")
    if isinstance(base, dict) and base.get("status_code"):
        return {
            "message": base.get("status_msg"),
            "status": MINIMAX_STATUSES.get(str(base["status_code"])),
        }
    error = answer.pop("error", None)
    if isinstance(error, dict) and error:
        return {"status": answer.get("status_code"), **error}
    if error or answer.get("choices") or answer.get("data"):
        return error
    return answer if any(map(answer.get, REASONS)) else None


def error_status(error: JSONObject) -> int:
    """Return the HTTP status for an error in an answer with status 200: its number, else by words in it, else 502."""
    for name in ("status_code", "code", "status"):
        if re.fullmatch(r"[45]\d\d", str(error.get(name))):
            return int(error[name])
    words = re.sub("[^a-z]+", "", f"{error.get('code')} {error.get('type')} {error.get('status')}".lower())
    return next((status for pattern, status in ERROR_STATUSES if re.search(pattern, words)), 502)


def error_message(error: JSONObject, secret: str) -> str:
    """Return the message of an error as one line, followed by the message of an upstream behind the API."""
    metadata = error.get("metadata")
    causes = [
        next(filter(None, map(error.get, REASONS)), error),
        metadata.get("raw") if isinstance(metadata, dict) else None,  # OpenRouter
        error.get("failed_generation"),  # Groq
    ]
    return ": ".join(plain_line(cause, secret) for cause in causes if cause)


def api_error(api: API, status: int, error: Any, headers: Headers) -> APIError:
    """Convert an API's error to ours, with the API's name and without our key. Keep type, code and rate-limit headers.

    status: of the response, 200 if the error is in an answer.
    """
    fields = error if isinstance(error, dict) else {"message": error}
    message = f"{api.name}: {error_message(fields, api.key)}"
    if status == 200:
        status = error_status(fields)

    def line(name: str) -> str | None:
        return plain_line(fields[name], api.key) if fields.get(name) else None

    type, code, param = map(line, ("type", "code", "param"))
    if status == 401 or (status == 400 and WRONG_KEY.search(message)):
        return upstream_error(
            502, "upstream_auth",
            f"{api.name} does not accept the key that this server has for it (HTTP {status}); "
            f"see {api.name.upper()}_API_KEY.",
            headers=NO_SDK_RETRY)
    if status != 429 and (code == "context_length_exceeded" or TOO_LONG.search(message)):
        # Clients and FALLBACK_MODELS check this code; LangChain searches the message for it
        status = 400
        code = "context_length_exceeded"
        if code not in message:
            message += f" ({code})"
    if status == 429:
        ours = rate_limited(message, type or "rate_limit_error", code or "upstream_rate_limited", headers)
        if re.search("quota|balance|billing", f"{type} {code}"):  # waiting does not help
            ours = ours.copy(retryable=False).with_headers(NO_SDK_RETRY)
    elif 400 <= status < 500:
        ours = APIError(status, message, type or "invalid_request_error", code, param)
    else:
        is_failure = 500 <= status < 600
        wait = parse_retry_after(headers)
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


def checked_answer(api: API, answer: JSONObject | None, headers: Headers) -> JSONObject:
    """Return an API's answer or event. Raises APIError for the error in it, or if it is no JSON object."""
    if answer is None:
        raise invalid_response(api.name, "something that is not a JSON object")
    error = find_error(answer)
    if error:
        raise api_error(api, 200, error, headers)
    return answer


def rate_limits(headers: Headers) -> dict[str, str]:
    """Return the rate-limit headers of a bounded length: clients refuse an answer whose head is too long."""
    limits = {}
    for name, value in headers.items():
        if "ratelimit" in name.lower() and re.fullmatch(r"[\w-]{1,100}: [ -~]{0,100}", f"{name}: {value}", re.A):
            limits[name] = value
    return limits


# ----------------------------------------------------------------------------------------------------------------------
# APIs: adapting requests
#
# Requests get a form that every API accepts, as far as OpenAI's protocol allows. Beyond that, even models of one API
# accept different requests. A refusal changes the model's next requests, so no table of models is needed.
# ----------------------------------------------------------------------------------------------------------------------

MAX_FUNCTION_NAME = 64  # characters
ADAPTATION_MAX_AGE = 3600.0  # seconds
MAX_ADAPTATIONS = 200  # of one API: clients may make up any number of models and values, and each change takes time
MAX_CHANGES = 12  # of one request

Change = Callable[[JSONObject], JSONObject]  # of a request's body


def portable_request(body: JSONObject) -> JSONObject:
    """Return the request without fields and roles that some APIs refuse and no API needs."""
    messages = []
    for message in body["messages"]:
        # Clients resend complete answers, and Mistral and Groq refuse unknown fields even if they are null
        message = {
            name: value for name, value in message.items()
            if value is not None or name == "content"
        }
        if message["role"] == "developer":
            message["role"] = "system"
        messages.append(message)
    body = {**body, "messages": join_system(messages)}
    return without(body, "tools", "tool_choice", "parallel_tool_calls") if body.get("tools") == [] else body


def is_instruction(message: Message) -> bool:
    """Return whether a message is a system message with content. Kimi's system messages may have tools instead."""
    return is_system(message) and bool(message.get("content"))


def join_system(messages: list[Message]) -> list[Message]:
    """Join the system messages at the beginning into one message. Parts keep their fields, such as cache_control."""
    system = list(itertools.takewhile(is_instruction, messages))
    if len(system) < 2:
        return messages
    contents = [message["content"] for message in system]
    joined: Any = []
    for content in contents:
        joined += content if isinstance(content, list) else [{"type": "text", "text": content}]
    if list not in map(type, contents):
        joined = "\n\n".join(contents)
    return [{**system[0], "content": joined}, *messages[len(system):]]


def move_system_first(body: JSONObject) -> JSONObject:
    """Join all system messages into one message at the beginning."""
    return {**body, "messages": join_system(sorted(body["messages"], key=is_instruction, reverse=True))}


def shorten_names(body: JSONObject) -> tuple[JSONObject, dict[str, str]]:
    """Return the request with function names of at most MAX_FUNCTION_NAME characters, and the full names by short name.
    A short name depends only on the full name."""
    functions = [tool["function"] for tool in body.get("tools") or () if tool["type"] == "function"]
    for message in body["messages"]:
        functions += [call["function"] for call in message.get("tool_calls") or ()]
    short_names = {}
    for function in functions:
        name = function["name"]
        if len(name) > MAX_FUNCTION_NAME:
            short_names[name] = f"{name[:MAX_FUNCTION_NAME - 9]}_{sha256(name.encode()).hexdigest()[:8]}"

    def rename(value: JSONObject) -> JSONObject:
        name = value.get("name")
        if isinstance(name, str):
            value["name"] = short_names.get(name, name)
        return value

    if short_names:
        body = map_objects(rename, body)
    return body, {short: name for name, short in short_names.items()}


def map_objects(function: Change, value: Any) -> Any:
    """Return a JSON value with a function applied to each of its objects, the innermost first."""
    return json.loads(dump_json(value), object_hook=function)


# Parameters to leave out when a model refuses them: many clients always send them, and thinking models fix their values
OPTIONAL_PARAMETERS = (
    "temperature", "top_p", "n", "presence_penalty", "frequency_penalty", "reasoning_effort", "parallel_tool_calls",
    "logprobs", "top_logprobs", "stream_options", "seed", "metadata", "store", "user", "service_tier",
    "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "verbosity", "encoding_format", "dimensions",
)
COMMON_WORDS = {"n", "user", "store", "metadata", "seed", "dimensions"}  # need not mean the parameter
# Parameters that may differ in every conversation, and do not change the answer
IDENTIFIERS = {"metadata", "user", "safety_identifier", "prompt_cache_key"}
REFUSED = "(?:un|not |n't )support|not permitted|not allowed|forbidden|unrecogni[sz]ed|unknown|unexpected|extra "


@dataclass(frozen=True)
class ChangeParameter:
    """A change that replaces or removes a parameter with the refused value. Other values may be accepted."""

    name: str
    refused: int | None  # the hash of the value's repr(), None for any value
    accepted: str | None = None  # None to leave the parameter out

    def __call__(self, body: JSONObject) -> JSONObject:
        if self.refused not in (None, hash(repr(body.get(self.name)))):
            return body
        if self.accepted is None:
            return without(body, self.name)
        return {**body, self.name: self.accepted}


EFFORTS = ["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def nearest_effort(refused: str, error_text: str) -> str:
    """Return the effort nearest to the refused effort, among those that the error names, else among common efforts."""
    named = [
        effort for effort in EFFORTS
        if effort != refused and re.search(rf"\b{effort}\b", error_text)
    ]
    position = EFFORTS.index(refused)
    return min(named or ["low", "high"], key=lambda effort: abs(EFFORTS.index(effort) - position - 0.1))


def swap_max_tokens(body: JSONObject) -> JSONObject:
    """Use the other name of the limit, or only the newer name if the request has both."""
    names = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
    if names.keys() <= body.keys():
        return without(body, "max_tokens")
    return {names.get(name, name): value for name, value in body.items()}


def describe_format(body: JSONObject, **required: Any) -> JSONObject:
    """Describe the format of the answer in words, and require only the given response_format, if any."""
    instruction = form_instruction(body)
    if not instruction:
        return body
    messages = [*body["messages"], {"role": "system", "content": instruction}]
    return move_system_first({**without(body, "response_format"), **required, "messages": messages})


def portable_schemas(body: JSONObject) -> JSONObject:
    """Convert the schemas of functions to schemas that Moonshot accepts."""
    body = map_objects(dict, body)
    for tool in body.get("tools") or ():
        if tool["type"] == "function":
            function = tool["function"]
            with suppress(AttributeError, LookupError, TypeError, ValueError):  # of an invalid schema
                function["parameters"] = root_schema(function.get("parameters") or {})
    return body


def root_schema(schema: Schema) -> Schema:
    """Return the schema of an object, from any other schema with the properties of all its options.

    Raises LookupError and the like for an invalid schema.
    """
    root: Schema = map_objects(portable_schema, schema)
    if root.get("type") == "object":
        return root
    properties: Schema = {}
    for option in (root, *root.get("anyOf", ())):
        target = root if "$ref" in option else option
        for name in option.get("$ref", "").split("/")[1:]:  # #/$defs/name
            target = target[name]
        properties.update(target.get("properties", {}))
    return {**without(root, "$ref", "anyOf"), "type": "object", "properties": properties}


def portable_schema(schema: Schema) -> Schema:
    """Return a schema whose `$ref` has no siblings, whose `type` is inside `anyOf`, and whose options are not null."""
    if isinstance(schema.get("$ref"), str):
        return only(schema, ("$ref", "$defs", "definitions"))
    if isinstance(schema.get("anyOf"), list):
        kind = schema.pop("type", None)
        options = []
        for option in schema["anyOf"]:
            if kind and "$ref" not in option:
                option = {"type": kind, **option}
            if option.get("type") != "null":
                options.append(option)
        schema["anyOf"] = options
    return schema


def fill_reasoning_gaps(body: JSONObject, default: str = "") -> JSONObject:
    """Set the reasoning_content of each assistant message: its reasoning, else the default."""
    filled = []
    for message in body["messages"]:
        if message["role"] == "assistant" and not message.get("reasoning_content"):
            message = {**message, "reasoning_content": reasoning_text(message) or default}
        filled.append(message)
    return {**body, "messages": filled}


def remove_reasoning(body: JSONObject) -> JSONObject:
    """Remove reasoning from all messages."""
    return {**body, "messages": [without(message, *REASONING_FIELDS) for message in body["messages"]]}


def offer_forced_tool(body: JSONObject) -> JSONObject:
    """Require any tool, and offer only the forced tool."""
    choice = body.get("tool_choice")
    if not names_function(choice) or "thinking" in body:
        return body
    name = choice["function"]["name"]
    tools = [
        tool for tool in body["tools"]
        if tool["type"] == "function" and tool["function"]["name"] == name
    ]
    return {**body, "tool_choice": "required", "tools": tools}


def disable_thinking(body: JSONObject) -> JSONObject:
    """Disable thinking for a forced tool, unless the client sets `thinking`."""
    if must_call(body.get("tool_choice")):
        return {"thinking": {"type": "disabled"}, **body}
    return body


def disable_streaming(body: JSONObject) -> JSONObject:
    return without(body, "stream", "stream_options")


class Adaptation(NamedTuple):
    """A change to the requests of a model that have certain parameters."""

    named: frozenset[str]  # parameters that the refusal names: the model may refuse only their combination
    change: Change

    def apply(self, body: JSONObject) -> JSONObject:
        """Return the changed request, or the same request if it lacks a parameter."""
        return self.change(body) if body.keys() >= self.named else body


MISSING_REASONING = r"reasoning_content.*(missing|must be|required)|missing.*reasoning_content"
# Changes in the order of trial, with patterns of the refusals. Moonshot: "invalid temperature: only 1 is allowed
# for this model"; "thinking is enabled but reasoning_content is missing …"; "tool_choice 'specified' is incompatible
# with thinking enabled". DeepSeek: "The reasoning_content in the thinking mode must be passed back to the API."
ADAPTATIONS: list[tuple[str, Change]] = [
    (rf"max_(completion_)?tokens.*({REFUSED}|both|same time)|({REFUSED}).*max_(completion_)?tokens", swap_max_tokens),
    (r"\bstream(ing)?\b", disable_streaming),
    (r"word .?json|json_schema|response.format", partial(describe_format, response_format={"type": "json_object"})),
    (r"response.format|json_schema|json_object", describe_format),
    (MISSING_REASONING, fill_reasoning_gaps),
    # kimi-k2.6 refuses an empty text
    (MISSING_REASONING, partial(fill_reasoning_gaps, default=" ")),
    (rf"reasoning.*({REFUSED})|({REFUSED}).*reasoning", remove_reasoning),
    (r"\bsystem\b|chat setting", move_system_first),
    (r"tool_choice", offer_forced_tool),
    (r"tool_choice", disable_thinking),
    (r"schema|tools.function.parameters", portable_schemas),
]


def message_without_ids(refusal: APIError) -> str:
    """Return the message without words that have digits, such as request ids."""
    return re.sub(r"\S*\d\S*", "", refusal.message)


def find_adaptations(refusal: APIError, sent: JSONObject) -> Iterator[Adaptation]:
    """Yield adaptations, each of which may make a model accept a refused request."""
    # xAI writes presencePenalty
    error_text = re.sub("(?<=[a-z])(?=[A-Z])", "_", f"{refusal.param} {refusal.message}").lower()
    named = frozenset(sent).intersection(re.findall(r"\w+", error_text))
    for name in named & COMMON_WORDS:
        pattern = rf"""['"`]{name}['"`]|^{name} |(?:invalid|argument|parameter|field).*\b{name}\b|\b{name} is not"""
        if not re.search(pattern, error_text):
            named -= {name}
    for name in OPTIONAL_PARAMETERS:
        if name not in named or (name == "logprobs" and sent[name]):
            continue
        value = None if name in IDENTIFIERS else hash(repr(sent[name]))
        if name == "reasoning_effort" and sent[name] in EFFORTS:
            effort = nearest_effort(sent[name], error_text)
            yield Adaptation(named, ChangeParameter(name, value, effort))
        yield Adaptation(named, ChangeParameter(name, value))
    for pattern, change in ADAPTATIONS:
        adaptation = Adaptation(named | {"messages"}, change)  # embeddings have no messages
        if re.search(pattern, error_text) and adaptation.apply(sent) != sent:
            yield adaptation


# ----------------------------------------------------------------------------------------------------------------------
# APIs: reading answers
#
# The chunks of an API's answer become chunks that every client can read, whatever the API leaves out, repeats or names
# differently.
# ----------------------------------------------------------------------------------------------------------------------

MAX_STREAM_BYTES = 64 << 20  # of all events of an answer
FINISHED_SILENCE = 2.0  # seconds to wait for usage and [DONE] once an answer is complete


def conversation_digests(model: str, messages: Iterable[Message]) -> Iterator[str]:
    """Yield, for each message, a digest of the model and of all messages up to this message, without reasoning.

    A call id identifies no conversation: functions.f:0 occurs in all of them.
    """
    digest = sha256(model.encode())
    for message in messages:
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        others = [part for part in parts if part["type"] != "text"]
        calls = [canonical_call(call) for call in message.get("tool_calls") or ()]
        # In ASCII: arguments may contain lone surrogates
        fields = [
            message["role"],
            message_text(message).strip(),
            others,
            calls,
            message.get("tool_call_id"),
        ]
        digest.update(json.dumps(fields).encode())
        yield digest.hexdigest()


def canonical_call(call: JSONObject) -> list[Any]:
    """Return a call in canonical form: some clients parse the arguments and write them differently."""
    function = call.get("function", {})  # missing in a custom call
    arguments = function.get("arguments", "")
    with suppress(ValueError):
        arguments = parse_json(arguments)
    return [call.get("id"), function.get("name"), arguments]


def parse_index(value: Any) -> int | None:
    """Parse an index below 10,000, a number or a string. Return None if missing. Raises ValueError or TypeError."""
    if value in (None, ""):
        return None
    index = int(value)
    if not 0 <= index < 10_000:
        raise ValueError
    return index


@dataclass
class StartedCall:
    """A tool call whose pieces are being read."""

    index: int  # ours
    has_id: bool  # the API sent an id
    unsent: JSONObject  # merged pieces that wait for the name
    name: str = ""
    end: str = ""  # the last character of the arguments


class CallReader:
    """A reader of tool calls, which adds the index and the id of its call to each piece."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names  # of functions, by short name
        self._count = 0
        # By the API's id and index; the last piece's call has the key None
        self._calls: dict[str | int | None, StartedCall] = {}

    def read(self, piece: JSONObject) -> JSONObject | None:
        """Complete a piece, or return None while the name of the function is unknown.

        Raises TypeError and the like for an invalid piece.
        """
        kind, field_name = ("custom", "input") if "custom" in piece else ("function", "arguments")
        function = piece.get(kind) or {}
        id = str(piece.get("id") or "")
        api_index = parse_index(piece.get("index"))
        name = str(function.get("name") or "")
        arguments = function.get(field_name) or ""
        if not isinstance(arguments, str):
            arguments = dump_json(arguments).decode()
        call = self._find(id, api_index, name)
        if call is None:
            fields = {"id": id or f"call_{random_hex()[:24]}", "type": piece.get("type") or kind}
            call = StartedCall(self._count, bool(id), fields)
            self._count += 1
        self._calls.update({id: call, api_index: call, None: call})
        call.end = arguments.strip()[-1:] or call.end
        # Clients would join repeated ids and names
        merge(call.unsent, {**without(piece, "id", "type", kind), kind: {field_name: arguments}})
        if not call.name:
            if not name:
                return None
            call.name = name
            call.unsent[kind]["name"] = self._names.get(name, name)
        sent = plain_value(call.unsent)
        call.unsent = {}
        return {**sent, "index": call.index}

    def _find(self, id: str, index: int | None, name: str) -> StartedCall | None:
        """Return the call that a piece continues, or None if it begins a call."""
        if id and id in self._calls:
            return self._calls[id]
        call = self._calls.get(index)
        if call is None or (id and (call.has_id or name)):
            return None
        # A name begins a call, unless the piece repeats the name of its call
        is_repeated = index is not None and name == call.name and call.end != "}"
        return call if id or not name or not call.name or is_repeated else None


class APIAnswer:
    """The stream of an API's answer, read into a fold.

    An answer is complete once every choice has its finish reason. Later errors are ignored.
    """

    def __init__(
        self, api: API, response: UpstreamResponse, fold: Fold, choices: int, names: Mapping[str, str],
    ) -> None:
        """Read up to the first chunk. If this fails, close the response and raise APIError."""
        self.response = response
        self.is_done = False  # [DONE] has been read, or an answer in JSON
        # Indexes of choices that have their finish reason
        self._finished: set[int] = set()
        self._api = api
        self._fold = fold
        self._choice_count = choices
        self._calls: defaultdict[int, CallReader] = defaultdict(partial(CallReader, names))  # by choice
        self._high_surrogates: list[str] = []
        chunks = self._read_chunks()
        try:
            self.chunks = itertools.chain([next(chunks)], chunks)
        except APIError:
            response.close()
            raise

    def _read_chunks(self) -> Iterator[JSONObject]:
        """Yield the chunks, at least one. Raises APIError, also for an answer without choices."""
        deadline = self.response.deadline
        is_complete = False
        chunk: JSONObject = {}
        try:
            for event in self._read_events():
                event["choices"] = self._read_choices(event)
                self._fold.add(event)
                if not is_complete:
                    # From the first choice on, the time-out applies to silence, not to the answer
                    is_complete = len(self._finished) >= max(len(self._fold.choices), self._choice_count)
                    deadline.is_per_read = bool(self._fold.choices) and not is_complete
                    if is_complete:
                        deadline.limit(FINISHED_SILENCE)
                chunk.update(event)
                if chunk["choices"]:  # other chunks are merged into the next
                    yield chunk
                    chunk = {}
        except APIError:
            if not is_complete:
                raise
        if not (self.is_done or is_complete):
            raise upstream_error(
                502, "upstream_unavailable", f"{self._api.name} ended the stream before the answer was complete.")
        if not self._fold.choices:
            raise invalid_response(self._api.name, "an empty answer")
        unfinished = [
            self._read_choice({"index": index, "finish_reason": "stop"})
            for index in self._fold.choices.keys() - self._finished
        ]
        if unfinished:
            self._fold.add({"choices": unfinished})
            yield {"choices": unfinished}

    def _read_events(self) -> Iterator[JSONObject]:
        """Yield the parsed events. An answer in JSON is one event. Raises APIError, also for an event with an error."""
        deadline = self.response.deadline
        deadline.may_reuse_connection = False  # until [DONE]
        chunks = self.response.stream()
        # DeepSeek sends empty lines before JSON
        first = next(filter(bytes.strip, chunks), b"").removeprefix(BOM_UTF8)
        if first.lstrip().startswith((b"{", b"[")):
            yield self._parse(first + self.response.read())
            self.is_done = True
            return
        for data in server_sent_data(itertools.chain([first], chunks), self._api.name):
            if data == b"[DONE]":
                self.is_done = deadline.may_reuse_connection = True
                return
            if data not in (b"", b"null"):
                yield self._parse(data)

    def _parse(self, data: bytes) -> JSONObject:
        event = parse_upstream_object(data, high_surrogates=self._high_surrogates)
        if event:
            self._move_usage(event)
        return checked_answer(self._api, event, self.response.headers)

    def _move_usage(self, fields: JSONObject) -> None:
        """Move the usage from a chunk or a choice to the fold: clients get the usage once, at the end."""
        usage = fields.pop("usage", None)
        if isinstance(usage, dict):
            self._fold.add({"usage": usage})

    def _read_choices(self, event: JSONObject) -> list[JSONObject]:
        try:
            return [
                choice if is_text_piece(choice) else self._read_choice(choice)
                for choice in event.get("choices") or ()
            ]
        except (AttributeError, LookupError, TypeError, ValueError):
            raise invalid_response(self._api.name, "a malformed chunk") from None

    def _read_choice(self, choice: JSONObject) -> JSONObject:
        """Complete a choice. Raises LookupError, TypeError and the like for a malformed choice."""
        self._move_usage(choice)
        index = parse_index(choice.get("index")) or 0
        before = self._fold.choices.get(index, {}).get("delta", {})
        delta = choice.get("delta") or {}
        # MiniMax ends with the complete message; an answer in JSON has only a message
        for name, value in (choice.pop("message", None) or {}).items():
            names = REASONING_FIELDS if name in REASONING_FIELDS else [name]
            if not delta.get(name) and not any(map(before.get, names)):
                delta[name] = value
        if isinstance(delta.get("content"), list):
            split_parts(delta)
        reason = choice.get("finish_reason") or None
        texts = reason, *map(delta.get, ("role", "content", "reasoning_content", "refusal"))
        "".join(filter(None, texts))  # raises TypeError for other values
        if before.get("role") or not delta.get("role"):  # openai-python would join roles
            delta.pop("role", None)
        calls = delta.pop("tool_calls", None) or ()
        calls = list(filter(None, map(self._calls[index].read, calls)))
        if calls:
            delta["tool_calls"] = calls
        if index in self._finished:
            reason = None
        if reason:
            self._finished.add(index)
        if reason == "stop" and (before.get("tool_calls") or calls):
            reason = "tool_calls"
        return {**choice, "index": index, "delta": delta, "finish_reason": reason}


def is_text_piece(choice: JSONObject) -> bool:
    """Return whether a choice is only a piece of text, as nearly all choices are, and needs no completion."""
    if "usage" in choice or choice.get("finish_reason", "") is not None or type(choice.get("index")) is not int:
        return False
    delta = choice.get("delta") or {}
    return choice["index"] == 0 and len(delta) == 1 and type(delta.get("content")) is str


def split_parts(delta: JSONObject) -> None:
    """Replace content parts, which Mistral sends, by fields: text, reasoning, and content_parts for other parts."""
    fields: JSONObject = {}
    for part in delta.pop("content"):
        if part["type"] == "text":
            piece = {"content": part["text"]}
        elif part["type"] == "thinking":
            piece = {"reasoning_content": message_text({"content": part["thinking"]})}
        else:
            piece = {"content_parts": [part]}
        merge(fields, piece, "delta")
    delta.update(plain_value(fields))


def server_sent_data(chunks: Iterable[bytes], upstream: str) -> Iterator[bytes]:
    """Yield the data of each server-sent event as it arrives. Skip comments and other fields. Lines end in LF."""
    line = bytearray()  # incomplete
    data = bytearray()  # the lines of the event
    total = 0
    # The end of the stream also ends the last event
    for chunk in itertools.chain(chunks, [b"\n\n"]):
        line += chunk
        total += len(chunk)
        if b"\n" in chunk:
            *lines, line = line.split(b"\n")
            for text in lines:
                text = text.rstrip(b"\r")
                if text.startswith(b"error:"):  # llama.cpp
                    text = text.replace(b"error:", b'data:{"error":', 1) + b"}"
                if text.startswith(b"data:"):
                    data += text[5:].removeprefix(b" ") + b"\n"
                elif not text and data:
                    yield bytes(data[:-1])
                    data.clear()
        if len(line) + len(data) > MAX_UPSTREAM_BYTES or total > MAX_STREAM_BYTES:
            raise invalid_response(
                upstream, f"more than {MAX_UPSTREAM_BYTES} bytes in an event or {MAX_STREAM_BYTES} in all")


# ----------------------------------------------------------------------------------------------------------------------
# APIs: provider
#
# Moonshot's own API, DeepSeek, Qianfan, a local server: any server of OpenAI's chat completions. Requests and chunks
# pass through, except the model's name, the messages of a session, and streaming, which are ours.
# ----------------------------------------------------------------------------------------------------------------------

MODELS_MAX_AGE = 60.0  # seconds between two fetches of a list of models, also after a failure
# Of one answer: 2,048 embeddings, the most that OpenAI allows, of 1,024 numbers each
MAX_EMBEDDINGS_BYTES = 32 << 20
MAX_EMBEDDINGS_VALUES = 3_000_000  # the numbers of such an answer, and more


# Parameters that this server sets or renames
NOT_IGNORED = {"stream", "stream_options", "max_tokens", "max_completion_tokens", "encoding_format"}


def ignored_header(body: JSONObject, sent: JSONObject) -> dict[str, str]:
    """Return a header with the parameters that were left out."""
    ignored = [
        name for name in body
        if name not in sent and name not in NOT_IGNORED and body[name] != []
    ]
    return {"X-Kimi2api-Ignored": ", ".join(ignored)} if ignored else {}


def encoded_embedding(entry: JSONObject, encoding: str | None) -> JSONObject:
    """Return an embedding in the requested encoding: numbers, or base64 of their 32-bit little-endian form. Raises
    ValueError, TypeError and the like for an invalid embedding."""
    embedding = entry["embedding"]
    if encoding == "base64" and not isinstance(embedding, str):
        embedding = b64encode(struct.pack(f"<{len(embedding)}f", *embedding)).decode()
    elif encoding != "base64" and isinstance(embedding, str):
        data = b64decode(embedding)
        embedding = list(struct.unpack(f"<{len(data) // 4}f", data))
        if not all(map(isfinite, embedding)):
            raise ValueError("JSON has no such numbers")
    return {**entry, "embedding": embedding}


class OpenAIProvider(Provider):
    """An OpenAI-style API. A client that disconnects ends the upstream call, because answers cost money."""

    def __init__(self, api: API, settings: Settings, metrics: Metrics) -> None:
        super().__init__(api.name, settings, metrics)
        self._api = api
        self._base_url = api.base_url.rstrip("/")
        self._transport = Transport(api.name, connections=2 * settings.max_concurrent_chats[""])
        self._headers = {
            "User-Agent": f"kimi2api/{__version__}",
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
        }
        if api.key:
            self._headers["Authorization"] = f"Bearer {api.key}"
        # The expiry of each adaptation of a model, by time.monotonic()
        self._adaptations: dict[tuple[str, Adaptation], float] = {}
        self._last_models: dict[str, JSONObject] = {}
        self._models = Cached(f"{api.name} models", self._fetch_models, MODELS_MAX_AGE)

    def stream(self, chat: ProviderRequest) -> Iterator[Delta]:
        request = chat.request
        messages = request.messages
        if chat.history:
            turns = append_turns(chat.history, request.turns)
            system = filter(is_system, request.messages)
            messages = [*system, *itertools.chain.from_iterable(turns)]
        body, names = shorten_names(portable_request({
            **request.body,
            "model": chat.model,
            "messages": self._with_reasoning(messages, chat),
            "stream": True,
            "stream_options": {**(request.body.get("stream_options") or {}), "include_usage": True},
        }))
        chat.waiter.must_finish = False

        def send(sent: JSONObject) -> APIAnswer:
            chat.stats.fold = Fold()  # without chunks of a failed attempt
            response = self._send("POST", "/chat/completions", sent, chat.waiter)
            return APIAnswer(self._api, response, chat.stats.fold, sent.get("n") or 1, names)

        with self._through_breaker(chat.model):
            answer, sent = self._ask(body, send, chat.waiter)
            headers = {**rate_limits(answer.response.headers), **ignored_header(request.body, sent)}
            try:
                for chunk in answer.chunks:
                    for choice in chunk["choices"]:
                        # Before the client can send the results of its calls
                        if choice["finish_reason"]:
                            self._store_reasoning(chat.stats.fold.choices[choice["index"]], messages, chat)
                    yield Delta(chunk, headers=headers)
                    headers = {}
            finally:
                if answer.is_done:
                    chat.waiter.defer(answer.response.drain)
                else:
                    answer.response.close()

    def _ask(
        self, body: JSONObject, send: Callable[[JSONObject], T], waiter: Waiter,
    ) -> tuple[T, JSONObject]:
        """Send a request. Return the answer, and the request as accepted.

        If the model refuses, try one change after another, and remember the changes that helped. Raises the first
        refusal of a forced tool, else the last refusal.
        """
        model = body["model"]
        now = time.monotonic()
        helpful = []
        for (name, adaptation), expiry in self._adaptations.items():
            if name == model and expiry > now:
                helpful.append(adaptation)
        trial = helpful
        tried: list[Adaptation] = []
        refusal = bad_request("")
        refusal_of_tool: APIError | None = None
        while True:
            sent = body
            for adaptation in trial:
                sent = adaptation.apply(sent)
            try:
                answer = self._retry(partial(send, sent), waiter)
            except APIError as error:
                if error.status not in (400, 422) or error.code == "context_length_exceeded":
                    raise
                # If the messages differ, the previous change helped
                if message_without_ids(error) != message_without_ids(refusal):
                    helpful = trial
                    refusal = error.copy()
                    changes = find_adaptations(refusal, sent)
                found = next((change for change in changes if change not in tried), None)
                if found is None or len(tried) == MAX_CHANGES:
                    raise refusal_of_tool or error from None
                if found.change in (offer_forced_tool, disable_thinking):
                    refusal_of_tool = refusal_of_tool or refusal
                    # kimi-k2.6 refuses "required" even without thinking, but no named function
                    helpful = [known for known in helpful if known.change is not offer_forced_tool]
                log.info("%s/%s: %s; sending the request in another form", self.name, model, error.reason)
                tried.append(found)
                trial = [*helpful, found]
            else:
                learned = {
                    (model, found): now + ADAPTATION_MAX_AGE
                    for found in tried if found in trial
                }
                if learned:
                    self._adaptations = newest_entries({**self._adaptations, **learned}, MAX_ADAPTATIONS)
                return answer, sent

    def _store_reasoning(self, choice: JSONObject, messages: list[Message], chat: ProviderRequest) -> None:
        """Store what the API requires in later requests with tool calls: reasoning, and Google's signatures of calls.

        messages: the conversation before the answer.
        """
        message = choice_message(choice)
        calls = message.get("tool_calls")
        kept = reasoning_fields(message)
        extra = {
            call["id"]: call["extra_content"] for call in calls or ()
            if call.get("extra_content")
        }
        if extra:
            kept["extra_content"] = extra
        if kept and calls:
            *_, digest = conversation_digests(chat.model, [*messages, message])
            chat.sessions.store_reasoning(
                chat.owner, f"{self.name} {digest} {calls[0]['id']}", kept)

    def _with_reasoning(
        self, messages: list[Message], chat: ProviderRequest,
    ) -> list[Message]:
        """Return messages with the reasoning and the signatures that the API sent with their tool calls, unless the
        client sends other reasoning."""
        if not any(message.get("tool_calls") for message in messages):
            return messages
        restored = []
        for message, digest in zip(messages, conversation_digests(chat.model, messages), strict=True):
            calls = message.get("tool_calls")
            if calls:
                kept = chat.sessions.find_reasoning(chat.owner, f"{self.name} {digest} {calls[0].get('id')}")
                extra = kept.pop("extra_content", {})
                calls = [
                    {"extra_content": extra[call["id"]], **call} if call.get("id") in extra else call
                    for call in calls
                ]
                message = {**message, "tool_calls": calls}
                # Clients rename the reasoning, send only its last piece, or join its details wrongly
                is_empty = "" in map(message.get, REASONING_FIELDS)  # on purpose
                if kept and not is_empty and reasoning_text(message).strip() in reasoning_text(kept):
                    message = {**without(message, *REASONING_FIELDS), **kept}
            restored.append(message)
        return restored

    def embed(self, body: JSONObject, waiter: Waiter) -> Embeddings:
        def send(sent: JSONObject) -> Embeddings:
            response = self._send("POST", "/embeddings", sent, waiter)
            parsed = parse_upstream_object(response.read(MAX_EMBEDDINGS_BYTES), MAX_EMBEDDINGS_VALUES)
            answer = checked_answer(self._api, parsed, response.headers)
            try:
                data = [
                    encoded_embedding(entry, body.get("encoding_format"))
                    for entry in answer["data"]
                ]
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error):
                raise invalid_response(self._api.name, "no embeddings") from None
            return {**answer, "data": data}, rate_limits(response.headers)

        with self._through_breaker(body["model"]):
            (answer, headers), sent = self._ask(body, send, waiter)
            return answer, {**headers, **ignored_header(body, sent)}

    def _send(
        self, method: str, path: str, body: JSONObject | None, waiter: Waiter,
    ) -> UpstreamResponse:
        """Send a request. Return a response with status 200, before its body is read; other statuses raise APIError.

        The time-out covers everything up to the first choice of a stream, or up to the end of any other body.
        """
        deadline = Deadline(self._settings.request_timeout, waiter)
        data = dump_json(body) if body else None
        response = self._transport.request(method, self._base_url + path, self._headers, data, deadline)
        if response.status == 200:
            return response
        text = response.read()
        answer = parse_upstream_object(text) or {}
        error = find_error(answer) or answer or text.decode("utf-8", "replace") or "(no reason given)"
        raise api_error(self._api, response.status, error, response.headers)

    # Models

    def models(self, wait: float) -> Mapping[str, JSONObject]:
        with suppress(FutureTimeout):
            self._models.latest().result(wait)
        return self._last_models

    def _fetch_models(self) -> None:
        try:
            self._last_models = self._list_models()
        except APIError as error:
            log.warning("%s: its models cannot be listed: %s", self.name, error.reason)

    def _list_models(self) -> dict[str, JSONObject]:
        response = self._send("GET", "/models", None, Waiter())
        listed = checked_answer(self._api, parse_upstream_object(response.read()), response.headers).get("data")
        if not isinstance(listed, list):
            raise invalid_response(self._api.name, "no list of models")
        models = {}
        for model in listed:
            if isinstance(model, dict) and isinstance(model.get("id"), str) and model["id"]:
                models[model["id"]] = model
        return models

    def reach(self) -> tuple[str, str]:
        listed = self._list_models()
        reached = f"{without_credentials(self._base_url)} reached, {len(listed)} models listed"
        return reached, next(iter(listed), "default")


# ----------------------------------------------------------------------------------------------------------------------
# Models and fallback
#
# The provider of each model id, and the models that answer when a provider cannot.
# ----------------------------------------------------------------------------------------------------------------------

# For a model whose upstream reports no time: 2025-09-05, when Kimi-K2-Instruct-0905 was released
DEFAULT_CREATED = 1757030400
MAX_BUFFERED_DELTAS = 50  # deltas without content
LISTING_WAIT = 0.5  # seconds that /v1/models waits for each API's list


def model_not_found(name: str) -> APIError:
    return APIError(
        404, f"The model {name[:100]!r} does not exist; /v1/models lists those that do.", code="model_not_found",
        param="model")


class Providers:
    """All configured providers, by their names and by the ids of models."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self.by_name: dict[str, Provider] = {WEB_CHAT: KimiProvider(settings, metrics)}
        for name, api in settings.apis.items():
            self.by_name[name] = OpenAIProvider(api, settings, metrics)

    def resolve(self, model: str) -> tuple[Provider, str]:
        """Return the provider of a model id, and the model's name there. Raises APIError 404 for an unknown id."""
        resolved = self._settings.resolve(model)
        if resolved is None:
            raise model_not_found(model)
        name, upstream_model = resolved
        return self.by_name[name], upstream_model

    def models(self) -> list[JSONObject]:
        """Return MODELS, then the models that each API lists, as OpenAI's model objects."""
        for provider in self.by_name.values():
            provider.models(wait=0)  # starts every fetch before the first wait
        names = list(self._settings.models)
        for provider in self.by_name.values():
            for model in provider.models(LISTING_WAIT):
                names.append(f"{provider.name}/{model}")
        return [self.model(name, wait=0) for name in names if name != "*"]

    def model(self, name: str, wait: float = LISTING_WAIT) -> JSONObject:
        """Return OpenAI's object of a model. Raises APIError 404 for an unknown id."""
        provider, upstream_model = self.resolve(name)
        model = {"id": name, "object": "model", "created": DEFAULT_CREATED, "owned_by": provider.name}
        listed = provider.models(wait)
        if listed and upstream_model not in listed and name not in self._settings.models:
            raise model_not_found(name)
        listed_model = listed.get(upstream_model, {})
        for field_name in ("created", "owned_by"):
            value = listed_model.get(field_name)
            if type(value) is type(model[field_name]):
                model[field_name] = value
        return model

    def answer(self, model: str, chat: ProviderRequest) -> Iterator[Delta]:
        """Yield the answer of the requested model or, if it cannot answer, of the first of FALLBACK_MODELS that can.

        Deltas are buffered until the model is certain to answer: in a stream up to the first content. For a JSON answer
        all deltas are buffered, and become one delta.
        """
        failures: list[APIError] = []
        stats = chat.stats
        is_stream = chat.request.stream
        for name in dict.fromkeys((model, *self._settings.fallback_models)):
            provider, upstream_model = self.resolve(name)
            stats.start(provider.name, name)
            deltas = stats.watch(provider.stream(replace(chat, model=upstream_model)))
            buffered: list[Delta] = []
            try:
                for delta in deltas:
                    buffered.append(delta)
                    if not is_stream:
                        del buffered[1:]  # the fold has their content
                    elif delta.has_content or len(buffered) > MAX_BUFFERED_DELTAS:
                        break
            except APIError as error:
                prefix = f"Fallback {name}: " if failures else ""
                failures.append(error.copy(message=prefix + error.message))
                if not error.may_fall_back or isinstance(error, Abandoned):
                    break
                log.warning("%s cannot answer: %s", name, error.reason)
                continue
            if not is_stream:
                buffered[0].chunk = stats.fold.completion()
            buffered[0].headers = {**buffered[0].headers, "X-Kimi2api-Provider": provider.name}
            for delta in itertools.chain(buffered, deltas):
                delta.chunk["model"] = name
                yield delta
            return
        raise failures[0].copy(message=" ".join(map(str, failures)))

    def embed(
        self, model: str, body: JSONObject, stats: AnswerStats, waiter: Waiter,
    ) -> Embeddings:
        """Return embeddings of the requested model, without fallback: other models' embeddings cannot be compared."""
        provider, upstream_model = self.resolve(model)
        stats.start(provider.name, model)
        stats.fold.replace_usage({"prompt_tokens": estimate_input(body["input"])})
        answer, headers = provider.embed({**body, "model": upstream_model}, waiter)
        stats.first_chunk = time.monotonic() - stats.began
        usage = answer.get("usage") or {}
        if usage_count(usage, "prompt_tokens"):
            stats.fold.replace_usage(usage)
        return {**answer, "model": model}, {**headers, "X-Kimi2api-Provider": provider.name}


########################################################################################################################
# Part 7: Application
#
# Who may call, a chat from its request to its answer, and the routes. Nothing outside this part and the next uses
# Bottle.
########################################################################################################################


# ----------------------------------------------------------------------------------------------------------------------
# Access
#
# Who may call: clients with a key, programs on this machine, and web pages of allowed origins.
# ----------------------------------------------------------------------------------------------------------------------


def check_caller(settings: Settings, environ: dict[str, Any]) -> None:
    """Refuse other machines (if no key is set), foreign web pages, and paths that are not UTF-8. Raises APIError 403 or
    400."""
    host = environ.get("HTTP_HOST")
    origin = environ.get("HTTP_ORIGIN")
    # Without a key, only this machine may call. A page whose name resolves to 127.0.0.1 (DNS rebinding) sends its own
    # name as Host; any other page sends its own Origin.
    if not settings.api_master_key:
        names = forwarded_for(environ)
        if host:
            names.append(hostname(f"//{host}") or host)
        for name in names:
            if not is_loopback(name):
                raise APIError(
                    403,
                    f"{name[:100]!r} is not this machine. Without API_MASTER_KEY only this machine may call, under a "
                    "name such as localhost and through no proxy for other machines.",
                    code="host_not_allowed")
    if origin:
        if not origin_allowed(settings, origin, host):
            raise APIError(
                403,
                f"Web pages of {origin[:100]!r} may not call this server; CORS_ORIGINS lists those that may.",
                code="origin_not_allowed")
        set_headers({
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": "*",
            "Vary": "Origin",
        })
    # Bottle drops bytes that are not UTF-8, and the rest of the path could name another user
    if environ["PATH_INFO"].encode() != environ["bottle.raw_path"].encode("latin-1"):
        raise bad_request("The path is not UTF-8; percent-encode it as UTF-8.")


def origin_allowed(settings: Settings, origin: str, host: str | None) -> bool:
    """Return whether web pages of an origin may call. host: the request's Host header."""
    if origin.endswith(f"://{host}"):  # the server's own pages
        return True
    for pattern in settings.cors_origins:
        before, wildcard, after = pattern.partition("*")
        if origin == pattern or (wildcard and origin.startswith(before) and origin.endswith(after)):
            return True
    if settings.cors_origins:
        return False
    return bool(settings.api_master_key) or is_loopback(hostname(origin))


def authenticate(keys: Iterable[ClientKey], authorization: str) -> ClientKey:
    """Return the key in an Authorization header, or an empty key if the server has no keys. Raises APIError 401."""
    found = matching_key(keys, authorization)
    if found is None:
        message = "Incorrect API key." if authorization else "No API key: send it as 'Authorization: Bearer …'."
        raise APIError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
    return found


def forwarded_for(environ: Mapping[str, Any]) -> list[str]:
    """Return the addresses of clients that proxies have added to the headers, without ports."""
    listed = f"{environ.get('HTTP_X_FORWARDED_FOR', '')},{environ.get('HTTP_X_REAL_IP', '')}"
    addresses = split_commas(listed) + re.findall(r'(?i)for="?([^",;]+)', environ.get("HTTP_FORWARDED", ""))
    return [re.sub(r"^(\[.*]|[^:]*):\d+$", r"\1", address) for address in addresses]


def matching_key(keys: Iterable[ClientKey], authorization: str) -> ClientKey | None:
    """Return the key that an Authorization header matches, an empty key if the server has no keys, else None."""
    if not keys:
        return ClientKey()
    scheme, _, token = authorization.partition(" ")
    given = token.strip().encode("latin-1", "replace")
    # Compare all keys, so that the time does not depend on which key matches
    matches = [candidate for candidate in keys if hmac.compare_digest(candidate.key.encode(), given)]
    return matches[0] if matches and scheme.lower() == "bearer" else None


def set_headers(headers: Headers) -> None:
    """Set headers of the current response, except those already set: ours override an upstream's."""
    for name, value in headers.items():
        bottle.response.headers.setdefault(name, value)


def request_id(given: str) -> str:
    return given if re.fullmatch(r"[\w.:-]{1,128}", given, re.A) else f"req_{random_hex()}"


def current_key() -> ClientKey:
    """Return the key of the current request."""
    return bottle.request.environ["kimi2api.key"]


def current_owner() -> str:
    """Return the owner of the sessions that the current request may read and change."""
    return current_key().owner


def hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:  # such as half an IPv6 address
        return None


# ----------------------------------------------------------------------------------------------------------------------
# Clients
#
# The client of a chat: its stream, and whether it has disconnected. Slots limit the number of running chats. A chat and
# its upstream call run on the thread of the client's request.
# ----------------------------------------------------------------------------------------------------------------------

CLIENT_CHECK_INTERVAL = 0.5  # seconds
SEND_SIZE = 65536  # bytes of pending events that are sent without waiting for more
KEEPALIVE = b": keep-alive\n\n"

Write = Callable[[bytes], object]  # WSGI's write()


class Client(Waiter):
    """The client of one chat, which may disconnect. A stream has events and keep-alive comments.

    Pending events are sent before the next wait for the upstream, so all events of one read are one write.
    """

    def __init__(
        self,
        environ: Mapping[str, Any],
        begin: Callable[[], Write] | None = None,
        keepalive_interval: float = inf,
    ) -> None:
        """begin: starts the response of a stream and returns WSGI's write(). keepalive_interval: in seconds."""
        self.interval = min(CLIENT_CHECK_INTERVAL, keepalive_interval)
        self.is_disconnected = False
        # The stream has an event, so an error must be one more event
        self.has_begun = False
        self._client_disconnected = environ.get("waitress.client_disconnected", bool)
        # Task sets both; other WSGI servers do not
        self.defer = environ.get("kimi2api.defer", super().defer)  # type: ignore[method-assign]
        self._stopping = environ.get("kimi2api.stopping") or threading.Event()
        self._begin = begin
        self._keepalive_interval = keepalive_interval
        self._write: Write | None = None
        self._pending = bytearray()
        self._last_write = time.monotonic()
        self._blocked = 0.0  # seconds of sending

    def clock(self) -> float:
        """Return the time in seconds, by a clock that stops during sending: a slow client is no slow upstream."""
        return time.monotonic() - self._blocked

    def attend(self) -> None:
        if self._begin and time.monotonic() - self._last_write >= self._keepalive_interval:
            self.send(KEEPALIVE)
        self.flush()
        self.is_disconnected = self.is_disconnected or self._client_disconnected()
        if self.is_disconnected and not self.must_finish:
            # 499 is nginx's code for a client that closed the connection
            raise Abandoned(499, "The client has disconnected.", code="client_closed_request")
        if self._stopping.is_set():
            raise Abandoned(503, "The server is stopping.", "server_error", "server_stopping")

    def sleep(self, seconds: float) -> None:
        self.attend()
        while seconds > 0:
            pause = min(seconds, self.interval)
            self._stopping.wait(pause)
            seconds -= pause
            self.attend()

    def send(self, data: bytes) -> None:
        """Add an event to the stream. Drop it if the client has disconnected."""
        self.has_begun = True
        self._pending += data
        if len(self._pending) >= SEND_SIZE:
            self.flush()

    def flush(self) -> None:
        data = bytes(self._pending)
        self._pending.clear()
        if not data or self.is_disconnected or not self._begin:
            return
        self._write = self._write or self._begin()
        began = time.monotonic()
        try:
            self._write(data)
        # WSGI does not define the exception for a client that has disconnected
        except Exception:
            self.is_disconnected = True
        self._last_write = time.monotonic()
        self._blocked += self._last_write - began


class Slots:
    """The slots of running chats. Their number is limited for all keys together, and for named keys."""

    def __init__(self, limits: Mapping[str, int]) -> None:
        self.limits = limits  # by the key's name; "" is for all keys together
        self.used: Counter[str] = Counter()  # slots, by the names of `limits`
        self._lock = threading.Lock()  # guards `used`

    @contextmanager
    def held(self, client: ClientKey) -> Iterator[None]:
        """Hold a slot during a chat. Raises APIError 429 if none is free."""
        names = {"", client.name or ""}
        with self._lock:
            if any(self.used[name] >= self.limits.get(name, inf) for name in names):
                raise APIError(
                    429,
                    "Too many chats are running (MAX_CONCURRENT_CHATS). Try again soon.",
                    "rate_limit_error",
                    "server_busy",
                    headers={"Retry-After": "1"})
            self.used.update(names)
        try:
            yield
        finally:
            with self._lock:
                self.used.subtract(names)


# ----------------------------------------------------------------------------------------------------------------------
# Chats
#
# Stages of a chat between provider and format, which store the answer and replay a complete answer at a pace.
# ----------------------------------------------------------------------------------------------------------------------


class Conversation(NamedTuple):
    """A chat's request and its session."""

    request: ChatRequest
    session_id: str
    history: Turns  # before the request
    save: Callable[[], None] | None = None  # stores the turn


def save_before_end(deltas: Iterator[Delta], save: Callable[[], None]) -> Iterator[Delta]:
    """Yield the deltas. Call save() before the final deltas, so that the answer is stored when a client has read its
    end."""
    held = []
    for delta in deltas:
        if delta.is_final:
            held.append(delta)
            continue
        yield from held
        held = []
        yield delta
    save()
    yield from held


def message_to_store(stats: AnswerStats) -> Message | None:
    """Return the message of an answer, or None if APIs would refuse the message in later requests."""
    message = stats.fold.message()
    if not (message["content"] or message.get("tool_calls")):
        log.warning("an answer without content is not stored")
        return None
    violation = find_violation(message, MESSAGE)
    if violation:
        log.warning("an answer is not stored: '%s' must be %s", violation.path, describe(violation.schema))
        return None
    return message


def pace(deltas: Iterator[Delta], settings: Settings, client: Client) -> Iterator[Delta]:
    """Replay a complete answer as a stream: a piece every STREAM_INTERVAL_MS, within STREAM_MAX_SECONDS. Do not pause
    once the client has disconnected: the answer may still be stored."""
    interval = settings.stream_interval_ms / 1000
    max_pieces = max(1, int(settings.stream_max_seconds / interval)) if interval else 1
    for delta in deltas:
        if not delta.is_complete:
            yield delta
            continue
        client.must_finish = True
        began = time.monotonic()
        for count, step in enumerate(split_answer(delta, max_pieces)):
            ahead = began + count * interval - time.monotonic()
            if ahead > 0 and not client.is_disconnected:
                client.sleep(ahead)
            yield step


# ----------------------------------------------------------------------------------------------------------------------
# Application
#
# What all requests share, and the handlers of the routes.
# ----------------------------------------------------------------------------------------------------------------------


def session_object(user: str, document: Document) -> JSONObject:
    return {
        "object": "session",
        "user": user,
        "created": int(document.created),
        "last_used": int(document.used),
        "turns": document.turns,
    }


def not_found(kind: str, name: str) -> APIError:
    """Return the error for a session or a response that is not stored."""
    return APIError(
        404,
        f"There is no {kind} {name[:100]!r}, or it has expired.",
        code=f"{kind}_not_found")


def as_api_error(error: Exception) -> APIError:
    """Return an APIError unchanged. Log any other error with its traceback, and return a 500."""
    if isinstance(error, APIError):
        return error
    log.error("unexpected error", exc_info=error)
    return APIError(500, "Internal server error; see the server's log.", "server_error", "internal_error")


class App:
    """The state that all requests share, and the handlers of the routes."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics({*settings.models, settings.default_model, *settings.fallback_models} - {"*"})
        self.providers = Providers(settings, self.metrics)
        self.store = open_store(settings)
        self.sessions = Sessions(self.store)
        self.limits = UsageLimits(self.store, settings)
        self.slots = Slots(settings.max_concurrent_chats)
        self.started = time.time()
        self._began = time.monotonic()

    # Handlers of routes

    def create_chat_completion(self) -> bytes:
        return self._complete_in_session(ChatRequest.parse(self._body()), ChatCompletion)

    def create_completion(self) -> bytes:
        return self._complete_in_session(ChatRequest.parse_completion(self._body()), TextCompletion)

    def create_response(self) -> bytes:
        return self._complete_response(ResponsesRequest.parse(self._body()))

    def compact_response(self) -> bytes:
        request = ResponsesRequest.parse(self._body())
        request.repeats_messages = request.reader.compacts = True
        request.body["stream"] = request.body["store"] = False
        return self._complete_response(request)

    def _complete_response(self, request: ResponsesRequest) -> bytes:
        writer = ResponseWriter(request)

        def open_conversation(stats: AnswerStats) -> Conversation:
            previous = self._previous_response(request.body.get("previous_response_id"))
            writer.history = previous.turns
            chat_request = request.to_chat_request(previous.system, previous.tools, self._stored_items)
            if request.body.get("store") is not False:
                writer.save = partial(self._record_response, previous, request, chat_request, stats)
            return Conversation(chat_request, previous.id, previous.turns)

        try:
            return self._complete(request.body, writer, open_conversation)
        except APIError as error:
            raise translate_error(error) from None

    def _complete_in_session(self, request: ChatRequest, make_writer: type[ChatCompletion]) -> bytes:
        def open_conversation(stats: AnswerStats) -> Conversation:
            session = self.sessions.open(current_owner(), request.user)
            history = () if request.has_history else session.turns
            save = partial(self._record_turn, session, request, stats) if request.user else None
            return Conversation(request, session.id, history, save)

        return self._complete(request.body, make_writer(request.include_usage), open_conversation)

    def _previous_response(self, id: str | None) -> Session:
        """Return the session of the previous response, or a new session if there is none. Raises APIError 400."""
        if not id:
            return Session(random_hex())
        found = self.sessions.get(current_owner(), id, RESPONSE)
        if found is None:
            raise bad_request(
                f"Previous response with id {id[:100]!r} not found: it has expired, was not stored, or is too long to "
                "be stored. Send the whole conversation.",
                "previous_response_id",
                "previous_response_not_found")
        return found

    def _complete(
        self,
        body: JSONObject,
        writer: ChatCompletion | ResponseWriter,
        open_conversation: Callable[[AnswerStats], Conversation],
    ) -> bytes:
        """Answer a chat: all stages, in order."""
        model = body.get("model") or self.settings.default_model
        begin = partial(self._begin_stream, writer) if body.get("stream") else None
        client = Client(bottle.request.environ, begin, self.settings.sse_keepalive)
        sent = 0
        try:
            with self._counted(model, client) as stats:
                request, session_id, history, save = open_conversation(stats)
                stats.messages = list(itertools.chain(*history, request.messages))
                stats.reserved = self.limits.reserve(current_key(), stats.tokens()[0])
                chat = ProviderRequest(
                    request,
                    model,
                    history,
                    session_id,
                    current_owner(),
                    self.sessions,
                    stats,
                    client)
                deltas = self.providers.answer(model, chat)
                if save:
                    deltas = save_before_end(deltas, save)
                if not begin:
                    answer = writer.json(deltas)
                    set_headers(writer.headers)
                    return answer
                for event in writer.events(pace(deltas, self.settings, client)):
                    client.send(event)
                    sent += 1
        except Exception as error:
            if not client.has_begun:
                raise
            failure = as_api_error(error)
            if not client.is_disconnected:
                log.info("%s broke off: %s", stats.model, failure.reason)
            client.send(writer.failure(failure, sent))
        client.flush()  # last: when a client has read the end, its chat is counted and its slot is free
        return b""

    def _record_turn(self, opened: Session, request: ChatRequest, stats: AnswerStats) -> None:
        """Record the user's messages and the answer in the user's session."""
        message = message_to_store(stats)
        if message and request.turns and request.user:
            turns = append_turns(request.turns, [(message,)])
            self.sessions.record(current_owner(), request.user, opened, turns, replace_turns=request.has_history)

    def _record_response(
        self,
        previous: Session,
        request: ResponsesRequest,
        chat_request: ChatRequest,
        stats: AnswerStats,
        response: JSONObject,
    ) -> None:
        """Store a response with the conversation that a later response continues."""
        message = message_to_store(stats)
        turns = append_turns(previous.turns, chat_request.turns)
        if request.reader.compacts:
            turns = (tuple(ItemReader().read(response["output"])),)
        elif message and turns:
            turns = append_turns(turns, [(message,)])
        # Later responses inherit system messages and tools of the input, but not the instructions
        system = [*previous.system, *filter(is_system, request.messages)]
        tools = [*previous.tools, *request.reader.tools]
        self.sessions.record_response(current_owner(), Session(previous.id, system, tools, response, turns))

    def create_embeddings(self) -> JSONObject:
        body = parse_body(self._body(), EMBEDDINGS_REQUEST)
        model = body.get("model") or self.settings.default_model
        client = Client(bottle.request.environ)
        with self._counted(model, client) as stats:
            stats.reserved = self.limits.reserve(current_key(), estimate_input(body["input"]))
            answer, headers = self.providers.embed(model, body, stats, client)
            set_headers(headers)
            return answer

    def _body(self) -> bytes:
        """Return the body of the current request. Raises APIError 413."""
        limit = self.settings.max_body_bytes
        length = bottle.request.content_length
        if length > limit:
            raise APIError(
                413,
                f"The body is larger than {limit} bytes (MAX_BODY_BYTES).",
                code="request_too_large")
        return bottle.request.environ["wsgi.input"].read(max(0, length))

    @contextmanager
    def _counted(self, model: str, client: Client) -> Iterator[AnswerStats]:
        """Hold a slot for an answer, and count the answer when it ends or fails. Raises APIError 404 for an unknown
        model, 429 if no slot is free or a limit of the key is reached."""
        self.providers.resolve(model)
        with self.slots.held(current_key()):
            set_headers(self.limits.admit(current_key()))
            bottle.request.environ["kimi2api.is_admitted"] = True
            stats = AnswerStats()
            status = 500
            try:
                yield stats
                status = 200
            except APIError as error:
                status = error.status
                raise
            finally:
                self._count(stats, 499 if client.is_disconnected else status)

    def _count(self, stats: AnswerStats, status: int) -> None:
        """Count an answer for the key's usage and for the metrics."""
        has_answered = stats.first_chunk is not None
        model = self.metrics.model_label(current_owner(), stats.provider, stats.model, has_answered)
        labels = {"provider": stats.provider or "none", "model": model}
        self.metrics.count("kimi2api_chats_total", {**labels, "status": str(status)})
        prompt_tokens = completion_tokens = 0
        if has_answered or (stats.provider and status == 499):  # the upstream has the prompt
            prompt_tokens, completion_tokens = stats.tokens()
            self.metrics.count("kimi2api_tokens_total", {**labels, "type": "input"}, prompt_tokens)
            self.metrics.count("kimi2api_tokens_total", {**labels, "type": "output"}, completion_tokens)
        if stats.first_chunk is not None:
            self.metrics.observe("kimi2api_chat_duration_seconds", labels, time.monotonic() - stats.began)
            self.metrics.observe("kimi2api_time_to_first_chunk_seconds", labels, stats.first_chunk)
        if prompt_tokens or stats.reserved:
            is_answered = has_answered and status in (200, 499)
            self.limits.record(
                current_key(),
                model,
                prompt_tokens,
                completion_tokens,
                stats.reserved,
                is_answered)

    def _begin_stream(self, writer: ChatCompletion | ResponseWriter) -> Write:
        set_headers({
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",  # nginx would buffer a stream
            **writer.headers,
        })
        start = bottle.request.environ.pop("kimi2api.start_response")
        return start(bottle.response.status_line, bottle.response.headerlist)

    def list_models(self) -> JSONObject:
        return {"object": "list", "data": self.providers.models()}

    def get_model(self, id: str) -> JSONObject:
        return self.providers.model(id)

    def get_session(self, user: str) -> JSONObject:
        user = user or bottle.request.query.user
        session = self._stored(SESSION, user)
        expires_at = int(session.document.used + self.store.ttl)
        return {
            **session_object(user, session.document),
            "turns": session.turns,
            "expires_at": expires_at,
        }

    def get_response(self, id: str) -> JSONObject:
        return self._stored(RESPONSE, id).response

    def _stored(self, kind: str, name: str) -> Session:
        session = self.sessions.get(current_owner(), name, kind)
        if session is None:
            raise not_found(kind, name)
        return session

    def _stored_items(self, response_id: str) -> dict[str, JSONObject]:
        """Return the output items of a stored response by id."""
        session = self.sessions.get(current_owner(), response_id, RESPONSE)
        return {item["id"]: item for item in session.response["output"]} if session else {}

    def _delete(self, kind: str, name: str) -> None:
        if not self.store.delete((current_owner(), kind, name)):
            raise not_found(kind, name)

    def delete_response(self, id: str) -> JSONObject:
        self._delete(RESPONSE, id)
        return {"id": id, "object": "response", "deleted": True}

    def delete_session(self, user: str) -> JSONObject:
        user = user or bottle.request.query.user
        self._delete(SESSION, user)
        return {"object": "session.deleted", "user": user, "deleted": True}

    def list_sessions(self) -> JSONObject:
        """List the key's sessions, without their turns."""
        documents = self.store.list_documents(current_owner(), SESSION)
        return {"object": "list", "data": [session_object(user, document) for user, document in documents.items()]}

    def get_usage(self) -> JSONObject:
        return self.limits.usage(current_key())

    def get_metrics(self) -> str:
        set_headers({"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
        gauges: dict[str, dict[Labels, float]] = {
            "kimi2api_chats_running": {(): self.slots.used[""]},
            "kimi2api_chats_limit": {(): self.slots.limits[""]},
            "kimi2api_build_info": {(("version", __version__),): 1},
            "process_start_time_seconds": {(): self.started},
            "kimi2api_upstream_healthy": {},
        }
        for name, provider in self.providers.by_name.items():
            gauges["kimi2api_upstream_healthy"][("provider", name),] = not provider.failing
        with suppress(APIError):  # /health reports an unavailable store
            gauges["kimi2api_sessions"] = {(): self.store.count()}
        return self.metrics.render(gauges)

    def get_health(self) -> JSONObject:
        upstreams: dict[str, JSONObject] = {}
        for name, provider in self.providers.by_name.items():
            upstreams[name] = {}
            failing = provider.failing
            if failing:
                since, reason = failing
                upstreams[name] = {"failing_since": int(since), "reason": reason}
        kept: int | None = None
        with suppress(APIError):
            self.store.check()
            kept = self.store.count()
        is_degraded = kept is None or any(upstreams.values())
        return {
            "status": "degraded" if is_degraded else "ok",
            "version": __version__,
            "key_required": bool(self.settings.api_master_key),
            "uptime_seconds": int(time.monotonic() - self._began),
            "chats": {"running": self.slots.used[""], "limit": self.slots.limits[""]},
            "sessions": {"kept": kept, "limit": self.store.limit},
            "store": {"kind": self.store.kind, "ok": kept is not None},
            "upstreams": upstreams,
        }

    def get_page(self) -> str:
        text, headers = sent_page()
        set_headers(headers)
        return text

    def preflight(self, path: str) -> bytes:
        """Answer a browser's preflight request, which has no key."""
        bottle.response.status = 204
        set_headers({
            "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
            "Access-Control-Allow-Headers": bottle.request.environ.get(
                "HTTP_ACCESS_CONTROL_REQUEST_HEADERS", "*"),
            "Access-Control-Allow-Private-Network": "true",
            "Access-Control-Max-Age": "600",
        })
        return b""

    def no_route(self, path: str) -> NoReturn:
        """Refuse a request whose path or method has no route. Raises APIError 404, 405 or 426."""
        environ = bottle.request.environ
        request_line = f"{environ['REQUEST_METHOD']} {path[:100]}"
        methods = [route.method for route in ROUTES if route.rule == path]
        if methods and "HTTP_UPGRADE" in environ:
            # Codex tries a WebSocket first, and after a 426 continues over HTTP
            raise APIError(426, "This server has no WebSockets.", code="upgrade_required")
        if methods:
            raise APIError(
                405,
                f"Method not allowed: {request_line!r}.",
                code="method_not_allowed",
                headers={"Allow": ", ".join(methods)})
        # Also for a path such as POST /v1/responses/input_tokens, which matches the path of a stored response
        advice = (
            "The base URL for clients ends in /v1. This server has chat completions, Responses, completions, "
            "embeddings, models and sessions, and nothing else of OpenAI's API.")
        tail = re.sub("^(/v1)+", "", re.sub("/+", "/", path).rstrip("/"))
        for corrected, route in itertools.product((tail, f"/v1{tail}"), ROUTES):
            if corrected != path and re.fullmatch(re.sub("<.*>", ".+", route.rule), corrected):
                advice = f"Did you mean {corrected!r}? Check the base URL of the client."
        raise APIError(404, f"Unknown path: {request_line!r}. {advice}", code="not_found")

    # Every request

    def handle(self, route: Route, **arguments: str) -> bytes | str:
        """Call the handler of a route, and return the body of the response. A handler returns an object, which becomes
        JSON, or JSON as bytes, or a string, whose Content-Type it sets. Every error becomes JSON."""
        began = time.monotonic()
        # Also for reading headers: Bottle's own accessors fail on some bytes above 127
        environ = bottle.request.environ
        id = request_id(environ.get("HTTP_X_REQUEST_ID", ""))
        set_headers({"X-Request-Id": id})
        try:
            check_caller(self.settings, environ)
            if not route.is_public:
                authorization = environ.get("HTTP_AUTHORIZATION", "")
                environ["kimi2api.key"] = authenticate(self.settings.api_master_key, authorization)
            result = route.handler(self, **arguments)
            body = result if isinstance(result, (bytes, str)) else dump_json(result)
        except Exception as error:
            # Python deletes this name. A second name would be a cycle with the traceback, and keep the request alive
            error = as_api_error(error)
            bottle.response.status = error.status
            set_headers(error.headers)
            body = dump_json(error.body())
        set_headers({"Content-Type": "application/json"})
        status = bottle.response.status_code
        key = environ.get("kimi2api.key")
        if key and route.method == "POST" and "kimi2api.is_admitted" not in environ:
            self._count(AnswerStats(), status)
        name = f"{key.name} " if key and key.name else ""
        level = logging.INFO if status >= 400 else logging.DEBUG
        milliseconds = (time.monotonic() - began) * 1000
        log.log(
            level,
            "%s %s%s %s %d %.0f ms",
            id,
            name,
            environ["REQUEST_METHOD"],
            route.path if route.answer else "/".join(environ["PATH_INFO"][:100].split("/")[:3]),
            status,
            milliseconds)
        return body


# ----------------------------------------------------------------------------------------------------------------------
# Routes
#
# The table of routes. `create_app(settings)` builds an application with its own state, so a test can have many.
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Route:
    """A route, with its description for /openapi.json. `request` and `answer` are names of schemas."""

    method: str
    rule: str  # in Bottle's form
    handler: Callable[..., Any]
    summary: str = ""
    answer: str = ""
    request: str = ""
    event: str = ""  # describes an event of the route's stream
    is_public: bool = False  # needs no key, because the answer has no data of any caller

    @cached_property
    def path(self) -> str:
        return re.sub(r"<(\w+).*?>", r"{\1}", self.rule)


def describe_api(app: App) -> JSONObject:
    return openapi(ROUTES, key_required=bool(app.settings.api_master_key))


ROUTES = [
    Route("POST", "/v1/chat/completions", App.create_chat_completion,
          "Create a chat completion", "OpenAIObject", "Request", "data: a chunk as JSON, or [DONE]"),
    Route("POST", "/v1/responses", App.create_response,
          "Create a response", "OpenAIObject", "ResponsesRequest", "data: an event of the Responses API as JSON"),
    Route("POST", "/v1/responses/compact", App.compact_response,
          "Compact a conversation", "OpenAIObject", "ResponsesRequest"),
    Route("GET", "/v1/responses/<id>", App.get_response,
          "Get a stored response", "OpenAIObject"),
    Route("DELETE", "/v1/responses/<id>", App.delete_response,
          "Delete a stored response", "OpenAIObject"),
    Route("POST", "/v1/completions", App.create_completion,
          "Complete a text", "OpenAIObject", "CompletionRequest", "data: a part of the completion as JSON, or [DONE]"),
    Route("POST", "/v1/embeddings", App.create_embeddings,
          "Create embeddings", "OpenAIObject", "EmbeddingsRequest"),
    Route("GET", "/v1/models", App.list_models,
          "List models", "OpenAIObject"),
    Route("GET", r"/v1/models/<id:re:[\s\S]+>", App.get_model,
          "Get a model", "OpenAIObject"),
    Route("GET", "/v1/sessions", App.list_sessions,
          "List sessions", "Sessions"),
    # Browsers remove the path segments . and .., so ?user= names these users
    Route("GET", r"/v1/sessions/<user:re:[\s\S]*>", App.get_session,
          "Get the turns of a session", "Session"),
    Route("DELETE", r"/v1/sessions/<user:re:[\s\S]*>", App.delete_session,
          "Delete a session", "Deleted"),
    Route("GET", "/v1/usage", App.get_usage,
          "Get usage and limits", "Usage"),
    Route("GET", "/metrics", App.get_metrics,
          "Get metrics for Prometheus", "text/plain"),
    Route("GET", "/health", App.get_health,
          "Get the server's health", "Health", is_public=True),
    Route("GET", "/openapi.json", describe_api,
          "Get this description", "OpenAPI", is_public=True),
    Route("GET", "/docs", App.get_page,
          "Open this page", "text/html", is_public=True),
    Route("GET", "/", App.get_page,
          "Open this page", "text/html", is_public=True),
]


ANY_PATH = r"<path:re:[\s\S]*>"
OTHER_ROUTES = [
    Route("OPTIONS", ANY_PATH, App.preflight, is_public=True),
    Route("ANY", ANY_PATH, App.no_route),
]


class WSGIApp(bottle.Bottle):  # type: ignore[misc]
    """A Bottle application whose routes may begin the response and send parts of it by WSGI's write(). PEP 3333 forbids
    write() inside a returned iterable, so these routes return an empty body."""

    def wsgi(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        environ["kimi2api.start_response"] = start_response

        def start_unless_begun(*args: Any) -> Any:
            if "kimi2api.start_response" in environ:
                return start_response(*args)

        return super().wsgi(environ, start_unless_begun)


def create_app(settings: Settings) -> bottle.Bottle:
    """Build the WSGI application. Raises SettingError for a store that cannot be used."""
    app = App(settings)
    wsgi = WSGIApp()
    for route in ROUTES + OTHER_ROUTES:
        wsgi.route(route.rule, route.method, partial(app.handle, route))
    return wsgi


########################################################################################################################
# Part 8: Server
#
# waitress, its graceful stop, and the command line. Nothing outside this part uses waitress.
########################################################################################################################


# ----------------------------------------------------------------------------------------------------------------------
# Client connections
#
# waitress's connections and requests, with errors in OpenAI's shape, and limits on clients without a key.
# ----------------------------------------------------------------------------------------------------------------------

SPARE_THREADS = 8  # beyond MAX_CONCURRENT_CHATS, for all other requests
MAX_CONNECTIONS = 1000  # beyond MAX_CONCURRENT_CHATS
# Seconds, at most, between requests, for the head of a request, and without progress in reading an answer
CONNECTION_TIMEOUT = 30.0
MIN_BODY_RATE = 1000  # bytes a second
# Requests of a connection. This many answers that need no key, of at most 40 KB, fit into MAX_UNSENT_BYTES
MAX_PIPELINED = 6
# Of a connection. Beyond this limit, a thread that writes waits for its client
MAX_UNSENT_BYTES = 1 << 18
# Bytes. With a system's default of 4 MB, a client that reads 20 KB a second would seem stalled
SEND_BUFFER = 1 << 16
# Received beyond MAX_BODY_BYTES, because a client that is still sending would not read the 413
EXTRA_BODY_BYTES = 16 << 20


class JSONErrorTask(ErrorTask):  # type: ignore[misc]
    """The response to a request that waitress refuses (not HTTP, headers too long, …), in OpenAI's shape."""

    def execute(self) -> None:
        error = self.request.error
        code = "request_too_large" if error.code == 413 else None
        kind = "server_error" if error.code >= 500 else "invalid_request_error"
        body = dump_json(APIError(error.code, f"{error.reason}: {error.body}", kind, code).body())
        self.status = f"{error.code} {error.reason}"
        self.response_headers += [
            ("Content-Type", "application/json"),
            ("X-Request-Id", request_id(self.request.headers.get("X_REQUEST_ID", ""))),
        ]
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class Task(WSGITask):  # type: ignore[misc]
    """The response to a request, by the application."""

    def service(self) -> None:
        environ = self.get_environment()  # returns the object that the application gets
        environ["kimi2api.stopping"] = self.channel.server.stopping  # an Event: chats end with an error once it is set
        with ExitStack() as stack:  # until the response is written, or the client has disconnected
            environ["kimi2api.defer"] = stack.callback
            super().service()

    def build_response_header(self) -> bytes:
        if not self.channel.server.accepting:
            # A client that keeps sending requests over one connection must not delay the stop
            self.set_close_on_finish()
        return super().build_response_header()


class DiscardingBuffer(OverflowableBuffer):  # type: ignore[misc]
    """A buffer for the body of a refused request. The body is received, because a client that is still sending would
    not read the answer."""

    def append(self, data: bytes) -> None:
        pass


class Parser(HTTPRequestParser):  # type: ignore[misc]
    """A parser of one request."""

    path = ""  # waitress reads this attribute even after a parsing error
    body_rcv: Any
    expect_continue: bool

    def __init__(self, adj: Any) -> None:
        super().__init__(adj)
        self.began = time.monotonic()  # with the request's first byte

    def parse_header(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # from urlsplit(), for a request target such as http://[/
            raise ParsingError(f"Bad request target: {error}") from None
        # waitress joins headers of one name by commas
        if self.version == "1.1" and ("HOST" not in self.headers or "," in self.headers["HOST"]):
            raise ParsingError("HTTP/1.1 requires one Host header")
        if "TRANSFER_ENCODING" in self.headers or (self.chunked and "CONTENT_LENGTH" in self.headers):
            # A proxy may read another end of the body: the rest must not be read as a request (RFC 9112, 6.1)
            self.headers["CONNECTION"] = "close"
        if self.body_rcv is None:
            return
        key = matching_key(self.adj.api_keys, self.headers.get("AUTHORIZATION", ""))
        if key and self.content_length <= self.adj.max_wanted_body:
            return
        # The application will refuse the request
        if self.expect_continue:  # the client has not sent the body yet
            self.expect_continue = False
            # If the client sends the body nevertheless, it must not be read as a request
            self.headers["CONNECTION"] = "close"
            self.body_rcv = None
        else:
            self.body_rcv.buf = DiscardingBuffer(0)

    def received(self, data: bytes) -> int:
        try:
            return int(super().received(data))
        except OSError as error:  # waitress keeps a large body in a temporary file
            self.error = InternalServerError(f"The body cannot be kept: {error}")
            self.headers["CONNECTION"] = "close"
            self.completed = True
            return len(data)


class Channel(HTTPChannel):  # type: ignore[misc]
    """A client's connection."""

    parser_class = Parser
    task_class = Task
    error_task_class = JSONErrorTask

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.last_active = time.monotonic()  # when the client last sent or read bytes

    def received(self, data: bytes) -> bool:
        self.last_active = time.monotonic()
        received = super().received(data)
        with self.requests_lock:
            # 64 KB contain up to 2,400 requests, and a client that reads no answer would block a thread
            if len(self.requests) > MAX_PIPELINED:
                del self.requests[MAX_PIPELINED:]
                # The client sends the other requests over a new connection
                self.requests[-1].headers["CONNECTION"] = "close"
        return received

    @property
    def is_busy(self) -> bool:
        """Return whether a request is being answered, or an answer is still being sent."""
        return bool(self.requests or self.total_outbufs_len)

    def is_overdue(self) -> bool:
        """Return whether the client takes too long to send a request or to read an answer."""
        if self.requests and not self.total_outbufs_len:
            return False
        now = time.monotonic()
        request = self.request
        if request and now - request.began > CONNECTION_TIMEOUT + request.body_bytes_received / MIN_BODY_RATE:
            return True
        return now - self.last_active > CONNECTION_TIMEOUT

    def handle_write(self) -> None:
        # Without the lock, waitress's loop would spin while a thread is sending, keep the GIL from the thread, and
        # perhaps send the thread's 100 Continue twice
        with self.outbuf_lock:
            super().handle_write()

    def send(self, data: bytes, do_close: bool = True) -> int:
        # The loop has closed the connection while a thread was about to send
        if self.socket is None:
            return 0
        # Only the loop, on the main thread, may close connections and so change the map of sockets
        sent: int = super().send(data, do_close and threading.current_thread() is threading.main_thread())
        if sent:
            self.last_active = time.monotonic()
        return sent


# ----------------------------------------------------------------------------------------------------------------------
# Server
#
# waitress with a loop that idle connections do not slow down, and a stop that lets chats finish.
# ----------------------------------------------------------------------------------------------------------------------


class SocketMap(dict[int, Any]):
    """waitress's map of sockets by descriptor, with a loop.

    wasyncore.loop polls the state of every socket in every iteration: with 300 idle connections, a lone chat cost a
    third more. This loop keeps the states in a selector. It polls a socket only after an event, and in every iteration
    while a thread answers the socket's request, because nothing else changes the state.
    """

    def __init__(self) -> None:
        super().__init__()
        self._selector = selectors.DefaultSelector()
        self._dirty: set[int] = set()  # descriptors of sockets to poll in the next iteration

    def __setitem__(self, fd: int, entry: Any) -> None:
        super().__setitem__(fd, entry)
        self._dirty.add(fd)

    def __delitem__(self, fd: int) -> None:
        super().__delitem__(fd)
        self._dirty.discard(fd)
        self._set_interest(fd, 0)

    def poll_once(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for events, and handle them."""
        for fd in list(self._dirty):
            entry = self[fd]
            # Before all else: a thread removes its request last, and then wakes the loop
            is_in_thread = bool(getattr(entry, "requests", None))
            events = 0
            if entry.readable():
                events = selectors.EVENT_READ
            elif entry.writable():  # only if not readable: waitress sends what is pending before it reads more
                events = selectors.EVENT_WRITE
            self._set_interest(fd, events)
            if events and not is_in_thread:
                self._dirty.discard(fd)
        for key, events in self._selector.select(timeout):
            entry = self[key.fd]
            self._dirty.add(key.fd)
            if events & selectors.EVENT_WRITE:
                wasyncore.write(entry)
                continue
            known = len(self)
            wasyncore.read(entry)
            # A listener accepts one connection at a time; with one for each turn, some of 64 would wait for a second
            while len(self) > known and entry.readable():
                known = len(self)
                wasyncore.read(entry)

    def _set_interest(self, fd: int, events: int) -> None:
        key = self._selector.get_map().get(fd)
        if key and key.events != events:
            self._selector.unregister(fd)
            key = None
        if events and not key:
            self._selector.register(fd, events)


class Server:
    """waitress on its port. `run` serves until the first SIGTERM, SIGINT or SIGHUP, then lets running chats finish.

    waitress has no graceful stop: its loop ends immediately and drops unsent bytes (its issue 198), so this class has a
    separate loop. Raises OSError if it cannot listen, ValueError if the system allows too few connections.
    """

    def __init__(self, settings: Settings, app: bottle.Bottle) -> None:
        self._grace = settings.shutdown_grace
        self._stopping = threading.Event()
        self._signalled = False
        self._next_check = 0.0  # for overdue connections
        self._sockets = SocketMap()
        self._connection_limit = connection_limit(settings.max_concurrent_chats[""])
        waitress.create_server(
            app,
            map=self._sockets,
            sockets=listening_sockets(settings.api_host, settings.api_port),
            ident="kimi2api",
            threads=settings.max_concurrent_chats[""] + SPARE_THREADS,
            connection_limit=self._connection_limit,
            # Otherwise waitress detects that a client has disconnected only when it sends
            channel_request_lookahead=1,
            max_request_body_size=settings.max_body_bytes + EXTRA_BODY_BYTES,
            recv_bytes=65536,
            outbuf_high_watermark=MAX_UNSENT_BYTES,
            outbuf_overflow=1 << 40,  # bytes; no answer goes to a file, because the disk may be full
            clear_untrusted_proxy_headers=False,
        )
        self._listeners = [entry for entry in self._sockets.values() if isinstance(entry, BaseWSGIServer)]
        for listener in self._listeners:
            listener.channel_class = Channel
            listener.stopping = self._stopping
            listener.adj.api_keys = settings.api_master_key
            listener.adj.max_wanted_body = settings.max_body_bytes
            # Inherited by accepted connections
            listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self.port = self._listeners[0].effective_port
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        # Under nohup, SIGHUP stays ignored
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._on_signal)

    def run(self) -> None:
        while not self._signalled:
            self._poll_once()
        for listener in self._listeners:
            # The listener's own close() would also close the pipe that wakes the loop
            wasyncore.dispatcher.close(listener)
        running = sum(channel.is_busy for channel in self._channels())
        log.info(
            "stopping; running requests: %d, with %g s to finish. A second signal stops immediately.",
            running,
            self._grace)
        self._drain(self._grace)
        # Running chats end with an error, which takes a moment to be sent
        self._stopping.set()
        self._drain(2.0)
        for channel in self._channels():
            channel.handle_close()  # wakes a thread that waits for its client
        self._drain(1.0)

    def _poll_once(self) -> None:
        self._sockets.poll_once(timeout=0.5)
        if len(self._sockets) >= self._connection_limit:
            # Idle clients, and clients that do not read their answers, must not exclude other clients
            idle = [channel for channel in self._channels() if not channel.requests]
            if idle:
                min(idle, key=attrgetter("last_active")).handle_close()
        if time.monotonic() >= self._next_check:
            self._next_check = time.monotonic() + 1
            for channel in self._channels():
                if channel.is_overdue():
                    channel.handle_close()

    def _channels(self) -> list[Channel]:
        return [entry for entry in self._sockets.values() if isinstance(entry, Channel)]

    def _drain(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        # A chat may still be stored after its client has disconnected
        dispatcher = self._listeners[0].task_dispatcher  # all listeners share it
        while (self._channels() or dispatcher.active_count) and time.monotonic() < deadline:
            for channel in self._channels():
                if not channel.is_busy:
                    channel.handle_close()
            self._poll_once()

    def _on_signal(self, number: int, _: Any) -> None:
        if self._signalled:
            os._exit(128 + number)
        self._signalled = True
        self._listeners[0].pull_trigger()


def listening_sockets(host: str, port: int) -> list[socket.socket]:
    """Return sockets that listen on a host's addresses. Skip addresses that this machine lacks, such as ::1 without
    IPv6, if there are others. Raises OSError."""
    sockets = []
    for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        try:
            sockets.append(socket.create_server((address[0], port, *address[2:]), family=family))
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
        else:
            port = sockets[-1].getsockname()[1]  # for port 0
    if not sockets:
        raise OSError("this machine does not have that address")
    return sockets


def connection_limit(chats: int) -> int:
    """Return the number of connections to allow, and raise the system's limit of open files to four times that number.

    A connection needs up to two files (waitress keeps a large body in one), and its chat two more for the upstream.
    Raises ValueError if there are too few connections for the chats.
    """
    limit = MAX_CONNECTIONS + chats
    try:
        import resource
    except ImportError:  # Windows, whose select() takes 512 sockets
        limit = 500
    else:
        # Linux always limits open files; elsewhere, unlimited is a large number
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = min(4 * limit, hard)
        if soft < wanted:
            with suppress(OSError, ValueError):  # some systems allow less than their hard limit
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                soft = wanted
        limit = min(limit, soft // 4)
    if limit < chats + SPARE_THREADS:
        raise ValueError(
            f"the system allows {limit} connections (a quarter of ulimit -n), too few for MAX_CONCURRENT_CHATS={chats}")
    return limit


# ----------------------------------------------------------------------------------------------------------------------
# Command line
#
# Flags, the greeting, --check, logging, and main().
# ----------------------------------------------------------------------------------------------------------------------


def parse_command_line(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags. A setting without a flag is None."""
    cli = argparse.ArgumentParser(
        "kimi2api", usage="kimi2api [--demo | --check] [--env-file PATH] [--SETTING VALUE …]", allow_abbrev=False,
        description="One OpenAI-compatible server for Kimi's web chat, official APIs and servers of your own.",
        epilog="A setting is a flag (--api-port 9000), an environment variable (API_PORT=9000) or a line in .env. The "
        "first of these wins.")
    cli.add_argument("--demo", action="store_true", help="use a built-in stand-in for the web chat; needs no internet")
    cli.add_argument("--check", action="store_true", help="test each upstream step by step, report failures, and exit")
    cli.add_argument("--env-file", metavar="PATH", help="read this file instead of .env")
    cli.add_argument("--version", action="version", version=f"kimi2api {__version__}")
    settings = cli.add_argument_group("settings")
    for f in Settings.table():
        flag = f"--{f.name.replace('_', '-')}"
        text = f"{f.metadata['meaning']}. Default: {f.metadata['default'] or '(empty)'}"
        settings.add_argument(flag, metavar="…", dest=f.name.upper(), help=text)
    return cli.parse_args(argv)


def greeting(settings: Settings, port: int) -> str:
    local = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "localhost": "127.0.0.1"}  # noqa: S104
    host = settings.api_host
    address = f"http://{local.get(host) or (f'[{host}]' if ':' in host else host)}:{port}"
    web_chat = f"{WEB_CHAT} ({without_credentials(settings.upstream_url).removeprefix('https://')})"
    access = "no key is asked, and only this machine may call"
    if settings.api_master_key:
        access = "a key of API_MASTER_KEY is required"
    return (
        f"kimi2api {__version__}  {address}/v1 is the base URL for clients ({access})\n"
        f"  upstreams  {', '.join([web_chat, *settings.apis])}\n"
        f"  try it     open {address}/ in a browser; Ctrl-C to stop it")


ADVICE = {  # by the code of an error whose message has no advice
    "upstream_unavailable": "Check the internet connection, HTTPS_PROXY, and that the server at this address runs.",
    "upstream_timeout": "Try later, or raise REQUEST_TIMEOUT.",
    "upstream_rate_limited": "Wait a few minutes, then try again.",
    "upstream_invalid_response": "Try later. If it fails again, look for a newer version of this program.",
    "upstream_refused": "Try later. If the web chat works in a browser, look for a newer version of this program.",
}


def run_check(settings: Settings) -> int:
    """Test each upstream step by step. Print each step with a tick or a cross and its seconds, then a verdict. Return 0
    if all steps succeeded, else 1."""
    failed = []
    providers = Providers(settings, Metrics()).by_name
    for provider in providers.values():
        print(f"{provider.name} (each step takes at most {settings.request_timeout:g} s):", flush=True)
        began = time.monotonic()
        for step, error in provider.check():
            print(f"  {'✗' if error else '✓'} {step} ({time.monotonic() - began:.1f} s)", flush=True)
            began = time.monotonic()
            if error:
                failed.append(provider.name)
                advice = ADVICE.get(error.code or "", "")
                print(f"    {error} [{error.code}]\n    {advice}".rstrip(), flush=True)
    if not failed:
        print("All upstreams answer. Next: start the server without --check.")
        return 0
    usable = [name for name in providers if name not in failed]
    advice = "follow the advice above, or set the key of an API (see --help)"
    if usable:
        advice = f"start the server without --check, and use the models of {' or '.join(usable)}"
    print(f"Not usable now: {', '.join(failed)}. Next: {advice}.")
    return 1


class LogFormatter(logging.Formatter):
    """A formatter that replaces control characters, so that no upstream or client can forge lines of the log."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return CONTROL_CHARACTERS.sub(" ", super().formatMessage(record))[:2000]


def start_logging(level: str) -> None:
    """Log this program's messages of at least this level, and errors of libraries."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.ERROR, handlers=[handler])
    logging.raiseExceptions = False  # no traceback when stderr cannot be written
    log.setLevel(level)


def main(argv: list[str] | None = None) -> int:
    """Run the program. Return the exit status: 0 if the check succeeded, 1 if it failed, 2 if the start was refused."""
    for stream in (sys.stdout, sys.stderr):
        if stream:  # None if it was closed at the start
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a console may lack ✓
    options = parse_command_line(argv)
    try:
        env_file = read_env_file(options.env_file or ".env", required=bool(options.env_file))
        settings = Settings.load(vars(options), os.environ, env_file)
        start_logging("WARNING" if options.check else settings.log_level.upper())
        if options.demo:
            try:
                address = DemoUpstream.start()
            except RuntimeError as error:  # too few threads
                raise SettingError(f"--demo: {error}") from None
            settings = replace(settings, upstream_url=address, chat_page_url=address)
        if not options.check:
            serve(settings)
        try:
            return run_check(settings)
        except OSError:  # stdout is closed
            os._exit(1)  # a normal exit would print a traceback for the unwritten rest
    except SettingError as error:
        print(f"kimi2api: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        os._exit(130)  # a normal exit would wait for a running fetch


def serve(settings: Settings) -> NoReturn:
    """Serve until a signal ends the process. Raises SettingError if the server cannot listen."""
    if not settings.api_master_key and not is_loopback(settings.api_host):
        raise SettingError(
            f"API_HOST: {settings.api_host!r} can be reached from other machines, so API_MASTER_KEY must be set; "
            "without a key only a loopback host such as 127.0.0.1 is accepted")
    app = create_app(settings)
    try:
        server = Server(settings, app)
    # The port is in use, the host has no address, or there are too few threads
    except (OSError, RuntimeError, ValueError) as error:
        # create_server() ends the message of a port that cannot be bound with the address, once more
        reason = re.sub(r" \(while .*", "; --api-port chooses another port", str(error))
        raise SettingError(f"cannot listen on {settings.api_host} port {settings.api_port}: {reason}") from None
    with suppress(OSError):  # stdout may be closed
        print(greeting(settings, server.port), flush=True)
    gc.freeze()
    # New objects between two collections. With Python's 700, several collections take 10 % of a chat's time
    gc.set_threshold(50_000)
    server.run()
    os._exit(0)  # a normal exit would wait for abandoned upstream calls


########################################################################################################################
# Appendices
#
# The application serves the description and the page. The command line starts the demo upstream.
########################################################################################################################


# ----------------------------------------------------------------------------------------------------------------------
# Demo upstream
#
# A small stand-in for the web chat, with its page, nonce, form and JSON: `--demo` runs the real code without internet.
# ----------------------------------------------------------------------------------------------------------------------


class DemoUpstream(BaseHTTPRequestHandler):
    """A web chat without a model. Its answers say so, and quote the received messages."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet

    @classmethod
    def start(cls) -> str:
        """Serve on a free loopback port in a new thread. Return the address of both the page and the endpoint."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), cls)
        threading.Thread(target=server.serve_forever, name="demo", daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}/built-in-demo"

    def do_GET(self) -> None:
        self.reply(b'<html><script>var kimi_ajax = {"nonce": "demo"};</script></html>')

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        form = dict(parse_qsl(body.decode()))
        answer = demo_answer(form["message"])
        self.reply(dump_json({"success": True, "data": {"message": answer}}))

    def reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


SPEAKER = re.compile(f"^(?:{'|'.join(SPEAKERS.values())})(?: .+?)?: ", re.M)


def demo_answer(prompt: str) -> str:
    """Call the first tool if the prompt has no result, answer empty JSON if it requests JSON, else quote the prompt."""
    *earlier, newest = SPEAKER.split(prompt)
    has_result = f"\n{SPEAKERS['tool']}" in prompt
    _, _, tools = prompt.partition(f"{TOOLS_FOLLOW}\n- ")
    name = re.match(r"[\w.-]+", tools)
    if name and not has_result:
        return f'<tool_call>{{"name": "{name[0]}"}}</tool_call>'
    if JSON_ONLY in prompt:
        return "[] {}"  # the reader picks the document of the right type
    lines = [f"\n- {' '.join(text.split())[:60]}" for text in earlier if text.strip()]
    return (
        f"This is the demo of kimi2api (演示模式): no model was asked. You wrote: “{newest.strip()}”\n\n"
        f"Earlier messages:{''.join(lines) or ' none.'}\n\nFor real answers, start without --demo.")


# ----------------------------------------------------------------------------------------------------------------------
# Description
#
# The OpenAPI description of the routes.
# ----------------------------------------------------------------------------------------------------------------------


def named_object(name: str, fields: Schema) -> Schema:
    """Return the schema of an object whose field `object` names its type."""
    return object_of({"object": choice_of(name), **fields})


OR_NULL_STRING = any_of(STRING, NULL)
COUNTED = dict.fromkeys(("requests", "prompt_tokens", "completion_tokens", "total_tokens"), COUNT)
SESSION_HEAD = {"user": STRING, "created": INTEGER, "last_used": INTEGER}
SCHEMAS = {
    "Request": CHAT_REQUEST,
    "CompletionRequest": COMPLETION_REQUEST,
    "ResponsesRequest": RESPONSES_REQUEST,
    "EmbeddingsRequest": EMBEDDINGS_REQUEST,
    "OpenAIObject": {**OBJECT, "externalDocs": {"url": "https://platform.openai.com/docs/api-reference"}},
    "Session": named_object("session", {
        **SESSION_HEAD,
        "expires_at": INTEGER,
        "turns": array(array(MESSAGE)),
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
        **dict.fromkeys(("chats", "sessions", "store", "upstreams"), OBJECT),
    }),
    "OpenAPI": OBJECT,
    "Error": object_of({
        "error": object_of({
            "message": STRING,
            "type": STRING,
            "param": OR_NULL_STRING,
            "code": OR_NULL_STRING,
        }),
    }),
}


def body_content(schema: str) -> JSONObject:
    """Describe a body. schema: the name of the schema of JSON, or the content type of text."""
    if "/" in schema:
        return {schema: {"schema": STRING}}
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


def operation(route: Route) -> JSONObject:
    """Return the OpenAPI operation of a route."""
    answer = body_content(route.answer)
    if route.event:
        # Without a type: OpenAPI 3.1 does not say whether the schema is of the stream or of an event
        answer["text/event-stream"] = {"schema": {"description": route.event}}
    described: JSONObject = {
        "summary": route.summary,
        "responses": {
            "200": {"description": "The answer", "content": answer},
            "default": {"description": "An error", "content": body_content("Error")},
        },
    }
    name = re.search(r"<(\w+)", route.rule)
    if name:
        described["parameters"] = [{"name": name[1], "in": "path", "required": True, "schema": STRING}]
    if route.request:
        described["requestBody"] = {"required": True, "content": body_content(route.request)}
    if route.is_public:
        described["security"] = []
    return described


def openapi(routes: Iterable[Route], key_required: bool) -> JSONObject:
    """Return the OpenAPI 3.1 description of the routes."""
    paths: dict[str, JSONObject] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "kimi2api",
            "version": __version__,
            "license": {"name": "Apache-2.0"},
        },
        "security": [{"key": []}] if key_required else [],
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "paths": paths,
    }


# ----------------------------------------------------------------------------------------------------------------------
# Page
#
# The page at / and /docs. It loads nothing from the internet.
# ----------------------------------------------------------------------------------------------------------------------

PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>kimi2api</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'>
<rect width='32' height='32' rx='8' fill='%234052c0'/>
<path d='M11 8v16M22 8l-9 8 9 8' fill='none' stroke='white' stroke-width='4'/></svg>">
<style>
/* Base */
:root {
  color-scheme: light dark;
  --page: light-dark(#f6f6f7, #141416);
  --card: light-dark(#fff, #1d1d20);
  --tint: light-dark(#ececf0, #2a2a2f);
  --line: light-dark(#dddde2, #35353b);
  --text: light-dark(#1b1b1f, #ececf0);
  --soft: light-dark(#5c5c66, #a3a3ad);
  --accent: light-dark(#4052c0, #a5b4ff);
  --bad: light-dark(#b3261e, #ff948a);
}
* { box-sizing: border-box; margin: 0; min-width: 0 }
[hidden] { display: none !important }
body { display: flex; flex-direction: column; height: 100dvh; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
/* Until the server has answered, so that nothing moves. The chat waits a moment at most */
.loading :is(main, nav, #language), .waking #overview { visibility: hidden }
.unseen { position: fixed; clip-path: inset(50%) }
:focus-visible { outline: 2px solid var(--accent) }
a:focus-visible { outline-offset: -2px }
/* Controls and states */
button, input, select, textarea { font: inherit; color: inherit; background: var(--card); height: 2.25rem;
  border: 1px solid light-dark(#8c8c96, #70707a); border-radius: .5rem; padding: 0 .75rem }
button, summary { cursor: pointer; white-space: nowrap }
button:hover, summary:hover, a { color: var(--accent) }
.main, .main:hover { background: var(--accent); color: var(--card); border: 0; font-weight: 600 }
.quiet { border: 0; background: none; padding: 0 .5rem; height: 1.75rem }
::placeholder { color: inherit; opacity: .75 }
::placeholder, #users bdi { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.soft, .quiet, .thinking, #welcome p { color: var(--soft) }
.soft, .quiet, header p, .code > div { font-size: .875rem }
.bad, .bad:hover { color: var(--bad) }
.degraded { color: light-dark(#8a5700, #f2bd60); text-decoration: underline }
[aria-invalid=true], article:last-child > .problem { border-color: var(--bad); outline-color: var(--bad) }
article:not(:last-child) .bad { color: inherit }
.ok::before, .degraded::before, td > .bad::before { content: '● ' }
.ok::before { color: light-dark(#19723d, #62cc8e) }
/* Layout: head, sections, and the chat's column */
header { position: relative; display: flex; flex-wrap: wrap; align-items: center; gap: .5rem; padding: .5rem 1rem;
  background: var(--card); border-bottom: 1px solid var(--line); overflow-wrap: normal }
header a { color: var(--soft); text-decoration: none }
h1, h2, h3 { font-size: 1.06rem }
h1 + p { flex: 1 1 5rem }
#lock { flex: 9 1 4rem; max-width: 12rem }
#key { width: 100% }
/* Below the head, so that nothing moves when it comes */
#wrong { position: absolute; top: 100%; z-index: 1; padding: 0 .5rem; background: var(--card); border-radius: .5rem }
#wrong:not(:empty) { border: 1px solid }
nav { order: 1; width: 100%; display: flex; justify-content: space-between; overflow-x: auto }
nav a { padding: .25rem .4rem; border-radius: .5rem; white-space: nowrap; font-size: .9375rem }
nav a[aria-current] { background: var(--tint); color: var(--text) }
main { flex: 1; min-height: 0; display: flex }
section { display: none; flex: 1; overflow: auto; padding: 0 1rem 1rem; font-size: .9375rem }
.current { display: block }
section > :not(#log), article { max-width: 46rem; width: 100%; margin-inline: auto }
h2 { margin: 1rem 0 .5rem }
#chat { font-size: 1rem; flex-direction: column; padding-block: 0 }
#chat.current { display: flex }
#bar { display: flex; flex-wrap: wrap; gap: .5rem; padding-block: .5rem }
#bar > * { flex: 1 1 12rem; background: none }
#bar > #fresh { flex: none }
#log { flex: 1; overflow: auto }
#log:empty, :not(:empty) + #welcome { display: none }
#welcome { margin: auto; text-align: center; text-wrap: balance }
#welcome h2 { font-size: 1.5rem }
#welcome p { height: 3rem }
#composer { display: flex; align-items: end; gap: .5rem; padding: .5rem; margin-bottom: 1rem; background: var(--card);
  border: 1px solid light-dark(#8c8c96, #70707a); border-radius: 1rem }
#question + p { display: none; line-height: 2.25rem }
#composer:focus-within { border-color: var(--accent) }
#question { flex: 1; field-sizing: content; height: auto; max-height: 30vh; resize: none; border: 0; outline: 0;
  padding: .375rem .5rem }
/* Conversation */
article, #connect pre { white-space: pre-wrap }
article { padding: .5rem 0 }
.user > div { background: var(--tint); border-radius: 1rem; padding: .5rem 1rem; width: fit-content; max-width: 85%;
  margin-left: auto }
.text > * { margin-bottom: .75rem }
.text :is(ul, ol) { padding-left: 1.5rem }
article > .quiet, summary + .quiet { margin-left: -.5rem }
.waiting > .text:empty::before { content: '●'; color: var(--soft) }
li { margin: .25rem 0 }
code { font: .875em ui-monospace, Consolas, monospace }
.text :not(pre) > code { background: var(--tint); border-radius: .25rem; padding: .1em .3em }
/* Cards and tables */
.card, .code { background: var(--card); border: 1px solid var(--line); border-radius: .75rem; overflow: auto;
  margin-bottom: .75rem }
.card { padding: .5rem 1rem }
#api p { margin-bottom: .5rem }
.problem, .problem button { margin-top: .5rem }
.code > div { display: flex; justify-content: space-between; align-items: center;
  padding: 0 .25rem 0 .75rem; background: var(--tint) }
pre { overflow: auto; padding: .75rem }
/* The first three are rows: name, value, Copy */
#connect > div:nth-child(-n + 4) {
  display: flex;
  align-items: center;
  padding: 0 .25rem 0 .75rem;
  > div { display: contents; white-space: nowrap }
  button { order: 1; margin-left: auto }
}
.thinking { margin-bottom: .5rem }
.thinking p { border-left: 2px solid var(--line); padding-left: 1rem }
table { width: 100%; border-spacing: 0 }
td { padding: .375rem 0; vertical-align: top }
tr + tr > td, #users > * + * { border-top: 1px solid var(--line) }
td + td { padding-left: 1rem }
.text table { display: block; overflow: auto }
.text tr:first-child { font-weight: 600 }
#routes td { display: block }
#routes code { font-weight: 600 }
#routes td + td { color: var(--soft) }
#routes td + td, tr:has(meter) > td { border: 0; padding: 0 0 .375rem }
meter:is(:not([value]), [value='0']) { visibility: hidden }
#upstreams td:first-child { min-width: 5rem }
#upstreams td + td { width: 100% }
meter { display: block; width: 100%; height: .5rem; appearance: none }
::-webkit-meter-bar { background: var(--tint); border: 0 }
::-webkit-meter-optimum-value { background: var(--accent) }
::-moz-meter-bar { background: var(--accent) }
::-webkit-meter-suboptimum-value { background: var(--bad) }
svg { width: 100%; height: 6rem; fill: var(--accent); border-bottom: 1px solid var(--line) }
#dates { text-align-last: justify }
summary { display: flex; gap: .5rem }
summary::before { content: '▸' / '' }
[open] > summary::before { content: '▾' / '' }
#users summary { padding: .5rem 0 }
#users bdi { flex: 1 }
@media (min-width: 640px) {
  nav { order: 0; width: auto }
  #question:placeholder-shown + p { display: block }
}
/* A wide window shows the chat beside another section */
@media (min-width: 1000px) {
  [href='#chat'] { display: none }
  #chat { display: flex }
  .current:not(#chat), #chat.current + section { display: block; flex: 0 0 27rem; border-left: 1px solid var(--line) }
  [href='#chat'][aria-current] + a { background: var(--tint); color: var(--text) }
}
@media not (prefers-reduced-motion) { .waiting > .text::before { animation: 1s infinite alternate breathe } }
@keyframes breathe { to { opacity: .2 } }
</style>
<body class="loading waking">
<header><h1>kimi2api</h1>
  <p role="status"><a id="status" href="#overview"></a><noscript>This page needs JavaScript.</noscript></p>
  <div id="lock" hidden><input id="key" type="password" autocomplete="off" data-name="API key" aria-describedby="wrong">
    <p id="wrong" role="status" class="bad"></p></div>
  <nav><a href="#chat">Chat</a><a href="#overview">Overview</a><a href="#sessions">Sessions</a>
    <a href="#connect">Connect</a><a href="#api">API</a></nav>
  <button id="language" class="quiet"></button></header>
<main>
<section id="chat" data-name="Chat">
  <div id="bar"><select id="model" data-name="Model"><option value="">Model</select>
    <input id="user" maxlength="512" data-name="Session name (optional)" autocomplete="off">
    <button id="fresh">New chat</button></div>
  <div id="log" role="log" aria-live="off" tabindex="0" data-name="Conversation"></div>
  <div id="welcome"><h2>Ask anything</h2><p></p></div>
  <form id="composer"><textarea id="question" rows="1" data-name="Message"></textarea>
    <p class="soft">Shift+Enter breaks the line</p>
    <button id="send" class="main">Send</button></form></section>
<section id="overview"><h2>Upstreams</h2>
  <table class="card"><tbody id="upstreams"></table><h2>Server</h2>
  <table class="card"><tbody id="server"></table><h2>Usage</h2><p role="status"></p>
  <div id="usage" hidden><table class="card"><tbody id="today"></table><p id="legend" class="soft"></p>
    <svg id="chart" role="img" viewBox="0 0 310 100" preserveAspectRatio="none"><path /></svg>
    <p id="dates" class="soft"></p></div></section>
<section id="sessions" tabindex="-1"><h2>Sessions</h2><p role="status"></p>
  <div id="users" class="card" hidden></div></section>
<section id="connect"><h2>Connect</h2></section>
<section id="api"><h2>API</h2><p><a href="openapi.json">/openapi.json</a></p>
  <table class="card"><tbody id="routes"></table></section>
</main>
<p id="live" role="status" class="unseen"></p>
<script type="module">
const [status, lock, key, wrong, language, chat, bar, model, user, fresh, log, welcome, composer, question, send,
  overview, upstreams, server, usage, today, legend, chart, dates, sessions, users, connect, api, routes, live,
] = document.querySelectorAll('[id]');

// Words: English = Chinese, after a pattern of codes where they advise on an error. A # stands for a value

const table = `
ok = 正常
Running = 运行正常
# of # upstreams failing = 上游服务异常：# / #
The store is failing = 存储异常
Chat = 对话
Overview = 概览
Sessions = 会话
Connect = 接入
API key = API 密钥
API key needed = 需要 API 密钥
The API key is wrong. = API 密钥不正确。
Model = 模型
Session name (optional) = 会话名（可选）
New chat = 新对话
Conversation = 对话内容
Ask anything = 想聊点什么？
Name the session and the server remembers it. = 填写会话名，服务器就会记住对话。
Message = 输入消息
Shift+Enter breaks the line = Shift+Enter 换行
Send = 发送
Stop = 停止
You = 我
Answer = 回答
Thinking = 思考过程
Copy = 复制
Copied = 已复制
Stopped = 已停止
Try again = 重试
Upstreams = 上游服务
Server = 服务器
failing since #: # = 异常（自 # 起）：#
Store: # = 存储：#
Version #, up since # = 版本 #，自 # 起运行
Chats running: # of # = 进行中的对话：# / #
Usage = 用量
Requests today: # = 今日请求：#
Requests per minute: at most # = 每分钟请求上限：#
Tokens today: # = 今日 token：#
Tokens today: # of # = 今日 token：# / #
Tokens per day, last # days (peak #) = 每日 token 用量（近 # 天，峰值 #）
None = 无
1 turn, # = 1 轮，#
# turns, # = # 轮，#
Continue = 继续对话
Forget = 删除
Really forget? = 确定删除？
Admin Settings, Connections, OpenAI, Add Connection = 管理员设置 → 外部连接 → OpenAI → 添加连接
Settings, Model Provider, Add (type OpenAI) = 设置 → 模型服务 → 添加（类型选 OpenAI）
The server cannot be reached. = 无法连接服务器。
The answer is empty. = 回答为空。
The answer broke off. = 回答中断了。
away = Is kimi2api running? = 请确认 kimi2api 正在运行。
api_key = This server asks for an API key: type it at the top. = 此服务器需要 API 密钥，请在页面顶部填写。
model_not_found = Pick a model from the list. = 请从列表中选择模型。
blocked = Open the chat page once in a browser, or use another network. = 请先用浏览器打开一次聊天页，或换个网络。
busy|overloaded|rate_limit = Wait a minute, then try again. = 请稍等一分钟再重试。
^insufficient_quota = Wait until midnight UTC. = 请等到 UTC 零点。
context|too_large = Start a new chat, write less, or pick another model. = 请新建对话、缩短消息，或换一个模型。
upstream_auth = Check the key that the server has for this API. = 请检查服务器所用的上游 API 密钥。
store = Leave the session name empty, or see the server's log. = 请留空会话名，或查看服务器日志。
.* = Try again or pick another model. Run kimi2api --check to see why. = 请重试或换模型。用 kimi2api --check 查看原因。`
  .split('\n').map(line => line.split(' = '));
const chinese = Object.fromEntries(table.map(row => row.slice(-2)));
const advice = code => table.find(row => row.length > 2 && code.match(row[0]))[1];
let secrets = {}, choices = {};
try { [secrets, choices] = [sessionStorage, localStorage]; } catch {}  // a browser that keeps nothing
let locale = /^zh/.test(choices.kimi2apiLanguage ?? navigator.language) ? 'zh-CN' : 'en';
const say = (text, ...values) =>
  (locale === 'en' ? text : chinese[text] ?? text).replace(/#/g, () => values.shift().toLocaleString(locale));
const time = seconds => new Date(seconds * 1000).toLocaleString(locale,
  {month: 'short', day: 'numeric', hour: '2-digit', minute: '2-digit', hourCycle: 'h23'});

// Elements. Texts get in as text alone, so that they are never HTML

const make = (tag, parent, textContent = '', className = '') =>
  parent.appendChild(Object.assign(document.createElement(tag), {textContent, className}));
function update(element, properties) {  // only those that differ: a text made anew loses its selection
  for (const name in properties)
    if (element[name] !== properties[name]) element[name] = properties[name];
  return element;
}
const label = (element, words) => update(element, {words, textContent: say(words)});  // follows the language
const button = (parent, words, onclick) => update(label(make('button', parent, '', 'quiet'), words), {onclick});
const show = (element, textContent) => update(element, {textContent});
// Makes children for these keys. Those that stay are not made anew: they keep the focus
function keep(parent, keys, create) {
  const wanted = new Set(keys);
  for (const child of [...parent.children]) if (!wanted.has(child.key)) child.remove();
  const children = keys.map((key, index) => {
    const child = parent.children[index];
    return child?.key === key ? child : Object.assign(parent.insertBefore(create(key), child), {key});
  });
  while (parent.children[keys.length]) parent.lastChild.remove();
  return children;
}
function fill(body, rows) {  // rows of cells: a text, or properties of an element. A selection stays while none differs
  if (!rows.length) rows = [[say('None')]];
  const state = JSON.stringify(rows);
  if (body.state === state) return;
  Object.assign(body, {state, textContent: ''});
  for (const cells of rows) {
    const row = make('tr', body);
    for (const cell of cells) {
      const {tag = 'bdi', ...properties} = typeof cell === 'string' ? {textContent: cell} : cell;
      update(make(tag, make('td', row)), properties);
    }
  }
}
async function copy(text) {  // whether it could
  if (navigator.clipboard) return navigator.clipboard.writeText(text).then(() => true, () => false);
  document.addEventListener('copy', event => {  // plain http of another machine
    event.clipboardData.setData('text/plain', text);
    event.preventDefault();
  }, {once: true});
  return document.execCommand('copy');
}
const copyButton = (parent, text) => button(parent, 'Copy', async ({target}) => {
  if (!await copy(text())) return;
  live.textContent = label(target, 'Copied').textContent;
  setTimeout(label, 2000, target, 'Copy');
});
function codeBlock(parent, title) {
  const box = make('div', parent, '', 'code'), bar = make('div', box), code = make('code', make('pre', box));
  make('span', bar, title);
  copyButton(bar, () => code.textContent);
  code.parentNode.tabIndex = 0;  // so that the keyboard can scroll it
  return {box, code};
}

// Markdown: headings, lists, tables, code, bold and italic; all else stays text. It is drawn while it comes

function inline(parent, text) {
  text.split(/(\x60[^\x60]+\x60|\*\*[^\s*].*?\*\*|\*[^\s*](?:[^*]*[^\s*])?\*)/).forEach((part, index) => {
    if (index % 2 === 0) parent.append(part);
    else if (part[0] === '`') make('code', parent, part.slice(1, -1));
    else if (part[1] === '*') inline(make('strong', parent), part.slice(2, -2));
    else inline(make('em', parent), part.slice(1, -1));
  });
}
class Markdown {
  rest = '';  // the line that is not complete, and its elements
  last = [];
  state = {lists: []};  // before it: block takes its text, table its row, lists are open, code is inside of a fence
  constructor(parent) { this.parent = parent; }
  write(text) {  // complete lines are drawn once, the rest again when more of it has come
    const lines = (this.rest + text).split('\n');
    for (const element of this.last) element.remove();
    this.rest = lines.pop();
    for (const line of lines) this.state = this.draw(line);
    this.last = [];
    this.draw(this.rest);
  }
  add(tag, parent) {
    const element = make(tag, parent);
    this.last.push(element);
    return element;
  }
  draw(line) {  // returns the state after it
    const {block, lists, code, fence, indent} = this.state;
    const [, mark, title] = line.match(/^\s*(\x60{3,}|~{3,})([^\x60]*)$/) ?? [];
    if (code) {
      if (mark?.startsWith(fence) && !title.trim()) return {lists};
      this.add('span', code).textContent = line.slice(Math.min(indent, line.search(/\S|$/))) + '\n';
      return this.state;
    }
    if (!line.trim()) return {lists};
    const [, heading] = line.match(/^#{1,6}\s+(.*)/) ?? [];
    if (heading) {
      inline(this.add('h3', this.parent), heading);
      return {lists: []};
    }
    const item = line.match(/^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)/);
    if (item) return this.drawItem(lists, item);
    const open = /^\s/.test(line) ? lists : [], place = open.at(-1)?.list.lastChild ?? this.parent;
    if (mark) {
      const {box, code} = codeBlock(place, title.trim() || 'text');
      this.last.push(box);
      return {lists: open, code, fence: mark, indent: line.indexOf(mark)};
    }
    if (/^\s*\|.*\|\s*$/.test(line)) {
      const table = this.state.table ?? this.add('table', place), row = this.add('tr', table);
      if (/[^\s|:-]/.test(line))  // not the rule below its head
        for (const cell of line.trim().slice(1, -1).split('|')) inline(make('td', row), cell.trim());
      return {lists: open, table};
    }
    const taker = block ?? this.add('p', place);
    inline(this.add('span', taker), (block ? '\n' : '') + line.trimStart());
    return {block: taker, lists: block ? lists : open};
  }
  drawItem(lists, [, {length: indent}, mark, text]) {
    const tag = /\d/.test(mark) ? 'ol' : 'ul';
    const open = lists.filter(list => list.indent < indent || list.indent === indent && list.tag === tag).slice(0, 9);
    const outer = open.at(-1);
    if (!outer || outer.indent < indent && open.length < 9) {
      const list = this.add(tag, outer?.list.lastChild ?? this.parent);
      list.start = parseInt(mark);
      open.push({indent, tag, list});
    }
    const block = this.add('li', open.at(-1).list);
    inline(block, text);
    return {block, lists: open};
  }
}

// Calls of the server

const secret = () => key.value.replace(/[^!-~]/g, '');  // no key has anything else in it
function fail(message, code) { throw Object.assign(Error(message), {code: String(code ?? '')}); }
async function call(path, options) {  // the answer's JSON, or the body of what was sent with a method
  const headers = {'Content-Type': 'application/json'};
  if (secret() && path.startsWith('v1/')) headers.Authorization = 'Bearer ' + secret();
  const gone = () => fail(say('The server cannot be reached.'), 'away');
  const answer = await fetch(path, {headers, signal: AbortSignal.timeout(6000), ...options}).catch(gone);
  if (!answer.ok) {
    const {error} = await answer.json().catch(() => ({}));
    fail(error?.message ?? `HTTP ${answer.status}`, error?.code);
  }
  return options?.method ? answer.body : answer.json().catch(gone);
}
async function* deltas(stream) {  // of an answer. Fails with its error, or when it ends before its end
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (let read, rest = ''; !(read = await reader.read().catch(() => ({done: true}))).done;) {
    const lines = (rest + read.value).split('\n');
    rest = lines.pop();
    for (const data of lines.filter(line => line.startsWith('data:')).map(line => line.slice(5).trim())) {
      if (data === '[DONE]') return;
      const {error, choices} = JSON.parse(data);
      if (error) fail(error.message, error.code);
      yield choices?.[0]?.delta ?? {};
    }
  }
  fail(say('The answer broke off.'));
}
const sessionPath = name =>  // browsers take . and .. out of a path
  'v1/sessions/' + (/^\.\.?$/.test(name) ? '?user=' + name : encodeURIComponent(name));

// Chat

let messages = [], isRemembered = false;  // of the conversation; by the server, which needs the newest only
let running = null;  // what aborts the running chat
function addTurn(parent, role) {
  const turn = make('article', parent, '', role);
  label(make('h3', turn, '', 'unseen'), role === 'user' ? 'You' : 'Answer');
  return turn;
}
class Answer {
  text = '';
  fresh = '';  // what is not drawn yet
  constructor(parent) {
    this.turn = addTurn(parent, 'assistant');
    this.thinking = make('details', this.turn, '', 'thinking');
    this.thinking.hidden = true;
    label(make('summary', this.thinking), 'Thinking');
    this.thought = make('p', this.thinking);
    this.markdown = new Markdown(make('div', this.turn, '', 'text'));
  }
  write({content, reasoning_content, reasoning}) {
    const thought = reasoning_content || reasoning;
    if (thought) this.thought.append(thought);
    this.fresh += content ?? '';
    this.frame ||= requestAnimationFrame(() => this.draw());  // once for many deltas of a fast answer
  }
  draw() {
    const far = log.scrollHeight - log.scrollTop - log.clientHeight;
    this.thinking.hidden = !this.thought.textContent;
    this.markdown.write(this.fresh);
    this.text += this.fresh;
    [this.fresh, this.frame] = ['', 0];
    if (far < 80) log.scrollTop = log.scrollHeight;  // follow, unless the reader has scrolled up
  }
  end() {
    cancelAnimationFrame(this.frame);
    this.draw();
    this.turn.classList.remove('waiting');
    if (this.text) copyButton(this.turn, () => this.text);
  }
}
function drawMessage(parent, {role, content, tool_calls}) {
  const text = typeof content === 'string' && content || JSON.stringify(tool_calls ?? content);
  if (role === 'user') return make('div', addTurn(parent, role), text).parentNode;
  const answer = new Answer(parent);
  answer.write({content: text});
  answer.end();
}
function begin(turns = []) {  // a conversation, anew or as the server remembers it
  running?.abort();
  [messages, isRemembered] = [turns.flat(), turns.length > 0];
  log.replaceChildren();
  for (const message of messages) drawMessage(log, message);
  log.scrollTop = log.scrollHeight;
}
async function openUser() {
  const name = user.value, session = name && await call(sessionPath(name)).catch(error => error);
  if (name !== user.value) return;
  isRemembered = false;  // a new user gets the conversation as it stands
  if (session.turns) begin(session.turns);
}
function setRunning(controller) {
  running = controller;
  label(send, running ? 'Stop' : 'Send');
}
async function ask(text) {
  const mine = new AbortController(), turns = messages, before = turns.length, asked = {role: 'user', content: text};
  const body = {model: model.value || undefined, user: user.value || undefined, stream: true,
    messages: isRemembered ? [asked] : [...turns, asked]};
  log.querySelectorAll('.problem button').forEach(element => element.remove());
  const turn = drawMessage(log, asked), answer = new Answer(log);
  answer.turn.classList.add('waiting');
  log.scrollTop = log.scrollHeight;
  setRunning(mine);
  let problem;
  try {
    const options = {method: 'POST', body: JSON.stringify(body), signal: mine.signal};
    for await (const delta of deltas(await call('v1/chat/completions', options))) answer.write(delta);
    if (!answer.text && !answer.fresh) fail(say('The answer is empty.'));
    if (turns === messages) isRemembered = !!body.user && body.user === user.value;
  } catch (error) { problem = error; }
  answer.end();
  if (answer.text) turns.push(asked, {role: 'assistant', content: answer.text});
  if (mine.signal.aborted) label(make('span', answer.turn, '', 'soft'), 'Stopped');
  else if (problem) addProblem(answer.turn, problem, () => {
    turns.length = before;
    turn.remove();
    answer.turn.remove();
    ask(text);
    question.focus();
  });
  live.textContent = problem ? answer.turn.lastChild.textContent : answer.text;
  if (running === mine) setRunning(null);
  log.scrollTop = log.scrollHeight;
  watch();
}
function addProblem(parent, {message, code = ''}, again) {
  const box = make('div', parent, '', 'card problem');
  const shown = message.includes(code) || code === 'away' ? message : `${message} (${code})`;
  if (code !== 'invalid_api_key') make('p', box, shown, 'bad');
  label(make('p', box), advice(code));
  button(box, 'Try again', again).className = '';
}

// Overview

let timer, locked, refused, newest = 0;  // locked: a key is asked for; refused: the one that was wrong
async function watch() {
  if (!document.hidden) await refresh(++newest).catch(({message}) => {
    update(status, {textContent: message, className: 'bad'});
    fill(upstreams, [[message]]);  // rather than what was
  });
  document.body.className = '';
  clearTimeout(timer);
  timer = setTimeout(watch, 5000);
}
async function refresh(mine) {  // what comes after a newer call has begun is not shown
  const now = await call('health'), tried = secret();
  if (mine !== newest) return;
  const isNew = locked !== now.key_required;
  locked = now.key_required;
  lock.hidden = !locked;
  if (isNew) fillRoutes();
  if (isNew) fillConnect();
  fillServer(now);
  document.body.className = '';
  if (isNew && locked && !tried && !question.value) key.focus();
  const paths = ['usage', 'sessions', 'models'], isHopeless = locked && ['', refused].includes(tried);
  const answers = await Promise.all(paths.map(path =>
    isHopeless ? {code: 'invalid_api_key'} : call('v1/' + path).catch(error => error)));
  if (mine !== newest) return;
  const isShut = answers[0].code === 'invalid_api_key';
  const isWrong = isShut && tried !== '', needed = advice('api_key');
  const problem = isShut && say(isWrong ? 'The API key is wrong.' : needed);
  if (isShut) refused = tried;
  key.ariaInvalid = isWrong;
  show(wrong, isWrong ? problem : '');
  label(welcome.firstChild, isShut ? 'API key needed' : 'Ask anything');
  label(welcome.lastChild, isShut ? needed : 'Name the session and the server remembers it.');
  [[usage, fillUsage], [users, fillSessions], [model, fillModels]].forEach(([body, fillIn], index) => {
    const message = problem || answers[index].message || fillIn(answers[index]) || '';
    if (body === model) return;
    show(body.previousElementSibling, message);
    body.hidden = !!message;
  });
}
// Red when little is left
const meter = (ariaLabel, value, max) => [{tag: 'meter', ariaLabel, max, high: max * .8, value}];
function fillServer({version, status: className, chats: {running, limit}, uptime_seconds: up, upstreams: all, store}) {
  const failing = Object.values(all).filter(({reason}) => reason).length;
  const state = failing ? '# of # upstreams failing' : store.ok ? 'Running' : 'The store is failing';
  update(status, {textContent: say(state, failing, Object.keys(all).length), className});
  fill(upstreams, Object.entries(all).map(([name, {failing_since: since, reason}]) => [name, reason
    ? {className: 'bad', textContent: say('failing since #: #', time(since), reason)}
    : {className: 'ok', textContent: say('ok')}]));
  const chats = say('Chats running: # of #', running, limit);
  fill(server, [
    [chats],
    meter(chats, running, limit),
    [{className: store.ok ? 'ok' : 'bad', textContent: say('Store: #', store.kind)}],
    [say('Version #, up since #', version, time(Date.now() / 1000 - up))],
  ]);
}
function fillUsage({limits: {requests_per_minute: perMinute, tokens_per_day: perDay}, days}) {
  const {requests, total_tokens: total} = days.at(-1);
  const most = Math.max(...days.map(day => day.total_tokens));
  const tokens = perDay ? say('Tokens today: # of #', total, perDay) : say('Tokens today: #', total);
  fill(today, [
    [say('Requests today: #', requests)],
    ...perMinute ? [[say('Requests per minute: at most #', perMinute)]] : [],
    [tokens],
    ...perDay ? [meter(tokens, total, perDay)] : [],
  ]);
  show(legend, say('Tokens per day, last # days (peak #)', days.length, most));
  show(dates, `${days[0].date} ${days.at(-1).date}`);
  chart.ariaLabel = days.map(day => `${day.date}: ${day.total_tokens}`).join(', ');
  chart.firstChild.setAttribute('d', days.map(({total_tokens: tokens}, day) => {
    const height = Math.max(3, 98 * tokens / most);  // a little is seen beside a huge day, too
    return tokens ? `M${day * 10 + 1},100h8v-${height}h-8z` : '';
  }).join(''));
}

// Sessions

function fillSessions({data}) {  // in an order that a chat does not change
  data.sort((a, b) => b.created - a.created || (a.user < b.user ? -1 : 1));
  keep(users, data.map(({user}) => user), addSession).forEach((entry, index) => {
    const {last_used, turns} = data[index];
    show(entry.querySelector('.soft'),
      turns === 1 ? say('1 turn, #', time(last_used)) : say('# turns, #', turns, time(last_used)));
  });
  return data.length ? '' : say('None');
}
function addSession(name) {
  const entry = make('details', users), summary = make('summary', entry);
  make('bdi', summary, name);
  make('span', summary, '', 'soft');
  button(entry, 'Continue', () => {
    user.value = name;
    if (!chat.offsetWidth) location.hash = '#chat';
    openUser();
    question.focus();
  });
  const forget = button(entry, 'Forget', ({detail}) => {
    if (forget.words !== 'Forget') return detail < 2 && forgetSession(name, entry);  // a double click is no answer
    live.textContent = label(forget, 'Really forget?').textContent;
    forget.classList.add('bad');
  });
  forget.onblur = () => label(forget, 'Forget').classList.remove('bad');
  const turns = make('div', entry);
  entry.ontoggle = async () => {
    const session = entry.open && await call(sessionPath(name)).catch(error => error);
    turns.replaceChildren();
    for (const message of session.turns?.flat() ?? []) drawMessage(turns, message);
    if (session.message) make('p', turns, session.message, 'bad');
  };
  return entry;
}
async function forgetSession(name, entry) {
  const problem = await call(sessionPath(name), {method: 'DELETE'}).catch(error => error);
  if (problem.message) return entry.lastChild.replaceChildren(problem.message);
  const next = entry.nextSibling ?? entry.previousSibling;
  if (entry.contains(document.activeElement)) (next?.firstChild ?? sessions).focus();
  entry.remove();
  if (name === user.value) begin();
  watch();
}

// Connect and API

function fillModels({data}) {
  const ids = data.map(({id}) => id), chosen = model.value;
  if (String(ids) === String(Array.from(model, option => option.value))) return;
  model.replaceChildren(...ids.map(id => new Option(id, id, false, id === chosen)));
  fillConnect();
}
function fillConnect() {
  // Some clients take localhost for ::1
  const base = new URL('v1', location).href.replace(/\/\/localhost(?=[:/])/, '//127.0.0.1');
  const bearer = locked ? 'YOUR_KEY' : 'none', id = model.value || 'kimi';
  const header = locked ? '-H "Authorization: Bearer YOUR_KEY" ' : '';
  const name = JSON.stringify(id), hello = '[{"role": "user", "content": "Hello"}]';
  // One line in double quotes and without !, for Unix shells and for Windows' cmd
  const body = `{"model": ${name}, "messages": ${hello}}`.replace(/[\x22\\$\x60]/g, '\\$&');
  const texts = {
    'Base URL': base,
    'API key': bearer,
    Model: id,
    curl: `curl ${base}/chat/completions ${header}-H "Content-Type: application/json" -d "${body}"`,
    'openai-python': `from openai import OpenAI

client = OpenAI(base_url="${base}", api_key="${bearer}")
answer = client.chat.completions.create(model=${name}, messages=${hello})
print(answer.choices[0].message.content)`,
    'openai-node': `import OpenAI from "openai";

const client = new OpenAI({baseURL: "${base}", apiKey: "${bearer}"});
const answer = await client.chat.completions.create({model: ${name}, messages: ${hello}});
console.log(answer.choices[0].message.content);`,
    LangChain: `from langchain_openai import ChatOpenAI

model = ChatOpenAI(base_url="${base}", api_key="${bearer}", model=${name})
print(model.invoke("Hello!").content)`,
    Codex: `# ~/.codex/config.toml; then: KIMI2API_KEY=${bearer} codex
model = ${name}
model_provider = "kimi2api"

[model_providers.kimi2api]
name = "kimi2api"
base_url = "${base}"
wire_api = "responses"
env_key = "KIMI2API_KEY"`,
    'Open WebUI': `# ${say('Admin Settings, Connections, OpenAI, Add Connection')}
OPENAI_API_BASE_URL=${base} OPENAI_API_KEY=${bearer} open-webui serve`,
    'Cherry Studio': `# ${say('Settings, Model Provider, Add (type OpenAI)')}
API Host: ${base.slice(0, -3)}
API Key: ${bearer}
Model: ${id}`,
  };
  for (const title in texts) {
    const {box, code} = connect[title] ??= codeBlock(connect, title);
    show(box.firstChild.firstChild, say(title));
    show(code, texts[title]);
  }
}
async function fillRoutes() {
  const {paths, message} = await call('openapi.json').catch(error => error);
  fill(routes, paths ? Object.entries(paths).flatMap(([path, item]) => Object.entries(item).map(([method, {summary}]) =>
    [{tag: 'code', textContent: `${method.toUpperCase()} ${path}`}, summary])) : [[message]]);
}

// Events

function translate() {
  document.documentElement.lang = locale;
  language.textContent = locale === 'en' ? '中文' : 'English';
  for (const element of document.querySelectorAll('body *')) {
    const {words, dataset: {name}} = element;
    if (words) label(element, words);
    if (name) element.ariaLabel = element.placeholder = say(name);
  }
}
function showTab() {
  const parts = [...chat.parentNode.children], shown = parts.find(({id}) => '#' + id === location.hash) ?? chat;
  for (const part of parts) part.className = part === shown ? 'current' : '';
  for (const link of document.links) link.ariaCurrent = link.hash === '#' + shown.id ? 'page' : null;
}
composer.onsubmit = event => {
  event.preventDefault();
  const text = question.value.trim();
  if (running) return running.abort();
  if (text) ask(text);
  question.value = '';
};
question.onkeydown = event => {
  const isOfInputMethod = event.isComposing || event.keyCode === 229;  // Safari's is the number
  if (event.key !== 'Enter' || event.shiftKey || isOfInputMethod) return;
  event.preventDefault();
  if (!running) composer.requestSubmit();
};
fresh.onclick = () => {
  user.value = '';
  begin();
  question.focus();
};
key.onchange = () => {
  watch();
  secrets.kimi2apiKey = key.value;
};
language.onclick = () => {
  locale = locale === 'en' ? 'zh-CN' : 'en';
  translate();
  fillConnect();
  watch();
  choices.kimi2apiLanguage = locale;
};
user.onchange = openUser;
model.onchange = fillConnect;
key.value = secrets.kimi2apiKey ?? '';
onhashchange = showTab;
document.onvisibilitychange = watch;
for (const element of document.querySelectorAll('body *'))
  if (!element.firstElementChild && Object.hasOwn(chinese, element.textContent)) element.words = element.textContent;
translate();
showTab();
watch();
setTimeout(() => document.body.classList.remove('loading'), 300);
</script>"""


@cache
def sent_page() -> tuple[str, dict[str, str]]:
    """Return the page without comments and most white space, and its headers. The policy allows only the page's own
    script and style, and requests to this server.

    A quote in a pattern of the script is written \\x22 or \\x60, so that this function takes no pattern for a string.
    """
    text = re.sub(r"""(?mx)
        (`[^`]*`|'[^'\n]*'|"[^"\n]*")  # a string stays unchanged
        |^[ ]*(?://|/\*)[ ].*\n+|(?<=[{(,;>])[ ]+//[ ].*\n|[ ]+//[ ].*$  # comments
        |^[ ]+|\n(?=\n|[ ]*[})])|(?<=[{(,;>])\n|(?<=\})\n(?=[^<]*</style>)  # ends of lines that end no statement
        |[ ](?=[=&|?+{}]|[-/%<>][ ])|(?<=[=&|?+{:;,])[ ]|(?<=[ ][-/%<>]|=>)[ ]  # spaces around operators
        |(?<=if|or)[ ](?=\()|(?<=[)}])[ ](?=\w)(?![^<]*</style>)
        """, r"\1", PAGE)
    policy = (
        "default-src 'none'; img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    for tag in ("style", "script"):
        [content] = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", text, re.S)
        digest = b64encode(sha256(content.encode()).digest()).decode()
        policy += f"; {tag}-src 'sha256-{digest}'"
    return text, {
        "Content-Type": "text/html; charset=utf-8",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": policy,
    }


if __name__ == "__main__":
    sys.exit(main())
