//! The weights of one layer's attention, under the names of the published checkpoints.

use crate::checkpoint::Checkpoint;
use crate::error::LoadError;
use crate::weight::Weight;

/// How queries are made.
pub(crate) enum Query {
    /// `[heads * (qk_nope + qk_rope), hidden]`
    Plain(Weight),
    /// Through a compressed form.
    Low {
        /// `[q_lora, hidden]`
        down: Weight,
        /// `[q_lora]`
        down_bias: Option<Vec<f32>>,
        /// `[q_lora]`
        norm: Vec<f32>,
        /// `[heads * (qk_nope + qk_rope), q_lora]`
        up: Weight,
    },
}

/// One layer's attention.
pub(crate) struct Attention {
    pub(crate) query: Query,
    /// `[kv_lora + qk_rope, hidden]`
    pub(crate) latent: Weight,
    /// `[kv_lora + qk_rope]`
    pub(crate) latent_bias: Option<Vec<f32>>,
    /// `[kv_lora]`
    pub(crate) latent_norm: Vec<f32>,
    /// `[heads * (qk_nope + v_head), kv_lora]`: per head its key rows, then its value rows.
    pub(crate) up: Weight,
    /// `[hidden, heads * v_head]`
    pub(crate) out: Weight,
    /// `[hidden]`
    pub(crate) out_bias: Option<Vec<f32>>,
}

impl Attention {
    /// Looks up the attention of `layer`.
    pub fn load(from: &Checkpoint, layer: usize) -> Result<Attention, LoadError> {
        let config = from.config();
        let (hidden, heads) = (config.hidden, config.heads);
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}");
        let bias = |part: &str, n: usize| match config.attention_bias {
            true => from.vector(&name(part), n).map(Some),
            false => Ok(None),
        };
        let queries = heads * config.qk_head();
        let query = match config.q_lora {
            None => Query::Plain(from.matrix(&name("q_proj.weight"), queries, hidden)?),
            Some(rank) => Query::Low {
                down: from.matrix(&name("q_a_proj.weight"), rank, hidden)?,
                down_bias: bias("q_a_proj.bias", rank)?,
                norm: from.vector(&name("q_a_layernorm.weight"), rank)?,
                up: from.matrix(&name("q_b_proj.weight"), queries, rank)?,
            },
        };
        let (rank, width) = (config.kv_lora, config.kv_width());
        let up_rows = heads * (config.qk_nope + config.v_head);
        Ok(Attention {
            query,
            latent: from.matrix(&name("kv_a_proj_with_mqa.weight"), width, hidden)?,
            latent_bias: bias("kv_a_proj_with_mqa.bias", width)?,
            latent_norm: from.vector(&name("kv_a_layernorm.weight"), rank)?,
            up: from.matrix(&name("kv_b_proj.weight"), up_rows, rank)?,
            out: from.matrix(&name("o_proj.weight"), hidden, heads * config.v_head)?,
            out_bias: bias("o_proj.bias", hidden)?,
        })
    }

    /// Bytes of the matrices as stored.
    pub fn bytes(&self) -> usize {
        let query = match &self.query {
            Query::Plain(weight) => weight.bytes(),
            Query::Low { down, up, .. } => down.bytes() + up.bytes(),
        };
        query + self.latent.bytes() + self.up.bytes() + self.out.bytes()
    }
}
