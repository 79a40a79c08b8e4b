//! The tensors of a checkpoint of a given configuration, in the names and types
//! that DeepSeek publishes.

use model::Config;

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

/// Every tensor, in the order of the file: layer by layer.
pub fn tensors(config: &Config) -> Vec<Tensor> {
    let mut list = List { config, tensors: Vec::new() };
    list.all();
    list.tensors
}

struct List<'a> {
    config: &'a Config,
    tensors: Vec<Tensor>,
}

impl List<'_> {
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
            if self.config.shared_experts > 0 {
                self.ffn(&format!("{mlp}.shared_experts"), self.config.shared_intermediate());
            }
            (0..experts).for_each(|e| self.ffn(&format!("{mlp}.experts.{e}"), moe_intermediate));
        }
        self.norm("model.norm.weight", hidden);
        // Peaked enough that greedy decoding has a clear choice mostly.
        if !self.config.tied {
            self.plain("lm_head.weight", &[vocab, hidden], 2.0 * unit(hidden));
        }
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

    /// A projection `[n, k]`, which FP8 checkpoints quantise.
    fn matrix(&mut self, name: String, n: usize, k: usize) {
        let stored = match self.config.fp8_block {
            None => Stored::Bf16,
            Some(block) => Stored::Fp8 { block },
        };
        self.push(name, &[n, k], stored, 0.0, unit(k));
    }

    /// A matrix that no checkpoint quantises.
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
