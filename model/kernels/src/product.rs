//! `y = x wᵀ`: every output a sum over k in one order, whatever is computed beside it.
//!
//! Up to four rows read the weight as it lies, several outputs at a time, since memory bounds them; more rows decode a
//! panel of the weight once and pass it over tiles of rows, since arithmetic does. An output's lanes see the same
//! operations in the same order either way. Results a flush could have changed are computed again exactly
//! (`dot.rs`), and rows of a weight with an FP8 NaN give NaN.

use crate::dot::{Bf16, Dot, F32, Fp8, Source};
use crate::lanes::{STEP, Simd, Task};
use crate::mat::{DType, Mat};
use crate::packed::{Out, Packed, Segment};
use std::marker::PhantomData;
use std::ops::Range;

mod panel;

/// The product into `y`, all of `w`'s outputs for all of `x`'s rows.
///
/// # Safety
/// The CPU has `D`'s instruction set.
pub(crate) unsafe fn product<D: Dot>(x: &Packed, w: &Mat<'_>, y: &mut Out<'_>) {
    assert!(x.fits_dot::<D>(w), "activations packed for another weight layout");
    assert_eq!(y.shape(), (x.rows(), w.n()), "the output of a product [rows, n]");
    // SAFETY: the caller's, and the shapes agree.
    unsafe {
        match x.is_huge() {
            true => D::huge(x, w, y),
            false => computed::<D>(x, w, y),
        }
    }
}

/// [`product`], for activations that are known to be packed as `D` packs them.
///
/// # Safety
/// As for [`product`], and the shapes agree.
pub(crate) unsafe fn computed<D: Dot>(x: &Packed, w: &Mat<'_>, y: &mut Out<'_>) {
    // SAFETY: the caller's.
    unsafe {
        if D::FLUSHES {
            D::S::watch_underflow();
        }
        if x.rows() > D::FEW.len() {
            return panel::many::<D>(x, w, y);
        }
        match w.dtype() {
            DType::F32 => few::<D, F32>(x, w, y),
            DType::Bf16 => few::<D, Bf16>(x, w, y),
            DType::Fp8 => few::<D, Fp8>(x, w, y),
        }
    }
}

/// Whether a flush may be missing from what was computed since the last call or [`Simd::watch_underflow`].
unsafe fn underflowed<D: Dot>() -> bool {
    // SAFETY: the caller's.
    unsafe {
        let seen = D::FLUSHES && D::S::underflowed();
        if seen {
            D::S::watch_underflow();
        }
        seen
    }
}

/// NaN for the outputs of those `rows` of `w` that hold an FP8 NaN.
fn spread_nan(w: &Mat<'_>, rows: Range<usize>, y: &mut Out<'_>) {
    for n in rows {
        if w.row_bytes(n).iter().any(|c| c & 0x7f == 0x7f) {
            for r in 0..y.shape().0 {
                // SAFETY: inside the output, which is borrowed here alone.
                unsafe { *y.at(r, n) = f32::NAN };
            }
        }
    }
}

/// Whether a class computes `outputs` at once for `rows`.
const fn asks<D: Dot>(rows: usize, outputs: usize) -> bool {
    rows <= D::FEW.len() && D::FEW[rows - 1] == outputs
}

unsafe fn few<D: Dot, S: Source>(x: &Packed, w: &Mat<'_>, y: &mut Out<'_>) {
    let rows = x.rows();
    if rows == 0 {
        return;
    }
    let tile = match S::WATCHED {
        true if rows == 1 => D::FEW[0].min(D::FEW_FP8),
        true => D::FEW[rows - 1],
        false => D::FEW[rows - 1],
    };
    let whole = x.segments().iter().all(|s| s.tail == 0);
    let mut n = 0;
    while n < w.n() {
        let width = tile.min(w.n() - n);
        // SAFETY: the caller's; rows and outputs are inside their shapes.
        unsafe {
            let hit = match (rows, width) {
                _ if !whole => narrow::<D, S, false>(x, w, n, width, y),
                (1, 2) => direct::<D, S, 1, 2, false, false>(x, w, 0, n, y),
                (1, 4) => direct::<D, S, 1, 4, false, false>(x, w, 0, n, y),
                // Constant blocks, so that only the sizes a class asks for are compiled.
                (2, 2) if const { asks::<D>(2, 2) } => {
                    direct::<D, S, 2, 2, false, false>(x, w, 0, n, y)
                }
                (3, 2) if const { asks::<D>(3, 2) } => {
                    direct::<D, S, 3, 2, false, false>(x, w, 0, n, y)
                }
                (4, 1) if const { asks::<D>(4, 1) } => {
                    direct::<D, S, 4, 1, false, false>(x, w, 0, n, y)
                }
                (2, 4) if const { asks::<D>(2, 4) } => {
                    direct::<D, S, 2, 4, false, false>(x, w, 0, n, y)
                }
                (3, 4) if const { asks::<D>(3, 4) } => {
                    direct::<D, S, 3, 4, false, false>(x, w, 0, n, y)
                }
                (4, 4) if const { asks::<D>(4, 4) } => {
                    direct::<D, S, 4, 4, false, false>(x, w, 0, n, y)
                }
                (1, 8) if const { asks::<D>(1, 8) } => {
                    direct::<D, S, 1, 8, false, false>(x, w, 0, n, y)
                }
                _ => narrow::<D, S, false>(x, w, n, width, y),
            };
            if D::FLUSHES && underflowed::<D>() {
                narrow::<D, S, true>(x, w, n, width, y);
                D::S::watch_underflow();
            }
            if hit {
                spread_nan(w, n..n + width, y);
            }
        }
        n += width;
    }
}

/// All rows against `width` outputs from `n`, one by one.
unsafe fn narrow<D: Dot, S: Source, const EXACT: bool>(
    x: &Packed,
    w: &Mat<'_>,
    n: usize,
    width: usize,
    y: &mut Out<'_>,
) -> bool {
    let mut hit = false;
    for r in 0..x.rows() {
        for n in n..n + width {
            // SAFETY: the caller's.
            hit |= unsafe { direct::<D, S, 1, 1, EXACT, true>(x, w, r, n, y) };
        }
    }
    hit
}

/// `R` rows from `row` against `N` outputs from `n`, read from the weight as stored. Says whether an FP8 NaN was met.
#[inline(always)]
unsafe fn direct<
    D: Dot,
    S: Source,
    const R: usize,
    const N: usize,
    const EXACT: bool,
    const TAILS: bool,
>(
    x: &Packed,
    w: &Mat<'_>,
    row: usize,
    n: usize,
    y: &mut Out<'_>,
) -> bool {
    let task = Direct::<D, S, R, N, EXACT, TAILS> {
        x: x.data::<D>()[row * x.width()..].as_ptr(),
        width: x.width(),
        segments: x.segments(),
        w,
        n,
        y: y.at(row, n),
        ld: y.ld(),
        source: PhantomData,
    };
    // SAFETY: the caller's; the pointers cover R rows and N outputs.
    unsafe { D::S::run(task) }
}

/// A tile in registers. `TAILS` admits segments that end within a step.
struct Direct<'a, D: Dot, S, const R: usize, const N: usize, const EXACT: bool, const TAILS: bool> {
    x: *const D::Elem,
    width: usize,
    segments: &'a [Segment],
    w: &'a Mat<'a>,
    n: usize,
    y: *mut f32,
    ld: usize,
    source: PhantomData<S>,
}

impl<D: Dot, S: Source, const R: usize, const N: usize, const EXACT: bool, const TAILS: bool>
    Task<D::S> for Direct<'_, D, S, R, N, EXACT, TAILS>
{
    type Out = bool;

    #[allow(clippy::needless_range_loop, reason = "indices keep closures out of hot code")]
    #[inline(always)]
    unsafe fn call(self) -> bool {
        // SAFETY: each segment lies inside a row of k elements of the weight and of `width` packed elements; a tail
        // is copied to a padded buffer first. `y` covers R rows and N outputs.
        unsafe {
            let mut rows = [std::ptr::null::<u8>(); N];
            let mut scales: [&[[u8; 4]]; N] = [&[]; N];
            for n in 0..N {
                rows[n] = self.w.row_bytes(self.n + n).as_ptr();
                if let Some(table) = self.w.scales() {
                    scales[n] = &table.row(self.n + n)[..self.segments.len()];
                }
            }
            // From the end of a row to the start of the one `N` outputs on.
            let next = (self.w.stride() * N).wrapping_sub(self.w.k() * S::SIZE);
            let end = rows[0].wrapping_add(self.w.k() * S::SIZE);
            let mut total = [[D::S::zero(); N]; R];
            let mut watch = D::S::watch_new();
            for (index, s) in self.segments.iter().enumerate() {
                let mut acc = [[D::S::zero(); N]; R];
                let mut x = self.x.add(s.at);
                let mut w = rows;
                for n in 0..N {
                    w[n] = w[n].add(s.from * S::SIZE);
                }
                // Where the row goes on at the distance that is asked for ahead; after it, what comes next is the row
                // `N` outputs on.
                let near = end.wrapping_sub(AHEAD);
                let mut steps = s.full;
                // FP8 decodes best two steps at a time, and blocks of four are what there is.
                while S::WATCHED && steps >= 4 {
                    for _ in 0..2 {
                        let ahead = if w[0] < near { AHEAD } else { AHEAD.wrapping_add(next) };
                        let at = Place { w, x, width: self.width, ahead };
                        watch = two_steps::<D, S, R, N, EXACT>(&mut acc, at, watch);
                        x = x.add(2 * STEP);
                        for n in 0..N {
                            w[n] = w[n].add(2 * STEP * S::SIZE);
                        }
                    }
                    steps -= 4;
                }
                for _ in 0..steps {
                    let ahead = if w[0] < near { AHEAD } else { AHEAD.wrapping_add(next) };
                    let at = Place { w, x, width: self.width, ahead };
                    watch = step::<D, S, R, N, EXACT>(&mut acc, at, watch);
                    x = x.add(STEP);
                    for n in 0..N {
                        w[n] = w[n].add(STEP * S::SIZE);
                    }
                }
                if TAILS && s.tail > 0 {
                    let mut tails = [[0; STEP * 4]; N];
                    for n in 0..N {
                        tails[n] = padded::<S>(w[n], s.tail);
                        w[n] = tails[n].as_ptr();
                    }
                    let at = Place { w, x, width: self.width, ahead: 0 };
                    watch = step::<D, S, R, N, EXACT>(&mut acc, at, watch);
                }
                // Only FP8 has scales.
                if S::WATCHED {
                    for n in 0..N {
                        let scale = D::S::splat(f32::from_le_bytes(scales[n][index]));
                        for r in 0..R {
                            total[r][n] = D::S::fma(acc[r][n], scale, total[r][n]);
                        }
                    }
                } else {
                    total = acc;
                }
            }
            for r in 0..R {
                for n in 0..N {
                    *self.y.add(r * self.ld + n) = D::S::sum(total[r][n]);
                }
            }
            S::WATCHED && D::S::watch_hit(watch)
        }
    }
}

/// How far ahead of its use a weight is asked for, in bytes.
const AHEAD: usize = 1024;

/// Where a step of a tile reads.
#[derive(Clone, Copy)]
struct Place<E, const N: usize> {
    w: [*const u8; N],
    x: *const E,
    /// From one row of `x` to the next.
    width: usize,
    /// From `w` to the bytes to ask for.
    ahead: usize,
}

/// One step of an `R` by `N` tile.
#[allow(clippy::needless_range_loop, reason = "indices keep closures out of hot code")]
#[inline(always)]
unsafe fn step<D: Dot, S: Source, const R: usize, const N: usize, const EXACT: bool>(
    acc: &mut [[<D::S as Simd>::V; N]; R],
    Place { w, x, width, ahead }: Place<D::Elem, N>,
    mut watch: <D::S as Simd>::Watch,
) -> <D::S as Simd>::Watch {
    // SAFETY: the caller gives a step's elements at each pointer.
    unsafe {
        for n in 0..N {
            if S::WATCHED {
                watch = D::S::watch(watch, w[n]);
            }
            D::S::prefetch(w[n].wrapping_add(ahead));
            let pair = S::load::<D>(w[n]);
            for r in 0..R {
                let row = D::load(x.add(r * width));
                acc[r][n] = if EXACT {
                    D::step_exact(acc[r][n], pair, row)
                } else {
                    D::step(acc[r][n], pair, row)
                };
            }
        }
    }
    watch
}

/// Two steps of an `R` by `N` tile.
#[allow(clippy::needless_range_loop, reason = "indices keep closures out of hot code")]
#[inline(always)]
unsafe fn two_steps<D: Dot, S: Source, const R: usize, const N: usize, const EXACT: bool>(
    acc: &mut [[<D::S as Simd>::V; N]; R],
    Place { w, x, width, ahead }: Place<D::Elem, N>,
    mut watch: <D::S as Simd>::Watch,
) -> <D::S as Simd>::Watch {
    // SAFETY: the caller gives two steps' elements at each pointer.
    unsafe {
        for n in 0..N {
            if S::WATCHED && !D::FP8_NAN {
                watch = D::S::watch_two(watch, w[n]);
            }
            D::S::prefetch(w[n].wrapping_add(ahead));
            let pairs = S::load_two::<D>(w[n]);
            for i in 0..2 {
                for r in 0..R {
                    let row = D::load(x.add(r * width + i * STEP));
                    acc[r][n] = if EXACT {
                        D::step_exact(acc[r][n], pairs[i], row)
                    } else {
                        D::step(acc[r][n], pairs[i], row)
                    };
                }
            }
        }
    }
    watch
}

/// `len < STEP` elements at `p`, and zeros.
#[inline(always)]
unsafe fn padded<S: Source>(p: *const u8, len: usize) -> [u8; STEP * 4] {
    let mut out = [0; STEP * 4];
    // SAFETY: the caller gives `len` elements at `p`; a step of the widest type fits `out`.
    unsafe { p.copy_to_nonoverlapping(out.as_mut_ptr(), len * S::SIZE) };
    out
}
