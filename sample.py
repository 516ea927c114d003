"""Generation: sampling rules, weights laid out for decoding, the engine, samples and a chat.

python sample.py --model_path=checkpoints/pretrain/tiny/final --prompt="Once upon a time"
python sample.py --chat --model_path=checkpoints/dpo
"""

import os

# A decode step on a CPU is about a hundred parallel regions of some microseconds each; waking
# OpenMP's threads costs more than their work, so they spin in between; but for some 50 us at most,
# because one that is off its core, where other processes run, would keep the others spinning.
# OpenMP reads this once, when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import contextlib
import copy
import functools
import json
import math
import re
import secrets
import sys
import time
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.config import Fraction, PositiveInt, Range, UserError, narrow, read_object, refusing, run
from lib.conversation import render, stop_ids, template_notes
from lib.runtime import choose_device, choose_dtype
from lib.tokenizer import Tokenizer
from model import KVCache, RMSNorm, attend, load_model, model_folder

# Letters as in model.py: B rows, T positions, C width, H query heads, K key/value heads, D head
# width, V vocabulary; R = B T rows of a matrix product.

# ---- Sampling: pure functions of logits that ask the host nothing, so a GPU never waits


@dataclass(frozen=True)
class Sampling:
    """How a row chooses its tokens. The rules apply in this order, that of transformers."""

    repetition_penalty: Annotated[float, Range(0, 100, open_low=True)] = 1.0  # > 1: fewer repeats
    temperature: Annotated[float, Range(0, 100)] = 0.8  # 0 = always the likeliest token
    top_k: Annotated[int, Range(0, 1 << 20)] = 50  # only the k likeliest tokens; 0 = off
    top_p: Annotated[float, Range(0, 1, open_low=True)] = 0.95  # the likeliest up to p; 1 = off
    min_p: Fraction = 0.0  # only tokens at least min_p times as likely as the likeliest
    seed: Annotated[int, Range(0, 2**64 - 1)] | None = None  # none = a fresh one

    def seeded(self, count):
        """Returns `count` Samplings; their seeds count up from ours, or from a fresh one."""
        seed = secrets.randbits(32) if self.seed is None or self.seed < 0 else self.seed
        rules = narrow(self, Sampling)
        return [replace(rules, seed=(seed + row) % 2**64) for row in range(count)]


# A rule is a field above, its number here and its line in `keep`. The number, a function of a row's
# settings and V, changes nothing where the rule is off.
RULES = {
    "repetition_penalty": lambda row, V: row.repetition_penalty,
    "temperature": lambda row, V: row.temperature,
    "top_k": lambda row, V: min(row.top_k or V, V),
    "top_p": lambda row, V: row.top_p if row.top_p < 1 else 2.0,  # above any rounded sum
    "min_p": lambda row, V: math.log(row.min_p) if row.min_p else -math.inf,
}


def rule_table(rows, vocab_size):
    """Returns the numbers (B, rules) of `rows`, a list of Sampling."""
    return torch.tensor([[rule(row, vocab_size) for rule in RULES.values()] for row in rows])


class Branches(NamedTuple):
    """All choices that Python makes in `next_token`; so it is the key of a captured CUDA graph."""

    penalty: bool  # some row has a repetition penalty
    greedy: bool  # some row takes its likeliest token
    drawn: bool  # some row draws
    width: int  # how many of the largest logits are put in order, for top-k and top-p

    @classmethod
    def of(cls, rows, vocab_size):
        """Returns the Branches for `rows`, a list of Sampling."""
        drawn, width = [row for row in rows if row.temperature > 0], 0
        if drawn and all(row.top_k for row in drawn):
            largest = max(row.top_k for row in drawn)
            width = 1 << (largest - 1).bit_length()  # a power of two: few widths, few graphs
        elif any(row.top_k or row.top_p < 1 for row in drawn):
            width = vocab_size
        penalty = any(row.repetition_penalty != 1 for row in rows)
        return cls(penalty, len(drawn) < len(rows), bool(drawn), min(width, vocab_size))


def next_token(logits, branches, columns, history, uniform):
    """Returns the next token of each row, (B, 1).

    logits (B, V); columns {rule: (B, 1)}; history (B, N) are the ids of a row so far, unused places
    repeat one; uniform (B, 1) in (0, 1] is the only chance there is.
    """
    if branches.penalty:
        logits = penalize(logits.float(), history, columns["repetition_penalty"])
    likeliest = logits.argmax(dim=-1, keepdim=True) if branches.greedy else None
    if not branches.drawn:
        return likeliest
    weights, ids = keep(logits.float(), branches.width, columns)
    # the first token at which the running sum reaches uniform x total, so never one of weight 0; in
    # float64 the sum hardly rounds: a GPU, which adds in any order, finds the same token
    sums = weights.cumsum(dim=-1, dtype=torch.float64 if logits.device.type != "mps" else None)
    drawn = ids.gather(1, torch.searchsorted(sums, uniform * sums[:, -1:]))
    return torch.where(columns["temperature"] == 0, likeliest, drawn) if branches.greedy else drawn


def penalize(logits, history, penalty):
    """Makes the ids in `history` rarer (Keskar et al. 2019), whatever their sign."""
    used = logits.gather(1, history)
    return logits.scatter(1, history, torch.where(used > 0, used / penalty, used * penalty))


def keep(logits, width, columns):
    """Applies temperature, top-k, top-p and min-p; the last three set floors, the highest holds.

    Returns (weights, ids), both (B, W), ids ascending: unnormalized probabilities, 0 for refused
    tokens. W is `width`, or V if that is 0. Logits equal to the last one kept are kept.
    """
    # at most 0, so no temperature overflows; exp(x) is how likely next to the likeliest token
    x = logits - logits.amax(dim=-1, keepdim=True)
    x = x / columns["temperature"].clamp(min=1e-30)
    ids = torch.arange(x.shape[1], device=x.device).expand_as(x)
    floor = columns["min_p"]  # its logarithm
    if width:
        partial = width < x.shape[1]
        top, top_ids = x.topk(width) if partial else x.sort(descending=True)
        # top-p (Holtzman et al. 2020) keeps a token if those before it hold less than p of all that
        # top-k has left
        inside = torch.arange(width, device=x.device) < columns["top_k"]
        weights = torch.where(inside, top.exp(), 0.0)
        before = weights.cumsum(dim=-1) - weights
        inside &= before < columns["top_p"] * weights.sum(dim=-1, keepdim=True)
        last = inside.sum(dim=-1, keepdim=True).clamp(min=1) - 1
        floor = torch.maximum(floor, top.gather(1, last))
        if partial:  # back in the order of ids: a draw must not depend on how many were sorted
            ids, order = top_ids.sort()
            x = top.gather(1, order)
    return torch.where(x >= floor, x.exp(), 0.0), ids


def uniforms(seed, count):
    """Returns `count` numbers in (0, 1]; the n-th depends on seed and n alone, on every device.

    Without a seed, a fresh one. Of a seed, torch's generator heeds the low 32 bits.
    """
    generator = torch.Generator().manual_seed(secrets.randbits(32) if seed is None else seed)
    return 1 - torch.rand(count, generator=generator)


# ---- Weights for decoding: the model's own decoder, its blocks exchanged for a leaner module
#
# Two things decide the speed of a decode step, which multiplies every weight with a row or a few:
# the bytes of the weights, and the number of small operations between the matrix products. `fuse`
# leaves Decoder.forward alone and exchanges its parts: queries, keys and values are one matrix,
# gate and up another, each laid out for its kernel; one module runs all blocks. A fused model
# computes the same function; it cannot be trained or saved.


class Matrix(nn.Module):
    """Linear layers side by side: `weight` (N, K) as in nn.Linear, and `turned`, its view (K, N).

    A large one on a CPU is `packed` instead, in blocks as oneDNN's kernels read them.
    """

    PACKED = 1 << 19  # numbers; smaller ones are in a cache, and oneDNN takes longer to start

    def __init__(self, *linears):
        super().__init__()
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self.weight = self.packed = None
        if weight.device.type == "cpu" and weight.numel() >= self.PACKED and packable(weight.dtype):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)
            return
        if weight.device.type == "cpu":
            # a power of two apart, the rows of `turned` would share few sets of the caches
            padded = weight.new_empty(weight.shape[1], len(weight) + 48)
            weight = padded[:, : len(weight)].copy_(weight.t()).t()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.turned = self.weight.t()

    def forward(self, x):
        return self.times(x.flatten(0, -2)).unflatten(0, x.shape[:-1])

    def times(self, x):
        """Returns x (R, K) @ weight.T, (R, N)."""
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")
        if len(x) == 1 and x.is_cuda and torch.compiler.is_compiling():
            # a sum, which the compiler fuses with its neighbours
            return (self.weight * x).sum(dim=1, dtype=torch.float32).to(x.dtype)[None]
        return torch.mm(x, self.turned)

    def onto(self, y, x):
        """Returns y (R, N) + x (R, K) @ weight.T."""
        if x.is_cuda or self.packed is not None:  # addmm would begin by copying y
            return y + self.times(x)
        return torch.addmm(y, x, self.turned)


def packable(dtype):
    """Returns whether this CPU has oneDNN's products of packed matrices in `dtype`."""
    if not torch.backends.mkldnn.is_available():
        return False
    in_bf16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return in_bf16 or dtype == torch.float32


class Int8Matrix(nn.Module):
    """Linear layers side by side in 8 bits: a scale for each output, and for each row of x.

    Symmetric, the vector-wise scheme of LLM.int8() (Dettmers et al. 2022), in FBGEMM's kernels.
    Where a CPU lacks VNNI these add two products in 16 bits, so that weights have 7: 2 x 255 x 63
    fits. Then sums are exact, and a row comes out the same, bit for bit, beside any others.
    """

    def __init__(self, *linears):
        super().__init__()
        self.product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        weight = torch.cat([linear.weight.detach() for linear in linears])  # (N, K), a copy
        scale = weight.abs().amax(dim=1).clamp(min=1e-30) / 63
        whole, zero = weight.div_(scale[:, None]).round_().to(torch.int8), scale.int() * 0
        torch.backends.quantized.engine = "fbgemm"
        with warnings.catch_warnings(action="ignore"):  # a later torch drops its quantized types
            weight = torch._make_per_channel_quantized_tensor(whole, scale.double(), zero, 0)
            self.packed = torch.ops.quantized.linear_prepack(weight, None)

    def forward(self, x):
        return self.times(x.flatten(0, -2)).unflatten(0, x.shape[:-1])

    def times(self, x):
        largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).clamp_(min=1e-30)
        return self.product(x / largest, 1 / 127, 128, self.packed).mul_(largest)

    def onto(self, y, x):
        return self.times(x).add_(y)


class Int8Embedding(nn.Module):
    """The embeddings of a Llama in 8 bits, with a scale for each: ids (B, T) -> (B, T, C)."""

    def __init__(self, embedding):
        super().__init__()
        weight = embedding.weight.detach()
        self.register_buffer("scale", weight.abs().amax(dim=1).clamp(min=1e-30) / 127)
        whole = (weight / self.scale[:, None]).round_().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)

    def forward(self, ids):
        return self.weight[ids] * self.scale[ids, None]


class FusedBlocks(nn.Module):
    """All of a model's blocks for inference. `rope` is cos and sin (.., T, D), see `fuse`."""

    def __init__(self, decoder, cfg, matrix):
        super().__init__()
        C, self.heads = cfg.d_model, (cfg.n_head, cfg.kv_heads, cfg.head_width)
        self.layers, self.vectors, self.matrices = [], nn.ParameterList(), nn.ModuleList()
        # RMSNorm in four calls: x / rms(x) = x sqrt(C) / hypot(|x|, sqrt(C epsilon))
        radii = [math.sqrt(width * cfg.layer_norm_epsilon) for width in (C, cfg.head_width)]
        self.radius, self.head_radius = torch.tensor(radii, device=decoder.cos.device)
        while decoder.layers:  # one by one: a single layer is held twice
            # a tuple is read faster than attributes of a module
            self.layers.append(self.parts(decoder.layers.pop(0), matrix))

    def parts(self, block, matrix):
        """Returns a block's weights in the order of their use; None for a part that it lacks."""
        attention, mlp, bias, head_norm = block.self_attn, block.mlp, None, None
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        if attention.q_proj.bias is not None:
            bias = self.vector(torch.cat([linear.bias for linear in projections]))
        if isinstance(attention.q_norm, RMSNorm):
            q, k = attention.q_norm.weight, attention.k_norm.weight
            head_norms = q.expand(self.heads[0], 1, -1), k.expand(self.heads[1], 1, -1)
            head_norm = self.vector(torch.cat(head_norms), scaled=True)  # (H + K, 1, D)
        norm = self.vector(block.input_layernorm.weight, scaled=True)
        second_norm = self.vector(block.post_attention_layernorm.weight, scaled=True)
        qkv, out = matrix(*projections), matrix(attention.o_proj)
        gate_up, down = matrix(mlp.gate_proj, mlp.up_proj), matrix(mlp.down_proj)
        self.matrices.extend([qkv, out, gate_up, down])
        return norm, qkv, bias, head_norm, out, second_norm, gate_up, down

    def vector(self, values, scaled=False):
        """Returns a parameter; a norm's weight is scaled by the root of its width, see `normed`."""
        values = values.detach()
        values = values.float() * math.sqrt(values.shape[-1]) if scaled else values
        self.vectors.append(nn.Parameter(values, requires_grad=False))
        return self.vectors[-1]

    def forward(self, x, rope, mask, positions, cache):
        (B, T, C), (H, K, D), (cos, sin) = x.shape, self.heads, rope
        # behind the first positions a single query sees all keys, and several have a mask
        causal = cache is None or cache.start == 0
        if mask is not None and mask.is_cuda:  # as a term of the scores: SDPA would convert it
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -torch.inf)
        x = x.view(B * T, C)
        for layer, parts in enumerate(self.layers):
            norm, qkv, bias, head_norm, out, second_norm, gate_up, down = parts
            heads = qkv.times(self.normed(x, norm, self.radius))
            heads = heads if bias is None else heads + bias
            heads = heads.view(B, T, H + 2 * K, D).transpose(1, 2)
            qk, v = heads.split([H + K, K], dim=1)  # (B, H + K, T, D), (B, K, T, D)
            qk = qk if head_norm is None else self.normed(qk, head_norm, self.head_radius)
            # queries and keys turn in one go: x cos + (x rolled by half a head) sin
            qk = torch.addcmul(qk * cos, qk.roll(D // 2, -1), sin).to(x.dtype)
            q, k = qk.split([H, K], dim=1)
            if cache is not None:
                k, v = cache.append(layer, k, v, positions)
            y = attend(q, k, v, mask, causal)
            x = out.onto(x, y.transpose(1, 2).reshape(B * T, H * D))
            gate, up = gate_up.times(self.normed(x, second_norm, self.radius)).chunk(2, dim=1)
            x = down.onto(x, F.silu(gate).mul_(up))
        return x.view(B, T, C)

    def normed(self, x, weight, radius):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return (x / torch.hypot(length, radius)).mul_(weight).to(x.dtype)


def fuse(model, int8=False):
    """Exchanges the parts of a Llama for those above; returns it. `int8`: a fourth of the bytes.

    No weight stays in a mapped file.
    """
    decoder, matrix = model.model, Int8Matrix if int8 else Matrix
    head, embedding = matrix(model.lm_head), decoder.embed_tokens
    if int8:
        decoder.embed_tokens = Int8Embedding(embedding)
    else:
        if head.packed is not None:  # eval.py reads it, and a tied embedding
            weight = model.lm_head.weight.detach().clone()
            head.weight = nn.Parameter(weight, requires_grad=False)
        tied = model.cfg.tie_word_embeddings
        weight = head.weight if tied else embedding.weight.detach().clone()
        decoder.embed_tokens = nn.Embedding.from_pretrained(weight)
    model.lm_head = head
    decoder.norm.weight = nn.Parameter(decoder.norm.weight.clone(), requires_grad=False)
    decoder.cos = torch.cat((decoder.cos, decoder.cos), dim=-1)  # (positions, D)
    decoder.sin = torch.cat((-decoder.sin, decoder.sin), dim=-1)
    decoder.layers = nn.ModuleList([FusedBlocks(decoder, model.cfg, matrix)])
    return model


# ---- The engine: prompts in, tokens out
#
# A row's tokens depend on its own prompt, settings and seed, never on its neighbours. (Up to
# rounding: the product of 8 rows may differ from that of one in the last bit, which matters where
# two tokens are as good as equal: now and then in bfloat16, hardly ever in float32, never in int8.)


@dataclass(eq=False)
class Request:
    """What a row is asked, and its answer so far. A reader may set `finish`: the row then ends."""

    prompt: list[int]  # opened by BOS
    max_new_tokens: int
    sampling: Sampling = Sampling()
    stop_ids: Collection[int] = ()
    top_logprobs: int | None = None  # record log-probabilities, and those of so many likeliest ids
    echo: bool = False  # record the log-probabilities of the prompt first
    bias: torch.Tensor | None = None  # (V,) added to the logits; `take` may change it
    ids: list[int] = field(default_factory=list)  # the answer, without the id that stopped it
    # for each id its own log-probability and [(id, log-probability), ...], the likeliest first
    logprobs: list[tuple] = field(default_factory=list)
    finish: str | None = None  # stop, length, context; error: the engine failed; a reader's word

    def take(self, id, limit, logprob):
        """Adds a new id and returns it; None if the row ends before it. `limit`: of the context."""
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


def rows_of(cache, rows):
    """Returns the slice `rows` of a KVCache: the same memory, a `start` and a window of its own."""
    part = copy.copy(cache)
    part.k, part.v = [k[rows] for k in cache.k], [v[rows] for v in cache.v]
    part.lengths = cache.lengths[rows]
    return part


def window_for(length):
    """Returns the window for `length` positions: 256, 512, ... - few shapes, and little in vain."""
    return max(256, 1 << (length - 1).bit_length())


def decode(model, cache, tokens):
    """Returns the logits (B, V) that follow tokens (B, 1), one for each row."""
    return model(tokens, cache=cache)[:, -1]


@functools.cache
def compiled_decode():
    """Returns `decode` with its kernels fused; all engines share it: a shape is compiled once."""
    return torch.compile(decode, dynamic=False)


class Engine:
    """Decodes `slots` rows in step; requests join free slots between two calls of `advance`.

    A row that has ended computes on until another takes its slot: its tokens are thrown away, its
    position stays in bounds. On a CPU slots above the last one in use are left out. With `graphs`
    all shapes are fixed: the cache is read through a window that grows by doubling. On CUDA a step
    is then compiled and captured once for each window and arguments of `_step`.
    """

    def __init__(self, model, slots, limit=None, graphs=False, chunk=512):
        assert not model.training, "dropout would have a say in every token: model.eval() first"
        weight, context = model.model.norm.weight, model.cfg.sequence_length
        self.model, self.device, self.graphs, self.chunk = model, weight.device, graphs, chunk
        self.limit = min(limit or context, context)  # of prompt and answer together
        capacity = window_for(self.limit) if graphs else self.limit
        self.cache = KVCache(model.cfg, slots, capacity, self.device, weight.dtype)
        # what a step reads and writes never moves, as CUDA graphs need it; a row for each slot:
        self.history = torch.zeros(slots, self.limit, dtype=torch.long, device=self.device)
        self.tokens = self.history.new_zeros(slots, 1)  # the newest, not yet fed
        self.uniforms = torch.ones(slots, self.limit, device=self.device)  # by the token's position
        self.table = rule_table([Sampling()] * slots, model.cfg.vocab_size).to(self.device)
        self.bias = torch.zeros(slots, model.cfg.vocab_size, device=self.device)
        self.requests = [Request([], 0, finish="stop")] * slots
        self.part = None  # the cache and the rules of the rows that are computed
        self.fed = [0] * slots  # positions in the cache, as the host knows them
        self.joining = []  # slots whose prompts wait to be prefilled, oldest first
        self.burst = 1 if self.device.type == "cpu" else 8  # steps per wait for the device
        self.step, self.captured = self._step, {}
        if graphs and self.device.type == "cuda":
            self.step, self.pool = self._replay, torch.cuda.graph_pool_handle()

    @property
    def free(self):
        """The slots that requests may join."""
        return [slot for slot, request in enumerate(self.requests) if request.finish]

    def join(self, requests):
        """Puts requests into free slots, which it returns. UserError for a prompt too long."""
        for request in requests:
            length = len(request.prompt)
            if length + min(1, request.max_new_tokens) > self.limit:
                problem = f"{length} tokens (BOS included) leave no room for an answer"
                raise UserError(f"prompt: {problem} in a context of {self.limit}; shorten it")
        slots = self.free[: len(requests)]
        self.joining = [slot for slot in self.joining if slot not in slots] + slots
        for slot, request in zip(slots, requests, strict=True):
            self.requests[slot], self.fed[slot] = request, 0
            request.logprobs = [(None, [])] * request.echo  # nothing tells a prompt's first id
        return slots

    @torch.inference_mode()
    def advance(self):
        """Takes a turn: up to `chunk` positions of waiting prompts, then a step or a few for rows.

        Yields ids (or None) by slot, step by step, nothing if no row is ready to decode. What goes
        wrong ends the prompt that is fed, or all rows that are decoded, so that no slot is lost.
        """
        self.joining = [slot for slot in self.joining if not self.requests[slot].finish]
        rows = {}
        try:
            self._prefill()
            waiting = {*self.free, *self.joining}
            rows = {slot: row for slot, row in enumerate(self.requests) if slot not in waiting}
            steps = self._decode(rows) if rows else []
        except BaseException as problem:
            stopped = isinstance(problem, KeyboardInterrupt)
            for request in rows.values() or [self.requests[slot] for slot in self.joining[:1]]:
                request.finish = request.finish or ("stopped" if stopped else "error")
            raise
        for ids, reports in steps:  # a row that its reader ends in between takes no more
            taken = [None] * len(self.requests)
            for slot, request in rows.items():
                taken[slot] = request.take(ids[slot], self.limit, reports[slot])
            yield taken

    def _prefill(self):
        """Feeds prompts but for their last tokens, which the first decode step feeds.

        A prompt is cut at multiples of `chunk`, wherever its neighbours are; equal ones run once.
        """
        spent = 0
        while self.joining:
            slot = self.joining[0]
            request, begin = self.requests[slot], self.fed[slot]
            piece = request.prompt[begin:-1][: self.chunk]
            if spent and spent + len(piece) > self.chunk:
                return
            if piece:
                self.cache.lengths[slot] = begin
                row = rows_of(self.cache, slice(slot, slot + 1))
                row.start = begin
                x = self.model.model(torch.tensor([piece], device=self.device), cache=row)
                if request.echo:  # each position predicts the next id
                    logits, ids = self.model.lm_head(x[0]), request.prompt[begin + 1 :]
                    ids = torch.tensor(ids[: len(piece)], device=self.device)[:, None]
                    request.logprobs += listed(*log_probs(logits, ids, request.top_logprobs))
            spent, self.fed[slot] = spent + len(piece), begin + len(piece)
            if self.fed[slot] == len(request.prompt) - 1:
                self._seat(slot)

    def _seat(self, slot):
        """The prompt in `slot` is in the cache: its row, and all with an equal one, may decode."""
        opening, size = self.requests[slot].prompt[:-1], len(self.requests[slot].prompt)
        alike = [i for i in self.joining if self.requests[i].prompt[:-1] == opening]
        seated = [i for i in alike if i == slot or not self.requests[i].echo]
        for stored in (*self.cache.k, *self.cache.v) if len(seated) > 1 else ():  # of each layer
            stored[seated, :, : size - 1] = stored[slot, :, : size - 1].clone()
        for i, request in ((i, self.requests[i]) for i in seated):
            self.table[i] = rule_table([request.sampling], self.model.cfg.vocab_size)[0]
            prompt = torch.tensor(request.prompt, device=self.device)
            self.fed[i] = self.cache.lengths[i] = size - 1
            self.tokens[i], self.history[i], self.history[i, :size] = prompt[-1], prompt[0], prompt
            self.uniforms[i, size:] = uniforms(request.sampling.seed, self.limit - size)
            request.finish = request.finish or (None if request.max_new_tokens else "length")
        self.joining = [i for i in self.joining if i not in seated]

    def _decode(self, rows):
        """Takes up to `burst` steps for rows {slot: request}: [(ids, log-probabilities), ...]."""
        size = len(self.requests) if self.graphs else max(rows) + 1
        requests, fed = rows.values(), [self.fed[slot] for slot in rows]
        room = max(row.max_new_tokens - len(row.ids) for row in requests)
        biased = any(row.bias is not None for row in requests)
        for slot, row in rows.items() if biased else ():
            self.bias[slot] = 0 if row.bias is None else row.bias
        # a bias may change with every token
        count = min(1 if biased else self.burst, room, self.limit - 1 - min(fed))
        tops = [row.top_logprobs for row in requests if row.top_logprobs is not None]
        top = max(*tops, 20 * self.graphs) if tops else None  # few values, few graphs
        branches = Branches.of([row.sampling for row in requests], self.model.cfg.vocab_size)
        # in a burst a row that is ending may seem longer than there is room for
        longest = min(max(fed) + count, self.limit)
        # equally long rows are appended to, and read, as slices: no mask, no index
        even = len(set(self.fed[:size])) == 1 and not any(slot < size for slot in self.joining)
        if self.part is None or size != len(self.part.lengths):
            self.part = rows_of(self.cache, slice(size))
            self.columns = dict(zip(RULES, self.table[:size].split(1, dim=1)))  # (B, 1) each
        self.part.start = self.fed[0] if even and not self.graphs else None
        self.part.window = window_for(longest) if self.graphs else longest
        new = torch.empty(count, size, dtype=torch.long, device=self.device)
        reports = []
        for step in range(count):
            report = self.step(branches, top, biased)
            new[step] = self.tokens[:size, 0]
            reports.append(listed(*report) if report else [None] * size)
        self.fed = [fed + count * (slot not in self.joining) for slot, fed in enumerate(self.fed)]
        return list(zip(new.tolist(), reports))  # here the host waits for the device

    def _step(self, branches, top, biased, forward=decode):
        """Puts the next tokens in the place of the newest; returns the `log_probs` of these."""
        part, rows = self.part, slice(len(self.part.lengths))
        tokens, history = self.tokens[rows], self.history[rows]  # (B, 1), (B, limit)
        logits = forward(self.model, part, tokens)  # (B, V)
        own = logits if top is None else logits.clone()  # before any rule
        if (unwritten := getattr(self.model, "unwritten", None)) is not None:
            logits.index_fill_(1, unwritten, -torch.inf)
        logits = logits + self.bias[rows] if biased else logits
        position = part.lengths.clamp_(max=self.limit - 1)[:, None]  # of the next token
        uniform = self.uniforms[rows].gather(1, position)
        tokens.copy_(next_token(logits, branches, self.columns, history, uniform))
        history.scatter_(1, position, tokens)
        return None if top is None else log_probs(own, tokens, top)

    def _replay(self, *step):
        """Takes a step as a CUDA graph. The first time it is compiled and captured, after three
        trial runs, which leave nothing but keys and values to be overwritten.
        """
        key = self.part.window, *step
        if key not in self.captured:
            state = self.tokens, self.history, self.cache.lengths
            before = [tensor.clone() for tensor in state]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # the first runs allocate, tune and load kernels
                for _ in range(3):
                    self._step(*step, compiled_decode())
            torch.cuda.current_stream().wait_stream(side)
            for tensor, value in zip(state, before):
                tensor.copy_(value)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):  # one pool: one graph runs at a time
                self.captured[key] = graph, self._step(*step, compiled_decode())
        graph, report = self.captured[key]
        graph.replay()
        return report


def generate(model, requests, engine=None):
    """Runs requests to their end in one batch: prefill, then a token per row and step.

    Yields after each step a list with each row's new id, None where the row has ended (its request
    says why). Draws nothing from the global generator. `engine`: an earlier one, with its graphs.
    UserError for a prompt that leaves no room.
    """
    if engine is None:
        longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
        engine = Engine(model, len(requests), longest)
    slots = engine.join(requests)
    while any(request.finish is None for request in requests):
        for ids in engine.advance():
            if any(ids[slot] is not None for slot in slots):
                yield [ids[slot] for slot in slots]


def log_probs(logits, ids, top):
    """Returns log-probabilities before any rule, in nats: of `ids`, and of the `top` likeliest.

    logits (N, V), ids (N, 1) -> (N, 1), (N, top), and the ids of the latter, (N, top).
    """
    x = logits.float().log_softmax(dim=-1)
    return x.gather(1, ids), *x.topk(min(top, x.shape[1]))


def listed(own, values, ids):
    """Returns the result of `log_probs` as [(own, [(id, log-probability), ...]), ...]."""
    pairs = ([*zip(*row)] for row in zip(ids.tolist(), values.tolist()))
    return list(zip(own.flatten().tolist(), pairs))


# ---- From folders to models, from ids to text


def open_model(folder, device="auto", dtype="auto", compile=False):
    """Returns (fused Llama, Tokenizer) of a model or adapter folder; UserError if not a pair.

    Engines write no control id, which has no text, but those that end an answer.
    """
    device = choose_device(device)
    engines = torch.backends.quantized.supported_engines if device.type == "cpu" else ()
    if dtype == "int8" and "fbgemm" not in engines:
        raise UserError(f"dtype=int8 is for x86 CPUs, not for this {device.type}; use --dtype=auto")
    if compile and device.type != "cuda":
        raise UserError(f"compile: CUDA graphs need CUDA, this is {device.type}; leave it off")
    path = model_folder(folder) / "config.json"  # an adapter's folder has none, and merges in fp32
    hf = read_object(path) if path.is_file() else {}
    in_bf16 = (hf.get("dtype") or hf.get("torch_dtype")) == "bfloat16"
    exact = dtype == "int8" or (device.type == "cpu" and dtype == "auto" and not in_bf16)
    chosen, reason = choose_dtype("fp32" if exact else dtype, device)
    if "slower" in reason:
        note(f"dtype={dtype}: {reason}")
    model = load_model(folder, device, chosen, mapped=True)
    tokenizer = Tokenizer.load(model_folder(folder))
    tokenizer.match(model.cfg.vocab_size, folder)
    ends = stop_ids(tokenizer, tokenizer.template)
    ids = [id for id in (tokenizer.token_bytes() == 0).nonzero()[0].tolist() if id not in ends]
    model.unwritten = torch.tensor(ids, dtype=torch.long, device=device)
    if dtype == "int8":
        return fuse_to_int8(model, tokenizer.prompt_ids(INT8_TEXT)), tokenizer
    return fuse(model), tokenizer


INT8_TEXT = "The train to Rome leaves at nine, and we are late."  # any text of some tokens
INT8_CHANGE = 0.1  # the largest, of the logits' norm, that int8 may make: 0.01 to 0.02 is usual


@torch.no_grad()
def fuse_to_int8(model, ids):
    """Returns the model in int8; UserError if that changes its logits after `ids` too much.

    Where a few numbers of an activation are far larger than all others (Dettmers et al. 2022), one
    scale for a row leaves the others no digits.
    """
    ids = torch.tensor([ids[: model.cfg.sequence_length]])
    logits = model(ids)
    model = fuse(model, int8=True)
    change = float((model(ids) - logits).norm() / (logits - logits.mean(-1, keepdim=True)).norm())
    if not change <= INT8_CHANGE:
        problem = f"changes this model's logits by {change:.0%}, more than {INT8_CHANGE:.0%}"
        raise UserError(f"dtype=int8 {problem}: it has outliers; leave --dtype out")
    return model


class Reply:
    """The text of a row as it grows: whole characters, no control tokens, nothing from a stop text.

    Text is held back while it may begin a stop text, whatever tokens spell it; with `trim`, which
    takes the white space around the answer away, also white space until more text follows. `shown`
    counts the characters given out, `held` is the text held back; `cut`: some text was left out.
    """

    def __init__(self, tokenizer, stop=(), trim=False):
        self.characters, self.stop, self.trim = tokenizer.stream(begun=True), tuple(stop), trim
        self.shown, self.held, self.stopped, self.cut = 0, "", False, False

    def push(self, id=None):
        """Takes an id, or none once no more come; returns the text that is now certain.

        A stop text sets `stopped`.
        """
        if self.stopped:
            return ""
        last = id is None
        text = self.held + (self.characters.flush() if last else self.characters.push(id))
        stops = [at for at in map(text.find, self.stop) if at >= 0]
        if stops:
            self.stopped, last, text = True, True, text[: min(stops)]
        starts = (stop[:n] for stop in self.stop for n in range(len(stop)))  # cut short by the end
        hold = 0 if last else max((len(s) for s in starts if text.endswith(s)), default=0)
        text, held = text[: len(text) - hold], text[len(text) - hold :]
        if self.trim:
            text = text if self.shown else text.lstrip()
            body = text.rstrip()
            text, held = body, text[len(body) :] + held
        self.held, self.cut = "" if last else held, self.stopped or (last and bool(held))
        self.shown += len(text)
        return text


# ---- In the terminal: answers on stdout, all else on stderr


def show(text):
    """Prints a piece of a model's text; on a terminal without control characters."""
    if sys.stdout.isatty():  # some would move the cursor, rename the window or worse
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
    print(text, end="", flush=True)


def note(text):
    print(text, file=sys.stderr, flush=True)


def print_replies(engine, requests, replies):
    """Prints answers one below the other, the first as it is written; returns their texts.

    Then notes how each answer ended and the speed. Ctrl-C ends them all, with finish "stopped".
    """
    texts, start = [""] * len(requests), time.perf_counter()
    header = "--- sample {} ---\n" if len(requests) > 1 else ""
    show(header.format(1))
    try:
        for ids in generate(engine.model, requests, engine):
            for row, (id, request, reply) in enumerate(zip(ids, requests, replies)):
                text = "" if id is None else reply.push(id)
                request.finish = "stop" if reply.stopped else request.finish
                text += reply.push() if request.finish else ""
                texts[row] += text
                show(text if row == 0 else "")
    except KeyboardInterrupt:
        for request in requests:
            request.finish = request.finish or "stopped"
    show("\n" + "".join(f"{header.format(i)}{text}\n" for i, text in enumerate(texts[1:], 2)))
    seconds, count = time.perf_counter() - start, sum(len(request.ids) for request in requests)
    for request in requests:
        ended = f"{len(request.ids)} tokens, ended by {request.finish}"
        note(f"{ended}, seed {request.sampling.seed}, prompt {len(request.prompt)} tokens")
    note(f"{count} tokens in {seconds:.2f} s: {count / max(seconds, 1e-9):,.0f} tokens/s")
    return texts


HELP = """\
/help           this list
/clear          forget the conversation, keep the system message
/system TEXT    tell the model what to be
/retry          answer the last question again
/save FILE      append the conversation to FILE, a row as sft.py reads it
/quit           leave; so do Ctrl-C and Ctrl-D. While an answer is written, Ctrl-C ends the answer
Any other line is a question."""


class Chat:
    """A conversation: `system`, a list of one message or none, and `turns`, of two for each answer.

    Text enters the model's template as text: nothing typed becomes a control token. A model without
    a template continues each text and remembers none.
    """

    def __init__(self, cfg, model, tokenizer):
        self.cfg, self.tokenizer, self.template = cfg, tokenizer, tokenizer.template
        self.engine, self.system, self.turns = Engine(model, 1, graphs=cfg.compile), [], []
        self.longest = cfg.max_new_tokens or 512
        self.person = sys.stdin.isatty() and not cfg.prompt  # else a pipe, or a single question
        (self.sampling,) = cfg.seeded(1)
        for line in template_notes(tokenizer, cfg.model_path):
            note(line)
        if cfg.system:
            self.obey(f"/system {cfg.system}")

    def obey(self, line):
        """Does what a line says; returns False for /quit. UserError if it can't be done."""
        word, _, text = line.strip().partition(" ")
        if word == "/help":
            note(HELP)
        elif word == "/clear":
            self.turns = []
        elif word == "/system":
            if self.template is None:
                raise UserError("system: the model has no chat template; drop the system message")
            self.tokenizer.encode(text)  # UserError if it is not Unicode
            self.system = [{"role": "system", "content": text.strip()}] if text else []
        elif word in ("/retry", "/save") and not self.turns:
            raise UserError(f"{word}: there is no answer yet; ask a question")
        elif word == "/retry":
            self.ask(self.turns[-2]["content"], self.turns[:-2])
        elif word == "/save":
            row, path = {"messages": self.system + self.turns}, text.strip()
            with refusing(OSError, line, "name a file"), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        elif word and word != "/quit":
            self.ask(line, self.turns)
        return word != "/quit"

    def ask(self, text, turns):
        """Prints the answer to `text` after `turns`, and remembers both unless it is empty.

        Each answer's seed is one more than the last one's. Ctrl-C ends the answer, which is
        remembered as far as it got. UserError if there is no room for one, and nothing changes.
        """
        turns = [*turns, {"role": "user", "content": text}]
        limit = self.engine.limit
        if self.template is None:
            ids = self.tokenizer.prompt_ids(text)
        else:
            for first in range(0, len(turns), 2):  # a full context forgets old turns
                messages = self.system + turns[first:]
                ids, _ = render(self.tokenizer, messages, self.template, add_generation_prompt=True)
                if len(ids) + min(self.longest, limit // 4) <= limit:
                    break
            if first and len(ids) < limit:  # else the engine refuses the question
                note(f"(the context of {limit} tokens is full: the oldest turns are forgotten)")
            turns = turns[first:]
        request = Request(ids, self.longest, self.sampling, stop_ids(self.tokenizer, self.template))
        reply = Reply(self.tokenizer, self.cfg.stop, trim=self.template is not None)
        (answer,) = print_replies(self.engine, [request], [reply])
        self.sampling = replace(self.sampling, seed=(self.sampling.seed + 1) % 2**64)
        if answer and self.template is not None:
            self.turns = [*turns, {"role": "assistant", "content": answer}]
        if request.finish == "stopped" and not self.person:
            raise KeyboardInterrupt


def converse(chat):
    """Obeys lines until there are no more. An error ends a pipe; a person is told and goes on."""
    sys.stdin.reconfigure(errors="surrogateescape")  # the tokenizer refuses what is not UTF-8
    if chat.person:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() editing and a history
        note("a conversation; /help lists the commands")
    while True:
        try:
            if not chat.obey(input("> " if chat.person else "")):
                return
        except EOFError:
            return
        except (UserError, KeyboardInterrupt) as problem:
            if not chat.person:
                raise
            if isinstance(problem, KeyboardInterrupt):
                return note("")
            note(f"error: {problem}")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Sampling):
    """One prompt and how to continue it."""

    model_path: str  # a model folder
    prompt: str = ""  # text to continue; none at all is fine: a document's beginning
    chat: bool = False  # converse in the model's chat template; with a prompt answer that and leave
    system: str = ""  # in a chat: what the model is told to be
    max_new_tokens: PositiveInt | None = None  # of an answer, at most; none = 64, in a chat 512
    num_samples: Annotated[int, Range(1, 1024)] = 1  # side by side, with seeds seed, seed + 1, ...
    # texts before which a sample ends, as a,b or ["a","b,c"]; \n is a line break, \t a tab
    stop: tuple[str, ...] = ()
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    # bf16 on a GPU that has it, on a CPU that has it for weights stored so; else fp32. int8 (CPU):
    # a fourth the memory, faster, a bit off
    dtype: Literal["auto", "fp32", "bf16", "fp16", "int8"] = "auto"
    compile: bool = False  # CUDA only: replay the decode step as a graph; the start takes minutes

    def __post_init__(self):
        if not all(self.stop):
            raise ValueError('stop: an empty text stops everything; [","] is a list with a comma')
        typed = (text.replace(r"\n", "\n").replace(r"\t", "\t") for text in self.stop)
        object.__setattr__(self, "stop", tuple(typed))
        if self.chat and self.num_samples > 1:
            raise ValueError("num_samples, chat: a chat gives one answer at a time; leave one out")
        if self.system and not self.chat:
            raise ValueError("system is for --chat: a prompt alone is continued as it stands")


def main(cfg):
    model, tokenizer = open_model(cfg.model_path, cfg.device, cfg.dtype, cfg.compile)
    if cfg.chat:
        chat = Chat(cfg, model, tokenizer)
        return chat.ask(cfg.prompt, []) if cfg.prompt else converse(chat)
    prompt, longest = tokenizer.prompt_ids(cfg.prompt), cfg.max_new_tokens or 64
    ends = stop_ids(tokenizer, tokenizer.template)
    requests = [Request(prompt, longest, rules, ends) for rules in cfg.seeded(cfg.num_samples)]
    engine = Engine(model, len(requests), len(prompt) + longest, graphs=cfg.compile)
    print_replies(engine, requests, [Reply(tokenizer, cfg.stop) for _ in requests])
    if any(request.finish == "stopped" for request in requests):
        raise KeyboardInterrupt


if __name__ == "__main__":
    run(main, SampleConfig, __doc__)
