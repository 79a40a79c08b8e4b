//! Rows and small messages in memory that two processes of one host share, in place of the socket between them.
//!
//! The client of a Unix socket makes a [`Segment`] and hands it over with the connection's first
//! bytes (`handover`), so it is that connection's and nobody else's. Who answers says that it
//! took it ([`ACCEPTED`]). From then on the client gives out the places ([`Room`]): a frame names
//! where its rows stand, and its results take their place when they have been read. It is free
//! again when the frame's one reply has come and not before, so what answers late writes where
//! nobody else does. Frames
//! that find no room, and connections of any other kind, carry their rows themselves.
//!
//! At the beginning of the segment are two rings ([`Rings`]), in which frames and replies go while both ends are awake.

mod handover;
mod places;
mod ring;
pub mod rings;
mod segment;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use proto::frame::{NOT_FINITE, all_finite};
use proto::v1::{DispatchError, DispatchReply, Dtype, ErrorCode, SharedRows};

pub use handover::Handed;
pub(crate) use handover::Handover;
use places::{Places, Taken};
pub use ring::Nonsense;
pub use rings::Rings;
pub use segment::Segment;

/// The response header that says that the segment which came with the connection is used.
pub const ACCEPTED: &str = "moemesh-shared-rows";
/// Frames whose rows and results together are shorter carry them.
const WORTH: usize = 16 << 10;
/// Bytes that are copied and then looked at while they are in the cache.
const BLOCK: usize = 16 << 10;
/// Buffers that results are copied into: one per micro-batch, and one more.
const COPIES: usize = 3;

/// How much more memory the system is asked for at once.
const STEP: usize = 1 << 20;

/// What a client has of a segment: which frame has which place in it.
pub struct Room {
    segment: Arc<Segment>,
    places: Mutex<Places>,
    /// Up to where the segment has memory.
    backed: AtomicUsize,
}

/// A frame's place, into which its rows are put.
pub struct Place<'a> {
    segment: &'a Segment,
    taken: Taken,
    next: usize,
}

/// A reply's rows are not where its frame had room for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it says that {said} bytes of results stand where there is room for {room}")]
pub struct Misplaced {
    pub said: u64,
    pub room: u64,
}

/// A new segment whose rings have memory, and what to hand over of it.
///
/// # Errors
/// The system has no such memory.
pub(crate) fn offer() -> io::Result<(Arc<Segment>, OwnedFd)> {
    let (segment, handed) = Segment::create()?;
    segment.back(0, rings::BOTH)?;
    Ok((Arc::new(segment), handed))
}

impl Room {
    /// All of the segment but the rings, for at most `frames` frames at once.
    pub fn new(segment: Arc<Segment>, frames: usize) -> Self {
        let places = Mutex::new(Places::new(rings::BOTH, segment.size(), frames));
        Self { segment, places, backed: AtomicUsize::new(rings::BOTH) }
    }

    /// The memory itself.
    pub fn segment(&self) -> &Segment {
        &self.segment
    }

    /// A place for a frame's `rows` and `results`, in bytes, if they are worth it and there is
    /// room. It is the frame's until [`Self::release`] or [`Self::settle`].
    pub fn place(&self, ticket: u64, rows: usize, results: usize) -> Option<Place<'_>> {
        if rows.saturating_add(results) < WORTH {
            return None;
        }
        let mut places = self.places.lock();
        let taken = places.take(ticket, rows, results)?;
        // Under the lock, so nobody else moves it.
        let backed = self.backed.load(Ordering::Relaxed);
        if taken.end() > backed {
            let until = taken.end().next_multiple_of(STEP).min(self.segment.size());
            if let Err(error) = self.segment.back(backed, until - backed) {
                tracing::debug!(%error, "no memory for rows to share");
                places.give_back(ticket);
                return None;
            }
            self.backed.store(until, Ordering::Relaxed);
        }
        Some(Place { segment: &self.segment, taken, next: taken.at })
    }

    /// The frame was not sent.
    pub fn release(&self, ticket: u64) {
        self.places.lock().give_back(ticket);
    }

    /// Takes a frame's place back, as its reply has come, whose rows are copied out of it. If one
    /// is not finite the reply becomes an error, as its receiver would find.
    ///
    /// # Errors
    /// They are not where they should be.
    pub fn settle(&self, reply: &mut DispatchReply, copies: &mut Copies) -> Result<(), Misplaced> {
        let taken = self.places.lock().give_back(reply.ticket);
        let (said, room) = (reply.shared_bytes, taken.map_or(0, |taken| taken.results as u64));
        match taken {
            _ if said > room => Err(Misplaced { said, room }),
            Some(Taken { at, .. }) if said > 0 => {
                let bytes = said as usize;
                let dtype = Dtype::try_from(reply.dtype).unwrap_or_default();
                let mut finite = true;
                reply.rows = copies.make(bytes, |to| {
                    for from in (0..bytes).step_by(BLOCK) {
                        let block = BLOCK.min(bytes - from);
                        self.segment.read(at + from, block, to);
                        finite &= all_finite(&to[from..], dtype);
                    }
                });
                if !finite {
                    reply.error = Some(DispatchError {
                        code: ErrorCode::Unspecified as i32,
                        message: NOT_FINITE.to_owned(),
                    });
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl Place<'_> {
    /// Appends to the rows, which are not to be longer than was said.
    pub fn put(&mut self, row: &[u8]) {
        self.segment.write(self.next, row);
        self.next += row.len();
        debug_assert!(self.next <= self.taken.at + self.taken.rows);
    }

    /// As the frame says it.
    pub fn said(&self) -> SharedRows {
        let Taken { at, rows, results, .. } = self.taken;
        let [at, rows_bytes, results_bytes] = [at, rows, results].map(|n| n as u64);
        SharedRows { at, rows_bytes, results_bytes }
    }
}

/// Memory that results and messages are copied into. It is used again when nobody reads them any more.
#[derive(Default)]
pub struct Copies {
    buffers: Vec<BytesMut>,
    /// What a buffer has at least.
    least: usize,
}

impl Copies {
    fn of(least: usize) -> Self {
        Self { buffers: Vec::new(), least }
    }

    fn make(&mut self, bytes: usize, fill: impl FnOnce(&mut BytesMut)) -> Bytes {
        let Self { buffers, least } = self;
        let at = match buffers.iter_mut().position(|buffer| buffer.try_reclaim(bytes)) {
            Some(at) => at,
            None => {
                if buffers.len() == COPIES {
                    buffers.remove(0);
                }
                // Not a little more each time.
                buffers.push(BytesMut::with_capacity(bytes.next_power_of_two().max(*least)));
                buffers.len() - 1
            }
        };
        fill(&mut buffers[at]);
        buffers[at].split().freeze()
    }
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;

    fn reply(ticket: u64, shared_bytes: u64) -> DispatchReply {
        DispatchReply { ticket, shared_bytes, ..Default::default() }
    }

    fn pair() -> (Room, Segment) {
        let (segment, handed) = Segment::create().unwrap();
        (Room::new(Arc::new(segment), 4), Segment::adopt(handed).unwrap())
    }

    #[test]
    fn rows_go_there_and_results_come_back() {
        let (room, node) = pair();
        let mut copies = Copies::default();
        assert!(room.place(1, 100, 100).is_none(), "not worth it");
        for ticket in 1..100 {
            let mut place = room.place(ticket, 20_000, 70_000).unwrap();
            (0..20).for_each(|row| place.put(&[row; 1000]));
            let said = place.said();
            let mut rows = Vec::new();
            node.read(said.at as usize, said.rows_bytes as usize, &mut rows);
            assert!((0..20).all(|row| rows[1000 * row..][..1000] == [row as u8; 1000]));
            node.write(said.at as usize, &vec![ticket as u8; 70_000]);
            let mut reply = reply(ticket, 70_000);
            room.settle(&mut reply, &mut copies).unwrap();
            assert_eq!(reply.rows[..], vec![ticket as u8; 70_000]);
            assert_eq!(copies.buffers.len(), 1, "memory is used again");
        }
    }

    #[test]
    fn what_is_not_asked_for_is_told_and_a_full_segment_refuses() {
        let (room, _node) = pair();
        let mut copies = Copies::default();
        let big = room.segment.size() - rings::BOTH;
        let said = room.place(7, big, big).unwrap().said();
        assert_eq!((said.at, said.results_bytes), (rings::BOTH as u64, big as u64));
        assert!(room.place(8, WORTH, 0).is_none());
        let misplaced = |said, room| Err(Misplaced { said, room });
        assert_eq!(room.settle(&mut reply(8, 1), &mut copies), misplaced(1, 0));
        let one = big as u64 + 1;
        assert_eq!(room.settle(&mut reply(7, one), &mut copies), misplaced(one, one - 1));
        // An answer inside the message, or a refusal.
        assert!(room.place(9, WORTH, 0).is_some());
        assert_eq!(room.settle(&mut reply(9, 0), &mut copies), Ok(()));
        assert!(room.place(10, big, big).is_some());
        room.release(10);
        assert!(room.place(11, big, big).is_some());
    }
}
