//! Parity with transformers: the recorded random checkpoints of `tests/fixtures`, and whatever
//! directory of the same kind `MOEMESH_PARITY_DIR` names.
//!
//! The f32 class has to give the reference's tokens up to the first near-tie, its log-probabilities
//! and its chosen experts; the bf16 class has to be at least as near to the float32 reference as
//! transformers in bf16 is.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use model::local::{Local, pages};
use model::{Checkpoint, Chunk, Compute, Isa, KvPool, LogitRows, Numerics, sample};
use serde::Deserialize;

/// Margins below this are near-ties.
const NEAR_TIE: f64 = 0.05;
/// Largest error of a log-probability.
const TOLERANCE: f64 = 0.05;

#[derive(Deserialize)]
struct Reference {
    prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    name: String,
    prompt: Vec<u32>,
    continuation: Vec<u32>,
    continuation_logprobs: Vec<f64>,
    continuation_margins: Vec<f64>,
    sequence_logprobs_f32: Vec<f64>,
    sequence_logprobs_bf16: Vec<f64>,
    #[serde(default)]
    routing: Vec<Routing>,
}

#[derive(Deserialize)]
struct Routing {
    layer: usize,
    experts: Vec<Vec<u32>>,
    weights: Vec<Vec<f32>>,
}

struct Fixture {
    dir: PathBuf,
    checkpoint: Arc<Checkpoint>,
    reference: Reference,
}

fn fixtures() -> Vec<Fixture> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    let mut dirs: Vec<PathBuf> =
        std::fs::read_dir(root).unwrap().map(|e| e.unwrap().path()).collect();
    if let Some(extra) = std::env::var_os("MOEMESH_PARITY_DIR") {
        dirs.extend(std::fs::read_dir(extra).unwrap().map(|e| e.unwrap().path()));
    }
    dirs.retain(|dir| dir.join("reference.json").exists());
    dirs.sort();
    assert!(dirs.len() >= 5, "the fixtures are there");
    let open = |dir: PathBuf| {
        let text = std::fs::read_to_string(dir.join("reference.json")).unwrap();
        let checkpoint = Checkpoint::open(&dir).unwrap();
        Fixture { dir, checkpoint, reference: serde_json::from_str(&text).unwrap() }
    };
    dirs.into_iter().map(open).collect()
}

struct Runner {
    model: Local,
    kv: KvPool,
    scratch: sample::Scratch,
}

impl Runner {
    fn new(checkpoint: &Arc<Checkpoint>, numerics: Numerics) -> Runner {
        let compute = Arc::new(Compute::new(Isa::detect(), 2));
        let kv = KvPool::new(checkpoint.config(), numerics, 16, 64).unwrap();
        let scratch = sample::Scratch::new(compute.kernels);
        Runner { model: Local::load(checkpoint, numerics, compute).unwrap(), kv, scratch }
    }

    /// Log-probabilities of all tokens but the first, prefilled in chunks of 128.
    fn teacher_forced(&mut self, tokens: &[u32]) -> Vec<f64> {
        let pages = pages(&mut self.kv, tokens.len()).unwrap();
        let vocab = self.model.trunk().config().vocab;
        let mut found = Vec::new();
        for start in (0..tokens.len()).step_by(128) {
            let end = tokens.len().min(start + 128);
            let chunk =
                Chunk { tokens: &tokens[start..end], start, pages: &pages, logits: LogitRows::All };
            let logits = self.model.run(&[chunk], &mut self.kv, |_, _| {}).unwrap();
            for (row, token) in logits.chunks(vocab).zip(&tokens[start + 1..]) {
                let (logprob, _) = sample::score(row, *token, 0, &self.scratch).unwrap();
                found.push(f64::from(logprob));
            }
        }
        pages.into_iter().for_each(|p| self.kv.free(p));
        found
    }

    /// Greedy tokens and their log-probabilities.
    fn greedy(&mut self, prompt: &[u32], count: usize) -> Vec<(u32, f64)> {
        let pages = pages(&mut self.kv, prompt.len() + count).unwrap();
        let params = sample::Params { logprobs: Some(0), ..sample::Params::greedy() };
        let history = sample::History::default();
        let mut tokens = prompt.to_vec();
        let mut start = 0;
        let mut found = Vec::new();
        for _ in 0..count {
            let new = &tokens[start..];
            let chunk = Chunk { tokens: new, start, pages: &pages, logits: LogitRows::Last };
            let logits = self.model.run(&[chunk], &mut self.kv, |_, _| {}).unwrap();
            let choice = sample::sample(logits, &params, &history, 0, &self.scratch).unwrap();
            found.push((choice.token, choice.logprob.unwrap().into()));
            start = tokens.len();
            tokens.push(choice.token);
        }
        pages.into_iter().for_each(|p| self.kv.free(p));
        found
    }
}

#[test]
fn f32_gives_the_references_tokens_and_log_probabilities() {
    for Fixture { dir, checkpoint, reference } in fixtures() {
        let mut runner = Runner::new(&checkpoint, Numerics::F32);
        let (mut worst, mut exact, mut tokens) = (0.0f64, 0, 0);
        for prompt in &reference.prompts {
            let what = format!("{} {}", dir.display(), prompt.name);
            let found = runner.greedy(&prompt.prompt, prompt.continuation.len());
            for (i, (token, logprob)) in found.iter().enumerate() {
                if *token != prompt.continuation[i] {
                    let margin = prompt.continuation_margins[i];
                    assert!(margin < NEAR_TIE, "{what}: token {i} differs, margin {margin}");
                    break;
                }
                let error = (logprob - prompt.continuation_logprobs[i]).abs();
                assert!(error < TOLERANCE, "{what}: token {i} is off by {error}");
                exact += 1;
            }
            tokens += found.len();
            let sequence = [prompt.prompt.as_slice(), &prompt.continuation].concat();
            let found = runner.teacher_forced(&sequence);
            assert_eq!(found.len(), prompt.sequence_logprobs_f32.len());
            for (i, (found, expected)) in
                found.iter().zip(&prompt.sequence_logprobs_f32).enumerate()
            {
                let error = (found - expected).abs();
                assert!(error < TOLERANCE, "{what}: position {i} is off by {error}");
                worst = worst.max(error);
            }
        }
        let name = dir.file_name().unwrap().display();
        println!(
            "{name}: f32 {exact} of {tokens} greedy tokens, worst log-probability {worst:.2e}"
        );
    }
}

#[test]
fn f32_chooses_the_references_experts() {
    let mut compared = 0;
    for Fixture { dir, checkpoint, reference } in fixtures() {
        let mut runner = Runner::new(&checkpoint, Numerics::F32);
        for prompt in reference.prompts.iter().filter(|p| !p.routing.is_empty()) {
            let pages = pages(&mut runner.kv, prompt.prompt.len()).unwrap();
            let chunk =
                Chunk { tokens: &prompt.prompt, start: 0, pages: &pages, logits: LogitRows::None };
            let check = |layer: usize, routed: model::Routed<'_>| {
                let expected = prompt.routing.iter().find(|r| r.layer == layer).unwrap();
                assert_eq!(routed.experts, expected.experts.concat(), "{}", dir.display());
                for (found, expected) in routed.weights.iter().zip(expected.weights.concat()) {
                    assert!((found - expected).abs() < 1e-4, "{found} {expected}");
                }
                compared += 1;
            };
            runner.model.run(&[chunk], &mut runner.kv, check).unwrap();
            pages.into_iter().for_each(|p| runner.kv.free(p));
        }
    }
    assert!(compared > 0, "fixtures record routing");
}

fn quantile(errors: &mut [f64], q: f64) -> f64 {
    errors.sort_by(f64::total_cmp);
    errors[((errors.len() - 1) as f64 * q).round() as usize]
}

#[test]
fn bf16_is_at_least_as_accurate_as_transformers_in_bf16() {
    let (mut all_ours, mut all_theirs) = (Vec::new(), Vec::new());
    for Fixture { dir, checkpoint, reference } in fixtures() {
        let mut runner = Runner::new(&checkpoint, Numerics::Bf16);
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for prompt in &reference.prompts {
            let sequence = [prompt.prompt.as_slice(), &prompt.continuation].concat();
            let found = runner.teacher_forced(&sequence);
            let exact = &prompt.sequence_logprobs_f32;
            ours.extend(found.iter().zip(exact).map(|(a, b)| (a - b).abs()));
            theirs.extend(
                prompt.sequence_logprobs_bf16.iter().zip(exact).map(|(a, b)| (a - b).abs()),
            );
        }
        println!(
            "{}: bf16 median {:.5} (transformers {:.5}), p95 {:.5} ({:.5}), worst {:.3} ({:.3})",
            dir.file_name().unwrap().display(),
            quantile(&mut ours, 0.5),
            quantile(&mut theirs, 0.5),
            quantile(&mut ours, 0.95),
            quantile(&mut theirs, 0.95),
            quantile(&mut ours, 1.0),
            quantile(&mut theirs, 1.0),
        );
        all_ours.extend(ours);
        all_theirs.extend(theirs);
    }
    for q in [0.5, 0.95] {
        let (ours, theirs) = (quantile(&mut all_ours, q), quantile(&mut all_theirs, q));
        println!("all: bf16 quantile {q}: {ours:.5}, transformers {theirs:.5}");
        assert!(ours <= theirs, "quantile {q}: {ours} against {theirs}");
    }
}
