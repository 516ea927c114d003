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
from tests import ROOT
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


# {"heads": {status: [request without a body, ...]}, "lengths": {status: [headers of a POST with the
# body GOOD, {L} bytes, ...]}}
TABLES = json.loads((ROOT / "tests" / "hostile_heads.json").read_text(encoding="utf-8"))
HEADS = [(text, int(status)) for status, texts in TABLES["heads"].items() for text in texts]
HEADS += [(f"GET /v1/models/{'%' * 8000} HTTP/1.1|HOST", 404)]
HEADS += [(f"GET|HOST|X: {' ' * 30_000}\x01", 400)]
HEADS += [(f"GET /{'a' * 40000} HTTP/1.1|HOST", 414), (f"{'G' * 40000} / HTTP/1.1|HOST", 414)]
HEADS += [(f"GET|HOST|X: {'a' * 40000}", 431), ("GET|HOST" + f"|X: {'a' * 900}" * 60, 431)]
HEADS += [("GET|HOST|" + "|".join(f"X-{i}: a" for i in range(4000)), 431)]


@pytest.mark.parametrize(("text", "status"), HEADS, ids=lambda value: repr(value)[:60])
def test_every_head_has_its_status(target, text, status):
    response = target.raw(head_of(target, text))
    assert response.status == status, response.body
    assert response.headers["connection"] == "close"
    names = {name for name in response.headers if name.startswith("access-control")}
    assert not names | ({"server"} & response.headers.keys())
    assert status != 405 or response.headers["allow"]
    if status >= 400 and not text.startswith("HEAD"):
        assert set(response.json["error"]) == {"message", "type", "param", "code"}


def test_head_has_no_body(target):
    response = target.raw(target.head("HEAD /health HTTP/1.1"))
    assert (response.status, response.body) == (200, b"")
    assert int(response.headers["content-length"]) == len(target.get("/health").body)


BYTES = [
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), 400),  # a TLS hello
    (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\nHost: localhost\n\n", 400),  # lines that end in LF
    (bytes(range(256)), 400),
    (b"GET /" + b"a" * 40000, 414),  # a first line without end
    (b"GET / HTTP/1.1\r\n" + b"X: aaaaaaaaaaaaaaaa\r\n" * 2000, 431),  # headers without end
]


@pytest.mark.parametrize(("data", "status"), BYTES, ids=lambda value: repr(value)[:20])
def test_what_is_no_request_is_told_at_once(target, data, status):
    assert target.raw(data).status == status  # and nothing more comes


# ---- the body's length and kind


@pytest.mark.parametrize(
    ("headers", "status"),
    [(text, int(status)) for status, texts in TABLES["lengths"].items() for text in texts],
)
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
    assert target.raw(head + b"0\r\n\r\n" + second.encode()).status == 400
    with target.connect(chunked(target, GOOD[:5], GOOD[5:]) + second.encode()) as sock:
        text = read_all(sock)
    assert (text.count(b"HTTP/1.1 "), parse(text).status) == (1, 200)
    assert target.text.count("GET /metrics") == before


def chunked(target, *parts, head=""):
    """A POST whose body comes in chunks (RFC 9112 7.1), the last of size 0 added."""
    head = head_of(target, f"POST {CHAT} HTTP/1.1|HOST|JSON|Transfer-Encoding: Chunked{head}")
    return head + b"".join(b"%x\r\n%b\r\n" % (len(p), p.encode()) for p in (*parts, ""))


def test_a_body_in_chunks(target):
    for parts in ([GOOD], GOOD, [GOOD[:1], " " * 70_000, GOOD[1:]]):
        assert target.raw(chunked(target, *parts)).status == 200
    whole = chunked(target, GOOD)
    size = b"%x\r\n" % len(GOOD)
    head, rest = whole.split(b"\r\n\r\n" + size)  # the port in the head may end in these digits
    head += b"\r\n\r\n"
    longer = size.replace(b"\r", b' ; name="a b";x\r')
    for same in (size, size.upper(), b"000" + size, longer):
        assert target.raw(head + same + rest).status == 200
    assert target.raw(whole[:-2] + b"Trailer: a\r\n\r\n").status == 200
    asked = chunked(target, GOOD, head="|Expect: 100-continue")
    with target.connect(asked) as sock:
        assert read_all(sock).startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 ")
    wrongs = [b"-5\r\n", b"0x5\r\n", b"+5\r\n", b"\r\n", b"5 5\r\n", b"g\r\n", b"5\n", b"5\r"]
    wrongs += [b"f" * 9 + b"\r\n", b"5;" + b"x" * 2000 + b"\r\n", b"%x\r\n" % (len(GOOD) - 1)]
    for wrong in wrongs:
        assert target.raw(head + wrong + rest).status == 400, wrong
    assert target.raw(head + b"ffffffff\r\n" + rest).status == 413
    assert target.raw(chunked(target, "x" * 600_000, "x" * 600_000)).status == 413
    assert target.raw(chunked(target, GOOD, GOOD)).status == 400  # of both in one


def test_a_large_body_sent_blindly_is_answered(target):
    head = target.head(f"POST {CHAT} HTTP/1.1", JSON, "Content-Length: 4000000")
    with target.connect(head) as sock:
        with suppress(OSError):  # it may notice early, and has its answer all the same
            sock.sendall(b"x" * 4_000_000)
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 413")


# ---- bodies

BODIES = [
    *(b"", b"hello", b"[]", b'"prompt"', b"7", b"null", b"{}", b'{"prompt": "\xff"}'),
    *('{"prompt": "a"}'.encode("utf-16"), b'\xef\xbb\xbf{"prompt": "a"}'),
    *(GOOD[:20].encode(), GOOD.encode() + b"{}", b"{'prompt': 'a'}", b'{"prompt": "a",}'),
    *(b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "temperature": -Infinity}'),
    b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "a", "temperature": ' + b"7" * 4000 + b"}",
    b'{"prompt": "a", "seed": ' + b"7" * 5000 + b"}",
    *(b'{"prompt": ' + b"[" * count + b"]" * count + b"}" for count in (900, 100_000)),
    b'{"messages": [' + b'{"content":' * 900 + b"1" + b"}" * 900 + b"]}",
    *(
        b"[" * 100_000,
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "seed": \0}',
        b'{"prompt": "a\nb"}',
    ),
    b'{"prompt": "a", "' + b"temperatur" * 10_000 + b'": 1}',
]


@pytest.mark.parametrize("path", ["/generate", DONE, CHAT, "/tokenize", "/detokenize"])
def test_a_body_that_is_no_request_is_a_400(target, path):
    for body in BODIES:
        response = target.raw(target.post(path, body))
        assert response.status == 400, (body[:60], response.body)
        assert len(response.json["error"]["message"]) < 300, body[:60]


USER = {"role": "user", "content": "why"}
FIELDS = {  # of a request that is right
    "/generate": {"prompt": "a", "max_new_tokens": 2},
    DONE: {"prompt": "a", "max_tokens": 2},
    CHAT: ASK,
    "/tokenize": {},
    "/detokenize": {},
}
# {status: [(route, fields that make it so), ...]}
CASES = json.loads((ROOT / "tests" / "hostile_fields.json").read_text(encoding="utf-8"))
LONG = [("/generate", {"stop": "x" * 257}), ("/generate", {"x" * 999: 1})]
LONG += [(CHAT, {"messages": [USER] * 257}), (DONE, {"prompt": ["a"] * 65})]
LONG += [(DONE, {"prompt": [[1]] * 65}), (DONE, {"prompt": ["a"] * 60, "n": 60})]
CASES["400"] += LONG
CASES["200"] += [(DONE, {"stop": ["x" * 256] * 8})]


@pytest.mark.parametrize(
    ("path", "fields", "status"),
    [(*case, int(status)) for status, cases in CASES.items() for case in cases],
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
        *((path, {"prompt": long}) for path in ("/generate", DONE)),
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
SENSIBLE = {"max_tokens": st.integers(0, 6), "temperature": st.floats(0, 2)}
SENSIBLE |= {"top_p": st.floats(0, 1), "top_k": st.integers(0, 50), "seed": st.integers(0, 2**64)}
SENSIBLE |= {"stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3)}
SENSIBLE |= {"n": st.integers(0, 4), "logprobs": st.integers(0, 22)}
SENSIBLE |= {"echo": st.booleans(), "stream": st.booleans()}
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
    patches = {"READ_SECONDS": 5, "SEND_SECONDS": 0.5, "MAX_CONNECTIONS": 64}
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
        impatient.until(lambda: impatient.metric("connections") >= 60)
        for sock in slow[1::5]:
            sock.sendall(b"X")
        assert impatient.get("/health").status == 200
        answers = [parse(read_all(sock)) for sock in slow]
    assert [answer and answer.status for answer in answers] == [None, 408, 408, 408, 408] * 12
    assert impatient.get("/health").status == 200


def test_too_many_connections(impatient):
    with ExitStack() as stack:
        for _ in range(64):
            stack.enter_context(impatient.connect())
        impatient.until(lambda: impatient.get("/v1/models").status == 503)
        assert impatient.get("/v1/models").headers["retry-after"] == "1"
        assert impatient.get("/health").status == 200  # a supervisor must see that it lives
        ask = impatient.head("GET /v1/models HTTP/1.1")
        more = [stack.enter_context(impatient.connect(ask)) for _ in range(40)]
        assert {parse(read_all(sock)).status for sock in more} <= {200, 503}
    impatient.until(lambda: impatient.get("/v1/models").status == 200)


def test_five_hundred_slow_clients(impatient):
    """/health answers; so do all others once these are cut off."""
    with ExitStack() as stack:
        slow = [stack.enter_context(impatient.connect(b"GET /hea")) for _ in range(450)]
        assert {impatient.get("/health").status for _ in range(5)} == {200}
        assert {parse(read_all(sock)).status for sock in slow} == {408}
    impatient.until(lambda: impatient.get("/v1/models").status == 200)


def test_who_hangs_up_early(impatient):
    post = impatient.post(CHAT, ASK)
    for data in (b"", b"G", post[:60], post[:-1], post):
        impatient.connect(data).close()
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
