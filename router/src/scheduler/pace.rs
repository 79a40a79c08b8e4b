//! How many prompt tokens a step takes while streams run beside them. Pure:
//! measured times come in, a number of tokens comes out.
//!
//! What a step costs is measured by its rows, whether they decode or prefill: a
//! running average for each power of two, and even steps by the logarithm between,
//! since the first rows make most experts' weights be read. More rows cost
//! at least as much and at most in proportion, which corrects what was measured
//! when pages were cold and would otherwise not be tried again. The step may
//! take as long as the configured target for the time between tokens; without
//! one, decoding keeps at least as large a part of the step's time as it has of
//! the sequences, and a single prompt never makes a step longer than [`STRETCH`]
//! times. Prompts always make some progress: a target that decoding alone misses
//! must not starve them.

use std::time::Duration;

/// Without a target: how much longer a prompt may make a step than decoding alone is. Below two, so that one in a
/// hundred stays there, as single steps come out longer than was thought.
const STRETCH: f64 = 1.6;
/// Prompt tokens a step takes in any case.
const LEAST: usize = 16;
/// Weight of a new measurement: one slow step says little of the next.
const NEW: f64 = 0.125;
const SIZES: usize = usize::BITS as usize;

/// The average step of one size.
#[derive(Clone, Copy, Debug)]
struct Point {
    rows: f64,
    seconds: f64,
}

/// See the module's text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// Seconds between two tokens of a stream that were asked for.
    target: Option<f64>,
    /// By the rows' power of two.
    points: [Option<Point>; SIZES],
}

impl Pace {
    pub fn new(target: Option<Duration>) -> Self {
        Self { target: target.map(|t| t.as_secs_f64()), points: [None; SIZES] }
    }

    /// Takes in the time of a step of `rows` rows.
    pub fn observe(&mut self, rows: usize, took: Duration) {
        if rows == 0 {
            return;
        }
        let new = Point { rows: rows as f64, seconds: took.as_secs_f64() };
        for point in self.points.iter_mut().flatten() {
            point.seconds = point.seconds.min(new.seconds * (point.rows / new.rows).max(1.0));
        }
        let point = &mut self.points[rows.ilog2() as usize];
        *point = Some(match *point {
            None => new,
            Some(Point { rows, seconds }) => Point {
                rows: rows + (new.rows - rows) * NEW,
                seconds: seconds + (new.seconds - seconds) * NEW,
            },
        });
    }

    /// Prompt tokens for a step in which `decoding` streams get a token and
    /// `prompts` sequences wait for theirs to be computed.
    pub fn room(&self, decoding: usize, prompts: usize) -> usize {
        if decoding == 0 {
            return usize::MAX;
        }
        let Some(alone) = self.predict(decoding as f64) else { return LEAST };
        let limit = self.target.unwrap_or_else(|| {
            let share = (prompts as f64 / decoding as f64).max(1.0);
            alone * (1.0 + (STRETCH - 1.0) * share)
        });
        let rows = self.rows_within(limit);
        // A cast of a float saturates.
        ((rows - decoding as f64).max(0.0) as usize).max(LEAST)
    }

    /// Seconds of a step of `rows` rows; `None` before anything was measured.
    fn predict(&self, rows: f64) -> Option<f64> {
        let (mut below, mut above) = (None::<Point>, None::<Point>);
        for &point in self.points.iter().flatten() {
            if point.rows <= rows {
                below = Some(point);
            } else if above.is_none() {
                above = Some(point);
            }
        }
        match (below, above) {
            (Some(below), Some(above)) => {
                let part = (rows / below.rows).ln() / (above.rows / below.rows).ln();
                Some(below.seconds + (above.seconds - below.seconds) * part)
            }
            // Fewer rows than ever seen cost no more, more rows at most in proportion.
            (None, Some(above)) => Some(above.seconds),
            (Some(below), None) => Some(below.seconds * rows / below.rows),
            (None, None) => None,
        }
    }

    /// The most rows of which a step is thought to stay within `limit` seconds.
    fn rows_within(&self, limit: f64) -> f64 {
        let mut last = None::<Point>;
        for &point in self.points.iter().flatten() {
            if point.seconds > limit {
                return last.map_or(0.0, |last| {
                    let part = (limit - last.seconds) / (point.seconds - last.seconds);
                    last.rows * (point.rows / last.rows).powf(part)
                });
            }
            last = Some(point);
        }
        last.map_or(0.0, |last| last.rows * limit / last.seconds.max(1e-9))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// A machine on which a step takes 10 ms and half a millisecond for each row.
    fn cost(rows: usize) -> Duration {
        10 * MS + MS / 2 * rows as u32
    }

    /// Prompt tokens of each of `steps` steps beside `streams`, after one of each alone.
    fn run(mut pace: Pace, streams: usize, prompts: usize, steps: usize) -> Vec<usize> {
        pace.observe(256, cost(256));
        pace.observe(streams, cost(streams));
        (0..steps)
            .map(|_| {
                let tokens = pace.room(streams, prompts).min(512);
                pace.observe(streams + tokens, cost(streams + tokens));
                tokens
            })
            .collect()
    }

    #[test]
    fn a_long_prompt_stretches_steps_by_no_more_than_agreed() {
        // 14 ms alone, 22.4 with the prompt: 16.8 rows more.
        let tokens = run(Pace::new(None), 8, 1, 20);
        assert!(tokens.iter().all(|&n| (LEAST..=17).contains(&n)), "{tokens:?}");
    }

    #[test]
    fn a_crowd_of_prompts_is_not_held_up_by_one_stream() {
        // 10.5 ms alone, 111.3 with sixteen prompts: 201 rows more.
        let tokens = run(Pace::new(None), 1, 16, 20);
        assert!(tokens[4..].iter().all(|&n| (190..=202).contains(&n)), "{tokens:?}");
    }

    /// Prompts become streams one after another: no number of streams is ever
    /// measured alone, and yet all are done within a few steps.
    #[test]
    fn prompts_that_arrive_together_do_not_starve_each_other() {
        let mut pace = Pace::new(None);
        pace.observe(64, cost(64));
        let (mut left, mut steps) = (vec![64usize; 15], 0);
        while !left.is_empty() {
            let streams = 16 - left.len();
            let mut room = pace.room(streams, left.len()).min(512 - streams);
            let mut rows = streams;
            for prompt in &mut left {
                let part = room.min(*prompt);
                (*prompt, room, rows) = (*prompt - part, room - part, rows + part);
            }
            left.retain(|prompt| *prompt > 0);
            pace.observe(rows, cost(rows));
            steps += 1;
        }
        assert!(steps <= 16, "{steps}");
    }

    /// A first step that reads its weights from a disk is a hundred times slower.
    #[test]
    fn a_cold_start_is_forgotten() {
        let mut pace = Pace::new(None);
        pace.observe(64, 100 * cost(64));
        let tokens = run(pace, 8, 1, 8);
        assert!(tokens.iter().all(|&n| (LEAST..=21).contains(&n)), "{tokens:?}");
    }

    #[test]
    fn a_target_is_met_and_one_that_cannot_be_met_starves_nobody() {
        let tokens = run(Pace::new(Some(30 * MS)), 8, 1, 20);
        assert!(tokens[4..].iter().all(|&n| (20..=32).contains(&n)), "{tokens:?}");
        let tokens = run(Pace::new(Some(5 * MS)), 8, 1, 20);
        assert!(tokens.iter().all(|&n| n == LEAST), "{tokens:?}");
    }

    #[test]
    fn without_streams_there_is_no_limit_and_without_measurements_little() {
        let pace = Pace::new(Some(MS));
        assert_eq!((pace.room(0, 1), pace.room(1, 1)), (usize::MAX, LEAST));
    }

    #[test]
    fn a_machine_that_slows_down_is_followed() {
        let mut pace = Pace::new(Some(30 * MS));
        pace.observe(8, cost(8));
        pace.observe(40, cost(40));
        let before = pace.room(8, 1);
        for _ in 0..8 {
            pace.observe(8, 3 * cost(8));
            pace.observe(40, 3 * cost(40));
        }
        assert!(before > LEAST && pace.room(8, 1) == LEAST, "{before}, {}", pace.room(8, 1));
    }
}
