//! Logs and OpenTelemetry spans.
//!
//! Logs go to standard error, as text or JSON lines. Spans go to an OTLP
//! collector when an endpoint is configured. Whether a request is traced is drawn
//! once, where it enters; steps, layers and frames have spans only where one that
//! is traced takes part. Only our own crates' spans are exported: unfiltered, the
//! HTTP/2 library alone would drown them. A collector that hangs costs nothing
//! but spans: they queue up to a bound and are then left out.

mod export;
pub mod propagate;

pub use export::{ExportError, lost};

use std::str::FromStr;
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use tracing::{Level, Metadata};
use tracing_subscriber::filter::{EnvFilter, FilterFn, LevelFilter};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer as _, fmt};

/// A process that ends waits so long for the collector.
const LAST_FLUSH: Duration = Duration::from_secs(1);
const OUR_CRATES: [&str; 5] = ["moemesh", "gateway", "router", "expert_node", "mesh"];

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(format!("log format `{text}` is neither text nor json")),
        }
    }
}

/// What a process says about itself.
#[derive(Clone, Debug)]
pub struct Config {
    /// `gateway`, `router` or `expert-node`.
    pub role: &'static str,
    /// The process's name in the mesh, such as `router-0`.
    pub id: String,
    pub format: LogFormat,
    /// Directives as of `RUST_LOG`, such as `info` or `router=debug`.
    pub filter: String,
    /// OTLP gRPC endpoint, such as `http://127.0.0.1:4317`.
    pub otlp: Option<String>,
    /// Share of requests traced, 0 to 1. A sampled caller is always followed.
    pub sample: f64,
}

/// Why telemetry could not start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("log filter `{filter}`: {source}")]
    Filter { filter: String, source: tracing_subscriber::filter::ParseError },
    #[error("OTLP endpoint `{endpoint}`: {source}")]
    Exporter { endpoint: String, source: ExportError },
}

/// Flushes the spans that are still buffered when dropped.
pub struct Guard(Option<SdkTracerProvider>);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(provider) = self.0.take() {
            // The collector may be gone; there is nobody left to tell.
            let _ = provider.shutdown_with_timeout(LAST_FLUSH);
        }
    }
}

/// Installs the process's subscriber. Call once, inside the tokio runtime.
///
/// # Errors
/// A filter that does not parse, or an OTLP endpoint that is no URL. A
/// collector that does not answer is not an error: spans are dropped.
pub fn init(config: Config) -> Result<Guard, TelemetryError> {
    let filter = EnvFilter::try_new(&config.filter)
        .map_err(|source| TelemetryError::Filter { filter: config.filter.clone(), source })?;
    let logs = match config.format {
        LogFormat::Text => fmt::layer().with_writer(std::io::stderr).with_ansi(false).boxed(),
        LogFormat::Json => fmt::layer().with_writer(std::io::stderr).json().boxed(),
    };
    let provider = config.otlp.as_deref().map(|at| provider(&config, at)).transpose()?;
    let ours = FilterFn::new(is_ours as fn(&Metadata<'_>) -> bool);
    let spans = provider.as_ref().map(|provider| {
        tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("moemesh"))
            .with_location(false)
            .with_threads(false)
            // Spans are entered at every poll of a task: nobody asks how long they were not, nor
            // for OpenTelemetry's own idea of what is current.
            .with_tracked_inactivity(false)
            .with_context_activation(false)
            .with_filter(ours.with_max_level_hint(LevelFilter::DEBUG))
    });
    tracing_subscriber::registry().with(logs.with_filter(filter)).with(spans).init();
    Ok(Guard(provider))
}

fn provider(config: &Config, endpoint: &str) -> Result<SdkTracerProvider, TelemetryError> {
    let resource = Resource::builder()
        .with_service_name(format!("moemesh-{}", config.role))
        .with_attribute(KeyValue::new("service.instance.id", config.id.clone()))
        .build();
    let export = export::Export::start(endpoint, &resource)
        .map_err(|source| TelemetryError::Exporter { endpoint: endpoint.to_owned(), source })?;
    Ok(SdkTracerProvider::builder()
        .with_span_processor(export)
        .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(config.sample))))
        .with_resource(resource)
        .build())
}

fn is_ours(metadata: &Metadata<'_>) -> bool {
    let crate_name = metadata.target().split("::").next().unwrap_or_default();
    metadata.is_span() && *metadata.level() <= Level::DEBUG && OUR_CRATES.contains(&crate_name)
}
