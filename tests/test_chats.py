"""Rows of every format, well formed and not, and what `inspect` says of them."""

import gzip
import json
import re
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from corpus import chats
from corpus.chats import read_chats, read_pairs, to_chat, to_pair
from corpus.inspect import Characters, InspectConfig, inspect, marked
from corpus.report import Tally, reasons_of
from corpus.sources import usable_rows
from lib.config import UserError
from lib.conversation import dialogues, render
from tests import ROOT, SHARED
from tests.conftest import prepare_dataset


def says(*turns, first="user"):
    """Messages of user and assistant in turn."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]


def replies(*turns):
    return says(*turns, first="assistant")


def system(text):
    return [{"role": "system", "content": text}]


def sharegpt(*turns, roles=("human", "gpt")):
    return [{"from": roles[number % 2], "value": turn} for number, turn in enumerate(turns)]


def hh(*turns):
    """A transcript as hh-rlhf writes it, from the user's first turn on."""
    return "".join(f"\n\n{('Human', 'Assistant')[n % 2]}:{turn}" for n, turn in enumerate(turns))


def write(path, *rows):
    """Writes rows as JSON Lines; a row of type str or bytes is a line as it stands."""
    with open(path, "wb") as file:
        for row in rows:
            line = json.dumps(row) if not isinstance(row, str | bytes) else row
            file.write((line.encode() if isinstance(line, str) else line) + b"\n")
    return path


def reasons(tally):
    return {reason: count for _, reason, count, _ in reasons_of(tally.dropped)}


# ---- every format: each name and each shape of the tables has an example here


def node(role, parent, *parts, kind="text"):
    """A node of a ChatGPT export."""
    content = {"content_type": kind, "parts": list(parts)}
    return {
        "message": {"author": {"role": role}, "content": content, "weight": 1.0},
        "parent": parent,
    }


NODES = {
    "a": {"message": None, "parent": None},
    "b": node("system", "a", ""),
    "c": node("user", "b", "a"),
    "old": node("assistant", "c", "regenerated"),
    "d": node("assistant", "c", kind="thoughts"),
    "e": node("user", "d", kind="user_editable_context"),
    "f": node("assistant", "e", "b"),
}
BRANCHES = {
    "1": {"parentId": None} | says("a")[0],
    "2": {"parentId": "1"} | replies("old")[0],
    "3": {"parentId": "1"} | replies("b")[0],
}
TREE = {"role": "prompter", "text": "a", "replies": [
    {"role": "assistant", "text": text, "rank": rank, "replies": []}
    for text, rank in (("worse", 1), ("b", 0), ("x", None))]}  # fmt: skip
NUMPY = """[{'role': 'user', 'content': "it's } {"}\n {'role': 'assistant', 'content': 'b'}]"""
LLAMA = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>".format
VICUNA = "A chat between a curious user and an artificial intelligence assistant."
ZERO = {"weight": 0}
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
CHATS = [
    ({"prompt": "Hi", "response": "Hello"}, says("Hi", "Hello")),
    ({"prompt": "Hi", "completion": "Hello", "id": 7}, says("Hi", "Hello")),
    ({"prompt": "Hi", "answer": "Hello", "response": None}, says("Hi", "Hello")),
    ({"question": "Hi", "answer": "Hello"}, says("Hi", "Hello")),
    ({"instruction": "Add", "input": "1 2", "output": "3"}, says("Add\n1 2", "3")),
    ({"instruction": "Add", "input": " ", "output": "3"}, says("Add", "3")),
    ({"question": "Add", "context": ["1", "2"], "answer": "3"}, says("Add\n1\n2", "3")),
    ({"instruction": "Add", "input": None, "response": "3", "text": "x"}, says("Add", "3")),
    ({"system": "S", "history": [["a", "b"], ["c", "d"]], "instruction": "e", "output": "f"},
     system("S") + says("a", "b", "c", "d", "e", "f")),
    ({"prompt": "P", "prompt_id": "x", "messages": says("Hi", "Hello")}, says("Hi", "Hello")),
    ({"messages": system("S") + says("a", "b", "c")}, system("S") + says("a", "b")),
    ({"messages": system("  ") + says("a", "b")}, says("a", "b")),
    ({"messages": replies("a", "b")}, replies("a")),
    ({"conversations": sharegpt("a", "b", "c", "d")}, says("a", "b", "c", "d")),
    ({"conversations": sharegpt("a", "b"), "system": "S"}, system("S") + says("a", "b")),
    ({"conversations": sharegpt("a", "b", roles=("Prompter", "ChatGPT"))}, says("a", "b")),
    ({"conversations": [{"from": "system", "value": "S"}, *sharegpt("a", "b")]},
     system("S") + says("a", "b")),
    *(({name: says("a", "b")}, says("a", "b")) for name in ("dialogue", "dialog", "chat_messages")),
    (says("a", "b"), says("a", "b")),
    ({"prompt": says("a"), "completion": replies("b")}, says("a", "b")),
    ({"prompt": hh(" a", " b", " c", ""), "response": "d"}, says("a", "b", "c", "d")),
    ({"messages": [{"role": "user", "content": PARTS}, replies("c")[0] | {"name": "x"}]},
     says("ab", "c")),
    ({"prompt": " a\r\nb\rc\x00\x1b[1m\x9b ", "response": "\tx\ty\n"}, says("a\nb\nc[1m", "x\ty")),
    *(({name: "Hi", "response": "Hello"}, says("Hi", "Hello"))
      for name in ("query", "user", "human", "input", "inputs", "problem")),
    *(({"prompt": "Hi", name: "Hello"}, says("Hi", "Hello"))
      for name in ("assistant", "gpt", "bot", "answers", "output", "targets", "solution")),
    ({"Prompt": "a", "System Prompt": "S", "Response ": "b"}, system("S") + says("a", "b")),
    *(({"prompt": "Hi", "answer": value}, says("Hi", text))
      for value, text in ((7, "7"), (0.5, "0.5"), (False, "false"), ("[]", "[]"))),
    ({"instruction": "", "input": "Hi", "output": "Hello"}, says("Hi", "Hello")),
    ({"instruction": "Add", "context": "1 2", "response": "3"}, says("Add\n1 2", "3")),
    ({"system_prompt": "S", "question": "a", "response": "b"}, system("S") + says("a", "b")),
    ({"system_message": "S", "messages": says("a", "b")}, system("S") + says("a", "b")),
    ({"system": "S", "messages": system("S") + says("a", "b")}, system("S") + says("a", "b")),
    ({"question": "a", "context": "c", "answers": {"text": ["b", "x"], "answer_start": [1, 2]}},
     says("a\nc", "b")),
    ({"question": "a", "answers": "['b', 'x']"}, says("a", "b")),
    ({"query": "c", "response": "d", "history": [{"user": "a", "assistant": "b"}]},
     says("a", "b", "c", "d")),
    ({"query": "c", "response": "d", "history": "[['a', 'b']]"}, says("a", "b", "c", "d")),
    ({"query": "c", "response": "d", "history": says("a", "b")}, says("a", "b", "c", "d")),
    ({"conversation": [{"human": "a", "assistant": "b"}, {"human": "c"}, {"gpt": "d"}]},
     says("a", "b", "c", "d")),
    *(({"messages": [{name: role, "value": "S"}, *says("a"), {name: other, "parts": ["b"]}]},
       system("S") + says("a", "b"))
      for name, role, other in (("sender", "developer", "ai"), ("speaker", "system", "bot"),
                                ("author", "Developer", "Model "))),
    *(({"messages": [*says("a"), {"role": "assistant", "content": [
        {"type": kind, "text": "x"}, {"type": "text", "value": "b"}]}]}, says("a", "b"))
      for kind in ("thinking", "reasoning", "reasoning_recap")),
    ({"messages": json.dumps(says("a", "b"))}, says("a", "b")),
    ({"prompt": "a", "response": json.dumps(json.dumps(replies("b")))}, says("a", "b")),
    ({"messages": NUMPY}, says("it's } {", "b")),
    ({"prompt": repr(says("a")), "completion": repr(replies("b"))}, says("a", "b")),
    ({"prompt": "a", "completion": repr(says("a", "b"))}, says("a", "b")),
    ({"prompt": "a", "completion": hh(" a", " b")}, says("a", "b")),
    ({"prompt": "Invent one.", "completion": hh(" a", " b").strip()},
     says("Invent one.", hh(" a", " b").strip())),
    ({"prompt": "a", "completion": '{"role": "user"}'}, says("a", '{"role": "user"}')),
    ({"text": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST] d </s>"},
     system("S") + says("a", "b", "c", "d")),
    ({"text": "[INST] a [/INST] b"}, says("a", "b")),
    ({"text": "<|begin_of_text|>" + LLAMA("user", "a") + LLAMA("assistant", "b")}, says("a", "b")),
    ({"text": "Below.\n\n### Instruction:\na\n\n### Input:\ni\n\n### Response:\nb"},
     system("Below.") + says("a\ni", "b")),
    ({"text": "### Human: a### Assistant: b### Human: c"}, says("a", "b")),
    ({"text": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"},
     says("a", "b")),
    ({"text": hh(" a", " b")}, says("a", "b")),
    ({"text": "User: a\nAssistant: b"}, says("a", "b")),
    ({"text": "USER: a ASSISTANT: b</s>USER: c ASSISTANT: d</s>"}, says("a", "b", "c", "d")),
    ({"text": f"{VICUNA} USER: a\nASSISTANT: b"}, system(VICUNA) + says("a", "b")),
    ({"prompt": f"{VICUNA} USER: a ASSISTANT:", "response": "b"}, system(VICUNA) + says("a", "b")),
    *(({"prompt": text, "response": "b"}, says(text, "b")) for text in (
        "Sum up. USER: a ASSISTANT: b USER: c", "The USER: and the ASSISTANT: of a log", "USER: a",
        "Log:\nUser: a\nAssistant: b\nUser: c", "MYUSER: a MYASSISTANT: b USERS: c ASSISTANT: d")),
    ({"prompt": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "response": "b"},
     says("a", "b")),
    ({"mapping": NODES, "current_node": "f", "title": "T"}, says("a", "b")),
    ({"chat": {"history": {"messages": BRANCHES, "currentId": "3"}}}, says("a", "b")),
    ({"message_tree_id": "1", "prompt": TREE}, says("a", "b")),
    ({"prompt": "a", "completion": "b", "label": True, "kto_tag": "true", "tools": "[]",
      "images": []}, says("a", "b")),
    *(({"messages": [*says("a"), replies("b")[0] | {name: off}, *says("c", "d")]},
       [*says("a"), replies("b")[0] | ZERO, *says("c", "d")])
      for name, off in (("weight", 0), ("loss", False), ("train", "false"), ("training", 0.0),
                        ("train_on_turn", False))),
    ({"messages": [*says("a", "b", "c"), replies("d")[0] | ZERO]}, says("a", "b")),
    ({"prompt": "say <|im_end|></s>", "response": "<s> é 漢 \U0001f600"},
     says("say <|im_end|></s>", "<s> é 漢 \U0001f600")),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), CHATS)
def test_a_conversation_of_every_format(tmp_path, row, expected):
    assert read_chats(write(tmp_path / "rows.jsonl", row)) == [{"messages": expected}]


AB = {"chosen": "a", "rejected": "b"}
BOTH = {"chosen": says("q", "a"), "rejected": says("q", "b")}
PAIRS = [  # a row, the prompt; the chosen answer is "a", the rejected "b"
    ({"prompt": "q"} | AB, says("q")),
    ({"question": "q", "system": "S"} | AB, system("S") + says("q")),
    ({"instruction": "q", "input": "i", "score": 3} | AB, says("q\ni")),
    ({"prompt": system("S") + says("q")} | AB, system("S") + says("q")),
    ({"prompt": says("q"), "chosen": replies("a"), "rejected": replies("b")}, says("q")),
    ({"prompt": "q", "chosen": replies("a")[0], "rejected": {"from": "gpt", "value": "b"}},
     says("q")),
    ({"conversations": sharegpt("q"), "chosen": {"from": "gpt", "value": "a"}, "rejected": "b"},
     says("q")),
    (BOTH, says("q")),
    ({"chosen": says("q", "x", "r", "a"), "rejected": says("q", "x", "r", "b")},
     says("q", "x", "r")),
    ({"prompt": "q"} | BOTH, says("q")),
    ({"prompt": "q", "messages": says("q", "a"), "chosen": system("S") + says("q", "a"),
      "rejected": system("S") + says("q", "b")}, system("S") + says("q")),
    ({"prompt": "p", "chosen": replies("x", "q", "a"), "rejected": replies("x", "q", "b")},
     says("p", "x", "q")),
    ({"chosen": hh(" q", " x", " r", " a"), "rejected": hh(" q", " x", " r", " b")},
     says("q", "x", "r")),
    ({"prompt": hh(" q", ""), "chosen": " a", "rejected": " b"}, says("q")),
    ({"prompt": hh(" q", ""), "chosen": hh(" q", " a"), "rejected": hh(" q", " b")}, says("q")),
    ({"system": "S", "prompt": "q"} | BOTH, system("S") + says("q")),
    ({"prompt": "q"} | {side: repr(turns) for side, turns in BOTH.items()}, says("q")),
    ({"instruction": "q", "chosen_response": "a", "rejected_response": "b"}, says("q")),
    ({"question": "q", "response_j": "a", "response_k": "b"}, says("q")),
    ({"prompt": "q", "response_chosen": "a", "response_rejected": "b"}, says("q")),
    ({"instruction": "q", "input": "i", "output": ["a", "b"]}, says("q\ni")),
]  # fmt: skip


@pytest.mark.parametrize(("row", "prompt"), PAIRS)
def test_a_pair_of_every_format(tmp_path, row, prompt):
    (pair,) = read_pairs(write(tmp_path / "rows.jsonl", row))
    assert pair == {"prompt": prompt, "chosen": replies("a"), "rejected": replies("b")}


def test_answers_of_several_turns_part_where_the_dialogues_do(tmp_path):
    row = {"chosen": says("q", "a"), "rejected": says("q", "a", "r", "b")}
    (pair,) = read_pairs(write(tmp_path / "rows.jsonl", row))
    answers = {"chosen": replies("a"), "rejected": replies("a", "r", "b")}
    assert pair == {"prompt": says("q")} | answers


QA, IMAGE = {"prompt": "q", "response": "a"}, {"type": "image_url", "image_url": {"url": "x"}}
PASSED_OVER = [
    *((QA | {name: value}, "not-learned") for name, value in (
        ("label", False), ("kto_tag", "False"), ("weight", 0), ("loss", "false"), ("train", False),
        ("training", 0.0), ("train_on_turn", False))),
    ({"messages": [*says("q"), replies("a")[0] | ZERO]}, "not-learned"),
    *((QA | {name: ["x"]}, "media") for name in (
        "image", "images", "video", "videos", "audio", "audios", "files")),
    *(({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, part]},
                     *replies("a")]}, "media")
      for part in (IMAGE, {"type": "input_image"}, {"image": "x"}, {"type": "input_audio"},
                   {"content_type": "image_asset_pointer"})),
    *((QA | {name: [{"name": "f"}]}, "tools") for name in ("tools", "functions")),
    *(({"messages": [*says("q"), {"role": role, "content": "x"}, *replies("a")]}, "tools")
      for role in ("tool", "function", "function-call", "observation", "tool_call",
                   "tool_response", "ipython")),
    *(({"messages": [*says("q"), {"role": "assistant", "content": "", name: [{}]}]}, "tools")
      for name in ("tool_calls", "function_call")),
    *(({"messages": [*says("q"), {"role": "assistant", "content": [{"type": kind}]}]}, "tools")
      for kind in ("tool_use", "tool_result")),
    *((QA | {name: ["a", "b"]}, "choices") for name in ("choices", "options", "endings")),
    (QA | {"helpfulness": 0}, "rating"),
    ({"question": "q", "context": "c", "answers": {"text": [], "answer_start": []}},
     "empty-answer"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), PASSED_OVER)
def test_a_row_that_is_not_to_be_learned_is_passed_over_and_named(tmp_path, row, reason):
    tally = Tally()
    rows = read_chats(write(tmp_path / "rows.jsonl", *[row] * 20, QA), tally)
    assert (len(rows), reasons(tally), tally.bad_rows) == (1, {reason: 20}, 0)
    assert re.search("line 1: .*['\"]", tally.dropped["filter"][reason]["examples"][0])  # the field


def test_every_name_markup_and_shape_of_the_tables_has_an_example():
    rows = [row for row, _ in [*CHATS, *PAIRS, *PASSED_OVER]]
    text = json.dumps(rows)
    names = {name for names in chats.FIELDS.values() for name in names}
    names |= {name for name in chats.SPEAKERS if name.isidentifier()}
    assert {name for name in names if not re.search(rf"\b{name}\b", text.lower())} == set()
    rules = {to_chat(row)[0].partition(":")[0] for row, _ in CHATS}
    rules |= {to_pair(row)[0].partition(":")[0] for row, _ in PAIRS}
    assert rules == {*chats.CHAT_SHAPES, *chats.PAIR_SHAPES}
    for opens, _ in chats.MARKUPS.values():
        assert any(len(opens.findall(str(row.get("text")))) > 1 for row in rows if "text" in row)


def test_columns_that_nothing_reads_are_named_once(tmp_path):
    rows = [QA | {"id": 0, "tags": [], "note": None, "weight": 0.5, "\x1b[2J": "x"}] * 3
    rows += [{"messages": [*says("q"), replies("a")[0] | {"reasoning_content": "x", "name": ""}]}]
    tally = Tally()
    assert len(read_chats(write(tmp_path / "rows.jsonl", *rows), tally)) == 4
    names = r"id, weight, \x1b[2J, messages.reasoning_content"
    assert tally.lines() == [f"columns not used: {names}"]
    tally.unused = dict.fromkeys(map(str, range(1000)))
    assert re.fullmatch(r"columns not used: 0, 1, .*, \d+,? and more", *tally.lines())


# ---- every kind of file

ROW, CHAT = {"prompt": "q", "response": "a"}, {"messages": says("q", "a")}
LINE, TURNS = json.dumps(ROW), json.dumps(says("q", "a"))


@pytest.mark.parametrize(
    ("name", "text", "count"),
    [
        ("a.jsonl", f"{LINE}\n{LINE}", 2),  # no last newline
        ("a.jsonl", f"\ufeff{LINE}\r\n\r\n{LINE}\r\n", 2),
        ("a.json", f"[{LINE}, {LINE}]", 2),
        ("a.json", f"\ufeff\n [\n{LINE}\n,\n{LINE}\n]\n", 2),
        ("a.jsonl", f"[{LINE}]\n", 1),
        ("a.jsonl", f"{TURNS}\n{TURNS}\n", 2),  # a list of messages is a row
        ("a.json", f"[{TURNS}, {TURNS}]", 2),
        ("a.txt", LINE, 1),
        ("a", f"[{LINE}]", 1),
        ("a.csv", 'id,prompt,response\n1,q,a\n2,"q",a\n', 2),
        ("a.csv", 'prompt;response\nq;"a"\n', 1),  # as spreadsheets write where 1,5 is a number
    ],
)
def test_lists_and_lines_are_told_apart_by_their_content(tmp_path, name, text, count):
    (tmp_path / name).write_bytes(text.encode())
    assert read_chats(tmp_path / name) == [CHAT] * count


# ---- rows that cannot be used

GOOD = [{"prompt": f"q{number}", "response": "a"} for number in range(100)]
DEEP = "[" * 100_000
BAD_CHATS = [
    (DEEP, "not-json", ""),
    ('{"prompt": ' + DEEP, "not-json", ""),
    ('{"prompt": "q", "response": NaN}', "missing-field", "response"),
    ('{"prompt": "q", "response": "\\ud800"}', "bad-unicode", '"response" holds a lone surrogate'),
    ("{nothing", "not-json", ""),
    (b'{"prompt": "\xff"}', "not-utf-8", ""),
    ('{"prompt": 1' + "0" * 5000 + "}", "not-json", ""),
    ("7", "not-an-object", "a row must be an object, got int"),
    ('"text"', "not-an-object", "got str"),
    ("null", "not-an-object", "got NoneType"),
    ("[]", "no-answer", "no message of the assistant"),
    ("{}", "missing-field", 'missing "prompt" among []'),
    ({"\x1b[2J": "x"}, "missing-field", r"among ['\x1b[2J']; rename its fields: "),
    ({"response": "a"}, "missing-field", 'missing "prompt"'),
    ({"prompt": "q"}, "missing-field", 'missing "response"'),
    (QA | {"response": None}, "missing-field", 'missing "response"'),
    (QA | {"prompt": 3}, "not-a-string", '"prompt" must be a string or messages, got int'),
    (QA | {"response": [1]}, "not-messages", '"response" message 1 must be an object, got int'),
    (QA | {"response": " \x00\n"}, "empty", '"response" is empty'),
    (QA | {"prompt": ""}, "empty", '"prompt" is empty'),
    (QA | {"system": 5}, "not-a-string", '"system" must be'),
    (QA | {"history": ["x"]}, "not-messages", '"history" message 1 must be an object'),
    (QA | {"history": [["a", "b", "c"]]}, "not-messages", "must be an object, got list"),
    *((QA | {"response": text}, "not-messages", '"response" looks like messages')
      for text in (repr(replies("a"))[:-1], '[{""role"": ""user"", ""content"": ""a""}]')),
    (QA | {"output": ["a", "b"], "response": None}, "not-messages", '"output" message 1 must be'),
    ({"text": "Just text."}, "not-messages", '"text" holds no messages, nor ChatML'),
    ({"mapping": 5, "current_node": "a"}, "other-types", ""),
    ({"message_tree_id": "1", "prompt": {"role": "user", "text": "q", "replies": 5}},
     "other-types", ""),
    ({"messages": []}, "no-answer", ""),
    ({"messages": says("q")}, "no-answer", "no message of the assistant"),
    ({"messages": system("S")}, "no-answer", ""),
    ({"messages": "text"}, "not-messages", ""),
    ({"messages": [{"role": "root", "content": "x"}]}, "unknown-role", "message 1: role must be"),
    ({"messages": [{"content": "x"}]}, "unknown-role", "got None"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown-role", "got ['user']"),
    ({"messages": [*says("q"), {"role": "assistant"}]}, "not-a-string", "message 2: content must"),
    ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "not-a-string",
     "content must be text"),
    ({"messages": [{"role": "user", "content": " "}, *replies("a")]}, "empty",
     '"messages message 1" is empty'),
    ({"prompt": "q"} | AB, "preference-pair", "for dpo.py"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "reason", "detail"), BAD_CHATS)
@pytest.mark.parametrize("place", [0, 7])
def test_an_unusable_row_is_counted_with_line_and_field(tmp_path, line, reason, detail, place):
    tally = Tally()
    rows = read_chats(write(tmp_path / "rows.jsonl", *GOOD[:place], line, *GOOD[place:]), tally)
    assert len(rows) == len(GOOD)
    assert reasons(tally) == {reason: 1}
    (example,) = tally.dropped["read"][reason]["examples"]
    assert example.startswith(f"{tmp_path}/rows.jsonl line {place + 1}")
    assert detail in example
    assert example.isprintable()
    assert tally.bad_rows == 1


BAD_PAIRS = [
    ({"prompt": "q", "chosen": "a"}, "missing-field"),
    ({"prompt": "q", "rejected": "a"}, "missing-field"),
    (AB, "missing-field"),
    ({"chosen": replies("a"), "rejected": replies("b")}, "missing-field"),
    ({"chosen": says("q", "a"), "rejected": says("r", "b")}, "missing-field"),
    ({"chosen": says("q", "a", "r", "b"), "rejected": says("q", "a", "s", "b")}, "no-answer"),
    ({"prompt": "q", "chosen": says("x"), "rejected": "b"}, "no-answer"),
    ({"prompt": "q", "chosen": None, "rejected": "b"}, "missing-field"),
    ({"prompt": "q", "chosen": "a", "rejected": ""}, "empty"),
    ({"chosen": hh(" q", " a"), "rejected": hh(" r", " b")}, "missing-field"),
    ({"chosen": hh(" q", ""), "rejected": hh(" q", " b")}, "empty"),
    ({"chosen": hh(" q"), "rejected": hh(" q", " b")}, "missing-field"),
    ({"chosen": "q\n\nAssistant: a", "rejected": "q\n\nAssistant: b"}, "missing-field"),
    ({"chosen": hh(" q", " a", " x"), "rejected": hh(" q", " b")}, "no-answer"),
    (["chosen", "rejected"], "not-an-object"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_PAIRS)
def test_an_unusable_pair_is_counted(tmp_path, row, reason):
    tally, good = Tally(), {"prompt": "q"} | AB
    assert len(read_pairs(write(tmp_path / "rows.jsonl", *[good] * 50, row), tally)) == 50
    assert reasons(tally) == {reason: 1}
    assert "line 51" in tally.dropped["read"][reason]["examples"][0]


def test_equal_answers_are_dropped_and_counted_however_many(tmp_path):
    equal, good = ({"prompt": "q", "chosen": "a", "rejected": text} for text in (" a\r\n", "b"))
    tally = Tally()
    assert len(read_pairs(write(tmp_path / "rows.jsonl", equal, good, equal), tally)) == 1
    assert reasons(tally) == {"identical-pair": 2}
    assert tally.bad_rows == 0
    with pytest.raises(UserError, match=r"0 usable rows of 1: 1 identical-pair \(line 1: "):
        read_pairs(write(tmp_path / "rows.jsonl", equal))


def test_conversations_with_an_empty_answer_are_passed_over_and_counted(tmp_path):
    silent = {"messages": [*says("q"), *replies(" "), *says("r"), *replies("a")]}
    path, tally = write(tmp_path / "rows.jsonl", silent, *GOOD[:2], silent), Tally()
    assert len(read_chats(path, tally)) == 2
    assert (reasons(tally), tally.bad_rows) == ({"empty-answer": 2}, 0)
    with pytest.raises(UserError, match="0 usable rows of 1: 1 empty-answer"):
        read_chats(write(tmp_path / "rows.jsonl", silent))


def test_too_many_unusable_rows_are_an_error_that_lists_them(tmp_path):
    bad = [{"prompt": "q"}] * 5 + ["nothing"]
    path = write(tmp_path / "rows.jsonl", *bad, *GOOD[:94])
    with pytest.raises(UserError) as caught:
        read_chats(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: 6 of 100 rows are unusable: 5 missing-field (line 1: ")
    assert text.endswith("; 1 not-json (line 6)")
    assert text.count(str(path)) == 1
    assert len(usable_rows(path, to_chat, max_bad=0.06)) == 94
    assert len(read_chats(write(path, *bad[:5], *GOOD[:95]))) == 95  # exactly 5 %


@pytest.mark.parametrize(
    ("read", "row", "name"),
    [
        (read_chats, {"frage": "q", "antwort": "a"}, "prompt"),
        (read_chats, {"prompt": "q", "reply": "a"}, "response"),
        (read_pairs, {"frage": "q", "gut": "a", "schlecht": "b"}, "chosen"),
        (read_pairs, ROW, "chosen"),  # for sft.py
    ],
)
def test_other_field_names_get_a_remedy_that_works(tmp_path, read, row, name):
    path = write(tmp_path / "rows.jsonl", row)
    with pytest.raises(UserError) as caught:
        read(path)
    detail = f'missing "{name}" among {list(row)!r}; rename its fields: prompt|instruction|question'
    assert f"{path}: 0 usable rows of 1: 1 missing-field (line 1: {detail}" in str(caught.value)
    ours = ("prompt", "response") if read is read_chats else ("prompt", "chosen", "rejected")
    values = [*row.values(), "b"][: len(ours)]
    assert len(read(write(path, dict(zip(ours, values, strict=True))))) == 1


def test_a_list_with_a_bad_element_goes_on(tmp_path):
    text = json.dumps([*GOOD[:3], {"prompt": "q"}, *GOOD[3:40]])
    tally = Tally()
    (tmp_path / "rows.json").write_text(text[:-1] + ', {"prompt": NaN}]')
    assert len(read_chats(tmp_path / "rows.json", tally)) == 40
    assert reasons(tally) == {"missing-field": 2}
    assert "element 4" in tally.dropped["read"]["missing-field"]["examples"][0]


NINE = json.dumps([ROW] * 9)


@pytest.mark.parametrize(
    ("name", "content", "detail"),
    [
        ("empty.jsonl", b"", "0 usable rows of 0: it is empty"),
        ("list.json", b"[]", "0 usable rows of 0"),
        ("cut.json", NINE[:-20].encode(), "its JSON stops after 8 elements: it is broken"),
        ("binary.jsonl", bytes(range(256)) * 20, "0 usable rows"),
        ("nul.jsonl", b"\0" * 5000, "0 usable rows"),
        (
            "cut.jsonl.gz",
            gzip.compress(b'{"prompt": "q"}\n' * 9999, mtime=0)[:80],
            "cannot be read",
        ),
        ("plain.jsonl.gz", LINE.encode(), "cannot be read"),
        ("rows.parquet", b"PAR1", "cannot be read"),
        ("bomb.jsonl.gz", gzip.compress(b"x" * (70 << 20), mtime=0), "decompresses to over"),
    ],
)
def test_a_file_of_no_use_is_one_line(tmp_path, name, content, detail):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=detail) as caught:
        read_chats(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_without_rows_are_named(tmp_path):
    with pytest.raises(UserError, match=r"none.jsonl: not found; give a file"):
        read_pairs(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="holds no file"):
        read_pairs(tmp_path)
    for name in ("a.txt", "b.md"):
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=r"holds no file that ends in .json, .jsonl, .*\.parquet"):
        read_pairs(tmp_path)


def test_a_line_over_the_limit_is_dropped_and_long_contents_pass(tmp_path):
    """Not timed here: a quadratic search would take minutes, which is the alarm."""
    tally, prompt = Tally(), "a" * 500_000 + "\n\nHuman:" * 50_000
    path = write(tmp_path / "rows.jsonl", {"text": "### Human:" + "### Input: a" * 50_000})
    with pytest.raises(UserError, match="not-messages"):
        read_chats(path)
    long = {"prompt": prompt, "response": "<" * 500_000 + " " * 500_000 + "."}
    path = write(tmp_path / "rows.jsonl", '{"prompt": "' + "x" * (17 << 20), *GOOD, long)
    assert len(read_chats(path, tally)) == 101
    assert reasons(tally) == {"not-json": 2}


# ---- anything at all

NAMES = (
    "prompt response messages conversations role content from value input output chosen rejected "
    "system history instruction type text user assistant gpt mapping current_node chat weight "
    "message_tree_id replies answers parts author"
).split()
WORDS = st.one_of(st.sampled_from(["", "a", "b", hh(" a", " b"), *NAMES]), st.text(max_size=5))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), WORDS),
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
    roles = ("system", "user", "assistant")
    return messages and all(
        m.keys() - {"weight"} == {"role", "content"} and m["role"] in roles and m["content"].strip()
        for m in messages
    )


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=4), as_list=st.booleans())
def test_junk_never_crashes_and_what_comes_out_is_sound(
    tmp_path_factory, tiny_tokenizer, rows, as_list
):
    path = tmp_path_factory.getbasetemp() / "junk.jsonl"
    write(path, *([json.dumps(rows)] if as_list else map(json.dumps, rows)))
    with suppress(UserError):
        for _, _, messages in usable_rows(path, to_chat, max_bad=1):
            assert sound(messages)
            assert messages[-1]["role"] == "assistant"
            render(tiny_tokenizer, messages, "chatml")
    with suppress(UserError):
        for _, _, pair in usable_rows(path, to_pair, max_bad=1):
            assert all(map(sound, pair.values()))
            assert pair["chosen"][0]["role"] == pair["rejected"][0]["role"] == "assistant"
            assert pair["chosen"] != pair["rejected"]


# ---- inspect


def shown(capsys, path, **settings):
    inspect(InspectConfig(str(path), **settings))
    return capsys.readouterr().out


def test_inspect_shows_conversations_as_the_model_sees_them(tmp_path, tiny_tokenizer, capsys):
    tiny_tokenizer.save(tmp_path / "model", 64, template="instruct")
    rows = [
        {"prompt": "Hi \u6f22", "response": "Hello", "id": 1},
        {"conversations": sharegpt("a", "b")},
    ]
    path = write(tmp_path / "rows.jsonl", *rows, {"prompt": 5, "response": "a"}, *GOOD)
    text = shown(capsys, path)
    for part in (
        "101  question and answer: prompt, response",
        "1  messages: conversations",
        "  columns not used: id\n",
        "102  usable rows",
        "as chatml; [what the model does not learn]:",
        f'  1 passed over: not-a-string ({path} line 3: "prompt" must be',
        "[<|im_start|>user\nHi \u6f22<|im_end|>\n<|im_start|>assistant\n]Hello<|im_end|>",
        " characters, ",
    ):
        assert part in text
    model = str(tmp_path / "model")
    text = shown(capsys, path, tokenizer_path=model)
    assert "[<s>### Instruction:\nHi \u6f22\n\n### Response:\n]Hello</s>" in text
    (learned,) = re.findall(r" tokens, (\d+) of them learned", text)
    answers = [*["a"] * 100, "b", "Hello"]
    assert int(learned) == sum(len(tiny_tokenizer.encode(a)) + 1 for a in answers)  # and its end
    text = shown(capsys, path, tokenizer_path=model, template="chat")
    assert "[<s>Human: Hi \u6f22\n\nAssistant:] Hello</s>" in text  # the model writes the space


def test_inspect_shows_pairs_without_learning_earlier_answers(tmp_path, capsys):
    row = {"chosen": says("q", "x", "r", "a"), "rejected": says("q", "x", "r", "b")}
    same = {"prompt": "q", "chosen": "a", "rejected": "a"}
    text = shown(capsys, write(tmp_path / "rows.jsonl", row, same))
    for part in (
        "preference pairs",
        "1  pair of dialogues: chosen, rejected\n",
        "1 passed over: identical-pair (",
    ):
        assert part in text
    for answer in "ab":
        assert f"<|im_start|>assistant\n]{answer}<|im_end|>" in text
    assert "[<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n]" not in text


@pytest.mark.parametrize("place", ["", "final", "final/adapter", "plain", "plain/tokenizer.model"])
def test_inspect_takes_the_tokenizer_of_whatever_is_a_model(
    tmp_path, tiny_tokenizer, capsys, place
):
    """A training's folder, its final/, an adapter, a folder of a tokenizer alone, its file."""
    for folder in map(tmp_path.joinpath, ("final", "final/adapter", "plain")):
        folder.mkdir()
        tiny_tokenizer.save(folder, 64, "chatml_newline")
    (tmp_path / "step_000004").mkdir()
    path = write(tmp_path / "rows.jsonl", {"prompt": "q", "response": "a"})
    text = shown(capsys, path, tokenizer_path=str(tmp_path / place), template="chatml")
    named = "chatml" if place.endswith(".model") else "chatml_newline"  # a file names none
    assert f"as {named}; " in text
    assert " tokens, " in text


@pytest.mark.parametrize("template", ["chatml", "instruct", "chat"])
def test_characters_stand_in_for_a_tokenizer(tiny_tokenizer, template):
    pair = {"prompt": says("q", "x", "r"), "chosen": replies("a"), "rejected": replies("b")}
    for value in (says("q", "x", "r", "a"), pair):
        ours, theirs = (dialogues(value, t, template) for t in (Characters(), tiny_tokenizer))
        for (_, ids, mask), (_, other_ids, other_mask) in zip(ours, theirs, strict=True):
            text = marked(other_ids, other_mask, tiny_tokenizer)
            assert marked(ids, mask, Characters()) == text.replace("<s>", "", 1)
            assert ("]x" in text.replace("] ", "]")) == (value is not pair)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("rows.jsonl", '{"text": "First."}\n{"text": "Second."}\n3\n',
         ("2  documents read\n", "1 passed over: no-text (", "First.\n")),
        ("rows.jsonl", '3\n{"mapping": 5, "current_node": 1}\n{"text": "First."}\n{"text": 1}',
         ("1  documents read\n", "First.\n")),
        ("page.html", "<p>Only <b>words</b></p>", ("Only words\n",)),
    ],
)  # fmt: skip
def test_inspect_shows_a_source_of_text(tmp_path, capsys, name, content, parts):
    (tmp_path / name).write_text(content)
    text = shown(capsys, tmp_path / name)
    assert all(part in text for part in parts)


def test_inspect_shows_a_prepared_dataset_and_names_its_damage(tmp_path, tiny_documents, capsys):
    folder = prepare_dataset(tmp_path / "tiny", tiny_documents)
    manifest = json.loads((folder / "manifest.json").read_text())
    totals = manifest["totals"]
    capsys.readouterr()
    text = shown(capsys, folder)
    for split in ("train", "val"):
        line = next(line for line in text.splitlines() if line.startswith(f"  {split} "))
        assert line.split()[1] == f"{totals[split]['tokens']:,}"
        assert line.endswith(f" {totals[split]['documents']:,} documents")
    for part in (manifest["tokenizer_sha256"], "| read |  | 40 |", "ids:\n<s>"):
        assert part in text
    shard = folder / "train_00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train_00000\.bin"):
        shown(capsys, folder)


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("none.jsonl", {}, "none.jsonl: not found"),
        ("configs/tiny.json", {}, "0 usable rows of 1: 1 missing-field"),
        ("lib", {}, "lib: holds no file"),
        ("configs/tiny.json", {"tokenizer_path": "none"}, "none: No such file"),
        ("empty.txt", {}, "0 usable documents"),
    ],
)
def test_inspect_of_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, path, settings, message):
    for name in ("data.py", "lib", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "empty.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        shown(capsys, path, **settings)
    assert "\n" not in str(caught.value)


def test_a_misspelled_command_is_named(capsys):
    with pytest.raises(SystemExit):
        data.main(["inspekt"])
    expected = "error: expected a preset (a .json file) or --key=value, got 'inspekt'\n"
    assert capsys.readouterr().err == expected


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
