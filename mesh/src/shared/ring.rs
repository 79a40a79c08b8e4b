//! A ring of messages in memory that two processes share: one writes, the other reads, and neither
//! makes a system call. Each keeps its own place to itself and publishes it as a count of all bytes
//! so far. What the other one publishes is checked before it is used, so whatever it writes, and
//! whenever, nothing is read or written outside of the ring, and what cannot be is an error.
//!
//! ```text
//! written | read | awake | ... | messages: length in 8 bytes, bytes, up to the next multiple of 8
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use bytes::BufMut;

use super::Segment;

/// Counters are so far apart that writing one does not take the other from its CPU's cache.
const APART: usize = 128;
const WRITTEN: usize = 0;
const READ: usize = APART;
const AWAKE: usize = 2 * APART;
/// A page for the counters.
const MESSAGES: usize = 4096;
/// Bytes of messages that a ring holds. Small, so that it stays in caches.
const ROOM: usize = 64 << 10;
/// What a ring takes of a segment.
pub const BYTES: usize = MESSAGES + ROOM;
/// The longest message that is written into a ring.
pub const LONGEST: usize = 32 << 10;
/// Of a message's length, and what messages are aligned to.
const WORD: usize = 8;

/// What the other end wrote into a ring cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Nonsense {
    #[error("a shared ring is said to hold {0} bytes, of {ROOM}")]
    Count(u64),
    #[error("a message of {length} bytes is said to stand in a shared ring that holds {holds}")]
    Length { length: u64, holds: u64 },
}

/// Where a ring begins in its segment.
struct Place {
    segment: Arc<Segment>,
    at: usize,
}

impl Place {
    fn counter(&self, which: usize) -> &AtomicU64 {
        self.segment.counter(self.at + which)
    }

    /// The pieces that `bytes` bytes after so many lie in: where, and how many.
    fn pieces(&self, after: u64, bytes: usize) -> [(usize, usize); 2] {
        let from = (after % ROOM as u64) as usize;
        let first = bytes.min(ROOM - from);
        let messages = self.at + MESSAGES;
        [(messages + from, first), (messages, bytes - first)]
    }
}

fn taken_by(message: usize) -> u64 {
    (WORD + message.next_multiple_of(WORD)) as u64
}

fn holds(written: u64, read: u64) -> Result<u64, Nonsense> {
    match written.wrapping_sub(read) {
        count if count <= ROOM as u64 && count.is_multiple_of(WORD as u64) => Ok(count),
        count => Err(Nonsense::Count(count)),
    }
}

/// The end that writes.
pub struct Writer {
    place: Place,
    written: u64,
    /// As of the last look, which is only needed when there seems to be no room.
    read: u64,
}

impl Writer {
    /// Of the ring at `at`, which nobody has written into. The caller has checked that it lies within.
    pub fn new(segment: Arc<Segment>, at: usize) -> Self {
        Self { place: Place { segment, at }, written: 0, read: 0 }
    }

    /// Appends a message; false if there is no room for it.
    ///
    /// # Errors
    /// The reader cannot have read as much as it says.
    pub fn put(&mut self, message: &[u8]) -> Result<bool, Nonsense> {
        let bytes = taken_by(message.len());
        if message.len() > LONGEST {
            return Ok(false);
        }
        if self.written - self.read + bytes > ROOM as u64 {
            // What was read before this is not written over before.
            let read = self.place.counter(READ).load(Ordering::Acquire);
            if holds(self.written, read)? + bytes > ROOM as u64 {
                return Ok(false);
            }
            self.read = read;
        }
        let length = (message.len() as u64).to_le_bytes();
        // It never wraps, as all there is is a multiple of it.
        let [(at, _), _] = self.place.pieces(self.written, WORD);
        self.place.segment.write(at, &length);
        let [(at, first), (again, _)] =
            self.place.pieces(self.written + WORD as u64, message.len());
        self.place.segment.write(at, &message[..first]);
        self.place.segment.write(again, &message[first..]);
        self.written += bytes;
        self.place.counter(WRITTEN).store(self.written, Ordering::Release);
        Ok(true)
    }

    /// Whether the reader looks into the ring by itself, as far as can be seen now.
    pub fn seems_read(&self) -> bool {
        self.place.counter(AWAKE).load(Ordering::Relaxed) != 0
    }

    /// Whether the reader will see by itself what has been written. If not, it has to be told.
    pub fn is_read(&self) -> bool {
        // Here the message is published and then the flag read, in `Reader::sleep` the flag is
        // written and then the ring looked at: between two fences, one of both sees the other.
        fence(Ordering::SeqCst);
        self.seems_read()
    }
}

/// The end that reads.
pub struct Reader {
    place: Place,
    read: u64,
    /// As of the last look.
    written: u64,
    awake: bool,
}

impl Reader {
    /// As for [`Writer::new`]. It is not awake.
    pub fn new(segment: Arc<Segment>, at: usize) -> Self {
        Self { place: Place { segment, at }, read: 0, written: 0, awake: false }
    }

    /// The length of the next message, if there is one.
    ///
    /// # Errors
    /// There cannot be what is said to be.
    pub fn next(&mut self) -> Result<Option<usize>, Nonsense> {
        if self.read == self.written {
            // What was written before this is there.
            let written = self.place.counter(WRITTEN).load(Ordering::Acquire);
            holds(written, self.read)?;
            self.written = written;
            if self.read == self.written {
                return Ok(None);
            }
        }
        let mut length = [0; WORD];
        let [(at, _), _] = self.place.pieces(self.read, WORD);
        self.place.segment.read(at, WORD, &mut &mut length[..]);
        let length = u64::from_le_bytes(length);
        let holds = self.written - self.read;
        if length > LONGEST as u64 || taken_by(length as usize) > holds {
            return Err(Nonsense::Length { length, holds });
        }
        Ok(Some(length as usize))
    }

    /// Appends the next message, of the length that [`Self::next`] has just told, and gives its place back.
    pub fn take(&mut self, length: usize, into: &mut impl BufMut) {
        for (at, bytes) in self.place.pieces(self.read + WORD as u64, length) {
            self.place.segment.read(at, bytes, into);
        }
        self.read += taken_by(length);
        self.place.counter(READ).store(self.read, Ordering::Release);
    }

    /// Says that it looks into the ring by itself from now on.
    pub fn wake(&mut self) {
        if !self.awake {
            self.awake = true;
            self.place.counter(AWAKE).store(1, Ordering::Relaxed);
        }
    }

    /// Says that it has to be told. There may be a message all the same, which came before
    /// its writer could see that: look once more.
    pub fn sleep(&mut self) {
        if self.awake {
            self.awake = false;
            self.place.counter(AWAKE).store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
    }
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests;
