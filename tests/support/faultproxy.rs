//! A TCP proxy that does harm: latency and jitter, a rate, silence each way, a
//! reset after so many bytes, a flipped bit. It forwards to a Unix socket or to
//! TCP, and what it does can be changed while connections run through it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use super::dice::Dice;

/// Chunks that may be under way in one direction of one connection.
const UNDER_WAY: usize = 256;
const CHUNK: usize = 16 << 10;

/// What happens to the bytes of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Way {
    pub delay: Duration,
    /// Up to so much is added to `delay`.
    pub jitter: Duration,
    /// Bytes a second.
    pub rate: Option<u64>,
    /// Nothing arrives, and nothing is lost: it arrives once this is lifted.
    pub blackhole: bool,
}

/// What happens to both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    pub to_server: Way,
    pub to_client: Way,
}

impl Faults {
    pub fn both(way: Way) -> Self {
        Self { to_server: way, to_client: way }
    }
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    ToServer,
    ToClient,
}

/// A harm that is done once, when a byte count of one direction runs out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Once {
    /// Both sides see a reset; the bytes before it arrive.
    Reset,
    /// The lowest bit of the byte is flipped.
    Flip,
}

/// A running proxy; it and its connections end when dropped.
pub struct FaultProxy {
    /// Where to connect, `127.0.0.1:port`.
    pub address: String,
    faults: watch::Sender<Faults>,
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

struct Shared {
    target: PathBuf,
    armed: Mutex<Option<(Direction, Once)>>,
    /// Bytes of the armed direction before the harm.
    left: AtomicI64,
    /// Harms done.
    done: AtomicU64,
    bytes: [AtomicU64; 2],
    noise: Mutex<Dice>,
}

impl FaultProxy {
    /// Forwards to the Unix socket `target`, connected to anew for each connection.
    pub fn start(target: PathBuf) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let listener = TcpListener::from_std(listener).unwrap();
        let (faults, heard) = watch::channel(Faults::default());
        let shared = Arc::new(Shared {
            target,
            armed: Mutex::new(None),
            left: AtomicI64::new(0),
            done: AtomicU64::new(0),
            bytes: Default::default(),
            noise: Mutex::new(Dice(1)),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, shared.clone(), heard));
        Self { address, faults, shared, _tasks: tasks }
    }

    pub fn set(&self, faults: Faults) {
        self.faults.send_replace(faults);
    }

    /// Does `what` to the byte `after` bytes from now that go `direction`.
    pub fn arm(&self, direction: Direction, after: u64, what: Once) {
        let mut armed = self.shared.armed.lock();
        self.shared.left.store(after as i64, Ordering::SeqCst);
        *armed = Some((direction, what));
    }

    /// Takes back what is armed.
    pub fn disarm(&self) {
        *self.shared.armed.lock() = None;
    }

    /// Harms done so far.
    pub fn done(&self) -> u64 {
        self.shared.done.load(Ordering::SeqCst)
    }

    /// Bytes that went through, (to the server, to the client).
    pub fn bytes(&self) -> (u64, u64) {
        let [up, down] = &self.shared.bytes;
        (up.load(Ordering::Relaxed), down.load(Ordering::Relaxed))
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, faults: watch::Receiver<Faults>) {
    let mut connections = JoinSet::new();
    loop {
        let Ok((client, _)) = listener.accept().await else { continue };
        while connections.try_join_next().is_some() {}
        connections.spawn(connection(client, shared.clone(), faults.clone()));
    }
}

/// Ends both sides together: what one loses, the other must hear of.
async fn connection(client: TcpStream, shared: Arc<Shared>, faults: watch::Receiver<Faults>) {
    let Ok(server) = UnixStream::connect(&shared.target).await else { return };
    client.set_nodelay(true).unwrap();
    let (mut client_reads, mut client_writes) = client.into_split();
    let (server_reads, server_writes) = server.into_split();
    let up = way(&mut client_reads, server_writes, Direction::ToServer, &shared, &faults);
    let down = way(server_reads, &mut client_writes, Direction::ToClient, &shared, &faults);
    let reset = tokio::select! {
        reset = up => reset,
        reset = down => reset,
    };
    if reset {
        let _ = client_writes.as_ref().set_zero_linger();
    }
}

/// Carries one direction; true when it is to end in a reset.
async fn way(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    direction: Direction,
    shared: &Shared,
    faults: &watch::Receiver<Faults>,
) -> bool {
    let (queue, mut queued) = mpsc::channel::<(Instant, Vec<u8>, bool)>(UNDER_WAY);
    let current = move |faults: &watch::Receiver<Faults>| match direction {
        Direction::ToServer => faults.borrow().to_server,
        Direction::ToClient => faults.borrow().to_client,
    };
    let reading = async move {
        let mut buffer = vec![0; CHUNK];
        loop {
            let Ok(count @ 1..) = from.read(&mut buffer).await else { return };
            let mut chunk = buffer[..count].to_vec();
            let reset = shared.harm(direction, &mut chunk);
            let Way { delay, jitter, .. } = current(faults);
            let due = Instant::now() + delay + jitter.mul_f64(shared.noise());
            if queue.send((due, chunk, reset)).await.is_err() || reset {
                return;
            }
        }
    };
    let writing = async {
        let mut faults = faults.clone();
        while let Some((due, chunk, reset)) = queued.recv().await {
            // A timer that is due already would still cost its millisecond.
            if due > Instant::now() {
                sleep_until(due).await;
            }
            let open = |faults: &Faults| match direction {
                Direction::ToServer => !faults.to_server.blackhole,
                Direction::ToClient => !faults.to_client.blackhole,
            };
            if faults.wait_for(open).await.is_err() || to.write_all(&chunk).await.is_err() {
                return false;
            }
            let at = usize::from(direction == Direction::ToClient);
            shared.bytes[at].fetch_add(chunk.len() as u64, Ordering::Relaxed);
            if let Some(rate) = current(&faults).rate {
                sleep(Duration::from_secs_f64(chunk.len() as f64 / rate as f64)).await;
            }
            if reset {
                return true;
            }
        }
        false
    };
    tokio::join!(reading, writing).1
}

impl Shared {
    /// Does what is armed to a chunk; true if it ends in a reset.
    fn harm(&self, direction: Direction, chunk: &mut Vec<u8>) -> bool {
        let mut armed = self.armed.lock();
        let Some((of, what)) = *armed else { return false };
        if of != direction {
            return false;
        }
        let before = self.left.fetch_sub(chunk.len() as i64, Ordering::SeqCst);
        let Ok(at) = usize::try_from(before) else { return false };
        if at >= chunk.len() {
            return false;
        }
        *armed = None;
        self.done.fetch_add(1, Ordering::SeqCst);
        match what {
            Once::Reset => chunk.truncate(at),
            Once::Flip => chunk[at] ^= 1,
        }
        what == Once::Reset
    }

    /// Evenly within 0 .. 1, the same in every run.
    fn noise(&self) -> f64 {
        self.noise.lock().unit()
    }
}
