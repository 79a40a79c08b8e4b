//! The two numerics classes of a product, as steps of 32 elements.
//!
//! [`Wide`] is the f32 class: weights widened exactly, lane `j` takes elements `j` and then `j + 16` of a step, each
//! a fused multiply-add. [`Split`] is the bf16 class: lane `j` takes the odd and then the even element of pair `j`,
//! with subnormals flushed, which is what VDPBF16PS is documented to do. A class says how activations and
//! weights become registers; the order of steps is the business of `product.rs`.

use crate::lanes::{LANES, STEP, Scalar, Simd, flush};
use crate::mat::{Acts, Mat, round_bf16};
use crate::packed::{Out, Packed};
use crate::product::computed;
use bytemuck::Pod;
use std::marker::PhantomData;

/// A numerics class on an instruction set.
///
/// # Safety
/// As for [`Simd`]; loads take [`STEP`] elements.
pub(crate) trait Dot: Send + Sync + 'static {
    type S: Simd;
    /// What activations, and weights decoded ahead, are packed as.
    type Elem: Pod + Send;
    /// Thirty-two elements in registers.
    type Pair: Copy;
    /// Whether [`Dot::step`] may miss a flush that [`Dot::step_exact`] makes, which [`Simd::underflowed`] tells.
    const FLUSHES: bool;
    /// Rows and outputs of the register tile for many rows.
    const TILE: (usize, usize);
    /// For 1, 2, ... rows that read the weight as it lies, the outputs computed at once; beyond, it is decoded first.
    const FEW: &[usize];
    /// The most outputs at once for one row where the weight is FP8.
    const FEW_FP8: usize;

    /// Whether this way to multiply is the fastest that gives its bits, for so many rows.
    fn pays(_rows: usize) -> bool {
        true
    }

    /// Packs one step of a row's activations: `len <= STEP` elements from `from`, the rest zero.
    fn pack(x: Acts<'_>, from: usize, len: usize, out: &mut [Self::Elem]);
    /// Whether [`Dot::fp8_two`] makes NaNs of NaN codes.
    const FP8_NAN: bool = false;
    /// What activations for an FP8 weight are multiplied by, so that products with [`Dot::fp8`]'s values are those of
    /// the codes: a power of two, which changes no bit of them.
    const FP8_FACTOR: f32 = 1.0;
    /// Multiplies packed activations by [`Dot::FP8_FACTOR`].
    fn enlarge(_out: &mut [Self::Elem]) {}
    /// The product with an FP8 weight where activations are too large to be multiplied ([`Packed::is_huge`]).
    ///
    /// # Safety
    /// As for [`product()`](crate::product::product).
    unsafe fn huge(_x: &Packed, _w: &Mat<'_>, _y: &mut Out<'_>) {
        unreachable!("only where activations are multiplied");
    }

    unsafe fn load(p: *const Self::Elem) -> Self::Pair;
    unsafe fn store(p: *mut Self::Elem, pair: Self::Pair);
    unsafe fn f32(p: *const u8) -> Self::Pair;
    unsafe fn bf16(p: *const u8) -> Self::Pair;
    /// Codes over [`Dot::FP8_FACTOR`]; NaN codes may give any value.
    unsafe fn fp8(p: *const u8) -> Self::Pair;
    /// Two steps of them; NaN codes give NaNs if [`Dot::FP8_NAN`].
    #[inline(always)]
    unsafe fn fp8_two(p: *const u8) -> [Self::Pair; 2] {
        // SAFETY: the caller's.
        unsafe { [Self::fp8(p), Self::fp8(p.add(STEP))] }
    }

    unsafe fn step(acc: <Self::S as Simd>::V, w: Self::Pair, x: Self::Pair)
    -> <Self::S as Simd>::V;
    unsafe fn step_exact(
        acc: <Self::S as Simd>::V,
        w: Self::Pair,
        x: Self::Pair,
    ) -> <Self::S as Simd>::V;
}

/// How a weight is stored, as a type, so that a kernel is compiled for each.
pub(crate) trait Source {
    /// Bytes of one element.
    const SIZE: usize;
    /// Whether elements can be FP8 NaNs, which the loads do not translate.
    const WATCHED: bool;

    /// # Safety
    /// As for [`Dot`].
    unsafe fn load<D: Dot>(p: *const u8) -> D::Pair;

    /// Two steps.
    ///
    /// # Safety
    /// As for [`Dot`].
    #[inline(always)]
    unsafe fn load_two<D: Dot>(p: *const u8) -> [D::Pair; 2] {
        // SAFETY: the caller's.
        unsafe { [Self::load::<D>(p), Self::load::<D>(p.add(STEP * Self::SIZE))] }
    }

    /// 16 elements in order, widened; FP8 NaNs give NaN.
    ///
    /// # Safety
    /// As for [`Simd`].
    unsafe fn lanes<S: Simd>(p: *const u8) -> S::V;
}

pub(crate) struct F32;
pub(crate) struct Bf16;
pub(crate) struct Fp8;

impl Source for F32 {
    const SIZE: usize = 4;
    const WATCHED: bool = false;

    #[inline(always)]
    unsafe fn load<D: Dot>(p: *const u8) -> D::Pair {
        // SAFETY: the caller's.
        unsafe { D::f32(p) }
    }

    #[inline(always)]
    unsafe fn lanes<S: Simd>(p: *const u8) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::load(p.cast()) }
    }
}

impl Source for Bf16 {
    const SIZE: usize = 2;
    const WATCHED: bool = false;

    #[inline(always)]
    unsafe fn load<D: Dot>(p: *const u8) -> D::Pair {
        // SAFETY: the caller's.
        unsafe { D::bf16(p) }
    }

    #[inline(always)]
    unsafe fn lanes<S: Simd>(p: *const u8) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::bf16(p) }
    }
}

impl Source for Fp8 {
    const SIZE: usize = 1;
    const WATCHED: bool = true;

    #[inline(always)]
    unsafe fn load<D: Dot>(p: *const u8) -> D::Pair {
        // SAFETY: the caller's.
        unsafe { D::fp8(p) }
    }

    #[inline(always)]
    unsafe fn load_two<D: Dot>(p: *const u8) -> [D::Pair; 2] {
        // SAFETY: the caller's.
        unsafe { D::fp8_two(p) }
    }

    #[inline(always)]
    unsafe fn lanes<S: Simd>(p: *const u8) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::fp8(p) }
    }
}

/// The f32 class.
pub(crate) struct Wide<S>(PhantomData<S>);

/// The bf16 class by two fused multiply-adds.
pub(crate) struct Split<S>(PhantomData<S>);

/// Register tiles that fit an instruction set's registers.
pub(crate) trait Registers {
    const TILE: (usize, usize);
    const FEW: &[usize];
    const FEW_FP8: usize;
    /// Whether a fused multiply-add in hardware stands in for [`Simd::fma_flush`] until an underflow shows.
    const FLAGS: bool;
}

impl Registers for Scalar {
    const TILE: (usize, usize) = (1, 2);
    const FEW: &[usize] = &[1];
    const FEW_FP8: usize = 1;
    const FLAGS: bool = false;
}

// SAFETY of the blocks in both: the callers', which are the same as those of the `Simd` calls inside.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one contract for all, stated above")]
impl<S: Simd + Registers> Dot for Wide<S> {
    type S = S;
    type Elem = f32;
    type Pair = [S::V; 2];
    const FLUSHES: bool = false;
    const TILE: (usize, usize) = S::TILE;
    const FEW: &[usize] = S::FEW;
    const FEW_FP8: usize = S::FEW_FP8;
    const FP8_FACTOR: f32 = S::FP8_FACTOR;

    fn pack(x: Acts<'_>, from: usize, len: usize, out: &mut [f32]) {
        out.fill(0.0);
        match x {
            Acts::F32(x) => out[..len].copy_from_slice(&x[from..from + len]),
            Acts::Bf16(x) => {
                for (o, x) in out.iter_mut().zip(&x[from..from + len]) {
                    *o = x.to_f32();
                }
            }
        }
    }

    fn enlarge(out: &mut [f32]) {
        out.iter_mut().for_each(|x| *x *= S::FP8_FACTOR);
    }

    unsafe fn huge(x: &Packed, w: &Mat<'_>, y: &mut Out<'_>) {
        unsafe { computed::<Wide<Scalar>>(x, w, y) }
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::Pair {
        unsafe { [S::load(p), S::load(p.add(LANES))] }
    }

    #[inline(always)]
    unsafe fn store(p: *mut f32, [a, b]: Self::Pair) {
        unsafe {
            S::store(p, a);
            S::store(p.add(LANES), b);
        }
    }

    #[inline(always)]
    unsafe fn f32(p: *const u8) -> Self::Pair {
        unsafe { Self::load(p.cast()) }
    }

    #[inline(always)]
    unsafe fn bf16(p: *const u8) -> Self::Pair {
        unsafe { [S::bf16(p), S::bf16(p.add(2 * LANES))] }
    }

    #[inline(always)]
    unsafe fn fp8(p: *const u8) -> Self::Pair {
        unsafe { S::fp8_pair(p) }
    }

    #[inline(always)]
    unsafe fn fp8_two(p: *const u8) -> [Self::Pair; 2] {
        unsafe { S::fp8_pairs(p) }
    }

    #[inline(always)]
    unsafe fn step(acc: S::V, w: Self::Pair, x: Self::Pair) -> S::V {
        unsafe { S::fma(w[1], x[1], S::fma(w[0], x[0], acc)) }
    }

    #[inline(always)]
    unsafe fn step_exact(acc: S::V, w: Self::Pair, x: Self::Pair) -> S::V {
        unsafe { Self::step(acc, w, x) }
    }
}

#[allow(clippy::undocumented_unsafe_blocks, reason = "one contract for all, stated above")]
impl<S: Simd + Registers> Dot for Split<S> {
    type S = S;
    type Elem = f32;
    type Pair = [S::V; 2];
    const FLUSHES: bool = S::FLAGS;
    const TILE: (usize, usize) = S::TILE;
    const FEW: &[usize] = S::FEW;
    const FEW_FP8: usize = S::FEW_FP8;
    const FP8_FACTOR: f32 = S::FP8_FACTOR;

    fn pack(x: Acts<'_>, from: usize, len: usize, out: &mut [f32]) {
        let mut step = [0.0; STEP];
        match x {
            Acts::F32(x) => {
                for (o, x) in step.iter_mut().zip(&x[from..from + len]) {
                    *o = flush(round_bf16(*x).to_f32());
                }
            }
            Acts::Bf16(x) => {
                for (o, x) in step.iter_mut().zip(&x[from..from + len]) {
                    *o = flush(x.to_f32());
                }
            }
        }
        let (odd, even) = out.split_at_mut(LANES);
        for (j, [e, o]) in step.as_chunks::<2>().0.iter().enumerate() {
            odd[j] = *o;
            even[j] = *e;
        }
    }

    fn enlarge(out: &mut [f32]) {
        out.iter_mut().for_each(|x| *x *= S::FP8_FACTOR);
    }

    unsafe fn huge(x: &Packed, w: &Mat<'_>, y: &mut Out<'_>) {
        unsafe { computed::<Split<Scalar>>(x, w, y) }
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::Pair {
        unsafe { [S::load(p), S::load(p.add(LANES))] }
    }

    #[inline(always)]
    unsafe fn store(p: *mut f32, [a, b]: Self::Pair) {
        unsafe {
            S::store(p, a);
            S::store(p.add(LANES), b);
        }
    }

    #[inline(always)]
    unsafe fn f32(p: *const u8) -> Self::Pair {
        unsafe { S::f32_split(p) }
    }

    #[inline(always)]
    unsafe fn bf16(p: *const u8) -> Self::Pair {
        unsafe { S::bf16_split(p) }
    }

    #[inline(always)]
    unsafe fn fp8(p: *const u8) -> Self::Pair {
        unsafe { S::fp8_split(p) }
    }

    #[inline(always)]
    unsafe fn fp8_two(p: *const u8) -> [Self::Pair; 2] {
        unsafe { S::fp8_splits(p) }
    }

    #[inline(always)]
    unsafe fn step(acc: S::V, w: Self::Pair, x: Self::Pair) -> S::V {
        unsafe {
            if S::FLAGS {
                S::fma(w[1], x[1], S::fma(w[0], x[0], acc))
            } else {
                Self::step_exact(acc, w, x)
            }
        }
    }

    #[inline(always)]
    unsafe fn step_exact(acc: S::V, w: Self::Pair, x: Self::Pair) -> S::V {
        unsafe { S::fma_flush(w[1], x[1], S::fma_flush(w[0], x[0], acc)) }
    }
}
