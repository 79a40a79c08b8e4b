//! The only place that parses configuration. A value comes, in rising order of
//! precedence, from a default, a TOML file, an environment variable
//! `MOEMESH_<ROLE>_<KEY>`, and `--set key=value` or a flag; what comes out are the
//! plain typed `Config`s of the role crates. Rooms:
//!
//! - [`given`]: values as they were written, and where
//! - [`setting`]: how a value of each type is read and shown
//! - [`reader`]: one pass over a section's keys; unknown keys are refused
//! - [`roles`]: the keys of gateway, router and expert node
//! - [`tls`]: the keys of a process's identity
//! - [`etcd`]: the keys of where members are kept
//! - [`local`]: the keys of `moemesh up`

pub mod etcd;
pub mod given;
pub mod local;
pub mod reader;
pub mod roles;
pub mod setting;
#[cfg(test)]
mod tests;
pub mod tls;

use std::path::PathBuf;

use crate::config::given::Origin;

/// A configuration that cannot be used. The process exits with code 64.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}:{line}: {problem}")]
    Syntax { path: PathBuf, line: usize, problem: String },
    #[error("{origin}: key `{key}`: {problem}")]
    Value { origin: Origin, key: String, problem: String },
    #[error("{origin}: unknown key `{key}`, expected one of {known}")]
    Unknown { origin: Origin, key: String, known: String },
    #[error("{origin}: key `{key}` is chosen by `moemesh up`")]
    Reserved { origin: Origin, key: String },
    #[error("key `{key}` is missing: set it in the file, as {variable}, or with --set {key}=…")]
    Missing { key: &'static str, variable: String },
    #[error("--set `{0}`: expected key=value")]
    Set(String),
}
