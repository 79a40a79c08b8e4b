//! The stand-in as a device of the trunk's: memory of the host, poisoned and fenced, and launches that run at once.

use std::ffi::{CString, c_char, c_int, c_void};
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use kernels::cuda::trunk::{DeviceMemory, Driver, Hopper, HostMemory, Op};
use kernels::cuda::{GpuError, Grid, TensorMap, Tiled};
use libloading::{Library, Symbol};

use crate::compiled::{compiled, tensor_map};

type Launch = unsafe extern "C" fn(*const c_char, u32, u32, u32, u64, *const *mut c_void) -> c_int;

/// The stand-in with the kernels in it, compiled once; nothing where there is no C++ compiler.
pub fn library() -> Option<&'static Library> {
    static BUILT: OnceLock<Option<Library>> = OnceLock::new();
    BUILT.get_or_init(|| compiled("trunk.cpp")).as_ref()
}

/// Runs a kernel; threads take turns in the order that `seed` gives.
///
/// # Safety
/// As for a launch on a GPU: `args` are the kernel's, and name memory that it may use.
pub unsafe fn run(
    kernel: &str,
    blocks: (u32, u32),
    threads: u32,
    seed: u64,
    args: &mut [*mut c_void],
) {
    /// The stand-in has one block's state for the whole process.
    static ONE_AT_A_TIME: parking_lot::Mutex<()> = parking_lot::Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock();
    let name = CString::new(kernel).unwrap();
    // SAFETY: that is its type (trunk.cpp).
    let launch: Symbol<'_, Launch> = unsafe { library().unwrap().get(b"standin_launch") }.unwrap();
    // SAFETY: the caller's promise.
    let found = unsafe { launch(name.as_ptr(), blocks.0, blocks.1, threads, seed, args.as_ptr()) };
    assert_eq!(found, 1, "{kernel} is not in the stand-in");
}

/// See the module's text.
pub struct StandIn {
    launches: AtomicU64,
    /// Blocks that a product is told there is room for.
    processors: u32,
}

impl StandIn {
    /// Nothing where there is no C++ compiler. Where MOEMESH_TEST_GPU is a device's number, that GPU instead, so that
    /// the same tests hold of it (`tests/gpu.sh`).
    pub fn open(processors: u32) -> Option<Arc<dyn Driver>> {
        if let Ok(ordinal) = std::env::var("MOEMESH_TEST_GPU") {
            return Some(Arc::new(Hopper::open(ordinal.parse().unwrap()).unwrap()));
        }
        library()?;
        Some(Arc::new(StandIn { launches: AtomicU64::new(1), processors }))
    }
}

impl Driver for StandIn {
    fn ordinal(&self) -> usize {
        0
    }

    fn name(&self) -> &str {
        "a stand-in"
    }

    fn processors(&self) -> u32 {
        self.processors
    }

    fn allocate(&self, what: &'static str, len: usize) -> Result<Box<dyn DeviceMemory>, GpuError> {
        Ok(Box::new(Memory::new(what, len)))
    }

    fn pin(&self, _: &'static str, len: usize) -> Result<Box<dyn HostMemory>, GpuError> {
        Ok(Box::new(Pinned { words: vec![u64::MAX; len.div_ceil(8)], len }))
    }

    fn tensor_map(&self, tensor: &Tiled) -> Result<TensorMap, GpuError> {
        assert_eq!(tensor.problem(), None, "what a driver would refuse");
        Ok(tensor_map(tensor))
    }

    unsafe fn launch(&self, op: Op, grid: Grid, args: &mut [*mut c_void]) -> Result<(), GpuError> {
        let seed = self.launches.fetch_add(1, Ordering::Relaxed);
        assert!(grid.shared <= op.shared() && grid.threads == op.threads());
        let (x, y, z) = grid.blocks;
        assert!(x > 0 && y > 0 && z == 1, "{op:?} on {:?}", grid.blocks);
        // SAFETY: the caller's promise.
        unsafe { run(op.name().1, (x, y), grid.threads, seed, args) };
        Ok(())
    }

    fn wait(&self) -> Result<(), GpuError> {
        Ok(())
    }
}

/// Bytes before and behind that nothing may write to.
const FENCE: usize = 1024;

/// All ones, NaN in every float format, until something is written.
struct Memory {
    what: &'static str,
    bytes: *mut u8,
    /// What holds them, fences included.
    words: Vec<u128>,
    len: usize,
}

// SAFETY: plain memory; runs and copies follow each other.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(what: &'static str, len: usize) -> Memory {
        let mut words = vec![u128::MAX; (len + 2 * FENCE + 256).div_ceil(16)];
        let start = words.as_mut_ptr().cast::<u8>();
        let skip =
            FENCE + (start as usize + FENCE).next_multiple_of(256) - (start as usize + FENCE);
        Memory { what, bytes: start.wrapping_add(skip), words, len }
    }
}

impl DeviceMemory for Memory {
    fn address(&self) -> u64 {
        self.bytes as u64
    }

    unsafe fn copy_in(&self, at: usize, bytes: &[u8]) -> Result<(), GpuError> {
        assert!(at <= self.len && bytes.len() <= self.len - at, "a copy into {}", self.what);
        // SAFETY: inside, as was just checked.
        unsafe { self.bytes.add(at).copy_from(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    unsafe fn copy_out(&self, at: usize, bytes: &mut [u8]) -> Result<(), GpuError> {
        assert!(at <= self.len && bytes.len() <= self.len - at, "a copy out of {}", self.what);
        // SAFETY: as above.
        unsafe { self.bytes.add(at).copy_to(bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn zero(&self, at: usize, len: usize) -> Result<(), GpuError> {
        assert!(at <= self.len && len <= self.len - at, "zeros in {}", self.what);
        // SAFETY: as above.
        unsafe { self.bytes.add(at).write_bytes(0, len) };
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let all: &[u8] = bytemuck::cast_slice(&self.words);
        let start = self.bytes as usize - all.as_ptr() as usize;
        let mut fences = all[..start].iter().chain(&all[start + self.len..]);
        let whole = fences.all(|byte| *byte == 0xff);
        assert!(whole || std::thread::panicking(), "a write beyond {}", self.what);
    }
}

struct Pinned {
    words: Vec<u64>,
    len: usize,
}

impl Deref for Pinned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.len]
    }
}

impl DerefMut for Pinned {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.words)[..self.len]
    }
}

impl HostMemory for Pinned {}
