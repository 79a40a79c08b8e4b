//! `/v1/completions`: a prompt goes on. Token ids in and out, echo and
//! log-probabilities of the prompt are served as vLLM names and shapes them.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Extension, State};
use axum::response::{IntoResponse as _, Response};
use axum::{Json, http::HeaderMap};
use proto::v1::TokenScore;
use serde::Serialize;

use super::error::{self, ApiError};
use super::logprobs::{self, CompletionLogprobs, PromptEntry};
use super::missing::{self, Degraded};
use super::observe::Context;
use super::sse::{self, Events, Shape};
use super::types::{Common, CompletionRequest, Limits, Prompt};
use super::{Ask, Head, UsageBody};
use crate::App;
use crate::job::choice::{Delta, StopReason};
use crate::job::{Kind, Prompts, Usage};
use crate::text::Text;
use crate::text::detokenizer::Detokenizer;
use crate::text::tokenizer::Tokenizer;

pub async fn handle(
    State(app): State<Arc<App>>,
    Extension(context): Extension<Context>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let entered = super::enter::<CompletionRequest>(&app, &headers, body).await?;
    let echoes = echoes(&app.text.tokenizer, &entered.request, &entered.prompts);
    let (request, mut job) = super::start(&app, &context, entered)?;
    let common = &request.common;
    let mut writer = Writer {
        head: Head::new(&app, &context, "cmpl", "text_completion"),
        tokenizer: Arc::clone(&app.text.tokenizer),
        n: common.n as usize,
        echo: request.echo,
        logprobs: common.logprobs.is_some(),
        prompt_logprobs: common.prompt_logprobs.is_some(),
        ids: common.return_token_ids,
        include_usage: common.include_usage,
        dropped: 0,
        started: vec![false; job.choices()],
        echoes,
    };
    if common.stream {
        return sse::respond(job, writer, app.metrics.clone(), context.open()).await;
    }
    let mut choices: Vec<Option<Choice>> = (0..job.choices()).map(|_| None).collect();
    while let Some(delta) = job.next().await? {
        let at = delta.index as usize;
        let part = writer.choice(delta);
        match &mut choices[at] {
            Some(choice) => choice.absorb(part),
            none => *none = Some(part),
        }
    }
    context.open().finished(job.usage());
    let choices = choices.into_iter().flatten().collect();
    let usage = Some(Some(job.usage().into()));
    let dropped = job.usage().dropped_experts;
    let moemesh = Degraded::of(dropped);
    let mut response = Json(Answer { head: &writer.head, choices, usage, moemesh }).into_response();
    missing::mark(&mut response, dropped);
    Ok(response)
}

impl Ask for CompletionRequest {
    fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        Self::parse(body, limits)
    }

    fn common(&self) -> &Common {
        &self.common
    }

    fn prompts(&self) -> usize {
        self.prompts.len()
    }

    fn tokenise(&self, text: &Text) -> Result<Prompts, ApiError> {
        let ids = |prompt: &Prompt| match prompt {
            Prompt::Ids(ids) => Ok(ids.clone()),
            Prompt::Text(raw) => text
                .prompt(raw, self.common.add_special)
                .map_err(|error| error::of_text(error, "prompt")),
        };
        self.prompts.iter().map(ids).collect()
    }

    fn kind(&self) -> Kind {
        Kind::Completion { echo: self.echo }
    }
}

/// What is shown of a prompt, where anything is.
struct Echo {
    ids: Vec<u32>,
    text: String,
    /// Characters of text before each token.
    offsets: Vec<usize>,
}

fn echoes(tokenizer: &Arc<Tokenizer>, request: &CompletionRequest, prompts: &Prompts) -> Vec<Echo> {
    if !request.echo && !request.common.return_token_ids {
        return Vec::new();
    }
    let echo = |(prompt, ids): (&Prompt, &Vec<u32>)| {
        let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), request.common.skip_special);
        let (mut text, mut offsets, mut length) = (String::new(), Vec::new(), 0);
        if request.echo {
            for &id in ids {
                offsets.push(length);
                let piece = detokenizer.push(id);
                length += piece.chars().count();
                text.push_str(&piece);
            }
            text.push_str(&detokenizer.finish());
        }
        if let Prompt::Text(own) = prompt {
            text.clone_from(own);
        }
        Echo { ids: ids.clone(), text, offsets }
    };
    request.prompts.iter().zip(prompts).map(echo).collect()
}

#[derive(Serialize)]
struct Answer<'a> {
    #[serde(flatten)]
    head: &'a Head,
    choices: Vec<Choice>,
    /// Absent, null, or there.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageBody>>,
    /// There where the answer did without experts.
    #[serde(skip_serializing_if = "Option::is_none")]
    moemesh: Option<Degraded>,
}

#[derive(Debug, Serialize)]
struct Choice {
    index: u32,
    text: String,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Vec<Option<PromptEntry>>>,
}

impl Choice {
    /// Puts a later part behind this one.
    fn absorb(&mut self, part: Self) {
        self.text.push_str(&part.text);
        if let (Some(logprobs), Some(more)) = (&mut self.logprobs, part.logprobs) {
            logprobs.tokens.extend(more.tokens);
            logprobs.token_logprobs.extend(more.token_logprobs);
            logprobs.top_logprobs.extend(more.top_logprobs);
            logprobs.text_offset.extend(more.text_offset);
        }
        if let (Some(ids), Some(more)) = (&mut self.token_ids, part.token_ids) {
            ids.extend(more);
        }
        self.finish_reason = part.finish_reason;
        self.stop_reason = part.stop_reason;
    }

    fn says_nothing(&self) -> bool {
        self.text.is_empty()
            && self.finish_reason.is_none()
            && self.prompt_token_ids.is_none()
            && self.logprobs.as_ref().is_none_or(|logprobs| logprobs.tokens.is_empty())
            && self.token_ids.as_ref().is_none_or(Vec::is_empty)
    }
}

/// Deltas to choices, and choices to events.
struct Writer {
    head: Head,
    tokenizer: Arc<Tokenizer>,
    n: usize,
    echo: bool,
    logprobs: bool,
    prompt_logprobs: bool,
    /// Token ids were asked for.
    ids: bool,
    include_usage: bool,
    /// Experts' results left out so far, in all choices.
    dropped: u64,
    /// Per choice: its prompt has been written.
    started: Vec<bool>,
    /// Per prompt; empty when nothing of prompts is shown.
    echoes: Vec<Echo>,
}

impl Writer {
    fn choice(&mut self, delta: Delta) -> Choice {
        let at = delta.index as usize;
        let first = !std::mem::replace(&mut self.started[at], true);
        let echo = self.echoes.get(at / self.n);
        let mut choice = Choice {
            index: delta.index,
            text: String::new(),
            logprobs: self.logprobs.then(CompletionLogprobs::default),
            finish_reason: None,
            stop_reason: None,
            token_ids: self.ids.then(Vec::new),
            prompt_token_ids: None,
            prompt_logprobs: None,
        };
        if first {
            if self.ids {
                choice.prompt_token_ids = echo.map(|echo| echo.ids.clone());
            }
            let scores = delta.prompt.as_deref().unwrap_or_default();
            if self.prompt_logprobs {
                choice.prompt_logprobs = Some(logprobs::prompt(&self.tokenizer, scores));
            }
            if let Some(echo) = echo.filter(|_| self.echo) {
                choice.text.push_str(&echo.text);
                if let Some(logprobs) = &mut choice.logprobs {
                    push_prompt(logprobs, &self.tokenizer, echo, scores);
                }
            }
        }
        choice.text.push_str(&delta.text);
        if let Some(token) = &delta.token {
            if let Some(logprobs) = &mut choice.logprobs {
                let base = if self.echo { echo.map_or(0, |e| e.text.chars().count()) } else { 0 };
                logprobs.push(&self.tokenizer, token, base);
            }
            if let Some(ids) = &mut choice.token_ids {
                ids.push(token.id);
            }
        }
        if let Some(finish) = delta.finish {
            choice.finish_reason = Some(finish.reason);
            choice.stop_reason = finish.stop;
        }
        choice
    }
}

fn push_prompt(
    logprobs: &mut CompletionLogprobs,
    tokenizer: &Tokenizer,
    echo: &Echo,
    scores: &[TokenScore],
) {
    if let Some(&id) = echo.ids.first() {
        logprobs.push_first(tokenizer, id);
    }
    for (score, &offset) in scores.iter().zip(echo.offsets.iter().skip(1)) {
        logprobs.push_score(tokenizer, score, offset);
    }
}

impl Shape for Writer {
    fn delta(&mut self, delta: Delta, events: &mut Events) {
        self.dropped += delta.dropped_experts;
        let choice = self.choice(delta);
        if !choice.says_nothing() {
            let usage = self.include_usage.then_some(None);
            let moemesh = choice.finish_reason.and_then(|_| Degraded::of(self.dropped));
            events.push(&Answer { head: &self.head, choices: vec![choice], usage, moemesh });
        }
    }

    fn end(&mut self, usage: Usage, events: &mut Events) {
        if self.include_usage {
            let moemesh = Degraded::of(usage.dropped_experts);
            let usage = Some(Some(usage.into()));
            events.push(&Answer { head: &self.head, choices: Vec::new(), usage, moemesh });
        }
    }
}
