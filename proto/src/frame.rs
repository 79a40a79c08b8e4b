//! Activation frames: the one place that knows how rows and slots lie in a
//! [`DispatchFrame`] and a [`DispatchReply`].
//!
//! Every length is checked against shape × dtype here, before a receiver
//! allocates or reads anything on behalf of a peer. What passes is safe to index.

use multiversion::multiversion;

use crate::MAX_MESSAGE_BYTES;
use crate::v1::{DispatchFrame, DispatchReply, Dtype, SharedRows};

/// Room kept for a frame's header fields beside its rows.
const HEADER_BYTES: usize = 64 << 10;
/// Worst case of one slot's numbers on the wire (expert, version, weight, share of counts).
const SLOT_BYTES: usize = 19;
/// Values that one scale of an FP8 row is for.
pub const FP8_BLOCK: usize = 128;

/// Why a frame or reply was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("dtype {0} is not known")]
    DType(i32),
    #[error("hidden is {got}, the model's is {want}")]
    Hidden { got: u32, want: u32 },
    #[error("results cannot be had as dtype {0}")]
    ReplyDtype(i32),
    #[error("the weight of slot {slot} is not finite")]
    Weight { slot: usize },
    #[error("a frame carries at least one row")]
    Empty,
    #[error("{what} holds {got} entries, {want} expected")]
    Count { what: &'static str, got: usize, want: usize },
    #[error("row {row} has {got} expert slots, 1 to {max} expected")]
    Slots { row: usize, got: u32, max: u32 },
    #[error("rows hold {got} bytes, {want} expected")]
    Bytes { got: usize, want: usize },
    #[error("rows are both in the message and in shared memory")]
    Twice,
    #[error("{what} are {bytes} bytes from {at} of shared memory, of which the stream has {size}")]
    Place { what: &'static str, at: u64, bytes: u64, size: usize },
    #[error("row {row} names expert {expert} of {experts}")]
    Expert { row: usize, expert: u32, experts: u32 },
    #[error("row {row} names expert {expert} twice or out of order")]
    Order { row: usize, expert: u32 },
}

/// What is wrong with a reply with a value that is no number or infinite.
pub const NOT_FINITE: &str = "its results are not finite";

/// The sizes a receiver checks a frame against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub hidden: u32,
    /// Routed experts of a layer.
    pub experts: u32,
    /// Most experts a row may name.
    pub top_k: u32,
}

impl Dtype {
    /// Bytes of a row of `hidden` values.
    pub fn row_bytes(self, hidden: usize) -> usize {
        match self {
            Dtype::Bf16 => hidden.saturating_mul(2),
            Dtype::F32 | Dtype::Unspecified => hidden.saturating_mul(4),
            Dtype::Fp8 => hidden.saturating_add(hidden.div_ceil(FP8_BLOCK) * 4),
        }
    }
}

fn dtype(raw: i32) -> Result<Dtype, FrameError> {
    match Dtype::try_from(raw) {
        Ok(Dtype::Unspecified) | Err(_) => Err(FrameError::DType(raw)),
        Ok(known) => Ok(known),
    }
}

/// How many rows fit one message when every row and every one of its `slots`
/// results must travel, the larger of both in `dtype`: at least one.
pub fn max_rows(hidden: u32, dtype: Dtype, slots: u32) -> usize {
    let row = dtype.row_bytes(hidden as usize);
    let out = row * slots.max(1) as usize + SLOT_BYTES * slots as usize;
    ((MAX_MESSAGE_BYTES - HEADER_BYTES) / row.max(out).max(1)).max(1)
}

/// Checks a frame against the model's shape and the bytes of memory that its stream
/// shares; returns its dtype and slot count.
///
/// # Errors
/// The first contradiction found. Nothing was allocated for it.
pub fn check(
    frame: &DispatchFrame,
    shape: Shape,
    shared: usize,
) -> Result<(Dtype, usize), FrameError> {
    let dtype = dtype(frame.dtype)?;
    if frame.hidden != shape.hidden {
        return Err(FrameError::Hidden { got: frame.hidden, want: shape.hidden });
    }
    let rows = frame.slot_counts.len();
    if rows == 0 {
        return Err(FrameError::Empty);
    }
    let mut slots = 0usize;
    for (row, &got) in frame.slot_counts.iter().enumerate() {
        if got == 0 || got > shape.top_k {
            return Err(FrameError::Slots { row, got, max: shape.top_k });
        }
        slots += got as usize;
    }
    if frame.experts.len() != slots {
        return Err(FrameError::Count { what: "experts", got: frame.experts.len(), want: slots });
    }
    if !frame.versions.is_empty() && frame.versions.len() != slots {
        return Err(FrameError::Count { what: "versions", got: frame.versions.len(), want: slots });
    }
    if !frame.weights.is_empty() && frame.weights.len() != slots {
        return Err(FrameError::Count { what: "weights", got: frame.weights.len(), want: slots });
    }
    if let Some(slot) = frame.weights.iter().position(|weight| !weight.is_finite()) {
        return Err(FrameError::Weight { slot });
    }
    match Dtype::try_from(frame.reply_dtype) {
        Ok(Dtype::Unspecified | Dtype::F32 | Dtype::Bf16) => {}
        Ok(Dtype::Fp8) | Err(_) => return Err(FrameError::ReplyDtype(frame.reply_dtype)),
    }
    let want = rows.saturating_mul(dtype.row_bytes(shape.hidden as usize));
    let got = match &frame.shared {
        Some(_) if !frame.rows.is_empty() => return Err(FrameError::Twice),
        Some(place) => check_place(place, shared)?,
        None => frame.rows.len(),
    };
    if got != want {
        return Err(FrameError::Bytes { got, want });
    }
    let mut experts = frame.experts.iter();
    for (row, &count) in frame.slot_counts.iter().enumerate() {
        let mut last = None;
        for &expert in experts.by_ref().take(count as usize) {
            if expert >= shape.experts {
                return Err(FrameError::Expert { row, expert, experts: shape.experts });
            }
            if last.is_some_and(|l| l >= expert) {
                return Err(FrameError::Order { row, expert });
            }
            last = Some(expert);
        }
    }
    Ok((dtype, slots))
}

/// Whether what is said to stand in `size` bytes of shared memory lies in them; how long the rows are.
fn check_place(place: &SharedRows, size: usize) -> Result<usize, FrameError> {
    let SharedRows { at, rows_bytes, results_bytes } = *place;
    for (what, bytes) in [("rows", rows_bytes), ("results", results_bytes)] {
        if at.checked_add(bytes).is_none_or(|end| end > size as u64) {
            return Err(FrameError::Place { what, at, bytes, size });
        }
    }
    // Within `size`, which is of this process.
    Ok(rows_bytes as usize)
}

/// Checks a reply that carries results: `rows` rows of `hidden` values.
pub fn check_reply(
    reply: &DispatchReply,
    hidden: u32,
    want_dtype: Dtype,
    rows: usize,
) -> Result<(), FrameError> {
    if dtype(reply.dtype)? != want_dtype {
        return Err(FrameError::DType(reply.dtype));
    }
    if reply.hidden != hidden {
        return Err(FrameError::Hidden { got: reply.hidden, want: hidden });
    }
    let want = rows * want_dtype.row_bytes(hidden as usize);
    if reply.rows.len() != want {
        return Err(FrameError::Bytes { got: reply.rows.len(), want });
    }
    Ok(())
}

/// True when every value of `rows` is finite. Rows in FP8 are looked at elsewhere (`model::rows`).
///
/// Compiled for the vectors that CPUs have: each row of a large frame passes here three times on its
/// way, and by the least that an x86-64 has this took a third of the way's work.
#[multiversion(targets("x86_64+avx512f+avx512bw", "x86_64+avx2"))]
pub fn all_finite(rows: &[u8], dtype: Dtype) -> bool {
    // A value is NaN or infinite exactly when its exponent bits are all ones. Blocks are tested whole,
    // value by value as arrays and without a branch inside, so that they vectorize.
    let mut blocks = rows.chunks(4096);
    match dtype {
        Dtype::Bf16 => blocks.all(|block| {
            // Signed, as every instruction set has the larger of two of those.
            let magnitude = |b: &[u8; 2]| i16::from_le_bytes(*b) & 0x7fff;
            let values = block.as_chunks().0.iter();
            values.fold(0, |most: i16, b| most.max(magnitude(b))) < 0x7f80
        }),
        Dtype::F32 | Dtype::Unspecified | Dtype::Fp8 => blocks.all(|block| {
            let bad = |b: &[u8; 4]| u32::from_le_bytes(*b) & 0x7f80_0000 == 0x7f80_0000;
            block.as_chunks().0.iter().fold(0, |any, b| any | u32::from(bad(b))) == 0
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape { hidden: 4, experts: 8, top_k: 2 };

    fn frame() -> DispatchFrame {
        DispatchFrame {
            dtype: Dtype::Bf16 as i32,
            hidden: 4,
            slot_counts: vec![2, 1],
            experts: vec![1, 5, 0],
            rows: vec![0; 16].into(),
            ..Default::default()
        }
    }

    /// All of 100 bytes.
    fn place() -> Option<SharedRows> {
        Some(SharedRows { at: 76, rows_bytes: 16, results_bytes: 24 })
    }

    #[test]
    fn a_sound_frame_passes() {
        assert_eq!(check(&frame(), SHAPE, 0), Ok((Dtype::Bf16, 3)));
        let shared = DispatchFrame { rows: Default::default(), shared: place(), ..frame() };
        assert_eq!(check(&shared, SHAPE, 100), Ok((Dtype::Bf16, 3)));
    }

    #[test]
    fn every_contradiction_is_named() {
        type Edit = fn(&mut DispatchFrame);
        let cases: &[(Edit, FrameError)] = &[
            (|f| f.dtype = 9, FrameError::DType(9)),
            (|f| f.dtype = 0, FrameError::DType(0)),
            (|f| f.hidden = 1 << 31, FrameError::Hidden { got: 1 << 31, want: 4 }),
            (|f| f.slot_counts.clear(), FrameError::Empty),
            (|f| f.slot_counts[1] = 0, FrameError::Slots { row: 1, got: 0, max: 2 }),
            (|f| f.slot_counts[0] = u32::MAX, FrameError::Slots { row: 0, got: u32::MAX, max: 2 }),
            (|f| f.experts.push(1), FrameError::Count { what: "experts", got: 4, want: 3 }),
            (|f| f.versions = vec![1], FrameError::Count { what: "versions", got: 1, want: 3 }),
            (|f| f.rows = vec![0; 15].into(), FrameError::Bytes { got: 15, want: 16 }),
            (|f| f.experts[2] = 8, FrameError::Expert { row: 1, expert: 8, experts: 8 }),
            (|f| f.experts[1] = 1, FrameError::Order { row: 0, expert: 1 }),
            (|f| f.weights = vec![1.0], FrameError::Count { what: "weights", got: 1, want: 3 }),
            (|f| f.weights = vec![1.0, f32::NAN, 1.0], FrameError::Weight { slot: 1 }),
            (|f| f.reply_dtype = 3, FrameError::ReplyDtype(3)),
            (|f| f.reply_dtype = 9, FrameError::ReplyDtype(9)),
            (
                |f| (f.dtype, f.rows) = (Dtype::Fp8 as i32, vec![0; 8].into()),
                FrameError::Bytes { got: 8, want: 16 },
            ),
        ];
        for (edit, want) in cases {
            let mut bad = frame();
            edit(&mut bad);
            assert_eq!(check(&bad, SHAPE, 100), Err(want.clone()));
        }
    }

    #[test]
    fn places_outside_shared_memory_are_named() {
        type Edit = fn(&mut SharedRows);
        let place_of = |what, at, bytes| FrameError::Place { what, at, bytes, size: 100 };
        let cases: &[(Edit, FrameError)] = &[
            (|p| p.at = 85, place_of("rows", 85, 16)),
            (|p| p.at = u64::MAX, place_of("rows", u64::MAX, 16)),
            (|p| p.results_bytes = 25, place_of("results", 76, 25)),
            (|p| p.results_bytes = u64::MAX, place_of("results", 76, u64::MAX)),
            (|p| p.rows_bytes = 8, FrameError::Bytes { got: 8, want: 16 }),
        ];
        for (edit, want) in cases {
            let mut bad = DispatchFrame { rows: Default::default(), shared: place(), ..frame() };
            edit(bad.shared.as_mut().unwrap());
            assert_eq!(check(&bad, SHAPE, 100), Err(want.clone()));
        }
        let twice = DispatchFrame { shared: place(), ..frame() };
        assert_eq!(check(&twice, SHAPE, 100), Err(FrameError::Twice));
    }

    #[test]
    fn rows_and_results_stay_under_the_message_limit() {
        for (hidden, slots) in [(7168u32, 8u32), (256, 4), (1 << 20, 8)] {
            let rows = max_rows(hidden, Dtype::F32, slots);
            assert!(rows >= 1);
            if rows > 1 {
                assert!(rows * hidden as usize * 4 * slots as usize <= MAX_MESSAGE_BYTES);
            }
        }
    }

    #[test]
    fn non_finite_values_are_found_wherever_they_stand() {
        let bf = |x: f32| ((x.to_bits() >> 16) as u16).to_le_bytes();
        let fine = [1.0, -0.0, f32::MIN_POSITIVE, f32::MAX, -f32::MAX];
        let bad = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
        // Shorter than any vector, and around the ends of vectors and blocks.
        for values in [1, 2, 31, 33, 100, 1023, 1025, 2049] {
            let f32s: Vec<_> = (0..values).flat_map(|i| fine[i % 5].to_le_bytes()).collect();
            let bf16s: Vec<_> = (0..values).flat_map(|i| bf(fine[i % 5])).collect();
            assert!(all_finite(&f32s, Dtype::F32) && all_finite(&bf16s, Dtype::Bf16));
            for (at, bad) in (0..values).zip(bad.into_iter().cycle()) {
                let (mut f32s, mut bf16s) = (f32s.clone(), bf16s.clone());
                f32s[4 * at..][..4].copy_from_slice(&bad.to_le_bytes());
                bf16s[2 * at..][..2].copy_from_slice(&bf(bad));
                assert!(!all_finite(&f32s, Dtype::F32), "{bad} at {at} of {values}");
                assert!(!all_finite(&bf16s, Dtype::Bf16), "{bad} at {at} of {values}");
            }
        }
    }
}
