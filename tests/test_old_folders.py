"""Folders that an earlier commit (ab8a7ca) wrote open: dataset, checkpoint, model, adapter."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from data import TokenStream
from lib.conversation import render
from lib.folders import Shards, read_manifest
from lib.tokenizer import Tokenizer
from model import load_model
from sample import Request, Sampling, generate, open_model
from tests import ROOT
from tests.runs import Run, records, training

OLD = ROOT / "tests" / "old_folders"
EXPECTED = json.loads((OLD / "expected.json").read_text())


def test_a_dataset_opens():
    manifest = read_manifest(OLD / "data")
    counts = {name: sum(e["tokens"] for e in parts) for name, parts in manifest["splits"].items()}
    assert {name: Shards(OLD / "data", name).tokens for name in counts} == counts
    batch = TokenStream([OLD / "data"], "train", 64, 2, seed=42).batch(0)
    assert batch["ids"].shape == (2, 64)


@pytest.mark.parametrize("folder", EXPECTED)
def test_a_model_and_an_adapter_answer_as_before(folder):
    expected = EXPECTED[folder]
    with torch.no_grad():
        logits = load_model(OLD / folder).eval()(torch.tensor([expected["ids"]]))[0, -1, :8]
    assert logits.tolist() == pytest.approx(expected["logits"], abs=1e-5)
    model, tokenizer = open_model(OLD / folder, "cpu", "fp32")
    assert [tokenizer.bos_id, *tokenizer.encode("What is 3 plus 4?")] == expected["ids"]
    request = Request(expected["ids"], 8, Sampling(temperature=0))
    for _ in generate(model, [request]):
        pass
    assert request.ids == expected["answer"]


def test_a_chat_is_rendered_as_the_folder_says():
    """Its chatml has a line break before <|im_end|>; the oracle is the Jinja in the folder."""
    folder = OLD / "sft" / "final"
    auto = pytest.importorskip("transformers").AutoTokenizer
    tokenizer, other = Tokenizer.load(folder), auto.from_pretrained(folder)
    assert tokenizer.template == "chatml_newline"
    talk = [{"role": role, "content": f"{role}\n1."} for role in ("system", "user", "assistant")]
    theirs = other.apply_chat_template(talk, return_dict=False)
    assert render(tokenizer, talk, tokenizer.template)[0] == theirs
    assert Tokenizer.load(OLD / "run").template is None


def test_a_checkpoint_is_resumed_to_the_same_weights_and_losses(tmp_path):
    output = tmp_path / "run"
    shutil.copytree(OLD / "run", output, ignore=shutil.ignore_patterns("final"))
    preset = output / "step_000004" / "run.json"
    flags = [f"--output_dir={output}", f"--data_path={OLD / 'data'}"]
    words = [str(preset), *flags, "--resume_from_checkpoint=auto"]
    run = Run(tmp_path / "log", training, (words,))
    assert run.wait() == [0], run.text
    weights = safetensors.torch.load_file(output / "final" / "model.safetensors")
    for name, tensor in safetensors.torch.load_file(OLD / "run/final/model.safetensors").items():
        assert torch.allclose(weights[name], tensor, atol=1e-5), name
    losses = [record["loss"] for record in records(output) if "loss" in record]
    before = [record["loss"] for record in records(OLD / "run") if "loss" in record]
    assert losses == pytest.approx(before, abs=1e-5)
