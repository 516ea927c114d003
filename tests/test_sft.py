"""sft.py: its examples and rows, whole runs, and what it shares with dpo.py."""

import json
import shutil
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

import dpo
import sft
from data import ExampleStream, TokenStream, pack_examples, supervised_rows
from lib.config import UserError, configure
from lib.conversation import TEMPLATES, render, stop_ids
from lib.tokenizer import IGNORE, Tokenizer
from model import Llama, ModelConfig, load_model, next_token_loss
from tests import ROOT
from tests.conftest import llama_cpp, write_rows
from tests.runs import as_tensors, make_base, records, refused
from tests.runs import train_to_end as trained
from tools.export import ExportConfig
from tools.export import main as export
from train import greedy, total_steps

ROWS = [
    {"prompt": "why not?", "response": "because 7"},
    {"prompt": "who jumps?", "response": "the fox"},
    {"instruction": "over what?", "input": "", "output": "a lazy dog"},
    {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "when?"},
                  {"role": "assistant", "content": "once upon a time"}]},
]  # fmt: skip
ANSWERS = ["because 7", "the fox", "a lazy dog", "once upon a time"]
MANY = [{"prompt": f"what is {n}?", "response": f"a {n} and {n * 7}"} for n in range(40)]
TURNS = [("why?", "because"), ("who jumps over it?", "the quick brown fox"), ("no?", "7")]
TALKS = [
    [
        {"role": "system", "content": "be kind \U0001f600"},
        {"role": "user", "content": "who?"},
        {"role": "assistant", "content": "\U0001f600 the fox\n\nand 7"},
        {"role": "user", "content": "- over what?"},
        {"role": "assistant", "content": "a dog"},
    ]
]
CHATS = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in TURNS]


@pytest.fixture(scope="session")
def base(tmp_path_factory, tiny_tokenizer):
    return make_base(tmp_path_factory.mktemp("sft") / "base", tiny_tokenizer)


@pytest.fixture(scope="session")
def knobs(tmp_path_factory, base):
    """Those of most runs here: all of ROWS is trained on."""
    rows = write_rows(tmp_path_factory.mktemp("sft_rows") / "rows.jsonl", ROWS)
    return {"program": "sft", "model_path": base, "dataset_path": rows, "val_path": rows}


def examples(tokenizer, template="chatml"):
    return [tuple(map(np.array, render(tokenizer, chat, template))) for chat in CHATS]


def build():
    torch.manual_seed(3)
    shape = {"n_layer": 2, "d_model": 32, "n_head": 4, "num_key_value_heads": 2, "d_ff": 48}
    return Llama(ModelConfig(**shape, vocab_size=384, sequence_length=96, initializer_range=0.2))


def loss_and_gradients(model, batch):
    loss, _ = next_token_loss(model, batch)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


# ---- masks, rows, packing


@pytest.mark.parametrize("template", TEMPLATES)
def test_supervised_are_the_answers_and_their_ends_and_nothing_else(tiny_tokenizer, template):
    chats = [{"messages": chat} for chat in CHATS]
    made = sft.make_examples(chats, "", tiny_tokenizer, template, 96, lambda line: None)
    batch = supervised_rows([[example] for example in made], 96, 0)
    flat, end = batch["ids"].flatten(), stop_ids(tiny_tokenizer, template)
    labels = batch["labels"][: batch["count"]]
    answers = np.split(labels, 1 + np.flatnonzero(np.isin(labels, end)))[:-1]
    texts = [tiny_tokenizer.decode(answer.tolist()).strip() for answer in answers]
    assert texts == [answer for _, answer in TURNS]
    for place, label in zip(batch["where"], labels):  # each label is the id that follows its place
        assert label == flat[place + 1] or label in end
    assert (batch["labels"][batch["count"] :] == IGNORE).all()
    assert batch["tokens"] == sum(len(ids) - 1 for ids, _ in made)


@pytest.mark.parametrize("backend", ["math", "sdpa"])
def test_packing_changes_neither_loss_nor_gradients(tiny_tokenizer, backend):
    made, results = examples(tiny_tokenizer), []
    packed_rows = pack_examples(made, 96)
    assert len(packed_rows) == 1  # three conversations in one row
    for packed, rows in ((True, packed_rows), (False, [[example] for example in made])):
        model = build()
        model.use_attention(backend)
        batch = as_tensors(supervised_rows(rows, 96, 0, packed))
        results.append(loss_and_gradients(model, batch))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-5)
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_packing_takes_everything_once_and_fits():
    rng = np.random.RandomState(0)
    made = [(np.arange(n + 2), np.ones(n + 2)) for n in rng.randint(1, 64, 300)]
    rows = pack_examples(made, 64)
    assert sorted(id(e[0]) for row in rows for e in row) == sorted(id(e[0]) for e in made)
    used = [sum(len(ids) - 1 for ids, _ in row) for row in rows]
    assert max(used) <= 64
    assert sum(used) / (64 * len(rows)) > 0.95


def test_the_head_on_supervised_positions_is_the_head_on_all(tiny_tokenizer):
    batch = as_tensors(supervised_rows([[e] for e in examples(tiny_tokenizer)], 96, 0))
    full, supervised = torch.full(batch["ids"].shape, IGNORE), batch["labels"] != IGNORE
    full.view(-1)[batch["where"][supervised]] = batch["labels"][supervised]
    plain = {"ids": batch["ids"], "labels": full}
    results = [loss_and_gradients(build(), labels) for labels in (batch, plain)]
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_long_answer_is_cut_and_a_late_one_dropped(tiny_tokenizer):
    late = [{"role": "user", "content": "why? " * 50}, {"role": "assistant", "content": "7"}]
    cut = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because " * 50}]
    lines, chats = [], [{"messages": chat} for chat in (CHATS[0], late, cut)]
    made = sft.make_examples(chats, "here", tiny_tokenizer, "chatml", 48, lines.append)
    assert [len(ids) for ids, _ in made] == [len(render(tiny_tokenizer, CHATS[0], "chatml")[0]), 49]
    assert tiny_tokenizer.im_end_id not in made[1][0][20:]  # nothing teaches it to end there
    counts = "2 conversations here, 2 cut to 48 positions, 1 dropped"
    assert lines == [f"{counts}: no answer begins within them"]


# ---- streams and splits


def test_a_batch_is_a_function_of_its_address():
    def stream(batch_size, world_size=1):
        return ExampleStream(list(range(23)), list, batch_size, 7, world_size)

    for step in range(6):
        whole = stream(8).batch(step)
        assert whole == stream(8).batch(step)
        assert whole == [i for m in range(4) for i in stream(2).batch(step, m, 0, 4)]
        both = [stream(2, 2).batch(step, m, r, 2) for m in range(2) for r in range(2)]
        assert whole == [i for rows in both for i in rows]
    passes = [i for step in range(23) for i in stream(2).batch(step)]
    assert sorted(passes[:23]) == sorted(passes[23:]) == list(range(23))
    assert passes[:23] != passes[23:]
    assert stream(8).rows(20, 28) == [20, 21, 22]


def test_the_split_is_by_content():
    rows = [{"messages": [str(n)], "other": n} for n in range(1000)]
    _, val = sft.split_rows(rows, 0.1, "messages")
    assert 70 < len(val) < 130
    assert sft.split_rows(rows[::-1], 0.1, "messages")[1] == val[::-1]
    assert sft.split_rows(rows, 0, "messages") == (rows, [])
    more = sft.split_rows(rows, 0.2, "messages")[1]
    assert all(row in more for row in val)


@pytest.mark.parametrize("ratio", [0.01, 0.99])
@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_of_two_rows_or_more_one_is_held_out_and_one_is_not(ratio, count):
    for first in range(30):
        rows = [
            {"prompt": str(n // 2)} for n in range(2 * first, 2 * (first + count))
        ]  # each twice
        train, val = sft.split_rows(rows, ratio, "prompt")
        assert not {row["prompt"] for row in train} & {row["prompt"] for row in val}
        assert sft.split_rows(rows[::-1], ratio, "prompt") == (train[::-1], val[::-1])
        assert (len(train) > 0, len(val) > 0) == (True, count > 1)
        hashes = [
            [sft.hash_fraction(f'"{row["prompt"]}"') for row in side] for side in (train, val)
        ]
        assert count == 1 or max(hashes[1]) < min(hashes[0])


def test_rows_that_are_all_alike_are_trained_on_and_that_is_said(tmp_path):
    path, lines = write_rows(tmp_path / "rows", ROWS[:1] * 3), []
    cfg = sft.SFTConfig(model_path="", dataset_path=str(path))
    rows, held_out, _ = sft.read_split(cfg, sft.read_chats, "messages", lines.append)
    assert (len(rows), held_out) == (3, [])
    assert len(lines) == 1
    assert "no two of 3 rows differ in messages; --val_path names other rows" in lines[0]


def test_columns_that_nothing_reads_are_one_line(tmp_path):
    rows = {sft.read_chats: {"response": "a"}, dpo.read_pairs: {"chosen": "a", "rejected": "b"}}
    for read, row in rows.items():
        row, lines = {"prompt": "q"} | row | {"id": 1, "note": "x"}, []
        path = str(write_rows(tmp_path / "rows", [row] * 3))
        for val_path in (None, path):
            cfg = sft.SFTConfig(model_path="", dataset_path=path, val_path=val_path, val_ratio=0)
            key = "prompt" if read is dpo.read_pairs else "messages"
            sft.read_split(cfg, read, key, lines.append)
        assert lines == ["columns not used: id, note"] * 2


def for_count(cls, count, held_out=1, **knobs):
    """Returns (the configuration for `count` rows, the lines said), rows / batch steps a pass."""
    lines, cfg = [], cls(model_path="", dataset_path="", **knobs)
    world = SimpleNamespace(size=1, say=lines.append)
    loader, stream = (SimpleNamespace(blocks=blocks) for blocks in (count, held_out))
    return sft.for_rows(cfg, loader, stream, world), lines


@pytest.mark.parametrize(
    ("cls", "count", "knobs", "passes", "said"),
    [
        (sft.SFTConfig, 2000, {}, 8, 0),
        (sft.SFTConfig, 20, {}, 160, 1),  # of 2.5 steps
        (sft.SFTConfig, 1, {}, 3200, 1),
        (sft.SFTConfig, 20, {"num_train_epochs": 2.0}, 2, 0),
        (sft.SFTConfig, 20, {"max_steps": 7}, 8, 0),
        (sft.SFTConfig, 20, {"batch_size": 2, "gradient_accumulation_steps": 2}, 80, 1),
        (dpo.DPOConfig, 2000, {}, 1, 0),
        (dpo.DPOConfig, 20, {}, 10, 1),
    ],
)
def test_few_rows_are_passed_over_more_often(cls, count, knobs, passes, said):
    cfg, lines = for_count(cls, count, **knobs)
    assert (cfg.num_train_epochs, len(lines)) == (passes, said)
    if said:
        assert total_steps(cfg, count, 1) >= cls.STEPS
        assert lines[0].startswith(f"{passes:,} passes over {count} rows: --num_train_epochs=")


def test_early_stopping_turns_itself_off_where_no_row_is_held_out():
    knobs = {"early_stopping_patience": 3, "num_train_epochs": 1.0}
    assert for_count(dpo.DPOConfig, 9, **knobs)[0].early_stopping_patience == 3
    cfg, lines = for_count(dpo.DPOConfig, 9, held_out=0, **knobs)
    assert cfg.early_stopping_patience is None
    assert lines[0].startswith("early stopping is off, because no row is held out to decide by")


@pytest.mark.parametrize(
    ("count", "size", "packing"),
    [(400, 8, False), (400, 32, False), (400, 33, True), (4, 8, False)],
)
def test_packing_leaves_a_tenth_as_many_steps_as_conversations(count, size, packing):
    made, lines = [(np.arange(size + 1), np.ones(size + 1))] * count, []
    world = SimpleNamespace(size=1, say=lines.append)
    cfg = sft.with_packing(sft.SFTConfig(model_path="", dataset_path=""), made, 64, world)
    assert (cfg.packing, len(lines)) == (packing, not packing)
    rows = pack_examples(made, 64) if cfg.packing else made
    assert total_steps(replace(cfg, num_train_epochs=1), len(rows), 1) >= count / 10
    for knobs in ({"max_steps": 5}, {"packing": True}):  # then it changes no steps, or is asked for
        cfg = sft.SFTConfig(model_path="", dataset_path="", **knobs)
        assert sft.with_packing(cfg, made, 64, world).packing


# ---- whole runs


@pytest.fixture(scope="module")
def by_heart(tmp_path_factory, knobs):
    """knobs -> the output folder of a training in which a few rows are learned by heart."""

    @cache
    def learned(**more):
        length = {"max_steps": 60, "save_steps": 60, "eval_steps": 60, "batch_size": 4}
        more = length | {"lora_r": 16, "lora_dropout": 0} | more
        return trained(tmp_path_factory.mktemp("heart") / "out", **knobs | more)

    return learned


@pytest.mark.parametrize("program", ["sft", "dpo"])
@pytest.mark.parametrize("count", [1, 2, 5, 10, 20])
def test_any_number_of_rows_trains(tmp_path, tiny_tokenizer, program, count):
    base = make_base(tmp_path / "base", tiny_tokenizer, "chatml")
    rows = [{"prompt": f"what is {n}?", "chosen": f"a {n}", "rejected": "I won't"}
            for n in range(count)]  # fmt: skip
    if program == "sft":
        rows = [{"prompt": row["prompt"], "response": row["chosen"]} for row in rows]
    path = write_rows(tmp_path / "rows", rows)
    unset = dict.fromkeys(("max_steps", "warmup_steps", "batch_size", "save_steps", "eval_steps"))
    words = {"program": program, "dataset_path": path, "model_path": base, "logging_steps": 7}
    words |= {"early_stopping_patience": 90}
    out = trained(tmp_path / "out", **unset | words)
    steps = {"sft": sft.SFTConfig, "dpo": dpo.DPOConfig}[program].STEPS
    losses = {r["step"]: r["loss"] for r in records(out) if "loss" in r}
    assert max(losses) >= steps
    assert losses[max(losses)] < 0.5 * losses[1]
    held_out = [r for r in records(out) if "val_loss" in r]
    log = out.with_suffix(".log").read_text()
    assert bool(held_out) == (count > 1) == ("early stopping is off" not in log)
    assert ("a model this small learns more" in log) == (program == "sft")
    load_model(out / "final")


def answers(folder, template):
    """The greedy answers of a model folder to the questions of ROWS, and whether each stopped."""
    model, tokenizer = load_model(folder), Tokenizer.load(folder)
    assert tokenizer.template == template
    stops, pairs = stop_ids(tokenizer, template), []
    for question in ["why not?", "who jumps?", "over what?", "when?"]:
        chat = [{"role": "user", "content": question}]
        chat = [{"role": "system", "content": "be kind"}, *chat] if question == "when?" else chat
        prompt, _ = render(tokenizer, chat, template, add_generation_prompt=True)
        with torch.no_grad():
            ids = greedy(model, prompt, 24, stops)
        pairs.append((tokenizer.decode(ids).strip(), ids[-1] in stops))
    return pairs


@pytest.mark.parametrize(
    ("template", "more"),
    [
        ("chatml", {}),
        ("instruct", {"packing": False, "merge": False}),
        ("chat", {"lora_r": 0, "learning_rate": 0.003}),
    ],
    ids=["lora", "unmerged", "full"],
)
def test_four_rows_are_learned_by_heart(by_heart, template, more):
    out = by_heart(prompt_template=template, **more)
    assert records(out)[-1]["val_loss"] < 0.05
    folders = [out / "final", out / "step_000060"]
    if template == "chatml":
        folders.append(out / "final" / "adapter")
        generation = json.loads((out / "final" / "generation_config.json").read_text())
        assert generation["eos_token_id"] == [2, 5]
    for folder in folders:
        assert answers(folder, template) == [(answer, True) for answer in ANSWERS]
    is_adapter = (out / "final" / "adapter_config.json").exists()
    assert is_adapter == (template == "instruct")


def test_other_programs_answer_as_we_do_with_nothing_around_the_answer(by_heart, tmp_path):
    """Alone, with a system prompt, after other turns; in llama.cpp with its own chatml, too."""
    pytest.importorskip("gguf")
    folder, file = by_heart(prompt_template="chatml") / "final", tmp_path / "model.gguf"
    export(ExportConfig(str(folder), str(file), "gguf"))
    kind, earlier = [{"role": "system", "content": "be kind"}], [*user("no?"), CHATS[2][1]]
    alone = [user("why not?"), user("who jumps?"), user("over what?"), kind + user("when?")]
    talks = [*alone, earlier + alone[0], earlier + alone[2], kind + alone[1]]
    model, tokenizer = load_model(folder), Tokenizer.load(folder)
    ids = [render(tokenizer, talk, "chatml", add_generation_prompt=True)[0] for talk in talks]
    ours = [tokenizer.decode(greedy(model, prompt, 12, [2, 5])) for prompt in ids]
    assert ours[:4] == ANSWERS
    assert max(map(len, ids)) + 12 <= 64
    assert [greedy_by_transformers(folder, talk, 12) for talk in talks] == ours
    for use_jinja in (True, False):
        ask = llama_cpp(file, use_jinja).handle_chat_completions
        bodies = [{"messages": talk, "temperature": 0, "max_tokens": 12} for talk in talks]
        theirs = [ask(body)["choices"][0]["message"]["content"] for body in bodies]
        assert theirs == ours


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("template", ["chatml", "instruct", "chat"])
def test_trl_trains_on_the_tokens_that_we_train_on(tmp_path, tiny_tokenizer, template):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    folder = make_base(tmp_path / "base", tiny_tokenizer, template)
    settings = {"report_to": "none", "use_cpu": True, "bf16": False, "assistant_only_loss": True}
    trainer = trl.SFTTrainer(
        str(folder),
        args=trl.SFTConfig(output_dir=str(tmp_path / "trl"), **settings),
        train_dataset=datasets.Dataset.from_list([{"messages": chat} for chat in TALKS]),
    )
    rows = [render(tiny_tokenizer, chat, template) for chat in TALKS]
    assert [row["input_ids"] for row in trainer.train_dataset] == [ids for ids, _ in rows]
    assert [row["labels"] for row in trainer.train_dataset] == [
        [id if on else IGNORE for id, on in zip(*row)] for row in rows
    ]


def test_a_training_that_resumes_keeps_its_template(tmp_path, tiny_tokenizer, knobs):
    """As one must that began when chatml was another."""
    base, out = make_base(tmp_path / "base", tiny_tokenizer, "chatml_newline"), tmp_path / "out"
    knobs = knobs | {"model_path": base}
    trained(out, **knobs | {"prompt_template": "chatml"})
    shutil.rmtree(out / "final")
    tiny_tokenizer = Tokenizer(tiny_tokenizer.model)
    tiny_tokenizer.save(base, 64)
    assert Tokenizer.load(base).template is None
    again = {"resume_from_checkpoint": "auto", "max_steps": 12, "allow_config_change": True}
    trained(out, **knobs | again)
    assert "template chatml_newline" in out.with_suffix(".log").read_text()
    assert Tokenizer.load(out / "final").template == "chatml_newline"


def test_only_the_adapter_changes_and_the_base_stays(tmp_path, base, knobs):
    before = (base / "model.safetensors").read_bytes()
    out = trained(tmp_path / "out", **knobs, lora_target_modules="q_proj,up_proj")
    assert (base / "model.safetensors").read_bytes() == before
    old, new = (
        safetensors.torch.load_file(path / "model.safetensors") for path in (base, out / "final")
    )
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if "q_proj" in name or "up_proj" in name}
    saved = safetensors.torch.load_file(out / "step_000008" / "adapter_model.safetensors")
    assert len(saved) == 2 * 2 * 2
    assert all(tensor.any() for tensor in saved.values())


def test_it_goes_on_from_what_it_made(tmp_path, knobs):
    """SFT on an SFT folder: the adapter below is merged, its template kept, another refused."""
    knobs = knobs | {"max_steps": 2}
    out = trained(tmp_path / "one", prompt_template="chat", **knobs)
    knobs["model_path"] = out / "step_000002"
    again = trained(tmp_path / "two", merge=False, **knobs)
    assert Tokenizer.load(again / "final").template == "chat"
    first, second = (load_model(path).model.layers[0].mlp.up_proj for path in (out, again))
    assert not torch.equal(first.weight, second.weight)
    line = refused(tmp_path / "three", prompt_template="chatml", **knobs)
    assert line.startswith("error: prompt_template=chatml: ")
    assert "was trained in 'chat'" in line


def test_mistakes_are_told_on_one_line(tmp_path, base, knobs, tiny_tokenizer):
    wide = make_base(tmp_path / "wide", tiny_tokenizer, vocab_size=400)
    rows, all_held_out = knobs["dataset_path"], {"val_path": None, "val_ratio": 1}
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n[]\n')
    for more, message in [
        ({"model_path": tmp_path / "none"}, f"{tmp_path / 'none'}: no such folder"),
        ({"model_path": base.parent}, f"{base.parent}: not a model folder (no config.json); give"),
        ({"model_path": rows}, f"{rows}: not a model folder"),
        ({"model_path": wide}, "400 tokens, its tokenizer 384"),
        ({"dataset_path": tmp_path / "no.jsonl"}, f"{tmp_path / 'no.jsonl'}: not found"),
        ({"dataset_path": ""}, "required: --dataset_path=VALUE"),
        ({"dataset_path": tmp_path / "bad.jsonl"}, "0 usable rows"),
        ({"sequence_length": 3}, "no row is left to train on, see above; a longer"),
        ({"sequence_length": 65}, "sequence_length 65 is more than the model's 64"),
        (all_held_out, "every row is held out"),
        ({"lora_target_modules": "q_prj"}, "must be q_proj|k_proj"),
        ({"lora_target_modules": ""}, "names no projection; lora_r=0 trains all weights"),
        ({"optimizer": "muon"}, "optimizer=muon is for whole matrices"),
    ]:
        assert message in refused(tmp_path / "out", **knobs | more)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_other_data_or_another_base_is_refused(tmp_path, knobs, tiny_tokenizer):
    trained(tmp_path / "out", **knobs)
    other = make_base(tmp_path / "other", tiny_tokenizer, seed=1)
    for more, message in (
        ({"dataset_path": write_rows(tmp_path / "m", MANY)}, "its data is"),
        ({"model_path": other, "allow_config_change": True}, "was trained on another model than"),
    ):
        line = refused(tmp_path / "out", resume_from_checkpoint="auto", **knobs | more)
        assert message in line


def test_replayed_rows_are_the_text_itself_and_their_share_is_as_asked(tiny_dataset):
    tokenizer = Tokenizer.load(tiny_dataset)
    text = np.concatenate(
        [np.fromfile(f, np.uint16) for f in sorted(tiny_dataset.glob("train*.bin"))]
    )
    lines, paths = [], {"model_path": "", "dataset_path": "", "replay_path": str(tiny_dataset)}
    cfg = sft.SFTConfig(**paths, replay_share=0.25)
    rows = sft.replayed_rows(cfg, tokenizer, 32, 90, lines.append)
    assert len(rows) == 30
    assert "30 rows of text from" in lines[0]
    assert len(sft.replayed_rows(cfg, tokenizer, 32, 1, lines.append)) == 1  # few rows get one, too
    places = []
    for [(ids, mask)] in rows:
        assert len(ids) == 33
        assert mask.all()
        windows = np.lib.stride_tricks.sliding_window_view(text, 33)
        places.append(np.flatnonzero((windows == ids).all(axis=1))[0])
    assert (np.diff(places) > 32).all()  # none twice, in all of the text
    assert places[-1] > len(text) - 66
    assert not sft.replayed_rows(replace(cfg, replay_path=None), tokenizer, 32, 90, lines.append)


def test_a_replay_forgets_less_and_a_wrong_one_is_refused(tmp_path, tiny_dataset, tiny_tokenizer):
    tokenizer = Tokenizer.load(tiny_dataset)
    base = make_base(tmp_path / "base", tokenizer)
    stream = TokenStream([tiny_dataset], "train", 64, 8)
    nats, knobs = {}, {"program": "sft", "lora_r": 0, "max_steps": 40, "learning_rate": 0.003}
    knobs |= {"dataset_path": write_rows(tmp_path / "rows.jsonl", ROWS), "model_path": base}
    data = shutil.copytree(tiny_dataset, tmp_path / "data")
    replay = {"replay_path": data, "replay_share": 0.5}
    for name, more in ("without", {}), ("with", replay):
        trained(tmp_path / name, **knobs | more)
        model = load_model(tmp_path / name)
        nats[name] = next_token_loss(model, as_tensors(stream.rows(0, 8)))[0].item()
    assert nats["with"] < 0.9 * nats["without"]
    manifest = data / "manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf-8").replace("42", "43"), encoding="utf-8")
    again = {"resume_from_checkpoint": "auto"} | replay
    assert "its data is" in refused(tmp_path / "with", **knobs | again)
    other = {"replay_path": tiny_dataset, "model_path": make_base(tmp_path / "o", tiny_tokenizer)}
    assert "was prepared with another tokenizer" in refused(tmp_path / "out", **knobs | other)
    nothing = {"replay_path": tmp_path}
    assert "no prepared dataset" in refused(tmp_path / "out", **knobs | nothing)


@pytest.mark.parametrize(
    ("size", "more", "r", "rate"),
    [
        (3_000_000, {}, 0, 1e-3),
        (3_000_000, {"lora_r": 16}, 16, 3e-3),
        (135_000_000, {}, 16, 2e-4),
        (135_000_000, {"lora_r": 8, "learning_rate": 1e-4}, 8, 1e-4),
        (135_000_000, {"lora_r": 0}, 0, 5e-5),
        (135_000_000, {"optimizer": "muon"}, 0, 5e-5),
    ],
)
def test_rank_and_learning_rate_follow_from_the_size_of_the_model(size, more, r, rate):
    lines, cfg = [], sft.SFTConfig(model_path="a", dataset_path="b", **more)
    found = sft.for_size(cfg, size, lines.append)
    assert (found.lora_r, found.learning_rate) == (r, rate)
    (line,) = lines
    assert line.startswith(f"{size:,} parameters, learning rate {rate:g} for ")
    assert ("--lora_r=" in line) == ("lora_r" not in more or size < 1e7)
    with pytest.raises(UserError, match=r"min_lr 0\.1 is more than learning_rate"):
        sft.for_size(replace(cfg, min_lr=0.1, learning_rate=None), size, print)


@pytest.mark.parametrize(
    ("name", "cls", "other", "r"),
    [("sft", sft.SFTConfig, "dpo", None), ("dpo", dpo.DPOConfig, "sft", 16)],
)
def test_the_presets_are_sound(name, cls, other, r):
    def read(preset):
        return configure(cls, [f"{ROOT}/configs/{preset}", "--model_path=a", "--dataset_path=b"])

    cfg = read(f"{name}.json")
    assert (cfg.lora_r, cfg.lora_alpha, len(cfg.lora_target_modules)) == (r, 32.0, 7)
    for preset in (f"{other}.json", f"demo_{other}.json", "tiny.json"):
        owner = "train" if preset == "tiny.json" else other
        message = rf"{preset} is a preset for {owner}\.py, not for {name}\.py"
        with pytest.raises(UserError, match=message):
            read(preset)
    with pytest.raises(UserError, match="required: --model_path=VALUE --dataset_path=VALUE"):
        configure(cls, [])


# ---- the answer shown at each evaluation


def user(text):
    return [{"role": "user", "content": text}]


def greedy_by_transformers(folder, messages, count):
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    settings = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    prompt = tokenizer.apply_chat_template(messages, **settings)
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=count)[0]
    return tokenizer.decode(ids[prompt["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("program", ["sft", "dpo"])
def test_each_evaluation_shows_a_held_out_question_and_the_greedy_answer(
    tmp_path, tiny_tokenizer, program
):
    base = make_base(tmp_path / "base", tiny_tokenizer, "chatml")
    rows = [{"prompt": f"what is {n}?", "chosen": f"a {n}", "rejected": "I won't say"}
            for n in range(12)]  # fmt: skip
    if program == "sft":
        rows = [{"prompt": row["prompt"], "response": row["chosen"]} for row in rows]
    knobs = {"program": program, "model_path": base, "sample_tokens": 12}
    knobs |= {"dataset_path": write_rows(tmp_path / "rows", rows[2:])}
    knobs |= {"val_path": write_rows(tmp_path / "held_out", rows[:2])}
    out = trained(tmp_path / "out", **knobs)
    shown = [(r["step"], r["question"]) for r in records(out) if "answer" in r]
    assert shown == [(4, "what is 0?"), (8, "what is 0?")]
    answer = records(out)[-1]["answer"]
    log = out.with_suffix(".log").read_text()
    assert f"    question: 'what is 0?'\n    answer: {answer!r}\n" in log
    assert answer == greedy_by_transformers(out / "final", user("what is 0?"), 12).strip()
    silent = trained(tmp_path / "silent", **knobs | {"sample_tokens": 0})
    assert not any("answer" in r for r in records(silent))


@torch.no_grad()
def test_asked_is_the_first_question_that_leaves_room_for_an_answer(tmp_path, tiny_tokenizer):
    model = load_model(make_base(tmp_path / "base", tiny_tokenizer, "chatml"))
    cfg = configure(sft.SFTConfig, ["--model_path=a", "--dataset_path=b", "--sample_tokens=5"])
    prompts = [[], user("why? " * 60), user("who jumps?"), user("when?")]
    shown = sft.answer_to(cfg, tiny_tokenizer, "chatml", prompts, 64)(model)
    assert shown["question"] == "who jumps?"
    assert sft.answer_to(cfg, tiny_tokenizer, "chatml", prompts[:2], 64)(model) == {}
