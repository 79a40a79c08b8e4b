//! The model's chat template, as transformers runs it: Jinja with trimmed and
//! left-stripped blocks, Python's string methods, `raise_exception`,
//! `strftime_now`, `tojson`. It comes from the model directory only, never from
//! a client, and runs with bounded fuel, recursion and output.

mod clock;

use std::fmt::Write as _;
use std::path::Path;
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind, Value, context};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter};

use super::tokenizer::Tokenizer;
use crate::error::LoadError;
use crate::profile::{Document, read_limited};

const MAX_TEMPLATE_BYTES: u64 = 1 << 20;
/// Instructions one rendering may take; DeepSeek-V3's takes under 100 a message.
const FUEL: u64 = 10_000_000;
const RECURSION: usize = 64;
const MAX_OUTPUT_BYTES: usize = 64 << 20;

/// Why a conversation was not rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The template called `raise_exception`.
    #[error("{0}")]
    Raised(String),
    #[error("chat template failed: {0}")]
    Failed(String),
}

/// One turn of a conversation, already checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// One of the roles that `http/types.rs` lists, so it is no user text.
    pub role: &'static str,
    pub content: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

impl Message {
    /// Everything a client wrote freely.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.content.as_str()).chain(self.name.as_deref())
    }

    /// The same turn with `edit` applied to everything a client wrote freely.
    pub fn map(&self, edit: impl Fn(&str) -> String) -> Self {
        Self { role: self.role, content: edit(&self.content), name: self.name.as_deref().map(edit) }
    }
}

/// A compiled template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// Looks in `chat_template.jinja`, then in `tokenizer_config.json`; none
    /// when neither has one.
    pub(crate) fn load(
        dir: &Path,
        config: Option<&Document>,
        tokenizer: &Tokenizer,
    ) -> Result<Option<Self>, LoadError> {
        let file = dir.join("chat_template.jinja");
        let (path, source) = if file.exists() {
            let bytes = read_limited(&file, MAX_TEMPLATE_BYTES)?;
            let source = String::from_utf8(bytes).map_err(|_| LoadError::Template {
                path: file.clone(),
                problem: "it is not UTF-8".to_owned(),
            })?;
            (file, source)
        } else {
            let Some(config) = config else { return Ok(None) };
            let Some(source) = configured(config)? else { return Ok(None) };
            (config.path.clone(), source)
        };
        let (bos, eos) = (tokenizer.bos().unwrap_or(""), tokenizer.eos().unwrap_or(""));
        Self::compile(source, bos, eos)
            .map(Some)
            .map_err(|error| LoadError::Template { path, problem: describe(&error) })
    }

    fn compile(source: String, bos: &str, eos: &str) -> Result<Self, Error> {
        let mut environment = Environment::new();
        environment
            .set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_recursion_limit(RECURSION);
        environment.set_fuel(Some(FUEL));
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", |format: String| {
            clock::strftime(&format, SystemTime::now())
                .map_err(|problem| Error::new(ErrorKind::InvalidOperation, problem))
        });
        environment.add_filter("tojson", tojson);
        environment.add_template_owned("chat", source)?;
        Ok(Self { environment, bos: bos.to_owned(), eos: eos.to_owned() })
    }

    /// The conversation as the model was trained to read it.
    ///
    /// # Errors
    /// [`TemplateError::Raised`] when the template itself refuses the messages.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        let context = context! {
            messages => Value::from(Serde(messages)),
            add_generation_prompt,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
            tools => Value::from(()),
            documents => Value::from(()),
        };
        let mut output = Limited(Vec::new());
        self.environment
            .get_template("chat")
            .and_then(|template| template.render_captured_to(context, &mut output).map(|_| ()))
            .map_err(|error| refused(&error))?;
        String::from_utf8(output.0).map_err(|error| TemplateError::Failed(error.to_string()))
    }
}

/// `chat_template` of the tokenizer's configuration: a string, or a list of
/// named ones, of which `default` is meant.
fn configured(config: &Document) -> Result<Option<String>, LoadError> {
    const FIELD: &str = "chat_template";
    let Some(value) = config.get(FIELD) else { return Ok(None) };
    if let Some(source) = value.as_str() {
        return Ok(Some(source.to_owned()));
    }
    let named = value.as_array().map(Vec::as_slice).unwrap_or_default();
    named
        .iter()
        .find(|entry| entry["name"] == "default")
        .and_then(|entry| entry["template"].as_str())
        .map(|source| Some(source.to_owned()))
        .ok_or_else(|| config.refuse(FIELD, "must be a string or a list with a `default`"))
}

/// Marks an error as the template's own words.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "the template refused")
        .with_source(Raised(message)))
}

fn refused(error: &Error) -> TemplateError {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = source {
        if let Some(Raised(message)) = current.downcast_ref::<Raised>() {
            return TemplateError::Raised(message.clone());
        }
        source = current.source();
    }
    TemplateError::Failed(describe(error))
}

/// Kind, detail and line, without the template's text.
fn describe(error: &Error) -> String {
    let mut text = error.kind().to_string();
    if let Some(detail) = error.detail() {
        let _ = write!(text, ": {detail}");
    }
    if let Some(line) = error.line() {
        let _ = write!(text, " (line {line})");
    }
    text
}

/// As transformers' `tojson`: Python's separators, nothing escaped for HTML.
fn tojson(value: Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<bool> = options.get("ensure_ascii")?;
    let failed = |error: serde_json::Error| {
        Error::new(ErrorKind::BadSerialization, "value cannot be JSON").with_source(error)
    };
    let mut bytes = Limited(Vec::new());
    match indent {
        Some(width) => {
            let spaces = " ".repeat(width.min(16));
            let formatter = PrettyFormatter::with_indent(spaces.as_bytes());
            let mut out = serde_json::Serializer::with_formatter(&mut bytes, formatter);
            value.serialize(&mut out).map_err(failed)?;
        }
        None => {
            let mut out = serde_json::Serializer::with_formatter(&mut bytes, PythonSeparators);
            value.serialize(&mut out).map_err(failed)?;
        }
    }
    String::from_utf8(bytes.0)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))
}

/// `json.dumps` puts a space after `,` and `:`.
struct PythonSeparators;

impl Formatter for PythonSeparators {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
    ) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

/// Output that stops at [`MAX_OUTPUT_BYTES`].
struct Limited(Vec<u8>);

impl std::io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT_BYTES {
            return Err(std::io::Error::other("output is over the limit"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
