//! Sharing work between the pool's threads without unsafe code.
//!
//! Tasks take their pieces (disjoint slices, from iterators such as `chunks_mut`) one after the
//! other under a short lock. Which thread gets which piece is left to chance; results cannot depend
//! on it, as a piece is computed from shared inputs only. Nothing is allocated.

use kernels::Pool;
use parking_lot::Mutex;

/// Rows that one task takes of work that is short for each.
pub(crate) const ROWS: usize = 16;

/// Runs `f` once for each of the `tasks` items of `items`.
pub(crate) fn for_each<I>(pool: &Pool, tasks: usize, items: I, f: impl Fn(I::Item) + Sync)
where
    I: Iterator + Send,
{
    if tasks <= 1 || pool.threads() == 1 {
        items.take(tasks).for_each(f);
        return;
    }
    let items = Mutex::new(items);
    pool.run(tasks, &|_| {
        let next = items.lock().next();
        if let Some(item) = next {
            f(item);
        }
    });
}

/// Working memories that tasks borrow: as many come to exist as tasks run at once.
#[derive(Default)]
pub(crate) struct Arena<T> {
    free: Mutex<Vec<T>>,
}

impl<T: Default> Arena<T> {
    /// Runs `f` with one of the memories.
    pub fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> R {
        let taken = self.free.lock().pop();
        let mut memory = taken.unwrap_or_default();
        let result = f(&mut memory);
        self.free.lock().push(memory);
        result
    }
}

/// The first `len` elements, after growing the buffer to that many if it is shorter.
pub(crate) fn grown<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
    &mut buffer[..len]
}
