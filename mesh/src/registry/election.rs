//! The controller's key in etcd: whoever creates it is in office while the lease
//! on it lasts. The term is a counter, raised in the same transaction, so that
//! nobody ever has it twice; nodes refuse orders of a lower one.

use std::convert::Infallible;
use std::time::SystemTime;

use etcd_client::{Client, Compare, CompareOp, KeyValue, PutOptions, Txn, TxnOp};
use tokio::time::{sleep, timeout};

use super::Etcd;
use super::etcd::{Lease, PATIENCE, Quiet, RENEW, RETRY, Trouble};
use super::office::Office;
use crate::lifecycle::Shutdown;

const CONTROLLER: &str = "controller";
const TERM: &str = "term";

/// What this router wrote when it took office.
struct Won {
    term: u64,
    /// The revision that created the controller's key: nobody else's has it.
    revision: i64,
    lease: Lease,
}

impl Etcd {
    /// Stands for the office of controller until `shutdown`.
    pub async fn campaign(self, id: String, office: Office, shutdown: Shutdown) {
        // A process of the same name that was here before is somebody else.
        let born = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let name = format!("{id} {}", born.map_or(0, |since| since.as_nanos()));
        let mut won = None;
        let campaigning = async {
            let mut quiet = Quiet::default();
            loop {
                let Err(trouble) = self.stand(&name, &office, &mut won, &mut quiet).await;
                quiet.complain("no election", &trouble);
                // Who is in office stays so until the lease has ended by the own clock.
                if won.is_none() {
                    office.leave(format!("etcd does not say who is controller: {trouble}"));
                }
                sleep(RETRY).await;
            }
        };
        tokio::select! {
            () = campaigning => {}
            () = shutdown.wait() => {}
        }
        office.leave("it is shutting down".to_owned());
        if let Some(Won { lease, .. }) = won {
            lease.give_up().await;
        }
    }

    async fn stand(
        &self,
        name: &str,
        office: &Office,
        won: &mut Option<Won>,
        quiet: &mut Quiet,
    ) -> Result<Infallible, Trouble> {
        let mut client = self.connect().await?;
        loop {
            let held = timeout(PATIENCE, client.get(self.key(CONTROLLER), None)).await??;
            quiet.clear();
            let holder = held.kvs().first();
            // One who is still in office goes on, over this connection.
            let mine = |won: &&mut Won| {
                holder.is_some_and(|holder| holder.create_revision() == won.revision)
            };
            if let Some(won) = won.as_mut().filter(mine) {
                won.lease.client = client.clone();
                return self.serve(won, office).await;
            }
            *won = None;
            if let Some(holder) = holder {
                office.leave(format!("the controller is {}", short(holder)));
                sleep(RENEW / 2).await;
                continue;
            }
            *won = self.take_office(&mut client, name, office).await?;
        }
    }

    /// Takes the office if nobody else does.
    async fn take_office(
        &self,
        client: &mut Client,
        name: &str,
        office: &Office,
    ) -> Result<Option<Won>, Trouble> {
        let lease = Lease::grant(client.clone()).await?;
        let last = timeout(PATIENCE, client.get(self.key(TERM), None)).await??;
        let last = last.kvs().first();
        let term = last.and_then(number).unwrap_or(0).max(office.obeyed()).saturating_add(1);
        let vacant = Compare::create_revision(self.key(CONTROLLER), CompareOp::Equal, 0);
        let latest = Compare::mod_revision(
            self.key(TERM),
            CompareOp::Equal,
            last.map_or(0, KeyValue::mod_revision),
        );
        let with_lease = Some(PutOptions::new().with_lease(lease.id));
        let election = Txn::new().when([vacant, latest]).and_then([
            TxnOp::put(self.key(CONTROLLER), name, with_lease),
            TxnOp::put(self.key(TERM), term.to_string(), None),
        ]);
        let elected = timeout(PATIENCE, client.txn(election)).await??;
        if !elected.succeeded() {
            lease.give_up().await;
            return Ok(None);
        }
        tracing::info!(term, "elected controller");
        let revision = elected.header().map_or(0, |header| header.revision());
        Ok(Some(Won { term, revision, lease }))
    }

    /// In office until something goes wrong.
    async fn serve(&self, won: &mut Won, office: &Office) -> Result<Infallible, Trouble> {
        loop {
            // Nodes that obeyed a controller from before etcd, or from another one.
            if office.obeyed() > won.term {
                self.raise(won, office.obeyed().saturating_add(1)).await?;
            }
            won.lease.renew().await?;
            office.hold(won.term, won.lease.until);
            tokio::select! {
                () = sleep(RENEW) => {}
                () = office.wish() => {}
            }
        }
    }

    /// Goes on in a higher term, if it is still in office.
    async fn raise(&self, won: &mut Won, term: u64) -> Result<(), Trouble> {
        let mine = Compare::create_revision(self.key(CONTROLLER), CompareOp::Equal, won.revision);
        let raise = TxnOp::put(self.key(TERM), term.to_string(), None);
        let raise = Txn::new().when([mine]).and_then([raise]);
        if !timeout(PATIENCE, won.lease.client.txn(raise)).await??.succeeded() {
            return Err(Trouble::Expired);
        }
        tracing::info!(term, "its term is raised, as nodes obeyed a higher one");
        won.term = term;
        Ok(())
    }
}

fn number(pair: &KeyValue) -> Option<u64> {
    pair.value_str().ok()?.parse().ok()
}

/// The name of the process that is in office.
fn short(holder: &KeyValue) -> String {
    let name = String::from_utf8_lossy(holder.value());
    name.split(' ').next().unwrap_or_default().to_owned()
}
