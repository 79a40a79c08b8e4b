//! The trunk's weights on a device: matrices as they are stored where that is FP8 in blocks of 128 x 128, else in bf16; what
//! the gate and the embedding read as it is stored, in f32 where that is not bf16; norms and biases in f32.
//!
//! Keys' and values' up-projections are bf16 whatever they are stored in: each head has its own, the keys' transposed, and
//! heads need not begin at a block's edge. It is what DeepSeek's own code does in this form of attention, since codes of
//! absorbed queries and of sums of latents would cost accuracy, and these are a twentieth of a large trunk.

use std::sync::Arc;

use half::bf16;
use kernels::cuda::GpuError;
use kernels::cuda::trunk::{Buffer, Driver, Norm, Uploader, Weights};
use kernels::{Compute, DType, Mat, round_bf16};

use crate::attention;
use crate::checkpoint::Checkpoint;
use crate::config::{Config, LATENT_EPS};
use crate::ffn;
use crate::parallel::{Arena, for_each, grown};
use crate::trunk::layer;
use crate::weight::Weight;

/// A matrix whose rows are read one by one.
pub(super) struct Table {
    pub values: Buffer,
    /// In f32.
    pub wide: bool,
}

pub(super) struct Ffn {
    pub gate: Weights,
    pub up: Weights,
    pub down: Weights,
}

/// What compresses queries.
pub(super) struct Low {
    pub down: Weights,
    pub bias: Option<Buffer>,
    pub norm: Norm,
}

pub(super) enum Mlp {
    Dense(Ffn),
    Moe { gate: Table, bias: Buffer, shared: Option<Ffn> },
}

pub(super) struct Layer {
    pub attention_norm: Norm,
    pub low: Option<Low>,
    /// Of all heads, from the normed rows or from what they are compressed to.
    pub query: Weights,
    pub latent: Weights,
    pub latent_bias: Option<Buffer>,
    pub latent_norm: Norm,
    /// The keys' up-projection of each head, `[kv_lora, qk_nope]`: transposed, as it is applied to queries.
    pub keys: Weights,
    /// The values' of each head, `[v_head, kv_lora]`.
    pub values: Weights,
    pub out: Weights,
    pub out_bias: Option<Buffer>,
    pub mlp_norm: Norm,
    pub mlp: Mlp,
}

/// Brings weights to the device.
pub(super) struct Loader<'a> {
    pub driver: &'a Arc<dyn Driver>,
    pub checkpoint: &'a Checkpoint,
    pub compute: &'a Compute,
    pub uploader: Uploader,
    /// Rows that are being converted.
    pub rows: Arena<Vec<f32>>,
}

impl Loader<'_> {
    pub fn layer(&mut self, layer: &layer::Layer) -> Result<Layer, GpuError> {
        let (config, checkpoint) = (self.checkpoint.config(), self.checkpoint);
        let of = &layer.attention;
        let (low, query) = match &of.query {
            attention::Query::Plain(weight) => (None, weight),
            attention::Query::Low { down, down_bias, norm, up } => {
                let down = self.matrix(down.mat(checkpoint))?;
                let bias = self.bias(down_bias.as_deref())?;
                (Some(Low { down, bias, norm: self.norm(norm, LATENT_EPS)? }), up)
            }
        };
        let (keys, values) = self.heads(config, of.up.mat(checkpoint))?;
        let mlp = match &layer.mlp {
            layer::Mlp::Dense(ffn) => Mlp::Dense(self.ffn(ffn)?),
            layer::Mlp::Moe(moe) => Mlp::Moe {
                gate: self.table(moe.gate.mat(checkpoint))?,
                bias: self.uploader.values("a gate's bias", &moe.bias)?,
                shared: moe.shared.as_ref().map(|ffn| self.ffn(ffn)).transpose()?,
            },
        };
        Ok(Layer {
            attention_norm: self.norm(&layer.attention_norm, config.rms_eps)?,
            low,
            query: self.matrix(query.mat(checkpoint))?,
            latent: self.matrix(of.latent.mat(checkpoint))?,
            latent_bias: self.bias(of.latent_bias.as_deref())?,
            latent_norm: self.norm(&of.latent_norm, LATENT_EPS)?,
            keys,
            values,
            out: self.matrix(of.out.mat(checkpoint))?,
            out_bias: self.bias(of.out_bias.as_deref())?,
            mlp_norm: self.norm(&layer.mlp_norm, config.rms_eps)?,
            mlp,
        })
    }

    fn ffn(&mut self, ffn: &ffn::Ffn) -> Result<Ffn, GpuError> {
        let checkpoint = self.checkpoint;
        let [gate, up] = [&ffn.gate, &ffn.up];
        // One kernel multiplies with both.
        let alike = gate.stored().coding() == up.stored().coding();
        let mut half = |weight: &Weight| match alike {
            true => self.matrix(weight.mat(checkpoint)),
            false => self.narrow(weight.mat(checkpoint)),
        };
        let (gate, up) = (half(gate)?, half(up)?);
        Ok(Ffn { gate, up, down: self.matrix(ffn.down.mat(checkpoint))? })
    }

    pub fn norm(&mut self, weight: &[f32], eps: f32) -> Result<Norm, GpuError> {
        Ok(Norm { weight: self.uploader.values("a norm", weight)?, n: weight.len(), eps })
    }

    fn bias(&mut self, bias: Option<&[f32]>) -> Result<Option<Buffer>, GpuError> {
        bias.map(|bias| self.uploader.values("a bias", bias)).transpose()
    }

    /// A matrix for products.
    pub fn matrix(&mut self, mat: Mat<'_>) -> Result<Weights, GpuError> {
        let Some(scales) = self.uploader.scales(&mat)? else { return self.narrow(mat) };
        let weights = Weights::new(self.driver, (mat.n(), mat.k()), 1, Some(scales))?;
        self.fill(weights, |row, _, to| to[..mat.k()].copy_from_slice(mat.row_bytes(row)))
    }

    /// The same in bf16.
    fn narrow(&mut self, mat: Mat<'_>) -> Result<Weights, GpuError> {
        self.slots(1, (mat.n(), mat.k()), |row, memory, to| {
            let wide = grown(memory, to.len());
            mat.row_to_f32(row, wide);
            rounded(wide, to);
        })
    }

    /// The up-projections of all heads, which are stored as each one's keys, then its values.
    fn heads(&mut self, config: &Config, up: Mat<'_>) -> Result<(Weights, Weights), GpuError> {
        let Config { heads, qk_nope: nope, v_head, kv_lora: rank, .. } = *config;
        let mut transposed = vec![bf16::ZERO; heads * rank * nope];
        let pieces = transposed.chunks_mut(rank * nope).enumerate();
        for_each(&self.compute.pool, heads, pieces, |(head, to)| {
            self.rows.with(|memory| {
                let wide = grown(memory, rank);
                for column in 0..nope {
                    up.row_to_f32(head * (nope + v_head) + column, wide);
                    for (to, x) in to.iter_mut().skip(column).step_by(nope).zip(&*wide) {
                        *to = round_bf16(*x);
                    }
                }
            });
        });
        let keys = self.slots(heads, (rank, nope), |row, _, to| {
            to.copy_from_slice(&transposed[row * nope..(row + 1) * nope]);
        })?;
        let values = self.slots(heads, (v_head, rank), |row, memory, to| {
            let (head, row) = (row / v_head, row % v_head);
            let wide = grown(memory, rank);
            up.row_to_f32(head * (nope + v_head) + nope + row, wide);
            rounded(wide, to);
        })?;
        Ok((keys, values))
    }

    /// Matrices `[n, k]` in bf16, whose rows, counted over all, `row` writes.
    fn slots(
        &mut self,
        slots: usize,
        (n, k): (usize, usize),
        row: impl Fn(usize, &mut Vec<f32>, &mut [bf16]) + Sync,
    ) -> Result<Weights, GpuError> {
        let weights = Weights::new(self.driver, (n, k), slots, None)?;
        self.fill(weights, |at, memory, to| row(at, memory, &mut bytemuck::cast_slice_mut(to)[..k]))
    }

    fn fill(
        &mut self,
        weights: Weights,
        row: impl Fn(usize, &mut Vec<f32>, &mut [u8]) + Sync,
    ) -> Result<Weights, GpuError> {
        let (pool, rows, apart) = (&self.compute.pool, &self.rows, weights.stride());
        weights.fill(&mut self.uploader, |first, piece| {
            let count = piece.len() / apart;
            for_each(pool, count, (first..).zip(piece.chunks_mut(apart)), |(at, to)| {
                rows.with(|memory| row(at, memory, to));
            });
        })?;
        Ok(weights)
    }

    /// A matrix to be read row by row.
    pub fn table(&mut self, mat: Mat<'_>) -> Result<Table, GpuError> {
        let (n, k, wide) = (mat.n(), mat.k(), mat.dtype() != DType::Bf16);
        let row_bytes = k * if wide { 4 } else { 2 };
        let values = Buffer::new::<u8>(self.driver, "a table of the trunk", n * row_bytes)?;
        let (pool, rows) = (&self.compute.pool, &self.rows);
        self.uploader.rows(&values, row_bytes, n, |first, piece| {
            let count = piece.len() / row_bytes;
            for_each(pool, count, (first..).zip(piece.chunks_mut(row_bytes)), |(row, to)| {
                rows.with(|memory| {
                    let values = grown(memory, k);
                    mat.row_to_f32(row, values);
                    match wide {
                        true => to.copy_from_slice(bytemuck::cast_slice(values)),
                        false => rounded(values, bytemuck::cast_slice_mut(to)),
                    }
                });
            });
        })?;
        Ok(Table { values, wide })
    }
}

fn rounded(wide: &[f32], to: &mut [bf16]) {
    to.iter_mut().zip(wide).for_each(|(to, x)| *to = round_bf16(*x));
}
