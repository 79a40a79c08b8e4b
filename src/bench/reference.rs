//! What kernels are compared with: plain arithmetic in double, on values rounded as the kernels round them.

use kernels::cuda::{BLOCK, Coding};
use kernels::{Mat, f32_to_fp8, fp8_to_f32};

/// The rows of a weight.
pub fn widened<'a>(mat: &'a Mat<'_>) -> impl Iterator<Item = Vec<f64>> + use<'a> {
    (0..mat.n()).map(|at| {
        let mut row = vec![0.0; mat.k()];
        mat.row_to_f32(at, &mut row);
        row.into_iter().map(f64::from).collect()
    })
}

/// A row as it enters a product: itself, or coded in e4m3 with a scale per block.
pub fn coded(row: &[f32], coding: Coding) -> Vec<f64> {
    let block = |block: &[f32]| -> Vec<f64> {
        let largest = block.iter().fold(0f32, |most, x| most.max(x.abs()));
        let scale = (largest / 448.0).max(f32::MIN_POSITIVE);
        let value = |x: &f32| f64::from(fp8_to_f32(f32_to_fp8(x / scale))) * f64::from(scale);
        block.iter().map(value).collect()
    };
    match coding {
        Coding::Bf16 => row.iter().map(|x| f64::from(*x)).collect(),
        Coding::Fp8 => row.chunks(BLOCK).flat_map(block).collect(),
    }
}

/// ‖out − reference‖ / ‖reference‖
pub fn distance(out: &[f32], reference: &[f64]) -> f64 {
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
