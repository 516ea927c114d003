"""make: the command of every target, given to a Python that notes its words; then a real chain."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib

import pytest

from tests import ROOT
from tests.commands import TARGETS, flags_of, with_file
from tests.conftest import link_code

pytestmark = pytest.mark.skipif(
    not shutil.which("make") or os.name == "nt", reason="needs make and a shell"
)

ORIGINAL = """
help install install-flash check-env prepare prepare-owt prepare-wiki prepare-wt103 prepare-demo
pretrain-tiny pretrain-small pretrain-base sft dpo evaluate evaluate-quick evaluate-detailed
assess-performance serve session-status session-cleanup session-quick session-prototype
session-experiment session-evaluation session-debug session-architecture pipeline-full
resume-pretrain-tiny create-sample-datasets test-pipeline backup clean clean-checkpoints monitor
config-rtx4090"""
ORIGINAL = set(ORIGINAL.split())
WITH_SCRIPT = [t for t in TARGETS if t not in ("help", "install", "install-flash")]  # awk and pip

NASTY = "a b\"c'd $(touch pwned) `touch pwned` $HOME ;touch pwned #x"
DATASET = "DATA_PATH=--data_path"
MODEL = "MODEL_PATH=--model_path"
STEPS = "BATCH_SIZE=--batch_size LEARNING_RATE=--learning_rate MAX_STEPS=--max_steps"
STEPS += " MAX_MINUTES=--max_minutes WARMUP_STEPS=--warmup_steps OUTPUT=--output_dir"
STEPS += " GRADIENT_ACCUMULATION_STEPS=--gradient_accumulation_steps"
BOX = "SESSION_TIME=--minutes"
REACHES = {  # target: VARIABLE=the flag that it sets, VARIABLE= for a word without a flag
    "prepare": "RAW_DATASET=--input_path CONFIG= OUTPUT=--output_dir",
    "prepare-demo": "OUTPUT=--output_dir",
    "pretrain-tiny": f"CONFIG= {DATASET} {STEPS}",
    "pretrain-base": STEPS,
    "resume-pretrain-tiny": DATASET,
    "sft": f"SFT_DATASET=--dataset_path TEMPLATE=--prompt_template CONFIG= {MODEL} {STEPS}",
    "dpo": f"DPO_DATASET=--dataset_path CONFIG= {MODEL} {STEPS}",
    "grpo": f"GRPO_DATASET=--dataset_path CONFIG= {MODEL} {STEPS}",
    "evaluate": f"CONFIG= {MODEL} OUTPUT=--output_dir",
    "assess-performance": "OUTPUT=",
    "serve": MODEL,
    "server": f"{MODEL} HOST=--host PORT=--port",
    "export": f"{MODEL} OUTPUT=--output FORMAT=--format",
    "session-quick": f"{BOX} CONFIG=--config",
    "session-evaluation": f"{BOX} {MODEL}",
    "session-architecture": f"{BOX} CONFIG=--config",
    "session-debug": BOX,
    "test-pipeline": f"{BOX} CONFIG=--config",
    "session-cleanup": "YES=--yes",
    "clean": "YES=--yes",
    "clean-checkpoints": "YES=--yes",
    "backup": "OUTPUT=--output",
    "config-rtx4090": "CONFIG=--config GPU=--gpu OUTPUT=--output",
}
REACHES = {
    target: dict(pair.split("=") for pair in pairs.split()) for target, pairs in REACHES.items()
}

NOTING = """#!{python} -IS
import json, os, sys
words = sys.argv[1:]
if "newest" in words:
    print("checkpoints/new est")
else:
    with open("calls.jsonl", "a") as file:
        file.write(json.dumps(words) + "\\n")
sys.exit(7 if os.environ.get("FAILS") in words[:3] else 0)
"""


def fresh_clone(folder, python):
    """The files of a clone, and a .venv whose python is the text `python`."""
    link_code(folder)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").write_text(python)
    (folder / ".venv" / "bin" / "python").chmod(0o755)
    for name in ("installed", "installed-dev"):
        (folder / ".venv" / name).touch()
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return fresh_clone(tmp_path_factory.mktemp("noting"), NOTING.format(python=sys.executable))


def make(folder, *words, **variables):
    """Runs make with nothing of our own environment that it would pass on."""
    env = {name: os.environ.get(name, "/") for name in ("PATH", "HOME")} | {"OMP_NUM_THREADS": "1"}
    streams = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    return subprocess.run(["make", *words], cwd=folder, env=env | variables, **streams)


def calls(folder, *words, **variables):
    """Returns the words of every Python that make called."""
    (folder / "calls.jsonl").unlink(missing_ok=True)
    done = make(folder, *words, **variables)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]


def test_every_target_of_the_original_is_there_and_help_lists_all(clone):
    assert set(TARGETS) >= ORIGINAL
    text = make(clone, "help").stdout
    assert re.findall(r"^  make ([a-z0-9-]+)", text, flags=re.M) == TARGETS
    assert make(clone).stdout == text
    listed = re.search(r"TARGETS := (.*?)\n\.PHONY", (ROOT / "Makefile").read_text(), flags=re.S)[1]
    assert sorted(listed.replace("\\", "").split()) == sorted(TARGETS)


@pytest.mark.parametrize("target", TARGETS[1:])
def test_a_clean_clone_installs_first(target, tmp_path):
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    lines = make(tmp_path, target, "--dry-run").stdout.splitlines()
    assert lines[0] == "python3 -m venv .venv"
    assert "pip install -r requirements.txt" in lines[1]


def test_pip_and_uv_install_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    expected = {"requirements.txt": project["dependencies"], "requirements-dev.txt": extras["dev"]}
    for name, packages in expected.items():
        lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
        assert list(filter(None, lines)) == packages
    assert extras["cpu"] == extras["gpu"] == project["dependencies"][:1]  # torch, once


@pytest.mark.parametrize("target", WITH_SCRIPT)
def test_a_recipe_calls_a_script_with_flags_that_it_knows(target, clone):
    variables = dict.fromkeys(REACHES.get(target, {}), "x")
    for words in [*calls(clone, target), *calls(clone, target, **variables)]:
        assert "" not in words
        if words[0] == "-m" and words[1] in ("pytest", "ruff"):
            continue
        script, *words = with_file(words)
        assert (ROOT / script).is_file()
        word = next((w for w in words[:1] if re.fullmatch(r"[a-z][a-z_-]+", w)), None)
        known = flags_of(script, word)
        for flag in (w.split("=")[0] for w in words if w.startswith("--")):
            assert flag.removeprefix("--") in known, (script, word, flag)
        for preset in (w for w in words if w.endswith(".json") and "=" not in w):
            assert (ROOT / preset).is_file()


@pytest.mark.parametrize("target", REACHES)
@pytest.mark.parametrize("way", ["command line", "environment"])
def test_a_variable_reaches_its_command_as_it_is_and_only_when_set(target, way, clone):
    given = dict.fromkeys(REACHES[target], NASTY)
    if way == "command line":
        words = calls(clone, target, *(f"{name}={value}" for name, value in given.items()))[-1]
    else:
        words = calls(clone, target, **given)[-1]
    bare = calls(clone, target)[-1]
    for flag in REACHES[target].values():
        word = f"{flag}={NASTY}" if flag else NASTY
        assert word in words, words
        assert word not in bare
    assert not (clone / "pwned").exists()


def test_the_newest_model_is_taken_where_none_is_named(clone):
    for target, flag in (
        ("sft", "model_path"),
        ("evaluate", "model_path"),
        ("pretrain-tiny", "data_path"),
    ):
        assert f"--{flag}=checkpoints/new est" in calls(clone, target)[0]


@pytest.mark.parametrize("target", WITH_SCRIPT)
def test_a_target_fails_when_its_command_fails(target, clone):
    first, *_ = calls(clone, target)
    script = first[1] if first[0] == "-m" else first[0]
    assert make(clone, target, FAILS=script).returncode == 2
    if "--model_path=checkpoints/new est" in first:  # nothing is called where nothing is newest
        (clone / "calls.jsonl").unlink()
        assert make(clone, target, FAILS="newest").returncode == 2
        assert not (clone / "calls.jsonl").exists()


TINY = {"n_layer": 1, "d_model": 32, "n_head": 2, "d_ff": 64, "sequence_length": 128}
TINY |= {"batch_size": 2, "gradient_accumulation_steps": 1, "warmup_steps": 1, "eval_rows": 4}
TINY |= {"sample_tokens": 2, "dtype": "fp32"}


def test_the_chain_from_text_to_backup_in_an_empty_folder(tmp_path, tiny_documents):
    folder = tmp_path / "a clone"
    folder.mkdir()
    fresh_clone(folder, f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    rows = [{"prompt": f"Say {n}.", "response": str(n)} for n in range(40)]
    pairs = [{"prompt": f"Say {n}.", "chosen": str(n), "rejected": "no, no"} for n in range(40)]
    files = {"tiny.json": TINY, "rows.json": rows, "pairs.json": pairs}
    files["eval.json"] = {"perplexity_path": "README.md", "skip_boolq": True, "max_new_tokens": 2}
    files["texts.json"] = [{"text": text} for text in tiny_documents]
    files["data.json"] = {"input_path": "texts.json", "output_dir": "data/processed/t"}
    files["data.json"] |= {"vocab_size": 384, "train_ratio": 0.75, "use_minhash": False}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    steps = {"MAX_STEPS": "2", "WARMUP_STEPS": "1", "BATCH_SIZE": "2"}
    printed = {}
    for target, variables in {
        "prepare": {"CONFIG": "data.json"},
        "pretrain-tiny": {"CONFIG": "tiny.json", "MAX_STEPS": "2"},
        "sft": {"SFT_DATASET": "rows.json", **steps},
        "dpo": {"DPO_DATASET": "pairs.json", **steps},
        "evaluate-quick": {"CONFIG": "eval.json"},
        "assess-performance": {},
        "session-status": {},
        "backup": {"OUTPUT": "kept.tar.gz"},
    }.items():
        done = make(folder, target, **variables)
        assert done.returncode == 0, (target, done.stdout[-2000:], done.stderr[-2000:])
        printed[target] = done.stdout
    status = printed["session-status"]
    assert re.search(r"data/processed/t: \d+ documents, [\d,]+ tokens, vocabulary 384", status)
    for name in ("pretrain/tiny (pretrain)", "sft (sft)", "dpo (dpo)"):
        assert f"checkpoints/{name}: complete | step 2, loss" in status
    assert "evaluation_results: bits per byte" in status
    assert "sample.py --chat --model_path=checkpoints/dpo" in status
    with tarfile.open(folder / "kept.tar.gz") as tar:
        for entry in (e for e in tar if e.isfile()):
            assert tar.extractfile(entry).read() == (folder / entry.name).read_bytes()
        names = tar.getnames()
    kept = {"dpo/final/model.safetensors", "sft/step_000002/manifest.json"}
    assert {f"checkpoints/{name}" for name in kept} <= set(names)
    assert make(folder, "clean-checkpoints").returncode == 2  # nobody to ask
    assert (folder / "checkpoints" / "dpo" / "final").is_dir()
    assert make(folder, "clean-checkpoints", YES="1").returncode == 0
    assert not (folder / "checkpoints").exists()
    assert make(folder, "evaluate").returncode == 2  # and there is no model any more
