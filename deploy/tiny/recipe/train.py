"""Train the tiny deepseek_v3 model on a CPU and export it in the published checkpoint layout.

  train.py --data DIR --out DIR --minutes 45

The model below is numerically the Hugging Face DeepseekV3ForCausalLM, with the experts of a
layer stored as one tensor and applied to tokens sorted by expert.  Routing is balanced by the
auxiliary-loss-free rule: after every step bias += gamma * sign(mean load - load), no gradient.
Hidden matrices are trained with Muon, the rest with AdamW.  The learning rate follows the
share of the time budget that is used, so the run always ends on a finished schedule.
"""
import argparse, json, math, os, shutil, time
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

CONFIG = dict(
    architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", vocab_size=4096, hidden_size=256, intermediate_size=512,
    moe_intermediate_size=64, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8, n_shared_experts=1,
    n_routed_experts=32, num_experts_per_tok=4, n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5,
    scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1, first_k_dense_replace=1, q_lora_rank=96, kv_lora_rank=64,
    qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, hidden_act="silu", max_position_embeddings=2048, rms_norm_eps=1e-6,
    rope_theta=10000.0, rope_scaling=None, rope_interleave=True, attention_bias=False, attention_dropout=0.0,
    tie_word_embeddings=False, initializer_range=0.02, use_cache=True, num_nextn_predict_layers=0,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, torch_dtype="bfloat16")
C = type("Config", (), CONFIG)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<|system|>' + message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


class Norm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, C.rms_norm_eps)


def linear(i, o):
    return nn.Linear(i, o, bias=False)


def rotate(x, cos, sin):
    """Interleaved RoPE: the pairs are (x0,x1), (x2,x3), ..."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.nope, self.rope, self.v, self.h = C.qk_nope_head_dim, C.qk_rope_head_dim, C.v_head_dim, C.num_attention_heads
        self.q_a_proj = linear(C.hidden_size, C.q_lora_rank)
        self.q_a_layernorm = Norm(C.q_lora_rank)
        self.q_b_proj = linear(C.q_lora_rank, self.h * (self.nope + self.rope))
        self.kv_a_proj_with_mqa = linear(C.hidden_size, C.kv_lora_rank + self.rope)
        self.kv_a_layernorm = Norm(C.kv_lora_rank)
        self.kv_b_proj = linear(C.kv_lora_rank, self.h * (self.nope + self.v))
        self.o_proj = linear(self.h * self.v, C.hidden_size)

    def forward(self, x, cos, sin):
        B, T, _ = x.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(B, T, self.h, -1).transpose(1, 2)
        qn, qr = q.split([self.nope, self.rope], -1)
        ckv, kr = self.kv_a_proj_with_mqa(x).split([C.kv_lora_rank, self.rope], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(ckv)).view(B, T, self.h, -1).transpose(1, 2)
        kn, v = kv.split([self.nope, self.v], -1)
        q = torch.cat([qn, rotate(qr, cos, sin)], -1)
        k = torch.cat([kn, rotate(kr[:, None], cos, sin).expand(-1, self.h, -1, -1)], -1)
        v = F.pad(v, (0, self.rope + self.nope - self.v))      # equal head sizes: lets torch take its fused kernel
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)[..., :self.v]
        return self.o_proj(o.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linear(C.hidden_size, n), linear(C.hidden_size, n), linear(n, C.hidden_size)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    def __init__(self):
        super().__init__()
        E, H, I = C.n_routed_experts, C.hidden_size, C.moe_intermediate_size
        self.gate = linear(H, E)
        self.gate_up = nn.Parameter(torch.empty(E, 2, I, H))       # [gate, up]
        self.down = nn.Parameter(torch.empty(E, H, I))
        self.shared_experts = MLP(I * C.n_shared_experts)
        self.register_buffer("bias", torch.zeros(E))
        self.load = None

    def route(self, x):
        scores = self.gate(x).sigmoid()
        with torch.no_grad():
            choice = scores + self.bias
            groups = choice.view(-1, C.n_group, C.n_routed_experts // C.n_group).topk(2, -1).values.sum(-1)
            keep = torch.zeros_like(groups).scatter_(1, groups.topk(C.topk_group, -1).indices, 1.0)
            choice = choice.masked_fill(keep.repeat_interleave(C.n_routed_experts // C.n_group, 1) == 0, float("-inf"))
            idx = choice.topk(C.num_experts_per_tok, -1).indices
        w = scores.gather(1, idx)
        return idx, w / (w.sum(-1, keepdim=True) + 1e-20) * C.routed_scaling_factor

    def forward(self, x):
        B, T, H = x.shape
        flat = x.reshape(-1, H)
        idx, w = self.route(flat)
        order = idx.flatten().argsort(stable=True)
        tokens = order // C.num_experts_per_tok
        self.load = torch.bincount(idx.flatten(), minlength=C.n_routed_experts)
        rows = flat[tokens].split(self.load.tolist())
        out = []
        for r, gu, dn in zip(rows, self.gate_up.unbind(0), self.down.unbind(0)):
            g, u = F.linear(r, gu.flatten(0, 1)).chunk(2, -1)
            out.append(F.linear(F.silu(g) * u, dn))
        out = torch.cat(out) * w.flatten()[order, None]
        return (torch.zeros_like(flat).index_add(0, tokens, out) + self.shared_experts(flat)).view(B, T, H)


class Layer(nn.Module):
    def __init__(self, i):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(C.hidden_size), Norm(C.hidden_size)
        self.self_attn = Attention()
        self.mlp = MLP(C.intermediate_size) if i < C.first_k_dense_replace else MoE()

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(C.vocab_size, C.hidden_size)
        self.layers = nn.ModuleList(Layer(i) for i in range(C.num_hidden_layers))
        self.norm, self.lm_head = Norm(C.hidden_size), linear(C.hidden_size, C.vocab_size)
        inv = 1.0 / C.rope_theta ** (torch.arange(0, C.qk_rope_head_dim, 2).float() / C.qk_rope_head_dim)
        f = torch.arange(C.max_position_embeddings).float()[:, None] * inv
        self.register_buffer("cos", f.cos(), persistent=False)
        self.register_buffer("sin", f.sin(), persistent=False)
        for n, p in self.named_parameters():
            if p.ndim >= 2:
                nn.init.normal_(p, std=0.02)
                if n.endswith(("o_proj.weight", "down_proj.weight", ".down")):
                    p.data.mul_((2 * C.num_hidden_layers) ** -0.5)

    def moe(self):
        return [l.mlp for l in self.layers if isinstance(l.mlp, MoE)]

    def forward(self, ids, targets=None, reduction="mean"):
        x, T = self.embed_tokens(ids), ids.shape[1]
        for l in self.layers:
            x = l(x, self.cos[:T], self.sin[:T])
        logits = self.lm_head(self.norm(x))
        return logits if targets is None else F.cross_entropy(logits.view(-1, C.vocab_size), targets.reshape(-1), reduction=reduction)

    def published(self):
        """State dict in the published DeepSeek-V3 layout."""
        sd = {}
        for n, p in self.state_dict().items():
            name = n if n.startswith("lm_head") else "model." + n
            base = name.rsplit(".", 1)[0]
            if name.endswith("mlp.bias"):
                sd[base + ".gate.e_score_correction_bias"] = p.float().clone()
            elif name.endswith("gate_up"):
                for e in range(C.n_routed_experts):
                    g, u = p[e]
                    sd[f"{base}.experts.{e}.gate_proj.weight"] = g.to(torch.bfloat16).contiguous()
                    sd[f"{base}.experts.{e}.up_proj.weight"] = u.to(torch.bfloat16).contiguous()
            elif name.endswith("mlp.down"):
                for e in range(C.n_routed_experts):
                    sd[f"{base}.experts.{e}.down_proj.weight"] = p[e].to(torch.bfloat16).contiguous()
            else:
                sd[name] = p.to(torch.bfloat16).contiguous()
        return sd


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz; leading dimensions are a batch of matrices."""

    def __init__(self, params, lr, momentum=0.95, wd=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, wd=wd))

    @torch.no_grad()
    def step(self, rank=0, workers=1):
        """Each worker orthogonalises every `workers`-th matrix; the results are then exchanged."""
        g = self.param_groups[0]
        updates = []
        for k, p in enumerate(g["params"]):
            if k % workers != rank:
                updates.append(torch.zeros_like(p))
                continue
            buf = self.state[p].setdefault("m", torch.zeros_like(p))
            buf.lerp_(p.grad, 1 - g["momentum"])
            u = p.grad.lerp(buf, g["momentum"])
            flip = u.shape[-2] > u.shape[-1]
            x = u.mT if flip else u
            x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
            for a, b, c in ((3.4445, -4.7750, 2.0315),) * 5:
                A = x @ x.mT
                x = a * x + (b * A + c * A @ A) @ x
            updates.append(x.mT if flip else x)
        if workers > 1:
            flat = torch.cat([u.flatten() for u in updates])
            dist.all_reduce(flat)
            updates = [u.view_as(p) for u, p in zip(flat.split([p.numel() for p in g["params"]]), g["params"])]
        for p, u in zip(g["params"], updates):
            p.mul_(1 - g["lr"] * g["wd"])
            p.add_(u, alpha=-g["lr"] * max(1, p.shape[-2] / p.shape[-1]) ** 0.5)


def write_json(path, obj):
    with open(path, "w") as f:
        json.dump(obj, f, indent=2)
        f.write("\n")


def export(model, data, out):
    """Write the checkpoint into a temporary directory beside `out`, then rename file by file."""
    from safetensors.torch import save_file
    tmp = os.path.join(out, ".export")
    os.makedirs(tmp, exist_ok=True)
    save_file(model.published(), os.path.join(tmp, "model.safetensors"), metadata={"format": "pt"})
    write_json(os.path.join(tmp, "config.json"), CONFIG)
    write_json(os.path.join(tmp, "generation_config.json"), dict(
        bos_token_id=1, eos_token_id=[2, 4], pad_token_id=0, do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=256))
    write_json(os.path.join(tmp, "tokenizer_config.json"), dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"], add_bos_token=True, add_eos_token=False,
        clean_up_tokenization_spaces=False, model_max_length=2048, chat_template=CHAT_TEMPLATE))
    shutil.copy(os.path.join(data, "tokenizer.json"), tmp)
    for f in os.listdir(tmp):
        os.chmod(os.path.join(tmp, f), 0o644)
        os.replace(os.path.join(tmp, f), os.path.join(out, f))
    os.rmdir(tmp)


@torch.no_grad()
def evaluate(model, held, seq=256, limit=None, rows=16):
    """-> (sum of nats, tokens, load [layers, experts]) over the held-out stream in windows of `seq`."""
    n = (len(held) - 1) // seq
    n = min(n, limit) if limit else n
    nats, load = 0.0, 0
    for i in range(0, n, rows):
        k = min(rows, n - i)
        w = torch.from_numpy(np.stack([held[j * seq:j * seq + seq + 1] for j in range(i, i + k)]).astype(np.int64))
        nats += model(w[:, :-1], w[:, 1:], "sum").item()
        load = load + torch.stack([m.load for m in model.moe()])
    return nats, n * seq, load


@torch.no_grad()
def sample(model, tok, prompt, n=160, temperature=0.7, top_p=0.9, gen=None):
    ids = tok.encode(prompt, add_special_tokens=False).ids
    start = len(ids)
    while len(ids) - start < n:
        p, i = (model(torch.tensor([ids]))[0, -1] / temperature).softmax(-1).sort(descending=True)
        p = p * ((p.cumsum(0) - p) < top_p)
        t = i[torch.multinomial(p, 1, generator=gen)].item()
        if t in (2, 4):
            break
        ids.append(t)
    return tok.decode(ids[start:])


def average(params, extra):
    """Average gradients over the workers and add up `extra`, in one exchange."""
    n = dist.get_world_size()
    flat = torch.cat([p.grad.flatten() for p in params] + [extra.flatten().float() * n])
    dist.all_reduce(flat)
    flat /= n
    i = 0
    for p in params:
        p.grad.copy_(flat[i:i + p.numel()].view_as(p))
        i += p.numel()
    return flat[i:].view_as(extra)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--data", required=True)
    ap.add_argument("--out", required=True, help="where the checkpoint and recipe/ files are written")
    ap.add_argument("--work", default="work", help="where log.jsonl and last.pt are kept")
    ap.add_argument("--minutes", type=float, default=45)
    ap.add_argument("--resume", type=float, help="continue work/last.pt from this share of the schedule (0..1)")
    ap.add_argument("--tokens_per_step", type=int, default=2048)
    ap.add_argument("--muon_lr", type=float, default=0.02)
    ap.add_argument("--adam_lr", type=float, default=3e-3)
    ap.add_argument("--gamma", type=float, default=0.004, help="bias update speed")
    ap.add_argument("--workers", type=int, default=2, help="data-parallel processes, one thread each")
    ap.add_argument("--max_steps", type=int, default=10 ** 9)
    ap.add_argument("--port", type=int, default=29517)
    ap.add_argument("--no_export", action="store_true")
    a = ap.parse_args()
    if a.workers == 1:
        return train(0, a)
    torch.multiprocessing.start_processes(train, (a,), nprocs=a.workers, start_method="fork")


def train(rank, a):
    from tokenizers import Tokenizer
    torch.set_num_threads(1)
    if a.workers > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(a.port))
        dist.init_process_group("gloo", rank=rank, world_size=a.workers)
    say = (lambda *x: print(*x, flush=True)) if rank == 0 else (lambda *x: None)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)               # the same order of documents in every worker
    os.makedirs(a.work, exist_ok=True)
    os.makedirs(os.path.join(a.out, "recipe"), exist_ok=True)
    data = np.memmap(os.path.join(a.data, "train.bin"), dtype=np.uint16, mode="r")
    held = np.fromfile(os.path.join(a.data, "heldout.bin"), dtype=np.uint16)
    tok = Tokenizer.from_file(os.path.join(a.data, "tokenizer.json"))
    model = Model()
    hidden = [p for n, p in model.named_parameters() if p.ndim >= 2 and not any(s in n for s in ("embed", "lm_head", "mlp.gate.weight"))]
    other = [p for n, p in model.named_parameters() if not any(p is q for q in hidden)]
    hidden.sort(key=lambda p: -p.numel())        # similar ones side by side: the workers get equal shares
    muon = Muon(hidden, lr=a.muon_lr, wd=0.01)
    adam = torch.optim.AdamW(other, lr=a.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    params = hidden + other
    say(f"{sum(p.numel() for p in params)/1e6:.2f} M parameters")
    log = open(os.path.join(a.work, "log.jsonl"), "a" if a.resume else "w") if rank == 0 else None
    t0 = last_export = time.time()
    clock = torch.zeros(1)
    step = seen = pos = load_sum = 0
    order = ema = None
    begin, wall0 = a.resume or 0.0, 0.0
    if a.resume:
        last = torch.load(os.path.join(a.work, "last.pt"))
        model.load_state_dict(last["model"])
        step, seen, wall0 = last["step"], last["seen"], last["wall"]
        if "muon" in last:
            adam.load_state_dict(last["adam"])
            if rank == 0 or a.workers == 1:
                muon.load_state_dict(last["muon"])
        rng = np.random.default_rng(step)

    def save():
        torch.save(dict(model=model.state_dict(), adam=adam.state_dict(), muon=muon.state_dict(), step=step, seen=seen,
                        wall=wall0 + time.time() - t0), os.path.join(a.work, "last.pt"))

    while step < a.max_steps:
        if a.workers > 1:
            clock[0] = time.time() - t0
            dist.broadcast(clock, 0)             # every worker follows the clock of the first
        else:
            clock[0] = time.time() - t0
        progress = begin + (1 - begin) * clock.item() / (60 * a.minutes)
        if progress >= 1:
            break
        seq = 256 if progress < 0.8 else 512
        n = a.tokens_per_step // seq
        if order is None or order[0] != seq or pos + n > len(order[1]):
            order, pos = (seq, rng.permutation((len(data) - seq - 1) // seq)), 0
        rows = order[1][pos:pos + n]
        pos += len(rows)
        w = torch.from_numpy(np.stack([data[r * seq:r * seq + seq + 1] for r in rows[rank::a.workers]]).astype(np.int64))
        lr = max(0.005, min(1.0, (step + 1) / 50) * min(1.0, (1 - progress) / 0.55))
        for opt, base in ((muon, a.muon_lr), (adam, a.adam_lr)):
            for g in opt.param_groups:
                g["lr"] = base * lr
        loss = model(w[:, :-1], w[:, 1:])
        loss.backward()
        load = torch.stack([m.load for m in model.moe()]).float()
        if a.workers > 1:
            load = average(params, load)
        nn.utils.clip_grad_norm_(other, 1.0)
        muon.step(rank, a.workers)
        adam.step()
        for p in params:
            p.grad = None
        gamma = a.gamma * min(1.0, max(0.0, (0.97 - progress) / 0.5))
        for m, l in zip(model.moe(), load):
            m.bias += gamma * torch.sign(l.mean() - l)
        step += 1
        seen += len(rows) * seq
        if rank:
            continue
        load_sum = load_sum + load
        ema = loss.item() if ema is None else 0.95 * ema + 0.05 * loss.item()
        rec = dict(step=step, tokens=seen, seconds=round(wall0 + time.time() - t0, 1), loss=round(loss.item(), 4), lr=round(lr, 4))
        if step % 100 == 0:
            nats, n, _ = evaluate(model, held, limit=32)
            rec["heldout"] = round(nats / n, 4)
        log.write(json.dumps(rec) + "\n")
        if step % 20 == 0:
            log.flush()
            share = load_sum / load_sum.sum(1, keepdim=True) * C.n_routed_experts
            say(f"step {step} {rec['seconds']:.0f}s tokens {seen/1e6:.2f}M loss {ema:.3f} held {rec.get('heldout', '-')} lr {lr:.2f} "
                f"{seen/rec['seconds']:.0f} tok/s load min {share.min():.2f} max {share.max():.2f} "
                f"bias {max(m.bias.abs().max().item() for m in model.moe()):.2f}")
            load_sum = 0
        if step % 200 == 0:
            say(sample(model, tok, "<|bos|><|user|>Tell me a story about a fox and a kite.<|assistant|>"))
        if not a.no_export and time.time() - last_export > 180:
            export(model, a.data, a.out)
            save()
            last_export = time.time()
    if rank:
        return
    wall = wall0 + time.time() - t0
    save()
    if not a.no_export:
        export(model, a.data, a.out)
    say(f"done: {step} steps, {seen} tokens, {wall:.0f} s")


if __name__ == "__main__":
    main()
