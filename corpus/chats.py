"""Conversations and preference pairs out of foreign files, whatever their format.

    read_chats(path) -> [{"messages": [{"role": "user", "content": "..."}, ...]}, ...]
    read_pairs(path) -> [{"prompt": [messages], "chosen": [messages], "rejected": [messages]}, ...]

Every row is brought to messages of the roles system, user and assistant; its format is recognized by its
fields, row by row, so that one file may mix several. The rows lie in JSON Lines, in a JSON list or in CSV,
compressed or not. A row that cannot be used is counted by reason in a `Tally`, the first three of each reason
with line number and field, and passed over; a file with too many of them, or with nothing else, is refused.
`python data.py inspect PATH` shows all of this.
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Literal

from corpus.files import ROW_KINDS, kind_of
from corpus.sources import USUAL, Tally, input_files, rows_of
from lib.config import UserError
from lib.tokenizer import TEMPLATES, Tokenizer, render, usual_template

MAX_BAD = 0.05  # the share of unusable rows from which a file is refused

DIALOGUE = (
    "messages",
    "conversations",
    "conversation",
    "dialogue",
    "dialog",
)  # fields that hold messages
QUESTION = ("prompt", "instruction", "question")
ANSWER = ("response", "completion", "output", "answer")
ANSWER_TO = {
    "prompt": "response",
    "instruction": "output",
    "question": "answer",
}  # the one called missing
FORMATS = {"prompt": "prompt/response", "instruction": "alpaca", "question": "question/answer"}
KNOWN = {*DIALOGUE, *QUESTION, *ANSWER, "system", "history", "input", "chosen", "rejected"}
RENAME = (  # the remedy where one is missing and others have names of their own
    f"rename its fields: prompt ({', '.join(QUESTION[1:])}) and response ({', '.join(ANSWER[1:])}), or "
    f"messages ({', '.join(DIALOGUE[1:])}); in a pair prompt, chosen and rejected"
)
ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
ROLES |= dict.fromkeys(("human", "prompter"), "user") | dict.fromkeys(
    ("gpt", "bot", "chatgpt"), "assistant"
)
SURROGATE = re.compile("[\ud800-\udfff]")
# every control character but tab and the line breaks
CONTROLS = dict.fromkeys([*range(9), 11, 12, *range(14, 32), *range(127, 160)])
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
TURN = re.compile(r"\n\n(Human|Assistant):")


class Bad(Exception):
    """Why a row cannot be used: Bad(reason, detail)."""


# ---- files


def read_chats(path, tally=None, max_bad=MAX_BAD):
    """Read the conversations of a file, folder or glob, as [{"messages": [{"role", "content"}, ...]}, ...].

    Each ends with an answer: what a user says after the last one is left out. Unusable rows are counted in
    `tally`. Raises UserError when their share is above `max_bad`, when no row is usable, or when a file is
    missing or damaged.
    """
    return [{"messages": messages} for _, _, messages in read_rows(path, to_chat, tally, max_bad)]


def read_pairs(path, tally=None, max_bad=MAX_BAD):
    """Read preference pairs, as [{"prompt", "chosen", "rejected"}, ...], each a list of messages.

    `prompt` holds all that both dialogues share, `chosen` and `rejected` begin with an answer. Pairs whose
    two answers are equal are dropped and counted as identical-pair, which is no fault of the file. Otherwise
    as `read_chats`.
    """
    return [pair for _, _, pair in read_rows(path, to_pair, tally, max_bad)]


def read_rows(path, convert, tally=None, max_bad=MAX_BAD):
    """Read rows and bring them to one form by `convert`: [(where, format, what convert made of it), ...]."""
    tally = Tally() if tally is None else tally
    rows, bad, seen = [], tally.bad_rows, 0
    for where, row in rows_of(path, tally):
        try:
            kind, value = convert(row)
        except Bad as error:
            reason, detail = error.args
            if reason == "identical-pair":
                seen += 1
                tally.drop("filter", reason, where)
            else:
                tally.bad(reason, f"{where}: {detail}")
            continue
        seen += 1
        rows.append((where, kind, value))
    tally.documents += seen
    tally.kept += len(rows)
    bad = tally.bad_rows - bad
    if not rows:
        raise UserError(
            f"{path}: 0 usable rows of {bad + seen}{told(tally, path) or ': it is empty'}"
        )
    if bad > max_bad * (bad + seen):
        share = f"{bad} of {bad + seen} rows are unusable ({bad / (bad + seen):.1%}, allowed {max_bad:.1%})"
        raise UserError(f"{path}: {share}{told(tally, path)}")
    return rows


def told(tally, path):
    """What was dropped, as the end of an error on `path`: ': 3 not-json (line 7: ...); ...', or ''.

    Of each reason the first example; the file is named where it is another, as in a folder.
    """
    entries = [entry for stage in tally.dropped.values() for entry in stage.items()]
    entries.sort(key=lambda entry: -entry[1]["count"])
    parts = [
        f"{e['count']} {reason} ({e['examples'][0].removeprefix(f'{path} ')})"
        for reason, e in entries
    ]
    return f": {'; '.join(parts)}" if parts else ""


# ---- rows


def to_chat(row):
    """Return (format, messages) of a row, which end with an answer; raises Bad."""
    if (
        isinstance(row, dict)
        and "chosen" in row
        and not any(row.get(name) for name in ANSWER + DIALOGUE)
    ):
        raise Bad("preference-pair", "holds chosen and rejected answers, which are for dpo.py")
    kind, messages = dialogue(row)
    if kind in FORMATS.values():
        question = next(name for name, value in FORMATS.items() if value == kind)
        name = first(row, ANSWER) or next((name for name in ANSWER if name in row), None)
        if name is None:
            raise Bad("missing-field", f'missing "{ANSWER_TO[question]}"{foreign(row)}')
        messages += said(row[name], name, "assistant")
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise Bad("no-answer", "no message of the assistant")
    return kind, messages


def to_pair(row):
    """Return (format, {"prompt", "chosen", "rejected"}) of a row, each a list of messages; raises Bad."""
    if not isinstance(row, dict):
        raise Bad("not-an-object", f"a pair must be an object, got {kind_name(row)}")
    if lacking := [name for name in ("chosen", "rejected") if name not in row]:
        told = len(lacking) == 2 and any(row.get(name) for name in ANSWER + DIALOGUE)
        chat = "; conversations are for sft.py" if told else foreign(row)
        raise Bad("missing-field", f'missing "{lacking[0]}"{chat}')
    explicit = first(row, QUESTION + DIALOGUE)
    prompt = dialogue(row)[1] if explicit else system_message(row)
    if isinstance(row["chosen"], str) and isinstance(row["rejected"], str) and not explicit:
        kind, (chosen, rejected) = "hh-rlhf", transcripts(row["chosen"], row["rejected"])
    else:
        kind = f"{explicit}, chosen, rejected" if explicit else "chosen, rejected"
        chosen, rejected = (said(row[name], name, "assistant") for name in ("chosen", "rejected"))
    shared = common(chosen, rejected)
    if not shared or shared[len(shared) - len(prompt) :] != prompt:  # they do not repeat the prompt
        chosen, rejected = prompt + chosen, prompt + rejected
        shared = common(chosen, rejected)
    if not shared:
        raise Bad("missing-field", 'missing "prompt", and chosen and rejected share no message')
    pair = {"prompt": shared, "chosen": chosen[len(shared) :], "rejected": rejected[len(shared) :]}
    for name in ("chosen", "rejected"):
        if pair[name][0]["role"] != "assistant":
            raise Bad(
                "prompts-differ", f'"{name}" parts from the other with no answer of the assistant'
            )
    if pair["chosen"] == pair["rejected"]:
        raise Bad("identical-pair", "chosen and rejected are equal")
    return kind, pair


def dialogue(row):
    """Return (format, messages) of what a row holds beside its answer: a whole dialogue, or a question."""
    if isinstance(row, list):
        return "list of messages", said(row, "the list", "user")
    if not isinstance(row, dict):
        raise Bad("not-an-object", f"a row must be an object, got {kind_name(row)}")
    names = DIALOGUE + QUESTION if "chosen" not in row else QUESTION + DIALOGUE
    name = first(row, names) or next((name for name in names if name in row), None)
    if name is None:
        raise Bad("missing-field", f'missing "prompt" (or "messages", ...){foreign(row)}')
    messages = system_message(row) + history(row) + said(row[name], name, "user")
    if name in DIALOGUE:
        head = (
            next((m for m in row[name] if isinstance(m, dict)), {})
            if isinstance(row[name], list)
            else {}
        )
        return ("ShareGPT" if "from" in head else "messages"), messages
    extra = row.get("input")
    if isinstance(extra, str) and not extra.strip():
        extra = None  # as most rows of the format have it
    if extra is not None and messages[-1]["role"] == "user":
        messages[-1]["content"] += "\n" + said(extra, "input", "user")[-1]["content"]
    return FORMATS[name], messages


def first(row, names):
    """The first of `names` that stands in a row with a value, or None."""
    return next((name for name in names if row.get(name) is not None), None)


def foreign(row):
    """How the error on a row with unknown field names goes on: all its names, and the remedy.

    Names are foreign text: what would move a terminal's cursor is shown as a question mark.
    """
    if row.keys() - KNOWN:
        return f" among {CONTROL.sub('?', ', '.join(map(str, row))[:80])}; {RENAME}"
    return "" if row else " among no fields at all"


def system_message(row):
    """The message of a `system` field, in a list; none for an absent or empty one."""
    value = row.get("system")
    return said(value, "system", "system") if value is not None and value != "" else []


def history(row):
    """The earlier turns of an alpaca row, a list of [question, answer]."""
    turns = row.get("history")
    if turns in (None, [], ""):
        return []
    if not isinstance(turns, list) or not all(
        isinstance(turn, list) and len(turn) == 2 for turn in turns
    ):
        raise Bad("not-messages", '"history" must be a list of [question, answer]')
    return [
        message
        for question, answer in turns
        for message in said(question, "history", "user") + said(answer, "history", "assistant")
    ]


def said(value, name, role):
    """Return what a field says as messages: a string is one message of `role`, a message or a list of them
    stand for themselves.
    """
    if isinstance(value, str):
        if role == "user" and (turns := open_transcript(value)):
            return turns
        return [{"role": role, "content": cleaned(value, name)}]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise Bad("not-a-string", f'"{name}" must be a string or messages, got {kind_name(value)}')
    if not value:
        raise Bad("empty", f'"{name}" is empty')
    return [m for number, item in enumerate(value, start=1) for m in message_of(item, name, number)]


def message_of(item, name, number):
    """One message, as a list of it; an empty system message, which many files carry, is none."""
    where = f'"{name}" message {number}'
    if not isinstance(item, dict):
        raise Bad("not-messages", f"{where} must be an object, got {kind_name(item)}")
    role, content = (
        item.get(first(item, ("role", "from"))),
        item.get(first(item, ("content", "value"))),
    )
    if not isinstance(role, str) or role.lower() not in ROLES:
        got = repr(role)[:40] if isinstance(role, str) else kind_name(role)
        raise Bad("unknown-role", f"{where}: role must be system, user or assistant, got {got}")
    role = ROLES[role.lower()]
    if isinstance(content, list):
        content = joined(content, where)
    if not isinstance(content, str):
        raise Bad("not-a-string", f"{where}: content must be a string, got {kind_name(content)}")
    if role == "system" and not content.strip():
        return []
    return [{"role": role, "content": cleaned(content, f"{name} message {number}")}]


def joined(parts, where):
    """The text of a content given as a list of {"type": "text", "text": ...}."""
    for part in parts:
        if (
            not isinstance(part, dict)
            or part.get("type") != "text"
            or not isinstance(part.get("text"), str)
        ):
            raise Bad("not-a-string", f"{where}: content holds a part that is no text")
    return "".join(part["text"] for part in parts)


def cleaned(text, name):
    """A content with plain line ends, without control characters and the space around it; never empty."""
    if SURROGATE.search(text):
        raise Bad("bad-unicode", f'"{name}" holds a lone surrogate')
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(CONTROLS).strip()
    if not text:
        raise Bad("empty", f'"{name}" is empty')
    return text


def kind_name(value):
    """What JSON calls the type of a value."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string"}
    names |= {list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), "nothing")


# ---- transcripts: "\n\nHuman: ...\n\nAssistant: ..."


def transcripts(chosen, rejected):
    """Return two transcripts as messages; they must agree up to the last "Assistant:" of each."""
    heads, answers = [], []
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        head, marker, answer = text.rpartition("\n\nAssistant:")
        if not marker:
            raise Bad(
                "missing-field", f'missing "prompt", and "{name}" is no Human/Assistant transcript'
            )
        if TURN.search(answer):
            raise Bad("no-answer", f'"{name}" does not end with an answer of the assistant')
        heads.append(head)
        answers.append([{"role": "assistant", "content": cleaned(answer, name)}])
    if heads[0] != heads[1]:
        raise Bad("prompts-differ", "chosen and rejected differ before the last answer")
    return [turns_of(heads[0], "chosen") + answer for answer in answers]


def open_transcript(text):
    """The turns of a prompt written as a transcript up to "Assistant:", or None if it is none."""
    text = f"\n\n{text.strip()}"
    if not (text.startswith("\n\nHuman:") and text.endswith("\n\nAssistant:")):
        return None
    return turns_of(text.removesuffix("\n\nAssistant:"), "prompt")


def turns_of(text, name):
    """The messages of a transcript."""
    before, *parts = TURN.split(text)
    if before.strip() or not parts:
        raise Bad("not-messages", f'"{name}" must begin with "Human:" or "Assistant:"')
    names = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": names[who], "content": cleaned(words, name)} for who, words in turns]


def common(one, other):
    """The messages that two dialogues begin with alike, of each its last message left out."""
    length = 0
    while length < min(len(one), len(other)) - 1 and one[length] == other[length]:
        length += 1
    return one[:length]


# ---- inspect: what a file holds


@dataclass(frozen=True)
class InspectConfig:
    """What to look at."""

    # a file of conversations or preference pairs, any source of text, or the folder of a prepared dataset
    path: str = ""
    # of a source of text: the column that holds it; empty = found by its name
    text_column: str = ""
    # how to write the example out; none = what sft.py would take with that tokenizer
    template: Literal["chatml", "instruct", "chat"] | None = None
    # a .model file or a folder with one: lengths are then counted in tokens too
    tokenizer_path: str = ""


def show_rows(cfg):
    """Print what a file of conversations or pairs holds: formats, skipped rows, lengths, one example.

    Raises UserError as reading does; for too many unusable rows only after all else was printed.
    """
    tokenizer = Tokenizer.load(cfg.tokenizer_path) if cfg.tokenizer_path else None
    template = cfg.template or (usual_template(tokenizer) if tokenizer else "chatml")
    paired, tally = holds_pairs(cfg.path), Tally()
    rows = read_rows(cfg.path, to_pair if paired else to_chat, tally, max_bad=1)
    total = tally.documents + tally.bad_rows
    lines = [f"{cfg.path}: {'preference pairs' if paired else 'conversations'}"]
    formats = Counter(kind for _, kind, _ in rows)
    lines += [f"  {count:>10,}  {kind}" for kind, count in formats.most_common()]
    for _, reason, count, example in tally.reasons():
        lines.append(f"  {-count:>10,}  {reason}, first: {example}")
    lines.append(f"  {len(rows):>10,}  usable of {total:,} rows")
    lines += length_table(rows, tokenizer, template)
    where, _, value = rows[0]
    terminal = sys.stdout.isatty()
    lines.append(
        f"\n{where} as {template}; {'dim' if terminal else 'in [ ]'}: what the model does not learn"
    )
    for name, messages, start in dialogues(value):
        lines += [f"-- {name}", marked(rendered(messages, start, tokenizer, template), terminal)]
    print("\n".join(lines))
    if tally.bad_rows > MAX_BAD * total:
        share = f"{tally.bad_rows} of {total} rows are unusable, more than {MAX_BAD:.0%}"
        raise UserError(f"{cfg.path}: {share}: training refuses it")


def holds_pairs(path):
    """Does the first row that is an object, as far as one can be read, hold a preference pair?"""
    for _, row in rows_of(path, Tally()):
        if isinstance(row, dict):
            return "chosen" in row and "rejected" in row
    return False


def holds_text(path):
    """Is this a source of text, rather than rows of conversations or pairs? The first rows tell."""
    if str(path).startswith("docstrings:"):
        return True
    if not str(path).startswith("hf:"):
        files = input_files(str(path), tables=True) if Path(path).exists() else []
        if files and not any(kind_of(file) in ROW_KINDS or kind_of(file) is None for file in files):
            return True
    rows = [row for _, row in islice(rows_of(path, Tally()), 20) if isinstance(row, dict)]
    usual = any(row.keys() & set(USUAL) for row in rows)
    return usual and not any(row.keys() & {*DIALOGUE, *QUESTION, "chosen"} for row in rows)


def dialogues(value):
    """(name, messages, number of the first message to learn from) of what a row was brought to."""
    if isinstance(value, list):
        return [("conversation", value, 0)]
    prompt = value["prompt"]
    return [(name, prompt + value[name], len(prompt)) for name in ("chosen", "rejected")]


def length_table(rows, tokenizer, template):
    """Lines with the least, the middle, the 95 % and the greatest length of what the rows hold."""
    lengths = {}
    for _, _, value in rows:
        for name, messages, start in dialogues(value):
            answers = [m for m in messages[start:] if m["role"] == "assistant"]
            lengths.setdefault(f"{name}: messages", []).append(len(messages))
            lengths.setdefault(f"{name}: characters", []).append(
                sum(len(m["content"]) for m in messages)
            )
            lengths.setdefault(f"{name}: of them answers", []).append(
                sum(len(m["content"]) for m in answers)
            )
            if tokenizer:
                ids, mask = tokens_of(messages, start, tokenizer, template)
                lengths.setdefault(f"{name}: tokens", []).append(len(ids))
                lengths.setdefault(f"{name}: of them learned", []).append(sum(mask))
    lines = [f"\n  {'length':<28}{'least':>9}{'middle':>9}{'95 %':>9}{'greatest':>9}{'in all':>14}"]
    for name, values in lengths.items():
        values.sort()
        cells = [values[int(share * (len(values) - 1))] for share in (0, 0.5, 0.95, 1)]
        lines.append(
            f"  {name:<28}" + "".join(f"{cell:>9,}" for cell in cells) + f"{sum(values):>14,}"
        )
    return lines


def tokens_of(messages, start, tokenizer, template):
    """(ids, mask) of a dialogue, the mask 0 before message number `start`."""
    ids, mask = render(tokenizer, messages, template)
    if not start:
        return ids, mask
    opening = len(render(tokenizer, messages[:start], template, add_generation_prompt=True)[0])
    return ids, [0] * opening + mask[opening:]


def rendered(messages, start, tokenizer, template):
    """[(text, is it learned?)] of a dialogue: decoded from its ids, or without a tokenizer as it would be."""
    if tokenizer:
        pairs = zip(*tokens_of(messages, start, tokenizer, template), strict=True)
        runs = groupby(pairs, lambda pair: pair[1])
        return [
            (tokenizer.decode([id for id, _ in run], controls=True), bool(bit)) for bit, run in runs
        ]
    shape, pieces = TEMPLATES[template], []
    for number, message in enumerate(messages):
        role, learned = message["role"], message["role"] == "assistant" and number >= start
        pieces.append(((shape.between if number else "") + shape.heads[role], False))
        pieces.append((message["content"] + shape.ends[role], learned))
    runs = groupby(pieces, lambda piece: piece[1])
    return [("".join(text for text, _ in run), learned) for learned, run in runs]


def marked(pieces, terminal):
    """The text of an example, what is not learned dimmed on a terminal, in [ ] elsewhere; long parts cut."""
    dim, plain = ("\x1b[2m", "\x1b[22m") if terminal else ("[", "]")
    text = ""
    for part, learned in pieces:
        if len(part) > 2000:
            part = f"{part[:900]} ... {len(part) - 1800:,} characters ... {part[-900:]}"
        text += part if learned else f"{dim}{part}{plain}"
    return text
