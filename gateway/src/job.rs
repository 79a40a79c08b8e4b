//! One HTTP request's sequences: each prompt `n` times, all under way at once,
//! their deltas merged in the order of arrival. Checks the prompts against the
//! context before anything is sent. Dropping the job cancels every sequence.

pub mod choice;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, SelectAll, Stream, StreamExt as _};
use proto::v1::{GenerateRequest, OnMissing, Sampling as WireSampling};
use rand::Rng as _;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use crate::App;
use crate::error::UpstreamError;
use crate::http::error::ApiError;
use crate::http::types::{Common, Sampling};
use crate::metrics::{Held, Metrics};
use crate::profile::SamplingDefaults;
use crate::upstream::generation::Generation;
use choice::{Choice, Delta, Rules};

/// OpenAI's default for `/v1/completions`.
const COMPLETION_TOKENS: u32 = 16;

/// Token ids of each prompt of a request.
pub type Prompts = Vec<Vec<u32>>;

/// What a prompt becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A raw prompt goes on; `echo` shows it, too.
    Completion { echo: bool },
    /// A conversation gets an answer.
    Chat,
}

impl Kind {
    /// The field that holds the prompt.
    fn param(self) -> &'static str {
        match self {
            Self::Completion { .. } => "prompt",
            Self::Chat => "messages",
        }
    }

    fn echo(self) -> bool {
        self == Self::Completion { echo: true }
    }
}

/// What a handler asks for, already checked and tokenised.
pub struct Order {
    pub request_id: String,
    pub traceparent: String,
    pub arrived: Instant,
    pub prompts: Prompts,
    pub common: Common,
    pub kind: Kind,
    pub on_missing: OnMissing,
    /// Held until the last sequence has ended.
    pub permit: OwnedSemaphorePermit,
}

/// Tokens as `usage` reports them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    /// Experts' results that were left out; reported beside the usage.
    pub dropped_experts: u64,
}

type Deltas = Pin<Box<dyn Stream<Item = Result<Delta, UpstreamError>> + Send>>;

/// The sequences under way.
pub struct Job {
    deltas: SelectAll<Deltas>,
    usage: Usage,
    metrics: Metrics,
    arrived: Instant,
    first: Option<Instant>,
    /// Per choice: its first and its latest token, and how many.
    times: Vec<Option<(Instant, Instant, u32)>>,
    _permit: OwnedSemaphorePermit,
    _sequences: Held,
}

impl Job {
    /// # Errors
    /// 400 when a prompt and what it asks for do not fit the context.
    pub fn start(app: &App, order: Order) -> Result<Self, ApiError> {
        let context = app.context();
        let deadline = order.arrived + app.request_timeout;
        let common = &order.common;
        let rules = Arc::new(rules(app, &order));
        let seed = common.sampling.seed.map_or_else(|| rand::rng().random(), |seed| seed as u64);
        // Clients may use one id twice; routers must not mistake one sequence for another.
        let own: u32 = rand::rng().random();
        let mut usage = Usage::default();
        let mut deltas: Vec<Deltas> = Vec::new();
        for prompt in &order.prompts {
            let wanted = wanted_tokens(&order, &app.profile.defaults, prompt.len(), context)?;
            usage.prompt_tokens += prompt.len() as u64;
            for copy in 0..common.n {
                let index = deltas.len() as u32;
                let request = GenerateRequest {
                    request_id: format!("{}-{own:08x}-{index}", order.request_id),
                    tokens: prompt.clone(),
                    emitted: 0,
                    // A scored prompt without a completion still needs one step.
                    max_tokens: wanted.max(1),
                    sampling: Some(sampling(
                        &common.sampling,
                        &app.profile.defaults,
                        seed.wrapping_add(u64::from(copy)),
                    )),
                    stop_ids: rules.stop_ids.clone(),
                    logprobs: common.logprobs,
                    prompt_logprobs: prompt_logprobs(&order),
                    timeout_ms: 0,
                    tenant: String::new(),
                    traceparent: order.traceparent.clone(),
                    on_missing: order.on_missing.into(),
                };
                let upstream = Arc::clone(&app.upstream);
                let generation = Generation::new(upstream, request, deadline);
                let tokenizer = Arc::clone(&app.text.tokenizer);
                let choice = Choice::new(index, generation, tokenizer, Arc::clone(&rules), wanted);
                deltas.push(Box::pin(stream::unfold(choice, |mut choice| async move {
                    choice.next().await.transpose().map(|delta| (delta, choice))
                })));
            }
        }
        app.metrics.prompt_tokens.inc_by(usage.prompt_tokens);
        Ok(Self {
            times: vec![None; deltas.len()],
            _sequences: Held::new(&app.metrics.sequences, deltas.len() as i64),
            deltas: stream::select_all(deltas),
            usage,
            metrics: app.metrics.clone(),
            arrived: order.arrived,
            first: None,
            _permit: order.permit,
        })
    }

    /// The next delta of any choice; none when all have finished.
    ///
    /// # Errors
    /// What stopped a sequence. The job is over then.
    pub async fn next(&mut self) -> Result<Option<Delta>, ApiError> {
        match self.deltas.next().await {
            None => Ok(None),
            Some(Ok(delta)) => {
                self.measure(&delta);
                Ok(Some(delta))
            }
            Some(Err(error)) => {
                self.deltas.clear();
                Err(error.into())
            }
        }
    }

    /// Final once [`Job::next`] has returned none.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// How many choices there are.
    pub fn choices(&self) -> usize {
        self.times.len()
    }

    fn measure(&mut self, delta: &Delta) {
        let now = Instant::now();
        if delta.dropped_experts > 0 && self.usage.dropped_experts == 0 {
            self.metrics.degraded.inc();
        }
        self.usage.dropped_experts += delta.dropped_experts;
        let time = &mut self.times[delta.index as usize];
        if delta.token.is_some() {
            self.usage.completion_tokens += 1;
            self.metrics.completion_tokens.inc();
            if self.first.is_none() {
                self.first = Some(now);
                self.metrics.first_token.observe((now - self.arrived).as_secs_f64());
            }
            let (first, count) = match *time {
                Some((first, latest, count)) => {
                    self.metrics.inter_token.observe((now - latest).as_secs_f64());
                    (first, count + 1)
                }
                None => (now, 1),
            };
            *time = Some((first, now, count));
        }
        if let (Some(_), Some((first, latest, count @ 2..))) = (&delta.finish, *time) {
            let mean = (latest - first).as_secs_f64() / f64::from(count - 1);
            self.metrics.per_token.observe(mean);
        }
    }
}

fn rules(app: &App, order: &Order) -> Rules {
    let common = &order.common;
    let mut stop_ids = common.stop_token_ids.clone();
    if !common.ignore_eos {
        let more = app.eos_ids.iter().filter(|id| !common.stop_token_ids.contains(id));
        stop_ids.extend(more);
    }
    Rules {
        stop_ids,
        own_stop_ids: common.stop_token_ids.clone(),
        stops: common.stop.clone(),
        include_stop: common.include_stop,
        skip_special: common.skip_special,
    }
}

/// Log-probabilities of an echoed prompt are asked for like those of its completion.
fn prompt_logprobs(order: &Order) -> Option<u32> {
    let echoed = order.common.logprobs.filter(|_| order.kind.echo());
    order.common.prompt_logprobs.max(echoed)
}

/// How many tokens one sequence may emit.
fn wanted_tokens(
    order: &Order,
    defaults: &SamplingDefaults,
    prompt: usize,
    context: u32,
) -> Result<u32, ApiError> {
    let param = order.kind.param();
    if prompt == 0 {
        return Err(ApiError::field(param, format!("`{param}` has no tokens")));
    }
    let room = u32::try_from(prompt).ok().and_then(|prompt| context.checked_sub(prompt));
    let Some(room @ 1..) = room else {
        let message = format!(
            "this model's context is {context} tokens, and the prompt has {prompt}, which leaves \
             none for the completion"
        );
        return Err(ApiError::context(param, message));
    };
    match order.common.max_tokens {
        Some(asked) if asked > room => {
            let message = format!(
                "this model's context is {context} tokens, but {} were requested: {prompt} in the \
                 prompt and {asked} for the completion",
                prompt as u64 + u64::from(asked)
            );
            Err(ApiError::context(param, message))
        }
        Some(asked) => Ok(asked),
        None => Ok(match order.kind {
            Kind::Completion { .. } => COMPLETION_TOKENS.min(room),
            Kind::Chat => defaults.max_new_tokens.unwrap_or(room).min(room),
        }),
    }
}

/// The request's own settings, the model's where it is silent, OpenAI's else.
fn sampling(asked: &Sampling, defaults: &SamplingDefaults, seed: u64) -> WireSampling {
    WireSampling {
        temperature: asked.temperature.or(defaults.temperature).unwrap_or(1.0),
        top_k: asked.top_k.or(defaults.top_k).unwrap_or(0),
        top_p: asked.top_p.or(defaults.top_p).unwrap_or(1.0),
        min_p: asked.min_p.or(defaults.min_p).unwrap_or(0.0),
        presence_penalty: asked.presence_penalty,
        frequency_penalty: asked.frequency_penalty,
        repetition_penalty: asked.repetition_penalty.or(defaults.repetition_penalty).unwrap_or(1.0),
        seed,
        logit_bias: asked.logit_bias.iter().map(|(&id, &bias)| (id, bias)).collect(),
    }
}

/// The longest deadline that can be told to a router without overflow.
pub const MAX_TIMEOUT: Duration = Duration::from_secs(24 * 3600);
