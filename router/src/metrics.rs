//! The router's Prometheus series: what users feel (time to first token, time
//! per output token), what the engine does, what the network costs.

use mesh::metrics::{rows, step_seconds, user_seconds};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// Typed handles; cheap to clone.
#[derive(Clone)]
pub struct RouterMetrics {
    pub requests: Counter,
    pub rejected: Counter,
    pub failed: Counter,
    pub cancelled: Counter,
    pub generated: Counter,
    pub prefilled: Counter,
    pub waiting: Gauge,
    pub running: Gauge,
    pub kv_pages_used: Gauge,
    pub ttft: Histogram,
    pub tpot: Histogram,
    pub step: Histogram,
    pub step_rows: Histogram,
    /// From the layer's frames being written to its last result.
    pub exchange: Histogram,
    /// The part of it in which the engine had nothing left to compute.
    pub exchange_wait: Histogram,
    pub round_trip: Histogram,
    pub retries: Counter,
    pub damaged: Counter,
    pub frames: Counter,
    pub late: Counter,
    pub again: Counter,
    pub spared: Counter,
    pub ejections: Counter,
    pub late_replies: Counter,
    pub dropped_experts: Counter,
    pub parked: Gauge,
    pub stale_replies: Counter,
    /// In messages, and in shared memory.
    row_bytes: [Counter; 2],
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Way {
    way: &'static str,
}

impl RouterMetrics {
    pub fn new(registry: &mut Registry) -> Self {
        let row_bytes = Family::<Way, Counter>::default();
        let new = Self {
            requests: Counter::default(),
            rejected: Counter::default(),
            failed: Counter::default(),
            cancelled: Counter::default(),
            generated: Counter::default(),
            prefilled: Counter::default(),
            waiting: Gauge::default(),
            running: Gauge::default(),
            kv_pages_used: Gauge::default(),
            ttft: Histogram::new(user_seconds()),
            tpot: Histogram::new(user_seconds()),
            step: Histogram::new(step_seconds()),
            step_rows: Histogram::new(rows()),
            exchange: Histogram::new(step_seconds()),
            exchange_wait: Histogram::new(step_seconds()),
            round_trip: Histogram::new(step_seconds()),
            retries: Counter::default(),
            damaged: Counter::default(),
            frames: Counter::default(),
            late: Counter::default(),
            again: Counter::default(),
            spared: Counter::default(),
            ejections: Counter::default(),
            late_replies: Counter::default(),
            dropped_experts: Counter::default(),
            parked: Gauge::default(),
            stale_replies: Counter::default(),
            row_bytes: ["message", "shared"].map(|way| row_bytes.get_or_create_owned(&Way { way })),
        };
        let registry = registry.sub_registry_with_prefix("router");
        let mut counter =
            |name, help, metric: &Counter| registry.register(name, help, metric.clone());
        counter("requests", "Sequences accepted", &new.requests);
        counter("rejected", "Sequences refused because the queue was full", &new.rejected);
        counter("failed", "Sequences ended by an error", &new.failed);
        counter("cancelled", "Sequences whose client went away", &new.cancelled);
        counter("generated_tokens", "Tokens sampled", &new.generated);
        counter("prefilled_tokens", "Prompt tokens computed", &new.prefilled);
        counter("dispatch_retries", "Frames sent again elsewhere", &new.retries);
        counter("damaged_streams", "Streams to nodes that a wrong checksum ended", &new.damaged);
        counter("dispatch_frames", "Frames sent for the first time", &new.frames);
        counter("dispatch_late", "Frames whose deadline passed", &new.late);
        counter("dispatch_again", "Frames sent twice, as the first was late", &new.again);
        counter("dispatch_spared", "Frames not sent twice for want of budget", &new.spared);
        counter("ejections", "Times a node was left alone after failures", &new.ejections);
        counter(
            "late_replies",
            "Replies whose results came from elsewhere before",
            &new.late_replies,
        );
        counter(
            "dropped_experts",
            "Results left out for requests that allow it",
            &new.dropped_experts,
        );
        counter("stale_replies", "Replies that answered nothing open", &new.stale_replies);
        let mut gauge = |name, help, metric: &Gauge| registry.register(name, help, metric.clone());
        gauge("waiting", "Sequences without KV pages", &new.waiting);
        gauge("running", "Sequences that hold KV pages", &new.running);
        gauge("parked", "Sequences that wait for a missing expert", &new.parked);
        gauge("kv_pages_used", "KV pages in use", &new.kv_pages_used);
        let mut seconds = |name, help, metric: &Histogram| {
            registry.register_with_unit(name, help, Unit::Seconds, metric.clone());
        };
        seconds("ttft", "Arrival of a request to its first token", &new.ttft);
        seconds("tpot", "Time between two tokens of a request", &new.tpot);
        seconds("step", "One step over all layers", &new.step);
        seconds("exchange", "One layer's dispatch to its last result", &new.exchange);
        seconds("exchange_wait", "The exchange not covered by computing", &new.exchange_wait);
        seconds("dispatch_round_trip", "One frame to its reply", &new.round_trip);
        registry.register(
            "row_bytes",
            "Bytes of rows sent to nodes and of results from them, by the way they went",
            row_bytes,
        );
        registry.register("step_rows", "Tokens computed in one step", new.step_rows.clone());
        new
    }

    /// Rows went to a node, or results came from one.
    pub fn count_rows(&self, bytes: usize, shared: bool) {
        self.row_bytes[usize::from(shared)].inc_by(bytes as u64);
    }
}
