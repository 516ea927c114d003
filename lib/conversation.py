"""A conversation as ids: `render`, the one function for training, chat, server and evaluation.

A template is Jinja, which lib/chat_template.py renders: a foreign folder brings its own, four are
ours. No text can forge a control token.
"""

from typing import NamedTuple

from lib.config import UserError
from lib.tokenizer import IM_END, IM_START, SPECIALS


class Template(NamedTuple):
    """A message is heads[role] + its trimmed content + ends[role]; `between` joins two messages.

    A space at the end of a head is the model's to write, as is the line break before `<|im_end|>`
    in chatml_newline: strip its answers.
    """

    heads: dict[str, str]
    ends: dict[str, str]
    between: str

    @property
    def prompt(self):
        """What opens the next answer."""
        return self.between + self.heads["assistant"].rstrip(" ")


OWN = "jinja"  # the name of the template that a foreign folder brings
ROLES = ("system", "user", "assistant")
EOS_AFTER_ANSWER = {"system": "", "user": "", "assistant": SPECIALS["eos"]}
INSTRUCT = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}
CHAT = {"system": "", "user": "Human: ", "assistant": "Assistant: "}
CHATML = {role: f"{IM_START}{role}\n" for role in ROLES}
TEMPLATES = {
    "chatml": Template(CHATML, ends=dict.fromkeys(ROLES, IM_END), between="\n"),
    "instruct": Template(INSTRUCT, ends=EOS_AFTER_ANSWER, between="\n\n"),
    "chat": Template(CHAT, ends=EOS_AFTER_ANSWER, between="\n\n"),
    "chatml_newline": Template(CHATML, ends=dict.fromkeys(ROLES, f"\n{IM_END}"), between="\n"),
}
OLD_CHATML = "chatml_newline"  # our chatml until December 2026; no new model gets it


def render(tokenizer, messages, template, add_generation_prompt=False):
    """Returns a conversation as (ids, mask), the mask 1 on the assistant's answers and their ends.

    messages: [{"role": system | user | assistant, "content": text}, ...]; an answer of "weight" 0,
    as OpenAI's, gets mask 0. The ids are those of `apply_chat_template` on the folder, except that
    a marker in a content stays text. add_generation_prompt opens the next answer.
    """
    check_messages(messages)
    return find_template(tokenizer, template).render(tokenizer, messages, add_generation_prompt)


def render_prompt(tokenizer, messages, template):
    """Returns the ids up to where the model writes: its answer, or the rest of a last one, begun.

    A begun answer loses its end of turn, and the white space before that. Without a template a
    model continues all contents in one.
    """
    if template is None:
        return tokenizer.prompt_ids("".join(message["content"] for message in messages))
    if messages[-1]["role"] != "assistant":
        return render(tokenizer, messages, template, add_generation_prompt=True)[0]
    opening, _ = render(tokenizer, messages[:-1], template, add_generation_prompt=True)
    ids, _ = render(tokenizer, messages, template)
    begin, ends = shared_length(opening, ids), stop_ids(tokenizer, template)
    end = next((i for i in range(begin, len(ids)) if ids[i] in ends), len(ids))
    while tokenizer.spelled(ids[end - 1]).isspace():
        end -= 1
    return ids[:end]


def render_answer(tokenizer, prompt, answer, template):
    """Returns (ids, mask) of prompt + answer, lists of messages; the mask is 0 on the prompt."""
    opening, _ = render(tokenizer, prompt, template, add_generation_prompt=True)
    ids, mask = render(tokenizer, prompt + answer, template)
    shared = shared_length(opening, ids)
    return ids, [0] * shared + mask[shared:]


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
    return [
        (s, *render_answer(tokenizer, row["prompt"], row[s], template))
        for s in ("chosen", "rejected")
    ]


def covers_answers(messages, mask):
    """Returns whether a mask has a run of 1 for each answer to be learned."""
    runs = sum(after > before for before, after in zip([0, *mask], mask))
    return runs == sum(map(is_learned, messages))


def is_learned(message):
    """Returns whether a message is an answer to be learned, not only context."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def shared_length(part, whole):
    """Returns how many elements two strings, or two lists, begin with alike."""
    if part == whole[: len(part)]:
        return len(part)
    both = enumerate(zip(part, whole))
    return next((n for n, (a, b) in both if a != b), len(whole))


def folder_template(config, source):
    """Returns the template named by a tokenizer_config.json, or None; UserError for an unknown one.

    A folder that another program wrote has its own; ours without a name only offer chatml.
    """
    foreign = config.get("chat_template") and "tokenizer_model_sha256" not in config
    # the key until December 2026
    name = config.get("chat_template_name", OWN if foreign else None)
    name = config.get("prompt_template", OLD_CHATML if name == "chatml" else name)
    if name not in (None, OWN, *TEMPLATES):
        raise UserError(f"{source}: no template {name!r} (tokenizer_config.json)")
    return name


def template_of(tokenizer, asked=None):
    """Returns the template that a user asks for, by default the folder's own.

    A folder of the old chatml is asked for it as chatml, too. Where neither names one it is chatml,
    or instruct if the tokenizer lacks its markers.
    """
    own = tokenizer.template
    if asked is not None:
        return own if (asked, own) == ("chatml", OLD_CHATML) else asked
    return own or ("chatml" if has_markers(tokenizer) else "instruct")


def template_notes(tokenizer, folder):
    """Returns sentences on what a chat with the model in `folder` should know beforehand."""
    if tokenizer.template is None:
        return [f"{folder} names no chat template: each text is continued as it stands"]
    return find_template(tokenizer, tokenizer.template).notes


def stop_ids(tokenizer, template):
    """Returns the ids that end an answer: EOS, the template's end of turn, `end_ids`."""
    ends = {tokenizer.eos_id, *tokenizer.end_ids}
    if template is not None:
        ends.add(find_template(tokenizer, template).end)
    return sorted(ends - {None})


def find_template(tokenizer, name):
    """Returns the ChatTemplate of a name, which is compiled once for each tokenizer."""
    from lib.chat_template import ChatTemplate, jinja

    if name not in tokenizer.templates:
        if name == OWN:
            source = tokenizer.config.get("chat_template")
        elif name not in TEMPLATES:
            raise UserError(f"unknown template {name!r}: choose one of {', '.join(TEMPLATES)}")
        elif TEMPLATES[name].heads == CHATML and not has_markers(tokenizer):
            missing = f"needs {IM_START}, and this tokenizer has none"
            raise UserError(f"the template {name} {missing}: choose instruct or chat")
        else:
            source = jinja(TEMPLATES[name], bool(tokenizer.opening))
        tokenizer.templates[name] = ChatTemplate(tokenizer, source)
    return tokenizer.templates[name]


def has_markers(tokenizer):
    return None not in (tokenizer.im_start_id, tokenizer.im_end_id)


def check_messages(messages):
    """Raises UserError, with the message's number, unless this is a conversation."""
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError("a conversation must be a list of at least one message")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise UserError(f"message {number}: must be an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            expected = f"one of {', '.join(ROLES)}"
            raise UserError(f"message {number}: role must be {expected}, got {role!r:.60}")
        if not isinstance(content, str) or not content.strip():
            expected = "content must be text that is not empty"
            raise UserError(f"message {number} ({role}): {expected}, got {content!r:.60}")
