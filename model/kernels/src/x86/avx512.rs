//! Sixteen lanes as one 512-bit register: AVX-512 F, BW, VL and DQ.
//!
//! FP8 goes through half precision as in `avx2.rs`.

use crate::dot::Registers;
use crate::lanes::{self, LANES, STEP, Simd, Task};
use std::arch::asm;
use std::arch::x86_64::*;

/// AVX-512 F, BW, VL and DQ, with AVX2, FMA and F16C; and BF16 and VBMI in what [`Simd::run`] compiles, if `BF16`.
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const BF16: bool = false>;

impl<const BF16: bool> Registers for Avx512<BF16> {
    const TILE: (usize, usize) = (6, 4);
    const FEW: &[usize] = &[8, 4, 4, 4];
    const FEW_FP8: usize = 4;
    const FLAGS: bool = true;
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
unsafe fn run<S, T: Task<S>>(task: T) -> T::Out {
    // SAFETY: the caller's.
    unsafe { task.call() }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,avx2,fma,f16c")]
unsafe fn run_bf16<S, T: Task<S>>(task: T) -> T::Out {
    // SAFETY: the caller's.
    unsafe { task.call() }
}

/// f32 bits of 16 bf16 in the high halves of `x`'s lanes.
#[inline(always)]
pub(super) unsafe fn high(x: __m512i) -> __m512 {
    // SAFETY: AVX-512 is there, by the contract of `Simd`.
    unsafe { _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(0xffff_0000_u32 as i32))) }
}

/// f32 bits of 16 bf16 in the low halves of `x`'s lanes.
#[inline(always)]
pub(super) unsafe fn low(x: __m512i) -> __m512 {
    // SAFETY: AVX-512 is there, by the contract of `Simd`.
    unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(x)) }
}

/// 16 codes in the high bytes of 16-bit lanes, as f32 of 2^-8 times their value.
#[inline(always)]
unsafe fn widen(codes: __m256i) -> __m512 {
    // SAFETY: AVX-512 and AVX2 are there, by the contract of `Simd`.
    unsafe {
        // The sign stays at the top; the shift leaves a copy of it below, which the mask takes away.
        let mask = _mm256_set1_epi16(0xbf80_u16 as i16);
        _mm512_cvtph_ps(_mm256_and_si256(_mm256_srai_epi16::<1>(codes), mask))
    }
}

/// 32 codes in the high bytes of 16-bit lanes, as halves of 2^-8 times their value.
#[inline(always)]
unsafe fn halves(codes: __m512i) -> __m512i {
    // SAFETY: AVX-512 is there, by the contract of `Simd`.
    unsafe {
        let mask = _mm512_set1_epi16(0xbf80_u16 as i16);
        _mm512_and_si512(_mm512_srai_epi16::<1>(codes), mask)
    }
}

/// `w`, with the top bit of each byte set where a code is a NaN: seven ones carry into it.
#[inline(always)]
unsafe fn watch(w: __m512i, codes: __m512i) -> __m512i {
    /// `w | (a ^ b)`.
    const OR_XOR: i32 = 0xf6;
    // SAFETY: AVX-512 is there, by the contract of `Simd`.
    unsafe {
        let next = _mm512_add_epi8(codes, _mm512_set1_epi8(1));
        _mm512_ternarylogic_epi32::<OR_XOR>(w, codes, next)
    }
}

/// The lower and upper halves of `a` and then of `b`, widened. They pass through memory, as a conversion from there
/// needs no shuffle, and shuffles have one port.
#[inline(always)]
unsafe fn widen_all(a: __m512i, b: __m512i) -> [__m512; 4] {
    let place = [a, b];
    let at = place.as_ptr().cast::<[u8; 32]>();
    // SAFETY: AVX-512 is there, by the contract of `Simd`; the place holds four times 256 bits.
    unsafe { [widen_at(at), widen_at(at.add(1)), widen_at(at.add(2)), widen_at(at.add(3))] }
}

/// 16 halves at `p`, widened. The intrinsic does not read memory: it is the form that suppresses exceptions.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn widen_at(p: *const [u8; 32]) -> __m512 {
    let out;
    // SAFETY: reads the caller's 32 bytes.
    unsafe {
        asm!(
            "vcvtph2ps {}, ymmword ptr [{}]",
            out(zmm_reg) out,
            in(reg) p,
            options(pure, readonly, nostack, preserves_flags)
        );
    }
    out
}

/// f32 bits rounded to bf16, kept in the high half. NaN stays NaN.
#[inline(always)]
pub(super) unsafe fn round(x: __m512) -> __m512i {
    // SAFETY: AVX-512 is there, by the contract of `Simd`.
    unsafe {
        let bits = _mm512_castps_si512(x);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
        let rounded = _mm512_add_epi32(bits, bias);
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
        let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
        let out = _mm512_mask_blend_epi32(nan, rounded, quiet);
        _mm512_and_si512(out, _mm512_set1_epi32(0xffff_0000_u32 as i32))
    }
}

/// The lanes of `x` that are subnormal, as zeros of their sign.
#[inline(always)]
unsafe fn flush(x: __m512) -> __m512 {
    // SAFETY: AVX-512 is there, by the contract of `Simd`.
    unsafe {
        let tiny = _mm512_set1_ps(f32::MIN_POSITIVE);
        let small = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(_mm512_abs_ps(x), tiny);
        _mm512_mask_and_ps(x, small, x, _mm512_set1_ps(-0.0))
    }
}

// SAFETY of every block below: the instruction set is there and pointers have their elements, by the trait's contract.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one contract for all, stated above")]
impl<const BF16: bool> Simd for Avx512<BF16> {
    type V = __m512;
    type Watch = __m512i;
    const FP8_FACTOR: f32 = 256.0;

    #[inline(always)]
    unsafe fn run<T: Task<Self>>(task: T) -> T::Out {
        unsafe { if BF16 { run_bf16(task) } else { run(task) } }
    }

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        unsafe { _mm512_storeu_ps(p, v) }
    }

    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn fma_flush(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe {
            let (a, b, c) = (flush(a), flush(b), flush(c));
            let r = _mm512_fmadd_ps(a, b, c);
            let tiny = _mm512_set1_ps(f32::MIN_POSITIVE);
            if _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(_mm512_abs_ps(r), tiny) == 0 {
                return flush(r);
            }
            let [a, b, c] = [a, b, c].map(|v| {
                let mut out = [0.0f32; LANES];
                _mm512_storeu_ps(out.as_mut_ptr(), v);
                out
            });
            let out: [f32; LANES] = std::array::from_fn(|j| lanes::fma_flush(a[j], b[j], c[j]));
            _mm512_loadu_ps(out.as_ptr())
        }
    }

    #[inline(always)]
    unsafe fn sum(v: __m512) -> f32 {
        unsafe {
            let a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let c = _mm_add_ps(b, _mm_movehl_ps(b, b));
            _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps::<1>(c, c)))
        }
    }

    #[inline(always)]
    unsafe fn bf16(p: *const u8) -> __m512 {
        unsafe { low(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()))) }
    }

    #[inline(always)]
    unsafe fn fp8(p: *const u8) -> __m512 {
        unsafe {
            let codes = _mm_loadu_si128(p.cast());
            let v = widen(_mm256_slli_epi16::<8>(_mm256_cvtepu8_epi16(codes)));
            let v = _mm512_mul_ps(v, _mm512_set1_ps(Self::FP8_FACTOR));
            let nan = _mm_set1_epi8(0x7f);
            let nan = _mm_cmpeq_epi8_mask(_mm_and_si128(codes, nan), nan);
            _mm512_mask_blend_ps(nan, v, _mm512_set1_ps(f32::NAN))
        }
    }

    #[inline(always)]
    unsafe fn fp8_pair(p: *const u8) -> [__m512; 2] {
        unsafe {
            let a = _mm256_cvtepu8_epi16(_mm_loadu_si128(p.cast()));
            let b = _mm256_cvtepu8_epi16(_mm_loadu_si128(p.add(LANES).cast()));
            [widen(_mm256_slli_epi16::<8>(a)), widen(_mm256_slli_epi16::<8>(b))]
        }
    }

    #[inline(always)]
    unsafe fn fp8_pairs(p: *const u8) -> [[__m512; 2]; 2] {
        unsafe {
            let a = _mm512_cvtepu8_epi16(_mm256_loadu_si256(p.cast()));
            let b = _mm512_cvtepu8_epi16(_mm256_loadu_si256(p.add(STEP).cast()));
            let (a, b) = (_mm512_slli_epi16::<8>(a), _mm512_slli_epi16::<8>(b));
            let [a, b, c, d] = widen_all(halves(a), halves(b));
            [[a, b], [c, d]]
        }
    }

    #[inline(always)]
    unsafe fn bf16_split(p: *const u8) -> [__m512; 2] {
        unsafe {
            let x = _mm512_loadu_si512(p.cast());
            [high(x), low(x)]
        }
    }

    #[inline(always)]
    unsafe fn f32_split(p: *const u8) -> [__m512; 2] {
        unsafe {
            let a = round(_mm512_loadu_ps(p.cast()));
            let b = round(_mm512_loadu_ps(p.add(64).cast()));
            let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
            let odd = _mm512_permutex2var_epi32(a, odd, b);
            let even = _mm512_permutex2var_epi32(a, even, b);
            [_mm512_castsi512_ps(odd), _mm512_castsi512_ps(even)]
        }
    }

    #[inline(always)]
    unsafe fn fp8_split(p: *const u8) -> [__m512; 2] {
        unsafe {
            let codes = _mm256_loadu_si256(p.cast());
            [widen(codes), widen(_mm256_slli_epi16::<8>(codes))]
        }
    }

    #[inline(always)]
    unsafe fn fp8_splits(p: *const u8) -> [[__m512; 2]; 2] {
        unsafe {
            let codes = _mm512_loadu_si512(p.cast());
            let odd = halves(codes);
            let even = halves(_mm512_bslli_epi128::<1>(codes));
            let [a, b, c, d] = widen_all(odd, even);
            [[a, c], [b, d]]
        }
    }

    #[inline(always)]
    unsafe fn watch_new() -> __m512i {
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    unsafe fn watch(w: __m512i, p: *const u8) -> __m512i {
        unsafe { watch(w, _mm512_zextsi256_si512(_mm256_loadu_si256(p.cast()))) }
    }

    #[inline(always)]
    unsafe fn watch_two(w: __m512i, p: *const u8) -> __m512i {
        unsafe { watch(w, _mm512_loadu_si512(p.cast())) }
    }

    #[inline(always)]
    unsafe fn watch_hit(w: __m512i) -> bool {
        unsafe { _mm512_movepi8_mask(w) != 0 }
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
