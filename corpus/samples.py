"""Small files to try alignment with, made offline: `python data.py create_sample_datasets`.

    sft_train.jsonl  sft_val.jsonl   {"prompt", "response", "check", "kind"}
    dpo_train.jsonl  dpo_val.jsonl   {"prompt", "chosen", "rejected", "check", "kind", "about"}

and conversations made of these rows, with messages in the place of texts.

A program scores an answer to a row by `passes(check, answer)`. No prompt stands in two of the
files, but a task can be put in several ways: the held-out files ask for what was taught, in words
that were not. Everything is a function of the seed and of samples.json, whose "functions" are first
lines of Python 3.11's documentation (copyright 2001-2023 Python Software Foundation, PSF licence).
"""

import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from lib.config import NonNegativeInt, UserError, refusing, write_whole

FILES = ("sft_train", "sft_val", "dpo_train", "dpo_val")
BORDERS = (0, 0.68, 0.76, 0.97, 1)  # between FILES, as shares of each kind of task
MOST = 440  # tasks of one kind
TALK = 80  # messages of one kind of small talk, from each of its tables
# how often a row also stands in a conversation, on average
IN_CONVERSATIONS = {"sft_train": 2, "sft_val": 1, "dpo_train": 0.5, "dpo_val": 0.5}
TABLES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
WORDS = TABLES["words"]


@dataclass(frozen=True)
class SampleFilesConfig:
    """Where the samples go, and which they are."""

    output_dir: str = "data/samples"  # four .jsonl files are written here
    seed: NonNegativeInt = 42  # of the choice and the order of the tasks


def passes(check, answer):
    """Returns whether `answer` is right by `check`, {"kind": ..., "answer": ...}.

    Space around the answer and a last period are free. Kinds: "exact", the very text; "word",
    letter case aside; "number", any text with this number and no other; "overlap", a text with the
    check's `share` of the words of "answer", not twice as long; "regex", a pattern found in the
    first 30 words, letter case aside.
    """
    kind, right = check["kind"], check["answer"]
    given, bare = (text.strip().removesuffix(".").strip("\"'` ") for text in (answer, right))
    if kind == "exact":
        return given == bare
    if kind == "word":
        return given.lower() == bare.lower()
    if kind == "number":
        return re.findall(r"\d+", given) == [right] and not re.search(r"[-.,]\d", given)
    if kind == "regex":
        return bool(re.search(right, " ".join(answer.split()[:30]), re.IGNORECASE | re.DOTALL))
    assert kind == "overlap", f"no such check: {kind}"
    expected, present = (re.findall(r"\w+", text.lower()) for text in (right, given))
    shared = (Counter(expected) & Counter(present)).total()
    return len(present) < 2 * len(expected) and shared >= check["share"] * len(expected)


# ---- tasks: kinds of (values, answer), put as a question by each of TABLES["forms"]


def answer(kind, text, *wrong, **check):
    """Returns (text, its check, texts that come near it but are wrong)."""
    return text, {"kind": kind, "answer": text, **check}, wrong


exact, word = partial(answer, "exact"), partial(answer, "word")


def number(value):
    near = (str(value + step) for step in (1, -1, 2, 10) if value + step >= 0)
    return answer("number", str(value), *near)


def yes_or_no(is_true):
    return word("Yes", "No") if is_true else word("No", "Yes")


def each(items, answer_to):
    """Returns a generator of the tasks (item, answer_to(*item))."""
    tasks = [(item, answer_to(*item)) for item in items]
    return lambda rng: tasks


def has_letter(rng):
    for w in WORDS:
        present = rng.choice(w)
        absent = rng.choice([letter for letter in "aeioustrln" if letter not in w])
        yield from (((present, w), yes_or_no(True)), ((absent, w), yes_or_no(False)))


def word_order(rng):
    forms = "Put these words in alphabetical order", "Sort these words from A to Z"
    for _ in range(MOST):
        words = rng.sample(WORDS, 3)
        right, last_first = sorted(words), sorted(words, reverse=True)
        answer = exact(*map(", ".join, (right, last_first, right[1:])))
        yield (rng.choice(forms), ", ".join(words)), answer


def repeated_words(rng):
    times = {2: "twice", 3: "three times", 4: "four times"}
    for w, (count, name) in product(WORDS, times.items()):
        answer = exact(" ".join([w] * count), " ".join([w] * (count + 1)), w)
        yield (rng.choice(("Say", "Write the word", "Repeat")), w, name), answer


def categories(rng):
    for right, names in TABLES["categories"].items():
        for name in names:
            wrong = rng.choice([other for other in TABLES["categories"] if other != right])
            yield (name, *rng.sample((right, wrong), 2)), word(right, wrong)


def python_functions(rng):
    chosen = rng.sample([*TABLES["functions"].items()], MOST // 3)
    for name, summary in chosen:
        wrong = [other for _, other in rng.sample(chosen, 3)]
        yield (name,), answer("overlap", summary, *wrong, share=0.6)


def define(thing, text):
    others = [other for name, other in TABLES["definitions"].items() if name != thing]
    return answer("overlap", text, *others, share=0.6)


def small_talk(kind):
    """Returns a generator of the tasks (message, answer) of a kind of TABLES["talk"].

    A message is one text of each of several columns, joined; two in three begin with a capital
    letter. Half of them are the shortest that there are, which people type first.
    """
    right = TABLES["talk"][kind]["answer"]
    wrong = [talk["answer"] for other, talk in TABLES["talk"].items() if other != kind]

    def generate(rng):
        for columns in TABLES["talk"][kind]["prompts"]:
            messages = sorted(("".join(texts) for texts in product(*columns)), key=len)
            longer = messages[TALK // 2 :]
            for text in messages[: TALK // 2] + rng.sample(longer, min(len(longer), TALK // 2)):
                text = text[0].upper() + text[1:] if rng.random() < 2 / 3 else text
                yield (text,), word(right, *wrong)

    return generate


ONE_WORD = [(w,) for w in WORDS]
NUMBERS = [
    (question.format(value), value + step)
    for value, (question, step) in product(range(1, 80), TABLES["neighbours"].items())
]
pairs = partial(product, repeat=2)
COMPARED = [(a + b % 3, b + a % 2) for a, b in pairs(range(0, 31, 2))]
TASKS = {  # their order counts
    "addition": each(pairs(range(13)), lambda a, b: number(a + b)),
    "subtraction": each([p for p in pairs(range(19)) if p[0] >= p[1]], lambda a, b: number(a - b)),
    "multiplication": each(pairs(range(11)), lambda a, b: number(a * b)),
    "neighbours": each(NUMBERS, lambda question, value: number(value)),
    "comparison": each(COMPARED, lambda a, b: yes_or_no(a > b)),
    "length": each(ONE_WORD, lambda w: number(len(w))),
    "capitals": each(ONE_WORD, lambda w: exact(w.upper(), w, w.title())),
    "small_letters": each([(w.upper(),) for w in WORDS], lambda w: exact(w.lower(), w, w.title())),
    "backwards": each(ONE_WORD, lambda w: exact(w[::-1], w, w[-1] + w[:-1])),
    "spelling": each(ONE_WORD, lambda w: exact(" ".join(w), w, " ".join(w[:-1]))),
    "first_letter": each(ONE_WORD, lambda w: word(w[0], w[-1], w[1])),
    "last_letter": each(ONE_WORD, lambda w: word(w[-1], w[0], w[-2])),
    "has_letter": has_letter,
    "sorting": word_order,
    "repetition": repeated_words,
    "opposites": each(TABLES["opposites"], lambda given, opposite: word(opposite, given)),
    "plurals": each(TABLES["plurals"], lambda w, many: word(many, w + "es", w + "s", w)),
    "past_tense": each(TABLES["past_tense"], lambda verb, past: word(past, verb + "ed", verb)),
    "categories": categories,
    "one_word": each(TABLES["facts"], lambda question, fact: word(fact)),
    "python_functions": python_functions,
    "definitions": each(TABLES["definitions"].items(), define),
    **{kind: small_talk(kind) for kind in TABLES["talk"]},
}


# ---- rows

FLAWS = {"correctness": 45, "rambling": 25, "rudeness": 18, "evasion": 12}  # per cent of the pairs


def rejected(answer, flaw, others, rng):
    """Returns a text worse than `answer` by `flaw`; `others` are the right texts of other tasks."""
    text, check, wrong = answer
    if flaw == "correctness":
        near = [text for text in wrong if not passes(check, text)]
        return rng.choice(near or [text for text in others if not passes(check, text)])
    if flaw == "rambling" and rng.random() < 0.3:
        return " ".join([text] * rng.randint(3, 6))
    bare = text.removesuffix(".")
    if flaw == "rambling":
        return f"{bare}. {' '.join(rng.sample(TABLES['fillers'], rng.randint(1, 3)))}"
    return rng.choice(TABLES[flaw]).format(bare)


def make_row(name, kind, prompt, answer, others, rng):
    """Returns a row of the file of this name about a task."""
    text, check, _ = answer
    if name.startswith("sft"):
        return {"prompt": prompt, "response": text, "check": check, "kind": kind}
    flaw = rng.choices([*FLAWS], [*FLAWS.values()])[0]
    texts = {"chosen": text, "rejected": rejected(answer, flaw, others, rng)}
    return {"prompt": prompt, **texts, "check": check, "kind": kind, "about": flaw}


def make_rows(seed):
    """Returns {"sft_train": rows, ...} for each of FILES."""
    files, used = {name: [] for name in FILES}, set()
    for kind, generate in TASKS.items():
        rng = random.Random(f"{seed} {kind}")  # one for each, so that no kind depends on another
        tasks = {}
        for values, answer in generate(rng):
            tasks |= {form.format(*values): answer for form in TABLES["forms"].get(kind, ["{}"])}
        tasks = [(prompt, answer) for prompt, answer in tasks.items() if prompt not in used]
        used |= {prompt for prompt, _ in tasks}
        rng.shuffle(tasks)
        tasks = tasks[:MOST]
        others = [text for _, (text, _, _) in tasks]
        borders = [round(len(tasks) * share) for share in BORDERS]
        for name, start, end in zip(FILES, borders, borders[1:], strict=False):
            files[name] += [make_row(name, kind, *task, others, rng) for task in tasks[start:end]]
    for name, rows in files.items():
        rng = random.Random(f"{seed} {name}")
        count = round(len(rows) * IN_CONVERSATIONS[name])
        rows += conversations(rng.sample(rows * 2, count), rng)
        rng.shuffle(rows)
    return files


def conversations(rows, rng):
    """Returns `rows`, in their order, as conversations of one to six questions.

    Four in ten begin with a system message, as do all of one question. The answer that a row is
    about, and is checked, is its last.
    """
    made = []
    while rows:
        size, has_system = rng.randint(1, 6), rng.random() < 0.4
        (*earlier, last), rows = rows[:size], rows[size:]
        turns = []
        if has_system or not earlier:
            columns = rng.choice(TABLES["systems"])
            turns.append(("system", "".join(map(rng.choice, columns)).strip()))
        for row in earlier:
            turns += [("user", row["prompt"]), ("assistant", row.get("response") or row["chosen"])]
        turns.append(("user", last["prompt"]))
        prompt = [{"role": role, "content": text} for role, text in turns]
        sides = {"response", "chosen", "rejected"} & last.keys()
        answers = {side: [{"role": "assistant", "content": last[side]}] for side in sides}
        row = last | {"prompt": prompt} | answers
        if "response" in row:
            row = {"messages": row.pop("prompt") + row.pop("response")} | row
        made.append(row)
    return made


def create_sample_datasets(cfg):
    """Write small files to try alignment with, or find them there; never over other contents.

    python data.py create_sample_datasets [--output_dir=data/samples] [--seed=42]
    """
    folder = Path(cfg.output_dir)
    for name, rows in make_rows(cfg.seed).items():
        path = folder / f"{name}.jsonl"
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        with refusing(OSError, f"{folder}: cannot be written", "name another --output_dir"):
            if not path.exists():
                write_whole(path, content)
            if path.read_bytes() != content:
                remedy = "name another --output_dir, or delete it"
                raise UserError(f"{path}: exists, with other contents; {remedy}")
        print(f"{path}{len(rows):>8,} rows")
