"""Serves a model over HTTP: OpenAI's routes, /generate, and a chat page.

    python server.py --model_path=checkpoints/sft --host=127.0.0.1 --port=8000

Made for its owner's machine and network, not for the open internet: no TLS, no accounts; put a
proxy in front for that. Any address other than this machine's own needs a key, from the
environment variable MINI_LLM_API_KEY or a file (--api_key_file), which clients send as
"Authorization: Bearer KEY".

In this file: the fields of a request, the answers in their shapes, the scheduler (the one loop
that owns the model), HTTP over sockets that are not trusted, the command.
"""

import base64
import functools
import hashlib
import hmac
import io
import ipaddress
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
from bisect import bisect_left
from collections import Counter, deque, namedtuple
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import unquote

from lib import config
from lib.config import PositiveFloat, PositiveInt, Range, UserError
from lib.tokenizer import ROLES, TEMPLATES, render, stop_ids
from lib.tokenizer_json import jinja
from model import model_folder
from sample import Engine, Reply, Request, Sampling, ending, open_model, token_logprobs

# ---- errors


class ApiError(Exception):
    """A request that is answered with an error: HTTP status, message, and the field it is about."""

    def __init__(self, status, message, param=None, code=None, headers=()):
        super().__init__(" ".join(message.split("\n")))
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers)

    def body(self):
        """Returns the error in OpenAI's shape."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kinds.get(self.status, kind)}
        return {"error": error | {"param": self.param, "code": self.code}}


def require(condition, status, message, param=None, code=None, headers=()):
    """Raises ApiError where a condition does not hold."""
    if not condition:
        raise ApiError(status, message, param, code, headers)


@contextmanager
def bad_request(param, code=None):
    """Answers an error raised inside with status 400, about the field `param`."""
    try:
        yield
    except (UserError, UnicodeDecodeError, RecursionError) as problem:
        raise ApiError(400, str(problem), param, code) from None


def internal_error():
    """Logs the traceback under a number; returns an ApiError that gives only the number."""
    number = secrets.token_hex(4)
    log_line(f"error {number}: {traceback.format_exc().rstrip()}")
    message = f"internal error {number}; the server's log tells more"
    return ApiError(500, message, code="internal_error")


def log_line(text):
    """Writes to stderr, or drops the text where a pipe is full: no answer waits for its reader."""
    with suppress(OSError, ValueError):  # no file, or Windows, where select knows sockets only
        if not select.select([], [sys.stderr], [], 0)[1]:
            return
    with suppress(OSError):
        sys.stderr.write(text + "\n")  # in one piece, whichever threads write


# --------------------------------------------------------------------------------------------------
# The fields of a request: a dataclass for each route, whose annotations are the checks. Fields that
# would change the answer and are not supported are refused, never ignored.

MAX_ROWS = 64  # prompts x n of one request
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls"}
IGNORED |= {"prompt_cache_key", "prompt_cache_retention"}  # OpenAI's, and without effect here
# Fields that are not supported, and the values with which they change nothing.
NEUTRAL = {"tools": ([],), "functions": ([],), "response_format": ({"type": "text"},)}
NEUTRAL |= {"modalities": (["text"],), "logit_bias": ({},), "suffix": ("",), "best_of": (1,)}
NEUTRAL |= dict.fromkeys(["frequency_penalty", "presence_penalty"], (0,))
NEUTRAL |= dict.fromkeys(["tool_choice", "function_call"], ("none", "auto"))
NEUTRAL |= dict.fromkeys(["audio", "prediction", "web_search_options"], ())
NEUTRAL |= dict.fromkeys(["reasoning_effort", "verbosity"], ())


@dataclass(frozen=True, kw_only=True)
class GenerationFields(Sampling):
    """The fields of every route that generates."""

    model: str | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False

    def __post_init__(self):
        fair = len(self.stop) <= 8 and all(1 <= len(text) <= 256 for text in self.stop)
        require(fair, 400, "stop: up to 8 texts, each of 1 to 256 characters", "stop")


@dataclass(frozen=True, kw_only=True)
class OpenAIFields(GenerationFields):
    n: Annotated[int, Range(1, MAX_ROWS)] = 1
    stream_options: dict | None = None

    def __post_init__(self):
        super().__post_init__()
        message = "stream_options.include_usage must be true or false"
        require(type(self.wants_usage) is bool, 400, message, "stream_options")

    @property
    def wants_usage(self):
        return (self.stream_options or {}).get("include_usage") or False


@dataclass(frozen=True, kw_only=True)
class ChatFields(OpenAIFields):
    messages: list
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Range(0, 20)] | None = None


@dataclass(frozen=True, kw_only=True)
class CompletionFields(OpenAIFields):
    prompt: list  # of texts, or of lists of ids
    max_tokens: Annotated[int, Range(0)] = 16  # as OpenAI has it
    echo: bool = False
    logprobs: Annotated[int, Range(0, 20)] | None = None


@dataclass(frozen=True, kw_only=True)
class GenerateFields(GenerationFields):
    prompt: str
    max_new_tokens: PositiveInt | None = None
    template: str | None = None


@dataclass(frozen=True, kw_only=True)
class TokenizeFields:
    model: str | None = None
    prompt: str | None = None
    messages: list | None = None
    add_special_tokens: bool = False


@dataclass(frozen=True, kw_only=True)
class DetokenizeFields:
    model: str | None = None
    tokens: list


fields_of = functools.cache(config.options_of)


def read_fields(cls, body):
    """Returns the `cls` that a body makes; ApiError names the first field that is wrong."""
    values, fields = {}, fields_of(cls)
    for name, value in body.items():
        if value is None or name in IGNORED:
            continue
        if name in fields:
            value = [value] if name == "stop" and isinstance(value, str) else value
            with bad_request(name):
                values[name] = config.accept(name, value, fields[name], "request")
            continue
        short = name[:60]
        message = f"unknown field {short!r}{config.did_you_mean(short, fields)}"
        require(name in NEUTRAL, 400, message, short, "unknown_parameter")
        harmless = value in NEUTRAL[name] and not isinstance(value, bool)
        require(harmless, 400, f"{name} is not supported here", name, "unsupported_parameter")
    for name, field in fields.items():
        given = name in values or field.default is not config.NO_DEFAULT
        require(given, 400, f"{name} is missing", name, "missing_required_parameter")
    return cls(**values)


def text_message(message, number):
    """Returns a message with its content as one text; ApiError unless all of it is text."""

    def check(condition, problem):
        require(condition, 400, f"message {number}: {problem}", "messages")

    check(isinstance(message, dict), "must be an object with role and content")
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):
        texts = [p.get("text") for p in content if isinstance(p, dict) and p.get("type") == "text"]
        texts = [text for text in texts if isinstance(text, str)]
        check(len(texts) == len(content), "only text parts are supported")
        content = "".join(texts)
    check(role in ROLES, f"role must be one of {', '.join(ROLES)}")
    check(isinstance(content, str), "content must be a string")
    return {"role": role, "content": content}


# --------------------------------------------------------------------------------------------------
# The answers: OpenAI's shapes and /generate, as JSON values; no HTTP here.


class Api:
    """The routes over one model. `seconds`: a request's longest time, in the queue and at work.

    A POST route takes the body as a dict, and a function that says whether the client has hung up;
    it returns the answer as a dict, or a generator of dicts for a stream. It raises ApiError.
    """

    def __init__(self, scheduler, tokenizer, name, seconds):
        self.scheduler, self.tokenizer = scheduler, tokenizer
        self.name, self.seconds, self.started = name, seconds, int(time.time())
        self.context, self.template = scheduler.model.cfg.sequence_length, tokenizer.template

    def card(self):
        """Returns the model's entry: OpenAI's four fields, and the page's needs."""
        settings = {"max_tokens": {"min": 1, "max": self.context - 1, "default": None}}
        for name, field in fields_of(Sampling).items():
            limits = field.limits
            low = limits.low + 0.01 if limits.open_low else limits.low  # for a slider
            settings[name] = {"min": low, "max": limits.high, "default": field.default}
        card = {"id": self.name, "object": "model", "created": self.started, "owned_by": "mini-llm"}
        card |= {"context_length": self.context, "template": self.template, "settings": settings}
        return card

    def tokenizer_info(self):
        """Returns what lm-eval asks about a tokenizer that it can't load itself."""
        ids = {role: getattr(self.tokenizer, f"{role}_id") for role in ("bos", "eos", "pad")}
        info = {f"{role}_token": self.tokenizer.pieces[id] for role, id in ids.items()}
        return info | {"chat_template": self.template and jinja(TEMPLATES[self.template])}

    def read(self, cls, body):
        """Returns the fields of a request that is for this model."""
        fields = read_fields(cls, body)
        self.check_name(self.name if fields.model is None else fields.model)
        return fields

    def check_name(self, name):
        """Refuses another model's name: our answer would be a silent substitute."""
        message = f"the model {name[:60]!r} is not served here, only {self.name!r} is"
        require(name == self.name, 404, message, "model", "model_not_found")

    def tokenize(self, body, disconnected):
        """POST /tokenize: the ids of `prompt`, or of `messages` as in a chat request."""
        fields = self.read(TokenizeFields, body)
        if fields.messages is None:
            ids = self.continued(fields.prompt)[not fields.add_special_tokens :]  # with BOS or not
        else:
            ids = self.conversation(fields.messages)
        return {"tokens": ids, "count": len(ids), "max_model_len": self.context}

    def detokenize(self, body, disconnected):
        """POST /detokenize: the text of `tokens`."""
        ids = self.checked_ids(self.read(DetokenizeFields, body).tokens, "tokens")
        return {"prompt": self.tokenizer.decode(ids)}

    # ---- prompts

    def checked_ids(self, ids, param):
        size = self.tokenizer.vocab_size
        right = all(type(id) is int and 0 <= id < size for id in ids)
        require(right, 400, f"{param} must be a list of token ids, each in 0..{size - 1}", param)
        return ids

    def continued(self, text, param="prompt"):
        """Returns the ids of a text to continue: BOS and its own."""
        require(isinstance(text, str), 400, f"{param} must be a string", param)
        with bad_request(param):
            return [self.tokenizer.bos_id, *self.tokenizer.encode(text)]

    def rendered(self, messages, param):
        """Returns the ids of messages in the model's template, up to where the answer begins."""
        with bad_request(param):
            return render(self.tokenizer, messages, self.template, add_generation_prompt=True)[0]

    def conversation(self, messages):
        """Returns the ids of a conversation, up to where the answer begins.

        A model without a template only continues text: BOS, then all contents in one.
        """
        require(1 <= len(messages) <= 256, 400, "messages must be 1 to 256", "messages")
        messages = [
            text_message(message, number) for number, message in enumerate(messages, start=1)
        ]
        text = "".join(message["content"] for message in messages)
        # an empty system prompt is none, and an empty answer no reason to end the conversation
        messages = [m for m in messages if m["content"].strip() or m["role"] == "user"]
        last = messages[-1]["role"] if messages else None
        require(last == "user", 400, "the last message must be the user's", "messages")
        if self.template:
            return self.rendered(messages, "messages")
        return self.continued(text, "messages")

    def check_context(self, fits, problem, param):
        message = f"this model's context is {self.context} tokens; {problem}"
        require(fits, 400, message, param, "context_length_exceeded")

    # ---- generation

    def room(self, prompt, wanted, param):
        """Returns how many tokens the answer may have; ApiError if it does not fit the context."""
        room, size = self.context - len(prompt), f"the prompt has {len(prompt)} tokens"
        problem = f"{size}, which leave no room for an answer: shorten it"
        self.check_context(room > 0 or wanted == 0, problem, param)
        wanted = room if wanted is None else wanted
        problem = f"{size} and {param} is {wanted}: lower it to {room} or shorten the prompt"
        self.check_context(wanted <= room, problem, param)
        return wanted

    def ask(
        self, fields, prompts, wanted, disconnected, n=1, top=None, trim=False, ends=(), score=None
    ):
        """Submits a Call of each prompt n times. `wanted`: the longest answer and its field's name.

        Seeds count up from the one asked for, or from a fresh one. `top`: see Request.top_logprobs;
        `ends`, `score`: see Row.
        """
        first = secrets.randbits(32) if fields.seed is None else fields.seed
        stops = () if ends else stop_ids(self.tokenizer, self.template)
        call = Call(disconnected, time.monotonic() + self.seconds, fields.stream)
        for index, prompt in enumerate(prompt for prompt in prompts for _ in range(n)):
            sampling = replace(config.narrow(fields, Sampling), seed=(first + index) % 2**64)
            reply = Reply(self.tokenizer, fields.stop, trim)
            request = prompt, self.room(prompt, *wanted), sampling, stops, top
            call.rows.append(Row(call, reply, *request, ends=ends, score=score))
        count, room = len(call.rows), self.scheduler.room
        message = f"{count} rows in one request; the queue holds {room}"
        require(count <= room, 400, message, "n" if n > 1 else "prompt")
        self.scheduler.submit(call)
        return call

    def openai_answer(self, kind, call, fields, choice):
        """Returns a whole answer, or with `stream` a generator of its chunks, in OpenAI's frame.

        choice(piece) makes an entry of "choices" from a Piece.
        """
        id = f"{'chatcmpl' if kind.startswith('chat') else 'cmpl'}-{secrets.token_hex(12)}"
        head = {"id": id, "object": kind, "created": int(time.time()), "model": self.name}
        if not fields.stream:
            choices = [choice(piece) for piece in sorted(call.pieces())]  # one Piece a row
            return head | {"choices": choices, "usage": call.usage()}

        def chunks():
            usage = {"usage": None} if fields.wants_usage else {}  # only the last chunk knows it
            for piece in call.pieces():
                yield head | {"choices": [choice(piece)]} | usage
            if fields.wants_usage:
                yield head | {"choices": [], "usage": call.usage()}

        return chunks()

    def chat(self, body, disconnected):
        """POST /v1/chat/completions: the answer to `messages`."""
        fields = self.read(ChatFields, body)
        param = "max_completion_tokens" if fields.max_completion_tokens else "max_tokens"
        wanted = getattr(fields, param)
        agree = fields.max_tokens in (None, wanted)
        require(agree, 400, f"{param} is {wanted}, max_tokens {fields.max_tokens}", param)
        meant, message = fields.logprobs or fields.top_logprobs is None, "logprobs is not true"
        require(meant, 400, f"top_logprobs is given, but {message}", "top_logprobs")
        top = (fields.top_logprobs or 0) if fields.logprobs else None
        prompt, trim = self.conversation(fields.messages), self.template is not None
        call = self.ask(fields, [prompt], (wanted, param), disconnected, fields.n, top, trim)

        def choice(piece):
            text = {"role": "assistant"} if piece.first else {}
            text |= {"content": piece.text}
            logprobs = None if top is None else self.chat_logprobs(piece)
            choice = {"index": piece.index, "delta" if fields.stream else "message": text}
            return choice | {"logprobs": logprobs, "finish_reason": piece.finish}

        kind = "chat.completion.chunk" if fields.stream else "chat.completion"
        return self.openai_answer(kind, call, fields, choice)

    def spell(self, id):
        """Returns the text and bytes of an id; U+FFFD stands for a part of a character."""
        spelled = self.tokenizer.spelled(id)
        return spelled.decode("utf-8", "replace"), spelled

    def chat_logprobs(self, piece):
        def entry(id, logprob):
            text, spelled = self.spell(id)
            return {"token": text, "logprob": logprob, "bytes": list(spelled)}

        content = []
        for token in piece.tokens:
            others = [entry(id, logprob) for id, logprob in token.top]
            content.append(entry(token.id, token.logprob) | {"top_logprobs": others})
        return {"content": content, "refusal": None}

    def completions(self, body, disconnected):
        """POST /v1/completions: prompts as text or ids; `echo` with `logprobs` also scores them."""
        prompt = body.get("prompt")
        several = isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list)
        if prompt is not None and not several:
            body = body | {"prompt": [prompt]}
        fields = self.read(CompletionFields, body)
        few, top, echo = len(fields.prompt) <= MAX_ROWS, fields.logprobs, fields.echo
        require(few, 400, f"more than {MAX_ROWS} prompts in one request", "prompt")
        require(not echo or not fields.stream, 400, "echo is not supported with stream", "echo")
        some = fields.max_tokens or echo
        require(some, 400, "max_tokens 0 asks for nothing, but with echo", "max_tokens")
        prompts = [
            self.checked_ids(row, "prompt") if isinstance(row, list) else self.continued(row)
            for row in fields.prompt
        ]
        require(all(prompts), 400, "prompt: an empty list of ids; give at least BOS", "prompt")
        wanted = fields.max_tokens, "max_tokens"
        # lm-eval counts on the end of the answer among the tokens
        ends = () if top is None else stop_ids(self.tokenizer, self.template)
        score = (top or 0) if echo and (top is not None or fields.max_tokens == 0) else None
        call = self.ask(
            fields, prompts, wanted, disconnected, fields.n, top, ends=ends, score=score
        )

        def choice(piece):
            piece = self.echoed(piece, call.rows[piece.index]) if echo else piece
            logprobs = None if top is None else self.completion_logprobs(piece)
            choice = {"index": piece.index, "text": piece.text, "logprobs": logprobs}
            return choice | {"finish_reason": piece.finish}

        return self.openai_answer("text_completion", call, fields, choice)

    def echoed(self, piece, row):
        """Returns a piece with the prompt, and its log-probabilities, in front of it."""
        ids, stream, tokens, start = row.prompt, self.tokenizer.stream(), [], 0
        for id, score in zip(ids, row.scores or [(None, [])] * len(ids)):
            tokens.append(Token(start, id, *score))
            start += len(stream.push(id))
        text = self.tokenizer.decode(ids)
        tokens += [token._replace(start=token.start + len(text)) for token in piece.tokens]
        return piece._replace(text=text + piece.text, tokens=tokens)

    def completion_logprobs(self, piece):
        def name(id):
            text, spelled = self.spell(id)
            return "bytes:" + "".join(f"\\x{b:02x}" for b in spelled) if "\ufffd" in text else text

        def alternatives(token):
            if token.logprob is None:  # of the first token nothing is known
                return None
            top = {name(id): logprob for id, logprob in token.top}
            return top | {name(token.id): token.logprob}

        return {
            "tokens": [name(token.id) for token in piece.tokens],
            "token_logprobs": [token.logprob for token in piece.tokens],
            "top_logprobs": [alternatives(token) for token in piece.tokens],
            "text_offset": [token.start for token in piece.tokens],
        }

    def generate(self, body, disconnected):
        """POST /generate: one prompt, by default in the model's own template."""
        fields = self.read(GenerateFields, body)
        template = None if fields.template == "none" else self.template
        if fields.template not in (None, "none", self.template):
            trained = f"{self.name} was trained in {self.template!r}"
            trained = trained if self.template else self.tokenizer.without_template(self.name)
            message = f"template {fields.template[:60]!r}: {trained}; leave it out, or say 'none'"
            raise ApiError(400, message, "template")
        if template:
            require(fields.prompt.strip(), 400, "prompt: there is nothing to answer", "prompt")
            prompt = self.rendered([{"role": "user", "content": fields.prompt}], "prompt")
        else:
            prompt = self.continued(fields.prompt)
        limit = fields.max_new_tokens or max(1, min(128, self.context - len(prompt)))
        wanted, trim = (limit, "max_new_tokens"), template is not None
        call = self.ask(fields, [prompt], wanted, disconnected, trim=trim)
        used = {"max_new_tokens": limit, "template": template, "stop": list(fields.stop)}
        used |= asdict(call.rows[0].sampling)

        def answers():
            for piece in call.pieces():
                answer = {"response": piece.text, "finish_reason": piece.finish}
                last = {"generation_config": used, "usage": call.usage()} if piece.finish else {}
                yield answer | last

        return answers() if fields.stream else next(answers()) | {"prompt": fields.prompt}


# --------------------------------------------------------------------------------------------------
# The scheduler: the one loop that owns the model, and the queue in front of it. A `Call` is one
# client's request, its `Row`s what the engine decodes for it. Rows wait in order of arrival; before
# every step free slots are filled, and whoever went away or ran out of time is dropped. The threads
# that ask hand in a call and read its pieces; they touch neither model nor engine.

PIECE_SECONDS = 0.02  # between two pieces of a row, at least: each takes time from the model
FIRST_TOKEN = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)  # seconds: the histogram's buckets


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
    `score`: compute the log-probabilities of the prompt first, with this many alternatives a token.
    """

    def __init__(self, call, reply, *request, ends=(), score=None):
        super().__init__(*request)
        self.call, self.index, self.reply = call, len(call.rows), reply
        self.ends, self.score, self.scores, self.slot = ends, score, None, None
        self.held, self.tokens, self.text = [], [], ""  # held: tokens whose text is not yet certain
        self.arrival, self.sent_at = time.monotonic(), 0.0

    def push(self, id):
        """Takes the newest id."""
        logprobs = self.logprobs[-1] if self.logprobs else (None, [])
        self.held.append(Token(self.reply.shown + len(self.reply.held), id, *logprobs))
        self.add_text(self.reply.push(id))
        if self.reply.stopped or id in self.ends:
            self.finish = "stop"

    def add_text(self, text, last=False):
        """Adds text. Tokens wait until theirs is certain; in the end some are cut off with it."""
        self.text += text
        reply = self.reply
        if last or not (reply.held or reply.stopped):
            self.tokens += [t for t in self.held if not reply.cut or t.start < reply.shown]
            self.held = []

    def send_piece(self):
        """Sends a Piece of what became certain since the last one."""
        if self.text or self.tokens or self.finish:
            piece = Piece(self.index, not self.sent_at, self.text, self.tokens, self.finish)
            self.call.inbox.put(piece)
            self.text, self.tokens, self.sent_at = "", [], time.monotonic()

    def end(self, failure):
        """Sends the last Piece, or an error if the row failed, or was dropped without a token."""
        finish, nobody = self.finish, ConnectionAbortedError()
        errors = {"error": failure, "disconnected": nobody}
        if not self.ids:
            errors |= {"time": queue_full(), "shutdown": stopping()}
        if finish in errors:
            self.call.inbox.put(errors[finish])
        else:
            self.add_text(self.reply.end(), last=True)
            self.send_piece()


def queue_full():
    message, headers = "too many requests are waiting; try again in a moment", {"Retry-After": "1"}
    return ApiError(429, message, code="queue_full", headers=headers)


def stopping():
    headers = {"Retry-After": "5"}
    return ApiError(503, "the server is stopping", code="stopping", headers=headers)


class Scheduler:
    """Runs calls on one model, in the thread that calls `run`. `room`: rows that may wait in all.

    For anyone to read: `steps`, `prompt_tokens`, `new_tokens`, `first_seconds` (from arrival to the
    first token, summed) and `first_tokens`, their number by the buckets of FIRST_TOKEN.
    """

    def __init__(self, model, slots, room, graphs=False):
        self.model, self.slots, self.room = model, slots, room
        self.engine = Engine(model, slots, graphs=graphs)
        if graphs:  # no request waits for a compiler
            self.engine.rehearse(Sampling(), Sampling(temperature=0))
        self.waiting, self.running = deque(), []  # rows; the running ones have slots of the engine
        self.changed = threading.Condition()  # guards `waiting`
        self.end_time = None  # once the server is to stop: the time after which no row goes on
        self.failure = None  # the newest
        self.steps = self.prompt_tokens = self.new_tokens = self.first_seconds = 0
        self.first_tokens = [0] * (len(FIRST_TOKEN) + 1)

    def submit(self, call):
        """Puts a call's rows into the queue, all or none; ApiError 429 or 503 if it takes none."""
        with self.changed:
            if self.end_time is not None:
                raise stopping()
            if len(self.waiting) + len(call.rows) > self.room:
                raise queue_full()
            self.waiting.extend(call.rows)
            self.changed.notify()

    def close(self, grace):
        """Has `run` return within `grace` seconds; rows without a token by now are given up.

        A signal's handler may call it: it takes no lock.
        """
        self.end_time = time.monotonic() + grace

    def run(self):
        """Works until closed."""
        while self._work():
            try:
                self._drop()
                self._admit()
                self._step()
            except Exception:  # a failure ends the rows it concerns, not the server
                self.failure = internal_error()
                if not any(row.finish == "error" for row in self.running):  # the engine names some
                    for row in self.running:
                        row.finish = "error"

    def _work(self):
        """Waits for work; returns whether there is any before the end."""
        with self.changed:
            while not (self.waiting or self.running or self.end_time is not None):
                self.changed.wait(0.1)  # `close` wakes nobody
            return bool(self.waiting or self.running)

    def _drop(self):
        """Lets go of rows that have ended; ends those whose client is gone or whose time is up."""
        with self.changed:
            rows = [*self.waiting, *self.running]
        dropped = {call for call in {row.call for row in rows} if call.disconnected()}
        now = time.monotonic()
        for row in rows:
            reason = "time" if now > row.call.deadline else None
            if self.end_time is not None and (now > self.end_time or not row.ids):
                reason = "shutdown"
            row.finish = row.finish or ("disconnected" if row.call in dropped else reason)
            if row.finish:
                row.end(self.failure)
        with self.changed:
            self.waiting = deque(row for row in self.waiting if not row.finish)
        self.running = [row for row in self.running if not row.finish]

    def _admit(self):
        """Gives free slots to the oldest rows. Of those that want it, one a turn is scored."""
        with self.changed:
            while self.waiting and len(self.running) < self.slots:
                self.running.append(self.waiting.popleft())
        for row in self.running:
            if row.slot is None and not row.finish:
                with ending([row]):
                    self._join(row)
                if row.scores:
                    return

    def _join(self, row):
        prompt = row.prompt
        self.prompt_tokens += len(prompt)
        if row.score is not None:
            row.scores = next(token_logprobs(self.model, [prompt], row.score))
        if row.max_new_tokens == 0:
            row.finish = "length"
        else:
            (row.slot,) = self.engine.join([row])

    def _step(self):
        for ids in self.engine.advance():
            self.steps += 1
            for row in self.running:
                if row.slot is not None and ids[row.slot] is not None:
                    self._count(row)
                    row.push(ids[row.slot])
                    paused = time.monotonic() - row.sent_at > PIECE_SECONDS
                    if row.call.stream and paused and not row.finish:
                        row.send_piece()

    def _count(self, row):
        self.new_tokens += 1
        if len(row.ids) == 1:
            seconds = time.monotonic() - row.arrival
            self.first_seconds += seconds
            self.first_tokens[bisect_left(FIRST_TOKEN, seconds)] += 1


# --------------------------------------------------------------------------------------------------
# HTTP: who may ask, and where. One request a connection, every byte of it under a deadline.

MAX_CONNECTIONS = 256  # answered at the same time
MAX_TURNED_AWAY = 64  # connections beyond that are told 503; still more wait in the system's queue
MAX_FIRST_LINE, MAX_HEAD, MAX_BODY = 8 << 10, 32 << 10, 1 << 20  # bytes: first line, headers, body
READ_SECONDS = 10  # for the whole request, however it trickles in
SEND_SECONDS = 10  # for each piece of an answer
LINGER_SECONDS = 1  # for the client to read the answer to a request that was not read to its end

REQUEST_LINE = re.compile(rb"[A-Z]{1,20} ([\x21-\x7e]+) HTTP/([0-9]\.[0-9])\r\n")
HEADER_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n")
SINGLE_HEADERS = ["host", "origin", "authorization", "expect", "content-type", "content-length"]
SINGLE_HEADERS += ["content-encoding", "transfer-encoding"]  # two readers may heed different ones
HOST_NAME = r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)"
HOST = re.compile(HOST_NAME + "(:[0-9]{1,5})?")
ADDRESS = re.compile(r"\[.*\]|[0-9.]+")  # as a host: nobody's name


class DeadlineReader(io.RawIOBase):
    """The bytes of a socket until a moment in time, however slowly they come."""

    def __init__(self, sock, seconds):
        self.sock, self.end, self.any = sock, time.monotonic() + seconds, False

    def readable(self):
        return True

    def readinto(self, buffer):
        left = self.end - time.monotonic()
        if left > 0 and readable_within(self.sock, left):
            self.any = True
            return self.sock.recv_into(buffer)
        message = f"the request took longer than {READ_SECONDS} seconds to arrive"
        require(not self.any, 408, message)
        raise TimeoutError  # browsers open connections in advance


def readable_within(sock, seconds=0):
    """Returns whether `recv` returns at once. By poll where it exists: select knows 1,024 files."""
    if not hasattr(select, "poll"):
        return bool(select.select([sock], [], [], seconds)[0])
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


class Handler(BaseHTTPRequestHandler):
    """One request and its answer, counted and logged, whatever they are; then the end.

    http.server alone waits for ever, and takes what two readers of one message may understand
    differently (RFC 9112, request smuggling): folded headers, repeated ones, bare line feeds,
    HTTP/0.9. So every line of the head is checked as bytes before http.server parses it.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each token waits for the last one's ACK
    request_version = "HTTP/1.1"  # until it is read: otherwise no status line would be sent
    command, route, reason, streaming = None, "other", None, False
    discarded = 0  # bytes behind the request

    def setup(self):
        super().setup()
        self.response_headers = self.server.headers
        self.rfile = io.BufferedReader(DeadlineReader(self.connection, READ_SECONDS))

    def handle(self):
        start, status = time.monotonic(), 499  # 499: the client hung up, or did not read
        with suppress(OSError):
            status = self.respond()
        if status == 499 and self.command is None:
            return  # before its request was whole, or without a byte
        with self.server.lock:
            self.server.requests[self.route, status] += 1
        request = f"{self.command} {self.path[:80]}" if self.command else "-"
        reason = f" ({self.reason})" if self.reason else ""
        line = f"{time.strftime('%H:%M:%S')} {self.client_address[0]} {request} {status}"
        log_line(f"{line} {time.monotonic() - start:.3f} s{reason}")

    def finish(self):
        """Closes so that the answer arrives: with bytes unread the connection would be reset."""
        with suppress(OSError, ApiError):
            self.connection.shutdown(socket.SHUT_WR)
            rest = DeadlineReader(self.connection, LINGER_SECONDS)
            while rest.read(1 << 16):
                pass
        super().finish()

    # ---- the request

    def read_head(self):
        """Reads and checks the first line and the headers. Raises ApiError or OSError."""
        plain = self.rfile.peek(1)[:1] in b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        require(plain, 400, "not HTTP; if this is HTTPS: the server speaks plain HTTP")
        line = self.read_line(MAX_FIRST_LINE, 414)
        match = REQUEST_LINE.fullmatch(line)
        require(match, 400, "the first line is not 'METHOD /path HTTP/1.1'")
        require(match[2] in (b"1.1", b"1.0"), 505, "the server speaks HTTP/1.1")
        require(match[1].startswith(b"/"), 400, "the path must begin with /")
        head, header = b"", None
        while header != b"\r\n":
            header = self.read_line(MAX_HEAD - len(head), 431)
            right = header == b"\r\n" or HEADER_LINE.fullmatch(header)
            require(right, 400, "a header is not 'Name: value' on one line that ends in CR LF")
            head += header
        stream, self.raw_requestline, self.rfile = self.rfile, line, io.BytesIO(head)
        self.parse_request()  # sets `command` and `headers`
        self.rfile, self.path = stream, match[1].decode().partition("?")[0]  # no route has a query
        for name in SINGLE_HEADERS:
            require(len(self.headers.get_all(name, ())) < 2, 400, f"{name} stands twice")

    def read_line(self, limit, status):
        line = self.rfile.readline(limit + 1)
        long = f"a first line of more than {MAX_FIRST_LINE} bytes, or headers of {MAX_HEAD}"
        require(len(line) <= limit, status, long)
        if not line.endswith(b"\n"):
            raise ConnectionAbortedError
        return line

    def send_error(self, code, message=None, explain=None):
        """Is called by parse_request, which finds one fault in a checked head: too many headers."""
        raise ApiError(code, HTTPStatus(code).phrase)

    def handle_expect_100(self):
        return True  # read_json says so, once it is clear that the body is wanted

    def header(self, name, default=None):
        value = self.headers.get(name)
        return default if value is None else value.strip(" \t")

    def read_json(self):
        """Returns the fields of a JSON body; ApiError for anything else."""
        kind, _, charset = self.header("content-type", "").lower().partition(";")
        charset = charset.strip().replace('"', "")
        right = kind.strip() == "application/json" and charset in ("", "charset=utf-8")
        require(right, 415, "the body must be JSON: send 'Content-Type: application/json'")
        length, expect = self.body_length(), self.header("expect", "")
        continued = expect.lower() in ("", "100-continue")
        require(continued, 417, "the only expectation understood is 100-continue")
        if expect:
            super().handle_expect_100()
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionAbortedError
        with bad_request(None, "invalid_json"):
            fields = config.parse_json(body.decode("utf-8"), "body")
        problem = 'the body must be a JSON object, {"field": value, ...}'
        require(isinstance(fields, dict), 400, problem, code="invalid_json")
        return fields

    def body_length(self):
        """Returns Content-Length; ApiError unless the body is plain and of a fair, known length."""
        chunked, encoding = "transfer-encoding" in self.headers, self.header("content-encoding")
        require(not chunked, 501, "Transfer-Encoding is not supported; send Content-Length")
        require(encoding in (None, "identity"), 415, "Content-Encoding is not supported")
        length = self.header("content-length")
        require(length is not None, 411, "Content-Length is missing")
        require(re.fullmatch("[0-9]+", length), 400, "Content-Length must be a number of bytes")
        fair = len(length) <= 10 and int(length) <= MAX_BODY
        require(fair, 413, f"a body of more than {MAX_BODY} bytes")
        return int(length)

    def disconnected(self):
        """Returns whether the client has hung up, or sends without end; discards what it sends."""
        try:
            while self.discarded <= MAX_BODY and readable_within(self.connection):
                count = len(self.connection.recv(1 << 16))
                self.discarded += count
                if not count:
                    return True
            return self.discarded > MAX_BODY
        except (OSError, ValueError):  # closed, by the other side or by ours
            return True

    # ---- the gates

    def answer(self):
        """Returns the answer of a route, as `send` takes it."""
        self.read_head()
        server, soon = self.server, {"Retry-After": "1"}
        free = server.active <= MAX_CONNECTIONS
        require(free, 503, "too many connections; try again in a moment", headers=soon)
        self.check_host()
        self.check_origin()
        route = "/v1/models/{model}" if self.path.startswith("/v1/models/") else self.path
        require(route in ROUTES, 404, f"there is no {self.path[:80]} here", code="not_found")
        self.route, methods = route, ROUTES[route]
        if self.command == "OPTIONS" and self.response_headers is not server.headers:
            return ("text/plain", "")  # a preflight
        allowed = ", ".join(methods)
        message, headers = f"{route} takes {allowed}", {"Allow": allowed}
        require(self.command in methods, 405, message, headers=headers)
        if route not in PUBLIC:
            self.check_key()
        loaded = server.api is not None or route == "/"
        require(loaded, 503, "the model is being loaded", code="loading", headers=soon)
        function = methods[self.command]
        if self.command == "POST":
            return function(server.api, self.read_json(), self.disconnected)
        body = self.header("content-length", "0") != "0" or "transfer-encoding" in self.headers
        require(not body, 400, "a GET with a body")
        return function(server, self.path)

    def check_host(self):
        """A page that rebinds its own name to this address (DNS rebinding) still sends its name."""
        match = HOST.fullmatch(self.header("host", ""))
        name = match[1].lower() if match else ""
        ours = name.strip("[]") in self.server.names
        ours = ours or (self.server.outside and ADDRESS.fullmatch(name))
        require("host" in self.headers, 400, "the Host header is missing")
        require(ours, 403, "this server does not go by that Host; name it with --allowed_hosts")

    def check_origin(self):
        """Other web pages must not use the browser of somebody who may ask."""
        origin, host = self.header("origin"), self.header("host")
        if origin in (None, f"http://{host}", f"https://{host}"):
            return
        allowed = origin in self.server.cfg.allowed_origins
        require(allowed, 403, "this Origin may not ask; name it with --allowed_origins")
        self.response_headers = self.server.headers | {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Allow-Headers": "authorization, content-type",
            "Cross-Origin-Resource-Policy": "cross-origin",
            "Vary": "Origin",
        }

    def check_key(self):
        scheme, _, key = self.header("authorization", "").partition(" ")
        right = hmac.compare_digest(key.strip().encode("latin-1"), self.server.key.encode())
        right = not self.server.key or (right and scheme.lower() == "bearer")
        message = "a wrong API key, or none: send 'Authorization: Bearer KEY'"
        headers = {"WWW-Authenticate": "Bearer"}
        require(right, 401, message, code="invalid_api_key", headers=headers)

    # ---- the answer

    def respond(self):
        """Answers the request; returns the status. Raises OSError if there is nobody to answer."""
        try:
            return self.send(200, self.answer())
        except OSError:
            raise
        except Exception as problem:  # whatever it was: the client is told, the server lives on
            error = problem if isinstance(problem, ApiError) else internal_error()
        self.reason = error.code or error.param or str(error)  # no word of the client's
        if not self.streaming:
            return self.send(error.status, error.body(), error.headers)
        self.wfile.write(event(error.body()))
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
        for name, value in (self.response_headers | headers | {"Connection": "close"}).items():
            self.send_header(name, value)
        self.end_headers()


def event(fields):
    """Returns a server-sent event, in ASCII: to some clients U+2028 is a line break."""
    return f"data: {json.dumps(fields, separators=(',', ':'))}\n\n".encode()


# ---- the routes


def chat_page(server, path):
    """The chat page, the only file that is served, read when the server starts."""
    there = server.page is not None
    require(there, 404, "this copy of the code has no chat page (chat.html)", code="not_found")
    return ("text/html; charset=utf-8", server.page)


def health(server, path):
    return {"status": "ok", "model": server.api.name, "context_length": server.api.context}


def model_card(server, path):
    server.api.check_name(unquote(path).removeprefix("/v1/models/"))
    return server.api.card()


def metrics(server, path):
    """Counters in Prometheus' text format."""
    scheduler, lines = server.api.scheduler, []

    def put(kind, name, samples):
        lines.append(f"# TYPE mini_llm_{name} {kind}")
        lines.extend(f"mini_llm_{name}{labels} {value}" for labels, value in samples.items())

    with server.lock:
        counts = sorted(server.requests.items())
    requests = {f'{{route="{route}",status="{status}"}}': n for (route, status), n in counts}
    sums = itertools.accumulate(scheduler.first_tokens)
    first = {f'_bucket{{le="{bound}"}}': n for bound, n in zip((*FIRST_TOKEN, "+Inf"), sums)}
    first |= {"_sum": scheduler.first_seconds, "_count": first['_bucket{le="+Inf"}']}
    prompt, new = scheduler.prompt_tokens, scheduler.new_tokens
    put("counter", "requests_total", requests)
    put("counter", "tokens_total", {'{kind="prompt"}': prompt, '{kind="new"}': new})
    put("counter", "steps_total", {"": scheduler.steps})
    put("gauge", "queue_length", {"": len(scheduler.waiting)})
    put("gauge", "batch_size", {"": len(scheduler.running)})
    put("gauge", "connections", {"": server.active})
    put("histogram", "first_token_seconds", first)  # from a request's arrival
    return ("text/plain; version=0.0.4; charset=utf-8", "\n".join(lines) + "\n")


def get(function):
    return {"GET": function, "HEAD": function}


ROUTES = {
    "/": get(chat_page),
    "/health": get(health),
    "/metrics": get(metrics),
    "/tokenizer_info": get(lambda server, path: server.api.tokenizer_info()),
    "/v1/models": get(lambda server, path: {"object": "list", "data": [server.api.card()]}),
    "/v1/models/{model}": get(model_card),
    "/generate": {"POST": Api.generate},
    "/tokenize": {"POST": Api.tokenize},
    "/detokenize": {"POST": Api.detokenize},
    "/v1/chat/completions": {"POST": Api.chat},
    "/v1/completions": {"POST": Api.completions},
}
PUBLIC = {"/", "/health"}  # without a key: the page holds no secret, and asks for the key itself


# --------------------------------------------------------------------------------------------------
# The command

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

    def __post_init__(self):
        host, origin = "a host's name; write it bare, as box.lan", "an origin, as http://box:3000"
        for field, pattern, form in [
            ("allowed_hosts", HOST_NAME, host),
            ("allowed_origins", r"https?://[^/\s]+", origin),
        ]:
            for text in getattr(self, field):
                if not re.fullmatch(pattern, text):
                    raise ValueError(f"{field}: {text!r} is not {form}")


class Server(ThreadingHTTPServer):
    """Listens, and answers each connection in a thread. `api` is None until the model is loaded."""

    block_on_close = False
    request_queue_size = 1024
    allow_reuse_address = os.name == "posix"
    server_bind = socketserver.TCPServer.server_bind  # HTTPServer's asks a name server first

    def __init__(self, cfg, key):
        self.cfg, self.key, self.api = cfg, key, None
        self.lock, self.active, self.requests = threading.Lock(), 0, Counter()
        self.page = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else None
        self.headers = security_headers(self.page or "")
        self.names = {"localhost", "127.0.0.1", "::1", cfg.host, *cfg.allowed_hosts}
        self.names = {name.lower().strip("[]") for name in self.names}
        try:
            places = socket.getaddrinfo(cfg.host, cfg.port, type=socket.SOCK_STREAM)
            self.address_family, *_, address = places[0]
            ip = ipaddress.ip_address(address[0].partition("%")[0])
            self.outside = not ip.is_loopback
            if self.outside and not key:
                raise UserError(
                    f"host={cfg.host} is open to others, and there is no API key: set the "
                    "environment variable MINI_LLM_API_KEY or give --api_key_file, or listen on "
                    "--host=127.0.0.1"
                )
            super().__init__(address, Handler)
        except (OSError, UnicodeError) as problem:
            reason = getattr(problem, "strerror", None) or problem
            raise UserError(
                f"host={cfg.host} port={cfg.port}: cannot listen there: {reason}; choose an "
                "address of this machine, as 127.0.0.1, and a free port, or --port=0"
            ) from None

    def process_request(self, request, client_address):
        while self.active >= MAX_CONNECTIONS + MAX_TURNED_AWAY:
            time.sleep(0.01)  # meanwhile others wait in the system's queue
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address):
        with self.lock:
            self.active += 1
        super().process_request_thread(request, client_address)
        with self.lock:
            self.active -= 1

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # a client that hung up at once
            internal_error()

    def stop(self, *_):
        """Begins to stop, on a signal; on a second one stops at once."""
        if self.api is None:  # loading a model may take minutes, and nobody waits for an answer
            os._exit(0)
        scheduler = self.api.scheduler
        if scheduler.end_time is not None:
            raise KeyboardInterrupt
        scheduler.close(GRACE_SECONDS)
        text = f"stopping; answers under way have {GRACE_SECONDS} seconds"
        threading.Thread(target=log_line, args=[text], daemon=True).start()  # it takes a lock


def security_headers(page):
    """Returns headers for all answers. Only the page's own <script>s and <style>s will run."""

    def hashes(tag):
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.S)
        digests = [base64.b64encode(hashlib.sha256(b.encode()).digest()).decode() for b in blocks]
        return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"

    policy = f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
    policy += "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    return {
        "Content-Security-Policy": policy + "frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
        "Cross-Origin-Resource-Policy": "same-origin",
    }


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
        expected = "a key is 8 to 200 letters, digits and signs, no spaces"
        raise UserError(f"{source}: {expected}; got {len(key)}")
    return key or ""


def name_of(folder):
    """Returns what to call a model folder: its name, or its training's if that says more."""
    folder = model_folder(folder).resolve()
    general = folder.name == "final" or re.fullmatch(r"step_\d+", folder.name)
    return folder.parent.name if general else folder.name


def main(cfg):
    with Server(cfg, read_key(cfg)) as server:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, server.stop)
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        patience = threading.Timer(2, log_line, [f"loading {cfg.model_path}"])
        patience.daemon = True
        patience.start()
        model, tokenizer = open_model(cfg.model_path, cfg.device, cfg.dtype, cfg.compile)
        patience.cancel()
        if tokenizer.template is None:
            log_line(tokenizer.without_template(cfg.model_path))
        scheduler = Scheduler(model, cfg.slots, cfg.queue, cfg.compile)
        name = cfg.model_name or name_of(cfg.model_path)
        server.api = Api(scheduler, tokenizer, name, cfg.request_seconds)
        print(start_line(server, model), flush=True)
        scheduler.run()  # in the thread that loaded the model: OpenMP keeps threads for each
        time.sleep(0.1)  # whoever is in the system's queue already is told, not reset
        end = time.monotonic() + 0.5
        while server.active and time.monotonic() < end:  # last words are being sent
            time.sleep(0.01)


def start_line(server, model):
    """Returns the line that says where the server is, and what it serves."""
    api, weight, host = server.api, model.lm_head.weight, server.cfg.host
    host = f"[{host}]" if ":" in host else host
    size = sum(p.numel() for p in model.parameters()) / 1e6
    kind = f"{api.name}, {size:.1f}M parameters, template {api.template or 'none'}"
    place = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
    url = f"http://{host}:{server.server_address[1]}"
    return f"{url}  {kind}; {place}, context {api.context}, {server.cfg.slots} slots"


if __name__ == "__main__":
    config.run(main, ServerConfig, __doc__)
    os._exit(0)  # slow clients may hold threads still, and Python takes seconds to end torch
