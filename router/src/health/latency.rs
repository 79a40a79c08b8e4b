//! How long frames take: by their size over all nodes, and by node in relation
//! to that. So a node's typical and bad times are known for sizes that it was
//! never sent. Times are seconds. Pure.

/// Weight of a new measurement.
const NEW: f64 = 0.05;
/// A measurement counts as at most so many times the mean of its size: one that
/// was waited out for seconds says nothing of the others.
const MOST: f64 = 4.0;
/// Weight of the first measurement after a silence, where it is better than the mean.
const FRESH: f64 = 0.5;
/// Sizes are told apart by powers of two.
const CLASSES: usize = u32::BITS as usize;

/// The average frame of one size.
#[derive(Clone, Copy, Debug)]
struct Point {
    slots: f64,
    seconds: f64,
}

/// Mean times by number of slots, over all nodes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sizes([Option<Point>; CLASSES]);

impl Sizes {
    /// Seconds that a frame of `slots` slots takes; `None` before anything was
    /// measured. More slots than ever seen take longer in proportion, which is
    /// the most they should, and fewer no longer.
    pub fn predict(&self, slots: usize) -> Option<f64> {
        let class = class(slots);
        if let Some(point) = self.0[class] {
            return Some(point.seconds);
        }
        let below = self.0[..class].iter().rev().flatten().next();
        let below = below.map(|point| point.seconds * slots as f64 / point.slots);
        let above = self.0[class..].iter().flatten().next().map(|point| point.seconds);
        match (below, above) {
            (Some(below), Some(above)) => Some(below.min(above)),
            (below, above) => below.or(above),
        }
    }

    pub fn observe(&mut self, slots: usize, seconds: f64) {
        let class = class(slots);
        let new = Point { slots: slots as f64, seconds };
        self.0[class] = Some(match self.0[class] {
            None => new,
            Some(old) => Point {
                slots: old.slots + (new.slots - old.slots) * NEW,
                seconds: old.seconds + (seconds.min(old.seconds * MOST) - old.seconds) * NEW,
            },
        });
    }
}

fn class(slots: usize) -> usize {
    (slots.max(1).ilog2() as usize).min(CLASSES - 1)
}

/// One node's times as multiples of the mean of their size.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pattern {
    /// Exponentially weighted mean.
    pub mean: f64,
    pub p95: f64,
    pub p99: f64,
    /// The node was sent nothing for a while, so what was measured may be over.
    pub is_old: bool,
}

impl Default for Pattern {
    /// Of a node of which nothing is known yet.
    fn default() -> Self {
        Self { mean: 1.0, p95: 2.0, p99: 4.0, is_old: false }
    }
}

impl Pattern {
    pub fn observe(&mut self, ratio: f64) {
        // Only towards better: the first answer after a silence may find caches cold.
        let new = if self.is_old && ratio < self.mean { FRESH } else { NEW };
        self.is_old = false;
        self.mean += (ratio.min(self.mean * MOST) - self.mean) * new;
        self.p95 = quantile(self.p95, ratio, 0.05, 1.1).max(self.mean);
        self.p99 = quantile(self.p99, ratio, 0.01, 1.25).max(self.p95);
    }
}

/// Moves an estimate of the value that a `part` of all exceed: up by the factor
/// `up` when it was exceeded, down else, by as much less as that happens more often.
fn quantile(estimate: f64, value: f64, part: f64, up: f64) -> f64 {
    if value > estimate {
        return estimate * up;
    }
    estimate * (1.0 - up.ln() * part / (1.0 - part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unseen_sizes_are_guessed_from_their_neighbours() {
        let mut sizes = Sizes::default();
        assert_eq!(sizes.predict(7), None);
        sizes.observe(4, 0.002);
        assert_eq!(sizes.predict(5), Some(0.002));
        assert_eq!(sizes.predict(4096), Some(2.048));
        assert_eq!(sizes.predict(1), Some(0.002));
        sizes.observe(2048, 0.1);
        assert_eq!((sizes.predict(64), sizes.predict(1024)), (Some(0.032), Some(0.1)));
    }

    #[test]
    fn quantiles_settle_where_they_should() {
        let mut pattern = Pattern::default();
        let mut state = 1u32;
        let mut over = (0, 0);
        for round in 0..200_000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = 0.5 + f64::from(state >> 8) / f64::from(1u32 << 24);
            if round > 20_000 {
                over.0 += u32::from(value > pattern.p95);
                over.1 += u32::from(value > pattern.p99);
            }
            pattern.observe(value);
        }
        assert!((pattern.mean - 1.0).abs() < 0.2, "{pattern:?}");
        let (p95, p99) = (f64::from(over.0) / 180_000.0, f64::from(over.1) / 180_000.0);
        assert!((0.03..0.08).contains(&p95) && (0.005..0.02).contains(&p99), "{p95} {p99}");
    }

    #[test]
    fn a_node_that_slows_down_is_followed_and_one_outlier_is_not() {
        let mut pattern = Pattern::default();
        (0..500).for_each(|_| pattern.observe(1.0));
        pattern.observe(1000.0);
        assert!(pattern.mean < 1.2 && pattern.p99 < 2.0, "{pattern:?}");
        (0..60).for_each(|_| pattern.observe(10.0));
        assert!(pattern.mean > 8.0 && pattern.p99 > 9.0, "{pattern:?}");
    }
}
