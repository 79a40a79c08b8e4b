//! What is known of every request: its id, its span, its place in the counts.
//! Ids and trace parents of clients are taken only when well formed; prompts
//! and completions are never logged.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::{HeaderMap, HeaderName, HeaderValue};
use mesh::telemetry::propagate;
use rand::Rng as _;
use tokio::time::Instant;
use tracing::{Instrument as _, Span};

use crate::App;
use crate::job::Usage;
use crate::metrics::{Answer, Held, Route};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const MAX_ID_BYTES: usize = 128;

/// A request under way. A stream keeps it after its handler has returned.
#[derive(Clone)]
pub struct Context {
    pub request_id: String,
    pub arrived: Instant,
    /// Sent to routers.
    pub traceparent: String,
    open: Arc<Held>,
}

/// The part of a [`Context`] that lasts until the answer has been written.
pub struct Open {
    arrived: Instant,
    _open: Arc<Held>,
}

impl Context {
    pub fn open(&self) -> Open {
        Open { arrived: self.arrived, _open: Arc::clone(&self.open) }
    }
}

impl Open {
    pub fn finished(self, usage: Usage) {
        tracing::info!(
            prompt_tokens = usage.prompt_tokens,
            completion_tokens = usage.completion_tokens,
            seconds = self.arrived.elapsed().as_secs_f64(),
            "request finished"
        );
    }
}

/// Wraps every route.
pub async fn observe(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let arrived = Instant::now();
    let route = Route::of(request.uri().path());
    let request_id = request_id(request.headers());
    let span = tracing::info_span!(
        "request",
        request_id,
        route = route.name(),
        status = tracing::field::Empty
    );
    let parent = traceparent(request.headers()).to_owned();
    propagate::set_parent(&span, &parent);
    let own = propagate::traceparent(&span);
    request.extensions_mut().insert(Context {
        request_id: request_id.clone(),
        arrived,
        traceparent: if own.is_empty() { parent } else { own },
        open: Arc::new(Held::new(&app.metrics.in_flight, 1)),
    });
    let mut guard = Unanswered { app: &app, route, span: &span, answered: false };
    let mut response = next.run(request).instrument(span.clone()).await;
    guard.answered = true;
    drop(guard);
    let status = response.status().as_u16();
    span.record("status", status);
    app.metrics.requests.get_or_create(&Answer { route: route.name(), status }).inc();
    // A header value, as only such bytes were taken or made.
    if let Ok(value) = HeaderValue::from_str(&request_id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

/// Notices that a handler was dropped: its client went away.
struct Unanswered<'a> {
    app: &'a App,
    route: Route,
    span: &'a Span,
    answered: bool,
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if !self.answered && matches!(self.route, Route::Completions | Route::Chat) {
            self.app.metrics.cancelled.inc();
            self.span.in_scope(|| tracing::info!("client went away"));
        }
    }
}

/// The client's id when it is short and plain, else a new one.
fn request_id(headers: &HeaderMap) -> String {
    let plain = |id: &&str| {
        (1..=MAX_ID_BYTES).contains(&id.len())
            && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:".contains(&b))
    };
    match headers.get(REQUEST_ID).and_then(|id| id.to_str().ok()).filter(plain) {
        Some(id) => id.to_owned(),
        None => format!("{:032x}", rand::rng().random::<u128>()),
    }
}

/// The client's trace parent when it is well formed, else nothing.
fn traceparent(headers: &HeaderMap) -> &str {
    let hex = |part: &str, length| {
        part.len() == length
            && part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let sound = |text: &&str| {
        let parts: Vec<&str> = text.split('-').collect();
        matches!(parts[..], ["00", trace, span, flags]
            if hex(trace, 32) && hex(span, 16) && hex(flags, 2)
                && trace.bytes().any(|b| b != b'0') && span.bytes().any(|b| b != b'0'))
    };
    headers
        .get("traceparent")
        .and_then(|value| value.to_str().ok())
        .filter(sound)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &'static str, value: &[u8]) -> HeaderMap {
        HeaderMap::from_iter([(
            HeaderName::from_static(name),
            HeaderValue::from_bytes(value).unwrap(),
        )])
    }

    #[test]
    fn only_plain_ids_are_taken() {
        assert_eq!(request_id(&headers("x-request-id", b"job-7.a:b_C")), "job-7.a:b_C");
        for bad in [&b""[..], b"a b", b"\"x\"", "é".as_bytes(), &[b'a'; 129]] {
            assert_eq!(request_id(&headers("x-request-id", bad)).len(), 32, "{bad:?}");
        }
    }

    #[test]
    fn only_sound_trace_parents_are_taken() {
        let sound = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(traceparent(&headers("traceparent", sound.as_bytes())), sound);
        for bad in ["00-1-1-01", "", &sound.to_uppercase(), &sound.replace("00-", "ff-")] {
            assert_eq!(traceparent(&headers("traceparent", bad.as_bytes())), "", "{bad}");
        }
    }
}
