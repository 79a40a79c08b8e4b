//! The trunk: everything of the model but its routed experts.
//!
//! A step goes `begin`, then for each layer `attend`, and where that says so: rows to the experts,
//! `shared` meanwhile, `absorb` with what came back; then `logits` or `answers`. Nothing here waits for experts, sends or
//! knows where they live. The residual stream is f32 in every class.
//!
//! A trunk computes on the CPU, or, after [`Trunk::onto`], on a device (`gpu.rs`), by the same calls.

mod gpu;
mod layer;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use half::bf16;
use kernels::cuda::trunk::{Draw, Driver};
use kernels::cuda::{Coding, GpuError};
use kernels::{Acts, Compute};

use crate::activations::rounded;
use crate::attention::Context;
use crate::checkpoint::Checkpoint;
use crate::combine::combine;
use crate::config::Config;
use crate::error::{LoadError, StepError};
use crate::gate::Routing;
use crate::gpu::GpuStartError;
use crate::kv::{KvError, KvPool};
use crate::numerics::Numerics;
use crate::parallel::{ROWS, for_each, grown};
use crate::profile::{Part, span};
use crate::sample::NonFinite;
use crate::step::{Chunk, Step};
use crate::weight::Weight;
pub(crate) use gpu::StepMemory;
use layer::{Layer, Mlp, Moe};

/// A model's trunk, ready to run.
pub struct Trunk {
    checkpoint: Arc<Checkpoint>,
    compute: Arc<Compute>,
    numerics: Numerics,
    routing: Routing,
    layers: Vec<Layer>,
    /// `[vocab, hidden]`
    embedding: Weight,
    /// `[hidden]`
    final_norm: Vec<f32>,
    /// `[vocab, hidden]`; the embedding if they are tied.
    head: Weight,
    /// What computes in place of the CPU.
    gpu: Option<Box<gpu::OnGpu>>,
}

impl Checkpoint {
    /// Checks that every tensor of the trunk is there, in the right shape; copies the norms, reads
    /// no matrix.
    pub fn check_trunk(&self) -> Result<(), LoadError> {
        TrunkWeights::load(self).map(drop)
    }

    /// How a GPU multiplies with the trunk's matrices: in FP8 where they are stored so.
    pub(crate) fn trunk_coding(&self) -> Result<Coding, LoadError> {
        TrunkWeights::load(self).map(|weights| coding(&weights.layers, &weights.head))
    }
}

/// FP8 if one matrix is.
fn coding(layers: &[Layer], head: &Weight) -> Coding {
    let mut all = layers.iter().flat_map(Layer::projections).chain([head]);
    match all.any(|weight| weight.stored().coding() == Coding::Fp8) {
        true => Coding::Fp8,
        false => Coding::Bf16,
    }
}

struct TrunkWeights {
    layers: Vec<Layer>,
    embedding: Weight,
    final_norm: Vec<f32>,
    head: Weight,
}

impl TrunkWeights {
    fn load(from: &Checkpoint) -> Result<TrunkWeights, LoadError> {
        let config = from.config();
        let (vocab, hidden) = (config.vocab, config.hidden);
        let embedding = from.matrix("model.embed_tokens.weight", vocab, hidden)?;
        Ok(TrunkWeights {
            layers: (0..config.layers).map(|l| Layer::load(from, l)).collect::<Result<_, _>>()?,
            embedding,
            final_norm: from.vector("model.norm.weight", hidden)?,
            head: match config.tied {
                true => embedding,
                false => from.matrix("lm_head.weight", vocab, hidden)?,
            },
        })
    }
}

/// What a slot brings to its row's sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share<'r> {
    /// Its expert's result, to be weighted.
    Result(&'r [u8]),
    /// The weighted sum of its own and later slots' results.
    Sum(&'r [u8]),
    /// It is in an earlier slot's sum.
    Elsewhere,
}

/// What a step's wanted rows have come to.
pub struct Answers<'s> {
    /// By row: its token, if that was chosen for it.
    pub tokens: &'s [Option<Result<u32, NonFinite>>],
    /// `[vocab]` of each of the other rows.
    pub logits: &'s mut [f32],
}

impl Trunk {
    /// Looks up the trunk's tensors and copies its norms; matrices are read when first used.
    pub fn load(
        checkpoint: &Arc<Checkpoint>,
        numerics: Numerics,
        compute: Arc<Compute>,
    ) -> Result<Trunk, LoadError> {
        let TrunkWeights { layers, embedding, final_norm, head } = TrunkWeights::load(checkpoint)?;
        let config = checkpoint.config();
        Ok(Trunk {
            routing: Routing::of(config),
            checkpoint: checkpoint.clone(),
            compute,
            numerics,
            layers,
            embedding,
            final_norm,
            head,
            gpu: None,
        })
    }

    /// Whether a GPU's kernels take the model and the class.
    pub fn check_gpu(&self) -> Result<(), GpuStartError> {
        gpu::check(self.config(), self.numerics)
    }

    /// Has a device compute the trunk from now on, and brings its weights there.
    ///
    /// # Errors
    /// The device has not enough memory, or its kernels do not take this model or class.
    pub fn onto(mut self, driver: Arc<dyn Driver>) -> Result<Trunk, GpuStartError> {
        self.check_gpu()?;
        self.gpu = Some(Box::new(gpu::OnGpu::load(&self, driver)?));
        Ok(self)
    }

    /// A cache for it of `pages` pages of `page_tokens` positions, where it computes.
    pub fn cache(&self, pages: usize, page_tokens: usize) -> Result<KvPool, KvError> {
        match &self.gpu {
            Some(gpu) => gpu.cache(self.config(), pages, page_tokens),
            None => KvPool::new(self.config(), self.numerics, pages, page_tokens),
        }
    }

    /// A step for it over `kv`, of up to `rows` tokens: a device takes memory for so many.
    pub fn step(&self, kv: &KvPool, rows: usize) -> Result<Step, GpuError> {
        match &self.gpu {
            Some(gpu) => gpu.step(self.config(), kv, rows),
            None => Ok(Step::new()),
        }
    }

    /// The model's shape and settings.
    pub fn config(&self) -> &Config {
        self.checkpoint.config()
    }

    /// The numerics class.
    pub fn numerics(&self) -> Numerics {
        self.numerics
    }

    /// What it computes with.
    pub fn compute(&self) -> &Arc<Compute> {
        &self.compute
    }

    /// Bytes of its matrices as stored.
    pub fn bytes(&self) -> usize {
        let head = if self.config().tied { 0 } else { self.head.bytes() };
        self.layers.iter().map(Layer::bytes).sum::<usize>() + self.embedding.bytes() + head
    }

    /// Starts a step on `chunks`: checks them against the model and `kv`, and embeds their tokens.
    /// On an error the step holds nothing and has to be begun again.
    pub fn begin(
        &self,
        step: &mut Step,
        chunks: &[Chunk<'_>],
        kv: &KvPool,
    ) -> Result<(), StepError> {
        let config = self.config();
        let filled = step.batch.fill(config, chunks);
        let checked = filled.and_then(|()| step.batch.check_pages(kv.page_tokens(), kv.total()));
        if checked.is_err() {
            // An empty batch: going on with a refused step computes nothing.
            step.batch.fill(config, &[])?;
        }
        checked?;
        step.hidden = config.hidden;
        step.top_k = config.top_k;
        step.numerics = Some(self.numerics);
        (step.routed_layer, step.shared_layer) = (None, None);
        if let Some(gpu) = &self.gpu {
            let Step { batch, gpu: Some(memory), .. } = step else {
                panic!("a step of another trunk")
            };
            let begun = gpu.begin(config, batch, chunks.iter().map(|chunk| chunk.tokens), memory);
            if begun.is_err() {
                step.batch.fill(config, &[])?;
            }
            return begun;
        }
        let rows = step.batch.rows();
        let _span = span(Part::Norm);
        let embedding = self.embedding.mat(&self.checkpoint);
        let residual = grown(&mut step.residual, rows * config.hidden);
        let tokens = chunks.iter().flat_map(|c| c.tokens);
        for (token, row) in tokens.zip(residual.chunks_mut(config.hidden)) {
            embedding.row_to_f32(*token as usize, row);
        }
        Ok(())
    }

    /// Runs `layer` up to its experts: norm, attention, residual, norm, gate. True means that
    /// [`Step::routed`] is to be sent out and [`Trunk::absorb`] to be called; false that the layer
    /// was dense and is done.
    ///
    /// Panics if `kv` is of another class or smaller than the one that the step began with.
    ///
    /// # Errors
    /// The device cannot compute any more; nor can the calls below then.
    pub fn attend(&self, layer: usize, step: &mut Step, kv: &mut KvPool) -> Result<bool, GpuError> {
        assert_eq!(kv.numerics(), self.numerics, "the cache's numerics class");
        let config = self.config();
        if let Some(gpu) = &self.gpu {
            let routed = gpu.attend(config, layer, step, kv)?;
            step.routed_layer = routed.then_some(layer);
            return Ok(routed);
        }
        let weights = &self.layers[layer];
        let rows = step.batch.rows();
        let len = rows * config.hidden;
        let context = Context {
            config,
            checkpoint: &self.checkpoint,
            compute: &self.compute,
            numerics: self.numerics,
        };
        self.norm(step, &weights.attention_norm, false);
        let x = class_acts(self.numerics, &step.normed, &step.rounded, len);
        let delta = grown(&mut step.delta, len);
        let memory = &mut step.attention;
        weights.attention.run(context, layer, &step.batch, x, kv, memory, delta);

        self.norm(step, &weights.mlp_norm, true);
        let x = class_acts(self.numerics, &step.normed, &step.rounded, len);
        match &weights.mlp {
            Mlp::Dense(ffn) => {
                let _span = span(Part::Dense);
                let delta = &mut step.delta[..len];
                let (from, compute) = (&self.checkpoint, &*self.compute);
                ffn.run(from, compute, x, rows, &mut step.ffn, delta);
                add(&mut step.residual[..len], delta);
                Ok(false)
            }
            Mlp::Moe(moe) => {
                let _span = span(Part::Gate);
                self.gate(moe, step);
                step.routed_layer = Some(layer);
                Ok(true)
            }
        }
    }

    /// RMSNorm of the residual stream, to which `step.delta` is added before if `add_delta`, into
    /// `step.normed` and, in the bf16 class, `step.rounded`.
    fn norm(&self, step: &mut Step, weight: &[f32], add_delta: bool) {
        let _span = span(Part::Norm);
        let config = self.config();
        let (rows, hidden) = (step.batch.rows(), config.hidden);
        let (len, piece) = (rows * hidden, ROWS * hidden);
        let normed = grown(&mut step.normed, len);
        let rounded: &mut [bf16] = match self.numerics {
            Numerics::F32 => &mut [],
            Numerics::Bf16 => grown(&mut step.rounded, len),
        };
        let mut rounded = rounded.chunks_mut(piece);
        let pieces = step.residual[..len].chunks_mut(piece).zip(normed.chunks_mut(piece));
        let pieces = pieces.enumerate().map(|(i, (x, y))| (i, x, y, rounded.next()));
        let (kernels, delta) = (self.compute.kernels, &step.delta);
        for_each(&self.compute.pool, rows.div_ceil(ROWS), pieces, |(i, x, y, rounded)| {
            if add_delta {
                add(x, &delta[i * piece..]);
            }
            for (x, y) in x.chunks(hidden).zip(y.chunks_mut(hidden)) {
                kernels.rms_norm(x, weight, config.rms_eps, y);
            }
            if let Some(rounded) = rounded {
                kernels.to_bf16(y, rounded);
            }
        });
    }

    /// The gate's choice for every row, in f32.
    fn gate(&self, moe: &Moe, step: &mut Step) {
        let config = self.config();
        let (rows, experts, top_k) = (step.batch.rows(), config.experts, config.top_k);
        let scores = grown(&mut step.scores, rows * experts);
        let x = Acts::F32(&step.normed[..rows * config.hidden]);
        self.compute.matmul(x, rows, moe.gate.mat(&self.checkpoint), scores);
        let chosen = grown(&mut step.experts, rows * top_k).chunks_mut(ROWS * top_k);
        let weights = grown(&mut step.weights, rows * top_k).chunks_mut(ROWS * top_k);
        let pieces = scores.chunks_mut(ROWS * experts).zip(chosen).zip(weights);
        let (kernels, arena) = (self.compute.kernels, &step.gate);
        for_each(&self.compute.pool, rows.div_ceil(ROWS), pieces, |((scores, chosen), weights)| {
            kernels.sigmoid(scores);
            arena.with(|memory| {
                let choices = chosen.chunks_mut(top_k).zip(weights.chunks_mut(top_k));
                for (scores, (chosen, weights)) in scores.chunks(experts).zip(choices) {
                    self.routing.choose(scores, &moe.bias, memory, chosen, weights);
                }
            });
        });
    }

    /// Computes the shared experts of `layer`; meant for the time that the routed ones are away.
    /// Without shared experts it does nothing.
    pub fn shared(&self, layer: usize, step: &mut Step) -> Result<(), GpuError> {
        step.shared_layer = Some(layer);
        if let (Some(gpu), Some(memory)) = (&self.gpu, &step.gpu) {
            return gpu.shared(layer, memory);
        }
        let Mlp::Moe(Moe { shared: Some(ffn), .. }) = &self.layers[layer].mlp else {
            return Ok(());
        };
        let _span = span(Part::Dense);
        let rows = step.batch.rows();
        let len = rows * self.config().hidden;
        let x = class_acts(self.numerics, &step.normed, &step.rounded, len);
        let out = grown(&mut step.shared, len);
        let (from, compute) = (&self.checkpoint, &*self.compute);
        ffn.run(from, compute, x, rows, &mut step.ffn, out);
        Ok(())
    }

    /// Finishes `layer` with its experts' results: `result(row * top_k + slot)` is the wire row
    /// that the expert of that slot gave. Computes the shared experts if that has not been done.
    ///
    /// Panics if the layer is not the one that [`Trunk::attend`] last left waiting, or a result is
    /// not one row long: replies are checked before they come here.
    pub fn absorb<'r>(
        &self,
        layer: usize,
        step: &mut Step,
        result: &(dyn Fn(usize) -> &'r [u8] + Sync),
    ) -> Result<(), GpuError> {
        self.absorb_shares(layer, step, &|slot| Share::Result(result(slot)))
    }

    /// As [`Trunk::absorb`], of results that may have been summed where they were computed.
    pub fn absorb_shares<'r>(
        &self,
        layer: usize,
        step: &mut Step,
        share: &(dyn Fn(usize) -> Share<'r> + Sync),
    ) -> Result<(), GpuError> {
        assert_eq!(step.routed_layer.take(), Some(layer), "the layer that waits for its experts");
        if step.shared_layer.take() != Some(layer) {
            self.shared(layer, step)?;
            step.shared_layer = None;
        }
        if let Some(gpu) = &self.gpu {
            return gpu.absorb(self.config(), &self.compute, layer, step, share);
        }
        let _span = span(Part::Combine);
        let (hidden, top_k) = (self.config().hidden, self.config().top_k);
        let rows = step.batch.rows();
        let has_shared = matches!(&self.layers[layer].mlp, Mlp::Moe(Moe { shared: Some(_), .. }));
        let shared = if has_shared { &step.shared[..rows * hidden] } else { &[] };
        let row_bytes = hidden * self.numerics.bytes();
        let weights = &step.weights[..rows * top_k];
        let (kernels, arena, pool) = (self.compute.kernels, &step.combine, &self.compute.pool);
        // A row a task if there are few.
        let each = rows.div_ceil(4 * pool.threads()).clamp(1, ROWS);
        let residual = step.residual[..rows * hidden].chunks_mut(each * hidden).enumerate();
        let row = |row: usize, residual: &mut [f32]| {
            let slots = row * top_k..(row + 1) * top_k;
            let shares = slots.clone().zip(&weights[slots]);
            let results = shares.filter_map(|(slot, &weight)| {
                let (bytes, weight) = match share(slot) {
                    Share::Result(bytes) => (bytes, weight),
                    Share::Sum(bytes) => (bytes, 1.0),
                    Share::Elsewhere => return None,
                };
                assert_eq!(bytes.len(), row_bytes, "an expert's result is one row");
                Some((bytes, weight))
            });
            let shared = if has_shared { &shared[row * hidden..(row + 1) * hidden] } else { &[] };
            arena.with(|memory| {
                combine(kernels, self.numerics, results, shared, residual, memory);
            });
        };
        for_each(pool, rows.div_ceil(each), residual, |(piece, residual)| {
            for (i, residual) in residual.chunks_mut(hidden).enumerate() {
                row(piece * each + i, residual);
            }
        });
        Ok(())
    }

    /// Logits of the wanted rows, `[Step::wanted, vocab]`, after the last layer.
    pub fn logits<'s>(&self, step: &'s mut Step) -> Result<&'s mut [f32], GpuError> {
        self.logits_of(step, 0..step.wanted())
    }

    /// What the wanted rows come to after the last layer: for those with a draw the token, where that is chosen beside the
    /// logits, which then stay there; for the others logits. On the CPU nothing is chosen. Rows beyond `draws` have none.
    pub fn answers<'s>(
        &self,
        step: &'s mut Step,
        draws: &[Option<Draw>],
    ) -> Result<Answers<'s>, GpuError> {
        let wanted = step.wanted();
        assert!(draws.len() <= wanted, "{} draws for {wanted} rows", draws.len());
        if let Some(gpu) = &self.gpu {
            return gpu.answers(self.config(), step, 0..wanted, draws);
        }
        self.logits(step)?;
        let Step { logits, tokens, .. } = step;
        tokens.clear();
        tokens.resize(wanted, None);
        Ok(Answers { tokens, logits: &mut logits[..wanted * self.config().vocab] })
    }

    /// Logits of some of the wanted rows only, so that those of a long prompt need not be held at
    /// once.
    pub fn logits_of<'s>(
        &self,
        step: &'s mut Step,
        rows: std::ops::Range<usize>,
    ) -> Result<&'s mut [f32], GpuError> {
        if let Some(gpu) = &self.gpu {
            return Ok(gpu.answers(self.config(), step, rows, &[])?.logits);
        }
        let Config { hidden, vocab, rms_eps, .. } = *self.config();
        let _span = span(Part::Logits);
        let kernels = self.compute.kernels;
        let count = rows.len();
        let normed = grown(&mut step.normed, count * hidden);
        for (row, y) in step.batch.wanted()[rows].iter().zip(normed.chunks_mut(hidden)) {
            let first = *row as usize * hidden;
            kernels.rms_norm(&step.residual[first..first + hidden], &self.final_norm, rms_eps, y);
        }
        let x = rounded(kernels, self.numerics, normed, &mut step.rounded);
        let logits = grown(&mut step.logits, count * vocab);
        self.compute.matmul(x, count, self.head.mat(&self.checkpoint), logits);
        Ok(logits)
    }
}

/// The normed rows as they enter products.
fn class_acts<'a>(
    numerics: Numerics,
    normed: &'a [f32],
    rounded: &'a [bf16],
    len: usize,
) -> Acts<'a> {
    match numerics {
        Numerics::F32 => Acts::F32(&normed[..len]),
        Numerics::Bf16 => Acts::Bf16(&rounded[..len]),
    }
}

fn add(x: &mut [f32], delta: &[f32]) {
    x.iter_mut().zip(delta).for_each(|(x, d)| *x += d);
}
