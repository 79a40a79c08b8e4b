//! One sequence as its client sees it: ids become text, stop ids and stop
//! strings end it. A stop string is found here, not by the router, which works
//! in ids; the sequence is then cancelled there.

use std::sync::Arc;

use proto::v1::{TokenEvent, TokenScore};
use serde::Serialize;

use crate::error::UpstreamError;
use crate::text::detokenizer::Detokenizer;
use crate::text::stops::Stops;
use crate::text::tokenizer::Tokenizer;
use crate::upstream::generation::{Event, Generation, Reason};

/// How sequences of one request end and are spelled.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Every id that ends a sequence.
    pub stop_ids: Vec<u32>,
    /// Those that the request itself named.
    pub own_stop_ids: Vec<u32>,
    pub stops: Vec<String>,
    /// Keep what ended a sequence in its text.
    pub include_stop: bool,
    pub skip_special: bool,
}

/// What one event adds to a choice.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Delta {
    pub index: u32,
    /// Final text; may be empty while characters or stop strings are held back.
    pub text: String,
    pub token: Option<Token>,
    /// Scores of the prompt's tokens from the second on, when asked for.
    pub prompt: Option<Vec<TokenScore>>,
    /// Experts' results that its computation did without.
    pub dropped_experts: u64,
    pub finish: Option<Finish>,
}

/// One generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    pub id: u32,
    pub score: Option<TokenScore>,
    /// Characters of text before it.
    pub offset: usize,
}

/// Why a choice ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finish {
    /// `stop` or `length`.
    pub reason: &'static str,
    pub stop: Option<StopReason>,
}

/// vLLM's `stop_reason`: what of the request's own ended it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum StopReason {
    Id(u32),
    Text(String),
}

/// A choice under way.
pub struct Choice {
    index: u32,
    /// Dropped, and so cancelled, with the last delta.
    generation: Option<Generation>,
    rules: Arc<Rules>,
    detokenizer: Detokenizer,
    stops: Stops,
    /// Characters of text so far, held back ones included.
    offset: usize,
    /// Nothing is to be generated; the prompt's scores are all that is wanted.
    score_only: bool,
    last: Option<u32>,
}

impl Choice {
    /// `wanted` 0 asks for the prompt's scores only.
    pub fn new(
        index: u32,
        generation: Generation,
        tokenizer: Arc<Tokenizer>,
        rules: Arc<Rules>,
        wanted: u32,
    ) -> Self {
        Self {
            index,
            generation: Some(generation),
            detokenizer: Detokenizer::new(tokenizer, rules.skip_special),
            stops: Stops::new(rules.stops.clone(), rules.include_stop),
            rules,
            offset: 0,
            score_only: wanted == 0,
            last: None,
        }
    }

    /// The next delta; none after the one with a finish.
    pub async fn next(&mut self) -> Result<Option<Delta>, UpstreamError> {
        let Some(generation) = &mut self.generation else { return Ok(None) };
        let delta = match generation.next().await? {
            None => return Ok(None),
            Some(Event::Prompt(scores)) => Delta { prompt: Some(scores), ..self.delta() },
            Some(_) if self.score_only => self.finish(Reason::Length),
            Some(Event::Token(token)) => self.token(token),
            Some(Event::Finished(reason)) => self.finish(reason),
        };
        if delta.finish.is_some() {
            self.generation = None;
        }
        Ok(Some(delta))
    }

    fn delta(&self) -> Delta {
        Delta { index: self.index, ..Delta::default() }
    }

    fn token(&mut self, event: TokenEvent) -> Delta {
        self.last = Some(event.id);
        let token = Token { id: event.id, score: event.score, offset: self.offset };
        // The id that ends a sequence is no part of its text.
        let ends = self.rules.stop_ids.contains(&event.id) && !self.rules.include_stop;
        let piece = if ends { String::new() } else { self.detokenizer.push(event.id) };
        self.offset += piece.chars().count();
        let passed = self.stops.push(&piece);
        let finish = passed.matched.map(by_text);
        let dropped_experts = event.dropped_experts;
        Delta { text: passed.text, token: Some(token), dropped_experts, finish, ..self.delta() }
    }

    fn finish(&mut self, reason: Reason) -> Delta {
        let passed = self.stops.push(&self.detokenizer.finish());
        if let Some(stop) = passed.matched {
            return Delta { text: passed.text, finish: Some(by_text(stop)), ..self.delta() };
        }
        let text = passed.text + &self.stops.finish();
        let finish = match reason {
            Reason::Length => Finish { reason: "length", stop: None },
            Reason::Stop => {
                let own = self.last.filter(|id| self.rules.own_stop_ids.contains(id));
                Finish { reason: "stop", stop: own.map(StopReason::Id) }
            }
        };
        Delta { text, finish: Some(finish), ..self.delta() }
    }
}

fn by_text(stop: String) -> Finish {
    Finish { reason: "stop", stop: Some(StopReason::Text(stop)) }
}
