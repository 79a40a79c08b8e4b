//! How many prompt tokens a step takes while streams run beside them. Pure:
//! measured times come in, a number of tokens comes out.
//!
//! A step is taken to cost what decoding costs plus so much per prompt token;
//! both are running averages. The step may take as long as the configured
//! target for the time between tokens; without one, decoding keeps at least as
//! large a part of the step's time as it has of the sequences, and a single
//! prompt never makes a step longer than [`STRETCH`] times. Prompts always make
//! some progress: a target that decoding alone misses must not starve them.

use std::time::Duration;

/// Without a target: how much longer a prompt may make a step than decoding alone is.
const STRETCH: f64 = 1.75;
/// Prompt tokens a step takes in any case.
const LEAST: usize = 8;
/// Prompt tokens in the first step beside streams, before anything was measured.
const UNMEASURED: usize = 32;
/// Weights of a new measurement. Slower than thought is believed faster than
/// quicker than thought, since a stall is what users see.
const SLOWER: f64 = 0.5;
const QUICKER: f64 = 0.125;

/// See the module's text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// Seconds between two tokens of a stream that were asked for.
    target: Option<f64>,
    /// Seconds of a step that only decodes.
    decode: Option<f64>,
    /// Seconds that one prompt token adds.
    per_token: Option<f64>,
}

impl Pace {
    pub fn new(target: Option<Duration>) -> Self {
        Self { target: target.map(|t| t.as_secs_f64()), decode: None, per_token: None }
    }

    /// Takes in the time of a step of `decoding` single tokens and `prompt` prompt tokens.
    pub fn observe(&mut self, decoding: usize, prompt: usize, took: Duration) {
        let took = took.as_secs_f64();
        match (decoding, prompt) {
            (0, 0) => {}
            (_, 0) => learn(&mut self.decode, took),
            (0, _) => learn(&mut self.per_token, took / prompt as f64),
            _ => {
                if let Some(decode) = self.decode {
                    learn(&mut self.per_token, (took - decode).max(0.0) / prompt as f64);
                }
            }
        }
    }

    /// Prompt tokens for a step in which `decoding` streams get a token and
    /// `prompts` sequences wait for theirs to be computed.
    pub fn room(&self, decoding: usize, prompts: usize) -> usize {
        if decoding == 0 {
            return usize::MAX;
        }
        let (Some(decode), Some(per_token)) = (self.decode, self.per_token) else {
            return UNMEASURED;
        };
        let spare = match self.target {
            Some(target) => target - decode,
            None => decode * (STRETCH - 1.0) * (prompts as f64 / decoding as f64).max(1.0),
        };
        // A cast of a float saturates: nothing measurable per token is no limit.
        ((spare / per_token.max(1e-9)) as usize).max(LEAST)
    }
}

fn learn(mean: &mut Option<f64>, new: f64) {
    *mean = Some(match *mean {
        None => new,
        Some(old) => old + (new - old) * if new > old { SLOWER } else { QUICKER },
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Steps of a machine on which decoding takes 10 ms and a prompt token 0.5 ms.
    fn run(mut pace: Pace, streams: usize, prompts: usize, steps: usize) -> Vec<usize> {
        pace.observe(streams, 0, 10 * MS);
        (0..steps)
            .map(|_| {
                let tokens = pace.room(streams, prompts);
                pace.observe(streams, tokens, 10 * MS + MS / 2 * tokens as u32);
                tokens
            })
            .collect()
    }

    #[test]
    fn a_long_prompt_stretches_steps_by_no_more_than_agreed() {
        let tokens = run(Pace::new(None), 8, 1, 20);
        assert_eq!(tokens[0], UNMEASURED);
        assert!(tokens[1..].iter().all(|&n| (14..=15).contains(&n)), "{tokens:?}");
    }

    #[test]
    fn a_crowd_of_prompts_is_not_held_up_by_one_stream() {
        let tokens = run(Pace::new(None), 1, 16, 20);
        assert!(tokens[1..].iter().all(|&n| (239..=240).contains(&n)), "{tokens:?}");
    }

    #[test]
    fn a_target_is_met_and_one_that_cannot_be_met_starves_nobody() {
        let tokens = run(Pace::new(Some(30 * MS)), 8, 1, 20);
        assert!(tokens[1..].iter().all(|&n| (39..=40).contains(&n)), "{tokens:?}");
        let tokens = run(Pace::new(Some(5 * MS)), 8, 1, 20);
        assert!(tokens[1..].iter().all(|&n| n == LEAST), "{tokens:?}");
    }

    #[test]
    fn without_streams_there_is_no_limit() {
        assert_eq!(Pace::new(Some(MS)).room(0, 1), usize::MAX);
    }

    #[test]
    fn a_machine_that_slows_down_is_followed_within_a_few_steps() {
        let mut pace = Pace::new(None);
        pace.observe(8, 0, 10 * MS);
        pace.observe(0, 100, 10 * MS);
        let before = pace.room(8, 1);
        for _ in 0..4 {
            pace.observe(8, 10, 20 * MS);
        }
        assert!(pace.room(8, 1) * 5 < before, "{} of {before}", pace.room(8, 1));
    }
}
