//! Requests that must be refused, each with its status and the field it names.

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::client::{get, post, raw, request};
use super::serving::serve;
use super::*;

const JSON: &str = "content-type: application/json\r\n";

#[tokio::test]
async fn every_bad_field_is_named() {
    let router = router::start("a").await;
    let served = serve(&[&router], |_| {}).await;
    let long: Vec<u32> = vec![1; 512];
    let over = "a".repeat(600);
    for (more, param) in [
        (json!({"model": 3}), "model"),
        (json!({"prompt": null}), "prompt"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": [[]]}), "prompt"),
        (json!({"prompt": [""]}), "prompt"),
        (json!({"prompt": [1, "a"]}), "prompt"),
        (json!({"prompt": {"a": 1}}), "prompt"),
        (json!({"prompt": 7}), "prompt"),
        (json!({"prompt": [-1]}), "prompt"),
        (json!({"prompt": [VOCAB]}), "prompt"),
        (json!({"prompt": [4294967296u64]}), "prompt"),
        (json!({"prompt": long}), "prompt"),
        (json!({"prompt": over}), "prompt"),
        (json!({"prompt": vec!["a"; 300]}), "prompt"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": -1}), "max_tokens"),
        (json!({"max_tokens": 1.5}), "max_tokens"),
        (json!({"max_tokens": "5"}), "max_tokens"),
        (json!({"max_tokens": 1000000000}), "max_tokens"),
        (json!({"max_tokens": 512}), "prompt"),
        (json!({"n": 0}), "n"),
        (json!({"n": 1000000000}), "n"),
        (json!({"n": [1]}), "n"),
        (json!({"best_of": 2}), "best_of"),
        (json!({"temperature": -0.1}), "temperature"),
        (json!({"temperature": 1e9}), "temperature"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"top_p": 1.1}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"top_k": 1000000000}), "top_k"),
        (json!({"min_p": 2}), "min_p"),
        (json!({"presence_penalty": 3}), "presence_penalty"),
        (json!({"frequency_penalty": -3}), "frequency_penalty"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"seed": "x"}), "seed"),
        (json!({"seed": 1e30}), "seed"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias"),
        (json!({"logit_bias": {"999": 1}}), "logit_bias"),
        (json!({"logit_bias": {"1": 101}}), "logit_bias"),
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"logprobs": -1}), "logprobs"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"prompt_logprobs": 21}), "prompt_logprobs"),
        (json!({"prompt_logprobs": 1, "stream": true}), "prompt_logprobs"),
        (json!({"stop": ""}), "stop"),
        (json!({"stop": [1]}), "stop"),
        (json!({"stop": vec!["a"; 17]}), "stop"),
        (json!({"stop": "a".repeat(1025)}), "stop"),
        (json!({"stop_token_ids": [VOCAB]}), "stop_token_ids"),
        (json!({"stop_token_ids": vec![1; 257]}), "stop_token_ids"),
        (json!({"stream": "yes"}), "stream"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"stream": true, "stream_options": 1}), "stream_options"),
        (json!({"echo": 1}), "echo"),
        (json!({"user": 1}), "user"),
        (json!({"ignore_eos": "no"}), "ignore_eos"),
        (json!({"return_token_ids": 1}), "return_token_ids"),
        (json!({"suffix": "x"}), "suffix"),
        (json!({"prompt_embeds": "AAAA"}), "prompt_embeds"),
        (json!({"min_tokens": 3}), "min_tokens"),
        (json!({"response_format": {"type": "json_object"}}), "response_format"),
        (json!({"guided_regex": "(a+)+"}), "guided_regex"),
    ] {
        let mut body = json!({"model": "tiny", "prompt": "hello"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = post(served.address, "/v1/completions", &body).await;
        assert_eq!(answer.status, 400, "{more}: {}", answer.body);
        let error = &answer.json()["error"];
        assert_eq!(error["param"], param, "{more}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()));
    }
    // Nothing of all this reached a router.
    assert_eq!(router.seen.lock().len(), 0);
}

#[tokio::test]
async fn every_bad_message_is_named() {
    let router = router::start("a").await;
    let served = serve(&[&router], |_| {}).await;
    let user = json!({"role": "user", "content": "a"});
    for (more, param) in [
        (json!({"messages": null}), "messages"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": "hi"}), "messages"),
        (json!({"messages": [3]}), "messages[0]"),
        (json!({"messages": [user, {"content": "a"}]}), "messages[1].role"),
        (json!({"messages": [{"role": "root", "content": "a"}]}), "messages[0].role"),
        (json!({"messages": [{"role": 1, "content": "a"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "tool", "content": "a"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        (json!({"messages": [{"role": "user", "content": 7}]}), "messages[0].content"),
        (json!({"messages": [{"role": "user", "content": []}]}), "messages[0].content"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "messages[0].content[0].type",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
            "messages[0].content[0].text",
        ),
        (json!({"messages": [{"role": "user", "content": "a", "name": 1}]}), "messages[0].name"),
        (
            json!({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}),
            "messages[0].tool_calls",
        ),
        (json!({"messages": [{"role": "user", "content": "a".repeat(600)}]}), "messages"),
        (json!({"tools": [{"type": "function"}]}), "tools"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"functions": [{}]}), "functions"),
        (json!({"modalities": ["audio"]}), "modalities"),
        (json!({"audio": {"voice": "x"}}), "audio"),
        (json!({"chat_template": "{{ 1 }}"}), "chat_template"),
        (json!({"chat_template_kwargs": {"a": 1}}), "chat_template_kwargs"),
        (json!({"logprobs": 1}), "logprobs"),
        (json!({"top_logprobs": 1}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"max_completion_tokens": 0}), "max_completion_tokens"),
        (json!({"max_completion_tokens": -5}), "max_completion_tokens"),
        (json!({"echo": true}), "echo"),
    ] {
        let mut body = json!({"model": "tiny", "messages": [user]});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = post(served.address, "/v1/chat/completions", &body).await;
        assert_eq!(answer.status, 400, "{more}: {}", answer.body);
        assert_eq!(answer.json()["error"]["param"], param, "{more}: {}", answer.body);
    }
    assert_eq!(router.seen.lock().len(), 0);
}

#[tokio::test]
async fn what_asks_for_nothing_special_passes() {
    let router = router::start("a").await;
    let served = serve(&[&router], |_| {}).await;
    for more in [
        json!({"tools": [], "tool_choice": "none", "response_format": {"type": "text"}}),
        json!({"modalities": ["text"], "parallel_tool_calls": true, "store": false}),
        json!({"unknown": {"deep": [1, 2]}, "metadata": {"a": "b"}, "service_tier": "auto"}),
        json!({"temperature": null, "stop": null, "max_tokens": null, "logit_bias": null}),
        json!({"best_of": 1, "n": 1, "top_k": -1, "top_p": 1, "seed": -9, "user": "u"}),
        json!({"stop": [], "top_k": 5000, "model": null}),
    ] {
        let mut body = json!({"messages": [{"role": "developer", "content": "a"}]});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = post(served.address, "/v1/chat/completions", &body).await;
        assert_eq!(answer.status, 200, "{more}: {}", answer.body);
    }
}

#[tokio::test]
async fn context_is_counted_exactly() {
    let router = router::start("a").await;
    let served = serve(&[&router], |_| {}).await;
    for (prompt, max_tokens, status) in
        [(511, Some(1), 200), (511, None, 200), (512, None, 400), (511, Some(2), 400)]
    {
        let body = json!({"prompt": vec![1; prompt], "max_tokens": max_tokens});
        let answer = post(served.address, "/v1/completions", &body).await;
        assert_eq!(answer.status, status, "{prompt} {max_tokens:?}: {}", answer.body);
        if status == 400 {
            assert_eq!(answer.json()["error"]["code"], "context_length_exceeded");
        }
    }
}

#[tokio::test]
async fn bodies_that_are_no_request_are_refused() {
    let router = router::start("a").await;
    let served = serve(&[&router], |config| config.max_body_bytes = 300_000).await;
    let deep = format!("{{\"prompt\": {}", "[".repeat(100_000));
    let large = format!("{{\"prompt\": \"{}\"}}", "a".repeat(400_000));
    let chunked = "transfer-encoding: chunked\r\n";
    for (method, path, headers, body, status) in [
        ("POST", "/v1/completions", JSON, &b"{"[..], 400),
        ("POST", "/v1/completions", JSON, b"", 400),
        ("POST", "/v1/completions", JSON, b"[]", 400),
        ("POST", "/v1/completions", JSON, b"null", 400),
        ("POST", "/v1/completions", JSON, b"{\"prompt\": \"\xff\"}", 400),
        ("POST", "/v1/completions", JSON, b"{\"prompt\": \"\\ud800\"}", 400),
        ("POST", "/v1/completions", JSON, b"{\"prompt\": \"a\", \"temperature\": NaN}", 400),
        ("POST", "/v1/completions", JSON, b"{\"prompt\": \"a\", \"n\": 1e999}", 400),
        ("POST", "/v1/completions", JSON, deep.as_bytes(), 400),
        ("POST", "/v1/completions", JSON, large.as_bytes(), 413),
        ("POST", "/v1/completions", "", b"{\"prompt\": \"a\"}", 200),
        ("POST", "/v1/completions", "content-type: text/plain\r\n", b"{\"prompt\": \"a\"}", 415),
        ("POST", "/v1/completions", JSON, b"{\"model\": \"gpt-4\", \"prompt\": \"a\"}", 404),
        ("POST", "/v1/embeddings", JSON, b"{}", 404),
        ("GET", "/v1/completions", "", b"", 405),
        ("DELETE", "/v1/models", "", b"", 405),
        ("GET", "/no/such/thing", "", b"", 404),
    ] {
        let answer = raw(served.address, &request(method, path, headers, body)).await;
        assert_eq!(answer.status, status, "{method} {path}: {}", answer.body);
        if status != 200 {
            let error = &answer.json()["error"];
            assert!(error["message"].is_string() && error.get("param").is_some(), "{error}");
        }
        if status == 405 {
            assert!(answer.header("allow").is_some(), "{}", answer.head);
        }
    }
    // The same over the limit, without saying how long it is.
    let mut body =
        format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{chunked}\r\n");
    for _ in 0..4 {
        body.push_str(&format!("{:x}\r\n{}\r\n", 100_000, "a".repeat(100_000)));
    }
    body.push_str("0\r\n\r\n");
    assert_eq!(raw(served.address, body.as_bytes()).await.status, 413);
    // A length that is a lie, and headers without end.
    let lie = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\
                expect: 100-continue\r\nconnection: close\r\n\r\n";
    assert_eq!(raw(served.address, lie).await.status, 413);
    let many = format!("GET / HTTP/1.1\r\nhost: x\r\na: {}\r\n\r\n", "b".repeat(1 << 20));
    assert_eq!(raw(served.address, many.as_bytes()).await.status, 431);
    let many = format!("GET / HTTP/1.1\r\nhost: x\r\n{}\r\n", "a: b\r\n".repeat(10_000));
    assert_eq!(raw(served.address, many.as_bytes()).await.status, 431);
    assert_eq!(get(served.address, "/healthz").await.status, 200);
}

#[tokio::test]
async fn strange_names_do_not_add_series() {
    let router = router::start("a").await;
    let served = serve(&[&router], |_| {}).await;
    let series = async || get(served.address, "/metrics").await.body.lines().count();
    let ask = async |name: &str| {
        let body = json!({"model": name, "user": name, "prompt": "a"});
        post(served.address, "/v1/completions", &body).await.status
    };
    assert_eq!(ask("x").await, 404);
    get(served.address, "/x").await;
    let before = {
        series().await;
        series().await
    };
    for n in 0..50 {
        assert_eq!(ask(&format!("model-{n}")).await, 404);
        get(served.address, &format!("/path-{n}")).await;
    }
    assert_eq!(series().await, before);
}

#[tokio::test]
async fn a_second_request_on_a_connection_is_answered() {
    let router = router::start("a").await;
    let served = serve(&[&router], |_| {}).await;
    let mut socket = tokio::net::TcpStream::connect(served.address).await.unwrap();
    for (body, status) in [(json!({"prompt": 3}), "400"), (json!({"prompt": "a"}), "200")] {
        let body: String = Value::to_string(&body);
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        socket.write_all(head.as_bytes()).await.unwrap();
        let mut answer = [0; 4096];
        let read = socket.read(&mut answer).await.unwrap();
        let line = String::from_utf8_lossy(&answer[..read]);
        assert!(line.starts_with(&format!("HTTP/1.1 {status}")), "{line}");
    }
}
