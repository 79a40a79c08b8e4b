//! Products: every device against the scalar one, that against the definition, and the definition against f64.

use super::{Kind, Random, bits, matmul, others, scalar};
use crate::lanes::{flush, fma_flush, tree};
use crate::{Acts, Compute, DType, Isa, Kernels, Mat, Stack, fp8_to_f32, round_bf16};
use half::bf16;
use proptest::prelude::*;

/// A weight's bytes, at an odd address, and what a view of it means.
#[derive(Clone, Debug)]
struct Weight {
    dtype: DType,
    bytes: Vec<u8>,
    offset: usize,
    scales: Vec<u8>,
    n: usize,
    k: usize,
    block: (usize, usize),
    /// The view: first row and column, rows and columns.
    row0: usize,
    col0: usize,
    rows: usize,
    cols: usize,
}

impl Weight {
    fn mat(&self) -> Mat<'_> {
        let bytes = &self.bytes[self.offset..];
        let mat = match self.dtype {
            DType::F32 => Mat::f32(bytes, self.n, self.k),
            DType::Bf16 => Mat::bf16(bytes, self.n, self.k),
            DType::Fp8 => Mat::fp8(bytes, &self.scales, self.n, self.k, self.block),
        };
        let mat = mat.expect("lengths as generated");
        mat.rows(self.row0..self.row0 + self.rows).cols(self.col0..self.col0 + self.cols)
    }

    /// Element `(i, j)` of the view without its scale, and its scale.
    fn at(&self, i: usize, j: usize) -> (f32, f32) {
        let (i, j) = (self.row0 + i, self.col0 + j);
        let at = i * self.k + j;
        let bytes = &self.bytes[self.offset + at * self.dtype.size()..];
        match self.dtype {
            DType::F32 => (f32::from_le_bytes(bytes[..4].try_into().unwrap()), 1.0),
            DType::Bf16 => (bf16::from_le_bytes(bytes[..2].try_into().unwrap()).to_f32(), 1.0),
            DType::Fp8 => {
                let ld = self.k.div_ceil(self.block.1);
                let s = (i / self.block.0) * ld + j / self.block.1;
                let s = f32::from_le_bytes(self.scales[s * 4..][..4].try_into().unwrap());
                (fp8_to_f32(bytes[0]), s)
            }
        }
    }

    /// The k-block of the view's column `j`.
    fn block_of(&self, j: usize) -> usize {
        if self.dtype == DType::Fp8 { (self.col0 + j) / self.block.1 } else { 0 }
    }
}

/// A product's operands.
#[derive(Clone, Debug)]
struct Case {
    w: Weight,
    x32: Vec<f32>,
    x16: Vec<bf16>,
    rows: usize,
    gap: usize,
}

/// A class of products, by its order.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Class {
    F32,
    /// bf16 activations, in lanes.
    Bf16,
    /// bf16 activations, in tiles.
    Tiles,
}

impl Class {
    /// The class of `device` for activations in f32, or in bf16.
    fn of(device: &Kernels, bf16: bool) -> Class {
        match (bf16, device.isa()) {
            (false, _) => Class::F32,
            (true, Isa::Amx) => Class::Tiles,
            (true, _) => Class::Bf16,
        }
    }
}

impl Case {
    fn acts(&self, class: bool) -> Acts<'_> {
        if class { Acts::Bf16(&self.x16) } else { Acts::F32(&self.x32) }
    }

    fn x(&self, class: bool, r: usize, j: usize) -> f32 {
        let at = r * self.w.cols + j;
        if class { self.x16[at].to_f32() } else { self.x32[at] }
    }

    /// The definition of a product, written as it reads in `lib.rs`.
    fn defined(&self, class: Class) -> Vec<f32> {
        let w = &self.w;
        let mut out = Vec::new();
        for r in 0..self.rows {
            for n in 0..w.rows {
                let mut total = [0.0f32; 16];
                let mut from = 0;
                while from < w.cols {
                    let to = (from..w.cols).find(|j| w.block_of(*j) != w.block_of(from));
                    let to = to.unwrap_or(w.cols);
                    let pair = |j: usize| match j < to {
                        true => (w.at(n, j).0, self.x(class != Class::F32, r, j)),
                        false => (0.0, 0.0),
                    };
                    let mut acc = [0.0f32; 16];
                    for step in (from..to).step_by(32) {
                        if class == Class::Tiles {
                            acc[0] = in_tiles(acc[0], std::array::from_fn(|i| pair(step + i)));
                            continue;
                        }
                        for (lane, acc) in acc.iter_mut().enumerate() {
                            let order = match class {
                                Class::F32 => [step + lane, step + lane + 16],
                                _ => [step + 2 * lane + 1, step + 2 * lane],
                            };
                            for (a, x) in order.map(pair) {
                                *acc = match class {
                                    Class::F32 => a.mul_add(x, *acc),
                                    _ => fma_flush(round_bf16(a).to_f32(), x, *acc),
                                };
                            }
                        }
                    }
                    total = match w.dtype {
                        DType::Fp8 => {
                            let s = w.at(n, from).1;
                            std::array::from_fn(|l| acc[l].mul_add(s, total[l]))
                        }
                        _ => acc,
                    };
                    from = to;
                }
                out.push(if class == Class::Tiles { total[0] } else { tree(total) });
            }
        }
        out
    }
}

/// `acc` plus 32 products as a tile adds them, written as it reads in `lib.rs`.
fn in_tiles(acc: f32, pairs: [(f32, f32); 32]) -> f32 {
    let mut sums = [0.0; 2];
    for (i, (w, x)) in pairs.into_iter().enumerate() {
        sums[i % 2] = fma_flush(round_bf16(w).to_f32(), x, sums[i % 2]);
    }
    flush(acc + flush(sums[0] + sums[1]))
}

fn kinds() -> impl Strategy<Value = Kind> {
    prop_oneof![3 => Just(Kind::Plain), 1 => Just(Kind::Wide), 1 => Just(Kind::Tiny)]
}

fn dtypes() -> impl Strategy<Value = DType> {
    prop_oneof![Just(DType::F32), Just(DType::Bf16), Just(DType::Fp8)]
}

prop_compose! {
    fn cases()(
        dtype in dtypes(),
        kind in kinds(),
        nan in prop::bool::weighted(0.1),
        (rows, n) in prop_oneof![
            (0usize..5, 0usize..40), (5usize..20, 1usize..40), (20usize..70, 1usize..40),
            (250usize..270, 1usize..5)
        ],
        k in prop_oneof![0usize..70, 500usize..560, 1020usize..1060],
        block in prop_oneof![
            Just((128, 128)), Just((2, 32)), (1usize..5, 1usize..80), Just((1, 2000))
        ],
        (above, below, left, right) in (0usize..5, 0usize..3, 0usize..40, 0usize..3),
        viewed in any::<bool>(),
        offset in 0usize..4,
        gap in 0usize..3,
        seed in any::<u64>(),
    ) -> Case {
        let (above, below, left, right) =
            if viewed { (above, below, left, right) } else { (0, 0, 0, 0) };
        let mut random = Random(seed);
        let (wn, wk) = (n + above + below, k + left + right);
        let count = wn * wk;
        let mut bytes = vec![0xa5; offset];
        match dtype {
            DType::F32 => random.f32s(count, kind).iter()
                .for_each(|x| bytes.extend(x.to_le_bytes())),
            DType::Bf16 => random.bf16s(count, kind).iter()
                .for_each(|x| bytes.extend(x.to_le_bytes())),
            DType::Fp8 => for _ in 0..count {
                let code = random.next() as u8;
                let spare = !nan || random.below(300) > 0;
                bytes.push(if code & 0x7f == 0x7f && spare { code ^ 1 } else { code });
            },
        }
        let blocks = wn.div_ceil(block.0) * wk.div_ceil(block.1);
        let scales = random.f32s(blocks, kind).iter().flat_map(|s| s.to_le_bytes()).collect();
        let x32 = random.f32s(rows * k, kind);
        let x16 = random.bf16s(rows * k, kind);
        let w = Weight {
            dtype, bytes, offset, scales, n: wn, k: wk, block,
            row0: above, col0: left, rows: n, cols: k,
        };
        Case { w, x32, x16, rows, gap }
    }
}

proptest! {
    #[test]
    fn every_device_gives_the_defined_bits(case in cases()) {
        let ldy = case.w.rows + case.gap;
        for bf16 in [false, true] {
            for device in [scalar(), Kernels::reference(Isa::Amx)].into_iter().chain(others()) {
                let class = Class::of(&device, bf16);
                let got = matmul(&device, case.acts(bf16), case.rows, case.w.mat(), ldy);
                let want = bits(&case.defined(class));
                prop_assert_eq!(&bits(&got), &want, "{} in class {:?}", device.isa(), class);
            }
        }
    }

    #[test]
    fn a_row_does_not_see_its_batch(case in cases()) {
        let cols = case.w.cols;
        for class in [false, true] {
            for device in others() {
                let all = matmul(&device, case.acts(class), case.rows, case.w.mat(), case.w.rows);
                for r in (0..case.rows).step_by(7) {
                    let x = case.acts(class).slice(r * cols..(r + 1) * cols);
                    let one = matmul(&device, x, 1, case.w.mat(), case.w.rows);
                    prop_assert_eq!(bits(&one), bits(&all[r * case.w.rows..][..case.w.rows]));
                }
            }
        }
    }

    #[test]
    fn transposed_products_agree(
        case in cases(),
        (cut, first, group) in (0usize..40, 0usize..80, 1usize..9),
        causal in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let (n, k, rows) = (case.w.rows, case.w.cols, case.rows);
        let (ldx, ldy) = (n + case.gap, k + case.gap);
        let mut random = Random(seed);
        let x32 = random.f32s(rows * ldx, Kind::Plain);
        let x16 = random.bf16s(rows * ldx, Kind::Plain);
        let y0 = random.f32s(rows * ldy, Kind::Plain);
        let mats = [case.w.mat().rows(0..cut.min(n)), case.w.mat().rows(cut.min(n)..n)];
        let stack = Stack::new(&mats);
        let stack = if causal { stack.causal(first, group) } else { stack };
        for x in [Acts::F32(&x32), Acts::Bf16(&x16)] {
            let want = |tiles: bool| {
                let mut want = y0.clone();
                for r in 0..rows {
                    let seen = if causal { n.min(first + r / group) } else { n };
                    for l in 0..k {
                        let pair = |i: usize| {
                            let x = match x {
                                Acts::F32(x) => x[r * ldx + i],
                                Acts::Bf16(x) => x[r * ldx + i].to_f32(),
                            };
                            let (code, scale) = case.w.at(i, l);
                            (if case.w.dtype == DType::Fp8 { code * scale } else { code }, x)
                        };
                        want[r * ldy + l] = match tiles {
                            false => (0..seen).map(pair).fold(0.0, |y, (w, x)| x.mul_add(w, y)),
                            true => (0..seen).step_by(32).fold(0.0, |y, at| {
                                let pair = |i| if i < seen { pair(i) } else { (0.0, 0.0) };
                                in_tiles(y, std::array::from_fn(|i| pair(at + i)))
                            }),
                        };
                    }
                }
                want
            };
            let reference = Kernels::reference(Isa::Amx);
            for device in [scalar(), reference].into_iter().chain(others()) {
                let tiles = Class::of(&device, matches!(x, Acts::Bf16(_))) == Class::Tiles
                    && case.w.dtype == DType::Bf16;
                let mut y = y0.clone();
                device.matmul_t(x, rows, ldx, stack, &mut y, ldy);
                // Without a zero's sign.
                let unsigned = |y: &[f32]| bits(&y.iter().map(|y| y + 0.0).collect::<Vec<_>>());
                prop_assert_eq!(unsigned(&y), unsigned(&want(tiles)), "{}", device.isa());
            }
        }
    }

    /// What a row does not see cannot be told from its result, though it be no number.
    #[test]
    fn a_row_does_not_see_what_comes_later(
        (rows, group, first) in (1usize..40, 1usize..9, 0usize..70),
        bad in prop_oneof![Just(f32::NAN), Just(f32::INFINITY), Just(1.0)],
        seed in any::<u64>(),
    ) {
        let (n, k) = (first + (rows - 1) / group + 1, 40);
        let mut random = Random(seed);
        let x = random.bf16s(rows * n, Kind::Plain);
        let w = random.bf16s(n * k, Kind::Plain);
        let mut other = w.clone();
        let last = first + random.below(n - first);
        other[last * k + 3] = round_bf16(bad);
        for device in [scalar(), Kernels::reference(Isa::Amx)].into_iter().chain(others()) {
            let product = |w: &[bf16]| {
                let mut y = vec![0.0; rows * k];
                let mats = [Mat::from_bf16(w, n, k).unwrap()];
                let stack = Stack::new(&mats).causal(first, group);
                device.matmul_t(Acts::Bf16(&x), rows, n, stack, &mut y, k);
                y
            };
            let (y, changed) = (product(&w), product(&other));
            for r in (0..rows).filter(|r| first + r / group <= last) {
                prop_assert_eq!(bits(&y[r * k..][..k]), bits(&changed[r * k..][..k]), "{}", device.isa());
            }
        }
    }

    /// Few rows go another way than many, unless something is subnormal or no number.
    #[test]
    fn few_rows_over_a_weights_rows_have_a_tiles_bits(
        (rows, n, columns, gap) in (1usize..10, 1usize..140, 1usize..12, 0usize..3),
        (kind, of_x) in (kinds(), kinds()),
        bad in prop_oneof![Just(None), Just(Some(f32::NAN)), Just(Some(f32::INFINITY))],
        seed in any::<u64>(),
    ) {
        let (k, ldx) = (32 * columns, n + gap);
        let mut random = Random(seed);
        let x = random.bf16s(rows * ldx, of_x);
        let mut w = random.bf16s(n * k, kind);
        if let Some(bad) = bad {
            w[random.below(n * k)] = round_bf16(bad);
        }
        let mats = [Mat::from_bf16(&w, n, k).unwrap()];
        let product = |device: &Kernels| {
            let mut y = vec![7.0; rows * (k + gap)];
            device.matmul_t(Acts::Bf16(&x), rows, ldx, Stack::new(&mats), &mut y, k + gap);
            // Without a zero's sign.
            bits(&y.iter().map(|y| y + 0.0).collect::<Vec<_>>())
        };
        let want = product(&Kernels::reference(Isa::Amx));
        for device in others().into_iter().filter(|d| Class::of(d, true) == Class::Tiles) {
            prop_assert_eq!(&product(&device), &want, "{}", device.isa());
        }
    }

    #[test]
    fn near_the_exact_sum(case in cases()) {
        prop_assume!(case.w.cols > 0);
        let tiles = Kernels::reference(Isa::Amx);
        for (device, class) in [(scalar(), false), (scalar(), true), (tiles, true)] {
            let got = matmul(&device, case.acts(class), case.rows, case.w.mat(), case.w.rows);
            for (i, got) in got.iter().enumerate() {
                let (r, n) = (i / case.w.rows, i % case.w.rows);
                let (mut sum, mut size) = (0.0f64, 0.0f64);
                for j in 0..case.w.cols {
                    let (code, scale) = case.w.at(n, j);
                    let w = if class { round_bf16(code).to_f32() } else { code };
                    let p = f64::from(w) * f64::from(scale) * f64::from(case.x(class, r, j));
                    (sum, size) = (sum + p, size + p.abs());
                }
                prop_assume!(size.is_nan() || size < 1e30);
                // Each sum rounds once an element (in tiles sixteen at most) and once a block; flushing loses up to the
                // smallest normal number an element, times a scale of at most 2^13.
                let steps = (case.w.cols / 8 + 20) as f64;
                let tolerance = size * steps * 2f64.powi(-24)
                    + case.w.cols as f64 * f64::from(f32::MIN_POSITIVE) * 8192.0;
                prop_assert!(
                    sum.is_nan() == got.is_nan() && (sum.is_nan() || (f64::from(*got) - sum).abs() <= tolerance),
                    "{got} for {sum}"
                );
            }
        }
    }
}

/// The loads of the AVX512-BF16 device with its dot product emulated, where the instruction itself is missing.
#[cfg(target_arch = "x86_64")]
#[test]
fn pairs_load_as_defined() {
    use crate::packed::{Out, Packed};
    use crate::product::product;
    use crate::x86::EmulatedPairs;
    use proptest::test_runner::TestRunner;

    if !Isa::Avx512.is_available() {
        eprintln!("left out: this cpu has no avx512");
        return;
    }
    let test = |case: Case| {
        let mut packed = Packed::new();
        packed.fill::<EmulatedPairs>(case.acts(true), case.rows, &case.w.mat(), None);
        let n = case.w.rows;
        let mut y = vec![0.0; case.rows * n];
        let mut out = Out::new(&mut y, case.rows, n, n);
        // SAFETY: AVX-512 is there.
        unsafe { product::<EmulatedPairs>(&packed, &case.w.mat(), &mut out) };
        prop_assert_eq!(bits(&y), bits(&case.defined(Class::Bf16)));
        Ok(())
    };
    TestRunner::default().run(&cases(), test).unwrap();
}

#[test]
fn threads_change_no_bit() {
    let mut random = Random(3);
    let (n, k) = (1000, 288);
    let w = random.bf16s(n * k, Kind::Plain);
    let x = random.bf16s(20 * k, Kind::Plain);
    let w = Mat::from_bf16(&w, n, k).unwrap();
    for rows in [1, 3, 20] {
        let x = Acts::Bf16(&x).slice(0..rows * k);
        let want = matmul(&Kernels::detect(), x, rows, w, n);
        for threads in [1, 2, 5] {
            let mut y = vec![0.0; rows * n];
            Compute::new(Isa::detect(), threads).matmul(x, rows, w, &mut y);
            assert_eq!(bits(&y), bits(&want), "{threads} threads");
        }
    }
}

#[test]
fn codes_widen() {
    // e4m3 (fn): Micikevicius et al. 2022, table 1.
    let check = |code: u8, value: f32| {
        assert_eq!(fp8_to_f32(code), value);
        assert_eq!(fp8_to_f32(code | 0x80), -value);
    };
    check(0x00, 0.0);
    check(0x01, 0.001953125);
    check(0x07, 0.013671875);
    check(0x08, 0.015625);
    check(0x38, 1.0);
    check(0x7e, 448.0);
    assert!(fp8_to_f32(0x7f).is_nan() && fp8_to_f32(0xff).is_nan());
}

#[test]
fn flushing_at_the_edge() {
    let tiny = f32::MIN_POSITIVE;
    // Exactly half way between the two largest numbers that round apart: to even, so not tiny.
    let (a, b) = (-2f32.powi(-75), 2f32.powi(-76));
    assert_eq!(fma_flush(a, b, tiny), tiny);
    // A little below: tiny after rounding, though rounding at a subnormal's spacing would give the same number.
    assert_eq!(a.mul_add(b * 1.0078125, tiny), tiny);
    assert_eq!(fma_flush(a, b * 1.0078125, tiny), 0.0);
    assert_eq!(fma_flush(-a, b * 1.0078125, -tiny).to_bits(), (-0.0f32).to_bits());
    assert_eq!(fma_flush(tiny / 2.0, 1e30, 0.0), 0.0, "a subnormal operand is zero");
    assert_eq!(fma_flush(1e-20, 1e-20, tiny / 2.0), 0.0, "and so is the sum");
}

#[test]
fn lengths_are_checked() {
    let bytes = [0u8; 64];
    assert!(Mat::f32(&bytes, 4, 4).is_ok());
    let refused = |r: Result<Mat<'_>, crate::ShapeError>, text: &str| {
        assert_eq!(r.err().map(|e| e.to_string()).as_deref(), Some(text));
    };
    refused(Mat::bf16(&bytes, 4, 4), "weight [4, 4] of 2 byte elements needs 32 bytes, has 64");
    refused(Mat::f32(&bytes, usize::MAX, 2), &format!("weight [{}, 2] is too large", usize::MAX));
    let scales = [0u8; 8];
    assert!(Mat::fp8(&bytes, &scales, 8, 8, (8, 4)).is_ok());
    refused(
        Mat::fp8(&bytes, &scales, 8, 8, (4, 4)),
        "scales of [8, 8] in blocks of 4 x 4 need 16 bytes, has 8",
    );
    refused(Mat::fp8(&bytes, &scales, 8, 8, (0, 4)), "fp8 block of 0 x 4 is empty");
    let mat = Mat::f32(&bytes, 4, 4).unwrap();
    refused(mat.try_rows(3..5), "rows 3..5 are outside a matrix of 4");
    refused(mat.try_cols(5..5), "columns 5..5 are outside a matrix of 4");
}

#[test]
fn rows_widen() {
    let codes: Vec<u8> = (0..60).collect();
    let scales: Vec<u8> = [1.0f32, 2.0, 4.0, 8.0].iter().flat_map(|s| s.to_le_bytes()).collect();
    let mat = Mat::fp8(&codes, &scales, 6, 10, (3, 6)).unwrap();
    let mut row = [0.0; 4];
    mat.rows(2..6).cols(4..8).row_to_f32(1, &mut row);
    let want = [34, 35, 36, 37].map(fp8_to_f32);
    assert_eq!(row, [want[0] * 4.0, want[1] * 4.0, want[2] * 8.0, want[3] * 8.0]);
}
