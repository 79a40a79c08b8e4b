//! Server-sent events. A task turns deltas into events and puts them in a short
//! queue; when the client stops reading the queue fills, the routers are no
//! longer read, and after a while the sequences are cancelled, as they are when
//! the client goes away.
//!
//! The status line waits for the first delta, so that what fails before it is
//! an ordinary error. What fails later is an event, without `[DONE]` after it.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::StreamExt as _;
use http::{HeaderValue, header};
use mesh::failpoint;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tracing::Instrument as _;

use super::error::ApiError;
use super::observe::Open;
use crate::job::choice::Delta;
use crate::job::{Job, Usage};
use crate::metrics::Metrics;

/// Events that may wait for the client.
const QUEUE: usize = 64;
/// A client that reads nothing for so long has gone.
const STALL: Duration = Duration::from_secs(30);

/// Events not yet sent, as they go on the wire.
#[derive(Default)]
pub struct Events(Vec<u8>);

impl Events {
    pub fn push(&mut self, event: &impl Serialize) {
        self.0.extend_from_slice(b"data: ");
        // Our own shapes have string keys only, so they always serialise; JSON
        // has no raw line ends, so one line holds it.
        if let Err(error) = serde_json::to_writer(&mut self.0, event) {
            tracing::error!(%error, "event was not serialised");
        }
        self.0.extend_from_slice(b"\n\n");
    }

    fn push_text(&mut self, text: &str) {
        self.0.extend_from_slice(b"data: ");
        self.0.extend_from_slice(text.as_bytes());
        self.0.extend_from_slice(b"\n\n");
    }

    fn take(&mut self) -> Option<Bytes> {
        (!self.0.is_empty()).then(|| Bytes::from(std::mem::take(&mut self.0)))
    }
}

/// How an endpoint writes deltas.
pub trait Shape: Send + 'static {
    fn delta(&mut self, delta: Delta, events: &mut Events);
    /// After the last delta; writes nothing unless usage was asked for.
    fn end(&mut self, usage: Usage, events: &mut Events);
}

enum Ending {
    Done,
    Broken(ApiError),
    ClientGone,
}

/// Streams `job` in `shape`, once its first delta is there. `open` is kept
/// until the stream ends.
///
/// # Errors
/// What failed before the first delta.
pub async fn respond(
    mut job: Job,
    mut shape: impl Shape,
    metrics: Metrics,
    open: Open,
) -> Result<Response, ApiError> {
    let first = job.next().await?;
    let (sender, receiver) = mpsc::channel(QUEUE);
    let task = async move {
        failpoint::pass("stream");
        let ending = pump(&mut job, &mut shape, first, &sender).await;
        match ending {
            Ending::Done => {}
            Ending::Broken(error) => {
                metrics.broken_streams.inc();
                tracing::warn!(error = error.message(), "stream broken");
            }
            Ending::ClientGone => {
                metrics.cancelled.inc();
                tracing::info!("client went away");
            }
        }
        open.finished(job.usage());
    };
    tokio::spawn(task.in_current_span());
    let body = Body::from_stream(ReceiverStream::new(receiver).map(Ok::<Bytes, Infallible>));
    let mut response = body.into_response();
    let headers = response.headers_mut();
    headers
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Asks proxies in between not to collect the stream.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

async fn pump(
    job: &mut Job,
    shape: &mut impl Shape,
    first: Option<Delta>,
    sender: &mpsc::Sender<Bytes>,
) -> Ending {
    let mut events = Events::default();
    let mut next = first;
    while let Some(delta) = next {
        shape.delta(delta, &mut events);
        if !send(sender, &mut events).await {
            return Ending::ClientGone;
        }
        let advanced = tokio::select! {
            biased;
            () = sender.closed() => return Ending::ClientGone,
            advanced = job.next() => advanced,
        };
        next = match advanced {
            Ok(next) => next,
            Err(error) => {
                events.push_text(&error.json());
                send(sender, &mut events).await;
                return Ending::Broken(error);
            }
        };
    }
    shape.end(job.usage(), &mut events);
    events.push_text("[DONE]");
    if send(sender, &mut events).await { Ending::Done } else { Ending::ClientGone }
}

/// False when the client has gone or reads no more.
async fn send(sender: &mpsc::Sender<Bytes>, events: &mut Events) -> bool {
    let Some(bytes) = events.take() else { return true };
    matches!(tokio::time::timeout(STALL, sender.send(bytes)).await, Ok(Ok(())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event() -> Events {
        let mut events = Events::default();
        events.push(&[1]);
        events
    }

    #[test]
    fn events_are_lines_of_data() {
        let mut events = event();
        events.push_text("[DONE]");
        assert_eq!(events.take().unwrap(), "data: [1]\n\ndata: [DONE]\n\n");
        assert_eq!(events.take(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_reads_nothing_is_given_up() {
        let (sender, mut receiver) = mpsc::channel(1);
        assert!(send(&sender, &mut event()).await);
        let before = tokio::time::Instant::now();
        assert!(!send(&sender, &mut event()).await);
        assert_eq!(before.elapsed(), STALL);
        receiver.recv().await.unwrap();
        assert!(send(&sender, &mut event()).await);
        drop(receiver);
        assert!(!send(&sender, &mut event()).await);
    }
}
