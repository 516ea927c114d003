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
from functools import lru_cache, partial
from importlib.util import find_spec

from lib.config import UserError

MAX_LINE = 16 << 20  # characters; a longer line, page or JSON value is dropped, never held whole
BOMB_RATIO, BOMB_FLOOR = 200, 64 << 20  # a file may unfold to 200 times its size, or to 64 MiB
BUFFER = 1 << 20  # bytes or characters read at once
JUDGED = 1 << 16  # characters by which a file that is not UTF-8 is judged
BATCH_ROWS = 64  # of a table, held at once


class Tally:
    """Counts by stage and reason, each with its first three examples: the content of stats.json.

    `notes` are counted the same way, but nothing was dropped. `sources` holds for each source the
    documents and bytes of text read, its weight, and whether max_samples capped it or it ended.
    """

    def __init__(self):
        self.documents = self.bad_rows = self.kept = self.closed_bytes = 0
        self.dropped, self.notes, self.sources = {"read": {}, "filter": {}, "dedup": {}}, {}, {}
        self.open_files = {}  # file -> its size

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

    @property
    def read_bytes(self):
        """How far the input files were read, in bytes on disk; a closed file counts whole."""
        for file in [file for file in self.open_files if file.closed]:
            self.closed_bytes += self.open_files.pop(file)
        return self.closed_bytes + sum(file.tell() for file in self.open_files)


def count_example(entries, reason, example):
    entry = entries.setdefault(reason, {"count": 0, "examples": []})
    entry["count"] += 1
    if len(entry["examples"]) < 3:  # a file's name may hold bytes that are no text
        entry["examples"].append(example.encode(errors="backslashreplace").decode())


# --- Bytes ----------------------------------------------------------------------------------------


class Damaged(OSError):
    """A file that breaks off, or whose bytes are not what its name says."""


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


class ZstdFile(io.RawIOBase):
    """All frames of a .zst file; raises EOFError for a cut one, which zstandard takes for whole."""

    def __init__(self, file):
        window = 1 << 31  # bytes: the largest, which `zstd --long=31` asks for
        zstandard = package("zstandard", "a .zst file")
        self.new = zstandard.ZstdDecompressor(max_window_size=window).decompressobj
        self.file, self.frame, self.rest = file, None, b""

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.rest:
            ended = self.frame is None or self.frame.eof
            data = (self.frame.unused_data if self.frame and ended else b"") or self.file.read(2048)
            if not data and not ended:
                raise EOFError("the file ended before the end of its last frame")
            if not data:
                return 0
            self.frame = self.new() if ended else self.frame
            self.rest = memoryview(self.frame.decompress(data))  # 2 KiB unfold to 64 MiB at most
        size = min(len(buffer), len(self.rest))
        buffer[:size], self.rest = self.rest[:size], self.rest[size:]
        return size


OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
OPENERS[".zst"] = lambda file: io.BufferedReader(ZstdFile(file), BUFFER)


@contextmanager
def open_bytes(path, tally=None):
    """Opens a file as a binary stream, decompressed. Every damage is an OSError."""
    try:
        with open(path, "rb", BUFFER) as file:
            if tally is not None:
                tally.open_files[file] = os.path.getsize(path)
            opener = OPENERS.get(path.suffix.lower())
            yield opener(file) if opener else file
    except (OSError, UserError, MemoryError):
        raise
    except Exception as error:  # each library has its own errors for bytes it cannot unpack
        raise Damaged((str(error).splitlines() or [type(error).__name__])[0]) from None


def bounded(items, path, size_of=len):
    """Yields `items` of a file; raises UserError if they unfold to more than the file may."""
    limit, size = max(BOMB_FLOOR, BOMB_RATIO * os.path.getsize(path)), 0
    for item in items:
        size += size_of(item)
        if size > limit:
            what = f"over {limit:,} bytes, {BOMB_RATIO} times its size"
            raise UserError(f"{path}: decompresses to {what}; unpack it if that is right")
        yield item


# --- Text -----------------------------------------------------------------------------------------

BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig"}
BYTE_ORDER_MARKS |= {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
}  # utf-16's begin these
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


def pieces(path, tally=None, newline=None):
    """Yields the text of a file in lines; a line over MAX_LINE characters comes in pieces of that.

    Lines end in \\n, whatever they end in on disk, unless `newline` is "".
    """
    with open_bytes(path, tally) as file:
        head = file.peek(4)
        encoding = next(
            (BYTE_ORDER_MARKS[mark] for mark in BYTE_ORDER_MARKS if head.startswith(mark)), "utf-8"
        )
        errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
        text = io.TextIOWrapper(file, encoding, errors, newline)
        yield from bounded(iter(partial(text.readline, MAX_LINE), ""), path)


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
    text = "".join(until_damaged(pieces(path, newline=""), partial(refuse_damaged, path)))
    if byte := surrogate(text):
        offset = len(text[: byte.start()].encode())
        raise UserError(f"{path}: byte {ord(byte[0]) & 255:#04x} at offset {offset}: not UTF-8")
    return text


def numbered_lines(path, tally, parts):
    """Yields (number, line) of the pieces of a text; counts and drops a line over MAX_LINE."""
    number, whole = 0, True
    for line in parts:
        begins, whole = whole, len(line) < MAX_LINE or line.endswith("\n")
        number += begins
        if begins and whole:
            yield number, line
        elif begins:
            tally.bad("line-over-16-MiB", f"{path} line {number}")


def decoded_lines(path, tally):
    """Yields (number, line) of a text; lines that are not UTF-8 as `encoding_from` judges them."""
    encoding = None
    for number, line in numbered_lines(path, tally, pieces(path, tally)):
        if byte := surrogate(line):
            encoding = encoding or encoding_from(path, number)
            where = f"{path} line {number}: byte {ord(byte[0]) & 255:#04x}: not UTF-8"
            if encoding == "unknown":
                return tally.bad("not-utf-8", f"{where}; the file is dropped from here on")
            line = line.translate(CP1252) if encoding == "cp1252" else line
            if surrogate(line):
                tally.bad("not-utf-8", where)
                continue
            tally.note("decoded-as-cp1252", where)
        yield number, line


def encoding_from(path, first):
    """Returns the encoding from line `first` on, the first that is not UTF-8.

    It is "cp1252" (Western: letters, few of them accented, hardly ever three in a row, which in
    Cyrillic, Greek or the East is the rule), "damaged" (few such lines) or "unknown". Polish in its
    own single bytes looks Western too: hence the note. charset-normalizer is right on whole files,
    but takes short KOI8-R for cp1251 and cp1252 for cp1250, and misread is worse than dropped.
    """
    lines = numbered_lines(path, Tally(), pieces(path))
    following = (line for number, line in lines if number >= first)
    lines, size = [], 0
    while size < JUDGED and (line := next(following, "")):
        lines.append(line)
        size += len(line)
    strays = list(filter(surrogate, lines))
    text = "".join(strays).translate(CP1252)
    plain = sum(map(len, re.findall("[A-Za-z]+", text)))
    runs = [len(run) for run in re.findall("[^\0-\x7f]+", re.sub("([^\0-\x7f])\\1+", r"\1", text))]
    accented, in_rows = sum(runs), sum(run for run in runs if run > 2)
    no_text = re.search("[\0-\x07\x0e-\x1a\x1c-\x1f\ud800-\udfff]", text)
    if not no_text and accented <= 0.5 * plain and in_rows <= 0.1 * accented:
        return "cp1252"
    return "unknown" if len(strays) > max(1, len(lines) / 10) else "damaged"


# --- Pages of HTML --------------------------------------------------------------------------------

# Python 3.11's html.parser takes seconds for 20 kB of "<a ". These patterns never fail once they
# have begun, so that every character is looked at once.
HIDDEN = re.compile(
    r"(?is)<!--.*?(?:-->|\Z)|<(script|style|template)\b.*?(?:</\1|\Z)[^>]*>?"
    r"|<svg\b(?![^<>]{0,1000}/>).*?(?:</svg|\Z)[^>]*>?"
)
PRE = re.compile(r"(?is)(<pre\b.*?(?:</pre[^>]*>?|\Z))")
TAG = re.compile(r'</?([a-zA-Z][a-zA-Z0-9]*)(?:[^">]++|"[^"<]{0,1000}"|")*+>?|<[!?][^>]*>?')
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
        part = TAG.sub(lambda tag: gap_of((tag[1] or "").lower()), part)
        part = html.unescape(LONG_ENTITY.sub("", part))
        if not preformatted:
            part = re.sub(" ?\n ?", "\n", re.sub(r"[^\S\n]+", " ", part)).lstrip(" ")
        parts[number] = part
    lines = (line.rstrip() for line in "".join(parts).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


@lru_cache
def gap_of(name):
    """Returns the white space that a tag of this name stands for."""
    if re.fullmatch("p|h[1-6]|blockquote|pre|table|[uod]l|section|article|main|hr", name):
        return "\n\n"
    lines = "div|br|li|tr|d[td]|title|option|header|footer|nav|aside|caption|figure|form"
    return "\n" if re.fullmatch(lines, name) else " " * (name in ("td", "th"))


# --- Rows -----------------------------------------------------------------------------------------


def rows(path, tally, column=None):
    """Yields (where, row) of a file of rows; a file whose name does not tell is taken for JSON.

    `column`: of a table only the column of text is read; see choose_column.
    """
    kind = kind_of(path)
    if kind == "parquet":
        return parquet_rows(path, tally, column)
    return ROW_READERS.get(kind, json_rows)(path, tally)


DECODER = json.JSONDecoder(parse_constant=lambda name: None)  # NaN and Infinity are null
SEPARATORS = re.compile(r"[ \t\n,]*")


def json_value(text, start=0):
    """Returns (value, its end, None), or (None, start, why there is none) at a place of a text."""
    try:
        return *DECODER.raw_decode(text, start), None
    except (ValueError, RecursionError) as error:
        return None, start, "too-deep" if isinstance(error, RecursionError) else "not-json"


def whole_json(text):
    """Returns the JSON value that a text is from end to end, or None."""
    value, end, _ = json_value(text)
    return value if end == len(text) else None


def json_rows(path, tally):
    """Yields (where, value) of a JSON list, of one value a line, or of objects over several lines.

    The first two lines tell, for suffixes mislead. A line that is a list of messages is a row.
    """
    parts, head, lines = pieces(path, tally), [], []
    while len(lines) < 2 and len(head) < 1000 and (part := next(parts, "")):
        head.append(part)
        lines += [part.strip()] if part.strip() else []
    first, second = (*lines, "", "")[:2]
    value, parts = whole_json(first), itertools.chain(head, parts)
    if isinstance(value, list):
        message = value[0] if value else None
        one_a_line = second or (isinstance(message, dict) and message.keys() & {"role", "from"})
    else:
        opens = first.startswith("[") or (first.startswith("{") and len(first) < MAX_LINE - 1)
        goes_on = first in ("[", "{") or first.endswith(",") or whole_json(second) is None
        one_a_line = value is not None or not (opens and goes_on)
    yield from (json_lines if one_a_line else json_stream)(path, tally, parts)


def json_lines(path, tally, parts):
    for number, line in numbered_lines(path, tally, parts):
        if not (line := line.strip(" \t\n")):
            continue
        value, end, problem = json_value(line)
        problem = "not-utf-8" if surrogate(line) else problem or ("not-json" if line[end:] else "")
        if problem:
            tally.bad(problem, f"{path} line {number}")
        else:
            yield f"{path} line {number}", value


def json_stream(path, tally, parts):
    """Yields (where, element) of a JSON list, or values one after another; holds one at a time.

    Raises Damaged where it breaks off, at an element over MAX_LINE, and for text behind the list.
    """
    buffer, number, last = "", 0, None
    for part in itertools.chain(grouped(parts, BUFFER), [""]):  # "" is the end
        buffer += part
        if last is None:
            buffer = buffer.lstrip()
            last = "]" if buffer.startswith("[") else ""
            buffer = buffer.removeprefix("[")
        start = 0
        while True:
            start = SEPARATORS.match(buffer, start).end()
            value, end, problem = json_value(buffer, start)
            if problem or (end == len(buffer) and part):  # it may go on in the next part
                break
            number += 1
            yield f"{path} element {number}", value
            start = end
        buffer = buffer[start:]
        if len(buffer) > MAX_LINE:
            break
    if buffer.rstrip() != last:
        behind = last and buffer.startswith(last)
        why = "text follows its end" if behind else "it is broken, or an element is over 16 MiB"
        raise Damaged(f"its JSON stops after {number} elements: {why}")


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


def parquet_rows(path, tally, column=None):
    """Yields (where, row) of a .parquet file, read piece by piece; for `column` see `rows`."""
    parquet = package("pyarrow.parquet", "a .parquet file")
    with open_bytes(path, tally) as file:
        table = parquet.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False)
        names = None if column is None else [text_column(path, table.schema_arrow, column)]
        batches = table.iter_batches(BATCH_ROWS, columns=names, use_threads=False)
        rows = bounded(itertools.chain.from_iterable(map(batch_rows, batches)), path, characters)
        for number, row in enumerate(rows, start=1):
            if isinstance(row, Exception):
                tally.bad("unreadable-row", f"{path} row {number}: {row}")
            else:
                yield f"{path} row {number}", row


def characters(row):
    values = row.values() if isinstance(row, dict) else ()
    return sum(len(value) for value in values if isinstance(value, str))


def batch_rows(batch):
    """Returns the rows of a record batch; an error in place of one that Python cannot hold."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:  # bytes that are not UTF-8, the year 20,000
        if len(batch) == 1:
            return [error]
        return [row for number in range(len(batch)) for row in batch_rows(batch.slice(number, 1))]


def text_column(path, schema, column):
    """Returns the name of a table's column of text."""
    is_text = re.compile(r"(dictionary<values=)?(large_)?string(_view)?\b.*")
    texts = [field.name for field in schema if is_text.fullmatch(str(field.type))]
    return choose_column(column, path, texts, schema.names)


USUAL = ("text", "content", "document", "article", "body", "passage", "markdown")


def choose_column(column, where, texts, names):
    """Returns which of a row's columns `names` is its text; `texts` are those that hold text.

    `column` if given, else a usual one, else the only one. Raises NoColumn.
    """
    for name in [column] if column else [*USUAL, *(texts if len(texts) == 1 else ())]:
        if name in texts:
            return name
    columns = ", ".join(map(str, names))[:200] or "no columns at all"
    what = "no column that is surely the text"
    if column:
        what = f"no column '{column}'{' of text' if column in names else ''}"
    raise NoColumn(f"{where}: {what} among {columns}; name it with --text_column=NAME")


# --- Names ----------------------------------------------------------------------------------------

ROW_READERS = {"json": json_rows, "jsonl": json_rows, "csv": csv_rows, "parquet": parquet_rows}
ROW_READERS["tsv"] = partial(csv_rows, delimiters="\t,;|")
SUFFIXES = {".txt": "text", ".md": "text", ".html": "html", ".htm": "html"}
SUFFIXES |= {f".{kind}": kind for kind in ROW_READERS}
PACKAGES = {".zst": "zstandard", ".parquet": "pyarrow.parquet"}


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


def check_packages(files):
    """Raises UserError if a package that one of the files needs is not installed."""
    for suffix in sorted({path.suffix.lower() for path in files} & PACKAGES.keys()):
        package(PACKAGES[suffix], f"a {suffix} file")
