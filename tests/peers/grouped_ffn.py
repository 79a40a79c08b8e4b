"""Times an expert FFN of DeepSeek-V3's sizes over many experts in PyTorch and Triton, as lines of JSON like those of
`moemesh bench device --lines FILE`; with --beside FILE a table of all instead.

bf16 by torch._grouped_mm, FP8 (a scale per row and per weight row, coarser than 128 x 128) by
torch._scaled_grouped_mm, and a loop of torch.matmul as the floor of both; bf16 and FP8 (128 x 128 and 1 x 128) by the
kernels of grouped_triton.py, where there is Triton. What this PyTorch has not, or the device refuses, is said on stderr
and left out. With --check Triton's results are compared with plain products instead, on the CPU under TRITON_INTERPRET=1.
"""

import argparse
import json
import statistics
import sys
import time

import torch

try:
    import grouped_triton as triton
except ImportError as missing:
    triton, why = None, missing

E4M3 = torch.float8_e4m3fn


def timed(work, device, repeats):
    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(3):
        work()
    wait()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        wait()
        times.append((time.perf_counter() - start) / repeats)
    return statistics.median(times) * 1e6


def coded(x):
    """Codes, and a scale per last row."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448
    return (x.float() / scale).to(E4M3), scale.squeeze(-1)


def ways(up, down, coarse, fine, x, rows):
    """By name, what computes all rows: `up` is gate and up in one; `coarse` and `fine` are both weights in FP8, with
    scales as torch._scaled_grouped_mm and as Triton's kernels take them."""
    experts = up.shape[0]
    ends = torch.arange(1, experts + 1, device=x.device, dtype=torch.int32) * rows

    def gated(h):
        gate, up = h.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    def loop():
        for expert, some in enumerate(x.split(rows)):
            gated(some @ up[expert].T) @ down[expert].T

    def grouped():
        h = gated(torch._grouped_mm(x, up.transpose(1, 2), offs=ends))
        torch._grouped_mm(h, down.transpose(1, 2), offs=ends)

    def scaled():
        def product(x, weight):
            codes, scale = coded(x)
            weights, scales = weight
            return torch._scaled_grouped_mm(
                codes, weights.transpose(1, 2), scale, scales, offs=ends, out_dtype=torch.bfloat16
            )

        product(gated(product(x, up8)), down8)

    up8, down8 = coarse
    yield "torch loop", "bf16", loop
    yield "torch _grouped_mm", "bf16", grouped
    yield "torch _scaled_grouped_mm", "fp8", scaled
    for coding, weights in [("bf16", (up, down)), ("fp8", fine)] if triton else []:
        for warps in (4, 8):
            ffn = triton.Grouped(*weights, [rows] * experts, warps=warps)
            yield f"triton, {warps} warps", coding, lambda: ffn(x)


def first_line(error):
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]


def lines(args):
    device = torch.device(args.device)
    experts, hidden, inner = args.experts, args.hidden, args.inner
    make = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16) * 0.03
    both = make(experts, 2 * inner, hidden), make(experts, hidden, inner)
    # An expert at a time, as it takes memory.
    split = [[coded(weight) for weight in weights] for weights in both]
    stack = lambda parts: torch.stack([part.view(torch.uint8) for part in parts]).view(E4M3)
    coarse = [(stack(c for c, _ in some), torch.stack([scale for _, scale in some])) for some in split]
    fine = [triton.coded_weights(weights) for weights in both] if triton else []
    for rows in args.rows:
        active = min(experts, max(1, args.most // rows))
        x = torch.randn(active * rows, hidden, device=device, dtype=torch.bfloat16)
        up, down = (weights[:active] for weights in both)
        some = [[(codes[:active], scales[:active]) for codes, scales in coded] for coded in (coarse, fine)]
        for engine, coding, work in ways(up, down, *some, x, rows):
            try:
                us = timed(work, device, args.repeats)
            except Exception as error:  # Triton's compiler has errors of many kinds.
                print(f"{engine}, {coding}, {rows} rows: left out: {first_line(error)}", file=sys.stderr)
                continue
            yield {"engine": engine, "coding": coding, "experts": active, "rows": rows, "us": us}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--inner", type=int, default=2048)
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--most", type=int, default=1 << 14, help="rows of a batch")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--beside", metavar="FILE", help="lines of `moemesh bench device --lines FILE`")
    parser.add_argument("--check", action="store_true", help="compare Triton's results with plain products")
    args = parser.parse_args()
    if triton is None:
        print(f"Triton is left out: {why}", file=sys.stderr)
    if args.check:
        sys.exit("nothing to check") if triton is None else triton.check(torch.device(args.device))
        return
    if args.beside is None:
        for line in lines(args):
            print(json.dumps(line), flush=True)
        return
    with open(args.beside) as file:
        ours = {(l["coding"], l["experts"], l["rows"]): l["us"] for l in map(json.loads, file)}
    versions = f"PyTorch {torch.__version__}" + (f", Triton {triton.triton.__version__}" if triton else "")
    print(f"{versions}\n\n| experts x rows | coding | engine | us | to ours |\n|---|---|---|---|---|")
    for line in lines(args):
        our = ours.get((line["coding"], line["experts"], line["rows"]))
        ratio = f"{line['us'] / our:.2f}" if our else "–"
        print(f"| {line['experts']} x {line['rows']} | {line['coding']} | {line['engine']} | {line['us']:.0f} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
