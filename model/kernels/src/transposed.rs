//! `y = x w`: each output a sum over the weight's rows, one fused multiply-add after another.
//!
//! This is how attention weighs cached rows, and how queries are absorbed into the key projection. Sums rest
//! in `y` between blocks of the weight's rows, so a block is read from memory once for all rows of `x`. Weights
//! widen exactly in both numerics classes: an FP8 element is its code times its scale, rounded once.

use crate::dot::{Bf16, F32, Fp8, Source};
use crate::lanes::{LANES, Simd, Task};
use crate::mat::{Acts, DType, Mat};
use std::ops::Range;

/// Rows of the weight taken at once.
const BLOCK: usize = 32;
/// Vectors of `y` held in registers.
const WIDE: usize = 4;

/// `y[r, l] (+)= sum over n of x[r, n] w[n, l]`, in ascending n.
pub(crate) struct Transposed<'a> {
    pub(crate) x: Acts<'a>,
    pub(crate) rows: usize,
    pub(crate) ldx: usize,
    pub(crate) w: Mat<'a>,
    pub(crate) accumulate: bool,
    pub(crate) y: &'a mut [f32],
    pub(crate) ldy: usize,
}

/// Panics unless `rows` rows of `n`, `ld` apart, fit `len` elements without overlap.
fn check(what: &str, rows: usize, n: usize, ld: usize, len: usize) {
    let need = match rows {
        0 => Some(0),
        _ => (rows - 1).checked_mul(ld).and_then(|e| e.checked_add(n)),
    };
    assert!(rows < 2 || n <= ld, "{what}: rows of {n} every {ld} overlap");
    assert!(need.is_some_and(|need| need <= len), "{what}: [{rows}, {n}] every {ld} in {len}");
}

impl<S: Simd> Task<S> for Transposed<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn call(mut self) {
        let (n, k) = (self.w.n(), self.w.k());
        check("x", self.rows, n, self.ldx, self.x.len());
        check("y", self.rows, k, self.ldy, self.y.len());
        if !self.accumulate {
            for r in 0..self.rows {
                self.y[r * self.ldy..][..k].fill(0.0);
            }
        }
        for start in (0..n).step_by(BLOCK) {
            let block = start..n.min(start + BLOCK);
            // SAFETY: the caller's, and the shapes were checked above.
            unsafe {
                match self.w.dtype() {
                    DType::F32 => self.block::<S, F32>(block),
                    DType::Bf16 => self.block::<S, Bf16>(block),
                    DType::Fp8 => self.block::<S, Fp8>(block),
                }
            }
        }
    }
}

impl Transposed<'_> {
    /// Rows `block` of the weight.
    #[inline(always)]
    unsafe fn block<S: Simd, W: Source>(&mut self, block: Range<usize>) {
        for (index, (from, to)) in self.w.segments().enumerate() {
            let mut l = from;
            while l < to {
                // SAFETY: the caller's; each group of lanes ends inside the stretch.
                l += unsafe {
                    match to - l {
                        left if left >= WIDE * LANES => {
                            self.lanes::<S, W, WIDE>(block.clone(), index, l, LANES);
                            WIDE * LANES
                        }
                        left if left >= LANES => {
                            self.lanes::<S, W, 1>(block.clone(), index, l, LANES);
                            LANES
                        }
                        left => {
                            self.lanes::<S, W, 1>(block.clone(), index, l, left);
                            left
                        }
                    }
                };
            }
        }
    }

    /// `N` vectors from column `l`, of which the last has `live` lanes.
    #[inline(always)]
    unsafe fn lanes<S: Simd, W: Source, const N: usize>(
        &mut self,
        block: Range<usize>,
        segment: usize,
        l: usize,
        live: usize,
    ) {
        let size = W::SIZE;
        let count = (N - 1) * LANES + live;
        // SAFETY: columns l..l + count are inside the weight's rows and y's; partial vectors go by a buffer.
        unsafe {
            for r in 0..self.rows {
                let mut acc = [S::zero(); N];
                let mut spare = [[0.0f32; LANES]; N];
                let at = self.y[r * self.ldy + l..][..count].as_mut_ptr();
                at.copy_to_nonoverlapping(spare.as_mut_ptr().cast(), count);
                for (acc, spare) in acc.iter_mut().zip(&spare) {
                    *acc = S::load(spare.as_ptr());
                }
                for n in block.clone() {
                    let x = match self.x {
                        Acts::F32(x) => x[r * self.ldx + n],
                        Acts::Bf16(x) => {
                            f32::from_bits(u32::from(x[r * self.ldx + n].to_bits()) << 16)
                        }
                    };
                    let x = S::splat(x);
                    let p = self.w.row_bytes(n).as_ptr().add(l * size);
                    let mut tail = [0u8; LANES * 4];
                    for (i, acc) in acc.iter_mut().enumerate() {
                        let mut p = p.add(i * LANES * size);
                        if live < LANES {
                            p.copy_to_nonoverlapping(tail.as_mut_ptr(), live * size);
                            p = tail.as_ptr();
                        }
                        let mut w = W::lanes::<S>(p);
                        if let Some(scales) = self.w.scales() {
                            w = S::mul(w, S::splat(f32::from_le_bytes(scales.row(n)[segment])));
                        }
                        *acc = S::fma(x, w, *acc);
                    }
                }
                for (acc, spare) in acc.iter().zip(&mut spare) {
                    S::store(spare.as_mut_ptr(), *acc);
                }
                at.copy_from_nonoverlapping(spare.as_ptr().cast(), count);
            }
        }
    }
}
