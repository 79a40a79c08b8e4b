//! Many rows: a panel of the weight is decoded once per block of k and passed over tiles of rows.
//!
//! Partial sums rest in memory between blocks as whole lanes, which changes no bit of them. Sizes follow the caches:
//! a row tile and an output tile of one block fit the first level, a panel's sums the second. The memory used is
//! bounded by a panel, whatever the number of rows.

use super::{padded, spread_nan, underflowed};
use crate::dot::{Dot, Source};
use crate::lanes::{LANES, STEP, Simd, Task};
use crate::mat::Mat;
use crate::packed::{Line, Out, Packed, Segment, aligned};
use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

/// Outputs decoded together.
const PANEL: usize = 16;
/// Rows whose partial sums are kept at once.
const GROUP: usize = 256;
/// Steps of k decoded at once.
const BLOCK: usize = 16;

thread_local! {
    /// A decoded panel and the partial sums over it, kept between calls.
    static SCRATCH: RefCell<(Vec<Line>, Vec<Line>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

pub(super) unsafe fn many<D: Dot, S: Source>(x: &Packed, w: &Mat<'_>, y: &mut Out<'_>) {
    let (parts, blocks) = cut(x.segments(), w.scales().is_some());
    let mut scratch = SCRATCH.take();
    for from in (0..x.rows()).step_by(GROUP) {
        let rows = from..x.rows().min(from + GROUP);
        for n in (0..w.n()).step_by(PANEL) {
            let panel = Panel {
                x,
                w: w.rows(n..w.n().min(n + PANEL)),
                rows: rows.clone(),
                parts: &parts,
                blocks: &blocks,
            };
            // SAFETY: the caller's; the panel's columns are inside the output, borrowed here alone.
            unsafe {
                let mut out = y.cols(n..n + panel.w.n());
                let hit = panel.compute::<D, S, false>(&mut scratch, &mut out);
                if underflowed::<D>() {
                    panel.compute::<D, S, true>(&mut scratch, &mut out);
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
    rows: Range<usize>,
    parts: &'a [Segment],
    blocks: &'a [Range<usize>],
}

impl Panel<'_> {
    /// Says whether an FP8 NaN was met.
    unsafe fn compute<D: Dot, S: Source, const EXACT: bool>(
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
        for block in self.blocks {
            let parts = &self.parts[block.clone()];
            let at = parts[0].at;
            let width: usize = parts.iter().map(|p| p.steps() * STEP).sum();
            let panel = aligned::<D::Elem>(decoded, outputs * width);
            let task = Decode::<D, S> { w: &self.w, parts, panel, width, source: PhantomData };
            // SAFETY: the caller's.
            hit |= unsafe { D::S::run(task) };
            scales.clear();
            if let Some(table) = self.w.scales() {
                for n in 0..outputs {
                    let row = n.min(self.w.n() - 1);
                    scales.extend(block.clone().map(|segment| table.get(row, segment)));
                }
            }
            let panel = &*aligned::<D::Elem>(decoded, outputs * width);
            let x = &self.x.data::<D>()[self.rows.start * self.x.width()..];
            let mut r = 0;
            while r < rows {
                let height = if EXACT { 1 } else { tile_r.min(rows - r) };
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
}

/// A [`Tile`] of a size known to the compiler.
struct Fixed<'a, D: Dot, const R: usize, const N: usize, const EXACT: bool>(Tile<'a, D>);

impl<D: Dot> Tile<'_, D> {
    unsafe fn compute<const EXACT: bool>(self, height: usize) {
        // SAFETY: the caller's: `height` rows and `D::TILE.1` outputs are there.
        unsafe {
            match (height, D::TILE.1) {
                (1, 2) => D::S::run(Fixed::<D, 1, 2, EXACT>(self)),
                (2, 2) => D::S::run(Fixed::<D, 2, 2, EXACT>(self)),
                (3, 2) => D::S::run(Fixed::<D, 3, 2, EXACT>(self)),
                (1, 4) => D::S::run(Fixed::<D, 1, 4, EXACT>(self)),
                (2, 4) => D::S::run(Fixed::<D, 2, 4, EXACT>(self)),
                (3, 4) => D::S::run(Fixed::<D, 3, 4, EXACT>(self)),
                (4, 4) => D::S::run(Fixed::<D, 4, 4, EXACT>(self)),
                (5, 4) => D::S::run(Fixed::<D, 5, 4, EXACT>(self)),
                (6, 4) => D::S::run(Fixed::<D, 6, 4, EXACT>(self)),
                other => unreachable!("no tile of {other:?}"),
            }
        }
    }
}

impl<D: Dot, const R: usize, const N: usize, const EXACT: bool> Task<D::S>
    for Fixed<'_, D, R, N, EXACT>
{
    type Out = ();

    #[inline(always)]
    unsafe fn call(self) {
        let t = self.0;
        let (mut x, mut w) = (t.x, t.w);
        // SAFETY: x, w and sums cover R rows and N outputs of the parts' steps.
        unsafe {
            for (index, part) in t.parts.iter().enumerate() {
                let mut acc = [[D::S::zero(); N]; R];
                if t.scales.is_empty() {
                    for (r, acc) in acc.iter_mut().enumerate() {
                        for (n, acc) in acc.iter_mut().enumerate() {
                            *acc = D::S::load(t.sums.add(r * t.sums_ld + n * LANES));
                        }
                    }
                }
                for _ in 0..part.steps() {
                    let pairs: [D::Pair; N] = std::array::from_fn(|n| D::load(w.add(n * t.w_ld)));
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let row = D::load(x.add(r * t.x_ld));
                        for n in 0..N {
                            acc[n] = if EXACT {
                                D::step_exact(acc[n], pairs[n], row)
                            } else {
                                D::step(acc[n], pairs[n], row)
                            };
                        }
                    }
                    x = x.add(STEP);
                    w = w.add(STEP);
                }
                for (r, acc) in acc.iter().enumerate() {
                    for (n, acc) in acc.iter().enumerate() {
                        let at = t.sums.add(r * t.sums_ld + n * LANES);
                        let sum = if t.scales.is_empty() {
                            *acc
                        } else {
                            let scale = D::S::splat(t.scales[n * t.parts.len() + index]);
                            D::S::fma(*acc, scale, D::S::load(at))
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
