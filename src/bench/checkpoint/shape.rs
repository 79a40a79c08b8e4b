//! The configurations of benchmark checkpoints.

use serde_json::{Value, json};

use crate::cli::{CheckpointDtype, CheckpointSize};

/// Rows and columns that share an FP8 scale.
const BLOCK: (usize, usize) = (128, 128);

/// The whole `config.json`.
pub fn config(size: CheckpointSize, dtype: CheckpointDtype) -> Value {
    let (hidden, layers, heads) = match size {
        CheckpointSize::M => (1024, 12, 8),
        CheckpointSize::Xs => (128, 3, 2),
        CheckpointSize::V3Layer => (7168, 1, 2),
    };
    let (q_lora, kv_lora, nope, rope, v_head) = match size {
        CheckpointSize::M => (768, 512, 128, 64, 128),
        CheckpointSize::Xs => (96, 64, 32, 16, 32),
        CheckpointSize::V3Layer => (1536, 512, 128, 64, 128),
    };
    let (experts, top_k, groups, chosen) = match size {
        CheckpointSize::M => (64, 8, 8, 4),
        CheckpointSize::Xs => (8, 2, 4, 2),
        CheckpointSize::V3Layer => (256, 8, 8, 4),
    };
    let (inner, dense, vocab, positions) = match size {
        CheckpointSize::M => (512, 4096, 49_152, 8192),
        CheckpointSize::Xs => (64, 256, 1024, 1024),
        CheckpointSize::V3Layer => (2048, 18_432, 1024, 4096),
    };
    // Layers before the first with experts.
    let before = if size == CheckpointSize::V3Layer { 0 } else { 1 };
    let mut config = json!({
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": dense,
        "moe_intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads,
        "n_shared_experts": 1, "n_routed_experts": experts, "num_experts_per_tok": top_k,
        "n_group": groups, "topk_group": chosen, "norm_topk_prob": true,
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "moe_layer_freq": 1, "first_k_dense_replace": before,
        "q_lora_rank": q_lora, "kv_lora_rank": kv_lora, "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope, "v_head_dim": v_head, "hidden_act": "silu",
        "max_position_embeddings": positions, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "rope_scaling": null, "rope_interleave": true, "attention_bias": false,
        "attention_dropout": 0.0, "tie_word_embeddings": false, "initializer_range": 0.02,
        "use_cache": true, "num_nextn_predict_layers": 0, "ep_size": 1,
        "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16",
    });
    if dtype == CheckpointDtype::Fp8 {
        config["quantization_config"] = json!({
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
            "weight_block_size": [BLOCK.0, BLOCK.1],
        });
    }
    config
}
