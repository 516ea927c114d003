"""The sample files: always the same, no prompt twice, checks that tell right from wrong."""

import hashlib
import json
import subprocess
import sys
from collections import Counter

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
    summaries,
)
from lib.config import UserError
from tests import ROOT

GOLDEN = "78496df5567b8046b76e2e4083833db5c89da44f08dbdc19a061359b2befacf9"


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
        assert len(read(tmp_path / f"{name}.jsonl", max_bad=0)) == len(rows[name])


def test_another_seed_gives_other_rows(rows):
    assert make_rows(43) != rows


def test_the_rows_of_a_seed_stay_the_same_between_releases(rows):
    """But for those about Python's functions, which are as many as this Python documents."""
    lines = [json.dumps(row) for name in FILES for row in rows[name] if row["kind"][:6] != "python"]
    digest = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    assert digest == GOLDEN


def test_sizes_and_kinds(rows):
    assert len(rows["sft_train"]) + len(rows["sft_val"]) >= 2000
    assert len(rows["dpo_train"]) + len(rows["dpo_val"]) >= 1000
    assert len(rows["sft_val"]) >= 200
    assert len(rows["dpo_val"]) >= 100
    for name in FILES:
        kinds = Counter(row["kind"] for row in rows[name])
        assert kinds.keys() == TASKS.keys()
    for name in ("dpo_train", "dpo_val"):
        assert {row["about"] for row in rows[name]} == set(FLAWS)


def test_no_prompt_stands_twice(rows):
    prompts = Counter(row["prompt"] for name in FILES for row in rows[name])
    assert set(prompts.values()) == {1}


def test_every_check_tells_right_from_wrong(rows):
    for row in rows["sft_train"] + rows["sft_val"]:
        assert passes(row["check"], row["response"]), row
        assert not passes(row["check"], ""), row
    for row in rows["dpo_train"] + rows["dpo_val"]:
        assert passes(row["check"], row["chosen"]), row
        assert row["chosen"] != row["rejected"], row
        if row["about"] in ("correctness", "evasion"):
            assert not passes(row["check"], row["rejected"]), row
        else:
            assert row["chosen"].removesuffix(".") in row["rejected"], row


def test_what_is_there_is_kept_and_anything_else_refused(tmp_path, capsys):
    create_sample_datasets(SampleFilesConfig(str(tmp_path)))
    (tmp_path / "dpo_val.jsonl").unlink()
    before = (tmp_path / "sft_val.jsonl").stat()
    create_sample_datasets(SampleFilesConfig(str(tmp_path)))
    assert capsys.readouterr().out.count("was there") == 3
    assert (tmp_path / "sft_val.jsonl").stat().st_mtime_ns == before.st_mtime_ns
    (tmp_path / "sft_val.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match=r"sft_val.jsonl: exists, with other contents; name ano"):
        create_sample_datasets(SampleFilesConfig(str(tmp_path)))
    assert (tmp_path / "sft_val.jsonl").read_text() == "mine\n"
    with pytest.raises(UserError, match="exists, with other contents"):
        create_sample_datasets(SampleFilesConfig(str(tmp_path), seed=1))
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\)"):
        create_sample_datasets(SampleFilesConfig(str(tmp_path / "sft_val.jsonl" / "x")))


def test_summaries_are_plain_lines_of_public_functions():
    found = summaries()
    assert len(found) > 300
    assert found["str.capitalize"] == "Return a capitalized version of the string."
    for name, summary in found.items():
        assert name.count(".") in (1, 2), name
        assert summary.isascii()
        assert len(summary) < 200
        assert summary[-1] == "."


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
    ],
)  # fmt: skip
def test_a_check_accepts_and_refuses(kind, right, accepted, refused):
    check = {"kind": kind, "answer": right, "share": 0.6}
    assert [answer for answer in (*accepted, *refused) if passes(check, answer)] == accepted
