//! NVIDIA GPUs of the Hopper generation (H100, H200, H800), through the driver that is found at run time.
//!
//! Device code is `cuda/*.cu`, compiled ahead to `cuda/sm90a/*.cubin` (`tests/cubins.rs` regenerates and compares them),
//! so that neither building nor running needs a CUDA toolkit. [`Gpu::open`] says why there is no device, where there is
//! none; nothing here is called without one.

mod error;
mod gpu;
mod memory;

pub use error::GpuError;
pub use gpu::{Gpu, Grid, Kernel, Lane, SHARED_BYTES};
pub use memory::{Memory, Pinned};
