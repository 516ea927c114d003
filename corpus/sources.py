"""Where text comes from: this Python's documentation, files, the Hugging Face hub, mixtures of these.

A source is a generator of (where, text): `where` names the place for people ("corpus.jsonl line 7"), `text`
is one raw document. What cannot be read is counted by reason in the `Tally` and passed over; only what makes
a whole source useless (nothing there, no column that could be the text, a network that fails) ends the run,
as a UserError. `files.py` knows what the files hold, this room which documents come, and in what order.
"""

import ast
import copy
import fnmatch
import gc
import glob
import itertools
import os
import re
import sysconfig
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from corpus.files import (
    KINDS,
    MAX_LINE,
    OPENERS,
    ROW_KINDS,
    TABLES,
    JsonReader,
    json_rows,
    jsonl_rows,
    kind_of,
    need_packages,
    open_bounded,
    page_lines,
    rows,
    text_lines,
    unpacked,
)
from lib.config import (
    NO_DEFAULT,
    PositiveFloat,
    PositiveInt,
    UserError,
    accept,
    did_you_mean,
    options_of,
    shown,
)

# --- What was read, what was dropped, and why ---------------------------------------------------------------


class Tally:
    """Counts by stage and reason, each with its first three examples: what stats.json shows.

    `notes` are counted the same way, but nothing was dropped. `sources` holds for each source, by its name,
    the documents and bytes of text read, its weight, and whether max_samples capped it or it ended.
    `read_bytes` of the input files' sizes on disk were read so far.
    """

    def __init__(self):
        self.documents = self.bad_rows = self.kept = self.read_bytes = 0
        self.dropped, self.notes, self.sources = {"read": {}, "filter": {}, "dedup": {}}, {}, {}
        self.positions = {}  # of the files that are being read

    def drop(self, stage, reason, where, text=""):
        count_example(self.dropped[stage], reason, f"{where}: {text[:100]}" if text else where)

    def bad(self, reason, where):
        """Count a row that could not be read at all."""
        self.bad_rows += 1
        self.drop("read", reason, where)

    def note(self, reason, where):
        """Count what a reader did to a row that its user should know of."""
        count_example(self.notes, reason, where)

    def reasons(self):
        """Each (stage, reason, count, first example)."""
        for stage, entries in self.dropped.items():
            for reason, entry in sorted(entries.items()):
                yield stage, reason, entry["count"], entry["examples"][0]

    def reached(self, path, position):
        """Note how far a file was read; what is read again counts once."""
        before = self.positions.get(path, 0)
        if position > before:
            self.read_bytes += position - before
            self.positions[path] = position

    def finished(self, path, size):
        """Note that a file is done, read to its end or given up."""
        self.reached(path, size)
        self.positions.pop(path, None)

    def state(self):
        """Everything counted, as plain values for a JSON file."""
        return copy.deepcopy(
            {name: value for name, value in vars(self).items() if name != "positions"}
        )

    @classmethod
    def from_state(cls, state):
        """The tally that state() describes."""
        tally = cls()
        vars(tally).update(copy.deepcopy(state))
        return tally


def count_example(entries, reason, example):
    entry = entries.setdefault(reason, {"count": 0, "examples": []})
    entry["count"] += 1
    if len(entry["examples"]) < 3:  # a file's name may hold bytes that are no text
        entry["examples"].append(example.encode(errors="backslashreplace").decode())


# --- Sources, and their mixture -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """An entry of `mixture`."""

    name: str  # of the source in stats.json
    input_path: str  # as DataConfig's
    weight: PositiveFloat = 1.0  # its share of the documents is this over the sum of all
    max_samples: PositiveInt | None = None  # read no more documents of it
    input_config: str = ""  # as DataConfig's
    text_column: str = ""  # as DataConfig's
    licence: str = ""  # as DataConfig's


def read_documents(cfg, tally):
    """Every document of cfg.input_path or cfg.mixture in a fixed order, as (where it stands, its raw text).

    Raises UserError at once for files and packages that are not there, later for what only reading shows.
    """
    sources = sources_of(cfg)
    return interleaved(
        [(source, documents_of(source, cfg.max_length, tally)) for source in sources], tally
    )


def sources_of(cfg):
    """The Sources that a configuration names: its mixture's, or the one of its input_path."""
    if cfg.mixture is None:
        if not cfg.input_path:
            raise UserError(
                "input_path is empty; give a file, a folder, a glob, hf:owner/name or docstrings:"
            )
        return [
            Source(
                cfg.input_path,
                cfg.input_path,
                1.0,
                None,
                cfg.input_config,
                cfg.text_column,
                cfg.licence,
            )
        ]
    if not cfg.mixture:
        raise UserError(
            'mixture: an empty list; give entries {"name": ..., "input_path": ..., "weight": 1}'
        )
    for name, default in {
        "input_path": "docstrings:",
        "input_config": "",
        "text_column": "",
    }.items():
        if getattr(cfg, name) != default:
            raise UserError(
                f"mixture and {name} {getattr(cfg, name)!r} are both given; keep one of the two "
                f"(each entry of mixture has a {name} of its own)"
            )
    sources = [source_of(f"mixture[{number}]", entry) for number, entry in enumerate(cfg.mixture)]
    for number, source in enumerate(sources):
        if source.name in [other.name for other in sources[:number]]:
            raise UserError(
                f"mixture[{number}]: a second source with the name {source.name!r}; rename one"
            )
    return sources


def source_of(place, entry):
    """The Source that an entry of `mixture` describes, a dict; UserError names the entry by its `place`."""
    if not isinstance(entry, dict):
        raise UserError(f"{place} must be a JSON object, got {shown(entry)}")
    knobs, values = options_of(Source), {}
    for key, value in entry.items():
        if key in knobs:
            values[key] = accept(key, value, knobs[key], place)
        elif not key.startswith("_"):
            hint = did_you_mean(key, knobs) or f"; known are {', '.join(knobs)}"
            raise UserError(f"{place}: unknown key {key!r}{hint}")
    for key, knob in knobs.items():
        if knob.default is NO_DEFAULT and not values.get(key):
            raise UserError(f"{place}: {key} is {'empty' if key in values else 'missing'}")
    return Source(**values)


def interleaved(streams, tally):
    """Yield from each (source, documents) so that at any time their counts are as near to the weights as can
    be; when one has ended or is capped, the others go on in their proportions.

    At each turn every source is owed its share of a document, and the one that is owed most is read.
    """
    owed = {source.name: 0.0 for source, _ in streams}
    shares = {
        source.name: {"documents": 0, "bytes": 0, "weight": source.weight} for source, _ in streams
    }
    tally.sources = {
        name: {**share, "capped": False, "ended": False} for name, share in shares.items()
    }
    while streams:
        total = sum(source.weight for source, _ in streams)
        due = {source.name: owed[source.name] + source.weight / total for source, _ in streams}
        turn = max(streams, key=lambda stream: due[stream[0].name])  # the first of equals
        source, documents = turn
        seen, document = tally.sources[source.name], next(documents, None)
        if document is None:
            seen["ended"] = True
            streams.remove(turn)
            continue
        where, text = document
        try:
            seen["bytes"] += len(text) if text.isascii() else len(text.encode())
        except UnicodeEncodeError:
            tally.bad("bad-unicode", f"{where}: lone surrogate")
            continue
        owed |= due
        owed[source.name] -= 1
        seen["documents"] += 1
        if seen["documents"] == source.max_samples:
            seen["capped"] = True
            streams.remove(turn)
        yield document


def documents_of(source, max_length, tally):
    """The documents of one source; a missing file or package is an error before anything is read."""
    if source.input_path.startswith("docstrings:"):
        return docstring_documents(source.input_path.removeprefix("docstrings:"), max_length, tally)
    if source.input_path.startswith("hf:"):
        hub_package(source.input_path)
        return hub_documents(source, tally)
    files = local_files(source, tally)
    for path in {tuple(path.suffixes[-2:]): path for path in files}.values():  # one of each kind
        need_packages(path)
    return file_documents(files, source.text_column, max_length, tally)


def local_files(source, tally=None):
    """The files that a source reads; None for one that is no files."""
    if source.input_path.startswith(("docstrings:", "hf:")):
        return None
    return input_files(source.input_path, tally, tables=True)


def input_bytes(cfg):
    """The sizes on disk of all the files that a configuration names; None if it names other sources too."""
    files = [local_files(source) for source in sources_of(cfg)]
    if None in files:
        return None
    return sum(file_size(path) for path in itertools.chain.from_iterable(files))


def peek(cfg, count=1000):
    """What the first `count` documents of cfg's sources show, for people: a dict of the files by kind, their
    bytes, documents read, what was dropped and noted, and the first document as (where, text) or None.
    """
    tally, kinds = Tally(), {}
    documents = itertools.islice(read_documents(cfg, tally), count)
    first = next(documents, None)
    read = sum(1 for _ in documents) + (first is not None)
    for source in sources_of(cfg):
        files = local_files(source)
        for kind in (
            [source.input_path] if files is None else [kind_of(path) or "text" for path in files]
        ):
            kinds[kind] = kinds.get(kind, 0) + 1
    return {
        "kinds": kinds,
        "bytes": input_bytes(cfg),
        "documents": read,
        "complete": read < count,
        "dropped": tally.dropped["read"],
        "notes": tally.notes,
        "sources": tally.sources,
        "example": first,
    }


# --- This Python's documentation ----------------------------------------------------------------------------

# A Python installation documents itself: some megabytes of English on any machine, without a network.
UNDOCUMENTED = {"test", "tests", "testing", "idle_test", "site-packages", "__pycache__", "_vendor"}


def docstring_documents(folder, max_length, tally):
    """This Python's documentation: language reference, standard library, packages; or a folder's."""
    if folder and not os.path.isdir(folder):
        alone = "docstrings: alone is this Python's documentation"
        raise UserError(f"docstrings:{folder}: not a folder; {alone}")
    roots = [Path(folder)]
    if not folder:
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
        if not path.is_file() or path.stat().st_size > MAX_LINE:
            return tally.bad("unreadable-module", f"{module}: not a file, or over 16 MiB")
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
    inner = ast.FunctionDef | ast.AsyncFunctionDef
    if isinstance(node, ast.ClassDef):
        inner |= ast.ClassDef
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


# --- Files --------------------------------------------------------------------------------------------------

ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar", ".pdf", ".docx", ".epub")


def input_files(pattern, tally=None, tables=False):
    """The files that a path, folder or glob names, sorted; in a folder or glob, those of a known kind.

    Folders are searched through links to folders too, hidden ones not; a file that two names lead to is read
    under the first. Only with `tables` are .parquet and .arrow files among them.
    """
    tally, pattern = tally or Tally(), os.path.expanduser(pattern)
    path = Path(pattern)
    if os.path.isfile(path):
        refuse_unreadable(path, tables)
        return [path]
    if os.path.isdir(path):
        found = files_below(path, tally)
    elif os.path.exists(path):
        raise UserError(f"{path}: a pipe or a device; write what it gives to a file, and name that")
    else:
        found = globbed(pattern, tally)
    files = {}
    for file in sorted(found):
        kind = kind_of(file)
        if (
            kind is None
            or file.name[0] == "."
            or (kind in TABLES and not tables)
            or os.path.isdir(file)
        ):
            continue
        if os.path.isfile(file):
            files.setdefault(os.path.realpath(file), file)
        else:
            tally.bad("not-a-file", f"{file}: a broken link, a pipe or a device")
    if not files and not os.path.isdir(path) and not glob.has_magic(pattern):
        raise UserError(
            f"{pattern}: not found; give a file, a folder, a glob, hf:owner/name or docstrings:"
        )
    if not files:
        raise UserError(
            f"{pattern}: holds no file that ends in {', '.join(KINDS)} (or these with {', '.join(OPENERS)})"
        )
    return list(files.values())


def refuse_unreadable(path, tables):
    """Raise UserError for a single file that no reader takes."""
    inner = unpacked(path)
    suffix = inner.suffix.lower()
    if suffix in ARCHIVES:
        raise UserError(
            f"{path}: {suffix} files are not read; unpack it, or convert it to .txt or .jsonl"
        )
    if KINDS.get(suffix) in TABLES and not (tables and inner == path):
        ending = "".join(path.suffixes[-2:])
        raise UserError(f"{path}: {ending} files are not read; convert to .jsonl or .csv")


def files_below(folder, tally):
    """Every file below a folder; a folder that two names lead to, itself perhaps, is entered once."""
    entered = set()

    def refused(error):
        tally.bad("unreadable-folder", f"{error.filename}: {error.strerror}")

    for parent, folders, names in os.walk(folder, onerror=refused, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in entered else sorted(name for name in folders if name[0] != ".")
        if real not in entered:
            yield from (Path(parent, name) for name in names)
        entered.add(real)


def globbed(pattern, tally):
    """Every path that a pattern matches; `**` is any folders below, which glob would follow in circles."""
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from map(Path, glob.glob(pattern))
        return
    at = parts.index("**")
    for folder in sorted(glob.glob(str(Path(*parts[:at])))):
        for file in files_below(folder, tally):
            if matches(file.relative_to(folder).parts, parts[at:]):
                yield file


def matches(parts, patterns):
    """Whether a path's parts are what a pattern's parts stand for, `**` for any number of them."""
    if not parts or not patterns:
        return not parts and patterns in ((), ("**",))
    if patterns[0] == "**":
        return matches(parts, patterns[1:]) or matches(parts[1:], patterns)
    return fnmatch.fnmatch(parts[0], patterns[0]) and matches(parts[1:], patterns[1:])


def file_size(path):
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def file_documents(files, column, max_length, tally):
    """The documents of files in their order; a damaged one gives what it has up to the damage.

    Raises UserError only at the end, if no file had a column of text.
    """
    useless, empty = [], True
    opened = (file_texts(path, column, max_length, tally, useless) for path in files)
    for lines, group in itertools.groupby(opened, key=lambda pair: pair[0]):
        texts = itertools.chain.from_iterable(texts for _, texts in group)
        for document in articles(texts) if lines else texts:
            empty = False
            yield document
    if useless and empty:
        raise useless[0]


def file_texts(path, column, max_length, tally, useless):
    """Return whether a file holds lines of WikiText, and its (where, text)."""
    kind = kind_of(path) or "text"
    if kind == "wikitext":
        texts = ((f"{path} line {number}", line) for number, line in text_lines(path, tally))
    elif kind in ("text", "html"):
        lines = (
            page_lines(path, tally)
            if kind == "html"
            else (line for _, line in text_lines(path, tally))
        )
        pieces = passages(paragraphs(lines, max_length), max_length)
        texts = ((f"{path} [{number}]", text) for number, text in enumerate(pieces))
    else:
        texts = column_texts(rows(path, tally, partial(pick, column, path)), column, tally)
    texts = survived(path, texts, tally, useless)
    if kind in ("text", "html"):
        return False, texts
    return (True, texts) if kind == "wikitext" else lines_or_not(texts)


def survived(path, texts, tally, useless):
    """Yield the `texts` of a file to its end or to where it is damaged, which is counted."""
    try:
        yield from texts
    except NoColumn as error:
        useless.append(error)
        tally.bad("no-text-column", str(error))
    except OSError as error:
        reason = "damaged-file" if error.errno is None else "unreadable-file"
        tally.bad(reason, f"{path}: {error.strerror or error}")
    tally.finished(path, file_size(path))


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
    if held:
        yield "".join(held)


def lines_or_not(texts):
    """Return whether (where, text) are the lines of WikiText, judged by the first of them, and all of them.

    Each line is a row of its own there, and among the first hundred is a heading ` = Title = `.
    """
    held, lines = [], False
    for where, text in itertools.islice(texts, 100):
        held.append((where, text))
        if len(text) > 100_000 or "\n" in text.rstrip("\n"):
            break
        if lines := re.fullmatch(r" = .* = ?\n?", text) is not None:
            break
    return lines, itertools.chain(held, texts)


def articles(lines):
    """Join the (where, line) of WikiText into articles: a heading ` = Title = ` after a blank line opens the
    next.
    """
    held, first, size, blank = [], "", 0, True
    for where, line in lines:
        opens = (
            blank and re.fullmatch(r"= [^=].* =", line.strip()) and not line.strip().endswith("= =")
        )
        if held and (opens or size > MAX_LINE):
            yield first, "".join(held)
            held, size = [], 0
        blank = not line.strip()
        if not held and blank:
            continue
        first = first if held else where
        held.append(
            line.removeprefix(" ") if line.endswith("\n") else line.removeprefix(" ") + "\n"
        )
        size += len(line)
    if held:
        yield first, "".join(held)


# --- The text of a row --------------------------------------------------------------------------------------

USUAL = ("text", "content", "document", "article", "body", "passage", "markdown")


class NoColumn(UserError):
    """Rows without a column that could be the text."""


def choose(column, where, row, names):
    """The name of a row's text: `column` if given, else a usual one, else the only one with a string.

    Raises NoColumn, which lists all `names`.
    """
    strings = [key for key, value in row.items() if isinstance(value, str)]
    for name in [column] if column else [*USUAL, *(strings if len(strings) == 1 else ())]:
        if name in row:
            return name
    columns = ", ".join(map(str, names))[:200] or "no columns at all"
    what = "no column that is surely the text"
    if column:
        what = f"no column '{column}'{' of text' if column in names else ''}"
    raise NoColumn(f"{where}: {what} among {columns}; name it with --text_column=NAME")


def pick(column, path, texts, names):
    """Choose among the columns of a table, by the names of those of text and of all."""
    return choose(column, path, dict.fromkeys(texts, ""), names)


def column_texts(rows, column, tally):
    """Yield (where, text) of (where, row); a row without a text is counted.

    The column is chosen by the first rows together, up to one that has it by name: a single odd row decides
    nothing.
    """
    held, union = [], {}
    for where, row in itertools.islice(rows, 20):
        held.append((where, row))
        if isinstance(row, dict):
            union |= {
                key: value for key, value in row.items() if not isinstance(union.get(key), str)
            }
            if set(row) & ({column} if column else set(USUAL)):
                break
    name = choose(column, held[0][0], union, union) if union else column or "text"
    for where, row in itertools.chain(held, rows):
        if not isinstance(row, dict):
            tally.bad("not-an-object", where)
        elif name not in row:
            tally.bad("missing-text", f'{where}: missing "{name}"')
        elif not isinstance(row[name], str):
            tally.bad("not-a-string", f'{where}: "{name}" must be a string')
        else:
            yield where, row[name]


# --- The Hugging Face hub -----------------------------------------------------------------------------------


class Unreachable(UserError):
    """A dataset that is not at hand: no network, no such name, no package to fetch it with."""


def hub_package(path):
    """The function load_dataset of the package that fetches from the hub."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise Unreachable(f"{path} needs the package datasets: pip install datasets") from None
    return load_dataset


def hub_rows(path, config=""):
    """Yield (where, row) of a dataset of the hub, streamed: hf:owner/name[@revision][:config[:split]].

    Whatever breaks, in the middle too, is raised as Unreachable: no dataset comes out shorter than it is.
    """
    name, own, split = (path.removeprefix("hf:").split(":", 2) + ["", ""])[:3]
    if not name.strip("/ "):
        raise UserError(f"{path!r} names no dataset; write hf:owner/name")
    if own and config not in ("", own):
        raise UserError(
            f"{path} names another configuration than input_config {config!r}; keep one"
        )
    name, _, revision = name.partition("@")
    number, load_dataset = 0, hub_package(path)
    try:  # anything may come from there; none of it is worth a traceback
        pinned = {"revision": revision} if revision else {}
        rows = load_dataset(
            name, own or config or None, split=split or "train", streaming=True, **pinned
        )
        for row in rows:
            yield f"{name} row {number}", row
            number += 1
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        where = f"{path}: broke off after {number} rows" if number else f"{path}: cannot be read"
        remedy = "check the name and the network, or give local files"
        if "scripts are no longer supported" in reason:
            _, colon, rest = path.removeprefix("hf:").partition(":")
            remedy = f"the hub's own copy may do: hf:{name}@refs/convert/parquet{colon}{rest}"
        raise Unreachable(f"{where} ({reason}); {remedy}") from None


def hub_documents(source, tally):
    """The texts of a dataset of the hub; WikiText's lines become articles."""
    rows = hub_rows(source.input_path, source.input_config)
    lines, texts = lines_or_not(column_texts(rows, source.text_column, tally))
    yield from articles(texts) if lines else texts


# --- Rows of a training ---


def rows_of(path, tally):
    """Yield (where, value) of every row of the files, or of the hub's dataset (hf:), that `path` names."""
    if str(path).startswith("hf:"):
        yield from hub_rows(str(path))
        return
    path = os.path.expanduser(path)
    if (Path(path) / "config.json").is_file():
        raise UserError(f"{path}: the folder of a model, which holds no rows; give a file of them")
    if not os.path.exists(path) and not glob.has_magic(path):
        raise UserError(
            f"{path}: not found; give a file of rows (.jsonl, .json, .csv ...), a folder or a glob"
        )
    files = input_files(path, tally, tables=True)
    files = [file for file in files if len(files) == 1 or kind_of(file) in ROW_KINDS]
    if not files:
        raise UserError(
            f"{path}: holds no file of rows: .jsonl, .json, .csv, .tsv, .parquet or .arrow"
        )
    for file in files:
        try:
            if kind_of(file) in ROW_KINDS - {"json", "jsonl"}:
                yield from rows(file, tally)
            elif (opening := json_opening(file)) == "[":
                yield from whole_list(file, tally)
            else:
                yield from (json_rows if opening else jsonl_rows)(file, tally)
        except OSError as error:
            raise UserError(
                f"{file}: cannot be read: damaged, or not permitted ({error})"
            ) from None


def json_opening(path):
    """What a file that is one JSON value begins with: "[", a list of rows, or "{", one row; else "".

    Suffixes mislead: a .json often has a row a line, a .jsonl may be a list. The first two lines tell. A
    line that is a list of messages is a conversation, so a row; any other list is the list of rows.
    """
    with open_bounded(path) as file:
        lines = iter(partial(file.readline, MAX_LINE), b"")
        lines = filter(None, (line.removeprefix(b"\xef\xbb\xbf").strip() for line in lines))
        line, more = (next(lines, b"") for _ in range(2))
    value, start = complete(line), line[:1].decode("ascii", "replace")
    if isinstance(value, list):
        bare = value and isinstance(value[0], dict) and value[0].keys() & {"role", "from"}
        return "" if more or bare else "["
    opens = value is None and start in ("[", "{") and (line == line[:1] or complete(more) is None)
    return start if opens else ""


def whole_list(path, tally):
    """The (where, element) of a JSON list; raises UserError where it breaks off, or text follows its end."""

    def problems():
        found = tally.dropped["read"]
        return [
            found.get(why, {}).get("count", 0) for why in ("not-json", "too-deep", "after-the-list")
        ]

    before, count = problems(), 0
    for entry in json_rows(path, tally):
        count += 1
        yield entry
    if (after := problems()) != before:
        what = "with more text behind it" if after[:2] == before[:2] else "that breaks off"
        raise UserError(
            f"{path}: a JSON list {what} after {count} elements; mend it, or write .jsonl"
        )


def complete(line):
    """The JSON value that a line is from end to end, or None."""
    try:
        text = line.decode("utf-8")
        value, end = JsonReader().read(text)
    except (UnicodeDecodeError, JsonReader.Bad):
        return None
    return value if end == len(text) else None
