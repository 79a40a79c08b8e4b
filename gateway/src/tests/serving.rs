//! The gateway over a real socket, in front of scripted routers.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mesh::lifecycle::Shutdown;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::Code;

use super::client::{get, post, raw, request};
use super::router::{self, FakeRouter, score};
use super::*;
use crate::{Config, Gateway};

/// A gateway on a free port. Stops when dropped.
pub struct Served {
    pub address: SocketAddr,
    shutdown: Shutdown,
    _dir: Scratch,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.shutdown.trigger();
    }
}

pub async fn serve(routers: &[&FakeRouter], adjust: impl FnOnce(&mut Config)) -> Served {
    let dir = model_dir(&byte_level());
    let endpoints = routers.iter().map(|router| router.endpoint.clone()).collect();
    let mut config = Config::new(dir.path(), endpoints);
    config.listen = "127.0.0.1:0".to_owned();
    config.model_name = "tiny".to_owned();
    adjust(&mut config);
    let shutdown = Shutdown::new();
    let gateway = Gateway::bind(&config, shutdown.clone()).await.unwrap();
    let address = gateway.local_addr();
    tokio::spawn(gateway.serve());
    let served = Served { address, shutdown, _dir: dir };
    while !routers.is_empty() && get(address, "/readyz").await.status != 200 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    served
}

pub async fn until(mut condition: impl FnMut() -> bool) {
    while !condition() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub fn completion(more: Value) -> Value {
    let mut body = json!({"model": "tiny", "prompt": "hello", "max_tokens": 64});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

pub fn text_of(chunks: &[Value]) -> String {
    chunks.iter().filter_map(|c| c["choices"][0]["text"].as_str()).collect()
}

#[tokio::test]
async fn a_completion_has_openais_shape() {
    let router = router::start("wörld").await;
    let served = serve(&[&router], |_| {}).await;
    let answer = post(served.address, "/v1/completions", &completion(json!({"seed": 7}))).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let body = answer.json();
    assert_eq!(body["object"], "text_completion");
    assert_eq!(body["model"], "tiny");
    assert!(body["id"].as_str().unwrap().starts_with("cmpl-"));
    let choice = &body["choices"][0];
    assert_eq!(choice["text"], "wörld");
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(choice["logprobs"], Value::Null);
    // Six bytes and the end id.
    assert_eq!(
        body["usage"],
        json!({"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8})
    );
    let seen = router.seen.lock()[0].clone();
    assert_eq!(seen.tokens, [259]);
    assert_eq!(seen.stop_ids, [EOS]);
    let sampling = seen.sampling.unwrap();
    assert_eq!((sampling.seed, sampling.temperature, sampling.top_p), (7, 1.0, 1.0));
}

#[tokio::test]
async fn a_stream_says_the_same_in_pieces() {
    let router = router::start("wörld€").await;
    let served = serve(&[&router], |_| {}).await;
    let body = completion(json!({"stream": true, "stream_options": {"include_usage": true},
                                 "return_token_ids": true}));
    let answer = post(served.address, "/v1/completions", &body).await;
    assert_eq!(answer.header("content-type"), Some("text/event-stream; charset=utf-8"));
    let chunks = answer.chunks();
    assert_eq!(text_of(&chunks), "wörld€");
    assert!(chunks.iter().all(|c| c["id"] == chunks[0]["id"]));
    assert!(chunks.iter().all(|c| c["created"] == chunks[0]["created"]));
    assert_eq!(chunks[0]["choices"][0]["prompt_token_ids"], json!([259]));
    let ids: Vec<u64> = chunks
        .iter()
        .filter_map(|c| c["choices"][0]["token_ids"].as_array())
        .flatten()
        .map(|id| id.as_u64().unwrap())
        .collect();
    let mut expected: Vec<u64> = "wörld€".bytes().map(u64::from).collect();
    expected.push(u64::from(EOS));
    assert_eq!(ids, expected);
    let (usage, rest) = chunks.split_last().unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 10);
    assert!(rest.iter().all(|c| c.get("usage") == Some(&Value::Null)));
    let finishes: Vec<&Value> =
        rest.iter().map(|c| &c["choices"][0]["finish_reason"]).filter(|f| !f.is_null()).collect();
    assert_eq!(finishes, ["stop"]);
}

#[tokio::test]
async fn chat_has_openais_shape_plain_and_streamed() {
    let router = router::start("Hi").await;
    let served = serve(&[&router], |_| {}).await;
    let mut body = json!({"model": "tiny", "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ], "temperature": 0, "logprobs": true, "top_logprobs": 2});
    let answer = post(served.address, "/v1/chat/completions", &body).await.json();
    assert_eq!(answer["object"], "chat.completion");
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"], json!({"role": "assistant", "content": "Hi", "refusal": null}));
    assert_eq!(
        choice["logprobs"]["content"][0],
        json!({"token": "H", "logprob": -0.72, "bytes": [72], "top_logprobs": [
            {"token": "a", "logprob": -1.0, "bytes": [97]},
            {"token": "b", "logprob": -2.0, "bytes": [98]}]})
    );
    let seen = router.seen.lock()[0].clone();
    assert_eq!(seen.tokens, [BOS, 115, USER, 97, 10, 98, ASSISTANT]);
    // Without a limit, up to the context.
    assert_eq!(seen.max_tokens, 512 - 7);

    body["stream"] = json!(true);
    let chunks = post(served.address, "/v1/chat/completions", &body).await.chunks();
    assert_eq!(chunks[0]["object"], "chat.completion.chunk");
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let text: String =
        chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, "Hi");
    let last = &chunks.last().unwrap()["choices"][0];
    assert_eq!((&last["delta"], &last["finish_reason"]), (&json!({}), &json!("stop")));
    assert!(chunks.iter().all(|c| c.get("usage").is_none()));
}

#[tokio::test]
async fn stop_strings_and_ids_end_the_text() {
    let router = router::start("one two three").await;
    let served = serve(&[&router], |_| {}).await;
    for (more, text, reason, stop_reason) in [
        (json!({"stop": " t"}), "one", "stop", json!(" t")),
        (
            json!({"stop": ["x", "o t"], "include_stop_str_in_output": true}),
            "one two t",
            "stop",
            json!("o t"),
        ),
        (json!({"stop_token_ids": [119]}), "one t", "stop", json!(119)),
        (
            json!({"stop_token_ids": [119], "include_stop_str_in_output": true}),
            "one tw",
            "stop",
            json!(119),
        ),
        (json!({"max_tokens": 3}), "one", "length", Value::Null),
        (json!({"max_tokens": 5, "stop": " two"}), "one t", "length", Value::Null),
        (json!({}), "one two three", "stop", Value::Null),
    ] {
        for stream in [false, true] {
            let mut body = completion(more.clone());
            body["stream"] = json!(stream);
            let answer = post(served.address, "/v1/completions", &body).await;
            let (got, last) = if stream {
                let chunks = answer.chunks();
                (text_of(&chunks), chunks.last().unwrap()["choices"][0].clone())
            } else {
                let choice = answer.json()["choices"][0].clone();
                (choice["text"].as_str().unwrap().to_owned(), choice)
            };
            assert_eq!(got, text, "{more}");
            assert_eq!(last["finish_reason"], reason, "{more}");
            assert_eq!(last["stop_reason"], stop_reason, "{more}");
        }
    }
    until(|| router.live.load(Ordering::SeqCst) == 0).await;
}

#[tokio::test]
async fn ignore_eos_goes_on_to_the_length() {
    let router = router::start("a").await;
    let served = serve(&[&router], |_| {}).await;
    let body = completion(json!({"ignore_eos": true, "max_tokens": 5, "return_token_ids": true}));
    let choice = post(served.address, "/v1/completions", &body).await.json()["choices"][0].clone();
    assert_eq!(choice["text"], "a");
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(choice["token_ids"], json!([97, EOS, EOS, EOS, EOS]));
    let body =
        completion(json!({"ignore_eos": true, "max_tokens": 3, "skip_special_tokens": false}));
    let text =
        post(served.address, "/v1/completions", &body).await.json()["choices"][0]["text"].clone();
    assert_eq!(text, format!("a{0}{0}", CONTROLS[1].0));
}

#[tokio::test]
async fn several_prompts_and_choices_are_kept_apart() {
    let router = router::start("xy").await;
    let served = serve(&[&router], |_| {}).await;
    let body = completion(json!({"prompt": [[1, 2], [3]], "n": 2, "seed": 5}));
    let answer = post(served.address, "/v1/completions", &body).await.json();
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 4);
    for (index, choice) in choices.iter().enumerate() {
        assert_eq!((&choice["index"], &choice["text"]), (&json!(index), &json!("xy")));
    }
    // A prompt counts once, however many choices it has.
    assert_eq!(answer["usage"]["prompt_tokens"], 3);
    let mut seeds: Vec<(usize, u64)> = router
        .seen
        .lock()
        .iter()
        .map(|seen| (seen.tokens.len(), seen.sampling.clone().unwrap().seed))
        .collect();
    seeds.sort_unstable();
    assert_eq!(seeds, [(1, 5), (1, 6), (2, 5), (2, 6)]);
}

#[tokio::test]
async fn logprobs_and_echo_are_as_clients_expect() {
    let router = router::start("é!").await;
    let served = serve(&[&router], |_| {}).await;
    let body = completion(json!({"prompt": [104, 105], "echo": true, "logprobs": 1,
                                 "max_tokens": 3, "prompt_logprobs": 1}));
    let choice = post(served.address, "/v1/completions", &body).await.json()["choices"][0].clone();
    assert_eq!(choice["text"], "hié!");
    let logprobs = &choice["logprobs"];
    assert_eq!(logprobs["tokens"], json!(["h", "i", "\u{FFFD}", "\u{FFFD}", "!"]));
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2, 2, 3]));
    assert_eq!(logprobs["token_logprobs"], json!([null, -1.05, -1.95, -1.69, -0.33]));
    assert_eq!(logprobs["top_logprobs"][0], Value::Null);
    assert_eq!(logprobs["top_logprobs"][1], json!({"a": -1.0, "i": -1.05}));
    assert_eq!(
        choice["prompt_logprobs"],
        json!([null, {"97": {"logprob": -1.0, "rank": 1, "decoded_token": "a"},
                      "105": {"logprob": -1.05, "rank": null, "decoded_token": "i"}}])
    );
    assert_eq!(score(105, 1).logprob, -1.05);

    let body = completion(json!({"prompt": "hi", "echo": true, "logprobs": 0, "max_tokens": 0}));
    let answer = post(served.address, "/v1/completions", &body).await.json();
    assert_eq!(answer["choices"][0]["text"], "hi");
    assert_eq!(answer["choices"][0]["logprobs"]["token_logprobs"], json!([null, -1.05]));
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["usage"]["completion_tokens"], 0);
}

#[tokio::test]
async fn a_lost_router_is_replaced_in_mid_stream() {
    let (a, b) = (router::start("abcdefgh").await, router::start("abcdefgh").await);
    for router in [&a, &b] {
        router.script.lock().break_at = vec![6, 3];
    }
    let served = serve(&[&a, &b], |_| {}).await;
    let body = completion(json!({"stream": true, "logprobs": 0, "prompt": [1, 2]}));
    let chunks = post(served.address, "/v1/completions", &body).await.chunks();
    assert_eq!(text_of(&chunks), "abcdefgh");
    let mut seen: Vec<_> = a.seen.lock().iter().chain(b.seen.lock().iter()).cloned().collect();
    seen.sort_by_key(|request| request.emitted);
    assert!(seen.len() >= 2);
    for request in &seen {
        let emitted = request.emitted as usize;
        assert_eq!(request.tokens.len(), 2 + emitted);
        let ids: Vec<u32> = "abcdefgh".bytes().take(emitted).map(u32::from).collect();
        assert_eq!(request.tokens[2..], ids);
        assert_eq!(request.max_tokens, 64);
        assert_eq!(request.sampling, seen[0].sampling);
    }
}

#[tokio::test]
async fn another_numerics_class_does_not_take_a_stream_over() {
    let (a, b) = (router::start("abc").await, router::start("xyz").await);
    b.script.lock().status.numerics = "bf16".to_owned();
    a.script.lock().break_at = vec![1];
    b.script.lock().break_at = vec![1];
    let served = serve(&[&a, &b], |_| {}).await;
    let body = completion(json!({"stream": true, "prompt": [1]}));
    let text = text_of(&post(served.address, "/v1/completions", &body).await.chunks());
    assert!(text == "abc" || text == "xyz", "{text}");
}

#[tokio::test]
async fn refusals_of_routers_become_statuses() {
    let router = router::start("a").await;
    let served = serve(&[&router], |config| config.max_concurrent = 4).await;
    for (refuse, status, code) in [
        (vec![Code::InvalidArgument], 400, Value::Null),
        (vec![Code::ResourceExhausted], 429, json!("overloaded")),
        (vec![Code::DeadlineExceeded], 504, json!("timeout")),
        (vec![Code::Internal; 16], 503, json!("unavailable")),
        (vec![Code::Internal; 2], 200, Value::Null),
    ] {
        for stream in [false, true] {
            router.script.lock().refuse = refuse.clone();
            let body = completion(json!({"stream": stream}));
            let answer = post(served.address, "/v1/completions", &body).await;
            assert_eq!(answer.status, status, "{refuse:?} {}", answer.body);
            if status != 200 {
                assert_eq!(answer.json()["error"]["code"], code);
            }
            let retry = matches!(status, 429 | 503);
            assert_eq!(answer.header("retry-after").is_some(), retry);
        }
    }
    router.script.lock().refuse.clear();
    let body = completion(json!({"n": 5}));
    let answer = post(served.address, "/v1/completions", &body).await;
    assert_eq!(answer.status, 400, "{}", answer.body);
}

#[tokio::test]
async fn a_stream_that_breaks_has_no_done() {
    let router = router::start("abcdef").await;
    router.script.lock().break_at = vec![2; 64];
    let served = serve(&[&router], |config| config.request_timeout = Duration::from_secs(1)).await;
    let answer =
        post(served.address, "/v1/completions", &completion(json!({"stream": true}))).await;
    assert_eq!(answer.status, 200);
    let events = answer.events();
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert!(last["error"]["message"].is_string(), "{last}");
    assert!(!answer.body.contains("[DONE]"));
}

#[tokio::test]
async fn no_ready_router_is_503_and_not_ready() {
    let router = router::start("a").await;
    let served = serve(&[&router], |_| {}).await;
    {
        let mut script = router.script.lock();
        script.status.ready = false;
        script.status.detail = "expert 3/7 has no owner".to_owned();
    }
    let answer = loop {
        let answer = get(served.address, "/readyz").await;
        if answer.status == 503 {
            break answer;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert!(answer.body.contains("expert 3/7 has no owner"), "{}", answer.body);
    let answer = post(served.address, "/v1/completions", &completion(json!({}))).await;
    assert_eq!(answer.status, 503);
    assert_eq!(answer.header("retry-after"), Some("1"));
    assert_eq!(get(served.address, "/healthz").await.status, 200);
}

#[tokio::test]
async fn the_door_is_shut_when_full_and_opens_again() {
    let router = router::start(&"a".repeat(400)).await;
    router.script.lock().pause = Duration::from_millis(20);
    let served = serve(&[&router], |config| config.max_concurrent = 2).await;
    let address = served.address;
    let body = completion(json!({"n": 2, "max_tokens": 400}));
    let slow = tokio::spawn(async move { post(address, "/v1/completions", &body).await.status });
    until(|| router.live.load(Ordering::SeqCst) == 2).await;
    let answer = post(address, "/v1/completions", &completion(json!({}))).await;
    assert_eq!((answer.status, answer.header("retry-after")), (429, Some("1")));
    // The client gives up: its sequences end and their permits come back.
    slow.abort();
    until(|| router.live.load(Ordering::SeqCst) == 0).await;
    router.script.lock().pause = Duration::ZERO;
    let answer = post(address, "/v1/completions", &completion(json!({"max_tokens": 1}))).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_sequences() {
    let router = router::start(&"a".repeat(400)).await;
    router.script.lock().pause = Duration::from_millis(10);
    let served = serve(&[&router], |_| {}).await;
    for stream in [true, false] {
        let body = completion(json!({"stream": stream, "max_tokens": 400, "n": 3})).to_string();
        let head = "content-type: application/json\r\n";
        let mut socket = tokio::net::TcpStream::connect(served.address).await.unwrap();
        socket.write_all(&request("POST", "/v1/completions", head, body.as_bytes())).await.unwrap();
        until(|| router.live.load(Ordering::SeqCst) == 3).await;
        if stream {
            socket.read_exact(&mut [0; 200]).await.unwrap();
        }
        drop(socket);
        until(|| router.live.load(Ordering::SeqCst) == 0).await;
    }
    let metrics = get(served.address, "/metrics").await.body;
    assert!(metrics.contains("moemesh_gateway_cancelled_total 2"), "{metrics}");
    assert!(metrics.contains("moemesh_gateway_sequences_in_flight 0"), "{metrics}");
}

#[tokio::test]
async fn models_health_metrics_and_request_ids_are_told() {
    let router = router::start("a").await;
    router.script.lock().status.max_context = 100;
    let served = serve(&[&router], |_| {}).await;
    let models = get(served.address, "/v1/models").await.json();
    assert_eq!(models["data"][0]["id"], "tiny");
    assert_eq!(
        models["data"][0]["moemesh"],
        json!({"numerics": "f32", "device": "cpu", "context_length": 100, "vocab_size": VOCAB,
               "routers": 1, "routers_ready": 1})
    );
    assert_eq!(get(served.address, "/v1/models/tiny").await.status, 200);
    assert_eq!(get(served.address, "/v1/models/a/b").await.status, 404);
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
    let head = format!("x-request-id: my-1\r\ntraceparent: {parent}\r\n");
    let body = completion(json!({})).to_string();
    let answer =
        raw(served.address, &request("POST", "/v1/completions", &head, body.as_bytes())).await;
    assert_eq!(answer.header("x-request-id"), Some("my-1"));
    assert_eq!(answer.json()["id"], "cmpl-my-1");
    let seen = router.seen.lock()[0].clone();
    assert!(seen.request_id.starts_with("my-1-"), "{}", seen.request_id);
    assert_eq!(seen.traceparent, parent);
    let metrics = get(served.address, "/metrics").await.body;
    for line in [
        "moemesh_gateway_requests_total{route=\"completions\",status=\"200\"} 1",
        "moemesh_gateway_completion_tokens_total 2",
        "moemesh_gateway_time_to_first_token_seconds_count 1",
        "moemesh_gateway_routers_ready 1",
    ] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
}

#[tokio::test]
async fn a_port_in_use_and_a_missing_model_are_one_clear_line() {
    let router = router::start("a").await;
    let served = serve(&[&router], |_| {}).await;
    let dir = model_dir(&byte_level());
    let mut config = Config::new(dir.path(), vec![router.endpoint.clone()]);
    config.listen = served.address.to_string();
    let error = Gateway::bind(&config, Shutdown::new()).await.err().unwrap();
    assert_eq!(error.to_string(), format!("address {} is in use", served.address));
    config.model_dir = dir.path().join("absent");
    let error = Gateway::bind(&config, Shutdown::new()).await.err().unwrap();
    assert!(error.to_string().contains("absent/config.json"), "{error}");
}

#[tokio::test]
async fn shutdown_lets_streams_end() {
    let router = router::start("abcdefghij").await;
    router.script.lock().pause = Duration::from_millis(20);
    let served = serve(&[&router], |_| {}).await;
    let address = served.address;
    let body = completion(json!({"stream": true}));
    let stream = tokio::spawn(async move { post(address, "/v1/completions", &body).await });
    until(|| router.live.load(Ordering::SeqCst) == 1).await;
    served.shutdown.trigger();
    assert_eq!(text_of(&stream.await.unwrap().chunks()), "abcdefghij");
}
