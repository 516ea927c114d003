"""tokenizer.json, the format of the package tokenizers: read from foreign folders, written for
transformers beside tokenizer.model.

`files_of` needs no package; only a folder without tokenizer.model does.
"""

import json

import numpy as np

from lib.config import UserError, read_object, refusing
from lib.conversation import find_template, has_markers
from lib.tokenizer import BYTE_PIECE, MARKERS, SPACE, SPECIALS, Tokenizer, check_unicode, spell

TO_SPACE = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}

# ---- reading


def read_tokenizer_config(folder):
    """Returns a folder's tokenizer_config.json, with what transformers reads in files beside it.

    That is the chat template, special tokens by name, and the ids that end an answer: `end_ids`.
    """
    read = lambda name: read_object(folder / name) if (folder / name).exists() else {}
    config = read("tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= read("special_tokens_map.json")
    if (path := folder / "chat_template.jinja").exists():
        with refusing(UnicodeDecodeError, f"{path}: not UTF-8"):
            config["chat_template"] = path.read_text(encoding="utf-8")
    if ends := read("generation_config.json").get("eos_token_id"):
        config["end_ids"] = ends if isinstance(ends, list) else [ends]
    symbols = {key: value for key, value in config.items() if key.endswith("_token")}
    content = lambda value: value.get("content") if isinstance(value, dict) else value
    return config | {key: content(value) for key, value in symbols.items()}


class JSONTokenizer(Tokenizer):
    """A tokenizer.json, read by the package `tokenizers`: byte-level BPE as Llama 3's, or
    SentencePiece's BPE or unigram.

    `model` are the bytes of that file, `spec` its content. No text makes a control symbol here
    either. A normalizer may lose parts of a text. Where bytes are no UTF-8, transformers may write
    more replacement characters.
    """

    file = "tokenizer.json"
    unreadable = "not a tokenizer.json, or a damaged one"

    def _open(self, model):
        remedy = "pip install tokenizers, or put its tokenizer.model beside it"
        with refusing(ImportError, f"{self.source}: needs the package tokenizers", remedy):
            import tokenizers

        def reader(text):
            tokenizer = tokenizers.Tokenizer.from_str(text)
            tokenizer.encode_special_tokens = True  # as the text they are
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return tokenizer

        self.spec = spec = json.loads(model)
        spell_piece, self.first_text = read_decoder(spec, self.source)
        self.added = {token["content"]: token for token in spec["added_tokens"]}
        special = {name: token["special"] for name, token in self.added.items()}
        whole = self._json = reader(model.decode())
        if spec["model"]["type"] == "Unigram":
            spec = without_symbols(spec, special)
            self._json = reader(json.dumps(spec))
        first = {"pre_tokenizer": spec.get("pre_tokenizer")}
        later = json.loads(json.dumps(first), object_hook=of_later_texts)
        self._later = self._json if later == first else reader(json.dumps(spec | later))
        ids = whole.get_vocab(with_added_tokens=True)
        self.pieces = [f"<unused_{id}>" for id in range(max(ids.values()) + 1)]
        self._bytes = [b""] * len(self.pieces)
        for name, id in ids.items():
            self.pieces[id] = name
            piece = whole.id_to_token(id)  # an added word as it is after the normalizer
            self._bytes[id] = b"" if special.get(name) else spell_piece(piece)
        return {role: ids[name] for role, name in SPECIALS.items() if special.get(name)}

    def _find_opening(self):
        """Returns the ids that the post_processor puts before a text: transformers obeys the file,
        and not the key add_bos_token.
        """
        bare, ids = (self._json.encode("a", add_special_tokens=on).ids for on in (False, True))
        count = next(at for at in range(len(ids)) if ids[at : at + len(bare)] == bare)
        self.adds_bos = count > 0
        return ids[:count]

    def encode(self, text):
        return self.encode_spans(text)[0]

    def encode_spans(self, text, begins=True):
        check_unicode(text)
        encoding = (self._json if begins else self._later).encode(text, add_special_tokens=False)
        return encoding.ids, *np.array(encoding.offsets, int).reshape(-1, 2).T

    def encode_batch(self, texts, num_threads=1):
        return [self.encode(text) for text in texts]


def without_symbols(spec, special):
    """Returns a unigram tokenizer whose control symbols no text can match, as BPE has them: they
    get a plain space, which stands in no piece.
    """
    hidden = lambda name: f" {name}" if special.get(name) else name
    vocab = [[hidden(name), score] for name, score in spec["model"]["vocab"]]
    added = [token | {"content": hidden(token["content"])} for token in spec["added_tokens"]]
    return spec | {"added_tokens": added, "model": spec["model"] | {"vocab": vocab}}


def of_later_texts(part):
    """Returns a Metaspace as it acts on texts after a control symbol: "first" is done with."""
    return part | {"prepend_scheme": "never"} if part.get("prepend_scheme") == "first" else part


READS = "byte-level BPE, and SentencePiece's BPE and unigram"
SENTENCEPIECE = ["Replace", "ByteFallback", "Fuse", "Strip"]  # the first has to be there


def read_decoder(spec, source):
    """Returns (spell, shown): the bytes of a piece, and what a text's first id shows of them.

    UserError for a kind of tokenizer that is not read.
    """
    kind, decoder = spec["model"]["type"], spec["decoder"] or {"type": None}
    parts = {part["type"]: part for part in decoder.get("decoders", [decoder])}
    names, strip, metaspace = list(parts), parts.get("Strip"), parts.get("Metaspace")
    ours = names == [n for n in SENTENCEPIECE if n in parts] and parts.get("Replace") == TO_SPACE
    ours &= not strip or ("Fuse" in parts and strip == STRIP)
    if kind == "BPE" and names == ["ByteLevel"]:
        return spell_letters, lambda spelled: spelled
    if kind not in ("BPE", "Unigram") or not (ours or names == ["Metaspace"]):
        problem = f"its model is {kind}, its decoder {' + '.join(map(str, names))}"
        raise UserError(f"{source}: {problem}; this program reads {READS}")
    if metaspace and metaspace.get("prepend_scheme") != "never":
        return spell_plain, lambda spelled: spelled.replace(b" ", b"")
    shown = (lambda spelled: spelled.removeprefix(b" ")) if strip else (lambda spelled: spelled)
    return (spell if "ByteFallback" in parts else spell_plain), shown


def spell_plain(piece):
    """Returns the UTF-8 of a piece where "<0x41>" is text."""
    return piece.replace(SPACE, " ").encode()


# GPT-2's alphabet (Radford et al. 2019): printable Latin-1 is its own byte, the others are
# U+0100, U+0101, ...
OTHERS = [byte for byte in range(256) if byte == ord(" ") or not chr(byte).isprintable()]
LETTERS = {chr(byte): byte for byte in set(range(256)).difference(OTHERS)}
LETTERS |= {chr(256 + n): byte for n, byte in enumerate(OTHERS)}


def spell_letters(piece):
    """Returns the bytes of a piece of byte-level BPE; an added word may have other letters."""
    known = all(letter in LETTERS for letter in piece)
    return bytes(map(LETTERS.get, piece)) if known else piece.encode()


# ---- writing

CONTROL_TOKEN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
CONTROL_TOKEN |= {"special": True}


def files_of(tokenizer, max_length, template):
    """Returns {name: bytes} of the files that transformers' AutoTokenizer reads.

    Without a template they name none, and offer chatml where its markers exist.
    """
    offered = template or ("chatml" if has_markers(tokenizer) else None)
    markers = [marker for marker in MARKERS if marker in tokenizer.controls]
    specials = special_tokens(tokenizer) | {"additional_special_tokens": markers}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # a Llama class splits the text its way
        **specials,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "tokenizer_model_sha256": tokenizer.sha256,
    }
    if tokenizer.adds_bos is not None:
        config["add_bos_token"] = tokenizer.adds_bos
    if added := range(tokenizer.model_size, tokenizer.vocab_size):
        symbols = {id: {"content": tokenizer.pieces[id], **CONTROL_TOKEN} for id in added}
        config["added_tokens_decoder"] = symbols
    if tokenizer.end_ids:
        config["end_ids"] = tokenizer.end_ids  # an adapter's folder has no generation_config.json
    if offered:
        config["chat_template"] = find_template(tokenizer, offered).source
    if template:
        config["prompt_template"] = template
    files = {"special_tokens_map.json": specials, "tokenizer_config.json": config}
    if tokenizer.file != JSONTokenizer.file:
        files[JSONTokenizer.file] = hugging_face_json(tokenizer)
    text = lambda value: json.dumps(value, ensure_ascii=False, indent=1) + "\n"
    return {name: text(value).encode() for name, value in files.items()}


def special_tokens(tokenizer):
    """Returns {"bos_token": symbol, ...}: its own, and what else its folder names."""
    named = {k: v for k, v in tokenizer.config.items() if k.endswith("_token") and type(v) is str}
    ids = tokenizer.special_ids.items()
    return named | {f"{role}_token": tokenizer.pieces[id] for role, id in ids}


def hugging_face_json(tokenizer):
    """Returns tokenizer.json for the package `tokenizers`: the same ids, and no BOS unasked."""
    vocab, controls = {p: id for id, p in enumerate(tokenizer.pieces)}, tokenizer.controls
    ids = {p: id for p, id in vocab.items() if p not in controls and not BYTE_PIECE.fullmatch(p)}
    merges = []  # all pairs that join to a piece, in the order of SentencePiece's merges
    for piece in ids:
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        pairs = [(left, right) for left, right in halves if left in ids and right in ids]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    from_space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    encoding, decoding = [from_space], [TO_SPACE, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if tokenizer.dummy_prefix:
        encoding.insert(0, {"type": "Prepend", "prepend": SPACE})
        decoding.append(STRIP)
    return {
        "version": "1.0",
        "added_tokens": [{"id": id, "content": p, **CONTROL_TOKEN} for p, id in controls.items()],
        "normalizer": {"type": "Sequence", "normalizers": encoding},
        "pre_tokenizer": None,
        "post_processor": opener(tokenizer) if tokenizer.adds_bos and tokenizer.opening else None,
        "decoder": {"type": "Sequence", "decoders": decoding},
        "model": {
            "type": "BPE",
            "unk_token": tokenizer.pieces[tokenizer.unk_id],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": merges,
        },
    }


def opener(tokenizer):
    """Returns the post_processor that puts BOS before a text."""
    symbol = tokenizer.pieces[tokenizer.bos_id]
    bos = {"SpecialToken": {"id": symbol, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    tokens = {symbol: {"id": symbol, "ids": tokenizer.opening, "tokens": [symbol]}}
    forms = {"single": [bos, first], "pair": [bos, first, bos, second]}
    return {"type": "TemplateProcessing", **forms, "special_tokens": tokens}
