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

    1 Settings         every setting, in one table           9 OpenAI-style APIs    Moonshot, DeepSeek, a local server
    2 Errors and JSON  in OpenAI's form; strict reading     10 Models and fallback  which upstream answers for a model
    3 Requests         checks the caller's JSON             11 Delivery             threads, keep-alive, pace, sessions
    4 Stores           remembers the turns of a `user`      12 Formats              deltas to JSON or to events
    5 Deltas           folding, tokens, graphemes           13 App                  routes, keys, browsers, limits
    6 Upstreams        how any upstream is called           14 Demo upstream        a small stand-in for the web chat
    7 Prompts          a request as plain text, and back    15 Server               waitress, signals, command line
    8 Kimi's web chat  the nonce, the form, its answers     16 Description, page    the OpenAPI description, the page

A section knows those above it and never one below; the last is constants that the App serves.
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
from base64 import b64encode
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import ExitStack, suppress
from dataclasses import Field, dataclass, field, fields, replace
from email.utils import parsedate_to_datetime
from functools import cached_property, lru_cache, partial
from hashlib import sha256
from html import unescape
from http.client import HTTPResponse as ClientResponse
from http.cookiejar import DefaultCookiePolicy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import ceil, inf, isfinite
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
from waitress.parser import HTTPRequestParser, ParsingError
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


def matching(pattern: str, meaning: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError
        return text
    parse.__doc__ = meaning
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


ascii_key = matching("[!-~]*", "printable ASCII without spaces")


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
    api_host: str = setting("127.0.0.1", "address to listen on; one that is not loopback needs a key",
                            lambda text: text.strip("[]"))
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
    moonshot_api_key: str = setting("", "key of Moonshot's own API; its models are then `moonshot/…`", ascii_key)
    moonshot_base_url: str = setting("https://api.moonshot.ai/v1", "the Chinese site's is `https://api.moonshot.cn/v1`",
                                     http_url)
    deepseek_api_key: str = setting("", "key of DeepSeek's API; its models are then `deepseek/…`", ascii_key)
    deepseek_base_url: str = setting("https://api.deepseek.com/v1", "where it is", http_url)
    qianfan_api_key: str = setting("", "key of Baidu's Qianfan; its models are then `qianfan/…`", ascii_key)
    qianfan_base_url: str = setting("https://qianfan.baidubce.com/v2", "where it is", http_url)
    providers: tuple[str, ...] = setting(
        "", "names of more APIs of OpenAI's kind, separated by commas; for a `local`, set `LOCAL_BASE_URL` and, if it "
        "asks for one, `LOCAL_API_KEY`",
        words("(?!kimi$)[a-z][a-z0-9_]*", "lower-case letters, digits and _, and not kimi"))
    fallback_models: tuple[str, ...] = setting(
        "", "models to ask, in this order, when the one asked for cannot answer, separated by commas",
        words(r"\S+", "a model's id"))
    cors_origins: tuple[str, ...] = setting(
        "", "origins that may call from a browser, separated by commas. "
        "Empty: any when a key is set, else only those of this machine",
        words(r"\*|[\w.+-]+://[^/\s]+", "an origin such as https://app.example"))
    upstream_url: str = setting("https://kimi-ai.chat/wp-admin/admin-ajax.php", "the web chat's endpoint", http_url)
    chat_page_url: str = setting("https://kimi-ai.chat/chat/", "the page that carries the nonce", http_url)
    log_level: str = setting("INFO", "DEBUG, INFO, WARNING or ERROR", matching(
        "(?i:DEBUG|INFO|WARNING|ERROR)", "DEBUG, INFO, WARNING or ERROR"))
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
                    apis[name] = http_url(base_url), ascii_key(key)
                except ValueError:
                    raise SettingError(f"{name.upper()}_BASE_URL: {base_url!r} is not {http_url.__doc__}, or "
                                       f"{name.upper()}_API_KEY is not {ascii_key.__doc__}") from None
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
                prefix, _, own_name = model.partition("/")
                if not {model, "*"} & set(self.models) and not (prefix in self.apis and own_name):
                    raise SettingError(f"{name}: {model!r} is neither one of MODELS ({', '.join(self.models)}) nor of "
                                       f"an API that has its key ({', '.join(self.apis) or 'none has'})")
        if not self.api_master_key and not is_loopback(self.api_host):
            raise SettingError(f"API_HOST: {self.api_host!r} can be reached from other machines, so API_MASTER_KEY "
                               "must be set; without a key only a loopback host such as 127.0.0.1 is accepted")


@lru_cache(maxsize=256)
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
# 2 Errors and JSON
#
# Everything that goes wrong on purpose is an APIError; `body()` is the only place that knows OpenAI's shape for it.
# JSON is read strictly and written as UTF-8.
# ======================================================================================================================


class APIError(Exception):
    """An error for the caller, in the terms of OpenAI's API.

    retryable: the same call may succeed a moment later and cannot do harm twice; retry_after: seconds that upstream
    asked us to wait, if it did; quotes: the message has words of upstream's, which may repeat the prompt.
    """

    def __init__(self, status: int, message: str, type: str = "invalid_request_error", code: str | None = None,
                 param: str | None = None, headers: Mapping[str, str] | None = None,
                 retryable: bool = False, retry_after: float = 0.0, quotes: bool = False) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.code, self.param = status, message, type, code, param
        self.headers = dict(headers or {})
        self.retryable, self.retry_after, self.quotes = retryable, retry_after, quotes

    def again(self, addition: str = "") -> APIError:
        """The same error for another caller, with something added."""
        return APIError(self.status, self.message + addition, self.type, self.code, self.param, self.headers,
                        self.retryable, self.retry_after, self.quotes)

    @property
    def reason(self) -> str:
        """What the log and /health may say of it."""
        return f"{self.code or self.type} ({self.status})" + ("" if self.quotes else f": {self.message}")

    @property
    def may_fall_back(self) -> bool:
        """Whether another upstream may do better: it failed, or the prompt is too long for it."""
        return self.status >= 500 or self.status == 429 or self.code == "context_length_exceeded"

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> APIError:
    return APIError(400, message, param=param, code=code)


def upstream_error(status: int, code: str, message: str, retryable: bool = False, quotes: bool = False) -> APIError:
    return APIError(status, message, "upstream_error", code, retryable=retryable, quotes=quotes)


def as_api_error(error: Exception) -> APIError:
    """The error itself, or, for one that nobody meant to happen, a 500 after its traceback is logged."""
    if isinstance(error, APIError):
        return error
    log.error("unexpected error", exc_info=error)
    return APIError(500, "The server met an unexpected error; see its log.", "server_error", "internal_error")


def dump_json(value: Any) -> bytes:
    """JSON as UTF-8. U+0085, U+2028 and U+2029 stay escaped: some clients split a stream of events there."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(
        {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}).encode()


def finite(text: str) -> float:
    """A number, but not NaN and Infinity, which Python reads although they are not JSON, nor 1e999."""
    if not isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is not a number in JSON")
    return value


parse_strictly = partial(json.loads, parse_constant=finite, parse_float=finite)


def without_half_characters(text: str) -> str:
    """Text in which halves of surrogate pairs, which cannot be sent as UTF-8, have become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ======================================================================================================================
# 3 Requests
#
# Every check of the caller's JSON. A message stays the dict that the client sent; what a provider cannot do with it
# (images, say) is that provider's to refuse. Field names and meanings: OpenAI's chat completions reference.
# ======================================================================================================================


Message = dict[str, Any]
Turn = tuple[Message, ...]  # a user's message and what followed it, up to the next user's message

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
FIELDS: dict[str, tuple[type, ...]] = {  # types of what matters here or would confuse an upstream; the rest is not ours
    "messages": (list,), "model": (str,), "user": (str,), "stream": (bool,), "stream_options": (dict,),
    "stop": (str, list), "max_tokens": (int,), "max_completion_tokens": (int,), "n": (int,), "logprobs": (bool,),
    "tools": (list,), "tool_choice": (str, dict), "parallel_tool_calls": (bool,), "response_format": (dict,),
    "temperature": (int, float), "top_p": (int, float), "presence_penalty": (int, float),
    "frequency_penalty": (int, float), "seed": (int,), "logit_bias": (dict,), "modalities": (list,), "audio": (dict,)}
TYPE_NAMES = {list: "a list", dict: "an object", str: "a string", bool: "true or false", int: "a whole number",
              float: "a number"}


@dataclass(frozen=True)
class ChatRequest:
    """A checked request for a chat completion. `body` is the whole of it, unknown fields included.

    tools: the functions that may be called, by what the request's `tools` and `tool_choice` say; must_call: one must.
    """

    body: dict[str, Any]
    messages: list[Message]
    model: str | None
    user: str | None
    stream: bool
    include_usage: bool
    stop: list[str]
    max_tokens: int | None
    tools: list[dict[str, Any]]
    must_call: bool

    @classmethod
    def parse(cls, raw: bytes) -> ChatRequest:
        """Raises APIError 400 with `param` naming the field."""
        body = parse_json(raw)
        for name in FIELDS:
            if name in body:
                typed(body, name, *FIELDS[name])
        check(body.get("messages"), "must be a list with at least one message", "messages")
        for index, message in enumerate(body["messages"]):
            check_message(message, f"messages[{index}]")
        typed(body.get("stream_options") or {}, "include_usage", bool, param="stream_options.include_usage")
        stop = body.get("stop") or []
        check(isinstance(stop, str) or (len(stop) <= 4 and all(isinstance(text, str) for text in stop)),
              "must be a string or a list of up to 4 strings", "stop")
        for name in ("max_tokens", "max_completion_tokens", "n"):
            check(body.get(name) is None or body[name] >= 1, "must be at least 1", name)
        for index, tool in enumerate(body.get("tools") or ()):
            check_tool(tool, f"tools[{index}]")
        check_tool_choice(body)
        answer = body.get("response_format") or {}
        if answer:
            check(answer.get("type") in ("text", "json_object", "json_schema"),
                  "must be 'text', 'json_object' or 'json_schema'", "response_format.type")
            schema = typed(answer, "json_schema", dict, param="response_format.json_schema") or {}
            check(answer["type"] != "json_schema" or isinstance(schema.get("schema"), dict), "must be an object",
                  "response_format.json_schema.schema")
        choice: Any = body.get("tool_choice")
        wanted = choice["function"]["name"] if names_function(choice) else None
        functions = [tool["function"] for tool in body.get("tools") or () if tool["type"] == "function"]
        return cls(
            body, body["messages"], body.get("model") or None, body.get("user") or None, bool(body.get("stream")),
            include_usage=bool((body.get("stream_options") or {}).get("include_usage")),
            stop=[text for text in ([stop] if isinstance(stop, str) else stop) if text],
            max_tokens=body.get("max_completion_tokens") or body.get("max_tokens"),
            tools=[] if choice == "none" else [f for f in functions if wanted in (None, f["name"])],
            must_call=choice not in (None, "none", "auto"))

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
    def brings_history(self) -> bool:
        return any(message["role"] == "assistant" for message in self.messages)


def parse_json(raw: bytes) -> dict[str, Any]:
    try:
        source = raw.decode("utf-8-sig")
        body = parse_strictly(source)
        if "\\u" in source:  # an escape can smuggle in half a surrogate pair, which no later step could encode
            dump_json(body)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"The body is not valid JSON in UTF-8: {type(error).__name__}: {error}"[:300]) from None
    if not isinstance(body, dict):
        raise bad_request("The body must be a JSON object.")
    return body


def check(holds: Any, demand: str, param: str) -> None:
    if not holds:
        raise bad_request(f"'{param}' {demand}.", param)


def typed(body: dict[str, Any], name: str, *types: type, param: str = "") -> Any:
    """The field's value, None if it is missing or null. Raises APIError 400 when it is of no such type."""
    value = body.get(name)
    if value is not None:
        check(type(value) in types, f"must be {' or '.join(TYPE_NAMES[kind] for kind in types)}", param or name)
    return value


def check_message(message: Any, param: str) -> None:
    check(isinstance(message, dict), "must be an object with 'role' and 'content'", param)
    check(message.get("role") in ROLES, f"must be one of {', '.join(ROLES)}", f"{param}.role")
    content = typed(message, "content", str, list, param=f"{param}.content")
    # an assistant's message may consist of tool calls alone
    check(content is not None or message["role"] == "assistant", "is missing", f"{param}.content")
    for index, part in enumerate(content if isinstance(content, list) else ()):
        where = f"{param}.content[{index}]"
        check(isinstance(part, dict) and isinstance(part.get("type"), str), "must be an object with a 'type'", where)
        check(part["type"] != "text" or isinstance(part.get("text"), str), "must be a string", f"{where}.text")
    typed(message, "tool_call_id", str, param=f"{param}.tool_call_id")
    for index, call in enumerate(typed(message, "tool_calls", list, param=f"{param}.tool_calls") or ()):
        where = f"{param}.tool_calls[{index}]"
        function = call.get("function") if isinstance(call, dict) else None
        check(isinstance(function, dict), "must be an object with a 'function'", where)
        typed(call, "id", str, param=f"{where}.id")
        for name in ("name", "arguments"):
            check(isinstance((function or {}).get(name), str), "must be a string", f"{where}.function.{name}")


def check_tool(tool: Any, param: str) -> None:
    check(isinstance(tool, dict) and isinstance(tool.get("type"), str), "must be an object with a 'type'", param)
    if tool["type"] == "function":
        function = typed(tool, "function", dict, param=f"{param}.function") or {}
        check(function.get("name") and isinstance(function["name"], str), "must be a string", f"{param}.function.name")
        typed(function, "description", str, param=f"{param}.function.description")
        typed(function, "parameters", dict, param=f"{param}.function.parameters")


def names_function(choice: Any) -> bool:
    return isinstance(choice, dict) and choice.get("type", "function") == "function"


def check_tool_choice(body: dict[str, Any]) -> None:
    choice: Any = body.get("tool_choice")
    if isinstance(choice, str):
        check(choice in ("none", "auto", "required"), "must be none, auto, required or a function", "tool_choice")
        check(choice != "required" or body.get("tools"), "wants 'tools', of which there are none", "tool_choice")
    elif names_function(choice):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        offered = [tool["function"]["name"] for tool in body.get("tools") or () if tool["type"] == "function"]
        check(name in offered, "names no function that is among 'tools'", "tool_choice.function.name")


def is_system(message: Message) -> bool:
    return message["role"] in ("system", "developer")


def text_of(message: Message) -> str:
    """The text of a message, whether its content is a string, a list of parts, or null."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


# ======================================================================================================================
# 4 Stores
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
    """Turns by owner and user, forgotten `ttl` seconds after the last. Times are seconds since the epoch."""

    MOST_TURNS = 1000  # of one session; more than any prompt holds

    def __init__(self, ttl: float, limit: int, clock: Callable[[], float] = time.time) -> None:
        self.ttl, self.limit, self._clock = ttl, limit, clock
        # Least recently used first, which is also the first to expire.
        self._sessions: OrderedDict[tuple[str, str], Session] = OrderedDict()
        self._lock = threading.Lock()  # guards _sessions; held for dict work only

    def open(self, owner: str, user: str | None) -> Session:
        """The user's session, or a new one, which is kept only when a turn is recorded."""
        session = self.get(owner, user) if user else None
        now = self._clock()
        name = "".join(random.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=9))
        return session or Session(f"session_{int(now * 1000)}_{name}", now, now)  # as the web chat's page names them

    def record(self, owner: str, user: str, opened: Session, turns: Iterable[Turn], anew: bool) -> None:
        """Add turns, all as one, to the user's session; anew: in place of what was remembered."""
        with self._lock:
            session = self._find(owner, user) or replace(opened, turns=())
            turns = ((() if anew else session.turns) + tuple(turns))[-self.MOST_TURNS:]
            self._sessions[owner, user] = replace(session, used=self._clock(), turns=turns)
            self._sessions.move_to_end((owner, user))
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


# ======================================================================================================================
# 5 Deltas
#
# What every upstream says: a stream of deltas, and what can be done with one: folding, counting, cutting.
# ======================================================================================================================


@dataclass(slots=True)
class Delta:
    """A step of an answer: OpenAI's chat.completion.chunk, less the fields that are the same in all of them.

    whole: it is a whole answer, which arrived at once and may be paced; model: the id of the one that answers;
    headers: for the response.
    """

    chunk: dict[str, Any]
    whole: bool = False
    model: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, fields: dict[str, Any], finish_reason: str | None = None, whole: bool = False) -> Delta:
        choice = {"index": 0, "delta": fields, "logprobs": None, "finish_reason": finish_reason}
        return cls({"choices": [choice]}, whole)

    def with_chunk(self, chunk: dict[str, Any]) -> Delta:
        return Delta(chunk, model=self.model, headers=self.headers)

    @property
    def text(self) -> str:
        """What it adds to the text of the first choice."""
        return "".join(choice["delta"].get("content") or "" for choice in self.chunk["choices"] if not choice["index"])

    @property
    def ends(self) -> bool:
        """Whether it finishes a choice, or tells the usage and nothing else, so that it may be the last."""
        choices = self.chunk["choices"]
        return any(choice.get("finish_reason") for choice in choices) or (not choices and bool(self.chunk.get("usage")))

    @property
    def says(self) -> bool:
        """Whether it has anything but the role."""
        return self.ends or any(value for choice in self.chunk["choices"] for name, value in choice["delta"].items()
                                if name != "role")


def as_message(choice: dict[str, Any]) -> Message:
    """The message that the merged deltas of a choice make."""
    message = {"role": "assistant", "content": None, "refusal": None, **choice["delta"]}
    if message.get("tool_calls"):  # whose index has done its work
        message["tool_calls"] = [{name: value for name, value in call.items() if name != "index"}
                                 for call in message["tool_calls"]]
    return message


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


# Han, kana, Hangul and full-width forms: what a tokenizer spends about a token on, and what is written without spaces.
WIDE = "\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff"


def estimate_tokens(text: str) -> int:
    """Tokens by a rule of thumb: 0.6 a Chinese character (DeepSeek's documentation), else 0.25 (OpenAI's)."""
    narrow = len(re.sub(f"[{WIDE}]", "", text))
    return ceil((len(text) - narrow) * 0.6 + narrow * 0.25)


def estimate_usage(prompt: str, completion: str) -> dict[str, int]:
    tokens = estimate_tokens(prompt), estimate_tokens(completion)
    return {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}


def is_joined(text: str, at: int) -> bool:
    """Whether a reader would see the characters on both sides of the index as one."""
    before, after = text[at - 1:at], text[at:at + 1]
    return bool(after) and (unicodedata.category(after).startswith("M") or "\u200d" in (before, after)
                            or "\U0001f1e6" <= after <= "\U0001f1ff" or "\U0001f3fb" <= after <= "\U0001f3ff")


# ======================================================================================================================
# 6 Upstreams
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


LONGEST_WAIT = 5.0  # seconds that a Retry-After may ask for if we are to wait ourselves
FIRST_BACK_OFF, LAST_BACK_OFF = 0.25, 4.0  # seconds before the first retry, doubled each time, and at most


class Provider:
    """An upstream, and how it has been of late.

    After FAILURES failures in a row calls fail at once, for a pause that doubles each time; then one call at a time may
    try whether it is well again. `trouble` is when it began to fail (seconds since the epoch) and why, None while well.
    """

    FAILURES, FIRST_PAUSE, LAST_PAUSE = 5, 1.0, 60.0  # pauses in seconds

    def __init__(self, name: str, settings: Settings, clock: Callable[[], float] = time.time) -> None:
        self.name, self._settings, self._clock = name, settings, clock
        self.trouble: tuple[float, str] | None = None
        self._health_lock = threading.Lock()  # guards trouble and the four below; never held while upstream is asked
        self._failures, self._paused_until, self._on_trial = 0, 0.0, False
        self._last_error: APIError | None = None

    def stream(self, chat: Chat) -> Iterator[Delta]:
        """The answer. Raises APIError, also in the middle when the upstream breaks off."""
        raise NotImplementedError

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

    def _call(self, attempt: Callable[[], T], in_vain: Callable[[], bool]) -> T:
        """What attempt() returns, with retries. in_vain: whether nobody waits for it any more."""
        is_trial = self._begin()
        try:
            result = self._retrying(attempt, in_vain)
        except APIError as error:
            self._end(error, is_trial, is_news=not in_vain())
            raise
        except BaseException:  # a mistake of ours says nothing of upstream
            self._end(None, is_trial, is_news=False)
            raise
        self._end(None, is_trial)
        return result

    def _retrying(self, attempt: Callable[[], T], in_vain: Callable[[], bool]) -> T:
        """What attempt() returns, tried again up to MAX_RETRIES times while its error allows it."""
        for retries in itertools.count():
            try:
                return attempt()
            except APIError as error:
                if not error.retryable or retries >= self._settings.max_retries or in_vain():
                    if retries:
                        error.headers["x-should-retry"] = "false"  # obeyed by OpenAI's SDKs
                    raise
                wait = error.retry_after or min(FIRST_BACK_OFF * 2 ** retries, LAST_BACK_OFF) * random.uniform(0.5, 1)
                log.warning("%s: %s; retry %d of %d in %.1f s", self.name, error.reason, retries + 1,
                            self._settings.max_retries, wait)
                time.sleep(wait)
        raise AssertionError("unreachable")

    def _begin(self) -> bool:
        """Whether this call is a trial. Raises the last failure again, with Retry-After, while calls fail at once."""
        with self._health_lock:
            left = self._paused_until - time.monotonic()
            if not self._last_error or (left <= 0 and not self._on_trial):
                is_trial = self._on_trial = self._last_error is not None
                return is_trial
            error = self._last_error.again(f" Not asked again for now, after {self._failures} failures.")
            error.headers = {"Retry-After": str(max(1, ceil(left)))}
            raise error

    def _end(self, error: APIError | None, is_trial: bool = False, is_news: bool = True) -> None:
        with self._health_lock:
            self._on_trial = self._on_trial and not is_trial
            if not is_news:
                return
            failed = error and (error.status >= 500 or error.status == 429)
            self.trouble = (self.trouble or (self._clock(), error.reason)) if error and failed else None
            if not error or error.status < 500 or error.code == "upstream_refused":  # it answers, be it with a no
                self._failures, self._last_error = 0, None
            elif is_trial or not self._last_error:  # else it was under way when the pause began, and is no news
                self._failures += 1
                if self._failures >= self.FAILURES:
                    pause = min(self.FIRST_PAUSE * 2 ** min(self._failures - self.FAILURES, 9), self.LAST_PAUSE)
                    self._last_error, self._paused_until = error, time.monotonic() + pause
                    log.warning("%s failed %d times in a row; not asked for %g s", self.name, self._failures, pause)


def rate_limited(message: str, type: str, code: str | None, headers: Mapping[str, str], now: float) -> APIError:
    """A 429 that passes Retry-After on, and is retried here only when the wait is known and short."""
    wait = parse_retry_after(headers.get("Retry-After"), now)
    return APIError(429, message, type, code, headers={} if wait is None else {"Retry-After": str(ceil(wait))},
                    retryable=wait is not None and wait <= LONGEST_WAIT, retry_after=wait or 0.0)


def parse_retry_after(value: str | None, now: float) -> float | None:
    """Seconds to wait by a Retry-After header (RFC 9110: seconds or a date), None if there is none to go by."""
    try:
        if value and value.strip().isdigit():
            return min(float(value), 1e9)
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


MAX_UPSTREAM_BYTES = 4 << 20  # of a page or an answer; the web chat's are a few KiB


class DeadlineReader(io.RawIOBase):
    """Reads a socket until its time-out, counted from now on, is used up by all reads together.

    A socket's own time-out starts anew with every byte, so an upstream that drips could hold a thread for hours.
    """

    def __init__(self, source: Any, sock: Any) -> None:
        self._source, self._sock, self._timeout = source, sock, sock.gettimeout()
        self._deadline = time.monotonic() + (self._timeout or inf)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Any:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left if left < inf else None)
        return self._source.readinto(buffer)

    def close(self) -> None:
        with suppress(OSError):
            self._sock.settimeout(self._timeout)  # as the next request over this connection will want it
        self._source.close()
        super().close()


class DeadlineResponse(ClientResponse):
    """What http.client makes of a socket, read by a deadline: head and body together."""

    def __init__(self, sock: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(DeadlineReader(self.fp.detach(), sock))


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
    """The data of each server-sent event as it arrives; comments and other fields are passed over. Lines end in LF."""
    rest, data = b"", []
    while chunk := response.raw.read1(65536, decode_content=True):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > MAX_UPSTREAM_BYTES:
            raise DecodeError("an event without an end")
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" ").decode("utf-8", "replace"))
            elif not line and data:
                yield "\n".join(data)
                data = []


# ======================================================================================================================
# 7 Prompts
#
# Tools, JSON, stop: what an upstream of plain text cannot do itself.
# ======================================================================================================================


class Misread(Exception):
    """An answer that is not what the request asked for; the message says to the model what was wrong."""

    def __init__(self, reason: str, wants_json: bool = False) -> None:
        super().__init__(reason)
        self.wants_json = wants_json


def instructions(request: ChatRequest) -> str:
    """What the model is told of tools and of the form of its answer, in few words, for its room is small."""
    lines = []
    if request.tools:
        how = "You must call" if request.must_call else "You may call"
        one = "one tool" if request.body.get("parallel_tool_calls") is False else "tools"
        lines += [f'{how} {one} by answering <tool_call>{{"name": …, "arguments": {{…}}}}</tool_call>, '
                  "arguments being JSON. You get the results and go on. Tools:"]
        for tool in request.tools:
            purpose = " ".join((tool.get("description") or "").split())
            whole = dump_json(tool.get("parameters") or {}).decode()
            form = whole if '"$ref"' in whole else signature(tool.get("parameters") or {})
            lines.append(f"- {tool['name']}{form}{purpose and ': '}{purpose}")
    answer = request.body.get("response_format") or {}
    if answer.get("type") in ("json_object", "json_schema"):
        schema = (answer.get("json_schema") or {}).get("schema")
        lines.append("Answer with one JSON document and nothing else" + (
            f", valid by this schema: {dump_json(schema).decode()}" if schema else ": an object."))
    return "\n".join(lines)


def signature(schema: Any) -> str:
    """A JSON schema in the short form of a type: {city: string, days?: integer, unit?: "C"|"F"}."""
    if not isinstance(schema, dict) or not schema.keys() & {"type", "enum", "properties"}:
        return dump_json(schema).decode()
    if isinstance(schema.get("enum"), list):
        return "|".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
    if isinstance(schema.get("properties"), dict):
        required = schema["required"] if isinstance(schema.get("required"), list) else []
        return "{" + ", ".join(f"{name}{'' if name in required else '?'}: {signature(part)}"
                               for name, part in schema["properties"].items()) + "}"
    if schema.get("type") == "array" and schema.get("items"):
        return f"[{signature(schema['items'])}]"
    kinds = schema.get("type")
    return "|".join(map(str, kinds)) if isinstance(kinds, list) else str(kinds)


def read_answer(said: str, request: ChatRequest) -> tuple[str, list[tuple[str, str]]]:
    """The content and the tool calls (name, arguments as JSON) of what the model said. Raises Misread."""
    answer = request.body.get("response_format") or {}
    if request.tools:
        content, calls = read_calls(said, [tool["name"] for tool in request.tools])
        if calls:
            return content, calls[:1] if request.body.get("parallel_tool_calls") is False else calls
        if request.must_call:
            raise Misread("it must contain a tool call.")
    if answer.get("type") == "json_object":
        return read_document(said, dict), []
    if answer.get("type") == "json_schema":
        root = str(answer["json_schema"]["schema"].get("type"))
        return read_document(said, {"object": dict, "array": list}.get(root, object)), []
    return said, []


# The form that instructions() asks for, and the one that Kimi K2 was trained on
CALL = re.compile(r"""<tool_call>\s*(?:```\w*\s*)?
    |<\|tool_call_begin\|>\s*(?:functions\.)?(?P<name>[\w.-]+?)(?::\d+)?\s*<\|tool_call_argument_begin\|>\s*""", re.X)
CALL_END = re.compile(r"\s*(?:```\s*)?(?:</tool_call>|<\|tool_call_end\|>)?")


def read_calls(said: str, offered: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """The text around the calls, and the calls. Raises Misread for a call that cannot be made."""
    calls, around, at = [], [], 0
    while begin := CALL.search(said, at):
        around.append(said[at:begin.start()])
        value, at = decode(said, begin.end())
        calls.append(as_call({"name": begin["name"], "arguments": value} if begin["name"] else value, offered))
        at = CALL_END.match(said, at).end()  # type: ignore[union-attr]  # it matches the empty text too
    if calls:
        around.append(said[at:])
        text = re.sub(r"<\|tool_calls_section_(?:begin|end)\|>|```\w*\s*```", "", "".join(around)).strip()
        return text, calls
    alone = re.fullmatch(r"```[\w-]*\s*(.*?)\s*```", said.strip(), re.S)
    try:
        value = parse_strictly(alone[1] if alone else said)
    except (ValueError, RecursionError):
        return said, []
    if isinstance(value, dict) and value.get("name") in offered and "arguments" in value:
        return "", [as_call(value, offered)]
    return said, []


def as_call(value: Any, offered: list[str]) -> tuple[str, str]:
    value = value if isinstance(value, dict) else {}
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # JSON in a string, as OpenAI's API has it
        arguments, _ = decode(arguments, 0)
    if name not in offered:
        raise Misread(f"there is no tool {name!r}; there are {', '.join(offered)}.")
    if not isinstance(arguments, dict):
        raise Misread(f"the arguments of {name} must be a JSON object.")
    return name, without_half_characters(json.dumps(arguments, ensure_ascii=False))


OPENING = re.compile(r"""[{\[](?=(\s*["'{\[])?)""")  # the group tells what looks like JSON from {x} and [see] in prose


def read_document(said: str, kind: type) -> str:
    """The one JSON document of this type in what the model said: all of it, or the longest between prose and fences.

    Raises Misread when there is none, or one that is broken: a part of it must not pass for the whole.
    """
    found, at = "", 0
    with suppress(ValueError, RecursionError):
        if isinstance(parse_strictly(said), kind):
            return said.strip()
    while begin := OPENING.search(said, at):
        try:
            value, at = decode(said, begin.start())
        except Misread as misread:
            if begin[1]:
                raise Misread(str(misread), wants_json=True) from None
            at = begin.end()
            continue
        if isinstance(value, kind) and at - begin.start() >= len(found):
            found = said[begin.start():at]
    if not found:
        raise Misread("there is no JSON document of the right kind in it.", wants_json=True)
    return found


def decode(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins there, and where it ends. Raises Misread."""
    try:
        return json.JSONDecoder(parse_constant=finite, parse_float=finite).raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        raise Misread(f"not valid JSON: {error}") from None


def cut(text: str, stops: list[str], max_tokens: int | None) -> tuple[str, str]:
    """The text up to the first stop sequence and up to so many tokens (by estimate_tokens), and the finish reason."""
    end = min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))
    text = text[:end]
    if max_tokens is None or estimate_tokens(text) <= max_tokens:
        return text, "stop"
    spent = itertools.accumulate(0.6 if re.match(f"[{WIDE}]", character) else 0.25 for character in text)
    end = sum(1 for _ in itertools.takewhile(lambda tokens: tokens <= max_tokens, spent))
    while end and is_joined(text, end):
        end -= 1
    return text[:end], "length"


# ======================================================================================================================
# 8 Kimi's web chat
#
# The nonce, the form, and what the site's answers mean.
# ======================================================================================================================


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
        request.headers = {**self.headers, **(headers or {})}  # type: ignore[assignment]  # a plain dict will do here
        with self._jar_lock:
            cookies = get_cookie_header(self.cookies, request) if self.cookies else None
        if cookies:
            request.headers["Cookie"] = cookies
        pool, names_host = self._pool(url)
        target = url if names_host else urlunsplit(("", "", *urlsplit(url)[2:4], "")) or "/"
        raw = pool.urlopen(method, target, urlencode(data) if isinstance(data, dict) else data, request.headers,
                           retries=False, redirect=False, preload_content=False, assert_same_host=False,
                           timeout=Timeout(total=timeout))
        response = requests.Response()
        response.status_code, response.headers = raw.status, raw.headers  # urllib3's are case-insensitive too
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
        origin = "{0.scheme}://{0.netloc}/".format(urlsplit(url))
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
        self._lock = threading.Lock()  # guards the two below; never held while upstream is asked
        self._nonce: Nonce | None = None
        self._renewal: Future[Nonce] | None = None  # a fetch under way, which everybody who needs a nonce waits for

    @cached_property
    def _scraper(self) -> Scraper:
        """Made by the thread that fetches the first nonce; its certificates would slow the start and take 1 MB."""
        return Scraper(connections=2 * self._settings.max_concurrent_chats)

    def stream(self, chat: Chat) -> Iterator[Delta]:
        request = chat.request
        self._accept(request)
        try:
            prompt = self._prompt(chat, instructions(request))
        except RecursionError:
            raise bad_request("The schemas of 'tools' are nested too deep.", "tools") from None
        said = self._answer_to(prompt, chat)
        try:
            content, calls = read_answer(said, request)
        except Misread as misread:
            log.info("the answer cannot be used; asking once more")
            with suppress(APIError):  # where there is no room for the reason, the question is asked again as it was
                prompt = self._prompt(chat, f"{instructions(request)}\nYour last answer could not be used: {misread}")
            said = self._answer_to(prompt, chat)
            try:
                content, calls = read_answer(said, request)
            except Misread as again:
                if again.wants_json:
                    error = upstream_error(502, "invalid_json_answer", f"The web chat gave no JSON: {again}")
                    error.headers["x-should-retry"] = "false"
                    raise error from None
                content, calls = said, []
        content, finish_reason = cut(content, request.stop, request.max_tokens)
        message: Message = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
        if calls:
            message["tool_calls"], finish_reason = [
                {"index": index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
                 "function": {"name": name, "arguments": arguments}} for index, (name, arguments) in enumerate(calls)
            ], "tool_calls"
        whole = Delta.of(message, finish_reason, whole=True)
        whole.chunk["usage"] = estimate_usage(prompt, content + "".join(itertools.chain(*calls)))
        yield whole

    def _answer_to(self, prompt: str, chat: Chat) -> str:
        return self._call(lambda: self._ask(prompt, chat),
                          in_vain=lambda: chat.cancel.cancelled and not chat.request.user)

    @staticmethod
    def _accept(request: ChatRequest) -> None:
        """Raises APIError 400 for what would change the shape of the answer and cannot be had here."""
        body, choice = request.body, request.body.get("tool_choice")
        wanted = {"n": (body.get("n") or 1) > 1, "logprobs": body.get("logprobs"), "audio": body.get("audio"),
                  "modalities": set(map(str, body.get("modalities") or ())) - {"text"},
                  "tool_choice.type": isinstance(choice, dict) and not names_function(choice)}
        wanted |= {f"tools[{index}].type": tool["type"] != "function"
                   for index, tool in enumerate(body.get("tools") or ())}
        wanted |= {f"messages[{index}].content[{at}].type": part["type"] not in ("text", "refusal")
                   for index, message in enumerate(request.messages) if isinstance(message.get("content"), list)
                   for at, part in enumerate(message["content"])}
        for param, is_wanted in wanted.items():
            if is_wanted:
                raise bad_request(f"The web chat takes text and gives one text; it cannot do what '{param}' asks for.",
                                  param, "unsupported_value")

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
            own = [name for name in self._settings.models.values()
                   if name not in self._settings.models and name.partition("/")[0] not in self._settings.apis]
            yield from self._check_answer((own or ["moonshotai/Kimi-K2-Instruct-0905"])[0])

    # The prompt

    SPEAKERS = {"user": "用户", "assistant": "模型", "tool": "工具"}  # as the site's public clients write history

    def _prompt(self, chat: Chat, instruction: str) -> str:
        """System messages and the instruction, as many of the latest turns as fit, and the newest turn, as one string.

        Raises APIError 400 when this is too long even without older turns.
        """
        callers = {call.get("id"): call["function"]["name"]
                   for message in (*itertools.chain(*chat.history), *chat.request.messages)
                   for call in message.get("tool_calls") or ()}
        turns = [*chat.history, *(chat.request.turns or [()])]
        if chat.history and turns[len(chat.history)][:1] and turns[len(chat.history)][0]["role"] != "user":
            turns[len(chat.history) - 1] += turns.pop(len(chat.history))  # a tool's result belongs to what asked for it
        *older, newest = [[self._line(message, callers) for message in turn] for turn in turns]
        system = [text for text in (*map(text_of, chat.request.system), instruction) if text]
        limit = self._settings.context_max_length
        if system:
            system.append("")
        elif not older and len(newest) == 1:
            newest = [text_of(chat.request.turns[-1][0])]  # a question that stands alone needs no name before it
        room = limit - len("\n".join(system + newest))
        if room < 0:
            raise bad_request(
                f"The newest message, the system messages and what is said of tools and JSON have {limit - room} "
                f"characters; the web chat takes {limit} (CONTEXT_MAX_LENGTH).", "messages", "context_length_exceeded")
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

    def _line(self, message: Message, callers: Mapping[str | None, str]) -> str:
        role, functions = message["role"], [call["function"] for call in message.get("tool_calls") or ()]
        speaker = f"{self.SPEAKERS.get(role, role)} {callers.get(message.get('tool_call_id'), '')}".rstrip()
        calls = [f'<tool_call>{{"name": "{function["name"]}", "arguments": {function["arguments"]}}}</tool_call>'
                 for function in functions]
        return f"{speaker}: {text_of(message)}{''.join(calls)}"

    # Asking

    def _ask(self, prompt: str, chat: Chat) -> str:
        """One attempt; a nonce that is rejected is renewed, once."""
        try:
            return self._post(prompt, chat)
        except StaleNonce as stale:
            log.info("refused (%s); trying once more with a new nonce", stale.error.code)
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
        except StaleNonce as stale:
            stale.error.message = stale.error.message.replace(nonce.value, "…")
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
            raise StaleNonce(upstream_error(502, "upstream_refused", f"The web chat refused: {words}",
                                            quotes=True))
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
        return without_half_characters(answer)

    def _send(self, send: Callable[..., requests.Response], method: str, url: str, deadline: float,
              data: bytes | None, headers: dict[str, str]) -> requests.Response:
        """Send one request; what any answer of this site can mean, page or chat, is sorted out here."""
        try:
            response = send(method, url, data=data, headers=headers, timeout=max(0.01, deadline - time.monotonic()))
            solvable = response.status_code != 200 and Cloudflare(self._scraper).is_Challenge_Request(response)
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
            except APIError as error:
                raise error.again() from None
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
            try:
                address = http_url(urljoin(address, page.headers["Location"]))
            except ValueError:
                address = ""
            here, there = urlsplit(home), urlsplit(address)
            if there.hostname != here.hostname or there.scheme not in ("https", here.scheme):
                raise upstream_error(502, "upstream_changed", "The chat page has moved to another host; CHAT_PAGE_URL "
                                     "and UPSTREAM_URL say where it is.")
        found = self.NONCE.search(page.content.decode("utf-8", "replace"))
        if page.status_code != 200 or not found:
            raise upstream_error(502, "upstream_changed", f"{home} (HTTP {page.status_code}) carries no nonce: the "
                                 "site has changed. Look for a newer version of this program.")
        log.info("nonce renewed")
        return Nonce(found[1], self._clock())


# ======================================================================================================================
# 9 OpenAI-style APIs
#
# Upstreams that speak OpenAI's protocol: requests and chunks pass through.
# ======================================================================================================================


class OpenAIProvider(Provider):
    """Moonshot's own API, DeepSeek, Qianfan, a local server: anything with OpenAI's chat completions under a base URL.

    Requests and chunks pass through as they are; only the model's name, the messages (the session's turns are put in
    front) and the streaming are ours. When the client leaves, the connection is closed at once: answers cost money.
    """

    MODELS_AGE, MODELS_RETRY = 600.0, 60.0  # seconds to keep the list, and before it is asked again after a failure

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
                "messages": messages if chat.history else request.messages,
                "stream_options": {**(request.body.get("stream_options") or {}), "include_usage": True}}
        self._chat.cancel = chat.cancel
        response = None
        try:
            response = self._call(lambda: self._send("POST", "/chat/completions", json=body),
                                  in_vain=lambda: chat.cancel.cancelled)
            yield from self._deltas(response, messages)
        except UpstreamHTTPError as error:  # of urllib3, whose reading of the body requests does not wrap here
            raise self._broken(self._unreachable(error), chat) from None
        except APIError as error:
            raise self._broken(error, chat) if response is not None else error from None
        finally:
            self._chat.cancel = None
            chat.cancel.set_action(None)  # from here on the connection may belong to somebody else's chat
            if response is not None:
                response.close()

    def _broken(self, error: APIError, chat: Chat) -> APIError:
        """The error of an answer that had begun."""
        self._end(error, is_news=not chat.cancel.cancelled)
        return error

    def _deltas(self, response: requests.Response, messages: list[Message]) -> Iterator[Delta]:
        headers = rate_limits(response.headers)
        text, choices_seen, finished, usage = "", False, False, False
        for data in server_sent_data(response):
            if data == "[DONE]":
                finished = True
                with suppress(AttributeError, OSError):  # only a read to its end gives the connection back
                    sock = response.raw.connection.sock
                    sock.settimeout(0.2)
                    response.raw.drain_conn()
                    sock.settimeout(self._settings.request_timeout)  # as the next request will want it
                break
            chunk = self._parse(data)
            if isinstance(chunk, dict) and chunk.get("error"):
                raise self._their_error(500, chunk, {})
            try:
                choices = [{"index": 0, "finish_reason": None, **choice, "delta": choice.get("delta") or {}}
                           for choice in chunk["choices"]]
                merge({}, {"choices": choices})  # fails if it is none that could be made a whole answer of
                delta = Delta({**chunk, "choices": choices}, headers=headers)
                text += delta.text
            except (KeyError, TypeError, AttributeError, RecursionError):
                raise self._bad("a bad chunk") from None
            choices_seen, usage = choices_seen or bool(choices), usage or bool(chunk.get("usage"))
            finished = finished or any(choice["finish_reason"] for choice in choices)
            yield delta
        if not finished:
            raise upstream_error(502, "upstream_unavailable", f"{self.name} broke off in the middle.")
        if not choices_seen:
            raise self._bad("an empty answer")
        if not usage:
            yield Delta({"choices": [], "usage": estimate_usage("\n".join(map(text_of, messages)), text)})

    def _parse(self, data: str) -> Any:
        try:
            chunk = json.loads(data)
            if "\\ud" in data.lower():  # an escaped half of a surrogate pair, perhaps without its other half
                chunk = json.loads(without_half_characters(json.dumps(chunk, ensure_ascii=False)))
            return chunk
        except (ValueError, RecursionError):
            raise self._bad("something that is not JSON") from None

    def _bad(self, what: str) -> APIError:
        return upstream_error(502, "upstream_invalid_response", f"{self.name} sent {what}.")

    def _send(self, method: str, path: str, **kwargs: Any) -> requests.Response:
        """An answer with status 200, its body still to be read; REQUEST_TIMEOUT is for silence, not for all of it."""
        try:
            response = self._session.request(method, self._base_url + path, stream=True, allow_redirects=False,
                                             timeout=self._settings.request_timeout, **kwargs)
            is_json = "json" in response.headers.get("Content-Type", "")
            if response.status_code == 200 and (method == "GET" or not is_json):
                return response
            with response:
                said = b"".join(itertools.islice(response.iter_content(8192), 8)).decode("utf-8", "replace")
        except requests.RequestException as error:
            raise self._unreachable(error) from None
        try:
            body = json.loads(said)
        except (ValueError, RecursionError):
            body = said
        if response.status_code == 200 and not (isinstance(body, dict) and body.get("error")):
            raise self._bad("a whole answer where a stream was asked for")
        raise self._their_error(response.status_code, body, response.headers)

    def _their_error(self, status: int, body: Any, headers: Mapping[str, str]) -> APIError:
        """Their error as ours: status, type, code and rate-limit headers stay, except where it is about our own key."""
        if status in (401, 403):
            return upstream_error(502, "upstream_auth", f"{self.name} does not accept the key that this server has for "
                                  f"it (HTTP {status}); see {self.name.upper()}_API_KEY.")
        hidden = without_half_characters(json.dumps(body, ensure_ascii=False))
        error = json.loads(hidden.replace(self._key, "…") if self._key else hidden)
        error = error.get("error", error) if isinstance(error, dict) else error
        fields = error if isinstance(error, dict) else {}
        type, code, param = (str(fields[name]) if fields.get(name) else None for name in ("type", "code", "param"))
        message = f"{self.name}: {plain_words(error)}"
        if status == 429:
            ours = rate_limited(message, type or "rate_limit_error", code or "upstream_rate_limited", headers,
                                self._clock())
        elif 400 <= status < 500:
            ours = APIError(status, message, type or "invalid_request_error", code, param)
        else:
            ours = APIError(status if status >= 500 else 502, message, type or "upstream_error",
                            code or "upstream_unavailable", param, retryable=status >= 500)
            ours.headers.update({"Retry-After": headers["Retry-After"]} if "Retry-After" in headers else {})
        ours.quotes = True
        ours.headers.update(rate_limits(headers))
        return ours

    def _unreachable(self, error: Exception) -> APIError:
        if isinstance(error, (requests.Timeout, UpstreamTimeout)):
            return upstream_error(504, "upstream_timeout", f"{self.name} was silent for "
                                  f"{self._settings.request_timeout:g} s.")
        return upstream_error(502, "upstream_unavailable", f"{self.name} cannot be reached: {root_cause(error)}.",
                              retryable=True)

    def models(self, wait: float) -> list[dict[str, Any]]:
        """Fetched on a thread of its own when the list is old; waits for it no longer than so many seconds."""
        with self._lock:
            if self._clock() >= self._models_due:
                self._models_due = self._clock() + self.MODELS_RETRY
                self._models_here.clear()
                threading.Thread(target=self._fetch_models, name=f"{self.name} models", daemon=True).start()
        self._models_here.wait(wait)
        return self._models

    def _fetch_models(self) -> None:
        try:
            self._models = self._list_models()
            self._models_due = self._clock() + self.MODELS_AGE
        except APIError as error:
            log.warning("%s: its models cannot be listed: %s", self.name, error.reason)
        finally:
            self._models_here.set()

    def _list_models(self) -> list[dict[str, Any]]:
        with self._send("GET", "/models") as response:
            try:
                listed = json.loads(without_half_characters(response.text))["data"]
                return [model for model in listed if isinstance(model["id"], str)]
            except (requests.RequestException, ValueError, KeyError, TypeError, RecursionError):
                raise self._bad("no list of models") from None

    def check(self) -> Iterator[tuple[str, APIError | None]]:
        try:
            listed = [f"{self.name}/{model['id']}" for model in self._list_models()]
        except APIError as error:
            yield f"{self._base_url} reached, key accepted", error
            return
        yield f"{self._base_url} reached, key accepted", None
        named = (*self._settings.fallback_models, *self._settings.models.values(), *listed)
        model = next((model for model in named if model.startswith(f"{self.name}/")), f"{self.name}/default")
        yield from self._check_answer(model.partition("/")[2])


def rate_limits(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if "ratelimit" in name.lower()}


# ======================================================================================================================
# 10 Models and fallback
#
# Which provider answers for a model's id, and who answers when it cannot.
# ======================================================================================================================


CREATED = 1757030400  # of a model whose upstream tells no time: 2025-09-05, when Kimi-K2-Instruct-0905 came out


def no_model(name: str) -> APIError:
    return APIError(404, f"The model {name[:100]!r} does not exist; /v1/models lists those that do.",
                    code="model_not_found", param="model")


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
            raise no_model(model)
        while table.get(name, name) != name:
            name = table[name]
        api = self._api_of(name)
        return (api, name.partition("/")[2]) if api else (self.web, name)

    def _api_of(self, model: str) -> OpenAIProvider | None:
        prefix, _, name = model.partition("/")
        return self.apis.get(prefix) if name else None

    def models(self) -> list[dict[str, Any]]:
        """MODELS, then what each API lists, as OpenAI's model objects; waits half a second for those not here yet."""
        for api in self.apis.values():
            api.models(wait=0)  # all are asked before the first is waited for
        end = time.monotonic() + 0.5
        theirs = [f"{api.name}/{model['id']}" for api in self.apis.values()
                  for model in api.models(wait=max(0.0, end - time.monotonic()))]
        return [self.model(name, wait=0) for name in (*self._settings.models, *theirs) if name != "*"]

    def model(self, name: str, wait: float = 0.5) -> dict[str, Any]:
        """OpenAI's model object. Raises APIError 404 for an id that nobody has, as far as is known."""
        provider, own_name = self.resolve(name)
        model = {"id": name, "object": "model", "created": CREATED, "owned_by": provider.name}
        known = provider.models(wait) if isinstance(provider, OpenAIProvider) else []
        theirs = next((entry for entry in known if entry["id"] == own_name), None)
        if known and theirs is None and name not in self._settings.models:
            raise no_model(name)
        for field_name, kind in (("created", int), ("owned_by", str)):
            if theirs and isinstance(theirs.get(field_name), kind):
                model[field_name] = theirs[field_name]
        return model

    def answer(self, model: str, chat: Chat) -> Iterator[Delta]:
        """The answer of the model asked for or, if it cannot answer, of the first of FALLBACK_MODELS that can."""
        failed: list[tuple[str, APIError]] = []
        for name in dict.fromkeys((model, *self._settings.fallback_models)):
            provider, upstream_model = self.resolve(name)
            deltas, begun = provider.stream(replace(chat, model=upstream_model)), []
            try:
                for delta in deltas:  # all that the client will not see before it could still be somebody else's
                    begun.append(delta)
                    if chat.request.stream and delta.says:
                        break
            except APIError as error:
                failed.append((name, error))
                if not error.may_fall_back or chat.cancel.cancelled:
                    break
                log.warning("%s cannot answer: %s", name, error.reason)
                continue
            if failed:
                log.warning("%s answers instead of %s", name, model)
            for delta in itertools.chain(begun, deltas):
                delta.model, delta.headers = name, {**delta.headers, "X-Kimi2api-Provider": provider.name}
                yield delta
            return
        raise failed[0][1].again("".join(f" Fallback {name}: {error.message}" for name, error in failed[1:]))


# ======================================================================================================================
# 11 Delivery
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
                raise APIError(429, "Too many chats are running already (MAX_CONCURRENT_CHATS). Try again soon.",
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
    request, session = chat.request, sessions.open(owner, chat.request.user)
    history = () if request.brings_history else session.turns
    whole: dict[str, Any] = {}
    last: list[Delta] = []
    for delta in deltas_of(replace(chat, history=history, session_id=session.id)):
        if request.user:
            merge(whole, delta.chunk)
        if not delta.ends:
            yield from last
            last = []
            yield delta
        else:
            last.append(delta)
    if request.user and request.turns:
        said = next((as_message(choice) for choice in whole["choices"] if choice["index"] == 0), {})
        message = {"role": "assistant", "content": said.get("content"),
                   **({"tool_calls": said["tool_calls"]} if said.get("tool_calls") else {})}
        *older, newest = request.turns
        sessions.record(owner, request.user, session, (*older, (*newest, message)), anew=request.brings_history)
    yield from last


LOOK_EVERY = 0.5  # seconds between looks at whether a chat's client is still there
MOST_WAITING = 256  # deltas between an upstream and its client


def relay(deltas: Iterator[Delta], calls: Calls, silence: float, look: Callable[[], None],
          cancel: Callable[[], None]) -> Iterator[Delta | None]:
    """Run the deltas on a thread of their own and hand them on, with a None after every `silence` seconds without one.

    look() is called about twice a second; it raises when the chat has lost its client. Then, and at every other end,
    cancel() tells the upstream call; one that goes on all the same, so that its turn is recorded, holds one of `calls`
    until it ends. Raises what the deltas raise.
    """
    box: queue.SimpleQueue[Delta | APIError | None] = queue.SimpleQueue()
    left = threading.Event()

    def put(item: Delta | APIError | None) -> None:
        while box.qsize() >= MOST_WAITING and not left.is_set():
            time.sleep(0.01)  # a client that reads slowly holds its upstream back
        if not left.is_set():
            box.put(item)

    def work() -> None:
        try:
            for delta in deltas:
                put(delta)
            put(None)
        except Exception as error:  # handed to the chat's own thread, which answers for it
            put(as_api_error(error))

    calls.start(work)
    quiet_until = next_look = time.monotonic()
    quiet_until += silence
    try:
        while True:
            now = time.monotonic()
            if now >= next_look:
                look()
                next_look = now + LOOK_EVERY
            try:
                item = box.get(timeout=max(0.0, min(next_look, quiet_until) - now))
            except queue.Empty:
                if time.monotonic() >= quiet_until:
                    quiet_until += silence
                    yield None
                continue
            if item is None:
                return
            if isinstance(item, APIError):
                raise item
            yield item
            quiet_until = time.monotonic() + silence
    finally:
        left.set()
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


def pace(deltas: Iterator[Delta | None], interval: float, longest: float,
         look: Callable[[], None]) -> Iterator[Delta | None]:
    """Replay an answer that arrived whole as OpenAI streams one: the role, the text in pieces, one every `interval`
    seconds and in `longest` seconds at most, each tool call's name and arguments, the finish reason, the usage."""
    most = max(1, int(longest / interval)) if interval else 1
    for delta in deltas:
        if delta is None or not delta.whole:
            yield delta
            continue
        choice = delta.chunk["choices"][0]
        calls = choice["delta"].pop("tool_calls", ())
        yield delta.with_chunk(Delta.of({**choice["delta"], "content": choice["delta"]["content"] and ""}).chunk)
        began, held = time.monotonic(), ""
        for count, piece in enumerate(pieces(delta.text, most)):
            held += piece
            wait = began + count * interval - time.monotonic()
            if wait < -interval:  # the machine is too busy for this pace: pieces grow
                continue
            time.sleep(max(0.0, wait))
            look()
            yield delta.with_chunk(Delta.of({"content": held}).chunk)
            held = ""
        if held:
            yield delta.with_chunk(Delta.of({"content": held}).chunk)
        for call in calls:
            head = {**call, "function": {**call["function"], "arguments": ""}}
            rest = {"index": call["index"], "function": {"arguments": call["function"]["arguments"]}}
            for part in (head, rest):
                yield delta.with_chunk(Delta.of({"tool_calls": [part]}).chunk)
        yield delta.with_chunk(Delta.of({}, choice["finish_reason"]).chunk)
        yield delta.with_chunk({"choices": [], "usage": delta.chunk["usage"]})


# ======================================================================================================================
# 12 Formats
#
# Deltas in, OpenAI's JSON or server-sent events out.
# ======================================================================================================================


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
            choice.update(message=as_message(choice), logprobs=choice.get("logprobs"),
                          finish_reason=choice.get("finish_reason") or "stop")
            del choice["delta"]
        head = {**self._head, "object": "chat.completion"}
        return {**head, **answer, **head}  # first in order, last in say

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
                head = {**self._head, "object": "chat.completion.chunk", "model": delta.model}
                chunk = {**head, **delta.chunk, **head}
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


# ======================================================================================================================
# 13 App
#
# The routes and who may call them. `create_app(settings)` builds a Bottle application with state of its own, so a
# test can have as many as it likes.
# ======================================================================================================================

OPEN_PATHS = ("/health", "/", "/docs", "/openapi.json")  # that ask for no key, for they tell nothing of anybody


class EventStream:
    """A WSGI body: events of which the first has been made already, and what to do when it is over or given up."""

    def __init__(self, events: Iterator[bytes], done: ExitStack) -> None:
        self._events, self.close = events, done.close

    def __iter__(self) -> Iterator[bytes]:
        return self._events


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
            return EventStream(itertools.chain([first], events), done.pop_all())
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
                "key_required": bool(self.settings.api_master_key), "uptime_seconds": int(time.time() - self.started),
                "chats": {"running": self.chats.used, "limit": self.chats.limit},
                "sessions": {"kept": len(self.sessions), "limit": self.sessions.limit},
                "upstreams": {name: {"failing_since": int(trouble[0]), "reason": trouble[1]} if trouble else {}
                              for name, trouble in troubles.items()}}

    def openapi(self) -> dict[str, Any]:
        return openapi(bool(self.settings.api_master_key))

    def page(self) -> str:
        set_headers(page_headers())
        return PAGE

    # Before and after every route

    def admit(self) -> None:
        """Let a request in, or raise what to answer instead."""
        environ = bottle.request.environ  # also for headers: Bottle's own accessors fail on some bytes above 127
        environ["kimi2api.began"] = time.monotonic()
        environ["kimi2api.id"] = request_id(environ.get("HTTP_X_REQUEST_ID", ""))
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
        try:
            environ["bottle.raw_path"].encode("latin-1").decode()
        except UnicodeError:  # Bottle would drop the bytes that are none and go on to another's path
            raise as_response(bad_request("The path is not UTF-8.")) from None
        if environ["REQUEST_METHOD"] == "OPTIONS":
            raise bottle.HTTPResponse(status=204, headers={
                "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS", "Access-Control-Max-Age": "600",
                "Access-Control-Allow-Headers": environ.get("HTTP_ACCESS_CONTROL_REQUEST_HEADERS", "*"),
                "Access-Control-Allow-Private-Network": "true"})
        environ["kimi2api.owner"] = "" if environ["PATH_INFO"] in OPEN_PATHS else self._owner_of_key()

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
        if host and origin.partition("://")[2] == host:  # the server's own pages
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


def request_id(given: str) -> str:
    return given if re.fullmatch(r"[\w.:-]{1,128}", given, re.A) else f"req_{uuid.uuid4().hex}"


def owner() -> str:
    """Whom the sessions of the current request belong to."""
    key: str = bottle.request.environ["kimi2api.owner"]
    return key


def set_headers(headers: Mapping[str, str]) -> None:
    for name, value in headers.items():
        bottle.response.set_header(name, value)


def no_session() -> APIError:
    return APIError(404, "Nothing is remembered of this user (any more).", code="session_not_found")


def host_of(address: str) -> str | None:
    try:
        host: str | None = urlsplit(address).hostname
        return host
    except ValueError:  # such as half an IPv6 address
        return None


def as_response(error: APIError) -> bottle.HTTPResponse:
    return bottle.HTTPResponse(dump_json(error.body()), error.status,
                               headers={**error.headers, "Content-Type": "application/json"})


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


def bottles_error(error: bottle.HTTPError) -> bytes:
    """Bottle's own errors: no such path, wrong method, or a crash outside a route."""
    codes = {404: "not_found", 405: "method_not_allowed"}
    path = f"{bottle.request.method} {bottle.request.path[:100]}"
    message = {404: f"There is no {path!r} here. Clients want the base URL to end in /v1.",
               405: f"{path!r}: no such method."}.get(error.status_code, "An unexpected error; see the log.")
    bottle.response.content_type = "application/json"
    return dump_json(APIError(error.status_code, message, code=codes.get(error.status_code, "internal_error"),
                              type="invalid_request_error" if error.status_code < 500 else "server_error").body())


def create_app(settings: Settings, stopping: threading.Event | None = None) -> bottle.Bottle:
    """The WSGI application. Chats end with an error once `stopping` is set."""
    app, wsgi = App(settings, stopping or threading.Event()), bottle.Bottle()
    wsgi.install(json_plugin)
    wsgi.default_error_handler = bottles_error
    wsgi.add_hook("before_request", app.admit)
    wsgi.add_hook("after_request", app.finish)
    wsgi.route("/v1/chat/completions", "POST", app.chat)
    wsgi.route("/v1/models", "GET", app.models)
    wsgi.route(r"/v1/models/<name:re:[\s\S]+>", "GET", app.model)
    wsgi.route(r"/v1/sessions/<user:re:[\s\S]+>", "GET", app.session)
    wsgi.route(r"/v1/sessions/<user:re:[\s\S]+>", "DELETE", app.forget)
    wsgi.route("/health", "GET", app.health)
    wsgi.route("/openapi.json", "GET", app.openapi)
    wsgi.route(["/", "/docs"], "GET", app.page)
    return wsgi


# ======================================================================================================================
# 14 Demo upstream
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
# 15 Server
#
# waitress with settings that suit chats, a stop that lets them finish, and the command line.
# ======================================================================================================================

SPARE_THREADS = 8  # beyond MAX_CONCURRENT_CHATS, so that everything else is always answered
IDLE_CONNECTIONS = 4096
STALLED_AFTER = 30.0  # seconds in which a client has taken nothing of what waits for it
EXTRA_BODY_BYTES = 16 << 20  # read, to disk, above MAX_BODY_BYTES: a client still sending would miss our 413


class JSONErrorTask(ErrorTask):  # type: ignore[misc]
    """waitress's own answers (a request that is not HTTP, headers too long, …) in OpenAI's shape."""

    def execute(self) -> None:
        error = self.request.error
        code = "request_too_large" if error.code == 413 else None
        body = dump_json(APIError(error.code, f"{error.reason}: {error.body}", code=code).body())
        self.status = f"{error.code} {error.reason}"
        self.response_headers += [("Content-Type", "application/json"),
                                  ("X-Request-Id", request_id(self.request.headers.get("X_REQUEST_ID", "")))]
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class Task(WSGITask):  # type: ignore[misc]
    def build_response_header(self) -> bytes:
        if self.channel.server.draining:
            self.set_close_on_finish()  # a client that goes on asking over one connection must not hold up the stop
        head: bytes = super().build_response_header()
        return head


class Parser(HTTPRequestParser):  # type: ignore[misc]
    def parse_header(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # of a request target such as http://[/, which waitress lets pass
            raise ParsingError(f"Bad request target: {error}") from None


class Channel(HTTPChannel):  # type: ignore[misc]
    parser_class = Parser
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
        self._next_look = 0.0
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
        log.info("stopping; running: %d, with %g s to finish; a second signal ends at once", running, self._grace)
        self._drain(self._grace)
        self._stopping.set()  # what still runs ends with an error, which wants a moment to be sent
        self._drain(2.0)

    def _turn(self) -> None:
        wasyncore.loop(timeout=0.5, use_poll=True, map=self._map, count=1)
        now = time.time()
        if now >= self._next_look:  # waitress closes connections without a request; this is for those with one
            self._next_look = now + 5
            for channel in self._channels():
                if channel.total_outbufs_len and now - channel.last_activity > STALLED_AFTER:
                    channel.handle_close()

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
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted + reserve, hard))
        except (OSError, ValueError):  # some systems allow less than they say
            wanted = soft - reserve
    return max(wanted, chats)


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
    if settings.api_master_key and sys.stdout.isatty():  # whoever sits there has set it; a log file must not have it
        key = settings.api_master_key[0]
    header = f' -H "Authorization: Bearer {key}"' if settings.api_master_key else ""
    return "\n".join([
        f"kimi2api {__version__} listens on {settings.api_host} port {port}; base URL for clients: {address}/v1",
        f"  key:      {'API_MASTER_KEY' if settings.api_master_key else 'none asked; only this machine may call'}",
        f"  upstream: {'the built-in demo' if demo else settings.upstream_url}",
        "  try it:   curl " + f"{address}/v1/chat/completions{header} -H 'Content-Type: application/json'"
        " -d '{\"messages\": [{\"role\": \"user\", \"content\": \"Hello!\"}]}'",
        "  stop it:  Ctrl-C"])


ADVICE = {  # what to do about an error of a check, where its message does not say
    "upstream_unavailable": "Check the internet connection, HTTPS_PROXY and the address; if it is down, try later.",
    "upstream_timeout": "Try later, or raise REQUEST_TIMEOUT.",
    "upstream_rate_limited": "Wait some minutes before the next try.",
    "upstream_invalid_response": "Try later; if it stays so, look for a newer version of this program.",
    "upstream_refused": "Try later, and the same question in a browser; if that works, look for a newer version."}


def run_check(settings: Settings) -> int:
    """Print every step of the way through each upstream with a tick or a cross; 0 if all went well, else 1."""
    failed = 0
    for upstream in Upstreams(settings).all:
        print(f"{upstream.name}:")
        for step, error in upstream.check():
            print(f"  {'✗' if error else '✓'} {step}", flush=True)
            if error:
                failed = 1
                print(f"    {error} [{error.code}]\n    {ADVICE.get(error.code or '', '')}".rstrip(), flush=True)
    return failed


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
        logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
        logging.getLogger("waitress").setLevel(logging.ERROR)  # its news are clients that left and full queues
        if options.check:
            return run_check(settings)
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


# ======================================================================================================================
# 16 Description and page
#
# The OpenAPI description of the routes, and the page at / and /docs, which needs nothing from the internet.
# ======================================================================================================================

Schema = dict[str, Any]


def obj(properties: Schema, optional: str = "") -> Schema:
    """An object whose properties are required but for the named ones."""
    return {"type": "object", "properties": properties, "required": sorted(set(properties) - set(optional.split()))}


def array(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def const(value: str) -> Schema:
    return {"type": "string", "const": value}


STRING, INTEGER, BOOLEAN, OBJECT = ({"type": name} for name in ("string", "integer", "boolean", "object"))
COUNT: Schema = {"type": "integer", "minimum": 0}
MAYBE_STRING = or_null(STRING)
CALL_SCHEMA = obj({"id": STRING, "type": const("function"), "function": obj({"name": STRING, "arguments": STRING})})
FINISH_REASON = {"type": "string", "enum": ["stop", "length", "tool_calls", "content_filter", "function_call"]}
SCHEMAS: dict[str, Schema] = {
    "Error": obj({"error": obj({"message": STRING, "type": STRING, "param": MAYBE_STRING, "code": MAYBE_STRING})}),
    "Message": obj({"role": {"type": "string", "enum": list(ROLES)},
                    "content": or_null({"anyOf": [STRING, array(obj({"type": STRING, "text": STRING}, "text"))]}),
                    "tool_calls": array(CALL_SCHEMA), "tool_call_id": STRING}, "content tool_calls tool_call_id"),
    "Request": obj({
        "messages": array(ref("Message"), minItems=1), "model": MAYBE_STRING, "stream": or_null(BOOLEAN),
        "stream_options": or_null(obj({"include_usage": BOOLEAN}, "include_usage")), "user": MAYBE_STRING,
        "stop": {"anyOf": [STRING, array(STRING, maxItems=4), {"type": "null"}]},
        "max_tokens": or_null({**INTEGER, "minimum": 1}), "max_completion_tokens": or_null({**INTEGER, "minimum": 1}),
        "tools": array(obj({"type": const("function"), "function": obj(
            {"name": {**STRING, "minLength": 1}, "description": STRING, "parameters": OBJECT},
            "description parameters")})),
        "tool_choice": {"anyOf": [{"type": "string", "enum": ["none", "auto", "required"]}, obj(
            {"type": const("function"), "function": obj({"name": STRING})})]},
        "parallel_tool_calls": BOOLEAN,
        "response_format": {"anyOf": [obj({"type": {"type": "string", "enum": ["text", "json_object"]}}), obj(
            {"type": const("json_schema"), "json_schema": obj({"name": STRING, "schema": OBJECT}, "name")})]}},
        "model stream stream_options user stop max_tokens max_completion_tokens tools tool_choice parallel_tool_calls "
        "response_format"),
    "Usage": obj({"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT}),
    "Completion": obj({"id": STRING, "object": const("chat.completion"), "created": INTEGER, "model": STRING,
                       "choices": array(obj({
                           "index": COUNT, "finish_reason": FINISH_REASON, "logprobs": or_null(OBJECT), "message": obj(
                               {"role": const("assistant"), "content": MAYBE_STRING, "refusal": MAYBE_STRING,
                                "tool_calls": array(CALL_SCHEMA)}, "tool_calls")})), "usage": ref("Usage")}),
    "Chunk": obj({"id": STRING, "object": const("chat.completion.chunk"), "created": INTEGER, "model": STRING,
                  "choices": array(obj({"index": COUNT, "delta": OBJECT, "finish_reason": or_null(FINISH_REASON)})),
                  "usage": or_null(ref("Usage"))}, "usage"),
    "Model": obj({"id": STRING, "object": const("model"), "created": INTEGER, "owned_by": STRING}),
    "Models": obj({"object": const("list"), "data": array(ref("Model"))}),
    "Session": obj({"object": const("session"), "user": STRING, "created": INTEGER, "last_used": INTEGER,
                    "expires_at": INTEGER, "turns": array(array(ref("Message")))}),
    "Deleted": obj({"object": const("session.deleted"), "user": STRING, "deleted": BOOLEAN}),
    "OpenAPI": obj({"openapi": STRING, "info": OBJECT, "security": array(OBJECT), "components": OBJECT,
                    "paths": OBJECT}),
    "Health": obj({"status": {"type": "string", "enum": ["ok", "degraded"]}, "version": STRING, "uptime_seconds": COUNT,
                   "key_required": BOOLEAN, "chats": obj({"running": COUNT, "limit": COUNT}),
                   "sessions": obj({"kept": COUNT, "limit": COUNT}), "upstreams": {
                       "type": "object", "additionalProperties": obj({"failing_since": INTEGER, "reason": STRING},
                                                                     "failing_since reason")}}),
}


def openapi(key_required: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 description of the server."""
    def operation(summary: str, answer: str, parameter: str = "", **more: Any) -> dict[str, Any]:
        content = {"application/json": {"schema": ref(answer)}} if answer else {"text/html": {"schema": STRING}}
        if answer == "Completion":
            content["text/event-stream"] = {"schema": {**STRING, "description": "events: each a Chunk, then [DONE]"}}
        parameters = [{"name": parameter, "in": "path", "required": True, "schema": STRING}] if parameter else []
        errors = {"description": "an error", "content": {"application/json": {"schema": ref("Error")}}}
        return {"summary": summary, "parameters": parameters, **more,
                "responses": {"200": {"description": summary, "content": content}, "default": errors}}

    open_to_all: dict[str, Any] = {"security": []}
    return {
        "openapi": "3.1.0", "info": {"title": "kimi2api", "version": __version__, "license": {"name": "Apache-2.0"}},
        "security": [{"key": []}] if key_required else [],
        "components": {"schemas": SCHEMAS, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "paths": {
            "/v1/chat/completions": {"post": operation("chat", "Completion", requestBody={
                "required": True, "content": {"application/json": {"schema": ref("Request")}}})},
            "/v1/models": {"get": operation("the models", "Models")},
            "/v1/models/{id}": {"get": operation("one model", "Model", "id")},
            "/v1/sessions/{user}": {"get": operation("the turns remembered of a user", "Session", "user"),
                                    "delete": operation("forget a user's turns", "Deleted", "user")},
            "/health": {"get": operation("how the server is", "Health", **open_to_all)},
            "/openapi.json": {"get": operation("this description", "OpenAPI", **open_to_all)},
            "/docs": {"get": operation("a page to read and to try", "", **open_to_all)},
            "/": {"get": operation("the same page", "", **open_to_all)}}}


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>kimi2api</title><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>:root { color-scheme: light dark } * { box-sizing: border-box } h1 { margin: 0 } h2 { margin: 2rem 0 .6rem }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: auto; padding: 1rem; overflow-wrap: anywhere }
.ok { color: light-dark(#176f30, #57c773) } .degraded, .error { color: light-dark(#b3261e, #ff8f85) }
input, select, textarea, button { font: inherit; padding: .4rem .7rem; border: 1px solid #8889; border-radius: 6px }
label:not([hidden]) { display: block; margin: .6rem 0 } input, select, textarea { width: 100%; resize: vertical }
#chat, pre { max-height: 60vh; overflow: auto } .user, pre { background: #8882 } .soft { font-size: .8em; opacity: .75 }
#chat > div, pre { margin: .6rem 0; padding: .4rem .7rem; border-radius: 6px } #chat > div { white-space: pre-wrap }
details { border-top: 1px solid #8886; padding: .4rem 0 } summary { cursor: pointer }
details button { display: block; margin-left: auto; padding: 0 .6rem } .user::before { content: 'You: ' }</style>
<h1>kimi2api</h1><div id="status">Asking the server…</div><noscript>This page needs JavaScript.</noscript><main>
<label id="lock" hidden>API key <input id="key" type="password" autocomplete="off"></label><h2>Try it</h2>
<label>Model <select id="model"></select></label><label>Question <textarea id="question" rows="3"
placeholder="Ctrl+Enter or ⌘+Enter sends"></textarea></label><button id="send">Send</button>
<button id="stop" disabled>Stop</button> <div id="chat" role="log" aria-label="Conversation" tabindex="0"></div>
<h2>Connect</h2><section id="connect"></section><h2>API</h2><section id="api"></section></main>
<script type="module">
const [status, lock, key, model, question, send, stop, chat, connect, api] = document.querySelectorAll('[id]');
const turns = [], examples = {}, newline = String.fromCharCode(10), near = {block: 'nearest'};
let running = null, locked = null;  // what aborts the running chat; whether a key is asked for, null while unknown
const make = (tag, parent, textContent, className = '') =>  // the only way texts get in, so that they are never HTML
  parent.appendChild(Object.assign(document.createElement(tag), {textContent, className}));
function fold(parent, title, about, schema) {  // a <details> with a text to copy; returns the element of the text
  const details = make('details', parent), summary = make('summary', details), button = make('button', details, 'Copy');
  make('code', summary, title).after(' ', make('span', summary, about, 'soft'));
  const pre = make('pre', details, JSON.stringify(schema, null, 2));
  const copy = async () => { await navigator.clipboard.writeText(pre.textContent); button.textContent = 'Copied'; };
  button.onclick = () => copy().catch(() => getSelection().selectAllChildren(pre));  // plain http has no clipboard
  return Object.assign(pre, {tabIndex: 0});  // so that the keyboard can scroll it
}
function fail({message, code}) { throw Error(message + (code ? ` (${code})` : '')); }
async function call(path, options) {  // the answer's JSON, or the body of what was sent with a method
  const headers = {'Content-Type': 'application/json'}, bytes = new TextEncoder().encode(key.value.trim());
  if (bytes.length && path.startsWith('/v1/')) headers.Authorization = 'Bearer ' + String.fromCharCode(...bytes);
  const answer = await fetch(path, {headers, ...options}).catch(() => fail({message: 'The server cannot be reached.'}));
  if (!answer.ok) fail((await answer.json().catch(() => ({}))).error ?? {message: `HTTP status ${answer.status}`});
  return options?.method ? answer.body : answer.json();
}
async function watch() {
  try {
    const now = await call('/health', {signal: AbortSignal.timeout(4000)}), {chats, uptime_seconds: up} = now;
    status.replaceChildren(make('b', status, now.status, now.status), ` · ${chats.running} of ${chats.limit} chats ` +
      `running · ${now.sessions.kept} sessions kept · up ${Math.floor(up / 3600)} h ${Math.floor(up / 60) % 60} min`);
    for (const [name, {reason}] of Object.entries(now.upstreams)) if (reason) make('div', status, `${name}: ${reason}`);
    if (locked !== now.key_required) { lock.hidden = !(locked = now.key_required); fillModels(); fillApi(); }
  } catch (error) { status.replaceChildren(make('b', status, error.message, 'degraded')); locked = null; }
  setTimeout(watch, 5000);
}
async function fillModels() {
  const chosen = model.value, {data} = await call('/v1/models').catch(({message}) => ({data: [{id: '', message}]}));
  model.replaceChildren(...data.map(({id, message = id}) => new Option(message, id, false, id === chosen)));
  fillConnect();
}
function fillConnect() {
  const base = location.origin + '/v1', secret = locked ? 'YOUR_KEY' : 'none', id = model.value || 'kimi';
  const name = JSON.stringify(id), hello = '[{"role": "user", "content": "Hello!"}]', texts = {
    curl: `curl ${base}/chat/completions -H 'Authorization: Bearer ${secret}' -H 'Content-Type: application/json' -d '
{"model": ${name}, "messages": ${hello}}'`, 'openai-python': `from openai import OpenAI
client = OpenAI(base_url="${base}", api_key="${secret}")
print(client.chat.completions.create(model=${name}, messages=${hello}).choices[0].message.content)`,
    'openai-node': `import OpenAI from "openai";
const client = new OpenAI({baseURL: "${base}", apiKey: "${secret}"});
const stream = await client.chat.completions.create({model: ${name}, stream: true, messages: ${hello}});
for await (const chunk of stream) process.stdout.write(chunk.choices[0]?.delta?.content ?? "");`,
    LangChain: `from langchain_openai import ChatOpenAI
print(ChatOpenAI(base_url="${base}", api_key="${secret}", model=${name}).invoke("Hello!").content)`,
    'chat UIs': `Key ${secret}, model ${id}, and as base URL in
Open WebUI (Settings, Connections, OpenAI API): ${base}
Cherry Studio (Settings, Model Provider) and NextChat (Settings, Custom Endpoint): ${location.origin}`};
  for (const title in texts) (examples[title] ??= fold(connect, title)).textContent = texts[title];
}
async function fillApi() {
  const {paths = {}, components, message = ''} = await call('/openapi.json').catch(error => error);
  api.textContent = message;
  for (const [path, item] of Object.entries(paths))
    for (const [method, {summary, parameters, requestBody, responses}] of Object.entries(item))
      if (responses) fold(api, `${method.toUpperCase()} ${path}`, summary, {parameters, requestBody, responses});
  for (const [name, schema] of Object.entries(components?.schemas ?? {})) fold(api, name, 'schema', schema);
}
async function ask() {
  const said = {role: 'user', content: question.value.trim()}, reply = {role: 'assistant', content: ''};
  if (running || !said.content) return;
  const body = JSON.stringify({model: model.value || undefined, stream: true, messages: [...turns, said]});
  make('div', chat, said.content, 'user').scrollIntoView(near);
  const box = make('div', chat, '', 'assistant'), thought = make('div', box, '', 'soft'), text = make('div', box, '…');
  [running, send.disabled, stop.disabled, question.value] = [new AbortController(), true, false, ''];
  try {
    const stream = await call('/v1/chat/completions', {method: 'POST', body, signal: running.signal});
    const reader = stream.pipeThrough(new TextDecoderStream()).getReader(); let whole = false;
    for (let read, rest = ''; !(read = await reader.read()).done;) {
      const lines = (rest + read.value).split(newline), far = chat.scrollHeight - chat.scrollTop - chat.clientHeight;
      rest = lines.pop();  // the beginning of a line
      for (const data of lines.filter(line => line.startsWith('data:')).map(line => line.slice(5).trim())) {
        if (whole ||= data === '[DONE]') break;
        const {error, choices} = JSON.parse(data), delta = choices?.[0]?.delta ?? {}; if (error) fail(error);
        thought.textContent += delta.reasoning_content ?? '';
        text.textContent = (reply.content += delta.content ?? '') || '…';
      }
      if (far < 60) chat.scrollTop = chat.scrollHeight;  // follow, unless the reader has scrolled up
    }
    if (!whole || !reply.content) fail({message: whole ? 'The answer is empty.' : 'The answer broke off.'});
  } catch ({message}) { make('div', chat, running.signal.aborted ? 'Stopped' : message, 'error').scrollIntoView(near); }
  if (reply.content) turns.push(said, reply); else { box.remove(); question.value ||= said.content; }
  [running, send.disabled, stop.disabled] = [null, false, true];
}
send.onclick = ask; stop.onclick = () => running.abort(); model.onchange = fillConnect;
question.onkeydown = event => { if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) ask(); };
key.onchange = () => { sessionStorage.kimi2apiKey = key.value; fillModels(); };
key.value = sessionStorage.kimi2apiKey ?? ''; watch();</script>"""


def page_headers() -> dict[str, str]:
    """The page may run and look like what is in it, ask this server, and nothing else."""
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
