//! Tensor maps: what TMA needs to know of a tensor in device memory (CUDA driver API, cuTensorMapEncodeTiled).

use std::ffi::c_void;

use cudarc::driver::sys;

use super::error::GpuError;
use super::gpu::Gpu;

/// What a tensor's elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    U8,
    Bf16,
    F32,
}

impl Element {
    pub const fn size(self) -> u64 {
        match self {
            Element::U8 => 1,
            Element::Bf16 => 2,
            Element::F32 => 4,
        }
    }
}

/// A tensor in device memory and the box of it that one copy brings. Innermost dimension first.
#[derive(Clone, Debug)]
pub struct Tiled {
    pub element: Element,
    pub address: u64,
    pub sizes: Vec<u64>,
    /// Bytes between neighbours in each dimension but the innermost.
    pub strides: Vec<u64>,
    /// Elements of a box in each dimension.
    pub tile: Vec<u32>,
    /// Whether boxes are swizzled by 128 bytes, as wgmma reads them.
    pub swizzled: bool,
}

/// A map, as kernels take it: by value, aligned as CUtensorMap is.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct TensorMap(sys::CUtensorMap);

impl TensorMap {
    /// For what stands in for a driver.
    #[doc(hidden)]
    pub fn of_words(opaque: [u64; 16]) -> TensorMap {
        TensorMap(sys::CUtensorMap { opaque })
    }
}

impl Tiled {
    /// Why the driver would refuse it, by the rules of its documentation; `None` if it would not.
    #[doc(hidden)]
    pub fn problem(&self) -> Option<String> {
        let rank = self.sizes.len();
        if !(1..=5).contains(&rank) || self.strides.len() + 1 != rank || self.tile.len() != rank {
            return Some(format!(
                "a tensor of {rank} dimensions with {} strides",
                self.strides.len()
            ));
        }
        let inner = u64::from(self.tile[0]) * self.element.size();
        let checks = [
            (!self.address.is_multiple_of(16), "an address that is no multiple of 16"),
            (self.sizes.iter().any(|size| !(1..=1 << 32).contains(size)), "a size beyond 2^32"),
            (
                self.strides.iter().any(|bytes| !bytes.is_multiple_of(16) || *bytes >= 1 << 40),
                "a stride that is no multiple of 16 below 2^40",
            ),
            (self.tile.iter().any(|size| !(1..=256).contains(size)), "a box beyond 256"),
            (!inner.is_multiple_of(16), "a box whose rows are no multiple of 16 bytes"),
            (self.swizzled && inner > 128, "a box whose rows are longer than the swizzle"),
        ];
        checks.iter().find(|(bad, _)| *bad).map(|(_, what)| format!("{what}: {self:?}"))
    }
}

impl Gpu {
    /// Makes a tensor's map.
    pub fn tensor_map(&self, tensor: &Tiled) -> Result<TensorMap, GpuError> {
        if let Some(code) = tensor.problem() {
            let doing = "describing a tensor";
            return Err(GpuError::Failed { ordinal: self.ordinal(), doing, code });
        }
        use sys::{
            CUtensorMapDataType as Type, CUtensorMapFloatOOBfill as Fill,
            CUtensorMapInterleave as Interleave, CUtensorMapL2promotion as Promotion,
            CUtensorMapSwizzle as Swizzle,
        };
        let element = match tensor.element {
            Element::U8 => Type::CU_TENSOR_MAP_DATA_TYPE_UINT8,
            Element::Bf16 => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            Element::F32 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        };
        let swizzle = match tensor.swizzled {
            true => Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            false => Swizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
        };
        let mut map = TensorMap(sys::CUtensorMap { opaque: [0; 16] });
        let steps = [1; 5];
        // SAFETY: sizes, strides and boxes are as long as the rank says (`problem`); the map is aligned and outlives the
        // call. The address is only written down.
        let made = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map.0,
                element,
                tensor.sizes.len() as u32,
                tensor.address as *mut c_void,
                tensor.sizes.as_ptr(),
                tensor.strides.as_ptr(),
                tensor.tile.as_ptr(),
                steps.as_ptr(),
                Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                Fill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        made.result().map_err(|error| self.error("describing a tensor", error))?;
        Ok(map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_driver_would_refuse_is_said() {
        let good = || Tiled {
            element: Element::U8,
            address: 1024,
            sizes: vec![7168, 2048, 256],
            strides: vec![7168, 44_050_944],
            tile: vec![128, 64, 1],
            swizzled: true,
        };
        assert_eq!(good().problem(), None);
        let said = |tensor: Tiled| tensor.problem().unwrap_or_default();
        assert!(said(Tiled { address: 8, ..good() }).starts_with("an address"));
        assert!(said(Tiled { sizes: vec![0, 1, 1], ..good() }).starts_with("a size"));
        assert!(said(Tiled { strides: vec![7160, 16], ..good() }).starts_with("a stride"));
        assert!(said(Tiled { tile: vec![128, 257, 1], ..good() }).starts_with("a box beyond"));
        assert!(said(Tiled { tile: vec![8, 64, 1], ..good() }).contains("no multiple of 16 bytes"));
        let wide = said(Tiled { element: Element::F32, ..good() });
        assert!(wide.contains("longer than the swizzle"));
        let short = said(Tiled { strides: vec![7168], ..good() });
        assert!(short.contains("3 dimensions with 1 strides"));
    }

    #[test]
    fn a_map_is_as_long_as_the_device_thinks() {
        assert_eq!((size_of::<TensorMap>(), align_of::<TensorMap>()), (128, 64));
    }
}
