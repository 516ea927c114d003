"""The program of docs/SEVERAL_GPUS.md: a model divided over two processes learns as in one."""

import re
import runpy
import sys

import torch
import torch.nn.functional as F

from data import TokenStream
from model import load_model
from tests import ROOT
from tests.runs import Run, make_base

PAGE = (ROOT / "docs" / "SEVERAL_GPUS.md").read_text(encoding="utf-8")
STEPS = 3


def program(path, *words):
    sys.argv = [path, *map(str, words)]
    runpy.run_path(path, run_name="__main__")


def plain(folder, dataset):
    """Returns the weights after the same steps in one process, both ranks' rows in one batch."""
    model = load_model(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    loader = TokenStream([dataset], "train", model.cfg.sequence_length, 8)
    for step in range(STEPS):
        batch = loader.batch(step)
        ids, labels = (torch.from_numpy(batch[key]) for key in ("ids", "labels"))
        F.cross_entropy(model(ids).flatten(0, 1), labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def test_a_model_divided_over_two_processes_learns_what_one_does(
    tmp_path, tiny_dataset, tiny_tokenizer
):
    base = make_base(tmp_path / "base", tiny_tokenizer, sequence_length=16)
    (tmp_path / "fsdp.py").write_text(re.search("```python\n(.*?)```", PAGE, re.DOTALL)[1])
    words = (str(tmp_path / "fsdp.py"), base, tiny_dataset, tmp_path / "divided", STEPS)
    run = Run(tmp_path / "log", program, words, 2)
    assert run.wait() == [0, 0], run.text
    expected, before = plain(base, tiny_dataset), load_model(base).state_dict()
    for name, weights in load_model(tmp_path / "divided").state_dict().items():
        assert torch.allclose(weights, expected[name], atol=1e-6), name
        assert not torch.equal(weights, before[name]), name
    files = {path.name for path in base.iterdir()}
    assert {path.name for path in (tmp_path / "divided").iterdir()} == files
