//! From logits to a token: penalties, temperature, top-k, min-p, top-p, and a seeded draw.
//!
//! The order is vLLM's: log-probabilities of the raw logits; logit bias; repetition, frequency and
//! presence penalties; then greedy choice, or temperature, min-p, top-k, top-p and a draw. The draw
//! is a function of (seed, position), so a replay on another machine repeats it: every sum is in a
//! fixed order, every exponential the kernels' own. Ties go to the lower id. Logits that are not
//! finite are refused.

mod philox;
#[cfg(test)]
mod tests;

use std::cmp::Ordering;
use std::collections::HashMap;

pub use kernels::cuda::trunk::Draw;
use kernels::{Kernels, Pool};

use crate::parallel::{Arena, for_each};

/// Temperatures below this are greedy.
const GREEDY: f32 = 1e-5;

/// How to choose a token. The default is a plain draw at temperature 1.
#[derive(Clone, Debug, PartialEq)]
pub struct Params {
    /// Divides the logits; 0 is greedy.
    pub temperature: f32,
    /// Only this many most probable tokens; 0 is all.
    pub top_k: u32,
    /// Only the most probable tokens that sum to this much.
    pub top_p: f32,
    /// Only tokens at least this probable, relative to the most probable one.
    pub min_p: f32,
    /// Subtracted from the logit of every token already in the output.
    pub presence: f32,
    /// Subtracted for every occurrence in the output.
    pub frequency: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output.
    pub repetition: f32,
    /// Key of the generator.
    pub seed: u64,
    /// Added to the logits of these ids; ids beyond the vocabulary are ignored.
    pub logit_bias: Vec<(u32, f32)>,
    /// Whether to report log-probabilities, and of how many alternatives.
    pub logprobs: Option<u32>,
}

impl Default for Params {
    fn default() -> Self {
        Params {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            presence: 0.0,
            frequency: 0.0,
            repetition: 1.0,
            seed: 0,
            logit_bias: Vec::new(),
            logprobs: None,
        }
    }
}

/// A setting outside its bounds.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("`{field}` is {value}, expected {expected}")]
pub struct ParamError {
    /// The setting, by its name in the HTTP interface.
    pub field: &'static str,
    /// Its value.
    pub value: f64,
    /// Its bounds.
    pub expected: &'static str,
}

impl Params {
    /// The most probable token, always.
    pub fn greedy() -> Self {
        Params { temperature: 0.0, ..Params::default() }
    }

    /// Whether no draw is made.
    pub fn is_greedy(&self) -> bool {
        self.temperature < GREEDY
    }

    /// Whether the history of the sequence matters.
    pub fn needs_history(&self) -> bool {
        self.presence != 0.0 || self.frequency != 0.0 || self.repetition != 1.0
    }

    /// The draw of the token at `position`, if that takes logits and nothing else: what a device makes of them where they are.
    pub fn draw(&self, position: u64) -> Option<Draw> {
        let Params { temperature, min_p, seed, .. } = *self;
        let plain = !self.needs_history() && self.logit_bias.is_empty() && self.logprobs.is_none();
        let all = self.is_greedy() || self.top_k == 0 && self.top_p >= 1.0;
        (plain && all).then_some(Draw { seed, position, temperature, min_p })
    }

    /// Checks every setting against its bounds. Values that are not numbers are outside all of
    /// them.
    pub fn check(&self) -> Result<(), ParamError> {
        let within = |field, value: f32, low: f32, high: f32, expected| match value {
            v if v >= low && v <= high => Ok(()),
            v => Err(ParamError { field, value: v.into(), expected }),
        };
        within("temperature", self.temperature, 0.0, 100.0, "0 to 100")?;
        within("top_p", self.top_p, f32::MIN_POSITIVE, 1.0, "above 0, at most 1")?;
        within("min_p", self.min_p, 0.0, 1.0, "0 to 1")?;
        within("presence_penalty", self.presence, -2.0, 2.0, "-2 to 2")?;
        within("frequency_penalty", self.frequency, -2.0, 2.0, "-2 to 2")?;
        let expected = "above 0, at most 100";
        within("repetition_penalty", self.repetition, f32::MIN_POSITIVE, 100.0, expected)?;
        for (_, bias) in &self.logit_bias {
            within("logit_bias", *bias, -100.0, 100.0, "-100 to 100")?;
        }
        Ok(())
    }
}

/// Which tokens a sequence has had, for penalties.
#[derive(Clone, Debug, Default)]
pub struct History {
    seen: HashMap<u32, Seen>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    in_prompt: bool,
    outputs: u32,
}

impl History {
    /// The history of a sequence that has only its prompt.
    pub fn new(prompt: &[u32]) -> Self {
        let mut history = History::default();
        for token in prompt {
            history.seen.entry(*token).or_default().in_prompt = true;
        }
        history
    }

    /// Adds a token of the output.
    pub fn push(&mut self, token: u32) {
        let seen = self.seen.entry(token).or_default();
        seen.outputs = seen.outputs.saturating_add(1);
    }
}

/// A token and its log-probability, from the raw logits.
pub type Scored = (u32, f32);

/// A chosen token.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// The token.
    pub token: u32,
    /// Its log-probability before bias, penalties and temperature, if asked for.
    pub logprob: Option<f32>,
    /// The most probable tokens, best first, as many as were asked for.
    pub top: Vec<Scored>,
}

impl Choice {
    /// Of a token without log-probabilities.
    pub fn plain(token: u32) -> Choice {
        Choice { token, logprob: None, top: Vec::new() }
    }
}

/// Logits from which nothing can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("logits are not finite")]
pub struct NonFinite;

/// Working memory, and the kernels whose exponential is used.
pub struct Scratch {
    kernels: Kernels,
    buffers: Arena<Buffers>,
}

/// Working memory of one row.
#[derive(Default)]
struct Buffers {
    /// Weights of all tokens, `[vocab]`.
    weights: Vec<f32>,
    /// Candidates: weight and id.
    kept: Vec<Candidate>,
}

type Candidate = (f32, u32);

impl Scratch {
    /// Empty; grows to the vocabulary on first use.
    pub fn new(kernels: Kernels) -> Self {
        Scratch { kernels, buffers: Arena::default() }
    }
}

/// A row of logits to choose from: what [`sample`] takes.
pub struct Row<'a> {
    /// `[vocab]`; bias and penalties change them.
    pub logits: &'a mut [f32],
    /// How to choose.
    pub params: &'a Params,
    /// Only read if [`Params::needs_history`].
    pub history: &'a History,
    /// Position of the token in its sequence.
    pub position: u64,
}

/// [`sample`] for each of `count` rows, shared out over the pool's threads. Every row comes with the place of its choice.
pub fn sample_all<'a>(
    pool: &Pool,
    count: usize,
    rows: impl Iterator<Item = (Row<'a>, &'a mut Result<Choice, NonFinite>)> + Send,
    scratch: &Scratch,
) {
    for_each(pool, count, rows, |(row, choice)| {
        let Row { logits, params, history, position } = row;
        *choice = sample(logits, params, history, position, scratch);
    });
}

/// Chooses the token at `position` of a sequence from `logits` `[vocab]`, which bias and penalties
/// change.
///
/// `history` is only read if [`Params::needs_history`].
pub fn sample(
    logits: &mut [f32],
    params: &Params,
    history: &History,
    position: u64,
    scratch: &Scratch,
) -> Result<Choice, NonFinite> {
    check_finite(logits)?;
    scratch
        .buffers
        .with(|buffers| Ok(choose(logits, params, history, position, scratch.kernels, buffers)))
}

fn choose(
    logits: &mut [f32],
    params: &Params,
    history: &History,
    position: u64,
    kernels: Kernels,
    buffers: &mut Buffers,
) -> Choice {
    let raw = params.logprobs.map(|top| RawScores::new(logits, top as usize, kernels, buffers));
    // Bias and penalties touch few ids: their raw values are kept, not a copy of all.
    let touched = match &raw {
        Some(_) => touched(logits, params, history),
        None => Vec::new(),
    };
    apply_bias(logits, params);
    apply_penalties(logits, params, history);
    let token = match params.is_greedy() {
        true => argmax(kernels, logits),
        false => draw(logits, params, position, kernels, buffers),
    };
    let (logprob, top) = match raw {
        None => (None, Vec::new()),
        Some(raw) => {
            let before = touched.iter().find(|(id, _)| *id == token).map(|(_, logit)| *logit);
            (Some(raw.of(before.unwrap_or(logits[token as usize]))), raw.top)
        }
    };
    Choice { token, logprob, top }
}

/// The log-probability of `token` under `logits` `[vocab]`, and of the `top` most probable ones
/// (for log-probabilities of a prompt). `token` is below the vocabulary size.
pub fn score(
    logits: &[f32],
    token: u32,
    top: usize,
    scratch: &Scratch,
) -> Result<(f32, Vec<Scored>), NonFinite> {
    check_finite(logits)?;
    scratch.buffers.with(|buffers| {
        let raw = RawScores::new(logits, top, scratch.kernels, buffers);
        Ok((raw.of(logits[token as usize]), raw.top))
    })
}

fn check_finite(logits: &[f32]) -> Result<(), NonFinite> {
    // All are looked at, so that the loop becomes vector instructions.
    match !logits.is_empty() && logits.iter().fold(true, |all, l| all & l.is_finite()) {
        true => Ok(()),
        false => Err(NonFinite),
    }
}

/// The normaliser of a row of logits, and its best tokens.
struct RawScores {
    max: f64,
    log_sum: f64,
    top: Vec<Scored>,
}

impl RawScores {
    fn new(logits: &[f32], top: usize, kernels: Kernels, buffers: &mut Buffers) -> Self {
        let Buffers { weights, kept } = buffers;
        weights.clear();
        weights.extend_from_slice(logits);
        let max = kernels.max(logits);
        let sum = kernels.softmax_weights(weights, max);
        let mut scores =
            RawScores { max: max.into(), log_sum: f64::from(sum).ln(), top: Vec::new() };
        let top = top.min(logits.len());
        if top > 0 {
            kept.clear();
            kept.extend(logits.iter().zip(0..).map(|(l, id)| (*l, id)));
            keep_best(kept, top);
            scores.top = kept.iter().map(|(l, id)| (*id, scores.of(*l))).collect();
        }
        scores
    }

    fn of(&self, logit: f32) -> f32 {
        (f64::from(logit) - self.max - self.log_sum) as f32
    }
}

/// Raw logits of all ids that bias and penalties may change.
fn touched(logits: &[f32], params: &Params, history: &History) -> Vec<(u32, f32)> {
    let biased = params.logit_bias.iter().map(|(id, _)| *id);
    let seen = history.seen.keys().copied().filter(|_| params.needs_history());
    biased.chain(seen).filter_map(|id| Some((id, *logits.get(id as usize)?))).collect()
}

fn apply_bias(logits: &mut [f32], params: &Params) {
    for (id, bias) in &params.logit_bias {
        if let Some(logit) = logits.get_mut(*id as usize) {
            *logit += bias;
        }
    }
}

fn apply_penalties(logits: &mut [f32], params: &Params, history: &History) {
    if !params.needs_history() {
        return;
    }
    // The map's order does not matter: every id is changed by itself.
    for (id, seen) in &history.seen {
        let Some(logit) = logits.get_mut(*id as usize) else { continue };
        if *logit > 0.0 {
            *logit /= params.repetition;
        } else {
            *logit *= params.repetition;
        }
        debug_assert!(seen.in_prompt || seen.outputs > 0);
        if seen.outputs > 0 {
            *logit -= params.frequency * seen.outputs as f32;
            *logit -= params.presence;
        }
    }
}

/// The largest logit's id, the lowest of equals.
fn argmax(kernels: Kernels, logits: &[f32]) -> u32 {
    /// Logits that are compared before it is asked whether one was the largest.
    const PIECE: usize = 1024;
    let max = kernels.max(logits);
    let here = |piece: &[f32]| piece.iter().fold(false, |any, l| any | (*l == max));
    let piece = logits.chunks(PIECE).position(here).unwrap_or(0) * PIECE;
    let within = logits[piece..].iter().position(|l| *l == max).unwrap_or(0);
    (piece + within) as u32
}

/// Larger first, then lower id: a total order, as no weight is NaN.
fn by_weight(a: &Candidate, b: &Candidate) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// Keeps the `count` best candidates, best first.
fn keep_best(kept: &mut Vec<Candidate>, count: usize) {
    if count < kept.len() {
        kept.select_nth_unstable_by(count, by_weight);
        kept.truncate(count);
    }
    kept.sort_unstable_by(by_weight);
}

fn draw(
    logits: &[f32],
    params: &Params,
    position: u64,
    kernels: Kernels,
    buffers: &mut Buffers,
) -> u32 {
    let Buffers { weights, kept } = buffers;
    weights.clear();
    weights.extend(logits.iter().map(|l| l / params.temperature));
    let max = kernels.max(weights);
    kernels.softmax_weights(weights, max);

    // The best weight is exp(0) = 1, so min-p is a bound on the weight itself.
    let above = |w: f32| w > 0.0 && w >= params.min_p;
    kept.clear();
    kept.extend(weights.iter().zip(0..).filter(|(w, _)| above(**w)).map(|(w, id)| (*w, id)));
    let top_k = params.top_k as usize;
    if top_k > 0 && top_k < kept.len() {
        keep_best(kept, top_k);
    }
    if params.top_p < 1.0 {
        keep_mass(kept, f64::from(params.top_p));
    }

    let total: f64 = kept.iter().map(|(w, _)| f64::from(*w)).sum();
    let mut left = philox::uniform(params.seed, position) * total;
    for (weight, id) in kept.iter() {
        left -= f64::from(*weight);
        if left < 0.0 {
            return *id;
        }
    }
    // Rounding can leave a remainder at the very end of the interval.
    kept.last().map_or_else(|| argmax(kernels, logits), |(_, id)| *id)
}

/// Keeps the fewest best candidates whose weights sum to `share` of all, at least one, best first.
fn keep_mass(kept: &mut Vec<Candidate>, share: f64) {
    let total: f64 = kept.iter().map(|(w, _)| f64::from(*w)).sum();
    let wanted = total * share;
    // Few are needed as a rule: sort the best few, and more only if they do not suffice.
    let mut sorted = 0;
    let mut sum = 0.0;
    let mut batch = 64;
    while sorted < kept.len() {
        let end = (sorted + batch).min(kept.len());
        let rest = &mut kept[sorted..];
        if end - sorted < rest.len() {
            rest.select_nth_unstable_by(end - sorted, by_weight);
        }
        rest[..end - sorted].sort_unstable_by(by_weight);
        for at in sorted..end {
            sum += f64::from(kept[at].0);
            if sum >= wanted {
                kept.truncate(at + 1);
                return;
            }
        }
        sorted = end;
        batch *= 8;
    }
}
