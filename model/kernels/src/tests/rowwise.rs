//! Work on single rows: the same bits on every device, and close to the exact values.

use super::{Kind, Random, bits, others, scalar};
use crate::{Acts, Device};
use half::bf16;
use proptest::prelude::*;

/// Distance from the exact value in units of the f32's last place.
fn ulps(got: f32, exact: f64) -> f64 {
    if f64::from(got) == exact || (exact as f32).is_infinite() && got.is_infinite() {
        return 0.0;
    }
    let exponent = (exact.abs().log2().floor() as i32).max(-126);
    (f64::from(got) - exact).abs() / 2f64.powi(exponent - 23)
}

/// Every function of the trait that works on rows, one result after another.
fn everything(k: &dyn Device, x: &[f32], w: &[f32], h: &[bf16]) -> Vec<u32> {
    let mut out = Vec::new();
    let mut y = vec![0.0; x.len()];
    k.rms_norm(x, w, 1e-6, &mut y);
    out.extend(bits(&y));
    k.silu_mul(x, w, &mut y);
    out.extend(bits(&y));
    let max = k.max(x);
    y.copy_from_slice(x);
    let sum = k.softmax_weights(&mut y, max);
    out.extend(bits(&[max, sum]));
    out.extend(bits(&y));
    y.copy_from_slice(x);
    k.sigmoid(&mut y);
    out.extend(bits(&y));
    k.axpy(0.3, Acts::F32(x), &mut y);
    k.axpy(-0.7, Acts::Bf16(h), &mut y);
    k.scale(1.7, &mut y);
    k.blend(0.9, x, -0.2, &mut y);
    out.extend(bits(&y));
    let mut z = vec![bf16::ZERO; x.len()];
    k.to_bf16(x, &mut z);
    out.extend(z.iter().map(|z| u32::from(z.to_bits())));
    out
}

proptest! {
    #[test]
    fn every_device_gives_the_same_bits(
        n in 0usize..100,
        seed in any::<u64>(),
        kind in prop_oneof![Just(Kind::Plain), Just(Kind::Wide)],
        odd in any::<bool>(),
    ) {
        let mut random = Random(seed);
        let mut x = random.f32s(n, kind);
        if odd && n > 0 {
            let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 1e-42, f32::MAX, 88.8];
            x[seed as usize % n] = special[random.below(special.len())];
        }
        let (w, h) = (random.f32s(n, kind), random.bf16s(n, kind));
        let want = everything(&*scalar(), &x, &w, &h);
        for device in others() {
            prop_assert_eq!(&everything(&*device, &x, &w, &h), &want, "{}", device.isa());
        }
    }
}

/// Rows weighed side by side give the bits of one after the other, on every device.
#[test]
fn rows_are_weighed_in_their_order() {
    let mut random = Random(11);
    for n in [0, 1, 15, 16, 63, 64, 65, 128, 200] {
        let (weights, y) = (random.f32s(8, Kind::Plain), random.f32s(n, Kind::Plain));
        let rows: Vec<_> = (0..8).map(|_| random.bf16s(n, Kind::Plain)).collect();
        let rows: Vec<_> = weights.into_iter().zip(rows.iter().map(Vec::as_slice)).collect();
        for k in others().into_iter().chain([scalar()]) {
            let (mut steps, mut together) = (vec![0.0; n], y.clone());
            rows.iter().for_each(|(a, row)| k.axpy(*a, Acts::Bf16(row), &mut steps));
            k.weigh(&rows, &mut together);
            assert_eq!(bits(&together), bits(&steps), "{n} on {}", k.isa());
        }
    }
}

#[test]
fn exponentials_are_close() {
    let x: Vec<f32> = (-1_060_000..=890_000).map(|i| i as f32 * 1e-4).collect();
    let mut y = x.clone();
    scalar().softmax_weights(&mut y, 0.0);
    let worst = x.iter().zip(&y).map(|(x, y)| ulps(*y, f64::from(*x).exp())).fold(0.0, f64::max);
    assert!(worst < 1.1, "{worst} ulp");
    let mut ends = [f32::NEG_INFINITY, -1e30, -104.1, 0.0, 88.73, 1e30, f32::INFINITY, f32::NAN];
    scalar().softmax_weights(&mut ends, 0.0);
    let inf = f32::INFINITY;
    assert_eq!(bits(&ends), bits(&[0.0, 0.0, 0.0, 1.0, inf, inf, inf, f32::NAN]));
}

#[test]
fn sigmoid_and_silu_are_close() {
    let x: Vec<f32> = (-1_000_000..=1_000_000).map(|i| i as f32 * 1e-4).collect();
    let exact = |x: f32| 1.0 / (1.0 + (-f64::from(x)).exp());
    let mut y = x.clone();
    scalar().sigmoid(&mut y);
    let worst = x.iter().zip(&y).map(|(x, y)| ulps(*y, exact(*x))).fold(0.0, f64::max);
    assert!(worst < 2.5, "sigmoid {worst} ulp");
    scalar().silu_mul(&x, &vec![1.0; x.len()], &mut y);
    let silu = |x: f32| f64::from(x) * exact(x);
    let worst = x.iter().zip(&y).filter(|(x, _)| **x > -80.0);
    let worst = worst.map(|(x, y)| ulps(*y, silu(*x))).fold(0.0, f64::max);
    assert!(worst < 4.0, "silu {worst} ulp");
}

#[test]
fn norm_and_softmax_are_close() {
    let mut random = Random(5);
    let (x, w) = (random.f32s(1000, Kind::Plain), random.f32s(1000, Kind::Plain));
    let mut y = vec![0.0; 1000];
    scalar().rms_norm(&x, &w, 1e-6, &mut y);
    let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / 1000.0;
    for ((x, w), y) in x.iter().zip(&w).zip(&y) {
        let exact = f64::from(*x) / (mean + 1e-6).sqrt() * f64::from(*w);
        assert!(ulps(*y, exact) < 16.0, "{y} for {exact}");
    }
    let max = scalar().max(&x);
    assert_eq!(max, x.iter().copied().fold(f32::MIN, f32::max));
    let sum = scalar().softmax_weights(&mut x.clone(), max);
    let exact: f64 = x.iter().map(|x| (f64::from(*x) - f64::from(max)).exp()).sum();
    assert!(ulps(sum, exact) < 64.0, "{sum} for {exact}");
}

#[test]
fn rounding_to_bf16_is_halfs() {
    let mut random = Random(9);
    for _ in 0..100_000 {
        let x = f32::from_bits(random.next() as u32);
        let (got, want) = (crate::round_bf16(x), bf16::from_f32(x));
        assert!(got == want || got.is_nan() && want.is_nan(), "{x:e}");
    }
}
