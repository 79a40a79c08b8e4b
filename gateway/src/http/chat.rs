//! `/v1/chat/completions`: a conversation, rendered by the model's own chat
//! template, goes on with one message of the assistant.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Extension, State};
use axum::response::{IntoResponse as _, Response};
use axum::{Json, http::HeaderMap};
use serde::Serialize;

use super::error::{self, ApiError};
use super::logprobs::{self, ChatLogprobs, PromptEntry};
use super::missing::{self, Degraded};
use super::observe::Context;
use super::sse::{self, Events, Shape};
use super::types::{ChatRequest, Common, Limits};
use super::{Ask, Head, UsageBody};
use crate::App;
use crate::job::choice::{Delta, StopReason};
use crate::job::{Kind, Prompts, Usage};
use crate::text::Text;
use crate::text::tokenizer::Tokenizer;

pub async fn handle(
    State(app): State<Arc<App>>,
    Extension(context): Extension<Context>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let entered = super::enter::<ChatRequest>(&app, &headers, body).await?;
    let ids = entered.request.common.return_token_ids;
    let prompt_ids = ids.then(|| entered.prompts.concat());
    let (request, mut job) = super::start(&app, &context, entered)?;
    let common = &request.common;
    let object = if common.stream { "chat.completion.chunk" } else { "chat.completion" };
    let writer = Writer {
        head: Head::new(&app, &context, "chatcmpl", object),
        tokenizer: Arc::clone(&app.text.tokenizer),
        logprobs: common.logprobs.is_some(),
        ids,
        include_usage: common.include_usage,
        dropped: 0,
        started: vec![false; job.choices()],
        prompt_ids,
    };
    if common.stream {
        return sse::respond(job, writer, app.metrics.clone(), context.open()).await;
    }
    let mut choices: Vec<Choice> =
        (0..).take(job.choices()).map(|index| writer.choice(index)).collect();
    let mut scores = None;
    while let Some(delta) = job.next().await? {
        scores = scores.or(delta.prompt.clone());
        writer.add(&mut choices[delta.index as usize], delta);
    }
    context.open().finished(job.usage());
    let prompt_logprobs = common
        .prompt_logprobs
        .map(|_| logprobs::prompt(&writer.tokenizer, &scores.unwrap_or_default()));
    let usage = job.usage().into();
    let prompt_token_ids = writer.prompt_ids.as_deref();
    let dropped = job.usage().dropped_experts;
    let moemesh = Degraded::of(dropped);
    let head = &writer.head;
    let answer = Answer { head, choices, usage, prompt_token_ids, prompt_logprobs, moemesh };
    let mut response = Json(answer).into_response();
    missing::mark(&mut response, dropped);
    Ok(response)
}

impl Ask for ChatRequest {
    fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        Self::parse(body, limits)
    }

    fn common(&self) -> &Common {
        &self.common
    }

    fn prompts(&self) -> usize {
        1
    }

    fn tokenise(&self, text: &Text) -> Result<Prompts, ApiError> {
        text.chat(&self.messages, self.add_generation_prompt, self.common.add_special)
            .map(|ids| vec![ids])
            .map_err(|error| error::of_text(error, "messages"))
    }

    fn kind(&self) -> Kind {
        Kind::Chat
    }
}

#[derive(Serialize)]
struct Answer<'a> {
    #[serde(flatten)]
    head: &'a Head,
    choices: Vec<Choice>,
    usage: UsageBody,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Vec<Option<PromptEntry>>>,
    /// There where the answer did without experts.
    #[serde(skip_serializing_if = "Option::is_none")]
    moemesh: Option<Degraded>,
}

#[derive(Serialize)]
struct Choice {
    index: u32,
    message: AssistantMessage,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct AssistantMessage {
    role: &'static str,
    content: String,
    refusal: Option<()>,
}

#[derive(Serialize)]
struct Chunk<'a> {
    #[serde(flatten)]
    head: &'a Head,
    choices: &'a [ChunkChoice],
    /// Absent, null, or there.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageBody>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
    /// There where the answer did without experts: with each finish, and with the usage.
    #[serde(skip_serializing_if = "Option::is_none")]
    moemesh: Option<Degraded>,
}

#[derive(Default, Serialize)]
struct ChunkChoice {
    index: u32,
    delta: ChunkDelta,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

#[derive(Default, Serialize)]
struct ChunkDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

/// Deltas to messages and to events.
struct Writer {
    head: Head,
    tokenizer: Arc<Tokenizer>,
    logprobs: bool,
    /// Token ids were asked for.
    ids: bool,
    include_usage: bool,
    /// Experts' results left out so far, in all choices.
    dropped: u64,
    /// Per choice: its role has been written.
    started: Vec<bool>,
    prompt_ids: Option<Vec<u32>>,
}

impl Writer {
    fn choice(&self, index: u32) -> Choice {
        Choice {
            index,
            message: AssistantMessage { role: "assistant", content: String::new(), refusal: None },
            logprobs: self.logprobs.then(ChatLogprobs::default),
            finish_reason: None,
            stop_reason: None,
            token_ids: self.ids.then(Vec::new),
        }
    }

    fn add(&self, choice: &mut Choice, delta: Delta) {
        choice.message.content.push_str(&delta.text);
        if let Some(token) = &delta.token {
            if let Some(logprobs) = &mut choice.logprobs {
                logprobs.push(&self.tokenizer, token);
            }
            if let Some(ids) = &mut choice.token_ids {
                ids.push(token.id);
            }
        }
        if let Some(finish) = delta.finish {
            choice.finish_reason = Some(finish.reason);
            choice.stop_reason = finish.stop;
        }
    }

    fn push(&self, choice: ChunkChoice, prompt_token_ids: Option<&[u32]>, events: &mut Events) {
        let usage = self.include_usage.then_some(None);
        let moemesh = choice.finish_reason.and_then(|_| Degraded::of(self.dropped));
        let (head, choices) = (&self.head, &[choice]);
        events.push(&Chunk { head, choices, usage, prompt_token_ids, moemesh });
    }
}

impl Shape for Writer {
    fn delta(&mut self, delta: Delta, events: &mut Events) {
        let index = delta.index;
        self.dropped += delta.dropped_experts;
        if !std::mem::replace(&mut self.started[index as usize], true) {
            let delta = ChunkDelta { role: Some("assistant"), content: Some(String::new()) };
            let choice = ChunkChoice { index, delta, ..ChunkChoice::default() };
            self.push(choice, self.prompt_ids.as_deref(), events);
        }
        let mut whole = self.choice(index);
        self.add(&mut whole, delta);
        let some_logprobs = whole.logprobs.filter(|logprobs| !logprobs.content.is_empty());
        let some_ids = whole.token_ids.filter(|ids| !ids.is_empty());
        let content = whole.message.content;
        if !content.is_empty() || some_logprobs.is_some() || some_ids.is_some() {
            let choice = ChunkChoice {
                index,
                delta: ChunkDelta { role: None, content: Some(content) },
                logprobs: some_logprobs,
                token_ids: some_ids,
                ..ChunkChoice::default()
            };
            self.push(choice, None, events);
        }
        if whole.finish_reason.is_some() {
            let choice = ChunkChoice {
                index,
                finish_reason: whole.finish_reason,
                stop_reason: whole.stop_reason,
                ..ChunkChoice::default()
            };
            self.push(choice, None, events);
        }
    }

    fn end(&mut self, usage: Usage, events: &mut Events) {
        if self.include_usage {
            let moemesh = Degraded::of(usage.dropped_experts);
            let usage = Some(Some(usage.into()));
            let head = &self.head;
            events.push(&Chunk { head, choices: &[], usage, prompt_token_ids: None, moemesh });
        }
    }
}
