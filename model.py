"""The LLaMA by hand: the network, its losses, LoRA, and the folders that hold them on disk.

    python model.py configs/tiny.json      architecture report: exact counts, FLOPs, memory by part

The network is LLaMA's (Touvron et al. 2023); by two options Qwen3's (a norm on queries and keys) or
Qwen2's (biases on queries, keys, values). Submodules have the names of Hugging Face's
LlamaForCausalLM, so `state_dict()` is the file. Nothing here knows text, ranks or training.

Shapes:  B batch    T positions    S keys to look at, T or more with a cache    V vocabulary
         C width of the residual stream    H query heads    K key/value heads    D head width
"""

import contextlib
import hashlib
import json
import math
import mmap
import os
import sys
from collections import namedtuple
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lib import config
from lib.config import Fraction, Option, PositiveFloat, PositiveInt, Range, UserError, refusing
from lib.folders import refuse_pointer


@dataclass(frozen=True)
class ModelConfig:
    """The architecture; fields are the keys of the presets."""

    model_name: str = "custom"  # a name for people; nothing depends on it
    n_layer: Annotated[int, Range(1, 512)] = 6  # transformer blocks
    d_model: Annotated[int, Range(2, 65536)] = 256  # width C of the residual stream
    n_head: Annotated[int, Range(1, 1024)] = 4  # query heads H
    num_key_value_heads: Annotated[int, Range(1, 1024)] | None = None  # K, at most H; none = H
    head_dim: Annotated[int, Range(2, 1024)] | None = None  # width D of a head; none = d_model / H
    qk_norm: bool = False  # RMSNorm on each head's queries and keys, as in Qwen3
    qkv_bias: bool = False  # biases on queries, keys and values, as in Qwen2
    d_ff: Annotated[int, Range(1, 1 << 20)] = 1024  # inner width of the SwiGLU
    vocab_size: Annotated[int, Range(8, 1 << 20)] = 32768  # V, the tokenizer's size
    sequence_length: Annotated[int, Range(1, 1 << 20)] = 1024  # longest context, in tokens
    dropout: Fraction = 0.0  # on embeddings, and the default of the two below
    attention_dropout: Fraction | None = None  # on attention probabilities; none = dropout
    hidden_dropout: Fraction | None = None  # on what each block adds to x; none = dropout
    rope_theta: PositiveFloat = 10000.0  # base of the rotary frequencies
    rope_scaling: dict | None = None  # {"rope_type": "linear", "factor": 2.0}, or llama3's
    layer_norm_epsilon: PositiveFloat = 1e-5  # inside RMSNorm's square root
    initializer_range: PositiveFloat = 0.02  # standard deviation of the initial weights
    tie_word_embeddings: bool = True  # one table for reading tokens and for predicting them
    bos_token_id: Annotated[int, Range(0)] | None = 1  # opens every document
    eos_token_id: Annotated[int, Range(0)] | None = 2  # closes every document
    pad_token_id: Annotated[int, Range(0)] = 0  # fills short rows; never supervised

    def __post_init__(self):
        C, H, K = self.d_model, self.n_head, self.kv_heads
        if C % H:
            raise ValueError(f"d_model {C} is not divisible by n_head {H}")
        if H % K:
            raise ValueError(f"n_head {H} is not divisible by num_key_value_heads {K}")
        if (D := self.head_width) % 2:
            raise ValueError(f"head_dim, or d_model / n_head, is {D}, which is odd; RoPE has pairs")
        if self.qk_norm and self.qkv_bias:
            raise ValueError("qk_norm, qkv_bias: no model that other programs open has both")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if (id := getattr(self, name) or 0) >= self.vocab_size:
                raise ValueError(f"{name} {id} is outside the vocabulary of {self.vocab_size}")
        numbers = dict(self.rope_scaling or {"rope_type": "default"})
        sound = ROPE_NUMBERS.get(str(numbers.pop("rope_type", None))) == numbers.keys()
        sound &= all(type(n) in (int, float) and 0 < n < math.inf for n in numbers.values())
        if not sound or numbers.get("low_freq_factor", 0) >= numbers.get("high_freq_factor", 1):
            llama3 = f"llama3 with {', '.join(sorted(ROPE_NUMBERS['llama3']))}, low < high"
            expected = f'expected {{"rope_type": "linear", "factor": 2.0}}, or {llama3}, all > 0'
            raise ValueError(f"rope_scaling {json.dumps(self.rope_scaling)}: {expected}")

    @property
    def kv_heads(self):
        return self.num_key_value_heads or self.n_head

    @property
    def head_width(self):
        return self.head_dim or self.d_model // self.n_head

    def probability(self, dropout):
        return self.dropout if dropout is None else dropout


# ---- Rotary positions (Su et al. 2021)

LLAMA3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
ROPE_NUMBERS = {"default": set(), "linear": {"factor"}, "llama3": LLAMA3}  # by rope_type


def rope_frequencies(cfg):
    """Returns the angle by which each pair turns per position, (D/2,) float64."""
    # pair i turns by theta^(-2i/D): the first pairs fast, the last ones slowly
    D, scaling = cfg.head_width, cfg.rope_scaling or {"rope_type": "default"}
    exponents = -torch.arange(0, D, 2, dtype=torch.float64, device="cpu") / D  # not meta, either
    frequency, keep = cfg.rope_theta**exponents, 0
    if scaling["rope_type"] == "llama3":  # keeps the fast pairs, a ramp between them and slow ones
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    # squeezes the positions by the factor (Chen et al. 2023)
    return keep * frequency + (1 - keep) * frequency / scaling.get("factor", 1.0)


def rotate(x, cos, sin):
    """Turns each pair (x[i], x[i + D/2]) of x (B, H, T, D) by its position's angle.

    cos, sin (.., T, D/2). Scores q k then depend on how far apart two positions are, not on where.
    """
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def choose_attention(device, length, dtype, flash_wanted=True, compiled=False):
    """Returns (backend, reason) for rows of `length`: `flash`, `math`, or torch's own `sdpa`."""
    if device.type == "cpu" and length <= 512 and dtype != torch.float32:
        if not compiled or math_compiles(dtype):
            return "math", "on a CPU two matmuls beat torch's kernel in 16 bits up to 512 positions"
        return "sdpa", "compiled, two matmuls have no finite gradients on this CPU"
    if device.type != "cuda" or not flash_wanted:
        return "sdpa", "flash_attn is off" if device.type == "cuda" else "flash-attn needs CUDA"
    try:
        import flash_attn  # noqa: F401
    except ImportError as error:  # not installed, or built for another torch
        return "sdpa", f"flash-attn does not load: {error} (make install-flash)"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return "sdpa", "flash-attn needs compute capability 8.0"
    return "flash", "flash-attn is installed"


def attend(q, k, v, mask=None, causal=True, dropout=0.0, backend="sdpa"):
    """Returns softmax(q k^T / sqrt(D)) v, (B, H, T, D) (Vaswani et al. 2017, equation 1).

    q (B, H, T, D); k, v (B, K, S, D): each key/value head serves H / K query heads (Ainslie et al.
    2023). mask (B or 1, 1, T, S) bool, True = may look, replaces `causal`. flash-attn takes 16-bit
    heads of up to 256 without a mask; the rest goes to torch's kernel.
    """
    half = q.dtype in (torch.float16, torch.bfloat16)
    if backend == "flash" and mask is None and half and q.shape[-1] <= 256:
        from flash_attn import flash_attn_func

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, T, heads, D)
        return flash_attn_func(q, k, v, dropout_p=dropout, causal=causal).transpose(1, 2)
    if backend != "math":
        causal, grouped = causal and mask is None, q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=grouped)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # (B, H, S, D)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, T, S)
    if mask is None and causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        # added, so it costs no backward pass; finite, because a vector of -inf has the softmax NaN
        scores += (~mask).to(scores.dtype) * (torch.finfo(scores.dtype).min / 2)
    # the kernel sums in 32 bits; autocast, if not told the dtype, would copy the scores to and fro
    return F.dropout(scores.softmax(dim=-1, dtype=scores.dtype), dropout) @ v


def math_compiles(dtype):
    """Returns whether compiled `math` has finite gradients: on a Xeon, torch 2.13's were NaN."""
    x = torch.linspace(-1, 1, 4096, dtype=dtype).view(1, 1, 64, 64).requires_grad_()
    torch.compile(attend)(x, x, x, backend="math").float().square().sum().backward()
    return bool(x.grad.isfinite().all())


class Attention(nn.Module):
    """Every token of x (B, T, C) collects from those it may see; returns (B, T, C)."""

    def __init__(self, cfg, layer):
        super().__init__()
        self.layer, self.head_dim, self.backend = layer, cfg.head_width, "sdpa"
        self.dropout = nn.Dropout(cfg.probability(cfg.attention_dropout))
        C, D, bias = cfg.d_model, cfg.head_width, cfg.qkv_bias
        self.q_proj = nn.Linear(C, cfg.n_head * D, bias)
        self.k_proj = nn.Linear(C, cfg.kv_heads * D, bias)
        self.v_proj = nn.Linear(C, cfg.kv_heads * D, bias)
        self.o_proj = nn.Linear(cfg.n_head * D, C, bias=False)
        norm = RMSNorm if cfg.qk_norm else nn.Identity
        self.q_norm, self.k_norm = (norm(D, cfg.layer_norm_epsilon) for _ in "qk")

    def forward(self, x, rope, mask, positions, cache):
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, T, D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        if cache is not None:
            k, v = (x.to(q.dtype) for x in cache.append(self.layer, k, v, positions))
        # after the first piece a single query may see every key, and several have a mask
        causal = cache is None or cache.start == 0
        y = attend(q, k, v, mask, causal, self.dropout.p * self.training, self.backend)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # heads side by side: (B, T, C)


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019, equation 4), computed in float32."""

    def __init__(self, width, epsilon):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + self.epsilon)
        return (h * self.weight).to(x.dtype)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), C -> d_ff -> C (Shazeer 2020, equation 6)."""

    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.up_proj = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.down_proj = nn.Linear(cfg.d_ff, cfg.d_model, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Two branches, attention and MLP, each added to the residual stream x (B, T, C)."""

    def __init__(self, cfg, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.d_model, cfg.layer_norm_epsilon)
        self.self_attn = Attention(cfg, layer)
        self.post_attention_layernorm = RMSNorm(cfg.d_model, cfg.layer_norm_epsilon)
        self.mlp = MLP(cfg)
        self.dropout = nn.Dropout(cfg.probability(cfg.hidden_dropout))

    def forward(self, x, rope, mask, positions, cache):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, mask, positions, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """Everything below the head: ids (B, T) -> hidden states (B, T, C)."""

    def __init__(self, cfg):
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.dropout = nn.Dropout(cfg.dropout)
        self.layers = nn.ModuleList(Block(cfg, i) for i in range(cfg.n_layer))
        self.norm = RMSNorm(cfg.d_model, cfg.layer_norm_epsilon)
        self.gradient_checkpointing = False  # if so, the backward pass computes each block again
        positions = torch.arange(cfg.sequence_length, dtype=torch.float64, device="cpu")
        angles = positions[:, None] * rope_frequencies(cfg)  # (sequence_length, D/2)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, ids, positions=None, documents=None, cache=None):
        T, mask = ids.shape[1], None
        if cache is not None:
            if positions is None:  # those after what each row holds, (B, T)
                positions = cache.lengths[:, None] + torch.arange(T, device=ids.device)
            mask = cache.mask(positions)
        rows = slice(T) if positions is None else positions
        # (T, D/2) or (B, T, D/2), and an axis for the heads
        rope = self.cos[rows].unsqueeze(-3), self.sin[rows].unsqueeze(-3)
        if documents is not None:  # a token sees its own document up to itself: (B, 1, T, T)
            mask = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
        x = self.dropout(self.embed_tokens(ids))
        # most memory traffic is the residual stream's: under autocast it is kept in 16 bits
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for block in self.layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, rope, mask, positions, cache, use_reentrant=False)
            else:
                x = block(x, rope, mask, positions, cache)
        if cache is not None:
            cache.advance(T)
        return self.norm(x)


class Llama(nn.Module):
    """The language model: ids (B, T) -> logits (B, T, V). Its `model` alone gives hidden states.

    positions (B, T) are 0..T-1 if not given. documents (B, T) number the documents in a row, which
    do not see each other. cache is a KVCache that holds the positions before these.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.model = Decoder(cfg)
        self.lm_head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=cfg.initializer_range)
        # 2 n_layer branches are summed up: this makes the variance of the sum that of one (GPT-2)
        for name, p in self.named_parameters():  # the weights of norms stay 1
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(p, std=cfg.initializer_range / math.sqrt(2 * cfg.n_layer))
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        if cfg.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids, positions=None, documents=None, cache=None):
        return self.lm_head(self.model(ids, positions, documents, cache))

    def use_attention(self, backend):
        """Sets the backend of every block, see choose_attention."""
        for block in self.model.layers:
            block.self_attn.backend = backend


class KVCache:
    """Keys and values of B rows, preallocated for `capacity` positions; an argument of forward.

    While every row holds equally many positions (`start`), keys are appended and read as slices.
    With `start = None` rows are ragged: row b writes at `lengths[b]` and reads `window` positions
    under a mask; its shapes are fixed, as CUDA graphs need them.
    """

    def __init__(self, cfg, batch, capacity, device="cpu", dtype=torch.float32):
        shape = (batch, cfg.kv_heads, capacity, cfg.head_width)
        # one tensor per layer, because a compiler then writes in place
        self.k = [unused_memory(shape, device, dtype) for _ in range(cfg.n_layer)]
        self.v = [unused_memory(shape, device, dtype) for _ in range(cfg.n_layer)]
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.start, self.window, self.capacity = 0, capacity, capacity

    def append(self, layer, k, v, positions):
        """Stores k, v (B, K, T, D) of a layer; returns all its queries may see, (B, K, S, D)."""
        k_all, v_all = self.k[layer], self.v[layer]
        if self.start is not None:
            end = self.start + k.shape[2]
            k_all[:, :, self.start : end], v_all[:, :, self.start : end] = k, v
            return k_all[:, :, :end], v_all[:, :, :end]
        rows = torch.arange(len(k), device=k.device)[:, None]
        k, v = (x.transpose(1, 2).to(k_all.dtype) for x in (k, v))
        k_all[rows, :, positions], v_all[rows, :, positions] = k, v
        return k_all[:, :, : self.window], v_all[:, :, : self.window]

    def mask(self, positions):
        """Returns the mask (B, 1, T, S) of queries at `positions`; None if causality is enough."""
        count = positions.shape[1]
        if self.start is not None and (self.start == 0 or count == 1):
            return None
        keys = self.window if self.start is None else self.start + count
        return (torch.arange(keys, device=positions.device) <= positions[:, :, None])[:, None]

    def advance(self, count):
        self.lengths += count
        self.start = None if self.start is None else self.start + count


def unused_memory(shape, device, dtype):
    """Returns zeros; on a CPU, unlike torch.zeros, they take memory where they are used."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


# ---- Losses: sums in nats over supervised positions, never means; the label -100 is unsupervised
#
# The logits (N, V), the largest tensor of a small model's training, are never whole: they are made
# for a group of rows at a time and overwritten with their gradient, so that the backward pass only
# has to scale (Liger Kernel, Hsu et al. 2024). With z = x W^T and p = softmax(z):
#     loss = -log p[label]      dz = p - onehot(label)      dx = dz W      dW = dz^T x


def next_token_loss(model, batch):
    """Returns (summed cross-entropy of a batch, {}), see label_nats."""
    return label_nats(model, batch, summed=True), {}


def label_nats(model, batch, summed=False):
    """Returns -log p of batch["labels"] (B, T), already shifted: the terms (N,), or their sum.

    With batch["where"] (N,), indices of the B T flattened positions, the labels are theirs, (N,),
    and the head, the most expensive part of a small model, works on nothing else.
    """
    x = model.model(batch["ids"], batch.get("positions"), batch.get("documents")).flatten(0, 1)
    x = x.index_select(0, batch["where"]) if "where" in batch else x
    return linear_cross_entropy(x, model.lm_head.weight, batch["labels"].flatten(), summed)


def linear_cross_entropy(x, weight, labels, summed=True):
    """Returns the sum of -log softmax(x W^T)[label] for x (N, C), weight (V, C), labels (N,).

    With summed=False its terms, (N,) float32; an unsupervised row's is 0.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return LinearCrossEntropy.apply(x, weight, labels, summed)
    weight, groups = weight.to(x.dtype), row_groups(x, labels, len(weight))
    losses = [F.cross_entropy((x @ weight.T).float(), y, reduction="none") for x, y in groups]
    return torch.cat(losses).sum() if summed else torch.cat(losses)


LOGITS = {"cpu": 1 << 25, "cuda": 1 << 27, "mps": 1 << 27}  # so many are made at once
CACHED = LOGITS | {"cpu": 1 << 21}  # so many the kernel goes over at once: what a cache holds


def row_groups(x, labels, vocab_size, at_once=LOGITS):
    """Yields (x, labels) of some rows at a time, whose logits are `at_once` numbers."""
    rows = max(1, at_once[x.device.type] // vocab_size)
    return zip(x.split(rows), labels.split(rows), strict=True)


def nats_and_gradient(logits, labels):
    """Returns -log softmax(logits)[label], (N,); logits (N, V) become the gradient of its sum."""
    supervised, target = labels >= 0, labels.clamp(min=0)[:, None]
    z = logits.float()
    if not torch.compiler.is_compiling():
        # where no compiler fuses: a few passes over the logits in place of a dozen
        at_target, top = z.gather(1, target), z.amax(dim=-1, keepdim=True)
        torch.softmax(z, dim=-1, out=z)
        # the largest p is exp(top - log_total); it never underflows
        log_total = top - z.amax(dim=-1, keepdim=True).log()
        z.scatter_add_(1, target, z.new_full(target.shape, -1.0))
        z.index_fill_(0, (~supervised).nonzero()[:, 0], 0.0)
        if z is not logits:
            logits.copy_(z)  # 16 bits
        return torch.where(supervised, (log_total - at_target)[:, 0], 0.0)
    log_total = torch.logsumexp(z, dim=-1, keepdim=True)  # log p = z - log_total
    onehot = torch.arange(logits.shape[1], device=logits.device) == target  # (N, V)
    loss = torch.where(supervised, (log_total - z.gather(1, target))[:, 0], 0.0)
    dz = torch.exp(z - log_total) - onehot.float()
    logits.copy_(torch.where(supervised[:, None], dz, 0.0))
    return loss


class LinearCrossEntropy(torch.autograd.Function):
    """linear_cross_entropy, whose gradients are computed in the forward pass already.

    The backward pass of the sum scales dx and dW. Terms come back with a factor for each row: it
    scales the rows of dx, and dW, which an adapter does not need, takes the logits once more.
    """

    kernel = staticmethod(nats_and_gradient)  # train.py puts a compiled one here where it compiles

    @staticmethod
    def groups(x, w, labels):
        """Yields (slice, nats, dz) of some rows at a time; dz is overwritten by the next ones'."""
        buffer, start = None, 0
        for rows, targets in row_groups(x, labels, len(w)):
            if buffer is None:  # one for all groups: fresh memory costs page faults
                buffer = torch.empty(len(rows), len(w), dtype=x.dtype, device=x.device)
            dz = torch.mm(rows, w.T, out=buffer[: len(rows)])  # logits, until the kernel has run
            parts = row_groups(dz, targets, len(w), CACHED)
            nats = [LinearCrossEntropy.kernel(*part) for part in parts]
            yield slice(start, start + len(rows)), torch.cat(nats), dz
            start += len(rows)

    @staticmethod
    def forward(ctx, x, weight, labels, summed):
        w, dx, losses = weight.to(x.dtype), torch.empty_like(x), []
        dw = torch.zeros_like(weight) if summed and weight.requires_grad else None
        for rows, loss, dz in LinearCrossEntropy.groups(x, w, labels):
            losses.append(loss.sum() if summed else loss)
            torch.mm(dz, w, out=dx[rows])
            if dw is not None and dw.dtype == x.dtype:
                dw.addmm_(dz.T, x[rows])
            elif dw is not None:
                dw += dz.T @ x[rows]
        ctx.save_for_backward(dx, dw, *(() if summed else (x, weight, labels)))
        return sum(losses) if summed else torch.cat(losses)

    @staticmethod
    def backward(ctx, upstream):
        dx, dw, *inputs = ctx.saved_tensors
        if not inputs:
            return dx * upstream, None if dw is None else dw * upstream, None, None
        x, weight, labels = inputs
        upstream = upstream[:, None].to(x.dtype)  # (N, 1)
        if ctx.needs_input_grad[1]:
            dw = torch.zeros_like(weight)
            for rows, _, dz in LinearCrossEntropy.groups(x, weight.to(x.dtype), labels):
                dw += (dz * upstream[rows]).T @ x[rows]
        return dx * upstream, dw, None, None


# ---- LoRA (Hu et al. 2021, equation 3): a frozen projection W and a learned low-rank difference
#
#     y = W x + (alpha / r) B A dropout(x)      A (r, in) random, B (out, r) zero at first

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS = get_args(Projection)


class LoRALinear(nn.Module):
    """A frozen linear layer and its learned low-rank difference: x (..., in) -> (..., out)."""

    def __init__(self, linear, r, alpha, dropout):
        super().__init__()
        self.weight, self.bias, device = linear.weight, linear.bias, linear.weight.device
        self.lora_A = nn.Linear(linear.in_features, r, bias=False, device=device)
        self.lora_B = nn.Linear(r, linear.out_features, bias=False, device=device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.dropout, self.r, self.alpha, self.on = nn.Dropout(dropout), r, alpha, True

    def forward(self, x):
        rows = x.flatten(0, -2)
        y = F.linear(rows, self.weight, self.bias)
        if self.on:
            small = self.lora_A(self.dropout(rows)) * (self.alpha / self.r)  # (N, r)
            # the product itself adds to y, which takes no other pass over it
            y.addmm_(small.to(y.dtype), self.lora_B.weight.T.to(y.dtype))
        return y.unflatten(0, x.shape[:-1])


def adapters(model):
    """Returns {name: LoRALinear} of all that `model` has."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def add_lora(model, r, alpha, dropout=0.0, targets=PROJECTIONS):
    """Puts an adapter beside every projection in `targets`, freezes all else. Returns `model`."""
    assert not adapters(model), "merge the adapter that the model has first"
    model.requires_grad_(False)
    for name, linear in list(model.named_modules()):
        if name.rpartition(".")[2] in targets:
            model.set_submodule(name, LoRALinear(linear, r, alpha, dropout))
    return model


@contextlib.contextmanager
def lora_off(model):
    """Turns the adapter off: inside, the model computes what its base does."""
    with contextlib.ExitStack() as at_exit:
        for layer in adapters(model).values():
            layer.on = False
            at_exit.callback(setattr, layer, "on", True)
        yield


@torch.no_grad()
def merge_lora(model):
    """Adds the adapter to the weights, all of which may then be trained. Returns `model`.

    Raises RuntimeError if hidden states are not what they were, as with weights of 16 bits.
    """
    training = model.training
    ids = torch.arange(min(8, model.cfg.sequence_length), device=model.lm_head.weight.device)[None]
    before = model.eval().model.forward(ids)  # not called, which would compile it for this length
    for name, layer in adapters(model).items():
        linear = nn.Linear(*layer.weight.shape[::-1], bias=False, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        # in place: a second copy of all weights may not fit; B A is (out, in)
        linear.weight += layer.alpha / layer.r * (layer.lora_B.weight @ layer.lora_A.weight)
        model.set_submodule(name, linear)
    deviation = (model.model.forward(ids) - before).abs().max() / before.abs().max()
    if not deviation < 1e-4:  # rounding alone is a hundredth of it
        raise RuntimeError(f"merging the adapter changed the hidden states by {deviation:.1e}")
    return model.requires_grad_(True).train(training)


# ---- A model's folder, Hugging Face's: config.json, generation_config.json, model.safetensors

MODEL_WEIGHTS, CONTEXT = "model.safetensors", "max_position_embeddings"
# the keys of config.json for the fields that have another name there
HF_NAMES = {"d_model": "hidden_size", "d_ff": "intermediate_size", "n_layer": "num_hidden_layers"}
HF_NAMES |= {"n_head": "num_attention_heads", "sequence_length": CONTEXT}
HF_NAMES |= {"layer_norm_epsilon": "rms_norm_eps"}
# nothing else is computed here, whatever the class
HF_PLAIN = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
HF_PLAIN |= {"use_sliding_window": False}
# by model_type, what transformers assumes where a key is absent
HF_QWEN = {CONTEXT: 32768, "num_key_value_heads": 32, "bos_token_id": None, "eos_token_id": None}
HF_MISTRAL = {CONTEXT: 131072, "num_key_value_heads": 8, "sliding_window": 4096}
HF_DEFAULTS = {"llama": {CONTEXT: 2048}, "mistral": HF_MISTRAL, "qwen2": HF_QWEN}
HF_DEFAULTS["qwen3"] = HF_QWEN | {"head_dim": 128}


def to_hf(cfg, dtype="float32"):
    """Returns config.json's dict; transformers 4 reads `rope_theta`, 5 reads `rope_parameters`."""
    kind = "qwen3" if cfg.qk_norm else "qwen2" if cfg.qkv_bias else "llama"
    rope = {"rope_theta": cfg.rope_theta, "rope_type": "default"} | (cfg.rope_scaling or {})
    hf = HF_PLAIN | {HF_NAMES.get(name, name): value for name, value in asdict(cfg).items()}
    del hf["qk_norm"], hf["qkv_bias"]  # model_type tells
    hf |= {"num_key_value_heads": cfg.kv_heads, "head_dim": cfg.head_width}
    for name in ("attention_dropout", "hidden_dropout"):
        hf[name] = cfg.probability(hf[name])
    hf |= {"architectures": [f"{kind.capitalize()}ForCausalLM"], "model_type": kind}
    return hf | {"rope_parameters": rope, "use_cache": True, "torch_dtype": dtype, "dtype": dtype}


def from_hf(hf, where="config.json"):
    """Returns the ModelConfig of config.json's dict; UserError if it is computed otherwise."""
    options, families = config.options_of(ModelConfig), Option(str, choices=tuple(HF_DEFAULTS))
    family = config.accept("model_type", hf.get("model_type", "llama"), families, where)
    for key, value in (HF_PLAIN | {"quantization_config": None}).items():
        if (hf.get(key) or value) != value:
            expected = f"expected {json.dumps(value)}, as of a plain {family} in 16 or 32 bits"
            raise UserError(f"{where}: {key} is {json.dumps(hf[key]):.60}; {expected}")
    defaults = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False} | HF_DEFAULTS[family]
    hf = dict.fromkeys(("vocab_size", *HF_NAMES.values())) | defaults | hf  # None: required
    hf |= {"qk_norm": family == "qwen3", "qkv_bias": family == "qwen2"}
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    rope = dict(config.accept("rope_parameters", rope, options["rope_scaling"], where))
    hf["rope_theta"] = rope.pop("rope_theta", None) or hf.get("rope_theta", ModelConfig.rope_theta)
    kind = rope.pop("rope_type", rope.pop("type", "default"))  # `type` is the older spelling
    hf["rope_scaling"] = None if kind == "default" else {"rope_type": kind} | rope
    if isinstance(hf.get("eos_token_id"), list):
        hf["eos_token_id"] = next(iter(hf["eos_token_id"]), None)
    if hf.get("pad_token_id") in (None, -1):  # -1 once meant none
        hf["pad_token_id"] = 0
    keys = {name: HF_NAMES.get(name, name) for name in options}
    # values are checked as a preset's: 100,000 layers would take hours to build
    values = {n: config.accept(k, hf[k], options[n], where) for n, k in keys.items() if k in hf}
    if family == "mistral" and hf["sliding_window"] is not None:
        option, context = options["sequence_length"], values["sequence_length"]
        window = config.accept("sliding_window", hf["sliding_window"], option, where)
        if window < context:  # up to there, every position sees all before it
            values["sequence_length"] = window
            told = f"the context is its sliding window, {window}, not {context}"
            print(f"{where}: {told}", file=sys.stderr)
    with refusing(ValueError, f"{where}: no model that is computed here"):
        return ModelConfig(**{"model_name": "imported"} | values)


def save_model(model, folder, stop_ids=None, base=None):
    """Writes a model's files into `folder`, which must exist, or those of its adapter on `base`.

    stop_ids: the ids that end an answer; none = EOS.
    """
    if adapters(model):
        return save_adapter(model, folder, base)
    folder, cfg = Path(folder), model.cfg
    ids = {"bos_token_id": cfg.bos_token_id, "pad_token_id": cfg.pad_token_id}
    ids["eos_token_id"] = sorted(stop_ids) if stop_ids else cfg.eos_token_id
    write_json(folder / "config.json", to_hf(cfg, str(model.lm_head.weight.dtype)[6:]))
    write_json(folder / "generation_config.json", ids)
    tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
    if cfg.tie_word_embeddings:  # the head is the embedding
        del tensors["lm_head.weight"]
    safetensors.torch.save_file(tensors, folder / MODEL_WEIGHTS, metadata={"format": "pt"})


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_model(folder, device="cpu", dtype=torch.float32, mapped=False):
    """Returns the Llama of a model's folder, of an adapter's with its base, or of a training's.

    In evaluation mode, parameters in `dtype`. UserError if files are damaged or do not fit.
    mapped: weights that need no conversion may stay in the file, which must not change meanwhile.
    """
    folder = model_folder(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        model = merge_lora(load_adapter(folder))
    else:
        path = folder / "config.json"
        with torch.device("meta"), Unfilled():  # neither time nor memory goes into random weights
            model = Llama(from_hf(config.read_object(path), path))
        load_weights(model, folder, {"device": device, "dtype": dtype, "copy": not mapped})
    for p in model.parameters():  # no rotary table: bfloat16 cannot tell neighbouring positions
        p.data = p.data.to(dtype)
    return model.to(device).eval()


class Unfilled(TorchFunctionMode):
    """Inside, nn.init.normal_ does nothing: on the device meta it would load torch's compiler."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return None if function is nn.init.normal_ else function(*args, **(kwargs or {}))


def model_folder(path):
    """Returns `path`, or its final/ if it is a training's folder; UserError if it is neither."""
    path = Path(path)
    for folder in (path, path / "final"):
        if any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
            return folder
    problem = "not a model folder (no config.json)" if path.exists() else "no such folder"
    expected = "give a training's output_dir, or a folder fetched with `hf download`"
    raise UserError(f"{path}: {problem}; {expected}")


def load_weights(model, folder, to=None):
    """Copies a folder's weights into `model`, or into its adapter; UserError unless all fit.

    to: arguments of Tensor.to; its results, made one by one from the mapped file, are the weights.
    """
    tensors = {}
    for path in weight_files(folder):
        with refusing((OSError, safetensors.SafetensorError), f"{path}: no safetensors"):
            refuse_pointer(path)
            content = safetensors.torch.load_file(path)  # mapped: read where it is used
        for name, tensor in content.items():
            floats = tensor.is_floating_point() and tensor.element_size() > 1  # 8 bits: quantized
            if not (floats and tensor.numel() and all(map(math.isfinite, tensor.aminmax()))):
                raise UserError(f"{path}: {name} holds NaN, infinity or no floats ({tensor.dtype})")
            if not name.endswith("rotary_emb.inv_freq"):  # a table that older programs stored
                tensors[name.removeprefix(PEFT_PREFIX)] = tensor.to(**to) if to else tensor
    if adapters(model):
        tensors = {n: t for n, t in model.state_dict().items() if ".lora_" not in n} | tensors
    elif model.cfg.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors.get("model.embed_tokens.weight", model.lm_head.weight)
    # torch lists what is missing, unexpected, or of another shape
    with refusing(RuntimeError, f"{folder}: does not fit the model"):
        model.load_state_dict(tensors, assign=to is not None)
    if model.cfg.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def weight_files(folder):
    """Returns the weights of a folder: an adapter's file, a model's, or the shards others cut."""
    for pattern in (ADAPTER_WEIGHTS, MODEL_WEIGHTS, "model-*-of-*.safetensors"):
        if files := sorted(Path(folder).glob(pattern)):
            return files
    remedy = "a pickle may run any code, so it is not read; transformers' save_pretrained writes it"
    raise UserError(f"{folder}: no {MODEL_WEIGHTS}; {remedy}")


# ---- An adapter's folder, PEFT's; base.json adds the sha256 of the base's weights, and its path
# from here: both may move together

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # before the name of every tensor
# with other values the same tensors compute something else; none is the first
PLAIN_LORA = {"peft_type": ["LORA"], "init_lora_weights": [True, "gaussian", "orthogonal", "eva"]}
PLAIN_LORA |= {"use_rslora": [False], "alpha_pattern": [False], "modules_to_save": [False]}
PLAIN_LORA |= {"alora_invocation_tokens": [False]}

Base = namedtuple("Base", ["path", "sha256"])  # a folder, and the hash of the weights in it


def identify(folder):
    """Returns the Base that a folder is; an adapter's folder is known by its own weights."""
    folder, digest = model_folder(folder), hashlib.sha256()
    for path in weight_files(folder):
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return Base(folder, digest.hexdigest())


def save_adapter(model, folder, base):
    """Writes the adapter of `model`, which stands on `base`, into `folder`, which must exist."""
    folder, layers, home = Path(folder), adapters(model), base.path.resolve()
    names, layer = {name.rpartition(".")[2] for name in layers}, next(iter(layers.values()))
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none"}
    values["base_model_name_or_path"] = str(home)  # PEFT looks from where it runs
    values["target_modules"] = [name for name in PROJECTIONS if name in names]
    values |= {"r": layer.r, "lora_alpha": layer.alpha, "lora_dropout": layer.dropout.p}
    write_json(folder / ADAPTER_CONFIG, values)
    home = Path(os.path.relpath(home, folder.resolve())).as_posix()
    write_json(folder / "base.json", {"sha256": base.sha256, "relative_path": home})
    tensors = model.state_dict().items()
    tensors = {PEFT_PREFIX + name: t.contiguous() for name, t in tensors if ".lora_" in name}
    safetensors.torch.save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def load_adapter(folder):
    """Returns an adapter folder's base with the adapter on it; UserError if it is no plain LoRA."""
    path = Path(folder) / ADAPTER_CONFIG
    values = config.read_object(path)
    for key, plain in PLAIN_LORA.items():
        if (values.get(key) or plain[0]) not in plain:
            raise UserError(f"{path}: {key} is {json.dumps(values[key])}; only plain LoRA loads")
    if isinstance(names := values.get("target_modules"), list):  # full, where PEFT chose them
        values["target_modules"] = sorted({str(name).rpartition(".")[2] for name in names})
    check = lambda key, kind: config.accept(key, values.get(key), config.option_of(kind), path)
    r, alpha = check("r", PositiveInt), check("lora_alpha", PositiveFloat)
    targets = check("target_modules", tuple[Projection, ...])
    base = find_base(Path(folder), str(values.get("base_model_name_or_path")))
    model = add_lora(load_model(base), r, alpha, targets=targets)
    load_weights(model, folder)
    return model


def find_base(folder, name):
    """Returns the folder of an adapter's base: looks beside it first, then where it once was."""
    home = folder / "base.json"
    home = config.read_object(home) if home.is_file() else {}  # PEFT writes none
    for path in ((folder / str(home.get("relative_path", ""))).resolve(), Path(name).resolve()):
        if path.exists() and path != folder.resolve():
            if home.get("sha256") not in (None, identify(path).sha256):
                raise UserError(f"{folder}: this adapter was trained on another base than {path}")
            return path
    mend = f"put it back, or correct base_model_name_or_path in {ADAPTER_CONFIG}"
    raise UserError(f"{folder}: its base model {name} is not there; {mend}")


# ---- Counts


def count_parameters(cfg):
    """Returns exact counts by part, "total" and "non_embedding", without building the model."""
    C, H, K, D = cfg.d_model, cfg.n_head, cfg.kv_heads, cfg.head_width
    layer = 2 * C * H * D + 2 * C * K * D + 3 * C * cfg.d_ff + 2 * C  # q and o, k and v, MLP, norms
    layer += 2 * D * cfg.qk_norm + (H + 2 * K) * D * cfg.qkv_bias
    table = cfg.vocab_size * C
    head = 0 if cfg.tie_word_embeddings else table
    parts = {"embedding": table, "head": head, "layers": cfg.n_layer * layer, "norm": C}
    return parts | {"total": sum(parts.values()), "non_embedding": parts["layers"] + C}


def flops_per_token(cfg):
    """Returns training FLOPs, 6 N + 12 L H D T (PaLM, 2022): matrices, head, attention in full."""
    norms, plain = 2 * cfg.n_layer * cfg.d_model, replace(cfg, qk_norm=False, qkv_bias=False)
    matrices = count_parameters(plain)["layers"] - norms + cfg.vocab_size * cfg.d_model
    return 6 * matrices + 12 * cfg.n_layer * cfg.n_head * cfg.head_width * cfg.sequence_length


def main(cfg):
    from tools.plan import architecture  # counts what a training takes, too

    print(architecture(cfg))


if __name__ == "__main__":
    config.run(main, ModelConfig, __doc__, foreign_keys=True)
