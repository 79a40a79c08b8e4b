//! Liveness, readiness and metrics. Ready means that a router is, which in turn
//! means that every expert has a live owner.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use mesh::metrics::CONTENT_TYPE;
use serde::Serialize;
use serde_json::json;

use crate::App;

#[derive(Serialize)]
struct Readiness {
    ready: bool,
    routers_ready: usize,
    routers: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
}

pub async fn live() -> &'static str {
    "ok\n"
}

pub async fn ready(State(app): State<Arc<App>>) -> Response {
    let state = if app.shutdown.is_triggered() {
        Err("shutting down".to_owned())
    } else {
        app.upstream.readiness()
    };
    let summary = app.upstream.summary();
    let body = Json(Readiness {
        ready: state.is_ok(),
        routers_ready: summary.ready,
        routers: summary.routers,
        detail: state.clone().err(),
    });
    match state {
        Ok(()) => body.into_response(),
        Err(_) => {
            let retry = [(header::RETRY_AFTER, HeaderValue::from_static("1"))];
            (StatusCode::SERVICE_UNAVAILABLE, retry, body).into_response()
        }
    }
}

pub async fn metrics(State(app): State<Arc<App>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], app.registry.encode())
}

/// What is here, for whoever opens the root.
pub async fn about(State(app): State<Arc<App>>) -> impl IntoResponse {
    Json(json!({
        "service": "moemesh gateway",
        "model": app.model_name,
        "endpoints": [
            "/v1/chat/completions", "/v1/completions", "/v1/models",
            "/healthz", "/readyz", "/metrics",
        ],
    }))
}
