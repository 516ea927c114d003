"""Text to ids and back: training and loading SentencePiece, chat templates, the Hugging Face tokenizer files.

The recipe is BPE with byte fallback and no normalization whatever, so that every text survives the round
trip: `decode(encode(text)) == text` for anything that is valid Unicode. Ids 0-3 are pad, bos, eos and unk, 4
and 5 the chat markers, then come the 256 bytes, the merged pieces, and last the single characters. The six
specials are *control* symbols: they have an id and no spelling. "<|im_end|>" in somebody's text is ten
harmless characters; only `render` puts the id of a marker into a conversation.

Where a text may be cut: no piece joins a line break to anything else (the trainer never sees the two
together), and in a piece with other characters a space stands only in front. Two texts that meet at a line
break, or at a single space that opens the second, therefore encode apart exactly as they encode in one.
`render` cuts only at such places: the supervised ids begin at the answer's first token, and all of them
together are what any other program gets from the conversation written out as one text.
"""

import codecs
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import sentencepiece as spm

from lib.config import UserError, read_object, write_whole

PAD, BOS, EOS, UNK = 0, 1, 2, 3
IGNORE = -100  # the label of a position that is not supervised, as torch's cross_entropy has it
NAMES = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>"}
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
# protobuf: normalizer_spec {add_dummy_prefix: false}; the last word counts
NO_DUMMY_PREFIX = b"\x1a\x02\x18\0"

# ---- training

THREADS = (
    4  # a constant: it is written into the model file, whose sha256 is to be the same everywhere
)
CUT = "\uffff"  # where no piece may cross; Unicode promises never to make it a character
UNTRAINABLE = re.compile(
    f"[\0\ud800-\udfff{SPACE}\u2585{CUT}]"
)  # a text with one of these would be dropped
LINE_BREAKS = re.compile(r"[\r\n]+")

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
    max_sentence_length=2**30,  # by default a text of more than 4,192 bytes is dropped
    pad_id=PAD,
    bos_id=BOS,
    eos_id=EOS,
    unk_id=UNK,
    control_symbols=[IM_START, IM_END],
    num_threads=THREADS,
    minloglevel=2,
    **{f"{role}_piece": name for role, name in NAMES.items()},
)


def train_tokenizer(texts: Iterable[str], path: str | Path, vocab_size: int) -> "Tokenizer":
    """Learn a vocabulary of `vocab_size` ids from `texts` and write it to `path`, a .model file, atomically.

    The same texts in the same order give the same bytes, on any machine. SentencePiece holds the texts in
    memory, some ten bytes for each character: give it a sample of a large corpus. Raises UserError when the
    texts are too few for `vocab_size`, or `vocab_size` is too small for the bytes and the characters of the
    texts. What `texts` raises goes through.
    """
    path, size, failure, model = Path(path), 0, None, io.BytesIO()

    def sentences():
        nonlocal size, failure
        try:
            for text in texts:
                size += len(text)
                yield LINE_BREAKS.sub(rf"{CUT}\g<0>{CUT}", UNTRAINABLE.sub(" ", text))
        except BaseException as error:  # SentencePiece would make a RuntimeError of it
            failure = error
            raise

    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            vocab_size=max(vocab_size, 6),
            **RECIPE,
        )
    except RuntimeError as error:
        raise failure or _training_error(str(error), vocab_size, size) from None
    tokenizer = Tokenizer(model.getvalue(), str(path))
    write_whole(path, tokenizer.model)
    return tokenizer


def _training_error(message: str, vocab_size: int, size: int) -> Exception:
    """SentencePiece's complaint in our words, with the number that mends it."""
    if size == 0:
        return UserError(
            "no text to train a tokenizer on: there are no documents, or all are empty"
        )
    if largest := re.search(r"value <= (\d+)", message):
        return UserError(
            f"vocab_size {vocab_size} is too large for {size:,} characters of text, which support at most "
            f"{largest[1]}: set vocab_size={largest[1]} or give more text"
        )
    if needed := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"vocab_size {vocab_size} is too small: 6 specials, 256 bytes and the characters of these texts "
            f"need at least {needed[1]}"
        )
    return RuntimeError(message)


# ---- text and ids


class Tokenizer:
    """A trained SentencePiece model: ours, or a foreign one such as Llama's `tokenizer.model`.

    `model` is the .model file as bytes, `sha256` their hash, `pieces` the vocabulary as SentencePiece spells
    it, `template` the chat template named by the folder it came from, or None. A foreign model may lack the
    chat markers (`im_start_id` and `im_end_id` are then None) and padding (`pad_id` is then the eos id);
    `dummy_prefix` says whether it puts a space before every text. A foreign folder may bring more control
    symbols (`added`, {id: symbol}), name those that open and end a text (`roles`), and have a chat template
    that is not read here (`foreign_template`). `exact`: `save` wrote the folder, so there are no other ids.
    """

    file = "tokenizer.model"  # what `model` is called in a folder
    unreadable = "not a SentencePiece model, or a damaged one"

    def __init__(
        self,
        model: bytes,
        source: str = "tokenizer.model",
        template: str | None = None,
        added: Mapping[int, str] = MappingProxyType({}),
        roles: Mapping[str, object] = MappingProxyType({}),
    ):
        self.model, self.template, self.source, self.exact = model, template, source, False
        self.foreign_template = False
        self.sha256 = hashlib.sha256(model).hexdigest()
        try:
            self._roles = self._open(model)
            self.dummy_prefix = self._bytes[self.encode("a")[0]].startswith(b" ")
        except UserError:
            raise
        except (
            Exception
        ) as error:  # a damaged file fails in many ways, none of them worth telling apart
            raise UserError(f"{source}: {self.unreadable}") from error
        self._size = len(self.pieces)
        self._add(max(added, default=-1) + 1, added)
        self._name(roles)

    def _open(self, model: bytes) -> dict[str, int]:
        """Read `pieces` and the text of each, `_bytes`; returns {role: id}, -1 for a role without one."""
        self._spm = sp = spm.SentencePieceProcessor()
        sp.load_from_serialized_proto(model)
        self.pieces = [sp.id_to_piece(id) for id in range(sp.get_piece_size())]
        self._bytes = [_piece_bytes(sp, id, piece) for id, piece in enumerate(self.pieces)]
        self._inner = spm.SentencePieceProcessor()
        self._inner.load_from_serialized_proto(model + NO_DUMMY_PREFIX)
        self._space_ids = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        return {role: getattr(sp, f"{role}_id")() for role in NAMES}

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Open a .model file, or the tokenizer of a folder; raises UserError if missing or broken.

        A folder that `save` wrote also names its chat template, and the hash of its model, which is verified.
        In one that transformers wrote, symbols may lie beyond tokenizer.model, and others may open and end a
        text. A tokenizer.json alone is read by the `tokenizers` package.
        """
        path = Path(path)
        if not path.is_dir():
            return cls(_read(path), str(path))
        config = _read_config(path / "tokenizer_config.json")
        sha256, (added, words) = config.get("tokenizer_model_sha256"), _added_tokens(path, config)
        only_json = not (path / cls.file).exists() and (path / JSONTokenizer.file).exists()
        kind = JSONTokenizer if only_json else cls
        path /= kind.file
        roles = {role: config.get(f"{role}_token") for role in NAMES}
        tokenizer = kind(_read(path), str(path), config.get("chat_template_name"), added, roles)
        if words := [added[id] for id in sorted(words) if id >= tokenizer._size]:
            raise UserError(
                f"{path}: the folder adds the word {words[0]!r}, which only the tokenizers package finds in "
                "a text: pip install tokenizers, and move this file away for its tokenizer.json to be read"
            )
        tokenizer.exact = not only_json and sha256 is not None
        jinja_file = path.with_name("chat_template.jinja")
        tokenizer.foreign_template = sha256 is None and (
            "chat_template" in config or jinja_file.exists()
        )
        if tokenizer.exact and tokenizer.sha256 != sha256:
            raise UserError(
                f"{path}: checksum mismatch (expected {str(sha256)[:12]}, got {tokenizer.sha256[:12]}): "
                "the file is damaged, or from another model"
            )
        return tokenizer

    def _add(self, size: int, symbols: Mapping[int, str] = MappingProxyType({})) -> None:
        """Take control symbols beyond the file's own pieces, up to `size` ids in all; the rest are unused."""
        for id in range(len(self.pieces), size):
            self.pieces.append(symbols.get(id, f"<unused_{id}>"))
            self._bytes.append(b"")
        self.vocab_size = len(self.pieces)
        self._specials = {piece: id for id, piece in enumerate(self.pieces) if not self._bytes[id]}
        self.im_start_id, self.im_end_id = self._specials.get(IM_START), self._specials.get(IM_END)

    def _name(self, roles: Mapping[str, object]) -> None:
        """Take the symbols of roles from a tokenizer_config.json; raises UserError if none ends a text."""
        for role, symbol in roles.items():
            symbol = symbol.get("content") if isinstance(symbol, dict) else symbol
            if str(symbol) in self._specials:
                self._roles[role] = self._specials[str(symbol)]
            elif symbol is not None and role in ("bos", "eos"):
                raise UserError(
                    f"{self.source}: no control symbol is {symbol!r:.60}, which tokenizer_config.json names "
                    f"as {role}_token; correct one of the two"
                )
        self.bos_id, self.eos_id, self.unk_id = (
            self._roles[role] for role in ("bos", "eos", "unk")
        )
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError(
                f"{self.source}: lacks a symbol that opens a text, or one that ends it; name them in "
                "tokenizer_config.json as bos_token and eos_token"
            )
        self.pad_id = self._roles["pad"] if self._roles["pad"] >= 0 else self.eos_id

    def without_template(self, folder: str | Path) -> str:
        """Return the sentence that says what becomes of a chat where `template` is None."""
        known = ", ".join(TEMPLATES)
        why = (
            f"a chat template that is none of {known}"
            if self.foreign_template
            else "no chat template"
        )
        return f"{folder} has {why}: each text is continued as it stands"

    def match(self, size: int, folder: str | Path) -> None:
        """Become the tokenizer of the model in `folder`, which has `size` ids; UserError if they do not fit.

        Other programs round a model's vocabulary up: the ids beyond are symbols that nothing reads or writes.
        """
        if size < self.vocab_size or (size > self.vocab_size and self.exact):
            raise UserError(
                f"{folder}: the model has {size} tokens, its tokenizer {self.vocab_size}; "
                "they do not belong together"
            )
        self._add(size)

    def encode(self, text: str, after: int | None = None) -> list[int]:
        """Return the ids of `text`, never a control id; raises UserError for a lone surrogate.

        `after`: the id it follows; what follows text gets no dummy prefix. SentencePiece takes a literal
        U+2581 for a space; here its three bytes are encoded, and decode to it.
        """
        try:
            sp = self._inner if after is not None and self._bytes[after] else self._spm
            first, *rest = text.split(SPACE)
            ids = sp.encode(first)
            for part in rest:
                ids += self._space_ids + self._inner.encode(part)
            return ids
        except RuntimeError as error:
            raise _text_error(text) or error from None

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """Return the ids of each text, as `encode` does, on `num_threads` threads."""
        try:
            rows = self._spm.encode(list(texts), num_threads=num_threads)
        except (RuntimeError, TypeError) as error:
            raise next(filter(None, map(_text_error, texts)), error) from None
        return [self.encode(text) if SPACE in text else row for text, row in zip(texts, rows)]

    def decode(self, ids: Iterable[int], controls: bool = False) -> str:
        """Return the text of `ids`; control ids vanish, or stand there by name with `controls`.

        Bytes that are no UTF-8 become U+FFFD. Raises UserError for an id outside the vocabulary.
        """
        text = b"".join(self.spelled(id, controls) for id in ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.dummy_prefix else text

    def spelled(self, id: int, controls: bool = True) -> bytes:
        """Return the UTF-8 of one id as it stands amid a text; of a control id its name, or nothing."""
        return self._bytes[self._checked(id)] or (self.pieces[id].encode() if controls else b"")

    def stream(self, begun: bool = False) -> "Stream":
        """Return a decoder for ids that arrive one by one; `begun`: to continue a text, not to begin one."""
        return Stream(self, begun)

    def token_bytes(self) -> np.ndarray:
        """Return (V,) int64: how many UTF-8 bytes of text an id stands for, 0 for control ids."""
        return np.array([len(spelled) for spelled in self._bytes], dtype=np.int64)

    @property
    def scores(self) -> list[float]:
        """SentencePiece's score of each id: of two merges the one that makes the higher goes first."""
        own = [self._spm.get_score(id) for id in range(self._size)]
        return own + [0.0] * (self.vocab_size - self._size)

    def _checked(self, id: int) -> int:
        if not 0 <= id < self.vocab_size:
            raise UserError(f"token id {id} is outside 0..{self.vocab_size - 1}")
        return id

    def save(self, folder: str | Path, max_length: int, template: str | None = None) -> None:
        """Write the tokenizer into a model folder: tokenizer.model, and what `AutoTokenizer` reads.

        `max_length` is the model's context in tokens. `template` names the chat template that the model is
        trained in, by default the one this tokenizer came with. With neither, the folder names none and
        offers chatml.
        """
        template = template or self.template
        offered = template or ("chatml" if self.im_start_id is not None else None)
        ids = {role: getattr(self, f"{role}_id") for role in NAMES}
        specials = {f"{role}_token": self.pieces[id] for role, id in ids.items() if id >= 0}
        markers = [marker for marker in (IM_START, IM_END) if marker in self._specials]
        specials["additional_special_tokens"] = markers
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # a Llama class would split the text its own way
            **specials,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length,
            "model_input_names": ["input_ids", "attention_mask"],
            "tokenizer_model_sha256": self.sha256,
        }
        if added := range(self._size, self.vocab_size):
            config["added_tokens_decoder"] = {
                id: {"content": self.pieces[id], **CONTROL} for id in added
            }
        if offered:
            config["chat_template"] = jinja(_template(self, offered))
        if template:
            config["chat_template_name"] = template
        folder = Path(folder)
        write_whole(folder / self.file, self.model)
        if self.file != JSONTokenizer.file:
            write_whole(folder / JSONTokenizer.file, _json(_hugging_face(self)))
        write_whole(folder / "special_tokens_map.json", _json(specials))
        write_whole(folder / "tokenizer_config.json", _json(config))


class Stream:
    """Decodes ids as they arrive: what it gives out, flush included, is `decode` of all the ids pushed."""

    def __init__(self, tokenizer: Tokenizer, begun: bool = False):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer.dummy_prefix and not begun

    def push(self, id: int) -> str:
        """Return the text that `id` completes: whole characters only, so "" in the middle of an emoji."""
        return self._emit(self._utf8.decode(self._tokenizer.spelled(id, controls=False)))

    def flush(self) -> str:
        """Return what is left at the end: "", or U+FFFD for a character that was never completed."""
        return self._emit(self._utf8.decode(b"", final=True))

    def _emit(self, text: str) -> str:
        if self._strip and text:
            self._strip, text = False, text.removeprefix(" ")
        return text


def _piece_bytes(sp: spm.SentencePieceProcessor, id: int, piece: str) -> bytes:
    """The UTF-8 text an id stands for: none for a control symbol, a byte for "<0x41>", else the piece."""
    return b"" if sp.is_control(id) or sp.is_unknown(id) else _spelled(piece)


def _spelled(piece: str) -> bytes:
    byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(SPACE, " ").encode()


def _text_error(text: str) -> Exception | None:
    """Why SentencePiece would not take a text, None if it is not the text's fault."""
    if lone := re.search("[\ud800-\udfff]", text):
        return UserError(
            f"not Unicode text: lone surrogate U+{ord(lone[0]):04X} at character {lone.start()}"
        )
    return None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        expected = "a SentencePiece .model file, or a folder that holds tokenizer.model"
        raise UserError(f"{path}: {error.strerror}; a tokenizer is {expected}") from error


def _read_json(path: Path) -> dict:
    """The object in a JSON file, {} if there is no file; raises UserError if it is broken."""
    return read_object(path) if path.exists() else {}


def _read_config(path: Path) -> dict:
    """The tokenizer_config.json of a folder, {} if it has none; raises UserError if it is broken."""
    config = _read_json(path)
    name = config.get("chat_template_name")
    if name is not None and name not in list(TEMPLATES):
        raise UserError(f"{path}: chat_template_name {name!r} is not one of {', '.join(TEMPLATES)}")
    return config


def _added_tokens(folder: Path, config: dict) -> tuple[dict[int, str], set[int]]:
    """What a folder adds to its vocabulary: ({id: symbol}, ids of those that are words of a text).

    Each generation of transformers wrote it into another file; this program: into tokenizer_config.json.
    Raises UserError for nonsense.
    """
    try:
        added = {int(id): token for id, token in config.get("added_tokens_decoder", {}).items()}
        if "tokenizer_model_sha256" not in config and (folder / Tokenizer.file).exists():
            older = _read_json(folder / "added_tokens.json")
            newer = _read_json(folder / JSONTokenizer.file).get("added_tokens", [])
            added = {id: {"content": symbol} for symbol, id in older.items()} | added
            added |= {token["id"]: token for token in newer}
        symbols = {id: token["content"] for id, token in added.items()}
        words = {id for id, token in added.items() if not token.get("special", True)}
        if not all(0 <= id < 1 << 20 and isinstance(symbol, str) for id, symbol in symbols.items()):
            raise ValueError(added)
    except (AttributeError, KeyError, TypeError, ValueError):
        told = "the tokens added to its vocabulary are no list of symbols and ids"
        raise UserError(f"{folder}: {told}") from None
    return symbols, {id for id in words if not re.fullmatch(r"<.+>|\[.+\]", symbols[id])}


# ---- the Hugging Face files

CONTROL = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}


class JSONTokenizer(Tokenizer):
    """A tokenizer.json as the `tokenizers` package reads it: byte-level BPE as Llama 3's, or SentencePiece's.

    `model` are the bytes of that file. No text makes a control symbol here either.
    """

    file = "tokenizer.json"
    unreadable = "not a byte-level or SentencePiece BPE, the kinds of tokenizer.json that load, or a damaged one"

    def _open(self, model: bytes) -> dict[str, int]:
        try:
            import tokenizers
        except ImportError:
            raise UserError(
                f"{self.source}: takes the tokenizers package: pip install tokenizers (or put beside it the "
                "SentencePiece tokenizer.model that it was made from)"
            ) from None
        spec = json.loads(model)
        inner = spec | {
            part: _without_prefix(spec.get(part)) for part in ("normalizer", "pre_tokenizer")
        }
        self._json, self._inner = (
            tokenizers.Tokenizer.from_str(json.dumps(one)) for one in (spec, inner)
        )
        for one in (self._json, self._inner):
            one.encode_special_tokens = True  # as the text they are
            one.no_truncation()
            one.no_padding()
        self._prefix_after_symbols = "Prepend" in json.dumps(spec.get("normalizer"))
        ids, spell = self._json.get_vocab(with_added_tokens=True), _spelling(spec)
        texts = {token["content"]: b"" if token["special"] else token["content"].encode()
                 for token in spec["added_tokens"]}  # fmt: skip
        names = {id: name for name, id in ids.items()}
        self.pieces = [names.get(id, f"<unused_{id}>") for id in range(max(names) + 1)]
        self._bytes = [
            b"" if id not in names else texts[name] if name in texts else spell(name)
            for id, name in enumerate(self.pieces)
        ]
        own = {role: name for role, name in NAMES.items() if texts.get(name) == b""}
        return {role: ids.get(own.get(role), -1) for role in NAMES}

    def encode(self, text: str, after: int | None = None) -> list[int]:
        if error := _text_error(text):
            raise error
        begins = after is None or (self._prefix_after_symbols and not self._bytes[after])
        return (self._json if begins else self._inner).encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        return [self.encode(text) for text in texts]


def _without_prefix(part: object) -> object:
    """A normalizer or pre-tokenizer of a tokenizer.json, but without a space before the text."""
    if isinstance(part, list):
        return [_without_prefix(one) for one in part if one.get("type") != "Prepend"]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    off = {"prepend_scheme": "never", "add_prefix_space": False}
    return {key: off.get(key, _without_prefix(value)) for key, value in part.items()}


def _spelling(spec: dict) -> Callable[[str], bytes]:
    """How a piece of a tokenizer.json is spelled in bytes; KeyError for a kind that is unknown here."""
    decoder = spec["decoder"]
    kinds = {part["type"] for part in decoder.get("decoders", [decoder])}
    if spec["model"]["type"] != "BPE" or not kinds & {"ByteFallback", "ByteLevel"}:
        raise KeyError("decoder")
    if "ByteFallback" in kinds:
        return _spelled
    # GPT-2's alphabet (Radford et al. 2019): what Latin-1 prints is its own byte, others are U+0100 onwards
    plain = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = sorted(set(range(256)) - set(plain))
    letters = {chr(byte): byte for byte in plain} | {
        chr(256 + n): byte for n, byte in enumerate(others)
    }
    return lambda piece: bytes(letters[letter] for letter in piece)


def _hugging_face(tokenizer: Tokenizer) -> dict:
    """The contents of tokenizer.json, for the `tokenizers` library: the same ids, and no BOS unasked."""
    pieces, is_byte = tokenizer.pieces, tokenizer._spm.is_byte
    normal = {
        piece: id for id, piece in enumerate(pieces) if tokenizer._bytes[id] and not is_byte(id)
    }
    to_space = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    from_space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    encoding, decoding = [from_space], [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if tokenizer.dummy_prefix:
        encoding.insert(0, {"type": "Prepend", "prepend": SPACE})
        decoding.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": id, "content": name, **CONTROL} for name, id in tokenizer._specials.items()
        ],
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
            "merges": _merges(normal),
        },
    }


def _merges(ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best piece first: the order in which SentencePiece merges."""
    merges = []
    for piece in ids:
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        known = [(left, right) for left, right in halves if left in ids and right in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def _json(value: dict) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode() + b"\n"


# ---- conversations


class Template(NamedTuple):
    """How a conversation is written: heads[role] + content + ends[role] is a message, `between` joins two.

    The markers `<|im_start|>`, `<|im_end|>` and `</s>` in it become control ids: this is our text, the
    content is not. A space at the end of a head belongs to the first token of the content.
    """

    heads: dict[str, str]
    ends: dict[str, str]
    between: str


ROLES = ("system", "user", "assistant")
EOS_AFTER_ANSWER = {"system": "", "user": "", "assistant": NAMES["eos"]}
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


def render(
    tokenizer: Tokenizer,
    messages: Sequence[dict],
    template: str,
    add_generation_prompt: bool = False,
) -> tuple[list[int], list[int]]:
    """Write a conversation as ids, with mask 1 on what the assistant has to say: its answers and their ends.

    `messages` are {"role": system | user | assistant, "content": text}. Whitespace around a content is
    trimmed, so that it meets the template's line breaks at a safe place (see the top of this file). The ids
    begin with BOS and are those of `apply_chat_template` on the saved folder, except that a marker spelled
    out in a content stays text, and that a foreign vocabulary may join line breaks to other characters; as
    training and chat both render here, they agree even then.

    `add_generation_prompt` opens the next answer. The line break before `<|im_end|>` in chatml, and the space
    after "Assistant:" in chat, are the model's to write: strip its answers. Returns (ids, mask), lists of one
    length. Raises UserError naming the message that is not well formed.
    """
    shape = _template(tokenizer, template)
    _check(messages)
    ids, mask = [tokenizer.bos_id], [0]

    def write(more: list[int], supervised: bool = False) -> None:
        ids.extend(more)
        mask.extend([int(supervised)] * len(more))

    for index, message in enumerate(messages):
        role = message["role"]
        head = shape.heads[role].rstrip(" ")
        space = shape.heads[role].removeprefix(head)
        write(_template_ids(tokenizer, (shape.between if index else "") + head, ids[-1]))
        supervised = role == "assistant"
        write(tokenizer.encode(space + message["content"].strip(), ids[-1]), supervised)
        write(_template_ids(tokenizer, shape.ends[role], ids[-1]), supervised)
    if add_generation_prompt:
        write(
            _template_ids(tokenizer, shape.between + shape.heads["assistant"].rstrip(" "), ids[-1])
        )
    return ids, mask


def usual_template(tokenizer: Tokenizer) -> str:
    """Return the template to take where none is asked for: the folder's own, else chatml, else instruct.

    Chatml where the vocabulary has its markers; a foreign one seldom has.
    """
    marked = None not in (tokenizer.im_start_id, tokenizer.im_end_id)
    return tokenizer.template or ("chatml" if marked else "instruct")


def stop_ids(tokenizer: Tokenizer, template: str | None) -> list[int]:
    """Return the ids that end an answer: EOS, and the template's own end (None, plain text, has none)."""
    if template is None:
        return [tokenizer.eos_id]
    end = _template_ids(
        tokenizer, _template(tokenizer, template).ends["assistant"], tokenizer.bos_id
    )
    return sorted({tokenizer.eos_id, end[-1]})


def jinja(shape: Template) -> str:
    """Return the template for `apply_chat_template`, with what every Jinja dialect knows: for, if, trim."""

    def put(text: str) -> str:
        if text == NAMES["eos"]:
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


def _template(tokenizer: Tokenizer, name: str) -> Template:
    if name not in TEMPLATES:
        raise UserError(f"unknown template {name!r}: choose one of {', '.join(TEMPLATES)}")
    if name == "chatml" and None in (tokenizer.im_start_id, tokenizer.im_end_id):
        raise UserError(
            f"the template chatml needs {IM_START}, and this tokenizer has none: choose instruct or chat"
        )
    return TEMPLATES[name]


def _template_ids(tokenizer: Tokenizer, text: str, after: int) -> list[int]:
    """The ids of a template's own text, its markers as control ids, where it follows the id `after`."""
    markers = {
        IM_START: tokenizer.im_start_id,
        IM_END: tokenizer.im_end_id,
        NAMES["eos"]: tokenizer.eos_id,
    }
    parts = re.split(f"({'|'.join(map(re.escape, markers))})", text)
    ids = [after]
    for part in filter(None, parts):
        ids += [markers[part]] if part in markers else tokenizer.encode(part, ids[-1])
    return ids[1:]


def _check(messages: Sequence[dict]) -> None:
    """Raise UserError, naming the message by its number, unless this is a conversation."""
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError("a conversation must be a list of at least one message")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise UserError(f"message {number}: must be an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(
                f"message {number}: role must be one of {', '.join(ROLES)}, got {role!r:.60}"
            )
        if not isinstance(content, str):
            kind = type(content).__name__
            raise UserError(f"message {number} ({role}): content must be a string, got {kind}")
        if not content.strip():
            raise UserError(f"message {number} ({role}): content is empty")
