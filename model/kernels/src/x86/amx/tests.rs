//! That the trials tell other orders apart, that they pass on this CPU, and that codes widen as they should.

use super::trials::{self, Rows, Sums, defined};
use super::{available, panel};
use crate::fp8_to_f32;
use crate::lanes::STEP;
use std::arch::x86_64::*;

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

/// Whatever code is among normal numbers, and wherever: all of a line decodes as the table says.
#[test]
fn lines_of_codes_decode_exactly() {
    if !available() {
        eprintln!("left out: this cpu has no amx, or not to this process");
        return;
    }
    for code in 0..=u8::MAX {
        for place in 0..2 * STEP {
            let mut line: [u8; 2 * STEP] = std::array::from_fn(|i| 0x40 + i as u8 / 2);
            line[place] = code;
            let want = line.map(|c| panel::widened(u16::from(c & 0x7f)) | u16::from(c & 0x80) << 8);
            let mut got = [0u16; 2 * STEP];
            // SAFETY: a CPU with tiles has these; a line is 64 bytes, what it stands for twice that.
            unsafe {
                let [a, b] = decoded(&line);
                _mm512_storeu_si512(got.as_mut_ptr().cast(), a);
                _mm512_storeu_si512(got[STEP..].as_mut_ptr().cast(), b);
            }
            assert_eq!(got, want, "{code:#x} at {place}");
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,gfni")]
unsafe fn decoded(line: &[u8; 2 * STEP]) -> [__m512i; 2] {
    // SAFETY: 64 bytes.
    panel::Codes::new().pairs(unsafe { _mm512_loadu_si512(line.as_ptr().cast()) })
}
