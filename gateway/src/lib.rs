//! HTTP in, SSE out: the OpenAI-compatible face of the mesh. It knows text, not
//! tensors, and keeps no state beyond the requests it has open. Rooms in the
//! order a request goes through them:
//!
//! - [`http`]: sockets, routes, bodies, answers
//! - [`admit`]: bounds, taken before any work
//! - [`text`]: chat template, tokenizer, detokenizer, stop strings
//! - [`job`]: one request's sequences; [`upstream`]: the routers that run them
//! - [`profile`]: what is known of the model; [`metrics`], [`error`]

#![forbid(unsafe_code)]

pub mod admit;
pub mod error;
pub mod http;
pub mod job;
pub mod metrics;
pub mod profile;
pub mod text;
pub mod upstream;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh::lifecycle::Shutdown;
use mesh::registry::Etcd;
use mesh::tls::{self, Tls};
use mesh::transport::Endpoint;
use tokio::net::TcpListener;

pub use error::Error;

use admit::Admission;
use http::types::Limits;
use metrics::Metrics;
use profile::Profile;
use text::Text;
use upstream::Upstream;

/// Everything a gateway is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// `host:port`; port 0 takes a free one.
    pub listen: String,
    pub routers: Vec<Endpoint>,
    /// Where further ones are learned of.
    pub etcd: Option<Etcd>,
    /// This gateway's certificate and whom it trusts; `None` is plain text. HTTP
    /// to clients is not concerned.
    pub tls: Option<tls::Files>,
    /// Holds `tokenizer.json`, `config.json` and their companions.
    pub model_dir: PathBuf,
    /// The name clients use.
    pub model_name: String,
    pub max_body_bytes: usize,
    /// Sequences open at one time; more are refused with 429.
    pub max_concurrent: usize,
    /// Choices of one request.
    pub max_n: u32,
    /// Alternatives to a token's log-probability.
    pub max_logprobs: u32,
    pub request_timeout: Duration,
}

impl Config {
    /// Defaults for the model in `model_dir`, named after its directory.
    pub fn new(model_dir: impl Into<PathBuf>, routers: Vec<Endpoint>) -> Self {
        let model_dir = model_dir.into();
        let name = model_dir.file_name().map(|name| name.to_string_lossy().into_owned());
        Self {
            listen: "127.0.0.1:8080".to_owned(),
            routers,
            etcd: None,
            tls: None,
            model_dir,
            model_name: name.unwrap_or_else(|| "model".to_owned()),
            max_body_bytes: 4 << 20,
            max_concurrent: 256,
            max_n: 16,
            max_logprobs: 20,
            request_timeout: Duration::from_secs(600),
        }
    }
}

/// What every handler shares.
pub struct App {
    model_name: String,
    /// When the gateway started, in Unix seconds.
    created: u64,
    profile: Profile,
    /// The model's ending ids, the tokenizer's among them.
    eos_ids: Vec<u32>,
    text: Text,
    upstream: Arc<Upstream>,
    admission: Admission,
    metrics: Metrics,
    registry: mesh::metrics::Metrics,
    shutdown: Shutdown,
    max_n: u32,
    max_logprobs: u32,
    max_concurrent: usize,
    request_timeout: Duration,
}

impl App {
    /// Reads the model's files and prepares the routers' channels.
    fn build(config: &Config, shutdown: Shutdown) -> Result<Self, Error> {
        let profile = Profile::load(&config.model_dir)?;
        let text = Text::load(&config.model_dir, &profile)?;
        let registry = mesh::metrics::Metrics::default();
        let metrics = registry.register(Metrics::register);
        let owner = tls::Owner { role: tls::Role::Gateway, id: None };
        let tls: Option<Tls> = tls::start(config.tls.as_ref(), owner, &registry, &shutdown)?;
        let vocab_size = profile.vocab_size;
        if config.routers.is_empty() && config.etcd.is_none() {
            return Err(Error::NoRouters);
        }
        let upstream = Upstream::new(&config.routers, tls, vocab_size, metrics.clone())?;
        let mut eos_ids = profile.eos_ids.clone();
        eos_ids.extend(text.tokenizer.eos_id().filter(|id| !eos_ids.contains(id)));
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Ok(Self {
            model_name: config.model_name.clone(),
            created: now.map_or(0, |since| since.as_secs()),
            eos_ids,
            profile,
            text,
            upstream,
            admission: Admission::new(config.max_concurrent, config.max_body_bytes),
            metrics,
            registry,
            shutdown,
            max_n: config.max_n,
            max_logprobs: config.max_logprobs,
            max_concurrent: config.max_concurrent,
            request_timeout: config.request_timeout.min(job::MAX_TIMEOUT),
        })
    }

    /// Prompt and completion together, in tokens: what both the model and the
    /// ready routers hold.
    fn context(&self) -> u32 {
        let routers = self.upstream.context().unwrap_or(u32::MAX);
        self.profile.context.min(routers)
    }

    fn limits(&self) -> Limits {
        Limits {
            max_n: self.max_n,
            max_logprobs: self.max_logprobs,
            max_sequences: self.max_concurrent,
            vocab_size: self.profile.vocab_size,
            context: self.context(),
        }
    }
}

/// A gateway that has its socket and does not serve yet.
pub struct Gateway {
    app: Arc<App>,
    listener: TcpListener,
    address: SocketAddr,
    etcd: Option<Etcd>,
}

impl Gateway {
    /// Loads the model's text files and binds the socket.
    ///
    /// # Errors
    /// A file that is refused, a port in use, no router.
    pub async fn bind(config: &Config, shutdown: Shutdown) -> Result<Self, Error> {
        let app = Arc::new(App::build(config, shutdown)?);
        let listener = http::server::bind(&config.listen).await?;
        let address = listener.local_addr().map_err(|_| Error::Listen(config.listen.clone()))?;
        Ok(Self { app, listener, address, etcd: config.etcd.clone() })
    }

    /// Where it listens, with the port it was given.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Serves until shutdown, then drains.
    pub async fn serve(self) {
        self.app.upstream.watch(&self.app.shutdown, self.etcd);
        tracing::info!(address = %self.address, model = self.app.model_name, "gateway serves");
        let shutdown = self.app.shutdown.clone();
        http::server::serve(self.listener, http::routes(self.app), shutdown).await;
    }
}

/// Runs a gateway until `shutdown`.
///
/// # Errors
/// As [`Gateway::bind`].
pub async fn serve(config: Config, shutdown: Shutdown) -> Result<(), Error> {
    Gateway::bind(&config, shutdown).await?.serve().await;
    Ok(())
}

#[cfg(test)]
mod tests;
