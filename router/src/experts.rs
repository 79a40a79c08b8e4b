//! The seam between the trunk and the experts: send a layer's rows, do
//! something else, wait for the results. Each micro-batch of a step has a lane. Two implementations behind the same
//! call: nodes over gRPC, and experts inside this process (`--expert-nodes 0`),
//! whose rows pass through the same wire dtype and so give the same bits.

pub mod local;
pub mod remote;
pub mod spin;

use model::{Routed, Share};
use proto::{ExpertId, LayerId};
use tracing::Span;

use crate::exchange::{Gap, LANES};
use local::Local;
use remote::Remote;

/// See the module's text.
pub enum Experts {
    Local(Box<Local>),
    Remote(Box<Remote>),
}

impl Experts {
    /// Micro-batches that may be away at once. One where nobody else computes them.
    pub fn lanes(&self) -> usize {
        match self {
            Self::Local(_) => 1,
            Self::Remote(_) => LANES,
        }
    }

    /// Sends a layer's rows to the owners of their experts; returns at once.
    pub fn send(&mut self, lane: usize, layer: LayerId, routed: &Routed<'_>, span: &Span) {
        match self {
            Self::Local(local) => local.send(layer, routed),
            Self::Remote(remote) => remote.send(lane, layer, routed, span),
        }
    }

    /// Returns when every result of the lane's layer is there or known to be a
    /// gap. `routed` is what was sent, for what has to be sent again.
    pub fn wait(&mut self, lane: usize, routed: &Routed<'_>) {
        match self {
            Self::Local(local) => local.compute(routed),
            Self::Remote(remote) => remote.wait(lane, routed),
        }
    }

    /// The lane's results that cannot be had.
    pub fn gaps(&self, lane: usize) -> &[Gap] {
        match self {
            Self::Local(_) => &[],
            Self::Remote(remote) => remote.lanes[lane].0.gaps(),
        }
    }

    /// Somebody who gives signs of life owns the expert.
    pub fn has(&self, layer: LayerId, expert: ExpertId) -> bool {
        match self {
            Self::Local(_) => true,
            Self::Remote(remote) => remote.has(layer, expert),
        }
    }

    /// Nobody waits for what is under way.
    pub fn abandon(&mut self) {
        if let Self::Remote(remote) = self {
            remote.abandon();
        }
    }

    /// What the lane's slot `row * top_k + slot` brings to its row's sum.
    pub fn share(&self, lane: usize, slot: usize) -> Share<'_> {
        match self {
            Self::Local(local) => Share::Result(local.row(slot)),
            Self::Remote(remote) => remote.share(lane, slot),
        }
    }

    /// Frames that were sent and not answered.
    pub fn in_flight(&self) -> usize {
        match self {
            Self::Local(_) => 0,
            Self::Remote(remote) => remote.in_flight(),
        }
    }
}
