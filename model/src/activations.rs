//! Activations in the numerics class's type: rounding into a product, and rows as they travel.
//!
//! Rows on the wire are little-endian values of the class, row-major. Frames carry them at any
//! alignment, so a row is copied where it does not happen to lie well.

use half::bf16;
use kernels::{Acts, Kernels};

use crate::numerics::Numerics;
use crate::parallel::grown;

/// `x` as the class takes it into a product: itself, or rounded into `buffer`.
pub(crate) fn rounded<'a>(
    kernels: Kernels,
    numerics: Numerics,
    x: &'a [f32],
    buffer: &'a mut Vec<bf16>,
) -> Acts<'a> {
    match numerics {
        Numerics::F32 => Acts::F32(x),
        Numerics::Bf16 => {
            let out = grown(buffer, x.len());
            kernels.to_bf16(x, out);
            Acts::Bf16(out)
        }
    }
}

/// Activations of either class, written a piece at a time by several tasks.
#[derive(Default)]
pub(crate) struct ClassRows {
    f32: Vec<f32>,
    bf16: Vec<bf16>,
}

impl ClassRows {
    /// The first `len` values, to be written.
    pub fn grow(&mut self, numerics: Numerics, len: usize) -> ActsMut<'_> {
        match numerics {
            Numerics::F32 => ActsMut::F32(grown(&mut self.f32, len)),
            Numerics::Bf16 => ActsMut::Bf16(grown(&mut self.bf16, len)),
        }
    }

    /// The first `len` values, which have been written.
    pub fn acts(&self, numerics: Numerics, len: usize) -> Acts<'_> {
        match numerics {
            Numerics::F32 => Acts::F32(&self.f32[..len]),
            Numerics::Bf16 => Acts::Bf16(&self.bf16[..len]),
        }
    }
}

/// Activations to be written.
pub(crate) enum ActsMut<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [bf16]),
}

impl<'a> ActsMut<'a> {
    /// Takes the first `len` values off. Panics if there are fewer.
    pub fn take(&mut self, len: usize) -> ActsMut<'a> {
        match self {
            ActsMut::F32(rest) => {
                let (first, after) = std::mem::take(rest).split_at_mut(len);
                *rest = after;
                ActsMut::F32(first)
            }
            ActsMut::Bf16(rest) => {
                let (first, after) = std::mem::take(rest).split_at_mut(len);
                *rest = after;
                ActsMut::Bf16(first)
            }
        }
    }

    /// Writes `x` from value `at` on, rounded to the class.
    pub fn put(&mut self, kernels: Kernels, at: usize, x: &[f32]) {
        match self {
            ActsMut::F32(out) => out[at..at + x.len()].copy_from_slice(x),
            ActsMut::Bf16(out) => kernels.to_bf16(x, &mut out[at..at + x.len()]),
        }
    }
}

/// The bytes of `acts` as rows on the wire.
pub(crate) fn as_wire(acts: Acts<'_>) -> &[u8] {
    match acts {
        Acts::F32(x) => bytemuck::cast_slice(x),
        Acts::Bf16(x) => bytemuck::cast_slice(x),
    }
}

/// Aligned copies of wire rows, where they are needed.
#[derive(Default)]
pub(crate) struct WireScratch {
    f32: Vec<f32>,
    bf16: Vec<bf16>,
}

/// Wire rows as activations, without a copy if they are aligned. `bytes` holds whole values.
pub(crate) fn from_wire<'a>(
    numerics: Numerics,
    bytes: &'a [u8],
    scratch: &'a mut WireScratch,
) -> Acts<'a> {
    match numerics {
        Numerics::F32 => match bytemuck::try_cast_slice(bytes) {
            Ok(x) => Acts::F32(x),
            Err(_) => {
                let out = grown(&mut scratch.f32, bytes.len() / 4);
                bytemuck::cast_slice_mut(out).copy_from_slice(bytes);
                Acts::F32(out)
            }
        },
        Numerics::Bf16 => match bytemuck::try_cast_slice(bytes) {
            Ok(x) => Acts::Bf16(x),
            Err(_) => {
                let out = grown(&mut scratch.bf16, bytes.len() / 2);
                bytemuck::cast_slice_mut(out).copy_from_slice(bytes);
                Acts::Bf16(out)
            }
        },
    }
}

/// Writes `x` to `out` as a wire row of the class; `bf16` is working memory.
pub(crate) fn to_wire(
    kernels: Kernels,
    numerics: Numerics,
    x: &[f32],
    buffer: &mut Vec<bf16>,
    out: &mut [u8],
) {
    out.copy_from_slice(as_wire(rounded(kernels, numerics, x, buffer)));
}
