//! Multi-head latent attention over the paged cache, in absorbed form (DeepSeek-V2 paper, section
//! 2.1.2).
//!
//! The up-projection of keys is applied to the query instead, and that of values to the attention's
//! result, so that all heads read the same cached row of `kv_lora + qk_rope` values. A token's
//! scores are taken page by page, its softmax over all positions at once, its weighted sum in
//! ascending position: an order fixed by the absolute positions, whatever else is in the step and
//! however the prompt was cut. Tokens are cut into tiles only to share a page's values while they
//! are in cache. Later positions are never read, not even to be masked.

mod heads;
mod weights;

use half::bf16;
use kernels::{Acts, Compute, Mat};

use crate::activations::{rounded, to_wire};
use crate::checkpoint::Checkpoint;
use crate::config::{Config, LATENT_EPS};
use crate::kv::{KvPool, PageId};
use crate::numerics::Numerics;
use crate::parallel::{Arena, for_each, grown};
use crate::profile::{Part, span};
use crate::step::Batch;
use heads::{HeadScratch, Tile};
pub(crate) use weights::Attention;
use weights::Query;

/// Most tokens whose queries are held in absorbed form at once.
const BLOCK: usize = 128;

/// What every layer's attention shares.
#[derive(Clone, Copy)]
pub(crate) struct Context<'a> {
    pub config: &'a Config,
    pub checkpoint: &'a Checkpoint,
    pub compute: &'a Compute,
    pub numerics: Numerics,
    /// Heads that one task computes together; divides their number. Any value gives the same bits.
    pub head_group: usize,
}

/// Heads in a group: few enough that all threads have one, many enough to share a page's values.
pub(crate) fn head_group(heads: usize, threads: usize) -> usize {
    let most = (heads / threads).clamp(1, 16);
    (1..=most).rev().find(|g| heads.is_multiple_of(*g)).unwrap_or(1)
}

/// Reusable working memory of [`Attention::run`].
#[derive(Default)]
pub(crate) struct AttentionScratch {
    /// `[rows, q_lora]`, before and after its norm.
    low: Vec<f32>,
    low_normed: Vec<f32>,
    /// `[rows, heads, qk_nope + qk_rope]`
    query: Vec<f32>,
    /// `[rows, kv_lora + qk_rope]`
    latent: Vec<f32>,
    /// One row of the cache.
    entry: Vec<f32>,
    /// Absorbed queries of a block, `[groups][rows][heads of a group][kv_lora + qk_rope]`.
    absorbed: Vec<f32>,
    /// Weighted latent values, `[groups][rows][heads of a group][kv_lora]`.
    summed: Vec<f32>,
    /// `[heads][rows][v_head]`
    values: Vec<f32>,
    /// `[rows, heads, v_head]`
    joined: Vec<f32>,
    rounded: Vec<bf16>,
    rounded_query: Vec<bf16>,
    tiles: Vec<Tile>,
    heads: Arena<HeadScratch>,
}

impl Attention {
    /// Adds to the cache what the step's tokens contribute in `layer`, and computes `out` `[rows,
    /// hidden]` from the normed `x` `[rows, hidden]`.
    pub fn run(
        &self,
        context: Context<'_>,
        layer: usize,
        batch: &Batch,
        x: Acts<'_>,
        kv: &mut KvPool,
        scratch: &mut AttentionScratch,
        out: &mut [f32],
    ) {
        let Context { config, compute, numerics, checkpoint, .. } = context;
        let rows = batch.rows();
        self.queries(context, batch, x, scratch);
        self.cache(context, layer, batch, x, kv, scratch);
        let joined = config.heads * config.v_head;
        grown(&mut scratch.joined, rows * joined);
        for first in (0..rows).step_by(BLOCK) {
            self.block(context, layer, batch, first..rows.min(first + BLOCK), kv, scratch);
        }
        let _span = span(Part::Out);
        let joined = &scratch.joined[..rows * joined];
        let joined = rounded(compute.kernels, numerics, joined, &mut scratch.rounded);
        compute.matmul(joined, rows, self.out.mat(checkpoint), out);
        add_bias(out, self.out_bias.as_deref());
    }

    /// Queries of all heads, rotated.
    fn queries(
        &self,
        context: Context<'_>,
        batch: &Batch,
        x: Acts<'_>,
        scratch: &mut AttentionScratch,
    ) {
        let Context { config, checkpoint, compute, numerics, .. } = context;
        let _span = span(Part::Query);
        let (rows, width) = (batch.rows(), config.qk_head());
        let query = grown(&mut scratch.query, rows * config.heads * width);
        match &self.query {
            Query::Plain(weight) => compute.matmul(x, rows, weight.mat(checkpoint), query),
            Query::Low { down, down_bias, norm, up } => {
                let rank = down.n();
                let low = grown(&mut scratch.low, rows * rank);
                compute.matmul(x, rows, down.mat(checkpoint), low);
                add_bias(low, down_bias.as_deref());
                let normed = grown(&mut scratch.low_normed, rows * rank);
                for (low, normed) in low.chunks(rank).zip(normed.chunks_mut(rank)) {
                    compute.kernels.rms_norm(low, norm, LATENT_EPS, normed);
                }
                let low = rounded(compute.kernels, numerics, normed, &mut scratch.rounded);
                compute.matmul(low, rows, up.mat(checkpoint), query);
            }
        }
        for (row, query) in query.chunks_mut(config.heads * width).enumerate() {
            let table = batch.rotation(row);
            for head in query.chunks_mut(width) {
                config.rope.rotate(&mut head[config.qk_nope..], table);
            }
        }
    }

    /// Latent keys and values of all rows, into the cache.
    fn cache(
        &self,
        context: Context<'_>,
        layer: usize,
        batch: &Batch,
        x: Acts<'_>,
        kv: &mut KvPool,
        scratch: &mut AttentionScratch,
    ) {
        let Context { config, checkpoint, compute, numerics, .. } = context;
        let _span = span(Part::Latent);
        let (rows, width, rank) = (batch.rows(), config.kv_width(), config.kv_lora);
        let latent = grown(&mut scratch.latent, rows * width);
        compute.matmul(x, rows, self.latent.mat(checkpoint), latent);
        add_bias(latent, self.latent_bias.as_deref());
        let entry = grown(&mut scratch.entry, width);
        for (row, latent) in latent.chunks_mut(width).enumerate() {
            config.rope.rotate(&mut latent[rank..], batch.rotation(row));
            compute.kernels.rms_norm(
                &latent[..rank],
                &self.latent_norm,
                LATENT_EPS,
                &mut entry[..rank],
            );
            entry[rank..].copy_from_slice(&latent[rank..]);
            let (page, slot) = batch.place(row, kv.page_tokens());
            to_wire(
                compute.kernels,
                numerics,
                entry,
                &mut scratch.rounded,
                kv.row_mut(page, layer, slot),
            );
        }
    }

    /// Attention of a block of rows, into `scratch.joined`.
    fn block(
        &self,
        context: Context<'_>,
        layer: usize,
        batch: &Batch,
        block: std::ops::Range<usize>,
        kv: &KvPool,
        scratch: &mut AttentionScratch,
    ) {
        let Context { config, checkpoint, compute, numerics, head_group } = context;
        let (kernels, pool) = (compute.kernels, &compute.pool);
        let rows = block.len();
        let groups = config.heads / head_group;
        let (nope, value) = (config.qk_nope, config.v_head);
        let (rank, width) = (config.kv_lora, config.kv_width());
        let up = self.up.mat(checkpoint);
        let keys_of = |head: usize| up.rows(head * (nope + value)..head * (nope + value) + nope);
        let values_of =
            |head: usize| up.rows(head * (nope + value) + nope..(head + 1) * (nope + value));

        let absorb = span(Part::Absorb);
        // q_nope through the keys' up-projection; q_rope as it is.
        let row_width = config.heads * config.qk_head();
        let query = &scratch.query[block.start * row_width..block.end * row_width];
        let rounded_query = rounded(kernels, numerics, query, &mut scratch.rounded_query);
        let absorbed = grown(&mut scratch.absorbed, rows * config.heads * width);
        let pieces = absorbed.chunks_mut(rows * head_group * width).enumerate();
        for_each(pool, groups, pieces, |(group, absorbed)| {
            for slot in 0..head_group {
                let head = group * head_group + slot;
                let first = head * config.qk_head();
                let nopes = rounded_query.slice(first..rounded_query.len());
                let out = &mut absorbed[slot * width..];
                let ld = head_group * width;
                kernels.matmul_t(nopes, rows, row_width, keys_of(head), false, out, ld);
                for (out, query) in out.chunks_mut(ld).zip(query[first..].chunks(row_width)) {
                    out[rank..width].copy_from_slice(&query[nope..config.qk_head()]);
                }
            }
        });

        drop(absorb);

        // Scores, softmax and weighted sum, for tiles of tokens by groups of heads.
        let attend = span(Part::Attend);
        let tiles = &mut scratch.tiles;
        heads::cut(tiles, batch, block.clone(), head_group);
        let absorbed = rounded(kernels, numerics, absorbed, &mut scratch.rounded_query);
        let mut rest = grown(&mut scratch.summed, rows * config.heads * rank);
        let jobs = (0..groups).flat_map(|group| tiles.iter().map(move |tile| (group, tile)));
        let jobs = jobs.map(|(group, tile)| {
            let (summed, after) =
                std::mem::take(&mut rest).split_at_mut(tile.rows * head_group * rank);
            rest = after;
            (group, tile, summed)
        });
        let arena = &scratch.heads;
        for_each(pool, groups * tiles.len(), jobs, |(group, tile, summed)| {
            let first = (group * rows + tile.row - block.start) * head_group * width;
            let query = absorbed.slice(first..first + tile.rows * head_group * width);
            let pages = Pages { kv, layer, pages: batch.pages(tile.chunk), width };
            arena.with(|memory| tile.attend(context, query, &pages, memory, summed));
        });

        drop(attend);

        // The values' up-projection, head by head.
        let _span = span(Part::Values);
        let summed = &scratch.summed[..rows * config.heads * rank];
        let values = grown(&mut scratch.values, rows * config.heads * value);
        let pieces = values.chunks_mut(rows * value).enumerate();
        for_each(pool, config.heads, pieces, |(head, values)| {
            let (group, slot) = (head / head_group, head % head_group);
            let ld = head_group * rank;
            let summed = &summed[group * rows * ld + slot * rank..];
            arena.with(|memory| {
                let gathered = grown(&mut memory.gathered, rows * rank);
                for (row, out) in gathered.chunks_mut(rank).enumerate() {
                    out.copy_from_slice(&summed[row * ld..row * ld + rank]);
                }
                let summed = rounded(kernels, numerics, gathered, &mut memory.rounded);
                kernels.matmul(summed, rows, values_of(head), values, value);
            });
        });
        let joined = &mut scratch.joined[block.start * config.heads * value..];
        for (head, values) in values.chunks(rows * value).enumerate() {
            let rows_out = joined.chunks_mut(config.heads * value);
            for (out, values) in rows_out.zip(values.chunks(value)) {
                out[head * value..(head + 1) * value].copy_from_slice(values);
            }
        }
    }
}

fn add_bias(rows: &mut [f32], bias: Option<&[f32]>) {
    let Some(bias) = bias else { return };
    for row in rows.chunks_mut(bias.len()) {
        row.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
    }
}

/// The cached rows of one sequence in one layer.
pub(crate) struct Pages<'a> {
    kv: &'a KvPool,
    layer: usize,
    pages: &'a [PageId],
    width: usize,
}

impl<'a> Pages<'a> {
    /// Positions of a page.
    fn tokens(&self) -> usize {
        self.kv.page_tokens()
    }

    /// The first `count` positions of page `index`, as a matrix `[count, kv_lora + qk_rope]`.
    fn rows(&self, index: usize, count: usize) -> Mat<'a> {
        let bytes = self.kv.rows(self.pages[index], self.layer, count);
        let mat = match self.kv.numerics() {
            Numerics::F32 => Mat::f32(bytes, count, self.width),
            Numerics::Bf16 => Mat::bf16(bytes, count, self.width),
        };
        mat.expect("a page's rows are of this width and type")
    }
}
