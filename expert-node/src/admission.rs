//! The bound on rows that wait for the executor, over all streams. What does
//! not fit is refused as `BUSY` before anything is kept of it.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// See the module's text.
pub struct Admission {
    queued: AtomicUsize,
    limit: usize,
    pub refused: AtomicU64,
}

impl Admission {
    pub fn new(limit: usize) -> Self {
        Self { queued: AtomicUsize::new(0), limit, refused: AtomicU64::new(0) }
    }

    /// Takes room for `rows`, or refuses.
    pub fn enter(&self, rows: usize) -> bool {
        let fits = |queued: usize| (queued + rows <= self.limit).then_some(queued + rows);
        let entered = self.queued.fetch_update(Ordering::AcqRel, Ordering::Acquire, fits).is_ok();
        if !entered {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        entered
    }

    /// Gives back what [`Self::enter`] took.
    pub fn leave(&self, rows: usize) {
        self.queued.fetch_sub(rows, Ordering::AcqRel);
    }

    pub fn queued(&self) -> usize {
        self.queued.load(Ordering::Acquire)
    }
}
