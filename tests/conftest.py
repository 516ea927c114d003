"""What several rooms' tests share."""

import json
import os
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from data import DataConfig, main
from tokenizer import train_tokenizer

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there: small models only wait for threads


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    """A real tokenizer of 384 ids, trained in a moment."""
    lines = [
        "the quick brown fox jumps over a lazy dog?",
        "once upon a time there was one who asked: why not!",
    ]
    texts = [f"{lines[n % 2]}\n{lines[1 - n % 2][n % 7 :]} {n}.\n\n" for n in range(200)]
    return train_tokenizer(texts, tmp_path_factory.mktemp("tiny_tokenizer") / "tokenizer.model", 384)


def prepare_dataset(folder, documents, tokenizer_path=""):
    """Prepares `documents` as a dataset of 384 ids, a quarter of it for validation. Returns `folder`."""
    folder = Path(folder)
    source = folder.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    knobs = {"vocab_size": 384, "sequence_length": 16, "train_ratio": 0.75, "use_minhash": False}
    main(DataConfig(str(source), output_dir=str(folder), tokenizer_path=str(tokenizer_path), **knobs))
    return folder


@pytest.fixture(scope="session")
def tiny_documents():
    """Forty pages of English from Python's own help."""
    return [topics[name] for name in sorted(topics) if 200 < len(topics[name]) < 9000][:40]


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory, tiny_documents):
    """A prepared dataset of those pages, with its own tokenizer. Tests must not write into it."""
    return prepare_dataset(tmp_path_factory.mktemp("tiny_dataset") / "tiny", tiny_documents)


@pytest.fixture(scope="session")
def forks():
    """The server that trainings are forked from (tests/runs.py), started before the first of them."""
    from tests.runs import start_server  # imports torch, which not every test file needs

    start_server()
