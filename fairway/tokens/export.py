"""From documents to everything in artifacts/tokens: the tokenizer, the token shards, and figures about them.

The first tokenize.val_documents documents of the file are held out for validation, and tokenize.val_limit_documents may
keep the first few of these alone. All others train, but for those whose text is that of a held-out document, and no
shard holds both. Beside the counts stands how small general-purpose compressors make the validation text: a yardstick
for a model's bits per byte.
"""

import lzma
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from fairway.runtime.errors import UserError
from fairway.runtime.files import file_sha256
from fairway.runtime.progress import Progress
from fairway.tokens.documents import documents_path, open_lines, read_texts, text_hash
from fairway.tokens.encoding import (
    CaseOpsEncoder,
    Encoded,
    LineBatch,
    encode_in_worker,
    make_batch_encoder,
    start_worker,
)
from fairway.tokens.fused_pairs import COUNTED_TOKENS, Pair, as_json, free_ids, learn_pairs
from fairway.tokens.shards import ShardWriter, Split
from fairway.tokens.tokenizer import RESERVED, TokenizeSettings, check_tokenizer, train_tokenizer


def check_documents(fetched: Path, settings: TokenizeSettings) -> tuple[Path, TokenizeSettings]:
    """The documents file of a folder, and the settings, in which a share of its documents has become their number.

    Raises UserError if the file is missing or holds too few documents, if no text validates or trains, or if the given
    tokenizer does not fit the settings.
    """
    documents = documents_path(fetched)
    if settings.model is not None:
        check_tokenizer(Path(settings.model), vocab_size=settings.vocab_size, operators=RESERVED[settings.transform])
    if isinstance(settings.val_documents, float):
        with open_lines(documents) as (lines, _):
            settings = settings.with_counts(sum(1 for _ in lines))
    require_documents(documents, settings)
    return documents, settings


def require_documents(documents: Path, settings: TokenizeSettings) -> None:
    """Raise UserError unless a document with text validates, and one behind the held-out ones may train.

    No more of the file is read than that needs.
    """
    texts, held_out = read_texts(documents), settings.held_out
    hashes = [text_hash(text) for text in islice(texts, held_out)]
    if not hashes:
        raise UserError(f"{documents}: no documents")
    if (first := next(texts, None)) is None:
        raise UserError(
            f"{documents}: {len(hashes)} documents, expected more than tokenize.val_documents = {held_out}; a share of "
            "them, such as 0.1, fits any number"
        )
    if set(hashes[: settings.scored_documents]) == {text_hash("")}:
        raise UserError(f"{documents}: the first {settings.scored_documents} documents, which validate, are all empty")
    known = set(hashes)
    if all(text_hash(text) in known for text in chain([first], texts)):
        raise UserError(
            f"{documents}: every document behind the first {held_out} (tokenize.val_documents) repeats one of them, so "
            "that none is left to train on"
        )


def held_out_hashes(documents: Path, settings: TokenizeSettings) -> frozenset[bytes]:
    """The hashes (text_hash) of the texts that are held out for validation."""
    return frozenset(text_hash(text) for text in islice(read_texts(documents), settings.held_out))


def tokenize_documents(documents: Path, folder: Path, settings: TokenizeSettings) -> dict[str, Any]:
    """Train the tokenizer or copy the given one, write the shards to `folder`, and return the content of meta.json.

    The tokenizer is trained on the training split alone. Raises UserError naming the line of a document at fault, if
    the text is too short for the vocabulary, or if the tokens of the validation split stand for no byte.
    """
    tokenizer, held_out = folder / "tokenizer.model", held_out_hashes(documents, settings)
    if settings.model is not None:
        shutil.copyfile(settings.model, tokenizer)
    else:
        behind = read_texts(documents, start=settings.held_out)
        texts = (text for text in behind if text_hash(text) not in held_out)
        trainer, transform = settings.trainer, settings.transform
        model = train_tokenizer(texts, vocab_size=settings.vocab_size, trainer=trainer, transform=transform)
        tokenizer.write_bytes(model)
    workers = len(os.sched_getaffinity(0))
    pairs = _frequent_pairs(documents, tokenizer, settings, held_out) if settings.fused_pairs else []
    meta = export(documents, tokenizer, folder, settings=settings, held_out=held_out, pairs=pairs, workers=workers)
    if not meta["val_bytes"]:
        raise UserError(
            f"{documents}: the tokenizer leaves nothing of the documents that validate, so that no byte can be scored"
        )
    validation = islice(read_texts(documents), settings.scored_documents)
    return meta | {"compressed_val_bytes": compressed_bytes(validation)}


def _frequent_pairs(
    documents: Path, tokenizer: Path, settings: TokenizeSettings, held_out: frozenset[bytes]
) -> list[Pair]:
    """The pairs that are most frequent in the first training tokens (fused_pairs.py)."""
    encoder = CaseOpsEncoder(tokenizer)
    tokens, counted = [], 0
    for text in read_texts(documents, start=settings.held_out):
        if counted >= COUNTED_TOKENS:
            break
        if text_hash(text) not in held_out:
            tokens.append(encoder.document(text, "train", str(documents)).tokens)
            counted += len(tokens[-1])
    return learn_pairs(np.concatenate(tokens), free_ids(encoder.tokenizer)[: settings.fused_pairs])


# How much text a process gets at a time: enough that sending it takes no time worth mentioning.
BATCH_BYTES = 1 << 20


def export(
    documents: Path,
    tokenizer: Path,
    folder: Path,
    *,
    settings: TokenizeSettings,
    held_out: frozenset[bytes],
    pairs: Sequence[Pair] = (),
    workers: int,
) -> dict[str, Any]:
    """Write val_*.bin, train_*.bin and, for CaseOps, val_bytes_*.bin to `folder`; return what meta.json says of them.

    Training documents with the text of a held-out one, whose hashes are given, are left out, and counted. `workers`
    processes share the work, or fewer if the file is small. The result does not depend on their number. Peak memory is
    one shard of each kind and a few batches per worker; a document longer than a batch (BATCH_BYTES) is encoded as a
    whole, which takes some 55 times its bytes. Raises UserError naming the line of a document at fault.
    """
    encoder_arguments = (tokenizer, settings.vocab_size, settings.transform, pairs, held_out)
    totals: dict[Split, Totals] = {"val": Totals(), "train": Totals()}
    workers = min(workers, 1 + documents.stat().st_size // BATCH_BYTES)
    with ExitStack() as stack:
        writers = {split: stack.enter_context(ShardWriter(folder, split, settings.shard_tokens)) for split in totals}
        sidecar = stack.enter_context(ShardWriter(folder, "val_bytes", settings.shard_tokens))
        lines, file = stack.enter_context(open_lines(documents))
        progress = stack.enter_context(Progress("tokenize", documents.stat().st_size, unit="B"))
        batches = _batches(lines, str(documents), settings)
        for batch, encoded in _encode_all(batches, encoder_arguments, workers):
            totals[batch.split].add(encoded)
            writers[batch.split].append(encoded.tokens)
            if encoded.sidecar is not None:
                sidecar.append(encoded.sidecar)
            progress.update(file.tell() - progress.done)
    return {
        "vocab_size": settings.vocab_size,
        "transform": settings.transform,
        "fused_pairs": as_json(pairs),
        "val_bytes": totals["val"].counted_bytes,
        "held_out_documents": settings.held_out,
        "dropped_train_documents": totals["train"].dropped,
        "repeated_train_documents": 0,
        **{
            f"{split}_{name}": getattr(count, name)
            for split, count in totals.items()
            for name in ("documents", "tokens", "text_bytes")
        },
        "sha256": {path.name: file_sha256(path) for path in [*sorted(folder.glob("*.bin")), tokenizer]},
    }


@dataclass
class Totals:
    """What is counted over the documents of one split, as Encoded does for a batch."""

    documents: int = 0
    dropped: int = 0
    tokens: int = 0
    text_bytes: int = 0
    counted_bytes: int = 0

    def add(self, encoded: Encoded) -> None:
        """Add a batch of documents."""
        self.documents += encoded.documents
        self.dropped += encoded.dropped
        self.tokens += len(encoded.tokens)
        self.text_bytes += encoded.text_bytes
        self.counted_bytes += encoded.counted_bytes


def _batches(lines: Iterator[bytes], source: str, settings: TokenizeSettings) -> Iterator[LineBatch]:
    """The lines in batches of about BATCH_BYTES, none of which holds documents of both splits.

    Documents that are held out but beyond the limit are in none.
    """
    scored, held_out = settings.scored_documents, settings.held_out
    held: list[bytes] = []
    first, held_bytes = 1, 0
    for number, line in enumerate(lines, start=1):
        if scored < number <= held_out:
            first = number + 1
            continue
        held.append(line)
        held_bytes += len(line)
        if held_bytes >= BATCH_BYTES or number == scored:
            yield LineBatch(source, "val" if first <= scored else "train", first, held)
            held, first, held_bytes = [], number + 1, 0
    if held:
        yield LineBatch(source, "val" if first <= scored else "train", first, held)


def _encode_all(
    batches: Iterator[LineBatch], encoder_arguments: tuple[Any, ...], workers: int
) -> Iterator[tuple[LineBatch, Encoded]]:
    """Encode the batches in `workers` processes and hand them on in their order.

    About two batches per worker wait or are worked on at a time, so that no process idles and memory stays small.
    """
    if workers == 1:
        encode = make_batch_encoder(*encoder_arguments)
        yield from ((batch, encode(batch)) for batch in batches)
        return
    pending: deque[tuple[LineBatch, Future[Encoded]]] = deque()
    # The processes are started anew ("spawn"), since a fork of this process, which has threads, could hang.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=start_worker, initargs=encoder_arguments) as pool:
        for batch in batches:
            pending.append((batch, pool.submit(encode_in_worker, batch)))
            if len(pending) > 2 * workers:
                yield _finished(pending)
        while pending:
            yield _finished(pending)


def _finished(pending: deque[tuple[LineBatch, "Future[Encoded]"]]) -> tuple[LineBatch, Encoded]:
    """Take the oldest pending batch off the queue and wait for its tokens."""
    batch, future = pending.popleft()
    return batch, future.result()


ZSTD_LEVEL = 19


def compressed_bytes(texts: Iterable[str]) -> dict[str, int]:
    """By compressor, how many bytes `xz -9e` and `zstd -19 --long=27` make of the texts joined together (UTF-8)."""
    parameters = zstandard.ZstdCompressionParameters.from_level(ZSTD_LEVEL, window_log=27, enable_ldm=True)
    compressors: dict[str, Any] = {
        "xz": lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME),
        "zstd": zstandard.ZstdCompressor(compression_params=parameters).compressobj(),
    }
    sizes = dict.fromkeys(compressors, 0)
    for text in texts:
        data = text.encode("utf-8")
        for name, compressor in compressors.items():
            sizes[name] += len(compressor.compress(data))
    return {name: sizes[name] + len(compressor.flush()) for name, compressor in compressors.items()}
