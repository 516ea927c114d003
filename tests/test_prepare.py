"""corpus/prepare.py: raw text becomes clean shards, however interrupted; nothing is lost."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from corpus.clean import clean, cut_at
from corpus.prepare import (
    BATCH_DOCUMENTS,
    DataConfig,
    Progress,
    RetokenizeConfig,
    changed_settings,
    in_order,
    main,
    refine,
    retokenize,
    unfinished,
)
from data import TokenStream
from lib.config import UserError, configure
from lib.folders import Shards, hash_fraction, read_manifest
from lib.tokenizer import Tokenizer
from tests import ROOT
from tests.conftest import free_port, write_rows
from tests.warm import python

BOS, EOS = 1, 2
posix = pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")


# ---- helpers

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
    """Returns an English document that no other number gives."""
    random, lines = np.random.RandomState(number), SENTENCES.strip().split("\n")

    def line():
        text = lines[random.randint(len(lines))]
        word = "".join(chr(97 + letter) for letter in random.randint(0, 26, 6))
        return text.replace("the", f"the {word}")

    return f"Story {number}. " + " ".join(line() for _ in range(sentences))


def near_copy(text):
    return " ".join(["changed", *text.split(" ")[1:]])


def write_jsonl(path, texts):
    return write_rows(path, ({"text": text} for text in texts))


def prepare_dataset(source, output, **settings):
    """Prepares SOURCE with small settings. Returns ({split: documents}, stats)."""
    defaults = {"vocab_size": 400, "train_ratio": 0.8, "sequence_length": 32, "quality": False}
    main(DataConfig(input_path=str(source), output_dir=str(output), **{**defaults, **settings}))
    return read_splits(output), json.loads((output / "stats.json").read_text())


def read_splits(folder):
    def texts(split):
        lines = "".join(path.read_text() for path in sorted(folder.glob(f"{split}_*.jsonl")))
        return [json.loads(line)["text"] for line in lines.split("\n") if line]

    return {split: texts(split) for split in ("train", "val")}


def retokenize_dataset(folder, output, **settings):
    retokenize(RetokenizeConfig(path=str(folder), output_dir=str(output), **settings))


def every(splits):
    return sorted(splits["train"] + splits["val"])


def contents(folder):
    """Returns the bytes of every file but the card, which bears the date."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".md"}


def reasons(stats):
    stages = stats["documents"]["dropped"].values()
    return {reason: entry["count"] for stage in stages for reason, entry in stage.items()}


def data_py(*arguments, **settings):
    words = [python(), str(ROOT / "data.py"), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, **settings)


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("stories") / "stories.jsonl", map(prose, range(300)))


@pytest.fixture(scope="module")
def prepared(stories, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "stories"
    prepare_dataset(stories, folder, shard_tokens=4000)
    return folder


# ---- the dataset


def test_shards_hold_each_document_between_bos_and_eos(prepared):  # traps B3, B13
    splits, stats = read_splits(prepared), json.loads((prepared / "stats.json").read_text())
    tokenizer = Tokenizer.load(prepared)
    assert every(splits) == sorted(map(prose, range(300)))
    assert not set(splits["train"]) & set(splits["val"])
    assert len(list(prepared.glob("train_*.bin"))) > 1  # shard_tokens cuts
    for split, documents in splits.items():
        shards = Shards(prepared, split)
        expected = [[BOS, *tokenizer.encode(text), EOS] for text in documents]
        assert shards.read(0, shards.tokens).tolist() == [t for row in expected for t in row]
        assert stats["splits"][split]["documents"] == len(documents)
        assert stats["splits"][split]["bytes"] == sum(len(text.encode()) for text in documents)


def test_the_stream_reads_what_was_prepared(prepared):
    stream = TokenStream(prepared, "train", 32, 4)
    assert stream.tokenizer == prepared / "tokenizer.model"
    assert Tokenizer.load(stream.tokenizer).sha256 == stream.tokenizer_sha256
    assert stream.batch(0)["ids"].max() < stream.vocab_size == 400


def test_a_second_run_gives_the_same_bytes_and_a_third_finds_it_there(
    stories, prepared, tmp_path, capsys
):  # B12
    prepare_dataset(stories, tmp_path / "again", shard_tokens=4000, workers=1)
    assert contents(tmp_path / "again") == contents(prepared)
    before = {path: path.stat().st_mtime_ns for path in prepared.iterdir()}
    prepare_dataset(stories, prepared, shard_tokens=4000)
    assert "exists: 300 documents" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in prepared.iterdir()} == before
    with pytest.raises(UserError, match="exists already, but min_length was 50, now it is 60"):
        prepare_dataset(stories, prepared, shard_tokens=4000, min_length=60)


def test_a_dataset_of_an_earlier_version_is_found_though_settings_came_and_went(
    stories, prepared, tmp_path, capsys
):
    folder = shutil.copytree(prepared, tmp_path / "d")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["config"]["mask_private"]
    manifest["config"]["dedup_storage"] = ""
    (folder / "manifest.json").write_text(json.dumps(manifest))
    prepare_dataset(stories, folder, shard_tokens=4000)
    assert "exists: 300 documents" in capsys.readouterr().out
    (tmp_path / "old.json").write_text('{"dedup_storage": ""}')
    with pytest.raises(UserError, match="unknown key 'dedup_storage'"):
        configure(DataConfig, [str(tmp_path / "old.json")])


def test_the_card_names_the_source_and_bears_a_date(prepared, stories):  # traps B9, B36
    card = (prepared / "DATA_CARD.md").read_text()
    assert f"| {stories} | `{stories}` | not noted | 1.0 | 300 |" in card
    date.fromisoformat(card.split("Prepared ")[1].split(".")[0])
    assert Tokenizer.load(prepared).sha256 in card


def test_a_mixture_keeps_its_proportions_caps_and_licences_and_the_card_shows_them(tmp_path):
    for name, numbers in (("many", range(200)), ("few", range(500, 600))):
        write_jsonl(tmp_path / f"{name}.jsonl", map(prose, numbers))
    entries = [{"name": name, "input_path": f"{name}.jsonl"} for name in ("many", "few")]
    weighted = [entries[0] | {"weight": 3, "licence": "CC0"}, entries[1] | {"max_samples": 20}]
    preset = {"mixture": weighted, "input_path": "docstrings:", "licence": "CC BY"}
    (tmp_path / "mix.json").write_text(json.dumps(preset))
    small = ["--vocab_size=400", "--no_quality", "--train_ratio=0.9"]
    done = data_py("mix.json", "--max_docs=80", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "data" / "processed" / "mixture"
    texts = every(read_splits(folder))
    assert texts == sorted(map(prose, [*range(60), *range(500, 520)]))
    assert json.loads((folder / "stats.json").read_text())["cap"]["reached"]
    card = (folder / "DATA_CARD.md").read_text()
    assert "capped at max_docs 80" in card
    assert "| many | `many.jsonl` | CC0 | 3.0 | 60 |" in card
    assert "| few | `few.jsonl` | CC BY | 1.0 | 20 (capped) |" in card
    done = data_py("mix.json", "--min_length=9999", "--output_dir=e", cwd=tmp_path)
    assert done.stderr.startswith("error: mixture: 0 usable documents: 220 too-short")


def test_the_split_of_a_document_does_not_depend_on_its_neighbours(prepared, tmp_path):
    few = write_jsonl(tmp_path / "few.jsonl", map(prose, range(100, 160)))
    splits, _ = prepare_dataset(few, tmp_path / "d")
    for split, texts in read_splits(prepared).items():
        assert set(splits[split]) <= set(texts)


@pytest.mark.parametrize(
    ("text", "window", "tail"),
    [
        ("a" * 50 + "\n\n" + "b" * 40, (16, 54), "b" * 40),  # behind a paragraph
        # which is too far here
        ("a" * 50 + "\n\n" + "b" * 30 + "\n" + "c" * 10, (72, 92), "c" * 10),
        ("a" * 50 + "\n" + "b. " * 10 + "c", (52, 74), "b. b. b. c"),
        ("He left. (She stayed.) Then", (0, 27), "Then"),
        ("\u4ed6\u8d70\u3002\u5979\u7559\u3002\u7136", (0, 7), "\u7136"),  # without spaces
        ("one two three four", (4, 11), "three four"),
        ("one two three four", (4, 16), "four"),  # the last word that ends there
        ("a" * 100, (96, 98), "aa"),
        ("ab", (0, 1), "b"),
    ],
)
def test_a_text_is_cut_where_the_most_ends_last_before_the_limit(text, window, tail):
    assert text[cut_at(text, *window) :] == tail


@pytest.mark.parametrize("ratio", [0.5, 0.98])
def test_of_a_single_document_the_tail_is_held_out(tmp_path, ratio, capsys):
    text = "\n\n".join(prose(number, 3) for number in range(200))
    (tmp_path / "book.txt").write_text(text)
    folders = [tmp_path / f"out{workers}" for workers in (1, 2)]
    for workers, folder in enumerate(folders, start=1):
        settings = {"train_ratio": ratio, "workers": workers, "max_length": 10**7}
        splits, _ = prepare_dataset(tmp_path / "book.txt", folder, **settings)
        (head,), (tail,) = splits["train"], splits["val"]
        assert f"{head}\n\n{tail}" == text
        assert len(tail) == pytest.approx((1 - ratio) * len(text), rel=0.5)
        assert "too few documents to choose some for val: the end of " in capsys.readouterr().out
    assert len({(f / "manifest.json").read_bytes() for f in folders}) == 1
    TokenStream([folders[0]], "val", 32, 2)


def test_where_no_hash_falls_to_val_the_tail_of_the_last_document_is_held_out(tmp_path):
    texts = list(map(prose, range(9)))
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    splits, stats = prepare_dataset(source, tmp_path / "d", train_ratio=0.999)
    *whole, head = splits["train"]
    (tail,) = splits["val"]
    assert [*whole, f"{head} {tail}"] == texts
    assert len(tail) < 0.1 * len(texts[-1])
    assert stats["documents"]["kept"] == 9
    TokenStream([tmp_path / "d"], "val", 8, 1)


def test_quality_does_not_judge_a_document_that_is_alone(tmp_path):
    texts = ["The boy walked down to the sea and looked at the boat. " * 40] * 2
    for count, kept in ((1, 1), (2, 0)):
        source = write_jsonl(tmp_path / f"{count}.jsonl", texts[:count])
        options = {"vocab_size": 300, "quality": True}
        if kept:
            _, stats = prepare_dataset(source, tmp_path / f"d{count}", **options)
            assert (stats["documents"]["kept"], reasons(stats)) == (1, {})
        else:
            with pytest.raises(UserError, match="0 usable documents: 2 repeated-phrases"):
                prepare_dataset(source, tmp_path / f"d{count}", **options)


# ---- long documents


def long(number, paragraphs=40):
    return "\n\n".join(prose(1000 * number + n, 5) for n in range(paragraphs))


def sizes(stats):
    """Returns the bytes that were dropped, and those that are accounted for: read less kept."""
    documents = stats["documents"]
    dropped = [entry for stage in documents["dropped"].values() for entry in stage.values()]
    lost = sum(entry["bytes"] for entry in dropped)
    return lost, documents["read_bytes"] - documents["kept_bytes"]


def test_a_long_document_is_split_at_paragraphs_and_each_piece_is_judged_alone(tmp_path, capsys):
    texts = [*map(prose, range(60)), long(1), long(2)]
    source = write_jsonl(tmp_path / "in.jsonl", [*texts, near_copy(long(1)), "short"])
    splits, stats = prepare_dataset(source, tmp_path / "d", max_length=3000)
    documents, paragraphs = every(splits), {p for text in texts for p in text.split("\n\n")}
    assert max(map(len, documents)) <= 3000
    assert {p for text in documents for p in text.split("\n\n")} == paragraphs
    counts, pieces = stats["documents"], stats["documents"]["pieces"]
    assert (counts["split"], counts["kept"]) == (3, len(documents))
    found = {"too-short": 1, "near-duplicate": 1, "exact-duplicate": pieces // 3 - 1}
    assert reasons(stats) == found
    lost, missing = sizes(stats)
    assert missing - lost == 2 * (pieces - 3)  # the blanks at the cuts
    out, card = capsys.readouterr().out, (tmp_path / "d" / "DATA_CARD.md").read_text()
    for line in (
        f"| read |  | {counts['read']} | {counts['read_bytes']:,} |\n",
        f"| split | 3 into {pieces} | {pieces - 3} |  |\n",
        f"| kept |  | {len(documents)} | {counts['kept_bytes']:,} |\n",
    ):
        assert line in out
        assert line in card


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_all_pieces_of_a_document_fall_to_one_side(tmp_path, suffix):
    texts, source = [long(number) for number in range(30)], tmp_path / f"in.{suffix}"
    if suffix == "jsonl":
        write_jsonl(source, texts)
    else:
        source.write_text("<|endoftext|>".join(texts))
    splits, _ = prepare_dataset(source, tmp_path / "d", max_length=3000, train_ratio=0.5)
    sides = [[text for text in texts if piece in text] for piece in splits["train"]]
    others = [[text for text in texts if piece in text] for piece in splits["val"]]
    assert min(len(sides), len(others)) > 20
    assert all(len(origin) == 1 for origin in sides + others)
    assert not {text for (text,) in sides} & {text for (text,) in others}


def test_of_a_book_in_pieces_the_end_is_held_out(tmp_path):
    (tmp_path / "book.txt").write_text(long(1, 100))
    splits, _ = prepare_dataset(tmp_path / "book.txt", tmp_path / "d", max_length=3000)
    assert "\n\n".join(splits["train"] + splits["val"]).split() == long(1, 100).split()
    assert len(splits["val"]) > 2
    held_out = sum(map(len, splits["val"]))
    assert held_out == pytest.approx(0.2 * len(long(1, 100)), rel=0.1)


def test_too_long_drop_drops_and_says_how_many_bytes(tmp_path, capsys):
    source = write_jsonl(tmp_path / "in.jsonl", [*map(prose, range(60)), long(1)])
    splits, stats = prepare_dataset(source, tmp_path / "d", max_length=3000, too_long="drop")
    assert every(splits) == sorted(map(prose, range(60)))
    assert stats["documents"]["dropped"]["filter"]["too-long"]["bytes"] == len(long(1))
    assert sizes(stats) == (len(long(1)),) * 2
    assert f"| too-long | -1 | {-len(long(1)):,} |" in capsys.readouterr().out


def test_a_dataset_from_before_too_long_was_made_with_drop():
    then, now = {"max_length": 10000}, {"max_length": 10000, "too_long": "split"}
    assert changed_settings(then, now) == ["too_long was 'drop', now it is 'split'"]
    assert changed_settings(then, now | {"too_long": "drop"}) == []


def test_the_pieces_of_one_document_are_compared_a_batch_at_a_time():
    text = "\n".join(f"{n} is a number and the next one of them is {n + 1}" for n in range(1200))
    cfg = DataConfig(max_length=120, language="off", quality=False)
    (documents,), fingerprints = refine([("a", text, text)], cfg)
    assert "\n".join(piece for piece, _ in documents) == text
    assert {reason for _, reason in documents} == {None}
    counts = [len(digests) for digests, _ in fingerprints]
    assert counts == [len(signatures) for _, signatures in fingerprints]
    assert sum(counts) == len(documents) > max(counts) == BATCH_DOCUMENTS


def test_near_duplicates_go_by_default_and_stay_when_switched_off(tmp_path):  # trap B1
    text = prose(1, sentences=40)
    texts = [text, text, near_copy(text), *map(prose, range(2, 120))]
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    on, stats = prepare_dataset(source, tmp_path / "on")
    assert reasons(stats) == {"exact-duplicate": 1, "near-duplicate": 1}
    assert text in every(on)  # the first of a cluster stays
    assert near_copy(text) not in every(on)
    off, stats = prepare_dataset(source, tmp_path / "off", use_minhash=False)
    assert reasons(stats) == {"exact-duplicate": 1}
    assert near_copy(text) in every(off)


# ---- folders that are in the way


def test_a_folder_of_somebody_else_is_never_overwritten(stories, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match="no prepared dataset; name another output_dir"):
        prepare_dataset(stories, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train_00001.jsonl", b"{}\n", "train_00001.jsonl: checksum mismatch"),
        ("train_00001.bin", b"", "train_00001.bin: checksum mismatch"),
        ("tokenizer.model", None, "tokenizer.model is missing"),
    ],
)
def test_a_damaged_dataset_is_not_called_verified(
    prepared, stories, tmp_path, name, content, message
):
    folder = shutil.copytree(prepared, tmp_path / "d")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare_dataset(stories, folder, shard_tokens=4000)


def test_a_model_or_a_raw_file_given_as_a_dataset_is_never_to_be_deleted(tmp_path):
    file = tmp_path / "manifest.json"
    file.write_text('{"format": 1, "files": {"model.safetensors": {}}}')
    for path, words in [(tmp_path, "name a prepared dataset"), (file, "data.py --input_path=")]:
        with pytest.raises(UserError, match=words) as caught:
            read_manifest(path)
        assert "delete" not in str(caught.value)


def test_two_runs_at_once_do_not_share_a_folder(stories, tmp_path):
    with (
        unfinished(tmp_path / "d", {}),
        pytest.raises(UserError, match="another run is preparing it"),
    ):
        prepare_dataset(stories, tmp_path / "d")


# ---- the tokenizer


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


def test_a_folder_without_tokenizer_model_is_refused_and_left_as_it_is(stories, tmp_path):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"llama/tokenizer.model: No such file .* or a model's"):
        prepare_dataset(stories, tmp_path / "d", tokenizer_path=str(tmp_path / "llama"))
    assert [path.name for path in (tmp_path / "llama").iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize(("side", "pieces"), [("train", 1), ("val", None)])
def test_the_tokenizer_learns_from_training_documents_alone(tmp_path, side, pieces):
    """And from long lines: trap B15."""
    rare, texts = "qzxjvq", [prose(number) for number in range(200)]
    marked = [text + f" {rare}" * 400 for text in texts]
    place = [(hash_fraction(text) < 0.5) == (side == "train") for text in marked].index(True)
    source = write_jsonl(
        tmp_path / "in.jsonl", [*texts[:place], marked[place], *texts[place + 1 :]]
    )
    prepare_dataset(source, tmp_path / "d", train_ratio=0.5, language="off")
    count = len(Tokenizer.load(tmp_path / "d").encode(f" {rare}"))
    assert count == pieces if pieces else count > 1


# ---- the command line


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("binary.txt", b"plain so far" + b"\xff\xfe\x00", "byte 0xff is not UTF-8"),
        ("bad.jsonl", b"{}\n3\n", "0 usable documents: 2 no-text"),
        ("x.parquet", b"PAR1", "1 unreadable-file"),
        ("one.txt", prose(1).encode(), "vocab_size 32768 is too large"),
        ("", b"", "not found"),
    ],
)
def test_unusable_input_is_one_line_and_exit_2(tmp_path, name, content, message):
    if name:
        (tmp_path / name).write_bytes(content)
    path = tmp_path / (name or "nothing.txt")
    done = data_py(f"--input_path={path}", f"--output_dir={tmp_path / 'out'}")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*out*"))


def test_the_folder_is_named_after_the_input_and_a_likely_mistake_is_answered_by_name(
    stories, tmp_path
):
    done = data_py(f"--input_path={stories}", "--vocab_size=400", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "data" / "processed" / "stories").is_dir()
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "t.model"
    for message, source, output, tokenizer in [
        (f"{stories.name}: not a SentencePiece model", stories, "d", stories),
        (f"^{tmp_path / 'file' / 'd'}: cannot be written", stories, "file/d", ""),
        (f"{below}: cannot be written: .*; name another tokenizer_path", stories, "d", below),
    ]:
        with pytest.raises(UserError, match=message):
            prepare_dataset(source, tmp_path / output, tokenizer_path=str(tokenizer))


# ---- interrupted and resumed

# a checkpoint each 60 kB, so that small data has many
SMALL = """
import os, signal, sys, data
from corpus import prepare
prepare.CHECKPOINT_CHARACTERS, prepare.BATCH_CHARACTERS = 60_000, 8_000
"""
# the process kills itself when it writes, for the N-th time, what a later run relies on
DYING = """
count, replace, fsync = int(sys.argv.pop()), os.replace, os.fsync
def step(function):
    def dies(*words):
        global count
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*words)
    return dies
os.replace, os.fsync = step(replace), step(fsync)
"""
RUN = "import sys, data; data.main(sys.argv[1:])"
STEPS = 6  # of a checkpoint: two texts, two files of the index, progress.json; a rename is one


def start(*arguments, code=SMALL + RUN, executable=None):
    words = [executable or python(), "-c", code, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, text=True, cwd=ROOT, **pipes)


def prepare_in_parts(*arguments, status=0, **settings):
    """Runs data.py with small parts; returns what it printed."""
    process = start(*arguments, **settings)
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    return out + err


def kill_at(step, *arguments, name="SIGKILL", status=-9):
    code = SMALL + DYING.replace("SIGKILL", name) + RUN
    return prepare_in_parts(*arguments, step, code=code, status=status)


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    """Documents of all fates: kept, split, too short, exact and near duplicates, bad rows."""
    path, texts = tmp_path_factory.mktemp("messy") / "in.jsonl", []
    for number in range(9, 600):
        texts.append(prose(number, 12 + number % 9))
        texts += {3: ["short"], 5: [prose(number - 2, 12 + (number - 2) % 9)]}.get(number % 9, [])
        texts += [near_copy(prose(number // 2, 12 + number // 2 % 9))] if number % 11 == 10 else []
        texts += ["\n\n".join(texts[-18:])] if number % 40 == 20 else []  # to be split
    write_jsonl(path, texts)
    path.write_text(path.read_text() + "no json\n")
    return path


SETTINGS = ["--vocab_size=600", "--train_ratio=0.9", "--shard_tokens=9000", "--quality=false"]


@pytest.fixture(scope="module")
def options(messy):
    return [f"--input_path={messy}", *SETTINGS]


@pytest.fixture(scope="module")
def straight(options, tmp_path_factory):
    """The dataset that an unbroken run makes of it."""
    folder = tmp_path_factory.mktemp("straight") / "d"
    prepare_in_parts(*options, f"--output_dir={folder}", "--num_workers=1")
    stats = json.loads((folder / "stats.json").read_text())
    assert set(reasons(stats)) == {"not-json", "too-short", "exact-duplicate", "near-duplicate"}
    assert len(list(folder.glob("train_*.bin"))) > 5
    return folder


@pytest.mark.parametrize(("code", "workers"), [(SMALL + RUN, 3), (RUN, 1)])
def test_the_result_does_not_depend_on_parts_nor_workers(
    options, straight, tmp_path, code, workers
):
    words = (*options, f"--output_dir={tmp_path / 'd'}", f"--num_workers={workers}")
    prepare_in_parts(*words, code=code, executable=sys.executable)
    assert contents(tmp_path / "d") == contents(straight)


@posix
def test_kill_9_loses_no_more_than_a_part_and_the_same_command_gives_the_same_bytes(
    options, straight, tmp_path
):  # K8
    words, resumed = (*options, f"--output_dir={tmp_path / 'd'}"), 0
    for step in (2 * STEPS + 3, 2, 3, STEPS + 6, 2 * STEPS + 1, 5):  # 2: before it resumes
        resumed += "going on after" in kill_at(step, *words)
        assert not (tmp_path / "d").exists()
    assert resumed == 4
    prepare_in_parts(*words)
    assert contents(tmp_path / "d") == contents(straight)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@posix
@pytest.mark.parametrize("step", [STEPS, 127, 200, 291, 297])
def test_one_kill_anywhere(options, straight, tmp_path, step):
    words = (*options, f"--output_dir={tmp_path / 'd'}")
    kill_at(step, *words)  # texts end at 122, shards at 290, and 297 renames the folder
    prepare_in_parts(*words)
    assert contents(tmp_path / "d") == contents(straight)


@posix
def test_other_settings_start_over_and_another_input_is_refused(options, messy, tmp_path):
    words = (*options, f"--output_dir={tmp_path / 'd'}")
    kill_at(3 * STEPS, *words)
    assert "min_length was 50, now it is 60" in prepare_in_parts(*words, "--min_length=60")
    source = shutil.copy(messy, tmp_path / "in.jsonl")
    words = (f"--input_path={source}", *SETTINGS, f"--output_dir={tmp_path / 'e'}")
    kill_at(3 * STEPS, *words)
    _, second, *rest = source.read_text().split("\n")
    source.write_text("\n".join([second, second, *rest]))
    out = prepare_in_parts(*words, status=2)
    assert "the input has changed; delete this folder to start over" in out


def test_unusable_leftovers_of_an_unfinished_run_are_no_hindrance(stories, prepared, tmp_path):
    work = tmp_path / ".d.partial"
    work.mkdir()
    (work / "progress.json").write_text('{"settings": 3}')
    (work / "train.jsonl").write_text("{")
    (work / "digests.bin").write_bytes(b"xyz")
    prepare_dataset(stories, tmp_path / "d", shard_tokens=4000)
    assert contents(tmp_path / "d") == contents(prepared)


def test_a_full_disk_is_one_line_and_with_more_room_it_goes_on(options, straight, small_disk):
    folder = small_disk("250k")
    out = prepare_in_parts(*options, f"--output_dir={folder / 'd'}", status=2)
    assert "no space left on the disk; free some, and the same command goes on\n" in out
    assert out.count("\n") == 1
    small_disk("50m")
    assert "going on after" in prepare_in_parts(*options, f"--output_dir={folder / 'd'}")
    assert contents(folder / "d") == contents(straight)


# ---- worker processes


def double(number):
    return 2 * number


def test_processes_keep_the_order_and_a_dead_one_is_named():
    assert list(in_order(double, range(100), workers=2)) == [(n, 2 * n) for n in range(100)]
    with pytest.raises(UserError, match=r"a worker process died.*fewer workers"):
        list(in_order(os._exit, range(100), workers=2))


def is_worker(pid):
    with suppress(OSError):  # it has ended meanwhile
        return "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_workers_end_with_their_parent(options, tmp_path):
    words, workers = [*options, f"--output_dir={tmp_path / 'd'}", "--num_workers=2"], []
    process = start(*words, executable=sys.executable)
    while len(workers) < 2 and process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        workers = list(filter(is_worker, children.split()))
    process.kill()
    process.communicate()
    assert workers
    for _ in range(400):
        if not any(map(is_worker, workers)):
            return
        time.sleep(0.05)
    pytest.fail(f"{workers} outlive their parent")


@contextmanager
def skipped_unless_ray_starts():
    """Ray gives its own processes a time to start, which a busy machine may exceed."""
    try:
        yield
    except Exception as error:
        if re.search(
            "timed out during startup|Starting Ray client server failed|Zombie", str(error)
        ):
            pytest.skip(f"no Ray cluster starts here: {error}")
        raise


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A Ray cluster of one machine, which is this one, with one core; a test may add more."""
    monkeypatch.chdir(tmp_path)  # it is not to find this code by itself
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_CLIENT_RECONNECT_GRACE_PERIOD", "1")  # seconds
    monkeypatch.setenv("RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S", "60")
    utils = pytest.importorskip("ray.cluster_utils")
    port = free_port()
    head = {"num_cpus": 1, "include_dashboard": False, "ray_client_server_port": port}
    head |= {"include_log_monitor": False, "no_monitor": True}  # fewer processes, sooner there
    with skipped_unless_ray_starts():
        cluster = utils.Cluster(initialize_head=True, head_node_args=head)
    cluster.client = f"ray://127.0.0.1:{port}"
    yield cluster
    cluster.shutdown()


def test_a_ray_cluster_gives_the_same_bytes_though_a_machine_of_it_dies(
    cluster, options, straight, tmp_path, monkeypatch
):
    def slow(batch, cfg):
        assert "py_modules" in inspect.getsourcefile(clean)  # it was sent there
        time.sleep(0.05)
        return refine(batch, cfg)

    def checkpoint(progress, *files):
        counted(progress, *files)
        if files and second in cluster.list_all_nodes():  # what it is at, and has done, is lost
            cluster.remove_node(second, allow_graceful=False)

    with skipped_unless_ray_starts():
        second, counted = cluster.add_node(num_cpus=1), Progress.checkpoint
    small = {"CHECKPOINT_CHARACTERS": 60_000, "BATCH_CHARACTERS": 8_000, "refine": slow}
    for name, value in small.items():
        monkeypatch.setattr(f"corpus.prepare.{name}", value)
    monkeypatch.setattr(Progress, "checkpoint", checkpoint)
    words = [f"--output_dir={tmp_path / 'd'}", f"--workers={cluster.client}"]
    with skipped_unless_ray_starts():
        main(configure(DataConfig, [*options, *words]))
    assert second not in cluster.list_all_nodes()
    assert contents(tmp_path / "d") == contents(straight)
    work = in_order(abs, range(10**6), cluster.client)
    with skipped_unless_ray_starts():
        assert next(work) == (0, 0)
    cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
    with pytest.raises(UserError, match=r"^ray://.*; mend it, and the same command goes on"):
        list(work)


def test_workers_are_a_number_or_a_cluster(tmp_path, monkeypatch):
    (tmp_path / "old.json").write_text('{"num_workers": 3}')  # their earlier name
    (tmp_path / "new.json").write_text('{"workers": "ray"}')
    old, new = str(tmp_path / "old.json"), str(tmp_path / "new.json")
    asked = [[old], [new], [new, "--num_workers=4"], [old, "--workers", "ray://a:10001"], []]
    assert [configure(DataConfig, words).workers for words in asked] == [
        3, "ray", 4, "ray://a:10001", 2]  # fmt: skip
    with pytest.raises(UserError, match="workers must be int >= 1 or str, got 0"):
        configure(DataConfig, ["--workers=0"])
    with pytest.raises(UserError, match="a number, ray or ray://HOST:10001, got 'eight'"):
        list(in_order(double, [1], "eight"))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="--workers=ray needs the package ray: pip install ray"):
        list(in_order(double, [1], "ray"))


# ---- again, with another tokenizer


def test_retokenize_gives_what_preparing_with_that_tokenizer_gives(stories, prepared, tmp_path):
    knobs = {"vocab_size": 500, "shard_tokens": 4000, "tokenizer_path": str(tmp_path / "o.model")}
    prepare_dataset(stories, tmp_path / "fresh", **knobs)
    retokenize_dataset(prepared, tmp_path / "again", sequence_length=32, **knobs)
    fresh, again = contents(tmp_path / "fresh"), contents(tmp_path / "again")
    assert len(fresh.pop("manifest.json")) < len(again.pop("manifest.json"))
    assert again == fresh
    assert read_manifest(tmp_path / "again")["config"]["input_path"] == str(stories)
    assert TokenStream(tmp_path / "again", "train", 32, 1).vocab_size == 500


def test_a_dataset_that_counted_no_bytes_is_encoded_again(prepared, tmp_path, capsys):
    folder = shutil.copytree(prepared, tmp_path / "d")
    stats = json.loads((folder / "stats.json").read_text())
    stats["documents"] = {"read": 301, "kept": 300, "dropped": {"read": {}, "dedup": {}}}
    stats["documents"]["dropped"]["filter"] = {"too-short": {"count": 1, "examples": ["a"]}}
    (folder / "stats.json").write_text(json.dumps(stats))
    retokenize_dataset(folder, tmp_path / "again", vocab_size=350)
    lines = capsys.readouterr().out.split("\n")
    assert "| read |  | 301 |  |" in lines
    assert "| dropped: filter | too-short | -1 |  |" in lines
    assert "| kept |  | 300 |  |" in (tmp_path / "again" / "DATA_CARD.md").read_text()


@posix
def test_an_interrupted_retokenize_goes_on_where_it_was(prepared, tmp_path):
    options = [f"--output_dir={tmp_path / 'again'}", "--vocab_size=350", "--shard_tokens=4000"]
    kill_at(18, "retokenize", prepared, *options, name="SIGINT", status=130)
    assert (tmp_path / ".again.partial" / "train_00001.bin").exists()
    first = (tmp_path / ".again.partial" / "train_00000.bin").stat()
    for name in ("again", "straight"):
        retokenize_dataset(prepared, tmp_path / name, vocab_size=350, shard_tokens=4000)
    assert (tmp_path / "again" / "train_00000.bin").stat().st_mtime_ns == first.st_mtime_ns
    assert contents(tmp_path / "again") == contents(tmp_path / "straight")


def test_retokenize_refuses_changed_text(prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "d")
    (folder / "train_00001.jsonl").write_bytes(b"{}\n")
    with pytest.raises(UserError, match=r"train_00001.jsonl: checksum mismatch"):
        retokenize_dataset(folder, tmp_path / "again", vocab_size=300)
