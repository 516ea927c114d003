"""HTTP/1.1 over a socket that is not trusted: one request in, one response out, under deadlines.

What standard clients send is taken and everything else refused, with no leniency that a proxy in between
could understand differently (RFC 9112): request smuggling lives on two readers of one message. Python's own
http.server is lenient there, waits for ever, and echoes what it was sent.
"""

import re
import select
import socket
import time
from contextlib import suppress
from http import HTTPStatus
from typing import NamedTuple

LINE, HEAD, HEADERS = (
    8 << 10,
    32 << 10,
    100,
)  # bytes of the first line, of all the lines; how many headers
BODY = 1 << 20  # bytes
READ_SECONDS = 10  # for the whole request, however it trickles in
SEND_SECONDS = 10  # for each piece of an answer
LINGER_SECONDS = 1  # for the client to read the answer to a request that was not read to its end

REQUEST_LINE = re.compile(rb"([A-Z]{1,20}) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
LONE = re.compile(rb"(?<!\r)\n|\r[^\n]")
ONCE = {  # headers that must not stand twice: two readers may heed different ones
    "host",
    "origin",
    "authorization",
    "expect",
    "content-type",
    "content-length",
    "content-encoding",
    "transfer-encoding",
}


class Refused(Exception):
    """A request that is not one, or not one for us: the HTTP status, and a line that says why."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class Gone(Exception):
    """The client hung up before its request was whole, or never sent a byte."""


class Head(NamedTuple):
    """A request's first line and headers; names in lower case, values as latin-1 text."""

    method: str
    path: str
    headers: dict[str, str]


class Wire:
    """A connection."""

    def __init__(self, sock):
        # or each token waits for the last one's ACK
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock, self.buffer, self.begun, self.discarded = sock, bytearray(), False, 0
        self.deadline = time.monotonic() + READ_SECONDS

    def _more(self):
        left = self.deadline - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            self.sock.settimeout(left)
            data = self.sock.recv(1 << 16)
        except TimeoutError:
            if not self.begun:
                raise Gone from None  # browsers open connections in advance
            raise Refused(
                408, f"the request took longer than {READ_SECONDS} seconds to arrive"
            ) from None
        if not data:
            raise Gone
        self.begun = True
        self.buffer += data

    def read_head(self):
        """Returns the request's Head. Raises Refused or Gone."""
        seen, end = 0, -1
        while end < 0:
            self._more()
            end = self.buffer.find(b"\r\n\r\n", seen)
            self._check_head(seen, len(self.buffer) if end < 0 else end)
            seen = max(0, len(self.buffer) - 3)
        first, *lines = bytes(self.buffer[:end]).split(b"\r\n")
        del self.buffer[: end + 4]
        return Head(*request_line(first), headers(lines))

    def _check_head(self, seen, end):
        """Refuses what cannot become a request, or is too long for one; bytes `seen` to `end` are new."""
        if not self.buffer[:1].isupper():
            raise Refused(400, "not HTTP; if this is HTTPS: the server speaks plain HTTP")
        if LONE.search(self.buffer, seen, end):
            raise Refused(400, "lines must end with CR LF")
        line = self.buffer.find(b"\r\n")
        if (end if line < 0 else line) > LINE:
            raise Refused(414, f"a first line of more than {LINE} bytes")
        if end > HEAD:
            raise Refused(431, f"headers of more than {HEAD} bytes")

    def read_body(self, headers):
        """Returns the bytes of the body. Raises Refused or Gone."""
        length = body_length(headers)
        if headers.get("expect"):
            if headers["expect"].lower() != "100-continue":
                raise Refused(417, "the only expectation understood is 100-continue")
            self.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        while len(self.buffer) < length:
            self._more()
        body = bytes(self.buffer[:length])
        self.buffer.clear()  # it would be held as long as the answer takes
        return body

    def send(self, status, headers, body=b""):
        """Sends a response; of a stream the head, which `send_more` continues."""
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines += ["Connection: close", "", ""]
        self.send_more("\r\n".join(lines).encode("latin-1") + body)

    def send_more(self, data):
        self.sock.settimeout(SEND_SECONDS)  # sendall counts it over all of `data`
        self.sock.sendall(data)

    def gone(self):
        """Whether the client has hung up, or closed its sending half. What else it sends is thrown away."""
        try:
            while self.discarded <= BODY and readable(self.sock):
                data = self.sock.recv(1 << 16)
                self.discarded += len(data)
                if not data:
                    return True
            return self.discarded > BODY
        except (OSError, ValueError):  # closed, by the other side or by ours
            return True

    def close(self):
        """Closes so that the answer arrives: a plain close with bytes unread would reset the connection."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
            end = time.monotonic() + LINGER_SECONDS
            while (left := end - time.monotonic()) > 0:
                self.sock.settimeout(left)
                if not self.sock.recv(1 << 16):
                    break
        self.sock.close()


def readable(sock):
    """Whether `recv` would return at once. By poll where there is one: select knows 1,024 descriptors."""
    if not hasattr(select, "poll"):
        return bool(select.select([sock], [], [], 0)[0])
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def request_line(line):
    """Returns (method, path) of a request's first line. A query is dropped: nothing here takes one."""
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise Refused(400, "the first line is not 'METHOD /path HTTP/1.1'")
    method, target, *version = (part.decode() for part in match.groups())
    if version not in (["1", "1"], ["1", "0"]):
        raise Refused(505, "the server speaks HTTP/1.1")
    if not target.startswith("/"):
        raise Refused(400, "the path must begin with /")
    return method, target.partition("?")[0]


def headers(lines):
    """Returns {name in lower case: value}, repeated ones joined by commas; Refused for a malformed one."""
    if len(lines) > HEADERS:
        raise Refused(431, f"more than {HEADERS} headers")
    found = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not NAME.fullmatch(name) or CONTROL.search(value):
            raise Refused(400, "a header is not 'Name: value' on one line")
        name, value = name.decode().lower(), value.strip(b" \t").decode("latin-1")
        if name in found and name in ONCE:
            raise Refused(400, f"{name} stands twice")
        found[name] = f"{found[name]}, {value}" if name in found else value
    return found


def body_length(headers):
    """Returns Content-Length; Refused unless the body is plain, of known length and not too long."""
    if "transfer-encoding" in headers:
        raise Refused(501, "Transfer-Encoding is not supported; send Content-Length")
    if headers.get("content-encoding", "identity") != "identity":
        raise Refused(415, "Content-Encoding is not supported")
    length = headers.get("content-length")
    if length is None:
        raise Refused(411, "Content-Length is missing")
    if not re.fullmatch("[0-9]+", length):
        raise Refused(400, "Content-Length must be a number of bytes")
    if len(length) > 10 or int(length) > BODY:
        raise Refused(413, f"a body of more than {BODY} bytes")
    return int(length)
