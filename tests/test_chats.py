"""Rows of every format, well formed and not, and what `inspect` says of them."""

import bz2
import gzip
import json
import lzma
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.chats import read_chats, read_pairs
from corpus.inspect import marked, rendered, tokens_of
from corpus.sources import Tally
from lib.config import UserError
from lib.tokenizer import render
from tests import ROOT, SHARED
from tests.conftest import prepare_dataset
from tests.warm import python


def says(*turns, first="user"):
    """Messages of user and assistant in turn."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]


def replies(*turns):
    return says(*turns, first="assistant")


def system(text):
    return [{"role": "system", "content": text}]


def shared_gpt(*turns, roles=("human", "gpt")):
    return [{"from": roles[number % 2], "value": turn} for number, turn in enumerate(turns)]


def write(path, *rows):
    """Write rows as JSON Lines; a row of type str or bytes is a line as it stands."""
    with open(path, "wb") as file:
        for row in rows:
            line = json.dumps(row) if not isinstance(row, str | bytes) else row
            file.write((line.encode() if isinstance(line, str) else line) + b"\n")
    return path


def reasons(tally):
    return {reason: count for _, reason, count, _ in tally.reasons()}


# ---- every format


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Hi", "response": "Hello"}, says("Hi", "Hello")),
        ({"prompt": "Hi", "completion": "Hello", "id": 7}, says("Hi", "Hello")),
        ({"prompt": "Hi", "output": "Hello"}, says("Hi", "Hello")),
        ({"prompt": "Hi", "answer": "Hello", "response": None}, says("Hi", "Hello")),
        ({"question": "Hi", "answer": "Hello"}, says("Hi", "Hello")),
        ({"question": "Hi", "response": "Hello"}, says("Hi", "Hello")),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, says("Add\n1 2", "3")),
        ({"instruction": "Add", "input": " ", "output": "3"}, says("Add", "3")),
        ({"instruction": "Add", "input": None, "response": "3", "text": "x"}, says("Add", "3")),
        (
            {"system": "S", "history": [["a", "b"], ["c", "d"]], "instruction": "e", "output": "f"},
            system("S") + says("a", "b", "c", "d", "e", "f"),
        ),
        ({"prompt": "P", "prompt_id": "x", "messages": says("Hi", "Hello")}, says("Hi", "Hello")),
        (
            {"messages": system("S") + says("a", "b", "c", "d")},
            system("S") + says("a", "b", "c", "d"),
        ),
        ({"messages": system("  ") + says("a", "b")}, says("a", "b")),
        ({"messages": says("a", "b", "c")}, says("a", "b")),
        ({"messages": replies("a", "b")}, replies("a")),
        ({"conversations": shared_gpt("a", "b", "c", "d")}, says("a", "b", "c", "d")),
        ({"conversations": shared_gpt("a", "b"), "system": "S"}, system("S") + says("a", "b")),
        ({"conversations": shared_gpt("a", "b", roles=("Prompter", "ChatGPT"))}, says("a", "b")),
        ({"conversation": shared_gpt("a", "b", roles=("user", "bot"))}, says("a", "b")),
        (
            {"conversations": [{"from": "system", "value": "S"}, *shared_gpt("a", "b")]},
            system("S") + says("a", "b"),
        ),
        ({"dialog": says("a", "b")}, says("a", "b")),
        (says("a", "b"), says("a", "b")),
        ({"prompt": says("a"), "completion": replies("b")}, says("a", "b")),
        (
            {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "response": "d"},
            says("a", "b", "c", "d"),
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                    },
                    {"role": "assistant", "content": "c", "name": "x"},
                ]
            },
            says("ab", "c"),
        ),
        (
            {"prompt": " a\r\nb\rc\x00\x1b[1m\x9b ", "response": "\tx\ty\n"},
            says("a\nb\nc[1m", "x\ty"),
        ),
        (
            {"prompt": "say <|im_end|></s>", "response": "<s> é 漢 \U0001f600"},
            says("say <|im_end|></s>", "<s> é 漢 \U0001f600"),
        ),
    ],
)
def test_a_conversation_of_every_format(tmp_path, row, expected):
    assert read_chats(write(tmp_path / "rows.jsonl", row)) == [{"messages": expected}]


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, says("q"), "a", "b"),
        (
            {"question": "q", "system": "S", "chosen": "a", "rejected": "b"},
            system("S") + says("q"),
            "a",
            "b",
        ),
        (
            {"instruction": "q", "input": "i", "chosen": "a", "rejected": "b", "score": 3},
            says("q\ni"),
            "a",
            "b",
        ),
        (
            {"prompt": system("S") + says("q"), "chosen": "a", "rejected": "b"},
            system("S") + says("q"),
            "a",
            "b",
        ),
        (
            {"prompt": says("q"), "chosen": replies("a"), "rejected": replies("b")},
            says("q"),
            "a",
            "b",
        ),
        (
            {
                "prompt": "q",
                "chosen": {"role": "assistant", "content": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            says("q"),
            "a",
            "b",
        ),
        (
            {
                "conversations": shared_gpt("q"),
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": "b",
            },
            says("q"),
            "a",
            "b",
        ),
        ({"chosen": says("q", "a"), "rejected": says("q", "b")}, says("q"), "a", "b"),
        (
            {"chosen": says("q", "x", "r", "a"), "rejected": says("q", "x", "r", "b")},
            says("q", "x", "r"),
            "a",
            "b",
        ),
        (
            {"prompt": "q", "chosen": says("q", "a"), "rejected": says("q", "b")},
            says("q"),
            "a",
            "b",
        ),
        (
            {
                "prompt": "q",
                "messages": says("q", "a"),
                "chosen": system("S") + says("q", "a"),
                "rejected": system("S") + says("q", "b"),
            },
            system("S") + says("q"),
            "a",
            "b",
        ),
        (
            {"prompt": "p", "chosen": replies("x", "q", "a"), "rejected": replies("x", "q", "b")},
            says("p", "x", "q"),
            "a",
            "b",
        ),
        (
            {
                "chosen": "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant: a",
                "rejected": "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant: b",
            },
            says("q", "x", "r"),
            "a",
            "b",
        ),
        (
            {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " a", "rejected": " b"},
            says("q"),
            "a",
            "b",
        ),
    ],
)
def test_a_pair_of_every_format(tmp_path, row, prompt, chosen, rejected):
    (pair,) = read_pairs(write(tmp_path / "rows.jsonl", row))
    assert pair["prompt"] == prompt
    assert pair["chosen"] == replies(chosen)
    assert pair["rejected"] == replies(rejected)


def test_answers_of_several_turns_part_where_the_dialogues_do(tmp_path):
    row = {"chosen": says("q", "a"), "rejected": says("q", "a", "r", "b")}
    (pair,) = read_pairs(write(tmp_path / "rows.jsonl", row))
    assert pair["prompt"] == says("q")
    assert pair["chosen"] == replies("a")
    assert pair["rejected"] == replies("a", "r", "b")


# ---- every kind of file

ROW, CHAT = {"prompt": "q", "response": "a"}, {"messages": says("q", "a")}


@pytest.mark.parametrize(
    ("name", "text", "count"),
    [
        (
            "a.jsonl",
            '{"prompt": "q", "response": "a"}\n{"prompt": "q", "response": "a"}',
            2,
        ),  # no last newline
        (
            "a.jsonl",
            '\ufeff{"prompt": "q", "response": "a"}\r\n\r\n{"prompt": "q", "response": "a"}\r\n',
            2,
        ),
        ("a.json", '[{"prompt": "q", "response": "a"}, {"prompt": "q", "response": "a"}]', 2),
        (
            "a.json",
            '\ufeff\n [\n{"prompt": "q", "response": "a"}\n,\n{"prompt": "q",\n "response": "a"}\n]\n',
            2,
        ),
        ("a.json", '{"prompt": "q",\n"response": "a"}\n', 1),
        ("a.json", '{\n"prompt": "q",\n"response": "a"}\n', 1),
        (
            "a.json",
            '{"prompt": "q", "response": "a"}\n{"prompt": "q", "response": "a"}\n',
            2,
        ),  # a lying name
        (
            "a.jsonl",
            '[{"prompt": "q", "response": "a"},\n{"prompt": "q", "response": "a"}]\n',
            2,
        ),  # the other
        ("a.jsonl", '[\n{"prompt": "q", "response": "a"}\n]\n', 1),
        ("a.jsonl", '[{"prompt": "q", "response": "a"}]\n', 1),
        ("a.jsonl", json.dumps(says("q", "a")) + "\n" + json.dumps(says("q", "a")) + "\n", 2),
        ("a.json", json.dumps([says("q", "a"), says("q", "a")]), 2),
        ("a.txt", '{"prompt": "q", "response": "a"}\n', 1),
        ("a", '[{"prompt": "q", "response": "a"}]', 1),
        ("a.csv", 'id,prompt,response\n1,q,a\n2,"q",a\n', 2),
    ],
)
def test_lists_and_lines_are_told_apart_by_their_content(tmp_path, name, text, count):
    (tmp_path / name).write_bytes(text.encode())
    assert read_chats(tmp_path / name) == [CHAT] * count


@pytest.mark.parametrize(
    ("suffix", "opener"), [("gz", gzip.open), ("bz2", bz2.open), ("xz", lzma.open)]
)
def test_compressed_files_are_read(tmp_path, suffix, opener):
    path = tmp_path / f"rows.jsonl.{suffix}"
    with opener(path, "wb") as file:
        file.write(json.dumps(ROW).encode() + b"\n")
    assert read_chats(path) == [CHAT]


def test_a_folder_and_a_glob_are_read_in_order(tmp_path):
    write(tmp_path / "b.jsonl", {"prompt": "q", "response": "2"})
    write(tmp_path / "a.jsonl", {"prompt": "q", "response": "1"})
    (tmp_path / "notes.txt").write_text("not rows")
    for path in (tmp_path, f"{tmp_path}/*.jsonl"):
        assert [row["messages"][1]["content"] for row in read_chats(path)] == ["1", "2"]


# ---- rows that cannot be used

GOOD = [{"prompt": f"q{number}", "response": "a"} for number in range(100)]
DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("line", "reason", "told"),
    [
        (DEEP, "too-deep", ""),
        ('{"prompt": ' + DEEP, "too-deep", ""),
        ('{"prompt": "q", "response": NaN}', "not-a-number", ""),
        (
            '{"prompt": "q", "response": "\\ud800"}',
            "bad-unicode",
            '"response" holds a lone surrogate',
        ),
        ("{nothing", "not-json", ""),
        (b'{"prompt": "\xff"}', "not-utf-8", ""),
        ('{"prompt": 1' + "0" * 5000 + "}", "not-json", ""),
        ("7", "not-an-object", "a row must be an object, got a number"),
        ('"text"', "not-an-object", "got a string"),
        ("null", "not-an-object", "got null"),
        ("[]", "empty", "the list"),
        ("{}", "missing-field", 'missing "prompt" (or "messages", ...) among no fields at all'),
        ({"text": "x"}, "missing-field", 'missing "prompt" (or "messages", ...) among text'),
        ({"\x1b[2J": "x"}, "missing-field", "among ?[2J"),
        ({"response": "a"}, "missing-field", 'missing "prompt"'),
        ({"prompt": "q"}, "missing-field", 'missing "response"'),
        ({"instruction": "q"}, "missing-field", 'missing "output"'),
        ({"question": "q"}, "missing-field", 'missing "answer"'),
        (
            {"prompt": "q", "response": None},
            "not-a-string",
            '"response" must be a string or messages, got null',
        ),
        (
            {"prompt": 3, "response": "a"},
            "not-a-string",
            '"prompt" must be a string or messages, got a number',
        ),
        ({"prompt": True, "response": "a"}, "not-a-string", "got true or false"),
        (
            {"prompt": "q", "response": [1]},
            "not-messages",
            '"response" message 1 must be an object, got a number',
        ),
        ({"prompt": "q", "response": " \x00\n"}, "empty", '"response" is empty'),
        ({"prompt": "", "response": "a"}, "empty", '"prompt" is empty'),
        ({"prompt": "q", "response": "a", "system": 5}, "not-a-string", '"system" must be'),
        (
            {"prompt": "q", "response": "a", "history": ["x"]},
            "not-messages",
            '"history" must be a list of',
        ),
        ({"messages": []}, "empty", '"messages" is empty'),
        ({"messages": says("q")}, "no-answer", "no message of the assistant"),
        ({"messages": system("S")}, "no-answer", ""),
        ({"messages": "text"}, "no-answer", ""),
        (
            {"messages": [{"role": "root", "content": "x"}]},
            "unknown-role",
            "message 1: role must be system, user or",
        ),
        ({"messages": [{"content": "x"}]}, "unknown-role", "got null"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown-role", "got a list"),
        (
            {"messages": [*says("q"), {"role": "assistant"}]},
            "not-a-string",
            "message 2: content must be a string",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "not-a-string",
            "a part that is no text",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            "preference-pair",
            "which are for dpo.py",
        ),
    ],
)
@pytest.mark.parametrize("place", [0, 7])
def test_an_unusable_row_is_counted_with_line_and_field(tmp_path, line, reason, told, place):
    tally = Tally()
    rows = read_chats(write(tmp_path / "rows.jsonl", *GOOD[:place], line, *GOOD[place:]), tally)
    assert len(rows) == len(GOOD)
    assert reasons(tally) == {reason: 1}
    (example,) = tally.dropped["read"][reason]["examples"]
    assert example.startswith(f"{tmp_path}/rows.jsonl line {place + 1}")
    assert told in example
    assert example.isprintable()
    assert (tally.bad_rows, tally.documents, tally.kept) == (1, 100, 100)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": "a"}, "missing-field"),
        ({"prompt": "q", "rejected": "a"}, "missing-field"),
        ({"chosen": "a", "rejected": "b"}, "missing-field"),
        ({"chosen": replies("a"), "rejected": replies("b")}, "missing-field"),
        ({"chosen": says("q", "a"), "rejected": says("r", "b")}, "missing-field"),
        (
            {"chosen": says("q", "a", "r", "b"), "rejected": says("q", "a", "s", "b")},
            "prompts-differ",
        ),
        ({"prompt": "q", "chosen": says("x"), "rejected": "b"}, "prompts-differ"),
        ({"prompt": "q", "chosen": None, "rejected": "b"}, "not-a-string"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "empty"),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: r\n\nAssistant: b"},
            "prompts-differ",
        ),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant:", "rejected": "\n\nHuman: q\n\nAssistant: b"},
            "empty",
        ),
        ({"chosen": "\n\nHuman: q", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "missing-field"),
        ({"chosen": "q\n\nAssistant: a", "rejected": "q\n\nAssistant: b"}, "not-messages"),
        (
            {
                "chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: x",
                "rejected": "\n\nHuman: q\n\nAssistant: b",
            },
            "no-answer",
        ),
        (["chosen", "rejected"], "not-an-object"),
    ],
)
def test_an_unusable_pair_is_counted(tmp_path, row, reason):
    tally, good = Tally(), {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert len(read_pairs(write(tmp_path / "rows.jsonl", *[good] * 50, row), tally)) == 50
    assert reasons(tally) == {reason: 1}
    assert "line 51" in tally.dropped["read"][reason]["examples"][0]


def test_equal_answers_are_dropped_and_counted_however_many(tmp_path):
    equal, good = ({"prompt": "q", "chosen": "a", "rejected": text} for text in (" a\r\n", "b"))
    tally = Tally()
    assert len(read_pairs(write(tmp_path / "rows.jsonl", equal, good, equal), tally)) == 1
    assert reasons(tally) == {"identical-pair": 2}
    assert (tally.bad_rows, tally.documents, tally.kept) == (0, 3, 1)
    with pytest.raises(UserError, match=r"0 usable rows of 1: 1 identical-pair \(.*line 1\)"):
        read_pairs(write(tmp_path / "rows.jsonl", equal))


def test_too_many_unusable_rows_are_an_error_that_lists_them(tmp_path):
    bad = [{"prompt": "q"}] * 5 + ["nothing"]
    path = write(tmp_path / "rows.jsonl", *bad, *GOOD[:94])
    with pytest.raises(UserError) as caught:
        read_chats(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: 6 of 100 rows are unusable (6.0%, allowed 5.0%): ")
    assert '5 missing-field (line 1: missing "response"); 1 not-json (line 6)' in text
    assert text.count(str(path)) == 1
    assert len(read_chats(path, max_bad=0.06)) == 94
    write(path, *bad[:5], *GOOD[:95])  # exactly 5 %
    assert len(read_chats(path)) == 95


@pytest.mark.parametrize(
    ("read", "row", "told"),
    [
        (
            read_chats,
            {"frage": "q", "antwort": "a"},
            'missing "prompt" (or "messages", ...) among frage, antwort; ',
        ),
        (read_chats, {"prompt": "q", "reply": "a"}, 'missing "response" among prompt, reply; '),
        (
            read_pairs,
            {"frage": "q", "gut": "a", "schlecht": "b"},
            'missing "chosen" among frage, gut, schlecht; ',
        ),
    ],
)
def test_fields_of_other_names_are_told_with_ours_and_a_renamed_file_is_read(
    tmp_path, read, row, told
):
    path = write(tmp_path / "rows.jsonl", row)
    remedy = (
        "rename its fields: prompt (instruction, question) and response (completion, output, answer), or "
        "messages (conversations, conversation, dialogue, dialog); in a pair prompt, chosen and rejected"
    )
    with pytest.raises(UserError) as caught:
        read(path)
    assert (
        str(caught.value) == f"{path}: 0 usable rows of 1: 1 missing-field (line 1: {told}{remedy})"
    )
    ours = ("prompt", "response") if read is read_chats else ("prompt", "chosen", "rejected")
    assert len(read(write(path, dict(zip(ours, row.values(), strict=True))))) == 1


def test_rows_of_the_other_training_and_folders_of_models_are_named(tmp_path):
    with pytest.raises(UserError, match=r'missing "chosen"; conversations are for sft\.py'):
        read_pairs(write(tmp_path / "chats.jsonl", ROW))
    with pytest.raises(UserError, match=r"1 preference-pair \(line 1: .*for dpo.py\)$"):
        read_chats(write(tmp_path / "pairs.jsonl", {"prompt": "q", "chosen": "a", "rejected": "b"}))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="the folder of a model"):
        read_chats(tmp_path)


def test_a_spreadsheet_may_part_fields_by_semicolons(tmp_path):
    (tmp_path / "faq.csv").write_text(
        "prompt;response\nWas, bitte?;Ja; so\nq;a\n".replace("Ja; so", '"Ja; so"')
    )
    told = [[m["content"] for m in chat["messages"]] for chat in read_chats(tmp_path / "faq.csv")]
    assert told == [["Was, bitte?", "Ja; so"], ["q", "a"]]


def test_a_tally_may_serve_several_files(tmp_path):
    tally = Tally()
    read_chats(write(tmp_path / "a.jsonl", *GOOD[:5], "x"), tally, max_bad=1)
    read_chats(write(tmp_path / "b.jsonl", *GOOD), tally)  # whose share of bad rows is 0
    assert (tally.documents, tally.kept, tally.bad_rows) == (105, 105, 1)


def test_a_list_with_a_bad_element_goes_on(tmp_path):
    text = json.dumps([*GOOD[:3], {"prompt": "q"}, *GOOD[3:40]])
    tally = Tally()
    (tmp_path / "rows.json").write_text(text[:-1] + ', {"prompt": NaN}]')
    assert len(read_chats(tmp_path / "rows.json", tally)) == 40
    assert reasons(tally) == {"missing-field": 1, "not-a-number": 1}
    assert "element 4" in tally.dropped["read"]["missing-field"]["examples"][0]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("empty.jsonl", b"", "0 usable rows of 0: it is empty"),
        ("blank.jsonl", b"\n \n", "0 usable rows of 0"),
        ("list.json", b"[]", "0 usable rows of 0"),
        ("open.json", b"[", "a JSON list that breaks off after 0 elements"),
        (
            "cut.json",
            json.dumps([ROW] * 9)[:-20].encode(),
            "a JSON list that breaks off after 8 elements",
        ),
        (
            "unclosed.json",
            json.dumps([ROW] * 9)[:-1].encode(),
            "a JSON list that breaks off after 9 elements",
        ),
        ("binary.jsonl", bytes(range(256)) * 20, "0 usable rows"),
        ("nul.jsonl", b"\0" * 5000, "0 usable rows"),
        ("deep.json", DEEP.encode(), "a JSON list that breaks off after 0 elements"),
        (
            "two.json",
            b"[\n%s\n]\n" % json.dumps(ROW).encode() * 2,
            "with more text behind it after 1 elements",
        ),
        (
            "cut.jsonl.gz",
            gzip.compress(b'{"prompt": "q"}\n' * 9999, mtime=0)[:80],
            "cannot be read",
        ),
        ("plain.jsonl.gz", b'{"prompt": "q", "response": "a"}\n', "cannot be read"),
        ("rows.parquet", b"PAR1", "cannot be read: damaged"),
        ("bomb.jsonl.gz", gzip.compress(b"x" * (70 << 20)), "decompresses to over"),
    ],
)
def test_a_file_of_no_use_is_one_line(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told) as caught:
        read_chats(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match=r"none.jsonl: not found; give a file of rows"):
        read_pairs(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="holds no file"):
        read_pairs(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.md").write_text("x")
    with pytest.raises(UserError, match=r"holds no file of rows: .jsonl, .json, .csv"):
        read_pairs(tmp_path)


def test_a_line_over_the_limit_is_dropped_and_long_contents_pass(tmp_path):
    """Not timed here: a quadratic search would take minutes, which is the alarm."""
    tally = Tally()
    long = {
        "prompt": "a" * 500_000 + "\n\nHuman:" * 50_000,
        "response": "<" * 500_000 + " " * 500_000 + ".",
    }
    rows = read_chats(
        write(tmp_path / "rows.jsonl", '{"prompt": "' + "x" * (17 << 20), *GOOD, long), tally
    )
    assert len(rows) == 101
    assert reasons(tally) == {"line-over-16-MiB": 1}


# ---- anything at all

NAMES = [
    "prompt",
    "response",
    "messages",
    "conversations",
    "role",
    "content",
    "from",
    "value",
    "input",
    "output",
]
NAMES += [
    "chosen",
    "rejected",
    "system",
    "history",
    "instruction",
    "type",
    "text",
    "user",
    "assistant",
    "gpt",
]
WORDS = st.one_of(
    st.sampled_from(["", "a", "b", "\n\nHuman: a\n\nAssistant: b", *NAMES]), st.text(max_size=5)
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), WORDS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5)
    ),
    max_leaves=12,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": WORDS}
)
FIELD = st.one_of(WORDS, st.lists(MESSAGE, max_size=4), VALUES)
ROWS = st.one_of(VALUES, st.dictionaries(st.sampled_from(NAMES), FIELD, max_size=6))


def sound(messages):
    return messages and all(
        m.keys() == {"role", "content"}
        and m["role"] in ("system", "user", "assistant")
        and m["content"].strip()
        for m in messages
    )


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=4), as_list=st.booleans())
def test_junk_never_crashes_and_what_comes_out_is_sound(
    tmp_path_factory, tiny_tokenizer, rows, as_list
):
    path = tmp_path_factory.getbasetemp() / "junk.jsonl"
    if as_list:
        path.write_text(json.dumps(rows))
    else:
        write(path, *map(json.dumps, rows))
    for read in (read_chats, read_pairs):
        tally = Tally()
        try:
            found = read(path, tally, max_bad=1)
        except UserError:
            assert tally.kept == 0
            continue
        assert tally.kept == len(found)
        for row in found:
            if read is read_chats:
                assert sound(row["messages"])
                assert row["messages"][-1]["role"] == "assistant"
                render(tiny_tokenizer, row["messages"], "chatml")
            else:
                assert all(map(sound, row.values()))
                assert row["chosen"][0]["role"] == row["rejected"][0]["role"] == "assistant"
                assert row["chosen"] != row["rejected"]


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1).filter(
    lambda text: text.strip() and "Human:" not in text
)


@settings(max_examples=100, deadline=None)
@given(turns=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), other=TEXTS)
def test_the_same_dialogue_in_every_format_reads_the_same(tmp_path_factory, turns, other):
    words = [word.strip() for turn in turns for word in turn]
    *earlier, (question, answer) = turns
    rows = [
        {"messages": says(*words)},
        {"conversations": shared_gpt(*words)},
        says(*words),
        {"instruction": question, "output": answer, "history": earlier},
        {"prompt": says(*words[:-1]), "completion": answer},
        {
            "prompt": "".join(f"\n\nHuman: {q}\n\nAssistant: {a}" for q, a in earlier)
            + f"\n\nHuman: {question}\n\nAssistant:",
            "response": answer,
        },
    ]
    path = tmp_path_factory.getbasetemp() / "same.jsonl"
    assert read_chats(write(path, *rows)) == [{"messages": says(*words)}] * len(rows)


# ---- inspect


def inspect(*args):
    done = subprocess.run(
        [python(), "data.py", "inspect", *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    return done


def test_inspect_conversations(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save(tmp_path / "model", 64, template="instruct")
    rows = [
        {"prompt": "Hi \u6f22", "response": "Hello"},
        {"conversations": shared_gpt("a", "b")},
        {"prompt": 5},
    ]
    path = write(tmp_path / "rows.jsonl", *rows, *GOOD)
    done = inspect(path)
    assert done.returncode == 0, done.stderr
    for line in (
        "101  prompt/response",
        "1  ShareGPT",
        "102  usable of 103 rows",
        "as chatml; in [ ]:",
    ):
        assert line in done.stdout
    assert (
        f'-1  not-a-string, first: {path} line 3: "prompt" must be a string or messages, got'
        in done.stdout
    )
    assert (
        "[<|im_start|>user\nHi \u6f22\n<|im_end|>\n<|im_start|>assistant\n]Hello\n<|im_end|>"
        in done.stdout
    )
    assert "tokens" not in done.stdout
    done = inspect(path, f"--tokenizer_path={tmp_path / 'model'}")
    assert "[<s>### Instruction:\nHi \u6f22\n\n### Response:\n]Hello</s>" in done.stdout
    learned = next(line for line in done.stdout.splitlines() if "of them learned" in line)
    per_row = len(tiny_tokenizer.encode("a")) + 1
    assert learned.split()[4:6] == [str(per_row)] * 2
    done = inspect(
        "--template", "chat", "--tokenizer_path", tmp_path / "model", path
    )  # the path last
    assert (
        "[<s>Human: Hi \u6f22\n\nAssistant:] Hello</s>" in done.stdout
    )  # the space is the model's to write


def test_inspect_pairs(tmp_path):
    row = {"chosen": says("q", "x", "r", "a"), "rejected": says("q", "x", "r", "b")}
    done = inspect(
        write(tmp_path / "rows.jsonl", row, {"prompt": "q", "chosen": "a", "rejected": "a"})
    )
    assert done.returncode == 0
    assert "preference pairs" in done.stdout
    assert "1  chosen, rejected\n" in done.stdout
    assert "-1  identical-pair" in done.stdout
    opening = "[<|im_start|>user\nq\n<|im_end|>\n<|im_start|>assistant\n]"
    assert opening not in done.stdout  # the earlier answer is not learned
    assert "<|im_start|>assistant\n]a\n<|im_end|>" in done.stdout
    assert "<|im_start|>assistant\n]b\n<|im_end|>" in done.stdout


def test_what_is_dimmed_is_what_the_mask_leaves_out(tiny_tokenizer):
    messages = says("q", "x", "r", "a")
    for start, template in (
        (0, "chatml"),
        (3, "chatml"),
        (3, "instruct"),
        (3, "chat"),
        (0, "chat"),
    ):
        ids, mask = tokens_of(messages, start, tiny_tokenizer, template)
        pieces = rendered(messages, start, tiny_tokenizer, template)
        learned = tiny_tokenizer.decode([id for id, bit in zip(ids, mask) if bit], controls=True)
        assert "".join(text for text, is_learned in pieces if is_learned) == learned
        assert "".join(text for text, _ in pieces) == tiny_tokenizer.decode(ids, controls=True)
        assert ("x" in learned) == (start == 0)
    assert marked([("q", False), ("a", True)], terminal=True) == "\x1b[2mq\x1b[22ma"
    assert len(marked([("q" * 10**6, True)], terminal=False)) < 2100


def test_inspect_shows_a_mostly_unusable_file_and_then_refuses_it(tmp_path):
    done = inspect(write(tmp_path / "rows.jsonl", ROW, "x", "x"))
    assert done.returncode == 2
    assert "1  usable of 3 rows" in done.stdout
    assert done.stderr.startswith("error: ")
    assert "2 of 3 rows are unusable, more than 5%: training refuses it" in done.stderr


def test_inspect_a_source_of_text(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "First."}\n{"text": "Second."}\n3\n')
    done = inspect(tmp_path / "rows.jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2  documents in all" in done.stdout
    assert "-1  not-an-object, first: " in done.stdout
    assert done.stdout.endswith("First.\n")
    (tmp_path / "odd.csv").write_text("a,b\nsome words,others\n")
    done = inspect(tmp_path / "odd.csv", "--text_column=b")
    assert done.stdout.endswith("others\n"), done.stderr
    (tmp_path / "page.html").write_text("<p>Only <b>words</b></p>")
    assert inspect(tmp_path / "page.html").stdout.endswith("Only words\n")
    (tmp_path / "empty.txt").write_text("")
    done = inspect(tmp_path / "empty.txt")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "0 usable documents" in done.stderr


def test_rows_come_from_parquet_too(tmp_path):
    table = pytest.importorskip("pyarrow").table({"prompt": ["q"], "response": ["a"]})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "rows.parquet")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert read_chats(tmp_path / "rows.parquet") == [{"messages": messages}]


def test_inspect_a_prepared_dataset(tmp_path, tiny_documents, tiny_tokenizer):
    folder = prepare_dataset(tmp_path / "tiny", tiny_documents)
    manifest = json.loads((folder / "manifest.json").read_text())
    done = inspect(folder)
    assert done.returncode == 0, done.stderr
    totals = manifest["totals"]
    for split in ("train", "val"):
        line = next(line for line in done.stdout.splitlines() if line.startswith(f"  {split} "))
        assert line.split()[1] == f"{totals[split]['documents']:,}"
        assert line.split()[3] == f"{totals[split]['tokens']:,}"
    assert manifest["tokenizer_sha256"] in done.stdout
    assert f"{folder}.jsonl" in done.stdout
    size, tokens = (sum(totals[split][key] for split in totals) for key in ("bytes", "tokens"))
    assert f"bytes per token  {size / tokens:.2f}" in done.stdout
    assert "shown):\n<s>" in done.stdout
    tiny_tokenizer.save(tmp_path / "other", 64)
    done = inspect(folder, "--tokenizer_path", tmp_path / "other")
    assert done.returncode == 2
    assert manifest["tokenizer_sha256"] in done.stderr
    assert tiny_tokenizer.sha256 in done.stderr
    shard = folder / "train_00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    done = inspect(folder)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: shard {shard}:")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], "inspect needs a path: python data.py inspect PATH"),
        (["none.jsonl"], "none.jsonl: not found"),
        (["data.py"], "0 usable rows of"),
        (["configs/tiny.json"], "0 usable rows of 1: 1 missing-field"),
        (["tests"], "tests: holds no file"),
        (["data.py", "--template=chtml"], "template must be one of chatml, instruct, chat"),
        (["data.py", "--tokenizer_path=none"], "none: No such file"),
    ],
)
def test_inspect_of_a_mistake_is_one_line(args, told):
    done = inspect(*args)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_misspelled_command_is_named():
    done = subprocess.run(
        [python(), "data.py", "inspekt"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "error: unknown command 'inspekt'; did you mean inspect?\n"


# ---- real files


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
@pytest.mark.parametrize(
    ("path", "count", "dropped"),
    [
        ("sft/gpteacher_roleplay.jsonl", 1548, {}),
        ("sft/gsm8k_train.jsonl.gz", 5962, {}),
        ("sft/lfs_instruction_1100.jsonl", 890, {}),
        ("sft/self_instruct_seed_175.jsonl", 131, {}),
        ("sft/wordnet_definitions_20k.jsonl.gz", 15999, {}),
        ("dpo/gsm8k_correct_vs_wrong.jsonl", 938, {}),
        ("dpo/lfs_preference_1100.jsonl", 877, {"identical-pair": 3}),
    ],
)
def test_real_files_lose_no_row_but_these(path, count, dropped):
    tally = Tally()
    read = read_pairs if path.startswith("dpo") else read_chats
    assert len(read(SHARED / path, tally)) == count
    assert reasons(tally) == dropped
