//! The gated feed-forward network of dense layers and shared experts: `down(silu(gate x) · up x)`.
//!
//! One network over all rows of a step; routed experts, where many small networks share the
//! threads, are in `expert.rs`. Both compute the same function with the same rounding.

use kernels::{Acts, Compute};

use crate::activations::ClassRows;
use crate::checkpoint::Checkpoint;
use crate::error::LoadError;
use crate::numerics::Numerics;
use crate::parallel::{Arena, ROWS, for_each, grown};
use crate::weight::{Span, Weight};

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
    inner: ClassRows,
    tasks: Arena<Vec<f32>>,
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

    /// Where the bytes are.
    pub fn spans(&self) -> impl Iterator<Item = Span> + use<> {
        [self.gate, self.up, self.down].into_iter().flat_map(|weight| weight.spans())
    }

    /// The same with all bytes one after the other, in the order of [`spans`](Self::spans), in file 0.
    pub fn packed(self) -> Self {
        let mut next = 0;
        let [gate, up, down] = [self.gate, self.up, self.down].map(|w| w.moved(&mut next));
        Ffn { gate, up, down }
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
        let tasks = &scratch.tasks;
        let mut product = scratch.inner.grow(numerics, rows * inner);
        let (gate, up) = (gate.chunks(ROWS * inner), up.chunks(ROWS * inner));
        let pieces = gate.zip(up).map(|(gate, up)| {
            let product = product.take(gate.len());
            (gate, up, product)
        });
        for_each(&compute.pool, rows.div_ceil(ROWS), pieces, |(gate, up, mut product)| {
            tasks.with(|h| {
                let h = grown(h, gate.len());
                kernels.silu_mul(gate, up, h);
                product.put(kernels, 0, h);
            });
        });
        let h = scratch.inner.acts(numerics, rows * inner);
        compute.matmul(h, rows, self.down.mat(from), out);
    }
}
