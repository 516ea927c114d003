"""prepare.py: raw text becomes clean shards, whatever interrupts it; nothing is overwritten or lost."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import SentencePieceTrainer

from corpus.prepare import DataConfig, RetokenizeConfig, in_order, main, retokenize, unfinished
from data import TokenStream, unigram_bits_per_byte
from lib.config import UserError, configure
from lib.folders import Shards, hash_fraction, read_manifest
from lib.tokenizer import Tokenizer
from tests import ROOT, SHARED
from tests.conftest import write_rows
from tests.warm import python

BOS, EOS = 1, 2


# --- Helpers ------------------------------------------------------------------------------------------------

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
    body = [
        lines[random.randint(len(lines))].replace("the", f"the {word(random)}")
        for _ in range(sentences)
    ]
    return f"Story {number}. " + " ".join(body)


def word(random):
    return "".join(chr(97 + letter) for letter in random.randint(0, 26, 6))


def preset(name):
    return ROOT / "configs" / "datasets" / f"{name}.json"


def write_jsonl(path, texts):
    return write_rows(path, ({"text": text} for text in texts))


def prepare_dataset(source, output, **settings):
    """Prepare SOURCE with small settings; returns (train and val documents, stats)."""
    defaults = {"vocab_size": 400, "train_ratio": 0.8, "sequence_length": 32, "quality": False}
    main(DataConfig(input_path=str(source), output_dir=str(output), **{**defaults, **settings}))
    splits = {split: read_split(output, split) for split in ("train", "val")}
    return splits, json.loads((output / "stats.json").read_text())


def read_split(folder, split):
    files = sorted(folder.glob(f"{split}_*.jsonl"))
    return [
        json.loads(line)["text"] for file in files for line in file.read_text().split("\n") if line
    ]


def every(splits):
    return sorted(splits["train"] + splits["val"])


def contents(folder):
    """Every file's bytes, but for the card, which bears the date."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name != "DATA_CARD.md"
    }


def reasons(stats):
    return {
        reason: entry["count"]
        for stage in stats["documents"]["dropped"].values()
        for reason, entry in stage.items()
    }


def data_py(*arguments, **settings):
    return subprocess.run(
        [python(), str(ROOT / "data.py"), *map(str, arguments)],
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


# --- What comes out ----------------------------------------------------------------------------------------


def test_shards_hold_each_document_between_bos_and_eos(prepared):  # traps B3, B13
    folder, splits, stats = prepared
    tokenizer = Tokenizer.load(folder)
    assert every(splits) == sorted(map(prose, range(300)))
    assert not set(splits["train"]) & set(splits["val"])
    assert len(list(folder.glob("train_*.bin"))) > 1  # shard_tokens cuts
    for split, documents in splits.items():
        ids = Shards(folder, split).read(0, Shards(folder, split).tokens).tolist()
        assert (
            ids.count(EOS)
            == ids.count(BOS)
            == len(documents)
            == stats["splits"][split]["documents"]
        )
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


def test_a_mixture_keeps_its_proportions_and_the_card_shows_them(tmp_path):
    for name, numbers in (("many", range(200)), ("few", range(500, 600))):
        write_jsonl(tmp_path / f"{name}.jsonl", map(prose, numbers))
    entries = [
        {"name": "many", "input_path": str(tmp_path / "many.jsonl"), "weight": 3, "licence": "CC0"},
        {"name": "few", "input_path": str(tmp_path / "few.jsonl"), "max_samples": 40},
    ]
    (tmp_path / "mix.json").write_text(
        json.dumps({"mixture": entries, "input_path": "docstrings:"})
    )
    options = [
        tmp_path / "mix.json",
        "--vocab_size=400",
        f"--output_dir={tmp_path / 'd'}",
        "--quality=false",
    ]
    done = data_py(*options, "--max_docs=80", "--train_ratio=0.9")
    assert done.returncode == 0, done.stderr
    stats = json.loads((tmp_path / "d" / "stats.json").read_text())
    assert {name: source["documents"] for name, source in stats["sources"].items()} == {
        "many": 60,
        "few": 20,
    }
    texts = read_split(tmp_path / "d", "train") + read_split(tmp_path / "d", "val")
    assert sorted(texts) == sorted(map(prose, [*range(60), *range(500, 520)]))
    card = (tmp_path / "d" / "DATA_CARD.md").read_text()
    assert f"| many | `{tmp_path / 'many.jsonl'}` | CC0 | 3.0 | 60 |" in card
    assert "| few |" in card
    assert "not noted" in card


def test_a_mixture_is_called_one_and_its_caps_and_licence_stand_on_the_card(tmp_path):
    for name, numbers in (("many", range(200)), ("few", range(500, 540))):
        write_jsonl(tmp_path / f"{name}.jsonl", map(prose, numbers))
    entries = [{"name": name, "input_path": f"{name}.jsonl"} for name in ("many", "few")]
    entries[0] |= {"max_samples": 30}
    options = [
        f"--mixture={json.dumps(entries)}",
        "--licence=CC BY",
        "--vocab_size=400",
        "--no_quality",
    ]
    done = data_py(*options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "data" / "processed" / "mixture" / "DATA_CARD.md").read_text()
    assert "| many | `many.jsonl` | CC BY | 1.0 | 30 (capped) |" in card
    assert "| few | `few.jsonl` | CC BY | 1.0 | 40 |" in card
    assert "not capped" not in card
    shown = data_py("inspect", "data/processed/mixture", cwd=tmp_path).stdout
    assert all(f"{name}.jsonl" in shown for name in ("many", "few"))
    assert "docstrings" not in shown
    done = data_py(
        f"--mixture={json.dumps(entries)}", "--min_length=9999", "--output_dir=d", cwd=tmp_path
    )
    assert done.stderr.startswith("error: mixture: 0 usable documents: 70 too-short")


def test_what_was_found_in_bad_order_is_noted(tmp_path):
    (tmp_path / "in.txt").write_bytes(
        (prose(1, 20) + " caf\u00e9\n\n" + prose(2, 20)).encode("cp1252")
    )
    _, stats = prepare_dataset(tmp_path / "in.txt", tmp_path / "d", train_ratio=1, vocab_size=300)
    assert stats["documents"]["noted"]["decoded-as-cp1252"]["count"] == 1


def test_the_histograms_count_what_they_say(tmp_path):
    texts = [prose(n, 6 + 3 * (n % 5)) for n in range(60)] + [
        "Das ist nicht der Text, den wir haben wollen. " * 4
    ]
    splits, stats = prepare_dataset(write_jsonl(tmp_path / "in.jsonl", texts), tmp_path / "d")
    sizes = [len(text) for text in every(splits)]
    for low, count in stats["characters_of_kept"].items():
        assert count == sum(int(low) <= size < 2 * int(low) for size in sizes)
    assert sum(stats["characters_of_kept"].values()) == len(sizes) == 60
    scores = stats["language_scores_of_read"]
    assert sum(scores.values()) == 61
    assert sum(count for low, count in scores.items() if float(low) < 0.7) == 1


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
    with pytest.raises(
        UserError, match=r"file/t.model: cannot be written .*; name another tokenizer_path"
    ):
        prepare_dataset(stories, tmp_path / "d", tokenizer_path=str(tmp_path / "file" / "t.model"))


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


def test_a_folder_without_tokenizer_model_is_refused_and_left_as_it_is(stories, tmp_path):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "tokenizer.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"llama/tokenizer.model: not found; name a folder that holds one"
    ):
        prepare_dataset(stories, tmp_path / "d", tokenizer_path=str(tmp_path / "llama"))
    assert [path.name for path in (tmp_path / "llama").iterdir()] == ["tokenizer.json"]


def test_the_card_of_a_foreign_tokenizer_says_no_more_than_is_known(stories, prepared, tmp_path):
    options = {"model_prefix": str(tmp_path / "other"), "vocab_size": 400, "byte_fallback": True}
    texts = [prose(number) for number in range(100)]
    SentencePieceTrainer.train(sentence_iterator=iter(texts), minloglevel=2, **options)
    prepare_dataset(stories, tmp_path / "d", tokenizer_path=str(tmp_path / "other.model"))
    card = (tmp_path / "d" / "TOKENIZER_CARD.md").read_text()
    assert "of these 3 control tokens" in card  # <unk>, <s>, </s>
    assert "a SentencePiece model of another program" in card
    card = (prepared[0] / "TOKENIZER_CARD.md").read_text()
    assert "of these 6 control tokens" in card
    assert "any text survives" in card


def test_the_tokenizer_learns_from_training_documents_alone(
    tmp_path,
):  # and from long lines: trap B15
    rare = "qzxjvq"
    texts = [prose(number) for number in range(200)]
    on_val = [text for text in texts if hash_fraction(text + f" {rare}" * 400) >= 0.5]
    on_train = [text for text in texts if hash_fraction(text + f" {rare}" * 400) < 0.5]
    for name, marked in (("val", on_val[0]), ("train", on_train[0])):
        source = [text + f" {rare}" * 400 if text == marked else text for text in texts]
        prepare_dataset(
            write_jsonl(tmp_path / "in.jsonl", source),
            tmp_path / name,
            train_ratio=0.5,
            language="off",
        )
    assert len(Tokenizer.load(tmp_path / "val").encode(f" {rare}")) > 1
    assert len(Tokenizer.load(tmp_path / "train").encode(f" {rare}")) == 1


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


# --- The command line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "0 usable documents"),
        ("binary.txt", b"plain so far" + b"\xff\xfe\x00", "byte 0xff at offset 12: not UTF-8"),
        ("bad.jsonl", b"{}\n3\n", "0 usable documents: 1 missing-text"),
        ("short.txt", b"hello", "1 too-short"),
        ("x.parquet", b"PAR1", "1 damaged-file"),
        ("one.txt", prose(1).encode(), "vocab_size 32768 is too large"),
        ("", b"", "not found"),
    ],
)
def test_unusable_input_is_one_line_and_exit_2(tmp_path, name, content, message):
    if name:
        (tmp_path / name).write_bytes(content)
    done = data_py(
        f"--input_path={tmp_path / (name or 'nothing.txt')}", f"--output_dir={tmp_path / 'out'}"
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*out*"))


# --- Interrupted, and gone on with --------------------------------------------------------------------------

SMALL = "import sys, data; from corpus import prepare; prepare.PART_BYTES = 60_000; prepare.BATCH_CHARACTERS = 8_000; "
RUN = SMALL + "data.main(sys.argv[1:])"


def preparing(*arguments, code=RUN, executable=None, **settings):
    """A process that prepares in parts of 60 kB, so that small data has many."""
    words = [executable or python(), "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **settings
    )


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    """Documents of all fates: kept, too short, exact and near duplicates, bad rows."""
    path, texts = tmp_path_factory.mktemp("messy") / "in.jsonl", []
    for number in range(9, 600):
        texts.append(prose(number, 12 + number % 9))
        texts += {3: ["short"], 5: [prose(number - 2, 12 + (number - 2) % 9)]}.get(number % 9, [])
        texts += [near_copy(prose(number // 2, 12 + number // 2 % 9))] if number % 11 == 10 else []
    write_jsonl(path, texts)
    with open(path, "a") as file:
        file.write("no json\n")
    return path


@pytest.fixture(scope="module")
def options(messy):
    return [
        f"--input_path={messy}",
        "--vocab_size=600",
        "--train_ratio=0.9",
        "--shard_tokens=9000",
        "--quality=false",
    ]


@pytest.fixture(scope="module")
def straight(options, tmp_path_factory):
    """What an unbroken run makes of it."""
    folder = tmp_path_factory.mktemp("straight") / "d"
    process = preparing(*options, f"--output_dir={folder}", "--num_workers=1")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    stats = json.loads((folder / "stats.json").read_text())
    assert set(reasons(stats)) == {"not-json", "too-short", "exact-duplicate", "near-duplicate"}
    assert len(list(folder.glob("train_*.bin"))) > 5
    return folder


def test_the_result_does_not_depend_on_parts_nor_workers(options, straight, tmp_path):
    for name, code, workers in (
        ("a", RUN, 3),
        ("b", "import sys, data; data.main(sys.argv[1:])", 1),
    ):
        process = preparing(
            *options,
            f"--output_dir={tmp_path / name}",
            f"--num_workers={workers}",
            code=code,
            executable=sys.executable,
        )
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert contents(tmp_path / name) == contents(straight)


# the process kills itself when it writes, for the N-th time, what a later run relies on
DYING = (
    SMALL
    + """
import os, signal, sys
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
data.main(sys.argv[1:])
"""
)


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_kill_9_loses_no_more_than_a_part_and_the_same_command_gives_the_same_bytes(
    options, straight, tmp_path
):  # K8
    output, going_on = tmp_path / "d", 0
    for count in (5, 2, 9, 6, 14, 11, 3):
        process = preparing(*options, f"--output_dir={output}", str(count), code=DYING)
        out, err = process.communicate(timeout=120)
        if process.returncode == 0:
            break
        assert process.returncode == -9, err
        assert not output.exists()
        going_on += "going on after" in out
    assert going_on > 2
    process = preparing(*options, f"--output_dir={output}")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert contents(output) == contents(straight)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d"]


@pytest.mark.parametrize("count", [7, 21, 35])
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_one_kill_anywhere(options, straight, tmp_path, count):
    process = preparing(*options, f"--output_dir={tmp_path / 'd'}", str(count), code=DYING)
    process.communicate(timeout=120)
    assert process.returncode == -9
    process = preparing(*options, f"--output_dir={tmp_path / 'd'}")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert contents(tmp_path / "d") == contents(straight)


def begun(options, output, count=12):
    """Leaves an unfinished preparation behind."""
    process = preparing(*options, f"--output_dir={output}", str(count), code=DYING)
    process.communicate(timeout=120)
    assert process.returncode == -9


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_other_settings_or_another_input_start_over_and_say_so(options, straight, messy, tmp_path):
    begun(options, tmp_path / "d")
    process = preparing(*options, f"--output_dir={tmp_path / 'd'}", "--min_length=60")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "min_length was 50, now 60" in out
    source = shutil.copy(messy, tmp_path / "in.jsonl")
    changed = [f"--input_path={source}", *options[1:]]
    begun(changed, tmp_path / "e")
    text = source.read_text().split("\n")
    source.write_text("\n".join([text[1], *text[1:]]))
    process = preparing(*changed, f"--output_dir={tmp_path / 'e'}")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "the input has changed" in out
    stats = json.loads((tmp_path / "e" / "stats.json").read_text())
    assert (
        stats["documents"]["read"]
        == json.loads((straight / "stats.json").read_text())["documents"]["read"]
    )


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_another_vocabulary_does_not_clean_again(options, tmp_path):
    begun(options, tmp_path / "d")
    others = [word.replace("--vocab_size=600", "--vocab_size=500") for word in options]
    process = preparing(*others, f"--output_dir={tmp_path / 'd'}")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "going on after" in out
    assert Tokenizer.load(tmp_path / "d").vocab_size == 500


def double(number):
    return 2 * number


def test_processes_keep_the_order_and_a_dead_one_is_named():
    assert list(in_order(double, range(100), workers=2)) == [(n, 2 * n) for n in range(100)]
    with pytest.raises(UserError, match=r"a worker process died.*fewer num_workers"):
        list(in_order(os._exit, range(100), workers=2))


def workers_of(pid):
    """The process ids of its workers, once they run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            parent, worker = path.read_text().rpartition(")")[2].split()[1], int(path.parent.name)
            found += [worker] * (parent == str(pid) and "spawn_main" in command_of(worker))
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_workers_end_with_their_parent(options, tmp_path):
    words, workers = [*options, f"--output_dir={tmp_path / 'd'}", "--num_workers=2"], []
    process = preparing(*words, executable=sys.executable)
    while len(workers) < 2 and process.poll() is None:
        workers = workers_of(process.pid)
    process.kill()
    process.communicate()
    assert workers
    for _ in range(400):
        alive = [pid for pid in workers if "spawn_main" in command_of(pid)]
        if not alive:
            return
        time.sleep(0.05)
    pytest.fail(f"{alive} outlive their parent")


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_a_full_disk_is_one_line_and_with_more_room_it_goes_on(options, straight, small_disk):
    folder = small_disk("250k")
    process = preparing(*options, f"--output_dir={folder / 'd'}")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err.count("\n")) == (2, 1), err
    assert "no space left on the disk; free some, and the same command goes on" in err
    small_disk("50m")
    process = preparing(*options, f"--output_dir={folder / 'd'}")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "going on after" in out
    assert contents(folder / "d") == contents(straight)


# --- Again, with another tokenizer --------------------------------------------------------------------------


def test_retokenize_gives_what_preparing_with_that_tokenizer_gives(stories, prepared, tmp_path):
    other = tmp_path / "other.model"
    prepare_dataset(
        stories, tmp_path / "fresh", tokenizer_path=str(other), vocab_size=500, shard_tokens=4000
    )
    knobs = {"vocab_size": 500, "shard_tokens": 4000, "sequence_length": 32}
    retokenize(RetokenizeConfig(str(prepared[0]), str(tmp_path / "again"), str(other), **knobs))
    for pattern in ("*.bin", "*.jsonl", "tokenizer.model"):
        names = sorted(path.name for path in (tmp_path / "fresh").glob(pattern))
        assert names == sorted(path.name for path in (tmp_path / "again").glob(pattern))
        assert names
        for name in names:
            assert (tmp_path / "fresh" / name).read_bytes() == (
                tmp_path / "again" / name
            ).read_bytes()
    assert read_manifest(tmp_path / "again")["config"]["input_path"] == str(stories)
    assert TokenStream(tmp_path / "again", "train", 32, 1).vocab_size == 500


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"documents": 3}'])
def test_retokenize_needs_the_statistics(prepared, tmp_path, content):
    path = shutil.copytree(prepared[0], tmp_path / "d") / "stats.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=r"stats.json: not readable as data.py writes it"):
        retokenize(RetokenizeConfig(str(path.parent), str(tmp_path / "again"), vocab_size=300))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": 3}', "\0"])
def test_unusable_leftovers_of_an_unfinished_run_are_no_hindrance(
    stories, prepared, tmp_path, content
):
    (tmp_path / ".d.partial").mkdir()
    (tmp_path / ".d.partial" / "progress.json").write_text(content)
    (tmp_path / ".d.partial" / "part_00000.train.jsonl").write_text("{")
    (tmp_path / ".d.partial" / "digests.bin").write_bytes(b"xyz")
    prepare_dataset(stories, tmp_path / "d", shard_tokens=4000)
    assert contents(tmp_path / "d") == contents(prepared[0])


@pytest.fixture
def retokenizing(prepared, tmp_path):
    """Begins to retokenize into a folder, and ends by a signal after its second shard; returns the status."""

    def begun(name, options=("--vocab_size=350", "--shard_tokens=4000")):
        words = ["retokenize", prepared[0], f"--output_dir={tmp_path / 'again'}", *options, "14"]
        process = preparing(*words, code=DYING.replace("SIGKILL", name))
        process.communicate(timeout=120)
        assert (tmp_path / ".again.partial" / "train_00001.bin").exists()
        return process.returncode

    return begun


def test_an_interrupted_retokenize_goes_on_where_it_was(prepared, retokenizing, tmp_path):
    assert retokenizing("SIGINT") == 130
    first = (tmp_path / ".again.partial" / "train_00000.bin").stat()
    knobs = {"vocab_size": 350, "shard_tokens": 4000}
    retokenize(RetokenizeConfig(str(prepared[0]), str(tmp_path / "again"), **knobs))
    assert (tmp_path / "again" / "train_00000.bin").stat().st_mtime_ns == first.st_mtime_ns
    retokenize(RetokenizeConfig(str(prepared[0]), str(tmp_path / "straight"), **knobs))
    assert contents(tmp_path / "again") == contents(tmp_path / "straight")


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_killed_retokenize_is_not_taken_for_a_preparation(
    stories, prepared, retokenizing, tmp_path, capsys
):
    settings = ("--vocab_size=400", "--shard_tokens=4000", "--sequence_length=32")
    assert retokenizing("SIGKILL", settings) == -9
    prepare_dataset(stories, tmp_path / "again", shard_tokens=4000)
    assert "starting over" in capsys.readouterr().out
    assert contents(tmp_path / "again") == contents(prepared[0])


def test_retokenize_refuses_changed_text(prepared, tmp_path):
    folder = shutil.copytree(prepared[0], tmp_path / "d")
    (folder / "train_00001.jsonl").write_bytes(b"{}\n")
    with pytest.raises(UserError, match=r"train_00001.jsonl: missing or changed"):
        retokenize(RetokenizeConfig(str(folder), str(tmp_path / "again"), vocab_size=300))
    done = data_py("retokenize", folder)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--output_dir=NEW" in done.stderr


# --- At once ------------------------------------------------------------------------------------------------


def test_two_runs_at_once_do_not_share_a_folder(stories, tmp_path):
    with unfinished(tmp_path / "d"):
        done = data_py(
            f"--input_path={stories}", f"--output_dir={tmp_path / 'd'}", "--vocab_size=400"
        )
        assert done.returncode == 2
        assert "another run is preparing it" in done.stderr


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared corpora")
def test_real_corpora(tmp_path):
    raw = SHARED / "wikitext2" / "wiki.valid.raw"
    splits, stats = prepare_dataset(raw, tmp_path / "wiki", vocab_size=4096, max_length=300_000)
    assert stats["documents"]["read"] in (
        60,
        61,
    )  # 60 articles, and the blank line before the first
    assert all(text.startswith("= ") for text in every(splits))
