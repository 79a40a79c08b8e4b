//! A checkpoint of which some weight files are not here. Their headers, which somebody has who has
//! them all, say what is in them: so every tensor's type, shape and length is known, the digest is
//! that of the whole checkpoint, and bytes that come from elsewhere can be judged before they come.

use std::collections::HashMap;
use std::collections::hash_map;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::{
    Checkpoint, INDEX, MAX_CONFIG, MAX_SHARDS, Opened, SINGLE, Shard, digest, entry_of, header,
    is_file_name, map_shard, no_weights, read_index, read_text,
};
use crate::config::Config;
use crate::error::LoadError;
use crate::weight::Span;

/// What a weight file begins with, and what else there is to say of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// Its name in the checkpoint's directory.
    pub name: String,
    /// Bytes of the whole file.
    pub len: u64,
    /// Its first bytes: the header's length and the header.
    pub bytes: Vec<u8>,
}

impl Checkpoint {
    /// The heads of all weight files that are here, in the order of their names.
    pub fn heads(&self) -> impl Iterator<Item = Head> {
        self.shards.iter().filter_map(|shard| {
            let name = Path::new(&shard.path).file_name()?.to_string_lossy().into_owned();
            Some(Head { name, len: shard.len as u64, bytes: beginning(shard.map.as_ref()?).into() })
        })
    }

    /// Names of weight files that `dir` should have and has not; of a directory that does not even
    /// say which, what it would be called.
    ///
    /// # Errors
    /// The index is malformed, or there are weights of a kind that is not read.
    pub fn lacking(dir: impl AsRef<Path>) -> Result<Vec<String>, LoadError> {
        let dir = dir.as_ref();
        let index = dir.join(INDEX);
        if dir.join(SINGLE).exists() || !dir.join("config.json").exists() {
            // Opening it says what is wrong.
            return Ok(Vec::new());
        }
        if !index.exists() {
            return match no_weights(dir) {
                LoadError::File { file, .. } if Path::new(&file) == dir => Ok(vec![SINGLE.into()]),
                pickled => Err(pickled),
            };
        }
        let mut names = read_index(&index)?.names;
        names.retain(|name| !dir.join(name).exists());
        Ok(names)
    }

    /// Opens what is in `dir` of a checkpoint whose files have these heads. What is here has to
    /// begin as its head says and to be as long.
    pub fn open_partial(dir: impl AsRef<Path>, heads: &[Head]) -> Result<Arc<Self>, LoadError> {
        let dir = dir.as_ref();
        let config_path = dir.join("config.json");
        let text = read_text(&config_path, MAX_CONFIG)?;
        let config = Config::from_json(&text, &config_path.display().to_string())?;
        let (shards, tensors) = open_heads(dir, heads)?;
        let digest = digest(&text, &shards, &tensors);
        Ok(Arc::new(Self { dir: dir.into(), config, shards, tensors, digest }))
    }

    /// Every weight file is here.
    pub fn is_whole(&self) -> bool {
        self.shards.iter().all(|shard| shard.map.is_some())
    }

    /// The file of `span` is not here.
    pub(crate) fn is_absent(&self, span: Span) -> bool {
        self.shards[span.file as usize].map.is_none()
    }

    /// Says so.
    pub(crate) fn absent(&self, span: Span) -> LoadError {
        let path = Path::new(&self.shards[span.file as usize].path);
        LoadError::file(path, "the file is not here, and nobody was named to fetch from")
    }

    /// A part of this checkpoint on its own: the bytes of one file that is not on disk.
    pub(crate) fn part(&self, name: String, map: memmap2::Mmap) -> Arc<Self> {
        Arc::new(Self {
            dir: self.dir.clone(),
            config: self.config.clone(),
            shards: vec![Shard { path: name, len: map.len(), map: Some(map) }],
            tensors: HashMap::new(),
            digest: self.digest,
        })
    }
}

/// The header of a file whose header was parsed.
fn beginning(bytes: &[u8]) -> &[u8] {
    let length = bytes.first_chunk::<8>().map_or(0, |prefix| u64::from_le_bytes(*prefix));
    &bytes[..bytes.len().min(8 + length as usize)]
}

fn open_heads(dir: &Path, heads: &[Head]) -> Result<Opened, LoadError> {
    if heads.is_empty() || heads.len() > MAX_SHARDS {
        let problem = format!("heads of {} weight files, 1 to {MAX_SHARDS} are taken", heads.len());
        return Err(LoadError::file(dir, problem));
    }
    let index = dir.join(INDEX);
    let index = if index.exists() { Some(read_index(&index)?) } else { None };
    let mut shards = Vec::with_capacity(heads.len());
    let mut tensors = HashMap::new();
    let mut last = "";
    for Head { name, len, bytes } in heads {
        if !is_file_name(name) || name.as_str() <= last {
            let problem = format!("head of `{name}`: not a file name that comes after `{last}`");
            return Err(LoadError::file(dir, problem));
        }
        last = name;
        let path = dir.join(name);
        let (shard, items) = match path.exists() {
            true => {
                let (shard, items) = map_shard(&path)?;
                let begins = shard.map.as_deref().map(beginning);
                if (shard.len as u64, begins) != (*len, Some(bytes)) {
                    let problem = "another file than the mesh's of that name";
                    return Err(LoadError::file(&path, problem));
                }
                (shard, items)
            }
            false => {
                let Some(len) =
                    usize::try_from(*len).ok().filter(|&len| len <= isize::MAX as usize)
                else {
                    return Err(LoadError::file(&path, format!("{len} bytes are too many")));
                };
                let items = header::parse(&path, bytes, len)?;
                (Shard { path: path.display().to_string(), len, map: None }, items)
            }
        };
        for item in items {
            let placed = index.as_ref().map(|index| index.files.get(&item.name));
            let here = placed.is_none_or(|file| file.and_then(Value::as_str) == Some(name));
            let (tensor, entry) = entry_of(item, shards.len());
            match tensors.entry(tensor) {
                _ if !here => {}
                hash_map::Entry::Vacant(slot) => drop(slot.insert(entry)),
                hash_map::Entry::Occupied(slot) => {
                    return Err(LoadError::tensor(&shard.path, slot.key(), "is in two files"));
                }
            }
        }
        shards.push(shard);
    }
    Ok((shards, tensors))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::synthetic::{Recipe, TempDir};

    fn whole(shards: usize) -> (TempDir, Arc<Checkpoint>) {
        let dir = TempDir::with(&Recipe { shards, ..Recipe::small() }).unwrap();
        let opened = Checkpoint::open(dir.path()).unwrap();
        (dir, opened)
    }

    /// A directory with some of the files of `from`.
    fn some(from: &Path, names: &[&str]) -> TempDir {
        let dir = TempDir::new().unwrap();
        for name in names {
            fs::copy(from.join(name), dir.path().join(name)).unwrap();
        }
        dir
    }

    #[test]
    fn a_part_has_the_digest_of_the_whole_and_says_what_it_lacks() {
        let (dir, all) = whole(3);
        assert!(Checkpoint::lacking(dir.path()).unwrap().is_empty());
        let heads: Vec<Head> = all.heads().collect();
        let second = heads[1].name.as_str();
        for (names, lacks) in [
            (vec!["config.json"], vec![SINGLE]),
            (vec!["config.json", INDEX, second], vec![&*heads[0].name, &heads[2].name]),
        ] {
            let part = some(dir.path(), &names);
            assert_eq!(Checkpoint::lacking(part.path()).unwrap(), lacks);
            let part = Checkpoint::open_partial(part.path(), &heads).unwrap();
            assert!(!part.is_whole() && all.is_whole());
            assert_eq!((part.digest(), part.bytes()), (all.digest(), all.bytes()));
            let experts = all.config().experts;
            let here = (0..experts).filter(|&e| part.has_expert(1, e).unwrap()).count();
            assert!(here < experts);
            let refused = (0..experts).find_map(|e| {
                (!part.has_expert(1, e).unwrap()).then(|| crate::Expert::load(&part, 1, e).err())
            });
            let refused = refused.flatten().unwrap().to_string();
            assert!(refused.contains("safetensors: the file is not here"), "{refused}");
        }
        let pickled = some(dir.path(), &["config.json"]);
        fs::write(pickled.path().join("pytorch_model.bin"), b"x").unwrap();
        let refused = Checkpoint::lacking(pickled.path()).unwrap_err().to_string();
        assert!(refused.contains("pickled"), "{refused}");
    }

    #[test]
    fn heads_that_do_not_fit_are_refused_by_name() {
        let (dir, all) = whole(2);
        let heads: Vec<Head> = all.heads().collect();
        let part = some(dir.path(), &["config.json", &heads[0].name]);
        let refused = |spoil: &dyn Fn(&mut Vec<Head>)| {
            let mut heads = heads.clone();
            spoil(&mut heads);
            Checkpoint::open_partial(part.path(), &heads).err().unwrap().to_string()
        };
        for (want, spoil) in [
            (
                "heads of 0 weight files",
                &(|h: &mut Vec<Head>| h.clear()) as &dyn Fn(&mut Vec<Head>),
            ),
            ("not a file name", &|h| h[1].name = "../x".into()),
            ("comes after", &|h| h.swap(0, 1)),
            ("another file", &|h| h[0].len += 1),
            ("another file", &|h| h[0].bytes[9] ^= 1),
            ("truncated", &|h| h[1].len -= 1),
            ("truncated", &|h| h[1].len = 20),
            ("after the last tensor", &|h| h[1].len += 1),
            ("too many", &|h| h[1].len = u64::MAX),
            ("truncated", &|h| h[1].bytes.truncate(100)),
            ("is in two files", &|h| {
                h[1].bytes = h[0].bytes.clone();
                h[1].len = h[0].len;
            }),
        ] {
            let said = refused(spoil);
            assert!(said.contains(want), "{want}: {said}");
        }
    }
}
