//! Serial kernels for each instruction set behind one small trait, and a pool of threads to run them on.
//!
//! Every result is a function of its own row, and the same bits on every device of a numerics class, whatever the batch,
//! the number of threads or the tails. The orders that promise fixes:
//!
//! - **Product, f32 activations.** Weights widen exactly. A row is padded with zeros to a multiple of 32; lane `j` of
//!   sixteen takes the elements `k = j (mod 16)` in ascending k, each a fused multiply-add; the lanes are added as a tree
//!   (`j + (j + 8)`, then 4, 2, 1 apart).
//! - **Product, bf16 activations.** Sixteen f32 lanes; of each 32 elements lane `j` takes `2j + 1` and then `2j`, each a
//!   multiply-add rounded to nearest even with subnormal operands and results flushed to zero, which is VDPBF16PS
//!   as Intel documents it. Weights stored as f32 are rounded to bf16. The tree is the same.
//! - **FP8 weights** (e4m3, a scale per block). Within a k-block lanes gather the unscaled codes as above, from zero; then
//!   `sum = fma(block, scale, sum)` in each lane. A NaN code makes its output NaN.
//! - **Product, bf16 activations, AMX tiles.** A class of its own ([`Isa::bf16_kind`]), since TDPBF16PS adds up in another
//!   order: of each 32 elements one sum takes the even and one the odd ones, ascending, from zero, each a multiply-add
//!   rounded and flushed as above; the two are added to each other, and that to the output. FP8 blocks start from zero
//!   and are scaled as above.
//! - **Transposed product.** One f32 fused multiply-add per row of the weight, in order; an FP8 element is its code
//!   times its scale, rounded once. In the class of AMX tiles, bf16 activations and a weight stored as bf16 are taken
//!   as in its other products, in steps of 32 rows, zeros after the last one seen.
//!
//! GPUs ([`cuda`]) are not a [`Device`]: they take whole layers of work, and are classes of their own.
//!
//! NaNs compare as NaN: their payload is unspecified. The crate refuses to know about models, files or queues.

mod compute;
pub mod cuda;
mod device;
mod dot;
mod isa;
mod lanes;
#[doc(hidden)]
pub mod limits;
mod mat;
mod packed;
mod pool;
mod product;
mod rowwise;
mod selfcheck;
mod tile;
mod transposed;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use compute::{Compute, Gated};
pub use device::{Device, Kernels};
pub use isa::{Isa, UnknownIsa};
pub use mat::{Acts, DType, Mat, ShapeError, f32_to_fp8, fp8_to_f32, round_bf16};
pub use packed::{Inner, Out, Packed};
pub use pool::Pool;
pub use transposed::Stack;

#[cfg(test)]
mod tests;
