//! Routers that hang, or are away for a moment: their connections say nothing,
//! so the gateway must notice by itself.

use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::json;

use super::client::{get, post};
use super::router;
use super::serving::{completion, serve, text_of, until};

#[tokio::test]
async fn a_router_that_hangs_is_replaced_in_mid_stream() {
    let (a, b) = (router::start("abcdefgh").await, router::start("abcdefgh").await);
    let served = serve(&[&a, &b], |_| {}).await;
    let body = completion(json!({"stream": true, "prompt": [1, 2]}));
    while !get(served.address, "/readyz").await.body.contains("\"routers_ready\":2") {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // Whichever is preferred hangs; the other is well.
    post(served.address, "/v1/completions", &body).await;
    let (hung, well) = if a.seen.lock().is_empty() { (&b, &a) } else { (&a, &b) };
    hung.script.lock().hang_at = Some(3);
    let chunks = post(served.address, "/v1/completions", &body).await.chunks();
    assert_eq!(text_of(&chunks), "abcdefgh");
    assert_eq!(well.seen.lock().last().unwrap().emitted, 3);
    until(|| hung.live.load(Ordering::SeqCst) == 0).await;
}

#[tokio::test]
async fn a_short_absence_of_every_router_is_waited_for() {
    let router = router::start("ab").await;
    let served = serve(&[&router], |_| {}).await;
    router.script.lock().status.ready = false;
    while get(served.address, "/readyz").await.status == 200 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let script = router.script.clone();
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(300)).await;
        script.lock().status.ready = true;
    });
    let answer = post(served.address, "/v1/completions", &completion(json!({}))).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
}
