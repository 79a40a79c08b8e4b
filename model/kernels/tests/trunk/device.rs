//! The stand-in as tests of single kernels see it: memory, arguments, launches.

use std::ffi::c_void;

use bytemuck::{AnyBitPattern, NoUninit};
use half::bf16;
use kernels::cuda::trunk::{Attend, Routing};

pub use crate::common::{Random, widened};
pub use crate::driver::library;
pub use kernels::cuda::reference::distance;

/// Bytes before and after that nothing may write to, in words of 16.
const FENCE: usize = 64;

/// "Device" memory, aligned to 16 bytes. What was not put there is all ones: NaN in every float format.
pub struct Memory {
    words: Vec<u128>,
    len: usize,
}

impl Memory {
    pub fn poisoned<T>(count: usize) -> Memory {
        let len = count * size_of::<T>();
        Memory { words: vec![u128::MAX; len.div_ceil(16) + 2 * FENCE], len }
    }

    pub fn of<T: NoUninit>(values: &[T]) -> Memory {
        let mut memory = Memory::poisoned::<T>(values.len());
        memory.bytes().copy_from_slice(bytemuck::cast_slice(values));
        memory
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.words[FENCE..])[..self.len]
    }

    /// What is there now; panics if something was written around it.
    pub fn read<T: AnyBitPattern>(&self) -> Vec<T> {
        let all: &[u8] = bytemuck::cast_slice(&self.words);
        let (before, rest) = all.split_at(16 * FENCE);
        let (mine, after) = rest.split_at(self.len);
        assert!(before.iter().chain(after).all(|byte| *byte == 0xff), "a write beyond the memory");
        mine.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
    }

    pub fn address(&self) -> u64 {
        self.words[FENCE..].as_ptr() as u64
    }

    /// As an argument.
    pub fn arg(&self) -> Arg {
        Arg(vec![self.address()])
    }
}

/// A kernel's argument.
pub struct Arg(pub Vec<u64>);

impl From<usize> for Arg {
    fn from(value: usize) -> Arg {
        Arg(vec![value as u64])
    }
}

impl From<Attend> for Arg {
    fn from(value: Attend) -> Arg {
        // SAFETY: plain numbers without padding.
        Arg(unsafe { std::mem::transmute::<Attend, [u64; 13]>(value) }.to_vec())
    }
}

impl From<Routing> for Arg {
    fn from(value: Routing) -> Arg {
        // SAFETY: plain numbers without padding; words are copied.
        Arg(unsafe { std::mem::transmute_copy::<Routing, [u64; 3]>(&value) }.to_vec())
    }
}

impl From<f32> for Arg {
    fn from(value: f32) -> Arg {
        Arg(vec![u64::from(value.to_bits())])
    }
}

/// No memory.
pub const NULL: usize = 0;

/// Runs `kernel` on a grid of `blocks`. Threads take turns in the order that `seed` gives.
pub fn launch(kernel: &str, blocks: (usize, usize), threads: u32, seed: u64, args: &[Arg]) {
    let mut args: Vec<*mut c_void> =
        args.iter().map(|arg| arg.0.as_ptr().cast_mut().cast()).collect();
    // SAFETY: arguments outlive the run, and tests give each kernel those that it takes.
    unsafe {
        crate::driver::run(kernel, (blocks.0 as u32, blocks.1 as u32), threads, seed, &mut args)
    };
}

impl Random {
    pub fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.unit()).collect()
    }

    pub fn halves(&mut self, count: usize) -> Vec<bf16> {
        (0..count).map(|_| kernels::round_bf16(self.unit())).collect()
    }
}
