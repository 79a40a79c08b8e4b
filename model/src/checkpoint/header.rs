//! The header of one safetensors file: which tensor lies where.
//!
//! Eight bytes of length, then JSON, then the tensors. Nothing is believed before it is checked:
//! the length against a cap and the file, every tensor's bytes against its shape and type, and all
//! of them against the file, without overlap, hole or remainder. Nothing beyond the header is
//! touched.

use std::collections::HashSet;
use std::fmt;
use std::path::Path;

use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use crate::error::LoadError;

/// Longest header that is read, in bytes.
const MAX_HEADER: usize = 16 << 20;
/// Most tensors in one file.
const MAX_TENSORS: usize = 200_000;
/// Most dimensions of one tensor.
const MAX_RANK: usize = 8;

/// Element types that a tensor can be stored as. Only some are computed with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// 8-bit float, 4 exponent and 3 mantissa bits, no infinities.
    F8E4m3,
    /// Any other, by its name in the file.
    Other(String),
}

impl Dtype {
    /// Bits of one element, for the types that the format names.
    fn bits(&self) -> Option<usize> {
        match self {
            Dtype::F32 => Some(32),
            Dtype::Bf16 => Some(16),
            Dtype::F8E4m3 => Some(8),
            Dtype::Other(name) => match name.as_str() {
                "F4" => Some(4),
                "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E8M0" => Some(8),
                "F16" | "I16" | "U16" => Some(16),
                "I32" | "U32" => Some(32),
                "F64" | "I64" | "U64" | "C64" => Some(64),
                _ => None,
            },
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Dtype::F32 => "F32",
            Dtype::Bf16 => "BF16",
            Dtype::F8E4m3 => "F8_E4M3",
            Dtype::Other(name) => name,
        })
    }
}

/// One tensor of a file.
#[derive(Debug)]
pub(crate) struct Item {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Box<[usize]>,
    /// First byte, from the start of the file.
    pub start: usize,
    /// Bytes.
    pub len: usize,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RawItem {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// The JSON object in file order, without duplicates, capped.
struct RawHeader(Vec<(String, RawItem)>);

impl<'de> serde::Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Items;
        impl<'de> Visitor<'de> for Items {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut items = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    if items.len() == MAX_TENSORS {
                        return Err(A::Error::custom(format!("more than {MAX_TENSORS} tensors")));
                    }
                    let item = map
                        .next_value::<RawItem>()
                        .map_err(|e| A::Error::custom(format!("tensor `{name}`: {e}")))?;
                    items.push((name, item));
                }
                Ok(RawHeader(items))
            }
        }
        from.deserialize_map(Items)
    }
}

/// Reads the header of a file of `len` bytes that begins with `bytes`: all of it, mapped and not yet
/// touched, or the header alone.
pub(crate) fn parse(path: &Path, bytes: &[u8], len: usize) -> Result<Vec<Item>, LoadError> {
    let refuse = |problem: String| LoadError::file(path, problem);
    let Some((prefix, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(refuse(format!(
            "truncated: {} bytes, a safetensors file starts with 8 of length",
            bytes.len()
        )));
    };
    let length = u64::from_le_bytes(*prefix);
    if length > MAX_HEADER as u64 {
        return Err(refuse(format!(
            "not a safetensors file, or its header is too long: {length} bytes, at most {MAX_HEADER}"
        )));
    }
    let length = length as usize;
    let Some(header) = rest.get(..length).filter(|_| len >= 8 + length) else {
        return Err(refuse(format!("truncated: a header of {length} bytes in a file of {len}")));
    };
    let raw: RawHeader = serde_json::from_slice(header)
        .map_err(|e| refuse(format!("malformed safetensors header: {e}")))?;

    let file = path.display().to_string();
    let data = 8 + length;
    let mut items = Vec::with_capacity(raw.0.len());
    for (name, item) in raw.0 {
        let checked = check(&item, len - data);
        let (dtype, shape) = checked.map_err(|e| LoadError::tensor(&file, &name, e))?;
        let [start, end] = item.data_offsets.map(|o| o as usize);
        items.push(Item { name, dtype, shape, start: data + start, len: end - start });
    }
    check_cover(path, &items, data, len)?;
    Ok(items)
}

/// One tensor against its own shape and the size of the data.
fn check(item: &RawItem, data: usize) -> Result<(Dtype, Box<[usize]>), String> {
    if item.shape.len() > MAX_RANK {
        return Err(format!("{} dimensions, at most {MAX_RANK}", item.shape.len()));
    }
    let [start, end] = item.data_offsets;
    if start > end {
        return Err(format!("data_offsets {start} to {end} are reversed"));
    }
    if end > data as u64 {
        return Err(format!(
            "truncated: its data ends at byte {end}, the file holds {data} bytes of data"
        ));
    }
    let dtype = match item.dtype.as_str() {
        "F32" => Dtype::F32,
        "BF16" => Dtype::Bf16,
        "F8_E4M3" => Dtype::F8E4m3,
        other => Dtype::Other(other.chars().take(20).collect()),
    };
    let elements = item.shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d));
    if let Some(bits) = dtype.bits() {
        let bits = elements.and_then(|n| n.checked_mul(bits as u64));
        if bits.is_none_or(|bits| bits.div_ceil(8) != end - start) {
            return Err(format!(
                "shape {:?} of {dtype} does not fill the {} bytes of its data_offsets",
                item.shape,
                end - start
            ));
        }
    }
    let shape = item.shape.iter().map(|d| *d as usize).collect();
    Ok((dtype, shape))
}

/// All tensors together: every byte of the file belongs to exactly one, every name too.
fn check_cover(path: &Path, items: &[Item], data: usize, end: usize) -> Result<(), LoadError> {
    let file = path.display().to_string();
    let mut names = HashSet::with_capacity(items.len());
    if let Some(twice) = items.iter().find(|i| !names.insert(i.name.as_str())) {
        return Err(LoadError::tensor(&file, &twice.name, "named twice in the header"));
    }
    let mut order: Vec<&Item> = items.iter().collect();
    order.sort_unstable_by_key(|i| (i.start, i.len));
    let mut covered = data;
    for item in order {
        if item.start < covered {
            return Err(LoadError::tensor(&file, &item.name, "its data overlaps another tensor's"));
        }
        if item.start > covered {
            let hole = item.start - covered;
            return Err(LoadError::tensor(
                &file,
                &item.name,
                format!("{hole} unclaimed bytes before it"),
            ));
        }
        covered = item.start + item.len;
    }
    if covered != end {
        let problem = format!("{} bytes after the last tensor", end - covered);
        return Err(LoadError::file(path, problem));
    }
    Ok(())
}
