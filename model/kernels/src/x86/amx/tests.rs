//! That the trials tell other orders apart, that they pass on this CPU, and that codes widen as they should.

use super::trials::{self, Rows, Sums, defined};
use super::{available, panel};
use crate::fp8_to_f32;
use crate::lanes::STEP;

/// Adds up an element's products in some way.
type Sum<'a> = &'a dyn Fn(f32, &[(f32, f32); STEP]) -> f32;

/// Sums in another order, without flushing, or rounded elsewhere, are told apart.
#[test]
fn trials_tell() {
    assert!(trials::pass(2, defined));
    let wide = |bits: u16| f32::from_bits(u32::from(bits) << 16);
    let other = |sum: Sum<'_>| {
        trials::pass(16, |acc: &Sums, w: &Rows, x: &Rows| {
            std::array::from_fn(|n| {
                std::array::from_fn(|r| {
                    let pairs = std::array::from_fn(|k| (wide(w[n][k]), wide(x[r][k])));
                    sum(acc[n][r], &pairs)
                })
            })
        })
    };
    // Without flushing.
    assert!(!other(&|acc, pairs| {
        let mut sums = [0.0f32; 2];
        for (k, (w, x)) in pairs.iter().enumerate() {
            sums[k % 2] = w.mul_add(*x, sums[k % 2]);
        }
        acc + (sums[0] + sums[1])
    }));
    // One element after another.
    assert!(!other(&|acc, pairs| {
        acc + pairs.iter().fold(0.0, |sum, (w, x)| crate::lanes::fma_flush(*w, *x, sum))
    }));
    // Into the accumulator, not from zero.
    assert!(!other(&|acc, pairs| {
        pairs.iter().fold(acc, |sum, (w, x)| crate::lanes::fma_flush(*w, *x, sum))
    }));
    // Rounded once.
    assert!(!other(&|acc, pairs| {
        let sum: f64 = pairs.iter().map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
        (f64::from(acc) + sum) as f32
    }));
}

#[test]
fn the_instruction_is_as_defined() {
    if !available() {
        eprintln!("left out: this cpu has no amx, or not to this process");
        return;
    }
    // SAFETY: available.
    assert!(trials::pass(200, |acc, w, x| unsafe { trials::once(acc, w, x) }));
}

#[test]
fn codes_widen_exactly() {
    for code in 0..0x7f {
        let bits = u32::from(panel::widened(code)) << 16;
        assert_eq!(f32::from_bits(bits), fp8_to_f32(code as u8), "{code:#x}");
    }
    assert!(f32::from_bits(u32::from(panel::widened(0x7f)) << 16).is_nan());
}
