"""Conversations and preference pairs out of foreign files, whatever their format.

    read_chats(path) -> [{"messages": [{"role": "user", "content": "..."}, ...]}, ...]
    read_pairs(path) -> [{"prompt": [messages], "chosen": [messages], "rejected": [messages]}, ...]

Every row is brought to messages of the roles system, user and assistant. Its format is recognized
by its fields, row by row, so that one file may mix several. The rows lie in JSON Lines, in a JSON
list, in CSV or in parquet, compressed or not. A row that cannot be used is counted by reason in a
`Tally`, the first three of each reason with line number and field, and passed over. A file with
too many of them, or with nothing else, is refused.
"""

import re

from corpus.sources import Tally, source_rows
from lib.config import UserError

MAX_BAD = 0.05  # the share of unusable rows from which a file is refused

# ---- the formats: which field means what. A new name of a field or a role is added here alone.

DIALOGUES = ("messages", "conversations", "conversation", "dialogue", "dialog")  # lists of messages
QUESTIONS = {  # field -> the format's name, and the answer's field that is called missing
    "prompt": ("prompt/response", "response"),
    "instruction": ("alpaca", "output"),
    "question": ("question/answer", "answer"),
}
ANSWERS = ("response", "completion", "output", "answer")
PAIR = ("chosen", "rejected")
CONTEXT = ("system", "history", "input")  # beside a question: a system message, alpaca's two
SPEAKER, TEXT = ("role", "from"), ("content", "value")  # of a message: OpenAI's, ShareGPT's
SPEAKERS = {"system": "system"} | dict.fromkeys(("user", "human", "prompter"), "user")
SPEAKERS |= dict.fromkeys(("assistant", "gpt", "bot", "chatgpt"), "assistant")

RENAME = (  # the remedy where a field is missing and the row has others
    f"rename its fields: prompt ({', '.join([*QUESTIONS][1:])}) and response "
    f"({', '.join(ANSWERS[1:])}), or messages ({', '.join(DIALOGUES[1:])}); "
    "in a pair prompt, chosen and rejected"
)
JSON_NAMES = {bool: "true or false", int: "a number", float: "a number", str: "a string"}
JSON_NAMES |= {list: "a list", dict: "an object", type(None): "null"}
# every control character but tab and the line breaks
CONTROLS = dict.fromkeys([*range(9), 11, 12, *range(14, 32), *range(127, 160)])
SURROGATE = re.compile("[\ud800-\udfff]")
TURN = re.compile(r"\n\n(Human|Assistant):")  # of a transcript, as hh-rlhf has them


class BadRow(Exception):
    """Why a row cannot be used: BadRow(reason, detail)."""


# ---- files


def read_chats(path, tally=None, max_bad=MAX_BAD):
    """Returns the conversations of a file, folder or glob: [{"messages": [message, ...]}, ...].

    Each ends with an answer: what a user says after the last one is left out. Unusable rows are
    counted in `tally`. Raises UserError when their share is above `max_bad`, when no row is
    usable, or when a file is missing or damaged.
    """
    return [{"messages": messages} for _, _, messages in usable_rows(path, to_chat, tally, max_bad)]


def read_pairs(path, tally=None, max_bad=MAX_BAD):
    """Returns preference pairs, [{"prompt", "chosen", "rejected"}, ...], each a list of messages.

    `prompt` holds all that both dialogues share; `chosen` and `rejected` begin with an answer. A
    pair whose two answers are equal is dropped and counted as identical-pair, which is no fault of
    the file. Otherwise as `read_chats`.
    """
    return [pair for _, _, pair in usable_rows(path, to_pair, tally, max_bad)]


def usable_rows(path, convert, tally=None, max_bad=MAX_BAD):
    """Returns [(where, format, value)] of the rows that convert(row) -> (format, value) accepts."""
    tally = Tally() if tally is None else tally
    rows, bad, identical = [], tally.bad_rows, 0
    for where, row in source_rows(path, tally):
        try:
            rows.append((where, *convert(row)))
        except BadRow as error:
            reason, detail = error.args
            if reason == "identical-pair":
                identical += 1
                tally.drop("filter", reason, where)
            else:
                tally.bad(reason, f"{where}: {detail}")
    tally.documents += len(rows) + identical
    tally.kept += len(rows)
    bad = tally.bad_rows - bad
    total = bad + len(rows) + identical
    if not rows:
        raise UserError(
            f"{path}: 0 usable rows of {total}{reasons_of(tally, path) or ': it is empty'}"
        )
    if bad > max_bad * total:
        share = f"{bad} of {total} rows are unusable ({bad / total:.1%}, allowed {max_bad:.1%})"
        raise UserError(f"{path}: {share}{reasons_of(tally, path)}")
    return rows


def reasons_of(tally, path):
    """Returns why rows were dropped, to end an error: ': 3 not-json (line 7: ...); ...', or ''.

    Of each reason the first example; the file is named where it is another, as in a folder.
    """
    reasons = sorted(tally.reasons(), key=lambda entry: -entry[2])
    each = [f"{n} {why} ({first.removeprefix(f'{path} ')})" for _, why, n, first in reasons]
    return f": {'; '.join(each)}" if each else ""


# ---- rows


def to_chat(row):
    """Returns (format, messages) of a row, which end with an answer; raises BadRow."""
    if isinstance(row, dict) and "chosen" in row and not first(row, ANSWERS + DIALOGUES):
        raise BadRow("preference-pair", "holds chosen and rejected answers, which are for dpo.py")
    kind, messages, answer = dialogue(row)
    if answer:
        name = first(row, ANSWERS) or next((name for name in ANSWERS if name in row), None)
        if name is None:
            raise BadRow("missing-field", f'missing "{answer}"{rename_advice(row)}')
        messages += messages_of(row[name], name, "assistant")
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise BadRow("no-answer", "no message of the assistant")
    return kind, messages


def to_pair(row):
    """Returns (format, {"prompt", "chosen", "rejected"}) of a row, lists of messages; or BadRow."""
    if not isinstance(row, dict):
        raise BadRow("not-an-object", f"a pair must be an object, got {json_name(row)}")
    if missing := [name for name in PAIR if name not in row]:
        is_chat = len(missing) == 2 and first(row, ANSWERS + DIALOGUES)
        hint = "; conversations are for sft.py" if is_chat else rename_advice(row)
        raise BadRow("missing-field", f'missing "{missing[0]}"{hint}')
    prompt_field = first(row, (*QUESTIONS, *DIALOGUES))
    prompt = dialogue(row)[1] if prompt_field else system_message(row)
    if not prompt_field and all(isinstance(row[name], str) for name in PAIR):
        kind, (chosen, rejected) = "hh-rlhf", transcripts(row)
    else:
        kind = f"{prompt_field}, chosen, rejected" if prompt_field else "chosen, rejected"
        chosen, rejected = (messages_of(row[name], name, "assistant") for name in PAIR)
    shared = common(chosen, rejected)
    if not shared or shared[len(shared) - len(prompt) :] != prompt:  # they do not repeat the prompt
        chosen, rejected = prompt + chosen, prompt + rejected
        shared = common(chosen, rejected)
    if not shared:
        raise BadRow("missing-field", 'missing "prompt", and chosen and rejected share no message')
    answers = {"chosen": chosen[len(shared) :], "rejected": rejected[len(shared) :]}
    for name, messages in answers.items():
        if messages[0]["role"] != "assistant":
            raise BadRow(
                "prompts-differ", f'"{name}" parts from the other with no answer of the assistant'
            )
    if answers["chosen"] == answers["rejected"]:
        raise BadRow("identical-pair", "chosen and rejected are equal")
    return kind, {"prompt": shared, **answers}


def dialogue(row):
    """Returns (format, messages, name of the field that must hold the answer, or None) of a row.

    The messages are a whole dialogue, or a question with what stands before it.
    """
    if isinstance(row, list):
        return "list of messages", messages_of(row, "the list", "user"), None
    if not isinstance(row, dict):
        raise BadRow("not-an-object", f"a row must be an object, got {json_name(row)}")
    names = (*QUESTIONS, *DIALOGUES) if "chosen" in row else (*DIALOGUES, *QUESTIONS)
    name = first(row, names) or next((name for name in names if name in row), None)
    if name is None:
        raise BadRow("missing-field", f'missing "prompt" (or "messages", ...){rename_advice(row)}')
    messages = system_message(row) + history(row) + messages_of(row[name], name, "user")
    if name in DIALOGUES:
        items = row[name] if isinstance(row[name], list) else []
        head = next((item for item in items if isinstance(item, dict)), {})
        return ("ShareGPT" if "from" in head else "messages"), messages, None
    extra = row.get("input")  # alpaca's: what the instruction is about, in most rows blank
    blank = extra is None or (isinstance(extra, str) and not extra.strip())
    if not blank and messages[-1]["role"] == "user":
        messages[-1]["content"] += "\n" + messages_of(extra, "input", "user")[-1]["content"]
    kind, answer = QUESTIONS[name]
    return kind, messages, answer


def first(row, names):
    """Returns the first of `names` that stands in a row with a value, or None."""
    return next((name for name in names if row.get(name) is not None), None)


def rename_advice(row):
    """Returns how the error on a missing field goes on: the names the row has, and the remedy.

    Names are foreign text: what would move a terminal's cursor is shown as a question mark.
    """
    if row.keys() - {*DIALOGUES, *QUESTIONS, *ANSWERS, *PAIR, *CONTEXT}:
        names = "".join(c if c.isprintable() else "?" for c in ", ".join(map(str, row))[:80])
        return f" among {names}; {RENAME}"
    return "" if row else " among no fields at all"


def system_message(row):
    """Returns the message of a `system` field, in a list; none for an absent or empty one."""
    value = row.get("system")
    return messages_of(value, "system", "system") if value not in (None, "") else []


def history(row):
    """Returns the earlier turns of an alpaca row, from its list of [question, answer]."""
    turns = row.get("history")
    if turns in (None, [], ""):
        return []
    if not isinstance(turns, list) or not all(isinstance(t, list) and len(t) == 2 for t in turns):
        raise BadRow("not-messages", '"history" must be a list of [question, answer]')
    texts = [(text, role) for turn in turns for text, role in zip(turn, ("user", "assistant"))]
    return [message for text, role in texts for message in messages_of(text, "history", role)]


# ---- messages


def messages_of(value, name, role):
    """Returns the messages that a field holds.

    A string is one message of `role`, or a transcript; a message, or a list of them, stands for
    itself.
    """
    if isinstance(value, str):
        if role == "user" and (turns := open_transcript(value)):
            return turns
        return [{"role": role, "content": cleaned(value, name)}]
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list):
        raise BadRow(
            "not-a-string", f'"{name}" must be a string or messages, got {json_name(value)}'
        )
    if not items:
        raise BadRow("empty", f'"{name}" is empty')
    messages = [message_of(item, f'"{name}" message {n}') for n, item in enumerate(items, start=1)]
    return [message for message in messages if message]


def message_of(item, where):
    """Returns a message, or None for an empty system message, which many files carry."""
    if not isinstance(item, dict):
        raise BadRow("not-messages", f"{where} must be an object, got {json_name(item)}")
    speaker, content = item.get(first(item, SPEAKER)), item.get(first(item, TEXT))
    role = SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        got = repr(speaker)[:40] if isinstance(speaker, str) else json_name(speaker)
        raise BadRow("unknown-role", f"{where}: role must be system, user or assistant, got {got}")
    if isinstance(content, list):
        content = "".join(item_text(item, where) for item in content)
    if not isinstance(content, str):
        raise BadRow("not-a-string", f"{where}: content must be a string, got {json_name(content)}")
    if role == "system" and not content.strip():
        return None
    return {"role": role, "content": cleaned(content, where.replace('"', ""))}


def item_text(item, where):
    """Returns the text of one item of a content that is a list of {"type": "text", "text": ...}."""
    text = item.get("text") if isinstance(item, dict) and item.get("type") == "text" else None
    if not isinstance(text, str):
        raise BadRow("not-a-string", f"{where}: content holds an item that is no text")
    return text


def cleaned(text, name):
    """Returns a content with plain line ends, without control characters and outer space."""
    if SURROGATE.search(text):
        raise BadRow("bad-unicode", f'"{name}" holds a lone surrogate')
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(CONTROLS).strip()
    if not text:
        raise BadRow("empty", f'"{name}" is empty')
    return text


def json_name(value):
    """Returns what JSON calls the type of a value."""
    return JSON_NAMES.get(type(value), "nothing")


def common(first_dialogue, second_dialogue):
    """Returns the messages that two dialogues begin with alike, never the last of either."""
    length = 0
    shortest = min(len(first_dialogue), len(second_dialogue)) - 1
    while length < shortest and first_dialogue[length] == second_dialogue[length]:
        length += 1
    return first_dialogue[:length]


# ---- transcripts: "\n\nHuman: ...\n\nAssistant: ..."


def transcripts(row):
    """Returns chosen and rejected as messages; they must agree up to the last "Assistant:"."""
    heads, answers = [], []
    for name in PAIR:
        head, marker, answer = row[name].rpartition("\n\nAssistant:")
        if not marker:
            detail = f'missing "prompt", and "{name}" is no Human/Assistant transcript'
            raise BadRow("missing-field", detail)
        if TURN.search(answer):
            raise BadRow("no-answer", f'"{name}" does not end with an answer of the assistant')
        heads.append(head)
        answers.append([{"role": "assistant", "content": cleaned(answer, name)}])
    if heads[0] != heads[1]:
        raise BadRow("prompts-differ", "chosen and rejected differ before the last answer")
    return [turns_of(heads[0], "chosen") + answer for answer in answers]


def open_transcript(text):
    """Returns the messages of a prompt that is a transcript up to "Assistant:", else None."""
    text = f"\n\n{text.strip()}"
    if not (text.startswith("\n\nHuman:") and text.endswith("\n\nAssistant:")):
        return None
    return turns_of(text.removesuffix("\n\nAssistant:"), "prompt")


def turns_of(text, name):
    """Returns the messages of a transcript."""
    before, *pieces = TURN.split(text)
    if before.strip() or not pieces:
        raise BadRow("not-messages", f'"{name}" must begin with "Human:" or "Assistant:"')
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": cleaned(words, name)} for who, words in turns]
