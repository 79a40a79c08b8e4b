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

/// The client's end: what it has to hand over goes with the first bytes.
pub(crate) struct Bringing {
    socket: UnixStream,
    handed: Option<OwnedFd>,
}

impl Bringing {
    pub fn new(socket: UnixStream, handed: Option<OwnedFd>) -> Self {
        Self { socket, handed }
    }
}

/// The server's end: takes what comes with the first bytes.
pub(crate) struct Receiving {
    socket: UnixStream,
    handed: Handed,
    begun: bool,
}

impl Receiving {
    pub fn new(socket: UnixStream) -> Self {
        Self { socket, handed: Handed::default(), begun: false }
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

impl Connected for Receiving {
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

impl AsyncWrite for Bringing {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        while let Some(handed) = &this.handed {
            ready!(this.socket.poll_write_ready(cx))?;
            let sent = this.socket.try_io(Interest::WRITABLE, || send(&this.socket, bytes, handed));
            match sent {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // The bytes go without it, or find the same error.
                Err(_) => this.handed = None,
                sent => {
                    this.handed = None;
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
            Some(first) if self.handed.is_some() => self.poll_write(cx, first),
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

impl AsyncRead for Bringing {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(cx, into)
    }
}

impl AsyncRead for Receiving {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while !this.begun {
            ready!(this.socket.poll_read_ready(cx))?;
            let room = into.initialize_unfilled();
            let got = this
                .socket
                .try_io(Interest::READABLE, || receive(&this.socket, room, &this.handed));
            match got {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                got => {
                    this.begun = true;
                    into.advance(got?);
                    return Poll::Ready(Ok(()));
                }
            }
        }
        Pin::new(&mut this.socket).poll_read(cx, into)
    }
}

impl AsyncWrite for Receiving {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        all: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(cx, all)
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

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn a_descriptor_comes_with_the_first_bytes_or_none() {
        for brings in [true, false] {
            let (one, other) = UnixStream::pair().unwrap();
            let file = std::fs::File::open("/dev/null").unwrap();
            let mut client = Bringing::new(one, brings.then(|| file.into()));
            let mut server = Receiving::new(other);
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
