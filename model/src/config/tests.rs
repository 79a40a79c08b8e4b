//! What a configuration means, and what is refused, by field.

use serde_json::{Value, json};

use super::Config;

fn tiny() -> Value {
    json!({
        "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"],
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4,
        "topk_group": 2, "n_shared_experts": 1, "moe_intermediate_size": 32,
        "intermediate_size": 128, "first_k_dense_replace": 1, "vocab_size": 100,
        "rope_theta": 10000, "rope_scaling": null, "rms_norm_eps": 1e-6,
    })
}

fn with(changes: Value) -> Value {
    let mut config = tiny();
    let target = config.as_object_mut().unwrap();
    for (key, value) in changes.as_object().unwrap() {
        target.insert(key.clone(), value.clone());
    }
    config
}

fn read(value: &Value) -> Result<Config, String> {
    Config::from_json(&value.to_string(), "m/config.json").map_err(|e| e.to_string())
}

fn refuses(changes: Value, field: &str, problem: &str) {
    let message = read(&with(changes)).expect_err("accepted");
    let start = format!("m/config.json: field `{field}`: ");
    assert!(message.starts_with(&start), "{message}");
    assert!(message.contains(problem), "{message}");
}

#[test]
fn reads_sizes_and_gives_defaults() {
    let config = read(&tiny()).unwrap();
    assert_eq!(config.hidden, 64);
    assert_eq!(config.q_lora, Some(24));
    assert_eq!(config.moe_layers(), 1..3);
    assert_eq!(config.max_positions, 4096);
    assert_eq!(config.routed_scaling, 2.5);
    assert!(config.norm_topk && config.rope.interleave && !config.tied && !config.attention_bias);
    assert_eq!(config.rope.kind, "default");
    assert!((config.score_scale() - 24f32.powf(-0.5)).abs() < 1e-7);
    assert!(config.summary().contains("8 experts top-2"));
}

#[test]
fn every_size_has_to_be_there() {
    for field in [
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "intermediate_size",
        "vocab_size",
    ] {
        let mut config = tiny();
        let map = config.as_object_mut().unwrap();
        map.remove(field);
        map.remove("architectures");
        let message = read(&config).expect_err(field);
        let start = format!("m/config.json: field `{field}`: missing");
        assert!(message.starts_with(&start), "{message}");
    }
}

#[test]
fn wrong_types_and_absurd_values_are_named() {
    refuses(json!({"hidden_size": "64"}), "hidden_size", "expected an integer");
    refuses(json!({"hidden_size": 0}), "hidden_size", "out of bounds");
    refuses(json!({"hidden_size": -5}), "hidden_size", "expected an integer");
    refuses(json!({"hidden_size": 64.5}), "hidden_size", "expected an integer");
    refuses(json!({"hidden_size": 1u64 << 40}), "hidden_size", "out of bounds");
    refuses(json!({"num_hidden_layers": 100_000}), "num_hidden_layers", "out of bounds");
    refuses(json!({"vocab_size": [1]}), "vocab_size", "expected an integer");
    refuses(json!({"qk_rope_head_dim": 7}), "qk_rope_head_dim", "not even");
    refuses(json!({"rms_norm_eps": -1.0}), "rms_norm_eps", "out of bounds");
    refuses(json!({"rms_norm_eps": "1e-6"}), "rms_norm_eps", "expected a number");
    refuses(json!({"rope_theta": 0}), "rope_theta", "out of bounds");
    refuses(json!({"routed_scaling_factor": 1e30}), "routed_scaling_factor", "out of bounds");
    refuses(json!({"norm_topk_prob": 1}), "norm_topk_prob", "true or false");
    refuses(json!({"eos_token_id": "end"}), "eos_token_id", "not a token id");
}

#[test]
fn inconsistent_routing_is_named() {
    refuses(json!({"num_experts_per_tok": 9}), "num_experts_per_tok", "exceeds");
    refuses(json!({"num_experts_per_tok": 5}), "num_experts_per_tok", "exceeds the 4 experts");
    refuses(json!({"n_group": 3}), "n_group", "not a multiple");
    refuses(json!({"topk_group": 5}), "topk_group", "exceeds n_group");
    refuses(json!({"num_key_value_heads": 2}), "num_key_value_heads", "has to equal");
    assert!(read(&with(json!({"num_key_value_heads": null}))).is_ok());
}

#[test]
fn what_would_compute_something_else_is_refused() {
    refuses(json!({"hidden_act": "gelu"}), "hidden_act", "only silu");
    refuses(json!({"scoring_func": "softmax"}), "scoring_func", "only sigmoid");
    refuses(json!({"topk_method": "greedy"}), "topk_method", "only noaux_tc");
    let other = json!({"model_type": "llama", "architectures": ["LlamaForCausalLM"]});
    refuses(other, "model_type", "only deepseek_v3");
    let awq = json!({"quantization_config": {"quant_method": "awq"}});
    refuses(awq, "quantization_config.quant_method", "only fp8");
    let tensorwise = json!({"quantization_config": {"quant_method": "fp8"}});
    refuses(tensorwise, "quantization_config.weight_block_size", "only block-scaled");
    let zero = json!({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 1]}});
    refuses(zero, "quantization_config.weight_block_size", "two integers");
    let rope = json!({"rope_scaling": {"type": "longrope", "factor": 2.0}});
    refuses(rope, "rope_scaling.type", "`longrope` is not supported");
    let partial = json!({"rope_parameters": {"partial_rotary_factor": 0.5}});
    refuses(partial, "rope_parameters.partial_rotary_factor", "only 1.0");
}

#[test]
fn malformed_files_are_named() {
    for text in ["", "{", "[]", "{\"hidden_size\": NaN}", "\u{0}"] {
        let message = Config::from_json(text, "m/config.json").expect_err(text).to_string();
        assert!(message.starts_with("m/config.json: not "), "{message}");
    }
}

#[test]
fn both_rope_styles_agree() {
    let yarn = json!({"type": "yarn", "factor": 40, "original_max_position_embeddings": 64,
        "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1});
    let old = read(&with(json!({"rope_theta": 50_000, "rope_scaling": yarn}))).unwrap();
    let mut new = tiny();
    let map = new.as_object_mut().unwrap();
    map.remove("rope_theta");
    map.remove("rope_scaling");
    let set = json!({"rope_type": "yarn", "rope_theta": 50_000.0, "factor": 40.0, "mscale": 1.0,
        "original_max_position_embeddings": 64, "mscale_all_dim": 1.0});
    map.insert("rope_parameters".into(), set);
    let new = read(&new).unwrap();
    assert_eq!(old, new);
    assert_eq!(new.rope.kind, "yarn");
    assert_eq!(new.rope.amplitude, 1.0);
    let m = 0.1 * 40f64.ln() + 1.0;
    assert!((new.rope.score_factor - m * m).abs() < 1e-12);
}

/// DeepSeek-V3's own `config.json`, as published.
const DEEPSEEK_V3: &str = r#"{
  "architectures": ["DeepseekV3ForCausalLM"],
  "attention_bias": false,
  "attention_dropout": 0.0,
  "auto_map": {
    "AutoConfig": "configuration_deepseek.DeepseekV3Config",
    "AutoModel": "modeling_deepseek.DeepseekV3Model",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"
  },
  "bos_token_id": 0,
  "eos_token_id": 1,
  "ep_size": 1,
  "first_k_dense_replace": 3,
  "hidden_act": "silu",
  "hidden_size": 7168,
  "initializer_range": 0.02,
  "intermediate_size": 18432,
  "kv_lora_rank": 512,
  "max_position_embeddings": 163840,
  "model_type": "deepseek_v3",
  "moe_intermediate_size": 2048,
  "moe_layer_freq": 1,
  "n_group": 8,
  "n_routed_experts": 256,
  "n_shared_experts": 1,
  "norm_topk_prob": true,
  "num_attention_heads": 128,
  "num_experts_per_tok": 8,
  "num_hidden_layers": 61,
  "num_key_value_heads": 128,
  "num_nextn_predict_layers": 1,
  "q_lora_rank": 1536,
  "qk_nope_head_dim": 128,
  "qk_rope_head_dim": 64,
  "quantization_config": {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128]
  },
  "rms_norm_eps": 1e-06,
  "rope_scaling": {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn"
  },
  "rope_theta": 10000,
  "routed_scaling_factor": 2.5,
  "scoring_func": "sigmoid",
  "seq_aux": true,
  "tie_word_embeddings": false,
  "topk_group": 4,
  "topk_method": "noaux_tc",
  "torch_dtype": "bfloat16",
  "transformers_version": "4.33.1",
  "use_cache": true,
  "v_head_dim": 128,
  "vocab_size": 129280
}"#;

#[test]
fn the_published_configuration_is_read() {
    let config = Config::from_json(DEEPSEEK_V3, "config.json").unwrap();
    assert_eq!((config.layers, config.hidden, config.vocab), (61, 7168, 129_280));
    assert_eq!(config.moe_layers(), 3..61);
    assert_eq!((config.experts, config.top_k, config.n_group, config.topk_group), (256, 8, 8, 4));
    assert_eq!((config.q_lora, config.kv_width(), config.qk_head()), (Some(1536), 576, 192));
    assert_eq!(config.fp8_block, Some((128, 128)));
    // 1/sqrt(192) times the square of YaRN's 0.1 ln 40 + 1.
    let mscale = 0.1 * 40f32.ln() + 1.0;
    assert!((config.score_scale() - mscale * mscale / 192f32.sqrt()).abs() < 1e-6);
}
