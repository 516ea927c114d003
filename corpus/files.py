"""What one file holds: its bytes, unpacked and decoded, then lines, rows, pages or the columns of a table.

Files are foreign and often hostile. A row that cannot be read is counted by reason in the `Tally` given
and passed over, a damaged file gives what stands before the damage and then raises an OSError, and memory
stays bounded by MAX_LINE and BOMB_FLOOR whatever a file holds. What no tally can mend is a UserError: a
decompression bomb, a package that is not installed.
"""

import bz2
import codecs
import csv
import gzip
import html
import io
import itertools
import json
import lzma
import os
import re
import zlib
from collections import deque
from contextlib import contextmanager
from functools import lru_cache

from lib.config import UserError

MAX_LINE = (
    16 << 20
)  # bytes; a longer line, page or JSON value is dropped, and never held in memory whole
BOMB_RATIO, BOMB_FLOOR = (
    200,
    64 << 20,
)  # a compressed file may grow to 200 times its size, or to 64 MiB
BUFFER = 1 << 20  # bytes read at once
SAMPLE = 1 << 16  # bytes after a line that is not UTF-8, by which its file is judged

# suffix -> how the file is read; each but the tables' may be compressed, and end in one of OPENERS too
KINDS = {
    ".txt": "text",
    ".md": "text",
    ".html": "html",
    ".htm": "html",
    ".json": "json",
    ".jsonl": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
TABLES = ("parquet", "arrow")
ROW_KINDS = {"json", "jsonl", "csv", "tsv", *TABLES}


def kind_of(path):
    """How to read a file, by its suffix (before .gz and the like); None if the suffix says nothing."""
    inner = unpacked(path)
    if inner.name.startswith("wiki.") and inner.suffix in (".raw", ".tokens"):
        return "wikitext"
    kind = KINDS.get(inner.suffix.lower())
    return None if kind in TABLES and inner != path else kind


def unpacked(path):
    """The path of a file without the ending of its compression."""
    return path.with_suffix("") if path.suffix.lower() in OPENERS else path


def need_packages(path):
    """Raise UserError if a package that a file of this name needs is not installed."""
    if path.suffix.lower() == ".zst":
        zstd_decompressor()
    elif kind_of(path) in TABLES:
        arrow()


def arrow():
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            ".parquet and .arrow files need the package pyarrow: pip install pyarrow"
        ) from None
    return pyarrow


# --- Bytes --------------------------------------------------------------------------------------------------


class Damaged(OSError):
    """A file that breaks off, or whose bytes are not what its name says."""


class Counted(io.FileIO):
    """A file that tells the tally how far it was read."""

    def __init__(self, path, tally):
        super().__init__(path)
        self.path, self.tally, self.position = path, tally, 0

    def readinto(self, buffer):
        count = super().readinto(buffer)
        self.position += count
        if self.tally is not None:
            self.tally.reached(self.path, self.position)
        return count


class Bounded(io.RawIOBase):
    """A raw stream over the decompressed `file` that raises UserError once more than `limit` bytes came."""

    def __init__(self, file, limit, path):
        self.file, self.left, self.limit, self.path = file, limit, limit, path

    def readable(self):
        return True

    def readinto(self, buffer):
        try:  # by read1, or what comes before a damage would be lost with it
            data = self.file.read1(len(buffer))
        except (EOFError, zlib.error, lzma.LZMAError) as error:
            raise Damaged(str(error)) from None
        self.left -= len(data)
        if self.left < 0:
            raise_bomb(self.path, self.limit)
        buffer[: len(data)] = data
        return len(data)


def raise_bomb(path, limit):
    raise UserError(f"{path}: decompresses to over {limit:,} bytes, {BOMB_RATIO} times its size")


def bomb_limit(path):
    return max(BOMB_FLOOR, BOMB_RATIO * os.path.getsize(path))


def zstd_decompressor():
    """What makes a decompressor for one frame, and the error that it raises."""
    window = 31  # log2 of the largest window: what `zstd --long=31` asks for, 2 GiB
    try:
        from compression import zstd  # from Python 3.14 on
    except ImportError:
        try:
            import zstandard
        except ImportError:
            raise UserError(
                ".zst files need the package zstandard: pip install zstandard"
            ) from None
        return zstandard.ZstdDecompressor(
            max_window_size=1 << window
        ).decompressobj, zstandard.ZstdError
    options = {zstd.DecompressionParameter.window_log_max: window}
    return lambda: zstd.ZstdDecompressor(options=options), zstd.ZstdError


class Unzstd(io.RawIOBase):
    """The decompressed bytes of all frames of a .zst file; raises EOFError where one breaks off.

    The package's own reader takes a file that was cut short for a whole one. Two KiB that are repeated bytes
    alone unfold to 64 MiB, so that many are taken at once.
    """

    def __init__(self, file):
        self.file, (self.new, self.error) = file, zstd_decompressor()
        self.frame, self.held = None, memoryview(b"")

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.held:
            data = (
                self.frame.unused_data if self.frame and self.frame.eof else b""
            ) or self.file.read(2048)
            if not data:
                if self.frame and not self.frame.eof:
                    raise EOFError("the file ended before the end of its last frame")
                return 0
            if not self.frame or self.frame.eof:
                self.frame = self.new()
            try:
                self.held = memoryview(self.frame.decompress(data))
            except self.error as error:
                raise Damaged(str(error)) from None
        count = min(len(buffer), len(self.held))
        buffer[:count], self.held = self.held[:count], self.held[count:]
        return count


def open_zst(file):
    return io.BufferedReader(Unzstd(file))


OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": open_zst}


@contextmanager
def open_bounded(path, tally=None):
    """Open a file, decompressed, as a binary stream that refuses to unfold a decompression bomb.

    UTF-16 and UTF-32 with a byte order mark come out as UTF-8, lines that end in carriage returns alone with
    newlines. Every damage is an OSError.
    """
    with io.BufferedReader(Counted(path, tally), BUFFER) as raw:
        opener = OPENERS.get(path.suffix.lower())
        if opener is None:
            yield recoded(raw)
            return
        limit = bomb_limit(path)
        with opener(raw) as file, io.BufferedReader(Bounded(file, limit, path), BUFFER) as bounded:
            yield recoded(bounded)


WIDE = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
}  # before utf-16, whose marks they begin
WIDE |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def recoded(file):
    """`file` itself, or its text in UTF-8 with newlines where its head shows that it has neither."""
    head = file.peek(SAMPLE)
    for mark, encoding in WIDE.items():
        if head.startswith(mark):
            return io.BufferedReader(Recoded(file, wide_to_utf8(encoding)), BUFFER)
    if b"\r" in head and b"\n" not in head:
        return io.BufferedReader(Recoded(file, lambda data: data.replace(b"\r", b"\n")), BUFFER)
    return file


def wide_to_utf8(encoding):
    decoder = codecs.getincrementaldecoder(encoding)()

    def recode(data):
        try:
            return decoder.decode(data, final=not data).encode()
        except UnicodeError as error:
            raise Damaged(
                f"not {encoding.upper()}, which its byte order mark says ({error.reason})"
            ) from None

    return recode


class Recoded(io.RawIOBase):
    """A raw stream of the bytes of `file`, put through `recode` piece by piece."""

    def __init__(self, file, recode):
        self.file, self.recode, self.held = file, recode, memoryview(b"")

    def readable(self):
        return True

    def readinto(self, buffer):
        data = None
        while not self.held and data != b"":
            data = self.file.read1(SAMPLE)
            self.held = memoryview(self.recode(data))
        count = min(len(buffer), len(self.held))
        buffer[:count], self.held = self.held[:count], self.held[count:]
        return count


def text_of(path):
    """Returns the whole text of a file in UTF-8; UserError for other bytes, and for a damaged file."""
    try:
        with open_bounded(path) as file:
            return file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{path}: byte {byte:#04x} at offset {error.start}: not UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: damaged, or not permitted ({error})") from None


# --- Lines of text ------------------------------------------------------------------------------------------


def bounded_lines(path, tally):
    """Yield (number, offset, line) of a file as bytes; a line over MAX_LINE is counted and passed over in
    pieces.
    """
    with open_bounded(path, tally) as file:
        number, offset, within = 0, 0, False  # within: in a line that was given up
        while line := file.readline(MAX_LINE):
            whole = line.endswith(b"\n") or len(line) < MAX_LINE
            number += not within
            if whole and not within:
                yield number, offset, line.removeprefix(codecs.BOM_UTF8) if offset == 0 else line
            elif not within:
                tally.bad("line-over-16-MiB", f"{path} line {number}")
            offset, within = offset + len(line), not whole


def text_lines(path, tally):
    """Yield (number, line) of a text file, whatever its line ends; each line but the last ends in a newline.

    A line that is not UTF-8 is judged together with the SAMPLE bytes after it. Where they look like Western
    text it is read as Windows' cp1252, which the tally notes. Otherwise it is dropped, and with it the rest
    of the file if more than a tenth of those lines are not UTF-8 either.
    """
    lines, ahead, judged, foreign = bounded_lines(path, tally), deque(), 0, None
    while line := ahead.popleft() if ahead else next(lines, None):
        number, offset, raw = line
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            if number > judged:
                ahead.extend(sample(lines, SAMPLE))
                judged = ahead[-1][0] if ahead else number
                foreign = judge([raw, *(later for *_, later in ahead)])
            what = f"byte {raw[error.start]:#04x} at offset {offset + error.start}: not UTF-8"
            if foreign == "another encoding":
                return tally.bad("not-utf-8", f"{path}: {what}; the file is dropped from here on")
            if foreign == "damaged":
                tally.bad("not-utf-8", f"{path} line {number}: {what}")
                continue
            tally.note("decoded-as-cp1252", f"{path} line {number}: {what}")
            text = raw.decode(errors="stray-cp1252")
        if "\r" not in text:
            yield number, text
            continue
        for piece in re.findall(r"[^\n]*\n|[^\n]+", text.replace("\r\n", "\n").replace("\r", "\n")):
            yield number, piece


def sample(lines, size):
    """The next (number, offset, line) of `lines`, up to `size` bytes."""
    while size > 0 and (line := next(lines, None)):
        size -= len(line[2])
        yield line


def judge(lines):
    """What lines are, the first of which is not UTF-8: "Western" text, "another encoding", or "damaged"."""
    strays = []
    for line in lines:
        try:
            line.decode()
        except UnicodeDecodeError:
            strays.append(line)
    if looks_western(b"".join(strays)):
        return "Western"
    return "another encoding" if len(strays) > max(1, len(lines) / 10) else "damaged"


def looks_western(data):
    """Whether bytes that are not UTF-8 read as Western text in cp1252: letters, few of them accented, hardly
    ever three in a row (which in Cyrillic, Greek or the East is the rule), and nothing that is no text.

    Polish or Turkish in their own single bytes look the same: hence the note that text_lines makes.
    """
    if re.search(rb"[\x00-\x07\x0e-\x1a\x1c-\x1f]", data):
        return False
    try:
        text = data.decode(errors="stray-cp1252")
    except UnicodeDecodeError:
        return False
    plain = sum(map(len, re.findall("[A-Za-z]+", text)))
    runs = [len(run) for run in re.findall("[^\0-\x7f]+", re.sub("([^\0-\x7f])\\1+", r"\1", text))]
    return sum(runs) <= 0.5 * plain and sum(run for run in runs if run > 2) <= 0.1 * sum(runs)


def stray_bytes(error):
    """The error handler "stray-cp1252": what is UTF-8 stays, each other byte is read as cp1252 has it."""
    bad = error.object[error.start : error.end]
    return bad.decode("cp1252"), error.end


codecs.register_error("stray-cp1252", stray_bytes)


# --- Pages of HTML ------------------------------------------------------------------------------------------

# html.parser would do, were it linear: 20 kB of "<a " hold Python 3.11's for seconds, growing with the square
TAG = re.compile(r"</?([a-zA-Z][a-zA-Z0-9]{0,15})|<[!?]")
UNSEEN = ("script", "style", "template", "svg")
LONG_ENTITY = re.compile(
    "&#(?:[0-9]{8,}|[xX][0-9a-fA-F]{7,});?"
)  # no character; html.unescape may raise


def page_lines(path, tally):
    """The lines of the text of a HTML page, each but the last ending in a newline."""
    with open_bounded(path, tally) as file:
        data = file.read(MAX_LINE + 1)
    if len(data) > MAX_LINE:
        return tally.bad("page-over-16-MiB", str(path))
    try:
        page = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"{path}: byte {data[error.start]:#04x} at offset {error.start}: not UTF-8"
        if not looks_western(data):
            return tally.bad("not-utf-8", what)
        tally.note("decoded-as-cp1252", what)
        page = data.decode(errors="stray-cp1252")
    yield from re.findall(r"[^\n]*\n|[^\n]+", page_text(page))


def page_text(page):
    """The text of a HTML page: tags, comments and scripts gone, entities decoded, each block on its lines.

    White space is as a browser shows it. One pass, with every search for an end that is not there made once:
    linear, whatever the page.
    """
    pieces, at, pre, last = [], 0, 0, page.rfind(">")
    while match := TAG.search(page, at, last):
        if at < match.start():
            add_text(pieces, page[at : match.start()], pre)
        name, closing = (match[1] or "").lower(), page[match.start() + 1] == "/"
        at = tag_end(page, match)
        if name in UNSEEN and not closing and page[at - 2] != "/":
            end = re.compile(f"</{name}", re.IGNORECASE).search(page, at)
            at = end.start() if end else len(page)
        elif (gap := gap_of(name)) and not (
            gap == " " and pieces and pieces[-1].endswith((" ", "\n"))
        ):
            pieces.append(gap)
        pre = max(0, pre + (-1 if closing else 1)) if name == "pre" else pre
    add_text(pieces, page[at:], pre)
    lines = (line.rstrip() for line in "".join(pieces).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


@lru_cache
def gap_of(name):
    """What white space a tag of this name stands for, before and after what it holds."""
    if re.fullmatch("p|h[1-6]|blockquote|pre|table|[uod]l|section|article|main|hr", name):
        return "\n\n"
    if re.fullmatch(
        "div|br|li|tr|d[td]|title|option|header|footer|nav|aside|caption|figure|form", name
    ):
        return "\n"
    return " " if name in ("td", "th") else ""


def tag_end(page, match):
    """Where the tag or comment that `match` opens ends; a ">" within double quotes does not end it."""
    start = match.start()
    if page.startswith("<!--", start):
        end = page.find("-->", start + 4)
        return end + 3 if end >= 0 else len(page)
    end = page.find(">", match.end())
    if page.count('"', start, end) % 2:
        quote = page.find('"', end, end + 1000)
        beyond = page.find(">", quote) if quote >= 0 else -1
        end = beyond if beyond >= 0 else end
    return end + 1


def add_text(pieces, text, pre):
    """Append what stands between two tags, its white space collapsed but within <pre>."""
    text = html.unescape(LONG_ENTITY.sub("", text)) if "&" in text else text
    if not pre:
        text = re.sub(r"\s+", " ", text)
        text = text.lstrip() if not pieces or pieces[-1].endswith(("\n", " ")) else text
    if text:
        pieces.append(text)


# --- Rows ---------------------------------------------------------------------------------------------------


def rows(path, tally, pick=None):
    """Yield (where, row) of a file of rows, whatever its kind; for `pick` see table_rows."""
    kind = kind_of(path)
    if kind in TABLES:
        return table_rows(path, tally, pick)
    return {"json": json_rows, "jsonl": jsonl_rows, "csv": csv_rows, "tsv": tsv_rows}[kind](
        path, tally
    )


class JsonReader:
    """json.JSONDecoder that says what is wrong with a row: read() gives (value, end) or raises Bad."""

    class Bad(Exception):
        pass

    def __init__(self):
        self.constants = []
        self.decoder = json.JSONDecoder(parse_constant=self.constants.append)

    def read(self, text, start=0):
        self.constants.clear()
        try:
            value, end = self.decoder.raw_decode(text, start)
        except RecursionError:
            raise self.Bad("too-deep") from None
        except ValueError:
            raise self.Bad("not-json") from None
        if self.constants:
            raise self.Bad("not-a-number", end)
        return value, end


def jsonl_rows(path, tally):
    """One JSON value a line; blank lines are nothing."""
    reader = JsonReader()
    for number, _, raw in bounded_lines(path, tally):
        where = f"{path} line {number}"
        try:
            if line := raw.decode().strip(" \t\r\n"):
                value, end = reader.read(line)
                if end != len(line):
                    raise reader.Bad("not-json")
                yield where, value
        except UnicodeDecodeError:
            tally.bad("not-utf-8", where)
        except reader.Bad as error:
            tally.bad(error.args[0], where)


def json_rows(path, tally):
    """The elements of a JSON list, read piece by piece; a file that is one object, or one a line, is taken as
    such.
    """
    with open_bounded(path, tally) as raw:
        file = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape")
        head = file.read(1 << 16)
        if head.lstrip().startswith("["):
            yield from list_elements(head.lstrip()[1:], file, path, tally)
            return
        text = head + file.read(MAX_LINE)
        single = not file.read(1)
    try:
        value, end = JsonReader().read(text.strip()) if single else (None, -1)
    except JsonReader.Bad:
        end = -1
    if single and end == len(text.strip()):
        yield str(path), value
    else:
        yield from jsonl_rows(path, tally)


def list_elements(buffer, file, path, tally):
    """Yield (where, element) of a JSON list whose text continues from `buffer` in `file`, holding one element
    at a time.
    """
    reader, gap, start = JsonReader(), re.compile(r"[ \t\r\n,]*"), 0
    for number in itertools.count(1):
        where, problem = f"{path} element {number}", None
        while True:
            start = gap.match(buffer, start).end()
            if buffer.startswith("]", start):
                if (buffer[start + 1 :] + file.read(1 << 16)).strip():
                    tally.bad(
                        "after-the-list",
                        f"{path}: what follows the end of its JSON list is dropped",
                    )
                return
            try:
                value, end = reader.read(buffer, start)
            except reader.Bad as error:
                problem, end = error.args[0], (error.args + (len(buffer),))[1]
            if end < len(buffer) or problem == "too-deep":
                break  # an element that reaches the end of the buffer may go on
            held = len(buffer) - start
            more = file.read(max(held, 1 << 16)) if held < MAX_LINE else ""
            if not more:
                if problem is None:
                    yield where, value
                why = "broken, or over 16 MiB; " if held >= MAX_LINE else ""
                return tally.bad(
                    problem or "not-json", f"{where} ({why}the file is dropped from here on)"
                )
            buffer, start, problem = buffer[start:] + more, 0, None
        if problem == "too-deep":  # nothing tells where it ends
            return tally.bad(problem, f"{where} (the file is dropped from here on)")
        if problem:
            tally.bad(problem, where)
        else:
            yield where, value
        start = end


def csv_rows(path, tally, delimiter=","):
    """The rows of a CSV file with a header line, as objects.

    Where a comma stands in decimal numbers spreadsheets put semicolons between fields; the header tells.
    """
    csv.field_size_limit(MAX_LINE)
    lines = (line for _, line in text_lines(path, tally))
    header = next(lines, "")
    if delimiter == "," and "," not in header and ";" in header:
        delimiter = ";"
    rows = csv.DictReader(itertools.chain([header] if header else [], lines), delimiter=delimiter)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            tally.bad("not-csv", f"{path} line {rows.line_num}: {error}")
            continue
        yield f"{path} line {rows.line_num}", row


def tsv_rows(path, tally):
    return csv_rows(path, tally, "\t")


# --- Tables -------------------------------------------------------------------------------------------------

ROWS = 64  # of a table held at once


def table_rows(path, tally, pick=None):
    """Yield (where, row) of a .parquet or .arrow file, read piece by piece.

    `pick` is given the names of the columns of text and of all columns, and returns that of the only one to
    read; without it rows come whole.
    """
    pyarrow, limit, number = arrow(), bomb_limit(path), 0
    batches = parquet_batches if kind_of(path) == "parquet" else arrow_batches
    try:
        for position, batch in batches(pyarrow, path, pick):
            for problem, row in batch_rows(batch):
                number += 1
                where = f"{path} row {number}"
                if problem:
                    tally.bad(problem, where)
                    continue
                limit -= sum(len(value) for value in row.values() if isinstance(value, str))
                if limit < 0:
                    raise_bomb(path, bomb_limit(path))
                yield where, row
            tally.reached(path, position)
    except (pyarrow.ArrowException, UnicodeError) as error:
        raise Damaged((str(error).splitlines() or [""])[0]) from None


def parquet_batches(pyarrow, path, pick):
    """Yield (bytes of the file read until then, about; record batch)."""
    size = os.path.getsize(path)
    with pyarrow.parquet.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as file:
        columns, count, done = chosen(pyarrow, file.schema_arrow, pick), file.metadata.num_rows, 0
        for batch in file.iter_batches(ROWS, columns=columns, use_threads=False):
            done += len(batch)
            yield size * done // max(count, done), batch


def arrow_batches(pyarrow, path, pick):
    """Yield (bytes of the file read until then, record batch) of either form of Arrow's IPC format."""
    with pyarrow.memory_map(str(path)) as file:
        random_access = file.read(6) == b"ARROW1"
        file.seek(0)
        table = (pyarrow.ipc.open_file if random_access else pyarrow.ipc.open_stream)(file)
        columns = chosen(pyarrow, table.schema, pick)
        batches = map(table.get_batch, range(table.num_record_batches)) if random_access else table
        for batch in batches:
            batch = batch.select(columns) if columns else batch
            for start in range(0, len(batch), ROWS):
                yield file.tell(), batch.slice(start, ROWS)


def chosen(pyarrow, schema, pick):
    """The list of the one column that `pick` chooses, or None."""
    types = pyarrow.types
    texts = (types.is_string, types.is_large_string, types.is_string_view)

    def holds_text(kind):
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return any(is_text(kind) for is_text in texts)

    return (
        [pick([field.name for field in schema if holds_text(field.type)], schema.names)]
        if pick
        else None
    )


def batch_rows(batch):
    """Yield (None, row) of a record batch, or (what is wrong with it, None)."""
    try:
        yield from ((None, row) for row in batch.to_pylist())
    except (
        ValueError,
        OverflowError,
    ):  # bytes that are no UTF-8, a date beyond Python's: find which
        for number in range(len(batch)):
            try:
                yield None, batch.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield "not-utf-8", None
            except (ValueError, OverflowError):
                yield "unreadable-row", None
