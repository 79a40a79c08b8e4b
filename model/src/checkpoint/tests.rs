//! Checkpoints that are whole, in every layout, and what is refused of those that are not.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kernels::{Compute, Isa};
use serde_json::json;

use super::Checkpoint;
use crate::error::LoadError;
use crate::expert::Expert;
use crate::numerics::Numerics;
use crate::synthetic::{Recipe, Storage, TempDir};
use crate::trunk::Trunk;

/// A checkpoint that a test spoils.
struct Dir(TempDir);

impl Dir {
    fn new() -> Dir {
        Dir(TempDir::new().unwrap())
    }

    fn with(recipe: &Recipe) -> Dir {
        Dir(TempDir::with(recipe).unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn weights(&self) -> PathBuf {
        self.path().join("model.safetensors")
    }

    /// Replaces the weights by a file with this header and that many bytes of data.
    fn header(&self, header: &str, data: usize) {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        fs::write(self.weights(), bytes).unwrap();
    }

    /// The weights with some text of their header replaced by text of the same length.
    fn patch(&self, from: &str, to: &str) {
        assert_eq!(from.len(), to.len());
        let mut bytes = fs::read(self.weights()).unwrap();
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        fs::write(self.weights(), bytes).unwrap();
    }
}

/// Opens and loads everything.
fn load(dir: &Path) -> Result<Arc<Checkpoint>, LoadError> {
    let checkpoint = Checkpoint::open(dir)?;
    checkpoint.check_trunk()?;
    for layer in checkpoint.config().moe_layers() {
        checkpoint.check_experts(layer, 0..checkpoint.config().experts)?;
    }
    Ok(checkpoint)
}

fn refuses(dir: &Dir, parts: &[&str]) {
    let message = match load(dir.path()) {
        Ok(_) => panic!("accepted, expected {parts:?}"),
        Err(error) => error.to_string(),
    };
    let dir = dir.path().display().to_string();
    assert!(message.contains(&dir), "names no file: {message}");
    assert!(parts.iter().all(|part| message.contains(part)), "{parts:?}: {message}");
}

#[test]
fn opens_single_files_shards_and_fused_experts() {
    let single = load(Dir::with(&Recipe::small()).path()).unwrap();
    let sharded = load(Dir::with(&Recipe { shards: 3, ..Recipe::small() }).path()).unwrap();
    let fused = load(Dir::with(&Recipe { fused: true, ..Recipe::small() }).path()).unwrap();
    let expert = (3 * 20 * 48) * 2;
    for checkpoint in [&single, &sharded, &fused] {
        assert_eq!(checkpoint.expert_bytes(1).unwrap(), expert);
    }
    let view = sharded.tensor("model.embed_tokens.weight", &[97, 48]).unwrap();
    let same = single.tensor("model.embed_tokens.weight", &[97, 48]).unwrap();
    assert_eq!(view.bytes, same.bytes);
}

#[test]
fn digests_tell_checkpoints_of_different_make_apart() {
    let digest = |recipe: &Recipe| load(Dir::with(recipe).path()).unwrap().digest();
    let base = digest(&Recipe::small());
    assert_eq!(base, digest(&Recipe::small()));
    assert_ne!(base, digest(&Recipe::small().with(json!({"rope_theta": 5000.0}))));
    assert_ne!(base, digest(&Recipe { storage: Storage::F32, ..Recipe::small() }));
}

#[test]
fn missing_files_are_named() {
    let dir = Dir::new();
    refuses(&dir, &["config.json"]);
    let dir = Dir::with(&Recipe::small());
    fs::remove_file(dir.weights()).unwrap();
    refuses(&dir, &["neither model.safetensors nor model.safetensors.index.json"]);
    fs::write(dir.path().join("pytorch_model.bin"), b"\x80").unwrap();
    refuses(&dir, &["pytorch_model.bin", "pickled weights are not read"]);
}

#[test]
fn truncated_and_padded_files_are_refused() {
    let dir = Dir::with(&Recipe::small());
    let bytes = fs::read(dir.weights()).unwrap();
    for (len, problem) in [
        (0, "truncated"),
        (7, "truncated"),
        (8, "truncated: a header of"),
        (100, "truncated: a header of"),
        (bytes.len() - 1, "truncated: its data ends at byte"),
    ] {
        fs::write(dir.weights(), &bytes[..len]).unwrap();
        refuses(&dir, &["model.safetensors", problem]);
    }
    fs::write(dir.weights(), [bytes.as_slice(), b"x"].concat()).unwrap();
    refuses(&dir, &["model.safetensors", "1 bytes after the last tensor"]);
}

#[test]
fn malformed_headers_are_refused() {
    let dir = Dir::with(&Recipe::small());
    fs::write(dir.weights(), [0xff; 64]).unwrap();
    refuses(&dir, &["model.safetensors", "header is too long"]);
    fs::write(dir.weights(), b"PK\x03\x04\0\0\0\0 a zip file").unwrap();
    refuses(&dir, &["model.safetensors", "header is too long"]);
    let item = |shape: &str, offsets: &str| {
        format!(r#"{{"x":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    for (header, data, parts) in [
        ("{", 0, &["malformed safetensors header"][..]),
        ("[]", 0, &["malformed", "an object of tensors"]),
        (r#"{"x":1}"#, 0, &["malformed", "`x`"]),
        (r#"{"x":{"dtype":"F32","shape":[1]}}"#, 4, &["`x`", "data_offsets"]),
        (&item("[-1]", "[0,4]"), 4, &["`x`"]),
        (&item("[1]", "[0,4,8]"), 4, &["`x`"]),
        (&item("[1]", "[4,0]"), 4, &["tensor `x`", "reversed"]),
        (&item("[2]", "[0,4]"), 4, &["tensor `x`", "does not fill the 4 bytes"]),
        (&item("[4294967296,4294967296]", "[0,4]"), 4, &["tensor `x`", "does not fill"]),
        (&item("[1]", "[0,18446744073709551615]"), 4, &["tensor `x`", "truncated"]),
        (&item("[1,1,1,1,1,1,1,1,1]", "[0,4]"), 4, &["tensor `x`", "9 dimensions"]),
        (&item("[1]", "[4,8]"), 8, &["tensor `x`", "4 unclaimed bytes before it"]),
    ] {
        dir.header(header, data);
        refuses(&dir, &[&["model.safetensors"], parts].concat());
    }
    let entry = r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
    dir.header(&format!(r#"{{"x":{entry},"y":{entry}}}"#), 4);
    refuses(&dir, &["overlaps another tensor's"]);
    dir.header(&format!(r#"{{"x":{entry},"x":{entry}}}"#), 4);
    refuses(&dir, &["tensor `x`", "named twice"]);
}

#[test]
fn missing_misshapen_and_unsupported_tensors_are_named() {
    let dir = Dir::with(&Recipe::small());
    dir.patch(
        "model.layers.2.mlp.experts.7.up_proj.weight",
        "model.layers.2.mlp.experts.x.up_proj.weight",
    );
    let missing =
        ["model.safetensors", "tensor `model.layers.2.mlp.experts.7.up_proj.weight`", "missing"];
    refuses(&dir, &missing);

    // The trunk does not need it, and neither do other experts.
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let compute = Arc::new(Compute::new(Isa::detect(), 1));
    assert!(Trunk::load(&checkpoint, Numerics::F32, compute).is_ok());
    assert!(Expert::load(&checkpoint, 2, 6).is_ok());
    assert!(Expert::load(&checkpoint, 2, 7).is_err());
    for (layer, index) in [(0, 0), (3, 0), (1, 12)] {
        let message = Expert::load(&checkpoint, layer, index).err().unwrap().to_string();
        assert!(message.contains(&format!("no expert {index} in layer {layer}")), "{message}");
    }

    let dir = Dir::with(&Recipe::small());
    let other = Recipe::small().with(json!({"moe_intermediate_size": 21}));
    fs::write(dir.path().join("config.json"), other.config.to_string()).unwrap();
    refuses(&dir, &["shape [20, 48], the configuration asks for [21, 48]", "`model.layers.1.mlp"]);

    let dir = Dir::with(&Recipe::small());
    dir.patch(r#""dtype":"BF16""#, r#""dtype":"F16" "#);
    refuses(&dir, &["tensor `", "type F16 is not supported"]);
}

#[test]
fn quantised_weights_need_blocks_and_scales() {
    let block = json!({"quant_method": "fp8", "weight_block_size": [16, 16]});
    let recipe = Recipe { storage: Storage::Fp8, ..Recipe::small() }
        .with(json!({"quantization_config": block}));
    let dir = Dir::with(&recipe);
    load(dir.path()).unwrap();
    fs::write(dir.path().join("config.json"), Recipe::small().config.to_string()).unwrap();
    refuses(&dir, &["`model.layers.0.", "is F8_E4M3, but config.json has no"]);
    let dir = Dir::with(&recipe);
    dir.patch(
        "model.layers.0.self_attn.o_proj.weight_scale_inv",
        "model.layers.0.self_attn.o_proj.weight_scale_xxx",
    );
    refuses(&dir, &["`model.layers.0.self_attn.o_proj.weight_scale_inv`", "missing"]);
}

#[test]
fn indexes_are_checked() {
    let dir = Dir::with(&Recipe { shards: 2, ..Recipe::small() });
    let index = dir.path().join("model.safetensors.index.json");
    let good = fs::read_to_string(&index).unwrap();
    let file = "model-00001-of-00002.safetensors";
    for (text, parts) in [
        ("{", &["not valid JSON"][..]),
        ("{}", &["field `weight_map`", "missing"]),
        (r#"{"weight_map":{"a":1}}"#, &["field `weight_map.a`", "not a string"]),
        (r#"{"weight_map":{"a":"../a"}}"#, &["field `weight_map.a`", "not a file name"]),
        (r#"{"weight_map":{"a":"gone.safetensors"}}"#, &["gone.safetensors"]),
        (
            &good.replace(file, "model-00002-of-00002.safetensors"),
            &["model-00002", "places it here"],
        ),
    ] {
        fs::write(&index, text).unwrap();
        refuses(&dir, parts);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn nothing_but_headers_is_read() {
    // A file whose data is one big hole: only a reader that leaves it alone finishes quickly with
    // little memory.
    let dir = Dir::with(&Recipe::small());
    let size = 1u64 << 36;
    let entry = format!(r#"{{"x":{{"dtype":"U8","shape":[{size}],"data_offsets":[0,{size}]}}}}"#);
    dir.header(&entry, 0);
    let file = fs::File::options().write(true).open(dir.weights()).unwrap();
    file.set_len(8 + entry.len() as u64 + size).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.bytes() as u64, 8 + entry.len() as u64 + size);
}
