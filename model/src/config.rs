//! The model's shape and settings, from a Hugging Face `config.json` of the `deepseek_v3` family.
//!
//! Sizes that decide the shape of tensors have to be there; settings that files leave out get the
//! defaults that transformers gives them. Every field is bounded and checked against the others,
//! and a refusal names file and field. What would compute something else silently (another
//! activation, scoring, model type or quantisation) is refused. Multi-token-prediction layers are
//! ignored.

mod fields;
mod rope;
#[cfg(test)]
mod tests;

use std::ops::Range;

use serde_json::Value;

use crate::error::LoadError;
use fields::Fields;
pub use rope::Rope;

/// Epsilon of the norms inside the attention, which the configuration does not set.
pub(crate) const LATENT_EPS: f32 = 1e-6;

/// Shape and settings of one model. Names follow the DeepSeek-V3 report.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Decoder layers, dense ones included.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Rank of the compressed query; `None` means an uncompressed one.
    pub q_lora: Option<usize>,
    /// Rank of the compressed keys and values.
    pub kv_lora: usize,
    /// Width of a head's key without rotary embedding.
    pub qk_nope: usize,
    /// Width of the shared rotary key, even.
    pub qk_rope: usize,
    /// Width of a head's value.
    pub v_head: usize,
    /// Whether `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj` have biases.
    pub attention_bias: bool,
    /// Routed experts of an MoE layer.
    pub experts: usize,
    /// Routed experts that a token goes to.
    pub top_k: usize,
    /// Groups that the experts are divided into.
    pub n_group: usize,
    /// Groups that a token may choose from.
    pub topk_group: usize,
    /// Shared experts of an MoE layer, possibly 0.
    pub shared_experts: usize,
    /// Inner width of a routed expert, and of one shared expert.
    pub moe_intermediate: usize,
    /// Inner width of a dense layer's feed-forward network.
    pub dense_intermediate: usize,
    /// Number of leading layers that are dense.
    pub first_dense: usize,
    /// Token ids are below this.
    pub vocab: usize,
    /// Whether the chosen experts' weights are divided by their sum.
    pub norm_topk: bool,
    /// Factor on the routed experts' weights.
    pub routed_scaling: f32,
    /// Epsilon of the layers' norms and the final norm.
    pub rms_eps: f32,
    /// Rotary embedding.
    pub rope: Rope,
    /// Positions are below this.
    pub max_positions: usize,
    /// Whether the output head is the embedding.
    pub tied: bool,
    /// Rows and columns of a block that shares an FP8 scale; `None` if the file names none.
    pub fp8_block: Option<(usize, usize)>,
    /// Ids that end a text, as `config.json` has them (a generation config may override them).
    pub eos: Vec<u32>,
}

impl Config {
    /// Reads the text of a `config.json`; `file` is its name in errors.
    pub fn from_json(text: &str, file: &str) -> Result<Config, LoadError> {
        let value: Value = serde_json::from_str(text).map_err(|e| LoadError::File {
            file: file.into(),
            problem: format!("not valid JSON: {e}"),
        })?;
        let Value::Object(map) = &value else {
            return Err(LoadError::File { file: file.into(), problem: "not a JSON object".into() });
        };
        let top = Fields::new(map, file);
        check_family(&top)?;

        let layers = top.need("num_hidden_layers", 1..=1024)?;
        let heads = top.need("num_attention_heads", 1..=1024)?;
        if top.int("num_key_value_heads", 0..=1024)?.is_some_and(|kv| kv != heads) {
            return Err(top.refuse(
                "num_key_value_heads",
                format!("has to equal num_attention_heads ({heads}), as MLA shares one latent"),
            ));
        }
        let q_lora = match top.has("q_lora_rank") {
            true => top.int("q_lora_rank", 1..=1 << 16)?,
            false => return Err(top.refuse("q_lora_rank", "missing (null means no compression)")),
        };
        let qk_rope = top.need("qk_rope_head_dim", 2..=4096)?;
        if qk_rope % 2 != 0 {
            return Err(top.refuse("qk_rope_head_dim", format!("{qk_rope} is not even")));
        }
        let max_positions = top.int("max_position_embeddings", 1..=1 << 24)?.unwrap_or(4096);
        let first_dense = top.int("first_k_dense_replace", 0..=1 << 16)?.unwrap_or(3).min(layers);
        let experts_field = match top.has("n_routed_experts") || !top.has("num_local_experts") {
            true => "n_routed_experts",
            false => "num_local_experts",
        };
        let vocab = top.need("vocab_size", 1..=1 << 24)?;
        let config = Config {
            hidden: top.need("hidden_size", 1..=1 << 16)?,
            layers,
            heads,
            q_lora,
            kv_lora: top.need("kv_lora_rank", 1..=1 << 16)?,
            qk_nope: top.need("qk_nope_head_dim", 1..=4096)?,
            qk_rope,
            v_head: top.need("v_head_dim", 1..=4096)?,
            attention_bias: top.flag("attention_bias", false)?,
            experts: top.need(experts_field, 1..=1 << 16)?,
            top_k: top.need("num_experts_per_tok", 1..=1024)?,
            n_group: top.int("n_group", 1..=1 << 16)?.unwrap_or(8),
            topk_group: top.int("topk_group", 1..=1 << 16)?.unwrap_or(4),
            shared_experts: top.int("n_shared_experts", 0..=1024)?.unwrap_or(1),
            moe_intermediate: top.need("moe_intermediate_size", 1..=1 << 20)?,
            dense_intermediate: match first_dense {
                0 => top.int("intermediate_size", 1..=1 << 20)?.unwrap_or(0),
                _ => top.need("intermediate_size", 1..=1 << 20)?,
            },
            first_dense,
            vocab,
            norm_topk: top.flag_or_null("norm_topk_prob", true)?,
            routed_scaling: top.float("routed_scaling_factor", 0.0..=1e6)?.unwrap_or(2.5) as f32,
            rms_eps: top.float("rms_norm_eps", 1e-30..=0.1)?.unwrap_or(1e-6) as f32,
            rope: Rope::resolve(&top, qk_rope, max_positions)?,
            max_positions,
            tied: top.flag("tie_word_embeddings", false)?,
            fp8_block: fp8_block(&top)?,
            eos: eos(&top, vocab)?,
        };
        config.check_routing(&top, experts_field)?;
        Ok(config)
    }

    /// What has to hold between the routing fields.
    fn check_routing(&self, top: &Fields<'_>, experts_field: &str) -> Result<(), LoadError> {
        let Config { experts, top_k, n_group, topk_group, .. } = *self;
        if self.first_dense == self.layers {
            return Ok(());
        }
        if experts % n_group != 0 {
            return Err(top.refuse(
                "n_group",
                format!("{experts_field} ({experts}) is not a multiple of it ({n_group})"),
            ));
        }
        if topk_group > n_group {
            return Err(
                top.refuse("topk_group", format!("{topk_group} exceeds n_group ({n_group})"))
            );
        }
        if top_k > experts {
            return Err(top.refuse(
                "num_experts_per_tok",
                format!("{top_k} exceeds {experts_field} ({experts})"),
            ));
        }
        let eligible = topk_group * (experts / n_group);
        if top_k > eligible {
            return Err(top.refuse(
                "num_experts_per_tok",
                format!("{top_k} exceeds the {eligible} experts of topk_group groups"),
            ));
        }
        Ok(())
    }

    /// Whether `layer` is a mixture-of-experts layer.
    pub fn is_moe(&self, layer: usize) -> bool {
        self.moe_layers().contains(&layer)
    }

    /// The mixture-of-experts layers.
    pub fn moe_layers(&self) -> Range<usize> {
        self.first_dense..self.layers
    }

    /// Width of a head's query: `qk_nope + qk_rope`.
    pub fn qk_head(&self) -> usize {
        self.qk_nope + self.qk_rope
    }

    /// Values that the KV cache holds for one token in one layer: `kv_lora + qk_rope`.
    pub fn kv_width(&self) -> usize {
        self.kv_lora + self.qk_rope
    }

    /// Inner width of the shared experts together, 0 if there are none.
    pub fn shared_intermediate(&self) -> usize {
        self.shared_experts * self.moe_intermediate
    }

    /// Factor on attention scores: `1/sqrt(qk_nope + qk_rope)`, times YaRN's mscale squared.
    pub fn score_scale(&self) -> f32 {
        ((self.qk_head() as f64).powf(-0.5) * self.rope.score_factor) as f32
    }

    /// One line for logs and `status`.
    pub fn summary(&self) -> String {
        let attention = match self.q_lora {
            Some(rank) => format!("q_lora {rank}"),
            None => "no q_lora".into(),
        };
        let rope = self.rope.kind;
        let fp8 = if self.fp8_block.is_some() { ", fp8 blocks" } else { "" };
        let tied = if self.tied { ", tied" } else { "" };
        format!(
            "deepseek_v3, {} layers ({} dense), hidden {}, {} heads, {attention}, kv_lora {}, \
             {} experts top-{} in {} groups + {} shared, vocab {}, context {}, rope {rope}{fp8}{tied}",
            self.layers,
            self.first_dense,
            self.hidden,
            self.heads,
            self.kv_lora,
            self.experts,
            self.top_k,
            self.n_group,
            self.shared_experts,
            self.vocab,
            self.max_positions,
        )
    }
}

/// Refuses what is of another family or would compute something else.
fn check_family(top: &Fields<'_>) -> Result<(), LoadError> {
    let architectures = top.array("architectures")?.unwrap_or_default();
    let by_architecture = architectures.iter().any(|a| a == "DeepseekV3ForCausalLM");
    match top.text("model_type")? {
        Some("deepseek_v3") => {}
        _ if by_architecture => {}
        Some(other) => {
            let shown: String = other.chars().take(40).collect();
            let problem = format!("`{shown}` is not supported, only deepseek_v3");
            return Err(top.refuse("model_type", problem));
        }
        None => return Err(top.refuse("model_type", "missing")),
    }
    let only = [("hidden_act", "silu"), ("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")];
    for (field, supported) in only {
        if let Some(other) = top.text(field)?.filter(|v| *v != supported) {
            let shown: String = other.chars().take(40).collect();
            let problem = format!("`{shown}` is not supported, only {supported}");
            return Err(top.refuse(field, problem));
        }
    }
    Ok(())
}

/// The FP8 block of `quantization_config`; any other quantisation is refused.
fn fp8_block(top: &Fields<'_>) -> Result<Option<(usize, usize)>, LoadError> {
    let Some(quant) = top.object("quantization_config")? else { return Ok(None) };
    for (field, supported) in [("quant_method", "fp8"), ("fmt", "e4m3")] {
        match quant.text(field)? {
            Some(value) if value == supported => {}
            None if field == "fmt" => {}
            None => return Err(quant.refuse(field, "missing")),
            Some(other) => {
                let shown: String = other.chars().take(40).collect();
                let problem = format!("`{shown}` is not supported, only {supported}");
                return Err(quant.refuse(field, problem));
            }
        }
    }
    let Some(sides) = quant.array("weight_block_size")? else {
        return Err(
            quant.refuse("weight_block_size", "missing, only block-scaled fp8 is supported")
        );
    };
    let side = |v: &Value| v.as_u64().filter(|n| (1..=1 << 16).contains(n)).map(|n| n as usize);
    match sides {
        [rows, cols] => match (side(rows), side(cols)) {
            (Some(rows), Some(cols)) => Ok(Some((rows, cols))),
            _ => Err(quant.refuse("weight_block_size", "has to hold two integers from 1 to 65536")),
        },
        _ => Err(quant.refuse("weight_block_size", "has to hold two integers")),
    }
}

/// `eos_token_id`, a number or a list of them.
fn eos(top: &Fields<'_>, vocab: usize) -> Result<Vec<u32>, LoadError> {
    let field = "eos_token_id";
    let items = match top.get(field) {
        None => return Ok(Vec::new()),
        Some(Value::Array(items)) => items.as_slice(),
        Some(one) => std::slice::from_ref(one),
    };
    if items.len() > 1024 {
        return Err(top.refuse(field, "more than 1024 ids"));
    }
    let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
    let ids = items.iter().map(|v| id(v).ok_or_else(|| top.refuse(field, "not a token id")));
    // Ids beyond the vocabulary never come up; some published files name such.
    ids.filter(|r| r.as_ref().map_or(true, |n| (*n as usize) < vocab)).collect()
}
