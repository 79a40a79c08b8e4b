//! The bound on rows that wait for the executor, over all streams. What does
//! not fit is refused as `BUSY` before anything is kept of it.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// See the module's text.
pub struct Admission {
    queued: AtomicUsize,
    /// Rows that were queued once and are no longer.
    left: AtomicU64,
    limit: usize,
    pub refused: AtomicU64,
}

impl Admission {
    pub fn new(limit: usize) -> Self {
        let (left, refused) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { queued: AtomicUsize::new(0), left, limit, refused }
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
        self.left.fetch_add(rows as u64, Ordering::AcqRel);
    }

    /// Rows that have been let in so far.
    pub fn entered(&self) -> u64 {
        self.left() + self.queued() as u64
    }

    /// Rows that have been let in and are queued no longer. They leave in the order
    /// in which they came, and are computed before anything else happens.
    pub fn left(&self) -> u64 {
        self.left.load(Ordering::Acquire)
    }

    pub fn queued(&self) -> usize {
        self.queued.load(Ordering::Acquire)
    }
}
