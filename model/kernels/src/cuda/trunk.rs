//! The trunk's work on a device: its kernels, each behind a safe call that checks every length before it launches.
//!
//! - [`Driver`]: what launches go to, a GPU or what stands in for one in tests;
//! - [`Buffer`], [`Host`], [`Uploader`]: its memory, and ways there and back that need no care;
//! - [`Weights`], [`Rows`]: the two sides of a product;
//! - [`Plan`], [`Tables`]: which rows a step has, checked on the host, since kernels index by them;
//! - `launch`: the calls, as methods of [`Driver`].

mod driver;
mod launch;
mod memory;
mod op;
mod plan;
mod product;
mod tables;

pub use driver::{DeviceMemory, Driver, Hopper, HostMemory};
pub use launch::{Attention, Cache, Norm, Rotary};
pub use memory::{Buffer, Host, Slice, Uploader, fetch};
pub use op::{Attend, Draw, Op, Place, REFUSED, Routing, Row, SPAN, Span};
pub use plan::{Bounds, Plan};
pub use product::{Rows, Weights};
pub use tables::{Scheduled, Tables};
