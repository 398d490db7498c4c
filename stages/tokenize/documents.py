"""Documents to everything in artifacts/tokens: tokenizer, shards, and the yardsticks beside them."""

import os
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

from stages.fetch.documents import documents_path, read_texts
from stages.params import Tokenize
from stages.tokenize.compressors import compressed_bytes
from stages.tokenize.encode import RESERVED
from stages.tokenize.export import export, require_documents
from stages.tokenize.tokenizer import check_tokenizer
from stages.tokenize.trainer import train_tokenizer


def check_documents(fetched: Path, settings: Tokenize) -> Path:
    """The documents file, after the checks that come before any work."""
    documents = documents_path(fetched)
    if settings.model is not None:
        check_tokenizer(Path(settings.model), vocab_size=settings.vocab_size, operators=RESERVED[settings.transform])
    require_documents(documents, settings.val_documents)
    return documents


def tokenize_documents(documents: Path, folder: Path, settings: Tokenize) -> dict[str, Any]:
    """Train or copy the tokenizer, write the shards, and return what meta.json says."""
    tokenizer = folder / "tokenizer.model"
    if settings.model is not None:
        shutil.copyfile(settings.model, tokenizer)
    else:
        texts = read_texts(documents, start=settings.val_documents)
        trainer, transform = settings.trainer, settings.transform
        model = train_tokenizer(texts, vocab_size=settings.vocab_size, trainer=trainer, transform=transform)
        tokenizer.write_bytes(model)
    meta = export(documents, tokenizer, folder, settings=settings, workers=len(os.sched_getaffinity(0)))
    validation = islice(read_texts(documents), settings.val_documents)
    return meta | {"compressed_val_bytes": compressed_bytes(validation)}
