//! Sockets: endpoints as people write them, listeners, gRPC channels and servers.
//!
//! Every listener sets TCP_NODELAY on what it accepts and every server sets the
//! limits that tonic leaves open (message sizes, streams per connection,
//! header and keep-alive times). With [`Tls`] every connection, Unix sockets
//! included, is mutually authenticated and every call authorised; without it a
//! connection is as plain, and as fast, as the socket. Nothing else in the mesh
//! opens a socket.

use std::fmt;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::service::Routes;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Server, Uri};

use crate::authz::Authorize;
use crate::shared::Handover;
use crate::tls::{self, Expected, Principal, Socket, Tls};

/// Streams one connection may hold open. A router needs one data stream and a
/// few control calls; a gateway one stream per request it forwards.
const MAX_STREAMS: u32 = 4096;
/// HTTP/2 flow-control windows: a layer's largest frames fit without a stall.
pub(crate) const STREAM_WINDOW: u32 = 8 << 20;
pub(crate) const CONNECTION_WINDOW: u32 = 32 << 20;
/// The longest HTTP/2 frame, the most there can be: rows arrive in one piece.
pub(crate) const MAX_DATA: u32 = (1 << 24) - 1;
/// What a Unix socket may hold that the peer has not read.
const UNIX_SEND_BUFFER: usize = 1 << 20;
pub(crate) const MAX_HEADER_BYTES: u32 = 16 << 10;
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
pub(crate) const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(10);
/// Longer than any step of an engine, which answers no ping while it computes.
pub(crate) const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// Where a process listens or is reached: `host:port`, `http://host:port`, `unix:/path`
/// or `unix:@name` (abstract, on Linux).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    Tcp(String),
    Unix(PathBuf),
}

/// Why an endpoint could not be used.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    #[error("`{0}` is not an endpoint: expected host:port or unix:/path")]
    Endpoint(String),
    #[error("address {0} is in use")]
    InUse(Endpoint),
    #[error("cannot listen on {endpoint}: {source}")]
    Bind { endpoint: Endpoint, source: std::io::Error },
    #[error("server on {endpoint} failed: {source}")]
    Serve { endpoint: Endpoint, source: tonic::transport::Error },
}

impl Endpoint {
    /// Reached without a network.
    pub fn is_local(&self) -> bool {
        matches!(self, Self::Unix(_))
    }

    /// Reached from this machine only. Names other than `localhost` are not
    /// looked up, so they may lead anywhere.
    pub fn is_loopback(&self) -> bool {
        let Self::Tcp(address) = self else { return true };
        let host = address.rsplit_once(':').map_or(address.as_str(), |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        host == "localhost"
            || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
    }
}

impl FromStr for Endpoint {
    type Err = TransportError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || TransportError::Endpoint(text.to_owned());
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() { Err(bad()) } else { Ok(Self::Unix(path.into())) };
        }
        let address = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
        let (host, port) = address.rsplit_once(':').ok_or_else(bad)?;
        if host.is_empty() || host.contains('/') || port.parse::<u16>().is_err() {
            return Err(bad());
        }
        Ok(Self::Tcp(address.to_owned()))
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A bound socket, not yet served.
pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

impl Listener {
    /// Where it really listens: a port of 0 is replaced by the one it was given.
    pub fn local(&self) -> Endpoint {
        match self {
            Self::Tcp(listener) => Endpoint::Tcp(
                listener.local_addr().map_or_else(|e| e.to_string(), |address| address.to_string()),
            ),
            Self::Unix(_, path) => Endpoint::Unix(path.clone()),
        }
    }

    /// The same socket on the runtime that calls this, which will serve it.
    ///
    /// # Errors
    /// The system refuses.
    pub fn adopt(self) -> std::io::Result<Self> {
        Ok(match self {
            Self::Tcp(listener) => Self::Tcp(TcpListener::from_std(listener.into_std()?)?),
            Self::Unix(listener, path) => {
                Self::Unix(UnixListener::from_std(listener.into_std()?)?, path)
            }
        })
    }
}

/// Whether `@name` names an abstract socket, which is no file and ends with its owner.
fn is_abstract(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().starts_with(b"@")
}

/// A Unix socket's name as the system takes it.
pub(crate) fn unix_name(path: &Path) -> PathBuf {
    match path.to_str().and_then(|name| name.strip_prefix('@')) {
        Some(name) => format!("\0{name}").into(),
        None => path.to_owned(),
    }
}

/// Binds `endpoint`. A Unix socket file that nobody answers on is replaced.
///
/// # Errors
/// [`TransportError::InUse`] when another process listens there.
pub async fn bind(endpoint: &Endpoint) -> Result<Listener, TransportError> {
    let failed = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::AddrInUse => TransportError::InUse(endpoint.clone()),
        _ => TransportError::Bind { endpoint: endpoint.clone(), source },
    };
    match endpoint {
        Endpoint::Unix(path) if is_abstract(path) => UnixListener::bind(unix_name(path))
            .map(|l| Listener::Unix(l, path.clone()))
            .map_err(failed),
        Endpoint::Tcp(address) => {
            TcpListener::bind(address).await.map(Listener::Tcp).map_err(failed)
        }
        Endpoint::Unix(path) => {
            if path.exists() && UnixStream::connect(path).await.is_err() {
                std::fs::remove_file(path).map_err(failed)?;
            }
            UnixListener::bind(path).map(|l| Listener::Unix(l, path.clone())).map_err(failed)
        }
    }
}

/// A channel that connects when first used and again whenever the connection is
/// lost; with TLS to nobody but whom it expects.
///
/// # Errors
/// The endpoint is not one.
pub fn channel(
    endpoint: &Endpoint,
    tls: Option<&Tls>,
    expected: Expected,
) -> Result<Channel, TransportError> {
    Ok(channel_and_peer(endpoint, tls, expected)?.0)
}

/// Who answered when a channel last connected; nobody without TLS.
#[derive(Clone, Default)]
pub struct Peer(Arc<ArcSwapOption<Principal>>);

impl Peer {
    pub fn principal(&self) -> Option<Arc<Principal>> {
        self.0.load_full()
    }
}

/// As [`channel`], and who is at its other end.
///
/// # Errors
/// The endpoint is not one.
pub fn channel_and_peer(
    endpoint: &Endpoint,
    tls: Option<&Tls>,
    expected: Expected,
) -> Result<(Channel, Peer), TransportError> {
    let uri = match endpoint {
        Endpoint::Tcp(address) => format!("http://{address}"),
        // The authority is required by HTTP/2 but means nothing on a Unix socket.
        Endpoint::Unix(_) => "http://localhost".to_owned(),
    };
    let builder = Channel::from_shared(uri)
        .map_err(|_| TransportError::Endpoint(endpoint.to_string()))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keep_alive_interval(KEEP_ALIVE_EVERY)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    let peer = Peer::default();
    let channel = match (tls, endpoint) {
        (None, Endpoint::Tcp(_)) => builder.connect_lazy(),
        (None, Endpoint::Unix(path)) => {
            let path = unix_name(path);
            builder.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            }))
        }
        (Some(tls), _) => {
            let (tls, endpoint, peer) = (tls.clone(), endpoint.clone(), peer.clone());
            builder.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
                let (tls, endpoint, peer) = (tls.clone(), endpoint.clone(), peer.clone());
                let expected = expected.clone();
                async move {
                    let socket = Socket::connect(&endpoint).await?;
                    let (stream, principal) = tls.connect(socket, &expected).await?;
                    peer.0.store(Some(Arc::new(principal)));
                    std::io::Result::Ok(TokioIo::new(stream))
                }
            }))
        }
    };
    Ok((channel, peer))
}

/// Why a call failed: the cause, not the wrapper, as tonic says "transport error"
/// for a refused connection; and what to do where TLS is the cause.
pub fn explain(status: &tonic::Status) -> String {
    let mut cause: &(dyn std::error::Error + 'static) = status;
    if let Some(told) = tls::explain(cause) {
        return told;
    }
    while let Some(next) = cause.source() {
        cause = next;
    }
    match cause.is::<tonic::Status>() {
        true => format!("{}: {}", status.code(), status.message()),
        false => cause.to_string(),
    }
}

/// Lets a layer's largest frames be written in one go. A Unix socket holds 200 KB
/// unless it is told, and each time it is full both ends sleep. Best effort: the
/// system grants at most `net.core.wmem_max`.
pub(crate) fn widen(socket: &UnixStream) {
    let _ = rustix::net::sockopt::set_socket_send_buffer_size(socket, UNIX_SEND_BUFFER);
}

/// Serves `routes`, plus health and reflection, until `shutdown` resolves and
/// the calls in flight have ended.
///
/// # Errors
/// The server cannot go on.
pub async fn serve_grpc(
    listener: Listener,
    routes: Routes,
    tls: Option<&Tls>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), TransportError> {
    let endpoint = listener.local();
    let (_health, health_service) = tonic_health::server::health_reporter();
    let routes = routes.add_service(health_service);
    let routes = match tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::DESCRIPTOR)
        .build_v1()
    {
        Ok(reflection) => routes.add_service(reflection),
        Err(error) => {
            tracing::warn!(%error, "serving without gRPC reflection");
            routes
        }
    };
    let mut server = Server::builder()
        .max_frame_size(MAX_DATA)
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keepalive_interval(Some(KEEP_ALIVE_EVERY))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT));
    let served = match (tls, listener) {
        (Some(tls), listener) => {
            let server = server.layer(Authorize(tls.metrics().clone())).add_routes(routes);
            let incoming = tls::incoming(listener, tls.clone());
            server.serve_with_incoming_shutdown(incoming, shutdown).await
        }
        (None, Listener::Tcp(listener)) => {
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            server.add_routes(routes).serve_with_incoming_shutdown(incoming, shutdown).await
        }
        (None, Listener::Unix(listener, _)) => {
            let incoming = UnixListenerStream::new(listener)
                .map(|a| a.inspect(widen).map(Handover::receiving));
            server.add_routes(routes).serve_with_incoming_shutdown(incoming, shutdown).await
        }
    };
    if let Endpoint::Unix(path) = &endpoint
        && !is_abstract(path)
    {
        // Best effort: a stale socket file is also replaced by the next bind.
        let _ = std::fs::remove_file(path);
    }
    served.map_err(|source| TransportError::Serve { endpoint, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_parse_as_people_write_them() {
        for (text, shown) in [
            ("127.0.0.1:7000", "127.0.0.1:7000"),
            ("http://node-1:7000/", "node-1:7000"),
            ("[::1]:7000", "[::1]:7000"),
            ("unix:/run/moemesh/n0.sock", "unix:/run/moemesh/n0.sock"),
            ("unix:@n0", "unix:@n0"),
        ] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), shown);
        }
        for bad in ["", "localhost", ":7000", "host:port", "host:70000", "unix:", "a/b:1"] {
            let error = bad.parse::<Endpoint>().unwrap_err().to_string();
            assert!(error.contains(&format!("`{bad}`")), "{error}");
        }
    }

    #[test]
    fn only_this_machine_reaches_loopback() {
        for (text, want) in [
            ("127.0.0.1:7000", true),
            ("127.9.9.9:7000", true),
            ("[::1]:7000", true),
            ("localhost:7000", true),
            ("unix:/run/x.sock", true),
            ("0.0.0.0:7000", false),
            ("[::]:7000", false),
            ("10.0.0.1:7000", false),
            ("node-1:7000", false),
            ("localhost.example:7000", false),
        ] {
            assert_eq!(text.parse::<Endpoint>().unwrap().is_loopback(), want, "{text}");
        }
    }

    #[tokio::test]
    async fn a_port_in_use_is_named() {
        let first = bind(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
        let error = bind(&first.local()).await.err().unwrap();
        assert_eq!(error.to_string(), format!("address {} is in use", first.local()));
    }
}
