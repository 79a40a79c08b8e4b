//! Who computes what in the next step: continuous batching with chunked
//! prefill under a token budget. Pure state: no clock, no tensors, no sockets.
//!
//! A sequence is its tokens and how many of them have their KV computed. One
//! token behind is decode; more is prefill. Decode goes first, and prompts get
//! what [`pace`] leaves them, so a long one does not stall running streams. When the KV pages run out, the
//! youngest sequence gives its pages back and starts over later; a replay gives
//! the same bits (ARCHITECTURE.md, invariant 1), so its client sees only a pause.

mod pace;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use model::PageId;
use pace::Pace;

/// Where pages come from and go back to.
pub trait Pages {
    fn alloc(&mut self) -> Option<PageId>;
    fn free(&mut self, page: PageId);
}

/// The bounds a step is planned under.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Tokens computed in one step, over all sequences.
    pub step_tokens: usize,
    /// Tokens of one prompt computed in one step.
    pub prefill_chunk: usize,
    /// Sequences that hold KV pages at once.
    pub max_running: usize,
    /// Tokens per KV page.
    pub page_tokens: usize,
    /// Time between two tokens of a stream that prompts may not push beyond.
    pub tpot_target: Option<Duration>,
}

/// Names a sequence; ascending in order of arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeqId(pub u64);

/// A sequence as the scheduler sees it.
#[derive(Debug)]
pub struct Sequence {
    /// The prompt and everything generated so far.
    pub tokens: Vec<u32>,
    /// How many of `tokens` have their KV in `pages`.
    pub computed: usize,
    pub pages: Vec<PageId>,
}

/// One sequence's part of a step: tokens `start .. start + len`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    pub id: SeqId,
    pub start: usize,
    pub len: usize,
    /// The part reaches the sequence's end, so its last row yields a token.
    pub last: bool,
}

/// See the module's text.
pub struct Scheduler {
    limits: Limits,
    pace: Pace,
    sequences: BTreeMap<SeqId, Sequence>,
    /// Holding pages, in order of admission.
    running: Vec<SeqId>,
    waiting: VecDeque<SeqId>,
    next_id: u64,
}

impl Scheduler {
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            pace: Pace::new(limits.tpot_target),
            sequences: BTreeMap::new(),
            running: Vec::new(),
            waiting: VecDeque::new(),
            next_id: 0,
        }
    }

    /// Takes in a sequence of at least one token; it waits its turn.
    pub fn push(&mut self, tokens: Vec<u32>) -> SeqId {
        let id = SeqId(self.next_id);
        self.next_id += 1;
        self.sequences.insert(id, Sequence { tokens, computed: 0, pages: Vec::new() });
        self.waiting.push_back(id);
        id
    }

    pub fn get(&self, id: SeqId) -> Option<&Sequence> {
        self.sequences.get(&id)
    }

    pub fn running(&self) -> usize {
        self.running.len()
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Plans the next step. `paused` sequences keep their pages but compute
    /// nothing. Parts are in order of admission, decode before prefill.
    pub fn plan(&mut self, pages: &mut dyn Pages, paused: &dyn Fn(SeqId) -> bool) -> Vec<Part> {
        let mut plan = Vec::new();
        let mut budget = self.limits.step_tokens;
        for decode in [true, false] {
            if !decode {
                budget = budget.min(self.room(plan.len(), paused));
            }
            let mut at = 0;
            while at < self.running.len() && budget > 0 {
                let id = self.running[at];
                at += 1;
                if self.behind(id) == 0 || (self.behind(id) == 1) != decode || paused(id) {
                    continue;
                }
                match self.part(id, budget, pages) {
                    Some(part) => {
                        budget -= part.len;
                        plan.push(part);
                    }
                    // Preempted: `running` lost this sequence and maybe nothing else.
                    None => at = at.min(self.running.len()),
                }
                // A younger one may have been preempted after it was planned.
                plan.retain(|part| self.running.contains(&part.id));
            }
        }
        while budget > 0 && self.running.len() < self.limits.max_running {
            let Some(&id) = self.waiting.front() else { break };
            if !self.admit(id, budget, pages) {
                break;
            }
            self.waiting.pop_front();
            self.running.push(id);
            let part = self.next_part(id, budget);
            budget -= part.len;
            plan.push(part);
        }
        plan
    }

    /// Prompt tokens that a step with `decoding` single tokens has room for.
    fn room(&self, decoding: usize, paused: &dyn Fn(SeqId) -> bool) -> usize {
        let places = self.limits.max_running.saturating_sub(self.running.len());
        let prompts = self.running.iter().filter(|&&id| self.behind(id) > 1 && !paused(id)).count()
            + self.waiting.len().min(places);
        self.pace.room(decoding, prompts)
    }

    /// Records how long a planned step took, from which later ones are sized.
    pub fn took(&mut self, plan: &[Part], time: Duration) {
        self.pace.observe(plan.iter().map(|part| part.len).sum(), time);
    }

    /// Records that a planned part was computed.
    pub fn computed(&mut self, part: Part) {
        if let Some(sequence) = self.sequences.get_mut(&part.id) {
            sequence.computed = part.start + part.len;
        }
    }

    /// Appends a generated token.
    pub fn append(&mut self, id: SeqId, token: u32) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.tokens.push(token);
        }
    }

    /// Forgets a sequence, finished or cancelled, and frees its pages.
    pub fn remove(&mut self, id: SeqId, pages: &mut dyn Pages) {
        if let Some(sequence) = self.sequences.remove(&id) {
            sequence.pages.into_iter().for_each(|page| pages.free(page));
            self.running.retain(|&other| other != id);
            self.waiting.retain(|&other| other != id);
        }
    }

    fn behind(&self, id: SeqId) -> usize {
        let sequence = &self.sequences[&id];
        sequence.tokens.len() - sequence.computed
    }

    fn next_part(&self, id: SeqId, budget: usize) -> Part {
        let sequence = &self.sequences[&id];
        let behind = sequence.tokens.len() - sequence.computed;
        let len = behind.min(self.limits.prefill_chunk).min(budget);
        Part { id, start: sequence.computed, len, last: len == behind }
    }

    /// The sequence's part, with its pages made sure of; preempts the youngest
    /// until they fit. `None` when that was the sequence itself.
    fn part(&mut self, id: SeqId, budget: usize, pages: &mut dyn Pages) -> Option<Part> {
        let part = self.next_part(id, budget);
        while !self.grow(id, part.start + part.len, pages) {
            let youngest = *self.running.iter().max().expect("the sequence itself is running");
            self.preempt(youngest, pages);
            if youngest == id {
                return None;
            }
        }
        Some(part)
    }

    /// Gives a waiting sequence the pages of its first part, or takes none.
    fn admit(&mut self, id: SeqId, budget: usize, pages: &mut dyn Pages) -> bool {
        let part = self.next_part(id, budget);
        let fits = self.grow(id, part.start + part.len, pages);
        if !fits {
            self.release(id, pages);
        }
        fits
    }

    fn grow(&mut self, id: SeqId, tokens: usize, pages: &mut dyn Pages) -> bool {
        let want = tokens.div_ceil(self.limits.page_tokens);
        let held = &mut self.sequences.get_mut(&id).expect("planned sequences exist").pages;
        while held.len() < want {
            match pages.alloc() {
                Some(page) => held.push(page),
                None => return false,
            }
        }
        true
    }

    fn preempt(&mut self, id: SeqId, pages: &mut dyn Pages) {
        self.release(id, pages);
        self.running.retain(|&other| other != id);
        self.waiting.push_front(id);
    }

    fn release(&mut self, id: SeqId, pages: &mut dyn Pages) {
        let sequence = self.sequences.get_mut(&id).expect("known sequences exist");
        sequence.pages.drain(..).for_each(|page| pages.free(page));
        sequence.computed = 0;
    }
}

#[cfg(test)]
mod tests;
