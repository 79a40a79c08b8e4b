//! Experts inside the router: the baseline that the mesh is measured against.

use std::sync::Arc;

use kernels::Compute;
use model::rows::{convert, through_fp8};
use model::{
    Checkpoint, Expert, ExpertGroup, ExpertScratch, LoadError, Numerics, Routed, Row,
    forward_experts,
};
use proto::LayerId;

use crate::exchange::Wire;

/// Every routed expert of the model, mapped.
pub struct Local {
    compute: Arc<Compute>,
    numerics: Numerics,
    row_bytes: usize,
    first_layer: usize,
    /// Per layer from the first MoE layer on.
    layers: Vec<Vec<Expert>>,
    /// The layer's slots ordered by expert, and the inverse of that order.
    order: Vec<u32>,
    position: Vec<u32>,
    counts: Vec<usize>,
    layer: usize,
    wire: Wire,
    /// The layer's rows after what the wire does to them, and a result before it.
    passed: Vec<u8>,
    out: Vec<u8>,
    scratch: ExpertScratch,
}

impl Local {
    pub fn load(
        checkpoint: &Arc<Checkpoint>,
        numerics: Numerics,
        compute: Arc<Compute>,
        wire: Wire,
    ) -> Result<Self, LoadError> {
        let config = checkpoint.config();
        let moe = config.moe_layers();
        let first_layer = moe.start;
        let mut layers = Vec::new();
        layers.resize_with(config.layers - first_layer, Vec::new);
        for layer in moe {
            for expert in 0..config.experts {
                layers[layer - first_layer].push(Expert::load(checkpoint, layer, expert)?);
            }
        }
        Ok(Self {
            compute,
            numerics,
            row_bytes: config.hidden * numerics.bytes(),
            first_layer,
            layers,
            order: Vec::new(),
            position: Vec::new(),
            counts: vec![0; config.experts],
            layer: 0,
            wire,
            passed: Vec::new(),
            out: Vec::new(),
            scratch: ExpertScratch::default(),
        })
    }

    /// Orders the slots by expert.
    pub fn send(&mut self, layer: LayerId, routed: &Routed<'_>) {
        self.layer = layer.0 as usize - self.first_layer;
        self.counts.fill(0);
        for &expert in routed.experts {
            self.counts[expert as usize] += 1;
        }
        self.order.clear();
        self.order.extend(0..routed.experts.len() as u32);
        self.order.sort_by_key(|&slot| routed.experts[slot as usize]);
        self.position.resize(self.order.len(), 0);
        for (at, &slot) in self.order.iter().enumerate() {
            self.position[slot as usize] = at as u32;
        }
    }

    /// Computes what was sent, whose rows are `routed`'s.
    pub fn compute(&mut self, routed: &Routed<'_>) {
        let lie = match self.wire {
            Wire::Exact => routed.rows,
            Wire::Fp8 => {
                let hidden = self.row_bytes / self.numerics.bytes();
                through_fp8(self.numerics, routed.rows, hidden, &mut self.passed);
                &self.passed
            }
        };
        let (order, width) = (&self.order, self.row_bytes);
        let rows = |place: usize| {
            let id = order[place] as usize / routed.top_k;
            Row { id, fp8: false, bytes: &lie[id * width..][..width] }
        };
        let experts = &self.layers[self.layer];
        let groups: Vec<_> = experts
            .iter()
            .zip(&self.counts)
            .filter(|&(_, &rows)| rows > 0)
            .map(|(expert, &rows)| ExpertGroup { expert, rows })
            .collect();
        forward_experts(
            &self.compute,
            self.numerics,
            &groups,
            &rows,
            &mut self.out,
            &mut self.scratch,
        );
        if self.wire == Wire::Fp8 {
            // Replies are bf16 then.
            self.passed.clear();
            convert(self.numerics, Numerics::Bf16, &self.out, &mut self.passed);
            self.out.clear();
            convert(Numerics::Bf16, self.numerics, &self.passed, &mut self.out);
        }
    }

    pub fn row(&self, slot: usize) -> &[u8] {
        let from = self.position[slot] as usize * self.row_bytes;
        &self.out[from..from + self.row_bytes]
    }
}
