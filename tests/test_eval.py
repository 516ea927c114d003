"""eval.py: promised numbers, lm-eval's on the same folder, bad input, comparison, assessment."""

import copy
import functools
import gzip
import json
import math
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import eval as evaluation
import model as models
from corpus.sources import usable_rows
from eval import (
    EvalConfig,
    ResultsConfig,
    answer_scores,
    encode_questions,
    multiple_choice,
    text_nats,
    text_result,
)
from lib.config import UserError, configure
from model import Llama, ModelConfig, identify, load_model, save_model
from sample import open_model
from tests import ROOT, SHARED
from tests.conftest import write_rows
from tests.runs import make_base
from tests.warm import python

WIKITEXT = SHARED / "wikitext2" / "wiki.valid.raw"
CONTEXT = 96
LINE = "The quick brown fox number {} jumps\nover a lazy dog: why not?\n\n"
TEXT = "".join(LINE.format(n) for n in range(60))
PASSAGES = [f"The fox is number {n}. " * (1 + n % 9) for n in range(40)]
BOOLQ = [
    {"question": f"is {n} a lazy number", "passage": passage, "answer": n % 3 > 0}
    for n, passage in enumerate(PASSAGES)
]
CHOICES = [
    {"context": "once upon a", "choices": ["time", "quick brown fox"], "answer": "time"},
    {"context": "the lazy dog asked: ", "choices": ["why", "why not", "jumps"], "answer": 1},
    {"context": "", "choices": ["the", "fox"], "answer": 0},
]
LAST = [{"text": "the quick brown fox"}, {"text": "over a lazy dog"}]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer):
    """A folder with a base model and everything to measure it on."""
    place = tmp_path_factory.mktemp("eval")
    make_base(place / "base", tiny_tokenizer, sequence_length=CONTEXT)
    (place / "text.txt").write_text(TEXT, encoding="utf-8")
    write_rows(place / "boolq.jsonl", BOOLQ)
    write_rows(place / "choices.jsonl", CHOICES)
    write_rows(place / "last.jsonl", LAST)
    prompts = [{"prompt": "Why not?", "category": "talk"}, {"prompt": "the", "category": "x"}]
    write_rows(place / "prompts.jsonl", prompts)
    return place


def knobs(place, **more):
    values = {"model_path": place / "base", "perplexity_path": place / "text.txt"}
    values |= {"boolq_path": place / "boolq.jsonl", "custom_prompts": place / "prompts.jsonl"}
    values = {key: str(value) for key, value in values.items()}
    return values | {"max_new_tokens": 4, "device": "cpu"} | more


def measure(place, out, **more):
    evaluation.main(EvalConfig(output_dir=str(out), **knobs(place, **more)))
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def results(place):
    tasks = tuple(str(place / name) for name in ("choices.jsonl", "last.jsonl"))
    return measure(place, place / "out", tasks=tasks, detailed_output=True)


def without(results, *keys):
    """Returns results without what lies at this place."""
    results = part = copy.deepcopy(results)
    for key in keys[:-1]:
        part = part[key]
    del part[keys[-1]]
    return results


# ---- what is measured


def test_the_promised_keys_are_there(results, place):
    assert [*results] == ["model", "protocol", "perplexity", "boolq", "tasks", "smoke"]
    text = results["perplexity"]
    rates = ("bits_per_byte", "word_perplexity", "token_perplexity")
    assert text.keys() >= {*rates, "tokens", "words", "bytes"}
    assert (text["context"], text["stride"], text["lossless"]) == (CONTEXT, CONTEXT // 2, True)
    keys = {"accuracy", "accuracy_norm", "n", "majority", "ci95", "verdict"}
    assert results["boolq"].keys() >= keys
    assert results["smoke"].keys() >= {"score", "by_category", "eos_rate", "responses"}
    assert results["model"]["sha256"] == identify(place / "base").sha256
    assert results["model"]["non_embedding"] == 2 * (3 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64


def test_numbers_are_their_definitions(results):
    part = results["perplexity"]
    words = len(re.split(r"\s+", TEXT))  # lm-eval's count
    assert (part["bytes"], part["words"]) == (len(TEXT.encode()), words)
    assert part["bits_per_byte"] == pytest.approx(part["nats"] / math.log(2) / part["bytes"])
    assert part["word_perplexity"] == pytest.approx(math.exp(part["nats"] / words))
    assert part["token_perplexity"] == pytest.approx(math.exp(part["nats"] / part["tokens"]))
    assert part["baselines"]["uniform"]["token_perplexity"] == pytest.approx(384)
    bits = 8 * len(gzip.compress(TEXT.encode(), 9, mtime=0)) / part["bytes"]
    assert part["baselines"]["gzip"]["bits_per_byte"] == pytest.approx(bits)
    boolq, (choices, last) = results["boolq"], results["tasks"].values()
    assert (boolq["n"], boolq["majority"], choices["n"]) == (40, 26 / 40, 3)
    assert choices["chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)
    assert (last["n"], last["cut"], last["perplexity"] > 1) == (2, 0, True)


def test_the_report_shows_all_of_it(results, place):
    report = (place / "out" / "report.md").read_text(encoding="utf-8")
    for place, number in evaluation.main_numbers(results).items():
        shown = re.escape(evaluation.shown_number(place, number))
        assert re.search(rf"^{place} +{shown}", report, re.M)
    assert results["boolq"]["verdict"] in report
    for row in results["smoke"]["responses"]:
        assert f"> {row['prompt']}" in report
        assert ", ".join(f"{name} {value}" for name, value in row["parts"].items()) in report
    facts = json.loads(re.search("```json\n(.*?)```", report, re.DOTALL)[1])
    assert facts == without(results, "smoke", "responses")
    assert "not measured" not in report


def test_fast_mode_measures_less_and_says_so(place, tmp_path):
    (tmp_path / "long.txt").write_text(TEXT * 40, encoding="utf-8")
    got = measure(place, tmp_path, fast_mode=True, perplexity_path=str(tmp_path / "long.txt"))
    part = got["perplexity"]
    assert part["stride"] == part["context"]
    assert part["bytes"] <= 100_000 < len(TEXT) * 40
    assert part["text"]["part"] == f"the first {part['bytes']:,} of {len(TEXT) * 40:,} bytes"
    assert "fast mode" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_questions_are_drawn_by_the_seed_not_from_the_top(place, tmp_path):
    path = str(tmp_path / "sorted.jsonl")
    write_rows(path, sorted(BOOLQ, key=lambda row: row["answer"]))  # the first ten are all no
    draw = {"boolq_path": path, "max_boolq_samples": 12, "skip_perplexity": True}
    got = [measure(place, tmp_path, seed=seed, **draw) for seed in (0, 0, 1)]
    assert [results["boolq"]["n"] for results in got] == [12] * 3
    assert got[0]["boolq"] == got[1]["boolq"]
    assert 0 < got[0]["boolq"]["majority"] < 1
    assert got[0]["perplexity"] == {"verdict": "not measured", "reason": "skipped, as asked"}


def test_what_overflows_is_no_number(place, tmp_path, tiny_tokenizer):
    model = load_model(place / "base")
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
    (tmp_path / "wild").mkdir()
    save_model(model, tmp_path / "wild")
    tiny_tokenizer.save(tmp_path / "wild", CONTEXT)
    with pytest.raises(UserError, match="overflows in fp32"):
        measure(place, tmp_path / "out", model_path=str(tmp_path / "wild"))


def test_long_passages_lose_their_beginning_never_the_question(place):
    model, tokenizer = open_model(place / "base", "cpu", "fp32")
    row = {"question": "is this kept", "passage": "a fox. " * 300, "answer": "no"}
    questions = [("row 1", *evaluation.to_question(row))]
    ((context, answers),), cut = encode_questions(tokenizer, questions, CONTEXT)
    assert (cut, context[0]) == (1, tokenizer.bos_id)
    assert len(context) + max(map(len, answers)) - 1 == CONTEXT
    assert tokenizer.decode(context).endswith("a fox. \nQuestion: is this kept?\nAnswer:")
    answer_scores(model, [(context, answers)], 1)  # fits


# ---- texts


def test_texts_are_read_to_the_byte(tmp_path):
    raw = "a\r\n\u2028b \t\n\n".encode()
    (tmp_path / "t.txt").write_bytes(raw)
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(raw, mtime=0))
    for name in ("t.txt", "t.txt.gz"):
        assert evaluation.read_text(str(tmp_path / name)).encode() == raw
    write_rows(tmp_path / "t.jsonl", [{"text": "a"}, {"text": "b\n"}])
    assert evaluation.read_text(str(tmp_path / "t.jsonl")) == "a\n\nb\n"


@pytest.mark.skipif(not WIKITEXT.is_file(), reason="WikiText-2 is not at hand")
def test_wikitext_2_is_known_by_its_hash_and_its_count(place, monkeypatch):
    # the hub serves a row a line, and blank lines as empty texts
    lines = WIKITEXT.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [{"text": line if line.strip() else ""} for line in lines]
    module = SimpleNamespace(load_dataset=lambda *names, **settings: iter(rows), __spec__=1)
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(evaluation, "text_nats", lambda *_: 1.0)
    loaded = open_model(place / "base", "cpu", "fp32")
    for path in (str(WIKITEXT), "hf:Salesforce/wikitext:wikitext-2-raw-v1:validation"):
        result = evaluation.prepare_text(EvalConfig(model_path=""), *loaded, path)()
        assert result["text"]["name"] == "WikiText-2 raw, validation"
        assert result["words"] - 2 + result["lines"] == 217_646  # as published


def test_what_is_out_of_reach_is_not_measured_and_the_rest_is(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    tasks = (str(place / "last.jsonl"), "hf:e/f")
    got = measure(place, tmp_path, perplexity_path="hf:a/b", boolq_path="hf:c/d", tasks=tasks)
    for part, flag in (("perplexity", "perplexity_path"), ("boolq", "boolq_path")):
        assert got[part]["verdict"] == "not measured"
        assert {*got[part]} == {"verdict", "reason"}  # no number, above all no 0
        assert f"--{flag}=FILE" in got[part]["reason"]
    assert got["tasks"]["hf:e/f"]["verdict"] == "not measured"
    assert got["tasks"][str(place / "last.jsonl")]["n"] == 2
    assert "not measured" in capsys.readouterr().out
    evaluation.assess(ResultsConfig((str(tmp_path),)))
    assert "not measured" in capsys.readouterr().out


# ---- bad input

BAD = [  # the flag, the value or the content of a file r.EXT, words of the error
    ("perplexity_path", "nowhere.txt", ["nowhere.txt", "No such file"]),
    ("perplexity_path", b"", ["r.txt: holds no text"]),
    ("perplexity_path", b"ab\xff", ["r.txt: cannot be read as UTF-8: "]),
    ("perplexity_path", gzip.compress(b"abc" * 99, mtime=0)[:-9], ["r.gz: cannot"]),
    ("perplexity_path", b'{"text": 1}', ["r.jsonl", "not {", "text"]),
    ("perplexity_path", b'{"text": "\\ud800"}', ["r.jsonl", "surrogates"]),
    ("perplexity_path", b'{"text": "a"}\n{', ["r.jsonl", "not-json", "line 2"]),
    ("context", 97, ["context 97", "96, the model's positions"]),
    ("stride", 97, ["stride 97", "stride <= context"]),
    ("boolq_path", "nowhere.jsonl", ["nowhere.jsonl: not found"]),
    ("boolq_path", b'{"text": "a b"}', ["r.jsonl: holds last-word rows", "--tasks"]),
    ("boolq_path", b'{"question": "a", "answer": true}', ["passage", "other fields"]),
    ("boolq_path", b'{"question": "a", "passage": "b", "answer": []}', ["true or false"]),
    ("tasks", b'{"foo": 1}', ["not {question", "{'foo': 1}"]),
    ("tasks", b'{"text": "fox"}', ["two words or more"]),
    ("tasks", b'{"choices": ["a", "b"], "answer": 0}', ["{context, choices"]),
    ("tasks", b'{"context": "a", "choices": ["b"], "answer": 0}', ["two texts or more"]),
    ("tasks", b'{"question": "a", "choices": ["b", 3], "answer": 0}', ["not {question", "MMLU"]),
    ("tasks", b'{"question": "a", "context": "c", "choices": ["b", "d"], "answer": 0}', ["both"]),
    ("tasks", b'{"question": "a", "passage": "c", "choices": ["b", "d"], "answer": 0}', ["both"]),
    ("tasks", b'{"goal": "a", "sol1": "b", "sol2": "c", "label": 2}', ["2 is not in range"]),
    ("tasks", b'{"goal": "a", "sol1": "b", "sol2": "c", "label": ""}', ["none of its 1 rows"]),
    ("tasks", b'{"context": "a", "choices": ["b", "\\ud800"], "answer": 0}', ["surrogates"]),
    ("tasks", b'{"context": "a", "choices": ["b", "c"], "answer": 2}', ["its index from 0"]),
    ("tasks", b'{"context": "", "choices": ["b", "%s"], "answer": 0}' % (b"x" * 999), ["1 to 95"]),
    ("tasks", b'{"text": "a b"}\n' + json.dumps(CHOICES[0]).encode(), ["one file for each kind"]),
    ("custom_prompts", "nowhere.json", ["nowhere.json"]),
    ("model_path", "nowhere", ["nowhere"]),
    ("output_dir", "/dev/null/out", ["/dev/null/out", "name another"]),
]


@pytest.mark.parametrize(("flag", "value", "words"), BAD)
def test_mistakes_are_one_line_and_leave_nothing(flag, value, words, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if isinstance(value, bytes):
        kind = {b"{": "jsonl", b"[": "jsonl", b"\x1f": "gz"}.get(value[:1], "txt")
        Path(f"r.{kind}").write_bytes(value)
        value = f"r.{kind}"
    value = (value,) if flag == "tasks" else value
    with pytest.raises(UserError) as caught:
        evaluation.main(EvalConfig(**{"output_dir": "out"} | knobs(place) | {flag: value}))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not Path("out/results.json").exists()


# ---- results side by side, and against expectations


def variant(results, folder, change=lambda results: None):
    """Writes a copy of results with something changed; returns its folder."""
    results = copy.deepcopy(results)
    change(results)
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


@pytest.fixture
def compared(capsys):
    """compared(folder, ...) returns the printed comparison, assessed(folder) the assessment."""

    def call(*folders, function=evaluation.compare):
        function(ResultsConfig(tuple(map(str, folders))))
        return capsys.readouterr().out

    return call


@pytest.fixture
def assessed(compared):
    return functools.partial(compared, function=evaluation.assess)


def test_compare_says_what_was_measured_on_different_things(results, place, tmp_path, compared):
    def change(r):
        r["model"].update(tokenizer_sha256="x")
        r["perplexity"]["text"].update(sha256="another text of as many bytes")
        r["boolq"] = {"verdict": "not measured", "reason": "r"}

    same = compared(place / "out", variant(results, tmp_path / "same"))
    assert re.search(r"tasks.choices.jsonl.accuracy +33.3% +33.3%$", same, re.M)
    assert re.search(r"context +96 +96\nperplexity.stride +48 +48$", same, re.M)
    assert "DIFFERENT" not in same
    text = compared(place / "out", variant(results, tmp_path / "other", change))
    assert re.search(r"boolq.accuracy .*% +not measured$", text, re.M)
    different = re.findall(r"^(\S+) .*DIFFERENT$", text, re.M)
    assert different == ["model.tokenizer_sha256", "perplexity.text", "boolq.n"]


@pytest.mark.parametrize("name", ["demo", "tiny", "small", "advanced_example", "base"])
def test_the_size_class_of_a_preset_is_itself(name, results, tmp_path, assessed):  # trap B48
    cfg = configure(ModelConfig, [str(ROOT / f"configs/{name}.json")], foreign_keys=True)
    count = models.count_parameters(cfg)["non_embedding"]
    sizes = json.loads((evaluation.CONFIGS / "expected.json").read_text())["sizes"]
    assert sizes[name]["non_embedding"] == count
    for share in (0.8, 1, 1.2):
        changed = results | {"model": results["model"] | {"non_embedding": round(count * share)}}
        assert f"size class {name}:" in assessed(variant(changed, tmp_path / str(share)))


def test_each_metric_is_held_against_its_range(results, tmp_path, assessed):
    def change(r):
        r["model"]["non_embedding"] = 6_294_784
        r["perplexity"]["text"]["name"] = "WikiText-2 raw, test"
        r["perplexity"]["token_perplexity"], r["boolq"]["accuracy"] = 45.0, 0.5
        r["smoke"]["score"] = 0.9

    text = assessed(variant(results, tmp_path / "r", change))
    for pattern in (
        "size class tiny",
        "perplexity.token_perplexity +45 +40 to 80 +within +claim of the original README",
        "perplexity.token_perplexity +45 +50 to 80 +below",
        "boolq.accuracy +50.0% +55.0% to 65.0% +below",
        "smoke.score +0.9 +0.35 to 0.6 +above",
        "train longer while the validation loss falls",
    ):
        assert re.search(pattern, text), pattern
    change = lambda r: r["model"].update(non_embedding=50_000_000)
    text = assessed(variant(results, tmp_path / "other", change))
    assert "size class small" in text
    assert re.search("token_perplexity .* not comparable: measured on another text", text)


def test_the_command_line(results, place, tmp_path):
    """Three processes: the others call the same functions."""
    path = place / "out" / "results.json"
    (tmp_path / "cut.json").write_text(path.read_text()[:500])  # trap B47
    for words, status, text in (
        (["assess", str(path)], 0, "size class"),
        (["assess", str(tmp_path / "cut.json")], 1, "cut.json: not whole results of eval.py"),
        (["--model_path=nowhere", f"--output_dir={tmp_path / 'o'}"], 2, "nowhere: no such folder"),
    ):
        command = [python(), str(ROOT / "eval.py"), *words]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (status, int(status > 0))
        assert text in done.stdout + done.stderr


def test_broken_results_are_refused(results, tmp_path, assessed):
    places = [["model"], ["model", "non_embedding"], ["perplexity", "verdict"]]
    places += [["boolq", "verdict"], ["smoke", "responses"]]
    broken = [without(results, *place) for place in places]
    broken += [[], {}, results | {"boolq": []}, results | {"smoke": None}]
    broken.append(results | {"model": results["model"] | {"non_embedding": 0}})
    for content in broken:
        (tmp_path / "r.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"r\.json: not whole results of eval.py"):
            assessed(tmp_path / "r.json")
    with pytest.raises(UserError, match="one file"):
        assessed()


# ---- lm-eval on the same rows, and on the same folder

TEXTS = ["a lazy fox", "the dog"]
ARC = {"question": "Who jumps?", "choices": {"text": TEXTS, "label": ["1", "2"]}}
MMLU = {"question": " Who jumps? ", "choices": [*TEXTS, "no one", "B"]}
HELLASWAG = {"ctx": "not this", "ctx_a": "[header] How [title] to jump", "ctx_b": "then He"}
HELLASWAG |= {"activity_label": "Jumping", "endings": ["sits  down.", "[step] jumps. [title] x"]}
PIQA = {"goal": "To jump,", "sol1": TEXTS[0], "sol2": TEXTS[1]}
TASKS = {  # the file of lm-eval's task: rows, each with the index of its right choice
    "arc/arc_easy": [(ARC | {"answerKey": "2"}, 1), (ARC | {"answerKey": "1"}, 0)],
    "mmlu/default/mmlu_us_foreign_policy": [
        (MMLU | {"subject": "us_foreign_policy", "answer": answer}, answer) for answer in range(4)
    ],
    "mmlu/default/mmlu_anatomy": [(MMLU | {"subject": "anatomy", "answer": "B"}, 1)],
    "hellaswag/hellaswag": [(HELLASWAG | {"label": "1"}, 1), (HELLASWAG | {"label": "0"}, 0)],
    "piqa/piqa": [(PIQA | {"label": 1}, 1), (PIQA | {"label": 0}, 0)],
    "super_glue/boolq/default": [({**row, "label": n}, n) for n, row in enumerate(BOOLQ[:2])],
}


@pytest.mark.parametrize("name", TASKS)
def test_lm_eval_asks_the_same(name, tmp_path):
    lm_eval = pytest.importorskip("lm_eval.tasks")
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    rows, gold = zip(*TASKS[name])
    files = dict.fromkeys(("train", "validation", "test", "dev"), str(tmp_path / "rows.jsonl"))
    write_rows(tmp_path / "rows.jsonl", rows)
    settings = load_yaml(Path(lm_eval.__file__).parent / f"{name}.yaml")
    settings |= {"dataset_path": "json", "dataset_name": None}
    settings["dataset_kwargs"] = {"data_files": files, "cache_dir": str(tmp_path / "cache")}
    task = ConfigurableTask(config=settings)
    task.build_all_requests(rank=0, world_size=1)
    questions = [evaluation.to_question(row)[1] for row in rows]
    asked = [(context, choice) for context, choices, _ in questions for choice in choices]
    assert asked == [instance.args for instance in task.instances]
    targets = map(task.doc_to_target, task.eval_docs)
    letters = [n if isinstance(n, int) else "ABCD".index(n) for n in targets]
    assert [right for _, _, right in questions] == letters == list(gold)


def test_rows_without_an_answer_are_passed_over_and_counted(place, tmp_path, capsys):
    labels = [0, 1, -1, "1", "", None, "-1"]
    write_rows(tmp_path / "piqa.jsonl", [PIQA | {"label": label} for label in labels])
    got = measure(place, tmp_path, tasks=(str(tmp_path / "piqa.jsonl"),))["tasks"]
    (part,) = got.values()
    assert (part["shape"], part["n"], part["rows"], part["without_answer"]) == ("piqa", 3, 3, 4)
    assert part["majority"] == 2 / 3
    for key, right in ((None, None), ("", None), (1, 0), ("2", 1)):
        assert evaluation.to_question(ARC | {"answerKey": key})[1][2] == right
    assert (
        f"3 piqa questions of {tmp_path}/piqa.jsonl; 4 without an answer" in capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def lm(place):
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(place / "base"), device="cpu", dtype="float32", batch_size=3)


def ask_lm(lm, function, pairs):
    """Returns what a function of lm-eval's model finds for each tuple of arguments."""
    from lm_eval.api.instance import Instance

    requests = [Instance(function, {}, pair, 0) for pair in pairs]
    return getattr(lm, function)(requests, disable_tqdm=True)


def test_lm_eval_finds_the_same_perplexity(lm, place, tmp_path):
    got = measure(place, tmp_path, stride=CONTEXT, skip_boolq=True)["perplexity"]
    (found,) = ask_lm(lm, "loglikelihood_rolling", [(TEXT,)])
    assert got["nats"] == pytest.approx(-found, rel=1e-6)
    word_perplexity = math.exp(-found / len(re.split(r"\s+", TEXT)))
    assert got["word_perplexity"] == pytest.approx(word_perplexity, rel=1e-4)


@pytest.mark.parametrize("name", ["boolq", "choices", "last"])
def test_lm_eval_finds_the_same_likelihoods(name, lm, place):
    model, tokenizer = open_model(place / "base", "cpu", "fp32")
    rows = usable_rows(place / f"{name}.jsonl", evaluation.to_question)
    # "<s>" is BOS to its tokenizer; a context that does not fit it would cut off at the BOS
    rows = [row for row in rows if len(tokenizer.encode(row[2][0])) < CONTEXT - 9]
    pairs = [("<s>" + text, choice) for _, _, (text, choices, _) in rows for choice in choices]
    found = ask_lm(lm, "loglikelihood", pairs)
    encoded, _ = encode_questions(tokenizer, rows, CONTEXT)
    got = [pair for row in answer_scores(model, encoded, 5) for pair in row]
    assert [value for value, _ in got] == pytest.approx([value for value, _ in found], abs=1e-4)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in found]


# ---- scores: as one token at a time, as published tables say

SHAPE = {"n_layer": 2, "d_model": 32, "n_head": 4, "num_key_value_heads": 2, "d_ff": 64}
CFG = ModelConfig(**SHAPE, vocab_size=90, sequence_length=24, initializer_range=0.3)
BOS = CFG.bos_token_id


@pytest.fixture(scope="module", params=["math", "sdpa"])
def scored(request):
    torch.manual_seed(1)
    model = Llama(CFG).eval()
    model.use_attention(request.param)
    return model


def ids_of(count, seed=0):
    return np.random.default_rng(seed).integers(3, CFG.vocab_size, count).tolist()


@torch.no_grad()
def log_p(model, context, id):
    """log p(id | context), from the logits of exactly this context."""
    return model(torch.tensor([context]))[0, -1].double().log_softmax(-1)[id].item()


# ---- text


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 40))
def test_every_target_counts_once_with_as_much_context_as_promised(count, context, stride):
    stride = min(stride, context)
    targets = []
    for start, end, first in evaluation.windows(count, context, stride):
        assert end - start == min(context, count)
        assert first == 0 or first - start >= context - stride
        targets += range(first, end)
    assert targets == list(range(count))


@pytest.mark.parametrize("stride", [1, 5, 12, 24])
def test_a_text_scores_as_one_token_at_a_time(scored, stride):
    ids, context = ids_of(100), 24
    stream, expected = [BOS, *ids], 0.0
    for start, end, first in evaluation.windows(len(ids), context, stride):
        expected -= sum(log_p(scored, stream[start : at + 1], ids[at]) for at in range(first, end))
    nats = text_nats(scored, ids, BOS, context, stride, rows=3)
    assert nats == pytest.approx(expected, rel=1e-5)


def test_neither_threads_nor_the_batch_size_change_a_number(scored):
    results, before = [], torch.get_num_threads()
    for count, rows in ((2, 1), (3, 99), (1, 2)):
        torch.set_num_threads(count)
        nats = text_nats(scored, ids_of(500), BOS, 24, 7, rows)
        scores = chain.from_iterable(answer_scores(scored, questions_of(SIZES), rows))
        results.append([nats, *(value for value, _ in scores)])
        assert torch.get_num_threads() == count
    torch.set_num_threads(before)
    assert results[1] == pytest.approx(results[0], abs=1e-3)
    assert results[2] == pytest.approx(results[0], abs=1e-3)


def test_a_text_is_held_against_baselines():
    letters = SimpleNamespace(vocab_size=8, decode=lambda ids: "".join("abcd efg"[i] for i in ids))
    text, ids = "aaab", [0, 0, 0, 1]
    result = text_result(3.0, text, ids, letters)
    entropy = (-3 * math.log(3 / 4) - math.log(1 / 4)) / 4
    assert result["bits_per_byte"] == pytest.approx(3.0 / math.log(2) / 4)
    assert result["word_perplexity"] == pytest.approx(math.exp(3))
    baselines = result["baselines"]
    assert baselines["unigram"]["token_perplexity"] == pytest.approx(math.exp(entropy))
    assert baselines["uniform"]["token_perplexity"] == pytest.approx(8)
    assert (result["lossless"], result["verdict"]) == (True, "better than uniform, gzip")
    best = text_result(1.0, text, ids, letters)
    assert best["verdict"] == "better than uniform, unigram, gzip"
    lossy = "better than gzip; too low: the tokenizer loses parts of this text"
    assert text_result(99.0, "aaac", ids, letters)["verdict"] == lossy


# ---- answers


# (length of the context, [lengths of the answers])
SIZES = [(5, [1, 1]), (24, [1, 1]), (1, [1, 1]), (9, [1, 3]), (22, [3, 1, 2]), (7, [3])]
SIZES += [(20, [5, 5]), (3, [2])]


def questions_of(sizes):
    """Returns [(context, answers)] of random ids."""
    questions = []
    for n, (length, answers) in enumerate(sizes):
        context = [BOS, *ids_of(length - 1, n)]
        questions.append((context, [ids_of(size, 100 * n + k) for k, size in enumerate(answers)]))
    return questions


@torch.no_grad()
def one_by_one(model, context, answer):
    total, greedy = 0.0, True
    for at, id in enumerate(answer):
        total += log_p(model, context + answer[:at], id)
        greedy &= model(torch.tensor([context + answer[:at]]))[0, -1].argmax().item() == id
    return total, greedy


@pytest.mark.parametrize("rows", [1, 3, 99])
def test_answers_score_as_one_token_at_a_time(scored, rows):
    questions = questions_of(SIZES)
    context, answers = questions[3]
    with torch.no_grad():
        answers[0] = [scored(torch.tensor([context]))[0, -1].argmax().item()]  # one that is greedy
    seen = set()
    found = answer_scores(scored, questions, rows)
    for (context, answers), scores in zip(questions, found, strict=True):
        for answer, (got, greedy) in zip(answers, scores, strict=True):
            expected, best = one_by_one(scored, context, answer)
            assert (got, greedy) == (pytest.approx(expected, abs=1e-4), best)
            seen.add(greedy)
    assert seen == {True, False}


def yes_no(yes_odds, gold):
    """What `multiple_choice` says of a model that gives question n these log-odds of yes."""
    rows = [[0.0, odds] for odds in yes_odds]
    return multiple_choice(rows, [(2, 3)] * len(rows), gold, ["no", "yes"])


def test_a_model_that_always_says_yes_scores_the_yes_rate():  # trap B44
    gold = [1] * 62 + [0] * 38
    got = yes_no([4.0] * 100, gold)
    assert (got["accuracy"], got["majority"], got["n"]) == (0.62, 0.62, 100)
    assert got["verdict"] == "not distinguishable from the baseline, always answering 'yes' (62.0%)"


# Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3
NEWCOMBE = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)]
NEWCOMBE += [(0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]


@pytest.mark.parametrize(("hits", "n", "low", "high"), NEWCOMBE)
def test_wilson_intervals_are_those_of_the_table(hits, n, low, high):
    assert evaluation.wilson(hits, n) == pytest.approx((low, high), abs=5e-5)
    assert evaluation.wilson(n - hits, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(
    ("baseline", "words"),
    [(0.63, "not distinguishable from"), (0.5, "better than"), (0.7, "worse than")],
)
def test_a_verdict_needs_more_than_the_baseline(baseline, words):
    result = evaluation.accuracy([1] * 630 + [0] * 370, [1] * 1000, baseline, "b")  # 0.60 to 0.66
    assert result["verdict"] == f"{words} the baseline, b ({baseline:.1%})"
