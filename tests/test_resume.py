"""A training that was stopped and resumed ends, bit for bit, as one that never stopped."""

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from data import TokenStream
from lib.checkpoint import problem_with, seal
from model import next_token_loss
from tests import ROOT
from tests.conftest import free_port, prepare_dataset
from tests.runs import (
    ONE_THREAD,
    PATIENCE,
    begin,
    begin_fit,
    differences,
    losses,
    names,
    records,
    refused,
    words,
)
from tests.runs import train_to_end as trained
from tests.warm import python

HALF, WHOLE = "step_000004", "step_000008"
# what another number of ranks sums in another order, or is about one rank
ROUNDED = ["rng_", "state.best"]


def copied(source, target):
    """A copy of one checkpoint, alone in a new output folder."""
    shutil.copytree(source, target / source.name)
    return target / source.name


# ---- N + N steps equal 2 N


CASES = [
    *({"dtype": dtype, "ranks": ranks} for dtype in ("fp32", "bf16") for ranks in (1, 2)),
    {"optimizer": "muon"},
    {"gradient_accumulation_steps": 3},
    {"gradient_checkpointing": True},
    {"dropout": 0},
    {"qk_norm": True, "head_dim": 6, "optimizer": "muon"},
]


@pytest.mark.parametrize("knobs", CASES, ids=str)
def test_a_resumed_run_equals_the_straight_one_bit_for_bit(tmp_path, tiny_dataset, knobs):
    knobs = {"data_path": tiny_dataset, "dropout": 0.1} | knobs
    straight = trained(tmp_path / "straight", **knobs)
    rest = trained(tmp_path / "rest", resume_from_checkpoint=straight / HALF, **knobs)
    assert not differences(straight / WHOLE, rest / WHOLE)
    assert not differences(straight / "final", rest / "final")
    assert len(losses(straight, after=4)) == 5  # four steps and a validation
    assert losses(straight, after=4) == losses(rest)
    assert differences(straight / HALF, straight / WHOLE)  # it sees a difference where there is one


@pytest.mark.parametrize("at", [1, 7])
def test_so_does_one_resumed_after_the_first_or_before_the_last_step(tmp_path, tiny_dataset, at):
    knobs = {"data_path": tiny_dataset, "dropout": 0.1, "save_steps": 1, "keep_last": 9}
    straight = trained(tmp_path / "straight", **knobs)
    rest = trained(tmp_path / "rest", resume_from_checkpoint=straight / f"step_{at:06d}", **knobs)
    assert not differences(straight / WHOLE, rest / WHOLE)
    assert losses(straight, after=at) == losses(rest)


def test_a_branch_from_the_stable_part_of_a_longer_run_equals_the_short_run(tmp_path, tiny_dataset):
    knobs = {"data_path": tiny_dataset, "dropout": 0.1, "wsd_decay": 0.5}
    short = trained(tmp_path / "short", **knobs)
    long = trained(tmp_path / "long", max_steps=12, **knobs)
    knobs |= {"resume_from_checkpoint": long / HALF, "allow_config_change": True}
    branch = trained(tmp_path / "branch", **knobs)
    assert not differences(short / WHOLE, branch / WHOLE)
    assert differences(short / WHOLE, long / WHOLE)


@pytest.mark.parametrize("ranks", [1, 2], ids=["one rank", "two ranks"])
def test_with_other_random_numbers_it_does_not(tmp_path, tiny_dataset, ranks):
    """The control of the tests above: they fail where a rank gets other generators."""
    knobs = {"data_path": tiny_dataset, "dropout": 0.1, "ranks": ranks}
    straight = trained(tmp_path / "straight", **knobs)
    changed = copied(straight / HALF, tmp_path / "tampered")
    first, last = (changed / "train_state" / f"rng_{rank:05d}.pt" for rank in (0, ranks - 1))
    if ranks == 2:
        shutil.copy(first, last)  # rank 0's numbers on every rank
    else:
        other = torch.Generator().manual_seed(7).get_state()
        torch.save(torch.load(first) | {"torch": other}, first)
    seal_again(changed)
    rest = trained(tmp_path / "rest", resume_from_checkpoint=changed, **knobs)
    assert "embed_tokens" in "".join(differences(straight / WHOLE, rest / WHOLE))


def seal_again(folder):
    """Makes the manifest agree with files that a test changed."""
    (folder / "manifest.json").unlink()
    seal(folder)
    assert problem_with(folder) is None


# ---- ranks


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_dataset):
    """A run of two ranks without dropout."""
    return trained(
        tmp_path_factory.mktemp("pair") / "pair", ranks=2, data_path=tiny_dataset, sample_tokens=0
    )


def test_two_ranks_train_what_one_rank_trains_at_the_same_global_batch(
    tmp_path, tiny_dataset, pair
):
    knobs = {"data_path": tiny_dataset, "sample_tokens": 0}
    alone = trained(tmp_path / "alone", gradient_accumulation_steps=2, **knobs)
    assert not differences(alone / WHOLE, pair / WHOLE, but=ROUNDED)
    for one, two in zip(losses(alone), losses(pair), strict=True):  # logged in another order
        assert one == pytest.approx(two, rel=1e-6)


def test_a_changed_number_of_ranks_is_refused_and_exact_when_allowed(tmp_path, tiny_dataset, pair):
    knobs = {"data_path": tiny_dataset, "resume_from_checkpoint": pair / HALF}
    line = refused(tmp_path / "refused", **knobs)
    assert "was made with 2 ranks and 4 rows a step, now 1 and 2; use as many ranks, or" in line
    assert line == refused(tmp_path / "smaller", allow_world_size_change=True, **knobs)
    knobs |= {"allow_world_size_change": True, "gradient_accumulation_steps": 2}
    one = trained(tmp_path / "one", **knobs)
    assert not differences(one / WHOLE, pair / WHOLE, but=ROUNDED)
    # and back: one rank's checkpoint on two
    knobs = {"resume_from_checkpoint": copied(one / WHOLE, tmp_path / "copy"), "ranks": 2}
    two = trained(tmp_path / "two", data_path=tiny_dataset, allow_world_size_change=True, **knobs)
    assert not differences(two / "final", pair / "final")


class Recorded:
    """The stream of a dataset, which notes in `folder` what every rank was given.

    It is opened where it is used: a memory map does not travel to another process.
    """

    def __init__(self, dataset, folder):
        self.dataset, self.folder, self.stream = dataset, folder, None
        self.blocks, self.period = TokenStream(dataset, "train", 16, 2).blocks, 0

    def batch(self, step, micro, rank, accumulation):
        self.stream = self.stream or TokenStream(self.dataset, "train", 16, 2, world_size=2)
        batch = self.stream.batch(step, micro, rank, accumulation)
        with open(self.folder / f"batches{rank}", "a") as f:
            f.write(json.dumps(batch["ids"].tolist()) + "\n")
        return batch


def note_weights(folder, model):
    """A validation that notes the weights of its rank."""
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters()))
    with open(folder / f"weights{torch.distributed.get_rank()}", "a") as f:
        f.write(digest.hexdigest() + "\n")
    return {}


def test_two_ranks_see_other_batches_hold_the_same_weights_and_save_every_step(
    tmp_path, tiny_dataset
):
    loader, validate = Recorded(tiny_dataset, tmp_path), functools.partial(note_weights, tmp_path)
    knobs = {"save_steps": 1, "eval_steps": 1, "max_steps": 4, "dropout": 0.1, "vocab_size": 384}
    one = begin_fit(tmp_path / "out", loader, next_token_loss, validate, ranks=2, **knobs)
    assert one.wait() == [0, 0], one.text
    batches = [(tmp_path / f"batches{rank}").read_text().splitlines() for rank in (0, 1)]
    weights = [(tmp_path / f"weights{rank}").read_text().splitlines() for rank in (0, 1)]
    assert len(batches[0]) == len(batches[1]) == 4  # none for a step that does not come
    assert not set(batches[0]) & set(batches[1])
    assert weights[0] == weights[1]
    assert len(set(weights[0])) == 4


# ---- what may not have changed in between


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_dataset):
    return trained(tmp_path_factory.mktemp("straight") / "straight", data_path=tiny_dataset)


@pytest.mark.parametrize(
    ("knobs", "shown"),
    [
        ({"dropout": 0.5}, "dropout was 0.0, now 0.5"),
        ({"learning_rate": 1, "seed": 7}, "seed was 42, now 7, learning_rate was 0.01, now 1.0"),
        ({"max_steps": 9}, "max_steps was 8, now 9"),
        ({"batch_size": 4}, "batch_size was 2, now 4"),
        ({"dtype": "bf16"}, 'dtype was "fp32", now "bf16"'),
        ({"n_layer": 3}, "n_layer was 2, now 3"),
    ],
    ids=str,
)
def test_another_configuration_is_refused_and_the_difference_shown(
    tmp_path, tiny_dataset, straight, knobs, shown
):
    line = refused(
        tmp_path / "out", data_path=tiny_dataset, resume_from_checkpoint=straight / HALF, **knobs
    )
    for part in shown.split(", now"):
        assert part in line, line
    assert "--allow_config_change accepts it" in line
    assert names(tmp_path / "out") == ["run.lock"]


def test_what_changes_nothing_that_is_computed_may_change(tmp_path, tiny_dataset, straight):
    moved = shutil.copytree(tiny_dataset, tmp_path / "moved")
    knobs = {"eval_steps": 3, "save_steps": 2, "logging_steps": 2, "keep_last": 1}
    knobs |= {"deterministic": False, "gradient_checkpointing": True, "data_path": moved}
    rest = trained(tmp_path / "out", resume_from_checkpoint=straight / HALF, **knobs)
    assert not differences(rest / "final", straight / "final")
    assert names(rest) == ["final", "metrics.jsonl", "run.lock", WHOLE]


def test_an_allowed_change_is_really_made(tmp_path, tiny_dataset, straight):
    knobs = {"resume_from_checkpoint": straight / HALF, "allow_config_change": True}
    knobs |= {"weight_decay": 0.5, "beta2": 0.5, "max_steps": 12}
    rest = trained(tmp_path / "out", data_path=tiny_dataset, **knobs)
    state = torch.load(rest / "step_000012" / "train_state" / "state.pt")
    group = state["optimizers"][0]["param_groups"][0]
    assert (group["weight_decay"], group["betas"]) == (0.5, (0.9, 0.5))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"optimizer": "muon"}, "state.pt: does not fit this model and optimizer"),
        ({"d_model": 64}, ": does not fit the model: "),
        ({"n_layer": 1}, "Unexpected key(s) in state_dict"),
    ],
    ids=str,
)
def test_an_allowed_change_that_cannot_be_made_is_one_line_too(
    tmp_path, tiny_dataset, straight, knobs, message
):
    where = {"data_path": tiny_dataset, "resume_from_checkpoint": straight / HALF}
    assert message in refused(tmp_path / "out", allow_config_change=True, **where, **knobs)


def test_other_data_under_the_same_name_is_refused(tmp_path, tiny_documents):
    data = prepare_dataset(tmp_path / "data", tiny_documents[:20])
    knobs = {"data_path": data, "save_steps": 4}
    out = trained(tmp_path / "out", **knobs)
    tokenizer = shutil.copy(data / "tokenizer.model", tmp_path / "kept.model")
    shutil.rmtree(data)
    prepare_dataset(data, tiny_documents[20:], tokenizer)
    line = refused(tmp_path / "rest", resume_from_checkpoint=out / HALF, **knobs)
    assert "its data is" in line
    assert "--allow_config_change accepts it" in line
    trained(tmp_path / "rest", resume_from_checkpoint=out / HALF, allow_config_change=True, **knobs)


def test_data_of_another_tokenizer_is_refused_with_both_hashes(tmp_path, tiny_documents, straight):
    data = prepare_dataset(tmp_path / "data", tiny_documents[20:])
    line = refused(tmp_path / "rest", resume_from_checkpoint=straight / HALF, data_path=data)
    assert "its tokenizer is" in line
    assert "they do not belong together" in line


def rewritten(folder, change):
    """Changes run.json of a checkpoint, as an older or newer program would have written it."""
    values = json.loads((folder / "run.json").read_text())
    change(values)
    (folder / "run.json").write_text(json.dumps(values))
    seal_again(folder)
    return folder


def test_a_key_that_a_checkpoint_does_not_know_counts_as_todays_default(
    tmp_path, tiny_dataset, straight
):
    folder = copied(straight / HALF, tmp_path / "old")
    unknown = ("optimizer", "beta2", "document_mask")
    rewritten(folder, lambda values: [values.pop(name) for name in unknown])
    knobs = {"data_path": tiny_dataset, "resume_from_checkpoint": folder}
    rest = trained(tmp_path / "rest", **knobs)
    assert not differences(rest / WHOLE, straight / WHOLE)
    line = refused(tmp_path / "other", beta2=0.5, **knobs)
    assert "made with beta2 was 0.95, now 0.5; --allow_config_change accepts it" in line


def test_a_key_that_only_the_checkpoint_knows_does_not_matter(tmp_path, tiny_dataset, straight):
    folder = copied(straight / HALF, tmp_path / "new")
    rewritten(folder, lambda values: values.update(of_a_later_program=1))
    rest = trained(tmp_path / "rest", data_path=tiny_dataset, resume_from_checkpoint=folder)
    assert not differences(rest / WHOLE, straight / WHOLE)


# ---- which checkpoint, into which folder


def test_nothing_to_resume_is_said_and_training_starts(tmp_path, tiny_dataset):
    out = trained(tmp_path / "out", data_path=tiny_dataset, resume_from_checkpoint="auto")
    assert f"nothing to resume in {out}; starting at step 0" in out.with_suffix(".log").read_text()


def test_step_10000_is_newer_than_step_2000(tmp_path, tiny_dataset, straight):
    out = tmp_path / "out"
    shutil.copytree(straight / HALF, out / "step_2000")
    shutil.copytree(straight / WHOLE, out / "step_10000")
    (out / "step_notes").mkdir()
    one = begin(out, data_path=tiny_dataset, resume_from_checkpoint="auto")
    one.wait()
    assert f"resumed from {out / 'step_10000'} at step 8" in one.text


def test_a_folder_that_holds_another_run_is_not_written_into(tmp_path, tiny_dataset, straight):
    out = tmp_path / "out"
    shutil.copytree(straight, out)
    before = names(out)
    line = refused(out, data_path=tiny_dataset, resume_from_checkpoint=straight / HALF)
    assert f"{out} already holds a run; choose another --output_dir" in line
    line = refused(out, data_path=tiny_dataset, resume_from_checkpoint=out / HALF)
    assert f"{out} already holds a run" in line  # going on from the older one would mix two runs
    assert names(out) == before
    shutil.rmtree(out / HALF)
    shutil.rmtree(out / WHOLE)
    line = refused(out, data_path=tiny_dataset, resume_from_checkpoint="auto")
    assert "no sound checkpoint to resume from: only final/ is there" in line


def test_the_log_of_a_run_that_died_is_cut_at_its_checkpoint(tmp_path, tiny_dataset, straight):
    out = tmp_path / "out"
    copied(straight / HALF, out)
    lines = (straight / "metrics.jsonl").read_text()
    (out / "metrics.jsonl").write_text(lines + '{"step": 3, "los')
    trained(out, data_path=tiny_dataset, resume_from_checkpoint="auto")
    assert losses(out) == losses(straight)
    assert [r["step"] for r in records(out) if "loss" in r] == list(range(1, 9))


# ---- two machines


def test_two_torchruns_train_what_one_trains_with_two_ranks(tmp_path, tiny_dataset):
    """Each is a machine's part of a training of two, as REFERENCE.md says it."""
    out, knobs = tmp_path / "out", {"data_path": tiny_dataset, "dropout": 0.1}
    call = [python(), "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    call += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    script = [str(ROOT / "train.py"), *words(output_dir=out, **knobs)]
    both = []
    for host in (1, 0):  # of real machines torchrun finds out itself which is the endpoint
        with open(tmp_path / f"log{host}", "w") as log:
            words_of_host = [*call, f"--rdzv-conf=is_host={host}", *script]
            env = os.environ | ONE_THREAD | {"PYTHON_EXEC": sys.executable}
            both.append(subprocess.Popen(words_of_host, env=env, stdout=log, stderr=log))
    codes = [process.wait(PATIENCE) for process in both]
    text = "".join((tmp_path / f"log{host}").read_text() for host in (0, 1))
    assert codes == [0, 0], text
    cores = len(os.sched_getaffinity(0))
    assert re.search(f"{cores} threads[^,]*, 2 ranks", text)  # each has all its cores
    one = trained(tmp_path / "one", ranks=2, **knobs)
    assert not differences(out / "final", one / "final")
    assert losses(out) == losses(one)
