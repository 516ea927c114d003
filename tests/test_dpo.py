"""dpo.py: losses against tables and trl, pairs, the reference, whole runs."""

import dataclasses
import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

import dpo
from lib.config import configure
from lib.conversation import render
from lib.tokenizer import Tokenizer
from model import adapters, add_lora, load_model, lora_off
from tests.conftest import write_rows
from tests.runs import as_tensors, make_base, records, refused
from tests.runs import train_to_end as trained

TEXTS = [
    ("why not?", "because 7", "no!"),
    ("who jumps?", "the fox", "a dog"),
    ("over what?", "a lazy dog", "once"),
    ("when?", "once upon a time", "why not"),
    ("is it brown?", "quick brown fox", "there was one"),
    ("time?", "upon a time", "asked"),
    ("lazy?", "over a lazy dog", "jumps"),
    ("one?", "who asked", "the"),
]
ROWS = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in TEXTS]
NAMES = {f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")}
NAMES |= {"logps/chosen", "logps/rejected"}


def user(text):
    return [{"role": "user", "content": text}]


def answer(text):
    return [{"role": "assistant", "content": text}]


MESSAGES = [{"prompt": user(p), "chosen": answer(c), "rejected": answer(r)} for p, c, r in TEXTS]


@pytest.fixture(scope="session")
def base(tmp_path_factory, tiny_tokenizer):
    return make_base(tmp_path_factory.mktemp("dpo") / "base", tiny_tokenizer, "chatml")


@pytest.fixture(scope="session")
def knobs(tmp_path_factory, base):
    """Those of all runs here; every row is trained on."""
    rows = write_rows(tmp_path_factory.mktemp("dpo_rows") / "pairs.jsonl", ROWS)
    return {"program": "dpo", "model_path": base, "dataset_path": rows, "val_path": rows}


def config(**knobs):
    cfg = configure(dpo.DPOConfig, ["--model_path=a", "--dataset_path=b"])
    return dataclasses.replace(cfg, **knobs)


def made(tokenizer, length=64, rows=MESSAGES, template="chatml", say=lambda line: None):
    return dpo.make_pairs(rows, "here", tokenizer, template, length, say)


def batch_of(pairs):
    return as_tensors(dpo.pair_rows(pairs, 64, 0))


@torch.no_grad()
def log_probs(model, pairs):
    return dpo.answer_log_probs(model, batch_of(pairs))[0]


def with_reference(model, pairs):
    values = log_probs(model, pairs).view(2, -1).T.tolist()
    return [pair._replace(reference=tuple(v)) for pair, v in zip(pairs, values)]


# ---- the losses, by hand: beta h = 0, 1, -2 at beta 0.5


@pytest.mark.parametrize(
    ("smoothing", "expected"),
    [  # ln 2, ln(1 + 1/e), ln(1 + e^2); then further by smoothing * beta h
        (0.0, [0.693147, 0.313262, 2.126928]),
        (0.1, [0.693147, 0.413262, 1.926928]),
        (0.5, [0.693147, 0.813262, 1.126928]),
    ],
)
def test_sigmoid_loss_against_a_table(smoothing, expected):
    loss = dpo.sigmoid_loss(torch.tensor([0.0, 2.0, -4.0]), 0.5, smoothing)
    torch.testing.assert_close(loss, torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("tau", "expected"),
    [(0.5, [1.0, 0.0, 4.0, 0.25]), (0.1, [25.0, 16.0, 36.0, 20.25]), (1.0, [0.25, 0.25, 2.25, 0])],
)
def test_ipo_loss_against_a_table(tau, expected):
    loss = dpo.ipo_loss(torch.tensor([0.0, 1.0, -1.0, 0.5]), tau)
    torch.testing.assert_close(loss, torch.tensor(expected))


# ---- pairs and their log-probabilities


@pytest.mark.parametrize("template", ["chatml", "instruct", "chat"])
def test_prompts_are_those_of_sft_and_answers_the_rest(tiny_tokenizer, template):
    for pair, row in zip(made(tiny_tokenizer, template=template), MESSAGES, strict=True):
        prompt, _ = render(tiny_tokenizer, row["prompt"], template, add_generation_prompt=True)
        for (ids, mask), side in ((pair.chosen, "chosen"), (pair.rejected, "rejected")):
            whole, supervised = render(tiny_tokenizer, row["prompt"] + row[side], template)
            assert ids.tolist() == whole
            assert mask.tolist() == supervised
            assert supervised == [0] * len(prompt) + [1] * (len(whole) - len(prompt))


def test_earlier_answers_are_prompt(tiny_tokenizer):
    prompt = MESSAGES[1]["prompt"] + MESSAGES[1]["chosen"] + MESSAGES[0]["prompt"]
    (((ids, mask), *_),) = made(tiny_tokenizer, rows=[MESSAGES[0] | {"prompt": prompt}])
    assert tiny_tokenizer.decode(ids[mask == 1].tolist()).strip() == "because 7"


def test_pairs_that_say_nothing_are_dropped_and_counted(tiny_tokenizer):
    long, lines = "because " * 20, []
    rows = [
        {"prompt": user("why?"), "chosen": answer("7"), "rejected": answer("7 ")},
        {"prompt": user("why?"), "chosen": answer(long), "rejected": answer(long + "7")},
        {"prompt": user("why?"), "chosen": answer(long), "rejected": answer("7")},
        {"prompt": user("why? " * 30), "chosen": answer("a"), "rejected": answer("b")},
    ]
    (pair,) = made(tiny_tokenizer, 40, rows, say=lines.append)
    assert len(pair.chosen[0]) == 41
    dropped = "dropped: 2 with equal answers, 1 whose answer begins beyond"
    assert lines == [f"1 pairs here, 1 cut to 40 positions; {dropped}"]


def test_log_probabilities_are_those_of_the_plain_computation(base, tiny_tokenizer):
    model, pairs = load_model(base), made(tiny_tokenizer)
    assert dpo.pair_rows(pairs, 64, 0)["count"] == 8
    values, tokens = dpo.answer_log_probs(model, batch_of(pairs))
    for row, (ids, mask) in enumerate([p.chosen for p in pairs] + [p.rejected for p in pairs]):
        with torch.no_grad():
            log_p = model(torch.tensor(ids)[None]).log_softmax(-1)[0]
        expected = sum(log_p[t - 1, ids[t]].item() for t in range(len(ids)) if mask[t])
        assert values[row].item() == pytest.approx(expected, abs=1e-4)
        assert tokens[row] == mask.sum()


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
@pytest.mark.parametrize("precomputed", [False, True])
def test_it_begins_at_ln_2_with_no_margin_and_only_the_adapter_learns(
    base, tiny_tokenizer, loss, precomputed
):
    model = add_lora(load_model(base), 4, 8).train()
    pairs, cfg = made(tiny_tokenizer), config(loss=loss, beta=0.25)
    if precomputed:
        with lora_off(model):
            pairs = with_reference(model, pairs)
    total, metrics = dpo.preference_loss(cfg)(model, batch_of(pairs))
    assert total.item() / 8 == pytest.approx(math.log(2) if loss == "sigmoid" else 4.0, abs=1e-5)
    assert metrics["rewards/margins"].item() == pytest.approx(0, abs=1e-4)
    assert set(metrics) == NAMES
    total.backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    # A's gradient is 0 until B has left zero
    assert learning == {f"{name}.lora_B.weight" for name in adapters(model)}


def test_full_fine_tuning_has_the_gradient_of_the_plain_computation(base, tiny_tokenizer):
    pairs = [p._replace(reference=(-9.0, -8.0)) for p in made(tiny_tokenizer)[:3]]
    model, plain, gains = load_model(base), load_model(base), []
    dpo.preference_loss(config())(model, batch_of(pairs))[0].backward()
    sides = [(p.chosen, -9.0) for p in pairs] + [(p.rejected, -8.0) for p in pairs]
    for (ids, mask), reference in sides:
        log_p = plain(torch.tensor(ids)[None]).log_softmax(-1)[0, :-1]
        picked = log_p.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        gains.append((picked * torch.tensor(mask[1:])).sum() - reference)
    chosen, rejected = torch.stack(gains).chunk(2)
    dpo.sigmoid_loss(chosen - rejected, 0.1).sum().backward()
    for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, atol=1e-5, rtol=1e-4)


# ---- trl


def trl_metrics(policy, reference, tokenizer_folder, output, **knobs):
    """What trl's trainer makes of MESSAGES: (loss, metrics, the batch), by its own tokenization."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    settings = {"report_to": "none", "use_cpu": True, "bf16": False, "max_steps": 1, "beta": 0.3}
    settings |= {"per_device_train_batch_size": 8, "gradient_checkpointing": False}
    trainer = trl.DPOTrainer(
        transformers.LlamaForCausalLM.from_pretrained(policy),
        ref_model=transformers.LlamaForCausalLM.from_pretrained(reference),
        args=trl.DPOConfig(**settings, output_dir=str(output), **knobs),
        train_dataset=datasets.Dataset.from_list(MESSAGES),
        processing_class=transformers.AutoTokenizer.from_pretrained(tokenizer_folder),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
    return loss.item(), {k: v[0] for k, v in trainer._metrics["eval"].items()}, batch


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_trl_computes_the_same_loss_and_metrics(tmp_path, base, tiny_tokenizer, loss):
    other = make_base(tmp_path / "other", tiny_tokenizer, "chatml", seed=5)
    expected, metrics, batch = trl_metrics(other, base, base, tmp_path / "trl", loss_type=loss)
    pairs = with_reference(load_model(base), made(tiny_tokenizer))
    with torch.no_grad():
        loss_fn = dpo.preference_loss(config(loss=loss, beta=0.3))
        total, ours = loss_fn(load_model(other), batch_of(pairs))
    assert total.item() / 8 == pytest.approx(expected, rel=1e-5)
    for name in NAMES:
        assert ours[name].item() / 8 == pytest.approx(metrics[name], rel=1e-5, abs=1e-5)
    sizes = batch["attention_mask"].sum(1).tolist()
    rows = {tuple(row[:size]) for row, size in zip(batch["input_ids"].tolist(), sizes)}
    assert rows == {tuple(ids.tolist()) for p in pairs for ids, _ in (p.chosen, p.rejected)}


# ---- whole runs


@pytest.mark.parametrize(
    "more",
    [{}, {"loss": "ipo", "precompute_ref": False}, {"lora_r": 0, "learning_rate": 0.001}],
    ids=["sigmoid", "ipo", "full"],
)
def test_eight_preferences_are_learned(tmp_path, base, knobs, more):
    before = (base / "model.safetensors").read_bytes()
    length = {"max_steps": 24, "eval_steps": 24, "batch_size": 8}
    out = trained(tmp_path / "out", **knobs | {"lora_r": 16} | length | more)
    log, lines = (tmp_path / "out.log").read_text(), records(out)
    start = 25.0 if more.get("loss") == "ipo" else math.log(2)
    assert f"policy and reference begin as one: loss {start:.4f}, margin" in log
    assert lines[0]["loss"] == pytest.approx(start, rel=1e-4)
    assert lines[0].keys() >= NAMES
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert lines[-1]["val_rewards/accuracies"] == 1.0
    assert lines[-1]["val_loss"] < 0.8 * start
    assert lines[-1].keys() >= {f"val_{name}" for name in NAMES}
    assert (base / "model.safetensors").read_bytes() == before  # the reference is untouched
    assert Tokenizer.load(out / "final").template == "chatml"
    load_model(out)


def test_the_reference_is_the_sft_policy_and_not_its_base(tmp_path, base, knobs):
    """On an SFT adapter folder the adapter is merged first; the new one names that folder."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": p, "response": c} for p, c, _ in TEXTS])
    sft = {"program": "sft", "model_path": base, "dataset_path": rows, "val_ratio": 0}
    policy = trained(tmp_path / "sft", **sft, max_steps=4, merge=False)
    knobs = knobs | {"model_path": policy, "max_steps": 2, "batch_size": 8}
    out = trained(tmp_path / "dpo", **knobs, merge=False)
    examples = made(Tokenizer.load(base))
    first = records(out)[0]["logps/chosen"]
    of_policy, of_base = (
        log_probs(model, examples)[:8].mean().item()
        for model in (load_model(policy), load_model(base))
    )
    assert first == pytest.approx(of_policy, abs=1e-3)
    assert first != pytest.approx(of_base, abs=1e-3)
    home = json.loads((out / "final" / "base.json").read_text())
    assert home["relative_path"] == "../../sft/final"
    load_model(out)


def test_early_stopping_goes_back_to_the_best(tmp_path, knobs):
    """Accuracy cannot rise for long: after `patience` more validations the best is taken."""
    knobs = knobs | {"batch_size": 8, "eval_steps": 4, "save_steps": 100, "keep_last": 1}
    knobs |= {"early_stopping_patience": 3, "early_stopping_metric": "val_rewards/accuracies"}
    knobs |= {"lora_r": 16, "max_steps": 200}
    out = trained(tmp_path / "out", **knobs)
    scores = {r["step"]: r["val_rewards/accuracies"] for r in records(out) if "val_loss" in r}
    best, last = min(s for s in scores if scores[s] == max(scores.values())), max(scores)
    assert last == best + 3 * 4 < 200
    log = tmp_path / "out.log"
    assert f"back to the best validation, that of step {best} (val_rewards/acc" in log.read_text()
    result = json.loads(log.read_text().splitlines()[-1])
    assert (result["steps"], result["val_rewards/accuracies"]) == (last, scores[best])
    assert {path.name for path in out.glob("step_*")} == {f"step_{n:06d}" for n in (best, last)}
    kept, final = (
        safetensors.torch.load_file(folder / "adapter_model.safetensors")
        for folder in (out / f"step_{best:06d}", out / "final" / "adapter")
    )
    assert all(torch.equal(kept[name], final[name]) for name in kept)
    trained(tmp_path / "out", resume_from_checkpoint="auto", **knobs)
    assert "nothing to do" in log.read_text()


def test_a_falling_chosen_log_probability_is_told():
    lines, cfg = [], config(beta=0.5)
    watch = partial(dpo.watch_chosen, cfg, lines.append)
    watch({"val_logps/chosen": -52.0, "val_rewards/chosen": -1.0})
    assert not lines  # 2 nats below -50
    watch({"val_logps/chosen": -56.0, "val_rewards/chosen": -3.0})
    expected = "warning: the chosen answers became less likely, logps/chosen -50.0 -> -56.0"
    assert lines[0].startswith(expected)


def test_mistakes_are_told_on_one_line(tmp_path, knobs, tiny_tokenizer):
    plain = make_base(tmp_path / "plain", tiny_tokenizer)
    same = write_rows(tmp_path / "same.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    for more, message in [
        ({"model_path": plain}, "names no chat template; train it with sft.py first"),
        ({"sequence_length": 4}, "no row is left to train on, see above"),
        ({"val_path": None, "val_ratio": 1}, "every row is held out; lower --val_ratio"),
        ({"dataset_path": same}, "0 usable rows"),
        ({"lora_dropout": 0.1}, "lora_dropout must be 0"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing belongs to loss=sigmoid"),
        ({"lora_r": 0, "precompute_ref": False}, "needs an adapter to turn off"),
    ]:
        assert message in refused(tmp_path / "out", **knobs | more)
    assert not (tmp_path / "out").exists()  # all of it is said before anything is trained


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, True),
        ({"max_steps": 1}, False),
        ({"max_steps": 100}, True),
        ({"max_minutes": 1.0}, False),
        ({"lora_r": 0, "max_steps": 1}, True),
        ({"precompute_ref": False}, False),
        ({"plan": True}, False),
    ],
)
def test_the_reference_is_computed_once_where_that_is_cheaper(knobs, expected):
    loader, world = SimpleNamespace(blocks=50), SimpleNamespace(size=1)
    assert dpo.precomputes(config(warmup_steps=0, **knobs), loader, world) == expected
