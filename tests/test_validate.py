"""Validation during training against the published programs' (golden/sliding.npz; evaluate.md 1)."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import ranks
from streams import golden, golden_network, golden_tokens

from fairway.runtime.distributed import alone, start_world
from fairway.tokens.data_orders import document_bounds
from fairway.tokens.validation import Validation
from fairway.training.loop import validate

ALONE = alone(torch.device("cpu"))


def _from_table(tokens: np.ndarray) -> np.ndarray:
    table, previous, current = golden("sliding"), tokens[:-1], tokens[1:]
    spaces = table["lut_space"][current].astype(bool) & ~table["lut_boundary"][previous].astype(bool)
    counts: np.ndarray = table["lut_base"][current] + spaces
    return counts


def test_rows_score_as_in_the_published_program() -> None:
    tokens = golden_tokens("sliding", "stream")
    validation = Validation(tokens, torch.from_numpy(_from_table(tokens.numpy())).long())
    expected = golden("sliding")["config"]["plain"]
    loss, bpb = validate(golden_network("r1150", 64), validation, ALONE, row=64, batch_tokens=4 * 64, looped=True)
    assert loss == pytest.approx(expected["val_loss"], abs=1e-5)
    assert bpb == pytest.approx(expected["val_bpb"], abs=1e-5)


def score_packed_rows() -> None:
    """Leave in the current folder, by its rank, what this process finds."""
    tokens = golden_tokens("sliding", "stream")
    validation = Validation(tokens, torch.from_numpy(_from_table(tokens.numpy())).long())
    segment, model = partial(document_bounds, cut=64, bucket=16), golden_network("r1958", 64)
    with start_world() as world:
        found = validate(model, validation, world, row=64, batch_tokens=4 * 64, looped=True, segment=segment)
        torch.save(found, f"{world.size}_{world.rank}.pt")


def test_several_processes_score_the_same_packed_rows_as_one(tmp_path: Path) -> None:
    ranks(score_packed_rows, tmp_path, processes=3)
    ranks(score_packed_rows, tmp_path, processes=1)
    for rank in range(3):
        assert torch.load(tmp_path / f"3_{rank}.pt") == pytest.approx(torch.load(tmp_path / "1_0.pt"), abs=1e-12)


def test_packed_rows_score_as_in_the_published_program() -> None:
    """Which leaves out the last rows that do not fill a batch."""
    expected = golden("sliding")["config"]["plain_docs"]
    tokens = golden_tokens("sliding", "stream")[: expected["scored"] + 1]
    sidecar = torch.from_numpy(golden("sliding")["sidecar"]).long()
    validation = Validation(tokens, sidecar[1 : expected["scored"] + 1])
    segment = partial(document_bounds, cut=64, bucket=16)
    model = golden_network("r1958", 64)
    loss, bpb = validate(model, validation, ALONE, row=64, batch_tokens=4 * 64, looped=True, segment=segment)
    assert loss == pytest.approx(expected["val_loss"], abs=1e-5)
    assert bpb == pytest.approx(expected["val_bpb"], abs=1e-5)
