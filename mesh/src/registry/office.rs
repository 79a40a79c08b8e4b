//! The office of controller as one router sees it: held for a term while its
//! lease lasts by the router's own clock, or held by another, or by nobody.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use arc_swap::ArcSwap;
use tokio::sync::Notify;

/// Shared by the campaign, which fills it, and the controller; clones are the same.
#[derive(Clone)]
pub struct Office(Arc<Inner>);

struct Inner {
    state: ArcSwap<State>,
    /// The highest term that a node was seen to obey.
    obeyed: AtomicU64,
    /// There is something for the campaign to do.
    wish: Notify,
}

enum State {
    /// For a term that is higher than that of everybody before; nothing may be ordered after `until`.
    Held { term: u64, until: Instant },
    /// Why it is not.
    Vacant(String),
}

impl Default for Office {
    fn default() -> Self {
        Self(Arc::new(Inner {
            state: ArcSwap::from_pointee(State::Vacant("etcd has not answered yet".to_owned())),
            obeyed: AtomicU64::new(0),
            wish: Notify::new(),
        }))
    }
}

impl Office {
    /// The term in which orders may be given now.
    ///
    /// # Errors
    /// Why none may.
    pub fn term(&self, now: Instant) -> Result<u64, String> {
        match &**self.0.state.load() {
            State::Held { term, until } if now < *until => Ok(*term),
            State::Held { term, .. } => Err(format!(
                "etcd does not answer, and term {term} has ended: nothing is moved until it is back"
            )),
            State::Vacant(why) => Err(why.clone()),
        }
    }

    /// A node obeys `term`; whoever is in office has to be above it.
    pub fn saw(&self, term: u64) {
        if self.0.obeyed.fetch_max(term, Ordering::Relaxed) < term {
            self.0.wish.notify_one();
        }
    }

    /// Orders were given in `term` by somebody who does not know them any more: the
    /// next ones need a term of their own.
    pub fn use_up(&self, term: u64) {
        self.saw(term.saturating_add(1));
    }
}

/// The campaign's side.
#[cfg_attr(not(feature = "etcd"), allow(dead_code, reason = "nobody campaigns"))]
impl Office {
    /// In office with `term` until `until`, unless the lease is renewed.
    pub(super) fn hold(&self, term: u64, until: Instant) {
        self.0.state.store(Arc::new(State::Held { term, until }));
    }

    pub(super) fn leave(&self, why: String) {
        self.0.state.store(Arc::new(State::Vacant(why)));
    }

    pub(super) fn obeyed(&self) -> u64 {
        self.0.obeyed.load(Ordering::Relaxed)
    }

    /// Until there is something to do.
    pub(super) async fn wish(&self) {
        self.0.wish.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Waker};
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_term_ends_by_the_holders_own_clock() {
        let (office, now) = (Office::default(), Instant::now());
        assert!(office.term(now).unwrap_err().contains("not answered"));
        office.hold(7, now + Duration::from_secs(5));
        assert_eq!(office.term(now), Ok(7));
        let late = now + Duration::from_secs(5);
        assert!(office.term(late).unwrap_err().contains("term 7 has ended"));
        office.hold(7, late + Duration::from_secs(5));
        assert_eq!(office.term(late), Ok(7), "its lease was renewed");
        office.leave("router-1 is".to_owned());
        assert_eq!(office.term(now), Err("router-1 is".to_owned()));
    }

    #[test]
    fn what_is_new_is_a_wish_and_what_is_known_is_none() {
        let office = Office::default();
        let wished = || at_once(&office);
        assert!(!wished());
        office.saw(3);
        assert_eq!((wished(), office.obeyed()), (true, 3));
        office.saw(2);
        assert_eq!((wished(), office.obeyed()), (false, 3));
    }

    /// Whether there is a wish at once.
    fn at_once(office: &Office) -> bool {
        let wish = std::pin::pin!(office.wish());
        wish.poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }
}
