"""Small files to try alignment with, made offline: `python data.py create_sample_datasets`.

    sft_train.jsonl  sft_val.jsonl   {"prompt", "response", "check", "kind"}
    dpo_train.jsonl  dpo_val.jsonl   {"prompt", "chosen", "rejected", "check", "kind", "about"}

A program scores an answer to a row by `passes(check, answer)`. No prompt stands in two of the
files, but a task can be put in several ways: the held-out files ask for what was taught, in words
that were not. Everything is a function of the seed and of this Python's own documentation.
"""

import ast
import importlib
import json
import random
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from operator import add, mul, sub
from pathlib import Path
from typing import NamedTuple

from corpus.sources import docstrings
from lib.config import NonNegativeInt, UserError, write_whole

FILES = ("sft_train", "sft_val", "dpo_train", "dpo_val")
SHARES = (0.68, 0.08, 0.21, 0.03)  # of each kind of task, over FILES
MOST = 440  # tasks of one kind


@dataclass(frozen=True)
class SampleFilesConfig:
    """Where the samples go, and which they are."""

    output_dir: str = "data/samples"  # four .jsonl files are written here
    seed: NonNegativeInt = 42  # of the choice and the order of the tasks


def passes(check, answer):
    """Returns whether `answer` is right by `check`, {"kind": ..., "answer": ...}.

    Space around the answer and a last period are free. Kinds: "exact", the very text; "word",
    letter case aside; "number", any text with this number and no other; "overlap", a text with the
    check's `share` of the words of "answer", not twice as long.
    """
    kind, right = check["kind"], check["answer"]
    given = answer.strip().removesuffix(".").strip("\"'` ")
    if kind == "exact":
        return given == right
    if kind == "word":
        return given.lower() == right.lower()
    if kind == "number":
        return re.findall(r"\d+", given) == [right] and not re.search(r"[-.,]\d", given)
    assert kind == "overlap", f"no such check: {kind}"
    expected, present = (re.findall(r"\w+", text.lower()) for text in (right, given))
    shared = (Counter(expected) & Counter(present)).total()
    return len(present) < 2 * len(expected) and shared >= check["share"] * len(expected)


class Answer(NamedTuple):
    """The answer to a task, its check, and texts that come near it but are wrong."""

    text: str
    check: dict
    wrong: list


def answer(kind, text, *wrong):
    return Answer(text, {"kind": kind, "answer": text}, list(wrong))


exact, word = partial(answer, "exact"), partial(answer, "word")


def number(value):
    near = [str(value + step) for step in (1, -1, 2, 10) if value + step >= 0]
    return answer("number", str(value), *near)


# Kinds of tasks are generators of (values, Answer); TABLES["forms"] has their questions.
TABLES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
WORDS = TABLES["words"]


def word_task(answer_to, change=str):
    """Returns a generator of a task about change(w) for each w of WORDS."""
    return lambda rng: (((change(w),), answer_to(w)) for w in WORDS)


def sum_task(calculate, numbers):
    """Returns a generator of a task about calculate(a, b) for all numbers where it is not < 0."""
    pairs = [pair for pair in product(numbers, repeat=2) if calculate(*pair) >= 0]
    return lambda rng: ((pair, number(calculate(*pair))) for pair in pairs)


def table_task(name, answer_to):
    """Returns a generator of a task about each (given, right) of a table."""
    return lambda rng: (((given,), answer_to(given, right)) for given, right in TABLES[name])


def neighbours(rng):
    for value, (question, step) in product(range(1, 80), TABLES["neighbours"].items()):
        yield (question.format(value),), number(value + step)


def comparison(rng):
    for a, b in product(range(0, 31, 2), repeat=2):
        a, b = a + b % 3, b + a % 2
        yield (a, b), word(*(("Yes", "No") if a > b else ("No", "Yes")))


def has_letter(rng):
    for w in WORDS:
        present = rng.choice(w)
        absent = rng.choice([letter for letter in "aeioustrln" if letter not in w])
        yield from (((present, w), word("Yes", "No")), ((absent, w), word("No", "Yes")))


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
    functions = sorted(summaries().items())
    chosen = rng.sample(functions, min(len(functions), MOST // 3))
    for name, summary in chosen:
        check = {"kind": "overlap", "answer": summary, "share": 0.6}
        wrong = [other for _, other in rng.sample(chosen, min(3, len(chosen)))]
        yield (name,), Answer(summary, check, wrong)


TASKS = {  # their order counts
    "addition": sum_task(add, range(13)),
    "subtraction": sum_task(sub, range(19)),
    "multiplication": sum_task(mul, range(11)),
    "neighbours": neighbours,
    "comparison": comparison,
    "length": word_task(lambda w: number(len(w))),
    "capitals": word_task(lambda w: exact(w.upper(), w, w.title())),
    "small_letters": word_task(lambda w: exact(w, w.upper(), w.title()), str.upper),
    "backwards": word_task(lambda w: exact(w[::-1], w, w[-1] + w[:-1])),
    "spelling": word_task(lambda w: exact(" ".join(w), w, " ".join(w[:-1]))),
    "first_letter": word_task(lambda w: word(w[0], w[-1], w[1])),
    "last_letter": word_task(lambda w: word(w[-1], w[0], w[-2])),
    "has_letter": has_letter,
    "sorting": word_order,
    "repetition": repeated_words,
    "opposites": table_task("opposites", lambda given, opposite: word(opposite, given)),
    "plurals": table_task("plurals", lambda w, many: word(many, w + "es", w + "s", w)),
    "past_tense": table_task("past_tense", lambda verb, past: word(past, verb + "ed", verb)),
    "categories": categories,
    "one_word": table_task("facts", lambda question, fact: word(fact)),
    "python_functions": python_functions,
}


BUILTINS = (str, list, dict, set, tuple, bytes, int, float)
COMPILED = ("math", "itertools", "operator", "time")  # modules without source text
SUMMARY = re.compile(r"[A-Z][a-z]+( [A-Za-z0-9'(),/-]+){2,14}\.")  # one plain line


@cache
def summaries():
    """Returns {name: the first line of its documentation} of Python's public functions."""
    lines = {}
    for name, text in documentation():
        summary = text.strip().split("\n\n")[0]
        if SUMMARY.fullmatch(summary) and "_" not in (name[0], name.rpartition(".")[2][0]):
            lines[name] = summary
    return lines


def documentation():
    """Yields (name, documentation) of functions and methods of built-in types and some modules."""
    for owner in (*BUILTINS, *map(importlib.import_module, COMPILED)):
        for name, value in vars(owner).items():
            if callable(value) or isinstance(value, classmethod | staticmethod):
                yield f"{owner.__name__}.{name}", value.__doc__ or ""
    stdlib = Path(sysconfig.get_path("stdlib"))
    for module in TABLES["modules"]:
        paths = stdlib / module / "__init__.py", stdlib / f"{module}.py"
        # else it is not in this version of Python, or compiled
        for path in filter(Path.is_file, paths):
            tree = ast.parse(path.read_bytes())
            classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_"]
            for node in [tree, *classes]:
                title = module if node is tree else f"{module}.{node.name}"
                texts = (text.partition("\n\n") for text in docstrings(node, "", f"{title}."))
                yield from ((name, text) for name, _, text in texts if name)


FLAWS = {"correctness": 45, "rambling": 25, "rudeness": 18, "evasion": 12}  # per cent of the pairs


def rejected(answer, flaw, others, rng):
    """Returns a text worse than `answer` by `flaw`; `others` are the answers to other tasks."""
    bare = answer.text.removesuffix(".")
    if flaw == "correctness":
        near = [text for text in answer.wrong if not passes(answer.check, text)]
        return rng.choice(near or [text for text in others if not passes(answer.check, text)])
    if flaw == "rambling" and rng.random() < 0.3:
        return " ".join([answer.text] * rng.randint(3, 6))
    if flaw == "rambling":
        return f"{bare}. {' '.join(rng.sample(TABLES['fillers'], rng.randint(1, 3)))}"
    return rng.choice(TABLES[flaw]).format(bare)


def create_sample_datasets(cfg):
    """Write small files to try alignment with, or find them there; never over other contents.

    python data.py create_sample_datasets [--output_dir=data/samples] [--seed=42]
    """
    folder = Path(cfg.output_dir)
    try:
        for name, rows in make_rows(cfg.seed).items():
            write_sample(folder / f"{name}.jsonl", rows)
    except OSError as error:
        reason = f"cannot be written ({error.strerror}); name another --output_dir"
        raise UserError(f"{folder}: {reason}") from None


def write_sample(path, rows):
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    present = path.exists()
    if not present:
        write_whole(path, content)
    elif path.read_bytes() != content:
        remedy = "name another --output_dir, or delete it"
        raise UserError(f"{path}: exists, with other contents; {remedy}")
    print(f"{path}{len(rows):>8,} rows{'  (was there)' if present else ''}")


def make_rows(seed):
    """Returns {"sft_train": rows, ...} for each of FILES."""
    files, used = {name: [] for name in FILES}, set()
    for kind, generate in TASKS.items():
        rng = random.Random(f"{seed} {kind}")  # one for each, so that no kind depends on another
        tasks = {}
        for values, answer in generate(rng):
            tasks |= {form.format(*values): answer for form in TABLES["forms"][kind]}
        tasks = [(prompt, answer) for prompt, answer in tasks.items() if prompt not in used]
        used |= {prompt for prompt, _ in tasks}
        rng.shuffle(tasks)
        tasks = tasks[:MOST]
        others, start = [answer.text for _, answer in tasks], 0
        for number, name in enumerate(FILES, start=1):
            end = round(len(tasks) * sum(SHARES[:number]))
            make = sft_row if name.startswith("sft") else dpo_row
            files[name] += [make(kind, *task, others, rng) for task in tasks[start:end]]
            start = end
    for name, rows in files.items():
        random.Random(f"{seed} {name}").shuffle(rows)
    return files


def sft_row(kind, prompt, answer, others, rng):
    return {"prompt": prompt, "response": answer.text, "check": answer.check, "kind": kind}


def dpo_row(kind, prompt, answer, others, rng):
    flaw = rng.choices([*FLAWS], [*FLAWS.values()])[0]
    texts = {"chosen": answer.text, "rejected": rejected(answer, flaw, others, rng)}
    return {"prompt": prompt, **texts, "check": answer.check, "kind": kind, "about": flaw}
