//! The loop: plan a step, run it through the layers, sample, answer. The only
//! file that alternates maths and network, on its own OS thread. It owns the
//! trunk, the KV pool and every sequence; others reach it through one bounded
//! channel of jobs and read its [`Gauges`].

mod job;
mod missing;
mod overlap;
mod stream;

use std::collections::HashMap;
use std::iter::repeat_n;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mesh::failpoint;
use mesh::pump::Pump;
use missing::Shortfall;
use model::sample::{Choice, Draw, NonFinite, Scratch, sample_all};
use model::{Answers, Chunk, GpuError, KvPool, Step, StepError, Trunk};
use proto::LayerId;
use tokio::sync::mpsc::Receiver;
use tokio::sync::mpsc::error::TryRecvError;
use tracing::Span;

use crate::exchange::LANES;
use crate::experts::Experts;
use crate::history::{History, list};
use crate::metrics::RouterMetrics;
use crate::scheduler::{Pages, Part, Scheduler, SeqId};
pub use job::Job;
pub use overlap::Splitting;
use overlap::{Overlap, halves};
use stream::{Next, Stream};

/// How long an engine with nothing to compute waits before it looks for
/// clients that went away or caught up.
const IDLE: Duration = Duration::from_millis(5);

/// What the engine tells others about itself; plain counters.
#[derive(Debug, Default)]
pub struct Gauges {
    pub running: AtomicU64,
    pub waiting: AtomicU64,
    pub kv_pages_used: AtomicU64,
    pub generated: AtomicU64,
    pub prefilled: AtomicU64,
    pub in_flight: AtomicU64,
    /// Set by whoever drains: no new jobs are sent after it.
    pub draining: AtomicBool,
}

/// What an engine is made of.
pub struct Parts {
    pub trunk: Trunk,
    /// The trunk's device chooses tokens that are plainly drawn; a CPU leaves that to sampling.
    pub draws_on_device: bool,
    pub kv: KvPool,
    /// One per micro-batch.
    pub steps: [Step; LANES],
    pub experts: Experts,
    /// How long a sequence waits for an expert without a live owner.
    pub expert_wait: Duration,
    pub scheduler: Scheduler,
    pub sampling: Scratch,
    pub splitting: Splitting,
    pub jobs: Receiver<Job>,
    /// The streams to the nodes live on it.
    pub pump: Pump,
    pub gauges: Arc<Gauges>,
    pub metrics: RouterMetrics,
    pub history: History,
}

/// See the module's text.
pub struct Engine {
    parts: Parts,
    streams: HashMap<SeqId, Stream>,
    overlap: Overlap,
    /// Steps begun.
    count: u64,
    /// Of the micro-batch that is being answered; kept for their memory.
    draws: Vec<Option<Draw>>,
    owed: Vec<Owed>,
}

/// The next token of a sequence whose last row a step has computed.
struct Owed {
    id: SeqId,
    position: u64,
    /// The row of logits to choose from; `None` if the token was chosen beside the logits.
    row: Option<usize>,
    choice: Result<Choice, NonFinite>,
}

impl Pages for KvPool {
    fn alloc(&mut self) -> Option<model::PageId> {
        KvPool::alloc(self)
    }

    fn free(&mut self, page: model::PageId) {
        KvPool::free(self, page);
    }
}

impl Engine {
    pub fn new(parts: Parts) -> Self {
        let overlap = Overlap::new(parts.splitting);
        let (draws, owed) = (Vec::new(), Vec::new());
        Self { parts, streams: HashMap::new(), overlap, count: 0, draws, owed }
    }

    /// Runs until every sender of jobs is gone and every sequence has ended.
    ///
    /// # Errors
    /// The device that computes cannot any more; every stream has been told, and may go on elsewhere.
    pub fn run(&mut self) -> Result<(), GpuError> {
        self.parts.trunk.compute().pool.bind_caller();
        let mut open = true;
        while open || !self.parts.scheduler.is_empty() {
            open = self.take_jobs();
            self.drop_cancelled();
            self.look_for_experts();
            let streams = &self.streams;
            let paused = |id| {
                let idle = |stream: &Stream| stream.is_full() || stream.parked().is_some();
                streams.get(&id).is_some_and(idle)
            };
            let plan = self.parts.scheduler.plan(&mut self.parts.kv, &paused);
            if plan.is_empty() {
                self.publish();
                open = self.idle(open);
                continue;
            }
            let computed = self.compute(&plan);
            self.publish();
            computed?;
        }
        Ok(())
    }

    /// Takes what has been submitted; false when nobody can submit any more.
    fn take_jobs(&mut self) -> bool {
        loop {
            match self.parts.jobs.try_recv() {
                Ok(job) => self.accept(job),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Waits for a job, or a moment when sequences are paused or have left.
    fn idle(&mut self, open: bool) -> bool {
        if !open {
            self.parts.pump.run_for(IDLE, std::future::pending::<()>());
            return false;
        }
        let Parts { pump, jobs, scheduler, .. } = &mut self.parts;
        let job = match scheduler.is_empty() {
            true => Some(pump.run(jobs.recv())),
            false => pump.run_for(IDLE, jobs.recv()),
        };
        match job {
            Some(Some(job)) => self.accept(job),
            Some(None) => return false,
            None => {}
        }
        true
    }

    fn accept(&mut self, mut job: Job) {
        self.parts.metrics.requests.inc();
        let id = self.parts.scheduler.push(std::mem::take(&mut job.tokens));
        let tokens = self.parts.scheduler.get(id).map_or(&[][..], |sequence| &sequence.tokens);
        self.streams.insert(id, Stream::new(job, tokens));
    }

    fn drop_cancelled(&mut self) {
        let now = Instant::now();
        let metrics = &self.parts.metrics;
        let ended: Vec<SeqId> = self
            .streams
            .iter_mut()
            .filter_map(|(&id, stream)| {
                if stream.is_closed() {
                    metrics.cancelled.inc();
                    return Some(id);
                }
                stream.expire(now).then(|| {
                    metrics.failed.inc();
                    id
                })
            })
            .collect();
        for id in ended {
            self.end(id);
        }
    }

    fn end(&mut self, id: SeqId) {
        self.parts.history.record("end", format_args!("\"seq\":{}", id.0));
        self.streams.remove(&id);
        self.parts.scheduler.remove(id, &mut self.parts.kv);
    }

    /// One step, as a whole or as two micro-batches.
    fn compute(&mut self, plan: &[Part]) -> Result<(), GpuError> {
        failpoint::pass("engine");
        let start = Instant::now();
        self.count += 1;
        let count = self.count;
        if self.parts.history.is_on() {
            let seqs = list(plan.iter().map(|part| part.id.0));
            self.parts.history.record("step", format_args!("\"n\":{count},\"seqs\":{seqs}"));
        }
        let rows = plan.iter().map(|part| part.len).sum();
        let split = self.parts.experts.lanes() > 1 && self.overlap.split(rows);
        let cut;
        let batches: [&[Part]; LANES] = if split {
            cut = halves(plan);
            [&cut.0, &cut.1]
        } else {
            [plan, &[]]
        };
        let mut short = Shortfall::default();
        match self.forward(plan, &batches, &mut short) {
            Ok(()) => {}
            Err(StepError::Gpu(error)) => return Err(self.lose(error)),
            // A plan that the trunk refuses is our own mistake, but costs only its step.
            Err(error) => {
                self.fail(plan, &error);
                return Ok(());
            }
        }
        let end = if short.is_all(plan) { "step_failed" } else { "step_end" };
        self.parts.history.record(end, format_args!("\"n\":{count}"));
        for (lane, batch) in batches.iter().enumerate() {
            if let Err(error) = self.answer(lane, batch, &mut short) {
                return Err(self.lose(error));
            }
        }
        if short.is_any() {
            self.make_do(short);
            return Ok(());
        }
        let took = start.elapsed();
        self.overlap.observe(rows, split, took);
        self.parts.scheduler.took(plan, took);
        self.parts.metrics.step.observe(took.as_secs_f64());
        self.parts.history.flush();
        Ok(())
    }

    /// Runs all layers. What it leaves is the logits of the wanted rows. A micro-batch
    /// goes on to its next layer while the rows of the other are away; the bits
    /// depend on neither. Results that cannot be had go into `short`; where that
    /// leaves no sequence, the step ends early.
    fn forward(
        &mut self,
        plan: &[Part],
        batches: &[&[Part]; LANES],
        short: &mut Shortfall,
    ) -> Result<(), StepError> {
        let rows: usize = plan.iter().map(|part| part.len).sum();
        let span = self.step_span(plan, rows);
        let (traced, _in_step) = (!span.is_disabled(), span.enter());
        self.parts.metrics.step_rows.observe(rows as f64);
        let mut lanes = 0;
        for (step, batch) in self.parts.steps.iter_mut().zip(batches).filter(|(_, b)| !b.is_empty())
        {
            let chunks = chunks(&self.parts.scheduler, &self.streams, batch);
            self.parts.trunk.begin(step, &chunks, &self.parts.kv)?;
            lanes += 1;
        }
        let Parts { trunk, kv, experts, steps, .. } = &mut self.parts;
        let layers = trunk.config().layers;
        // The layer whose results each lane waits for, and its span.
        let mut away: [Option<(usize, Span)>; LANES] = Default::default();
        for layer in 0..=layers {
            for (lane, step) in steps.iter_mut().enumerate().take(lanes) {
                if let Some((layer, span)) = away[lane].take() {
                    let _in_layer = span.enter();
                    experts.wait(lane, &step.routed());
                    short.take(experts.gaps(lane), batches[lane], &self.streams, step);
                    if short.is_all(plan) {
                        experts.abandon();
                        return Ok(());
                    }
                    failpoint::fail("trunk", GpuError::lost_as_told)?;
                    trunk.absorb_shares(layer, step, &|slot| experts.share(lane, slot))?;
                    short.silence(step);
                }
                if layer == layers {
                    continue;
                }
                let span = match traced {
                    true => tracing::debug_span!("layer", layer, lane),
                    false => Span::none(),
                };
                let in_layer = span.enter();
                if trunk.attend(layer, step, kv)? {
                    experts.send(lane, LayerId(layer as u32), &step.routed(), &span);
                    trunk.shared(layer, step)?;
                    drop(in_layer);
                    away[lane] = Some((layer, span));
                }
            }
        }
        Ok(())
    }

    /// The step's span hangs under the first traced request it serves; the
    /// others are linked, since one step works for many. None if it serves none.
    fn step_span(&self, plan: &[Part], rows: usize) -> Span {
        let mut traced = plan
            .iter()
            .filter_map(|part| self.streams.get(&part.id))
            .filter(|stream| stream.traced)
            .map(|stream| &stream.span);
        let Some(first) = traced.next() else { return Span::none() };
        let span = tracing::debug_span!(parent: first, "step", rows, sequences = plan.len());
        for other in traced {
            span.follows_from(other);
        }
        span
    }

    /// Chooses the tokens that a micro-batch's sequences are owed and sends them, with the scores
    /// of prompts.
    fn answer(
        &mut self,
        lane: usize,
        plan: &[Part],
        short: &mut Shortfall,
    ) -> Result<(), GpuError> {
        if plan.iter().all(|part| short.is_lost(part.id)) {
            return Ok(());
        }
        let Parts { trunk, draws_on_device, steps, scheduler, sampling, gauges, metrics, .. } =
            &mut self.parts;
        self.draws.clear();
        if *draws_on_device {
            for part in plan {
                let Some(stream) = self.streams.get(&part.id) else { continue };
                let position = scheduler.get(part.id).map_or(0, |s| s.tokens.len()) as u64;
                let draw = stream.draw(part, position);
                self.draws.extend(repeat_n(draw, stream.wanted_rows(part)));
            }
        }
        let Answers { mut tokens, logits } = trunk.answers(&mut steps[lane], &self.draws)?;
        let vocab = trunk.config().vocab;
        // Rows of logits that belong to parts seen.
        let mut seen = 0;
        for &part in plan {
            let Some(stream) = self.streams.get_mut(&part.id) else { continue };
            let wanted = stream.wanted_rows(&part);
            let (chosen, others) = tokens.split_at(wanted);
            tokens = others;
            let chosen = chosen.last().copied().flatten();
            let first = seen;
            seen += if chosen.is_some() { 0 } else { wanted };
            if short.is_lost(part.id) {
                continue;
            }
            stream.progressed();
            let dropped = short.take_dropped(part.id);
            if dropped > 0 {
                stream.leave_out(dropped);
                metrics.dropped_experts.inc_by(dropped);
            }
            scheduler.computed(part);
            if stream.is_prefill(&part) {
                gauges.prefilled.fetch_add(part.len as u64, Ordering::Relaxed);
                metrics.prefilled.inc_by(part.len as u64);
            }
            let sequence = scheduler.get(part.id).map_or(&[][..], |s| s.tokens.as_slice());
            if seen - first == part.len {
                stream.score_prompt(
                    &part,
                    sequence,
                    &logits[first * vocab..seen * vocab],
                    sampling,
                );
            }
            if part.last {
                let (row, choice) = match chosen {
                    Some(token) => (None, token.map(Choice::plain)),
                    None => (Some(seen - 1), Err(NonFinite)),
                };
                let position = sequence.len() as u64;
                self.owed.push(Owed { id: part.id, position, row, choice });
            }
        }
        let count = self.owed.iter().filter(|owed| owed.row.is_some()).count();
        let mut logits = logits.chunks_exact_mut(vocab).enumerate();
        let rows = self.owed.iter_mut().filter_map(|Owed { id, position, row, choice }| {
            let wanted = (*row)?;
            let (_, logits) = logits.find(|(row, _)| *row == wanted)?;
            Some((self.streams.get(id)?.row(logits, *position), choice))
        });
        sample_all(&trunk.compute().pool, count, rows, sampling);
        self.send_owed();
        Ok(())
    }

    /// Sends the tokens that were chosen, and ends the sequences that end with them.
    fn send_owed(&mut self) {
        let Parts { scheduler, gauges, metrics, .. } = &mut self.parts;
        let mut ended = Vec::new();
        for Owed { id, choice, .. } in self.owed.drain(..) {
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            match stream.next_token(choice, metrics) {
                Next::Token { id: token, finished } => {
                    gauges.generated.fetch_add(1, Ordering::Relaxed);
                    scheduler.append(id, token);
                    if finished {
                        ended.push(id);
                    }
                }
                Next::Failed => {
                    metrics.failed.inc();
                    ended.push(id);
                }
            }
        }
        for id in ended {
            self.end(id);
        }
    }

    /// The device cannot compute any more: all streams end, so that gateways resume them elsewhere.
    fn lose(&mut self, error: GpuError) -> GpuError {
        for stream in self.streams.values_mut() {
            self.parts.metrics.failed.inc();
            stream.fail(tonic::Status::unavailable(format!("the router's trunk: {error}")));
        }
        error
    }

    /// The step's results cannot be had: its sequences end, the others go on.
    fn fail(&mut self, plan: &[Part], error: &StepError) {
        tracing::error!(%error, sequences = plan.len(), "step failed");
        self.parts.history.record("step_failed", format_args!("\"n\":{}", self.count));
        for part in plan {
            if let Some(stream) = self.streams.get_mut(&part.id) {
                self.parts.metrics.failed.inc();
                stream.fail(tonic::Status::unavailable(format!("step refused: {error}")));
            }
            self.end(part.id);
        }
    }

    fn publish(&self) {
        let (running, waiting) = (self.parts.scheduler.running(), self.parts.scheduler.waiting());
        let used = self.parts.kv.used();
        self.parts.gauges.running.store(running as u64, Ordering::Relaxed);
        self.parts.gauges.waiting.store(waiting as u64, Ordering::Relaxed);
        self.parts.gauges.kv_pages_used.store(used as u64, Ordering::Relaxed);
        self.parts.gauges.in_flight.store(self.parts.experts.in_flight() as u64, Ordering::Relaxed);
        self.parts.metrics.running.set(running as i64);
        self.parts.metrics.waiting.set(waiting as i64);
        self.parts.metrics.kv_pages_used.set(used as i64);
    }
}

/// A plan's parts as the trunk takes them.
fn chunks<'a>(
    scheduler: &'a Scheduler,
    streams: &HashMap<SeqId, Stream>,
    plan: &[Part],
) -> Vec<Chunk<'a>> {
    plan.iter()
        .filter_map(|part| {
            let sequence = scheduler.get(part.id)?;
            let logits = streams.get(&part.id)?.wanted_logits(part);
            Some(Chunk {
                tokens: &sequence.tokens[part.start..part.start + part.len],
                start: part.start,
                pages: &sequence.pages,
                logits,
            })
        })
        .collect()
}
