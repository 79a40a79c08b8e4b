//! What the model layer computes with: a device and a pool of threads.
//!
//! Products are split over threads by output columns, which changes no bit of them. Work too small to be
//! worth a thread runs where it is called.

use crate::device::{Device, Kernels};
use crate::isa::Isa;
use crate::lanes::STEP;
use crate::mat::{Acts, Mat};
use crate::packed::{Out, Packed};
use crate::pool::Pool;
use half::bf16;
use std::cell::RefCell;
use std::ops::Range;

/// Multiplications below which waking another thread costs more than it saves.
const SMALL: usize = 1 << 16;
/// Outputs in a chunk are a multiple of this, the panel that many rows share.
const CHUNK: usize = 16;
/// Chunks per thread, so that a thread that is held up leaves its share to the others.
const CHUNKS_PER_THREAD: usize = 4;
/// Rows of an elementwise function that a thread takes at a time.
const PIECE_ROWS: usize = 16;

thread_local! {
    static PACKED: RefCell<Packed> = RefCell::new(Packed::new());
}

/// A gated layer's result, packed for the product after it, and the memory that it is worked out in.
#[derive(Default)]
pub struct Gated {
    x: Packed,
    gate: Vec<f32>,
    up: Vec<f32>,
    rounded: Vec<bf16>,
    h: Packed,
}

impl Gated {
    /// What was computed last.
    pub fn h(&self) -> &Packed {
        &self.h
    }

    /// `silu(x gateᵀ) * (x upᵀ)` in the type of `x`, packed for `down`; `x` is `[rows, gate.k()]`. On the threads of `pool`
    /// if there is one, which changes no bit.
    pub fn fill(
        &mut self,
        device: &dyn Device,
        pool: Option<&Pool>,
        x: Acts<'_>,
        rows: usize,
        [gate, up, down]: [Mat<'_>; 3],
    ) {
        let Gated { x: packed, gate: a, up: b, rounded, h } = self;
        device.pack_on(pool, x, rows, gate, packed);
        if let Some(mut h) = device.inner(packed, gate, up, down, h) {
            let Some((pool, chunk)) = shares(pool, packed, 2 * gate.n(), gate.k()) else {
                return device.gated_packed(packed, gate, up, &mut h);
            };
            let (h, packed) = (&h, &*packed);
            let chunk = (chunk / 2).next_multiple_of(STEP);
            return by_columns(pool, gate.n(), chunk, &|columns| {
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
        both(device, pool, x, rows, packed, [gate, up], [&mut *a, &mut *b]);
        let piece = PIECE_ROWS * gate.n();
        Pool::pieces(pool, a, piece, |i, gate| {
            device.swiglu(gate, &b[i * piece..][..gate.len()]);
        });
        match x {
            Acts::F32(_) => device.pack_on(pool, Acts::F32(a), rows, down, h),
            Acts::Bf16(_) => {
                rounded.resize(rounded.len().max(values), bf16::ZERO);
                let rounded = &mut rounded[..values];
                Pool::pieces(pool, rounded, piece, |i, rounded| {
                    device.to_bf16(&a[i * piece..][..rounded.len()], rounded);
                });
                device.pack_on(pool, Acts::Bf16(rounded), rows, down, h);
            }
        }
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
        products(&*self.kernels, Some(&self.pool), x, [w], [y]);
    }

    /// As [`Compute::matmul`] of two weights of the same `k`, one output of `y` each. The activations are left in `packed`.
    pub fn matmul_both(
        &self,
        x: Acts<'_>,
        rows: usize,
        w: [Mat<'_>; 2],
        packed: &mut Packed,
        y: [&mut [f32]; 2],
    ) {
        self.pack(x, rows, w[0], packed);
        both(&*self.kernels, Some(&self.pool), x, rows, packed, w, y);
    }

    /// As [`Gated::fill`], on all threads.
    pub fn gated(&self, x: Acts<'_>, rows: usize, weights: [Mat<'_>; 3], into: &mut Gated) {
        into.fill(&*self.kernels, Some(&self.pool), x, rows, weights);
    }
}

/// Products of the same activations, which are `packed` for the first weight.
fn both(
    device: &dyn Device,
    pool: Option<&Pool>,
    x: Acts<'_>,
    rows: usize,
    packed: &mut Packed,
    w: [Mat<'_>; 2],
    y: [&mut [f32]; 2],
) {
    if packed.suits(w[1]) {
        return products(device, pool, packed, w, y);
    }
    let [first, second] = y;
    products(device, pool, packed, [w[0]], [first]);
    device.pack_on(pool, x, rows, w[1], packed);
    products(device, pool, packed, [w[1]], [second]);
}

/// For each weight, `y[r, n] = sum over k of x[r, k] w[n, k]`: `y` is `[x.rows(), w.n()]`. Threads take the columns of all as
/// if they were one's, and so wait for each other once.
fn products<const N: usize>(
    device: &dyn Device,
    pool: Option<&Pool>,
    x: &Packed,
    w: [Mat<'_>; N],
    y: [&mut [f32]; N],
) {
    let mut y = y.into_iter().zip(&w).map(|(y, w)| Out::new(y, x.rows(), w.n(), w.n()));
    let mut y: [Out<'_>; N] = std::array::from_fn(|_| y.next().expect("an output each"));
    let n = w.iter().map(Mat::n).sum();
    let Some((pool, chunk)) = shares(pool, x, n, w[0].k()) else {
        return w.iter().zip(&mut y).for_each(|(w, y)| device.matmul_packed(x, *w, y));
    };
    by_columns(pool, n, chunk, &|columns| {
        let mut before = 0;
        for (w, y) in w.iter().zip(&y) {
            let within = |column: usize| column.saturating_sub(before).min(w.n());
            let columns = within(columns.start)..within(columns.end);
            before += w.n();
            if !columns.is_empty() {
                // SAFETY: each task has columns of its own, and the output is borrowed for as long as the pool runs.
                let mut y = unsafe { y.cols(columns.clone()) };
                device.matmul_packed(x, w.rows(columns), &mut y);
            }
        }
    });
}

/// The threads to share products with, of `n` outputs over `k`, and the outputs that one takes at a time; none if they are
/// worth one thread only.
fn shares<'p>(pool: Option<&'p Pool>, x: &Packed, n: usize, k: usize) -> Option<(&'p Pool, usize)> {
    let pool = pool?;
    let work = x.rows().saturating_mul(n).saturating_mul(k);
    let shared = pool.threads() > 1 && work >= SMALL && n > CHUNK;
    let chunk = || n.div_ceil(pool.threads() * CHUNKS_PER_THREAD).next_multiple_of(CHUNK);
    shared.then(|| (pool, chunk()))
}

fn by_columns(pool: &Pool, n: usize, chunk: usize, f: &(dyn Fn(Range<usize>) + Sync)) {
    let chunks = n.div_ceil(chunk);
    pool.run(chunks, &|i| {
        let i = in_runs(i, chunks, pool.threads());
        f(i * chunk..n.min((i + 1) * chunk));
    });
}

/// The chunk that task `i` is, of `chunks` that `threads` threads take in turns: each thread's follow each other, so that
/// what it asks for ahead of one is the beginning of its next.
fn in_runs(i: usize, chunks: usize, threads: usize) -> usize {
    let (each, more) = (chunks / threads, chunks % threads);
    let (turn, thread) = (i / threads, i % threads);
    // The first `more` threads have one more each.
    thread * each + thread.min(more) + turn
}

#[cfg(test)]
mod tests {
    use super::in_runs;

    #[test]
    fn each_chunk_is_one_task_and_a_threads_follow_each_other() {
        for (chunks, threads) in [(8, 2), (7, 2), (1, 3), (2, 3), (13, 4), (16, 1)] {
            let order: Vec<usize> = (0..chunks).map(|i| in_runs(i, chunks, threads)).collect();
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert!(sorted.into_iter().eq(0..chunks), "{chunks} on {threads}: {order:?}");
            for i in threads..chunks {
                assert_eq!(order[i], order[i - threads] + 1, "{chunks} on {threads}: {order:?}");
            }
        }
    }
}
