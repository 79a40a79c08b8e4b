//! Typed handles of what the gateway counts. Labels come from closed sets, so
//! the number of series does not depend on what clients send.

use mesh::metrics::user_seconds;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// What a request asked for; everything unknown is one route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Route {
    Completions,
    Chat,
    Models,
    Health,
    Metrics,
    Other,
}

impl Route {
    pub fn of(path: &str) -> Self {
        match path {
            "/v1/completions" => Self::Completions,
            "/v1/chat/completions" => Self::Chat,
            "/healthz" | "/readyz" => Self::Health,
            "/metrics" => Self::Metrics,
            path if path.starts_with("/v1/models") => Self::Models,
            _ => Self::Other,
        }
    }

    /// As in the label `route`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Completions => "completions",
            Self::Chat => "chat",
            Self::Models => "models",
            Self::Health => "health",
            Self::Metrics => "metrics",
            Self::Other => "other",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Answer {
    pub route: &'static str,
    pub status: u16,
}

/// How one call of a router ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    Finished,
    Refused,
    Busy,
    Failed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Attempt {
    pub outcome: &'static str,
}

/// Cheap to clone; all clones count together.
#[derive(Clone)]
pub struct Metrics {
    pub requests: Family<Answer, Counter>,
    pub in_flight: Gauge,
    pub sequences: Gauge,
    /// From the request's arrival to its first token.
    pub first_token: Histogram,
    /// Between two tokens of one sequence.
    pub inter_token: Histogram,
    /// Mean of the above over one sequence.
    pub per_token: Histogram,
    /// From asking a router to its accepting the sequence.
    pub accept: Histogram,
    pub prompt_tokens: Counter,
    pub completion_tokens: Counter,
    pub attempts: Family<Attempt, Counter>,
    /// Sequences that went on after their router was lost.
    pub resumed: Counter,
    /// Requests answered without some experts' results, as they allowed.
    pub degraded: Counter,
    /// Requests whose client went away or stopped reading.
    pub cancelled: Counter,
    /// Streams that ended in an error after their first byte.
    pub broken_streams: Counter,
    pub routers_ready: Gauge,
}

impl Metrics {
    pub fn register(registry: &mut Registry) -> Self {
        let registry = registry.sub_registry_with_prefix("gateway");
        let seconds = || Histogram::new(user_seconds());
        let metrics = Self {
            requests: Family::default(),
            in_flight: Gauge::default(),
            sequences: Gauge::default(),
            first_token: seconds(),
            inter_token: seconds(),
            per_token: seconds(),
            accept: seconds(),
            prompt_tokens: Counter::default(),
            completion_tokens: Counter::default(),
            attempts: Family::default(),
            resumed: Counter::default(),
            degraded: Counter::default(),
            cancelled: Counter::default(),
            broken_streams: Counter::default(),
            routers_ready: Gauge::default(),
        };
        let m = &metrics;
        registry.register("requests", "HTTP requests answered", m.requests.clone());
        registry.register("requests_in_flight", "HTTP requests open", m.in_flight.clone());
        registry.register("sequences_in_flight", "sequences open", m.sequences.clone());
        registry.register(
            "time_to_first_token_seconds",
            "request to first token",
            m.first_token.clone(),
        );
        registry.register(
            "inter_token_seconds",
            "between tokens of a sequence",
            m.inter_token.clone(),
        );
        registry.register(
            "time_per_output_token_seconds",
            "mean between tokens of a sequence",
            m.per_token.clone(),
        );
        registry.register("queue_seconds", "until a router accepts", m.accept.clone());
        registry.register("prompt_tokens", "tokens of prompts", m.prompt_tokens.clone());
        registry.register("completion_tokens", "tokens generated", m.completion_tokens.clone());
        registry.register(
            "router_calls",
            "calls of routers, by how they ended",
            m.attempts.clone(),
        );
        registry.register("resumed", "sequences resumed on a router", m.resumed.clone());
        registry.register("degraded", "requests answered without some experts", m.degraded.clone());
        registry.register("cancelled", "requests whose client went away", m.cancelled.clone());
        registry.register("broken_streams", "streams ended by an error", m.broken_streams.clone());
        registry.register("routers_ready", "routers that accept work", m.routers_ready.clone());
        metrics
    }

    pub fn attempt(&self, outcome: Outcome) {
        let outcome = match outcome {
            Outcome::Finished => "finished",
            Outcome::Refused => "refused",
            Outcome::Busy => "busy",
            Outcome::Failed => "failed",
        };
        self.attempts.get_or_create(&Attempt { outcome }).inc();
    }
}

/// Counts in a gauge for as long as it lives.
pub struct Held(Gauge, i64);

impl Held {
    pub fn new(gauge: &Gauge, by: i64) -> Self {
        gauge.inc_by(by);
        Self(gauge.clone(), by)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.dec_by(self.1);
    }
}
