//! `/v1/models`: the one model served, and in `moemesh` how it is served.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;

use super::error::ApiError;
use crate::App;

#[derive(Serialize)]
pub struct List {
    object: &'static str,
    data: [Model; 1],
}

#[derive(Serialize)]
pub struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    /// As vLLM names it: prompt and completion together, in tokens.
    max_model_len: u32,
    moemesh: Extension,
}

/// What OpenAI's shape has no place for.
#[derive(Serialize)]
struct Extension {
    /// Numerics class of the routers; null while none is ready.
    numerics: Option<String>,
    /// Device kind of the routers; null while none is ready.
    device: Option<String>,
    context_length: u32,
    vocab_size: u32,
    routers: usize,
    routers_ready: usize,
}

pub async fn list(State(app): State<Arc<App>>) -> Json<List> {
    Json(List { object: "list", data: [model(&app)] })
}

pub async fn one(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<Json<Model>, ApiError> {
    if id == app.model_name {
        Ok(Json(model(&app)))
    } else {
        Err(ApiError::unknown_model(&id, &app.model_name))
    }
}

fn model(app: &App) -> Model {
    let summary = app.upstream.summary();
    let known = |text: String| (summary.ready > 0).then_some(text);
    let context = app.context();
    Model {
        id: app.model_name.clone(),
        object: "model",
        created: app.created,
        owned_by: "moemesh",
        max_model_len: context,
        moemesh: Extension {
            numerics: known(summary.numerics.clone()),
            device: known(summary.device.clone()),
            context_length: context,
            vocab_size: app.profile.vocab_size,
            routers: summary.routers,
            routers_ready: summary.ready,
        },
    }
}
