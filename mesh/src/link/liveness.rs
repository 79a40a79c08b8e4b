//! Signs of life. A node's streams are served by the thread that computes, so
//! silence there may be work. Other threads of it answer `GET /healthz` at the
//! address that it names in its description; when they do not either, and no
//! reply comes, the process is stopped or its machine out of reach, long before
//! TCP or a ping would say so.
//!
//! A node is judged only once that address has answered: it may be closed to
//! this machine. Replies are signs of life as good as any, so a busy link is
//! asked no further then.

use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::Instant;

use super::LinkHandle;
use crate::transport::Endpoint;

const EVERY: Duration = Duration::from_millis(200);
/// A node without any sign of life for so long hangs.
const PATIENCE: Duration = Duration::from_millis(500);
/// A node that hangs for so long is disconnected.
const GIVE_UP: Duration = Duration::from_secs(5);
const REQUEST: &[u8] = b"GET /healthz HTTP/1.1\r\nhost: moemesh\r\n\r\n";
const OK: &[u8] = b"HTTP/1.1 200";
/// The end of the answer; see [`crate::admin`].
const END: &[u8] = b"\r\n\r\nok\n";
const MOST: usize = 1024;

/// Watches the link's node for as long as it is polled.
pub(super) async fn watch(handle: &LinkHandle) {
    let mut door = None;
    let mut watched = Watched::default();
    loop {
        tokio::time::sleep(EVERY).await;
        let Some(about) = handle.description() else {
            (door, watched) = (None, Watched::default());
            continue;
        };
        let Some(at) = address(&about.alive_at, &handle.endpoint) else { continue };
        let asked = Instant::now();
        let replies = handle.replies.load(Ordering::Relaxed);
        let replied = replies != std::mem::replace(&mut watched.replies, replies);
        // A busy link is asked too until it has answered once: it may hang before it is ever idle.
        let answers = (!replied || !watched.answered)
            && matches!(tokio::time::timeout(PATIENCE, ask(&mut door, &at)).await, Ok(Ok(())));
        watched.answered |= answers;
        if replied || answers {
            watched.silent = None;
            if handle.hung.swap(false, Ordering::Relaxed) {
                tracing::info!(node = %handle.endpoint, "node gives signs of life again");
            }
            continue;
        }
        door = None;
        // A reply while it was being asked shows with the next look.
        let silent = *watched.silent.get_or_insert(asked);
        let hangs = watched.answered && silent.elapsed() >= PATIENCE;
        if hangs && handle.replies.load(Ordering::Relaxed) == watched.replies {
            if !handle.hung.swap(true, Ordering::Relaxed) {
                tracing::warn!(node = %handle.endpoint, "node gives no sign of life");
            }
            if silent.elapsed() >= GIVE_UP {
                handle.cut.notify_one();
                watched = Watched::default();
            }
        }
    }
}

/// What is known since the link came up.
#[derive(Default)]
struct Watched {
    /// The address has answered.
    answered: bool,
    /// Replies counted at the last look.
    replies: u64,
    /// When the first question was asked that has not been answered.
    silent: Option<Instant>,
}

/// A connection that is used again.
enum Door {
    Tcp(TcpStream),
    Unix(UnixStream),
}

async fn ask(door: &mut Option<Door>, at: &Endpoint) -> std::io::Result<()> {
    if door.is_none() {
        *door = Some(match at {
            Endpoint::Tcp(address) => Door::Tcp(TcpStream::connect(address).await?),
            Endpoint::Unix(path) => Door::Unix(UnixStream::connect(path).await?),
        });
    }
    match door {
        Some(Door::Tcp(stream)) => greet(stream).await,
        Some(Door::Unix(stream)) => greet(stream).await,
        None => Ok(()),
    }
}

async fn greet(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> std::io::Result<()> {
    let wrong = |what| Err(std::io::Error::other(what));
    stream.write_all(REQUEST).await?;
    let mut answer = Vec::with_capacity(MOST);
    while !answer.ends_with(END) {
        if answer.len() >= MOST {
            return wrong("a long answer");
        }
        if stream.read_buf(&mut answer).await? == 0 {
            return wrong("no answer");
        }
    }
    if answer.starts_with(OK) { Ok(()) } else { wrong("another answer") }
}

/// Where to ask, of a node reached at `endpoint` that says `alive_at`: always on
/// the machine that it was reached at, whatever it says, so that no node has us
/// call on others. Nowhere if it listens for itself only.
fn address(alive_at: &str, endpoint: &Endpoint) -> Option<Endpoint> {
    let address = match alive_at.parse().ok()? {
        Endpoint::Tcp(address) => address,
        // Only a node of this machine shares its files.
        unix @ Endpoint::Unix(_) => return endpoint.is_loopback().then_some(unix),
    };
    let (host, port) = address.rsplit_once(':')?;
    let ip = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().ok();
    if ip.is_some_and(|ip| ip.is_loopback()) && !endpoint.is_loopback() {
        return None;
    }
    let host = match endpoint {
        Endpoint::Tcp(address) => address.rsplit_once(':')?.0,
        Endpoint::Unix(_) => "127.0.0.1",
    };
    Some(Endpoint::Tcp(format!("{host}:{port}")))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;
    use crate::placement::NodeIndex;

    #[test]
    fn an_address_means_the_nodes_own_machine() {
        let cases = [
            ("", "a:1", None),
            ("nonsense", "a:1", None),
            ("0.0.0.0:9000", "node-1:7000", Some("node-1:9000")),
            ("[::]:9000", "[fd00::1]:7000", Some("[fd00::1]:9000")),
            ("10.0.0.9:9000", "node-1:7000", Some("node-1:9000")),
            ("127.0.0.1:9000", "node-1:7000", None),
            ("127.0.0.1:9000", "localhost:7000", Some("localhost:9000")),
            ("0.0.0.0:9000", "unix:/a", Some("127.0.0.1:9000")),
            ("unix:/b", "unix:/a", Some("unix:/b")),
            ("unix:/b", "node-1:7000", None),
        ];
        for (alive_at, endpoint, want) in cases {
            let got = address(alive_at, &endpoint.parse().unwrap());
            assert_eq!(got.map(|at| at.to_string()).as_deref(), want, "{alive_at} {endpoint}");
        }
    }

    async fn until(what: &str, mut done: impl FnMut() -> bool) {
        for _ in 0..2000 {
            if done() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("never: {what}");
    }

    /// Against a side door that can stop answering.
    #[tokio::test]
    async fn a_silent_node_hangs_unless_replies_come_and_is_cut_in_the_end() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let (answers, open) = tokio::sync::watch::channel(true);
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut open = open.clone();
                tokio::spawn(async move {
                    let mut asked = [0; REQUEST.len()];
                    while stream.read_exact(&mut asked).await.is_ok() {
                        open.wait_for(|&open| open).await.unwrap();
                        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok\n";
                        stream.write_all(answer).await.unwrap();
                    }
                });
            }
        });
        let handle = LinkHandle::new(NodeIndex(0), at.to_string().parse().unwrap());
        handle.describe_as(proto::v1::NodeDescription {
            alive_at: at.to_string(),
            ..Default::default()
        });
        let watched = handle.clone();
        let watching = tokio::spawn(async move { watch(&watched).await });
        tokio::time::sleep(3 * EVERY).await;
        assert!(!handle.is_hung());
        answers.send_replace(false);
        until("hung", || handle.is_hung()).await;
        handle.replies.fetch_add(1, Ordering::Relaxed);
        until("alive by a reply", || !handle.is_hung()).await;
        until("hung again", || handle.is_hung()).await;
        answers.send_replace(true);
        until("alive by an answer", || !handle.is_hung()).await;
        answers.send_replace(false);
        tokio::time::timeout(Duration::from_secs(60), handle.cut.notified()).await.unwrap();
        watching.abort();
    }

    #[tokio::test]
    async fn a_door_that_never_answered_says_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let handle = LinkHandle::new(NodeIndex(0), at.to_string().parse().unwrap());
        handle.describe_as(proto::v1::NodeDescription {
            alive_at: at.to_string(),
            ..Default::default()
        });
        let watched = tokio::time::timeout(4 * PATIENCE, watch(&handle)).await;
        assert!(watched.is_err() && !handle.is_hung());
    }
}
