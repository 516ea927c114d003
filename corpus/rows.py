"""Rows out of files of JSON, CSV and parquet: each a (where, row), few of them held at once.

A row that cannot be read is counted by its reason in the `Tally`; a damaged file gives those before
the damage. Memory stays bounded by MAX_LINE, but for one JSON value over several lines.
"""

import csv
import io
import re
from collections import deque
from itertools import chain, islice

from corpus import files
from corpus.files import json_value, surrogate, until_damaged, whole_json


def file_rows(path, tally):
    """Yields (where, row) of a file of rows; a file whose name does not tell is taken for JSON."""
    reader = ROW_READERS.get(files.kind_of(path), json_rows)
    return until_damaged(reader(path, tally), path, tally)


def json_rows(path, tally):
    """Yields (where, row) of JSON: a value a line, a list, or objects over several lines.

    A list or an object that stands alone may hold the rows.
    """
    values = json_lines(path, tally) if is_by_line(path) else json_stream(path)
    values = until_damaged(values, path, tally)
    begun = list(islice(values, 2))
    if len(begun) == 1 and (held := held_rows(begun[0][1])) is not None:
        begun = ((f"{path} element {number}", row) for number, row in enumerate(held, start=1))
    yield from chain(begun, values)


def is_by_line(path):
    """Returns whether each line is a JSON value; the first two tell, for suffixes mislead."""
    lines = filter(None, map(str.strip, files.text_parts(path)))
    first, second = next(lines, ""), next(lines, "")
    opens = first[:1] == "[" or (first[:1] == "{" and len(first) < files.MAX_LINE - 1)
    goes_on = first == "[" or first.endswith(",") or whole_json(second) is None
    return whole_json(first) is not None or not (opens and goes_on)


OF_MESSAGES = {"role", "from", "author", "speaker", "sender"}
DIALOGUE = re.compile("conversation|messages|dialog|turns|chat|history")


def held_rows(value):
    """Returns the rows that a value alone holds; None if it is a row itself, as a conversation is.

    They are a list's elements, an object's only list of objects, or columns of one length: lists,
    or pandas' {"0": cell, ...}.
    """
    is_message = lambda value: isinstance(value, dict) and value.keys() & OF_MESSAGES
    if not isinstance(value, dict):
        return value if isinstance(value, list) and not any(map(is_message, value[:1])) else None
    if all(isinstance(cells, dict) and "0" in cells for cells in value.values()):
        value = {name: [*cells.values()] for name, cells in value.items()}
    columns = {name: cells for name, cells in value.items() if isinstance(cells, list) and cells}
    for name, (cell, *_) in columns.items():
        parts = cell.values() if isinstance(cell, dict) else [cell]
        if is_message(cell) or (DIALOGUE.match(name) and list not in map(type, parts)):
            return None
    objects = [cells for cells in columns.values() if isinstance(cells[0], dict)]
    if len(objects) == 1:
        return objects[0]
    whole = columns.keys() == value.keys() and len(set(map(len, columns.values()))) == 1
    return [dict(zip(columns, row)) for row in zip(*columns.values())] if whole else None


def json_lines(path, tally):
    for number, line in files.decoded_lines(path, tally):
        line = line.strip(" \t\n")
        value, end = json_value(line)
        if end == len(line):
            yield f"{path} line {number}", value
        elif line:
            tally.bad("not-json", f"{path} line {number}", line)


def json_stream(path):
    """Yields (where, element) of a JSON list, or values one after another; holds a few at once.

    Raises OSError where it breaks off, and for text behind the list.
    """
    parts = files.text_parts(path, files.BUFFER)
    text = next(parts, "").lstrip()
    last = "]" if text.startswith("[") else ""
    number, end = 0, len(last)
    while end is not None:
        start = re.compile(r"[ \t\n,]*").match(text, end).end()
        value, end = json_value(text, start)
        size = len(text) - start  # a value that ends with the text may go on: twice as much tells
        if end in (None, len(text)) and (more := "".join(islice(parts, 1 + size // files.BUFFER))):
            text, end = text[start:] + more, 0
        elif end is not None:
            number += 1
            yield f"{path} element {number}", value
    if text[start:].rstrip() != last:
        raise OSError(f"its JSON stops after {number} elements: it is broken, or text follows it")


BACKSLASHES = re.compile(r'(\\["\\])|\\')  # an escape, or a backslash that means itself
QUOTED = re.compile('(?s)".+"')  # a cell


def csv_records(lines, options):
    """Yields (number, cells) of each record of (number, line)s; None for cells that are no CSV.

    The first record has the right number of cells. Of one that goes wrong only the first line is
    lost: an open quote has taken in those after it, which are read again.
    """
    if "escapechar" in options:
        lines = ((n, BACKSLASHES.sub(lambda m: m[1] or r"\\", line)) for n, line in lines)
    lines, again, taken, reader, width = iter(lines), deque(), [], None, 0

    def feed(size=0):
        while not taken or size < files.MAX_LINE // 2:
            if (pair := again.popleft() if again else next(lines, None)) is None:
                return
            size = len(pair[1]) + (size if taken else 0)  # of a record
            taken.append(pair)
            yield pair[1]

    while True:
        taken.clear()
        try:
            cells = next(reader := reader or csv.reader(feed(), strict=True, **options), None)
        except csv.Error:
            cells = reader = None
        if not taken:
            return
        if not taken[0][1].isspace():
            width = width or len(cells or ())
            if cells is None or len(cells) != width:
                again.extendleft(reversed(taken[1:]))
            yield taken[0][0], cells


def csv_options(text, delimiters):
    """Returns the options of the module csv under which the fewest records of a table misfit.

    `text` is the table's beginning. Between tabs or bars quotes may mean nothing, unless cells both
    begin and end with one.
    """

    def misfits(options):
        records = [cells or () for _, cells in csv_records(enumerate(io.StringIO(text)), options)]
        quoted = QUOTED.fullmatch if "quoting" in options else lambda cell: False
        fits = lambda cells: len(cells) == len(records[0]) and not any(map(quoted, cells))
        return sum(not cells or not fits(cells) for cells in records)

    header, styles = text.lstrip("\n").partition("\n")[0], [{}, {"escapechar": "\\"}]
    options = [
        {"delimiter": delimiter, **style}
        for delimiter in [d for d in delimiters if d in header] or delimiters[0]
        for style in styles + [{"quoting": csv.QUOTE_NONE}] * (delimiter in "\t|")
    ]
    return min(options, key=misfits)


def csv_rows(path, tally):
    """Yields (where, row) of a CSV file, each an object named by the header.

    Raises OSError for a header that is no CSV or names two columns alike.
    """
    csv.field_size_limit(files.MAX_LINE)
    head = next(files.text_parts(path, files.BUFFER), "")
    named = re.match(r'(?:"?sep=(.)"?\n)?', head, re.IGNORECASE)  # Excel names the delimiter
    options = csv_options(head[named.end() :], named[1] or ",;\t|")
    lines = enumerate(files.text_parts(path), start=1)
    records = csv_records(islice(lines, bool(named[1]), None), options)
    names = next(records, (0, ()))[1] or [""]
    names = [name.strip() or f"column {number}" for number, name in enumerate(names, start=1)]
    if len(set(names)) < len(names):
        raise OSError(f"its header names a column twice: {', '.join(names)[:200]}")
    for number, cells in records:
        where, row = f"{path} line {number}", "".join(cells or ())
        if not cells:
            problem = "a quote opens a cell and does not end it; write a quote in a cell twice"
            tally.bad("not-csv", f"{where}: {problem}")
        elif len(cells) != len(names):
            remedy = f"put a text with {options['delimiter']!r} or a line break in quotes"
            problem = f"{len(cells)} cells, the header has {len(names)}; {remedy}"
            tally.bad("not-csv", f"{where}: {problem}", row)
        elif surrogate(row):
            tally.bad("not-utf-8", where, row)
        else:
            yield where, dict(zip(names, cells))


def parquet_rows(path, tally):
    """Yields (where, row) of a .parquet file, read piece by piece."""
    parquet = files.package("pyarrow.parquet", "a .parquet file")
    with files.open_bytes(path) as file:
        table = parquet.ParquetFile(file, buffer_size=files.BUFFER, pre_buffer=False)
        batches = table.iter_batches(64, use_threads=False)  # rows held at once
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from ((f"{path} row {number}", row) for number, row in enumerate(rows, start=1))


ROW_READERS = {"json": json_rows, "csv": csv_rows, "parquet": parquet_rows}
