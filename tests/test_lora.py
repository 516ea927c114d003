"""LoRA in model.py: surgery, merging and folders, against peft where that is installed."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

import model as llama
from lib.config import UserError

TINY = llama.ModelConfig(
    "tiny", 2, 32, 4, num_key_value_heads=2, d_ff=48, vocab_size=96, sequence_length=32
)
IDS = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(5))
BATCH = {"ids": IDS[:, :-1], "labels": IDS[:, 1:]}


def build(tied=True, seed=0):
    torch.manual_seed(seed)
    return llama.Llama(replace(TINY, tie_word_embeddings=tied)).eval()


def adapted(model=None, r=4, targets=llama.PROJECTIONS, dropout=0.0, seed=1):
    """A model with a LoRA whose B is not zero, as after training."""
    model = build() if model is None else model
    torch.manual_seed(seed)
    llama.add_lora(model, r, 8, dropout, targets)
    for layer in llama.adapters(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.3)
    return model


@pytest.fixture
def base(tmp_path):
    """The folder of a base model."""
    folder = tmp_path / "base"
    folder.mkdir()
    llama.save_model(build(), folder)
    return folder


@pytest.fixture
def adapter(base, tmp_path):
    """The folder of an adapter for it."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    llama.save_adapter(adapted(llama.load_model(base)), folder, llama.identify(base))
    return folder


# ---- surgery


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_begins_as_its_base_and_keeps_its_names(tied):
    model = build(tied)
    before, names = model(IDS), set(model.state_dict())
    llama.add_lora(model, 4, 8, 0.5)
    assert torch.equal(model.eval()(IDS), before)
    layer = llama.adapters(model)["model.layers.0.self_attn.k_proj"]
    assert {p.shape for p in layer.parameters()} == {(16, 32), (4, 32), (16, 4)}
    assert names < set(model.state_dict())
    assert len(model.state_dict()) - len(names) == 2 * 7 * 2


def test_only_the_adapter_learns():
    model = adapted().train()
    llama.next_token_loss(model, BATCH)[0].backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learned == {name for name in model.state_dict() if ".lora_" in name}


def test_compiled_it_computes_the_same():
    model, compiled = adapted(), adapted()
    compiled.model.compile(backend="eager", fullgraph=True)  # traced as by any backend, without C++
    torch.testing.assert_close(compiled(IDS), model(IDS), atol=1e-5, rtol=0)
    with llama.lora_off(model), llama.lora_off(compiled):
        torch.testing.assert_close(compiled(IDS), model(IDS), atol=1e-5, rtol=0)


def test_off_is_the_base_and_on_again_after_an_error():
    model, base = adapted(), build()
    with llama.lora_off(model):
        assert torch.equal(model(IDS), base(IDS))
    with pytest.raises(ZeroDivisionError), llama.lora_off(model):
        1 / 0  # noqa: B018
    assert not torch.equal(model(IDS), base(IDS))


# ---- merging


@pytest.mark.parametrize("targets", [llama.PROJECTIONS, ("v_proj", "up_proj")])
def test_merging_keeps_the_logits_and_leaves_a_plain_model(targets):
    model = adapted(targets=targets, dropout=0.3).train()
    before = model.eval()(IDS)
    after = llama.merge_lora(model)(IDS)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    assert list(model.state_dict()) == list(build().state_dict())
    assert all(p.requires_grad for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_merge_that_changes_what_the_model_computes_is_an_error():
    words = "merging the adapter changed the hidden states by"
    with pytest.raises(RuntimeError, match=words):
        llama.merge_lora(adapted().bfloat16())  # 16 bits round more than a merge may change
    model = adapted()
    with llama.lora_off(model), pytest.raises(RuntimeError, match=words):
        llama.merge_lora(model)


# ---- folders


def test_a_folder_brings_the_adapter_back(base, adapter):
    expected = adapted(llama.load_model(base))(IDS)
    model = llama.load_adapter(adapter)
    assert torch.equal(model(IDS), expected)
    torch.nn.init.ones_(llama.adapters(model)["model.layers.0.mlp.up_proj"].lora_A.weight)
    llama.load_weights(model, adapter)  # as a resumed training does
    assert torch.equal(model(IDS), expected)
    opened = llama.load_model(adapter)
    assert not llama.adapters(opened)
    torch.testing.assert_close(opened(IDS), expected, atol=1e-5, rtol=0)


def test_both_folders_may_move_together_and_a_base_into_a_training(base, adapter, tmp_path):
    expected = llama.load_model(adapter)(IDS)
    shutil.move(base, tmp_path / "elsewhere" / "base" / "final")
    with pytest.raises(UserError, match=rf"its base model {base} is not there"):
        llama.load_model(adapter)
    shutil.move(adapter, tmp_path / "elsewhere" / "adapter")
    assert torch.equal(llama.load_model(tmp_path / "elsewhere" / "adapter")(IDS), expected)


def test_an_adapter_of_another_base_is_refused(base, adapter):
    llama.save_model(build(seed=9), base)
    with pytest.raises(UserError, match=f"this adapter was trained on another base than {base}"):
        llama.load_model(adapter)


def test_an_adapter_may_stand_on_an_adapter(adapter, tmp_path):
    second = tmp_path / "second"
    second.mkdir()
    model = adapted(llama.load_model(adapter), r=2, targets=("q_proj",), seed=4)
    expected = model(IDS)
    llama.save_adapter(model, second, llama.identify(adapter))
    torch.testing.assert_close(llama.load_model(second)(IDS), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, 'peft_type is "IA3"; only plain LoRA loads'),
        ({"r": 0}, "r must be int >= 1, got 0"),
        ({"lora_alpha": None}, "lora_alpha must be float > 0, got null"),
        ({"target_modules": "q.*"}, "target_modules must be a list of q_proj|k_proj"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights is "pissa"; only'),
        ({"modules_to_save": ["lm_head"]}, 'modules_to_save is ["lm_head"]; only'),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens is [5]; only"),
        ({"alpha_pattern": {"q_proj": 8}}, 'alpha_pattern is {"q_proj": 8}; only'),
        ({"target_modules": ["c_attn"]}, "target_modules[0] must be q_proj|k_proj"),
        ({"r": 2}, "the shape in current model is torch.Size([2, 32])"),
        ({"base_model_name_or_path": "gone"}, "its base model gone is not there; put it back, or"),
        ({"base_model_name_or_path": "."}, "its base model . is not there"),  # its own folder
    ],
)
def test_what_is_no_plain_lora_on_a_base_is_refused(adapter, changes, words, monkeypatch):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if "base_model_name_or_path" in changes:
        (adapter / "base.json").unlink()  # as in a folder of PEFT
    monkeypatch.chdir(adapter)
    with pytest.raises(UserError) as refusal:
        llama.load_model(adapter)
    assert words in str(refusal.value)


# ---- peft


def saved_by_peft(base, folder, **options):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    hf = transformers.LlamaForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(hf, peft.LoraConfig(r=3, lora_alpha=5, **options)).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [["k_proj", "gate_proj"], "all-linear"])
def test_we_open_a_folder_of_peft(base, tmp_path, targets):
    model = saved_by_peft(base, tmp_path / "a", target_modules=targets, init_lora_weights=False)
    opened = llama.load_model(tmp_path / "a")
    torch.testing.assert_close(opened(IDS), model(IDS).logits, atol=2e-6, rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("variant", "word"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"rank_pattern": {"q_proj": 2}}, "size mismatch"),
        ({"layers_to_transform": [1]}, "Missing key"),
        ({"lora_bias": True}, "lora_B.bias"),
    ],
)
def test_the_tensors_of_a_variant_of_lora_do_not_fit(base, tmp_path, variant, word):
    saved_by_peft(base, tmp_path / "a", target_modules=["q_proj", "k_proj"], **variant)
    with pytest.raises(UserError, match=f"does not fit the model: .*{word}"):
        llama.load_model(tmp_path / "a")
