//! Sockets: accepting, their limits, draining. Headers must arrive within a
//! time and a size, connections are counted, and a peer that reads nothing for
//! long is cut off by the kernel.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use mesh::lifecycle::Shutdown;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::error::Error;

const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Request line and headers together.
const MAX_HEAD_BYTES: usize = 64 << 10;
const MAX_HEADERS: usize = 100;
const MAX_CONNECTIONS: usize = 4096;
/// Unread data and unanswered probes for so long end a connection.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);
/// Requests under way at shutdown may take so long to end.
const DRAIN: Duration = Duration::from_secs(30);

/// Binds `address`, `host:port` with a numeric host.
///
/// # Errors
/// [`Error::InUse`] when another process listens there.
pub async fn bind(address: &str) -> Result<TcpListener, Error> {
    let address: SocketAddr = address.parse().map_err(|_| Error::Listen(address.to_owned()))?;
    TcpListener::bind(address).await.map_err(|source| match source.kind() {
        std::io::ErrorKind::AddrInUse => Error::InUse(address),
        _ => Error::Bind { address, source },
    })
}

/// Serves until `shutdown`, then lets what is under way end.
pub async fn serve(listener: TcpListener, routes: Router, shutdown: Shutdown) {
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let graceful = GracefulShutdown::new();
    loop {
        // At the limit, further clients wait in the kernel's queue.
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else { break };
        let stream = tokio::select! {
            () = shutdown.wait() => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, or the peer left: neither ends the server.
                    tracing::warn!(%error, "connection was not accepted");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
        };
        configure(&stream);
        let service = TowerToHyperService::new(routes.clone());
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .max_buf_size(MAX_HEAD_BYTES)
            .max_headers(MAX_HEADERS)
            .serve_connection(TokioIo::new(stream), service);
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection ended");
            }
            drop(permit);
        });
    }
    drop(listener);
    if tokio::time::timeout(DRAIN, graceful.shutdown()).await.is_err() {
        tracing::warn!(seconds = DRAIN.as_secs(), "requests were cut off at shutdown");
    }
}

fn configure(stream: &TcpStream) {
    // Each token is a small write of its own. Failures leave defaults, which work.
    let _ = stream.set_nodelay(true);
    #[cfg(target_os = "linux")]
    let _ = SockRef::from(stream).set_tcp_user_timeout(Some(WRITE_TIMEOUT));
}
