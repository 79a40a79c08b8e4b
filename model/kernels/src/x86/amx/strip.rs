//! bf16 and f32 for up to 32 rows: the weight is streamed, two panels of sixteen outputs at a time over all of k.
//!
//! Memory bounds this, so bf16 goes into tiles straight from where it is stored, each row's next lines asked for early;
//! f32, and edges, are decoded through a few tiles that stay in the first-level cache. What was decoded is
//! multiplied one turn later: a tile's load waits for the stores before it. FP8 is in `coded.rs`.

use super::Right;
use super::panel::{self, Operand, Part, Sums, collect, decode};
use super::tiles::{EDGE, ROW, TILE};
use crate::lanes::STEP;
use crate::mat::{DType, Mat};
use crate::packed::{Out, Packed, Segment};
use bytemuck::Zeroable;
use std::arch::x86_64::*;
use std::cell::RefCell;

/// Steps decoded at once.
const PIECE: usize = 8;
/// How far ahead of its use a row of the weight is asked for, in bytes.
const AHEAD: usize = 256;

/// Decoded tiles of two panels.
#[repr(C, align(64))]
struct Decoded([[u8; PIECE * TILE]; 2]);

/// Working memory of a product; of two, the other is the last turn's.
struct Memory {
    decoded: [Decoded; 2],
    sums: Sums,
}

thread_local! {
    /// Kept between products: to clear it takes longer than a small one.
    static MEMORY: RefCell<Option<Box<Memory>>> = const { RefCell::new(None) };
}

/// The product for `R` tiles of rows.
///
/// # Safety
/// Tiles are configured for `x`, which is packed for `w`, a weight without scales; `y` has their shape.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,gfni")]
pub(super) unsafe fn product<const R: usize>(x: &Packed, w: &Mat<'_>, y: &mut Out<'_>) {
    let mut memory = MEMORY.take().unwrap_or_else(|| {
        Box::new(Memory {
            decoded: [const { Decoded([[0; PIECE * TILE]; 2]) }; 2],
            sums: Sums::zeroed(),
        })
    });
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
    MEMORY.set(Some(memory));
}

struct Strips<'a> {
    right: Right<'a>,
    segments: &'a [Segment],
    w: &'a Mat<'a>,
}

impl Strips<'_> {
    /// `P` panels from output `n`; gives how many outputs those are.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,gfni")]
    unsafe fn compute<const P: usize, const R: usize>(
        &self,
        n: usize,
        memory: &mut Memory,
        y: &mut Out<'_>,
    ) -> usize {
        let w = self.w;
        // SAFETY: the caller's.
        unsafe {
            panel::zero::<P, R>();
            if w.dtype() == DType::Bf16 && w.n() - n >= P * EDGE {
                self.stored::<P, R>(n, memory);
            } else {
                self.decoded::<P, R>(n, memory);
            }
            panel::store::<P, R>(&mut memory.sums);
        }
        let sums = &memory.sums;
        let rows = y.shape().0;
        for p in 0..P {
            for r in 0..R {
                collect(&sums.0[p][r], y, r * EDGE, EDGE.min(rows - r * EDGE), n + p * EDGE);
            }
        }
        (P * EDGE).min(w.n() - n)
    }

    /// All of k, whole steps from where they are stored.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,gfni")]
    unsafe fn stored<const P: usize, const R: usize>(&self, n: usize, memory: &mut Memory) {
        for s in self.segments {
            let whole = Part { from: s.from, len: s.full * STEP, step: s.at / STEP };
            let tail = Part { from: s.from + whole.len, len: s.tail, step: whole.step + s.full };
            // SAFETY: the caller's; the parts lie in the segment.
            unsafe {
                self.stream::<P, R>(n, whole);
                if tail.len > 0 {
                    self.decode::<P>(n, tail, &mut memory.decoded[0]);
                    self.multiply::<P, R>(tail, &memory.decoded[0]);
                }
            }
        }
    }

    /// All of k through decoded tiles.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,gfni")]
    unsafe fn decoded<const P: usize, const R: usize>(&self, n: usize, memory: &mut Memory) {
        let pieces = self.segments.iter().flat_map(|s| {
            let (steps, len) = (s.steps(), s.full * STEP + s.tail);
            (0..steps).step_by(PIECE).map(move |done| Part {
                from: s.from + done * STEP,
                len: (len - done * STEP).min(PIECE * STEP),
                step: s.at / STEP + done,
            })
        });
        // Decoded and not yet multiplied.
        let mut last = None;
        for (turn, piece) in pieces.map(Some).chain([None]).enumerate() {
            // SAFETY: the caller's; the parts lie in their segments.
            unsafe {
                if let Some(part) = piece {
                    self.decode::<P>(n, part, &mut memory.decoded[turn % 2]);
                }
                if let Some(part) = last {
                    self.multiply::<P, R>(part, &memory.decoded[(turn + 1) % 2]);
                }
            }
            last = piece;
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
        let right = self.right.operand::<R>(part.step);
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

    /// Decodes a part of `P` panels.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,gfni")]
    unsafe fn decode<const P: usize>(&self, n: usize, part: Part, Decoded(out): &mut Decoded) {
        let next = self.next::<P>();
        let at = next(part.from * self.w.dtype().size());
        for (p, out) in out[..P].iter_mut().enumerate() {
            decode(self.w, n + p * EDGE, part, out, |byte| byte.wrapping_add(at));
        }
    }

    /// Adds a decoded part to the sums.
    #[target_feature(enable = "avx512f")]
    unsafe fn multiply<const P: usize, const R: usize>(&self, part: Part, Decoded(w): &Decoded) {
        let left = Operand { first: [w[0].as_ptr(), w[1].as_ptr()], stride: ROW, step: TILE };
        // SAFETY: the caller's: the part's steps of `P` panels and `R` tiles are there.
        unsafe {
            panel::run::<P, R>(left, self.right.operand::<R>(part.step), part.steps(), |_| ())
        };
    }

    /// From byte `at` of a row to what is due [`AHEAD`] bytes later: further on, or in the next strip's row.
    fn next<const P: usize>(&self) -> impl Fn(usize) -> usize + use<P> {
        let row_bytes = self.w.k() * self.w.dtype().size();
        let wrap = (P * EDGE * self.w.stride()).wrapping_sub(row_bytes);
        move |at| if at + AHEAD < row_bytes { AHEAD } else { AHEAD.wrapping_add(wrap) }
    }
}
