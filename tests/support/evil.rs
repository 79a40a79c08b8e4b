//! A hostile expert node over real sockets: it says that it is the node behind
//! it, has that compute the frames, and does to the replies what it was told.

use std::convert::Infallible;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use bytes::{BufMut as _, Bytes, BytesMut};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use mesh::lifecycle::Shutdown;
use mesh::shared::rings::{self, Put};
use mesh::shared::{Handed, Rings, Segment};
use mesh::transport::{self, Endpoint};
use proto::MAX_MESSAGE_BYTES;
use proto::v1::expert_control_client::ExpertControlClient;
use proto::v1::expert_control_server::{ExpertControl, ExpertControlServer};
use proto::v1::expert_data_client::ExpertDataClient;
use proto::v1::{
    DescribeRequest, DispatchError, DispatchFrame, DispatchReply, DrainReply, DrainRequest,
    DropReply, DropRequest, ErrorCode, FetchPart, FetchRequest, LoadReply, LoadRequest,
    NodeDescription, NodeStatus, NodeStatusRequest, SetDrainedReply, SetDrainedRequest,
    WatchRequest,
};
use proto::wire::{self, Messages};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::NamedService;
use tonic::service::Routes;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

/// What it does.
#[derive(Clone, Copy, Debug)]
pub enum Evil {
    /// A row too few.
    Short,
    /// Replies under tickets that nobody gave out.
    WrongTicket,
    /// Says that its expert is of another version.
    OtherVersion,
    NotFinite,
    /// Never answers.
    Silent,
    /// Every reply comes two times.
    Twice,
    /// Bytes that are no message.
    Garbage,
    /// A message of four gigabytes, it says.
    Huge,
    /// Ends the stream with each frame.
    Reset,
    /// Calls every frame invalid.
    Invalid,
    /// Says that results stand in shared memory where nobody asked for them.
    Misplaced,
    /// Spoils the ring that its replies are looked for in.
    Spoilt,
    /// Not evil: puts three replies into the ring, tells nobody, and ends the stream.
    Brief,
}

impl Evil {
    pub const ALL: [Self; 12] = [
        Self::Short,
        Self::WrongTicket,
        Self::OtherVersion,
        Self::NotFinite,
        Self::Silent,
        Self::Twice,
        Self::Garbage,
        Self::Huge,
        Self::Reset,
        Self::Invalid,
        Self::Misplaced,
        Self::Spoilt,
    ];
}

/// A running hostile node; ends when dropped.
pub struct EvilNode {
    /// Frames that it did evil to.
    pub frames: Arc<AtomicU64>,
    shutdown: Shutdown,
}

impl Drop for EvilNode {
    fn drop(&mut self) {
        self.shutdown.trigger();
    }
}

impl EvilNode {
    /// Listens at `path` in the name of the node at `behind`.
    pub async fn start(path: &Path, behind: Channel, evil: Evil) -> Self {
        let listener = transport::bind(&Endpoint::Unix(path.to_owned())).await.unwrap();
        let node = Node { behind, evil, frames: Arc::default(), handed: None, rings: None };
        let routes = Routes::new(node.clone()).add_service(ExpertControlServer::new(node.clone()));
        let shutdown = Shutdown::new();
        let stop = shutdown.clone();
        tokio::spawn(transport::serve_grpc(
            listener,
            routes,
            None,
            async move { stop.wait().await },
        ));
        Self { frames: node.frames, shutdown }
    }
}

#[derive(Clone)]
struct Node {
    behind: Channel,
    evil: Evil,
    frames: Arc<AtomicU64>,
    /// Memory that came with its stream.
    handed: Option<Arc<Segment>>,
    rings: Option<Arc<Rings>>,
}

impl NamedService for Node {
    const NAME: &'static str = "moemesh.v1.ExpertData";
}

impl Service<http::Request<Body>> for Node {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let (replies, leaving) = mpsc::channel(64);
        let rings = matches!(self.evil, Evil::Spoilt | Evil::Brief);
        let handed = request.extensions().get::<Handed>().filter(|_| rings);
        let handed = handed.map(|handed| Segment::adopt(handed.take().unwrap()).unwrap());
        let mut node = self.clone();
        node.handed = handed.map(Arc::new);
        node.rings = node.handed.as_ref().and_then(Rings::server).map(Arc::new);
        tokio::spawn(node.stream(request.into_body(), replies));
        let body =
            StreamBody::new(ReceiverStream::new(leaving).map(|bytes| Ok(Frame::data(bytes))));
        let body: StreamBody<_> = body;
        let mut response = http::Response::builder().header("content-type", "application/grpc");
        if rings {
            response = response.header(rings::OFFERED, Rings::offer());
        }
        if rings || matches!(self.evil, Evil::Misplaced) {
            response = response.header(mesh::shared::ACCEPTED, "1");
        }
        let response =
            response.body(Body::new(body.map_err(|error: Infallible| match error {}))).unwrap();
        Box::pin(async move { Ok(response) })
    }
}

impl Node {
    async fn stream(self, mut body: Body, replies: mpsc::Sender<Bytes>) {
        let (to_node, frames) = mpsc::channel(64);
        let mut answers = ExpertDataClient::new(self.behind.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .dispatch(ReceiverStream::new(frames))
            .await
            .unwrap()
            .into_inner();
        let mut messages = Messages::new(MAX_MESSAGE_BYTES);
        loop {
            tokio::select! {
                data = body.frame() => {
                    let Some(Ok(data)) = data else { return };
                    let Ok(data) = data.into_data() else { return };
                    messages.push(data);
                    while let Some(message) = messages.take().unwrap() {
                        let mut frame = DispatchFrame::default();
                        wire::read(message, &mut frame).unwrap();
                        self.frames.fetch_add(1, Ordering::Relaxed);
                        if !self.receive(frame, &to_node, &replies).await {
                            return;
                        }
                    }
                }
                answer = answers.message() => {
                    let Ok(Some(reply)) = answer else { return };
                    for reply in self.spoil(reply) {
                        if replies.send(encode(reply)).await.is_err() {
                            return;
                        }
                    }
                }
            }
        }
    }

    /// False ends the stream.
    async fn receive(
        &self,
        frame: DispatchFrame,
        to_node: &mpsc::Sender<DispatchFrame>,
        replies: &mpsc::Sender<Bytes>,
    ) -> bool {
        let refuse = |code: ErrorCode| {
            let error = DispatchError { code: code as i32, message: "says the evil node".into() };
            encode(DispatchReply { ticket: frame.ticket, error: Some(error), ..Default::default() })
        };
        let answer = match self.evil {
            Evil::Silent => return true,
            Evil::Reset => return false,
            Evil::OtherVersion => refuse(ErrorCode::VersionMismatch),
            Evil::Invalid => refuse(ErrorCode::Invalid),
            Evil::Misplaced => encode(DispatchReply {
                ticket: frame.ticket,
                shared_bytes: 1 << 40,
                ..Default::default()
            }),
            Evil::Brief => {
                let reply = encode(DispatchReply { ticket: frame.ticket, ..Default::default() });
                let put = self.rings.as_ref().unwrap().put(&reply[wire::PREFIX..]);
                assert_eq!(put, Ok(Put::There));
                return frame.ticket < 3;
            }
            Evil::Spoilt => {
                // The ring of who answers is the second; it begins with the count of what was written.
                let ring = self.handed.as_ref().unwrap().counter(rings::BOTH / 2);
                ring.store(u64::MAX, Ordering::Relaxed);
                return true;
            }
            Evil::Garbage => Bytes::from_static(&[0, 0, 0, 0, 6, 255, 255, 255, 255, 255, 255]),
            Evil::Huge => Bytes::from_static(&[0, 255, 255, 255, 255, 1, 2, 3]),
            Evil::Short | Evil::WrongTicket | Evil::NotFinite | Evil::Twice => {
                return to_node.send(frame).await.is_ok();
            }
        };
        replies.send(answer).await.is_ok()
    }

    fn spoil(&self, mut reply: DispatchReply) -> Vec<DispatchReply> {
        match self.evil {
            Evil::Short => reply.rows = reply.rows.slice(..reply.rows.len() / 2),
            Evil::WrongTicket => reply.ticket += 1_000_000,
            Evil::NotFinite => reply.rows = vec![0xff; reply.rows.len()].into(),
            Evil::Twice => return vec![reply.clone(), reply],
            _ => {}
        }
        vec![reply]
    }
}

fn encode(mut reply: DispatchReply) -> Bytes {
    let rows = std::mem::take(&mut reply.rows);
    let mut buffer = BytesMut::new();
    wire::put(&mut buffer, &reply, rows.len(), |buffer| buffer.put_slice(&rows));
    buffer.freeze()
}

#[tonic::async_trait]
impl ExpertControl for Node {
    async fn describe(
        &self,
        request: Request<DescribeRequest>,
    ) -> Result<Response<NodeDescription>, Status> {
        ExpertControlClient::new(self.behind.clone()).describe(request).await
    }

    async fn status(&self, _: Request<NodeStatusRequest>) -> Result<Response<NodeStatus>, Status> {
        Err(Status::unimplemented("evil"))
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainReply>, Status> {
        Err(Status::unimplemented("evil"))
    }

    type WatchStream = tokio_stream::Empty<Result<NodeDescription, Status>>;

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented("evil"))
    }

    async fn load(&self, _: Request<LoadRequest>) -> Result<Response<LoadReply>, Status> {
        Err(Status::unimplemented("evil"))
    }

    async fn drop(&self, _: Request<DropRequest>) -> Result<Response<DropReply>, Status> {
        Err(Status::unimplemented("evil"))
    }

    async fn set_drained(
        &self,
        _: Request<SetDrainedRequest>,
    ) -> Result<Response<SetDrainedReply>, Status> {
        Err(Status::unimplemented("evil"))
    }

    type FetchStream = tokio_stream::Empty<Result<FetchPart, Status>>;

    async fn fetch(&self, _: Request<FetchRequest>) -> Result<Response<Self::FetchStream>, Status> {
        Err(Status::unimplemented("evil"))
    }
}
