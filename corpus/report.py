"""Texts about a prepared dataset: stats.json, DATA_CARD.md, TOKENIZER_CARD.md, a summary."""

import datetime
import json

from corpus.files import reasons_of
from lib.folders import totals

MASKED = """Private data (e-mail addresses, telephone, card and IP numbers, keys) was masked where
its shape gave it away; names and postal addresses were not."""
NOT_MASKED = "Private data (names, addresses, keys) was **not** removed."
SENTENCEPIECE = """SentencePiece BPE with byte fallback, no normalization, digits one by one;
  any text survives the way to ids and back"""


def document_stats(cfg, progress, tally):
    """Returns stats.json on documents: how many, how many dropped and why."""
    return {
        "sources": tally.sources,
        "cap": {"max_docs": cfg.max_docs, "reached": progress.documents == cfg.max_docs},
        "documents": {
            "read": progress.documents + tally.bad_rows,
            "kept": sum(sum(part.values()) for part in progress.parts),
            "dropped": tally.dropped,
            "noted": {},  # of earlier versions
        },
    }


def token_stats(manifest, sequence_length):
    """Returns stats.json on tokens: how many, in how many blocks of sequence_length, whose ids."""
    splits = {split: totals(entries) for split, entries in manifest["splits"].items()}
    tokens, text = (sum(split[key] for split in splits.values()) for key in ("tokens", "bytes"))
    for split in splits.values():
        blocks = -(-(split["tokens"] - 1) // sequence_length)
        split[f"blocks_of_{sequence_length}"] = max(0, blocks)
    return {
        "splits": splits,
        "bytes_per_token": round(text / tokens, 4),
        "tokenizer": {"sha256": manifest["tokenizer_sha256"], "vocab_size": manifest["vocab_size"]},
    }


def run_summary(folder, stats):
    """Returns the numbers of a preparation, for the terminal."""
    counts = [("read", stats["documents"]["read"])]
    dropped = reasons_of(stats["documents"]["dropped"])
    counts += [(f"  {reason}", -count) for _, reason, count, _ in dropped]
    counts += [("kept", stats["documents"]["kept"])]
    lines = [f"{folder}", *(f"  {name:<24}{count:>14,} documents" for name, count in counts)]
    for split, sums in stats["splits"].items():
        lines.append(f"  {split:<24}{sums['tokens']:>14,} tokens, {sums['bytes'] / 1e6:.2f} MB")
    lines.append(f"  {'bytes per token':<24}{stats['bytes_per_token']:>14.2f}")
    if not stats["splits"]["val"]["documents"]:
        lines.append("  no document fell to val: lower train_ratio, or training cannot validate")
    return "\n".join(lines)


def markdown_table(*rows):
    """Returns a Markdown table; the first row is its head."""
    cells = [[f"{v:,}" if type(v) is int else str(v) for v in row] for row in rows]
    cells.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def source_table(settings, stats):
    """Returns the table of a data card on the sources: their licences, weights and caps."""
    rows = [("source", "path", "licence", "weight", "documents read", "bytes read")]
    single = {"name": settings["input_path"], "input_path": settings["input_path"]}
    entries = {entry["name"]: entry for entry in settings["mixture"] or [single]}
    for name, counts in stats["sources"].items():
        licence = entries[name].get("licence") or settings["licence"] or "not noted"
        documents = f"{counts['documents']:,}" + " (capped)" * counts["capped"]
        path, size = f"`{entries[name]['input_path']}`", counts["bytes"]
        rows.append((name, path, licence, counts["weight"], documents, size))
    return markdown_table(*rows)


def data_card(name, settings, stats):
    """Returns DATA_CARD.md: where the text is from, how it was treated, and its risks."""
    rows = [("stage", "reason", "documents"), ("read", "", stats["documents"]["read"])]
    rows += [(f"dropped: {row[0]}", *row[1:3]) for row in reasons_of(stats["documents"]["dropped"])]
    rows += [("kept", "", stats["documents"]["kept"])]
    columns = ("documents", "tokens", "bytes", "shards")
    splits = [(split, *(sums[c] for c in columns)) for split, sums in stats["splits"].items()]
    cap = f", capped at max_docs {settings['max_docs']:,}" if stats["cap"]["reached"] else ""
    near = "Near-duplicates were **not** removed; copies of val documents may be in train."
    if settings["use_minhash"]:
        threshold = settings["minhash_threshold"]
        near = f"Of documents with a Jaccard similarity of {threshold} or more, the first stayed."
    return f"""# {name}

Prepared {datetime.date.today().isoformat()}{cap}.
Where a licence is not noted, ask the source before passing the text or a model on.

{source_table(settings, stats)}

{markdown_table(*rows)}

{markdown_table(("split", *columns), *splits)}

Examples of what was dropped are in `stats.json`. A document belongs to val if its hash says so.
{near}

## Risks

The text is what its authors wrote: it may be wrong, biased, offensive or out of date.
{MASKED if settings["mask_private"] else NOT_MASKED}
The filters and the near-duplicate search are heuristics: some of what should have gone is still
here, and some that was dropped was fine.

## Settings

{chr(10).join(f"    {key} = {json.dumps(value)}" for key, value in settings.items())}
"""


def tokenizer_card(tokenizer, origin, stats):
    """Returns TOKENIZER_CARD.md. `origin` is a line on where the tokenizer is from."""
    ours = tokenizer.im_start_id is not None and not tokenizer.dummy_prefix
    return f"""# Tokenizer {tokenizer.sha256[:12]}

- sha256 of `tokenizer.model`: `{tokenizer.sha256}`
- Entries: {tokenizer.vocab_size:,}, of these {sum(tokenizer.token_bytes() == 0)} control tokens
- Kind: {SENTENCEPIECE if ours else "a SentencePiece model of another program"}
- {origin}
- On this dataset: {stats["bytes_per_token"]:.2f} bytes of text per token (BOS and EOS included)
"""
