"""Fused kernels and attention backends on a GPU, in bfloat16, against the plain path in float32 on the same numbers."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_model import EVERY_RECORD, RECORDS
from torch import Tensor

from fairway.evaluation.windows import overlapping_hidden
from fairway.model import attention, causal_attention, embedding, norm
from fairway.model.attention import rotary_table, rotate
from fairway.model.backends import attention_backend, compiled
from fairway.model.config import ModelConfig
from fairway.model.gpt import GPT
from fairway.model.precision import rms_norm
from fairway.model.residual import Mlp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # A compiled network may be told that its float32 products could be faster; they are few and small.
    pytest.mark.filterwarnings("ignore:TensorFloat32"),
    # FlashAttention-4 and what it is made of.
    pytest.mark.filterwarnings("ignore:cutlass.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Argument .* cannot be converted to a JitArgument"),
]
CUDA = torch.device("cuda")
# Relative L2 error that bfloat16 inputs, outputs and products leave.
CLOSE = 1e-2


def random(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal bfloat16 numbers on the GPU, ready for gradients."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    return [torch.randn(s, generator=generator, device=CUDA).bfloat16().requires_grad_() for s in shapes]


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def assert_same(
    fast: Callable[..., Any], plain: Callable[..., Any], inputs: list[Tensor], *, close: float = CLOSE
) -> None:
    """Outputs, and gradients of a random weighting of them, of `fast` in bfloat16 and of `plain` in float32."""
    results = []
    for function, arguments in ((fast, inputs), (plain, [x.detach().float().requires_grad_() for x in inputs])):
        outputs = function(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = random(99, *(o.shape for o in outputs))
        loss = torch.stack([(o.float() * w.detach()).sum() for o, w in zip(outputs, weights, strict=True)]).sum()
        results.append([*outputs, *torch.autograd.grad(loss, arguments)])
    errors = [error(found, expected) for found, expected in zip(*results, strict=True)]
    assert max(errors) < close, errors


@pytest.mark.parametrize(("heads", "kv_heads", "width", "pairs"), [(8, 4, 64, 8), (6, 2, 32, 16)])
def test_queries_and_keys_are_normed_rotated_and_gained(heads: int, kv_heads: int, width: int, pairs: int) -> None:
    from fairway.model.kernels.heads import heads as fused_heads

    rope = ModelConfig.model_validate(RECORDS["r1150"]).rope.model_copy(update={"dims": 2 * pairs})
    table = rotary_table(rope, 165, torch.arange(165.0, device=CUDA), torch.bfloat16)

    def plain(n: Tensor, weight: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (n @ weight.T).unflatten(2, (-1, width)).split([heads, kv_heads, kv_heads], dim=2)
        cos, sin = (x.float() for x in table)
        return rotate(rms_norm(q), (cos, sin)) * gain[:, None], rotate(rms_norm(k), (cos, sin)), v

    inputs = random(0, (3, 165, 72), ((heads + 2 * kv_heads) * width, 72), (heads,))
    assert_same(lambda n, weight, gain: fused_heads(n, None, weight, *table, gain, kv_heads)[:3], plain, inputs)

    factors = torch.rand(3, 165, 1, device=CUDA)
    n, weight, gain = (x.detach() for x in inputs)
    found = fused_heads(n, factors, weight, *table, gain, kv_heads)[:3]
    expected = plain(n.float() * factors, weight.float(), gain.float())
    assert max(error(x, y) for x, y in zip(found, expected, strict=True)) < CLOSE


@pytest.mark.parametrize(("heads", "kv_heads", "width", "pairs"), [(8, 4, 64, 8), (6, 2, 32, 16), (0, 4, 64, 8)])
def test_given_products_are_finished_alike(heads: int, kv_heads: int, width: int, pairs: int) -> None:
    """Products that adapters have added to; without queries too."""
    from fairway.model.kernels.heads import finished_heads

    rope = ModelConfig.model_validate(RECORDS["r1150"]).rope.model_copy(update={"dims": 2 * pairs})
    table = rotary_table(rope, 165, torch.arange(165.0, device=CUDA), torch.bfloat16)

    def plain(x: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = x.unflatten(2, (-1, width)).split([heads, kv_heads, kv_heads], dim=2)
        cos, sin = (part.float() for part in table)
        return rotate(rms_norm(q), (cos, sin)) * gain[:, None], rotate(rms_norm(k), (cos, sin)), v

    x, gain = random(0, (3, 165, (heads + 2 * kv_heads) * width), (heads,))
    if heads:
        assert_same(lambda x, gain: finished_heads(x, *table, gain, kv_heads), plain, [x, gain])
    else:
        found, expected = (
            lambda x: finished_heads(x, *table, gain.detach(), kv_heads)[1:],
            lambda x: plain(x, gain.detach())[1:],
        )
        assert_same(found, expected, [x])


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(8, 4, 64), (4, 1, 32), (6, 3, 24)])
@pytest.mark.parametrize("gated", [False, True])
def test_own_values_are_excluded(heads: int, kv_heads: int, width: int, gated: bool) -> None:
    """bfloat16 takes the fused path, float32 the plain one."""
    shapes = [(2, 33, heads, width), (2, 33, kv_heads, width)] + [(2, 33, heads)] * gated
    assert_same(attention.exclude_self, attention.exclude_self, random(1, *shapes))


@pytest.mark.parametrize("width", [512, 48])
@pytest.mark.parametrize("count", [2, 3])
def test_sources_are_mixed_and_normed(width: int, count: int) -> None:
    def mix(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        u, n = norm.join(list(arguments[:-1]), arguments[-1], 0.5)
        return u, n.tensor()

    inputs = random(2, *[(3, 67, width)] * count, (count, width))
    assert_same(mix, mix, inputs)
    with torch.no_grad():
        pairs = zip(mix(*inputs), mix(*(x.float() for x in inputs)), strict=True)
        assert max(error(set_aside, whole) for set_aside, whole in pairs) < CLOSE


@pytest.mark.parametrize("count", [2, 3])
def test_sources_get_the_same_gradients_where_weights_need_none(count: int) -> None:
    """All but the last source, as the embedding beside adapters is fixed too."""
    *sources, last, weights = random(2, *[(3, 67, 512)] * count, (count, 512))
    last, weights = last.detach(), weights.detach()

    def mix(*sources: Tensor) -> tuple[Tensor, Tensor]:
        u, n = norm.join([*sources, last.to(sources[0].dtype)], weights.to(sources[0].dtype), 0.5)
        return u, n.tensor()

    assert_same(mix, mix, sources)


@pytest.mark.parametrize("width", [512, 48])
def test_a_norm_may_be_set_aside_as_factors(width: int) -> None:
    (x,) = random(3, (3, 67, width))
    with torch.no_grad():
        set_aside = norm.norm(x, 0.5)
        assert (set_aside.factors is not None) == (width == 512)
        assert error(set_aside.tensor(), norm.norm(x.float(), 0.5).x) < CLOSE
        assert error(set_aside.tensor(12), norm.norm(x.float(), 0.5).x[..., :12]) < CLOSE


@pytest.mark.parametrize("width", [512, 48])
def test_a_branch_is_added_and_normed(width: int) -> None:
    def add(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        u, n = norm.join([x, y], None, 0.5)
        return u, n.tensor()

    assert_same(add, add, random(3, *[(3, 67, width)] * 2))


@pytest.mark.parametrize(("width", "hidden"), [(512, 1536), (512, 2048), (72, 200)])
def test_the_mlp_is_activated_between_its_products(width: int, hidden: int) -> None:
    """Weights and their scale go in as they lie in the module: float32, so they are rounded to bfloat16 first."""

    def mlp(n: Tensor, up: Tensor, down: Tensor, scale: Tensor) -> Tensor:
        config = ModelConfig.model_validate(
            RECORDS["r1150"] | {"width": width, "mlp_hidden": hidden, "heads": 1, "kv_heads": 1}
        )
        parameters = {"up": up.float(), "down": down.float()}
        result: Tensor = torch.func.functional_call(Mlp(config).to(CUDA), parameters, (norm.norm(n, 1.0), scale))
        return result

    inputs = random(6, (2, 150, width), (hidden, width), (width, hidden), (width,))
    assert_same(mlp, mlp, inputs, close=2e-2)
    with torch.no_grad():
        assert error(mlp(*inputs), mlp(*(x.float() for x in inputs))) < 2e-2


def test_the_mlp_spares_matrices_that_need_no_gradient() -> None:
    n, up, down = random(7, (2, 150, 512), (1536, 512), (512, 1536))
    mlp = Mlp(ModelConfig.model_validate(RECORDS["r1150"] | {"heads": 1, "kv_heads": 1})).to(CUDA)
    parameters = {"up": up.detach().float(), "down": down.detach().float()}
    ones = torch.ones(512, device=CUDA)

    def run(n: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(mlp, parameters, (norm.norm(n, 1.0), ones.to(n.dtype)))
        return result

    assert_same(run, run, [n], close=2e-2)


@pytest.mark.parametrize("vocabulary", [1024, 8192, 40])
def test_the_fused_loss_is_the_softcapped_cross_entropy(vocabulary: int) -> None:
    targets = torch.arange(130, device=CUDA).view(2, 65) % vocabulary

    def loss(hidden: Tensor, table: Tensor) -> Tensor:
        return embedding.mean_cross_entropy(hidden, table, targets, cap=15.0)

    assert_same(loss, loss, random(4, (2, 65, 64), (vocabulary, 64)), close=2e-2)


def backends(packed: bool) -> list[str]:
    """Those that this machine has."""
    chosen = attention_backend(CUDA, torch.bfloat16, 64, length=256, packed=packed)
    return sorted({"flash2", chosen} | ({"cudnn"} if chosen != "flash2" and not packed else set()))


def assert_attends_as_plainly(segments: Tensor | None, inputs: list[Tensor]) -> None:
    """With queries, keys and values; the gradients of all three, too."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention.attend(q, k, v, segments)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention.attend_plainly(q, k, v, segments)

    assert_same(attend, plain, inputs)


@pytest.mark.parametrize("packed", [False, True])
def test_all_backends_agree_with_plain_attention(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    segments = torch.tensor([0, 100, 101, 300, 512, 512], dtype=torch.int32, device=CUDA) if packed else None
    inputs = random(5, (2, 256, 8, 64), (2, 256, 4, 64), (2, 256, 4, 64))
    for backend in backends(packed):
        monkeypatch.setattr(causal_attention, "attention_backend", lambda *_, name=backend, **__: name)
        assert_attends_as_plainly(segments, inputs)


@pytest.mark.parametrize("head_dim", [8, 16, 32, 64])
def test_heads_of_every_width_have_the_gradients_of_plain_attention(head_dim: int) -> None:
    segments = torch.tensor([0, 100, 101, 300, 512, 512], dtype=torch.int32, device=CUDA)
    assert_attends_as_plainly(segments, random(6, (2, 256, 4, head_dim), (2, 256, 2, head_dim), (2, 256, 2, head_dim)))


def _as_flash3(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, longest: int) -> Tensor:
    from fairway.model.backends import flash2_attention

    return flash2_attention(q, k, v, segments, longest)[0]


def flash_attn_interface(returns_pair: bool) -> ModuleType:
    """A module with the interface of FlashAttention-3, which no package index has, computed by FlashAttention-2."""
    module = ModuleType("flash_attn_interface")

    def rows(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, deterministic: bool) -> Any:
        assert causal
        o = _as_flash3(q, k, v, None, q.size(1))
        return (o, None) if returns_pair else o

    def packed(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        causal: bool,
        deterministic: bool,
    ) -> Any:
        assert causal
        assert cu_seqlens_q is cu_seqlens_k
        assert max_seqlen_q == max_seqlen_k
        o = _as_flash3(q[None], k[None], v[None], cu_seqlens_q, max_seqlen_q)[0]
        return (o, None) if returns_pair else o

    module.flash_attn_func, module.flash_attn_varlen_func = rows, packed  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("returns_pair", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_flash3_is_called_as_its_interface_asks(
    packed: bool, returns_pair: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", flash_attn_interface(returns_pair))
    segments = torch.tensor([0, 100, 101, 300, 512, 512], dtype=torch.int32, device=CUDA) if packed else None
    monkeypatch.setattr(causal_attention, "attention_backend", lambda *_, **__: "flash3")
    inputs = random(5, (2, 256, 8, 64), (2, 256, 4, 64), (2, 256, 4, 64))
    assert_same(
        lambda q, k, v: causal_attention.attend(q, k, v, segments),
        lambda q, k, v: causal_attention.attend_plainly(q, k, v, segments),
        inputs,
    )


@pytest.mark.parametrize(("windows", "length", "spacing"), [(5, 256, 64), (4, 192, 96), (1, 128, 16), (3, 96, 32)])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(8, 4, 64), (4, 1, 32)])
def test_nested_attention_is_that_of_each_window(
    windows: int, length: int, spacing: int, heads: int, kv_heads: int, width: int
) -> None:
    """The first two places of each window have rows of their own."""
    from fairway.model.kernels.nested import nested_attention

    stretch = spacing * (windows - 1) + length
    rows = torch.arange(stretch + 2 * windows, device=CUDA)
    rows_BT = rows[:stretch].unfold(0, length, spacing).contiguous()
    rows_BT[:, :2] = rows[stretch:].view(windows, 2)
    q, k, v = (x.detach() for x in random(6, *((1, len(rows), n, width) for n in (heads, kv_heads, kv_heads))))
    q_BTHE, k_BTKE, v_BTKE = (x[0][rows_BT].float() for x in (q, k, v))
    expected = causal_attention.attend_plainly(q_BTHE, k_BTKE, v_BTKE, None)
    assert error(nested_attention(q, k, v, rows_BT, spacing), expected) < CLOSE


def network(record: str) -> GPT:
    """A record's mechanisms and depth at 128 channels, every parameter moved off its initial value."""
    small = {"vocab_size": 256, "width": 128, "heads": 4, "kv_heads": 2, "mlp_hidden": 192, "seq_len": 128}
    model = GPT(ModelConfig.model_validate(RECORDS[record] | small | {"table_dtype": "float32"}))
    model.init_weights(7)
    generator = torch.Generator().manual_seed(8)
    for parameter in model.parameters():
        parameter.data += (0.02 if parameter.ndim == 2 else 0.2) * torch.randn(parameter.shape, generator=generator)
    return model


def gradients(model: GPT, forward: Callable[..., Tensor], record: str, device: torch.device) -> tuple[float, Tensor]:
    """The loss of a batch (packed where the record packs) and all gradients as one vector."""
    packed = record == "r1958"
    tokens = torch.randint(2, 256, (1, 512) if packed else (4, 128), generator=torch.Generator().manual_seed(9)).to(
        device
    )
    segments = torch.tensor([0, 100, 228, 250, 378, 500, 512], dtype=torch.int32, device=device) if packed else None
    model.zero_grad()
    loss = forward(tokens, tokens.roll(-1, 1), segments=segments, looped=True)
    loss.backward()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return loss.item(), torch.cat([part.flatten().float().cpu() for part in parts])


@EVERY_RECORD
@pytest.mark.parametrize("graph", [False, True])
def test_a_network_on_the_gpu_learns_what_it_learns_on_the_cpu(record: str, graph: bool) -> None:
    """Loss and gradient of the fused bfloat16 path against float32; the direction must be that of the gradient."""
    model = network(record)
    expected_loss, expected = gradients(model, model, record, torch.device("cpu"))
    model.to_device(CUDA)
    torch.compiler.reset()
    forward = compiled(model) if graph else model
    loss, found = gradients(model, forward, record, CUDA)
    assert loss == pytest.approx(expected_loss, rel=5e-3)
    assert F.cosine_similarity(found, expected, dim=0) > 0.99
    assert error(found, expected) < 0.1


@EVERY_RECORD
def test_scoring_on_the_gpu_without_gradients_gives_the_same_loss(record: str) -> None:
    model = network(record).to_device(CUDA)
    tokens = torch.randint(2, 256, (4, 128), generator=torch.Generator().manual_seed(9)).to(CUDA)
    fused = model(tokens, tokens.roll(-1, 1)).item()
    with torch.no_grad():
        assert model(tokens, tokens.roll(-1, 1)).item() == pytest.approx(fused, rel=3e-3)


@EVERY_RECORD
@pytest.mark.parametrize("wanted", [None, 16])
def test_overlapping_windows_are_on_the_gpu_what_they_are_on_the_cpu(record: str, wanted: int | None) -> None:
    model = network(record)
    tokens = torch.randint(2, 256, (128 + 3 * 16,), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        expected = overlapping_hidden(model, tokens, spacing=16, wanted=wanted)
        model.to_device(CUDA)
        found = overlapping_hidden(model, tokens.to(CUDA), spacing=16, wanted=wanted)
    assert error(found.cpu(), expected) < 3e-2
