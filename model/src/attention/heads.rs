//! The inner part of attention: tiles of consecutive tokens, all their heads, over one sequence's
//! cached rows.
//!
//! Positions are taken in blocks of [`BLOCK`], counted from the sequence's beginning. A block gives
//! a row (a token's head) the largest of its scores, the sum of its weights and the weighted sum of
//! values, both by that largest score; blocks are put together in ascending order ([`Merged`]), as
//! in flash attention (Dao et al. 2022, section 3.1). Each is a function of the row and of the
//! positions up to its own, so that tiles, pages and threads do not show: a tile can go through its
//! blocks by itself, or leave them to several threads.

use std::ops::Range;

use half::bf16;
use kernels::{Acts, Kernels, Out, Packed, Stack};

use super::{Context, Pages, Queries};
use crate::activations::ClassRows;
use crate::numerics::Numerics;
use crate::parallel::grown;
use crate::profile::{Part, span};
use crate::step::Batch;

/// Positions whose scores are taken together.
const BLOCK: usize = 128;
/// Rows (tokens by heads) that a tile aims at.
const TILE_ROWS: usize = 256;

/// Consecutive tokens of one chunk, with positions in one block.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// Index of the chunk in the step.
    pub chunk: usize,
    /// First row in the step.
    pub row: usize,
    /// Tokens.
    pub tokens: usize,
    /// Position of the first token.
    position: usize,
}

/// Reusable working memory of one task.
#[derive(Default)]
pub(super) struct HeadScratch {
    /// `[rows, kv_lora + qk_rope]`
    query: ClassRows,
    packed: Packed,
    /// `[rows, BLOCK]`
    scores: Vec<f32>,
    weights: Vec<bf16>,
    /// One block of all rows.
    block: Vec<f32>,
    /// Rows of one head.
    pub gathered: ClassRows,
    /// A row after its norm.
    pub normed: Vec<f32>,
}

/// Cuts the rows `block` of the step into tiles that stay within their chunk.
pub(super) fn cut(tiles: &mut Vec<Tile>, batch: &Batch, block: Range<usize>, heads: usize) {
    tiles.clear();
    let mut row = block.start;
    while row < block.end {
        let chunk = batch.chunk_of(row);
        let end = batch.chunk_rows(chunk).end.min(block.end);
        let position = batch.position(row);
        let most = (TILE_ROWS / heads).max(1).min(BLOCK - position % BLOCK);
        let tokens = most.min(end - row);
        tiles.push(Tile { chunk, row, tokens, position });
        row += tokens;
    }
}

/// What blocks come to so far for one row.
#[derive(Clone, Copy, Default)]
pub(super) struct Merged {
    max: f32,
    sum: f32,
    any: bool,
}

impl Merged {
    /// Adds a block to `out`, the weighted sum by the largest score so far. Without `values`, that sum is there already.
    pub fn add(
        &mut self,
        kernels: Kernels,
        max: f32,
        sum: f32,
        values: Option<&[f32]>,
        out: &mut [f32],
    ) {
        if !std::mem::replace(&mut self.any, true) {
            (self.max, self.sum) = (max, sum);
            values.into_iter().for_each(|values| out.copy_from_slice(values));
            return;
        }
        let top = if max > self.max { max } else { self.max };
        let mut factors = [self.max, max];
        kernels.softmax_weights(&mut factors, top);
        let [old, new] = factors;
        values.into_iter().for_each(|values| kernels.blend(new, values, old, out));
        (self.max, self.sum) = (top, new.mul_add(sum, old * self.sum));
    }

    /// Makes a weighted sum by the largest score one by the softmax. A zero gets no sign, which kernels leave open.
    pub fn finish(&self, kernels: Kernels, out: &mut [f32]) {
        kernels.scale(1.0 / self.sum, out);
    }
}

/// One block's results for all rows of a tile.
pub(super) struct Block<'a> {
    /// Largest scores, `[rows]`.
    maxima: &'a mut [f32],
    /// Sums of weights, `[rows]`.
    sums: &'a mut [f32],
    /// Weighted sums of values, `[rows, kv_lora]`.
    values: &'a mut [f32],
}

impl<'a> Block<'a> {
    /// Values of a block for `rows` rows.
    pub fn len(rows: usize, rank: usize) -> usize {
        rows * (rank + 2)
    }

    /// A block in `memory`: maxima, sums and values in this order.
    pub fn of(memory: &'a mut [f32], rows: usize) -> Block<'a> {
        let (maxima, rest) = memory.split_at_mut(rows);
        let (sums, values) = rest.split_at_mut(rows);
        Block { maxima, sums, values }
    }
}

impl Tile {
    /// Blocks that its tokens see.
    pub fn blocks(&self) -> usize {
        self.position / BLOCK + 1
    }

    /// Computes `summed` `[tokens, heads, kv_lora]` over all blocks.
    pub fn attend(
        &self,
        context: Context<'_>,
        queries: Queries<'_>,
        pages: &Pages<'_>,
        memory: &mut HeadScratch,
        summed: &mut [f32],
    ) {
        let (kernels, rank) = (context.compute.kernels, context.config.kv_lora);
        let rows = self.tokens * context.config.heads;
        self.pack(context, queries, pages, memory);
        let mut block = std::mem::take(&mut memory.block);
        let values = grown(&mut block, Block::len(rows, rank));
        let mut merged = [Merged::default(); TILE_ROWS];
        let mut more = Vec::new();
        // A tile has more rows than it aims at only if a token has more heads.
        let merged = match rows {
            0..=TILE_ROWS => &mut merged[..rows],
            _ => grown_merged(&mut more, rows),
        };
        for index in 0..self.blocks() {
            let mut block = Block::of(values, rows);
            if index == 0 {
                // The first one's sums go where they are wanted.
                block.values = summed;
            }
            self.block(context, index, pages, memory, block);
            for (row, merged) in merged.iter_mut().enumerate() {
                let (max, sum) = (values[row], values[rows + row]);
                let mine = &values[2 * rows + row * rank..][..rank];
                let mine = (index > 0).then_some(mine);
                merged.add(kernels, max, sum, mine, &mut summed[row * rank..][..rank]);
            }
        }
        for (merged, out) in merged.iter().zip(summed.chunks_mut(rank)) {
            merged.finish(kernels, out);
        }
        memory.block = block;
    }

    /// Gathers the queries of all rows, in the form that products take.
    pub fn pack(
        &self,
        context: Context<'_>,
        queries: Queries<'_>,
        pages: &Pages<'_>,
        memory: &mut HeadScratch,
    ) {
        let _span = span(Part::Scores);
        let Context { config, compute, numerics, .. } = context;
        let (rank, width) = (config.kv_lora, config.kv_width());
        let rows = self.tokens * config.heads;
        let (kernels, mut query) = (compute.kernels, memory.query.grow(numerics, rows * width));
        for index in 0..rows {
            let (row, head) = (self.row + index / config.heads, index % config.heads);
            let (absorbed, rotated) = queries.of(config, row, head);
            query.put(kernels, index * width, absorbed);
            query.put(kernels, index * width + rank, rotated);
        }
        let query = memory.query.acts(numerics, rows * width);
        kernels.pack(query, rows, pages.rows(0, 0..1), &mut memory.packed);
    }

    /// One block for all rows, whose queries [`Tile::pack`] has left in `memory`.
    pub fn block(
        &self,
        context: Context<'_>,
        index: usize,
        pages: &Pages<'_>,
        memory: &mut HeadScratch,
        out: Block<'_>,
    ) {
        let Context { config, compute, numerics, .. } = context;
        let (kernels, rank, heads) = (compute.kernels, config.kv_lora, config.heads);
        let rows = self.tokens * heads;
        let first = index * BLOCK;
        let count = BLOCK.min(self.position + self.tokens - first);
        // Positions that all tokens see, and those that one does.
        let common = BLOCK.min(self.position + 1 - first);
        let seen = |token: usize| BLOCK.min(common + token);
        let Block { maxima, sums, values } = out;

        let time = span(Part::Scores);
        let scores = grown(&mut memory.scores, rows * BLOCK);
        pages.each(first..first + count, |at, page, slots| {
            let at = at - first;
            let mut out = Out::new(&mut scores[at..], rows, slots.len(), BLOCK);
            kernels.matmul_packed(&memory.packed, pages.rows(page, slots), &mut out);
        });
        drop(time);

        let time = span(Part::Softmax);
        let scale = config.score_scale();
        let weights = grown(&mut memory.weights, rows * BLOCK);
        for (row, scores) in scores.chunks_mut(BLOCK).enumerate() {
            let scores = &mut scores[..if count == common { common } else { seen(row / heads) }];
            kernels.scale(scale, scores);
            maxima[row] = kernels.max(scores);
            sums[row] = kernels.softmax_weights(scores, maxima[row]);
            if numerics == Numerics::Bf16 {
                kernels.to_bf16(scores, &mut weights[row * BLOCK..][..scores.len()]);
            }
        }
        let weights = match numerics {
            Numerics::F32 => Acts::F32(scores),
            Numerics::Bf16 => Acts::Bf16(weights),
        };
        drop(time);

        let _span = span(Part::Sum);
        let mut rows_of = Vec::with_capacity(BLOCK);
        pages.each(first..first + count, |_, page, slots| {
            rows_of.push(pages.rows(page, slots).cols(0..rank));
        });
        let stack = Stack::new(&rows_of).causal(common, heads);
        kernels.matmul_t(weights, rows, BLOCK, stack, values, rank);
    }
}

fn grown_merged(buffer: &mut Vec<Merged>, rows: usize) -> &mut [Merged] {
    buffer.resize(rows, Merged::default());
    buffer
}
