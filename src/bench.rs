//! `moemesh bench`: numbers that anybody can print again. Rooms:
//!
//! - [`checkpoint`]: a checkpoint to measure with
//! - [`dispatch`]: the round trip of a layer's rows beside a raw echo
//! - [`serve`]: a server or a mesh under load; [`report`]: what it prints
//! - [`compare`]: a mesh beside another engine
//! - [`kernels`]: products and experts beside the machine's limits
//! - [`device`]: a GPU's kernels against a plain reference, and beside the device's limits
//! - [`load`]: requests and when their answers came; [`procs`]: what processes cost
//! - [`stats`]: percentiles, medians, random numbers

pub mod checkpoint;
pub mod compare;
pub mod device;
pub mod dispatch;
pub mod kernels;
mod load;
mod procs;
mod report;
pub mod serve;
mod stats;

pub use load::Length;
