"""tokenizer.json, the format of the package tokenizers: read from foreign folders, written for
transformers beside tokenizer.model.

`files_of` needs no package; only a folder without tokenizer.model does.
"""

import json

from lib.config import UserError
from lib.tokenizer import (
    BYTE_PIECE,
    IM_END,
    IM_START,
    ROLES,
    SPACE,
    SPECIALS,
    Tokenizer,
    check_unicode,
    find_template,
    spell,
)

# ---- reading


class JSONTokenizer(Tokenizer):
    """A tokenizer.json, read by the package `tokenizers`: byte-level BPE as Llama 3's, or
    SentencePiece's.

    `model` are the bytes of that file. No text makes a control symbol here either.
    """

    file = "tokenizer.json"
    unreadable = "not a tokenizer.json of byte-level or SentencePiece BPE, or a damaged one"

    def _open(self, model):
        try:
            import tokenizers
        except ImportError:
            remedy = "pip install tokenizers, or put its tokenizer.model beside it"
            raise UserError(f"{self.source}: needs the package tokenizers: {remedy}") from None

        def reader(spec):
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
            tokenizer.encode_special_tokens = True  # as the text they are
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return tokenizer

        spec = json.loads(model)
        # the same without a space before texts
        off = {"prepend": "", "prepend_scheme": "never", "add_prefix_space": False}
        switch_off = lambda part: {key: off.get(key, value) for key, value in part.items()}
        inner = {name: spec.get(name) for name in ("normalizer", "pre_tokenizer")}
        inner = json.loads(json.dumps(inner), object_hook=switch_off)
        self._json, self._inner = reader(spec), reader(spec | inner)
        self._prefix_after_symbols = "Prepend" in json.dumps(spec.get("normalizer"))
        added = {token["content"]: token["special"] for token in spec["added_tokens"]}
        texts = {name: b"" if special else name.encode() for name, special in added.items()}
        ids, spell_piece = self._json.get_vocab(with_added_tokens=True), speller(spec)
        self.pieces = [f"<unused_{id}>" for id in range(max(ids.values()) + 1)]
        self._bytes = [b""] * len(self.pieces)
        for name, id in ids.items():
            self.pieces[id] = name
            self._bytes[id] = texts[name] if name in texts else spell_piece(name)
        return {role: ids[name] for role, name in SPECIALS.items() if texts.get(name) == b""}

    def encode(self, text, after=None):
        check_unicode(text)
        begins = after is None or (self._prefix_after_symbols and not self._bytes[after])
        return (self._json if begins else self._inner).encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts, num_threads=1):
        return [self.encode(text) for text in texts]


def speller(spec):
    """Returns the function from a piece of a tokenizer.json to its bytes; KeyError if unknown."""
    decoder = spec["decoder"]
    kinds = {part["type"] for part in decoder.get("decoders", [decoder])}
    if spec["model"]["type"] != "BPE" or not kinds & {"ByteFallback", "ByteLevel"}:
        raise KeyError("decoder")
    if "ByteFallback" in kinds:
        return spell
    # GPT-2's alphabet (Radford et al. 2019): printable Latin-1 is its own byte, the others are
    # U+0100, U+0101, ...
    others = [byte for byte in range(256) if byte == ord(" ") or not chr(byte).isprintable()]
    letters = {chr(byte): byte for byte in set(range(256)).difference(others)}
    letters |= {chr(256 + n): byte for n, byte in enumerate(others)}
    return lambda piece: bytes(letters[letter] for letter in piece)


# ---- writing

CONTROL_TOKEN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
CONTROL_TOKEN |= {"special": True}


def files_of(tokenizer, max_length, template):
    """Returns {name: bytes} of the files that transformers' AutoTokenizer reads.

    Without a template they name none, and offer chatml where its markers exist.
    """
    offered = template or ("chatml" if tokenizer.im_start_id is not None else None)
    ids = {role: getattr(tokenizer, f"{role}_id") for role in SPECIALS}
    specials = {f"{role}_token": tokenizer.pieces[id] for role, id in ids.items() if id >= 0}
    markers = [marker for marker in (IM_START, IM_END) if marker in tokenizer.controls]
    specials["additional_special_tokens"] = markers
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # a Llama class splits the text its way
        **specials,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "tokenizer_model_sha256": tokenizer.sha256,
    }
    if added := range(tokenizer.model_size, tokenizer.vocab_size):
        symbols = {id: {"content": tokenizer.pieces[id], **CONTROL_TOKEN} for id in added}
        config["added_tokens_decoder"] = symbols
    if offered:
        config["chat_template"] = jinja(find_template(tokenizer, offered))
    if template:
        config["prompt_template"] = template
    files = {"special_tokens_map.json": specials, "tokenizer_config.json": config}
    if tokenizer.file != JSONTokenizer.file:
        files[JSONTokenizer.file] = hugging_face_json(tokenizer)
    text = lambda value: json.dumps(value, ensure_ascii=False, indent=1) + "\n"
    return {name: text(value).encode() for name, value in files.items()}


def hugging_face_json(tokenizer):
    """Returns tokenizer.json for the package `tokenizers`: the same ids, and no BOS unasked."""
    vocab, controls = {p: id for id, p in enumerate(tokenizer.pieces)}, tokenizer.controls
    ids = {p: id for p, id in vocab.items() if p not in controls and not BYTE_PIECE.fullmatch(p)}
    merges = []  # all pairs that join to a piece, in the order of SentencePiece's merges
    for piece in ids:
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        pairs = [(left, right) for left, right in halves if left in ids and right in ids]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    to_space = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    from_space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    encoding, decoding = [from_space], [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if tokenizer.dummy_prefix:
        encoding.insert(0, {"type": "Prepend", "prepend": SPACE})
        decoding.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "added_tokens": [{"id": id, "content": p, **CONTROL_TOKEN} for p, id in controls.items()],
        "normalizer": {"type": "Sequence", "normalizers": encoding},
        "pre_tokenizer": None,
        "post_processor": None,
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


def jinja(template, generation=True):
    """Returns a Template for `apply_chat_template`, which raises for what `render` refuses.

    Contents may also be lists of text parts, which are joined. `generation` marks the answers and
    their ends for assistant masks: a tag of transformers, an error in plain Jinja.
    """

    def put(text):
        if text == SPECIALS["eos"]:
            return "{{ eos_token }}"
        return f"{{{{ {json.dumps(text)} }}}}" if text else ""

    def refuse(problem):
        return f"{{{{ raise_exception({json.dumps(problem)}) }}}}"

    def message(role):
        head = template.heads[role].rstrip(" ")
        space = template.heads[role].removeprefix(head)  # the model's to write
        body = put(space) + "{{ content | trim }}" + put(template.ends[role])
        if generation and role == "assistant":
            body = f"{{% generation %}}{body}{{% endgeneration %}}"
        return f"{{% elif message['role'] == '{role}' %}}{put(head)}{body}"

    opening = template.heads["assistant"].rstrip(" ")
    unknown = refuse(f"role must be one of {', '.join(ROLES)}")
    return (
        "{{ bos_token }}{% for message in messages %}"
        f"{{% if not loop.first %}}{put(template.between)}{{% endif %}}"
        "{% set content %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'text' and part['text'] is string %}{{ part['text'] }}"
        f"{{% else %}}{refuse('a part of a content must be text')}{{% endif %}}{{% endfor %}}"
        "{% endif %}{% endset %}"
        f"{{% if not content | trim %}}{refuse('content must be text that is not empty')}"
        f"{''.join(map(message, ROLES))}{{% else %}}{unknown}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{put(template.between + opening)}{{% endif %}}"
    )
