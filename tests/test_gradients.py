"""Gradients summed while the backward pass goes on are those that are summed after it."""

import functools
import os

import pytest
import torch
import torch.distributed as dist

from lib import runtime
from tests.conftest import write_rows
from tests.runs import Run, differences, losses, make_base
from tests.runs import train_to_end as trained
from train import PretrainConfig

SMALL = 1500  # numbers in a bucket: half a dozen buckets in the smallest model here


class Plain:
    """An all_reduce of every gradient once the backward pass is over: the oracle."""

    fixed = False

    def __init__(self, parameters, world):
        self.parameters = parameters

    def send_early(self, last):
        pass

    def sum(self):
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)


def plain():
    runtime.Gradients = Plain


def early(log=None):
    """Has small buckets, and notes in `log` of each rank which sums began within backward."""
    runtime.Gradients = functools.partial(runtime.Gradients, size=SMALL)
    all_reduce, backward, within = dist.all_reduce, torch.Tensor.backward, []

    def noted(tensor, async_op=False):
        if async_op and log:
            with open(f"{log}{os.environ['RANK']}", "a") as file:
                file.write(f"{tensor.numel()} {len(within)}\n")
        return all_reduce(tensor, async_op=async_op)

    def inside(*args, **kwargs):
        within.append(1)
        backward(*args, **kwargs)
        within.pop()

    dist.all_reduce, torch.Tensor.backward = noted, inside


def noted_sums(log):
    """Returns [(numbers of a bucket, whether its sum began in backward), ...] of each rank."""
    texts = [log.with_name(f"{log.name}{rank}").read_text() for rank in (0, 1)]
    return [[tuple(map(int, line.split())) for line in text.splitlines()] for text in texts]


CASES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "accumulated": {"gradient_accumulation_steps": 3},
    "recomputed": {"gradient_checkpointing": True, "optimizer": "muon"},
    "bf16": {"dtype": "bf16", "dropout": 0.1},
}


@pytest.mark.parametrize("knobs", CASES.values(), ids=CASES)
def test_a_training_of_two_ranks_learns_what_it_learns_with_plain_sums(
    tmp_path, tiny_dataset, knobs
):
    knobs = {"ranks": 2, "data_path": tiny_dataset, "sample_tokens": 0, "max_steps": 4} | knobs
    after = trained(tmp_path / "after", before=plain, **knobs)
    log = tmp_path / "sums"
    behind = trained(tmp_path / "behind", before=functools.partial(early, log), **knobs)
    assert not differences(behind / "step_000004", after / "step_000004")
    assert losses(behind) == losses(after)
    one, other = noted_sums(log)
    assert one == other
    assert len(one) % 4 == 0  # of four steps, however many micro-batches each has
    assert len(one) >= 4 * 5
    assert all(within for _, within in one)


def test_adapters_learn_what_they_learn_with_plain_sums(tmp_path, tiny_tokenizer):
    rows = [{"prompt": f"what is {n}?", "response": f"a {n} and {7 * n}"} for n in range(40)]
    knobs = {"model_path": make_base(tmp_path / "base", tiny_tokenizer, "chatml")}
    knobs |= {"dataset_path": write_rows(tmp_path / "rows.jsonl", rows), "sample_tokens": 0}
    knobs |= {"program": "sft", "ranks": 2, "packing": False, "merge": False}
    after = trained(tmp_path / "after", before=plain, **knobs)
    behind = trained(tmp_path / "behind", before=early, **knobs)
    weights = [out / "final" / "adapter_model.safetensors" for out in (behind, after)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert losses(behind) == losses(after)


def leaving_out(folder):
    """Ranks whose losses read other parameters: 0 and 2, or 2 and 1; none reads 3."""
    with runtime.open_world(PretrainConfig(device="cpu")) as world:
        parameters = [torch.nn.Parameter(torch.full((3, n), float(n))) for n in (2, 5, 7, 4)]
        gradients = runtime.Gradients(parameters, world, size=1)
        for _ in range(2):
            for p in parameters:
                p.grad.zero_()
            for micro in (0, 1):
                gradients.send_early(micro == 1)
                sum(parameters[n].square().sum() for n in ((0, 2), (2, 1))[world.rank]).backward()
            gradients.sum()
        torch.save([p.grad for p in parameters], folder / f"{world.rank}.pt")


def test_ranks_whose_losses_leave_out_parameters_wait_for_each_other_and_add_zeros(tmp_path):
    run = Run(tmp_path / "log", leaving_out, (tmp_path,), 2)
    assert run.wait() == [0, 0], run.text
    for rank in (0, 1):
        sums = torch.load(tmp_path / f"{rank}.pt")
        # d(x^2)/dx = 2 x, in two micro-batches, on as many ranks as read the parameter
        assert [set(g.flatten().tolist()) for g in sums] == [{8.0}, {20.0}, {56.0}, {0.0}]
