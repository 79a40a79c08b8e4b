//! The gated feed-forward network of dense layers and shared experts: `down(silu(gate x) · up x)`.
//!
//! One network over all rows of a step; routed experts, where many small networks share the
//! threads, are in `expert.rs`. Both compute the same function with the same rounding.

use half::bf16;
use kernels::{Acts, Compute};

use crate::activations::rounded;
use crate::checkpoint::Checkpoint;
use crate::error::LoadError;
use crate::numerics::Numerics;
use crate::parallel::{for_each, grown};
use crate::weight::Weight;

/// Weights of one network.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ffn {
    /// `[inner, hidden]`
    pub gate: Weight,
    /// `[inner, hidden]`
    pub up: Weight,
    /// `[hidden, inner]`
    pub down: Weight,
}

/// Reusable working memory of [`Ffn::run`].
#[derive(Default)]
pub(crate) struct FfnScratch {
    /// `[rows, inner]`
    gate: Vec<f32>,
    /// `[rows, inner]`
    up: Vec<f32>,
    /// `[rows, inner]`
    inner: Vec<f32>,
    /// `[rows, inner]`
    rounded: Vec<bf16>,
}

impl Ffn {
    /// Looks up `<prefix>.{gate,up,down}_proj.weight`.
    pub fn load(
        from: &Checkpoint,
        prefix: &str,
        hidden: usize,
        inner: usize,
    ) -> Result<Ffn, LoadError> {
        Ok(Ffn {
            gate: from.matrix(&format!("{prefix}.gate_proj.weight"), inner, hidden)?,
            up: from.matrix(&format!("{prefix}.up_proj.weight"), inner, hidden)?,
            down: from.matrix(&format!("{prefix}.down_proj.weight"), hidden, inner)?,
        })
    }

    /// Bytes of the weights as stored.
    pub fn bytes(&self) -> usize {
        self.gate.bytes() + self.up.bytes() + self.down.bytes()
    }

    /// Computes `out` `[rows, hidden]` from `x` `[rows, hidden]`.
    pub fn run(
        &self,
        from: &Checkpoint,
        compute: &Compute,
        numerics: Numerics,
        x: Acts<'_>,
        rows: usize,
        scratch: &mut FfnScratch,
        out: &mut [f32],
    ) {
        let inner = self.gate.n();
        let kernels = compute.kernels;
        let gate = grown(&mut scratch.gate, rows * inner);
        let up = grown(&mut scratch.up, rows * inner);
        compute.matmul(x, rows, self.gate.mat(from), gate);
        compute.matmul(x, rows, self.up.mat(from), up);
        let product = grown(&mut scratch.inner, rows * inner);
        let pieces = product.chunks_mut(inner).zip(gate.chunks(inner).zip(up.chunks(inner)));
        for_each(&compute.pool, rows, pieces, |(product, (gate, up))| {
            kernels.silu_mul(gate, up, product);
        });
        let h = rounded(kernels, numerics, product, &mut scratch.rounded);
        compute.matmul(h, rows, self.down.mat(from), out);
    }
}
