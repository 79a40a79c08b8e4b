//! The trunk's steps on a GPU: the same calls as on the CPU, each a sequence of launches. Products are in FP8 where weights
//! are stored so, else in bf16, with f32 sums and residual stream; a row's bits depend on the row alone, as every kernel's
//! order does, and the codes of its values.
//!
//! Nothing waits but where bytes are needed on the host: the rows that go to the experts, and tokens or logits.

mod memory;
mod weights;

use std::iter::repeat;
use std::ops::Range;
use std::sync::Arc;

use kernels::Compute;
use kernels::cuda::trunk::{
    Attention, Buffer, Draw, Driver, Norm, REFUSED, Rotary, Routing, Rows, Tables, Uploader,
    Weights, fetch,
};
use kernels::cuda::{Coding, GpuError};

use super::{Answers, Share, Trunk};
use crate::config::Config;
use crate::error::StepError;
use crate::gpu::GpuStartError;
use crate::kv::{KvError, KvPool};
use crate::numerics::Numerics;
use crate::parallel::{Arena, for_each, grown};
use crate::sample::NonFinite;
use crate::step::{Batch, Step};
use memory::LOGITS;
pub(crate) use memory::StepMemory;
use weights::{Ffn, Layer, Loader, Mlp, Table};

/// A trunk's side on a device.
pub(super) struct OnGpu {
    driver: Arc<dyn Driver>,
    coding: Coding,
    layers: Vec<Layer>,
    embedding: Table,
    final_norm: Norm,
    head: Weights,
}

/// What the kernels ask of a model's sizes.
pub(super) fn check(config: &Config, numerics: Numerics) -> Result<(), GpuStartError> {
    if numerics != Numerics::Bf16 {
        return Err(GpuStartError::Numerics);
    }
    const EIGHTS: &str = "a multiple of 8";
    let routed = config.experts + config.n_group;
    let needs = [
        ("hidden_size", EIGHTS, config.hidden, config.hidden.is_multiple_of(8)),
        ("qk_nope_head_dim", EIGHTS, config.qk_nope, config.qk_nope.is_multiple_of(8)),
        ("v_head_dim", EIGHTS, config.v_head, config.v_head.is_multiple_of(8)),
        ("qk_rope_head_dim", EIGHTS, config.qk_rope, config.qk_rope.is_multiple_of(8)),
        ("kv_lora_rank", EIGHTS, config.kv_lora, config.kv_lora.is_multiple_of(8)),
        ("kv_lora_rank", "at most 512", config.kv_lora, config.kv_lora <= 512),
        (
            "kv_lora_rank + qk_rope_head_dim",
            "at most 576",
            config.kv_width(),
            config.kv_width() <= 576,
        ),
        ("n_routed_experts + n_group", "at most 46000", routed, routed <= 46_000),
    ];
    match needs.into_iter().find(|(.., fits)| !fits) {
        Some((what, needed, have, _)) => Err(GpuStartError::Geometry { what, needed, have }),
        None => Ok(()),
    }
}

impl OnGpu {
    /// Brings the weights of `trunk` to the device.
    pub fn load(trunk: &Trunk, driver: Arc<dyn Driver>) -> Result<OnGpu, GpuError> {
        let config = trunk.config();
        let checkpoint = &*trunk.checkpoint;
        let mut loader = Loader {
            driver: &driver,
            checkpoint,
            compute: &trunk.compute,
            uploader: Uploader::new(&driver)?,
            rows: Arena::default(),
        };
        let layers = trunk.layers.iter().map(|layer| loader.layer(layer));
        let layers = layers.collect::<Result<_, _>>()?;
        let embedding = loader.table(trunk.embedding.mat(checkpoint))?;
        let final_norm = loader.norm(&trunk.final_norm, config.rms_eps)?;
        let head = loader.matrix(trunk.head.mat(checkpoint))?;
        drop(loader);
        let coding = super::coding(&trunk.layers, &trunk.head);
        Ok(OnGpu { driver, coding, layers, embedding, final_norm, head })
    }

    pub fn cache(
        &self,
        config: &Config,
        pages: usize,
        page_tokens: usize,
    ) -> Result<KvPool, KvError> {
        KvPool::on(&self.driver, config, pages, page_tokens)
    }

    pub fn step(&self, config: &Config, kv: &KvPool, rows: usize) -> Result<Step, GpuError> {
        let memory = StepMemory::new(&self.driver, config, kv, rows, self.coding)?;
        Ok(Step { gpu: Some(Box::new(memory)), ..Step::default() })
    }

    /// Takes a checked batch to the device and embeds its tokens.
    pub fn begin<'t>(
        &self,
        config: &Config,
        batch: &Batch,
        tokens: impl Iterator<Item = &'t [u32]>,
        memory: &mut StepMemory,
    ) -> Result<(), StepError> {
        let (rows, most) = (batch.rows(), memory.tables.most_rows());
        if rows > most {
            return Err(StepError::Rows { rows, most });
        }
        let StepMemory { plan, tables, residual, silenced, .. } = memory;
        silenced.clear();
        plan.clear();
        for (chunk, tokens) in tokens.enumerate() {
            let first = batch.chunk_rows(chunk).start;
            let pages = batch.pages(chunk).iter().map(|page| page.0);
            let rotation = |at| batch.rotation(first + at);
            plan.chunk(tables.bounds(), tokens, batch.start(chunk), pages, rotation);
        }
        batch.wanted().iter().for_each(|row| plan.want(*row));
        tables.send(plan)?;
        let embedding = (&self.embedding.values, self.embedding.wide);
        Ok(self.driver.embed(tables, embedding, config.hidden, residual)?)
    }

    /// See [`Trunk::attend`]. What the gate decided, and the rows, are with the host then.
    pub fn attend(
        &self,
        config: &Config,
        layer: usize,
        step: &mut Step,
        kv: &KvPool,
    ) -> Result<bool, GpuError> {
        let (rows, hidden) = (step.batch.rows(), config.hidden);
        let Step { gpu: Some(memory), experts, weights: weighed, .. } = step else {
            panic!("a step of another trunk")
        };
        let (driver, weights) = (&self.driver, &self.layers[layer]);
        quieten(memory, hidden)?;
        driver.norm(rows, &memory.residual, None, &weights.attention_norm, None, &memory.normed)?;
        self.attention(config, layer, memory, kv)?;
        if let Some(bias) = &weights.out_bias {
            let (x, norm) = (&memory.residual, &weights.mlp_norm);
            driver.norm(rows, x, Some((bias, 0)), norm, None, &memory.normed)?;
        }
        let delta = Some((&memory.delta, hidden));
        let (x, norm) = (&memory.residual, &weights.mlp_norm);
        match &weights.mlp {
            Mlp::Dense(ffn) => {
                driver.norm(rows, x, delta, norm, None, &memory.normed)?;
                if let Some(inner) = &memory.dense {
                    self.ffn(&memory.tables, ffn, &memory.normed, inner, &memory.delta)?;
                }
                let none = (memory.results.all(), memory.weights.all(), 0);
                driver.combine(rows, hidden, none, Some(&memory.delta), x)?;
                Ok(false)
            }
            Mlp::Moe { gate, bias, .. } => {
                driver.norm(rows, x, delta, norm, Some(&memory.wide), &memory.normed)?;
                let (shape, table) = ((config.experts, hidden), (&gate.values, gate.wide));
                driver.scores(rows, shape, &memory.wide, table, &memory.scores)?;
                let chosen = (&memory.chosen, &memory.weights);
                driver.choose(rows, routing(config), &memory.scores, bias, chosen)?;
                let (host, slots) = (&mut memory.host, rows * config.top_k);
                fetch(
                    driver,
                    [
                        (memory.normed.buffer(), &mut host.sent, rows * hidden * 2),
                        (&memory.chosen, &mut host.chosen, slots * 4),
                        (&memory.weights, &mut host.weights, slots * 4),
                    ],
                )?;
                let words = bytemuck::cast_slice(&host.chosen.bytes()[..slots * 4]);
                grown(experts, slots).copy_from_slice(words);
                let values = bytemuck::cast_slice(&host.weights.bytes()[..slots * 4]);
                grown(weighed, slots).copy_from_slice(values);
                Ok(true)
            }
        }
    }

    /// Attention's result, into `delta`, and its rows' entries into the cache.
    fn attention(
        &self,
        config: &Config,
        layer: usize,
        memory: &StepMemory,
        kv: &KvPool,
    ) -> Result<(), GpuError> {
        let (driver, weights, tables) = (&self.driver, &self.layers[layer], &memory.tables);
        let (all, by_head) = (tables.all(), tables.by_head());
        let (rows, normed) = (tables.rows(), &memory.normed);
        let mut from = normed;
        if let (Some(low), Some((x, low_normed))) = (&weights.low, &memory.low) {
            driver.code(rows, normed, [&low.down, &weights.latent])?;
            driver.linear(tables, all, normed, &low.down, x.all())?;
            let bias = low.bias.as_ref().map(|bias| (bias, 0));
            driver.norm(rows, x, bias, &low.norm, None, low_normed)?;
            driver.code(rows, low_normed, [&weights.query])?;
            from = low_normed;
        } else {
            driver.code(rows, normed, [&weights.query, &weights.latent])?;
        }
        driver.linear(tables, all, from, &weights.query, memory.query.all())?;
        let rotary = Rotary {
            heads: config.heads,
            nope: config.qk_nope,
            rope: config.qk_rope,
            interleave: config.rope.interleave,
        };
        driver.queries(tables, rotary, &memory.query, &memory.plain, &memory.rotated)?;
        let (cache, bias) = (kv.layer(layer), weights.latent_bias.as_ref());
        driver.linear(tables, all, normed, &weights.latent, memory.latent.all())?;
        driver.latent(tables, rotary, &memory.latent, bias, &weights.latent_norm, cache)?;
        driver.narrow(tables, by_head, &memory.plain, &weights.keys, &memory.absorbed)?;
        let attention = Attention {
            heads: config.heads,
            rank: config.kv_lora,
            scale: config.score_scale(),
            absorbed: &memory.absorbed,
            rotated: &memory.rotated,
            out: &memory.attended,
            parts: &memory.parts,
            tops: &memory.tops,
        };
        driver.attention(tables, cache, &attention)?;
        driver.narrow(tables, by_head, &memory.attended, &weights.values, &memory.values)?;
        driver.join(rows, config.heads, &memory.values, &memory.joined)?;
        driver.code(rows, &memory.joined, [&weights.out])?;
        driver.linear(tables, all, &memory.joined, &weights.out, memory.delta.all())
    }

    /// `out` = down(silu(gate x) * up x).
    fn ffn(
        &self,
        tables: &Tables,
        ffn: &Ffn,
        x: &Rows,
        inner: &Rows,
        out: &Buffer,
    ) -> Result<(), GpuError> {
        let (driver, all, rows) = (&self.driver, tables.all(), tables.rows());
        driver.code(rows, x, [&ffn.gate])?;
        driver.gate_up(tables, all, x, [&ffn.gate, &ffn.up], inner)?;
        driver.code(rows, inner, [&ffn.down])?;
        driver.linear(tables, all, inner, &ffn.down, out.all())
    }

    /// See [`Trunk::shared`]; does not wait for it.
    pub fn shared(&self, layer: usize, memory: &StepMemory) -> Result<(), GpuError> {
        match (&self.layers[layer].mlp, &memory.inner) {
            (Mlp::Moe { shared: Some(ffn), .. }, Some(inner)) => {
                self.ffn(&memory.tables, ffn, &memory.normed, inner, &memory.shared)
            }
            _ => Ok(()),
        }
    }

    /// See [`Trunk::absorb_shares`]; what it does to the residual stream is not waited for.
    pub fn absorb<'r>(
        &self,
        config: &Config,
        compute: &Compute,
        layer: usize,
        step: &mut Step,
        share: &(dyn Fn(usize) -> Share<'r> + Sync),
    ) -> Result<(), GpuError> {
        let (rows, hidden, top_k) = (step.batch.rows(), config.hidden, config.top_k);
        let Step { gpu: Some(memory), weights, .. } = step else {
            panic!("a step of another trunk")
        };
        let StepMemory { host, results, weights: weighed, residual, shared, .. } = &mut **memory;
        let (slots, row_bytes) = (rows * top_k, hidden * 2);
        let bytes = host.results.bytes_mut()?[..slots * row_bytes].chunks_mut(top_k * row_bytes);
        let sums = bytemuck::cast_slice_mut(&mut host.weights.bytes_mut()?[..slots * 4]);
        let pieces = bytes.zip(weights[..slots].chunks(top_k)).zip(sums.chunks_mut(top_k));
        for_each(&compute.pool, rows, pieces.enumerate(), |(row, ((to, weights), sums))| {
            for (slot, to) in to.chunks_mut(row_bytes).enumerate() {
                let (result, weight) = match share(row * top_k + slot) {
                    Share::Result(result) => (result, weights[slot]),
                    Share::Sum(result) => (result, 1.0),
                    // The device leaves out what has no weight.
                    Share::Elsewhere => (&[][..], 0.0),
                };
                sums[slot] = weight;
                if weight != 0.0 {
                    assert_eq!(result.len(), row_bytes, "an expert's result is one row");
                    to.copy_from_slice(result);
                }
            }
        });
        host.results.send(results, slots * row_bytes)?;
        host.weights.send(weighed, slots * 4)?;
        let has_shared = matches!(&self.layers[layer].mlp, Mlp::Moe { shared: Some(_), .. });
        let given = (results.all(), weighed.all(), top_k);
        self.driver.combine(rows, hidden, given, has_shared.then_some(&*shared), residual)
    }

    /// See [`Trunk::answers`].
    pub fn answers<'s>(
        &self,
        config: &Config,
        step: &'s mut Step,
        range: Range<usize>,
        draws: &[Option<Draw>],
    ) -> Result<Answers<'s>, GpuError> {
        let Config { hidden, vocab, .. } = *config;
        let Step { gpu: Some(memory), logits, tokens, .. } = step else {
            panic!("a step of another trunk")
        };
        quieten(memory, hidden)?;
        tokens.clear();
        tokens.resize(range.len(), None);
        let drawn = draws.iter().flatten().count();
        let logits = grown(logits, (range.len() - drawn) * vocab);
        let (driver, norm) = (&self.driver, &self.final_norm);
        let (mut left, mut draws) = (&mut *logits, draws.iter().copied());
        for (first, tokens) in range.step_by(LOGITS).zip(tokens.chunks_mut(LOGITS)) {
            let count = tokens.len();
            let StepMemory {
                tables,
                residual,
                gathered,
                last,
                logits: out,
                draws: asked,
                tokens: found,
                host,
                ..
            } = &mut **memory;
            let Some(scheduled) = tables.first(count) else { continue };
            driver.gather(tables, first..first + count, hidden, residual, gathered)?;
            driver.norm(count, gathered, None, norm, None, last)?;
            driver.code(count, last, [&self.head])?;
            driver.linear(tables, scheduled, last, &self.head, out.all())?;
            let draws: Vec<_> = draws.by_ref().chain(repeat(None)).take(count).collect();
            if draws.iter().any(Option::is_some) {
                // From rows whose logits are wanted, the best token is chosen in vain.
                let table = host.draws.bytes_mut()?.chunks_exact_mut(Draw::BYTES);
                for (to, draw) in table.zip(&draws) {
                    to.copy_from_slice(&draw.unwrap_or_default().to_bytes());
                }
                host.draws.send(asked, count * Draw::BYTES)?;
                driver.sample((count, vocab), out, asked, found)?;
                let words = host.tokens.fetch_rows(found, count * 4, [0])?;
                let chosen = bytemuck::cast_slice::<_, u32>(words).iter().zip(&draws);
                for (to, (token, draw)) in tokens.iter_mut().zip(chosen) {
                    let chosen = if *token == REFUSED { Err(NonFinite) } else { Ok(*token) };
                    *to = draw.map(|_| chosen);
                }
            }
            let rows = (0..count).filter(|row| draws[*row].is_none());
            let bytes = host.logits.fetch_rows(out, vocab * 4, rows)?;
            let (mine, others) = std::mem::take(&mut left).split_at_mut(bytes.len() / 4);
            mine.copy_from_slice(bytemuck::cast_slice(bytes));
            left = others;
        }
        Ok(Answers { tokens, logits })
    }
}

/// Zeroes rows that were lost.
fn quieten(memory: &mut StepMemory, hidden: usize) -> Result<(), GpuError> {
    let StepMemory { residual, silenced, .. } = memory;
    silenced.drain(..).try_for_each(|row| residual.zero(row * hidden * 4, hidden * 4))
}

fn routing(config: &Config) -> Routing {
    Routing {
        experts: config.experts as u32,
        top_k: config.top_k as u32,
        groups: config.n_group as u32,
        kept_groups: config.topk_group as u32,
        normed: config.norm_topk.into(),
        scaling: config.routed_scaling,
    }
}
