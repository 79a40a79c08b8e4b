//! An instruction set is chosen only after it has reproduced the plain kernels' bits on this very CPU. The crate's
//! promise (`lib.rs`) is that all of them agree, and not every CPU can be had when the kernels are written; one that
//! rounds differently costs speed here, not the answer. Takes well under a millisecond, once per process.

use half::bf16;

use crate::device::Kernels;
use crate::isa::Isa;
use crate::mat::{Acts, Mat};
use crate::transposed::Stack;

/// Rows and columns that reach the one-row paths, the blocks and their remainders.
const ROWS: [usize; 4] = [1, 3, 8, 13];
const N: usize = 37;
const K: usize = 299;
const FP8_BLOCK: (usize, usize) = (16, 128);

/// Whether `isa`, which the CPU must have, gives the bits of its class's plain kernels.
pub(crate) fn agrees(isa: Isa) -> bool {
    let inputs = Inputs::new();
    inputs.outputs(Kernels::new(isa)) == inputs.outputs(Kernels::reference(isa))
}

struct Inputs {
    x: Vec<f32>,
    x16: Vec<bf16>,
    w: Vec<f32>,
    w16: Vec<bf16>,
    codes: Vec<u8>,
    scales: Vec<u8>,
}

impl Inputs {
    fn new() -> Self {
        let rows = ROWS[ROWS.len() - 1];
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = || {
            // xorshift64*: any fixed sequence does.
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40
        };
        // Within ±2, in steps that need every bit of a product.
        let mut value = || next() as f32 / (1u32 << 22) as f32 - 2.0;
        let x: Vec<f32> = (0..rows * K).map(|_| value()).collect();
        let w: Vec<f32> = (0..N * K).map(|_| value()).collect();
        let blocks = N.div_ceil(FP8_BLOCK.0) * K.div_ceil(FP8_BLOCK.1);
        let scales = (0..blocks).flat_map(|_| (value().abs() + 0.01).to_le_bytes()).collect();
        // Every code but the two that are NaN.
        let codes =
            (0..N * K).map(|i| (i * 89 % 256) as u8).map(|c| if c & 0x7f == 0x7f { 0 } else { c });
        Self {
            x16: x.iter().map(|&x| bf16::from_f32(x)).collect(),
            w16: w.iter().map(|&w| bf16::from_f32(w)).collect(),
            codes: codes.collect(),
            x,
            w,
            scales,
        }
    }

    fn weights(&self) -> Option<[Mat<'_>; 3]> {
        Some([
            Mat::from_f32(&self.w, N, K).ok()?,
            Mat::from_bf16(&self.w16, N, K).ok()?,
            Mat::fp8(&self.codes, &self.scales, N, K, FP8_BLOCK).ok()?,
        ])
    }

    /// The bits of everything that a device computes on the inputs.
    fn outputs(&self, kernels: Kernels) -> Option<Vec<u32>> {
        let mut bits = Vec::new();
        let mut keep = |values: &[f32]| bits.extend(values.iter().map(|v| v.to_bits()));
        for w in self.weights()? {
            for rows in ROWS {
                for x in [Acts::F32(&self.x[..rows * K]), Acts::Bf16(&self.x16[..rows * K])] {
                    let mut y = vec![0.0; rows * N];
                    kernels.matmul(x, rows, w, &mut y, N);
                    keep(&y);
                    let mut y = vec![0.5; rows * K];
                    let parts = [w.rows(0..5), w.rows(5..N)];
                    for stack in [Stack::new(&parts), Stack::new(&parts).causal(N - 3, 2)] {
                        kernels.matmul_t(x, rows, K, stack, &mut y, K);
                        keep(&y);
                    }
                }
            }
        }
        let (a, b) = (&self.x[..K], &self.x[K..2 * K]);
        let mut y = vec![0.0; K];
        kernels.rms_norm(a, b, 1e-6, &mut y);
        keep(&y);
        kernels.silu_mul(a, b, &mut y);
        keep(&y);
        y.copy_from_slice(a);
        kernels.sigmoid(&mut y);
        keep(&y);
        let max = kernels.max(b);
        y.copy_from_slice(b);
        let sum = kernels.softmax_weights(&mut y, max);
        keep(&y);
        kernels.axpy(0.3, Acts::Bf16(&self.x16[..K]), &mut y);
        kernels.scale(1.7, &mut y);
        keep(&y);
        keep(&[max, sum]);
        let mut rounded = vec![bf16::ZERO; K];
        kernels.to_bf16(a, &mut rounded);
        bits.extend(rounded.iter().map(|v| u32::from(v.to_bits())));
        Some(bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_inputs_are_sound_and_every_set_of_this_cpu_agrees() {
        let outputs = Inputs::new().outputs(Kernels::new(Isa::Scalar)).unwrap();
        let finite = outputs.iter().filter(|&&bits| f32::from_bits(bits).is_finite()).count();
        assert_eq!(finite, outputs.len());
        for isa in Isa::available() {
            assert!(agrees(isa), "{isa}");
        }
        assert!(Isa::available().contains(&Isa::detect()));
    }
}
