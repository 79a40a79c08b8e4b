//! A connection's two rings, through which its small messages go while both ends are awake: no system
//! call, no HTTP/2, nobody woken. They stand at the beginning of the connection's segment, the
//! client's messages in the first, the server's in the second.
//!
//! The stream over the socket stays what the connection is: it begins and ends with it, and it wakes. Whoever
//! means to sleep says so in its ring and has messages by the stream from then on; if one was put into the ring in
//! that moment, an empty message by the stream ([`KNOCK`]) has it looked for. The stream also takes
//! what finds no room. So messages may overtake each other; each is to stand for itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::ring::{BYTES, Nonsense, Reader, Writer};
use super::{Copies, Segment};

/// The request header that says that rings of so many bytes stand in the segment that came with the
/// connection; in the response, that they are used.
pub const OFFERED: &str = "moemesh-shared-rings";
/// What both take of a segment.
pub const BOTH: usize = 2 * BYTES;
/// The empty message: look into the ring.
pub const KNOCK: Bytes = Bytes::from_static(&[0; 5]);
/// Messages are copied out into pieces of memory of this size.
const COPY: usize = 16 << 10;

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// It is in the ring and will be seen.
    There,
    /// It is in the ring; its reader has to be told, by a [`KNOCK`].
    Knock,
    /// It is not in the ring and has to go by the stream.
    Not,
}

/// See the module's text.
pub struct Rings {
    out: Mutex<Writer>,
    into: Mutex<(Reader, Copies)>,
}

impl Rings {
    /// What [`OFFERED`] says where this process's rings are meant.
    pub fn offer() -> http::HeaderValue {
        BOTH.into()
    }

    /// The end of who made the segment.
    pub fn client(segment: &Arc<Segment>) -> Self {
        Self::new(segment, 0, BYTES)
    }

    /// The end of who was handed it; none if it is too small.
    pub fn server(segment: &Arc<Segment>) -> Option<Self> {
        (segment.size() >= BOTH).then(|| Self::new(segment, BYTES, 0))
    }

    fn new(segment: &Arc<Segment>, out: usize, into: usize) -> Self {
        let reader = Reader::new(segment.clone(), into);
        Self {
            out: Mutex::new(Writer::new(segment.clone(), out)),
            into: Mutex::new((reader, Copies::of(COPY))),
        }
    }

    /// Puts a message into the ring of who is awake.
    ///
    /// # Errors
    /// The other end has spoilt the ring. The message is not in it.
    pub fn put(&self, message: &[u8]) -> Result<Put, Nonsense> {
        let mut out = self.out.lock();
        Ok(match out.seems_read() && out.put(message)? {
            false => Put::Not,
            true if out.is_read() => Put::There,
            true => Put::Knock,
        })
    }

    /// The next message, if there is one.
    ///
    /// # Errors
    /// The other end has spoilt the ring.
    pub fn take(&self) -> Result<Option<Bytes>, Nonsense> {
        let (ring, copies) = &mut *self.into.lock();
        let length = ring.next()?;
        Ok(length.map(|length| copies.make(length, |to| ring.take(length, to))))
    }

    /// Whether there is something to [`Self::take`], for who is awake and will look again.
    pub fn look(&self) -> bool {
        let (ring, _) = &mut *self.into.lock();
        ring.wake();
        !matches!(ring.next(), Ok(None))
    }

    /// From now on the stream wakes; false if there is something to [`Self::take`] before.
    pub fn sleep(&self) -> bool {
        let (ring, _) = &mut *self.into.lock();
        ring.sleep();
        matches!(ring.next(), Ok(None))
    }
}

/// How the thread that looks into the rings tells the task of the stream that it has to end, or to look itself.
pub struct Fault<E> {
    is_set: AtomicBool,
    why: Mutex<Option<E>>,
    told: Notify,
}

impl<E> Default for Fault<E> {
    fn default() -> Self {
        Self { is_set: AtomicBool::new(false), why: Mutex::new(None), told: Notify::new() }
    }
}

impl<E> Fault<E> {
    /// The stream has to end. The first reason counts.
    pub fn set(&self, why: E) {
        if !self.is_set.swap(true, Ordering::Relaxed) {
            *self.why.lock() = Some(why);
            self.poke();
        }
    }

    /// Nothing is taken from rings that are at fault.
    pub fn is_set(&self) -> bool {
        self.is_set.load(Ordering::Relaxed)
    }

    /// The task is to look into the rings.
    pub fn poke(&self) {
        self.told.notify_one();
    }

    /// Why the stream has to end, or nothing if it was a poke. For one task.
    pub async fn told(&self) -> Option<E> {
        self.told.notified().await;
        self.why.lock().take()
    }
}
