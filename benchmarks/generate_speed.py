"""Generation on a CPU: ours against transformers.generate and, where installed, ctranslate2.

    python benchmarks/generate_speed.py   tiny and small; 1, 8 and 16 streams
    python benchmarks/generate_speed.py --sizes=FOLDER --gguf=FILE   a real model, and llama.cpp
    python benchmarks/generate_speed.py --sizes=tiny --streams=1 --rounds=9
    python benchmarks/generate_speed.py --items=first   a command's start to its first token

Weights are random, a preset's shape, the same for all. `speed`: each program is a process of its
own, for how OpenMP's threads wait is settled when a process starts; they take turns, in reverse
order every second round. A turn is `streams` greedy answers of --tokens tokens to different prompts
of --prompt, prefill included, in one batch. transformers runs as it is, and with the thread policy
that sample.py sets (`_same`). A figure is the median over rounds of tokens per second. `first`
times whole commands: sample.py, and a transformers program that prints as much. One JSON line is
printed.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from server_load import random_model

POLICY = {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "10000"}  # as sample.py sets it
PROGRAMS = {"ours_fp32": {}, "ours_int8": {}, "transformers": {}, "transformers_same": POLICY}
if importlib.util.find_spec("ctranslate2"):
    PROGRAMS |= {"ctranslate2_fp32": POLICY, "ctranslate2_int8": POLICY}
ONE_LINER = """
from transformers import pipeline
print(pipeline("text-generation", model={folder!r})("why", max_new_tokens=1)[0]["generated_text"])
"""


# ---- the programs: each returns a function from prompts and a number to that many new ids for each


def ours(folder, dtype):
    from sample import Request, Sampling, generate, open_model

    model, _ = open_model(folder, "cpu", dtype)

    def answer(prompts, count):
        rows = [Request(prompt, count, Sampling(temperature=0)) for prompt in prompts]
        for _ in generate(model, rows):
            pass
        return [row.ids for row in rows]

    return answer


def transformers(folder):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = None  # every answer has its full length

    def answer(prompts, count):
        ids = torch.tensor(prompts)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
        )
        return out[:, ids.shape[1] :].tolist()

    return answer


def ctranslate2(folder, dtype):
    import ctranslate2 as ct2

    place = f"{folder}-ct2-{dtype}"
    ct2.converters.TransformersConverter(folder).convert(place, quantization=dtype, force=True)
    model = ct2.Generator(place, compute_type=dtype, intra_threads=os.cpu_count(), inter_threads=1)
    pieces = json.loads((Path(place) / "vocabulary.json").read_text(encoding="utf-8"))

    def answer(prompts, count):
        out = model.generate_batch(
            [[pieces[id] for id in prompt] for prompt in prompts],
            max_batch_size=len(prompts),
            sampling_topk=1,
            min_length=count,
            max_length=count,
            include_prompt_in_result=False,
        )
        return [row.sequences_ids[0] for row in out]

    return answer


def llama(folder, kind):
    """llama.cpp's server, on a GGUF file instead of the folder."""
    import urllib.request
    from concurrent.futures import ThreadPoolExecutor

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = folder, 8192, 16
    params.cpuparams.n_threads = os.cpu_count()
    server = xllamacpp.Server(params)

    def one(prompt, count):
        body = {"prompt": prompt, "n_predict": count, "temperature": 0, "ignore_eos": True}
        body |= {"cache_prompt": False, "return_tokens": True}
        kind = {"Content-Type": "application/json"}
        url = server.listening_address + "/completion"
        request = urllib.request.Request(url, json.dumps(body).encode(), kind)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["tokens"]

    def answer(prompts, count):
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(one, prompts, [count] * len(prompts)))

    return answer


def work(program, folder):
    """The child: says "ready", then answers each line {prompts, count} with {seconds, ids}."""
    name, _, kind = program.partition("_")
    makers = {"ours": ours, "ctranslate2": ctranslate2, "llama": llama}
    kind = {"ctranslate2fp32": "float32"}.get(name + kind, kind)
    answer = makers[name](folder, kind) if name in makers else transformers(folder)
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        ids = answer(**json.loads(line))
        print(json.dumps({"seconds": time.perf_counter() - began, "ids": ids}), flush=True)


class Child:
    """A program as a process that waits for its turn."""

    def __init__(self, program, folder):
        words = [sys.executable, __file__, f"--program={program}", f"--folder={folder}"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(
            words, text=True, env=os.environ | PROGRAMS.get(program, {}), **pipes
        )
        self.ready = False

    def turn(self, prompts, count):
        """Returns {seconds, ids} of one batch; waits first until no thread spins any more."""
        while not self.ready:
            line = self.process.stdout.readline()
            assert line, f"{self.process.args} ended before its turn"
            self.ready = line == "ready\n"
        time.sleep(0.2)
        self.process.stdin.write(json.dumps({"prompts": prompts, "count": count}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


# ---- what is measured


def speed(folder, streams, args):
    """Returns {program: tokens per second as [median, min, max], share of ids that are
    transformers'}.
    """
    prompts = [
        [1] + [10 + (7919 * row + 31 * i) % 4000 for i in range(1, args.prompt)]
        for row in range(streams)
    ]
    places = dict.fromkeys(PROGRAMS, folder) | ({"llama_cpp": args.gguf} if args.gguf else {})
    children = {program: Child(program, place) for program, place in places.items()}
    rates, ids = {program: [] for program in children}, {}
    for number in range(args.rounds + 1):  # the first warms up
        for program in list(children)[:: 1 if number % 2 else -1]:
            done = children[program].turn(prompts, args.tokens)
            rates[program].append(streams * args.tokens / done["seconds"])
            ids[program] = [id for row in done["ids"] for id in row]
    for child in children.values():
        child.process.stdin.close()
        child.process.wait()
    result = {}
    for program, values in rates.items():
        same = sum(a == b for a, b in zip(ids[program], ids["transformers"], strict=True)) / len(
            ids[program]
        )
        figures = [round(f(values[1:]), 1) for f in (statistics.median, min, max)]
        result[program] = {"tokens/s": figures, "same ids": round(same, 3)}
    return result


def first(folder, args):
    """Returns {program: [median, min, max seconds]} of commands that print one token."""
    commands = {
        "ours": [
            str(ROOT / "sample.py"),
            f"--model_path={folder}",
            "--prompt=why",
            "--max_new_tokens=1",
        ],
        "transformers": ["-c", ONE_LINER.format(folder=folder)],
    }
    seconds = {name: [] for name in commands}
    for number in range(args.rounds + 1):
        for name in list(commands)[:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            subprocess.run([sys.executable, *commands[name]], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - began)
    return {
        name: [round(f(values[1:]), 2) for f in (statistics.median, min, max)]
        for name, values in seconds.items()
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", default="speed,first")
    parser.add_argument("--sizes", default="tiny,small", help="presets, or folders of models")
    parser.add_argument("--gguf", help="a GGUF file of the same model for llama.cpp")
    parser.add_argument("--streams", default="1,8,16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--program", help=argparse.SUPPRESS)  # the child's side
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.program:
        return work(args.program, args.folder)
    items, result = args.items.split(","), {}
    with tempfile.TemporaryDirectory() as place:
        for size in args.sizes.split(","):
            folder = size
            if not Path(size).is_dir():
                folder = str(random_model(Path(place) / size, ROOT / f"configs/{size}.json"))
            for streams in map(int, args.streams.split(",")) if "speed" in items else ():
                result[f"{size}, {streams} streams"] = speed(folder, streams, args)
            if "first" in items:
                result[f"{size}, first token, seconds"] = first(folder, args)
    settings = {"prompt": args.prompt, "tokens": args.tokens, "rounds": args.rounds}
    print(
        json.dumps(result | settings | {"machine": platform.processor(), "cores": os.cpu_count()})
    )


if __name__ == "__main__":
    main()
