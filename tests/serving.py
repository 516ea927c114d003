"""Servers as processes (tests/runs.py) on a tiny model, and a client that hides nothing."""

import json
import re
import socket
import sys
from dataclasses import replace
from pathlib import Path

import torch

import server
from lib.config import run
from model import Llama, ModelConfig, save_model
from tests.runs import Run

# initializer_range: lively, for near-ties between tokens would test rounding, not us
SIZES = {"n_layer": 2, "d_model": 32, "n_head": 4, "num_key_value_heads": 2, "d_ff": 64}
SHAPE = ModelConfig(**SIZES, vocab_size=384, sequence_length=128, initializer_range=0.3)


def make_model(folder, tokenizer, template=None, **shape):
    """Writes a model of random weights. Returns `folder`."""
    torch.manual_seed(0)
    Path(folder).mkdir(parents=True)
    cfg = replace(SHAPE, **shape)
    save_model(Llama(cfg).eval(), folder)
    tokenizer.save(folder, cfg.sequence_length, template)
    return folder


def serving(argv, patches):
    """`python server.py ARGV`, in which constants such as READ_SECONDS have other values."""
    sys.argv = ["server.py", *argv]
    for name, value in dict(patches).items():
        setattr(server, name, value)
    run(server.main, server.ServerConfig, server.__doc__)


class Served(Run):
    """A server on a free port; `ask` and its like are its clients."""

    def __init__(self, log, folder, patches=(), **knobs):
        knobs = {"model_path": folder, "port": 0} | knobs
        super().__init__(log, serving, ([f"--{k}={v}" for k, v in knobs.items()], patches))

    def ready(self):
        self.until(lambda: re.search(r"^http://.*\n", self.text, flags=re.M))
        self.port = int(re.search(r"^http://\S+:(\d+)  ", self.text, flags=re.M)[1])
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def connect(self, data=b"", timeout=60):
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=timeout)
        sock.sendall(data)
        return sock

    def raw(self, data):
        """Sends bytes as they are; returns all that comes back, parsed as one response, or None."""
        with self.connect(data) as sock:
            return parse(read_all(sock))

    def head(self, line, *headers):
        """A request's head as bytes, with a Host."""
        lines = [line, f"Host: 127.0.0.1:{self.port}", *headers]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def post(self, path, body, *headers):
        """A whole POST as bytes; `body` is bytes, or fields for JSON."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        length = f"Content-Length: {len(body)}"
        headers = "Content-Type: application/json", length, *headers
        return self.head(f"POST {path} HTTP/1.1", *headers) + body

    def get(self, path, *headers):
        return self.raw(self.head(f"GET {path} HTTP/1.1", *headers))

    def ask(self, path, fields, *headers):
        """Posts fields; returns (status, fields of the answer)."""
        response = self.raw(self.post(path, fields, *headers))
        return response.status, response.json

    def stream(self, path, fields):
        """Posts fields with stream=true; returns the events, parsed; the last must be [DONE]."""
        response = self.raw(self.post(path, fields | {"stream": True}))
        assert response.status == 200, response.body
        assert response.headers["content-type"].startswith("text/event-stream")
        *events, done, nothing = response.body.decode().split("\n\n")
        assert (done, nothing) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def metric(self, name):
        """The value of a line of /metrics, by its beginning."""
        text = self.get("/metrics").body.decode()
        return float(re.search(rf"^mini_llm_{re.escape(name)} (\S+)$", text, flags=re.M)[1])


def read_all(sock):
    """Reads until the other side closes; a reset raises."""
    parts = []
    while data := sock.recv(1 << 16):
        parts.append(data)
    return b"".join(parts)


class Response:
    def __init__(self, data):
        head, _, self.body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(re.fullmatch(r"HTTP/1\.1 (\d{3}) [A-Za-z -]+", first)[1])
        pairs = [line.split(": ", 1) for line in lines]
        self.headers = {name.lower(): value for name, value in pairs}

    @property
    def json(self):
        return json.loads(self.body)


def parse(data):
    return Response(data) if data else None
