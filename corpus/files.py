"""What a file holds: its bytes decompressed and decoded, and which kind of file it is.

Files are foreign and often hostile: memory stays bounded by MAX_LINE, and a damaged file gives what
stands before the damage. A decompression bomb, a missing package and a Git LFS pointer are
UserErrors.
"""

import bz2
import codecs
import gzip
import importlib.util
import io
import json
import lzma
import os
import re
from contextlib import contextmanager, suppress

from lib.config import UserError, refusing
from lib.folders import refuse_pointer

MAX_LINE = 16 << 20  # characters; a longer line comes in parts of that
BOMB_RATIO, BOMB_FLOOR = 200, 64 << 20  # a file may unfold to 200 times its size, or to 64 MiB
BUFFER = 1 << 20  # bytes or characters read at once


def until_damaged(items, path, tally):
    """Yields `items` of a file to their end, or to a damage, which is counted."""
    try:
        yield from items
    except OSError as error:
        tally.bad("unreadable-file", f"{path}: cannot be read: {error.strerror or error}")


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


def surrogate(text):
    """Returns the match of the first lone surrogate or byte that was not UTF-8, if any."""
    if text.isascii() or b"\xed" not in text.encode("utf-8", "surrogatepass"):
        return None  # in UTF-8 they begin with this byte: ten times as fast as the pattern
    return re.search("[\ud800-\udfff]", text)


def text_parts(path, block=None):
    """Yields the text of a file in blocks of so many characters, or else in lines.

    A line over MAX_LINE characters comes in parts of that; each ends in \\n. Raises UserError if a
    file unfolds to far more than its size.
    """
    limit, size = max(BOMB_FLOOR, BOMB_RATIO * os.path.getsize(path)), 0
    with open_bytes(path) as file:
        wide = file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        encoding = ("utf-16", "strict") if wide else ("utf-8-sig", "surrogateescape")
        text = io.TextIOWrapper(file, *encoding)
        while part := text.read(block) if block else text.readline(MAX_LINE):
            size += len(part)
            if size > limit:
                raise UserError(f"{path}: decompresses to over {limit:,} bytes; unpack it yourself")
            yield part


def text_of(path):
    """Returns the whole text of a file in UTF-8, to the byte; UserError for other bytes."""
    with refusing(OSError, f"{path}: cannot be read as UTF-8"), open_bytes(path) as file:
        return file.read().decode("utf-8-sig")


def decoded_lines(path, tally):
    """Yields (number, line) of a text in UTF-8; a line that is not is counted and dropped."""
    for number, line in enumerate(text_parts(path), start=1):
        if byte := surrogate(line):
            problem = f"byte {ord(byte[0]) & 255:#04x} is not UTF-8; convert the file"
            tally.bad("not-utf-8", f"{path} line {number}: {problem}", line)
        else:
            yield number, line


DECODER = json.JSONDecoder(parse_constant=lambda name: None)  # NaN and Infinity are null


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


SUFFIXES = {"text": ".txt .text .md .markdown .rst", "html": ".html .htm .xhtml"}
SUFFIXES |= {"json": ".json .jsonl .ndjson .jsonlines .jl", "csv": ".csv .tsv .tab"}
SUFFIXES |= {"parquet": ".parquet", "binary": ".zip .tar .tgz .7z .rar .pdf .docx .epub .arrow"}
SUFFIXES = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes.split()}
SNIFFED = 1 << 16  # characters that tell what a file holds, where its suffix does not
JSON_HEAD = re.compile(r'\s*(\[\s*)?\{\s*["}]|\s*\[\s*"')
NAMES = re.compile(r'"?\w[\w -]*+"?(?:([,;\t|])"?\w[\w -]*+"?)+\n')  # a table's header


def kind_of(path):
    """Returns how to read a file: text, html, wikitext, json, csv, parquet or binary.

    The suffix tells, else the content; None for text whose suffix names something else.
    """
    inner = path.with_suffix("") if path.suffix.lower() in OPENERS else path
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
    if named := NAMES.match(head):
        lines = re.sub(r'"[^"]*("|\Z)', "", head).split("\n")  # quotes and their delimiters are off
        header, *cells = [line.count(named[1]) for line in lines if line.strip()]
        if len(cells) > 1 and len(cells) - cells.count(header) <= (len(head) == SNIFFED):
            return "csv"
    return None if suffix or head.startswith("#!") else "text"
