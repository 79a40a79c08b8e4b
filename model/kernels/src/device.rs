//! The small trait the model computes through, and its one implementation per instruction set.
//!
//! Shapes are the caller's promise: a method panics on lengths that do not fit each other, and does not read or write
//! outside them. Devices of the same numerics class give the same bits (`lib.rs` states the orders).

use crate::dot::{Dot, Registers, Split, Wide};
use crate::isa::Isa;
use crate::lanes::{Scalar, Simd, Task};
use crate::mat::{Acts, Mat};
use crate::packed::{Inner, Out, Packed};
use crate::pool::Pool;
use crate::product::product;
use crate::rowwise as row;
use crate::tile::Defined;
use crate::transposed::{Stack, Transposed};
#[cfg(target_arch = "x86_64")]
use crate::x86::{Amx, Avx2, Avx512, HardwarePairs};
use half::bf16;
use std::cell::RefCell;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;

thread_local! {
    /// The packed activations of [`Device::matmul`], kept between calls.
    static PACKED: RefCell<Packed> = RefCell::new(Packed::new());
    /// The sums of [`Device::matmul_rounded`] before they are rounded, kept between calls.
    static SUMS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// What a device computes.
pub trait Device: Sync {
    /// Packs `x` `[rows, w.k()]` for products with weights laid out as `w` is (its k and k-blocks) into `into`.
    fn pack(&self, x: Acts<'_>, rows: usize, w: Mat<'_>, into: &mut Packed) {
        self.pack_on(None, x, rows, w, into);
    }

    /// As [`Device::pack`], on the threads of `pool` if that is worth it.
    fn pack_on(&self, pool: Option<&Pool>, x: Acts<'_>, rows: usize, w: Mat<'_>, into: &mut Packed);

    /// `y[r, n] = sum over k of x[r, k] w[n, k]`, for activations packed by this device for such a weight.
    fn matmul_packed(&self, x: &Packed, w: Mat<'_>, y: &mut Out<'_>);

    /// As [`Device::matmul_packed`], rounded to nearest even: `y` is `[x.rows(), w.n()]`.
    fn matmul_rounded(&self, x: &Packed, w: Mat<'_>, y: &mut [bf16]);

    /// Lays `h` out as activations of `down`, `[x.rows(), gate.n()]`, for [`Device::gated_packed`] to write. None where
    /// the device makes activations only from rows, for such weights or so many rows.
    fn inner<'h>(
        &self,
        x: &Packed,
        gate: Mat<'_>,
        up: Mat<'_>,
        down: Mat<'_>,
        h: &'h mut Packed,
    ) -> Option<Inner<'h>>;

    /// `h = silu(x gateᵀ) * (x upᵀ)`, rounded to bf16, for weights that have the columns of `h`, which is of
    /// [`Device::inner`] for them or more columns.
    fn gated_packed(&self, x: &Packed, gate: Mat<'_>, up: Mat<'_>, h: &mut Inner<'_>);

    /// `y[r * ldy + n] = sum over k of x[r, k] w[n, k]`; `x` is `[rows, w.k()]`. bf16 activations round f32-stored weights
    /// to bf16.
    fn matmul(&self, x: Acts<'_>, rows: usize, w: Mat<'_>, y: &mut [f32], ldy: usize) {
        let mut packed = PACKED.take();
        self.pack(x, rows, w, &mut packed);
        self.matmul_packed(&packed, w, &mut Out::new(y, rows, w.n(), ldy));
        PACKED.set(packed);
    }

    /// `y[r * ldy + l] = sum over n of x[r * ldx + n] w[n, l]`, for those n that row r sees. In a class of tiles the sign of
    /// a zero is unspecified where another row sees more.
    fn matmul_t(
        &self,
        x: Acts<'_>,
        rows: usize,
        ldx: usize,
        w: Stack<'_>,
        y: &mut [f32],
        ldy: usize,
    );

    /// `y = x / sqrt(mean(x^2) + eps) * weight` for one row (Zhang and Sennrich 2019, eq. 4).
    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]);

    /// `y = gate * sigmoid(gate) * up`.
    fn silu_mul(&self, gate: &[f32], up: &[f32], y: &mut [f32]);

    /// `gate = gate * sigmoid(gate) * up`.
    fn swiglu(&self, gate: &mut [f32], up: &[f32]);

    /// `s = e^(s - max)` in place; returns the sum.
    fn softmax_weights(&self, s: &mut [f32], max: f32) -> f32;

    /// `x = 1 / (1 + e^-x)` in place.
    fn sigmoid(&self, x: &mut [f32]);

    /// The largest element; NaN is never larger, and nothing gives minus infinity.
    fn max(&self, x: &[f32]) -> f32;

    /// `y = a * x + y`, fused.
    fn axpy(&self, a: f32, x: Acts<'_>, y: &mut [f32]);

    /// `y = sum of a * x`, in the order of `x`, as [`Device::axpy`] adds to zeros.
    fn weigh(&self, x: &[(f32, &[bf16])], y: &mut [f32]);

    /// `y = a * x + b * y`, the second product rounded by itself.
    fn blend(&self, a: f32, x: &[f32], b: f32, y: &mut [f32]);

    /// `y = a * y`; a zero has no sign.
    fn scale(&self, a: f32, y: &mut [f32]);

    /// `y = x` rounded to nearest even.
    fn to_bf16(&self, x: &[f32], y: &mut [bf16]);
}

/// How the activations of one class are laid out and multiplied.
pub(crate) trait Multiply: Send + Sync + 'static {
    /// See [`Dot::pays`].
    fn pays(_rows: usize) -> bool {
        true
    }

    /// See [`Device::pack_on`].
    fn pack(x: Acts<'_>, rows: usize, w: &Mat<'_>, into: &mut Packed, pool: Option<&Pool>);

    /// See [`Device::matmul_packed`].
    ///
    /// # Safety
    /// The CPU has the instructions that this is made of.
    unsafe fn product(x: &Packed, w: &Mat<'_>, y: &mut Out<'_>);

    /// See [`Device::inner`].
    fn inner<'h>(
        _x: &Packed,
        _gate_and_up: [&Mat<'_>; 2],
        _down: &Mat<'_>,
        _h: &'h mut Packed,
    ) -> Option<Inner<'h>> {
        None
    }

    /// See [`Device::gated_packed`].
    ///
    /// # Safety
    /// As for [`Multiply::product`].
    unsafe fn gated(_x: &Packed, _gate_and_up: [&Mat<'_>; 2], _h: &mut Inner<'_>) {
        unreachable!("a device that never lays out an inner layer");
    }

    /// [`Device::matmul_rounded`]; false if that is to be rounded from the product.
    ///
    /// # Safety
    /// As for [`Multiply::product`].
    unsafe fn rounded(_x: &Packed, _w: &Mat<'_>, _y: &mut [bf16]) -> bool {
        false
    }

    /// [`Device::matmul_t`] in an order of the class's own; false if there is none for such a weight.
    ///
    /// # Safety
    /// As for [`Multiply::product`]; rows of `x` and `y` are there, `ldx` and `ldy` apart, without overlap.
    unsafe fn transposed(
        _x: &[bf16],
        _rows: usize,
        _ldx: usize,
        _w: Stack<'_>,
        _y: &mut [f32],
        _ldy: usize,
    ) -> bool {
        false
    }
}

impl<D: Dot> Multiply for D {
    fn pays(rows: usize) -> bool {
        <D as Dot>::pays(rows)
    }

    fn pack(x: Acts<'_>, rows: usize, w: &Mat<'_>, into: &mut Packed, pool: Option<&Pool>) {
        into.fill::<D>(x, rows, w, pool);
    }

    unsafe fn product(x: &Packed, w: &Mat<'_>, y: &mut Out<'_>) {
        // SAFETY: the caller's.
        unsafe { product::<D>(x, w, y) }
    }
}

/// A device made of an instruction set and the way it multiplies bf16 activations.
struct Unit<S, B>(PhantomData<(S, B)>);

impl<S: Simd + Registers, B: Multiply> Device for Unit<S, B> {
    fn pack_on(
        &self,
        pool: Option<&Pool>,
        x: Acts<'_>,
        rows: usize,
        w: Mat<'_>,
        into: &mut Packed,
    ) {
        match x {
            Acts::F32(_) => into.fill::<Wide<S>>(x, rows, &w, pool),
            Acts::Bf16(_) if B::pays(rows) => B::pack(x, rows, &w, into, pool),
            Acts::Bf16(_) => into.fill::<Split<S>>(x, rows, &w, pool),
        }
    }

    fn matmul_rounded(&self, x: &Packed, w: Mat<'_>, y: &mut [bf16]) {
        let (rows, n) = (x.rows(), w.n());
        assert_eq!(Some(y.len()), rows.checked_mul(n), "the output of a product [rows, n]");
        // SAFETY: a unit is handed out only where its instruction set is available; the shapes agree.
        if x.is::<B>() && unsafe { B::rounded(x, &w, y) } {
            return;
        }
        let mut memory = SUMS.take();
        memory.resize(memory.len().max(y.len()), 0.0);
        let sums = &mut memory[..y.len()];
        self.matmul_packed(x, w, &mut Out::new(sums, rows, n, n));
        self.to_bf16(sums, y);
        SUMS.set(memory);
    }

    fn inner<'h>(
        &self,
        x: &Packed,
        gate: Mat<'_>,
        up: Mat<'_>,
        down: Mat<'_>,
        h: &'h mut Packed,
    ) -> Option<Inner<'h>> {
        if x.is::<B>() { B::inner(x, [&gate, &up], &down, h) } else { None }
    }

    fn gated_packed(&self, x: &Packed, gate: Mat<'_>, up: Mat<'_>, h: &mut Inner<'_>) {
        assert!(x.is::<B>(), "activations of the class that laid out the inner layer");
        // SAFETY: a unit is handed out only where its instruction set is available (`Kernels::new`).
        unsafe { B::gated(x, [&gate, &up], h) }
    }

    fn matmul_packed(&self, x: &Packed, w: Mat<'_>, y: &mut Out<'_>) {
        // SAFETY: a unit is handed out only where its instruction set is available (`Kernels::new`).
        unsafe {
            if x.is::<B>() {
                B::product(x, &w, y);
            } else if x.is::<Split<S>>() {
                product::<Split<S>>(x, &w, y);
            } else {
                product::<Wide<S>>(x, &w, y);
            }
        }
    }

    fn matmul_t(
        &self,
        x: Acts<'_>,
        rows: usize,
        ldx: usize,
        w: Stack<'_>,
        y: &mut [f32],
        ldy: usize,
    ) {
        w.check(x, rows, ldx, y, ldy);
        if rows == 0 {
            return;
        }
        if let Acts::Bf16(x) = x {
            // SAFETY: a unit is handed out only where its instruction set is available; shapes were checked.
            if unsafe { B::transposed(x, rows, ldx, w, y, ldy) } {
                return;
            }
        }
        if w.seen(0) == 0 {
            (0..rows).for_each(|r| y[r * ldy..][..w.k()].fill(0.0));
        }
        w.each(rows, |rows, at, w| {
            let x = x.slice(rows.start * ldx + at..x.len());
            let y = &mut y[rows.start * ldy..];
            run::<S, _>(Transposed { x, rows: rows.len(), ldx, w, accumulate: at > 0, y, ldy });
        });
    }

    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
        assert!(x.len() == weight.len() && x.len() == y.len(), "rms_norm of equal lengths");
        run::<S, _>(row::RmsNorm { x, weight, eps, y });
    }

    fn silu_mul(&self, gate: &[f32], up: &[f32], y: &mut [f32]) {
        assert!(gate.len() == up.len() && gate.len() == y.len(), "silu_mul of equal lengths");
        run::<S, _>(row::SiluMul { gate, up, y });
    }

    fn swiglu(&self, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len(), "swiglu of equal lengths");
        run::<S, _>(row::SwiGlu { gate, up });
    }

    fn softmax_weights(&self, s: &mut [f32], max: f32) -> f32 {
        run::<S, _>(row::SoftmaxWeights { s, max })
    }

    fn sigmoid(&self, x: &mut [f32]) {
        run::<S, _>(row::Sigmoid { x });
    }

    fn max(&self, x: &[f32]) -> f32 {
        run::<S, _>(row::Max { x })
    }

    fn axpy(&self, a: f32, x: Acts<'_>, y: &mut [f32]) {
        assert_eq!(x.len(), y.len(), "axpy of equal lengths");
        run::<S, _>(row::Axpy { a, x, y });
    }

    fn weigh(&self, x: &[(f32, &[bf16])], y: &mut [f32]) {
        assert!(x.iter().all(|(_, x)| x.len() == y.len()), "rows of equal lengths");
        run::<S, _>(row::Weigh { x, y });
    }

    fn blend(&self, a: f32, x: &[f32], b: f32, y: &mut [f32]) {
        assert_eq!(x.len(), y.len(), "blend of equal lengths");
        run::<S, _>(row::Blend { a, x, b, y });
    }

    fn scale(&self, a: f32, y: &mut [f32]) {
        run::<S, _>(row::Scale { a, y });
    }

    fn to_bf16(&self, x: &[f32], y: &mut [bf16]) {
        assert_eq!(x.len(), y.len(), "to_bf16 of equal lengths");
        run::<S, _>(row::ToBf16 { x, y });
    }
}

/// Runs a task that asks for nothing but the instruction set.
fn run<S: Simd, T: Task<S>>(task: T) -> T::Out {
    // SAFETY: called by a `Unit<S, _>`, which is handed out only where `S` is available (`Kernels::new`).
    unsafe { S::run(task) }
}

/// A device that this CPU has. Copied freely; dereferences to [`Device`].
#[derive(Clone, Copy)]
pub struct Kernels {
    isa: Isa,
    device: &'static dyn Device,
}

impl Kernels {
    /// The device for `isa`. Panics if this CPU lacks it: take `isa` from [`Isa::detect`] or [`Isa::available`], or ask
    /// [`Isa::is_available`].
    pub fn new(isa: Isa) -> Kernels {
        assert!(isa.is_available(), "this cpu has no {isa}");
        let device: &'static dyn Device = match isa {
            Isa::Scalar => &Unit::<Scalar, Split<Scalar>>(PhantomData),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &Unit::<Avx2, Split<Avx2>>(PhantomData),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => &Unit::<Avx512, Split<Avx512>>(PhantomData),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => &Unit::<Avx512, HardwarePairs>(PhantomData),
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => &Unit::<Avx512, Amx>(PhantomData),
            #[cfg(not(target_arch = "x86_64"))]
            other => unreachable!("{other} is not available here"),
        };
        Kernels { isa, device }
    }

    /// The plain device whose bits those of `isa` are: slow, and there on every CPU.
    pub fn reference(isa: Isa) -> Kernels {
        match isa {
            Isa::Amx => Kernels { isa, device: &Unit::<Scalar, Defined>(PhantomData) },
            _ => Kernels::new(Isa::Scalar),
        }
    }

    /// The best device of this CPU.
    pub fn detect() -> Kernels {
        Kernels::new(Isa::detect())
    }

    pub fn isa(&self) -> Isa {
        self.isa
    }
}

impl Deref for Kernels {
    type Target = dyn Device;

    fn deref(&self) -> &Self::Target {
        self.device
    }
}

impl fmt::Debug for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Kernels").field(&self.isa).finish()
    }
}
