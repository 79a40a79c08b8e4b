//! The node's Prometheus series. Per-expert counts are served by
//! `ExpertControl.Status`; here their number would grow with the model, so
//! only the distribution of rows per expert and batch is kept.

use mesh::metrics::{rows, step_seconds};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use proto::v1::ErrorCode;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CodeLabel {
    code: &'static str,
}

/// Typed handles; cheap to clone.
#[derive(Clone)]
pub struct NodeMetrics {
    pub frames: Counter,
    pub rows: Counter,
    pub queued_rows: Gauge,
    pub queue_seconds: Histogram,
    pub compute_seconds: Histogram,
    pub rows_per_expert: Histogram,
    pub fetched_bytes: Counter,
    pub given_bytes: Counter,
    refused: Family<CodeLabel, Counter>,
}

impl NodeMetrics {
    pub fn new(registry: &mut Registry) -> Self {
        let new = Self {
            frames: Counter::default(),
            rows: Counter::default(),
            queued_rows: Gauge::default(),
            queue_seconds: Histogram::new(step_seconds()),
            compute_seconds: Histogram::new(step_seconds()),
            rows_per_expert: Histogram::new(rows()),
            fetched_bytes: Counter::default(),
            given_bytes: Counter::default(),
            refused: Family::default(),
        };
        let registry = registry.sub_registry_with_prefix("expert_node");
        registry.register("frames", "Frames answered with results", new.frames.clone());
        registry.register("rows", "Expert rows computed", new.rows.clone());
        registry.register("queued_rows", "Rows waiting to compute", new.queued_rows.clone());
        registry.register(
            "queue_seconds",
            "Arrival of a frame to start of its batch",
            new.queue_seconds.clone(),
        );
        registry.register(
            "compute_seconds",
            "Compute time of a batch of frames",
            new.compute_seconds.clone(),
        );
        registry.register(
            "rows_per_expert",
            "Rows of one expert in one batch",
            new.rows_per_expert.clone(),
        );
        registry.register(
            "fetched_bytes",
            "Weights that came from other nodes",
            new.fetched_bytes.clone(),
        );
        registry.register(
            "given_bytes",
            "Weights that other nodes fetched from this one",
            new.given_bytes.clone(),
        );
        registry.register("refused_frames", "Frames refused, by reason", new.refused.clone());
        new
    }

    pub fn refuse(&self, code: ErrorCode) {
        self.refused.get_or_create(&CodeLabel { code: code.as_str_name() }).inc();
    }
}
