//! `moemesh up` as its user sees it: it starts, restarts what dies, drains on
//! Ctrl-C and leaves nothing behind.

use std::time::Duration;

use serde_json::json;

use crate::support::http::{self, Address};
use crate::support::process::signal;
use crate::support::{Fixture, Up, block_on};

async fn start(extra: &[&str]) -> Up {
    Up::start(&Fixture::load("plain").dir, extra, &[]).await
}

async fn alive(pid: u32) -> bool {
    for _ in 0..200 {
        if !std::path::Path::new(&format!("/proc/{pid}")).exists() {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    true
}

async fn completes(http: &Address) -> bool {
    let body = json!({ "model": "plain", "prompt": [5, 6, 7], "max_tokens": 4 });
    http::post(http, "/v1/completions", &body).await.0 == 200
}

#[test]
fn up_restarts_what_dies_and_drains_on_a_signal() {
    block_on(async {
        let up = start(&["--expert-nodes", "2"]).await;
        assert!(completes(&up.http).await);
        for role in ["expert-node", "router", "gateway"] {
            let victim = up.children(role)[0];
            signal(victim, "KILL");
            assert!(!alive(victim).await);
            let mut served = false;
            for _ in 0..600 {
                let ready = http::get(&up.http, "/readyz").await;
                if ready.is_ok_and(|(status, _)| status == 200) && completes(&up.http).await {
                    served = true;
                    break;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            assert!(served, "a killed {role} was not replaced");
            assert!(!up.children(role).contains(&victim));
        }
        let children: Vec<u32> = ["expert-node", "router", "gateway"]
            .iter()
            .flat_map(|role| up.children(role))
            .collect();
        assert_eq!(children.len(), 4);
        let status = up.end("INT");
        assert!(status.success(), "drained with {status}");
        for child in children {
            assert!(!alive(child).await, "process {child} was left behind");
        }
    });
}

#[test]
fn children_do_not_outlive_a_killed_up() {
    block_on(async {
        let up = start(&["--expert-nodes", "1"]).await;
        let children: Vec<u32> = ["expert-node", "router", "gateway"]
            .iter()
            .flat_map(|role| up.children(role))
            .collect();
        assert_eq!(children.len(), 3);
        up.end("KILL");
        for child in children {
            assert!(!alive(child).await, "process {child} outlived its parent");
        }
    });
}

#[test]
fn draining_finishes_what_runs() {
    block_on(async {
        let up = start(&["--expert-nodes", "2"]).await;
        let body = json!({
            "model": "plain", "prompt": [5, 6, 7], "max_tokens": 150, "ignore_eos": true,
            "stream": true,
        });
        let mut events = http::stream(&up.http, "/v1/completions", &body).await;
        assert!(events.next().await.is_some());
        up.signal("TERM");
        let mut last = String::new();
        while let Some(event) = events.next().await {
            last = event;
        }
        assert_eq!(last, "[DONE]");
        assert!(up.wait().success());
    });
}
