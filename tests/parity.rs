//! The mesh against the reference: tokens and log-probabilities through
//! gateway, router and three expert nodes, for every fixture.

use serde_json::{Value, json};

use crate::support::{FIXTURES, Fixture, Sandbox, block_on};

/// Below this margin between the two best logits, two right implementations may differ.
const NEAR_TIE: f64 = 0.05;
const TOLERANCE: f64 = 0.05;

#[test]
fn f32_equals_the_reference_up_to_near_ties() {
    block_on(async {
        for name in FIXTURES {
            let fixture = Fixture::load(name);
            let mesh = Sandbox::of(&fixture.dir).numerics("f32").start().await;
            let mut worst: f64 = 0.0;
            for prompt in &fixture.prompts {
                let wanted = prompt.continuation.len();
                let extra = json!({
                    "max_tokens": wanted, "ignore_eos": true, "logprobs": 1, "return_token_ids": true,
                });
                let choice = mesh.complete(&prompt.tokens, extra).await;
                let tokens = choice["token_ids"].as_array().unwrap();
                let logprobs = choice["logprobs"]["token_logprobs"].as_array().unwrap();
                assert_eq!(
                    (tokens.len(), logprobs.len()),
                    (wanted, wanted),
                    "{name} {}",
                    prompt.name
                );
                for at in 0..wanted {
                    if tokens[at] != prompt.continuation[at] {
                        let margin = prompt.margins[at];
                        assert!(
                            margin < NEAR_TIE,
                            "{name} {} token {at}: margin {margin}",
                            prompt.name
                        );
                        break;
                    }
                    let error = (logprobs[at].as_f64().unwrap() - prompt.logprobs[at]).abs();
                    assert!(error < TOLERANCE, "{name} {} token {at}: off by {error}", prompt.name);
                    worst = worst.max(error);
                }
            }
            println!("{name}: f32 log-probabilities within {worst:.1e} of the reference");
            mesh.stop();
        }
    });
}

#[test]
fn bf16_is_no_less_accurate_than_the_reference_in_bf16() {
    block_on(async {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for name in FIXTURES {
            let fixture = Fixture::load(name);
            let mesh = Sandbox::of(&fixture.dir).numerics("bf16").start().await;
            for prompt in &fixture.prompts {
                let extra = json!({ "max_tokens": 1, "prompt_logprobs": 0, "ignore_eos": true });
                let choice = mesh.complete(&prompt.whole(), extra).await;
                let scores = choice["prompt_logprobs"].as_array().unwrap();
                assert_eq!(scores.len(), prompt.sequence_f32.len() + 1);
                for (at, token) in prompt.whole().into_iter().enumerate().skip(1) {
                    let exact = prompt.sequence_f32[at - 1];
                    ours.push((score(&scores[at], token) - exact).abs());
                    theirs.push((prompt.sequence_bf16[at - 1] - exact).abs());
                }
            }
            mesh.stop();
        }
        for share in [0.5, 0.95] {
            let (ours, theirs) = (quantile(&mut ours, share), quantile(&mut theirs, share));
            println!("bf16 error at {share}: ours {ours:.4}, transformers {theirs:.4}");
            assert!(ours <= theirs, "quantile {share}: {ours} against {theirs}");
        }
    });
}

fn score(entry: &Value, token: u32) -> f64 {
    entry[token.to_string()]["logprob"].as_f64().unwrap()
}

fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * share) as usize]
}
