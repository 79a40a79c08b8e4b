//! The list of routers, which grows and shrinks.

use super::*;

fn at(port: u16) -> Endpoint {
    Endpoint::Tcp(format!("127.0.0.1:{port}"))
}

fn upstream(configured: &[Endpoint]) -> Arc<Upstream> {
    let metrics = mesh::metrics::Metrics::default().register(Metrics::register);
    Upstream::new(configured, None, 320, metrics).unwrap()
}

fn known(upstream: &Upstream) -> Vec<Endpoint> {
    upstream.routers.load().iter().map(|router| router.endpoint.clone()).collect()
}

#[tokio::test]
async fn routers_that_were_learned_of_are_forgotten_when_they_are_silent() {
    let (upstream, shutdown) = (upstream(&[at(1)]), Shutdown::new());
    shutdown.trigger();
    for named in [at(2), at(1), at(2)] {
        upstream.join(&named, &shutdown);
    }
    assert_eq!(known(&upstream), [at(1), at(2)]);

    let routers = upstream.routers.load_full();
    let (soon, late) = (Instant::now(), Instant::now() + FORGET_AFTER + Duration::from_secs(1));
    assert!(!upstream.forget(&routers[1], soon));
    assert!(!upstream.forget(&routers[0], late), "one that was configured stays");
    assert!(upstream.forget(&routers[1], late));
    assert_eq!(known(&upstream), [at(1)]);
    // It may come back, as a link of its own.
    upstream.join(&at(2), &shutdown);
    assert!(!Arc::ptr_eq(&upstream.routers.load()[1], &routers[1]));
}

#[tokio::test]
async fn without_a_router_it_waits_and_says_for_what() {
    let upstream = upstream(&[]);
    assert!(upstream.readiness().unwrap_err().contains("waiting for routers"));
    assert!(upstream.choose(1, None, &[], false).is_none());
}
