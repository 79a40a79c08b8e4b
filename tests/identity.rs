//! Invariant 1 through real processes: a token's output is a function of its
//! own sequence, whatever the number of nodes, the neighbours in the batch or
//! the cut of the prompt. Scores are compared as printed, which for an f32 is
//! bit for bit.

use serde_json::{Value, json};

use crate::support::sandbox::Plan;
use crate::support::{Fixture, Sandbox, block_on};

/// The scores of every prompt token and of 12 generated ones, 20 alternatives each.
pub async fn scores(mesh: &Sandbox, tokens: &[u32]) -> Value {
    let extra = json!({
        "max_tokens": 12, "ignore_eos": true, "logprobs": 20, "prompt_logprobs": 20,
        "return_token_ids": true,
    });
    let choice = mesh.complete(tokens, extra).await;
    assert_eq!(choice["token_ids"].as_array().unwrap().len(), 12);
    json!([choice["prompt_logprobs"], choice["logprobs"], choice["token_ids"]])
}

fn plan(fixture: &Fixture, numerics: &'static str) -> Plan {
    Sandbox::of(&fixture.dir).numerics(numerics)
}

async fn all_scores(mesh: Sandbox, fixture: &Fixture) -> Vec<Value> {
    let mut all = Vec::new();
    for prompt in &fixture.prompts {
        all.push(scores(&mesh, &prompt.tokens).await);
    }
    mesh.stop();
    all
}

fn assert_same(name: &str, fixture: &Fixture, want: &[Value], got: &[Value]) {
    for ((prompt, want), got) in fixture.prompts.iter().zip(want).zip(got) {
        assert!(want == got, "{name}: {} differs", prompt.name);
    }
}

#[test]
fn the_number_of_nodes_changes_no_bit() {
    block_on(async {
        for (name, numerics) in [("plain", "bf16"), ("fp8", "f32"), ("tied", "bf16")] {
            let fixture = Fixture::load(name);
            let alone =
                all_scores(plan(&fixture, numerics).expert_nodes(0).start().await, &fixture).await;
            for (nodes, replicas) in [(1, 1), (3, 1), (5, 2)] {
                let mesh =
                    plan(&fixture, numerics).expert_nodes(nodes).replicas(replicas).start().await;
                let got = all_scores(mesh, &fixture).await;
                assert_same(&format!("{name} {numerics}, {nodes} nodes"), &fixture, &alone, &got);
            }
        }
    });
}

#[test]
fn the_cut_of_the_prompt_changes_no_bit() {
    block_on(async {
        for numerics in ["bf16", "f32"] {
            let fixture = Fixture::load("yarn");
            let whole =
                plan(&fixture, numerics).router("prefill_chunk", 512).router("step_tokens", 512);
            let want = all_scores(whole.start().await, &fixture).await;
            for (chunk, pages) in [(7, 64), (64, 16)] {
                let cut = plan(&fixture, numerics)
                    .router("prefill_chunk", chunk)
                    .router("step_tokens", chunk + 2)
                    .router("page_tokens", pages);
                let got = all_scores(cut.start().await, &fixture).await;
                assert_same(&format!("{numerics}, chunks of {chunk}"), &fixture, &want, &got);
            }
        }
    });
}

#[test]
fn micro_batches_change_no_bit() {
    block_on(async {
        for numerics in ["bf16", "f32"] {
            let fixture = Fixture::load("plain");
            let never = plan(&fixture, numerics).router("micro_batches", "\"never\"");
            let want = all_scores(never.start().await, &fixture).await;
            let always = plan(&fixture, numerics).router("micro_batches", "\"always\"");
            let got = all_scores(always.start().await, &fixture).await;
            assert_same(&format!("{numerics}, two micro-batches"), &fixture, &want, &got);
        }
    });
}

#[test]
fn every_optimisation_off_changes_no_bit() {
    block_on(async {
        // In f32 every instruction set is of one class, so the plain code can stand beside the fast.
        let fixture = Fixture::load("fp8");
        let off = plan(&fixture, "f32")
            .expert_nodes(0)
            .compute("isa", "\"scalar\"")
            .router("micro_batches", "\"never\"")
            .router("step_tokens", 1)
            .router("prefill_chunk", 1)
            .router("max_running", 1);
        let want = all_scores(off.start().await, &fixture).await;
        let on = plan(&fixture, "f32")
            .replicas(2)
            .compute("threads", 2)
            .router("micro_batches", "\"always\"");
        let got = all_scores(on.start().await, &fixture).await;
        assert_same("everything off", &fixture, &want, &got);
        let sockets = plan(&fixture, "f32").router("shared_rows", "\"off\"");
        let got = all_scores(sockets.start().await, &fixture).await;
        assert_same("rows in messages", &fixture, &want, &got);
    });
}

#[test]
fn neighbours_in_the_batch_change_no_bit() {
    block_on(async {
        for numerics in ["bf16", "f32"] {
            let fixture = Fixture::load("noqlora");
            let mesh = plan(&fixture, numerics).start().await;
            let mut alone = Vec::new();
            for prompt in &fixture.prompts {
                alone.push(scores(&mesh, &prompt.tokens).await);
            }
            // Everyone at once, three times over: each is one among 41 others.
            let mut crowd = tokio::task::JoinSet::new();
            let mesh = std::sync::Arc::new(mesh);
            for round in 0..3 {
                for (index, prompt) in fixture.prompts.iter().enumerate() {
                    let (mesh, tokens) = (mesh.clone(), prompt.tokens.clone());
                    crowd.spawn(async move { (round, index, scores(&mesh, &tokens).await) });
                }
            }
            while let Some(one) = crowd.join_next().await {
                let (round, index, got) = one.unwrap();
                let name = &fixture.prompts[index].name;
                assert!(got == alone[index], "{numerics} round {round}: {name} differs in a crowd");
            }
            mesh.wait_idle().await;
        }
    });
}

#[test]
fn a_short_cache_preempts_and_replays_to_the_same_bits() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let roomy = plan(&fixture, "bf16").start().await;
        let mut want = Vec::new();
        for prompt in &fixture.prompts {
            want.push(scores(&roomy, &prompt.tokens).await);
        }
        roomy.stop();
        // 352 tokens: the longest prompt fits, all of them together do not.
        let tight = plan(&fixture, "bf16").router("kv_tokens", 352).router("page_tokens", 16);
        let mesh = std::sync::Arc::new(tight.start().await);
        let mut crowd = tokio::task::JoinSet::new();
        for (index, prompt) in fixture.prompts.iter().enumerate() {
            let (mesh, tokens) = (mesh.clone(), prompt.tokens.clone());
            crowd.spawn(async move { (index, scores(&mesh, &tokens).await) });
        }
        while let Some(one) = crowd.join_next().await {
            let (index, got) = one.unwrap();
            assert!(got == want[index], "{} differs", fixture.prompts[index].name);
        }
        mesh.wait_idle().await;
    });
}
