"""What a file holds: bytes decompressed and decoded, then lines, the text of a page, or rows.

Files are foreign and often hostile. A row that cannot be read is counted by reason in the `Tally`.
A damaged file gives what stands before the damage. Memory stays bounded by MAX_LINE, but for JSON
over several lines and for a page. A decompression bomb and a missing package are UserErrors.
"""

import bz2
import codecs
import csv
import gzip
import html
import importlib.util
import io
import itertools
import json
import lzma
import os
import re
from contextlib import contextmanager

from lib.config import UserError

MAX_LINE = 16 << 20  # characters; a longer line comes in parts of that
BOMB_RATIO, BOMB_FLOOR = 200, 64 << 20  # a file may unfold to 200 times its size, or to 64 MiB
BUFFER = 1 << 20  # bytes or characters read at once


class Tally:
    """Counts what was dropped by stage and reason, each with its first three examples.

    `sources` is what was read of each source. Both stand in stats.json. `unused` has the names of
    columns that nothing reads.
    """

    def __init__(self):
        self.bad_rows, self.sources, self.unused = 0, {}, {}
        self.dropped = {"read": {}, "filter": {}, "dedup": {}}

    def drop(self, stage, reason, where, text=""):
        entry = self.dropped[stage].setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += 1
        if len(entry["examples"]) < 3:  # a file's name may hold bytes that are no text
            example = f"{where}: {text[:100]}" if text else where
            entry["examples"].append(example.encode(errors="backslashreplace").decode())

    def bad(self, reason, where):
        """Counts a row that could not be read at all."""
        self.bad_rows += 1
        self.drop("read", reason, where)


def reasons_of(dropped):
    """Yields each (stage, reason, count, first example) of a Tally's `dropped`."""
    for stage, entries in dropped.items():
        for reason, entry in sorted(entries.items()):
            yield stage, reason, entry["count"], entry["examples"][0]


def until_damaged(items, path, tally):
    """Yields `items` of a file to their end, or to a damage, which is counted."""
    try:
        yield from items
    except OSError as error:
        problem = getattr(error, "strerror", None) or error
        tally.bad("unreadable-file", f"{path}: cannot be read: {problem}")


def refuse_damaged(tally):
    """Raises UserError if a file could not be read to its end."""
    if damage := tally.dropped["read"].get("unreadable-file"):
        raise UserError(damage["examples"][0])


def package(name, user, error=UserError):
    """Returns an optional package's module; raises `error` with the pip command if it is absent."""
    top = name.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        raise error(f"{user} needs the package {top}: pip install {top}")
    return importlib.import_module(name)


def open_zstd(file):
    """Opens a .zst file of a window of at most 128 MiB; a cut one is an error."""
    pyarrow = package("pyarrow", "a .zst file")
    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")
    return io.BufferedReader(stream)  # a small buffer: what it holds is lost at a damage


OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": open_zstd}


@contextmanager
def open_bytes(path):
    """Opens a file as a binary stream, decompressed. Every damage is an OSError."""
    try:
        with open(path, "rb", BUFFER) as file:
            opener = OPENERS.get(path.suffix.lower())
            yield opener(file) if opener else file
    except (OSError, UserError, MemoryError):
        raise
    except Exception as error:  # each library has its own errors for bytes it cannot unpack
        raise OSError(str(error) or type(error).__name__) from None


BYTE_ORDER_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
BYTE_ORDER_MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def surrogate(text):
    """Returns the match of the first lone surrogate or byte that was not UTF-8, if any."""
    if text.isascii() or b"\xed" not in text.encode("utf-8", "surrogatepass"):
        return None  # in UTF-8 they begin with this byte: ten times as fast as the pattern
    return re.search("[\ud800-\udfff]", text)


def text_parts(path, block=None, newline=None):
    """Yields the text of a file in blocks of so many characters, or else in lines.

    A line over MAX_LINE characters comes in parts of that. Lines end in \\n unless newline is "".
    Raises UserError if a file unfolds to far more than its size.
    """
    limit, size = max(BOMB_FLOOR, BOMB_RATIO * os.path.getsize(path)), 0
    with open_bytes(path) as file:
        head = file.peek(4)
        marked = (code for mark, code in BYTE_ORDER_MARKS.items() if head.startswith(mark))
        encoding = next(marked, "utf-8-sig")
        errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
        text = io.TextIOWrapper(file, encoding, errors, newline)
        while part := text.read(block) if block else text.readline(MAX_LINE):
            size += len(part)
            if size > limit:
                raise UserError(f"{path}: decompresses to over {limit:,} bytes; unpack it yourself")
            yield part


def grouped(parts, max_length, is_end=lambda part: False):
    """Joins parts of text up to an end, or to max_length characters; a longer part stays whole."""
    group, size = [], 0
    for part in parts:
        if group and (size + len(part) > max_length or is_end(group[-1])):
            yield "".join(group)
            group, size = [], 0
        group.append(part)
        size += len(part)
    if group:
        yield "".join(group)


def text_of(path):
    """Returns the whole text of a file in UTF-8; UserError for other bytes or a damaged file."""
    tally = Tally()
    text = "".join(until_damaged(text_parts(path, BUFFER, newline=""), path, tally))
    refuse_damaged(tally)
    if surrogate(text):
        raise UserError(f"{path}: not UTF-8; convert it")
    return text


def decoded_lines(path, tally):
    """Yields (number, line) of a text in UTF-8; a line that is not is counted and dropped."""
    for number, line in enumerate(text_parts(path), start=1):
        if byte := surrogate(line):
            problem = f"byte {ord(byte[0]) & 255:#04x} is not UTF-8; convert the file"
            tally.bad("not-utf-8", f"{path} line {number}: {problem}")
        else:
            yield number, line


# Python 3.11's html.parser takes seconds for 20 kB of "<a ". These patterns never fail once they
# have begun, so that every character is looked at once.
HIDDEN = re.compile(r"(?is)<!--.*?(?:-->|\Z)|<(script|style)\b.*?(?:</\1|\Z)[^>]*>?")
TAG = re.compile(r'<(?:/?([A-Za-z]\w*)|[!?])(?:[^<>"]++|"[^"<]{0,1000}")*+>')
BLOCKS = "p div br h1 h2 h3 h4 h5 h6 li dt dd tr td th pre blockquote section article main title hr"
BLOCKS = {*BLOCKS.split(), *"header footer nav aside form figure caption table ul ol dl".split()}
LONG_ENTITY = re.compile("&#(?:[0-9]{8,}|[xX][0-9a-fA-F]{7,});?")  # html.unescape may raise


def page_text(page):
    """Returns the visible text of a HTML page; each block becomes a paragraph."""
    page = re.sub(r"\s+", " ", HIDDEN.sub("", page))
    page = TAG.sub(lambda tag: "\n" if (tag[1] or "").lower() in BLOCKS else "", page)
    page = html.unescape(LONG_ENTITY.sub("", page))
    return "\n\n".join(filter(None, map(str.strip, page.split("\n"))))


def rows(path, tally):
    """Yields (where, row) of a file of rows; a file whose name does not tell is taken for JSON."""
    reader = ROW_READERS.get(kind_of(path), json_rows)
    return until_damaged(reader(path, tally), path, tally)


DECODER = json.JSONDecoder(parse_constant=lambda name: None)  # NaN and Infinity are null
SEPARATORS = re.compile(r"[ \t\n,]*")


def json_value(text, start=0):
    """Returns (value, its end) at a place of a text, or (None, None) where no JSON stands."""
    try:
        return DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, None


def whole_json(text):
    """Returns the JSON value that a text is from end to end, or None."""
    value, end = json_value(text)
    return value if end == len(text) else None


def json_rows(path, tally):
    """Yields (where, value) of a JSON list, of one value a line, or of objects over several lines.

    The first two lines tell, for suffixes mislead. A line that is a list of messages is a row.
    """
    lines = filter(None, map(str.strip, text_parts(path)))
    first, second = next(lines, ""), next(lines, "")
    value = whole_json(first)
    if isinstance(value, list):
        message = value[0] if value else None
        by_line = second or (isinstance(message, dict) and message.keys() & {"role", "from"})
    else:
        opens = first[:1] == "[" or (first[:1] == "{" and len(first) < MAX_LINE - 1)
        goes_on = first in ("[", "{") or first.endswith(",") or whole_json(second) is None
        by_line = value is not None or not (opens and goes_on)
    yield from (json_lines if by_line else json_stream)(path, tally)


def json_lines(path, tally):
    for number, line in enumerate(text_parts(path), start=1):
        line = line.strip(" \t\n")
        value, end = json_value(line)
        if end == len(line) and not surrogate(line):
            yield f"{path} line {number}", value
        elif line:
            tally.bad("not-utf-8" if surrogate(line) else "not-json", f"{path} line {number}")


def json_stream(path, tally):
    """Yields (where, element) of a JSON list, or values one after another; reads the file whole.

    Raises OSError where it breaks off, and for text behind the list.
    """
    text = "".join(text_parts(path, BUFFER)).strip()
    last = "]" if text.startswith("[") else ""
    number, end = 0, len(last)
    while end is not None:
        start = SEPARATORS.match(text, end).end()
        value, end = json_value(text, start)
        if end is not None:
            number += 1
            yield f"{path} element {number}", value
    if text[start:] != last:
        raise OSError(f"its JSON stops after {number} elements: it is broken, or text follows it")


def csv_rows(path, tally):
    """Yields (where, row) of a CSV file, each an object; its header line tells the delimiter."""
    csv.field_size_limit(MAX_LINE)
    lines = (line for _, line in decoded_lines(path, tally))
    header = next(lines, "")
    delimiter = max(",;\t|", key=header.count)
    reader = csv.DictReader(itertools.chain([header], lines), delimiter=delimiter, strict=True)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            tally.bad("not-csv", f"{path} line {reader.line_num}: {error}")
            continue
        if row is None:
            return
        where = f"{path} line {reader.line_num}"
        if None in row:
            tally.bad("not-csv", f"{where}: more cells than the header; put text in quotes")
        else:
            yield where, row


def parquet_rows(path, tally):
    """Yields (where, row) of a .parquet file, read piece by piece."""
    parquet = package("pyarrow.parquet", "a .parquet file")
    with open_bytes(path) as file:
        table = parquet.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False)
        batches = table.iter_batches(64, use_threads=False)  # rows held at once
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, row in enumerate(rows, start=1):
            yield f"{path} row {number}", row


ROW_READERS = {"json": json_rows, "jsonl": json_rows, "csv": csv_rows, "tsv": csv_rows}
ROW_READERS["parquet"] = parquet_rows
SUFFIXES = {".txt": "text", ".md": "text", ".html": "html", ".htm": "html"}
SUFFIXES |= {f".{kind}": kind for kind in ROW_READERS}


def inner_path(path):
    """Returns the path of a file without the suffix of its compression."""
    return path.with_suffix("") if path.suffix.lower() in OPENERS else path


def kind_of(path):
    """Returns how to read a file, by its suffix; None if the suffix does not tell."""
    inner = inner_path(path)
    if inner.name.startswith("wiki.") and inner.suffix in (".raw", ".tokens"):
        return "wikitext"
    return SUFFIXES.get(inner.suffix.lower())
