//! In what form rows travel and where a token's results are summed: what an
//! operator may choose between bytes on the wire and bits.

use std::fmt;
use std::str::FromStr;

use model::Numerics;
use proto::v1::Dtype;

/// How rows are written into frames and replies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wire {
    /// As the numerics class has them.
    #[default]
    Exact,
    /// To the nodes in FP8 with a scale per 128 values, results in bf16.
    Fp8,
}

/// Who sums a token's weighted results.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Combine {
    /// The router, in slot order, whoever computed them.
    #[default]
    Router,
    /// Each node its own, the router the nodes' sums: the order, and so the bits,
    /// depend on which node owns which expert.
    Node,
}

/// What does not change from layer to layer.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub hidden: u32,
    /// Of rows as the class has them.
    pub dtype: Dtype,
    pub top_k: u32,
    pub wire: Wire,
    pub combine: Combine,
}

impl Shape {
    /// A row as the class has it.
    pub fn row_bytes(self) -> usize {
        self.dtype.row_bytes(self.hidden as usize)
    }

    /// What frames carry.
    pub fn sent(self) -> Dtype {
        match self.wire {
            Wire::Exact => self.dtype,
            Wire::Fp8 => Dtype::Fp8,
        }
    }

    /// What replies carry.
    pub fn replied(self) -> Dtype {
        match self.wire {
            Wire::Exact => self.dtype,
            Wire::Fp8 => Dtype::Bf16,
        }
    }

    pub fn numerics(self) -> Numerics {
        match self.dtype {
            Dtype::Bf16 => Numerics::Bf16,
            _ => Numerics::F32,
        }
    }
}

/// The name of a numerics class with these choices in it, as clients see it.
pub fn class(numerics: String, wire: Wire, combine: Combine) -> String {
    let wire = if wire == Wire::Fp8 { "+fp8-wire" } else { "" };
    let combine = if combine == Combine::Node { "+node-combine" } else { "" };
    numerics + wire + combine
}

impl fmt::Display for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Exact => "exact",
            Self::Fp8 => "fp8",
        })
    }
}

impl FromStr for Wire {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "exact" => Ok(Self::Exact),
            "fp8" => Ok(Self::Fp8),
            _ => Err(format!("`{text}` is neither exact nor fp8")),
        }
    }
}

impl fmt::Display for Combine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Router => "router",
            Self::Node => "node",
        })
    }
}

impl FromStr for Combine {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "router" => Ok(Self::Router),
            "node" => Ok(Self::Node),
            _ => Err(format!("`{text}` is neither router nor node")),
        }
    }
}
