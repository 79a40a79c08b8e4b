//! The door: bounds on what is held for clients before any work is done for
//! them. A request takes one permit a sequence; a body takes its bytes from a
//! budget while it is read. Refuses at once when full, it does not queue.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures::StreamExt as _;
use http::{HeaderMap, StatusCode, header};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::http::error::ApiError;

/// A body must have arrived whole by then.
const BODY_TIMEOUT: Duration = Duration::from_secs(20);
/// Bodies that may be held at one time, in largest ones.
const BODIES: usize = 64;
/// A client that sends more than the limit rarely reads before it has sent all,
/// so this much is read and dropped before it is told.
const DRAIN_BYTES: usize = 64 << 20;
const DRAIN_TIMEOUT: Duration = Duration::from_secs(3);

/// The gateway's bounds.
pub struct Admission {
    sequences: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    max_body: usize,
}

/// A body and its share of the budget.
pub struct Received {
    pub bytes: Vec<u8>,
    _share: Option<OwnedSemaphorePermit>,
}

impl Admission {
    pub fn new(max_sequences: usize, max_body: usize) -> Self {
        let budget = max_body.saturating_mul(BODIES).min(u32::MAX as usize);
        Self {
            sequences: Arc::new(Semaphore::new(max_sequences.min(Semaphore::MAX_PERMITS))),
            bytes: Arc::new(Semaphore::new(budget)),
            max_body,
        }
    }

    /// Permits for `sequences`, held until they end.
    ///
    /// # Errors
    /// 429 when there are not as many.
    pub fn enter(&self, sequences: usize) -> Result<OwnedSemaphorePermit, ApiError> {
        let wanted = u32::try_from(sequences).unwrap_or(u32::MAX);
        Arc::clone(&self.sequences)
            .try_acquire_many_owned(wanted)
            .map_err(|_| ApiError::full("the gateway is at its limit of concurrent sequences"))
    }

    /// Reads a JSON body.
    ///
    /// # Errors
    /// 415 another content type, 413 over the limit, 408 too slow, 429 no budget.
    pub async fn body(&self, headers: &HeaderMap, body: Body) -> Result<Received, ApiError> {
        check_content_type(headers)?;
        let mut body = body.into_data_stream();
        let declared = headers
            .get(header::CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
        let read = async {
            if declared.is_some_and(|length| length > self.max_body) {
                return Err(self.too_large());
            }
            let mut received = Received { bytes: Vec::new(), _share: None };
            while let Some(chunk) = body.next().await {
                let chunk = chunk.map_err(|error| {
                    ApiError::request(StatusCode::BAD_REQUEST, format!("body broke off: {error}"))
                })?;
                self.keep(&mut received, &chunk)?;
            }
            Ok(received)
        };
        let slow = || ApiError::request(StatusCode::REQUEST_TIMEOUT, "body took too long");
        let read = tokio::time::timeout(BODY_TIMEOUT, read).await.unwrap_or_else(|_| Err(slow()));
        if matches!(&read, Err(error) if error.status == StatusCode::PAYLOAD_TOO_LARGE)
            && !headers.contains_key(header::EXPECT)
        {
            let drain = async {
                let mut dropped = 0;
                while let Some(Ok(chunk)) = body.next().await {
                    dropped += chunk.len();
                    if dropped > DRAIN_BYTES {
                        break;
                    }
                }
            };
            // Out of time or not, the answer is the same.
            let _ = tokio::time::timeout(DRAIN_TIMEOUT, drain).await;
        }
        read
    }

    fn keep(&self, received: &mut Received, chunk: &Bytes) -> Result<(), ApiError> {
        if received.bytes.len() + chunk.len() > self.max_body {
            return Err(self.too_large());
        }
        let size = u32::try_from(chunk.len()).unwrap_or(u32::MAX);
        let share = Arc::clone(&self.bytes)
            .try_acquire_many_owned(size)
            .map_err(|_| ApiError::full("the gateway holds too many request bodies"))?;
        match &mut received._share {
            Some(held) => held.merge(share),
            none => *none = Some(share),
        }
        received.bytes.extend_from_slice(chunk);
        Ok(())
    }

    fn too_large(&self) -> ApiError {
        let message = format!("body is over the limit of {} bytes", self.max_body);
        ApiError::request(StatusCode::PAYLOAD_TOO_LARGE, message)
    }
}

/// JSON, or silent about it.
fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else { return Ok(()) };
    let kind = value.to_str().unwrap_or_default().split(';').next().unwrap_or_default();
    let kind = kind.trim().to_ascii_lowercase();
    if kind == "application/json" || kind.ends_with("+json") {
        return Ok(());
    }
    let message = "content type must be application/json";
    Err(ApiError::request(StatusCode::UNSUPPORTED_MEDIA_TYPE, message))
}

#[cfg(test)]
mod tests {
    use futures::stream;

    use super::*;

    fn body(chunks: Vec<&'static [u8]>) -> Body {
        Body::from_stream(stream::iter(chunks.into_iter().map(Ok::<_, std::io::Error>)))
    }

    #[tokio::test]
    async fn bodies_share_a_budget_and_give_it_back() {
        let admission = Admission::new(1, 4);
        let headers = HeaderMap::new();
        let mut held = Vec::new();
        for _ in 0..BODIES {
            let received = admission.body(&headers, body(vec![b"ab", b"cd"])).await.unwrap();
            assert_eq!(received.bytes, b"abcd");
            held.push(received);
        }
        let full = admission.body(&headers, body(vec![b"a"])).await.err().unwrap();
        assert_eq!(full.status, StatusCode::TOO_MANY_REQUESTS);
        held.pop();
        assert!(admission.body(&headers, body(vec![b"a"])).await.is_ok());
        let large = admission.body(&headers, body(vec![b"abc", b"de"])).await.err().unwrap();
        assert_eq!(large.status, StatusCode::PAYLOAD_TOO_LARGE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_does_not_come_is_given_up() {
        let admission = Admission::new(1, 4);
        let never = Body::from_stream(stream::pending::<Result<Bytes, std::io::Error>>());
        let slow = admission.body(&HeaderMap::new(), never).await.err().unwrap();
        assert_eq!(slow.status, StatusCode::REQUEST_TIMEOUT);
    }

    #[test]
    fn permits_come_back() {
        let admission = Admission::new(2, 4);
        let held = admission.enter(2).unwrap();
        assert_eq!(admission.enter(1).err().unwrap().status, StatusCode::TOO_MANY_REQUESTS);
        drop(held);
        assert!(admission.enter(1).is_ok());
        assert!(admission.enter(3).is_err());
    }
}
