"""A built model rearranged, from outside, to generate: half the operations, or int8 on a CPU.

A decode step reads every weight to multiply it with one row, or a few. Two things decide its speed: how many
bytes the weights are, and how many small operations stand between the large ones. `pack` lays queries, keys
and values in one matrix, gate and up in another, all of them input-major, which BLAS reads fastest for few
rows, and puts one plain loop in place of the modules. It computes the same function (in 16 bit with norms and
rotations in float32, as model.py does); `int8=True` quarters the bytes and computes nearly the same.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import attend, document_mask


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
