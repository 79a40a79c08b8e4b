//! What crosses crates and processes. Every mesh here is real: processes of
//! the built binary, Unix and TCP sockets, HTTP from outside.
//!
//! Needs Rust only, but for `clients`, which `tests/run` makes ready.

mod bad_input;
mod clients;
mod command_line;
mod docs;
mod forms;
mod health;
mod identity;
mod lifecycle;
mod nodes;
mod parity;
mod placement;
mod sensitivity;
mod shared;
#[allow(dead_code, reason = "the other target needs the rest")]
mod support;
mod tidy;
mod tls;
