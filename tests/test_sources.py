"""sources.py and files.py: each kind of file gives its documents, no hostile one a traceback."""

import bz2
import contextlib
import csv
import glob
import gzip
import io
import json
import lzma
import os
import random
import re
import sys
import tracemalloc
from collections import Counter
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.chats import read_chats, read_pairs
from corpus.clean import pieces
from corpus.files import MAX_LINE, kind_of
from corpus.report import Tally, reasons_of
from corpus.rows import file_rows
from corpus.sources import BLOCKS, input_files, page_text, read_documents
from lib import config as configs
from lib.config import UserError
from tests import ROOT, SHARED
from tests.conftest import write_rows


@dataclass(frozen=True)
class Config:
    """The settings that a reader asks of a configuration."""

    input_path: str = "docstrings:"
    input_config: str = ""
    text_column: str = ""
    separator: str = ""
    licence: str = ""
    max_length: int = 10000
    mixture: list | None = None


def read(path="docstrings:", **settings):
    """Returns (documents, tally) of a source."""
    tally = Tally()
    documents = [text for _, text, _ in read_documents(Config(str(path), **settings), tally)]
    return documents, tally


def texts_of(path, **settings):
    """Returns (documents, {reason: count} of what was not read) of a source."""
    documents, tally = read(path, **settings)
    return documents, {reason: count for _, reason, count, _ in reasons_of(tally.dropped)}


def write_jsonl(path, texts):
    return write_rows(path, ({"text": text} for text in texts))


def refused(message, path="docstrings:", **settings):
    """Asserts that a source is a UserError of one line that matches `message`."""
    with pytest.raises(UserError, match=message) as caught:
        read(path, **settings)
    assert "\n" not in str(caught.value)


# --- Every kind of file ---------------------------------------------------------------------------


def zstd(data):
    package = pytest.importorskip("zstandard")
    return package.ZstdCompressor(write_checksum=True).compress(data)


PACKERS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
PACKERS[".zst"] = zstd
PACKED = list(PACKERS)[1:]
ROWS = [{"id": 1, "text": "one\nparagraph"}, {"id": 2, "text": "two, \u00fc"}]
BOTH = [row["text"] for row in ROWS]
FORMATS = {  # name: (content, documents)
    "a.jsonl": ("".join(json.dumps(row) + "\n" for row in ROWS), BOTH),
    "b.json": (json.dumps(ROWS, indent=2), BOTH),
    "c.json": (json.dumps(ROWS[0], indent=2), BOTH[:1]),
    "d.json": ("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), BOTH),
    "e.csv": ('id,text\n1,"one\nparagraph"\n2,"two, \u00fc"\n', BOTH),
    "f.txt": ("one\nparagraph\n\nnext", ["one\nparagraph\n\nnext"]),
    "g.MD": ("# title\n", ["# title\n"]),
    "h.tsv": ('id\ttext\n1\t"one\nparagraph"\n2\ttwo, \u00fc\n', BOTH),
    "i.html": ("<title>A</title><p>b &amp; c", ["A\n\nb & c"]),
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_every_local_format(tmp_path, suffix):
    for name, (content, _) in FORMATS.items():
        (tmp_path / (name + suffix)).write_bytes(PACKERS[suffix](content.encode()))
    (tmp_path / "ignored.png").write_bytes(b"\x89PNG")
    assert texts_of(tmp_path) == ([text for _, texts in FORMATS.values() for text in texts], {})
    assert texts_of(tmp_path / f"[ad].*{suffix}") == ([*BOTH, *BOTH], {})
    assert texts_of(tmp_path / f"e.csv{suffix}") == (BOTH, {})


@pytest.mark.parametrize("suffix", PACKED)
def test_several_members_are_one_file_and_a_cut_one_gives_what_it_has(tmp_path, suffix):
    noise, path = random.Random(0), tmp_path / f"a.jsonl{suffix}"
    texts = [f"{n} {noise.getrandbits(4000):x}" for n in range(2000)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    parts = [PACKERS[suffix]("".join(lines[start : start + 1000]).encode()) for start in (0, 1000)]
    path.write_bytes(b"".join(parts))
    assert texts_of(path) == (texts, {})
    path.write_bytes(b"".join(parts)[:-1000])
    documents, bad = texts_of(path)
    assert (documents, bad) == (texts[: len(documents)], {"unreadable-file": 1})
    assert 1000 <= len(documents) < 2000
    path.write_bytes(parts[0][:5000] + b"\0" * 100 + parts[0][5100:])
    assert texts_of(path)[1]["unreadable-file"] == 1
    path.write_bytes(b"")
    assert not texts_of(path)[0]


def test_a_decompression_bomb_is_refused(tmp_path):
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress((b" " * (1 << 20) + b"\n") * 66))
    refused("decompresses to over 67,108,864 bytes", tmp_path)


def test_bom_crlf_and_a_last_line_without_an_end_are_accepted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree")
    (tmp_path / "c.json").write_bytes(b'\xef\xbb\xbf[{"text": "c"}]')
    (tmp_path / "d.csv").write_bytes(b"\xef\xbb\xbftext\r\nd\r\n")
    assert texts_of(tmp_path) == (["a", "b", "one\ntwo\nthree", "c", "d"], {})


def test_carriage_returns_alone_are_line_ends(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"id,text\r1,one\r2,two\r")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a"}\r{"text": "b"}\r')
    (tmp_path / "c.txt").write_bytes(b"a line\rand another\r")
    assert texts_of(tmp_path) == (["one", "two", "a", "b", "a line\nand another\n"], {})


def test_long_plain_text_is_cut_at_paragraphs_and_nothing_is_lost(tmp_path):
    book = "".join(f"Story {n}. {'Words of a paragraph. ' * 20}\n\n" for n in range(60))
    (tmp_path / "book.txt").write_text(book)
    documents, _ = texts_of(tmp_path / "book.txt", max_length=2000)
    assert "".join(documents) == book
    assert max(map(len, documents)) <= 2000
    assert all(document.startswith("Story") for document in documents)


@given(
    st.text("ab .\n\u3002", max_size=300),
    st.integers(1, 50),
    st.lists(st.integers(0, 300)).map(sorted),
)
@settings(max_examples=200, deadline=None)
def test_pieces_are_the_text_however_it_comes(text, most, cuts):
    documents = list(pieces([text], most))
    assert "".join(documents) == text
    assert max(map(len, documents)) <= most
    assert len(documents) == 1 or min(map(len, documents)) >= most // 4
    parts = [text[at:end] for at, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert list(pieces(parts, most)) == documents


@pytest.mark.parametrize(
    "stop", [". ", "! ", "? ", '." ', "\u3002", "\uff01", "\u0964 ", "\u061f "]
)
def test_an_article_in_one_line_is_cut_at_its_sentences(tmp_path, stop):
    article = "".join(f"Sentence {n} of it{stop}" for n in range(400))
    (tmp_path / "a.txt").write_text(f"{article}\n{article}\n", encoding="utf-8")
    documents, _ = texts_of(tmp_path / "a.txt", max_length=1000)
    assert "".join(documents) == f"{article}\n{article}\n"
    assert max(map(len, documents)) <= 1000
    assert all(text.endswith((stop, f"{stop}\n")) for text in documents)


LINES = ["one", "two ", "three"]
TEXTS = {  # of documents one, two and three: what is between them, and the flag that it needs
    "alone": ("\n<|endoftext|>\n", ""),
    "inline": ("<|endoftext|>", ""),
    "llama": ("<|end_of_text|>", ""),
    "sentencepiece": ("\n </s>\n", ""),
    "twice": ("\n<|endoftext|>\n\n<|endoftext|><|endoftext|>", ""),
    "page": ("\f", "formfeed"),
    "equals": ("\n=====\n", "rule"),
    "stars": ("\n  * * *\t\n", "rule"),
    "dashes": ("\n" + "-" * 200 + "\n", "rule"),
    "own": ("\n### (next)\n", "### (next)"),
}


@pytest.mark.parametrize(("between", "flag"), TEXTS.values(), ids=TEXTS)
def test_documents_of_plain_text_are_separated(tmp_path, between, flag):
    (tmp_path / "a.txt").write_text(between.join(["", *LINES, "\n"]))
    documents, bad = texts_of(tmp_path / "a.txt", separator=flag)
    assert ([text.strip() for text in documents], bad) == (["one", "two", "three"], {})
    mixture = [{"name": "a", "input_path": str(tmp_path / "a.txt"), "separator": flag}]
    assert texts_of("docstrings:", mixture=mixture)[0] == documents
    if flag:  # is text without it
        assert texts_of(tmp_path / "a.txt")[0] == [between.join(["", *LINES, "\n"])]


@pytest.mark.parametrize(
    "text",
    ["a `<|endoftext|>` b", "<s>a</s> b", "a === b\n", "==\n**\n", "a ***", "--- a\n| --- |\n"],
)
def test_what_only_looks_like_a_separator_is_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert texts_of(tmp_path / "a.txt", separator="rule") == ([text], {})


# --- Tables ---------------------------------------------------------------------------------------


def write_table(path, columns, **settings):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path, **settings)
    return path


@pytest.mark.parametrize(
    "options", [{"row_group_size": 3}, {"compression": "gzip", "use_dictionary": False}]
)
def test_tables_give_their_text_column(tmp_path, options):
    texts = [*(f"document {n} \u00fc" for n in range(199)), None]
    columns = {
        "id": range(200),
        "text": texts,
        "list": [["a"]] * 200,
        "meta": [{"a": n} for n in range(200)],
    }
    path = write_table(tmp_path / "a.parquet", columns, **options)
    assert texts_of(path) == (texts[:-1], {"no-text": 1})
    whole = [row for _, row in file_rows(path, Tally())]
    assert whole == [{key: values[n] for key, values in columns.items()} for n in range(200)]


def test_a_table_without_a_text_column_names_its_columns(tmp_path):
    columns = {"n": [1], "text": [["in a list"]], "verse": ["v"]}
    path = write_table(tmp_path / "a.parquet", columns)
    assert texts_of(path, text_column="verse") == texts_of(path) == (["v"], {})
    for column, problem in {
        "words": "column 'words' holds no text among n (int), text (list), verse (str); name it",
        "text": "column 'text' holds no text among n (int), text (list), verse (str)",
        "n": "column 'n' holds no text among n (int), text (list), verse (str)",
    }.items():
        documents, tally = read(path, text_column=column)
        ((_, _, _, example),) = reasons_of(tally.dropped)
        assert not documents
        assert problem in example
    path = write_table(tmp_path / "b.parquet", {"id": ["7"], "text": [b"in bytes"]})
    for column in ("", "text"):
        ((_, _, _, example),) = reasons_of(read(path, text_column=column)[1].dropped)
        assert "among id (str), text (bytes); name it" in example


def test_a_damaged_table_gives_what_stands_before(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    values = pyarrow.array([*[b"good"] * 1000, b"bad \xff"], pyarrow.binary())
    path = write_table(tmp_path / "a.parquet", {"text": values.view(pyarrow.string())})
    documents, bad = texts_of(path)
    assert bad == {"unreadable-file": 1}
    assert documents == ["good"] * len(documents)
    assert len(documents) > 900
    data = path.read_bytes()
    for damaged in (data[:-20], data[:30] + b"\xff" * 60 + data[90:], b"PAR1", b""):
        path.write_bytes(damaged)
        assert texts_of(path)[1] == {"unreadable-file": 1}


def test_tables_are_read_in_bounded_memory(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    path = write_table(tmp_path / "b.parquet", {"text": [f"{n} " * 5000 for n in range(2000)]})
    before, count = pyarrow.total_allocated_bytes(), 0
    for _ in read_documents(Config(str(path)), Tally()):
        count += 1
        assert pyarrow.total_allocated_bytes() - before < 64 << 20
    assert count == 2000


# Cells as people fill them: quotes, delimiters and line breaks anywhere.
CELLS = st.text(alphabet="ab \u00fc\"',;\t|\n\\", max_size=8)
TABLES = st.integers(2, 4).flatmap(
    lambda width: st.lists(st.lists(CELLS, min_size=width, max_size=width), min_size=1, max_size=8)
)


@given(TABLES, st.sampled_from(",;\t|"), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
@settings(max_examples=300, deadline=None)
def test_a_table_that_the_csv_module_writes_is_read_back(tmp_path_factory, cells, delimiter, style):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    names = [f"c{n}" for n in range(len(cells[0]))]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter, quoting=style).writerows([names, *cells])
    tally = Tally()
    found = [list(row.values()) for _, row in file_rows(path, tally)]
    full = lambda table: [row for row in table if any(cell.strip() for cell in row)]
    assert (full(found), tally.bad_rows) == (full(cells), 0)


@pytest.mark.parametrize("name", ["pandas", "pyarrow"])
def test_a_table_that_others_write_is_what_they_read(tmp_path, name):
    module, path = pytest.importorskip(name), tmp_path / "a.csv"
    random_text, signs = random.Random(0), "ab \"',;\n\u00fc"
    columns = {
        n: ["x" + "".join(random_text.choices(signs, k=20)) for _ in range(400)] for n in "ab"
    }
    if name == "pandas":
        module.DataFrame(columns).to_csv(path, index=False)
        theirs = module.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
    else:
        writer = pytest.importorskip("pyarrow.csv")
        writer.write_csv(module.table(columns), path)
        options = writer.ParseOptions(newlines_in_values=True)
        theirs = writer.read_csv(path, parse_options=options).to_pylist()
    assert [row for _, row in file_rows(path, Tally())] == theirs


def bad_lines(path):
    """Returns (the rows as lists, the numbers of the lines that are bad) of a table."""
    tally = Tally()
    found = [list(row.values()) for _, row in file_rows(path, tally)]
    examples = tally.dropped["read"].get("not-csv", {"examples": []})["examples"]
    return found, [int(re.search(r" line (\d+): ", example)[1]) for example in examples]


@pytest.mark.parametrize("delimiter", [",", ";"])
@pytest.mark.parametrize("cell", ['"the open end', '"the" open end', '"" open', 'a"'])
@pytest.mark.parametrize("style", ["plain", "quoted", "several lines"])
def test_an_open_quote_costs_its_own_row_alone(tmp_path, delimiter, cell, style):
    text = {"plain": "x", "quoted": '"x"', "several lines": '"x\n""y""\n\nz"'}[style]
    right = text.strip('"').replace('""', '"') if style != "plain" else text
    lines = [f"{n}{delimiter}{text}\n" for n in range(60)]
    lines[30] = f"30{delimiter}{cell}\n"
    (tmp_path / "a.csv").write_text(f"n{delimiter}text\n" + "".join(lines))
    found, bad = bad_lines(tmp_path / "a.csv")
    literal = [["30", cell]] * (cell == 'a"')
    assert found == [[str(n), right] for n in range(30)] + literal + [
        [str(n), right] for n in range(31, 60)
    ]
    assert bad == ([] if literal else ["".join(lines[:30]).count("\n") + 2])


def test_a_cell_of_many_lines_is_one_cell(tmp_path):
    poem = "\n".join(f'line {n}, "so" it, goes' for n in range(50_000))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["n", "text"], ["1", poem], ["2", "x" * 9 * 2**20], ["3", "y"]])
    found, bad = bad_lines(tmp_path / "a.csv")
    assert (found[0], [row[0] for row in found], bad) == (["1", poem], ["1", "2", "3"], [])


LITERAL = ['"Yes" was all he said.', '"Five inches', "it's 5\"", '"', '"so" and "so"', "plain"]


@pytest.mark.parametrize("delimiter", ["\t", "|"])
def test_quotes_that_mean_nothing_stay(tmp_path, delimiter):
    table = [["n", "text", "more"], *([str(n), text, "end"] for n, text in enumerate(LITERAL * 9))]
    (tmp_path / "a.tsv").write_text("\n".join(map(delimiter.join, table)))
    assert bad_lines(tmp_path / "a.tsv") == (table[1:], [])
    quoted = [[f'"{cell}"' for cell in row] for row in table if '"' not in row[1]]
    quoted[5][1] = '"open'
    (tmp_path / "a.tsv").write_text("\n".join(map(delimiter.join, quoted)))
    found, bad = bad_lines(tmp_path / "a.tsv")
    assert (len(found), bad) == (len(quoted) - 2, [6])
    assert all(row[1:] == ["plain", "end"] for row in found)


def test_quotes_behind_backslashes_are_quotes(tmp_path):
    table = [["a", "b"], ['say "x", y', r"C:\new\frac"], ["z\\", '"'], ["two\n", ""]]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file, doublequote=False, escapechar="\\").writerows(table)
    assert bad_lines(tmp_path / "a.csv") == (table[1:], [])
    (tmp_path / "a.csv").write_text('a,b\n"say \\"x\\", y","C:\\new"\n')  # not every one is escaped
    assert bad_lines(tmp_path / "a.csv") == ([['say "x", y', "C:\\new"]], [])
    (tmp_path / "a.csv").write_text('a,b\n"x","\\\\"\n')  # a quote behind two of them ends the cell
    assert bad_lines(tmp_path / "a.csv") == ([["x", "\\\\"]], [])


@pytest.mark.parametrize("sign", [";", "|", "\t", ":"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_excel_names_its_delimiter(tmp_path, sign, encoding):
    text = f'sep={sign}\r\n\r\nid{sign}text,{sign}\r\n\r\n1{sign}"a{sign}, b"{sign}\r\n'
    (tmp_path / "a.csv").write_bytes(text.encode(encoding))
    found = [row for _, row in file_rows(tmp_path / "a.csv", Tally())]
    assert found == [{"id": "1", "text,": f"a{sign}, b", "column 3": ""}]


def test_a_header_that_names_a_column_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("id,text,text\n1,a,b\n")
    documents, tally = read(tmp_path)
    assert not documents
    assert "names a column twice: id, text, text" in str(tally.dropped)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.tab", "a.tab.csv"])
def test_the_header_of_a_table_tells_its_delimiter(tmp_path, name, delimiter):
    lines = [("id", "text"), ("1", "one"), ("2", "a", "b"), ("3", '"three" '), ("4", '"f, \t;|r"')]
    (tmp_path / name).write_text("\n".join(map(delimiter.join, lines)))
    assert texts_of(tmp_path) == (["one", "f, \t;|r"], {"not-csv": 2})


@pytest.mark.parametrize(("name", "needs"), [("Jsonl", "orjson"), ("Parquet", "pyarrow")])
def test_a_folder_that_datatrove_wrote_is_read_as_it_lies(name, needs, tmp_path):
    writers = pytest.importorskip("datatrove.pipeline.writers")
    pytest.importorskip(needs)
    from datatrove.data import Document

    texts = [[f"page {n} of rank {rank}, \u00fc" for n in range(3)] for rank in range(12)]
    with getattr(writers, f"{name}Writer")(str(tmp_path / "out")) as writer:
        for rank, pages in enumerate(texts):
            for number, text in enumerate(pages):
                about = {"url": "http://a.b", "language_score": 0.9}
                writer.write(Document(text, f"{rank}/{number}", metadata=about), rank)
    assert len(list((tmp_path / "out").iterdir())) == 12  # a file for each rank
    assert texts_of(tmp_path / "out") == ([text for pages in texts for text in pages], {})


def test_csv_is_what_the_csv_module_writes(tmp_path):
    texts = ['quotes " and, commas', "two\nlines", "", " spaces ", "\u2028"]
    sink = io.StringIO()
    csv.writer(sink).writerows([["n", "text"], *([n, text] for n, text in enumerate(texts))])
    (tmp_path / "a.csv").write_text(sink.getvalue(), encoding="utf-8", newline="")
    assert texts_of(tmp_path) == (texts, {})


# --- Rows -----------------------------------------------------------------------------------------

BAD_ROWS = [
    (b"[1, 2]", "no-text"),
    (b'"text"', "no-text"),
    (b'{"title": "x"}', "no-text"),
    (b'{"text": null}', "no-text"),
    (b'{"text": 3}', "no-text"),
    (b'{"text": NaN}', "no-text"),
    (b'{"text": ["a"]}', "no-text"),
    (b'{"text": "\\ud800"}', "bad-unicode"),
    (b'{"text": "a"', "not-json"),
    (b'{"text": "a"} x', "not-json"),
    (b'{"text": "\xff"}', "not-utf-8"),
    (b"[" * 100_000, "not-json"),
    (b"9" * 5000, "not-json"),
]


def test_bad_rows_are_counted_by_reason_and_passed_over(tmp_path):
    lines = [b'{"text": "first"}']
    for row, _ in BAD_ROWS:
        lines += [row, b'{"text": "good"}']
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    expected = dict(Counter(reason for _, reason in BAD_ROWS))
    assert texts_of(tmp_path) == (["first", *["good"] * len(BAD_ROWS)], expected)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("[GOOD, GOOD", 2),
        ("[GOOD, {, GOOD]", 1),
        ("[GOOD,\nGOOD]\n[GOOD]", 2),
        ("[GOOD] x", 1),
        ("[" * 100_000, 0),
        (f"[GOOD, {'[' * 100_000}", 1),
        ('{\n"text": "good"\n}\n{\n"text": "cut', 1),
    ],
)
def test_what_is_lost_of_a_json_list_is_said(tmp_path, text, count):
    (tmp_path / "a.json").write_text(text.replace("GOOD", '{"text": "good"}'))
    documents, tally = read(tmp_path / "a.json")
    ((_, reason, _, example),) = reasons_of(tally.dropped)
    assert (documents, reason) == (["good"] * count, "unreadable-file")
    assert f"its JSON stops after {count} elements: " in example


@pytest.mark.parametrize(
    "text",
    [
        '{\n"text": "a"\n}\n{\n"text":\n"b"}',
        '[{"text": "a"},\n{"text": "b"}\n]',
        '{"text": "a", "n": NaN}\n\n{"text": "b", "n": [-Infinity]}',
        '\n\n [\n{"text": "a"}, {"text": "b"}]\n',
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_is_read_by_its_content_whatever_the_suffix(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert texts_of(tmp_path) == (["a", "b"], {})


GOOD = [{"text": "a"}, {"text": "b"}]
WRAPPED = [
    {"version": "1.0", "data": GOOD},
    {"rows": GOOD, "info": {"n": 2}, "tags": ["x"]},
    {"n": 2, "none": [], "train": GOOD},
    {"text": ["a", "b"], "n": [1, 2]},
    {"text": {"0": "a", "1": "b"}, "n": {"0": 1, "1": 2}},
    {"data": ["a", "b"]},
    ["a", "b"],
    GOOD,
]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("value", WRAPPED, ids=json.dumps)
def test_rows_in_a_wrapper_are_rows(tmp_path, value, indent):
    (tmp_path / "a.json").write_text(json.dumps(value, indent=indent))
    assert texts_of(tmp_path) == (["a", "b"], {})


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROWS_THEMSELVES = [
    {"messages": CHAT},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "id": 1},
    {"chosen": CHAT, "rejected": CHAT[:1] * 2},
    {"prompt": "a", "answers": ["b", "c"]},
    {"a": [1], "b": [1, 2]},
    {"conversation": [{"human": "a", "assistant": "b"}]},
    {"dialog": ["a", "b"], "act": [1, 2]},
    {"train": GOOD, "test": GOOD[:1]},
    {},
]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("value", ROWS_THEMSELVES, ids=json.dumps)
def test_an_object_that_is_a_row_stays_one(tmp_path, value, indent):
    (tmp_path / "a.json").write_text(json.dumps(value, indent=indent))
    assert [row for _, row in file_rows(tmp_path / "a.json", Tally())] == [value]


def test_conversations_in_a_wrapper_are_rows(tmp_path):
    for name, held in (("conversations", [{"messages": CHAT}] * 2), ("messages", [CHAT, CHAT])):
        (tmp_path / "a.json").write_text(json.dumps({name: held}))
        read = [row for _, row in file_rows(tmp_path / "a.json", Tally())]
        assert read == (held if isinstance(held[0], dict) else [{name: CHAT}] * 2)


def test_strings_are_documents_where_all_rows_are(tmp_path):
    (tmp_path / "a.jsonl").write_text('"one"\n"two"\n3\n')
    assert texts_of(tmp_path) == (["one", "two"], {"no-text": 1})


def test_ids_beside_a_conversation_are_no_text(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"id": "x1", "conversations": CHAT}] * 3)
    assert texts_of(tmp_path) == ([], {"no-text-column": 1})


def test_memory_is_flat_over_many_rows(tmp_path, monkeypatch):
    """200 MB of rows, made as they are read: no list of rows, of lines or of text is held."""
    line = json.dumps({"text": "word " * 2000})
    block = {"a.jsonl": f"{line}\n", "a.json": f"[\n{line},\n", "a.csv": "n,text\n"}
    rest = {"a.jsonl": f"{line}\n", "a.json": f"{line},\n", "a.csv": f'1,"{"word " * 2000}"\n'}
    monkeypatch.setattr("corpus.files.refuse_pointer", lambda path: None)
    for name, opening in block.items():

        def made(path, size=None, newline=None, opening=opening, line=rest[name]):
            yield opening
            if not size:
                yield from (line for _ in range(20_000))
            else:
                yield from (line * (1 + size // len(line)) for _ in range(200))

        monkeypatch.setattr("corpus.files.text_parts", made)
        tracemalloc.start()
        count = sum(1 for _ in file_rows(tmp_path / name, Tally()))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count >= 20_000
        assert peak < 32 << 20


NAMES = "x.jsonl x.json x.csv x.tsv x.txt x.html wiki.x.raw x.parquet "
NAMES += "x.jsonl.gz x.txt.bz2 x.txt.xz x.txt.zst"
DAMAGED = [".gz", ".bz2", ".xz", *([".zst", ".parquet"] if find_spec("pyarrow") else [])]


@given(st.binary(max_size=60), st.sampled_from(NAMES.split()))
@settings(max_examples=400, deadline=None)
def test_no_bytes_crash_a_reader(tmp_path_factory, data, name):  # Z1
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(data)
    with contextlib.suppress(UserError):
        documents, tally = read(path)
        assert all(text.encode().decode() == text for text in documents)
        json.dumps(tally.dropped).encode()


@given(st.data(), st.sampled_from(DAMAGED))
@settings(max_examples=150, deadline=None)
def test_no_damage_crashes_a_reader(tmp_path_factory, draws, suffix):
    path = tmp_path_factory.mktemp("fuzz") / f"a.jsonl{suffix}"
    if suffix in PACKERS:
        path.write_bytes(PACKERS[suffix](b"".join(b'{"text": "row %d"}\n' % n for n in range(50))))
    else:
        path = write_table(path.with_name("a.parquet"), {"text": [f"row {n}" for n in range(50)]})
    data = bytearray(path.read_bytes())
    for _ in range(draws.draw(st.integers(1, 3))):
        data[draws.draw(st.integers(0, len(data) - 1))] = draws.draw(st.integers(0, 255))
    path.write_bytes(data[: draws.draw(st.integers(0, len(data)))])
    with contextlib.suppress(UserError):  # a few rows may come before a checksum tells
        assert len(read(path)[0]) <= 100


def test_the_text_column_is_found_or_named_or_asked_for(tmp_path):
    path = tmp_path / "in.jsonl"
    for line in ('{"id": "7", "content": "a"}\n', '{"n": 7, "verse": "a"}\n'):
        path.write_text(line)
        assert texts_of(path)[0] == ["a"]
    path.write_text('{"left": "a", "right": "b"}\n')
    assert texts_of(path, text_column="right")[0] == ["b"]
    for column in ("", "middle"):
        assert texts_of(path, text_column=column) == ([], {"no-text-column": 1})


def test_an_odd_first_row_or_file_decides_nothing(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"comment": "made by hand"}\n{"id": 1, "text": "a"}\n')
    assert texts_of(tmp_path) == (["a"], {"no-text": 1})
    (tmp_path / "a.json").write_text('{"version": "3", "name": "not data"}')
    assert texts_of(tmp_path) == (["a"], {"no-text": 1, "no-text-column": 1})


# --- Encodings ------------------------------------------------------------------------------------

WESTERN = "Caf\u00e9s and the na\u00efve man\u2019s fa\u00e7ade cost \u20ac5.\n"
RUSSIAN = "\u0412\u0441\u0435 \u043b\u044e\u0434\u0438 \u0440\u0430\u0432\u043d\u044b.\n"
JAPANESE = "すべての人間は、生まれながらに.\n"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_byte_order_mark_is_believed(tmp_path, encoding, suffix):
    def encoded(text):
        text = text if encoding == "utf-16" else f"\ufeff{text}"
        return PACKERS[suffix](text.encode(encoding))

    text = (WESTERN + RUSSIAN + "\u0a0a\u0d0a \U0001f600\n") * 3000
    row = json.dumps({"text": RUSSIAN}, ensure_ascii=False)
    (tmp_path / f"a.txt{suffix}").write_bytes(encoded(text))
    (tmp_path / f"b.jsonl{suffix}").write_bytes(encoded(row))
    (tmp_path / f"c.csv{suffix}").write_bytes(encoded(f'id,text\r\n1,"{JAPANESE}"\r\n'))
    documents, bad = texts_of(tmp_path)
    assert "".join(documents[:-2]) == text
    assert (documents[-2:], bad) == ([RUSSIAN, JAPANESE], {})
    if not suffix:
        (tmp_path / "a.txt").write_bytes(encoded("one") + b"\x00")
        assert texts_of(tmp_path / "a.txt")[1] == {"unreadable-file": 1}


@pytest.mark.parametrize(("text", "encoding"), [(RUSSIAN, "koi8-r"), (JAPANESE, "shift-jis")])
def test_lines_that_are_not_utf_8_are_dropped_and_counted_not_turned_to_soup(
    tmp_path, text, encoding
):
    (tmp_path / "a.txt").write_bytes(b"Title\n" + text.encode(encoding) * 40 + b"plain\n")
    documents, tally = read(tmp_path / "a.txt")
    ((_, reason, count, example),) = reasons_of(tally.dropped)
    assert ("".join(documents), reason, count) == ("Title\nplain\n", "not-utf-8", 40)
    assert "line 2: byte 0x" in example


DIRTY = SHARED / "dirty" / "files"


@pytest.mark.skipif(not DIRTY.is_dir(), reason="needs the shared dirty files")
def test_the_dirty_files_are_read_as_their_manifest_expects():
    outcome = {path.name: read(path) for path in sorted(DIRTY.iterdir())}
    for name, (documents, tally) in outcome.items():
        raw, text = (DIRTY / name).read_bytes(), "".join(documents)
        assert "\ufffd" not in text
        if name.startswith("html_"):
            assert len(text) > len(raw) / 10
            assert not any(word in text for word in ("<div", "<script", "function("))
        elif any(w in name for w in ("Latin1", "cp1252", "Cyrillic", "Greek", "EUC", "GB2312")):
            reasons = [reason for _, reason, *_ in reasons_of(tally.dropped)]
            assert reasons == ["not-utf-8"] * (not raw.isascii())
        else:
            assert text == raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
            assert not tally.bad_rows


# --- HTML -----------------------------------------------------------------------------------------

PAGE = """<!DOCTYPE html><html><head><title>A &amp; B</title><style>p > a { color: red }</style>
<script type="text/javascript">if (a < b) document.write("<p>not this</p>");</script></head><body>
<!-- nor > this --><div class="a b">One&nbsp;<b>bold</b>
   line.</div><ul><li>first<li>second</ul><p>2 < 3 &lt;tag&gt; &copy; &#x1F600;
&unknown;<br/>next</p><table><tr><td>a</td><td>b</td></tr></table>end</body></html>"""
TEXT = "A & B/One\u00a0bold line./first/second/2 < 3 <tag> \u00a9 \U0001f600 &unknown;/next/a/b/end"


def test_a_page_becomes_its_text(tmp_path):
    (tmp_path / "a.htm").write_text(PAGE, encoding="utf-8")
    assert texts_of(tmp_path) == ([TEXT.replace("/", "\n\n")], {})
    (tmp_path / "a.htm").write_bytes(b"<p>" + RUSSIAN.encode("koi8-r"))
    assert texts_of(tmp_path) == ([], {"not-utf-8": 1})
    page = '<!doctype html><p title="a > b">x < 5 and y > 3</p><b>b</b>old'
    assert page_text(page) == "x < 5 and y > 3\n\nbold"


class Words(HTMLParser):
    """The words of a page as the standard library sees them."""

    def __init__(self):
        super().__init__()
        self.text, self.unseen = [], 0

    def handle_starttag(self, tag, attributes, step=1):
        self.unseen += step * (tag in ("script", "style"))
        self.text.append(" " * (tag in BLOCKS))

    def handle_endtag(self, tag):
        self.handle_starttag(tag, (), step=-1)

    def handle_data(self, data):
        self.text.append(data * (not self.unseen))


@pytest.mark.skipif(not DIRTY.is_dir(), reason="needs the shared dirty files")
def test_pages_give_the_words_that_html_parser_sees():
    for path in DIRTY.glob("*.html"):
        page, parser = path.read_text(encoding="utf-8"), Words()
        parser.feed(page)
        parser.close()
        ours, theirs = page_text(page).split(), "".join(parser.text).split()
        same = sum((Counter(ours) & Counter(theirs)).values())
        assert same > 0.995 * max(len(ours), len(theirs))


UNITS = '< <a <!-- <! <? </ </a <a" <a"> <a\' & &# &#9 &amp; <script> <svg> <svg/> <pre> </pre>'
UNITS = [*UNITS.split(), "<p>", "<td>", "]]>", "=", '"']


@pytest.mark.parametrize("unit", [*UNITS, " ", "\n", "<a b=", "<script></script "])
def test_a_large_page_of_anything_has_a_text(unit):
    """Not timed here: a quadratic search would take minutes, which is the alarm."""
    for end in ("", '">-->'):
        assert len(page_text(unit * (250_000 // len(unit)) + end)) <= 250_005


# --- WikiText -------------------------------------------------------------------------------------

WIKITEXT = """
 = First article =

 Its first paragraph .
 = = A section = =

 Its second paragraph .

 = Second article =

 Other text .
"""
ARTICLES = [
    "= First article =\n\nIts first paragraph .\n= = A section = =\n\nIts second paragraph .",
    "= Second article =\n\nOther text .",
]


SPACED_ARTICLES = [re.sub("( [.=])\n", r"\1 \n", text) + " " for text in ARTICLES]  # as rows are


def stripped(documents):
    return [text.strip("\n") for text in documents]


def wikitext_rows():
    """The lines as rows of the hub: a blank one is empty, others end in a space."""
    return [f"{line} \n" if line.strip() else "" for line in WIKITEXT.split("\n")[:-1]]


def test_wikitext_lines_become_articles(tmp_path):  # trap B10
    (tmp_path / "wiki.train.raw").write_text(WIKITEXT)
    (tmp_path / "wiki.valid.tokens").write_text(WIKITEXT)
    assert stripped(texts_of(tmp_path)[0]) == ARTICLES * 2


def test_wikitext_rows_become_articles_and_others_stay_documents(tmp_path):
    write_table(tmp_path / "a.parquet", {"text": wikitext_rows()})
    others = [" = Title = \nwith its text", "another", "and another"]
    write_jsonl(tmp_path / "b.jsonl", others)
    assert stripped(texts_of(tmp_path)[0]) == [*SPACED_ARTICLES, *others]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared corpora")
def test_real_wikitext_is_sixty_articles():
    documents, bad = texts_of(SHARED / "wikitext2" / "wiki.valid.raw")
    assert (len(documents), bad) == (60, {})
    assert all(text.startswith("= ") for text in documents)
    kept = "".join(documents).split()
    assert kept == (SHARED / "wikitext2" / "wiki.valid.raw").read_text(encoding="utf-8").split()


# --- The hub --------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A dataset as the hub has them, in a local folder: the package streams it by the same path."""
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder, card = tmp_path / "owner" / "name", "---\nconfigs:\n"
    for config, texts in (("lines", wikitext_rows()), ("pages", [f"page {n}" for n in range(300)])):
        (folder / config).mkdir(parents=True)
        write_table(folder / config / "train-0.parquet", {"id": range(len(texts)), "text": texts})
        test = {"id": [7], "text": [f"the test split of {config}"]}
        write_table(folder / config / "test-0.parquet", test)
        card += f"- config_name: {config}\n  data_files:\n"
        for split in ("train", "test"):
            card += f"  - split: {split}\n    path: {config}/{split}-*\n"
    (folder / "README.md").write_text(f"{card}---\n")
    return folder


def test_hub_datasets_are_streamed_by_config_and_split(hub):  # traps B8, B9, B10
    assert stripped(texts_of(f"hf:{hub}", input_config="lines")[0]) == SPACED_ARTICLES
    assert texts_of(f"hf:{hub}:pages") == ([f"page {n}" for n in range(300)], {})
    assert texts_of(f"hf:{hub}:pages:test") == (["the test split of pages"], {})
    assert len(texts_of(f"hf:{hub}:pages", input_config="pages")[0]) == 300
    assert texts_of(f"hf:{hub}:pages", text_column="words") == ([], {"no-text-column": 1})


def test_a_hub_dataset_out_of_reach_or_breaking_off_is_one_line(hub):
    for path in (f"hf:{hub}-not-there", f"hf:{hub}:other", f"hf:{hub}:pages:validation"):
        refused(r"cannot be read \(.*; check the name and the network", path)
    good = (hub / "pages" / "train-0.parquet").read_bytes()
    (hub / "pages" / "train-1.parquet").write_bytes(good[:400] + b"\0" * 400 + good[800:])
    refused(r":pages: broke off after 300 rows \(", f"hf:{hub}:pages")


SPEECH = [{"content": "Hi", "role": "user"}, {"content": "Hello!", "role": "assistant"}]
OTHER = [SPEECH[0], {"content": "No.", "role": "assistant"}]
PAGE_ROW = {"text": "a page", "id": "<urn:uuid:1>", "dump": "CC-MAIN-2013-20", "url": "http://a.b"}
PAGE_ROW |= {"file_path": "s3://c", "language": "en", "language_score": 0.9, "token_count": 2}
PAIR_ROW = {"prompt": "Hi", "prompt_id": "0a", "chosen": SPEECH, "rejected": OTHER}
HUB = {  # preset: the config and the split of its dataset, and a row with all of its columns
    "datasets/fineweb_edu": ("sample-10BT", "train", PAGE_ROW | {"score": 3.1, "int_score": 3}),
    "datasets/climbmix": ("default", "train", {"text": "a page"}),
    "datasets/tinystories": ("default", "train", {"text": "a page"}),
    "smoltalk_sft": ("default", "train", {"messages": SPEECH, "source": "everyday"}),
    "ultrafeedback_dpo": ("default", "train_prefs", PAIR_ROW
        | {"messages": SPEECH, "score_chosen": 8.0, "score_rejected": 2.5}),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_a_preset_reads_the_columns_of_its_dataset(name, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    config, split, row = HUB[name]
    preset = configs.read_object(ROOT / "configs" / f"{name}.json")
    path = preset.get("input_path", preset.get("dataset_path"))
    folder = tmp_path / path.removeprefix("hf:").partition(":")[0]
    folder.mkdir(parents=True)
    write_table(folder / "rows.parquet", {key: [value, value] for key, value in row.items()})
    card = (
        f"configs:\n- config_name: {config}\n  data_files:\n  - split: {split}\n    path: rows*\n"
    )
    (folder / "README.md").write_text(f"---\n{card}---\n")
    load = datasets.load_dataset
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets, "load_dataset", lambda n, **kw: load(str(tmp_path / n), **kw))
    if name.startswith("datasets/"):
        assert texts_of(path, input_config=preset.get("input_config", "")) == (["a page"] * 2, {})
    elif name.endswith("sft"):
        assert read_chats(path) == [{"messages": SPEECH}] * 2
    else:
        answers = {"chosen": SPEECH[1:], "rejected": OTHER[1:]}
        assert read_pairs(path) == [{"prompt": SPEECH[:1], **answers}] * 2


def test_presets_name_their_datasets():  # traps B8, B9
    names = {
        "fineweb_edu": ("hf:HuggingFaceFW/fineweb-edu", "sample-10BT"),
        "climbmix": ("hf:karpathy/climbmix-400b-shuffle", ""),
        "tinystories": ("hf:roneneldan/TinyStories", ""),
        "demo_tiny": ("hf:Salesforce/wikitext", "wikitext-2-raw-v1"),
        "wikitext103": ("hf:Salesforce/wikitext", "wikitext-103-raw-v1"),
        "openwebtext": ("hf:Skylion007/openwebtext", ""),
        "wikipedia_en": ("hf:wikimedia/wikipedia", "20231101.en"),
        "docstrings": ("docstrings:", ""),
    }
    assert {path.stem for path in (ROOT / "configs" / "datasets").iterdir()} == names.keys()
    for name, source in names.items():
        preset = json.loads((ROOT / "configs" / "datasets" / f"{name}.json").read_text("utf-8"))
        assert (preset["input_path"], preset.get("input_config", "")) == source


@pytest.mark.parametrize(
    ("name", "package"),
    [("a.parquet", "pyarrow"), ("a.jsonl.zst", "pyarrow"), ("hf:a/b", "datasets")],
)
def test_a_package_that_is_not_there_is_named(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a.parquet").write_bytes(b"")
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    path = name if name.startswith("hf:") else tmp_path / name
    refused(f"needs the package {package}: pip install {package}", path)


# --- Mixtures -------------------------------------------------------------------------------------


def mixture_of(tmp_path, sizes, weights, caps=None):
    """Entries of sources of so many documents each, named a, b, c..."""
    entries = []
    for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        name = chr(97 + number)
        path = write_jsonl(tmp_path / f"{name}.jsonl", [f"{name}{n}" for n in range(size)])
        entries.append({"name": name, "input_path": str(path), "weight": weight})
        if caps and caps[number]:
            entries[-1]["max_samples"] = caps[number]
    return tuple(entries)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_any_beginning_of_a_mixture_keeps_its_weights(tmp_path_factory, weights):
    mixture = mixture_of(tmp_path_factory.mktemp("m"), [300] * len(weights), weights)
    counts = Counter()
    for total, (_, text, _) in enumerate(read_documents(Config(mixture=mixture), Tally()), 1):
        counts[text[0]] += 1
        assert text == f"{text[0]}{counts[text[0]] - 1}"  # each source in its own order
        for entry, weight in zip(mixture, weights, strict=True):
            assert abs(counts[entry["name"]] - total * weight / sum(weights)) < 2
        if total == 300:
            break


def test_sources_that_end_or_are_capped_leave_the_others_in_their_proportions(tmp_path):
    mixture = mixture_of(tmp_path, [1000, 1000, 10], [3, 1, 1], caps=[None, 100, None])
    documents, tally = read(mixture=mixture)
    assert documents == read(mixture=mixture)[0]
    assert Counter(text[0] for text in documents) == {"a": 1000, "b": 100, "c": 10}
    middle = Counter(text[0] for text in documents[60:260])  # c has ended, b is not capped yet
    assert middle["c"] == 0
    assert abs(middle["a"] - 150) <= 1
    counts = {"documents": 1000, "bytes": 3890, "weight": 3, "capped": False}
    assert tally.sources["a"] == counts
    assert tally.sources["b"]["capped"]
    assert tally.sources["c"] == {"documents": 10, "bytes": 20, "weight": 1, "capped": False}


def test_entries_have_their_own_columns_configs_and_kinds(tmp_path, hub):
    path = tmp_path / "rows.csv"
    path.write_text("left,right\na,b\n")
    table = {"name": "csv", "input_path": str(path), "text_column": "right", "_note": "a comment"}
    pages = {"name": "hub", "input_path": f"hf:{hub}", "input_config": "pages", "max_samples": 2}
    assert read(mixture=(table, {**pages, "licence": "CC0"}))[0] == ["b", "page 0", "page 1"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"wieght": 1},
            r"mixture\[1\]: unknown key 'wieght'; known are input_path, input_config, text_column",
        ),
        ({"weight": 0}, r"weight must be float > 0, got 0.0 \(mixture\[1\]\)"),
        ({"weight": float("nan")}, "weight must be float > 0, got NaN"),
        ({"weight": "2"}, "weight must be float > 0, got .2"),
        ({"max_samples": 0}, "max_samples must be int >= 1 or none"),
        ({"name": "a"}, "mixture: two sources have the same name"),
        ({"name": ""}, r"mixture\[1\] must be an object with name and input_path"),
        ({"input_path": "/not/there.txt"}, "/not/there.txt: not found"),
        (3, r"mixture\[1\] must be an object with name"),
    ],
)
def test_a_wrong_entry_is_one_line(tmp_path, entry, message):
    first, second = mixture_of(tmp_path, [1, 1], [1, 1])
    mixture = (first, {**second, **entry} if isinstance(entry, dict) else entry)
    refused(message, mixture=mixture)


def test_a_source_of_a_mixture_without_a_document_is_named(tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"a": 1, "b": 2}\n')
    mixture = mixture_of(tmp_path, [1], [1])
    refused("mixture: odd: 0 usable documents .no-text-column.", mixture=(
        *mixture, {"name": "odd", "input_path": str(tmp_path / "odd.jsonl")}))  # fmt: skip


def test_a_mixture_stands_alone(tmp_path):
    mixture = mixture_of(tmp_path, [1, 1], [2, 1])
    refused(r"mixture and one of .* are both given; keep one", "x.txt", mixture=mixture)


# --- What a file holds --------------------------------------------------------------------------

KINDS = {
    "json": [
        '{"text": "a"}\n{"text": "b"}',
        '[{"text": "a"}]',
        '\n{\n "text": "a"\n}',
        '["a", "b"]',
    ],
    "csv": ["id,text\n1,a\n2,b\n", 'id\ttext\n1\t"a\nb"\n2\tc', "id;full text\n1;a, b\n2;c"],
    "text": [
        "Some words, and more.\nOthers, too.\n",
        "{{Infobox}}",
        "[[Link]] text",
        '{"a": 1}\nis JSON.\n',
        "a\nb\n",
        "",
    ],
}
KINDS = [(kind, content) for kind, contents in KINDS.items() for content in contents]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(("kind", "content"), KINDS)
def test_without_a_suffix_the_content_tells(tmp_path, kind, content, suffix):
    for name, other in (("data", "text"), ("data.xyz", None)):
        (tmp_path / f"{name}{suffix}").write_bytes(PACKERS[suffix](content.encode()))
        assert kind_of(tmp_path / f"{name}{suffix}") == (other if kind == "text" else kind)
    (tmp_path / "data.txt").write_text(content)
    assert kind_of(tmp_path / "data.txt") == ("json" if kind == "json" else "text")


def test_a_table_or_a_program_without_a_suffix_is_known(tmp_path):
    write_table(tmp_path / "table", {"text": ["a"]})
    (tmp_path / "program").write_bytes(b"\x7fELF\0\1\0")
    (tmp_path / "script").write_text("#!/bin/sh\necho\n")
    (tmp_path / "a.json5").write_text('{text: "no JSON"}\n')
    kinds = {path.name: kind_of(path) for path in tmp_path.iterdir()}
    assert kinds == {"table": "parquet", "program": "binary", "script": None, "a.json5": "json"}
    assert texts_of(tmp_path) == (["a"], {"unreadable-file": 1})
    refused("program: is not read", tmp_path / "program")


def test_source_code_and_binaries_are_passed_over_and_said(tmp_path):
    for name in ("a.py", "b.py", "c.png", "d.tex", "README", "Makefile.am"):
        (tmp_path / name).write_text(f"the text of {name}\n")
    documents, tally = read(tmp_path)
    assert documents == ["the text of README\n"]
    assert tally.passed_over == {".py": 2, ".png": 1, ".tex": 1, ".am": 1}
    assert tally.lines() == ["files passed over: 1 .am, 1 .png, 2 .py, 1 .tex"]
    (tmp_path / "README").unlink()
    refused("holds no file .*; passed over: 1 .am, 1 .png, 2 .py, 1 .tex", tmp_path)
    assert read(tmp_path / "d.tex")[0] == ["the text of d.tex\n"]


def test_a_pointer_of_git_lfs_is_named_wherever_it_stands(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for name in ("a.parquet", "a.jsonl.gz", "a.txt", "a", "a.unknown", "a.csv"):
        (tmp_path / name).write_text(pointer)
        refused(r"a Git LFS pointer, not the file; run `git lfs pull`", tmp_path / name)
    refused("a Git LFS pointer", tmp_path)


# --- Hostile folders ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", "a.tar.gz a.pdf a.EPUB".split())
def test_what_is_not_read_is_said(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK")
    refused("is not read; unpack it", tmp_path / name)
    refused("holds no file", tmp_path)


BAD_PATHS = ["", "no\0where", "x" * 5000, "~nobody/x", "a/../../../../../nothing.txt", "\udcff"]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_paths_that_cannot_be_are_one_line(path):
    refused(".", path)


@pytest.mark.skipif(os.name == "nt", reason="links, pipes and devices")
def test_hidden_files_linked_folders_and_what_is_no_file_are_passed_over(tmp_path):
    for name in ("in/sub/a.txt", "in/.git/hidden.txt", "in/.b.txt", "elsewhere/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name[-5])
    links = {"loop": ".", "loop2": "..", "z": "../elsewhere", "broken.txt": "nowhere"}
    for name, target in links.items():
        (tmp_path / "in" / name).symlink_to(target)
    os.mkfifo(tmp_path / "in" / "pipe.txt")
    for pattern in ("in", "in/**", "in/**/*.txt"):
        assert texts_of(tmp_path / pattern) == (["a"], {})
    assert texts_of(tmp_path / "in" / ".git" / "*") == (["n"], {})
    for path in (tmp_path / "in" / "pipe.txt", "/dev/zero"):
        refused("not found; give a file", path)


@pytest.mark.parametrize(
    "pattern", ["**/*.txt", "**", "*/**/*.md", "**/b/*", "**/a/**/c*", "a/**.txt", "[ab]/*"]
)
def test_patterns_match_what_glob_matches(tmp_path, pattern):
    for name in ("a", "a/b", "a/b/c", "b", "b/a", "b/a/x.y"):
        (tmp_path / name).mkdir()
        for file in ("a.txt", "c.md", "c.txt"):
            (tmp_path / name / file).write_text(file)
    expected = {
        Path(path)
        for path in glob.glob(str(tmp_path / pattern), recursive=True)
        if os.path.isfile(path)
    }
    assert input_files(str(tmp_path / pattern)) == sorted(expected)
    assert expected


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read")
def test_a_file_that_cannot_be_read_is_counted(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", ["b"])
    (tmp_path / "a.txt").symlink_to("/proc/self/mem")
    (tmp_path / "gone.txt").write_text("soon gone")
    documents = read_documents(Config(str(tmp_path)), tally := Tally())
    (tmp_path / "gone.txt").unlink()
    assert [text for _, text, _ in documents] == ["b"]
    assert tally.dropped["read"]["unreadable-file"]["count"] == 2
    assert (
        "gone.txt: cannot be read: No such file"
        in tally.dropped["read"]["unreadable-file"]["examples"][1]
    )


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_a_name_that_is_no_text_can_be_reported(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")).write_bytes(b"3\n")
    tally = read(tmp_path)[1]
    json.dumps(tally.dropped, ensure_ascii=False).encode()
    assert r"\udcff.jsonl line 1" in tally.dropped["read"]["no-text"]["examples"][0]


def test_memory_stays_bounded_on_hostile_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + b"x" * (100 << 20) + b'"}\n{"text": "good"}')
    (tmp_path / "b.csv").write_bytes(b'text\n"' + (b"unclosed " * 1000 + b"\n") * 3000)
    tracemalloc.start()
    documents, tally = read(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "good" in documents
    assert tally.bad_rows >= 3
    assert peak < 8 * MAX_LINE


# --- This Python's documentation ------------------------------------------------------------------


def test_docstrings_come_by_module_and_class_in_a_fixed_order(tmp_path, monkeypatch):
    package = tmp_path / "pkg"
    (package / "tests").mkdir(parents=True)
    (package / "tests" / "t.py").write_text('"""not this"""')
    (package / "broken.py").write_text('"""x""" (')
    (package / "__init__.py").write_text('"""About pkg."""\ndef f():\n    """Does f."""\n')
    (package / "m.py").write_text(
        'class A:\n    """An A."""\n    def g(self):\n        """Does g.\n\n        Well."""\n'
    )
    (package / "s.py").write_text('"""A lone surrogate: \\ud800."""')
    roots = {"stdlib": tmp_path, "purelib": tmp_path / "none"}
    monkeypatch.setattr("sysconfig.get_path", roots.get)
    monkeypatch.setattr("pydoc_data.topics.topics", {"a": "A topic."})
    documents, bad = texts_of("docstrings:")
    assert documents == [
        "A topic.",
        "pkg\n\nAbout pkg.\n\nf\n\nDoes f.\n\n",
        "pkg.m.A\n\nAn A.\n\ng\n\nDoes g.\n\nWell.\n\n",
    ]
    assert bad == {"unreadable-module": 1, "bad-unicode": 1}
