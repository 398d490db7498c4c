"""Somebody who goes through a stream with an evaluator and knows of it no more than is filled in by and by.

Legend: N targets, M targets predicted together, V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fairway.certification.black_box import Baseline, BlackBox, copied
from fairway.certification.stepping import make_stepper
from fairway.evaluation.passes import State
from fairway.tokens.tokenizer import BOS


class Follower:
    """The next distribution, given the tokens that `buffer_N1` holds by now.

    `asked_N` (N,) bool marks all targets that will be asked for. When one in a later chunk is asked for, the pass
    learns from the chunks before it with their tokens as they then stand, and predicts of them only what learning
    needs. `states` are what a pass had adapted behind its first chunks (Pass.state); with them learning is skipped.
    """

    def __init__(
        self, box: BlackBox, base: Baseline, buffer_N1: Tensor, asked_N: Tensor, states: Sequence[State] = ()
    ) -> None:
        self.box, self.chunk_N, self.buffer_N1, self.asked_N = box, base.chunk_N, buffer_N1, asked_N
        self.states = states
        # The chunk that every token is scored in. The first token is in none, and is never filled in.
        self._chunk_N1 = F.pad(base.chunk_N, (1, 0)).to(buffer_N1.device)
        self._begin(0, None)

    @property
    def exact(self) -> bool:
        """Whether what it predicts has the bits that an ordinary pass gives."""
        return self._stepper.exact

    def fill(self, which: int | Tensor, tokens: Tensor) -> None:
        """Take tokens that have become known, at one place of the buffer or at all marked ones (N+1,) bool.

        If the pass has learned from other tokens in their places, it is begun anew. Where a document starts may decide
        how a pass deals with what comes after it; if that has changed, it is begun anew in the state that it is in, and
        the stepper keeps what it has in its cache.
        """
        before = self.buffer_N1[which]
        learned_from = bool(((before != tokens) & (self._chunk_N1[which] < self._chunk)).any())
        starts_changed = bool(((before == BOS) != (tokens == BOS)).any())
        self.buffer_N1[which] = tokens
        if learned_from:
            self._begin(0, None)
        elif starts_changed:
            stepper = self._stepper
            self._begin(self._chunk, self._pass.state() if self._chunk else None)
            self._stepper.take_over(stepper)

    def row(self, position: int) -> Tensor:
        """The log-probabilities (V,) float32 at a position, on the CPU."""
        positions_M, log_probs_MV = self._predict(position)
        # Of several predictions of a position the first one counts.
        return log_probs_MV[int((positions_M == position).nonzero()[0])].cpu()

    def rows(self, position: int) -> dict[int, Tensor]:
        """By position, log-probabilities (V,) float32 on the CPU: of this one and those predicted together with it."""
        positions_M, log_probs_MV = self._predict(position)
        return dict(reversed(list(zip(positions_M.tolist(), log_probs_MV.cpu(), strict=True))))

    def _predict(self, position: int) -> tuple[Tensor, Tensor]:
        """Positions (M,) and log-probabilities (M, V) of what is predicted together with a position."""
        self._seek(int(self.chunk_N[position]))
        positions_M, logits_MV = self._stepper.at(self._chunk, position)
        return positions_M, logits_MV.float().log_softmax(-1)

    def _begin(self, chunk: int, state: State | None) -> None:
        """A pass that has learned from so many chunks."""
        kept = None if state is None else copied(state)
        self._chunk, self._pass = chunk, self.box.begin(self.buffer_N1)
        if kept is not None:
            self._pass.restore(kept)
        self._stepper = make_stepper(self._pass, self.asked_N)

    def _seek(self, chunk: int) -> None:
        """Bring the pass to a chunk, from the beginning again if that lies before where it is."""
        if chunk < self._chunk:
            self._begin(0, None)
        known = min(chunk, len(self.states))
        if known > self._chunk:
            self._pass.restore(copied(self.states[known - 1]))
            self._chunk = known
        while self._chunk < chunk:
            # Chunks that nothing is learned from are passed over: the pass of a decoder, which does not know all
            # documents yet, may have fewer of them than the one that scored the stream.
            if self._pass.learns(self._chunk):
                for _ in self._pass.predict(self._chunk, torch.zeros_like(self.asked_N)):
                    pass
                self._pass.learn(self._chunk)
            self._chunk += 1
