//! Memory of a device, memory of the host that it copies from and to at full speed, and the copies.
//!
//! Lengths are checked here, so that a copy cannot leave its buffers. What is being copied to or from must not be used
//! until the lane has been waited for; [`Pinned`] lends its bytes only by `&mut`, and who copies keeps that promise.

use std::ffi::c_void;

use cudarc::driver::DriverError;
use cudarc::driver::{result, sys};

use super::error::GpuError;
use super::gpu::{Gpu, Lane};

/// Bytes on a device.
pub struct Memory {
    gpu: Gpu,
    address: sys::CUdeviceptr,
    len: usize,
}

impl Gpu {
    /// `len` bytes of device memory, zeroed; `what` they are for is said if there are not so many.
    pub fn allocate(&self, what: &'static str, len: usize) -> Result<Memory, GpuError> {
        // The driver refuses to allocate nothing.
        let size = len.max(1);
        let allocated = self.bind().and_then(|()| {
            // SAFETY: uninitialised until it is zeroed below, before anyone sees it.
            unsafe { result::malloc_sync(size) }
        });
        let address = allocated.map_err(|error| self.no_memory(what, size, error))?;
        let memory = Memory { gpu: self.clone(), address, len };
        // The host does not wait for a memset, and the lanes do not wait for the stream that it is on.
        // SAFETY: the allocation is that long.
        let zeroed = unsafe { result::memset_d8_sync(address, 0, size) };
        let zeroed = zeroed.and_then(|()| result::ctx::synchronize());
        zeroed.map_err(|error| self.error("zeroing memory", error))?;
        Ok(memory)
    }

    /// `len` bytes of pinned host memory, zeroed.
    pub fn pin(&self, what: &'static str, len: usize) -> Result<Pinned, GpuError> {
        let pinned = self.bind().and_then(|()| {
            // SAFETY: uninitialised until it is zeroed below, before anyone sees it.
            unsafe { result::malloc_host(len.max(1), 0) }
        });
        let bytes = pinned.map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => GpuError::Pinned { what, need: len },
            _ => self.error("pinning host memory", error),
        })?;
        // SAFETY: the allocation is that long, and bytes have no invalid values.
        unsafe { bytes.cast::<u8>().write_bytes(0, len.max(1)) };
        Ok(Pinned { gpu: self.clone(), bytes: bytes.cast(), len })
    }

    fn no_memory(&self, what: &'static str, need: usize, error: DriverError) -> GpuError {
        if error.0 != sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return self.error("allocating memory", error);
        }
        let (free, total) = self.memory().unwrap_or_default();
        GpuError::OutOfMemory { ordinal: self.ordinal(), what, need, free, total }
    }
}

impl Memory {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it is, for a kernel's parameters.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Has `lane` copy `bytes` to byte `at`. Panics if they are not inside.
    ///
    /// # Safety
    /// The bytes stay as they are until the lane has been waited for, and nothing else uses what they are copied to.
    pub unsafe fn copy_in(&self, lane: Lane, at: usize, bytes: &[u8]) -> Result<(), GpuError> {
        assert!(at <= self.len && bytes.len() <= self.len - at, "a copy inside its memory");
        let stream = self.gpu.stream(lane).cu_stream();
        let copied = self.gpu.bind().and_then(|()| {
            // SAFETY: inside, as was just checked; the rest is the caller's promise.
            unsafe { result::memcpy_htod_async(self.address + at as u64, bytes, stream) }
        });
        copied.map_err(|error| self.gpu.error("copying to the device", error))
    }

    /// Has `lane` copy from byte `at` on to `bytes`. Panics if they are not inside.
    ///
    /// # Safety
    /// Nobody uses the bytes until the lane has been waited for.
    pub unsafe fn copy_out(&self, lane: Lane, at: usize, bytes: &mut [u8]) -> Result<(), GpuError> {
        assert!(at <= self.len && bytes.len() <= self.len - at, "a copy inside its memory");
        let stream = self.gpu.stream(lane).cu_stream();
        let copied = self.gpu.bind().and_then(|()| {
            // SAFETY: inside, as was just checked; the rest is the caller's promise.
            unsafe { result::memcpy_dtoh_async(bytes, self.address + at as u64, stream) }
        });
        copied.map_err(|error| self.gpu.error("copying from the device", error))
    }

    /// Has `lane` set `len` bytes from `at` on to zero. Panics if they are not inside.
    pub fn zero(&self, lane: Lane, at: usize, len: usize) -> Result<(), GpuError> {
        assert!(at <= self.len && len <= self.len - at, "bytes inside their memory");
        let stream = self.gpu.stream(lane).cu_stream();
        let filled = self.gpu.bind().and_then(|()| {
            // SAFETY: inside, as was just checked.
            unsafe { result::memset_d8_async(self.address + at as u64, 0, len, stream) }
        });
        filled.map_err(|error| self.gpu.error("zeroing memory", error))
    }

    /// Has `lane` set all bytes to `value`.
    pub fn fill(&self, lane: Lane, value: u8) -> Result<(), GpuError> {
        let stream = self.gpu.stream(lane).cu_stream();
        let filled = self.gpu.bind().and_then(|()| {
            // SAFETY: the allocation is that long.
            unsafe { result::memset_d8_async(self.address, value, self.len, stream) }
        });
        filled.map_err(|error| self.gpu.error("filling memory", error))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // A device that is gone has nothing to be freed, and a driver that fails here has nobody to be told.
        let _ = self.gpu.bind().and_then(|()| {
            // SAFETY: allocated once, freed once; the driver waits for what still uses it.
            unsafe { result::free_sync(self.address) }
        });
    }
}

/// Bytes of the host that the device reads and writes by itself.
pub struct Pinned {
    gpu: Gpu,
    bytes: *mut u8,
    len: usize,
}

// SAFETY: plain memory of its own, tied to no thread.
unsafe impl Send for Pinned {}
// SAFETY: shared access only reads.
unsafe impl Sync for Pinned {}

impl std::ops::Deref for Pinned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: allocated that long and initialised.
        unsafe { std::slice::from_raw_parts(self.bytes, self.len) }
    }
}

impl std::ops::DerefMut for Pinned {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: allocated that long and initialised, borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.bytes, self.len) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // As in `Memory`.
        let _ = self.gpu.bind().and_then(|()| {
            // SAFETY: allocated once, freed once.
            unsafe { result::free_host(self.bytes.cast::<c_void>()) }
        });
    }
}
