//! The plain-HTTP side door of router and expert node: `/metrics`, `/healthz`
//! (the process lives) and `/readyz` (it may be sent work). Read-only.

use std::future::Future;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::serve::ListenerExt;

use crate::lifecycle::Readiness;
use crate::metrics::{CONTENT_TYPE, Metrics};
use crate::transport::Listener;

/// Serves until `shutdown` resolves.
pub async fn serve(
    listener: Listener,
    metrics: Metrics,
    readiness: Readiness,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let app = Router::new()
        .route(
            "/metrics",
            get(move || async move { ([(header::CONTENT_TYPE, CONTENT_TYPE)], metrics.encode()) }),
        )
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(move || async move { ready(&readiness) }));
    match listener {
        Listener::Tcp(tcp) => {
            let tcp = tcp.tap_io(|io| {
                // Without it a small answer waits for a delayed ACK.
                let _ = io.set_nodelay(true);
            });
            axum::serve(tcp, app).with_graceful_shutdown(shutdown).await
        }
        Listener::Unix(unix, _) => axum::serve(unix, app).with_graceful_shutdown(shutdown).await,
    }
}

fn ready(readiness: &Readiness) -> impl IntoResponse + use<> {
    match readiness.get() {
        Ok(()) => (StatusCode::OK, "ready\n".to_owned()),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {reason}\n")),
    }
}
