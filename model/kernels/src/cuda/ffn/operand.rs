//! Activations on the device.

use crate::cuda::call;
use crate::cuda::error::GpuError;
use crate::cuda::gpu::Gpu;
use crate::cuda::layout::{BLOCK, Coding, stride};
use crate::cuda::memory::Memory;
use crate::cuda::schedule::RowTile;
use crate::cuda::tensor_map::TensorMap;

/// Activations as a product reads them: bf16 rows, or their codes and scales if weights are FP8; of what is between the
/// products both.
pub struct Operand {
    pub k: usize,
    rows: Option<Memory>,
    pub codes: Option<(Memory, Memory)>,
    /// By row tile: values (or codes) and scales.
    pub maps: [(TensorMap, TensorMap); 3],
}

impl Operand {
    /// `between` products, a product's result lies in it as well.
    pub fn new(
        gpu: &Gpu,
        (k, capacity): (usize, usize),
        coding: Coding,
        between: bool,
    ) -> Result<Operand, GpuError> {
        let allocate = |bytes| gpu.allocate("rows of activations", bytes);
        let blocks = k.div_ceil(BLOCK);
        let rows = match coding {
            Coding::Fp8 if !between => None,
            _ => Some(allocate(capacity * stride(k, Coding::Bf16))?),
        };
        let codes = match coding {
            Coding::Bf16 => None,
            Coding::Fp8 => Some((
                allocate(capacity * stride(k, Coding::Fp8))?,
                allocate(blocks * capacity * size_of::<f32>())?,
            )),
        };
        let values = codes.as_ref().map(|(codes, _)| codes).or(rows.as_ref());
        let address = values.map_or(0, Memory::address);
        let map = |tile: RowTile| {
            let values = gpu.tensor_map(&call::values(k, capacity, coding, tile, address))?;
            let Some((_, scales)) = &codes else { return Ok((values, values)) };
            let scales = gpu.tensor_map(&call::scales(k, capacity, tile, scales.address()))?;
            Ok((values, scales))
        };
        let [small, middle, large] = RowTile::ALL.map(map);
        let maps = [small?, middle?, large?];
        Ok(Operand { k, rows, codes, maps })
    }

    /// Of its bf16 rows; 0 without.
    pub fn address(&self) -> u64 {
        self.rows.as_ref().map_or(0, Memory::address)
    }

    /// All its memory.
    pub fn memories(&self) -> impl Iterator<Item = &Memory> {
        let codes = self.codes.iter().flat_map(|(codes, scales)| [codes, scales]);
        self.rows.iter().chain(codes)
    }
}
