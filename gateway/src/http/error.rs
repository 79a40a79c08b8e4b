//! What a client is told when something is wrong: OpenAI's error shape,
//! `{"error": {"message", "type", "param", "code"}}`, with a fixed vocabulary of
//! statuses. Every status of the gateway that is not 200 is made here.

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde::Serialize;

use crate::error::UpstreamError;
use crate::text::TextError;
use crate::text::template::TemplateError;
use crate::text::tokenizer::TokenizeError;

/// Seconds after which a refused client may try again.
const RETRY_AFTER: &str = "1";

/// An answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    pub status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    /// The request's field that is wrong, as in `messages[2].content`.
    param: Option<String>,
    message: String,
}

#[derive(Serialize)]
struct Envelope<'a> {
    error: Body<'a>,
}

#[derive(Serialize)]
struct Body<'a> {
    message: &'a str,
    #[serde(rename = "type")]
    kind: &'a str,
    param: Option<&'a str>,
    code: Option<&'a str>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, code: None, param: None, message: message.into() }
    }

    /// The same error of a field inside `outer`.
    pub fn within(mut self, outer: &str) -> Self {
        self.param = Some(match self.param {
            Some(inner) => format!("{outer}.{inner}"),
            None => outer.to_owned(),
        });
        self
    }

    fn with_code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    /// A request that is wrong as a whole.
    pub fn request(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, "invalid_request_error", message)
    }

    /// A field that is wrong.
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        let mut error = Self::request(StatusCode::BAD_REQUEST, message);
        error.param = Some(param.into());
        error
    }

    /// A field that is understood but not served here.
    pub fn unsupported(param: impl Into<String>) -> Self {
        let param = param.into();
        let message = format!("`{param}` is not supported by this server");
        Self::field(param, message).with_code("unsupported_parameter")
    }

    /// More tokens than the context holds.
    pub fn context(param: &'static str, message: String) -> Self {
        Self::field(param, message).with_code("context_length_exceeded")
    }

    pub fn unknown_model(model: &str, served: &str) -> Self {
        // The name is the client's: shown short and escaped.
        let shown: String = model.chars().take(128).collect::<String>().escape_debug().collect();
        let message = format!("model `{shown}` does not exist; this server has `{served}`");
        let mut error = Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
            .with_code("model_not_found");
        error.param = Some("model".to_owned());
        error
    }

    /// The gateway itself is full.
    pub fn full(message: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
            .with_code("overloaded")
    }

    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message).with_code("unavailable")
    }

    /// The gateway failed; what exactly is in its log.
    pub fn internal() -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "the gateway failed")
    }

    /// The error as JSON, for a body or for an event of a stream.
    pub fn json(&self) -> String {
        let error = Body {
            message: &self.message,
            kind: self.kind,
            param: self.param.as_deref(),
            code: self.code,
        };
        // Strings only, which always serialise.
        serde_json::to_string(&Envelope { error }).unwrap_or_default()
    }

    pub fn message(&self) -> &str {
        &self.message
    }
}

impl From<UpstreamError> for ApiError {
    fn from(error: UpstreamError) -> Self {
        let message = error.to_string();
        match error {
            UpstreamError::Refused(_) => Self::request(StatusCode::BAD_REQUEST, message),
            UpstreamError::Overloaded(_) => Self::full(message),
            UpstreamError::Missing(_) => Self::unavailable(message).with_code("expert_missing"),
            UpstreamError::NotReady(_) | UpstreamError::Failed(_) => Self::unavailable(message),
            UpstreamError::Deadline => {
                Self::new(StatusCode::GATEWAY_TIMEOUT, "timeout_error", message)
                    .with_code("timeout")
            }
        }
    }
}

/// `param` is the field that the text came from.
pub fn of_text(error: TextError, param: &'static str) -> ApiError {
    match error {
        TextError::Tokenize(TokenizeError::TooLong { .. }) => {
            ApiError::context(param, error.to_string())
        }
        TextError::Template(TemplateError::Raised(_) | TemplateError::Failed(_))
        | TextError::Tokenize(TokenizeError::Absent)
        | TextError::NoTemplate => ApiError::field(param, error.to_string()),
        TextError::Tokenize(TokenizeError::Failed(_)) | TextError::Stopped(_) => {
            tracing::error!(%error, "text was not tokenised");
            ApiError::internal()
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let json = HeaderValue::from_static("application/json");
        let mut response = (self.status, self.json()).into_response();
        response.headers_mut().insert(header::CONTENT_TYPE, json);
        if matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            let retry = HeaderValue::from_static(RETRY_AFTER);
            response.headers_mut().insert(header::RETRY_AFTER, retry);
        }
        response
    }
}
