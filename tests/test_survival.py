"""What a training survives beside tests/test_faults.py: blows amid a phase, full disks, a second host."""

import functools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lib.checkpoint import checkpoints, find_checkpoint, problem_with
from model import load_model, next_token_loss
from tests import ROOT, align
from tests.blows import (
    PHASES,
    after_save,
    count_all,
    fill,
    filled_while_saving,
    kill,
    strike,
    terminate,
)
from tests.conftest import write_rows
from tests.runs import (
    ONE_THREAD,
    PATIENCE,
    Run,
    begin,
    fitting,
    losses,
    names,
    refused,
    words,
)
from tests.runs import train_to_end as trained
from tests.test_faults import assert_as_if_nothing_happened, resumed
from tests.test_train import Counting, no_validation
from tests.warm import python

KILLS = int(os.environ.get("KILLS", 6))
SEED = int(os.environ.get("SEED", 0)) or random.SystemRandom().randrange(1, 1 << 32)


@pytest.fixture(scope="module")
def knobs(tiny_dataset):
    return {"data_path": tiny_dataset, "dropout": 0.1, "save_steps": 2, "keep_last": 2}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, knobs):
    return trained(tmp_path_factory.mktemp("straight") / "straight", **knobs)


# ---- a blow in the middle of a phase


def events(one):
    return {phase: int(n) for phase, n in re.findall(r"(\w+) took (\d+) events", one.text)}


def test_killed_at_any_call_of_any_phase_it_resumes_and_ends_the_same(tmp_path, knobs, straight):
    """KILLS=50 SEED=... makes it long and repeatable."""
    start = functools.partial(begin, **knobs)
    survive(start, tmp_path, KILLS, lambda out: assert_as_if_nothing_happened(out, straight))


@pytest.mark.parametrize("program", ["sft", "dpo"])
def test_so_do_fine_tunings(tmp_path, tiny_tokenizer, program):
    template = "chatml" if program == "dpo" else None
    base = align.make_base(tmp_path / "base", tiny_tokenizer, template=template)
    data = write_rows(tmp_path / "rows.jsonl", align_rows(program))
    knobs = {"model_path": base, "dataset_path": data, "val_ratio": 0.2, "save_steps": 2}
    straight = align.finished(program, tmp_path / "straight", **knobs)

    def check(out):
        for path in straight.rglob("*.safetensors"):
            assert path.read_bytes() == (out / path.relative_to(straight)).read_bytes(), path
        assert losses(out) == losses(straight)

    survive(functools.partial(align.begin, program, **knobs), tmp_path, max(2, KILLS // 5), check)


def align_rows(program):
    question = [
        {"prompt": f"What is {n} plus {n}?", "response": f"It is {2 * n}."} for n in range(40)
    ]
    if program == "sft":
        return question
    return [
        {"prompt": r["prompt"], "chosen": r["response"], "rejected": "I won't say."}
        for r in question
    ]


def survive(start, folder, kills, check):
    """Kills runs of start(out, before=...) so many times in all, each until it ends well, and checks it."""
    one = start(folder / "counted", before=count_all)
    assert one.wait() == [0], one.text
    known, chance, done, rounds = events(one), random.Random(SEED), {}, 0
    print(f"SEED={SEED}: {known}")
    assert known.keys() == PHASES.keys()
    while sum(done.values()) < kills:
        out, code, rounds = folder / f"run{rounds}", None, rounds + 1
        while code != 0:
            phase = min(PHASES, key=lambda name: (done.get(name, 0), chance.random()))
            passage = 1 if phase in ("evaluation", "checkpoint") else chance.randint(1, 2)
            blow = functools.partial(strike, phase, passage, chance.randint(1, known[phase]), kill)
            one = start(
                out,
                resume_from_checkpoint="auto",
                before=blow if sum(done.values()) < kills else None,
            )
            (code,) = one.wait()
            assert code in (0, -signal.SIGKILL), one.text
            done[phase] = done.get(phase, 0) + (code != 0)
        check(out)
    print(f"killed {done} in {rounds} runs")


@pytest.mark.parametrize("phase", ["evaluation", "checkpoint"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_in_the_middle_of_it_saves_and_stops(tmp_path, knobs, straight, phase, ranks):
    out, knobs = tmp_path / "out", knobs | {"ranks": ranks}
    expected = straight if ranks == 1 else trained(tmp_path / "pair", **knobs)
    one = begin(out, before=functools.partial(strike, phase, 1, 50, terminate, ranks - 1), **knobs)
    assert one.wait() == [143] * ranks, one.text
    step = {"evaluation": 4, "checkpoint": 2}[phase]
    assert f"stopped at step {step}, saved; continue with --resume_from_checkpoint=auto" in one.text
    assert "Traceback" not in one.text
    resumed(out, **knobs)
    assert_as_if_nothing_happened(out, expected)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.mark.parametrize("phase", ["evaluation", "checkpoint"])
def test_sigterm_to_torchrun_in_the_middle_of_it_saves(tmp_path, knobs, phase):
    out, script = tmp_path / "out", tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.runs import training\n"
        "from tests.blows import strike, tell_torchrun\n"
        f"training(sys.argv[1:], lambda: strike({phase!r}, 1, 50, tell_torchrun, rank=1))\n"
    )
    torchrun = [python(), *TORCHRUN[1:], "--standalone", "--nproc_per_node=2"]
    env = (
        os.environ | ONE_THREAD | {"PYTHON_EXEC": sys.executable}
    )  # the ranks' parent shall be torchrun
    call = [*torchrun, script, *words(output_dir=out, **knobs)]
    done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=PATIENCE)
    step = {"evaluation": 4, "checkpoint": 2}[phase]
    assert f"stopped at step {step}, saved" in done.stdout, done.stdout + done.stderr
    assert next(p.name for p in checkpoints(out)) == f"step_{step:06d}"
    assert problem_with(checkpoints(out)[0]) is None


# ---- a disk that is really full


FULL = {
    "before": (
        4,
        r"a checkpoint needs 0\.4 MB, free are 0\.1 MB; make room, or choose another --output_dir",
    ),
    "during": (4, r"step_000006: not written \(.*\); earlier checkpoints are untouched"),
    "after": (
        6,
        r"metrics\.jsonl: could not be written|a checkpoint needs 0.4 MB, free are 0.0 MB",
    ),
}


@pytest.mark.parametrize("moment", FULL)
def test_a_disk_that_is_full_at_a_checkpoint_costs_no_earlier_one(
    small_disk, straight, knobs, moment
):
    disk, (newest, says) = small_disk("6m"), FULL[moment]
    out, log = disk / "out", disk.parent / "log"
    one = begin(
        log, output_dir=out, before=functools.partial(strike, "checkpoint", 3, 1, kill), **knobs
    )
    assert one.wait() == [-signal.SIGKILL], (
        one.text
    )  # saved at 2 and 4, killed before it saved at 6
    if moment == "before":
        fill(disk, 100_000)
    before = {
        "before": None,
        "during": functools.partial(filled_while_saving, disk),
        "after": functools.partial(after_save, 6, functools.partial(fill, disk, 0)),
    }[moment]
    line = refused(log, before=before, output_dir=out, resume_from_checkpoint="auto", **knobs)
    assert re.search(says, line), line
    assert checkpoints(out)[0].name == f"step_00000{newest}"
    assert problem_with(checkpoints(out)[0]) is None
    assert not list(out.glob(".tmp-step*"))
    (disk / "ballast").unlink()
    resumed(log, output_dir=out, **knobs)
    assert_as_if_nothing_happened(out, straight)


# ---- 300 bit flips


def test_of_300_flipped_bits_every_one_is_found_and_the_previous_checkpoint_used(
    tmp_path, straight
):
    for name in ("step_000006", "step_000008"):
        shutil.copytree(straight / name, tmp_path / name)
    newest, chance, told = tmp_path / "step_000008", random.Random(SEED), []
    print(f"SEED={SEED}")
    cfg = SimpleNamespace(resume_from_checkpoint="auto", output_dir=tmp_path)
    assert find_checkpoint(cfg, told.append) == newest
    files = [p for p in sorted(newest.rglob("*")) if p.is_file()]
    for number in range(300):
        path = files[number % len(files)]
        sound = path.read_bytes()
        content, bit = bytearray(sound), chance.randrange(8 * len(sound))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        assert find_checkpoint(cfg, told.append) == tmp_path / "step_000006", (path.name, bit)
        path.write_bytes(sound)
    assert len(told) == 300
    assert all(line.startswith("warning: step_000008: ") for line in told)
    assert find_checkpoint(cfg, told.append) == newest


# ---- ranks, and the best checkpoint


class BadOnceOnRankOne:
    """The third loss of rank 1 is not a number."""

    def __init__(self):
        self.calls = 0

    def __call__(self, model, batch):
        self.calls += 1
        loss, stats = next_token_loss(model, batch)
        bad = self.calls == 3 and torch.distributed.get_rank() == 1
        return (loss * float("nan") if bad else loss), stats


def note_weights(folder, model):
    """A validation that notes the weights of its rank."""
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    with open(folder / f"weights{torch.distributed.get_rank()}", "ab") as f:
        f.write(weights)
    return {"val_loss": 1.0}


def test_nan_on_one_rank_changes_the_weights_of_none_and_both_go_on_as_one(tmp_path):
    knobs = {"vocab_size": 32, "max_steps": 5, "save_steps": 1, "eval_steps": 1, "keep_last": 9}
    noted = functools.partial(note_weights, tmp_path)
    args = (tmp_path / "out", Counting(), BadOnceOnRankOne(), noted, knobs)
    one = Run(tmp_path / "log", fitting, args, ranks=2)
    assert one.wait() == [0, 0], one.text
    assert one.text.count("warning: step 3 skipped: gradient norm is nan (1 in a row)") == 1
    ours = [(tmp_path / f"weights{rank}").read_bytes() for rank in (0, 1)]
    assert ours[0] == ours[1]
    size = len(ours[0]) // 5
    steps = [ours[0][n * size : (n + 1) * size] for n in range(5)]
    assert steps[1] == steps[2] != steps[3]


class Improving:
    """A validation that is best the second time."""

    def __init__(self):
        self.values = iter([3.0, 1.0, 2.0, 2.5, 2.0, 4.0])

    def __call__(self, model):
        return {"val_loss": next(self.values)}


def test_the_best_checkpoint_outlives_the_last_ones(tmp_path):
    knobs = {"vocab_size": 32, "max_steps": 12, "save_steps": 2, "eval_steps": 2, "keep_last": 2}
    one = Run(
        tmp_path / "log",
        fitting,
        (tmp_path / "out", Counting(), next_token_loss, Improving(), knobs),
    )
    assert one.wait() == [0], one.text
    found = ["step_000004", "step_000010", "step_000012"]
    assert [n for n in names(tmp_path / "out") if n.startswith("step")] == found
    best, last, final = (
        load_model(tmp_path / "out" / n) for n in ("step_000004", "step_000012", "final")
    )
    same = lambda a, b: torch.equal(a.lm_head.weight, b.lm_head.weight)
    assert same(last, final)
    assert not same(best, final)


def test_without_a_validation_there_is_no_best(tmp_path):
    knobs = {"vocab_size": 32, "max_steps": 8, "save_steps": 2, "eval_steps": 2, "keep_last": 1}
    args = (tmp_path / "out", Counting(), next_token_loss, no_validation, knobs)
    assert Run(tmp_path / "log", fitting, args).wait() == [0]
    assert names(tmp_path / "out") == ["final", "metrics.jsonl", "run.lock", "step_000008"]


# ---- two hosts


@pytest.fixture
def hosts():
    """Two network namespaces joined by a wire, as two machines are. Yields their names and addresses."""
    tag = f"m{os.getpid()}"
    ip = lambda *args: subprocess.run(["ip", *args], capture_output=True).returncode == 0
    if not shutil.which("ip") or not ip("netns", "add", f"{tag}a"):
        pytest.skip("network namespaces take root and ip netns")
    try:
        ip("netns", "add", f"{tag}b")
        made = ip(
            "link",
            "add",
            f"{tag}a",
            "netns",
            f"{tag}a",
            "type",
            "veth",
            "peer",
            f"{tag}b",
            "netns",
            f"{tag}b",
        )
        if not made:
            pytest.skip("no veth devices here")
        for host, address in (("a", "10.77.0.1"), ("b", "10.77.0.2")):
            inside = ("-n", f"{tag}{host}")
            assert ip(*inside, "addr", "add", f"{address}/24", "dev", f"{tag}{host}")
            assert ip(*inside, "link", "set", f"{tag}{host}", "up")
            assert ip(*inside, "link", "set", "lo", "up")
        yield [(f"{tag}a", "10.77.0.1"), (f"{tag}b", "10.77.0.2")]
    finally:
        for host in "ab":
            ip("netns", "del", f"{tag}{host}")


def on_host(name, address, out, knobs):
    """Starts this host's part of a training of two, as README says it."""
    call = [*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", "--rdzv-id=two"]
    first = f"--rdzv-conf=is_host={address == '10.77.0.1'}"  # both have this machine's name; others' differ
    call += [
        "--rdzv-endpoint=10.77.0.1:29400",
        f"--local-addr={address}",
        first,
        str(ROOT / "train.py"),
    ]
    with open(out.with_suffix(f".{name}"), "w") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", name, *call, *words(output_dir=out, **knobs)],
            env=os.environ | ONE_THREAD | {"GLOO_SOCKET_IFNAME": name},
            stdout=log,
            stderr=log,
        )


def test_two_hosts_train_what_one_host_trains_with_two_ranks(tmp_path, knobs, hosts):
    out = tmp_path / "out"
    both = [on_host(name, address, out, knobs) for name, address in hosts]
    codes = [process.wait(PATIENCE) for process in both]
    text = "".join(out.with_suffix(f".{name}").read_text() for name, _ in hosts)
    assert codes == [0, 0], text
    assert "2 ranks" in text
    assert_as_if_nothing_happened(out, trained(tmp_path / "one", ranks=2, **knobs))
