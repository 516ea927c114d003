"""A trained model for other programs: a Hugging Face folder, or one GGUF file for llama.cpp and its kin.

    python -m tools.export --model_path=checkpoints/sft --format=hf --dtype=bf16 --output=exported/sft
    python -m tools.export --model_path=checkpoints/sft --format=gguf --dtype=q8_0 --output=exported/sft.gguf

An adapter is merged into its base. What was written is read back and compared, tensor by tensor, with the
model it came from, and then run: the logits of both are what the last line compares. Nothing is overwritten.

GGUF, version 3, as llama.cpp documents it (ggml/docs/gguf.md): a header of typed key-value pairs, a table of
tensors, then their data, each aligned to 32 bytes. Written with numpy alone.
"""

import copy
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError

from lib.config import UserError, run
from lib.tokenizer import TEMPLATES, Tokenizer, jinja, stop_ids
from model import Llama, load_model, model_folder, open_model_folder, save_model

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ExportConfig:
    """Which model, and what to make of it."""

    model_path: str  # a model or adapter folder, or that of a whole training
    output: str  # the folder (hf) or file (gguf) to write; it must not exist
    # a folder for transformers and others, or a file for llama.cpp
    format: Literal["hf", "gguf"] = "hf"
    # of the weights; q8_0 (8 bits, 32 to a scale): gguf
    dtype: Literal["f32", "f16", "bf16", "q8_0"] = "f32"


def main(cfg):
    """Writes the model, proves that what was written is the model, and says so."""
    if cfg.format == "hf" and cfg.dtype == "q8_0":
        raise UserError(
            "dtype=q8_0 is for --format=gguf; a Hugging Face folder takes f32, f16 or bf16"
        )
    output = Path(cfg.output)
    if output.exists():
        raise UserError(f"{output}: exists; name another --output, or delete it")
    model = open_model_folder(cfg.model_path)
    tokenizer = Tokenizer.load(model_folder(cfg.model_path))
    tokenizer.match(model.cfg.vocab_size, cfg.model_path)
    check_range(model, cfg.dtype)
    warning = check_tokenizer(cfg, tokenizer)
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.partial")
    remove(unfinished)  # of an export that was killed
    try:
        if cfg.format == "hf":
            write_folder(unfinished, model, tokenizer, cfg.dtype)
            proof = compare(model, load_model(unfinished), cfg.dtype)
        else:
            write_gguf(unfinished, model, tokenizer, cfg.dtype)
            proof = compare(model, read_model(unfinished, model.cfg), cfg.dtype)
        os.replace(unfinished, output)
    except SafetensorError as problem:  # what it makes of the system's errors
        raise UserError(f"{output}: could not be written ({problem})") from None
    finally:
        remove(unfinished)
    files = [output] if output.is_file() else [*output.iterdir()]
    size, count = (
        sum(file.stat().st_size for file in files),
        sum(p.numel() for p in model.parameters()),
    )
    print(
        f"{output}: {count / 1e6:.1f}M parameters in {cfg.dtype}, {size / 1e6:.1f} MB\n{proof}{warning}"
    )


def remove(path):
    """Deletes a file or folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def check_range(model, dtype):
    """UserError if a weight is too large for the dtype it is to be written in."""
    largest = torch.finfo(torch.float16).max if dtype in ("f16", "q8_0") else torch.inf
    for name, p in model.named_parameters():
        if not p.abs().max() <= largest * (127 if dtype == "q8_0" else 1):
            raise UserError(
                f"{name} holds {p.abs().max():.3g}, too large for {dtype}; use --dtype=bf16"
            )


def check_tokenizer(cfg, tokenizer):
    """Returns a line on where other programs will read a text otherwise, or "".

    UserError for a tokenizer that cannot be written in cfg.format.
    """
    if tokenizer.file != "tokenizer.model":
        if cfg.format == "hf":
            return ""  # it is copied
        raise UserError(
            f"{cfg.model_path}: its tokenizer is a {tokenizer.file}, and GGUF is written from "
            "SentencePiece's tokenizer.model; use --format=hf and llama.cpp's own converter"
        )
    kind, habits = sentencepiece_kind(tokenizer.model)
    if kind != "BPE":
        raise UserError(
            f"{cfg.model_path}: its tokenizer.model is a {kind} model; what export writes for other programs "
            "is BPE and would give other ids; use the folder itself, with its base model's tokenizer files"
        )
    where = "tokenizer.json" if cfg.format == "hf" else "the tokenizer in the file"
    told = f"\nwarning: {where} is not exact: it does not {' or '.join(habits)}, as tokenizer.model does"
    return told if habits else ""


def sentencepiece_kind(model):
    """Returns (kind, what it does to a text besides) of a .model file, by sentencepiece_model.proto."""
    parts = {1: [], 2: [], 3: []}
    for number, value in protobuf(model):
        parts.setdefault(number, []).append(value)
    trainer, normalizer = (dict(protobuf(b"".join(parts[number]))) for number in (2, 3))
    habits = {
        "normalize characters": normalizer.get(2),
        "drop superfluous spaces": normalizer.get(4, 1),
        "keep user-defined symbols whole": any(
            dict(protobuf(piece)).get(3) == 4 for piece in parts[1]
        ),
    }
    kind = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}[trainer.get(3, 1)]
    return kind, [habit for habit, on in habits.items() if on]


def protobuf(data):
    """Yields (number, value) of a message's fields: integers, or bytes for what is not one."""
    at = 0

    def integer():
        nonlocal at
        value = shift = 0
        while True:
            byte, at = data[at], at + 1
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        key = integer()
        if key & 7 == 0:
            yield key >> 3, integer()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or integer()
            yield key >> 3, data[at : at + size]
            at += size


@torch.no_grad()
def compare(model, written, dtype):
    """Returns a line on how `written`, read back, differs from `model`; fails if by more than rounding."""
    worst, own = 0.0, written.state_dict()
    for name, expected in model.state_dict().items():
        assert own[name].shape == expected.shape, f"{name}: {own[name].shape}, not {expected.shape}"
        difference = (own[name] - expected).abs()
        if dtype == "q8_0" and expected.ndim > 1:
            largest = expected.reshape(-1, 32).abs().amax(dim=1, keepdim=True)
            allowed = (0.5 / 127 + 2**-11) * largest  # half a step, and the rounding of its scale
            same = (difference.reshape(-1, 32) <= allowed).all()
        else:
            rounded = expected.to(DTYPES.get(dtype, torch.float32)).float()
            same = torch.equal(own[name], rounded) or torch.equal(own[name], expected)
        assert same, f"{name}: written as something else"
        worst = max(worst, difference.max().item())
    ids = torch.arange(min(64, model.cfg.sequence_length)) * 7919 % model.cfg.vocab_size
    before, after = model(ids[None]), written(ids[None])
    apart, size = (before - after).abs().max().item(), before.abs().max().item()
    agreed = (before.argmax(-1) == after.argmax(-1)).float().mean().item()
    return (
        f"read back: {len(own)} tensors, at most {worst:.2g} from the model's; logits of {len(ids)} "
        f"positions at most {apart:.2g} apart (the largest is {size:.3g}), "
        f"the likeliest token the same in {agreed:.0%}"
    )


# ---- Hugging Face


def write_folder(folder, model, tokenizer, dtype):
    """Writes what AutoModelForCausalLM and AutoTokenizer open."""
    folder.mkdir()
    half = copy.deepcopy(model).to(DTYPES[dtype])
    save_model(half, folder, stop_ids(tokenizer, tokenizer.template))
    tokenizer.save(folder, model.cfg.sequence_length)


# ---- GGUF

UINT32, FLOAT32, BOOL, STRING, ARRAY, INT32 = 4, 6, 7, 8, 9, 5  # types of values
SCALARS = {UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?"}
F32, F16, Q8_0, BF16 = 0, 1, 8, 30  # types of tensors
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
TENSOR_TYPES = {"f32": F32, "f16": F16, "q8_0": Q8_0, "bf16": BF16}
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # types of tokens
ALIGNMENT = 32
BLOCK = np.dtype([("scale", "<f2"), ("steps", "i1", 32)])  # of Q8_0: 32 numbers, each scale x step
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}
TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name):
    """Returns llama.cpp's name of a tensor of ours."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    _, _, layer, inner = name.split(".", 3)
    return f"blk.{layer}.{NAMES[inner.removesuffix('.weight')]}.weight"


def write_gguf(path, model, tokenizer, dtype):
    """Writes a GGUF file of `model`; norms stay float32."""
    cfg, tensors = model.cfg, {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and cfg.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            array = interleaved(array, cfg.n_head if "q_proj" in name else cfg.kv_heads)
        tensors[gguf_name(name)] = array, TENSOR_TYPES[dtype] if array.ndim > 1 else F32
        if dtype == "q8_0" and array.ndim > 1 and array.shape[1] % 32:
            raise UserError(
                f"{name}: rows of {array.shape[1]} numbers; q8_0 takes multiples of 32; use --dtype=f16"
            )
    if (cfg.rope_scaling or {}).get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = frequency_factors(cfg), F32
    with open(path, "wb") as file:
        file.write(header(metadata(cfg, tokenizer, dtype), tensors))
        for array, kind in tensors.values():
            file.write(b"\0" * (-file.tell() % ALIGNMENT) + packed(array, kind))
        file.flush()
        os.fsync(file.fileno())


def interleaved(array, heads):
    """Returns a query or key matrix with each head's rows reordered for rotary pairs (2i, 2i + 1).

    Ours are (i, i + D/2), as Hugging Face's: llama.cpp's `llama` architecture rotates neighbours.
    """
    rows = array.reshape(heads, 2, -1, array.shape[1])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(array.shape)


def apart(array, heads):
    """Undoes `interleaved`."""
    rows = array.reshape(heads, -1, 2, array.shape[1])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(array.shape)


def frequency_factors(cfg):
    """Returns by what llama3's rule divides each rotary frequency, (D/2,) float32: see model.rope_tables."""
    scaling, D = cfg.rope_scaling, cfg.head_dim
    frequency = cfg.rope_theta ** (-np.arange(0, D, 2) / D)
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / (keep + (1 - keep) / scaling["factor"])).astype(np.float32)


def metadata(cfg, tokenizer, dtype):
    """Returns {key: (type, value)} of all that llama.cpp asks of a Llama and of its tokenizer."""
    scaling = cfg.rope_scaling or {}
    model = {
        "context_length": (UINT32, cfg.sequence_length),
        "embedding_length": (UINT32, cfg.d_model),
        "block_count": (UINT32, cfg.n_layer),
        "feed_forward_length": (UINT32, cfg.d_ff),
        "attention.head_count": (UINT32, cfg.n_head),
        "attention.head_count_kv": (UINT32, cfg.kv_heads),
        "attention.layer_norm_rms_epsilon": (FLOAT32, cfg.layer_norm_epsilon),
        "rope.dimension_count": (UINT32, cfg.head_dim),
        "rope.freq_base": (FLOAT32, cfg.rope_theta),
        "vocab_size": (UINT32, cfg.vocab_size),
    }
    if scaling.get("rope_type") == "linear":
        model |= {
            "rope.scaling.type": (STRING, "linear"),
            "rope.scaling.factor": (FLOAT32, scaling["factor"]),
        }
    words = {
        "model": (STRING, "llama"),
        "pre": (STRING, "default"),
        "tokens": (ARRAY, (STRING, tokenizer.pieces)),
        "scores": (ARRAY, (FLOAT32, tokenizer.scores)),
        "token_type": (
            ARRAY,
            (INT32, [token_type(tokenizer, id) for id in range(tokenizer.vocab_size)]),
        ),
        "bos_token_id": (UINT32, tokenizer.bos_id),
        "eos_token_id": (UINT32, tokenizer.eos_id),
        "unknown_token_id": (UINT32, tokenizer.unk_id),
        "padding_token_id": (UINT32, tokenizer.pad_id),
        "add_bos_token": (BOOL, True),
        "add_eos_token": (BOOL, False),
        "add_space_prefix": (BOOL, tokenizer.dummy_prefix),
    }
    chat = {}
    if tokenizer.template:
        chat["tokenizer.chat_template"] = STRING, jinja(TEMPLATES[tokenizer.template])
        ends = stop_ids(tokenizer, tokenizer.template)
        words["eot_token_id"] = (
            UINT32,
            next((id for id in ends if id != tokenizer.eos_id), tokenizer.eos_id),
        )
    return {
        "general.architecture": (STRING, "llama"),
        "general.name": (STRING, cfg.model_name),
        "general.alignment": (UINT32, ALIGNMENT),
        "general.file_type": (UINT32, FILE_TYPES[dtype]),
        **{f"llama.{key}": value for key, value in model.items()},
        **{f"tokenizer.ggml.{key}": value for key, value in words.items()},
        **chat,
    }


def token_type(tokenizer, id):
    """Returns what kind of token an id is."""
    if id == tokenizer.unk_id:
        return UNKNOWN
    if not tokenizer.spelled(id, controls=False):
        return CONTROL
    piece = tokenizer.pieces[id]
    return BYTE if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">") else NORMAL


def header(values, tensors):
    """Returns all that stands before the tensors' data."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(values))]
    for key, (kind, value) in values.items():
        parts += [text(key), struct.pack("<I", kind), encoded(kind, value)]
    place = 0
    for name, (array, kind) in tensors.items():
        parts += [text(name), struct.pack("<I", array.ndim)]
        parts += [struct.pack("<Q", size) for size in reversed(array.shape)]  # the fastest first
        parts += [struct.pack("<IQ", kind, place)]
        place += -(-packed_size(array.size, kind) // ALIGNMENT) * ALIGNMENT
    whole = b"".join(parts)
    return whole + b"\0" * (-len(whole) % ALIGNMENT)


def text(word):
    data = word.encode()
    return struct.pack("<Q", len(data)) + data


def encoded(kind, value):
    if kind == STRING:
        return text(value)
    if kind == ARRAY:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(
            encoded(inner, item) for item in items
        )
    return struct.pack(SCALARS[kind], value)


def packed_size(count, kind):
    """Returns the bytes of `count` numbers."""
    return {F32: 4 * count, F16: 2 * count, BF16: 2 * count, Q8_0: count // 32 * BLOCK.itemsize}[
        kind
    ]


def packed(array, kind):
    """Returns the bytes of a float32 array in a type of tensors."""
    if kind == BF16:
        return torch.from_numpy(array).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    if kind != Q8_0:
        return array.astype("<f4" if kind == F32 else "<f2").tobytes()
    rows = array.reshape(-1, 32)
    scale = np.abs(rows).max(axis=1) / np.float32(127)
    turned = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    steps = rows * turned[:, None]
    blocks = np.empty(len(rows), BLOCK)
    blocks["scale"] = scale
    blocks["steps"] = np.trunc(steps + np.copysign(np.float32(0.5), steps))  # halves away from zero
    return blocks.tobytes()


def unpacked(data, shape, kind):
    """Returns the float32 array of what `packed` wrote."""
    if kind == BF16:
        return (
            torch.frombuffer(bytearray(data), dtype=torch.bfloat16).float().numpy().reshape(shape)
        )
    if kind != Q8_0:
        return (
            np.frombuffer(data, "<f4" if kind == F32 else "<f2").astype(np.float32).reshape(shape)
        )
    blocks = np.frombuffer(data, BLOCK)
    return (blocks["scale"].astype(np.float32)[:, None] * blocks["steps"]).reshape(shape)


class Info(NamedTuple):
    """An entry of the table of tensors."""

    name: str
    shape: tuple[int, ...]
    kind: int
    place: int


class Reader:
    """Reads values off a GGUF file in their order."""

    def __init__(self, file):
        self.file = file

    def number(self, form):
        return struct.unpack(form, self.file.read(struct.calcsize(form)))[0]

    def text(self):
        return self.file.read(self.number("<Q")).decode()

    def value(self, kind):
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            inner, count = self.number("<I"), self.number("<Q")
            return [self.value(inner) for _ in range(count)]
        return self.number(SCALARS[kind])

    def info(self):
        name, dimensions = self.text(), self.number("<I")
        shape = tuple(self.number("<Q") for _ in range(dimensions))[::-1]
        return Info(name, shape, self.number("<I"), self.number("<Q"))


def read_gguf(path):
    """Returns (metadata, {name: float32 array}) of a file that `write_gguf` wrote."""
    with open(path, "rb") as file:
        reader = Reader(file)
        assert file.read(4) == b"GGUF"
        assert reader.number("<I") == 3
        tensors, values = reader.number("<Q"), reader.number("<Q")
        found = {reader.text(): reader.value(reader.number("<I")) for _ in range(values)}
        table = [reader.info() for _ in range(tensors)]
        start = file.tell() + -file.tell() % found["general.alignment"]
        arrays = {}
        for name, shape, kind, place in table:
            file.seek(start + place)
            arrays[name] = unpacked(file.read(packed_size(int(np.prod(shape)), kind)), shape, kind)
    return found, arrays


def read_model(path, cfg):
    """Returns the Llama of shape `cfg` with the weights of a file that `write_gguf` wrote."""
    _, arrays = read_gguf(path)
    model = Llama(cfg).eval()
    for name, p in model.state_dict().items():
        source = (
            "model.embed_tokens.weight"
            if name == "lm_head.weight" and cfg.tie_word_embeddings
            else name
        )
        array = arrays[gguf_name(source)]
        if "q_proj" in name or "k_proj" in name:
            array = apart(array, cfg.n_head if "q_proj" in name else cfg.kv_heads)
        p.copy_(torch.from_numpy(array))
    return model


if __name__ == "__main__":
    run(main, ExportConfig, __doc__)
