//! Bad requests over real HTTP to a real mesh: each is refused in OpenAI's
//! error shape naming its field, and the mesh goes on serving.

use serde_json::{Value, json};

use crate::support::http::{post, post_bytes};
use crate::support::{Fixture, Sandbox, block_on};

#[test]
fn every_bad_request_is_refused_by_name() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let mesh = Sandbox::of(&fixture.dir).expert_nodes(1).start().await;
        let complete = "/v1/completions";
        let chat = "/v1/chat/completions";
        let with = |key: &str, value: Value| {
            let mut body = json!({ "model": "test", "prompt": [1, 2, 3], "max_tokens": 4 });
            body[key] = value;
            body
        };
        let said = |messages: Value| json!({ "model": "test", "messages": messages });
        let cases: Vec<(&str, Value, u16, &str)> = vec![
            (complete, with("model", json!("other")), 404, "model"),
            (complete, with("prompt", json!([])), 400, "prompt"),
            (complete, with("prompt", json!("")), 400, "prompt"),
            (complete, with("prompt", json!({ "a": 1 })), 400, "prompt"),
            (complete, with("prompt", json!([1, -2])), 400, "prompt"),
            (complete, with("prompt", json!([1, 4_000_000_000u32])), 400, "prompt"),
            (complete, with("prompt", json!(vec![1; 100_000])), 400, "prompt"),
            (complete, with("max_tokens", json!(-1)), 400, "max_tokens"),
            (complete, with("max_tokens", json!(1_000_000_000)), 400, "max_tokens"),
            (complete, with("max_tokens", json!("four")), 400, "max_tokens"),
            (complete, with("n", json!(1_000_000_000)), 400, "n"),
            (complete, with("n", json!(0)), 400, "n"),
            (complete, with("temperature", json!(-0.5)), 400, "temperature"),
            (complete, with("temperature", json!(1e30)), 400, "temperature"),
            (complete, with("top_p", json!(0)), 400, "top_p"),
            (complete, with("top_p", json!(1.5)), 400, "top_p"),
            (complete, with("min_p", json!(2)), 400, "min_p"),
            (complete, with("top_k", json!(-7)), 400, "top_k"),
            (complete, with("logprobs", json!(1_000)), 400, "logprobs"),
            (complete, with("stop", json!({ "no": 1 })), 400, "stop"),
            (complete, with("seed", json!("x")), 400, "seed"),
            (complete, with("stream", json!("yes")), 400, "stream"),
            (chat, said(json!([])), 400, "messages"),
            (chat, said(json!("hello")), 400, "messages"),
            (chat, said(json!([{ "role": "user" }])), 400, "messages"),
            (chat, said(json!([{ "content": "hello" }])), 400, "messages"),
        ];
        for (path, body, status, field) in cases {
            let (got, answer) = post(&mesh.http, path, &body).await;
            let error = &answer["error"];
            let short: String = body.to_string().chars().take(120).collect();
            assert_eq!(got, status, "{short}: {answer}");
            assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()), "{short}: {answer}");
            let param = error["param"].as_str().unwrap_or_default();
            assert!(param.starts_with(field), "{short} blames `{param}`: {answer}");
        }
        for (body, status) in [
            (b"{\"model\": ".to_vec(), 400),
            (b"\xff\xfe".to_vec(), 400),
            ("[".repeat(100_000).into_bytes(), 400),
            (vec![b' '; 64 << 20], 413),
        ] {
            let (got, answer) = post_bytes(&mesh.http, complete, body).await;
            assert_eq!(got, status, "{answer}");
            assert!(answer["error"]["message"].is_string(), "{answer}");
        }
        let answer = mesh.complete(&[1, 2, 3], json!({ "max_tokens": 4 })).await;
        assert!(answer["finish_reason"].is_string());
        mesh.wait_idle().await;
        mesh.stop();
    });
}

#[test]
fn a_checkpoint_without_tokenizer_serves_token_ids() {
    block_on(async {
        let fixture = Fixture::load("tied");
        let bare = std::env::temp_dir().join(format!("moemesh-bare-{}", std::process::id()));
        std::fs::create_dir_all(&bare).unwrap();
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(fixture.dir.join(file), bare.join(file)).unwrap();
        }
        let mesh = Sandbox::of(&bare).numerics("f32").expert_nodes(1).start().await;
        let prompt = &fixture.prompts[2];
        let extra = json!({ "max_tokens": 4, "ignore_eos": true, "return_token_ids": true });
        let choice = mesh.complete(&prompt.tokens, extra).await;
        assert_eq!(choice["token_ids"], json!(prompt.continuation[..4]));
        assert_eq!(choice["text"], "");
        let body = json!({ "model": "test", "prompt": "some text", "max_tokens": 4 });
        let (status, answer) = post(&mesh.http, "/v1/completions", &body).await;
        assert_eq!(status, 400, "{answer}");
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains("tokenizer.json"), "{message}");
        mesh.stop();
        std::fs::remove_dir_all(bare).unwrap();
    });
}
