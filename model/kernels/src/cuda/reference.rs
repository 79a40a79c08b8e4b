//! What kernels are compared with: plain arithmetic in double, on values rounded as the kernels round them.

use super::layout::{BLOCK, Coding};
use crate::{Mat, f32_to_fp8, fp8_to_f32, round_bf16};

/// `rows` through an expert whose gate, up and down are `mats`.
pub fn expert<'a>(
    mats: [Mat<'_>; 3],
    coding: Coding,
    rows: impl IntoIterator<Item = &'a [f32]>,
) -> Vec<f64> {
    let [gate, up, down] = mats.map(widened);
    let one = |row: &[f32]| {
        let x = coded(row, coding);
        let (gate, up) = (product(&gate, &x), product(&up, &x));
        let gated = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u);
        let h: Vec<f32> = gated.map(|x| round_bf16(x as f32).to_f32()).collect();
        product(&down, &coded(&h, coding))
    };
    rows.into_iter().flat_map(one).collect()
}

/// `rows` times a weight.
pub fn linear<'a>(
    weight: Mat<'_>,
    coding: Coding,
    rows: impl IntoIterator<Item = &'a [f32]>,
) -> Vec<f64> {
    let weight = widened(weight);
    rows.into_iter().flat_map(|row| product(&weight, &coded(row, coding))).collect()
}

fn product(weight: &[Vec<f64>], x: &[f64]) -> Vec<f64> {
    weight.iter().map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
}

/// The rows of a weight.
fn widened(mat: Mat<'_>) -> Vec<Vec<f64>> {
    let row = |at| {
        let mut row = vec![0.0; mat.k()];
        mat.row_to_f32(at, &mut row);
        row.into_iter().map(f64::from).collect()
    };
    (0..mat.n()).map(row).collect()
}

/// The scale of a block of a row, as rows are coded everywhere (model/src/rows.rs).
pub fn scale(block: &[f32]) -> f32 {
    let largest = block.iter().fold(0f32, |most, x| most.max(x.abs()));
    (largest / 448.0).max(f32::MIN_POSITIVE)
}

/// A row as it enters a product: itself, or coded in e4m3 with a scale per block.
fn coded(row: &[f32], coding: Coding) -> Vec<f64> {
    let block = |block: &[f32]| -> Vec<f64> {
        let scale = scale(block);
        let value = |x: &f32| f64::from(fp8_to_f32(f32_to_fp8(x / scale))) * f64::from(scale);
        block.iter().map(value).collect()
    };
    match coding {
        Coding::Bf16 => row.iter().map(|x| f64::from(*x)).collect(),
        Coding::Fp8 => row.chunks(BLOCK).flat_map(block).collect(),
    }
}

/// ‖out − reference‖ / ‖reference‖; NaN if anything is. Panics if they differ in length.
pub fn distance(out: &[f32], reference: &[f64]) -> f64 {
    assert_eq!(out.len(), reference.len(), "values and their reference");
    let off: f64 = out.iter().zip(reference).map(|(x, y)| (f64::from(*x) - y).powi(2)).sum();
    (off / reference.iter().map(|y| y * y).sum::<f64>()).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_is_relative_and_nan_is_seen() {
        assert_eq!(distance(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
        assert!((distance(&[3.0, 5.0], &[3.0, 4.0]) - 0.2).abs() < 1e-12);
        assert!(distance(&[f32::NAN, 4.0], &[3.0, 4.0]).is_nan());
    }

    #[test]
    fn codes_are_within_half_a_step() {
        let row: Vec<f32> = (0..300).map(|i| (i as f32 - 150.0) * 0.37).collect();
        for (x, y) in row.iter().zip(coded(&row, Coding::Fp8)) {
            assert!((f64::from(*x) - y).abs() <= f64::from(x.abs()) / 16.0 + 1e-3, "{x} {y}");
        }
    }
}
