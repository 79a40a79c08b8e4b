//! Spans on their way to the collector. Whoever ends a span puts it into a bounded
//! queue and goes on; a thread of its own, with a runtime of its own and the lowest
//! priority, sends them. What a slow or dead collector leaves no room for is lost
//! and counted: tracing never slows down what is traced.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use opentelemetry::Context;
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::trace::{Span, SpanData, SpanExporter as _, SpanProcessor};
use parking_lot::Mutex;
use tokio::runtime::{self, Runtime};
use tokio::sync::Notify;

/// Spans of one message.
const BATCH: usize = 512;
/// Spans that wait at most; more are lost.
const QUEUE: usize = 2048;
/// A batch that is not full leaves after so long.
const EVERY: Duration = Duration::from_secs(5);
/// A collector that has not taken a batch after this has lost it.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Spans of this process that no collector got, since it started.
static LOST: AtomicU64 = AtomicU64::new(0);

pub fn lost() -> u64 {
    LOST.load(Ordering::Relaxed)
}

/// Why nothing can be exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error(transparent)]
    Endpoint(#[from] ExporterBuildError),
    #[error("its thread cannot be started: {0}")]
    Thread(#[from] std::io::Error),
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Export {
    shared: Arc<Shared>,
    /// Ends with the thread.
    done: Mutex<Receiver<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Vec<SpanData>>,
    /// A batch is full, or it is the last one.
    go: Notify,
    closing: AtomicBool,
}

impl Export {
    /// Starts the thread that exports to `endpoint`. Nothing connects before there is a span.
    pub fn start(endpoint: &str, resource: &Resource) -> Result<Self, ExportError> {
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let mut exporter = {
            // The connection's tasks are this runtime's.
            let _in = runtime.enter();
            let builder = SpanExporter::builder().with_tonic();
            builder.with_endpoint(endpoint).with_timeout(TIMEOUT).build()?
        };
        exporter.set_resource(resource);
        let shared = Arc::new(Shared::default());
        let (mine, (ended, done)) = (Arc::clone(&shared), channel());
        std::thread::Builder::new().name("spans".to_owned()).spawn(move || {
            run(runtime, &mine, &exporter);
            drop(ended);
        })?;
        Ok(Self { shared, done: Mutex::new(done) })
    }
}

fn run(runtime: Runtime, shared: &Shared, exporter: &SpanExporter) {
    // Of this thread alone. Where it is refused the thread is one like others.
    let _ = rustix::process::nice(19);
    let _quiet = Context::enter_telemetry_suppressed_scope();
    runtime.block_on(async {
        loop {
            let last = shared.closing.load(Ordering::Acquire);
            if !last {
                let _ = tokio::time::timeout(EVERY, shared.go.notified()).await;
            }
            let mut spans = std::mem::take(&mut *shared.queue.lock());
            while !spans.is_empty() {
                let rest = spans.split_off(spans.len().min(BATCH));
                let count = spans.len() as u64;
                if exporter.export(spans).await.is_err() {
                    LOST.fetch_add(count, Ordering::Relaxed);
                }
                spans = rest;
            }
            if last {
                break;
            }
        }
    });
    // A connection to a collector that hangs is not waited for.
    runtime.shutdown_background();
}

impl SpanProcessor for Export {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        if !span.span_context.is_sampled() {
            return;
        }
        let mut queue = self.shared.queue.lock();
        if queue.len() >= QUEUE {
            LOST.fetch_add(1, Ordering::Relaxed);
            return;
        }
        queue.push(span);
        let full = queue.len() == BATCH;
        drop(queue);
        if full {
            self.shared.go.notify_one();
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.shared.go.notify_one();
        Ok(())
    }

    /// Waits until the last batch was taken, `timeout` at most.
    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.shared.closing.store(true, Ordering::Release);
        self.shared.go.notify_one();
        match self.done.lock().recv_timeout(timeout) {
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => Err(OTelSdkError::Timeout(timeout)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use opentelemetry::trace::{Tracer as _, TracerProvider as _};
    use opentelemetry_sdk::trace::SdkTracerProvider;

    use super::*;

    #[test]
    fn a_collector_that_hangs_costs_spans_and_nothing_else() {
        // The kernel takes connections; nobody answers.
        let deaf = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", deaf.local_addr().unwrap());
        let resource = Resource::builder().build();
        let export = Export::start(&endpoint, &resource).unwrap();
        let provider = SdkTracerProvider::builder().with_span_processor(export).build();
        let tracer = provider.tracer("test");
        // What the thread has taken by then, and what is queued, are not lost yet.
        let many = 4 * QUEUE as u64;
        (0..many).for_each(|_| drop(tracer.start("span")));
        let lost_now = lost();
        assert!(lost_now > 0 && lost_now < many, "{lost_now}");
        let begun = Instant::now();
        assert!(provider.shutdown_with_timeout(Duration::from_millis(100)).is_err());
        assert!(begun.elapsed() >= Duration::from_millis(100));
        assert!(Export::start("no url", &resource).is_err());
    }
}
