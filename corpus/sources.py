"""Where text comes from: this Python's documentation, files, the Hugging Face hub, mixtures.

A source is a generator of (where, text): `where` names the place for people ("a.jsonl line 7"),
`text` is a raw document. A row that cannot be read is counted in the `Tally` and passed over. A
source of no use at all (nothing there, no column of text, no network) is a UserError.
"""

import ast
import glob
import html
import os
import re
import sysconfig
import warnings
from collections import Counter
from dataclasses import dataclass
from itertools import chain, groupby, islice, repeat
from operator import itemgetter
from pathlib import Path

from corpus import files
from corpus.clean import pieces
from corpus.files import kind_of, package, until_damaged
from corpus.report import Tally, counted, main_reasons, reasons_of
from corpus.rows import ROW_READERS, file_rows
from lib import config
from lib.config import PositiveFloat, PositiveInt, UserError


@dataclass(frozen=True)
class SourceConfig:
    """Which text to read."""

    # a file, folder or glob; docstrings: (of this Python); hf:owner/name[:config[:split]]
    input_path: str = "docstrings:"
    input_config: str = ""  # configuration of a hf: dataset, such as wikitext-103-raw-v1
    text_column: str = ""  # the column that holds the text; empty = found by its name
    # what stands between documents of plain text besides <|endoftext|>: formfeed, rule (a line of
    # ===, ***, --- or ___), or the line itself
    separator: str = ""
    licence: str = ""  # a note on the source's licence, for DATA_CARD.md


@dataclass(frozen=True, kw_only=True)
class Source(SourceConfig):
    """An entry of `mixture`."""

    name: str  # of the source in stats.json
    weight: PositiveFloat = 1.0  # its share of the documents is this over the sum of all
    max_samples: PositiveInt | None = None  # read no more documents of it


def read_documents(cfg, tally):
    """Yields (where, raw text, opening) of every document that cfg names, in a fixed order.

    The opening is the text, or of a piece of a long text the first. Raises UserError at once for
    absent files, later for what only reading shows.
    """
    streams = [(source, documents_of(source, cfg.max_length, tally)) for source in sources_of(cfg)]
    return interleave(streams, tally)


def sources_of(cfg):
    """Returns the Sources of a configuration: its mixture's, or that of its input_path."""
    alone = config.narrow(cfg, SourceConfig)
    if cfg.mixture is None:
        return [Source(name=cfg.input_path, **vars(alone))]
    if alone != SourceConfig(licence=cfg.licence):
        options = "input_path, input_config, text_column, separator"
        raise UserError(f"mixture and one of {options} are both given; keep one")
    sources = [mixture_source(f"mixture[{n}]", entry) for n, entry in enumerate(cfg.mixture)]
    if len({source.name for source in sources}) < len(sources):
        raise UserError("mixture: two sources have the same name; rename one")
    return sources


def mixture_source(where, entry):
    """Returns the Source that an entry of `mixture` describes; a UserError names the entry."""
    options = config.options_of(Source)
    if not isinstance(entry, dict) or not entry.get("name") or not entry.get("input_path"):
        raise UserError(f"{where} must be an object with name and input_path")
    values = {key: value for key, value in entry.items() if key[:1] != "_"}  # without comments
    if unknown := sorted(values.keys() - options):
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(options)}")
    return Source(**{k: config.accept(k, v, options[k], where) for k, v in values.items()})


def interleave(streams, tally):
    """Yields from each (source, documents) so that their counts always stay nearest the weights.

    At each turn every source is owed its share of a document, and the one owed most is read. When
    one has ended or is capped, the others go on in their proportions.
    """
    owed = {source.name: 0.0 for source, _ in streams}
    for source, _ in streams:
        counts = {"documents": 0, "bytes": 0, "capped": False, "weight": source.weight}
        tally.sources[source.name] = counts
    while streams:
        total = sum(source.weight for source, _ in streams)
        due = {source.name: owed[source.name] + source.weight / total for source, _ in streams}
        turn = source, documents = max(streams, key=lambda stream: due[stream[0].name])
        counts, (where, text, *opening) = tally.sources[source.name], next(documents, (None, ""))
        if where is None:
            streams.remove(turn)
            if not counts["documents"] and len(owed) > 1:  # alone, the run says why at its end
                why = f"0 usable documents ({', '.join(tally.dropped['read']) or 'it is empty'})"
                raise UserError(f"mixture: {source.name}: {why}; mend it or leave it out")
        elif files.surrogate("".join((text, *opening))):
            tally.bad("bad-unicode", f"{where}: lone surrogate", text)
        else:
            owed |= due
            owed[source.name] -= 1
            counts["documents"] += 1
            counts["bytes"] += len(text.encode())
            if counts["documents"] == source.max_samples:
                counts["capped"] = True
                streams.remove(turn)
            yield where, text, *(opening or [text])


def documents_of(source, max_length, tally):
    """Returns the documents of one source; raises at once for an absent file."""
    if source.input_path == "docstrings:":
        return docstring_documents(max_length, tally)
    if source.input_path.startswith("hf:"):
        rows = hub_rows(source.input_path, source.input_config)
        return joined_wikitext(column_texts(rows, source.text_column, tally))
    paths = input_files(source.input_path, tally)
    return chain.from_iterable(file_texts(path, source, max_length, tally) for path in paths)


def source_rows(path, tally):
    """Yields (where, value) of every row of the files, or of the dataset of the hub, named `path`.

    A damaged file is a UserError: a training reads all of its data.
    """
    if str(path).startswith("hf:"):
        yield from hub_rows(str(path))
        return
    for p in input_files(str(path), tally, kinds=ROW_READERS):
        yield from file_rows(p, tally)
        if damage := tally.dropped["read"].get("unreadable-file"):
            raise UserError(damage["examples"][0])


class BadRow(Exception):
    """Why a row cannot be used: BadRow(reason, detail)."""


class PassedOver(BadRow):
    """A row that is right and teaches nothing: counted, and not among the bad."""


def usable_rows(path, convert, tally=None, max_bad=0.05, least=1):
    """Returns [(where, rule, value)] of the rows that convert(row) -> (rule, value, ...) accepts.

    Raises UserError if more than `max_bad` of the rows are unusable, or fewer than `least` are
    left. convert raises BadRow for others; its third value, if any, are the unused columns.
    """
    tally = tally or Tally()
    rows = []
    for where, row in source_rows(path, tally):
        try:
            rule, value, *unused = convert(row)
        except PassedOver as error:
            tally.drop("filter", error.args[0], f"{where}: {error.args[1]}")
        except BadRow as error:
            tally.bad(error.args[0], f"{where}: {error.args[1]}")
        except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
            tally.bad("other-types", f"{where}: {error!r:.80}")
        else:
            rows.append((where, rule, value))
            tally.unused |= dict.fromkeys(chain(*unused))
    total = len(rows) + sum(count for _, _, count, _ in reasons_of(tally.dropped))
    if len(rows) < least or not total or tally.bad_rows > max_bad * total:
        problem = f"{tally.bad_rows} of {total} rows are unusable"
        problem = problem if rows else f"0 usable rows of {total}"
        reasons = main_reasons(tally.dropped, path)
        raise UserError(f"{path}: {problem}: {reasons or 'it is empty'}")
    return rows


# A Python installation documents itself: megabytes of English on any machine, offline.
UNDOCUMENTED = {"test", "tests", "testing", "idle_test", "site-packages", "__pycache__", "_vendor"}


def docstring_documents(max_length, tally):
    """Yields this Python's documentation: its reference, the standard library, packages."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield from numbered(f"pydoc_data.topics {name}", [(0, text)], max_length)
    for root in map(Path, map(sysconfig.get_path, ("stdlib", "purelib"))):
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
            parts = path.relative_to(root).with_suffix("").parts
            if not UNDOCUMENTED & set(parts):
                module = ".".join(parts).removesuffix(".__init__")
                yield from module_documents(path, module, max_length, tally)


def module_documents(path, module, max_length, tally):
    """Yields a document for a module and its functions, and one for each class with its methods."""
    try:
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
        yield from numbered(title, zip(repeat(0), docstrings(node, title, "")), max_length)


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


def numbered(title, parts, max_length):
    """Yields (where, piece, first piece) of (document, part)s, cut to at most max_length."""
    number = 0
    for _, document in groupby(parts, itemgetter(0)):
        opening = None
        for text in filter(str.strip, pieces((part for _, part in document), max_length)):
            opening = opening or text
            yield f"{title} [{number}]", text, opening
            number += 1


def input_files(pattern, tally=None, kinds=(*ROW_READERS, "text", "html", "wikitext")):
    """Returns the files that a path, folder or glob names, sorted.

    In a folder those of the `kinds`; a tally counts the others. Hidden files and linked folders are
    passed over.
    """
    pattern = os.path.expanduser(pattern)
    path = Path(pattern)
    if os.path.isfile(pattern):
        if kind_of(path) == "binary":
            raise UserError(f"{path}: is not read; unpack it, or convert it to .txt or .jsonl")
        return [path]
    if os.path.isdir(pattern):
        root, parts = path, ["**", "*"]
    elif glob.has_magic(pattern):
        root, parts = Path(path.anchor), path.relative_to(path.anchor).parts
        parts = [part if part == "**" else re.sub(r"\*+", "*", part) for part in parts]
        parts += ["*"] * (parts[-1] == "**")
    else:
        remedy = "give a file, a folder, a glob, hf:owner/name or docstrings:"
        raise UserError(f"{pattern}: not found; {remedy}")
    hidden = lambda p: any(n[0] == "." and n not in parts for n in p.relative_to(root).parts)
    paths = root.glob("/".join(parts))
    paths = sorted(p for p in paths if not hidden(p) and p.is_file())
    chosen = [p for p in paths if kind_of(p) in kinds]
    others = Counter(p.suffix.lower() or "no suffix" for p in {*paths}.difference(chosen))
    if chosen:
        (tally or Tally()).passed_over.update(others)
        return chosen
    read = ", ".join(suffix for suffix, kind in files.SUFFIXES.items() if kind in kinds)
    raise UserError(f"{pattern}: holds no file that ends in {read}; {counted(others)}")


# Between the documents of a plain text, as in GPT-2's corpora; in backticks it is spoken of
END_OF_TEXT = r"(?<!`)<\|(?:endoftext|end_of_text)\|>(?!`)|^[ \t]*</s>[ \t]*$"
RULE = "|".join(rf"(?:{mark}[ \t]*+){{3,}}" for mark in ("=", r"\*", "-", "_"))
BREAKS = {"": "(?!)", "formfeed": r"\f", "rule": rf"^[ \t]*(?:{RULE})$"}


def separated(lines, separator):
    """Yields (number, text) of the lines of a plain text, each in the document of that number.

    Between documents stands END_OF_TEXT, or what DataConfig.separator says.
    """
    line_of_it = rf"^[ \t]*{re.escape(separator.strip())}[ \t]*$"
    pattern, number = re.compile(f"{END_OF_TEXT}|{BREAKS.get(separator, line_of_it)}"), 0
    for line in lines:
        for at, text in enumerate(pattern.split(line)):
            number += at > 0
            yield number, text


def file_texts(path, source, max_length, tally):
    """Returns the (where, text)s of a file; a damaged one gives those before the damage."""
    kind = kind_of(path)
    if kind in ROW_READERS:
        rows = file_rows(path, tally)
        return joined_wikitext(column_texts(rows, source.text_column, tally))
    lines = until_damaged(files.decoded_lines(path, tally), path, tally)
    if kind == "wikitext":
        return joined_wikitext((f"{path} line {number}", line) for number, line in lines)
    texts = (line for _, line in lines)
    if kind == "html":
        return numbered(path, [(0, page_text("".join(texts)))], max_length)
    return numbered(path, separated(texts, source.separator), max_length)


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


# The columns that are taken for the text, the likeliest first
USUAL = ("text", "content", "document", "article", "body", "passage", "markdown")


def column_texts(rows, column, tally):
    """Yields (where, text) of (where, row); a row without a text is counted.

    The text is the column `column` if given, else a usual one, else the only one that holds text.
    The first 20 rows together tell: a single odd row decides nothing. Strings are texts themselves.
    """
    first = list(islice(rows, 20))
    objects = [row for _, row in first if isinstance(row, dict)]
    types = {}  # of the values of each column
    for key, value in chain.from_iterable(row.items() for row in objects):
        nested = isinstance(value, list) and any(isinstance(item, dict) for item in value)
        types.setdefault(key, set()).add("objects" if nested else type(value).__name__)
    texts = [key for key, held in types.items() if "str" in held]
    surely = len(texts) == 1 and {"objects", "bytes"}.isdisjoint(chain(*types.values()))
    names = [column] if column else [*USUAL, *(texts if surely else [])]
    found = [name for name in names if name in texts]
    if types and not found:
        wanted = f"column {column!r} holds no text" if column else "no column is surely the text"
        columns = ", ".join(f"{key} ({', '.join(sorted(held))})" for key, held in types.items())
        problem = f"{wanted} among {columns:.200}; name it with --text_column=NAME"
        return tally.bad("no-text-column", f"{first[0][0]}: {problem}")
    name = (found or names)[0]
    for where, row in chain(first, rows):
        text = row.get(name) if isinstance(row, dict) else row
        if isinstance(text, str) and not (row is text and objects):
            yield where, text
        else:
            tally.bad("no-text", f'{where}: "{name}" must be a string, got {type(text).__name__}')


def joined_wikitext(texts):
    """Yields (where, text)s as they are, or the articles of WikiText, where a row is a line.

    The first row of WikiText that is not blank is a heading, ` = Title = `; after a blank line one
    opens an article.
    """
    first = list(islice(texts, 20))
    title, texts = next((text for _, text in first if text.strip()), ""), chain(first, texts)
    if not re.fullmatch(r" = .* = ?\n?", title):
        yield from texts
        return
    article, opening, blank = [], "", True
    for where, line in texts:
        heading = re.fullmatch(r"= [^=].* =", line.strip()) and not line.strip().endswith("= =")
        if article and blank and heading:
            yield opening, "".join(article)
            article = []
        blank = not line.strip()
        if article or not blank:
            opening = opening if article else where
            article.append(line.removeprefix(" ").removesuffix("\n") + "\n")
    if article:
        yield opening, "".join(article)


class Unreachable(UserError):
    """A dataset that is not at hand: no network, no such name, no package to fetch it with."""


def hub_rows(path, config=""):
    """Streams (where, row) of a dataset of the hub: hf:owner/name[:config[:split]].

    Raises Unreachable for any error, in the middle too: no dataset comes out shorter than it is.
    """
    name, own, split = (path.removeprefix("hf:").split(":", 2) + ["", ""])[:3]
    datasets, number = package("datasets", path, Unreachable), 0
    options = {"name": own or config or None, "split": split or "train", "streaming": True}
    try:
        for row in datasets.load_dataset(name, **options):
            yield f"{name} row {number}", row
            number += 1
    except Exception as error:  # anything may come from there; none of it is worth a traceback
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        where = f"{path}: broke off after {number} rows" if number else f"{path}: cannot be read"
        remedy = "check the name and the network, or give local files"
        raise Unreachable(f"{where} ({reason}); {remedy}") from None
