"""The LLaMA by hand - RMSNorm, rotary positions, SwiGLU, grouped-query attention - and its folder on disk.

    python model.py configs/tiny.json            architecture report: exact counts, FLOPs, memory by part

Letters: B batch, T positions, S keys at hand, C width, H query heads, K key/value heads, D head width,
V vocabulary. Submodules carry the names of Hugging Face's LlamaForCausalLM, so `state_dict()` *is* the file:
a saved folder needs no converter. Nothing here knows text, ranks or training.
"""

import contextlib
import hashlib
import importlib.util
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lib.config import (
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    Range,
    UserError,
    accept,
    did_you_mean,
    knobs_of,
    read_object,
    run,
)
from lib.tokenizer import IGNORE


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. Field names are the keys of the presets; `to_hf` and `from_hf` give config.json's."""

    model_name: str = "custom"  # a name for people; nothing depends on it
    n_layer: Annotated[int, Range(1, 512)] = 6  # transformer blocks
    d_model: Annotated[int, Range(2, 65536)] = 256  # width C of the residual stream
    n_head: Annotated[int, Range(1, 1024)] = 4  # query heads H; the head width is d_model / n_head
    # K; fewer than n_head is grouped-query attention, none = n_head
    num_key_value_heads: Annotated[int, Range(1, 1024)] | None = None
    d_ff: Annotated[int, Range(1, 1 << 20)] = 1024  # inner width of the SwiGLU
    vocab_size: Annotated[int, Range(8, 1 << 20)] = 32768  # V, the tokenizer's size
    sequence_length: Annotated[int, Range(1, 1 << 20)] = 1024  # longest context, in tokens
    dropout: Fraction = 0.0  # on embeddings, and the default of the two below
    attention_dropout: Fraction | None = None  # on attention probabilities; none = dropout
    # on what each block adds to the residual stream; none = dropout
    hidden_dropout: Fraction | None = None
    rope_theta: PositiveFloat = 10000.0  # base of the rotary frequencies
    # {"rope_type": "linear", "factor": 2.0}, or "llama3" with its four numbers
    rope_scaling: dict | None = None
    layer_norm_epsilon: PositiveFloat = 1e-5  # inside RMSNorm's square root
    initializer_range: PositiveFloat = 0.02  # standard deviation of the initial weights
    tie_word_embeddings: bool = True  # one table for reading tokens and for predicting them
    bos_token_id: Annotated[int, Range(0)] = 1  # opens every document
    eos_token_id: Annotated[int, Range(0)] = 2  # closes every document
    pad_token_id: Annotated[int, Range(0)] = 0  # fills short rows; never supervised

    def __post_init__(self):
        if self.d_model % self.n_head:
            raise ValueError(f"d_model {self.d_model} is not divisible by n_head {self.n_head}")
        if self.n_head % self.kv_heads:
            raise ValueError(
                f"n_head {self.n_head} is not divisible by num_key_value_heads {self.kv_heads}"
            )
        if self.head_dim % 2:
            width = f"head width d_model / n_head = {self.head_dim}"
            raise ValueError(f"{width} is odd; rotary positions need pairs")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            id = getattr(self, name)
            if id >= self.vocab_size:
                raise ValueError(f"{name} {id} is outside the vocabulary of {self.vocab_size}")
        check_rope_scaling(self.rope_scaling)

    @property
    def kv_heads(self):
        return self.num_key_value_heads or self.n_head

    @property
    def head_dim(self):
        return self.d_model // self.n_head

    @property
    def p_attention(self):
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    @property
    def p_hidden(self):
        return self.dropout if self.hidden_dropout is None else self.hidden_dropout


# ----------------------------------------------------------------------------------------------
# Rotary positions


ROPE_SCALING_KEYS = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def check_rope_scaling(scaling):
    """Raises ValueError unless `scaling` is None or names a known rule with exactly its numbers."""
    if scaling is None:
        return
    kind = scaling.get("rope_type")
    if kind not in list(ROPE_SCALING_KEYS):  # a list, for what cannot be hashed
        raise ValueError(
            f"rope_scaling: rope_type must be one of linear, llama3; got {json.dumps(kind)}"
        )
    given = set(scaling) - {"rope_type"}
    if given != ROPE_SCALING_KEYS[kind]:
        raise ValueError(
            f"rope_scaling {kind} takes {sorted(ROPE_SCALING_KEYS[kind])}, got {sorted(given)}"
        )
    for key in sorted(given):
        if type(scaling[key]) not in (int, float) or scaling[key] not in Range(0, open_low=True):
            raise ValueError(
                f"rope_scaling: {key} must be a number > 0, got {json.dumps(scaling[key])}"
            )
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError("rope_scaling: low_freq_factor must be less than high_freq_factor")


def rope_tables(cfg):
    """Returns cos and sin, each (sequence_length, D/2) float32, for rotate-half pairs (Su et al. 2021)."""
    frequency = cfg.rope_theta ** (
        -torch.arange(0, cfg.head_dim, 2, dtype=torch.float64) / cfg.head_dim
    )
    scaling = cfg.rope_scaling or {"rope_type": "none"}
    if scaling["rope_type"] == "linear":  # Chen et al. 2023: positions squeezed by the factor
        frequency = frequency / scaling["factor"]
    elif (
        scaling["rope_type"] == "llama3"
    ):  # slow frequencies are squeezed, fast ones kept, a ramp between
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / scaling["factor"]
    angles = torch.arange(cfg.sequence_length, dtype=torch.float64)[:, None] * frequency
    return angles.cos().float(), angles.sin().float()


def rotate(x, cos, sin):
    """Turns each pair (x[i], x[i + D/2]) by its position's angle. x (B, H, T, D); cos, sin (.., T, D/2)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


# ----------------------------------------------------------------------------------------------
# Attention


def choose_attention(device, length, dtype, flash_wanted=True):
    """Returns (backend, reason): `flash` where flash-attn works, `math` where that is faster, or `sdpa`."""
    device = torch.device(device)
    if device.type == "cpu" and length <= 512 and dtype != torch.float32:
        return "math", "on a CPU two matmuls beat torch's kernel in 16 bits, up to 512 positions"
    if device.type == "cpu":
        return "sdpa", "torch's kernel is the fastest here"
    if device.type != "cuda":
        return "sdpa", "flash-attn needs CUDA"
    if not flash_wanted:
        return "sdpa", "flash_attn is off"
    if importlib.util.find_spec("flash_attn") is None:
        return "sdpa", "flash-attn is not installed (make install-flash)"
    try:
        import flash_attn  # noqa: F401
    except ImportError as problem:  # most often it was built for another torch
        return "sdpa", f"flash-attn is installed and does not load ({problem})"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return "sdpa", "flash-attn needs compute capability 8.0"
    return "flash", "flash-attn is installed"


def attend(q, k, v, mask=None, causal=True, dropout=0.0, backend="sdpa"):
    """Softmax attention, the one place that knows three kernels.

    q (B, H, T, D); k, v (B, K, S, D); mask (B or 1, 1, T, S) bool, True = may look, instead of `causal`.
    Returns (B, H, T, D). flash-attn takes 16-bit heads of up to 256 without a mask; the rest goes to SDPA.
    """
    sixteen = q.dtype in (torch.float16, torch.bfloat16)
    if backend == "flash" and mask is None and sixteen and q.shape[-1] <= 256:
        from flash_attn import flash_attn_func

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flash_attn_func(q, k, v, dropout_p=dropout, causal=causal).transpose(1, 2)
    if backend != "math":
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal and mask is None,
            enable_gqa=grouped,
        )
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, T, S)
    if mask is None and causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = F.dropout(scores.float().softmax(dim=-1), dropout).to(v.dtype)
    return weights @ v


class KVCache:
    """Keys and values of B rows, preallocated for `capacity` positions: an argument of forward.

    While every row holds equally many positions (`start`), keys are appended and read as plain slices. A
    cache with `start = None` is ragged: row b writes at `lengths[b]` and reads the first `window` positions
    under a mask - fixed shapes, as continuous batching and CUDA graphs want them.
    """

    def __init__(self, cfg, batch, capacity, device="cpu", dtype=torch.float32):
        shape = (batch, cfg.kv_heads, capacity, cfg.head_dim)
        # a tensor for each layer, not one for all: a compiler then writes in place
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(cfg.n_layer)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(cfg.n_layer)]
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.start = 0
        self.window = self.capacity = capacity

    def positions(self, count):
        """Returns the positions (B, count) that the next `count` tokens of each row will take."""
        return self.lengths[:, None] + torch.arange(count, device=self.lengths.device)

    def append(self, layer, k, v, positions):
        """Stores k, v (B, K, T, D) of one layer; returns all keys and values that its queries may look at."""
        k_all, v_all = self.k[layer], self.v[layer]
        if self.start is not None:
            end = self.start + k.shape[2]
            k_all[:, :, self.start : end], v_all[:, :, self.start : end] = k, v
            return k_all[:, :, :end], v_all[:, :, :end]
        rows = torch.arange(len(k), device=k.device)[:, None]
        k_all[rows, :, positions], v_all[rows, :, positions] = k.transpose(1, 2), v.transpose(1, 2)
        return k_all[:, :, : self.window], v_all[:, :, : self.window]

    def mask(self, positions):
        """Returns the mask (B, 1, T, S) of queries at `positions`; None where plain causality is right."""
        count = positions.shape[1]
        if self.start is not None and (self.start == 0 or count == 1):
            return None
        keys = self.window if self.start is None else self.start + count
        return (torch.arange(keys, device=positions.device) <= positions[:, :, None])[:, None]

    def advance(self, count):
        self.lengths += count
        self.start = None if self.start is None else self.start + count


# ----------------------------------------------------------------------------------------------
# The network


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019), computed in float32 whatever comes in."""

    def __init__(self, width, epsilon):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + self.epsilon)
        return (h * self.weight).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.layer, self.head_dim, self.dropout, self.backend = (
            layer,
            cfg.head_dim,
            cfg.p_attention,
            "sdpa",
        )
        self.q_proj = nn.Linear(cfg.d_model, cfg.n_head * cfg.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.d_model, cfg.kv_heads * cfg.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.d_model, cfg.kv_heads * cfg.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.n_head * cfg.head_dim, cfg.d_model, bias=False)

    def forward(self, x, rope, mask, positions, cache):
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, T, D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rope), rotate(k, *rope)
        causal = True
        if cache is not None:
            causal = (
                cache.start == 0
            )  # after that a single query sees every key, and several have a mask
            k, v = cache.append(
                self.layer, k.to(cache.k[0].dtype), v.to(cache.v[0].dtype), positions
            )
        y = attend(
            q,
            k.to(q.dtype),
            v.to(q.dtype),
            mask,
            causal,
            self.dropout * self.training,
            self.backend,
        )
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.up_proj = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.down_proj = nn.Linear(cfg.d_ff, cfg.d_model, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.d_model, cfg.layer_norm_epsilon)
        self.self_attn = Attention(cfg, layer)
        self.post_attention_layernorm = RMSNorm(cfg.d_model, cfg.layer_norm_epsilon)
        self.mlp = MLP(cfg)
        self.dropout = nn.Dropout(cfg.p_hidden)

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
        # compute each block again in the backward pass: less memory, one more forward
        self.gradient_checkpointing = False
        cos, sin = rope_tables(cfg)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids, positions=None, documents=None, cache=None):
        if positions is None and cache is not None:
            positions = cache.positions(ids.shape[1])
        if positions is None:
            cos, sin = self.cos[None, : ids.shape[1]], self.sin[None, : ids.shape[1]]
        else:
            cos, sin = self.cos[positions], self.sin[positions]
        rope = (cos[:, None], sin[:, None])  # (B or 1, 1, T, D/2)
        mask = cache.mask(positions) if cache is not None else document_mask(documents)
        x = self.dropout(self.embed_tokens(ids))
        if torch.is_autocast_enabled(
            x.device.type
        ):  # the residual stream is what memory traffic is made of
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for block in self.layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, rope, mask, positions, cache, use_reentrant=False)
            else:
                x = block(x, rope, mask, positions, cache)
        if cache is not None:
            cache.advance(ids.shape[1])
        return self.norm(x)


def document_mask(documents):
    """Returns (B, 1, T, T) bool: a token sees its own document up to itself; None for None."""
    if documents is None:
        return None
    same = documents[:, :, None] == documents[:, None, :]
    return same.tril()[:, None]


class Llama(nn.Module):
    """The language model. `forward` gives logits; `model` alone gives hidden states for the losses below.

    forward(ids (B, T), positions (B, T) = 0..T-1, documents (B, T) = one, cache = none) -> (B, T, V)
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.model = Decoder(cfg)
        self.lm_head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        self.apply(self._init)
        # 2 n_layer branches are added up: the variance of their sum is to be that of one
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(p, std=cfg.initializer_range / math.sqrt(2 * cfg.n_layer))
        if cfg.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _init(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.cfg.initializer_range)

    def forward(self, ids, positions=None, documents=None, cache=None):
        return self.lm_head(self.model(ids, positions, documents, cache))

    def use_attention(self, backend):
        """Sets the attention backend of every block: `sdpa`, `math` or `flash` (see choose_attention)."""
        for block in self.model.layers:
            block.self_attn.backend = backend


# ----------------------------------------------------------------------------------------------
# The folder on disk: a Hugging Face Llama folder


def to_hf(cfg, dtype="float32"):
    """Returns config.json's dict; transformers 4 reads `rope_theta`, 5 reads `rope_parameters`."""
    rope = {"rope_theta": cfg.rope_theta, "rope_type": "default"} | (cfg.rope_scaling or {})
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "model_name": cfg.model_name,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_ff,
        "num_hidden_layers": cfg.n_layer,
        "num_attention_heads": cfg.n_head,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.sequence_length,
        "rms_norm_eps": cfg.layer_norm_epsilon,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": cfg.rope_scaling,
        "rope_parameters": rope,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": cfg.p_attention,
        "hidden_dropout": cfg.p_hidden,
        "dropout": cfg.dropout,
        "initializer_range": cfg.initializer_range,
        "tie_word_embeddings": cfg.tie_word_embeddings,
        "bos_token_id": cfg.bos_token_id,
        "eos_token_id": cfg.eos_token_id,
        "pad_token_id": cfg.pad_token_id,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def from_hf(hf, where="config.json"):
    """Returns the ModelConfig of a Llama's config.json dict; UserError on what this model can't compute."""
    refused = {
        "model_type": hf.get("model_type") != "llama",
        "quantization_config": bool(hf.get("quantization_config")),
        "hidden_act": hf.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(hf.get("attention_bias")),
        "mlp_bias": bool(hf.get("mlp_bias")),
    }
    for key, bad in refused.items():
        if bad:
            raise UserError(
                f"{where}: {key} is {json.dumps(hf.get(key)):.60}; what loads is a Llama with silu, without "
                "biases, in 16 or 32 bits"
            )
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(
            f"{where}: rope_parameters must be an object or null, got {json.dumps(rope):.60}"
        )
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    if "type" in scaling:  # the older spelling
        scaling["rope_type"] = scaling.pop("type")
    eos = hf.get("eos_token_id", 2)
    try:
        values = {
            "model_name": hf.get("model_name") or "imported",
            "n_layer": hf["num_hidden_layers"],
            "d_model": hf["hidden_size"],
            "n_head": hf["num_attention_heads"],
            "num_key_value_heads": hf.get("num_key_value_heads") or hf["num_attention_heads"],
            "d_ff": hf["intermediate_size"],
            "vocab_size": hf["vocab_size"],
            "sequence_length": hf.get("max_position_embeddings", 2048),
            "dropout": hf.get("dropout", 0.0),
            "attention_dropout": hf.get("attention_dropout", 0.0),
            "hidden_dropout": hf.get("hidden_dropout", 0.0),
            "rope_theta": rope.get("rope_theta") or hf.get("rope_theta", 10000.0),
            "rope_scaling": scaling if scaling.get("rope_type", "default") != "default" else None,
            "layer_norm_epsilon": hf.get("rms_norm_eps", 1e-6),
            "initializer_range": hf.get("initializer_range", 0.02),
            "tie_word_embeddings": hf.get("tie_word_embeddings", False),
            "bos_token_id": hf.get("bos_token_id", 1),
            "eos_token_id": eos[0] if isinstance(eos, list) and eos else eos,
            "pad_token_id": max(hf.get("pad_token_id") or 0, 0),  # -1 once meant none
        }
        knobs = knobs_of(
            ModelConfig
        )  # checked as a preset's are: 100,000 layers would build for hours
        cfg = ModelConfig(
            **{name: accept(name, value, knobs[name], where) for name, value in values.items()}
        )
    except KeyError as missing:
        raise UserError(f"{where}: no {missing}; expected the config.json of a Llama") from None
    except (TypeError, ValueError) as problem:
        raise UserError(f"{where}: {problem}") from None
    if hf.get("head_dim") not in (None, cfg.head_dim):
        raise UserError(
            f"{where}: head_dim {hf['head_dim']} is not hidden_size / heads = {cfg.head_dim}"
        )
    return cfg


def save_model(model, folder, stop_ids=None):
    """Writes config.json, generation_config.json and model.safetensors into `folder`, which must exist.

    `stop_ids`: ids that end an answer, for generation_config.json; none = EOS. A tied head is not stored.
    """
    folder, cfg = Path(folder), model.cfg
    tensors = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    if cfg.tie_word_embeddings:
        del tensors["lm_head.weight"]
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    stops = sorted(stop_ids or [cfg.eos_token_id])
    generation = {
        "bos_token_id": cfg.bos_token_id,
        "eos_token_id": stops,
        "pad_token_id": cfg.pad_token_id,
    }
    for name, content in (("config", to_hf(cfg, dtype)), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load_model(folder, device="cpu", dtype=torch.float32):
    """Returns the Llama of a model folder in evaluation mode, its parameters in `dtype`; or UserError.

    The rotary tables stay float32 in every dtype: positions lose their meaning in bfloat16.
    """
    folder = Path(folder)
    cfg = read_config(folder)
    with torch.device(
        "meta"
    ):  # random weights that are overwritten at once would take most of the time
        model = Llama(cfg)
    model.to_empty(device="cpu")
    if cfg.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.cos, model.model.sin = rope_tables(cfg)
    load_weights(model, folder / "model.safetensors")
    return placed(model, device, dtype)


def placed(model, device, dtype):
    """Returns `model` in evaluation mode on `device`, its parameters (not the rotary tables) in `dtype`."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model.to(device).eval()


def read_config(folder):
    """Returns the ModelConfig of a model folder; UserError where there is none."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        what = "not a model folder (no config.json)" if Path(folder).exists() else "no such folder"
        raise UserError(f"{folder}: {what}; expected one such as checkpoints/pretrain/NAME/final")
    return from_hf(read_object(path), str(path))


def weight_files(path):
    """Returns the files that hold the weights of `path`, a model.safetensors: itself, or its shards.

    Other programs cut large models into shards, and write MODEL.safetensors.index.json to say which.
    """
    path = Path(path)
    index = path.with_name(path.name + ".index.json")
    if path.is_file():
        return [path]
    if not index.is_file():
        if pickled := sorted(path.parent.glob("pytorch_model*.bin")):
            raise UserError(
                f"{pickled[0]}: a pickle may run any code, so it is not read; if you trust it, transformers "
                "makes safetensors of it: LlamaForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        return [path]
    form = '{"weight_map": {tensor: file, ...}}'
    places = read_object(index, form).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index}: must be an object {form}")
    for name in places.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            expected = "expected one such as model-00001.safetensors"
            raise UserError(f"{index}: illegal file name {name!r:.80}; {expected}")
    return [path.with_name(name) for name in sorted(set(places.values()))]


READABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_weights(path):
    """Returns {name: tensor} of model.safetensors or its shards; UserError if one is missing or broken."""
    tensors = {}
    for file in weight_files(path):
        if not file.is_file():
            raise UserError(f"{file}: not found; expected the model's weights there")
        try:
            tensors |= safetensors.torch.load_file(file)
        except (OSError, safetensors.SafetensorError) as problem:
            raise UserError(f"{file}: not readable as safetensors ({problem})") from None
    for name, tensor in tensors.items():
        if tensor.dtype not in READABLE:
            raise UserError(
                f"{path}: {name} holds {tensor.dtype} numbers; 16, 32 or 64 bits of float load"
            )
    return tensors


def load_weights(model, path):
    """Copies model.safetensors into `model` once every name, shape and value is checked; or UserError."""
    tensors = read_weights(path)
    # prefixes that torch.compile and DistributedDataParallel leave on other programs' names
    tensors = {
        name.removeprefix("module.").removeprefix("_orig_mod."): t for name, t in tensors.items()
    }
    # and tables of frequencies, which older programs stored
    tensors = {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    own = model.state_dict()
    if model.cfg.tie_word_embeddings:
        own.pop("lm_head.weight")
        tensors.pop("lm_head.weight", None)
    wrong = sorted(own.keys() ^ tensors.keys())
    if wrong:
        told = [f"{name} ({'missing' if name in own else 'unexpected'})" for name in wrong[:5]]
        told = ", ".join(told + ["..."] * (len(wrong) > 5))
        raise UserError(f"{path}: {len(wrong)} missing or unexpected tensors: {told}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            have, want = ("x".join(map(str, t.shape)) for t in (tensor, own[name]))
            raise UserError(f"{path}: {name} is {have}, the model wants {want}")
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(
            f"{path}: {len(broken)} tensors hold NaN or infinity: {', '.join(broken[:5])}"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


# ----------------------------------------------------------------------------------------------
# The architecture report


def count_parameters(cfg):
    """Returns exact counts by part, "total" and "non_embedding", without building the model."""
    attention = 2 * cfg.d_model**2 + 2 * cfg.d_model * cfg.kv_heads * cfg.head_dim
    layer = attention + 3 * cfg.d_model * cfg.d_ff + 2 * cfg.d_model
    table = cfg.vocab_size * cfg.d_model
    parts = {
        "embedding": table,
        "head": 0 if cfg.tie_word_embeddings else table,
        "layers": cfg.n_layer * layer,
        "norm": cfg.d_model,
    }
    total = sum(parts.values())
    return parts | {"total": total, "non_embedding": parts["layers"] + parts["norm"]}


def flops_per_token(cfg):
    """Returns training FLOPs per token, 6 N + 12 L C T: matrices, head, attention in full (PaLM, 2022)."""
    matrices = (
        count_parameters(cfg)["layers"]
        - cfg.n_layer * 2 * cfg.d_model
        + cfg.vocab_size * cfg.d_model
    )
    return 6 * matrices + 12 * cfg.n_layer * cfg.d_model * cfg.sequence_length


def memory_parts(cfg, batch_size):
    """Returns bytes by part of a 16-bit training step on batch_size full rows, and of one row's KV cache.

    Activations per token and layer: two norm inputs and outputs, q, k, v, attention output, gate, up,
    product; a kernel-fusing compiler saves those and little else, eager torch about 1.6 times as much.
    """
    total, tokens = count_parameters(cfg)["total"], batch_size * cfg.sequence_length
    kv_width = cfg.kv_heads * cfg.head_dim
    per_token = 6 * cfg.d_model + 2 * kv_width + 3 * cfg.d_ff
    return {
        "weights (fp32)": 4 * total,
        "gradients (fp32)": 4 * total,
        "Adam moments (fp32)": 8 * total,
        f"activations ({batch_size} x {cfg.sequence_length}, 16 bit)": 2
        * cfg.n_layer
        * per_token
        * tokens,
        "logits, a group of rows at a time": 2 * min(tokens * cfg.vocab_size, 1 << 27),
        "KV cache of one full row (16 bit)": 4 * cfg.n_layer * kv_width * cfg.sequence_length,
    }


def odd_shapes(cfg):
    """Returns sentences about shapes that are legal but slow or unusual."""
    advice = []
    if cfg.vocab_size % 64:
        advice.append(
            f"vocab_size {cfg.vocab_size} is no multiple of 64: the head's matmul will be slower"
        )
    if cfg.d_model % 64 or cfg.d_ff % 64:
        advice.append(
            f"d_model {cfg.d_model} and d_ff {cfg.d_ff} should be multiples of 64 for fast matmuls"
        )
    if cfg.head_dim not in (32, 64, 96, 128):
        advice.append(f"head width {cfg.head_dim} is unusual; attention kernels like 64 or 128")
    if not 2 <= cfg.d_ff / cfg.d_model <= 6:
        advice.append(f"d_ff / d_model = {cfg.d_ff / cfg.d_model:.2f} is outside the usual 2 to 6")
    return advice


def report(cfg):
    """Yields the lines of the architecture report."""
    counts, flops = count_parameters(cfg), flops_per_token(cfg)
    heads = f"{cfg.n_head} heads of {cfg.head_dim}, {cfg.kv_heads} for keys and values"
    yield f"{cfg.model_name}: {cfg.n_layer} layers x {cfg.d_model}, {heads}, d_ff {cfg.d_ff}"
    yield f"  vocabulary {cfg.vocab_size}, context {cfg.sequence_length}"
    yield ""
    yield f"  parameters      {counts['total']:>15,} total"
    yield f"                  {counts['non_embedding']:>15,} without embeddings"
    tied = "the head's too" if cfg.tie_word_embeddings else "the head has its own"
    yield f"    embedding     {counts['embedding']:>15,} ({tied})"
    yield f"    head          {counts['head']:>15,}"
    yield f"    layers        {counts['layers']:>15,} = {cfg.n_layer} x {counts['layers'] // cfg.n_layer:,}"
    yield f"  training FLOPs  {flops:>15,} per token (6N + 12LCT, head counted, attention in full)"
    yield ""
    yield "  memory of a training step, computed from the shapes (not measured)"
    for part, size in memory_parts(cfg, batch_size=8).items():
        yield f"    {part:<40} {size / 1e6:>10,.1f} MB"
    yield ""
    yield "  a LLaMA by construction: RMSNorm before each branch, rotary positions, SwiGLU, causal, no bias,"
    yield f"    {'grouped-query' if cfg.kv_heads < cfg.n_head else 'multi-head'} attention"
    for sentence in odd_shapes(cfg):
        yield f"  warning: {sentence}"


def main(cfg):
    print("\n".join(report(cfg)))
    if cfg.foreign_keys:
        print(f"\n  not about the architecture, left to train.py: {', '.join(cfg.foreign_keys)}")


# ----------------------------------------------------------------------------------------------
# Losses: sums over supervised positions, never means; the caller divides by the count that is right for it.
#
# None of them holds the (tokens, vocabulary) logits, the largest tensor of a small model's training.


def next_token_loss(model, batch):
    """Returns (summed cross-entropy in nats, {}) of batch["labels"] (B, T), already shifted, -100 = none.

    Where few positions are supervised, batch["where"] (N,) are their places in the flattened rows, and the
    labels are theirs, (N,): the head, the most expensive part of a small model, then works on nothing else.
    """
    hidden, labels = supervised_hidden(model, batch), batch["labels"].flatten()
    return linear_cross_entropy(hidden, model.lm_head.weight, labels), {}


@torch.no_grad()
def score_batch(model, batch, token_bytes):
    """Returns (nats, tokens, bytes): -log p summed over a batch's labels, and how many they are.

    batch as `next_token_loss` takes it; token_bytes (V,), how many UTF-8 bytes of text an id stands for.
    """
    labels = batch["labels"]
    known = labels >= 0
    size = torch.where(known, token_bytes[labels.clamp(min=0)], 0).sum()
    # plain numbers: a tensor kept behind a batch's logits would keep the next batch's from their place
    return float(next_token_loss(model, batch)[0]), int(known.sum()), int(size)


def supervised_hidden(model, batch):
    """Returns the hidden states (N, C) that the labels of a batch belong to (see next_token_loss)."""
    hidden = model.model(batch["ids"], batch.get("positions"), batch.get("documents")).flatten(0, 1)
    return hidden.index_select(0, batch["where"]) if "where" in batch else hidden


def linear_cross_entropy(x, weight, labels):
    """Returns the sum over labels != -100 of -log softmax(x @ weight.T)[label], without the (N, V) logits.

    x (N, C), weight (V, C), labels (N,). Logits are made a few rows at a time and turned, in their own
    buffer, into their gradient, so the backward pass has nothing left to do but scale (the idea of Liger
    kernel's fused linear cross-entropy, 2024). Exact up to the order of sums.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return LinearCrossEntropy.apply(x, weight, labels)
    return token_nats(x, weight, labels).sum()


def token_nats(x, weight, labels):
    """Returns -log p of each label, (N,) float32 nats, 0 where it is -100. Shapes as linear_cross_entropy."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return TokenNats.apply(x, weight, labels)
    weight = weight.to(x.dtype)
    return torch.cat([nats(rows @ weight.T, to) for rows, to in row_groups(x, labels, len(weight))])


def row_groups(x, labels, vocab_size):
    rows = group_rows(vocab_size, x.device.type)
    return zip(x.split(rows), labels.split(rows), strict=True)


def group_rows(vocab_size, device):
    """Returns how many rows' logits stand at once: 2^25 numbers (CPU: caches) or 2^27 (GPU: launches)."""
    return max(1, (1 << (25 if device == "cpu" else 27)) // vocab_size)


def nats(logits, labels):
    """Returns -log softmax(logits (N, V))[label] for labels (N,), float32, 0 where the label is -100."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")


def nats_and_gradient(logits, labels):
    """As `nats`, and overwrites `logits` with the gradient of their sum: softmax - onehot, 0 where -100."""
    if logits.dtype == torch.float32 and not torch.compiler.is_compiling():
        return _nats_and_gradient_in_place(logits, labels)
    supervised = labels != IGNORE
    target = labels.clamp(min=0)
    top = logits.float()
    log_total = torch.logsumexp(top, dim=-1)
    loss = torch.where(supervised, log_total - top.gather(1, target[:, None])[:, 0], 0.0)
    hit = torch.arange(logits.shape[1], device=logits.device) == target[:, None]
    gradient = torch.where(
        supervised[:, None], torch.exp(top - log_total[:, None]) - hit.float(), 0.0
    )
    logits.copy_(gradient)
    return loss


def _nats_and_gradient_in_place(logits, labels):
    """The same for float32 where no compiler fuses: a few passes over the logits instead of a dozen.

    The softmax takes their place; its largest entry, which never underflows, gives the logsumexp.
    """
    target = labels.clamp(min=0)[:, None]
    at_target, top = logits.gather(1, target), logits.amax(dim=-1, keepdim=True)
    torch.softmax(logits, dim=-1, out=logits)
    log_total = top - logits.amax(dim=-1, keepdim=True).log()
    logits.scatter_add_(1, target, logits.new_full(target.shape, -1.0))
    logits.index_fill_(0, (labels == IGNORE).nonzero()[:, 0], 0.0)
    return torch.where(labels != IGNORE, (log_total - at_target)[:, 0], 0.0)


class LinearCrossEntropy(torch.autograd.Function):
    kernel = staticmethod(
        nats_and_gradient
    )  # world.py puts the compiled one here where it compiles

    @staticmethod
    def forward(ctx, x, weight, labels):
        low = weight.to(x.dtype)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x)
        dweight = torch.zeros_like(weight) if weight.requires_grad else None
        groups = row_groups(x, labels, len(weight))
        buffer, start = None, 0
        for rows, to in groups:
            if buffer is None or len(buffer) != len(
                rows
            ):  # one for all groups: fresh ones cost page faults
                buffer = torch.empty(len(rows), len(weight), dtype=x.dtype, device=x.device)
            torch.mm(rows, low.T, out=buffer)
            total += LinearCrossEntropy.kernel(buffer, to).sum()
            torch.mm(buffer, low, out=dx[start : start + len(rows)])
            if dweight is not None and dweight.dtype == x.dtype:
                dweight.addmm_(buffer.T, rows)
            elif dweight is not None:
                dweight += buffer.T @ rows
            start += len(rows)
        ctx.save_for_backward(dx, dweight)
        return total

    @staticmethod
    def backward(ctx, upstream):
        dx, dweight = ctx.saved_tensors
        return dx * upstream, None if dweight is None else dweight * upstream, None


class TokenNats(torch.autograd.Function):
    """As LinearCrossEntropy, but a loss for each row, which later sums may weigh as they like (dpo.py)."""

    @staticmethod
    def forward(ctx, x, weight, labels):
        low, loss, dx = weight.to(x.dtype), [], []
        for rows, to in row_groups(x, labels, len(weight)):
            logits = rows @ low.T
            loss.append(LinearCrossEntropy.kernel(logits, to))
            dx.append(logits @ low)
        ctx.save_for_backward(x, weight, labels, torch.cat(dx))
        return torch.cat(loss)

    @staticmethod
    def backward(ctx, upstream):
        x, weight, labels, dx = ctx.saved_tensors
        dweight, share = None, upstream[:, None].to(x.dtype)
        if ctx.needs_input_grad[
            1
        ]:  # not of a frozen head: the logits are made once more, rather than kept
            low, dweight, start = weight.to(x.dtype), torch.zeros_like(weight), 0
            for rows, to in row_groups(x, labels, len(weight)):
                logits = rows @ low.T
                LinearCrossEntropy.kernel(logits, to)
                dweight += (logits * share[start : start + len(rows)]).T @ rows
                start += len(rows)
        return dx * share, dweight, None


# ----------------------------------------------------------------------------------------------
# LoRA (Hu et al. 2021): surgery on a built Llama, and the PEFT adapter folder it is kept in.
#
# A projection's W stays as it is; beside it learns a low-rank difference, y = W x + (alpha / r) B A dropout(x),
# with A (r, in) random and B (out, r) zero, so that the model begins as its base. W keeps its own name:
# the base's part of `state_dict()` is what it was, and the rest is named as PEFT names it.
#
# An adapter folder holds the differences only, and says what they differ from:
#
#     adapter_config.json         PEFT's description; base_model_name_or_path is where the base lies
#     adapter_model.safetensors   lora_A and lora_B of every target, by PEFT's names
#     base.json                   the base's sha256, and its place seen from here: both may move together


TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT puts before every name
# keys of PEFT's adapter_config.json for what is more, or something else, than the LoRA of this file
NOT_PLAIN = (
    *("use_rslora", "use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "modules_to_save"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "trainable_token_indices"),
    "alora_invocation_tokens",
)


@dataclass(frozen=True)
class LoRAConfig:
    """The knobs of an adapter, for whoever trains one."""

    # rank of the difference that is learned; 0 = train all weights instead
    lora_r: NonNegativeInt = 16
    lora_alpha: PositiveFloat = 32.0  # it is scaled by lora_alpha / lora_r
    lora_dropout: Fraction = 0.0  # on what enters it
    lora_target_modules: tuple[str, ...] = TARGETS  # the projections that get one
    # final/ is a whole model, its adapter beside in final/adapter; else the adapter alone
    merge: bool = True

    def __post_init__(self):
        check_targets(self.lora_target_modules)
        if self.lora_r and getattr(self, "optimizer", "adamw") == "muon":
            raise ValueError("optimizer=muon is for whole matrices: use adamw, or lora_r=0")


class LoRALinear(nn.Module):
    """A linear layer with a frozen weight and a learned low-rank difference: x (..., in) -> (..., out)."""

    def __init__(self, linear, r, alpha, dropout):
        super().__init__()
        self.weight = linear.weight
        where = {"device": linear.weight.device}
        self.lora_A = nn.Linear(linear.in_features, r, bias=False, **where)
        self.lora_B = nn.Linear(r, linear.out_features, bias=False, **where)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.dropout, self.r, self.alpha, self.on = nn.Dropout(dropout), r, alpha, True

    def forward(self, x):
        rows = x.flatten(0, -2)
        y = F.linear(rows, self.weight)
        if self.on:  # added in place by the product itself: no pass over y but its own
            small = self.lora_A(self.dropout(rows)) * (self.alpha / self.r)
            y.addmm_(small.to(y.dtype), self.lora_B.weight.T.to(y.dtype))
        return y.unflatten(0, x.shape[:-1])

    def merged(self):
        """Returns the plain linear layer that computes the same without dropout."""
        linear = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=False, device="meta")
        difference = self.lora_B.weight.float() @ self.lora_A.weight.float()
        linear.weight = nn.Parameter(
            self.weight.detach() + self.alpha / self.r * difference.detach()
        )
        return linear


def adapters(model):
    """Returns {name: LoRALinear} of all there are in `model`."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)
    }


def check_targets(targets):
    """Raises UserError unless `targets` names projections of a Llama block, each once."""
    for name in targets:
        if name not in TARGETS:
            hint = did_you_mean(name, TARGETS) or f"; choose from {', '.join(TARGETS)}"
            raise UserError(f"lora_target_modules: unknown module {name!r}{hint}")
    if not targets or len(set(targets)) < len(targets):
        raise UserError("lora_target_modules: name at least one module, and each only once")


def add_lora(model, r, alpha, dropout=0.0, targets=TARGETS):
    """Puts an adapter beside every projection in `targets` and freezes everything else. Returns `model`."""
    check_targets(targets)
    if adapters(model):
        raise UserError("this model has an adapter already; merge it first")
    model.requires_grad_(False)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name in [name for name, _ in part.named_children() if name in targets]:
                setattr(part, name, LoRALinear(getattr(part, name), r, alpha, dropout))
    return model


@contextlib.contextmanager
def lora_off(model):
    """Turns the adapter off: inside, the model computes what its base does."""
    modules = adapters(model).values()
    for module in modules:
        module.on = False
    try:
        yield
    finally:
        for module in modules:
            module.on = True


@torch.no_grad()
def merge_lora(model):
    """Adds the adapter into the weights, in float32, and proves it: a probe's logits stay what they were.

    Returns the largest difference between the logits before and after; the model has no adapter any more, and
    all of it may be trained. Raises UserError if there is none, as at a second merge.
    """
    found, training = adapters(model), model.training
    if not found:
        raise UserError("this model has no adapter to merge, or it is merged already")
    assert all(module.weight.dtype == torch.float32 for module in found.values()), (
        "merge, then halve"
    )
    ids = torch.arange(min(32, model.cfg.sequence_length), device=model.lm_head.weight.device)
    probe = (ids * 7919 % model.cfg.vocab_size)[None]  # arbitrary, but spread over the vocabulary
    with torch.compiler.set_stance("force_eager"):
        before = model.eval()(probe)
        for name, module in found.items():
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, module.merged())
        after = model(probe)
    difference, size = (after - before).abs().max().item(), before.abs().max().item()
    assert difference <= 1e-4 * max(1.0, size), f"merging changed the logits by {difference}"
    model.requires_grad_(True).train(training)
    return difference


# ---- folders


class Base(NamedTuple):
    """What an adapter belongs to: a folder, and the sha256 of the weights in it."""

    path: Path
    sha256: str


def model_folder(path):
    """Returns `path`, or the final/ in it where that is what it holds; UserError if it can't be a model."""
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"{path}: no such folder; give a training's output_dir, or a folder fetched with `hf download`"
        )
    if path.is_file():
        raise UserError(f"{path}: a file, and not a model folder, which holds a config.json")
    if any((path / name).is_file() for name in ("config.json", CONFIG, WEIGHTS)):
        return path
    if not (path / "final").is_dir():
        files = [
            f"{folder}/{name}" for folder in ("*", "*/final") for name in ("config.json", CONFIG)
        ]
        homes = {file.parent for pattern in files for file in path.glob(pattern)}
        below = sorted(str(home.parent if home.name == "final" else home) for home in homes)
        hint = f"; there is one in {below[-1]}" if below else ""
        raise UserError(f"{path}: not a model folder (no config.json){hint}")
    return path / "final"


def identify(folder):
    """Returns the Base that `folder` is, by the sha256 of its weights (an adapter folder's own weights)."""
    folder = model_folder(folder)
    own = folder / WEIGHTS
    files, digest = (
        [own] if own.is_file() else weight_files(folder / "model.safetensors"),
        hashlib.sha256(),
    )
    for path in files:
        if not path.is_file():
            raise UserError(
                f"{folder}: not a model folder, or a part of one (neither {path.name} nor {WEIGHTS})"
            )
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return Base(folder, digest.hexdigest())


def save_adapter(model, folder, base):
    """Writes the adapter of `model` into `folder`, which must exist, as PEFT would; `base` is its Base."""
    folder, found = Path(folder), adapters(model)
    first = next(iter(found.values()))
    named = {name.rpartition(".")[2] for name in found}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.path.resolve()),  # PEFT looks from where it runs
        "r": first.r,
        "lora_alpha": int(first.alpha) if first.alpha == int(first.alpha) else first.alpha,
        "lora_dropout": first.dropout.p,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": [name for name in TARGETS if name in named],
        "use_rslora": False,
        "use_dora": False,
    }
    home = {"relative_path": _relative(base.path, folder), "sha256": base.sha256}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "base.json").write_text(json.dumps(home, indent=2) + "\n", encoding="utf-8")
    tensors = {
        PREFIX + name: tensor.detach().contiguous() for name, tensor in _tensors(model).items()
    }
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _relative(path, folder):
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:  # another drive of Windows
        return None


def _tensors(model):
    return {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}


def load_adapter(model, folder, base=None):
    """Reads an adapter folder into `model`, adding the adapter if there is none yet. Returns `model`.

    `base` is the Base that `model` was loaded from. Raises UserError if the adapter belongs to another one or
    is something else than the plain LoRA that this file computes.
    """
    folder = Path(folder)
    config, home = _read_config(folder), _read_home(folder)
    wanted = home.get("sha256")
    if base and wanted and wanted != base.sha256:
        raise UserError(_other_base(folder, wanted, base))
    if not adapters(model):
        add_lora(
            model,
            config["r"],
            config["lora_alpha"],
            config["lora_dropout"],
            config["target_modules"],
        )
    try:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
    except (OSError, safetensors.SafetensorError) as problem:
        raise UserError(f"{folder / WEIGHTS}: not readable as safetensors ({problem})") from None
    tensors, own = (
        {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()},
        _tensors(model),
    )
    wrong = sorted(own.keys() ^ tensors.keys())
    wrong = wrong or [name for name in own if own[name].shape != tensors[name].shape]
    if wrong:
        raise UserError(
            f"{folder}: does not fit this model: {wrong[0]} is missing, foreign or of another shape"
        )
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError(f"{folder / WEIGHTS}: holds NaN or infinity")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return model


def _other_base(folder, wanted, base):
    return (
        f"{folder}: this adapter was trained on a base with sha256 {wanted[:12]}.., but {base.path} has "
        f"{base.sha256[:12]}..; they do not belong together"
    )


def _read_home(folder):
    """Returns base.json's dict, empty in a folder of PEFT's own."""
    return read_object(folder / "base.json") if (folder / "base.json").is_file() else {}


def _read_config(folder):
    """Returns adapter_config.json's dict; UserError where it describes what this file does not compute."""
    config = read_object(folder / CONFIG)
    plain = {"peft_type": "LORA", "bias": "none"}
    odd = [key for key, value in plain.items() if config.get(key, value) != value]
    odd += [key for key in NOT_PLAIN if config.get(key)]
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        odd.append("init_lora_weights")  # the others, as PiSSA, change the base as well
    if odd:
        raise UserError(
            f"{folder / CONFIG}: {odd[0]} is {json.dumps(config[odd[0]])}; only plain LoRA loads"
        )
    shape = {"r": int, "lora_alpha": (int, float), "target_modules": list}
    for key, kind in shape.items():
        if not isinstance(config.get(key), kind) or not config[key]:
            raise UserError(
                f"{folder / CONFIG}: {key} is {json.dumps(config.get(key))}; expected a LoRA's"
            )
    # PEFT writes full names where it chose the modules itself; a layer without one is found missing later
    targets = dict.fromkeys(str(name).rpartition(".")[2] for name in config["target_modules"])
    config["target_modules"] = list(targets)
    check_targets(config["target_modules"])
    return {"lora_dropout": 0.0} | config


def save_trained(model, folder, base, stop_ids, merge=False):
    """Writes what was trained on top of `base`: the adapter, or the whole model if there is none.

    With `merge` it is the whole model in any case, and an adapter goes into folder/adapter beside it; `model`
    is merged then.
    """
    if adapters(model) and not merge:
        save_adapter(model, folder, base)
        return
    if adapters(model):
        (Path(folder) / "adapter").mkdir()
        save_adapter(model, Path(folder) / "adapter", base)
        merge_lora(model)
    save_model(model, folder, stop_ids)


def load_trained(model, folder, base):
    """Reads what `save_trained` wrote, without `merge`, into the same `model`."""
    if adapters(model):
        load_adapter(model, folder, base)
    else:
        load_weights(model, Path(folder) / "model.safetensors")


def find_base(folder):
    """Returns the Base of an adapter folder: looked for beside it first, then where it once was."""
    home, named = _read_home(folder), _read_config(folder).get("base_model_name_or_path")
    places = [folder / home["relative_path"]] if home.get("relative_path") else []
    places += [Path(named), folder / named] if named else []
    there = [identify(place) for place in places if place.exists()]
    for base in there:
        if home.get("sha256") in (None, base.sha256):
            return base
    if there:
        raise UserError(_other_base(folder, home["sha256"], there[0]))
    raise UserError(
        f"{folder}: its base model {named} is not there; put it back, or mend base_model_name_or_path in "
        f"{CONFIG}"
    )


def open_model_folder(folder, device="cpu", dtype=torch.float32):
    """Returns the Llama of any folder in evaluation mode: a model's, or an adapter's with its base.

    `folder` may also be the folder of a whole training: its final/ is meant. An adapter's base may be an
    adapter folder again. Raises UserError where something is missing or does not belong together.
    """
    folder = model_folder(folder)
    if not (folder / CONFIG).is_file():
        return load_model(folder, device, dtype)
    base = find_base(folder)
    if base.path.resolve() == folder.resolve():
        raise UserError(f"{folder / CONFIG}: names its own folder as the base")
    model = load_adapter(open_model_folder(base.path), folder, base)
    merge_lora(model)
    return placed(model, device, dtype)


if __name__ == "__main__":
    run(main, ModelConfig, __doc__, foreign_keys=True)
