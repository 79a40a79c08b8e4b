//! One sequence's answer: what to sample, what its client was sent, when it
//! ends. A client that reads slowly fills its bounded channel and pauses its
//! own sequence only; so does an expert that is missing and waited for.

use std::time::Instant;

use mesh::telemetry::propagate;
use model::LogitRows;
use model::sample::{self, Choice, Draw, History, NonFinite, Row, Scored, Scratch};
use proto::v1::generate_event::Event;
use proto::v1::{
    Alternative, FinishReason, Finished, GenerateEvent, OnMissing, PromptScores, TokenEvent,
    TokenScore,
};
use proto::{ExpertId, LayerId};
use tonic::Status;
use tracing::Span;

use super::Job;
use crate::metrics::RouterMetrics;
use crate::scheduler::Part;

/// Events one step may owe a stream: prompt scores, a token, the end.
const EVENTS_PER_STEP: usize = 3;

/// What came of sampling.
pub(super) enum Next {
    Token {
        id: u32,
        finished: bool,
    },
    /// The logits were not finite; the stream was told.
    Failed,
}

/// See the module's text.
pub(super) struct Stream {
    job: Job,
    prompt_len: usize,
    generated: usize,
    /// Prompt tokens whose scores were sent, the first (which has none) included.
    scored: usize,
    history: History,
    last_token: Option<Instant>,
    /// Experts' results left out since the last token, and in all.
    dropped: (u64, u64),
    stalled: Option<Stalled>,
    pub span: Span,
    /// A collector gets its span, and those of its steps.
    pub traced: bool,
}

/// A sequence that needs an expert which is not there.
pub(super) struct Stalled {
    pub layer: LayerId,
    pub expert: ExpertId,
    /// Since when it has made no progress.
    pub since: Instant,
    /// It is not computed meanwhile; false while it is tried again.
    parked: bool,
}

impl Stream {
    /// `tokens` are the job's own, which the scheduler holds now.
    pub fn new(job: Job, tokens: &[u32]) -> Self {
        let prompt_len = tokens.len() - job.emitted;
        let mut history = History::default();
        if job.params.needs_history() {
            history = History::new(&tokens[..prompt_len]);
            tokens[prompt_len..].iter().for_each(|&token| history.push(token));
        }
        let (generated, span) = (job.emitted, job.span.clone());
        let traced = propagate::is_sampled(&span);
        Self {
            job,
            prompt_len,
            generated,
            scored: 1,
            history,
            last_token: None,
            dropped: (0, 0),
            stalled: None,
            span,
            traced,
        }
    }

    /// What is to be done about a missing expert.
    pub fn on_missing(&self) -> OnMissing {
        self.job.on_missing
    }

    /// Waits for an expert; the time counts from when it first did without progress between.
    pub fn park(&mut self, layer: LayerId, expert: ExpertId, now: Instant) {
        let since = self.stalled.as_ref().map_or(now, |stalled| stalled.since);
        self.stalled = Some(Stalled { layer, expert, since, parked: true });
    }

    /// What it waits for.
    pub fn parked(&self) -> Option<&Stalled> {
        self.stalled.as_ref().filter(|stalled| stalled.parked)
    }

    /// The expert is there again: it is computed with the next step.
    pub fn unpark(&mut self) {
        if let Some(stalled) = &mut self.stalled {
            stalled.parked = false;
        }
    }

    /// A part of it was computed.
    pub fn progressed(&mut self) {
        self.stalled = None;
    }

    /// Results of `count` experts were left out.
    pub fn leave_out(&mut self, count: u64) {
        self.dropped.0 += count;
        self.dropped.1 += count;
        self.span.record("dropped_experts", self.dropped.1);
    }

    /// The client went away.
    pub fn is_closed(&self) -> bool {
        self.job.events.is_closed()
    }

    /// The channel could not take what the next step may produce.
    pub fn is_full(&self) -> bool {
        self.job.events.capacity() < EVENTS_PER_STEP
    }

    /// Ends the stream with an error once its deadline has passed.
    pub fn expire(&mut self, now: Instant) -> bool {
        let late = now >= self.job.deadline;
        if late {
            let waited = now - self.job.arrived;
            self.fail(Status::deadline_exceeded(format!("not finished within {waited:.1?}")));
        }
        late
    }

    pub fn fail(&mut self, status: Status) {
        // Fails only when the client has gone or reads nothing: either way it is lost.
        let _ = self.job.events.try_send(Err(status));
    }

    /// The part computes prompt tokens, not a generated one.
    pub fn is_prefill(&self, part: &Part) -> bool {
        part.start < self.prompt_len
    }

    /// Which rows of a part need logits.
    pub fn wanted_logits(&self, part: &Part) -> LogitRows {
        let scores_left = self.job.prompt_logprobs.is_some()
            && self.scored < self.prompt_len
            && part.start + part.len >= self.scored;
        match (scores_left, part.last) {
            (true, _) => LogitRows::All,
            (false, true) => LogitRows::Last,
            (false, false) => LogitRows::None,
        }
    }

    /// Sends the scores of the prompt tokens that this part's rows predict.
    /// `logits` holds one row per token of the part.
    pub fn score_prompt(&mut self, part: &Part, tokens: &[u32], logits: &[f32], scratch: &Scratch) {
        let Some(top) = self.job.prompt_logprobs else { return };
        let vocab = logits.len() / part.len;
        let mut scores = Vec::new();
        // Row r of the part is position start + r and predicts the one after it.
        while self.scored < self.prompt_len && self.scored - 1 < part.start + part.len {
            let row = self.scored - 1 - part.start;
            let logits = &logits[row * vocab..(row + 1) * vocab];
            let id = tokens[self.scored];
            let Ok((logprob, top)) = sample::score(logits, id, top as usize, scratch) else {
                break;
            };
            scores.push(token_score(id, logprob, top));
            self.scored += 1;
        }
        if !scores.is_empty() {
            self.send(Event::Prompt(PromptScores { scores }));
        }
    }

    /// How many they are.
    pub fn wanted_rows(&self, part: &Part) -> usize {
        match self.wanted_logits(part) {
            LogitRows::None => 0,
            LogitRows::Last => 1,
            LogitRows::All => part.len,
        }
    }

    /// How the last of a part's rows draws the token at `position` where its logits are, if it can.
    pub fn draw(&self, part: &Part, position: u64) -> Option<Draw> {
        match self.wanted_logits(part) {
            LogitRows::Last => self.job.params.draw(position),
            LogitRows::All | LogitRows::None => None,
        }
    }

    /// What to choose the token at `position` from and by.
    pub fn row<'a>(&'a self, logits: &'a mut [f32], position: u64) -> Row<'a> {
        Row { logits, params: &self.job.params, history: &self.history, position }
    }

    /// Sends the chosen token, and the end if it ends here.
    pub fn next_token(
        &mut self,
        choice: Result<Choice, NonFinite>,
        metrics: &RouterMetrics,
    ) -> Next {
        let params = &self.job.params;
        let Ok(choice) = choice else {
            self.fail(Status::internal("the model's logits are not finite"));
            return Next::Failed;
        };
        let id = choice.token;
        if params.needs_history() {
            self.history.push(id);
        }
        self.generated += 1;
        self.observe(metrics);
        let score = choice.logprob.map(|logprob| token_score(id, logprob, choice.top));
        let dropped_experts = std::mem::take(&mut self.dropped.0);
        self.send(Event::Token(TokenEvent { id, score, dropped_experts }));

        let reason = if self.job.stop_ids.contains(&id) {
            FinishReason::Stop
        } else if self.generated >= self.job.max_tokens {
            FinishReason::Length
        } else {
            return Next::Token { id, finished: false };
        };
        self.send(Event::Finished(Finished {
            reason: reason as i32,
            prompt_tokens: self.prompt_len as u32,
            completion_tokens: self.generated as u32,
        }));
        Next::Token { id, finished: true }
    }

    fn observe(&mut self, metrics: &RouterMetrics) {
        let now = Instant::now();
        metrics.generated.inc();
        match self.last_token.replace(now) {
            None => metrics.ttft.observe((now - self.job.arrived).as_secs_f64()),
            Some(last) => metrics.tpot.observe((now - last).as_secs_f64()),
        }
    }

    fn send(&self, event: Event) {
        // Room was made sure of before the step; a closed channel is seen before the next.
        let _ = self.job.events.try_send(Ok(GenerateEvent { event: Some(event) }));
    }
}

fn token_score(id: u32, logprob: f32, top: Vec<Scored>) -> TokenScore {
    let top = top.into_iter().map(|(id, logprob)| Alternative { id, logprob }).collect();
    TokenScore { id, logprob, top }
}
