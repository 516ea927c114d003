"""What a training survives: kill -9 at any moment, damage, signals, a rival in its folder, a full disk."""

import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib import checkpoint
from lib import runtime as world
from lib.checkpoint import checkpoints, problem_with, seal
from tests import ROOT
from tests.runs import ONE_THREAD, PATIENCE, begin, differences, losses, names, refused, words
from tests.runs import train_to_end as trained
from tests.warm import python

KILLS = int(os.environ.get("KILLS", 20))
SEED = int(os.environ.get("SEED", 0)) or random.SystemRandom().randrange(1, 1 << 32)


@pytest.fixture(scope="module")
def knobs(tiny_dataset):
    return {"data_path": tiny_dataset, "dropout": 0.1, "save_steps": 2, "keep_last": 2}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, knobs):
    """The run that nothing happened to."""
    return trained(tmp_path_factory.mktemp("straight") / "straight", **knobs)


def resumed(out, **knobs):
    return trained(out, resume_from_checkpoint="auto", **knobs)


def assert_as_if_nothing_happened(out, straight):
    assert names(out) == names(straight)
    assert not differences(out / "final", straight / "final")
    for folder in checkpoints(straight):
        assert not differences(out / folder.name, folder)
    assert losses(out) == losses(straight)


# ---- kill -9


def test_killed_at_random_moments_it_resumes_every_time_and_ends_the_same(
    tmp_path, knobs, straight
):
    began = time.monotonic()  # the server is warm: `straight` was made by it
    trained(tmp_path / "again", **knobs)
    length, chance, kills, rounds = time.monotonic() - began, random.Random(SEED), 0, 0
    print(f"SEED={SEED} repeats these moments of an undisturbed run of {length:.2f} s")
    while kills < KILLS:
        out, finished, rounds = tmp_path / f"killed{rounds}", False, rounds + 1
        while not finished:
            one = begin(out, resume_from_checkpoint="auto", **knobs)
            if kills < KILLS:
                one.ranks[0].join(chance.uniform(0, length))
            else:
                one.wait()
            one.kill()
            finished = one.ranks[0].exitcode == 0
            kills += not finished
            assert finished or one.ranks[0].exitcode == -signal.SIGKILL, one.text
        assert_as_if_nothing_happened(out, straight)
    print(f"{kills} kills in {rounds} runs")


def die(point):
    """Ends this process as kill -9 would: nothing is flushed, closed or tidied up."""
    os.write(1, f"died {point}".encode())
    os._exit(137)


def dying(point, passage):
    """Patches the call in, before or after which this process is to die at the given passage."""
    name, wanted, moment = POINTS[point]
    original, left = getattr(*PLACES[name]), [passage]

    def patched(subject, *args, **kwargs):
        path = args[0] if name == "save" else subject
        call = functools.partial(original, subject, *args, **kwargs)
        result = call() if moment == "after" else None
        if wanted in str(path) and (name != "rmtree" or path.exists()):
            left[0] -= 1
            if left[0] == 0 and moment == "amid":
                tear(name, path, call)
            if left[0] == 0:
                die(point)
        return result if moment == "after" else call()

    setattr(*PLACES[name], patched)


def tear(name, path, finish):
    """Leaves half of what the call would have written or deleted."""
    if name == "rmtree":
        (path / "model.safetensors").unlink()
    else:
        finish()
        os.truncate(path, path.stat().st_size // 2)


PLACES = {
    "mkdir": (os, "mkdir"),
    "save": (torch, "save"),
    "seal": (checkpoint, "seal"),
    "write_text": (Path, "write_text"),
    "unlink": (os, "unlink"),
    "rmtree": (shutil, "rmtree"),
    "replace": (os, "replace"),
}
IN_A_CHECKPOINT = {
    "after the hidden folder is made": ("mkdir", ".tmp-step", "after"),
    "after the random numbers are written": ("save", "rng_", "after"),
    "in the middle of state.pt": ("save", "state.pt", "amid"),
    "before the manifest": ("seal", ".tmp-step", "before"),
    "in the middle of the manifest": ("write_text", "manifest.json", "amid"),
    "after the manifest": ("seal", ".tmp-step", "after"),
    "before the rename": ("replace", ".tmp-step", "before"),
    "after the rename": ("replace", ".tmp-step", "after"),
}
AFTERWARDS = {
    "after the manifest of an old one is deleted": ("unlink", "manifest.json", "after"),
    "in the middle of deleting an old one": ("rmtree", "/step_", "amid"),
    "before the model folder is renamed": ("replace", ".tmp-final", "before"),
    "after the model folder is renamed": ("replace", ".tmp-final", "after"),
}
AFTERWARDS_AT = [
    (p, n) for p in AFTERWARDS for n in (1, 2) if n == 1 or "old one" in p
]  # 4 is the last save
CUTTING = {
    "in the middle of cutting the log": ("write_text", "metrics", "amid"),
    "before the cut log is renamed": ("replace", "metrics", "before"),
}
POINTS = IN_A_CHECKPOINT | AFTERWARDS | CUTTING


@pytest.mark.parametrize(
    ("point", "passage"),
    [*((point, n) for point in IN_A_CHECKPOINT for n in (1, 3, 4)), *AFTERWARDS_AT],
    ids=str,
)
def test_killed_at_this_point_it_resumes_and_ends_the_same(
    tmp_path, knobs, straight, point, passage
):
    out = tmp_path / "out"
    one = begin(out, before=functools.partial(dying, point, passage), **knobs)
    assert one.wait() == [137], one.text
    assert f"died {point}" in one.text
    resumed(out, **knobs)
    assert_as_if_nothing_happened(out, straight)


def test_a_checkpoint_that_replaces_another_is_never_lost_between_the_two(
    tmp_path, knobs, straight
):
    out = tmp_path / "out"
    shutil.copytree(straight, out)
    shutil.rmtree(out / "final")
    last = checkpoints(out)[0]
    shutil.copytree(last, out / f".tmp-{last.name}")  # whole, and not renamed yet
    (last / "manifest.json").unlink()  # the one it replaces, half deleted
    resumed(out, **knobs)
    assert f"resumed from {last}" in out.with_suffix(".log").read_text()
    assert_as_if_nothing_happened(out, straight)
    assert not list(out.glob(".tmp-*"))


@pytest.mark.parametrize("point", CUTTING)
def test_killed_while_it_cuts_the_log_it_loses_no_line(tmp_path, knobs, straight, point):
    out = tmp_path / "out"
    shutil.copytree(straight, out)
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "step_000008")
    one = begin(
        out,
        before=functools.partial(dying, point, 1),
        resume_from_checkpoint="auto",
        **knobs,
    )
    assert one.wait() == [137], one.text
    resumed(out, **knobs)
    assert losses(out) == losses(straight)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_ranks_killed_ends_the_other_and_both_resume(tmp_path, knobs, rank):
    straight = trained(tmp_path / "straight", ranks=2, **knobs)
    out = tmp_path / "out"
    point = functools.partial(dying_rank, rank)
    one = begin(out, ranks=2, before=point, **knobs)
    codes = one.wait()
    assert codes[rank] == 137
    assert codes[1 - rank] == 2
    assert "Traceback" not in one.text
    assert f"error: rank {1 - rank} lost another rank, whose own message says why (" in one.text
    trained(out, ranks=2, resume_from_checkpoint="auto", **knobs)
    assert_as_if_nothing_happened(out, straight)


def dying_rank(rank):
    if os.environ["RANK"] == str(rank):
        dying("after the random numbers are written", 2)


# ---- damaged checkpoints

Damage = namedtuple("Damage", "do says")


def cut(share):
    def do(folder):
        path = folder / "train_state" / "state.pt"
        size = path.stat().st_size
        os.truncate(path, {"none": 0, "half": size // 2, "almost": size - 1}[share])

    return do


def flip(folder, name="model.safetensors"):
    path = folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def manifest(text=None, change=None):
    def do(folder):
        path = folder / "manifest.json"
        if change:
            content = json.loads(path.read_text())
            change(content)
            path.write_text(json.dumps(content))
        elif text is None:
            path.unlink()
        else:
            path.write_text(text)

    return do


def swap(folder):
    path = folder / "train_state" / "rng_00000.pt"
    path.unlink()
    path.mkdir()


DAMAGES = {
    "cut to nothing": Damage(cut("none"), "train_state/state.pt has 0 bytes, expected"),
    "cut in half": Damage(cut("half"), "train_state/state.pt has"),
    "cut by a byte": Damage(cut("almost"), "train_state/state.pt has"),
    "a bit flipped in the weights": Damage(flip, "model.safetensors: checksum mismatch (expected "),
    "a bit flipped in the state": Damage(
        lambda folder: flip(folder, "train_state/state.pt"),
        "train_state/state.pt: checksum mismatch",
    ),
    "a bit flipped in run.json": Damage(
        lambda folder: flip(folder, "run.json"), "run.json: checksum mismatch"
    ),
    "no manifest": Damage(manifest(), "no manifest.json: it was never finished"),
    "an empty manifest": Damage(manifest(""), "manifest.json is not readable"),
    "a garbled manifest": Damage(
        manifest('{"format": 1, "files": ['), "manifest.json is not readable"
    ),
    "a manifest of lists": Damage(
        manifest('{"format": 1, "files": []}'), "manifest.json is not readable"
    ),
    "a deep manifest": Damage(manifest("[" * 100_000), "manifest.json is not readable"),
    "a wrong size": Damage(
        manifest(change=lambda m: m["files"]["config.json"].update(bytes=7)), "config.json has"
    ),
    "a wrong hash": Damage(
        manifest(change=lambda m: m["files"]["config.json"].update(sha256=7)),
        "config.json: checksum mismatch",
    ),
    "a newer format": Damage(
        manifest(change=lambda m: m.update(format=2)), "format 2, this program reads 1"
    ),
    "a name that leads out": Damage(
        manifest(change=lambda m: m["files"].update({"../run.lock": m["files"]["run.json"]})),
        "illegal file name '../run.lock'",
    ),
    "half a manifest": Damage(
        manifest(change=lambda m: m["files"].pop("run.json")), "does not list a whole checkpoint"
    ),
    "a file gone": Damage(
        lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"
    ),
    "a folder for a file": Damage(swap, "train_state/rng_00000.pt is missing"),
    "nothing left": Damage(
        lambda folder: [shutil.rmtree(folder), folder.mkdir()], "no manifest.json"
    ),
}


@pytest.fixture
def damaged(tmp_path, straight):
    """A run that ended before its model folder was written: step 6 and step 8 are there."""
    shutil.copytree(straight, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "final")
    return tmp_path / "out"


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_found_and_named_and_the_previous_one_used(damaged, damage):
    damage.do(damaged / "step_000008")
    assert damage.says in problem_with(damaged / "step_000008")
    told, cfg = [], SimpleNamespace(resume_from_checkpoint="auto", output_dir=damaged)
    assert checkpoint.find_checkpoint(cfg, told.append) == damaged / "step_000006"
    (warning,) = told
    assert warning.startswith("warning: step_000008: ")
    assert warning.endswith("; going back to step_000006")
    assert damage.says in warning


@pytest.mark.parametrize(
    "name", ["cut in half", "a deep manifest", "a folder for a file", "nothing left"]
)
def test_a_run_goes_on_from_before_the_damage_and_ends_the_same(damaged, knobs, straight, name):
    DAMAGES[name].do(damaged / "step_000008")
    resumed(damaged, **knobs)
    lines = damaged.with_suffix(".log").read_text().splitlines()
    assert len([line for line in lines if line.startswith("warning: step_000008: ")]) == 1
    assert len([line for line in lines if line.startswith("warning: ")]) == 1
    assert_as_if_nothing_happened(damaged, straight)


def test_with_no_sound_checkpoint_it_says_why_of_each_and_does_nothing(damaged, knobs):
    DAMAGES["a bit flipped in the state"].do(damaged / "step_000008")
    DAMAGES["no manifest"].do(damaged / "step_000006")
    before = {p: p.stat().st_mtime_ns for p in damaged.rglob("*")}
    line = refused(damaged, resume_from_checkpoint="auto", **knobs)
    assert (
        f"{damaged}: no sound checkpoint to resume from: step_000008: train_state/state.pt: checksum"
        in line
    )
    assert "; step_000006: no manifest.json: it was never finished" in line
    after = {p: p.stat().st_mtime_ns for p in damaged.rglob("*")}
    assert before == after | {damaged / "run.lock": before[damaged / "run.lock"]}


def test_a_damaged_checkpoint_that_was_asked_for_by_name_is_not_replaced_by_another(damaged, knobs):
    DAMAGES["a bit flipped in the weights"].do(damaged / "step_000008")
    line = refused(damaged, resume_from_checkpoint=damaged / "step_000008", **knobs)
    assert (
        "step_000008: not a sound checkpoint: model.safetensors: checksum mismatch (expected "
        in line
    )
    assert "final" not in names(damaged)
    line = refused(damaged, resume_from_checkpoint=damaged / "step_000007", **knobs)
    assert "step_000007: not a sound checkpoint: no such folder" in line


def test_a_broken_later_checkpoint_does_not_push_out_the_sound_ones(damaged, knobs):
    DAMAGES["no manifest"].do(damaged / "step_000008")
    shutil.copytree(damaged / "step_000008", damaged / "step_000012")
    knobs = knobs | {
        "keep_last": 1,
        "save_steps": 7,
    }  # the next is step 7, older than the broken ones
    resumed(damaged, **knobs)
    assert names(damaged) == ["final", "metrics.jsonl", "run.lock", "step_000008", "step_000012"]
    assert problem_with(damaged / "step_000008") is None


class Bomb:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("name", ["state.pt", "rng_00000.pt"])
def test_code_in_a_checkpoint_is_refused_by_name_and_does_not_run(damaged, knobs, tmp_path, name):
    folder, canary = damaged / "step_000008", tmp_path / "canary"
    torch.save({"step": Bomb(canary)}, folder / "train_state" / name)
    (folder / "manifest.json").unlink()
    seal(folder)  # the manifest agrees: whoever wrote the one wrote the other
    line = refused(damaged, resume_from_checkpoint="auto", **knobs)
    assert f"{name}: contains posix.system: refused, not a plain checkpoint file" in line
    assert not canary.exists()
    torch.load(folder / "train_state" / name, weights_only=False)
    assert canary.exists()  # the bomb was a real one


@pytest.mark.parametrize(
    "content", [b"", b"hello\n", b"\x80\x04N.", None], ids=["empty", "text", "pickle", "other"]
)
def test_a_state_that_is_no_checkpoint_is_one_line(damaged, knobs, content):
    path = damaged / "step_000008" / "train_state" / "state.pt"
    if content is None:
        torch.save({"step": 3}, path)
    else:
        path.write_bytes(content)
    (damaged / "step_000008" / "manifest.json").unlink()
    seal(damaged / "step_000008")
    line = refused(damaged, resume_from_checkpoint="auto", **knobs)
    assert (
        "refused, not a plain checkpoint file" in line
        or "does not fit this model and optimizer" in line
    )


# ---- signals


def logged(out, step):
    """Whether a step that far is in the log."""
    path = out / "metrics.jsonl"
    return path.exists() and path.read_text().count('"grad_norm"') >= step


LONG = {"max_steps": 300, "save_steps": 300, "eval_steps": 300}
ENDLESS = {"max_steps": 100_000, "save_steps": 100_000, "eval_steps": 100_000}


@pytest.fixture(scope="module")
def long(tmp_path_factory, knobs):
    return trained(tmp_path_factory.mktemp("long") / "long", **knobs | LONG)


def signalled(launcher, out, knobs, number):
    """Signals a training with a Python of its own in its fifth step. Returns its exit status and text."""
    log, end = out.with_suffix(".log"), time.monotonic() + PATIENCE
    with open(log, "w") as file:
        command = [*launcher, str(ROOT / "train.py"), *words(output_dir=out, **knobs)]
        process = subprocess.Popen(command, env=os.environ | ONE_THREAD, stdout=file, stderr=file)
    while process.poll() is None and time.monotonic() < end and not logged(out, 5):
        time.sleep(0.002)
    process.send_signal(number)
    return process.wait(PATIENCE), log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_ends_and_the_rest_is_as_if_it_never_came(tmp_path, knobs, long, number):
    knobs, out = knobs | LONG, tmp_path / "out"
    code, text = signalled([sys.executable], out, knobs, number)
    assert code == 128 + number, text
    last = text.splitlines()[-1]
    assert last.startswith("stopped at step ")
    assert last.endswith(", saved; continue with --resume_from_checkpoint=auto")
    assert len(checkpoints(out)) == 1
    resumed(out, **knobs)
    assert not differences(out / "final", long / "final")
    assert losses(out) == losses(long)


def test_a_signal_before_the_first_step_saves_that_too(tmp_path, knobs, straight):
    out = tmp_path / "out"
    one = begin(out, before=signalled_early, **knobs)
    assert one.wait() == [143], one.text
    assert "stopped at step 0, saved" in one.text
    assert names(out) == ["run.lock", "step_000000"]
    resumed(out, **knobs)
    assert losses(out) == losses(straight)
    assert not differences(out / "final", straight / "final")


def signalled_early():
    broadcast = world.World.broadcast

    def patched(self, tensors):
        os.kill(os.getpid(), signal.SIGTERM)
        broadcast(self, tensors)

    world.World.broadcast = patched


def interrupted_while_saving():
    save = torch.save

    def patched(value, path):
        os.kill(os.getpid(), signal.SIGINT)
        save(value, path)

    torch.save = patched


def test_a_second_interrupt_ends_at_once(tmp_path, knobs):
    out = tmp_path / "out"
    one = begin(out, before=interrupted_while_saving, **knobs | ENDLESS).until(
        lambda: logged(out, 3)
    )
    one.signal(signal.SIGINT)
    assert one.wait() == [130], one.text
    assert "Traceback" not in one.text
    assert "saved" not in one.text
    assert not checkpoints(out)


def test_a_signal_to_one_rank_saves_and_stops_both(tmp_path, knobs):
    knobs = knobs | {"max_steps": 120, "save_steps": 120, "eval_steps": 120}
    straight, out = trained(tmp_path / "straight", ranks=2, **knobs), tmp_path / "out"
    one = begin(out, ranks=2, **knobs).until(lambda: logged(out, 3))
    one.signal(signal.SIGTERM, rank=1)
    assert one.wait() == [143, 143], one.text
    assert one.text.count("stopped at step ") == 1
    trained(out, ranks=2, resume_from_checkpoint="auto", **knobs)
    assert not differences(out / "final", straight / "final")
    assert losses(out) == losses(straight)


def test_a_signal_to_torchrun_saves_too(tmp_path, knobs):
    out = tmp_path / "out"
    torchrun = [python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    _, text = signalled(
        torchrun, out, knobs | ENDLESS, signal.SIGTERM
    )  # it exits 1 whatever its ranks did
    assert "saved; continue with --resume_from_checkpoint=auto" in text
    (saved,) = checkpoints(out)
    assert problem_with(saved) is None
    assert (saved / "train_state" / "rng_00001.pt").is_file()


# ---- one folder, one run; no space


def test_a_second_run_in_the_same_folder_is_refused_and_a_dead_ones_lock_is_not(tmp_path, knobs):
    out = tmp_path / "out"
    one = begin(out, **knobs | ENDLESS).until(lambda: logged(out, 3))
    line = refused(tmp_path / "second", output_dir=out, resume_from_checkpoint="auto", **knobs)
    assert line == f"error: {out} is in use by process {one.ranks[0].pid}"
    pair = begin(tmp_path / "pair", ranks=2, output_dir=out, resume_from_checkpoint="auto", **knobs)
    assert pair.wait() == [2, 2]
    assert line in pair.text
    assert "Traceback" not in pair.text
    assert one.alive
    one.kill()
    one = begin(out, resume_from_checkpoint="auto", **knobs | ENDLESS)
    one.until(lambda: "starting at step 0" in one.text).kill()


def limited(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("stage", ["the random numbers", "the weights", "the state"])
def test_a_full_disk_is_one_line_that_names_the_folder_and_leaves_the_rest(
    damaged, knobs, straight, stage
):
    shutil.rmtree(damaged / "step_000008")
    size = lambda name: (straight / "step_000008" / name).stat().st_size
    limit = {
        "the random numbers": size("train_state/rng_00000.pt") - 1,
        "the weights": size("model.safetensors") - 1,
        "the state": size("train_state/state.pt") - 1,
    }[stage]
    assert limit > size("tokenizer.json") or stage == "the random numbers"
    line = refused(
        damaged, before=functools.partial(limited, limit), resume_from_checkpoint="auto", **knobs
    )
    assert f"{damaged / 'step_000008'}: not written (" in line
    assert "earlier checkpoints are untouched" in line
    assert names(damaged) == ["metrics.jsonl", "run.lock", "step_000006"]
    assert problem_with(damaged / "step_000006") is None
    resumed(damaged, **knobs)
    assert losses(damaged) == losses(straight)


def test_a_log_that_cannot_grow_is_one_line_too(damaged, knobs):
    shutil.rmtree(damaged / "step_000008")
    limit = (damaged / "metrics.jsonl").stat().st_size - 300
    knobs = knobs | {"before": functools.partial(limited, limit)}
    line = refused(damaged, resume_from_checkpoint="auto", **knobs)
    assert f"{damaged / 'metrics.jsonl'}: could not be written (File too large)" in line


def nearly_full():
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: usage(path)._replace(free=100_000)


def test_too_little_space_for_a_checkpoint_is_told_before_training(tmp_path, knobs):
    out = tmp_path / "out"
    line = refused(out, before=nearly_full, **knobs)
    assert f"{out}: a checkpoint needs 0.4 MB, free are 0.1 MB; make room" in line
    assert names(out) == ["run.lock"]
