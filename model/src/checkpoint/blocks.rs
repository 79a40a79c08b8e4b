//! Block-scaled e4m3, as DeepSeek publishes its weights (DeepSeek-V3 report, section 3.3.2): one f32
//! scale for each block of rows × columns, and the largest value of a block gets the largest code.

use kernels::{f32_to_fp8, fp8_to_f32};

/// The largest e4m3 value.
const LARGEST: f32 = 448.0;

/// Sums of squares over some weights: of what quantising changed, and of what there was.
#[derive(Clone, Copy, Debug, Default)]
pub struct Squares {
    error: f64,
    weight: f64,
}

impl Squares {
    pub fn add(&mut self, other: Squares) {
        self.error += other.error;
        self.weight += other.weight;
    }

    /// `‖fp8 − w‖ / ‖w‖`; `None` when nothing was quantised.
    pub fn relative(self) -> Option<f64> {
        (self.weight > 0.0).then(|| (self.error / self.weight).sqrt())
    }

    /// No weight was NaN or infinite.
    pub fn is_finite(self) -> bool {
        self.error.is_finite() && self.weight.is_finite()
    }
}

/// Quantises whole rows of `columns` values in blocks of `rows × across`, counted from the first
/// value. `codes` has the length of `values`, `scales` is `[row blocks, column blocks]`.
pub fn quantize(
    values: &[f32],
    columns: usize,
    (rows, across): (usize, usize),
    codes: &mut [u8],
    scales: &mut [f32],
) -> Squares {
    let mut squares = Squares::default();
    let band = (rows * columns).max(1);
    let bands = values.chunks(band).zip(codes.chunks_mut(band));
    for ((values, codes), scales) in bands.zip(scales.chunks_mut(columns.div_ceil(across).max(1))) {
        for (block, scale) in scales.iter_mut().enumerate() {
            let part = block * across..columns.min((block + 1) * across);
            let largest = values
                .chunks(columns)
                .flat_map(|row| &row[part.clone()])
                .fold(0.0f32, |largest, w| largest.max(w.abs()));
            // A block of zeros has any scale; one so small that its scale would be subnormal, the least.
            *scale = if largest > 0.0 { (largest / LARGEST).max(f32::MIN_POSITIVE) } else { 1.0 };
            for (row, codes) in values.chunks(columns).zip(codes.chunks_mut(columns)) {
                for (w, code) in row[part.clone()].iter().zip(&mut codes[part.clone()]) {
                    *code = f32_to_fp8(w / *scale);
                    let error = f64::from(fp8_to_f32(*code) * *scale) - f64::from(*w);
                    squares.error += error * error;
                    squares.weight += f64::from(*w) * f64::from(*w);
                }
            }
        }
    }
    squares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_scaled_apart() {
        let mut values = vec![0.001f32; 4 * 6];
        values[0] = 448.0;
        let (mut codes, mut scales) = (vec![0; 24], vec![0.0; 4]);
        let squares = quantize(&values, 6, (2, 4), &mut codes, &mut scales);
        assert_eq!((scales[0], codes[0], codes[1]), (1.0, 0x7e, 1), "lost beside the large one");
        assert!(codes[6 * 2..].iter().all(|code| *code == 0x7e), "kept apart from it");
        assert!(squares.relative().unwrap() < 0.01);
        let zeros = quantize(&[0.0; 4], 4, (2, 2), &mut codes[..4], &mut scales[..2]);
        assert!(zeros.relative().is_none() && scales[..2] == [1.0; 2]);
        let nan = quantize(&[f32::NAN; 4], 4, (2, 2), &mut codes[..4], &mut scales[..2]);
        assert!(!nan.is_finite());
    }
}
