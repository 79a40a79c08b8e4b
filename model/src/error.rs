//! What can go wrong in this crate, in two small enums.
//!
//! `LoadError` is for everything read from disk: it always names the file and, where there is one,
//! the tensor or the configuration field. `StepError` is for a step that its caller composed
//! wrongly, or whose device is gone. Neither wraps a foreign error type except `std::io::Error`.

use std::path::Path;

use kernels::cuda::GpuError;

/// A checkpoint that cannot be used, and where.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The operating system refused.
    #[error("{file}: {source}")]
    Io {
        /// Path of the file.
        file: String,
        /// What it said.
        source: std::io::Error,
    },
    /// The file as a whole is malformed.
    #[error("{file}: {problem}")]
    File {
        /// Path of the file.
        file: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A field of a JSON file is missing, of the wrong type, absurd or inconsistent.
    #[error("{file}: field `{field}`: {problem}")]
    Field {
        /// Path of the file.
        file: String,
        /// Dotted path of the field.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A tensor is missing, malformed, or not of the shape or type that the configuration asks for.
    #[error("{file}: tensor `{tensor}`: {problem}")]
    Tensor {
        /// Path of the file that holds it, or should.
        file: String,
        /// Its name.
        tensor: String,
        /// What is wrong with it.
        problem: String,
    },
}

impl LoadError {
    pub(crate) fn io(file: &Path, source: std::io::Error) -> Self {
        LoadError::Io { file: file.display().to_string(), source }
    }

    pub(crate) fn file(file: &Path, problem: impl Into<String>) -> Self {
        LoadError::File { file: file.display().to_string(), problem: problem.into() }
    }

    pub(crate) fn field(file: &str, field: &str, problem: impl Into<String>) -> Self {
        LoadError::Field { file: file.into(), field: field.into(), problem: problem.into() }
    }

    pub(crate) fn tensor(file: &str, tensor: &str, problem: impl Into<String>) -> Self {
        LoadError::Tensor { file: file.into(), tensor: tensor.into(), problem: problem.into() }
    }
}

/// A step that cannot be run as composed, or at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// A chunk without tokens.
    #[error("chunk {chunk} has no tokens")]
    Empty {
        /// Index of the chunk in the step.
        chunk: usize,
    },
    /// A token id beyond the vocabulary.
    #[error("chunk {chunk}: token id {token} is not below the vocabulary size {vocab}")]
    Token {
        /// Index of the chunk in the step.
        chunk: usize,
        /// The id.
        token: u32,
        /// The vocabulary size.
        vocab: usize,
    },
    /// A position beyond the model's context.
    #[error("chunk {chunk}: position {position} is not below the context length {limit}")]
    Context {
        /// Index of the chunk in the step.
        chunk: usize,
        /// The highest position of the chunk.
        position: usize,
        /// The context length.
        limit: usize,
    },
    /// Fewer KV pages than the chunk's positions need, or a page outside the pool.
    #[error("chunk {chunk}: {pages} pages do not cover {positions} positions")]
    Pages {
        /// Index of the chunk in the step.
        chunk: usize,
        /// Pages given.
        pages: usize,
        /// Positions to be held.
        positions: usize,
    },
    /// More tokens than the device has memory for in one step.
    #[error("{rows} tokens in a step, whose memory on the device is for {most}")]
    Rows {
        /// Tokens of the step.
        rows: usize,
        /// What the step was made for.
        most: usize,
    },
    /// The device that computes cannot any more.
    #[error(transparent)]
    Gpu(#[from] GpuError),
}
