//! The weights of one decoder layer, routed experts excepted.

use crate::attention::{Attention, Query};
use crate::checkpoint::Checkpoint;
use crate::error::LoadError;
use crate::ffn::Ffn;
use crate::weight::Weight;

/// One decoder layer.
pub(super) struct Layer {
    /// `[hidden]`
    pub attention_norm: Vec<f32>,
    pub attention: Attention,
    /// `[hidden]`
    pub mlp_norm: Vec<f32>,
    pub mlp: Mlp,
}

/// What follows the attention.
pub(super) enum Mlp {
    Dense(Ffn),
    Moe(Moe),
}

/// An MoE layer's own part.
pub(super) struct Moe {
    /// `[experts, hidden]`
    pub gate: Weight,
    /// Correction for the choice, `[experts]`.
    pub bias: Vec<f32>,
    /// All shared experts as one network; `None` if there are none.
    pub shared: Option<Ffn>,
}

impl Layer {
    pub fn load(from: &Checkpoint, layer: usize) -> Result<Layer, LoadError> {
        let config = from.config();
        let hidden = config.hidden;
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let mlp = if config.is_moe(layer) {
            let inner = config.shared_intermediate();
            let shared = name("mlp.shared_experts");
            Mlp::Moe(Moe {
                gate: from.matrix(&name("mlp.gate.weight"), config.experts, hidden)?,
                bias: from.vector(&name("mlp.gate.e_score_correction_bias"), config.experts)?,
                shared: match inner {
                    0 => None,
                    _ => Some(Ffn::load(from, &shared, hidden, inner)?),
                },
            })
        } else {
            Mlp::Dense(Ffn::load(from, &name("mlp"), hidden, config.dense_intermediate)?)
        };
        Ok(Layer {
            attention_norm: from.vector(&name("input_layernorm.weight"), hidden)?,
            attention: Attention::load(from, layer)?,
            mlp_norm: from.vector(&name("post_attention_layernorm.weight"), hidden)?,
            mlp,
        })
    }

    /// What a GPU multiplies with as it is stored, if it can.
    pub fn projections(&self) -> impl Iterator<Item = &Weight> {
        let attention = &self.attention;
        let (query, up) = match &attention.query {
            Query::Plain(weight) => (weight, None),
            Query::Low { down, up, .. } => (down, Some(up)),
        };
        let ffn = match &self.mlp {
            Mlp::Dense(ffn) => Some(ffn),
            Mlp::Moe(moe) => moe.shared.as_ref(),
        };
        let ffn = ffn.into_iter().flat_map(|ffn| [&ffn.gate, &ffn.up, &ffn.down]);
        [query, &attention.latent, &attention.out].into_iter().chain(up).chain(ffn)
    }

    /// Bytes of the matrices as stored.
    pub fn bytes(&self) -> usize {
        let mlp = match &self.mlp {
            Mlp::Dense(ffn) => ffn.bytes(),
            Mlp::Moe(moe) => moe.gate.bytes() + moe.shared.map_or(0, |ffn| ffn.bytes()),
        };
        self.attention.bytes() + mlp
    }
}
