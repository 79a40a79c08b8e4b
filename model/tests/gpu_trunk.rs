//! The trunk on a device, which here is the stand-in of the kernels' tests: whole steps, launched as on a GPU, beside the
//! CPU's.

// Files of crate kernels, whose business unsafe code is.
#[allow(unsafe_code)]
#[path = "../kernels/tests/standin/compiled.rs"]
mod compiled;
#[allow(unsafe_code)]
#[path = "../kernels/tests/standin/driver.rs"]
mod driver;

#[path = "gpu_trunk/failing.rs"]
mod failing;
#[allow(unsafe_code)]
#[path = "../kernels/tests/standin/limited.rs"]
mod limited;

use std::path::Path;
use std::sync::Arc;

use driver::StandIn;
use kernels::cuda::trunk::Driver;
use model::local::{Local, pages};
use model::sample::{History, Params, Scratch, sample};
use model::synthetic::{Recipe, TempDir};
use model::{Checkpoint, Chunk, Compute, Isa, KvPool, LogitRows, Numerics, PageId, Trunk};
use serde_json::json;

/// Margins between logits below this are near-ties.
const NEAR_TIE: f32 = 0.05;

/// A model that computes on the CPU or on the stand-in, and its cache.
struct Runner {
    model: Local,
    kv: KvPool,
    vocab: usize,
}

impl Runner {
    fn new(checkpoint: &Arc<Checkpoint>, device: Option<Arc<dyn Driver>>, rows: usize) -> Runner {
        let compute = Arc::new(Compute::new(Isa::detect(), 2));
        let mut trunk = Trunk::load(checkpoint, Numerics::Bf16, compute).unwrap();
        if let Some(device) = device {
            trunk = trunk.onto(device).unwrap();
        }
        let kv = trunk.cache(48, 16).unwrap();
        let step = trunk.step(&kv, rows).unwrap();
        let vocab = trunk.config().vocab;
        Runner { model: Local::with(checkpoint, trunk, step).unwrap(), kv, vocab }
    }

    /// Logits of the chunk's last token.
    fn last(&mut self, tokens: &[u32], start: usize, pages: &[PageId]) -> Vec<f32> {
        let chunk = Chunk { tokens, start, pages, logits: LogitRows::Last };
        self.model.run(&[chunk], &mut self.kv, |_, _| {}).unwrap().to_vec()
    }

    /// Bits of the logits of all tokens of `sequences`, of which each step takes as many of each as `size` says.
    fn bits(&mut self, sequences: &[&[u32]], size: usize) -> Vec<Vec<u32>> {
        let tables: Vec<_> =
            sequences.iter().map(|s| pages(&mut self.kv, s.len()).unwrap()).collect();
        let mut found = vec![Vec::new(); sequences.len()];
        let longest = sequences.iter().map(|s| s.len()).max().unwrap_or(0);
        for start in (0..longest).step_by(size) {
            let (mut chunks, mut owners) = (Vec::new(), Vec::new());
            for (i, (sequence, pages)) in sequences.iter().zip(&tables).enumerate() {
                let tokens = &sequence[start.min(sequence.len())..sequence.len().min(start + size)];
                if !tokens.is_empty() {
                    chunks.push(Chunk { tokens, start, pages, logits: LogitRows::All });
                    owners.push((i, tokens.len() * self.vocab));
                }
            }
            let mut logits = &*self.model.run(&chunks, &mut self.kv, |_, _| {}).unwrap();
            for (i, count) in owners {
                let (mine, rest) = logits.split_at(count);
                found[i].extend(mine.iter().map(|l| l.to_bits()));
                logits = rest;
            }
        }
        tables.into_iter().flatten().for_each(|page| self.kv.free(page));
        found
    }
}

/// The best token, and by how much it is better than the next.
fn best(logits: &[f32]) -> (u32, f32) {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
    (order[0] as u32, logits[order[0]] - logits[order[1]])
}

fn distance(x: &[f32], y: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let error: f64 = x.iter().zip(y).map(|(x, y)| square(f64::from(x - y))).sum();
    (error / y.iter().map(|y| square(f64::from(*y))).sum::<f64>()).sqrt()
}

#[test]
fn the_bundled_models_greedy_tokens_are_the_cpus_up_to_near_ties() {
    let Some(device) = StandIn::open(4) else { return };
    // From the package's folder, so that the program may be built elsewhere.
    let checkpoint = Checkpoint::open(Path::new("../deploy/tiny")).unwrap();
    let mut here = Runner::new(&checkpoint, None, 16);
    let mut there = Runner::new(&checkpoint, Some(device), 16);
    let mut tokens: Vec<u32> = vec![1, 304, 77, 1200, 15, 2048, 9, 511, 30, 260];
    let (mine, theirs) = (pages(&mut here.kv, 20).unwrap(), pages(&mut there.kv, 20).unwrap());
    let mut start = 0;
    for count in 0..6 {
        let new = &tokens[start..];
        let (a, b) = (here.last(new, start, &mine), there.last(new, start, &theirs));
        let off = distance(&b, &a);
        assert!(off <= 2e-2, "token {count}: logits are off by {off}");
        let ((token, margin), (other, _)) = (best(&a), best(&b));
        assert!(token == other || margin < NEAR_TIE, "token {count}: {other} for {token}");
        start = tokens.len();
        tokens.push(token);
    }
}

/// Models of other shapes, and how far their logits may be from the CPU's: with biases; without query compression, groups
/// and shared experts, with halves for pairs, in f32; in FP8 of blocks that become bf16; in FP8 that is multiplied so, where
/// rows are coded in FP8, too: a few hundredths of each product, which sharp attention over random rows makes more of.
fn others() -> [(Recipe, f64); 4] {
    let base = json!({
        "hidden_size": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 24, "attention_bias": true,
    });
    let plain = json!({
        "q_lora_rank": null, "num_attention_heads": 3, "num_key_value_heads": 3,
        "n_shared_experts": 0, "n_group": 1, "topk_group": 1, "rope_interleave": false,
        "attention_bias": false,
    });
    let fp8 = json!({
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 16]},
    });
    let biased = Recipe::small().with(base.clone());
    let mut plain = Recipe::small().with(base.clone()).with(plain);
    plain.storage = model::synthetic::Storage::F32;
    let mut quantised = Recipe::small().with(base).with(fp8);
    quantised.storage = model::synthetic::Storage::Fp8;
    let sizes = json!({
        "hidden_size": 144, "q_lora_rank": 136, "v_head_dim": 40, "intermediate_size": 264,
        "moe_intermediate_size": 136, "num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    });
    let multiplied = quantised.clone().with(sizes);
    [(biased, 4e-2), (plain, 4e-2), (quantised, 4e-2), (multiplied, 0.25)]
}

#[test]
fn rows_with_a_draw_have_the_token_that_their_logits_give_and_others_their_logits() {
    let Some(device) = StandIn::open(2) else { return };
    let [(recipe, _), ..] = others();
    let dir = TempDir::with(&recipe).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let mut model = Runner::new(&checkpoint, Some(device), 80);
    let tokens: Vec<u32> = (0..70).map(|i| (i * i * 5 + i) % 97).collect();
    let pages = pages(&mut model.kv, tokens.len()).unwrap();
    let chunk = Chunk { tokens: &tokens, start: 0, pages: &pages, logits: LogitRows::All };
    let logits = model.model.run(&[chunk], &mut model.kv, |_, _| {}).unwrap().to_vec();
    let params = |row: usize| match row % 4 {
        0 => Params { top_k: 3, ..Params::greedy() },
        1 => Params { temperature: 0.8, min_p: 0.05, seed: row as u64, ..Params::default() },
        2 => Params { temperature: 1.3, seed: 1 << 40, ..Params::default() },
        // What takes more than a draw.
        _ => Params { top_p: 0.9, ..Params::default() },
    };
    // More than are computed at once.
    let draws: Vec<_> = (0..70).map(|row| params(row).draw(row as u64)).collect();
    let (mut step, trunk) = model.model.into_parts();
    let answers = trunk.answers(&mut step, &draws).unwrap();
    let scratch = Scratch::new(trunk.compute().kernels);
    let mut left = &*answers.logits;
    for (row, logits) in logits.chunks(model.vocab).enumerate() {
        let params = params(row);
        let Some(chosen) = answers.tokens[row] else {
            let (mine, others) = left.split_at(model.vocab);
            assert!(mine == logits && row % 4 == 3, "row {row}");
            left = others;
            continue;
        };
        let mut logits = logits.to_vec();
        let history = History::default();
        let expected = sample(&mut logits, &params, &history, row as u64, &scratch).unwrap();
        assert_eq!(chosen, Ok(expected.token), "row {row}");
    }
    assert!(left.is_empty());
}

#[test]
fn batches_and_chunks_do_not_show_and_the_cpus_logits_are_near() {
    let Some(device) = StandIn::open(3) else { return };
    for (recipe, most) in others() {
        let dir = TempDir::with(&recipe).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let tokens = |seed: u32, count: u32| -> Vec<u32> {
            (0..count).map(|i| (i * i * 7 + i * 13 + seed * 31) % 97).collect()
        };
        let (first, second) = (tokens(1, 21), tokens(2, 9));
        let mut there = Runner::new(&checkpoint, Some(device.clone()), 40);
        let expected = there.bits(&[&first], 21);
        assert!(there.bits(&[&first], 6) == expected, "in chunks");
        let together = there.bits(&[&second, &first], 13);
        assert!(together[1] == expected[0], "among others");
        assert!(there.bits(&[&second], 9)[0] == together[0], "alone");

        let mut here = Runner::new(&checkpoint, None, 40);
        let near = here.bits(&[&first], 21);
        let wide = |bits: &[u32]| -> Vec<f32> { bits.iter().map(|b| f32::from_bits(*b)).collect() };
        let (far, near) = (wide(&expected[0]), wide(&near[0]));
        let rows = far.chunks(there.vocab).zip(near.chunks(there.vocab));
        let mut off: Vec<f64> = rows.map(|(far, near)| distance(far, near)).collect();
        // Weights are random, so that a gate's choice is often a near-tie: such rows go other ways.
        off.sort_by(f64::total_cmp);
        let half = off[off.len() / 2];
        assert!(half <= most, "logits are off by {off:?}");
    }
}
