"""sft.py, and the examples and streams in data.py that it trains on."""

import functools
import json

import numpy as np
import pytest
import safetensors.torch
import torch

import sft
from data import ExampleStream, pack_examples, supervised_rows
from lib.config import UserError
from lib.tokenizer import IGNORE, TEMPLATES, Tokenizer, render, stop_ids
from model import (
    Llama,
    ModelConfig,
    linear_cross_entropy,
    next_token_loss,
    open_model_folder,
    token_nats,
)
from tests import ROOT
from tests.align import begin, finished, make_base, refused
from tests.blows import after_save, die
from tests.conftest import write_rows
from tests.runs import losses, records
from train import greedy

ROWS = [
    {"prompt": "why not?", "response": "because 7"},
    {"prompt": "who jumps?", "response": "the fox"},
    {"instruction": "over what?", "input": "", "output": "a lazy dog"},
    {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "when?"},
                  {"role": "assistant", "content": "once upon a time"}]},
]  # fmt: skip
MANY = [{"prompt": f"what is {n}?", "response": f"a {n} and {n * 7}"} for n in range(40)]
SAID = [("why?", "because"), ("who jumps over it?", "the quick brown fox"), ("no?", "7")]
CHATS = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in SAID]


@pytest.fixture(scope="session")
def base(tmp_path_factory, tiny_tokenizer):
    return make_base(tmp_path_factory.mktemp("sft") / "base", tiny_tokenizer)


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("sft_rows") / "rows.jsonl", ROWS)


@pytest.fixture(scope="session")
def many(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("sft_rows") / "many.jsonl", MANY)


def examples(tokenizer, template="chatml"):
    return [tuple(np.array(half) for half in render(tokenizer, chat, template)) for chat in CHATS]


def tensors(batch):
    return {k: torch.from_numpy(v) for k, v in batch.items() if isinstance(v, np.ndarray)}


def build(dropout=0.0):
    torch.manual_seed(3)
    shape = {
        "n_layer": 2,
        "d_model": 32,
        "n_head": 4,
        "num_key_value_heads": 2,
        "d_ff": 48,
        "vocab_size": 384,
    }
    return Llama(ModelConfig(**shape, sequence_length=96, dropout=dropout, initializer_range=0.2))


# ---- masks, rows, packing


@pytest.mark.parametrize("template", TEMPLATES)
def test_supervised_are_the_answers_and_their_ends_and_nothing_else(tiny_tokenizer, template):
    chats = [{"messages": chat} for chat in CHATS]
    made = sft.make_examples(chats, "", tiny_tokenizer, template, 96, lambda line: None)
    batch = supervised_rows([[example] for example in made], 96, 0)
    flat, end = batch["ids"].flatten(), stop_ids(tiny_tokenizer, template)
    labels = batch["labels"][: batch["count"]]
    answers = np.split(labels, 1 + np.flatnonzero(np.isin(labels, end)))[:-1]
    assert [tiny_tokenizer.decode(answer.tolist()).strip() for answer in answers] == [
        c[1]["content"] for c in CHATS
    ]
    for place, label in zip(batch["where"], labels):  # each label is the id that follows its place
        assert label == flat[place + 1] or label in end
    assert (batch["labels"][batch["count"] :] == IGNORE).all()
    assert batch["tokens"] == sum(len(ids) - 1 for ids, _ in made)


def test_rows_are_as_long_as_the_longest_needs_in_powers_of_two(tiny_tokenizer):
    made = examples(tiny_tokenizer)
    for start in range(3):
        used = max(len(ids) - 1 for ids, _ in made[start:])
        T = supervised_rows([[e] for e in made[start:]], 96, 0)["ids"].shape[1]
        assert used <= T <= 96
        assert T in (32, 64, 96)


@pytest.mark.parametrize("backend", ["math", "sdpa"])
def test_packing_changes_neither_loss_nor_gradients(tiny_tokenizer, backend):
    made, results = examples(tiny_tokenizer), []
    for packed in (True, False):
        rows = pack_examples(made, 96) if packed else [[example] for example in made]
        model = build()
        model.use_attention(backend)
        loss, _ = next_token_loss(model, tensors(supervised_rows(rows, 96, 0, packed)))
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters()]))
    (one, grads), (other, others) = results
    assert len(pack_examples(made, 96)) == 1  # three conversations in one row
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)
    for a, b in zip(grads, others):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_packed_positions_restart_and_padding_is_its_own(tiny_tokenizer):
    row = pack_examples(examples(tiny_tokenizer), 200)[0]
    batch = supervised_rows([row], 200, 0, packed=True)
    sizes = [len(ids) - 1 for ids, _ in row]
    assert batch["documents"][0].tolist() == [
        n for n, s in enumerate(sizes, 1) for _ in range(s)
    ] + [0] * (200 - sum(sizes))
    assert batch["positions"][0, : sum(sizes)].tolist() == [i for s in sizes for i in range(s)]


def test_pack_takes_everything_once_and_fits():
    rng = np.random.RandomState(0)
    made = [(np.arange(n + 2), np.ones(n + 2)) for n in rng.randint(1, 64, 300)]
    rows = pack_examples(made, 64)
    assert sorted(id(e[0]) for row in rows for e in row) == sorted(id(e[0]) for e in made)
    used = [sum(len(ids) - 1 for ids, _ in row) for row in rows]
    assert max(used) <= 64
    assert sum(used) / (64 * len(rows)) > 0.95


def test_the_head_on_supervised_positions_is_the_head_on_all(tiny_tokenizer):
    batch = tensors(supervised_rows([[e] for e in examples(tiny_tokenizer)], 96, 0))
    full = torch.full(batch["ids"].shape, IGNORE).flatten()
    full[batch["where"][batch["labels"] != IGNORE]] = batch["labels"][batch["labels"] != IGNORE]
    results = []
    for labels in (batch, {"ids": batch["ids"], "labels": full.view_as(batch["ids"])}):
        model = build()
        loss, _ = next_token_loss(model, labels)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_token_nats_has_the_gradient_of_the_plain_computation(frozen):
    torch.manual_seed(0)
    x, weight = torch.randn(11, 8, requires_grad=True), torch.randn(20, 8, requires_grad=not frozen)
    labels = torch.randint(0, 20, (11,))
    labels[3] = IGNORE
    share = torch.rand(11)
    plain = torch.nn.functional.cross_entropy(
        x @ weight.T, labels, reduction="none", ignore_index=IGNORE
    )
    nats = token_nats(x, weight, labels)
    torch.testing.assert_close(nats, plain)
    torch.testing.assert_close(nats.sum(), linear_cross_entropy(x, weight, labels))
    wanted = [x] if frozen else [x, weight]
    for one, other in zip(
        torch.autograd.grad(nats @ share, wanted), torch.autograd.grad(plain @ share, wanted)
    ):
        torch.testing.assert_close(one, other)


def test_too_long_loses_its_end_and_too_late_an_answer_is_dropped(tiny_tokenizer):
    long = [{"role": "user", "content": "why? " * 50}, {"role": "assistant", "content": "7"}]
    cut = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because " * 50}]
    said = []
    chats = [{"messages": chat} for chat in (CHATS[0], long, cut)]
    made = sft.make_examples(chats, "here", tiny_tokenizer, "chatml", 48, said.append)
    assert [len(ids) for ids, _ in made] == [len(render(tiny_tokenizer, CHATS[0], "chatml")[0]), 49]
    assert tiny_tokenizer.im_end_id not in made[1][0][20:]  # cut: nothing teaches it to end there
    assert said == [
        "2 conversations here, 2 cut to 48 positions, 1 dropped: no answer begins within them"
    ]


# ---- streams


def test_a_batch_is_a_function_of_its_address():
    def stream(batch_size, world_size=1):
        return ExampleStream(list(range(23)), list, batch_size, 7, world_size)

    for step in range(6):
        whole = stream(8).batch(step)
        assert whole == stream(8).batch(step)
        assert whole == [i for m in range(4) for i in stream(2).batch(step, m, 0, 4)]
        assert whole == [
            i for m in range(2) for r in range(2) for i in stream(2, 2).batch(step, m, r, 2)
        ]
    one = [i for step in range(23) for i in stream(2).batch(step)]
    assert sorted(one[:23]) == sorted(one[23:]) == list(range(23))
    assert one[:23] != one[23:]
    assert stream(8).rows(20, 28) == [20, 21, 22]


def test_the_split_is_by_content():
    rows = [{"messages": [str(n)], "other": n} for n in range(1000)]
    _, val = sft.split_rows(rows, 0.1, "messages")
    assert 70 < len(val) < 130
    assert sft.split_rows(rows[::-1], 0.1, "messages")[1] == val[::-1]
    assert sft.split_rows(rows, 0, "messages") == (rows, [])
    more = sft.split_rows(rows, 0.2, "messages")[1]
    assert all(row in more for row in val)


# ---- whole runs


def answers(folder, template):
    """The greedy answers of a model folder to the questions of ROWS, each with whether it stopped."""
    model, tokenizer = open_model_folder(folder), Tokenizer.load(folder)
    assert tokenizer.template == template
    stops, found = stop_ids(tokenizer, template), []
    questions = ["why not?", "who jumps?", "over what?", "when?"]
    for question in questions:
        chat = [{"role": "user", "content": question}]
        chat = [{"role": "system", "content": "be kind"}, *chat] if question == "when?" else chat
        prompt, _ = render(tokenizer, chat, template, add_generation_prompt=True)
        with torch.no_grad():
            ids = greedy(model, prompt, 24, stops)
        found.append((tokenizer.decode(ids).strip(), ids[-1] in stops))
    return found


RIGHT = [("because 7", True), ("the fox", True), ("a lazy dog", True), ("once upon a time", True)]


@pytest.mark.parametrize(
    ("template", "knobs"),
    [
        ("chatml", {}),
        ("instruct", {"packing": False, "merge": False}),
        ("chat", {"lora_r": 0, "learning_rate": 0.003}),
    ],
    ids=["lora", "unmerged", "full"],
)
def test_four_rows_are_learned_by_heart(tmp_path, base, rows, template, knobs):
    settings = {
        "max_steps": 60,
        "batch_size": 4,
        "lora_r": 16,
        "lora_dropout": 0,
        "save_steps": 60,
        "eval_steps": 60,
    }
    settings |= {
        "model_path": base,
        "dataset_path": rows,
        "val_path": rows,
        "prompt_template": template,
    } | knobs
    out = finished("sft", tmp_path / "out", **settings)
    assert records(out)[-1]["val_loss"] < 0.05
    assert answers(out / "final", template) == RIGHT
    assert answers(out / "step_000060", template) == RIGHT
    if template == "chatml":
        assert answers(out / "final" / "adapter", template) == RIGHT
        generation = json.loads((out / "final" / "generation_config.json").read_text())
        assert generation["eos_token_id"] == [2, 5]
    is_adapter = (out / "final" / "adapter_config.json").exists()
    assert is_adapter == (template == "instruct")


@pytest.mark.parametrize("r", [4, 0], ids=["lora", "full"])
def test_a_run_in_two_parts_is_the_run(tmp_path, base, many, r):
    knobs = {"model_path": base, "dataset_path": many, "lora_r": r, "val_ratio": 0.2}
    whole = finished("sft", tmp_path / "whole", **knobs)
    first = begin("sft", tmp_path / "parts", before=functools.partial(after_save, 4, die), **knobs)
    assert first.wait() == [9]
    parts = finished("sft", tmp_path / "parts", resume_from_checkpoint="auto", **knobs)
    assert "resumed from" in (tmp_path / "parts.log").read_text()
    for name in ("step_000008", "final"):
        for path in (whole / name).rglob("*.safetensors"):
            assert path.read_bytes() == (parts / path.relative_to(whole)).read_bytes()
    assert losses(parts) == losses(whole)


def test_only_the_adapter_changes_and_the_base_stays(tmp_path, base, many):
    before = (base / "model.safetensors").read_bytes()
    out = finished(
        "sft",
        tmp_path / "out",
        model_path=base,
        dataset_path=many,
        lora_target_modules="q_proj,up_proj",
    )
    assert (base / "model.safetensors").read_bytes() == before
    old = safetensors.torch.load_file(base / "model.safetensors")
    new = safetensors.torch.load_file(out / "final" / "model.safetensors")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if "q_proj" in name or "up_proj" in name}
    saved = safetensors.torch.load_file(out / "step_000008" / "adapter_model.safetensors")
    assert len(saved) == 2 * 2 * 2
    assert all(tensor.any() for tensor in saved.values())


def test_two_ranks_and_accumulation_are_one_rank(tmp_path, base, many):
    knobs = {
        "model_path": base,
        "dataset_path": many,
        "lora_dropout": 0,
        "val_ratio": 0.2,
        "packing": False,
    }
    one = finished("sft", tmp_path / "one", batch_size=8, **knobs)
    two = finished("sft", tmp_path / "two", ranks=2, gradient_accumulation_steps=2, **knobs)
    for a, b in zip(records(one), records(two), strict=True):
        assert {k: a.get(k) for k in ("step", "tokens")} == {
            k: b.get(k) for k in ("step", "tokens")
        }
        for key in ("loss", "val_loss"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-4)


def test_it_goes_on_from_what_it_made(tmp_path, base, rows):
    """SFT on an SFT folder: the adapter below is merged, its template is kept, another one refused."""
    knobs = {"dataset_path": rows, "val_ratio": 0, "max_steps": 2}
    out = finished("sft", tmp_path / "one", model_path=base, prompt_template="chat", **knobs)
    again = finished("sft", tmp_path / "two", model_path=out / "step_000002", merge=False, **knobs)
    assert Tokenizer.load(again / "final").template == "chat"
    first, second = open_model_folder(out), open_model_folder(again)
    assert not torch.equal(
        first.model.layers[0].mlp.up_proj.weight, second.model.layers[0].mlp.up_proj.weight
    )
    line = refused("sft", tmp_path / "three", model_path=out, prompt_template="chatml", **knobs)
    assert line.startswith("error: prompt_template=chatml: ")
    assert "was trained in 'chat'" in line


def test_mistakes_are_told_on_one_line(tmp_path, base, rows, many, tiny_tokenizer):
    def line(**knobs):
        return refused(
            "sft", tmp_path / "out", **({"model_path": base, "dataset_path": rows} | knobs)
        )

    assert f"{tmp_path}: not a model folder (no config.json)" in line(model_path=tmp_path)
    assert f"{base.parent}: not a model folder (no config.json); there is one in {base}" in line(
        model_path=base.parent
    )
    assert f"{rows}: a file, and not a model folder" in line(model_path=rows)
    assert f"{tmp_path / 'no.jsonl'}: not found" in line(dataset_path=tmp_path / "no.jsonl")
    assert "dataset_path is required" in line(dataset_path="")
    assert "within 3 positions; shorten the questions, or --sequence_length=64" in line(
        sequence_length=3
    )
    assert "sequence_length 65 is more than the model's 64" in line(sequence_length=65)
    assert "every row is held out" in line(val_ratio=1)
    assert "down_proj, each once; got q_prj" in line(lora_target_modules="q_prj")
    assert "optimizer=muon is for whole matrices" in line(optimizer="muon")
    wide = make_base(tmp_path / "wide", tiny_tokenizer, vocab_size=400)
    assert "400 tokens, its tokenizer 384" in line(model_path=wide)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n[]\n')
    assert "0 usable rows" in line(dataset_path=bad)


def test_a_checkpoint_of_other_data_or_another_base_is_refused(
    tmp_path, base, rows, many, tiny_tokenizer
):
    knobs = {"model_path": base, "dataset_path": many, "max_steps": 4, "val_ratio": 0}
    finished("sft", tmp_path / "out", **knobs)
    knobs |= {"resume_from_checkpoint": "auto", "max_steps": 8, "allow_config_change": True}
    other = make_base(tmp_path / "other", tiny_tokenizer, seed=1)
    line = refused("sft", tmp_path / "out", **(knobs | {"model_path": other}))
    assert "this adapter was trained on a base with sha256" in line
    knobs |= {"allow_config_change": False, "max_steps": 4}
    assert "its data is" in refused("sft", tmp_path / "out", **(knobs | {"dataset_path": rows}))


def test_a_used_folder_is_refused_before_any_work(tmp_path, base, rows):
    (tmp_path / "out" / "final").mkdir(parents=True)
    for name in ("sft", "dpo"):
        model = make_base(tmp_path / name, Tokenizer.load(base), "chat")
        one = begin(name, tmp_path / "out", model_path=model, dataset_path=rows)
        assert one.wait() == [2], one.text
        assert one.text.startswith(f"error: {tmp_path / 'out'} already holds a run"), (
            one.text
        )  # and only that


def test_bad_rows_are_passed_over_aloud(tmp_path, base):
    path = write_rows(tmp_path / "rows.jsonl", MANY + [{"prompt": "no answer"}])
    one = begin("sft", tmp_path / "out", model_path=base, dataset_path=path, max_steps=2)
    assert one.wait() == [0], one.text
    assert f"1 row of {path} passed over: missing-field (line 41: missing " in one.text


@pytest.mark.parametrize(("name", "config"), [("sft", "SFTConfig"), ("dpo", "DPOConfig")])
def test_the_presets_are_sound(name, config):
    import dpo
    from lib.config import configure

    cls, other = {"sft": (sft.SFTConfig, "dpo"), "dpo": (dpo.DPOConfig, "sft")}[name]
    cfg = configure(
        cls, [str(ROOT / "configs" / f"{name}.json"), "--model_path=a", "--dataset_path=b"]
    )
    assert (cfg.lora_r, cfg.lora_alpha, len(cfg.lora_target_modules)) == (16, 32.0, 7)
    for preset in (f"{other}.json", f"demo_{other}.json", "tiny.json"):
        owner = "train" if preset == "tiny.json" else other
        with pytest.raises(
            UserError, match=rf"{preset} is a preset for {owner}\.py, not for {name}\.py"
        ):
            configure(cls, [str(ROOT / "configs" / preset), "--model_path=a", "--dataset_path=b"])
    with pytest.raises(UserError, match="model_path and dataset_path are required"):
        configure(cls, [])
