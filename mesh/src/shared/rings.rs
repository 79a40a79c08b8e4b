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
use proto::wire;
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

impl From<Nonsense> for tonic::Status {
    fn from(nonsense: Nonsense) -> Self {
        Self::invalid_argument(nonsense.to_string())
    }
}

/// A connection's rings for both who use an end of them: the thread that looks into them, and the task of
/// the stream, which the thread tells that the stream has to end, or to look itself.
pub struct Passage<E> {
    rings: Rings,
    is_faulty: AtomicBool,
    why: Mutex<Option<E>>,
    told: Notify,
}

impl<E: From<Nonsense>> Passage<E> {
    pub fn new(rings: Rings) -> Self {
        let (is_faulty, why, told) = Default::default();
        Self { rings, is_faulty, why, told }
    }

    /// As [`Rings::put`], of a message behind its prefix. A ring that is spoilt ends the stream.
    pub fn put(&self, message: &[u8]) -> Put {
        let Some(message) = message.get(wire::PREFIX..) else { return Put::Not };
        if self.is_faulty() {
            return Put::Not;
        }
        self.rings.put(message).unwrap_or_else(|error| {
            self.fail(error.into());
            Put::Not
        })
    }

    /// As [`Rings::look`]; nothing is looked for after a fault.
    pub fn look(&self) -> bool {
        !self.is_faulty() && self.rings.look()
    }

    /// As [`Rings::take`].
    ///
    /// # Errors
    /// The other end has spoilt the ring.
    pub fn take(&self) -> Result<Option<Bytes>, E> {
        Ok(self.rings.take()?)
    }

    /// As [`Rings::sleep`]; the stream ends by itself after a fault.
    pub fn sleep(&self) -> bool {
        self.rings.sleep() || self.is_faulty()
    }

    /// The stream has to end. The first reason counts.
    pub fn fail(&self, why: E) {
        if !self.is_faulty.swap(true, Ordering::Relaxed) {
            *self.why.lock() = Some(why);
            self.poke();
        }
    }

    pub fn is_faulty(&self) -> bool {
        self.is_faulty.load(Ordering::Relaxed)
    }

    /// The task is to look into the rings.
    pub fn poke(&self) {
        self.told.notify_one();
    }

    /// Why the stream has to end, or nothing if it was a poke; never, without a passage. For one task.
    pub async fn told(passage: Option<&Self>) -> Option<E> {
        match passage {
            Some(passage) => {
                passage.told.notified().await;
                passage.why.lock().take()
            }
            None => std::future::pending().await,
        }
    }
}
