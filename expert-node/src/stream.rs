//! The `ExpertData` service, spoken without a codec: frames are read where
//! HTTP/2 put them, replies leave in the buffer they were written into.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::{Body as _, Frame};
use mesh::near::Shortcut;
use mesh::shared::{self, Handed, Rings, Segment, rings};
use proto::MAX_MESSAGE_BYTES;
use proto::v1::DispatchFrame;
use proto::wire::{self, Messages};
use tokio::sync::mpsc;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::{Code, Status};

use crate::ports::{Leaving, Port, Ports};
use crate::service::{Service, Stream};

/// Frames of one stream that may be in work; further ones are not read yet.
const FRAMES_IN_WORK: usize = 256;
const DISPATCH: &str = "/moemesh.v1.ExpertData/Dispatch";

/// Frames whose vectors wait to be used again.
#[derive(Clone, Default)]
pub struct Spare(Arc<parking_lot::Mutex<Vec<DispatchFrame>>>);

impl Spare {
    pub fn take(&self) -> DispatchFrame {
        self.0.lock().pop().unwrap_or_default()
    }

    /// Drops the frame's rows, keeps its vectors.
    pub fn put(&self, mut frame: DispatchFrame) {
        frame.rows = Bytes::new();
        let mut spare = self.0.lock();
        if spare.len() < FRAMES_IN_WORK {
            spare.push(frame);
        }
    }
}

/// The gRPC service on a node's server.
#[derive(Clone)]
pub struct ExpertData {
    pub service: Service,
    pub ports: Ports,
    pub shared_rows: Shortcut,
}

impl ExpertData {
    /// The memory that came with the stream's connection.
    fn segment(&self, request: &Request<Body>) -> Option<Arc<Segment>> {
        if self.shared_rows == Shortcut::Off {
            return None;
        }
        let handed = request.extensions().get::<Handed>()?.take()?;
        match Segment::adopt(handed) {
            Ok(segment) => Some(Arc::new(segment)),
            Err(error) => {
                tracing::debug!(%error, "shared memory is not used");
                None
            }
        }
    }
}

impl NamedService for ExpertData {
    const NAME: &'static str = "moemesh.v1.ExpertData";
}

impl tower::Service<Request<Body>> for ExpertData {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if request.uri().path() != DISPATCH {
            return ready(Ok(Status::unimplemented("no such method").into_http()));
        }
        let (replies, leaving) = mpsc::channel(FRAMES_IN_WORK);
        let segment = self.segment(&request);
        let meant = request.headers().get(rings::OFFERED) == Some(&Rings::offer());
        let rings = segment.as_ref().filter(|_| meant).and_then(Rings::server);
        let mut response = Response::new(Body::new(Replies { leaving, ended: false }));
        let headers = response.headers_mut();
        let grpc = HeaderValue::from_static("application/grpc");
        headers.insert(http::header::CONTENT_TYPE, grpc);
        if let Some(segment) = &segment {
            headers.insert(shared::ACCEPTED, segment.size().into());
        }
        if rings.is_some() {
            headers.insert(rings::OFFERED, Rings::offer());
        }
        let (service, ports) = (self.service.clone(), self.ports.clone());
        tokio::spawn(read(service, ports, request.into_body(), replies, (segment, rings)));
        ready(Ok(response))
    }
}

/// Takes one stream's frames until it ends, breaks or the node is told to stop.
async fn read(
    service: Service,
    ports: Ports,
    mut body: Body,
    replies: mpsc::Sender<Leaving>,
    (segment, rings): (Option<Arc<Segment>>, Option<Rings>),
) {
    let mut messages = Messages::new(MAX_MESSAGE_BYTES);
    let open = ports.open(service.clone(), Stream::new(segment), rings, replies);
    let port = &*open.port;
    let broken = loop {
        // The permit comes first: what is read can always be answered.
        let Some(permit) = port.room().await else { return };
        let message = tokio::select! {
            biased;
            message = next(&mut messages, &mut body, port) => message,
            () = service.stopped() => return,
        };
        match message {
            Ok(Some(message)) => {
                if let Err(status) = port.take(message, permit) {
                    break status;
                }
            }
            Ok(None) => return,
            Err(status) => break status,
        }
    };
    tracing::debug!(status = %broken, "dispatch stream broke");
    open.end(broken).await;
}

/// The next frame by the socket, or one in the ring that the executor has left to this task.
async fn next(
    messages: &mut Messages,
    body: &mut Body,
    port: &Port,
) -> Result<Option<Bytes>, Status> {
    loop {
        if let Some(near) = &port.near
            && let Some(message) = near.take()?
        {
            return Ok(Some(message));
        }
        if let Some(message) = messages.take().map_err(invalid)? {
            if message.is_empty() && port.near.is_some() {
                continue;
            }
            return Ok(Some(message));
        }
        let data = tokio::select! {
            biased;
            fault = port.told() => match fault {
                Some(status) => return Err(status),
                None => continue,
            },
            data = std::future::poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)) => data,
        };
        match data {
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    messages.push(data);
                }
            }
            Some(Err(status)) => return Err(status),
            None => {
                messages.finish().map_err(invalid)?;
                return Ok(None);
            }
        }
    }
}

pub(crate) fn invalid(error: wire::WireError) -> Status {
    let code = match error {
        wire::WireError::Compressed => Code::Unimplemented,
        // Not even its ticket can be believed: the stream ends, and what was open on it
        // is asked of another node.
        wire::WireError::Damaged => Code::DataLoss,
        _ => Code::InvalidArgument,
    };
    Status::new(code, error.to_string())
}

/// A stream's replies as a body; the status follows the last of them.
struct Replies {
    leaving: mpsc::Receiver<Leaving>,
    ended: bool,
}

impl http_body::Body for Replies {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        self.leaving.poll_recv(cx).map(|reply| {
            let status = match reply {
                Some(Ok(reply)) => return Some(Ok(Frame::data(reply))),
                Some(Err(status)) => status,
                None => Status::new(Code::Ok, ""),
            };
            self.ended = true;
            let mut trailers = HeaderMap::new();
            Some(status.add_header(&mut trailers).map(|()| Frame::trailers(trailers)))
        })
    }
}
