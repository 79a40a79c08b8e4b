//! What the engine computes with: the trunk on its device, its KV cache and memory for steps.

use std::sync::Arc;

use kernels::{Compute, Isa};
use model::{Checkpoint, Device, Driver as _, GpuError, Hopper, KvError, KvPool, Step, Trunk};

use crate::exchange::LANES;
use crate::{Config, Error};

/// See the module's text.
pub struct Loaded {
    pub checkpoint: Arc<Checkpoint>,
    pub isa: Isa,
    pub trunk: Trunk,
    /// What the trunk's device is called.
    pub device: String,
    /// Of the KV cache.
    pub pages: usize,
    pub kv: KvPool,
    /// One per micro-batch.
    pub steps: [Step; LANES],
}

/// Opens the checkpoint and brings the trunk where it is computed.
pub fn load(config: &Config, alone: bool) -> Result<Loaded, Error> {
    let checkpoint = Checkpoint::open(&config.model_dir)?;
    let model = checkpoint.config().summary();
    tracing::info!(model, numerics = %config.numerics, "checkpoint opened");
    let isa = config.isa.unwrap_or_else(Isa::detect);
    let compute = Arc::new(Compute::bound(isa, config.threads, config.first_cpu));
    let trunk = Trunk::load(&checkpoint, config.numerics, compute)?;
    let (trunk, device) = placed(trunk, config.device, isa)?;
    let pages = config.kv_tokens.div_ceil(config.page_tokens.max(1));
    let no_device = |error: GpuError| Error::Device(config.device, error.into());
    let kv = trunk.cache(pages, config.page_tokens).map_err(|error| match error {
        KvError::Gpu(error) => no_device(error),
        other => other.into(),
    })?;
    let step = || trunk.step(&kv, config.step_tokens).map_err(no_device);
    // One that is alone has no use for the second.
    let steps = [step()?, if alone { Step::new() } else { step()? }];
    Ok(Loaded { checkpoint, isa, trunk, device, pages, kv, steps })
}

/// Has `device` compute the trunk, if it is not the CPU; and what it is called.
fn placed(trunk: Trunk, device: Device, isa: Isa) -> Result<(Trunk, String), Error> {
    let Device::Cuda(ordinal) = device else { return Ok((trunk, format!("cpu/{isa}"))) };
    let failed = |error| Error::Device(device, error);
    trunk.check_gpu().map_err(failed)?;
    let driver = Arc::new(Hopper::open(ordinal).map_err(|error| failed(error.into()))?);
    let name = format!("{device}/{}", driver.name());
    let trunk = trunk.onto(driver).map_err(failed)?;
    tracing::info!(gpu = name, "the trunk is computed on a GPU");
    Ok((trunk, name))
}
