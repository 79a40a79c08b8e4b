//! The data stream's client half: one HTTP/2 connection with one gRPC call,
//! `ExpertData.Dispatch`, spoken through `h2` itself. A frame is handed to the
//! connection as the buffer it was encoded into, and a reply's rows are read
//! where the connection put them; no queue and no task lies between. Where the
//! node shares memory, messages pass it by (`shared::rings`).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{Builder, Connection, SendRequest};
use h2::{Ping, PingPong, RecvStream, SendStream};
use http::{HeaderMap, Request};
use parking_lot::Mutex;
use proto::MAX_MESSAGE_BYTES;
use proto::v1::DispatchReply;
use proto::wire::{self, Messages};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinSet;

use crate::near::Shortcut;
use crate::shared::rings::{self, KNOCK, Passage, Put};
use crate::shared::{self, Copies, Handover, Misplaced, Nonsense, Rings, Room, Segment};
use crate::tls::{self, Expected, Socket, Tls};
use crate::transport::{
    CONNECT_TIMEOUT, CONNECTION_WINDOW, Endpoint, KEEP_ALIVE_EVERY, KEEP_ALIVE_TIMEOUT, MAX_DATA,
    MAX_HEADER_BYTES, STREAM_WINDOW, unix_name, widen,
};

/// Frames that may be unanswered on one stream; a node that answers none gets no more.
const UNANSWERED: usize = 256;
const PATH: &str = "/moemesh.v1.ExpertData/Dispatch";

/// Why the stream cannot be had, or ended.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error("{}", in_words(.0))]
    Connect(#[from] std::io::Error),
    #[error("no connection within {CONNECT_TIMEOUT:?}")]
    Slow,
    #[error("{}", in_words(.0))]
    Http(#[from] h2::Error),
    #[error("{0}")]
    Request(#[from] http::Error),
    #[error("it answers with HTTP status {0}")]
    Status(http::StatusCode),
    #[error("gRPC status {code}: {message}")]
    Grpc { code: String, message: String },
    #[error("{0}")]
    Wire(#[from] wire::WireError),
    #[error("{0}")]
    Misplaced(#[from] Misplaced),
    #[error("{0}")]
    Nonsense(#[from] Nonsense),
    #[error("it sent a reply that no frame asked for")]
    Unasked,
    #[error("no answer to a ping within {0:?}")]
    Silent(Duration),
    #[error("the stream ended")]
    Ended,
}

impl StreamError {
    /// Somebody found a message that is not what was sent.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Wire(wire::WireError::Damaged) => true,
            // DATA_LOSS
            Self::Grpc { code, .. } => code == "15",
            _ => false,
        }
    }
}

fn in_words(error: &(dyn std::error::Error + 'static)) -> String {
    tls::explain(error).unwrap_or_else(|| error.to_string())
}

/// The sending half; clones write to the same stream.
#[derive(Clone)]
pub struct Writer(Arc<Inner>);

struct Inner {
    stream: Mutex<SendStream<Bytes>>,
    unanswered: AtomicUsize,
    sealed: bool,
    /// Memory that the node has, too.
    room: Option<Room>,
    passage: Option<Passage<StreamError>>,
    /// What replies' rows are copied into out of that memory.
    copies: Mutex<Copies>,
}

impl Writer {
    /// Whether messages have to be sealed, as nothing else would show a flipped bit.
    pub fn is_sealed(&self) -> bool {
        self.0.sealed
    }

    /// Where large frames' rows are put, if the node looks there.
    pub fn room(&self) -> Option<&Room> {
        self.0.room.as_ref()
    }

    /// Whether replies may come without the socket; see [`Self::look`].
    pub fn has_rings(&self) -> bool {
        self.0.passage.is_some()
    }

    /// Puts a message where a node that is awake sees it at once.
    pub fn put(&self, message: &[u8]) -> Put {
        let Inner { passage: Some(passage), unanswered, .. } = &*self.0 else { return Put::Not };
        if unanswered.fetch_add(1, Ordering::Relaxed) < UNANSWERED {
            match passage.put(message) {
                Put::Not => {}
                put => return put,
            }
        }
        unanswered.fetch_sub(1, Ordering::Relaxed);
        Put::Not
    }

    /// Hands a message over; false when the stream is broken or has too many
    /// unanswered. It leaves when the connection's runtime next gets its turn.
    pub fn send(&self, message: Bytes) -> bool {
        let Inner { stream, unanswered, .. } = &*self.0;
        if unanswered.fetch_add(1, Ordering::Relaxed) >= UNANSWERED
            || stream.lock().send_data(message, false).is_err()
        {
            unanswered.fetch_sub(1, Ordering::Relaxed);
            return false;
        }
        true
    }

    /// Has the node look for what was put; as [`Self::send`]. A stream that is broken is found so anyway.
    pub fn knock(&self) {
        let _ = self.0.stream.lock().send_data(KNOCK, false);
    }

    /// A reply that came past the socket, for who looks again and again. What is wrong there ends the stream.
    pub fn look(&self) -> Option<DispatchReply> {
        let passage = self.0.passage.as_ref()?;
        if !passage.look() {
            return None;
        }
        self.0.take().unwrap_or_else(|error| {
            passage.fail(error);
            None
        })
    }

    /// From now on replies wake; false if one has come before.
    pub fn sleep(&self) -> bool {
        self.0.passage.as_ref().is_none_or(Passage::sleep)
    }
}

impl Inner {
    /// A reply that came past the socket.
    fn take(&self) -> Result<Option<DispatchReply>, StreamError> {
        let Some(passage) = &self.passage else { return Ok(None) };
        passage.take()?.map(|message| self.read(message)).transpose()
    }

    fn read(&self, message: Bytes) -> Result<DispatchReply, StreamError> {
        let mut reply = DispatchReply::default();
        wire::read(message, &mut reply)?;
        if self.sealed && reply.checksum.is_none() {
            return Err(wire::WireError::Damaged.into());
        }
        match &self.room {
            Some(room) => room.settle(&mut reply, &mut self.copies.lock())?,
            None if reply.shared_bytes == 0 => {}
            None => return Err(Misplaced { said: reply.shared_bytes, room: 0 }.into()),
        }
        let taken = |unanswered: usize| unanswered.checked_sub(1);
        match self.unanswered.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken) {
            Ok(_) => Ok(reply),
            Err(_) => Err(StreamError::Unasked),
        }
    }
}

/// The receiving half. The connection ends when it is dropped.
pub struct Reader {
    stream: RecvStream,
    messages: Messages,
    writer: Writer,
    /// Why there will be no more, once what came before has been read.
    ended: Option<StreamError>,
    /// Drives the connection and its pings.
    tasks: JoinSet<StreamError>,
}

/// Connects and opens the stream, on the runtime that calls it; with TLS to
/// nobody but whom it expects.
///
/// # Errors
/// Nobody there, or somebody else.
pub async fn open(
    endpoint: &Endpoint,
    tls: Option<(&Tls, &Expected)>,
    shared_rows: Shortcut,
) -> Result<(Writer, Reader), StreamError> {
    let connecting = async {
        if let Some((tls, expected)) = tls {
            let socket = Socket::connect(endpoint).await?;
            let (stream, _) = tls.connect(socket, expected).await?;
            return handshake(stream, "mesh", false, None).await;
        }
        match endpoint {
            Endpoint::Tcp(address) => {
                let socket = TcpStream::connect(address).await?;
                socket.set_nodelay(true)?;
                handshake(socket, address, true, None).await
            }
            Endpoint::Unix(path) => {
                let socket = UnixStream::connect(unix_name(path)).await?;
                widen(&socket);
                let (segment, handed) = match shared_rows {
                    Shortcut::Auto => shared::offer()
                        .inspect_err(|error| tracing::debug!(%error, "no memory to share"))
                        .ok()
                        .unzip(),
                    Shortcut::Off => (None, None),
                };
                handshake(Handover::bringing(socket, handed), "localhost", false, segment).await
            }
        }
    };
    tokio::time::timeout(CONNECT_TIMEOUT, connecting).await.map_err(|_| StreamError::Slow)?
}

async fn handshake<S>(
    socket: S,
    authority: &str,
    sealed: bool,
    segment: Option<Arc<Segment>>,
) -> Result<(Writer, Reader), StreamError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (requests, mut connection): (SendRequest<Bytes>, Connection<S, Bytes>) = Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_DATA)
        .max_header_list_size(MAX_HEADER_BYTES)
        .enable_push(false)
        .handshake(socket)
        .await?;
    let mut tasks = JoinSet::new();
    if let Some(pings) = connection.ping_pong() {
        tasks.spawn(keep_alive(pings));
    }
    tasks.spawn(async move {
        match connection.await {
            Ok(()) => StreamError::Ended,
            Err(error) => error.into(),
        }
    });

    let mut request = Request::post(format!("http://{authority}{PATH}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    if segment.is_some() {
        request = request.header(rings::OFFERED, Rings::offer());
    }
    let request = request.body(())?;
    let (response, stream) = requests.ready().await?.send_request(request, false)?;
    let response = response.await?;
    if response.status() != http::StatusCode::OK {
        return Err(StreamError::Status(response.status()));
    }
    if response.headers().contains_key("grpc-status") {
        return Err(status(response.headers()));
    }
    let answered = |header| response.headers().contains_key(header);
    let segment = segment.filter(|_| answered(shared::ACCEPTED));
    let inner = Inner {
        stream: Mutex::new(stream),
        unanswered: AtomicUsize::new(0),
        sealed,
        passage: segment
            .as_ref()
            .filter(|_| answered(rings::OFFERED))
            .map(|segment| Passage::new(Rings::client(segment))),
        room: segment.map(|segment| Room::new(segment, UNANSWERED)),
        copies: Mutex::default(),
    };
    let writer = Writer(Arc::new(inner));
    let messages = Messages::new(MAX_MESSAGE_BYTES);
    let stream = response.into_body();
    let reader = Reader { stream, messages, writer: writer.clone(), ended: None, tasks };
    Ok((writer, reader))
}

/// Resolves when the peer has stopped answering.
async fn keep_alive(mut pings: PingPong) -> StreamError {
    loop {
        tokio::time::sleep(KEEP_ALIVE_EVERY).await;
        match tokio::time::timeout(KEEP_ALIVE_TIMEOUT, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return error.into(),
            Err(_) => return StreamError::Silent(KEEP_ALIVE_TIMEOUT),
        }
    }
}

impl Reader {
    /// The next reply.
    ///
    /// # Errors
    /// Why there will be none.
    pub async fn next(&mut self) -> Result<DispatchReply, StreamError> {
        loop {
            if let Some(reply) = self.writer.0.take()? {
                return Ok(reply);
            }
            if let Some(ended) = self.ended.take() {
                return Err(ended);
            }
            match self.wait().await {
                Ok(Some(reply)) => return Ok(reply),
                Ok(None) => {}
                // Replies that were put into the ring before the stream ended come before its end.
                Err(error) => self.ended = Some(error),
            }
        }
    }

    /// The next reply by the socket; nothing if the ring is to be looked into.
    async fn wait(&mut self) -> Result<Option<DispatchReply>, StreamError> {
        let passage = self.writer.0.passage.as_ref();
        loop {
            if let Some(message) = self.messages.take()? {
                if message.is_empty() && passage.is_some() {
                    return Ok(None);
                }
                return self.writer.0.read(message).map(Some);
            }
            let data = tokio::select! {
                biased;
                why = Passage::told(passage) => return why.map_or(Ok(None), Err),
                data = self.stream.data() => data,
                Some(ended) = self.tasks.join_next() => {
                    return Err(ended.unwrap_or(StreamError::Ended));
                }
            };
            match data {
                Some(data) => {
                    let data = data?;
                    // Room for the next ones, as replies are taken at once.
                    self.stream.flow_control().release_capacity(data.len())?;
                    self.messages.push(data);
                }
                None => {
                    self.messages.finish()?;
                    let trailers = self.stream.trailers().await?;
                    return Err(trailers.map_or(StreamError::Ended, |trailers| status(&trailers)));
                }
            }
        }
    }
}

fn status(headers: &HeaderMap) -> StreamError {
    match tonic::Status::from_header_map(headers) {
        Some(status) if status.code() != tonic::Code::Ok => {
            let code = (status.code() as i32).to_string();
            StreamError::Grpc { code, message: status.message().to_owned() }
        }
        _ => StreamError::Ended,
    }
}
