//! Memory of a device that safe code can use: copies are of pinned bytes which nobody can reach while they are copied.

use std::marker::PhantomData;
use std::sync::Arc;

use super::super::error::GpuError;
use super::super::layout::{BLOCK, Coding};
use super::driver::{DeviceMemory, Driver, HostMemory};
use super::op::Op;
use crate::mat::Mat;

/// Pinned bytes that an [`Uploader`] copies from.
const PIECE: usize = 16 << 20;

/// Bytes on a device.
pub struct Buffer {
    what: &'static str,
    memory: Box<dyn DeviceMemory>,
    len: usize,
}

/// A part of a [`Buffer`], from a place on.
#[derive(Clone, Copy)]
pub struct Slice<'a> {
    what: &'static str,
    address: u64,
    len: usize,
    of: PhantomData<&'a Buffer>,
}

impl Buffer {
    /// `count` values of `T`; `what` they are is said if there is no room for them.
    pub fn new<T>(
        driver: &Arc<dyn Driver>,
        what: &'static str,
        count: usize,
    ) -> Result<Buffer, GpuError> {
        let len = count.saturating_mul(size_of::<T>());
        Ok(Buffer { what, memory: driver.allocate(what, len)?, len })
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn all(&self) -> Slice<'_> {
        self.after(0)
    }

    /// From byte `at` on. Panics if that is beyond the end.
    pub fn after(&self, at: usize) -> Slice<'_> {
        assert!(at <= self.len, "byte {at} of {}", self.what);
        let address = self.memory.address() + at as u64;
        Slice { what: self.what, address, len: self.len - at, of: PhantomData }
    }

    /// Sets some bytes to zero, after what was launched before. Panics if they are not inside.
    pub fn zero(&self, at: usize, len: usize) -> Result<(), GpuError> {
        self.memory.zero(at, len)
    }
}

impl Slice<'_> {
    /// Its address, if it has room for `count` values of `T`.
    pub(super) fn holding<T>(&self, op: Op, count: usize) -> Result<u64, GpuError> {
        let need = count.saturating_mul(size_of::<T>());
        if need > self.len {
            let (kernel, what, have) = (op.name().1, self.what, self.len);
            return Err(GpuError::Shape { kernel, what, need, have });
        }
        Ok(self.address)
    }
}

/// Pinned bytes of the host that are copied to the device and from it.
pub struct Host {
    driver: Arc<dyn Driver>,
    bytes: Box<dyn HostMemory>,
    /// The device may be using them.
    busy: bool,
}

impl Host {
    pub fn new(driver: &Arc<dyn Driver>, what: &'static str, len: usize) -> Result<Host, GpuError> {
        Ok(Host { driver: driver.clone(), bytes: driver.pin(what, len)?, busy: false })
    }

    /// To be written; waits while the device uses them.
    pub fn bytes_mut(&mut self) -> Result<&mut [u8], GpuError> {
        if self.busy {
            self.driver.wait()?;
            self.busy = false;
        }
        Ok(&mut self.bytes)
    }

    /// As they were last written or fetched; none while the device uses them.
    pub fn bytes(&self) -> &[u8] {
        if self.busy { &[] } else { &self.bytes }
    }

    /// Copies some rows of `from`, of so many bytes each, one after the other, after what was launched before, and waits.
    /// Panics if one is not there, or there are more than it holds.
    pub fn fetch_rows(
        &mut self,
        from: &Buffer,
        row_bytes: usize,
        rows: impl IntoIterator<Item = usize>,
    ) -> Result<&[u8], GpuError> {
        self.bytes_mut()?;
        let mut end = 0;
        for row in rows {
            self.busy = true;
            let to = &mut self.bytes[end..end + row_bytes];
            // SAFETY: as in `send`.
            unsafe { from.memory.copy_out(row * row_bytes, to)? };
            end += row_bytes;
        }
        // Waits, if there were any.
        Ok(&self.bytes_mut()?[..end])
    }

    /// Has the first `len` bytes copied to the beginning of `to`, before what is launched next. Panics if either is shorter.
    pub fn send(&mut self, to: &Buffer, len: usize) -> Result<(), GpuError> {
        self.bytes_mut()?;
        self.busy = true;
        // SAFETY: the bytes are lent to nobody until the device has been waited for.
        unsafe { to.memory.copy_in(0, &self.bytes[..len]) }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.busy {
            // Whether it is done or the device is gone, nobody uses the bytes any more.
            let _ = self.driver.wait();
        }
    }
}

/// Copies the first bytes of each buffer to the host, after what was launched before, and waits for all. Panics if one has
/// fewer.
pub fn fetch<const N: usize>(
    driver: &Arc<dyn Driver>,
    mut wanted: [(&Buffer, &mut Host, usize); N],
) -> Result<(), GpuError> {
    for (from, to, len) in &mut wanted {
        to.bytes_mut()?;
        to.busy = true;
        // SAFETY: as in `send`.
        unsafe { from.memory.copy_out(0, &mut to.bytes[..*len])? };
    }
    driver.wait()?;
    wanted.iter_mut().for_each(|(_, to, _)| to.busy = false);
    Ok(())
}

/// Brings what is written once to the device.
pub struct Uploader {
    driver: Arc<dyn Driver>,
    host: Box<dyn HostMemory>,
}

impl Uploader {
    pub fn new(driver: &Arc<dyn Driver>) -> Result<Uploader, GpuError> {
        let host = driver.pin("weights on their way to the device", PIECE)?;
        Ok(Uploader { driver: driver.clone(), host })
    }

    /// Fills the beginning of `to` with `rows` rows of `row_bytes` bytes: `write` is given the number of a first row, and
    /// room for some from there on. Panics if a row is longer than 16 MiB or `to` shorter than all.
    pub fn rows(
        &mut self,
        to: &Buffer,
        row_bytes: usize,
        rows: usize,
        mut write: impl FnMut(usize, &mut [u8]),
    ) -> Result<(), GpuError> {
        let most = PIECE / row_bytes.max(1);
        assert!(most > 0, "rows of {row_bytes} bytes");
        for first in (0..rows).step_by(most) {
            let len = most.min(rows - first) * row_bytes;
            write(first, &mut self.host[..len]);
            // SAFETY: waited for before anyone writes to the bytes again.
            let copied = unsafe { to.memory.copy_in(first * row_bytes, &self.host[..len]) };
            copied.and(self.driver.wait())?;
        }
        Ok(())
    }

    /// The scales of `mat`, one after the other; none unless it is in FP8 blocks that the products take.
    pub fn scales(&mut self, mat: &Mat<'_>) -> Result<Option<Buffer>, GpuError> {
        let Some(table) = mat.scales().filter(|_| mat.stored().coding() == Coding::Fp8) else {
            return Ok(None);
        };
        let (blocks, columns) = (mat.n().div_ceil(BLOCK), mat.k().div_ceil(BLOCK));
        let to = Buffer::new::<f32>(&self.driver, "scales of a weight", blocks * columns)?;
        let row_bytes = columns * size_of::<f32>();
        self.rows(&to, row_bytes, blocks, |first, bytes| {
            for (block, to) in (first..).zip(bytes.chunks_exact_mut(row_bytes)) {
                to.copy_from_slice(table.row(block * BLOCK)[..columns].as_flattened());
            }
        })?;
        Ok(Some(to))
    }

    /// A buffer with `values` in it.
    pub fn values(&mut self, what: &'static str, values: &[f32]) -> Result<Buffer, GpuError> {
        let to = Buffer::new::<f32>(&self.driver, what, values.len())?;
        self.rows(&to, size_of::<f32>(), values.len(), |first, bytes| {
            let count = bytes.len() / size_of::<f32>();
            bytes.copy_from_slice(bytemuck::cast_slice(&values[first..first + count]));
        })?;
        Ok(to)
    }
}
