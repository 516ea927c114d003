"""Where text comes from: this Python's documentation, files of many kinds, the Hugging Face hub.

A source is a generator of (where, text): `where` names the place for people ("corpus.jsonl line 7"), `text`
is one raw document. Input is foreign and often hostile: a row that cannot be read is counted by reason in the
`Tally` and passed over; memory stays bounded by MAX_LINE whatever a file holds; only what makes a whole
source useless (nothing there, no column that could be the text, a decompression bomb) ends the run, as a
UserError.
"""

import ast
import bz2
import csv
import gc
import glob
import gzip
import io
import itertools
import json
import lzma
import re
import sysconfig
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path

from configurator import UserError

MAX_LINE = 16 << 20  # bytes; a longer line (or JSON value) is dropped, and never held in memory whole
BOMB_RATIO, BOMB_FLOOR = 200, 64 << 20  # a compressed file may grow to 200 times its size, or to 64 MiB

# --- What was dropped, and why ------------------------------------------------------------------------------


class Tally:
    """Counts by stage and reason, each with its first three examples: what stats.json shows."""

    def __init__(self):
        self.documents = self.bad_rows = self.kept = 0
        self.dropped = {"read": {}, "filter": {}, "dedup": {}}

    def drop(self, stage, reason, where, text=""):
        entry = self.dropped[stage].setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += 1
        if len(entry["examples"]) < 3:
            entry["examples"].append(f"{where}: {text[:100]}" if text else where)

    def bad(self, reason, where):
        """Count a row that could not be read at all."""
        self.bad_rows += 1
        self.drop("read", reason, where)

    def reasons(self):
        """Each (stage, reason, count, first example)."""
        for stage, entries in self.dropped.items():
            for reason, entry in sorted(entries.items()):
                yield stage, reason, entry["count"], entry["examples"][0]


# --- Sources: generators of (where, text) -------------------------------------------------------------------


def read_documents(cfg, tally):
    """Every document of cfg.input_path in a fixed order, as (where it stands, its raw text)."""
    if cfg.input_path.startswith("docstrings:"):
        return docstring_documents(cfg.input_path.removeprefix("docstrings:"), cfg.max_length, tally)
    if cfg.input_path.startswith("hf:"):
        return hub_documents(cfg, tally)
    return itertools.chain.from_iterable(
        file_documents(path, cfg, tally) for path in input_files(cfg.input_path)
    )


# A Python installation documents itself: some megabytes of English on any machine, without a network.

UNDOCUMENTED = {"test", "tests", "testing", "idle_test", "site-packages", "__pycache__", "_vendor"}


def docstring_documents(folder, max_length, tally):
    """This Python's documentation: language reference, standard library, packages; or a folder's."""
    if folder:
        roots = [Path(folder)]
    else:
        from pydoc_data.topics import topics

        for name in sorted(topics):
            pieces = paragraphs(topics[name].splitlines(keepends=True), max_length)
            for number, text in enumerate(passages(pieces, max_length)):
                yield f"pydoc_data.topics {name} [{number}]", text
        roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    for root in roots:
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
            parts = path.relative_to(root).with_suffix("").parts
            if not UNDOCUMENTED & set(parts):
                yield from module_documents(
                    path, ".".join(parts).removesuffix(".__init__"), max_length, tally
                )


def module_documents(path, module, max_length, tally):
    """One document for a module and its functions, and one for each class with its methods."""
    try:
        source = path.read_bytes()
        if b'"""' not in source and b"'''" not in source:
            return
        with warnings.catch_warnings(), no_collection():
            warnings.simplefilter("ignore")  # of the modules' own invalid escapes
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        tally.bad("unreadable-module", f"{module}: {error}")
        return
    for node in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
        title = module if node is tree else f"{module}.{node.name}"
        for number, text in enumerate(passages(docstrings(node, title, ""), max_length)):
            yield f"{title} [{number}]", text


@contextmanager
def no_collection():
    """Keep the garbage collector off a growing syntax tree, which it would walk again and again."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def docstrings(node, title, prefix):
    """The docstring of a node under its title, then those of its functions (in a class, of classes too)."""
    if text := ast.get_docstring(node):
        yield f"{title}\n\n{text}\n\n"
    inner = (ast.FunctionDef, ast.AsyncFunctionDef) + (
        (ast.ClassDef,) if isinstance(node, ast.ClassDef) else ()
    )
    for child in getattr(node, "body", ()):
        if isinstance(child, inner):
            yield from docstrings(child, f"{prefix}{child.name}", f"{prefix}{child.name}.")


def passages(pieces, max_length):
    """Join consecutive pieces of text into documents of at most max_length characters (a longer piece stays
    whole).
    """
    held, size = [], 0
    for piece in pieces:
        if held and size + len(piece) > max_length:
            yield "".join(held)
            held, size = [], 0
        held.append(piece)
        size += len(piece)
    if held:
        yield "".join(held)


# Files: plain text, JSON, JSON Lines, CSV, each also compressed. Foreign bytes: nothing in them may end the
# run.

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
KINDS = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "jsonl", ".csv": "csv"}


def kind_of(path):
    """How to read a file, by its suffix (before .gz and the like); None if the suffix says nothing."""
    inner = path.with_suffix("") if path.suffix in OPENERS else path
    if inner.name.startswith("wiki.") and inner.suffix in (".raw", ".tokens"):
        return "wikitext"
    return KINDS.get(inner.suffix.lower())


def input_files(pattern):
    """The files that a path, folder or glob names, sorted; in a folder or glob, those of a known kind."""
    path = Path(pattern)
    if path.is_file():
        if kind_of(path) is None and path.suffix in (".parquet", ".zst", ".arrow", ".zip", ".tar"):
            raise UserError(f"{path}: {path.suffix} files are not read; convert to .jsonl, .txt or .csv")
        return [path]
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(pattern, recursive=True))
    files = sorted(file for file in found if file.is_file() and kind_of(file) and file.name[0] != ".")
    if not files and not path.is_dir() and not glob.has_magic(pattern):
        raise UserError(f"{pattern}: not found; give a file, a folder, a glob, hf:owner/name or docstrings:")
    if not files:
        raise UserError(
            f"{pattern}: holds no file that ends in {', '.join(KINDS)} (or these with {', '.join(OPENERS)})"
        )
    return files


def file_documents(path, cfg, tally):
    """The documents of one file; a damaged one gives what it has up to the damage."""
    kind, column = kind_of(path), TextColumn(cfg.text_column)
    try:
        if kind == "wikitext":
            yield from articles(text_lines(path, tally))
        elif kind in (None, "text"):
            pieces = paragraphs((line for _, line in text_lines(path, tally)), cfg.max_length)
            for number, text in enumerate(passages(pieces, cfg.max_length)):
                yield f"{path} [{number}]", text
        else:
            rows = {"json": json_rows, "jsonl": jsonl_rows, "csv": csv_rows}[kind](path, tally)
            for where, row in rows:
                if (text := column.text_of(row, where, tally)) is not None:
                    yield where, text
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        tally.bad("damaged-file", f"{path}: {error}")


@contextmanager
def open_bounded(path):
    """Open a file, decompressed, as a binary stream that refuses to unfold a decompression bomb."""
    opener = OPENERS.get(path.suffix)
    if opener is None:
        with open(path, "rb") as file:
            yield file
        return
    limit = max(BOMB_FLOOR, BOMB_RATIO * path.stat().st_size)
    with opener(path, "rb") as file, io.BufferedReader(Bounded(file, limit, path)) as bounded:
        yield bounded


class Bounded(io.RawIOBase):
    """A raw stream over `file` that raises UserError once more than `limit` bytes were read."""

    def __init__(self, file, limit, path):
        self.file, self.left, self.limit, self.path = file, limit, limit, path

    def readable(self):
        return True

    def readinto(self, buffer):
        count = self.file.readinto(buffer)
        self.left -= count
        if self.left < 0:
            raise UserError(
                f"{self.path}: decompresses to over {self.limit:,} bytes, {BOMB_RATIO} times its size"
            )
        return count


def bounded_lines(path, tally):
    """Yield (number, offset, line) of a file as bytes; a line over MAX_LINE is counted and passed over in
    pieces.
    """
    with open_bounded(path) as file:
        number, offset, within = 0, 0, False  # within: in a line that was given up
        while line := file.readline(MAX_LINE):
            whole = line.endswith(b"\n") or len(line) < MAX_LINE
            number += not within
            if whole and not within:
                yield number, offset, line.removeprefix(b"\xef\xbb\xbf") if offset == 0 else line
            elif not within:
                tally.bad("line-over-16-MiB", f"{path} line {number}")
            offset, within = offset + len(line), not whole


def text_lines(path, tally):
    """Yield (where, line) of a UTF-8 text, whatever its line ends; from the first byte that is no UTF-8 on it
    is dropped.
    """
    for number, offset, raw in bounded_lines(path, tally):
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            at = offset + error.start
            tally.bad("not-utf-8", f"{path}: byte {raw[error.start]:#04x} at offset {at}: not UTF-8")
            return
        for line in re.findall(r"[^\n]*\n|[^\n]+", text.replace("\r\n", "\n").replace("\r", "\n")):
            yield f"{path} line {number}", line


def paragraphs(lines, max_length):
    """Join lines up to a blank one; a paragraph that passes max_length is cut at a line."""
    held, size = [], 0
    for line in lines:
        if held and size + len(line) > max_length:
            yield "".join(held)
            held, size = [], 0
        held.append(line)
        size += len(line)
        if line.isspace():
            yield "".join(held)
            held, size = [], 0
    yield "".join(held)


def articles(lines):
    """Join the (where, line) of WikiText into articles: a heading ` = Title = ` after a blank line opens the
    next.
    """
    held, first, size, blank = [], "", 0, True
    for where, line in lines:
        opens = blank and re.fullmatch(r"= [^=].* =", line.strip()) and not line.strip().endswith("= =")
        if held and (opens or size > MAX_LINE):
            yield first, "".join(held)
            held, size = [], 0
        first = first if held else where
        held.append(line.removeprefix(" ") if line.endswith("\n") else line.removeprefix(" ") + "\n")
        size, blank = size + len(line), not line.strip()
    if held:
        yield first, "".join(held)


class JsonReader:
    """json.JSONDecoder, with what a row may do wrong as a reason to count: read() gives (value, end) or
    raises Bad.
    """

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
            if line := raw.decode("utf-8").strip(" \t\r\n"):
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
    with open_bounded(path) as raw:
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
                return
            try:
                value, end = reader.read(buffer, start)
            except reader.Bad as error:
                problem, end = error.args[0], (error.args + (len(buffer),))[1]
            if end < len(buffer) or problem == "too-deep":
                break  # an element that reaches the end of the buffer may go on
            more = file.read(max(len(buffer) - start, 1 << 16)) if len(buffer) - start < MAX_LINE else ""
            if not more:
                if problem is None:
                    yield where, value
                tally.bad(problem or "not-json", f"{where} (the file is dropped from here on)")
                return
            buffer, start, problem = buffer[start:] + more, 0, None
        if problem:
            tally.bad(problem, where)
            if problem == "too-deep":
                return
        else:
            yield where, value
        start = end


def csv_rows(path, tally):
    """The rows of a CSV file with a header line, as objects."""
    csv.field_size_limit(MAX_LINE)
    rows = csv.DictReader(line for _, line in text_lines(path, tally))
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            tally.bad("not-csv", f"{path} line {rows.line_num}: {error}")
            continue
        yield f"{path} line {rows.line_num}", row


class TextColumn:
    """Takes the text out of rows: from the column named, or else from the one that the first row shows to be
    it.
    """

    USUAL = ("text", "content", "document", "article", "body", "passage", "markdown")

    def __init__(self, name):
        self.name, self.certain = name, False

    def text_of(self, row, where, tally):
        """The row's text, or None after counting why there is none."""
        if not isinstance(row, dict):
            return tally.bad("not-an-object", where)
        if not self.certain and row:
            self.name, self.certain = self._choose(row, where), True
        text = row.get(self.name)
        if self.name not in row:
            return tally.bad("missing-text", f'{where}: missing "{self.name or "text"}"')
        if not isinstance(text, str):
            return tally.bad("not-a-string", f'{where}: "{self.name}" must be a string')
        if re.search("[\ud800-\udfff]", text):
            return tally.bad("bad-unicode", f"{where}: lone surrogate")
        return text

    def _choose(self, row, where):
        strings = [key for key, value in row.items() if isinstance(value, str)]
        for name in [self.name] if self.name else [*self.USUAL, *(strings if len(strings) == 1 else ())]:
            if name in row:
                return name
        columns = ", ".join(map(str, row))[:200]
        what = f"no column '{self.name}'" if self.name else "no column that is surely the text"
        raise UserError(f"{where}: {what} among {columns}; name it with --text_column=NAME")


class Unreachable(UserError):
    """A dataset that is not at hand: no network, no such name, no package to fetch it with."""


def hub_rows(path, config=""):
    """Yield (where, row) of a dataset of the Hugging Face hub, streamed: hf:owner/name[:config[:split]]."""
    name, own, split = (path.removeprefix("hf:").split(":") + ["", ""])[:3]
    if not name.strip("/ "):
        raise UserError(f"{path!r} names no dataset; write hf:owner/name")
    try:
        from datasets import load_dataset
    except ImportError:
        raise Unreachable(f"{path} needs the package datasets: pip install datasets") from None
    try:  # anything may come from there; none of it is worth a traceback
        rows = load_dataset(name, own or config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows):
            yield f"{name} row {number}", row
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise Unreachable(
            f"{path}: cannot be read ({type(error).__name__}: {reason}); "
            "check the name and the network, or give local files"
        ) from None


def hub_documents(cfg, tally):
    """The texts of a dataset of the hub; WikiText's lines become articles."""
    column, rows = TextColumn(cfg.text_column), hub_rows(cfg.input_path, cfg.input_config)
    texts = ((where, text) for where, row in rows if (text := column.text_of(row, where, tally)) is not None)
    return articles(texts) if "wikitext" in cfg.input_path.lower() else texts
