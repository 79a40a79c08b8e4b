//! Experts inside the router: the baseline that the mesh is measured against.

use std::sync::Arc;

use kernels::Compute;
use model::{
    Checkpoint, Expert, ExpertGroup, ExpertScratch, LoadError, Numerics, Routed, forward_experts,
};
use proto::LayerId;

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
    x: Vec<u8>,
    out: Vec<u8>,
    scratch: ExpertScratch,
}

impl Local {
    pub fn load(
        checkpoint: &Arc<Checkpoint>,
        numerics: Numerics,
        compute: Arc<Compute>,
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
            x: Vec::new(),
            out: Vec::new(),
            scratch: ExpertScratch::default(),
        })
    }

    /// Orders the slots by expert and copies their rows next to each other.
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
        self.x.clear();
        for (at, &slot) in self.order.iter().enumerate() {
            self.position[slot as usize] = at as u32;
            let from = slot as usize / routed.top_k * self.row_bytes;
            self.x.extend_from_slice(&routed.rows[from..from + self.row_bytes]);
        }
    }

    pub fn compute(&mut self) {
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
            &self.x,
            &mut self.out,
            &mut self.scratch,
        );
    }

    pub fn row(&self, slot: usize) -> &[u8] {
        let from = self.position[slot] as usize * self.row_bytes;
        &self.out[from..from + self.row_bytes]
    }
}
