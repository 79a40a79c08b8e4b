//! The bf16 class of AMX tiles, as plain code: what TDPBF16PS computes, element by element.
//!
//! A tile's operation takes 32 elements of k. One sum takes the even ones, another the odd ones, both from zero and in
//! ascending order; they are added to each other, and that to the accumulator. Every step rounds to nearest even, with
//! subnormal operands and results as zeros of their sign (Intel SDM vol. 2, TDPBF16PS). This file is the definition that
//! the instruction is held against; nothing here is fast.

use crate::device::Multiply;
use crate::lanes::{STEP, flush, fma_flush};
use crate::mat::{Acts, DType, Mat, fp8_to_f32, round_bf16};
use crate::packed::{Out, Packed};
use crate::pool::Pool;
use crate::transposed::Stack;
use half::bf16;

/// `acc` plus the products of 32 elements, as a tile adds them.
pub(crate) fn step(acc: f32, w: &[f32; STEP], x: &[f32; STEP]) -> f32 {
    let (mut even, mut odd) = (0.0, 0.0);
    for (w, x) in w.as_chunks::<2>().0.iter().zip(x.as_chunks::<2>().0) {
        even = fma_flush(w[0], x[0], even);
        odd = fma_flush(w[1], x[1], odd);
    }
    add_flush(acc, add_flush(even, odd))
}

/// `a + b` with subnormals flushed. A tiny sum is exact, so that rounding cannot lift it.
fn add_flush(a: f32, b: f32) -> f32 {
    flush(flush(a) + flush(b))
}

/// The class by [`step`] alone.
pub(crate) struct Defined;

impl Multiply for Defined {
    fn pack(x: Acts<'_>, rows: usize, w: &Mat<'_>, into: &mut Packed, _pool: Option<&Pool>) {
        into.lay::<Defined>(x.len(), rows, w);
        let (out, _) = into.cells_mut::<bf16>(x.len());
        match x {
            Acts::Bf16(x) => out.copy_from_slice(x),
            Acts::F32(x) => out.iter_mut().zip(x).for_each(|(o, x)| *o = round_bf16(*x)),
        }
    }

    unsafe fn product(x: &Packed, w: &Mat<'_>, y: &mut Out<'_>) {
        assert!(x.fits::<Defined>(w), "activations packed for another weight layout");
        assert_eq!(y.shape(), (x.rows(), w.n()), "the output of a product [rows, n]");
        let (rows, k) = (x.rows(), w.k());
        let mut weights = vec![0.0; k];
        for n in 0..w.n() {
            unscaled(w, n, &mut weights);
            for (r, x) in x.cells::<bf16>(rows * k).chunks(k.max(1)).enumerate() {
                // SAFETY: inside the output, which is borrowed here alone.
                unsafe { *y.at(r, n) = output(w, n, &weights, x) };
            }
            if k == 0 {
                // SAFETY: as above.
                (0..rows).for_each(|r| unsafe { *y.at(r, n) = 0.0 });
            }
        }
    }

    unsafe fn transposed(
        x: &[bf16],
        rows: usize,
        ldx: usize,
        w: Stack<'_>,
        y: &mut [f32],
        ldy: usize,
    ) -> bool {
        if !w.is_bf16() {
            return false;
        }
        let weights: Vec<_> = w.rows().flat_map(|row| row.as_chunks::<2>().0).collect();
        for r in 0..rows {
            let seen = w.seen(r);
            for l in 0..w.k() {
                let mut acc = 0.0;
                for at in (0..seen).step_by(STEP) {
                    let (mut a, mut b) = ([0.0; STEP], [0.0; STEP]);
                    for (i, n) in (at..seen.min(at + STEP)).enumerate() {
                        a[i] = bf16::from_le_bytes(*weights[n * w.k() + l]).to_f32();
                        b[i] = x[r * ldx + n].to_f32();
                    }
                    acc = step(acc, &a, &b);
                }
                y[r * ldy + l] = acc;
            }
        }
        true
    }
}

/// Row `n` of `w` as products see it: rounded to bf16, FP8 without scales.
fn unscaled(w: &Mat<'_>, n: usize, out: &mut [f32]) {
    match w.dtype() {
        DType::Fp8 => {
            out.iter_mut().zip(w.row_bytes(n)).for_each(|(o, code)| *o = fp8_to_f32(*code));
        }
        DType::F32 | DType::Bf16 => {
            w.row_to_f32(n, out);
            out.iter_mut().for_each(|w| *w = round_bf16(*w).to_f32());
        }
    }
}

fn output(w: &Mat<'_>, n: usize, weights: &[f32], x: &[bf16]) -> f32 {
    let mut sum = 0.0f32;
    for (index, (from, to)) in w.segments().enumerate() {
        let mut acc = 0.0;
        for at in (from..to).step_by(STEP) {
            let (mut a, mut b) = ([0.0; STEP], [0.0; STEP]);
            for (i, k) in (at..to.min(at + STEP)).enumerate() {
                (a[i], b[i]) = (weights[k], x[k].to_f32());
            }
            acc = step(acc, &a, &b);
        }
        sum = match w.scales() {
            Some(scales) => acc.mul_add(f32::from_le_bytes(scales.row(n)[index]), sum),
            None => acc,
        };
    }
    sum
}
