//! Multi-head latent attention over the paged cache, in absorbed form (DeepSeek-V2 paper, section
//! 2.1.2).
//!
//! The up-projection of keys is applied to the query instead, and that of values to the attention's
//! result, so that all heads read the same cached row of `kv_lora + qk_rope` values. A token's
//! scores, softmax and weighted sum are taken in blocks of positions, put together in ascending
//! order (`heads.rs`): an order fixed by the absolute positions, whatever else is in the step and
//! however the prompt was cut. Tokens are cut into tiles only to share a block's values while they
//! are in cache. Later positions never weigh, not even as zeros.

mod heads;
mod weights;

use std::ops::Range;

use kernels::{Acts, Compute, Mat, Packed, Stack};

use crate::activations::{ClassRows, as_wire};
use crate::checkpoint::Checkpoint;
use crate::config::{Config, LATENT_EPS};
use crate::kv::{KvPool, PageId};
use crate::numerics::Numerics;
use crate::parallel::{Arena, ROWS, for_each, grown};
use crate::profile::{Part, span};
use crate::step::Batch;
use heads::{Block, HeadScratch, Merged, Tile};
pub(crate) use weights::{Attention, Query};

/// Most tokens whose queries are held in absorbed form at once.
const BLOCK: usize = 256;

/// What every layer's attention shares.
#[derive(Clone, Copy)]
pub(crate) struct Context<'a> {
    pub config: &'a Config,
    pub checkpoint: &'a Checkpoint,
    pub compute: &'a Compute,
    pub numerics: Numerics,
}

/// Queries of a block of rows.
#[derive(Clone, Copy)]
pub(crate) struct Queries<'a> {
    /// First row in the step.
    first: usize,
    rows: usize,
    /// Through the keys' up-projection, `[heads][rows][kv_lora]`.
    absorbed: &'a [f32],
    /// As projected and rotated, `[rows, heads, qk_nope + qk_rope]`, from the step's first row on.
    plain: &'a [f32],
}

impl<'a> Queries<'a> {
    /// Absorbed and rotated part for a row of the step.
    fn of(&self, config: &Config, row: usize, head: usize) -> (&'a [f32], &'a [f32]) {
        let absorbed = (head * self.rows + row - self.first) * config.kv_lora;
        let plain = &self.plain[(row * config.heads + head) * config.qk_head()..];
        let absorbed = &self.absorbed[absorbed..absorbed + config.kv_lora];
        (absorbed, &plain[config.qk_nope..config.qk_head()])
    }
}

/// Reusable working memory of [`Attention::run`].
#[derive(Default)]
pub(crate) struct AttentionScratch {
    /// The normed rows, packed.
    x: Packed,
    /// `[rows, q_lora]`, before and after its norm.
    low: Vec<f32>,
    low_normed: ClassRows,
    /// `[rows, heads, qk_nope + qk_rope]`
    query: Vec<f32>,
    /// `[rows, kv_lora + qk_rope]`
    latent: Vec<f32>,
    /// The same as it goes to the cache.
    entries: ClassRows,
    /// Absorbed queries of a block, `[heads][rows][kv_lora]`.
    absorbed: Vec<f32>,
    tiles: Vec<Tile>,
    /// Weighted latent values, `[rows, heads, kv_lora]`.
    summed: Vec<f32>,
    /// Tiles' blocks that several threads share out, and what they have come to.
    jobs: Vec<(usize, usize)>,
    blocks: Vec<f32>,
    merged: Vec<Merged>,
    /// `[heads][rows][v_head]`
    values: Vec<f32>,
    /// `[rows, heads, v_head]`
    joined: ClassRows,
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
        self.cache(context, layer, batch, kv, scratch);
        let joined = config.heads * config.v_head;
        scratch.joined.grow(numerics, rows * joined);
        for first in (0..rows).step_by(BLOCK) {
            self.block(context, layer, batch, first..rows.min(first + BLOCK), kv, scratch);
        }
        let _span = span(Part::Out);
        let joined = scratch.joined.acts(numerics, rows * joined);
        compute.matmul(joined, rows, self.out.mat(checkpoint), out);
        add_bias(out, self.out_bias.as_deref());
    }

    /// Queries of all heads, rotated; and latent keys and values as the projection gives them, which reads the same rows.
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
        let latent = grown(&mut scratch.latent, rows * config.kv_width());
        let of_latent = self.latent.mat(checkpoint);
        let arena = &scratch.heads;
        match &self.query {
            Query::Plain(weight) => {
                let weights = [weight.mat(checkpoint), of_latent];
                compute.matmul_both(x, rows, weights, &mut scratch.x, [&mut *query, latent]);
            }
            Query::Low { down, down_bias, norm, up } => {
                let rank = down.n();
                let low = grown(&mut scratch.low, rows * rank);
                let weights = [down.mat(checkpoint), of_latent];
                compute.matmul_both(x, rows, weights, &mut scratch.x, [&mut *low, latent]);
                add_bias(low, down_bias.as_deref());
                let mut normed = scratch.low_normed.grow(numerics, rows * rank);
                let pieces = low.chunks(ROWS * rank).map(|low| (low, normed.take(low.len())));
                for_each(&compute.pool, rows.div_ceil(ROWS), pieces, |(low, mut normed)| {
                    arena.with(|memory| {
                        let row = grown(&mut memory.normed, rank);
                        for (index, low) in low.chunks(rank).enumerate() {
                            compute.kernels.rms_norm(low, norm, LATENT_EPS, row);
                            normed.put(compute.kernels, index * rank, row);
                        }
                    });
                });
                let low = scratch.low_normed.acts(numerics, rows * rank);
                compute.matmul(low, rows, up.mat(checkpoint), query);
            }
        }
        let pieces = query.chunks_mut(ROWS * config.heads * width).enumerate();
        for_each(&compute.pool, rows.div_ceil(ROWS), pieces, |(piece, query)| {
            for (row, query) in query.chunks_mut(config.heads * width).enumerate() {
                let table = batch.rotation(piece * ROWS + row);
                for head in query.chunks_mut(width) {
                    config.rope.rotate(&mut head[config.qk_nope..], table);
                }
            }
        });
    }

    /// Latent keys and values of all rows, into the cache.
    fn cache(
        &self,
        context: Context<'_>,
        layer: usize,
        batch: &Batch,
        kv: &mut KvPool,
        scratch: &mut AttentionScratch,
    ) {
        let Context { config, compute, numerics, .. } = context;
        let _span = span(Part::Latent);
        let (rows, width, rank) = (batch.rows(), config.kv_width(), config.kv_lora);
        let latent = grown(&mut scratch.latent, rows * width);
        add_bias(latent, self.latent_bias.as_deref());
        let arena = &scratch.heads;
        let mut entries = scratch.entries.grow(numerics, rows * width);
        let pieces = latent.chunks_mut(ROWS * width).enumerate();
        let pieces = pieces.map(|(piece, latent)| {
            let entries = entries.take(latent.len());
            (piece, latent, entries)
        });
        for_each(&compute.pool, rows.div_ceil(ROWS), pieces, |(piece, latent, mut entries)| {
            arena.with(|memory| {
                let normed = grown(&mut memory.normed, rank);
                for (row, latent) in latent.chunks_mut(width).enumerate() {
                    let (values, key) = latent.split_at_mut(rank);
                    config.rope.rotate(key, batch.rotation(piece * ROWS + row));
                    compute.kernels.rms_norm(values, &self.latent_norm, LATENT_EPS, normed);
                    entries.put(compute.kernels, row * width, normed);
                    entries.put(compute.kernels, row * width + rank, key);
                }
            });
        });
        let entries = as_wire(scratch.entries.acts(numerics, rows * width));
        for (row, entry) in entries.chunks(width * numerics.bytes()).enumerate() {
            let (page, slot) = batch.place(row, kv.page_tokens());
            kv.row_mut(page, layer, slot).copy_from_slice(entry);
        }
    }

    /// Attention of a block of rows, into `scratch.joined`.
    fn block(
        &self,
        context: Context<'_>,
        layer: usize,
        batch: &Batch,
        block: Range<usize>,
        kv: &KvPool,
        scratch: &mut AttentionScratch,
    ) {
        let Context { config, checkpoint, compute, numerics } = context;
        let (kernels, pool) = (compute.kernels, &compute.pool);
        let (rows, heads) = (block.len(), config.heads);
        let (nope, value, rank) = (config.qk_nope, config.v_head, config.kv_lora);
        let up = self.up.mat(checkpoint);
        let keys_of = |head: usize| up.rows(head * (nope + value)..head * (nope + value) + nope);
        let values_of =
            |head: usize| up.rows(head * (nope + value) + nope..(head + 1) * (nope + value));
        let arena = &scratch.heads;

        // The part of the query without rotation through the keys' up-projection, head by head.
        let absorb = span(Part::Absorb);
        let row_width = heads * config.qk_head();
        let query = &scratch.query[block.start * row_width..block.end * row_width];
        let absorbed = grown(&mut scratch.absorbed, heads * rows * rank);
        let pieces = absorbed.chunks_mut(rows * rank).enumerate();
        for_each(pool, heads, pieces, |(head, absorbed)| {
            arena.with(|memory| {
                let mut gathered = memory.gathered.grow(numerics, rows * nope);
                let first = head * config.qk_head();
                for (row, query) in query.chunks(row_width).enumerate() {
                    gathered.put(kernels, row * nope, &query[first..first + nope]);
                }
                let query = memory.gathered.acts(numerics, rows * nope);
                let keys = [keys_of(head)];
                kernels.matmul_t(query, rows, nope, Stack::new(&keys), absorbed, rank);
            });
        });
        drop(absorb);

        let attend = span(Part::Attend);
        let summed = grown(&mut scratch.summed, rows * heads * rank);
        heads::cut(&mut scratch.tiles, batch, block.clone(), heads);
        let tiles = &scratch.tiles;
        let queries = Queries { first: block.start, rows, absorbed, plain: &scratch.query };
        let pages = |tile: &Tile| Pages {
            kv,
            layer,
            pages: batch.pages(tile.chunk),
            width: config.kv_width(),
        };
        let most = tiles.iter().map(Tile::blocks).max().unwrap_or(0);
        let all: usize = tiles.iter().map(Tile::blocks).sum();
        if 2 * most * pool.threads() > all && all > 1 {
            // Too few tiles to occupy all threads until the end: their blocks are shared out.
            scratch.jobs.clear();
            let jobs = tiles.iter().enumerate();
            scratch.jobs.extend(jobs.flat_map(|(i, t)| (0..t.blocks()).map(move |b| (i, b))));
            let shared = Shared { context, queries, tiles, arena };
            let merged = &mut scratch.merged;
            shared.attend(&scratch.jobs, &pages, &mut scratch.blocks, merged, summed);
        } else {
            let mut rest = &mut *summed;
            let jobs = tiles.iter().map(|tile| {
                let len = tile.tokens * heads * rank;
                let (summed, after) = std::mem::take(&mut rest).split_at_mut(len);
                rest = after;
                (tile, summed)
            });
            for_each(pool, tiles.len(), jobs, |(tile, summed)| {
                let pages = pages(tile);
                arena.with(|memory| tile.attend(context, queries, &pages, memory, summed));
            });
        }
        drop(attend);

        // The values' up-projection, head by head.
        let _span = span(Part::Values);
        let summed = &*summed;
        let values = grown(&mut scratch.values, rows * heads * value);
        let pieces = values.chunks_mut(rows * value).enumerate();
        for_each(pool, heads, pieces, |(head, values)| {
            arena.with(|memory| {
                let mut gathered = memory.gathered.grow(numerics, rows * rank);
                for (row, summed) in summed.chunks(heads * rank).enumerate() {
                    gathered.put(kernels, row * rank, &summed[head * rank..(head + 1) * rank]);
                }
                let summed = memory.gathered.acts(numerics, rows * rank);
                kernels.matmul(summed, rows, values_of(head), values, value);
            });
        });
        let values = &*values;
        let mut joined = scratch.joined.grow(numerics, block.end * heads * value);
        joined.take(block.start * heads * value);
        let pieces = (0..rows).step_by(ROWS).map(|first| {
            let count = ROWS.min(rows - first);
            (first, joined.take(count * heads * value))
        });
        for_each(pool, rows.div_ceil(ROWS), pieces, |(first, mut joined)| {
            let mut at = 0;
            for row in first..rows.min(first + ROWS) {
                for head in 0..heads {
                    let from = (head * rows + row) * value;
                    joined.put(kernels, at, &values[from..from + value]);
                    at += value;
                }
            }
        });
    }
}

/// Blocks that a thread takes of [`Shared::attend`] at once, at most, so that memory is bounded.
const WAVE: usize = 16;

/// Tiles whose blocks are shared out over the threads.
struct Shared<'a> {
    context: Context<'a>,
    queries: Queries<'a>,
    tiles: &'a [Tile],
    arena: &'a Arena<HeadScratch>,
}

impl Shared<'_> {
    /// Computes `summed`, as [`Tile::attend`] does, from the tiles' blocks `jobs` in ascending
    /// order.
    fn attend<'p>(
        &self,
        jobs: &[(usize, usize)],
        pages: &(impl Fn(&Tile) -> Pages<'p> + Sync),
        blocks: &mut Vec<f32>,
        merged: &mut Vec<Merged>,
        summed: &mut [f32],
    ) {
        let Context { config, compute, .. } = self.context;
        let (kernels, pool, rank) = (compute.kernels, &compute.pool, config.kv_lora);
        let rows_of = |tile: usize| self.tiles[tile].tokens * config.heads;
        merged.clear();
        merged.resize(summed.len() / rank, Merged::default());
        for wave in jobs.chunks(WAVE * pool.threads()) {
            let len = wave.iter().map(|(tile, _)| Block::len(rows_of(*tile), rank)).sum();
            let blocks = grown(blocks, len);
            let mut rest = &mut *blocks;
            let pieces = wave.iter().map(|&(tile, index)| {
                let len = Block::len(rows_of(tile), rank);
                let (out, after) = std::mem::take(&mut rest).split_at_mut(len);
                rest = after;
                (&self.tiles[tile], index, out)
            });
            for_each(pool, wave.len(), pieces, |(tile, index, out)| {
                let pages = pages(tile);
                self.arena.with(|memory| {
                    tile.pack(self.context, self.queries, &pages, memory);
                    tile.block(
                        self.context,
                        index,
                        &pages,
                        memory,
                        Block::of(out, tile.tokens * config.heads),
                    );
                });
            });
            let mut rest = &*blocks;
            for jobs in wave.chunk_by(|a, b| a.0 == b.0) {
                let (tile, rows) = (jobs[0].0, rows_of(jobs[0].0));
                let len = Block::len(rows, rank);
                let (mine, after) = rest.split_at(len * jobs.len());
                rest = after;
                let first = (self.tiles[tile].row - self.queries.first) * config.heads;
                let merged = merged[first..first + rows].iter_mut();
                let out = summed[first * rank..(first + rows) * rank].chunks_mut(rank);
                for_each(pool, rows, merged.zip(out).enumerate(), |(row, (merged, out))| {
                    for block in mine.chunks(len) {
                        let (max, sum) = (block[row], block[rows + row]);
                        let values = &block[2 * rows + row * rank..][..rank];
                        merged.add(kernels, max, sum, Some(values), out);
                    }
                });
            }
        }
        for (merged, out) in merged.iter().zip(summed.chunks_mut(rank)) {
            merged.finish(kernels, out);
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
    /// Calls `f` for every stretch of `positions` in one page, ascending: with its first position,
    /// the page's index and its slots there.
    fn each(&self, positions: Range<usize>, mut f: impl FnMut(usize, usize, Range<usize>)) {
        let tokens = self.kv.page_tokens();
        let mut at = positions.start;
        while at < positions.end {
            let (page, slot) = (at / tokens, at % tokens);
            let count = (tokens - slot).min(positions.end - at);
            f(at, page, slot..slot + count);
            at += count;
        }
    }

    /// Positions `slots` of page `index`, as a matrix `[slots, kv_lora + qk_rope]`.
    fn rows(&self, index: usize, slots: Range<usize>) -> Mat<'a> {
        let count = slots.len();
        let bytes = self.kv.rows(self.pages[index], self.layer, slots);
        let mat = match self.kv.numerics() {
            Numerics::F32 => Mat::f32(bytes, count, self.width),
            Numerics::Bf16 => Mat::bf16(bytes, count, self.width),
        };
        mat.expect("a page's rows are of this width and type")
    }
}
