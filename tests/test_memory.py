"""Running out of memory: smaller micro-batches, the same steps; by injected failures and by a real limit."""

import os
import re
import resource
from pathlib import Path

import pytest
import torch

import model
from tests.runs import begin, differences, records, refused
from tests.runs import train_to_end as trained

EXACT = {"sample_tokens": 0, "logging_steps": 1}


def fail_above(rows, rank=None):
    """From the fifth micro-batch on, the second block's MLP finds no memory for more than `rows`."""
    if rank is not None and os.environ["RANK"] != str(rank):
        return
    seen = []

    def hook(module, inputs, output):
        if isinstance(module, model.MLP) and module.training:
            seen.append(1)
            if len(seen) % 2 == 0 and len(seen) > 8 and len(output) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    torch.nn.modules.module.register_module_forward_hook(hook)


def fail_above_one():
    fail_above(1)


def fail_above_none():
    fail_above(0)


def fail_above_two_on_rank_one():
    fail_above(2, rank=1)


def limit_address_space():
    """What is in use now and 160 MB, as `ulimit -v` would have it."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + 160_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def curve(out):
    return [r["loss"] for r in records(out) if "grad_norm" in r]


def log_of(out):
    return out.with_suffix(".log").read_text()


def test_without_memory_the_micro_batches_halve_and_every_step_stays_what_it_was(
    tmp_path, tiny_dataset
):
    knobs = EXACT | {"data_path": tiny_dataset}
    whole = trained(tmp_path / "whole", batch_size=4, **knobs)
    halved = trained(tmp_path / "halved", before=fail_above_one, batch_size=4, **knobs)
    said = re.findall(r"out of memory at step .*", log_of(halved))
    assert [line.split(":")[0] for line in said] == ["out of memory at step 5"] * 2
    assert "micro-batches of 1 rows instead of 2, 4 a step instead of 2" in said[1]
    assert curve(halved) == pytest.approx(curve(whole), rel=1e-5)


def test_a_halved_run_resumes_as_if_it_had_not_stopped_with_either_command_line(
    tmp_path, tiny_dataset
):
    knobs = EXACT | {"data_path": tiny_dataset, "dropout": 0.1}
    whole = trained(tmp_path / "whole", before=fail_above_one, batch_size=2, **knobs)
    again = {"resume_from_checkpoint": whole / "step_000004"}
    same = trained(tmp_path / "same", before=fail_at_once_above_one, batch_size=2, **knobs, **again)
    assert not differences(whole / "step_000008", same / "step_000008")
    said = {"batch_size": 1, "gradient_accumulation_steps": 2}
    other = trained(tmp_path / "other", **said, **knobs, **again)
    assert not differences(
        whole / "step_000008", other / "step_000008", but=["state.best"]
    )  # a sum's order


def fail_at_once_above_one():
    def hook(module, inputs, output):
        if isinstance(module, model.MLP) and module.training and len(output) > 1:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
            )

    torch.nn.modules.module.register_module_forward_hook(hook)


def test_three_rows_become_single_ones(tmp_path, tiny_dataset):
    out = trained(
        tmp_path / "out", before=fail_above_one, batch_size=3, data_path=tiny_dataset, **EXACT
    )
    assert "micro-batches of 1 rows instead of 3, 3 a step instead of 1" in log_of(out)


def test_when_one_row_is_too_much_the_error_says_what_helps(tmp_path, tiny_dataset):
    line = refused(
        tmp_path / "out", before=fail_above_none, batch_size=1, data_path=tiny_dataset, **EXACT
    )
    assert "out of memory at step 5 with one row" in line
    assert "--gradient_checkpointing" in line


def test_one_rank_without_memory_halves_them_all(tmp_path, tiny_dataset):
    knobs = EXACT | {"data_path": tiny_dataset, "batch_size": 4}
    whole = trained(tmp_path / "whole", ranks=2, **knobs)
    halved = trained(tmp_path / "halved", ranks=2, before=fail_above_two_on_rank_one, **knobs)
    assert log_of(halved).count("out of memory at step") == 1
    assert curve(halved) == pytest.approx(curve(whole), rel=1e-5)


def test_another_error_is_not_taken_for_want_of_memory(tmp_path, tiny_dataset):
    one = begin(tmp_path / "out", before=break_shapes, data_path=tiny_dataset, **EXACT)
    assert one.wait() == [1]
    assert "size mismatch of a kind" in one.text
    assert "out of memory" not in one.text


def break_shapes():
    def hook(module, inputs, output):
        raise RuntimeError("size mismatch of a kind")

    torch.nn.modules.module.register_module_forward_hook(hook)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
def test_a_real_limit_of_the_address_space_costs_time_but_not_the_run(tmp_path, tiny_dataset):
    knobs = EXACT | {"data_path": tiny_dataset, "batch_size": 4096, "max_steps": 2, "eval_rows": 1}
    knobs |= {"save_steps": 100, "eval_steps": 100}
    whole = trained(tmp_path / "whole", **knobs)
    tight = trained(tmp_path / "tight", before=limit_address_space, **knobs)
    assert "out of memory at step 1: from here micro-batches of 2048 rows" in log_of(tight)
    assert curve(tight) == pytest.approx(curve(whole), rel=1e-4)
