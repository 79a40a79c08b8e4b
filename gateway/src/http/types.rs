//! The two request bodies: OpenAI's fields, and those that vLLM adds under its
//! names. Everything is checked here against the limits and the vocabulary,
//! before any work; what is understood but not served is refused by name.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::error::ApiError;
use super::fields::{Fields, parse};
use super::messages::messages;
use crate::text::template::Message;

const MAX_STOP_STRINGS: usize = 16;
const MAX_STOP_BYTES: usize = 1024;
const MAX_STOP_IDS: usize = 256;
const MAX_BIASES: usize = 1024;
const MAX_TOP_K: i64 = 1 << 20;

const SERVED: &[&str] = &[
    "model",
    "prompt",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "logit_bias",
    "n",
    "best_of",
    "stream",
    "stream_options",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "echo",
    "user",
    "return_token_ids",
    "skip_special_tokens",
    "add_special_tokens",
    "add_generation_prompt",
    // Understood in part: what asks for nothing special passes.
    "tool_choice",
    "modalities",
    "response_format",
];

/// Understood and not served; a value that asks for nothing passes.
const UNSERVED: &[&str] = &[
    "tools",
    "functions",
    "function_call",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "audio",
    "prediction",
    "web_search_options",
    "documents",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "suffix",
    "prompt_embeds",
    "logits_processors",
    "allowed_token_ids",
    "bad_words",
    "min_tokens",
    "truncate_prompt_tokens",
    "use_beam_search",
];

/// What bounds a request.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub max_n: u32,
    pub max_logprobs: u32,
    /// Sequences (prompts times `n`) one request may hold.
    pub max_sequences: usize,
    pub vocab_size: u32,
    /// Prompt and completion together.
    pub context: u32,
}

/// Sampling as asked for; what is none takes the model's default.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sampling {
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    /// 0 means all tokens.
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    pub repetition_penalty: Option<f32>,
    pub seed: Option<i64>,
    pub logit_bias: BTreeMap<u32, f32>,
}

/// What both bodies ask for.
#[derive(Clone, Debug, PartialEq)]
pub struct Common {
    pub model: Option<String>,
    pub max_tokens: Option<u32>,
    pub n: u32,
    pub stream: bool,
    pub include_usage: bool,
    pub stop: Vec<String>,
    pub stop_token_ids: Vec<u32>,
    pub include_stop: bool,
    pub ignore_eos: bool,
    /// Alternatives to report with each token's log-probability.
    pub logprobs: Option<u32>,
    pub prompt_logprobs: Option<u32>,
    pub return_token_ids: bool,
    pub skip_special: bool,
    pub add_special: bool,
    pub sampling: Sampling,
}

/// One prompt of `/v1/completions`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    Text(String),
    Ids(Vec<u32>),
}

/// `/v1/completions`.
#[derive(Clone, Debug, PartialEq)]
pub struct CompletionRequest {
    pub common: Common,
    pub prompts: Vec<Prompt>,
    pub echo: bool,
}

/// `/v1/chat/completions`.
#[derive(Clone, Debug, PartialEq)]
pub struct ChatRequest {
    pub common: Common,
    pub messages: Vec<Message>,
    pub add_generation_prompt: bool,
}

impl CompletionRequest {
    /// # Errors
    /// 400 naming the field.
    pub fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let fields = Fields::parse(body, &[SERVED, UNSERVED])?;
        refuse_unsupported(&fields)?;
        let echo = fields.flag("echo")?;
        let logprobs = fields.integer("logprobs", 0, i64::from(limits.max_logprobs))?;
        // A prompt can be scored without a completion.
        let least = if echo { 0 } else { 1 };
        let mut common = Common::read(&fields, limits, true, least)?;
        common.logprobs = logprobs.map(|n| n as u32);
        let prompts = prompts(&fields, limits)?;
        let sequences = prompts.len().saturating_mul(common.n as usize);
        if sequences > limits.max_sequences {
            let most = limits.max_sequences;
            let message = format!("prompts times `n` make {sequences} sequences, over {most}");
            return Err(ApiError::field("prompt", message));
        }
        Ok(Self { common, prompts, echo })
    }
}

impl ChatRequest {
    /// # Errors
    /// 400 naming the field.
    pub fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let fields = Fields::parse(body, &[SERVED, UNSERVED])?;
        refuse_unsupported(&fields)?;
        if fields.flag("echo")? {
            return Err(ApiError::unsupported("echo"));
        }
        let mut common = Common::read(&fields, limits, false, 1)?;
        let wanted = fields.flag("logprobs")?;
        let top = fields.integer("top_logprobs", 0, i64::from(limits.max_logprobs))?;
        common.logprobs = match (wanted, top) {
            (true, top) => Some(top.unwrap_or(0) as u32),
            (false, Some(1..)) => {
                let message = "`top_logprobs` needs `logprobs` to be true";
                return Err(ApiError::field("top_logprobs", message));
            }
            (false, _) => None,
        };
        let add_generation_prompt = fields.get("add_generation_prompt")?.unwrap_or(true);
        Ok(Self { common, messages: messages(&fields)?, add_generation_prompt })
    }
}

impl Common {
    /// `add_special` is that field's default, `least` the smallest `max_tokens`.
    fn read(
        fields: &Fields<'_>,
        limits: &Limits,
        add_special: bool,
        least: i64,
    ) -> Result<Self, ApiError> {
        let n = fields.integer("n", 1, i64::from(limits.max_n))?.unwrap_or(1) as u32;
        if let Some(best_of) = fields.get::<i64>("best_of")?
            && best_of != i64::from(n)
        {
            return Err(ApiError::field("best_of", "`best_of` must equal `n`"));
        }
        let stream = fields.flag("stream")?;
        let prompt_logprobs =
            fields.integer("prompt_logprobs", 0, i64::from(limits.max_logprobs))?;
        if stream && prompt_logprobs.is_some() {
            let message = "`prompt_logprobs` is not available with `stream`";
            return Err(ApiError::field("prompt_logprobs", message));
        }
        // Read for its type only: it names the end user to the operator's own proxy.
        fields.get::<String>("user")?;
        Ok(Self {
            model: fields.get("model")?,
            max_tokens: max_tokens(fields, limits, least)?,
            n,
            stream,
            include_usage: include_usage(fields, stream)?,
            stop: stop_strings(fields)?,
            stop_token_ids: stop_ids(fields, limits)?,
            include_stop: fields.flag("include_stop_str_in_output")?,
            ignore_eos: fields.flag("ignore_eos")?,
            logprobs: None,
            prompt_logprobs: prompt_logprobs.map(|n| n as u32),
            return_token_ids: fields.flag("return_token_ids")?,
            skip_special: fields.get("skip_special_tokens")?.unwrap_or(true),
            add_special: fields.get("add_special_tokens")?.unwrap_or(add_special),
            sampling: Sampling::read(fields, limits)?,
        })
    }
}

impl Sampling {
    fn read(fields: &Fields<'_>, limits: &Limits) -> Result<Self, ApiError> {
        // -1 and 0 both mean all tokens; more than the vocabulary is the same.
        let top_k = fields.integer("top_k", -1, MAX_TOP_K)?;
        let top_k = top_k.map(|k| if k < i64::from(limits.vocab_size) { k.max(0) } else { 0 });
        Ok(Self {
            temperature: fields.number("temperature", 0.0, 2.0)?,
            top_p: fields.number("top_p", 1e-6, 1.0)?,
            top_k: top_k.map(|k| k as u32),
            min_p: fields.number("min_p", 0.0, 1.0)?,
            presence_penalty: fields.number("presence_penalty", -2.0, 2.0)?.unwrap_or(0.0),
            frequency_penalty: fields.number("frequency_penalty", -2.0, 2.0)?.unwrap_or(0.0),
            repetition_penalty: fields.number("repetition_penalty", 0.01, 10.0)?,
            seed: fields.get("seed")?,
            logit_bias: logit_bias(fields, limits)?,
        })
    }
}

fn max_tokens(fields: &Fields<'_>, limits: &Limits, least: i64) -> Result<Option<u32>, ApiError> {
    for name in ["max_completion_tokens", "max_tokens"] {
        if let Some(most) = fields.integer(name, least, i64::from(u32::MAX))? {
            let context = limits.context;
            if most > i64::from(context) {
                let message = format!("`{name}` is {most}, over the context of {context} tokens");
                return Err(ApiError::context(name, message));
            }
            return Ok(Some(most as u32));
        }
    }
    Ok(None)
}

fn include_usage(fields: &Fields<'_>, stream: bool) -> Result<bool, ApiError> {
    #[derive(Deserialize)]
    struct StreamOptions {
        include_usage: Option<bool>,
    }
    let Some(options) = fields.get::<StreamOptions>("stream_options")? else { return Ok(false) };
    if !stream {
        let message = "`stream_options` needs `stream` to be true";
        return Err(ApiError::field("stream_options", message));
    }
    Ok(options.include_usage.unwrap_or(false))
}

fn stop_strings(fields: &Fields<'_>) -> Result<Vec<String>, ApiError> {
    const NAME: &str = "stop";
    let stop: Vec<String> = match fields.raw(NAME) {
        None => Vec::new(),
        Some(raw) if raw.starts_with('[') => parse(raw, NAME)?,
        Some(raw) => vec![parse(raw, NAME)?],
    };
    if stop.len() > MAX_STOP_STRINGS {
        let message = format!("`stop` has {} strings, over {MAX_STOP_STRINGS}", stop.len());
        return Err(ApiError::field(NAME, message));
    }
    if stop.iter().any(|stop| stop.is_empty() || stop.len() > MAX_STOP_BYTES) {
        let message = format!("each `stop` string must have 1 to {MAX_STOP_BYTES} bytes");
        return Err(ApiError::field(NAME, message));
    }
    Ok(stop)
}

fn stop_ids(fields: &Fields<'_>, limits: &Limits) -> Result<Vec<u32>, ApiError> {
    const NAME: &str = "stop_token_ids";
    let ids: Vec<u32> = fields.get(NAME)?.unwrap_or_default();
    if ids.len() > MAX_STOP_IDS {
        let message = format!("`{NAME}` has {} ids, over {MAX_STOP_IDS}", ids.len());
        return Err(ApiError::field(NAME, message));
    }
    in_vocabulary(&ids, limits, NAME)?;
    Ok(ids)
}

fn in_vocabulary(ids: &[u32], limits: &Limits, name: &str) -> Result<(), ApiError> {
    match ids.iter().find(|&&id| id >= limits.vocab_size) {
        Some(id) => Err(ApiError::field(
            name,
            format!("token id {id} in `{name}` is not below {}", limits.vocab_size),
        )),
        None => Ok(()),
    }
}

fn logit_bias(fields: &Fields<'_>, limits: &Limits) -> Result<BTreeMap<u32, f32>, ApiError> {
    const NAME: &str = "logit_bias";
    let biases: BTreeMap<u32, f64> = fields.get(NAME)?.unwrap_or_default();
    if biases.len() > MAX_BIASES {
        let message = format!("`{NAME}` has {} entries, over {MAX_BIASES}", biases.len());
        return Err(ApiError::field(NAME, message));
    }
    let ids: Vec<u32> = biases.keys().copied().collect();
    in_vocabulary(&ids, limits, NAME)?;
    if biases.values().any(|bias| !(-100.0..=100.0).contains(bias)) {
        return Err(ApiError::field(NAME, "each `logit_bias` must be from -100 to 100"));
    }
    Ok(biases.into_iter().map(|(id, bias)| (id, bias as f32)).collect())
}

/// A string, ids, strings, or lists of ids.
fn prompts(fields: &Fields<'_>, limits: &Limits) -> Result<Vec<Prompt>, ApiError> {
    const NAME: &str = "prompt";
    let raw = fields.raw(NAME).ok_or_else(|| ApiError::field(NAME, "`prompt` is missing"))?;
    let inner = raw.strip_prefix('[').map(str::trim_start);
    let prompts: Vec<Prompt> = match inner.and_then(|inner| inner.bytes().next()) {
        None => vec![Prompt::Text(parse(raw, NAME)?)],
        Some(b'"') => parse::<Vec<String>>(raw, NAME)?.into_iter().map(Prompt::Text).collect(),
        Some(b'[') => parse::<Vec<Vec<u32>>>(raw, NAME)?.into_iter().map(Prompt::Ids).collect(),
        Some(_) => vec![Prompt::Ids(parse(raw, NAME)?)],
    };
    for prompt in &prompts {
        let empty = match prompt {
            Prompt::Text(text) => text.is_empty(),
            Prompt::Ids(ids) => ids.is_empty(),
        };
        if empty {
            return Err(ApiError::field(NAME, "`prompt` must not be empty"));
        }
        if let Prompt::Ids(ids) = prompt {
            in_vocabulary(ids, limits, NAME)?;
        }
    }
    if prompts.is_empty() {
        return Err(ApiError::field(NAME, "`prompt` must not be empty"));
    }
    Ok(prompts)
}

fn refuse_unsupported(fields: &Fields<'_>) -> Result<(), ApiError> {
    const NOTHING: [&str; 6] = ["[]", "{}", "false", "0", "\"\"", "-1"];
    for name in UNSERVED {
        if fields.raw(name).is_some_and(|raw| !NOTHING.contains(&raw)) {
            return Err(ApiError::unsupported(*name));
        }
    }
    if fields.raw("tool_choice").is_some_and(|raw| !matches!(raw, "\"none\"" | "\"auto\"")) {
        return Err(ApiError::unsupported("tool_choice"));
    }
    if let Some(modalities) = fields.get::<Vec<String>>("modalities")?
        && modalities.iter().any(|modality| modality != "text")
    {
        return Err(ApiError::unsupported("modalities"));
    }
    #[derive(Deserialize)]
    struct Format {
        #[serde(rename = "type")]
        kind: String,
    }
    if let Some(format) = fields.get::<Format>("response_format")?
        && format.kind != "text"
    {
        return Err(ApiError::unsupported("response_format"));
    }
    Ok(())
}
