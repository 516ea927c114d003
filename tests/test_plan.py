"""The plan against what autograd saves, torch's count of allocations, and what an H100 measured."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lib.config import UserError, configure
from lib.runtime import CARDS
from model import Llama, ModelConfig, next_token_loss
from tests import ROOT
from tools.plan import (
    Kernels,
    block_bytes,
    card_plan,
    card_seconds,
    end_bytes,
    memory,
    tokens_per_step,
)
from train import PretrainConfig, make_optimizers, with_vocab_size

SHAPE = {"d_model": 64, "n_head": 4, "d_ff": 160, "vocab_size": 128, "sequence_length": 32}
ROWS = 3


def saved_bytes(layers, dtype, backend, documents=False, checkpointing=False, **shape):
    """The bytes of every tensor that autograd holds after a forward pass, the model's own left out.
    """
    model = Llama(ModelConfig(n_layer=layers, **SHAPE | shape)).train()
    model.use_attention(backend)
    model.model.gradient_checkpointing = checkpointing
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.zeros(ROWS, 32, dtype=torch.long)
    more = {"documents": torch.zeros(ROWS, 32, dtype=torch.int32)} if documents else {}
    low = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), low:
        model.model(ids, **more)
    return sum(size for size, _ in kept.values())


CASES = [
    ("math", {}),
    ("math", {"num_key_value_heads": 2}),
    ("math", {"dropout": 0.1}),
    ("math", {"documents": True}),
    ("sdpa", {}),
    ("sdpa", {"num_key_value_heads": 2}),
    ("sdpa", {"documents": True}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("backend", "changes"), CASES, ids=str)
def test_the_formula_of_a_block_counts_what_autograd_saves(dtype, backend, changes):
    found = saved_bytes(3, dtype, backend, **changes) - saved_bytes(2, dtype, backend, **changes)
    linear = 2 * 64 * 64 + 2 * 64 * 16 * changes.get("num_key_value_heads", 4) + 3 * 64 * 160
    found -= (
        2 * linear * (dtype == torch.bfloat16)
    )  # autocast's copies of the weights: counted in `memory`
    causal = 32 * 32 * (backend == "math" and "documents" not in changes)  # one mask for all rows
    knobs = {k: v for k, v in changes.items() if k != "documents"}
    cfg = PretrainConfig(**SHAPE, **knobs, document_mask="documents" in changes)
    assert block_bytes(cfg, Kernels("cpu", dtype, backend, False)) * ROWS * 32 == found - causal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpointed_block_keeps_its_input_and_nothing_else(dtype):
    found = saved_bytes(3, dtype, "math", checkpointing=True) - saved_bytes(
        2, dtype, "math", checkpointing=True
    )
    assert found == ROWS * 32 * 64 * (4 if dtype == torch.float32 else 2)


def test_what_lies_around_the_blocks_is_counted_too():
    blocks = saved_bytes(3, torch.float32, "math") - saved_bytes(2, torch.float32, "math")
    ends = saved_bytes(2, torch.float32, "math") - 2 * blocks
    output = 64 * 4  # of the last norm: nobody takes it here; in training the head does
    cfg = PretrainConfig(**SHAPE)
    assert (
        end_bytes(cfg, Kernels("cpu", torch.float32, "math", False)) == ends / (ROWS * 32) + output
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_moments_are_those_that_the_optimizers_hold(optimizer):
    cfg = PretrainConfig(**SHAPE, n_layer=2, optimizer=optimizer, batch_size=2)
    model = Llama(ModelConfig(**SHAPE, n_layer=2))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    held = 0
    for one in make_optimizers(cfg, model, torch.device("cpu")):
        one.step()
        held += sum(4 * t.numel() for s in one.state.values() for t in s.values() if t.ndim)
    parts = memory(cfg, Kernels("cpu", torch.float32, "math", False))
    assert parts[f"{optimizer}'s moments (fp32)"] == held
    assert parts["weights (fp32)"] == sum(4 * p.numel() for p in model.parameters())


def peak_of_a_step(cfg):
    """The most bytes that tensors held during a training step, as torch's profiler saw them come
    and go.
    """
    model = Llama(ModelConfig(**SHAPE, n_layer=cfg.n_layer)).train()
    model.use_attention("math")
    model.model.gradient_checkpointing = cfg.gradient_checkpointing
    ids = torch.zeros(cfg.batch_size, 32, dtype=torch.long)
    fixed = 4 * sum(p.numel() for p in model.parameters())
    with torch.profiler.profile(profile_memory=True) as seen:
        loss, _ = next_token_loss(model, {"ids": ids, "labels": ids})
        loss.backward()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return fixed + peak


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_predicted_peak_is_that_of_the_tensors_of_a_real_step(checkpointing):
    cfg = PretrainConfig(**SHAPE, n_layer=4, batch_size=64, gradient_checkpointing=checkpointing)
    parts = memory(cfg, Kernels("cpu", torch.float32, "math", False))
    predicted = parts["peak"] - parts["adamw's moments (fp32)"]
    assert predicted == pytest.approx(peak_of_a_step(cfg), rel=0.05)


# benchmarks/RESULTS.md, H100, compiled, bf16: rows, tokens per second, peak bytes
H100 = [
    ("tiny", 16, 1_987_641, 1.62e9),
    ("small", 8, 628_084, 3.22e9),
    ("small", 32, 756_028, 9.65e9),
    ("base", 4, 204_947, 9.39e9),
    ("base", 16, 233_846, 28.55e9),
]


@pytest.mark.parametrize(("name", "rows", "speed", "peak"), H100)
def test_what_an_h100_measured_is_predicted(name, rows, speed, peak):
    cfg = with_vocab_size(configure(PretrainConfig, [str(ROOT / f"configs/{name}.json")]))
    cfg = replace(cfg, deterministic=False)
    accumulation = cfg.gradient_accumulation_steps * cfg.batch_size // rows
    cfg = replace(cfg, batch_size=rows, gradient_accumulation_steps=accumulation)
    # larger pieces are faster than predicted, which knows nothing of launches
    assert 0.78 * speed < tokens_per_step(cfg) / card_seconds(cfg, CARDS["h100"]) < 1.02 * speed
    assert (
        0.98 * peak
        < memory(cfg, Kernels("cuda", torch.bfloat16, "sdpa", True))["peak"]
        < 1.18 * peak
    )


def test_a_plan_for_a_card_says_whether_it_fits_and_an_unknown_card_what_is_known():
    base = configure(PretrainConfig, [str(ROOT / "configs/base.json"), "--max_steps=5000"])
    base = with_vocab_size(base)
    assert "fits" in "\n".join(card_plan(base, "rtx3070"))
    verdict = {
        card: next(line for line in card_plan(base, card) if "fits" in line) for card in CARDS
    }
    assert "NO" in verdict["rtx3070"]  # 8 GB, and base needs 11
    assert "yes" in verdict["h100"]
    assert any("655,360,000, passes unknown" in line for line in card_plan(base, "h100"))
    with pytest.raises(UserError, match=r"plan_gpu: 'h101' is not known; use one of .*rtx4090"):
        card_plan(base, "h101")


def test_a_plan_without_data_times_this_machine_and_writes_nothing(tmp_path):
    words = "--n_layer=2 --d_model=32 --n_head=2 --d_ff=64 --vocab_size=128 --max_steps=200"
    words += " --sequence_length=32 --batch_size=4 --data_path=nowhere --plan --device=cpu"
    command = [sys.executable, str(ROOT / "train.py"), *words.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = ["25,600, passes unknown", "optimizer=muon", "4 of 4 rows", "measured", "hours"]
    assert [text for text in expected if text not in done.stdout] == []
    assert list(tmp_path.iterdir()) == []
