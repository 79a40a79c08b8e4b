//! What the trunk's launches go to.

use std::ffi::c_void;
use std::ops::DerefMut;

use super::super::error::GpuError;
use super::super::gpu::{Gpu, Grid, Kernel, Lane};
use super::super::memory::{Memory, Pinned};
use super::super::tensor_map::{TensorMap, Tiled};
use super::op::Op;

/// A device that computes in the order it is told. Its calls are made by this module alone, which checks lengths.
pub trait Driver: Send + Sync {
    /// Its place among the devices of the process.
    fn ordinal(&self) -> usize;

    /// As its maker calls it.
    fn name(&self) -> &str;

    /// Blocks that run at once, about.
    fn processors(&self) -> u32;

    /// `len` bytes of device memory, at a multiple of 256.
    fn allocate(&self, what: &'static str, len: usize) -> Result<Box<dyn DeviceMemory>, GpuError>;

    /// `len` bytes of the host's that the device copies from and to by itself.
    fn pin(&self, what: &'static str, len: usize) -> Result<Box<dyn HostMemory>, GpuError>;

    fn tensor_map(&self, tensor: &Tiled) -> Result<TensorMap, GpuError>;

    /// Runs a kernel after what was given before.
    ///
    /// # Safety
    /// As for [`Gpu::launch`].
    unsafe fn launch(&self, op: Op, grid: Grid, args: &mut [*mut c_void]) -> Result<(), GpuError>;

    /// Waits until all that was given is done.
    fn wait(&self) -> Result<(), GpuError>;
}

/// Bytes on a device.
pub trait DeviceMemory: Send + Sync {
    fn address(&self) -> u64;

    /// Starts copying `bytes` to byte `at`. Panics if they are not inside.
    ///
    /// # Safety
    /// The bytes stay as they are until the device has been waited for.
    unsafe fn copy_in(&self, at: usize, bytes: &[u8]) -> Result<(), GpuError>;

    /// Starts copying from byte `at` on to `bytes`. Panics if they are not inside.
    ///
    /// # Safety
    /// Nobody uses the bytes until the device has been waited for.
    unsafe fn copy_out(&self, at: usize, bytes: &mut [u8]) -> Result<(), GpuError>;

    /// Sets `len` bytes from `at` on to zero, after what was given before. Panics if they are not inside.
    fn zero(&self, at: usize, len: usize) -> Result<(), GpuError>;
}

/// Pinned bytes of the host.
pub trait HostMemory: DerefMut<Target = [u8]> + Send + Sync {}

impl HostMemory for Pinned {}

/// A GPU with the trunk's kernels looked up.
pub struct Hopper {
    gpu: Gpu,
    kernels: Vec<(Op, Kernel)>,
}

impl Hopper {
    /// Opens `cuda:ordinal`.
    pub fn open(ordinal: usize) -> Result<Hopper, GpuError> {
        let gpu = Gpu::open(ordinal)?;
        let kernels = Op::all().map(|op| {
            let (file, name) = op.name();
            Ok((op, gpu.kernel(file, name, op.shared())?))
        });
        let kernels = kernels.collect::<Result<_, GpuError>>()?;
        Ok(Hopper { gpu, kernels })
    }
}

impl Driver for Hopper {
    fn ordinal(&self) -> usize {
        self.gpu.ordinal()
    }

    fn name(&self) -> &str {
        self.gpu.name()
    }

    fn processors(&self) -> u32 {
        self.gpu.processors()
    }

    fn allocate(&self, what: &'static str, len: usize) -> Result<Box<dyn DeviceMemory>, GpuError> {
        Ok(Box::new(self.gpu.allocate(what, len)?))
    }

    fn pin(&self, what: &'static str, len: usize) -> Result<Box<dyn HostMemory>, GpuError> {
        Ok(Box::new(self.gpu.pin(what, len)?))
    }

    fn tensor_map(&self, tensor: &Tiled) -> Result<TensorMap, GpuError> {
        self.gpu.tensor_map(tensor)
    }

    unsafe fn launch(&self, op: Op, grid: Grid, args: &mut [*mut c_void]) -> Result<(), GpuError> {
        let found = self.kernels.iter().find(|(known, _)| *known == op);
        let Some((_, kernel)) = found else {
            let (ordinal, code) = (self.ordinal(), format!("{op:?} was not loaded"));
            return Err(GpuError::Failed { ordinal, doing: "a launch", code });
        };
        // SAFETY: the caller's promise.
        unsafe { self.gpu.launch(Lane::Compute, kernel, grid, args) }
    }

    fn wait(&self) -> Result<(), GpuError> {
        self.gpu.wait(Lane::Compute)
    }
}

impl DeviceMemory for Memory {
    fn address(&self) -> u64 {
        Memory::address(self)
    }

    unsafe fn copy_in(&self, at: usize, bytes: &[u8]) -> Result<(), GpuError> {
        // SAFETY: the caller's promise; what uses the memory runs on the same lane, in order.
        unsafe { Memory::copy_in(self, Lane::Compute, at, bytes) }
    }

    unsafe fn copy_out(&self, at: usize, bytes: &mut [u8]) -> Result<(), GpuError> {
        // SAFETY: as above.
        unsafe { Memory::copy_out(self, Lane::Compute, at, bytes) }
    }

    fn zero(&self, at: usize, len: usize) -> Result<(), GpuError> {
        Memory::zero(self, Lane::Compute, at, len)
    }
}
