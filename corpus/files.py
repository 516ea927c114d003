"""What a file holds: bytes decompressed and decoded, then lines, the text of a page, or rows.

Files are foreign and often hostile. A row that cannot be read is counted by reason in the `Tally`.
A damaged file gives what stands before the damage, then raises an OSError. Memory stays bounded by
MAX_LINE and BOMB_FLOOR. A decompression bomb and a missing package are UserErrors.
"""

import bz2
import codecs
import csv
import gzip
import html
import importlib
import io
import itertools
import json
import lzma
import os
import re
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec

from lib.config import UserError

MAX_LINE = 16 << 20  # characters; a longer line, page or JSON value is dropped, never held whole
BOMB_RATIO, BOMB_FLOOR = 200, 64 << 20  # a file may unfold to 200 times its size, or to 64 MiB
BUFFER = 1 << 20  # bytes or characters read at once
JUDGED = 1 << 16  # characters by which a file that is not UTF-8 is judged
BATCH_ROWS = 64  # of a table, held at once


class Tally:
    """Counts by stage and reason, each with its first three examples: the content of stats.json.

    `notes` are counted the same way, but nothing was dropped; `sources` is what was read of each.
    """

    def __init__(self):
        self.documents = self.bad_rows = self.kept = 0
        self.dropped, self.notes, self.sources = {"read": {}, "filter": {}, "dedup": {}}, {}, {}

    def drop(self, stage, reason, where, text=""):
        count_example(self.dropped[stage], reason, f"{where}: {text[:100]}" if text else where)

    def bad(self, reason, where):
        """Counts a row that could not be read at all."""
        self.bad_rows += 1
        self.drop("read", reason, where)

    def note(self, reason, where):
        """Counts a change that a reader made to a row and that its user should know of."""
        count_example(self.notes, reason, where)

    def reasons(self):
        """Yields each (stage, reason, count, first example)."""
        for stage, entries in self.dropped.items():
            for reason, entry in sorted(entries.items()):
                yield stage, reason, entry["count"], entry["examples"][0]


def count_example(entries, reason, example):
    entry = entries.setdefault(reason, {"count": 0, "examples": []})
    entry["count"] += 1
    if len(entry["examples"]) < 3:  # a file's name may hold bytes that are no text
        entry["examples"].append(example.encode(errors="backslashreplace").decode())


class NoColumn(UserError):
    """Rows without a column that could be the text."""


def until_damaged(items, give_up):
    """Yields `items` of a file to their end, or to a damage, which give_up(error) handles."""
    try:
        yield from items
    except (OSError, NoColumn) as error:
        give_up(error)


def refuse_damaged(path, error):
    raise UserError(f"{path}: cannot be read: damaged, or not permitted ({error})") from None


def package(name, user, error=UserError):
    """Returns an optional package's module; raises `error` with the pip command if it is absent."""
    top = name.partition(".")[0]
    if find_spec(top) is None:
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


def bounded(items, path, size_of=len):
    """Yields `items` of a file; raises UserError if they unfold to more than the file may."""
    limit, size = max(BOMB_FLOOR, BOMB_RATIO * os.path.getsize(path)), 0
    for item in items:
        size += size_of(item)
        if size > limit:
            raise UserError(f"{path}: decompresses to over {limit:,} bytes; unpack it yourself")
        yield item


BYTE_ORDER_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
BYTE_ORDER_MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
# A byte that is not UTF-8 is read as \udc80 to \udcff; here is its character in cp1252, if any.
CP1252 = {0xDC00 + byte: bytes([byte]).decode("cp1252", "ignore") for byte in range(128, 256)}
CP1252 = {escape: char for escape, char in CP1252.items() if char}
SURROGATES = re.compile("[\ud800-\udfff]")


def surrogate(text):
    """Returns the match of the first lone surrogate or byte that was not UTF-8, if any."""
    if text.isascii() or b"\xed" not in text.encode("utf-8", "surrogatepass"):
        return None  # in UTF-8 they begin with this byte: ten times as fast as the pattern
    return SURROGATES.search(text)


def text_parts(path, block=None, newline=None):
    """Yields the text of a file in blocks of so many characters, or else in lines.

    A line over MAX_LINE characters comes in parts of that. Lines end in \\n unless newline is "".
    """
    with open_bytes(path) as file:
        head = file.peek(4)
        marked = (code for mark, code in BYTE_ORDER_MARKS.items() if head.startswith(mark))
        encoding = next(marked, "utf-8-sig")
        errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
        text = io.TextIOWrapper(file, encoding, errors, newline)
        read = partial(text.read, block) if block else partial(text.readline, MAX_LINE)
        yield from bounded(iter(read, ""), path)


def grouped(parts, max_length, is_end=lambda part: False):
    """Joins parts of text up to an end, or to max_length characters; a longer part stays whole."""
    group, size = [], 0
    for part in parts:
        if group and size + len(part) > max_length:
            yield "".join(group)
            group, size = [], 0
        group.append(part)
        size += len(part)
        if is_end(part):
            yield "".join(group)
            group, size = [], 0
    if group:
        yield "".join(group)


def text_of(path):
    """Returns the whole text of a file in UTF-8; UserError for other bytes or a damaged file."""
    parts = text_parts(path, block=BUFFER, newline="")
    text = "".join(until_damaged(parts, partial(refuse_damaged, path)))
    if surrogate(text):
        raise UserError(f"{path}: not UTF-8; convert it")
    return text


def numbered_lines(path, tally):
    """Yields (number, line) of a text; counts and drops a line over MAX_LINE."""
    number, whole = 0, True
    for line in text_parts(path):
        begins, whole = whole, len(line) < MAX_LINE or line.endswith("\n")
        number += begins
        if begins and whole:
            yield number, line
        elif begins:
            tally.bad("line-over-16-MiB", f"{path} line {number}")


def decoded_lines(path, tally):
    """Yields (number, line) of a text; lines that are not UTF-8 in cp1252, or else not at all."""
    western = None
    for number, line in numbered_lines(path, tally):
        if byte := surrogate(line):
            western = is_western(path, number) if western is None else western
            line = line.translate(CP1252) if western else line
            where = f"{path} line {number}: byte {ord(byte[0]) & 255:#04x}: not UTF-8"
            if surrogate(line):
                tally.bad("not-utf-8", where)
                continue
            tally.note("decoded-as-cp1252", where)
        yield number, line


def is_western(path, first):
    """Returns whether the lines from `first` on, the first that is not UTF-8, are text in cp1252.

    Western text has letters, few of them accented, and hardly ever three such in a row, which in
    Cyrillic, Greek or the East is the rule. Polish in its own single bytes looks Western too: hence
    the note. charset-normalizer is right on whole files, but takes short KOI8-R for cp1251 and
    cp1252 for cp1250, and misread is worse than dropped.
    """
    lines = (line for number, line in numbered_lines(path, Tally()) if number >= first)
    text, size = "", 0
    while size < JUDGED and (line := next(lines, "")):
        text += line.translate(CP1252) if surrogate(line) else ""
        size += len(line)
    plain = sum(map(len, re.findall("[A-Za-z]+", text)))
    runs = [len(run) for run in re.findall("[^\0-\x7f]+", re.sub("([^\0-\x7f])\\1+", r"\1", text))]
    accented, in_rows = sum(runs), sum(run for run in runs if run > 2)
    no_text = re.search("[\0-\x07\x0e-\x1a\x1c-\x1f\ud800-\udfff]", text)
    return not no_text and accented <= 0.5 * plain and in_rows <= 0.1 * accented


# Python 3.11's html.parser takes seconds for 20 kB of "<a ". These patterns never fail once they
# have begun, so that every character is looked at once.
HIDDEN = re.compile(
    r"(?is)<!--.*?(?:-->|\Z)|<(script|style|template)\b.*?(?:</\1|\Z)[^>]*>?"
    r"|<svg\b(?![^<>]{0,1000}/>).*?(?:</svg|\Z)[^>]*>?"
)
PRE = re.compile(r"(?is)(<pre\b.*?(?:</pre[^>]*>?|\Z))")
TAG = re.compile(r'</?([a-zA-Z][a-zA-Z0-9]*)(?:[^">]++|"[^"<]{0,1000}"|")*+>?|<[!?][^>]*>?')
BLOCKS = "p h1 h2 h3 h4 h5 h6 blockquote pre table ul ol dl section article main hr"
LINES = "div br li tr dd dt title option header footer nav aside caption figure form"
GAPS = dict.fromkeys(BLOCKS.split(), "\n\n") | dict.fromkeys(LINES.split(), "\n")
GAPS |= {"td": " ", "th": " "}  # the white space that a tag stands for
LONG_ENTITY = re.compile("&#(?:[0-9]{8,}|[xX][0-9a-fA-F]{7,});?")  # html.unescape may raise


def page_lines(path, tally):
    """Yields (number, line) of the text of a HTML page."""
    lines, size = [], 0
    for _, line in decoded_lines(path, tally):
        size += len(line)
        if size > MAX_LINE:
            return tally.bad("page-over-16-MiB", str(path))
        lines.append(line)
    yield from enumerate(io.StringIO(page_text("".join(lines))))


def page_text(page):
    """Returns the visible text of a HTML page, with white space as a browser shows it."""
    parts = PRE.split(HIDDEN.sub("", page))
    for number, part in enumerate(parts):
        preformatted = number % 2
        part = part if preformatted else re.sub(r"\s+", " ", part)
        part = TAG.sub(lambda tag: GAPS.get((tag[1] or "").lower(), ""), part)
        part = html.unescape(LONG_ENTITY.sub("", part))
        if not preformatted:
            part = re.sub(" ?\n ?", "\n", re.sub(r"[^\S\n]+", " ", part)).lstrip(" ")
        parts[number] = part
    lines = (line.rstrip() for line in "".join(parts).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def rows(path, tally):
    """Yields (where, row) of a file of rows; a file whose name does not tell is taken for JSON."""
    return ROW_READERS.get(kind_of(path), json_rows)(path, tally)


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
    for number, line in numbered_lines(path, tally):
        line = line.strip(" \t\n")
        value, end = json_value(line)
        if end == len(line) and not surrogate(line):
            yield f"{path} line {number}", value
        elif line:
            tally.bad("not-utf-8" if surrogate(line) else "not-json", f"{path} line {number}")


def json_stream(path, tally):
    """Yields (where, element) of a JSON list, or values one after another; holds one at a time.

    Raises OSError where it breaks off, at an element over MAX_LINE, and for text behind the list.
    """
    blocks, number = text_parts(path, BUFFER), 0
    buffer = next(blocks, "").lstrip()
    last = "]" if buffer.startswith("[") else ""
    buffer = buffer.removeprefix("[")
    for block in itertools.chain(blocks, [""]):
        end = 0
        while end is not None:
            start = SEPARATORS.match(buffer, end).end()
            value, end = json_value(buffer, start)
            if end is not None:
                number += 1
                yield f"{path} element {number}", value
        buffer = buffer[start:] + block
        if len(buffer) > MAX_LINE:
            break
    if buffer.rstrip() != last:
        why = "it is broken, text follows its end, or an element is over 16 MiB"
        raise OSError(f"its JSON stops after {number} elements: {why}")


def csv_rows(path, tally, delimiters=",;\t|"):
    """Yields (where, row) of a CSV file, each an object; its header line tells the delimiter."""
    csv.field_size_limit(MAX_LINE)
    lines = (line for _, line in decoded_lines(path, tally))
    header = next(lines, "")
    delimiter = max(delimiters, key=header.count)
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
        batches = table.iter_batches(BATCH_ROWS, use_threads=False)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, row in enumerate(bounded(rows, path, characters), start=1):
            yield f"{path} row {number}", row


def characters(row):
    return sum(len(value) for value in row.values() if isinstance(value, str))


ROW_READERS = {"json": json_rows, "jsonl": json_rows, "csv": csv_rows, "parquet": parquet_rows}
ROW_READERS["tsv"] = partial(csv_rows, delimiters="\t,;|")
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
    kind = SUFFIXES.get(inner.suffix.lower())
    return None if kind == "parquet" and inner != path else kind
