"""The server against malformed, oversized, slow, forged or wrong requests: each its status."""

import json
import os
import socket
import time
from contextlib import ExitStack, suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib.config import UserError
from server import Handler, Server, ServerConfig
from tests.serving import Served, make_model, parse, read_all

CHAT, DONE = "/v1/chat/completions", "/v1/completions"
ASK = {"messages": [{"role": "user", "content": "why"}], "max_tokens": 2}
GOOD = json.dumps(ASK)
JSON = "Content-Type: application/json"


@pytest.fixture(scope="module")
def target(tmp_path_factory, tiny_tokenizer):
    folder = make_model(tmp_path_factory.mktemp("served") / "chatty", tiny_tokenizer, "chatml")
    one = Served(folder.with_suffix(".log"), folder).ready()
    yield one
    assert "Traceback" not in one.text
    assert one.ask(CHAT, ASK)[0] == 200
    one.kill()


# ---- the request as bytes: lines with | between them, in which some words stand for whole lines

WORDS = {"GET": "GET /health HTTP/1.1", "JSON": JSON, "LENGTH": f"Content-Length: {len(GOOD)}"}


def head_of(target, text):
    """The bytes of a head; HOST is the server's own."""
    words = WORDS | {"HOST": f"Host: 127.0.0.1:{target.port}"}
    lines = [words.get(line, line) for line in text.split("|")]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


HEADS = {  # requests without a body -> status
    "plain": ("GET|HOST", 200),
    "HTTP/1.0": ("GET /health HTTP/1.0|HOST", 200),
    "a query": ("GET /health?x=../..&y=%00 HTTP/1.1|HOST", 200),
    "POST where GET is": ("POST /health HTTP/1.1|HOST", 405),
    "GET where POST is": ("GET /generate HTTP/1.1|HOST", 405),
    "HEAD where POST is": ("HEAD /generate HTTP/1.1|HOST", 405),
    "PUT": ("PUT /health HTTP/1.1|HOST", 405),
    "DELETE": ("DELETE /v1/models/chatty HTTP/1.1|HOST", 405),
    "PATCH": ("PATCH /generate HTTP/1.1|HOST", 405),
    "TRACE": ("TRACE / HTTP/1.1|HOST", 405),
    "CONNECT": ("CONNECT / HTTP/1.1|HOST", 405),
    "OPTIONS": ("OPTIONS /generate HTTP/1.1|HOST", 405),
    "a made-up method": ("FROBNICATE /health HTTP/1.1|HOST", 405),
    "no such path": ("GET /nope HTTP/1.1|HOST", 404),
    "a file of the tree": ("GET /server.py HTTP/1.1|HOST", 404),
    "the page's file": ("GET /chat.html HTTP/1.1|HOST", 404),
    "traversal": ("GET /../../../etc/passwd HTTP/1.1|HOST", 404),
    "traversal, encoded": ("GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1|HOST", 404),
    "traversal in a model's name": ("GET /v1/models/..%2f..%2fetc%2fpasswd HTTP/1.1|HOST", 404),
    "two slashes": ("GET //health HTTP/1.1|HOST", 404),
    "a slash at the end": ("GET /health/ HTTP/1.1|HOST", 404),
    "an encoded path": ("GET /%68ealth HTTP/1.1|HOST", 404),
    "upper case": ("GET /HEALTH HTTP/1.1|HOST", 404),
    "another model": ("GET /v1/models/gpt-4 HTTP/1.1|HOST", 404),
    "a whole URL": ("GET http://127.0.0.1/health HTTP/1.1|HOST", 400),
    "an asterisk": ("OPTIONS * HTTP/1.1|HOST", 400),
    "an authority": ("CONNECT example.com:443 HTTP/1.1|HOST", 400),
    "HTTP/0.9": ("GET /health", 400),
    "HTTP/1": ("GET /health HTTP/1|HOST", 400),
    "HTTP/1.10": ("GET /health HTTP/1.10|HOST", 400),
    "HTTP/1.2": ("GET /health HTTP/1.2|HOST", 505),
    "HTTP/9.9": ("GET /health HTTP/9.9|HOST", 505),
    "HTTP/2's opening": ("PRI * HTTP/2.0", 505),
    "http in small letters": ("GET /health http/1.1|HOST", 400),
    "a method in small letters": ("get /health HTTP/1.1|HOST", 400),
    "an empty first line": ("|GET|HOST", 400),
    "two spaces": ("GET  /health HTTP/1.1|HOST", 400),
    "tabs": ("GET\t/health\tHTTP/1.1|HOST", 400),
    "a space in the path": ("GET /he alth HTTP/1.1|HOST", 400),
    "a NUL in the path": ("GET /health\x00 HTTP/1.1|HOST", 400),
    "a letter beyond ASCII in the path": ("GET /héalth HTTP/1.1|HOST", 400),
    "a long path": ("GET /" + "a" * 9000 + " HTTP/1.1|HOST", 414),
    "a long method": ("G" * 9000 + " / HTTP/1.1|HOST", 414),
    "a long header": ("GET|HOST|X: " + "a" * 40000, 431),
    "many headers": ("GET|HOST" + "".join(f"|X-{i}: a" for i in range(120)), 431),
    "many long headers": ("GET|HOST" + f"|X: {'a' * 900}" * 60, 431),
    "a header of spaces": ("GET|HOST|X: " + " " * 30_000 + "\x01", 400),
    "a path of percents": ("GET /v1/models/" + "%" * 8000 + " HTTP/1.1|HOST", 404),
    "a header without colon": ("GET|HOST|Nonsense", 400),
    "a space before the colon": ("GET|HOST|X : a", 400),
    "a header without name": ("GET|HOST|: a", 400),
    "a folded header": ("GET|HOST|X: a| b", 400),
    "a space before a header": ("GET| X: a|HOST", 400),
    "a NUL in a header": ("GET|HOST|X: a\x00b", 400),
    "a bell in a header": ("GET|HOST|X: a\x07b", 400),
    "a DEL in a header": ("GET|HOST|X: a\x7fb", 400),
    "a lone CR": ("GET|HOST|X: a\rY: b", 400),
    "a lone LF": ("GET|HOST|X: a\nY: b", 400),
    "no Host": ("GET", 400),
    "two Hosts": ("GET|HOST|HOST", 400),
    "an empty Host": ("GET|Host:", 403),
    "a foreign Host": ("GET|Host: evil.example", 403),
    "a Host that looks like ours": ("GET|Host: 127.0.0.1.evil.example", 403),
    "a Host with a user": ("GET|Host: 127.0.0.1@evil.example", 403),
    "a Host with a path": ("GET|Host: localhost/evil", 403),
    "two Hosts in one": ("GET|Host: localhost, evil.example", 403),
    "another address": ("GET|Host: 192.168.0.1", 403),
    "any address": ("GET|Host: 0.0.0.0", 403),
    "a port that is none": ("GET|Host: localhost:http", 403),
    "localhost": ("GET|Host: LocalHost", 200),
    "localhost through a tunnel": ("GET|Host: localhost:9", 200),
    "IPv6": ("GET|host:[::1]:8000", 200),
    "a foreign page": ("GET /v1/models HTTP/1.1|HOST|Origin: http://evil.example", 403),
    "a page without origin": ("GET /v1/models HTTP/1.1|HOST|Origin: null", 403),
    "a page of another port": ("GET /v1/models HTTP/1.1|HOST|Origin: http://127.0.0.1:1", 403),
    "a preflight": ("OPTIONS /generate HTTP/1.1|HOST|Origin: http://evil.example", 403),
    "our own page": ("GET /v1/models HTTP/1.1|Host: localhost:7|Origin: http://localhost:7", 200),
    "our own page behind TLS": ("GET|Host: localhost|Origin: https://localhost", 200),
    "two Origins": ("GET|HOST|Origin: http://localhost|Origin: null", 400),
    "a GET with a body": ("GET|HOST|Content-Length: 5||hello", 400),
    "a GET with a chunked body": ("GET|HOST|Transfer-Encoding: chunked", 400),
}


@pytest.mark.parametrize(("text", "status"), HEADS.values(), ids=HEADS)
def test_every_head_has_its_status(target, text, status):
    response = target.raw(head_of(target, text))
    assert response.status == status, response.body
    assert response.headers["connection"] == "close"
    names = {name for name in response.headers if name.startswith("access-control")}
    assert not names | ({"server"} & response.headers.keys())
    if status == 405:
        assert response.headers["allow"]
    if status >= 400 and not text.startswith("HEAD"):
        assert set(response.json["error"]) == {"message", "type", "param", "code"}


def test_head_has_no_body(target):
    response = target.raw(target.head("HEAD /health HTTP/1.1"))
    assert (response.status, response.body) == (200, b"")
    assert int(response.headers["content-length"]) == len(target.get("/health").body)


BYTES = {
    "a TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), 400),
    "an SSH client": (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", 400),
    "lines that end in LF": (b"GET /health HTTP/1.1\nHost: localhost\n\n", 400),
    "binary": (bytes(range(256)), 400),
    "a first line without end": (b"GET /" + b"a" * 9000, 414),
    "headers without end": (b"GET / HTTP/1.1\r\n" + b"X: aaaaaaaaaaaaaaaa\r\n" * 2000, 431),
}


@pytest.mark.parametrize(("data", "status"), BYTES.values(), ids=BYTES)
def test_what_is_no_request_is_told_at_once(target, data, status):
    with target.connect(data) as sock:  # and nothing more comes
        assert parse(read_all(sock)).status == status


# ---- the body's length and kind

LENGTHS = {  # headers of a POST with the body GOOD, {L} bytes -> status
    "as it should be": ("LENGTH|JSON", 200),
    "utf-8": ('LENGTH|Content-Type: application/json; charset="UTF-8"', 200),
    "a zero in front": ("Content-Length: 0{L}|JSON", 200),
    "ready to wait": ("LENGTH|JSON|Expect: 100-Continue", 200),
    "no kind": ("LENGTH", 415),
    "a form": ("LENGTH|Content-Type: application/x-www-form-urlencoded", 415),
    "plain text": ("LENGTH|Content-Type: text/plain", 415),
    "a file": ("LENGTH|Content-Type: multipart/form-data; boundary=x", 415),
    "nearly JSON": ("LENGTH|Content-Type: application/jsonx", 415),
    "JSON and more": ("LENGTH|Content-Type: application/json, text/plain", 415),
    "another charset": ("LENGTH|Content-Type: application/json; charset=utf-16", 415),
    "two kinds": ("LENGTH|JSON|Content-Type: text/plain", 400),
    "compressed": ("LENGTH|JSON|Content-Encoding: gzip", 415),
    "no length": ("JSON", 411),
    "an empty length": ("JSON|Content-Length:", 400),
    "below zero": ("JSON|Content-Length: -1", 400),
    "a word": ("JSON|Content-Length: abc", 400),
    "a sign": ("JSON|Content-Length: +{L}", 400),
    "hexadecimal": ("JSON|Content-Length: 0x10", 400),
    "an exponent": ("JSON|Content-Length: 1e3", 400),
    "another script's digits": ("JSON|Content-Length: ²", 400),
    "a list": ("JSON|Content-Length: {L}, {L}", 400),
    "twice the same": ("JSON|LENGTH|LENGTH", 400),
    "twice another": ("JSON|LENGTH|content-length: 0", 400),
    "one byte too long": (f"JSON|Content-Length: {(1 << 20) + 1}", 413),
    "ten gigabytes": ("JSON|Content-Length: 10000000000", 413),
    "99 digits": ("JSON|Content-Length: " + "9" * 99, 413),
    "too long to wait for": ("JSON|Content-Length: 10000000000|Expect: 100-continue", 413),
    "chunked": ("JSON|Transfer-Encoding: chunked", 501),
    "chunked with a length": ("JSON|LENGTH|Transfer-Encoding: chunked", 501),
    "chunked in disguise": ("JSON|LENGTH|Transfer-Encoding: xchunked", 501),
    "chunked twice": ("JSON|Transfer-Encoding: chunked|Transfer-Encoding: identity", 400),
    "identity": ("JSON|LENGTH|Transfer-Encoding: identity", 501),
    "another expectation": ("JSON|LENGTH|Expect: miracles", 417),
}


@pytest.mark.parametrize(("headers", "status"), LENGTHS.values(), ids=LENGTHS)
def test_a_body_is_taken_by_its_length_and_kind_alone(target, headers, status):
    headers = headers.replace("{L}", str(len(GOOD)))
    data = head_of(target, f"POST {CHAT} HTTP/1.1|HOST|{headers}") + GOOD.encode()
    with target.connect(data) as sock:
        text = read_all(sock)
    if status == 200:
        text = text.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert text.count(b"HTTP/1.1") == 1
    assert parse(text).status == status


def test_line_breaks_in_the_body_and_a_byte_at_a_time(target):
    data = target.post(CHAT, json.dumps(ASK, indent=2).encode() + b"\n\n\r\r")
    assert target.raw(data.replace(b"\n\n\r\r", b"\n\n  ")).status == 200
    with target.connect() as sock:
        for at in range(len(data)):
            sock.sendall(data[at : at + 1])
        assert parse(read_all(sock)).status == 200


@pytest.mark.parametrize(
    "second", ["GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", "x" * 100_000]
)
def test_what_follows_a_request_is_not_another(target, second):
    """Request smuggling, and pipelining: one connection, one answer."""
    before = target.text.count("GET /metrics")
    with target.connect(target.post(CHAT, ASK) + second.encode()) as sock:
        text = read_all(sock)
    assert (text.count(b"HTTP/1.1 "), parse(text).status) == (1, 200)
    headers = "JSON|Content-Length: 4|Transfer-Encoding: chunked"
    head = head_of(target, f"POST {CHAT} HTTP/1.1|HOST|{headers}")
    assert target.raw(head + b"0\r\n\r\n" + second.encode()).status == 501
    assert target.text.count("GET /metrics") == before


def test_a_large_body_sent_blindly_is_answered(target):
    head = target.head(f"POST {CHAT} HTTP/1.1", JSON, "Content-Length: 4000000")
    with target.connect(head) as sock:
        with suppress(
            OSError
        ):  # it may notice before it is through, and has its answer all the same
            sock.sendall(b"x" * 4_000_000)
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 413")


# ---- bodies

BODIES = {
    "nothing": b"",
    "a word": b"hello",
    "an array": b"[]",
    "a string": b'"prompt"',
    "a number": b"7",
    "null": b"null",
    "no UTF-8": b'{"prompt": "\xff"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"prompt": "a"}',
    "half of it": GOOD[:20].encode(),
    "more behind it": GOOD.encode() + b"{}",
    "single quotes": b"{'prompt': 'a'}",
    "a comma too many": b'{"prompt": "a",}',
    "a key twice": b'{"prompt": "a", "prompt": "b"}',
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "Infinity": b'{"prompt": "a", "temperature": -Infinity}',
    "more than a float holds": b'{"prompt": "a", "temperature": 1e999}',
    "5000 digits": b'{"prompt": "a", "seed": ' + b"7" * 5000 + b"}",
    "4000 digits": b'{"prompt": "a", "temperature": ' + b"7" * 4000 + b"}",
    "100,000 lists": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "900 lists": b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
    "900 objects": b'{"messages": [' + b'{"content":' * 900 + b"1" + b"}" * 900 + b"]}",
    "100,000 open lists": b"[" * 100_000,
    "half a surrogate pair": b'{"prompt": "\\ud800"}',
    "a NUL for a number": b'{"prompt": "a", "seed": \0}',
    "a line break in a string": b'{"prompt": "a\nb"}',
    "a name of 100,000 letters": b'{"prompt": "a", "' + b"temperatur" * 10_000 + b'": 1}',
    "no prompt": b"{}",
}


@pytest.mark.parametrize("path", ["/generate", DONE, CHAT, "/tokenize", "/detokenize"])
def test_a_body_that_is_no_request_is_a_400(target, path):
    for name, body in BODIES.items():
        response = target.raw(target.post(path, body))
        assert response.status == 400, (name, response.body)
        assert len(response.json["error"]["message"]) < 300, name


USER, TOO = {"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}
FIELDS = {  # of a request that is right
    "/generate": {"prompt": "a", "max_new_tokens": 2},
    DONE: {"prompt": "a", "max_tokens": 2},
    CHAT: ASK,
    "/tokenize": {},
    "/detokenize": {},
}
WRONG = [  # a route, a field, and values that the field must not have
    ("/generate", "temperature", [-1, 101, True, "1", [], {}]),
    ("/generate", "top_p", [0, -0.1, 1.1, "a", False]),
    ("/generate", "top_k", [-1, 1.5, 1 << 21, True, "50"]),
    ("/generate", "min_p", [-0.1, 1.1]),
    ("/generate", "repetition_penalty", [0, -1, 101]),
    ("/generate", "seed", [-1, 2**64, 1.5, "7", True]),
    ("/generate", "max_new_tokens", [0, -1, 1.5, True, "2", 10**9, 2**63]),
    ("/generate", "prompt", ["", "  \n", 7, None, [], ["a"], {}, True]),
    ("/generate", "template", ["instruct", "raw", "", 7]),
    ("/generate", "stream", [1, "true", []]),
    ("/generate", "stop", ["", [""], ["a"] * 9, "x" * 257, [7], 7, {}, [["a"]], [None]]),
    *(("/generate", name, [1]) for name in ("max_tokens", "n", "echo", "messages", "Prompt")),
    *(("/generate", name, [1]) for name in ("__class__", "", "x" * 999)),
    (DONE, "prompt", [[], [[]], [[], [1]], [["a"]], [True], [1.5], [384], [-1], [2**70], {}, 7]),
    (DONE, "prompt", [["a", 7], [[1], "a", 7], ["a"] * 65, [[1]] * 65, ["a", None], [None]]),
    (DONE, "logprobs", [-1, 21, True, "1"]),
    (DONE, "echo", [1, "yes"]),
    (DONE, "max_tokens", [0]),
    (DONE, "n", [0, -1, 65, 2**40, 1.5, True]),
    (DONE, "best_of", [2, True]),
    (DONE, "suffix", ["x", 7]),
    (CHAT, "n", [0, 65]),
    (CHAT, "logprobs", [1, "true", 5]),
    (CHAT, "top_logprobs", [2]),
    (CHAT, "max_tokens", [0]),
    (CHAT, "max_completion_tokens", [0, 3]),
    (CHAT, "stream_options", [1, [], "x", {"include_usage": 1}, {"include_usage": "yes"}]),
    (CHAT, "frequency_penalty", [0.5, -2, "0", False]),
    (CHAT, "presence_penalty", [1]),
    (CHAT, "logit_bias", [{"50": -100}]),
    (CHAT, "tools", [[{"type": "function"}]]),
    (CHAT, "functions", [[{}]]),
    (CHAT, "tool_choice", ["required"]),
    (CHAT, "response_format", [{"type": "json_object"}]),
    (CHAT, "reasoning_effort", ["high"]),
    (CHAT, "modalities", [["text", "audio"]]),
    (CHAT, "audio", [{}]),
    (CHAT, "temprature", [1]),
    (CHAT, "messages", [None, [], {}, "why", 7, [USER] * 257, [None], [[]], ["why"]]),
    (CHAT, "messages", [[USER | {"role": role}] for role in ("root", "User", ["user"], {}, None)]),
    (CHAT, "messages", [[{"role": "tool", "content": "a"}, USER], [{"content": "a"}]]),
    (CHAT, "messages", [[USER, TOO], [{"role": "system", "content": "so"}], [{"role": "user"}]]),
    (CHAT, "messages", [[USER | {"content": text}] for text in (None, 7, "", " \n", [], "\udc00")]),
    (CHAT, "messages", [[USER | {"content": [{"type": "image_url", "image_url": {"url": "a"}}]}]]),
    (CHAT, "messages", [[USER | {"content": [{"type": "text", "text": 7}]}]]),
    (CHAT, "messages", [[USER | {"content": [{"type": "text"}, USER]}]]),
    ("/tokenize", "prompt", [7]),
    ("/tokenize", "messages", ["a"]),
    ("/detokenize", "tokens", ["a", [384], [1.0], [[1]]]),
]
WRONG = [(path, {name: value}) for path, name, values in WRONG for value in values]
WRONG += [
    (DONE, {"echo": True, "stream": True}),
    (DONE, {"prompt": ["a"] * 60, "n": 60}),
    *((CHAT, {"logprobs": True, "top_logprobs": value}) for value in (-1, 21, True)),
    ("/tokenize", {"prompt": "a", "add_special_tokens": 1}),
]
RIGHT = [
    ("/generate", {"temperature": 0}),
    ("/generate", {"temperature": 100, "top_p": 1, "top_k": 0, "min_p": 1, "seed": 2**64 - 1}),
    ("/generate", {"top_k": 1 << 20, "top_p": 1e-9, "seed": 0, "repetition_penalty": 100}),
    ("/generate", {"temperature": None, "stop": None, "template": None, "stream": None}),
    ("/generate", {"max_new_tokens": 1.0}),
    *((DONE, {"prompt": prompt}) for prompt in ([1], [[1], [70, 71]], "")),
    (DONE, {"prompt": ["", "a"], "n": 32}),
    (DONE, {"stop": ["x" * 256] * 8}),
    (DONE, {"suffix": "", "best_of": 1, "frequency_penalty": 0.0, "logit_bias": {}}),
    (DONE, {"user": "me", "model": "chatty", "presence_penalty": 0}),
    (CHAT, {"tools": [], "tool_choice": "none", "parallel_tool_calls": True}),
    (CHAT, {"user": "me", "metadata": {"a": {"b": "c"}}, "store": False, "service_tier": "auto"}),
    (CHAT, {"response_format": {"type": "text"}, "tool_choice": "auto"}),
    (CHAT, {"stream_options": {"include_usage": True}, "max_completion_tokens": 2}),
    (CHAT, {"messages": [{"role": "system", "content": "be"}, USER, TOO, USER]}),
    (CHAT, {"messages": [USER | {"content": [{"type": "text", "text": text} for text in "why"]}]}),
]


@pytest.mark.parametrize(
    ("path", "fields", "status"),
    [(*case, 400) for case in WRONG] + [(*case, 200) for case in RIGHT],
    ids=lambda value: json.dumps(value)[:60],
)
def test_a_wrong_field_is_a_400_and_a_right_one_is_not(target, path, fields, status):
    got, answer = target.ask(path, FIELDS[path] | fields)
    assert got == status, answer
    if status == 400:
        assert answer["error"]["type"] == "invalid_request_error"
        assert len(answer["error"]["message"]) < 300


def test_the_context_is_never_overrun_nor_cut(target):
    """128 tokens: prompts of ids of every length around it, with the counts in the message."""
    room = [(126, 2, 200), (127, 1, 200), (127, 2, 400), (128, 1, 400), (129, 1, 400)]
    score = {"echo": True, "logprobs": 0}
    for length, wanted, status in [*room, (128, 0, 200), (129, 0, 400)]:
        fields = {"prompt": [70] * length, "max_tokens": wanted} | ({} if wanted else score)
        got, answer = target.ask(DONE, fields)
        assert got == status, (length, wanted)
        if status == 400:
            assert answer["error"]["code"] == "context_length_exceeded"
            assert all(number in answer["error"]["message"] for number in (str(length), "128"))
    long = "the quick brown fox " * 5000
    message = {"messages": [{"role": "user", "content": long}]}
    for path, fields in (
        (CHAT, message),
        ("/generate", {"prompt": long}),
        (DONE, {"prompt": long}),
    ):
        status, answer = target.ask(path, fields)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    status, answer = target.ask(CHAT, {"messages": [USER], "temperature": 0})
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")  # all that is left, unasked
    assert answer["usage"]["total_tokens"] <= 128


# ---- made-up bodies

NAMES = "prompt messages max_tokens max_new_tokens n stop stream logprobs top_logprobs echo".split()
NAMES += "temperature top_p top_k seed template model role content tools".split()
LEAVES = st.none() | st.booleans() | st.integers(-3, 5) | st.integers() | st.floats()
LEAVES |= st.text(max_size=20)
LEAVES |= st.sampled_from(["chatml", "user", "chatty", "once upon", [USER], [1, 70], 1.0, 0])
KEYS = st.sampled_from(NAMES)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)
SENSIBLE = {
    "max_tokens": st.integers(0, 6),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(0, 50),
    "seed": st.integers(0, 2**64),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3),
    "n": st.integers(0, 4),
    "logprobs": st.integers(0, 22),
    "echo": st.booleans(),
    "stream": st.booleans(),
}
PROMPTS = {"prompt": st.sampled_from(["once", [1, 70], ["a", "b"], "why " * 5])}
BODY = st.dictionaries(KEYS, VALUES, max_size=6) | st.fixed_dictionaries(PROMPTS, optional=SENSIBLE)
MANY = {"max_examples": 500, "deadline": None, "derandomize": True, "database": None}


@settings(suppress_health_check=list(HealthCheck), **MANY)
@given(st.sampled_from(list(FIELDS)), BODY)
def test_made_up_bodies(target, path, body):
    response = target.raw(target.post(path, json.dumps(body).encode()))
    assert response.status in (200, 400, 404), response.body
    if response.headers["content-type"] == "application/json":
        assert isinstance(response.json, dict)


# ---- clients that are slow, or never come to the point


@pytest.fixture(scope="module")
def impatient(tmp_path_factory, tiny_tokenizer):
    """A server of short deadlines and few places, on a model that can write for long."""
    place = tmp_path_factory.mktemp("served")
    long = make_model(place / "long", tiny_tokenizer, sequence_length=2048)
    patches = {"READ_SECONDS": 3, "SEND_SECONDS": 0.5, "MAX_CONNECTIONS": 64}
    one = Served(place / "log", long, patches).ready()
    yield one
    assert "Traceback" not in one.text
    one.kill()


def test_sixty_slow_clients(impatient):
    """Silent, half a head, half a body, a byte at a time: others are served, these cut off."""
    head, post = impatient.head("GET /health HTTP/1.1"), impatient.post(CHAT, ASK)
    with ExitStack() as stack:
        parts = [b"", b"GET /hea", head[:-2], post[:-5], post.partition(b"{")[0]] * 12
        slow = [stack.enter_context(impatient.connect(data)) for data in parts]
        for _ in range(4):
            for number, sock in enumerate(slow[1::5]):
                sock.sendall(b"X"[: number % 2])
            assert impatient.get("/health").status == 200
        assert impatient.metric("connections") >= 60
        answers = [parse(read_all(sock)) for sock in slow]
    assert [answer and answer.status for answer in answers] == [None, 408, 408, 408, 408] * 12
    assert impatient.get("/health").status == 200


def test_too_many_connections(impatient):
    with ExitStack() as stack:
        for _ in range(64):
            stack.enter_context(impatient.connect())
        refused = impatient.get("/health")
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        ask = impatient.head("GET /health HTTP/1.1")
        more = [stack.enter_context(impatient.connect(ask)) for _ in range(40)]
        assert {parse(read_all(sock)).status for sock in more} <= {200, 503}
    assert impatient.get("/health").status == 200


def test_who_hangs_up_early(impatient):
    post = impatient.post(CHAT, ASK)
    for data in (b"", b"G", post[:60], post[:-1]):
        impatient.connect(data).close()
    impatient.connect(post).close()
    assert impatient.get("/health").status == 200


def test_who_never_reads(impatient):
    """Eight rows of 1,500 tokens with their alternatives are more than all buffers take in."""
    fields = {"prompt": [[1, 70]] * 8, "max_tokens": 1500, "logprobs": 20, "stream": True}
    before = impatient.metric('tokens_total{kind="new"}')
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", impatient.port))
        sock.sendall(impatient.post(DONE, fields | {"temperature": 0}))
        impatient.until(lambda: "499" in impatient.text.rpartition(DONE)[2])
    impatient.until(lambda: impatient.metric("batch_size") == 0)  # from the scheduler's next turn
    assert impatient.metric('tokens_total{kind="new"}') - before < 12000


# ---- whether a client is gone


@pytest.fixture
def pair():
    handler = Handler.__new__(Handler)  # as after it has read its request
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        handler.connection, _ = listener.accept()
    with handler.connection, client:
        yield handler, client


def wait_until(ready):
    end = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_client_that_closes_its_half_is_gone(pair):
    handler, client = pair
    assert not handler.disconnected()
    client.sendall(b"and another thing")
    assert not handler.disconnected()
    client.shutdown(socket.SHUT_WR)  # a client that is through with sending counts as gone
    wait_until(handler.disconnected)
    handler.connection.close()
    assert handler.disconnected()


def test_open_to_others_only_with_a_key():
    with pytest.raises(UserError, match=r"host=0\.0\.0\.0 is open to others.*API key"):
        Server(ServerConfig(model_path="x", host="0.0.0.0", port=0), "")
    with Server(ServerConfig(model_path="x", host="localhost", port=0), "") as one:
        assert one.server_address[1] > 0


def test_no_request_leaves_a_file_or_a_socket_open(target):
    folder = f"/proc/{target.ranks[0].pid}/fd"
    if not os.path.isdir(folder):
        pytest.skip("no /proc here")
    wait_until(lambda: target.metric("connections") == 1)
    before = len(os.listdir(folder))
    for path in ["/", "/health", "/nope"] * 20:
        target.get(path)
    wait_until(lambda: len(os.listdir(folder)) <= before)
