"""Where text comes from: this Python's documentation, files, the Hugging Face hub, mixtures.

A source is a generator of (where, text): `where` names the place for people ("a.jsonl line 7"),
`text` is a raw document. A row that cannot be read is counted in the `Tally` and passed over. A
source of no use at all (nothing there, no column of text, no network) is a UserError.
"""

import ast
import glob
import os
import re
import sysconfig
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import chain, islice
from pathlib import Path

from corpus import files
from corpus.files import MAX_LINE, ROW_READERS, NoColumn, Tally, kind_of, package, until_damaged
from lib import config
from lib.config import PositiveFloat, PositiveInt, UserError

PLACES = "give a file, a folder, a glob, hf:owner/name or docstrings:"


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
    """Yields (where it stands, raw text) of every document that cfg names, in a fixed order.

    Raises UserError at once for absent files and packages, later for what only reading shows.
    """
    sources = sources_of(cfg)
    streams = [(source, documents_of(source, cfg.max_length, tally)) for source in sources]
    return interleave(streams, tally)


def sources_of(cfg):
    """Returns the Sources of a configuration: its mixture's, or that of its input_path."""
    alone = {"input_path": "docstrings:", "input_config": "", "text_column": ""}  # the defaults
    given = {name: getattr(cfg, name) for name in alone}
    if cfg.mixture is None:
        return [Source(cfg.input_path, **given, licence=cfg.licence)]
    if not cfg.mixture:
        raise UserError('mixture: an empty list; give entries {"name": ..., "input_path": ...}')
    if given != alone:
        raise UserError(f"mixture and one of {', '.join(alone)} are both given; keep one")
    sources = [source_of(f"mixture[{number}]", entry) for number, entry in enumerate(cfg.mixture)]
    names = Counter(source.name for source in sources)
    if twice := [name for name, count in names.items() if count > 1]:
        raise UserError(f"mixture: two sources have the name {twice[0]!r}; rename one")
    return sources


def source_of(where, entry):
    """Returns the Source that an entry of `mixture` describes; a UserError names the entry."""
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be a JSON object, got {config.shown(entry)}")
    options, values = config.options_of(Source), {}
    for key, value in entry.items():
        if key in options:
            values[key] = config.accept(key, value, options[key], where)
        elif not key.startswith("_"):
            hint = config.did_you_mean(key, options) or f"; known are {', '.join(options)}"
            raise UserError(f"{where}: unknown key {key!r}{hint}")
    if not (values.get("name") and values.get("input_path")):
        raise UserError(f"{where}: name or input_path is missing or empty")
    return Source(**values)


def interleave(streams, tally):
    """Yields from each (source, documents) so that their counts always stay nearest the weights.

    At each turn every source is owed its share of a document, and the one owed most is read. When
    one has ended or is capped, the others go on in their proportions.
    """
    owed = {source.name: 0.0 for source, _ in streams}
    for source, _ in streams:
        counts = {"documents": 0, "bytes": 0, "weight": source.weight}
        tally.sources[source.name] = {**counts, "capped": False, "ended": False}
    while streams:
        total = sum(source.weight for source, _ in streams)
        due = {source.name: owed[source.name] + source.weight / total for source, _ in streams}
        turn = source, documents = max(streams, key=lambda stream: due[stream[0].name])
        counts, (where, text) = tally.sources[source.name], next(documents, (None, ""))
        counts["bytes"] += len(text.encode(errors="ignore"))
        counts["ended"] = where is None
        if where is None:
            streams.remove(turn)
        elif files.surrogate(text):
            tally.bad("bad-unicode", f"{where}: lone surrogate")
        else:
            owed |= due
            owed[source.name] -= 1
            counts["documents"] += 1
            if counts["documents"] == source.max_samples:
                counts["capped"] = True
                streams.remove(turn)
            yield where, text


def documents_of(source, max_length, tally):
    """Returns the documents of one source; raises at once for an absent file or package."""
    path = source.input_path
    if path == "docstrings:":
        return docstring_documents(max_length, tally)
    if path.startswith("hf:"):
        package("datasets", path, Unreachable)
        rows = hub_rows(path, source.input_config)
        return joined_wikitext(column_texts(rows, source.text_column, tally))
    paths = input_files(path, tally)
    for suffix in {".zst", ".parquet"} & {path.suffix.lower() for path in paths}:
        package("pyarrow", f"a {suffix} file")
    return file_documents(paths, source.text_column, max_length, tally)


def source_rows(path, tally):
    """Yields (where, value) of every row of the files, or of the dataset of the hub, named `path`.

    A damaged file is a UserError: a training reads all of its data.
    """
    if str(path).startswith("hf:"):
        yield from hub_rows(str(path))
        return
    if (Path(path).expanduser() / "config.json").is_file():
        raise UserError(f"{path}: the folder of a model, which holds no rows; give a file of them")
    paths = input_files(str(path), tally)
    paths = [p for p in paths if len(paths) == 1 or kind_of(p) in ROW_READERS]
    if not paths:
        raise UserError(f"{path}: holds no file of rows: .{', .'.join(ROW_READERS)}")
    for p in paths:
        yield from until_damaged(files.rows(p, tally), partial(files.refuse_damaged, p))


# A Python installation documents itself: megabytes of English on any machine, offline.
UNDOCUMENTED = {"test", "tests", "testing", "idle_test", "site-packages", "__pycache__", "_vendor"}


def docstring_documents(max_length, tally):
    """Yields this Python's documentation: its reference, the standard library, packages."""
    for name, text in sorted(import_module("pydoc_data.topics").topics.items()):
        texts = passages(text.splitlines(keepends=True), max_length)
        yield from numbered(f"pydoc_data.topics {name}", texts)
    for root in map(Path, map(sysconfig.get_path, ("stdlib", "purelib"))):
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
            parts = path.relative_to(root).with_suffix("").parts
            if not UNDOCUMENTED & set(parts):
                module = ".".join(parts).removesuffix(".__init__")
                yield from module_documents(path, module, max_length, tally)


def module_documents(path, module, max_length, tally):
    """Yields a document for a module and its functions, and one for each class with its methods."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_LINE:
            raise ValueError("not a file, or over 16 MiB")
        source = path.read_bytes()
        if b'"""' not in source and b"'''" not in source:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the modules' own invalid escapes
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return tally.bad("unreadable-module", f"{module}: {error}")
    for node in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
        title = module if node is tree else f"{module}.{node.name}"
        yield from numbered(title, files.grouped(docstrings(node, title, ""), max_length))


def docstrings(node, title, prefix):
    """Yields the docstring of a node under its title, then those of its functions and classes."""
    if text := ast.get_docstring(node):
        yield f"{title}\n\n{text}\n\n"
    inner = ast.FunctionDef | ast.AsyncFunctionDef
    if isinstance(node, ast.ClassDef):
        inner |= ast.ClassDef  # those of a module are documents of their own
    for child in getattr(node, "body", ()):
        if isinstance(child, inner):
            yield from docstrings(child, f"{prefix}{child.name}", f"{prefix}{child.name}.")


def numbered(title, texts):
    return ((f"{title} [{number}]", text) for number, text in enumerate(texts))


def passages(lines, max_length):
    """Joins lines into documents of at most max_length, cut between paragraphs if possible."""
    return files.grouped(files.grouped(lines, max_length, str.isspace), max_length)


UNREADABLE = (".zip", ".tar", ".tgz", ".7z", ".rar", ".pdf", ".docx", ".epub", ".arrow", ".parquet")


def input_files(pattern, tally=None):
    """Returns the files that a path, folder or glob names, sorted.

    In a folder those of a known kind; hidden ones are passed over. A file with two names is read
    under the first.
    """
    tally, pattern, paths = tally or Tally(), os.path.expanduser(pattern), {}
    if os.path.isfile(pattern):
        path = Path(pattern)
        if (
            kind_of(path) is None
            and (suffix := files.inner_path(path).suffix.lower()) in UNREADABLE
        ):
            remedy = "unpack it, or convert it to .txt, .jsonl or .parquet"
            raise UserError(f"{path}: {suffix} files are not read; {remedy}")
        return [path]
    is_folder = os.path.isdir(pattern)
    if not is_folder and not glob.has_magic(pattern):
        problem = "a pipe or a device" if os.path.exists(pattern) else "not found"
        raise UserError(f"{pattern}: {problem}; {PLACES}")
    for path in sorted(files_below(pattern, tally) if is_folder else globbed(pattern)):
        if kind_of(path) is None or path.name[0] == "." or path.is_dir():
            continue
        if path.is_file():
            paths.setdefault(os.path.realpath(path), path)
        else:
            tally.bad("not-a-file", f"{path}: a broken link, a pipe or a device")
    if not paths:
        kinds = f"{', '.join(files.SUFFIXES)} (or these with {', '.join(files.OPENERS)})"
        raise UserError(f"{pattern}: holds no file that ends in {kinds}")
    return list(paths.values())


def files_below(folder, tally):
    """Yields every file below a folder; a folder with two names is entered once."""
    refused = lambda error: tally.bad("unreadable-folder", f"{error.filename}: {error.strerror}")
    entered = set()
    for parent, folders, names in os.walk(folder, onerror=refused, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in entered else sorted(name for name in folders if name[0] != ".")
        if real not in entered:
            yield from (Path(parent, name) for name in names)
        entered.add(real)


def globbed(pattern):
    """Yields the paths that a pattern matches; ** enters no linked folder, so that it ends."""
    parts = [re.sub(r"\*+", "*", part) if part != "**" else part for part in Path(pattern).parts]
    root = Path(Path(pattern).anchor)
    parts = parts[len(root.parts) :] + ["*"] * (parts[-1] == "**")
    for path in root.glob("/".join(parts)):
        if all(part[0] != "." or part in parts for part in path.parts):
            yield path


def file_documents(paths, column, max_length, tally):
    """Yields the documents of files in their order; a damaged one gives those before the damage.

    Raises UserError only at the end, if no file had a column of text.
    """
    problem = document = None

    def give_up(error):
        nonlocal problem
        if isinstance(error, NoColumn):
            problem = error
            return tally.bad("no-text-column", str(error))
        reason = "damaged-file" if error.errno is None else "unreadable-file"
        tally.bad(reason, f"{path}: {error.strerror or error}")

    for path in paths:
        for document in file_texts(path, column, max_length, tally, give_up):
            yield document
    if problem and not document:
        raise problem


def file_texts(path, column, max_length, tally, give_up):
    """Returns the (where, text)s of a file; give_up(error) is called where it is damaged."""
    kind = kind_of(path)
    if kind in ROW_READERS:
        rows = until_damaged(files.rows(path, tally), give_up)
        return joined_wikitext(until_damaged(column_texts(rows, column, tally), give_up))
    read = files.page_lines if kind == "html" else files.decoded_lines
    lines = until_damaged(read(path, tally), give_up)
    if kind == "wikitext":
        return articles((f"{path} line {number}", line) for number, line in lines)
    return numbered(path, passages((line for _, line in lines), max_length))


# The columns that are taken for the text, the likeliest first
USUAL = ("text", "content", "document", "article", "body", "passage", "markdown")


def column_texts(rows, column, tally):
    """Yields (where, text) of (where, row); a row without a text is counted.

    The text is the column `column` if given, else a usual one, else the only one that holds text.
    The first rows together tell, up to one that has it by name: a single odd row decides nothing.
    """
    first, strings, names = [], {}, [column] if column else USUAL
    for where, row in islice(rows, 20):
        first.append((where, row))
        if isinstance(row, dict):
            strings |= {key: isinstance(row[key], str) or strings.get(key) for key in row}
        if any(map(strings.get, names)):
            break
    texts = [key for key, is_text in strings.items() if is_text]
    names = [*names, *texts] if len(texts) == 1 and not column else names
    name = next((name for name in names if name in texts), names[0])
    if strings and name not in texts:
        what = f"no column {column!r} of text" if column else "no column that is surely the text"
        what += f" among {', '.join(map(str, strings))[:200]}; name it with --text_column=NAME"
        raise NoColumn(f"{first[0][0]}: {what}")
    for where, row in chain(first, rows):
        if not isinstance(row, dict):
            tally.bad("not-an-object", where)
        elif name not in row:
            tally.bad("missing-text", f'{where}: missing "{name}"')
        elif not isinstance(row[name], str):
            tally.bad("not-a-string", f'{where}: "{name}" must be a string')
        else:
            yield where, row[name]


def joined_wikitext(texts):
    """Yields (where, text)s as they are, or the articles of WikiText, where a row is a line.

    The first row of WikiText that is not blank is a heading, ` = Title = `.
    """
    first = []
    for document in islice(texts, 100):
        first.append(document)
        if document[1].strip():
            break
    is_wikitext = first and re.fullmatch(r" = .* = ?\n?", first[-1][1])
    texts = chain(first, texts)
    yield from articles(texts) if is_wikitext else texts


def articles(lines):
    """Joins the (where, line)s of WikiText to articles; a heading after a blank line opens one."""
    article, first, size, blank = [], "", 0, True
    for where, line in lines:
        heading = re.fullmatch(r"= [^=].* =", line.strip()) and not line.strip().endswith("= =")
        if article and ((blank and heading) or size > MAX_LINE):
            yield first, "".join(article)
            article, size = [], 0
        blank = not line.strip()
        if article or not blank:
            first = first if article else where
            article.append(line.removeprefix(" ").removesuffix("\n") + "\n")
            size += len(line)
    if article:
        yield first, "".join(article)


class Unreachable(UserError):
    """A dataset that is not at hand: no network, no such name, no package to fetch it with."""


def hub_rows(path, config=""):
    """Streams (where, row) of a dataset of the hub: hf:owner/name[:config[:split]].

    Raises Unreachable for any error, in the middle too: no dataset comes out shorter than it is.
    """
    name, own, split = (path.removeprefix("hf:").split(":", 2) + ["", ""])[:3]
    if not name.strip("/ "):
        raise UserError(f"{path!r} names no dataset; write hf:owner/name")
    if own and config not in ("", own):
        raise UserError(f"{path} names another configuration than input_config {config!r}")
    datasets, number = package("datasets", path, Unreachable), 0
    split = split or "train"
    try:
        for row in datasets.load_dataset(name, own or config or None, split=split, streaming=True):
            yield f"{name} row {number}", row
            number += 1
    except Exception as error:  # anything may come from there; none of it is worth a traceback
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        where = f"{path}: broke off after {number} rows" if number else f"{path}: cannot be read"
        remedy = "check the name and the network, or give local files"
        raise Unreachable(f"{where} ({reason}); {remedy}") from None
