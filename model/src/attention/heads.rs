//! The inner part of attention: a tile of consecutive tokens by a group of heads, over one
//! sequence's pages.
//!
//! Pages that every token of the tile sees whole are taken for all its rows at once; where the
//! tile's own positions begin, token by token, up to and including itself. Both give a row the same
//! bits.

use std::ops::Range;

use half::bf16;
use kernels::{Acts, Out, Packed};

use super::{Context, Pages};
use crate::activations::rounded;
use crate::parallel::grown;
use crate::profile::{Part, span};
use crate::step::Batch;

/// Rows (tokens by heads) that a tile aims at.
const TILE_ROWS: usize = 32;
/// Most scores that a tile holds, where that leaves more than one token.
const TILE_SCORES: usize = 1 << 20;

/// Consecutive tokens of one chunk.
pub(super) struct Tile {
    /// Index of the chunk in the step.
    pub chunk: usize,
    /// First row in the step.
    pub row: usize,
    /// Tokens.
    pub rows: usize,
    /// Position of the first token.
    pub position: usize,
}

/// Reusable working memory of one task.
#[derive(Default)]
pub(super) struct HeadScratch {
    /// `[rows, positions]`
    scores: Vec<f32>,
    /// `[rows]`
    sums: Vec<f32>,
    /// Rows of one head, `[rows, kv_lora]`.
    pub gathered: Vec<f32>,
    pub rounded: Vec<bf16>,
    packed: Packed,
}

/// Cuts the rows `block` of the step into tiles that stay within their chunk.
pub(super) fn cut(tiles: &mut Vec<Tile>, batch: &Batch, block: Range<usize>, head_group: usize) {
    tiles.clear();
    let mut row = block.start;
    while row < block.end {
        let chunk = batch.chunk_of(row);
        let end = batch.chunk_rows(chunk).end.min(block.end);
        let position = batch.position(row);
        let by_memory = TILE_SCORES / (head_group * (position + TILE_ROWS));
        let most = (TILE_ROWS / head_group).min(by_memory).max(1);
        let rows = most.min(end - row);
        tiles.push(Tile { chunk, row, rows, position });
        row += rows;
    }
}

impl Tile {
    /// Computes `summed` `[rows, heads of the group, kv_lora]` from the absorbed `query`
    /// `[rows, heads of the group, kv_lora + qk_rope]`.
    pub fn attend(
        &self,
        context: Context<'_>,
        query: Acts<'_>,
        pages: &Pages<'_>,
        memory: &mut HeadScratch,
        summed: &mut [f32],
    ) {
        let Context { config, compute, numerics, head_group: heads, .. } = context;
        let (kernels, width, rank) = (compute.kernels, pages.width, config.kv_lora);
        let tokens = pages.tokens();
        let positions = self.position + self.rows;
        // Pages that end at or before the first token's own position.
        let whole = (self.position + 1) / tokens;
        let ld = positions;
        let scores = grown(&mut memory.scores, self.rows * heads * ld);

        let time = span(Part::Scores);
        let packed = &mut memory.packed;
        kernels.pack(query, self.rows * heads, pages.rows(0, 1), packed);
        let together = |page: usize, count: usize, scores: &mut [f32]| {
            let mut out = Out::new(&mut scores[page * tokens..], self.rows * heads, count, ld);
            kernels.matmul_packed(packed, pages.rows(page, count), &mut out);
        };
        for page in 0..whole {
            together(page, tokens, scores);
        }
        self.each_partial(whole, tokens, |token, page, count| {
            if self.rows == 1 {
                return together(page, count, scores);
            }
            let first = token * heads;
            let query = query.slice(first * width..(first + heads) * width);
            let out = &mut scores[first * ld + page * tokens..];
            kernels.matmul(query, heads, pages.rows(page, count), out, ld);
        });

        drop(time);

        let time = span(Part::Softmax);
        let scale = config.score_scale();
        let sums = grown(&mut memory.sums, self.rows * heads);
        for (row, (scores, sum)) in scores.chunks_mut(ld).zip(sums.iter_mut()).enumerate() {
            let scores = &mut scores[..self.position + row / heads + 1];
            kernels.scale(scale, scores);
            let max = kernels.max(scores);
            *sum = kernels.softmax_weights(scores, max);
        }

        let weights = rounded(kernels, numerics, scores, &mut memory.rounded);
        drop(time);

        let _span = span(Part::Sum);
        for page in 0..whole {
            let values = pages.rows(page, tokens).cols(0..rank);
            let weights = weights.slice(page * tokens..weights.len());
            kernels.matmul_t(weights, self.rows * heads, ld, values, page > 0, summed, rank);
        }
        self.each_partial(whole, tokens, |token, page, count| {
            let first = token * heads;
            let values = pages.rows(page, count).cols(0..rank);
            let weights = weights.slice(first * ld + page * tokens..weights.len());
            let out = &mut summed[first * rank..(first + heads) * rank];
            kernels.matmul_t(weights, heads, ld, values, page > 0, out, rank);
        });
        for (summed, sum) in summed.chunks_mut(rank).zip(sums.iter()) {
            kernels.scale(1.0 / sum, summed);
        }
    }

    /// Calls `f` with token, page and count for every page from `whole` on that a token sees, in
    /// ascending order.
    fn each_partial(&self, whole: usize, tokens: usize, mut f: impl FnMut(usize, usize, usize)) {
        for token in 0..self.rows {
            let seen = self.position + token + 1;
            for page in whole..seen.div_ceil(tokens) {
                f(token, page, tokens.min(seen - page * tokens));
            }
        }
    }
}
