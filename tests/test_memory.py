"""Running out of memory: one line that names the flags that fit."""

import functools
import os
import re
import resource
from pathlib import Path

import pytest
import torch

import model
from lib.checkpoint import checkpoints, problem_with
from tests.conftest import write_rows
from tests.runs import begin, make_base, names, records, refused
from tests.runs import train_to_end as trained

EXACT = {"sample_tokens": 0, "logging_steps": 1}
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")


def failing(error, above, number, learning=True, rank=None):
    """MLPs find no memory for more than `above` rows, from the `number`-th such call on."""
    calls = []

    def hook(module, inputs, output):
        if isinstance(module, model.MLP) and module.training == learning and len(output) > above:
            calls.append(1)
            if len(calls) >= number:
                raise error

    if rank in (None, int(os.environ.get("RANK", 0))):
        torch.nn.modules.module.register_module_forward_hook(hook)


def failing_save(number):
    """The `number`-th file of a checkpoint finds no memory."""
    failing_call(torch, "save", number)


def failing_call(owner, name, number):
    """The `number`-th call of a function finds no memory."""
    original, calls = getattr(owner, name), []

    def patched(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise CPU
        return original(*args, **kwargs)

    setattr(owner, name, patched)


def limit_address_space():
    """What is in use now and 160 MB, as `ulimit -v` would have it."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + 160_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def curve(out):
    return [r["loss"] for r in records(out) if "grad_norm" in r]


@pytest.mark.parametrize(("error", "rows", "halves"), [(CUDA, 4, "2"), (CPU, 3, "1")])
def test_the_flags_that_it_names_train_the_same_steps_from_the_last_checkpoint(
    tmp_path, tiny_dataset, error, rows, halves
):
    knobs = EXACT | {"data_path": tiny_dataset, "batch_size": rows}
    whole, out = trained(tmp_path / "whole", **knobs), tmp_path / "out"
    before = functools.partial(failing, error, int(halves), 11)  # in step 6
    line = refused(out, before=before, **knobs)
    assert line.startswith("error: out of memory; checkpoints are untouched; continue with ")
    assert "or --gradient_checkpointing" in line
    assert [folder.name for folder in checkpoints(out)] == ["step_000004"]
    flags = dict(re.findall(r"--(\w+)=(\w+)", line))
    assert flags["batch_size"] == halves
    once_more = functools.partial(failing, error, int(halves), 1)
    out = trained(out, **knobs | flags | {"before": once_more})
    assert curve(out) == pytest.approx(curve(whole), rel=1e-5)
    again = trained(tmp_path / "again", **knobs, resume_from_checkpoint=out / "step_000004",
                    gradient_checkpointing=True)  # fmt: skip
    assert curve(again) == pytest.approx(curve(whole)[4:], rel=1e-5)


def test_with_one_row_and_checkpointing_it_names_what_is_left(tmp_path, tiny_dataset):
    knobs = EXACT | {"data_path": tiny_dataset, "batch_size": 1, "gradient_checkpointing": True}
    line = refused(tmp_path / "out", before=functools.partial(failing, CUDA, 0, 1), **knobs)
    assert line == (
        "error: out of memory; checkpoints are untouched; use a shorter --sequence_length or a "
        "smaller model (--plan shows what takes how much)"
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_without_memory_ends_them_all(tmp_path, tiny_dataset, rank):
    knobs = EXACT | {"data_path": tiny_dataset, "batch_size": 4}
    before = functools.partial(failing, CUDA, 2, 5, rank=rank)
    one = begin(tmp_path / "out", ranks=2, before=before, **knobs)
    assert one.wait() == [2, 2], one.text
    assert one.text.count("error: out of memory; checkpoints are untouched; continue with") == 1
    assert one.text.count(f"error: rank {1 - rank} lost another rank, whose own message says") == 1
    assert "Traceback" not in one.text


MOMENTS = {
    "validation": (failing, CUDA, 1, 1, False),
    "update": (failing_call, torch.optim.AdamW, "step", 6),
    "checkpoint": (failing_save, 4),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("program", ["train", "sft", "dpo"])
def test_wherever_it_runs_out_nothing_of_the_last_checkpoint_is_lost(
    tmp_path, tiny_dataset, tiny_tokenizer, program, moment
):
    out, before = tmp_path / "out", functools.partial(*MOMENTS[moment])
    knobs = {"batch_size": 4, "eval_steps": 6, "before": before}
    if program == "train":
        knobs["data_path"] = tiny_dataset
    else:
        base = make_base(tmp_path / "base", tiny_tokenizer, "chatml")
        rows = write_rows(tmp_path / "rows.jsonl", ROWS)
        knobs |= {"model_path": base, "dataset_path": rows, "val_ratio": 0.4}
    one = begin(out, program=program, **knobs)
    assert one.wait() == [2], one.text
    assert one.text.splitlines()[-1].startswith("error: out of memory; checkpoints are untouched; ")
    assert "Traceback" not in one.text
    assert [name for name in names(out) if name.startswith(("step", ".tmp"))] == ["step_000004"]
    assert problem_with(out / "step_000004") is None


ROWS = [
    {"prompt": f"what is {n}?", "response": f"a {n}", "chosen": f"a {n}", "rejected": "I won't say"}
    for n in range(40)
]


def test_another_error_is_not_taken_for_want_of_memory(tmp_path, tiny_dataset):
    before = functools.partial(failing, RuntimeError("size mismatch of a kind"), 0, 1)
    one = begin(tmp_path / "out", before=before, data_path=tiny_dataset, **EXACT)
    assert one.wait() == [1]
    assert "size mismatch of a kind" in one.text
    assert "out of memory" not in one.text


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
def test_a_real_limit_of_the_address_space_is_told_in_one_line(tmp_path, tiny_dataset):
    knobs = EXACT | {"data_path": tiny_dataset, "batch_size": 4096, "eval_rows": 1}
    line = refused(tmp_path / "out", before=limit_address_space, **knobs)
    assert "--batch_size=2048 --gradient_accumulation_steps=2" in line
