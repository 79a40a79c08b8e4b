//! What computes a node's experts: the CPU, or a GPU that they are brought to.

use std::sync::Arc;

use kernels::Isa;
pub use model::Device;
use model::gpu::{GpuExperts, GpuStartError};
use model::{Checkpoint, CpuExperts, ExpertDevice, Experts, Numerics};

use crate::store::Store;
use crate::{Config, Error};

/// What computes, opened.
pub struct Opened {
    pub experts: Box<dyn Experts>,
    /// The full name of its numerics class.
    pub class: String,
    pub name: String,
}

/// Opens what `config` says, and has a GPU bring in what is owned.
///
/// # Errors
/// There is no such device, or it cannot compute these experts.
pub fn open(
    config: &Config,
    checkpoint: &Arc<Checkpoint>,
    isa: Isa,
    store: &mut Store,
) -> Result<Opened, Error> {
    let Device::Cuda(ordinal) = config.device else {
        return Ok(Opened {
            experts: Box::new(CpuExperts::default()),
            class: config.numerics.class(isa),
            name: format!("cpu/{isa}"),
        });
    };
    let failed = |error: GpuStartError| Error::Device(config.device, error);
    if config.numerics != Numerics::Bf16 {
        return Err(failed(GpuStartError::Numerics));
    }
    let class = ExpertDevice::Cuda.class(config.numerics, isa, checkpoint)?;
    let model = checkpoint.config();
    let layers = model.moe_layers();
    let shape = checkpoint.expert_shape(layers.start)?.map_err(|error| failed(error.into()))?;
    let count = layers.len() * model.experts;
    let gpu = GpuExperts::open(ordinal, shape, count, config.gpu).map_err(failed)?;
    let (name, slots) = gpu.describe();
    tracing::info!(gpu = name, slots, class, "experts are computed on a GPU");
    store.bring_to(gpu.offers());
    Ok(Opened { experts: Box::new(gpu), class, name: format!("cuda:{ordinal}/{name}") })
}
