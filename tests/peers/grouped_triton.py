"""An expert FFN (gate, up, SwiGLU, down) over many experts with ragged rows, in Triton: what `grouped_ffn.py` times
beside PyTorch's and moemesh's.

Weights are [experts, n, k], k innermost and on the left of the product, so that few rows cost one pass over them. FP8 has
e4m3 weights with a scale per 128 x 128 and e4m3 rows with a scale per 128 values; each 128 of k are summed by themselves
and added scaled in f32 (DeepSeek-V3 report, section 3.3.2). n and k are multiples of 128.
"""

import os

import torch
import triton
import triton.language as tl

BLOCK = 128
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def product(
    x, x_scales, w, w_scales, out, tiles, k, n,
    FP8: tl.constexpr, GATED: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[rows, n] = x w^T of each tile's expert; gated: silu(gate) * up, whose weight rows are side by side."""
    tile = tiles + 3 * tl.program_id(0)
    expert, first, count = tl.load(tile).to(tl.int64), tl.load(tile + 1).to(tl.int64), tl.load(tile + 2)
    column = tl.program_id(1) * COLUMNS
    columns, rows, depth = column + tl.arange(0, COLUMNS), tl.arange(0, ROWS), tl.arange(0, 128)
    blocks, height = k // 128, 2 * n if GATED else n

    row_at = x + (first + rows)[None, :] * k + depth[:, None]
    at = w + (expert * height + columns)[:, None] * k + depth[None, :]
    scale_at = w_scales + (expert * (height // 128) + column // 128) * blocks
    row_scale_at = x_scales + (first + rows) * blocks
    seen = rows < count
    gate = tl.zeros((COLUMNS, ROWS), tl.float32)
    up = tl.zeros((COLUMNS, ROWS), tl.float32)
    for block in range(blocks):
        some = tl.load(row_at + block * 128, mask=seen[None, :], other=0.0)
        weight = tl.load(at + block * 128)
        if WIDE:  # Triton's interpreter takes the bits of bf16 operands for integers.
            some, weight = some.to(tl.float32), weight.to(tl.float32)
        part = tl.dot(weight, some)
        if FP8:
            row_scale = tl.load(row_scale_at + block, mask=seen, other=0.0)[None, :]
            part *= tl.load(scale_at + block) * row_scale
        gate += part
        if GATED:
            weight = tl.load(at + n.to(tl.int64) * k + block * 128)
            part = tl.dot(weight.to(tl.float32) if WIDE else weight, some)
            if FP8:
                part *= tl.load(scale_at + (n // 128) * blocks + block) * row_scale
            up += part
    if GATED:
        gate = gate * tl.sigmoid(gate) * up
    to = out + (first + rows)[None, :] * n + columns[:, None]
    tl.store(to, gate.to(tl.bfloat16), mask=seen[None, :])


@triton.jit
def code(x, codes, scales, rows, k, ROWS: tl.constexpr):
    """bf16 rows as e4m3 with a scale per 128 values."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    block, inside = tl.program_id(1), row < rows
    at = row[:, None] * k + block * 128 + tl.arange(0, 128)[None, :]
    values = tl.load(x + at, mask=inside[:, None], other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), 1) / 448.0, 1e-30)
    tl.store(codes + at, (values / scale[:, None]).to(tl.float8e4nv), mask=inside[:, None])
    tl.store(scales + row * (k // 128) + block, scale, mask=inside)


def coded_rows(x):
    (rows, k), most = x.shape, 8
    codes = torch.empty(rows, k, device=x.device, dtype=torch.float8_e4m3fn)
    scales = torch.empty(rows, k // BLOCK, device=x.device)
    code[(triton.cdiv(rows, most), k // BLOCK)](x, codes, scales, rows, k, ROWS=most)
    return codes, scales


def coded_weights(weights):
    """[experts, n, k] in e4m3, and scales [experts, n / 128, k / 128]; an expert at a time, as it takes memory."""
    codes, scales = torch.empty_like(weights, dtype=torch.float8_e4m3fn), []
    for weight, to in zip(weights, codes):
        blocks = weight.float().unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
        scale = blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-30) / 448
        to.copy_((blocks / scale).to(codes.dtype).reshape(weight.shape))
        scales.append(scale[:, 0, :, 0])
    return codes, torch.stack(scales).contiguous()


def decoded(codes, scales):
    """What coded weights, or rows, stand for, in double."""
    wide = scales.double().repeat_interleave(BLOCK, -1)
    wide = wide.repeat_interleave(BLOCK, -2) if codes.dim() == 3 else wide
    return codes.double() * wide


class Grouped:
    """An expert FFN over `counts` rows of each expert, one after the other; `up` is gate and up in one. With FP8 both
    weights are (codes, scales)."""

    def __init__(self, up, down, counts, tile=None, warps=4):
        self.fp8 = isinstance(up, tuple)
        # Scales that are not read need a pointer all the same.
        self.up, self.down = (up, down) if self.fp8 else ((up, up), (down, down))
        most = max(counts)
        self.tile = tile or (16 if most <= 16 else 64 if most <= 64 else 128)
        self.warps, tiles, first = warps, [], 0
        for expert, count in enumerate(counts):
            for at in range(0, count, self.tile):
                tiles.append((expert, first + at, min(self.tile, count - at)))
            first += count
        self.tiles = torch.tensor(tiles, device=self.up[0].device, dtype=torch.int32)

    def product(self, x, weight, n, gated):
        codes, scales = coded_rows(x) if self.fp8 else (x, x)
        out = torch.empty(x.shape[0], n, device=x.device, dtype=torch.bfloat16)
        # Two sums of a gated product take the registers of one of twice as many columns.
        columns = 64 if gated else 128
        product[(len(self.tiles), n // columns)](
            codes, scales, *weight, out, self.tiles, x.shape[1], n,
            FP8=self.fp8, GATED=gated, WIDE=INTERPRETED, ROWS=self.tile, COLUMNS=columns,
            num_warps=self.warps, num_stages=3 if self.tile == 128 else 4,
        )  # fmt: skip
        return out

    def __call__(self, x):
        hidden, inner = x.shape[1], self.down[0].shape[2]
        return self.product(self.product(x, self.up, inner, True), self.down, hidden, False)


def check(device):
    """Ragged rows of every tile, product by product, beside plain ones in double; raises where they differ."""
    torch.manual_seed(1)
    hidden, inner, counts = 384, 256, [3, 0, 1, 17, 16, 70, 33, 130]
    make = lambda *shape: torch.randn(*shape, device=device).to(torch.bfloat16)
    x = make(sum(counts), hidden)
    up, down = make(len(counts), 2 * inner, hidden) * 0.05, make(len(counts), hidden, inner) * 0.05
    # A code is off by half a step of 1/8 at most; the interpreter rounds 1.9 to 1, as it loses the carry.
    most = x.double().abs() * (1 / 2 if INTERPRETED else 1 / 16) + 1e-3
    assert ((decoded(*coded_rows(x)) - x.double()).abs() <= most).all(), "coded rows"

    def plain(x, weights, fp8):
        rows = decoded(*coded_rows(x)) if fp8 else x.double()
        weights = decoded(*weights) if fp8 else weights.double()
        return torch.cat([some @ weight.T for some, weight in zip(rows.split(counts), weights)])

    for fp8 in (False, True):
        weights = (coded_weights(up), coded_weights(down)) if fp8 else (up, down)
        for tile in (16, 64, 128):
            ffn = Grouped(*weights, counts, tile=tile)
            h = ffn.product(x, ffn.up, inner, True)
            gate, lifted = plain(x, weights[0], fp8).chunk(2, -1)
            expected = [torch.nn.functional.silu(gate) * lifted, plain(h, weights[1], fp8)]
            off = [((a.double() - b).norm() / b.norm()).item() for a, b in zip([h, ffn(x)], expected)]
            print(f"Triton, {'fp8' if fp8 else 'bf16'}, tiles of {tile} rows: off by", *(f"{x:.1e}" for x in off))
            assert max(off) <= 1e-2, "1e-2 is let pass"
