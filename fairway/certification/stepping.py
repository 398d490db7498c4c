"""A pass asked for one target at a time, while the tokens behind it are not there yet: what a decoder needs.

The tokens a pass was begun with are filled in as they become known. `at` tells what predict would commit to with the
tokens as they stand, computing no more than it must; nothing is learned. Where rows of tokens share nothing, only the
row with the target is computed, a few tokens at a time, on keys and values of those before. Shapes do not depend on
what is known, so that encoder and decoder get the same bits. Whoever predicts in a way of its own (a subclass) is asked
for the whole batch.

Legend: B windows, T tokens of a window, S tokens of a step, D model width, M scored places, N targets, V vocabulary.

A pass that follows a stream whose tokens become known one by one.

Legend: V vocabulary.
"""

from collections.abc import Callable, Generator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fairway.certification.black_box import Baseline, BlackBox
from fairway.evaluation.kv_cache import OVERLAP, Memory, RememberingNetwork
from fairway.evaluation.lora_ttt import LoraTttPass
from fairway.evaluation.passes import Pass, Prediction, State
from fairway.evaluation.scoring import Batch, WindowPass, make_batch, plain_head
from fairway.evaluation.slot import OffsetHead, Places
from fairway.evaluation.slot_carried import CarriedPass
from fairway.evaluation.slot_offsets import products
from fairway.evaluation.streaming import StreamingPass
from fairway.evaluation.ttt import TttPass
from fairway.evaluation.windows import Windows, in_groups
from fairway.model.embedding import softcap
from fairway.model.gpt import GPT

# Tokens of a step: few cost little more than one, and who knows them all needs fewer steps.
STEP = 4


class Stepper:
    """Any pass: the batch with the target is predicted again."""

    def __init__(self, evaluation: Pass, targets: int) -> None:
        self.evaluation, self.targets = evaluation, targets

    def at(self, chunk: int, position: int) -> Prediction:
        """What is predicted together with a position of a chunk, behind all the chunks learned from so far."""
        wanted = torch.zeros(self.targets, dtype=torch.bool)
        wanted[position] = True
        for positions_M, logits_MV in self.evaluation.predict(chunk, wanted):
            if bool((positions_M == position).any()):
                return positions_M, logits_MV
        raise ValueError(f"position {position} is not predicted in chunk {chunk}")


class Reader:
    """Hidden states of a row of tokens, a step at a time; what lies before is computed once, while it stays."""

    def __init__(self, model: GPT, *, begin: int = 0, memory: Memory = ()) -> None:
        self.network = RememberingNetwork(model)
        self._start = (begin, memory)
        # Tokens of the row with what they leave: those before the last step, and those with it.
        self._behind = self._ahead = (torch.empty(0), memory)

    def step(self, row: Tensor, begin: int, context: int) -> Tensor:
        """Hidden states (S, D) at places begin ... of a row, of which the first `context` tokens are read at once."""
        (known, memory), *_ = [
            (len(tokens), left)
            for tokens, left in (self._ahead, self._behind)
            if 0 < len(tokens) <= begin and torch.equal(row[: len(tokens)], tokens)
        ] or [self._start]
        while known < begin:
            end = known + STEP if known >= context else context
            memory = self._run(row, known, end, memory)[1]
            known = end
        hid_SD, left = self._run(row, begin, begin + STEP, memory)
        self._behind, self._ahead = (row[:begin].clone(), memory), (row[: begin + STEP].clone(), left)
        return hid_SD

    def _run(self, row: Tensor, begin: int, end: int, memory: Memory) -> tuple[Tensor, Memory]:
        tokens = F.pad(row, (0, max(end - len(row), 0)))[begin - (OVERLAP if begin else 0) : end]
        hid_1SD, left = self.network.hidden(tokens[None], begin, memory)
        return hid_1SD[0], left


class WindowStepper(Stepper):
    """Windows that share nothing, and a head that needs the hidden state of the scored places alone."""

    def __init__(self, evaluation: WindowPass, targets: int, head: Callable[[Tensor], Tensor]) -> None:
        super().__init__(evaluation, targets)
        self.windows, self.head, self._chunk = evaluation, head, -1

    def at(self, chunk: int, position: int) -> Prediction:
        """A step of the window that scores the position."""
        if chunk != self._chunk:
            # Passes learn between chunks: what was remembered before is of another network.
            self._chunk, self._reader = chunk, Reader(self.windows.model)
        window, _ = _window(self.windows, chunk, position)
        start, first, length = (int(column) for column in (window.start, window.first, window.length))
        first = first if first >= OVERLAP else 0
        begin = first + (position - start - first) // STEP * STEP
        row = self.windows.tokens_N1[start : start + length]
        positions_S = torch.arange(start + begin, min(start + begin + STEP, start + length), device=row.device)
        with torch.no_grad():
            return positions_S, self.head(self._reader.step(row, begin, first)[: len(positions_S)])


class OffsetStepper(Stepper):
    """Windows with offsets of their own, which are fitted anew with each token."""

    def __init__(self, evaluation: WindowPass, targets: int, head: OffsetHead) -> None:
        super().__init__(evaluation, targets)
        self.windows, self.head = evaluation, head
        self._chunk, self._context = -1, torch.empty(0)

    def at(self, chunk: int, position: int) -> Prediction:
        """The window that scores the position."""
        if chunk != self._chunk:
            self._chunk, self._network = chunk, RememberingNetwork(self.windows.model)
            self._context = torch.empty(0)
        window, group = _window(self.windows, chunk, position)
        batch = make_batch(self.windows.tokens_N1, window, seq_len=self.windows.model.config.seq_len)
        with torch.no_grad():
            hid_1TD = self._hidden(batch.tokens_BT, int(window.first))
            return batch.positions_M, self._alone(window, group)(self.windows.model, batch, hid_1TD)

    def _hidden(self, tokens_1T: Tensor, first: int) -> Tensor:
        if first < OVERLAP:
            return self._network.hidden(tokens_1T, 0, ())[0]
        context = tokens_1T[:, :first]
        if not torch.equal(context, self._context):
            self._context = context.clone()
            self._before_1PD, self._memory = self._network.hidden(context, 0, ())
        behind_1XD, _ = self._network.hidden(tokens_1T[:, first - OVERLAP :], first, self._memory)
        return torch.cat([self._before_1PD, behind_1XD], 1)

    def _alone(self, window: Windows, group: Windows) -> OffsetHead:
        """The head, for which places weigh what they do in the window's batch: the optimizer's eps makes it matter."""
        alone = OffsetHead(self.head.settings, self.windows.tokens_N1.device)
        share = max(self._fitted(window), 1) / max(self._fitted(group), 1)

        def places(batch: Batch) -> Places:
            found = self.head.places(batch)
            return replace(found, weight_GP=found.weight_GP * share)

        alone.places = places
        return alone

    def _fitted(self, windows: Windows) -> int:
        context = self.head.settings.fitted_on == "context"
        return int((windows.first if context else windows.length - windows.first).sum())


class LaneStepper(Stepper):
    """Lanes that share nothing, each on what it remembers of the chunks before."""

    def __init__(self, evaluation: StreamingPass, targets: int) -> None:
        super().__init__(evaluation, targets)
        self.lanes = evaluation
        self._where = (-1, -1)

    def at(self, chunk: int, position: int) -> Prediction:
        """A step of the lane that the position lies in."""
        bounds, first = self.lanes.bounds, chunk * self.lanes.settings.block_tokens
        lane = next(index for index, end in enumerate(bounds[1:]) if position < end)
        if self._where != (chunk, lane):
            memory = tuple(of_lanes[lane : lane + 1] for of_lanes in self.lanes.state().values())
            self._where, self._reader = (chunk, lane), Reader(self.lanes.model, begin=first, memory=memory)
        begin = first + (position - bounds[lane] - first) // STEP * STEP
        row = self.lanes.tokens_N1[bounds[lane] : bounds[lane + 1]]
        positions_S = bounds[lane] + torch.arange(begin, min(begin + STEP, len(row)), device=row.device)
        with torch.no_grad():
            return positions_S, self.lanes.model.logits(self._reader.step(row, begin, 0)[: len(positions_S)])


class DocumentStepper(Stepper):
    """Documents whose adapters learn on the way: from cut to cut, each learned from as the tokens then stand."""

    def __init__(self, evaluation: LoraTttPass, targets: int) -> None:
        super().__init__(evaluation, targets)
        self.documents, self._chunk = evaluation, -1
        self._going: Generator[Prediction, bool | None, None]

    def at(self, chunk: int, position: int) -> Prediction:
        """The cut with the position, ahead of the one last asked for or anew from the beginning of the chunk."""
        if chunk == self._chunk:
            found: Prediction | None = self._going.send(True)
            while found is not None and not bool((found[0] == position).any()):
                found = next(self._going, None)
            if found is not None:
                return found
        self._chunk, self._going = chunk, self.documents.predict(chunk)
        return next(cut for cut in self._going if bool((cut[0] == position).any()))


def make_stepper(evaluation: Pass, targets: int) -> Stepper:
    """The cheapest way to ask a pass over N targets for one of them."""
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
    """With the offset as it is, without keeping the places to be fitted on."""
    model = evaluation.model
    return softcap(products(hid_MD, model) + evaluation.offsets.logit_shift(model), model.config.softcap)


class Follower:
    """The next distribution, given the tokens that `buffer_N1` holds by now. Whoever uses it fills them in.

    Chunks that lie behind are learned from as they then stand; what need not be predicted for it is left out. With
    `learned`, what a pass had adapted behind the first chunk, that one is skipped.
    """

    def __init__(self, box: BlackBox, baseline: Baseline, buffer_N1: Tensor, learned: State | None = None) -> None:
        self.box, self.chunk_N, self.buffer_N1, self.learned = box, baseline.chunk_N, buffer_N1, learned
        self._begin()

    def _begin(self) -> None:
        self._chunk = 0
        self._pass: Pass = self.box.begin(self.buffer_N1)
        self._stepper = make_stepper(self._pass, len(self.chunk_N))

    def rows(self, position: int) -> dict[int, Tensor]:
        """Log-probabilities (V,) float32 on the CPU at a position, and at those predicted together with it."""
        self._seek(int(self.chunk_N[position]))
        positions_M, logits_MV = self._stepper.at(self._chunk, position)
        log_probs_MV = logits_MV.float().log_softmax(-1).cpu()
        # Of several predictions of a position the first one counts.
        return dict(reversed(list(zip(positions_M.tolist(), log_probs_MV, strict=True))))

    def _seek(self, chunk: int) -> None:
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
