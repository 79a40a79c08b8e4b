//! NVIDIA GPUs of the Hopper generation (H100, H200, H800), through the driver that is found at run time.
//!
//! Device code is `cuda/*.cu`, compiled ahead to `cuda/sm90a/*.cubin` (`tests/cubins.rs` regenerates and compares them),
//! so that neither building nor running needs a CUDA toolkit. [`Gpu::open`] says why there is no device, where there is
//! none; nothing here is called without one.

mod arena;
#[doc(hidden)]
pub mod arrive;
#[doc(hidden)]
pub mod call;
mod error;
mod ffn;
mod gpu;
mod layout;
mod measure;
mod memory;
#[doc(hidden)]
pub mod reference;
pub mod schedule;
mod tensor_map;
pub mod trunk;

pub use arena::Arena;
pub use arrive::{Row, Rows};
pub use error::GpuError;
pub use ffn::{GroupedFfn, Piece, Results, Stages};
pub use gpu::{Gpu, Grid, Kernel, Lane, Mark, SHARED_BYTES};
pub use layout::{BLOCK, Coding, ExpertShape, Layout, LayoutError, Stored, stride};
pub use memory::{Memory, Pinned};
pub use tensor_map::{Element, TensorMap, Tiled};
