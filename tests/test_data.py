"""data.py and lib/folders.py: the stream is exact and pure, damaged folders are named."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import TokenStream
from lib.config import UserError
from lib.folders import read_manifest

PAD, BOS, EOS = 0, 1, 2


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def write_dataset(folder, splits, vocab_size=100, tokenizer=b"tokenizer"):
    """A dataset folder written by hand from {split: [shard, ...]}, lists of ids."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    manifest = {"format": 1, "vocab_size": vocab_size, "tokenizer_sha256": sha256(tokenizer)}
    manifest |= {"dtype": "uint16", "pad_id": PAD, "bos_id": BOS, "eos_id": EOS, "config": {}}
    manifest["splits"] = {split: [] for split in splits}
    for split, shards in splits.items():
        for number, ids in enumerate(shards):
            name, data = f"{split}_{number:05d}", np.asarray(ids, "<u2").tobytes()
            (folder / f"{name}.bin").write_bytes(data)
            entry = {"bin": f"{name}.bin", "text": f"{name}.jsonl", "bin_sha256": sha256(data)}
            entry |= {"tokens": len(ids), "documents": 1, "bytes": 10 * len(ids)}
            manifest["splits"][split].append(entry | {"text_sha256": sha256(b"")})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def edit_manifest(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def targets(batch):
    """Every (input, label) pair the batch supervises."""
    keep = batch["labels"] != -100
    return sorted(zip(batch["ids"][keep].tolist(), batch["labels"][keep].tolist(), strict=True))


# ---- The stream


def test_labels_are_the_next_token_and_the_last_block_is_kept(tmp_path):  # traps B2, B37
    folder = write_dataset(tmp_path / "d", {"train": [range(10, 18)]})
    stream = TokenStream(folder, "train", 4, 1)
    assert (stream.blocks, stream.tokens, stream.vocab_size) == (2, 8, 100)
    batch = stream.rows(0, 2)
    assert batch["ids"].tolist() == [[10, 11, 12, 13], [14, 15, 16, 17]]
    assert batch["labels"].tolist() == [[11, 12, 13, 14], [15, 16, 17, -100]]
    assert batch["count"] == 7
    assert batch["ids"].dtype == batch["labels"].dtype == np.int64


@given(shards=st.lists(st.integers(1, 9), min_size=1, max_size=4), T=st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_one_pass_supervises_every_token_but_the_first_once(tmp_path_factory, shards, T):
    total = sum(shards)
    if total <= T:
        return
    ids, cuts = np.arange(3, 3 + total), np.cumsum(shards)[:-1]
    folder = write_dataset(tmp_path_factory.mktemp("d") / "d", {"train": np.split(ids, cuts)})
    stream = TokenStream(folder, "train", T, 1)
    expected = [(i, i + 1) for i in range(3, 2 + total)]
    assert targets(stream.rows(0, stream.blocks)) == expected
    for epoch in range(2):
        steps = range(epoch * stream.blocks, (epoch + 1) * stream.blocks)
        assert sorted(pair for step in steps for pair in targets(stream.batch(step))) == expected


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """64 blocks of 4 tokens in three shards, token k = k + 3."""
    ids = np.arange(3, 3 + 64 * 4 + 1)
    shards = {"train": [ids[:50], ids[50:51], ids[51:]]}
    return write_dataset(tmp_path_factory.mktemp("n") / "n", shards, 400)


def step_rows(folder, step, batch_size, world_size, accumulation, seed=7):
    stream = TokenStream(folder, "train", 4, batch_size, seed=seed, world_size=world_size)
    parts = [
        stream.batch(step, micro, rank, accumulation)["ids"]
        for micro in range(accumulation)
        for rank in range(world_size)
    ]
    return np.concatenate(parts)


@pytest.mark.parametrize(
    ("batch_size", "world_size", "accumulation"), [(4, 2, 1), (2, 4, 1), (4, 1, 2), (1, 2, 4)]
)
def test_world_size_and_accumulation_do_not_change_the_rows_of_a_step(
    numbers, batch_size, world_size, accumulation
):
    for step in (0, 5, 9, 1000):
        one = step_rows(numbers, step, 8, 1, 1)
        assert np.array_equal(one, step_rows(numbers, step, batch_size, world_size, accumulation))


def test_ranks_and_micro_steps_together_make_one_pass_and_passes_differ(numbers):  # trap B26
    passes = []
    for epoch in range(2):
        rows = np.concatenate([step_rows(numbers, 8 * epoch + step, 1, 2, 4) for step in range(8)])
        assert sorted(rows[:, 0]) == list(range(3, 3 + 256, 4))
        passes.append(rows[:, 0].tolist())
    assert passes[0] != passes[1]
    assert passes[0] != sorted(passes[0])
    first = TokenStream(numbers, "train", 4, 2, world_size=2)
    assert not np.array_equal(first.batch(0, 0, 0, 1)["ids"], first.batch(0, 0, 1, 1)["ids"])


GOLDEN = [131, 3, 15, 155, 171, 35]


def test_a_batch_depends_on_nothing_but_its_address(numbers):
    stream = TokenStream(numbers, "train", 4, 3, seed=1)
    late = stream.batch(77, 1, 0, 2)["ids"]
    np.random.seed(0)
    for step in range(5):
        stream.batch(step)
    fresh = TokenStream(numbers, "train", 4, 3, seed=1)
    assert np.array_equal(late, fresh.batch(77, 1, 0, 2)["ids"])
    other = TokenStream(numbers, "train", 4, 3, seed=2)
    assert not np.array_equal(late, other.batch(77, 1, 0, 2)["ids"])
    # a resumed run relies on the order: it must not move between releases
    assert TokenStream(numbers, "train", 4, 6).batch(0)["ids"][:, 0].tolist() == GOLDEN


def test_document_mask_restarts_positions_and_leaves_bos_unsupervised(tmp_path):
    ids = [BOS, 5, 6, EOS, BOS, 7, EOS, BOS, 8, EOS]
    folder = write_dataset(tmp_path / "d", {"train": [ids]})
    plain = TokenStream(folder, "train", 6, 1).rows(0, 2)
    assert set(plain) == {"ids", "labels", "count"}
    assert plain["count"] == 9
    batch = TokenStream(folder, "train", 6, 1, document_mask=True).rows(0, 2)
    assert batch["documents"].tolist()[0] == [1, 1, 1, 1, 2, 2]
    assert batch["documents"].dtype == np.int32
    assert batch["positions"].tolist()[0] == [0, 1, 2, 3, 0, 1]
    assert batch["positions"].dtype == np.int64
    assert batch["labels"].tolist() == [[5, 6, EOS, -100, 7, EOS], [-100, 8, EOS, -100, -100, -100]]
    assert batch["documents"].tolist()[1][:4] == [0, 1, 1, 1]
    assert batch["count"] == 7


def test_mixture_keeps_its_proportions_exactly_and_each_pass_complete(tmp_path):
    a = write_dataset(tmp_path / "a", {"train": [range(100, 125)]}, 400)
    b = write_dataset(tmp_path / "b", {"train": [range(200, 305)]}, 400)
    stream = TokenStream([a, b], "train", 4, 64, seed=3, weights=[3, 1])
    rows = np.concatenate([stream.batch(step)["ids"][:, 0] for step in range(32)])
    assert [int(np.sum(rows[start : start + 1024] < 200)) for start in (0, 1024)] == [768, 768]
    from_b = rows[rows >= 200][: 26 * 3].reshape(3, 26)  # 105 tokens = 26 blocks a pass
    assert all(sorted(part) == list(range(200, 304, 4)) for part in from_b.tolist())
    again = TokenStream([a, b], "train", 4, 64, seed=3, weights=[3, 1])
    assert np.array_equal(again.batch(31)["ids"], stream.batch(31)["ids"])


def test_several_datasets_without_weights_are_one_long_one(tmp_path):
    a = write_dataset(tmp_path / "a", {"train": [range(100, 125)]}, 400)
    b = write_dataset(tmp_path / "b", {"train": [range(200, 305)]}, 400)
    stream = TokenStream([a, b], "train", 4, 1)
    assert (stream.blocks, stream.tokens) == (6 + 26, 130)
    seen = sorted(int(stream.batch(step)["ids"][0, 0]) for step in range(32))
    assert seen == [*range(100, 124, 4), *range(200, 304, 4)]


# ---- Damaged folders (one line each, naming the thing)


def shard(field, value):
    return lambda manifest: manifest["splits"]["train"][0].__setitem__(field, value)


def top(field, value):
    return lambda manifest: manifest.__setitem__(field, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shard("bin", "../../etc/passwd"), "not as data.py writes it"),
        (shard("bin", "/etc/passwd"), "not as data.py writes it"),
        (shard("bin", ".."), "not as data.py writes it"),
        (shard("bin", "a\\b"), "not as data.py writes it"),
        (shard("text", "x\n"), "not as data.py writes it"),
        (shard("bin", "none.bin"), "none.bin is missing"),
        (shard("tokens", -1), "not as data.py writes it"),
        (shard("tokens", True), "not as data.py writes it"),
        (shard("tokens", 49), "has 100 bytes, expected 98"),
        (shard("bin_sha256", "0" * 64), "checksum mismatch"),
        (top("format", 2), "format 2, this program reads 1"),
        (top("dtype", "float32"), "not as data.py writes it"),
        (top("splits", {}), "holds no train documents"),
        (top("splits", {"train": [3]}), "not as data.py writes it"),
        (top("vocab_size", 9), "outside the vocabulary of 9"),
        (top("tokenizer_sha256", "0" * 64), "checksum mismatch"),
        (lambda manifest: manifest.pop("vocab_size"), "not as data.py writes it"),
    ],
)
def test_a_damaged_manifest_is_refused_by_name(tmp_path, change, message):
    folder = write_dataset(tmp_path / "d", {"train": [range(3, 53)]})
    edit_manifest(folder, change)
    with pytest.raises(UserError, match=message.replace("..", r"\.\.")) as caught:
        TokenStream(folder, "train", 4, 1).rows(0, 99)
    assert "\n" not in str(caught.value)


def test_damaged_shards_are_refused_by_name(tmp_path):
    folder = write_dataset(tmp_path / "d", {"train": [range(3, 53)]})
    good = (folder / "train_00000.bin").read_bytes()
    damaged = good[:40] + b"\x01" + good[41:]
    for bad, message in [(good[:-1], "99 bytes"), (damaged, "checksum mismatch")]:
        (folder / "train_00000.bin").write_bytes(bad)
        with pytest.raises(UserError, match=f"train_00000.bin.*{message}"):
            TokenStream(folder, "train", 4, 1)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", '"x"', "{", "\x00", "[" * 100_000, '{"format": 1}', "{}"]
)
def test_a_manifest_that_is_no_manifest(tmp_path, text):
    folder = write_dataset(tmp_path / "d", {"train": [range(3, 53)]})
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError):
        read_manifest(folder)


def test_missing_short_and_mismatched_datasets(tmp_path):
    with pytest.raises(UserError, match="no prepared dataset"):
        TokenStream(tmp_path / "none", "train", 4, 1)
    short = write_dataset(tmp_path / "short", {"train": [range(3, 9)]})
    with pytest.raises(UserError, match="only 6 tokens, need at least 257"):
        TokenStream(short, "train", 256, 1)
    with pytest.raises(UserError, match="holds no val documents"):
        TokenStream(short, "val", 4, 1)
    other = write_dataset(tmp_path / "other", {"train": [range(3, 9)]}, tokenizer=b"another")
    with pytest.raises(UserError, match=sha256(b"tokenizer")[:12] + ".*" + sha256(b"another")[:12]):
        TokenStream([short, other], "train", 4, 1)
    for weights in ([1], [1, -1], [1, float("nan")], [1, 1e-9]):
        with pytest.raises(UserError, match="weight"):
            TokenStream([short, short], "train", 4, 1, weights=weights)
