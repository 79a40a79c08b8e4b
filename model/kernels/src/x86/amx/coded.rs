//! FP8 for up to 32 rows: a panel of sixteen outputs at a time over all of k.
//!
//! Memory bounds this, so that nothing else may wait. Pieces of a k-block go through three turns: decoded; multiplied, by
//! steps between the rows of the next piece's decoding; scaled and added, once what tiles stored has settled. The turns
//! run on from one panel to the next. Sixteen rows of a piece are as many streams as hide each other's page walks, and
//! leave the first-level cache room for what was asked for early.

use super::panel::{self, Codes, Operand, Part, Scales};
use super::tiles::{self, EDGE, ROW, SUMS, TILE};
use super::{Right, lanes};
use crate::lanes::STEP;
use crate::mat::Mat;
use crate::packed::{Out, Packed, Segment};
use std::arch::x86_64::*;
use std::cell::RefCell;

/// Steps decoded at once, and rows decoded between two steps of multiplying.
const PIECE: usize = 4;
const ROWS: usize = EDGE / PIECE;
/// How far ahead of its use a row of the weight is asked for, in bytes.
const AHEAD: usize = 384;

/// Tiles of one piece.
#[repr(C, align(64))]
struct Decoded([u8; PIECE * TILE]);

/// Sums of two tiles of rows, each `[output][row]` without gaps, and room to load a whole register from the last.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Sums([[f32; EDGE * EDGE + EDGE]; 2]);

const ZERO: Sums = Sums([[0.0; EDGE * EDGE + EDGE]; 2]);

/// Working memory of a product; of two, one is the turn's before.
struct Memory {
    decoded: [Decoded; 2],
    blocks: [Sums; 2],
    sums: Sums,
}

thread_local! {
    /// Kept between products: to clear it takes longer than a small one.
    static MEMORY: RefCell<Option<Box<Memory>>> = const { RefCell::new(None) };
}

/// The product for `R` tiles of rows.
///
/// # Safety
/// Tiles are configured for `x`, which is packed for the FP8 weight `w`; `y` has their shape.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,gfni")]
pub(super) unsafe fn product<const R: usize>(x: &Packed, w: &Mat<'_>, y: &mut Out<'_>) {
    if w.k() == 0 {
        let (rows, outputs) = y.shape();
        for at in 0..rows * outputs {
            // SAFETY: inside the output, which is borrowed here alone.
            unsafe { *y.at(at / outputs, at % outputs) = 0.0 };
        }
        return;
    }
    let mut memory = MEMORY.take().unwrap_or_else(|| {
        Box::new(Memory {
            decoded: [const { Decoded([0; PIECE * TILE]) }; 2],
            blocks: [ZERO; 2],
            sums: ZERO,
        })
    });
    let right = Right::of(x);
    let turns = Turns { right, segments: x.segments(), w, block: None };
    // SAFETY: the caller's.
    unsafe { turns.compute::<R>(&mut memory, y) };
    MEMORY.set(Some(memory));
}

/// What is decoded at once.
#[derive(Clone, Copy)]
struct Piece {
    /// The panel's first output.
    n: usize,
    part: Part,
    /// Whether it ends its k-block, which is `index`, and its panel.
    ends: bool,
    index: usize,
    last: bool,
}

/// A k-block that has left the tiles.
#[derive(Clone, Copy)]
struct Block {
    n: usize,
    index: usize,
    last: bool,
}

struct Turns<'a> {
    right: Right<'a>,
    segments: &'a [Segment],
    w: &'a Mat<'a>,
    /// Not yet added to the sums.
    block: Option<Block>,
}

impl Turns<'_> {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,gfni")]
    unsafe fn compute<const R: usize>(mut self, memory: &mut Memory, y: &mut Out<'_>) {
        let (mut last, mut blocks) = (None::<Piece>, 0);
        memory.sums = ZERO;
        let mut pieces =
            Pieces { segments: self.segments, outputs: self.w.n(), n: 0, index: 0, done: 0 };
        // SAFETY: the caller's.
        unsafe {
            panel::zero::<1, R>();
            for turn in 0.. {
                let piece = pieces.next();
                if piece.is_none() && last.is_none() {
                    break;
                }
                let [even, odd] = &mut memory.decoded;
                let (now, before) = if turn % 2 == 0 { (even, odd) } else { (odd, even) };
                self.turn::<R>(piece.as_ref(), now, last.as_ref(), before);
                if let Some(Piece { n, index, last, ends: true, .. }) = last {
                    self.add::<R>(&memory.blocks[(blocks + 1) % 2], &mut memory.sums, y);
                    let to = &mut memory.blocks[blocks % 2].0;
                    tiles::store::<SUMS>(to[0].as_mut_ptr().cast(), self.right.stride());
                    if R > 1 {
                        tiles::store::<{ SUMS + 1 }>(to[1].as_mut_ptr().cast(), ROW);
                    }
                    panel::zero::<1, R>();
                    self.block = Some(Block { n, index, last });
                    blocks += 1;
                }
                last = piece;
            }
        }
        self.add::<R>(&memory.blocks[(blocks + 1) % 2], &mut memory.sums, y);
    }

    /// Decodes `piece` and multiplies the one before.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,gfni")]
    unsafe fn turn<const R: usize>(
        &self,
        piece: Option<&Piece>,
        Decoded(out): &mut Decoded,
        before: Option<&Piece>,
        Decoded(decoded): &Decoded,
    ) {
        let (w, stride) = (self.w, self.w.stride());
        let mut rows = None;
        if let Some(Piece { n, part, .. }) = piece {
            let at = self.ahead(part.from);
            match n + EDGE <= w.n() && part.len == PIECE * STEP {
                true => rows = Some((w.row_bytes(*n)[part.from..].as_ptr(), at)),
                false => panel::decode(w, *n, *part, out, |byte| byte.wrapping_add(at)),
            }
        }
        let (step, steps) = before.map_or((0, 0), |b| (b.part.step, b.part.steps()));
        for i in 0..PIECE {
            // SAFETY: the caller's; the panel's sixteen rows hold the piece, and `out` its tiles.
            unsafe {
                if let Some((first, at)) = rows {
                    // Anew, so that they stay in registers here.
                    let codes = Codes::new();
                    for row in i * ROWS..(i + 1) * ROWS {
                        let from = first.wrapping_add(row * stride);
                        let to = out[row * ROW..].as_mut_ptr();
                        for half in 0..PIECE / 2 {
                            let p = from.wrapping_add(half * 2 * STEP);
                            _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(at).cast());
                            let [a, b] = codes.pairs(_mm512_loadu_si512(p.cast()));
                            let to = to.wrapping_add(half * 2 * TILE);
                            _mm512_storeu_si512(to.cast(), a);
                            _mm512_storeu_si512(to.wrapping_add(TILE).cast(), b);
                        }
                    }
                }
                if i < steps {
                    let first = decoded[i * TILE..].as_ptr();
                    let left = Operand { first: [first, first], stride: ROW, step: TILE };
                    panel::run::<1, R>(left, self.right.operand::<R>(step + i), 1, |_| ());
                }
            }
        }
    }

    /// From byte `at` of a row to what is due [`AHEAD`] bytes later: further on, or in the next panel's row.
    fn ahead(&self, at: usize) -> usize {
        let wrap = (EDGE * self.w.stride()).wrapping_sub(self.w.k());
        if at + AHEAD < self.w.k() { AHEAD } else { AHEAD.wrapping_add(wrap) }
    }

    /// Adds the block that left the tiles, times its scales, to the sums, and puts them into the output if it was the
    /// panel's last.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,gfni")]
    fn add<const R: usize>(&mut self, Sums(block): &Sums, Sums(sums): &mut Sums, y: &mut Out<'_>) {
        let Some(Block { n, index, last }) = self.block.take() else { return };
        let columns = self.right.columns;
        let factors = factors(self.w, n, index);
        for r in 0..R {
            let rows = block[r].as_chunks::<EDGE>().0.iter().zip(sums[r].as_chunks_mut::<EDGE>().0);
            for ((block, sums), output) in rows.zip(&OUTPUTS[columns - 1][..columns]) {
                // SAFETY: sixteen elements each.
                unsafe {
                    let output = _mm512_cvtepu8_epi32(_mm_loadu_si128(output.as_ptr().cast()));
                    let factor = _mm512_permutexvar_ps(output, factors);
                    let (block, sum) =
                        (_mm512_loadu_ps(block.as_ptr()), _mm512_loadu_ps(sums.as_ptr()));
                    _mm512_storeu_ps(sums.as_mut_ptr(), _mm512_fmadd_ps(block, factor, sum));
                }
            }
        }
        if last {
            let rows = y.shape().0;
            for (r, sums) in sums[..R].iter_mut().enumerate() {
                collect(sums, columns, y, r * EDGE, EDGE.min(rows - r * EDGE), n);
                sums.fill(0.0);
            }
        }
    }
}

/// The scales of k-block `index` of the outputs from `n`; beyond the last, of the last.
#[inline]
#[target_feature(enable = "avx512f")]
fn factors(w: &Mat<'_>, n: usize, index: usize) -> __m512 {
    let scale = |scales: Scales<'_>| f32::from_le_bytes(scales[index]);
    let (first, last) = (panel::scales(w, n), panel::scales(w, n + EDGE - 1));
    if first.as_ptr() == last.as_ptr() {
        return _mm512_set1_ps(scale(first));
    }
    let factors: [f32; EDGE] = std::array::from_fn(|i| scale(panel::scales(w, n + i)));
    // SAFETY: sixteen elements.
    unsafe { _mm512_loadu_ps(factors.as_ptr()) }
}

/// For each number of rows, whose output each element of [`Sums`] is.
static OUTPUTS: [[[u8; EDGE]; EDGE]; EDGE] = {
    let mut table = [[[0; EDGE]; EDGE]; EDGE];
    let mut at = 0;
    while at < EDGE * EDGE * EDGE {
        let (columns, element) = (at / (EDGE * EDGE) + 1, at % (EDGE * EDGE));
        if element < EDGE * columns {
            table[columns - 1][element / EDGE][element % EDGE] = (element / columns) as u8;
        }
        at += 1;
    }
    table
};

/// Puts `sums`, outputs from `n` by `columns` rows, into rows `row..row + rows` of the output.
#[target_feature(enable = "avx512f")]
fn collect(sums: &[f32], columns: usize, y: &mut Out<'_>, row: usize, rows: usize, n: usize) {
    let mask = lanes(EDGE.min(y.shape().1 - n));
    if columns == 1 {
        // SAFETY: sixteen sums, and the row has as many columns from n as the mask.
        return unsafe {
            _mm512_mask_storeu_ps(y.at(row, n), mask, _mm512_loadu_ps(sums.as_ptr()));
        };
    }
    let mut outputs = [_mm512_setzero_si512(); EDGE];
    for (i, output) in outputs.iter_mut().enumerate() {
        let sums = &sums[i * columns..][..EDGE];
        // SAFETY: sixteen elements, those beyond the columns of no use.
        *output = unsafe { _mm512_loadu_si512(sums.as_ptr().cast()) };
    }
    for (r, values) in panel::transposed(outputs)[..rows].iter().enumerate() {
        // SAFETY: this row has as many columns from n as the mask.
        unsafe { _mm512_mask_storeu_epi32(y.at(row + r, n).cast(), mask, *values) };
    }
}

/// The pieces of all panels in turn.
struct Pieces<'a> {
    segments: &'a [Segment],
    outputs: usize,
    /// The next one's panel and k-block, and that block's steps before it.
    n: usize,
    index: usize,
    done: usize,
}

impl Iterator for Pieces<'_> {
    type Item = Piece;

    #[inline(always)]
    fn next(&mut self) -> Option<Piece> {
        let s = self.segments.get(self.index).filter(|_| self.n < self.outputs)?;
        let (n, index, done) = (self.n, self.index, self.done);
        let part = Part {
            from: s.from + done * STEP,
            len: (s.full * STEP + s.tail - done * STEP).min(PIECE * STEP),
            step: s.at / STEP + done,
        };
        let ends = done + PIECE >= s.steps();
        let last = ends && index + 1 == self.segments.len();
        (self.n, self.index, self.done) = match (last, ends) {
            (true, _) => (n + EDGE, 0, 0),
            (false, true) => (n, index + 1, 0),
            (false, false) => (n, index, done + PIECE),
        };
        Some(Piece { n, part, ends, index, last })
    }
}
