"""An evaluation asked for one target at a time while the tokens behind it are not known yet: what a decoder needs.

A pass is begun on a buffer of tokens, which is filled in as they become known. A Stepper says what the pass would
predict at a target with the tokens as they stand, and computes no more for it than it must. Nothing is learned by that.
A Follower goes through a whole stream so, and lets the pass learn from each chunk that lies behind.

There are cheap steppers for the evaluators of this project, as long as their predictions do not depend on anything else
in the batch. Of any other pass, subclasses of theirs included, the whole batch with the target is predicted anew.

Legend: B windows, T tokens of a window, S tokens of a step, M scored places, N targets, P tokens before the scored
ones, X tokens from there on, D model width, V vocabulary.
"""

from collections.abc import Callable, Generator
from dataclasses import replace

import torch
from torch import Tensor

from fairway.certification.black_box import Baseline, BlackBox
from fairway.certification.row_reader import STEP, RowReader
from fairway.evaluation.kv_cache import cached_hidden
from fairway.evaluation.lora_ttt import LoraTttPass
from fairway.evaluation.passes import Pass, Prediction, State
from fairway.evaluation.scoring import Batch, WindowPass, make_batch, plain_head
from fairway.evaluation.slot import OffsetHead, Places
from fairway.evaluation.slot_carried import CarriedPass
from fairway.evaluation.slot_offsets import products
from fairway.evaluation.streaming import StreamingPass
from fairway.evaluation.ttt import TttPass
from fairway.evaluation.windows import Windows, in_groups
from fairway.model.embedding import LOOK_BACK, softcap


class Stepper:
    """For any pass: the whole batch with the target is predicted anew."""

    def __init__(self, evaluation: Pass, targets: int) -> None:
        self.evaluation, self.targets = evaluation, targets

    def at(self, chunk: int, position: int) -> Prediction:
        """The prediction of a position in a chunk, with those made together with it.

        The pass must have learned from all chunks before that one. Raises ValueError if the chunk does not predict it.
        """
        wanted = torch.zeros(self.targets, dtype=torch.bool)
        wanted[position] = True
        for positions_M, logits_MV in self.evaluation.predict(chunk, wanted):
            if bool((positions_M == position).any()):
                return positions_M, logits_MV
        raise ValueError(f"position {position} is not predicted in chunk {chunk}")


class WindowStepper(Stepper):
    """For windows whose predictions depend on nothing but the window, by a head that reads the scored places alone."""

    def __init__(self, evaluation: WindowPass, targets: int, head: Callable[[Tensor], Tensor]) -> None:
        super().__init__(evaluation, targets)
        self.windows, self.head, self._chunk = evaluation, head, -1

    def at(self, chunk: int, position: int) -> Prediction:
        """A step of the window that scores the position."""
        if chunk != self._chunk:
            # Passes learn between chunks: what was cached before belongs to other weights.
            self._chunk, self._reader = chunk, RowReader(self.windows.model)
        window, _ = _window(self.windows, chunk, position)
        start, first, length = (int(column) for column in (window.start, window.first, window.length))
        first = first if first >= LOOK_BACK else 0
        begin = first + (position - start - first) // STEP * STEP
        row = self.windows.tokens_N1[start : start + length]
        positions_S = torch.arange(start + begin, min(start + begin + STEP, start + length), device=row.device)
        with torch.no_grad():
            return positions_S, self.head(self._reader.step(row, begin, first)[: len(positions_S)])


class OffsetStepper(Stepper):
    """For SLOT with an offset for each window (evaluation/slot.py), which is fitted anew for each token."""

    def __init__(self, evaluation: WindowPass, targets: int, head: OffsetHead) -> None:
        super().__init__(evaluation, targets)
        self.windows, self.head = evaluation, head
        self._chunk, self._context = -1, torch.empty(0)

    def at(self, chunk: int, position: int) -> Prediction:
        """The window that scores the position."""
        if chunk != self._chunk:
            # As above: what was cached belongs to other weights.
            self._chunk, self._context = chunk, torch.empty(0)
        window, group = _window(self.windows, chunk, position)
        batch = make_batch(self.windows.tokens_N1, window, seq_len=self.windows.model.config.seq_len)
        with torch.no_grad():
            hid_1TD = self._hidden(batch.tokens_BT, int(window.first))
            return batch.positions_M, self._alone(window, group)(self.windows.model, batch, hid_1TD)

    def _hidden(self, tokens_1T: Tensor, first: int) -> Tensor:
        """The hidden states of a window; those before the first scored place are kept while its tokens stay."""
        model = self.windows.model
        if first < LOOK_BACK:
            return cached_hidden(model, tokens_1T, 0, ())[0]
        context = tokens_1T[:, :first]
        if not torch.equal(context, self._context):
            self._context = context.clone()
            self._before_1PD, self._cache = cached_hidden(model, context, 0, ())
        behind_1XD, _ = cached_hidden(model, tokens_1T[:, first - LOOK_BACK :], first, self._cache)
        return torch.cat([self._before_1PD, behind_1XD], 1)

    def _alone(self, window: Windows, group: Windows) -> OffsetHead:
        """A head for this window alone, in which places have the weight that they have in the window's batch.

        The fit depends on the weights, because the optimizer's eps is not scale-free.
        """
        # Within documents, the weight is the same in every batch.
        share = 1.0 if self.windows.stretch else max(self._fitted(window), 1) / max(self._fitted(group), 1)

        def places(batch: Batch) -> Places:
            found = self.head.places(batch)
            return replace(found, weight_GP=found.weight_GP * share)

        return OffsetHead(self.head.settings, self.windows.tokens_N1.device, places)

    def _fitted(self, windows: Windows) -> int:
        """On how many places offsets of these windows are fitted."""
        context = self.head.settings.fitted_on == "context"
        return int((windows.first if context else windows.length - windows.first).sum())


class LaneStepper(Stepper):
    """For the lanes of a streaming evaluation, each with what it has cached in the chunks before."""

    def __init__(self, evaluation: StreamingPass, targets: int) -> None:
        super().__init__(evaluation, targets)
        self.lanes = evaluation
        self._where = (-1, -1)

    def at(self, chunk: int, position: int) -> Prediction:
        """A step of the lane that the position lies in."""
        bounds, first = self.lanes.bounds, chunk * self.lanes.settings.block_tokens
        lane = next(index for index, end in enumerate(bounds[1:]) if position < end)
        if self._where != (chunk, lane):
            cache = tuple(of_lanes[lane : lane + 1] for of_lanes in self.lanes.state().values())
            self._where, self._reader = (chunk, lane), RowReader(self.lanes.model, begin=first, cache=cache)
        begin = first + (position - bounds[lane] - first) // STEP * STEP
        row = self.lanes.tokens_N1[bounds[lane] : bounds[lane + 1]]
        positions_S = bounds[lane] + torch.arange(begin, min(begin + STEP, len(row)), device=row.device)
        with torch.no_grad():
            return positions_S, self.lanes.model.logits(self._reader.step(row, begin, 0)[: len(positions_S)])


class DocumentStepper(Stepper):
    """For documents whose adapters learn on the way, from cut to cut, each time from the tokens as they then stand."""

    def __init__(self, evaluation: LoraTttPass, targets: int) -> None:
        super().__init__(evaluation, targets)
        self.documents, self._chunk = evaluation, -1
        self._going: Generator[Prediction, bool | None, None]

    def at(self, chunk: int, position: int) -> Prediction:
        """The cut with the position: on from the cut last asked for, or else from the beginning of the chunk again."""
        if chunk == self._chunk:
            found: Prediction | None = self._going.send(True)
            while found is not None and not bool((found[0] == position).any()):
                found = next(self._going, None)
            if found is not None:
                return found
        self._chunk, self._going = chunk, self.documents.predict(chunk)
        return next(cut for cut in self._going if bool((cut[0] == position).any()))


def make_stepper(evaluation: Pass, targets: int) -> Stepper:
    """The cheapest stepper for a pass over N targets."""
    kind = type(evaluation)
    if isinstance(evaluation, LoraTttPass) and kind is LoraTttPass:
        return DocumentStepper(evaluation, targets)
    if isinstance(evaluation, StreamingPass) and kind is StreamingPass:
        return LaneStepper(evaluation, targets)
    if isinstance(evaluation, CarriedPass) and kind is CarriedPass:
        return WindowStepper(evaluation, targets, lambda hid_MD: _carried_logits(evaluation, hid_MD))
    if isinstance(evaluation, WindowPass) and kind in (WindowPass, TttPass):
        if evaluation.head is plain_head:
            return WindowStepper(evaluation, targets, evaluation.model.logits)
        if isinstance(evaluation.head, OffsetHead) and evaluation.head.settings.fitted_on != "batch":
            return OffsetStepper(evaluation, targets, evaluation.head)
    return Stepper(evaluation, targets)


def _window(evaluation: WindowPass, chunk: int, position: int) -> tuple[Windows, Windows]:
    """The first window that scores a position, and the batch it belongs to."""
    w = evaluation.windows[chunk]
    index = int(((w.start + w.first <= position) & (position < w.start + w.length)).nonzero()[0])
    return w[index : index + 1], in_groups(w, evaluation.batch_windows)[index // evaluation.batch_windows]


def _carried_logits(evaluation: CarriedPass, hid_MD: Tensor) -> Tensor:
    """The logits of a carried offset. Unlike the pass's own head this notes no places to fit the offset on."""
    model = evaluation.model
    return softcap(products(hid_MD, model) + evaluation.offsets.logit_shift(model), model.config.softcap)


class Follower:
    """The next distribution, given the tokens that `buffer_N1` holds by now. Its user fills in what becomes known.

    When a position in a later chunk is asked for, the pass learns from the chunks before it with their tokens as they
    then stand, and predicts of them only what learning needs. `learned` is what a pass had adapted after the first
    chunk (Pass.state); with it, learning from that chunk is skipped.
    """

    def __init__(self, box: BlackBox, baseline: Baseline, buffer_N1: Tensor, learned: State | None = None) -> None:
        self.box, self.chunk_N, self.buffer_N1, self.learned = box, baseline.chunk_N, buffer_N1, learned
        self._begin()

    def _begin(self) -> None:
        self._chunk = 0
        self._pass: Pass = self.box.begin(self.buffer_N1)
        self._stepper = make_stepper(self._pass, len(self.chunk_N))

    def rows(self, position: int) -> dict[int, Tensor]:
        """By position, log-probabilities (V,) float32 on the CPU: of this one and those predicted together with it."""
        self._seek(int(self.chunk_N[position]))
        positions_M, logits_MV = self._stepper.at(self._chunk, position)
        log_probs_MV = logits_MV.float().log_softmax(-1).cpu()
        # Of several predictions of a position the first one counts.
        return dict(reversed(list(zip(positions_M.tolist(), log_probs_MV, strict=True))))

    def _seek(self, chunk: int) -> None:
        """Bring the pass to a chunk, from the beginning again if that lies before where it is."""
        if chunk < self._chunk:
            self._begin()
        if self.learned is not None and self._chunk == 0 and chunk > 0:
            self._pass.restore({name: value.clone() for name, value in self.learned.items()})
            self._chunk = 1
        while self._chunk < chunk:
            for _ in self._pass.predict(self._chunk, torch.zeros(len(self.chunk_N), dtype=torch.bool)):
                pass
            self._pass.learn(self._chunk)
            self._chunk += 1
