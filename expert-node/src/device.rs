//! What computes a node's experts: the CPU, or a GPU that they are brought to.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use kernels::Isa;
use model::gpu::{GpuExperts, GpuStartError};
use model::{Checkpoint, CpuExperts, ExpertDevice, Experts, Numerics};

use crate::store::Store;
use crate::{Config, Error};

/// What a node is told to compute with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    #[default]
    Cpu,
    /// The GPU that the driver has at this place.
    Cuda(usize),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "cpu" {
            return Ok(Self::Cpu);
        }
        let ordinal = text.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse::<u16>().ok());
        let wrong = || format!("`{text}` is neither cpu nor cuda:N with a device's number");
        ordinal.map(|ordinal| Self::Cuda(ordinal.into())).ok_or_else(wrong)
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_written_as_it_is_read() {
        for text in ["cpu", "cuda:0", "cuda:7"] {
            assert_eq!(
                text.parse::<Device>().map(|device| device.to_string()),
                Ok(text.to_owned())
            );
        }
        for text in ["", "gpu", "cuda", "cuda:", "cuda:-1", "cuda:x", "cuda:0:1"] {
            let said = text.parse::<Device>().unwrap_err();
            assert!(said.contains("neither cpu nor cuda:N"), "{said}");
        }
    }
}
