//! Plain HTTP/1.1, one connection per request, over TCP or a Unix socket.
//! Answers are bounded; streamed ones are read event by event.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use mesh::transport::Endpoint;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use crate::client::ClientError;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest plain answer that is read.
const MOST_BODY: usize = 4 << 20;
/// Longest reason for not being ready, in characters.
const MOST_REASON: usize = 200;
/// Largest single event of a stream.
const MOST_EVENT: usize = 1 << 20;

/// A server and the path that its API starts at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    pub endpoint: Endpoint,
    /// Such as `/proxy`, or empty.
    base: String,
    key: Option<String>,
}

impl Server {
    pub fn at(endpoint: Endpoint) -> Self {
        Self { endpoint, base: String::new(), key: None }
    }

    /// From a URL as people write it: `http://host:port`, with or without `/v1`.
    /// `key` is sent as a bearer token.
    pub fn from_url(url: &str, key: Option<String>) -> Result<Self, ClientError> {
        let wrong = |problem| ClientError::Url { url: url.to_owned(), problem };
        if url.starts_with("https://") {
            return Err(wrong("https is not supported"));
        }
        let rest = url.strip_prefix("http://").unwrap_or(url);
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        let bare = host.rsplit_once(':').is_none_or(|(_, port)| port.ends_with(']'));
        let host = if bare { format!("{host}:80") } else { host.to_owned() };
        let endpoint = host.parse().map_err(|_| wrong("expected http://host:port"))?;
        let path = path.trim_end_matches('/');
        let path = path.strip_suffix("v1").unwrap_or(path).trim_end_matches('/');
        let base = if path.is_empty() { String::new() } else { format!("/{path}") };
        Ok(Self { endpoint, base, key })
    }

    /// Status and body.
    pub async fn get(&self, path: &str) -> Result<(StatusCode, String), ClientError> {
        let answer = self.send("GET", path, Bytes::new()).await?;
        let status = answer.status();
        Ok((status, self.text(answer).await?))
    }

    /// What `/readyz` says: ready, or the reason why not.
    pub async fn readiness(&self) -> Result<Result<(), String>, ClientError> {
        let (status, body) = self.get("/readyz").await?;
        Ok(if status.is_success() { Ok(()) } else { Err(reason(&body)) })
    }

    /// Posts JSON and reads the answer as server-sent events.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with the server's own message for any status
    /// other than 200.
    pub async fn events(
        &self,
        path: &str,
        body: &serde_json::Value,
    ) -> Result<Events, ClientError> {
        let answer = self.send("POST", path, body.to_string().into()).await?;
        if answer.status() == StatusCode::OK {
            let (server, body) = (self.endpoint.to_string(), answer.into_body());
            return Ok(Events { server, body, buffer: Vec::new() });
        }
        let status = answer.status().as_u16();
        let text = self.text(answer).await.unwrap_or_default();
        let message = openai_message(&text).unwrap_or(text);
        Err(ClientError::Refused { endpoint: self.endpoint.to_string(), status, message })
    }

    async fn send(
        &self,
        method: &str,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, ClientError> {
        let host = match &self.endpoint {
            Endpoint::Tcp(address) => address.as_str(),
            Endpoint::Unix(_) => "localhost",
        };
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header(HOST, host)
            .header(CONTENT_TYPE, "application/json");
        if let Some(key) = &self.key {
            request = request.header(AUTHORIZATION, format!("Bearer {key}"));
        }
        let request = request.body(Full::new(body)).map_err(|error| self.unreachable(error))?;
        let connecting = async {
            match &self.endpoint {
                Endpoint::Tcp(address) => {
                    let stream = TcpStream::connect(address).await?;
                    stream.set_nodelay(true)?;
                    Ok(Box::new(stream) as Box<dyn Stream>)
                }
                Endpoint::Unix(path) => {
                    Ok(Box::new(UnixStream::connect(path).await?) as Box<dyn Stream>)
                }
            }
        };
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, connecting)
            .await
            .map_err(|_| self.unreachable("no connection in time"))?
            .map_err(|error: std::io::Error| self.unreachable(error))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.unreachable(error))?;
        // Ends with the connection, which ends when the answer is dropped.
        tokio::spawn(connection);
        sender.send_request(request).await.map_err(|error| self.unreachable(error))
    }

    async fn text(&self, answer: Response<Incoming>) -> Result<String, ClientError> {
        let body = Limited::new(answer.into_body(), MOST_BODY).collect().await;
        let body = body.map_err(|error| ClientError::Broken {
            endpoint: self.endpoint.to_string(),
            problem: error.to_string(),
        })?;
        Ok(String::from_utf8_lossy(&body.to_bytes()).into_owned())
    }

    fn unreachable(&self, problem: impl ToString) -> ClientError {
        let endpoint = self.endpoint.to_string();
        ClientError::Unreachable { endpoint, problem: problem.to_string() }
    }
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// The reason in a refusal of `/readyz`: JSON of a gateway, a line of the others.
fn reason(body: &str) -> String {
    let parsed: Option<serde_json::Value> = serde_json::from_str(body).ok();
    let detail = parsed.as_ref().and_then(|body| body.get("detail")?.as_str());
    let text = detail.unwrap_or(body.trim()).trim_start_matches("not ready: ");
    text.chars().take(MOST_REASON).collect()
}

/// The `message` of an error in OpenAI's shape.
fn openai_message(text: &str) -> Option<String> {
    let body: serde_json::Value = serde_json::from_str(text).ok()?;
    Some(body.get("error")?.get("message")?.as_str()?.to_owned())
}

/// Server-sent events. Dropping it closes the connection, which is how a
/// request is cancelled.
pub struct Events {
    server: String,
    body: Incoming,
    buffer: Vec<u8>,
}

impl Events {
    /// The data of the next event, or `None` at the end.
    pub async fn next(&mut self) -> Result<Option<String>, ClientError> {
        loop {
            while let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line);
                // Every event of this API is one `data:` line; the rest is framing.
                if let Some(data) = line.strip_prefix("data:") {
                    return Ok(Some(data.trim().to_owned()));
                }
            }
            if self.buffer.len() > MOST_EVENT {
                return Err(self.broken("an event is too long"));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.buffer.extend_from_slice(data);
                    }
                }
                Some(Err(error)) => return Err(self.broken(error)),
            }
        }
    }

    pub fn broken(&self, problem: impl ToString) -> ClientError {
        ClientError::Broken { endpoint: self.server.clone(), problem: problem.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_found_in_either_shape() {
        for (body, want) in [
            ("not ready: loading the trunk\n", "loading the trunk"),
            (r#"{"ready":false,"detail":"no router"}"#, "no router"),
            (r#"{"ready":false}"#, r#"{"ready":false}"#),
            ("", ""),
        ] {
            assert_eq!(reason(body), want);
        }
    }

    #[test]
    fn urls_are_taken_as_people_write_them() {
        for (url, endpoint, base) in [
            ("http://127.0.0.1:8080", "127.0.0.1:8080", ""),
            ("127.0.0.1:8080/", "127.0.0.1:8080", ""),
            ("http://host:8000/v1", "host:8000", ""),
            ("http://host/proxy/v1/", "host:80", "/proxy"),
            ("http://[::1]/v1", "[::1]:80", ""),
            ("http://[::1]:81", "[::1]:81", ""),
        ] {
            let server = Server::from_url(url, None).unwrap();
            assert_eq!(
                (server.endpoint.to_string().as_str(), server.base.as_str()),
                (endpoint, base)
            );
        }
        for url in ["https://host", "http://", "http://host:port"] {
            let error = Server::from_url(url, None).unwrap_err().to_string();
            assert!(error.contains(&format!("`{url}`")), "{error}");
        }
    }
}
