//! Random checkpoints on disk, for tests of this crate and of the crates above it.
//!
//! A [`Recipe`] is a configuration and a way to store the weights; `write` makes a directory that
//! [`crate::Checkpoint::open`] takes. Weights are scaled so that activations stay near one and the
//! gate's choices spread. Nothing but tests calls this.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use half::bf16;
use serde_json::{Map, Value, json};

use crate::config::Config;

/// A directory of its own in the system's temporary one, removed when dropped.
pub struct TempDir(PathBuf);

impl TempDir {
    /// An empty directory.
    pub fn new() -> io::Result<TempDir> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("moemesh-{}-{number}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        fs::create_dir_all(&dir)?;
        Ok(TempDir(dir))
    }

    /// A directory with a checkpoint in it.
    pub fn with(recipe: &Recipe) -> io::Result<TempDir> {
        let dir = TempDir::new()?;
        recipe.write(&dir.0)?;
        Ok(dir)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        // A directory that stays behind harms nothing.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// How matrices are stored; norms and biases follow, FP8 apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// Single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// e4m3 with scales in the configuration's blocks, where published checkpoints have it; else
    /// bfloat16.
    Fp8,
}

/// What to write.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// The whole `config.json`.
    pub config: Value,
    /// Type of the matrices.
    pub storage: Storage,
    /// Files; more than one come with an index.
    pub shards: usize,
    /// Whether experts are two stacks a layer instead of three matrices each.
    pub fused: bool,
    /// Seed of the weights.
    pub seed: u64,
}

impl Recipe {
    /// A small model with every part: compressed queries, groups, a dense layer, a shared expert.
    pub fn small() -> Recipe {
        let config = json!({
            "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
            "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 20,
            "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
            "n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
            "n_shared_experts": 1, "moe_intermediate_size": 20, "intermediate_size": 40,
            "first_k_dense_replace": 1, "vocab_size": 97, "max_position_embeddings": 512,
            "routed_scaling_factor": 1.5, "norm_topk_prob": true, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "rope_scaling": null, "tie_word_embeddings": false,
            "hidden_act": "silu", "eos_token_id": 1,
        });
        Recipe { config, storage: Storage::Bf16, shards: 1, fused: false, seed: 1 }
    }

    /// The same with some fields of the configuration changed.
    pub fn with(mut self, changes: Value) -> Recipe {
        if let (Some(config), Value::Object(changes)) = (self.config.as_object_mut(), changes) {
            config.extend(changes);
        }
        self
    }

    /// Writes the checkpoint into `dir`, which is made if it is not there.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        fs::create_dir_all(dir)?;
        let text = serde_json::to_string_pretty(&self.config)?;
        let config = Config::from_json(&text, "config.json").map_err(io::Error::other)?;
        fs::write(dir.join("config.json"), text)?;
        let mut tensors =
            Tensors { out: Vec::new(), recipe: self, config: &config, noise: self.seed };
        tensors.all();
        let tensors = tensors.out;
        if self.shards == 1 {
            return write_file(&dir.join("model.safetensors"), &tensors);
        }
        let mut index = Map::new();
        for shard in 0..self.shards {
            let name = format!("model-{:05}-of-{:05}.safetensors", shard + 1, self.shards);
            let mine: Vec<_> = tensors.iter().skip(shard).step_by(self.shards).cloned().collect();
            write_file(&dir.join(&name), &mine)?;
            index.extend(mine.iter().map(|t| (t.name.clone(), Value::from(name.as_str()))));
        }
        let index = json!({"metadata": {}, "weight_map": index});
        fs::write(dir.join("model.safetensors.index.json"), index.to_string())
    }
}

#[derive(Clone)]
struct Tensor {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

fn write_file(path: &Path, tensors: &[Tensor]) -> io::Result<()> {
    let mut header = Map::new();
    let mut end = 0;
    for t in tensors {
        let start = end;
        end += t.bytes.len();
        let entry = json!({"dtype": t.dtype, "shape": t.shape, "data_offsets": [start, end]});
        header.insert(t.name.clone(), entry);
    }
    let header = Value::Object(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    tensors.iter().for_each(|t| bytes.extend(&t.bytes));
    fs::write(path, bytes)
}

struct Tensors<'a> {
    out: Vec<Tensor>,
    recipe: &'a Recipe,
    config: &'a Config,
    noise: u64,
}

impl Tensors<'_> {
    fn all(&mut self) {
        let config = self.config;
        let hidden = config.hidden;
        self.matrix("model.embed_tokens", &[config.vocab, hidden], 1.0, false);
        self.vector("model.norm.weight", hidden, 1.0);
        if !config.tied {
            self.matrix("lm_head", &[config.vocab, hidden], 2.0, false);
        }
        for layer in 0..config.layers {
            let prefix = format!("model.layers.{layer}");
            self.vector(&format!("{prefix}.input_layernorm.weight"), hidden, 1.0);
            self.vector(&format!("{prefix}.post_attention_layernorm.weight"), hidden, 1.0);
            self.attention(&format!("{prefix}.self_attn"));
            if !config.is_moe(layer) {
                self.ffn(&format!("{prefix}.mlp"), config.dense_intermediate);
                continue;
            }
            self.matrix(&format!("{prefix}.mlp.gate"), &[config.experts, hidden], 1.0, false);
            let bias = format!("{prefix}.mlp.gate.e_score_correction_bias");
            self.vector(&bias, config.experts, 0.0);
            if config.shared_experts > 0 {
                self.ffn(&format!("{prefix}.mlp.shared_experts"), config.shared_intermediate());
            }
            self.experts(&format!("{prefix}.mlp.experts"));
        }
    }

    fn attention(&mut self, prefix: &str) {
        let config = self.config;
        let (hidden, heads) = (config.hidden, config.heads);
        let queries = heads * config.qk_head();
        let name = |part: &str| format!("{prefix}.{part}");
        match config.q_lora {
            None => self.matrix(&name("q_proj"), &[queries, hidden], 2.0, true),
            Some(rank) => {
                self.matrix(&name("q_a_proj"), &[rank, hidden], 1.0, true);
                self.vector(&name("q_a_layernorm.weight"), rank, 1.0);
                self.matrix(&name("q_b_proj"), &[queries, rank], 2.0, true);
            }
        }
        let up = heads * (config.qk_nope + config.v_head);
        self.matrix(&name("kv_a_proj_with_mqa"), &[config.kv_width(), hidden], 1.0, true);
        self.vector(&name("kv_a_layernorm.weight"), config.kv_lora, 1.0);
        self.matrix(&name("kv_b_proj"), &[up, config.kv_lora], 1.5, true);
        self.matrix(&name("o_proj"), &[hidden, heads * config.v_head], 1.0, true);
        if config.attention_bias {
            if let Some(rank) = config.q_lora {
                self.vector(&name("q_a_proj.bias"), rank, 0.0);
            }
            self.vector(&name("kv_a_proj_with_mqa.bias"), config.kv_width(), 0.0);
            self.vector(&name("o_proj.bias"), hidden, 0.0);
        }
    }

    fn experts(&mut self, prefix: &str) {
        let config = self.config;
        let (experts, inner, hidden) = (config.experts, config.moe_intermediate, config.hidden);
        if self.recipe.fused {
            self.stack(&format!("{prefix}.gate_up_proj"), &[experts, 2 * inner, hidden], 2.0);
            self.stack(&format!("{prefix}.down_proj"), &[experts, hidden, inner], 2.0);
            return;
        }
        (0..experts).for_each(|e| self.ffn(&format!("{prefix}.{e}"), inner));
    }

    fn ffn(&mut self, prefix: &str, inner: usize) {
        let hidden = self.config.hidden;
        self.matrix(&format!("{prefix}.gate_proj"), &[inner, hidden], 2.0, true);
        self.matrix(&format!("{prefix}.up_proj"), &[inner, hidden], 2.0, true);
        self.matrix(&format!("{prefix}.down_proj"), &[hidden, inner], 2.0, true);
    }

    /// Evenly distributed in -1 to 1 (splitmix64).
    fn next(&mut self) -> f32 {
        self.noise = self.noise.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.noise;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn push(&mut self, name: &str, dtype: &'static str, shape: &[usize], bytes: Vec<u8>) {
        self.out.push(Tensor { name: name.into(), dtype, shape: shape.into(), bytes });
    }

    fn vector(&mut self, name: &str, n: usize, centre: f32) {
        let values: Vec<f32> = (0..n).map(|_| centre + 0.2 * self.next()).collect();
        self.push(name, "F32", &[n], bytemuck::cast_slice(&values).into());
    }

    fn stack(&mut self, name: &str, shape: &[usize], gain: f32) {
        let scale = gain * 1.7 / (shape[shape.len() - 1] as f32).sqrt();
        let count = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|_| scale * self.next()).collect();
        if self.recipe.storage == Storage::F32 {
            return self.push(name, "F32", shape, bytemuck::cast_slice(&values).into());
        }
        let values: Vec<bf16> = values.into_iter().map(bf16::from_f32).collect();
        self.push(name, "BF16", shape, bytemuck::cast_slice(&values).into());
    }

    fn matrix(&mut self, name: &str, shape: &[usize; 2], gain: f32, quantised: bool) {
        let name = format!("{name}.weight");
        let (Storage::Fp8, true, Some((rows, cols))) =
            (self.recipe.storage, quantised, self.config.fp8_block)
        else {
            return self.stack(&name, shape, gain);
        };
        // Any code is a number but the two NaNs; magnitudes below 16 keep the spread moderate.
        let codes = (0..shape[0] * shape[1]).map(|_| {
            let magnitude = (self.next().abs() * 88.0) as u8;
            if self.next() < 0.0 { magnitude | 0x80 } else { magnitude }
        });
        let codes: Vec<u8> = codes.collect();
        let blocks = [shape[0].div_ceil(rows), shape[1].div_ceil(cols)];
        let scale = gain * 0.4 / (shape[1] as f32).sqrt();
        let scales: Vec<f32> =
            (0..blocks[0] * blocks[1]).map(|_| scale * (1.0 + 0.5 * self.next())).collect();
        self.push(&name, "F8_E4M3", shape, codes);
        let bytes = bytemuck::cast_slice(&scales).into();
        self.push(&format!("{name}_scale_inv"), "F32", &blocks, bytes);
    }
}
