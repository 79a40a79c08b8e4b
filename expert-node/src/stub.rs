//! A node whose experts answer with the row they are given: everything of a
//! node but the maths, so that what it takes is the way there and back.

use std::sync::Arc;

use mesh::lifecycle::{Readiness, Shutdown};
use mesh::metrics::Metrics;
use mesh::near::{Offer, Shortcut};
use mesh::transport::{self, Endpoint};
use model::{Checkpoint, CpuExperts, Numerics};
use proto::LayerId;
use proto::frame::Shape;

use crate::admission::Admission;
use crate::control::Control;
use crate::metrics::NodeMetrics;
use crate::service::Facts;
use crate::store::Store;
use crate::{Error, Run, shape};

/// The layer of a [`Model::of_one_layer`].
pub const LAYER: LayerId = LayerId(0);
/// The digest of such a model.
pub const DIGEST: [u8; 32] = [0; 32];
/// The class of every stub: rows are bf16 on the wire.
pub const NUMERICS: Numerics = Numerics::Bf16;

/// What stubs say that they serve.
#[derive(Clone, Debug)]
pub struct Model {
    digest: [u8; 32],
    shape: Shape,
    layers: Vec<LayerId>,
}

impl Model {
    /// A model that is nothing but one layer of experts.
    pub fn of_one_layer(shape: Shape) -> Self {
        Self { digest: DIGEST, shape, layers: vec![LAYER] }
    }

    /// All layers of a checkpoint that have experts, for a router with its trunk.
    pub fn of(checkpoint: &Checkpoint) -> Self {
        let config = checkpoint.config();
        Self {
            digest: checkpoint.digest(),
            shape: shape(config),
            layers: config.moe_layers().map(|layer| LayerId(layer as u32)).collect(),
        }
    }

    /// Experts of a layer.
    pub fn experts(&self) -> u32 {
        self.shape.experts
    }
}

/// Serves the experts `owned` of each of the model's layers until `shutdown`.
///
/// # Errors
/// It cannot listen there, or the server fails.
pub async fn serve(
    listen: &Endpoint,
    model: &Model,
    owned: &[u32],
    shutdown: Shutdown,
) -> Result<(), Error> {
    let listener = transport::bind(listen).await?;
    let isa = kernels::Isa::detect();
    let run = Run {
        facts: Facts {
            id: "stub".to_owned(),
            digest: model.digest,
            numerics: NUMERICS,
            class: NUMERICS.class(isa),
            device: format!("cpu/{isa}"),
            shape: model.shape,
            alive_at: None,
            partial: false,
        },
        compute: kernels::Compute::new(isa, 1),
        experts: Box::new(CpuExperts::default()),
        store: Arc::new(Store::stub(&model.layers, owned)),
        control: Control::new(None),
        admission: Arc::new(Admission::new(usize::MAX >> 1)),
        node: Metrics::default().register(NodeMetrics::new),
        offer: Offer::default(),
        tls: None,
        shared_rows: Shortcut::Auto,
    };
    run.until((listener, None), shutdown, Readiness::starting("a stub")).await
}
