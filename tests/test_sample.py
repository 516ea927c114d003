"""sample.py: what is asked in the terminal is answered there, and a mistake is one line."""

import subprocess
from dataclasses import replace

import pytest

import sample
from lib.config import UserError, configure
from model import save_model
from sample import SampleConfig, Sampling, open_model
from tests import ROOT
from tests.test_engine import BASE, GREEDY, answer, build
from tests.warm import python


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    path = tmp_path_factory.mktemp("model")
    save_model(build(), path)
    tiny_tokenizer.save(path, BASE.sequence_length)
    return path


ASK = [
    "--prompt=Why?  the  dog",
    "--max_new_tokens=8",
    "--temperature=1.5",
    "--top_k=0",
    "--seed=5",
]
COMMANDS = {
    "one": ASK,
    "two": [*ASK, "--num_samples=2"],
    "no folder": ["--model_path=nowhere"],
    "top_p": ["--top_p=0"],
    "temperature": ["--temperature=-1"],
    "long": ["--prompt=" + "9" * 60],
}


@pytest.fixture(scope="module")
def runs(folder):
    """{name: (exit status, stdout, stderr)} of COMMANDS, run side by side: most of it is importing torch."""
    begin = [python(), str(ROOT / "sample.py")]
    started = {}
    for name, words in COMMANDS.items():
        path = [] if name == "no folder" else [f"--model_path={folder}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started[name] = subprocess.Popen(
            [*begin, *path, *words], text=True, encoding="utf-8", **pipes
        )
    results = {name: process.communicate(timeout=120) for name, process in started.items()}
    return {name: (started[name].returncode, *texts) for name, texts in results.items()}


def expected_text(folder, tokenizer, seed):
    prompt = [tokenizer.bos_id, *tokenizer.encode("Why?  the  dog")]
    sampling = Sampling(temperature=1.5, top_k=0, seed=seed)
    return tokenizer.decode(
        answer(open_model(folder)[0], prompt, sampling, 8, stop_ids={tokenizer.eos_id})
    )


def test_the_response_is_all_that_is_printed(runs, folder, tiny_tokenizer):
    status, out, err = runs["one"]
    assert (status, out) == (0, expected_text(folder, tiny_tokenizer, 5) + "\n")
    assert "seed 5" in err
    assert "tokens/s" in err


def test_two_samples_are_printed_in_order(runs, folder, tiny_tokenizer):
    first, second = (expected_text(folder, tiny_tokenizer, seed) for seed in (5, 6))
    assert first != second
    assert runs["two"][:2] == (0, f"--- sample 1 ---\n{first}\n--- sample 2 ---\n{second}\n")


def test_an_empty_prompt_begins_a_document(folder, tiny_tokenizer, capsys):
    sample.main(
        configure(SampleConfig, [f"--model_path={folder}", "--max_new_tokens=3", "--temperature=0"])
    )
    ids = answer(open_model(folder)[0], [1], GREEDY, 3, stop_ids={tiny_tokenizer.eos_id})
    assert capsys.readouterr().out == tiny_tokenizer.decode(ids) + "\n"


def test_a_stop_text_ends_the_sample(folder, tiny_tokenizer, capsys):
    text = expected_text(folder, tiny_tokenizer, 5)
    sample.main(
        configure(SampleConfig, [f"--model_path={folder}", *ASK, f"--stop=never seen,{text[2:4]}"])
    )
    assert capsys.readouterr().out == text[: text.index(text[2:4])] + "\n"


def test_an_empty_stop_text_is_refused():
    with pytest.raises(UserError, match=r"stop.*empty"):
        configure(SampleConfig, ["--model_path=x", "--stop=a,,b"])


def test_a_prompt_that_is_no_unicode_is_refused_by_name(folder):
    with pytest.raises(UserError, match=r"^prompt: not Unicode text.*write it as UTF-8"):
        sample.main(SampleConfig(model_path=str(folder), prompt="\udcff"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no folder", ["nowhere: no such folder"]),
        ("top_p", ["top_p", "> 0", "got 0"]),
        ("temperature", ["temperature", "0..100", "got -1"]),
        ("long", ["61 tokens", "48"]),
    ],
)
def test_mistakes_are_one_line(runs, name, words):
    status, out, err = runs[name]
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ")
    assert all(word in err for word in words), err


def test_a_foreign_tokenizer_is_refused(folder, tmp_path, tiny_tokenizer):
    save_model(build(replace(BASE, vocab_size=400)), tmp_path)
    tiny_tokenizer.save(tmp_path, 48)
    with pytest.raises(UserError, match=r"400 tokens.* 384"):
        open_model(tmp_path)


def test_compile_wants_cuda(folder):
    with pytest.raises(UserError, match="CUDA"):
        sample.main(SampleConfig(model_path=str(folder), compile=True, device="cpu"))
