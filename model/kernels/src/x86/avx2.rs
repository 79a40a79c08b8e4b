//! Sixteen lanes as two 256-bit registers: AVX2, FMA and F16C.
//!
//! FP8 goes through half precision: a code's bits, shifted, are the half of 2^-8 times its value, and the CPU
//! widens halves. Subnormal halves widen exactly. NaN codes come out as numbers here and are watched for apart.

use crate::dot::Registers;
use crate::lanes::{self, LANES, Simd, Task};
use std::arch::x86_64::*;
use std::mem::MaybeUninit;

/// AVX2 with FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

impl Registers for Avx2 {
    const TILE: (usize, usize) = (3, 2);
    const FEW: &[usize] = &[4, 2, 2, 1];
    const FEW_FP8: usize = 2;
    const FLAGS: bool = true;
}

type V = (__m256, __m256);

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run<T: Task<Avx2>>(task: T) -> T::Out {
    // SAFETY: the caller's.
    unsafe { task.call() }
}

/// f32 bits of 8 bf16 in the high halves of `x`'s lanes.
#[inline(always)]
unsafe fn high(x: __m256i) -> __m256 {
    // SAFETY: AVX2 is there, by the contract of `Simd`.
    unsafe { _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(0xffff_0000_u32 as i32))) }
}

/// f32 bits of 8 bf16 in the low halves of `x`'s lanes.
#[inline(always)]
unsafe fn low(x: __m256i) -> __m256 {
    // SAFETY: AVX2 is there, by the contract of `Simd`.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x)) }
}

/// 16 codes in the high bytes of 16-bit lanes, as f32 of 2^-8 times their value. They pass through memory, as a
/// conversion from there needs no shuffle; the volatile write keeps the compiler from undoing it.
#[inline(always)]
unsafe fn widen(codes: __m256i) -> V {
    let mut place = MaybeUninit::<__m256i>::uninit();
    let at = place.as_mut_ptr();
    // SAFETY: AVX2 and F16C are there, by the contract of `Simd`; the place holds twice 128 bits, all written.
    unsafe {
        // The sign stays at the top; the shift leaves a copy of it below, which the mask takes away.
        let mask = _mm256_set1_epi16(0xbf80_u16 as i16);
        at.write_volatile(_mm256_and_si256(_mm256_srai_epi16::<1>(codes), mask));
        let at = at.cast::<__m128i>();
        (_mm256_cvtph_ps(_mm_load_si128(at)), _mm256_cvtph_ps(_mm_load_si128(at.add(1))))
    }
}

/// f32 rounded to bf16, kept as f32. NaN stays NaN.
#[inline(always)]
unsafe fn round(x: __m256) -> __m256 {
    // SAFETY: AVX2 is there, by the contract of `Simd`.
    unsafe {
        let bits = _mm256_castps_si256(x);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
        let rounded = high(_mm256_add_epi32(bits, bias));
        _mm256_blendv_ps(rounded, x, _mm256_cmp_ps::<_CMP_UNORD_Q>(x, x))
    }
}

/// The lanes of `f` that are subnormal, as zeros of their sign.
#[inline(always)]
unsafe fn flush(x: __m256) -> __m256 {
    // SAFETY: AVX2 is there, by the contract of `Simd`.
    unsafe {
        let sign = _mm256_set1_ps(-0.0);
        let tiny = _mm256_set1_ps(f32::MIN_POSITIVE);
        let small = _mm256_cmp_ps::<_CMP_LT_OQ>(_mm256_andnot_ps(sign, x), tiny);
        _mm256_andnot_ps(_mm256_andnot_ps(sign, small), x)
    }
}

#[inline(always)]
unsafe fn fma_flush(a: __m256, b: __m256, c: __m256) -> __m256 {
    // SAFETY: AVX2 and FMA are there, by the contract of `Simd`; the stores are to arrays of 8.
    unsafe {
        let (a, b, c) = (flush(a), flush(b), flush(c));
        let r = _mm256_fmadd_ps(a, b, c);
        let magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0), r);
        let edge = _mm256_cmp_ps::<_CMP_EQ_OQ>(magnitude, _mm256_set1_ps(f32::MIN_POSITIVE));
        if _mm256_movemask_ps(edge) == 0 {
            return flush(r);
        }
        let [a, b, c] = [a, b, c].map(|v| {
            let mut out = [0.0f32; 8];
            _mm256_storeu_ps(out.as_mut_ptr(), v);
            out
        });
        let out: [f32; 8] = std::array::from_fn(|j| lanes::fma_flush(a[j], b[j], c[j]));
        _mm256_loadu_ps(out.as_ptr())
    }
}

// SAFETY of every block below: the instruction set is there and pointers have their elements, by the trait's contract.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one contract for all, stated above")]
impl Simd for Avx2 {
    type V = V;
    type Watch = __m256i;
    const FP8_FACTOR: f32 = 256.0;

    #[inline(always)]
    unsafe fn run<T: Task<Self>>(task: T) -> T::Out {
        unsafe { run(task) }
    }

    #[inline(always)]
    unsafe fn zero() -> V {
        unsafe { (_mm256_setzero_ps(), _mm256_setzero_ps()) }
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> V {
        unsafe { (_mm256_set1_ps(x), _mm256_set1_ps(x)) }
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> V {
        unsafe { (_mm256_loadu_ps(p), _mm256_loadu_ps(p.cast::<u8>().add(32).cast())) }
    }

    #[inline(always)]
    unsafe fn store(p: *mut f32, v: V) {
        unsafe {
            _mm256_storeu_ps(p, v.0);
            _mm256_storeu_ps(p.add(8), v.1);
        }
    }

    #[inline(always)]
    unsafe fn fma(a: V, b: V, c: V) -> V {
        unsafe { (_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)) }
    }

    #[inline(always)]
    unsafe fn mul(a: V, b: V) -> V {
        unsafe { (_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)) }
    }

    #[inline(always)]
    unsafe fn fma_flush(a: V, b: V, c: V) -> V {
        unsafe { (fma_flush(a.0, b.0, c.0), fma_flush(a.1, b.1, c.1)) }
    }

    #[inline(always)]
    unsafe fn sum(v: V) -> f32 {
        unsafe {
            let a = _mm256_add_ps(v.0, v.1);
            let b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let c = _mm_add_ps(b, _mm_movehl_ps(b, b));
            _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps::<1>(c, c)))
        }
    }

    #[inline(always)]
    unsafe fn bf16(p: *const u8) -> V {
        unsafe {
            let a = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            let b = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(LANES).cast()));
            (low(a), low(b))
        }
    }

    #[inline(always)]
    unsafe fn fp8(p: *const u8) -> V {
        unsafe {
            let codes = _mm_loadu_si128(p.cast());
            let v = widen(_mm256_slli_epi16::<8>(_mm256_cvtepu8_epi16(codes)));
            let factor = _mm256_set1_ps(Self::FP8_FACTOR);
            let v = (_mm256_mul_ps(v.0, factor), _mm256_mul_ps(v.1, factor));
            let nan = _mm_set1_epi8(0x7f);
            let nan = _mm_cmpeq_epi8(_mm_and_si128(codes, nan), nan);
            let a = _mm256_castsi256_ps(_mm256_cvtepi8_epi32(nan));
            let b = _mm256_castsi256_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(nan)));
            (_mm256_or_ps(v.0, a), _mm256_or_ps(v.1, b))
        }
    }

    #[inline(always)]
    unsafe fn fp8_pair(p: *const u8) -> [V; 2] {
        unsafe {
            let a = _mm256_cvtepu8_epi16(_mm_loadu_si128(p.cast()));
            let b = _mm256_cvtepu8_epi16(_mm_loadu_si128(p.add(LANES).cast()));
            [widen(_mm256_slli_epi16::<8>(a)), widen(_mm256_slli_epi16::<8>(b))]
        }
    }

    #[inline(always)]
    unsafe fn bf16_split(p: *const u8) -> [V; 2] {
        unsafe {
            let a = _mm256_loadu_si256(p.cast());
            let b = _mm256_loadu_si256(p.add(2 * LANES).cast());
            [(high(a), high(b)), (low(a), low(b))]
        }
    }

    #[inline(always)]
    unsafe fn f32_split(p: *const u8) -> [V; 2] {
        unsafe {
            let a = round(_mm256_loadu_ps(p.cast()));
            let b = round(_mm256_loadu_ps(p.add(32).cast()));
            let c = round(_mm256_loadu_ps(p.add(64).cast()));
            let d = round(_mm256_loadu_ps(p.add(96).cast()));
            // Shuffles work in 128-bit halves; the permutation puts the quarters in order.
            macro_rules! pick {
                ($a:expr, $b:expr, $select:literal) => {
                    _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(_mm256_castps_pd(
                        _mm256_shuffle_ps::<$select>($a, $b),
                    )))
                };
            }
            [
                (pick!(a, b, 0b11_01_11_01), pick!(c, d, 0b11_01_11_01)),
                (pick!(a, b, 0b10_00_10_00), pick!(c, d, 0b10_00_10_00)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn fp8_split(p: *const u8) -> [V; 2] {
        unsafe {
            let codes = _mm256_loadu_si256(p.cast());
            [widen(codes), widen(_mm256_slli_epi16::<8>(codes))]
        }
    }

    #[inline(always)]
    unsafe fn watch_new() -> __m256i {
        unsafe { _mm256_setzero_si256() }
    }

    #[inline(always)]
    unsafe fn watch(w: __m256i, p: *const u8) -> __m256i {
        unsafe {
            let codes = _mm256_loadu_si256(p.cast());
            // Doubled, a code loses its sign and a NaN is the largest byte.
            _mm256_max_epu8(w, _mm256_add_epi8(codes, codes))
        }
    }

    #[inline(always)]
    unsafe fn watch_hit(w: __m256i) -> bool {
        unsafe { _mm256_movemask_epi8(_mm256_cmpeq_epi8(w, _mm256_set1_epi8(-2))) != 0 }
    }

    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }

    #[inline(always)]
    unsafe fn prefetch_far(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }

    unsafe fn watch_underflow() {
        super::forget_subnormals();
    }

    unsafe fn underflowed() -> bool {
        super::subnormal_seen()
    }
}
