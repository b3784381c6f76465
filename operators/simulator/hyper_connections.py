"""Manifold-constrained hyper-connections: mixing four residual streams into one and back.

The fused kernels multiply by the mixing matrix in HF32. On Ascend 950 the CANN recipes' binding composes
calls of more than 512 tokens that are no multiple of 8192 from smaller kernels, with a float32 product.
Sources: bindings and examples of the CANN recipes and vLLM-Ascend; README of mhc_pre and mhc_post in
ops-transformer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_v4.operators.simulator.kernels import kernel
from ascend_v4.operators.simulator.state import SimulatedChip, require, require_size

STREAMS = 4
MIXES = (2 + STREAMS) * STREAMS
HIDDEN = (4096, 7168)
SINKHORN_ITERATIONS = 20
FUSED_TOKENS = 512
FUSED_MULTIPLE = 8192
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
MHC_STREAMS = (4, 6, 8)
MHC_WIDTH = 16384
MHC_WIDTH_A2_A3 = 100_000


def _require_streams(sim: SimulatedChip, operator: str, x: Tensor) -> None:
    require(x.dim() in (3, 4), operator, f"x must be [T, 4, d] or [B, S, 4, d], is {tuple(x.shape)}")
    require(x.numel() > 0, operator, f"x {tuple(x.shape)} has an empty axis; every size must be positive")
    require(x.shape[-2] == STREAMS, operator, f"x must have {STREAMS} streams, has {x.shape[-2]}")
    hidden = x.shape[-1]
    require_size(sim, operator, "hidden", hidden, hidden in HIDDEN, "4096 or 7168")


def _require_pre(
    sim: SimulatedChip,
    operator: str,
    x: Tensor,
    *,
    hc_fn: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    hc_mult: int,
    hc_sinkhorn_iters: int,
) -> None:
    _require_streams(sim, operator, x)
    require(x.dtype is torch.bfloat16, operator, f"x must be bfloat16, is {x.dtype}")
    want = (MIXES, STREAMS * x.shape[-1])
    require(tuple(hc_fn.shape) == want, operator, f"hc_fn must be {want}, is {tuple(hc_fn.shape)}")
    require(
        tuple(hc_scale.shape) == (3,), operator, f"hc_scale must have 3 values, is {tuple(hc_scale.shape)}"
    )
    require(
        tuple(hc_base.shape) == (MIXES,), operator, f"hc_base must have 24 values, is {tuple(hc_base.shape)}"
    )
    for name, given in (("hc_fn", hc_fn), ("hc_scale", hc_scale), ("hc_base", hc_base)):
        require(given.dtype is torch.float32, operator, f"{name} must be float32, is {given.dtype}")
    require(hc_mult == STREAMS, operator, f"hc_mult must be {STREAMS}, is {hc_mult}")
    require(hc_sinkhorn_iters > 0, operator, f"hc_sinkhorn_iters must be positive, is {hc_sinkhorn_iters}")


def _outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of y, post and comb for streams x."""
    rows = x.shape[:-2]
    return (
        x.new_empty((*rows, x.shape[-1]), dtype=torch.bfloat16),
        x.new_empty((*rows, STREAMS), dtype=torch.float32),
        x.new_empty((*rows, STREAMS, STREAMS), dtype=torch.float32),
    )


def _split(
    mixes: Tensor, scale: Tensor, base: Tensor, x: Tensor, *, iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, post and the doubly stochastic comb from mixes that are already divided by the root mean square.

    Columns are normalised first, after a softmax over rows; a further iteration takes rows, then columns.
    """
    pre, post, comb = torch.split(mixes, [STREAMS, STREAMS, STREAMS * STREAMS], dim=-1)
    pre = torch.sigmoid(pre * scale[0] + base[:STREAMS]) + eps
    post = 2.0 * torch.sigmoid(post * scale[1] + base[STREAMS : 2 * STREAMS])
    comb = (comb * scale[2] + base[2 * STREAMS :]).reshape(*comb.shape[:-1], STREAMS, STREAMS)
    comb = comb.softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    y = (pre.unsqueeze(-1) * x.float()).sum(-2)
    return y.to(torch.bfloat16), post.float(), comb.float()


def _inverse_rms(x: Tensor, epsilon: float) -> Tensor:
    """Of streams that are float32 or float64, in their own dtype."""
    return torch.rsqrt(x.flatten(-2).square().mean(-1, keepdim=True) + epsilon)


def _pre_meta(
    sim: SimulatedChip,
    *,
    x: Tensor,
    hc_fn: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    hc_mult: int,
    hc_sinkhorn_iters: int,
    **_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    _require_pre(
        sim,
        "npu_hc_pre",
        x,
        hc_fn=hc_fn,
        hc_scale=hc_scale,
        hc_base=hc_base,
        hc_mult=hc_mult,
        hc_sinkhorn_iters=hc_sinkhorn_iters,
    )
    return _outputs(x)


@kernel("_C_ascend::npu_hc_pre_v2", meta=_pre_meta)
@kernel("_C_ascend::npu_hc_pre", meta=_pre_meta)
def vllm_hc_pre(
    sim: SimulatedChip,
    *,
    x: Tensor,
    hc_fn: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    hc_mult: int,
    hc_sinkhorn_iters: int,
    norm_eps: float,
    hc_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, post, comb) of the streams: npu_hc_pre_v2 at vLLM-Ascend's HEAD, npu_hc_pre in the 0.23.0 wheel."""
    _require_pre(
        sim,
        "npu_hc_pre",
        x,
        hc_fn=hc_fn,
        hc_scale=hc_scale,
        hc_base=hc_base,
        hc_mult=hc_mult,
        hc_sinkhorn_iters=hc_sinkhorn_iters,
    )
    product = sim.wide(sim.hf32(x.flatten(-2))) @ sim.wide(sim.hf32(hc_fn)).T
    mixes = product * _inverse_rms(sim.wide(x), norm_eps)
    return _split(mixes, hc_scale, hc_base, x, iterations=hc_sinkhorn_iters, eps=hc_eps)


@kernel("custom::npu_hc_pre", meta=_pre_meta)
def recipes_hc_pre(
    sim: SimulatedChip,
    *,
    x: Tensor,
    hc_fn: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    hc_mult: int,
    hc_sinkhorn_iters: int,
    norm_eps: float,
    hc_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in the CANN recipes' package, which documents 20 iterations only."""
    name = "npu_hc_pre"
    _require_pre(
        sim,
        name,
        x,
        hc_fn=hc_fn,
        hc_scale=hc_scale,
        hc_base=hc_base,
        hc_mult=hc_mult,
        hc_sinkhorn_iters=hc_sinkhorn_iters,
    )
    require(
        hc_sinkhorn_iters == SINKHORN_ITERATIONS, name, f"hc_sinkhorn_iters must be 20: {hc_sinkhorn_iters}"
    )
    tokens = x.shape[:-2].numel()
    fused = not sim.is_950 or tokens <= FUSED_TOKENS or tokens % FUSED_MULTIPLE == 0
    flat, fn = (sim.hf32(x.flatten(-2)), sim.hf32(hc_fn)) if fused else (x.flatten(-2), hc_fn)
    mixes = sim.wide(flat) @ sim.wide(fn).T * _inverse_rms(sim.wide(x), norm_eps)
    return _split(mixes, hc_scale, hc_base, x, iterations=hc_sinkhorn_iters, eps=hc_eps)


def _inv_rms_meta(sim: SimulatedChip, *, x: Tensor, **_: object) -> Tensor:
    return x.new_empty((*x.shape[:-2], 1), dtype=torch.float32)


@kernel("_C_ascend::npu_hc_pre_inv_rms", meta=_inv_rms_meta)
@kernel("custom::npu_hc_pre_inv_rms", meta=_inv_rms_meta)
def npu_hc_pre_inv_rms(sim: SimulatedChip, *, x: Tensor, epsilon: float) -> Tensor:
    """1 / root mean square over streams and channels, with a last axis of 1."""
    name = "npu_hc_pre_inv_rms"
    require(x.dim() >= 3, name, f"x must be [..., streams, d], is {tuple(x.shape)}")
    require(x.numel() > 0, name, f"x is empty: {tuple(x.shape)}")
    require(x.dtype in FLOATS, name, f"x must be float16, bfloat16 or float32, is {x.dtype}")
    require(epsilon >= 0, name, f"epsilon must not be negative, is {epsilon}")
    return _inverse_rms(x.float(), epsilon)


def _sinkhorn_meta(sim: SimulatedChip, *, x: Tensor, **_: object) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x)


@kernel("_C_ascend::npu_hc_pre_sinkhorn", meta=_sinkhorn_meta)
@kernel("custom::npu_hc_pre_sinkhorn", meta=_sinkhorn_meta)
def npu_hc_pre_sinkhorn(
    sim: SimulatedChip,
    *,
    mixes: Tensor,
    rsqrt: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    x: Tensor,
    hc_mult: int,
    hc_sinkhorn_iters: int,
    hc_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, post, comb) from the raw product and the inverse root mean square."""
    name = "npu_hc_pre_sinkhorn"
    _require_streams(sim, name, x)
    require(hc_mult == STREAMS, name, f"hc_mult must be {STREAMS}, is {hc_mult}")
    rows = x.shape[:-2]
    require(mixes.shape == (*rows, MIXES), name, f"mixes must be {(*rows, MIXES)}, is {tuple(mixes.shape)}")
    require(
        rsqrt.numel() == rows.numel(), name, f"rsqrt must have one value per row, is {tuple(rsqrt.shape)}"
    )
    for label, given in (("mixes", mixes), ("rsqrt", rsqrt), ("hc_scale", hc_scale), ("hc_base", hc_base)):
        require(given.dtype is torch.float32, name, f"{label} must be float32, is {given.dtype}")
    scaled = mixes * rsqrt.reshape(*rows, 1)
    return _split(scaled, hc_scale, hc_base, x, iterations=hc_sinkhorn_iters, eps=hc_eps)


def _require_post(operator: str, x: Tensor, residual: Tensor, post: Tensor, comb: Tensor) -> None:
    require(x.numel() > 0, operator, f"x {tuple(x.shape)} has an empty axis; every size must be positive")
    rows, hidden = x.shape[:-1], x.shape[-1]
    for name, given, want in (
        ("residual", residual, (*rows, STREAMS, hidden)),
        ("post", post, (*rows, STREAMS)),
        ("comb", comb, (*rows, STREAMS, STREAMS)),
    ):
        require(tuple(given.shape) == want, operator, f"{name} must be {want}, is {tuple(given.shape)}")
    require(x.dtype in FLOATS, operator, f"x must be float16, bfloat16 or float32, is {x.dtype}")
    require(residual.dtype is x.dtype, operator, f"residual must be {x.dtype} like x, is {residual.dtype}")
    require(post.dtype in FLOATS, operator, f"post must be float16, bfloat16 or float32, is {post.dtype}")
    require(comb.dtype is post.dtype, operator, f"comb must be {post.dtype} like post, is {comb.dtype}")


def _posted(x: Tensor, residual: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """out[i] = post[i] * x + sum over j of comb[j, i] * residual[j]."""
    mixed = comb.float().transpose(-1, -2) @ residual.float()
    return (post.float().unsqueeze(-1) * x.float().unsqueeze(-2) + mixed).to(residual.dtype)


def _post_meta(sim: SimulatedChip, *, residual: Tensor, **_: object) -> Tensor:
    return torch.empty_like(residual)


@kernel("_C_ascend::npu_hc_post", meta=_post_meta)
def vllm_hc_post(sim: SimulatedChip, *, x: Tensor, residual: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """The streams after a sublayer; x must be [b, s, d], so callers add a batch axis."""
    name = "npu_hc_post"
    require(x.dim() == 3, name, f"x must be [b, s, d], is {tuple(x.shape)}")
    _require_post(name, x, residual, post, comb)
    return _posted(x, residual, post, comb)


@kernel("custom::npu_hc_post", meta=_post_meta)
def recipes_hc_post(sim: SimulatedChip, *, x: Tensor, residual: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """The same for x of [bs, d] or [b, s, d], at the widths of the released models."""
    name = "npu_hc_post"
    require(x.dim() in (2, 3), name, f"x must be [bs, d] or [b, s, d], is {tuple(x.shape)}")
    _require_post(name, x, residual, post, comb)
    require_size(sim, name, "hidden", x.shape[-1], x.shape[-1] in HIDDEN, "4096 or 7168")
    return _posted(x, residual, post, comb)


def _require_mhc(sim: SimulatedChip, operator: str, streams: int, width: int) -> None:
    if sim.is_950:
        require(streams in MHC_STREAMS, operator, f"n must be 4, 6 or 8, is {streams}")
        fits = 0 < width <= MHC_WIDTH and width % 16 == 0
        require(fits, operator, f"D must be a multiple of 16 up to {MHC_WIDTH}, is {width}")
        return
    require(streams == STREAMS, operator, f"n must be 4, is {streams}")
    fits = 0 < width <= MHC_WIDTH_A2_A3 and width % 128 == 0
    require(fits, operator, f"D must be a multiple of 128 up to {MHC_WIDTH_A2_A3}, is {width}")


def _mhc_pre_meta(
    sim: SimulatedChip, *, x: Tensor, alpha: Tensor, out_flag: int, **_: object
) -> tuple[Tensor | None, ...]:
    *rows, streams, width = x.shape

    def wide(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    h_res = wide(*rows, streams, streams) if alpha.shape[0] == 3 else wide(1)
    first = x.new_empty((*rows, width)), wide(*rows, streams), h_res
    if not out_flag:
        return (*first, None, None, None)
    return (*first, wide(*rows), wide(*rows, streams * (streams + 2)), wide(*rows, streams))


@kernel("npu::npu_mhc_pre", meta=_mhc_pre_meta)
def npu_mhc_pre(
    sim: SimulatedChip,
    *,
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    norm_eps: float,
    hc_eps: float,
    out_flag: int,
    inner_precise: int,
) -> tuple[Tensor | None, ...]:
    """(h_in, h_post, h_res before Sinkhorn, and with out_flag 1: inv_rms, h_mix, h_pre)."""
    name = "npu_mhc_pre"
    require(
        x.dim() in (3, 4) and x.numel() > 0, name, f"x must be [T, n, D] or [B, S, n, D]: {tuple(x.shape)}"
    )
    require(x.dtype in (torch.float16, torch.bfloat16), name, f"x must be float16 or bfloat16, is {x.dtype}")
    *rows, streams, width = x.shape
    _require_mhc(sim, name, streams, width)
    mixes = streams * (streams + 2)
    require(tuple(alpha.shape) == (3,), name, "only alpha of 3 values is simulated")
    require(tuple(phi.shape) == (mixes, streams * width), name, f"phi has shape {tuple(phi.shape)}")
    require(tuple(bias.shape) == (mixes,), name, f"bias must have {mixes} values, is {tuple(bias.shape)}")
    require(out_flag in (0, 1), name, f"out_flag must be 0 or 1, is {out_flag}")
    require(
        inner_precise == 0 or (sim.is_950 and inner_precise == 1), name, "inner_precise 1 is for 950 only"
    )
    flat = x.float().flatten(-2)
    inverse = torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    weighted = flat if gamma is None else flat * gamma.float().flatten()
    h_mix = sim.hf32(weighted) @ sim.hf32(phi).T if inner_precise else weighted @ phi.T
    pre, post, res = torch.split(h_mix * inverse, [streams, streams, streams * streams], dim=-1)
    h_pre = torch.sigmoid(pre * alpha[0] + bias[:streams]) + hc_eps
    h_post = 2.0 * torch.sigmoid(post * alpha[1] + bias[streams : 2 * streams])
    h_res = (res * alpha[2] + bias[2 * streams :]).reshape(*rows, streams, streams)
    h_in = (h_pre.unsqueeze(-1) * x.float()).sum(-2).to(x.dtype)
    if not out_flag:
        return h_in, h_post, h_res, None, None, None
    return h_in, h_post, h_res, inverse.squeeze(-1), h_mix, h_pre


def _mhc_post_meta(sim: SimulatedChip, *, x: Tensor, **_: object) -> Tensor:
    return torch.empty_like(x)


@kernel("npu::npu_mhc_post", meta=_mhc_post_meta)
def npu_mhc_post(
    sim: SimulatedChip, *, x: Tensor, h_res: Tensor | None, h_out: Tensor, h_post: Tensor
) -> Tensor:
    """h_res transposed times x, plus h_out times h_post; without h_res, x itself (950 only)."""
    name = "npu_mhc_post"
    require(
        x.dim() in (3, 4) and x.numel() > 0, name, f"x must be [T, n, D] or [B, S, n, D]: {tuple(x.shape)}"
    )
    require(x.dtype in (torch.float16, torch.bfloat16), name, f"x must be float16 or bfloat16, is {x.dtype}")
    *rows, streams, width = x.shape
    _require_mhc(sim, name, streams, width)
    require(h_res is not None or sim.is_950, name, "h_res is required on A2 and A3")
    require(tuple(h_out.shape) == (*rows, width), name, f"h_out has shape {tuple(h_out.shape)}")
    require(tuple(h_post.shape) == (*rows, streams), name, f"h_post has shape {tuple(h_post.shape)}")
    if h_res is None:
        return (x.float() + h_post.float().unsqueeze(-1) * h_out.float().unsqueeze(-2)).to(x.dtype)
    require(tuple(h_res.shape) == (*rows, streams, streams), name, f"h_res has shape {tuple(h_res.shape)}")
    return _posted(h_out, x, h_post, h_res)
