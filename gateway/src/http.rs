//! The HTTP face. Rooms in the order of a request:
//!
//! - [`server`]: sockets and their limits; [`observe`]: ids, spans, counts
//! - [`fields`], [`types`], [`messages`]: bodies, checked field by field
//! - [`completions`], [`chat`], [`models`], [`health`]: the endpoints
//! - [`logprobs`], [`sse`]: answers; [`error`]: every answer that is not 200
//!
//! Handlers are thin: check, tokenise, start a [`crate::job::Job`], write it out.

pub mod chat;
pub mod completions;
pub mod error;
pub mod fields;
pub mod health;
pub mod logprobs;
pub mod messages;
pub mod models;
pub mod observe;
pub mod server;
pub mod sse;
pub mod types;

use std::sync::Arc;
use std::time::SystemTime;

use axum::body::Body;
use axum::routing::{get, post};
use axum::{Router, middleware};
use http::{HeaderMap, Method, StatusCode, Uri};
use mesh::failpoint;
use serde::Serialize;
use tokio::sync::OwnedSemaphorePermit;

use crate::App;
use crate::job::{Job, Kind, Order, Prompts, Usage};
use crate::text::Text;
use error::ApiError;
use observe::Context;
use types::{Common, Limits};

/// Every route of the gateway.
pub fn routes(app: Arc<App>) -> Router {
    Router::new()
        .route("/", get(health::about))
        .route("/healthz", get(health::live))
        .route("/readyz", get(health::ready))
        .route("/metrics", get(health::metrics))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/v1/completions", post(completions::handle))
        .route("/v1/chat/completions", post(chat::handle))
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(Arc::clone(&app), observe::observe))
        .with_state(app)
}

async fn unknown_route(uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(128).collect();
    ApiError::request(StatusCode::NOT_FOUND, format!("there is nothing at {path}"))
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    let message = format!("{} does not answer {method}", uri.path());
    ApiError::request(StatusCode::METHOD_NOT_ALLOWED, message)
}

/// A request body of one of the two completion endpoints.
trait Ask: Sized + Send + 'static {
    fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError>;
    fn common(&self) -> &Common;
    /// How many prompts it has.
    fn prompts(&self) -> usize;
    /// Token ids of each prompt.
    fn tokenise(&self, text: &Text) -> Result<Prompts, ApiError>;
    /// How its sequences run.
    fn kind(&self) -> Kind;
}

/// A request that was let in: checked and tokenised.
struct Entered<R> {
    request: R,
    prompts: Prompts,
    permit: OwnedSemaphorePermit,
}

/// What the two completion endpoints do alike before their sequences start:
/// read the body, then parse, check, admit and tokenise off the async pool.
async fn enter<R: Ask>(
    app: &Arc<App>,
    headers: &HeaderMap,
    body: Body,
) -> Result<Entered<R>, ApiError> {
    failpoint::pass("handler");
    if app.shutdown.is_triggered() {
        return Err(ApiError::unavailable("the gateway is shutting down"));
    }
    let received = app.admission.body(headers, body).await?;
    let mut permit = app.admission.enter(1)?;
    let inner = Arc::clone(app);
    let work = move || {
        let request = R::parse(&received.bytes, &inner.limits())?;
        drop(received);
        let common = request.common();
        if let Some(model) = common.model.as_deref().filter(|model| *model != inner.model_name) {
            return Err(ApiError::unknown_model(model, &inner.model_name));
        }
        let sequences = request.prompts().saturating_mul(common.n as usize);
        permit.merge(inner.admission.enter(sequences.saturating_sub(1))?);
        let prompts = request.tokenise(&inner.text)?;
        Ok(Entered { request, prompts, permit })
    };
    app.text.run(work).await.unwrap_or_else(|error| Err(error::of_text(error, "body")))
}

/// Starts the sequences of a request.
fn start<R: Ask>(app: &App, context: &Context, entered: Entered<R>) -> Result<(R, Job), ApiError> {
    let Entered { request, prompts, permit } = entered;
    let order = Order {
        request_id: context.request_id.clone(),
        traceparent: context.traceparent.clone(),
        arrived: context.arrived,
        prompts,
        common: request.common().clone(),
        kind: request.kind(),
        permit,
    };
    Ok((request, Job::start(app, order)?))
}

/// What every part of one answer repeats.
#[derive(Clone, Debug, Serialize)]
pub struct Head {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub model: String,
}

impl Head {
    fn new(app: &App, context: &Context, prefix: &str, object: &'static str) -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Self {
            id: format!("{prefix}-{}", context.request_id),
            object,
            created: now.map_or(0, |since| since.as_secs()),
            model: app.model_name.clone(),
        }
    }
}

/// OpenAI's `usage`.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct UsageBody {
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
}

impl From<Usage> for UsageBody {
    fn from(usage: Usage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens + usage.completion_tokens,
        }
    }
}
