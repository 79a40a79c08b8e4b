//! The retry budget: how many frames may be sent a second time while their
//! first sending may still be answered. A fifth of the frames, and ten a second
//! besides, so that slow nodes are not made slower by what was sent twice.

use std::time::Instant;

/// What each first sending adds.
const SHARE: f64 = 0.2;
/// What each second adds.
const RATE: f64 = 10.0;
/// What can be saved up.
const MOST: f64 = 100.0;
/// What is there at first.
const START: f64 = 10.0;

/// See the module's text. Pure: time comes in.
#[derive(Clone, Debug)]
pub(super) struct Budget {
    tokens: f64,
    at: Instant,
}

impl Budget {
    pub fn new(now: Instant) -> Self {
        Self { tokens: START, at: now }
    }

    /// A first sending.
    pub fn deposit(&mut self, now: Instant) {
        self.pass(now);
        self.tokens = (self.tokens + SHARE).min(MOST);
    }

    /// Pays for a second sending, if it can be paid for.
    pub fn withdraw(&mut self, now: Instant) -> bool {
        self.pass(now);
        let paid = self.tokens >= 1.0;
        if paid {
            self.tokens -= 1.0;
        }
        paid
    }

    /// Pays for a sending that has to be made, as the first one is lost.
    pub fn owe(&mut self, now: Instant) {
        self.pass(now);
        self.tokens = (self.tokens - 1.0).max(-MOST);
    }

    fn pass(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.tokens = (self.tokens + passed * RATE).min(MOST);
        self.at = self.at.max(now);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn never_more_than_a_fifth_and_ten_a_second(
            events in prop::collection::vec((0u8..4, 0u64..300), 1..400),
        ) {
            let start = Instant::now();
            let (mut now, mut budget) = (start, Budget::new(start));
            let (mut firsts, mut seconds) = (0u32, 0u32);
            for (kind, ms) in events {
                now += Duration::from_millis(ms);
                match kind {
                    0 => { budget.deposit(now); firsts += 1; }
                    1 => { budget.owe(now); seconds += 1; }
                    _ => seconds += u32::from(budget.withdraw(now)),
                }
                let owed = (-budget.tokens).max(0.0);
                let most = START + SHARE * f64::from(firsts)
                    + RATE * (now - start).as_secs_f64() + owed;
                prop_assert!(f64::from(seconds) <= most + 1e-6, "{seconds} > {most}");
            }
        }
    }
}
