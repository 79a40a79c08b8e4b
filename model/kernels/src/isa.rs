//! Which instruction sets there are kernels for, and which of them this CPU has.
//!
//! AVX512-BF16 counts as available only if VDPBF16PS rounds as this crate's bf16 class is defined. Intel
//! documents that order; some CPUs have been reported to round differently, and a mesh whose nodes disagree in the last bit would
//! break the promise that every replica gives the same answer. Such a CPU uses AVX-512 without it. AMX is held to its own
//! class's definition in the same way.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;
use thiserror::Error;

use crate::selfcheck;

/// An instruction set to compute with, from the plainest to the fastest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Any CPU; the reference.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL and DQ.
    Avx512,
    /// AVX-512 with BF16 dot products.
    Avx512Bf16,
    /// AVX-512 with AMX tiles of bf16, whose products are a numerics class of their own.
    Amx,
}

/// A name that is no [`Isa`]'s.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("unknown instruction set {0:?}: one of scalar, avx2, avx512, avx512bf16, amx")]
pub struct UnknownIsa(String);

impl Isa {
    const ALL: [Isa; 5] = [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16, Isa::Amx];

    /// The fastest that this CPU has and that gives its class's bits on it (`selfcheck.rs`).
    pub fn detect() -> Isa {
        static DETECTED: OnceLock<Isa> = OnceLock::new();
        let sound = |isa: &Isa| *isa == Isa::Scalar || selfcheck::agrees(*isa);
        *DETECTED
            .get_or_init(|| Isa::available().into_iter().rev().find(sound).unwrap_or(Isa::Scalar))
    }

    /// All that this CPU has, plainest first.
    pub fn available() -> Vec<Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// Whether this CPU has it.
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            self == Isa::Scalar || crate::x86::has(self)
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Isa::Scalar
        }
    }

    /// Its name in configuration and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512bf16",
            Isa::Amx => "amx",
        }
    }

    /// What sets this one's bf16 products apart from the common order (`lib.rs`), as a part of the class's name.
    pub const fn bf16_kind(self) -> Option<&'static str> {
        match self {
            Isa::Amx => Some("amx"),
            Isa::Scalar | Isa::Avx2 | Isa::Avx512 | Isa::Avx512Bf16 => None,
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Isa {
    type Err = UnknownIsa;

    fn from_str(s: &str) -> Result<Isa, UnknownIsa> {
        Isa::ALL.into_iter().find(|isa| isa.name() == s).ok_or_else(|| UnknownIsa(s.to_string()))
    }
}
