//! What a step has on a device: its rows on their way through the layers, used again by every step, and pinned bytes for
//! what leaves and what comes back.

use std::sync::Arc;

use half::bf16;
use kernels::cuda::trunk::{Bounds, Buffer, Draw, Driver, Host, Plan, Rows, SPAN, Tables};
use kernels::cuda::{Coding, GpuError};

use crate::config::Config;
use crate::kv::KvPool;

/// Rows whose logits are computed at once.
pub(super) const LOGITS: usize = 64;
/// Rows that products are laid out for at least.
const LEAST_ROWS: usize = 16;
/// Parts of long rows' attention that there is room for at least.
const LEAST_PARTS: usize = 256;

/// See the module's text. Shapes are those of the same fields of `Step`.
pub(crate) struct StepMemory {
    pub plan: Plan,
    pub tables: Tables,
    pub residual: Buffer,
    /// After a norm, for the gate and for products.
    pub wide: Buffer,
    pub normed: Rows,
    pub low: Option<(Buffer, Rows)>,
    pub query: Buffer,
    pub plain: Rows,
    pub rotated: Buffer,
    pub latent: Buffer,
    pub absorbed: Rows,
    pub attended: Rows,
    pub parts: Buffer,
    pub tops: Buffer,
    pub values: Rows,
    pub joined: Rows,
    pub delta: Buffer,
    /// Inner rows of dense layers, and of shared experts.
    pub dense: Option<Rows>,
    pub inner: Option<Rows>,
    pub shared: Buffer,
    pub scores: Buffer,
    pub chosen: Buffer,
    pub weights: Buffer,
    /// `[rows][top_k][hidden]`
    pub results: Buffer,
    /// Of rows that are to have logits.
    pub gathered: Buffer,
    pub last: Rows,
    pub logits: Buffer,
    /// How their tokens are chosen, and which were.
    pub draws: Buffer,
    pub tokens: Buffer,
    pub host: Pinned,
    /// Rows that have been lost.
    pub silenced: Vec<usize>,
}

/// The host's side.
pub(crate) struct Pinned {
    pub sent: Host,
    pub chosen: Host,
    pub weights: Host,
    pub results: Host,
    pub logits: Host,
    pub draws: Host,
    pub tokens: Host,
}

impl StepMemory {
    /// For up to `rows` rows over `kv`; in FP8, rows have room for their codes.
    pub fn new(
        driver: &Arc<dyn Driver>,
        config: &Config,
        kv: &KvPool,
        rows: usize,
        coding: Coding,
    ) -> Result<StepMemory, GpuError> {
        let Config { hidden, heads, kv_lora, qk_nope, qk_rope, v_head, vocab, .. } = *config;
        let rows = rows.max(LEAST_ROWS);
        let positions = config.max_positions.min(kv.total() * kv.page_tokens());
        let bounds = Bounds {
            vocab,
            pages: kv.total(),
            page_tokens: kv.page_tokens(),
            rope: qk_rope,
            parts: LEAST_PARTS.max(positions.div_ceil(SPAN)),
        };
        const WHAT: &str = "rows of a step";
        let f32s = |count| Buffer::new::<f32>(driver, WHAT, count);
        let operand = |k, count| Rows::new(driver, WHAT, k, count);
        let coded = |k, count| match coding {
            Coding::Fp8 => operand(k, count)?.with_codes(driver, WHAT),
            Coding::Bf16 => operand(k, count),
        };
        let some = |k: usize| (k > 0).then(|| coded(k, rows)).transpose();
        let pin = |len| Host::new(driver, "rows on their way", len);
        let low =
            config.q_lora.map(|rank| Ok::<_, GpuError>((f32s(rows * rank)?, coded(rank, rows)?)));
        let has_moe = !config.moe_layers().is_empty();
        let (top_k, experts) = if has_moe { (config.top_k, config.experts) } else { (0, 0) };
        let dense = if config.first_dense > 0 { config.dense_intermediate } else { 0 };
        let inner = if has_moe { config.shared_intermediate() } else { 0 };
        let slots = rows * top_k;
        Ok(StepMemory {
            plan: Plan::default(),
            tables: Tables::new(driver, bounds, heads, positions, (rows, LOGITS))?,
            residual: f32s(rows * hidden)?,
            wide: f32s(rows * hidden)?,
            normed: coded(hidden, rows)?,
            low: low.transpose()?,
            query: f32s(rows * heads * config.qk_head())?,
            plain: operand(qk_nope, heads * rows)?,
            rotated: Buffer::new::<bf16>(driver, WHAT, rows * heads * qk_rope)?,
            latent: f32s(rows * config.kv_width())?,
            absorbed: operand(kv_lora, heads * rows)?,
            attended: operand(kv_lora, heads * rows)?,
            parts: f32s(bounds.parts * heads * kv_lora)?,
            tops: f32s(bounds.parts * heads * 2)?,
            values: operand(v_head, heads * rows)?,
            joined: coded(heads * v_head, rows)?,
            delta: f32s(rows * hidden)?,
            dense: some(dense)?,
            inner: some(inner)?,
            shared: f32s(if inner > 0 { rows * hidden } else { 0 })?,
            scores: f32s(rows * experts)?,
            chosen: Buffer::new::<u32>(driver, WHAT, slots)?,
            weights: f32s(slots)?,
            results: Buffer::new::<bf16>(driver, "experts' results", slots * hidden)?,
            gathered: f32s(LOGITS * hidden)?,
            last: coded(hidden, LOGITS)?,
            logits: f32s(LOGITS * vocab)?,
            draws: Buffer::new::<[u8; Draw::BYTES]>(driver, WHAT, LOGITS)?,
            tokens: Buffer::new::<u32>(driver, WHAT, LOGITS)?,
            host: Pinned {
                sent: pin(rows * hidden * 2)?,
                chosen: pin(slots * 4)?,
                weights: pin(slots * 4)?,
                results: pin(slots * hidden * 2)?,
                logits: pin(LOGITS * vocab * 4)?,
                draws: pin(LOGITS * Draw::BYTES)?,
                tokens: pin(LOGITS * 4)?,
            },
            silenced: Vec::new(),
        })
    }

    /// Rows as they travel to the experts, so many values of them.
    pub fn sent(&self, values: usize) -> &[u8] {
        // None before the first layer that has experts.
        self.host.sent.bytes().get(..values * 2).unwrap_or_default()
    }

    /// Has a row of the residual stream be zero from the next launch on.
    pub fn silence(&mut self, row: usize) {
        self.silenced.push(row);
    }
}
