"""What several rooms' tests share."""

import io
import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import sentencepiece

from corpus.prepare import DataConfig, main
from corpus.tokenizer import train_tokenizer
from tests import ROOT

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: small models only wait for threads


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    """A real tokenizer of 384 ids, trained in a moment."""
    lines = ["the quick brown fox jumps over a lazy dog?"]
    lines += ["once upon a time there was one who asked: why not!"]
    texts = [f"{lines[n % 2]}\n{lines[1 - n % 2][n % 7 :]} {n}.\n\n" for n in range(200)]
    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    return train_tokenizer(texts, folder / "tokenizer.model", 384)


def free_port():
    """Returns a port that nobody listened on a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def llama_cpp(file, use_jinja):
    """Returns llama.cpp's server on a GGUF file, with the template inside or its own chatml."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.use_jinja = str(file), use_jinja
    params.n_ctx, params.n_parallel, params.warmup = 128, 1, False
    return xllamacpp.Server(params)


def ask(server, route, **body):
    """Returns what llama.cpp's server answers to a request; HTTPError if it refuses."""
    body, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + route, body, kind)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def sentencepiece_model(texts, **recipe):
    """A .model file's bytes, by default BPE that leaves texts as they are, with Llama's ids."""
    model = io.BytesIO()
    settings = {"model_type": "bpe", "normalization_rule_name": "identity", "vocab_size": 384}
    settings |= {"remove_extra_whitespaces": False, "byte_fallback": True, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, **settings | recipe
    )
    return model.getvalue()


def byte_level(texts, specials, vocab_size):
    """A tokenizer of the package `tokenizers` as SmolLM's or Llama 3's: byte-level BPE."""
    library = pytest.importorskip("tokenizers")
    bpe = library.Tokenizer(library.models.BPE())
    bpe.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    options = {"initial_alphabet": alphabet, "special_tokens": specials, "show_progress": False}
    trainer = library.trainers.BpeTrainer(vocab_size=vocab_size, **options)
    bpe.train_from_iterator(texts, trainer)
    return bpe


def link_code(folder):
    """Puts what a clone holds into a folder, as links. Returns `folder`."""
    for kind in "*.py *.md *.txt configs corpus docs lib tools web Makefile".split():
        for path in ROOT.glob(kind):
            (folder / path.name).symlink_to(path)
    return folder


def write_rows(path, rows):
    """Writes rows as JSON Lines. Returns `path`."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepare_dataset(folder, documents, tokenizer_path=""):
    """Prepares `documents` as a dataset of 384 ids, a quarter of it for validation."""
    folder = Path(folder)
    source = write_rows(folder.with_suffix(".jsonl"), ({"text": text} for text in documents))
    knobs = {"vocab_size": 384, "sequence_length": 16, "train_ratio": 0.75, "use_minhash": False}
    knobs |= {"output_dir": str(folder), "tokenizer_path": str(tokenizer_path)}
    main(DataConfig(str(source), **knobs))
    return folder


@pytest.fixture(scope="session")
def tiny_documents():
    """Forty pages of English from Python's own help."""
    return [topics[name] for name in sorted(topics) if 200 < len(topics[name]) < 9000][:40]


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory, tiny_documents):
    """A prepared dataset of those pages, with its own tokenizer. Tests must not write into it."""
    return prepare_dataset(tmp_path_factory.mktemp("tiny_dataset") / "tiny", tiny_documents)


@pytest.fixture
def small_disk(tmp_path):
    """small_disk("6m") makes a folder a disk of that size, or resizes it; returns the folder."""
    folder = tmp_path / "small_disk"
    folder.mkdir()

    def sized(size):
        again, first = ["-o", f"remount,size={size}"], ["-t", "tmpfs", "-o", f"size={size}", "x"]
        words = ["mount", *(again if folder.is_mount() else first), folder]
        if sys.platform != "linux" or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("mounting takes root on Linux")
        return folder

    yield sized
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", folder], check=True)
