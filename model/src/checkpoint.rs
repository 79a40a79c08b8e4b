//! A checkpoint directory: `config.json` and safetensors, mapped and not read until used.
//!
//! Opening reads the configuration, the index and the headers, nothing else. A tensor is looked up
//! with the shape it has to have; what is missing, of another shape or of a type that is not
//! computed with is refused, naming file and tensor. Pickled weights are refused. The mapped files
//! have to stay as they are while they are used: shortening one under a running process kills it,
//! as with any mapping.

pub mod blocks;
mod fp8;
mod header;
mod partial;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::config::Config;
use crate::error::LoadError;
use crate::weight::{Span, Weight};
pub use fp8::{QuantizeError, Quantized};
pub use header::Dtype;
pub use partial::Head;

/// Longest `config.json`, in bytes.
const MAX_CONFIG: u64 = 1 << 20;
/// Longest index, in bytes (DeepSeek-V3's has 9 million).
const MAX_INDEX: u64 = 64 << 20;
/// Most shards.
const MAX_SHARDS: usize = 4096;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A mapped checkpoint.
pub struct Checkpoint {
    dir: PathBuf,
    config: Config,
    shards: Vec<Shard>,
    tensors: HashMap<String, Entry>,
    digest: [u8; 32],
}

struct Shard {
    path: String,
    /// Bytes of the file.
    len: usize,
    /// `None` when the file is not here.
    map: Option<Mmap>,
}

struct Entry {
    dtype: Dtype,
    shape: Box<[usize]>,
    span: Span,
}

/// A tensor as it is stored.
#[derive(Clone, Copy)]
pub struct TensorView<'a> {
    /// Element type.
    pub dtype: &'a Dtype,
    /// Dimensions, outermost first.
    pub shape: &'a [usize],
    /// Little-endian elements, row-major, of any alignment.
    pub bytes: &'a [u8],
}

// === impl Checkpoint ===

impl Checkpoint {
    /// Opens the checkpoint in `dir`: reads `config.json` and the safetensors headers.
    pub fn open(dir: impl AsRef<Path>) -> Result<Arc<Checkpoint>, LoadError> {
        let dir = dir.as_ref();
        let config_path = dir.join("config.json");
        let text = read_text(&config_path, MAX_CONFIG)?;
        let config = Config::from_json(&text, &config_path.display().to_string())?;

        let single = dir.join(SINGLE);
        let index = dir.join(INDEX);
        let (shards, tensors) = if single.exists() {
            open_single(&single)?
        } else if index.exists() {
            open_sharded(dir, &index)?
        } else {
            return Err(no_weights(dir));
        };
        let digest = digest(&text, &shards, &tensors);
        Ok(Arc::new(Checkpoint { dir: dir.into(), config, shards, tensors, digest }))
    }

    /// The directory it was opened from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The model's shape and settings.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// SHA-256 over the text of `config.json`, then each tensor's name, type and shape in the order
    /// of names, then the sizes of the files. It tells checkpoints of different make apart without
    /// reading the weights; it does not tell two trainings of one shape apart.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// Bytes of all weight files.
    pub fn bytes(&self) -> usize {
        self.shards.iter().map(|s| s.len).sum()
    }

    /// The tensor `name`, which has to have `shape`.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<TensorView<'_>, LoadError> {
        let entry = self.entry(name, shape)?;
        if self.is_absent(entry.span) {
            return Err(self.refuse(entry.span, name, "the file is not here"));
        }
        Ok(TensorView { dtype: &entry.dtype, shape: &entry.shape, bytes: self.span(entry.span) })
    }

    /// Whether a tensor of that name exists, of whatever shape.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    fn entry(&self, name: &str, shape: &[usize]) -> Result<&Entry, LoadError> {
        let Some(entry) = self.tensors.get(name) else {
            let file = match self.shards.as_slice() {
                [only] => only.path.clone(),
                _ => self.dir.join(INDEX).display().to_string(),
            };
            return Err(LoadError::tensor(&file, name, "missing"));
        };
        if *entry.shape != *shape {
            let problem = format!("shape {:?}, the configuration asks for {shape:?}", entry.shape);
            return Err(self.refuse(entry.span, name, problem));
        }
        Ok(entry)
    }

    fn refuse(&self, span: Span, name: &str, problem: impl Into<String>) -> LoadError {
        LoadError::tensor(&self.shards[span.file as usize].path, name, problem)
    }

    /// The mapped bytes of `span`, whose file has to be here.
    pub(crate) fn span(&self, span: Span) -> &[u8] {
        let map = self.shards[span.file as usize].map.as_deref().unwrap_or_default();
        &map[span.start..span.start + span.len]
    }

    /// Asks the operating system to start reading `span`; only a hint.
    pub(crate) fn prefetch(&self, span: Span) {
        if let Some(map) = &self.shards[span.file as usize].map {
            // A refused hint costs nothing but a slower first use.
            let _ = map.advise_range(memmap2::Advice::WillNeed, span.start, span.len);
        }
    }

    /// The vector `name` of `n` values, copied and widened to f32 (norm weights, biases).
    pub(crate) fn vector(&self, name: &str, n: usize) -> Result<Vec<f32>, LoadError> {
        let entry = self.entry(name, &[n])?;
        let bytes = self.span(entry.span);
        match entry.dtype {
            Dtype::F32 => Ok(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()),
            Dtype::Bf16 => {
                let wide = |b: &[u8; 2]| half::bf16::from_le_bytes(*b).to_f32();
                Ok(bytes.as_chunks().0.iter().map(wide).collect())
            }
            ref other => {
                let problem = format!("type {other} is not supported here, only F32 and BF16");
                Err(self.refuse(entry.span, name, problem))
            }
        }
    }

    /// The matrix `name` of shape `[n, k]`, with its scales if it is FP8.
    pub(crate) fn matrix(&self, name: &str, n: usize, k: usize) -> Result<Weight, LoadError> {
        let entry = self.entry(name, &[n, k])?;
        self.weight(name, entry, entry.span, n, k)
    }

    /// Rows `first..first + n` of matrix `index` of the stack `name`, whose shape is
    /// `[count, rows, k]` (the fused layout of a layer's experts).
    pub(crate) fn stacked(
        &self,
        name: &str,
        [count, rows, k]: [usize; 3],
        index: usize,
        first: usize,
        n: usize,
    ) -> Result<Weight, LoadError> {
        let entry = self.entry(name, &[count, rows, k])?;
        let row = match entry.dtype {
            Dtype::F32 => 4 * k,
            Dtype::Bf16 => 2 * k,
            ref other => {
                let problem = format!("type {other} is not supported here, only F32 and BF16");
                return Err(self.refuse(entry.span, name, problem));
            }
        };
        let start = entry.span.start + (index * rows + first) * row;
        self.weight(name, entry, Span { start, len: n * row, ..entry.span }, n, k)
    }

    fn weight(
        &self,
        name: &str,
        entry: &Entry,
        span: Span,
        n: usize,
        k: usize,
    ) -> Result<Weight, LoadError> {
        match entry.dtype {
            Dtype::F32 => Ok(Weight::f32(span, n, k)),
            Dtype::Bf16 => Ok(Weight::bf16(span, n, k)),
            Dtype::F8E4m3 => {
                let Some(block) = self.config.fp8_block else {
                    let problem =
                        "is F8_E4M3, but config.json has no quantization_config.weight_block_size";
                    return Err(self.refuse(span, name, problem));
                };
                let scale_name = format!("{name}_scale_inv");
                let shape = [n.div_ceil(block.0), k.div_ceil(block.1)];
                let scales = self.entry(&scale_name, &shape)?;
                if scales.dtype != Dtype::F32 {
                    let problem = format!("type {}, scales have to be F32", scales.dtype);
                    return Err(self.refuse(scales.span, &scale_name, problem));
                }
                Ok(Weight::fp8(span, scales.span, block, n, k))
            }
            ref other => {
                let problem = format!("type {other} is not supported, only F32, BF16 and F8_E4M3");
                Err(self.refuse(span, name, problem))
            }
        }
    }
}

// === opening ===

type Opened = (Vec<Shard>, HashMap<String, Entry>);

fn read_text(path: &Path, limit: u64) -> Result<String, LoadError> {
    let file = File::open(path).map_err(|e| LoadError::io(path, e))?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|e| LoadError::io(path, e))?;
    if bytes.len() as u64 > limit {
        return Err(LoadError::file(path, format!("longer than {limit} bytes")));
    }
    String::from_utf8(bytes).map_err(|_| LoadError::file(path, "not UTF-8"))
}

fn no_weights(dir: &Path) -> LoadError {
    let pickled = std::fs::read_dir(dir).into_iter().flatten().flatten().find(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name.ends_with(".bin") || name.ends_with(".pt") || name.ends_with(".pth")
    });
    match pickled {
        Some(entry) => LoadError::file(
            &entry.path(),
            "pickled weights are not read, as they can run code; convert them to safetensors",
        ),
        None => LoadError::file(dir, format!("neither {SINGLE} nor {INDEX} is there")),
    }
}

/// Maps one file and parses its header.
#[allow(unsafe_code)]
fn map_shard(path: &Path) -> Result<(Shard, Vec<header::Item>), LoadError> {
    let file = File::open(path).map_err(|e| LoadError::io(path, e))?;
    let meta = file.metadata().map_err(|e| LoadError::io(path, e))?;
    if !meta.is_file() {
        return Err(LoadError::file(path, "not a regular file"));
    }
    // SAFETY: the mapping is private and read-only. That nobody changes the file meanwhile is asked
    // for in this module's documentation, as with every mapped checkpoint; bytes are read as plain
    // numbers, so a change of content cannot break an invariant of a type.
    let map = unsafe { Mmap::map(&file) }.map_err(|e| LoadError::io(path, e))?;
    // Large pages, where the file system can: weights are read faster than small pages are looked up.
    // A hint; refused, it costs nothing.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    let items = header::parse(path, &map, map.len())?;
    Ok((Shard { path: path.display().to_string(), len: map.len(), map: Some(map) }, items))
}

fn entry_of(item: header::Item, file: usize) -> (String, Entry) {
    let span = Span { file: file as u32, start: item.start, len: item.len };
    (item.name, Entry { dtype: item.dtype, shape: item.shape, span })
}

fn open_single(path: &Path) -> Result<Opened, LoadError> {
    let (shard, items) = map_shard(path)?;
    let tensors = items.into_iter().map(|item| entry_of(item, 0)).collect();
    Ok((vec![shard], tensors))
}

/// Which file each tensor is in, as the index says, and all files, ascending.
struct Index {
    files: serde_json::Map<String, Value>,
    names: Vec<String>,
}

/// Only files of the checkpoint's directory: nothing must lead anywhere else.
fn is_file_name(name: &str) -> bool {
    !(name.is_empty() || name.contains(['/', '\\', '\0']) || name.starts_with('.'))
}

fn read_index(index: &Path) -> Result<Index, LoadError> {
    let text = read_text(index, MAX_INDEX)?;
    let value: Value = serde_json::from_str(&text)
        .map_err(|e| LoadError::file(index, format!("not valid JSON: {e}")))?;
    let index_name = index.display().to_string();
    let Value::Object(mut value) = value else {
        return Err(LoadError::file(index, "not a JSON object"));
    };
    let Some(Value::Object(files)) = value.remove("weight_map") else {
        return Err(LoadError::field(&index_name, "weight_map", "missing or not an object"));
    };
    let mut names: Vec<&str> = Vec::new();
    for (tensor, file) in &files {
        let field = || format!("weight_map.{tensor}");
        let Some(file) = file.as_str() else {
            return Err(LoadError::field(&index_name, &field(), "not a string"));
        };
        if !is_file_name(file) {
            let problem = format!("`{file}` is not a file name");
            return Err(LoadError::field(&index_name, &field(), problem));
        }
        names.push(file);
    }
    names.sort_unstable();
    names.dedup();
    if names.len() > MAX_SHARDS {
        let problem = format!("names {} files, at most {MAX_SHARDS}", names.len());
        return Err(LoadError::field(&index_name, "weight_map", problem));
    }
    let names = names.into_iter().map(str::to_owned).collect();
    Ok(Index { files, names })
}

fn open_sharded(dir: &Path, index: &Path) -> Result<Opened, LoadError> {
    let Index { files: weight_map, names } = read_index(index)?;
    let mut shards = Vec::with_capacity(names.len());
    let mut tensors = HashMap::with_capacity(weight_map.len());
    for name in &names {
        let (shard, items) = map_shard(&dir.join(name))?;
        for item in items {
            // The index decides: a tensor that it places in another file is not taken from this
            // one.
            if weight_map.get(&item.name).and_then(Value::as_str) == Some(name.as_str()) {
                let (tensor, entry) = entry_of(item, shards.len());
                tensors.insert(tensor, entry);
            }
        }
        shards.push(shard);
    }
    if let Some((tensor, file)) = weight_map.iter().find(|(t, _)| !tensors.contains_key(*t)) {
        let path = dir.join(file.as_str().unwrap_or_default()).display().to_string();
        return Err(LoadError::tensor(&path, tensor, format!("missing, {INDEX} places it here")));
    }
    Ok((shards, tensors))
}

fn digest(config: &str, shards: &[Shard], tensors: &HashMap<String, Entry>) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update((config.len() as u64).to_le_bytes());
    hash.update(config);
    let mut names: Vec<&String> = tensors.keys().collect();
    names.sort_unstable();
    for name in names {
        let entry = &tensors[name];
        hash.update(format!("{name}\0{}\0{:?}\n", entry.dtype, entry.shape));
    }
    for shard in shards {
        hash.update((shard.len as u64).to_le_bytes());
    }
    hash.finalize().into()
}
