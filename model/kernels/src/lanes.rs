//! Sixteen f32 lanes, the unit every kernel is written in.
//!
//! [`Simd`] is what an instruction set has to provide: loads that widen each storage type, one fused multiply-add,
//! and [`Simd::run`], which enters a function compiled for it. The loops over them (`product.rs`, `transposed.rs`)
//! are generic, so the order of every addition is written once and no instruction set can differ from another.
//! [`Scalar`] is the reference: arrays and [`f32::mul_add`].

use crate::mat::{fp8_to_f32, round_bf16};
use half::bf16;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;
/// Elements of k that one step of a product takes: two vectors.
pub(crate) const STEP: usize = 2 * LANES;

/// A piece of work to compile for an instruction set. `call` must be `#[inline(always)]`, so that its body takes
/// on the target features of the [`Simd::run`] it is inlined into.
pub(crate) trait Task<S> {
    type Out;

    /// # Safety
    /// The CPU has `S`, and whatever the task's pointers ask for holds.
    unsafe fn call(self) -> Self::Out;
}

/// One instruction set, as sixteen f32 lanes.
///
/// # Safety
/// Every method requires that the CPU has the instruction set; loads and stores require their pointers to be valid
/// for the stated number of elements, at any alignment.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    type V: Copy;
    /// Evidence, gathered over a row's bytes, that it holds an FP8 NaN.
    type Watch: Copy;
    /// What the codes of the `fp8_*` pairs must be multiplied by to have their value: a power of two.
    const FP8_FACTOR: f32 = 1.0;

    /// Runs `task` in a function compiled for this instruction set.
    unsafe fn run<T: Task<Self>>(task: T) -> T::Out;

    unsafe fn zero() -> Self::V;
    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// [`fma_flush`] in each lane.
    unsafe fn fma_flush(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The lanes' sum as a tree: `j + (j + 8)`, then 4, 2 and 1 apart.
    unsafe fn sum(v: Self::V) -> f32;

    /// 16 bf16, widened.
    unsafe fn bf16(p: *const u8) -> Self::V;
    /// 16 e4m3 codes, widened; NaN codes give NaN.
    unsafe fn fp8(p: *const u8) -> Self::V;
    /// 32 e4m3 codes in order, each over [`Simd::FP8_FACTOR`]. NaN codes may give any value: [`Simd::watch`] tells
    /// of them.
    unsafe fn fp8_pair(p: *const u8) -> [Self::V; 2];
    /// 64 codes, as two pairs.
    #[inline(always)]
    unsafe fn fp8_pairs(p: *const u8) -> [[Self::V; 2]; 2] {
        // SAFETY: the caller's.
        unsafe { [Self::fp8_pair(p), Self::fp8_pair(p.add(STEP))] }
    }
    /// 32 bf16 as lanes of (odd, even) elements: lane `j` holds elements `2j + 1` and `2j`.
    unsafe fn bf16_split(p: *const u8) -> [Self::V; 2];
    /// 32 f32 rounded to bf16, as (odd, even).
    unsafe fn f32_split(p: *const u8) -> [Self::V; 2];
    /// 32 e4m3 codes as (odd, even); otherwise as in [`Simd::fp8_pair`].
    unsafe fn fp8_split(p: *const u8) -> [Self::V; 2];
    /// 64 codes, as two of the same.
    #[inline(always)]
    unsafe fn fp8_splits(p: *const u8) -> [[Self::V; 2]; 2] {
        // SAFETY: the caller's.
        unsafe { [Self::fp8_split(p), Self::fp8_split(p.add(STEP))] }
    }

    unsafe fn watch_new() -> Self::Watch;
    /// Notes 32 e4m3 codes.
    unsafe fn watch(w: Self::Watch, p: *const u8) -> Self::Watch;
    /// Notes 64.
    #[inline(always)]
    unsafe fn watch_two(w: Self::Watch, p: *const u8) -> Self::Watch {
        // SAFETY: the caller's.
        unsafe { Self::watch(Self::watch(w, p), p.add(STEP)) }
    }
    /// Whether a noted code was a NaN.
    unsafe fn watch_hit(w: Self::Watch) -> bool;

    /// Asks for the cache line at `p`, which need not be valid.
    unsafe fn prefetch(p: *const u8) {
        let _ = p;
    }

    /// The same, into the second level only.
    unsafe fn prefetch_far(p: *const u8) {
        let _ = p;
    }

    /// Forgets what [`Simd::underflowed`] has seen.
    unsafe fn watch_underflow() {}
    /// Whether an operation since [`Simd::watch_underflow`] read or made a subnormal, so that [`Simd::fma`] and
    /// [`Simd::fma_flush`] may have differed. May say yes without need.
    unsafe fn underflowed() -> bool {
        false
    }
}

/// The smallest normal magnitude.
const TINY: f32 = f32::MIN_POSITIVE;

/// `x`, or a zero of its sign if it is subnormal.
#[inline(always)]
pub(crate) fn flush(x: f32) -> f32 {
    if x.abs() < TINY { f32::from_bits(x.to_bits() & 0x8000_0000) } else { x }
}

/// `a * b + c` as VDPBF16PS has it: rounded once to nearest even, a subnormal operand taken as zero, and a result
/// that is tiny after rounding flushed to zero (Intel SDM vol. 2, VDPBF16PS; vol. 1, 4.9.1.5). `a` and `b` are
/// bf16 values, so their product is exact in f64.
#[inline(always)]
pub(crate) fn fma_flush(a: f32, b: f32, c: f32) -> f32 {
    let (a, b, c) = (flush(a), flush(b), flush(c));
    let r = a.mul_add(b, c);
    if r.abs() == TINY { fma_at_edge(a, b, c, r) } else { flush(r) }
}

/// The case where `a * b + c` came to the smallest normal number `r`. With the exponent unbounded, an exact value
/// under `TINY * (1 - 2^-25)` would have rounded to something smaller: it is tiny, and flushed.
#[cold]
pub(crate) fn fma_at_edge(a: f32, b: f32, c: f32, r: f32) -> f32 {
    let edge = f64::from(TINY) * (1.0 - 1.0 / f64::from(1 << 25));
    let (p, c) = (f64::from(a) * f64::from(b), f64::from(c));
    // Two-sum: `s + e` is `p + c` exactly.
    let s = p + c;
    let t = s - p;
    let e = (p - (s - t)) + (c - t);
    let (s, e) = if s < 0.0 { (-s, -e) } else { (s, e) };
    if s < edge || (s == edge && e < 0.0) { f32::from_bits(r.to_bits() & 0x8000_0000) } else { r }
}

/// The reference: no instruction set at all.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

/// An expression for each lane. A loop and not [`std::array::from_fn`], whose closure would not take on the target
/// features of the function around it.
macro_rules! each {
    ($j:ident => $value:expr) => {{
        let mut out = [0.0f32; $crate::lanes::LANES];
        for $j in 0..$crate::lanes::LANES {
            out[$j] = $value;
        }
        out
    }};
}
pub(crate) use each;

/// The `i`-th element of size `N` at `p`.
#[inline(always)]
unsafe fn element<const N: usize>(p: *const u8, i: usize) -> [u8; N] {
    // SAFETY: the caller vouches for element i; byte arrays have no alignment.
    unsafe { p.cast::<[u8; N]>().add(i).read() }
}

#[inline(always)]
unsafe fn f32_at(p: *const u8, i: usize) -> f32 {
    // SAFETY: the caller vouches for element i.
    f32::from_le_bytes(unsafe { element(p, i) })
}

#[inline(always)]
unsafe fn bf16_at(p: *const u8, i: usize) -> f32 {
    // SAFETY: the caller vouches for element i.
    bf16::from_le_bytes(unsafe { element(p, i) }).to_f32()
}

#[inline(always)]
unsafe fn fp8_at(p: *const u8, i: usize) -> f32 {
    // SAFETY: the caller vouches for element i.
    fp8_to_f32(unsafe { *p.add(i) })
}

// SAFETY of every block below: the trait's contract gives each load and store its 16 or 32 elements.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one contract for all, stated above")]
impl Simd for Scalar {
    type V = [f32; LANES];
    type Watch = bool;

    unsafe fn run<T: Task<Self>>(task: T) -> T::Out {
        unsafe { task.call() }
    }

    #[inline(always)]
    unsafe fn zero() -> Self::V {
        [0.0; LANES]
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; LANES]
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        each!(j => unsafe { f32_at(p.cast(), j) })
    }

    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        unsafe { p.cast::<Self::V>().write_unaligned(v) }
    }

    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        each!(j => a[j].mul_add(b[j], c[j]))
    }

    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        each!(j => a[j] * b[j])
    }

    #[inline(always)]
    unsafe fn fma_flush(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        each!(j => fma_flush(a[j], b[j], c[j]))
    }

    #[inline(always)]
    unsafe fn sum(v: Self::V) -> f32 {
        tree(v)
    }

    #[inline(always)]
    unsafe fn bf16(p: *const u8) -> Self::V {
        each!(j => unsafe { bf16_at(p, j) })
    }

    #[inline(always)]
    unsafe fn fp8(p: *const u8) -> Self::V {
        each!(j => unsafe { fp8_at(p, j) })
    }

    #[inline(always)]
    unsafe fn fp8_pair(p: *const u8) -> [Self::V; 2] {
        unsafe { [Self::fp8(p), Self::fp8(p.add(LANES))] }
    }

    #[inline(always)]
    unsafe fn bf16_split(p: *const u8) -> [Self::V; 2] {
        [1, 0].map(|odd| each!(j => unsafe { bf16_at(p, 2 * j + odd) }))
    }

    #[inline(always)]
    unsafe fn f32_split(p: *const u8) -> [Self::V; 2] {
        [1, 0].map(|odd| each!(j => round_bf16(unsafe { f32_at(p, 2 * j + odd) }).to_f32()))
    }

    #[inline(always)]
    unsafe fn fp8_split(p: *const u8) -> [Self::V; 2] {
        [1, 0].map(|odd| each!(j => unsafe { fp8_at(p, 2 * j + odd) }))
    }

    #[inline(always)]
    unsafe fn watch_new() -> bool {
        false
    }

    #[inline(always)]
    unsafe fn watch(w: bool, p: *const u8) -> bool {
        let mut hit = w;
        for i in 0..STEP {
            hit |= unsafe { *p.add(i) } & 0x7f == 0x7f;
        }
        hit
    }

    #[inline(always)]
    unsafe fn watch_hit(w: bool) -> bool {
        w
    }
}

/// The sum of sixteen lanes: 16 to 8 (`j + (j + 8)`), then 4, 2 and 1.
#[inline(always)]
pub(crate) fn tree(v: [f32; LANES]) -> f32 {
    let (mut a, mut b) = ([0.0f32; 8], [0.0f32; 4]);
    for j in 0..8 {
        a[j] = v[j] + v[j + 8];
    }
    for j in 0..4 {
        b[j] = a[j] + a[j + 4];
    }
    (b[0] + b[2]) + (b[1] + b[3])
}
