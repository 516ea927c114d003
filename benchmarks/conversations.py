"""Can a chat model hold a conversation? Held-out tasks alone, in mid-conversation, under a system
message; and fifty everyday first messages.

    python benchmarks/conversations.py checkpoints/sft/demo checkpoints/dpo/demo

The tasks are the single rows of data/samples/sft_val.jsonl, none of which was trained on.
Each is asked alone, after one, two and three other held-out tasks with their right answers, and
under the system messages below; a program checks the greedy answer. No answer to an everyday
message may be empty. One JSON line is printed for each model.
"""

import json
import random
import sys
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from corpus.samples import TABLES, passes
from lib.conversation import render, stop_ids
from sample import Request, Sampling, generate, open_model

SYSTEM = [
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer as briefly as possible.",
    "You are mini, a friendly chatbot.",
    "Answer the user's questions truthfully.",
    "You are a knowledgeable teacher who gives short answers.",
]
EVERYDAY = """
Hello|Hey|Hi there|Hi!|hello|Good morning!|Good evening|Hey, how are you?|How are you?|What's up?
Thanks|Thank you!|Thanks a lot!|Bye|See you tomorrow!|Who are you?|What is your name?|Help
What can you do?|Can you help me?|I need some help|test|Testing 1 2 3|Tell me a joke|yes
Tell me a story.|Write a poem about spring.|Sing me a song|What is the weather today?|ok
What time is it?|What day is today?|Where are you from?|How old are you?|Are you a robot?
Are you human?|Who made you?|What is machine learning?|What is AI?|Explain quantum mechanics.
What is the capital of France?|Who was Albert Einstein?|How do I cook pasta?|I am bored.
Why is the sky blue?|I feel sad today|You are great!|That is wrong.|Do you speak German?
What is the meaning of life?
"""
OURS = {  # the questions that README, page and `make demo` ask, with a part of the right answer
    "What is the plural of tree?": "trees",
    "What is machine learning?": "learn",
    "What can you do?": "tasks",
    "What is the opposite of hot?": "cold",
    "Write lamp in capital letters.": "LAMP",
}


def user(text):
    return {"role": "user", "content": text}


def answers(model, tokenizer, chats, longest=32):
    """Returns the greedy answers to conversations that end with a question, as texts."""
    ends, texts = stop_ids(tokenizer, tokenizer.template), []
    for start in range(0, len(chats), 32):
        requests = []
        for chat in chats[start : start + 32]:
            ids, _ = render(tokenizer, chat, tokenizer.template, add_generation_prompt=True)
            requests.append(Request(ids, longest, Sampling(temperature=0), ends))
        for _ in generate(model, requests):
            pass
        texts += [tokenizer.decode(request.ids).strip() for request in requests]
    return texts


def exchange(row):
    return [user(row["prompt"]), {"role": "assistant", "content": row["response"]}]


def contexts(rows):
    """Returns {name: [messages that stand before each of the rows]}."""
    rng, before = random.Random(0), {"alone": [[] for _ in rows]}
    for turns in (1, 2, 3):
        earlier = ([r for r in rng.sample(rows, turns + 1) if r is not row][:turns] for row in rows)
        before[f"after {turns}"] = [[*chain(*map(exchange, turns))] for turns in earlier]
    system = (SYSTEM[number % len(SYSTEM)] for number in range(len(rows)))
    return before | {"system": [[{"role": "system", "content": text}] for text in system]}


def report(folder, rows):
    model, tokenizer = open_model(folder, "cpu")
    is_talk = lambda row: row["kind"] in TABLES["talk"]
    tasks = [row for row in rows if not is_talk(row)]

    def right(rows, before):
        chats = [chat + [user(row["prompt"])] for chat, row in zip(before, rows)]
        texts = answers(model, tokenizer, chats)
        share = sum(passes(row["check"], text) for row, text in zip(rows, texts)) / len(rows)
        return {"right": round(share, 4), "empty": texts.count("")}

    line = {"model": folder, "tasks": len(tasks)}
    line |= {name: right(tasks, before) for name, before in contexts(tasks).items()}
    talk = [row for row in rows if is_talk(row)]
    line["small talk"] = right(talk, [[]] * len(talk))
    messages = [*EVERYDAY.strip().replace("\n", "|").split("|"), *OURS]
    texts = dict(zip(messages, answers(model, tokenizer, [[user(text)] for text in messages])))
    line["everyday empty"] = [message for message, text in texts.items() if not text]
    line["ours wrong"] = [message for message, part in OURS.items() if part not in texts[message]]
    print(json.dumps(line | {"answers": texts}, ensure_ascii=False), flush=True)


def main(folders):
    lines = (ROOT / "data/samples/sft_val.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "prompt" in row]
    for folder in folders:
        report(folder, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
