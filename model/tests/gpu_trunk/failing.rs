//! Devices that have too little memory or are lost, and models that they do not take.

use std::sync::Arc;

use model::local::{Local, pages};
use model::synthetic::{Recipe, TempDir};
use model::{
    Checkpoint, Chunk, Compute, GpuError, Isa, KvError, LogitRows, Numerics, StepError, Trunk,
};
use serde_json::json;

use crate::limited::{Failing, lost};

/// The small model in sizes that kernels take, but for some fields.
fn trunk(fields: serde_json::Value, numerics: Numerics) -> (Arc<Checkpoint>, Trunk) {
    let sizes = json!({
        "hidden_size": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 24,
    });
    let dir = TempDir::with(&Recipe::small().with(sizes).with(fields)).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let compute = Arc::new(Compute::new(Isa::detect(), 1));
    let trunk = Trunk::load(&checkpoint, numerics, compute).unwrap();
    (checkpoint, trunk)
}

#[test]
fn too_little_memory_is_a_refusal_that_says_what_for() {
    let Some(device) = Failing::open(1000, 0) else { return };
    let (_, mine) = trunk(json!({}), Numerics::Bf16);
    let said = mine.onto(device).map(drop).map_err(|error| error.to_string()).unwrap_err();
    assert!(said.contains("of the memory of cuda:0, which has"), "{said}");

    let Some(device) = Failing::open(64 << 20, 0) else { return };
    let (_, mine) = trunk(json!({}), Numerics::Bf16);
    let mine = mine.onto(device.clone()).unwrap();
    let cache = mine.cache(1 << 20, 16).map(drop).unwrap_err();
    assert!(matches!(cache, KvError::Gpu(GpuError::OutOfMemory { what: "the KV cache", .. })));
    // What is left serves.
    let kv = mine.cache(4, 16).unwrap();
    let step = mine.step(&kv, 1 << 20).map(drop).unwrap_err();
    assert!(step.is_out_of_memory(), "{step}");
    assert!(mine.step(&kv, 16).is_ok());
}

#[test]
fn a_device_that_is_lost_ends_the_step_wherever_it_was() {
    for launches in [0, 1, 7, 20, 40] {
        let Some(device) = Failing::open(usize::MAX, launches) else { return };
        let (checkpoint, mine) = trunk(json!({}), Numerics::Bf16);
        let mine = mine.onto(device).unwrap();
        let mut kv = mine.cache(4, 16).unwrap();
        let step = mine.step(&kv, 16).unwrap();
        let mut model = Local::with(&checkpoint, mine, step).unwrap();
        let pages = pages(&mut kv, 3).unwrap();
        let chunk = Chunk { tokens: &[1, 2, 3], start: 0, pages: &pages, logits: LogitRows::Last };
        let ended = model.run(&[chunk], &mut kv, |_, _| {}).map(drop);
        assert_eq!(ended, Err(StepError::Gpu(lost())), "after {launches} launches");
    }
}

#[test]
fn more_rows_than_there_is_memory_for_are_refused() {
    let Some(device) = Failing::open(usize::MAX, usize::MAX) else { return };
    let (checkpoint, mine) = trunk(json!({}), Numerics::Bf16);
    let mine = mine.onto(device).unwrap();
    let mut kv = mine.cache(4, 16).unwrap();
    let step = mine.step(&kv, 16).unwrap();
    let mut model = Local::with(&checkpoint, mine, step).unwrap();
    let pages = pages(&mut kv, 20).unwrap();
    let tokens = [5; 17];
    let chunk = |tokens| Chunk { tokens, start: 0, pages: &pages, logits: LogitRows::Last };
    let refused = model.run(&[chunk(&tokens)], &mut kv, |_, _| {}).map(drop);
    assert_eq!(refused, Err(StepError::Rows { rows: 17, most: 16 }));
    assert!(model.run(&[chunk(&tokens[..2])], &mut kv, |_, _| {}).is_ok());
}

#[test]
fn models_and_classes_that_kernels_do_not_take_are_named() {
    for (fields, numerics, expected) in [
        (json!({}), Numerics::F32, "a GPU computes in bf16 or fp8: set numerics to \"bf16\""),
        (
            json!({"kv_lora_rank": 33}),
            Numerics::Bf16,
            "a GPU's trunk needs kv_lora_rank to be a multiple of 8, this model has 33",
        ),
        (
            json!({"kv_lora_rank": 520}),
            Numerics::Bf16,
            "a GPU's trunk needs kv_lora_rank to be at most 512, this model has 520",
        ),
        (
            json!({"v_head_dim": 10}),
            Numerics::Bf16,
            "a GPU's trunk needs v_head_dim to be a multiple of 8, this model has 10",
        ),
    ] {
        let (_, mine) = trunk(fields, numerics);
        let said = mine.check_gpu().map_err(|error| error.to_string());
        assert_eq!(said, Err(expected.to_owned()));
    }
    let (_, mine) = trunk(json!({}), Numerics::Bf16);
    assert!(mine.check_gpu().is_ok());
}
