"""The rows that adaptation trains on."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from stages.errors import UserError
from stages.tokenize.shards import open_shard, shard_paths


def load_rows(folder: Path, split: Literal["train", "validation"], *, seq_len: int, vocab_size: int) -> Tensor:
    """One split of a token folder as whole rows (R, seq_len + 1) int64; each row's last token begins the next one.

    A view of one stream on the CPU. Raises UserError on a damaged shard or a split shorter than one row.
    """
    paths = shard_paths(folder, "train" if split == "train" else "val")
    tokens = np.concatenate([open_shard(path, vocab_size=vocab_size) for path in paths]).astype(np.int64)
    if len(tokens) <= seq_len:
        raise UserError(f"{folder}: {len(tokens)} {split} tokens, expected more than model.seq_len = {seq_len}")
    return torch.from_numpy(tokens).unfold(0, seq_len + 1, seq_len)
