//! Attention over a paged cache.

use half::bf16;

use kernels::cuda::trunk::{Attend, Row, SPAN, Span};

use crate::device::{Memory, Random, distance, launch, library, widened};

/// Heads of a block (attention.cu).
const HEADS: usize = 32;
const SCALE: f32 = 0.7;

/// Tokens at given positions of sequences of their own, and what they look at.
struct Case {
    heads: usize,
    rank: usize,
    rope: usize,
    page_tokens: usize,
    positions: Vec<usize>,
    /// `[heads][rank + rope]` of each row.
    queries: Vec<Vec<bf16>>,
    /// `[position][rank + rope]` of each row's sequence.
    cached: Vec<Vec<bf16>>,
}

impl Case {
    fn new(heads: usize, rank: usize, rope: usize, positions: &[usize]) -> Case {
        let mut random = Random(heads as u64 + 1000 * rank as u64);
        let width = rank + rope;
        Case {
            heads,
            rank,
            rope,
            page_tokens: 16,
            positions: positions.to_vec(),
            queries: positions.iter().map(|_| random.halves(heads * width)).collect(),
            cached: positions.iter().map(|p| random.halves((p + 1) * width)).collect(),
        }
    }

    /// Only row `row`.
    fn alone(&self, row: usize) -> Case {
        Case {
            positions: vec![self.positions[row]],
            queries: vec![self.queries[row].clone()],
            cached: vec![self.cached[row].clone()],
            ..*self
        }
    }

    /// `[rows][heads][rank]`, by the kernels; pages are dealt out, and threads take turns, by `seed`. The cache has another
    /// layer beside this one's.
    fn run(&self, seed: u64) -> Vec<Vec<bf16>> {
        let Case { heads, rank, rope, page_tokens, .. } = *self;
        let (rows, width) = (self.positions.len(), rank + rope);
        let needed: Vec<usize> =
            self.positions.iter().map(|p| (p + 1).div_ceil(page_tokens)).collect();
        let total: usize = needed.iter().sum();
        let mut order: Vec<u32> = (0..total as u32).collect();
        let mut random = Random(seed);
        (1..total).rev().for_each(|i| order.swap(i, random.below(i + 1)));

        let page = 2 * page_tokens * width;
        let mut cache = vec![bf16::from_bits(0xffff); total * page];
        let (mut table, mut spans) = (Vec::new(), Vec::new());
        let (mut first, mut part) = (0, 0);
        for (row, (&position, cached)) in self.positions.iter().zip(&self.cached).enumerate() {
            for (at, values) in cached.chunks_exact(width).enumerate() {
                let page_at = order[first + at / page_tokens] as usize * page;
                let slot = page_at + (page_tokens + at % page_tokens) * width;
                cache[slot..slot + width].copy_from_slice(values);
            }
            let (pages, position_at) = (first as u32, position as u32);
            table.extend(Row { pages, position: position_at, part: part as u32 }.words());
            first += needed[row];
            let count = position / SPAN + 1;
            let row = row as u32;
            spans.extend((0..count as u32).flat_map(|index| Span { row, index }.words()));
            part += if count > 1 { count } else { 0 };
        }

        let (mut absorbed, mut rotated) = (vec![bf16::ZERO; heads * rows * rank], Vec::new());
        for (row, query) in self.queries.iter().enumerate() {
            for (head, query) in query.chunks_exact(width).enumerate() {
                let at = (head * rows + row) * rank;
                absorbed[at..at + rank].copy_from_slice(&query[..rank]);
                rotated.extend_from_slice(&query[rank..]);
            }
        }
        let (absorbed, rotated) = (Memory::of(&absorbed), Memory::of(&rotated));
        let (cache, pages) = (Memory::of(&cache), Memory::of(&order));
        let (table, span_table) = (Memory::of(&table), Memory::of(&spans));
        let out = Memory::poisoned::<bf16>(heads * rows * rank);
        let parts = Memory::poisoned::<f32>(part * heads * rank);
        let tops = Memory::poisoned::<f32>(part * heads * 2);
        let call = Attend {
            absorbed: absorbed.address(),
            rotated: rotated.address(),
            cache: cache.address() + (page_tokens * width * 2) as u64,
            page_stride: page as u64,
            pages: pages.address(),
            row: table.address(),
            spans: span_table.address(),
            out: out.address(),
            parts: parts.address(),
            tops: tops.address(),
            rows: rows as u32,
            heads: heads as u32,
            width: width as u32,
            rank: rank as u32,
            page_tokens: page_tokens as u32,
            scale: SCALE,
        };
        launch("attend", (spans.len() / 2, heads.div_ceil(HEADS)), 256, seed, &[call.into()]);
        launch("merge", (rows, heads), 128, seed, &[call.into()]);
        // Their fences are looked at.
        parts.read::<f32>();
        tops.read::<f32>();
        let out = out.read::<bf16>();
        let of = |row: usize, head: usize| &out[(head * rows + row) * rank..][..rank];
        (0..rows).map(|row| (0..heads).flat_map(|head| of(row, head)).copied().collect()).collect()
    }

    /// The same in double.
    fn reference(&self, row: usize) -> Vec<f64> {
        let width = self.rank + self.rope;
        let wide = |values: &[bf16]| -> Vec<f64> {
            values.iter().map(|x| f64::from(x.to_f32())).collect()
        };
        let cached: Vec<Vec<f64>> = self.cached[row].chunks_exact(width).map(wide).collect();
        let mut out = Vec::new();
        for query in self.queries[row].chunks_exact(width).map(wide) {
            let score = |key: &Vec<f64>| {
                f64::from(SCALE) * query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>()
            };
            let scores: Vec<f64> = cached.iter().map(score).collect();
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let value = |column: usize| -> f64 {
                weights.iter().zip(&cached).map(|(w, key)| w / sum * key[column]).sum()
            };
            out.extend((0..self.rank).map(value));
        }
        out
    }
}

#[test]
fn attention_is_that_of_the_reference_and_a_row_the_same_bits_alone_and_in_other_pages() {
    if library().is_none() {
        return;
    }
    let cases = [
        // One head tile and a part of the next; widths that fill no tile; every kind of edge between blocks and spans.
        Case::new(35, 24, 8, &[0, 62, 63, 64, 511, 512, 1030]),
        Case::new(8, 64, 16, &[5, 100, 600]),
        // As in DeepSeek-V3.
        Case::new(32, 512, 64, &[70]),
    ];
    for case in cases {
        let together = case.run(1);
        for (row, out) in together.iter().enumerate() {
            let off = distance(&widened(out), &case.reference(row));
            assert!(off <= 6e-3, "position {}: off by {off}", case.positions[row]);
        }
        for (row, out) in together.iter().enumerate() {
            let alone = case.alone(row).run(2 + row as u64);
            assert!(alone[0] == *out, "position {}", case.positions[row]);
        }
    }
}
