//! The gated feed-forward network of dense layers and shared experts: `down(silu(gate x) · up x)`.
//!
//! One network over all rows of a step; routed experts, where many small networks share the
//! threads, are in `expert.rs`. Both compute the same function with the same rounding.

use kernels::{Acts, Compute, Gated};

use crate::checkpoint::Checkpoint;
use crate::error::LoadError;
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

    /// Computes `out` `[rows, hidden]` from `x` `[rows, hidden]`, in the class of `x`.
    pub fn run(
        &self,
        from: &Checkpoint,
        compute: &Compute,
        x: Acts<'_>,
        rows: usize,
        memory: &mut Gated,
        out: &mut [f32],
    ) {
        let weights @ [_, _, down] = [self.gate, self.up, self.down].map(|w| w.mat(from));
        compute.gated(x, rows, weights, memory);
        compute.matmul_packed(memory.h(), down, out);
    }
}
