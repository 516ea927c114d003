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
from dataclasses import asdict, dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import unquote

import torch

from lib import config
from lib.config import PositiveFloat, PositiveInt, Range, UserError
from lib.conversation import (
    check_messages,
    find_template,
    render_prompt,
    stop_ids,
    template_notes,
    template_of,
)
from model import model_folder
from sample import Engine, Reply, Request, Sampling, generate, open_model


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
# (field, a value that some clients send, what it means here); None is a field left out
MEANT = [("top_k", -1, 0), ("top_p", 0, 1e-9), ("model", "", None), ("stop", "", None)]
MEANT += [("max_tokens", -1, None), ("max_completion_tokens", -1, None), ("best_of", 1, None)]
MEANT += [("tools", [], None), ("tool_choice", "none", None), ("tool_choice", "auto", None)]
MEANT += [("response_format", {"type": "text"}, None), ("suffix", "", None)]
FORMATS = '{"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": {...}}}'


@dataclass(frozen=True, kw_only=True)
class GenerationFields(Sampling):
    model: str | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    seed: Annotated[int, Range(-(2**63), 2**64 - 1)] | None = None  # negative: a fresh one
    frequency_penalty: Annotated[float, Range(-2, 2)] = 0.0
    presence_penalty: Annotated[float, Range(-2, 2)] = 0.0
    logit_bias: dict = field(default_factory=dict)  # {an id as text: -100 to 100}
    response_format: dict | None = None


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
        self.ends, self.fingerprint = stop_ids(tokenizer, tokenizer.template), None

    def card(self):
        """Returns the model's entry: OpenAI's four fields, and the page's needs."""
        settings = {"max_tokens": {"min": 1, "max": self.context - 1, "default": None}}
        for name, option in config.options_of(Sampling).items():
            low = option.limits.low + 0.01 * option.limits.open_low  # for a slider
            settings[name] = {"min": low, "max": option.limits.high, "default": option.default}
        card = {"id": self.name, "object": "model", "created": self.started, "owned_by": "mini-llm"}
        card |= {"context_length": self.context, "template": self.template}
        return card | {"settings": settings}

    def health(self):
        return {"status": "ok", "model": self.name, "context_length": self.context}

    def tokenizer_info(self):
        """Returns what lm-eval asks about a tokenizer that it can't load itself."""
        ids, pieces = self.tokenizer.special_ids, self.tokenizer.pieces
        template = self.template and find_template(self.tokenizer, self.template).plain_text()
        return {f"{role}_token": pieces[ids[role]] for role in ids} | {"chat_template": template}

    def tokenize(self, body, disconnected):
        fields = self.read(TokenFields, body)
        if fields.messages is not None:
            ids = self.conversation(fields.messages)
        else:
            require(fields.prompt is not None, "prompt is missing", "prompt")
            control = self.tokenizer.controls.get(fields.prompt)  # lm-eval asks so for BOS's id
            text = self.tokenizer.encode(fields.prompt) if control is None else [control]
            ids = (self.tokenizer.opening if fields.add_special_tokens else []) + text
        return {"tokens": ids, "count": len(ids), "max_model_len": self.context}

    def detokenize(self, body, disconnected):
        ids = self.ids_of(self.read(TokenFields, body).tokens, "tokens")
        return {"prompt": self.tokenizer.decode(ids)}

    def read(self, cls, body):
        """Returns the `cls` that a body makes; an error names the first field that is wrong."""
        options, values = config.options_of(cls), {}
        for name, value in body.items():
            same = (ours for field, theirs, ours in MEANT if (field, theirs) == (name, value))
            value = value if isinstance(value, bool) else next(same, value)
            unused = name == "tools" and body.get("tool_choice") == "none"
            if name in IGNORED or value is None or unused:
                continue
            key = name[:60]
            require(name in options, f"{key} is not supported here", key, "unsupported_parameter")
            value = [value] if name == "stop" and isinstance(value, str) else value
            values[name] = config.accept(name, value, options[name], "request")
        for name, option in options.items():
            given = name in values or option.default is not config.NO_DEFAULT
            require(given, f"{name} is missing", name, "missing_required_parameter")
        name = values.get("model", self.name)  # another's answer would be a silent substitute
        message = f"the model {name[:60]!r} is not served here, only {self.name!r} is"
        require(name == self.name, message, "model", "model_not_found", 404)
        return cls(**values)

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
        for message in messages:
            require(isinstance(message, dict), "a message is an object", "messages")
            require(not message.get("tool_calls"), "tool_calls is not supported here", "messages")
            if message.get("role") == "developer":  # OpenAI's newer name
                message["role"] = "system"
            parts = message.get("content")
            if isinstance(parts, list):  # of texts, as some clients send it
                right = all(isinstance(p, dict) and type(p.get("text")) is str for p in parts)
                require(right, "content must be a text, or a list of texts", "messages")
                parts = "".join(part["text"] for part in parts)
            message["content"] = "" if parts is None else parts
        # an empty system prompt is none, and an empty answer no reason to end the conversation
        turns = [m for m in messages if str(m["content"]).strip() or m.get("role") == "user"]
        check_messages(turns)
        return render_prompt(self.tokenizer, turns if self.template else messages, self.template)

    def steering(self, fields):
        """Returns the arguments of a Row by which a request's fields change the logits."""
        penalties = fields.frequency_penalty, fields.presence_penalty
        grammar = None if fields.response_format is None else self.grammar(fields.response_format)
        if not (any(penalties) or fields.logit_bias or grammar):
            return {}
        bias = torch.zeros(self.tokenizer.vocab_size)
        for id, value in fields.logit_bias.items():
            right = id.isdecimal() and len(id) < 9 and int(id) < len(bias)
            right = right and type(value) in (int, float) and abs(value) <= 100
            require(right, f"logit_bias: ids in 0..{len(bias) - 1}, each -100 to 100", "logit_bias")
            bias[int(id)] = value
        return {"bias": bias, "penalties": penalties, "grammar": grammar}

    def grammar(self, wanted):
        """Returns llguidance's matcher of JSON, or of a schema, for a response_format."""
        with config.refusing(ImportError, "response_format", "pip install llguidance"):
            from llguidance import LLMatcher
        schema = {"type": "object"} if wanted == {"type": "json_object"} else None
        if wanted.get("type") == "json_schema" and isinstance(wanted.get("json_schema"), dict):
            schema = wanted["json_schema"].get("schema")
        require(isinstance(schema, dict), f"response_format must be {FORMATS}", "response_format")
        style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=style)
        return LLMatcher(self.vocabulary, grammar, log_level=0)

    @cached_property
    def vocabulary(self):
        """The tokenizer as llguidance reads it, made when a request first needs it."""
        from llguidance import LLTokenizer, TokenizerWrapper

        start = self.tokenizer.encode("\2")  # it joins nothing, so texts behind it get no prefix
        encode = lambda text: self.tokenizer.encode("\2" + text)[len(start) :]
        encode.tokens = [self.tokenizer.spelled(id) for id in range(self.tokenizer.vocab_size)]
        encode.special_token_ids = list(self.tokenizer.controls.values())
        encode.bos_token_id, encode.eos_token_id = None, self.ends[0]
        return LLTokenizer(TokenizerWrapper(encode), eos_token=self.ends, slices=[])

    def ask(self, fields, disconnected, prompts, wanted, n=1, trim=False, cut=False, **more):
        """Submits a Call of each prompt n times. `cut`: fewer tokens than wanted if no more fit."""
        fair = len(fields.stop) <= 8 and all(1 <= len(text) <= 256 for text in fields.stop)
        require(fair, "stop: up to 8 texts, each of 1 to 256 characters", "stop")
        count, most = len(prompts) * n, self.scheduler.room
        require(count <= most, f"{count} rows in one request; the queue holds {most}", "n")
        param = "max_new_tokens" if isinstance(fields, GenerateFields) else "max_tokens"
        call = Call(disconnected, time.monotonic() + self.seconds, fields.stream)
        more |= self.steering(fields)
        for sampling, prompt in zip(fields.seeded(count), (p for p in prompts for _ in range(n))):
            size, room = len(prompt), self.context - len(prompt)
            longest = room if wanted is None else min(wanted, room) if cut else wanted
            message = f"This model's maximum context length is {self.context} tokens; the prompt "
            message += f"has {size}, which leaves {max(0, room)}: shorten it or ask for less"
            fits = longest <= room and (room > 0 or wanted == 0)
            require(fits, message, param, "context_length_exceeded")
            reply = Reply(self.tokenizer, fields.stop, trim)
            call.rows.append(Row(call, reply, prompt, longest, sampling, self.ends, **more))
        self.scheduler.submit(call)
        return call

    def chat(self, body, disconnected):
        fields = self.read(ChatFields, body)
        wanted, top = fields.max_completion_tokens or fields.max_tokens, fields.top_logprobs
        require(fields.max_tokens in (None, wanted), "max_completion_tokens differs", "max_tokens")
        require(fields.logprobs or not top, "logprobs is not true", "top_logprobs")
        prompts = [self.conversation(fields.messages)]
        row = {"top_logprobs": (top or 0) if fields.logprobs else None}
        begun = fields.messages[-1].get("role") == "assistant"  # the rest may begin with a space
        row["trim"] = self.template is not None and not begun
        return self.openai_answer(fields, fields.logprobs, disconnected, prompts, wanted, **row)

    def completions(self, body, disconnected):
        """Prompts are text or ids; `echo` with `logprobs` also scores them."""
        prompt = body.get("prompt")
        ids = isinstance(prompt, list) and all(type(id) is int for id in prompt)
        single = isinstance(prompt, str) or ids
        fields = self.read(CompletionFields, body | ({"prompt": [prompt]} if single else {}))
        top, echo = fields.logprobs, fields.echo
        wanted = None if body.get("max_tokens") == -1 else fields.max_tokens
        require(not echo or not fields.stream, "echo is not supported with stream", "echo")
        prompts = [self.ids_of(prompt) for prompt in fields.prompt]
        require(all(prompts), "prompt: an empty list of ids; give at least BOS", "prompt")
        row = {"echo": echo, "top_logprobs": (top or 0) if echo else top}
        row["cut"] = wanted in (16, 256)  # OpenAI's and LangChain's defaults: nobody's wish
        return self.openai_answer(fields, top is not None, disconnected, prompts, wanted, **row)

    def openai_answer(self, fields, scored, *asked, **row):
        """Returns an answer, or with `stream` a generator of chunks. `scored`: with logprobs."""
        counted = (fields.stream_options or {}).get("include_usage")
        call, chat = self.ask(fields, *asked, n=fields.n, **row), isinstance(fields, ChatFields)
        kind = "chat.completion" + ".chunk" * fields.stream if chat else "text_completion"
        head = {"id": f"{'chat' * chat}cmpl-{secrets.token_hex(12)}", "object": kind}
        head |= {"created": int(time.time()), "model": self.name}
        head |= {"system_fingerprint": self.fingerprint}

        def choice(piece):
            piece = self.echoed(piece, call.rows[piece.index]) if row.get("echo") else piece
            logprobs = self.chat_logprobs if chat else self.completion_logprobs
            shared = {"index": piece.index, "finish_reason": piece.finish}
            shared |= {"logprobs": logprobs(piece.tokens, piece.end) if scored else None}
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
        asked = fields.template
        same = asked in (None, "none") or template_of(self.tokenizer, asked) == self.template
        message = f"this model has {self.template or 'none'!r}; leave the field out, or say 'none'"
        require(same, message, "template")
        template = None if asked == "none" else self.template
        messages = [{"role": "user", "content": fields.prompt}]
        prompt = self.conversation(messages) if template else self.ids_of(fields.prompt)
        limit = fields.max_new_tokens or max(1, min(128, self.context - len(prompt)))
        call = self.ask(fields, disconnected, [prompt], limit, trim=template is not None)
        used = {"max_new_tokens": limit, "template": template, "stop": list(fields.stop)}
        used |= asdict(call.rows[0].sampling)

        def answers():
            for piece in call.pieces():
                answer = {"response": piece.text, "finish_reason": piece.finish}
                ended = {"generation_config": used, "usage": call.usage()}
                yield answer | ended if piece.finish else answer

        return answers() if fields.stream else next(answers()) | {"prompt": fields.prompt}

    def chat_logprobs(self, tokens, end):
        """Our page shows `end`, the token that ended the turn; OpenAI leaves it out."""

        def entry(id, logprob):
            spelled = self.tokenizer.spelled(id)
            text = spelled.decode("utf-8", "replace")  # U+FFFD stands for a part of a character
            return {"token": text, "logprob": logprob, "bytes": list(spelled)}

        def with_top(token):
            tops = [entry(*pair) for pair in token.top]
            return entry(token.id, token.logprob) | {"top_logprobs": tops}

        ended = {"end": with_top(*end)} if end else {}
        return {"content": list(map(with_top, tokens)), "refusal": None} | ended

    def completion_logprobs(self, tokens, end):
        def name(id):
            spelled = self.tokenizer.spelled(id)
            text = spelled.decode("utf-8", "replace")
            return "bytes:" + "".join(f"\\x{b:02x}" for b in spelled) if "\ufffd" in text else text

        tokens = tokens + end  # lm-eval counts on it
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
        tokens += [t._replace(start=t.start + len(text)) for t in piece.tokens + piece.end]
        return piece._replace(text=text + piece.text, tokens=tokens, end=[])


# ---- The scheduler: the one loop that owns the model, and the queue in front of it. The threads
# that ask hand in a Call and read its Pieces; they touch neither model nor engine.

PIECE_SECONDS = 0.02  # between two pieces of a row, at least: each takes time from the model
RETRY = {"Retry-After": "1"}
REFUSALS = {  # of a row without a token, by the reason why it ends: arguments of ApiError
    "time": ("too many requests are waiting; try again", None, "queue_full", 429, RETRY),
    "shutdown": ("the server is stopping", None, "stopping", 503, RETRY),
}

# Newly certain text and Tokens of a row; at its end the finish reason and [the stop id's Token].
Piece = namedtuple("Piece", "index first text tokens finish end")
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
    """The engine's Request, and the certain part of its answer that is not yet sent."""

    def __init__(self, call, reply, *request, bias=None, penalties=None, grammar=None, **more):
        super().__init__(*request, **more)
        self.call, self.index, self.reply = call, len(call.rows), reply
        self.tokens, self.text, self.sent_at, self.end = [], "", 0.0, []
        if bias is not None:
            self.penalties, self.sums = penalties, bias.clone()
            self.grammar = grammar and grammar.deep_copy()
            self.steer()

    def take(self, id, limit, logprob):
        """As Request's; also sends the text that is now certain, but not too often."""
        if self.finish is None and self.top_logprobs is not None:
            start = self.reply.shown + len(self.reply.held)
            token = Token(start, id, logprob[0], logprob[1][: self.top_logprobs])
            (self.end if id in self.stop_ids else self.tokens).append(token)
        id = super().take(id, limit, logprob)
        if id is not None and self.bias is not None:
            self.steer()
        if id is not None:
            self.text += self.reply.push(id)
            self.finish = "stop" if self.reply.stopped else self.finish
            late = time.monotonic() - self.sent_at > PIECE_SECONDS
            if self.call.stream and self.text and late and not self.finish:
                self.send()
        return id

    def steer(self):
        """Sets `bias` for what follows the newest id: logit_bias, penalties, the grammar's word."""
        (frequency, presence), newest = self.penalties, self.ids[-1:]  # none before the first
        for id in newest:  # OpenAI's formula; it counts the answer's ids alone
            self.sums[id] -= frequency + presence * (self.ids.count(id) == 1)
        self.bias = self.sums
        if self.grammar:
            self.grammar.try_consume_tokens(newest)
            allowed = bytearray(self.grammar.compute_logit_bias())  # a byte for each id; 0: refused
            refused = torch.frombuffer(allowed, dtype=torch.uint8) == 0
            self.bias = self.sums.masked_fill(refused, -torch.inf)
            if self.grammar.is_error():  # as a schema that nothing fits
                self.finish, problem = "error", f"response_format: {self.grammar.get_error():.200}"
                self.call.inbox.put(ApiError(problem, "response_format"))

    def send(self):
        """Sends what is new: text and tokens. In the end some may be cut off with their text."""
        whole = self.finish and not self.reply.cut
        tokens = [token for token in self.tokens if whole or token.start < self.reply.shown]
        parts = self.index, not self.sent_at, self.text, tokens, self.finish, self.end
        self.call.inbox.put(Piece(*parts))
        self.tokens, self.text, self.sent_at = self.tokens[len(tokens) :], "", time.monotonic()


class Scheduler:
    """Runs calls on one model, in the thread that calls `run`. `room`: rows that may wait in all.

    `rows` holds all in order of arrival; the first `slots` are running, the others wait.
    """

    def __init__(self, model, slots, room, graphs=False):
        self.slots, self.room, self.engine = slots, room, Engine(model, slots, graphs=graphs)
        if graphs:  # no request waits for a compiler
            for sampling in (Sampling(), Sampling(temperature=0)):
                list(generate(model, [Request([0], self.engine.limit, sampling)], self.engine))
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
        while self.rows or not self.closing:
            with self.changed:
                if not self.rows:
                    self.changed.wait(0.1)  # `close` wakes nobody
            try:
                self.drop()
                running = self.rows[: self.slots]
                joining = [row for row in running if row not in self.engine.requests]
                self.engine.join(joining)
                self.prompt_tokens += sum(len(row.prompt) for row in joining)
                for ids in self.engine.advance():
                    self.new_tokens += sum(id is not None for id in ids)
            except Exception as problem:  # it ends the rows it concerns, not the server
                named = [row for row in running if row.finish == "error"]  # by the engine
                for row in named or running:
                    row.finish = "error"
                    row.call.inbox.put(problem)

    def drop(self):
        """Lets go of rows that have ended; ends those whose client is gone or whose time is up."""
        rows, closing, now = list(self.rows), self.closing, time.monotonic()
        gone = {call for call in {row.call for row in rows} if call.disconnected()}
        for row in rows:
            reason = "shutdown" if closing else "time" if now > row.call.deadline else None
            row.finish = row.finish or ("disconnected" if row.call in gone else reason)
            if row.finish in REFUSALS and not row.ids:
                row.call.inbox.put(ApiError(*REFUSALS[row.finish]))
            elif row.finish not in (None, "error"):
                row.text += row.reply.push()
                row.send()
        with self.changed:
            self.rows = [row for row in self.rows if not row.finish]


# ---- HTTP: who may ask, and where. One request a connection, every byte of it under a deadline.

MAX_CONNECTIONS = 256  # answered at the same time; others are told 503
MAX_HEAD, MAX_BODY = 32 << 10, 1 << 20  # bytes: first line and headers, body
PAGE = Path(__file__).with_name("web").joinpath("chat.html").read_text(encoding="utf-8")

# The page loads nothing from elsewhere, sends nothing elsewhere, and stands in nobody's frame. Of
# scripts and styles only its own are allowed, by their hashes.
POLICY = "default-src 'none'; frame-ancestors 'none'; "
for tag in ("script", "style"):
    (block,) = re.findall(f"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
    POLICY += f"{tag}-src 'sha256-{digest}'; "
POLICY += "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
HEADERS = {"Content-Security-Policy": POLICY}
HEADERS |= {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Connection": "close"}
READ_SECONDS = 10  # for the whole request, however it trickles in
SEND_SECONDS = 10  # for each piece of an answer
HEADER = r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e\x80-\xff]*)\r\n"
HEAD = re.compile(rf"([A-Z]{{1,20}}) (/[\x21-\x7e]*) HTTP/1\.([01])\r\n((?:{HEADER})*)\r\n")
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(;[\t\x20-\x7e]*)?\r\n")
SINGLE = {"host", "origin", "authorization", "content-type", "content-length", "transfer-encoding"}
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
    9112, request smuggling). So the head is read here, and matched by a pattern as a whole.
    """

    protocol_version = request_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each token waits for the last one's ACK
    command, path, route, streaming = "-", "", "other", False

    def setup(self):
        super().setup()
        self.headers, self.allow_origin = {}, {}
        self.request_id = f"req_{secrets.token_hex(12)}"
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
        plain = self.rfile.peek(1)[:1].isupper()
        require(plain, "not HTTP; if this is HTTPS: the server speaks plain HTTP")
        line, head = "-", ""
        while line.strip("\r\n"):
            line = self.rfile.readline(MAX_HEAD).decode("latin-1")
            head += line
            require(len(head) < MAX_HEAD, "too long a head", status=431 if "\n" in head else 414)
        match = HEAD.fullmatch(head)
        require(match, "not 'METHOD /path HTTP/1.1' and 'Name: value' in lines that end in CR LF")
        for name, value in re.findall(HEADER, match[4]):
            name = name.lower()
            require(name not in self.headers or name not in SINGLE, f"{name} stands twice")
            self.headers[name] = value.strip(" \t")
        self.command, self.path = match[1], match[2].partition("?")[0]  # no route has a query
        if match[3] == "0" and self.path == "/health":  # probes that send no Host
            self.headers.setdefault("host", "localhost")

    def read_json(self):
        """Returns the fields of a JSON body of a fair length; ApiError for anything else."""
        kind, length = self.headers.get("content-type", ""), self.headers.get("content-length")
        plain = JSON_TYPE.fullmatch(kind) and "content-encoding" not in self.headers
        require(plain, "send 'Content-Type: application/json', not compressed", status=415)
        chunked = "transfer-encoding" in self.headers
        known = not chunked or self.headers["transfer-encoding"].lower() == "chunked"
        require(known, "of transfer-encoding only chunked is supported", status=501)
        require(not chunked or length is None, "Content-Length and Transfer-Encoding: which holds?")
        require(chunked or length is not None, "Content-Length is missing", status=411)
        require(chunked or re.fullmatch("[0-9]+", length), "Content-Length must be a number")
        require(chunked or float(length) <= MAX_BODY, f"over {MAX_BODY} bytes", status=413)
        if "expect" in self.headers:  # RFC 9110 10.1.1 knows only 100-continue
            self.handle_expect_100()
        body = b"".join(self.chunks()) if chunked else self.rfile.read(int(length))
        fields = config.parse_json(body.decode("utf-8"), "body")
        require(isinstance(fields, dict), 'the body must be a JSON object, {"field": value}')
        return fields

    def chunks(self):
        """Yields a chunked body (RFC 9112 7.1) without extensions; nobody reads its trailers."""
        size, left = 1, MAX_BODY
        while size:
            match = CHUNK.fullmatch(self.rfile.readline(1 << 10))
            require(match, "a chunk must begin with its size, in hexadecimal digits")
            size = int(match[1], 16)
            left -= size
            require(left >= 0, f"over {MAX_BODY} bytes", status=413)
            yield self.rfile.read(size)
            require(not size or self.rfile.read(2) == b"\r\n", "a chunk must end in CR LF")

    def disconnected(self):
        """Returns whether the client has hung up; discards what else it sends."""
        with suppress(OSError, ValueError):  # closed, by the other side or by ours
            ready = select.select([self.connection], [], [], 0)[0]
            return bool(ready) and not self.connection.recv(1 << 16)
        return True

    def check_client(self):
        """Other web pages must not use the browser of somebody who may ask."""
        host, origin = self.headers.get("host"), self.headers.get("origin")
        require(host is not None, "the Host header is missing")
        # a page that rebinds its own name to this address (DNS rebinding) still sends its name
        name = host_name(host)
        ours = name in self.server.names or re.fullmatch(r"[0-9.]+|\[.*\]", name)
        require(ours, "another's Host; name it with --allowed_hosts", status=403)
        if origin not in (None, f"http://{host}", f"https://{host}"):
            allowed = origin in self.server.origins
            require(allowed, "another's Origin; name it with --allowed_origins", status=403)
            self.allow_origin = {"Access-Control-Allow-Origin": origin}
            asked = self.headers.get("access-control-request-headers", "")
            self.allow_origin |= {"Access-Control-Allow-Headers": asked}

    def answer(self):
        """Returns the answer of a route, as `send` takes it."""
        self.read_head()
        free = len(self.server.active) <= MAX_CONNECTIONS or self.path == "/health"
        require(free, "too many connections; try again", status=503, headers=RETRY)
        self.check_client()
        own = unquote(self.path) == f"/v1/models/{self.server.api.name}"
        route = "/v1/models/{model}" if own else self.path
        message = f"there is no {route[:80]} here, but {', '.join(ROUTES)}; OpenAI's clients take "
        message += f"base_url=http://{self.headers['host']}/v1"
        require(route in ROUTES, message, code="not_found", status=404)
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
            sys.stderr.write(f"error {self.request_id}: {traceback.format_exc()}")
            message = f"internal error {self.request_id}: see the log"
            error = ApiError(message, code="internal", status=500)
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
        fields = {"message": str(error), "type": kind, "param": error.param, "code": error.code}
        if not self.streaming:
            return self.send(error.status, {"error": fields}, error.headers)
        self.wfile.write(event({"error": fields}))
        return 200

    def send(self, status, answer, headers=()):
        """Sends a dict as JSON, a generator of dicts as server-sent events, or (type, text)."""
        if isinstance(answer, Iterator):
            first = event(next(answer))  # a failure before it still gets a status of its own
            self.streaming, kind = True, {"Content-Type": "text/event-stream; charset=utf-8"}
            parts = itertools.chain([first], map(event, answer), [b"data: [DONE]\n\n"])
        else:
            if isinstance(answer, dict):
                answer = "application/json", json.dumps(answer, ensure_ascii=False)
            parts = [answer[1].encode("utf-8", "replace")]
            kind = {"Content-Type": answer[0], "Content-Length": str(len(parts[0]))}
        self.connection.settimeout(SEND_SECONDS)  # for each write, however slowly it is read
        self.send_response_only(status)
        own = {"Date": self.date_time_string(), "X-Request-Id": self.request_id}
        for name, value in (own | HEADERS | self.allow_origin | kind | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        for part in parts if self.command != "HEAD" else ():
            self.wfile.write(part)
        return status


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
        self.names = {"localhost", cfg.host.lower(), *map(host_name, cfg.allowed_hosts)}
        self.origins = {origin.rstrip("/") for origin in cfg.allowed_origins}
        if not key and not re.fullmatch(r"localhost|127\.[0-9.]+", cfg.host):
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
        sys.stderr.writelines(f"{line}\n" for line in template_notes(tokenizer, cfg.model_path))
        scheduler = Scheduler(model, cfg.slots, cfg.queue, cfg.compile)
        folder = model_folder(cfg.model_path).resolve()  # whose name says little if it is final/
        folder = folder.parent if re.fullmatch(r"final|step_\d+", folder.name) else folder
        name = cfg.model_name or folder.name
        api = server.api = Api(scheduler, tokenizer, name, cfg.request_seconds)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, scheduler.close)
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        url = f"http://{cfg.host}:{server.server_address[1]}"
        weight = model.model.embed_tokens.weight
        kind = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
        logits = model(scheduler.engine.tokens[:1] * 0).detach().float().cpu().numpy()
        api.fingerprint = f"fp_{hashlib.sha256(logits.tobytes()).hexdigest()[:12]}"
        kind += f", context {api.context}, {cfg.slots} slots"
        print(f"{url}  {name}, template {api.template or 'none'}; {kind}", flush=True)
        scheduler.run()  # in the thread that loaded the model: OpenMP keeps threads for each
        time.sleep(0.5)  # last words are being sent, and whoever has just called is told


if __name__ == "__main__":
    config.run(main, ServerConfig, __doc__)
    os._exit(0)  # slow clients may hold threads still, and Python takes seconds to end torch
