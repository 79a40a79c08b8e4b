//! What crosses crates and processes. Every mesh here is real: processes of
//! the built binary, Unix and TCP sockets, HTTP from outside.
//!
//! Needs Rust only. What needs Python (the official OpenAI client, the OTLP
//! sink) is in `tests/clients` and run by `tests/run`.

mod bad_input;
mod command_line;
mod docs;
mod identity;
mod lifecycle;
mod nodes;
mod parity;
mod sensitivity;
mod support;
mod tidy;
