//! How a segment comes to the other process: its descriptor travels beside the first bytes of the
//! connection that it is for, as Unix sockets can. Nobody has to find it or to prove
//! anything, and a server that does not look for it never has it.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use parking_lot::Mutex;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;
use tonic::transport::server::Connected;

/// A Unix socket whose first bytes bring, or may bring, a descriptor; afterwards it is like any.
pub(crate) struct Handover {
    socket: UnixStream,
    /// What goes with the first bytes that are written.
    brings: Option<OwnedFd>,
    /// Whether the first bytes are still to come, with which something may.
    expects: bool,
    handed: Handed,
}

impl Handover {
    /// The client's end.
    pub fn bringing(socket: UnixStream, brings: Option<OwnedFd>) -> Self {
        Self { socket, brings, expects: false, handed: Handed::default() }
    }

    /// The server's end.
    pub fn receiving(socket: UnixStream) -> Self {
        Self { socket, brings: None, expects: true, handed: Handed::default() }
    }
}

/// What came with a connection, in the extensions of its requests.
#[derive(Clone, Default)]
pub struct Handed(Arc<Mutex<Option<OwnedFd>>>);

impl Handed {
    /// For the first who asks.
    pub fn take(&self) -> Option<OwnedFd> {
        self.0.lock().take()
    }
}

impl Connected for Handover {
    type ConnectInfo = Handed;

    fn connect_info(&self) -> Handed {
        self.handed.clone()
    }
}

fn send(socket: &UnixStream, bytes: &[u8], handed: &OwnedFd) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    let handed = [handed.as_fd()];
    beside.push(SendAncillaryMessage::ScmRights(&handed));
    Ok(sendmsg(socket, &[IoSlice::new(bytes)], &mut beside, SendFlags::NOSIGNAL)?)
}

fn receive(socket: &UnixStream, bytes: &mut [u8], handed: &Handed) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    #[cfg(target_os = "linux")]
    let flags = RecvFlags::CMSG_CLOEXEC;
    #[cfg(not(target_os = "linux"))]
    let flags = RecvFlags::empty();
    let received = recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut beside, flags)?;
    for message in beside.drain() {
        if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
            *handed.0.lock() = descriptors.next();
        }
    }
    Ok(received.bytes)
}

impl AsyncWrite for Handover {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        while let Some(brings) = &this.brings {
            ready!(this.socket.poll_write_ready(cx))?;
            let sent = this.socket.try_io(Interest::WRITABLE, || send(&this.socket, bytes, brings));
            match sent {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // The bytes go without it, or find the same error.
                Err(_) => this.brings = None,
                sent => {
                    this.brings = None;
                    return Poll::Ready(sent);
                }
            }
        }
        Pin::new(&mut this.socket).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        all: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match all.iter().find(|bytes| !bytes.is_empty()) {
            Some(first) if self.brings.is_some() => self.poll_write(cx, first),
            _ => Pin::new(&mut self.socket).poll_write_vectored(cx, all),
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

impl AsyncRead for Handover {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.expects {
            ready!(this.socket.poll_read_ready(cx))?;
            let room = into.initialize_unfilled();
            let got = this
                .socket
                .try_io(Interest::READABLE, || receive(&this.socket, room, &this.handed));
            match got {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                got => {
                    this.expects = false;
                    into.advance(got?);
                    return Poll::Ready(Ok(()));
                }
            }
        }
        Pin::new(&mut this.socket).poll_read(cx, into)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn a_descriptor_comes_with_the_first_bytes_or_none() {
        for brings in [true, false] {
            let (one, other) = UnixStream::pair().unwrap();
            let file = std::fs::File::open("/dev/null").unwrap();
            let mut client = Handover::bringing(one, brings.then(|| file.into()));
            let mut server = Handover::receiving(other);
            let handed = server.connect_info();
            let mut got = [0; 6];
            client.write_all(b"abc").await.unwrap();
            client.write_all(b"def").await.unwrap();
            server.read_exact(&mut got).await.unwrap();
            assert_eq!((&got, handed.take().is_some()), (b"abcdef", brings));
            assert!(handed.take().is_none());
            server.write_all(b"xyz").await.unwrap();
            client.read_exact(&mut got[..3]).await.unwrap();
            assert_eq!(got[..3], *b"xyz");
            drop(client);
            assert_eq!(server.read(&mut got).await.unwrap(), 0);
        }
    }
}
