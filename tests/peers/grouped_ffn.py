"""Times an expert FFN of DeepSeek-V3's sizes over many experts in PyTorch, as lines of JSON like those of
`moemesh bench device --lines FILE`; with --beside FILE a table of both instead.

bf16 by torch._grouped_mm, FP8 (a scale per row and per weight row, coarser than 128 x 128) by
torch._scaled_grouped_mm, and a loop of torch.matmul as the floor of both. What this PyTorch has not, or the device
refuses, is said on stderr and left out.
"""

import argparse
import json
import statistics
import sys
import time

import torch

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


def ways(up, down, x, rows):
    """By name, what computes all rows: `up` is gate and up in one."""
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

    up8, down8 = coded(up), coded(down)
    return [("torch loop", "bf16", loop), ("torch _grouped_mm", "bf16", grouped), ("torch _scaled_grouped_mm", "fp8", scaled)]


def lines(args):
    device = torch.device(args.device)
    experts, hidden, inner = args.experts, args.hidden, args.inner
    make = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16) * 0.03
    up, down = make(experts, 2 * inner, hidden), make(experts, hidden, inner)
    for rows in args.rows:
        active = min(experts, max(1, args.most // rows))
        x = torch.randn(active * rows, hidden, device=device, dtype=torch.bfloat16)
        for engine, coding, work in ways(up[:active], down[:active], x, rows):
            try:
                us = timed(work, device, args.repeats)
            except (RuntimeError, AttributeError, NotImplementedError) as error:
                print(f"{engine}, {rows} rows: left out: {str(error).splitlines()[0]}", file=sys.stderr)
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
    args = parser.parse_args()
    if args.beside is None:
        for line in lines(args):
            print(json.dumps(line), flush=True)
        return
    with open(args.beside) as file:
        ours = {(l["coding"], l["experts"], l["rows"]): l["us"] for l in map(json.loads, file)}
    print(f"PyTorch {torch.__version__}\n\n| experts x rows | coding | engine | us | to ours |\n|---|---|---|---|---|")
    for line in lines(args):
        our = ours.get((line["coding"], line["experts"], line["rows"]))
        ratio = f"{line['us'] / our:.2f}" if our else "–"
        print(f"| {line['experts']} x {line['rows']} | {line['coding']} | {line['engine']} | {line['us']:.0f} | {ratio} |")


if __name__ == "__main__":
    main()
