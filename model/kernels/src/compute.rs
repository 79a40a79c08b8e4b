//! What the model layer computes with: a device and a pool of threads.
//!
//! Products are split over threads by output columns, which changes no bit of them. Work too small to be
//! worth a thread runs where it is called.

use crate::device::Kernels;
use crate::isa::Isa;
use crate::lanes::STEP;
use crate::mat::{Acts, Mat};
use crate::packed::{Out, Packed};
use crate::pool::Pool;
use half::bf16;
use std::cell::RefCell;
use std::ops::Range;

/// Multiplications below which waking another thread costs more than it saves.
const SMALL: usize = 1 << 18;
/// Outputs in a chunk are a multiple of this, the panel that many rows share.
const CHUNK: usize = 16;
/// Chunks per thread, so that a thread that is held up leaves its share to the others.
const CHUNKS_PER_THREAD: usize = 4;
/// Rows of an elementwise function that a thread takes at a time.
const PIECE_ROWS: usize = 16;

thread_local! {
    static PACKED: RefCell<Packed> = RefCell::new(Packed::new());
}

/// Reusable working memory of [`Compute::gated`], and its result.
#[derive(Default)]
pub struct Gated {
    x: Packed,
    gate: Vec<f32>,
    up: Vec<f32>,
    rounded: Vec<bf16>,
    h: Packed,
}

impl Gated {
    /// What [`Compute::gated`] computed last.
    pub fn h(&self) -> &Packed {
        &self.h
    }
}

/// A device and the threads it is used on.
#[derive(Debug)]
pub struct Compute {
    pub kernels: Kernels,
    pub pool: Pool,
}

impl Compute {
    /// The device of `isa`, which must be available (see [`Kernels::new`]), on `threads` threads.
    pub fn new(isa: Isa, threads: usize) -> Compute {
        Compute { kernels: Kernels::new(isa), pool: Pool::new(threads) }
    }

    /// [`Compute::new`], with threads bound to CPUs if there is a `first` (see [`Pool::bound`]).
    pub fn bound(isa: Isa, threads: usize, first: Option<usize>) -> Compute {
        let pool = first.map_or_else(|| Pool::new(threads), |first| Pool::bound(threads, first));
        Compute { kernels: Kernels::new(isa), pool }
    }

    /// `y[r, n] = sum over k of x[r, k] w[n, k]`: `x` is `[rows, w.k()]`, `y` `[rows, w.n()]`. The bits do not depend on
    /// the number of threads.
    pub fn matmul(&self, x: Acts<'_>, rows: usize, w: Mat<'_>, y: &mut [f32]) {
        let mut packed = PACKED.take();
        self.pack(x, rows, w, &mut packed);
        self.matmul_packed(&packed, w, y);
        PACKED.set(packed);
    }

    /// As [`crate::Device::pack`], on all threads.
    pub fn pack(&self, x: Acts<'_>, rows: usize, w: Mat<'_>, into: &mut Packed) {
        self.kernels.pack_on(Some(&self.pool), x, rows, w, into);
    }

    /// As [`Compute::matmul`], of packed activations.
    pub fn matmul_packed(&self, x: &Packed, w: Mat<'_>, y: &mut [f32]) {
        let (device, y) = (&*self.kernels, &mut Out::new(y, x.rows(), w.n(), w.n()));
        let Some(chunk) = self.chunk(x, w, 1) else { return device.matmul_packed(x, w, y) };
        let y = &*y;
        self.by_columns(w.n(), chunk, &|columns| {
            // SAFETY: each task has columns of its own, and the output is borrowed for as long as the pool runs.
            let mut y = unsafe { y.cols(columns.clone()) };
            device.matmul_packed(x, w.rows(columns), &mut y);
        });
    }

    /// `silu(x gateᵀ) * (x upᵀ)` in the type of `x`, packed into `h` for `down`; `x` is `[rows, gate.k()]`. The bits do not
    /// depend on the number of threads.
    pub fn gated(
        &self,
        x: Acts<'_>,
        rows: usize,
        [gate, up, down]: [Mat<'_>; 3],
        memory: &mut Gated,
    ) {
        let device = &*self.kernels;
        let Gated { x: packed, gate: a, up: b, rounded, h } = memory;
        self.pack(x, rows, gate, packed);
        if let Some(mut h) = device.inner(packed, gate, up, down, h) {
            let Some(chunk) = self.chunk(packed, gate, 2) else {
                return device.gated_packed(packed, gate, up, &mut h);
            };
            let (h, packed) = (&h, &*packed);
            return self.by_columns(gate.n(), chunk.next_multiple_of(STEP), &|columns| {
                // SAFETY: as for a product.
                let mut h = unsafe { h.cols(columns.clone()) };
                device.gated_packed(packed, gate.rows(columns.clone()), up.rows(columns), &mut h);
            });
        }
        let values = rows * gate.n();
        for sums in [&mut *a, &mut *b] {
            sums.resize(sums.len().max(values), 0.0);
        }
        let (a, b) = (&mut a[..values], &mut b[..values]);
        self.matmul_packed(packed, gate, a);
        if !packed.suits(up) {
            self.pack(x, rows, up, packed);
        }
        self.matmul_packed(packed, up, b);
        let piece = PIECE_ROWS * gate.n();
        Pool::pieces(Some(&self.pool), a, piece, |i, gate| {
            device.swiglu(gate, &b[i * piece..][..gate.len()]);
        });
        match x {
            Acts::F32(_) => self.pack(Acts::F32(a), rows, down, h),
            Acts::Bf16(_) => {
                rounded.resize(rounded.len().max(values), bf16::ZERO);
                let rounded = &mut rounded[..values];
                Pool::pieces(Some(&self.pool), rounded, piece, |i, rounded| {
                    device.to_bf16(&a[i * piece..][..rounded.len()], rounded);
                });
                self.pack(Acts::Bf16(rounded), rows, down, h);
            }
        }
    }

    /// Outputs of `w` that a thread takes at a time, of `each` such weights; none if all are worth one thread only.
    fn chunk(&self, x: &Packed, w: Mat<'_>, each: usize) -> Option<usize> {
        let (n, threads) = (w.n(), self.pool.threads());
        let work = x.rows().saturating_mul(n).saturating_mul(w.k()).saturating_mul(each);
        let shared = threads > 1 && work >= SMALL && n > CHUNK;
        shared.then(|| n.div_ceil(threads * CHUNKS_PER_THREAD).next_multiple_of(CHUNK))
    }

    fn by_columns(&self, n: usize, chunk: usize, f: &(dyn Fn(Range<usize>) + Sync)) {
        self.pool.run(n.div_ceil(chunk), &|i| f(i * chunk..n.min((i + 1) * chunk)));
    }
}
