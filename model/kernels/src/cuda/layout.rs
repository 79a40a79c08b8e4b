//! How an expert lies in its slot: gate, up and down as `[n, k]` rows a multiple of 16 bytes apart (which tensor maps ask
//! for), then their scales. All slots of a device are alike, so that one tensor map reaches every expert's gate.

use thiserror::Error;

use crate::mat::{DType, Mat};

/// Edge of an FP8 block, and values that share an activation scale.
pub const BLOCK: usize = 128;
/// What parts of a slot begin at multiples of.
const ALIGN: usize = 256;

/// How weights, and activations with them, are coded in products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    /// e4m3, weights with a scale per 128 x 128 and activations per 1 x 128.
    Fp8,
    Bf16,
}

impl Coding {
    /// Bytes of a value.
    pub const fn size(self) -> usize {
        match self {
            Coding::Fp8 => 1,
            Coding::Bf16 => 2,
        }
    }
}

impl Mat<'_> {
    pub fn stored(&self) -> Stored {
        Stored { n: self.n(), k: self.k(), block: self.block() }
    }
}

/// An expert's sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertShape {
    pub hidden: usize,
    pub inner: usize,
    pub coding: Coding,
}

/// Weights that the GPU's kernels do not take.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LayoutError {
    #[error("fp8 weights in blocks of {bn} x {bk}: the GPU's kernels take {BLOCK} x {BLOCK}")]
    Block { bn: usize, bk: usize },
    #[error("an expert with fp8 and other weights: the GPU's kernels take either")]
    Mixed,
    #[error("an expert's weights [{n}, {k}] where [{want_n}, {want_k}] are expected")]
    Shape { n: usize, k: usize, want_n: usize, want_k: usize },
    #[error("an expert coded in {got:?} among experts coded in {want:?}")]
    Coding { got: Coding, want: Coding },
}

/// What is known of a weight without its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    pub n: usize,
    pub k: usize,
    /// Edges of its FP8 blocks, if it is in FP8.
    pub block: Option<(usize, usize)>,
}

impl Stored {
    /// How a product with it alone is coded: in FP8 if it is stored so that the kernels take it.
    pub fn coding(self) -> Coding {
        match self.block {
            Some((BLOCK, BLOCK)) => Coding::Fp8,
            _ => Coding::Bf16,
        }
    }
}

impl ExpertShape {
    /// The shape of gate, up and down.
    pub fn of(weights: &[Mat<'_>; 3]) -> Result<ExpertShape, LayoutError> {
        ExpertShape::of_stored(weights.each_ref().map(Mat::stored))
    }

    /// The same, before there are bytes.
    pub fn of_stored(weights: [Stored; 3]) -> Result<ExpertShape, LayoutError> {
        let coding = match weights.iter().filter(|weight| weight.block.is_some()).count() {
            0 => Coding::Bf16,
            3 => Coding::Fp8,
            _ => return Err(LayoutError::Mixed),
        };
        let mut blocks = weights.iter().filter_map(|weight| weight.block);
        if let Some((bn, bk)) = blocks.find(|&block| block != (BLOCK, BLOCK)) {
            return Err(LayoutError::Block { bn, bk });
        }
        let [gate, up, down] = weights;
        let shape = ExpertShape { hidden: gate.k, inner: gate.n, coding };
        for (weight, (n, k)) in
            [(up, (shape.inner, shape.hidden)), (down, (shape.hidden, shape.inner))]
        {
            if (weight.n, weight.k) != (n, k) {
                return Err(LayoutError::Shape { n: weight.n, k: weight.k, want_n: n, want_k: k });
            }
        }
        Ok(shape)
    }
}

/// One weight within a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    pub n: usize,
    pub k: usize,
    /// First byte in the slot.
    pub at: usize,
    /// Bytes from row to row.
    pub stride: usize,
    /// First byte of its scales, f32 `[n / 128, k / 128]`; FP8 only.
    pub scales: usize,
}

/// See the module's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub shape: ExpertShape,
    /// Gate, up, down.
    pub parts: [Part; 3],
    /// Bytes of a slot.
    pub bytes: usize,
}

/// Bytes between rows of `k` values.
pub fn stride(k: usize, coding: Coding) -> usize {
    (k * coding.size()).next_multiple_of(16)
}

impl Layout {
    pub fn new(shape: ExpertShape) -> Layout {
        let ExpertShape { hidden, inner, coding } = shape;
        let mut end = 0;
        let mut place = |bytes: usize| {
            let at = end;
            end = (at + bytes).next_multiple_of(ALIGN);
            at
        };
        let parts = [(inner, hidden), (inner, hidden), (hidden, inner)].map(|(n, k)| {
            let stride = stride(k, coding);
            Part { n, k, at: place(n * stride), stride, scales: 0 }
        });
        let parts = parts.map(|part| match coding {
            Coding::Fp8 => {
                let scales = part.n.div_ceil(BLOCK) * part.k.div_ceil(BLOCK) * 4;
                Part { scales: place(scales), ..part }
            }
            Coding::Bf16 => part,
        });
        Layout { shape, parts, bytes: end.max(ALIGN) }
    }

    /// Writes gate, up and down into a slot's bytes; f32 weights are rounded to bf16. Panics if there are fewer bytes than a
    /// slot's.
    pub fn pack(&self, weights: &[Mat<'_>; 3], slot: &mut [u8]) -> Result<(), LayoutError> {
        let shape = ExpertShape::of(weights)?;
        if shape.coding != self.shape.coding {
            return Err(LayoutError::Coding { got: shape.coding, want: self.shape.coding });
        }
        for (mat, part) in weights.iter().zip(&self.parts) {
            let Part { n, k, at, stride, scales } = *part;
            if (mat.n(), mat.k()) != (n, k) {
                return Err(LayoutError::Shape { n: mat.n(), k: mat.k(), want_n: n, want_k: k });
            }
            for (row, to) in slot[at..at + n * stride].chunks_exact_mut(stride.max(1)).enumerate() {
                let from = mat.row_bytes(row);
                let (values, padding) = to.split_at_mut(k * shape.coding.size());
                match mat.dtype() {
                    DType::F32 => {
                        let wide = from.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x));
                        for (to, x) in values.as_chunks_mut::<2>().0.iter_mut().zip(wide) {
                            *to = crate::round_bf16(x).to_le_bytes();
                        }
                    }
                    DType::Bf16 | DType::Fp8 => values.copy_from_slice(from),
                }
                padding.fill(0);
            }
            let Some(table) = mat.scales() else { continue };
            let columns = k.div_ceil(BLOCK);
            for block in 0..n.div_ceil(BLOCK) {
                let to = &mut slot[scales + block * columns * 4..][..columns * 4];
                to.copy_from_slice(table.row(block * BLOCK)[..columns].as_flattened());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Deterministic bytes that are no NaN codes.
    fn bytes(len: usize, seed: u8) -> Vec<u8> {
        (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed) & 0xf7).collect()
    }

    #[test]
    fn deepseek_v3_fits_without_padding() {
        let shape = ExpertShape { hidden: 7168, inner: 2048, coding: Coding::Fp8 };
        let layout = Layout::new(shape);
        let scales = 3 * 16 * 56 * 4;
        assert_eq!(layout.bytes, 3 * 7168 * 2048 + scales);
        assert_eq!(layout.bytes * 256 / 1_000_000_000, 11);
    }

    #[test]
    fn parts_do_not_overlap_and_are_aligned() {
        for (hidden, inner) in [(256, 64), (200, 72), (7168, 2048), (129, 1), (1, 129)] {
            for coding in [Coding::Fp8, Coding::Bf16] {
                let layout = Layout::new(ExpertShape { hidden, inner, coding });
                let mut spans: Vec<(usize, usize)> = Vec::new();
                for part in layout.parts {
                    assert_eq!(part.stride % 16, 0);
                    spans.push((part.at, part.n * part.stride));
                    if coding == Coding::Fp8 {
                        spans.push((part.scales, part.n.div_ceil(128) * part.k.div_ceil(128) * 4));
                    }
                }
                spans.sort_unstable();
                let ends = spans.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0);
                assert!(ends && spans.iter().all(|(at, _)| at % ALIGN == 0), "{spans:?}");
                let (at, len) = spans[spans.len() - 1];
                assert!(at + len <= layout.bytes && layout.bytes.is_multiple_of(ALIGN));
            }
        }
    }

    #[test]
    fn what_is_packed_is_what_was_stored() {
        let (hidden, inner) = (200, 136);
        let codes: [Vec<u8>; 3] = [1, 2, 3].map(|seed| bytes(hidden * inner, seed));
        let scales: [Vec<u8>; 3] = [4, 5, 6].map(|seed| bytes(2 * 2 * 4, seed));
        let mat = |i: usize, n, k| Mat::fp8(&codes[i], &scales[i], n, k, (128, 128)).unwrap();
        let weights = [mat(0, inner, hidden), mat(1, inner, hidden), mat(2, hidden, inner)];
        let layout = Layout::new(ExpertShape::of(&weights).unwrap());
        let mut slot = vec![0xaa; layout.bytes];
        layout.pack(&weights, &mut slot).unwrap();
        for (i, part) in layout.parts.iter().enumerate() {
            for row in 0..part.n {
                let at = part.at + row * part.stride;
                assert_eq!(slot[at..at + part.k], codes[i][row * part.k..][..part.k]);
                assert!(slot[at + part.k..at + part.stride].iter().all(|byte| *byte == 0));
            }
            assert_eq!(slot[part.scales..][..16], scales[i]);
        }
    }

    #[test]
    fn f32_weights_are_rounded_and_others_refused() {
        let wide: Vec<f32> = (0..24).map(|i| i as f32 * 1.003).collect();
        let narrow: Vec<_> = wide.iter().map(|x| crate::round_bf16(*x)).collect();
        let of = |n, k| Mat::from_f32(&wide, n, k).unwrap();
        let weights = [of(4, 6), of(4, 6), of(6, 4)];
        let layout = Layout::new(ExpertShape::of(&weights).unwrap());
        let mut slot = vec![0; layout.bytes];
        layout.pack(&weights, &mut slot).unwrap();
        assert_eq!(slot[..12], *bytemuck::cast_slice::<_, u8>(&narrow[..6]));

        let codes = bytes(24, 1);
        let fp8 = |n, k, bn| Mat::fp8(&codes, &codes[..4], n, k, (bn, 128)).unwrap();
        let mixed = [fp8(4, 6, 128), of(4, 6), of(6, 4)];
        assert_eq!(ExpertShape::of(&mixed), Err(LayoutError::Mixed));
        let blocks = [fp8(4, 6, 64), fp8(4, 6, 64), fp8(6, 4, 64)];
        assert_eq!(ExpertShape::of(&blocks), Err(LayoutError::Block { bn: 64, bk: 128 }));
        let uneven = [of(4, 6), of(6, 4), of(6, 4)];
        let expected = LayoutError::Shape { n: 6, k: 4, want_n: 4, want_k: 6 };
        assert_eq!(ExpertShape::of(&uneven), Err(expected));
        let whole = [fp8(4, 6, 128), fp8(4, 6, 128), fp8(6, 4, 128)];
        let expected = LayoutError::Coding { got: Coding::Fp8, want: Coding::Bf16 };
        assert_eq!(layout.pack(&whole, &mut slot), Err(expected));
    }
}
