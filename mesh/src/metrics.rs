//! The process's one Prometheus registry. Roles register typed handles in it
//! at start and only touch those afterwards.

mod process;

use std::sync::Arc;

use parking_lot::Mutex;
use prometheus_client::encoding::text;
use prometheus_client::registry::Registry;

/// Shared handle of the registry; every name gets the prefix `moemesh_`.
#[derive(Clone)]
pub struct Metrics(Arc<Mutex<Registry>>);

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("moemesh");
        registry.register_collector(Box::new(process::Process));
        Self(Arc::new(Mutex::new(registry)))
    }
}

impl Metrics {
    /// Runs `add` on the registry; for start-up only.
    pub fn register<T>(&self, add: impl FnOnce(&mut Registry) -> T) -> T {
        add(&mut self.0.lock())
    }

    /// The registry as Prometheus text.
    pub fn encode(&self) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = text::encode(&mut out, &self.0.lock());
        out
    }
}

/// Content type of [`Metrics::encode`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Bucket bounds in seconds for things a user waits for: 1 ms to 64 s.
pub fn user_seconds() -> impl Iterator<Item = f64> {
    prometheus_client::metrics::histogram::exponential_buckets(0.001, 2.0, 17)
}

/// Bucket bounds in seconds for one step or one exchange: 20 µs to 1.3 s.
pub fn step_seconds() -> impl Iterator<Item = f64> {
    prometheus_client::metrics::histogram::exponential_buckets(20e-6, 2.0, 17)
}

/// Bucket bounds for counts of rows: 1 to 4096.
pub fn rows() -> impl Iterator<Item = f64> {
    prometheus_client::metrics::histogram::exponential_buckets(1.0, 2.0, 13)
}
