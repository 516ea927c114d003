"""model.py against oracles: torch's cross-entropy, softmax, hand counts; see test_shapes.py."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import model as llama
from lib.config import UserError, configure
from tests import ROOT
from tests.warm import python

SMALL = llama.ModelConfig(
    "small", 2, 64, 4, num_key_value_heads=2, d_ff=96, vocab_size=199, sequence_length=32
)
LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}


def build(cfg, seed=0):
    """A model far from the calm of initialization, so that mistakes show."""
    torch.manual_seed(seed)
    model = llama.Llama(cfg).eval()
    for name, p in model.named_parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.15)
        elif "norm" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


def preset(name):
    path = str(ROOT / f"configs/{name}.json")
    return configure(llama.ModelConfig, [path], foreign_keys=True)


def some_ids(cfg, *shape, seed=1):
    return torch.randint(cfg.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# ---- the published counts


COUNTS = {  # without embeddings, and in all
    "tiny": (6_294_784, 14_683_392),
    "small": (50_344_448, 67_121_664),
    "base": (226_530_048, 251_695_872),
    "advanced_example": (98_325_120, 140_268_160),
}


@pytest.mark.parametrize("name", COUNTS)
def test_preset_counts_are_the_published_ones(name):
    counts = llama.count_parameters(preset(name))
    assert (counts["non_embedding"], counts["total"]) == COUNTS[name]


def test_every_key_of_the_advanced_preset_reaches_the_model():
    model = llama.Llama(replace(preset("advanced_example"), n_layer=1, d_ff=64, vocab_size=512))
    block = model.model.layers[0]
    assert block.self_attn.k_proj.weight.shape == (5 * 64, 640)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert (block.dropout.p, block.self_attn.dropout.p, model.model.dropout.p) == (0.1, 0.0, 0.1)
    assert block.input_layernorm.epsilon == 1e-5
    assert len(model.model.cos) == 1536


# ---- attention, positions, masks


def explicit_attention(q, k, v, mask):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q.double() @ k.double().transpose(-1, -2)) / q.shape[-1] ** 0.5
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v.double()).float()


@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_every_backend_is_softmax_attention(backend, heads):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 9, 8, generator=g) for h in (heads[0], heads[1], heads[1]))
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    other = (torch.rand(2, 1, 9, 9, generator=g) < 0.5) | torch.eye(9, dtype=torch.bool)
    for mask, looks in ((None, causal), (other, other)):
        y = llama.attend(q, k, v, mask, backend=backend)
        assert torch.allclose(y, explicit_attention(q, k, v, looks), atol=1e-5)


def test_documents_in_one_row_do_not_see_each_other():
    model, ids = build(SMALL), some_ids(SMALL, 1, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7])
    positions = torch.tensor([[*range(5), *range(7)]])
    with torch.no_grad():
        together = model(ids, positions, documents)
        assert torch.allclose(together[:, :5], model(ids[:, :5]), atol=1e-5)
        assert torch.allclose(together[:, 5:], model(ids[:, 5:]), atol=1e-5)


@pytest.mark.parametrize("where", ["dropout", "attention_dropout", "hidden_dropout"])
@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_each_dropout_acts_in_training_and_only_there(where, backend):
    none = {"dropout": 0.0, "attention_dropout": 0.0, "hidden_dropout": 0.0}
    model, ids = build(replace(SMALL, **none | {where: 0.5})), some_ids(SMALL, 2, 16)
    model.use_attention(backend)
    with torch.no_grad():
        quiet = model.eval()(ids)
        assert torch.equal(quiet, model(ids))
        assert not torch.allclose(quiet, model.train()(ids), atol=1e-3)


def test_gradient_checkpointing_changes_no_gradient():
    ids, labels = some_ids(SMALL, 2, 16), some_ids(SMALL, 2, 16, seed=2)
    gradients = []
    for wanted in (False, True):
        model = build(replace(SMALL, dropout=0.1)).train()
        model.model.gradient_checkpointing = wanted
        torch.manual_seed(5)  # the same dropout, which the recomputation must draw again
        llama.next_token_loss(model, {"ids": ids, "labels": labels})[0].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# ---- losses


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_equal_torch_cross_entropy(rows, tied, monkeypatch):
    monkeypatch.setitem(llama.LOGITS, "cpu", rows * SMALL.vocab_size)
    monkeypatch.setitem(llama.CACHED, "cpu", 3 * SMALL.vocab_size)
    cfg = replace(SMALL, tie_word_embeddings=tied)
    ids, labels = some_ids(cfg, 3, 11), some_ids(cfg, 3, 11, seed=2)
    labels[0, :4] = labels[1] = labels[2, 10] = -100
    batch, model = {"ids": ids, "labels": labels}, build(cfg)
    logits = model(ids).flatten(0, 1)
    expected = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
    expected.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss, _ = llama.next_token_loss(model, batch)
    (loss / 7).backward()
    assert torch.allclose(loss, expected, rtol=1e-6)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad * 7, want[name], atol=2e-4, rtol=1e-4), name
    with torch.no_grad():
        assert torch.allclose(llama.next_token_loss(model, batch)[0], expected, rtol=1e-6)


def test_bf16_autocast_stays_near_fp32():
    model, ids, labels = build(SMALL), some_ids(SMALL, 2, 16), some_ids(SMALL, 2, 16, seed=3)
    exact = llama.next_token_loss(model, {"ids": ids, "labels": labels})[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = llama.next_token_loss(model, {"ids": ids, "labels": labels})[0]
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.03)


# ---- refusals


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"d_model": 250}, "d_model 250 is not divisible by n_head 4"),
        ({"num_key_value_heads": 3}, "n_head 4 is not divisible by num_key_value_heads 3"),
        ({"d_model": 12}, "head_dim, or d_model / n_head, is 3, which is odd"),
        ({"eos_token_id": 199}, "eos_token_id 199 is outside the vocabulary of 199"),
        ({"rope_scaling": {"rope_type": "yarn"}}, 'rope_scaling {"rope_type": "yarn"}: expected {'),
        ({"rope_scaling": {"rope_type": "linear"}}, '"factor": 2.0}, or llama3 with factor'),
        ({"rope_scaling": LINEAR | {"factor": float("inf")}}, "all > 0"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low < high"),
    ],
)
def test_impossible_shapes_are_refused_by_name(change, words):
    with pytest.raises(ValueError) as refusal:
        replace(SMALL, **change)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"model_type": "gemma2"}, 'llama|mistral|qwen2|qwen3, got "gemma2"'),
        ({"model_type": ["llama"]}, 'llama|mistral|qwen2|qwen3, got ["llama"]'),
        ({"use_sliding_window": True}, "use_sliding_window is true; expected false"),
        ({"attention_bias": True}, "attention_bias is true; expected false"),
        ({"mlp_bias": True}, "mlp_bias is true; expected false"),
        ({"quantization_config": {"bits": 4}}, 'quantization_config is {"bits": 4}'),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be int 1.."),
        ({"head_dim": 15}, "head_dim, or d_model / n_head, is 15, which is odd"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, '"yarn"'),
        ({"hidden_size": None}, "hidden_size must be int 2..65536, got null (config.json)"),
        ({"num_hidden_layers": 100_000}, "num_hidden_layers must be int 1..512, got 100000"),
        ({"rope_parameters": 5}, "rope_parameters must be dict or none, got 5"),
        ({"eos_token_id": ["2"]}, 'eos_token_id must be int >= 0 or none, got "2"'),
    ],
)
def test_foreign_configurations_are_refused_by_name(change, words):
    hf = llama.to_hf(SMALL) | change
    hf = {k: v for k, v in hf.items() if v is not None}
    with pytest.raises(UserError) as refusal:
        llama.from_hf(hf)
    assert words in str(refusal.value)
    assert "config.json" in str(refusal.value)


@pytest.fixture
def saved(tmp_path):
    llama.save_model(build(SMALL), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), 'Missing key(s) in state_dict: "model.norm.weight"'),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), "model.norm.weight holds NaN"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64).int()}), "(torch.int32)"),
        (lambda t: t.update({f"tensor{i}": torch.ones(1) for i in range(999)}), "Unexpected key"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(change, words, saved):
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, saved / "model.safetensors")
    with pytest.raises(UserError) as refusal:
        llama.load_model(saved)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 999


def test_garbage_in_a_file_is_one_line(saved):
    garbage = [("model.safetensors", content) for content in (b"", b"hello")]
    garbage += [("config.json", content) for content in (b"[1]", b"\xff", b"[" * 100_000)]
    for name, content in garbage:
        (saved / name).write_bytes(content)
        with pytest.raises(UserError, match=name) as refusal:
            llama.load_model(saved)
        assert "\n" not in str(refusal.value)


def test_16_bits_on_a_cpu_take_torchs_kernel_where_compiled_matmuls_have_no_gradient(monkeypatch):
    def broken(q, k, v, backend):
        return q * torch.nan

    row = torch.device("cpu"), 512, torch.bfloat16
    for compiler, chosen in ((lambda f: f, "math"), (lambda f: broken, "sdpa")):
        monkeypatch.setattr(torch, "compile", compiler)
        assert llama.choose_attention(*row)[0] == "math"
        assert llama.choose_attention(*row, compiled=True)[0] == chosen


def test_attention_has_torchs_gradients_in_every_type_and_backend_also_compiled():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 40, 16, dtype=torch.float64) for heads in (4, 2, 2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    oracle = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    exact = torch.autograd.grad(oracle.square().sum(), leaves)
    dtypes = torch.float32, torch.bfloat16, torch.float16
    kinds = [(dtype, backend) for dtype in dtypes for backend in ("math", "sdpa")]

    def losses(*qkv):  # all kinds in one graph, which is compiled once
        return [
            llama.attend(*(x.to(dtype) for x in qkv), backend=backend).double().square().sum()
            for dtype, backend in kinds
        ]

    for function in (losses, torch.compile(losses)):
        for (dtype, _), loss in zip(kinds, function(*leaves), strict=True):
            gradients = torch.autograd.grad(loss, leaves, retain_graph=True)
            tolerance = 64 * torch.finfo(dtype).eps
            torch.testing.assert_close(gradients, exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_kernel_is_cross_entropy_and_its_gradient(dtype):
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels, oracle = torch.tensor([3, -100, 49, 0, 7, -100, 7, 1, 2]), logits.double()
    losses = F.cross_entropy(oracle.requires_grad_(), labels, reduction="none")
    losses.sum().backward()
    torch.testing.assert_close(llama.nats_and_gradient(logits, labels), losses.float())
    torch.testing.assert_close(logits, oracle.grad.to(dtype))


def test_flash_attention_that_does_not_load_is_passed_over_with_its_reason(tmp_path, monkeypatch):
    code = "raise ImportError('undefined symbol: of another torch')"
    (tmp_path / "flash_attn.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    backend, reason = llama.choose_attention(torch.device("cuda"), 1024, torch.bfloat16)
    assert (backend, "undefined symbol: of another torch" in reason) == ("sdpa", True)


def test_a_folder_without_a_model_is_refused(tmp_path):
    for path, words in ((tmp_path, "not a model folder"), (tmp_path / "none", "no such folder")):
        with pytest.raises(UserError, match=f"{path}: {words}.*; give a training's output_dir"):
            llama.load_model(path)


def test_rotary_tables_stay_exact_in_bf16(saved):
    model = llama.load_model(saved, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.cos.dtype == torch.float32


# ---- the command


def report(*args):
    command = [python(), "model.py", "configs/tiny.json", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_report_prints_exact_counts_and_warnings():
    text = report("--d_ff=100").stdout
    assert "warning: d_ff 100 is no multiple of 64" in text
    text, cfg = report().stdout, preset("tiny")
    # blocks 6*16*L*d^2, head 6*V*d, attention 12*L*d*T
    flops = 37_748_736 + 50_331_648 + 18_874_368
    assert all(f"{number:,}" in text for number in (*COUNTS["tiny"], flops))
    cache = llama.KVCache(cfg, 1, cfg.sequence_length)
    size = 2 * sum(tensor.numel() for tensor in cache.k + cache.v)
    assert re.search(rf"KV cache of one full row \(16 bit\) +{size / 1e6:.1f} MB", text)
    assert "warning" not in text


def test_every_model_preset_reports(capsys):
    for path in (ROOT / "configs").glob("*.json"):
        if "n_layer" in json.loads(path.read_text()):
            llama.main(preset(path.stem))
            assert "training FLOPs" in capsys.readouterr().out, path


def test_impossible_preset_exits_2_with_one_line():
    result = report("--n_head=3")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.strip() == "error: d_model 256 is not divisible by n_head 3"
