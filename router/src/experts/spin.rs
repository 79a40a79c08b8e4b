//! Whether the engine stays awake while it waits for replies. Waking a sleeping
//! CPU takes longer than many a round trip, but where nodes share this machine's
//! CPUs, a waiting engine that does not sleep takes theirs. Which it is, is
//! measured, for each size of exchange anew.

use std::time::Duration;

/// Sizes are told apart by powers of two.
const SIZES: usize = usize::BITS as usize;
/// Of so many exchanges of a size, one waits the way that seemed slower.
const TRY_EVERY: u32 = 64;
/// Weight of a new measurement.
const NEW: f64 = 0.1;
/// Staying awake has to be faster by this much, as it costs power and others' time.
const MARGIN: f64 = 0.95;

/// Seconds waited for exchanges of one size, asleep and awake.
#[derive(Clone, Copy, Default)]
struct Size {
    asleep: Option<f64>,
    awake: Option<f64>,
    waits: u32,
}

/// See the module's text. Pure: times come in as arguments.
pub struct Spin {
    sizes: [Size; SIZES],
}

impl Default for Spin {
    fn default() -> Self {
        Self { sizes: [Size::default(); SIZES] }
    }
}

impl Spin {
    /// How long a wait looks after its streams before it sleeps.
    pub const LIMIT: Duration = Duration::from_micros(500);

    /// Whether to stay awake for an exchange of `rows` rows.
    pub fn choose(&mut self, rows: usize) -> bool {
        let size = &mut self.sizes[rows.max(1).ilog2() as usize];
        size.waits = size.waits.wrapping_add(1);
        match (size.asleep, size.awake) {
            (None, _) => false,
            (_, None) => true,
            (Some(asleep), Some(awake)) => {
                let faster = awake < asleep * MARGIN;
                faster != size.waits.is_multiple_of(TRY_EVERY)
            }
        }
    }

    /// Takes in how long such a wait was.
    pub fn observe(&mut self, rows: usize, awake: bool, took: Duration) {
        let size = &mut self.sizes[rows.max(1).ilog2() as usize];
        let mean = if awake { &mut size.awake } else { &mut size.asleep };
        let new = took.as_secs_f64();
        // One long wait, such as for a lost node, says nothing of the others.
        let new = mean.map_or(new, |old| new.min(old * 4.0));
        *mean = Some(mean.map_or(new, |old| old + (new - old) * NEW));
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
