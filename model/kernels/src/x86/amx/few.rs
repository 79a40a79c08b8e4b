//! Sums over a weight's rows (`columns.rs`) for a few rows of activations: fused multiply-adds in the order of a tile's
//! (`tile.rs` defines it), on the weight as it lies.
//!
//! To interleave a weight for one row, or for one token's heads, takes longer than this arithmetic. Tiles flush what is
//! subnormal, which multiply-adds do not: where that could show, and where a result is no number, tiles are to compute.

use crate::lanes::{LANES, STEP};
use crate::transposed::Stack;
use crate::x86::avx512::{high, low};
use crate::x86::{forget_subnormals, subnormal_seen};
use half::bf16;
use std::arch::x86_64::*;
use std::cell::RefCell;

/// Rows up to which this is faster.
pub(super) const ROWS: usize = 8;
/// Rows that share a stretch of the weight, and stretches of one row alone.
const TOGETHER: usize = 4;
/// Columns of a stretch: what a cache line holds.
const STRETCH: usize = 2 * LANES;

thread_local! {
    /// Widened activations, and where the weight's rows begin, kept between products.
    static SCRATCH: RefCell<(Vec<f32>, Vec<*const u8>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// A product whose rows all see the first `seen` rows of the weight.
pub(super) struct Few<'a> {
    /// Rows of `ldx`.
    pub(super) x: &'a [bf16],
    pub(super) rows: usize,
    pub(super) ldx: usize,
    pub(super) w: Stack<'a>,
    pub(super) seen: usize,
    /// Rows of `ldy`.
    pub(super) y: &'a mut [f32],
    pub(super) ldy: usize,
}

impl Few<'_> {
    /// Computes the output; or says no and leaves anything in it, for tiles to do it.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    pub(super) fn compute(self) -> bool {
        let Few { x, rows, ldx, w, seen, y, ldy } = self;
        let columns = w.k();
        if !(1..=ROWS).contains(&rows) || seen == 0 || !columns.is_multiple_of(STRETCH) {
            return false;
        }
        let (mut wide, mut places) = SCRATCH.take();
        wide.clear();
        for x in (0..rows).map(|r| &x[r * ldx..][..seen]) {
            wide.extend(x.iter().map(|x| x.to_f32()));
        }
        places.clear();
        places.extend(w.rows().take(seen).map(|row| row[..2 * columns].as_ptr()));
        assert!(places.len() == seen && y.len() >= (rows - 1) * ldy + columns, "checked shapes");
        forget_subnormals();
        let mut strange = 0;
        let mut at = 0;
        while at < columns {
            let alone = rows < TOGETHER && columns - at >= TOGETHER * STRETCH;
            let mut r = 0;
            while r < rows {
                let part = Part {
                    x: wide[r * seen..].as_ptr(),
                    w: &places,
                    at: 2 * at,
                    y: y[r * ldy + at..].as_mut_ptr(),
                    ldy,
                };
                // SAFETY: as many rows and columns are left, of x and y and, by the slices above, of each row of the weight.
                unsafe {
                    (strange, r) = match alone {
                        true => (strange | part.compute::<1, TOGETHER>(), r + 1),
                        false if rows - r >= TOGETHER => {
                            (strange | part.compute::<TOGETHER, 1>(), r + TOGETHER)
                        }
                        false => (strange | part.compute::<1, 1>(), r + 1),
                    };
                }
            }
            at += if alone { TOGETHER * STRETCH } else { STRETCH };
        }
        SCRATCH.set((wide, places));
        strange == 0 && !subnormal_seen()
    }
}

/// Some columns of some rows.
struct Part<'a> {
    /// Rows of as many elements as the weight has rows.
    x: *const f32,
    w: &'a [*const u8],
    /// Where the columns begin in each row of the weight, in bytes.
    at: usize,
    y: *mut f32,
    ldy: usize,
}

impl Part<'_> {
    /// `R` rows of `N` stretches. Says which lanes of any came to a subnormal or to no number.
    ///
    /// # Safety
    /// They are there.
    #[allow(clippy::needless_range_loop, reason = "indices keep closures out of hot code")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn compute<const R: usize, const N: usize>(self) -> __mmask16 {
        // Of each stretch the even columns and the odd ones.
        let mut sums = [[[_mm512_setzero_ps(); 2]; N]; R];
        for (step, places) in self.w.chunks(STEP).enumerate() {
            let mut even = [[[_mm512_setzero_ps(); 2]; N]; R];
            let mut odd = even;
            let pairs = places.as_chunks::<2>();
            let mut n = step * STEP;
            // SAFETY: the caller's; each row of the weight has an element of x.
            unsafe {
                for [a, b] in pairs.0 {
                    self.add(&mut even, *a, n);
                    self.add(&mut odd, *b, n + 1);
                    n += 2;
                }
                if let [a] = pairs.1 {
                    self.add(&mut even, *a, n);
                }
            }
            for r in 0..R {
                for i in 0..N {
                    for half in 0..2 {
                        let both = _mm512_add_ps(even[r][i][half], odd[r][i][half]);
                        sums[r][i][half] = _mm512_add_ps(sums[r][i][half], both);
                    }
                }
            }
        }
        let first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        let last = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        let mut strange = 0;
        for r in 0..R {
            for i in 0..N {
                let [even, odd] = sums[r][i];
                strange |= is_strange(even) | is_strange(odd);
                // SAFETY: the caller's: a stretch of this row.
                unsafe {
                    let y = self.y.add(r * self.ldy + i * STRETCH);
                    _mm512_storeu_ps(y, _mm512_permutex2var_ps(even, first, odd));
                    _mm512_storeu_ps(y.add(LANES), _mm512_permutex2var_ps(even, last, odd));
                }
            }
        }
        strange
    }

    /// Row `n` of the weight, at `place`, times its elements of x.
    ///
    /// # Safety
    /// They are there, and the CPU has AVX-512.
    #[allow(clippy::needless_range_loop, reason = "indices keep closures out of hot code")]
    #[inline(always)]
    unsafe fn add<const R: usize, const N: usize>(
        &self,
        acc: &mut [[[__m512; 2]; N]; R],
        place: *const u8,
        n: usize,
    ) {
        for i in 0..N {
            let p = place.wrapping_add(self.at + i * 2 * STRETCH);
            // SAFETY: the caller's: a stretch of this row, an element of each row of x; any address may be asked for.
            unsafe {
                // What this row has for the columns after these.
                _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(N * 2 * STRETCH).cast());
                let w = _mm512_loadu_si512(p.cast());
                let w = [low(w), high(w)];
                for r in 0..R {
                    let x = _mm512_set1_ps(*self.x.add(r * self.w.len() + n));
                    for half in 0..2 {
                        acc[r][i][half] = _mm512_fmadd_ps(w[half], x, acc[r][i][half]);
                    }
                }
            }
        }
    }
}

/// Lanes that are subnormal, infinite or no number.
#[inline]
#[target_feature(enable = "avx512f")]
fn is_strange(v: __m512) -> __mmask16 {
    let size = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(i32::MAX));
    let least = _mm512_set1_epi32(f32::MIN_POSITIVE.to_bits() as i32 - 1);
    let below = _mm512_sub_epi32(size, _mm512_set1_epi32(1));
    let infinite = _mm512_set1_epi32(f32::INFINITY.to_bits() as i32);
    _mm512_cmplt_epu32_mask(below, least) | _mm512_cmpge_epu32_mask(size, infinite)
}
