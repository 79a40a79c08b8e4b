//! The server's half of a connection's first moments. A handshake has a time
//! limit, and there is a bound on those that are under way: whoever opens
//! sockets and says nothing pushes out his own, not those of processes that
//! shake hands in milliseconds. Who is refused hears why before the end.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use super::explain::{NOT_ENCRYPTED, explain};
use super::metrics::Refusal;
use super::principal::Principal;
use super::socket::Socket;
use super::{Tls, peer_principal};
use crate::transport::Listener;

const HANDSHAKE: Duration = Duration::from_secs(5);
/// Handshakes under way; one more ends the oldest.
const MOST_UNDER_WAY: usize = 256;
/// Connections that have shaken hands and wait for the server to take them.
const MOST_WAITING: usize = 64;
/// From a connection's first byte to its first call, with room to spare.
const CALL_UNDER_WAY: Duration = Duration::from_millis(100);
/// How long, and for how many bytes, a refused client is heard out, so that it
/// reads the reason before the connection is reset.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 64 << 10;
/// Pause when the system has no descriptor left.
const PAUSE: Duration = Duration::from_millis(50);
/// The first byte of a TLS handshake, and of HTTP/2 in plain text.
const TLS_RECORD: u8 = 0x16;
const HTTP2_PREFACE: u8 = b'P';

/// Who is at the other end of a request's connection.
#[derive(Clone, Debug)]
pub struct Caller(pub Arc<Principal>);

/// A connection whose both ends have proved who they are.
pub struct Secured {
    stream: TlsStream<Socket>,
    caller: Caller,
}

impl Connected for Secured {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

/// The listener's connections that have shaken hands.
pub(crate) fn incoming(listener: Listener, tls: Tls) -> ReceiverStream<io::Result<Secured>> {
    let (ready, taken) = mpsc::channel(MOST_WAITING);
    tokio::spawn(accept(listener, tls, ready));
    ReceiverStream::new(taken)
}

/// Runs until nobody takes connections any more.
async fn accept(listener: Listener, tls: Tls, ready: mpsc::Sender<io::Result<Secured>>) {
    let mut tasks = JoinSet::new();
    let mut under_way: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        tokio::select! {
            () = ready.closed() => return,
            accepted = Socket::accept(&listener) => match accepted {
                Ok(socket) => {
                    under_way.retain(|task| !task.is_finished());
                    while under_way.len() >= MOST_UNDER_WAY {
                        if let Some(oldest) = under_way.pop_front() {
                            oldest.abort();
                            tls.metrics().refused(Refusal::PushedOut);
                        }
                    }
                    under_way.push_back(tasks.spawn(shake_hands(socket, tls.clone(), ready.clone())));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(PAUSE).await;
                }
            },
            Some(_) = tasks.join_next() => {}
        }
    }
}

async fn shake_hands(socket: Socket, tls: Tls, ready: mpsc::Sender<io::Result<Secured>>) {
    let peer = socket.peer();
    let (reason, why) = match tokio::time::timeout(HANDSHAKE, secure(socket, &tls)).await {
        Ok(Ok(secured)) => {
            // Nobody takes it when the server is ending.
            let _ = ready.send(Ok(secured)).await;
            return;
        }
        Ok(Err(Failed::Silent)) => return,
        Ok(Err(Failed::Refused { reason, why, socket })) => {
            tls.metrics().refused(reason);
            tls.complain(&peer, &why);
            return hear_out(socket).await;
        }
        Err(_) => (Refusal::Slow, format!("no handshake within {HANDSHAKE:?}")),
    };
    tls.metrics().refused(reason);
    tls.complain(&peer, &why);
}

enum Failed {
    /// It came and went without a word, as those do who only try a port.
    Silent,
    Refused {
        reason: Refusal,
        why: String,
        socket: Socket,
    },
}

async fn secure(mut socket: Socket, tls: &Tls) -> Result<Secured, Failed> {
    match socket.first_byte().await {
        Ok(Some(TLS_RECORD)) => {}
        Ok(None) | Err(_) => return Err(Failed::Silent),
        Ok(Some(first)) => {
            if first == HTTP2_PREFACE {
                // Its client library passes the reason on to a call that is under way, and
                // otherwise says no more than that the call was cancelled.
                tokio::time::sleep(CALL_UNDER_WAY).await;
                // It may be gone; then there is nobody to tell.
                let _ = socket.write_all(&go_away()).await;
            }
            let why = "it does not speak TLS: set tls_cert, tls_key and tls_ca there".to_owned();
            return Err(Failed::Refused { reason: Refusal::Plain, why, socket });
        }
    }
    let acceptor = TlsAcceptor::from(tls.server());
    match acceptor.accept(socket).into_fallible().await {
        Ok(stream) => match peer_principal(stream.get_ref().1) {
            Some(principal) => Ok(Secured { stream, caller: Caller(Arc::new(principal)) }),
            // The verifier has read the same certificate.
            None => Err(Failed::Silent),
        },
        Err((error, socket)) => {
            let why = explain(&error).unwrap_or_else(|| error.to_string());
            Err(Failed::Refused { reason: Refusal::of(&error), why, socket })
        }
    }
}

/// An end of HTTP/2 in plain text with the reason in it: SETTINGS, then GOAWAY.
fn go_away() -> Vec<u8> {
    const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    const INADEQUATE_SECURITY: u32 = 0xc;
    let length = (8 + NOT_ENCRYPTED.len()) as u32;
    let mut bytes = SETTINGS.to_vec();
    bytes.extend(&length.to_be_bytes()[1..]);
    bytes.extend([7, 0, 0, 0, 0, 0]);
    bytes.extend([0; 4]);
    bytes.extend(INADEQUATE_SECURITY.to_be_bytes());
    bytes.extend(NOT_ENCRYPTED.as_bytes());
    bytes
}

/// Closes our half and reads what the client has sent meanwhile: closing with
/// unread bytes would reset the connection, and the reason would be lost.
async fn hear_out(mut socket: Socket) {
    let heard = async {
        socket.shutdown().await?;
        let mut buffer = [0; 4096];
        let mut left = LINGER_BYTES;
        while left > 0 {
            match socket.read(&mut buffer).await? {
                0 => break,
                count => left = left.saturating_sub(count),
            }
        }
        io::Result::Ok(())
    };
    // However it ends, the socket is closed.
    let _ = tokio::time::timeout(LINGER, heard).await;
}

impl AsyncRead for Secured {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl AsyncWrite for Secured {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
