//! What the model layer computes with: a device and a pool of threads.
//!
//! Products are split over threads by output columns, which changes no bit of them. Work too small to be
//! worth a thread runs where it is called.

use crate::device::{Device, Kernels};
use crate::isa::Isa;
use crate::mat::{Acts, Mat};
use crate::packed::{Out, Packed};
use crate::pool::Pool;
use std::cell::RefCell;

/// Multiplications below which waking another thread costs more than it saves.
const SMALL: usize = 1 << 18;
/// Outputs in a chunk are a multiple of this, the panel that many rows share.
const CHUNK: usize = 16;
/// Chunks per thread, so that a thread that is held up leaves its share to the others.
const CHUNKS_PER_THREAD: usize = 4;

thread_local! {
    static PACKED: RefCell<Packed> = RefCell::new(Packed::new());
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
        let (device, n) = (&*self.kernels, w.n());
        let mut packed = PACKED.take();
        device.pack(x, rows, w, &mut packed);
        self.columns(device, &packed, w, &mut Out::new(y, rows, n, n));
        PACKED.set(packed);
    }

    fn columns(&self, device: &dyn Device, x: &Packed, w: Mat<'_>, y: &mut Out<'_>) {
        let n = w.n();
        let work = x.rows().saturating_mul(n).saturating_mul(w.k());
        let threads = self.pool.threads();
        if threads == 1 || work < SMALL || n <= CHUNK {
            return device.matmul_packed(x, w, y);
        }
        let chunk = n.div_ceil(threads * CHUNKS_PER_THREAD).next_multiple_of(CHUNK);
        let y = &*y;
        self.pool.run(n.div_ceil(chunk), &|i| {
            let range = i * chunk..n.min((i + 1) * chunk);
            // SAFETY: each task has columns of its own, and the output is borrowed for as long as the pool runs.
            let mut y = unsafe { y.cols(range.clone()) };
            device.matmul_packed(x, w.rows(range), &mut y);
        });
    }
}
