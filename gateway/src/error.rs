//! Why a gateway does not start, and why a generation does not go on.
//!
//! What a client sees of either is decided in `http/error.rs` alone; nothing
//! here knows a status code.

use std::net::SocketAddr;
use std::path::PathBuf;

use mesh::tls::TlsError;
use mesh::transport::TransportError;

/// Why the gateway could not start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`{0}` is not an address to listen on: expected host:port")]
    Listen(String),
    #[error("address {0} is in use")]
    InUse(SocketAddr),
    #[error("cannot listen on {address}: {source}")]
    Bind { address: SocketAddr, source: std::io::Error },
    #[error("no router endpoint is configured")]
    NoRouters,
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Load(#[from] LoadError),
}

/// Why a file of the model directory was refused. Always names the file.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} has {bytes} bytes, more than the limit of {limit}")]
    TooLarge { path: PathBuf, bytes: u64, limit: u64 },
    #[error("{path} is not valid JSON: {source}")]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("{path}: field `{field}` {problem}")]
    Field { path: PathBuf, field: &'static str, problem: String },
    #[error("{path}: {problem}")]
    Tokenizer { path: PathBuf, problem: String },
    #[error("chat template of {path} does not compile: {problem}")]
    Template { path: PathBuf, problem: String },
}

/// Why a generation ended without a finish reason.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UpstreamError {
    #[error("no router is ready: {0}")]
    NotReady(String),
    #[error("every ready router is full: {0}")]
    Overloaded(String),
    #[error("{0}")]
    Refused(String),
    #[error("the request's deadline has passed")]
    Deadline,
    #[error("generation failed: {0}")]
    Failed(String),
}
