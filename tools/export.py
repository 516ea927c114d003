"""A trained model for other programs: a Hugging Face folder, or one GGUF file for llama.cpp.

    python -m tools.export --model_path=checkpoints/sft --format=hf --output=exported/sft
    python -m tools.export --model_path=checkpoints/sft --format=gguf --dtype=q8_0 --output=sft.gguf

An adapter is merged into its base. The export is read back, compared with the model tensor by
tensor, and run: the last line compares the logits of both. Nothing is overwritten. llama.cpp's own
package gguf writes GGUF.
"""

import copy
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError

from lib.config import UserError, run
from lib.tokenizer import TEMPLATES, Tokenizer, stop_ids
from lib.tokenizer_json import jinja
from model import Llama, load_model, model_folder, save_model

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ExportConfig:
    """Which model, and in which form."""

    model_path: str  # a model or adapter folder, or that of a whole training
    output: str  # the folder (hf) or file (gguf) to write; it must not exist
    format: Literal["hf", "gguf"] = "hf"  # a folder for transformers, or a file for llama.cpp
    # of the weights; q8_0 (8 bits, 32 numbers to a scale) is gguf's
    dtype: Literal["f32", "f16", "bf16", "q8_0"] = "f32"

    def __post_init__(self):
        if self.format == "hf" and self.dtype == "q8_0":
            raise ValueError("dtype=q8_0 is for --format=gguf; hf takes f32, f16 or bf16")


def main(cfg):
    """Writes the model, proves that the export is the model, and reports it."""
    output = Path(cfg.output)
    if output.exists():
        raise UserError(f"{output}: exists; name another --output, or delete it")
    write, read = (write_folder, read_folder) if cfg.format == "hf" else (write_gguf, read_gguf)
    model = load_model(cfg.model_path)
    tokenizer = Tokenizer.load(model_folder(cfg.model_path))
    tokenizer.match(model.cfg.vocab_size, cfg.model_path)
    check_weights(model, cfg.dtype)
    warning = check_tokenizer(cfg, tokenizer)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    delete_export(partial)  # of an export that was killed
    try:
        write(partial, model, tokenizer, cfg.dtype)
        proof = compare_models(model, read(partial, model.cfg), cfg.dtype)
        os.replace(partial, output)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{output}: not written ({error}); is there no space left?") from None
    finally:
        delete_export(partial)
    size = sum(file.stat().st_size for file in [output, *output.glob("*")] if file.is_file())
    count = sum(p.numel() for p in model.parameters())
    print(f"{output}: {count / 1e6:.1f}M parameters in {cfg.dtype}, {size / 1e6:.1f} MB")
    print(proof + warning)


def delete_export(path):
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def check_weights(model, dtype):
    """Raises UserError if the dtype cannot hold a weight."""
    limit = {"f16": 65504, "q8_0": 127 * 65504}.get(dtype, torch.inf)
    for name, p in model.named_parameters():
        if not p.abs().max() <= limit:
            size = p.abs().max()
            raise UserError(f"{name} holds {size:.3g}, too large for {dtype}; use --dtype=bf16")
        if dtype == "q8_0" and p.ndim > 1 and p.shape[1] % 32:
            width = f"{name}: rows of {p.shape[1]} numbers"
            raise UserError(f"{width}; q8_0 takes multiples of 32; use --dtype=f16")


def check_tokenizer(cfg, tokenizer):
    """Returns a warning where other programs will tokenize otherwise, or "".

    Raises UserError for a tokenizer that cannot be written in cfg.format.
    """
    if tokenizer.file != "tokenizer.model":
        if cfg.format == "hf":
            return ""  # the file is copied
        raise UserError(
            f"{cfg.model_path}: its tokenizer is a {tokenizer.file}, and GGUF is written from "
            "tokenizer.model; use --format=hf and llama.cpp's own converter"
        )
    kind, habits = sentencepiece_kind(tokenizer.model)
    if kind != "BPE":
        raise UserError(
            f"{cfg.model_path}: its tokenizer.model is a {kind} model, and an export as BPE gives "
            "other ids; use the folder with its base model's tokenizer files"
        )
    if not habits:
        return ""
    file = "tokenizer.json" if cfg.format == "hf" else "the tokenizer in the file"
    return f"\nwarning: {file} does not {' or '.join(habits)}, as tokenizer.model does"


def sentencepiece_kind(model):
    """Returns (kind, habits) of a tokenizer.model, by the numbers of sentencepiece_model.proto."""
    fields = list(protobuf_fields(model))
    trainer, normalizer = (
        dict(protobuf_fields(b"".join(value for number, value in fields if number == message)))
        for message in (2, 3)
    )
    pieces = (dict(protobuf_fields(value)) for number, value in fields if number == 1)
    habits = {
        "normalize characters": normalizer.get(2),
        "drop superfluous spaces": normalizer.get(4, 1),
        "keep user-defined symbols whole": any(piece.get(3) == 4 for piece in pieces),
    }
    kind = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}[trainer.get(3, 1)]
    return kind, [habit for habit, present in habits.items() if present]


def protobuf_fields(data):
    """Yields (number, value) of a protobuf message: an integer, or bytes for every other type."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte, at = data[at], at + 1
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or varint()
            yield key >> 3, data[at : at + size]
            at += size


@torch.no_grad()
def compare_models(model, copy, dtype):
    """Returns a line on how the copy read back differs; fails if by more than dtype's rounding."""
    largest_difference, tensors = 0.0, copy.state_dict()
    for name, expected in model.state_dict().items():
        difference = (tensors[name] - expected).abs()
        if dtype == "q8_0" and expected.ndim > 1:
            largest = expected.reshape(-1, 32).abs().amax(dim=1, keepdim=True)
            allowed = (0.5 / 127 + 2**-11) * largest  # half a step, and the rounding of its scale
            same = (difference.reshape(-1, 32) <= allowed).all()
        else:
            rounded = expected.to(DTYPES.get(dtype, torch.float32)).float()
            same = any(torch.equal(tensors[name], each) for each in (rounded, expected))
        assert same, f"{name}: the export holds other numbers"
        largest_difference = max(largest_difference, difference.max().item())
    ids = torch.arange(min(64, model.cfg.sequence_length)) * 7919 % model.cfg.vocab_size
    before, after = model(ids[None]), copy(ids[None])
    apart, size = (before - after).abs().max().item(), before.abs().max().item()
    agreement = (before.argmax(-1) == after.argmax(-1)).float().mean().item()
    return (
        f"read back: {len(tensors)} tensors, at most {largest_difference:.2g} from the model's; "
        f"logits of {len(ids)} positions at most {apart:.2g} apart (the largest is {size:.3g}), "
        f"the likeliest token the same in {agreement:.0%}"
    )


# ----------------------------------------------------------------------------------------------
# Hugging Face


def write_folder(folder, model, tokenizer, dtype):
    """Writes a folder for AutoModelForCausalLM and AutoTokenizer."""
    folder.mkdir()
    model = copy.deepcopy(model).to(DTYPES[dtype])
    save_model(model, folder, stop_ids(tokenizer, tokenizer.template))
    tokenizer.save(folder, model.cfg.sequence_length)


def read_folder(folder, cfg):
    return load_model(folder)


# ----------------------------------------------------------------------------------------------
# GGUF


def gguf_package():
    """Returns the module gguf; UserError with the pip command where it is missing."""
    try:
        import gguf
    except ImportError:
        raise UserError("--format=gguf needs the package gguf: pip install gguf") from None
    return gguf


def gguf_tensors(cfg):
    """Yields (our name, llama.cpp's name, heads if it is rotated else None) of the tensors."""
    gguf = gguf_package()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, cfg.n_layer)
    with torch.device("meta"):
        ours = list(Llama(cfg).state_dict())
    for name in ours:
        if name == "lm_head.weight" and cfg.tie_word_embeddings:
            continue
        heads = cfg.n_head if "q_proj" in name else cfg.kv_heads if "k_proj" in name else None
        yield name, names.get_name(name, try_suffixes=(".weight",)), heads


def reorder_rows(array, heads, pairs):
    """Returns a query or key matrix (heads D, C) with the rows of each head reordered.

    Rotary positions turn the pair of rows (i, i + D/2) in our order, which is Hugging Face's, and
    neighbours (2i, 2i + 1) in llama.cpp's. pairs: (2, -1) to llama.cpp's order, (-1, 2) back.
    """
    rows = array.reshape(heads, *pairs, array.shape[1])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(array.shape)


def write_gguf(path, model, tokenizer, dtype):
    """Writes a GGUF file; norms stay float32."""
    gguf, cfg, weights = gguf_package(), model.cfg, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    add_model(
        writer, cfg, gguf.LlamaFileType[{"f32": "ALL_F32"}.get(dtype, f"MOSTLY_{dtype.upper()}")]
    )
    add_tokenizer(writer, tokenizer)
    for name, gguf_name, heads in gguf_tensors(cfg):
        array = weights[name].numpy()
        array = reorder_rows(array, heads, (2, -1)) if heads else array
        kind = gguf.GGMLQuantizationType[dtype.upper() if array.ndim > 1 else "F32"]
        writer.add_tensor(gguf_name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    if (cfg.rope_scaling or {}).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", frequency_divisors(cfg))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_model(writer, cfg, file_type):
    """Adds the values from which llama.cpp builds the model."""
    writer.add_name(cfg.model_name)
    writer.add_file_type(file_type)
    writer.add_context_length(cfg.sequence_length)
    writer.add_embedding_length(cfg.d_model)
    writer.add_block_count(cfg.n_layer)
    writer.add_feed_forward_length(cfg.d_ff)
    writer.add_head_count(cfg.n_head)
    writer.add_head_count_kv(cfg.kv_heads)
    writer.add_layer_norm_rms_eps(cfg.layer_norm_epsilon)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_vocab_size(cfg.vocab_size)
    if (cfg.rope_scaling or {}).get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf_package().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(cfg.rope_scaling["factor"])


def add_tokenizer(writer, tokenizer):
    """Adds the vocabulary, its special tokens and the chat template."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokenizer.pieces)
    writer.add_token_scores(tokenizer.scores)
    writer.add_token_types([token_type(tokenizer, id) for id in range(tokenizer.vocab_size)])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(tokenizer.dummy_prefix)
    if tokenizer.template:
        writer.add_chat_template(jinja(TEMPLATES[tokenizer.template]))
        ends = [id for id in stop_ids(tokenizer, tokenizer.template) if id != tokenizer.eos_id]
        writer.add_eot_token_id(ends[0] if ends else tokenizer.eos_id)


def token_type(tokenizer, id):
    """Returns llama.cpp's type of a token."""
    types = gguf_package().TokenType
    if id == tokenizer.unk_id:
        return types.UNKNOWN
    if not tokenizer.spelled(id, controls=False):
        return types.CONTROL
    piece = tokenizer.pieces[id]
    byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
    return types.BYTE if byte else types.NORMAL


def frequency_divisors(cfg):
    """Returns the divisors of llama3's rotary frequencies, (D/2,) float32."""
    frequency = cfg.rope_theta ** (-np.arange(0, cfg.head_dim, 2) / cfg.head_dim)
    scaling = cfg.rope_scaling
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / (keep + (1 - keep) / scaling["factor"])).astype(np.float32)


def read_gguf(path, cfg):
    """Returns the Llama of shape `cfg` with the weights of a GGUF file."""
    gguf, model = gguf_package(), Llama(cfg).eval()
    tensors, weights = {t.name: t for t in gguf.GGUFReader(path).tensors}, model.state_dict()
    for name, gguf_name, heads in gguf_tensors(cfg):
        tensor = tensors[gguf_name]
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        array = reorder_rows(array, heads, (-1, 2)) if heads else array
        weights[name].copy_(torch.from_numpy(array))
    return model


if __name__ == "__main__":
    run(main, ExportConfig, __doc__)
