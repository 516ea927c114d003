"""What a training comes back from: kill -9 at any moment, damage, signals, a rival, a full disk."""

import functools
import json
import os
import random
import re
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib import checkpoint, runtime
from lib.checkpoint import checkpoints, find_checkpoint, problem_with
from tests.runs import PHASES, begin, differences, losses, names, refused, strike
from tests.runs import train_to_end as trained
from tests.test_resume import seal_again

KILLS = int(os.environ.get("KILLS", 10))  # KILLS=50 SEED=... makes it long and repeatable
SEED = int(os.environ.get("SEED", 0)) or random.SystemRandom().randrange(1, 1 << 32)


@pytest.fixture(scope="module")
def knobs(tiny_dataset):
    return {"data_path": tiny_dataset, "dropout": 0.1, "save_steps": 2, "keep_last": 2}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, knobs):
    """The run that nothing happened to."""
    return trained(tmp_path_factory.mktemp("straight") / "straight", **knobs)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, knobs):
    """The same on two ranks."""
    return trained(tmp_path_factory.mktemp("pair") / "pair", ranks=2, **knobs)


@pytest.fixture
def damaged(tmp_path, straight):
    """A run that ended before its model folder was written: step 6 and step 8 are there."""
    shutil.copytree(straight, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "final")
    return tmp_path / "out"


def resumed(out, **knobs):
    return trained(out, resume_from_checkpoint="auto", **knobs)


def assert_as_if_nothing_happened(out, straight):
    assert names(out) == names(straight)
    for folder in [*checkpoints(straight), straight / "final"]:
        assert not differences(out / folder.name, folder)
    assert losses(out) == losses(straight)


# ---- kill -9


def send_self(number):
    os.kill(os.getpid(), number)


def count_events():
    """Has every phase say, once, how many moments it has."""
    for phase in PHASES:
        strike(phase, 1, 0, None)


def survive(start, folder, kills, check):
    """Kills runs of start(out, before=...) `kills` times in all, and checks each when it ends.

    The moments are drawn: a phase that was killed least, in it any call or return of a function.
    """
    one = start(folder / "counted", before=count_events)
    assert one.wait() == [0], one.text
    events = {phase: int(n) for phase, n in re.findall(r"(\w+) took (\d+) events", one.text)}
    assert events.keys() == PHASES.keys()
    chance, killed, rounds = random.Random(SEED), dict.fromkeys(PHASES, 0), 0
    print(f"SEED={SEED}: {events}")
    while sum(killed.values()) < kills:
        out, code, rounds = folder / f"run{rounds}", None, rounds + 1
        while code != 0:
            phase = min(PHASES, key=lambda name: (killed[name], chance.random()))
            passage = 1 if phase in ("evaluation", "checkpoint") else chance.randint(1, 2)
            moment = chance.randint(1, events[phase])
            kill = functools.partial(send_self, signal.SIGKILL)
            blow = functools.partial(strike, phase, passage, moment, kill)
            blow = blow if sum(killed.values()) < kills else None
            one = start(out, resume_from_checkpoint="auto", before=blow)
            (code,) = one.wait()
            assert code in (0, -signal.SIGKILL), one.text
            killed[phase] += code != 0
        check(out)
    print(f"killed {killed} in {rounds} runs")
    assert min(killed.values()) > 0 or kills < len(PHASES)


def test_killed_at_any_call_of_any_phase_it_resumes_and_ends_the_same(tmp_path, knobs, straight):
    check = functools.partial(assert_as_if_nothing_happened, straight=straight)
    survive(functools.partial(begin, **knobs), tmp_path, KILLS, check)


CALLS = {
    "mkdir": (os, "mkdir"),
    "save": (torch, "save"),
    "seal": (checkpoint, "seal"),
    "write_text": (Path, "write_text"),
    "write_bytes": (Path, "write_bytes"),
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
CUTTING = {
    "in the middle of cutting the log": ("write_bytes", "metrics", "amid"),
    "before the cut log is renamed": ("replace", "metrics", "before"),
}
POINTS = IN_A_CHECKPOINT | AFTERWARDS | CUTTING  # (a call, of which path, when in it)


def dying(point, passage, rank=None):
    """Has this process end as by kill -9 in, before or after a call, at the given passage."""
    if rank not in (None, int(os.environ.get("RANK", 0))):
        return
    name, wanted, moment = POINTS[point]
    original, left = getattr(*CALLS[name]), [passage]

    def patched(subject, *args, **kwargs):
        path = Path(args[0].name) if name == "save" else subject
        result = original(subject, *args, **kwargs) if moment == "after" else None
        if wanted in str(path) and (name != "rmtree" or path.exists()):
            left[0] -= 1
            if left[0] == 0:
                if moment == "amid" and name == "rmtree":
                    (path / "model.safetensors").unlink()
                elif moment == "amid":
                    original(subject, *args, **kwargs)
                    os.truncate(path, path.stat().st_size // 2)
                os.write(1, f"died {point}".encode())
                os._exit(137)  # nothing is flushed, closed or tidied up
        return result if moment == "after" else original(subject, *args, **kwargs)

    setattr(*CALLS[name], patched)


@pytest.mark.parametrize(
    ("point", "passage"),
    [*((p, n) for p in IN_A_CHECKPOINT for n in (1, 4))]  # 4 is the last save
    + [(p, n) for p in AFTERWARDS for n in (1, 2) if n == 1 or "old one" in p],
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


@pytest.mark.parametrize("point", CUTTING)
def test_killed_while_it_cuts_the_log_it_loses_no_line(damaged, knobs, straight, point):
    shutil.rmtree(damaged / "step_000008")
    before = functools.partial(dying, point, 1)
    assert begin(damaged, before=before, resume_from_checkpoint="auto", **knobs).wait() == [137]
    resumed(damaged, **knobs)
    assert_as_if_nothing_happened(damaged, straight)


def test_a_checkpoint_that_replaces_another_is_never_lost_between_the_two(damaged, knobs, straight):
    last = checkpoints(damaged)[0]
    shutil.copytree(last, damaged / f".tmp-{last.name}")  # whole, and not renamed yet
    (last / "manifest.json").unlink()  # the one it replaces, half deleted
    resumed(damaged, **knobs)
    assert f"resumed from {last}" in damaged.with_suffix(".log").read_text()
    assert_as_if_nothing_happened(damaged, straight)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_ranks_killed_ends_the_other_and_both_resume(tmp_path, knobs, pair, rank):
    out, point = tmp_path / "out", "after the random numbers are written"
    one = begin(out, ranks=2, before=functools.partial(dying, point, 2, rank), **knobs)
    codes = one.wait()
    assert (codes[rank], codes[1 - rank]) == (137, 2)
    assert "Traceback" not in one.text
    assert f"error: rank {1 - rank} lost another rank, whose own message says why (" in one.text
    resumed(out, ranks=2, **knobs)
    assert_as_if_nothing_happened(out, pair)


# ---- damaged checkpoints


def changed(name, change):
    """Damage to a file: change(bytes) instead of its bytes."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def manifest(change):
    """Damage to manifest.json: its text, or a function that changes its entries."""

    def damaged(content):
        values = json.loads(content)
        return change if isinstance(change, bytes) else json.dumps(change(values)).encode()

    return changed("manifest.json", damaged)


def entries(change):
    return manifest(lambda values: values | {"files": change(values["files"])})


def swap(folder):
    path = folder / "train_state" / "rng_00000.pt"
    path.unlink()
    path.mkdir()


STATE, UNREADABLE = "train_state/state.pt", "manifest.json is not readable"
DAMAGES = {
    "cut to nothing": (changed(STATE, lambda b: b""), f"{STATE} has 0 bytes, expected"),
    "cut in half": (changed(STATE, lambda b: b[: len(b) // 2]), f"{STATE} has"),
    "a bit flipped": (changed(STATE, lambda b: b[:-1] + bytes([b[-1] ^ 1])), f"{STATE}: checksum"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no manifest.json: it was never"),
    "an empty manifest": (manifest(b""), UNREADABLE),
    "a garbled manifest": (manifest(b'{"format": 1, "files": ['), UNREADABLE),
    "a manifest of lists": (manifest(b'{"format": 1, "files": []}'), UNREADABLE),
    "a deep manifest": (manifest(b"[" * 100_000), UNREADABLE),
    "a wrong type": (
        entries(lambda e: e | {"config.json": {"bytes": [], "sha256": 7}}),
        "config.json has",
    ),
    "a newer format": (manifest(lambda m: m | {"format": 2}), "format 2, this program reads 1"),
    "a name that leads out": (
        entries(lambda e: e | {"../run.lock": e["run.json"]}),
        "illegal file name '../run.lock'",
    ),
    "half a manifest": (
        entries(lambda e: {"run.json": e["run.json"]}),
        "does not list a whole checkpoint",
    ),
    "a file gone": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "a folder for a file": (swap, "train_state/rng_00000.pt is missing"),
    "nothing left": (lambda f: [shutil.rmtree(f), f.mkdir()], "no manifest.json"),
}


def found_in(out):
    """(the checkpoint that auto takes, the warnings)."""
    warnings, cfg = [], SimpleNamespace(resume_from_checkpoint="auto", output_dir=out)
    return find_checkpoint(cfg, warnings.append), warnings


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(damaged, damage, message):
    damage(damaged / "step_000008")
    assert message in problem_with(damaged / "step_000008")
    folder, (warning,) = found_in(damaged)
    assert folder == damaged / "step_000006"
    assert re.fullmatch(rf"warning: step_000008: .*{re.escape(message)}.*", warning)
    assert warning.endswith("; going back to step_000006")


def test_of_300_flipped_bits_every_one_is_found_and_the_previous_checkpoint_used(damaged):
    newest, chance = damaged / "step_000008", random.Random(SEED)
    print(f"SEED={SEED}")
    assert found_in(damaged) == (newest, [])
    files = [p for p in sorted(newest.rglob("*")) if p.is_file()]
    for path in [path for path in files for _ in range(-(-300 // len(files)))]:
        sound = path.read_bytes()
        content, bit = bytearray(sound), chance.randrange(8 * len(sound))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        folder, (warning,) = found_in(damaged)
        assert folder == damaged / "step_000006", (path.name, bit)
        assert warning.startswith("warning: step_000008: ")
        path.write_bytes(sound)
    assert found_in(damaged) == (newest, [])


@pytest.mark.parametrize("name", ["cut in half", "a deep manifest", "a folder for a file"])
def test_a_run_goes_on_from_before_the_damage_and_ends_the_same(damaged, knobs, straight, name):
    DAMAGES[name][0](damaged / "step_000008")
    resumed(damaged, **knobs)
    lines = damaged.with_suffix(".log").read_text().splitlines()
    (warning,) = [line for line in lines if line.startswith("warning: ")]
    assert warning.startswith("warning: step_000008: ")
    assert_as_if_nothing_happened(damaged, straight)


def test_with_no_sound_checkpoint_it_says_why_of_each_and_does_nothing(damaged, knobs):
    DAMAGES["a bit flipped"][0](damaged / "step_000008")
    DAMAGES["no manifest"][0](damaged / "step_000006")
    touched = lambda: {p: p.stat().st_mtime_ns for p in damaged.rglob("*") if p.suffix != ".lock"}
    before = touched()
    line = refused(damaged, resume_from_checkpoint="auto", **knobs)
    assert (
        f"{damaged}: no sound checkpoint to resume from: step_000008: train_state/state.pt" in line
    )
    assert "; step_000006: no manifest.json: it was never finished" in line
    assert touched() == before


def test_a_damaged_checkpoint_that_was_asked_for_by_name_is_not_replaced_by_another(damaged, knobs):
    DAMAGES["a bit flipped"][0](damaged / "step_000008")
    for step, why in ((8, f"{STATE}: checksum mismatch"), (7, "no such folder")):
        folder = damaged / f"step_00000{step}"
        line = refused(damaged, resume_from_checkpoint=folder, **knobs)
        assert f"step_00000{step}: not a sound checkpoint: {why}" in line
    assert "final" not in names(damaged)


def test_a_broken_later_checkpoint_does_not_push_out_the_sound_ones(damaged, knobs):
    DAMAGES["no manifest"][0](damaged / "step_000008")
    shutil.copytree(damaged / "step_000008", damaged / "step_000012")
    # the next is step 7, older than the broken ones
    resumed(damaged, **knobs | {"keep_last": 1, "save_steps": 7})
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
    seal_again(folder)
    line = refused(damaged, resume_from_checkpoint="auto", **knobs)
    assert f"{name}: contains posix.system: refused, not a plain checkpoint file" in line
    assert not canary.exists()
    torch.load(folder / "train_state" / name, weights_only=False)
    assert canary.exists()  # the bomb was a real one


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\x80\x04N.", {"step": 3}], ids=str)
def test_a_state_that_is_no_checkpoint_is_one_line(damaged, knobs, content):
    path = damaged / "step_000008" / "train_state" / "state.pt"
    if isinstance(content, dict):
        torch.save(content, path)
    else:
        path.write_bytes(content)
    seal_again(damaged / "step_000008")
    line = refused(damaged, resume_from_checkpoint="auto", **knobs)
    messages = ("refused, not a plain checkpoint file", "does not fit this model and optimizer")
    assert messages[isinstance(content, dict)] in line


# ---- signals


def logged(out, step):
    """Whether a step that far is in the log."""
    path = out / "metrics.jsonl"
    return path.exists() and path.read_text().count('"grad_norm"') >= step


ENDLESS = {"max_steps": 100_000, "save_steps": 100_000, "eval_steps": 100_000}


def signalled_early():
    broadcast = runtime.World.broadcast

    def patched(self, tensors):
        send_self(signal.SIGTERM)
        broadcast(self, tensors)

    runtime.World.broadcast = patched


def test_a_signal_before_the_first_step_saves_that_too(tmp_path, knobs, straight):
    out = tmp_path / "out"
    one = begin(out, before=signalled_early, **knobs)
    assert one.wait() == [143], one.text
    assert "stopped at step 0, saved" in one.text
    assert names(out) == ["run.lock", "step_000000"]
    resumed(out, **knobs)
    assert losses(out) == losses(straight)
    assert not differences(out / "final", straight / "final")


@pytest.mark.parametrize(
    ("phase", "passage", "step", "number"),
    [
        ("backward", 5, 5, signal.SIGINT),
        ("update", 3, 3, signal.SIGTERM),
        ("evaluation", 1, 4, signal.SIGTERM),
        ("checkpoint", 1, 2, signal.SIGTERM),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_in_the_middle_of_it_saves_and_stops_and_the_rest_is_as_if_it_never_came(
    request, tmp_path, knobs, phase, passage, step, number, ranks
):
    out, act = tmp_path / "out", functools.partial(send_self, number)
    before = functools.partial(strike, phase, passage, 3, act, ranks - 1)
    one = begin(out, ranks, before, **knobs)
    last = [143, 128 + number]  # a rank without a signal of its own exits as with SIGTERM
    assert one.wait() == last[-ranks:], one.text
    stopped = f"stopped at step {step}, saved; continue with --resume_from_checkpoint=auto"
    assert one.text.count(stopped) == 1
    assert "Traceback" not in one.text
    resumed(out, ranks=ranks, **knobs)
    straight = request.getfixturevalue(["straight", "pair"][ranks - 1])
    assert losses(out) == losses(straight)
    assert not differences(out / "final", straight / "final")


def interrupted_while_saving():
    save = torch.save

    def patched(value, path):
        os.kill(os.getpid(), signal.SIGINT)
        save(value, path)

    torch.save = patched


def test_a_second_interrupt_ends_at_once(tmp_path, knobs):
    out = tmp_path / "out"
    one = begin(out, before=interrupted_while_saving, **knobs | ENDLESS)
    one.until(lambda: logged(out, 3)).signal(signal.SIGINT)
    assert one.wait() == [130], one.text
    assert "Traceback" not in one.text
    assert "saved" not in one.text
    assert not checkpoints(out)


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


@pytest.mark.parametrize(
    "name", ["train_state/rng_00000.pt", "model.safetensors", "train_state/state.pt"]
)
def test_a_full_disk_is_one_line_that_names_the_folder_and_leaves_the_rest(
    damaged, knobs, straight, name
):
    shutil.rmtree(damaged / "step_000008")
    before = functools.partial(limited, (straight / "step_000008" / name).stat().st_size - 1)
    line = refused(damaged, before=before, resume_from_checkpoint="auto", **knobs)
    assert f"{damaged / 'step_000008'}: not written: " in line
    assert "earlier checkpoints are untouched" in line
    assert names(damaged) == ["metrics.jsonl", "run.lock", "step_000006"]
    assert problem_with(damaged / "step_000006") is None
    resumed(damaged, **knobs)
    assert losses(damaged) == losses(straight)


def nearly_full():
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: usage(path)._replace(free=100_000)


def test_too_little_space_for_a_checkpoint_is_told_before_training(tmp_path, knobs):
    out = tmp_path / "out"
    line = refused(out, before=nearly_full, **knobs)
    assert f"{out}: a checkpoint needs 0.4 MB, free are 0.1 MB; make room" in line
    assert names(out) == ["run.lock"]
