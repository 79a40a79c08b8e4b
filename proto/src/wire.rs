//! gRPC messages as they lie in HTTP/2 DATA: a prefix of five bytes and a
//! protobuf message. Here a tensor is written once, into the buffer that goes to
//! the socket, and read in place from the buffer that came from it. What is on
//! the wire is an ordinary [`DispatchFrame`] or [`DispatchReply`].
//!
//! [`DispatchFrame`]: crate::v1::DispatchFrame
//! [`DispatchReply`]: crate::v1::DispatchReply

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};

use crate::v1::{DispatchFrame, DispatchReply};

/// Compression flag and length.
pub const PREFIX: usize = 5;
/// The field that holds the rows, in frames as in replies. Last, so that it can
/// be appended to the others.
const ROWS: u32 = 15;
/// How the field begins that holds the checksum of all before it (16, fixed32), and its bytes.
const SEALED: [u8; 2] = [0x85, 0x01];
const SEAL: usize = SEALED.len() + 4;

/// Why a stream of messages cannot be read further.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("a message is compressed, which nobody asked for")]
    Compressed,
    #[error("a message has {got} bytes, {limit} are allowed")]
    TooLong { got: usize, limit: usize },
    #[error("a message is not what it should be: {0}")]
    Malformed(#[from] prost::DecodeError),
    #[error("the stream ended inside a message")]
    Cut,
    #[error("a message is not as it was sent: its checksum is wrong")]
    Damaged,
}

/// A message that may end with a checksum.
pub trait Sealed: Message {
    fn sealed_with(&self) -> Option<u32>;
}

impl Sealed for DispatchFrame {
    fn sealed_with(&self) -> Option<u32> {
        self.checksum
    }
}

impl Sealed for DispatchReply {
    fn sealed_with(&self) -> Option<u32> {
        self.checksum
    }
}

/// Bytes that [`put`] appends.
fn sizes<M: Message>(head: &M, rows: usize) -> (usize, usize) {
    let field = match rows {
        0 => 0,
        rows => key_len(ROWS) + encoded_len_varint(rows as u64) + rows,
    };
    let message = head.encoded_len() + field;
    (message, PREFIX + message)
}

/// Appends one message: `head`, whose own rows are empty, and `rows` bytes that
/// `write` puts. Allocates only when `buffer` has no room and none to reclaim.
pub fn put<M: Message>(
    buffer: &mut BytesMut,
    head: &M,
    rows: usize,
    write: impl FnOnce(&mut BytesMut),
) {
    let (message, all) = sizes(head, rows);
    buffer.reserve(all + SEAL);
    let end = buffer.len() + all;
    buffer.put_u8(0);
    buffer.put_u32(message as u32);
    head.encode_raw(buffer);
    if rows > 0 {
        encode_key(ROWS, WireType::LengthDelimited, buffer);
        encode_varint(rows as u64, buffer);
        write(buffer);
    }
    debug_assert_eq!(buffer.len(), end, "the rows are as long as was said");
}

/// Ends the one message in `buffer`, which [`put`] wrote, with its checksum.
pub fn seal(buffer: &mut BytesMut) {
    let Some(message) = buffer.get(PREFIX..) else { return };
    let checksum = crc32fast::hash(message);
    let length = (message.len() + SEAL) as u32;
    buffer[1..PREFIX].copy_from_slice(&length.to_be_bytes());
    buffer.put_slice(&SEALED);
    buffer.put_u32_le(checksum);
}

/// What messages that leave together are written into: one piece of memory, which is used again
/// once all of them have left.
#[derive(Default)]
pub struct Leaving {
    buffer: BytesMut,
    /// Bytes taken since [`Self::begin`], and the most there ever were.
    taken: usize,
    most: usize,
}

impl Leaving {
    /// Makes room for as much as ever left together, so that the first message does not
    /// leave the others without.
    pub fn begin(&mut self) {
        self.taken = 0;
        self.buffer.reserve(self.most + SEAL);
    }

    /// To write a message into.
    pub fn buffer(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// What was written since the last call.
    pub fn take(&mut self) -> Bytes {
        self.taken += self.buffer.len();
        self.most = self.most.max(self.taken);
        self.buffer.split().freeze()
    }
}

/// Cuts messages out of DATA as it arrives. A message that came in one piece is
/// a view of it; one in pieces is put together.
pub struct Messages {
    /// What has come and is not yet a message; at most one of the two has bytes.
    whole: Bytes,
    parts: BytesMut,
    limit: usize,
}

impl Messages {
    /// `limit` bounds one message, before anything is allocated for it.
    pub fn new(limit: usize) -> Self {
        Self { whole: Bytes::new(), parts: BytesMut::new(), limit }
    }

    /// Takes the next piece of DATA. All messages before it must have been taken.
    pub fn push(&mut self, data: Bytes) {
        if self.whole.is_empty() && self.parts.is_empty() {
            self.whole = data;
            return;
        }
        if !self.whole.is_empty() {
            let all = self.wanted().unwrap_or(PREFIX).max(self.whole.len() + data.len());
            self.parts.reserve(all);
            self.parts.extend_from_slice(&self.whole);
            self.whole = Bytes::new();
        }
        self.parts.extend_from_slice(&data);
    }

    /// The next complete message, without its prefix.
    ///
    /// # Errors
    /// A prefix that cannot be meant; the stream is lost.
    pub fn take(&mut self) -> Result<Option<Bytes>, WireError> {
        let Some(prefix) = self.have().first_chunk::<PREFIX>() else { return Ok(None) };
        if prefix[0] != 0 {
            return Err(WireError::Compressed);
        }
        let all = self.wanted().unwrap_or(PREFIX);
        if all - PREFIX > self.limit {
            return Err(WireError::TooLong { got: all - PREFIX, limit: self.limit });
        }
        if self.have().len() < all {
            return Ok(None);
        }
        let mut message = match self.parts.is_empty() {
            true => self.whole.split_to(all),
            false => self.parts.split_to(all).freeze(),
        };
        message.advance(PREFIX);
        Ok(Some(message))
    }

    /// Whether the stream may end here.
    ///
    /// # Errors
    /// It would cut a message.
    pub fn finish(&self) -> Result<(), WireError> {
        if self.have().is_empty() { Ok(()) } else { Err(WireError::Cut) }
    }

    fn have(&self) -> &[u8] {
        if self.parts.is_empty() { &self.whole } else { &self.parts }
    }

    /// Length of the message that has begun, with its prefix. Not yet trusted.
    fn wanted(&self) -> Option<usize> {
        let &[_, a, b, c, d] = self.have().first_chunk::<PREFIX>()?;
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        Some(PREFIX + length.min(self.limit.saturating_add(1)))
    }
}

/// Reads a message into `into`, whose vectors keep their room.
///
/// # Errors
/// It is no such message, or not what was sent.
pub fn read<M: Sealed>(message: Bytes, into: &mut M) -> Result<(), WireError> {
    into.clear();
    // Only a message that ends as a sealed one does is summed.
    let sum = match message.len().checked_sub(SEAL) {
        Some(end) if message[end..].starts_with(&SEALED) => Some(crc32fast::hash(&message[..end])),
        _ => None,
    };
    into.merge(message)?;
    match into.sealed_with() {
        None => Ok(()),
        said if said == sum => Ok(()),
        Some(_) => Err(WireError::Damaged),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    #[test]
    fn messages_that_left_together_give_their_memory_back() {
        let mut leaving = Leaving::default();
        let mut round = || {
            leaving.begin();
            let mut message = |byte| {
                leaving.buffer().extend_from_slice(&[byte; 100_000][..]);
                leaving.take()
            };
            [message(1), message(2), message(3)]
        };
        (0..3).for_each(|_| drop(round()));
        let places = |messages: [Bytes; 3]| messages.map(|message| message.as_ptr());
        let first = places(round());
        assert_eq!(first[2] as usize - first[0] as usize, 200_000, "one piece of memory");
        assert_eq!(places(round()), first);
        let held = round();
        assert!(round() != [const { Bytes::new() }; 3] && held[2][..] == [3; 100_000]);
    }

    use super::*;
    use crate::v1::SharedRows;

    fn frame() -> impl Strategy<Value = DispatchFrame> {
        let numbers = || prop::collection::vec(any::<u32>(), 0..9);
        let rows = prop::collection::vec(any::<u8>(), 0..400);
        (any::<(u64, u32, u32, u64, u32)>(), numbers(), numbers(), numbers(), "[ -~]{0,9}", rows)
            .prop_map(|(n, slot_counts, experts, versions, traceparent, rows)| DispatchFrame {
                ticket: n.0,
                attempt: n.1,
                layer: n.2,
                epoch: n.3,
                dtype: 1,
                hidden: n.4,
                timeout_us: n.4 / 2,
                slot_counts,
                experts,
                versions,
                traceparent,
                reply_dtype: n.1 as i32 & 3,
                weights: vec![0.5; n.2 as usize & 3],
                shared: (n.3 & 1 == 1).then_some(SharedRows {
                    at: n.0,
                    rows_bytes: n.3,
                    results_bytes: n.0,
                }),
                rows: rows.into(),
                checksum: None,
            })
    }

    proptest! {
        /// What `put` writes is what prost writes, and it is read back whatever
        /// the pieces it arrives in.
        #[test]
        fn the_wire_is_protobuf_and_pieces_do_not_matter(
            frames in prop::collection::vec(frame(), 1..5),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let mut wire = BytesMut::new();
            let mut plain = Vec::new();
            for frame in &frames {
                let head = DispatchFrame { rows: Bytes::new(), ..frame.clone() };
                put(&mut wire, &head, frame.rows.len(), |buffer| buffer.put_slice(&frame.rows));
                let message = frame.encode_to_vec();
                plain.push(0);
                plain.extend((message.len() as u32).to_be_bytes());
                plain.extend(message);
            }
            prop_assert_eq!(&wire[..], &plain[..]);

            let wire = wire.freeze();
            let mut ends: Vec<usize> = cuts.iter().map(|cut| cut.index(wire.len())).collect();
            ends.extend([0, wire.len()]);
            ends.sort_unstable();
            let mut messages = Messages::new(1 << 20);
            let mut got = Vec::new();
            let mut into = DispatchFrame { experts: vec![7; 3], ..Default::default() };
            for piece in ends.windows(2) {
                messages.push(wire.slice(piece[0]..piece[1]));
                while let Some(message) = messages.take().unwrap() {
                    read(message, &mut into).unwrap();
                    got.push(into.clone());
                }
            }
            prop_assert_eq!(got, frames);
            prop_assert_eq!(messages.finish(), Ok(()));
        }

        /// A sealed message is an ordinary one, and whichever bit of it flips, that is seen
        /// or changes nothing.
        #[test]
        fn a_flipped_bit_is_seen(frame in frame(), flip in any::<prop::sample::Index>()) {
            let mut wire = BytesMut::new();
            let head = DispatchFrame { rows: Bytes::new(), ..frame.clone() };
            put(&mut wire, &head, frame.rows.len(), |buffer| buffer.put_slice(&frame.rows));
            seal(&mut wire);
            let mut messages = Messages::new(1 << 20);
            messages.push(wire.clone().freeze());
            let message = messages.take().unwrap().unwrap();
            prop_assert_eq!(messages.finish(), Ok(()));
            let mut into = DispatchFrame::default();
            read(message.clone(), &mut into).unwrap();
            prop_assert_eq!(DispatchFrame { checksum: None, ..into.clone() }, frame.clone());
            prop_assert_eq!(into.encode_to_vec(), message.to_vec());

            let mut flipped = message.to_vec();
            let bit = flip.index(flipped.len() * 8);
            flipped[bit / 8] ^= 1 << (bit % 8);
            if read(flipped.into(), &mut into).is_ok() {
                // It hit the checksum's own name, so there is none.
                prop_assert_eq!((into.checksum, DispatchFrame { checksum: None, ..into }), (None, frame));
            }
        }

        /// Whatever a peer sends, it is an error or a message, never a panic.
        #[test]
        fn noise_is_survived(pieces in prop::collection::vec(
            prop::collection::vec(any::<u8>(), 0..40), 0..20,
        )) {
            let mut messages = Messages::new(64);
            let mut into = DispatchFrame::default();
            'all: for piece in pieces {
                messages.push(piece.into());
                loop {
                    match messages.take() {
                        Ok(Some(message)) => _ = read(message, &mut into),
                        Ok(None) => break,
                        Err(_) => break 'all,
                    }
                }
            }
        }
    }

    #[test]
    fn a_message_in_one_piece_is_not_copied() {
        let mut wire = BytesMut::new();
        put(&mut wire, &DispatchFrame::default(), 3, |buffer| buffer.put_slice(&[1, 2, 3]));
        let wire = wire.freeze();
        let mut messages = Messages::new(64);
        messages.push(wire.clone());
        let mut into = DispatchFrame::default();
        read(messages.take().unwrap().unwrap(), &mut into).unwrap();
        assert_eq!(into.rows.as_ptr(), wire[wire.len() - 3..].as_ptr());
    }

    #[test]
    fn lengths_are_checked_before_they_are_believed() {
        let mut messages = Messages::new(8);
        messages.push(Bytes::from_static(&[0, 0xff, 0xff, 0xff, 0xff, 1]));
        let got = messages.take();
        assert_eq!(got, Err(WireError::TooLong { got: 9, limit: 8 }));
        let mut messages = Messages::new(8);
        messages.push(Bytes::from_static(&[1, 0, 0, 0, 0]));
        assert_eq!(messages.take(), Err(WireError::Compressed));
        let mut messages = Messages::new(8);
        messages.push(Bytes::from_static(&[0, 0, 0]));
        assert_eq!((messages.take(), messages.finish()), (Ok(None), Err(WireError::Cut)));
    }
}
