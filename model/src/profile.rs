//! Where the time of a step goes, by part, for measuring programs.
//!
//! Off unless asked for: a part then costs one relaxed load. Parts are measured on the thread that
//! runs the step, but those marked as inside tasks, which are summed over the pool's threads. One
//! account for the process; results cannot depend on it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

static ON: AtomicBool = AtomicBool::new(false);
static SPENT: [AtomicU64; PARTS.len()] = [const { AtomicU64::new(0) }; PARTS.len()];

/// A part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Embedding, norms, residual.
    Norm,
    /// Query projections and their norm, with the latent projection.
    Query,
    /// Latent rows' norm, rotations, writing to the cache.
    Latent,
    /// Queries through the keys' up-projection.
    Absorb,
    /// Scores, softmax and weighted sum.
    Attend,
    /// Of that, inside tasks.
    Scores,
    /// Of that, inside tasks.
    Softmax,
    /// Of that, inside tasks.
    Sum,
    /// Results through the values' up-projection.
    Values,
    /// Output projection.
    Out,
    /// Gate.
    Gate,
    /// Dense layers and shared experts.
    Dense,
    /// Routed experts.
    Experts,
    /// Results and shared experts into the residual stream.
    Combine,
    /// Final norm and head.
    Logits,
}

/// All parts, in the order of a step.
pub const PARTS: [Part; 15] = [
    Part::Norm,
    Part::Query,
    Part::Latent,
    Part::Absorb,
    Part::Attend,
    Part::Scores,
    Part::Softmax,
    Part::Sum,
    Part::Values,
    Part::Out,
    Part::Gate,
    Part::Dense,
    Part::Experts,
    Part::Combine,
    Part::Logits,
];

impl Part {
    /// Whether it is part of another one and summed over threads.
    pub fn inside_tasks(self) -> bool {
        matches!(self, Part::Scores | Part::Softmax | Part::Sum)
    }
}

/// Starts a new account, or stops keeping one.
pub fn account(on: bool) {
    SPENT.iter().for_each(|spent| spent.store(0, Relaxed));
    ON.store(on, Relaxed);
}

/// What `part` took since the account was started.
pub fn spent(part: Part) -> Duration {
    Duration::from_nanos(SPENT[part as usize].load(Relaxed))
}

/// Counts the time until it is dropped.
pub(crate) struct Span(Option<(Part, Instant)>);

/// Starts counting for `part`.
#[must_use]
pub(crate) fn span(part: Part) -> Span {
    Span(ON.load(Relaxed).then(|| (part, Instant::now())))
}

impl Drop for Span {
    fn drop(&mut self) {
        if let Some((part, start)) = self.0 {
            SPENT[part as usize].fetch_add(start.elapsed().as_nanos() as u64, Relaxed);
        }
    }
}
