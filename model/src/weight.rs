//! A weight matrix that stays where it is: in the mapped checkpoint.
//!
//! Holds offsets only, so that it can live beside the `Arc` of its checkpoint without borrowing
//! from it. Lengths and types were checked when it was looked up; making a view of it cannot fail.

use kernels::Mat;

use crate::checkpoint::Checkpoint;

/// Bytes that the system reads at once, at least.
const PAGE: usize = 4096;

/// Bytes of one mapped file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    /// Index of the file in its checkpoint.
    pub file: u32,
    /// First byte.
    pub start: usize,
    /// Bytes.
    pub len: usize,
}

#[derive(Clone, Copy, Debug)]
enum Stored {
    F32,
    Bf16,
    Fp8 { scales: Span, block: (usize, usize) },
}

/// A matrix `[n, k]` of a checkpoint.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weight {
    n: usize,
    k: usize,
    span: Span,
    stored: Stored,
}

impl Weight {
    pub fn f32(span: Span, n: usize, k: usize) -> Self {
        Weight { n, k, span, stored: Stored::F32 }
    }

    pub fn bf16(span: Span, n: usize, k: usize) -> Self {
        Weight { n, k, span, stored: Stored::Bf16 }
    }

    pub fn fp8(span: Span, scales: Span, block: (usize, usize), n: usize, k: usize) -> Self {
        Weight { n, k, span, stored: Stored::Fp8 { scales, block } }
    }

    /// Rows: outputs of the product.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Columns: inputs of the product.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes as stored, scales included.
    pub fn bytes(&self) -> usize {
        match self.stored {
            Stored::Fp8 { scales, .. } => self.span.len + scales.len,
            _ => self.span.len,
        }
    }

    /// Where its bytes are: values, then scales.
    pub fn spans(&self) -> impl Iterator<Item = Span> + use<> {
        let scales = match self.stored {
            Stored::Fp8 { scales, .. } => Some(scales),
            _ => None,
        };
        std::iter::once(self.span).chain(scales)
    }

    /// The same matrix with its bytes elsewhere: one after the other in the order of
    /// [`spans`](Self::spans), from `next` of file 0 on, which is moved behind them.
    pub fn moved(self, next: &mut usize) -> Self {
        let mut place = |span: Span| {
            let start = std::mem::replace(next, *next + span.len);
            Span { file: 0, start, len: span.len }
        };
        let span = place(self.span);
        let stored = match self.stored {
            Stored::Fp8 { scales, block } => Stored::Fp8 { scales: place(scales), block },
            other => other,
        };
        Weight { span, stored, ..self }
    }

    /// The view that the kernels take; `from` is the checkpoint that it was looked up in.
    pub fn mat<'a>(&self, from: &'a Checkpoint) -> Mat<'a> {
        let bytes = from.span(self.span);
        let mat = match self.stored {
            Stored::F32 => Mat::f32(bytes, self.n, self.k),
            Stored::Bf16 => Mat::bf16(bytes, self.n, self.k),
            Stored::Fp8 { scales, block } => {
                Mat::fp8(bytes, from.span(scales), self.n, self.k, block)
            }
        };
        mat.expect("lengths were checked against the shape when the checkpoint was opened")
    }

    /// Starts reading the bytes; only a hint.
    pub fn prefetch(&self, from: &Checkpoint) {
        from.prefetch(self.span);
        if let Stored::Fp8 { scales, .. } = self.stored {
            from.prefetch(scales);
        }
    }

    /// Reads the bytes in, so that whoever uses them next waits for no disk.
    pub fn warm(&self, from: &Checkpoint) {
        self.prefetch(from);
        let scales = match self.stored {
            Stored::Fp8 { scales, .. } => from.span(scales),
            _ => &[],
        };
        for bytes in [from.span(self.span), scales] {
            let pages = bytes.iter().step_by(PAGE);
            std::hint::black_box(pages.fold(0, |sum: u8, byte| sum.wrapping_add(*byte)));
        }
    }
}
