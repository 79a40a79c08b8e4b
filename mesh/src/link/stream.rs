//! The data stream's client half: one HTTP/2 connection with one gRPC call,
//! `ExpertData.Dispatch`, spoken through `h2` itself. A frame is handed to the
//! connection as the buffer it was encoded into, and a reply's rows are read
//! where the connection put them; no queue and no task lies between.

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
use crate::shared::{self, Copies, Handover, Misplaced, Room, Segment};
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
}

/// The receiving half. The connection ends when it is dropped.
pub struct Reader {
    stream: RecvStream,
    messages: Messages,
    writer: Writer,
    copies: Copies,
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
                    Shortcut::Auto => Segment::create()
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
    segment: Option<Segment>,
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

    let request = Request::post(format!("http://{authority}{PATH}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())?;
    let (response, stream) = requests.ready().await?.send_request(request, false)?;
    let response = response.await?;
    if response.status() != http::StatusCode::OK {
        return Err(StreamError::Status(response.status()));
    }
    if response.headers().contains_key("grpc-status") {
        return Err(status(response.headers()));
    }
    let accepted = response.headers().contains_key(shared::ACCEPTED);
    let room = segment.filter(|_| accepted).map(|segment| Room::new(segment, UNANSWERED));
    let inner = Inner { stream: Mutex::new(stream), unanswered: AtomicUsize::new(0), sealed, room };
    let writer = Writer(Arc::new(inner));
    let messages = Messages::new(MAX_MESSAGE_BYTES);
    let stream = response.into_body();
    let reader =
        Reader { stream, messages, writer: writer.clone(), copies: Copies::default(), tasks };
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
            if let Some(message) = self.messages.take()? {
                let mut reply = DispatchReply::default();
                wire::read(message, &mut reply)?;
                if self.writer.0.sealed && reply.checksum.is_none() {
                    return Err(wire::WireError::Damaged.into());
                }
                match &self.writer.0.room {
                    Some(room) => room.settle(&mut reply, &mut self.copies)?,
                    None if reply.shared_bytes == 0 => {}
                    None => return Err(Misplaced { said: reply.shared_bytes, room: 0 }.into()),
                }
                let taken = |unanswered: usize| unanswered.checked_sub(1);
                let unanswered = &self.writer.0.unanswered;
                return match unanswered.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken) {
                    Ok(_) => Ok(reply),
                    Err(_) => Err(StreamError::Unasked),
                };
            }
            let data = tokio::select! {
                biased;
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
    let text = |name| {
        let value = headers.get(name).and_then(|value| value.to_str().ok());
        value.unwrap_or_default().to_owned()
    };
    match text("grpc-status") {
        code if code == "0" => StreamError::Ended,
        code => StreamError::Grpc { code, message: text("grpc-message") },
    }
}
