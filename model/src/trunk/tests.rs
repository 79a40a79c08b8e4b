//! Steps that do not fit the model, and the order of a step's calls.

use kernels::Isa;

use super::*;
use crate::kv::PageId;
use crate::step::LogitRows;
use crate::synthetic::{Recipe, TempDir};

struct Bench {
    trunk: Trunk,
    kv: KvPool,
    step: Step,
    pages: Vec<PageId>,
}

/// A trunk of the small model with all of a pool of 4 pages of 16 positions.
fn bench(numerics: Numerics) -> Bench {
    let dir = TempDir::with(&Recipe::small()).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let mut kv = KvPool::new(checkpoint.config(), numerics, 4, 16).unwrap();
    let compute = Arc::new(Compute::new(Isa::detect(), 2));
    let trunk = Trunk::load(&checkpoint, numerics, compute).unwrap();
    let pages = std::iter::from_fn(|| kv.alloc()).collect();
    Bench { trunk, kv, step: Step::new(), pages }
}

fn chunk<'a>(tokens: &'a [u32], start: usize, pages: &'a [PageId]) -> Chunk<'a> {
    Chunk { tokens, start, pages, logits: LogitRows::All }
}

#[test]
fn steps_that_do_not_fit_are_refused_and_hold_nothing() {
    let Bench { trunk, mut kv, mut step, pages } = bench(Numerics::F32);
    let good = chunk(&[1, 2], 0, &pages);
    trunk.begin(&mut step, &[good], &kv).unwrap();
    assert_eq!((step.rows(), step.wanted()), (2, 2));
    let long = vec![0; 17];
    let stranger = [PageId(4)];
    for (bad, expected) in [
        (chunk(&[], 0, &pages), StepError::Empty { chunk: 1 }),
        (chunk(&[96, 97], 0, &pages), StepError::Token { chunk: 1, token: 97, vocab: 97 }),
        (chunk(&[1], 512, &pages), StepError::Context { chunk: 1, position: 512, limit: 512 }),
        (
            chunk(&[1, 1], usize::MAX, &pages),
            StepError::Context { chunk: 1, position: usize::MAX, limit: 512 },
        ),
        (chunk(&long, 0, &pages[..1]), StepError::Pages { chunk: 1, pages: 1, positions: 17 }),
        (chunk(&[1], 64, &pages), StepError::Pages { chunk: 1, pages: 4, positions: 65 }),
        (chunk(&[1], 0, &stranger), StepError::Pages { chunk: 1, pages: 1, positions: 1 }),
    ] {
        assert_eq!(trunk.begin(&mut step, &[good, bad], &kv), Err(expected));
        assert_eq!((step.rows(), step.wanted()), (0, 0));
    }
    // An empty step runs through, too.
    for layer in 0..trunk.config().layers {
        if trunk.attend(layer, &mut step, &mut kv).unwrap() {
            assert_eq!(step.routed().count, 0);
            trunk.absorb(layer, &mut step, &|_| &[]).unwrap();
        }
    }
    assert!(trunk.logits(&mut step).unwrap().is_empty());
}

/// Logits of a step whose experts answer with rows of ones, at an odd address if `shift`.
fn run(bench: &mut Bench, early: bool, shift: bool) -> Vec<u32> {
    let Bench { trunk, kv, step, pages } = bench;
    trunk.begin(step, &[chunk(&[5, 6, 7], 0, pages)], kv).unwrap();
    let one: Vec<u8> = match trunk.numerics() {
        Numerics::F32 => 1f32.to_le_bytes().into(),
        Numerics::Bf16 => half::bf16::ONE.to_le_bytes().into(),
    };
    let mut bytes = vec![0; usize::from(shift)];
    bytes.extend(one.repeat(trunk.config().hidden));
    for layer in 0..trunk.config().layers {
        if trunk.attend(layer, step, kv).unwrap() {
            let routed = step.routed();
            assert_eq!((routed.count, routed.experts.len(), routed.weights.len()), (3, 9, 9));
            assert_eq!(routed.row(1).len(), trunk.config().hidden * trunk.numerics().bytes());
            if early {
                trunk.shared(layer, step).unwrap();
            }
            trunk.absorb(layer, step, &|_| &bytes[usize::from(shift)..]).unwrap();
        }
    }
    let all: Vec<u32> = trunk.logits(step).unwrap().iter().map(|l| l.to_bits()).collect();
    let vocab = trunk.config().vocab;
    let second: Vec<u32> =
        trunk.logits_of(step, 1..2).unwrap().iter().map(|l| l.to_bits()).collect();
    assert_eq!(second, all[vocab..2 * vocab]);
    all
}

#[test]
fn shared_experts_may_be_left_to_absorb_and_results_may_lie_anywhere() {
    for numerics in [Numerics::F32, Numerics::Bf16] {
        let mut bench = bench(numerics);
        let expected = run(&mut bench, true, false);
        assert!(run(&mut bench, false, false) == expected);
        assert!(run(&mut bench, true, true) == expected);
    }
}

#[test]
#[should_panic(expected = "the layer that waits for its experts")]
fn a_layer_is_absorbed_once() {
    let Bench { trunk, mut kv, mut step, pages } = bench(Numerics::Bf16);
    trunk.begin(&mut step, &[chunk(&[5], 0, &pages)], &kv).unwrap();
    assert!(!trunk.attend(0, &mut step, &mut kv).unwrap());
    assert!(trunk.attend(1, &mut step, &mut kv).unwrap());
    let row = vec![0; 48 * 2];
    trunk.absorb(1, &mut step, &|_| &row).unwrap();
    trunk.absorb(1, &mut step, &|_| &row).unwrap();
}
