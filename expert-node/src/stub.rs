//! A node whose experts answer with the row they are given: everything of a
//! node but the maths, so that what it takes is the way there and back.

use std::sync::Arc;

use mesh::lifecycle::{Readiness, Shutdown};
use mesh::metrics::Metrics;
use mesh::near::Offer;
use mesh::transport::{self, Endpoint};
use model::{ExpertScratch, Numerics};
use proto::LayerId;
use proto::frame::Shape;

use crate::admission::Admission;
use crate::control::Control;
use crate::metrics::NodeMetrics;
use crate::service::Facts;
use crate::store::Store;
use crate::{Error, Run};

/// The one layer of a stub's model.
pub const LAYER: LayerId = LayerId(0);
/// The digest of the model that every stub serves.
pub const DIGEST: [u8; 32] = [0; 32];
/// Its class: rows are bf16 on the wire.
pub const NUMERICS: Numerics = Numerics::Bf16;

/// Serves the experts `owned` of a model of `shape` until `shutdown`.
///
/// # Errors
/// It cannot listen there, or the server fails.
pub async fn serve(
    listen: &Endpoint,
    shape: Shape,
    owned: impl IntoIterator<Item = u32>,
    shutdown: Shutdown,
) -> Result<(), Error> {
    let listener = transport::bind(listen).await?;
    let isa = kernels::Isa::detect();
    let run = Run {
        facts: Facts {
            id: "stub".to_owned(),
            digest: DIGEST,
            numerics: NUMERICS,
            class: NUMERICS.class(isa),
            device: format!("cpu/{isa}"),
            shape,
            alive_at: None,
        },
        compute: kernels::Compute::new(isa, 1),
        experts: Box::new(ExpertScratch::default()),
        store: Arc::new(Store::stub(LAYER, owned)),
        control: Control::new(None),
        admission: Arc::new(Admission::new(usize::MAX >> 1)),
        node: Metrics::default().register(NodeMetrics::new),
        offer: Offer::default(),
        tls: None,
    };
    run.until((listener, None), shutdown, Readiness::starting("a stub")).await
}
