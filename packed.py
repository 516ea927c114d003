"""A built model rearranged, from outside, to generate on a CPU: fewer and larger matrix products, or int8.

A decode step reads every weight to multiply it with one row, or a few. Two things decide its speed: how many
bytes the weights are, and how many small operations stand between the large ones. `pack` lays queries, keys
and values in one matrix, gate and up in another, all of them input-major, which BLAS reads fastest for few
rows, and computes the same function. `int8=True` quarters the bytes and computes nearly the same.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import attend


def fused(*linears):
    """Returns one linear layer with the outputs of several side by side, its weight stored input-major."""
    weight = torch.cat([linear.weight.detach() for linear in linears]).t().contiguous().t()
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class Int8Linear(nn.Module):
    """A linear layer in 8 bits, x (..., K) -> (..., N): weights with a scale per output, x with one per row.

    Symmetric, without zero points (the vector-wise scheme of LLM.int8(), Dettmers et al. 2022). Products are
    summed as integers, so exactly: a row comes out the same, bit for bit, beside any others. Of the kernels
    torch has this one suits a crowd and long prompts best; the one that rounds the weights alone
    (_weight_int8pack_mm) is a little faster for a single row, slower for eight and for prompts.
    """

    def __init__(self, *linears):
        super().__init__()
        weight = torch.cat([linear.weight.detach() for linear in linears]).float()
        self.register_buffer("scale", weight.abs().amax(dim=1).clamp(min=1e-30) / 127)
        self.weight = nn.Parameter((weight / self.scale[:, None]).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        rows = x.flatten(0, -2)
        unit = torch.linalg.vector_norm(rows, torch.inf, dim=-1, keepdim=True).clamp_(min=1e-30).div_(127)
        sums = torch._int_mm((rows / unit).round_().to(torch.int8), self.weight.t())
        return (sums * self.scale).mul_(unit).view(*x.shape[:-1], -1)


class Int8Embedding(nn.Module):
    """Rows of an Int8Linear's table."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, ids):
        return self.table.weight[ids] * self.table.scale[ids][..., None]


class PackedNorm(nn.Module):
    """model.RMSNorm in one call."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.epsilon

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class PackedAttention(nn.Module):
    """model.Attention with one matrix in front; `rope` is that of `pack`, as wide as a head."""

    def __init__(self, attention, pack):
        super().__init__()
        self.layer, self.head_dim = attention.layer, attention.head_dim
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        self.qkv_proj = pack(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o_proj = pack(attention.o_proj)

    def forward(self, x, rope, mask, positions, cache):
        cos, sin = rope
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H + 2K, T, D)
        qk, v = heads[:, : -self.kv_heads], heads[:, -self.kv_heads :]
        qk = torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, -1), sin).to(x.dtype)
        q, k = qk[:, : -self.kv_heads], qk[:, -self.kv_heads :]
        causal = cache is None or cache.start == 0
        if cache is not None:
            k, v = cache.append(self.layer, k, v, positions)
        return self.o_proj(attend(q, k, v, mask, causal).transpose(1, 2).flatten(2))


class PackedMLP(nn.Module):
    """model.MLP with one matrix in front."""

    def __init__(self, mlp, pack):
        super().__init__()
        self.gate_up_proj, self.down_proj = pack(mlp.gate_proj, mlp.up_proj), pack(mlp.down_proj)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


def pack(model, int8=False):
    """Rearranges `model` in place and returns it: it computes as before, but it can't be saved or trained."""
    decoder, layer = model.model, Int8Linear if int8 else fused
    decoder.cos = torch.cat((decoder.cos, decoder.cos), dim=-1)  # x cos + (x turned by half a head) sin
    decoder.sin = torch.cat((-decoder.sin, decoder.sin), dim=-1)
    for block in decoder.layers:
        block.self_attn, block.mlp = PackedAttention(block.self_attn, layer), PackedMLP(block.mlp, layer)
        block.input_layernorm = PackedNorm(block.input_layernorm)
        block.post_attention_layernorm = PackedNorm(block.post_attention_layernorm)
    decoder.norm, tied = PackedNorm(decoder.norm), model.cfg.tie_word_embeddings
    model.lm_head = layer(model.lm_head)
    if int8:
        decoder.embed_tokens = Int8Embedding(model.lm_head if tied else Int8Linear(decoder.embed_tokens))
    elif tied:
        decoder.embed_tokens.weight = model.lm_head.weight
    return model
