//! `x-moemesh-on-missing`: what a request wants where experts are missing, and
//! how an answer says that it did without some.

use axum::response::Response;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use proto::v1::OnMissing;
use serde::Serialize;

use super::error::ApiError;

const ON_MISSING: HeaderName = HeaderName::from_static("x-moemesh-on-missing");
/// On an answer that is known to be degraded when its head is sent.
const DEGRADED: HeaderName = HeaderName::from_static("x-moemesh-degraded");

/// What the request wants; to wait, if it says nothing.
///
/// # Errors
/// 400 when it says something else than `fail`, `wait` or `drop`.
pub fn wanted(headers: &HeaderMap) -> Result<OnMissing, ApiError> {
    let Some(value) = headers.get(ON_MISSING) else { return Ok(OnMissing::Wait) };
    match value.as_bytes() {
        b"wait" => Ok(OnMissing::Wait),
        b"fail" => Ok(OnMissing::Fail),
        b"drop" => Ok(OnMissing::Drop),
        other => {
            let shown: String = String::from_utf8_lossy(other).chars().take(32).collect();
            let shown = shown.escape_debug();
            let message = format!("header {ON_MISSING}: `{shown}` is none of fail, wait, drop");
            Err(ApiError::request(StatusCode::BAD_REQUEST, message))
        }
    }
}

/// The part of an answer that says how much is missing in it.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Degraded {
    /// Experts' results that were left out, over all tokens and layers.
    dropped_experts: u64,
}

impl Degraded {
    /// Nothing, for an answer that is whole.
    pub fn of(dropped_experts: u64) -> Option<Self> {
        (dropped_experts > 0).then_some(Self { dropped_experts })
    }
}

/// Says in the head of an answer that `dropped` results are missing in it.
pub fn mark(response: &mut Response, dropped: u64) {
    if dropped > 0 {
        response.headers_mut().insert(DEGRADED, HeaderValue::from(dropped));
    }
}
