//! Which frame has which place in a segment: the lowest that is free. Places are few, and frames
//! mostly come and go in turns, so the same memory is used again and stays in caches.

/// Where places begin, so that two processes do not write to one cache line.
const LINE: usize = 64;

/// A frame's place: for its rows, and when they have been read for its results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    pub ticket: u64,
    pub at: usize,
    pub rows: usize,
    pub results: usize,
}

impl Taken {
    pub fn end(&self) -> usize {
        self.at + self.rows.max(self.results)
    }
}

/// See the module's text.
pub struct Places {
    /// Of the segment, in bytes.
    from: usize,
    size: usize,
    most: usize,
    /// In the order in which they lie.
    taken: Vec<Taken>,
}

impl Places {
    /// Of `size` bytes without the first `from`, for at most `most` frames; allocates no more later.
    pub fn new(from: usize, size: usize, most: usize) -> Self {
        Self { from, size, most, taken: Vec::with_capacity(most) }
    }

    /// None if there is no room.
    pub fn take(&mut self, ticket: u64, rows: usize, results: usize) -> Option<Taken> {
        if self.taken.len() == self.most {
            return None;
        }
        let all = rows.max(results).checked_next_multiple_of(LINE)?;
        let mut free = self.from;
        let mut index = 0;
        while let Some(next) = self.taken.get(index)
            && next.at - free < all
        {
            free = next.end().next_multiple_of(LINE);
            index += 1;
        }
        let fits = free.checked_add(all).is_some_and(|end| end <= self.size);
        let taken = Taken { ticket, at: free, rows, results };
        fits.then(|| {
            self.taken.insert(index, taken);
            taken
        })
    }

    /// The frame's place, which is free from now on.
    pub fn give_back(&mut self, ticket: u64) -> Option<Taken> {
        let at = self.taken.iter().position(|taken| taken.ticket == ticket)?;
        Some(self.taken.remove(at))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever comes and goes: places lie within, apart, and all memory comes back.
        #[test]
        fn places_never_meet(steps in prop::collection::vec(
            (any::<bool>(), any::<prop::sample::Index>(), 0usize..700, 0usize..900), 0..80,
        )) {
            const FROM: usize = 1024;
            const SIZE: usize = 5120;
            let mut places = Places::new(FROM, SIZE, 5);
            let mut held: Vec<Taken> = Vec::new();
            for (ticket, (take, which, rows, results)) in (0..).zip(steps) {
                if !take && !held.is_empty() {
                    let gone = held.swap_remove(which.index(held.len()));
                    prop_assert_eq!(places.give_back(gone.ticket), Some(gone));
                    prop_assert_eq!(places.give_back(gone.ticket), None);
                    continue;
                }
                match places.take(ticket, rows, results) {
                    Some(taken) => {
                        prop_assert!(held.len() < 5);
                        prop_assert_eq!((taken.ticket, taken.rows, taken.results), (ticket, rows, results));
                        prop_assert!(taken.at >= FROM && taken.end() <= SIZE && taken.at % LINE == 0);
                        let apart = |other: &Taken| {
                            taken.end() <= other.at || other.end() <= taken.at
                        };
                        prop_assert!(held.iter().all(apart));
                        held.push(taken);
                    }
                    // Nothing is refused for nothing.
                    None => prop_assert!(!held.is_empty()),
                }
            }
            for taken in held {
                places.give_back(taken.ticket);
            }
            prop_assert!(places.take(u64::MAX, 1, SIZE - FROM).is_some());
            prop_assert!(places.take(0, 1, 0).is_none());
        }
    }

    #[test]
    fn lengths_that_cannot_be_are_refused() {
        let mut places = Places::new(0, 4096, 5);
        for (rows, results) in [(usize::MAX, 1), (1, usize::MAX), (4097, 1), (0, 4097)] {
            assert_eq!(places.take(1, rows, results), None);
        }
    }
}
