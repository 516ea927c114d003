"""Tokenizers of other models: ids, texts and first ids as transformers has them."""

import json
import math
import random
import shutil
import unicodedata
from pydoc_data.topics import topics

import pytest
import torch

from eval import EvalConfig, answer_scores, encode_questions, prepare_text
from lib.config import UserError
from lib.conversation import render
from lib.tokenizer import Tokenizer
from sample import open_model
from tests.conftest import ask, llama_cpp
from tests.test_eval import ask_lm
from tests.test_export import export
from tests.test_tokenizer import FRAGMENTS, hugging_face, streamed

gguf = pytest.importorskip("gguf")
library = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
normalizers, pre_tokenizers = library.normalizers, library.pre_tokenizers
decoders, processors = library.decoders, library.processors
BOS, EOS, THINK = "<|begin|>", "<|end|>", "<think>"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3, QWEN2 = (CONTRACTIONS + WORDS % digits for digits in (r"\p{N}{1,3}", r"\p{N}"))


def split(regex):
    by_regex = pre_tokenizers.Split(library.Regex(regex), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([by_regex, byte_level])


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
PREFIXED = pre_tokenizers.ByteLevel(add_prefix_space=True)
SMOLLM = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
TO_SPACE = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
LLAMA2 = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
NFKC = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(library.Regex(" {2,}"), " ")])
ALWAYS, FIRST, NEVER = (
    {"prepend_scheme": scheme, "split": split}
    for scheme, split in (("always", True), ("first", False), ("never", True))
)
template = processors.TemplateProcessing
opened = template(f"{BOS} $A", f"{BOS} $A {BOS} $B", [(BOS, 1)])
closed = template(f"$A {EOS}", f"$A $B {EOS}", [(EOS, 2)])
stripped = decoders.Sequence([*TO_SPACE, decoders.Strip(" ", 1, 0)])
bytes_of, meta, pieces = decoders.ByteLevel(), pre_tokenizers.Metaspace, decoders.Metaspace
# {name: (model, normalizer, pre_tokenizer, decoder, post_processor)}
KINDS = {
    "gpt2": ("BPE", None, GPT2, bytes_of, None),
    "gpt2 with a space": ("BPE", None, PREFIXED, bytes_of, processors.ByteLevel()),
    "smollm": ("BPE", None, SMOLLM, bytes_of, None),
    "llama3": ("BPE", None, split(LLAMA3), bytes_of, opened),
    "dbrx": ("BPE", None, split(LLAMA3), bytes_of, opened),
    "qwen2": ("BPE", normalizers.NFC(), split(QWEN2), bytes_of, None),
    "llama2": ("bytes", normalizers.Sequence(LLAMA2), None, stripped, opened),
    "gemma": ("bytes", LLAMA2[1], None, decoders.Sequence(TO_SPACE), opened),
    "mistral": ("bytes", None, meta(**FIRST), stripped, opened),
    "unigram": ("Unigram", NFKC, meta(**ALWAYS), pieces(**ALWAYS), closed),
    "unigram without a space": ("Unigram", None, meta(**NEVER), pieces(**NEVER), None),
}
TEXTS = [text[:3_000] for _, text in sorted(topics.items())][:60]
SPECIAL = ["<unk>", BOS, EOS]


def train(kind, normalizer, pre_tokenizer):
    """Returns a trained `tokenizers.Tokenizer` without a decoder."""
    quiet = {"special_tokens": SPECIAL, "show_progress": False}
    if kind == "Unigram":
        tokenizer = library.Tokenizer(library.models.Unigram())
        trainer = library.trainers.UnigramTrainer(vocab_size=500, unk_token="<unk>", **quiet)
    else:
        tokenizer = library.Tokenizer(library.models.BPE())
        alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "BPE" else []
        quiet["initial_alphabet"] = alphabet
        trainer = library.trainers.BpeTrainer(vocab_size=700, limit_alphabet=400, **quiet)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(TEXTS, trainer)
    if kind != "bytes":
        return tokenizer
    spec = json.loads(tokenizer.to_str())
    vocab, settings = spec["model"]["vocab"], {"byte_fallback": True, "fuse_unk": True}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    spec["model"] |= settings | {"unk_token": "<unk>"}
    tokenizer = library.Tokenizer.from_str(json.dumps(spec))
    tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    """A folder as transformers saves it, with special tokens and a word of its own."""
    kind, normalizer, pre_tokenizer, decoder, post_processor = KINDS[request.param]
    tokenizer = train(kind, normalizer, pre_tokenizer)
    tokenizer.decoder, tokenizer.post_processor = decoder, post_processor
    if request.param == "llama3":
        tokenizer.model.ignore_merges = True
    tokenizer.add_tokens([library.AddedToken(THINK, special=False)])
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    roles = {"eos_token": EOS, "unk_token": "<unk>"}
    if request.param != "qwen2":
        roles["bos_token"] = BOS
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def both(folder):
    return Tokenizer.load(folder), hugging_face(folder)


def assert_same(both, text):
    """Ids and text are those of transformers; no text makes a special token."""
    tokenizer, other = both
    ids, symbols = tokenizer.encode(text), other.convert_tokens_to_ids(SPECIAL[1:])
    theirs = other.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert not set(ids) & set(symbols)
    if isinstance(other.backend_tokenizer.model, library.models.Unigram):  # there they are pieces
        theirs = ids if any(name in text for name in SPECIAL) else theirs
    assert ids == theirs
    shown = other.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert tokenizer.decode(ids) == streamed(tokenizer, ids) == shown


HOSTILE = [*FRAGMENTS, BOS, EOS, THINK, "It's", "WE'LL", "12345", "a_b", "\u0660\u0661", "\u00bd"]
HOSTILE += ["e\u0301", "\ufb01", "\u0000", "\ud7a3", "\u200d", "\x85", "\x1c", "...!?\n", "\r\r\n "]


def test_a_conversation_in_our_template_begins_as_a_text_does(folder, tmp_path):
    tokenizer, chat = Tokenizer.load(folder), [{"role": "user", "content": "Hi"}]
    ids, _ = render(tokenizer, chat, "instruct", add_generation_prompt=True)
    assert ids[: len(tokenizer.opening) + 1].count(tokenizer.bos_id) == len(tokenizer.opening)
    tokenizer.save(tmp_path, 64, "instruct")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text.startswith(BOS) == bool(tokenizer.opening)


def test_ids_and_texts_are_those_of_transformers(both):
    """Of documents, and of texts that look for trouble."""
    rng = random.Random(0)
    texts = ["".join(rng.choices(HOSTILE, k=rng.randint(1, 12))) for _ in range(500)]
    for text in ["", " ", "a", " a", *TEXTS, *texts]:
        assert_same(both, text)


def test_text_after_a_control_token_is_as_in_one(both):
    """A special token splits a text; what stands on its sides is encoded as transformers does."""
    tokenizer, other = both
    rng, end = random.Random(1), tokenizer.eos_id
    for _ in range(300):
        first, second = ("".join(rng.choices(TEXTS[0].split(" ") + [" "], k=4)) for _ in "ab")
        ids = [*tokenizer.encode(first), end]
        ids += tokenizer.encode_spans(second, begins=False)[0]
        assert ids == other.encode(f"{first}{EOS}{second}", add_special_tokens=False)


def test_a_prompt_begins_as_in_transformers(folder, tmp_path):
    """By the post_processor alone; also after we saved the folder. No EOS stands behind it."""
    other = hugging_face(folder)
    ids = [id for id in other.encode("The capital") if id != other.eos_token_id]
    Tokenizer.load(folder).save(tmp_path, 512)
    assert hugging_face(tmp_path).encode("The capital") == other.encode("The capital")
    assert hugging_face(tmp_path).bos_token == other.bos_token
    for path in (folder, tmp_path):
        tokenizer = Tokenizer.load(path)
        assert tokenizer.prompt_ids("The capital") == ids
        assert tokenizer.bos_id == other.bos_token_id
        if other.bos_token:
            assert tokenizer.prompt_ids("") == [other.bos_token_id]
        else:
            with pytest.raises(UserError, match="prompt is empty, and this tokenizer has no BOS"):
                tokenizer.prompt_ids("")


@pytest.mark.parametrize(
    ("kind", "decoder"),
    [("WordLevel", None), ("WordPiece", decoders.WordPiece()), ("BPE", decoders.BPEDecoder())],
)
def test_other_kinds_are_refused_by_name(kind, decoder, tmp_path):
    tokenizer = library.Tokenizer(getattr(library.models, kind)())
    tokenizer.add_special_tokens(SPECIAL)
    if decoder:
        tokenizer.decoder = decoder
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=f"its model is {kind}, .*reads byte-level BPE, and Sent"):
        Tokenizer.load(tmp_path)


@pytest.fixture
def place(folder, tmp_path, request):
    """The folder with a small model in it, of several families."""
    kind = request.node.callspec.params["folder"]
    family = {"qwen2": "Qwen2", "dbrx": "Qwen3", "mistral": "Mistral"}.get(kind, "Llama")
    place = shutil.copytree(folder, tmp_path / "model")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}
    torch.manual_seed(0)
    sizes |= {"num_key_value_heads": 1, "sliding_window": None}
    sizes |= {"head_dim": 32} if family == "Qwen3" else {}
    sizes["vocab_size"] = len(hugging_face(folder)) + 3
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for p in model.parameters():  # biases and norms too
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(place)
    return place


def of(*kinds):
    return pytest.mark.parametrize("folder", kinds, indirect=True)


@of("smollm", "llama3", "qwen2", "mistral")
def test_lm_eval_finds_the_same_numbers(place, tmp_path):
    """Of a text, and of answers to questions with and without a context."""
    lm_eval = pytest.importorskip("lm_eval.models.huggingface")
    lm = lm_eval.HFLM(pretrained=str(place), device="cpu", dtype="float32", batch_size=3)
    model, tokenizer = open_model(place, "cpu", "fp32")
    (tmp_path / "text.txt").write_text(TEXTS[0], encoding="utf-8")
    cfg = EvalConfig(str(place), perplexity_path=str(tmp_path / "text.txt"), stride=64)
    got = prepare_text(cfg, model, tokenizer, cfg.perplexity_path)()
    (found,) = ask_lm(lm, "loglikelihood_rolling", [(TEXTS[0],)])
    assert got["nats"] == pytest.approx(-found, rel=1e-6)
    assert got["bits_per_byte"] == pytest.approx(-found / math.log(2) / len(TEXTS[0].encode()))
    pairs = [("The sky is", " blue"), ("", "Once upon"), ("Is it? ", "yes")]
    rows = [(text, None, (text, (answer,), 0)) for text, answer in pairs]
    encoded, _ = encode_questions(tokenizer, rows, 64)
    got = [pair for row in answer_scores(model, encoded, 2) for pair in row]
    found = ask_lm(lm, "loglikelihood", pairs)
    assert [value for value, _ in got] == pytest.approx([value for value, _ in found], abs=1e-4)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in found]


# ---- GGUF

NAMES = {"gpt2": "gpt-2", "llama3": "llama-bpe"} | {n: n for n in ("smollm", "dbrx", "qwen2")}


@of(*NAMES)
def test_llama_cpp_reads_and_continues_texts_as_transformers(place, tmp_path, request, capsys):
    file, other = export(place, tmp_path / "x.gguf", "gguf"), hugging_face(place)
    name = NAMES[request.node.callspec.params["folder"]]
    said = capsys.readouterr().out
    assert ("does not apply the tokenizer's normalizer" in said) == (name == "qwen2")
    fields = gguf.GGUFReader(file).fields
    assert fields[gguf.Keys.Tokenizer.PRE].contents() == name
    server, rng = llama_cpp(file, use_jinja=False), random.Random(2)
    texts = ["".join(rng.choices(HOSTILE, k=rng.randint(1, 9))) for _ in range(200)]
    texts = [unicodedata.normalize("NFC", text.replace("\0", "")) for text in texts]
    for text in [*TEXTS[:10], *texts]:
        body = {"content": text, "add_special": True}
        ids = ask(server, "/tokenize", **body, parse_special=False)["tokens"]
        assert ids == other.encode(text, split_special_tokens=True), text
    model = transformers.AutoModelForCausalLM.from_pretrained(place)
    compared = 0
    for text in ("The capital of", "if x is", "12 and"):
        inputs = other(text, return_tensors="pt")
        wanted = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
        wanted |= {"output_logits": True, "return_dict_in_generate": True}
        out = model.generate(**inputs, **wanted)
        first, second = torch.cat(out.logits).topk(2).values.T
        sure = [*(first - second > 0.05), False].index(False)  # its keys and values have 16 bits
        ids = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        body = {"n_predict": 8, "temperature": 0, "return_tokens": True, "ignore_eos": True}
        tokens = ask(server, "/completion", prompt=text, **body)["tokens"]
        assert tokens[:sure] == ids[:sure]
        compared += sure
    assert compared > 8


@of("gpt2 with a space", "llama2", "unigram")
def test_what_llama_cpp_would_cut_otherwise_is_refused(place, tmp_path):
    expected = "byte-level tokenizer.json that cuts texts as llama-bpe, dbrx, qwen2, smollm, gpt-2"
    with pytest.raises(UserError, match=expected):
        export(place, tmp_path / "x.gguf", "gguf")
    assert not list(tmp_path.glob("x.*"))
