"""Check an exported checkpoint with Hugging Face transformers and write metrics, samples and the loss picture.

  verify.py --model DIR --data DIR --work DIR [--quick]

1. loads DIR with AutoModelForCausalLM / AutoTokenizer, checks that no weight is missing or unexpected
2. compares its held-out loss with the training implementation (train.py) on the same tokens
3. writes recipe/metrics.json, recipe/samples.txt and recipe/loss.png
"""
import argparse, json, math, os
import numpy as np
import torch
import torch.nn.functional as F
import train as T
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ["Tell me a story about a fox and a kite.", "Tell me a story about a dragon in the snow.", "Write a story about sharing.",
           "Tell me a story about a girl named Ivy.", "Can you tell me a story about the moon?", "Tell me a story about a robot.",
           "What does a cow say?", "What is three plus four?", "Count to seven.", "Who are you?"]


def load_published(path):
    """The exported weights back in the training implementation (float32 arithmetic on the bf16 values)."""
    from safetensors.torch import load_file
    sd, m = load_file(os.path.join(path, "model.safetensors")), T.Model()
    own = {}
    for n, p in m.state_dict().items():
        name = n if n.startswith("lm_head") else "model." + n
        base = name.rsplit(".", 1)[0]
        ex = lambda kind: torch.stack([sd[f"{base}.experts.{e}.{kind}_proj.weight"] for e in range(T.C.n_routed_experts)])
        if name.endswith("mlp.bias"):
            own[n] = sd[base + ".gate.e_score_correction_bias"]
        elif name.endswith("gate_up"):
            own[n] = torch.stack([ex("gate"), ex("up")], 1).float()
        elif name.endswith("mlp.down"):
            own[n] = ex("down").float()
        else:
            own[n] = sd[name].float()
    m.load_state_dict(own)
    return m


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--model", required=True)
    ap.add_argument("--data", required=True)
    ap.add_argument("--work", required=True)
    ap.add_argument("--quick", action="store_true")
    a = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    held = np.fromfile(os.path.join(a.data, "heldout.bin"), dtype=np.uint16)
    tok = AutoTokenizer.from_pretrained(a.model)
    hf, info = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32, output_loading_info=True)
    hf.eval()
    for k in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info.get(k), (k, info[k])
    own = load_published(a.model).eval()
    n = 4 if a.quick else 32
    w = torch.from_numpy(np.stack([held[i * 256:i * 256 + 257] for i in range(n)]).astype(np.int64))
    with torch.no_grad():
        l_own = own(w[:, :-1], w[:, 1:]).item()
        hf_logits = hf(w[:, :-1]).logits
        l_hf = F.cross_entropy(hf_logits.reshape(-1, T.C.vocab_size).float(), w[:, 1:].reshape(-1)).item()
        diff = (own(w[:2, :-1]) - hf_logits[:2]).abs().max().item()
    print(f"held-out loss on {n * 256} tokens: train.py {l_own:.5f}, transformers {l_hf:.5f}, largest logit difference {diff:.2e}")
    assert abs(l_own - l_hf) < 1e-3, "the two implementations disagree"
    bf = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        l_bf = F.cross_entropy(bf(w[:4, :-1]).logits.reshape(-1, T.C.vocab_size).float(), w[:4, 1:].reshape(-1)).item()
        l_f4 = F.cross_entropy(hf_logits[:4].reshape(-1, T.C.vocab_size), w[:4, 1:].reshape(-1)).item()
    print(f"bfloat16 arithmetic: {l_bf:.4f} (float32 arithmetic on the same rows: {l_f4:.4f})")
    samples = []
    prompts = [tok.apply_chat_template([dict(role="user", content=p)], tokenize=False, add_generation_prompt=True) for p in PROMPTS]
    for p, shown in list(zip(prompts, PROMPTS))[:2 if a.quick else None]:
        ids = tok(p, add_special_tokens=False, return_tensors="pt")
        out = hf.generate(**ids)[0, ids.input_ids.shape[1]:]
        samples.append((shown, tok.decode(out, skip_special_tokens=True).strip(), bool(out[-1] in (2, 4))))
        print("USER:", shown, "\nMODEL:", samples[-1][1], "[stopped]" if samples[-1][2] else "[cut]", "\n", flush=True)
    if a.quick:
        return
    nats, tokens, load = T.evaluate(own, held, 256)
    stats = json.load(open(os.path.join(a.data, "corpus.json")))
    last = torch.load(os.path.join(a.work, "last.pt"), map_location="cpu")
    share = load.float() / load.sum(1, keepdim=True)
    bytes_per_token = stats["heldout"]["bytes"] / stats["heldout"]["tokens"]
    total = sum(p.numel() for p in own.parameters())
    routed = sum(m.gate_up.numel() + m.down.numel() for m in own.moe())
    active = total - own.embed_tokens.weight.numel() - routed * (1 - T.C.num_experts_per_tok / T.C.n_routed_experts)
    # per-kind held-out loss
    kinds = {}
    docs = json.load(open(os.path.join(a.data, "heldout.json")))
    with torch.no_grad():
        for d in docs[:400]:
            ids = torch.tensor([tok(d["text"] + T_EOS).input_ids[:513]])
            k = kinds.setdefault(d["kind"], [0.0, 0])
            k[0] += own(ids[:, :-1], ids[:, 1:], "sum").item()
            k[1] += ids.shape[1] - 1
    metrics = dict(
        parameters=total, active_parameters_per_token=int(active), train_tokens=last["seen"], train_steps=last["step"],
        wall_seconds=round(last["wall"]), hardware="2 shared x86-64 cores (AVX2), float32",
        heldout=dict(tokens=tokens, loss_nats_per_token=round(nats / tokens, 4), perplexity=round(math.exp(nats / tokens), 3),
                     bits_per_byte=round(nats / tokens / math.log(2) / bytes_per_token, 4), window=256,
                     perplexity_by_kind={k: round(math.exp(v[0] / v[1]), 3) for k, v in sorted(kinds.items())}),
        transformers_check=dict(tokens=n * 256, loss_train_py=round(l_own, 5), loss_transformers=round(l_hf, 5), max_logit_difference=diff,
                                loss_transformers_bf16_4rows=round(l_bf, 4), loss_transformers_f32_4rows=round(l_f4, 4)),
        expert_share_of_routed_tokens={f"layer_{i + T.C.first_k_dense_replace}": dict(
            min=round(s.min().item(), 4), max=round(s.max().item(), 4), ideal=round(1 / T.C.n_routed_experts, 4),
            used=int((s > 0).sum()), share=[round(x, 4) for x in s.tolist()]) for i, s in enumerate(share)},
        stories_that_end_by_themselves=f"{sum(s[2] for s in samples)}/{len(samples)}", corpus=stats)
    out = os.path.join(a.model, "recipe")
    T.write_json(os.path.join(out, "metrics.json"), metrics)
    with open(os.path.join(out, "samples.txt"), "w") as f:
        f.write("Unedited answers, temperature 0.7, top-p 0.9, seed 0 (first draw for each prompt).\n\n")
        f.write("\n\n".join(f"USER:  {p}\nMODEL: {s}" for p, s, _ in samples) + "\n")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rec = [json.loads(l) for l in open(os.path.join(a.work, "log.jsonl"))]
    x, y = np.array([r["tokens"] for r in rec]) / 1e6, np.array([r["loss"] for r in rec])
    smooth = [y[max(0, i - 20):i + 1].mean() for i in range(len(y))]
    fig, ax = plt.subplots(figsize=(7, 4), dpi=110)
    ax.plot(x, y, lw=0.5, alpha=0.35, color="tab:blue")
    ax.plot(x, smooth, lw=1.5, color="tab:blue", label="training (mean of 20 steps)")
    h = [(r["tokens"] / 1e6, r["heldout"]) for r in rec if "heldout" in r]
    if h:
        ax.plot(*zip(*h), "o-", ms=4, color="tab:red", label="held-out (part)")
    ax.set(xlabel="training tokens (millions)", ylabel="loss (nats per token)", ylim=(0, 6), title="tiny deepseek_v3: loss")
    ax.grid(alpha=0.3); ax.legend()
    fig.tight_layout(); fig.savefig(os.path.join(out, "loss.png"))
    print(json.dumps({k: v for k, v in metrics.items() if k not in ("corpus", "expert_share_of_routed_tokens")}, indent=1))


T_EOS = "<|eos|>"
if __name__ == "__main__":
    main()
