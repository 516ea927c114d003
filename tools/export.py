"""A trained model for other programs: a Hugging Face folder, or one GGUF file for llama.cpp.

    python -m tools.export --model_path=checkpoints/sft --format=hf --output=exported/sft
    python -m tools.export --model_path=checkpoints/sft --format=gguf --dtype=q4_0 --output=sft.gguf

An adapter is merged into its base. The export is read back and compared with the model tensor by
tensor. Nothing is overwritten. llama.cpp's own package gguf writes GGUF and rounds to 8, 5 or 4
bits; sft.Modelfile beside it is for Ollama.
"""

import copy
import os
import shlex
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece
import torch
from safetensors import SafetensorError

from corpus.files import package
from lib.config import DTYPES, UserError, refusing, run, write_whole
from lib.conversation import ROLES, TEMPLATES, find_template, render, stop_ids
from lib.tokenizer import BYTE_PIECE, IM_END, IM_START, SPECIALS, Tokenizer
from model import load_model, model_folder, rope_frequencies, save_model, to_hf


@dataclass(frozen=True)
class ExportConfig:
    """Which model, and in which form."""

    model_path: str  # a model or adapter folder, or that of a whole training
    output: str  # the folder (hf) or file (gguf) to write; it must not exist
    format: Literal["hf", "gguf"] = "hf"  # a folder for transformers, or a file for llama.cpp
    # of the weights; gguf's q8_0 ... q4_0 have 8, 5 or 4 bits, and a scale to 32 numbers
    dtype: Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] = "f32"

    def __post_init__(self):
        if self.format == "hf" and self.dtype.startswith("q"):
            raise ValueError(f"dtype={self.dtype} is for --format=gguf; hf takes f32, f16 or bf16")


# the commands by which other programs run an export, from their documentation of 2026
RUN = {
    "gguf": """
  llama.cpp   llama-server -m {path}
  Ollama      ollama create {name} -f {modelfile} && ollama run {name}
  LM Studio   lms import {path} --copy
  vLLM, MLX   run the folder of --format=hf""",
    "hf": """
  vLLM        vllm serve {path}
  MLX         mlx_lm.generate --model {path} --prompt "Hello"
  llama.cpp, Ollama, LM Studio run the file of --format=gguf""",
}


def main(cfg):
    """Writes the model and reports it; what is written is read back before it gets its name."""
    output = Path(cfg.output)
    beside = [output.with_suffix(".Modelfile")] if cfg.format == "gguf" else []
    for path in (output, *beside):
        if path.exists():
            raise UserError(f"{path}: exists; name another --output, or delete it")
    model = load_model(cfg.model_path)
    tokenizer = Tokenizer.load(model_folder(cfg.model_path))
    tokenizer.match(model.cfg.vocab_size, cfg.model_path)
    check_tokenizer(cfg, tokenizer)
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        refusing((SafetensorError, OSError), f"{output}: not written", "is there no space left?"),
        tempfile.TemporaryDirectory(prefix=".tmp-", dir=output.parent) as folder,
    ):
        path = Path(folder) / "export"
        write = write_folder if cfg.format == "hf" else write_gguf
        write(path, model, tokenizer, cfg.dtype)
        os.replace(path, output)
        for path in beside:
            text = modelfile(output.name, tokenizer, model.cfg.sequence_length)
            write_whole(path, text.encode())
    count = sum(p.numel() for p in model.parameters())
    print(f"{output}: {count / 1e6:.1f}M parameters in {cfg.dtype}; read back: the same weights")
    words = {"path": output, "modelfile": output.with_suffix(".Modelfile"), "name": output.stem}
    print("to run it:", RUN[cfg.format].format(**{k: shlex.quote(str(words[k])) for k in words}))


def check_tokenizer(cfg, tokenizer):
    """Warns where other programs will tokenize otherwise; UserError for what cannot be written."""
    if tokenizer.file != "tokenizer.model":
        if cfg.format == "gguf":
            check_byte_level(cfg.model_path, tokenizer.spec)
        return  # hf copies the file
    # BPE numbers its merges 0, -1, -2 ...; the other kinds score by logarithms
    scores = tokenizer.scores[: tokenizer.model_size]
    scores = [score for id, score in enumerate(scores) if is_text(tokenizer, id)]
    if not all(score.is_integer() for score in scores):
        problem = "its tokenizer.model is not BPE, and an export as BPE gives other ids"
        raise UserError(f"{cfg.model_path}: {problem}; use its base model's tokenizer files")
    normalize = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model).normalize
    kept = normalize("\ufb01  a").endswith("\ufb01\u2581\u2581a")  # the ligature fi, two spaces
    if not kept or scores.count(0) != 1:  # user-defined symbols have that score, too
        habits = "normalizes texts or keeps user-defined symbols whole"
        print(f"warning: tokenizer.model {habits}, its export does not: some texts get other ids")


# llama.cpp's names (its src/llama-vocab.cpp) for the steps of a tokenizer.json's pre_tokenizer, as
# `step_name` has them, and for its ignore_merges: is a word that is a piece one id?
WORD_REGEX = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORD_REGEX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)" + WORD_REGEX
PRE_TOKENIZERS = {
    (WORD_REGEX % r"\p{N}{1,3}", "bytes", True): "llama-bpe",
    (WORD_REGEX % r"\p{N}{1,3}", "bytes", False): "dbrx",
    (WORD_REGEX % r"\p{N}", "bytes", False): "qwen2",
    ("digits", "words", False): "smollm",
    ("words", False): "gpt-2",
}


def step_name(step):
    """Returns the regex of a Split, or a name for another step that llama.cpp knows, else None."""
    match step:
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}:
            return regex
        case {"type": "ByteLevel"} if not step.get("add_prefix_space"):
            return "words" if step.get("use_regex", True) else "bytes"


def pre_tokenizer_name(spec):
    """Returns llama.cpp's name for how a byte-level tokenizer.json cuts texts, or None."""
    step = spec["pre_tokenizer"] or {}
    steps = map(step_name, step.get("pretokenizers", [step]))
    return PRE_TOKENIZERS.get((*steps, bool(spec["model"].get("ignore_merges"))))


def check_byte_level(path, spec):
    """Raises UserError unless llama.cpp knows how a tokenizer.json cuts texts."""
    if pre_tokenizer_name(spec) is None:
        names = ", ".join(PRE_TOKENIZERS.values())
        expected = f"tokenizer.model, or a byte-level tokenizer.json that cuts texts as {names}"
        remedy = "use --format=hf and llama.cpp's converter"
        raise UserError(f"{path}: GGUF is written from {expected}, and it has neither; {remedy}")
    if normalizer := spec.get("normalizer"):
        problem = f"llama.cpp does not apply the tokenizer's normalizer, {normalizer['type']}"
        print(f"warning: {problem}: texts that it changes get other ids")


def is_text(tokenizer, id):
    """Returns whether an id is a piece of text: neither a control symbol nor a single byte."""
    text = tokenizer.spelled(id, controls=False)
    return bool(text) and not BYTE_PIECE.fullmatch(tokenizer.pieces[id])


def check_range(name, weight, stored, dtype):
    """Raises UserError if a weight is too large for the dtype in which it is stored."""
    if not np.isfinite(stored).all():
        size = f"{weight.abs().max():.3g}"
        raise UserError(f"{name} holds {size}, too large for {dtype}; use --dtype=bf16")


def write_folder(folder, model, tokenizer, dtype):
    """Writes a folder for AutoModelForCausalLM and AutoTokenizer, and reads it back."""
    folder.mkdir()
    rounded = copy.deepcopy(model).to(getattr(torch, DTYPES[dtype]))
    weights = {name: weight.float() for name, weight in rounded.state_dict().items()}
    for name, weight in model.state_dict().items():
        check_range(name, weight, weights[name].numpy(), dtype)
    save_model(rounded, folder, stop_ids(tokenizer, tokenizer.template))
    tokenizer.save(folder, model.cfg.sequence_length)
    for name, weight in load_model(folder).state_dict().items():
        assert torch.equal(weight, weights[name]), f"{name}: the export holds other numbers"


# ---- GGUF


def write_gguf(path, model, tokenizer, dtype):
    """Writes a GGUF file, and reads it back."""
    gguf, cfg, written = package("gguf", "--format=gguf"), model.cfg, {}
    arch = to_hf(cfg)["model_type"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], cfg.n_layer)
    writer = gguf.GGUFWriter(path, arch)
    all_f32 = dtype == "f32"
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if all_f32 else f"MOSTLY_{dtype.upper()}"])
    add_model(writer, cfg, gguf)
    add_tokenizer(writer, tokenizer, gguf.TokenType)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and cfg.tie_word_embeddings:
            continue
        if dtype.startswith("q") and weight.ndim > 1 and weight.shape[1] % 32:
            width = f"{name}: rows of {weight.shape[1]} numbers"
            raise UserError(f"{width}; {dtype} takes multiples of 32; use --dtype=f16")
        kind = gguf.GGMLQuantizationType[stored_dtype(name, weight, dtype).upper()]
        array = weight.numpy()
        heads = cfg.n_head if "q_proj" in name else cfg.kv_heads if "k_proj" in name else 0
        if heads and arch == "llama":
            # rotary positions turn rows (i, i + D/2) of a head here, (2i, 2i + 1) in llama.cpp
            array = array.reshape(heads, 2, -1, cfg.d_model).swapaxes(1, 2).reshape(array.shape)
        data = gguf.quantize(array, kind)
        check_range(name, weight, gguf.dequantize(data, kind), dtype)
        name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(name, data, raw_dtype=kind)
        written[name] = data.tobytes()
    if (cfg.rope_scaling or {}).get("rope_type") == "llama3":
        divisors = rope_frequencies(replace(cfg, rope_scaling=None)) / rope_frequencies(cfg)
        writer.add_tensor("rope_freqs.weight", divisors.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    for name, data in written.items():
        assert stored[name].tobytes() == data, f"{name}: the export holds other numbers"


def stored_dtype(name, weight, dtype):
    """Returns the dtype of one tensor in a GGUF file of `dtype`.

    Norms and biases stay float32. Embedding and head, on which a small model depends most, have at
    least 8 bits, as llama.cpp's own quantizer leaves them at least 6.
    """
    outer = "embed_tokens" in name or "lm_head" in name
    if weight.ndim == 1:
        return "f32"
    return "q8_0" if outer and dtype.startswith("q") else dtype


def add_model(writer, cfg, gguf):
    """Adds the values from which llama.cpp builds the model."""
    writer.add_name(cfg.model_name)
    writer.add_context_length(cfg.sequence_length)
    writer.add_embedding_length(cfg.d_model)
    writer.add_block_count(cfg.n_layer)
    writer.add_feed_forward_length(cfg.d_ff)
    writer.add_head_count(cfg.n_head)
    writer.add_head_count_kv(cfg.kv_heads)
    writer.add_layer_norm_rms_eps(cfg.layer_norm_epsilon)
    writer.add_key_length(cfg.head_width)
    writer.add_value_length(cfg.head_width)
    writer.add_rope_dimension_count(cfg.head_width)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_vocab_size(cfg.vocab_size)
    if (cfg.rope_scaling or {}).get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(cfg.rope_scaling["factor"])


def add_tokenizer(writer, tokenizer, types):
    """Adds the vocabulary, its special tokens and the chat template."""
    if tokenizer.file == "tokenizer.model":
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(tokenizer.scores)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer.spec))
        merges = tokenizer.spec["model"]["merges"]
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_token_list(tokenizer.pieces)
    writer.add_token_types([token_type(tokenizer, i, types) for i in range(tokenizer.vocab_size)])
    for role, id in tokenizer.special_ids.items():
        getattr(writer, f"add_{role}_token_id")(id)
    writer.add_add_bos_token(bool(tokenizer.opening))
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(tokenizer.dummy_prefix)
    if tokenizer.template:
        template = find_template(tokenizer, tokenizer.template)
        writer.add_chat_template(template.plain_text())
        writer.add_eot_token_id(tokenizer.eos_id if template.end is None else template.end)


def token_type(tokenizer, id, types):
    """Returns llama.cpp's type of a token; it finds those that are user-defined in any text."""
    if not tokenizer.spelled(id, controls=False):
        return types.UNKNOWN if id == tokenizer.unk_id else types.CONTROL
    if tokenizer.added.get(tokenizer.pieces[id], {}).get("special") is False:
        return types.USER_DEFINED
    return types.NORMAL if is_text(tokenizer, id) else types.BYTE


# ---- Ollama


def modelfile(name, tokenizer, context):
    """Returns the Modelfile of the GGUF file `name`; context: its positions."""
    template = tokenizer.template
    lines, text = [f"FROM ./{name}"], None
    if template is None:
        lines.append("# the model has no chat template and continues a text")
        text = "{{ .Prompt }}"
    elif template in TEMPLATES:
        text = go_template(TEMPLATES[template], tokenizer.pieces[tokenizer.eos_id])
    elif (system := chatml_system(tokenizer)) is None:
        lines.append("# no TEMPLATE: Ollama takes the chat template in the GGUF, if it knows it")
    else:
        text = go_template(TEMPLATES["chatml"], "")
        lines += [f'SYSTEM """{system}"""'] if system else []
    lines += [f'TEMPLATE """{text}"""'] if text else []
    ends = [tokenizer.pieces[id] for id in stop_ids(tokenizer, template)]
    lines += [f'PARAMETER stop "{end}"' for end in ends]
    return "\n".join([*lines, f"PARAMETER num_ctx {context}", ""])


PROBE = [("system", "One"), ("user", "Two?"), ("assistant", "Three"), ("user", "Four?")]
PROBE = [{"role": role, "content": content} for role, content in PROBE]


def chatml_system(tokenizer):
    """Returns the system message that a folder's own template writes by itself, "" for none.

    Returns None for a template that is not chatml, which is known by what it writes.
    """

    def text(template, messages):
        ids, _ = render(tokenizer, messages, template, add_generation_prompt=True)
        return tokenizer.decode(ids, controls=True)

    with suppress(UserError):  # it lacks the markers, or refuses a system message
        if text(tokenizer.template, PROBE) == text("chatml", PROBE):
            alone = text(tokenizer.template, PROBE[1:])
            return alone.partition(f"{IM_START}system\n")[2].partition(IM_END)[0]
    return None


def go_template(shape, eos):
    """Returns a Template in Go's text/template; Ollama ends it where the answer begins."""
    turn = 'if eq .Role "{}" }}}}{}{{{{ .Content }}}}{}'
    turns = [turn.format(role, shape.heads[role], shape.ends[role]) for role in ROLES]
    body = "{{ " + "{{ else ".join(turns) + "{{ end }}"
    between = f"{{{{ if $i }}}}{shape.between}{{{{ end }}}}"
    text = f"{{{{ range $i, $_ := .Messages }}}}{between}{body}{{{{ end }}}}{shape.prompt}"
    return text.replace(SPECIALS["eos"], eos)


if __name__ == "__main__":
    run(main, ExportConfig, __doc__)
