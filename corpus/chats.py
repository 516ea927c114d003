"""Conversations and preference pairs out of foreign files, whatever their format.

    read_chats(path) -> [{"messages": [{"role": "user", "content": "..."}, ...]}, ...]
    read_pairs(path) -> [{"prompt": [messages], "chosen": [messages], "rejected": [messages]}, ...]

Every row is brought to messages of the roles system, user and assistant. Its format is recognized
by its fields, row by row. A row that cannot be used is counted by reason in a `Tally`.
"""

import re
from itertools import takewhile

from corpus.files import Tally, reasons_of, surrogate
from corpus.sources import source_rows
from lib.config import UserError
from lib.conversation import render, render_answer

# ---- the formats: which field means what. A new name of a field or a role is added here alone.

DIALOGUES = ("messages", "conversations", "conversation", "dialogue", "dialog")  # lists of messages
QUESTIONS = ("prompt", "instruction", "question")
ANSWERS = ("response", "completion", "output", "answer")
PAIR = ("chosen", "rejected")
SPEAKER, TEXT = ("role", "from"), ("content", "value")  # of a message: OpenAI's, ShareGPT's
SPEAKERS = {"system": "system"} | dict.fromkeys(("user", "human", "prompter"), "user")
SPEAKERS |= dict.fromkeys(("assistant", "gpt", "bot", "chatgpt"), "assistant")
TURN = re.compile(r"\n\n(Human|Assistant):")  # of a transcript, as hh-rlhf has them

REMEDY = (
    f"rename its fields: {'|'.join(QUESTIONS)} and {'|'.join(ANSWERS)}, or {'|'.join(DIALOGUES)}, "
    "for sft.py; prompt, chosen and rejected for dpo.py"
)
# every control character but tab and the line breaks
CONTROLS = dict.fromkeys([*range(9), 11, 12, *range(14, 32), *range(127, 160)])


class BadRow(Exception):
    """Why a row cannot be used: BadRow(reason, detail)."""


def read_chats(path, tally=None):
    """Returns the conversations of a file, folder or glob, each up to its last answer."""
    return [{"messages": messages} for _, _, messages in usable_rows(path, to_chat, tally)]


def read_pairs(path, tally=None):
    """Returns the preference pairs of a file, folder or glob; otherwise as `read_chats`.

    `prompt` holds all that both dialogues share; `chosen` and `rejected` begin with an answer.
    """
    return [pair for _, _, pair in usable_rows(path, to_pair, tally)]


def usable_rows(path, convert, tally=None, max_bad=0.05, least=1):
    """Returns [(where, format, value)] of the rows that convert(row) -> (format, value) accepts.

    Raises UserError if more than `max_bad` of the rows are unusable, or fewer than `least` are
    left. Rows that are right and teach nothing are passed over: counted, and not among the bad.
    """
    tally = tally or Tally()
    rows = []
    for where, row in source_rows(path, tally):
        try:
            rows.append((where, *convert(row)))
        except BadRow as error:
            reason, detail = error.args
            if reason in ("identical-pair", "empty-answer"):
                tally.drop("filter", reason, where)
            else:
                tally.bad(reason, f"{where}: {detail}")
    reasons = sorted(reasons_of(tally.dropped), key=lambda entry: -entry[2])
    total = len(rows) + sum(count for _, _, count, _ in reasons)
    if len(rows) < least or not total or tally.bad_rows > max_bad * total:
        each = (f"{n} {why} ({first.removeprefix(f'{path} ')})" for _, why, n, first in reasons)
        problem = f"{tally.bad_rows} of {total} rows are unusable"
        problem = problem if rows else f"0 usable rows of {total}"
        raise UserError(f"{path}: {problem}: {'; '.join(each) or 'it is empty'}")
    return rows


def to_chat(row):
    """Returns (its fields, messages that end with an answer) of a row; raises BadRow."""
    row = {"messages": row} if isinstance(row, list) else row
    name, messages = dialogue(row, (*DIALOGUES, *QUESTIONS))
    if name is None:
        raise missing(row, "prompt")
    if name in QUESTIONS:
        answer = first(row, ANSWERS)
        if answer is None and row.keys() >= set(PAIR):
            raise BadRow("preference-pair", "holds chosen and rejected answers, for dpo.py")
        if answer is None:
            raise missing(row, "response")
        messages += messages_of(row[answer], answer, "assistant")
        name = f"{name}, {answer}"
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise BadRow("no-answer", "no message of the assistant")
    return name, messages


def to_pair(row):
    """Returns (its fields, {"prompt", "chosen", "rejected"}) of a row, all messages; or BadRow."""
    name, prompt = dialogue(row, (*QUESTIONS, *DIALOGUES))
    for side in PAIR:
        if side not in row:
            raise missing(row, side)
    if name is None and all(isinstance(row[side], str) for side in PAIR):
        chosen, rejected = (turns_of(row[side], side) for side in PAIR)
    else:
        chosen, rejected = (messages_of(row[side], side, "assistant") for side in PAIR)
    shared = common(chosen, rejected)
    if not shared or shared[len(shared) - len(prompt) :] != prompt:  # they do not repeat the prompt
        chosen, rejected = prompt + chosen, prompt + rejected
        shared = common(chosen, rejected)
    if not shared:
        raise BadRow("missing-field", 'missing "prompt", and chosen and rejected share no message')
    answers = {"chosen": chosen[len(shared) :], "rejected": rejected[len(shared) :]}
    for side, messages in answers.items():
        if not messages[0]["role"] == messages[-1]["role"] == "assistant":
            raise BadRow("no-answer", f'where they part, "{side}" has no answer of the assistant')
    if answers["chosen"] == answers["rejected"]:
        raise BadRow("identical-pair", "chosen and rejected are equal")
    return ", ".join(filter(None, (name, *PAIR))), {"prompt": shared, **answers}


def dialogue(row, names):
    """Returns (the first of the fields `names` with a value or None, its messages) of a row.

    Before them come the message of `system` and the turns of alpaca's `history`, [question, answer]
    each; alpaca's `input` is the end of the question.
    """
    if not isinstance(row, dict):
        raise BadRow("not-an-object", f"a row must be an object, got {type(row).__name__}")
    name, messages = first(row, names), []
    if row.get("system"):
        messages += messages_of(row["system"], "system", "system")
    turns = row.get("history") or []
    if not isinstance(turns, list) or not all(isinstance(t, list) and len(t) == 2 for t in turns):
        raise BadRow("not-messages", '"history" must be a list of [question, answer]')
    for question, answer in turns:
        messages += messages_of(question, "history", "user")
        messages += messages_of(answer, "history", "assistant")
    if name:
        messages += messages_of(row[name], name, "user")
    extra = row.get("input") if name in QUESTIONS else None
    extra = extra.strip() if isinstance(extra, str) else extra
    if extra and messages and messages[-1]["role"] == "user":
        for message in messages_of(extra, "input", "user"):
            messages[-1]["content"] += "\n" + message["content"]
    return name, messages


def first(row, names):
    """Returns the first of `names` that stands in a row with a value, or None."""
    return next((name for name in names if row.get(name) is not None), None)


def missing(row, name):
    """Returns the BadRow for a field that a row lacks."""
    return BadRow("missing-field", f'missing "{name}" among {list(row)!r:.80}; {REMEDY}')


def common(chosen, rejected):
    """Returns the messages that two dialogues begin with alike, never the last of either."""
    both = zip(chosen[:-1], rejected[:-1])
    return [message for message, _ in takewhile(lambda pair: pair[0] == pair[1], both)]


def messages_of(value, name, role):
    """Returns the messages that a field holds.

    A string is one message of `role`, or a transcript up to "Assistant:"; a message, or a list of
    them, stands for itself.
    """
    if isinstance(value, str):
        text = f"\n\n{value.strip()}"
        if role == "user" and text.startswith("\n\nHuman:") and text.endswith("\n\nAssistant:"):
            return turns_of(text.removesuffix("\n\nAssistant:"), name)
        return [{"role": role, "content": cleaned(value, name)}]
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list):
        expected = f'"{name}" must be a string or messages, got {type(value).__name__}'
        raise BadRow("not-a-string", expected)
    if not items:
        raise BadRow("empty", f'"{name}" is empty')
    messages = [message_of(item, f'"{name}" message {n}') for n, item in enumerate(items, start=1)]
    return [message for message in messages if message]


def message_of(item, where):
    """Returns a message, or None for an empty system message, which many files carry."""
    if not isinstance(item, dict):
        raise BadRow("not-messages", f"{where} must be an object, got {type(item).__name__}")
    speaker, content = item.get(first(item, SPEAKER)), item.get(first(item, TEXT))
    speaker = speaker if isinstance(speaker, str) else type(speaker).__name__
    if (role := SPEAKERS.get(speaker.lower())) is None:
        expected = f"role must be system, user or assistant, got {speaker!r:.40}"
        raise BadRow("unknown-role", f"{where}: {expected}")
    if isinstance(content, list):  # of {"type": "text", "text": ...}
        is_text = lambda part: isinstance(part, dict) and isinstance(part.get("text"), str)
        content = "".join(part["text"] for part in content) if all(map(is_text, content)) else None
    if not isinstance(content, str):
        raise BadRow("not-a-string", f"{where}: content must be text")
    if role == "system" and not content.strip():
        return None
    if role == "assistant" and not content.strip():  # which models give, and chats keep
        raise BadRow("empty-answer", f"{where} is empty")
    return {"role": role, "content": cleaned(content, where.replace('"', ""))}


def cleaned(text, name):
    """Returns a content with plain line ends, without control characters and outer space."""
    if surrogate(text):
        raise BadRow("bad-unicode", f'"{name}" holds a lone surrogate')
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(CONTROLS).strip()
    if not text:
        raise BadRow("empty", f'"{name}" is empty')
    return text


def turns_of(text, name):
    """Returns the messages of a transcript, "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    before, *pieces = TURN.split(text)
    if before.strip() or not pieces:
        reason = f'missing "prompt", and "{name}" is no Human/Assistant transcript'
        raise BadRow("missing-field", reason)
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": SPEAKERS[who.lower()], "content": cleaned(said, name)} for who, said in turns]


# ---- rows in a template


def render_rows(rows, tokenizer, template, say):
    """Yields (number, its `dialogues`) of each row that the template takes.

    Says how many rows it refuses, and how many train their last answer only.
    """
    refused, partial = [], 0
    for number, row in enumerate(rows):
        try:
            rendered = dialogues(row, tokenizer, template)
        except UserError as error:  # as "conversation roles must alternate"
            refused.append(error)
            continue
        partial += isinstance(row, list) and not covers_answers(row, rendered[0][2])
        yield number, rendered
    if refused:
        say(f"{len(refused):,} dropped: {refused[0]}")
    if partial:
        why = "the template writes earlier ones otherwise, or marks none"
        say(f"{partial:,} train their last answer only: {why}")


def dialogues(row, tokenizer, template):
    """Returns [(name, ids, mask), ...] of a conversation, or of both dialogues of a pair.

    The mask is 1 on what is learned: of a pair the messages after the prompt.
    """
    if isinstance(row, list):
        return [("conversation", *render(tokenizer, row, template))]
    return [(s, *render_answer(tokenizer, row["prompt"], row[s], template)) for s in PAIR]


def covers_answers(messages, mask):
    """Returns whether a mask has a run of 1 for each answer of a conversation."""
    runs = sum(after > before for before, after in zip([0, *mask], mask))
    return runs == sum(message["role"] == "assistant" for message in messages)
