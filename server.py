"""Serves a model over HTTP: OpenAI's routes, /generate, and a chat page.

    python server.py --model_path=checkpoints/sft --host=127.0.0.1 --port=8000

For its owner's machine and network, not for the open internet: no TLS, no accounts; put a proxy in
front for that. Any address other than this machine's own needs a key, from the environment variable
MINI_LLM_API_KEY or a file (--api_key_file), which clients send as "Authorization: Bearer KEY".
"""

import base64
import hashlib
import hmac
import io
import itertools
import json
import os
import queue
import re
import secrets
import select
import signal
import socket
import socketserver
import threading
import time
import traceback
from collections import Counter, namedtuple
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import unquote

from lib import config
from lib.config import PositiveFloat, PositiveInt, Range, UserError
from lib.tokenizer import ROLES, TEMPLATES, render, stop_ids
from lib.tokenizer_json import jinja
from model import model_folder
from sample import Engine, Reply, Request, Sampling, open_model


class ApiError(Exception):
    """A request that is answered with an error: HTTP status, message, and the field it is about."""

    def __init__(self, status, message, param=None, code=None, headers=()):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers)


def require(condition, *error, **more):
    """Raises an ApiError of these arguments where a condition does not hold."""
    if not condition:
        raise ApiError(*error, **more)


def log_line(text):
    """Writes to stderr in one piece, or drops the text where nobody reads a full pipe."""
    with suppress(OSError, ValueError):
        if os.name == "nt" or select.select([], [2], [], 0)[1]:  # Windows: for sockets only
            os.write(2, (text + "\n").encode("utf-8", "replace"))


# ---- The fields of a request: a dataclass for each route, whose annotations are the checks. Fields
# that would change the answer and are not supported are refused, never ignored.

IGNORED = {"user", "metadata", "store", "service_tier", "parallel_tool_calls"}  # of no effect here
IGNORED |= {"safety_identifier", "prompt_cache_key"}
# Fields that are not supported, and the values that change nothing: some clients send these.
NEUTRAL = {"tools": ([],), "tool_choice": ("none", "auto"), "response_format": ({"type": "text"},)}
NEUTRAL |= {"frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},)}
NEUTRAL |= {"best_of": (1,), "suffix": ("",)}


@dataclass(frozen=True, kw_only=True)
class GenerationFields(Sampling):
    model: str | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False


@dataclass(frozen=True, kw_only=True)
class GenerateFields(GenerationFields):
    prompt: str
    max_new_tokens: PositiveInt | None = None
    template: str | None = None


@dataclass(frozen=True, kw_only=True)
class ChatFields(GenerationFields):
    messages: list
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    n: Annotated[int, Range(1, 64)] = 1
    logprobs: bool = False
    top_logprobs: Annotated[int, Range(0, 20)] | None = None
    stream_options: dict | None = None


@dataclass(frozen=True, kw_only=True)
class CompletionFields(GenerationFields):
    prompt: list  # of texts, or of lists of ids
    max_tokens: Annotated[int, Range(0)] = 16  # as OpenAI has it
    n: Annotated[int, Range(1, 64)] = 1
    echo: bool = False
    logprobs: Annotated[int, Range(0, 20)] | None = None
    stream_options: dict | None = None


@dataclass(frozen=True, kw_only=True)
class TokenFields:
    model: str | None = None
    prompt: str | None = None
    messages: list | None = None
    add_special_tokens: bool = False
    tokens: list | None = None


def text_message(message, number):
    """Returns a message with its content as one text; ApiError unless it is a text of a role."""
    message = message if isinstance(message, dict) else {}
    role, parts = message.get("role"), message.get("content")
    parts = parts if isinstance(parts, list) else [{"type": "text", "text": parts}]
    texts = [p.get("text") for p in parts if isinstance(p, dict) and p.get("type") == "text"]
    right = role in ROLES and len(texts) == len(parts) and all(isinstance(t, str) for t in texts)
    problem = f"message {number} must have a role ({', '.join(ROLES)}) and text as its content"
    require(right, 400, problem, "messages")
    return {"role": role, "content": "".join(texts)}


# ---- The answers: OpenAI's shapes and /generate, as JSON values; no HTTP here.


class Api:
    """The routes over one model. `seconds`: a request's longest time, in the queue and at work.

    A POST route takes the body as a dict, and a function that says whether the client has hung up;
    it returns the answer as a dict, or a generator of dicts for a stream. It raises ApiError.
    """

    def __init__(self, scheduler, tokenizer, name, seconds):
        self.scheduler, self.tokenizer, self.name = scheduler, tokenizer, name
        self.seconds, self.started = seconds, int(time.time())
        self.context, self.template = scheduler.engine.limit, tokenizer.template
        self.ends = stop_ids(tokenizer, tokenizer.template)

    def card(self):
        """Returns the model's entry: OpenAI's four fields, and the page's needs."""
        settings = {"max_tokens": {"min": 1, "max": self.context - 1, "default": None}}
        for name, field in config.options_of(Sampling).items():
            low = field.limits.low + 0.01 * field.limits.open_low  # for a slider
            settings[name] = {"min": low, "max": field.limits.high, "default": field.default}
        card = {"id": self.name, "object": "model", "created": self.started, "owned_by": "mini-llm"}
        own = {"context_length": self.context, "template": self.template, "settings": settings}
        return card | own

    def tokenizer_info(self):
        """Returns what lm-eval asks about a tokenizer that it can't load itself."""
        ids = {role: getattr(self.tokenizer, f"{role}_id") for role in ("bos", "eos", "pad")}
        info = {f"{role}_token": self.tokenizer.pieces[id] for role, id in ids.items()}
        return info | {"chat_template": self.template and jinja(TEMPLATES[self.template])}

    def tokenize(self, body, disconnected):
        """POST /tokenize: the ids of `prompt`, or of `messages` as in a chat request."""
        fields = self.read(TokenFields, body)
        if fields.messages is None:
            ids = self.continued(fields.prompt)[not fields.add_special_tokens :]  # with BOS or not
        else:
            ids = self.conversation(fields.messages)
        return {"tokens": ids, "count": len(ids), "max_model_len": self.context}

    def detokenize(self, body, disconnected):
        """POST /detokenize: the text of `tokens`."""
        ids = self.checked_ids(self.read(TokenFields, body).tokens, "tokens")
        return {"prompt": self.tokenizer.decode(ids)}

    # ---- what is asked

    def read(self, cls, body):
        """Returns the `cls` that a body makes; an error names the first field that is wrong."""
        values, fields = {}, config.options_of(cls)
        for name, value in body.items():
            if name in fields and value is not None:
                value = [value] if name == "stop" and isinstance(value, str) else value
                values[name] = config.accept(name, value, fields[name], "request")
            elif name not in IGNORED and value is not None:
                neutral = value in NEUTRAL.get(name, ()) and not isinstance(value, bool)
                message = f"{name:.60} is not supported here"
                require(neutral, 400, message, name[:60], "unsupported_parameter")
        for name, field in fields.items():
            given = name in values or field.default is not config.NO_DEFAULT
            require(given, 400, f"{name} is missing", name, "missing_required_parameter")
        name = values.get("model", self.name)  # another's answer would be a silent substitute
        message = f"the model {name[:60]!r} is not served here, only {self.name!r} is"
        require(name == self.name, 404, message, "model", "model_not_found")
        return cls(**values)

    def checked_ids(self, ids, param):
        size = self.tokenizer.vocab_size
        right = ids is not None and all(type(id) is int and 0 <= id < size for id in ids)
        require(right, 400, f"{param} must be a list of token ids, each in 0..{size - 1}", param)
        return ids

    def continued(self, text):
        """Returns the ids of a text to continue: BOS and its own."""
        require(isinstance(text, str), 400, "prompt must be a string", "prompt")
        return [self.tokenizer.bos_id, *self.tokenizer.encode(text)]

    def conversation(self, messages):
        """Returns the ids of a conversation, up to where the answer begins.

        A model without a template only continues text: BOS, then all contents in one.
        """
        require(1 <= len(messages) <= 256, 400, "messages must be 1 to 256", "messages")
        messages = list(map(text_message, messages, itertools.count(1)))
        text = "".join(message["content"] for message in messages)
        # an empty system prompt is none, and an empty answer no reason to end the conversation
        messages = [m for m in messages if m["content"].strip() or m["role"] == "user"]
        right = messages and messages[-1]["role"] == "user"
        require(right, 400, "the last message must be the user's", "messages")
        if self.template is None:
            return self.continued(text)
        return render(self.tokenizer, messages, self.template, add_generation_prompt=True)[0]

    def ask(self, fields, disconnected, prompts, wanted, param, n=1, trim=False, **row):
        """Submits a Call of each prompt n times. `wanted`: the longest answer, named `param`.

        Seeds count up from the one asked for, or from a fresh one. `row`: arguments of Row.
        """
        fair = len(fields.stop) <= 8 and all(1 <= len(text) <= 256 for text in fields.stop)
        require(fair, 400, "stop: up to 8 texts, each of 1 to 256 characters", "stop")
        count, most = len(prompts) * n, self.scheduler.room
        require(count <= most, 400, f"{count} rows in one request; the queue holds {most}", "n")
        first = secrets.randbits(32) if fields.seed is None else fields.seed
        call = Call(disconnected, time.monotonic() + self.seconds, fields.stream)
        for index in range(count):
            prompt, seed = prompts[index // n], (first + index) % 2**64
            size, room = len(prompt), self.context - len(prompt)
            longest = room if wanted is None else wanted
            message = f"this model's context is {self.context} tokens; the prompt has {size}, "
            message += f"which leaves {max(0, room)} for an answer: shorten it or lower {param}"
            fits = longest <= room and (room > 0 or wanted == 0)
            require(fits, 400, message, param, "context_length_exceeded")
            sampling = replace(config.narrow(fields, Sampling), seed=seed)
            reply = Reply(self.tokenizer, fields.stop, trim)
            call.rows.append(Row(call, reply, prompt, longest, sampling, **row))
        self.scheduler.submit(call)
        return call

    # ---- what is answered

    def chat(self, body, disconnected):
        """POST /v1/chat/completions: the answer to `messages`."""
        fields = self.read(ChatFields, body)
        param = "max_completion_tokens" if fields.max_completion_tokens else "max_tokens"
        wanted, top = getattr(fields, param), fields.top_logprobs
        agree = fields.max_tokens in (None, wanted)
        require(agree, 400, f"{param} is {wanted}, max_tokens {fields.max_tokens}", param)
        meant = fields.logprobs or top is None
        require(meant, 400, "top_logprobs is given, but logprobs is not true", "top_logprobs")

        def choice(piece, row):
            text = ({"role": "assistant"} if piece.first else {}) | {"content": piece.text}
            logprobs = self.chat_logprobs(piece) if fields.logprobs else None
            return {"delta" if fields.stream else "message": text, "logprobs": logprobs}

        asked = {"prompts": [self.conversation(fields.messages)], "wanted": wanted, "param": param}
        asked |= {"trim": self.template is not None, "stop_ids": self.ends}
        asked |= {"top_logprobs": (top or 0) if fields.logprobs else None}
        kind = "chat.completion.chunk" if fields.stream else "chat.completion"
        return self.openai_answer(kind, choice, fields, disconnected, **asked)

    def completions(self, body, disconnected):
        """POST /v1/completions: prompts as text or ids; `echo` with `logprobs` also scores them."""
        prompt = body.get("prompt")
        ids = isinstance(prompt, list) and all(type(id) is int for id in prompt)
        if isinstance(prompt, str) or ids:
            body = body | {"prompt": [prompt]}
        fields = self.read(CompletionFields, body)
        top, echo, wanted = fields.logprobs, fields.echo, fields.max_tokens
        require(not echo or not fields.stream, 400, "echo is not supported with stream", "echo")
        require(wanted or echo, 400, "max_tokens 0 asks for nothing, but with echo", "max_tokens")
        prompts = [
            self.checked_ids(row, "prompt") if isinstance(row, list) else self.continued(row)
            for row in fields.prompt
        ]
        require(all(prompts), 400, "prompt: an empty list of ids; give at least BOS", "prompt")

        def choice(piece, row):
            piece = self.echoed(piece, row) if echo else piece
            logprobs = None if top is None else self.completion_logprobs(piece)
            return {"text": piece.text, "logprobs": logprobs}

        # lm-eval counts on the end of the answer among the tokens
        asked = {"stop_ids" if top is None else "ends": self.ends, "echo": echo}
        asked |= {"top_logprobs": (top or 0) if echo else top, "wanted": wanted}
        asked |= {"prompts": prompts, "param": "max_tokens"}
        return self.openai_answer("text_completion", choice, fields, disconnected, **asked)

    def openai_answer(self, kind, choice, fields, disconnected, **asked):
        """Returns a whole answer, or with `stream` a generator of its chunks, in OpenAI's frame.

        choice(piece, row) returns the fields of a choice that depend on the route.
        """
        counted = (fields.stream_options or {}).get("include_usage") or False
        message = "stream_options.include_usage must be true or false"
        require(type(counted) is bool, 400, message, "stream_options")
        call = self.ask(fields, disconnected, n=fields.n, **asked)
        id = f"{'chatcmpl' if kind.startswith('chat') else 'cmpl'}-{secrets.token_hex(12)}"
        head = {"id": id, "object": kind, "created": int(time.time()), "model": self.name}

        def framed(*pieces):
            choices = []
            for piece in pieces:
                end = {"index": piece.index, "finish_reason": piece.finish}
                choices.append(end | choice(piece, call.rows[piece.index]))
            return head | {"choices": choices}

        def chunks():
            for piece in call.pieces():
                yield framed(piece) | ({"usage": None} if counted else {})
            if counted:  # only the last chunk knows
                yield framed() | {"usage": call.usage()}

        if fields.stream:
            return chunks()
        return framed(*sorted(call.pieces())) | {"usage": call.usage()}  # one Piece a row

    def generate(self, body, disconnected):
        """POST /generate: one prompt, by default in the model's own template."""
        fields = self.read(GenerateFields, body)
        template = None if fields.template == "none" else self.template
        message = f"template {fields.template!r:.60}: this model has {self.template or 'none'!r}"
        right = fields.template in (None, "none", self.template)
        require(right, 400, f"{message}; leave the field out, or say 'none'", "template")
        if template:
            require(fields.prompt.strip(), 400, "prompt: there is nothing to answer", "prompt")
            prompt = self.conversation([{"role": "user", "content": fields.prompt}])
        else:
            prompt = self.continued(fields.prompt)
        limit = fields.max_new_tokens or max(1, min(128, self.context - len(prompt)))
        asked = {"prompts": [prompt], "wanted": limit, "param": "max_new_tokens"}
        asked |= {"trim": template is not None, "stop_ids": self.ends}
        call = self.ask(fields, disconnected, **asked)
        used = {"max_new_tokens": limit, "template": template, "stop": list(fields.stop)}
        used |= asdict(call.rows[0].sampling)

        def answers():
            for piece in call.pieces():
                answer = {"response": piece.text, "finish_reason": piece.finish}
                ended = {"generation_config": used, "usage": call.usage()}
                yield answer | ended if piece.finish else answer

        return answers() if fields.stream else next(answers()) | {"prompt": fields.prompt}

    # ---- log-probabilities

    def chat_logprobs(self, piece):
        def entry(id, logprob):
            spelled = self.tokenizer.spelled(id)
            text = spelled.decode("utf-8", "replace")  # U+FFFD stands for a part of a character
            return {"token": text, "logprob": logprob, "bytes": list(spelled)}

        content = []
        for token in piece.tokens:
            top = [entry(*pair) for pair in token.top]
            content.append(entry(token.id, token.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def completion_logprobs(self, piece):
        def name(id):
            spelled = self.tokenizer.spelled(id)
            text = spelled.decode("utf-8", "replace")
            return "bytes:" + "".join(f"\\x{b:02x}" for b in spelled) if "\ufffd" in text else text

        def alternatives(token):
            return {name(id): logprob for id, logprob in (*token.top, (token.id, token.logprob))}

        return {
            "tokens": [name(token.id) for token in piece.tokens],
            "token_logprobs": [token.logprob for token in piece.tokens],
            "top_logprobs": [None if t.logprob is None else alternatives(t) for t in piece.tokens],
            "text_offset": [token.start for token in piece.tokens],
        }

    def echoed(self, piece, row):
        """Returns a piece with the prompt, and its log-probabilities, in front of it."""
        stream, text, tokens = self.tokenizer.stream(), "", []
        for id, logprob in zip(row.prompt, row.logprobs):
            tokens.append(Token(len(text), id, *logprob))
            text += stream.push(id)
        text += stream.flush()
        tokens += [token._replace(start=token.start + len(text)) for token in piece.tokens]
        return piece._replace(text=text + piece.text, tokens=tokens)


# ---- The scheduler: the one loop that owns the model, and the queue in front of it. A `Call` is
# one client's request, its `Row`s what the engine decodes for it. Rows wait in order of arrival;
# before every step free slots are filled, and whoever went away or ran out of time is dropped. The
# threads that ask hand in a call and read its pieces; they touch neither model nor engine.

PIECE_SECONDS = 0.02  # between two pieces of a row, at least: each takes time from the model
RETRY = {"Retry-After": "1"}
REFUSALS = {  # of a row without a token, by the reason why it ends: arguments of ApiError
    "time": (429, "too many requests are waiting; try again", None, "queue_full", RETRY),
    "shutdown": (503, "the server is stopping", None, "stopping", RETRY),
}

# The newly certain part of a row: text, Tokens, and at its end the finish reason.
Piece = namedtuple("Piece", "index first text tokens finish")
# An id, where in its row's text it begins, its log-probability, [(id, log-probability)] of the top.
Token = namedtuple("Token", "start id logprob top")


class Call:
    """One client's rows. With `stream` their pieces come as they are made, else each row as one.

    `disconnected()`: whether the client has hung up; `deadline` is of time.monotonic().
    """

    def __init__(self, disconnected, deadline, stream=False):
        self.disconnected, self.deadline, self.stream = disconnected, deadline, stream
        self.rows, self.inbox = [], queue.SimpleQueue()

    def pieces(self):
        """Yields Pieces as they come until every row has ended; raises what ended one early."""
        left = len(self.rows)
        while left:
            piece = self.inbox.get()
            if isinstance(piece, Exception):
                raise piece
            left -= piece.finish is not None
            yield piece

    def usage(self):
        prompt = sum({id(row.prompt): len(row.prompt) for row in self.rows}.values())
        new = sum(len(row.ids) for row in self.rows)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


class Row(Request):
    """One row of a call: the engine's Request, and the certain part of its answer, not yet sent.

    `ends`: ids that end the answer and are among its tokens (the engine's `stop_ids` are not).
    """

    def __init__(self, call, reply, *request, ends=(), **more):
        super().__init__(*request, **more)
        self.call, self.index, self.reply, self.ends = call, len(call.rows), reply, ends
        self.tokens, self.text, self.sent_at = [], "", 0.0  # not yet sent

    def take(self, id, limit, logprob):
        """As Request's; also sends the text that is now certain, but not too often."""
        id = super().take(id, limit, logprob)
        if id is None:
            return None
        logprobs = self.logprobs[-1] if self.logprobs else (None, [])
        self.tokens.append(Token(self.reply.shown + len(self.reply.held), id, *logprobs))
        self.text += self.reply.push(id)
        if self.reply.stopped or id in self.ends:
            self.finish = "stop"
        if self.call.stream and not self.finish and time.monotonic() - self.sent_at > PIECE_SECONDS:
            self.send_piece()
        return id

    def send_piece(self):
        """Sends what is new: text and tokens. In the end some may be cut off with their text."""
        whole = self.finish and not self.reply.cut
        tokens = [token for token in self.tokens if whole or token.start < self.reply.shown]
        if self.text or self.finish:
            piece = Piece(self.index, not self.sent_at, self.text, tokens, self.finish)
            self.call.inbox.put(piece)
            self.tokens, self.text, self.sent_at = self.tokens[len(tokens) :], "", time.monotonic()

    def end(self, failure):
        """Sends the last Piece, or an error if the row failed, or was dropped without a token."""
        if self.finish == "error":
            self.call.inbox.put(failure)
        elif self.finish == "disconnected":
            self.call.inbox.put(ConnectionAbortedError())
        elif self.finish in REFUSALS and not self.ids:
            self.call.inbox.put(ApiError(*REFUSALS[self.finish]))
        else:
            self.text += self.reply.push()
            self.send_piece()


class Scheduler:
    """Runs calls on one model, in the thread that calls `run`. `room`: rows that may wait in all.

    `rows` holds all in order of arrival; the first `slots` are running, the others wait.
    """

    def __init__(self, model, slots, room, graphs=False):
        self.slots, self.room, self.engine = slots, room, Engine(model, slots, graphs=graphs)
        if graphs:  # no request waits for a compiler
            self.engine.rehearse(Sampling(), Sampling(temperature=0))
        self.rows, self.changed = [], threading.Condition()  # which guards them
        self.end_time = None  # once the server is to stop: the time after which no row goes on
        self.failure = None  # the newest
        self.prompt_tokens = self.new_tokens = 0

    @property
    def running(self):
        return self.rows[: self.slots]

    def submit(self, call):
        """Puts a call's rows into the queue, all or none; ApiError 429 or 503 if it takes none."""
        with self.changed:
            require(self.end_time is None, *REFUSALS["shutdown"])
            fits = len(self.rows) + len(call.rows) <= self.slots + self.room
            require(fits, *REFUSALS["time"])
            self.rows.extend(call.rows)
            self.changed.notify()

    def close(self, grace):
        """Has `run` return within `grace` seconds. A signal may call it: it takes no lock."""
        self.end_time = time.monotonic() + grace

    def run(self):
        """Works until closed, and what has begun is done."""
        while self.rows or self.end_time is None:
            with self.changed:
                if not self.rows:
                    self.changed.wait(0.1)  # `close` wakes nobody
            try:
                self._drop()
                joining = [row for row in self.running if row not in self.engine.requests]
                self.engine.join(joining)
                self.prompt_tokens += sum(len(row.prompt) for row in joining)
                for ids in self.engine.advance():
                    self.new_tokens += sum(id is not None for id in ids)
            except Exception as problem:  # it ends the rows it concerns, not the server
                self.failure = RuntimeError("the engine failed")
                self.failure.__cause__ = problem
                named = [row for row in self.running if row.finish == "error"]  # by the engine
                for row in named or self.running:
                    row.finish = "error"

    def _drop(self):
        """Lets go of rows that have ended; ends those whose client is gone or whose time is up."""
        rows, now = list(self.rows), time.monotonic()
        gone = {call for call in {row.call for row in rows} if call.disconnected()}
        for row in rows:
            reason = "time" if now > row.call.deadline else None
            if self.end_time is not None and (now > self.end_time or not row.ids):
                reason = "shutdown"
            row.finish = row.finish or ("disconnected" if row.call in gone else reason)
            if row.finish:
                row.end(self.failure)
        with self.changed:
            self.rows = [row for row in self.rows if not row.finish]


# ---- HTTP: who may ask, and where. One request a connection, every byte of it under a deadline.

MAX_CONNECTIONS = 256  # answered at the same time; 64 more are told 503, others wait in the system
MAX_FIRST_LINE, MAX_HEAD, MAX_BODY = 8 << 10, 32 << 10, 1 << 20  # bytes: first line, headers, body
READ_SECONDS = 10  # for the whole request, however it trickles in
SEND_SECONDS = 10  # for each piece of an answer
LINGER_SECONDS = 1  # for the client to read the answer to a request that was not read to its end

REQUEST_LINE = re.compile(r"([A-Z]{1,20}) ([\x21-\x7e]+) HTTP/([0-9]\.[0-9])\r\n")
HEADER_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e\x80-\xff]*)\r\n")
SINGLE_HEADERS = ["host", "origin", "authorization", "expect", "content-type", "content-length"]
SINGLE_HEADERS += ["content-encoding", "transfer-encoding"]  # two readers may heed different ones
JSON_TYPE = re.compile(r'application/json *(; *charset="?utf-8"?)?', flags=re.IGNORECASE)


class DeadlineReader(io.RawIOBase):
    """The bytes of a socket until a moment in time, however slowly they come."""

    def __init__(self, sock, seconds):
        self.sock, self.end, self.any = sock, time.monotonic() + seconds, False

    def readable(self):
        return True

    def readinto(self, buffer):
        left = self.end - time.monotonic()
        if left > 0 and select.select([self.sock], [], [], left)[0]:
            self.any = True
            return self.sock.recv_into(buffer)
        require(not self.any, 408, f"the request took longer than {READ_SECONDS} s to arrive")
        raise TimeoutError


class Handler(BaseHTTPRequestHandler):
    """One request and its answer, counted and logged, whatever they are; then the end.

    http.server alone waits for ever, and takes what two readers of one message may understand
    differently (RFC 9112, request smuggling): folded headers, repeated ones, bare line feeds,
    HTTP/0.9. So the head is read here, line by line, each of which must match a pattern whole.
    """

    protocol_version = request_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each token waits for the last one's ACK
    command, path, route, streaming = "-", "", "other", False

    def setup(self):
        super().setup()
        self.headers, self.allow_origin = {}, {}
        self.rfile = io.BufferedReader(DeadlineReader(self.connection, READ_SECONDS))
        self.server.active.add(self)

    def handle(self):
        start, status = time.monotonic(), 499  # 499: the client hung up, or did not read
        with suppress(OSError):
            status = self.respond()
        if status == 499 and not self.path:
            return  # browsers open connections in advance
        with self.server.lock:
            self.server.requests[self.route, status] += 1
        request = f"{self.client_address[0]} {self.command} {self.path[:80]} {status}"
        log_line(f"{time.strftime('%H:%M:%S')} {request} {time.monotonic() - start:.3f} s")

    def finish(self):
        """Closes so that the answer arrives: with bytes unread the connection would be reset."""
        with suppress(OSError, ApiError):
            self.connection.shutdown(socket.SHUT_WR)
            rest = DeadlineReader(self.connection, LINGER_SECONDS)
            while rest.read(1 << 16):
                pass
        super().finish()
        self.server.active.discard(self)

    # ---- the request

    def read_head(self):
        """Reads the first line and the headers, names in small letters. ApiError or OSError."""
        plain = self.rfile.peek(1)[:1] in b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        require(plain, 400, "not HTTP; if this is HTTPS: the server speaks plain HTTP")
        match = REQUEST_LINE.fullmatch(self.read_line(MAX_FIRST_LINE, 414))
        require(match, 400, "the first line is not 'METHOD /path HTTP/1.1'")
        command, path, version = match.groups()
        require(version in ("1.1", "1.0"), 505, "the server speaks HTTP/1.1")
        require(path.startswith("/"), 400, "the path must begin with /")
        left = MAX_HEAD
        while (line := self.read_line(left, 431)) != "\r\n":
            left -= len(line)
            match = HEADER_LINE.fullmatch(line)
            require(match, 400, "a header is not 'Name: value' on one line that ends in CR LF")
            name = match[1].lower()
            once = name not in self.headers or name not in SINGLE_HEADERS
            require(once, 400, f"{name} stands twice")
            self.headers[name] = match[2].strip(" \t")
            require(len(self.headers) <= 100, 431, "more than 100 headers")
        self.command, self.path = command, path.partition("?")[0]  # no route has a query

    def read_line(self, limit, status):
        line = self.rfile.readline(limit + 1).decode("latin-1")
        require(len(line) <= limit, status, "the first line or the headers are too long")
        if not line.endswith("\n"):
            raise ConnectionAbortedError
        return line

    def read_json(self):
        """Returns the fields of a JSON body of a fair, known length; ApiError for anything else."""
        kind, length = self.headers.get("content-type", ""), self.headers.get("content-length")
        expect = self.headers.get("expect", "").lower()
        require(JSON_TYPE.fullmatch(kind), 415, "send 'Content-Type: application/json' and JSON")
        require("content-encoding" not in self.headers, 415, "Content-Encoding is not supported")
        require("transfer-encoding" not in self.headers, 501, "Transfer-Encoding is not supported")
        require(length is not None, 411, "Content-Length is missing")
        require(re.fullmatch("[0-9]+", length), 400, "Content-Length must be a number of bytes")
        fair = len(length) <= 10 and int(length) <= MAX_BODY
        require(fair, 413, f"a body of more than {MAX_BODY} bytes")
        require(expect in ("", "100-continue"), 417, "only 100-continue can be expected")
        if expect:
            self.handle_expect_100()
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionAbortedError
        fields = config.parse_json(body.decode("utf-8"), "body")
        require(isinstance(fields, dict), 400, 'the body must be a JSON object, {"field": value}')
        return fields

    def disconnected(self):
        """Returns whether the client has hung up; discards what else it sends."""
        with suppress(OSError, ValueError):  # closed, by the other side or by ours
            ready = select.select([self.connection], [], [], 0)[0]
            return bool(ready) and not self.connection.recv(1 << 16)
        return True

    # ---- the gates

    def answer(self):
        """Returns the answer of a route, as `send` takes it."""
        self.read_head()
        free = len(self.server.active) <= MAX_CONNECTIONS
        require(free, 503, "too many connections; try again in a moment", headers=RETRY)
        self.check_host()
        self.check_origin()
        known = unquote(self.path) == f"/v1/models/{self.server.api.name}"
        route = "/v1/models/{model}" if known else self.path
        require(route in ROUTES, 404, f"there is no {self.path[:80]} here", code="not_found")
        self.route, (methods, function) = route, ROUTES[route]
        if self.command == "OPTIONS" and self.allow_origin:
            return ("text/plain", "")  # a preflight
        allowed = self.command in methods.split(", ")
        require(allowed, 405, f"{route} takes {methods}", headers={"Allow": methods})
        if route not in PUBLIC:
            self.check_key()
        if self.command == "POST":
            return function(self.server.api, self.read_json(), self.disconnected)
        length = self.headers.get("content-length", "0")
        empty = length == "0" and "transfer-encoding" not in self.headers
        require(empty, 400, "a GET with a body")
        return function(self.server)

    def check_host(self):
        """A page that rebinds its own name to this address (DNS rebinding) still sends its name."""
        require("host" in self.headers, 400, "the Host header is missing")
        name = host_name(self.headers["host"])
        address = self.server.outside and re.fullmatch(r"[0-9.]+|\[.*\]", name)  # nobody's name
        ours = name in self.server.names or address
        require(ours, 403, "this server does not go by that Host; name it with --allowed_hosts")

    def check_origin(self):
        """Other web pages must not use the browser of somebody who may ask."""
        origin, host = self.headers.get("origin"), self.headers["host"]
        if origin not in (None, f"http://{host}", f"https://{host}"):
            allowed = origin in self.server.cfg.allowed_origins
            require(allowed, 403, "this Origin may not ask; name it with --allowed_origins")
            self.allow_origin = {"Access-Control-Allow-Origin": origin}
            self.allow_origin |= {"Access-Control-Allow-Headers": "authorization, content-type"}

    def check_key(self):
        scheme, _, key = self.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(key.strip().encode("latin-1"), self.server.key.encode())
        right = not self.server.key or (right and scheme.lower() == "bearer")
        message, headers = "send 'Authorization: Bearer KEY'", {"WWW-Authenticate": "Bearer"}
        require(right, 401, f"a wrong API key, or none: {message}", headers=headers)

    # ---- the answer

    def respond(self):
        """Answers the request; returns the status. Raises OSError if there is nobody to answer."""
        try:
            return self.send(200, self.answer())
        except OSError:
            raise
        except ApiError as problem:
            error = problem
        except (UserError, UnicodeDecodeError, RecursionError) as problem:  # of fields and JSON
            error = ApiError(400, str(problem))
        except Exception:  # the client is told a number, the server lives on
            number = secrets.token_hex(4)
            log_line(f"error {number}: {traceback.format_exc().rstrip()}")
            error = ApiError(500, f"internal error {number}: see the server's log", code="internal")
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
        fields = {"message": str(error), "type": kind, "param": error.param, "code": error.code}
        if not self.streaming:
            return self.send(error.status, {"error": fields}, error.headers)
        self.wfile.write(event({"error": fields}))
        return 200

    def send(self, status, answer, headers=()):
        """Sends a dict as JSON, a generator of dicts as server-sent events, or (type, text)."""
        if isinstance(answer, Iterator):
            first = next(answer)  # a failure before the first token still gets a status of its own
            self.send_head(status, {"Content-Type": "text/event-stream; charset=utf-8"})
            self.streaming = True
            for fields in itertools.chain([first], answer):
                self.wfile.write(event(fields))
            self.wfile.write(b"data: [DONE]\n\n")
            return status
        if isinstance(answer, dict):
            answer = "application/json", json.dumps(answer, ensure_ascii=False)
        body = answer[1].encode("utf-8", "replace")
        kind = {"Content-Type": answer[0], "Content-Length": str(len(body))}
        self.send_head(status, kind | dict(headers))
        if self.command != "HEAD":
            self.wfile.write(body)
        return status

    def send_head(self, status, headers):
        self.connection.settimeout(SEND_SECONDS)  # for each write, however slowly it is read
        self.send_response_only(status)
        headers = self.server.headers | self.allow_origin | headers | {"Connection": "close"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def event(fields):
    """Returns a server-sent event, in ASCII: to some clients U+2028 is a line break."""
    return f"data: {json.dumps(fields, separators=(',', ':'))}\n\n".encode()


def host_name(host):
    """Returns the name in a Host header, without the port and in small letters."""
    return re.sub(r":[0-9]{1,5}$", "", host).lower()


# ---- the routes


def health(server):
    return {"status": "ok", "model": server.api.name, "context_length": server.api.context}


def metrics(server):
    """Numbers for Prometheus, in its text format."""
    scheduler, running = server.api.scheduler, len(server.api.scheduler.running)
    with server.lock:
        counts = sorted(server.requests.items())
    values = {f'requests_total{{route="{r}",status="{status}"}}': n for (r, status), n in counts}
    values |= {'tokens_total{kind="prompt"}': scheduler.prompt_tokens}
    values |= {'tokens_total{kind="new"}': scheduler.new_tokens, "batch_size": running}
    values |= {"queue_length": len(scheduler.rows) - running, "connections": len(server.active)}
    text = "".join(f"mini_llm_{name} {value}\n" for name, value in values.items())
    return ("text/plain; version=0.0.4; charset=utf-8", text)


GET = "GET, HEAD"
ROUTES = {  # path: methods, and the function that answers
    "/": (GET, lambda server: ("text/html; charset=utf-8", server.page)),
    "/health": (GET, health),
    "/metrics": (GET, metrics),
    "/tokenizer_info": (GET, lambda server: server.api.tokenizer_info()),
    "/v1/models": (GET, lambda server: {"object": "list", "data": [server.api.card()]}),
    "/v1/models/{model}": (GET, lambda server: server.api.card()),
    "/generate": ("POST", Api.generate),
    "/tokenize": ("POST", Api.tokenize),
    "/detokenize": ("POST", Api.detokenize),
    "/v1/chat/completions": ("POST", Api.chat),
    "/v1/completions": ("POST", Api.completions),
}
PUBLIC = {"/", "/health"}  # without a key: the page holds no secret, and asks for the key itself


# ---- The command

GRACE_SECONDS = 4  # for answers under way when the server is told to stop
PAGE = Path(__file__).with_name("web") / "chat.html"


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Which model to serve, and to whom."""

    model_path: str  # a model folder
    host: str = "127.0.0.1"  # address to listen on; any but this machine's own needs an API key
    port: Annotated[int, Range(0, 65535)] = 8000  # 0 = a free one, which is printed
    api_key_file: str = ""  # file with the key clients must send; or set MINI_LLM_API_KEY
    # names by which clients may call it, beside localhost: box.lan
    allowed_hosts: tuple[str, ...] = ()
    # web pages of others that may ask, as http://localhost:3000
    allowed_origins: tuple[str, ...] = ()
    model_name: str = ""  # the name clients ask for; by default the folder's
    # answers written at the same time; each holds a KV cache
    slots: Annotated[int, Range(1, 256)] = 8
    queue: PositiveInt = 64  # requests that may wait for a slot; more are told 429
    # a request's time in queue and making; then it ends as it is
    request_seconds: PositiveFloat = 300.0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    # fp32 on a CPU, bf16 on a GPU that has it; int8 (CPU) is a fourth of the memory, and faster
    dtype: Literal["auto", "fp32", "bf16", "fp16", "int8"] = "auto"
    # CUDA only: compile the decode step and replay it as a graph; the start takes minutes longer
    compile: bool = False


class Server(ThreadingHTTPServer):
    """Listens, and answers each connection in a thread: by `api`, once that is set."""

    block_on_close = False
    request_queue_size = 1024
    server_bind = socketserver.TCPServer.server_bind  # HTTPServer's asks a name server first

    def __init__(self, cfg, key):
        self.cfg, self.key, self.api = cfg, key, None
        self.lock, self.active, self.requests = threading.Lock(), set(), Counter()
        self.page = PAGE.read_text(encoding="utf-8")
        self.headers = security_headers(self.page)
        self.names = {"localhost", "127.0.0.1", "[::1]", cfg.host.lower()}
        self.names |= set(map(host_name, cfg.allowed_hosts))
        try:
            places = socket.getaddrinfo(cfg.host, cfg.port, type=socket.SOCK_STREAM)
            self.address_family, *_, address = places[0]
            self.outside = not re.match(r"127\.|::1$", address[0])
            if self.outside and not key:
                problem = f"host={cfg.host} is open to others, and there is no API key"
                remedy = "set MINI_LLM_API_KEY or --api_key_file, or listen on --host=127.0.0.1"
                raise UserError(f"{problem}: {remedy}")
            super().__init__(address, Handler)
        except (OSError, UnicodeError) as problem:
            reason = getattr(problem, "strerror", None) or problem
            remedy = "choose an address of this machine, as 127.0.0.1, and a free port, or --port=0"
            where = f"host={cfg.host} port={cfg.port}: cannot listen there"
            raise UserError(f"{where}: {reason}; {remedy}") from None

    def process_request(self, request, client_address):
        while len(self.active) >= MAX_CONNECTIONS + 64:
            time.sleep(0.01)
        super().process_request(request, client_address)

    def stop(self, *_):
        """Begins to stop, on a signal."""
        log_line(f"stopping; answers under way have {GRACE_SECONDS} seconds")
        self.api.scheduler.close(GRACE_SECONDS)


def security_headers(page):
    """Returns headers for all answers. Only the page's own <script>s and <style>s will run."""
    policy = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
    policy += "form-action 'none'; frame-ancestors 'none'"
    for tag in ("script", "style"):
        policy += f"; {tag}-src"
        for block in re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.S):
            digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
            policy += f" 'sha256-{digest}'"
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
    return headers | {"Cache-Control": "no-store"}


def read_key(cfg):
    """Returns the API key, "" for none; UserError for a short one or one that no header carries."""
    source, key = "MINI_LLM_API_KEY", os.environ.get("MINI_LLM_API_KEY")
    if cfg.api_key_file:
        source = f"api_key_file={cfg.api_key_file}"
        try:
            key = Path(cfg.api_key_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as problem:
            raise UserError(f"{source}: cannot be read ({problem})") from None
    if key is not None and not re.fullmatch("[!-~]{8,200}", key):
        raise UserError(f"{source}: a key is 8 to 200 letters, digits and signs; got {len(key)}")
    return key or ""


def main(cfg):
    with Server(cfg, read_key(cfg)) as server:  # whoever calls while the model is loaded waits
        model, tokenizer = open_model(cfg.model_path, cfg.device, cfg.dtype, cfg.compile)
        if tokenizer.template is None:
            log_line(tokenizer.without_template(cfg.model_path))
        scheduler = Scheduler(model, cfg.slots, cfg.queue, cfg.compile)
        folder = model_folder(cfg.model_path).resolve()  # whose name says little if it is final/
        folder = folder.parent if re.fullmatch(r"final|step_\d+", folder.name) else folder
        name = cfg.model_name or folder.name
        api = server.api = Api(scheduler, tokenizer, name, cfg.request_seconds)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, server.stop)
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        host, weight = f"[{cfg.host}]" if ":" in cfg.host else cfg.host, model.lm_head.weight
        url = f"http://{host}:{server.server_address[1]}"
        kind = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
        size = f"context {api.context}, {cfg.slots} slots"
        print(f"{url}  {name}, template {api.template or 'none'}; {kind}, {size}", flush=True)
        scheduler.run()  # in the thread that loaded the model: OpenMP keeps threads for each
        time.sleep(0.1)  # whoever is in the system's queue already is told, not reset
        end = time.monotonic() + 0.5
        while server.active and time.monotonic() < end:  # last words are being sent
            time.sleep(0.01)


if __name__ == "__main__":
    config.run(main, ServerConfig, __doc__)
    os._exit(0)  # slow clients may hold threads still, and Python takes seconds to end torch
