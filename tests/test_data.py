"""data.py: the stream is exact and pure, damaged folders are named, raw text becomes clean shards."""

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import ftfy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configurator import UserError, configure  # noqa: E402
from data import DataConfig, Shards, TokenStream, main, read_manifest, unigram_bits_per_byte  # noqa: E402
from prepare import (  # noqa: E402
    Deduplicator,
    clean,
    fix_encoding,
    hash_fraction,
    reject,
    shingles,
    unfinished,
)
from tokenizer import Tokenizer  # noqa: E402

PAD, BOS, EOS = 0, 1, 2


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def write_dataset(folder, splits, vocab_size=100, tokenizer=b"tokenizer"):
    """A dataset folder written by hand from {split: [shard, ...]} (lists of ids): an oracle independent of
    prepare.
    """
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    manifest = {
        "format": 1,
        "vocab_size": vocab_size,
        "tokenizer_sha256": sha256(tokenizer),
        "dtype": "uint16",
        "pad_id": PAD,
        "bos_id": BOS,
        "eos_id": EOS,
        "config": {},
        "splits": {},
    }
    for split, shards in splits.items():
        entries = manifest["splits"].setdefault(split, [])
        for number, ids in enumerate(shards):
            name, data = f"{split}_{number:05d}", np.asarray(ids, "<u2").tobytes()
            (folder / f"{name}.bin").write_bytes(data)
            entries.append(
                {
                    "bin": f"{name}.bin",
                    "text": f"{name}.jsonl",
                    "tokens": len(ids),
                    "documents": 1,
                    "bytes": 10 * len(ids),
                    "bin_sha256": sha256(data),
                    "text_sha256": sha256(b""),
                }
            )
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


# --- The stream ---------------------------------------------------------------------------------------------


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
    return write_dataset(tmp_path_factory.mktemp("n") / "n", {"train": [ids[:50], ids[50:51], ids[51:]]}, 400)


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
    assert not np.array_equal(late, TokenStream(numbers, "train", 4, 3, seed=2).batch(77, 1, 0, 2)["ids"])
    golden = TokenStream(numbers, "train", 4, 6).batch(0)["ids"][:, 0].tolist()
    assert (
        golden == GOLDEN
    )  # the order is part of what a resumed run relies on: it must not move between releases


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


def test_unigram_baseline_is_what_a_hand_count_gives(tmp_path):
    folder = write_dataset(tmp_path / "d", {"train": [[1, 3, 3, 2]], "val": [[1, 3, 2]]}, vocab_size=4)
    # add-one: p(0)=1/8 p(1)=2/8 p(2)=2/8 p(3)=3/8; the targets are 3 and 2; 30 bytes of text
    expected = -(np.log2(3 / 8) + np.log2(2 / 8)) / 30
    assert abs(unigram_bits_per_byte(folder) - expected) < 1e-12


# --- Damaged folders (one line each, naming the thing) ------------------------------------------------------


def shard(field, value):
    return lambda manifest: manifest["splits"]["train"][0].__setitem__(field, value)


def top(field, value):
    return lambda manifest: manifest.__setitem__(field, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shard("bin", "../../etc/passwd"), "illegal file name '../../etc/passwd'"),
        (shard("bin", "/etc/passwd"), "illegal file name"),
        (shard("bin", ".."), "illegal file name"),
        (shard("bin", "a\\b"), "illegal file name"),
        (shard("text", "x\n"), "illegal file name"),
        (shard("bin", "none.bin"), "not found"),
        (shard("tokens", -1), "illegal 'tokens'"),
        (shard("tokens", True), "illegal 'tokens'"),
        (shard("tokens", 49), "bytes, the manifest says 98"),
        (shard("bin_sha256", "0" * 64), "sha256 mismatch"),
        (top("format", 2), "format 2, this program reads 1"),
        (top("dtype", "float32"), "illegal 'dtype'"),
        (top("splits", {}), "holds no train documents"),
        (top("splits", {"train": [3]}), "expected an object"),
        (top("vocab_size", 9), "outside the vocabulary of 9"),
        (top("tokenizer_sha256", "0" * 64), "sha256 is"),
        (lambda manifest: manifest.pop("vocab_size"), "'vocab_size' is missing"),
    ],
)
def test_a_damaged_manifest_is_refused_by_name(tmp_path, change, message):
    folder = write_dataset(tmp_path / "d", {"train": [range(3, 53)]})
    edit_manifest(folder, change)
    with pytest.raises(UserError, match=message.replace("..", r"\.\.")) as caught:
        TokenStream(folder, "train", 4, 1).batch(0)
    assert "\n" not in str(caught.value)


def test_damaged_shards_are_refused_by_name(tmp_path):
    folder = write_dataset(tmp_path / "d", {"train": [range(3, 53)]})
    good = (folder / "train_00000.bin").read_bytes()
    for bad, message in [(good[:-1], "99 bytes"), (good[:40] + b"\x01" + good[41:], "sha256 mismatch")]:
        (folder / "train_00000.bin").write_bytes(bad)
        with pytest.raises(UserError, match=f"train_00000.bin: .*{message}"):
            TokenStream(folder, "train", 4, 1)
    TokenStream(folder, "train", 4, 1, verify=False)  # a large dataset is hashed only when asked


@pytest.mark.parametrize("text", ["", "[]", "3", '"x"', "{", "\x00", "[" * 100_000, '{"format": 1}', "{}"])
def test_a_manifest_that_is_no_manifest(tmp_path, text):
    folder = write_dataset(tmp_path / "d", {"train": [range(3, 53)]})
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError):
        read_manifest(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(
    field=st.sampled_from(["format", "vocab_size", "dtype", "splits", "config", "tokenizer_sha256"]),
    value=JSON,
)
@settings(max_examples=100, deadline=None)
def test_the_manifest_reader_raises_nothing_but_user_errors(tmp_path_factory, field, value):  # Z1
    folder = write_dataset(tmp_path_factory.mktemp("d") / "d", {"train": [range(3, 53)]})
    edit_manifest(folder, top(field, value))
    with contextlib.suppress(UserError):
        TokenStream(folder, "train", 4, 1)


def test_missing_short_and_mismatched_datasets(tmp_path):
    with pytest.raises(UserError, match="no prepared dataset"):
        TokenStream(tmp_path / "none", "train", 4, 1)
    short = write_dataset(tmp_path / "short", {"train": [range(3, 9)]})
    with pytest.raises(UserError, match="only 6 tokens, need at least 257"):
        TokenStream(short, "train", 256, 1)
    with pytest.raises(UserError, match="holds no val documents"):
        TokenStream(short, "val", 4, 1)
    other = write_dataset(tmp_path / "other", {"train": [range(3, 9)]}, tokenizer=b"another")
    with pytest.raises(UserError, match=sha256(b"tokenizer") + ".*" + sha256(b"another")):
        TokenStream([short, other], "train", 4, 1)
    for weights in ([1], [1, -1], [1, float("nan")], [1, 1e-9]):
        with pytest.raises(UserError, match="weight"):
            TokenStream([short, short], "train", 4, 1, weights=weights)


# --- Preparing: helpers -------------------------------------------------------------------------------------

SENTENCES = """
The river was high that year and we had to wait for the ferry.
She told him that it was not the first time they had been there.
There are many ways in which a letter can be lost on its way to the king.
He would have gone with them if the weather had been any better.
It is said that the old house on the hill was built by two brothers.
When the bells rang the people came out of the church and into the square.
All of this was known to the men who had been at the meeting before.
They have no more than three horses and one of them is very old.
"""


def prose(number, sentences=6):
    """An English document that no other number gives."""
    random, lines = np.random.RandomState(number), SENTENCES.strip().split("\n")
    body = [lines[random.randint(len(lines))].replace("the", f"the {word(random)}") for _ in range(sentences)]
    return f"Story {number}. " + " ".join(body)


def word(random):
    return "".join(chr(97 + letter) for letter in random.randint(0, 26, 6))


def preset(name):
    return ROOT / "configs" / "datasets" / f"{name}.json"


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def prepare_dataset(source, output, **settings):
    """Prepare SOURCE with small settings; returns (train and val documents, stats)."""
    defaults = {"vocab_size": 400, "train_ratio": 0.8, "sequence_length": 32}
    main(DataConfig(input_path=str(source), output_dir=str(output), **{**defaults, **settings}))
    splits = {split: read_split(output, split) for split in ("train", "val")}
    return splits, json.loads((output / "stats.json").read_text())


def read_split(folder, split):
    files = sorted(folder.glob(f"{split}_*.jsonl"))
    return [json.loads(line)["text"] for file in files for line in file.read_text().split("\n") if line]


def every(splits):
    return sorted(splits["train"] + splits["val"])


def contents(folder):
    """Every file's bytes, but for the card, which bears the date."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "DATA_CARD.md"}


def reasons(stats):
    return {
        reason: entry["count"]
        for stage in stats["documents"]["dropped"].values()
        for reason, entry in stage.items()
    }


def data_py(*arguments, **settings):
    return subprocess.run(
        [sys.executable, str(ROOT / "data.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        **settings,
    )


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("stories") / "stories.jsonl", map(prose, range(300)))


@pytest.fixture(scope="module")
def prepared(stories, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "stories"
    splits, stats = prepare_dataset(stories, folder, shard_tokens=4000)
    return folder, splits, stats


# --- Preparing: what comes out ------------------------------------------------------------------------------


def test_shards_hold_each_document_between_bos_and_eos(prepared):  # traps B3, B13
    folder, splits, stats = prepared
    tokenizer = Tokenizer.load(folder)
    assert every(splits) == sorted(map(prose, range(300)))
    assert not set(splits["train"]) & set(splits["val"])
    assert len(list(folder.glob("train_*.bin"))) > 1  # shard_tokens cuts
    for split, documents in splits.items():
        ids = Shards(folder, split).read(0, Shards(folder, split).tokens).tolist()
        assert ids.count(EOS) == ids.count(BOS) == len(documents) == stats["splits"][split]["documents"]
        expected = [[BOS, *tokenizer.encode(text), EOS] for text in documents]
        assert ids == [token for row in expected for token in row]
        assert stats["splits"][split]["bytes"] == sum(len(text.encode()) for text in documents)


def test_the_stream_reads_what_was_prepared(prepared):
    folder, *_ = prepared
    stream = TokenStream(folder, "train", 32, 4)
    assert stream.tokenizer == folder / "tokenizer.model"
    assert Tokenizer.load(stream.tokenizer).sha256 == stream.tokenizer_sha256
    assert stream.batch(0)["ids"].max() < stream.vocab_size == 400
    assert 0.5 < unigram_bits_per_byte(folder) < 8


def test_a_second_run_gives_the_same_bytes_and_a_third_finds_it_there(
    stories, prepared, tmp_path, capsys
):  # B12
    folder, *_ = prepared
    prepare_dataset(stories, tmp_path / "again", shard_tokens=4000, num_workers=1)
    assert contents(tmp_path / "again") == contents(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    prepare_dataset(stories, folder, shard_tokens=4000)
    assert "exists: 300 documents" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(UserError, match="was prepared with min_length 50, now it is 60"):
        prepare_dataset(stories, folder, shard_tokens=4000, min_length=60)


def test_the_card_names_the_source_and_bears_a_date(prepared, stories):  # traps B9, B36
    card = (prepared[0] / "DATA_CARD.md").read_text()
    assert f"Source: `{stories}`" in card
    date.fromisoformat(card.split("Prepared ")[1].split(".")[0])


def test_max_docs_caps_and_shows(stories, tmp_path):  # trap B9
    splits, stats = prepare_dataset(stories, tmp_path / "d", max_docs=40)
    assert every(splits) == sorted(map(prose, range(40)))
    assert stats["cap"] == {"max_docs": 40, "reached": True}
    assert stats["documents"]["read"] == 40


def test_an_existing_folder_is_never_overwritten(stories, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match="no prepared dataset; name another output_dir"):
        prepare_dataset(stories, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "precious"


def test_a_damaged_existing_dataset_is_named(prepared, stories, tmp_path):
    folder = shutil.copytree(prepared[0], tmp_path / "d")
    (folder / "train_00001.jsonl").write_bytes(b"{}\n")
    with pytest.raises(UserError, match=r"train_00001.jsonl: missing or changed since"):
        prepare_dataset(stories, folder, shard_tokens=4000)


def test_a_dataset_that_lost_its_tokenizer_is_not_called_verified(prepared, stories, tmp_path):
    folder = shutil.copytree(prepared[0], tmp_path / "d")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"tokenizer.model: missing or changed since"):
        prepare_dataset(stories, folder, shard_tokens=4000)
    assert "tokenizer.model: not found" in data_py("inspect", folder).stderr


def test_a_model_or_a_raw_file_given_as_a_dataset_is_never_to_be_deleted(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": 1, "files": {"model.safetensors": {}}}')
    for path, words in [
        (tmp_path, "a model or checkpoint"),
        (tmp_path / "manifest.json", "data.py --input_path="),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            read_manifest(path)
        assert "delete" not in str(caught.value)


def test_what_a_newcomer_types_first_is_answered_by_name(stories, tmp_path):
    done = data_py(stories)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"--input_path={stories}" in done.stderr
    with pytest.raises(UserError, match="names no dataset; write hf:owner/name"):
        prepare_dataset("hf:", tmp_path / "d")
    with pytest.raises(UserError, match=f"{stories.name}: not a SentencePiece model"):
        prepare_dataset(stories, tmp_path / "d", tokenizer_path=str(stories))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"^{tmp_path / 'file' / 'd'}: cannot be written"):
        prepare_dataset(stories, tmp_path / "file" / "d")


def test_the_split_of_a_document_does_not_depend_on_its_neighbours(prepared, stories, tmp_path):
    _, splits, _ = prepared
    few = write_jsonl(tmp_path / "few.jsonl", map(prose, range(100, 160)))
    part, _ = prepare_dataset(few, tmp_path / "d")
    assert set(part["train"]) <= set(splits["train"])
    assert set(part["val"]) <= set(splits["val"])


def test_a_tokenizer_is_trained_once_and_then_reused(stories, tmp_path):  # trap B7
    model = tmp_path / "tokenizers" / "t.model"
    with pytest.raises(UserError, match="not found, and train_tokenizer is off"):
        prepare_dataset(stories, tmp_path / "a", tokenizer_path=str(model), train_tokenizer=False)
    assert not list(tmp_path.glob("*a*"))
    prepare_dataset(stories, tmp_path / "a", tokenizer_path=str(model))
    first = model.read_bytes()
    other = write_jsonl(tmp_path / "other.jsonl", map(prose, range(1000, 1100)))
    prepare_dataset(other, tmp_path / "b", tokenizer_path=str(model))
    assert model.read_bytes() == first == (tmp_path / "b" / "tokenizer.model").read_bytes()
    TokenStream([tmp_path / "a", tmp_path / "b"], "train", 32, 1)
    with pytest.raises(UserError, match="its vocab_size is 400, not 500"):
        prepare_dataset(stories, tmp_path / "c", tokenizer_path=str(model), vocab_size=500)
    model.write_bytes((tmp_path / "b" / "tokenizer.model").read_bytes() + b"\n")
    with pytest.raises(UserError, match="was encoded by the tokenizer of sha256"):
        prepare_dataset(stories, tmp_path / "a", tokenizer_path=str(model))


def test_the_tokenizer_learns_from_training_documents_alone(tmp_path):  # and from long lines: trap B15
    rare = "qzxjvq"
    texts = [prose(number) for number in range(200)]
    on_val = [text for text in texts if hash_fraction(text + f" {rare}" * 400) >= 0.5]
    on_train = [text for text in texts if hash_fraction(text + f" {rare}" * 400) < 0.5]
    for name, marked in (("val", on_val[0]), ("train", on_train[0])):
        source = [text + f" {rare}" * 400 if text == marked else text for text in texts]
        prepare_dataset(
            write_jsonl(tmp_path / "in.jsonl", source), tmp_path / name, train_ratio=0.5, language="off"
        )
    assert len(Tokenizer.load(tmp_path / "val").encode(f" {rare}")) > 1
    assert len(Tokenizer.load(tmp_path / "train").encode(f" {rare}")) == 1


# --- Preparing: duplicates ----------------------------------------------------------------------------------


def near_copy(text, words=1):
    """The text with its first words changed."""
    return " ".join(["changed"] * words + text.split(" ")[words:])


def test_near_duplicates_go_by_default_and_stay_when_switched_off(tmp_path):  # trap B1
    text = prose(1, sentences=40)
    texts = [text, text, near_copy(text), *map(prose, range(2, 120))]
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    assert configure(DataConfig, [str(preset("docstrings"))]).use_minhash is True
    on, stats = prepare_dataset(source, tmp_path / "on")
    assert reasons(stats) == {"exact-duplicate": 1, "near-duplicate": 1}
    assert text in every(on)  # the first of a cluster stays
    assert near_copy(text) not in every(on)
    off, stats = prepare_dataset(source, tmp_path / "off", use_minhash=False)
    assert reasons(stats) == {"exact-duplicate": 1}
    assert near_copy(text) in every(off)


def jaccard(a, b):
    """By brute force: the Jaccard similarity of the sets of word 5-grams."""
    grams = [
        {tuple(words[i : i + 5]) for i in range(len(words) - 4)}
        for words in (a.lower().split(), b.lower().split())
    ]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


@pytest.mark.parametrize(("low", "high", "share"), [(0.0, 0.6, 0.0), (0.9, 1.0, 1.0)])
def test_minhash_decides_as_brute_force_does(low, high, share):
    pairs = [
        (text, near_copy(text, words))
        for text in (prose(n, 30) for n in range(20))
        for words in range(1, 300, 7)
    ]
    clean_words = [(a.replace(".", ""), b.replace(".", "")) for a, b in pairs]
    chosen = [pair for pair in clean_words if low <= jaccard(*pair) < high][:30]
    assert len(chosen) > 20
    found = sum(Deduplicator(DataConfig()).reasons(list(pair))[1] == "near-duplicate" for pair in chosen)
    assert found / len(chosen) == share


def test_shingles_are_word_5_grams_and_estimates_are_datasketchs():
    from datasketch import MinHash

    a, b = prose(1, 30), near_copy(prose(1, 30), 60)
    exact = len(set(shingles(a)) & set(shingles(b))) / len(set(shingles(a)) | set(shingles(b)))
    assert abs(exact - jaccard(a.replace(".", ""), b.replace(".", ""))) < 1e-9
    one, two = (MinHash(num_perm=128, hashfunc=int) for _ in range(2))
    one.update_batch(shingles(a))
    two.update_batch(shingles(b))
    assert abs(one.jaccard(two) - exact) < 0.15
    assert shingles("") == []
    assert len(shingles("only four words here")) == 1


# --- Preparing: cleaning and filters ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dirty", "expected"),
    [
        ("a\n\nb", "a\n\nb"),  # trap B11
        ("`code` stays\n\n```\nx = 1\n```", "`code` stays\n\n```\nx = 1\n```"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("a \t\n\n\n\n\n  b  ", "a\n\n  b"),
        ("nul\0 bell\a esc\x1b[31m red\x1b[0m", "nul bell esc red"),
        ("N\bNA\bAM\bME\bE", "NAME"),
        ("zero\u200bwidth \u202ebidi\u202c \ufeffbom so\u00adft", "zerowidth bidi bom soft"),
        ("na\u00efve \u00e2\u20ac\u201c \u201cquotes\u201d", 'na\u00efve \u2013 "quotes"'),
        ("one\u2028two", "one\ntwo"),
        ("<|im_end|> and </s>", "<|im_end|> and </s>"),
    ],
)
def test_clean(dirty, expected):
    assert clean(dirty) == expected


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=200))
@settings(max_examples=200, deadline=None)
def test_the_fast_path_gives_what_ftfy_gives(text):
    assert fix_encoding(text) == ftfy.fix_text(text)


@given(
    st.lists(
        st.sampled_from(["&amp;", "<b>", "\n", "plain", "caf\u00c3\u00a9", "&", "\x1b[1m", "\u2026"]),
        max_size=12,
    )
)
@settings(max_examples=200, deadline=None)
def test_the_fast_path_gives_what_ftfy_gives_for_html_and_mojibake(parts):
    text = " ".join(parts)
    assert fix_encoding(text) == ftfy.fix_text(text)


@pytest.mark.parametrize("unit", ["a", "<", " ", "http", "1", "\n", "a@", "&", "\b", " \n", "\u200b", "= "])
def test_a_megabyte_of_anything_passes(unit):
    """Not timed here: a quadratic pattern would take minutes on a megabyte, and the run's time limit is the
    alarm.
    """
    text = unit * (1_000_000 // len(unit))
    cleaned = clean(text)
    assert len(cleaned) <= len(text)
    reject(cleaned, DataConfig(max_length=10**7))
    shingles(cleaned)


def test_length_and_language_filters_count_their_reasons(tmp_path):
    german = "Der alte Mann ging mit dem Hund durch den Wald und kam erst am Abend wieder nach Hause."
    texts = ["short", prose(5, 400), german, *map(prose, range(100, 200))]
    splits, stats = prepare_dataset(write_jsonl(tmp_path / "in.jsonl", texts), tmp_path / "d")
    assert reasons(stats) == {"not-english": 1, "too-long": 1, "too-short": 1}
    assert stats["documents"]["read"] == 103
    assert german not in every(splits)
    example = stats["documents"]["dropped"]["filter"]["not-english"]["examples"][0]
    assert "line 3" in example
    assert "alte Mann" in example
    splits, _ = prepare_dataset(tmp_path / "in.jsonl", tmp_path / "off", language="off")
    assert german in every(splits)


# --- Preparing: the command line, and the kill --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "0 usable documents"),
        ("binary.txt", b"plain so far" + b"\xff\xfe\x00", "byte 0xff at offset 12: not UTF-8"),
        ("bad.jsonl", b"{}\n3\n", "0 usable documents: 1 missing-text"),
        ("short.txt", b"hello", "1 too-short"),
        ("x.zip", b"PK", ".zip files are not read"),
        ("one.txt", prose(1).encode(), "vocab_size 32768 is too large"),
        ("", b"", "not found"),
    ],
)
def test_unusable_input_is_one_line_and_exit_2(tmp_path, name, content, message):
    if name:
        (tmp_path / name).write_bytes(content)
    done = data_py(f"--input_path={tmp_path / (name or 'nothing.txt')}", f"--output_dir={tmp_path / 'out'}")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*out*"))


def test_kill_9_leaves_no_dataset_and_the_next_run_gives_the_same_bytes(tmp_path):  # K8
    source = write_jsonl(tmp_path / "in.jsonl", (prose(n, 20) for n in range(800)))
    arguments = [
        f"--input_path={source}",
        "--vocab_size=1000",
        "--train_ratio=0.9",
        f"--output_dir={tmp_path / 'd'}",
    ]
    clock = time.monotonic()
    assert data_py(*arguments[:-1], f"--output_dir={tmp_path / 'whole'}").returncode == 0
    whole = time.monotonic() - clock
    random = np.random.RandomState(0)
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "data.py"), *arguments], stdout=subprocess.DEVNULL
        )
        try:
            process.wait(timeout=whole * random.uniform(0.3, 0.95))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            complete = (tmp_path / "d").exists()  # then the kill came after the rename
            assert not complete or contents(tmp_path / "d") == contents(tmp_path / "whole")
    done = data_py(*arguments)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "in.jsonl", "whole"]


def test_two_runs_at_once_do_not_share_a_folder(stories, tmp_path):
    with unfinished(tmp_path / "d"):
        done = data_py(f"--input_path={stories}", f"--output_dir={tmp_path / 'd'}", "--vocab_size=400")
        assert done.returncode == 2
        assert "another run is preparing it" in done.stderr


SHARED = ROOT.parent / "shared" / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared corpora")
def test_real_corpora(tmp_path):
    raw = SHARED / "wikitext2" / "wiki.valid.raw"
    splits, stats = prepare_dataset(raw, tmp_path / "wiki", vocab_size=4096, max_length=300_000)
    assert stats["documents"]["read"] in (60, 61)  # 60 articles, and the blank line before the first
    assert all(text.startswith("= ") for text in every(splits))
