"""Attention kernels behind causal_attention.attend, the function that chooses among them, and torch.compile.

Each kernel is a torch.library operator of queries (B, T, H, E), keys and values (B, T, K, E), bfloat16 on CUDA. So the
compiler takes it as a whole, whatever library does the work. It returns the result (B, T, H, E) and the logarithm of
each query's softmax denominator, float32, which its backward pass reads.

Legend: B rows, T tokens, N = B·T, H query heads, K key/value heads, E width of a head, S segments.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

# cuDNN is used for lengths that are multiples of this: it plans every new shape, which takes it up to a second.
CUDNN_MULTIPLE = 128
# FlashAttention-4 4.0.0b36 has wrong gradients within segments for narrower heads (seen on an H100 at 8 and 16).
FLASH4_HEAD_DIM = 32


def attention_backend(device: torch.device, dtype: torch.dtype, head_dim: int, *, length: int, packed: bool) -> str:
    """The name of the kernel for heads of so many channels in rows of `length` tokens, or in packed documents.

    "plain" (PyTorch's own choice, with a mask for documents) unless the device is CUDA and the dtype bfloat16. There:
    "flash4" (FlashAttention-4, package flash-attn-4) if it is installed, the GPU is a Hopper or newer and a head wide
    enough; "flash3" (FlashAttention-3, module flash_attn_interface, in the images of the challenge's machines) if that
    is installed on a Hopper; "cudnn" for whole rows on a Hopper or newer; else "flash2" (FlashAttention-2, which comes
    with PyTorch). cuDNN's gradients differ from run to run, so it has none to compute where deterministic algorithms
    are asked for.
    """
    if device.type != "cuda" or dtype != torch.bfloat16:
        return "plain"
    generation = torch.cuda.get_device_capability(device)[0]
    modern = generation in (9, 10)
    if modern and head_dim >= FLASH4_HEAD_DIM and find_spec("flash_attn") and find_spec("flash_attn.cute"):
        return "flash4"
    if generation == 9 and find_spec("flash_attn_interface"):
        return "flash3"
    exact = torch.are_deterministic_algorithms_enabled() and torch.is_grad_enabled()
    return "cudnn" if modern and not packed and length % CUDNN_MULTIPLE == 0 and not exact else "flash2"


@torch.library.custom_op("fairway::cudnn_attention", mutates_args=())
def cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention within rows, by cuDNN."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    o, lse, *_ = aten._scaled_dot_product_cudnn_attention(*heads_first, None, True, 0.0, True)
    return o.transpose(1, 2).contiguous(), lse.view(lse.shape[:3])


@torch.library.custom_op("fairway::cudnn_attention_backward", mutates_args=())
def cudnn_attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    heads_first = (x.transpose(1, 2) for x in (do, q, k, v, o))
    # Seed, offset and lengths are read only with dropout or packed rows; a mask is absent if it is undefined.
    unused, length = torch.zeros((), dtype=torch.long, device=q.device), q.size(1)
    gradients = aten._scaled_dot_product_cudnn_attention_backward(
        *heads_first, lse[..., None], unused, unused, None, None, None, length, length, 0.0, True
    )
    dq, dk, dv = (x.transpose(1, 2).contiguous() for x in gradients)
    return dq, dk, dv


@torch.library.custom_op("fairway::flash2_attention", mutates_args=())
def flash2_attention(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, longest: int) -> tuple[Tensor, Tensor]:
    """Causal attention within rows, or within segments of at most `longest` tokens, by FlashAttention-2."""
    rows = _packed(segments, q, k, v)
    o, lse, *_ = aten._flash_attention_forward(*rows, segments, segments, longest, longest, 0.0, True, False)
    return o.view_as(q), lse


@torch.library.custom_op("fairway::flash2_attention_backward", mutates_args=())
def flash2_attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, segments: Tensor | None, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    rows = _packed(segments, do.contiguous(), q, k, v, o)
    state = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    dq, dk, dv = aten._flash_attention_backward(*rows, lse, segments, segments, longest, longest, 0.0, True, *state)
    return dq.view_as(q), dk.view_as(k), dv.view_as(v)


@torch.library.custom_op("fairway::flash4_attention", mutates_args=())
def flash4_attention(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, longest: int) -> tuple[Tensor, Tensor]:
    """Causal attention within rows, or within segments of at most `longest` tokens, by FlashAttention-4."""
    from flash_attn.cute.interface import _flash_attn_fwd

    rows = _packed(segments, q, k, v)
    o, lse, *_ = _flash_attn_fwd(*rows, causal=True, return_lse=True, **_lengths(segments, longest))
    return o.view_as(q), lse


@torch.library.custom_op("fairway::flash4_attention_backward", mutates_args=())
def flash4_attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, segments: Tensor | None, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    from flash_attn.cute.interface import _flash_attn_bwd

    do, *rows = _packed(segments, do.contiguous(), q, k, v, o)
    fixed_order = torch.are_deterministic_algorithms_enabled()
    dq, dk, dv = _flash_attn_bwd(*rows, do, lse, causal=True, deterministic=fixed_order, **_lengths(segments, longest))
    return dq.view_as(q), dk.view_as(k), dv.view_as(v)


def flash3_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, longest: int
) -> tuple[Tensor, Tensor | None]:
    """Causal attention within rows, or within segments of at most `longest` tokens, by FlashAttention-3.

    The library brings its own gradient and its own operators for the compiler. Its older versions return a pair, of
    which the first part is the result. The second value here is None: nobody needs the softmax's denominator.
    """
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    options = {"causal": True, "deterministic": torch.are_deterministic_algorithms_enabled()}
    rows = _packed(segments, q, k, v)
    found = (
        flash_attn_func(*rows, **options)
        if segments is None
        else flash_attn_varlen_func(*rows, **_lengths(segments, longest), **options)
    )
    o = found[0] if isinstance(found, tuple) else found
    return o.view_as(q), None


def recent_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attention of queries at the last positions, each to the `window` positions up to its own, by FlashAttention-2.

    It is not an operator of ours, and not compiled.
    """
    lengths, causal = (None, None, q.size(1), k.size(1)), (0.0, True, False)
    q, k, v = (x.contiguous() for x in (q, k, v))
    # FlashAttention counts the positions before a query's own, and aligns the last query with the last key.
    o: Tensor = aten._flash_attention_forward(
        q, k, v, *lengths, *causal, window_size_left=window - 1, window_size_right=0
    )[0]
    return o


def recent_packed_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, query_bounds: Tensor, key_bounds: Tensor
) -> Tensor:
    """As recent_attention, each query within its segment of the keys, by FlashAttention-2.

    The bounds (n,) int32 say where segments begin among all queries and all keys, row after row, and where the last one
    ends. A segment's last query stands at its last key. It may have keys without queries.
    """
    longest = q.size(1), k.size(1)
    o: Tensor = aten._flash_attention_forward(
        *_packed(query_bounds, q, k, v),
        query_bounds,
        key_bounds,
        *longest,
        *(0.0, True, False),
        window_size_left=window - 1,
        window_size_right=0,
    )[0]
    return o.view_as(q)


def _packed(segments: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """The tensors as they are, (B, T, ...), or where there are segments as one sequence of all tokens, (N, ...)."""
    return list(tensors) if segments is None else [x.flatten(0, 1) for x in tensors]


def _lengths(segments: Tensor | None, longest: int) -> dict[str, Any]:
    """The arguments of FlashAttention-3 and -4 that say where segments are."""
    if segments is None:
        return {}
    return dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), segments) | dict.fromkeys(
        ("max_seqlen_q", "max_seqlen_k"), longest
    )


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None = None, longest: int = 0
) -> tuple[Tensor, Tensor]:
    rows, length, heads, _ = q.shape
    shape = (rows, heads, length) if segments is None else (heads, rows * length)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)


def _fake_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *rest = inputs
    segments, ctx.longest = rest or (None, None)
    ctx.save_for_backward(q, k, v, *output, segments)


def _register(forward: Any, backward: Any) -> None:
    """Shapes for the compiler, and the gradient."""

    def gradients(ctx: Any, do: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, segments = ctx.saved_tensors
        packing = () if ctx.longest is None else (segments, ctx.longest)
        return *backward(do, *tensors, *packing), *(None for _ in packing)

    forward.register_fake(_fake_forward)
    backward.register_fake(_fake_backward)
    forward.register_autograd(gradients, setup_context=_save)


_register(cudnn_attention, cudnn_attention_backward)
_register(flash2_attention, flash2_attention_backward)
_register(flash4_attention, flash4_attention_backward)


def compiled(function: Callable[..., Any], *, backend: Any = "inductor", fullgraph: bool = False) -> Callable[..., Any]:
    """The function compiled for fixed shapes; the attention kernel is chosen when a shape is compiled."""
    # Marked here and not where it is defined: marking imports the compiler, which takes a second that most runs on a
    # CPU need not spend.
    torch.compiler.assume_constant_result(attention_backend)
    return torch.compile(function, dynamic=False, backend=backend, fullgraph=fullgraph)


def compiled_on_gpu(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The function compiled for a GPU; on a CPU as it is, where compiling takes longer than it saves."""
    return compiled(function) if device.type == "cuda" else function
