//! A request as the engine takes it: already checked against the model.

use std::time::Instant;

use model::sample::Params;
use proto::v1::{GenerateEvent, OnMissing};
use tokio::sync::mpsc;
use tonic::Status;
use tracing::Span;

/// See the module's text.
pub struct Job {
    /// The prompt and the `emitted` tokens after it.
    pub tokens: Vec<u32>,
    /// How many of the last tokens an earlier attempt already emitted.
    pub emitted: usize,
    /// Tokens to generate in all, `emitted` included.
    pub max_tokens: usize,
    pub params: Params,
    pub stop_ids: Vec<u32>,
    /// Alternatives to report with each prompt token's score, if scores are wanted.
    pub prompt_logprobs: Option<u32>,
    pub on_missing: OnMissing,
    pub arrived: Instant,
    pub deadline: Instant,
    pub events: mpsc::Sender<Result<GenerateEvent, Status>>,
    pub span: Span,
}
