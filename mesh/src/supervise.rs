//! Keeps an actor alive. actix neither restarts a panicked actor nor tells
//! anyone, so the actor is rebuilt here from a factory whenever it ends.
//!
//! The pulse an actor carries tells the supervisor of its end: it is dropped
//! with the actor, on a stop as on a panic.

use std::time::Duration;

use actix::{Actor, Addr, Context};
use tokio::sync::mpsc;

const FIRST_RESTART: Duration = Duration::from_millis(10);
const SLOWEST_RESTART: Duration = Duration::from_secs(5);

/// Carried by a supervised actor for as long as it lives.
pub struct Pulse(#[allow(dead_code, reason = "only its drop matters")] mpsc::Sender<()>);

/// Starts the actor that `build` makes and again each time it ends, waiting
/// longer between quick failures. `started` hears every new address. Returns
/// when `build` returns `None`, which is how a supervisor is told to stop.
///
/// Must run on an actix arbiter, as the actors it starts do.
pub async fn keep<A, B, S>(name: String, mut build: B, mut started: S)
where
    A: Actor<Context = Context<A>>,
    B: FnMut(Pulse) -> Option<A>,
    S: FnMut(Addr<A>),
{
    let mut pause = FIRST_RESTART;
    let mut lived = None;
    loop {
        let (beat, mut heart) = mpsc::channel::<()>(1);
        let Some(actor) = build(Pulse(beat)) else { return };
        if let Some(after) = lived {
            tracing::warn!(actor = name, ?after, "actor ended, it is rebuilt");
        }
        let born = tokio::time::Instant::now();
        started(actor.start());
        // Nothing is ever sent: this resolves when the actor's pulse is dropped.
        while heart.recv().await.is_some() {}
        if born.elapsed() > SLOWEST_RESTART {
            pause = FIRST_RESTART;
        }
        lived = Some(born.elapsed());
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(SLOWEST_RESTART);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use actix::{Handler, Message};

    use super::*;

    struct Fragile(#[allow(dead_code)] Pulse);
    impl Actor for Fragile {
        type Context = Context<Self>;
    }
    #[derive(Message)]
    #[rtype(result = "()")]
    struct Break;
    impl Handler<Break> for Fragile {
        type Result = ();
        fn handle(&mut self, _: Break, _: &mut Self::Context) {
            panic!("as told");
        }
    }

    #[actix::test]
    async fn a_panicked_actor_is_rebuilt() {
        let built = Arc::new(AtomicUsize::new(0));
        let (send, mut addresses) = mpsc::channel(8);
        let count = built.clone();
        let build = move |pulse| {
            count.fetch_add(1, Ordering::Relaxed);
            Some(Fragile(pulse))
        };
        actix::spawn(keep("fragile".into(), build, move |address| {
            send.try_send(address).unwrap();
        }));
        for life in 1..=3 {
            let address = addresses.recv().await.unwrap();
            assert_eq!(built.load(Ordering::Relaxed), life);
            assert!(address.send(Break).await.is_err());
        }
    }
}
