//! One step: the tokens of a micro-batch on their way through the layers, and every buffer they
//! need.
//!
//! A step mixes prefill chunks and single decode tokens of many sequences. Buffers grow to the
//! largest step seen and stay, so a steady stream of steps allocates nothing. What the caller
//! composed is checked once, when the step begins; it refuses what does not fit the model.

use std::ops::Range;

use half::bf16;

use crate::activations::as_wire;
use crate::attention::AttentionScratch;
use crate::config::Config;
use crate::error::StepError;
use crate::gate::GateScratch;
use crate::kv::PageId;
use crate::numerics::Numerics;
use crate::parallel::{Arena, grown};
use crate::sample::NonFinite;
use crate::trunk::StepMemory;
use kernels::{Acts, Gated};

/// Which tokens of a chunk are to have logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// None: more of the prompt is to come.
    None,
    /// The last one, to go on from.
    Last,
    /// Every one, for log-probabilities of the prompt.
    All,
}

/// Consecutive tokens of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// Token ids, at least one.
    pub tokens: &'a [u32],
    /// Position of the first one; all before it are in the cache already.
    pub start: usize,
    /// The sequence's pages, in order; they cover all positions up to the last token's.
    pub pages: &'a [PageId],
    /// Which tokens are to have logits.
    pub logits: LogitRows,
}

/// What the gate of an MoE layer decided: rows to be sent to experts.
#[derive(Clone, Copy, Debug)]
pub struct Routed<'a> {
    /// `[count, hidden]` little-endian values of the numerics class.
    pub rows: &'a [u8],
    /// Tokens.
    pub count: usize,
    /// Experts that each token goes to.
    pub top_k: usize,
    /// `[count, top_k]`, ascending within a row; the place in the row is the slot.
    pub experts: &'a [u32],
    /// `[count, top_k]`, with the routed scaling factor in them.
    pub weights: &'a [f32],
}

impl<'a> Routed<'a> {
    /// The wire form of one row.
    pub fn row(&self, index: usize) -> &'a [u8] {
        let bytes = self.rows.len() / self.count.max(1);
        &self.rows[index * bytes..(index + 1) * bytes]
    }
}

/// Where the rows of a step belong.
#[derive(Default)]
pub(crate) struct Batch {
    spans: Vec<Span>,
    /// Page tables of all chunks, one after the other.
    pages: Vec<PageId>,
    /// Chunk of each row.
    chunks: Vec<u32>,
    /// Cosines and sines of each row's position, `[rows, qk_rope]`.
    rotations: Vec<f32>,
    rope_width: usize,
    /// Rows that are to have logits.
    wanted: Vec<u32>,
}

struct Span {
    rows: Range<usize>,
    start: usize,
    pages: Range<usize>,
}

/// The state of one micro-batch: make one, use it for every step.
#[derive(Default)]
pub struct Step {
    pub(crate) batch: Batch,
    pub(crate) numerics: Option<Numerics>,
    pub(crate) hidden: usize,
    pub(crate) top_k: usize,
    /// Residual stream, `[rows, hidden]`.
    pub(crate) residual: Vec<f32>,
    /// After a norm, `[rows, hidden]`.
    pub(crate) normed: Vec<f32>,
    /// The same, rounded.
    pub(crate) rounded: Vec<bf16>,
    /// What a sublayer adds, `[rows, hidden]`.
    pub(crate) delta: Vec<f32>,
    /// Result of the shared experts, `[rows, hidden]`.
    pub(crate) shared: Vec<f32>,
    /// Affinities, `[rows, experts]`.
    pub(crate) scores: Vec<f32>,
    pub(crate) experts: Vec<u32>,
    pub(crate) weights: Vec<f32>,
    pub(crate) logits: Vec<f32>,
    /// Tokens of wanted rows, where they are chosen beside the logits.
    pub(crate) tokens: Vec<Option<Result<u32, NonFinite>>>,
    pub(crate) attention: AttentionScratch,
    pub(crate) ffn: Gated,
    pub(crate) gate: Arena<GateScratch>,
    pub(crate) combine: Arena<crate::combine::CombineScratch>,
    /// What a trunk on a device has of the step there, in place of most of the above.
    pub(crate) gpu: Option<Box<StepMemory>>,
    /// Layer whose gate has decided and which waits for its experts.
    pub(crate) routed_layer: Option<usize>,
    /// Layer whose shared experts `shared` holds.
    pub(crate) shared_layer: Option<usize>,
}

// === impl Batch ===

impl Batch {
    /// Takes over the chunks' places after checking them against the model.
    pub fn fill(&mut self, config: &Config, chunks: &[Chunk<'_>]) -> Result<(), StepError> {
        for (index, chunk) in chunks.iter().enumerate() {
            check(config, index, chunk)?;
        }
        let Batch { spans, pages, chunks: owners, rotations, rope_width, wanted } = self;
        spans.clear();
        pages.clear();
        owners.clear();
        wanted.clear();
        *rope_width = config.qk_rope;
        let rows: usize = chunks.iter().map(|c| c.tokens.len()).sum();
        let mut tables = grown(rotations, rows * config.qk_rope).chunks_mut(config.qk_rope);
        let mut row = 0;
        for (index, chunk) in chunks.iter().enumerate() {
            let end = row + chunk.tokens.len();
            let first_page = pages.len();
            pages.extend_from_slice(chunk.pages);
            spans.push(Span { rows: row..end, start: chunk.start, pages: first_page..pages.len() });
            owners.resize(end, index as u32);
            for (position, table) in (chunk.start..).zip(tables.by_ref().take(end - row)) {
                config.rope.table(position, table);
            }
            match chunk.logits {
                LogitRows::None => {}
                LogitRows::Last => wanted.push(end as u32 - 1),
                LogitRows::All => wanted.extend(row as u32..end as u32),
            }
            row = end;
        }
        Ok(())
    }

    pub fn rows(&self) -> usize {
        self.chunks.len()
    }

    pub fn wanted(&self) -> &[u32] {
        &self.wanted
    }

    pub fn chunk_of(&self, row: usize) -> usize {
        self.chunks[row] as usize
    }

    /// Position of a chunk's first row.
    pub fn start(&self, chunk: usize) -> usize {
        self.spans[chunk].start
    }

    pub fn chunk_rows(&self, chunk: usize) -> Range<usize> {
        self.spans[chunk].rows.clone()
    }

    /// The page table of a chunk.
    pub fn pages(&self, chunk: usize) -> &[PageId] {
        &self.pages[self.spans[chunk].pages.clone()]
    }

    pub fn position(&self, row: usize) -> usize {
        let span = &self.spans[self.chunk_of(row)];
        span.start + row - span.rows.start
    }

    /// Page and slot of a row's position, for pages of `tokens` positions.
    pub fn place(&self, row: usize, tokens: usize) -> (PageId, usize) {
        let position = self.position(row);
        (self.pages(self.chunk_of(row))[position / tokens], position % tokens)
    }

    /// Cosines and sines of a row's position.
    pub fn rotation(&self, row: usize) -> &[f32] {
        &self.rotations[row * self.rope_width..(row + 1) * self.rope_width]
    }

    /// Checks that every chunk's pages cover its positions, for pages of `tokens` positions of a
    /// pool of `total`.
    pub fn check_pages(&self, tokens: usize, total: usize) -> Result<(), StepError> {
        for (chunk, span) in self.spans.iter().enumerate() {
            let positions = span.start + span.rows.len();
            let pages = self.pages(chunk);
            let covered = pages.len().saturating_mul(tokens) >= positions;
            if !covered || pages.iter().any(|p| p.0 as usize >= total) {
                return Err(StepError::Pages { chunk, pages: pages.len(), positions });
            }
        }
        Ok(())
    }
}

fn check(config: &Config, index: usize, chunk: &Chunk<'_>) -> Result<(), StepError> {
    if chunk.tokens.is_empty() {
        return Err(StepError::Empty { chunk: index });
    }
    let position = chunk.start.saturating_add(chunk.tokens.len() - 1);
    if position >= config.max_positions {
        let limit = config.max_positions;
        return Err(StepError::Context { chunk: index, position, limit });
    }
    match chunk.tokens.iter().find(|t| **t as usize >= config.vocab) {
        Some(&token) => Err(StepError::Token { chunk: index, token, vocab: config.vocab }),
        None => Ok(()),
    }
}

// === impl Step ===

impl Step {
    /// Without buffers yet; for a trunk of the host's, others make theirs (`Trunk::step`).
    pub fn new() -> Step {
        Step::default()
    }

    /// Tokens of the step.
    pub fn rows(&self) -> usize {
        self.batch.rows()
    }

    /// Rows that are to have logits: chunk by chunk, ascending in a chunk.
    pub fn wanted(&self) -> usize {
        self.batch.wanted().len()
    }

    /// What the last [`crate::Trunk::attend`] that returned true decided.
    pub fn routed(&self) -> Routed<'_> {
        let count = self.batch.rows();
        let chosen = count * self.top_k;
        Routed {
            rows: match &self.gpu {
                Some(memory) => memory.sent(count * self.hidden),
                None => as_wire(self.acts()),
            },
            count,
            top_k: self.top_k,
            experts: &self.experts[..chosen],
            weights: &self.weights[..chosen],
        }
    }

    /// Leaves out the results of some `slots` (row × top_k + slot) of one row: their weight goes to
    /// the others, if there are any.
    pub fn drop_slots(&mut self, row: usize, slots: &[usize]) {
        let of_row = row * self.top_k..(row + 1) * self.top_k;
        let kept = of_row.clone().filter(|slot| !slots.contains(slot));
        let all: f32 = self.weights[of_row.clone()].iter().sum();
        let left: f32 = kept.map(|slot| self.weights[slot]).sum();
        let scale = if left > 0.0 { all / left } else { 1.0 };
        for slot in of_row {
            let dropped = slots.contains(&slot);
            self.weights[slot] = if dropped { 0.0 } else { self.weights[slot] * scale };
        }
    }

    /// Makes a row one that computes on without any trouble, to no purpose: what it held is lost.
    pub fn silence(&mut self, row: usize) {
        match &mut self.gpu {
            Some(memory) => memory.silence(row),
            None => self.residual[row * self.hidden..(row + 1) * self.hidden].fill(0.0),
        }
    }

    /// The normed rows as they enter products.
    pub(crate) fn acts(&self) -> Acts<'_> {
        let len = self.batch.rows() * self.hidden;
        match self.numerics {
            Some(Numerics::Bf16) => Acts::Bf16(&self.rounded[..len]),
            _ => Acts::F32(&self.normed[..len]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_weight_of_dropped_slots_goes_to_the_rest_of_their_row() {
        let weights = vec![0.5, 0.5, 1.5, 0.1, 0.2, 0.7];
        let fresh = || Step { top_k: 3, weights: weights.clone(), ..Step::default() };
        let mut step = fresh();
        step.drop_slots(0, &[2]);
        assert_eq!(step.weights, [1.25, 1.25, 0.0, 0.1, 0.2, 0.7]);
        let mut step = fresh();
        step.drop_slots(1, &[3, 4]);
        assert_eq!(step.weights[..5], [0.5, 0.5, 1.5, 0.0, 0.0]);
        assert!((step.weights[5] - 1.0).abs() < 1e-6);
        let mut step = fresh();
        step.drop_slots(0, &[0, 1, 2]);
        assert_eq!(step.weights, [0.0, 0.0, 0.0, 0.1, 0.2, 0.7], "nobody is left to take it");
    }

    #[test]
    fn a_silenced_row_is_finite_and_alone() {
        let residual = vec![1.0, f32::NAN, f32::INFINITY, 2.0, 3.0, 4.0];
        let mut step = Step { hidden: 3, residual, ..Step::default() };
        step.silence(0);
        assert_eq!(step.residual, [0.0, 0.0, 0.0, 2.0, 3.0, 4.0]);
    }
}
