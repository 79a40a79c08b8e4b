//! The router's gRPC face: a `Generate` call becomes a job once everything in
//! it has been checked against the model; its events stream back. Dropping the
//! call closes the stream's channel, which is how the engine learns of it.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use actix::Addr;
use arc_swap::ArcSwapOption;
use mesh::lifecycle::{Readiness, Shutdown};
use mesh::link::LinkHandle;
use mesh::membership::Links;
use mesh::placement::Placement;
use mesh::telemetry::propagate;
use model::sample::Params;
use proto::v1::inference_server::Inference;
use proto::v1::{
    GenerateEvent, GenerateRequest, OnMissing, PeerStatus, RouterStatus, RouterStatusRequest,
    Sampling,
};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::engine::{Gauges, Job};
use crate::health::SharedHealth;
use crate::intake::{Intake, Refused, Submit};
use crate::metrics::RouterMetrics;

/// Events of one sequence that its client has not read yet.
const EVENT_BUFFER: usize = 64;
/// Most alternatives a request may ask for per token.
const MAX_LOGPROBS: u32 = 64;

/// What does not change while the router serves.
#[derive(Clone, Debug)]
pub struct Facts {
    pub router_id: String,
    pub model_digest: [u8; 32],
    pub numerics: String,
    pub device: String,
    pub vocab: usize,
    pub max_context: usize,
    pub kv_pages: usize,
    pub page_tokens: usize,
    pub max_waiting: usize,
    pub request_timeout: Duration,
}

/// What the service reads of the running router.
pub struct View {
    pub intake: ArcSwapOption<Addr<Intake>>,
    pub gauges: Arc<Gauges>,
    pub links: Links,
    pub placement: Arc<arc_swap::ArcSwap<Placement>>,
    pub health: SharedHealth,
    pub readiness: Readiness,
    pub metrics: RouterMetrics,
    pub shutdown: Shutdown,
}

/// Cheap to clone; one per gRPC service.
#[derive(Clone)]
pub struct Service {
    facts: Arc<Facts>,
    view: Arc<View>,
}

type Events = Pin<Box<dyn Stream<Item = Result<GenerateEvent, Status>> + Send>>;

impl Service {
    pub fn new(facts: Facts, view: Arc<View>) -> Self {
        Self { facts: Arc::new(facts), view }
    }

    fn job(
        &self,
        request: GenerateRequest,
        events: mpsc::Sender<Result<GenerateEvent, Status>>,
    ) -> Result<Job, Status> {
        let arrived = Instant::now();
        let invalid = |why: String| Status::invalid_argument(why);
        let prompt_len = check(&self.facts, &request).map_err(invalid)?;
        let (emitted, max_tokens) = (request.emitted as usize, request.max_tokens as usize);
        let params = params(request.sampling.unwrap_or_default(), request.logprobs);
        params.check().map_err(|error| invalid(error.to_string()))?;
        let longest = self.facts.request_timeout;
        let timeout = match request.timeout_ms {
            0 => longest,
            ms => Duration::from_millis(ms).min(longest),
        };
        let span = tracing::debug_span!(
            "generate",
            request = request.request_id,
            prompt = prompt_len,
            max_tokens,
            dropped_experts = tracing::field::Empty
        );
        propagate::set_parent(&span, &request.traceparent);
        let on_missing = OnMissing::try_from(request.on_missing)
            .map_err(|_| invalid(format!("on_missing: {} is not known", request.on_missing)))?;
        Ok(Job {
            on_missing,
            tokens: request.tokens,
            emitted,
            max_tokens,
            params,
            stop_ids: request.stop_ids,
            prompt_logprobs: request.prompt_logprobs,
            arrived,
            deadline: arrived + timeout,
            events,
            span,
        })
    }
}

/// Whether the model and this router can do what is asked; how many tokens the prompt has, or what is wrong.
fn check(facts: &Facts, request: &GenerateRequest) -> Result<usize, String> {
    let Facts { vocab, max_context, kv_pages, page_tokens, .. } = *facts;
    let emitted = request.emitted as usize;
    if request.tokens.len() <= emitted {
        return Err("tokens: a prompt has at least one token".to_owned());
    }
    let prompt_len = request.tokens.len() - emitted;
    let max_tokens = request.max_tokens as usize;
    if max_tokens <= emitted {
        return Err(format!("max_tokens: {max_tokens} leaves nothing to generate"));
    }
    let whole = prompt_len.saturating_add(max_tokens);
    if whole > max_context {
        return Err(format!(
            "max_tokens: {prompt_len} prompt tokens and {max_tokens} to generate exceed the \
             context of {max_context}"
        ));
    }
    if whole > kv_pages * page_tokens {
        let room = kv_pages * page_tokens;
        return Err(format!("max_tokens: the KV cache holds {room} tokens, not {whole}"));
    }
    if let Some(at) = request.tokens.iter().position(|&id| id as usize >= vocab) {
        let id = request.tokens[at];
        return Err(format!("tokens[{at}]: id {id} is not below the vocabulary of {vocab}"));
    }
    for (name, asked) in
        [("logprobs", request.logprobs), ("prompt_logprobs", request.prompt_logprobs)]
    {
        if asked.is_some_and(|n| n > MAX_LOGPROBS) {
            return Err(format!("{name}: at most {MAX_LOGPROBS}"));
        }
    }
    Ok(prompt_len)
}

/// The wire's identity values (0) mean "off" where the model's own are 1.
fn params(wire: Sampling, logprobs: Option<u32>) -> Params {
    let or_one = |value: f32| if value == 0.0 { 1.0 } else { value };
    Params {
        temperature: wire.temperature,
        top_k: wire.top_k,
        top_p: or_one(wire.top_p),
        min_p: wire.min_p,
        presence: wire.presence_penalty,
        frequency: wire.frequency_penalty,
        repetition: or_one(wire.repetition_penalty),
        seed: wire.seed,
        logit_bias: wire.logit_bias.into_iter().collect(),
        logprobs,
    }
}

#[tonic::async_trait]
impl Inference for Service {
    type GenerateStream = Events;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Events>, Status> {
        let drops = request.get_ref().on_missing() == OnMissing::Drop;
        if let Err(reason) = self.view.readiness.get()
            && !(drops && self.view.is_degraded())
        {
            return Err(Status::unavailable(format!("not ready: {reason}")));
        }
        let (events, stream) = mpsc::channel(EVENT_BUFFER);
        let job = self.job(request.into_inner(), events)?;
        let intake = self.view.intake.load_full();
        let Some(intake) = intake else { return Err(Status::unavailable("starting")) };
        match intake.send(Submit(Box::new(job))).await {
            Ok(Ok(())) => Ok(Response::new(Box::pin(ReceiverStream::new(stream)))),
            Ok(Err(refused)) => {
                self.view.metrics.rejected.inc();
                Err(match refused {
                    Refused::Full(_) => Status::resource_exhausted(refused.to_string()),
                    Refused::Draining => Status::unavailable(refused.to_string()),
                })
            }
            Err(_) => Err(Status::unavailable("the engine's actor is being rebuilt")),
        }
    }

    async fn status(
        &self,
        _: Request<RouterStatusRequest>,
    ) -> Result<Response<RouterStatus>, Status> {
        let (facts, view) = (&self.facts, &self.view);
        let ready = view.readiness.get();
        let read = |gauge: &std::sync::atomic::AtomicU64| gauge.load(Ordering::Relaxed);
        Ok(Response::new(RouterStatus {
            router_id: facts.router_id.clone(),
            model_digest: facts.model_digest.to_vec().into(),
            numerics: facts.numerics.clone(),
            device: facts.device.clone(),
            ready: ready.is_ok(),
            degraded: ready.is_err() && view.is_degraded(),
            draining: view.shutdown.is_triggered(),
            detail: ready.err().unwrap_or_default(),
            running: read(&view.gauges.running) as u32,
            waiting: read(&view.gauges.waiting) as u32,
            max_waiting: facts.max_waiting as u32,
            kv_pages_used: read(&view.gauges.kv_pages_used),
            kv_pages_total: facts.kv_pages as u64,
            kv_page_tokens: facts.page_tokens as u32,
            max_context: facts.max_context as u32,
            vocab_size: facts.vocab as u32,
            nodes: view.peers(),
            epoch: view.placement.load().epoch().0,
            tokens_generated: read(&view.gauges.generated),
            tokens_prefilled: read(&view.gauges.prefilled),
            tickets_in_flight: read(&view.gauges.in_flight) as u32,
        }))
    }
}

impl View {
    /// Only experts are missing, and some nodes are there.
    fn is_degraded(&self) -> bool {
        self.placement.load().missing().is_some()
            && self.links.load().iter().any(|link| link.description().is_some())
    }

    fn peers(&self) -> Vec<PeerStatus> {
        let now = Instant::now();
        let health = self.health.lock();
        let described = |link: &Arc<LinkHandle>| {
            let mut status = peer(link);
            if link.is_hung() {
                status.detail = "hangs: it gives no sign of life".to_owned();
            } else if status.connected
                && let Some(trouble) = health.trouble(link.node, now)
            {
                status.detail = trouble;
            }
            status
        };
        self.links.members().iter().map(described).collect()
    }
}

fn peer(link: &LinkHandle) -> PeerStatus {
    let about = link.description();
    let experts = about.iter().flat_map(|about| &about.owned).map(|layer| layer.experts.len());
    PeerStatus {
        experts: experts.sum::<usize>() as u32,
        connected: about.is_some(),
        node_id: about.map(|about| about.node_id.clone()).unwrap_or_default(),
        endpoint: link.endpoint.to_string(),
        frames: link.frames.load(Ordering::Relaxed),
        retries: link.retries.load(Ordering::Relaxed),
        round_trip_us: link.round_trip_us.load(Ordering::Relaxed),
        detail: link.detail(),
    }
}
