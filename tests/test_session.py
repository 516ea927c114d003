"""Sessions, status, backup, deleting and the machine's report: as a user starts them, against the disk."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from lib.checkpoint import CHECKPOINT_FILES, seal
from lib.config import UserError, configure
from tests import ROOT
from tests.conftest import link_code
from tests.runs import DEFAULTS, train_to_end
from tests.warm import python
from tools import host, session, workspace
from tools.plan import card_plan
from train import PretrainConfig

fcntl = pytest.importorskip("fcntl")  # signals, links and locks as POSIX has them
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
STAGES = ["data", "pretrain", "samples", "sft", "dpo"]
STAGES += ["evaluate base", "evaluate", "compare", "assess", "ask"]

TOY = {
    "n_layer": 1,
    "d_model": 32,
    "n_head": 2,
    "d_ff": 64,
    "sequence_length": 128,
    "batch_size": 2,
}
TOY |= {
    "eval_rows": 4,
    "sample_tokens": 2,
    "dtype": "fp32",
    "logging_steps": 1,
    "save_steps": 100000,
}


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_documents):
    """An empty clone to stand in, with presets of toys."""
    link_code(tmp_path)
    texts = [{"text": text} for text in tiny_documents]
    data = {"input_path": "texts.json", "output_dir": "data/processed/toy", "vocab_size": 384}
    data |= {"train_ratio": 0.75, "use_minhash": False}
    for name, content in {"texts.json": texts, "data.json": data, "toy.json": TOY}.items():
        (tmp_path / name).write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*words):
    return subprocess.Popen(
        [python(), *words],
        env=ONE_THREAD,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*words, **env):
    call = [python(), *map(str, words)]
    return subprocess.run(
        call,
        env=ONE_THREAD | env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )


def outcomes(text):
    """The table at a session's end, as {stage: outcome}."""
    return dict(re.findall(r"^  (\w[\w +]*?) +[\d.]+ min  (.*)$", text, flags=re.M))


# ---- time boxes


def test_a_session_is_stopped_by_ctrl_c_and_goes_on_where_it_was(folder):
    one = start(
        "-m", "tools.session", "quick", "--minutes=5", "--data=data.json", "--config=toy.json"
    )
    seen = ""
    for line in one.stdout:
        seen += line
        if re.match(r"step +5 ", line):
            one.send_signal(signal.SIGINT)  # to the session alone, which passes it on, once
            break
    text = seen + one.stdout.read()
    assert one.wait() == 130, text
    assert "stopped at step" in text
    assert "Traceback" not in text
    table = outcomes(text)
    assert [*table] == STAGES
    assert (table["data"], table["pretrain"]) == ("done", "stopped")
    assert {table[name] for name in STAGES[2:]} == {"skipped: stopped"}
    log = next(folder.glob("sessions/*.log"))
    assert re.fullmatch(r"\d{8}_\d{6}\.log", log.name)
    assert log.read_text() == text
    resume = re.search(
        r"^  \S+ (train\.py .*run\.json --resume_from_checkpoint=auto)$", text, flags=re.M
    )
    assert Path(resume[1].split()[1]).is_file()

    again = run(
        "-m", "tools.session", "quick", "--minutes=0.5", "--data=data.json", "--config=toy.json"
    )
    assert again.returncode == 0, again.stdout[-3000:]
    table = outcomes(again.stdout)
    assert [*table] == STAGES
    assert table["data"] == "done before"
    assert "resumed from checkpoints/pretrain/quick/step_" in again.stdout
    assert table["pretrain"] == "done"
    assert {table[name] for name in ("samples", "evaluate", "assess", "ask")} == {"done"}
    tuning = {table[name] for name in ("sft", "dpo", "evaluate base")}
    assert tuning <= {"done", "skipped: no time left", "skipped: needs sft"}
    assert Path("evaluation_results/quick/report.md").is_file()


def test_a_failed_stage_takes_along_what_needs_it_and_the_exit_status_says_so(folder):
    Path("toy.json").write_text(json.dumps(TOY | {"n_head": 3}))
    done = run("-m", "tools.session", "quick", "--data=data.json", "--config=toy.json")
    assert done.returncode == 1
    table = outcomes(done.stdout)
    assert table["data"] == "done"
    assert table["pretrain"] == "failed: status 2"
    assert table["sft"] == "skipped: needs pretrain, samples"
    assert "failed: pretrain" in done.stdout


def test_trainings_share_what_the_other_stages_leave(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shares = {"data": 0, "a": 0.6, "between": 0, "b": 0.3, "c": 0.1}
    box = session.Box(
        "x", 100, [session.Stage(name, list, (), share) for name, share in shares.items()]
    )
    left = 100 * (1 - session.RESERVED)
    box.rows = [("data", "done", 10.0)]
    box.began -= 60 * 10
    assert box.training_minutes() == pytest.approx(
        (left - 10 - 3 * session.STARTING) * 0.6, abs=0.01
    )
    box.rows += [
        ("a", "done", 1.0),
        ("between", "done", 1.0),
    ]  # a ended early: its time is the others'
    box.began -= 60 * 2
    assert box.training_minutes() == pytest.approx(
        (left - 12 - 2 * session.STARTING) * 0.75, abs=0.01
    )
    box.began -= 60 * 80
    assert box.reason_to_skip(box.stages[3]) == "skipped: no time left"
    assert box.reason_to_skip(session.Stage("short", list)) is None
    box.log.close()


def test_the_newest_twenty_logs_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sessions").mkdir()
    for n in range(30):
        Path(f"sessions/20200101_0000{n:02}.log").touch()
    Path("sessions/notes.log").touch()  # not ours
    session.open_log().close()
    names = sorted(path.name for path in Path("sessions").iterdir())
    assert len(names) == session.LOGS_KEPT + 1
    assert "20200101_000011.log" in names
    assert not {"20200101_000010.log"} & set(names)


def test_a_session_says_what_it_trains_on_when_the_hub_is_out_of_reach(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    wanted = "configs/datasets/demo_tiny.json"
    preset, note = session.choose_data(session.BoxConfig(), wanted)
    assert preset == "configs/datasets/docstrings.json"
    assert re.search(
        "documentation, in place of .*demo_tiny.json: (HF_HUB_OFFLINE is set|the package)", note
    )
    Path("data/processed/demo_tiny").mkdir(parents=True)
    Path("data/processed/demo_tiny/manifest.json").touch()
    assert session.choose_data(session.BoxConfig(), wanted)[0] == wanted


def test_the_proof_of_a_resume_can_fail(tmp_path):
    for name, data in {"a": b"1", "b": b"1", "c": b"2"}.items():
        (tmp_path / name / "final").mkdir(parents=True)
        (tmp_path / name / "final" / "model.safetensors").write_bytes(data)
    session.same(session.SameConfig(str(tmp_path / "a"), str(tmp_path / "b")))
    with pytest.raises(UserError, match="differ"):
        session.same(session.SameConfig(str(tmp_path / "a"), str(tmp_path / "c")))
    with pytest.raises(UserError, match=r"d/final/model.safetensors: not found"):
        session.same(session.SameConfig(str(tmp_path / "a"), str(tmp_path / "d")))


def test_a_session_without_a_clock_leaves_a_presets_own_length_alone(tmp_path):
    (tmp_path / "own.json").write_text('{"num_train_epochs": 1, "n_layer": 2}')
    assert session.unboxed("") == ["--num_train_epochs=3", "--warmup_steps=20"]
    assert session.unboxed(str(tmp_path / "own.json")) == ["--warmup_steps=20"]


def test_a_flag_of_another_session_is_refused():
    for word, flag in (
        ("debug", "--model_path=x"),
        ("debug", "--config=x"),
        ("evaluation", "--config=x"),
    ):
        with pytest.raises(UserError, match="unknown option"):
            configure(session.COMMANDS[word][1], [flag])


def test_a_preset_is_run_forward_and_backward(tmp_path, capsys):
    path = tmp_path / "one.json"
    path.write_text(json.dumps({k: TOY[k] for k in ("n_layer", "d_model", "n_head", "d_ff")}))
    session.smoke(session.SmokeConfig(str(path)))
    loss, uniform = re.search(
        r"loss ([\d.]+) \(ln 32,768 = ([\d.]+)\)", capsys.readouterr().out
    ).groups()
    assert float(loss) == pytest.approx(float(uniform), abs=0.5)


# ---- status


@pytest.fixture
def trained(folder, tiny_dataset):
    """The folder with a dataset and a finished training of eight steps."""
    shutil.copytree(tiny_dataset, "data/processed/tiny")
    train_to_end(folder / "checkpoints/pretrain/toy", data_path=str(folder / "data/processed/tiny"))
    (folder / "checkpoints/pretrain/toy.log").unlink()
    return folder


def told(capsys):
    workspace.status()
    return capsys.readouterr().out


def test_status_tells_what_is_whole_and_what_is_not(trained, capsys):
    manifest = json.loads(Path("data/processed/tiny/manifest.json").read_text())
    entries = [entry for split in manifest["splits"].values() for entry in split]
    documents, tokens = (sum(entry[key] for entry in entries) for key in ("documents", "tokens"))
    text, home = told(capsys), Path("checkpoints/pretrain/toy")
    assert f"tiny: {documents:,} documents, {tokens:,} tokens, vocabulary 384, verified" in text
    last = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    bits = [record["val_bits_per_byte"] for record in last if "val_bits_per_byte" in record][-1]
    assert (
        f"(pretrain): complete, step {DEFAULTS['max_steps']} of 8, val_bits_per_byte {bits:.4f}"
        in text
    )
    assert "create_sample_datasets" in text

    weights = home / "final" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "final/ is BROKEN: model.safetensors: checksum mismatch" in told(capsys)
    with pytest.raises(UserError, match="no complete pretrain model"):
        workspace.newest("pretrain")
    shutil.rmtree(home / "final")
    text = told(capsys)
    assert "not complete, step 8 of 8" in text
    assert f"train.py {home}/step_000008/run.json --resume_from_checkpoint=auto" in text
    shard = Path("data/processed/tiny") / entries[0]["bin"]
    shard.write_bytes(shard.read_bytes()[:-2])
    assert "data/processed/tiny: BROKEN" in told(capsys)


def sealed(folder, **config):
    """A checkpoint that is whole by its manifest."""
    for name in (*CHECKPOINT_FILES, "model.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(config))
    seal(folder)


def test_status_after_kills(folder, capsys):
    other = Path("checkpoints/pretrain/other")
    for step in ("step_000004", "step_000008"):
        sealed(other / step, output_dir="checkpoints/pretrain/toy", max_steps=8)
    (other / "step_000008" / "run.json").unlink()
    line = f"train.py {other}/step_000004/run.json --resume_from_checkpoint=auto --output_dir={other}\n"
    (other / "metrics.jsonl").write_text('{"step": 1, "loss": 6.5}\n')  # the last one logged
    assert line in (text := told(capsys))
    assert f"{other} (pretrain): not complete, step 8," in text
    (other / "step_000004" / "manifest.json").unlink()
    Path("checkpoints/empty/final").mkdir(parents=True)
    work = Path("data/processed/.docs.partial")
    work.mkdir(parents=True)
    (work / "manifest.json").write_text(
        "{}"
    )  # the last word of a preparation, then its folder is renamed
    (work / "progress.json").write_text('{"documents": 4200, "parts": 2}')
    text = told(capsys)
    assert f"{other} (pretrain): not complete, no checkpoint is whole, step 8" in text
    assert (
        "checkpoints/empty (pretrain): final/ is BROKEN: no manifest.json: it was never finished, no"
        in text
    )
    assert "1970" not in text
    assert (
        "data/processed/docs: not complete, 4,200 documents read; the command that began it" in text
    )
    assert ".partial" not in text
    assert "next (there is no model yet):\n  make prepare\n" in text


def test_status_of_nothing(folder, capsys):
    text = told(capsys)
    assert text.count("  none") == 3
    assert "data.py configs/datasets/docstrings.json" in text


# ---- backup


def test_a_yes_that_is_none_is_told_what_there_is():
    with pytest.raises(UserError, match=r"yes must be one of '', 1, got string \"yes\""):
        configure(workspace.CleanConfig, ["--yes=yes"])


def test_a_backup_holds_what_cannot_be_made_again_and_follows_no_link(trained, capsys):
    Path("secret").write_text("not of this project")
    Path("checkpoints/pretrain/toy/final/link").symlink_to("../../../../secret")
    workspace.backup(workspace.BackupConfig("b/one.tar.gz"))
    with tarfile.open("b/one.tar.gz") as tar:
        names = tar.getnames()
    toy = "checkpoints/pretrain/toy"
    assert {f"{toy}/final/model.safetensors", f"{toy}/step_000008/train_state/state.pt"} <= set(
        names
    )
    assert f"{toy}/metrics.jsonl" in names
    assert not [
        name for name in names if "step_000004" in name or "link" in name or "configs" in name
    ]
    out = capsys.readouterr().out
    assert "left out: checkpoints/pretrain/toy/final/link, a link" in out
    assert "left out: configs, a link" in out
    with pytest.raises(UserError, match="exists"):
        workspace.backup(workspace.BackupConfig("b/one.tar.gz"))


def test_a_backup_keeps_the_newest_whole_checkpoint_and_tells_what_is_broken(folder, capsys):
    toy = Path("checkpoints/pretrain/toy")
    for name in ("step_000004", "step_000008", "final"):
        sealed(toy / name)
    (toy / "metrics.jsonl").touch()
    (toy / "step_000008" / "run.json").unlink()
    (toy / "final" / "train_state" / "state.pt").unlink()
    os.link(toy / "metrics.jsonl", toy / "metrics.again")
    workspace.backup(workspace.BackupConfig("one.tar.gz"))
    assert (
        f"warning: {toy}/final is BROKEN (train_state/state.pt is missing) and"
        in capsys.readouterr().out
    )
    with tarfile.open("one.tar.gz") as tar:
        names = set(tar.getnames())
    assert {
        f"{toy}/step_000004/run.json",
        f"{toy}/final/model.safetensors",
        f"{toy}/metrics.again",
    } <= names
    assert not [name for name in names if "step_000008" in name]


def test_where_no_backup_can_be_written_one_line_says_so(folder):
    Path("file").touch()
    with pytest.raises(UserError, match=r"^file: cannot be written \(.+\); name another --output$"):
        workspace.backup(workspace.BackupConfig("file/b.tar.gz"))


def test_what_a_killed_backup_left_is_cleaned_away(folder, capsys):
    Path("backups").mkdir()
    for name in (".tmp-20260102_030405.tar.gz", "20260102_030405.tar.gz"):
        Path("backups", name).write_text("half")
    workspace.clean(workspace.CleanConfig("1"))
    assert os.listdir("backups") == ["20260102_030405.tar.gz"]


def test_an_empty_passphrase_is_a_mistake(folder, monkeypatch):
    monkeypatch.setenv("BACKUP_PASSPHRASE", "")
    with pytest.raises(UserError, match="BACKUP_PASSPHRASE is empty"):
        workspace.backup(workspace.BackupConfig())
    assert not Path("backups").exists()


def test_the_page_says_how_a_backup_is_unpacked():
    page = (ROOT / "docs" / "SESSIONS.md").read_text(encoding="utf-8")
    for name, secret in {
        "backups/20260102_030405.tar.gz": False,
        "backups/20260102_030405.tar.gz.enc": True,
    }.items():
        assert f"    {workspace.unpack(name, secret)}\n" in page


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_an_encrypted_backup_opens_with_its_passphrase_alone(folder, monkeypatch, capsys):
    Path("evaluation_results").mkdir()
    Path("evaluation_results/results.json").write_text("{}")
    monkeypatch.setenv("BACKUP_PASSPHRASE", "a b\"c' $d")
    workspace.backup(workspace.BackupConfig("kept.enc"))
    command = capsys.readouterr().out.split("to unpack: ")[1]
    assert "a b" not in command
    assert not tarfile.is_tarfile("kept.enc")
    Path("there").mkdir()
    subprocess.run(command.replace("kept.enc", "../kept.enc"), shell=True, check=True, cwd="there")
    assert Path("there/evaluation_results/results.json").read_text() == "{}"
    monkeypatch.setenv("BACKUP_PASSPHRASE", "another")
    failed = subprocess.run(
        command.replace("kept.enc", "../kept.enc"), shell=True, cwd="there", capture_output=True
    )
    assert failed.returncode != 0


@pytest.mark.parametrize(
    ("when", "status"), [("exit 3", 3), ('case "$*" in *" -d"*) exit 4;; esac', 4)]
)
def test_a_backup_that_cannot_be_encrypted_or_read_back_leaves_nothing(when, status, folder):
    Path("evaluation_results").mkdir()
    Path("evaluation_results/results.json").write_bytes(
        os.urandom(200_000)
    )  # more than a pipe holds
    Path("bin").mkdir()
    Path("bin/openssl").write_text(f"#!/bin/sh\n{when}\nexec cat\n")
    Path("bin/openssl").chmod(0o755)
    path = f"{Path('bin').resolve()}:{os.environ['PATH']}"
    done = run(
        "-m", "tools.workspace", "backup", "--output=b/one", PATH=path, BACKUP_PASSPHRASE="x"
    )
    assert (done.returncode, [*Path("b").iterdir()]) == (2, [])
    assert done.stderr == f"error: openssl failed with status {status}; nothing was kept\n"


# ---- deleting


def test_nothing_is_deleted_without_a_yes(folder):
    Path("checkpoints/sft").mkdir(parents=True)
    Path("sessions").mkdir()
    for word in ("clean-checkpoints", "clean"):
        Path("__pycache__").mkdir(exist_ok=True)
        done = run("-m", "tools.workspace", word)
        assert done.returncode == 2
        assert "YES=1" in done.stderr
    assert Path("checkpoints/sft").is_dir()
    assert run("-m", "tools.workspace", "clean-checkpoints", "--yes=1").returncode == 0
    assert not Path("checkpoints/sft").exists()
    assert run("-m", "tools.workspace", "clean-sessions").stdout == "nothing to delete\n"


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/pretrain"])
def test_of_a_link_only_the_link_is_deleted(place, folder, capsys):
    Path("elsewhere/a").mkdir(parents=True)
    Path(place).parent.mkdir(exist_ok=True)
    Path(place).symlink_to(folder / "elsewhere")
    workspace.clean_checkpoints(workspace.CleanConfig("1"))
    assert not Path(place).is_symlink()
    assert Path("elsewhere/a").is_dir()


def test_a_training_that_runs_is_not_deleted(folder):
    Path("checkpoints/pretrain/a").mkdir(parents=True)
    with open("checkpoints/pretrain/a/run.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use"):
            workspace.clean_checkpoints(workspace.CleanConfig("1"))
    assert Path("checkpoints/pretrain/a").is_dir()


# ---- the machine


def test_check_env_names_what_is_missing_and_fails_then(folder):
    whole = run("-m", "tools.host", "check-env")
    assert whole.returncode == 0, whole.stdout
    assert re.search(rf"^cores +{host.cores()}$", whole.stdout, flags=re.M)
    bare = run("-S", "-m", "tools.host", "check-env", PYTHONPATH="")  # without site-packages
    assert bare.returncode == 1
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").symlink_to(sys.executable)
    (folder / ".venv/pyvenv.cfg").write_text(f"home = {Path(sys.base_prefix) / 'bin'}\n")
    words = [".venv/bin/python", "-m", "tools.host", "check-env"]
    inside = subprocess.run(words, capture_output=True, text=True).stdout
    assert "; .venv/bin/python -m pip install -r requirements.txt" in inside
    assert re.search(r"missing: torch, numpy, .*pip install -r requirements.txt", bare.stdout)


def test_monitor_shows_the_newest_training_and_ends_without_a_trace(trained):
    one = start("-m", "tools.host", "monitor")
    line = one.stdout.readline()
    one.send_signal(signal.SIGINT)
    assert one.wait(30) == 130
    assert one.stdout.read().count("Traceback") == 0
    assert "checkpoints/pretrain/toy: step 8 | loss" in line
    assert re.search(r"cpu +\d+% of \d+ cores \| memory [\d.]+ GB of", line)
    done = run("-m", "tools.host", "monitor", "--once")
    assert len(done.stdout.splitlines()) == 1


def test_a_preset_fits_its_card_at_the_same_tokens_per_step(folder):
    sizes = {}
    for card in ("rtx4090", "rtx3080"):
        host.config_gpu(host.GpuConfig("configs/base.json", card, f"new/{card}.json"))
        written = json.loads(Path(f"new/{card}.json").read_text())
        sizes[card] = written["batch_size"]
        assert written["batch_size"] * written["gradient_accumulation_steps"] == 64
        assert written["n_layer"] == 24
        plan = "\n".join(card_plan(configure(PretrainConfig, [f"new/{card}.json"]), card))
        assert re.search(r"fits +yes", plan)
        twice = ["--batch_size=" + str(2 * written["batch_size"])]
        plan = "\n".join(card_plan(configure(PretrainConfig, [f"new/{card}.json", *twice]), card))
        assert re.search(r"fits +NO", plan)
    assert sizes["rtx4090"] > sizes["rtx3080"]
    with pytest.raises(UserError, match="exists"):
        host.config_gpu(host.GpuConfig("configs/small.json", "rtx4090", "new/rtx4090.json"))
    with pytest.raises(UserError, match="not known"):
        host.config_gpu(host.GpuConfig("configs/small.json", "abacus", "new.json"))
    shape = configure(PretrainConfig, ["configs/base.json"])
    assert host.rows_that_fit(shape, 1e9)[0] == 0


def test_a_preset_for_a_card_that_is_not_there_is_refused(folder):
    done = run("-m", "tools.host", "config-gpu", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "--gpu=rtx4090" in done.stderr
    assert not Path("configs/rtx4090.json").exists()


# ---- the page


def test_the_minutes_on_the_page_are_those_of_the_sessions():
    page = (ROOT / "docs" / "SESSIONS.md").read_text(encoding="utf-8")
    minutes = dict(re.findall(r"^\| `make session-(\w+)` \| (\d+) min", page, flags=re.M))
    source = (ROOT / "tools" / "session.py").read_text()
    assert len(minutes) == 5
    for name, count in minutes.items():
        body = source.split(f"def {name}(cfg)")[1].split("\n\n\n")[0]
        assert f"or {count}" in body, name


@pytest.mark.parametrize("script", ["tools.session", "tools.workspace", "tools.host"])
def test_a_reader_that_has_seen_enough_of_the_help_is_no_failure_to_tell(script):
    process = subprocess.Popen(
        [sys.executable, "-m", script, "--help"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == b""
