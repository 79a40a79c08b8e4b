//! Sums over an FP8 weight's rows for a single row of activations, in the order that `transposed.rs` defines: one fused
//! multiply-add after another, of a code times its scale.
//!
//! Absorbed queries of one token are this. Codes are decoded as for tiles, 64 at a time, the even columns and the odd
//! ones; rows lie one after another, so that those that come next are asked for whole.

use super::panel::Codes;
use crate::mat::{DType, Mat};
use crate::transposed::Stack;
use crate::x86::avx512::{high, low};
use half::bf16;
use std::arch::x86_64::*;

/// Columns that are decoded at once, of which one scale is for all.
const LINE: usize = 64;
/// Lines whose sums are in registers, and their columns.
const LINES: usize = 4;
const STRIP: usize = LINES * LINE;
/// Rows between one that is multiplied and the one that is asked for meanwhile.
const AHEAD: usize = 12;

/// Sums of a line: even and odd columns of its first half, then of its second.
type Sums = [__m512; 4];

/// Computes `y = x w`, shapes checked, or says that the weight is not one that this is for.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,gfni")]
pub(super) fn compute(x: &[bf16], w: Stack<'_>, y: &mut [f32]) -> bool {
    let fits = |m: &Mat<'_>| {
        m.dtype() == DType::Fp8 && m.segments().all(|(from, _)| from.is_multiple_of(LINE))
    };
    if !w.k().is_multiple_of(STRIP) || !w.mats().iter().all(fits) {
        return false;
    }
    for (i, y) in y[..w.k()].as_chunks_mut::<STRIP>().0.iter_mut().enumerate() {
        let mut sums = [[_mm512_setzero_ps(); 4]; LINES];
        w.each(1, |_, at, w| add(&x[at..][..w.n()], &w, i * STRIP, &mut sums));
        put(&sums, y);
    }
    true
}

/// Adds the columns from `column` on to `sums`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,gfni")]
fn add(x: &[bf16], w: &Mat<'_>, column: usize, sums: &mut [Sums; LINES]) {
    let codes = Codes::new();
    let table = w.scales().expect("an FP8 weight");
    let segment =
        |line: usize| w.segments().take_while(|(_, to)| *to <= column + line * LINE).count();
    let segments: [usize; LINES] = std::array::from_fn(segment);
    let mut total = *sums;
    let (mut block, mut scales) = (std::ptr::null(), [_mm512_setzero_ps(); LINES]);
    for (n, x) in x.iter().enumerate() {
        let row = table.row(n);
        if row.as_ptr() != block {
            block = row.as_ptr();
            scales = segments.map(|segment| _mm512_set1_ps(f32::from_le_bytes(row[segment])));
        }
        let x = _mm512_set1_ps(x.to_f32());
        let lines = w.row_bytes(n)[column..column + STRIP].as_chunks::<LINE>().0;
        for ((line, scale), total) in lines.iter().zip(&scales).zip(&mut total) {
            let line = line.as_ptr();
            // SAFETY: a line of this row; any address may be asked for.
            let pairs = unsafe {
                if column == 0 {
                    let next = line.wrapping_add(AHEAD * w.stride());
                    _mm_prefetch::<_MM_HINT_T0>(next.cast());
                    _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(STRIP).cast());
                } else {
                    _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(STRIP).cast());
                }
                codes.pairs(_mm512_loadu_si512(line.cast()))
            };
            for (pair, total) in pairs.into_iter().zip(total.as_chunks_mut::<2>().0) {
                // SAFETY: AVX-512 is there.
                let parts = unsafe { [low(pair), high(pair)] };
                for (part, sum) in parts.into_iter().zip(total) {
                    *sum = _mm512_fmadd_ps(x, _mm512_mul_ps(part, *scale), *sum);
                }
            }
        }
    }
    *sums = total;
}

/// Puts sums into `y`, column by column.
#[target_feature(enable = "avx512f")]
fn put(sums: &[Sums; LINES], y: &mut [f32; STRIP]) {
    let first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    let last = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    let halves = sums.as_flattened().as_chunks::<2>().0;
    for ([even, odd], y) in halves.iter().zip(y.as_chunks_mut::<{ LINE / 2 }>().0) {
        // SAFETY: half a line each.
        unsafe {
            _mm512_storeu_ps(y.as_mut_ptr(), _mm512_permutex2var_ps(*even, first, *odd));
            let second = y[LINE / 4..].as_mut_ptr();
            _mm512_storeu_ps(second, _mm512_permutex2var_ps(*even, last, *odd));
        }
    }
}
