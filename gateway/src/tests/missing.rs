//! `x-moemesh-on-missing`, in front of a router that lacks experts.

use serde_json::{Value, json};
use tonic::Code;

use super::client::{Answer, raw, request};
use super::router::{self, FakeRouter};
use super::serving::{Served, serve};

/// A router that has told the gateway that it lacks experts.
async fn degraded(text: &str) -> (FakeRouter, Served) {
    let router = router::start(text).await;
    let served = serve(&[&router], |_| {}).await;
    {
        let mut script = router.script.lock();
        script.status.ready = false;
        script.status.degraded = true;
        script.status.detail = "1 experts have no live owner, first layer 1 expert 3".to_owned();
    }
    while super::client::get(served.address, "/readyz").await.status == 200 {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    (router, served)
}

async fn ask(served: &Served, path: &str, policy: &str, body: &Value) -> Answer {
    let policy = match policy {
        "" => "",
        policy => &format!("x-moemesh-on-missing: {policy}\r\n"),
    };
    let headers = format!("content-type: application/json\r\n{policy}");
    raw(served.address, &request("POST", path, &headers, body.to_string().as_bytes())).await
}

fn completion(stream: bool) -> Value {
    let mut body = json!({"model": "tiny", "prompt": "hello", "max_tokens": 64, "stream": stream});
    if stream {
        body["stream_options"] = json!({ "include_usage": true });
    }
    body
}

#[tokio::test]
async fn only_requests_that_drop_are_served_without_experts_and_say_so() {
    let (router, served) = degraded("Hi").await;
    for policy in ["", "wait", "fail"] {
        let answer = ask(&served, "/v1/completions", policy, &completion(false)).await;
        assert_eq!(answer.status, 503, "{policy}: {}", answer.body);
        assert!(answer.body.contains("layer 1 expert 3"), "{}", answer.body);
    }
    // Two letters and the end id, each of which did without two.
    let answer = ask(&served, "/v1/completions", "drop", &completion(false)).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(answer.header("x-moemesh-degraded"), Some("6"));
    let body = answer.json();
    assert_eq!(body["moemesh"], json!({ "dropped_experts": 6 }));
    assert_eq!(body["choices"][0]["text"], "Hi");

    let answer = ask(&served, "/v1/completions", "drop", &completion(true)).await;
    assert_eq!(answer.header("x-moemesh-degraded"), Some("2"), "known when the head is sent");
    let chunks = answer.chunks();
    let marked: Vec<&Value> = chunks.iter().filter(|c| c.get("moemesh").is_some()).collect();
    assert_eq!(marked.len(), 2, "the finish and the usage: {}", answer.body);
    assert!(marked.iter().all(|c| c["moemesh"]["dropped_experts"] == 6));

    let mut chat = json!({"model": "tiny", "messages": [{"role": "user", "content": "a"}]});
    let answer = ask(&served, "/v1/chat/completions", "drop", &chat).await;
    assert_eq!(answer.json()["moemesh"]["dropped_experts"], 6, "{}", answer.body);
    chat["stream"] = json!(true);
    let answer = ask(&served, "/v1/chat/completions", "drop", &chat).await;
    let chunks = answer.chunks();
    assert_eq!(chunks.last().unwrap()["moemesh"]["dropped_experts"], 6, "{}", answer.body);
    let metrics = super::client::get(served.address, "/metrics").await.body;
    assert!(metrics.contains("moemesh_gateway_degraded_total 4"), "{metrics}");
    drop(router);
}

#[tokio::test]
async fn a_whole_answer_is_not_marked_and_a_wrong_header_is_refused_by_name() {
    let router = router::start("Hi").await;
    let served = serve(&[&router], |_| {}).await;
    let answer = ask(&served, "/v1/completions", "drop", &completion(false)).await;
    assert_eq!((answer.status, answer.header("x-moemesh-degraded")), (200, None));
    assert_eq!(answer.json().get("moemesh"), None);
    assert_eq!(router.seen.lock()[0].on_missing, 2);
    for wrong in ["Drop", "drop ,wait", "\u{1}", "never"] {
        let answer = ask(&served, "/v1/completions", wrong, &completion(false)).await;
        assert_eq!(answer.status, 400, "{wrong:?}: {}", answer.body);
    }
    let answer = ask(&served, "/v1/completions", "never", &completion(false)).await;
    assert!(answer.body.contains("x-moemesh-on-missing: `never`"), "{}", answer.body);
}

#[tokio::test]
async fn a_request_that_would_rather_fail_is_not_tried_again() {
    let router = router::start("Hi").await;
    let served = serve(&[&router], |_| {}).await;
    router.script.lock().refuse = vec![Code::FailedPrecondition];
    let answer = ask(&served, "/v1/completions", "fail", &completion(false)).await;
    assert_eq!(answer.status, 503, "{}", answer.body);
    assert_eq!(answer.json()["error"]["code"], "expert_missing");
    assert_eq!(router.seen.lock().len(), 1);
}
