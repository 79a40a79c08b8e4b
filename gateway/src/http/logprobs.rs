//! Log-probabilities in the three shapes that clients know: OpenAI's of
//! completions, OpenAI's of chat, and vLLM's of prompts. JSON has no infinity,
//! so none is below [`FLOOR`].

use std::collections::BTreeMap;

use proto::v1::TokenScore;
use serde::ser::{Serialize, SerializeMap as _, Serializer};

use crate::job::choice::Token;
use crate::text::tokenizer::Tokenizer;

const FLOOR: f32 = -9999.0;

/// `choices[].logprobs` of `/v1/completions`.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct CompletionLogprobs {
    pub tokens: Vec<String>,
    pub token_logprobs: Vec<Option<f32>>,
    pub top_logprobs: Vec<Option<Ranked>>,
    /// Characters of text before each token.
    pub text_offset: Vec<usize>,
}

/// Token text to log-probability, the most likely first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ranked(Vec<(String, f32)>);

impl Serialize for Ranked {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (token, logprob) in &self.0 {
            map.serialize_entry(token, logprob)?;
        }
        map.end()
    }
}

impl CompletionLogprobs {
    pub fn push(&mut self, tokenizer: &Tokenizer, token: &Token, base: usize) {
        let Some(score) = &token.score else { return };
        self.push_score(tokenizer, score, base + token.offset);
    }

    /// A prompt's first token has no score.
    pub fn push_first(&mut self, tokenizer: &Tokenizer, id: u32) {
        self.tokens.push(tokenizer.show(id));
        self.token_logprobs.push(None);
        self.top_logprobs.push(None);
        self.text_offset.push(0);
    }

    pub fn push_score(&mut self, tokenizer: &Tokenizer, score: &TokenScore, offset: usize) {
        self.tokens.push(tokenizer.show(score.id));
        self.token_logprobs.push(Some(finite(score.logprob)));
        self.text_offset.push(offset);
        let mut ranked = Ranked::default();
        // Ids whose bytes are no character by themselves share a spelling; the
        // likelier one keeps it.
        let all = score.top.iter().map(|top| (top.id, top.logprob));
        for (id, logprob) in all.chain([(score.id, score.logprob)]) {
            let shown = tokenizer.show(id);
            if !ranked.0.iter().any(|(other, _)| *other == shown) {
                ranked.0.push((shown, finite(logprob)));
            }
        }
        self.top_logprobs.push(Some(ranked));
    }
}

/// `choices[].logprobs` of `/v1/chat/completions`.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct ChatLogprobs {
    pub content: Vec<ChatToken>,
    pub refusal: Option<()>,
}

#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct ChatToken {
    #[serde(flatten)]
    pub chosen: Shown,
    pub top_logprobs: Vec<Shown>,
}

/// A token by itself.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Shown {
    pub token: String,
    pub logprob: f32,
    pub bytes: Vec<u8>,
}

impl Shown {
    fn new(tokenizer: &Tokenizer, id: u32, logprob: f32) -> Self {
        let bytes = tokenizer.bytes(id);
        let token = String::from_utf8_lossy(&bytes).into_owned();
        Self { token, logprob: finite(logprob), bytes }
    }
}

impl ChatLogprobs {
    pub fn push(&mut self, tokenizer: &Tokenizer, token: &Token) {
        let Some(score) = &token.score else { return };
        let shown = |id, logprob| Shown::new(tokenizer, id, logprob);
        self.content.push(ChatToken {
            chosen: shown(score.id, score.logprob),
            top_logprobs: score.top.iter().map(|top| shown(top.id, top.logprob)).collect(),
        });
    }
}

/// One entry of vLLM's `prompt_logprobs`: token id to its score.
pub type PromptEntry = BTreeMap<u32, PromptScore>;

#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct PromptScore {
    pub logprob: f32,
    /// From 1; none for a token below the alternatives asked for.
    pub rank: Option<usize>,
    pub decoded_token: String,
}

/// vLLM's `prompt_logprobs`: null for the first token, then one entry a token.
pub fn prompt(tokenizer: &Tokenizer, scores: &[TokenScore]) -> Vec<Option<PromptEntry>> {
    let entry = |score: &TokenScore| {
        let mut entry = PromptEntry::new();
        let mut add = |id, logprob, rank| {
            let decoded_token = tokenizer.show(id);
            let score = PromptScore { logprob: finite(logprob), rank, decoded_token };
            entry.entry(id).or_insert(score);
        };
        for (top, rank) in score.top.iter().zip(1..) {
            add(top.id, top.logprob, Some(rank));
        }
        add(score.id, score.logprob, None);
        entry
    };
    std::iter::once(None).chain(scores.iter().map(|score| Some(entry(score)))).collect()
}

/// In JSON's range; not a number counts as impossible.
fn finite(logprob: f32) -> f32 {
    if logprob.is_nan() { FLOOR } else { logprob.clamp(FLOOR, -FLOOR) }
}
