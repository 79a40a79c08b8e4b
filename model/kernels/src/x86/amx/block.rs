//! More rows: blocks of the weight are decoded once and passed over tiles of rows, since arithmetic bounds this.
//!
//! A block of two panels stays in the first-level cache, its rows' activations and sums in the second; sums rest in
//! memory between blocks, which changes no bit of them. The next block is asked for meanwhile. The memory used does not
//! grow with the rows or the outputs.

use super::Right;
use super::panel::{self, Operand, Part, Sums, collect, decode};
use super::tiles::{EDGE, ROW, TILE};
use crate::lanes::STEP;
use crate::mat::Mat;
use crate::packed::{Line, Out, Packed, Segment, aligned};
use bytemuck::Zeroable;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

/// Tiles of rows whose sums are kept at once.
const ROW_TILES: usize = 16;
/// Panels whose sums are kept at once.
const PANELS: usize = 32;
/// Steps of k decoded at once.
const BLOCK: usize = 8;

thread_local! {
    /// A decoded block, and sums, kept between calls.
    static SCRATCH: RefCell<(Vec<Line>, Vec<Line>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// The product for any number of rows above one tile's.
///
/// # Safety
/// Tiles are configured full, `x` is packed for `w`; `y` has their shape.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
pub(super) unsafe fn product(x: &Packed, w: &Mat<'_>, y: &mut Out<'_>) {
    let (parts, blocks) = cut(x.segments(), w.scales().is_some());
    let (mut decoded, mut sums) = SCRATCH.take();
    let right = Right::of(x);
    let tiles = x.rows().div_ceil(EDGE);
    for first in (0..tiles).step_by(ROW_TILES) {
        for n in (0..w.n()).step_by(PANELS * EDGE) {
            let group = Group {
                right,
                tiles: first..tiles.min(first + ROW_TILES),
                w: w.rows(n..w.n().min(n + PANELS * EDGE)),
                parts: &parts,
                blocks: &blocks,
            };
            // SAFETY: the caller's; the columns are inside the output, borrowed here alone.
            unsafe { group.compute(&mut decoded, &mut sums, &mut y.cols(n..n + group.w.n())) };
        }
    }
    SCRATCH.set((decoded, sums));
}

/// The stretches of k, and the runs of them that are decoded together. A stretch without a scale is cut at a step, since
/// its sums carry over; one with a scale is kept whole.
fn cut(segments: &[Segment], scaled: bool) -> (Vec<Part>, Vec<Range<usize>>) {
    let mut parts = Vec::new();
    for s in segments {
        let len = s.full * STEP + s.tail;
        let most = if scaled { len } else { BLOCK * STEP };
        for skip in (0..len).step_by(most) {
            let (from, step) = (s.from + skip, (s.at + skip) / STEP);
            parts.push(Part { from, len: most.min(len - skip), step });
        }
    }
    let (mut blocks, mut start, mut steps) = (Vec::new(), 0, 0);
    for (i, part) in parts.iter().enumerate() {
        steps += part.steps();
        if steps >= BLOCK || i + 1 == parts.len() {
            blocks.push(start..i + 1);
            (start, steps) = (i + 1, 0);
        }
    }
    (parts, blocks)
}

/// Up to [`PANELS`] panels for up to [`ROW_TILES`] tiles of rows.
struct Group<'a> {
    right: Right<'a>,
    tiles: Range<usize>,
    w: Mat<'a>,
    parts: &'a [Part],
    blocks: &'a [Range<usize>],
}

impl Group<'_> {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
    unsafe fn compute(&self, decoded: &mut Vec<Line>, sums: &mut Vec<Line>, y: &mut Out<'_>) {
        let panels = self.w.n().div_ceil(EDGE);
        let pairs = self.tiles.len().div_ceil(2);
        let sums = aligned::<Sums>(sums, panels.div_ceil(2) * pairs);
        sums.fill(Sums::zeroed());
        for block in self.blocks {
            let parts = &self.parts[block.clone()];
            let steps: usize = parts.iter().map(Part::steps).sum();
            for panel in (0..panels).step_by(2) {
                let count = 2.min(panels - panel);
                let out = aligned::<u8>(decoded, 2 * steps * TILE);
                for (p, out) in out.chunks_exact_mut(steps * TILE).take(count).enumerate() {
                    let mut at = 0;
                    for part in parts {
                        let n = (panel + p) * EDGE;
                        decode(&self.w, n, *part, &mut out[at..], |byte| byte);
                        at += part.steps() * TILE;
                    }
                }
                let left = [out.as_ptr(), out[steps * TILE..].as_ptr()];
                let next = self.next(block, panel);
                let pass = Pass { group: self, parts, first: block.start, panel, left, next };
                let sums = &mut sums[panel / 2 * pairs..][..pairs];
                // SAFETY: the caller's; decoded tiles and sums are of this block.
                unsafe {
                    match count {
                        1 => pass.compute::<1>(sums),
                        _ => pass.compute::<2>(sums),
                    }
                }
            }
        }
        let rows = y.shape().0;
        for panel in 0..panels {
            for (i, tile) in self.tiles.clone().enumerate() {
                let Sums(sums) = &sums[panel / 2 * pairs + i / 2];
                let row = tile * EDGE;
                collect(&sums[panel % 2][i % 2], y, row, EDGE.min(rows - row), panel * EDGE);
            }
        }
    }

    /// The first byte of what is decoded after `block` of the panels from `panel`.
    fn next(&self, block: &Range<usize>, panel: usize) -> *const u8 {
        let size = self.w.dtype().size();
        let (row, part) = match (panel + 2) * EDGE {
            row if row < self.w.n() => (row, block.start),
            _ => (0, block.end.min(self.parts.len() - 1)),
        };
        self.w.row_bytes(row).as_ptr().wrapping_add(self.parts[part].from * size)
    }
}

/// One decoded block over a group's tiles of rows.
struct Pass<'a> {
    group: &'a Group<'a>,
    parts: &'a [Part],
    /// The first part's number.
    first: usize,
    panel: usize,
    /// Decoded tiles of each panel.
    left: [*const u8; 2],
    /// What to ask for meanwhile: from here, as many rows and bytes as this block has.
    next: *const u8,
}

impl Pass<'_> {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
    unsafe fn compute<const P: usize>(&self, sums: &mut [Sums]) {
        let tiles = self.group.tiles.len();
        let mut block = Sums::zeroed();
        for (pair, sums) in sums.iter_mut().enumerate() {
            // SAFETY: the caller's.
            unsafe {
                match tiles - 2 * pair {
                    1 => self.tiles::<P, 1>(2 * pair, &mut block, sums),
                    _ => self.tiles::<P, 2>(2 * pair, &mut block, sums),
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
    unsafe fn tiles<const P: usize, const R: usize>(
        &self,
        tile: usize,
        block: &mut Sums,
        sums: &mut Sums,
    ) {
        let Group { right, tiles, w, .. } = self.group;
        let scaled = w.scales().is_some();
        // Each pass over two tiles of rows asks for its share of the next block's rows.
        let share = |tile: usize| (P * EDGE * tile).div_ceil(tiles.len());
        let rows = share(tile)..share(tile + R);
        let (stride, step_bytes) = (w.stride(), STEP * w.dtype().size());
        let tile = tiles.start + tile;
        let mut done = 0;
        // SAFETY: the caller's; operands have the parts' steps.
        unsafe {
            match scaled {
                true => panel::zero::<P, R>(),
                false => panel::load::<P, R>(sums),
            }
            for (index, part) in self.parts.iter().enumerate() {
                let second = if R > 1 { right.at(tile + 1, part.step) } else { std::ptr::null() };
                let first = [right.at(tile, part.step), second];
                let right = Operand { first, stride: ROW, step: TILE };
                let first = self.left.map(|p| p.wrapping_add(done * TILE));
                let left = Operand { first, stride: ROW, step: TILE };
                panel::run::<P, R>(left, right, part.steps(), |step| {
                    let line = self.next.wrapping_add((done + step) * step_bytes);
                    for row in rows.clone() {
                        _mm_prefetch::<_MM_HINT_T1>(line.wrapping_add(row * stride).cast());
                    }
                });
                done += part.steps();
                if scaled {
                    let n = self.panel * EDGE;
                    panel::fold::<P, R>(w, n, self.first + index, block, sums);
                }
            }
            if !scaled {
                panel::store::<P, R>(sums);
            }
        }
    }
}
