//! Work on single rows: norm, activation functions, softmax, and sums of vectors.
//!
//! Written once over sixteen-lane arrays and compiled for each instruction set by [`Simd::run`], so that results
//! are the same bits by construction. Only correctly rounded operations are used (add, multiply, divide, square root, fused
//! multiply-add); the exponential is a polynomial of its own, since the platform's differs between libraries.

use crate::lanes::{LANES, Simd, Task, each, tree};
use crate::mat::{Acts, round_bf16};
use half::bf16;

type V = [f32; LANES];

/// `x[i..i + 16]`, padded with `fill`.
#[inline(always)]
fn lanes_at(x: &[f32], i: usize, fill: f32) -> V {
    match x[i..].first_chunk::<LANES>() {
        Some(v) => *v,
        None => rest(&x[i..], fill),
    }
}

/// Not inlined, as both ends would become one copy of any length, by a call.
#[cold]
#[inline(never)]
fn rest(x: &[f32], fill: f32) -> V {
    let mut v = [fill; LANES];
    v[..x.len()].copy_from_slice(x);
    v
}

/// Writes as much of `v` as fits at `y[i..]`.
#[inline(always)]
fn put(y: &mut [f32], i: usize, v: V) {
    match y[i..].first_chunk_mut::<LANES>() {
        Some(out) => *out = v,
        None => put_rest(&mut y[i..], &v),
    }
}

/// As [`rest`].
#[cold]
#[inline(never)]
fn put_rest(y: &mut [f32], v: &V) {
    y.copy_from_slice(&v[..y.len()]);
}

/// e^x, within 1.1 ulp of the exact value: `x = n ln 2 + r` with `|r| <= ln 2 / 2` (Cody and Waite,
/// Software Manual for the Elementary Functions, 6), a polynomial for e^r, and 2^n in two factors so that
/// results reach from the smallest subnormal to infinity.
#[inline(always)]
fn exp(x: f32) -> f32 {
    /// Adding it leaves the nearest integer in the low bits.
    const MAGIC: f32 = 12_582_912.0;
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    // Beyond these the result is infinite or zero already; a NaN passes both comparisons by.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -104.0 { -104.0 } else { x };
    let t = x.mul_add(std::f32::consts::LOG2_E, MAGIC);
    let n = t - MAGIC;
    let r = n.mul_add(-LN2_LO, n.mul_add(-LN2_HI, x));
    let p = 1.984_127e-4_f32;
    let p = p.mul_add(r, 1.388_888_9e-3);
    let p = p.mul_add(r, 8.333_333e-3);
    let p = p.mul_add(r, 4.166_666_7e-2);
    let p = p.mul_add(r, 1.666_666_7e-1);
    let p = p.mul_add(r, 0.5);
    let p = (r * r).mul_add(p, r) + 1.0;
    // n is in -151..=129 (or NaN, whose bits are cut to something harmless).
    let n = (t.to_bits() as i32).wrapping_sub(MAGIC.to_bits() as i32).clamp(-160, 160);
    let half = n >> 1;
    p * power(half) * power(n - half)
}

/// 2^n for `-126 <= n <= 127`.
#[inline(always)]
fn power(n: i32) -> f32 {
    f32::from_bits(((n + 127) << 23) as u32)
}

/// 1 / (1 + e^-x), by the exponential of `-|x|` so that neither end loses digits.
#[inline(always)]
fn logistic(x: f32) -> f32 {
    let e = exp(-x.abs());
    let top = if x < 0.0 { e } else { 1.0 };
    top / (1.0 + e)
}

/// `g * sigmoid(g) * u`.
#[inline(always)]
fn swiglu(g: [f32; LANES], u: [f32; LANES]) -> [f32; LANES] {
    each!(j => g[j] * logistic(g[j]) * u[j])
}

/// Declares a task as a struct of its arguments and the function that does it.
macro_rules! task {
    ($name:ident { $($arg:ident: $type:ty),* } -> $out:ty $body:block) => {
        pub(crate) struct $name<'a> {
            $(pub(crate) $arg: $type,)*
        }

        impl<S: Simd> Task<S> for $name<'_> {
            type Out = $out;

            #[inline(always)]
            unsafe fn call(self) -> $out {
                let $name { $($arg),* } = self;
                $body
            }
        }
    };
}

task!(RmsNorm { x: &'a [f32], weight: &'a [f32], eps: f32, y: &'a mut [f32] } -> () {
    let mut acc = [0.0; LANES];
    for i in (0..x.len()).step_by(LANES) {
        let v = lanes_at(x, i, 0.0);
        acc = each!(j => v[j].mul_add(v[j], acc[j]));
    }
    let inverse = 1.0 / (tree(acc) / x.len() as f32 + eps).sqrt();
    for i in (0..x.len()).step_by(LANES) {
        let (v, w) = (lanes_at(x, i, 0.0), lanes_at(weight, i, 0.0));
        put(y, i, each!(j => (v[j] * inverse) * w[j]));
    }
});

task!(SiluMul { gate: &'a [f32], up: &'a [f32], y: &'a mut [f32] } -> () {
    for i in (0..gate.len()).step_by(LANES) {
        let (g, u) = (lanes_at(gate, i, 0.0), lanes_at(up, i, 0.0));
        put(y, i, swiglu(g, u));
    }
});

task!(SwiGlu { gate: &'a mut [f32], up: &'a [f32] } -> () {
    for i in (0..gate.len()).step_by(LANES) {
        let (g, u) = (lanes_at(gate, i, 0.0), lanes_at(up, i, 0.0));
        put(gate, i, swiglu(g, u));
    }
});

task!(SoftmaxWeights { s: &'a mut [f32], max: f32 } -> f32 {
    let mut acc = [0.0; LANES];
    for i in (0..s.len()).step_by(LANES) {
        let v = lanes_at(s, i, f32::NEG_INFINITY);
        let e = each!(j => exp(v[j] - max));
        put(s, i, e);
        let live = s.len() - i;
        acc = each!(j => acc[j] + if j < live { e[j] } else { 0.0 });
    }
    tree(acc)
});

task!(Sigmoid { x: &'a mut [f32] } -> () {
    for i in (0..x.len()).step_by(LANES) {
        let v = lanes_at(x, i, 0.0);
        put(x, i, each!(j => logistic(v[j])));
    }
});

task!(Max { x: &'a [f32] } -> f32 {
    let mut acc = [f32::NEG_INFINITY; LANES];
    for i in (0..x.len()).step_by(LANES) {
        let v = lanes_at(x, i, f32::NEG_INFINITY);
        acc = each!(j => if v[j] > acc[j] { v[j] } else { acc[j] });
    }
    acc.into_iter().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a })
});

task!(Axpy { a: f32, x: Acts<'a>, y: &'a mut [f32] } -> () {
    match x {
        Acts::F32(x) => {
            for i in (0..y.len()).step_by(LANES) {
                let (v, w) = (lanes_at(x, i, 0.0), lanes_at(y, i, 0.0));
                put(y, i, each!(j => a.mul_add(v[j], w[j])));
            }
        }
        Acts::Bf16(x) => {
            for (y, x) in y.iter_mut().zip(x) {
                *y = a.mul_add(f32::from_bits(u32::from(x.to_bits()) << 16), *y);
            }
        }
    }
});

task!(Weigh { x: &'a [(f32, &'a [bf16])], y: &'a mut [f32] } -> () {
    // All rows side by side: sums stay in registers, and memory is asked for many lines at once.
    const AT_ONCE: usize = 4 * LANES;
    let (whole, rest) = y.as_chunks_mut::<AT_ONCE>();
    for (i, y) in whole.iter_mut().enumerate() {
        let mut sums = [0.0; AT_ONCE];
        for (a, x) in x {
            let x = &x[i * AT_ONCE..][..AT_ONCE];
            for j in 0..AT_ONCE {
                sums[j] = a.mul_add(f32::from_bits(u32::from(x[j].to_bits()) << 16), sums[j]);
            }
        }
        *y = sums;
    }
    rest.fill(0.0);
    for (a, x) in x {
        for (y, x) in rest.iter_mut().zip(&x[whole.len() * AT_ONCE..]) {
            *y = a.mul_add(f32::from_bits(u32::from(x.to_bits()) << 16), *y);
        }
    }
});

task!(Blend { a: f32, x: &'a [f32], b: f32, y: &'a mut [f32] } -> () {
    for (y, x) in y.iter_mut().zip(x) {
        *y = a.mul_add(*x, b * *y);
    }
});

task!(Scale { a: f32, y: &'a mut [f32] } -> () {
    for y in y.iter_mut() {
        *y = a.mul_add(*y, 0.0);
    }
});

task!(ToBf16 { x: &'a [f32], y: &'a mut [bf16] } -> () {
    for (y, x) in y.iter_mut().zip(x) {
        *y = round_bf16(*x);
    }
});
