//! What the router knows of its nodes' health, and what follows from it: whom to
//! ask for an expert, how long to wait for the answer, whom to leave alone for
//! a while. Sans-IO: time and the seed of its choices come in. One for all
//! exchanges of a router, which report to it what they send and what comes back.
//!
//! Of an expert's owners two are looked at (all, where there are two), and the
//! one that should be done first is taken: a frame and the slots that it was sent
//! and has not answered, times how slow it is. So a node that is slow for one slot
//! as for many, as one that is stopped for most of the time, gets none while
//! others have few; one slot a second is how it is known that it is well again.
//! Nodes that are ejected, hang or are late are passed over **as long as another
//! owner is not**: the last one is never refused.

mod breaker;
mod budget;
mod latency;

use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh::placement::NodeIndex;
use parking_lot::{Mutex, MutexGuard};
use proto::Ticket;

use breaker::Breaker;
pub use breaker::{Failure, State};
use budget::Budget;
use latency::{Pattern, Sizes};

/// No answer is late before this.
const LEAST_DEADLINE: Duration = Duration::from_millis(50);
/// However slow nodes are: what is lost without a trace is to be missed within a step's patience.
const MOST_DEADLINE: Duration = Duration::from_secs(8);
/// An answer is late after so many times the node's 99th percentile.
const DEADLINE_P99: f64 = 4.0;
/// Before anything was measured, times the configured limit: weights may have to
/// be read from a disk.
const UNKNOWN: u32 = 4;
/// How often the time doubles for slots that were sent again.
const MOST_DOUBLINGS: u32 = 2;
/// Another node is not asked as well before this.
const LEAST_HEDGE: Duration = Duration::from_millis(2);
/// What a frame costs beside its slots, in slots.
const FRAME: usize = 16;
/// A fit node that was sent nothing for so long is sent a slot, to see how slow it is now.
const FORGOTTEN: Duration = Duration::from_secs(1);
/// From so many times the fastest node's times on a node is slow among others.
const OUTLIER: f64 = 2.0;
/// For how long a node that let a deadline pass is passed over, unless it answers.
const LATE: Duration = Duration::from_secs(1);
/// Second sendings whose answer nobody waits for any more, remembered to measure them.
const MOST_LEFT: usize = 1024;

/// What an operator decides.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Whether any of this is done. Without, owners are asked in turn, and only
    /// `attempt` and lost connections lead to another one.
    pub enabled: bool,
    /// The longest that a small frame may take before another owner is asked.
    pub attempt: Duration,
    /// Whether a frame slower than 95 of 100 is sent to another owner as well.
    pub hedge: bool,
}

impl Default for Policy {
    fn default() -> Self {
        Self { enabled: true, attempt: Duration::from_millis(500), hedge: false }
    }
}

/// What has happened since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Frames sent for slots that no frame carried before.
    pub first: u64,
    /// Deadlines that passed.
    pub late: u64,
    /// Frames sent again while the first sending could still be answered.
    pub again: u64,
    /// Frames that were not sent again for want of budget.
    pub spared: u64,
    pub ejections: u64,
}

/// See the module's text.
#[derive(Debug)]
pub struct Health {
    policy: Policy,
    nodes: Vec<Node>,
    sizes: Sizes,
    budget: Budget,
    left: Vec<Left>,
    random: u64,
    pub counts: Counts,
}

#[derive(Clone, Debug)]
struct Node {
    breaker: Breaker,
    pattern: Pattern,
    /// Slots sent and neither answered nor lost.
    outstanding: usize,
    /// When it was last sent a frame.
    asked: Instant,
    /// When it last let a deadline pass; cleared by any answer.
    late: Option<Instant>,
    /// It answers no sign of life.
    hung: bool,
}

/// A frame whose slots have their results from elsewhere.
#[derive(Debug)]
struct Left {
    ticket: Ticket,
    node: NodeIndex,
    slots: usize,
    sent: Instant,
}

/// Shared by the exchanges of a router, which run on one thread, and those who
/// want to know how its nodes are.
#[derive(Clone, Debug)]
pub struct SharedHealth(Arc<Mutex<Health>>);

impl SharedHealth {
    pub fn new(policy: Policy, seed: u64, now: Instant) -> Self {
        Self(Arc::new(Mutex::new(Health::new(policy, seed, now))))
    }

    pub fn lock(&self) -> MutexGuard<'_, Health> {
        self.0.lock()
    }
}

impl Health {
    pub fn new(policy: Policy, seed: u64, now: Instant) -> Self {
        Self {
            policy,
            nodes: Vec::new(),
            sizes: Sizes::default(),
            budget: Budget::new(now),
            left: Vec::new(),
            // Xorshift never leaves zero.
            random: seed | 1,
            counts: Counts::default(),
        }
    }

    fn node(&mut self, index: NodeIndex, now: Instant) -> &mut Node {
        let at = index.0 as usize;
        while self.nodes.len() <= at {
            self.nodes.push(Node {
                breaker: Breaker::new(now),
                pattern: Pattern::default(),
                outstanding: 0,
                asked: now,
                late: None,
                hung: false,
            });
        }
        &mut self.nodes[at]
    }

    /// Which of an expert's `owners` to ask; `given` says how many slots of the
    /// same layer a node has been given already. `None` only where `owners` has
    /// nobody but `avoid`.
    pub fn choose(
        &mut self,
        owners: &[NodeIndex],
        avoid: Option<NodeIndex>,
        given: impl Fn(NodeIndex) -> usize,
        now: Instant,
    ) -> Option<NodeIndex> {
        let others = || owners.iter().copied().filter(|&owner| Some(owner) != avoid);
        if !self.policy.enabled {
            return others().min_by_key(|&owner| given(owner));
        }
        let mut count = 0;
        let mut last = None;
        for owner in others() {
            if self.is_fit(owner, now) {
                count += 1;
                last = Some(owner);
            }
        }
        match count {
            // Nobody is fit: then the least bad of all has to do.
            0 => others()
                .min_by(|&a, &b| self.badness(a, &given).total_cmp(&self.badness(b, &given))),
            1 => last,
            count => {
                let fit =
                    |health: &Self, at| others().filter(|&owner| health.is_fit(owner, now)).nth(at);
                let first = self.random(count);
                let second = (first + 1 + self.random(count - 1)) % count;
                let (first, second) = (fit(self, first)?, fit(self, second)?);
                for node in [first, second] {
                    if self.is_forgotten(node, now) && given(node) == 0 {
                        return Some(node);
                    }
                }
                let load = |node| self.load(node, &given);
                Some(if load(second) < load(first) { second } else { first })
            }
        }
    }

    /// Neither ejected nor late nor hung.
    fn is_fit(&self, index: NodeIndex, now: Instant) -> bool {
        self.nodes.get(index.0 as usize).is_none_or(|node| {
            let late = node.late.is_some_and(|at| now.saturating_duration_since(at) < LATE);
            !node.hung && !late && node.breaker.admits(now)
        })
    }

    fn is_forgotten(&self, index: NodeIndex, now: Instant) -> bool {
        self.nodes.get(index.0 as usize).is_some_and(|node| {
            node.outstanding == 0 && now.saturating_duration_since(node.asked) >= FORGOTTEN
        })
    }

    /// The time until a slot more would be done, in slots of a node of the usual speed.
    fn load(&self, index: NodeIndex, given: &impl Fn(NodeIndex) -> usize) -> f64 {
        let (outstanding, slowness) =
            self.nodes.get(index.0 as usize).map_or((0, 1.0), |n| (n.outstanding, n.pattern.mean));
        (FRAME + outstanding + given(index) + 1) as f64 * slowness
    }

    fn badness(&self, index: NodeIndex, given: &impl Fn(NodeIndex) -> usize) -> f64 {
        let hung = self.is_hung(index);
        self.load(index, given) + if hung { 1e12 } else { 0.0 }
    }

    /// One of `0..below`.
    fn random(&mut self, below: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 32) as usize % below
    }

    /// A frame of `slots` slots leaves for the node; `first` if nobody has been sent them before.
    pub fn sent(&mut self, index: NodeIndex, slots: usize, first: bool, now: Instant) {
        if first {
            self.counts.first += 1;
            self.budget.deposit(now);
        }
        let node = self.node(index, now);
        // What it answers after such a time says more than another answer of many.
        node.pattern.is_old |= now.saturating_duration_since(node.asked) >= FORGOTTEN;
        node.asked = now;
        node.outstanding += slots;
        node.breaker.sent(now);
    }

    /// A frame got its results.
    pub fn answered(&mut self, index: NodeIndex, slots: usize, took: Duration, now: Instant) {
        let took = took.as_secs_f64();
        let ratio = self.sizes.predict(slots).map_or(1.0, |mean| took / mean.max(1e-9));
        // Nodes that are slow among others say nothing of what is usual.
        if self.slowness(index) < OUTLIER {
            self.sizes.observe(slots, took);
        }
        let node = self.node(index, now);
        node.outstanding = node.outstanding.saturating_sub(slots);
        node.late = None;
        node.pattern.observe(ratio);
        node.breaker.succeeded(now);
    }

    /// A frame was answered, but not with results. Without a `failure` that says
    /// nothing against the node.
    pub fn refused(
        &mut self,
        index: NodeIndex,
        slots: usize,
        failure: Option<Failure>,
        now: Instant,
    ) {
        let node = self.node(index, now);
        node.outstanding = node.outstanding.saturating_sub(slots);
        node.late = None;
        match failure {
            Some(failure) => self.fail(index, failure, now),
            None => node.breaker.probe_lost(now),
        }
    }

    /// A reply came that no frame asked for.
    pub fn unasked(&mut self, index: NodeIndex, now: Instant) {
        self.fail(index, Failure::Soft, now);
    }

    /// A frame's deadline has passed. It may still be answered.
    pub fn overdue(&mut self, index: NodeIndex, now: Instant) {
        self.counts.late += 1;
        self.node(index, now).late = Some(now);
        self.fail(index, Failure::Hard, now);
    }

    /// A frame will not be answered: it was not written, or its stream is gone.
    pub fn lost(&mut self, index: NodeIndex, slots: usize, now: Instant) {
        let node = self.node(index, now);
        node.outstanding = node.outstanding.saturating_sub(slots);
        node.breaker.probe_lost(now);
    }

    /// The node's stream ended, and with it all that it was asked.
    pub fn down(&mut self, index: NodeIndex, now: Instant) {
        self.left.retain(|left| left.node != index);
        let node = self.node(index, now);
        node.outstanding = 0;
        node.late = None;
        // Who comes back is another process.
        node.pattern = Pattern::default();
        self.fail(index, Failure::Hard, now);
    }

    fn fail(&mut self, index: NodeIndex, failure: Failure, now: Instant) {
        if self.policy.enabled {
            let ejected = self.node(index, now).breaker.failed(failure, now);
            self.counts.ejections += u64::from(ejected);
        }
    }

    /// A frame's slots all have results from elsewhere; its own may still come.
    pub fn leave(&mut self, ticket: Ticket, node: NodeIndex, slots: usize, sent: Instant) {
        if self.left.len() == MOST_LEFT {
            let oldest = self.left.remove(0);
            self.lost(oldest.node, oldest.slots, sent);
        }
        self.left.push(Left { ticket, node, slots, sent });
    }

    /// A reply to a frame that was left; false if it answers none.
    pub fn late_reply(
        &mut self,
        index: NodeIndex,
        ticket: Ticket,
        good: bool,
        now: Instant,
    ) -> bool {
        let mine = |left: &Left| left.ticket == ticket && left.node == index;
        let Some(at) = self.left.iter().position(mine) else { return false };
        let left = self.left.swap_remove(at);
        let took = now.saturating_duration_since(left.sent);
        match good {
            true => self.answered(index, left.slots, took, now),
            false => self.refused(index, left.slots, None, now),
        }
        true
    }

    /// How many times as long as the fastest the node takes.
    fn slowness(&self, index: NodeIndex) -> f64 {
        let means = self.nodes.iter().map(|node| node.pattern.mean);
        self.pattern(index).mean / means.reduce(f64::min).unwrap_or(1.0)
    }

    /// How long a frame may take before another owner is asked: four times what
    /// 99 of 100 such frames of this node take, within bounds. `attempt` counts
    /// from 0; the next ones get twice and four times as long.
    pub fn deadline(&self, index: NodeIndex, slots: usize, attempt: u32) -> Duration {
        let limit = self.policy.attempt;
        let bound = limit.max(MOST_DEADLINE);
        let grown =
            |time: Duration| time.saturating_mul(1 << attempt.min(MOST_DOUBLINGS)).min(bound);
        if !self.policy.enabled {
            return grown(limit);
        }
        let Some(mean) = self.sizes.predict(slots) else { return grown(limit * UNKNOWN) };
        let pattern = self.pattern(index);
        let seconds = |seconds: f64| Duration::try_from_secs_f64(seconds).unwrap_or(limit);
        // A frame whose usual time is beyond the limit is not late for that.
        let most = limit.max(seconds(DEADLINE_P99 * mean * pattern.mean));
        let wanted = seconds(DEADLINE_P99 * mean * pattern.p99);
        grown(wanted.clamp(LEAST_DEADLINE.min(most), most))
    }

    /// After how long another owner is asked as well: where that is wanted, and where the frame is to tell
    /// how slow a slow node is now, which no step waits for.
    pub fn hedge_after(&self, index: NodeIndex, slots: usize) -> Option<Duration> {
        let pattern = self.pattern(index);
        let asks = pattern.is_old && self.slowness(index) >= OUTLIER;
        if !(self.policy.enabled && (self.policy.hedge || asks)) {
            return None;
        }
        let mean = self.sizes.predict(slots)?;
        // Of what is not slow.
        let p95 = if asks { Pattern::default().p95 } else { pattern.p95 };
        let time = Duration::try_from_secs_f64(mean * p95).ok()?;
        Some(time.max(LEAST_HEDGE))
    }

    fn pattern(&self, index: NodeIndex) -> Pattern {
        self.nodes.get(index.0 as usize).map_or_else(Pattern::default, |node| node.pattern)
    }

    /// Whether a frame may be sent again although its first sending may still be answered.
    pub fn may_send_again(&mut self, now: Instant) -> bool {
        let may = !self.policy.enabled || self.budget.withdraw(now);
        match may {
            true => self.counts.again += 1,
            false => self.counts.spared += 1,
        }
        may
    }

    /// A frame has to be sent again, as it is lost; the budget hears of it.
    pub fn must_send_again(&mut self, now: Instant) {
        self.budget.owe(now);
    }

    /// The node answers no sign of life, or does again. True if that is new.
    pub fn set_hung(&mut self, index: NodeIndex, hung: bool, now: Instant) -> bool {
        let hung = hung && self.policy.enabled;
        let node = self.node(index, now);
        std::mem::replace(&mut node.hung, hung) != hung
    }

    pub fn is_hung(&self, index: NodeIndex) -> bool {
        self.nodes.get(index.0 as usize).is_some_and(|node| node.hung)
    }

    /// Why a node that gives signs of life gets less than others, for people; nothing if it does not.
    pub fn trouble(&self, index: NodeIndex, now: Instant) -> Option<String> {
        let node = self.nodes.get(index.0 as usize)?;
        match node.breaker.state {
            State::Ejected(until) => {
                let left = until.saturating_duration_since(now);
                Some(format!("ejected after failures, to be tried again in {left:.1?}"))
            }
            State::Probing => Some("ejected after failures, being tried".to_owned()),
            State::Closed => {
                let slowness = self.slowness(index);
                let slow = || format!("takes {slowness:.1} times as long as the fastest");
                (slowness >= OUTLIER).then(slow)
            }
        }
    }
}

#[cfg(test)]
mod tests;
