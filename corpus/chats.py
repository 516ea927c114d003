"""Conversations and preference pairs out of foreign rows, whatever their format.

    read_chats(path) -> [{"messages": [{"role": "user", "content": "..."}, ...]}, ...]
    read_pairs(path) -> [{"prompt": [messages], "chosen": [messages], "rejected": [messages]}, ...]

Messages have the roles system, user and assistant; an answer that is only context has "weight": 0.
FIELDS says what a field means, CHAT_SHAPES and PAIR_SHAPES which meanings make a row: the first
shape whose meanings are all there reads it.
"""

import ast
import json
import math
import re
from functools import lru_cache
from itertools import chain, takewhile

from corpus.files import surrogate, whole_json
from corpus.sources import BadRow, PassedOver, usable_rows
from lib.conversation import is_learned

# ---- the tables: a new name is a word, a new markup or shape a line

FIELDS = {  # a meaning: the fields that have it; of several the first with a value is read
    "messages": "messages conversations conversation dialogue dialog chat_messages",
    "system": "system system_prompt system_message",
    "question": "prompt instruction question query user human input inputs problem",
    "context": "input context",
    "answer": "response completion output answer answers assistant gpt bot targets solution",
    "chosen": "chosen chosen_response response_chosen response_j",
    "rejected": "rejected rejected_response response_rejected response_k",
    "role": "role from sender speaker author",  # this and the next two of a message or a part of it
    "content": "content value text parts",
    "thoughts": "thinking reasoning thoughts reasoning_recap user_editable_context",  # left out
    "not-learned": "label kto_tag weight loss train training train_on_turn",  # if false
    "media": "images image image_url input_image image_asset_pointer videos video audios audio "
    "input_audio files",
    "tools": "tools functions tool_calls function_call tool_use tool_result",
    "choices": "choices options endings",
    "rating": "helpfulness",
}
# all others mean what they are called
FIELDS |= {name: name for name in "history mapping current_node chat message_tree_id".split()}
FIELDS = {meaning: tuple(names.split()) for meaning, names in FIELDS.items()}
MEANINGS = {  # a field: what it may mean; it has the first that no field before it has
    name: [m for m, names in FIELDS.items() if name in names] for name in chain(*FIELDS.values())
}
RANK = {name: number for number, name in enumerate(MEANINGS)}
ROLE_OF = {"system": "system", "question": "user", "context": "user"}
ROLE_OF |= dict.fromkeys(("answer", "chosen", "rejected"), "assistant")
REFUSED = {  # rows with a value of such a meaning are passed over
    "not-learned": "says that the answer is not to be learned; leave the field out to learn it",
    "media": "is no text; leave the field out to learn the text alone",
    "tools": "is not supported; leave rows with tools out",
    "choices": "is a question for eval.py --tasks; leave the field out if the answer is a text",
    "rating": "rates the answer; keep rows with good ones, and leave the field out",
}
ON, OFF = ("true", "1", "1.0"), ("false", "0", "0.0")  # of "not-learned", in small letters
NOTHING = ("", "[]", "{}", "null", "None")  # what an empty column holds as text
NO_TEXT = ("messages", "history", "mapping", "chat")  # no text stands for these
OPTIONAL = {*REFUSED, "system", "history", "context"}  # without a value they are not there
OF_MESSAGE = {n for meaning in ("role", "content", *ROLE_OF) for n in FIELDS[meaning]}
SPEAKERS = {  # a role: its names in messages and in the markups below
    "system": "system developer [inst]<<sys>>",
    "user": "user human prompter instruction input [inst] <</sys>>",
    "assistant": "assistant gpt model ai bot chatgpt response [/inst]",
    "tool": "tool function function_call observation tool_call tool_response ipython",
}
SPEAKERS = {name: role for role, names in SPEAKERS.items() for name in names.split()}
HEADINGS = "Human|User|Assistant|AI|Bot|System"
MARKUPS = {  # of a conversation in one text: what opens a turn and names its speaker, what ends it
    "ChatML": (r"<\|im_start\|>(\w+)(?:\n|\Z)", r"<\|im_end\|>"),
    "Llama 2": (r"(\[INST\]\s*<<SYS>>|<</SYS>>|\[/?INST\])", r"</?s>"),
    "Llama 3": (r"<\|start_header_id\|>(\w+)<\|end_header_id\|>", r"<\|(eot_id|begin_of_text)\|>"),
    # alpaca's input is the end of the question
    "### Instruction": (rf"### ?(Instruction|Response|{HEADINGS}):", r"</?s>|\n?### ?Input:\s?"),
    "Human/Assistant": (rf"(?:\A|\n\n)({HEADINGS}):", r"\Z"),
    "Human/Assistant by lines": (rf"(?:\A|\n)({HEADINGS}):", r"\Z"),
    "Vicuna": (r"(?:\A|\s|</s>)(USER|ASSISTANT):", r"</s>"),
}
# what may stand before the first turn, as the system message
PREFACES = {"### Instruction": "(?s).*", "Vicuna": "(A chat between .*)?"}
MARKUPS = {name: tuple(map(re.compile, parts)) for name, parts in MARKUPS.items()}
# how messages begin that are the text of JSON or Python; in numpy's, strings, and a lacking comma
LIKE = re.compile(r"""(?is)["\s]*\[?\s*\{.*?["'](role|from)\W{2,9}(system|user|human|assist|gpt)""")
NUMPY = re.compile(r"""(?s)'(?:[^'\\]|\\.)*+'?|"(?:[^"\\]|\\.)*+"?|(?P<end>\}(?=\s*\{))""")
REMEDY = "rename its fields: prompt|instruction|question and response|completion|output|answer, or "
REMEDY += "messages, for sft.py; prompt, chosen and rejected for dpo.py"
# every control character but tab and the line breaks
CONTROLS = dict.fromkeys([*range(9), 11, 12, *range(14, 32), *range(127, 160)])


def opening(fields):
    """Returns the messages before a row's answer, or all, of {meaning: (field, value)}."""
    messages = []
    for meaning in ("system", "history", "messages", "content", "question"):
        if meaning in fields:
            more = messages_of(*fields[meaning], ROLE_OF.get(meaning))
            messages += more[messages == more[:1] :]  # some files hold the system's message twice
    if "context" in fields:
        name, value = fields["context"]
        passages = cleaned("\n".join(value) if isinstance(value, list) else value, name)
        messages[-1]["content"] += f"\n{passages}"
    return messages


def answered(fields):
    """Returns the messages of a question and its answer; of `answers`, as SQuAD's, the first."""
    name, value = fields["answer"]
    while name == "answers" and isinstance(value, list | dict):
        value = value["text"] if isinstance(value, dict) else next(iter(value), None)
    if value is None:
        raise PassedOver("empty-answer", f'"{name}" is empty')
    return dialogue_of(opening(fields), name, value)


def branch(nodes, last, parent):
    """Returns the nodes of a tree, each of which names its parent, from the root to the last."""
    nodes, path = dict(nodes), []
    while node := nodes.pop(last, None):
        path.insert(0, node)
        last = node.get(parent)
    return path


def chatgpt(fields):
    nodes = branch(fields["mapping"][1], fields["current_node"][1], "parent")
    messages = [node["message"] | node["message"]["author"] for node in nodes if node["message"]]
    return messages_of("mapping", [m for m in messages if content_text(m, "mapping: ") != ""])


def web_chat(fields):
    history = fields["chat"][1]["history"]
    return messages_of("chat", branch(history["messages"], history["currentId"], "parentId"))


def best_replies(node):
    """Returns the messages of a tree from a node down, each the reply of the best rank, 0."""
    rank = lambda reply: math.inf if reply.get("rank") is None else reply["rank"]
    replies = sorted(node.get("replies") or [], key=rank)
    return messages_of("prompt", node) + (best_replies(replies[0]) if replies else [])


CHAT_SHAPES = {  # the meanings that a shape needs, others that it reads, what makes messages
    "messages": ("messages", "system history", opening),
    "question and answer": ("question answer", "system history context", answered),
    "ChatGPT": ("mapping current_node", "", chatgpt),
    "Open WebUI": ("chat", "", web_chat),
    "OpenAssistant": ("message_tree_id question", "", lambda row: best_replies(row["question"][1])),
    "marked text": ("content", "system", opening),
}
sides = lambda row: (opening(row), row["chosen"], row["rejected"])
PAIR_SHAPES = {  # likewise; what makes the messages before the answers, then both as (field, value)
    "pair of answers": ("question chosen rejected", "system history context", sides),
    "pair of dialogues": ("chosen rejected", "system messages", sides),
}


def read_chats(path, tally=None):
    """Returns the conversations of a file, folder or glob, each up to its last answer."""
    return [{"messages": messages} for _, _, messages in usable_rows(path, to_chat, tally)]


def read_pairs(path, tally=None):
    """Returns the preference pairs of them; the prompt is all that both dialogues share."""
    return [pair for _, _, pair in usable_rows(path, to_pair, tally)]


def to_chat(row):
    """Returns (rule, messages that end with an answer, unused columns) of a row; raises BadRow."""
    row = {"messages": row} if isinstance(row, list) else row
    rule, messages, unused = read_row(row, CHAT_SHAPES)
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("no-answer", "no message of the assistant")
    if not any(map(is_learned, messages)):
        raise PassedOver("not-learned", 'every answer has "weight" 0, or "loss" or "train" false')
    while not is_learned(messages[-1]):
        messages.pop()
    return rule, messages, unused


def to_pair(row):
    """Returns (rule, {"prompt", "chosen", "rejected"}, unused columns) of a row; or BadRow."""
    if isinstance(row, dict) and isinstance(row.get("output"), list) and len(row["output"]) == 2:
        both = dict(zip(("chosen", "rejected"), row["output"]))  # as alpaca's rated outputs are
        row = {name: value for name, value in row.items() if name != "output"} | both
    rule, (prompt, *both), unused = read_row(row, PAIR_SHAPES)
    chosen, rejected = (dialogue_of(prompt, *side) for side in both)
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(chosen[:-1], rejected[:-1]))
    if not (shared := [message for message, _ in alike]):
        raise BadRow("missing-field", 'missing "prompt", and chosen and rejected share no message')
    answers = {"chosen": chosen[len(shared) :], "rejected": rejected[len(shared) :]}
    for side, messages in answers.items():
        if not messages[0]["role"] == messages[-1]["role"] == "assistant":
            raise BadRow("no-answer", f'where they part, "{side}" has no answer of the assistant')
        if not is_learned(messages[-1]):
            raise PassedOver("not-learned", f'"{side}" ends with an answer of weight 0')
    if answers["chosen"] == answers["rejected"]:
        raise PassedOver("identical-pair", "chosen and rejected are equal")
    return rule, {"prompt": shared, **answers}, unused


def read_row(row, shapes):
    """Returns (rule, what the first fitting shape makes, unused columns) of a row; or BadRow."""
    if not isinstance(row, dict):
        raise BadRow("not-an-object", f"a row must be an object, got {type(row).__name__}")
    given = fields_of(row, "", *REFUSED)
    for shape, (needs, reads, build) in shapes.items():
        if given.keys() >= {*needs.split()}:
            read = [meaning for meaning in f"{needs} {reads}".split() if meaning in given]
            fields = {m: (given[m][0], unpacked(m, *given[m])) for m in read}
            rule = f"{shape}: {', '.join(name for name, _ in fields.values())}"
            return rule, build(fields), unused_names(row, fields)
    if shapes is CHAT_SHAPES and given.keys() >= {"chosen", "rejected"}:
        raise BadRow("preference-pair", "holds chosen and rejected answers, for dpo.py")
    usual = ("question", "answer") if shapes is CHAT_SHAPES else ("chosen", "rejected")
    name = next(FIELDS[meaning][0] for meaning in usual if meaning not in given)
    raise BadRow("missing-field", f'missing "{name}" among {list(row)!r:.80}; {REMEDY}')


@lru_cache(1024)
def plain(name):
    """Returns the name in FIELDS of a field, as a spreadsheet's "System Prompt"."""
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def fields_of(row, where="", *refused):
    """Returns {meaning: (field, value)} of a row or of a part of one; nulls and NaN mean nothing.

    Of several fields of a meaning it is the first that is not empty. Raises PassedOver for a value
    of a `refused` meaning.
    """
    known = [(plain(name), name, v) for name, v in row.items() if v is not None and v == v]
    known = [(is_empty(v), RANK[n], n, name, v) for n, name, v in known if n in RANK]
    fields = {}
    for empty, _, n, name, value in sorted(known):
        for meaning in [m for m in MEANINGS[n] if m not in fields][:1]:
            speaks = str(value).strip().lower() in OFF if meaning == "not-learned" else not empty
            if speaks and meaning in refused:
                raise PassedOver(meaning, f'{where}"{name}" {REFUSED[meaning]}')
            if speaks or meaning not in OPTIONAL:
                fields[meaning] = name, value
    return fields


def is_empty(value):
    """Returns whether a column's value is nothing, or the text of that."""
    if isinstance(value, str):
        return value in NOTHING or value.isspace()
    return value is None or value != value or value in ([], {}, [None])


def unused_names(row, fields):
    """Returns the columns of a row, and keys of its messages, with a value that nothing reads."""
    read = {name for name, _ in fields.values()}
    parts = [("", name, value) for name, value in row.items() if name not in read]
    has_more = lambda item: isinstance(item, dict) and not item.keys() <= OF_MESSAGE
    for column, items in fields.values():
        for item in filter(has_more, items if isinstance(items, list) else ()):
            parts += [(f"{column}.", n, v) for n, v in item.items() if plain(n) not in OF_MESSAGE]
    switch = lambda n, v: plain(n) in FIELDS["not-learned"] and str(v).lower() in ON + OFF
    return [s + n for s, n, v in parts if not (switch(n, v) or is_empty(v))]


def dialogue_of(prompt, name, value):
    """Returns the prompt's messages and those of an answer's field, which may repeat the prompt."""
    messages = messages_of(name, value, "assistant")
    asked = [m for m in prompt if m["role"] != "system"]
    whole = messages
    if isinstance(value, str) and all(m["content"] in messages[0]["content"] for m in asked):
        whole = turns_of(messages[0]["content"]) or messages
    said = [m for m in whole if m["role"] != "system"]
    starts = range(len(said) - len(asked)) if said and said[0]["role"] == "user" else ()
    if not any(said[n : n + len(asked)] == asked for n in starts):
        return prompt + messages
    if not said[-1]["content"]:
        raise BadRow("empty", f'"{name}" ends with an empty answer')
    return whole if len(said) < len(whole) else prompt[: len(prompt) - len(asked)] + whole


def messages_of(name, value, role=None):
    """Returns the messages that a field holds; a text is one of `role`, or has turns in a markup.

    Without a role it must have turns; as a question those that lead to an answer.
    """
    if isinstance(value, int | float) and role == "assistant":
        value = json.dumps(value)
    if isinstance(value, str):
        text = cleaned(value, name)
        turns = turns_of(text) if role in (None, "user") else None
        if turns and (role is None or turns[-1]["role"] == "user" or not turns[-1]["content"]):
            return [turn for turn in turns if turn["content"]]
        if role is None:
            raise BadRow("not-messages", f'"{name}" holds no messages, nor {", ".join(MARKUPS)}')
        return [{"role": role, "content": text}]
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list):
        expected = f'"{name}" must be a string or messages, got {type(value).__name__}'
        raise BadRow("not-a-string", expected)
    return list(chain(*(turn(item, f'"{name}" message {n}') for n, item in enumerate(items, 1))))


def turn(item, where):
    """Returns the message of an item, none of an empty system's; or of a question and an answer."""
    if isinstance(item, list) and len(item) == 2:
        item = dict(zip(("user", "assistant"), item))
    if not isinstance(item, dict):
        raise BadRow("not-messages", f"{where} must be an object, got {type(item).__name__}")
    fields = fields_of(item, f"{where}: ", "media", "tools")
    both = [meaning for meaning in ("system", "question", "answer") if meaning in fields]
    if both and "role" not in fields:
        return list(chain(*(messages_of(*fields[m], ROLE_OF[m]) for m in both)))
    speaker, content = (fields.get(m, ("", None))[1] for m in ("role", "content"))
    if (role := SPEAKERS.get(plain(str(speaker)))) is None:
        expected = f"role must be system, user or assistant, got {speaker!r:.40}"
        raise BadRow("unknown-role", f"{where}: {expected}")
    if role == "tool":
        raise PassedOver("tools", f"{where}: {speaker!r} {REFUSED['tools']}")
    text = content_text(content, f"{where}: ")
    if role == "system" and not text.strip():
        return []
    if role == "assistant" and not text.strip():  # which models give, and chats keep
        raise PassedOver("empty-answer", f"{where} is empty")
    message = {"role": role, "content": cleaned(text, where.replace('"', ""))}
    off = role == "assistant" and "not-learned" in fields
    return [message | {"weight": 0} if off else message]


def content_text(content, where):
    """Returns the text of a content: text, a number, an object with one, or a list; or BadRow."""
    if isinstance(content, dict):
        kind = str(content.get("type", content.get("content_type")))
        fields_of({kind: True}, where, "media", "tools")
        _, text = fields_of(content, where, "media", "tools").get("content", ("", None))
        return "" if kind in FIELDS["thoughts"] else content_text(text, where)
    if isinstance(content, list):
        return "".join(content_text(part, where) for part in content)
    if not isinstance(content, str | int | float):
        raise BadRow("not-a-string", f"{where}content must be text")
    return content if isinstance(content, str) else json.dumps(content)


def cleaned(text, name):
    """Returns a content with plain line ends, without control characters and outer space."""
    if surrogate(text):
        raise BadRow("bad-unicode", f'"{name}" holds a lone surrogate')
    if not text.isprintable():
        text = text.replace("\r\n", "\n").replace("\r", "\n").translate(CONTROLS)
    if not (text := text.strip()):
        raise BadRow("empty", f'"{name}" is empty')
    return text


def turns_of(text):
    """Returns the messages of a conversation in a markup, or None; an open answer is empty."""
    if not any(sign in text for sign in (":", "<|", "[INST]")):
        return None  # most texts, without a search for each markup
    for markup, (opens, ends) in MARKUPS.items():
        parts = [ends.sub("", part).strip() for part in opens.split(text)]
        if len(parts) < 5 or not re.fullmatch(PREFACES.get(markup, ""), parts[0]):
            continue  # less than two turns, or text before them
        names = ["system", *(re.sub(r"\s", "", name).lower() for name in parts[1::2])]
        turns = zip(map(SPEAKERS.get, names), parts[::2])
        turns = [{"role": r, "content": said} for r, said in turns if said or r != "system"]
        roles = [turn["role"] for turn in turns if turn["role"] != "system"]
        is_open = roles[-1] == "assistant"
        is_whole = all(turn["content"] for turn in turns[: len(turns) - is_open])
        if is_whole and roles[0] == "user" and "assistant" in roles and None not in roles:
            return turns
    return None


def unpacked(meaning, name, value):
    """Returns the messages that a string holds as the text of JSON or Python; else the value."""
    text = value.strip() if isinstance(value, str) else ""
    must = text[:1] in ("[", "{") and (meaning in NO_TEXT or name == "answers")
    if not (must or LIKE.match(text)):
        return value
    try:
        commas = NUMPY.sub(lambda part: part[0] + "," * (part["end"] is not None), text)
        items = whole_json(text) or ast.literal_eval(commas)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        looks = "looks like messages, and is neither JSON nor Python"
        raise BadRow("not-messages", f'"{name}" {looks}') from None
    if isinstance(items, str):
        return unpacked(meaning, name, items)
    parts = items if isinstance(items, list) else [items]
    like = all(isinstance(p, dict) and fields_of(p).keys() >= {"role", "content"} for p in parts)
    return items if must or like else value
