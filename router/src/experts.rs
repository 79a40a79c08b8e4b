//! The seam between the trunk and the experts: send a layer's rows, do
//! something else, wait for the results. Two implementations behind the same
//! call: nodes over gRPC, and experts inside this process (`--expert-nodes 0`),
//! whose rows pass through the same wire dtype and so give the same bits.

pub mod local;
pub mod remote;

use model::Routed;
use proto::LayerId;
use tracing::Span;

use crate::exchange::ExchangeError;
use local::Local;
use remote::Remote;

/// See the module's text.
pub enum Experts {
    Local(Box<Local>),
    Remote(Box<Remote>),
}

impl Experts {
    /// Sends a layer's rows to the owners of their experts; returns at once.
    pub fn send(&mut self, layer: LayerId, routed: &Routed<'_>, span: &Span) {
        match self {
            Self::Local(local) => local.send(layer, routed),
            Self::Remote(remote) => remote.send(layer, routed, span),
        }
    }

    /// Returns when every result of the layer is there. `routed` is what was sent,
    /// for what has to be sent again.
    ///
    /// # Errors
    /// A result that cannot be had: the step must fail.
    pub fn wait(&mut self, routed: &Routed<'_>) -> Result<(), ExchangeError> {
        match self {
            Self::Local(local) => {
                local.compute();
                Ok(())
            }
            Self::Remote(remote) => remote.wait(routed),
        }
    }

    /// The result of slot `row * top_k + slot`, in wire form.
    pub fn row(&self, slot: usize) -> &[u8] {
        match self {
            Self::Local(local) => local.row(slot),
            Self::Remote(remote) => remote.row(slot),
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
