//! The maths of DeepSeek-V3 models: from a checkpoint and tokens to logits and a sample. No
//! network, no async.
//!
//! - [`Config`], [`Checkpoint`]: a Hugging Face directory, checked and mapped;
//! - [`Trunk`], [`Step`], [`KvPool`]: embedding, attention over the paged latent cache, gate,
//!   shared experts, head;
//! - [`Expert`], [`forward_experts`]: routed experts, wherever they run;
//! - [`gpu`]: the same on a GPU, with more experts than fit there; [`Trunk::onto`] has one compute the trunk;
//! - [`rows`]: rows in other forms than the class's, and sums where the experts are;
//! - [`sample`]: logits to a token;
//! - [`Numerics`]: what activations are rounded to.
//!
//! A token's logits depend on its own sequence, the weights and the numerics class, and on nothing
//! else: not on what shares the step, the threads, the instruction set, or how the prompt was cut.

#![deny(unsafe_code)]
#[cfg(target_endian = "big")]
compile_error!("weights and wire rows are little-endian and used in place");

mod activations;
mod attention;
mod checkpoint;
mod combine;
mod config;
mod error;
mod expert;
mod ffn;
mod gate;
pub mod gpu;
mod kv;
#[doc(hidden)]
pub mod local;
mod numerics;
mod parallel;
#[doc(hidden)]
pub mod profile;
#[doc(hidden)]
pub mod reference;
mod rotary;
pub mod rows;
pub mod sample;
mod step;
#[doc(hidden)]
pub mod synthetic;
mod trunk;
mod weight;

pub use checkpoint::{Checkpoint, Dtype, Head, QuantizeError, Quantized, TensorView, blocks};
pub use config::{Config, Rope};
pub use error::{LoadError, StepError};
pub use expert::{
    Arriving, CpuExperts, Expert, ExpertGroup, ExpertScratch, Experts, forward_experts, together,
};
pub use kernels::cuda::trunk::{Driver, Hopper};
pub use kernels::cuda::{GpuError, Results, Row, Rows};
pub use kernels::{Compute, Isa, Kernels};
pub use kv::{KvError, KvPool, PageId};
pub use numerics::{Device, ExpertDevice, Numerics, UnknownNumerics, mesh_class};
pub use step::{Chunk, LogitRows, Routed, Step};
pub use trunk::{Answers, Share, Trunk};
