"""Documents of a stream, and the order in which PR #1855 visits them: in batches of like length, longest first.

Legend: N targets, I documents.

Document-wise test-time training of low-rank adapters, with phases of global SGD.

Documents are visited in batches of like length, longest first. All documents of a batch advance together, a chunk of
targets at a time: the chunk is scored, then the adapters take one AdamW step on the loss it was scored with. Adapters
are per document; their first factors stay warm from batch to batch. After a few batches the network itself is trained
with SGD on all the documents done, in ascending length, and adapters start anew; this is a phase.

Every target is scored before any update that used it, but in order of length, not of the stream: what an early short
document is scored with has seen later long ones. Causal in the order of visits only, given all lengths.
Source: PR #1855. Ours: batches are dealt to lanes in turn, where the record's GPUs take the next one when they are
done, which depends on timing; a phase begins behind the same batches as in its logs.

Legend: N targets, B documents of a batch, T tokens of a window, C targets of a chunk, D model width, V vocabulary.
"""

import copy
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from fairway.adaptation.lanes import sum_gradients
from fairway.adaptation.trainable import RoundedWeights
from fairway.evaluation.evaluator import Evaluator, EvaluatorSettings
from fairway.evaluation.lora_adapters import AdaptedNetwork, Adapters, Factors, draw_factors
from fairway.evaluation.passes import Pass, Prediction, State
from fairway.evaluation.ttt import cosine
from fairway.model.config import ModelConfig
from fairway.model.gpt import GPT
from fairway.runtime.distributed import World
from fairway.tokens.data_orders import document_bounds
from fairway.tokens.tokenizer import BOS


class LoraTttSettings(EvaluatorSettings):
    """Low-rank adapters fitted to each document as it is scored, and phases of global SGD (PR #1855)."""

    # Targets scored between two steps of the adapters, and documents side by side.
    chunk_tokens: int = Field(gt=0)
    batch_documents: int = Field(gt=0)
    rank: int = Field(gt=0)
    alpha: float = Field(gt=0)
    lr: float = Field(gt=0)
    beta2: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    # After so many documents, in so many phases, the network itself is trained on the documents done.
    prefix_documents: int = Field(ge=0)
    phases: int = Field(ge=0)
    global_chunk_tokens: int = Field(gt=0)
    global_lr: float = Field(gt=0)
    global_momentum: float = Field(ge=0, lt=1)
    grad_clip: float = Field(gt=0)
    # Batches of documents under way at a time: the GPUs of a record. Processes do not change the result.
    lanes: int = Field(gt=0)
    # Of the adapters' first factors; the generator's seed is this times 10^9 and a bit (evaluation/lora_ttt.py).
    seed: int = Field(ge=0, lt=2**32)

    @model_validator(mode="after")
    def _phases(self) -> "LoraTttSettings":
        if self.phases > self.prefix_documents:
            raise ValueError(f"phases ({self.phases}) exceed prefix_documents ({self.prefix_documents})")
        return self

    def check(self, *, section: str, model: ModelConfig, processes: int) -> None:
        """A chunk is at most a row, and a step of global training is whole rows on every lane."""
        if self.chunk_tokens > model.seq_len:
            raise ValueError(f"{section}.chunk_tokens ({self.chunk_tokens}) exceeds model.seq_len ({model.seq_len})")
        if self.global_chunk_tokens % (self.lanes * model.seq_len):
            raise ValueError(
                f"{section}.global_chunk_tokens ({self.global_chunk_tokens}) must be a multiple of "
                f"{section}.lanes * model.seq_len ({self.lanes * model.seq_len})"
            )


@dataclass(frozen=True)
class Document:
    """Tokens begin ... begin + targets of a stream: its own and the next document's start token, which it predicts."""

    begin: int
    targets: int


def documents(tokens_N1: Tensor) -> list[Document]:
    """The documents of a stream (N+1,), in order; together they have every target once."""
    begins = (tokens_N1 == BOS).nonzero()[:, 0].tolist()
    begins = sorted({0, *begins})
    ends = [*begins[1:], len(tokens_N1) - 1]
    return [Document(begin, end - begin) for begin, end in zip(begins, ends, strict=True) if end > begin]


def by_length(docs: list[Document], size: int) -> list[list[Document]]:
    """Batches of `size` documents in ascending length, dealt from the shortest on; the longest batch comes first."""
    ascending = sorted(docs, key=lambda document: document.targets)
    return [ascending[begin : begin + size] for begin in range(0, len(ascending), size)][::-1]


def phase_ends(batches: list[list[Document]], prefix: int, phases: int, lanes: int) -> list[int]:
    """Behind how many batches each phase of global training stands.

    Phase p of 1 ... `phases` is due once prefix·p/phases documents are done; each other lane then still has a batch in
    its hands. Phases that the stream is too short for are left out.
    """
    done = torch.tensor([len(batch) for batch in batches]).cumsum(0)
    ends: list[int] = []
    for phase in range(phases):
        boundary = prefix * (phase + 1) // phases
        reached = int((done < boundary).sum()) + 1
        end = max(reached, ends[-1] + 1 if ends else 1) + lanes - 1
        if reached > len(batches) or end >= len(batches):
            break
        ends.append(end)
    return ends


# Adapters' AdamW: no momentum (PR #1855).
BETA1, EPS = 0.0, 1e-10
# Segment bounds are padded to a multiple of this.
BOUNDS = 64

# From chunk, lane and number of documents to fresh first factors.
Draw = Callable[[int, int, int], Factors]
# Predictions, of which the last one is made again, from the tokens as they then stand, for whoever sends True.
Predictions = Generator[Prediction, bool | None, None]


@dataclass(frozen=True)
class LoraTttEvaluator(Evaluator):
    """Document-wise adapters on a copy of the network that is itself trained now and then."""

    settings: LoraTttSettings

    def begin(self, model: GPT, tokens_N1: Tensor, world: World) -> Pass:
        """A pass whose chunks end at the phases."""
        s = self.settings

        def draw(chunk: int, lane: int, rows: int) -> Factors:
            # Seeds that differ for every draw of a pass: far fewer than a million lanes, batch sizes below a thousand.
            seed = ((s.seed * 1000 + chunk) * 1000 + lane) * 1000 + rows
            return draw_factors(model.config, rows, s.rank, torch.Generator().manual_seed(seed))

        return LoraTttPass(copy.deepcopy(model), tokens_N1, world, s, draw)


class LoraTttPass(Pass):
    """Chunks of batches, and between two chunks a phase of global SGD on `model`, in place."""

    def __init__(self, model: GPT, tokens_N1: Tensor, world: World, settings: LoraTttSettings, draw: Draw) -> None:
        self.model, self.tokens_N1, self.world, self.settings, self.draw = model, tokens_N1, world, settings, draw
        self.network, self._rounded = AdaptedNetwork(model), RoundedWeights(model)
        self.batches = by_length(documents(tokens_N1.cpu()), settings.batch_documents)
        ends = phase_ends(self.batches, settings.prefix_documents, settings.phases, settings.lanes)
        self.bounds = [0, *ends, len(self.batches)]
        self.chunks = len(self.bounds) - 1

    def predict(self, chunk: int, wanted: Tensor | None = None) -> Predictions:
        """The predictions of this process's lanes. None is left out: later ones depend on all of them."""
        self.model.requires_grad_(False)
        for lane in range(self.world.rank, self.settings.lanes, self.world.size):
            mine = range(self.bounds[chunk], self.bounds[chunk + 1])
            batches = [self.batches[index] for index in mine if index % self.settings.lanes == lane]
            yield from self._lane(batches, lambda rows, lane=lane: self.draw(chunk, lane, rows))  # type: ignore[misc]

    def _lane(self, batches: list[list[Document]], draw: Callable[[int], Factors]) -> Predictions:
        """One lane's batches; those of the usual size share warm adapters."""
        warm = self._adapters(draw(self.settings.batch_documents))
        for batch in batches:
            usual = len(batch) == self.settings.batch_documents
            adapters = warm if usual else self._adapters(draw(len(batch)))
            adapters.forget()
            yield from self._batch(batch, adapters)

    def _adapters(self, factors: Factors) -> Adapters:
        scale = self.settings.alpha / self.settings.rank
        return Adapters(self.model.config, factors, scale=scale, device=self.tokens_N1.device)

    def _batch(self, batch: list[Document], adapters: Adapters) -> Predictions:
        """Score and fit, chunk by chunk, until the longest document ends."""
        s = self.settings
        optimizer = torch.optim.AdamW(
            adapters.parameters(), lr=s.lr, betas=(BETA1, s.beta2), eps=EPS, weight_decay=s.weight_decay
        )
        for index in range(-(-max(document.targets for document in batch) // s.chunk_tokens)):
            again: bool | None = True
            while again:
                cut = Cut(self.tokens_N1, batch, index * s.chunk_tokens, s.chunk_tokens, self.model.config.seq_len)
                with torch.set_grad_enabled(bool(cut.goes_on_B.any())):
                    hid_BTD = self.network.hidden(cut.tokens_BT, adapters)
                    logits_BCV = self.network.logits(cut.scored(hid_BTD), adapters)
                again = yield cut.positions_BC[cut.inside_BC], logits_BCV[cut.inside_BC].detach()
            if logits_BCV.requires_grad:
                self._fit(cut, logits_BCV, optimizer)

    def _fit(self, cut: "Cut", logits_BCV: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """One step on the sum over documents of their mean loss in the chunk; those at their end have no gradient."""
        nats = F.cross_entropy(logits_BCV.flatten(0, 1), cut.targets_BC.flatten(), reduction="none")
        optimizer.zero_grad()
        (nats.view_as(cut.targets_BC).mean(1) * cut.goes_on_B).sum().backward()
        optimizer.step()

    def learn(self, chunk: int) -> None:
        """The phase behind the chunk, if it is not the last: SGD on the shortest documents done, anew each time."""
        if chunk == self.chunks - 1:
            return
        s = self.settings
        self.model.requires_grad_(True)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=s.global_lr, momentum=s.global_momentum)
        tokens = self.phase_tokens(chunk)
        chunks = -(-(len(tokens) - 1) // s.global_chunk_tokens)
        for index in range(chunks - 1):
            begin = index * s.global_chunk_tokens
            optimizer.param_groups[0]["lr"] = s.global_lr * cosine(index, chunks)
            self._global_step(tokens[begin : begin + s.global_chunk_tokens + 1], optimizer)

    def phase_tokens(self, chunk: int) -> Tensor:
        """What the phase behind a chunk trains on: prefix·(chunk+1)/phases documents done, shortest first."""
        done = [document for batch in reversed(self.batches[: self.bounds[chunk + 1]]) for document in batch]
        count = self.settings.prefix_documents * (chunk + 1) // self.settings.phases
        return torch.cat([self.tokens_N1[d.begin : d.begin + d.targets + 1] for d in done[:count]])

    def _global_step(self, tokens: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """One step on a chunk (global_chunk_tokens + 1,); each lane packs its share into a row, documents apart."""
        s, parameters = self.settings, list(self.model.parameters())
        share = s.global_chunk_tokens // s.lanes

        def gradients(lane: int) -> Sequence[Tensor | None]:
            row = tokens[lane * share : (lane + 1) * share + 1]
            bounds = document_bounds(row[:-1].cpu().numpy(), cut=self.model.config.seq_len, bucket=BOUNDS)
            segments = torch.from_numpy(bounds).to(row.device)
            loss = self.model(row[None, :-1], row[None, 1:], segments=segments) / s.lanes
            return torch.autograd.grad(loss, parameters, allow_unused=True)

        sum_gradients(parameters, s.lanes, gradients, self.world)
        clip_grad_norm_(parameters, s.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        self._rounded.round()

    def state(self) -> State:
        """The network; adapters do not outlive a phase."""
        return {name: value.detach() for name, value in self.model.named_parameters()}

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Put it back."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(state[name])


class Cut:
    """The windows of a batch of documents that end with their chunk of targets begin ... begin + C - 1.

    A window has at most seq_len tokens. Documents that have ended keep their last window and score nothing.
    """

    def __init__(self, tokens_N1: Tensor, batch: list[Document], begin: int, size: int, seq_len: int) -> None:
        device = tokens_N1.device
        first_B = torch.tensor([document.begin for document in batch], device=device)
        targets_B = torch.tensor([document.targets for document in batch], device=device)
        end_B = targets_B.clamp(max=begin + size)
        # Offsets into the document of each window's first token.
        from_B = (end_B - seq_len).clamp(min=0)
        place_BT = from_B[:, None] + torch.arange(min(begin + size, seq_len), device=device)
        index_BT = (first_B[:, None] + place_BT).clamp(max=len(tokens_N1) - 1)
        self.tokens_BT = tokens_N1[index_BT] * (place_BT < end_B[:, None])
        place_BC = begin + torch.arange(size, device=device).expand(len(batch), -1)
        self.inside_BC = place_BC < end_B[:, None]
        self.positions_BC = first_B[:, None] + place_BC
        self.targets_BC = tokens_N1[(self.positions_BC + 1).clamp(max=len(tokens_N1) - 1)] * self.inside_BC
        self.columns_BC = (place_BC - from_B[:, None]) * self.inside_BC
        # Documents with more targets behind these: only they learn.
        self.goes_on_B = targets_B > begin + size

    def scored(self, hid_BTD: Tensor) -> Tensor:
        """The hidden state (B, C, D) at the scored places."""
        return hid_BTD[torch.arange(len(hid_BTD), device=hid_BTD.device)[:, None], self.columns_BC]
