//! What is written is what the model loads, and what was there stays.

use std::path::PathBuf;

use model::{Checkpoint, Compute, Isa, Numerics, Trunk};

use super::*;
use crate::cli::{CheckpointDtype, CheckpointSize};

/// A directory that does not exist, removed when dropped.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("moemesh-bench-{}-{name}", std::process::id())))
    }

    fn make(&self, dtype: CheckpointDtype, seed: u64) -> anyhow::Result<()> {
        make(&MakeCheckpointArgs { dir: self.0.clone(), size: CheckpointSize::Xs, dtype, seed })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn the_model_loads_either_type() {
    for (name, dtype) in [("bf16", CheckpointDtype::Bf16), ("fp8", CheckpointDtype::Fp8)] {
        let place = Place::new(name);
        place.make(dtype, 1).unwrap();
        let checkpoint = Checkpoint::open(&place.0).unwrap();
        let compute = std::sync::Arc::new(Compute::new(Isa::detect(), 1));
        Trunk::load(&checkpoint, Numerics::Bf16, compute).unwrap();
        let config = checkpoint.config();
        for layer in config.moe_layers() {
            for expert in 0..config.experts {
                model::Expert::load(&checkpoint, layer, expert).unwrap();
            }
        }
        assert_eq!(config.fp8_block.is_some(), dtype == CheckpointDtype::Fp8);
    }
}

#[test]
fn the_same_seed_gives_the_same_file_and_another_does_not() {
    let places = ["a", "b", "c"].map(Place::new);
    for (place, seed) in places.iter().zip([3, 3, 4]) {
        place.make(CheckpointDtype::Bf16, seed).unwrap();
    }
    let [a, b, c] = places.each_ref().map(|place| fs::read(place.0.join(WEIGHTS)).unwrap());
    assert!(a == b && a != c && a.len() == c.len());
}

#[test]
fn fp8_holds_the_bf16_weights() {
    let (plain, quantised) = (Place::new("plain"), Place::new("quantised"));
    plain.make(CheckpointDtype::Bf16, 5).unwrap();
    quantised.make(CheckpointDtype::Fp8, 5).unwrap();
    let (plain, quantised) =
        (Checkpoint::open(&plain.0).unwrap(), Checkpoint::open(&quantised.0).unwrap());
    // [256, 128]: two blocks of rows
    let name = "model.layers.0.mlp.gate_proj.weight";
    let want = plain.tensor(name, &[256, 128]).unwrap().bytes.as_chunks::<2>().0;
    let codes = quantised.tensor(name, &[256, 128]).unwrap().bytes;
    let scales = quantised.tensor(&format!("{name}_scale_inv"), &[2, 1]).unwrap();
    let scales = scales.bytes.as_chunks::<4>().0;
    for (place, (want, code)) in want.iter().zip(codes).enumerate() {
        let want = f32::from_bits(u32::from(u16::from_le_bytes(*want)) << 16);
        let scale = f32::from_le_bytes(scales[place / 128 / 128]);
        let got = kernels::fp8_to_f32(*code) * scale;
        let most = (want.abs() / 16.0).max(scale * 2.0f32.powi(-9)) * 1.001;
        assert!((got - want).abs() <= most, "{place}: {got} for {want}");
    }
}

#[test]
fn nothing_is_written_over() {
    let place = Place::new("there");
    fs::create_dir(&place.0).unwrap();
    fs::write(place.0.join("precious"), "x").unwrap();
    let error = place.make(CheckpointDtype::Bf16, 1).unwrap_err().to_string();
    assert!(error.contains("is not empty"), "{error}");
    assert_eq!(fs::read_dir(&place.0).unwrap().count(), 1);
}

#[test]
fn the_medium_size_is_the_documented_one() {
    let text = shape::config(CheckpointSize::M, CheckpointDtype::Bf16).to_string();
    let config = model::Config::from_json(&text, "config.json").unwrap();
    let tensors = published::tensors(&config);
    let values: usize = tensors.iter().map(Tensor::values).sum();
    assert_eq!(values, 1_294_443_200);
}
