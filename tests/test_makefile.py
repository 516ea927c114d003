"""make: the command of every target, given to a Python that notes its words; then a real chain."""

import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from contextlib import redirect_stdout

import pytest

from tests import ROOT
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
SCRIPTLESS = {"help", "install", "install-flash"}  # awk and pip

NASTY = "a b\"c'd $(touch pwned) `touch pwned` $HOME ;touch pwned #x"
REACHES = {  # target: {variable: the words it becomes}
    "prepare": {"RAW_DATASET": "--input_path={}", "CONFIG": "{}", "OUTPUT": "--output_dir={}"},
    "prepare-demo": {"OUTPUT": "--output_dir={}"},
    "pretrain-tiny": {
        **{"CONFIG": "{}", "DATA_PATH": "--data_path={}", "BATCH_SIZE": "--batch_size={}"},
        **{"LEARNING_RATE": "--learning_rate={}", "MAX_STEPS": "--max_steps={}"},
        **{"MAX_MINUTES": "--max_minutes={}", "WARMUP_STEPS": "--warmup_steps={}"},
        "OUTPUT": "--output_dir={}",
        "GRADIENT_ACCUMULATION_STEPS": "--gradient_accumulation_steps={}",
    },
    "pretrain-base": {"BATCH_SIZE": "--batch_size={}"},
    "resume-pretrain-tiny": {"DATA_PATH": "--data_path={}"},
    "sft": {
        "SFT_DATASET": "--dataset_path={}",
        "MODEL_PATH": "--model_path={}",
        "BATCH_SIZE": "--batch_size={}",
    }
    | {"TEMPLATE": "--prompt_template={}", "CONFIG": "{}"},
    "dpo": {"DPO_DATASET": "--dataset_path={}", "MODEL_PATH": "--model_path={}", "CONFIG": "{}"},
    "evaluate": {"MODEL_PATH": "--model_path={}", "OUTPUT": "--output_dir={}", "CONFIG": "{}"},
    "assess-performance": {"OUTPUT": "{}"},
    "serve": {"MODEL_PATH": "--model_path={}"},
    "server": {"MODEL_PATH": "--model_path={}", "HOST": "--host={}", "PORT": "--port={}"},
    "export": {"MODEL_PATH": "--model_path={}", "OUTPUT": "--output={}", "FORMAT": "--format={}"},
    "session-quick": {"SESSION_TIME": "--minutes={}", "CONFIG": "--config={}"},
    "session-evaluation": {"SESSION_TIME": "--minutes={}", "MODEL_PATH": "--model_path={}"},
    "session-architecture": {"SESSION_TIME": "--minutes={}", "CONFIG": "--config={}"},
    "session-debug": {"SESSION_TIME": "--minutes={}"},
    "test-pipeline": {"SESSION_TIME": "--minutes={}"},
    "session-cleanup": {"YES": "--yes={}"},
    "clean": {"YES": "--yes={}"},
    "clean-checkpoints": {"YES": "--yes={}"},
    "backup": {"OUTPUT": "--output={}"},
    "config-rtx4090": {"CONFIG": "--config={}", "GPU": "--gpu={}", "OUTPUT": "--output={}"},
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
    known = {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        "OMP_NUM_THREADS": "1",
    }
    call = ["make", *words]
    return subprocess.run(
        call,
        cwd=folder,
        env=known | variables,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def calls(folder, *words, **variables):
    """Returns the words of every Python that make called."""
    (folder / "calls.jsonl").unlink(missing_ok=True)
    done = make(folder, *words, **variables)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]


def targets():
    return re.findall(r"^([a-z0-9-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.M)


@pytest.fixture(scope="module")
def flags_of():
    """What `python SCRIPT [WORD] --help` lists, each asked once, in this process."""
    found = {}

    def flags(script, word):
        if (script, word) not in found:
            argv, text = sys.argv, io.StringIO()
            sys.argv = [str(ROOT / script), *([word] if word else []), "--help"]
            with redirect_stdout(text), pytest.raises(SystemExit) as end:
                runpy.run_path(sys.argv[0], run_name="__main__")
            sys.argv = argv
            assert end.value.code == 0
            found[script, word] = set(re.findall(r"^(--\w+)", text.getvalue(), flags=re.M))
        return found[script, word]

    return flags


def test_every_target_of_the_original_is_there_and_help_lists_all(clone):
    assert set(targets()) >= ORIGINAL
    text = make(clone, "help").stdout
    assert re.findall(r"^  make ([a-z0-9-]+)", text, flags=re.M) == targets()
    assert make(clone).stdout == text
    listed = re.search(r"TARGETS := (.*?)\n\.PHONY", (ROOT / "Makefile").read_text(), flags=re.S)[1]
    assert sorted(listed.replace("\\", "").split()) == sorted(targets())


@pytest.mark.parametrize("target", [t for t in targets() if t != "help"])
def test_a_clean_clone_installs_first(target, tmp_path):
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    lines = make(tmp_path, target, "--dry-run").stdout.splitlines()
    assert lines[0] == "python3 -m venv .venv"
    assert "pip install -r requirements.txt" in lines[1]


@pytest.mark.parametrize("target", [t for t in targets() if t not in SCRIPTLESS])
def test_a_recipe_calls_a_script_with_flags_that_it_knows(target, clone, flags_of):
    variables = dict.fromkeys(REACHES.get(target, {}), "x")
    for words in [*calls(clone, target), *calls(clone, target, **variables)]:
        assert "" not in words
        if words[0] == "-m":
            if words[1] in ("pytest", "ruff"):
                continue
            words = [words[1].replace(".", "/") + ".py", *words[2:]]
        assert (ROOT / words[0]).is_file()
        named = words[1:2] and words[1] != "x" and re.fullmatch(r"[a-z][a-z_-]+", words[1])
        word = words[1] if named else None
        known = flags_of(words[0], word)
        for flag in (w.split("=")[0] for w in words if w.startswith("--")):
            assert flag in known, (words[0], word, flag)
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
    for form in REACHES[target].values():
        assert form.format(NASTY) in words, words
        assert form.format(NASTY) not in bare
    assert not (clone / "pwned").exists()


def test_the_newest_model_is_taken_where_none_is_named(clone):
    assert "--model_path=checkpoints/new est" in calls(clone, "sft")[0]
    assert "--model_path=checkpoints/new est" in calls(clone, "evaluate")[0]
    words = calls(clone, "pretrain-tiny")[0]
    assert words[:2] == ["train.py", "configs/tiny.json"]
    assert "--data_path=checkpoints/new est" in words


@pytest.mark.parametrize("target", [t for t in targets() if t not in SCRIPTLESS])
def test_a_target_fails_when_its_command_fails(target, clone):
    first, *_ = calls(clone, target)
    script = first[1] if first[0] == "-m" else first[0]
    assert make(clone, target, FAILS=script).returncode == 2


@pytest.mark.parametrize("target", ["pretrain-tiny", "sft", "evaluate", "serve"])
def test_a_target_fails_when_there_is_nothing_newest(target, clone):
    (clone / "calls.jsonl").unlink(missing_ok=True)
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
    files["data.json"] = {
        "input_path": "texts.json",
        "output_dir": "data/processed/t",
        "vocab_size": 384,
    }
    files["data.json"] |= {"train_ratio": 0.75, "use_minhash": False}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    steps = {"MAX_STEPS": "2", "WARMUP_STEPS": "1", "BATCH_SIZE": "2"}
    told = {}
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
        told[target] = done.stdout
    status = told["session-status"]
    assert re.search(r"data/processed/t: \d+ documents, [\d,]+ tokens, vocabulary 384", status)
    for name in (
        "checkpoints/pretrain/tiny (pretrain)",
        "checkpoints/sft (sft)",
        "checkpoints/dpo (dpo)",
    ):
        assert f"{name}: complete | step 2, loss" in status
    assert "evaluation_results: checkpoints/dpo" in status
    assert "sample.py --chat --model_path=checkpoints/dpo" in status
    with tarfile.open(folder / "kept.tar.gz") as tar:
        for entry in (e for e in tar if e.isfile()):
            assert tar.extractfile(entry).read() == (folder / entry.name).read_bytes()
        names = tar.getnames()
    assert {
        "checkpoints/dpo/final/model.safetensors",
        "checkpoints/sft/step_000002/manifest.json",
    } <= set(names)
    assert make(folder, "clean-checkpoints").returncode == 2  # nobody to ask
    assert (folder / "checkpoints" / "dpo" / "final").is_dir()
    assert make(folder, "clean-checkpoints", YES="1").returncode == 0
    assert list((folder / "checkpoints").iterdir()) == []
    assert make(folder, "evaluate").returncode == 2  # and there is no model any more
