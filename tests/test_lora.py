"""lora.py: surgery, merging and folders, against peft where that is installed."""

import json
import re
import shutil

import pytest
import torch

import model as lora
from lib.config import UserError
from model import (
    TARGETS,
    Llama,
    LoRALinear,
    ModelConfig,
    adapters,
    add_lora,
    identify,
    load_adapter,
    load_model,
    lora_off,
    merge_lora,
    model_folder,
    next_token_loss,
    save_adapter,
    save_model,
)

SHAPE = {
    "n_layer": 2,
    "d_model": 32,
    "n_head": 4,
    "num_key_value_heads": 2,
    "d_ff": 48,
    "vocab_size": 96,
}
TINY = ModelConfig(**SHAPE, sequence_length=32)


def build(tied=True, seed=0):
    torch.manual_seed(seed)
    return Llama(ModelConfig(**SHAPE, sequence_length=32, tie_word_embeddings=tied)).eval()


def adapted(model=None, r=4, targets=TARGETS, dropout=0.0, seed=1):
    """A model with a LoRA whose B is not zero, as after training."""
    model = build() if model is None else model
    torch.manual_seed(seed)
    add_lora(model, r, 8, dropout, targets)
    for module in adapters(model).values():
        torch.nn.init.normal_(module.lora_B.weight, std=0.3)
    return model


def ids(rows=2, length=12):
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def base(tmp_path):
    """The folder of a base model."""
    folder = tmp_path / "base"
    folder.mkdir()
    save_model(build(), folder)
    return folder


@pytest.fixture
def adapter(base, tmp_path):
    """The folder of an adapter for it."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(adapted(load_model(base)), folder, identify(base))
    return folder


# ---- surgery


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_begins_as_its_base(tied):
    model = build(tied)
    before = model(ids())
    add_lora(model, 4, 8, 0.5)
    assert torch.equal(model.eval()(ids()), before)
    assert {p.shape for p in adapters(model)["model.layers.0.self_attn.k_proj"].parameters()} == {
        (16, 32), (4, 32), (16, 4),
    }  # fmt: skip


def test_names_of_the_base_stay_and_the_rest_is_named_as_peft_does():
    names = set(build().state_dict())
    more = set(add_lora(build(), 4, 8).state_dict()) - names
    assert names < set(add_lora(build(), 4, 8).state_dict())
    assert len(more) == 2 * 7 * 2
    assert "model.layers.1.mlp.down_proj.lora_A.weight" in more


def test_a_is_drawn_as_kaiming_uniform_does_and_b_is_zero():
    layer = LoRALinear(torch.nn.Linear(64, 64, bias=False), 32, 8, 0.0)
    bound = 1 / 64**0.5  # gain sqrt(2 / (1 + 5)) * sqrt(3 / fan_in)
    assert layer.lora_A.weight.abs().max() <= bound
    assert layer.lora_A.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert not layer.lora_B.weight.any()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_adapter_learns(checkpointing):
    model = adapted().train()
    model.model.gradient_checkpointing = checkpointing
    frozen = {name: p.clone() for name, p in model.named_parameters() if ".lora_" not in name}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    next_token_loss(model, {"ids": ids()[:, :-1], "labels": ids()[:, 1:]})[0].backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learned == {name for name in model.state_dict() if ".lora_" in name}
    optimizer.step()
    assert all(
        torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen
    )


def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for checkpointing in (False, True):
        model = adapted().train()
        model.model.gradient_checkpointing = checkpointing
        next_token_loss(model, {"ids": ids()[:, :-1], "labels": ids()[:, 1:]})[0].backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_compiled_it_computes_the_same():
    model = adapted()
    expected = model(ids())
    with lora_off(model):
        plain = model(ids())
    model.model.compile(
        backend="eager", fullgraph=True
    )  # what it makes of the modules, without C++
    torch.testing.assert_close(model(ids()), expected, atol=1e-5, rtol=0)
    with lora_off(model):
        torch.testing.assert_close(model(ids()), plain, atol=1e-5, rtol=0)


def test_off_is_the_base_and_on_again_after_an_error():
    model, base = adapted(), build()
    with lora_off(model):
        assert torch.equal(model(ids()), base(ids()))
    with pytest.raises(ZeroDivisionError), lora_off(model):
        1 / 0  # noqa: B018
    assert not torch.equal(model(ids()), base(ids()))


@pytest.mark.parametrize(
    ("targets", "words"),
    [(["q_porj"], "did you mean 'q_proj'"), (["wq"], "choose from q_proj"), ([], "at least one"),
     (["q_proj", "q_proj"], "only once"), (["lm_head"], "unknown module 'lm_head'")],
)  # fmt: skip
def test_unknown_targets_are_refused(targets, words):
    with pytest.raises(UserError, match=words):
        add_lora(build(), 4, 8, 0.0, targets)


def test_two_adapters_are_refused():
    with pytest.raises(UserError, match="already"):
        add_lora(adapted(), 4, 8)


# ---- merging


@pytest.mark.parametrize("targets", [TARGETS, ("v_proj", "up_proj")])
def test_merging_keeps_the_logits_and_leaves_a_plain_model(targets):
    model = adapted(targets=targets, dropout=0.3).train()
    names = list(build().state_dict())
    before = model.eval()(ids())
    difference = merge_lora(model.train())
    assert 0 < difference < 1e-5
    torch.testing.assert_close(model.eval()(ids()), before, atol=1e-5, rtol=0)
    assert list(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_second_merge_is_refused():
    model = adapted()
    merge_lora(model)
    with pytest.raises(UserError, match="merged already"):
        merge_lora(model)


def test_a_merge_that_went_wrong_does_not_pass(monkeypatch):
    monkeypatch.setattr(
        LoRALinear, "merged", lambda self: torch.nn.Linear(*self.weight.T.shape, bias=False)
    )
    with pytest.raises(AssertionError, match="changed the logits"):
        merge_lora(adapted())


# ---- folders


def test_a_folder_brings_the_adapter_back(base, adapter):
    expected = adapted(load_model(base))(ids())
    model = load_adapter(load_model(base), adapter, identify(base))
    assert torch.equal(model(ids()), expected)
    assert torch.equal(load_adapter(model, adapter)(ids()), expected)  # once more into the same
    opened = lora.open_model_folder(adapter)
    assert not adapters(opened)
    torch.testing.assert_close(opened(ids()), expected, atol=1e-5, rtol=0)


def test_the_folder_says_what_it_is(base, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert set(config) == {
        "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "bias",
        "fan_in_fan_out", "inference_mode", "target_modules", "use_rslora", "use_dora",
    }  # fmt: skip
    assert config["base_model_name_or_path"] == str(base)
    home = json.loads((adapter / "base.json").read_text())
    assert home == {"relative_path": "../base", "sha256": identify(base).sha256}


def test_both_folders_may_move_together(base, adapter, tmp_path):
    expected = lora.open_model_folder(adapter)(ids())
    (tmp_path / "elsewhere").mkdir()
    shutil.move(base, tmp_path / "elsewhere" / "base")
    with pytest.raises(UserError, match=rf"its base model {base} is not there"):
        lora.open_model_folder(adapter)
    shutil.move(adapter, tmp_path / "elsewhere" / "adapter")
    assert torch.equal(lora.open_model_folder(tmp_path / "elsewhere" / "adapter")(ids()), expected)


def test_an_adapter_of_another_base_is_refused_by_both_hashes(base, adapter):
    theirs = identify(base).sha256
    save_model(build(seed=9), base)
    ours = identify(base).sha256
    base = identify(base)
    for attempt in (
        lambda: lora.open_model_folder(adapter),
        lambda: load_adapter(build(), adapter, base),
    ):
        with pytest.raises(UserError) as error:
            attempt()
        assert theirs[:12] in str(error.value)
        assert ours[:12] in str(error.value)


def test_an_adapter_may_stand_on_an_adapter(adapter, tmp_path):
    second = tmp_path / "second"
    second.mkdir()
    model = adapted(lora.open_model_folder(adapter), r=2, targets=("q_proj",), seed=4)
    expected = model(ids())
    save_adapter(model, second, identify(adapter))
    torch.testing.assert_close(lora.open_model_folder(second)(ids()), expected, atol=1e-5, rtol=0)


def test_the_folder_of_a_training_is_its_final(base, tmp_path):
    shutil.move(base, tmp_path / "run" / "final")
    assert torch.equal(lora.open_model_folder(tmp_path / "run")(ids()), build()(ids()))


def test_opened_in_half_precision(adapter):
    model = lora.open_model_folder(adapter, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.cos.dtype == torch.float32


def spoil(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"peft_type": "IA3"}, "only plain LoRA"), ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias"),
     ({"r": 0}, "r is 0"), ({"r": "4"}, "expected a LoRA's"), ({"target_modules": "q.*"}, "target_modules"),
     ({"target_modules": ["q_proj"]}, "foreign"), ({"r": 2}, "another shape"),
     ({"init_lora_weights": "pissa"}, "init_lora_weights"), ({"alora_invocation_tokens": [5]}, "alora"),
     ({"lora_alpha": None}, "lora_alpha"), ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
     ({"target_modules": ["c_attn"]}, "unknown module")],
)  # fmt: skip
def test_what_is_no_plain_lora_is_refused(adapter, changes, words):
    spoil(adapter, **changes)
    with pytest.raises(UserError, match=words):
        lora.open_model_folder(adapter)


def test_damaged_folders_are_refused_on_one_line(adapter):
    weights = adapter / "adapter_model.safetensors"
    for content, words in ((weights.read_bytes()[:100], "safetensors"), (b"", "safetensors")):
        weights.write_bytes(content)
        with pytest.raises(UserError, match=words):
            lora.open_model_folder(adapter)
    (adapter / "adapter_config.json").write_text("[1]")
    with pytest.raises(UserError, match="must be an object"):
        lora.open_model_folder(adapter)
    with pytest.raises(UserError, match="not a model folder"):
        lora.open_model_folder(adapter.parent)


def test_an_adapter_that_is_its_own_base_is_refused(adapter):
    (adapter / "base.json").unlink()
    spoil(adapter, base_model_name_or_path=str(adapter))
    with pytest.raises(UserError, match="its own folder"):
        lora.open_model_folder(adapter)


# ---- peft


@pytest.mark.filterwarnings("ignore")
def test_peft_opens_our_folder_and_computes_the_same(base, adapter):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    ours = load_adapter(load_model(base), adapter)(ids())
    hf = transformers.LlamaForCausalLM.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(hf, adapter).eval()
    torch.testing.assert_close(theirs(ids()).logits, ours, atol=2e-6, rtol=0)
    merged = theirs.merge_and_unload()(ids()).logits
    torch.testing.assert_close(merged, lora.open_model_folder(adapter)(ids()), atol=2e-6, rtol=0)
    at_once = transformers.AutoModelForCausalLM.from_pretrained(adapter).eval()
    torch.testing.assert_close(at_once(ids()).logits, ours, atol=2e-6, rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [["k_proj", "gate_proj"], "all-linear"])
def test_we_open_a_folder_of_peft(base, tmp_path, targets):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(base), config).eval()
    model.save_pretrained(tmp_path / "theirs")
    opened = lora.open_model_folder(tmp_path / "theirs")
    torch.testing.assert_close(opened(ids()), model(ids()).logits, atol=2e-6, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_peft_learns_the_same_gradients(base, adapter):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    ours = load_adapter(load_model(base), adapter).train()
    loss, _ = next_token_loss(ours, {"ids": ids()[:, :-1], "labels": ids()[:, 1:]})
    loss.backward()
    hf = transformers.LlamaForCausalLM.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(hf, adapter, is_trainable=True)
    logits = theirs(ids()[:, :-1]).logits.flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, ids()[:, 1:].flatten(), reduction="sum").backward()
    named = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if p.requires_grad:
            other = named[lora.PREFIX + name.replace(".weight", ".default.weight")]
            torch.testing.assert_close(p.grad, other.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("place", ["demo", "demo/final"])
def test_a_folder_of_models_names_the_one_in_it(place, tmp_path):
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "config.json").touch()
    with pytest.raises(UserError, match=f"; there is one in {re.escape(str(tmp_path))}/demo$"):
        model_folder(tmp_path)
