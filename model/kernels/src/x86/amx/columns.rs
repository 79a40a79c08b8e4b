//! `y = x w` by tiles (`tile.rs` defines it): activations are the left operand, the weight's rows, two by two, the right one.
//!
//! Attention's cached values and the keys' up-projection are stored with what is summed over as rows, so a weight has to
//! be interleaved: each pair of its rows as pairs of elements. Activations are copied into tiles with zeros for the rows
//! that they do not see. What a zero meets has to be finite: where it is not, rows that see the same go by themselves.
//! Both operands stay in the second-level cache, and sums go from the registers into the output.

use super::few::Few;
use super::panel::{self, Operand};
use super::tiles::{self, EDGE, ROW, SUMS, TILE, Tiles};
use crate::lanes::STEP;
use crate::packed::{Line, aligned};
use crate::transposed::Stack;
use half::bf16;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

thread_local! {
    /// Both operands in tiles, kept between products.
    static SCRATCH: RefCell<(Vec<Line>, Vec<Line>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// A product whose shapes have been checked.
pub(super) struct Columns<'a> {
    pub(super) x: &'a [bf16],
    pub(super) rows: usize,
    pub(super) ldx: usize,
    pub(super) w: Stack<'a>,
    pub(super) y: &'a mut [f32],
    pub(super) ldy: usize,
}

impl Columns<'_> {
    /// # Safety
    /// The CPU has tiles and AVX-512, and tiles are permitted; `x` and `y` have `rows` rows, `ldx` and `ldy` apart, of what
    /// they see and of the weight's columns.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    pub(super) unsafe fn compute(mut self) {
        let (rows, w) = (self.rows, self.w);
        if rows == 0 || w.k() == 0 {
            return;
        }
        let (least, most) = (w.seen(0), w.seen(rows - 1));
        let Columns { x, ldx, ldy, .. } = self;
        if least == most && (Few { x, rows, ldx, w, seen: most, y: self.y, ldy }.compute()) {
            return;
        }
        let (left, right) = &mut SCRATCH.take();
        // SAFETY: the caller's.
        unsafe {
            if least == most || w.finite(least..most) {
                self.run(0..rows, left, right);
            } else {
                let mut row = 0;
                while row < rows {
                    let end = w.alike(row).min(rows);
                    self.run(row..end, left, right);
                    row = end;
                }
            }
        }
        SCRATCH.set((std::mem::take(left), std::mem::take(right)));
    }

    /// Some rows, with as much of the weight as the last of them sees.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn run(&mut self, rows: Range<usize>, left: &mut Vec<Line>, right: &mut Vec<Line>) {
        let seen = self.w.seen(rows.end - 1);
        let steps = seen.div_ceil(STEP);
        let (tiles, columns) = (rows.len().div_ceil(EDGE), self.w.k().div_ceil(EDGE));
        let left = aligned::<u8>(left, tiles * steps * TILE);
        let right = aligned::<u8>(right, columns.next_multiple_of(2) * steps * TILE);
        self.fill_left(&rows, steps, left);
        interleave(&self.w, seen, steps, right);
        let mut pass = Pass {
            left,
            right,
            steps,
            rows: rows.len(),
            columns: self.w.k(),
            y: &mut self.y[rows.start * self.ldy..],
            ldy: self.ldy,
        };
        // SAFETY: the caller's; tiles of fewer rows only where there is one.
        unsafe {
            let _tiles = Tiles::configure_rows(rows.len().min(EDGE));
            for tile in (0..tiles).step_by(2) {
                for column in (0..columns).step_by(2) {
                    match (tiles - tile, columns - column) {
                        (1, 1) => pass.compute::<1, 1>(tile, column),
                        (1, _) => pass.compute::<1, 2>(tile, column),
                        (_, 1) => pass.compute::<2, 1>(tile, column),
                        _ => pass.compute::<2, 2>(tile, column),
                    }
                }
            }
        }
    }

    /// `[tile of rows][step][row]`, each 32 elements; zeros after what a row sees and after the last row.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    fn fill_left(&self, rows: &Range<usize>, steps: usize, out: &mut [u8]) {
        for (tile, out) in out.chunks_exact_mut((steps * TILE).max(1)).enumerate() {
            for r in 0..EDGE {
                let row = rows.start + tile * EDGE + r;
                let seen = if row < rows.end { self.w.seen(row) } else { 0 };
                for (step, out) in out.chunks_exact_mut(TILE).enumerate() {
                    let len = seen.saturating_sub(step * STEP).min(STEP);
                    let from = (row * self.ldx + step * STEP).min(self.x.len());
                    let x = &self.x[from..from + len];
                    let to = &mut out[r * ROW..(r + 1) * ROW];
                    // SAFETY: `len` elements are read; the row of the tile is 64 bytes.
                    unsafe {
                        let x = _mm512_maskz_loadu_epi16(mask(len), x.as_ptr().cast());
                        _mm512_storeu_si512(to.as_mut_ptr().cast(), x);
                    }
                }
            }
        }
    }
}

/// The first `len` of 32 elements.
fn mask(len: usize) -> u32 {
    u32::MAX.checked_shr((STEP - len) as u32).unwrap_or(0)
}

/// The first `seen` rows of `w` as `[tile of columns][step][pair of rows][column]`, zeros after them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn interleave(w: &Stack<'_>, seen: usize, steps: usize, out: &mut [u8]) {
    let mut rows = w.rows().take(seen);
    // Interleaving takes the lower half of each 128 bits, then the upper: they get the first sixteen columns and the others.
    let order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    for pair in 0..steps * EDGE {
        let (a, b) = (rows.next().unwrap_or_default(), rows.next().unwrap_or_default());
        let at = (pair / EDGE) * TILE + pair % EDGE * ROW;
        for (i, out) in out.chunks_exact_mut(2 * steps * TILE).enumerate() {
            let [a, b] = [a, b].map(|row| {
                let row = &row[(i * 2 * STEP).min(row.len())..];
                // SAFETY: as many elements as are left are read.
                let row = unsafe {
                    _mm512_maskz_loadu_epi16(mask((row.len() / 2).min(STEP)), row.as_ptr().cast())
                };
                _mm512_permutexvar_epi64(order, row)
            });
            let (first, second) = (&mut out[at..at + ROW], steps * TILE + at);
            // SAFETY: a row of a tile is 64 bytes.
            unsafe {
                let low = _mm512_unpacklo_epi16(a, b);
                _mm512_storeu_si512(first.as_mut_ptr().cast(), low);
                let second = &mut out[second..second + ROW];
                let high = _mm512_unpackhi_epi16(a, b);
                _mm512_storeu_si512(second.as_mut_ptr().cast(), high);
            }
        }
    }
}

/// Both operands, and where sums go.
struct Pass<'a> {
    left: &'a [u8],
    right: &'a [u8],
    steps: usize,
    rows: usize,
    columns: usize,
    y: &'a mut [f32],
    ldy: usize,
}

impl Pass<'_> {
    /// `P` tiles of rows and `R` of columns.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn compute<const P: usize, const R: usize>(&mut self, tile: usize, column: usize) {
        let steps = self.steps;
        let first = |operand: &[u8], first: usize, count: usize| Operand {
            first: [0, count - 1].map(|i| operand[(first + i) * steps * TILE..].as_ptr()),
            stride: ROW,
            step: TILE,
        };
        let (left, right) = (first(self.left, tile, P), first(self.right, column, R));
        // SAFETY: the caller's; operands have `steps` tiles.
        unsafe {
            panel::zero::<P, R>();
            panel::run::<P, R>(left, right, steps, |_| ());
            self.put::<SUMS>(tile, column);
            if R > 1 {
                self.put::<{ SUMS + 1 }>(tile, column + 1);
            }
            if P > 1 {
                self.put::<{ SUMS + 2 }>(tile + 1, column);
            }
            if P > 1 && R > 1 {
                self.put::<{ SUMS + 3 }>(tile + 1, column + 1);
            }
        }
    }

    /// Stores tile `T` as these rows and columns of the output.
    #[inline(always)]
    unsafe fn put<const T: u8>(&mut self, tile: usize, column: usize) {
        let (row, n) = (tile * EDGE, column * EDGE);
        let (rows, columns) = (EDGE.min(self.rows - row), EDGE.min(self.columns - n));
        let y = &mut self.y[row * self.ldy + n..];
        // A tile has sixteen rows unless it is the only one.
        if columns == EDGE && (rows == EDGE || row == 0) {
            assert!(y.len() >= (rows - 1) * self.ldy + EDGE, "a tile of the output");
            // SAFETY: the caller's; as many rows as are configured are there, by the assertion.
            unsafe { tiles::store::<T>(y.as_mut_ptr().cast(), self.ldy * 4) };
            return;
        }
        let mut spare = [[0.0f32; EDGE]; EDGE];
        // SAFETY: sixteen rows of 64 bytes.
        unsafe { tiles::store::<T>(spare.as_mut_ptr().cast(), ROW) };
        for (r, spare) in spare[..rows].iter().enumerate() {
            y[r * self.ldy..][..columns].copy_from_slice(&spare[..columns]);
        }
    }
}
