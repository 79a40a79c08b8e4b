//! Parity cannot pass by accident: dropping, doubling or swapping the
//! contribution of one expert, anywhere in a prompt, moves the output.

use std::sync::Arc;

use model::{
    Checkpoint, Chunk, Compute, Expert, ExpertGroup, ExpertScratch, Isa, KvPool, LogitRows,
    Numerics, Step, Trunk, forward_experts, together,
};

use crate::support::{FIXTURES, Fixture};

#[derive(Clone, Copy, Debug)]
enum Fault {
    Drop,
    Double,
    Swap,
}

/// The logits of a whole prompt, with the results of `expert` in `layer` falsified.
struct Model {
    checkpoint: Arc<Checkpoint>,
    compute: Arc<Compute>,
    trunk: Trunk,
}

impl Model {
    fn load(fixture: &Fixture) -> Self {
        let checkpoint = Checkpoint::open(&fixture.dir).unwrap();
        let compute = Arc::new(Compute::new(Isa::detect(), 1));
        let trunk = Trunk::load(&checkpoint, Numerics::F32, compute.clone()).unwrap();
        Self { checkpoint, compute, trunk }
    }

    /// Returns the logits of all positions, and which (layer, expert) were used.
    fn run(
        &self,
        tokens: &[u32],
        fault: Option<(usize, u32, Fault)>,
    ) -> (Vec<f32>, Vec<(usize, u32)>) {
        let config = self.checkpoint.config();
        let pages = tokens.len().div_ceil(64);
        let mut kv = KvPool::new(config, Numerics::F32, pages, 64).unwrap();
        let table: Vec<_> = (0..pages).map(|_| kv.alloc().unwrap()).collect();
        let chunk = Chunk { tokens, start: 0, pages: &table, logits: LogitRows::All };
        let mut step = Step::default();
        self.trunk.begin(&mut step, &[chunk], &kv).unwrap();
        let mut used = Vec::new();
        for layer in 0..config.layers {
            if !self.trunk.attend(layer, &mut step, &mut kv).unwrap() {
                continue;
            }
            let routed = step.routed();
            used.extend(routed.experts.iter().map(|&expert| (layer, expert)));
            let results: Vec<Vec<u8>> = (0..routed.count * routed.top_k)
                .map(|slot| {
                    let expert = routed.experts[slot];
                    let row = routed.row(slot / routed.top_k);
                    match fault {
                        Some((l, e, fault)) if (l, e) == (layer, expert) => {
                            self.falsified(layer, expert, row, fault)
                        }
                        _ => self.expert(layer, expert, row),
                    }
                })
                .collect();
            self.trunk.absorb(layer, &mut step, &|slot| results[slot].as_slice()).unwrap();
        }
        used.sort_unstable();
        used.dedup();
        (self.trunk.logits(&mut step).unwrap().to_vec(), used)
    }

    fn expert(&self, layer: usize, index: u32, row: &[u8]) -> Vec<u8> {
        let expert = Expert::load(&self.checkpoint, layer, index as usize).unwrap();
        let (mut out, mut scratch) = (Vec::new(), ExpertScratch::default());
        let group = [ExpertGroup { expert: &expert, rows: 1 }];
        let row = together(row, row.len());
        forward_experts(&self.compute, Numerics::F32, &group, &row, &mut out, &mut scratch);
        out
    }

    fn falsified(&self, layer: usize, expert: u32, row: &[u8], fault: Fault) -> Vec<u8> {
        let scaled = |by: f32| {
            let values = self.expert(layer, expert, row);
            let value = |bytes: &[u8]| by * f32::from_le_bytes(bytes.try_into().unwrap());
            values.chunks(4).flat_map(|bytes| value(bytes).to_le_bytes()).collect()
        };
        match fault {
            Fault::Drop => scaled(0.0),
            Fault::Double => scaled(2.0),
            Fault::Swap => {
                let other = (expert + 1) % self.checkpoint.config().experts as u32;
                self.expert(layer, other, row)
            }
        }
    }
}

#[test]
fn every_contribution_counts() {
    for fault in [Fault::Drop, Fault::Double, Fault::Swap] {
        let (mut changed, mut all) = (0, 0);
        for name in FIXTURES {
            let fixture = Fixture::load(name);
            let model = Model::load(&fixture);
            for (index, prompt) in fixture.prompts.iter().enumerate().take(10) {
                let (want, used) = model.run(&prompt.tokens, None);
                // A different used expert for every prompt and kind of fault.
                let (layer, expert) = used[(index * 7 + fault as usize * 3) % used.len()];
                let (got, _) = model.run(&prompt.tokens, Some((layer, expert, fault)));
                all += 1;
                changed += usize::from(got.iter().zip(&want).any(|(g, w)| (g - w).abs() > 1e-3));
            }
        }
        println!("{fault:?}: {changed} of {all} prompts changed");
        assert!(changed * 100 >= all * 99, "{fault:?}: only {changed} of {all} prompts changed");
    }
}
