//! One sequence's tokens, from whichever routers produce them. It keeps the
//! prompt and every id emitted so far; when a router is lost it sends both to
//! another one of the same numerics class, which goes on after the last id, so
//! the client sees one unbroken stream. Tries and waiting are bounded.

use std::sync::Arc;
use std::time::Duration;

use proto::v1::generate_event::Event as Wire;
use proto::v1::{FinishReason, GenerateEvent, GenerateRequest, TokenEvent, TokenScore};
use tokio::time::Instant;
use tonic::{Code, Status, Streaming};

use super::pick::prefix_key;
use super::router::{Class, Lease, Router};
use super::{POLL_ABSENT, POLL_EVERY, Upstream};
use crate::error::UpstreamError;
use crate::metrics::Outcome;

/// Routers lost without a new token in between, before giving up.
const MAX_LOSSES: u32 = 6;
/// How long to wait for a router to come (back), before and after the first token.
const PATIENCE_BEFORE: Duration = Duration::from_secs(2);
const PATIENCE_AFTER: Duration = Duration::from_secs(20);

/// What happens to a sequence.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Scores of all prompt tokens from token 1 on, before the first token.
    Prompt(Vec<TokenScore>),
    Token(TokenEvent),
    Finished(Reason),
}

/// Why a sequence ended on the router's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A stop id.
    Stop,
    Length,
}

/// A sequence under way. Dropping it cancels it.
pub struct Generation {
    upstream: Arc<Upstream>,
    /// Prompt and emitted ids; what is sent when it is sent again.
    request: GenerateRequest,
    key: u64,
    /// The sequence's name; each call of a router adds its number.
    name: String,
    calls: u32,
    deadline: Instant,
    live: Option<Live>,
    /// Of the router that emitted the first token.
    class: Option<Class>,
    /// Ids of routers that failed since the last token.
    tried: Vec<u64>,
    losses: u32,
    lost_at: Option<Instant>,
    trouble: Option<UpstreamError>,
    /// Prompt scores so far; let out whole, as a router may be lost among them.
    scores: Vec<TokenScore>,
    pending: Option<Event>,
    finished: bool,
}

struct Live {
    stream: Streaming<GenerateEvent>,
    router: Arc<Router>,
    class: Class,
    _lease: Lease,
}

/// Resolves when `router` is silent and another one of its class can go on. Its
/// connection may take long to notice; alone, it is waited for.
async fn hangs(upstream: &Upstream, router: &Router, class: &Class, key: u64) {
    loop {
        router.silent().await;
        if upstream.choose(key, Some(class), &[router.id]).is_some() {
            return;
        }
        tokio::time::sleep(POLL_EVERY).await;
    }
}

impl Generation {
    /// Nothing is sent before the first [`Generation::next`].
    pub fn new(upstream: Arc<Upstream>, request: GenerateRequest, deadline: Instant) -> Self {
        Self {
            key: prefix_key(&request.tokens),
            name: request.request_id.clone(),
            calls: 0,
            upstream,
            request,
            deadline,
            live: None,
            class: None,
            tried: Vec::new(),
            losses: 0,
            lost_at: None,
            trouble: None,
            scores: Vec::new(),
            pending: None,
            finished: false,
        }
    }

    /// The next event; none after [`Event::Finished`].
    ///
    /// # Errors
    /// [`UpstreamError`] once no router can go on; the sequence is over then.
    pub async fn next(&mut self) -> Result<Option<Event>, UpstreamError> {
        if self.finished {
            return Ok(None);
        }
        let advanced = tokio::time::timeout_at(self.deadline, self.advance()).await;
        let event = advanced.unwrap_or(Err(UpstreamError::Deadline));
        self.finished = !matches!(event, Ok(Event::Prompt(_) | Event::Token(_)));
        if self.finished {
            self.live = None;
        }
        event.map(Some)
    }

    async fn advance(&mut self) -> Result<Event, UpstreamError> {
        if let Some(event) = self.pending.take() {
            return Ok(event);
        }
        loop {
            let Some(live) = &mut self.live else {
                // A router may be lost between the last token and its finish.
                if let Some(reason) = self.already_over() {
                    return Ok(Event::Finished(reason));
                }
                self.open().await?;
                continue;
            };
            let message = tokio::select! {
                message = live.stream.message() => message,
                () = hangs(&self.upstream, &live.router, &live.class, self.key) => {
                    Err(Status::unavailable("does not answer"))
                }
            };
            match message {
                Ok(Some(GenerateEvent { event: Some(event) })) => {
                    let Some(event) = self.accept(event)? else { continue };
                    if self.scores.is_empty() {
                        return Ok(event);
                    }
                    self.pending = Some(event);
                    return Ok(Event::Prompt(std::mem::take(&mut self.scores)));
                }
                // An event of a newer router.
                Ok(Some(GenerateEvent { event: None })) => continue,
                Ok(None) => self.lost(&Status::unavailable("stream ended early"))?,
                Err(status) => self.lost(&status)?,
            }
        }
    }

    fn accept(&mut self, event: Wire) -> Result<Option<Event>, UpstreamError> {
        match event {
            Wire::Prompt(prompt) => {
                let expected = self.request.prompt_logprobs.is_some();
                if !expected || self.scores.len() + prompt.scores.len() > self.request.tokens.len()
                {
                    self.lost(&Status::internal("more prompt scores than were asked for"))?;
                    return Ok(None);
                }
                self.scores.extend(prompt.scores);
                Ok(None)
            }
            Wire::Token(token) => {
                if self.request.emitted >= self.request.max_tokens {
                    self.lost(&Status::internal("more tokens than were asked for"))?;
                    return Ok(None);
                }
                if let Some(live) = &self.live
                    && self.class.is_none()
                {
                    self.class = Some(live.class.clone());
                }
                self.request.tokens.push(token.id);
                self.request.emitted += 1;
                // They came with the first token at the latest.
                self.request.prompt_logprobs = None;
                self.tried.clear();
                self.losses = 0;
                self.lost_at = None;
                Ok(Some(Event::Token(token)))
            }
            Wire::Finished(finished) => {
                self.upstream.metrics.attempt(Outcome::Finished);
                let reason = match finished.reason() {
                    FinishReason::Length => Reason::Length,
                    FinishReason::Stop | FinishReason::Unspecified => Reason::Stop,
                };
                Ok(Some(Event::Finished(reason)))
            }
        }
    }

    /// The finish that the emitted ids already imply.
    fn already_over(&self) -> Option<Reason> {
        let last = (self.request.emitted > 0).then(|| self.request.tokens.last()).flatten();
        if last.is_some_and(|id| self.request.stop_ids.contains(id)) {
            return Some(Reason::Stop);
        }
        (self.request.emitted >= self.request.max_tokens).then_some(Reason::Length)
    }

    /// The router is gone, or said something that ends the sequence.
    fn lost(&mut self, status: &Status) -> Result<(), UpstreamError> {
        self.scores.clear();
        let router = self.live.take().map(|live| live.router);
        match router {
            Some(router) => self.failed(&router, status),
            None => Ok(()),
        }
    }

    /// Sorts a failure: final for the request, or a reason to try elsewhere.
    fn failed(&mut self, router: &Router, status: &Status) -> Result<(), UpstreamError> {
        let message = status.message().to_owned();
        let metrics = &self.upstream.metrics;
        let trouble = match status.code() {
            Code::InvalidArgument | Code::OutOfRange => {
                metrics.attempt(Outcome::Refused);
                return Err(UpstreamError::Refused(message));
            }
            Code::DeadlineExceeded => {
                metrics.attempt(Outcome::Failed);
                return Err(UpstreamError::Deadline);
            }
            Code::ResourceExhausted => {
                metrics.attempt(Outcome::Busy);
                UpstreamError::Overloaded(message)
            }
            code => {
                metrics.attempt(Outcome::Failed);
                if matches!(code, Code::Unavailable | Code::Unknown) {
                    router.suspect(status);
                }
                self.losses += 1;
                UpstreamError::Failed(format!("{code:?}: {message}"))
            }
        };
        tracing::warn!(
            router = %router.endpoint,
            code = ?status.code(),
            emitted = self.request.emitted,
            "router did not finish a sequence"
        );
        self.tried.push(router.id);
        self.lost_at.get_or_insert_with(Instant::now);
        if self.losses >= MAX_LOSSES {
            return Err(trouble);
        }
        self.trouble = Some(trouble);
        Ok(())
    }

    /// Finds a router that takes the sequence.
    async fn open(&mut self) -> Result<(), UpstreamError> {
        loop {
            // Once a token is out, only the same class can go on from it.
            let class = self.class.as_ref();
            let Some((router, class)) = self.upstream.choose(self.key, class, &self.tried) else {
                self.wait().await?;
                continue;
            };
            let asked = Instant::now();
            let left = self.deadline.saturating_duration_since(asked).as_millis();
            self.request.timeout_ms = u64::try_from(left).unwrap_or(u64::MAX).max(1);
            self.request.request_id = format!("{}-{}", self.name, self.calls);
            self.calls += 1;
            match router.generate(self.request.clone()).await {
                Ok((stream, lease)) => {
                    self.upstream.metrics.accept.observe(asked.elapsed().as_secs_f64());
                    if self.request.emitted > 0 {
                        self.upstream.metrics.resumed.inc();
                        tracing::info!(
                            router = %router.endpoint,
                            emitted = self.request.emitted,
                            "sequence resumed"
                        );
                    }
                    self.live = Some(Live { stream, router, class, _lease: lease });
                    return Ok(());
                }
                Err(status) => self.failed(&router, &status)?,
            }
        }
    }

    /// No router is left to try: wait for one, unless that is hopeless or it
    /// has been too long.
    async fn wait(&mut self) -> Result<(), UpstreamError> {
        let before = self.request.emitted == 0;
        let trouble = match self.trouble.clone() {
            Some(trouble) => trouble,
            None => {
                let detail = self.upstream.readiness().err();
                UpstreamError::NotReady(detail.unwrap_or_else(|| "none of its class".to_owned()))
            }
        };
        // The client can still be told to come back, so it waits only where that
        // may soon help: a router failed, or all of them are away for a moment.
        let soon = match trouble {
            UpstreamError::Failed(_) => true,
            UpstreamError::NotReady(_) => self.upstream.was_ready_within(PATIENCE_BEFORE),
            _ => false,
        };
        if before && !soon {
            return Err(trouble);
        }
        let patience = if before { PATIENCE_BEFORE } else { PATIENCE_AFTER };
        let since = *self.lost_at.get_or_insert_with(Instant::now);
        if since.elapsed() >= patience {
            return Err(trouble);
        }
        tokio::time::sleep(POLL_ABSENT).await;
        self.tried.clear();
        Ok(())
    }
}
