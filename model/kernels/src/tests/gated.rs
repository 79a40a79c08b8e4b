//! Two products through SwiGLU into a third: the bits of the single functions, on every device and any number of threads.

use super::{Kind, Random, bits};
use crate::{Acts, Compute, DType, Gated, Isa, Kernels, Mat, Out};
use half::bf16;

/// A weight's bytes and scales in blocks of 32 rows by 64.
struct Weight(DType, Vec<u8>, Vec<u8>, usize, usize);

impl Weight {
    fn new(random: &mut Random, dtype: DType, n: usize, k: usize) -> Weight {
        let bytes = match dtype {
            DType::F32 => {
                random.f32s(n * k, Kind::Plain).into_iter().flat_map(f32::to_le_bytes).collect()
            }
            DType::Bf16 => {
                random.bf16s(n * k, Kind::Plain).into_iter().flat_map(bf16::to_le_bytes).collect()
            }
            DType::Fp8 => (0..n * k).map(|_| random.next() as u8 & 0xf7).collect(),
        };
        let scales = random.f32s(n.div_ceil(32) * k.div_ceil(64), Kind::Plain);
        Weight(dtype, bytes, scales.into_iter().flat_map(f32::to_le_bytes).collect(), n, k)
    }

    fn mat(&self) -> Mat<'_> {
        let Weight(dtype, bytes, scales, n, k) = self;
        let mat = match dtype {
            DType::F32 => Mat::f32(bytes, *n, *k),
            DType::Bf16 => Mat::bf16(bytes, *n, *k),
            DType::Fp8 => Mat::fp8(bytes, scales, *n, *k, (32, 64)),
        };
        mat.expect("lengths as generated")
    }
}

/// The same by single functions, and the last product rounded.
fn apart(
    k: &Kernels,
    x: Acts<'_>,
    rows: usize,
    [gate, up, down]: [Mat<'_>; 3],
) -> (Vec<u32>, Vec<bf16>) {
    let (inner, hidden) = (gate.n(), down.n());
    let (mut a, mut b, mut h) =
        (vec![0.0; rows * inner], vec![0.0; rows * inner], vec![0.0; rows * inner]);
    k.matmul(x, rows, gate, &mut a, inner);
    k.matmul(x, rows, up, &mut b, inner);
    k.silu_mul(&a, &b, &mut h);
    let mut rounded = vec![bf16::ZERO; rows * inner];
    k.to_bf16(&h, &mut rounded);
    let h = if matches!(x, Acts::F32(_)) { Acts::F32(&h) } else { Acts::Bf16(&rounded) };
    let mut y = vec![0.0; rows * hidden];
    k.matmul(h, rows, down, &mut y, hidden);
    let mut narrow = vec![bf16::ZERO; y.len()];
    k.to_bf16(&y, &mut narrow);
    (bits(&y), narrow)
}

#[test]
fn as_the_single_functions() {
    use DType::{Bf16, F32, Fp8};
    let mut random = Random(11);
    // Inner sizes that end within a step of tiles, a k-block and a panel, and several shares of threads.
    for (hidden, inner) in [(96, 64), (70, 48), (130, 320), (64, 40)] {
        for types in [[Bf16; 3], [Fp8; 3], [F32; 3], [Bf16, Fp8, Bf16], [Fp8, Fp8, Bf16]] {
            let weights = [
                Weight::new(&mut random, types[0], inner, hidden),
                Weight::new(&mut random, types[1], inner, hidden),
                Weight::new(&mut random, types[2], hidden, inner),
            ];
            let weights = weights.each_ref().map(Weight::mat);
            for rows in [1, 7, 32, 33, 80, 300] {
                let x32 = random.f32s(rows * hidden, Kind::Plain);
                let x16 = random.bf16s(rows * hidden, Kind::Plain);
                for x in [Acts::F32(&x32), Acts::Bf16(&x16)] {
                    // Every instruction set at few rows, the slow reference left out.
                    let all =
                        Isa::available().into_iter().filter(|isa| rows < 64 || *isa != Isa::Scalar);
                    for isa in all {
                        check(isa, x, rows, weights);
                    }
                }
            }
        }
    }
}

fn check(isa: Isa, x: Acts<'_>, rows: usize, weights: [Mat<'_>; 3]) {
    let down = weights[2];
    let (hidden, case) =
        (down.n(), format!("{isa}, {rows} rows, {:?}", weights.map(|w| w.dtype())));
    let k = Kernels::new(isa);
    let (want, narrow) = apart(&k, x, rows, weights);
    let mut alone = Gated::default();
    alone.fill(&*k, None, x, rows, weights);
    let h = alone.h();
    let mut y = vec![0.0; rows * hidden];
    k.matmul_packed(h, down, &mut Out::new(&mut y, rows, hidden, hidden));
    assert_eq!(bits(&y), want, "{case}");
    let mut rounded = vec![bf16::ONE; rows * hidden];
    k.matmul_rounded(h, down, &mut rounded);
    let agree = |a: &bf16, b: &bf16| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
    assert!(rounded.iter().zip(&narrow).all(|(a, b)| agree(a, b)), "rounded, {case}");
    for threads in [1, 3] {
        let compute = Compute::new(isa, threads);
        let mut memory = Gated::default();
        compute.gated(x, rows, weights, &mut memory);
        compute.matmul_packed(memory.h(), down, &mut y);
        assert_eq!(bits(&y), want, "{threads} threads, {case}");
    }
}
