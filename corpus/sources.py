"""Where text comes from: this Python's documentation, files, the Hugging Face hub, mixtures.

A source is a generator of (where, text): `where` names the place for people ("a.jsonl line 7"),
`text` is a raw document. A row that cannot be read is counted in the `Tally` and passed over. A
source of no use at all (nothing there, no column of text, no network) is a UserError.
"""

import ast
import fnmatch
import glob
import os
import re
import sysconfig
import warnings
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

from corpus import files
from corpus.files import MAX_LINE, ROW_READERS, USUAL, Tally, kind_of, package, until_damaged
from lib import config
from lib.config import PositiveFloat, PositiveInt, UserError

PLACES = "give a file, a folder, a glob, hf:owner/name or docstrings:"

# --- Sources and their mixture --------------------------------------------------------------------


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
    own = {"input_path": "docstrings:", "input_config": "", "text_column": ""}
    if cfg.mixture is None:
        if not cfg.input_path:
            raise UserError(f"input_path is empty; {PLACES}")
        keys = {name: getattr(cfg, name) for name in (*own, "licence")}
        return [Source(name=cfg.input_path, **keys)]
    if not cfg.mixture:
        entry = '{"name": ..., "input_path": ..., "weight": 1}'
        raise UserError(f"mixture: an empty list; give entries {entry}")
    for name, default in own.items():
        if (value := getattr(cfg, name)) != default:
            remedy = f"keep one of the two (each entry of mixture has a {name} of its own)"
            raise UserError(f"mixture and {name} {value!r} are both given; {remedy}")
    sources = [source_of(f"mixture[{number}]", entry) for number, entry in enumerate(cfg.mixture)]
    names = [source.name for source in sources]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise UserError(f"mixture[{number}]: a second source with the name {name!r}; rename it")
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
    for key, option in options.items():
        if option.default is config.NO_DEFAULT and not values.get(key):
            raise UserError(f"{where}: {key} is {'empty' if key in values else 'missing'}")
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
        if where is None:
            counts["ended"] = True
            streams.remove(turn)
            continue
        counts["bytes"] += len(text) if text.isascii() else len(text.encode(errors="ignore"))
        if files.surrogate(text):
            tally.bad("bad-unicode", f"{where}: lone surrogate")
            continue
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
    if path.startswith("docstrings:"):
        return docstring_documents(path.removeprefix("docstrings:"), max_length, tally)
    if path.startswith("hf:"):
        package("datasets", path, Unreachable)
        rows = hub_rows(path, source.input_config)
        return joined_wikitext(column_texts(rows, source.text_column, tally))
    paths = input_files(path, tally)
    files.check_packages(paths)
    return file_documents(paths, source.text_column, max_length, tally)


def input_bytes(cfg):
    """Returns the size of all files that cfg names; None if it names other sources too."""
    paths = [source.input_path for source in sources_of(cfg)]
    if any(path.startswith(("docstrings:", "hf:")) for path in paths):
        return None
    return sum(file.stat().st_size for path in paths for file in input_files(path))


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


# --- This Python's documentation ------------------------------------------------------------------

# A Python installation documents itself: megabytes of English on any machine, offline.
UNDOCUMENTED = {"test", "tests", "testing", "idle_test", "site-packages", "__pycache__", "_vendor"}


def docstring_documents(folder, max_length, tally):
    """Yields this Python's documentation (reference, standard library, packages) or a folder's."""
    if folder and not os.path.isdir(folder):
        alone = "docstrings: alone is this Python's documentation"
        raise UserError(f"docstrings:{folder}: not a folder; {alone}")
    roots = [folder] if folder else map(sysconfig.get_path, ("stdlib", "purelib"))
    if not folder:
        from pydoc_data.topics import topics

        for name in sorted(topics):
            lines = topics[name].splitlines(keepends=True)
            yield from numbered(f"pydoc_data.topics {name}", passages(lines, max_length))
    for root in map(Path, roots):
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
            parts = path.relative_to(root).with_suffix("").parts
            if not UNDOCUMENTED & set(parts):
                module = ".".join(parts).removesuffix(".__init__")
                yield from module_documents(path, module, max_length, tally)


def module_documents(path, module, max_length, tally):
    """Yields a document for a module and its functions, and one for each class with its methods."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_LINE:
            return tally.bad("unreadable-module", f"{module}: not a file, or over 16 MiB")
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


# --- Files ----------------------------------------------------------------------------------------

UNREADABLE = (".zip", ".tar", ".tgz", ".7z", ".rar", ".pdf", ".docx", ".epub", ".arrow", ".parquet")


def input_files(pattern, tally=None):
    """Returns the files that a path, folder or glob names, sorted.

    In a folder those of a known kind; hidden ones are passed over. A file with two names is read
    under the first.
    """
    tally, pattern = tally or Tally(), os.path.expanduser(pattern)
    is_folder, paths = os.path.isdir(pattern), {}
    if os.path.isfile(pattern):
        refuse_unreadable(Path(pattern))
        return [Path(pattern)]
    if os.path.exists(pattern) and not is_folder:
        raise UserError(f"{pattern}: a pipe or a device; write its content to a file")
    for path in sorted(files_below(pattern, tally) if is_folder else globbed(pattern, tally)):
        if kind_of(path) is None or path.name[0] == "." or os.path.isdir(path):
            continue
        if os.path.isfile(path):
            paths.setdefault(os.path.realpath(path), path)
        else:
            tally.bad("not-a-file", f"{path}: a broken link, a pipe or a device")
    if not paths and not is_folder and not glob.has_magic(pattern):
        raise UserError(f"{pattern}: not found; {PLACES}")
    if not paths:
        kinds = f"{', '.join(files.SUFFIXES)} (or these with {', '.join(files.OPENERS)})"
        raise UserError(f"{pattern}: holds no file that ends in {kinds}")
    return list(paths.values())


def refuse_unreadable(path):
    suffix = files.inner_path(path).suffix.lower()
    if kind_of(path) is None and suffix in UNREADABLE:
        remedy = "unpack it, or convert it to .txt, .jsonl or .parquet"
        raise UserError(f"{path}: {suffix} files are not read; {remedy}")


def files_below(folder, tally):
    """Yields every file below a folder; a folder with two names is entered once."""
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
    """Yields the paths that a pattern matches; under ** glob itself follows links in circles."""
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
    """Returns whether a path's parts match a pattern's parts, ** any number of them."""
    if not parts or not patterns:
        return not parts and patterns in ((), ("**",))
    if patterns[0] == "**":
        return matches(parts, patterns[1:]) or matches(parts[1:], patterns)
    return fnmatch.fnmatch(parts[0], patterns[0]) and matches(parts[1:], patterns[1:])


def file_documents(paths, column, max_length, tally):
    """Yields the documents of files in their order; a damaged one gives those before the damage.

    Raises UserError only at the end, if no file had a column of text.
    """
    useless, empty = [], True

    def give_up(path, error):
        if isinstance(error, files.NoColumn):
            useless.append(error)
            return tally.bad("no-text-column", str(error))
        reason = "damaged-file" if error.errno is None else "unreadable-file"
        tally.bad(reason, f"{path}: {error.strerror or error}")

    for path in paths:
        for document in file_texts(path, column, max_length, tally, partial(give_up, path)):
            empty = False
            yield document
    if useless and empty:
        raise useless[0]


def file_texts(path, column, max_length, tally, give_up):
    """Returns the (where, text)s of a file; give_up(error) is called where it is damaged."""
    kind = kind_of(path)
    if kind in ROW_READERS:
        texts = column_texts(files.rows(path, tally, column), column, tally)
        return joined_wikitext(until_damaged(texts, give_up))
    read = files.page_lines if kind == "html" else files.decoded_lines
    lines = until_damaged(read(path, tally), give_up)
    if kind == "wikitext":
        return articles((f"{path} line {number}", line) for number, line in lines)
    return numbered(path, passages((line for _, line in lines), max_length))


def column_texts(rows, column, tally):
    """Yields (where, text) of (where, row); a row without a text is counted.

    The column is chosen by the first rows together, up to one that has it by name: a single odd row
    decides nothing.
    """
    first, union = [], {}
    for where, row in islice(rows, 20):
        first.append((where, row))
        if isinstance(row, dict):
            union |= {k: v for k, v in row.items() if not isinstance(union.get(k), str)}
            if row.keys() & ({column} if column else set(USUAL)):
                break
    name = column or "text"
    if union:
        strings = [key for key, value in union.items() if isinstance(value, str)]
        name = files.choose_column(column, first[0][0], strings, union)
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

    WikiText has a heading ` = Title = ` among its first hundred rows.
    """
    first, is_wikitext = [], False
    for where, text in islice(texts, 100):
        first.append((where, text))
        is_wikitext = re.fullmatch(r" = .* = ?\n?", text) is not None
        if is_wikitext or len(text) > 100_000 or "\n" in text.rstrip("\n"):
            break
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


# --- The Hugging Face hub -------------------------------------------------------------------------


class Unreachable(UserError):
    """A dataset that is not at hand: no network, no such name, no package to fetch it with."""


def hub_rows(path, config=""):
    """Streams (where, row) of a dataset of the hub: hf:owner/name[@revision][:config[:split]].

    Raises Unreachable for any error, in the middle too: no dataset comes out shorter than it is.
    """
    name, own, split = (path.removeprefix("hf:").split(":", 2) + ["", ""])[:3]
    if not name.strip("/ "):
        raise UserError(f"{path!r} names no dataset; write hf:owner/name")
    if own and config not in ("", own):
        other = f"another configuration than input_config {config!r}"
        raise UserError(f"{path} names {other}; keep one")
    name, _, revision = name.partition("@")
    datasets, number = package("datasets", path, Unreachable), 0
    options = {"split": split or "train", "streaming": True, "revision": revision or None}
    try:
        for row in datasets.load_dataset(name, own or config or None, **options):
            yield f"{name} row {number}", row
            number += 1
    except Exception as error:  # anything may come from there; none of it is worth a traceback
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        where = f"{path}: broke off after {number} rows" if number else f"{path}: cannot be read"
        remedy = "check the name and the network, or give local files"
        if "scripts are no longer supported" in reason:
            _, colon, rest = path.removeprefix("hf:").partition(":")
            remedy = f"the hub's own copy may do: hf:{name}@refs/convert/parquet{colon}{rest}"
        raise Unreachable(f"{where} ({reason}); {remedy}") from None
