//! What the kernels promise, held against a plain reading of the definitions in `lib.rs`.

mod gated;
mod pool;
mod product;
mod rowwise;
mod single;

use crate::{Acts, Isa, Kernels, Mat, f32_to_fp8, fp8_to_f32};
use half::bf16;

/// A repeatable stream of numbers.
#[derive(Clone)]
pub(crate) struct Random(pub(crate) u64);

/// What numbers to draw.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    /// About one in magnitude, either sign.
    Plain,
    /// Any magnitude, subnormals and zeros among them.
    Wide,
    /// So small that products and sums lie about the smallest normal number.
    Tiny,
}

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub(crate) fn f32(&mut self, kind: Kind) -> f32 {
        let bits = self.next() as u32;
        let exponent = match kind {
            Kind::Plain => 118 + self.below(10) as u32,
            Kind::Wide => self.below(140) as u32,
            Kind::Tiny => 52 + self.below(20) as u32,
        };
        let mantissa = if self.below(4) == 0 { 0 } else { bits & 0x7f_ffff };
        f32::from_bits((bits & 0x8000_0000) | (exponent << 23) | mantissa)
    }

    pub(crate) fn f32s(&mut self, n: usize, kind: Kind) -> Vec<f32> {
        (0..n).map(|_| self.f32(kind)).collect()
    }

    pub(crate) fn bf16s(&mut self, n: usize, kind: Kind) -> Vec<bf16> {
        (0..n).map(|_| crate::round_bf16(self.f32(kind))).collect()
    }
}

/// The devices of this CPU other than the reference.
pub(crate) fn others() -> Vec<Kernels> {
    let mut all: Vec<_> = Isa::available().into_iter().map(Kernels::new).collect();
    all.retain(|k| k.isa() != Isa::Scalar);
    all
}

pub(crate) fn scalar() -> Kernels {
    Kernels::new(Isa::Scalar)
}

/// Bits, with one NaN for all.
pub(crate) fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| if x.is_nan() { u32::MAX } else { x.to_bits() }).collect()
}

/// `device.matmul` into rows of `ldy`, checked to leave the gaps alone; the rows without them.
pub(crate) fn matmul(k: &Kernels, x: Acts<'_>, rows: usize, w: Mat<'_>, ldy: usize) -> Vec<f32> {
    let n = w.n();
    let mut y = vec![7.5; rows * ldy];
    k.matmul(x, rows, w, &mut y, ldy);
    let mut out = Vec::new();
    for row in y.chunks(ldy.max(1)) {
        assert!(row[n..].iter().all(|y| *y == 7.5), "{} wrote between rows", k.isa());
        out.extend_from_slice(&row[..n]);
    }
    out
}

/// Every code, halves between neighbours, and what lies about them.
#[test]
fn codes_are_the_nearest_with_ties_to_even() {
    for code in 0..=0x7e_u8 {
        let value = fp8_to_f32(code);
        assert_eq!(f32_to_fp8(value), code);
        assert_eq!(f32_to_fp8(-value), code | 0x80);
        if code == 0x7e {
            break;
        }
        let middle = (value + fp8_to_f32(code + 1)) / 2.0;
        assert_eq!(f32_to_fp8(middle), code + (code & 1), "{middle}");
        assert_eq!(f32_to_fp8(middle.next_down()), code);
        assert_eq!(f32_to_fp8(middle.next_up()), code + 1);
    }
    assert_eq!((f32_to_fp8(1e9), f32_to_fp8(f32::NEG_INFINITY)), (0x7e, 0xfe));
    assert_eq!(f32_to_fp8(f32::NAN) & 0x7f, 0x7f);
}
