//! `messages` of a chat request: roles that are known, content that is text.
//! Calls, images, sound and files are refused by name.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::error::ApiError;
use super::fields::{Fields, parse};
use crate::text::template::Message;

const MAX_MESSAGES: usize = 16_384;
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// The conversation, checked.
///
/// # Errors
/// 400 naming the message and its field.
pub fn messages(fields: &Fields<'_>) -> Result<Vec<Message>, ApiError> {
    const NAME: &str = "messages";
    let raw: Vec<&RawValue> =
        fields.get(NAME)?.ok_or_else(|| ApiError::field(NAME, "`messages` is missing"))?;
    if raw.is_empty() {
        return Err(ApiError::field(NAME, "`messages` must not be empty"));
    }
    if raw.len() > MAX_MESSAGES {
        let message = format!("`messages` has {} entries, over {MAX_MESSAGES}", raw.len());
        return Err(ApiError::field(NAME, message));
    }
    raw.iter().enumerate().map(|(at, raw)| message(raw, &format!("{NAME}[{at}]"))).collect()
}

fn message(raw: &RawValue, param: &str) -> Result<Message, ApiError> {
    const FIELDS: &[&str] =
        &["role", "content", "name", "tool_calls", "function_call", "audio", "tool_call_id"];
    let within = |error: ApiError| error.within(param);
    let fields = Fields::parse(raw.get().as_bytes(), &[FIELDS]).map_err(within)?;
    for name in ["tool_calls", "function_call", "audio", "tool_call_id"] {
        if fields.raw(name).is_some_and(|raw| raw != "[]") {
            return Err(ApiError::unsupported(format!("{param}.{name}")));
        }
    }
    let role: String = fields.get("role").map_err(within)?.ok_or_else(|| {
        ApiError::field(format!("{param}.role"), format!("`{param}.role` is missing"))
    })?;
    let role = ROLES.into_iter().find(|known| *known == role).ok_or_else(|| {
        let message = format!("`{param}.role` must be one of {}", ROLES.join(", "));
        ApiError::field(format!("{param}.role"), message)
    })?;
    if role == "tool" {
        return Err(ApiError::unsupported(format!("{param}.role")));
    }
    // What OpenAI calls developer, chat templates call system.
    let role = if role == "developer" { "system" } else { role };
    let at = format!("{param}.content");
    let content = match fields.raw("content") {
        None => return Err(ApiError::field(at.clone(), format!("`{at}` is missing"))),
        Some(raw) if raw.starts_with('[') => text_parts(raw, &at)?,
        Some(raw) => parse(raw, &at)?,
    };
    Ok(Message { role, content, name: fields.get("name").map_err(within)? })
}

/// Content parts; those of text are joined by line ends, others refused.
fn text_parts(raw: &str, param: &str) -> Result<String, ApiError> {
    #[derive(Deserialize)]
    struct Part {
        #[serde(rename = "type")]
        kind: String,
        text: Option<String>,
    }
    let parts: Vec<Part> = parse(raw, param)?;
    if parts.is_empty() {
        return Err(ApiError::field(param, format!("`{param}` must not be empty")));
    }
    let mut texts = Vec::with_capacity(parts.len());
    for (at, part) in parts.into_iter().enumerate() {
        let param = format!("{param}[{at}]");
        match (part.kind.as_str(), part.text) {
            ("text", Some(text)) => texts.push(text),
            ("text", None) => {
                let message = format!("`{param}.text` is missing");
                return Err(ApiError::field(format!("{param}.text"), message));
            }
            _ => return Err(ApiError::unsupported(format!("{param}.type"))),
        }
    }
    Ok(texts.join("\n"))
}
