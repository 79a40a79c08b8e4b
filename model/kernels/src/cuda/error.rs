//! What can go wrong with a GPU, and what follows from it.

use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;
use thiserror::Error;

/// The oldest CUDA version that a driver has to support: the first with tensor maps.
pub(super) const OLDEST: (i32, i32) = (12, 0);
/// The compute capability that kernels are built for.
pub(super) const CAPABILITY: (i32, i32) = (9, 0);

/// Why a GPU cannot be used, or cannot be used any more.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum GpuError {
    #[error(
        "no CUDA driver: libcuda.so.1 is not on this machine; install NVIDIA's driver, or use the CPU"
    )]
    NoDriver,
    #[error(
        "the CUDA driver supports CUDA {}.{} at most, {}.{} or newer is needed",
        found.0, found.1, OLDEST.0, OLDEST.1
    )]
    DriverTooOld { found: (i32, i32) },
    #[error("there is no cuda:{ordinal}: the driver has {count} device(s)")]
    NoDevice { ordinal: usize, count: usize },
    #[error(
        "cuda:{ordinal} ({name}) has compute capability {}.{}; kernels are built for {}.{} (H100, H200, H800)",
        found.0, found.1, CAPABILITY.0, CAPABILITY.1
    )]
    Architecture { ordinal: usize, name: String, found: (i32, i32) },
    /// A refusal: what there was is unchanged.
    #[error(
        "{what} needs {need} bytes of the memory of cuda:{ordinal}, which has {free} of {total} free"
    )]
    OutOfMemory { ordinal: usize, what: &'static str, need: usize, free: usize, total: usize },
    /// A refusal, of the host's memory.
    #[error("{what} needs {need} bytes of pinned host memory, which the system does not give")]
    Pinned { what: &'static str, need: usize },
    /// A launch that would leave its memory, and was not made.
    #[error("{kernel} needs {need} bytes of {what}, which has {have}")]
    Shape { kernel: &'static str, what: &'static str, need: usize, have: usize },
    /// Nothing works on the device any more in this process.
    #[error("cuda:{ordinal} was lost during {doing}: {code}")]
    Lost { ordinal: usize, doing: &'static str, code: String },
    #[error("cuda:{ordinal} failed at {doing}: {code}")]
    Failed { ordinal: usize, doing: &'static str, code: String },
}

impl GpuError {
    /// For tests of what follows when a device is lost, where there is none to lose.
    pub fn lost_as_told() -> GpuError {
        GpuError::Lost { ordinal: 0, doing: "computing", code: "as told".to_owned() }
    }

    /// What a call of the driver said.
    pub(super) fn new(ordinal: usize, doing: &'static str, error: DriverError) -> GpuError {
        let code = match error.error_name() {
            Ok(name) => name.to_string_lossy().into_owned(),
            Err(_) => format!("CUDA error {}", error.0 as u32),
        };
        match lost(error.0) {
            true => GpuError::Lost { ordinal, doing, code },
            false => GpuError::Failed { ordinal, doing, code },
        }
    }

    /// Whether the process has to give the device up.
    pub fn is_lost(&self) -> bool {
        matches!(self, GpuError::Lost { .. })
    }

    /// Whether it is a matter of memory only.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, GpuError::OutOfMemory { .. } | GpuError::Pinned { .. })
    }
}

/// Whether the context is unusable after `code`: what the driver's documentation calls an error that leaves the process
/// in an inconsistent state, or a device that is gone.
fn lost(code: CUresult) -> bool {
    use CUresult::*;
    matches!(
        code,
        CUDA_ERROR_DEINITIALIZED
            | CUDA_ERROR_DEVICE_UNAVAILABLE
            | CUDA_ERROR_ECC_UNCORRECTABLE
            | CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUDA_ERROR_ILLEGAL_ADDRESS
            | CUDA_ERROR_LAUNCH_TIMEOUT
            | CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUDA_ERROR_ASSERT
            | CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUDA_ERROR_MISALIGNED_ADDRESS
            | CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUDA_ERROR_INVALID_PC
            | CUDA_ERROR_LAUNCH_FAILED
            | CUDA_ERROR_SYSTEM_NOT_READY
            | CUDA_ERROR_UNKNOWN
    )
}

/// Whether a driver and a device will do, from what they say of themselves.
pub(super) fn fit(
    driver: i32,
    ordinal: usize,
    count: usize,
    device: impl FnOnce() -> Result<(String, (i32, i32)), GpuError>,
) -> Result<(), GpuError> {
    let found = (driver / 1000, driver % 1000 / 10);
    if found < OLDEST {
        return Err(GpuError::DriverTooOld { found });
    }
    if ordinal >= count {
        return Err(GpuError::NoDevice { ordinal, count });
    }
    let (name, found) = device()?;
    match found == CAPABILITY {
        true => Ok(()),
        false => Err(GpuError::Architecture { ordinal, name, found }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str, capability: (i32, i32)) -> Result<(String, (i32, i32)), GpuError> {
        Ok((name.to_owned(), capability))
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let h800 = || device("NVIDIA H800", (9, 0));
        assert_eq!(fit(12000, 0, 1, h800), Ok(()));
        assert_eq!(fit(13020, 1, 2, h800), Ok(()));
        let old = fit(11080, 0, 1, || unreachable!("the device is not asked"));
        let said = old.map_err(|error| error.to_string());
        let expected = "the CUDA driver supports CUDA 11.8 at most, 12.0 or newer is needed";
        assert_eq!(said, Err(expected.to_owned()));
        let none = fit(12040, 3, 2, || unreachable!("there is none")).map_err(|e| e.to_string());
        assert_eq!(none, Err("there is no cuda:3: the driver has 2 device(s)".to_owned()));
        for capability in [(8, 0), (8, 9), (10, 0), (12, 0)] {
            let other = fit(12040, 0, 1, || device("Other", capability));
            let expected =
                GpuError::Architecture { ordinal: 0, name: "Other".to_owned(), found: capability };
            assert_eq!(other, Err(expected));
        }
    }

    #[test]
    fn a_device_is_lost_by_sticky_errors_only() {
        let of = |code| lost(code);
        for code in [
            CUresult::CUDA_ERROR_ILLEGAL_ADDRESS,
            CUresult::CUDA_ERROR_LAUNCH_FAILED,
            CUresult::CUDA_ERROR_ECC_UNCORRECTABLE,
            CUresult::CUDA_ERROR_UNKNOWN,
        ] {
            assert!(of(code), "{code:?}");
        }
        for code in [
            CUresult::CUDA_ERROR_OUT_OF_MEMORY,
            CUresult::CUDA_ERROR_INVALID_VALUE,
            CUresult::CUDA_ERROR_NOT_READY,
            CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,
        ] {
            assert!(!of(code), "{code:?}");
        }
    }
}
