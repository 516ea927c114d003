"""Sessions, status, backup, deleting and the report on the machine: run as a user runs them."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from lib.checkpoint import CHECKPOINT_FILES, seal
from lib.config import UserError, configure, read_object
from tests import ROOT
from tests.commands import flags_of, with_file
from tests.conftest import link_code
from tests.runs import DEFAULTS, train_to_end
from tests.warm import python
from tools import session, workspace
from tools.plan import card_plan
from train import PretrainConfig

fcntl = pytest.importorskip("fcntl")  # signals, links and locks as POSIX has them
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
STAGES = {"data", "pretrain", "samples", "sft", "dpo", "evaluate", "assess", "ask"}
TOY = {"n_layer": 1, "d_model": 32, "n_head": 2, "d_ff": 64, "sequence_length": 128}
TOY |= {"batch_size": 2, "eval_rows": 4, "sample_tokens": 2, "dtype": "fp32"}
TOY |= {"logging_steps": 1, "save_steps": 100000}


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_documents):
    """An empty clone as the current folder, with presets of toys."""
    link_code(tmp_path)
    texts = [{"text": text} for text in tiny_documents]
    data = {"input_path": "texts.json", "output_dir": "data/processed/toy", "vocab_size": 384}
    data |= {"train_ratio": 0.75, "use_minhash": False}
    for name, content in {"texts.json": texts, "data.json": data, "toy.json": TOY}.items():
        (tmp_path / name).write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*words):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([python(), "-m", *words], env=ONE_THREAD, text=True, **streams)


def run(*words, **env):
    """`python -m WORDS` to its end."""
    call, streams = [python(), "-m", *words], {"capture_output": True, "stdin": subprocess.DEVNULL}
    return subprocess.run(call, env=ONE_THREAD | env, text=True, timeout=300, **streams)


def outcomes(text):
    """The table at a session's end, as {stage: outcome}."""
    return dict(re.findall(r"^  (\w[\w +]*?) +[\d.]+ min  (.*)$", text, flags=re.M))


# ---- sessions


def test_a_session_is_stopped_by_ctrl_c_and_goes_on_where_it_was(folder):
    quick = ("tools.session", "quick", "--data=data.json", "--config=toy.json")
    first, text = start(*quick, "--minutes=5"), ""
    for line in first.stdout:
        text += line
        if re.match(r"step +5 ", line):
            first.send_signal(signal.SIGINT)  # to the session alone, which passes it on, once
            break
    text += first.stdout.read()
    assert first.wait() == 130, text
    assert "stopped at step" in text
    assert "Traceback" not in text
    assert outcomes(text) == {"data": "done", "pretrain": "stopped"}
    assert next(folder.glob("sessions/*.log")).read_text() == text
    assert re.search(r"\n  python train\.py .*run\.json --resume_from_checkpoint=auto", text)

    again = run(*quick, "--minutes=0.6")
    assert again.returncode == 0, again.stdout[-3000:]
    table = outcomes(again.stdout)
    assert "resumed from checkpoints/pretrain/quick/step_" in again.stdout
    assert {table.pop(name) for name in STAGES - {"sft", "dpo"}} == {"done"}
    assert set(table.values()) <= {"done", "skipped: no time left"}
    assert Path("evaluation_results/quick/report.md").is_file()


def test_a_failed_stage_ends_the_session_and_the_exit_status_says_so(folder):
    Path("toy.json").write_text(json.dumps(TOY | {"n_head": 3}))
    done = run("tools.session", "quick", "--data=data.json", "--config=toy.json")
    assert done.returncode == 1
    assert outcomes(done.stdout) == {"data": "done", "pretrain": "failed: status 2"}
    assert "\nerror: pretrain failed: status 2; its last lines above say why\n" in done.stdout


def test_trainings_share_the_minutes_that_are_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    box, calls = session.Session("x", session.SessionConfig(minutes=100)), []
    monkeypatch.setattr(box, "execute", lambda stage, words: calls.append(words[-2]))
    left, outcomes = 100 * (1 - session.RESERVED) - session.START, []
    for stage, spent in (("pretrain", 10), ("sft", 12), ("dpo", 95)):
        box.start -= 60 * (spent - box.spent)
        outcomes.append(box.outcome_of(stage, [f"{stage}.py"]))
    minutes = [float(word.removeprefix("--max_minutes=")) for word in calls]
    assert minutes == pytest.approx([(left - 10) * 0.7, (left - 12) * 2 / 3], abs=0.01)
    assert outcomes == ["done", "done", "skipped: no time left"]
    box.minutes = math.inf  # pipeline-full: no clock
    assert box.outcome_of("dpo", ["dpo.py"]) == "done"
    assert calls[2:] == ["--output_dir=checkpoints/dpo/x"]


def test_past_its_minutes_a_session_measures_what_it_trained_and_else_skips(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for stages, outcome in (({"look": ""}, "skipped: no time left"), ({"pretrain": ""}, "done")):
        box = session.Session("x", session.SessionConfig(minutes=1, stages=stages))
        monkeypatch.setattr(box, "execute", lambda stage, words: 0)
        assert box.outcome_of("look", []) == "done"
        box.start -= 61
        assert box.outcome_of("look", []) == outcome


PRESETS = {path.stem: path for path in session.PRESETS.glob("*.json")}


@pytest.mark.parametrize("name", [n for n in PRESETS if "minutes" in read_object(PRESETS[n])])
def test_every_command_of_a_session_is_one_that_its_program_takes(name, folder):
    presets = [str(PRESETS[each]) for each in ("quick", name)]
    box = session.Session(name, configure(session.SessionConfig, [*presets, "--model_path=a b"]))
    words = box.words() | box.model_words()
    for command in box.cfg.stages.values():
        script, *rest = with_file(shlex.split(command.format(**words)))
        if script == "-c":
            continue
        word = next((w for w in rest[:1] if re.fullmatch("[a-z][a-z_-]+", w)), None)
        known = flags_of(script, word)
        assert {w.partition("=")[0].removeprefix("--") for w in rest if w[:2] == "--"} <= known
        assert all((ROOT / w).is_file() for w in rest if w.endswith(".json") and w[:2] != "--")
    shapes = {str(p.relative_to(ROOT)) for p in ROOT.glob("configs/*.json")}
    shapes = {p for p in shapes if "n_layer" in read_object(ROOT / p)}
    assert name != "architecture" or shapes <= {*" ".join(box.cfg.stages.values()).split()}


def test_the_newest_twenty_logs_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sessions").mkdir()
    for n in range(30):
        Path(f"sessions/20200101_0000{n:02}.log").touch()
    Path("sessions/notes.log").touch()  # not a session's
    session.Session("x", session.SessionConfig()).log.close()
    names = {path.name for path in Path("sessions").iterdir()}
    assert len(names) == session.LOGS + 1
    assert names >= {"notes.log", "20200101_000011.log"}
    assert "20200101_000010.log" not in names


# ---- status


@pytest.fixture
def trained(folder, tiny_dataset):
    """The folder with a dataset and a finished training of eight steps."""
    shutil.copytree(tiny_dataset, "data/processed/tiny")
    train_to_end(folder / "checkpoints/pretrain/toy", data_path=str(folder / "data/processed/tiny"))
    (folder / "checkpoints/pretrain/toy.log").unlink()
    return folder


def status(capsys):
    workspace.status()
    return capsys.readouterr().out


def test_status_tells_what_is_whole_and_what_is_not(trained, capsys):
    manifest = json.loads(Path("data/processed/tiny/manifest.json").read_text())
    entries = [entry for split in manifest["splits"].values() for entry in split]
    documents, tokens = (sum(entry[key] for entry in entries) for key in ("documents", "tokens"))
    text, home = status(capsys), Path("checkpoints/pretrain/toy")
    assert f"tiny: {documents:,} documents, {tokens:,} tokens, vocabulary 384" in text
    assert f"(pretrain): complete | step {DEFAULTS['max_steps']}, loss " in text
    assert "create_sample_datasets" in text

    weights = home / "final" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "final/ is BROKEN: model.safetensors: checksum mismatch" in status(capsys)
    with pytest.raises(UserError, match="no complete pretrain model"):
        workspace.newest_folder("pretrain")
    shutil.rmtree(home / "final")
    text = status(capsys)
    assert "not complete, step_000008 | step 8, loss " in text
    assert f"train.py {home}/step_000008/run.json --resume_from_checkpoint=auto" in text
    shard = Path("data/processed/tiny") / entries[0]["bin"]
    shard.write_bytes(shard.read_bytes()[:-2])
    assert "data/processed/tiny: BROKEN" in status(capsys)


def sealed(folder, **config):
    """A checkpoint that is whole by its manifest."""
    for name in (*CHECKPOINT_FILES, "model.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(config))
    seal(folder)


def test_status_after_kills(folder, capsys):
    renamed = Path("checkpoints/pretrain/renamed")
    for step in ("step_000004", "step_000008"):
        sealed(renamed / step, output_dir="checkpoints/pretrain/toy", max_steps=8)
    (renamed / "step_000008" / "run.json").unlink()
    (renamed / "metrics.jsonl").write_text('{"step": 1, "loss": 6.5}\n{"step": 2, "lo')
    text = status(capsys)
    resume = f"{renamed}/step_000004/run.json --resume_from_checkpoint=auto --output_dir={renamed}"
    assert f"train.py {resume}\n" in text
    assert f"{renamed} (pretrain): not complete, step_000004 | step 1, loss 6.5" in text
    (renamed / "step_000004" / "manifest.json").unlink()
    Path("checkpoints/empty/final").mkdir(parents=True)
    text = status(capsys)
    assert f"{renamed} (pretrain): not complete, no whole checkpoint | step 1" in text
    assert "checkpoints/empty (pretrain): final/ is BROKEN: no manifest.json" in text
    assert "next:\n  python data.py configs/datasets/docstrings.json" in text


# ---- backup


def test_a_backup_holds_what_cannot_be_made_again_and_follows_no_link(trained):
    Path("secret").write_text("not of this project")
    Path("checkpoints/pretrain/toy/final/link").symlink_to("../../../../secret")
    workspace.backup(workspace.WorkspaceConfig(output="b/one.tar.gz"))
    with tarfile.open("b/one.tar.gz") as tar:
        names = tar.getnames()
        links = {entry.name for entry in tar if entry.issym()}
    toy = "checkpoints/pretrain/toy"
    kept = {"final/model.safetensors", "step_000008/train_state/state.pt", "metrics.jsonl"}
    assert {f"{toy}/{name}" for name in kept} <= set(names)
    assert not [n for n in names if "step_000004" in n]
    assert links == {f"{toy}/final/link", "configs"}


def test_a_backup_keeps_the_newest_whole_checkpoint(folder):
    toy = Path("checkpoints/pretrain/toy")
    for name in ("step_000004", "step_000008"):
        sealed(toy / name)
    (toy / "metrics.jsonl").touch()
    (toy / "step_000008" / "run.json").unlink()
    os.link(toy / "metrics.jsonl", toy / "metrics.again")
    workspace.backup(workspace.WorkspaceConfig(output="one.tar.gz"))
    with tarfile.open("one.tar.gz") as tar:
        names = set(tar.getnames())
    assert {f"{toy}/{name}" for name in ("step_000004/run.json", "metrics.again")} <= names
    assert not [name for name in names if "step_000008" in name]


@pytest.mark.parametrize(
    ("output", "secret", "message"),
    [
        ("file/b.tar.gz", "x", "no backup was kept: File exists; name another --output"),
        ("file", "x", "file: exists; name another --output"),
        ("", "", "BACKUP_PASSPHRASE is empty"),
    ],
)
def test_a_backup_that_cannot_be_written_is_one_line(output, secret, message, folder, monkeypatch):
    Path("file").touch()
    monkeypatch.setenv("BACKUP_PASSPHRASE", secret)
    with pytest.raises(UserError, match=message):
        workspace.backup(workspace.WorkspaceConfig(output=output))
    assert not Path("backups").exists()


def test_what_a_killed_backup_left_is_cleaned_away(folder):
    Path("backups/.tmp-x").mkdir(parents=True)
    for name in (".tmp-x/backup.tar.gz", "20260102_030405.tar.gz"):
        Path("backups", name).write_text("half")
    workspace.clean_caches(workspace.WorkspaceConfig(yes="1"))
    assert os.listdir("backups") == ["20260102_030405.tar.gz"]


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_an_encrypted_backup_opens_with_its_passphrase_alone(folder, monkeypatch, capsys):
    Path("evaluation_results").mkdir()
    Path("evaluation_results/results.json").write_text("{}")
    monkeypatch.setenv("BACKUP_PASSPHRASE", "a b\"c' $d")
    workspace.backup(workspace.WorkspaceConfig(output="kept.enc"))
    command = capsys.readouterr().out.split("to unpack: ")[1]
    page = (ROOT / "docs" / "SESSIONS.md").read_text(encoding="utf-8")
    assert command.replace("kept.enc", "backups/20260102_030405.tar.gz.enc") in page
    command = command.replace("kept.enc", "../kept.enc")
    assert not tarfile.is_tarfile("kept.enc")
    Path("there").mkdir()
    subprocess.run(command, shell=True, check=True, cwd="there")
    assert Path("there/evaluation_results/results.json").read_text() == "{}"
    monkeypatch.setenv("BACKUP_PASSPHRASE", "another")
    failed = subprocess.run(command, shell=True, cwd="there", capture_output=True)
    assert failed.returncode != 0


@pytest.mark.parametrize("script", ["exit 3", 'for last; do :; done; echo other > "$last"'])
def test_a_backup_that_openssl_spoils_leaves_nothing(script, folder):
    Path("bin").mkdir()
    Path("bin/openssl").write_text(f"#!/bin/sh\n{script}\n")
    Path("bin/openssl").chmod(0o755)
    env = {"PATH": f"{Path('bin').resolve()}:{os.environ['PATH']}", "BACKUP_PASSPHRASE": "x"}
    done = run("tools.workspace", "backup", "--output=b/one", **env)
    assert (done.returncode, [*Path("b").iterdir()]) == (2, [])
    assert "no backup was kept" in done.stderr
    assert done.stderr.count("\n") == 1


# ---- deleting


def test_nothing_is_deleted_without_a_yes(folder):
    Path("checkpoints/sft").mkdir(parents=True)
    for command in ("clean-checkpoints", "clean"):
        Path("__pycache__").mkdir(exist_ok=True)
        done = run("tools.workspace", command)
        assert done.returncode == 2
        assert "YES=1" in done.stderr
    assert Path("checkpoints/sft").is_dir()
    assert run("tools.workspace", "clean-checkpoints", "--yes=1").returncode == 0
    assert not Path("checkpoints/sft").exists()
    assert run("tools.workspace", "clean-sessions").stdout == "nothing to delete\n"


def test_of_a_link_only_the_link_is_deleted(folder):
    Path("elsewhere/a").mkdir(parents=True)
    for path in ("checkpoints/pretrain", "checkpoints"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).symlink_to(folder / "elsewhere")
        workspace.clean_checkpoints(workspace.WorkspaceConfig(yes="1"))
        assert not Path(path).is_symlink()
        assert Path("elsewhere/a").is_dir()


def test_a_training_that_runs_is_not_deleted(folder):
    Path("checkpoints/pretrain/a").mkdir(parents=True)
    with open("checkpoints/pretrain/a/run.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use"):
            workspace.clean_checkpoints(workspace.WorkspaceConfig(yes="1"))
    assert Path("checkpoints/pretrain/a").is_dir()


# ---- the machine


def test_check_env_names_what_is_missing_and_fails_then(folder):
    whole = run("tools.workspace", "check-env")
    assert whole.returncode == 0, whole.stdout
    assert re.search(
        r"^machine +\d+ cores, load [\d.]+, memory [\d.]+ GB", whole.stdout, flags=re.M
    )
    packages = [line.split()[0] for line in whole.stdout.splitlines() if "(optional)" in line]
    assert {"flash-attn", "gguf", "datasets"} <= set(packages)
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").symlink_to(sys.executable)
    (folder / ".venv/pyvenv.cfg").write_text(f"home = {Path(sys.base_prefix) / 'bin'}\n")
    words = [".venv/bin/python", "-m", "tools.workspace", "check-env"]
    bare = subprocess.run(words, capture_output=True, text=True)
    assert bare.returncode == 1
    assert re.search(r"missing: torch, .*sentencepiece.*; install them: make install", bare.stdout)


def test_monitor_shows_the_newest_training_and_ends_without_a_trace(trained):
    process = start("tools.workspace", "monitor")
    line = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert process.stdout.read().count("Traceback") == 0
    assert "checkpoints/pretrain/toy: step 8, loss " in line
    assert re.search(r"load [\d.]+, memory [\d.]+ GB, ", line)


@pytest.mark.parametrize("card", ["rtx4090", "rtx3080"])
def test_a_preset_fits_its_card_at_the_same_tokens_per_step(card, folder):
    output = f"new/{card}.json"
    options = {"config": "configs/base.json", "gpu": card, "output": output}
    workspace.config_gpu(workspace.WorkspaceConfig(**options))
    preset = json.loads(Path(output).read_text())
    assert preset["batch_size"] * preset["gradient_accumulation_steps"] == 64
    assert preset["n_layer"] == 24
    for rows, fits in ((preset["batch_size"], "yes"), (2 * preset["batch_size"], "NO")):
        cfg = configure(PretrainConfig, [output, f"--batch_size={rows}"])
        assert re.search(rf"fits +{fits}", card_plan(cfg, card))


def test_a_preset_that_cannot_be_made_is_refused(folder):
    Path("huge.json").write_text(json.dumps({"n_layer": 500, "d_model": 8192, "n_head": 64}))
    with pytest.raises(UserError, match=r"toy.json: exists"):
        workspace.config_gpu(workspace.WorkspaceConfig(output="toy.json", gpu="rtx4090"))
    with pytest.raises(UserError, match="one row needs more"):
        workspace.config_gpu(workspace.WorkspaceConfig(config="huge.json", gpu="rtx3070"))
    assert not Path("configs/rtx4090.json").exists()
