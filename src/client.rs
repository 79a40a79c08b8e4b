//! What the commands ask of a server. Rooms:
//!
//! - [`http`]: plain HTTP/1.1 requests over TCP and Unix sockets
//! - [`openai`]: streamed completions of any OpenAI-compatible server
//!
//! No TLS: whoever needs it puts a proxy in between.

pub mod http;
pub mod openai;

/// Why a server could not be asked, or did not answer as it should.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("`{url}` is not a URL this program can use: {problem}")]
    Url { url: String, problem: &'static str },
    #[error("cannot reach {endpoint}: {problem}")]
    Unreachable { endpoint: String, problem: String },
    #[error("{endpoint} answered {status}: {message}")]
    Refused { endpoint: String, status: u16, message: String },
    #[error("{endpoint} broke off: {problem}")]
    Broken { endpoint: String, problem: String },
}
