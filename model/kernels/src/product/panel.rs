//! Many rows: a panel of the weight is decoded once per block of k and passed over tiles of rows.
//!
//! Partial sums rest in memory between blocks as whole lanes, which changes no bit of them. Sizes follow the caches:
//! a decoded block of a panel and a row tile of it fit the first level, a panel's sums the second. While a block is
//! computed, the next one's weights are asked for, so that memory does not wait for arithmetic. The memory used is bounded by
//! a panel, whatever the number of rows.

use super::{padded, spread_nan, underflowed};
use crate::dot::{Bf16, Dot, F32, Fp8, Source};
use crate::lanes::{LANES, STEP, Simd, Task};
use crate::mat::{DType, Mat};
use crate::packed::{Line, Out, Packed, Segment, aligned};
use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

/// Outputs decoded together.
const PANEL: usize = 16;
/// The most rows whose partial sums are kept at once.
const GROUP: usize = 256;
/// Bytes of activations that are passed over every panel in turn: what stays in the second level beside the sums.
const GROUP_BYTES: usize = 1 << 20;
/// Steps of k decoded at once.
const BLOCK: usize = 12;

thread_local! {
    /// A decoded panel and the partial sums over it, kept between calls.
    static SCRATCH: RefCell<(Vec<Line>, Vec<Line>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

pub(super) unsafe fn many<D: Dot>(x: &Packed, w: &Mat<'_>, y: &mut Out<'_>) {
    let (parts, blocks) = cut(x.segments(), w.scales().is_some());
    let mut scratch = SCRATCH.take();
    let group = GROUP_BYTES / (x.width() * size_of::<D::Elem>()).max(1);
    let group = (group / D::TILE.0 * D::TILE.0).clamp(4 * D::TILE.0, GROUP);
    for from in (0..x.rows()).step_by(group) {
        let rows = from..x.rows().min(from + group);
        for n in (0..w.n()).step_by(PANEL) {
            let panel = Panel {
                x,
                w: w.rows(n..w.n().min(n + PANEL)),
                rows: rows.clone(),
                next: w.rows((n + PANEL).min(w.n())..w.n().min(n + 2 * PANEL)),
                parts: &parts,
                blocks: &blocks,
            };
            // SAFETY: the caller's; the panel's columns are inside the output, borrowed here alone.
            unsafe {
                let mut out = y.cols(n..n + panel.w.n());
                let hit = panel.compute::<D, false>(&mut scratch, &mut out);
                if D::FLUSHES && underflowed::<D>() {
                    panel.compute::<D, true>(&mut scratch, &mut out);
                    D::S::watch_underflow();
                }
                if hit {
                    spread_nan(&panel.w, 0..panel.w.n(), &mut out);
                }
            }
        }
    }
    SCRATCH.set(scratch);
}

/// The stretches of k, and the runs of them that are decoded together. A stretch without a scale may be cut anywhere at
/// a step, since its partial sums carry over; one with a scale is kept whole.
fn cut(segments: &[Segment], scaled: bool) -> (Vec<Segment>, Vec<Range<usize>>) {
    let mut parts = Vec::new();
    for s in segments {
        if scaled {
            parts.push(*s);
            continue;
        }
        for i in (0..s.steps()).step_by(BLOCK) {
            let (skip, end) = (i * STEP, s.steps().min(i + BLOCK));
            let tail = if end == s.steps() { s.tail } else { 0 };
            let full = s.full.min(end) - i;
            parts.push(Segment { from: s.from + skip, at: s.at + skip, full, tail });
        }
    }
    let (mut blocks, mut start, mut steps) = (Vec::new(), 0, 0);
    for (i, p) in parts.iter().enumerate() {
        steps += p.steps();
        if steps >= BLOCK || i + 1 == parts.len() {
            blocks.push(start..i + 1);
            (start, steps) = (i + 1, 0);
        }
    }
    (parts, blocks)
}

/// Up to [`PANEL`] outputs for up to [`GROUP`] rows.
struct Panel<'a> {
    x: &'a Packed,
    w: Mat<'a>,
    /// The panel after this one.
    next: Mat<'a>,
    rows: Range<usize>,
    parts: &'a [Segment],
    blocks: &'a [Range<usize>],
}

impl Panel<'_> {
    /// Says whether an FP8 NaN was met.
    unsafe fn compute<D: Dot, const EXACT: bool>(
        &self,
        (decoded, sums): &mut (Vec<Line>, Vec<Line>),
        y: &mut Out<'_>,
    ) -> bool {
        let (tile_r, tile_n) = D::TILE;
        let outputs = self.w.n().next_multiple_of(tile_n);
        let rows = self.rows.len();
        let sums = aligned::<f32>(sums, rows * outputs * LANES);
        sums.fill(0.0);
        let mut hit = false;
        let mut scales = Vec::new();
        let mut ahead = Vec::new();
        for (index, block) in self.blocks.iter().enumerate() {
            let parts = &self.parts[block.clone()];
            let at = parts[0].at;
            let width: usize = parts.iter().map(|p| p.steps() * STEP).sum();
            let panel = aligned::<D::Elem>(decoded, outputs * width);
            // SAFETY: the caller's.
            hit |= unsafe {
                match self.w.dtype() {
                    DType::F32 => decode::<D, F32>(&self.w, parts, panel, width),
                    DType::Bf16 => decode::<D, Bf16>(&self.w, parts, panel, width),
                    DType::Fp8 => decode::<D, Fp8>(&self.w, parts, panel, width),
                }
            };
            scales.clear();
            if let Some(table) = self.w.scales() {
                for n in 0..outputs {
                    let row = n.min(self.w.n() - 1);
                    let row = &table.row(row)[block.clone()];
                    scales.extend(row.iter().map(|s| f32::from_le_bytes(*s)));
                }
            }
            let panel = &*aligned::<D::Elem>(decoded, outputs * width);
            self.ahead(index + 1, &mut ahead);
            let x = &self.x.data::<D>()[self.rows.start * self.x.width()..];
            let (mut r, tiles) = (0, rows.div_ceil(tile_r));
            while r < rows {
                // As even as can be: a lone last row would wait for its own sums.
                let left = rows - r;
                let height = if EXACT { 1 } else { left.div_ceil(left.div_ceil(tile_r)) };
                // Each row tile asks for its share of an output tile's rows.
                let share = |n: usize, i: usize| ahead.len().min(n + tile_n * i.min(tiles) / tiles);
                let i = r / tile_r;
                for n in (0..outputs).step_by(tile_n) {
                    let tile = Tile::<D> {
                        x: x[r * self.x.width() + at..].as_ptr(),
                        x_ld: self.x.width(),
                        w: panel[n * width..].as_ptr(),
                        w_ld: width,
                        sums: sums[(r * outputs + n) * LANES..].as_mut_ptr(),
                        sums_ld: outputs * LANES,
                        parts,
                        scales: scales.get(n * parts.len()..).unwrap_or_default(),
                        ahead: &ahead[share(n, i)..share(n, i + 1)],
                        ahead_step: STEP * self.w.dtype().size(),
                    };
                    // SAFETY: the caller's; `height` rows and `tile_n` outputs are inside x, panel and sums.
                    unsafe { tile.compute::<EXACT>(height) };
                }
                r += height;
            }
        }
        let (row, n) = (self.rows.start, self.w.n());
        // SAFETY: the caller's; `y` is this panel's rows and columns.
        unsafe { D::S::run(Collect { sums, outputs, row, rows, n, y }) };
        hit
    }
}

impl Panel<'_> {
    /// Where the rows of block `block` begin, or those of the next panel's first block; `into` holds one for each output.
    fn ahead(&self, block: usize, into: &mut Vec<*const u8>) {
        let (w, block) = match self.blocks.get(block) {
            Some(block) => (&self.w, block),
            None => (&self.next, &self.blocks[0]),
        };
        let from = self.parts[block.start].from * w.dtype().size();
        into.clear();
        into.extend((0..w.n()).map(|n| w.row_bytes(n).as_ptr().wrapping_add(from)));
    }
}

/// Decodes `parts` of `w`'s rows into `panel`. Says whether an FP8 NaN was met.
unsafe fn decode<D: Dot, S: Source>(
    w: &Mat<'_>,
    parts: &[Segment],
    panel: &mut [D::Elem],
    width: usize,
) -> bool {
    // SAFETY: the caller's.
    unsafe { D::S::run(Decode::<D, S> { w, parts, panel, width, source: PhantomData }) }
}

/// Decodes a panel's rows, zeros after the last.
struct Decode<'a, D: Dot, S> {
    w: &'a Mat<'a>,
    parts: &'a [Segment],
    panel: &'a mut [D::Elem],
    width: usize,
    source: PhantomData<S>,
}

impl<D: Dot, S: Source> Task<D::S> for Decode<'_, D, S> {
    /// Whether an FP8 NaN was met.
    type Out = bool;

    #[inline(always)]
    unsafe fn call(self) -> bool {
        // SAFETY: the parts lie inside a row of the weight, and a row of the panel is their steps' length.
        unsafe {
            let mut watch = D::S::watch_new();
            for (n, out) in self.panel.chunks_exact_mut(self.width).enumerate() {
                if n >= self.w.n() {
                    out.fill(bytemuck::Zeroable::zeroed());
                    continue;
                }
                let row = self.w.row_bytes(n).as_ptr();
                let mut to = out.as_mut_ptr();
                for part in self.parts {
                    let from = row.add(part.from * S::SIZE);
                    for i in 0..part.steps() {
                        let mut p = from.add(i * STEP * S::SIZE);
                        let tail;
                        if i == part.full {
                            tail = padded::<S>(p, part.tail);
                            p = tail.as_ptr();
                        }
                        if S::WATCHED {
                            watch = D::S::watch(watch, p);
                        }
                        D::store(to, S::load::<D>(p));
                        to = to.add(STEP);
                    }
                }
            }
            S::WATCHED && D::S::watch_hit(watch)
        }
    }
}

/// One block of k for a tile of rows and outputs.
struct Tile<'a, D: Dot> {
    x: *const D::Elem,
    x_ld: usize,
    w: *const D::Elem,
    w_ld: usize,
    sums: *mut f32,
    sums_ld: usize,
    parts: &'a [Segment],
    /// One for each output and part, or none.
    scales: &'a [f32],
    /// What to ask for: from each of these on, `ahead_step` bytes a step.
    ahead: &'a [*const u8],
    ahead_step: usize,
}

/// A [`Tile`] of a size known to the compiler.
struct Fixed<'a, D: Dot, const R: usize, const N: usize, const EXACT: bool>(Tile<'a, D>);

impl<D: Dot> Tile<'_, D> {
    unsafe fn compute<const EXACT: bool>(self, height: usize) {
        const { assert!(matches!(D::TILE, (1..=3, 2) | (1..=6, 4))) };
        // SAFETY: the caller's: `height` rows and `D::TILE.1` outputs are there.
        unsafe {
            // Constant blocks, so that only the sizes a class asks for are compiled.
            if const { D::TILE.1 == 2 } {
                match height {
                    // Rare enough to go a row at a time.
                    1 if EXACT => D::S::run(Fixed::<D, 1, 2, true>(self)),
                    1 => D::S::run(Fixed::<D, 1, 2, false>(self)),
                    2 => D::S::run(Fixed::<D, 2, 2, false>(self)),
                    _ => D::S::run(Fixed::<D, 3, 2, false>(self)),
                }
            } else {
                match height {
                    1 if EXACT => D::S::run(Fixed::<D, 1, 4, true>(self)),
                    1 => D::S::run(Fixed::<D, 1, 4, false>(self)),
                    2 => D::S::run(Fixed::<D, 2, 4, false>(self)),
                    3 => D::S::run(Fixed::<D, 3, 4, false>(self)),
                    4 => D::S::run(Fixed::<D, 4, 4, false>(self)),
                    5 => D::S::run(Fixed::<D, 5, 4, false>(self)),
                    _ => D::S::run(Fixed::<D, 6, 4, false>(self)),
                }
            }
        }
    }
}

impl<D: Dot, const R: usize, const N: usize, const EXACT: bool> Task<D::S>
    for Fixed<'_, D, R, N, EXACT>
{
    type Out = ();

    #[allow(clippy::needless_range_loop, reason = "indices keep closures out of hot code")]
    #[inline(always)]
    unsafe fn call(self) {
        let t = self.0;
        let (mut x, mut w, mut ahead) = (t.x, t.w, 0);
        // SAFETY: x, w and sums cover R rows and N outputs of the parts' steps.
        unsafe {
            for (index, part) in t.parts.iter().enumerate() {
                let mut acc = [[D::S::zero(); N]; R];
                if t.scales.is_empty() {
                    for r in 0..R {
                        for n in 0..N {
                            acc[r][n] = D::S::load(t.sums.add(r * t.sums_ld + n * LANES));
                        }
                    }
                }
                for _ in 0..part.steps() {
                    for n in 0..N {
                        let pair = D::load(w.add(n * t.w_ld));
                        for r in 0..R {
                            let row = D::load(x.add(r * t.x_ld));
                            acc[r][n] = if EXACT {
                                D::step_exact(acc[r][n], pair, row)
                            } else {
                                D::step(acc[r][n], pair, row)
                            };
                        }
                    }
                    for p in t.ahead {
                        D::S::prefetch_far(p.wrapping_add(ahead));
                    }
                    ahead += t.ahead_step;
                    x = x.add(STEP);
                    w = w.add(STEP);
                }
                for r in 0..R {
                    for n in 0..N {
                        let at = t.sums.add(r * t.sums_ld + n * LANES);
                        let sum = if t.scales.is_empty() {
                            acc[r][n]
                        } else {
                            let scale = D::S::splat(t.scales[n * t.parts.len() + index]);
                            D::S::fma(acc[r][n], scale, D::S::load(at))
                        };
                        D::S::store(at, sum);
                    }
                }
            }
        }
    }
}

/// Adds up the lanes of a panel's sums `[rows, outputs]` into the output from `row`.
struct Collect<'a, 'b> {
    sums: &'a [f32],
    outputs: usize,
    row: usize,
    rows: usize,
    n: usize,
    y: &'a mut Out<'b>,
}

impl<S: Simd> Task<S> for Collect<'_, '_> {
    type Out = ();

    #[inline(always)]
    unsafe fn call(self) {
        for r in 0..self.rows {
            for n in 0..self.n {
                let at = &self.sums[(r * self.outputs + n) * LANES..][..LANES];
                // SAFETY: sixteen lanes are there, and the output has this row and column.
                unsafe { *self.y.at(self.row + r, n) = S::sum(S::load(at.as_ptr())) };
            }
        }
    }
}
