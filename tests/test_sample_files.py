"""The sample files: always the same, no prompt twice, checks that tell right from wrong."""

import hashlib
import json
import subprocess
import sys
from itertools import product

import pytest

from corpus.chats import read_chats, read_pairs
from corpus.samples import (
    FILES,
    FLAWS,
    TASKS,
    SampleFilesConfig,
    create_sample_datasets,
    make_rows,
    passes,
)
from lib.config import UserError
from tests import ROOT

GOLDEN = "0ccf5170a666c0d9f11a8f67ed7c8162a5f38cf233c377e97840f1448966484d"


def single(rows):
    """Returns the rows that are no conversations."""
    return [row for row in rows if isinstance(row.get("prompt"), str)]


@pytest.fixture(scope="module")
def rows():
    return make_rows(42)


def test_another_process_writes_the_same_rows(tmp_path, rows):
    words = [sys.executable, "data.py", "create_sample_datasets", f"--output_dir={tmp_path}"]
    env = {"PYTHONHASHSEED": "1", "PATH": ""}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.jsonl" for name in FILES}
    for name in FILES:
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert list(map(json.loads, lines)) == rows[name]
        assert f"{len(lines):,} rows" in done.stdout
        read = read_chats if name.startswith("sft") else read_pairs
        assert len(read(tmp_path / f"{name}.jsonl")) == len(rows[name])


def test_the_rows_of_a_seed_stay_the_same_between_releases(rows):
    lines = sorted(json.dumps(row) for name in FILES for row in rows[name])
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == GOLDEN
    assert make_rows(43) != rows


def test_every_file_has_every_kind_and_no_prompt_stands_twice(rows):
    for name in FILES:
        assert {row["kind"] for row in rows[name]} == TASKS.keys()
        assert {row.get("about") for row in rows[name]} <= {None, *FLAWS}
    prompts = [row["prompt"] for name in FILES for row in single(rows[name])]
    assert len(set(prompts)) == len(prompts)


def test_conversations_are_made_of_the_single_rows_of_their_file_alone(rows):
    for name in FILES:
        answers = {
            row["prompt"]: row.get("response") or row["chosen"] for row in single(rows[name])
        }
        shapes = set()
        for row in rows[name]:
            if row in single([row]):
                continue
            messages = row.get("messages") or row["prompt"] + row["chosen"]
            system = messages[0]["role"] == "system"
            questions, replies = messages[system::2], messages[system + 1 :: 2]
            assert {message["role"] for message in questions} == {"user"}
            assert {message["role"] for message in replies} == {"assistant"}
            assert [answers[q["content"]] for q in questions] == [a["content"] for a in replies]
            assert passes(row["check"], replies[-1]["content"])
            assert not row.get("rejected") or row["rejected"] != row["chosen"]
            shapes.add((system, len(questions)))
        every = {(True, 1), *product((True, False), range(2, 7))}
        assert shapes <= every
        assert len(shapes) == len(every) or name != "sft_train"


def test_an_everyday_message_has_its_kind_of_answer(rows):
    answers = {row["prompt"].lower(): row for row in single(rows["sft_train"])}
    assert answers["what is machine learning?"]["kind"] == "definitions"
    for name, part in (("greeting", "Hello"), ("thanks", "welcome"), ("not_known", "don't know")):
        texts = {row["response"] for row in answers.values() if row["kind"] == name}
        assert [part in text for text in texts] == [True]


def test_every_check_tells_right_from_wrong(rows):
    for row in single(rows["sft_train"] + rows["sft_val"]):
        assert passes(row["check"], row["response"]), row
        assert not passes(row["check"], ""), row
    for row in single(rows["dpo_train"] + rows["dpo_val"]):
        assert passes(row["check"], row["chosen"]), row
        assert row["chosen"] != row["rejected"], row
        if row["about"] in ("correctness", "evasion"):
            assert not passes(row["check"], row["rejected"]), row
        else:
            assert row["chosen"].removesuffix(".") in row["rejected"], row


def test_what_is_there_is_kept_and_anything_else_refused(tmp_path):
    create_sample_datasets(SampleFilesConfig(str(tmp_path)))
    (tmp_path / "dpo_val.jsonl").unlink()
    before = (tmp_path / "sft_val.jsonl").stat()
    create_sample_datasets(SampleFilesConfig(str(tmp_path)))
    assert (tmp_path / "dpo_val.jsonl").exists()
    assert (tmp_path / "sft_val.jsonl").stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(UserError, match=r"train.jsonl: exists, with other contents; name another"):
        create_sample_datasets(SampleFilesConfig(str(tmp_path), seed=1))
    assert (tmp_path / "sft_val.jsonl").stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        create_sample_datasets(SampleFilesConfig(str(tmp_path / "sft_val.jsonl" / "x")))


SUMMARY = "Return a copy of the list."


@pytest.mark.parametrize(
    ("kind", "right", "accepted", "refused"),
    [
        ("exact", "lamp", ["lamp", " lamp.\n", '"lamp"'], ["Lamp", "lamp lamp", ""]),
        ("word", "Yes", ["Yes", "yes."], ["Yes, of course", "No"]),
        ("number", "12", ["12", "The answer is 12."], ["7 + 5 = 12", "112", "-12", "0.12", "ten"]),
        ("number", "5", ["5"], ["5 5"]),
        ("overlap", SUMMARY, [SUMMARY, "It returns a copy of this list."],
         ["Remove the last item.", f"{SUMMARY} " * 2, "a a a a a a"]),
        ("regex", r"\bice\b", ["It is ICE.", "a " * 29 + "ice"], ["icy", "a " * 30 + "ice"]),
    ],
)  # fmt: skip
def test_a_check_accepts_and_refuses(kind, right, accepted, refused):
    check = {"kind": kind, "answer": right, "share": 0.6}
    assert [answer for answer in (*accepted, *refused) if passes(check, answer)] == accepted
