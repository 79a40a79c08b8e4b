//! Up to 32 rows: the weight is streamed, two panels of sixteen outputs at a time over all of k.
//!
//! Memory bounds this, so bf16 goes into tiles straight from where it is stored, each row's next lines asked for early;
//! other weights, and edges, are decoded through a few tiles that stay in the first-level cache.

use super::Right;
use super::panel::{self, Operand, Part, Scales, Sums, collect, decode};
use super::tiles::{EDGE, ROW, TILE};
use crate::lanes::STEP;
use crate::mat::{DType, Mat};
use crate::packed::{Out, Packed, Segment};
use bytemuck::Zeroable;
use std::arch::x86_64::*;

/// Steps decoded at once.
const PIECE: usize = 8;
/// How far ahead of its use a row of the weight is asked for, in bytes.
const AHEAD: usize = 1024;

/// Decoded tiles of two panels.
#[repr(C, align(64))]
struct Decoded([[u8; PIECE * TILE]; 2]);

/// Working memory of a product.
struct Memory {
    decoded: Decoded,
    /// A k-block's sums.
    block: Sums,
    sums: Sums,
}

/// The product for `R` tiles of rows.
///
/// # Safety
/// Tiles are configured for `x`, which is packed for `w`; `y` has their shape.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
pub(super) unsafe fn product<const R: usize>(x: &Packed, w: &Mat<'_>, y: &mut Out<'_>) {
    let mut memory = Memory {
        decoded: Decoded([[0; PIECE * TILE]; 2]),
        block: Sums::zeroed(),
        sums: Sums::zeroed(),
    };
    let strips = Strips { right: Right::of(x), segments: x.segments(), w };
    let mut n = 0;
    while n < w.n() {
        // SAFETY: the caller's.
        n += unsafe {
            match w.n() - n {
                ..=EDGE => strips.compute::<1, R>(n, &mut memory, y),
                _ => strips.compute::<2, R>(n, &mut memory, y),
            }
        };
    }
}

struct Strips<'a> {
    right: Right<'a>,
    segments: &'a [Segment],
    w: &'a Mat<'a>,
}

impl Strips<'_> {
    /// `P` panels from output `n`; gives how many outputs those are.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
    unsafe fn compute<const P: usize, const R: usize>(
        &self,
        n: usize,
        Memory { decoded, block, sums }: &mut Memory,
        y: &mut Out<'_>,
    ) -> usize {
        let w = self.w;
        let scaled = w.scales().is_some();
        let scales: [Scales<'_>; 2 * EDGE] = std::array::from_fn(|i| panel::scales(w, n + i));
        let stored = w.dtype() == DType::Bf16 && w.n() - n >= P * EDGE;
        *sums = Sums::zeroed();
        // SAFETY: tiles are configured, by the caller's word.
        unsafe { panel::zero::<P, R>() };
        for (index, s) in self.segments.iter().enumerate() {
            let mut done = 0;
            while done < s.steps() {
                let direct = stored && done < s.full;
                let steps = if direct { s.full } else { PIECE.min(s.steps() - done) };
                let from = s.from + done * STEP;
                let len = (s.full * STEP + s.tail - done * STEP).min(steps * STEP);
                let part = Part { from, len, step: s.at / STEP + done };
                // SAFETY: the caller's; the part lies in the segment.
                unsafe {
                    if direct {
                        self.stream::<P, R>(n, part);
                    } else {
                        self.decode::<P, R>(n, part, decoded);
                    }
                }
                done += steps;
            }
            if scaled {
                // SAFETY: the caller's.
                unsafe { panel::fold::<P, R>(&scales, index, block, sums) };
            }
        }
        if !scaled {
            // SAFETY: the caller's.
            unsafe { panel::store::<P, R>(sums) };
        }
        let rows = y.shape().0;
        for p in 0..P {
            for r in 0..R {
                collect(&sums.0[p][r], y, r * EDGE, EDGE.min(rows - r * EDGE), n + p * EDGE);
            }
        }
        (P * EDGE).min(w.n() - n)
    }

    fn right<const R: usize>(&self, step: usize) -> Operand {
        let second = if R > 1 { self.right.at(1, step) } else { std::ptr::null() };
        Operand {
            first: [self.right.at(0, step), second],
            stride: self.right.stride(),
            step: self.right.tile_bytes(),
        }
    }

    /// Whole steps of whole panels, from where they are stored.
    #[target_feature(enable = "avx512f")]
    unsafe fn stream<const P: usize, const R: usize>(&self, n: usize, part: Part) {
        let w = self.w;
        let stride = w.stride();
        let first = w.row_bytes(n).as_ptr();
        let panel = |p: usize| first.wrapping_add(p * EDGE * stride + part.from * 2);
        let left = Operand { first: [panel(0), panel(1)], stride, step: ROW };
        let next = self.next::<P>();
        let right = self.right::<R>(part.step);
        // SAFETY: the caller's: the part's steps of `P` panels and `R` tiles are there. A prefetch is a hint, to any
        // address.
        unsafe {
            panel::run::<P, R>(left, right, part.steps(), |step| {
                let at = part.from * 2 + step * ROW;
                let line = first.wrapping_add(at).wrapping_add(next(at));
                for row in 0..P * EDGE {
                    _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(row * stride).cast());
                }
            });
        }
    }

    /// The same through decoded tiles.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
    unsafe fn decode<const P: usize, const R: usize>(
        &self,
        n: usize,
        part: Part,
        Decoded(out): &mut Decoded,
    ) {
        let next = self.next::<P>();
        let at = next(part.from * self.w.dtype().size());
        for (p, out) in out[..P].iter_mut().enumerate() {
            decode(self.w, n + p * EDGE, part, out, |byte| byte.wrapping_add(at));
        }
        let left = Operand { first: [out[0].as_ptr(), out[1].as_ptr()], stride: ROW, step: TILE };
        // SAFETY: as above.
        unsafe { panel::run::<P, R>(left, self.right::<R>(part.step), part.steps(), |_| ()) };
    }

    /// From byte `at` of a row to what is due [`AHEAD`] bytes later: further on, or in the next strip's row.
    fn next<const P: usize>(&self) -> impl Fn(usize) -> usize + use<P> {
        let row_bytes = self.w.k() * self.w.dtype().size();
        let wrap = (P * EDGE * self.w.stride()).wrapping_sub(row_bytes);
        move |at| if at + AHEAD < row_bytes { AHEAD } else { AHEAD.wrapping_add(wrap) }
    }
}
