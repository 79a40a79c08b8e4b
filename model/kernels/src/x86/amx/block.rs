//! More rows: runs of the weight are decoded once and passed over tiles of rows, since arithmetic bounds this.
//!
//! Two panels go along a block of k that is short enough for its activations to stay in the second-level cache; a run
//! of it, decoded, stays in the first. Sums rest in memory meanwhile, which changes no bit of them. The next run is asked
//! for while this one is multiplied, further along the same rows, as the CPU's own prefetching likes it. The memory
//! used does not grow with the rows or the outputs.

use super::Right;
use super::panel::{self, Operand, Part, Scales, Sums, collect, decode};
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
/// Steps of k decoded, and passed over all rows, at once.
const RUN: usize = 8;
/// Tiles of activations in a block of k.
const BLOCK: usize = 1024;

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
    let parts = parts(x.segments(), w.scales().is_some());
    let runs = gathered(parts.iter().map(Part::steps), RUN);
    let run_steps = |run: &Range<usize>| parts[run.clone()].iter().map(Part::steps).sum();
    let tiles = x.rows().div_ceil(EDGE);
    let blocks = gathered(runs.iter().map(run_steps), BLOCK / tiles.min(ROW_TILES));
    let (mut decoded, mut sums) = SCRATCH.take();
    let right = Right::of(x);
    for first in (0..tiles).step_by(ROW_TILES) {
        for n in (0..w.n()).step_by(PANELS * EDGE) {
            let group = Group {
                right,
                tiles: first..tiles.min(first + ROW_TILES),
                w: w.rows(n..w.n().min(n + PANELS * EDGE)),
                parts: &parts,
                runs: &runs,
                blocks: &blocks,
            };
            // SAFETY: the caller's; the columns are inside the output, borrowed here alone.
            unsafe { group.compute(&mut decoded, &mut sums, &mut y.cols(n..n + group.w.n())) };
        }
    }
    SCRATCH.set((decoded, sums));
}

/// The stretches of k. One without a scale is cut at a step, since its sums carry over; one with a scale is kept whole.
fn parts(segments: &[Segment], scaled: bool) -> Vec<Part> {
    let mut parts = Vec::new();
    for s in segments {
        let len = s.full * STEP + s.tail;
        let most = if scaled { len } else { RUN * STEP };
        for skip in (0..len).step_by(most) {
            let (from, step) = (s.from + skip, (s.at + skip) / STEP);
            parts.push(Part { from, len: most.min(len - skip), step });
        }
    }
    parts
}

/// Ranges of `sizes` that come to `least` or more, but for the last.
fn gathered(sizes: impl Iterator<Item = usize>, least: usize) -> Vec<Range<usize>> {
    let (mut out, mut start, mut end, mut sum) = (Vec::new(), 0, 0, 0);
    for size in sizes {
        (end, sum) = (end + 1, sum + size);
        if sum >= least {
            out.push(start..end);
            (start, sum) = (end, 0);
        }
    }
    if start < end {
        out.push(start..end);
    }
    out
}

/// Up to [`PANELS`] panels for up to [`ROW_TILES`] tiles of rows.
struct Group<'a> {
    right: Right<'a>,
    tiles: Range<usize>,
    w: Mat<'a>,
    parts: &'a [Part],
    /// Ranges of parts.
    runs: &'a [Range<usize>],
    /// Ranges of runs.
    blocks: &'a [Range<usize>],
}

impl Group<'_> {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
    unsafe fn compute(&self, decoded: &mut Vec<Line>, sums: &mut Vec<Line>, y: &mut Out<'_>) {
        let panels = self.w.n().div_ceil(EDGE);
        let pairs = self.tiles.len().div_ceil(2);
        let sums = aligned::<Sums>(sums, panels.div_ceil(2) * pairs);
        sums.fill(Sums::zeroed());
        let mut block_sums = Sums::zeroed();
        for block in self.blocks {
            for panel in (0..panels).step_by(2) {
                let scales = std::array::from_fn(|i| panel::scales(&self.w, panel * EDGE + i));
                let sums = &mut sums[panel / 2 * pairs..][..pairs];
                for run in block.clone() {
                    let parts = &self.parts[self.runs[run].clone()];
                    let steps: usize = parts.iter().map(Part::steps).sum();
                    let count = 2.min(panels - panel);
                    let out = aligned::<u8>(decoded, 2 * steps * TILE);
                    for (p, out) in out.chunks_exact_mut(steps * TILE).take(count).enumerate() {
                        let (n, mut at) = ((panel + p) * EDGE, 0);
                        for part in parts {
                            decode(&self.w, n, *part, &mut out[at..], |byte| byte);
                            at += part.steps() * TILE;
                        }
                    }
                    let mut pass = Pass {
                        group: self,
                        run: &self.runs[run],
                        scales: &scales,
                        left: [out.as_ptr(), out[steps * TILE..].as_ptr()],
                        next: self.after(block, run, panel, steps * pairs),
                        block: &mut block_sums,
                    };
                    // SAFETY: the caller's; decoded tiles and sums are of this run.
                    unsafe {
                        match count {
                            1 => pass.compute::<1>(sums),
                            _ => pass.compute::<2>(sums),
                        }
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

    /// What is decoded after `run` of `block` for the panels from `panel`, to be asked for in `turns` turns.
    fn after(&self, block: &Range<usize>, run: usize, panel: usize, turns: usize) -> Ahead {
        let (panel, run) = match (run + 1 < block.end, (panel + 2) * EDGE < self.w.n()) {
            (true, _) => (panel, run + 1),
            (false, true) => (panel + 2, block.start),
            (false, false) => (0, block.end),
        };
        let (n, size) = (panel * EDGE, self.w.dtype().size());
        let Some(run) = self.runs.get(run) else {
            return Ahead {
                row: std::ptr::null(),
                stride: 0,
                rows: 0,
                lines: 0,
                line: 0,
                share: 0,
            };
        };
        let (first, last) = (self.parts[run.start], self.parts[run.end - 1]);
        let bytes = (last.from + last.len - first.from) * size;
        let rows = (self.w.n() - n).min(2 * EDGE);
        // Rows of any alignment: the run's last bytes may lie in one line more, which the next run's first line is.
        let lines = bytes.div_ceil(LINE);
        Ahead {
            row: self.w.row_bytes(n).as_ptr().wrapping_add(first.from * size),
            stride: self.w.stride(),
            rows,
            lines,
            line: 0,
            share: (rows * lines).div_ceil(turns.max(1)),
        }
    }
}

/// Bytes of a cache line.
const LINE: usize = 64;

/// A block of a weight to be asked for a few lines at a time, one row after another.
struct Ahead {
    row: *const u8,
    stride: usize,
    /// Rows left.
    rows: usize,
    /// Lines of a row, and the next of them.
    lines: usize,
    line: usize,
    /// Lines in a turn.
    share: usize,
}

impl Ahead {
    #[inline(always)]
    fn turn(&mut self) {
        for _ in 0..self.share {
            if self.rows == 0 {
                return;
            }
            let p = self.row.wrapping_add(self.line * LINE);
            // SAFETY: a hint, to any address.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) };
            self.line += 1;
            if self.line == self.lines {
                (self.row, self.rows, self.line) =
                    (self.row.wrapping_add(self.stride), self.rows - 1, 0);
            }
        }
    }
}

/// Two decoded panels over a group's tiles of rows.
struct Pass<'a> {
    group: &'a Group<'a>,
    /// The parts that are decoded.
    run: &'a Range<usize>,
    scales: &'a [Scales<'a>; 2 * EDGE],
    /// Decoded tiles of each panel.
    left: [*const u8; 2],
    /// What to ask for meanwhile.
    next: Ahead,
    /// Room for a k-block's sums.
    block: &'a mut Sums,
}

impl Pass<'_> {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
    unsafe fn compute<const P: usize>(&mut self, sums: &mut [Sums]) {
        let tiles = self.group.tiles.len();
        for (pair, sums) in sums.iter_mut().enumerate() {
            // SAFETY: the caller's.
            unsafe {
                match tiles - 2 * pair {
                    1 => self.tiles::<P, 1>(2 * pair, sums),
                    _ => self.tiles::<P, 2>(2 * pair, sums),
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
    unsafe fn tiles<const P: usize, const R: usize>(&mut self, tile: usize, sums: &mut Sums) {
        let Group { right, tiles, w, parts, .. } = self.group;
        let scaled = w.scales().is_some();
        let tile = tiles.start + tile;
        let mut done = 0;
        // SAFETY: the caller's; operands have the parts' steps.
        unsafe {
            match scaled {
                true => panel::zero::<P, R>(),
                false => panel::load::<P, R>(sums),
            }
            for index in self.run.clone() {
                let part = parts[index];
                let second = if R > 1 { right.at(tile + 1, part.step) } else { std::ptr::null() };
                let first = [right.at(tile, part.step), second];
                let right = Operand { first, stride: ROW, step: TILE };
                let first = self.left.map(|p| p.wrapping_add(done * TILE));
                let left = Operand { first, stride: ROW, step: TILE };
                panel::run::<P, R>(left, right, part.steps(), |_| self.next.turn());
                done += part.steps();
                if scaled {
                    panel::store::<P, R>(self.block);
                    panel::zero::<P, R>();
                    panel::fold::<P, R>(self.scales, index, self.block, sums);
                }
            }
            if !scaled {
                panel::store::<P, R>(sums);
            }
        }
    }
}
