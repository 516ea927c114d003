"""What several rooms' tests share."""

import pytest

from tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    """A real tokenizer of 384 ids, trained in a moment."""
    lines = [
        "the quick brown fox jumps over a lazy dog?",
        "once upon a time there was one who asked: why not!",
    ]
    texts = [f"{lines[n % 2]}\n{lines[1 - n % 2][n % 7 :]} {n}.\n\n" for n in range(200)]
    return train_tokenizer(texts, tmp_path_factory.mktemp("tiny_tokenizer") / "tokenizer.model", 384)
