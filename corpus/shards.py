"""The shards of a prepared dataset, written; lib/folders.py describes and reads them."""

import itertools
import json

import numpy as np

from lib.config import fsync
from lib.folders import ID_TYPES, check_file, file_sha256


def dtype_name(vocab_size):
    """Returns the manifest's name for the type that holds ids below `vocab_size`."""
    return "uint16" if vocab_size <= 65_535 else "uint32"


def text_row(text):
    """Returns a document as a line of a .jsonl file."""
    return json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"


def read_texts(path):
    """Yields the documents of a .jsonl file."""
    with open(path, "rb") as file:
        for line in file:
            yield json.loads(line)["text"]


def write_shards(folder, split, documents, vocab_size, shard_tokens, first=0):
    """Writes (text, ids) into shards, numbered from `first`. Yields the manifest's entry of each.

    A shard ends with the document that reaches `shard_tokens`, and is on the disk when yielded.
    """
    dtype, documents = ID_TYPES[dtype_name(vocab_size)], iter(documents)
    for number, document in zip(itertools.count(first), documents):
        name = f"{split}_{number:05d}"
        entry = {"bin": f"{name}.bin", "text": f"{name}.jsonl"}
        entry |= {"tokens": 0, "documents": 0, "bytes": 0}
        with open(folder / entry["bin"], "wb") as bins, open(folder / entry["text"], "wb") as texts:
            for text, ids in itertools.chain([document], documents):
                assert max(ids) < vocab_size
                bins.write(np.asarray(ids, dtype).tobytes())
                texts.write(text_row(text))
                entry["tokens"] += len(ids)
                entry["documents"] += 1
                entry["bytes"] += len(text.encode())
                if entry["tokens"] >= shard_tokens:
                    break
        for kind in ("bin", "text"):
            fsync(folder / entry[kind])
            entry[f"{kind}_sha256"] = file_sha256(folder / entry[kind])
        yield entry


def check_shards(folder, manifest, kinds):
    """Raises UserError unless the shards' files of these kinds, bin or text, are unchanged."""
    for entry in itertools.chain.from_iterable(manifest["splits"].values()):
        for kind in kinds:
            check_file(folder, entry[kind], entry[f"{kind}_sha256"])
