"""The benchmark of certificates (benchmarks/certify.py) at toy size: which lines there are, and what they say."""

from pathlib import Path
from typing import Any

import torch
from test_records import toy

from benchmarks.certify import certificates
from fairway.params import Params

LORA: dict[str, Any] = {"batch_documents": 2, "rank": 2, "prefix_documents": 4, "phases": 2}
LORA |= {"global_chunk_tokens": 128, "lanes": 1}


def _toy(record: str) -> Params:
    params = toy(record, Path("documents.jsonl"))
    # Fewer layers, which still have every mechanism of the record.
    params["model"] |= {"layers": 4, "xsa_last_layers": 2, "lanes_from": 3}
    params["model"]["loop"] = {"first": 1, "last": 1, "repeats": 2}
    params["certify"] = {"tokens": 40}
    if "lora_ttt" in params:
        params["lora_ttt"] |= LORA
    return Params.model_validate(params)


def test_a_line_is_printed_for_each_evaluator_that_differs() -> None:
    """Of a record and its variants, which keep documents apart. The shortest ones are what phased TTT is tried on."""
    records = {name: _toy(name) for name in ("r1958", "r1958-train-ttt", "r1958-lora-ttt")}
    lines = list(certificates(records, ["sliding", "lora_ttt"], [140] * 8 + [1500] * 60, torch.device("cpu")))
    assert [(line.record, line.evaluator) for line in lines] == [
        ("r1958", "sliding"),
        ("r1958-train-ttt", "sliding"),
        ("r1958-lora-ttt", "lora_ttt"),
    ]
    *sliding, lora = lines
    assert [(line.verdict(), line.certified.starts_told) for line in sliding] == 2 * [("all pass", False)]
    # log2 of the number of ways to choose 67 of 91,072 places.
    assert lora.verdict() == "all pass; 790 bits must be told"
    assert lora.row().startswith("| r1958-lora-ttt | lora_ttt | 840 | 2 | 40 | all pass; ")
    assert "tried on the 6 shortest documents" in lora.sentences()
