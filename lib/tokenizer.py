"""Text to ids and back: SentencePiece, chat templates, the Hugging Face tokenizer files.

The tokenizer is BPE with byte fallback and without normalization, so that every text survives the
round trip: `decode(encode(text)) == text` for all valid Unicode. Ids 0-3 are pad, bos, eos and
unk, 4 and 5 the chat markers; then come the 256 bytes, the merged pieces, and last single
characters. The six specials are control symbols: they have an id and no spelling. "<|im_end|>" in
a text is ten harmless characters; only `render` puts the id of a marker into a conversation.

A text may be cut at line breaks: the trainer never lets a piece join a line break to anything else.
It may also be cut before a space, because a space stands only at the front of a piece. Texts that
meet at such a place encode apart exactly as they encode together. `render` cuts only there, so its
ids are those of the conversation written as one text, and the supervised ids begin with the answer.
"""

import codecs
import hashlib
import io
import json
import re
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import sentencepiece as spm

from lib.config import UserError, read_object, write_whole

PAD, BOS, EOS, UNK = 0, 1, 2, 3
IGNORE = -100  # the label of a position that is not supervised, as torch's cross_entropy has it
SPECIALS = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>"}
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
SPACE = "\u2581"  # a space inside a piece, as SentencePiece writes it
# protobuf: normalizer_spec {add_dummy_prefix: false}; the last value of a field counts
NO_DUMMY_PREFIX = b"\x1a\x02\x18\0"

# ----------------------------------------------------------------------------------------------
# Training

CUT = "\uffff"  # no piece may cross it; Unicode promises never to make it a character
LINE_BREAKS = re.compile(r"[\r\n]+")
# SentencePiece would drop a text with one of these
UNTRAINABLE = re.compile(f"[\0\ud800-\udfff{SPACE}\u2585{CUT}]")

RECIPE = dict(
    model_type="bpe",
    byte_fallback=True,  # a character outside the vocabulary becomes its UTF-8 bytes, never <unk>
    character_coverage=0.9995,  # the rarest 0.05 % of characters are left to their bytes
    normalization_rule_name="identity",
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,  # indentation is worth a piece
    split_digits=True,
    pretokenization_delimiter=CUT,
    max_sentence_length=2**30,  # the default drops texts of more than 4,192 bytes
    pad_id=PAD,
    bos_id=BOS,
    eos_id=EOS,
    unk_id=UNK,
    control_symbols=[IM_START, IM_END],
    num_threads=4,  # constant: it is part of the file, whose sha256 must be the same everywhere
    minloglevel=2,
    **{f"{role}_piece": name for role, name in SPECIALS.items()},
)


def train_tokenizer(texts, path, vocab_size):
    """Learns a vocabulary of `vocab_size` ids from `texts`, writes it to the .model file `path`.

    Returns the Tokenizer. The same texts in the same order give the same bytes on any machine.
    SentencePiece holds the texts in memory, about ten bytes a character: give it a sample of a
    large corpus. Raises UserError if vocab_size is too large for the texts or too small for their
    characters. An exception raised by `texts` is passed on.
    """
    size, failure, model = 0, None, io.BytesIO()

    def sentences():
        nonlocal size, failure
        try:
            for text in texts:
                size += len(text)
                yield LINE_BREAKS.sub(rf"{CUT}\g<0>{CUT}", UNTRAINABLE.sub(" ", text))
        except BaseException as error:  # SentencePiece turns it into a RuntimeError
            failure = error
            raise

    files = {"sentence_iterator": sentences(), "model_writer": model}
    try:
        spm.SentencePieceTrainer.train(**files, vocab_size=max(vocab_size, 6), **RECIPE)
    except RuntimeError as error:
        raise failure or training_error(str(error), vocab_size, size) from None
    tokenizer = Tokenizer(model.getvalue(), str(path))
    write_whole(path, tokenizer.model)
    return tokenizer


def training_error(message, vocab_size, size):
    """Returns SentencePiece's complaint as a UserError with the number that mends it."""
    if size == 0:
        return UserError("no text to train a tokenizer on: no documents, or all are empty")
    if largest := re.search(r"value <= (\d+)", message):
        return UserError(
            f"vocab_size {vocab_size} is too large for {size:,} characters of text, which support "
            f"at most {largest[1]}: set vocab_size={largest[1]} or give more text"
        )
    if needed := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"vocab_size {vocab_size} is too small: 6 specials, 256 bytes and the characters of "
            f"these texts need at least {needed[1]}"
        )
    return RuntimeError(message)


# ----------------------------------------------------------------------------------------------
# Text and ids


class Tokenizer:
    """A trained SentencePiece model: ours, or a foreign one such as Llama's `tokenizer.model`.

    model             the .model file as bytes; `sha256` is their hash
    pieces            the vocabulary as SentencePiece spells it; V = `vocab_size` of them
    template          the chat template named by the folder it came from, or None
    foreign_template  whether the folder has a chat template that is not read here
    dummy_prefix      whether it puts a space before every text
    exact             whether `save` wrote the folder, so that there are no other ids

    Foreign folders may add control symbols (`added`, {id: symbol}), name those that open and end a
    text (`roles`), lack the chat markers (`im_start_id`, `im_end_id` are then None) and padding
    (`pad_id` is then the eos id).
    """

    file = "tokenizer.model"  # the name of `model` in a folder
    unreadable = "not a SentencePiece model, or a damaged one"

    def __init__(
        self,
        model,
        source="tokenizer.model",
        template=None,
        added=MappingProxyType({}),
        roles=MappingProxyType({}),
    ):
        self.model, self.template, self.source = model, template, source
        self.exact = self.foreign_template = False
        self.sha256 = hashlib.sha256(model).hexdigest()
        try:
            self._roles = self._open(model)
            self.dummy_prefix = self._bytes[self.encode("a")[0]].startswith(b" ")
        except UserError:
            raise
        except Exception as error:  # a damaged file fails in many ways
            raise UserError(f"{source}: {self.unreadable}") from error
        self._size = len(self.pieces)
        self._add_controls(max(added, default=-1) + 1, added)
        self._set_roles(roles)

    def _open(self, model):
        """Reads `pieces` and the text of each, `_bytes`; returns {role: id}, -1 for none."""
        self._spm = sp = spm.SentencePieceProcessor()
        sp.load_from_serialized_proto(model)
        self.pieces = [sp.id_to_piece(id) for id in range(sp.get_piece_size())]
        control = [sp.is_control(id) or sp.is_unknown(id) for id in range(len(self.pieces))]
        self._bytes = [b"" if c else spell(piece) for c, piece in zip(control, self.pieces)]
        self._inner = spm.SentencePieceProcessor()
        self._inner.load_from_serialized_proto(model + NO_DUMMY_PREFIX)
        self._space_ids = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        return {role: getattr(sp, f"{role}_id")() for role in SPECIALS}

    @classmethod
    def load(cls, path):
        """Returns the Tokenizer of a .model file or a folder; UserError if missing or broken.

        A folder that `save` wrote names its chat template and the hash of its model, which is
        verified. A folder of transformers may hold more symbols than tokenizer.model. A
        tokenizer.json alone is read by the package `tokenizers`.
        """
        path = Path(path)
        if not path.is_dir():
            return cls(read_tokenizer(path), str(path))
        config = tokenizer_config(path)
        sha256, (added, words) = config.get("tokenizer_model_sha256"), added_tokens(path, config)
        only_json = not (path / cls.file).exists() and (path / JSONTokenizer.file).exists()
        kind = JSONTokenizer if only_json else cls
        path /= kind.file
        roles = {role: config.get(f"{role}_token") for role in SPECIALS}
        template = config.get("chat_template_name")
        tokenizer = kind(read_tokenizer(path), str(path), template, added, roles)
        if words := [added[id] for id in sorted(words) if id >= tokenizer._size]:
            raise UserError(
                f"{path}: the folder adds the word {words[0]!r}, which only the package tokenizers "
                "finds in a text: pip install tokenizers, and move this file away, so that its "
                "tokenizer.json is read"
            )
        tokenizer.exact = not only_json and sha256 is not None
        jinja_file = path.with_name("chat_template.jinja")
        foreign = "chat_template" in config or jinja_file.exists()
        tokenizer.foreign_template = sha256 is None and foreign
        if tokenizer.exact and tokenizer.sha256 != sha256:
            raise UserError(
                f"{path}: checksum mismatch (expected {str(sha256)[:12]}, got "
                f"{tokenizer.sha256[:12]}): the file is damaged, or from another model"
            )
        return tokenizer

    def _add_controls(self, size, symbols=MappingProxyType({})):
        """Adds control symbols up to `size` ids in all; those without a name are unused."""
        for id in range(len(self.pieces), size):
            self.pieces.append(symbols.get(id, f"<unused_{id}>"))
            self._bytes.append(b"")
        self.vocab_size = len(self.pieces)
        self._controls = {piece: id for id, piece in enumerate(self.pieces) if not self._bytes[id]}
        self.im_start_id, self.im_end_id = map(self._controls.get, (IM_START, IM_END))

    def _set_roles(self, roles):
        """Takes the symbols of a tokenizer_config.json; UserError if none opens or ends a text."""
        for role, symbol in roles.items():
            symbol = symbol.get("content") if isinstance(symbol, dict) else symbol
            if str(symbol) in self._controls:
                self._roles[role] = self._controls[str(symbol)]
            elif symbol is not None and role in ("bos", "eos"):
                raise UserError(
                    f"{self.source}: no control symbol is {symbol!r:.60}, which "
                    f"tokenizer_config.json names as {role}_token; correct one of the two"
                )
        self.bos_id, self.eos_id, self.unk_id = map(self._roles.get, ("bos", "eos", "unk"))
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError(
                f"{self.source}: lacks a symbol that opens a text, or one that ends it; name them "
                "in tokenizer_config.json as bos_token and eos_token"
            )
        self.pad_id = self._roles["pad"] if self._roles["pad"] >= 0 else self.eos_id

    def without_template(self, folder):
        """Returns the sentence on what happens to a chat where `template` is None."""
        foreign = f"a chat template that is none of {', '.join(TEMPLATES)}"
        reason = foreign if self.foreign_template else "no chat template"
        return f"{folder} has {reason}: each text is continued as it stands"

    def match(self, size, folder):
        """Adapts to the model in `folder`, which has `size` ids; UserError if they do not fit.

        Other programs round a vocabulary up: the ids beyond are never read or written.
        """
        if size < self.vocab_size or (size > self.vocab_size and self.exact):
            raise UserError(
                f"{folder}: the model has {size} tokens, its tokenizer {self.vocab_size}; "
                "they do not belong together"
            )
        self._add_controls(size)

    def encode(self, text, after=None):
        """Returns the ids of a text, never a control id; UserError for a lone surrogate.

        after: the id it follows; text that follows text gets no dummy prefix. SentencePiece takes
        a literal U+2581 for a space; here its three bytes are encoded, and decode to it.
        """
        sp = self._inner if after is not None and self._bytes[after] else self._spm
        first, *rest = text.split(SPACE)
        try:
            ids = sp.encode(first)
            for part in rest:
                ids += self._space_ids + self._inner.encode(part)
            return ids
        except RuntimeError as error:
            raise surrogate_error(text) or error from None

    def encode_batch(self, texts, num_threads=1):
        """Returns the ids of each text, as `encode` does, on `num_threads` threads."""
        try:
            rows = self._spm.encode(list(texts), num_threads=num_threads)
        except (RuntimeError, TypeError) as error:
            raise next(filter(None, map(surrogate_error, texts)), error) from None
        return [self.encode(text) if SPACE in text else row for text, row in zip(texts, rows)]

    def decode(self, ids, controls=False):
        """Returns the text of ids; control ids vanish, or are written by name with `controls`.

        Bytes that are not UTF-8 become U+FFFD. Raises UserError for an id outside the vocabulary.
        """
        text = b"".join(self.spelled(id, controls) for id in ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.dummy_prefix else text

    def spelled(self, id, controls=True):
        """Returns the UTF-8 of an id within a text; of a control id its name, or nothing."""
        if not 0 <= id < self.vocab_size:
            raise UserError(f"token id {id} is outside 0..{self.vocab_size - 1}")
        return self._bytes[id] or (self.pieces[id].encode() if controls else b"")

    def stream(self, begun=False):
        """Returns a decoder for ids that arrive one by one; begun: they continue a text."""
        return Stream(self, begun)

    def token_bytes(self):
        """Returns (V,) int64: the UTF-8 bytes of text an id stands for, 0 for control ids."""
        return np.array([len(text) for text in self._bytes], dtype=np.int64)

    @property
    def scores(self):
        """SentencePiece's score of each id: the merge with the higher result goes first."""
        scores = [self._spm.get_score(id) for id in range(self._size)]
        return scores + [0.0] * (self.vocab_size - self._size)

    def save(self, folder, max_length, template=None):
        """Writes the tokenizer into a model folder: tokenizer.model and the files of AutoTokenizer.

        max_length: the model's context in tokens. template: the chat template that the model is
        trained in, by default this tokenizer's. With neither the folder names none and offers
        chatml.
        """
        template = template or self.template
        offered = template or ("chatml" if self.im_start_id is not None else None)
        ids = {role: getattr(self, f"{role}_id") for role in SPECIALS}
        specials = {f"{role}_token": self.pieces[id] for role, id in ids.items() if id >= 0}
        markers = [marker for marker in (IM_START, IM_END) if marker in self._controls]
        specials["additional_special_tokens"] = markers
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # a Llama class splits the text its way
            **specials,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length,
            "model_input_names": ["input_ids", "attention_mask"],
            "tokenizer_model_sha256": self.sha256,
        }
        if added := range(self._size, self.vocab_size):
            symbols = {id: {"content": self.pieces[id], **CONTROL_TOKEN} for id in added}
            config["added_tokens_decoder"] = symbols
        if offered:
            config["chat_template"] = jinja(find_template(self, offered))
        if template:
            config["chat_template_name"] = template
        files = {"special_tokens_map.json": specials, "tokenizer_config.json": config}
        if self.file != JSONTokenizer.file:
            files = {JSONTokenizer.file: hugging_face_json(self)} | files
        write_whole(Path(folder) / self.file, self.model)
        for name, value in files.items():
            content = json.dumps(value, ensure_ascii=False, indent=1).encode() + b"\n"
            write_whole(Path(folder) / name, content)


class Stream:
    """Decodes ids as they arrive: its output, flush included, is `decode` of all the ids pushed."""

    def __init__(self, tokenizer, begun=False):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer.dummy_prefix and not begun

    def push(self, id):
        """Returns the text that an id completes: whole characters, so "" within an emoji."""
        return self._emit(self._utf8.decode(self._tokenizer.spelled(id, controls=False)))

    def flush(self):
        """Returns the rest at the end: "", or U+FFFD for a character that was never completed."""
        return self._emit(self._utf8.decode(b"", final=True))

    def _emit(self, text):
        if self._strip and text:
            self._strip, text = False, text.removeprefix(" ")
        return text


def spell(piece):
    """Returns the UTF-8 of a piece: a byte for "<0x41>", else its characters."""
    byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(SPACE, " ").encode()


def surrogate_error(text):
    """Returns the UserError for a text with a lone surrogate, else None."""
    if lone := re.search("[\ud800-\udfff]", text):
        name = f"U+{ord(lone[0]):04X} at character {lone.start()}"
        return UserError(f"not Unicode text: lone surrogate {name}")
    return None


def read_tokenizer(path):
    try:
        return path.read_bytes()
    except OSError as error:
        expected = "a SentencePiece .model file, or a folder that holds tokenizer.model"
        raise UserError(f"{path}: {error.strerror}; a tokenizer is {expected}") from error


def read_if_there(path):
    """Returns the object in a JSON file, {} if there is no file."""
    return read_object(path) if path.exists() else {}


def tokenizer_config(folder):
    """Returns the tokenizer_config.json of a folder, {} if it has none."""
    path = folder / "tokenizer_config.json"
    config = read_if_there(path)
    name = config.get("chat_template_name")
    if name is not None and name not in list(TEMPLATES):
        raise UserError(f"{path}: chat_template_name {name!r} is not one of {', '.join(TEMPLATES)}")
    return config


def added_tokens(folder, config):
    """Returns the symbols that a folder adds to its vocabulary: ({id: symbol}, ids of words).

    Every generation of transformers wrote them into another file. A word may occur in a text, other
    than a symbol as <|end|> or [END].
    """
    try:
        added = {int(id): token for id, token in config.get("added_tokens_decoder", {}).items()}
        if "tokenizer_model_sha256" not in config and (folder / Tokenizer.file).exists():
            older = read_if_there(folder / "added_tokens.json")
            newer = read_if_there(folder / JSONTokenizer.file).get("added_tokens", [])
            added = {id: {"content": symbol} for symbol, id in older.items()} | added
            added |= {token["id"]: token for token in newer}
        symbols = {id: token["content"] for id, token in added.items()}
        words = {id for id, token in added.items() if not token.get("special", True)}
        if not all(0 <= id < 1 << 20 and isinstance(symbol, str) for id, symbol in symbols.items()):
            raise ValueError(added)
    except (AttributeError, KeyError, TypeError, ValueError):
        problem = "the tokens added to its vocabulary are no list of symbols and ids"
        raise UserError(f"{folder}: {problem}") from None
    return symbols, {id for id in words if not re.fullmatch(r"<.+>|\[.+\]", symbols[id])}


# ----------------------------------------------------------------------------------------------
# tokenizer.json

CONTROL_TOKEN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
CONTROL_TOKEN |= {"special": True}


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
            raise UserError(
                f"{self.source}: needs the package tokenizers: pip install tokenizers (or put the "
                "SentencePiece tokenizer.model beside it that it was made from)"
            ) from None
        spec = json.loads(model)
        inner = {part: without_prefix(spec.get(part)) for part in ("normalizer", "pre_tokenizer")}
        self._json, self._inner = (
            tokenizers.Tokenizer.from_str(json.dumps(each)) for each in (spec, spec | inner)
        )
        for tokenizer in (self._json, self._inner):
            tokenizer.encode_special_tokens = True  # as the text they are
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._prefix_after_symbols = "Prepend" in json.dumps(spec.get("normalizer"))
        texts = {
            token["content"]: b"" if token["special"] else token["content"].encode()
            for token in spec["added_tokens"]
        }
        ids, spell_piece = self._json.get_vocab(with_added_tokens=True), speller(spec)
        names = {id: name for name, id in ids.items()}
        self.pieces = [names.get(id, f"<unused_{id}>") for id in range(max(names) + 1)]
        self._bytes = [
            b"" if id not in names else texts[name] if name in texts else spell_piece(name)
            for id, name in enumerate(self.pieces)
        ]
        controls = {role: name for role, name in SPECIALS.items() if texts.get(name) == b""}
        return {role: ids.get(controls.get(role), -1) for role in SPECIALS}

    def encode(self, text, after=None):
        if error := surrogate_error(text):
            raise error
        begins = after is None or (self._prefix_after_symbols and not self._bytes[after])
        return (self._json if begins else self._inner).encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts, num_threads=1):
        return [self.encode(text) for text in texts]


def without_prefix(part):
    """Returns a normalizer or pre-tokenizer of tokenizer.json without a space before texts."""
    if isinstance(part, list):
        return [without_prefix(item) for item in part if item.get("type") != "Prepend"]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    off = {"prepend_scheme": "never", "add_prefix_space": False}
    return {key: off.get(key, without_prefix(value)) for key, value in part.items()}


def speller(spec):
    """Returns the function from a piece of a tokenizer.json to its bytes; KeyError if unknown."""
    decoder = spec["decoder"]
    kinds = {part["type"] for part in decoder.get("decoders", [decoder])}
    if spec["model"]["type"] != "BPE" or not kinds & {"ByteFallback", "ByteLevel"}:
        raise KeyError("decoder")
    if "ByteFallback" in kinds:
        return spell
    # GPT-2's alphabet (Radford et al. 2019): printable Latin-1 is its own byte, others are
    # U+0100...
    plain = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = sorted(set(range(256)) - set(plain))
    letters = {chr(byte): byte for byte in plain}
    letters |= {chr(256 + n): byte for n, byte in enumerate(others)}
    return lambda piece: bytes(letters[letter] for letter in piece)


def hugging_face_json(tokenizer):
    """Returns tokenizer.json for the package `tokenizers`: the same ids, and no BOS unasked."""
    pieces, is_byte = tokenizer.pieces, tokenizer._spm.is_byte
    ids = {p: id for id, p in enumerate(pieces) if tokenizer._bytes[id] and not is_byte(id)}
    to_space = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    from_space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    encoding, decoding = [from_space], [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if tokenizer.dummy_prefix:
        encoding.insert(0, {"type": "Prepend", "prepend": SPACE})
        decoding.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    controls = tokenizer._controls.items()
    return {
        "version": "1.0",
        "added_tokens": [{"id": id, "content": name, **CONTROL_TOKEN} for name, id in controls],
        "normalizer": {"type": "Sequence", "normalizers": encoding},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoding},
        "model": {
            "type": "BPE",
            "unk_token": pieces[tokenizer.unk_id],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: id for id, piece in enumerate(pieces)},
            "merges": merges_of(ids),
        },
    }


def merges_of(ids):
    """Returns all pairs of pieces that join to a piece, in the order of SentencePiece's merges."""
    merges = []
    for piece in ids:
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        pairs = [(left, right) for left, right in halves if left in ids and right in ids]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


# ----------------------------------------------------------------------------------------------
# Conversations


class Template(NamedTuple):
    """A message is heads[role] + content + ends[role]; `between` joins two messages.

    The markers `<|im_start|>`, `<|im_end|>` and `</s>` in it become control ids, unlike those in a
    content. A space at the end of a head belongs to the first token of the content.
    """

    heads: dict[str, str]
    ends: dict[str, str]
    between: str


ROLES = ("system", "user", "assistant")
EOS_AFTER_ANSWER = {"system": "", "user": "", "assistant": SPECIALS["eos"]}
TEMPLATES = {
    "chatml": Template(
        heads={role: f"{IM_START}{role}\n" for role in ROLES},
        ends=dict.fromkeys(ROLES, f"\n{IM_END}"),
        between="\n",
    ),
    "instruct": Template(
        heads={"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"},
        ends=EOS_AFTER_ANSWER,
        between="\n\n",
    ),
    "chat": Template(
        heads={"system": "", "user": "Human: ", "assistant": "Assistant: "},
        ends=EOS_AFTER_ANSWER,
        between="\n\n",
    ),
}


def render(tokenizer, messages, template, add_generation_prompt=False):
    """Returns a conversation as (ids, mask), the mask 1 on the assistant's answers and their ends.

    messages: [{"role": system | user | assistant, "content": text}, ...]. White space around a
    content is trimmed, so that it meets the template at a line break. The ids begin with BOS and
    are those of `apply_chat_template` on the saved folder, except that a marker in a content stays
    text, and that a foreign vocabulary may join line breaks to other characters.

    add_generation_prompt opens the next answer. The line break before `<|im_end|>` in chatml and
    the space after "Assistant:" in chat are the model's to write: strip its answers. Raises
    UserError with the number of a message that is not well formed.
    """
    shape = find_template(tokenizer, template)
    check_messages(messages)
    ids, mask = [tokenizer.bos_id], [0]

    def write(more, supervised=False):
        ids.extend(more)
        mask.extend([int(supervised)] * len(more))

    for index, message in enumerate(messages):
        role = message["role"]
        head = shape.heads[role].rstrip(" ")
        space = shape.heads[role].removeprefix(head)
        write(template_ids(tokenizer, (shape.between if index else "") + head, ids[-1]))
        supervised = role == "assistant"
        write(tokenizer.encode(space + message["content"].strip(), ids[-1]), supervised)
        write(template_ids(tokenizer, shape.ends[role], ids[-1]), supervised)
    if add_generation_prompt:
        opening = shape.between + shape.heads["assistant"].rstrip(" ")
        write(template_ids(tokenizer, opening, ids[-1]))
    return ids, mask


def usual_template(tokenizer):
    """Returns the folder's own template, else chatml where its markers exist, else instruct."""
    markers = None not in (tokenizer.im_start_id, tokenizer.im_end_id)
    return tokenizer.template or ("chatml" if markers else "instruct")


def stop_ids(tokenizer, template):
    """Returns the ids that end an answer: EOS, and the end of the template's answers."""
    if template is None:
        return [tokenizer.eos_id]
    end = find_template(tokenizer, template).ends["assistant"]
    return sorted({tokenizer.eos_id, template_ids(tokenizer, end, tokenizer.bos_id)[-1]})


def jinja(shape):
    """Returns a Template for `apply_chat_template`, in what all Jinja dialects know."""

    def put(text):
        if text == SPECIALS["eos"]:
            return "{{ eos_token }}"
        return f"{{{{ {json.dumps(text)} }}}}" if text else ""

    opening = shape.heads["assistant"].rstrip(" ")
    messages = "".join(
        f"{{% if message['role'] == '{role}' %}}{put(shape.heads[role])}"
        f"{{{{ message['content'] | trim }}}}{put(shape.ends[role])}{{% endif %}}"
        for role in ROLES
    )
    return (
        "{{ bos_token }}{% for message in messages %}"
        f"{{% if not loop.first %}}{put(shape.between)}{{% endif %}}{messages}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{put(shape.between + opening)}{{% endif %}}"
    )


def find_template(tokenizer, name):
    if name not in TEMPLATES:
        raise UserError(f"unknown template {name!r}: choose one of {', '.join(TEMPLATES)}")
    if name == "chatml" and None in (tokenizer.im_start_id, tokenizer.im_end_id):
        raise UserError(
            f"the template chatml needs {IM_START}, and this tokenizer has none: choose instruct "
            "or chat"
        )
    return TEMPLATES[name]


def template_ids(tokenizer, text, after):
    """Returns the ids of a template's own text after the id `after`, markers as control ids."""
    markers = {IM_START: tokenizer.im_start_id, IM_END: tokenizer.im_end_id}
    markers |= {SPECIALS["eos"]: tokenizer.eos_id}
    ids = [after]
    for part in filter(None, re.split(f"({'|'.join(map(re.escape, markers))})", text)):
        ids += [markers[part]] if part in markers else tokenizer.encode(part, ids[-1])
    return ids[1:]


def check_messages(messages):
    """Raises UserError, with the message's number, unless this is a conversation."""
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError("a conversation must be a list of at least one message")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise UserError(f"message {number}: must be an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            expected = f"one of {', '.join(ROLES)}"
            raise UserError(f"message {number}: role must be {expected}, got {role!r:.60}")
        if not isinstance(content, str):
            kind = type(content).__name__
            raise UserError(f"message {number} ({role}): content must be a string, got {kind}")
        if not content.strip():
            raise UserError(f"message {number} ({role}): content is empty")
