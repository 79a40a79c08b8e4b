//! The stand-in as a device that has little memory, or is lost.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kernels::cuda::trunk::{DeviceMemory, Driver, HostMemory, Op};
use kernels::cuda::{GpuError, Grid, TensorMap, Tiled};

use crate::driver::StandIn;

/// The stand-in with so many bytes of memory, which is lost after so many launches.
pub struct Failing {
    device: Arc<dyn Driver>,
    bytes: AtomicUsize,
    launches: AtomicUsize,
}

impl Failing {
    pub fn open(bytes: usize, launches: usize) -> Option<Arc<Failing>> {
        let device = StandIn::open(2)?;
        let (bytes, launches) = (AtomicUsize::new(bytes), AtomicUsize::new(launches));
        Some(Arc::new(Failing { device, bytes, launches }))
    }
}

fn take(from: &AtomicUsize, count: usize) -> Result<(), usize> {
    let less = |left: usize| left.checked_sub(count);
    from.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).map(drop)
}

impl Driver for Failing {
    fn ordinal(&self) -> usize {
        self.device.ordinal()
    }

    fn name(&self) -> &str {
        self.device.name()
    }

    fn processors(&self) -> u32 {
        self.device.processors()
    }

    fn allocate(&self, what: &'static str, len: usize) -> Result<Box<dyn DeviceMemory>, GpuError> {
        take(&self.bytes, len).map_err(|free| GpuError::OutOfMemory {
            ordinal: 0,
            what,
            need: len,
            free,
            total: free,
        })?;
        self.device.allocate(what, len)
    }

    fn pin(&self, what: &'static str, len: usize) -> Result<Box<dyn HostMemory>, GpuError> {
        self.device.pin(what, len)
    }

    fn tensor_map(&self, tensor: &Tiled) -> Result<TensorMap, GpuError> {
        self.device.tensor_map(tensor)
    }

    unsafe fn launch(&self, op: Op, grid: Grid, args: &mut [*mut c_void]) -> Result<(), GpuError> {
        take(&self.launches, 1).map_err(|_| lost())?;
        // SAFETY: the caller's promise.
        unsafe { self.device.launch(op, grid, args) }
    }

    fn wait(&self) -> Result<(), GpuError> {
        self.device.wait()
    }
}

pub fn lost() -> GpuError {
    let code = "CUDA_ERROR_ECC_UNCORRECTABLE".to_owned();
    GpuError::Lost { ordinal: 0, doing: "a launch", code }
}
