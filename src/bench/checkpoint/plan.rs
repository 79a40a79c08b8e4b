//! What is in a benchmark checkpoint: its configuration and its tensors, in the
//! names and types that DeepSeek publishes.

use model::Config;
use serde_json::{Value, json};

use crate::cli::{CheckpointDtype, CheckpointSize};

/// Rows and columns that share an FP8 scale.
const BLOCK: (usize, usize) = (128, 128);

/// How a tensor is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    F32,
    Bf16,
    /// e4m3, followed by a tensor of scales.
    Fp8 {
        block: (usize, usize),
    },
}

/// One tensor and what its values are like.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub stored: Stored,
    /// Mean of the values.
    pub centre: f32,
    /// Their standard deviation.
    pub spread: f32,
}

impl Tensor {
    pub fn values(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes in the file, scales included.
    pub fn bytes(&self) -> usize {
        self.entries().map(|(.., bytes)| bytes).sum()
    }

    /// Name, type, shape and bytes of what the file holds of it.
    pub fn entries(&self) -> impl Iterator<Item = (String, &'static str, Vec<usize>, usize)> {
        let (dtype, size) = match self.stored {
            Stored::F32 => ("F32", 4),
            Stored::Bf16 => ("BF16", 2),
            Stored::Fp8 { .. } => ("F8_E4M3", 1),
        };
        let codes = (self.name.clone(), dtype, self.shape.clone(), size * self.values());
        let scales = match self.stored {
            Stored::Fp8 { block: (rows, columns) } => {
                let shape = vec![self.shape[0].div_ceil(rows), self.shape[1].div_ceil(columns)];
                let bytes = 4 * shape[0] * shape[1];
                Some((format!("{}_scale_inv", self.name), "F32", shape, bytes))
            }
            _ => None,
        };
        std::iter::once(codes).chain(scales)
    }
}

/// The whole `config.json`.
pub fn config(size: CheckpointSize, dtype: CheckpointDtype) -> Value {
    let (hidden, layers, heads) = match size {
        CheckpointSize::M => (1024, 12, 8),
        CheckpointSize::Xs => (128, 3, 2),
    };
    let (q_lora, kv_lora, nope, rope, v_head) = match size {
        CheckpointSize::M => (768, 512, 128, 64, 128),
        CheckpointSize::Xs => (96, 64, 32, 16, 32),
    };
    let (experts, top_k, groups, chosen) = match size {
        CheckpointSize::M => (64, 8, 8, 4),
        CheckpointSize::Xs => (8, 2, 4, 2),
    };
    let (inner, dense, vocab, positions) = match size {
        CheckpointSize::M => (512, 4096, 49_152, 8192),
        CheckpointSize::Xs => (64, 256, 1024, 1024),
    };
    let mut config = json!({
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": dense,
        "moe_intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads,
        "n_shared_experts": 1, "n_routed_experts": experts, "num_experts_per_tok": top_k,
        "n_group": groups, "topk_group": chosen, "norm_topk_prob": true,
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "moe_layer_freq": 1, "first_k_dense_replace": 1,
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

/// Every tensor, in the order of the file: layer by layer.
pub fn tensors(config: &Config, dtype: CheckpointDtype) -> Vec<Tensor> {
    let mut plan = Plan { config, dtype, tensors: Vec::new() };
    plan.all();
    plan.tensors
}

struct Plan<'a> {
    config: &'a Config,
    dtype: CheckpointDtype,
    tensors: Vec<Tensor>,
}

impl Plan<'_> {
    fn all(&mut self) {
        let Config { hidden, vocab, layers, experts, moe_intermediate, .. } = *self.config;
        // Embeddings as large as what the layers add: a token's identity stays visible.
        self.plain("model.embed_tokens.weight", &[vocab, hidden], 1.0);
        for layer in 0..layers {
            let prefix = format!("model.layers.{layer}");
            self.norm(&format!("{prefix}.input_layernorm.weight"), hidden);
            self.attention(&format!("{prefix}.self_attn"));
            self.norm(&format!("{prefix}.post_attention_layernorm.weight"), hidden);
            let mlp = format!("{prefix}.mlp");
            if !self.config.is_moe(layer) {
                self.ffn(&mlp, self.config.dense_intermediate);
                continue;
            }
            self.plain(&format!("{mlp}.gate.weight"), &[experts, hidden], unit(hidden));
            let bias = format!("{mlp}.gate.e_score_correction_bias");
            self.push(bias, &[experts], Stored::F32, 0.0, 0.02);
            self.ffn(&format!("{mlp}.shared_experts"), self.config.shared_intermediate());
            (0..experts).for_each(|e| self.ffn(&format!("{mlp}.experts.{e}"), moe_intermediate));
        }
        self.norm("model.norm.weight", hidden);
        // Peaked enough that greedy decoding has a clear choice mostly.
        self.plain("lm_head.weight", &[vocab, hidden], 2.0 * unit(hidden));
    }

    fn attention(&mut self, prefix: &str) {
        let Config { hidden, heads, kv_lora, qk_nope, v_head, q_lora, .. } = *self.config;
        let name = |part: &str| format!("{prefix}.{part}");
        let queries = heads * self.config.qk_head();
        match q_lora {
            Some(rank) => {
                self.matrix(name("q_a_proj.weight"), rank, hidden);
                self.norm(&name("q_a_layernorm.weight"), rank);
                self.matrix(name("q_b_proj.weight"), queries, rank);
            }
            None => self.matrix(name("q_proj.weight"), queries, hidden),
        }
        self.matrix(name("kv_a_proj_with_mqa.weight"), self.config.kv_width(), hidden);
        self.norm(&name("kv_a_layernorm.weight"), kv_lora);
        self.matrix(name("kv_b_proj.weight"), heads * (qk_nope + v_head), kv_lora);
        self.matrix(name("o_proj.weight"), hidden, heads * v_head);
    }

    fn ffn(&mut self, prefix: &str, inner: usize) {
        let hidden = self.config.hidden;
        self.matrix(format!("{prefix}.gate_proj.weight"), inner, hidden);
        self.matrix(format!("{prefix}.up_proj.weight"), inner, hidden);
        self.matrix(format!("{prefix}.down_proj.weight"), hidden, inner);
    }

    /// A projection `[n, k]`, which the FP8 variant quantises.
    fn matrix(&mut self, name: String, n: usize, k: usize) {
        let stored = match self.dtype {
            CheckpointDtype::Bf16 => Stored::Bf16,
            CheckpointDtype::Fp8 => Stored::Fp8 { block: BLOCK },
        };
        self.push(name, &[n, k], stored, 0.0, unit(k));
    }

    /// A matrix that no variant quantises.
    fn plain(&mut self, name: &str, shape: &[usize], spread: f32) {
        self.push(name.to_owned(), shape, Stored::Bf16, 0.0, spread);
    }

    fn norm(&mut self, name: &str, width: usize) {
        self.push(name.to_owned(), &[width], Stored::Bf16, 1.0, 0.1);
    }

    fn push(&mut self, name: String, shape: &[usize], stored: Stored, centre: f32, spread: f32) {
        self.tensors.push(Tensor { name, shape: shape.into(), stored, centre, spread });
    }
}

/// Spread that keeps a product over `k` values as large as they are.
fn unit(k: usize) -> f32 {
    (k as f32).sqrt().recip()
}
