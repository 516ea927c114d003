"""A model in the terminal: a prompt and how the model continues it.

python sample.py --model_path=checkpoints/pretrain/tiny/final --prompt="Once upon a time" --num_samples=2
"""

import os

# A decode step on a CPU is a hundred parallel regions of some microseconds. OpenMP's threads that fall
# asleep in between cost more to wake than they compute: on two idle cores, spinning made lean decoding 1.3
# to 2.7 times as fast. But not for ever: 10^7 turns are some 50 ms, then a server that waits for a request
# leaves the cores alone. Both variables are read once, when torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000000")

import contextlib
import copy
import functools
import json
import math
import secrets
import sys
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.config import Fraction, PositiveInt, Range, UserError, narrow, run
from lib.runtime import choose_device
from lib.tokenizer import Tokenizer, render, stop_ids
from model import KVCache, attend, document_mask, model_folder, open_model_folder

# ----------------------------------------------------------------------------------------------
# Generation: prompts in, tokens out - prefill, cached decode, sampling rules.
#
# From the inside out: `pick` turns logits into tokens, `Engine` holds the rows being decoded, `generate` runs
# requests to their end, `token_logprobs` tells how likely given ids are, `Reply` turns one row's ids into text.
# Terminal, server and evaluation all generate through these. A row's tokens depend on its own prompt, settings
# and seed, never on its neighbours. (Up to rounding: a matrix product of 8 rows may differ from that of one in
# the last bit, which matters where two tokens are as good as equal: in bfloat16 now and then, in
# float32 hardly ever.)


# ----------------------------------------------------------------------------------------------
# The sampling rules: pure functions of logits, no question to the host, so that a GPU never waits


@dataclass(frozen=True)
class Sampling:
    """How one row chooses its tokens. The rules apply in this order, which is that of transformers."""

    # > 1 makes used tokens rarer
    repetition_penalty: Annotated[float, Range(0, 100, open_low=True)] = 1.0
    temperature: Annotated[float, Range(0, 100)] = 0.8  # 0 = always the likeliest token
    top_k: Annotated[int, Range(0, 1 << 20)] = 50  # only the k likeliest tokens; 0 = off
    # only the likeliest that sum to p; 1 = off
    top_p: Annotated[float, Range(0, 1, open_low=True)] = 0.95
    min_p: Fraction = 0.0  # only tokens at least min_p times as likely as the likeliest
    # of the row's own generator; none = a fresh one
    seed: Annotated[int, Range(0, 2**64 - 1)] | None = None


class Rules:
    """The `Sampling` of B rows: (B, 1) columns on the device, and what the host must know to choose kernels.

    The columns never move, so that a CUDA graph may keep their addresses. `width`: how many of the largest
    logits have to be in order - the largest top_k if every row has one, none if no row has a top_k or top_p,
    else all.
    """

    def __init__(self, rows, vocab_size, device="cpu"):
        self.vocab_size = vocab_size
        self.table = torch.zeros(len(rows), 5, device=device)
        self.set(rows)

    def set(self, rows):
        """Takes the rules of as many rows as there are, or fewer."""
        drawn = [row for row in rows if row.temperature > 0]
        self.penalized = any(row.repetition_penalty != 1 for row in rows)
        self.any_greedy, self.all_greedy = len(drawn) < len(rows), not drawn
        self.width = 0
        if drawn and all(row.top_k for row in drawn):
            self.width = min(self.vocab_size, max(row.top_k for row in drawn))
        elif any(row.top_k or row.top_p < 1 for row in drawn):
            self.width = self.vocab_size
        table = self.table[: len(rows)]
        table.copy_(torch.tensor([self._numbers(row) for row in rows]))
        self.penalty, self.temperature, self.top_k, self.top_p, self.log_min_p = table.split(
            1, dim=1
        )

    def _numbers(self, row):
        greedy = row.temperature == 0
        top_k = 1 if greedy else min(row.top_k or self.vocab_size, self.vocab_size)
        top_p = row.top_p if row.top_p < 1 else 2.0  # more than any rounded sum of probabilities
        log_min_p = math.log(row.min_p) if row.min_p else -math.inf
        return [row.repetition_penalty, row.temperature, top_k, top_p, log_min_p]

    @property
    def key(self):
        """What decides which kernels run; everything else is numbers in the table."""
        return self.penalized, self.any_greedy, self.all_greedy, self.width


def pick(logits, rules, history, uniform):
    """Returns the next token of each row, (B, 1).

    logits (B, V); history (B, N) the ids a row holds so far, unused places repeating one of them; uniform
    (B, 1) in (0, 1], the only chance there is.
    """
    if rules.penalized:
        logits = penalize(logits.float(), history, rules.penalty)
    if rules.all_greedy:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    weights, ids = keep(logits, rules)
    drawn = ids.gather(1, draw(weights, uniform))
    if rules.any_greedy:
        return torch.where(rules.temperature == 0, logits.argmax(dim=-1, keepdim=True), drawn)
    return drawn


def penalize(logits, history, penalty):
    """Makes the ids in `history` rarer: positive logits / penalty, others * penalty (Keskar et al. 2019)."""
    used = logits.gather(1, history)
    return logits.scatter(1, history, torch.where(used > 0, used / penalty, used * penalty))


def keep(logits, rules):
    """Applies temperature, top-k, top-p and min-p; the last three set floors, the highest holds.

    Returns (weights, ids), both (B, W), ids ascending: unnormalized probabilities, 0 for what is refused. W
    is V unless every row has a top_k. Logits equal to the last one kept are kept.
    """
    best = logits.amax(dim=-1, keepdim=True)
    x = (logits - best) / rules.temperature.clamp(
        min=1e-30
    )  # at most 0: no temperature makes it overflow
    ids = torch.arange(x.shape[1], device=x.device).expand_as(x)
    floor = rules.log_min_p
    if rules.width:
        part = rules.width < x.shape[1]
        top, ranked = x.topk(rules.width) if part else x.sort(descending=True)
        floor = torch.maximum(floor, rank_floor(top, rules.top_k, rules.top_p))
        if (
            part
        ):  # back in the order of ids: a draw gives the same token, however many logits were sorted
            ids, order = ranked.sort()
            x = top.gather(1, order)
    return torch.where(x >= floor, x.exp(), 0.0), ids


def rank_floor(top, top_k, top_p):
    """Returns the smallest logit (B, 1) that top-k, and then top-p (Holtzman et al. 2020), keep.

    top (B, W) descending. Top-p keeps a token if those before it hold less than top_p of what top-k has left.
    """
    inside = torch.arange(top.shape[1], device=top.device) < top_k
    weights = torch.where(inside, top.exp(), 0.0)
    before = weights.cumsum(dim=-1) - weights
    inside &= before < top_p * weights.sum(dim=-1, keepdim=True)
    return top.gather(1, inside.sum(dim=-1, keepdim=True).clamp(min=1) - 1)


def draw(weights, uniform):
    """Returns for each row the first index at which the running sum reaches uniform x total, (B, 1).

    `uniform` is above 0, so an index of weight 0 is never it, and at most 1, so there is one. Summed in
    float64: there the sum hardly rounds, and a GPU, which adds in another order every time, finds the same
    index.
    """
    reached = weights.cumsum(
        dim=-1, dtype=torch.float32 if weights.device.type == "mps" else torch.float64
    )
    return torch.searchsorted(reached, uniform * reached[:, -1:])


def uniforms(seed, count):
    """Returns `count` numbers in (0, 1], the first of them the same for every count and every device.

    None draws a seed from the operating system. Of a seed, torch's generator on the CPU heeds the low 32
    bits.
    """
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return 1 - torch.rand(count, generator=generator)


# ----------------------------------------------------------------------------------------------
# The engine


@dataclass(eq=False)
class Request:
    """What one row is asked and what comes of it. Whoever reads along may set `finish`: the row then ends."""

    prompt: list[int]  # opened by BOS
    max_new_tokens: int
    sampling: Sampling = Sampling()
    stop_ids: Collection[int] = ()
    # record log-probabilities, with those of this many likeliest ids
    top_logprobs: int | None = None
    ids: list[int] = field(
        default_factory=list
    )  # the answer so far, without the id that stopped it
    # per id: (its own, [(id, log-probability), ...] likeliest first)
    logprobs: list[tuple] = field(default_factory=list)
    # stop, length, context; error: the engine failed; or a reader's own word
    finish: str | None = None

    def take(self, id, limit, logprob=None):
        """Adds a new id and returns it; None if the row ends before it. `limit`: of prompt plus answer."""
        if self.finish is None and id in self.stop_ids:
            self.finish = "stop"
        if self.finish is not None:
            return None
        self.ids.append(id)
        if self.top_logprobs is not None:
            self.logprobs.append((logprob[0], logprob[1][: self.top_logprobs]))
        if len(self.ids) == self.max_new_tokens:
            self.finish = "length"
        elif len(self.prompt) + len(self.ids) == limit:
            self.finish = "context"
        return id

    def room(self, limit):
        """Returns how many more tokens the row may get."""
        longest = min(self.max_new_tokens, limit - len(self.prompt))
        return 0 if self.finish else longest - len(self.ids)


def decode(model, cache, tokens):
    """One token per row through the model: tokens (B, 1) -> logits (B, V)."""
    return model(tokens, cache=cache)[:, -1]


def rows_of(cache, rows):
    """Returns a KVCache that is the slice `rows` of another: same memory, a `start` and window of its own."""
    part = copy.copy(cache)
    part.k, part.v = [k[rows] for k in cache.k], [v[rows] for v in cache.v]
    part.lengths = cache.lengths[rows]
    return part


class Engine:
    """Rows decoded in step, `slots` of them; requests join free slots between two calls of `advance`.

    A call of `advance` is a turn: up to `chunk` positions of the prompts that wait, then a token or a few for
    each row whose prompt is in. Everything a step reads and writes is a tensor of fixed place, indexed by
    each row's own position. A row that has ended computes on until another takes its slot: its tokens are
    thrown away, its position stays in bounds. On a CPU slots above the last one in use are left out. With
    `graphs` all shapes are fixed instead (a ragged cache read through a window that grows by doubling), and
    on CUDA the step is compiled and captured as a graph per window. On a CPU it runs as it is, for the tests.
    """

    def __init__(self, model, slots, limit=None, graphs=False, chunk=512):
        assert not model.training, "dropout would have a say in every token: model.eval() first"
        weight = model.model.norm.weight
        self.model, self.device, self.graphs, self.chunk = model, weight.device, graphs, chunk
        context = model.cfg.sequence_length
        self.limit = min(limit or context, context)  # of prompt and answer together
        capacity = window_for(self.limit) if graphs else self.limit
        self.cache = KVCache(model.cfg, slots, capacity, self.device, weight.dtype)
        self.cache.start = None
        self.part = self.cache  # the rows that a step computes
        self.history = torch.zeros(slots, self.limit, dtype=torch.long, device=self.device)
        self.tokens = torch.zeros(
            slots, 1, dtype=torch.long, device=self.device
        )  # the newest, not yet fed
        self.uniforms = torch.ones(
            slots, self.limit, device=self.device
        )  # by position of the token to draw
        self.requests = [Request([], 0, Sampling(temperature=0), finish="stop")] * slots
        self.rules = Rules(
            [request.sampling for request in self.requests], model.cfg.vocab_size, self.device
        )
        self.ruled = []  # the requests whose sampling `rules` holds
        self.fed = [0] * slots  # positions in the cache, as the host knows them
        self.joining = []  # slots whose prompts wait to be prefilled, oldest first
        self.burst = 1 if self.device.type == "cpu" else 8  # steps per wait for the device
        self.captured, self.pool = {}, None
        self.unwritten = getattr(model, "unwritten", None)  # see `silence`

    @property
    def free(self):
        """How many more requests may join."""
        return sum(request.finish is not None for request in self.requests)

    def join(self, requests):
        """Puts requests into free slots, which it returns. UserError for a prompt that is too long."""
        for request in requests:
            assert request.prompt, "a prompt holds BOS at least"
            if len(request.prompt) >= self.limit:
                raise UserError(
                    f"prompt: {len(request.prompt)} tokens (BOS included) leave no room for an answer in a "
                    f"context of {self.limit}; shorten it"
                )
        free = [slot for slot, request in enumerate(self.requests) if request.finish][
            : len(requests)
        ]
        assert len(free) == len(requests), f"{len(requests)} requests, {len(free)} free slots"
        self.joining = [slot for slot in self.joining if slot not in free] + free
        for slot, request in zip(free, requests):
            self.requests[slot], self.fed[slot] = request, 0
        return free

    @torch.no_grad()
    def advance(self):
        """Takes one turn; yields ids (or None) by slot, step by step, nothing if no row is ready to decode.

        Whatever goes wrong, the rows it concerns end with finish "error" before it is raised.
        """
        self.joining = [slot for slot in self.joining if not self.requests[slot].finish]
        self._prefill()
        rows = {
            i: row
            for i, row in enumerate(self.requests)
            if not row.finish and i not in self.joining
        }
        if not rows:
            return
        with ending(rows.values()):
            steps = self._decode(rows)
        for ids, reports in steps:  # a row that its reader ends in between takes no more
            taken = [None] * len(self.requests)
            for slot, request in rows.items():
                taken[slot] = request.take(ids[slot], self.limit, reports[slot])
            yield taken

    def _prefill(self):
        """All but the last token of a prompt goes into the cache; the first step feeds the last.

        A prompt is cut at multiples of `chunk`, wherever its neighbours are, and equal ones run once.
        """
        spent = 0
        while self.joining:
            slot = self.joining[0]
            request, begin = self.requests[slot], self.fed[slot]
            part = request.prompt[begin:-1][: self.chunk]
            if spent and spent + len(part) > self.chunk:
                return
            with ending([request]):
                if part:
                    self.cache.lengths[slot] = begin
                    row = rows_of(self.cache, slice(slot, slot + 1))
                    row.start = begin
                    self.model.model(torch.tensor([part], device=self.device), cache=row)
                spent, self.fed[slot] = spent + len(part), begin + len(part)
                if self.fed[slot] == len(request.prompt) - 1:
                    self._seat(slot)

    def _seat(self, slot):
        """The prompt in `slot` is in the cache: its row, and all that wait with an equal one, may decode."""
        opening = self.requests[slot].prompt[:-1]
        seated = [i for i in self.joining if self.requests[i].prompt[:-1] == opening]
        for stored in (*self.cache.k, *self.cache.v) if len(seated) > 1 else ():  # of each layer
            stored[seated, :, : len(opening)] = stored[slot, :, : len(opening)].clone()
        for i in seated:
            request, end = self.requests[i], len(opening) + 1
            prompt = torch.tensor(request.prompt, device=self.device)
            self.fed[i] = self.cache.lengths[i] = len(opening)
            self.tokens[i], self.history[i], self.history[i, :end] = prompt[-1], prompt[0], prompt
            self.uniforms[i, end:] = uniforms(request.sampling.seed, self.limit - end).to(
                self.device
            )
        self.joining = [i for i in self.joining if i not in seated]

    def _decode(self, rows):
        """Up to `burst` steps for rows {slot: request}. Returns of each (ids, log-probabilities) by slot."""
        size = len(self.requests) if self.graphs else max(rows) + 1
        count = min(self.burst, max(request.room(self.limit) for request in rows.values()))
        tops = [row.top_logprobs for row in rows.values() if row.top_logprobs is not None]
        self._look_at(size, max(self.fed[slot] for slot in rows) + count)
        self._rule(self.requests[:size], idle=rows[max(rows)].sampling)
        new = torch.empty(count, size, dtype=torch.long, device=self.device)
        reports = [[None] * size] * count
        for step in range(count):
            report = self._launch(max(tops, default=None))
            new[step] = self.tokens[:size, 0]
            if report:
                reports[step] = listed(*report)
        self.fed = [fed + count * (slot not in self.joining) for slot, fed in enumerate(self.fed)]
        return list(zip(new.tolist(), reports))  # here the host waits for the device

    def _look_at(self, size, longest):
        """Lets the next steps compute the first `size` rows, over positions up to `longest`."""
        if size != len(self.part.lengths):
            self.part = rows_of(self.cache, slice(size))
        if self.graphs:
            self.part.window = min(window_for(longest), self.cache.capacity)
            return
        even = len(set(self.fed[:size])) == 1 and not any(slot < size for slot in self.joining)
        # in a burst a row that is ending may seem longer than there is room for
        self.part.window = min(longest, self.cache.capacity)
        self.part.start = self.fed[0] if even else None

    def _rule(self, requests, idle):
        """Sets the rules anew if these are other requests than before; ended ones get the rules `idle`."""
        if self.ruled != requests:
            self.ruled = requests
            self.rules.set([idle if request.finish else request.sampling for request in requests])

    def _step(self, top, forward=decode):
        rows = len(self.part.lengths)
        tokens, history = self.tokens[:rows], self.history[:rows]
        logits = forward(self.model, self.part, tokens)
        known = logits if top is None else logits.clone()  # the model's own, before any rule
        if self.unwritten is not None:
            logits.index_fill_(1, self.unwritten, -torch.inf)
        position = self.part.lengths.clamp_(max=self.limit - 1)[
            :, None
        ]  # where the new token is to stand
        tokens.copy_(pick(logits, self.rules, history, self.uniforms[:rows].gather(1, position)))
        history.scatter_(1, position, tokens)
        return None if top is None else log_probs(known, tokens, top)

    def _launch(self, top):
        """One step: as it is, or as the graph captured for this window and these kernels."""
        if not self.graphs or self.device.type != "cuda":
            return self._step(top)
        key = self.part.window, top, *self.rules.key
        if key not in self.captured:
            self.captured[key] = self._capture(top)
        graph, report = self.captured[key]
        graph.replay()
        return report

    def _capture(self, top):
        """Compiles and records one step. Trial runs leave no trace but keys and values to be overwritten."""
        compiled = compiled_decode()
        state = self.tokens, self.history, self.cache.lengths
        before = [tensor.clone() for tensor in state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            side
        ):  # as CUDA graphs ask: first runs allocate, tune and load kernels
            for _ in range(3):
                self._step(top, compiled)
        torch.cuda.current_stream().wait_stream(side)
        for tensor, value in zip(state, before):
            tensor.copy_(value)
        self.pool = (
            self.pool or torch.cuda.graph_pool_handle()
        )  # one for all: only one graph runs at a time
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            report = self._step(top, compiled)
        return graph, report


@contextlib.contextmanager
def ending(requests):
    """Whatever is raised inside, these requests end with it, so that no slot is lost."""
    try:
        yield
    except BaseException:
        for request in requests:
            request.finish = request.finish or "error"
        raise


def window_for(length):
    """Returns the window for `length` positions: 256, 512, 1024 ... - few shapes, and little read in vain."""
    return max(256, 1 << (length - 1).bit_length())


@functools.cache
def compiled_decode():
    """Returns `decode` with its kernels fused; one for all engines, so that each shape is compiled once."""
    return torch.compile(decode, dynamic=False)


def generate(model, requests, engine=None):
    """Runs requests to their end in one batch: prefill, then one token per row and step.

    Yields after each step a list with each row's new id, None where the row has ended (its request says
    why). Fills `requests` as it goes, and draws nothing from the global generator. `engine`: one to use
    again with the graphs it has captured, a free slot for each request. Raises UserError for a prompt that
    leaves no room.
    """
    if engine is None:
        engine = Engine(
            model, len(requests), max(len(r.prompt) + r.max_new_tokens for r in requests)
        )
    slots = engine.join(requests)
    while any(request.finish is None for request in requests):
        for ids in engine.advance():
            if any(ids[slot] is not None for slot in slots):
                yield [ids[slot] for slot in slots]


# ----------------------------------------------------------------------------------------------
# How likely ids are


def log_probs(logits, ids, top):
    """Returns log-probabilities before any sampling rule, in nats: of `ids`, and of the `top` likeliest.

    logits (N, V), ids (N, 1) -> (N, 1), (N, top), and the ids of the latter, (N, top).
    """
    x = logits.float().log_softmax(dim=-1)
    return x.gather(1, ids), *x.topk(min(top, x.shape[1]))


def listed(own, values, ids):
    """Returns what `log_probs` did as [(own, [(id, log-probability), ...])], the likeliest first."""
    pairs = ([*zip(*row)] for row in zip(ids.tolist(), values.tolist()))
    return list(zip(own.flatten().tolist(), pairs))


@torch.no_grad()
def token_logprobs(model, rows, top=0, chunk=256):
    """Yields for each row of ids what `Request.logprobs` would hold of every id; of the first (None, []).

    The (T, V) logits never stand whole: `chunk` positions at a time. Raises UserError for a row that is
    longer than the model's context.
    """
    weight, context = model.model.norm.weight, model.cfg.sequence_length
    for row in rows:
        if len(row) > context:
            raise UserError(
                f"{len(row)} tokens do not fit the model's context of {context}; shorten the text"
            )
        ids, known = torch.tensor(row, device=weight.device), [(None, [])]
        cache = KVCache(model.cfg, 1, len(row), weight.device, weight.dtype)
        for begin in range(0, len(row) - 1, chunk):
            end = min(begin + chunk, len(row) - 1)
            logits = model(ids[None, begin:end], cache=cache)[0]
            known += listed(*log_probs(logits, ids[begin + 1 : end + 1, None], top))
        yield known


# ----------------------------------------------------------------------------------------------
# Ids to text


class Reply:
    """The text of one row as it grows: whole characters, no control tokens, nothing from a stop text on.

    Text is held back while it may be the beginning of a stop text, whatever tokens spell it. With `trim` the
    white space around the answer goes, so white space is held back until more text follows it.
    `shown` counts the characters given out, `held` is the text held back; `cut`: some text was left out.
    """

    def __init__(self, tokenizer, stop=(), trim=False):
        self.characters, self.stop, self.trim = tokenizer.stream(begun=True), tuple(stop), trim
        self.shown, self.held, self.stopped, self.cut = 0, "", False, False

    def push(self, id):
        """Takes an id, returns the text that is now certain. A stop text sets `stopped` and ends it all."""
        return self._certain(self.characters.push(id))

    def end(self):
        """Returns the text that is left once no more ids come."""
        return self._certain(self.characters.flush(), last=True)

    def _certain(self, text, last=False):
        if self.stopped:
            return ""
        text = self.held + text
        stops = [at for at in map(text.find, self.stop) if at >= 0]
        if stops:
            self.stopped, text = True, text[: min(stops)]
        last = last or self.stopped
        hold = 0 if last else max((overlap(text, stop) for stop in self.stop), default=0)
        text, held = text[: len(text) - hold], text[len(text) - hold :]
        if self.trim:
            text = text if self.shown else text.lstrip()
            body = text.rstrip()
            text, held = body, text[len(body) :] + held
        self.held, self.cut = "" if last else held, self.stopped or (last and bool(held))
        self.shown += len(text)
        return text


def overlap(text, stop):
    """Returns how many of `text`'s last characters are the beginning of `stop`."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)


# ----------------------------------------------------------------------------------------------
# Opening a model to generate with


def choose_dtype(wanted, device):
    """Returns the dtype of activations and cache: as asked, or 16 bits on a GPU and fp32 elsewhere."""
    if wanted == "fp16" and device.type == "cpu":
        raise UserError("dtype=fp16 is slow and rough on a CPU; use --dtype=fp32, bf16 or int8")
    if wanted == "int8" and device.type != "cpu":
        raise UserError(
            f"dtype=int8 is for a CPU, and this run is on {device.type}; use --dtype=auto"
        )
    if wanted == "auto" and device.type == "cuda":
        wanted = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(wanted, torch.float32)


def open_model(folder, device="auto", dtype="auto"):
    """Returns (Llama ready to generate, Tokenizer) of a model or adapter folder; UserError if not a pair.

    It comes packed (see packed.py), with dtype=int8 a fourth as large. No control id is ever written but the
    ends of an answer.
    """
    device = choose_device(device)
    model = open_model_folder(folder, device, choose_dtype(dtype, device))
    tokenizer = Tokenizer.load(model_folder(folder))
    tokenizer.match(model.cfg.vocab_size, folder)
    model = pack(model, int8=dtype == "int8")
    silence(model, tokenizer)
    return model, tokenizer


def silence(model, tokenizer):
    """Keeps engines from writing control ids, but for those that end an answer: they have no text.

    Log-probabilities are the model's own all the same, and may rank such an id above the one written.
    """
    ends, controls = (
        stop_ids(tokenizer, tokenizer.template),
        (tokenizer.token_bytes() == 0).nonzero()[0],
    )
    ids = [id for id in controls.tolist() if id not in ends]
    model.unwritten = torch.tensor(ids, dtype=torch.long, device=model.lm_head.weight.device)


# ----------------------------------------------------------------------------------------------
# A built model rearranged, from outside, to generate: half the operations, or int8 on a CPU.
#
# A decode step reads every weight to multiply it with one row, or a few. Two things decide its speed: how many
# bytes the weights are, and how many small operations stand between the large ones. `pack` lays queries, keys
# and values in one matrix, gate and up in another, all of them input-major, which BLAS reads fastest for few
# rows, and puts one plain loop in place of the modules. It computes the same function (in 16 bit with norms and
# rotations in float32, as model.py does); `int8=True` quarters the bytes and computes nearly the same.


class Matrix(nn.Module):
    """Linear layers side by side. `weight` is (N, K) as theirs, on a CPU stored input-major."""

    def __init__(self, *linears):
        super().__init__()
        weight = torch.cat([linear.weight.detach() for linear in linears])
        if weight.device.type == "cpu":
            weight = weight.t().contiguous().t()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.turned = self.weight.t()

    def forward(self, x):
        return F.linear(x, self.weight)

    def times(self, x):
        """Returns x (R, K) @ weight.T, (R, N)."""
        if len(x) == 1 and x.is_cuda and torch.compiler.is_compiling():
            # a sum, which the compiler fuses with its neighbours
            return (self.weight * x).sum(dim=1, dtype=torch.float32).to(x.dtype)[None]
        return torch.mm(x, self.turned)

    def onto(self, y, x):
        """Returns y (R, N) + x (R, K) @ weight.T."""
        if x.is_cuda:  # addmm would begin by copying y
            return y + self.times(x)
        return torch.addmm(y, x, self.turned)

    def rows(self, ids):
        """Returns weight[ids] (R, K), the embeddings of ids (R)."""
        return F.embedding(ids, self.weight)


class Int8Matrix(nn.Module):
    """A Matrix in 8 bits: its weights have a scale per output, its inputs one per row.

    Symmetric, without zero points (the vector-wise scheme of LLM.int8(), Dettmers et al. 2022). Products are
    summed as integers, so exactly: a row comes out the same, bit for bit, beside any others. Of the kernels
    torch has this one suits a crowd and long prompts best; the one that rounds the weights alone
    (_weight_int8pack_mm) is a little faster for a single row, slower for eight and for prompts.
    """

    def __init__(self, *linears):
        super().__init__()
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self.register_buffer("scale", weight.abs().amax(dim=1).clamp(min=1e-30) / 127)
        self.weight = nn.Parameter(
            (weight / self.scale[:, None]).round().to(torch.int8), requires_grad=False
        )
        self.turned = self.weight.t()

    def forward(self, x):
        return self.times(x.flatten(0, -2)).unflatten(0, x.shape[:-1])

    def times(self, x):
        unit = (
            torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True)
            .mul_(1 / 127)
            .clamp_(min=1e-30)
        )
        sums = torch._int_mm((x / unit).round_().to(torch.int8), self.turned)
        return (sums * self.scale).mul_(unit)

    def onto(self, y, x):
        return self.times(x).add_(y)

    def rows(self, ids):
        return self.weight[ids] * self.scale[ids, None]


class PackedDecoder(nn.Module):
    """model.Decoder for inference: takes the same arguments and computes the same function."""

    def __init__(self, decoder, cfg, table, matrix):
        super().__init__()
        self.cfg, self.table, self.norm = cfg, table, decoder.norm
        self.cos = torch.cat(
            (decoder.cos, decoder.cos), dim=-1
        )  # x cos + (x turned by half a head) sin
        self.sin = torch.cat((-decoder.sin, decoder.sin), dim=-1)
        radius = math.sqrt(cfg.d_model * cfg.layer_norm_epsilon)
        self.radius = torch.tensor(radius, device=decoder.cos.device)
        self.layers, self.norms, self.matrices = [], nn.ParameterList(), nn.ModuleList()
        while decoder.layers:  # one by one, so that no more than a layer stands in memory twice
            block = decoder.layers.pop(0)
            attention, mlp = block.self_attn, block.mlp
            norms = [
                norm.weight for norm in (block.input_layernorm, block.post_attention_layernorm)
            ]
            norms = [w.detach().float() * math.sqrt(cfg.d_model) for w in norms]
            norms = [nn.Parameter(w, requires_grad=False) for w in norms]
            qkv, out = (
                matrix(attention.q_proj, attention.k_proj, attention.v_proj),
                matrix(attention.o_proj),
            )
            gate_up, down = matrix(mlp.gate_proj, mlp.up_proj), matrix(mlp.down_proj)
            self.layers.append((norms[0], qkv, out, norms[1], gate_up, down))
            self.norms.extend(norms)
            self.matrices.extend([qkv, out, gate_up, down])

    def forward(self, ids, positions=None, documents=None, cache=None):
        B, T = ids.shape
        H, K, D = self.cfg.n_head, self.cfg.kv_heads, self.cfg.head_dim
        if positions is None:
            positions = (
                torch.arange(T, device=ids.device)[None] if cache is None else cache.positions(T)
            )
        mask = document_mask(documents) if cache is None else cache.mask(positions)
        causal = cache is None or cache.start == 0
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]  # (B or 1, 1, T, D)
        x = self.table.rows(ids.flatten())  # (B T, C) from here on
        if mask is not None and x.device.type == "cuda":  # once, not in every layer
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -torch.inf)
        for layer, (norm, qkv, out, second_norm, gate_up, down) in enumerate(self.layers):
            heads = qkv.times(self._normed(x, norm)).view(B, T, H + 2 * K, D).transpose(1, 2)
            qk, v = heads.split([H + K, K], dim=1)
            qk = torch.addcmul(qk * cos, qk.roll(D // 2, -1), sin).to(x.dtype)
            q, k = qk.split([H, K], dim=1)
            if cache is not None:
                k, v = cache.append(layer, k, v, positions)
            y = attend(q, k, v, mask, causal).transpose(1, 2).reshape(B * T, H * D)
            x = out.onto(x, y)
            gate, up = gate_up.times(self._normed(x, second_norm)).chunk(2, dim=1)
            x = down.onto(x, F.silu(gate).mul_(up))
        if cache is not None:
            cache.advance(T)
        return self.norm(x).view(B, T, -1)

    def _normed(self, x, weight):
        """RMSNorm in four calls: x sqrt(C) / hypot(|x|, sqrt(C epsilon)); `weight` holds the sqrt(C)."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return (x / torch.hypot(length, self.radius)).mul_(weight).to(x.dtype)


def pack(model, int8=False):
    """Rearranges `model` in place and returns it: it computes on, but can't be saved or trained."""
    assert not int8 or model.lm_head.weight.dtype == torch.float32
    decoder, matrix = model.model, Int8Matrix if int8 else Matrix
    model.lm_head = matrix(model.lm_head)
    table = model.lm_head if model.cfg.tie_word_embeddings else matrix(decoder.embed_tokens)
    model.model = PackedDecoder(decoder, model.cfg, table, matrix)
    return model


# ----------------------------------------------------------------------------------------------
# A conversation in the terminal, in the template of the model's own folder.
#
#     python sample.py --chat --model_path=checkpoints/dpo                     /help lists what else there is
#     python sample.py --chat --model_path=checkpoints/dpo --prompt="Why?"     one question, one answer
#     python sample.py --chat --model_path=checkpoints/dpo < questions.txt     one question a line
#
# Answers go to stdout, all else to stderr. A model without a template continues each text as it stands, and
# remembers none. What is said is said to the model as text: no way of typing makes it a control token.


HELP = """\
/help           this list
/clear          forget the conversation, keep the system message
/system TEXT    tell the model what to be; without TEXT show what it was told
/retry          answer the last question again
/save FILE      append the conversation to FILE, a row as sft.py reads it
/quit           leave; so do Ctrl-C and Ctrl-D. While an answer is written, Ctrl-C ends the answer
//TEXT          a question that begins with a single /"""

PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
PICTURES |= {0x7F: 0x2421} | dict.fromkeys(
    range(0x80, 0xA0), 0xFFFD
)  # DEL, and the second set of controls


class Chat:
    """One conversation: `messages`, as {"role", "content"}, a system message first if there is one.

    A question that got no answer is the last of them, until it is asked again or another one is.
    sampling: a Sampling; its seed is that of the first answer, the next one's is one more.
    """

    def __init__(
        self, model, tokenizer, sampling, max_new_tokens, stop=(), system="", graphs=False
    ):
        self.tokenizer, self.template = tokenizer, tokenizer.template
        self.model, self.engine = model, Engine(model, 1, graphs=graphs)
        self.ends = stop_ids(tokenizer, tokenizer.template)
        self.max_new_tokens, self.stop, self.messages = max_new_tokens, stop, []
        seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self.sampling = replace(sampling, seed=seed)
        if system:
            self.set_system(system)

    def set_system(self, text):
        if self.template is None:
            raise UserError(
                "system: this model has no chat template, so nothing marks a system message"
            )
        self.tokenizer.encode(text)  # refuses what is no Unicode
        rest = [message for message in self.messages if message["role"] != "system"]
        self.messages = [{"role": "system", "content": text}, *rest]

    def ask(self, text):
        """Prints the answer to `text` as it is written. UserError if there is none, and nothing changes."""
        with self.unless_refused():
            if self.messages and self.messages[-1]["role"] == "user":
                self.messages.pop()
            self.messages.append({"role": "user", "content": text})
            self.answer()

    def retry(self):
        """Prints another answer to the last question. UserError if there is none, and nothing changes."""
        with self.unless_refused():
            if self.messages and self.messages[-1]["role"] == "assistant":
                self.messages.pop()
            if not self.messages or self.messages[-1]["role"] != "user":
                raise UserError("/retry: no question has been asked yet")
            self.answer()

    @contextlib.contextmanager
    def unless_refused(self):
        """Whatever is done to the messages inside, a UserError undoes it."""
        before = list(self.messages)
        try:
            yield
        except UserError:
            self.messages = before
            raise

    def clear(self):
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def answer(self):
        """Answers the last message and remembers what it said, whole or, after Ctrl-C, in part."""
        request = Request(self.make_room(), self.max_new_tokens, self.sampling, self.ends)
        self.sampling = replace(self.sampling, seed=(self.sampling.seed + 1) % 2**64)
        text, began = "", time.perf_counter()
        try:
            for piece in self.written(request):
                text += piece
                print(visible(piece), end="", flush=True)
        except KeyboardInterrupt:
            request.finish = "stopped"
        print(flush=True)
        if self.template is not None and text:
            self.messages.append({"role": "assistant", "content": text})
        say(self.summary(request, time.perf_counter() - began))
        if request.finish == "stopped":
            raise KeyboardInterrupt

    def written(self, request):
        """Returns the pieces of an answer as they come; the white space around it is the template's."""
        reply = Reply(self.tokenizer, self.stop, trim=self.template is not None)
        for (id,) in generate(self.model, [request], self.engine):
            yield reply.push(id)
            if reply.stopped:
                request.finish = "stop"
        yield reply.end()

    def make_room(self):
        """Returns the ids to answer. A full context forgets the oldest turns, and that is said."""
        if self.template is None:
            return [self.tokenizer.bos_id, *self.tokenizer.encode(self.messages[-1]["content"])]
        room, forgotten = min(self.max_new_tokens, self.engine.limit // 4), 0
        while True:
            ids, _ = render(
                self.tokenizer, self.messages, self.template, add_generation_prompt=True
            )
            turns = [at for at, message in enumerate(self.messages) if message["role"] == "user"]
            if len(ids) + room <= self.engine.limit or len(turns) == 1:
                break
            del self.messages[turns[0] : turns[1]]
            forgotten += 1
        if forgotten and len(ids) < self.engine.limit:  # else it is refused, and nothing forgotten
            turns = "turn" if forgotten == 1 else f"{forgotten} turns"
            say(f"(the context of {self.engine.limit} tokens is full: forgot the oldest {turns})")
        return ids

    def summary(self, request, seconds):
        count, limit = len(request.ids), self.engine.limit
        cut = f"cut at max_new_tokens={self.max_new_tokens}, "
        ends = {"length": cut, "context": "the context is full, ", "stopped": "stopped, "}
        end = ends.get(request.finish, "")
        used = f"context {len(request.prompt) + count} of {limit}"
        return f"({end}{count} tokens, {count / max(seconds, 1e-9):,.0f} tokens/s, {used})"


def visible(text):
    """Returns what to print of a model's text: to a terminal no control characters but their pictures.

    A model may write any byte, and some would move the cursor, rename the window or worse.
    """
    return text.translate(PICTURES) if sys.stdout.isatty() else text


def say(text):
    print(text, file=sys.stderr, flush=True)


# ---- lines in, commands obeyed


def obey(chat, line):
    """Does what a line says; returns whether the conversation goes on. UserError if it can't be done."""
    command, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if command == "/quit":
        return False
    if command == "/help":
        say(HELP)
    elif command == "/clear":
        chat.clear()
    elif command == "/system" and rest:
        chat.set_system(rest)
    elif command == "/system":
        say(
            next(
                (m["content"] for m in chat.messages if m["role"] == "system"), "no system message"
            )
        )
    elif command == "/retry":
        chat.retry()
    elif command == "/save":
        save(chat.messages, rest)
    elif command.startswith("/") and not command.startswith("//"):
        raise UserError(
            f"{command}: no such command; /help lists them, // begins a question with a /"
        )
    elif command:
        chat.ask(line.replace("//", "/", 1) if command.startswith("//") else line)
    return True


def save(messages, path):
    """Appends a conversation to the JSON Lines file `path`."""
    if not path:
        raise UserError("/save: name a file, as /save chat.jsonl")
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(
            "/save: nothing has been answered yet; without a chat template no answer is kept"
        )
    try:
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except OSError as problem:
        raise UserError(f"/save: {path}: {problem.strerror}; name another file") from None
    say(f"{len(messages)} messages appended to {path}")


def typed():
    """Yields the lines of a person at a terminal; ends with Ctrl-C or Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() editing and the history of this conversation
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            return say("")
        except UnicodeDecodeError as problem:
            say(f"error: that is not UTF-8 ({problem.reason}); set the terminal to UTF-8")


def piped():
    try:
        for line in sys.stdin:
            yield line.removesuffix("\n")
    except UnicodeDecodeError as problem:
        raise UserError(
            f"standard input: not UTF-8 ({problem.reason}); send text as UTF-8"
        ) from None


def converse(chat):
    """Reads lines until there are no more. A mistake, or Ctrl-C, costs a person a line, and ends a pipe."""
    person = sys.stdin.isatty()
    if person:
        say("a conversation; /help lists the commands")
    for line in typed() if person else piped():
        try:
            if not obey(chat, line):
                return
        except (UserError, KeyboardInterrupt) as problem:
            if not person:
                raise
            if isinstance(problem, UserError):
                say(f"error: {problem}")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Sampling):
    """One prompt and how to continue it."""

    model_path: str  # a model folder
    prompt: str = ""  # text to continue; none at all is fine: a document's beginning
    chat: bool = False  # converse in the model's chat template; with a prompt answer that and leave
    system: str = ""  # in a chat: what the model is told to be
    # of a sample or answer, at most; none = 64, in a chat 512
    max_new_tokens: PositiveInt | None = None
    # generated side by side, with seeds seed, seed + 1, ...
    num_samples: Annotated[int, Range(1, 1024)] = 1
    stop: tuple[str, ...] = ()  # texts before which a sample ends, separated by commas
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    # fp32 on a CPU, bf16 on a GPU that has it; int8 (CPU) is a fourth of the memory, faster, and a little off
    dtype: Literal["auto", "fp32", "bf16", "fp16", "int8"] = "auto"
    # CUDA only: fuse the decode step and replay it as a graph; takes a while to start
    compile: bool = False

    def __post_init__(self):
        if not all(self.stop):
            raise ValueError(
                "stop: an empty text would stop everything; give at least one character"
            )
        if self.chat and self.num_samples > 1:
            raise ValueError(
                "num_samples, chat: a chat gives one answer at a time; leave one of them out"
            )
        if self.system and not self.chat:
            raise ValueError("system is for --chat: a prompt alone is continued as it stands")


ENDS = {
    "stop": "ended by itself or by a stop text",
    "length": "max_new_tokens reached",
    "context": "the model's context of {} is full",
}


def main(cfg):
    model, tokenizer = open_model(cfg.model_path, cfg.device, cfg.dtype)
    device = model.lm_head.weight.device
    if cfg.compile and device.type != "cuda":
        raise UserError(
            f"compile: CUDA graphs need CUDA, and this run is on {device.type}; leave it off"
        )
    if cfg.chat:
        return talk(cfg, model, tokenizer)
    requests, engine = make_requests(cfg, tokenizer), None
    if cfg.compile:
        length = len(requests[0].prompt) + requests[0].max_new_tokens
        engine = Engine(model, len(requests), length, graphs=True)
        rehearsal = [replace(request, ids=[]) for request in requests]  # compiles on the way
        deque(generate(model, rehearsal, engine), maxlen=0)
    replies = [Reply(tokenizer, cfg.stop) for _ in requests]
    times = show(generate(model, requests, engine), requests, replies)
    print(summary(requests, times, model), file=sys.stderr)


def talk(cfg, model, tokenizer):
    """Answers the one prompt there is, or converses."""
    length = cfg.max_new_tokens or 512
    chat = Chat(model, tokenizer, narrow(cfg, Sampling), length, cfg.stop, cfg.system, cfg.compile)
    if tokenizer.template is None:
        print(tokenizer.without_template(cfg.model_path), file=sys.stderr)
    if cfg.prompt:
        return chat.ask(cfg.prompt)
    converse(chat)


def make_requests(cfg, tokenizer):
    """Returns num_samples requests for the same prompt, each with its own seed."""
    try:
        prompt = [tokenizer.bos_id, *tokenizer.encode(cfg.prompt)]
    except UserError as problem:
        raise UserError(f"prompt: {problem}; write it as UTF-8") from None
    ends = stop_ids(tokenizer, tokenizer.template)
    first = secrets.randbits(32) if cfg.seed is None else cfg.seed
    rows = [
        replace(narrow(cfg, Sampling), seed=(first + i) % 2**64) for i in range(cfg.num_samples)
    ]
    return [Request(prompt, cfg.max_new_tokens or 64, row, ends) for row in rows]


def show(steps, requests, replies):
    """Prints the samples one below the other: the first as it is written, the next when its turn comes.

    Several get headers. Returns the times at which decoding began, gave its first tokens and gave its last.
    """
    times, texts, turn = [time.perf_counter()], [""] * len(requests), 0
    header = "--- sample {} ---\n" if len(requests) > 1 else ""
    print(header.format(1), end="")
    for ids in steps:
        times.append(time.perf_counter())
        for row, (id, request, reply) in enumerate(zip(ids, requests, replies)):
            texts[row] += "" if id is None else reply.push(id)
            if reply.stopped:
                request.finish = "stop"
            if request.finish:
                texts[row] += reply.end()
        while turn < len(requests):
            text, texts[turn] = texts[turn], ""
            print(visible(text), end="", flush=True)
            if not requests[turn].finish:
                break
            turn += 1
            print("\n" + header.format(turn + 1) * (turn < len(requests)), end="", flush=True)
    return times[0], times[min(1, len(times) - 1)], times[-1]


def summary(requests, times, model):
    """Returns what to know about a run: why each sample ended, its seed, and the speed."""
    lines, (begin, first, last) = [], times
    for number, request in enumerate(requests, start=1):
        end = ENDS[request.finish].format(model.cfg.sequence_length)
        lines.append(
            f"sample {number}: {len(request.ids)} tokens, {end}; seed {request.sampling.seed}"
        )
    weight, count = model.lm_head.weight, sum(len(request.ids) for request in requests)
    speed = (
        f"{count} tokens in {last - begin:.2f} s: {count / max(last - begin, 1e-9):,.0f} tokens/s"
    )
    first = f"the first after {1000 * (first - begin):.0f} ms (prompt of {len(requests[0].prompt)})"
    where = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
    return "\n".join([*lines, f"{speed}, {first}; {where}"])


if __name__ == "__main__":
    run(main, SampleConfig, __doc__)
