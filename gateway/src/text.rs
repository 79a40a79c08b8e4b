//! Text in, ids out, and back. Rooms:
//!
//! - [`tokenizer`]: `tokenizer.json`, special tokens, bytes of an id
//! - [`shield`]: keeps text of a user from becoming control tokens
//! - [`template`]: the model's chat template, fenced in
//! - [`detokenizer`]: ids to text as they arrive, UTF-8 safe
//! - [`stops`]: stop strings across token boundaries
//!
//! All of it blocks, and [`Text::run`] is how async code calls it.

pub mod detokenizer;
pub mod shield;
pub mod stops;
pub mod template;
pub mod tokenizer;

use std::path::Path;
use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::error::LoadError;
use crate::profile::{Document, Profile};
use shield::{Shield, Trust};
use template::{ChatTemplate, Message, TemplateError};
use tokenizer::{TokenizeError, Tokenizer};

/// Why text could not be turned into ids.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    #[error(transparent)]
    Tokenize(#[from] TokenizeError),
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error("the model has no chat template")]
    NoTemplate,
    #[error("text processing stopped: {0}")]
    Stopped(String),
}

/// Tokenizer and template of the served model.
pub struct Text {
    pub tokenizer: Arc<Tokenizer>,
    shield: Shield,
    template: Option<ChatTemplate>,
    /// Bounds the blocking threads that tokenise at one time.
    turns: Semaphore,
}

impl Text {
    /// Loads the tokenizer, its configuration and the chat template of `dir`.
    ///
    /// # Errors
    /// [`LoadError`] naming the file.
    pub fn load(dir: &Path, profile: &Profile) -> Result<Self, LoadError> {
        let config = match dir.join("tokenizer_config.json") {
            path if path.exists() => Some(Document::open(path)?),
            _ => None,
        };
        let tokenizer = Tokenizer::load(dir, config.as_ref(), profile)?;
        let shield = Shield::new(&tokenizer);
        let template = ChatTemplate::load(dir, config.as_ref(), &tokenizer)?;
        let turns = std::thread::available_parallelism().map_or(1, |n| n.get());
        Ok(Self { tokenizer: Arc::new(tokenizer), shield, template, turns: Semaphore::new(turns) })
    }

    /// Ids of a raw prompt; control tokens written in it are meant as such.
    pub fn prompt(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        Ok(self.tokenizer.encode(text, add_special)?)
    }

    /// Ids of a conversation through the chat template. Text that looks like a
    /// control token inside a message stays text.
    pub fn chat(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        add_special: bool,
    ) -> Result<Vec<u32>, TextError> {
        let template = self.template.as_ref().ok_or(TextError::NoTemplate)?;
        let mark = Shield::mark(messages.iter().flat_map(Message::texts)).ok_or_else(|| {
            TokenizeError::Failed("the messages hold every private-use character".to_owned())
        })?;
        let guarded: Vec<Message> = messages
            .iter()
            .map(|message| {
                let trust = Trust::of_role(message.role);
                message
                    .map(|text| self.shield.guard(&self.tokenizer, text, trust, mark).into_owned())
            })
            .collect();
        let rendered = template.render(&guarded, add_generation_prompt)?;
        let ids = if rendered.contains(mark) {
            self.shield.encode(&self.tokenizer, &rendered, mark)?
        } else {
            self.tokenizer.encode(&rendered, false)?
        };
        Ok(if add_special { self.tokenizer.frame(ids) } else { ids })
    }

    /// Runs `work` on a blocking thread, a few at a time.
    ///
    /// # Errors
    /// [`TextError::Stopped`] when `work` panicked.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, TextError> {
        let stopped = |error: &dyn std::fmt::Display| TextError::Stopped(error.to_string());
        let _turn = self.turns.acquire().await.map_err(|error| stopped(&error))?;
        let span = tracing::Span::current();
        tokio::task::spawn_blocking(move || span.in_scope(work))
            .await
            .map_err(|error| stopped(&error))
    }
}

#[cfg(test)]
mod tests;
