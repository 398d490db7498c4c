"""Turn the documents into token shards.

Reads:  data/docs: the documents, or the shards of a published export
Writes: artifacts/tokens: train_*.bin and val_*.bin, for CaseOps also val_bytes_*.bin (the bytes of each validation
        token), tokenizer.model, and meta.json with counts, bytes and the SHA-256 of every file
Method: SentencePiece BPE (arXiv:1808.06226), trained on the training split alone, or a given model
Source: the challenge's exporter; CaseOps: PR #1729. Ours: the default tokenizer loses nothing, where the published ones
        fold text (nmt_nfkc) and strip whitespace.
"""

import json
from pathlib import Path
from typing import Any

from fairway.params import load_params
from fairway.runtime.errors import no_arguments, run_stage
from fairway.runtime.files import output_folder, write_atomic
from fairway.tokens.export import check_documents, tokenize_documents
from fairway.tokens.hub import adopt_export


def main() -> None:
    """Tokenize the documents, or take over published shards, and write meta.json beside them."""
    no_arguments("tokenize")
    settings = load_params("params.yaml").tokenize
    fetched = Path("data/docs")
    hosted = (fetched / "hub.json").is_file()
    documents, settings = (fetched, settings) if hosted else check_documents(fetched, settings)
    with output_folder(Path("artifacts/tokens")) as folder:
        make = adopt_export if hosted else tokenize_documents
        meta = make(documents, folder, settings)
        write_atomic(folder / "meta.json", json.dumps(meta, indent=2) + "\n")
    for split in ("train", "val"):
        print(f"tokenize: {split}: {meta[f'{split}_documents']} documents, {meta[f'{split}_tokens']} tokens")
    print(f"tokenize: {_repeats(meta)}")
    if meta["val_text_bytes"] not in (None, meta["val_bytes"]):
        counted, raw = meta["val_bytes"], meta["val_text_bytes"]
        print(f"tokenize: the tokenizer folds text: {counted} bytes are counted for {raw} bytes of validation text")


def _repeats(meta: dict[str, Any]) -> str:
    """What became of training documents that repeat a held-out one."""
    if repeated := meta["repeated_train_documents"]:
        return f"{repeated} documents of the published training shards repeat one held out for validation"
    dropped = meta["dropped_train_documents"]
    return f"{dropped} documents are not trained on, since their text is that of a document held out for validation"


if __name__ == "__main__":
    run_stage(main)
