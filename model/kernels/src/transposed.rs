//! `y = x w`: each output a sum over the weight's rows, one fused multiply-add after another.
//!
//! This is how attention weighs cached rows, and how queries are absorbed into the key projection. A tile of rows and
//! columns of `y` stays in registers while it takes a block of the weight's rows. A few rows read the weight as
//! it lies; for more, a block of it is widened once, in cache, and passed over tiles of rows. Weights widen exactly in
//! both numerics classes: an FP8 element is its code times its scale, rounded once.

use crate::dot::{Bf16, F32, Fp8, Registers, Source};
use crate::lanes::{LANES, Simd, Task};
use crate::mat::{Acts, DType, Mat};
use crate::packed::{Line, aligned};
use std::cell::RefCell;
use std::ops::Range;

/// Rows of the weight taken at once.
const BLOCK: usize = 64;
/// Columns widened at once.
const WIDE: usize = 4 * LANES;

thread_local! {
    /// Widened activations and a widened piece of the weight, kept between calls.
    static SCRATCH: RefCell<(Vec<Line>, Vec<Line>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// The weight of a transposed product: matrices of the same width, one below the other. Row `r` of the activations sees
/// the first `first + r / group` of their rows, at most all.
#[derive(Clone, Copy, Debug)]
pub struct Stack<'a> {
    mats: &'a [Mat<'a>],
    first: usize,
    group: usize,
}

impl<'a> Stack<'a> {
    /// All of `mats` for every row. Panics if they differ in width.
    pub fn new(mats: &'a [Mat<'a>]) -> Stack<'a> {
        assert!(mats.iter().all(|m| m.k() == mats[0].k()), "a stack of one width");
        Stack { mats, first: usize::MAX, group: 1 }
    }

    /// Each `group` rows see one more than those before them, the first `first`. Panics on groups of none.
    pub fn causal(self, first: usize, group: usize) -> Stack<'a> {
        assert!(group > 0, "groups of rows");
        Stack { first, group, ..self }
    }

    /// The matrices.
    pub(crate) fn mats(&self) -> &'a [Mat<'a>] {
        self.mats
    }

    /// Columns.
    pub(crate) fn k(&self) -> usize {
        self.mats.first().map_or(0, Mat::k)
    }

    /// How many rows row `r` of the activations sees.
    pub(crate) fn seen(&self, r: usize) -> usize {
        let n = self.mats.iter().map(Mat::n).sum();
        self.first.saturating_add(r / self.group).min(n)
    }

    /// The first row of the activations after `r` that is of another group.
    pub(crate) fn alike(&self, r: usize) -> usize {
        (r / self.group + 1) * self.group
    }

    /// Whether the elements are stored as bf16.
    pub(crate) fn is_bf16(&self) -> bool {
        self.mats.iter().all(|m| m.dtype() == DType::Bf16)
    }

    /// The rows' bytes.
    pub(crate) fn rows(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let rows = |m: &'a Mat<'a>| (0..m.n()).map(|n| m.row_bytes(n));
        self.mats.iter().flat_map(rows)
    }

    /// Whether all elements of bf16 rows `range` are finite.
    pub(crate) fn finite(&self, range: Range<usize>) -> bool {
        let infinite = |b: &[u8; 2]| u16::from_le_bytes(*b) & 0x7f80 == 0x7f80;
        let any = |row: &[u8]| row.as_chunks().0.iter().fold(false, |any, b| any | infinite(b));
        !self.rows().take(range.end).skip(range.start).any(any)
    }

    /// Panics unless the rows of `x` and `y` are there.
    pub(crate) fn check(&self, x: Acts<'_>, rows: usize, ldx: usize, y: &[f32], ldy: usize) {
        check("x", rows, self.seen(rows.saturating_sub(1)), ldx, x.len());
        check("y", rows, self.k(), ldy, y.len());
    }

    /// Calls `f` for the matrices one by one, with the activations' rows that see them and what lies above.
    pub(crate) fn each(&self, rows: usize, mut f: impl FnMut(Range<usize>, usize, Mat<'a>)) {
        let mut part = |rows: Range<usize>, positions: Range<usize>| {
            let mut at = 0;
            for mat in self.mats {
                let (from, to) = (positions.start.max(at), positions.end.min(at + mat.n()));
                if from < to {
                    f(rows.clone(), from, mat.rows(from - at..to - at));
                }
                at += mat.n();
            }
        };
        let common = self.seen(0);
        part(0..rows, 0..common);
        let mut row = 0;
        while row < rows && common < self.seen(rows - 1) {
            let end = self.alike(row).min(rows);
            part(row..end, common..self.seen(row));
            row = end;
        }
    }
}

/// `y[r, l] (+)= sum over n of x[r, n] w[n, l]`, in ascending n.
pub(crate) struct Transposed<'a> {
    pub(crate) x: Acts<'a>,
    pub(crate) rows: usize,
    pub(crate) ldx: usize,
    pub(crate) w: Mat<'a>,
    pub(crate) accumulate: bool,
    pub(crate) y: &'a mut [f32],
    pub(crate) ldy: usize,
}

/// Panics unless `rows` rows of `n`, `ld` apart, fit `len` elements without overlap.
fn check(what: &str, rows: usize, n: usize, ld: usize, len: usize) {
    let need = match rows {
        0 => Some(0),
        _ => (rows - 1).checked_mul(ld).and_then(|e| e.checked_add(n)),
    };
    assert!(rows < 2 || n <= ld, "{what}: rows of {n} every {ld} overlap");
    assert!(need.is_some_and(|need| need <= len), "{what}: [{rows}, {n}] every {ld} in {len}");
}

impl<S: Simd + Registers> Task<S> for Transposed<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn call(mut self) {
        let (n, k) = (self.w.n(), self.w.k());
        check("x", self.rows, n, self.ldx, self.x.len());
        check("y", self.rows, k, self.ldy, self.y.len());
        if self.rows == 0 {
            return;
        }
        if n == 0 && !self.accumulate {
            for r in 0..self.rows {
                self.y[r * self.ldy..][..k].fill(0.0);
            }
        }
        let mut scratch = SCRATCH.take();
        for start in (0..n).step_by(BLOCK) {
            let block = start..n.min(start + BLOCK);
            let (x, w) = &mut scratch;
            let x = aligned::<f32>(x, self.rows * BLOCK);
            self.widen_x(&block, x);
            // SAFETY: the caller's, and the shapes were checked above.
            unsafe {
                match self.w.dtype() {
                    DType::F32 => self.block::<S, F32>(block, x, w),
                    DType::Bf16 => self.block::<S, Bf16>(block, x, w),
                    DType::Fp8 => self.block::<S, Fp8>(block, x, w),
                }
            }
            self.accumulate = true;
        }
        SCRATCH.set(scratch);
    }
}

impl Transposed<'_> {
    /// Elements `block` of every row of x, in rows of [`BLOCK`].
    #[inline(always)]
    fn widen_x(&self, block: &Range<usize>, out: &mut [f32]) {
        for (r, out) in out.chunks_exact_mut(BLOCK).enumerate() {
            let row = r * self.ldx + block.start..r * self.ldx + block.end;
            match self.x {
                Acts::F32(x) => out[..block.len()].copy_from_slice(&x[row]),
                Acts::Bf16(x) => {
                    for (out, x) in out.iter_mut().zip(&x[row]) {
                        *out = f32::from_bits(u32::from(x.to_bits()) << 16);
                    }
                }
            }
        }
    }

    /// Rows `block` of the weight.
    #[inline(always)]
    unsafe fn block<S: Simd + Registers, W: Source>(
        &mut self,
        block: Range<usize>,
        x: &[f32],
        spare: &mut Vec<Line>,
    ) {
        let widened = aligned::<f32>(spare, BLOCK * WIDE);
        for (segment, (from, to)) in self.w.segments().enumerate() {
            let mut l = from;
            // SAFETY: the caller's; each stretch of columns ends inside the segment, and so inside w's rows and y's.
            unsafe {
                if self.rows <= S::TILE.0 {
                    while to - l >= WIDE {
                        l += self.direct::<S, W>(&block, x, segment, l, to - l);
                    }
                }
                while l < to {
                    let columns = WIDE.min(to - l);
                    self.widen_w::<S, W>(&block, segment, l, columns, widened);
                    self.stretch::<S>(block.len(), x, widened, l, columns);
                    l += columns;
                }
            }
        }
    }

    /// At least [`WIDE`] columns from `l`, of which `left` are left, for rows that one tile holds, from the weight as it
    /// lies. Says how many.
    #[inline(always)]
    unsafe fn direct<S: Simd + Registers, W: Source>(
        &mut self,
        block: &Range<usize>,
        x: &[f32],
        segment: usize,
        l: usize,
        left: usize,
    ) -> usize {
        let mut scales = [1.0; BLOCK];
        if let Some(table) = self.w.scales().filter(|_| W::WATCHED) {
            for (scale, n) in scales.iter_mut().zip(block.clone()) {
                *scale = f32::from_le_bytes(table.row(n)[segment]);
            }
        }
        let stride = match block.len() {
            1 => 0,
            _ => self.w.row_bytes(1).as_ptr().addr() - self.w.row_bytes(0).as_ptr().addr(),
        };
        let tile = Tile {
            x: x.as_ptr(),
            w: self.w.row_bytes(block.start).as_ptr().wrapping_add(l * W::SIZE),
            stride,
            scales: scales.as_ptr(),
            count: block.len(),
            y: self.y.as_mut_ptr().wrapping_add(l),
            ldy: self.ldy,
            fresh: !self.accumulate,
        };
        // SAFETY: the caller's.
        unsafe {
            if self.rows == 1 && const { S::TILE.1 >= 4 } && left >= 4 * WIDE {
                // More columns at once, so that memory is read in longer stretches.
                tile.compute::<S, W, 1, 16>();
                return 4 * WIDE;
            }
            if self.rows == 1 && const { S::TILE.1 >= 4 && W::WATCHED } && left >= 2 * WIDE {
                tile.compute::<S, W, 1, 8>();
                return 2 * WIDE;
            }
            tile.rows::<S, W>(self.rows);
        }
        WIDE
    }

    /// `columns <= WIDE` columns from `l` of the weight's rows `block`, widened, zeros after them.
    #[inline(always)]
    unsafe fn widen_w<S: Simd, W: Source>(
        &self,
        block: &Range<usize>,
        segment: usize,
        l: usize,
        columns: usize,
        out: &mut [f32],
    ) {
        for (n, out) in block.clone().zip(out.chunks_exact_mut(WIDE)) {
            let row = self.w.row_bytes(n).as_ptr().wrapping_add(l * W::SIZE);
            // The columns that are next: too far apart from row to row to be foreseen.
            for line in (0..WIDE * W::SIZE).step_by(64) {
                // SAFETY: the caller's; any address may be asked for.
                unsafe { S::prefetch(row.wrapping_add(WIDE * W::SIZE + line)) };
            }
            for (i, out) in out.chunks_exact_mut(LANES).enumerate() {
                let mut p = row.wrapping_add(i * LANES * W::SIZE);
                let mut tail = [0u8; LANES * 4];
                let live = columns.saturating_sub(i * LANES);
                // SAFETY: `live` elements from `p` on are inside the row; a full vector's, or a buffer's.
                unsafe {
                    if live < LANES {
                        p.copy_to_nonoverlapping(tail.as_mut_ptr(), live * W::SIZE);
                        p = tail.as_ptr();
                    }
                    let mut v = W::lanes::<S>(p);
                    if let Some(scales) = self.w.scales() {
                        v = S::mul(v, S::splat(f32::from_le_bytes(scales.row(n)[segment])));
                    }
                    S::store(out.as_mut_ptr(), v);
                }
            }
        }
    }

    /// All rows against `count` rows of the widened piece, whose first `columns` columns are y's from `l` on.
    #[inline(always)]
    unsafe fn stretch<S: Simd + Registers>(
        &mut self,
        count: usize,
        x: &[f32],
        widened: &[f32],
        l: usize,
        columns: usize,
    ) {
        let mut r = 0;
        while r < self.rows {
            let left = self.rows - r;
            let height = left.div_ceil(left.div_ceil(S::TILE.0));
            let mut tile = Tile {
                x: x[r * BLOCK..].as_ptr(),
                w: widened.as_ptr().cast(),
                stride: WIDE * 4,
                scales: std::ptr::null(),
                count,
                y: self.y[r * self.ldy + l..].as_mut_ptr(),
                ldy: self.ldy,
                fresh: !self.accumulate,
            };
            // SAFETY: the caller's; columns that y does not have go by a buffer of their own.
            unsafe {
                if columns == WIDE {
                    tile.rows::<S, F32>(height);
                } else {
                    const { assert!(S::TILE.0 <= 6) };
                    let mut spare = [[0.0f32; WIDE]; 6];
                    for (r, spare) in spare.iter_mut().enumerate().take(height) {
                        let y = &self.y[(r + (self.rows - left)) * self.ldy + l..][..columns];
                        spare[..columns].copy_from_slice(y);
                    }
                    (tile.y, tile.ldy) = (spare.as_mut_ptr().cast(), WIDE);
                    tile.rows::<S, F32>(height);
                    for (r, spare) in spare.iter().enumerate().take(height) {
                        let at = (r + (self.rows - left)) * self.ldy + l;
                        self.y[at..][..columns].copy_from_slice(&spare[..columns]);
                    }
                }
            }
            r += height;
        }
    }
}

/// [`WIDE`] columns of a few rows of y.
#[derive(Clone, Copy)]
struct Tile {
    /// Rows of [`BLOCK`].
    x: *const f32,
    w: *const u8,
    /// Bytes from one row of the weight to the next.
    stride: usize,
    /// One for each row of an FP8 weight.
    scales: *const f32,
    /// Rows of the weight.
    count: usize,
    y: *mut f32,
    ldy: usize,
    /// Whether sums start from zero, not from y.
    fresh: bool,
}

impl Tile {
    /// `height` rows, at most as many as fit `S`'s registers.
    #[inline(always)]
    unsafe fn rows<S: Simd + Registers, W: Source>(self, height: usize) {
        const { assert!(matches!(S::TILE, (1..=3, 2) | (1..=6, 4))) };
        // SAFETY: the caller's.
        unsafe {
            // Constant blocks, so that only the sizes an instruction set asks for are compiled.
            if const { S::TILE.1 == 2 } {
                for half in [0, 2 * LANES] {
                    let w = self.w.wrapping_add(half * W::SIZE);
                    let tile = Tile { w, y: self.y.wrapping_add(half), ..self };
                    match height {
                        1 => tile.compute::<S, W, 1, 2>(),
                        2 => tile.compute::<S, W, 2, 2>(),
                        _ => tile.compute::<S, W, 3, 2>(),
                    }
                }
            } else {
                match height {
                    1 => self.compute::<S, W, 1, 4>(),
                    2 => self.compute::<S, W, 2, 4>(),
                    3 => self.compute::<S, W, 3, 4>(),
                    4 => self.compute::<S, W, 4, 4>(),
                    5 => self.compute::<S, W, 5, 4>(),
                    _ => self.compute::<S, W, 6, 4>(),
                }
            }
        }
    }

    #[allow(clippy::needless_range_loop, reason = "indices keep closures out of hot code")]
    #[inline(always)]
    unsafe fn compute<S: Simd, W: Source, const R: usize, const N: usize>(self) {
        // SAFETY: the caller gives x, w and y `R` rows, and `N` vectors from where they point.
        unsafe {
            let mut acc = [[S::zero(); N]; R];
            if !self.fresh {
                for r in 0..R {
                    for i in 0..N {
                        acc[r][i] = S::load(self.y.add(r * self.ldy + i * LANES));
                    }
                }
            }
            for n in 0..self.count {
                let row = self.w.add(n * self.stride);
                let mut w = [S::zero(); N];
                for i in 0..N {
                    w[i] = W::lanes::<S>(row.add(i * LANES * W::SIZE));
                    if W::WATCHED {
                        // A line further on for each of this one: the stretch of columns that comes next.
                        if i % 4 == 0 {
                            S::prefetch(row.wrapping_add((N + i) * LANES));
                        }
                        w[i] = S::mul(w[i], S::splat(*self.scales.add(n)));
                    }
                }
                for r in 0..R {
                    let x = S::splat(*self.x.add(r * BLOCK + n));
                    for i in 0..N {
                        acc[r][i] = S::fma(x, w[i], acc[r][i]);
                    }
                }
            }
            for r in 0..R {
                for i in 0..N {
                    S::store(self.y.add(r * self.ldy + i * LANES), acc[r][i]);
                }
            }
        }
    }
}
