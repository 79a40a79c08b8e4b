//! Where the sums of many rows go: into f32 rows, into bf16 rows, or through SwiGLU into the next product's activations.
//!
//! A tile of sums is [outputs][rows], as activations are packed too; rows of results are its transpose.

use super::super::avx512::{Avx512, round};
use super::panel::{Tile, collect, transposed};
use super::tiles::EDGE;
use crate::lanes::{STEP, Simd};
use crate::packed::{Inner, Out};
use crate::rowwise::SiluMul;
use std::arch::x86_64::*;

/// Takes sums that are whole.
pub(super) trait Sink {
    /// The sums of both panels of `pair` for tile of rows `tile`; of one, if the outputs end there.
    ///
    /// # Safety
    /// The CPU has what tiles need; the pair and the tile are in the shape that the sink was made for.
    unsafe fn take(&mut self, pair: usize, tile: usize, sums: [&Tile; 2]);
}

impl Sink for Out<'_> {
    #[inline]
    unsafe fn take(&mut self, pair: usize, tile: usize, sums: [&Tile; 2]) {
        let (rows, outputs) = self.shape();
        let row = tile * EDGE;
        for (panel, sums) in sums.into_iter().enumerate() {
            let n = (2 * pair + panel) * EDGE;
            if n < outputs {
                own_early(self, row, n);
                // SAFETY: the caller's.
                unsafe { collect(sums, self, row, EDGE.min(rows - row), n) };
            }
        }
    }
}

/// Tiles of rows between one that is written and the one whose lines are asked for meanwhile.
const OWNED: usize = 3;

/// Asks for the lines of a later tile's rows, to be written: stores wait for few lines at a time.
#[inline]
fn own_early<T>(y: &Out<'_, T>, row: usize, n: usize) {
    let rows = y.shape().0;
    for row in (row + OWNED * EDGE..rows).take(EDGE) {
        // SAFETY: a hint.
        unsafe { _mm_prefetch::<_MM_HINT_ET0>(y.place(row, n).cast()) };
    }
}

/// Rows of bf16, rounded from the sums.
impl Sink for Out<'_, u16> {
    #[inline]
    unsafe fn take(&mut self, pair: usize, tile: usize, sums: [&Tile; 2]) {
        // SAFETY: the caller's.
        unsafe { round_rows(self, pair, tile, sums) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn round_rows(y: &mut Out<'_, u16>, pair: usize, tile: usize, sums: [&Tile; 2]) {
    let (rows, outputs) = y.shape();
    let (row, n) = (tile * EDGE, 2 * pair * EDGE);
    let mask = u32::MAX >> (2 * EDGE - (outputs - n).min(2 * EDGE));
    own_early(y, row, n);
    let (first, second) = (columns(sums[0]), columns(sums[1]));
    for r in 0..EDGE.min(rows - row) {
        // SAFETY: AVX-512 is there, by the caller's word; this row has as many columns from n as the mask.
        unsafe {
            let half =
                |v| _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(round(_mm512_castsi512_ps(v))));
            let first = _mm512_castsi256_si512(half(first[r]));
            let both = _mm512_inserti64x4::<1>(first, half(second[r]));
            _mm512_mask_storeu_epi16(y.at(row + r, n).cast(), mask, both);
        }
    }
}

/// A tile's columns.
#[target_feature(enable = "avx512f")]
fn columns(tile: &Tile) -> [__m512i; EDGE] {
    let mut rows = [_mm512_setzero_si512(); EDGE];
    for (row, sums) in rows.iter_mut().zip(tile) {
        // SAFETY: sixteen elements.
        *row = unsafe { _mm512_loadu_si512(sums.as_ptr().cast()) };
    }
    transposed(rows)
}

/// The gate's panel and the other's, into the activations of the product after them.
impl Sink for Inner<'_> {
    #[inline]
    unsafe fn take(&mut self, pair: usize, tile: usize, [gate, up]: [&Tile; 2]) {
        let mut values = [[0.0; EDGE]; EDGE];
        let y = values.as_flattened_mut();
        // SAFETY: the caller's.
        unsafe {
            Avx512::<false>::run(SiluMul { gate: gate.as_flattened(), up: up.as_flattened(), y });
            pack_outputs(&values, self.cells(tile, pair * EDGE));
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
