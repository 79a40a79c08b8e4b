//! The x86-64 instruction sets: which the CPU has, and its record of underflows.
//!
//! `avx2.rs` and `avx512.rs` are thin: each method is an instruction or a few; `amx.rs` has a product of its own. What they refuse is to change how
//! the CPU rounds or treats subnormals: MXCSR's modes belong to the compiler. Only its sticky exception flags are
//! read and cleared, to learn whether a subnormal occurred at all.

mod amx;
mod avx2;
mod avx512;
mod pairs;

pub(crate) use amx::Amx;
pub(crate) use avx2::Avx2;
pub(crate) use avx512::Avx512;
#[cfg(test)]
pub(crate) use pairs::EmulatedPairs;
pub(crate) use pairs::HardwarePairs;

use crate::isa::Isa;
use std::arch::asm;

/// Whether this CPU has `isa` (of those for x86-64).
pub(crate) fn has(isa: Isa) -> bool {
    let avx2 = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    let avx512 = avx2
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq");
    match isa {
        Isa::Scalar => true,
        Isa::Avx2 => avx2,
        Isa::Avx512 => avx512,
        Isa::Avx512Bf16 => {
            avx512
                && is_x86_feature_detected!("avx512bf16")
                && is_x86_feature_detected!("avx512vbmi")
                && pairs::conforms()
        }
        Isa::Amx => {
            avx512
                && is_x86_feature_detected!("avx512vbmi")
                && is_x86_feature_detected!("gfni")
                && amx::available()
        }
    }
}

/// MXCSR's sticky flags: a denormal operand (DE), an underflow (UE).
const DENORMAL_OPERAND: u32 = 1 << 1;
const UNDERFLOW: u32 = 1 << 4;

fn mxcsr() -> u32 {
    let mut value = 0u32;
    // SAFETY: stores the register to a local. Not `nomem`, so that stores of results stay before it.
    unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack, preserves_flags)) };
    value
}

/// Clears the sticky flags of [`subnormal_seen`].
#[inline(always)]
pub(crate) fn forget_subnormals() {
    let value = mxcsr();
    if value & (DENORMAL_OPERAND | UNDERFLOW) != 0 {
        let value = value & !(DENORMAL_OPERAND | UNDERFLOW);
        // SAFETY: only sticky exception flags change, which Rust gives no meaning to; modes and masks stay.
        unsafe {
            asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack, preserves_flags))
        };
    }
}

/// Whether an operation since [`forget_subnormals`] had a subnormal operand or rounded a tiny result. A tiny exact result
/// shows when something reads it.
#[inline(always)]
pub(crate) fn subnormal_seen() -> bool {
    mxcsr() & (DENORMAL_OPERAND | UNDERFLOW) != 0
}
