//! The device's slots: equal places for experts, each filled from pinned memory while others are computed with.

use super::call;
use super::error::GpuError;
use super::gpu::{Gpu, Lane};
use super::layout::Layout;
use super::memory::Memory;
use super::tensor_map::TensorMap;

/// See the module's text. Who computes with a slot sees to it that it is not filled meanwhile.
pub struct Arena {
    gpu: Gpu,
    layout: Layout,
    slots: usize,
    memory: Memory,
    /// Gate, up and down of all slots.
    maps: [TensorMap; 3],
}

impl Arena {
    /// Takes memory for `slots` experts.
    pub fn new(gpu: &Gpu, layout: Layout, slots: usize) -> Result<Arena, GpuError> {
        let slots = slots.max(1);
        let memory = gpu.allocate("slots for experts", layout.bytes.saturating_mul(slots))?;
        let map = |part| gpu.tensor_map(&call::weights(&layout, part, slots, memory.address()));
        let maps = [map(0)?, map(1)?, map(2)?];
        Ok(Arena { gpu: gpu.clone(), layout, slots, memory, maps })
    }

    /// How many slots fit into `bytes`.
    pub fn slots_in(layout: &Layout, bytes: u64) -> usize {
        usize::try_from(bytes / layout.bytes as u64).unwrap_or(usize::MAX)
    }

    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Fills `slot` with an expert that [`Layout::pack`] wrote; returns when it is there. Panics if there is no such slot or
    /// the bytes are not a slot's.
    pub fn fill(&self, slot: u32, expert: &[u8]) -> Result<(), GpuError> {
        assert!((slot as usize) < self.slots, "slot {slot} of {}", self.slots);
        assert_eq!(expert.len(), self.layout.bytes, "bytes of a slot");
        // SAFETY: borrowed until the lane has been waited for. What else reads the slot is the caller's business, and would
        // read wrong weights, nothing worse.
        unsafe { self.memory.copy_in(Lane::Copy, slot as usize * self.layout.bytes, expert)? };
        self.gpu.wait(Lane::Copy)
    }

    pub(super) fn map(&self, part: usize) -> TensorMap {
        self.maps[part]
    }

    /// Where slot 0 begins.
    pub(super) fn address(&self) -> u64 {
        self.memory.address()
    }
}
