//! The numerics class of a mesh: what activations, KV cache and wire are rounded to.
//!
//! Two can be chosen. `f32` is the reference; `bf16` rounds activations where they enter a matrix
//! product, the KV cache or the wire, and keeps f32 accumulation and residual stream. Devices whose
//! products add up in another order make a class of their own of it, such as `bf16+amx`. A class is
//! a property of the whole mesh: rows of one are refused by the other.

use std::fmt;
use std::str::FromStr;

use kernels::Isa;
use kernels::cuda::Coding;

use crate::checkpoint::Checkpoint;
use crate::error::LoadError;

/// What activations are rounded to where they enter a product, the KV cache or the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Numerics {
    /// No rounding: the class that is compared with the float32 reference.
    F32,
    /// bfloat16, round to nearest even.
    Bf16,
}

impl Numerics {
    /// Bytes of one activation on the wire and in the KV cache.
    pub const fn bytes(self) -> usize {
        match self {
            Numerics::F32 => 4,
            Numerics::Bf16 => 2,
        }
    }

    /// The class's full name, with the kind of device where that is part of it. Processes with the
    /// same one give the same bits.
    pub fn class(self, isa: Isa) -> String {
        match (self, isa.bf16_kind()) {
            (Numerics::Bf16, Some(kind)) => format!("{self}+{kind}"),
            _ => self.to_string(),
        }
    }
}

/// What a process is told to compute with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    #[default]
    Cpu,
    /// The GPU that the driver has at this place.
    Cuda(usize),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "cpu" {
            return Ok(Self::Cpu);
        }
        let ordinal = text.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse::<u16>().ok());
        let wrong = || format!("`{text}` is neither cpu nor cuda:N with a device's number");
        ordinal.map(|ordinal| Self::Cuda(ordinal.into())).ok_or_else(wrong)
    }
}

impl Device {
    /// The class of the trunk of `checkpoint` that it computes in `numerics`, where CPUs compute with `isa`. On Hopper it is
    /// named as experts are ([`ExpertDevice::class`]): `fp8+sm90` if matrices are in FP8 that are multiplied so.
    pub fn trunk_class(
        self,
        numerics: Numerics,
        isa: Isa,
        checkpoint: &Checkpoint,
    ) -> Result<String, LoadError> {
        match self {
            Device::Cpu => Ok(numerics.class(isa)),
            Device::Cuda(_) => Ok(gpu_class(checkpoint.trunk_coding()?).to_owned()),
        }
    }
}

/// What a mesh's experts are computed on. One kind for all of a mesh's nodes, as each is a class of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExpertDevice {
    #[default]
    Cpu,
    Cuda,
}

impl ExpertDevice {
    /// The class of experts of `checkpoint` in `numerics`, where CPUs compute with `isa`. On Hopper products add up in
    /// another order: `bf16+sm90`; and rows of FP8 experts are coded in FP8 as well: `fp8+sm90`.
    pub fn class(
        self,
        numerics: Numerics,
        isa: Isa,
        checkpoint: &Checkpoint,
    ) -> Result<String, LoadError> {
        if self == ExpertDevice::Cpu {
            return Ok(numerics.class(isa));
        }
        let Some(layer) = checkpoint.config().moe_layers().next() else {
            return Ok(gpu_class(Coding::Bf16).to_owned());
        };
        // Experts that a GPU does not take are refused by the node that has it.
        let coding = checkpoint.expert_shape(layer)?.map_or(Coding::Bf16, |shape| shape.coding);
        Ok(gpu_class(coding).to_owned())
    }
}

const fn gpu_class(coding: Coding) -> &'static str {
    match coding {
        Coding::Bf16 => "bf16+sm90",
        Coding::Fp8 => "fp8+sm90",
    }
}

/// A mesh's class as a whole: the trunk's, and the experts' where it is another.
pub fn mesh_class(trunk: &str, experts: &str) -> String {
    match trunk == experts {
        true => trunk.to_owned(),
        false => format!("{trunk}/{experts}"),
    }
}

impl fmt::Display for ExpertDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ExpertDevice::Cpu => "cpu",
            ExpertDevice::Cuda => "cuda",
        })
    }
}

impl FromStr for ExpertDevice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "cpu" => Ok(ExpertDevice::Cpu),
            "cuda" => Ok(ExpertDevice::Cuda),
            _ => Err(format!("`{text}` is neither cpu nor cuda")),
        }
    }
}

impl fmt::Display for Numerics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Numerics::F32 => "f32",
            Numerics::Bf16 => "bf16",
        })
    }
}

/// A numerics class that does not exist.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown numerics class `{0}`, expected f32 or bf16")]
pub struct UnknownNumerics(String);

impl FromStr for Numerics {
    type Err = UnknownNumerics;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "f32" => Ok(Numerics::F32),
            "bf16" => Ok(Numerics::Bf16),
            other => Err(UnknownNumerics(other.chars().take(40).collect())),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::synthetic::{Recipe, Storage, TempDir};

    #[test]
    fn a_device_that_adds_up_in_another_order_has_a_class_of_its_own() {
        assert_eq!(Numerics::Bf16.class(Isa::Amx), "bf16+amx");
        assert_eq!(Numerics::F32.class(Isa::Amx), "f32");
        for isa in [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16] {
            assert_eq!(Numerics::Bf16.class(isa), "bf16");
        }
    }

    #[test]
    fn a_mesh_names_its_experts_class_where_it_is_another() {
        assert_eq!(mesh_class("bf16+amx", "bf16+amx"), "bf16+amx");
        assert_eq!(mesh_class("bf16+amx", "fp8+sm90"), "bf16+amx/fp8+sm90");
        let dir = TempDir::with(&Recipe::small()).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let class =
            |device: ExpertDevice| device.class(Numerics::Bf16, Isa::Amx, &checkpoint).unwrap();
        assert_eq!(class(ExpertDevice::Cpu), "bf16+amx");
        assert_eq!(class(ExpertDevice::Cuda), "bf16+sm90");
    }

    #[test]
    fn a_gpu_is_in_fp8_where_weights_are_in_blocks_that_it_takes() {
        let class = |storage, block: &[usize]| {
            let fp8 = json!({"quantization_config": {
                "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": block,
            }});
            let dir = TempDir::with(&Recipe { storage, ..Recipe::small().with(fp8) }).unwrap();
            let checkpoint = Checkpoint::open(dir.path()).unwrap();
            let class =
                |device: Device| device.trunk_class(Numerics::Bf16, Isa::Amx, &checkpoint).unwrap();
            assert_eq!(class(Device::Cpu), "bf16+amx");
            class(Device::Cuda(0))
        };
        assert_eq!(class(Storage::Fp8, &[128, 128]), "fp8+sm90");
        assert_eq!(class(Storage::Fp8, &[32, 16]), "bf16+sm90");
        assert_eq!(class(Storage::Bf16, &[128, 128]), "bf16+sm90");
    }

    #[test]
    fn a_device_is_written_as_it_is_read() {
        for text in ["cpu", "cuda:0", "cuda:7"] {
            assert_eq!(
                text.parse::<Device>().map(|device| device.to_string()),
                Ok(text.to_owned())
            );
        }
        for text in ["", "gpu", "cuda", "cuda:", "cuda:-1", "cuda:x", "cuda:0:1"] {
            let said = text.parse::<Device>().unwrap_err();
            assert!(said.contains("neither cpu nor cuda:N"), "{said}");
        }
    }
}
