"""Files as people have them: ../shared/data/found, read whole; skipped where it is absent."""

import json
import re
from pathlib import Path

import pytest

import eval as evaluation
from corpus.chats import read_chats, read_pairs
from corpus.inspect import InspectConfig, inspect
from corpus.prepare import DataConfig
from corpus.prepare import main as prepare
from corpus.report import Tally, reasons_of
from corpus.rows import file_rows
from corpus.sources import read_documents
from data import TokenStream
from lib.config import UserError

FOUND = Path(__file__).parents[2] / "shared/data/found"
pytestmark = pytest.mark.skipif(not FOUND.is_dir(), reason="needs ../shared/data/found")

# ---- A, D, H: rows of conversations and pairs


def talk(*turns):
    """Messages of user and assistant in turn; the system's, or one not learned, stands as it is."""
    roles = ("user", "assistant")
    return [t if isinstance(t, dict) else {"role": roles[n % 2], "content": t}
            for n, t in enumerate(turns, -isinstance(turns[0], dict))]  # fmt: skip


def context(role, text, **more):
    return {"role": role, "content": text} | more


HI, SAY, WEIGHT_0 = ("Hi 0", "Hello."), ("Say 0", "0"), {"role": "assistant", "weight": 0}
ROWS = [  # a file, the conversations in it, the first; what is passed over, what is not used
    ("kto.jsonl", 20, talk("Say the word boat 1.", "boat"), "not-learned", ""),
    ("weight0.jsonl", 40, talk("Two times 0?", WEIGHT_0 | {"content": "A wrong number, sorry."},
                               "Try again.", "0"), "", ""),
    ("loss_false.jsonl", 40, talk("Act 0.", WEIGHT_0 | {"content": "OK, understood."}, "Go.",
                                  "Done 0."), "", ""),
    ("dolly_context.jsonl", 40, talk("Which colour is named in note 0?\nNote 0 says that the apple "
                                     "is painted green.", "Green."), "", "category"),
    ("orca_system_prompt.jsonl", 40, talk(context("system", "You answer in one word."),
                                          "What is 0 plus 1?", "1"), "", "id"),
    ("thinking.jsonl", 40, talk(*HI), "", "messages.reasoning_content"),
    *((name, 40, talk(*HI), "", "") for name in (
        "completion_json.csv", "input_output.jsonl", "query_response.jsonl", "role_model.jsonl",
        "user_assistant_fields.jsonl", "conversation_role_text.jsonl")),
    *((name, 40, talk(*SAY), "", "") for name in ("text_chatml.jsonl", "text_hash.jsonl")),
    ("messages_json.csv", 8, talk(*HI), "", ""),
    ("human_assistant_keys.jsonl", 40, talk(*HI, "Bye", "Bye."), "", ""),
    ("developer.jsonl", 40, talk(context("system", "Be brief."), *HI), "", ""),
    ("alpaca_hist_dicts.jsonl", 40, talk("hi", "hello", *SAY), "", ""),
    ("empty_instruction.jsonl", 40, talk("What is 0+0?", "0"), "", ""),
    ("numeric.jsonl", 40, talk("What is 0+1?", "1"), "", ""),
    ("nan.jsonl", 40, talk("Say 0", "Number 0"), "", ""),
    ("oasst_tree.jsonl", 40, talk(*HI), "", "tree_state"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "count", "first", "passed", "unused"), ROWS)
def test_rows_are_read_as_what_they_are(name, count, first, passed, unused, capsys):
    tally = Tally()
    rows = read_chats(FOUND / name, tally)
    assert (len(rows), rows[0]["messages"]) == (count, first)
    assert "".join(reason for _, reason, _, _ in reasons_of(tally.dropped)) == passed
    named = [line.partition("columns not used: ")[2] for line in tally.lines()]
    assert "".join(named) == unused
    inspect(InspectConfig(str(FOUND / name)))
    shown = capsys.readouterr().out
    assert f"{count:>10,}  usable rows\n" in shown
    assert f"]{first[-1]['content']}<|im_end|>" in shown
    assert all(
        f"{m['content']}<|im_end|>\n<|im_start|>user" in shown for m in first if "weight" in m
    )


PAIRS = "pairs_prompt_repeated.jsonl pairs_argilla.jsonl pairs_response_names.jsonl pairs_rm.jsonl "


@pytest.mark.parametrize("name", [*PAIRS.split(), "pairs_json.csv"])
def test_pairs_are_read_as_what_they_are(name):
    rows = read_pairs(FOUND / name)
    (question, good), bad = (HI, "No.") if name == "pairs_json.csv" else (SAY, "no")
    answers = {"chosen": talk("", good)[1:], "rejected": talk("", bad)[1:]}
    assert (len(rows), rows[0]) == (40, {"prompt": talk(question)} | answers)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("images.jsonl", r'40 media \(line 1: "images" is no text; leave the field out'),
        ("sharegpt_tools.jsonl", "40 tools .line 1: .* 'function_call' is not supported"),
    ],
)
def test_rows_that_text_cannot_stand_for_are_counted_with_the_reason(name, reason):
    with pytest.raises(UserError, match=f"0 usable rows of 40: {reason}"):
        read_chats(FOUND / name)


# ---- B, C, G: files


def rows_of(name):
    """Returns (rows, {reason: count}, the first example of a bad row) of a file."""
    tally = Tally()
    found = [row for _, row in file_rows(FOUND / name, tally)]
    bad = {reason: count for _, reason, count, _ in reasons_of(tally.dropped)}
    return found, bad, "".join(entry[3] for entry in reasons_of(tally.dropped))


SAYS = [{"prompt": f"Say {n}", "response": f"Number {n}"} for n in range(40)]
READ = {  # name: (rows, bad ones, where the first of these stands, the first row)
    "unclosed.csv": (39, 1, "line 4: a quote opens a cell and does not end it", SAYS[0]),
    "text_unclosed.csv": (59, 1, "line 7: a quote opens", None),
    "quotes.tsv": (40, 0, "", {"id": "0", "prompt": "Say the number 0", "response": "Number 0"}),
    "extra_cols.csv": (0, 8, "line 2: 3 cells, the header has 2; put a text with ',' or a", None),
    "text.tab.csv": (60, 0, "", None),
    "excel_sep.csv": (8, 0, "", None),
    "diverse.ndjson": (120, 0, "", None),
    "noext": (40, 0, "", None),
    "data_wrapper.json": (40, 0, "", {"prompt": "Say 0", "response": "0"}),
    "dict_of_lists.json": (40, 0, "", {"prompt": "Say 0", "response": "0"}),
    "nan.jsonl": (40, 0, "", {"instruction": "Say 0", "input": None, "output": "Number 0"}),
}


@pytest.mark.parametrize("name", READ)
def test_files_are_read_whole_and_what_is_bad_is_named(name):
    count, bad, where, first = READ[name]
    found, reasons, example = rows_of(name)
    assert (len(found), sum(reasons.values())) == (count, bad)
    assert f"{FOUND / name} {where}" in example or not bad
    assert first in (None, *found[:1])
    if name.startswith("text") or name in ("excel_sep.csv", "diverse.ndjson", "noext"):
        assert len(documents(FOUND / name)[0]) == count
        assert all(row["text"].endswith(".") for row in found)


def test_quotes_in_cells_are_what_was_meant():
    found, _, _ = rows_of("quotes.tsv")
    assert found[5]["response"] == '"Yes" was all he said.'
    assert found[10]["response"] == '"Five inches, I think.'
    found, bad, _ = rows_of("backslash_quotes.csv")
    assert (len(found), bad) == (8, {})
    assert found[7]["prompt"] == 'Say "hello", number 7, to me'
    assert found[7]["response"] == 'He said "hello", and left 7.'
    found, bad, _ = rows_of("unclosed.csv")
    assert found == [row for row in SAYS if row["prompt"] != "Say 2"]


def documents(path):
    """Returns (documents, the Tally) of a path."""
    tally = Tally()
    return [text for _, text, _ in read_documents(DataConfig(input_path=str(path)), tally)], tally


def test_a_mixed_folder_is_read_and_the_others_are_named():
    texts, tally = documents(FOUND / "mixed")
    assert tally.passed_over == {".log": 1, ".tex": 1, ".xml": 1}
    assert len(texts) == 50 + 50 + 4
    assert not any("{" in text for text in texts)
    assert [len(documents(FOUND / "mixed" / name)[0]) for name in ("b.ndjson", "i.tex")] == [50, 1]


@pytest.mark.parametrize("name", ["lfs_pointer.txt", "lfs_pointer.jsonl"])
def test_a_git_lfs_pointer_is_named(name):
    for read in (documents, read_chats):
        with pytest.raises(UserError, match=f"{name}: a Git LFS pointer.*git lfs pull"):
            read(FOUND / name)


def test_a_column_of_bytes_is_named():
    texts, tally = documents(FOUND / "bin.parquet")
    assert not texts
    assert "no column is surely the text among text (bytes); name it" in str(tally.dropped)


# ---- E, I: boundaries of documents


@pytest.mark.parametrize(
    ("file", "documents"), [("endoftext.txt", 60), ("longline.txt", 10), ("one_document.txt", 1)]
)
def test_text_keeps_its_bytes_its_documents_and_can_be_trained_on(tmp_path, file, documents):
    settings = {
        "vocab_size": 320,
        "input_path": str(FOUND / file),
        "output_dir": str(tmp_path / "d"),
    }
    prepare(DataConfig(**settings))
    counts = json.loads((tmp_path / "d" / "stats.json").read_text())["documents"]
    assert (counts["read"], counts["kept"]) == (documents, documents)
    text = (FOUND / file).read_bytes().replace(b"<|endoftext|>", b"")
    assert 0.99 * len(text) < counts["kept_bytes"] <= len(text)
    assert not any(b"endoftext" in path.read_bytes() for path in (tmp_path / "d").glob("*.jsonl"))
    assert TokenStream([tmp_path / "d"], "val", 32, 1).batch(0)["count"]


# ---- H: questions for eval.py


@pytest.mark.parametrize("name", ["ev_mmlu.jsonl", "ev_arc.jsonl", "ev_hellaswag.jsonl"])
def test_questions_are_read_with_the_right_answer(name):
    rows = evaluation.rows_in(FOUND / name, evaluation.to_question, "a question")
    (shape,) = {kind for _, kind, _ in rows}
    assert name == f"ev_{shape}.jsonl"
    for number, (_, _, (context, choices, right)) in enumerate(rows):
        if shape == "hellaswag":
            answer = " and ate."
            assert context == f"He took {number} apples"
        else:
            answer = " B" if shape == "mmlu" else f" {number + 1}"
            assert f"What is {number}+1?\n" in context
        assert choices[right] == answer
    assert len(rows) == 12


def test_every_file_is_named_in_a_test():
    """Each file of the folder stands in one of the tables above."""
    text = re.findall(r"[\w.]+", Path(__file__).read_text(encoding="utf-8"))
    names = {path.name for path in FOUND.iterdir()} - {"README.md"}
    assert names - {*text} == set()
