//! Where the sums of many rows go: into f32 rows, into bf16 rows, or through SwiGLU into the next product's activations.
//!
//! A tile of sums is [outputs][rows], as activations are packed too; rows of results are its transpose.

use super::super::avx512::{Avx512, round};
use super::lanes;
use super::panel::{Tile, columns};
use super::tiles::EDGE;
use crate::lanes::{STEP, Simd};
use crate::packed::{Inner, Out};
use crate::rowwise::SiluMul;
use bytemuck::{Pod, Zeroable};
use std::arch::x86_64::*;
use std::ops::Range;

/// Pairs of panels that are taken at a time, at most.
pub(super) const PAIRS: usize = 8;
/// Outputs of those.
const WIDTH: usize = PAIRS * 2 * EDGE;

/// A tile's rows of results on their way to where they belong.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Rows([[f32; WIDTH]; EDGE]);

// SAFETY: numbers alone, without padding.
unsafe impl Zeroable for Rows {}
// SAFETY: as above.
unsafe impl Pod for Rows {}

/// Takes sums that are whole.
pub(super) trait Sink {
    /// Pairs that are best taken together, up to [`PAIRS`], where there are so many tiles of rows.
    fn pairs(&self, tiles: usize) -> usize;

    /// The sums of both panels of each of `pairs`, up to [`PAIRS`] of them, for tile of rows `tile`; of one panel, if the
    /// outputs end there. What `rows` holds is of no use before and after.
    ///
    /// # Safety
    /// The CPU has what tiles need; the pairs and the tile are in the shape that the sink was made for.
    unsafe fn take<'s>(
        &mut self,
        pairs: Range<usize>,
        tile: usize,
        sums: impl Fn(usize) -> [&'s Tile; 2],
        rows: &mut Rows,
    );
}

/// What rows of results are of.
trait Element: Copy {
    /// Puts those of sixteen `sums` that `mask` has to `to`.
    ///
    /// # Safety
    /// The CPU has AVX-512, and there is room for as many.
    unsafe fn put(to: *mut Self, mask: __mmask16, sums: __m512);
}

impl Element for f32 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn put(to: *mut f32, mask: __mmask16, sums: __m512) {
        // SAFETY: the caller's.
        unsafe { _mm512_mask_storeu_ps(to, mask, sums) };
    }
}

/// Bits of bf16, rounded from the sums.
impl Element for u16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn put(to: *mut u16, mask: __mmask16, sums: __m512) {
        // SAFETY: the caller's.
        unsafe {
            let half = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(round(sums)));
            _mm256_mask_storeu_epi16(to.cast(), mask, half);
        }
    }
}

impl<T: Element> Sink for Out<'_, T> {
    fn pairs(&self, tiles: usize) -> usize {
        if tiles <= FEW { 1 } else { PAIRS }
    }

    #[inline]
    unsafe fn take<'s>(
        &mut self,
        pairs: Range<usize>,
        tile: usize,
        sums: impl Fn(usize) -> [&'s Tile; 2],
        rows: &mut Rows,
    ) {
        // SAFETY: the caller's.
        unsafe { put_rows(self, pairs, tile, sums, rows) }
    }
}

/// Tiles of rows up to which a pair's results are put into their rows alone: what weights are asked for meanwhile matters
/// more there than how rows are written.
const FEW: usize = 6;

/// Lines of rows between one that is written and the one that is asked for meanwhile.
const OWNED: usize = 2 * PAIRS;

/// Puts results into their rows, one row after the other: lines of many rows at once would push each other out of the
/// first-level cache where rows are a power of two apart, and a store whose line is not there holds up those after it.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn put_rows<'s, T: Element>(
    y: &mut Out<'_, T>,
    pairs: Range<usize>,
    tile: usize,
    sums: impl Fn(usize) -> [&'s Tile; 2],
    Rows(rows): &mut Rows,
) {
    let (all, outputs) = y.shape();
    let (first, n) = (tile * EDGE, pairs.start * 2 * EDGE);
    let count = (outputs - n).min(pairs.len() * 2 * EDGE);
    let owned = OWNED / pairs.len();
    for (at, pair) in pairs.enumerate() {
        for (panel, sums) in sums(pair).into_iter().enumerate() {
            for (row, values) in rows.iter_mut().zip(columns(sums)) {
                let to = row[(2 * at + panel) * EDGE..][..EDGE].as_mut_ptr();
                // SAFETY: sixteen elements.
                unsafe { _mm512_storeu_si512(to.cast(), values) };
            }
        }
    }
    for (row, values) in (first..all).zip(rows.iter()) {
        if row + owned < all {
            let (from, to) = (y.place(row + owned, n), y.place(row + owned, n + count - 1));
            for line in (from.addr()..=to.addr()).step_by(LINE) {
                let line = from.cast::<i8>().with_addr(line);
                _mm_prefetch::<_MM_HINT_ET0>(line);
            }
        }
        for (i, values) in values[..count].chunks(EDGE).enumerate() {
            let mask = lanes(values.len());
            // SAFETY: as many elements as the mask has lanes, and room for them in the row.
            unsafe {
                let sums = _mm512_maskz_loadu_ps(mask, values.as_ptr());
                T::put(y.at(row, n + i * EDGE), mask, sums);
            }
        }
    }
}

/// Bytes of a cache line.
const LINE: usize = 64;

/// The gate's panel and the other's, into the activations of the product after them.
impl Sink for Inner<'_> {
    fn pairs(&self, _: usize) -> usize {
        1
    }

    #[inline]
    unsafe fn take<'s>(
        &mut self,
        pairs: Range<usize>,
        tile: usize,
        sums: impl Fn(usize) -> [&'s Tile; 2],
        _: &mut Rows,
    ) {
        for pair in pairs {
            let [gate, up] = sums(pair).map(|sums| sums.as_flattened());
            let mut values = [[0.0; EDGE]; EDGE];
            let y = values.as_flattened_mut();
            // SAFETY: the caller's.
            unsafe {
                Avx512::<false>::run(SiluMul { gate, up, y });
                pack_outputs(&values, self.cells(tile, pair * EDGE));
            }
        }
    }
}

/// Puts a tile's outputs where their pairs lie among packed activations: half a step.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn pack_outputs(values: &Tile, cells: *mut u32) {
    for (pair, [even, odd]) in values.as_chunks::<2>().0.iter().enumerate() {
        // SAFETY: sixteen elements each, and room for as many pairs.
        unsafe {
            let even = round(_mm512_loadu_ps(even.as_ptr()));
            let odd = round(_mm512_loadu_ps(odd.as_ptr()));
            let cells = cells.add(pair * EDGE);
            _mm512_storeu_si512(cells.cast(), _mm512_or_si512(_mm512_srli_epi32::<16>(even), odd));
        }
    }
}

const _: () = assert!(STEP == 2 * EDGE, "two panels are a step");
