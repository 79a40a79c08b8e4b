//! Whether a step runs as one batch or as two micro-batches, one computing while
//! the other's rows are with the experts. Two read the trunk's weights twice, so
//! it pays only where the experts' answers are waited for: which it is depends
//! on machines and network, so it is measured, for each size of step anew.
//! Splitting changes no bit.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::choice::{Choice, Judgement};
use crate::scheduler::Part;

/// Steps of fewer rows are not worth cutting.
const LEAST_ROWS: usize = 8;
const JUDGEMENT: Judgement = Judgement {
    // Half as many rows a frame cost the nodes more.
    margin: 0.97,
    new: 0.25,
    most: f64::INFINITY,
};

/// What an operator says about splitting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Splitting {
    /// Where it was measured to be faster.
    #[default]
    Auto,
    /// Every step of more than one row.
    Always,
    Never,
}

impl fmt::Display for Splitting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Always => "always",
            Self::Never => "never",
        })
    }
}

impl FromStr for Splitting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "always" => Ok(Self::Always),
            "never" => Ok(Self::Never),
            _ => Err(format!("`{text}` is none of auto, always, never")),
        }
    }
}

/// See the module's text. Pure: times come in as arguments.
pub(super) struct Overlap {
    splitting: Splitting,
    measured: Choice,
}

impl Overlap {
    pub fn new(splitting: Splitting) -> Self {
        Self { splitting, measured: Choice::new(JUDGEMENT) }
    }

    /// Whether a step of `rows` rows is to be split.
    pub fn split(&mut self, rows: usize) -> bool {
        match self.splitting {
            Splitting::Auto => rows >= LEAST_ROWS && self.measured.other(rows),
            Splitting::Always => rows > 1,
            Splitting::Never => false,
        }
    }

    /// Takes in how long a step took.
    pub fn observe(&mut self, rows: usize, split: bool, took: Duration) {
        if rows >= LEAST_ROWS {
            self.measured.observe(rows, split, took.as_secs_f64() / rows as f64);
        }
    }
}

/// Cuts a plan in two of about as many rows each. A long part is cut inside:
/// every layer's keys of the first half are written before the second reads
/// them.
pub(super) fn halves(plan: &[Part]) -> (Vec<Part>, Vec<Part>) {
    let rows: usize = plan.iter().map(|part| part.len).sum();
    let (mut first, mut second) = (Vec::with_capacity(plan.len()), Vec::new());
    let mut room = rows.div_ceil(2);
    for &part in plan {
        if part.len <= room {
            room -= part.len;
            first.push(part);
        } else if room == 0 {
            second.push(part);
        } else {
            first.push(Part { len: room, last: false, ..part });
            second.push(Part { start: part.start + room, len: part.len - room, ..part });
            room = 0;
        }
    }
    (first, second)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::SeqId;

    /// Seconds of 100 steps of `rows` rows, and how many of the last 64 were split.
    fn run(rows: usize, whole: u64, split: u64) -> usize {
        let mut overlap = Overlap::new(Splitting::Auto);
        let mut split_last = 0;
        for step in 0..128 {
            let now = overlap.split(rows);
            let took = Duration::from_micros(if now { split } else { whole });
            overlap.observe(rows, now, took);
            split_last += usize::from(now && step >= 64);
        }
        split_last
    }

    #[test]
    fn the_faster_way_is_taken_and_the_other_tried_now_and_then() {
        assert_eq!(run(16, 1000, 2000), 1);
        assert_eq!(run(16, 2000, 1000), 63);
        assert_eq!(run(16, 1000, 990), 1, "no gain to speak of");
        assert_eq!(run(LEAST_ROWS - 1, 2000, 1000), 0);
    }

    #[test]
    fn a_network_that_becomes_slow_is_noticed() {
        let mut overlap = Overlap::new(Splitting::Auto);
        for _ in 0..64 {
            let now = overlap.split(32);
            overlap.observe(32, now, Duration::from_micros(if now { 1500 } else { 1000 }));
        }
        let mut split = 0;
        for _ in 0..512 {
            let now = overlap.split(32);
            split += usize::from(now);
            overlap.observe(32, now, Duration::from_micros(if now { 3000 } else { 5000 }));
        }
        assert!(split > 256, "{split}");
    }

    #[test]
    fn halves_have_every_row_once_and_in_order() {
        let part = |id, start, len, last| Part { id: SeqId(id), start, len, last };
        let plan = [part(1, 9, 1, true), part(2, 4, 1, true), part(3, 0, 10, true)];
        let (first, second) = halves(&plan);
        assert_eq!(first, [plan[0], plan[1], part(3, 0, 4, false)]);
        assert_eq!(second, [part(3, 4, 6, true)]);
        let plan: Vec<Part> = (0..5).map(|id| part(id, 7, 1, true)).collect();
        let (first, second) = halves(&plan);
        assert_eq!((first.len(), second.len()), (3, 2));
        assert_eq!([first, second].concat(), plan);
    }
}
