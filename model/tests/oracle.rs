//! The trunk and the experts against the naive f64 model, over every variation of the configuration
//! that changes what is computed or where it is stored.

use std::sync::Arc;

use model::local::{Local, pages};
use model::reference::evaluate;
use model::synthetic::{Recipe, Storage, TempDir};
use model::{Checkpoint, Chunk, Compute, Isa, KvPool, LogitRows, Numerics};
use serde_json::{Value, json};

/// Compares all logits and choices of a sequence of 70 tokens.
fn check(name: &str, recipe: &Recipe) {
    check_tokens(name, recipe, 70);
}

fn check_tokens(name: &str, recipe: &Recipe, count: u32) {
    let dir = TempDir::with(recipe).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let config = checkpoint.config();
    let tokens: Vec<u32> = (0..count).map(|i| (i * 37 + i * i * 5) % config.vocab as u32).collect();
    let expected = evaluate(&checkpoint, &tokens).unwrap();

    let compute = Arc::new(Compute::new(Isa::detect(), 2));
    let mut model = Local::load(&checkpoint, Numerics::F32, compute).unwrap();
    let mut kv = KvPool::new(config, Numerics::F32, 20, 16).unwrap();
    let pages = pages(&mut kv, tokens.len()).unwrap();
    let chunk = Chunk { tokens: &tokens, start: 0, pages: &pages, logits: LogitRows::All };
    let mut chosen = Vec::new();
    let see = |_, routed: model::Routed<'_>| {
        chosen.push(routed.experts.chunks(routed.top_k).map(<[u32]>::to_vec).collect::<Vec<_>>());
    };
    let logits = model.run(&[chunk], &mut kv, see).unwrap();
    assert_eq!(chosen, expected.experts, "{name}: experts");
    let mut worst = 0.0f64;
    for (row, expected) in logits.chunks(config.vocab).zip(&expected.logits) {
        for (found, expected) in row.iter().zip(expected) {
            worst = worst.max((f64::from(*found) - expected).abs());
        }
    }
    println!("{name}: worst logit {worst:.2e}");
    assert!(worst < 2e-4, "{name}: worst logit {worst}");
}

fn varied(name: &str, changes: Value) {
    check(name, &Recipe::small().with(changes));
}

#[test]
fn queries() {
    varied("plain", json!({}));
    varied("no-q-lora", json!({"q_lora_rank": null}));
    varied("biases", json!({"attention_bias": true}));
    varied("biases-no-q-lora", json!({"attention_bias": true, "q_lora_rank": null}));
    varied("one-head", json!({"num_attention_heads": 1, "num_key_value_heads": null}));
    varied("seven-heads", json!({"num_attention_heads": 7, "num_key_value_heads": 7}));
    varied("wide-values", json!({"v_head_dim": 37, "qk_nope_head_dim": 5, "kv_lora_rank": 41}));
    varied("coarse-eps", json!({"rms_norm_eps": 1e-2}));
}

#[test]
fn routing() {
    varied("no-groups", json!({"n_group": 1, "topk_group": 1}));
    varied("all-groups", json!({"n_group": 4, "topk_group": 4}));
    varied("two-in-a-group", json!({"n_group": 6, "topk_group": 2, "num_experts_per_tok": 4}));
    varied("not-normalised", json!({"norm_topk_prob": false, "routed_scaling_factor": 1.0}));
    varied("one-expert", json!({"num_experts_per_tok": 1}));
    varied("every-expert", json!({"num_experts_per_tok": 12, "topk_group": 4}));
    varied("no-shared", json!({"n_shared_experts": 0}));
    varied("three-shared", json!({"n_shared_experts": 3}));
    varied("all-moe", json!({"first_k_dense_replace": 0}));
    varied("all-dense", json!({"first_k_dense_replace": 3}));
    varied("tied", json!({"tie_word_embeddings": true}));
}

#[test]
fn rotary() {
    varied("halves", json!({"rope_interleave": false}));
    varied("linear", json!({"rope_scaling": {"type": "linear", "factor": 4.0}}));
    varied("dynamic", json!({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}));
    let llama3 = json!({"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
    varied("llama3", json!({"rope_parameters": llama3}));
    let yarn = json!({"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64,
        "mscale": 0.7, "mscale_all_dim": 1.3});
    varied("yarn", json!({"rope_scaling": yarn}));
    let plain = json!({"rope_type": "yarn", "factor": 8.0, "truncate": false});
    varied("yarn-plain", json!({"rope_parameters": plain, "rope_theta": 333}));
}

#[test]
fn storage() {
    let store = |name, change: fn(&mut Recipe)| {
        let block = json!({"quant_method": "fp8", "weight_block_size": [16, 24]});
        let mut recipe = Recipe::small();
        change(&mut recipe);
        if recipe.storage == Storage::Fp8 {
            recipe = recipe.with(json!({"quantization_config": block}));
        }
        check(name, &recipe);
    };
    store("single-precision", |r| r.storage = Storage::F32);
    store("quantised", |r| r.storage = Storage::Fp8);
    store("sharded", |r| r.shards = 4);
    store("fused", |r| r.fused = true);
    store("fused-single", |r| (r.fused, r.storage) = (true, Storage::F32));
}

/// Several of attention's blocks of positions.
#[test]
fn a_longer_sequence() {
    check_tokens("longer", &Recipe::small(), 290);
}
