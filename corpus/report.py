"""The count of what was read and dropped; texts about a dataset: stats.json, DATA_CARD.md."""

import datetime
import json
from collections import Counter
from pathlib import Path
from textwrap import shorten


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

    def lines(self):
        """Returns lines for people: what was passed over and why, and what nothing reads."""
        reasons = reasons_of(self.dropped)
        lines = [f"{n:,} passed over: {reason} ({example})" for _, reason, n, example in reasons]
        if self.unused:
            names = ", ".join(repr(name)[1:-1] for name in self.unused)
            lines.append(f"columns not used: {shorten(names, 400, placeholder=' and more')}")
        if self.passed_over:
            lines.append(f"files {counted(self.passed_over)}")
        return lines


def counted(others):
    """Returns {suffix: files passed over} as a text."""
    each = (f"{count:,} {suffix}" for suffix, count in sorted(others.items()))
    return f"passed over: {', '.join(each) or 'none'}"


def reasons_of(dropped):
    """Yields each (stage, reason, count, first example) of a Tally's `dropped`."""
    for stage, entries in dropped.items():
        for reason, entry in sorted(entries.items()):
            yield stage, reason, entry["count"], entry["examples"][0]


def main_reasons(dropped, path=""):
    """Returns the reasons as a text, the commonest first; examples in the file `path` omit it."""
    reasons = sorted(reasons_of(dropped), key=lambda entry: -entry[2])
    each = (f"{n} {why} ({first.removeprefix(f'{path} ')})" for _, why, n, first in reasons)
    return "; ".join(each)


def document_stats(cfg, progress, tally):
    """Returns stats.json on documents: how many, how many dropped and why."""
    bad, counts = sum(e["bytes"] for e in tally.dropped["read"].values()), progress.counts
    return {
        "sources": tally.sources,
        "passed_over": dict(sorted(tally.passed_over.items())),
        "cap": {"max_docs": cfg.max_docs, "reached": counts["read"] == cfg.max_docs},
        "documents": {
            "read": counts["read"] + tally.bad_rows,
            "read_bytes": bad + sum(source["bytes"] for source in tally.sources.values()),
            **{name: counts[name] for name in ("split", "pieces", "kept_bytes")},
            "kept": counts["train"] + counts["val"],
            "dropped": tally.dropped,
        },
    }


def token_stats(manifest, sequence_length):
    """Returns stats.json on tokens: how many, in how many blocks of sequence_length, whose ids."""
    splits = {split: dict(sums) for split, sums in manifest["totals"].items()}
    tokens, text = (sum(sums[key] for sums in splits.values()) for key in ("tokens", "bytes"))
    for sums in splits.values():
        blocks = -(-(sums["tokens"] - 1) // sequence_length)
        sums[f"blocks_of_{sequence_length}"] = max(0, blocks)
    return {
        "splits": splits,
        "bytes_per_token": round(text / tokens, 4),
        "tokenizer": {"sha256": manifest["tokenizer_sha256"], "vocab_size": manifest["vocab_size"]},
    }


def stages_table(stats):
    """Returns a table: the documents and bytes that were read, lost and added, and are kept.

    A number that is 0, or that an earlier version did not count, is left out.
    """
    documents, sizes = stats["documents"], ("read_bytes", "split", "pieces", "kept_bytes")
    read, split, pieces, kept = (documents.get(name, 0) for name in sizes)
    rows = [("read", "", documents["read"], read)]
    rows += [("split", f"{split:,} into {pieces:,}", pieces - split, 0)] * bool(split)
    for stage, entries in documents["dropped"].items():
        for reason, entry in sorted(entries.items()):
            rows.append((f"dropped: {stage}", reason, -entry["count"], -entry.get("bytes", 0)))
    rows.append(("cleaned", "", 0, kept - sum(row[3] for row in rows)))
    rows.append(("kept", "", documents["kept"], kept))
    rows = [(stage, reason, count or "", size or "") for stage, reason, count, size in rows]
    return markdown_table(("stage", "reason", "documents", "bytes"), *rows)


def run_summary(folder, stats):
    """Returns the numbers of a preparation, for the terminal."""
    lines = [f"{folder}", stages_table(stats)]
    for split, sums in stats["splits"].items():
        sizes = f"{sums['tokens']:>14,} tokens, {sums['bytes'] / 1e6:.2f} MB"
        lines.append(f"  {split:<24}{sizes}, {sums['documents']:,} documents")
    lines.append(f"  {'bytes per token':<24}{stats['bytes_per_token']:>14.2f}")
    lines.append(f"  tokenizer {stats['tokenizer']['sha256']}")
    if others := stats.get("passed_over"):
        lines.append(f"  files {counted(others)}")
    return "\n".join(lines)


def markdown_table(*rows):
    """Returns a Markdown table; the first row is its head."""
    cells = [[f"{v:,}" if type(v) is int else str(v) for v in row] for row in rows]
    cells.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def sources_table(settings, stats):
    """Returns a table of the sources: their licences, weights and caps."""
    rows = [("source", "path", "licence", "weight", "documents read", "bytes read")]
    single = {"name": settings["input_path"], "input_path": settings["input_path"]}
    entries = {entry["name"]: entry for entry in settings["mixture"] or [single]}
    for name, counts in stats["sources"].items():
        licence = entries[name].get("licence") or settings["licence"] or "not noted"
        documents = f"{counts['documents']:,}" + " (capped)" * counts["capped"]
        path, size = f"`{entries[name]['input_path']}`", counts["bytes"]
        rows.append((name, path, licence, counts["weight"], documents, size))
    return markdown_table(*rows)


def data_card(name, settings, stats, tokenizer):
    """Returns DATA_CARD.md; `tokenizer` is a line on where that is from."""
    columns = ("documents", "tokens", "bytes", "shards")
    splits = [(split, *(sums[c] for c in columns)) for split, sums in stats["splits"].items()]
    template = Path(__file__).with_name("data_card.md").read_text(encoding="utf-8")
    return template.format(
        name=name,
        date=datetime.date.today().isoformat(),
        cap=f", capped at max_docs {settings['max_docs']:,}" if stats["cap"]["reached"] else "",
        sources=sources_table(settings, stats),
        stages=stages_table(stats),
        splits=markdown_table(("split", *columns), *splits),
        tokenizer=tokenizer,
        settings="\n".join(f"    {key} = {json.dumps(value)}" for key, value in settings.items()),
        stats=stats,
    )
