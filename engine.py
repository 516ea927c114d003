"""Generation: prompts in, tokens out - prefill, cached decode, sampling rules.

From the inside out: `pick` turns logits into tokens, `Engine` holds the rows being decoded, `generate` runs
requests to their end, `score` tells how likely given ids are, `Reply` turns one row's ids into text.
Terminal, server and evaluation all generate through these. A row's tokens depend on its own prompt, settings
and seed, never on its neighbours. (Up to rounding: a matrix product of 8 rows may differ from that of one in
the last bit, which matters where two tokens are as good as equal: in bfloat16 now and then, in
float32 hardly ever.)
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
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Annotated

import torch

from lib.config import Fraction, Range, UserError
from lib.tokenizer import Tokenizer, stop_ids
from lora import model_folder, open_model_folder
from model import KVCache, choose_device
from packed import pack

# ----------------------------------------------------------------------------------------------
# The sampling rules: pure functions of logits, no question to the host, so that a GPU never waits


@dataclass(frozen=True)
class Sampling:
    """How one row chooses its tokens. The rules apply in this order, which is that of transformers."""

    repetition_penalty: Annotated[float, Range(0, 100, open_low=True)] = (
        1.0  # > 1 makes used tokens rarer
    )
    temperature: Annotated[float, Range(0, 100)] = 0.8  # 0 = always the likeliest token
    top_k: Annotated[int, Range(0, 1 << 20)] = 50  # only the k likeliest tokens; 0 = off
    top_p: Annotated[float, Range(0, 1, open_low=True)] = (
        0.95  # only the likeliest that sum to p; 1 = off
    )
    min_p: Fraction = 0.0  # only tokens at least min_p times as likely as the likeliest
    seed: Annotated[int, Range(0, 2**64 - 1)] | None = (
        None  # of the row's own generator; none = a fresh one
    )


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
    top_logprobs: int | None = (
        None  # record log-probabilities, with those of this many likeliest ids
    )
    ids: list[int] = field(
        default_factory=list
    )  # the answer so far, without the id that stopped it
    # per id: (its own, [(id, log-probability), ...] likeliest first)
    logprobs: list[tuple] = field(default_factory=list)
    finish: str | None = (
        None  # stop, length, context; error: the engine failed; or a reader's own word
    )

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
def score(model, rows, top=0, chunk=256):
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

    What might be the beginning of a stop text is held back until that is known, whatever tokens spell it.
    """

    def __init__(self, tokenizer, stop=()):
        self.characters, self.stop = tokenizer.stream(begun=True), tuple(stop)
        self.held, self.stopped = "", False

    def push(self, id):
        """Takes an id, returns the text that is now certain. A stop text sets `stopped` and ends it all."""
        return self._certain(self.characters.push(id))

    def end(self):
        """Returns what is left once no more ids come."""
        text = self._certain(self.characters.flush()) + self.held
        self.held = ""
        return text

    def _certain(self, text):
        if self.stopped:
            return ""
        text = self.held + text
        found = [at for at in map(text.find, self.stop) if at >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        keep = max((overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


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
