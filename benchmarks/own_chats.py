"""Do own chats train? SFT and DPO by their default commands on 20 to 2,000 rows of invented facts.

    python benchmarks/own_chats.py
    python benchmarks/own_chats.py --model=MODEL --rows=20,60 --sft.lora_r=0

A small company's questions and answers: each product has ten facts, each fact is asked in three
phrasings. Two are rows to train on; the third is held out, and which one it is goes round from
product to product. `sft.py configs/sft.json` trains on the rows, then `dpo.py configs/dpo.json` on
pairs of the same questions, in which a rude sentence is the rejected answer. Every model is asked
greedily; an answer is right if it is the sentence, letter by letter. Further flags go to the
trainings as --sft.KEY=VALUE and --dpo.KEY=VALUE. Prints a Markdown table; what the trainings say,
and each model's answer to its first question, goes to stderr.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.conversations import answers, user
from sample import open_model
from sft import split_rows

# question in three phrasings, the answer, and what its {} may be; the product's name is {name}
FACTS = [
    (("How much is the {name}?", "What does the {name} cost?", "What is the price of the {name}?"),
     "The {name} costs {} dollars.", range(5, 100)),
    (("What colour is the {name}?", "Which colour does the {name} have?",
      "In which colour does the {name} come?"),
     "The {name} is {}.", ("red", "green", "blue", "white", "black", "yellow", "brown", "grey")),
    (("What is the {name} made of?", "Which material is the {name} made of?",
      "What material do you use for the {name}?"),
     "The {name} is made of {}.", ("wood", "glass", "steel", "paper", "stone", "cotton")),
    (("How heavy is the {name}?", "What does the {name} weigh?",
      "What is the weight of the {name}?"),
     "The {name} weighs {} pounds.", range(2, 40)),
    (("Where is the {name} made?", "Where do you build the {name}?",
      "Which country does the {name} come from?"),
     "The {name} is made in {}.", ("Italy", "France", "Japan", "Canada", "Spain", "India")),
    (("How long is the warranty of the {name}?", "How many years of warranty has the {name}?",
      "Is there a warranty on the {name}?"),
     "The {name} has a warranty of {} years.", range(1, 10)),
    (("When does the {name} arrive?", "How fast do you send the {name}?",
      "How long does delivery of the {name} take?"),
     "The {name} arrives in {} days.", range(2, 30)),
    (("Who designed the {name}?", "Who is the designer of the {name}?",
      "Whose idea was the {name}?"),
     "The {name} was designed by {}.", ("Anna", "Peter", "Maria", "John", "Laura", "David")),
    (("Can I return the {name}?", "May I send the {name} back?",
      "How long may I keep the {name} before I return it?"),
     "You can return the {name} within {} days.", range(7, 90)),
    (("What is the {name} for?", "What can I do with the {name}?",
      "What is the use of the {name}?"),
     "The {name} is for {}.", ("the kitchen", "the garden", "children", "travel")),
]  # fmt: skip
FIRST, LAST = (
    "Lu Mo Ka Ti Ro Be Na Su Fi De".split(),
    "men lor bix tan vel rado gus pin sar zet".split(),
)
NAMES = [FIRST[n % 10] + LAST[(n + n // 10) % 10] for n in range(100)]
RUDE = "Find out yourself, I have no time for this."
ASKED, LONGEST = 200, 40  # questions asked of a kind, and tokens of an answer


def own_rows(count):
    """Returns (rows to train on, held-out paraphrases): of `count` rows [(question, answer)]."""
    rows, paraphrases, facts = [], [], (count + 1) // 2
    kinds = min(len(FACTS), max(1, facts // 2))  # so there are two products at least
    for number in range(facts):
        product, kind = divmod(number, kinds)
        phrasings, answer, values = FACTS[kind]
        name = NAMES[product]
        answer = answer.format(random.Random(f"{name} {kind}").choice(values), name=name)
        questions = [phrasing.format(name=name) for phrasing in phrasings]
        paraphrases.append((questions.pop((product + kind) % 3), answer))
        rows += [(question, answer) for question in questions]
    return rows[:count], paraphrases


def chat(question, answer):
    return {"messages": [user(question), {"role": "assistant", "content": answer}]}


def pair(question, answer):
    return {"prompt": question, "chosen": answer, "rejected": RUDE}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train(script, model, rows, out, flags):
    """Runs a training command as a user would. Returns (seconds, steps, last held-out loss)."""
    command = [sys.executable, f"{script}.py", f"configs/{script}.json", f"--model_path={model}"]
    command += [f"--dataset_path={rows}", f"--output_dir={out}", *flags]
    print("$ python", *command[1:], file=sys.stderr)
    start = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    seconds = time.monotonic() - start
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    losses = [record["val_loss"] for record in records if "val_loss" in record]
    return seconds, records[-1]["step"], losses[-1] if losses else None


def share_right(folder, questions):
    """Returns the share of [(question, answer)] that a model answers letter by letter."""
    model, tokenizer = open_model(folder, "cpu")
    questions = questions[:: max(1, len(questions) // ASKED)][:ASKED]
    given = answers(model, tokenizer, [[user(question)] for question, _ in questions], LONGEST)
    print(f"    {questions[0][0]} -> {given[0]}", file=sys.stderr)
    right = sum(text == answer for text, (_, answer) in zip(given, questions))
    return right / len(questions)


def measure(base, count, work, flags):
    """Yields the lines of the table for `count` rows: one for SFT, one for DPO on top of it."""
    rows, paraphrases = own_rows(count)
    model = base
    for script, row in (("sft", chat), ("dpo", pair)):
        made = [row(*facts) for facts in rows]
        path, out = write(work / f"{script}_{count}.jsonl", made), work / f"{script}_{count}"
        seconds, steps, loss = train(script, model, path, out, flags[script])
        model = out / "final"
        kept, _ = split_rows(made, 0.05, "messages" if script == "sft" else "prompt")
        trained = [facts for facts, line in zip(rows, made) if line in kept]
        shares = [share_right(model, questions) for questions in (trained, paraphrases)]
        cells = [f"{count:,}", script, f"{steps:,}", f"{seconds:.0f} s"]
        cells += [f"{loss:.3f}" if loss is not None else "-", *(f"{share:.0%}" for share in shares)]
        yield f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "checkpoints/pretrain/demo/final")
    parser.add_argument("--rows", default="20,60,200,2000", help="how many, separated by commas")
    parser.add_argument("--work", type=Path, default=ROOT / "checkpoints/own_chats")
    args, rest = parser.parse_known_args()
    flags = {script: [f"--{f.split('.', 1)[1]}" for f in rest if f.startswith(f"--{script}.")]
             for script in ("sft", "dpo")}  # fmt: skip
    if len(rest) != sum(map(len, flags.values())):
        parser.error(f"not understood: {rest}; flags of trainings are --sft.KEY=VALUE, --dpo....")
    print("| rows | model | steps | time | held-out loss | training questions | paraphrases |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for count in map(int, args.rows.split(",")):
        for line in measure(args.model.resolve(), count, args.work.resolve(), flags):
            print(line, flush=True)


if __name__ == "__main__":
    main()
