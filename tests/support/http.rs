//! A plain HTTP/1.1 client for the tests, over hyper; no retries, no pool.

use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::{TcpStream, UnixStream};

/// Where a server listens.
#[derive(Clone, Debug)]
pub enum Address {
    Tcp(String),
    Unix(std::path::PathBuf),
}

pub async fn send(
    address: &Address,
    request: Request<Full<Bytes>>,
) -> std::io::Result<Response<Incoming>> {
    let other = |error: hyper::Error| std::io::Error::other(error);
    macro_rules! over {
        ($stream:expr) => {{
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new($stream))
                    .await
                    .map_err(other)?;
            tokio::spawn(connection);
            sender.send_request(request).await.map_err(other)
        }};
    }
    match address {
        Address::Tcp(address) => over!(TcpStream::connect(address).await?),
        Address::Unix(path) => over!(UnixStream::connect(path).await?),
    }
}

pub async fn get(address: &Address, path: &str) -> std::io::Result<(StatusCode, String)> {
    let request = Request::get(path).header("host", "test").body(Full::default()).unwrap();
    let response = send(address, request).await?;
    let status = response.status();
    let body = response.into_body().collect().await.map_err(std::io::Error::other)?.to_bytes();
    Ok((status, String::from_utf8_lossy(&body).into_owned()))
}

fn post_request(path: &str, body: Vec<u8>) -> Request<Full<Bytes>> {
    Request::post(path)
        .header("host", "test")
        .header("content-type", "application/json")
        .body(Full::new(body.into()))
        .unwrap()
}

/// Posts raw bytes; the answer is JSON or null.
pub async fn post_bytes(address: &Address, path: &str, body: Vec<u8>) -> (StatusCode, Value) {
    let response = send(address, post_request(path, body)).await.unwrap();
    let status = response.status();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
}

pub async fn post(address: &Address, path: &str, body: &Value) -> (StatusCode, Value) {
    post_bytes(address, path, body.to_string().into_bytes()).await
}

/// A stream of server-sent events, read as it comes.
pub struct Events {
    body: Incoming,
    buffer: Vec<u8>,
}

pub async fn stream(address: &Address, path: &str, body: &Value) -> Events {
    let response = ask(address, path, body).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    Events::of(response)
}

/// Posts, whatever comes of it.
pub async fn ask(
    address: &Address,
    path: &str,
    body: &Value,
) -> std::io::Result<Response<Incoming>> {
    send(address, post_request(path, body.to_string().into_bytes())).await
}

impl Events {
    pub fn of(response: Response<Incoming>) -> Self {
        Self { body: response.into_body(), buffer: Vec::new() }
    }

    /// The next event's data; `None` at the end of the stream or when it breaks.
    pub async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|two| two == b"\n\n") {
                let event: Vec<u8> = self.buffer.drain(..end + 2).collect();
                let text = String::from_utf8(event).unwrap();
                match text.strip_prefix("data: ") {
                    Some(data) => return Some(data.trim_end().to_owned()),
                    None => continue,
                }
            }
            let frame = self.body.frame().await?.ok()?;
            if let Ok(data) = frame.into_data() {
                self.buffer.extend_from_slice(&data);
            }
        }
    }
}
