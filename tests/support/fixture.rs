//! The reference recorded from transformers (`tests/fixtures/README.md`).

use std::path::{Path, PathBuf};

use serde_json::Value;

pub const FIXTURES: [&str; 5] = ["plain", "noqlora", "yarn", "fp8", "tied"];

/// The bundled trained model.
pub fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/tiny")
}

/// A random checkpoint and what float32 transformers made of it.
pub struct Fixture {
    pub dir: PathBuf,
    pub prompts: Vec<Prompt>,
}

pub struct Prompt {
    pub name: String,
    pub tokens: Vec<u32>,
    pub continuation: Vec<u32>,
    pub margins: Vec<f64>,
    pub logprobs: Vec<f64>,
    /// Teacher-forced, from position 1, over prompt and continuation.
    pub sequence_f32: Vec<f64>,
    pub sequence_bf16: Vec<f64>,
}

impl Fixture {
    pub fn load(name: &str) -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
        let text = std::fs::read_to_string(dir.join("reference.json")).unwrap();
        let reference: Value = serde_json::from_str(&text).unwrap();
        let prompts = reference["prompts"].as_array().unwrap().iter().map(prompt).collect();
        Self { dir, prompts }
    }
}

impl Prompt {
    /// Prompt and continuation.
    pub fn whole(&self) -> Vec<u32> {
        [self.tokens.as_slice(), &self.continuation].concat()
    }
}

fn prompt(value: &Value) -> Prompt {
    let ids = |key: &str| -> Vec<u32> {
        value[key].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    };
    let numbers = |key: &str| -> Vec<f64> {
        value[key].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
    };
    Prompt {
        name: value["name"].as_str().unwrap().to_owned(),
        tokens: ids("prompt"),
        continuation: ids("continuation"),
        margins: numbers("continuation_margins"),
        logprobs: numbers("continuation_logprobs"),
        sequence_f32: numbers("sequence_logprobs_f32"),
        sequence_bf16: numbers("sequence_logprobs_bf16"),
    }
}
