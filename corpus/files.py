"""What a file holds: bytes decompressed and decoded, then lines, the text of a page, or rows.

Files are foreign and often hostile. A row that cannot be read is counted by reason in the `Tally`.
A damaged file gives what stands before the damage. Memory stays bounded by MAX_LINE, but for one
JSON value over several lines and for a page. A decompression bomb, a missing package and a Git LFS
pointer are UserErrors.
"""

import bz2
import codecs
import csv
import gzip
import importlib.util
import io
import json
import lzma
import os
import re
from collections import Counter, deque
from contextlib import contextmanager, suppress
from itertools import chain, islice

from lib.config import UserError
from lib.folders import refuse_pointer

MAX_LINE = 16 << 20  # characters; a longer line comes in parts of that
BOMB_RATIO, BOMB_FLOOR = 200, 64 << 20  # a file may unfold to 200 times its size, or to 64 MiB
BUFFER = 1 << 20  # bytes or characters read at once


class Tally:
    """Counts what was dropped, and its bytes, by stage and reason, with the first three examples.

    `sources` is what was read of each source, `passed_over` how many files of which suffix were not
    read. All stand in stats.json. `unused` has the names of columns that nothing reads.
    """

    def __init__(self):
        self.bad_rows, self.sources, self.passed_over, self.unused = 0, {}, Counter(), {}
        self.dropped = {"read": {}, "filter": {}, "dedup": {}}

    def drop(self, stage, reason, where, text=""):
        entry = self.dropped[stage].setdefault(reason, {"count": 0, "bytes": 0, "examples": []})
        entry["count"] += 1
        entry["bytes"] += len(text.encode(errors="ignore"))
        if len(entry["examples"]) < 3:  # a file's name may hold bytes that are no text
            example = f"{where}: {text[:100]}" if text else where
            entry["examples"].append(example.encode(errors="backslashreplace").decode())

    def bad(self, reason, where, text=""):
        """Counts a row that could not be read at all; its text is what is there of it."""
        self.bad_rows += 1
        self.drop("read", reason, where)
        self.dropped["read"][reason]["bytes"] += len(text.encode(errors="ignore"))

    def unread(self):
        """Returns what people are told of columns and files that nothing reads, or ""."""
        names = [repr(name)[1:-1][:40] for name in self.unused]
        more = f" and {len(names) - 20:,} more" if len(names) > 20 else ""
        columns = [f"columns not used: {', '.join(names[:20])}{more}"] * bool(names)
        return "; ".join(columns + [f"files {counted(self.passed_over)}"] * bool(self.passed_over))


def counted(others):
    """Returns {suffix: files passed over} as a text."""
    each = (f"{count:,} {suffix}" for suffix, count in sorted(others.items()))
    return f"passed over: {', '.join(each) or 'none'}"


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
        refuse_pointer(path)
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


# Where a text may be cut, the best first: behind a paragraph, a line, a sentence, a word
ENDS = (
    r"\n\s*\n",
    r"\n",
    # with a blank behind it, or in a script that sets none or has a stop of its own
    "[.!?\u2026][\"'\u2019\u201d\u00bb)\\]]*\\s"
    "|[\u3002\uff01\uff1f\uff61\u0964\u0965\u06d4\u061f\u0589\u1362\u104b\u17d4]"
    "[\"'\u2019\u201d\u300d\u300f\uff09)]*\\s*",
    r"\s",
)
ENDS = [(re.compile(f"(?s:.*)(?:{border})"), re.compile(border)) for border in ENDS]


def cut_at(text, low, best, high):
    """Returns where to cut a text: behind what ends nearest to `best`, from low + 1 to high.

    A paragraph if one ends there, else a line, sentence or word; if none does, `best`.
    """
    for to_last, border in ENDS:
        before = to_last.match(text, low, best)
        after = high > best and border.search(text, before.end() if before else low, high)
        if ends := [match.end() for match in (before, after) if match]:
            return min(ends, key=lambda end: abs(end - best))
    return best


def pieces(parts, max_length):
    """Yields a text, which comes in parts, in pieces of at most max_length characters.

    Joined they are the text. Each has a quarter of max_length at least, so that nothing is lost as
    too short. No more than a part and 2 * max_length characters are held.
    """
    text = ""
    for part in chain(filter(None, parts), [""]):  # "": the text ends
        text += part
        start, limit = 0, max_length * (2 if part else 1)
        while (rest := len(text) - start) > limit:
            best = min(max_length, (rest + 1) // 2)  # the last two share what is left
            low, high = best // 2, min(max_length, rest - best // 2)
            end = cut_at(text, start + low, start + best, start + high)
            yield text[start:end]
            start = end
        text = text[start:]
    yield text


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
            tally.bad("not-utf-8", f"{path} line {number}: {problem}", line)
        else:
            yield number, line


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
    """Yields (where, row) of a JSON list, of one value a line, or of objects over several lines.

    An object that stands alone may hold the rows.
    """
    reader = json_lines if is_by_line(path) else json_stream
    values = until_damaged(reader(path, tally), path, tally)
    begun = list(islice(values, 2))
    if len(begun) == 1 and isinstance(begun[0][1], dict) and (held := held_rows(begun[0][1])):
        begun = [(f"{path} row {number}", row) for number, row in enumerate(held, start=1)]
    yield from chain(begun, values)


def is_by_line(path):
    """Returns whether each line is a JSON value; the first two tell, for suffixes mislead.

    A line that is a list of messages is a row.
    """
    lines = filter(None, map(str.strip, text_parts(path)))
    first, second = next(lines, ""), next(lines, "")
    value = whole_json(first)
    if isinstance(value, list):
        return bool(second) or is_message(*value[:1])
    opens = first[:1] == "[" or (first[:1] == "{" and len(first) < MAX_LINE - 1)
    goes_on = first in ("[", "{") or first.endswith(",") or whole_json(second) is None
    return value is not None or not (opens and goes_on)


def is_message(value=None):
    return isinstance(value, dict) and bool(value.keys() & OF_MESSAGES)


OF_MESSAGES = {"role", "from", "author", "speaker", "sender"}
DIALOGUE = re.compile("conversation|messages|dialog|turns|chat|history")


def held_rows(value):
    """Returns the rows that an object holds; none if it is a row itself, as a conversation is.

    They are its only list of objects, or columns of one length: lists, or pandas' {"0": cell, ...}.
    """
    if all(isinstance(cells, dict) and "0" in cells for cells in value.values()):
        value = {name: [*cells.values()] for name, cells in value.items()}
    columns = {name: cells for name, cells in value.items() if isinstance(cells, list) and cells}
    for name, (cell, *_) in columns.items():
        inner = cell.values() if isinstance(cell, dict) else [cell]
        flat = not any(isinstance(part, list) for part in inner)
        if is_message(cell) or (flat and DIALOGUE.match(name)):
            return []
    objects = [cells for cells in columns.values() if isinstance(cells[0], dict)]
    if len(objects) == 1:
        return objects[0]
    whole = columns.keys() == value.keys() and len(set(map(len, columns.values()))) == 1
    return [dict(zip(columns, row)) for row in zip(*columns.values())] if whole else []


def json_lines(path, tally):
    for number, line in enumerate(text_parts(path), start=1):
        line = line.strip(" \t\n")
        value, end = json_value(line)
        if end == len(line) and not surrogate(line):
            yield f"{path} line {number}", value
        elif line:
            reason = "not-utf-8" if surrogate(line) else "not-json"
            tally.bad(reason, f"{path} line {number}", line)


def json_stream(path, tally):
    """Yields (where, element) of a JSON list, or values one after another; holds a few at once.

    Raises OSError where it breaks off, and for text behind the list.
    """
    parts = text_parts(path, BUFFER)
    text = next(parts, "").lstrip()
    last = "]" if text.startswith("[") else ""
    number, end = 0, len(last)
    while end is not None:
        start = SEPARATORS.match(text, end).end()
        value, end = json_value(text, start)
        size = len(text) - start  # a value that ends with the text may go on: twice as much tells
        if end in (None, len(text)) and (more := "".join(islice(parts, 1 + size // BUFFER))):
            text, end = text[start:] + more, 0
        elif end is not None:
            number += 1
            yield f"{path} element {number}", value
    if text[start:].rstrip() != last:
        raise OSError(f"its JSON stops after {number} elements: it is broken, or text follows it")


BACKSLASHES = re.compile(r'(\\["\\])|\\')  # an escape, or a backslash that means itself
BAD_QUOTE = "a quote opens a cell and does not end it; write a quote in a cell twice"


def csv_records(lines, options):
    """Yields (number, cells) of each record of (number, line)s; None for cells that are no CSV.

    The first record has the right number of cells. Of one that goes wrong only the first line is
    lost: an open quote has taken in those after it, which are read again.
    """
    lines, again, taken, reader, width = iter(lines), deque(), [], None, 0
    is_escape, options = "escapechar" in options, {**options, "strict": True}

    def feed():
        size = 0  # of a record
        while (not taken or size < MAX_LINE // 2) and (
            pair := again.popleft() if again else next(lines, None)
        ):
            size = len(pair[1]) + (size if taken else 0)
            taken.append(pair)
            yield BACKSLASHES.sub(lambda m: m[1] or r"\\", pair[1]) if is_escape else pair[1]

    while True:
        taken.clear()
        try:
            cells = next(reader := reader or csv.reader(feed(), **options), None)
        except csv.Error:
            cells = reader = None
        if not taken:
            return
        if len(taken) > 1 or not taken[0][1].isspace():
            width = width or len(cells or ())
            if cells is None or len(cells) != width:
                again.extendleft(reversed(taken[1:]))
            yield taken[0][0], cells


def csv_misfits(lines, options):
    """Returns how many records have not as many cells as the header."""
    header, *sizes = [len(cells or ()) for _, cells in csv_records(lines, options)] or [0]
    return len(sizes) - (sizes.count(header) if header else 0)


def csv_options(lines):
    """Returns the options of the module csv under which the fewest of a table's first lines misfit.

    Takes out the line in which Excel names the delimiter. Where tabs or bars stand between cells, a
    quote at the beginning of one may mean nothing: most such cells then end without one.
    """
    named = re.match(r'"?sep=(.)"?\n', lines[0][1], re.IGNORECASE) if lines else None
    del lines[: bool(named)]
    text, delimiters = "".join(line for _, line in lines), named[1] if named else ",;\t|"
    header, options = text.lstrip("\n").partition("\n")[0], []
    for delimiter in [d for d in delimiters if d in header] or delimiters[0]:
        more = [{"escapechar": "\\"}] * (r"\"" in text)
        more.insert(0 if '""' in text else len(more), {})  # RFC 4180's alone doubles quotes
        begun = rf'(?m)(?:^|{re.escape(delimiter)})"'
        ended = rf'{begun}[^"]*+(?:""[^"]*+)*+"(?={re.escape(delimiter)}|$)'
        if delimiter in "\t|" and 2 * len(re.findall(ended, text)) <= len(re.findall(begun, text)):
            more.append({"quoting": csv.QUOTE_NONE})
        options += [{"delimiter": delimiter, **each} for each in more]
    return min(options, key=lambda options: csv_misfits(lines, options))


def csv_rows(path, tally):
    """Yields (where, row) of a CSV file, each an object named by the header.

    Raises OSError for a header that is no CSV or names two columns alike.
    """
    csv.field_size_limit(MAX_LINE)
    lines, head, size = enumerate(text_parts(path), start=1), [], 0
    while size < BUFFER and (pair := next(lines, None)):
        head.append(pair)
        size += len(pair[1])
    options = csv_options(head)
    records = csv_records(chain(head, lines), options)
    names = next(records, (0, ()))[1] or [""]
    names = [name.strip() or f"column {number}" for number, name in enumerate(names, start=1)]
    if len(set(names)) < len(names):
        raise OSError(f"its header names a column twice: {', '.join(names)[:200]}")
    many = f"the header has {len(names)}"
    many += f"; put a text with {options['delimiter']!r} or a line break in quotes"
    for number, cells in records:
        where = f"{path} line {number}"
        if cells is None or len(cells) != len(names):
            problem = f"{len(cells)} cells, {many}" if cells else BAD_QUOTE
            tally.bad("not-csv", f"{where}: {problem}", "".join(cells or ()))
        elif surrogate("".join(cells)):
            tally.bad("not-utf-8", where, "".join(cells))
        else:
            yield where, dict(zip(names, cells))


def parquet_rows(path, tally):
    """Yields (where, row) of a .parquet file, read piece by piece."""
    parquet = package("pyarrow.parquet", "a .parquet file")
    with open_bytes(path) as file:
        table = parquet.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False)
        batches = table.iter_batches(64, use_threads=False)  # rows held at once
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, row in enumerate(rows, start=1):
            yield f"{path} row {number}", row


ROW_READERS = {"json": json_rows, "csv": csv_rows, "parquet": parquet_rows}
SUFFIXES = {"text": ".txt .text .md .markdown .rst", "html": ".html .htm .xhtml"}
SUFFIXES |= {"json": ".json .jsonl .ndjson .jsonlines .jl", "csv": ".csv .tsv .tab"}
SUFFIXES |= {"parquet": ".parquet", "binary": ".zip .tar .tgz .7z .rar .pdf .docx .epub .arrow"}
SUFFIXES = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes.split()}
SNIFFED = 1 << 16  # characters that tell what a file holds, where its suffix does not
JSON_HEAD = re.compile(r'\s*(\[\s*)?\{\s*["}]|\s*\[\s*"')
NAMES = re.compile(r'"?\w[\w -]*+"?(?:[,;\t|]"?\w[\w -]*+"?)+\n')  # a header


def inner_path(path):
    """Returns the path of a file without the suffix of its compression."""
    return path.with_suffix("") if path.suffix.lower() in OPENERS else path


def kind_of(path):
    """Returns how to read a file: text, html, wikitext, json, csv, parquet or binary.

    The suffix tells, else the content; None for text whose suffix names something else.
    """
    inner = inner_path(path)
    suffix = inner.suffix.lower()
    if inner.name.startswith("wiki.") and suffix in (".raw", ".tokens"):
        return "wikitext"
    kind = SUFFIXES.get(suffix, "json" if "json" in suffix else None)
    if kind not in (None, "text"):
        return kind
    head = ""
    with suppress(OSError):  # the reader will say so
        head = next(text_parts(path, SNIFFED), "")
    end = json_value(head.lstrip())[1] or (len(head) == SNIFFED and SNIFFED)
    if end and JSON_HEAD.match(head) and head.lstrip()[end:].lstrip(" \t\n,")[:1] in '{["':
        return "json"
    if kind or "\0" in head or head.startswith("PAR1"):
        return kind or ("parquet" if head.startswith("PAR1") else "binary")
    lines = list(enumerate(io.StringIO(head))) if NAMES.match(head) else []
    if len(lines) > 2 and csv_misfits(lines, csv_options(lines)) <= (len(head) == SNIFFED):
        return "csv"
    return None if suffix or head.startswith("#!") else "text"
