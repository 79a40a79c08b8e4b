//! Sums over an FP8 weight's rows for a single row, on every device against the scalar one.

use super::{Kind, Random, bits, others, scalar};
use crate::{Acts, Kernels, Mat, Stack};
use proptest::prelude::*;

proptest! {
    /// A single row over an FP8 weight goes another way than several.
    #[test]
    fn one_row_over_an_fp8_weights_rows_has_the_defined_bits(
        (n, cut, strips) in (0usize..300, 0usize..300, 1usize..4),
        block in prop_oneof![Just((128, 128)), (1usize..200, Just(64)), (1usize..9, 1usize..80)],
        causal in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let k = 256 * strips;
        let mut random = Random(seed);
        let x = random.bf16s(n, Kind::Plain);
        let codes: Vec<u8> = (0..n * k)
            .map(|_| match random.next() as u8 {
                code if code & 0x7f == 0x7f && random.below(300) > 0 => code ^ 1,
                code => code,
            })
            .collect();
        let scales = random.f32s(n.div_ceil(block.0) * k.div_ceil(block.1), Kind::Plain);
        let scales: Vec<u8> = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
        let w = Mat::fp8(&codes, &scales, n, k, block).unwrap();
        let mats = [w.rows(0..cut.min(n)), w.rows(cut.min(n)..n)];
        let stack = Stack::new(&mats);
        let stack = if causal { stack.causal(cut / 2, 1) } else { stack };
        let product = |device: &Kernels| {
            let mut y = vec![7.0; k];
            device.matmul_t(Acts::Bf16(&x), 1, n, stack, &mut y, k);
            bits(&y)
        };
        let want = product(&scalar());
        for device in others() {
            prop_assert_eq!(&product(&device), &want, "{}", device.isa());
        }
    }
}
