"""The classes that model folders come in - Llama, Mistral, Qwen2, Qwen3 - against transformers."""

import copy
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import model as llama
import sample
from sample import Request, Sampling, fuse, generate
from tests import ROOT
from tests.test_lora import adapted
from tests.test_model import LINEAR, LLAMA3, SMALL, some_ids
from train import PretrainConfig, make_optimizers

transformers = pytest.importorskip("transformers")

SHAPE = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 99}
SHAPE |= {"intermediate_size": 80, "num_hidden_layers": 2, "max_position_embeddings": 64}
OWN = SHAPE | {"head_dim": 12}  # 6 heads of 12 are wider than the residual stream
FOLDERS = {
    "llama": ("Llama", OWN | {"rope_theta": 5e4}),
    "mistral": ("Mistral", SHAPE | {"sliding_window": None}),
    "mistral-own": ("Mistral", OWN | {"sliding_window": 64, "num_key_value_heads": 6}),
    "mistral-window": ("Mistral", SHAPE | {"sliding_window": 24}),
    "qwen2": ("Qwen2", SHAPE | {"rms_norm_eps": 1e-5}),
    "qwen2-ids": ("Qwen2", SHAPE | {"bos_token_id": 7, "eos_token_id": 8, "rope_theta": 1e6}),
    "qwen3": ("Qwen3", OWN),
    "qwen3-equal": ("Qwen3", SHAPE | {"head_dim": 8, "num_key_value_heads": 3}),
}
SHAPES = {
    "tied-gqa": replace(SMALL, model_name="mine", dropout=0.1, attention_dropout=0.2),
    "untied": replace(SMALL, tie_word_embeddings=False, num_key_value_heads=None),
    "rope-linear": replace(SMALL, rope_scaling=LINEAR, rope_theta=5e5),
    "rope-llama3": replace(SMALL, rope_scaling=LLAMA3),
    "head_dim": replace(SMALL, head_dim=24),
    "qk_norm": replace(SMALL, qk_norm=True, dropout=0.1),
    "qk_norm-own": replace(SMALL, qk_norm=True, head_dim=32, tie_word_embeddings=False),
    "qkv_bias": replace(SMALL, qkv_bias=True, num_key_value_heads=None),
    "qkv_bias-own": replace(SMALL, qkv_bias=True, head_dim=8, rope_scaling=LLAMA3),
}
each_folder = pytest.mark.parametrize("name", sorted(FOLDERS.keys() - {"mistral-window"}))
each_shape = pytest.mark.parametrize("cfg", SHAPES.values(), ids=SHAPES)


def shuffled(model):
    """Gives every parameter numbers far from its beginning, norms and biases, too."""
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15) if p.ndim == 2 else torch.nn.init.uniform_(p, 0.5, 1.5)
    return model.eval()


def theirs_of(name, folder, tied=True, dtype="float32"):
    """Returns a random model that transformers makes and saves in `folder`."""
    kind, shape = FOLDERS[name]
    config = getattr(transformers, f"{kind}Config")(**shape, tie_word_embeddings=tied)
    theirs = shuffled(getattr(transformers, f"{kind}ForCausalLM")(config)).to(getattr(torch, dtype))
    theirs.save_pretrained(folder)
    return theirs


def near(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


# ---- folders of transformers, and back


@torch.no_grad()
@each_folder
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_folder_of_transformers_computes_the_same_here_and_saved_back(name, tied, tmp_path):
    theirs, ids = theirs_of(name, tmp_path / "theirs", tied), some_ids(SMALL, 3, 40) % 99
    expected = theirs(ids).logits
    ours = llama.load_model(tmp_path / "theirs")
    near(ours(ids), expected)
    options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}
    request = Request(ids[0, :5].tolist(), 24, Sampling(temperature=0))
    list(generate(fuse(llama.load_model(tmp_path / "theirs")), [request]))
    assert request.ids == theirs.generate(ids[:1, :5], **options)[0, 5:].tolist()
    (tmp_path / "ours").mkdir()
    llama.save_model(ours, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again).__name__ == FOLDERS[name][0].replace("Mistral", "Llama") + "ForCausalLM"
    near(again(ids).logits, expected)
    kept = ("bos_token_id", "eos_token_id", "head_dim", "rms_norm_eps", "max_position_embeddings")
    for key in kept:
        assert getattr(again.config, key, None) == getattr(theirs.config, key, ours.cfg.head_width)


@torch.no_grad()
@each_shape
def test_our_shapes_give_the_same_logits_in_transformers(cfg, tmp_path):
    ours, ids = shuffled(llama.Llama(cfg)), some_ids(cfg, 3, 32)
    llama.save_model(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    near(ours(ids), theirs(ids).logits)
    again = llama.load_model(tmp_path)
    assert torch.equal(again(ids), ours(ids))
    assert llama.to_hf(again.cfg) == llama.to_hf(cfg)


@pytest.mark.parametrize("kind", llama.HF_DEFAULTS)
def test_absent_keys_mean_what_transformers_assumes(kind):
    given = {"hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 64}
    given |= {"num_hidden_layers": 2, "vocab_size": 99}
    ours = llama.from_hf(given | {"model_type": kind})
    theirs = transformers.AutoConfig.for_model(kind, **given).to_dict()
    window = theirs.get("sliding_window") or theirs["max_position_embeddings"]
    same = {"rms_norm_eps": ours.layer_norm_epsilon, "num_key_value_heads": ours.kv_heads}
    same |= {name: getattr(ours, name) for name in ("tie_word_embeddings", "bos_token_id")}
    same |= {"eos_token_id": ours.eos_token_id, "sliding_window": theirs.get("sliding_window")}
    assert same == {name: theirs.get(name) for name in same}
    assert ours.head_width == theirs.get("head_dim", 128)
    assert ours.rope_theta == theirs["rope_parameters"]["rope_theta"]
    assert ours.sequence_length == min(window, theirs["max_position_embeddings"])


@torch.no_grad()
def test_a_window_shorter_than_the_context_shortens_the_context_and_is_told(tmp_path, capsys):
    theirs = theirs_of("mistral-window", tmp_path)
    ours, ids = llama.load_model(tmp_path), some_ids(SMALL, 2, 40) % 99
    assert "the context is its sliding window, 24, not 64" in capsys.readouterr().err
    assert ours.cfg.sequence_length == 24
    near(ours(ids[:, :24]), theirs(ids[:, :24]).logits)
    longer = llama.Llama(replace(ours.cfg, sequence_length=64)).eval()
    longer.load_state_dict(ours.state_dict())
    beyond = (longer(ids) - theirs(ids).logits).abs().amax(dim=(0, 2)) > 1e-3
    assert beyond.nonzero()[0] == 24  # the first position that does not see them all


def test_what_other_programs_would_misread_is_refused():
    with pytest.raises(ValueError, match="qk_norm, qkv_bias: no model that other programs open"):
        replace(SMALL, qk_norm=True, qkv_bias=True)
    with pytest.raises(ValueError, match=r"qkv_bias is for models of others: .*; use qk_norm"):
        PretrainConfig(qkv_bias=True)


# ---- counts


@each_shape
def test_counts_equal_the_built_model(cfg):
    model = llama.Llama(cfg)
    counts = llama.count_parameters(cfg)
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["layers"] == sum(p.numel() for p in model.model.layers.parameters())
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    matrices += model.lm_head.weight.numel()
    attention = 2 * cfg.n_layer * cfg.n_head * cfg.head_width * cfg.sequence_length
    assert llama.flops_per_token(cfg) == 6 * (matrices + attention)


@each_shape
def test_weights_begin_where_they_should_and_only_matrices_decay(cfg):
    model = llama.Llama(cfg)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert set(p.tolist()) == {0.0 if name.endswith("bias") else 1.0}, name
    for optimizer in ("adamw", "muon"):
        run = PretrainConfig(optimizer=optimizer)
        for each in make_optimizers(run, model):
            for group in each.param_groups:
                flat = [p for p in group["params"] if p.ndim == 1]
                assert not flat or (group["weight_decay"] == 0 and type(each) is torch.optim.AdamW)


# ---- decoding


@torch.no_grad()
@each_shape
def test_a_cache_and_fused_weights_compute_the_same(cfg):
    model, ids = shuffled(llama.Llama(cfg)), some_ids(cfg, 2, 24)
    expected = model(ids)
    for each in (model, fuse(copy.deepcopy(model))):
        cache = llama.KVCache(cfg, 2, 32)
        pieces = [each(part, cache=cache) for part in ids.split([9, 1, 5, 1, 8], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-4, rtol=1e-4)
    documents = torch.arange(24)[None] // torch.tensor([[11], [24]])
    fused = fuse(copy.deepcopy(model))(ids, documents=documents)
    torch.testing.assert_close(fused, model(ids, documents=documents), atol=1e-4, rtol=1e-4)
    rough = fuse(copy.deepcopy(model), int8=True)(ids)
    assert 0 < (rough - expected).norm() < 0.1 * expected.norm()
    half = fuse(copy.deepcopy(model).bfloat16())(ids).float()
    assert 0 < (half - expected).norm() < 0.1 * expected.norm()


# ---- LoRA


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_an_adapter_computes_learns_and_merges_as_in_peft(name, tmp_path):
    peft = pytest.importorskip("peft")
    base, folder, ids = tmp_path / "base", tmp_path / "adapter", some_ids(SMALL, 2, 20) % 99
    theirs = theirs_of(name, base)
    ours = adapted(llama.load_model(base))
    folder.mkdir()
    llama.save_adapter(ours, folder, llama.identify(base))
    theirs = peft.PeftModel.from_pretrained(theirs, folder, is_trainable=True)
    near(ours(ids), theirs(ids).logits)
    with llama.lora_off(ours), theirs.disable_adapter():
        near(ours(ids), theirs(ids).logits)
    labels = ids.roll(-1)
    llama.next_token_loss(ours, {"ids": ids, "labels": labels})[0].backward()
    logits = theirs(ids).logits.flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum").backward()
    named = dict(theirs.named_parameters())
    learned = [(n, p) for n, p in ours.named_parameters() if p.requires_grad]
    assert len(learned) == 2 * 2 * 7
    for n, p in learned:
        other = named[llama.PEFT_PREFIX + n.replace(".weight", ".default.weight")]
        torch.testing.assert_close(p.grad, other.grad, atol=1e-3, rtol=1e-4)
    with torch.no_grad():
        merged = theirs.merge_and_unload()(ids).logits
        at_once = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        near(at_once(ids).logits, merged)
        near(llama.load_model(folder)(ids), merged)  # merges as it opens
        near(llama.merge_lora(ours)(ids), merged)


# ---- memory


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_and_its_file_are_apart(dtype, tmp_path):
    """Neither is written into the other, whether the dtype is that of the file or not."""
    theirs_of("qwen3", tmp_path)
    file, ids = tmp_path / "model.safetensors", some_ids(SMALL, 1, 9) % 99
    before = file.read_bytes()
    owned, fused = (
        llama.load_model(tmp_path, dtype=dtype),
        fuse(llama.load_model(tmp_path, mapped=True)),
    )
    trained = llama.load_model(tmp_path, dtype=dtype, mapped=True)
    expected = [owned(ids), fused(ids)]
    for p in trained.parameters():
        p.mul_(2)
    assert file.read_bytes() == before
    file.write_bytes(bytes(len(before)))
    assert torch.equal(owned(ids), expected[0])
    assert torch.equal(fused(ids), expected[1])
    assert {p.dtype for p in owned.parameters()} == {dtype}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_cache_takes_memory_where_it_is_used():
    def resident():
        text = Path("/proc/self/status").read_text()
        return sum(int(n) for n in re.findall(r"(?:RssAnon|RssShmem):\s+(\d+) kB", text)) * 1024

    cfg, before = replace(SMALL, num_key_value_heads=None, sequence_length=1 << 20), resident()
    cache = llama.KVCache(cfg, 1, 1 << 20)
    size = 2 * sum(tensor.nbytes for tensor in cache.k)
    assert not any(tensor[:, :, ::4096].any() for tensor in cache.k + cache.v)
    assert resident() - before < size / 8


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_a_cpu_with_16_bit_units_runs_what_is_stored_in_16_bits(stored, tmp_path, monkeypatch):
    theirs_of("llama", tmp_path, dtype=stored)
    monkeypatch.setattr(sample, "Tokenizer", Mock())
    monkeypatch.setattr(sample, "stop_ids", lambda *args: set())
    sample.Tokenizer.load().token_bytes.return_value = torch.ones(99).numpy()
    sample.Tokenizer.load().prompt_ids.return_value = list(range(20))
    units = lambda wanted, device: (torch.bfloat16 if wanted == "auto" else torch.float32, "")
    monkeypatch.setattr(sample, "choose_dtype", units)
    for dtype, expected in (("auto", stored), ("fp32", "float32"), ("int8", "float32")):
        model, _ = sample.open_model(tmp_path, "cpu", dtype)
        assert model.model.norm.weight.dtype == getattr(torch, expected)


def test_opening_a_folder_loads_no_compiler(tmp_path):
    theirs_of("llama", tmp_path)
    code = f"import sys, sample; sample.load_model({str(tmp_path)!r}); "
    code += "print('sympy' in sys.modules, 'torch._dynamo' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
