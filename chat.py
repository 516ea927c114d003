"""A conversation in the terminal, in the template of the model's own folder.

    python sample.py --chat --model_path=checkpoints/dpo                     /help lists what else there is
    python sample.py --chat --model_path=checkpoints/dpo --prompt="Why?"     one question, one answer
    python sample.py --chat --model_path=checkpoints/dpo < questions.txt     one question a line

Answers go to stdout, all else to stderr. A model without a template continues each text as it stands, and
remembers none. What is said is said to the model as text: no way of typing makes it a control token.
"""

import contextlib
import json
import secrets
import sys
import time
from dataclasses import replace

from engine import Engine, Reply, Request, generate
from lib.config import UserError
from lib.tokenizer import render, stop_ids

HELP = """\
/help           this list
/clear          forget the conversation, keep the system message
/system TEXT    tell the model what to be; without TEXT show what it was told
/retry          answer the last question again
/save FILE      append the conversation to FILE, a row as sft.py reads it
/quit           leave; so do Ctrl-C and Ctrl-D. While an answer is written, Ctrl-C ends the answer
//TEXT          a question that begins with a single /"""

PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
PICTURES |= {0x7F: 0x2421} | dict.fromkeys(
    range(0x80, 0xA0), 0xFFFD
)  # DEL, and the second set of controls


class Chat:
    """One conversation: `messages`, as {"role", "content"}, a system message first if there is one.

    A question that got no answer is the last of them, until it is asked again or another one is.
    sampling: a Sampling; its seed is that of the first answer, the next one's is one more.
    """

    def __init__(
        self, model, tokenizer, sampling, max_new_tokens, stop=(), system="", graphs=False
    ):
        self.tokenizer, self.template = tokenizer, tokenizer.template
        self.model, self.engine = model, Engine(model, 1, graphs=graphs)
        self.ends = stop_ids(tokenizer, tokenizer.template)
        self.max_new_tokens, self.stop, self.messages = max_new_tokens, stop, []
        seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self.sampling = replace(sampling, seed=seed)
        if system:
            self.set_system(system)

    def set_system(self, text):
        if self.template is None:
            raise UserError(
                "system: this model has no chat template, so nothing marks a system message"
            )
        self.tokenizer.encode(text)  # refuses what is no Unicode
        rest = [message for message in self.messages if message["role"] != "system"]
        self.messages = [{"role": "system", "content": text}, *rest]

    def ask(self, text):
        """Prints the answer to `text` as it is written. UserError if there is none, and nothing changes."""
        with self.unless_refused():
            if self.messages and self.messages[-1]["role"] == "user":
                self.messages.pop()
            self.messages.append({"role": "user", "content": text})
            self.answer()

    def retry(self):
        """Prints another answer to the last question. UserError if there is none, and nothing changes."""
        with self.unless_refused():
            if self.messages and self.messages[-1]["role"] == "assistant":
                self.messages.pop()
            if not self.messages or self.messages[-1]["role"] != "user":
                raise UserError("/retry: no question has been asked yet")
            self.answer()

    @contextlib.contextmanager
    def unless_refused(self):
        """Whatever is done to the messages inside, a UserError undoes it."""
        before = list(self.messages)
        try:
            yield
        except UserError:
            self.messages = before
            raise

    def clear(self):
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def answer(self):
        """Answers the last message and remembers what it said, whole or, after Ctrl-C, in part."""
        request = Request(self.make_room(), self.max_new_tokens, self.sampling, self.ends)
        self.sampling = replace(self.sampling, seed=(self.sampling.seed + 1) % 2**64)
        text, began = "", time.perf_counter()
        try:
            for piece in self.written(request):
                text += piece
                print(visible(piece), end="", flush=True)
        except KeyboardInterrupt:
            request.finish = "stopped"
        print(flush=True)
        if self.template is not None and text:
            self.messages.append({"role": "assistant", "content": text})
        say(self.summary(request, time.perf_counter() - began))
        if request.finish == "stopped":
            raise KeyboardInterrupt

    def written(self, request):
        """Returns the pieces of an answer as they come; the white space around it is the template's."""
        reply = Reply(self.tokenizer, self.stop)

        def pieces():
            for (id,) in generate(self.model, [request], self.engine):
                yield reply.push(id)
                if reply.stopped:
                    request.finish = "stop"
            yield reply.end()

        return pieces() if self.template is None else trimmed(pieces())

    def make_room(self):
        """Returns the ids to answer. A full context forgets the oldest turns, and that is said."""
        if self.template is None:
            return [self.tokenizer.bos_id, *self.tokenizer.encode(self.messages[-1]["content"])]
        room, forgotten = min(self.max_new_tokens, self.engine.limit // 4), 0
        while True:
            ids, _ = render(
                self.tokenizer, self.messages, self.template, add_generation_prompt=True
            )
            turns = [at for at, message in enumerate(self.messages) if message["role"] == "user"]
            if len(ids) + room <= self.engine.limit or len(turns) == 1:
                break
            del self.messages[turns[0] : turns[1]]
            forgotten += 1
        if forgotten and len(ids) < self.engine.limit:  # else it is refused, and nothing forgotten
            turns = "turn" if forgotten == 1 else f"{forgotten} turns"
            say(f"(the context of {self.engine.limit} tokens is full: forgot the oldest {turns})")
        return ids

    def summary(self, request, seconds):
        count, limit = len(request.ids), self.engine.limit
        cut = f"cut at max_new_tokens={self.max_new_tokens}, "
        ends = {"length": cut, "context": "the context is full, ", "stopped": "stopped, "}
        end = ends.get(request.finish, "")
        used = f"context {len(request.prompt) + count} of {limit}"
        return f"({end}{count} tokens, {count / max(seconds, 1e-9):,.0f} tokens/s, {used})"


def trimmed(pieces):
    """Yields a text in pieces without the white space at its ends."""
    held, begun = "", False
    for piece in pieces:
        text = held + piece if begun else (held + piece).lstrip()
        body = text.rstrip()
        held, begun = text[len(body) :], begun or bool(body)
        if body:
            yield body


def visible(text):
    """Returns what to print of a model's text: to a terminal no control characters but their pictures.

    A model may write any byte, and some would move the cursor, rename the window or worse.
    """
    return text.translate(PICTURES) if sys.stdout.isatty() else text


def say(text):
    print(text, file=sys.stderr, flush=True)


# ---- lines in, commands obeyed


def obey(chat, line):
    """Does what a line says; returns whether the conversation goes on. UserError if it can't be done."""
    command, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if command == "/quit":
        return False
    if command == "/help":
        say(HELP)
    elif command == "/clear":
        chat.clear()
    elif command == "/system" and rest:
        chat.set_system(rest)
    elif command == "/system":
        say(
            next(
                (m["content"] for m in chat.messages if m["role"] == "system"), "no system message"
            )
        )
    elif command == "/retry":
        chat.retry()
    elif command == "/save":
        save(chat.messages, rest)
    elif command.startswith("/") and not command.startswith("//"):
        raise UserError(
            f"{command}: no such command; /help lists them, // begins a question with a /"
        )
    elif command:
        chat.ask(line.replace("//", "/", 1) if command.startswith("//") else line)
    return True


def save(messages, path):
    """Appends a conversation to the JSON Lines file `path`."""
    if not path:
        raise UserError("/save: name a file, as /save chat.jsonl")
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(
            "/save: nothing has been answered yet; without a chat template no answer is kept"
        )
    try:
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except OSError as problem:
        raise UserError(f"/save: {path}: {problem.strerror}; name another file") from None
    say(f"{len(messages)} messages appended to {path}")


def typed():
    """Yields the lines of a person at a terminal; ends with Ctrl-C or Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() editing and the history of this conversation
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            return say("")
        except UnicodeDecodeError as problem:
            say(f"error: that is not UTF-8 ({problem.reason}); set the terminal to UTF-8")


def piped():
    try:
        for line in sys.stdin:
            yield line.removesuffix("\n")
    except UnicodeDecodeError as problem:
        raise UserError(
            f"standard input: not UTF-8 ({problem.reason}); send text as UTF-8"
        ) from None


def converse(chat):
    """Reads lines until there are no more. A mistake, or Ctrl-C, costs a person a line, and ends a pipe."""
    person = sys.stdin.isatty()
    if person:
        say("a conversation; /help lists the commands")
    for line in typed() if person else piped():
        try:
            if not obey(chat, line):
                return
        except (UserError, KeyboardInterrupt) as problem:
            if not person:
                raise
            if isinstance(problem, UserError):
                say(f"error: {problem}")
