"""A vocabulary learned from text: the recipe that lib/tokenizer.py describes, for SentencePiece."""

import io
import re

import sentencepiece as spm

from lib.config import UserError, write_whole
from lib.tokenizer import BOS, EOS, IM_END, IM_START, PAD, SPACE, SPECIALS, UNK, Tokenizer

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
    write_whole(path, model.getvalue())
    return Tokenizer(model.getvalue(), str(path))


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
