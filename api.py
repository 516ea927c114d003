"""What the routes take and give: OpenAI's shapes, and /generate. No HTTP here, only JSON values.

Every function takes the fields of a request as a dict and returns the fields of the answer, or a generator of
them for a stream. A field is declared once, in a dataclass below: its annotation is its check. Fields that
would change the answer and are not supported are refused, never ignored.
"""

import functools
import secrets
import time
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated

from lib.config import PositiveInt, Range, UserError, accept, did_you_mean, knobs_of, narrow
from lib.tokenizer import ROLES, TEMPLATES, jinja, render, stop_ids
from sample import Request, Sampling
from scheduler import Call, Closed, Failed, Full, Job, Piece, Token

ROWS = 64  # prompts x n of one request, at most
IGNORED = {  # fields of OpenAI's that change nothing here
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
}
NEUTRAL = {  # not supported, but harmless with these values
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "best_of": (1,),
    "suffix": ("",),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}


class ApiError(Exception):
    """A request that is answered with an error: HTTP status, message, and the field it is about."""

    def __init__(self, status, message, param=None, code=None, headers=()):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers)

    def fields(self):
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = (
            "server_error"
            if self.status >= 500
            else kinds.get(self.status, "invalid_request_error")
        )
        message = " ".join(str(self).split("\n"))
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def reason(self):
        """Returns why in words that a log may hold: ours, none of the client's."""
        if self.param is None or self.code == "unknown_parameter":  # which is the client's word
            return self.code or str(self)
        return f"{self.param}: {self.code or 'not accepted'}"


# ----------------------------------------------------------------------------------------------
# The fields


@dataclass(frozen=True, kw_only=True)
class Common(Sampling):
    """What every route that generates takes, beside its prompt."""

    model: str | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False


@dataclass(frozen=True, kw_only=True)
class OpenAI(Common):
    """What both of OpenAI's routes take."""

    n: Annotated[int, Range(1, ROWS)] = 1
    stream_options: dict | None = None

    def __post_init__(self):
        if type(self.wants_usage) is not bool:
            message = "stream_options.include_usage must be true or false"
            raise ApiError(400, message, "stream_options")

    @property
    def wants_usage(self):
        return (self.stream_options or {}).get("include_usage") or False


@dataclass(frozen=True, kw_only=True)
class ChatFields(OpenAI):
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Range(0, 20)] | None = None


@dataclass(frozen=True, kw_only=True)
class CompletionFields(OpenAI):
    max_tokens: Annotated[int, Range(0)] | None = None
    echo: bool = False
    logprobs: Annotated[int, Range(0, 20)] | None = None


@dataclass(frozen=True, kw_only=True)
class GenerateFields(Common):
    max_new_tokens: PositiveInt | None = None
    template: str | None = None


@dataclass(frozen=True, kw_only=True)
class DetokenizeFields:
    model: str | None = None


@dataclass(frozen=True, kw_only=True)
class TokenizeFields(DetokenizeFields):
    add_special_tokens: bool = False


knobs = functools.cache(knobs_of)


def read(cls, body, *own):
    """Returns the `cls` that the fields make, but for those named `own`; ApiError names a wrong one."""
    values, declared = {}, knobs(cls)
    for name, value in body.items():
        if name in own or name in IGNORED or value is None:
            continue
        if name in NEUTRAL:
            if value not in NEUTRAL[name] or isinstance(value, bool):
                raise ApiError(400, f"{name} is not supported here", name, "unsupported_parameter")
            continue
        if name not in declared:
            name = name[:60]
            hint = did_you_mean(name, [*declared, *own])
            raise ApiError(400, f"unknown field {name!r}{hint}", name, "unknown_parameter")
        values[name] = field(name, value, declared[name])
    return cls(**values)


def field(name, value, knob):
    """Returns a field's value as declared; a single stop text is a list of one."""
    if name == "stop":
        value = [value] if isinstance(value, str) else value
        if isinstance(value, list) and (len(value) > 8 or not all(value)):
            raise ApiError(400, "stop: up to 8 texts, none of them empty", name)
        if isinstance(value, list) and any(
            isinstance(text, str) and len(text) > 256 for text in value
        ):
            raise ApiError(400, "stop: a text of more than 256 characters", name)
    try:
        return accept(name, value, knob, "request")
    except UserError as problem:
        raise ApiError(400, str(problem), name) from None


def needed(body, name):
    """Returns a field that must be there."""
    if body.get(name) is None:
        raise ApiError(400, f"{name} is missing", name, "missing_required_parameter")
    return body[name]


def string(value, name):
    """Returns the value of a field that must be a text."""
    if not isinstance(value, str):
        raise ApiError(400, f"{name} must be a string", name)
    return value


# ----------------------------------------------------------------------------------------------
# The routes


class Api:
    """The routes over one model. `seconds`: a request's longest time in the queue and in the making."""

    def __init__(self, scheduler, tokenizer, name, seconds):
        self.scheduler, self.tokenizer, self.name, self.seconds = (
            scheduler,
            tokenizer,
            name,
            seconds,
        )
        self.context = scheduler.model.cfg.sequence_length
        self.template, self.started = tokenizer.template, int(time.time())
        self.longest = int(tokenizer.token_bytes().max())  # bytes that a token stands for, at most

    # ---- what there is

    def models(self):
        return {"object": "list", "data": [self.card()]}

    def card(self):
        """Returns the model's entry: OpenAI's four fields, and what a chat page wants to know."""
        limits = {name: knobs(GenerateFields)[name] for name in (f.name for f in fields(Sampling))}
        settings = {
            name: {"min": lowest(knob.limits), "max": knob.limits.high, "default": knob.default}
            for name, knob in limits.items()
        }
        settings["max_tokens"] = {"min": 1, "max": self.context - 1, "default": None}
        card = {"id": self.name, "object": "model", "created": self.started, "owned_by": "mini-llm"}
        return card | {
            "context_length": self.context,
            "template": self.template,
            "settings": settings,
        }

    def tokenizer_info(self):
        """Returns what lm-eval asks of a tokenizer that it can't load itself."""
        names = {
            f"{role}_token": getattr(self.tokenizer, f"{role}_id") for role in ("bos", "eos", "pad")
        }
        template = jinja(TEMPLATES[self.template]) if self.template else None
        return {name: self.tokenizer.pieces[id] for name, id in names.items()} | {
            "chat_template": template
        }

    def tokenize(self, body, gone):
        """Returns the ids of `prompt`, or of `messages` as a chat request would put them."""
        asked = self._read(TokenizeFields, body, "prompt", "messages")
        if body.get("messages") is not None:
            ids = self._conversation(body["messages"])
        else:
            bos = [self.tokenizer.bos_id] * asked.add_special_tokens
            ids = bos + self._encode(needed(body, "prompt"), "prompt")
        return {"tokens": ids, "count": len(ids), "max_model_len": self.context}

    def detokenize(self, body, gone):
        self._read(DetokenizeFields, body, "tokens")
        ids = self._checked_ids(needed(body, "tokens"), "tokens")
        return {"prompt": self.tokenizer.decode(ids)}

    # ---- prompts

    def not_served(self, name):
        """Returns the ApiError for a model that is not ours: our answer would be a silent substitute."""
        message = f"the model {name[:60]!r} is not served here, only {self.name!r} is"
        return ApiError(404, message, "model", "model_not_found")

    def _read(self, cls, body, *own):
        """Returns `read`'s fields of a request that is for this model."""
        asked = read(cls, body, *own)
        if asked.model not in (None, self.name):
            raise self.not_served(asked.model)
        return asked

    def _check_length(self, length, param):
        """Refuses at once, before the work, so many characters that they must overflow the context."""
        if length > self.context * self.longest:
            raise self._overflow(f"{param} has more than {self.context}: shorten it", param)

    def _encode(self, text, param):
        try:
            return self.tokenizer.encode(string(text, param))
        except UserError as problem:
            raise ApiError(400, f"{param}: {problem}", param) from None

    def _checked_ids(self, ids, param):
        size = self.tokenizer.vocab_size
        if not isinstance(ids, list) or not all(type(id) is int and 0 <= id < size for id in ids):
            raise ApiError(
                400, f"{param} must be a list of token ids, each in 0..{size - 1}", param
            )
        return ids

    def _conversation(self, messages):
        """Returns the ids of a conversation up to where the answer begins.

        Without a template of its own a model only continues text: BOS, then all contents in one.
        """
        if not isinstance(messages, list) or not 1 <= len(messages) <= 256:
            raise ApiError(400, "messages must be a list of 1 to 256 messages", "messages")
        messages = [flat(message, number) for number, message in enumerate(messages, start=1)]
        text = "".join(message["content"] for message in messages)
        # an empty system prompt is none, and an answer that was empty is no reason to end the conversation
        messages = [one for one in messages if one["content"].strip() or one["role"] == "user"]
        if not messages or messages[-1]["role"] != "user":
            raise ApiError(
                400, "the last message must be the user's: it is what is answered", "messages"
            )
        return (
            self._rendered(messages, "messages") if self.template else self._text(text, "messages")
        )

    def _rendered(self, messages, param):
        """Returns the ids of messages in the model's template, up to where the answer begins."""
        self._check_length(sum(len(message["content"]) for message in messages), param)
        try:
            return render(self.tokenizer, messages, self.template, add_generation_prompt=True)[0]
        except UserError as problem:
            raise ApiError(400, str(problem), param) from None

    def _prompts(self, prompt):
        """Returns rows of ids from a text, ids, or a list of texts or of lists of ids."""
        several = isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list)
        rows = prompt if several else [prompt]
        if len(rows) > ROWS:
            raise ApiError(400, f"{len(rows)} prompts; up to {ROWS} in one request", "prompt")
        rows = [
            self._checked_ids(row, "prompt") if isinstance(row, list) else self._text(row)
            for row in rows
        ]
        if not all(rows):
            raise ApiError(400, "prompt: an empty list of token ids; give at least BOS", "prompt")
        return rows

    def _text(self, text, param="prompt"):
        """Returns BOS and the ids of a text to continue."""
        self._check_length(len(string(text, param)), param)
        return [self.tokenizer.bos_id, *self._encode(text, param)]

    def _room(self, prompt, wanted, param):
        """Returns how many tokens the answer may have; ApiError if prompt and answer overflow the context."""
        room, size = self.context - len(prompt), f"the prompt has {len(prompt)} tokens"
        problem = None
        if wanted is not None and wanted > room:
            problem = f"{size} and {param} is {wanted}: lower it to {room} or shorten the prompt"
        if room < (wanted != 0):
            problem = f"{size}, which leave no room for an answer: shorten it"
        if problem:
            raise self._overflow(problem, param)
        return room if wanted is None else wanted

    def _overflow(self, problem, param):
        message = f"this model's context is {self.context} tokens; {problem}"
        return ApiError(400, message, param, "context_length_exceeded")

    # ---- asking

    def _ask(self, asked, prompts, limits, gone, n=1, **kw):
        """Submits each prompt n times; returns the Call. Seeds count up from that asked for, or a fresh one.

        `kw` goes to the Jobs, but for `top`, the Requests' top_logprobs.
        """
        ends, top, first = stop_ids(self.tokenizer, self.template), kw.pop("top", None), asked.seed
        first = secrets.randbits(32) if first is None else first
        jobs = []
        for prompt, limit in ((p, m) for p, m in zip(prompts, limits) for _ in range(n)):
            sampling = replace(narrow(asked, Sampling), seed=(first + len(jobs)) % 2**64)
            request = Request(prompt, limit, sampling, () if "ends" in kw else ends, top)
            jobs.append(Job(request, self.tokenizer, asked.stop, index=len(jobs), **kw))
        if len(jobs) > self.scheduler.room:
            message = f"{len(jobs)} rows in one request; the queue holds {self.scheduler.room}"
            raise ApiError(400, message, "n" if n > 1 else "prompt")
        call = Call(jobs, gone, time.monotonic() + self.seconds, asked.stream)
        try:
            self.scheduler.submit(call)
        except (Full, Closed) as problem:
            raise turned_away(problem) from None
        return call

    def chat(self, body, gone):
        """POST /v1/chat/completions: the answer, or with `stream` a generator of its chunks."""
        asked = self._read(ChatFields, body, "messages")
        if asked.top_logprobs is not None and not asked.logprobs:
            raise ApiError(400, "top_logprobs is given, but logprobs is not true", "top_logprobs")
        prompt = self._conversation(needed(body, "messages"))
        limit = self._room(prompt, *one_limit(asked))
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        call = self._ask(
            asked, [prompt], [limit], gone, asked.n, top=top, trim=self.template is not None
        )
        if asked.stream:
            return self._chat_chunks(call, asked)
        choices = [
            {
                "index": row.index,
                "message": {"role": "assistant", "content": row.text},
                "logprobs": self._chat_logprobs(row.tokens, top),
                "finish_reason": reason(row.finish),
            }
            for row in gather(call)
        ]
        return self._head("chatcmpl", "chat.completion") | {
            "choices": choices,
            "usage": usage(call),
        }

    def _chat_chunks(self, call, asked):
        head, begun = self._head("chatcmpl", "chat.completion.chunk", asked.wants_usage), set()
        top = (asked.top_logprobs or 0) if asked.logprobs else None

        def chunk(index, delta, finish=None, logprobs=None):
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
            return head | {"choices": [choice]}

        for piece in pieces(call):
            if piece.index not in begun:
                begun.add(piece.index)
                yield chunk(piece.index, {"role": "assistant", "content": ""})
            if piece.text or (piece.tokens and asked.logprobs):
                logprobs = self._chat_logprobs(piece.tokens, top)
                yield chunk(piece.index, {"content": piece.text}, logprobs=logprobs)
            if piece.finish:
                yield chunk(piece.index, {}, reason(piece.finish))
        if asked.wants_usage:
            yield head | {"choices": [], "usage": usage(call)}

    def _chat_logprobs(self, tokens, top):
        if top is None:
            return None

        def entry(id, logprob):
            text, spelled = spell(self.tokenizer, id)
            return {"token": text, "logprob": logprob, "bytes": list(spelled)}

        content = [
            entry(token.id, token.likely[0])
            | {"top_logprobs": [entry(*pair) for pair in token.likely[1]]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def completions(self, body, gone):
        """POST /v1/completions: prompts as text or ids; `echo` with `logprobs` also scores them."""
        asked = self._read(CompletionFields, body, "prompt")
        if asked.echo and asked.stream:
            raise ApiError(
                400, "echo is not supported with stream", "echo", "unsupported_parameter"
            )
        if asked.max_tokens == 0 and not asked.echo:
            raise ApiError(400, "max_tokens 0 asks for nothing, but with echo", "max_tokens")
        prompts = self._prompts(needed(body, "prompt"))
        wanted = 16 if asked.max_tokens is None else asked.max_tokens  # 16: as OpenAI has it
        limits = [self._room(prompt, wanted, "max_tokens") for prompt in prompts]
        kw = {"top": asked.logprobs}
        if asked.logprobs is not None:  # what ends the answer is listed too: clients count on it
            kw["ends"] = stop_ids(self.tokenizer, self.template)
        if asked.echo and (wanted == 0 or asked.logprobs is not None):
            kw["score"] = asked.logprobs or 0
        call = self._ask(asked, prompts, limits, gone, asked.n, **kw)
        if asked.stream:
            return self._completion_chunks(call, asked)
        choices = [
            self._completion_choice(row, call.jobs[row.index], asked) for row in gather(call)
        ]
        return self._head("cmpl", "text_completion") | {"choices": choices, "usage": usage(call)}

    def _completion_choice(self, row, job, asked):
        text, tokens = row.text, row.tokens
        if asked.echo:
            before = list(self._prompt_tokens(job))
            echoed = self.tokenizer.decode(job.request.prompt)
            text = echoed + text
            tokens = before + [token._replace(start=token.start + len(echoed)) for token in tokens]
        logprobs = None if asked.logprobs is None else self._completion_logprobs(tokens)
        return {
            "index": row.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": reason(row.finish),
        }

    def _prompt_tokens(self, job):
        """Yields a prompt's Tokens as its scoring found them."""
        stream, start = self.tokenizer.stream(), 0
        for id, likely in zip(job.request.prompt, job.scored or [None] * len(job.request.prompt)):
            yield Token(start, id, likely)
            start += len(stream.push(id))

    def _completion_chunks(self, call, asked):
        head = self._head("cmpl", "text_completion", asked.wants_usage)
        for piece in pieces(call):
            logprobs = None if asked.logprobs is None else self._completion_logprobs(piece.tokens)
            choice = {"index": piece.index, "text": piece.text, "logprobs": logprobs}
            yield head | {
                "choices": [choice | {"finish_reason": piece.finish and reason(piece.finish)}]
            }
        if asked.wants_usage:
            yield head | {"choices": [], "usage": usage(call)}

    def _completion_logprobs(self, tokens):
        def name(id):
            text, spelled = spell(self.tokenizer, id)
            return "bytes:" + "".join(f"\\x{b:02x}" for b in spelled) if "\ufffd" in text else text

        def alternatives(token):
            own, others = token.likely
            if own is None:
                return None
            return {name(id): logprob for id, logprob in others} | {name(token.id): own}

        return {
            "tokens": [name(token.id) for token in tokens],
            "token_logprobs": [token.likely[0] for token in tokens],
            "top_logprobs": [alternatives(token) for token in tokens],
            "text_offset": [token.start for token in tokens],
        }

    def generate(self, body, gone):
        """POST /generate: one prompt, by default in the model's own template, and the settings used."""
        asked = self._read(GenerateFields, body, "prompt")
        text, template = string(needed(body, "prompt"), "prompt"), self._template(asked.template)
        if template and not text.strip():
            raise ApiError(400, "prompt is empty: there is nothing to answer", "prompt")
        message = {"role": "user", "content": text}
        prompt = self._rendered([message], "prompt") if template else self._text(text)
        limit = self._room(prompt, asked.max_new_tokens, "max_new_tokens")
        if asked.max_new_tokens is None:
            limit = min(limit, 128)
        call = self._ask(asked, [prompt], [limit], gone, trim=template is not None)
        used = asdict(call.jobs[0].request.sampling)
        used |= {"max_new_tokens": limit, "template": template, "stop": list(asked.stop)}
        if asked.stream:
            return self._generate_chunks(call, used)
        (row,) = gather(call)
        answer = {"response": row.text, "prompt": text, "generation_config": used}
        return answer | {"finish_reason": row.finish, "usage": usage(call)}

    def _generate_chunks(self, call, used):
        for piece in pieces(call):
            yield {"response": piece.text, "finish_reason": piece.finish}
        yield {
            "response": "",
            "finish_reason": piece.finish,
            "generation_config": used,
            "usage": usage(call),
        }

    def _template(self, wanted):
        """Returns the template to ask in: the model's own, or none for plain text; ApiError for another."""
        if wanted in (None, self.template):
            return self.template
        if wanted == "none":
            return None
        own = self.tokenizer.without_template(self.name)
        if self.template:
            own = f"{self.name} was trained in {self.template!r}"
        raise ApiError(
            400, f"template {wanted[:60]!r}: {own}; leave it out, or say 'none'", "template"
        )

    def _head(self, prefix, kind, wants_usage=False):
        id = f"{prefix}-{secrets.token_hex(12)}"
        head = {"id": id, "object": kind, "created": int(time.time()), "model": self.name}
        return (
            head | {"usage": None} if wants_usage else head
        )  # which only the last chunk of a stream knows


# ----------------------------------------------------------------------------------------------
# What the routes share


def flat(message, number):
    """Returns a message with its content as one text: OpenAI's text parts are joined, others refused."""
    if not isinstance(message, dict):
        raise ApiError(
            400, f"message {number}: must be an object with role and content", "messages"
        )
    content = message.get("content")
    if isinstance(content, list):
        texts = [
            part.get("text")
            for part in content
            if isinstance(part, dict) and part.get("type") == "text"
        ]
        if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
            raise ApiError(400, f"message {number}: only text parts are supported", "messages")
        content = "".join(texts)
    role = message.get("role")
    if role not in ROLES:
        raise ApiError(400, f"message {number}: role must be one of {', '.join(ROLES)}", "messages")
    if not isinstance(content, str):
        raise ApiError(400, f"message {number}: content must be a string", "messages")
    return {"role": role, "content": content}


def one_limit(asked):
    """Returns the wanted length of a chat answer and the name of its field, of which there are two."""
    old, new = asked.max_tokens, asked.max_completion_tokens
    if None not in (old, new) and old != new:
        message = f"max_tokens is {old} and max_completion_tokens {new}; give one of them"
        raise ApiError(400, message, "max_completion_tokens")
    return (old, "max_tokens") if new is None else (new, "max_completion_tokens")


def pieces(call):
    """Yields the Pieces of a call; ApiError if the call failed, OSError if the client has gone."""
    try:
        for piece in call.pieces():
            if piece.finish == "gone":
                raise ConnectionAbortedError
            yield piece
    except (Full, Closed, Failed) as problem:
        raise turned_away(problem) from None


def gather(call):
    """Returns one Piece per row, whole."""
    rows = [Piece(job.index) for job in call.jobs]
    for piece in pieces(call):
        row = rows[piece.index]
        rows[piece.index] = Piece(
            row.index, row.text + piece.text, row.tokens + piece.tokens, piece.finish
        )
    return rows


def lowest(limits):
    """Returns the lowest value that a slider may take: a hundredth above a bound that is itself excluded."""
    return limits.low + 0.01 if limits.open_low else limits.low


def turned_away(problem):
    """Returns the ApiError for a call that was refused, or failed."""
    if isinstance(problem, Full):
        message = "too many requests are waiting; try again in a moment"
        return ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
    if isinstance(problem, Closed):
        return ApiError(
            503, "the server is stopping", code="stopping", headers={"Retry-After": "5"}
        )
    return ApiError(
        500, f"internal error {problem}; the server's log tells more", code="internal_error"
    )


def reason(finish):
    """Returns a finish_reason as OpenAI's clients know it; ours: time, shutdown."""
    return "length" if finish == "context" else finish


def usage(call):
    prompt = sum({id(job.request.prompt): len(job.request.prompt) for job in call.jobs}.values())
    new = sum(len(job.request.ids) for job in call.jobs)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def spell(tokenizer, id):
    """Returns the text of one id (control ids by name, U+FFFD for a part of a character), and its bytes."""
    spelled = tokenizer.spelled(id)
    return spelled.decode("utf-8", "replace"), spelled
