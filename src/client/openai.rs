//! Streamed completions of any OpenAI-compatible server: what is asked, the
//! pieces that come back, and how fast they came.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::ClientError;
use crate::client::http::{Events, Server};

/// What is continued.
#[derive(Clone, Debug)]
pub enum Prompt {
    Text(String),
    /// Token ids, as the completions API takes them.
    Tokens(Vec<u32>),
    /// One user message of the chat API.
    Chat(String),
}

/// A request for one streamed completion. What is `None` is left to the server.
#[derive(Clone, Debug)]
pub struct Ask {
    pub model: String,
    pub prompt: Prompt,
    pub max_tokens: u32,
    pub temperature: Option<f64>,
    pub seed: Option<u64>,
    /// Go on to `max_tokens` whatever the model says.
    pub ignore_eos: bool,
    /// Count tokens in every event, as vLLM does when asked.
    pub count_each: bool,
}

impl Ask {
    fn path(&self) -> &'static str {
        match self.prompt {
            Prompt::Chat(_) => "/v1/chat/completions",
            _ => "/v1/completions",
        }
    }

    fn body(&self) -> Value {
        let mut body = json!({
            "model": self.model,
            "max_tokens": self.max_tokens,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        match &self.prompt {
            Prompt::Text(text) => body["prompt"] = json!(text),
            Prompt::Tokens(ids) => body["prompt"] = json!(ids),
            Prompt::Chat(text) => body["messages"] = json!([{ "role": "user", "content": text }]),
        }
        if let Some(temperature) = self.temperature {
            body["temperature"] = json!(temperature);
        }
        if let Some(seed) = self.seed {
            body["seed"] = json!(seed);
        }
        if self.ignore_eos {
            body["ignore_eos"] = json!(true);
        }
        if self.count_each {
            body["stream_options"]["continuous_usage_stats"] = json!(true);
        }
        body
    }
}

/// How a completion went.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Summary {
    pub prompt_tokens: u64,
    /// As the server counted them; pieces of text if it did not.
    pub completion_tokens: u64,
    /// From the request to the first piece.
    pub first: Duration,
    /// From the first piece to the last.
    pub rest: Duration,
}

impl Summary {
    /// Tokens a second once the first was there, or `None` when there was but one.
    pub fn rate(&self) -> Option<f64> {
        let after_first = self.completion_tokens.checked_sub(1).filter(|&count| count > 0)?;
        let seconds = self.rest.as_secs_f64();
        (seconds > 0.0).then(|| after_first as f64 / seconds)
    }

    /// Time per token after the first.
    pub fn per_token(&self) -> Option<Duration> {
        self.rate().map(|rate| Duration::from_secs_f64(1.0 / rate))
    }
}

/// Asks, and hands each piece of text to `piece` as it arrives. An error of
/// `piece` ends the request and is returned.
pub async fn complete<E: From<ClientError>>(
    server: &Server,
    ask: &Ask,
    mut piece: impl FnMut(&str) -> Result<(), E>,
) -> Result<Summary, E> {
    complete_counted(server, ask, |text, _| piece(text)).await
}

/// [`complete`], which also tells how many tokens there are so far: as the server
/// counts them, or else one for each event.
pub async fn complete_counted<E: From<ClientError>>(
    server: &Server,
    ask: &Ask,
    mut piece: impl FnMut(&str, u64) -> Result<(), E>,
) -> Result<Summary, E> {
    let asked = Instant::now();
    let mut events = server.events(ask.path(), &ask.body()).await?;
    let mut summary = Summary::default();
    let mut counted = None;
    let mut pieces = 0;
    let mut finished = false;
    while let Some(data) = events.next().await? {
        if data == "[DONE]" {
            finished = true;
            break;
        }
        let event = parse(&events, &data)?;
        if let Some(usage) = event.get("usage").filter(|usage| !usage.is_null()) {
            summary.prompt_tokens = usage["prompt_tokens"].as_u64().unwrap_or_default();
            counted = usage["completion_tokens"].as_u64();
        }
        let choice = &event["choices"][0];
        let text = choice["text"].as_str().or_else(|| choice["delta"]["content"].as_str());
        let text = text.unwrap_or_default();
        // The chunk that opens a chat answer names the role and carries no token.
        if choice.is_null() || (text.is_empty() && !choice["delta"]["role"].is_null()) {
            continue;
        }
        let now = asked.elapsed();
        if pieces == 0 {
            summary.first = now;
        }
        summary.rest = now - summary.first;
        pieces += 1;
        if !text.is_empty() {
            piece(text, counted.unwrap_or(pieces))?;
        }
    }
    if !finished {
        return Err(events.broken("the stream ended before [DONE]").into());
    }
    summary.completion_tokens = counted.unwrap_or(pieces);
    Ok(summary)
}

/// One event, or the error that the server reports in place of one.
fn parse(events: &Events, data: &str) -> Result<Value, ClientError> {
    let event: Value = serde_json::from_str(data)
        .map_err(|error| events.broken(format!("an event is no JSON: {error}")))?;
    match event.get("error") {
        Some(error) => Err(events.broken(error["message"].as_str().unwrap_or(data))),
        None => Ok(event),
    }
}

/// The name of the first model that the server lists.
pub async fn first_model(server: &Server) -> Result<String, ClientError> {
    let (status, body) = server.get("/v1/models").await?;
    let list: Value = serde_json::from_str(&body).unwrap_or_default();
    match list["data"][0]["id"].as_str() {
        Some(id) => Ok(id.to_owned()),
        None => Err(ClientError::Refused {
            endpoint: server.endpoint.to_string(),
            status: status.as_u16(),
            message: "it lists no model; name one with --model".to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_asked_for_is_sent() {
        let ask = Ask {
            model: "m".to_owned(),
            prompt: Prompt::Tokens(vec![1, 2]),
            max_tokens: 3,
            temperature: None,
            seed: Some(7),
            ignore_eos: true,
            count_each: false,
        };
        let want = json!({
            "model": "m", "max_tokens": 3, "stream": true,
            "stream_options": { "include_usage": true },
            "prompt": [1, 2], "seed": 7, "ignore_eos": true,
        });
        assert_eq!((ask.path(), ask.body()), ("/v1/completions", want));
        let counted = Ask { count_each: true, ..ask.clone() }.body();
        assert_eq!(counted["stream_options"]["continuous_usage_stats"], true);
        assert_eq!(counted["stream_options"]["include_usage"], true);
        let chat = Ask { prompt: Prompt::Chat("hi".to_owned()), ..ask };
        assert_eq!(chat.path(), "/v1/chat/completions");
        assert_eq!(chat.body()["messages"], json!([{ "role": "user", "content": "hi" }]));
    }

    #[test]
    fn the_first_token_is_not_part_of_the_rate() {
        let mut summary = Summary { completion_tokens: 11, ..Summary::default() };
        assert_eq!(summary.rate(), None);
        summary.rest = Duration::from_secs(2);
        assert_eq!(summary.rate(), Some(5.0));
        assert_eq!(summary.per_token(), Some(Duration::from_millis(200)));
        summary.completion_tokens = 1;
        assert_eq!(summary.rate(), None);
    }
}
