//! The bf16 class with pairs of bf16 in 32-bit lanes, and VDPBF16PS to multiply them.
//!
//! FP8 becomes bf16 in 16-bit lanes without passing through f32. [`conforms`] tries the instruction on this CPU
//! against the class's definition, rounding and flushing included: a CPU that differs in one bit does not get to
//! use it. [`Pairs`] with emulated dots has the same loads, so that tests reach them where the instruction is missing.

use super::avx512::{Avx512, high, low, round};
use crate::dot::{Dot, Registers};
use crate::lanes::{LANES, STEP, Simd, flush, fma_flush};
use crate::mat::{Acts, round_bf16};
use std::arch::x86_64::*;
use std::hint::black_box;
use std::sync::OnceLock;
use std::time::Instant;

/// bf16 pairs in 512-bit registers, multiplied by VDPBF16PS if `HARDWARE`.
pub(crate) struct Pairs<const HARDWARE: bool>;

/// The device for CPUs with conforming AVX512-BF16.
pub(crate) type HardwarePairs = Pairs<true>;

/// The same loads, for tests on CPUs without.
#[cfg(test)]
pub(crate) type EmulatedPairs = Pairs<false>;

// SAFETY of every block below: the instruction set is there and pointers have their elements, by the trait's contract.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one contract for all, stated above")]
impl<const HARDWARE: bool> Dot for Pairs<HARDWARE> {
    type S = Avx512<HARDWARE>;
    type Elem = u16;
    type Pair = __m512i;
    const FLUSHES: bool = !HARDWARE;
    const TILE: (usize, usize) = <Avx512>::TILE;
    const FEW: &[usize] = <Avx512>::FEW;
    const FEW_FP8: usize = <Avx512>::FEW_FP8;
    const FP8_NAN: bool = HARDWARE;

    /// A few rows are bound by memory, and pairs are half as many bytes to read and less to decode; more rows go where
    /// the arithmetic is faster.
    fn pays(rows: usize) -> bool {
        !HARDWARE || rows <= Self::FEW.len() || dots_are_fast()
    }

    fn pack(x: Acts<'_>, from: usize, len: usize, out: &mut [u16]) {
        out.fill(0);
        match x {
            Acts::F32(x) => {
                for (o, x) in out.iter_mut().zip(&x[from..from + len]) {
                    *o = round_bf16(flush(*x)).to_bits();
                }
            }
            Acts::Bf16(x) => {
                for (o, x) in out.iter_mut().zip(&x[from..from + len]) {
                    *o = x.to_bits();
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn load(p: *const u16) -> __m512i {
        unsafe { _mm512_loadu_si512(p.cast()) }
    }

    #[inline(always)]
    unsafe fn store(p: *mut u16, pair: __m512i) {
        unsafe { _mm512_storeu_si512(p.cast(), pair) }
    }

    #[inline(always)]
    unsafe fn f32(p: *const u8) -> __m512i {
        unsafe {
            let a = _mm512_srli_epi32::<16>(round(_mm512_loadu_ps(p.cast())));
            let b = _mm512_srli_epi32::<16>(round(_mm512_loadu_ps(p.add(64).cast())));
            let (a, b) = (_mm512_cvtepi32_epi16(a), _mm512_cvtepi32_epi16(b));
            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b)
        }
    }

    #[inline(always)]
    unsafe fn bf16(p: *const u8) -> __m512i {
        unsafe { _mm512_loadu_si512(p.cast()) }
    }

    #[inline(always)]
    unsafe fn fp8(p: *const u8) -> __m512i {
        unsafe {
            let codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(p.cast()));
            // Exponent and mantissa in place, and the bias raised from 7 to 127.
            let field = _mm512_and_si512(_mm512_slli_epi16::<4>(codes), _mm512_set1_epi16(0x07f0));
            let normal = _mm512_add_epi16(field, _mm512_set1_epi16(120 << 7));
            // Codes 0 to 7 are multiples of 2^-9 and have no exponent of their own.
            let subnormal = _mm512_castsi128_si512(_mm_setr_epi16(
                0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60,
            ));
            let is_subnormal = _mm512_testn_epi16_mask(codes, _mm512_set1_epi16(0x78));
            // The index is a lane's low five bits, which leaves the sign out.
            let magnitude = _mm512_mask_permutexvar_epi16(normal, is_subnormal, codes, subnormal);
            let sign = _mm512_and_si512(
                _mm512_slli_epi16::<8>(codes),
                _mm512_set1_epi16(0x8000_u16 as i16),
            );
            _mm512_or_si512(magnitude, sign)
        }
    }

    #[inline(always)]
    unsafe fn fp8_two(p: *const u8) -> [__m512i; 2] {
        unsafe {
            if !HARDWARE {
                return [Self::fp8(p), Self::fp8(p.add(STEP))];
            }
            // Bytes are interleaved within 128 bits, so eight codes of each half go to each of them first.
            let order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
            let codes = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(p.cast()));
            let at = |bytes: &'static [u8; 128], i: usize| {
                _mm512_loadu_si512(bytes[i..].as_ptr().cast())
            };
            let high = _mm512_permutex2var_epi8(at(&TABLE[1], 0), codes, at(&TABLE[1], 64));
            let low = _mm512_permutex2var_epi8(at(&TABLE[0], 0), codes, at(&TABLE[0], 64));
            // `high | (codes & sign)`.
            let sign = _mm512_set1_epi8(0x80_u8 as i8);
            let high = _mm512_ternarylogic_epi32::<0xf8>(high, codes, sign);
            [_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)]
        }
    }

    #[inline(always)]
    unsafe fn step(acc: __m512, w: __m512i, x: __m512i) -> __m512 {
        unsafe {
            if HARDWARE {
                dot(acc, w, x)
            } else {
                Self::S::fma(low(w), low(x), Self::S::fma(high(w), high(x), acc))
            }
        }
    }

    #[inline(always)]
    unsafe fn step_exact(acc: __m512, w: __m512i, x: __m512i) -> __m512 {
        unsafe {
            if HARDWARE {
                dot(acc, w, x)
            } else {
                let acc = Self::S::fma_flush(high(w), high(x), acc);
                Self::S::fma_flush(low(w), low(x), acc)
            }
        }
    }
}

/// The low and the high bytes of the bf16 that each code without its sign stands for, NaN included.
static TABLE: [[u8; 128]; 2] = {
    let mut table = [[0; 128]; 2];
    let mut code = 0;
    while code < 128 {
        let (exponent, mantissa) = (code as u16 >> 3, code as u16 & 7);
        let bits = match (exponent, mantissa) {
            (15, 7) => 0x7fc0,
            (0, 0) => 0,
            // A multiple of 2^-9: the highest of its three bits becomes the implicit one.
            (0, _) => {
                let top = 15 - mantissa.leading_zeros() as u16;
                ((127 - 9 + top) << 7) | ((mantissa << (7 - top)) & 0x7f)
            }
            _ => ((exponent + 120) << 7) | (mantissa << 4),
        };
        [table[0][code], table[1][code]] = bits.to_le_bytes();
        code += 1;
    }
    table
};

/// `acc` plus the products of `w`'s and `x`'s pairs.
#[inline(always)]
unsafe fn dot(acc: __m512, w: __m512i, x: __m512i) -> __m512 {
    // SAFETY: AVX512-BF16 is there, by the contract of `Simd`; the types are the same 512 bits.
    unsafe {
        let w: __m512bh = std::mem::transmute(w);
        let x: __m512bh = std::mem::transmute(x);
        _mm512_dpbf16_ps(acc, w, x)
    }
}

/// Whether VDPBF16PS on this CPU, which has it, gives the bits of [`fma_flush`] for the odd and then the even elements.
pub(super) fn conforms() -> bool {
    static CONFORMS: OnceLock<bool> = OnceLock::new();
    // SAFETY: asked only where the instruction is there (`x86::has`).
    *CONFORMS.get_or_init(|| trials(|acc, w, x| unsafe { dot_once(acc, w, x) }))
}

/// Whether this CPU computes more in VDPBF16PS than in two f32 multiply-adds, which give the same bits. Some have one
/// unit for it, and slower. Takes a fraction of a millisecond, once.
fn dots_are_fast() -> bool {
    static FAST: OnceLock<bool> = OnceLock::new();
    *FAST.get_or_init(|| {
        let best = |f: unsafe fn()| {
            let time = |_| {
                let start = Instant::now();
                // SAFETY: asked only where both instructions are there (`Kernels::new`).
                unsafe { f() };
                start.elapsed()
            };
            (0..5).map(time).min()
        };
        best(dots) < best(multiply_adds)
    })
}

/// Rounds of [`dots`] and [`multiply_adds`].
const ROUNDS: usize = 1000;
/// Independent sums in a round, enough to keep every unit busy.
const SUMS: usize = 16;

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn dots() {
    let x = _mm512_set1_epi16(black_box(0x3f80));
    let mut sums = [_mm512_setzero_ps(); SUMS];
    for _ in 0..ROUNDS {
        for sum in &mut sums {
            // SAFETY: the instruction is there.
            *sum = unsafe { dot(*sum, x, x) };
        }
    }
    black_box(sums);
}

#[target_feature(enable = "avx512f")]
unsafe fn multiply_adds() {
    let x = _mm512_set1_ps(black_box(1.0));
    let mut sums = [_mm512_setzero_ps(); SUMS];
    for _ in 0..2 * ROUNDS {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(x, x, *sum);
        }
    }
    black_box(sums);
}

type Pairs16 = [[u16; 2]; LANES];

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn dot_once(acc: [f32; LANES], w: Pairs16, x: Pairs16) -> [f32; LANES] {
    let mut out = acc;
    // SAFETY: 64-byte arrays.
    unsafe {
        let w = _mm512_loadu_si512(w.as_ptr().cast());
        let x = _mm512_loadu_si512(x.as_ptr().cast());
        _mm512_storeu_ps(out.as_mut_ptr(), dot(_mm512_loadu_ps(acc.as_ptr()), w, x));
    }
    out
}

/// The definition, lane by lane.
fn dot_defined(acc: [f32; LANES], w: Pairs16, x: Pairs16) -> [f32; LANES] {
    let wide = |bits: u16| f32::from_bits(u32::from(bits) << 16);
    std::array::from_fn(|j| {
        let odd = fma_flush(wide(w[j][1]), wide(x[j][1]), acc[j]);
        fma_flush(wide(w[j][0]), wide(x[j][0]), odd)
    })
}

/// Tries `dot` on operands that show order and rounding (like magnitudes, cancellation), flushing (subnormal operands,
/// sums about the smallest normal number) and overflow.
fn trials(dot: impl Fn([f32; LANES], Pairs16, Pairs16) -> [f32; LANES]) -> bool {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: u32| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (((state >> 32) * u64::from(below)) >> 32) as u32
    };
    // (Exponents of the factors, of the sum; how many each spreads over.)
    let kinds = [(127, 127, 6), (120, 118, 16), (64, 1, 3), (63, 1, 30), (51, 1, 3), (1, 1, 3)];
    let kinds = kinds.into_iter().chain([(190, 253, 3), (0, 100, 255)]);
    kinds.into_iter().all(|(factor, sum, spread)| {
        (0..512).all(|_| {
            let mut number = |base: u32, mantissa_bits: u32| {
                let exponent = (base + random(spread)).min(254);
                let mantissa = random(1 << mantissa_bits) * random(4).min(1);
                (random(2) << (mantissa_bits + 8)) | (exponent << mantissa_bits) | mantissa
            };
            let mut pairs = || -> Pairs16 {
                std::array::from_fn(|_| [number(factor, 7) as u16, number(factor, 7) as u16])
            };
            let (w, x) = (pairs(), pairs());
            let acc = std::array::from_fn(|_| f32::from_bits(number(sum, 23)));
            let (got, want) = (dot(acc, w, x), dot_defined(acc, w, x));
            got.iter()
                .zip(&want)
                .all(|(g, w)| g.to_bits() == w.to_bits() || g.is_nan() && w.is_nan())
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sums without flushing, or in the other order, or rounded once for both, are told apart.
    #[test]
    fn trials_tell() {
        assert!(trials(dot_defined));
        let wide = |bits: u16| f64::from(f32::from_bits(u32::from(bits) << 16));
        let swap = |p: Pairs16| p.map(|[a, b]| [b, a]);
        assert!(!trials(|acc, w, x| dot_defined(acc, swap(w), swap(x))));
        assert!(!trials(|acc, w, x| std::array::from_fn(|j| {
            let odd = wide(w[j][1]).mul_add(wide(x[j][1]), f64::from(acc[j]));
            wide(w[j][0]).mul_add(wide(x[j][0]), odd) as f32
        })));
        assert!(!trials(|acc, w, x| std::array::from_fn(|j| {
            let odd = wide(w[j][1]).mul_add(wide(x[j][1]), f64::from(acc[j])) as f32;
            wide(w[j][0]).mul_add(wide(x[j][0]), f64::from(odd)) as f32
        })));
    }
}
