//! The numerics class of a mesh: what activations, KV cache and wire are rounded to.
//!
//! Two classes exist. `f32` is the reference; `bf16` rounds activations where they enter a matrix
//! product, the KV cache or the wire, and keeps f32 accumulation and residual stream. A class is a
//! property of the whole mesh: rows of one are refused by the other.

use std::fmt;
use std::str::FromStr;

/// What activations are rounded to where they enter a product, the KV cache or the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Numerics {
    /// No rounding: the class that is compared with the float32 reference.
    F32,
    /// bfloat16, round to nearest even.
    Bf16,
}

impl Numerics {
    /// Bytes of one activation on the wire and in the KV cache.
    pub const fn bytes(self) -> usize {
        match self {
            Numerics::F32 => 4,
            Numerics::Bf16 => 2,
        }
    }
}

impl fmt::Display for Numerics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Numerics::F32 => "f32",
            Numerics::Bf16 => "bf16",
        })
    }
}

/// A numerics class that does not exist.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown numerics class `{0}`, expected f32 or bf16")]
pub struct UnknownNumerics(String);

impl FromStr for Numerics {
    type Err = UnknownNumerics;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "f32" => Ok(Numerics::F32),
            "bf16" => Ok(Numerics::Bf16),
            other => Err(UnknownNumerics(other.chars().take(40).collect())),
        }
    }
}
