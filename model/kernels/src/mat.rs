//! Operands of the matrix products, as the caller stores them.
//!
//! [`Mat`] is a view of a weight's little-endian bytes at any alignment (a mapped checkpoint), in f32, bf16 or
//! block-scaled FP8 (e4m3, one f32 scale per block); [`Acts`] is a batch of activation rows. Every length is
//! checked when a view is made, so the kernels behind it need no further bounds. Nothing here copies a weight,
//! and no block size is assumed: it comes with the matrix.

use half::bf16;
use std::ops::Range;
use thiserror::Error;

/// A byte length that does not fit the shape it was given with.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ShapeError {
    /// The weight's bytes are not `n * k` elements.
    #[error("weight [{n}, {k}] of {size} byte elements needs {need} bytes, has {have}")]
    Weight { n: usize, k: usize, size: usize, need: usize, have: usize },
    /// The scale table is not `ceil(n / bn) * ceil(k / bk)` f32 values.
    #[error("scales of [{n}, {k}] in blocks of {bn} x {bk} need {need} bytes, has {have}")]
    Scales { n: usize, k: usize, bn: usize, bk: usize, need: usize, have: usize },
    /// A block edge of zero.
    #[error("fp8 block of {bn} x {bk} is empty")]
    Block { bn: usize, bk: usize },
    /// `n * k` elements exceed the address space.
    #[error("weight [{n}, {k}] is too large")]
    Overflow { n: usize, k: usize },
    /// A sub-view outside its matrix.
    #[error("{axis} {start}..{end} are outside a matrix of {len}")]
    Range { axis: &'static str, start: usize, end: usize, len: usize },
}

/// How a weight's elements are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    F32,
    Bf16,
    /// e4m3 (fn), with one f32 scale per block.
    Fp8,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::Bf16 => 2,
            DType::Fp8 => 1,
        }
    }
}

/// Activation rows, `[rows, k]` row-major. The element type chooses the numerics class of a product.
#[derive(Clone, Copy, Debug)]
pub enum Acts<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

impl<'a> Acts<'a> {
    /// Number of elements.
    pub const fn len(&self) -> usize {
        match self {
            Acts::F32(x) => x.len(),
            Acts::Bf16(x) => x.len(),
        }
    }

    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether any is at least `bound` in magnitude.
    pub(crate) fn any_from(&self, bound: f32) -> bool {
        // Every element is looked at, so that the loop becomes vector instructions.
        match self {
            Acts::F32(x) => x.iter().fold(false, |any, x| any | (x.abs() >= bound)),
            Acts::Bf16(x) => {
                let bound = bf16::from_f32(bound).to_bits();
                x.iter().fold(false, |any, x| any | (x.to_bits() & 0x7fff >= bound))
            }
        }
    }

    /// Elements `range` of the flat buffer. Panics outside it, as slicing does.
    pub fn slice(self, range: Range<usize>) -> Acts<'a> {
        match self {
            Acts::F32(x) => Acts::F32(&x[range]),
            Acts::Bf16(x) => Acts::Bf16(&x[range]),
        }
    }
}

/// The scale table of an FP8 weight and where a view starts in it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scales<'a> {
    /// Little-endian f32 `[ceil(n / bn), ld]` of the whole weight.
    bytes: &'a [u8],
    /// Scales in one row of the table.
    ld: usize,
    bn: usize,
    pub(crate) bk: usize,
    /// First row and column of the view, in elements of the whole weight.
    row0: usize,
    pub(crate) col0: usize,
}

impl<'a> Scales<'a> {
    /// The scales of the view's row `row`, one for each of its k-blocks, as they are stored.
    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> &'a [[u8; 4]] {
        let at = ((self.row0 + row) / self.bn) * self.ld + self.col0 / self.bk;
        &self.bytes.as_chunks().0[at..]
    }
}

/// A weight `[n, k]` as it is stored: little-endian bytes of any alignment, possibly a view with a row stride.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a> {
    /// From the first element of the view's first row to the last element of its last.
    bytes: &'a [u8],
    n: usize,
    k: usize,
    /// Bytes from one row to the next.
    stride: usize,
    dtype: DType,
    scales: Option<Scales<'a>>,
}

impl<'a> Mat<'a> {
    /// An f32 weight `[n, k]` in `bytes`.
    pub fn f32(bytes: &'a [u8], n: usize, k: usize) -> Result<Mat<'a>, ShapeError> {
        Mat::plain(bytes, n, k, DType::F32)
    }

    /// A bf16 weight `[n, k]` in `bytes`.
    pub fn bf16(bytes: &'a [u8], n: usize, k: usize) -> Result<Mat<'a>, ShapeError> {
        Mat::plain(bytes, n, k, DType::Bf16)
    }

    /// An FP8 weight: e4m3 `codes` `[n, k]`, and `scales`, f32 little-endian `[ceil(n / bn), ceil(k / bk)]`, that
    /// multiply the codes of one block of `(bn, bk)`.
    pub fn fp8(
        codes: &'a [u8],
        scales: &'a [u8],
        n: usize,
        k: usize,
        (bn, bk): (usize, usize),
    ) -> Result<Mat<'a>, ShapeError> {
        let mat = Mat::plain(codes, n, k, DType::Fp8)?;
        if bn == 0 || bk == 0 {
            return Err(ShapeError::Block { bn, bk });
        }
        let ld = k.div_ceil(bk);
        let need = n
            .div_ceil(bn)
            .checked_mul(ld)
            .and_then(|e| e.checked_mul(4))
            .ok_or(ShapeError::Overflow { n, k })?;
        if scales.len() != need {
            return Err(ShapeError::Scales { n, k, bn, bk, need, have: scales.len() });
        }
        Ok(Mat { scales: Some(Scales { bytes: scales, ld, bn, bk, row0: 0, col0: 0 }), ..mat })
    }

    /// f32 values in memory, as a weight.
    pub fn from_f32(values: &'a [f32], n: usize, k: usize) -> Result<Mat<'a>, ShapeError> {
        Mat::f32(bytemuck::cast_slice(values), n, k)
    }

    /// bf16 values in memory, as a weight.
    pub fn from_bf16(values: &'a [bf16], n: usize, k: usize) -> Result<Mat<'a>, ShapeError> {
        Mat::bf16(bytemuck::cast_slice(values), n, k)
    }

    fn plain(bytes: &'a [u8], n: usize, k: usize, dtype: DType) -> Result<Mat<'a>, ShapeError> {
        let size = dtype.size();
        let need = n
            .checked_mul(k)
            .and_then(|e| e.checked_mul(size))
            .ok_or(ShapeError::Overflow { n, k })?;
        if bytes.len() != need {
            return Err(ShapeError::Weight { n, k, size, need, have: bytes.len() });
        }
        Ok(Mat { bytes, n, k, stride: k * size, dtype, scales: None })
    }

    /// Rows (outputs of [`crate::Device::matmul`]).
    pub const fn n(&self) -> usize {
        self.n
    }

    /// Columns (inputs of [`crate::Device::matmul`]).
    pub const fn k(&self) -> usize {
        self.k
    }

    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    /// Rows `range` as a view. FP8 rows keep their scales whether or not `range` starts at a block's edge.
    /// Panics outside the matrix, as slicing does.
    pub fn rows(self, range: Range<usize>) -> Mat<'a> {
        self.try_rows(range).unwrap_or_else(|e| panic!("{e}"))
    }

    /// Columns `range` as a view with the same row stride. FP8 columns keep their scales; the view's first k-block
    /// is then what is left of the block it starts in. Panics outside the matrix, as slicing does.
    pub fn cols(self, range: Range<usize>) -> Mat<'a> {
        self.try_cols(range).unwrap_or_else(|e| panic!("{e}"))
    }

    /// [`Mat::rows`] for a range that is not known to be inside.
    pub fn try_rows(self, Range { start, end }: Range<usize>) -> Result<Mat<'a>, ShapeError> {
        if start > end || end > self.n {
            return Err(ShapeError::Range { axis: "rows", start, end, len: self.n });
        }
        let scales = self.scales.map(|s| Scales { row0: s.row0 + start, ..s });
        Ok(Mat { scales, ..self.view(start, end - start, 0, self.k) })
    }

    /// [`Mat::cols`] for a range that is not known to be inside.
    pub fn try_cols(self, Range { start, end }: Range<usize>) -> Result<Mat<'a>, ShapeError> {
        if start > end || end > self.k {
            return Err(ShapeError::Range { axis: "columns", start, end, len: self.k });
        }
        let scales = self.scales.map(|s| Scales { col0: s.col0 + start, ..s });
        Ok(Mat { scales, ..self.view(0, self.n, start, end - start) })
    }

    fn view(self, row: usize, n: usize, col: usize, k: usize) -> Mat<'a> {
        let size = self.dtype.size();
        if n == 0 || k == 0 {
            return Mat { bytes: &[], n, k, ..self };
        }
        let start = row * self.stride + col * size;
        let end = start + (n - 1) * self.stride + k * size;
        Mat { bytes: &self.bytes[start..end], n, k, ..self }
    }

    /// Row `row` widened to f32; an FP8 element is its code times its scale, rounded once. `out` holds `k` values.
    pub fn row_to_f32(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.k, "a row of {} values", self.k);
        let bytes = self.row_bytes(row);
        match self.scales {
            None if self.dtype == DType::Bf16 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *o = bf16::from_le_bytes(*b).to_f32();
                }
            }
            None => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *o = f32::from_le_bytes(*b);
                }
            }
            Some(s) => {
                for ((from, to), scale) in self.segments().zip(s.row(row)) {
                    let scale = f32::from_le_bytes(*scale);
                    for (o, c) in out[from..to].iter_mut().zip(&bytes[from..to]) {
                        *o = fp8_to_f32(*c) * scale;
                    }
                }
            }
        }
    }

    /// The bytes of row `row`, `k` elements.
    pub fn row_bytes(&self, row: usize) -> &'a [u8] {
        assert!(row < self.n, "row {row} of {}", self.n);
        if self.k == 0 {
            return &[];
        }
        &self.bytes[row * self.stride..][..self.k * self.dtype.size()]
    }

    /// Bytes from one row to the next.
    pub(crate) const fn stride(&self) -> usize {
        self.stride
    }

    /// The edges of its FP8 blocks, if it is in FP8.
    pub(crate) fn block(&self) -> Option<(usize, usize)> {
        self.scales.map(|scales| (scales.bn, scales.bk))
    }

    pub(crate) fn scales(&self) -> Option<Scales<'a>> {
        self.scales
    }

    /// The stretches of k that share a scale, as element ranges; one for a weight without scales.
    pub(crate) fn segments(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (bk, offset) = match self.scales {
            Some(s) => (s.bk, s.col0 % s.bk),
            None => (self.k.max(1), 0),
        };
        let k = self.k;
        let edge = move |i: usize| (i.saturating_mul(bk)).saturating_sub(offset).min(k);
        let count = if k == 0 { 0 } else { (k + offset).div_ceil(bk) };
        (0..count).map(move |i| (edge(i), edge(i + 1)))
    }
}

/// The value of an e4m3 (fn) code: no infinities, 0x7f and 0xff are NaN.
pub fn fp8_to_f32(code: u8) -> f32 {
    if code & 0x7f == 0x7f {
        return f32::NAN;
    }
    // The code's exponent and mantissa placed under f32's exponent field are off by 127 - 7 in the exponent; the
    // multiplication puts that right and normalises subnormal codes, exactly.
    let bits = (u32::from(code & 0x80) << 24) | (u32::from(code & 0x7f) << 20);
    f32::from_bits(bits) * f32::from_bits((127 + 120) << 23)
}

/// The e4m3 (fn) code nearest to `x`, ties to even; beyond the largest value, that. NaN stays NaN.
pub fn f32_to_fp8(x: f32) -> u8 {
    const LARGEST: f32 = 448.0;
    /// Least normal value, 2^-6, and what puts its 1/8 steps into the lowest bits of an f32.
    const NORMAL: f32 = 1.0 / 64.0;
    const MAGIC: f32 = 16384.0;
    let sign = (x.to_bits() >> 24) as u8 & 0x80;
    let magnitude = x.abs();
    if magnitude.is_nan() {
        return sign | 0x7f;
    }
    let magnitude = magnitude.min(LARGEST);
    let code = if magnitude < NORMAL {
        // Steps of 2^-9; the addition rounds to even.
        (magnitude + MAGIC).to_bits() - MAGIC.to_bits()
    } else {
        let bits = magnitude.to_bits();
        let rounded = (bits + 0x7_ffff + ((bits >> 20) & 1)) >> 20;
        rounded - (120 << 3)
    };
    sign | code.min(0x7e) as u8
}

/// bf16 nearest to `x`, ties to even; NaN stays NaN. The one rounding every device uses.
pub fn round_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    bf16::from_bits(if x.is_nan() { (bits >> 16) as u16 | 0x40 } else { rounded as u16 })
}
