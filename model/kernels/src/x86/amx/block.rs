//! More rows: two panels of outputs at a time go over tiles of rows, since arithmetic bounds this.
//!
//! They go along k in runs that stay in the first-level cache while all tiles of rows pass by, and by blocks of runs whose
//! activations stay in the second. bf16 enters tiles from where it is stored: a copy of it, although it lies better,
//! takes as long to make as all of the arithmetic at 64 rows. FP8 and f32 are decoded, a run at a time. Sums rest in
//! memory meanwhile, which changes no bit of them, and are taken over ([`Sink`]) while they are in cache, as many panels'
//! at a time as the sink likes.
//! The next run is asked for while this one is multiplied. The memory used does not grow with the rows or the outputs.

use super::Right;
use super::panel::{self, Operand, Part, Scales, Sums, decode};
use super::sink::{Rows, Sink};
use super::tiles::{EDGE, ROW, TILE};
use crate::lanes::STEP;
use crate::mat::{DType, Mat};
use crate::packed::{Line, Packed, Segment, aligned};
use bytemuck::Zeroable;
use std::arch::asm;
use std::cell::RefCell;
use std::ops::Range;

/// Tiles of rows whose sums are kept at once.
const ROW_TILES: usize = 16;
/// Pairs of panels whose sums are kept at once.
const PAIRS: usize = 16;
/// Steps of k in a run: of a weight as it is stored, and of one that is decoded.
const RUN: usize = 16;
const DECODED: usize = 8;
/// Runs between one that is multiplied and the one that is asked for meanwhile.
const AHEAD: usize = 2;
/// Passes up to which rows are read where they are stored although they begin anywhere in a cache line.
const UNALIGNED: usize = 4;
/// Tiles of activations in a block of k.
const BLOCK: usize = 1024;

thread_local! {
    /// Kept between calls.
    static MEMORY: RefCell<Memory> = RefCell::default();
}

/// A decoded run, sums, and rows of results.
#[derive(Default)]
struct Memory {
    decoded: Vec<Line>,
    sums: Vec<Line>,
    rows: Vec<Line>,
}

/// What is multiplied: panels of one weight, two by two, or each panel of a weight with the same of another.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    One(Mat<'a>),
    /// Of the same shape, type and blocks.
    Both([Mat<'a>; 2]),
}

impl<'a> Source<'a> {
    fn first(&self) -> &Mat<'a> {
        match self {
            Source::One(w) | Source::Both([w, _]) => w,
        }
    }

    fn pairs(&self) -> usize {
        match self {
            Source::One(w) => w.n().div_ceil(2 * EDGE),
            Source::Both([w, _]) => w.n().div_ceil(EDGE),
        }
    }

    /// The weight and the first output of each panel of a pair.
    fn panels(&self, pair: usize) -> [Option<(&Mat<'a>, usize)>; 2] {
        match self {
            Source::One(w) => {
                let n = 2 * pair * EDGE;
                [Some((w, n)), (n + EDGE < w.n()).then_some((w, n + EDGE))]
            }
            Source::Both(w) => w.each_ref().map(|w| Some((w, pair * EDGE))),
        }
    }
}

/// The product for any number of rows above one tile's.
///
/// # Safety
/// Tiles are configured full, `x` is packed for the source's weights, and the sink is for their outputs.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,gfni")]
pub(super) unsafe fn product(x: &Packed, source: Source<'_>, sink: &mut impl Sink) {
    let w = source.first();
    let steps = if w.dtype() == DType::Bf16 { RUN } else { DECODED };
    let parts = parts(x.segments(), w.scales().is_some(), steps);
    let runs = gathered(parts.iter().map(Part::steps), steps);
    let run_steps = |run: &Range<usize>| parts[run.clone()].iter().map(Part::steps).sum();
    let tiles = x.rows().div_ceil(EDGE);
    let mut blocks = gathered(runs.iter().map(run_steps), BLOCK / tiles.min(ROW_TILES));
    if blocks.is_empty() {
        // No k: sums of nothing.
        blocks.push(0..0);
    }
    // Sums that are whole after one block are not kept for long.
    let at_once = if blocks.len() == 1 { source.pairs().max(1) } else { PAIRS };
    let mut memory = MEMORY.take();
    let right = Right::of(x);
    for first in (0..tiles).step_by(ROW_TILES) {
        for pair in (0..source.pairs()).step_by(at_once) {
            let group = Group {
                right,
                tiles: first..tiles.min(first + ROW_TILES),
                source,
                pairs: pair..source.pairs().min(pair + at_once),
                parts: &parts,
                runs: &runs,
                blocks: &blocks,
            };
            // SAFETY: the caller's.
            unsafe { group.compute(&mut memory, sink) };
        }
    }
    MEMORY.set(memory);
}

/// The stretches of k. One without a scale is cut at a step, since its sums carry over; one with a scale is kept whole.
fn parts(segments: &[Segment], scaled: bool, steps: usize) -> Vec<Part> {
    let mut parts = Vec::new();
    for s in segments {
        let len = s.full * STEP + s.tail;
        let most = if scaled { len } else { steps * STEP };
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

/// Some pairs of panels for up to [`ROW_TILES`] tiles of rows.
struct Group<'a> {
    right: Right<'a>,
    tiles: Range<usize>,
    source: Source<'a>,
    pairs: Range<usize>,
    parts: &'a [Part],
    /// Ranges of parts.
    runs: &'a [Range<usize>],
    /// Ranges of runs.
    blocks: &'a [Range<usize>],
}

impl Group<'_> {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,gfni")]
    unsafe fn compute(&self, memory: &mut Memory, sink: &mut impl Sink) {
        let passes = self.tiles.len().div_ceil(2);
        let scaled = self.source.first().scales().is_some();
        let Memory { decoded, sums, rows } = memory;
        let together = sink.pairs(self.tiles.len());
        let kept = if self.blocks.len() == 1 { together } else { self.pairs.len() };
        let sums = aligned::<Sums>(sums, kept * passes);
        let rows = &mut aligned::<Rows>(rows, 1)[0];
        let mut block_sums = Sums::zeroed();
        for block in self.blocks {
            for (index, pair) in self.pairs.clone().enumerate() {
                let all = &mut *sums;
                let sums = &mut all[index % kept * passes..][..passes];
                if block.start == 0 && (scaled || block.is_empty()) {
                    sums.fill(Sums::zeroed());
                }
                let panels = self.source.panels(pair);
                let mut scales = [Scales::default(); 2 * EDGE];
                for (i, scales) in scales.iter_mut().enumerate().filter(|_| scaled) {
                    if let Some((w, n)) = panels[i / EDGE] {
                        *scales = panel::scales(w, n + i % EDGE);
                    }
                }
                for run in block.clone() {
                    let parts = &self.parts[self.runs[run].clone()];
                    let mut pass = Pass {
                        group: self,
                        run: &self.runs[run],
                        first: run == 0,
                        scales: &scales,
                        left: stored(&panels, parts, passes)
                            .unwrap_or_else(|| decode_run(&panels, parts, decoded)),
                        ahead: self.ahead(block, run, pair, passes),
                        block: &mut block_sums,
                    };
                    // SAFETY: the caller's; operands and sums are of this run.
                    unsafe {
                        match panels[1] {
                            None => pass.compute::<1>(sums),
                            Some(_) => pass.compute::<2>(sums),
                        }
                    }
                }
                let waiting = index % together + 1;
                let full = waiting == together || pair + 1 == self.pairs.end;
                if block.end < self.runs.len() || !full {
                    continue;
                }
                let pairs = pair + 1 - waiting..pair + 1;
                for (i, tile) in self.tiles.clone().enumerate() {
                    let sums = |pair: usize| {
                        let at = (pair - self.pairs.start) % kept * passes + i / 2;
                        let Sums([first, second]) = &all[at];
                        [&first[i % 2], &second[i % 2]]
                    };
                    // SAFETY: the caller's.
                    unsafe { sink.take(pairs.clone(), tile, sums, rows) };
                }
            }
        }
    }

    /// What is to be asked for in `passes` passes while `run` of `block` is multiplied for `pair`: what is read a few runs
    /// later.
    fn ahead(&self, block: &Range<usize>, run: usize, pair: usize, passes: usize) -> Ahead {
        let at = run - block.start + AHEAD;
        let (pair, run) = match pair + at / block.len() {
            pair if pair < self.pairs.end => (pair, block.start + at % block.len()),
            // Of the next block, if there is one.
            _ => (self.pairs.start, block.end + at % block.len()),
        };
        let Some(run) = self.runs.get(run) else { return Ahead::NONE };
        let (first, last) = (self.parts[run.start], self.parts[run.end - 1]);
        let size = self.source.first().dtype().size();
        // Rows of any alignment: the run's last bytes may lie in one line more, which the next run's first line is.
        let lines = ((last.from + last.len - first.from) * size).div_ceil(LINE);
        let rows = self.source.panels(pair).map(|panel| match panel {
            Some((w, n)) => {
                let row = w.row_bytes(n).as_ptr().wrapping_add(first.from * size);
                (row, (w.n() - n).min(EDGE).div_ceil(4))
            }
            None => (std::ptr::null(), 0),
        });
        Ahead {
            rows,
            stride: self.source.first().stride(),
            lines,
            share: (EDGE / 4).div_ceil(passes),
        }
    }
}

/// Panels as operands where they are stored: whole ones in bf16, and whole steps. Not if many passes would read rows
/// that do not begin at a cache line's edge, which costs two lines for each.
fn stored(
    panels: &[Option<(&Mat<'_>, usize)>; 2],
    parts: &[Part],
    passes: usize,
) -> Option<Operand> {
    let [part] = parts else { return None };
    let stride = panels[0]?.0.stride();
    let fits = panels
        .iter()
        .flatten()
        .all(|(w, n)| w.dtype() == DType::Bf16 && n + EDGE <= w.n() && w.stride() == stride);
    let first = panels.map(|panel| match panel {
        Some((w, n)) => w.row_bytes(n).as_ptr().wrapping_add(part.from * 2),
        None => std::ptr::null(),
    });
    let aligned =
        first.iter().all(|p| p.addr().is_multiple_of(LINE)) && stride.is_multiple_of(LINE);
    let fits = fits && part.len.is_multiple_of(STEP) && (aligned || passes <= UNALIGNED);
    fits.then_some(Operand { first, stride, step: ROW })
}

/// Panels as operands decoded into `out`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,gfni")]
fn decode_run(
    panels: &[Option<(&Mat<'_>, usize)>; 2],
    parts: &[Part],
    out: &mut Vec<Line>,
) -> Operand {
    let bytes = parts.iter().map(Part::steps).sum::<usize>() * TILE;
    let out = aligned::<u8>(out, 2 * bytes);
    for ((w, n), out) in panels.iter().flatten().zip(out.chunks_exact_mut(bytes)) {
        let mut at = 0;
        for part in parts {
            decode(w, *n, *part, &mut out[at..], |byte| byte);
            at += part.steps() * TILE;
        }
    }
    let first = [out.as_ptr(), out[bytes..].as_ptr()];
    Operand { first, stride: ROW, step: TILE }
}

/// Bytes of a cache line.
const LINE: usize = 64;

/// A run of two panels to be asked for while another is multiplied: some of its rows in each pass over a pair of tiles,
/// a line of each with every step.
#[derive(Clone, Copy)]
struct Ahead {
    /// The first row of each panel, and how many fours of rows there are.
    rows: [(*const u8, usize); 2],
    stride: usize,
    /// Lines of a row.
    lines: usize,
    /// Fours of rows of each panel in a pass.
    share: usize,
}

impl Ahead {
    /// Nothing to ask for.
    const NONE: Ahead = Ahead { rows: [(std::ptr::null(), 0); 2], stride: 0, lines: 0, share: 0 };

    /// What is to be asked for in pass `pass`.
    fn pass(&self, pass: usize) -> Ahead {
        let first = pass * self.share;
        let rows = self.rows.map(|(row, fours)| {
            (row.wrapping_add(4 * first * self.stride), fours.saturating_sub(first).min(self.share))
        });
        Ahead { rows, ..*self }
    }

    #[inline(always)]
    fn step(&self, step: usize) {
        if step >= self.lines {
            return;
        }
        for (row, fours) in self.rows {
            let mut line = row.wrapping_add(step * LINE);
            for _ in 0..fours {
                // Written out, as the compiler would keep a pointer for each row, in memory.
                // SAFETY: hints, to any address.
                unsafe {
                    asm!("prefetcht1 [{p}]", "prefetcht1 [{p} + {s}]", "prefetcht1 [{p} + 2*{s}]",
                        "prefetcht1 [{p} + {three}]", "lea {p}, [{p} + 4*{s}]", p = inout(reg) line,
                        s = in(reg) self.stride, three = in(reg) 3 * self.stride,
                        options(nostack, preserves_flags, readonly));
                }
            }
        }
    }
}

/// Two panels over a group's tiles of rows, along a run.
struct Pass<'a> {
    group: &'a Group<'a>,
    /// Its parts.
    run: &'a Range<usize>,
    /// Whether there are no sums yet.
    first: bool,
    scales: &'a [Scales<'a>; 2 * EDGE],
    left: Operand,
    /// What to ask for meanwhile.
    ahead: Ahead,
    /// Room for a k-block's sums.
    block: &'a mut Sums,
}

impl Pass<'_> {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,gfni")]
    unsafe fn compute<const P: usize>(&mut self, sums: &mut [Sums]) {
        let tiles = self.group.tiles.len();
        for (pass, sums) in sums.iter_mut().enumerate() {
            // SAFETY: the caller's.
            unsafe {
                match tiles - 2 * pass {
                    1 => self.tiles::<P, 1>(pass, sums),
                    _ => self.tiles::<P, 2>(pass, sums),
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,gfni")]
    unsafe fn tiles<const P: usize, const R: usize>(&mut self, pass: usize, sums: &mut Sums) {
        let Group { right, tiles, source, parts, .. } = self.group;
        let scaled = source.first().scales().is_some();
        let tile = tiles.start + 2 * pass;
        let (mut left, mut done) = (self.left, 0);
        let ahead = self.ahead.pass(pass);
        // SAFETY: the caller's; operands have the parts' steps.
        unsafe {
            match scaled || self.first {
                true => panel::zero::<P, R>(),
                false => panel::load::<P, R>(sums),
            }
            for index in self.run.clone() {
                let part = parts[index];
                let second = if R > 1 { right.at(tile + 1, part.step) } else { std::ptr::null() };
                let first = [right.at(tile, part.step), second];
                let right = Operand { first, stride: ROW, step: TILE };
                panel::run_past::<P, R>(left, right, part.steps(), |step| {
                    ahead.step(done + step);
                });
                done += part.steps();
                left.first = left.first.map(|p| p.wrapping_add(part.steps() * left.step));
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
