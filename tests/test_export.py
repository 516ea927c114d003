"""Exports are the model, as transformers and gguf read them; foreign folders open here."""

import json
import os
import shlex
import subprocess
import urllib.error

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.config import UserError
from lib.conversation import find_template, render
from lib.tokenizer import Tokenizer
from model import Llama, ModelConfig, add_lora, identify, load_model, save_adapter, save_model
from sample import open_model
from tests import ROOT
from tests.conftest import ask, llama_cpp, sentencepiece_model
from tests.warm import python
from tools.export import ExportConfig, main

gguf = pytest.importorskip("gguf")
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHAPES = {
    "plain": {},
    "tied, grouped": {"tie_word_embeddings": True, "num_key_value_heads": 2},
    "llama3": {"rope_scaling": LLAMA3},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "own width": {"head_dim": 24, "num_key_value_heads": 2},
    "qwen2": {"qkv_bias": True, "num_key_value_heads": 2},
    "qwen3": {"qk_norm": True, "head_dim": 32, "num_key_value_heads": 2},
}


def make(folder, tokenizer, template="chatml", **shape):
    """A model folder of random weights that are far from uniform."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "d_model": 64, "n_head": 4, "d_ff": 96, "sequence_length": 128}
    model = Llama(ModelConfig(vocab_size=tokenizer.vocab_size, **{**sizes, **shape})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    folder.mkdir()
    save_model(model, folder)
    tokenizer.save(folder, 128, template)
    return folder


def export(source, output, format, dtype="f32"):
    main(ExportConfig(str(source), str(output), format, dtype))
    return output


def command(folder, *words):
    """`python -m tools.export WORDS` in a folder: a mistake of one line."""
    streams = {"capture_output": True, "text": True, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    done = subprocess.run([python(), "-m", "tools.export", *words], cwd=folder, **streams)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    return done.stderr


IDS = torch.tensor([[1, *range(300, 340)]])


@torch.no_grad()
def logits_of(model):
    out = model(IDS)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_reads_both_formats_as_we_do(shape, tiny_tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    own = make(tmp_path / "own", tiny_tokenizer, **SHAPES[shape])
    expected = logits_of(load_model(own))
    hf = export(own, tmp_path / "hf", "hf")
    read = transformers.AutoModelForCausalLM.from_pretrained(hf)
    assert torch.allclose(logits_of(read), expected, atol=1e-5)
    text = "the quick fox 42\n\n  jumps \u00e9\U0001f600"
    ids = transformers.AutoTokenizer.from_pretrained(hf).encode(text, add_special_tokens=False)
    # it takes any tokenizer beside a Qwen2 for that class's, so nothing here pretrains one
    assert ids == tiny_tokenizer.encode(text) or shape == "qwen2"
    if {"rope_scaling", "qkv_bias", "qk_norm"} & SHAPES[shape].keys():
        return  # transformers reads neither the scaling of a GGUF file nor such a head's width
    for dtype, apart in (("f32", 1e-5), ("f16", 0.05), ("bf16", 0.05), ("q8_0", 0.05)):
        file = export(own, tmp_path / f"{dtype}.gguf", "gguf", dtype).name
        read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file)
        assert torch.allclose(logits_of(read), expected, atol=apart)
        kinds = {int(tensor.tensor_type) for tensor in gguf.GGUFReader(tmp_path / file).tensors}
        assert kinds == {gguf.GGMLQuantizationType[dtype.upper()], gguf.GGMLQuantizationType.F32}


def test_gguf_says_what_llama_cpp_must_know(tiny_tokenizer, tmp_path):
    own = make(tmp_path / "own", tiny_tokenizer, **SHAPES["llama3"])
    reader = gguf.GGUFReader(export(own, tmp_path / "own.gguf", "gguf"))
    said = {key: field.contents() for key, field in reader.fields.items()}
    keys, arch = gguf.Keys, "llama"
    expected = {
        keys.General.ARCHITECTURE: arch,
        keys.LLM.CONTEXT_LENGTH: 128,
        keys.LLM.EMBEDDING_LENGTH: 64,
        keys.LLM.BLOCK_COUNT: 2,
        keys.LLM.FEED_FORWARD_LENGTH: 96,
        keys.Attention.HEAD_COUNT: 4,
        keys.Attention.HEAD_COUNT_KV: 4,
        keys.Rope.DIMENSION_COUNT: 16,
        keys.Rope.FREQ_BASE: 10000.0,
        keys.Tokenizer.MODEL: arch,
        keys.Tokenizer.BOS_ID: tiny_tokenizer.bos_id,
        keys.Tokenizer.EOS_ID: tiny_tokenizer.eos_id,
        keys.Tokenizer.EOT_ID: tiny_tokenizer.im_end_id,
        keys.Tokenizer.ADD_BOS: True,
        keys.Tokenizer.ADD_PREFIX: False,
        keys.Tokenizer.LIST: tiny_tokenizer.pieces,
    }
    assert {key: said[key.format(arch=arch)] for key in expected} == expected
    types = said[keys.Tokenizer.TOKEN_TYPE]
    assert [types[id] for id in range(6)] == [3, 3, 3, 2, 3, 3]
    assert types.count(gguf.TokenType.BYTE) == 256
    # without the tag that only transformers is sure to know
    template = find_template(tiny_tokenizer, "chatml").plain_text()
    assert said[keys.Tokenizer.CHAT_TEMPLATE] == template
    factors = {tensor.name: tensor.data for tensor in reader.tensors}["rope_freqs.weight"]
    # Llama 3's rule as llama.cpp's converter has it, wavelength by wavelength
    waves = 2 * np.pi * 10000 ** (np.arange(0, 16, 2) / 16)
    smooth = (32 / waves - 1) / (4 - 1)
    between = 1 / ((1 - smooth) / 4 + smooth)
    rule = np.where(waves < 32 / 4, 1, np.where(waves > 32 / 1, 4, between))
    assert factors == pytest.approx(rule, rel=1e-6)


def compare_with_llama_cpp(file, model):
    """Returns the log-probabilities (N,) of the likeliest next ids: llama.cpp's, then ours."""
    body = {"prompt": IDS[0].tolist(), "n_predict": 1, "n_probs": 400, "temperature": 0}
    done = llama_cpp(file, True).handle_completions(body)["choices"][0]
    top = done["logprobs"]["content"][0]["top_logprobs"]
    assert len(top) > 300
    ours = logits_of(model)[0, -1].log_softmax(-1)[[entry["id"] for entry in top]]
    return torch.tensor([entry["logprob"] for entry in top]), ours


@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_computes_what_we_do(shape, tiny_tokenizer, tmp_path):
    own = make(tmp_path / "own", tiny_tokenizer, **SHAPES[shape])
    theirs, ours = compare_with_llama_cpp(
        export(own, tmp_path / "own.gguf", "gguf"), load_model(own)
    )
    # llama.cpp keeps keys and values in 16 bits
    assert torch.allclose(ours, theirs, rtol=0, atol=0.02)


@pytest.mark.parametrize("dtype", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_llama_cpp_computes_what_we_do_with_the_rounded_weights(dtype, tiny_tokenizer, tmp_path):
    own = make(tmp_path / "own", tiny_tokenizer)
    file = export(own, tmp_path / "own.gguf", "gguf", dtype)
    types, model = gguf.GGMLQuantizationType, load_model(own)
    with torch.no_grad():
        for name, p in model.named_parameters():
            outer = "embed_tokens" in name or "lm_head" in name
            kind = types.Q8_0 if outer else types[dtype.upper()]
            if p.ndim > 1:
                p.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(p.numpy(), kind), kind)))
    kinds = {int(tensor.tensor_type) for tensor in gguf.GGUFReader(file).tensors}
    assert kinds == {types.F32, types.Q8_0, types[dtype.upper()]}
    theirs, ours = compare_with_llama_cpp(file, model)
    # it multiplies by activations of 8 bits
    assert (theirs - ours).abs().mean() < 0.01


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_an_export_says_how_to_run_it(format, tiny_tokenizer, tmp_path, capsys):
    own = make(tmp_path / "own", tiny_tokenizer)
    (tmp_path / "a b").mkdir()
    output = export(own, tmp_path / "a b" / "it", format)
    words = shlex.split(capsys.readouterr().out.split("to run it:")[1])
    files = {word for word in words if word.startswith(str(tmp_path))}
    modelfile = {str(output.with_suffix(".Modelfile"))} if format == "gguf" else set()
    assert files == {str(output)} | modelfile
    assert all(os.path.exists(file) for file in files)
    programs = {"gguf": {"llama-server", "ollama", "lms"}, "hf": {"vllm", "mlx_lm.generate"}}
    assert programs[format] <= set(words)


def says(*contents):
    """Messages of the user and the assistant by turns."""
    return [{"role": ("user", "assistant")[n % 2], "content": c} for n, c in enumerate(contents)]


BE_KIND = [{"role": "system", "content": "be kind"}]
TALKS = [says("why not?"), says("who?", "the fox\n\nand 7", "- over what?")]
TALKS += [BE_KIND + says("when?"), BE_KIND + says("a", "b", "c", "d", "Human: \U0001f600")]


@pytest.mark.parametrize("use_jinja", [True, False])
@pytest.mark.parametrize("template", ["chatml", "chatml_newline", "instruct", "chat"])
def test_llama_cpp_renders_a_conversation_to_the_same_ids(
    tiny_tokenizer, tmp_path, template, use_jinja
):
    """Without Jinja it knows chatml by the markers, and none of the others."""
    own = make(tmp_path / "own", tiny_tokenizer, template)
    server = llama_cpp(export(own, tmp_path / "own.gguf", "gguf"), use_jinja)
    if not use_jinja and template in ("instruct", "chat"):
        with pytest.raises(urllib.error.HTTPError):
            ask(server, "/apply-template", messages=TALKS[0])
        return
    form = template if use_jinja else "chatml"
    for talk in TALKS:
        text = ask(server, "/apply-template", messages=talk)["prompt"]
        ids = ask(server, "/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        assert ids == render(tiny_tokenizer, talk, form, add_generation_prompt=True)[0]
    if use_jinja:
        with pytest.raises(urllib.error.HTTPError):
            ask(server, "/apply-template", messages=[{"role": "tool", "content": "4"}, *TALKS[0]])


def test_an_adapter_is_merged(tiny_tokenizer, tmp_path):
    own = make(tmp_path / "own", tiny_tokenizer)
    model = add_lora(load_model(own), 4, 8.0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.05 * torch.randn_like(p) if "lora_B" in name else 0.0)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", identify(own))
    tiny_tokenizer.save(tmp_path / "adapter", 128)
    hf = export(tmp_path / "adapter", tmp_path / "hf", "hf")
    assert not (hf / "adapter_config.json").exists()
    assert torch.allclose(logits_of(load_model(hf)), logits_of(model.eval()), atol=1e-5)
    assert not torch.allclose(logits_of(load_model(hf)), logits_of(load_model(own)), atol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model_path=own --output=new --dtype=q8_0", "q8_0 is for --format=gguf"),
        ("--model_path=own --output=own", "exists; name another --output"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(tiny_tokenizer, tmp_path, options, message):
    make(tmp_path / "own", tiny_tokenizer)
    assert message in command(tmp_path, *options.split())
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_what_half_precision_or_q8_cannot_hold_is_named(tiny_tokenizer, tmp_path):
    own = make(tmp_path / "own", tiny_tokenizer)
    model = load_model(own)
    with torch.no_grad():
        model.lm_head.weight[5, 5] = 1e5
    save_model(model, own)
    with pytest.raises(UserError, match=r"embed_tokens.weight holds 1e\+05, too large for f16"):
        export(own, tmp_path / "out", "hf", "f16")
    odd = make(tmp_path / "odd", tiny_tokenizer, d_ff=100)
    with pytest.raises(UserError, match=r"down_proj.weight: rows of 100 .* multiples of 32"):
        export(odd, tmp_path / "out", "gguf", "q8_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd", "own"]


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tiny_tokenizer, tmp_path, small_disk, format):
    own, disk = make(tmp_path / "own", tiny_tokenizer), small_disk("100k")
    words = [f"--model_path={own}", f"--output={disk / 'out'}", f"--format={format}"]
    assert "o space left" in command(ROOT, *words)
    assert not list(disk.iterdir())


# ---- foreign folders


def test_a_sharded_folder_opens_and_its_shards_are_its_identity(tiny_tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    own = make(tmp_path / "own", tiny_tokenizer)
    foreign = transformers.AutoModelForCausalLM.from_pretrained(own, dtype=torch.bfloat16)
    folder = tmp_path / "sharded"
    foreign.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer.model)
    model, tokenizer = open_model(folder, "cpu", "fp32")
    assert tokenizer.sha256 == tiny_tokenizer.sha256 == Tokenizer.load(own).sha256
    assert torch.allclose(logits_of(model), logits_of(foreign.float()), atol=1e-4)
    before = identify(folder).sha256
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    changed = {name: tensor + 1 for name, tensor in load_file(shard).items()}
    save_file(changed, shard)
    assert identify(folder).sha256 != before
    shard.unlink()
    with pytest.raises(UserError, match=r"does not fit the model: .*Missing key"):
        load_model(folder)


LLAMA = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "max_position_embeddings": 128}
LLAMA |= {"bos_token_id": 1, "eos_token_id": 2}


def make_foreign(folder, tokenizer, **changes):
    """Writes a folder by transformers, with a SentencePiece model. Returns transformers' model."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    foreign = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | changes)).eval()
    with torch.no_grad():
        for p in foreign.parameters():
            p.add_(0.05 * torch.randn_like(p))
    foreign.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    return foreign


def rewrite(path, **changes):
    """Changes keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize("spelling", [4, 5])
@pytest.mark.parametrize("scaling", [LLAMA3, {"rope_type": "linear", "factor": 2.0}, None])
def test_positions_are_read_as_transformers_4_and_5_write_them(
    spelling, scaling, tiny_tokenizer, tmp_path
):
    rope = {"rope_theta": 5000.0, "rope_type": "default"} | (scaling or {})
    foreign = make_foreign(tmp_path / "f", tiny_tokenizer, rope_parameters=rope)
    config = tmp_path / "f" / "config.json"
    assert "rope_theta" not in json.loads(config.read_text())
    if spelling == 4:
        old = scaling and scaling | {"type": scaling["rope_type"]}  # 4.45 wrote both names
        rewrite(config, rope_parameters=None, rope_theta=5000.0, rope_scaling=old)
    assert torch.allclose(logits_of(load_model(tmp_path / "f")), logits_of(foreign), atol=1e-5)


def test_odd_folders_that_transformers_reads_open_here(tiny_tokenizer, tmp_path):
    changes = {"num_key_value_heads": 2, "vocab_size": 448, "head_dim": 16, "pad_token_id": None}
    folder = tmp_path / "f"
    foreign = make_foreign(folder, tiny_tokenizer, **changes)
    rewrite(folder / "config.json", pad_token_id=-1, eos_token_id=[2, 7], something_new={"a": 1})
    tensors = load_file(folder / "model.safetensors")
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    save_file(tensors | old, folder / "model.safetensors", metadata={"format": "pt"})
    model, tokenizer = open_model(folder, "cpu", "fp32")
    assert torch.allclose(logits_of(model), logits_of(foreign), atol=1e-5)
    assert tokenizer.vocab_size == 448  # more than its SentencePiece model has
    assert set(range(384, 448)) <= set(model.unwritten.tolist())
    fields = gguf.GGUFReader(export(folder, tmp_path / "f.gguf", "gguf")).fields
    tokens, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    assert (len(tokens), len(set(tokens)), types[400]) == (448, 448, gguf.TokenType.CONTROL)


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def in_8_bits(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pickled, "a pickle may run any code, so it is not read.*save_pretrained"),
        (in_8_bits, r"lm_head.weight holds .* \(torch.float8_e4m3fn\)"),
        (lambda folder: (folder / "tokenizer.model").unlink(), r"tokenizer\.model: No such file"),
    ],
)
def test_foreign_folders_that_do_not_fit_are_refused_in_one_line(
    change, message, tiny_tokenizer, tmp_path
):
    make_foreign(tmp_path / "f", tiny_tokenizer)
    change(tmp_path / "f")
    with pytest.raises(UserError, match=message) as refusal:
        open_model(tmp_path / "f", "cpu", "fp32")
    assert "\n" not in str(refusal.value)


OURS = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}


@pytest.mark.parametrize(
    ("recipe", "text", "same"),
    [
        ({}, "  a  \ufb01ne b<sep>", True),
        ({"normalization_rule_name": "nmt_nfkc"}, "a \ufb01ne b", False),
        ({"remove_extra_whitespaces": True}, "a  b ", False),
        ({"user_defined_symbols": ["<sep>"]}, "a<sep>b", False),
    ],
)
def test_a_warning_says_where_other_programs_will_tokenize_otherwise(
    recipe, text, same, tiny_documents, tmp_path, capsys
):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = Tokenizer(sentencepiece_model(tiny_documents, **OURS | recipe))
    own = make(tmp_path / "own", tokenizer, template=None)
    path = export(own, tmp_path / "hf", "hf") / "tokenizer.json"
    ids = tokenizers.Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids
    assert (ids == tokenizer.encode(text)) == same
    assert ("some texts get other ids" in capsys.readouterr().out) == (not same)


@pytest.mark.parametrize("kind", ["unigram", "char"])
def test_a_tokenizer_that_is_not_bpe_is_refused(kind, tiny_documents, tmp_path):
    tokenizer = Tokenizer(sentencepiece_model(tiny_documents, model_type=kind, **OURS))
    own = make(tmp_path / "own", tokenizer, template=None)
    for format in ("hf", "gguf"):
        with pytest.raises(UserError, match=r"tokenizer\.model is not BPE.*gives other ids"):
            export(own, tmp_path / "out", format)
    assert [path.name for path in tmp_path.iterdir()] == ["own"]
