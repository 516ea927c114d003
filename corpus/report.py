"""What a prepared dataset says of itself: stats.json, DATA_CARD.md, TOKENIZER_CARD.md, the closing report."""

import datetime
import json

from lib.folders import totals

PRIVATE = """Private data (e-mail addresses, telephone, card and IP numbers, keys) was masked where its shape
gave it away; names and postal addresses were not."""


def documents_part(cfg, progress, tally):
    """stats.json on documents: how many, what was dropped and why, how long they are."""
    return {
        "sources": tally.sources,
        "cap": {"max_docs": cfg.max_docs, "reached": progress.documents == cfg.max_docs},
        "documents": {
            "read": progress.documents + tally.bad_rows,
            "kept": sum(progress.kept.values()),
            "dropped": tally.dropped,
            "noted": tally.notes,
        },
        "characters_of_kept": dict(sorted(progress.lengths.items(), key=lambda bin: int(bin[0]))),
        "language_scores_of_read": dict(sorted(progress.scores.items())),
    }


def tokens_part(manifest, sequence_length):
    """stats.json on tokens: how many, in how many blocks, from which tokenizer."""
    splits = {split: totals(entries) for split, entries in manifest["splits"].items()}
    T, text = sequence_length, sum(split["bytes"] for split in splits.values())
    for split in splits.values():
        split[f"blocks_of_{T}"] = max(0, -(-(split["tokens"] - 1) // T))
    return {
        "splits": splits,
        "bytes_per_token": round(text / sum(split["tokens"] for split in splits.values()), 4),
        "tokenizer": {"sha256": manifest["tokenizer_sha256"], "vocab_size": manifest["vocab_size"]},
    }


def dropped_lines(stats):
    """(stage, reason, count) of everything dropped."""
    for stage, entries in stats["documents"]["dropped"].items():
        for reason, entry in sorted(entries.items()):
            yield stage, reason, entry["count"]


def report(folder, stats):
    """The numbers of a run, for the terminal."""
    lines = [("read", stats["documents"]["read"])]
    lines += [(f"  {reason}", -count) for _, reason, count in dropped_lines(stats)]
    lines += [("kept", stats["documents"]["kept"])]
    text = [f"{folder}", *(f"  {name:<24}{count:>14,} documents" for name, count in lines)]
    for reason, entry in stats["documents"]["noted"].items():
        text.append(f"  {reason:<24}{entry['count']:>14,} times, first: {entry['examples'][0]}")
    for split, total in stats["splits"].items():
        text.append(f"  {split:<24}{total['tokens']:>14,} tokens, {total['bytes'] / 1e6:.2f} MB")
    text.append(f"  {'bytes per token':<24}{stats['bytes_per_token']:>14.2f}")
    if stats["cap"]["reached"]:
        text.append(f"  stopped at max_docs {stats['cap']['max_docs']:,}")
    if not stats["splits"]["val"]["documents"]:
        text.append("  no document fell to val: lower train_ratio, or training cannot validate")
    return "\n".join(text)


def table(head, rows):
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def numbers(stats):
    """The two tables of a data card: documents by stage, tokens by split."""
    rows = [("read", "", f"{stats['documents']['read']:,}")]
    rows += [
        (f"dropped: {stage}", reason, f"{count:,}") for stage, reason, count in dropped_lines(stats)
    ]
    rows += [("kept", "", f"{stats['documents']['kept']:,}")]
    splits = [
        (split, *(f"{total[key]:,}" for key in ("documents", "tokens", "bytes", "shards")))
        for split, total in stats["splits"].items()
    ]
    return "\n\n".join(
        [
            table(("stage", "reason", "documents"), rows),
            table(("split", "documents", "tokens", "bytes of text", "shards"), splits),
        ]
    )


def origin(settings, stats):
    """The lines of a data card on where the text is from."""
    cap = (
        f"capped at max_docs {settings['max_docs']:,}" if stats["cap"]["reached"] else "not capped"
    )
    config = f", {settings['input_config']}" if settings["input_config"] else ""
    licence = (
        settings["licence"] or "not noted; ask the source before passing the text or a model on"
    )
    if not settings["mixture"]:
        return f"- Source: `{settings['input_path']}`{config} ({cap})\n- Licence: {licence}"
    entries, rows = {entry["name"]: entry for entry in settings["mixture"]}, []
    for name, source in stats["sources"].items():  # what the mixture asked for, and what came of it
        licence = entries[name].get("licence") or settings["licence"] or "not noted"
        read = f"{source['documents']:,}" + " (capped)" * source["capped"]
        row = (name, f"`{entries[name]['input_path']}`", licence, source["weight"], read)
        rows.append((*row, f"{source['bytes']:,}"))
    head = ("source", "path", "licence", "weight", "documents read", "bytes read")
    return f"A mixture{f' ({cap})' if stats['cap']['reached'] else ''}:\n\n{table(head, rows)}\n"


def data_card(name, settings, stats):
    """DATA_CARD.md: where the text is from, what was done to it, what to beware of."""
    near = "Near-duplicates were **not** removed; copies of val documents may be in train."
    if settings["use_minhash"]:
        alike = settings["minhash_threshold"]
        near = f"Of documents with a Jaccard similarity of {alike} or more, the first stayed."
    private = (
        PRIVATE
        if settings["mask_private"]
        else "Private data (names, addresses, keys) was **not** removed."
    )
    return f"""# {name}

Prepared {datetime.date.today().isoformat()}.

{origin(settings, stats)}
- Tokenizer: {stats["tokenizer"]["vocab_size"]:,} entries, sha256 `{stats["tokenizer"]["sha256"]}`, \
{stats["bytes_per_token"]:.2f} bytes per token

{numbers(stats)}

Examples of what was dropped are in `stats.json`. A document belongs to val if its own hash says so.
{near}

## Risks

The text is what its authors wrote: it may be wrong, biased, offensive or out of date.
{private}
The filters and the near-duplicate search are heuristics: some of what should have gone is still here, and
some that was dropped was fine.

## Settings

{chr(10).join(f"    {key} = {json.dumps(value)}" for key, value in settings.items())}
"""


OURS = """SentencePiece BPE with byte fallback, no normalization, digits one by one; any text survives the
  way to ids and back"""


def tokenizer_card(tokenizer, made, stats):
    """TOKENIZER_CARD.md: which tokenizer this is. `made`: a line on what it was trained on, or is from."""
    ours = tokenizer.im_start_id is not None and not tokenizer.dummy_prefix
    controls = int((tokenizer.token_bytes() == 0).sum())
    return f"""# Tokenizer {tokenizer.sha256[:12]}

- sha256 of `tokenizer.model`: `{tokenizer.sha256}`
- Entries: {tokenizer.vocab_size:,}, of these {controls} control tokens
- Kind: {OURS if ours else "a SentencePiece model of another program"}
- {made}
- On this dataset: {stats["bytes_per_token"]:.2f} bytes of text per token (BOS and EOS included)
"""
