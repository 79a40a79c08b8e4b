//! Whether the engine stays awake while it waits for replies. Waking a sleeping
//! CPU takes longer than many a round trip, but where nodes share this machine's
//! CPUs, a waiting engine that does not sleep takes theirs. Which it is, is
//! measured, for each size of exchange anew.

use std::time::Duration;

use crate::choice::{Choice, Judgement};

const JUDGEMENT: Judgement = Judgement {
    // Staying awake has to be faster by this much, as it costs power and others' time.
    margin: 0.95,
    new: 0.1,
    // One long wait, such as for a lost node, says nothing of the others.
    most: 4.0,
};

/// See the module's text. Pure: times come in as arguments.
pub struct Spin(Choice);

impl Default for Spin {
    fn default() -> Self {
        Self(Choice::new(JUDGEMENT))
    }
}

impl Spin {
    /// Whether to stay awake for an exchange of `rows` rows.
    pub fn choose(&mut self, rows: usize) -> bool {
        self.0.other(rows)
    }

    /// Takes in how long such a wait was.
    pub fn observe(&mut self, rows: usize, awake: bool, took: Duration) {
        self.0.observe(rows, awake, took.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of the last 128 waits were awake.
    fn run(spin: &mut Spin, asleep: u64, awake: u64) -> usize {
        let mut last = 0;
        for wait in 0..256 {
            let chosen = spin.choose(1);
            spin.observe(1, chosen, Duration::from_micros(if chosen { awake } else { asleep }));
            last += usize::from(chosen && wait >= 128);
        }
        last
    }

    #[test]
    fn the_faster_way_is_taken_and_the_other_tried_now_and_then() {
        assert_eq!(run(&mut Spin::default(), 100, 40), 126);
        assert_eq!(run(&mut Spin::default(), 100, 250), 2);
        assert_eq!(run(&mut Spin::default(), 100, 98), 2, "no gain to speak of");
    }

    #[test]
    fn one_long_wait_changes_little_and_a_change_is_noticed() {
        let mut spin = Spin::default();
        run(&mut spin, 100, 40);
        spin.observe(1, true, Duration::from_secs(30));
        assert!(spin.choose(1));
        for _ in 0..40 {
            run(&mut spin, 100, 400);
        }
        assert_eq!(run(&mut spin, 100, 400), 2);
    }
}
