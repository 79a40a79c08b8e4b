//! Rows of experts: the same bits grouped or alone, on any threads, at any alignment.

use kernels::Isa;

use super::*;
use crate::synthetic::{Recipe, Storage, TempDir};

fn experts() -> (Arc<Checkpoint>, Vec<Expert>) {
    let dir = TempDir::with(&Recipe::small()).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let experts = (0..12).map(|e| Expert::load(&checkpoint, 1, e).unwrap()).collect();
    (checkpoint, experts)
}

/// Wire rows with values that spread.
fn rows(numerics: Numerics, count: usize) -> Vec<u8> {
    let values = (0..count * 48).map(|i| ((i * 7919) % 1000) as f32 * 0.002 - 1.0);
    match numerics {
        Numerics::F32 => values.flat_map(f32::to_le_bytes).collect(),
        Numerics::Bf16 => values.flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect(),
    }
}

fn run(threads: usize, numerics: Numerics, groups: &[ExpertGroup<'_>], x: &[u8]) -> Vec<u8> {
    let compute = Compute::new(Isa::detect(), threads);
    let mut out = vec![7; 3];
    let x = together(x, 48 * numerics.bytes());
    forward_experts(&compute, numerics, groups, &x, &mut out, &mut ExpertScratch::default());
    out
}

#[test]
fn grouped_rows_are_the_same_bits_as_single_ones() {
    let (_checkpoint, experts) = experts();
    for numerics in [Numerics::F32, Numerics::Bf16] {
        let counts = [3, 0, 1, 40, 2, 1, 0, 9, 1, 1, 1, 6];
        let groups: Vec<_> =
            experts.iter().zip(counts).map(|(expert, rows)| ExpertGroup { expert, rows }).collect();
        let x = rows(numerics, counts.iter().sum());
        let together = run(1, numerics, &groups, &x);
        assert_eq!(together.len(), x.len());
        for threads in [2, 4] {
            assert!(
                run(threads, numerics, &groups, &x) == together,
                "{numerics} {threads} threads"
            );
        }
        let bytes = 48 * numerics.bytes();
        let owners = groups.iter().flat_map(|g| std::iter::repeat_n(g.expert, g.rows));
        let pairs = x.chunks(bytes).zip(together.chunks(bytes));
        for (expert, (x, expected)) in owners.zip(pairs) {
            assert!(run(2, numerics, &[ExpertGroup { expert, rows: 1 }], x) == expected);
        }
    }
}

#[test]
fn alignment_does_not_matter() {
    let (_checkpoint, experts) = experts();
    for numerics in [Numerics::F32, Numerics::Bf16] {
        let groups = [ExpertGroup { expert: &experts[5], rows: 3 }];
        let x = rows(numerics, 3);
        let expected = run(1, numerics, &groups, &x);
        for shift in 1..5 {
            let mut shifted = vec![0; shift];
            shifted.extend_from_slice(&x);
            assert!(run(1, numerics, &groups, &shifted[shift..]) == expected);
        }
    }
}

#[test]
#[should_panic(expected = "rows of 192 bytes")]
fn rows_of_another_width_are_a_callers_mistake() {
    let (_checkpoint, experts) = experts();
    let groups = [ExpertGroup { expert: &experts[0], rows: 1 }];
    run(1, Numerics::F32, &groups, &[0; 96]);
}

#[test]
fn no_rows_give_no_rows() {
    let (_checkpoint, experts) = experts();
    assert!(run(1, Numerics::F32, &[], &[]).is_empty());
    let groups = [ExpertGroup { expert: &experts[0], rows: 0 }];
    assert!(run(2, Numerics::Bf16, &groups, &[]).is_empty());
}

#[test]
fn a_buffer_is_used_again() {
    let (_checkpoint, experts) = experts();
    let compute = Compute::new(Isa::detect(), 2);
    let (mut out, mut scratch) = (Vec::new(), ExpertScratch::default());
    for count in [9, 1, 30, 2] {
        let groups = [ExpertGroup { expert: &experts[count % 12], rows: count }];
        let x = rows(Numerics::Bf16, count);
        let lie = together(&x, 96);
        forward_experts(&compute, Numerics::Bf16, &groups, &lie, &mut out, &mut scratch);
        assert!(out == run(1, Numerics::Bf16, &groups, &x));
    }
}

#[test]
fn an_expert_that_arrived_gives_the_same_bits_as_the_file() {
    for storage in [Storage::F32, Storage::Bf16, Storage::Fp8] {
        for fused in [false, true] {
            if fused && matches!(storage, Storage::Fp8) {
                continue;
            }
            let blocks = serde_json::json!({ "quantization_config": {
                "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16],
            }});
            let small = match storage {
                Storage::Fp8 => Recipe::small().with(blocks),
                _ => Recipe::small(),
            };
            let recipe = Recipe { storage, fused, ..small };
            let dir = TempDir::with(&recipe).unwrap();
            let checkpoint = Checkpoint::open(dir.path()).unwrap();
            let there = Expert::load(&checkpoint, 1, 5).unwrap();
            let mut bytes = Vec::new();
            let digest = there.pass_on(1000, |piece| {
                bytes.extend_from_slice(piece);
                piece.len() <= 1000
            });
            let digest = digest.unwrap();
            let arrive = |bytes: &[u8]| {
                let mut arriving = Arriving::new(&checkpoint, 1, 5).unwrap();
                assert_eq!(arriving.bytes(), there.bytes());
                assert!(bytes.chunks(777).all(|piece| arriving.put(piece)));
                assert_eq!(arriving.missing(), there.bytes() - bytes.len());
                assert!(!arriving.put(&vec![0; arriving.missing() + 1]), "more than there is");
                arriving.finish(&digest).map_err(|error| error.to_string())
            };
            let short = arrive(&bytes[1..]).err().unwrap();
            assert!(short.contains("layer 1 expert 5") && short.contains("bytes came"), "{short}");
            let mut other = bytes.clone();
            other[77] ^= 16;
            let other = arrive(&other).err().unwrap();
            assert!(other.contains("layer 1 expert 5, fetched: other bytes"), "{other}");
            let here = arrive(&bytes).unwrap();
            drop(dir);
            for numerics in [Numerics::F32, Numerics::Bf16] {
                let x = rows(numerics, 9);
                let of = |expert| run(1, numerics, &[ExpertGroup { expert, rows: 9 }], &x);
                assert_eq!(of(&here), of(&there), "{numerics}");
            }
            assert_eq!(here.pass_on(4096, |_| true), Some(digest), "it can be passed on");
            assert_eq!(here.pass_on(4096, |_| false), None);
        }
    }
}
