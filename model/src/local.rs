//! The whole model in one process: a trunk and all experts, called one after the other.
//!
//! What tests and the example drive the crate with; also the shortest account of how its parts go
//! together. A mesh does the same with the experts elsewhere.

use std::sync::Arc;

use kernels::Compute;
use kernels::cuda::Row;

use crate::checkpoint::Checkpoint;
use crate::error::{LoadError, StepError};
use crate::expert::{Expert, ExpertGroup, ExpertScratch, forward_experts};
use crate::kv::{KvPool, PageId};
use crate::numerics::Numerics;
use crate::profile::{Part, span};
use crate::step::{Chunk, Routed, Step};
use crate::trunk::Trunk;

/// A trunk and its experts.
pub struct Local {
    trunk: Trunk,
    /// `[moe layers][experts]`
    experts: Vec<Vec<Expert>>,
    step: Step,
    /// Rows by expert: for each expert the places `row * top_k + slot`.
    places: Vec<Vec<usize>>,
    /// The same one after the other, as the experts' rows and results lie.
    by_expert: Vec<usize>,
    results: Vec<u8>,
    /// Where each place's result lies among the results.
    order: Vec<usize>,
    scratch: ExpertScratch,
}

impl Local {
    /// Loads trunk and experts.
    pub fn load(
        checkpoint: &Arc<Checkpoint>,
        numerics: Numerics,
        compute: Arc<Compute>,
    ) -> Result<Local, LoadError> {
        Local::with(checkpoint, Trunk::load(checkpoint, numerics, compute)?, Step::new())
    }

    /// Loads experts beside a trunk that is there, and a step of its.
    pub fn with(
        checkpoint: &Arc<Checkpoint>,
        trunk: Trunk,
        step: Step,
    ) -> Result<Local, LoadError> {
        let config = checkpoint.config();
        let layer =
            |layer| (0..config.experts).map(|e| Expert::load(checkpoint, layer, e)).collect();
        Ok(Local {
            experts: config.moe_layers().map(layer).collect::<Result<_, _>>()?,
            trunk,
            step,
            places: vec![Vec::new(); config.experts],
            by_expert: Vec::new(),
            results: Vec::new(),
            order: Vec::new(),
            scratch: ExpertScratch::default(),
        })
    }

    /// The step that ran last, and the trunk.
    pub fn into_parts(self) -> (Step, Trunk) {
        (self.step, self.trunk)
    }

    /// The trunk.
    pub fn trunk(&self) -> &Trunk {
        &self.trunk
    }

    /// Runs one step and gives the logits of its wanted rows, `[wanted, vocab]`. `see` is shown
    /// what every MoE layer's gate decided.
    pub fn run(
        &mut self,
        chunks: &[Chunk<'_>],
        kv: &mut KvPool,
        mut see: impl FnMut(usize, Routed<'_>),
    ) -> Result<&mut [f32], StepError> {
        self.trunk.begin(&mut self.step, chunks, kv)?;
        for layer in 0..self.trunk.config().layers {
            if self.trunk.attend(layer, &mut self.step, kv)? {
                see(layer, self.step.routed());
                self.dispatch(layer);
                self.trunk.shared(layer, &mut self.step)?;
                let bytes = self.trunk.config().hidden * self.trunk.numerics().bytes();
                let (order, results) = (&self.order, &self.results);
                let result = |place: usize| &results[order[place] * bytes..][..bytes];
                self.trunk.absorb(layer, &mut self.step, &result)?;
            }
        }
        Ok(self.trunk.logits(&mut self.step)?)
    }

    /// Groups the routed rows by expert and runs them.
    fn dispatch(&mut self, layer: usize) {
        let _span = span(Part::Experts);
        let routed = self.step.routed();
        self.places.iter_mut().for_each(Vec::clear);
        for (place, expert) in routed.experts.iter().enumerate() {
            self.places[*expert as usize].push(place);
        }
        self.order.resize(routed.experts.len(), 0);
        self.by_expert.clear();
        self.by_expert.extend(self.places.iter().flatten());
        for (at, place) in self.by_expert.iter().enumerate() {
            self.order[*place] = at;
        }
        let by_expert = &self.by_expert;
        let rows = |at: usize| {
            let id = by_expert[at] / routed.top_k;
            Row { id, fp8: false, bytes: routed.row(id) }
        };
        let experts = &self.experts[layer - self.trunk.config().first_dense];
        let groups = experts.iter().zip(&self.places).filter(|(_, places)| !places.is_empty());
        let groups: Vec<_> =
            groups.map(|(expert, places)| ExpertGroup { expert, rows: places.len() }).collect();
        forward_experts(
            self.trunk.compute(),
            self.trunk.numerics(),
            &groups,
            &rows,
            &mut self.results,
            &mut self.scratch,
        );
    }
}

/// A sequence's own pages, for `tokens` tokens; all of the pool's, if it has just enough.
pub fn pages(kv: &mut KvPool, tokens: usize) -> Option<Vec<PageId>> {
    (0..tokens.div_ceil(kv.page_tokens())).map(|_| kv.alloc()).collect()
}
