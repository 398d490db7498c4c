"""Overlapping windows, each target scored once with at least seq_len - stride tokens before it.

With within_documents a target sees so many tokens of its own document alone, or all of them that come before it.
Source: sliding-window evaluation of PR #1493 and #1958, which leave documents unseparated; with published_window_list
that of PR #549, #1150, #1172 and #1488. Ours: within documents.
"""

from dataclasses import dataclass

from torch import Tensor

from fairway.evaluation.evaluator import Evaluator
from fairway.evaluation.passes import Pass
from fairway.evaluation.scoring import WindowPass, WindowSettings, in_chunks, stream_windows
from fairway.evaluation.windows import runs
from fairway.model.gpt import GPT
from fairway.runtime.distributed import World


class SlidingSettings(WindowSettings):
    """Overlapping windows, each token scored once."""


@dataclass(frozen=True)
class SlidingEvaluator(Evaluator):
    """A fixed network and a fixed window."""

    settings: SlidingSettings

    def begin(self, model: GPT, tokens_N1: Tensor, world: World) -> Pass:
        """Nothing is learned, and so chunks are only runs of batches."""
        s = self.settings
        windows, seq_len = stream_windows(model, tokens_N1, s), model.config.seq_len
        # Apart from those that the stream's ends make different, which would each spoil a large batch.
        usual = (windows.first == seq_len - s.stride) & (windows.length == seq_len)
        parts = [windows] if s.within_documents else runs(windows, usual)
        chunks = [chunk for part in parts for chunk in in_chunks(part, s.batch_windows, s.stretch)]
        return WindowPass(
            model, tokens_N1, chunks, world, batch_windows=s.batch_windows, width=s.stride, stretch=s.stretch
        )
