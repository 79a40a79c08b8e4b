//! What the gateway knows of the model without its weights: vocabulary size,
//! context length, ending ids and sampling defaults, from `config.json` and
//! `generation_config.json`. Refuses files and fields that are missing, of
//! another type or absurd, naming both.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::LoadError;

/// Configuration files are small; DeepSeek-V3's largest has 0.2 MB.
const MAX_JSON_BYTES: u64 = 16 << 20;
const MAX_VOCAB: u64 = 1 << 24;
const MAX_CONTEXT: u64 = 1 << 26;

/// The model as the gateway sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// Ids are below this.
    pub vocab_size: u32,
    /// Prompt and completion together, in tokens.
    pub context: u32,
    /// Ids that end a sequence unless `ignore_eos` is asked for.
    pub eos_ids: Vec<u32>,
    pub defaults: SamplingDefaults,
}

/// Sampling settings of `generation_config.json`, used where a request is silent.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SamplingDefaults {
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    /// 0 means all tokens.
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub max_new_tokens: Option<u32>,
}

impl Profile {
    /// Reads `dir`. `generation_config.json` may be absent.
    ///
    /// # Errors
    /// [`LoadError`] naming the file and the field.
    pub fn load(dir: &Path) -> Result<Self, LoadError> {
        let config = Document::open(dir.join("config.json"))?;
        let vocab_size = config.positive("vocab_size", MAX_VOCAB)?;
        let context = config.positive("max_position_embeddings", MAX_CONTEXT)?;
        let generation = match dir.join("generation_config.json") {
            path if path.exists() => Some(Document::open(path)?),
            _ => None,
        };
        let mut eos_ids = match &generation {
            Some(document) => document.ids("eos_token_id", vocab_size)?,
            None => Vec::new(),
        };
        if eos_ids.is_empty() {
            eos_ids = config.ids("eos_token_id", vocab_size)?;
        }
        let defaults = match &generation {
            Some(document) => SamplingDefaults::read(document)?,
            None => SamplingDefaults::default(),
        };
        Ok(Self { vocab_size, context, eos_ids, defaults })
    }
}

impl SamplingDefaults {
    fn read(document: &Document) -> Result<Self, LoadError> {
        let top_k = document.number("top_k", -1.0, f64::from(u32::MAX))?;
        Ok(Self {
            temperature: document.number("temperature", 0.0, 100.0)?.map(|v| v as f32),
            top_p: document.number("top_p", 1e-6, 1.0)?.map(|v| v as f32),
            // Older files write -1 for "all".
            top_k: top_k.map(|v| v.max(0.0) as u32),
            min_p: document.number("min_p", 0.0, 1.0)?.map(|v| v as f32),
            repetition_penalty: document
                .number("repetition_penalty", 1e-3, 100.0)?
                .map(|v| v as f32),
            max_new_tokens: document
                .number("max_new_tokens", 1.0, f64::from(u32::MAX))?
                .map(|v| v as u32),
        })
    }
}

/// A JSON object with the path it came from, for messages.
pub(crate) struct Document {
    pub path: PathBuf,
    root: Value,
}

impl Document {
    pub fn open(path: PathBuf) -> Result<Self, LoadError> {
        let bytes = read_limited(&path, MAX_JSON_BYTES)?;
        let root = serde_json::from_slice(&bytes)
            .map_err(|source| LoadError::Json { path: path.clone(), source })?;
        Ok(Self { path, root })
    }

    /// The field, if it is there and not null.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.root.get(field).filter(|value| !value.is_null())
    }

    pub fn refuse(&self, field: &'static str, problem: impl Into<String>) -> LoadError {
        LoadError::Field { path: self.path.clone(), field, problem: problem.into() }
    }

    fn positive(&self, field: &'static str, most: u64) -> Result<u32, LoadError> {
        let value = self.get(field).ok_or_else(|| self.refuse(field, "is missing"))?;
        value
            .as_u64()
            .filter(|v| (1..=most).contains(v))
            .and_then(|v| u32::try_from(v).ok())
            .ok_or_else(|| self.refuse(field, format!("must be an integer from 1 to {most}")))
    }

    fn number(&self, field: &'static str, least: f64, most: f64) -> Result<Option<f64>, LoadError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value
            .as_f64()
            .filter(|v| (least..=most).contains(v))
            .map(Some)
            .ok_or_else(|| self.refuse(field, format!("must be a number from {least} to {most}")))
    }

    /// One id or a list of ids, each below `vocab_size`.
    fn ids(&self, field: &'static str, vocab_size: u32) -> Result<Vec<u32>, LoadError> {
        let Some(value) = self.get(field) else { return Ok(Vec::new()) };
        let one = std::slice::from_ref(value);
        value
            .as_array()
            .map_or(one, Vec::as_slice)
            .iter()
            .map(|id| {
                id.as_u64()
                    .and_then(|id| u32::try_from(id).ok())
                    .filter(|&id| id < vocab_size)
                    .ok_or_else(|| {
                        self.refuse(field, format!("must hold ids below vocab_size {vocab_size}"))
                    })
            })
            .collect()
    }
}

/// Reads a file after checking its size against `limit` bytes.
pub(crate) fn read_limited(path: &Path, limit: u64) -> Result<Vec<u8>, LoadError> {
    let failed = |source| LoadError::Read { path: path.to_owned(), source };
    let bytes = std::fs::metadata(path).map_err(failed)?.len();
    if bytes > limit {
        return Err(LoadError::TooLarge { path: path.to_owned(), bytes, limit });
    }
    std::fs::read(path).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(config: &str, generation: Option<&str>) -> Result<Profile, String> {
        let dir = crate::tests::scratch();
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        if let Some(text) = generation {
            std::fs::write(dir.path().join("generation_config.json"), text).unwrap();
        }
        Profile::load(dir.path()).map_err(|e| e.to_string())
    }

    const SOUND: &str = r#"{"vocab_size": 320, "max_position_embeddings": 64, "eos_token_id": 1}"#;

    #[test]
    fn generation_config_wins_over_config() {
        let profile = load(
            SOUND,
            Some(r#"{"eos_token_id": [5, 7], "temperature": 0.6, "top_k": -1, "do_sample": true}"#),
        )
        .unwrap();
        assert_eq!(profile.eos_ids, [5, 7]);
        assert_eq!(profile.defaults.temperature, Some(0.6));
        assert_eq!(profile.defaults.top_k, Some(0));
        assert_eq!(load(SOUND, None).unwrap().eos_ids, [1]);
    }

    #[test]
    fn bad_fields_are_named_with_their_file() {
        for (config, generation, file, field) in [
            ("{}", None, "config.json", "`vocab_size` is missing"),
            (r#"{"vocab_size": -4}"#, None, "config.json", "`vocab_size` must be"),
            (r#"{"vocab_size": 1e30}"#, None, "config.json", "`vocab_size` must be"),
            (r#"{"vocab_size": 8}"#, None, "config.json", "`max_position_embeddings`"),
            ("[", None, "config.json", "not valid JSON"),
            (SOUND, Some(r#"{"eos_token_id": 320}"#), "generation_config.json", "`eos_token_id`"),
            (SOUND, Some(r#"{"temperature": "x"}"#), "generation_config.json", "`temperature`"),
        ] {
            let error = load(config, generation).unwrap_err();
            assert!(error.contains(file) && error.contains(field), "{error}");
        }
    }
}
