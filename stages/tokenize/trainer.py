"""Train a SentencePiece BPE tokenizer, with the challenge's settings or with those that lose nothing.

Common to both: byte fallback, split digits, no dummy prefix, character coverage 0.999, ids 0 to 3 = pad, bos, eos, unk,
everything else the library's default. Method: byte-pair encoding, arXiv:1508.07909; SentencePiece, arXiv:1808.06226.
Source: train_tokenizer of the challenge's exporter.
"""

import io
from collections.abc import Iterator
from typing import Any, Literal

import sentencepiece

from stages.errors import UserError
from stages.tokenize import caseops
from stages.tokenize.encode import RESERVED, Transform

Trainer = Literal["lossless", "published"]

SETTINGS: dict[Trainer, dict[str, Any]] = {
    # Text as it is: a document comes back byte for byte, so its bytes are the raw bytes of the file.
    "lossless": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        # Indentation becomes one token instead of one per space.
        "allow_whitespace_only_pieces": True,
        # Documents are whole "sentences"; the default of 4192 bytes would drop the longer ones.
        "max_sentence_length": 2**30,
    },
    # Text folded (NFKC and more) and its whitespace merged and stripped, as in the published tokenizers.
    "published": {"normalization_rule_name": "nmt_nfkc"},
}


def train_tokenizer(texts: Iterator[str], *, vocab_size: int, trainer: Trainer, transform: Transform) -> bytes:
    """A trained model, serialized; the same texts give the same bytes.

    Raises UserError if the texts are too few for vocab_size pieces, or hold too many characters for it.
    """
    if trainer == "published":
        # The exporter cleaned the text it trained on, and only that.
        texts = (cleaned for text in texts if (cleaned := text.replace("\0", " ").strip()))
    if transform == "caseops":
        texts = map(caseops.encode, texts)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            user_defined_symbols=list(RESERVED[transform]),
            # The pieces do not depend on the number of threads, but the model records it.
            num_threads=1,
            minloglevel=2,
            **SETTINGS[trainer],
        )
    except RuntimeError as error:
        reason = str(error).strip().rpartition("] ")[2]
        raise UserError(
            f"params.yaml: tokenize.vocab_size ({vocab_size}): SentencePiece cannot train on this text: {reason}"
        ) from None
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if pieces != vocab_size:
        raise UserError(
            f"params.yaml: tokenize.vocab_size ({vocab_size}): the training split is only enough for {pieces} pieces"
        )
    return model.getvalue()
