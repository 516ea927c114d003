"""Serves a model over HTTP: OpenAI's routes, /generate, and a chat page.

    python server.py --model_path=checkpoints/sft --host=127.0.0.1 --port=8000

For its owner's machine and network, not for the open internet: no TLS, no accounts; put a proxy in
front for that. Any address other than this machine's own needs a key, from the environment variable
MINI_LLM_API_KEY or a file (--api_key_file), which clients send as "Authorization: Bearer KEY".
"""

import base64
import hashlib
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
import sys
import threading
import time
import traceback
from collections import Counter, namedtuple
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import unquote

from lib import config
from lib.config import PositiveFloat, PositiveInt, Range, UserError
from lib.conversation import check_messages, render, stop_ids, template_notes, template_of
from lib.tokenizer_json import template_text
from model import model_folder
from sample import Engine, Reply, Request, Sampling, open_model


class ApiError(UserError):
    """A request that is answered with an error; `param` is the field that it is about."""

    def __init__(self, message, param=None, code=None, status=400, headers=()):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers)


def require(condition, *error, **more):
    """Raises an ApiError of these arguments where a condition does not hold."""
    if not condition:
        raise ApiError(*error, **more)


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


# ---- The answers: OpenAI's shapes and /generate, as JSON values; no HTTP here.


class Api:
    """The routes over one model: a body to an answer, a dict, or a generator of dicts for a stream.

    `seconds`: a request's longest time; `disconnected()`: whether the client has hung up.
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
        card |= {"context_length": self.context, "template": self.template}
        return card | {"settings": settings}

    def health(self):
        return {"status": "ok", "model": self.name, "context_length": self.context}

    def tokenizer_info(self):
        """Returns what lm-eval asks about a tokenizer that it can't load itself."""
        ids = {role: getattr(self.tokenizer, f"{role}_id") for role in ("bos", "eos", "pad")}
        name = lambda id: None if id is None else self.tokenizer.pieces[id]
        info = {f"{role}_token": name(id) for role, id in ids.items()}
        template = self.template and template_text(self.tokenizer, self.template, generation=False)
        return info | {"chat_template": template}

    def tokenize(self, body, disconnected):
        fields = self.read(TokenFields, body)
        if fields.messages is None:
            message = "prompt must be a text, or messages a list"
            require(fields.prompt is not None, message, "prompt")
            opening = self.tokenizer.opening if fields.add_special_tokens else []
            ids = [*opening, *self.tokenizer.encode(fields.prompt)]
        else:
            ids = self.conversation(fields.messages)
        return {"tokens": ids, "count": len(ids), "max_model_len": self.context}

    def detokenize(self, body, disconnected):
        ids = self.ids_of(self.read(TokenFields, body).tokens, "tokens")
        return {"prompt": self.tokenizer.decode(ids)}

    def read(self, cls, body):
        """Returns the `cls` that a body makes; an error names the first field that is wrong."""
        options = config.options_of(cls)
        values = {name: value for name, value in body.items() if value is not None}
        for name, value in values.items():
            if name in options:
                value = [value] if name == "stop" and isinstance(value, str) else value
                values[name] = config.accept(name, value, options[name], "request")
            elif name not in IGNORED:
                neutral = value in NEUTRAL.get(name, ()) and not isinstance(value, bool)
                message = f"{name:.60} is not supported here"
                require(neutral, message, name[:60], "unsupported_parameter")
        for name, option in options.items():
            given = name in values or option.default is not config.NO_DEFAULT
            require(given, f"{name} is missing", name, "missing_required_parameter")
        name = values.get("model", self.name)  # another's answer would be a silent substitute
        message = f"the model {name[:60]!r} is not served here, only {self.name!r} is"
        require(name == self.name, message, "model", "model_not_found", 404)
        return cls(**{name: values[name] for name in values.keys() & options.keys()})

    def ids_of(self, value, param="prompt"):
        """Returns the ids of a text to continue; a list of ids as it is."""
        if isinstance(value, str):
            return self.tokenizer.prompt_ids(value)
        size = self.tokenizer.vocab_size
        right = isinstance(value, list) and all(type(id) is int and 0 <= id < size for id in value)
        require(right, f"{param} must be a text, or token ids in 0..{size - 1}", param)
        return value

    def conversation(self, messages):
        """Returns the ids up to the answer; without a template those of all contents in one."""
        require(all(isinstance(m, dict) for m in messages), "a message is an object", "messages")
        for message in messages:
            parts = message.setdefault("content", None)
            if isinstance(parts, list):  # of texts, as some clients send it
                right = all(isinstance(p, dict) and type(p.get("text")) is str for p in parts)
                require(right, "content must be a text, or a list of texts", "messages")
                message["content"] = "".join(part["text"] for part in parts)
        text = "".join(str(message["content"]) for message in messages)
        # an empty system prompt is none, and an empty answer no reason to end the conversation
        messages = [m for m in messages if str(m["content"]).strip() or m.get("role") == "user"]
        check_messages(messages)
        require(messages[-1]["role"] == "user", "the last message must be the user's", "messages")
        if self.template is None:
            return self.ids_of(text)
        return render(self.tokenizer, messages, self.template, add_generation_prompt=True)[0]

    def ask(self, fields, disconnected, prompts, wanted, param="max_tokens", n=1, trim=False, **kw):
        """Submits a Call of each prompt n times, seeds counting up. `param` names `wanted`."""
        fair = len(fields.stop) <= 8 and all(1 <= len(text) <= 256 for text in fields.stop)
        require(fair, "stop: up to 8 texts, each of 1 to 256 characters", "stop")
        count, most = len(prompts) * n, self.scheduler.room
        require(count <= most, f"{count} rows in one request; the queue holds {most}", "n")
        rules = config.narrow(fields, Sampling)
        first = secrets.randbits(32) if rules.seed is None else rules.seed
        call = Call(disconnected, time.monotonic() + self.seconds, fields.stream)
        for prompt in (prompt for prompt in prompts for _ in range(n)):
            size, room = len(prompt), self.context - len(prompt)
            longest = room if wanted is None else wanted
            message = f"this model's context is {self.context} tokens; the prompt has {size}, "
            message += f"which leaves {max(0, room)} for an answer: shorten it or lower {param}"
            fits = longest <= room and (room > 0 or wanted == 0)
            require(fits, message, param, "context_length_exceeded")
            sampling = replace(rules, seed=(first + len(call.rows)) % 2**64)
            reply = Reply(self.tokenizer, fields.stop, trim)
            call.rows.append(Row(call, reply, prompt, longest, sampling, **kw))
        self.scheduler.submit(call)
        return call

    def chat(self, body, disconnected):
        fields = self.read(ChatFields, body)
        wanted, top = fields.max_completion_tokens or fields.max_tokens, fields.top_logprobs
        require(fields.max_tokens in (None, wanted), "max_completion_tokens differs", "max_tokens")
        require(fields.logprobs or top is None, "logprobs is not true", "top_logprobs")
        top = (top or 0) if fields.logprobs else None
        row = {"trim": self.template is not None, "stop_ids": self.ends, "top_logprobs": top}
        prompts = [self.conversation(fields.messages)]
        return self.openai_answer(fields, top, disconnected, prompts, wanted, **row)

    def completions(self, body, disconnected):
        """Prompts are text or ids; `echo` with `logprobs` also scores them."""
        prompt = body.get("prompt")
        ids = isinstance(prompt, list) and all(type(id) is int for id in prompt)
        single = isinstance(prompt, str) or ids
        fields = self.read(CompletionFields, body | ({"prompt": [prompt]} if single else {}))
        top, echo, wanted = fields.logprobs, fields.echo, fields.max_tokens
        require(not echo or not fields.stream, "echo is not supported with stream", "echo")
        require(wanted or echo, "max_tokens 0 asks for nothing, but with echo", "max_tokens")
        prompts = [self.ids_of(prompt) for prompt in fields.prompt]
        require(all(prompts), "prompt: an empty list of ids; give at least BOS", "prompt")
        row = {"echo": echo, "top_logprobs": (top or 0) if echo else top}
        # lm-eval counts on the end of the answer among the tokens
        row |= {"stop_ids" if top is None else "ends": self.ends}
        return self.openai_answer(fields, top, disconnected, prompts, wanted, **row)

    def openai_answer(self, fields, top, *asked, **row):
        """Returns an answer, or with `stream` a generator of chunks. `top`: as logprobs."""
        counted = (fields.stream_options or {}).get("include_usage") or False
        require(type(counted) is bool, "include_usage must be true or false", "stream_options")
        call, chat = self.ask(fields, *asked, n=fields.n, **row), isinstance(fields, ChatFields)
        kind = "chat.completion" + ".chunk" * fields.stream if chat else "text_completion"
        head = {"id": f"{'chat' * chat}cmpl-{secrets.token_hex(12)}", "object": kind}
        head |= {"created": int(time.time()), "model": self.name}

        def choice(piece):
            row = call.rows[piece.index]
            piece = self.echoed(piece, row) if row.echo else piece
            logprobs = self.chat_logprobs if chat else self.completion_logprobs
            shared = {"index": piece.index, "finish_reason": piece.finish}
            shared |= {"logprobs": None if top is None else logprobs(piece)}
            if chat and piece.finish and row.stopped_by:  # our page shows it; OpenAI leaves it out
                shared["logprobs"]["end"] = self.chat_entry(row.stopped_by)
            if not chat:
                return shared | {"text": piece.text}
            message = ({"role": "assistant"} if piece.first else {}) | {"content": piece.text}
            return shared | {"delta" if fields.stream else "message": message}

        def chunks():
            for piece in call.pieces():
                yield head | {"choices": [choice(piece)]} | ({"usage": None} if counted else {})
            if counted:  # only the last chunk knows
                yield head | {"choices": [], "usage": call.usage()}

        if fields.stream:
            return chunks()
        choices = [choice(piece) for piece in sorted(call.pieces())]  # one Piece a row
        return head | {"choices": choices, "usage": call.usage()}

    def generate(self, body, disconnected):
        """One prompt, by default in the model's own template."""
        fields = self.read(GenerateFields, body)
        message = f"this model has {self.template or 'none'!r}; leave the field out, or say 'none'"
        asked = fields.template not in (None, "none")
        known = not asked or template_of(self.tokenizer, fields.template) == self.template
        require(known, message, "template")
        template = None if fields.template == "none" else self.template
        messages = [{"role": "user", "content": fields.prompt}]
        prompt = self.conversation(messages) if template else self.ids_of(fields.prompt)
        limit = fields.max_new_tokens or max(1, min(128, self.context - len(prompt)))
        row = {"trim": template is not None, "stop_ids": self.ends}
        call = self.ask(fields, disconnected, [prompt], limit, "max_new_tokens", **row)
        used = {"max_new_tokens": limit, "template": template, "stop": list(fields.stop)}
        used |= asdict(call.rows[0].sampling)

        def answers():
            for piece in call.pieces():
                answer = {"response": piece.text, "finish_reason": piece.finish}
                ended = {"generation_config": used, "usage": call.usage()}
                yield answer | ended if piece.finish else answer

        return answers() if fields.stream else next(answers()) | {"prompt": fields.prompt}

    def chat_logprobs(self, piece):
        return {"content": list(map(self.chat_entry, piece.tokens)), "refusal": None}

    def chat_entry(self, token):
        def entry(id, logprob):
            spelled = self.tokenizer.spelled(id)
            text = spelled.decode("utf-8", "replace")  # U+FFFD stands for a part of a character
            return {"token": text, "logprob": logprob, "bytes": list(spelled)}

        tops = [entry(*pair) for pair in token.top]
        return entry(token.id, token.logprob) | {"top_logprobs": tops}

    def completion_logprobs(self, piece):
        def name(id):
            spelled = self.tokenizer.spelled(id)
            text = spelled.decode("utf-8", "replace")
            return "bytes:" + "".join(f"\\x{b:02x}" for b in spelled) if "\ufffd" in text else text

        tokens = piece.tokens
        tops = [{name(id): value for id, value in (*t.top, (t.id, t.logprob))} for t in tokens]
        return {
            "tokens": [name(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [None if None in top.values() else top for top in tops],
            "text_offset": [token.start for token in tokens],
        }

    def echoed(self, piece, row):
        """Returns a piece after the prompt of its row and that one's log-probabilities."""
        stream, text, tokens = self.tokenizer.stream(), "", []
        for id, logprob in zip(row.prompt, row.logprobs):
            tokens.append(Token(len(text), id, *logprob))
            text += stream.push(id)
        text += stream.flush()
        tokens += [token._replace(start=token.start + len(text)) for token in piece.tokens]
        return piece._replace(text=text + piece.text, tokens=tokens)


# ---- The scheduler: the one loop that owns the model, and the queue in front of it. Before every
# step it fills free slots, and drops whoever went away or ran out of time. The threads that ask
# hand in a Call and read its Pieces; they touch neither model nor engine.

PIECE_SECONDS = 0.02  # between two pieces of a row, at least: each takes time from the model
RETRY = {"Retry-After": "1"}
REFUSALS = {  # of a row without a token, by the reason why it ends: arguments of ApiError
    "time": ("too many requests are waiting; try again", None, "queue_full", 429, RETRY),
    "shutdown": ("the server is stopping", None, "stopping", 503, RETRY),
}

# The newly certain part of a row: text, Tokens, and at its end the finish reason.
Piece = namedtuple("Piece", "index first text tokens finish")
# An id, where in its row's text it begins, its log-probability, [(id, log-probability)] of the top.
Token = namedtuple("Token", "start id logprob top")


class Call:
    """One client's rows. With `stream` their pieces come as they are made, else each row as one."""

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

    `ends`: ids that end the answer and are among its tokens (the engine's `stop_ids` are not; such
    a one is `stopped_by`, a Token, if log-probabilities are recorded).
    """

    def __init__(self, call, reply, *request, ends=(), **more):
        super().__init__(*request, **more)
        self.call, self.index, self.reply, self.ends = call, len(call.rows), reply, ends
        self.tokens, self.text, self.sent_at = [], "", 0.0  # not yet sent
        self.stopped_by = None

    def take(self, id, limit, logprob):
        """As Request's; also sends the text that is now certain, but not too often."""
        if self.finish is None and id in self.stop_ids and self.top_logprobs is not None:
            self.stopped_by = Token(None, id, logprob[0], logprob[1][: self.top_logprobs])
        id = super().take(id, limit, logprob)
        if id is not None:
            if self.logprobs:
                start = self.reply.shown + len(self.reply.held)
                self.tokens.append(Token(start, id, *self.logprobs[-1]))
            self.text += self.reply.push(id)
            if self.reply.stopped or id in self.ends:
                self.finish = "stop"
            late = time.monotonic() - self.sent_at > PIECE_SECONDS
            if self.call.stream and self.text and late and not self.finish:
                self.send()
        return id

    def send(self):
        """Sends what is new: text and tokens. In the end some may be cut off with their text."""
        whole = self.finish and not self.reply.cut
        tokens = [token for token in self.tokens if whole or token.start < self.reply.shown]
        self.call.inbox.put(Piece(self.index, not self.sent_at, self.text, tokens, self.finish))
        self.tokens, self.text, self.sent_at = self.tokens[len(tokens) :], "", time.monotonic()

    def end(self, failure):
        """Sends the last Piece, or an error if the row failed, or was dropped without a token."""
        if self.finish == "error":
            self.call.inbox.put(failure)
        elif self.finish in REFUSALS and not self.ids:
            self.call.inbox.put(ApiError(*REFUSALS[self.finish]))
        else:
            self.text += self.reply.push()
            self.send()


class Scheduler:
    """Runs calls on one model, in the thread that calls `run`. `room`: rows that may wait in all.

    `rows` holds all in order of arrival; the first `slots` are running, the others wait.
    """

    def __init__(self, model, slots, room, graphs=False):
        self.slots, self.room, self.engine = slots, room, Engine(model, slots, graphs=graphs)
        if graphs:  # no request waits for a compiler
            self.engine.rehearse(Sampling(), Sampling(temperature=0))
        self.rows, self.changed = [], threading.Condition()  # which guards them
        self.closing, self.prompt_tokens, self.new_tokens = False, 0, 0

    def submit(self, call):
        """Puts a call's rows into the queue, all or none; ApiError 429 or 503 if it takes none."""
        with self.changed:
            require(not self.closing, *REFUSALS["shutdown"])
            require(len(self.rows) + len(call.rows) <= self.slots + self.room, *REFUSALS["time"])
            self.rows.extend(call.rows)
            self.changed.notify()

    def close(self, *_):
        """Ends all rows, and `run`. A signal may call it: it takes no lock."""
        self.closing = True

    def run(self):
        """Works until closed."""
        failure = None
        while self.rows or not self.closing:
            with self.changed:
                if not self.rows:
                    self.changed.wait(0.1)  # `close` wakes nobody
            try:
                self.drop(failure)
                running = self.rows[: self.slots]
                joining = [row for row in running if row not in self.engine.requests]
                self.engine.join(joining)
                self.prompt_tokens += sum(len(row.prompt) for row in joining)
                for ids in self.engine.advance():
                    self.new_tokens += sum(id is not None for id in ids)
            except Exception as problem:  # it ends the rows it concerns, not the server
                failure = RuntimeError("the engine failed")
                failure.__cause__ = problem
                named = [row for row in running if row.finish == "error"]  # by the engine
                for row in named or running:
                    row.finish = "error"

    def drop(self, failure):
        """Lets go of rows that have ended; ends those whose client is gone or whose time is up."""
        rows, closing, now = list(self.rows), self.closing, time.monotonic()
        gone = {call for call in {row.call for row in rows} if call.disconnected()}
        for row in rows:
            reason = "shutdown" if closing else "time" if now > row.call.deadline else None
            row.finish = row.finish or ("disconnected" if row.call in gone else reason)
            if row.finish:
                row.end(failure)
        with self.changed:
            self.rows = [row for row in self.rows if not row.finish]


# ---- HTTP: who may ask, and where. One request a connection, every byte of it under a deadline.

MAX_CONNECTIONS = 256  # answered at the same time; others are told 503
MAX_FIRST_LINE, MAX_HEAD, MAX_BODY = 8 << 10, 32 << 10, 1 << 20  # bytes: first line, headers, body
PAGE = Path(__file__).with_name("web").joinpath("chat.html").read_text(encoding="utf-8")

# The page loads nothing from elsewhere, sends nothing elsewhere, and stands in nobody's frame. Of
# scripts and styles only its own are allowed, by their hashes.
POLICY = "default-src 'none'; "
for tag in ("script", "style"):
    (block,) = re.findall(f"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
    POLICY += f"{tag}-src 'sha256-{digest}'; "
POLICY += "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
POLICY += "frame-ancestors 'none'"
HEADERS = {"Content-Security-Policy": POLICY}
HEADERS |= {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Connection": "close"}
DONE = b"data: [DONE]\n\n"  # ends a stream
READ_SECONDS = 10  # for the whole request, however it trickles in
SEND_SECONDS = 10  # for each piece of an answer

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
            if count := self.sock.recv_into(buffer):
                self.any = True
                return count
            raise ConnectionAbortedError  # the client hung up
        require(not self.any, f"the request took longer than {READ_SECONDS} s", status=408)
        raise TimeoutError


class Handler(BaseHTTPRequestHandler):
    """One request and its answer, counted and logged, whatever they are; then the end.

    http.server alone waits for ever, and takes what two readers may understand differently (RFC
    9112, request smuggling). So the head is read here, line by line, each matched by a pattern.
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
        if self.path or status != 499:  # browsers open connections in advance
            with self.server.lock:
                self.server.requests[self.route, status] += 1
            request = self.command, self.path[:80], status, time.monotonic() - start
            self.log_message("%s %s %d %.3f s", *request)

    def log_message(self, *line):
        """Writes a line to stderr, or drops it where nobody reads a full pipe."""
        ready = [2]
        with suppress(OSError, ValueError):  # on Windows select knows only sockets
            _, ready, _ = select.select([], [2], [], 0)
        if ready:
            super().log_message(*line)

    def finish(self):
        """Closes so that the answer arrives: with bytes unread the connection would be reset."""
        with suppress(OSError, ApiError):
            self.connection.shutdown(socket.SHUT_WR)
            rest = DeadlineReader(self.connection, 1)
            while True:
                rest.read(1 << 16)
        super().finish()
        self.server.active.discard(self)

    def read_head(self):
        """Reads the first line and the headers, names in small letters. ApiError or OSError."""
        plain = self.rfile.peek(1)[:1] in b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        require(plain, "not HTTP; if this is HTTPS: the server speaks plain HTTP")
        match = REQUEST_LINE.fullmatch(self.read_line(MAX_FIRST_LINE, 414))
        require(match, "the first line is not 'METHOD /path HTTP/1.1'")
        command, path, version = match.groups()
        require(version in ("1.1", "1.0"), "the server speaks HTTP/1.1", status=505)
        require(path.startswith("/"), "the path must begin with /")
        left = MAX_HEAD
        while (line := self.read_line(left, 431)) != "\r\n":
            left -= len(line)
            match = HEADER_LINE.fullmatch(line)
            require(match, "a header is not 'Name: value' on one line that ends in CR LF")
            name = match[1].lower()
            require(name not in self.headers or name not in SINGLE_HEADERS, f"{name} stands twice")
            self.headers[name] = match[2].strip(" \t")
            require(len(self.headers) <= 100, "more than 100 headers", status=431)
        self.command, self.path = command, path.partition("?")[0]  # no route has a query

    def read_line(self, limit, status):
        line = self.rfile.readline(limit + 1).decode("latin-1")
        require(len(line) <= limit, "the first line or the headers are too long", status=status)
        return line

    def read_json(self):
        """Returns the fields of a JSON body of a fair, known length; ApiError for anything else."""
        kind, length = self.headers.get("content-type", ""), self.headers.get("content-length")
        expect = self.headers.get("expect", "").lower()
        require(JSON_TYPE.fullmatch(kind), "send 'Content-Type: application/json'", status=415)
        for name, status in {"content-encoding": 415, "transfer-encoding": 501}.items():
            require(name not in self.headers, f"{name} is not supported", status=status)
        require(length is not None, "Content-Length is missing", status=411)
        require(re.fullmatch("[0-9]+", length), "Content-Length must be a number of bytes")
        require(len(length) < 11 and int(length) <= MAX_BODY, f"over {MAX_BODY} bytes", status=413)
        require(expect in ("", "100-continue"), "only 100-continue can be expected", status=417)
        if expect:
            self.handle_expect_100()
        body = self.rfile.read(int(length)).decode("utf-8")
        fields = config.parse_json(body, "body", unique)
        require(isinstance(fields, dict), 'the body must be a JSON object, {"field": value}')
        return fields

    def disconnected(self):
        """Returns whether the client has hung up; discards what else it sends."""
        with suppress(OSError, ValueError):  # closed, by the other side or by ours
            ready = select.select([self.connection], [], [], 0)[0]
            return bool(ready) and not self.connection.recv(1 << 16)
        return True

    def check_client(self):
        """Other web pages must not use the browser of somebody who may ask."""
        server, host, origin = self.server, self.headers.get("host"), self.headers.get("origin")
        require(host is not None, "the Host header is missing")
        # a page that rebinds its own name to this address (DNS rebinding) still sends its name
        address = server.outside and re.fullmatch(r"[0-9.]+|\[.*\]", host_name(host))
        ours = address or host_name(host) in server.names
        require(ours, "another's Host; name it with --allowed_hosts", status=403)
        if origin not in (None, f"http://{host}", f"https://{host}"):
            allowed = origin in server.cfg.allowed_origins
            require(allowed, "another's Origin; name it with --allowed_origins", status=403)
            self.allow_origin = {"Access-Control-Allow-Origin": origin}
            self.allow_origin |= {"Access-Control-Allow-Headers": "authorization, content-type"}

    def answer(self):
        """Returns the answer of a route, as `send` takes it."""
        self.read_head()
        free = len(self.server.active) <= MAX_CONNECTIONS
        require(free, "too many connections; try again", status=503, headers=RETRY)
        self.check_client()
        own = unquote(self.path) == f"/v1/models/{self.server.api.name}"
        route = "/v1/models/{model}" if own else self.path
        require(route in ROUTES, f"there is no {route[:80]} here", code="not_found", status=404)
        self.route, (methods, function) = route, ROUTES[route]
        if self.command == "OPTIONS" and self.allow_origin:
            return ("text/plain", "")  # a preflight
        allowed = self.command in methods.split(", ")
        require(allowed, f"{route} takes {methods}", status=405, headers={"Allow": methods})
        if self.server.key and route not in ("/", "/health"):  # the page asks for the key
            scheme, _, key = self.headers.get("authorization", "").partition(" ")
            right = secrets.compare_digest(key.strip().encode("latin-1"), self.server.key.encode())
            message, headers = "send 'Authorization: Bearer KEY'", {"WWW-Authenticate": "Bearer"}
            require(right and scheme.lower() == "bearer", message, status=401, headers=headers)
        if self.command == "POST":
            return function(self.server.api, self.read_json(), self.disconnected)
        length = self.headers.get("content-length", "0")
        require(length == "0" and "transfer-encoding" not in self.headers, "a GET with a body")
        return function(self.server)

    def respond(self):
        """Answers the request; returns the status. Raises OSError if there is nobody to answer."""
        try:
            return self.send(200, self.answer())
        except OSError:
            raise
        except (UserError, UnicodeDecodeError, RecursionError) as problem:  # of fields and JSON
            error = problem if isinstance(problem, ApiError) else ApiError(str(problem))
        except Exception:  # the client is told a number, the server lives on
            number = secrets.token_hex(4)
            sys.stderr.write(f"error {number}: {traceback.format_exc()}")
            error = ApiError(f"internal error {number}: see the log", code="internal", status=500)
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
        fields = {"message": str(error), "type": kind, "param": error.param, "code": error.code}
        if not self.streaming:
            return self.send(error.status, {"error": fields}, error.headers)
        self.wfile.write(event({"error": fields}))
        return 200

    def send(self, status, answer, headers=()):
        """Sends a dict as JSON, a generator of dicts as server-sent events, or (type, text)."""
        if isinstance(answer, Iterator):
            first = next(answer)  # a failure before it still gets a status of its own
            self.streaming, kind = True, {"Content-Type": "text/event-stream; charset=utf-8"}
            parts = itertools.chain(map(event, itertools.chain([first], answer)), [DONE])
        else:
            if isinstance(answer, dict):
                answer = "application/json", json.dumps(answer, ensure_ascii=False)
            parts = [answer[1].encode("utf-8", "replace")]
            kind = {"Content-Type": answer[0], "Content-Length": str(len(parts[0]))}
        self.connection.settimeout(SEND_SECONDS)  # for each write, however slowly it is read
        self.send_response_only(status)
        for name, value in (HEADERS | self.allow_origin | kind | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        for part in parts if self.command != "HEAD" else ():
            self.wfile.write(part)
        return status


def unique(pairs):
    """Returns a JSON object; no key may stand twice, for two readers may heed different ones."""
    require(len(dict(pairs)) == len(pairs), "a key stands twice in the body")
    return dict(pairs)


def event(fields):
    """Returns a server-sent event, in ASCII: to some clients U+2028 is a line break."""
    return f"data: {json.dumps(fields, separators=(',', ':'))}\n\n".encode()


def host_name(host):
    """Returns the name in a Host header, without the port and in small letters."""
    return re.sub(r":[0-9]{1,5}$", "", host).lower()


def metrics(server):
    """Numbers for Prometheus, in its text format."""
    scheduler = server.api.scheduler
    running = min(len(scheduler.rows), scheduler.slots)
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
    "/": (GET, lambda server: ("text/html; charset=utf-8", PAGE)),
    "/health": (GET, lambda server: server.api.health()),
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


# ---- The command


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Which model to serve, and to whom."""

    model_path: str  # a model folder
    host: str = "127.0.0.1"  # address to listen on; any but this machine's own needs an API key
    port: Annotated[int, Range(0, 65535)] = 8000  # 0 = a free one, which is printed
    api_key_file: str = ""  # file with the key clients must send; or set MINI_LLM_API_KEY
    allowed_hosts: tuple[str, ...] = ()  # names by which clients may call it, as box.lan
    allowed_origins: tuple[str, ...] = ()  # web pages of others that may ask, as http://box.lan
    model_name: str = ""  # the name clients ask for; by default the folder's
    slots: Annotated[int, Range(1, 256)] = 8  # answers at the same time; each holds a KV cache
    queue: PositiveInt = 64  # requests that may wait for a slot; more are told 429
    request_seconds: PositiveFloat = 300.0  # in queue and making; then an answer ends as it is
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    dtype: Literal["auto", "fp32", "bf16", "fp16", "int8"] = "auto"  # int8: a CPU's fastest
    compile: bool = False  # CUDA only: replay the decode step as a graph; the start takes minutes


class Server(socketserver.ThreadingTCPServer):
    """Listens, and answers each connection in a thread: by `api`, once that is set."""

    allow_reuse_address, daemon_threads, block_on_close = os.name != "nt", True, False
    request_queue_size = 1024

    def __init__(self, cfg, key):
        self.cfg, self.key, self.api = cfg, key, None
        self.lock, self.active, self.requests = threading.Lock(), set(), Counter()
        self.names = {"localhost", "127.0.0.1", "[::1]", cfg.host.lower()}
        self.names |= set(map(host_name, cfg.allowed_hosts))
        self.outside = not re.fullmatch(r"localhost|127\.[0-9.]+", cfg.host)
        if self.outside and not key:
            remedy = "set MINI_LLM_API_KEY or --api_key_file, or listen on --host=127.0.0.1"
            raise UserError(f"host={cfg.host} is open to others, and there is no API key: {remedy}")
        remedy = "choose an address of this machine, as 127.0.0.1, and a free port, or --port=0"
        where = f"host={cfg.host} port={cfg.port}: cannot listen there"
        with config.refusing((OSError, UnicodeError), where, remedy):
            super().__init__((cfg.host, cfg.port), Handler)


def read_key(cfg):
    """Returns the API key, "" for none; UserError for a short one or one that no header carries."""
    source, key = "MINI_LLM_API_KEY", os.environ.get("MINI_LLM_API_KEY")
    if cfg.api_key_file:
        source = f"api_key_file={cfg.api_key_file}"
        with config.refusing((OSError, UnicodeDecodeError), f"{source}: cannot be read"):
            key = Path(cfg.api_key_file).read_text(encoding="utf-8").strip()
    if key is not None and not re.fullmatch("[!-~]{8,200}", key):
        raise UserError(f"{source}: a key is 8 to 200 letters, digits and signs; got {len(key)}")
    return key or ""


def main(cfg):
    with Server(cfg, read_key(cfg)) as server:  # whoever calls while the model is loaded waits
        model, tokenizer = open_model(cfg.model_path, cfg.device, cfg.dtype, cfg.compile)
        for line in template_notes(tokenizer, cfg.model_path):
            print(line, file=sys.stderr)
        scheduler = Scheduler(model, cfg.slots, cfg.queue, cfg.compile)
        folder = model_folder(cfg.model_path).resolve()  # whose name says little if it is final/
        folder = folder.parent if re.fullmatch(r"final|step_\d+", folder.name) else folder
        name = cfg.model_name or folder.name
        api = server.api = Api(scheduler, tokenizer, name, cfg.request_seconds)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, scheduler.close)
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        url, weight = f"http://{cfg.host}:{server.server_address[1]}", model.lm_head.weight
        kind = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
        size = f"context {api.context}, {cfg.slots} slots"
        print(f"{url}  {name}, template {api.template or 'none'}; {kind}, {size}", flush=True)
        scheduler.run()  # in the thread that loaded the model: OpenMP keeps threads for each
        time.sleep(0.5)  # last words are being sent, and whoever has just called is told


if __name__ == "__main__":
    config.run(main, ServerConfig, __doc__)
    os._exit(0)  # slow clients may hold threads still, and Python takes seconds to end torch
