//! The numerics class of a mesh: what activations, KV cache and wire are rounded to.
//!
//! Two can be chosen. `f32` is the reference; `bf16` rounds activations where they enter a matrix
//! product, the KV cache or the wire, and keeps f32 accumulation and residual stream. Devices whose
//! products add up in another order make a class of their own of it, such as `bf16+amx`. A class is
//! a property of the whole mesh: rows of one are refused by the other.

use std::fmt;
use std::str::FromStr;

use kernels::Isa;

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

    /// The class's full name, with the kind of device where that is part of it. Processes with the
    /// same one give the same bits.
    pub fn class(self, isa: Isa) -> String {
        match (self, isa.bf16_kind()) {
            (Numerics::Bf16, Some(kind)) => format!("{self}+{kind}"),
            _ => self.to_string(),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_adds_up_in_another_order_has_a_class_of_its_own() {
        assert_eq!(Numerics::Bf16.class(Isa::Amx), "bf16+amx");
        assert_eq!(Numerics::F32.class(Isa::Amx), "f32");
        for isa in [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16] {
            assert_eq!(Numerics::Bf16.class(isa), "bf16");
        }
    }
}
