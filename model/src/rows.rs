//! Rows as they travel to experts and back when they are not sent as they are: FP8 with a scale
//! per block, bf16 results of an f32 class, and a token's results summed where they were computed.
//! Each is a function of its row alone, so that it does not matter who else is in a frame.

use half::bf16;
use kernels::{Kernels, f32_to_fp8, fp8_to_f32, round_bf16};

use crate::activations::{WireScratch, from_wire, to_wire};
use crate::numerics::Numerics;
use crate::parallel::grown;

/// Values that share a scale.
pub const FP8_BLOCK: usize = 128;
/// The largest value of a code.
const LARGEST: f32 = 448.0;

/// Bytes of an FP8 row of `hidden` values: codes, then scales.
pub fn fp8_row_bytes(hidden: usize) -> usize {
    hidden + hidden.div_ceil(FP8_BLOCK) * 4
}

/// Appends wire rows of the class, `hidden` values each, as FP8 rows: a block's scale takes its
/// largest magnitude to the largest code. What is not finite stays so.
pub fn encode_fp8(numerics: Numerics, rows: &[u8], hidden: usize, out: &mut Vec<u8>) {
    out.reserve(rows.len() / numerics.bytes() / hidden.max(1) * fp8_row_bytes(hidden));
    for row in rows.chunks_exact(hidden * numerics.bytes()) {
        let scales = row.chunks(FP8_BLOCK * numerics.bytes()).map(|block| {
            let largest = values(numerics, block).fold(0.0f32, |most, x| match x.is_nan() {
                true => x,
                false => most.max(x.abs()),
            });
            // Never so small that a quotient by it overflows.
            (largest / LARGEST).max(f32::MIN_POSITIVE)
        });
        for (block, scale) in row.chunks(FP8_BLOCK * numerics.bytes()).zip(scales.clone()) {
            out.extend(values(numerics, block).map(|x| f32_to_fp8(x / scale)));
        }
        scales.for_each(|scale| out.extend(scale.to_le_bytes()));
    }
}

/// Whether all values of an FP8 row are finite, which has [`fp8_row_bytes`] bytes.
pub fn finite_fp8(row: &[u8], hidden: usize) -> bool {
    let (codes, scales) = row.split_at(hidden);
    // Without a branch inside, so that they vectorize.
    let codes = codes.iter().fold(0, |bad, code| bad | u8::from(code & 0x7f == 0x7f));
    let scales = scales.as_chunks::<4>().0.iter().map(|&scale| f32::from_le_bytes(scale));
    codes == 0 && scales.fold(true, |fine, scale| fine & scale.is_finite())
}

/// Appends an FP8 row as a wire row of the class. `row` has [`fp8_row_bytes`] bytes.
pub fn decode_fp8(numerics: Numerics, row: &[u8], hidden: usize, out: &mut Vec<u8>) {
    let (codes, scales) = row.split_at(hidden);
    let scales = scales.as_chunks::<4>().0.iter().map(|&scale| f32::from_le_bytes(scale));
    for (codes, scale) in codes.chunks(FP8_BLOCK).zip(scales) {
        let values = codes.iter().map(|&code| fp8_to_f32(code) * scale);
        match numerics {
            Numerics::F32 => out.extend(values.flat_map(f32::to_le_bytes)),
            Numerics::Bf16 => out.extend(values.flat_map(|x| round_bf16(x).to_le_bytes())),
        }
    }
}

/// Passes wire rows of the class through FP8, as if they had travelled.
pub fn through_fp8(numerics: Numerics, rows: &[u8], hidden: usize, out: &mut Vec<u8>) {
    let mut coded = Vec::new();
    encode_fp8(numerics, rows, hidden, &mut coded);
    out.clear();
    for row in coded.chunks_exact(fp8_row_bytes(hidden)) {
        decode_fp8(numerics, row, hidden, out);
    }
}

/// Appends a wire row of class `from` as one of class `to`.
pub fn convert(from: Numerics, to: Numerics, row: &[u8], out: &mut Vec<u8>) {
    match (from, to) {
        (Numerics::F32, Numerics::Bf16) => {
            out.extend(values(from, row).flat_map(|x| round_bf16(x).to_le_bytes()));
        }
        (Numerics::Bf16, Numerics::F32) => {
            out.extend(values(from, row).flat_map(f32::to_le_bytes));
        }
        _ => out.extend_from_slice(row),
    }
}

fn values(numerics: Numerics, row: &[u8]) -> impl Iterator<Item = f32> {
    // Whichever of the two is not the class is empty.
    let (halves, whole) = match numerics {
        Numerics::Bf16 => (row, &[][..]),
        Numerics::F32 => (&[][..], row),
    };
    let halves = halves.as_chunks::<2>().0.iter().map(|&x| bf16::from_le_bytes(x).to_f32());
    halves.chain(whole.as_chunks::<4>().0.iter().map(|&x| f32::from_le_bytes(x)))
}

/// Sums a token's results where they were computed; its memory is used again.
#[derive(Default)]
pub struct NodeSum {
    sum: Vec<f32>,
    wire: WireScratch,
    rounding: Vec<bf16>,
}

impl NodeSum {
    /// The weighted sum of wire rows of the class, in their order, in f32 by fused multiply-add as
    /// the router sums them, rounded to the class once: written to `out`, one row long.
    pub fn row<'a>(
        &mut self,
        kernels: Kernels,
        numerics: Numerics,
        weighted: impl Iterator<Item = (&'a [u8], f32)>,
        out: &mut [u8],
    ) {
        let sum = grown(&mut self.sum, out.len() / numerics.bytes());
        sum.fill(0.0);
        for (row, weight) in weighted {
            kernels.axpy(weight, from_wire(numerics, row, &mut self.wire), sum);
        }
        to_wire(kernels, numerics, sum, &mut self.rounding, out);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn wire(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|x| x.to_le_bytes()).collect()
    }

    fn back(row: &[u8]) -> Vec<f32> {
        values(Numerics::F32, row).collect()
    }

    #[test]
    fn what_is_not_finite_in_fp8_is_seen() {
        let hidden = 130;
        let row = vec![1.0f32; hidden];
        let sound = |at: usize, value: f32| {
            let (mut row, mut coded) = (row.clone(), Vec::new());
            row[at] = value;
            encode_fp8(Numerics::F32, &wire(&row), hidden, &mut coded);
            finite_fp8(&coded, hidden)
        };
        for at in [0, 127, 128, 129] {
            assert!(sound(at, -3e38) && sound(at, 0.0), "{at}");
            assert!(!sound(at, f32::NAN) && !sound(at, f32::NEG_INFINITY), "{at}");
        }
    }

    proptest! {
        /// A value is off by at most half a step of its code: a sixteenth of itself, or 2^-10 of
        /// the scale below the least normal code. Neighbouring rows do not matter.
        #[test]
        fn the_error_of_fp8_is_bounded_and_rows_are_alone(
            rows in (1usize..300).prop_flat_map(|hidden| {
                prop::collection::vec(prop::collection::vec(-1e4f32..1e4, hidden), 1..4)
            }),
            exponent in -20i32..20,
        ) {
            let hidden = rows[0].len();
            let factor = 2f32.powi(exponent);
            let rows: Vec<Vec<f32>> =
                rows.iter().map(|row| row.iter().map(|x| x * factor).collect()).collect();
            let mut coded = Vec::new();
            encode_fp8(Numerics::F32, &wire(&rows.concat()), hidden, &mut coded);
            prop_assert_eq!(coded.len(), rows.len() * fp8_row_bytes(hidden));
            for (row, coded) in rows.iter().zip(coded.chunks_exact(fp8_row_bytes(hidden))) {
                let mut alone = Vec::new();
                encode_fp8(Numerics::F32, &wire(row), hidden, &mut alone);
                prop_assert_eq!(&alone[..], coded);
                let mut decoded = Vec::new();
                decode_fp8(Numerics::F32, coded, hidden, &mut decoded);
                let decoded = back(&decoded);
                prop_assert_eq!(decoded.len(), hidden);
                for (want, got) in row.chunks(FP8_BLOCK).zip(decoded.chunks(FP8_BLOCK)) {
                    let largest = want.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                    let scale = largest / LARGEST;
                    for (want, got) in want.iter().zip(got) {
                        let allowed = (want.abs() / 16.0).max(scale / 1024.0) * 1.001;
                        prop_assert!((want - got).abs() <= allowed, "{want} became {got}");
                    }
                }
            }
        }

        /// What was decoded once is coded as it was: a resend or a second hop changes nothing.
        #[test]
        fn bf16_rows_have_their_length_and_zero_stays_zero(hidden in 1usize..400) {
            let mut coded = Vec::new();
            encode_fp8(Numerics::Bf16, &vec![0; hidden * 2], hidden, &mut coded);
            let mut decoded = Vec::new();
            decode_fp8(Numerics::Bf16, &coded, hidden, &mut decoded);
            prop_assert_eq!(decoded, vec![0; hidden * 2]);
        }

        /// Any bytes of the right length decode to a row, without a panic.
        #[test]
        fn noise_decodes_to_a_row(row in prop::collection::vec(any::<u8>(), 132)) {
            let mut decoded = Vec::new();
            decode_fp8(Numerics::Bf16, &row, 128, &mut decoded);
            prop_assert_eq!(decoded.len(), 256);
        }
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut through = Vec::new();
            through_fp8(Numerics::F32, &wire(&[1.0, bad, 2.0]), 3, &mut through);
            assert!(back(&through).iter().any(|x| !x.is_finite()), "{bad}");
        }
    }

    #[test]
    fn the_error_of_normal_values_is_what_is_documented() {
        // Sums of uniforms are near enough to a normal distribution.
        let mut state = 1u64;
        let mut uniform = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 24) as f32
        };
        let row: Vec<f32> =
            (0..1 << 16).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect();
        let mut through = Vec::new();
        through_fp8(Numerics::F32, &wire(&row), row.len(), &mut through);
        let square = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>();
        let error = square(&mut row.iter().zip(back(&through)).map(|(x, y)| x - y));
        let relative = (error / square(&mut row.iter().copied())).sqrt();
        assert!((0.024..0.029).contains(&relative), "{relative}");
    }

    #[test]
    fn a_sum_at_the_node_is_the_routers_sum() {
        let kernels = kernels::Compute::new(kernels::Isa::Scalar, 1).kernels;
        let rows = [wire(&[1.0, -2.0]), wire(&[0.5, 4.0])];
        let mut out = vec![0; 8];
        let weighted = rows.iter().map(Vec::as_slice).zip([2.0, 0.25]);
        NodeSum::default().row(kernels, Numerics::F32, weighted, &mut out);
        assert_eq!(back(&out), [2.125, -3.0]);
        let mut narrow = Vec::new();
        convert(Numerics::F32, Numerics::Bf16, &out, &mut narrow);
        let mut wide = Vec::new();
        convert(Numerics::Bf16, Numerics::F32, &narrow, &mut wide);
        assert_eq!(back(&wide), [2.125, -3.0]);
    }
}
