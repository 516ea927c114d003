"""Texts about a prepared dataset: stats.json, DATA_CARD.md, TOKENIZER_CARD.md, a summary."""

import datetime
import json

from lib.config import UserError, read_object
from lib.folders import AGAIN, totals

MASKED = """Private data (e-mail addresses, telephone, card and IP numbers, keys) was masked where
its shape gave it away; names and postal addresses were not."""
NOT_MASKED = "Private data (names, addresses, keys) was **not** removed."
SENTENCEPIECE = """SentencePiece BPE with byte fallback, no normalization, digits one by one;
  any text survives the way to ids and back"""


def document_stats(cfg, progress, tally):
    """Returns stats.json on documents: how many, how many dropped and why, how long they are."""
    return {
        "sources": tally.sources,
        "cap": {"max_docs": cfg.max_docs, "reached": progress.documents == cfg.max_docs},
        "documents": {
            "read": progress.documents + tally.bad_rows,
            "kept": sum(sum(part.values()) for part in progress.parts),
            "dropped": tally.dropped,
            "noted": tally.notes,
        },
        "characters_of_kept": dict(sorted(progress.lengths.items(), key=lambda bin: int(bin[0]))),
        "language_scores_of_read": dict(sorted(progress.scores.items())),
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


def read_stats(folder):
    """Returns the stats.json of a prepared dataset. UserError unless it can be shown."""
    stats = read_object(folder / "stats.json")
    if not stats.keys() >= {"documents", "cap", "sources"}:
        raise UserError(f"{folder / 'stats.json'}: not as data.py writes it; {AGAIN}")
    return stats


def dropped_documents(stats):
    """Yields (stage, reason, {"count", "examples"}) of all that was dropped."""
    for stage, entries in stats["documents"]["dropped"].items():
        for reason, entry in sorted(entries.items()):
            yield stage, reason, entry


def run_summary(folder, stats):
    """Returns the numbers of a preparation, for the terminal."""
    counts = [("read", stats["documents"]["read"])]
    counts += [(f"  {reason}", -e["count"]) for _, reason, e in dropped_documents(stats)]
    counts += [("kept", stats["documents"]["kept"])]
    lines = [f"{folder}", *(f"  {name:<24}{count:>14,} documents" for name, count in counts)]
    for reason, entry in stats["documents"]["noted"].items():
        lines.append(f"  {reason:<24}{entry['count']:>14,} times, first: {entry['examples'][0]}")
    for split, sums in stats["splits"].items():
        lines.append(f"  {split:<24}{sums['tokens']:>14,} tokens, {sums['bytes'] / 1e6:.2f} MB")
    lines.append(f"  {'bytes per token':<24}{stats['bytes_per_token']:>14.2f}")
    if stats["cap"]["reached"]:
        lines.append(f"  stopped at max_docs {stats['cap']['max_docs']:,}")
    if not stats["splits"]["val"]["documents"]:
        lines.append("  no document fell to val: lower train_ratio, or training cannot validate")
    return "\n".join(lines)


def markdown_table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def source_lines(settings, stats):
    """Returns the part of a data card on the sources, their licences and caps."""
    reached = stats["cap"]["reached"]
    cap = f"capped at max_docs {settings['max_docs']:,}" if reached else "not capped"
    config = f", {settings['input_config']}" if settings["input_config"] else ""
    unknown = "not noted; ask the source before passing the text or a model on"
    if not settings["mixture"]:
        licence = settings["licence"] or unknown
        return f"- Source: `{settings['input_path']}`{config} ({cap})\n- Licence: {licence}"
    entries, rows = {entry["name"]: entry for entry in settings["mixture"]}, []
    for name, source in stats["sources"].items():
        licence = entries[name].get("licence") or settings["licence"] or "not noted"
        documents = f"{source['documents']:,}" + " (capped)" * source["capped"]
        path, weight, size = f"`{entries[name]['input_path']}`", source["weight"], source["bytes"]
        rows.append((name, path, licence, weight, documents, f"{size:,}"))
    head = ("source", "path", "licence", "weight", "documents read", "bytes read")
    return f"A mixture{f' ({cap})' if reached else ''}:\n\n{markdown_table(head, rows)}\n"


def data_card(name, settings, stats):
    """Returns DATA_CARD.md: where the text is from, how it was treated, and its risks."""
    rows = [("read", "", f"{stats['documents']['read']:,}")]
    rows += [
        (f"dropped: {stage}", r, f"{e['count']:,}") for stage, r, e in dropped_documents(stats)
    ]
    rows += [("kept", "", f"{stats['documents']['kept']:,}")]
    columns = ("documents", "tokens", "bytes", "shards")
    splits = [(s, *(f"{sums[c]:,}" for c in columns)) for s, sums in stats["splits"].items()]
    near = "Near-duplicates were **not** removed; copies of val documents may be in train."
    if settings["use_minhash"]:
        threshold = settings["minhash_threshold"]
        near = f"Of documents with a Jaccard similarity of {threshold} or more, the first stayed."
    tokenizer = stats["tokenizer"]
    return f"""# {name}

Prepared {datetime.date.today().isoformat()}.

{source_lines(settings, stats)}
- Tokenizer: {tokenizer["vocab_size"]:,} entries, sha256 `{tokenizer["sha256"]}`, \
{stats["bytes_per_token"]:.2f} bytes per token

{markdown_table(("stage", "reason", "documents"), rows)}

{markdown_table(("split", "documents", "tokens", "bytes of text", "shards"), splits)}

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
    controls = int((tokenizer.token_bytes() == 0).sum())
    return f"""# Tokenizer {tokenizer.sha256[:12]}

- sha256 of `tokenizer.model`: `{tokenizer.sha256}`
- Entries: {tokenizer.vocab_size:,}, of these {controls} control tokens
- Kind: {SENTENCEPIECE if ours else "a SentencePiece model of another program"}
- {origin}
- On this dataset: {stats["bytes_per_token"]:.2f} bytes of text per token (BOS and EOS included)
"""
